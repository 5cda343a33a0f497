//! The cache folder on disk, as `huggingface_hub` lays it out.
//!
//! ```text
//! models--OWNER--NAME/refs/main               the commit a revision stands for
//! models--OWNER--NAME/blobs/ETAG              bytes, named by SHA-256 (large files) or git's id
//! models--OWNER--NAME/snapshots/COMMIT/NAME   relative links to blobs
//! models--OWNER--NAME/.listing/COMMIT         ours: all names of the commit, a line each
//! .locks/models--OWNER--NAME/ETAG.lock        held while a blob is written
//! ```

use super::source::{RepoKind, Source};
use crate::files::Files;
use crate::problem::Problem;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// One repository's folder.
pub(super) struct Repo {
    root: PathBuf,
    locks: PathBuf,
}

impl Repo {
    pub(super) fn new(cache: &Path, source: &Source) -> Repo {
        let kind = if source.kind == RepoKind::Dataset { "datasets" } else { "models" };
        let name = format!("{kind}--{}", source.repo.replace('/', "--"));
        Repo { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The commit that a revision stands for here: itself, or what its ref says.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let text = std::fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    pub(super) fn path(&self, commit: &str, name: &str) -> PathBuf {
        let folder = self.root.join("snapshots").join(commit);
        if name.is_empty() { folder } else { folder.join(name) }
    }

    /// Whether the snapshot has the file and its bytes are there.
    pub(super) fn has(&self, commit: &str, name: &str) -> bool {
        std::fs::metadata(self.path(commit, name)).is_ok_and(|data| data.is_file())
    }

    /// Every file of a snapshot, whoever put it there. Links that lead nowhere make the list empty.
    pub(super) fn names(&self, commit: &str) -> Vec<String> {
        let files = Files::from_dir(&self.path(commit, "")).unwrap_or_default();
        files.iter().map(|(name, _)| name.to_string()).collect()
    }

    /// All names of a commit, where a listing was kept.
    pub(super) fn listing(&self, commit: &str) -> Option<Vec<String>> {
        let text = std::fs::read_to_string(self.root.join(".listing").join(commit)).ok()?;
        Some(text.lines().map(String::from).collect())
    }

    pub(super) fn write_listing<'n>(&self, commit: &str, names: impl Iterator<Item = &'n str>) -> Result<(), Problem> {
        let text: String = names.map(|name| format!("{name}\n")).collect();
        put(&self.root.join(".listing").join(commit), text.as_bytes())
    }

    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), Problem> {
        put(&self.root.join("refs").join(revision), commit.as_bytes())
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Bytes that have come so far.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The file whose lock guards a blob; `huggingface_hub` locks the same one.
    pub(super) fn lock_file(&self, etag: &str) -> Result<File, Problem> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_folder(&path)?;
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| Problem::io("hub::cache", "open", &path, &error))
    }

    /// Gives a finished download its name, durably.
    pub(super) fn publish(&self, etag: &str) -> Result<(), Problem> {
        let (from, to) = (self.incomplete(etag), self.blob(etag));
        let rename = || -> io::Result<()> {
            File::open(&from)?.sync_all()?;
            std::fs::rename(&from, &to)?;
            sync_folder(&to)
        };
        rename().map_err(|error| Problem::io("hub::cache", "write", &to, &error))
    }

    /// Makes the blob visible in a snapshot by a relative link, replacing one that leads nowhere.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<(), Problem> {
        let path = self.path(commit, name);
        make_folder(&path)?;
        let up = "../".repeat(name.matches('/').count() + 2);
        let temporary = path.with_file_name(format!(
            ".{}.{}.tmp",
            path.file_name().unwrap_or_default().to_string_lossy(),
            std::process::id()
        ));
        let place = || -> io::Result<()> {
            let _ = std::fs::remove_file(&temporary);
            // File systems without symbolic links get a hard link.
            std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &temporary)
                .or_else(|_| std::fs::hard_link(self.blob(etag), &temporary))?;
            std::fs::rename(&temporary, &path)?;
            sync_folder(&path)
        };
        place().map_err(|error| Problem::io("hub::cache", "link", &path, &error))
    }
}

/// 40 hex digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

pub(super) fn make_folder(path: &Path) -> Result<(), Problem> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).map_err(|error| Problem::io("hub::cache", "create", folder, &error))
}

/// Writes a small file in one piece.
fn put(path: &Path, bytes: &[u8]) -> Result<(), Problem> {
    make_folder(path)?;
    let folder = path.parent().unwrap_or(path);
    let write = || -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        sync_folder(path)
    };
    write().map_err(|error| Problem::io("hub::cache", "write", path, &error))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
