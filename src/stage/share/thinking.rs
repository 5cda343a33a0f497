//! Thinking within a budget: a model that is made to stop thinking, or to go on.
//!
//! The first turn thinks, for at most `max_tokens` tokens, up to the text that ends thinking or the end of the turn.
//! Where it ends early it may be sent back: the end is taken off, `wait` put in its place, and the rest of the same
//! budget is for another turn. Where the budget runs out, thinking is ended for it, with `final` behind the end. The
//! last turn answers, for at most the stage's `max_tokens`.
//!
//! What the s1 study calls it: `max_tokens_thinking` is `max_tokens`, `thinking_n_ignore` is `ignore_end`,
//! `thinking_n_ignore_str` is `wait`, `until_thinking` is `stop`. Its budget `auto` depends on the longest prompt of a
//! batch; a budget here is a number, of the stage or of the record. Its continued turns make one token at least before
//! they may end; here one that ends at once counts as one of `ignore_end`.

use crate::data::{Format, Record, Tokenizer};
use crate::manifest::spec::{Key, Type};
use crate::stage::share::training;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub const KEY: Key = Key::optional(
    "thinking",
    Type::Table(&[
        Key::required("max_tokens", training::COUNT, "Longest thinking, in tokens."),
        Key::optional(
            "field",
            Type::Str,
            "A field of the records: one that has it thinks for at most this many tokens instead, from 0 on.",
        ),
        Key::optional(
            "end",
            Type::Str,
            "The text between thinking and answer. Absent: `<|im_start|>answer` for `s1`, else `</think>`.",
        ),
        Key::optional(
            "final",
            Type::Str,
            "What follows it where the budget has run out, for an answer at once. Absent: a line break (two, where thinking is a tag) and `Final Answer:`.",
        ),
        Key::optional(
            "stop",
            Type::List(&Type::Str),
            "Further texts that end the thinking. Absent: `<|im_start|>` for `s1`, else none. `stop` of the stage ends answers only.",
        ),
        Key::default(
            "ignore_end",
            Type::Int { min: 0, max: 1000 },
            "0",
            "How often thinking that ends within its budget is made to go on.",
        ),
        Key::default("wait", Type::Str, "\"Wait\"", "What it is made to go on with, in the place of its end."),
    ]),
    "Thinking and answer apart, each with its own limit: the model thinks for at most this many tokens and then answers, made to if need be. Absent: one completion.",
)
.with("model");

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thinking {
    max_tokens: usize,
    field: Option<String>,
    end: Option<String>,
    #[serde(rename = "final")]
    cue: Option<String>,
    stop: Option<Vec<String>>,
    /// How often thinking that ends early is made to go on.
    pub ignore_end: u64,
    /// What it is made to go on with.
    pub wait: String,
}

/// How a sample thought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thought {
    /// Up to where the answer was asked for, `wait` included.
    pub tokens: usize,
    /// How often it was made to go on.
    pub continued: u64,
    /// Its budget ran out.
    pub forced: bool,
}

impl Thinking {
    /// The longest thinking of a record that has no budget of its own, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// A record's budget.
    pub fn budget(&self, record: &Record) -> Result<usize, String> {
        let Some((field, value)) = self.field.as_ref().and_then(|field| Some((field, record.get(field)?))) else {
            return Ok(self.max_tokens);
        };
        let tokens = value.as_u64().and_then(|tokens| usize::try_from(tokens).ok());
        tokens.ok_or_else(|| format!("`{field}` is no number of tokens: {value}"))
    }

    fn end(&self, format: Format) -> &str {
        self.end.as_deref().unwrap_or(if format == Format::S1 { "<|im_start|>answer" } else { "</think>" })
    }

    /// What ends a turn of thinking.
    pub fn stop(&self, format: Format) -> Vec<String> {
        let further = match &self.stop {
            Some(stop) => stop.clone(),
            None if format == Format::S1 => vec!["<|im_start|>".to_string()],
            None => Vec::new(),
        };
        further.into_iter().chain([self.end(format).to_string()]).collect()
    }

    /// What stands between thinking that ends with `text` and its answer.
    pub fn bridge(&self, format: Format, text: &str, forced: bool) -> String {
        let end = self.end(format);
        if !forced {
            return end.to_string();
        }
        let line = if text.ends_with('\n') { "" } else { "\n" };
        let cue = if format == Format::S1 { "\nFinal Answer:" } else { "\n\nFinal Answer:" };
        format!("{line}{end}{}", self.cue.as_deref().unwrap_or(cue))
    }

    /// The most tokens that are put between thinking and answer.
    pub fn between(&self, format: Format, tokenizer: &Tokenizer) -> usize {
        let tokens = |forced| tokenizer.encode(&self.bridge(format, "", forced)).len();
        tokens(false).max(tokens(true))
    }
}

/// What is wrong between the keys of the table.
pub fn broken(table: Option<&Value>) -> Option<(&'static str, String, String)> {
    let table = table?;
    let empty = |key: &str| table.get(key).and_then(Value::as_str) == Some("");
    if empty("end") {
        let help = "the text that the model's thinking ends with: `end = \"</think>\"`";
        return Some(("thinking.end", "thinking that ends with nothing ends nowhere".into(), help.into()));
    }
    let goes_on = table.get("ignore_end").and_then(Value::as_u64).is_some_and(|times| times > 0);
    if goes_on && empty("wait") {
        let help = "`wait = \"Wait\"`, or leave it out";
        return Some((
            "thinking.wait",
            "nothing to go on with: a model sent back ends again at once".into(),
            help.into(),
        ));
    }
    None
}
