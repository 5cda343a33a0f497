//! References to the outside: what they come to before a stage runs, and whether they stood still.

use crate::digest::Digest;
use crate::plan::{Cell, Source};
use crate::problem::{Exit, Problem};
use crate::store::Store;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What a source came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The file or folder handed to the stage; empty if there is none (`init:`).
    pub path: PathBuf,
    /// Of its content; enters the fingerprint.
    pub digest: Digest,
    /// For people and the record: where it came from, pinned.
    pub identity: String,
}

/// How sources are resolved. All schemes but `path:` are plugged in from outside.
pub trait Sources: Sync {
    /// Called for every source of every selected cell before any stage runs. `Err` (exit 3) says
    /// what is missing.
    fn resolve(&self, cell: &Cell, source: &Source) -> Result<Resolved, Problem>;

    /// Whether it still is what it was; asked after the stage has run, before anything is published.
    fn unchanged(&self, resolved: &Resolved) -> Result<bool, Problem>;
}

/// `path:` files and folders, by content. What the same path came to is asked of the disk once.
pub struct Paths<'a> {
    store: &'a Store,
    known: Mutex<HashMap<PathBuf, Result<Resolved, Problem>>>,
}

impl<'a> Paths<'a> {
    /// `store` remembers the digests of files that did not change.
    pub fn new(store: &'a Store) -> Paths<'a> {
        Paths { store, known: Mutex::default() }
    }

    fn look(&self, path: &Path) -> Result<Resolved, Problem> {
        let (digest, _) = self.store.digest_source(path)?;
        Ok(Resolved { path: path.to_path_buf(), digest, identity: format!("path:{digest}") })
    }
}

impl Sources for Paths<'_> {
    fn resolve(&self, cell: &Cell, source: &Source) -> Result<Resolved, Problem> {
        let Some(rest) = source.text.strip_prefix("path:") else {
            return Err(Problem::new("source::scheme", format!("nothing here can read `{}`", source.text))
                .exit(Exit::Usage)
                .at_span(&cell.file, cell.span.clone(), &source.key));
        };
        let path = source.folder.join(rest);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let resolved = known.entry(path.clone()).or_insert_with(|| self.look(&path)).clone();
        resolved.map_err(|problem| problem.at_span(&cell.file, cell.span.clone(), &source.key))
    }

    fn unchanged(&self, resolved: &Resolved) -> Result<bool, Problem> {
        Ok(self.look(&resolved.path).is_ok_and(|now| now.digest == resolved.digest))
    }
}
