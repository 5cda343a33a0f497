//! Reading what a stage was given: records, tokenizers, model chains. Shared by the kinds that take them.

use crate::data::{self, Notes, Record, Tokenizer};
use crate::files::Files;
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::tensor::Dtype;
use serde::Deserialize;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// How weights are held, as a manifest says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    #[default]
    F32,
    Bf16,
}

impl Storage {
    pub fn dtype(self) -> Dtype {
        match self {
            Storage::F32 => Dtype::F32,
            Storage::Bf16 => Dtype::Bf16,
        }
    }
}

/// The chain of a model slot, base first.
pub fn chain<'a>(ctx: &'a Context, slot: &str) -> Vec<&'a Files> {
    ctx.inputs(slot).iter().map(|artifact| &artifact.files).collect()
}

/// The tokenizer of a model slot: that of the base.
pub fn tokenizer(ctx: &Context, slot: &str) -> Result<Tokenizer, Problem> {
    let base = ctx.inputs(slot).first().ok_or_else(|| missing(ctx, slot))?;
    Tokenizer::load(&base.files)
}

/// The records of the one dataset in a slot.
pub fn records(ctx: &Context, slot: &str) -> Result<Vec<Record>, Problem> {
    let path = ctx.inputs(slot).first().and_then(|artifact| artifact.files.get("data.jsonl"));
    data::read_records(path.ok_or_else(|| missing(ctx, slot))?)
}

fn missing(ctx: &Context, slot: &str) -> Problem {
    Problem::new("stage::input", format!("`{}` was given nothing to read for `{slot}`", ctx.label))
}

/// Tells the user what became of rows.
pub fn warn(ctx: &Context, notes: &Notes) {
    notes.warnings().iter().for_each(|warning| ctx.progress.warn(warning));
}

/// One JSON value per line.
pub fn write_lines(path: &Path, lines: &[Value]) -> Result<(), Problem> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(path, text).map_err(|error| Problem::io("stage::unwritable", "write", path, &error))
}
