//! Every write of the store goes through here, so that the one order that survives a kill at any
//! instant (write under a temporary name, fsync, rename, fsync the folder) is written down once.
//!
//! Each step is announced to a hook before it happens. Tests use it to kill the process or to fill
//! the disk at exactly that step; without one it costs a branch.

use crate::problem::{Exit, Problem};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

/// Called before each step with its name and the path it is about; an error is taken for the
/// system's answer.
pub type Hook = Arc<dyn Fn(&'static str, &Path) -> io::Result<()> + Send + Sync>;

/// The way to the disk.
#[derive(Default, Clone)]
pub struct Disk {
    hook: Option<Hook>,
}

impl Disk {
    /// A disk on which `hook` is called before every step, and may fail it.
    pub fn watched(hook: Hook) -> Disk {
        Disk { hook: Some(hook) }
    }

    fn step(&self, name: &'static str, path: &Path) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(name, path))
    }

    /// Creates `folder` below `top` (which exists) and makes its name durable.
    pub(crate) fn folder(&self, top: &Path, folder: &Path) -> Result<(), Problem> {
        if folder.is_dir() {
            return Ok(());
        }
        let make = || {
            self.step("create folder", folder)?;
            fs::create_dir_all(folder)?;
            self.sync_folder(top)
        };
        make().map_err(|error| problem("create", folder, &error))
    }

    /// Replaces `path` by `bytes` at once. `temporary` lies on the same file system and is the
    /// caller's alone; what an earlier, killed writer left there is overwritten.
    pub(crate) fn write(&self, path: &Path, temporary: &Path, bytes: &[u8]) -> Result<(), Problem> {
        let write = || {
            self.step("write", temporary)?;
            let mut file = File::create(temporary)?;
            file.write_all(bytes)?;
            self.step("sync file", temporary)?;
            file.sync_all()?;
            self.step("rename", path)?;
            fs::rename(temporary, path)?;
            self.sync_folder(path.parent().unwrap_or(path))
        };
        write().map_err(|error| problem("write", path, &error))
    }

    /// Appends whole lines. A torn last line of a killed writer is closed first, so that it spoils
    /// nothing but itself. The caller holds the lock that keeps other writers out.
    pub(crate) fn append(&self, path: &Path, lines: &[u8]) -> Result<(), Problem> {
        let append = || {
            self.step("append", path)?;
            let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
            let mut bytes = Vec::new();
            if file.metadata()?.len() > 0 && last_byte(&mut file)? != b'\n' {
                bytes.push(b'\n');
            }
            bytes.extend_from_slice(lines);
            file.write_all(&bytes)
        };
        append().map_err(|error| problem("write", path, &error))
    }

    /// Moves a finished file to its final name. Replaces what is there: the bytes in hand are known
    /// to be right, those in place might have rotted. The folder is synced by the caller, once.
    pub(crate) fn settle(&self, from: &Path, to: &Path) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.step("sync file", from)?;
        // Read-only before it becomes visible: a stage that opens an input for writing should fail.
        fs::set_permissions(from, fs::Permissions::from_mode(0o444))?;
        File::open(from)?.sync_all()?;
        self.step("rename", to)?;
        fs::rename(from, to)
    }

    pub(crate) fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("copy", to)?;
        match fs::remove_file(to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::copy(from, to).map(drop)
    }

    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("rename", to)?;
        fs::rename(from, to)
    }

    pub(crate) fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.step("sync folder", folder)?;
        File::open(folder)?.sync_all()
    }

    pub(crate) fn remove_folder(&self, folder: &Path) -> Result<(), Problem> {
        let remove = || {
            self.step("remove", folder)?;
            fs::remove_dir_all(folder)
        };
        match remove() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(problem("remove", folder, &error)),
            _ => Ok(()),
        }
    }
}

fn last_byte(file: &mut File) -> io::Result<u8> {
    use std::io::{Read, Seek, SeekFrom};
    let mut byte = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// What the system's refusal of an operation in the cache folder means to the user.
pub(crate) fn problem(doing: &str, path: &Path, error: &io::Error) -> Problem {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    match error.kind() {
        StorageFull | QuotaExceeded => {
            Problem::new("store::full", format!("no space left: cannot {doing} `{}`", path.display()))
                .note("what was finished before is kept, and so are the checkpoints of this stage")
                .help("free some space (`pipe gc` drops what nothing refers to), or choose another folder with `--cache DIR`, and run again")
        }
        PermissionDenied | ReadOnlyFilesystem => {
            Problem::new("store::read_only", format!("cannot {doing} `{}`: {error}", path.display()))
                .exit(Exit::Missing)
                .note("`plan`, `why` and `show` work on a cache that can only be read; `run` has to write")
                .help("give write permission, or choose another folder with `--cache DIR`")
        }
        _ => Problem::io("store::io", doing, path, error),
    }
}
