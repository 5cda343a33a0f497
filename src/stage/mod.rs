//! The kinds of stage, one file each: `KIND` (keys, defaults, meaning) and `run`.
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
mod forecast;
mod kinds;
mod share;

pub use crate::model::Device;
pub use crate::progress::Progress;
pub use context::{Artifact, Context};
pub use forecast::{counts, needs};
pub use kinds::{check, command, dataset, dpo, eval, generate, model, plot, probe, sft, table};
pub use share::{bundled, readings};

/// What a kind does with a context.
pub type Run = fn(&Context) -> Result<(), Problem>;

/// The kinds, in the order help and schema list them: the one table a new kind is added to.
const STAGES: &[(&Kind, Run)] = &[
    (&model::KIND, model::run),
    (&dataset::KIND, dataset::run),
    (&generate::KIND, generate::run),
    (&sft::KIND, sft::run),
    (&dpo::KIND, dpo::run),
    (&probe::KIND, probe::run),
    (&eval::KIND, eval::run),
    (&table::KIND, table::run),
    (&plot::KIND, plot::run),
    (&check::KIND, check::run),
    (&command::KIND, command::run),
];

/// Every kind a manifest may name.
pub const KINDS: &[&Kind] = &kinds();

const fn kinds() -> [&'static Kind; STAGES.len()] {
    let mut kinds = [STAGES[0].0; STAGES.len()];
    let mut at = 0;
    while at < STAGES.len() {
        kinds[at] = STAGES[at].0;
        at += 1;
    }
    kinds
}

/// Runs a stage of the kind called `kind`, one of [`KINDS`].
pub fn run(kind: &str, ctx: &Context) -> Result<(), Problem> {
    match STAGES.iter().find(|(known, _)| known.name == kind) {
        Some((_, run)) => {
            let seen = Seen { next: ctx.progress, at: Mutex::new(None) };
            let done = run(&Context { device: ctx.device.clone(), progress: &seen, ..*ctx });
            let at = *seen.at.lock().unwrap_or_else(PoisonError::into_inner);
            done.map_err(|problem| needs::explained(problem, kind, ctx, at))
        }
        None => Err(Problem::new("stage::unknown_kind", format!("there is no kind of stage called `{kind}`"))),
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
        let there = remote.line(&endpoint).and_then(|line| line.probe(stop));
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
