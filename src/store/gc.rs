//! Tidying and checking: what killed runs left, what nothing refers to, what has rotted.

use super::artifacts::Store;
use super::disk;
use super::index::record_files;
use super::lock::{self, Attempt, Lock, Locks};
use super::record::Record;
use crate::digest::Digest;
use crate::problem::Problem;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// What `pipe cache verify` found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Records that were read.
    pub records: usize,
    /// Files whose bytes were read.
    pub blobs: usize,
    /// Their size.
    pub bytes: u64,
    /// Sentences, one for each file that is not what it should be. They lie in `quarantine/` now.
    pub damaged: Vec<String>,
    /// Labels of the cells whose artifact is no longer whole; the next run makes them again.
    pub lost: BTreeSet<String>,
}

/// What `pipe cache stats` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Finished stages.
    pub records: usize,
    /// Files.
    pub blobs: usize,
    /// Of all blobs.
    pub bytes: u64,
    /// What the artifacts would take if equal files were not shared.
    pub bytes_unshared: u64,
    /// Kind to (records, bytes unshared).
    pub kinds: BTreeMap<String, (usize, u64)>,
    /// Folders of runs.
    pub runs: usize,
    /// Unfinished fingerprints with something to resume from.
    pub unfinished: usize,
    /// Files set aside because they were damaged.
    pub quarantined: usize,
}

/// What `pipe gc` leaves.
#[derive(Debug, Clone, Default)]
pub struct Keep {
    /// Fingerprints whose artifacts stay; `None` keeps all that are whole.
    pub fingerprints: Option<HashSet<Digest>>,
    /// Newest run folders that stay.
    pub runs: usize,
    /// Work folders of unfinished stages younger than this stay.
    pub work: Duration,
}

/// What `pipe gc` removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Records that went.
    pub records: usize,
    /// Files that went.
    pub blobs: usize,
    /// Folders of runs that went.
    pub runs: usize,
    /// Work folders that went.
    pub work: usize,
    /// Damaged files that went.
    pub quarantined: usize,
    /// What all of them took.
    pub bytes: u64,
}

impl Store {
    /// Where files are copied before they become blobs.
    pub(super) fn scratch(&self, fingerprint: &Digest) -> PathBuf {
        self.dir.join("tmp").join(fingerprint.to_string())
    }

    pub(super) fn drop_scratch(&self, fingerprint: &Digest) {
        let scratch = self.scratch(fingerprint);
        if scratch.exists() {
            let _ = self.disk.remove_folder(&scratch);
            // Only goes if no other copy is under way.
            let _ = fs::remove_dir(self.dir.join("tmp"));
        }
    }

