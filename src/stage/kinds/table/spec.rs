//! What the keys of a table say.

use serde::Deserialize;
use std::collections::BTreeMap;

/// The keys, as `KIND` says what they mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    #[serde(default)]
    pub value: Option<Names>,
    #[serde(default)]
    pub missing: BTreeMap<String, String>,
    /// Read through the context's sources; here only whether there is one.
    #[serde(default)]
    pub published: Option<String>,
    pub decimals: usize,
    #[serde(default)]
    pub caption: Option<String>,
    #[serde(default)]
    pub best: Option<Best>,
    #[serde(default)]
    pub compare: BTreeMap<String, String>,
    pub interval: bool,
    pub counts: bool,
}

/// One name or a list of them.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
pub enum Names {
    One(String),
    Many(Vec<String>),
}

impl Names {
    /// The names, in their order.
    pub fn list(&self) -> Vec<String> {
        match self {
            Names::One(name) => vec![name.clone()],
            Names::Many(names) => names.clone(),
        }
    }
}

/// Which number of a column is marked.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Best {
    Max,
    Min,
    None,
}

/// The name that stands for the mean over the columns of an axis.
pub const MEAN: &str = "mean";
