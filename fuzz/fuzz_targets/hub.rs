//! What follows `hf:`, and a download cache that another tool has written to: ref, listing, index.
//!
//! Input: the text after `hf:`; the ref `main`; the listing of the commit (may be empty); the index of shards.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::hub::{Hub, RepoKind, Settings, Source};
use pipe_fuzz::{Folder, taken};
use std::path::{Component, Path};
use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

/// One for all inputs, because a client of the hub is expensive to make.
static CACHE: LazyLock<(Folder, Hub)> = LazyLock::new(|| {
    let folder = Folder::new();
    let cache = folder.path().to_string_lossy().into_owned();
    let variable = |name: &str| match name {
        "HF_HUB_CACHE" | "HF_HOME" => Some(cache.clone()),
        "HF_HUB_OFFLINE" => Some("1".to_string()),
        _ => None,
    };
    let hub = Hub::new(Settings::from_vars(&variable).expect("the settings are whole"));
    (folder, hub)
});

fuzz_target!(init: pipe_fuzz::start("hub"), |input: &[u8]| {
    let [text, commit, listing, index] = pipe_fuzz::parts(input);
    let text = pipe_fuzz::text(text);
    for kind in [RepoKind::Model, RepoKind::Dataset] {
        let Some(source) = taken(Source::parse(&text, kind)) else { continue };
        let shown = source.to_string();
        let again = Source::parse(shown.strip_prefix("hf:").unwrap_or(&shown), RepoKind::Model);
        // Where a file is named, its folder is part of its path.
        let names = |source: Source| {
            let folder = if source.file.is_some() { String::new() } else { source.folder };
            (source.kind, source.repo, source.revision, folder, source.file)
        };
        assert_eq!(again.map(names), Ok(names(source.clone())), "what is shown names the same files");
        assert!(inside(Path::new(&source.folder)) && source.file.as_deref().is_none_or(|file| inside(Path::new(file))));
        look(&source, &pipe_fuzz::text(commit), listing, index);
    }
});

fn look(source: &Source, commit: &str, listing: &[u8], index: &[u8]) {
    let kind = if source.kind == RepoKind::Dataset { "datasets" } else { "models" };
    let repo = format!("{kind}--{}", source.repo.replace('/', "--"));
    let (folder, hub) = &*CACHE;
    let _ = std::fs::remove_dir_all(folder.path());
    folder.put(&format!("{repo}/refs/main"), commit.as_bytes());
    let commit = commit.trim();
    if commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let snapshot = format!("{repo}/snapshots/{commit}");
        folder.put(&format!("{snapshot}/model.safetensors.index.json"), index);
        for name in ["config.json", "tokenizer.json", "a.safetensors", "data/a.parquet"] {
            folder.put(&format!("{snapshot}/{name}"), b"{}");
        }
        if !listing.is_empty() {
            folder.put(&format!("{repo}/.listing/{commit}"), listing);
        }
    }
    let cached = hub.cached(source);
    let fetched = taken(hub.fetch(source, &mut |_| {}, &AtomicBool::new(false)));
    assert_eq!(cached, fetched, "without a network there is what is cached");
    for (name, path) in cached.iter().flat_map(|snapshot| snapshot.files.iter()) {
        assert!(inside(Path::new(name)), "`{name}` leaves the folder");
        let below = path.strip_prefix(folder.path()).expect("what is served lies in the cache");
        assert!(inside(below), "{} leaves the cache", below.display());
    }
}

/// Whether a path goes down only.
fn inside(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}
