//! `config.json` of a checkpoint of a known family: read, validated, written back.
//!
//! Fields carry the names of the file. Both spellings that are in use are read: `torch_dtype` or `dtype`,
//! `rope_theta` at the top or (transformers 5) inside `rope_parameters`, with or without `layer_types`.
//! What would change the numbers and is not implemented (RoPE scaling, sliding-window layers, another
//! activation or architecture) is refused: computing something else silently is the worst outcome.

use super::family::{self, Family};
use crate::files::Files;
use crate::problem::{Exit, Problem};
use serde_json::{Map, Value};
use std::path::Path;

/// The shape of a model. All counts are at least 1 and small enough that products of two fit in 64 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What is particular to the architecture.
    pub family: &'static Family,
    /// V: rows of the embedding.
    pub vocab_size: usize,
    /// H: width of the values between layers.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// How many layers the decoder has.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values, each shared by as many heads of the queries.
    pub num_key_value_heads: usize,
    /// `hidden_size / num_attention_heads` unless the file says otherwise.
    pub head_dim: usize,
    /// What is added to the mean square in RMS norms.
    pub rms_norm_eps: f32,
    /// The base of the angles of rotary embedding.
    pub rope_theta: f32,
    /// Whether the head uses the rows of the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens of the longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Standard deviation of [`super::Model::random`].
    pub initializer_range: f64,
    /// `eos_token_id`, one or several; empty if the file gives none.
    pub eos_token_ids: Vec<u32>,
    /// The file as it was read, so that writing keeps what is not understood here.
    raw: Map<String, Value>,
}

/// Heads of attention and their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Of the queries.
    pub heads: usize,
    /// Of keys and values.
    pub kv_heads: usize,
    /// Values of each.
    pub head_dim: usize,
}

/// No dimension of a real model is near this; it keeps products far from overflow.
const DIMENSION_LIMIT: u64 = 1 << 28;
/// Nor has one as many layers; each is named before its weights are looked for.
const LAYER_LIMIT: usize = 1 << 12;

impl Config {
    /// Reads `config.json` of a model folder.
    pub fn load(files: &Files) -> Result<Config, Problem> {
        let path = files.get("config.json").ok_or_else(|| {
            Problem::new("model::no_config", "a model folder needs `config.json`, which is not there")
                .exit(Exit::Missing)
        })?;
        let text = std::fs::read_to_string(path).map_err(|error| Problem::io("model::read", "read", path, &error))?;
        Config::parse(&text).map_err(|problem| problem.at_file(path))
    }

    /// From the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Config, Problem> {
        let raw: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| bad(format!("`config.json` is not a JSON object: {error}")))?;
        Config::from_map(raw)
    }

    /// From the fields of a `config.json`.
    pub fn from_map(raw: Map<String, Value>) -> Result<Config, Problem> {
        let read = Reader(&raw);
        let family = match raw.get("model_type").and_then(Value::as_str) {
            Some(name) => family::named(name).ok_or_else(|| {
                let known: Vec<String> =
                    family::FAMILIES.iter().map(|family| format!("`{}`", family.model_type)).collect();
                unsupported(format!("the architecture is `{name}`; only {} is implemented", known.join(", ")))
            })?,
            None => return Err(bad("`model_type` is missing".into())),
        };
        if let Some(act) = raw.get("hidden_act").and_then(Value::as_str)
            && act != family.activation
        {
            return Err(unsupported(format!("`hidden_act` is `{act}`; {} has `{}`", family.name, family.activation)));
        }
        let hidden_size = read.count("hidden_size")?;
        let heads = read.count("num_attention_heads")?;
        let head_dim = match read.present("head_dim") {
            Some(_) => read.count("head_dim")?,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(bad(format!(
                    "`hidden_size` {hidden_size} is no multiple of `num_attention_heads` {heads} and no `head_dim` is given"
                )));
            }
        };
        let kv_heads = read.present("num_key_value_heads").map_or(Ok(heads), |_| read.count("num_key_value_heads"))?;
        let config = Config {
            family,
            vocab_size: read.count("vocab_size")?,
            hidden_size,
            intermediate_size: read.count("intermediate_size")?,
            num_hidden_layers: read.layers()?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: read.number("rms_norm_eps", 1e-6)? as f32,
            rope_theta: read_rope(&raw)? as f32,
            tie_word_embeddings: read.flag("tie_word_embeddings", false)?,
            max_position_embeddings: read
                .present("max_position_embeddings")
                .map_or(Ok(32768), |_| read.count("max_position_embeddings"))?,
            initializer_range: read.number("initializer_range", 0.02)?,
            eos_token_ids: read.ids("eos_token_id")?,
            raw: raw.clone(),
        };
        if !config.head_dim.is_multiple_of(2) {
            return Err(bad(format!("`head_dim` {} is odd; rotary embeddings turn pairs", config.head_dim)));
        }
        if !config.num_attention_heads.is_multiple_of(config.num_key_value_heads) {
            return Err(bad(format!(
                "`num_attention_heads` {heads} is no multiple of `num_key_value_heads` {kv_heads}"
            )));
        }
        if !(config.rope_theta > 0.0 && config.rms_norm_eps > 0.0 && config.initializer_range >= 0.0) {
            return Err(bad(
                "`rope_theta` and `rms_norm_eps` must be positive, `initializer_range` not negative".into()
            ));
        }
        refuse_sliding_layers(&read, &config)?;
        Ok(config)
    }

    /// Width of the queries: `num_attention_heads * head_dim`.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the keys, and of the values: `num_key_value_heads * head_dim`.
    pub fn key_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// How attention is divided.
    pub fn heads(&self) -> Heads {
        Heads { heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// `Err` naming the first id that the embedding has no row for.
    pub fn check_ids(&self, ids: &[u32]) -> Result<(), Problem> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(Problem::new(
                "model::id_out_of_range",
                format!("token id {id} has no row in an embedding of {}", self.vocab_size),
            )
            .exit(Exit::Failed)
            .note("the tokenizer or the token ids belong to another model")),
        }
    }

    /// The text of `config.json` for weights stored as `dtype` (`float32`, `bfloat16`): what was read, with
    /// the fields that saving decides put right.
    pub fn to_json(&self, dtype: &str) -> String {
        let mut map = self.raw.clone();
        map.insert("tie_word_embeddings".into(), self.tie_word_embeddings.into());
        let spelling = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(spelling.into(), dtype.into());
        let mut text = serde_json::to_string_pretty(&Value::Object(map)).unwrap_or_default();
        text.push('\n');
        text
    }
}

