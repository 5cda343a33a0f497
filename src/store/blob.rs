//! Folders of files to content-addressed blobs, `blobs/ab/<digest>`.

use super::disk::{self, Disk};
use super::record::{Artifact, Entry};
use crate::digest::Digest;
use crate::problem::Problem;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How deep folders may lie in one another; beyond, a link points back up.
const DEPTH_MAX: usize = 64;

/// The regular files below `folder` by relative name, in name order. Links to files are followed;
/// links to folders only if `folder_links`. `Err` for names that are not UTF-8, for dangling links,
/// and for what is neither file nor folder.
pub(crate) fn walk(folder: &Path, folder_links: bool) -> Result<Vec<(String, PathBuf)>, Problem> {
    let mut files = Vec::new();
    let mut open = vec![(folder.to_path_buf(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = open.pop() {
        let odd = |path: &Path, why: &str| {
            Err(Problem::new("store::odd_file", format!("`{}` {why}", path.display()))
                .help("remove it, or leave an ordinary file in its place"))
        };
        let entries = fs::read_dir(&folder).map_err(|error| Problem::io("store::io", "read", &folder, &error))?;
        for entry in entries {
            let entry = entry.map_err(|error| Problem::io("store::io", "read", &folder, &error))?;
            let path = entry.path();
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
                return odd(&path, "has a name that is not UTF-8");
            };
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            let kind = match fs::metadata(&path) {
                Ok(metadata) => metadata.file_type(),
                Err(_) if is_link => return odd(&path, "is a link to something that is not there"),
                Err(error) => return Err(Problem::io("store::io", "read", &path, &error)),
            };
            if kind.is_file() {
                files.push((name, path));
            } else if !kind.is_dir() {
                return odd(&path, "is neither a file nor a folder");
            } else if is_link && !folder_links {
                return odd(&path, "is a link to a folder");
            } else if depth == DEPTH_MAX {
                return odd(&path, "lies in too many folders (does a link point to a folder above it?)");
            } else {
                open.push((path, format!("{name}/"), depth + 1));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// `blobs/ab/<digest>` below the cache folder.
pub(crate) fn path(cache: &Path, digest: &Digest) -> PathBuf {
    sharded(&cache.join("blobs"), digest, "")
}

/// `<top>/ab/<digest><suffix>`.
pub(crate) fn sharded(top: &Path, digest: &Digest, suffix: &str) -> PathBuf {
    let hex = digest.to_string();
    let mut path = top.join(&hex[..2]);
    path.push(hex + suffix);
    path
}

/// Moves the files of `folder` into `blobs/` and makes them durable: when this returns, every byte
/// of the artifact is on disk under its digest. `scratch` is a folder of the caller's own beside
/// the blobs, used when a file cannot simply be moved.
pub(crate) fn take(disk: &Disk, cache: &Path, folder: &Path, scratch: &Path) -> Result<Artifact, Problem> {
    let mut entries = Vec::new();
    let mut shards = BTreeSet::new();
    for (name, file) in walk(folder, false)? {
        let metadata = fs::symlink_metadata(&file).map_err(|error| disk::problem("read", &file, &error))?;
        // A link, or a second name of a file that somebody else may write: only a copy is ours.
        let movable = metadata.is_file() && metadata.nlink() == 1;
        let mut ours = file;
        if !movable {
            ours = own_copy(disk, &ours, scratch, entries.len())?;
        }
        let (digest, size) = hash(&ours)?;
        let target = path(cache, &digest);
        let shard = target.parent().map(Path::to_path_buf).unwrap_or_default();
        disk.folder(&cache.join("blobs"), &shard)?;
        match disk.settle(&ours, &target) {
            // The work folder lies on another disk than the blobs (a link to a scratch disk).
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                let copy = own_copy(disk, &ours, scratch, entries.len())?;
                if hash(&copy)?.0 != digest {
                    return Err(Problem::new(
                        "store::copy",
                        format!("`{}` changed while it was copied", ours.display()),
                    ));
                }
                disk.settle(&copy, &target)
            }
            done => done,
        }
        .map_err(|error| disk::problem("write", &target, &error))?;
        shards.insert(shard);
        entries.push(Entry { name, size, digest });
    }
    for shard in &shards {
        disk.sync_folder(shard).map_err(|error| disk::problem("write", shard, &error))?;
    }
    Ok(Artifact::new(entries))
}

fn hash(file: &Path) -> Result<(Digest, u64), Problem> {
    let hash = || Digest::of_reader(&mut File::open(file)?);
    hash().map_err(|error| disk::problem("read", file, &error))
}

fn own_copy(disk: &Disk, file: &Path, scratch: &Path, number: usize) -> Result<PathBuf, Problem> {
    let copy = scratch.join(format!("copy-{number}"));
    let make = || {
        if !scratch.is_dir() {
            fs::create_dir_all(scratch)?;
        }
        disk.copy(file, &copy)
    };
    make().map_err(|error| disk::problem("copy", file, &error))?;
    Ok(copy)
}
