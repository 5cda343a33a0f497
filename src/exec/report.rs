//! What is asked of a run, and what came of it.

use super::status::Survey;
use crate::plan::CellId;
use crate::problem::{Exit, Problem};
use crate::store::Artifact;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Stages at the same time, at least 1.
    pub jobs: usize,
    /// After a failure, go on with whatever does not depend on it.
    pub keep_going: bool,
    /// Run these even if they are fresh.
    pub force: BTreeSet<CellId>,
    /// Cells whose files the caller will read: their bytes are looked at even if they are fresh.
    pub serve: BTreeSet<CellId>,
    /// Only judge.
    pub dry_run: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { jobs: 1, keep_going: false, force: BTreeSet::new(), serve: BTreeSet::new(), dry_run: false }
    }
}

/// How a cell ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The artifact was there.
    Fresh(Artifact),
    /// `differs`: an earlier result has other bytes; it is the one in `artifact`.
    Ran {
        /// The one that is served.
        artifact: Artifact,
        /// How long the stage took, in seconds.
        wall_s: f64,
        /// Whether an earlier result has other bytes.
        differs: bool,
    },
    /// With this problem.
    Failed(Problem),
    /// An input failed: this one.
    Skipped {
        /// The one that failed.
        because: CellId,
    },
    /// Stopped on request while it ran.
    Interrupted,
    /// The run ended before its turn: an interruption, a failure elsewhere, or `dry_run`.
    NotStarted,
}

/// A run that got as far as its first stage.
pub struct Report {
    /// Empty for `dry_run`, and if all was fresh in a cache that can only be read.
    pub id: String,
    /// `runs/<id>`; empty where `id` is.
    pub folder: PathBuf,
    /// How things stood before.
    pub before: Survey,
    /// By cell; `None` for cells that were not asked for.
    pub outcomes: Vec<Option<Outcome>>,
    /// How long all took, in seconds.
    pub wall_s: f64,
}

impl Report {
    /// What a cell came to; `None` if it came to nothing.
    pub fn artifact(&self, cell: CellId) -> Option<&Artifact> {
        match self.outcomes[cell].as_ref()? {
            Outcome::Fresh(artifact) | Outcome::Ran { artifact, .. } => Some(artifact),
            _ => None,
        }
    }

    /// In plan order.
    pub fn failures(&self) -> impl Iterator<Item = (CellId, &Problem)> {
        self.outcomes.iter().enumerate().filter_map(|(cell, outcome)| match outcome {
            Some(Outcome::Failed(problem)) => Some((cell, problem)),
            _ => None,
        })
    }

    /// `None`: all that was asked for is there (or `dry_run`).
    pub fn exit(&self) -> Option<Exit> {
        let any = |wanted: fn(&Outcome) -> bool| self.outcomes.iter().flatten().any(wanted);
        if any(|outcome| matches!(outcome, Outcome::Interrupted)) {
            return Some(Exit::Interrupted);
        }
        if any(|outcome| matches!(outcome, Outcome::Failed(_))) {
            return Some(Exit::Failed);
        }
        // Nothing failed, and yet something has not run: the user stopped it between two stages.
        (!self.id.is_empty() && any(|outcome| matches!(outcome, Outcome::NotStarted))).then_some(Exit::Interrupted)
    }
}

/// Who ran it, as records tell.
pub(super) fn tool() -> String {
    format!("pipe {}", env!("CARGO_PKG_VERSION"))
}
