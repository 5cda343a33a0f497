//! Digests of unchanged files, remembered, so that a large file is read once and not once a run.
//!
//! A file is taken for unchanged when device, inode, size, mtime and ctime are what they were. That
//! alone can lie: a write in the same tick of the clock as the one before leaves no trace. So a
//! digest is remembered only if both times lay safely before the moment the reading began (the
//! "racy git" rule); what is too young is read again next time. A later write then carries a later ctime, which
//! no program can set back.

use super::disk::Disk;
use super::record::{Artifact, Entry};
use crate::digest::Digest;
use crate::problem::{Exit, Problem};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

const NANOS: i128 = 1_000_000_000;
/// The clock of ext4, XFS, btrfs and tmpfs ticks at least a hundred times a second.
const FINE_GRAIN: i128 = NANOS / 20;
/// FAT and some network file systems keep whole seconds, FAT every other one.
const COARSE_GRAIN: i128 = 5 * NANOS / 2;

/// What tells that a file was not written since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    mtime: i128,
    ctime: i128,
}

impl Signature {
    pub fn of(metadata: &Metadata) -> Signature {
        let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * NANOS + i128::from(nanos);
        Signature {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime: nanos(metadata.mtime(), metadata.mtime_nsec()),
            ctime: nanos(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a write after `moment` (nanoseconds since 1970) is sure to change this signature.
    fn settled_before(&self, moment: i128) -> bool {
        let coarse = self.mtime % NANOS == 0 && self.ctime % NANOS == 0;
        let grain = if coarse { COARSE_GRAIN } else { FINE_GRAIN };
        self.mtime.max(self.ctime) + grain <= moment
    }
}

#[derive(Default)]
struct Memory {
    loaded: bool,
    known: HashMap<Signature, Digest>,
    /// Lines not written yet.
    unsaved: String,
    lines: usize,
}

pub(crate) struct StatCache {
    path: PathBuf,
    memory: Mutex<Memory>,
}

impl StatCache {
    pub fn new(path: PathBuf) -> StatCache {
        StatCache { path, memory: Mutex::default() }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if !memory.loaded {
            memory.loaded = true;
            // An unreadable memory is no memory: everything is read again, nothing is wrong.
            for line in fs::read_to_string(&self.path).unwrap_or_default().lines() {
                memory.lines += 1;
                if let Some((signature, digest)) = parse(line) {
                    memory.known.insert(signature, digest);
                }
            }
        }
        memory
    }

    /// Digest and size of the file's bytes, from memory if they did not change.
    pub fn digest(&self, path: &Path) -> io::Result<(Digest, u64)> {
        for _ in 0..3 {
            let mut file = File::open(path)?;
            let before = Signature::of(&file.metadata()?);
            if let Some(digest) = self.memory().known.get(&before) {
                return Ok((*digest, before.size));
            }
            let began = now();
            // Not mapped into memory: a file that is cut short meanwhile would kill the process.
            let (digest, size) = Digest::of_reader(&mut file)?;
            let after = Signature::of(&fs::metadata(path)?);
            if before != after || size != before.size {
                continue;
            }
            if before.settled_before(began) {
                let mut memory = self.memory();
                memory.known.insert(before, digest);
                memory.unsaved.push_str(&line(&before, &digest));
            }
            return Ok((digest, size));
        }
        Err(io::Error::other("it keeps changing while it is read"))
    }

    /// Writes what was learned. The caller holds the lock of the index.
    pub fn save(&self, disk: &Disk) -> Result<(), Problem> {
        let mut memory = self.memory();
        if memory.unsaved.is_empty() {
            return Ok(());
        }
        let lines = std::mem::take(&mut memory.unsaved);
        memory.lines += lines.lines().count();
        if memory.lines > 2 * memory.known.len() + 1_000 {
            let all: String = memory.known.iter().map(|(signature, digest)| line(signature, digest)).collect();
            memory.lines = memory.known.len();
            return disk.write(&self.path, &self.path.with_extension("tmp"), all.as_bytes());
        }
        disk.append(&self.path, lines.as_bytes())
    }

    pub fn has_news(&self) -> bool {
        !self.memory.lock().unwrap_or_else(PoisonError::into_inner).unsaved.is_empty()
    }

    /// Digest of a file's bytes, or of a folder's sorted (name, size, digest) list; size in bytes.
    /// `Err` names what is not there, cannot be read, or is neither file nor folder.
    pub fn digest_source(&self, path: &Path) -> Result<(Digest, u64), Problem> {
        let metadata = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
        if metadata.is_file() {
            return self.digest(path).map_err(|error| unreadable(path, &error));
        }
        let mut entries = Vec::new();
        for (name, file) in super::blob::walk(path, true)? {
            let (digest, size) = self.digest(&file).map_err(|error| unreadable(&file, &error))?;
            entries.push(Entry { name, size, digest });
        }
        if entries.is_empty() {
            return Err(
                Problem::new("source::empty", format!("`{}` is an empty folder", path.display())).exit(Exit::Missing)
            );
        }
        let artifact = Artifact::new(entries);
        Ok((artifact.digest, artifact.size()))
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Problem {
    let problem = match error.kind() {
        io::ErrorKind::NotFound => Problem::new("source::not_found", format!("there is no `{}`", path.display())),
        _ => Problem::io("source::unreadable", "read", path, error),
    };
    problem.exit(Exit::Missing)
}

fn now() -> i128 {
    // A clock before 1970 remembers nothing, which is safe.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(i128::MIN, |since| since.as_nanos() as i128)
}

/// `device inode size mtime ctime digest check`: a torn or bent line does not fit its check.
fn line(signature: &Signature, digest: &Digest) -> String {
    let Signature { device, inode, size, mtime, ctime } = signature;
    let mut line = format!("{device} {inode} {size} {mtime} {ctime} {digest}");
    let check = Digest::of(line.as_bytes()).short();
    let _ = writeln!(line, " {check}");
    line
}

fn parse(line: &str) -> Option<(Signature, Digest)> {
    let (body, check) = line.rsplit_once(' ')?;
    if Digest::of(body.as_bytes()).short() != check {
        return None;
    }
    let mut fields = body.split(' ');
    let signature = Signature {
        device: fields.next()?.parse().ok()?,
        inode: fields.next()?.parse().ok()?,
        size: fields.next()?.parse().ok()?,
        mtime: fields.next()?.parse().ok()?,
        ctime: fields.next()?.parse().ok()?,
    };
    Some((signature, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mtime: i128, ctime: i128) -> Signature {
        Signature { device: 1, inode: 2, size: 3, mtime, ctime }
    }

    #[test]
    fn a_file_as_young_as_the_clocks_grain_is_not_believed() {
        let moment = 1_000 * NANOS + 7;
        assert!(at(moment - FINE_GRAIN, moment - FINE_GRAIN).settled_before(moment));
        assert!(!at(moment - FINE_GRAIN + 1, moment - FINE_GRAIN).settled_before(moment));
        assert!(!at(moment - NANOS, moment - 1).settled_before(moment), "an old mtime may have been set by hand");
        assert!(!at(moment + NANOS, moment - NANOS).settled_before(moment), "a time to come proves nothing");
        assert!(!at(998 * NANOS, 998 * NANOS).settled_before(moment), "whole seconds: a coarse clock");
        assert!(at(997 * NANOS, 997 * NANOS).settled_before(moment));
    }

    #[test]
    fn a_remembered_line_with_a_flipped_character_is_forgotten() {
        let text = line(&at(5, 6), &Digest::of(b"x"));
        assert_eq!(parse(text.trim_end()), Some((at(5, 6), Digest::of(b"x"))));
        let bent = text.replacen("2 3", "2 4", 1);
        assert!(bent != text);
        assert_eq!(parse(bent.trim_end()), None);
        assert_eq!(parse(&text[..text.len() / 2]), None);
    }
}
