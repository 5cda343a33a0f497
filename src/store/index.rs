//! One small file from which a run with nothing to do learns that nothing is to do.
//!
//! The records are the truth; the index repeats what staleness needs of them: fingerprint, cell,
//! files. It is appended to, line by line, each with a check. A line that was lost costs a look at
//! the record; a bent line or a lost file, reading all records once.

use super::record::{Artifact, Record};
use crate::digest::Digest;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const HEADER: &str = "pipe index 1";

/// A line, past its check. One letter a name: there are as many lines as stages.
#[derive(Serialize, Deserialize)]
struct IndexLine<'a> {
    /// Fingerprint.
    f: Cow<'a, str>,
    /// Cell.
    #[serde(borrow)]
    c: Cow<'a, str>,
    /// Kind.
    #[serde(borrow)]
    k: Cow<'a, str>,
    /// The artifact's files; absent in a line that only says the cell came to this fingerprint again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    a: Option<Vec<FileLine<'a>>>,
}

/// Name, size, digest.
#[derive(Serialize, Deserialize)]
struct FileLine<'a>(Cow<'a, str>, u64, Cow<'a, str>);

#[derive(Default)]
pub(crate) struct Index {
    made: HashMap<Digest, Artifact>,
    /// Cell to the fingerprint it was last found at or made with, and its kind.
    last: HashMap<String, (Digest, String)>,
    /// Kind to fingerprints, oldest first.
    kinds: HashMap<String, Vec<Digest>>,
    /// Lines to append.
    pub unsaved: String,
    /// The file is to be written anew.
    pub rebuild: bool,
}

impl Index {
    /// From the file; from the records (`stages/`) if the file is absent or not whole.
    pub fn load(path: &Path, stages: &Path) -> Index {
        let text = fs::read_to_string(path).unwrap_or_default();
        if let Some(index) = Index::parse(&text) {
            return index;
        }
        let mut index = Index::from_records(stages);
        index.rebuild = path.exists() || !index.made.is_empty();
        index
    }

    fn parse(text: &str) -> Option<Index> {
        let mut lines = text.lines();
        if lines.next()? != HEADER {
            return None;
        }
        let mut index = Index::default();
        for line in lines {
            let (check, json) = line.split_once(' ')?;
            if check != check_of(json) {
                return None;
            }
            let line: IndexLine = serde_json::from_str(json).ok()?;
            let fingerprint = line.f.parse().ok()?;
            let files = match line.a {
                Some(files) => Some(
                    files
                        .into_iter()
                        .map(|FileLine(name, size, digest)| {
                            Some(super::record::Entry { name: name.into_owned(), size, digest: digest.parse().ok()? })
                        })
                        .collect::<Option<Vec<_>>>()?,
                ),
                None => None,
            };
            index.remember(fingerprint, line.c.into_owned(), line.k.into_owned(), files.map(Artifact::new));
        }
        Some(index)
    }

    fn from_records(stages: &Path) -> Index {
        let mut records: Vec<Record> = record_files(stages)
            .iter()
            .filter_map(|(path, first)| {
                let record = Record::from_bytes(&fs::read(path).ok()?).ok()?;
                first.then_some(record)
            })
            .collect();
        records.sort_by(|a, b| (&a.measured.ended, &a.cell).cmp(&(&b.measured.ended, &b.cell)));
        let mut index = Index::default();
        for record in records {
            index.remember(record.fingerprint, record.cell, record.kind, Some(record.artifact));
        }
        index
    }

    fn remember(&mut self, fingerprint: Digest, cell: String, kind: String, artifact: Option<Artifact>) {
        if let Some(artifact) = artifact
            && self.made.insert(fingerprint, artifact).is_none()
        {
            self.kinds.entry(kind.clone()).or_default().push(fingerprint);
        }
        if !cell.is_empty() {
            self.last.insert(cell, (fingerprint, kind));
        }
    }

