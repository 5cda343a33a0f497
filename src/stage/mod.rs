//! The kinds of stage, a file or folder each below `kinds/`, with one row of all that is said of it: its keys, what it
//! does, what it needs. A new kind is a file there, and a line in the table here.
//!
//! A stage sees its resolved parameters, its inputs as files and an empty output folder. It cannot
//! name the store, the plan's other cells or the terminal.

use crate::manifest::spec::{Key, Kind, Params, Type};
use crate::problem::Problem;
use crate::remote::{Endpoint, Remote};
use serde_json::Value;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

mod context;
pub mod forecast;
mod kind;
mod kinds;
mod share;

pub use crate::model::Device;
pub use crate::progress::Progress;
pub use context::{Artifact, Context};
use forecast::needs::{Data, Shape};
pub use kind::{Forecast, StageKind};
pub use kinds::*;
pub use share::{bundled, readings};

/// The kinds, in the order help and schema list them: the one table a new kind is added to.
const TABLE: &[StageKind] = &[
    model::STAGE,
    dataset::STAGE,
    generate::STAGE,
    sft::STAGE,
    dpo::STAGE,
    probe::STAGE,
    kernel::STAGE,
    eval::STAGE,
    table::STAGE,
    plot::STAGE,
    check::STAGE,
    command::STAGE,
];

/// Every kind a manifest may name.
pub const KINDS: &[&Kind] = &kinds();

const fn kinds() -> [&'static Kind; TABLE.len()] {
    let mut kinds = [TABLE[0].kind; TABLE.len()];
    let mut at = 0;
    while at < TABLE.len() {
        kinds[at] = TABLE[at].kind;
        at += 1;
    }
    kinds
}

/// The row of the kind called `name`; `None` if there is no such kind.
pub fn find(name: &str) -> Option<&'static StageKind> {
    TABLE.iter().find(|row| row.kind.name == name)
}

/// Runs a stage of the kind called `kind`, one of [`KINDS`].
pub fn run(kind: &str, ctx: &Context) -> Result<(), Problem> {
    let unknown = || Problem::new("stage::unknown_kind", format!("there is no kind of stage called `{kind}`"));
    let row = find(kind).ok_or_else(unknown)?;
    let seen = Seen { next: ctx.progress, at: Mutex::new(None) };
    let done = (row.run)(&Context { device: ctx.device.clone(), progress: &seen, ..*ctx });
    let at = *seen.at.lock().unwrap_or_else(PoisonError::into_inner);
    done.map_err(|problem| explained(problem, row, ctx, at))
}

/// What to say where a device ran out of memory while a stage worked: where it was, what takes how much, what helps.
fn explained(problem: Problem, row: &StageKind, ctx: &Context, at: Option<(u64, u64, &'static str)>) -> Problem {
    if problem.code != "cuda::out_of_memory" {
        return problem;
    }
    let mut problem = problem;
    problem.message = match at {
        // What counts is what is done: the one at work is the next.
        Some((done, total, "steps")) => {
            format!("{} (`{}`, at step {} of {total})", problem.message, ctx.label, done + 1)
        }
        Some((done, total, unit)) => format!("{} (`{}`, after {done} of {total} {unit})", problem.message, ctx.label),
        None => format!("{} (`{}`, before its first step)", problem.message, ctx.label),
    };
    if let Some((shape, forecast)) = Shape::given(ctx).zip((row.forecast)(ctx.params)) {
        let needs = forecast.computes().needs(&shape, row.records(ctx).and_then(Data::of), true);
        let bound = if needs.takes_more { "at least" } else { "at most" };
        problem = problem.note(format!("it was expected to take {bound}\n{}", needs.most.table()));
        problem.help.splice(0..0, forecast.computes().advice(true));
    }
    match row.stays {
        Some(stays) => problem.note(stays),
        None => problem,
    }
}

/// Finds out, before any stage runs, whether the endpoints that these parameters name can be asked.
pub fn ready(kind: &Kind, params: &Params, remote: &Remote, stop: &AtomicBool) -> Result<(), Problem> {
    /// Each with whether the stage could do without it.
    fn endpoints<'a>(keys: &[Key], table: &'a Params, found: &mut Vec<(&'a Value, bool)>) {
        let ask = table.get("ask");
        // Who is declared and not asked need not be there.
        if ask.is_some_and(|ask| ask == "none") {
            return;
        }
        for key in keys {
            match (&key.ty, table.get(key.name)) {
                (Type::Endpoint, Some(value)) => found.push((value, ask.is_some())),
                (Type::Table(keys), Some(Value::Object(table))) => endpoints(keys, table, found),
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    endpoints(kind.keys, params, &mut found);
    for (value, dispensable) in found {
        let endpoint = serde_json::from_value::<Endpoint>(value.clone())
            .map_err(|error| Problem::new("stage::params", format!("an endpoint does not fit: {error}")))?;
        let there = remote.connection(&endpoint).and_then(|connection| connection.probe(stop));
        there.map_err(|problem| {
            if !dispensable {
                return problem;
            }
            problem
                .help("`--offline` takes the judgements that are kept, if they are all there")
                .help("`judge.ask = \"none\"` goes on without: what is undecided then leaves an interval")
        })?;
    }
    Ok(())
}

/// Remembers how far a stage got: done, out of how many, of what.
struct Seen<'a> {
    next: &'a dyn Progress,
    at: Mutex<Option<(u64, u64, &'static str)>>,
}

impl Progress for Seen<'_> {
    fn begin(&self, total: u64, unit: &'static str) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Some((0, total, unit));
        self.next.begin(total, unit);
    }

    fn at(&self, done: u64) {
        if let Some((at, ..)) = self.at.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            *at = done;
        }
        self.next.at(done);
    }

    fn note(&self, text: &str) {
        self.next.note(text);
    }

    fn warn(&self, text: &str) {
        self.next.warn(text);
    }
}
