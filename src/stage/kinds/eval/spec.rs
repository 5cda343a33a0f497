//! What the keys of an evaluation say.

use crate::data::Format;
use crate::remote::Endpoint;
use crate::stage::share::decoding::Decoding;
use crate::stage::share::inputs::Storage;
use crate::stage::share::judge;
use crate::stage::share::thinking::Thinking;
use serde::Deserialize;

/// The keys, as `KIND` says what they mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub endpoint: Option<Endpoint>,
    pub prompt: Option<String>,
    pub prompt_file: Option<String>,
    pub system: Option<String>,
    #[serde(default)]
    pub format: Format,
    pub prefill: Option<String>,
    pub question: Option<String>,
    pub answer: String,
    pub choices: Option<Vec<String>>,
    pub shuffle_choices: bool,
    pub grader: Grader,
    pub judge: Option<judge::Spec>,
    pub n: usize,
    pub max_tokens: usize,
    pub thinking: Option<Thinking>,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: usize,
    pub repetition_penalty: f64,
    pub seed: u64,
    pub stop: Vec<String>,
    pub limit: Option<usize>,
    #[serde(default)]
    pub on_missing: OnMissing,
    #[serde(default)]
    pub dtype: Storage,
    #[serde(default)]
    pub batch: usize,
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
    /// How answers are drawn.
    pub fn decoding(&self) -> Decoding {
        Decoding {
            format: self.format,
            prefill: self.prefill.clone(),
            thinking: self.thinking.clone(),
            stop: self.stop.clone(),
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            dtype: self.dtype,
            batch: self.batch,
            ..Decoding::default()
        }
    }
}
