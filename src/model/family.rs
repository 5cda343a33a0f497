//! Families of dense decoders, as data: what one has that others have not. `tensors.rs` makes of it and of a configuration
//! the tensors of a checkpoint; everything else about a model is written once, over those.
//!
//! A layer is: RMSNorm, attention over grouped heads with RoPE, RMSNorm, a gated MLP. Adding a family that is one of
//! these is a row of [`FAMILIES`] and its reference numbers.

/// What is particular to a family.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// As `config.json` spells it.
    pub model_type: &'static str,
    /// For people.
    pub name: &'static str,
    /// The linears of a layer with a bias.
    pub biased: &'static [&'static str],
    /// Of the gate, as `hidden_act` spells it.
    pub activation: &'static str,
}

/// The families that there are.
pub const FAMILIES: &[Family] =
    &[Family { model_type: "qwen2", name: "Qwen2", biased: &["q_proj", "k_proj", "v_proj"], activation: "silu" }];

/// The family of a `model_type`.
pub fn named(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}

/// The linears that may have an adapter, in model order: those of a layer, then the head.
pub const TARGETS: [&str; 8] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"];

/// Those of a layer, as a list in a manifest.
pub const LAYER_TARGETS: &str = r#"["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]"#;

/// Linears of a layer.
pub const LINEARS: usize = 7;
/// Places of the linears of a layer in [`TARGETS`].
pub const Q: usize = 0;
/// Keys.
pub const K: usize = 1;
/// Values.
pub const V: usize = 2;
/// What is attended to, back to the residual stream.
pub const O: usize = 3;
/// The gate of the MLP.
pub const GATE: usize = 4;
/// What the gate lets through.
pub const UP: usize = 5;
/// Back to the residual stream.
pub const DOWN: usize = 6;
/// The head among all targets.
pub const HEAD: usize = 7;
