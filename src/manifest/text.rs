//! The files of a manifest as texts, and what is said about them.

use crate::problem::{Exit, Place, Problem};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

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
    /// The path by which the file was opened, or [`SET_FILE`].
    pub path: PathBuf,
    /// Where relative paths in it begin.
    pub folder: PathBuf,
    /// All that stands in it.
    pub text: String,
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
