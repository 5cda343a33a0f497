//! What the keys of a dataset say.

use crate::data::{Eos, Format, Overlength, Side};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The keys, as `KIND` says what they mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub source: Option<String>,
    pub file: Option<String>,
    pub split: Option<String>,
    #[serde(default = "id")]
    pub id: String,
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
    #[serde(default)]
    pub extract: BTreeMap<String, Extract>,
    #[serde(default)]
    pub tag: Map<String, Value>,
    #[serde(default)]
    pub filter: Vec<Condition>,
    pub only_in: Option<Counterpart>,
    pub not_in: Option<Counterpart>,
    pub pair: Option<Pairing>,
    pub sample: Option<Sampling>,
    pub shuffle_seed: Option<u64>,
    pub shortest: Option<Shortest>,
    pub limit: Option<usize>,
    pub select: Option<Vec<String>>,
    pub drop: Option<Vec<String>>,
    pub tokenize: Option<Tokenize>,
}

/// What a training stage would see, and how long it may be.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenize {
    #[serde(default)]
    pub format: Format,
    #[serde(default)]
    pub eos: Eos,
    pub max_tokens: Option<usize>,
    pub max_prompt_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    #[serde(default)]
    pub on_overlength: Overlength,
    #[serde(default)]
    pub truncate_side: Side,
}

/// A part of a text.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extract {
    pub from: String,
    pub pattern: String,
}

/// A test of a field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    pub field: String,
    pub equals: Option<Value>,
    pub one_of: Option<Vec<Value>>,
    pub matches: Option<String>,
    pub min_length: Option<usize>,
    pub max_length: Option<usize>,
    pub at_least: Option<f64>,
    pub at_most: Option<f64>,
    pub not_empty: Option<bool>,
    #[serde(default)]
    pub invert: bool,
}

/// Another dataset, and the field it is matched by.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counterpart {
    #[serde(default = "id")]
    pub by: String,
}

/// A dataset of reverse examples.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pairing {
    #[serde(default = "id")]
    pub by: String,
    #[serde(default)]
    pub unmatched: Unmatched,
}

/// What happens to a record without a counterpart.
#[derive(Deserialize, Default, Clone, Copy, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Unmatched {
    #[default]
    Error,
    Drop,
}

/// A random part.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    pub rows: Option<usize>,
    pub pairs: Option<usize>,
    #[serde(default = "id")]
    pub by: String,
    #[serde(default)]
    pub seed: u64,
}

/// The records with the fewest tokens.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shortest {
    pub rows: usize,
    #[serde(default = "texts")]
    pub fields: Vec<String>,
}

fn id() -> String {
    "id".into()
}

fn texts() -> Vec<String> {
    ["text", "prompt", "thinking", "answer"].map(String::from).to_vec()
}
