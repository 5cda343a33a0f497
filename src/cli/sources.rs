//! What `path:`, `hf:` and `init:` come to, for the engine.

use super::live::Live;
use pipe::digest::{Digest, Encoder};
use pipe::exec::{Paths, Resolved, Sources};
use pipe::files::Files;
use pipe::hub::{Hub, RepoKind, Settings, Snapshot, Source as HubSource};
use pipe::manifest::spec::ArtifactType;
use pipe::plan::{Cell, Source};
use pipe::problem::{Exit, Problem};
use pipe::stage::bundled;
use pipe::store::Store;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Whether what lacks may be fetched.
pub enum Network {
    /// Looking only: what is not here is said to be missing.
    Never,
    /// Downloads are shown and can be stopped. `offline`: as `HF_HUB_OFFLINE` says.
    Fetch { live: Arc<Live>, stop: &'static AtomicBool, offline: bool },
}

/// The schemes this program can read.
pub struct Schemes<'a> {
    store: &'a Store,
    paths: Paths<'a>,
    network: Network,
    hub: OnceLock<Result<Hub, Problem>>,
    /// By text and kind: the same repository is often the source of many cells.
    known: Mutex<HashMap<(String, bool), Result<Resolved, Problem>>>,
    /// The files of a snapshot, by its folder.
    snapshots: Mutex<HashMap<PathBuf, Files>>,
}

impl<'a> Schemes<'a> {
    pub fn new(store: &'a Store, network: Network) -> Schemes<'a> {
        Schemes {
            store,
            paths: Paths::new(store),
            network,
            hub: OnceLock::new(),
            known: Mutex::default(),
            snapshots: Mutex::default(),
        }
    }

    fn hub(&self) -> Result<&Hub, Problem> {
        let made = self.hub.get_or_init(|| {
            let mut settings = Settings::from_env()?;
            settings.offline |= matches!(self.network, Network::Fetch { offline: true, .. });
            Ok(Hub::new(settings))
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn fetched(&self, text: &str, model: bool) -> Result<Resolved, Problem> {
        let kind = if model { RepoKind::Model } else { RepoKind::Dataset };
        let source = HubSource::parse(text.trim_start_matches("hf:"), kind)?;
        let hub = self.hub()?;
        let snapshot = match &self.network {
            Network::Never => hub.cached(&source).ok_or_else(|| {
                Problem::new("hub::not_here", format!("`{text}` is not in the hub's cache"))
                    .help("`pipe run` downloads it")
                    .exit(Exit::Missing)
            })?,
            Network::Fetch { live, stop, .. } => match hub.cached(&source) {
                Some(snapshot) => snapshot,
                None => fetch(hub, &source, text, live, stop)?,
            },
        };
        let digest = self.digest(&snapshot.files)?;
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.insert(snapshot.path.clone(), snapshot.files);
        Ok(Resolved { path: snapshot.path, digest, identity: format!("{source} at {}", snapshot.commit) })
    }

    /// Over the files that belong to the source, by name and content: not the commit, so that a
    /// commit that changes only a README changes nothing.
    fn digest(&self, files: &Files) -> Result<Digest, Problem> {
        let mut encoder = Encoder::new("pipe snapshot 1");
        for (name, path) in files.iter() {
            let (digest, _) = self.store.digest_source(path)?;
            encoder.field(name.as_bytes()).field(digest.as_bytes());
        }
        Ok(encoder.finish())
    }
}

fn fetch(hub: &Hub, source: &HubSource, text: &str, live: &Arc<Live>, stop: &AtomicBool) -> Result<Snapshot, Problem> {
    live.plain(&format!("{text}: downloading"));
    let running = live.stage(text);
    let mut begun = false;
    hub.fetch(
        source,
        &mut |step| {
            if !begun {
                running.begin(step.total >> 20, "MiB");
                begun = true;
            }
            running.at(step.done >> 20);
            running.note(step.file);
        },
        stop,
    )
}

impl Sources for Schemes<'_> {
    fn resolve(&self, cell: &Cell, source: &Source) -> Result<Resolved, Problem> {
        if source.text.starts_with("init:") {
            // Nothing outside. What is bundled may change with the program; `init:random` is all said by keys.
            let digest = bundled::digest(&source.text).unwrap_or_else(|| Digest::of(source.text.as_bytes()));
            return Ok(Resolved { path: PathBuf::new(), digest, identity: source.text.clone() });
        }
        if !source.text.starts_with("hf:") {
            return self.paths.resolve(cell, source);
        }
        let model = cell.kind.yields == ArtifactType::Model;
        let key = (source.text.clone(), model);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let resolved = match known {
            Some(resolved) => resolved,
            None => {
                let resolved = self.fetched(&source.text, model);
                self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(key, resolved.clone());
                resolved
            }
        };
        resolved.map_err(|problem| problem.at_span(&cell.file, cell.span.clone(), &source.key))
    }

    fn unchanged(&self, resolved: &Resolved) -> Result<bool, Problem> {
        if resolved.path.as_os_str().is_empty() {
            return Ok(true);
        }
        let files = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).get(&resolved.path).cloned();
        match files {
            Some(files) => Ok(self.digest(&files).is_ok_and(|now| now == resolved.digest)),
            None => self.paths.unchanged(resolved),
        }
    }
}
