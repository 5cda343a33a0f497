//! TOML text to [`Manifest`]: what was written, with the place of every key and value. Nothing is
//! resolved here: axes, references between stages and defaults are the plan's.
//!
//! Reading never stops at the first problem. [`load`] returns a manifest *and* everything that is
//! wrong with it: syntax of each file, unknown keys, wrong types, ranges, missing keys, duplicate
//! names, profiles that touch nothing. [`crate::plan::resolve`] takes the manifest, adds what only
//! the whole graph can tell, and returns a plan only if there is nothing to say.
//!
//! Laying over, in this order: included files, the file itself (a name may be declared once among
//! them), the chosen profiles, `--set`. Tables merge key by key, everything else is replaced; a value
//! keeps the place it was written at. A profile or `--set` that gives a stage another `kind`
//! replaces the stage's keys altogether, because keys of one kind mean nothing to another. Beneath the keys of
//! a stage that names a task lie those of the task, laid over in the same way.
//!
//! This module reads no file by itself: `load` is given a function that does.
mod check;
pub mod endpoint;
mod overlay;
mod parse;
pub mod spec;
pub mod task;
pub mod template;
pub mod value;
pub mod words;

pub(crate) use check::{
    Arity, Check, Endpoints, Found, Layer, Mode, RefUse, Step, Template, choices, dotted, names_stage, parse_default,
};

use crate::problem::{Exit, Place, Problem};
use spec::{Kind, Params};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use task::Task;
use value::{FileId, Origin, Table};

/// The version of the manifest language that `manifest = N` names.
pub const VERSION: i64 = 1;

/// The pseudo file in which what `--set` gave is shown, one per line.
pub const SET_FILE: &str = "--set";

/// Keys that every stage may have, whatever its kind.
pub const RESERVED: &[(&str, &str)] = &[
    ("kind", "What the stage does."),
    ("axes", "Axes the stage varies over: a table of lists. Axes of its inputs are joined to them."),
    ("skip", "Cells to leave out: a list of tables, each giving values to some of the axes."),
    ("description", "What the stage is for, for people. Changes no result."),
];

/// A file of the manifest, or the pseudo file of `--set`.
pub struct Text {
    pub path: PathBuf,
    /// Where relative paths in it begin.
    pub folder: PathBuf,
    pub text: String,
}

/// A stage as written, overlays applied.
pub struct Stage {
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
    pub title: String,
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
    by_name: HashMap<String, usize>,
}

/// Reads the manifest at `path` and what it includes, lays over `profiles` in their order and then
/// `sets` (each `stage.NAME.KEY=VALUE` or
/// `endpoint.NAME.KEY=VALUE` or `task.NAME.KEY=VALUE`; a value that is not TOML is a bare string).
///
/// `read` gives the text of a file; the paths it gets are `path`, and those of `include` joined to
/// the folder of the including file.
pub fn load(
    path: &Path,
    read: &dyn Fn(&Path) -> io::Result<String>,
    kinds: &'static [&'static Kind],
    profiles: &[String],
    sets: &[String],
) -> Manifest {
    let mut loader = parse::Loader::new(kinds, read);
    loader.open(path, None);
    overlay::lay_over(path, loader, profiles, sets)
}

impl Manifest {
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

/// The text of `file` among `files`.
pub fn text<'a>(files: &'a [Text], file: &Path) -> Option<&'a str> {
    files.iter().find(|text| text.path == file).map(|text| text.text.as_str())
}

/// A problem of the manifest: exit code 2.
pub(crate) fn problem(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(code, message).exit(Exit::Usage)
}

/// By file in the order of `files`, then by position; problems without a place first. What is said
/// twice is said once.
pub(crate) fn sort(problems: &mut Vec<Problem>, files: &[Text]) {
    let rank: HashMap<&Path, usize> =
        files.iter().enumerate().map(|(rank, text)| (text.path.as_path(), rank + 1)).collect();
    let key = |problem: &Problem| {
        problem.places.first().map_or((0, 0), |Place { file, span, .. }| {
            (rank.get(file.as_path()).copied().unwrap_or(0), span.as_ref().map_or(0, |span| span.start))
        })
    };
    problems.sort_by_key(key);
    problems.dedup();
}
