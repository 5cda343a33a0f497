//! What a cell is going to do, in numbers: rows, tokens and steps of training, completions, requests to an endpoint
//! and what they cost. For the plan and for the line before a run; nobody is asked and nothing is computed.
//!
//! Bounds hold: no prompt has more tokens than it is reckoned at, no completion more than `max_tokens`. What is
//! merely likely says by how many replies.

use crate::data::{self, Eos, Format, Limits, Overlength, Record, Side, Tokenizer};
use crate::manifest::spec::Params;
use crate::problem::Problem;
use crate::remote::{Endpoint, Line, Replies};
use crate::stage::kinds::eval;
use crate::stage::kinds::generate;
use crate::stage::share::asking::Pending;
use crate::stage::share::training::Steps;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// The keys that say how a training stage takes its data, and how often.
#[derive(Deserialize)]
struct Trained {
    format: Format,
    eos: Eos,
    max_tokens: usize,
    on_overlength: Overlength,
    truncate_side: Side,
    max_prompt_tokens: Option<usize>,
    batch_size: usize,
    epochs: f64,
    max_steps: Option<u64>,
    seed: u64,
    shuffle: bool,
}

impl Trained {
    fn of(params: &Params) -> Option<Trained> {
        Trained::deserialize(Value::Object(params.clone())).ok()
    }
}

/// The rows of a dataset, as a training stage takes them.
pub struct Taken {
    pub rows: u64,
    /// Longer than allowed, and therefore left out, or cut.
    pub dropped: u64,
    pub truncated: u64,
    /// Tokens of the examples that are left; of a preference, those of both sides.
    lengths: Vec<u64>,
}

/// What a training stage does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Training {
    pub rows: Option<u64>,
    pub dropped: u64,
    pub truncated: u64,
    /// `None`: not known before the data are made.
    pub steps: Option<u64>,
    /// Of all steps together; `None`: not known before data and tokenizer are there.
    pub tokens: Option<u64>,
}

/// By what a training stage takes its rows: two that say the same take the same data alike.
pub fn taken_as(kind: &str, params: &Params) -> String {
    let keys = ["format", "eos", "max_tokens", "on_overlength", "truncate_side", "max_prompt_tokens"];
    let values = keys.map(|key| params.get(key).map_or(String::new(), Value::to_string));
    format!("{kind} {}", values.join(" "))
}

/// The rows as `sft` or `dpo` takes them. `Err` if the stage would refuse them.
pub fn taken(kind: &str, params: &Params, records: &[Record], tokenizer: &Tokenizer) -> Result<Taken, Problem> {
    let unfit = || Problem::new("stage::params", format!("the parameters do not fit `{kind}`"));
    let spec = Trained::of(params).ok_or_else(unfit)?;
    let limits = Limits {
        max_tokens: Some(spec.max_tokens),
        max_prompt_tokens: spec.max_prompt_tokens,
        on_overlength: spec.on_overlength,
        truncate_side: spec.truncate_side,
        eos: spec.eos,
        ..Limits::default()
    };
    let (lengths, notes) = match kind {
        "dpo" => {
            let (pairs, notes) = data::pairs(records, tokenizer, spec.format, &limits)?;
            (pairs.iter().map(|pair| (pair.chosen.ids.len() + pair.rejected.ids.len()) as u64).collect(), notes)
        }
        _ => {
            let (samples, notes) = data::samples(records, tokenizer, spec.format, &limits)?;
            (samples.iter().map(|sample| sample.ids.len() as u64).collect(), notes)
        }
    };
    let (dropped, truncated) = (notes.dropped.len() as u64, notes.truncated.len() as u64);
    Ok(Taken { rows: records.len() as u64, dropped, truncated, lengths })
}

