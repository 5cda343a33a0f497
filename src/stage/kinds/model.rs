//! `model`: base weights, tokenizer and chat template, from a folder, the hub, or made here; or an adapter
//! that PEFT wrote, on top of another model.

use crate::data::Tokenizer;
use crate::files::Files;
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Lineage, Params, Type};
use crate::model::lora::{self, ADAPTER_CONFIG};
use crate::model::{Config, LoadOptions, LoraSpec, Model};
use crate::problem::{Exit, Problem};
use crate::safetensors::{ADAPTER_FILE, Element};
use crate::stage::context::{Context, read_params};
use crate::stage::kind::StageKind;

use crate::stage::share::bundled;
use crate::stage::share::inputs;
use crate::tensor::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const SIZE: Type = Type::Int { min: 1, max: 1 << 20 };

const SHAPE: &[Key] = &[
    Key::required("hidden_size", SIZE, "Channels of the residual stream."),
    Key::required("num_hidden_layers", Type::Int { min: 1, max: 1024 }, "Decoder layers."),
    Key::required("num_attention_heads", Type::Int { min: 1, max: 4096 }, "Query heads."),
    Key::required("num_key_value_heads", Type::Int { min: 1, max: 4096 }, "Key/value heads; divides the query heads."),
    Key::optional("head_dim", Type::Int { min: 2, max: 1024 }, "Channels per head; hidden_size / heads if absent."),
    Key::required("intermediate_size", SIZE, "Channels inside the MLP."),
    Key::optional(
        "vocab_size",
        Type::Int { min: 1, max: 1 << 24 },
        "Rows of the embedding; the tokenizer's ids if absent.",
    ),
    Key::default("max_position_embeddings", Type::Int { min: 1, max: 1 << 30 }, "32768", "Longest context, in tokens."),
    Key::default(
        "rope_theta",
        Type::Float { min: 1.0, max: 1e12, above: false },
        "1000000.0",
        "Base of the rotary angles.",
    ),
    Key::default(
        "rms_norm_eps",
        Type::Float { min: 0.0, max: 1.0, above: true },
        "1e-6",
        "Added to the mean square in RMSNorm.",
    ),
    Key::default("tie_word_embeddings", Type::Bool, "true", "Whether the head is the embedding."),
    Key::default(
        "initializer_range",
        Type::Float { min: 0.0, max: 10.0, above: true },
        "0.02",
        "Standard deviation of the weights.",
    ),
    Key::default("seed", Type::Int { min: 0, max: i64::MAX }, "0", "Seed of the weights."),
];

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "model",
    about: "base weights, tokenizer and chat template; or an adapter on another model",
    recipe: 1,
    yields: ArtifactType::Model,
    keys: &[
        Key::required(
            "source",
            Type::Source(&["hf", "path", "init"]),
            "`hf:OWNER/NAME[@REVISION]`, `path:FOLDER`, `init:random` (with `init` and `tokenizer`) or a bundled model such as `init:mini-3B`.",
        ),
        Key::optional(
            "tokenizer",
            Type::Source(&["hf", "path", "init"]),
            "Folder with tokenizer.json and tokenizer_config.json, in place of the model's own; needed by `init:random`.",
        ),
        Key::optional("init", Type::Table(SHAPE), "Shape of an `init:random` model, by the names of config.json."),
        Key::optional(
            "model",
            Type::Ref(&[ArtifactType::Model]),
            "The model that an adapter sits on: `source` is then a PEFT folder, with adapter_config.json and adapter_model.safetensors.",
        ),
    ],
    floats: false,
    // On top of nothing, where there is no `model`: the whole of it.
    lineage: |_| Lineage::OnTop,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { config, adapter: adapter_of, ..StageKind::new(&KIND, run) };

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    source: String,
    tokenizer: Option<String>,
    init: Option<Shape>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: Option<usize>,
    max_position_embeddings: usize,
    rope_theta: f64,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    initializer_range: f64,
    seed: u64,
}

