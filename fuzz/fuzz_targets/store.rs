//! A cache folder that others have written to: version, index, stat lines, a record, a blob.
//!
//! Input: `version` (empty: 1), `index`, `stat`, a record (JSON), a blob. Lines of index and stat get their
//! check, an object its checksum, unless they begin with `!`: a mutation that only breaks a checksum
//! would never get past it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::digest::Digest;
use pipe::store::{Artifact, Entry, Keep, Lookup, Record, Store};
use pipe_fuzz::{Folder, taken};
use serde_json::{Map, Value};
use std::collections::HashSet;

fuzz_target!(init: pipe_fuzz::start("store"), |input: &[u8]| {
    let [version, index, stat, record, blob] = pipe_fuzz::parts(input);
    let (bytes, fingerprint) = completed(record);
    let folder = Folder::with(&[
        ("version", if version.is_empty() { b"1\n" } else { version }),
        ("index", &checked(index, |line| format!("{} {line}", short(line)))),
        ("stat", &checked(stat, |line| format!("{line} {}", short(line)))),
        (&sharded("stages", &fingerprint, ".json"), &bytes),
        (&sharded("blobs", &Digest::of(blob), ""), blob),
    ]);
    if let Ok(record) = Record::from_bytes(&bytes) {
        assert_eq!(Record::from_bytes(&record.to_bytes()).as_ref(), Ok(&record), "a record reads back");
    }
    let Some(store) = taken(Store::open(folder.path())) else { return };
    let seen = look(&store, &fingerprint);
    let (cell, kind) = store.record(&fingerprint).map(|record| (record.cell, record.kind)).unwrap_or_default();
    for count in [0, 1, usize::MAX] {
        assert!(store.newest_of_kind(&kind, count).len() <= count);
    }
    let _ = (store.last(&cell, &kind), store.other_results(&fingerprint), store.stats());
    let _ = taken(store.digest_source(&folder.path().join("blobs")));
    let Some(session) = taken(store.session()) else { return };
    store.touch(&fingerprint, "touched", "dataset");
    let _ = taken(store.flush());
    drop(session);

    // What was written is understood by the next process.
    let Some(store) = taken(Store::open(folder.path())) else { return };
    assert_eq!(store.last("touched", "dataset"), Some(fingerprint));
    assert_eq!(look(&store, &fingerprint), seen);
    let _ = store.verify_all(|_| {});
    for fingerprints in [None, Some(HashSet::new())] {
        let _ = taken(store.gc(&Keep { fingerprints, ..Keep::default() }, false));
    }
    assert_eq!(store.get(&fingerprint), Lookup::Unknown, "nothing is left");
});

/// What the store has for the fingerprint; files it serves have the bytes it says.
fn look(store: &Store, fingerprint: &Digest) -> Lookup {
    let seen = store.get(fingerprint);
    if let Lookup::Known(artifact) = &seen
        && let Ok(files) = store.verify(artifact)
    {
        for entry in &artifact.entries {
            let path = files.get(&entry.name).expect("every entry is served");
            assert_eq!(Digest::of_file(path).ok(), Some((entry.digest, entry.size)));
        }
    }
    seen
}

fn sharded(folder: &str, digest: &Digest, end: &str) -> String {
    let digest = digest.to_string();
    format!("{folder}/{}/{digest}{end}", &digest[..2])
}

fn short(line: &str) -> String {
    Digest::of(line.as_bytes()).short()
}

fn checked(part: &[u8], check: impl Fn(&str) -> String) -> Vec<u8> {
    let text = pipe_fuzz::text(part);
    let line = |line: &str| match line.strip_prefix('!') {
        Some(raw) => format!("{raw}\n"),
        None if line.starts_with("pipe index") => format!("{line}\n"),
        None => check(line) + "\n",
    };
    text.lines().map(line).collect::<String>().into_bytes()
}

/// A record with the digests filled in that its other fields imply, and the fingerprint it is for.
fn completed(part: &[u8]) -> (Vec<u8>, Digest) {
    let nobody = Digest::of(b"f");
    let Ok(mut body) = serde_json::from_slice::<Map<String, Value>>(part) else {
        return (part.strip_prefix(b"!").unwrap_or(part).to_vec(), nobody);
    };
    let entry = |file: &Value| {
        let digest = file["digest"].as_str()?.parse().ok()?;
        Some(Entry { name: file["name"].as_str()?.into(), size: file["size"].as_u64()?, digest })
    };
    if let Some(Value::Object(artifact)) = body.get_mut("artifact") {
        let files = artifact.get("files").and_then(Value::as_array).into_iter().flatten();
        let digest = Artifact::new(files.filter_map(entry).collect()).digest;
        artifact.insert("digest".into(), digest.to_string().into());
    }
    body.shift_remove("checksum");
    let fingerprint = body.get("fingerprint").and_then(Value::as_str).and_then(|text| text.parse().ok());
    let text = serde_json::to_string(&body).unwrap_or_default();
    body.insert("checksum".into(), Digest::of(text.as_bytes()).to_string().into());
    (serde_json::to_vec(&body).unwrap_or_default(), fingerprint.unwrap_or(nobody))
}