/// What a training stage does with the rows it takes.
pub fn training(params: &Params, taken: &Taken) -> Option<Training> {
    let spec = Trained::of(params)?;
    let steps = Steps::new(taken.lengths.len(), spec.batch_size, spec.epochs, spec.max_steps);
    let (passes, rest) = (steps.total / steps.per_epoch.max(1), steps.total % steps.per_epoch.max(1));
    let begun = (rest as usize).saturating_mul(spec.batch_size);
    let last: u64 = match begun {
        0 => 0,
        begun => {
            let order = data::epoch_order(taken.lengths.len(), spec.seed, passes, spec.shuffle);
            order.iter().take(begun).map(|&i| taken.lengths[i]).sum()
        }
    };
    let tokens = taken.lengths.iter().sum::<u64>().saturating_mul(passes).saturating_add(last);
    let Taken { rows, dropped, truncated, .. } = *taken;
    Some(Training { rows: Some(rows), dropped, truncated, steps: Some(steps.total), tokens: Some(tokens) })
}

/// The same where rows cannot be told in tokens yet: so many, or an unknown number.
pub fn training_of(params: &Params, rows: Option<u64>) -> Option<Training> {
    let spec = Trained::of(params)?;
    let of = |rows: u64| Steps::new(rows as usize, spec.batch_size, spec.epochs, spec.max_steps).total;
    Some(Training { rows, dropped: 0, truncated: 0, steps: rows.map(of).or(spec.max_steps), tokens: None })
}

/// Completions by a model on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Completions {
    pub wanted: u64,
    /// At most.
    pub tokens: u64,
}

/// Requests, with the most tokens they can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Requests {
    pub count: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

impl Requests {
    pub fn add(&mut self, more: &Requests) {
        self.count = self.count.saturating_add(more.count);
        self.prompt_tokens = self.prompt_tokens.saturating_add(more.prompt_tokens);
        self.completion_tokens = self.completion_tokens.saturating_add(more.completion_tokens);
    }

    pub fn cost(&self, endpoint: &Endpoint) -> Option<f64> {
        endpoint.is_priced().then(|| endpoint.cost(self.prompt_tokens, self.completion_tokens))
    }
}

/// What is likely, going by replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Likely {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// How many replies it goes by.
    pub replies: u64,
    /// They are this stage's own; otherwise whatever was asked of the model there.
    pub own: bool,
}

/// What a stage asks of an endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    pub endpoint: Endpoint,
    /// Completions the stage is made of, and how many of them need no request: their replies are kept, or another
    /// stage asks the same. If the records are not there yet: so many at most, of which none is looked up.
    pub wanted: u64,
    pub kept: u64,
    /// Whether the prompts are there; without them nothing is known of their tokens.
    pub prompts_known: bool,
    /// If every reply can be used.
    pub once: Requests,
    /// If none can, before the last try.
    pub most: Requests,
    pub likely: Option<Likely>,
}

/// The endpoint that completes, of a stage that has one.
pub fn endpoint(params: &Params) -> Option<Endpoint> {
    Endpoint::deserialize(params.get("endpoint")?).ok()
}

fn whole(params: &Params, key: &str) -> Option<u64> {
    params.get(key)?.as_u64()
}

/// Completions of so many records, by a model on this machine.
pub fn completions(params: &Params, records: u64) -> Option<Completions> {
    let wanted = wanted(params, records)?;
    Some(Completions { wanted, tokens: wanted.saturating_mul(whole(params, "max_tokens")?) })
}

/// How many completions a stage makes of so many records.
pub fn wanted(params: &Params, records: u64) -> Option<u64> {
    let limit = whole(params, "limit").unwrap_or(u64::MAX);
    Some(records.min(limit).saturating_mul(whole(params, "n")?))
}

/// How often one completion is asked for at most.
fn tries(params: &Params) -> u64 {
    let kind = params.get("parse").and_then(|parse| parse.get("kind")).and_then(Value::as_str);
    if kind.is_none_or(|kind| kind == "text") { 1 } else { whole(params, "max_parse_attempts").unwrap_or(1) }
}

