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
mod reference;
pub mod spec;
pub mod task;
pub mod template;
mod text;
pub mod value;
pub mod words;
mod written;

pub(crate) use check::{Check, Found, Layer, Mode, Step, Template, choices, dotted, names_stage, parse_default};

pub(crate) use reference::{Arity, RefUse};
pub(crate) use text::sort;
pub use text::{RESERVED, SET_FILE, Text, VERSION, text};
pub use written::{Manifest, Stage};

use spec::Kind;
use std::io;
use std::path::Path;

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
