//! One shape for everything that can go wrong: facts here, words for a terminal in `report`.
//!
//! A problem has a stable code (`manifest::unknown_key`), one lower-case sentence, the places it
//! is about, notes that add facts and help that can be typed. It never holds a secret.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// Process exit codes, fixed by the command line's contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// A stage failed, or a `check` did not hold.
    Failed = 1,
    /// The manifest or the command line is wrong.
    Usage = 2,
    /// Something the plan needs is missing: weights, key, memory, network.
    Missing = 3,
    /// Interrupted by the user.
    Interrupted = 130,
}

/// A place in a file: bytes of a manifest, or a line of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its path, as it is shown.
    pub file: PathBuf,
    /// Byte range, for texts that are excerpted (manifests).
    pub span: Option<Range<usize>>,
    /// 1-based line, for files that are not excerpted (data).
    pub line: Option<usize>,
    /// What is at the place; may be empty.
    pub label: String,
}

/// What went wrong. Build with [`Problem::new`] and the chained setters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `area::name`; stable, named by tests and documentation.
    pub code: &'static str,
    /// One lower-case sentence without a full stop.
    pub message: String,
    /// Where it is; empty for what has no place.
    pub places: Vec<Place>,
    /// What else is good to know, a sentence each.
    pub notes: Vec<String>,
    /// What to do about it, a suggestion each.
    pub help: Vec<String>,
    /// What the program exits with if this ends it.
    pub exit: Exit,
}

impl Problem {
    /// Without places, notes and help; exits as [`Exit::Failed`].
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Problem {
            code,
            message: message.into(),
            places: Vec::new(),
            notes: Vec::new(),
            help: Vec::new(),
            exit: Exit::Failed,
        }
    }

    /// Sets the exit code.
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// Adds something that is good to know.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Adds a suggestion.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }

    /// Adds a byte range of a manifest.
    pub fn at_span(mut self, file: impl Into<PathBuf>, span: Range<usize>, label: &str) -> Self {
        self.places.push(Place { file: file.into(), span: Some(span), line: None, label: label.into() });
        self
    }

    /// Adds a line of a data file.
    pub fn at_line(mut self, file: impl Into<PathBuf>, line: usize) -> Self {
        self.places.push(Place { file: file.into(), span: None, line: Some(line), label: String::new() });
        self
    }

    /// Adds a whole file.
    pub fn at_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.places.push(Place { file: file.into(), span: None, line: None, label: String::new() });
        self
    }

    /// An operation on a file that the system refused.
    pub fn io(code: &'static str, doing: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Problem::new(code, format!("cannot {doing} `{}`: {error}", path.display()))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, self.message)?;
        for place in &self.places {
            match place.line {
                Some(line) => write!(f, "\n  --> {}:{line}", place.file.display())?,
                None => write!(f, "\n  --> {}", place.file.display())?,
            }
        }
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        for help in &self.help {
            write!(f, "\nhelp: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

impl From<std::convert::Infallible> for Problem {
    fn from(never: std::convert::Infallible) -> Problem {
        match never {}
    }
}
