//! What was written, once everything is laid over.

use super::check::{Endpoints, Found};
use super::spec::{Kind, Params};
use super::task::Task;
use super::text::{Text, text};
use super::value::{FileId, Origin, Table};
use crate::problem::Problem;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A stage as written, overlays applied.
pub struct Stage {
    /// From the header `[stage.NAME]`; no two stages share one.
    pub name: String,
    /// The table header.
    pub at: Origin,
    /// `None` if there is none or it is unknown, which is reported.
    pub kind: Option<&'static Kind>,
    /// Every key but `kind`.
    pub table: Table,
    /// Some key has a problem: the parameters cannot be made, cells still can.
    pub broken: bool,
    /// Axes or `skip` have a problem: cells cannot be made either.
    pub broken_axes: bool,
    /// Parameters, null where a template stands.
    pub(crate) params: Params,
    /// Templates, references and sources among the keys.
    pub(crate) found: Found,
}

/// What was written, and what is wrong with it.
pub struct Manifest {
    /// The file asked for.
    pub path: PathBuf,
    /// What the study is called; the name of the file, without its ending, unless the manifest says.
    pub title: String,
    /// All kinds that a stage may be of.
    pub kinds: &'static [&'static Kind],
    /// In the order they were opened; `--set` last.
    pub files: Vec<Text>,
    /// Included files first, each in the order written.
    pub stages: Vec<Stage>,
    /// The endpoints by name, resolved.
    pub(crate) endpoints: Endpoints,
    pub(crate) tasks: Vec<Task>,
    /// Sorted by place.
    pub problems: Vec<Problem>,
    /// Names of all profiles, sorted.
    pub profiles: Vec<String>,
    /// A file could not be read or parsed: what is named but not there may stand in it.
    pub incomplete: bool,
    pub(super) by_name: HashMap<String, usize>,
}

impl Manifest {
    /// The stage of that name and its place in `stages`.
    pub fn stage(&self, name: &str) -> Option<(usize, &Stage)> {
        let &at = self.by_name.get(name)?;
        Some((at, &self.stages[at]))
    }

    /// The text a problem's place is about, for excerpts.
    pub fn text(&self, file: &Path) -> Option<&str> {
        text(&self.files, file)
    }

    pub(crate) fn task(&self, name: &str) -> Option<(usize, &Task)> {
        self.tasks.iter().enumerate().find(|(_, task)| task.name == name)
    }

    pub(crate) fn path_of(&self, file: FileId) -> &Path {
        &self.files[file].path
    }
}