    /// Removes the outputs, half-made or not, of an unfinished fingerprint.
    pub(super) fn drop_outputs(&self, unfinished: &Path) -> Result<(), Problem> {
        for folder in children(unfinished) {
            if folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("out-")) {
                self.disk.remove_folder(&folder)?;
            }
        }
        Ok(())
    }

    /// Removes what killed processes left half-made: outputs, copies, lock files. Keeps the work
    /// folders, from which stages resume. The caller is alone in the cache.
    pub(super) fn sweep(&self) -> Result<(), Problem> {
        self.disk.remove_folder(&self.dir.join("tmp"))?;
        for unfinished in children(&self.dir.join("work")) {
            self.drop_outputs(&unfinished)?;
            let _ = fs::remove_file(unfinished.join("record.json"));
            // These two only go if they are empty.
            let _ = fs::remove_dir(unfinished.join("work"));
            let _ = fs::remove_dir(&unfinished);
        }
        for file in children(&self.dir.join("locks")) {
            if file.file_name().is_some_and(|name| name != "gc")
                && let Ok(Attempt::Got(lock)) = Lock::attempt(&file, "sweep")
            {
                drop(lock);
            }
        }
        for file in children(&self.dir) {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.starts_with(".version-") || name == "index.tmp" || name == "stat.tmp" {
                let _ = fs::remove_file(file);
            }
        }
        Ok(())
    }

    /// Reads every record and every blob, trusting no memory of earlier readings. What is not what
    /// it should be goes to `quarantine/`, so that the next run makes it again.
    pub fn verify_all(&self, mut on_blob: impl FnMut(u64)) -> Checked {
        let mut checked = Checked::default();
        let mut bad = HashSet::new();
        for file in children(&self.dir.join("blobs")).iter().flat_map(|shard| children(shard)) {
            checked.blobs += 1;
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let found = File::open(&file).and_then(|mut file| Digest::of_reader(&mut file));
            let wrong = match found {
                Ok((digest, size)) => {
                    checked.bytes += size;
                    on_blob(size);
                    (digest.to_string() != name).then(|| format!("its bytes are now those of {}", digest.short()))
                }
                Err(error) => Some(error.to_string()),
            };
            if let Some(wrong) = wrong {
                checked.damaged.push(format!("{}: {wrong}", file.display()));
                self.quarantine(&file);
                bad.insert(name);
            }
        }
        for (path, first) in record_files(&self.dir.join("stages")) {
            checked.records += 1;
            let record =
                match fs::read(&path).map_err(|error| error.to_string()).and_then(|bytes| Record::from_bytes(&bytes)) {
                    Ok(record) => record,
                    Err(wrong) => {
                        checked.damaged.push(format!("{}: {wrong}", path.display()));
                        if let Some(fingerprint) = fingerprint_of(&path) {
                            self.index().forget(&fingerprint);
                        }
                        self.quarantine(&path);
                        continue;
                    }
                };
            let gone = record
                .artifact
                .entries
                .iter()
                .any(|e| bad.contains(&e.digest.to_string()) || self.missing(e).is_some());
            if gone && first {
                checked.lost.insert(record.cell);
            }
        }
        let _ = self.flush();
        checked
    }

    /// Counts what is there; reads records and no artifacts.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for file in children(&self.dir.join("blobs")).iter().flat_map(|shard| children(shard)) {
            stats.blobs += 1;
            stats.bytes += size(&file);
        }
        for (path, _) in record_files(&self.dir.join("stages")) {
            if let Ok(record) = fs::read(&path).map_err(drop).and_then(|bytes| Record::from_bytes(&bytes).map_err(drop))
            {
                let bytes = record.artifact.size();
                stats.records += 1;
                stats.bytes_unshared += bytes;
                let kind = stats.kinds.entry(record.kind).or_default();
                *kind = (kind.0 + 1, kind.1 + bytes);
            }
        }
        stats.runs = children(&self.dir.join("runs")).len();
        stats.unfinished = children(&self.dir.join("work")).len();
        stats.quarantined = children(&self.dir.join("quarantine")).len();
        stats
    }

    /// Which stages are being made, and what killed runs left of their locks.
    pub fn locks(&self) -> Locks {
        lock::look(&self.dir.join("locks"), &["gc", "index"])
    }

    /// Removes what `keep` does not name and what nothing refers to. `Err` (`store::busy`) if a run
    /// is on in this cache.
    pub fn gc(&self, keep: &Keep, dry_run: bool) -> Result<Collected, Problem> {
        let path = self.dir.join("locks/gc");
        if !path.parent().is_some_and(Path::is_dir) {
            return Ok(Collected::default());
        }
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let alone = file.map_err(|error| disk::problem("lock", &path, &error))?;
        if alone.try_lock().is_err() {
            return Err(Problem::new("store::busy", format!("a run is on in `{}`", self.dir.display()))
                .help("let it end, then `pipe gc` again"));
        }
        if !dry_run {
            self.sweep()?;
        }
        let mut collected = Collected::default();
        let mut remove = |path: &Path, count: fn(&mut Collected) -> &mut usize| -> Result<(), Problem> {
            *count(&mut collected) += 1;
            collected.bytes += size(path);
            if dry_run {
                return Ok(());
            }
            if path.is_dir() {
                return self.disk.remove_folder(path);
            }
            fs::remove_file(path).map_err(|error| disk::problem("remove", path, &error))
        };
        let mut live = HashSet::new();
        // Records before blobs: killed in between, there are blobs too many, never a blob too few.
        for (path, _) in record_files(&self.dir.join("stages")) {
            let record = fs::read(&path).ok().and_then(|bytes| Record::from_bytes(&bytes).ok());
            match record {
                Some(record) if keep.fingerprints.as_ref().is_none_or(|all| all.contains(&record.fingerprint)) => {
                    live.extend(record.artifact.entries.iter().map(|entry| entry.digest.to_string()));
                }
                _ => {
                    if !dry_run && let Some(fingerprint) = fingerprint_of(&path) {
                        self.index().forget(&fingerprint);
                    }
                    remove(&path, |collected| &mut collected.records)?;
                }
            }
        }
        for file in children(&self.dir.join("blobs")).iter().flat_map(|shard| children(shard)) {
            if file.file_name().is_some_and(|name| !live.contains(&*name.to_string_lossy())) {
                remove(&file, |collected| &mut collected.blobs)?;
            }
        }
        let runs = children(&self.dir.join("runs"));
        for run in &runs[..runs.len().saturating_sub(keep.runs)] {
            remove(run, |collected| &mut collected.runs)?;
        }
        for work in children(&self.dir.join("work")) {
            let age = fs::metadata(&work).and_then(|m| m.modified()).map(|at| SystemTime::now().duration_since(at));
            if age.is_ok_and(|age| age.is_ok_and(|age| age >= keep.work)) {
                remove(&work, |collected| &mut collected.work)?;
            }
        }
        for file in children(&self.dir.join("quarantine")) {
            remove(&file, |collected| &mut collected.quarantined)?;
        }
        if !dry_run {
            self.flush()?;
        }
        Ok(collected)
    }
}

fn fingerprint_of(record: &Path) -> Option<Digest> {
    let name = record.file_name()?.to_str()?;
    name.strip_suffix(".json").and_then(|stem| stem.parse().ok())
}

/// In name order; nothing if the folder is not there.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    paths
}

/// In bytes, folders with all that is in them.
fn size(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => children(path).iter().map(|child| size(child)).sum(),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    }
}
