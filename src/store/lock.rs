//! Locks between processes, kept by the kernel: they vanish with the process that held them, so
//! there is nothing to unlock by hand, ever.
//!
//! A lock is a file below `locks/` on which an exclusive `flock` is held; its text says by whom,
//! for the one who waits. The file is removed on release; whoever got the lock of a removed file
//! notices and asks again.

use super::disk;
use super::record::utc;
use crate::problem::Problem;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Who holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// 0 if it has not said yet.
    pub pid: u32,
    /// The name of its machine.
    pub host: String,
    /// UTC, RFC 3339.
    pub since: String,
    /// What it does: the label of a cell.
    pub what: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.pid == 0 {
            return f.write_str("another pipe");
        }
        write!(f, "pid {} on {}, since {}", self.pid, self.host, self.since)
    }
}

/// Released, and its file removed, on drop.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

pub(crate) enum Attempt {
    Got(Lock),
    Held(Holder),
}

impl Lock {
    /// Does not wait.
    pub fn attempt(path: &Path, what: &str) -> Result<Attempt, Problem> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::Unsupported => {
                Problem::new("store::no_locks", format!("the file system of `{}` cannot lock files", path.display()))
                    .help("choose a folder on a local disk with `--cache DIR`")
            }
            _ => disk::problem("lock", path, &error),
        };
        loop {
            let mut file =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Attempt::Held(holder(path))),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // Removed by its holder between our open and our lock: the name is another file now.
            let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|m| (m.dev(), m.ino())).ok();
            if inode(file.metadata()) != inode(fs::metadata(path)) {
                continue;
            }
            let text = format!("{}\t{}\t{}\t{what}\n", std::process::id(), host(), utc(SystemTime::now()));
            // For people only: a full disk must not keep anyone from locking.
            let _ = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
            return Ok(Attempt::Got(Lock { file, path: path.to_path_buf() }));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while still held: nobody else can hold this file.
        let _ = fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

/// The locks of stages below a folder, as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locks {
    /// Held by a run that is on.
    pub held: Vec<Holder>,
    /// Files that a killed run left; nobody holds them, and they stand in nobody's way.
    pub left: usize,
}

/// Looks at each lock without taking any away. `shared`: names that are no lock of a stage.
pub(crate) fn look(folder: &Path, shared: &[&str]) -> Locks {
    let mut locks = Locks::default();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        if path.file_name().is_none_or(|name| shared.iter().any(|shared| name == *shared)) {
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        match file.try_lock_shared() {
            // Given up again when the file is closed.
            Ok(()) => locks.left += 1,
            Err(_) => locks.held.push(holder(&path)),
        }
    }
    locks.held.sort_by(|a, b| a.what.cmp(&b.what));
    locks
}

fn holder(path: &Path) -> Holder {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut fields = text.trim_end().split('\t');
    let mut next = || fields.next().unwrap_or_default().to_string();
    Holder { pid: next().parse().unwrap_or(0), host: next(), since: next(), what: next() }
}

pub(crate) fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown".into() } else { name.trim().into() }
}
