//! The store alone: whose folder it takes, what it publishes, whom it lets wait.

use pipe::digest::Digest;
use pipe::problem::Exit;
use pipe::store::{Artifact, Claim, Claimed, Keep, Lookup, Measured, Published, Record, Store};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn record(cell: &str) -> Record {
    Record {
        fingerprint: Digest::of(b""),
        cell: cell.into(),
        kind: "sft".into(),
        parts: BTreeMap::new(),
        params: serde_json::Map::new(),
        inputs: BTreeMap::new(),
        sources: BTreeMap::new(),
        artifact: Artifact::new(Vec::new()),
        tool: "pipe 0".into(),
        machine: BTreeMap::new(),
        run: "r".into(),
        measured: Measured::default(),
        warnings: Vec::new(),
    }
}

fn claim<'a>(store: &'a Store, fingerprint: &Digest) -> Claim<'a> {
    match store.claim(fingerprint, "sft[size=7B]").unwrap() {
        Claimed::Mine(claim) => claim,
        Claimed::Held(holder) => panic!("held by {holder}"),
    }
}

fn publish(store: &Store, fingerprint: &Digest, files: &[(&str, &str)]) -> Published {
    let claim = claim(store, fingerprint);
    let (out, _) = claim.begin().unwrap();
    for (name, text) in files {
        fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
        fs::write(out.join(name), text).unwrap();
    }
    claim.publish(record("sft[size=7B]")).unwrap()
}

fn listing(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let files = pipe::files::Files::from_dir(dir).unwrap();
    files.iter().map(|(name, path)| (name.to_string(), fs::read(path).unwrap())).collect()
}

#[test]
fn a_cache_of_another_version_is_named_and_not_touched() {
    for (version, code) in [("2\n", "store::newer"), ("0\n", "store::version"), ("what\n", "store::version")] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("version"), version).unwrap();
        fs::write(dir.path().join("strange"), "new").unwrap();
        let before = listing(dir.path());
        let problem = Store::open(dir.path()).err().expect("another version");
        assert_eq!((problem.code, problem.exit), (code, Exit::Missing));
        assert!(!problem.help.is_empty());
        assert_eq!(listing(dir.path()), before);
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("version"), "7").unwrap();
    let message = Store::open(dir.path()).err().expect("newer").message;
    assert!(message.contains("format 7") && message.contains("format 1"), "{message}");
}

#[test]
fn a_folder_of_somebody_elses_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("README.md"), "about the cache").unwrap();
    assert!(Store::open(dir.path()).is_ok());
    fs::write(dir.path().join("thesis.tex"), "years of work").unwrap();
    assert_eq!(Store::open(dir.path()).err().map(|problem| problem.code), Some("store::not_a_cache"));
}

#[test]
fn opening_an_absent_cache_creates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("cache")).unwrap();
    assert_eq!(store.get(&Digest::of(b"x")), Lookup::Unknown);
    assert_eq!(store.stats(), pipe::store::Stats::default());
    assert_eq!(store.gc(&Keep::default(), false).unwrap(), pipe::store::Collected::default());
    assert!(!dir.path().join("cache").exists());
}

#[test]
fn what_was_published_is_found_by_another_store_in_the_same_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (Store::open(dir.path()).unwrap(), Store::open(dir.path()).unwrap());
    let _session = one.session().unwrap();
    let fingerprint = Digest::of(b"f");
    assert_eq!(other.get(&fingerprint), Lookup::Unknown);
    let published = publish(&one, &fingerprint, &[("model.safetensors", "weights"), ("checkpoints/step-1/a", "a")]);
    let Published::First(artifact) = &published else { panic!("{published:?}") };
    assert_eq!(other.get(&fingerprint), Lookup::Known(artifact.clone()));
    let files = other.verify(artifact).unwrap();
    assert_eq!(fs::read_to_string(files.get("checkpoints/step-1/a").unwrap()).unwrap(), "a");
    assert_eq!(other.last("sft[size=7B]", "sft"), Some(fingerprint));
}

