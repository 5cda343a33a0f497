//! Low-rank adapters (Hu et al., "LoRA", 2021) and their PEFT folders.
//!
//! A linear layer `y = W x + b` with an adapter computes `y = W x + b + (alpha / rank) B A x`,
//! A `[rank, in]`, B `[out, rank]`. Any of the seven linears of a layer may have one, and `lm_head`: with a
//! tied head the adapter belongs to the head alone, the embedding does not move.
//!
//! A folder is what PEFT writes: `adapter_config.json` and `adapter_model.safetensors` with names like
//! `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. PEFT adds a copy of the frozen head
//! (`base_model.model.lm_head.base_layer.weight`) when the head is a target; it is ignored. Variants with
//! other arithmetic (DoRA, rank-stabilised scaling, per-module ranks, trained biases) are refused.

use super::config::Config;
use super::parameter::Parameter;
use crate::files::Files;
use crate::problem::{Exit, Problem};
use crate::random::Stream;
use crate::safetensors::{self, ADAPTER_FILE, Element, Tensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

pub use super::family::TARGETS;
pub use super::tensors::linears;

/// The configuration file of an adapter folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// An adapter to train: the `lora` table of a manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraSpec {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// What the product is multiplied by, before it is divided by the rank.
    pub alpha: f64,
    /// Some of [`TARGETS`].
    pub targets: Vec<String>,
}

impl LoraSpec {
    /// `alpha / rank`.
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }

    /// Whether the linear of this name has an adapter.
    pub fn adapts(&self, linear: &str) -> bool {
        self.targets.iter().any(|target| linear.rsplit('.').next() == Some(target))
    }

    /// Whether both are the same shape; the order in which targets are written says nothing.
    pub fn is(&self, other: &LoraSpec) -> bool {
        let targets = |spec: &LoraSpec| TARGETS.map(|target| spec.targets.iter().any(|there| there == target));
        (self.rank, self.alpha, targets(self)) == (other.rank, other.alpha, targets(other))
    }

    /// Of an `adapter_config.json`, whose targets are taken as they stand.
    pub fn read(path: &Path) -> Result<LoraSpec, Problem> {
        let text = std::fs::read_to_string(path).map_err(|error| Problem::io("model::read", "read", path, &error))?;
        let mut spec = parse_config(&text).map_err(|problem| problem.at_file(path))?;
        let config: Value = serde_json::from_str(&text).unwrap_or_default();
        let names = config["target_modules"].as_array().into_iter().flatten().filter_map(Value::as_str);
        spec.targets = names.map(String::from).collect();
        Ok(spec)
    }

    /// `Err` if a target is not a linear of the model or the rank is 0.
    pub fn check(&self) -> Result<(), Problem> {
        if let Some(unknown) = self.targets.iter().find(|target| !TARGETS.contains(&target.as_str())) {
            return Err(Problem::new("model::lora_target", format!("`{unknown}` is no linear layer of the model"))
                .exit(Exit::Usage)
                .help(format!("the targets are {}", TARGETS.join(", "))));
        }
        if self.rank == 0 || self.targets.is_empty() || !self.alpha.is_finite() {
            return Err(Problem::new(
                "model::lora_spec",
                "an adapter needs a rank of at least 1, a finite alpha and a target",
            )
            .exit(Exit::Usage));
        }
        Ok(())
    }
}

/// PEFT's name of one half (`A` or `B`) of the adapter of `linear`.
pub fn peft_name(linear: &str, half: char) -> String {
    format!("base_model.model.{linear}.lora_{half}.weight")
}

/// The adapter of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair<V = Vec<f32>> {
    /// `[rank, in]`
    pub a: V,
    /// `[out, rank]`
    pub b: V,
    /// r
    pub rank: usize,
    /// `alpha / rank`
    pub scale: f32,
}

/// A new adapter: A uniform in ±1/sqrt(in) (PEFT's Kaiming-uniform with a = sqrt 5), drawn from `seed` and
/// the tensor's name, B zero.
pub fn initial(spec: &LoraSpec, linear: &str, [out, input]: [usize; 2], seed: u64) -> LoraPair {
    let random = Stream::named(seed, &["lora", linear]);
    let bound = 1.0 / (input as f64).sqrt();
    let a = (0..spec.rank * input).map(|i| ((random.uniform(i as u64) * 2.0 - 1.0) * bound) as f32).collect();
    LoraPair { a, b: vec![0.0; out * spec.rank], rank: spec.rank, scale: spec.scale() }
}

/// An adapter folder, checked against a model's shape, its weights read when asked for.
pub struct AdapterFolder {
    /// What its configuration says.
    pub spec: LoraSpec,
    tensors: Tensors,
}

