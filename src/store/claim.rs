//! The right to make an artifact, and how it becomes one.

use super::artifacts::Store;
use super::blob;
use super::disk;
use super::lock::{Attempt, Holder, Lock};
use super::record::{Artifact, Record};
use crate::digest::Digest;
use crate::problem::Problem;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// The right to make the artifact of one fingerprint; nobody else has it meanwhile.
pub struct Claim<'a> {
    store: &'a Store,
    fingerprint: Digest,
    folder: PathBuf,
    /// Of this claim alone: a program that outlived its killed parent may still write to an old one.
    out: PathBuf,
    lock: Option<Lock>,
}

/// What became of asking for a claim.
pub enum Claimed<'a> {
    /// Granted.
    Mine(Claim<'a>),
    /// Another stage run has it, in this process or another.
    Held(Holder),
}

/// How a publication ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// The first result of its fingerprint.
    First(Artifact),
    /// There was one, with the same bytes.
    Same(Artifact),
    /// There was one, with other bytes. The first is served; the second is kept beside it.
    Differs {
        /// The one that is served.
        first: Artifact,
        /// The one that was made now.
        second: Artifact,
    },
}

impl Published {
    /// The artifact that is served.
    pub fn artifact(&self) -> &Artifact {
        match self {
            Published::First(artifact) | Published::Same(artifact) | Published::Differs { first: artifact, .. } => {
                artifact
            }
        }
    }
}

impl Store {
    /// Asks for the right to make an artifact; does not wait. `label` is told to whoever waits for
    /// it. Once granted, the caller looks again whether another has finished it meanwhile.
    pub fn claim(&self, fingerprint: &Digest, label: &str) -> Result<Claimed<'_>, Problem> {
        let path = self.dir.join("locks").join(fingerprint.to_string());
        match Lock::attempt(&path, label)? {
            Attempt::Held(holder) => Ok(Claimed::Held(holder)),
            Attempt::Got(lock) => {
                let folder = self.dir.join("work").join(fingerprint.to_string());
                static COUNT: AtomicU64 = AtomicU64::new(0);
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                let out = folder.join(format!("out-{}-{count}", std::process::id()));
                Ok(Claimed::Mine(Claim { store: self, fingerprint: *fingerprint, folder, out, lock: Some(lock) }))
            }
        }
    }

    /// The work folder of an unfinished fingerprint, if there is one: what a run would resume from.
    pub fn unfinished(&self, fingerprint: &Digest) -> Option<PathBuf> {
        let kept = self.dir.join("work").join(fingerprint.to_string()).join("work");
        let mut entries = fs::read_dir(&kept).ok()?;
        entries.next().map(|_| kept)
    }
}

impl Claim<'_> {
    /// Empties the output folder and makes sure that the work folder is there; the latter holds what
    /// an interrupted run of the same fingerprint left. Returns (out, work).
    pub fn begin(&self) -> Result<(PathBuf, PathBuf), Problem> {
        self.store.drop_outputs(&self.folder)?;
        let work = self.folder.join("work");
        self.store.disk.folder(&self.store.dir.join("work"), &work)?;
        fs::create_dir_all(&self.out).map_err(|error| disk::problem("create", &self.out, &error))?;
        Ok((self.out.clone(), work))
    }

    /// Makes the files of the output folder the artifact of the fingerprint. `record` carries the
    /// provenance; its artifact and fingerprint are filled in here. On `Err` nothing is visible.
    pub fn publish(mut self, mut record: Record) -> Result<Published, Problem> {
        let store = self.store;
        let artifact = blob::take(&store.disk, &store.dir, &self.out, &store.scratch(&self.fingerprint))?;
        record.fingerprint = self.fingerprint;
        record.artifact = artifact.clone();
        let published = match store.record(&self.fingerprint) {
            Some(first) if first.artifact == artifact => Published::Same(artifact),
            Some(first) if first.artifact.entries.iter().all(|entry| store.missing(entry).is_none()) => {
                self.write_second(&record)?;
                Published::Differs { first: first.artifact, second: artifact }
            }
            // No record, one that does not read, or one whose bytes are lost for good.
            _ => {
                self.write_record(&record, "")?;
                Published::First(artifact)
            }
        };
        store.index().add(self.fingerprint, &record.cell, &record.kind, published.artifact());
        // Past this point the result is there for all; a failure to tidy up must not hide it.
        let _ = store.flush();
        let _ = store.disk.remove_folder(&self.folder);
        store.drop_scratch(&self.fingerprint);
        self.lock = None;
        Ok(published)
    }

    fn write_second(&self, record: &Record) -> Result<(), Problem> {
        let others = self.store.other_results(&self.fingerprint);
        if others.iter().any(|other| other.artifact == record.artifact) {
            return Ok(());
        }
        let free = (2..).find(|n| {
            !blob::sharded(&self.store.dir.join("stages"), &self.fingerprint, &format!(".{n}.json")).exists()
        });
        self.write_record(record, &format!(".{}", free.unwrap_or(2)))
    }

    fn write_record(&self, record: &Record, number: &str) -> Result<(), Problem> {
        let stages = self.store.dir.join("stages");
        let path = blob::sharded(&stages, &self.fingerprint, &format!("{number}.json"));
        self.store.disk.folder(&stages, path.parent().unwrap_or(&stages))?;
        self.store.disk.write(&path, &self.folder.join("record.json"), &record.to_bytes())
    }

    /// Gives up: the output is dropped, the work folder is kept for the next try.
    pub fn abandon(self) {
        let _ = self.store.drop_outputs(&self.folder);
        self.store.drop_scratch(&self.fingerprint);
        // These two only go if they are empty.
        let _ = fs::remove_dir(self.folder.join("work"));
        let _ = fs::remove_dir(&self.folder);
    }

    /// Another has finished it meanwhile: nothing is to be done, nothing to be kept.
    pub fn already_done(self) {
        let _ = self.store.disk.remove_folder(&self.folder);
    }
}
