//! What `hf:` names.

use crate::problem::{Exit, Problem};
use std::fmt;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// Weights, a tokenizer, an adapter: `hf:OWNER/NAME` or `hf:models/OWNER/NAME`.
    Model,
    /// Records: `hf:datasets/OWNER/NAME`.
    Dataset,
}

/// What `hf:...` names: `[models/|datasets/]OWNER/NAME[@REVISION][/FOLDER][#FILE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Models and datasets have names of their own.
    pub kind: RepoKind,
    /// `OWNER/NAME`.
    pub repo: String,
    /// A branch, a tag or a commit; `main` unless given.
    pub revision: String,
    /// The folder inside, `/`-separated; empty for all.
    pub folder: String,
    /// One file, its path from the root of the repository.
    pub file: Option<String>,
}

impl Source {
    /// Parses what follows `hf:`. A repository without `models/` or `datasets/` is of kind `default`.
    pub fn parse(text: &str, default: RepoKind) -> Result<Source, Problem> {
        let wrong = |what: &str| {
            Problem::new("hub::source", format!("`hf:{text}` does not name a repository: {what}"))
                .exit(Exit::Usage)
                .help("write `hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION/FOLDER` or `hf:datasets/OWNER/NAME#FILE`")
        };
        let (path, file) = text.split_once('#').map_or((text, None), |(path, file)| (path, Some(file)));
        let (kind, path) = match path.split_once('/') {
            Some(("datasets", rest)) => (RepoKind::Dataset, rest),
            Some(("models", rest)) => (RepoKind::Model, rest),
            _ => (default, path),
        };
        let mut parts = path.split('/');
        let (Some(owner), Some(name)) = (parts.next(), parts.next()) else {
            return Err(wrong("it needs an owner and a name"));
        };
        if ["datasets", "models"].contains(&owner) {
            return Err(wrong(&format!("`{owner}` is no owner")));
        }
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        for part in [owner, name, revision] {
            if !plain(part) {
                return Err(wrong(&format!("`{part}` is not a name")));
            }
        }
        let folder: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
        let file = file.map(|file| folder.iter().copied().chain([file]).collect::<Vec<_>>().join("/"));
        if !folder.iter().all(|part| safe(part)) || !file.as_deref().is_none_or(safe) {
            return Err(wrong("paths inside it are relative and go down only"));
        }
        Ok(Source { kind, repo: format!("{owner}/{name}"), revision: revision.into(), folder: folder.join("/"), file })
    }

    /// Whether a file of the repository is part of the source.
    pub(super) fn wants(&self, name: &str) -> bool {
        if let Some(file) = &self.file {
            return name == file;
        }
        let Some(inside) = (if self.folder.is_empty() {
            Some(name)
        } else {
            name.strip_prefix(&self.folder).and_then(|rest| rest.strip_prefix('/'))
        }) else {
            return false;
        };
        match self.kind {
            RepoKind::Model => {
                MODEL_FILES.contains(&inside)
                    || (inside.ends_with(".safetensors")
                        && !inside.contains('/')
                        && !inside.starts_with("consolidated"))
            }
            RepoKind::Dataset => {
                [".parquet", ".jsonl", ".json"].iter().any(|end| inside.ends_with(end))
                    && !inside.ends_with("dataset_infos.json")
            }
        }
    }

    /// The command that fetches it with the hub's own tool.
    pub(super) fn by_hand(&self) -> String {
        let kind = if self.kind == RepoKind::Dataset { " --repo-type dataset" } else { "" };
        format!("hf download {}{kind} --revision {}", self.repo, self.revision)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.kind == RepoKind::Dataset { "datasets/" } else { "" };
        write!(f, "hf:{kind}{}@{}", self.repo, self.revision)?;
        match &self.file {
            Some(file) => write!(f, "#{file}"),
            None if self.folder.is_empty() => Ok(()),
            None => write!(f, "/{}", self.folder),
        }
    }
}

/// A name on the hub, of one part.
pub(super) fn plain(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !name.is_empty() && name.bytes().all(legal) && !name.starts_with('.')
}

/// A path that stays below the folder it is joined to.
pub(super) fn safe(path: &str) -> bool {
    !path.is_empty()
        && !path.contains(['\\', '\0'])
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Beside `*.safetensors`.
const MODEL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "adapter_config.json",
];
