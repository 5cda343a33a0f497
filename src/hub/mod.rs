//! Sources on the Hugging Face hub: `hf:OWNER/NAME` to a folder of files at a known commit.
//!
//! Files live in the hub's own cache folder, in the layout its Python library reads and writes
//! (`models--OWNER--NAME/{refs,blobs,snapshots}`), so what either has downloaded the other finds. A
//! revision that is in the cache with all its files is served from there without any request: a branch
//! that moved on the hub moves here when its ref is removed from the cache, not behind a study's back.
//!
//! Only what is read is fetched: of a model its configuration, tokenizer and safetensors, of a dataset
//! its Parquet and JSON files. A download that breaks off continues where it stopped; large files are
//! checked against the SHA-256 the hub gives; a file has its name only once it is whole.
//!
//! Beside the layout of the Python library there is one folder more, `.listing/`: the names of all
//! files of a commit, by which a snapshot is known to be complete.
//!
//! The token goes to the endpoint's own host over the endpoint's own scheme, never along a redirect
//! to another one, and is in no message.

mod cache;
mod http;
mod source;

pub use source::{RepoKind, Source};

use crate::files::Files;
use crate::problem::{Exit, Problem};
use cache::Repo;
use http::{Client, Failure};
use source::safe;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Where the hub is and what may be done there. Built from the variables its own tools read.
#[derive(Clone)]
pub struct Settings {
    /// `HF_ENDPOINT`, without a slash at the end.
    pub endpoint: String,
    /// `HF_HUB_CACHE`, or `hub` below `HF_HOME`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE`: no request is made.
    pub offline: bool,
    /// Tries of one request that brings nothing new before it is given up.
    pub tries: u32,
    /// Wait before the second try; doubled each time, at most a minute.
    pub first_wait: Duration,
    token: Option<String>,
}

impl Settings {
    /// From the process's environment.
    pub fn from_env() -> Result<Settings, Problem> {
        Settings::from_vars(&|name| std::env::var(name).ok())
    }

    /// From variables looked up by name. `HF_TOKEN` is preferred to the file that `hf auth login` writes.
    pub fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Result<Settings, Problem> {
        let filled = |name: &str| var(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let yes = |name: &str| {
            filled(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let below = |name: &str, rest: &[&str]| {
            filled(name).map(|root| rest.iter().fold(PathBuf::from(root), |path, part| path.join(part)))
        };
        let home = below("HF_HOME", &[])
            .or_else(|| below("XDG_CACHE_HOME", &["huggingface"]))
            .or_else(|| below("HOME", &[".cache", "huggingface"]))
            .ok_or_else(|| {
                Problem::new("hub::cache", "there is no folder to keep downloads in: neither HF_HOME nor HOME is set")
                    .exit(Exit::Missing)
                    .help("set HF_HOME to a folder with room for the models")
            })?;
        let cache = below("HF_HUB_CACHE", &[])
            .or_else(|| below("HUGGINGFACE_HUB_CACHE", &[]))
            .unwrap_or_else(|| home.join("hub"));
        let token_file = below("HF_TOKEN_PATH", &[]).unwrap_or_else(|| home.join("token"));
        let token = filled("HF_TOKEN")
            .or_else(|| filled("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_file).ok().map(|text| text.trim().to_string()))
            .filter(|token| !token.is_empty());
        let endpoint = filled("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Problem::new(
                "hub::endpoint",
                "HF_ENDPOINT is not an address that begins with https:// or http://",
            )
            .exit(Exit::Usage));
        }
        Ok(Settings {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache,
            offline: yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE"),
            tries: 5,
            first_wait: Duration::from_secs(1),
            token,
        })
    }
}

impl Settings {
    /// Whether there is a token; what it is stays here.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }
}

/// A source in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// 40 hex digits.
    pub commit: String,
    /// The folder or file the source names.
    pub path: PathBuf,
    /// The files that belong to the source, by their names below `path` (a single file by its own name).
    pub files: Files,
}

/// How far a download is.
pub struct Step<'a> {
    /// The file that is fetched now: its path in the repository.
    pub file: &'a str,
    /// Bytes of all files of the source.
    pub done: u64,
    /// Zero where the hub does not say.
    pub total: u64,
}

/// The hub behind one endpoint and its cache.
pub struct Hub {
    settings: Settings,
    client: Client,
}

impl Hub {
    /// Makes no request.
    pub fn new(settings: Settings) -> Hub {
        let client = Client::new(&settings.endpoint, settings.token.clone(), settings.tries, settings.first_wait);
        Hub { settings, client }
    }

