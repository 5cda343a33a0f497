//! Walks a plan: asks the store what is there, runs what is stale and nothing else, writes the log.
//!
//! [`Engine::status`] is the one judge of fresh, stale and waiting: `plan` and `why` print what it
//! says, `run` does it. The engine knows cells, fingerprints and files. What a stage computes it
//! learns from nobody: a [`Runner`] is handed parameters, input files and an empty folder.

mod events;
mod run;
mod sources;
mod status;

pub use events::{Event, Observer, Silent, describe};
pub use run::{Options, Outcome, Report};
pub use sources::{Paths, Resolved, Sources};
pub use status::{Reason, Status, Survey, causes, closure};

use crate::files::Files;
use crate::manifest::spec::Params;
use crate::plan::Machine;
use crate::plan::{Axes, Cell, Plan};
use crate::problem::Problem;
pub use crate::progress::Progress;
use crate::store::Store;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// A plan with everything that is needed to judge it and to run it.
pub struct Engine<'a> {
    pub plan: &'a Plan,
    pub store: &'a Store,
    pub sources: &'a dyn Sources,
    /// Where floats are made.
    pub machine: Machine<'a>,
}

/// What does the work of a cell.
pub trait Runner: Sync {
    /// Asked once, when everything was looked at and before any stage runs: what it finds missing ends the run.
    fn fits(&self, _: &Survey) -> Vec<Problem> {
        Vec::new()
    }

    /// Leaves the files of the artifact in `task.out`. An error with [`crate::problem::Exit::Interrupted`] says that
    /// the stage stopped because `task.stop` was set.
    fn run(&self, cell: &Cell, task: &Task) -> Result<(), Problem>;

    /// Asked once for each cell that is not fresh, before any of them runs: `Err` is something missing.
    fn ready(&self, _cell: &Cell, _stop: &AtomicBool) -> Result<(), Problem> {
        Ok(())
    }
}

impl<F: Fn(&Cell, &Task) -> Result<(), Problem> + Sync> Runner for F {
    fn run(&self, cell: &Cell, task: &Task) -> Result<(), Problem> {
        self(cell, task)
    }
}

/// All a stage may see of a run.
pub struct Task<'a> {
    /// `sft[size=7B]`, for messages only.
    pub label: &'a str,
    pub params: &'a Params,
    /// By slot (dotted key), in the order of the plan's input.
    pub inputs: BTreeMap<String, Vec<TaskInput>>,
    /// By dotted key; none for sources whose text says all.
    pub sources: BTreeMap<String, PathBuf>,
    /// Empty; its files become the artifact when the runner returns `Ok`.
    pub out: &'a Path,
    /// Kept when the stage fails or is interrupted, given again to the next try of the same
    /// fingerprint, removed when the artifact is published.
    pub work: &'a Path,
    pub progress: &'a dyn Progress,
    /// Set when the user asks to stop.
    pub stop: &'a AtomicBool,
}

/// An artifact given to a stage; its files were verified.
pub struct TaskInput {
    pub stage: String,
    pub kind: &'static str,
    pub axes: Axes,
    pub files: Files,
}