    /// Adds the records on disk that are not known yet.
    pub fn absorb(&mut self, stages: &Path) {
        let found = Index::from_records(stages);
        for (kind, all) in &found.kinds {
            for fingerprint in all {
                if self.made.contains_key(fingerprint) {
                    continue;
                }
                self.made.insert(*fingerprint, found.made[fingerprint].clone());
                self.kinds.entry(kind.clone()).or_default().push(*fingerprint);
            }
        }
        for (cell, last) in found.last {
            self.last.entry(cell).or_insert(last);
        }
    }

    /// A stage was finished, or a record was found that the index did not know.
    pub fn add(&mut self, fingerprint: Digest, cell: &str, kind: &str, artifact: &Artifact) {
        self.unsaved.push_str(&line(&fingerprint, cell, kind, Some(artifact)));
        self.remember(fingerprint, cell.into(), kind.into(), Some(artifact.clone()));
    }

    /// A cell was found fresh at a fingerprint it did not have before (a revert, a renamed stage).
    pub fn touch(&mut self, fingerprint: Digest, cell: &str, kind: &str) {
        if self.last.get(cell).is_some_and(|(last, _)| *last == fingerprint) {
            return;
        }
        self.unsaved.push_str(&line(&fingerprint, cell, kind, None));
        self.remember(fingerprint, cell.into(), kind.into(), None);
    }

    pub fn get(&self, fingerprint: &Digest) -> Option<&Artifact> {
        self.made.get(fingerprint)
    }

    pub fn forget(&mut self, fingerprint: &Digest) {
        self.made.remove(fingerprint);
        self.last.retain(|_, (last, _)| last != fingerprint);
        self.kinds.values_mut().for_each(|all| all.retain(|one| one != fingerprint));
        self.rebuild = true;
    }

    pub fn last(&self, cell: &str, kind: &str) -> Option<Digest> {
        self.last.get(cell).filter(|(_, last_kind)| last_kind == kind).map(|(fingerprint, _)| *fingerprint)
    }

    /// The newest `count` of the kind.
    pub fn of_kind(&self, kind: &str, count: usize) -> &[Digest] {
        let all = self.kinds.get(kind).map_or(&[][..], Vec::as_slice);
        &all[all.len().saturating_sub(count)..]
    }

    /// The whole file, oldest first for each kind; then the cells' last fingerprints.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER}\n");
        let cells: HashMap<Digest, &str> = self.last.iter().map(|(cell, (last, _))| (*last, cell.as_str())).collect();
        for (kind, all) in &self.kinds {
            for fingerprint in all {
                let cell = cells.get(fingerprint).copied().unwrap_or_default();
                text.push_str(&line(fingerprint, cell, kind, self.made.get(fingerprint)));
            }
        }
        for (cell, (last, kind)) in &self.last {
            text.push_str(&line(last, cell, kind, None));
        }
        text
    }

    pub fn header() -> String {
        format!("{HEADER}\n")
    }
}

fn line(fingerprint: &Digest, cell: &str, kind: &str, artifact: Option<&Artifact>) -> String {
    let files = artifact.map(|artifact| {
        let entry = |e: &super::record::Entry| FileLine(e.name.clone().into(), e.size, e.digest.to_string().into());
        artifact.entries.iter().map(entry).collect()
    });
    let line = IndexLine { f: fingerprint.to_string().into(), c: cell.into(), k: kind.into(), a: files };
    // Strings and numbers always serialise; were it otherwise, the line would not fit and be rebuilt.
    let json = serde_json::to_string(&line).unwrap_or_default();
    format!("{} {json}\n", check_of(&json))
}

fn check_of(json: &str) -> String {
    Digest::of(json.as_bytes()).short()
}

/// All record files below `stages/`, and whether each is the first of its fingerprint.
pub(super) fn record_files(stages: &Path) -> Vec<(PathBuf, bool)> {
    let mut files = Vec::new();
    for shard in fs::read_dir(stages).into_iter().flatten().flatten() {
        for file in fs::read_dir(shard.path()).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if let Some(stem) = name.strip_suffix(".json") {
                files.push((file.path(), !stem.contains('.')));
            }
        }
    }
    files.sort();
    files
}
