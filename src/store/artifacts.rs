//! The store itself: whose folder it takes, what is in it, what it learned.

use super::blob;
use super::disk::{self, Disk};
use super::index::Index;
use super::lock::{Attempt, Lock};
use super::record::{Artifact, Entry, Record, utc};
use super::stat::StatCache;
use crate::digest::Digest;
use crate::files::Files;
use crate::problem::{Exit, Problem};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

/// Number of the layout of the cache folder; in its file `version`.
pub const VERSION: u32 = 1;

/// A cache folder.
pub struct Store {
    pub(super) dir: PathBuf,
    pub(super) disk: Disk,
    pub(super) stat: StatCache,
    index: OnceLock<Mutex<Index>>,
}

/// What the store has for a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// The record and all its files (by size; their bytes are looked at by [`Store::verify`]).
    Known(Artifact),
    /// A record, but these of its files are gone or have another size.
    Damaged(Artifact, Vec<Damage>),
    /// Never finished here.
    Unknown,
}

/// A file of an artifact that is not what was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Name in the artifact.
    pub name: String,
    /// The file in the store.
    pub blob: PathBuf,
    /// `expected 35,192,832 bytes, found 4,096`.
    pub what: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} (`{}`)", self.blob.display(), self.what, self.name)
    }
}

/// `store::damaged`, about the artifact of `cell`.
pub fn damaged(cell: &str, damage: &[Damage]) -> Problem {
    let problem = Problem::new("store::damaged", format!("the artifact of `{cell}` is not what was stored"));
    damage
        .iter()
        .fold(problem, |problem, one| problem.note(one.to_string()))
        .help("run again: it is made anew, and the damaged files lie in `quarantine/` of the cache folder")
}