    /// The source as it is in the cache, if all of it is there. Makes no request.
    pub fn cached(&self, source: &Source) -> Option<Snapshot> {
        let repo = Repo::new(&self.settings.cache, source);
        let commit = repo.commit_of(&source.revision)?;
        match repo.listing(&commit) {
            Some(names) => {
                let wanted: Vec<String> = names.into_iter().filter(|name| source.wants(name)).collect();
                let whole = !wanted.is_empty() && wanted.iter().all(|name| repo.has(&commit, name));
                whole.then(|| snapshot(&repo, source, commit, wanted))
            }
            // Another tool's download: a model shows by itself whether it is whole, a dataset does not.
            None => {
                let there = wanted_there(&repo, source, &commit);
                let whole = match (&source.file, source.kind) {
                    (Some(_), _) => !there.is_empty(),
                    (None, RepoKind::Model) => missing_of_model(&repo, source, &commit, &there).is_empty(),
                    (None, RepoKind::Dataset) => self.settings.offline && !there.is_empty(),
                };
                whole.then(|| snapshot(&repo, source, commit, there))
            }
        }
    }

    /// The source in the cache, downloaded first if it is not there. `step` is called as bytes arrive;
    /// `stop` ends the download between two reads, keeping what has come.
    pub fn fetch(&self, source: &Source, step: &mut dyn FnMut(Step), stop: &AtomicBool) -> Result<Snapshot, Problem> {
        if let Some(snapshot) = self.cached(source) {
            return Ok(snapshot);
        }
        let repo = Repo::new(&self.settings.cache, source);
        if self.settings.offline {
            return Err(self.missing(source, &repo));
        }
        let listing = self.client.listing(source, stop).map_err(|failure| self.explain(source, None, failure))?;
        for file in &listing.files {
            if !safe(&file.name) {
                return Err(Problem::new(
                    "hub::answer",
                    format!("the hub lists a file with an unusable name in {source}"),
                )
                .exit(Exit::Missing));
            }
        }
        let wanted: Vec<&http::Listed> = listing.files.iter().filter(|file| source.wants(&file.name)).collect();
        let names: Vec<String> = wanted.iter().map(|file| file.name.clone()).collect();
        self.check_kind(source, &names)?;
        repo.write_listing(&listing.commit, listing.files.iter().map(|file| file.name.as_str()))?;

        let total = wanted.iter().filter_map(|file| file.size).sum();
        let mut before = 0;
        for file in wanted {
            let mut report = |bytes: u64| step(Step { file: &file.name, done: before + bytes, total });
            if !repo.has(&listing.commit, &file.name) {
                self.client
                    .download(source, &listing.commit, file, &repo, &mut report, stop)
                    .map_err(|failure| self.explain(source, Some(&file.name), failure))?;
            }
            before += file.size.unwrap_or(0);
        }
        if source.revision != listing.commit {
            repo.write_ref(&source.revision, &listing.commit)?;
        }
        Ok(snapshot(&repo, source, listing.commit, names))
    }

    /// `Err` if the repository has nothing this kind of source is read from.
    fn check_kind(&self, source: &Source, names: &[String]) -> Result<(), Problem> {
        let lacking = match (&source.file, source.kind) {
            (Some(file), _) if names.is_empty() => format!("no file `{file}`"),
            (None, RepoKind::Dataset) if names.is_empty() => "no Parquet or JSON file".into(),
            (None, RepoKind::Model) if !names.iter().any(|name| name.ends_with(".safetensors")) => {
                "no safetensors file".into()
            }
            (None, RepoKind::Model) if !names.iter().any(|name| name.ends_with("config.json")) => {
                "no config.json".into()
            }
            _ => return Ok(()),
        };
        Err(Problem::new("hub::nothing_there", format!("{source} has {lacking}"))
            .exit(Exit::Missing)
            .help("name another repository, folder or file; older formats are not read"))
    }

    /// What is not in the cache, when nothing may be fetched.
    fn missing(&self, source: &Source, repo: &Repo) -> Problem {
        let lacking = match repo.commit_of(&source.revision) {
            None => "nothing of this revision".into(),
            Some(commit) => {
                let there = wanted_there(repo, source, &commit);
                let names = match repo.listing(&commit) {
                    Some(names) => {
                        names.into_iter().filter(|name| source.wants(name) && !repo.has(&commit, name)).collect()
                    }
                    None if source.kind == RepoKind::Model => missing_of_model(repo, source, &commit, &there),
                    None => vec!["any data file".into()],
                };
                format!("commit {commit} without {}", names.join(", "))
            }
        };
        Problem::new(
            "hub::offline",
            format!("{source} is not in the cache, and no request may be made (HF_HUB_OFFLINE)"),
        )
        .exit(Exit::Missing)
        .note(format!("the cache at `{}` has {lacking}", repo.root().display()))
        .help(format!("where there is a network, type `{}`", source.by_hand()))
        .help("or run once without HF_HUB_OFFLINE and --offline, or give a folder with `path:`")
    }