/// What a stage asks of its endpoint whose records are not there, or whose prompts nobody can tell: so many
/// completions at most.
pub fn calls_at_most(params: &Params, endpoint: Endpoint, records: u64) -> Option<Calls> {
    let count = wanted(params, records)?;
    let of = |count: u64| {
        let completion_tokens = count.saturating_mul(whole(params, "max_tokens").unwrap_or(0));
        Requests { count, prompt_tokens: 0, completion_tokens }
    };
    let (once, most) = (of(count), of(count.saturating_mul(tries(params))));
    Some(Calls { endpoint, wanted: count, kept: 0, prompts_known: false, once, most, likely: None })
}

/// The endpoint that judges, of an `eval` that has one and asks it.
pub fn judge(params: &Params) -> Option<Endpoint> {
    let judge = params.get("judge")?.as_object()?;
    if judge.get("ask").and_then(Value::as_str) == Some("none") { None } else { endpoint(judge) }
}

/// What a judge is asked about answers to so many problems, at most: about each of them. Its prompts hold the answers,
/// which are not there yet.
pub fn judging(params: &Params, endpoint: Endpoint, records: u64) -> Option<Calls> {
    let judge = params.get("judge")?.as_object()?;
    let (count, max_tokens) = (wanted(params, records)?, whole(judge, "max_tokens")?);
    let most = count.saturating_mul(whole(judge, "max_attempts").unwrap_or(1));
    let (once, most) = (requests(count, 0, max_tokens), requests(most, 0, max_tokens));
    Some(Calls { endpoint, wanted: count, kept: 0, prompts_known: false, once, most, likely: None })
}

fn requests(count: u64, prompt_bound: u64, max_tokens: u64) -> Requests {
    let of = |tokens: u64| tokens.saturating_mul(count);
    Requests { count, prompt_tokens: of(prompt_bound), completion_tokens: of(max_tokens) }
}

/// What a `generate` or `eval` stage asks of its endpoint over these records, less what the journal has. `asked`: keys
/// of requests that other stages send already; its own are added.
pub fn calls(
    kind: &str,
    params: &Params,
    prompt_file: Option<&Path>,
    records: &[Record],
    line: &Line,
    asked: &mut HashSet<String>,
) -> Result<Calls, Problem> {
    let unfit = || Problem::new("stage::params", "the parameters do not fit an endpoint");
    let endpoint = endpoint(params).ok_or_else(unfit)?;
    let max_tokens = whole(params, "max_tokens").ok_or_else(unfit)?;
    let mut own = Replies::default();
    let pending = match kind {
        "eval" => eval::pending(params, prompt_file, records, line, &mut own)?,
        _ => generate::pending(params, prompt_file, records, line, &mut own)?,
    };
    let (mut once, mut most) = (Requests::default(), Requests::default());
    for Pending { key, prompt_bound, tries } in pending {
        let first = asked.insert(key);
        // What another stage asks already may still have to be asked again by this one alone.
        let again = if first { tries } else { tries - 1 };
        once.add(&requests(u64::from(first), prompt_bound, max_tokens));
        most.add(&requests(again, prompt_bound, max_tokens));
    }
    let (basis, is_own) = if own.count > 0 { (own, true) } else { (line.replies(), false) };
    let likely = basis.likely(once.count, once.prompt_tokens).map(|(prompt_tokens, completion_tokens)| {
        // Replies under another limit may have been longer.
        let completion_tokens = completion_tokens.min(once.completion_tokens);
        Likely { prompt_tokens, completion_tokens, replies: basis.count, own: is_own }
    });
    let wanted = wanted(params, records.len() as u64).ok_or_else(unfit)?;
    Ok(Calls { endpoint, wanted, kept: wanted - once.count.min(wanted), prompts_known: true, once, most, likely })
}

