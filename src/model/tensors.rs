//! The tensors of a checkpoint: what they are called, and their shapes.

use super::config::Config;
use super::family::{DOWN, GATE, HEAD, K, LINEARS, O, Q, TARGETS, UP, V};

/// The name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The name of the norm before the head.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The norms of a layer, before attention and before the MLP.
const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// As in the file.
    pub name: String,
    /// `[out, in]` of a matrix, `[len]` of a norm or a bias.
    pub shape: Vec<usize>,
}

/// The name of a linear: `model.layers.3.mlp.up_proj`, or `lm_head`.
pub fn linear_name(layer: usize, target: usize) -> String {
    let block = if target < GATE { "self_attn" } else { "mlp" };
    match target {
        HEAD => TARGETS[HEAD].into(),
        _ => format!("model.layers.{layer}.{block}.{}", TARGETS[target]),
    }
}

/// The name of a linear's weight.
pub fn weight_name(linear: &str) -> String {
    format!("{linear}.weight")
}

/// The name of a linear's bias.
pub fn bias_name(linear: &str) -> String {
    format!("{linear}.bias")
}

/// The name of a norm of a layer: 0 before attention, 1 before the MLP.
pub fn norm_name(layer: usize, which: usize) -> String {
    format!("model.layers.{layer}.{}.weight", NORMS[which])
}

/// Whether a tensor is a norm's weight.
pub fn is_norm(name: &str) -> bool {
    name.ends_with("norm.weight")
}

/// `[out, in]` of a linear.
pub fn linear_shape(config: &Config, target: usize) -> [usize; 2] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    match target {
        Q => [config.query_size(), hidden],
        K | V => [config.key_size(), hidden],
        O => [hidden, config.query_size()],
        GATE | UP => [inner, hidden],
        DOWN => [hidden, inner],
        _ => [config.vocab_size, hidden],
    }
}

/// Whether a linear has a bias.
pub fn has_bias(config: &Config, target: usize) -> bool {
    config.family.biased.contains(&TARGETS[target])
}

/// Every linear of the model in order, the head last: (name, target, shape).
pub fn linears(config: &Config) -> Vec<(String, &'static str, [usize; 2])> {
    let layers = (0..config.num_hidden_layers).flat_map(|layer| (0..LINEARS).map(move |target| (layer, target)));
    layers
        .chain([(0, HEAD)])
        .map(|(layer, target)| (linear_name(layer, target), TARGETS[target], linear_shape(config, target)))
        .collect()
}

/// Every tensor of a checkpoint, in the order in which all of them are trained. A tied head has none.
pub fn tensors(config: &Config) -> Vec<Tensor> {
    let hidden = config.hidden_size;
    let mut all = vec![Tensor { name: EMBEDDING.into(), shape: vec![config.vocab_size, hidden] }];
    for layer in 0..config.num_hidden_layers {
        all.extend([0, 1].map(|which| Tensor { name: norm_name(layer, which), shape: vec![hidden] }));
        for target in 0..LINEARS {
            let (linear, shape) = (linear_name(layer, target), linear_shape(config, target));
            all.push(Tensor { name: weight_name(&linear), shape: shape.to_vec() });
            if has_bias(config, target) {
                all.push(Tensor { name: bias_name(&linear), shape: vec![shape[0]] });
            }
        }
    }
    all.push(Tensor { name: FINAL_NORM.into(), shape: vec![hidden] });
    if !config.tie_word_embeddings {
        all.push(Tensor { name: weight_name(TARGETS[HEAD]), shape: linear_shape(config, HEAD).to_vec() });
    }
    all
}

impl Config {
    /// Number of weights, the tied head counted once.
    pub fn parameters(&self) -> usize {
        tensors(self).iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }
}
