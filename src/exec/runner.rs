//! What does the work of a cell, and all it is given.

use super::status::Survey;
use crate::files::Files;
use crate::manifest::spec::Params;
use crate::plan::{Axes, Cell};
use crate::problem::Problem;
pub use crate::progress::Progress;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

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
    /// The resolved keys.
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
    /// Where the stage tells how far it is.
    pub progress: &'a dyn Progress,
    /// Set when the user asks to stop.
    pub stop: &'a AtomicBool,
}

/// An artifact given to a stage; its files were verified.
pub struct TaskInput {
    /// The name of the stage that made it.
    pub stage: String,
    /// The name of that stage's kind.
    pub kind: &'static str,
    /// At which point.
    pub axes: Axes,
    /// By name.
    pub files: Files,
}
