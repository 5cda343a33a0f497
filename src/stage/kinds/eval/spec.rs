//! What the keys of an evaluation say.

use crate::manifest::spec::Params;
use crate::problem::Problem;
use crate::remote::Endpoint;
use crate::stage::share::decoding::{self, Decoding};
use crate::stage::share::judge;
use serde::Deserialize;

/// The keys, as `KIND` says what they mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The keys that `decoding` reads.
    #[serde(skip)]
    pub decoding: Decoding,
    pub endpoint: Option<Endpoint>,
    pub prompt: Option<String>,
    pub prompt_file: Option<String>,
    pub system: Option<String>,
    pub question: Option<String>,
    pub answer: String,
    pub choices: Option<Vec<String>>,
    pub shuffle_choices: bool,
    pub grader: Grader,
    pub judge: Option<judge::Spec>,
    pub n: usize,
    pub limit: Option<usize>,
    #[serde(default)]
    pub on_missing: OnMissing,
}

/// How an answer is compared with the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grader {
    Auto,
    Math,
    Numeric,
    Choice,
    S1,
}

/// What happens to an answer that an endpoint does not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnMissing {
    #[default]
    Error,
    Wrong,
}

impl Spec {
    /// `label`: whose parameters they are, for messages.
    pub fn read(label: &str, params: &Params) -> Result<Spec, Problem> {
        let (decoding, own) = decoding::specs(label, params)?;
        Ok(Spec { decoding, ..own })
    }
}