fn bad(message: String) -> Problem {
    Problem::new("model::config", message)
}

fn unsupported(message: String) -> Problem {
    Problem::new("model::unsupported", message)
        .exit(Exit::Missing)
        .note("it would give other numbers than the model's own code, so it is refused")
}

/// Typed access to the fields, each error naming its field.
struct Reader<'a>(&'a Map<String, Value>);

impl Reader<'_> {
    /// Absent and null are the same thing in these files.
    fn present(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn count(&self, key: &str) -> Result<usize, Problem> {
        let value = self.present(key).ok_or_else(|| bad(format!("`{key}` is missing")))?;
        match value.as_u64() {
            Some(n) if (1..=DIMENSION_LIMIT).contains(&n) => Ok(n as usize),
            _ => Err(bad(format!("`{key}` is {value}; a count from 1 to {DIMENSION_LIMIT} is needed"))),
        }
    }

    fn layers(&self) -> Result<usize, Problem> {
        match self.count("num_hidden_layers")? {
            n if n <= LAYER_LIMIT => Ok(n),
            n => Err(bad(format!("`num_hidden_layers` is {n}; at most {LAYER_LIMIT} are read"))),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64, Problem> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| bad(format!("`{key}` is {value}; a number is needed"))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, Problem> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| bad(format!("`{key}` is {value}; true or false is needed"))),
        }
    }

    /// One id or a list of them.
    fn ids(&self, key: &str) -> Result<Vec<u32>, Problem> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| bad(format!("`{key}` holds {value}; token ids are needed")))
        };
        match self.present(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}

/// `rope_theta`, wherever it stands; any scaling other than the default one is refused.
fn read_rope(raw: &Map<String, Value>) -> Result<f64, Problem> {
    let mut theta = Reader(raw).number("rope_theta", 10_000.0)?;
    for key in ["rope_scaling", "rope_parameters"] {
        match Reader(raw).present(key) {
            None => {}
            Some(Value::Object(map)) => {
                let kind = ["rope_type", "type"].iter().find_map(|name| map.get(*name)).and_then(Value::as_str);
                if !matches!(kind, None | Some("default")) || (kind.is_none() && key == "rope_scaling") {
                    return Err(unsupported(format!(
                        "`{key}` asks for RoPE scaling `{}`, which is not implemented",
                        kind.unwrap_or("?")
                    ))
                    .help("set `rope_scaling` to null in a copy of `config.json`, if texts are no longer than the original context"));
                }
                theta = Reader(map).number("rope_theta", theta)?;
            }
            Some(value) => return Err(bad(format!("`{key}` is {value}; an object or null is needed"))),
        }
    }
    Ok(theta)
}

/// A layer with a window narrower than the context would need another mask.
fn refuse_sliding_layers(read: &Reader, config: &Config) -> Result<(), Problem> {
    let layers = config.num_hidden_layers;
    let sliding = match read.present("layer_types") {
        Some(Value::Array(types)) => {
            if types.len() != layers {
                return Err(bad(format!("`layer_types` has {} entries for {layers} layers", types.len())));
            }
            match types.iter().find(|kind| !matches!(kind.as_str(), Some("full_attention" | "sliding_attention"))) {
                Some(kind) => return Err(unsupported(format!("`layer_types` holds {kind}"))),
                None => types.iter().any(|kind| kind == "sliding_attention"),
            }
        }
        Some(value) => return Err(bad(format!("`layer_types` is {value}; a list is needed"))),
        None => {
            let from = read.number("max_window_layers", 28.0)?;
            read.flag("use_sliding_window", false)? && from < layers as f64
        }
    };
    let window = read.number("sliding_window", 4096.0)?;
    if sliding && window < config.max_position_embeddings as f64 {
        return Err(unsupported(format!("some layers attend to a sliding window of {window} tokens")).help(
            "set `use_sliding_window` to false in a copy of `config.json`, if texts are no longer than the window",
        ));
    }
    Ok(())
}

/// Writes `config.json` into `dir`.
pub(super) fn save(config: &Config, dir: &Path, dtype: &str) -> Result<(), Problem> {
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_json(dtype)).map_err(|error| Problem::io("model::write", "write", &path, &error))
}