#[test]
fn equal_files_are_kept_once_and_cannot_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let _session = store.session().unwrap();
    let artifact =
        publish(&store, &Digest::of(b"1"), &[("a", "same"), ("b", "same"), ("c", "other")]).artifact().clone();
    publish(&store, &Digest::of(b"2"), &[("d", "same")]);
    let stats = store.stats();
    assert_eq!((stats.records, stats.blobs, stats.bytes, stats.bytes_unshared), (2, 2, 9, 17));
    for (_, path) in store.verify(&artifact).unwrap().iter() {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o444);
    }
}

#[test]
fn a_good_file_replaces_a_rotten_one_of_the_same_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let _session = store.session().unwrap();
    let artifact = publish(&store, &Digest::of(b"1"), &[("a", "good")]).artifact().clone();
    let blob = store.files(&artifact).get("a").unwrap().to_path_buf();
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "evil").unwrap();
    publish(&store, &Digest::of(b"2"), &[("z", "good")]);
    assert!(store.verify(&artifact).is_ok());
}

#[test]
fn one_claims_and_the_other_learns_who() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let _session = store.session().unwrap();
    let fingerprint = Digest::of(b"f");
    let mine = claim(&store, &fingerprint);
    let other = Store::open(dir.path()).unwrap();
    match other.claim(&fingerprint, "sft").unwrap() {
        Claimed::Held(holder) => {
            assert_eq!((holder.pid, holder.what.as_str()), (std::process::id(), "sft[size=7B]"));
            assert!(holder.to_string().starts_with(&format!("pid {} on ", std::process::id())));
        }
        Claimed::Mine(_) => panic!("two have it"),
    }
    mine.abandon();
    claim(&other, &fingerprint).abandon();
    assert_eq!(fs::read_dir(dir.path().join("locks")).unwrap().count(), 1, "only the lock of the collector");
}

#[test]
fn many_threads_fight_for_one_lock_and_one_at_a_time_has_it() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let _session = store.session().unwrap();
    let (inside, entered) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    if let Claimed::Mine(claim) = store.claim(&Digest::of(b"f"), "x").unwrap() {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two are inside");
                        entered.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        claim.abandon();
                    }
                }
            });
        }
    });
    // How often depends on the scheduler: a holder that is put to sleep lets the others try in vain.
    assert!(entered.load(Ordering::SeqCst) > 0);
}

#[test]
fn the_collector_does_not_come_in_while_a_run_is_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let session = store.session().unwrap();
    publish(&store, &Digest::of(b"1"), &[("a", "x")]);
    let nothing = Keep { fingerprints: Some([].into()), ..Keep::default() };
    assert_eq!(store.gc(&nothing, false).err().map(|problem| problem.code), Some("store::busy"));
    drop(session);
    let collected = store.gc(&nothing, false).unwrap();
    assert_eq!((collected.records, collected.blobs), (1, 1));
    assert_eq!(store.get(&Digest::of(b"1")), Lookup::Unknown);
}

#[test]
fn nobody_waits_for_the_index_while_another_process_has_its_lock() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let _session = store.session().unwrap();
    let fingerprint = Digest::of(b"f");
    store.touch(&fingerprint, "sft[size=7B]", "sft");
    let other = fs::File::create(dir.path().join("locks/index")).unwrap();
    other.lock().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| store.flush());
        // Long enough for it to wait; were it later, the test would see less.
        std::thread::sleep(std::time::Duration::from_millis(100));
        scope.spawn(|| tell.send(store.last("sft[size=7B]", "sft")));
        let found = told.recv_timeout(std::time::Duration::from_secs(10));
        assert!(!flush.is_finished());
        other.unlock().unwrap();
        assert_eq!(found, Ok(Some(fingerprint)));
        flush.join().unwrap().unwrap();
    });
    assert!(fs::read_to_string(dir.path().join("index")).unwrap().contains("sft[size=7B]"));
}
