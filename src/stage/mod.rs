//! The kinds of stage, one file each: `KIND` (keys, defaults, meaning) and `run`.
//!
//! A stage sees its resolved parameters, its inputs as files and an empty output folder. It cannot
//! name the store, the plan's other cells or the terminal.

use crate::files::Files;
use crate::manifest::spec::{Key, Kind, Params, Type};
use crate::plan::Axes;
use crate::problem::{Exit, Problem};
use crate::remote::{Endpoint, Remote};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

mod asking;
pub mod bundled;
pub mod check;
pub mod command;
pub mod counts;
pub mod dataset;
mod decoding;
pub mod dpo;
pub mod eval;
pub mod generate;
mod inputs;
mod judge;
pub mod model;
pub mod needs;
pub mod plot;
pub mod probe;
pub mod readings;
pub mod sft;
pub mod table;
mod thinking;
mod training;

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

pub use crate::model::Device;

/// One artifact given to a stage.
pub struct Artifact {
    /// Stage name and axes of the cell it came from. Only labelled inputs may use them for results.
    pub stage: String,
    pub kind: &'static str,
    pub axes: Axes,
    pub files: Files,
}

/// What a stage reports while it runs. The terminal decides what is shown.
pub trait Progress: Sync {
    /// Work known in advance: `total` of `unit` ("steps", "records", "problems").
    fn begin(&self, total: u64, unit: &'static str);
    /// Done so far, out of `total`.
    fn at(&self, done: u64);
    /// A short line of numbers beside the bar (`loss 1.234  lr 3.0e-4`).
    fn note(&self, text: &str);
    /// Something the user should know after the run too (a dropped row, a slow path).
    fn warn(&self, text: &str);
}

/// All a stage may see.
pub struct Context<'a> {
    /// `sft[size=7B]`, for messages only.
    pub label: &'a str,
    pub params: &'a Params,
    /// By slot (dotted key). A model's slot holds its chain, base first.
    pub inputs: &'a BTreeMap<String, Vec<Artifact>>,
    /// By dotted key: the file or folder a `path:` or `hf:` source came to.
    pub sources: &'a BTreeMap<String, PathBuf>,
    /// Empty folder; its files become the artifact when `run` returns `Ok`.
    pub out: &'a Path,
    /// Kept when the stage is interrupted, for resuming; removed when it is published.
    pub work: &'a Path,
    pub device: Device,
    /// The way to endpoints, shared by the stages of a run.
    pub remote: &'a Remote,
    pub progress: &'a dyn Progress,
    /// Set on Ctrl-C; stages look at it at least once a second and return [`Context::stopped`].
    pub stop: &'a AtomicBool,
}

impl Context<'_> {
    /// `Err` once the user has asked to stop.
    pub fn stopped(&self) -> Result<(), Problem> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(
                Problem::new("exec::interrupted", format!("`{}` was interrupted", self.label)).exit(Exit::Interrupted)
            );
        }
        Ok(())
    }

    /// The parameters as the kind's own struct (`deny_unknown_fields`, so that every accepted key is read).
    pub fn spec<T: serde::de::DeserializeOwned>(&self) -> Result<T, Problem> {
        read_params(self.label, self.params.clone())
    }

    /// The artifacts of a slot; empty if the optional reference is absent.
    pub fn inputs(&self, slot: &str) -> &[Artifact] {
        self.inputs.get(slot).map_or(&[], Vec::as_slice)
    }
}

/// Parameters as a struct that knows every one of them.
fn read_params<T: serde::de::DeserializeOwned>(label: &str, params: Params) -> Result<T, Problem> {
    serde_json::from_value(serde_json::Value::Object(params))
        .map_err(|error| Problem::new("stage::params", format!("parameters of `{label}` do not fit its kind: {error}")))
}