/// Records that a `generate` cell yields of so many, and whether it may be fewer.
pub fn yields(params: &Params, records: u64) -> Option<(u64, bool)> {
    let drops = params.get("on_parse_failure").and_then(Value::as_str) == Some("drop");
    Some((wanted(params, records)?, drops))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Files;
    use crate::stage::share::bundled;
    use serde_json::json;

    fn params(value: Value) -> Params {
        value.as_object().unwrap().clone()
    }

    fn sft(more: Value) -> Params {
        let mut all = params(json!({
            "format": "text", "eos": "one", "max_tokens": 1000, "on_overlength": "error", "truncate_side": "right",
            "batch_size": 2, "epochs": 1.0, "seed": 0, "shuffle": true,
        }));
        all.extend(params(more));
        all
    }

    fn tokenizer() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        bundled::tokenizer("mini").unwrap().write(folder.path(), |_| true).unwrap();
        Tokenizer::load(&Files::from_dir(folder.path()).unwrap()).unwrap()
    }

    fn rows() -> Vec<Record> {
        let row = |i: usize| params(json!({"prompt": "1 + 1", "completion": " = 2".repeat(i)}));
        (1..=5).map(row).collect()
    }

    #[test]
    fn a_pass_and_a_half_counts_the_rows_that_the_half_begins_with() {
        let of = |more: Value| {
            let params = sft(more);
            training(&params, &taken("sft", &params, &rows(), &tokenizer()).unwrap()).unwrap()
        };
        let (once, thrice) = (of(json!({})), of(json!({"epochs": 3.0})));
        assert_eq!((once.rows, once.steps), (Some(5), Some(3)));
        assert_eq!((thrice.steps, thrice.tokens), (Some(9), Some(3 * once.tokens.unwrap())));
        let lengths = taken("sft", &sft(json!({})), &rows(), &tokenizer()).unwrap().lengths;
        let order = data::epoch_order(5, 0, 1, true);
        let more: u64 = order[..2].iter().map(|&i| lengths[i]).sum();
        let partly = of(json!({"max_steps": 4}));
        assert_eq!((partly.steps, partly.tokens), (Some(4), Some(once.tokens.unwrap() + more)));
        assert!(of(json!({"max_steps": 1u64 << 40})).tokens > Some(1 << 40));
    }

    #[test]
    fn rows_over_the_limit_are_counted_as_the_stage_treats_them() {
        let lengths = taken("sft", &sft(json!({})), &rows(), &tokenizer()).unwrap().lengths;
        let limit = lengths[2];
        let of = |how: &str| {
            let params = sft(json!({"max_tokens": limit, "on_overlength": how}));
            taken("sft", &params, &rows(), &tokenizer()).map(|taken| training(&params, &taken).unwrap())
        };
        let (dropped, cut) = (of("drop").unwrap(), of("truncate").unwrap());
        assert_eq!((dropped.dropped, dropped.truncated, dropped.steps), (2, 0, Some(2)));
        assert_eq!((cut.dropped, cut.truncated, cut.steps), (0, 2, Some(3)));
        assert_eq!(dropped.tokens, Some(lengths[..3].iter().sum()));
        assert_eq!(cut.tokens, Some(lengths[..3].iter().sum::<u64>() + 2 * limit));
        assert!(of("error").is_err());
    }

    #[test]
    fn without_the_data_only_what_the_keys_say_is_known() {
        let nothing = training_of(&sft(json!({})), None).unwrap();
        assert_eq!((nothing.rows, nothing.steps, nothing.tokens), (None, None, None));
        assert_eq!(training_of(&sft(json!({"max_steps": 7})), None).unwrap().steps, Some(7));
        assert_eq!(training_of(&sft(json!({})), Some(5)).unwrap().steps, Some(3));
    }

    #[test]
    fn a_limit_and_samples_say_how_many_completions_there_are() {
        let keys = params(json!({"n": 4, "limit": 3, "max_tokens": 10}));
        assert_eq!(completions(&keys, 100), Some(Completions { wanted: 12, tokens: 120 }));
        assert_eq!(completions(&keys, 2), Some(Completions { wanted: 8, tokens: 80 }));
        assert_eq!(yields(&params(json!({"n": 2, "on_parse_failure": "drop"})), 5), Some((10, true)));
    }
}
