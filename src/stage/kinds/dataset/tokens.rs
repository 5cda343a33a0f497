//! Where a dataset counts or writes tokens.

use super::rows::{Row, lookup, too_few};
use super::spec::{Shortest, Tokenize};
use crate::data::{self, BadRows, Limits, Record, Sample, Tokenizer};
use crate::problem::{Exit, Problem};
use crate::stage::context::Context;
use crate::stage::share::inputs;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// What a training stage with the same keys would see of the records.
pub(super) fn tokenize(ctx: &Context, records: &[Record], spec: &Tokenize) -> Result<Vec<Record>, Problem> {
    let tokenizer = inputs::tokenizer(ctx, "tokenize.tokenizer")?;
    let limits = Limits {
        max_tokens: spec.max_tokens,
        max_prompt_tokens: spec.max_prompt_tokens,
        max_completion_tokens: spec.max_completion_tokens,
        on_overlength: spec.on_overlength,
        truncate_side: spec.truncate_side,
        eos: spec.eos,
        ..Limits::default()
    };
    let fields = |pairs: Vec<(&str, Value)>| pairs.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    if !records.first().is_some_and(data::is_preference) {
        let (samples, notes) = data::samples(records, &tokenizer, spec.format, &limits)?;
        inputs::warn(ctx, &notes);
        let labels = |sample: &Sample| -> Vec<i64> {
            sample
                .ids
                .iter()
                .zip(&sample.learned)
                .map(|(id, learned)| if *learned { i64::from(*id) } else { -100 })
                .collect()
        };
        let record = |sample: Sample| {
            let labels = labels(&sample);
            fields(vec![("id", json!(sample.id)), ("input_ids", json!(sample.ids)), ("labels", json!(labels))])
        };
        return Ok(samples.into_iter().map(record).collect());
    }
    let (pairs, notes) = data::pairs(records, &tokenizer, spec.format, &limits)?;
    inputs::warn(ctx, &notes);
    let (mut made, mut bad) = (Vec::new(), BadRows::default());
    for pair in pairs {
        let (prompt, chosen) = pair.chosen.ids.split_at(pair.chosen.prompt_len());
        let (other, rejected) = pair.rejected.ids.split_at(pair.rejected.prompt_len());
        if prompt != other {
            let what = "the two prompts differ, and a tokenised pair has one";
            bad.push("data::prompts_differ", &format!("record `{}`", pair.id), what);
            bad.help("give the prompt as `prompt` and only the answers as `chosen` and `rejected`");
            continue;
        }
        made.push(fields(vec![
            ("id", json!(pair.id)),
            ("prompt_input_ids", json!(prompt)),
            ("chosen_input_ids", json!(chosen)),
            ("rejected_input_ids", json!(rejected)),
        ]));
    }
    bad.finish(records.len(), None)?;
    Ok(made)
}

/// The records with the fewest tokens, in their order.
pub(super) fn keep_shortest(ctx: &Context, rows: Vec<Row>, shortest: &Shortest) -> Result<Vec<Row>, Problem> {
    let base = ctx
        .inputs("shortest.tokenizer")
        .first()
        .ok_or_else(|| Problem::new("dataset::input", "`shortest.tokenizer` names no model").exit(Exit::Usage))?;
    let tokenizer = Tokenizer::load(&base.files)?;
    let texts: Vec<&str> = rows
        .iter()
        .flat_map(|row| {
            shortest.fields.iter().map(|field| lookup(&row.record, field).and_then(Value::as_str).unwrap_or(""))
        })
        .collect();
    let lengths: Vec<usize> = tokenizer.encode_all(&texts).iter().map(Vec::len).collect();
    let lengths: Vec<usize> = lengths.chunks(shortest.fields.len().max(1)).map(|fields| fields.iter().sum()).collect();
    if let Some(at) = lengths.iter().position(|&length| length == 0) {
        let fields = shortest.fields.join("`, `");
        return Err(Problem::new("data::missing_field", format!("record {} has no text in `{fields}`", at + 1))
            .help("name its text fields in `shortest.fields`"));
    }
    if rows.len() < shortest.rows {
        return Err(too_few(shortest.rows, rows.len(), "rows").note("asked for by `shortest`"));
    }
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&at| lengths[at]);
    let kept: BTreeSet<usize> = order.into_iter().take(shortest.rows).collect();
    Ok(rows.into_iter().enumerate().filter(|(at, _)| kept.contains(at)).map(|(_, row)| row).collect())
}