fn rules(params: &Params) -> Vec<Broken> {
    let text = |key: &str| params.get(key).and_then(|value| value.as_str()).unwrap_or("");
    let mut broken = Vec::new();
    if params.contains_key("model") {
        for key in ["tokenizer", "init"].into_iter().filter(|key| params.contains_key(*key)) {
            let message = format!("an adapter has no `{key}` of its own");
            broken.push(Broken { key, message, help: "write it where the model beneath is declared".into() });
        }
        if text("source").starts_with("init:") {
            broken.push(Broken {
                key: "source",
                message: "`source` is no adapter".into(),
                help: "source = \"path:FOLDER\", or leave `model` out; training stages make new adapters themselves"
                    .into(),
            });
        }
        return broken;
    }
    match text("source").strip_prefix("init:") {
        Some("random") => {
            for key in ["init", "tokenizer"] {
                if !params.contains_key(key) {
                    let message = format!("`init:random` needs the key `{key}`");
                    let help = match key {
                        "init" => {
                            "init = { hidden_size = 64, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 176 }"
                        }
                        _ => "tokenizer = \"path:FOLDER\", a folder with tokenizer.json",
                    };
                    broken.push(Broken { key: "source", message, help: help.into() });
                }
            }
        }
        Some(name) if bundled::model(name).is_none() => broken.push(Broken {
            key: "source",
            message: format!("there is no bundled model `{name}`"),
            help: format!("bundled: {}; or `init:random` with `init` and `tokenizer`", bundled::MODELS.join(", ")),
        }),
        _ => {
            if params.contains_key("init") {
                broken.push(Broken {
                    key: "init",
                    message: "`init` gives the shape of an `init:random` model only".into(),
                    help: "source = \"init:random\"".into(),
                });
            }
        }
    }
    if let Some(name) = text("tokenizer").strip_prefix("init:")
        && bundled::tokenizer(name).is_none()
    {
        broken.push(Broken {
            key: "tokenizer",
            message: format!("there is no bundled tokenizer `{name}`"),
            help: "tokenizer = \"init:mini\"".into(),
        });
    }
    broken
}

/// The configuration that it comes to, before it has run: from the folder its `source` came to, from what is bundled,
/// or from its `init` table. `None` if it is an adapter or its files say nothing.
fn config(params: &Params, source: Option<&Path>, tokenizer: Option<&Path>) -> Option<Result<Config, Problem>> {
    let spec: Spec = read_params(KIND.name, params.clone()).ok()?;
    match spec.source.strip_prefix("init:") {
        None => {
            let files = Files::from_dir(source?).ok()?;
            files.get("config.json")?;
            Some(Config::load(&files))
        }
        Some("random") => {
            let shape = spec.init?;
            let vocab_size = match shape.vocab_size {
                Some(rows) => rows,
                None => match spec.tokenizer?.strip_prefix("init:") {
                    Some(name) => bundled::id_limit(name)?,
                    None => Tokenizer::load(&Files::from_dir(tokenizer?).ok()?).ok()?.id_limit(),
                },
            };
            Some(Config::parse(&shape.config(vocab_size).to_string()))
        }
        Some(name) => {
            let text = bundled::file(name, "config.json")?;
            Some(Config::parse(std::str::from_utf8(text).ok()?))
        }
    }
}

/// The adapter that an imported one is, by its folder.
fn adapter_of(_: &Params, source: Option<&Path>) -> Option<LoraSpec> {
    LoraSpec::read(&source?.join(ADAPTER_CONFIG)).ok()
}

impl Shape {
    /// `config.json` of a model of this shape, with this many ids.
    fn config(&self, vocab_size: usize) -> Value {
        let mut config = json!({
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
        });
        if let Some(head_dim) = self.head_dim {
            config["head_dim"] = head_dim.into();
        }
        config
    }
}

/// The files of a model folder that belong to the model.
fn wanted(name: &str) -> bool {
    ["config.json", "generation_config.json", "model.safetensors.index.json"].contains(&name)
        || name.ends_with(".safetensors") && !name.contains('/')
        || tokenizer_file(name)
}

fn tokenizer_file(name: &str) -> bool {
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"].contains(&name)
}