    fn explain(&self, source: &Source, file: Option<&str>, failure: Failure) -> Problem {
        let what = file.map_or(format!("{source}"), |file| format!("`{file}` of {source}"));
        let problem = |code, message: String| Problem::new(code, message).exit(Exit::Missing);
        let page = format!("{}/{}", self.settings.endpoint, http::place(source));
        match failure {
            Failure::Problem(problem) => *problem,
            Failure::Gated => problem("hub::gated", format!("{source} is gated: its owner decides who may read it"))
                .help(format!("accept its terms at {page}, then set HF_TOKEN to a token of that account")),
            Failure::NoRepo => {
                let token = if self.settings.token.is_some() { "the token given" } else { "a visitor without a token" };
                problem("hub::no_repository", format!("the hub has no {source} that {token} may read"))
                    .help(format!("look at {page}; for private repositories set HF_TOKEN"))
            }
            Failure::NoRevision => {
                problem("hub::no_revision", format!("{} has no revision `{}`", source.repo, source.revision))
                    .help(format!("its branches and tags are listed at {page}/tree/main"))
            }
            Failure::NoEntry => problem("hub::no_file", format!("the hub lists {what} but does not have it")),
            Failure::Status(status) => problem("hub::refused", format!("the hub answered {status} for {what}")),
            Failure::Answer(error) => {
                problem("hub::answer", format!("the answer of {} is not one of a hub: {error}", self.settings.endpoint))
                    .help("HF_ENDPOINT names the hub; unset it for https://huggingface.co")
            }
            Failure::Corrupt => {
                problem("hub::corrupt", format!("{what} came with other bytes than its SHA-256, twice"))
                    .help("something between here and the hub changes files; try another network or HF_ENDPOINT")
            }
            Failure::Unreachable(error) => problem(
                "hub::unreachable",
                format!("{what} cannot be fetched from {}: {error}", self.settings.endpoint),
            )
            .note("what has come so far is kept and continued from")
            .help(format!(
                "run again when the network is there, or type `{}` elsewhere and copy the cache",
                source.by_hand()
            )),
            Failure::Stopped => Problem::new("hub::interrupted", format!("the download of {what} was interrupted"))
                .exit(Exit::Interrupted)
                .note("what has come so far is kept and continued from"),
        }
    }
}

/// The files of a snapshot that belong to the source.
fn wanted_there(repo: &Repo, source: &Source, commit: &str) -> Vec<String> {
    repo.names(commit).into_iter().filter(|name| source.wants(name) && repo.has(commit, name)).collect()
}

/// What a model folder lacks by its own account: configuration, weights, or shards its index names.
fn missing_of_model(repo: &Repo, source: &Source, commit: &str, there: &[String]) -> Vec<String> {
    let named =
        |name: &str| if source.folder.is_empty() { name.to_string() } else { format!("{}/{name}", source.folder) };
    let has = |name: &str| there.contains(&named(name));
    let mut missing = Vec::new();
    if has("adapter_config.json") {
        if !has("adapter_model.safetensors") {
            missing.push(named("adapter_model.safetensors"));
        }
        return missing;
    }
    for name in ["config.json", "tokenizer.json"] {
        if !has(name) {
            missing.push(named(name));
        }
    }
    let index = repo.path(commit, &named("model.safetensors.index.json"));
    match std::fs::read(index).ok().and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok()) {
        Some(index) => {
            let shards = index["weight_map"].as_object().into_iter().flat_map(|map| map.values());
            let shards: std::collections::BTreeSet<&str> = shards.filter_map(serde_json::Value::as_str).collect();
            missing.extend(shards.into_iter().filter(|shard| !has(shard)).map(named));
        }
        None if !has("model.safetensors") => missing.push(named("model.safetensors")),
        None => {}
    }
    missing
}

fn snapshot(repo: &Repo, source: &Source, commit: String, names: Vec<String>) -> Snapshot {
    let inside = |name: &str| match &source.file {
        Some(file) => file.rsplit('/').next().unwrap_or(file).to_string(),
        None => name.strip_prefix(&source.folder).unwrap_or(name).trim_start_matches('/').to_string(),
    };
    let mut files = Files::default();
    for name in &names {
        files.insert(inside(name), repo.path(&commit, name));
    }
    let path = repo.path(&commit, source.file.as_deref().unwrap_or(&source.folder));
    Snapshot { commit, path, files }
}