/// Keeps `pipe gc` out while a run relies on what it found. Any number at once.
pub struct RunLock(#[allow(dead_code, reason = "held for its lock, which closing the file releases")] File);

impl Store {
    /// Looks at the folder without writing anything; an absent one is an empty store. `Err`
    /// (`store::newer`, `store::version`, `store::not_a_cache`, all exit 3) leaves it untouched.
    pub fn open(dir: &Path) -> Result<Store, Problem> {
        Store::open_on(dir, Disk::default())
    }

    /// The same with another disk below it.
    pub fn open_on(dir: &Path, disk: Disk) -> Result<Store, Problem> {
        let version = dir.join("version");
        match fs::read_to_string(&version) {
            Ok(text) => match text.trim().parse::<u32>() {
                Ok(VERSION) => {}
                Ok(found) => return Err(other_version(dir, found)),
                Err(_) => {
                    return Err(Problem::new(
                        "store::version",
                        format!("`{}` holds no version number", version.display()),
                    )
                    .exit(Exit::Missing)
                    .help(format!("if the folder is a cache of this pipe: `echo {VERSION} > {}`", version.display())));
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => refuse_foreign(dir)?,
            Err(error) => return Err(disk::problem("read", &version, &error).exit(Exit::Missing)),
        }
        Ok(Store { stat: StatCache::new(dir.join("stat")), dir: dir.to_path_buf(), disk, index: OnceLock::new() })
    }

    /// The cache folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder of paid replies. It belongs to no stage, and `gc` leaves it alone.
    pub fn journals(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// Creates what is missing of the folder and finds out that it can be written. A run asks this
    /// before anything else; `Err` exits 3. Removes what killed runs left, if no other run is on.
    pub fn session(&self) -> Result<RunLock, Problem> {
        let prepare = || {
            fs::create_dir_all(&self.dir).map_err(|error| disk::problem("create", &self.dir, &error))?;
            for name in ["locks", "blobs", "stages", "work", "runs"] {
                self.disk.folder(&self.dir, &self.dir.join(name))?;
            }
            // A file of its own, not a `Lock`: it is never removed, so that shared holders meet in it.
            let path = self.dir.join("locks/gc");
            let file = File::options().write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(|error| disk::problem("lock", &path, &error))?;
            if file.try_lock().is_ok() {
                self.sweep()?;
                file.unlock().map_err(|error| disk::problem("lock", &path, &error))?;
            }
            file.lock_shared().map_err(|error| disk::problem("lock", &path, &error))?;
            // Only now: a sweep of another run that starts at the same instant would take the temporary file away.
            let version = self.dir.join("version");
            if !version.exists() {
                let temporary = self.dir.join(format!(".version-{}", std::process::id()));
                self.disk.write(&version, &temporary, format!("{VERSION}\n").as_bytes())?;
            }
            Ok(RunLock(file))
        };
        prepare().map_err(|problem: Problem| problem.exit(Exit::Missing))
    }

    pub(super) fn index(&self) -> MutexGuard<'_, Index> {
        let load = || Mutex::new(Index::load(&self.dir.join("index"), &self.dir.join("stages")));
        self.index.get_or_init(load).lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record_path(&self, fingerprint: &Digest) -> PathBuf {
        blob::sharded(&self.dir.join("stages"), fingerprint, ".json")
    }

    /// Cheap: looks at the names and sizes of the files, not at their bytes.
    pub fn get(&self, fingerprint: &Digest) -> Lookup {
        let known = self.index().get(fingerprint).cloned();
        let artifact = match known {
            Some(artifact) if self.record_path(fingerprint).exists() => artifact,
            Some(_) => {
                self.index().forget(fingerprint);
                return Lookup::Unknown;
            }
            // Finished by another process since the index was read, or just before a kill.
            None => match self.record(fingerprint) {
                Some(record) => {
                    self.index().add(*fingerprint, &record.cell, &record.kind, &record.artifact);
                    record.artifact
                }
                None => return Lookup::Unknown,
            },
        };
        let damage: Vec<Damage> = artifact.entries.iter().filter_map(|entry| self.missing(entry)).collect();
        if damage.is_empty() { Lookup::Known(artifact) } else { Lookup::Damaged(artifact, damage) }
    }

    pub(super) fn missing(&self, entry: &Entry) -> Option<Damage> {
        let blob = blob::path(&self.dir, &entry.digest);
        let what = match fs::metadata(&blob) {
            Ok(metadata) if metadata.len() == entry.size => return None,
            Ok(metadata) => format!("expected {} bytes, found {}", grouped(entry.size), grouped(metadata.len())),
            Err(_) => "is not there".into(),
        };
        Some(Damage { name: entry.name.clone(), blob, what })
    }

    /// The whole record; `None` if there is none or it does not read.
    pub fn record(&self, fingerprint: &Digest) -> Option<Record> {
        let record = Record::from_bytes(&fs::read(self.record_path(fingerprint)).ok()?).ok()?;
        (record.fingerprint == *fingerprint).then_some(record)
    }

    /// The second, third, ... results of a fingerprint whose bytes differ from the first.
    pub fn other_results(&self, fingerprint: &Digest) -> Vec<Record> {
        (2..)
            .map_while(|n| fs::read(blob::sharded(&self.dir.join("stages"), fingerprint, &format!(".{n}.json"))).ok())
            .filter_map(|bytes| Record::from_bytes(&bytes).ok())
            .collect()
    }

    /// The fingerprint with which a cell of this label and kind was last made or found fresh.
    pub fn last(&self, cell: &str, kind: &str) -> Option<Digest> {
        self.index().last(cell, kind)
    }

    /// The newest records of a kind, at most `count`: what a cell without a past is compared with.
    pub fn newest_of_kind(&self, kind: &str, count: usize) -> Vec<Record> {
        let fingerprints = self.index().of_kind(kind, count).to_vec();
        fingerprints.iter().filter_map(|fingerprint| self.record(fingerprint)).collect()
    }

    /// Remembers that `cell` is at `fingerprint` now (for [`Store::last`]); written by [`Store::flush`].
    pub fn touch(&self, fingerprint: &Digest, cell: &str, kind: &str) {
        self.index().touch(*fingerprint, cell, kind);
    }

    /// Writes what was learned: index lines and digests of files. Nothing is lost without it but time.
    pub fn flush(&self) -> Result<(), Problem> {
        let news = |index: &Index| !index.unsaved.is_empty() || index.rebuild;
        if !news(&self.index()) && !self.stat.has_news() {
            return Ok(());
        }
        // First the lock: another process may hold it, and nobody here is to wait for the index meanwhile.
        let _lock = self.wait_for_lock("index")?;
        let mut index = self.index();
        let path = self.dir.join("index");
        let lines = std::mem::take(&mut index.unsaved);
        if index.rebuild {
            // Another process may have finished stages since this one read the file.
            index.absorb(&self.dir.join("stages"));
            self.disk.write(&path, &self.dir.join("index.tmp"), index.to_text().as_bytes())?;
            index.rebuild = false;
        } else if !lines.is_empty() {
            let header = if path.exists() { String::new() } else { Index::header() };
            self.disk.append(&path, (header + &lines).as_bytes())?;
        }
        self.stat.save(&self.disk)
    }

    /// For short critical sections only.
    pub(super) fn wait_for_lock(&self, name: &str) -> Result<Lock, Problem> {
        let path = self.dir.join("locks").join(name);
        loop {
            match Lock::attempt(&path, name)? {
                Attempt::Got(lock) => return Ok(lock),
                Attempt::Held(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Where the files of an artifact lie. Their bytes are not looked at: for names and sizes.
    pub fn files(&self, artifact: &Artifact) -> Files {
        let mut files = Files::default();
        for entry in &artifact.entries {
            files.insert(entry.name.clone(), blob::path(&self.dir, &entry.digest));
        }
        files
    }

    /// Where the files of an artifact lie, after making sure that each holds what was stored. What
    /// does not is moved to `quarantine/` (if the folder can be written) and never served.
    pub fn verify(&self, artifact: &Artifact) -> Result<Files, Vec<Damage>> {
        let damage: Vec<Damage> = artifact.entries.iter().filter_map(|entry| self.damage(entry)).collect();
        if damage.is_empty() { Ok(self.files(artifact)) } else { Err(damage) }
    }

    pub(super) fn damage(&self, entry: &Entry) -> Option<Damage> {
        if let Some(damage) = self.missing(entry) {
            self.quarantine(&damage.blob);
            return Some(damage);
        }
        let blob = blob::path(&self.dir, &entry.digest);
        let what = match self.stat.digest(&blob) {
            Ok((found, _)) if found == entry.digest => return None,
            Ok((found, _)) => format!("its bytes are now those of {}", found.short()),
            Err(error) => error.to_string(),
        };
        self.quarantine(&blob);
        Some(Damage { name: entry.name.clone(), blob, what })
    }

    /// Kept for whoever wants to know how it came about; `pipe gc` removes it.
    pub(super) fn quarantine(&self, file: &Path) {
        let Some(name) = file.file_name().map(|name| name.to_string_lossy().into_owned()) else { return };
        let folder = self.dir.join("quarantine");
        let moment = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        // In a cache that can only be read it stays in place, and is found again each time.
        let _ = self.disk.folder(&self.dir, &folder);
        let _ = self.disk.rename(file, &folder.join(format!("{name}.{moment}")));
    }

    /// Digest and size in bytes of a file or folder outside, by content; remembered while unchanged.
    pub fn digest_source(&self, path: &Path) -> Result<(Digest, u64), Problem> {
        self.stat.digest_source(path)
    }

    /// A new folder below `runs/`, named by the moment and the process.
    pub fn run_folder(&self) -> Result<(String, PathBuf), Problem> {
        let moment = utc(SystemTime::now()).replace([':', '-'], "");
        let failed = |path: &Path, error: std::io::Error| disk::problem("create", path, &error);
        for n in 0.. {
            let suffix = if n == 0 { String::new() } else { format!("-{n}") };
            let id = format!("{moment}-{}{suffix}", std::process::id());
            let path = self.dir.join("runs").join(&id);
            match fs::create_dir(&path) {
                Ok(()) => return Ok((id, path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&path, error)),
            }
        }
        Err(failed(&self.dir, std::io::Error::other("no free name")))
    }

    /// Writes a file of a run folder (or another that only this process writes) at once.
    pub fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), Problem> {
        self.disk.write(path, &path.with_extension("tmp"), bytes)
    }
}

fn other_version(dir: &Path, found: u32) -> Problem {
    let problem = |code, age| {
        Problem::new(code, format!("the cache `{}` has format {found}, this pipe has format {VERSION}", dir.display()))
            .exit(Exit::Missing)
            .note(format!("it was made by {age} pipe; nothing in it was touched"))
    };
    if found > VERSION {
        problem("store::newer", "a newer").help("use that pipe, or choose another folder with `--cache DIR`")
    } else {
        problem("store::version", "an older").help("choose another folder with `--cache DIR`, or delete this one")
    }
}

/// A folder without `version` becomes a cache only if nothing of somebody else's lies in it.
fn refuse_foreign(dir: &Path) -> Result<(), Problem> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(disk::problem("read", dir, &error).exit(Exit::Missing)),
    };
    let ours = ["README.md", "locks", "blobs", "stages", "work", "runs", "results", "journal", "lost+found"];
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && !ours.contains(&name.as_str()) {
            return Err(Problem::new(
                "store::not_a_cache",
                format!("`{}` is not a cache of pipe: it holds `{name}`", dir.display()),
            )
            .exit(Exit::Missing)
            .help("choose an empty folder, or one that is not there yet, with `--cache DIR`"));
        }
    }
    Ok(())
}

/// `35,192,832`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