/// Takes weights or an adapter, or makes weights, checks them and writes them with their tokenizer.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    if !ctx.inputs("model").is_empty() {
        return adapter(ctx);
    }
    let tokenizer = match spec.tokenizer.as_deref().map(|text| text.strip_prefix("init:")) {
        None => None,
        Some(Some(name)) => bundled::tokenizer(name),
        Some(None) => Some(bundled::Bundle::Folder(folder(&ctx.sources["tokenizer"])?)),
    };
    if let Some(tokenizer) = &tokenizer {
        tokenizer.write(ctx.out, tokenizer_file)?;
    }
    let keep = |name: &str| wanted(name) && (tokenizer.is_none() || !tokenizer_file(name));
    match spec.source.strip_prefix("init:") {
        Some("random") => {
            let shape = spec.init.expect("a rule demands `init` for init:random");
            write_random(&shape, ctx.out)?;
        }
        Some(name) => bundled::model(name).expect("a rule names the bundled models").write(ctx.out, keep)?,
        None => {
            let files = folder(&ctx.sources["source"])?;
            if lora::is_adapter(&files) && files.get("config.json").is_none() {
                return Err(Problem::new("model::no_base", "the folder holds an adapter and no model")
                    .at_file(&ctx.sources["source"])
                    .help("name what it sits on: model = \"STAGE\", a stage of kind `model`"));
            }
            bundled::Bundle::Folder(files).write(ctx.out, keep)?;
        }
    }
    check(ctx)
}

/// Takes in an adapter, and loads it on its model once.
fn adapter(ctx: &Context) -> Result<(), Problem> {
    let source = &ctx.sources["source"];
    let files = folder(source)?;
    for name in [ADAPTER_CONFIG, ADAPTER_FILE] {
        if files.get(name).is_none() {
            return Err(Problem::new("model::no_adapter", format!("an adapter folder needs `{name}`"))
                .at_file(source)
                .exit(Exit::Missing)
                .help("leave `model` out if the folder holds a whole model"));
        }
    }
    bundled::Bundle::Folder(files).write(ctx.out, |name| [ADAPTER_CONFIG, ADAPTER_FILE].contains(&name))?;
    let out = folder(ctx.out)?;
    let chain: Vec<&Files> = inputs::chain(ctx, "model").into_iter().chain([&out]).collect();
    Model::load(&chain, &LoadOptions { dtype: Dtype::Bf16, fold_last: false }).map(drop)
}

fn folder(path: &Path) -> Result<Files, Problem> {
    Files::from_dir(path)
        .map_err(|error| Problem::io("model::unreadable", "read the folder", path, &error).exit(Exit::Missing))
}

fn write_random(shape: &Shape, out: &Path) -> Result<(), Problem> {
    let tokenizer = Tokenizer::load(&folder(out)?)?;
    let mut config = shape.config(shape.vocab_size.unwrap_or(tokenizer.id_limit()));
    if let Some(end) = tokenizer.eos() {
        config["eos_token_id"] = end.into();
    }
    let config = Config::parse(&config.to_string())?;
    Model::random(config, shape.seed, Dtype::F32).save(out, Element::F32)
}

/// Loads what was written once, so that a bad file is found here and not hours later.
fn check(ctx: &Context) -> Result<(), Problem> {
    let files = folder(ctx.out)?;
    let model = Model::load(&[&files], &LoadOptions { dtype: Dtype::Bf16, fold_last: false })?;
    Tokenizer::load(&files)?.fits(model.config.vocab_size)?;
    let size: u64 = files.iter().filter_map(|(_, path)| fs::metadata(path).ok()).map(|m| m.len()).sum();
    tracing::info!(stage = ctx.label, bytes = size, "model checked");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(value: Value) -> Params {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn the_shape_of_a_model_is_known_before_it_is_made() {
        let known = config(&params(json!({"source": "init:mini-3B"})), None, None).unwrap().unwrap();
        assert!(known.hidden_size > 0);
        let init = json!({
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 48, "tie_word_embeddings": true, "max_position_embeddings": 64, "rope_theta": 1e6,
            "rms_norm_eps": 1e-6, "initializer_range": 0.02, "seed": 0,
        });
        let random = params(json!({"source": "init:random", "tokenizer": "init:mini", "init": init}));
        let random = config(&random, None, None).unwrap().unwrap();
        // As many rows as the tokenizer, once it lies in a folder, has ids.
        let folder = tempfile::tempdir().unwrap();
        bundled::tokenizer("mini").unwrap().write(folder.path(), |_| true).unwrap();
        let ids = Tokenizer::load(&Files::from_dir(folder.path()).unwrap()).unwrap().id_limit();
        assert_eq!((random.hidden_size, random.vocab_size), (32, ids));
        assert!(config(&params(json!({"source": "hf:A/B"})), None, None).is_none());
    }
}