impl AdapterFolder {
    /// Reads configuration and header. `Err` if the folder is damaged, asks for arithmetic that is not
    /// implemented, or does not fit `config`.
    pub fn open(files: &Files, config: &Config) -> Result<AdapterFolder, Problem> {
        let missing = |name: &str| {
            Problem::new("model::no_adapter", format!("an adapter folder needs `{name}`, which is not there"))
                .exit(Exit::Missing)
        };
        let path = files.get(ADAPTER_CONFIG).ok_or_else(|| missing(ADAPTER_CONFIG))?;
        let text = std::fs::read_to_string(path).map_err(|error| Problem::io("model::read", "read", path, &error))?;
        let mut spec = parse_config(&text).map_err(|problem| problem.at_file(path))?;
        let path = files.get(ADAPTER_FILE).ok_or_else(|| missing(ADAPTER_FILE))?;
        let tensors = Tensors::open(path)?;
        let halves =
            |(linear, target, _): (String, &'static str, _)| ['A', 'B'].map(|half| (peft_name(&linear, half), target));
        let known: HashMap<String, &str> = linears(config).into_iter().flat_map(halves).collect();
        let mut targets = Vec::new();
        for name in tensors.names() {
            if name.ends_with(".base_layer.weight") {
                continue;
            }
            match known.get(name) {
                Some(target) => targets.push(*target),
                None => {
                    return Err(Problem::new(
                        "model::adapter_mismatch",
                        format!("the adapter's tensor `{name}` fits no linear layer of the model"),
                    )
                    .at_file(path)
                    .note(format!("the model has {} layers", config.num_hidden_layers)));
                }
            }
        }
        spec.targets =
            TARGETS.iter().filter(|target| targets.contains(target)).map(|target| target.to_string()).collect();
        if spec.targets.is_empty() {
            return Err(
                Problem::new("model::adapter_mismatch", "the adapter holds no tensor of a linear layer").at_file(path)
            );
        }
        Ok(AdapterFolder { spec, tensors })
    }

    /// The adapter of `linear`, if it has one.
    pub fn pair(&self, linear: &str, [out, input]: [usize; 2]) -> Result<Option<LoraPair>, Problem> {
        let [a, b] = ['A', 'B'].map(|half| peft_name(linear, half));
        if self.tensors.shape(&a).is_none() && self.tensors.shape(&b).is_none() {
            return Ok(None);
        }
        let rank = self.spec.rank;
        let (a, b) = (self.tensors.f32(&a, &[rank, input])?, self.tensors.f32(&b, &[out, rank])?);
        Ok(Some(LoraPair { a, b, rank, scale: self.spec.scale() }))
    }
}

/// Whether a folder holds an adapter rather than a model.
pub fn is_adapter(files: &Files) -> bool {
    files.get(ADAPTER_CONFIG).is_some()
}

/// `adapter_config.json`; the targets are filled in from the tensors, which say it exactly.
fn parse_config(text: &str) -> Result<LoraSpec, Problem> {
    let bad = |message: String| Problem::new("model::adapter_config", message);
    let map: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| bad(format!("`{ADAPTER_CONFIG}` is not a JSON object: {error}")))?;
    let unsupported = |key: &str, value: &Value| {
        Problem::new("model::unsupported", format!("the adapter has `{key}` = {value}, which is not implemented"))
            .exit(Exit::Missing)
            .help("merge it into its base model with PEFT, and use the merged model")
    };
    if let Some(kind) = map.get("peft_type")
        && kind != "LORA"
    {
        return Err(unsupported("peft_type", kind));
    }
    // Off is spelt in many ways, and each of these changes the arithmetic when on.
    for key in [
        "use_rslora",
        "use_dora",
        "use_qalora",
        "lora_bias",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "target_parameters",
    ] {
        if let Some(value) = map.get(key) {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            if !off {
                return Err(unsupported(key, value));
            }
        }
    }
    if let Some(bias) = map.get("bias")
        && bias != "none"
    {
        return Err(unsupported("bias", bias));
    }
    let rank = map.get("r").and_then(Value::as_u64).filter(|rank| (1..=1 << 20).contains(rank));
    let rank = rank.ok_or_else(|| bad("`r` must be a rank from 1 to 1048576".into()))?;
    let alpha = map.get("lora_alpha").and_then(Value::as_f64);
    let alpha = alpha.ok_or_else(|| bad("`lora_alpha` must be a number".into()))?;
    Ok(LoraSpec { rank: rank as usize, alpha, targets: Vec::new() })
}

/// Writes a PEFT folder: `params` are halves named as in the file (see [`peft_name`]). `base` is shown to
/// people as the name of the model beneath.
pub fn save(dir: &Path, spec: &LoraSpec, params: &[Parameter], base: &str) -> Result<(), Problem> {
    let path = dir.join(ADAPTER_CONFIG);
    let alpha = if spec.alpha.fract() == 0.0 { json!(spec.alpha as i64) } else { json!(spec.alpha) };
    let config = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": spec.targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false
    });
    let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
    std::fs::write(&path, text).map_err(|error| Problem::io("model::write", "write", &path, &error))?;
    let tensors: Vec<_> = params.iter().map(|param| (param.name.clone(), param.shape.clone())).collect();
    safetensors::write(&dir.join(ADAPTER_FILE), Element::F32, &tensors, |i| Ok(Cow::Borrowed(&params[i].value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_that_is_not_implemented_is_refused() {
        for (key, value) in [
            ("use_dora", json!(true)),
            ("use_rslora", json!(true)),
            ("rank_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"q_proj": 4})),
            ("bias", json!("all")),
            ("modules_to_save", json!(["embed_tokens"])),
            ("peft_type", json!("LOHA")),
        ] {
            let mut map = json!({"r": 3, "lora_alpha": 6, "peft_type": "LORA", "bias": "none", "use_dora": false});
            map[key] = value;
            let problem = parse_config(&map.to_string()).unwrap_err();
            assert!(problem.code == "model::unsupported" && problem.message.contains(key), "{problem}");
        }
        for text in ["{}", r#"{"r": 0, "lora_alpha": 1}"#, r#"{"r": 4}"#, "7"] {
            assert_eq!(parse_config(text).unwrap_err().code, "model::adapter_config");
        }
    }
}
