//! From the arguments to an engine: manifest, plan, store, sources.

use super::global::{Global, Stop};
use super::session::{self, Session};
use super::sources::{Network, Schemes};
use pipe::exec::Engine;
use pipe::store::Store;
use std::path::Path;

/// Loads everything a command about a manifest and its cache needs, and hands it to `then`.
///
/// Only `run` gives a `network` that fetches.
pub fn with_engine<T>(
    global: &Global,
    manifest: &Path,
    network: Network,
    then: impl FnOnce(&Engine, &Session) -> Result<T, Stop>,
) -> Result<T, Stop> {
    let session = session::load(global, manifest)?;
    let store = Store::open(&global.cache)?;
    let sources = Schemes::new(&store, network);
    let engine = Engine { plan: &session.plan, store: &store, sources: &sources, machine: global.machine() };
    match then(&engine, &session) {
        // Problems after loading may be about places in the manifest too.
        Err(Stop::Problems(problems, texts)) if texts.is_empty() => {
            Err(Stop::Problems(problems, session.manifest.files))
        }
        end => end,
    }
}
