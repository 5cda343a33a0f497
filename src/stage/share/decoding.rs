//! What `generate` and `eval` share: the keys that say how completions are drawn, and what they come to.

use crate::data::{Format, Record, Tokenizer};
use crate::generation::Sampling;
use crate::manifest::spec::{Key, Params, Type};
use crate::problem::Problem;
use crate::remote;
use crate::stage::context::read_params;
use crate::stage::share::inputs::Storage;
use crate::stage::share::thinking::{self, Thinking};
use crate::stage::share::training;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What s1's trained models begin their answer with.
const THINK: &str = "<|im_start|>think\n";
/// What other models begin their thinking with.
const THINK_TAG: &str = "<think>\n";

/// Keys of every stage that samples from a model, by the names [`Decoding`] reads.
pub const SYSTEM: Key =
    Key::optional("system", Type::Str, "A system message; a template like `prompt`. Absent: the chat template's own.");
pub const FORMAT: Key = Key::default(
    "format",
    Type::Choice(training::FORMATS),
    "\"chat\"",
    "How the prompt becomes tokens: `chat` as a user's message through the model's chat template, `s1` the same with the answer opened by `<|im_start|>think`, `text` as it stands. As the model was trained.",
)
.with("model");
pub const PREFILL: Key = Key::optional(
    "prefill",
    Type::Str,
    "Text the answer is made to begin with. Absent: `<|im_start|>think` and a line break for `s1`; otherwise nothing, or, with `thinking`, `<think>` and a line break.",
)
.with("model");
pub const MAX_TOKENS: Key = Key::required(
    "max_tokens",
    training::COUNT,
    "Longest completion, in tokens, thinking included; with `thinking`, of what follows it. With the prompt it has to fit the model's context.",
);
pub const TEMPERATURE: Key =
    Key::default("temperature", Type::Float { min: 0.0, max: 100.0, above: false }, "0.0", "0 is greedy.");
pub const TOP_P: Key = Key::default(
    "top_p",
    Type::Float { min: 0.0, max: 1.0, above: true },
    "1.0",
    "Sample from the smallest set of tokens with at least this probability.",
);
pub const TOP_K: Key = Key::default(
    "top_k",
    Type::Int { min: 0, max: 1_000_000 },
    "0",
    "Sample from the k likeliest tokens; 0: from all (and no endpoint is sent it).",
);
pub const REPETITION_PENALTY: Key = Key::default(
    "repetition_penalty",
    Type::Float { min: 0.0, max: 100.0, above: true },
    "1.0",
    "Logits of tokens that occurred are divided by this (multiplied, if negative); 1 is off (and no endpoint is sent it).",
);
pub const SEED: Key = Key::default(
    "seed",
    Type::Int { min: 0, max: i64::MAX },
    "0",
    "Of the sampling. A record's completion depends on this, its id and its prompt, not on the other records.",
);
pub const STOP: Key = Key::default(
    "stop",
    Type::List(&Type::Str),
    "[]",
    "A completion ends before the first of these texts, and at the tokenizer's own end of turn.",
);
pub const STOP_TOKEN_IDS: Key = Key::default(
    "stop_token_ids",
    Type::List(&Type::Int { min: 0, max: u32::MAX as i64 }),
    "[]",
    "A completion also ends with the first of these tokens.",
)
.with("model");
pub const IGNORE_EOS: Key =
    Key::default("ignore_eos", Type::Bool, "false", "Go on behind the tokenizer's own end tokens.").with("model");
pub const UNMAPPED_IDS: Key = Key::default(
    "unmapped_ids",
    Type::Bool,
    "false",
    "Also draw ids that stand for no text: the embedding has more rows than the tokenizer has ids (transformers draws them).",
)
.with("model");
pub const DTYPE: Key =
    Key::default("dtype", Type::Choice(&["f32", "bf16"]), "\"f32\"", "How weights are held.").with("model");
pub const BATCH: Key = Key::default(
    "batch",
    Type::Int { min: 1, max: 4096 },
    "128",
    "Completions made together and journalled together: after an interruption at most this many are made again.",
)
.with("model")
.no_result();

/// What is said of a stage that ends early.
pub const STAYS: &str = "the completions that were journalled stay: the next run goes on from them";

