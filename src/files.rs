//! A set of named files that need not lie in one folder: how artifacts, hub snapshots and plain
//! folders look alike to the code that reads models and data.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Names (relative, `/`-separated) to where the bytes are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    by_name: BTreeMap<String, PathBuf>,
}

impl Files {
    /// Every regular file below `dir`, links followed. `Err` if the folder cannot be read.
    pub fn from_dir(dir: &Path) -> io::Result<Files> {
        let mut files = Files::default();
        let mut open = vec![(dir.to_path_buf(), String::new())];
        while let Some((folder, prefix)) = open.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let entry = entry?;
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                let kind = std::fs::metadata(entry.path())?;
                if kind.is_dir() {
                    open.push((entry.path(), format!("{name}/")));
                } else {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(files)
    }

    /// Adds a file under a name, in place of one that had it. Nothing is read.
    pub fn insert(&mut self, name: impl Into<String>, path: impl Into<PathBuf>) {
        self.by_name.insert(name.into(), path.into());
    }

    /// Where the file of that name lies.
    pub fn get(&self, name: &str) -> Option<&Path> {
        self.by_name.get(name).map(PathBuf::as_path)
    }

    /// In name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.by_name.iter().map(|(name, path)| (name.as_str(), path.as_path()))
    }

    /// The files below folder `name`, their names relative to it.
    pub fn below(&self, name: &str) -> Files {
        let prefix = format!("{}/", name.trim_end_matches('/'));
        let by_name =
            self.by_name.iter().filter_map(|(n, p)| Some((n.strip_prefix(&prefix)?.to_string(), p.clone()))).collect();
        Files { by_name }
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is no file at all.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}