/// Bytes of these texts together.
pub fn bytes(texts: [&Option<String>; 3]) -> usize {
    texts.into_iter().flatten().map(String::len).sum()
}

/// How completions are drawn, as the keys above say.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decoding {
    #[serde(default)]
    pub format: Format,
    pub prefill: Option<String>,
    pub thinking: Option<Thinking>,
    pub stop: Vec<String>,
    pub max_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: usize,
    pub repetition_penalty: f64,
    pub seed: u64,
    #[serde(default)]
    pub dtype: Storage,
    #[serde(default)]
    pub batch: usize,
    /// Ids that end a completion beside those of the tokenizer.
    #[serde(default)]
    pub stop_token_ids: Vec<u32>,
    /// The tokenizer's own end tokens end nothing.
    #[serde(default)]
    pub ignore_eos: bool,
    /// Ids without a token may be drawn.
    #[serde(default)]
    pub unmapped_ids: bool,
}

/// What a [`Decoding`] reads.
const READ: [&str; 15] = [
    FORMAT.name,
    PREFILL.name,
    MAX_TOKENS.name,
    thinking::KEY.name,
    TEMPERATURE.name,
    TOP_P.name,
    TOP_K.name,
    REPETITION_PENALTY.name,
    SEED.name,
    STOP.name,
    STOP_TOKEN_IDS.name,
    IGNORE_EOS.name,
    UNMAPPED_IDS.name,
    DTYPE.name,
    BATCH.name,
];

/// How a stage with these parameters draws, and its other keys as a struct of its own. `label`: whose they are, for
/// messages.
pub fn specs<Own: DeserializeOwned>(label: &str, params: &Params) -> Result<(Decoding, Own), Problem> {
    let (shared, own): (Params, Params) = params.clone().into_iter().partition(|(key, _)| READ.contains(&key.as_str()));
    Ok((read_params(label, shared)?, read_params(label, own)?))
}

impl Decoding {
    /// What the answer is made to begin with.
    pub fn opening(&self) -> &str {
        match (&self.prefill, self.format, &self.thinking) {
            (Some(prefill), ..) => prefill,
            (None, Format::S1, _) => THINK,
            (None, _, Some(_)) => THINK_TAG,
            (None, _, None) => "",
        }
    }

    /// The same of an endpoint.
    pub fn remotely(&self) -> remote::Sampling {
        remote::Sampling {
            max_tokens: self.max_tokens as u64,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: (self.top_k > 0).then_some(self.top_k as u64),
            repetition_penalty: Some(self.repetition_penalty).filter(|penalty| *penalty != 1.0),
            stop: self.stop.clone(),
            seed: self.seed,
        }
    }

    /// The same of the model behind this tokenizer.
    pub fn sampling(&self, tokenizer: &Tokenizer) -> Result<Sampling, Problem> {
        let mut stop_ids = self.stop_token_ids.clone();
        if !self.ignore_eos {
            stop_ids.push(tokenizer.end()?);
            stop_ids.extend(tokenizer.eos());
            stop_ids.extend(tokenizer.id("<|endoftext|>"));
        }
        stop_ids.sort_unstable();
        stop_ids.dedup();
        Ok(Sampling {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            stop: self.stop.clone(),
            stop_ids,
            id_limit: if self.unmapped_ids { 0 } else { tokenizer.id_limit() },
        })
    }

    /// The ids a model continues for a user's text.
    pub fn prompt(&self, tokenizer: &Tokenizer, user: Value, system: Option<String>) -> Result<Vec<u32>, Problem> {
        let mut record = Record::new();
        if let (Some(system), Value::Array(turns)) = (&system, &user) {
            let mut turns = turns.clone();
            turns.insert(0, json!({"role": "system", "content": system}));
            record.insert("messages".into(), Value::Array(turns));
        } else {
            record.insert(if user.is_array() { "messages" } else { "prompt" }.into(), user);
            record.extend(system.map(|system| ("system".to_string(), Value::String(system))));
        }
        self.continued(tokenizer, &record)
    }

    /// The ids a model continues for a record as it stands, the opening of the answer included.
    pub fn continued(&self, tokenizer: &Tokenizer, record: &Record) -> Result<Vec<u32>, Problem> {
        let mut ids = crate::data::prompt(record, tokenizer, self.format)?;
        ids.extend(tokenizer.encode(self.opening()));
        Ok(ids)
    }
}
