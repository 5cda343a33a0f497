//! `hf:` sources against a hub on this machine: what is fetched, from where, how often, and what is
//! left on disk when something goes wrong.

mod server;

use pipe::hub::{Hub, RepoKind, Settings, Snapshot, Source};
use pipe::problem::{Exit, Problem};
use server::{COMMIT, Fault, Server, etag};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tempfile::TempDir;

const TOKEN: &str = "hf_verysecret";

/// A hub's client with its cache in `home`.
fn hub(server: &Server, home: &Path, more: &[(&str, &str)]) -> Hub {
    let vars = |name: &str| match name {
        "HF_HOME" => Some(home.display().to_string()),
        "HF_ENDPOINT" => Some(format!("{}/", server.endpoint)),
        _ => more.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()),
    };
    let mut settings = Settings::from_vars(&vars).unwrap();
    settings.first_wait = Duration::from_millis(1);
    Hub::new(settings)
}

fn model() -> Source {
    Source::parse("team/tiny", RepoKind::Model).unwrap()
}

fn fetch(hub: &Hub, source: &Source) -> Result<Snapshot, Problem> {
    hub.fetch(source, &mut |_| (), &AtomicBool::new(false))
}

/// Bytes that no two positions share, large enough to lie on the other host.
fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| i.to_le_bytes()).collect()
}

/// A model of two small files and one large one, and a file nobody needs.
fn tiny() -> (Server, TempDir) {
    let server = Server::start();
    server.put("team/tiny", "config.json", b"{\"model_type\": \"qwen2\"}");
    server.put("team/tiny", "tokenizer.json", b"{}");
    server.put("team/tiny", "model.safetensors", &weights());
    server.put("team/tiny", "pytorch_model.bin", &[7; 5000]);
    server.put("team/tiny", "README.md", b"# Tiny");
    (server, TempDir::new().unwrap())
}

fn repo_folder(home: &Path) -> PathBuf {
    home.join("hub/models--team--tiny")
}

fn bytes(snapshot: &Snapshot, name: &str) -> Vec<u8> {
    std::fs::read(snapshot.files.get(name).unwrap()).unwrap()
}

#[test]
fn a_model_lands_in_the_cache_as_the_hubs_own_tools_lay_it_out() {
    let (server, home) = tiny();
    let mut last = 0;
    let snapshot = hub(&server, home.path(), &[])
        .fetch(
            &model(),
            &mut |step| {
                assert!(step.done >= last && step.total > step.done / 2);
                last = step.done;
            },
            &AtomicBool::new(false),
        )
        .unwrap();
    assert_eq!(snapshot.commit, COMMIT);
    assert_eq!(
        snapshot.files.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
    assert_eq!(last, weights().len() as u64 + 23 + 2);
    let root = repo_folder(home.path());
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(snapshot.path, root.join("snapshots").join(COMMIT));
    let link = std::fs::read_link(snapshot.path.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(etag(&weights())));
    assert!(home.path().join("hub/.locks/models--team--tiny").join(format!("{}.lock", etag(&weights()))).exists());
    assert!(server.requests().iter().all(|request| !request.path.contains("README") && !request.path.contains(".bin")));
}

#[test]
fn what_is_in_the_cache_is_served_without_a_request() {
    let (server, home) = tiny();
    let first = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    server.requests();
    let offline = hub(&server, home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(fetch(&offline, &model()).unwrap(), first);
    assert_eq!(fetch(&hub(&server, home.path(), &[]), &model()).unwrap(), first);
    let pinned = Source::parse(&format!("team/tiny@{COMMIT}"), RepoKind::Model).unwrap();
    assert_eq!(fetch(&offline, &pinned).unwrap(), first);
    assert!(server.requests().is_empty());
    // A file that went missing comes again, alone.
    std::fs::remove_file(first.path.join("tokenizer.json")).unwrap();
    std::fs::remove_file(repo_folder(home.path()).join("blobs").join(etag(b"{}"))).unwrap();
    assert_eq!(fetch(&hub(&server, home.path(), &[]), &model()).unwrap(), first);
    let paths: Vec<String> = server.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths.len(), 2, "{paths:?}");
    assert!(paths[1].ends_with("/tokenizer.json"));
}

#[test]
fn another_tools_complete_download_is_used_and_an_incomplete_one_is_not() {
    let (server, home) = tiny();
    let snapshot = repo_folder(home.path()).join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo_folder(home.path()).join("refs")).unwrap();
    std::fs::write(repo_folder(home.path()).join("refs/main"), COMMIT).unwrap();
    for name in ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"] {
        std::fs::write(snapshot.join(name), "x").unwrap();
    }
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    std::fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    let offline = hub(&server, home.path(), &[("HF_HUB_OFFLINE", "TRUE")]);
    let problem = fetch(&offline, &model()).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("hub::offline", Exit::Missing));
    assert!(
        problem.notes[0].ends_with(&format!("has commit {COMMIT} without model-00002-of-00002.safetensors")),
        "{problem}"
    );
    std::fs::write(snapshot.join("model-00002-of-00002.safetensors"), "x").unwrap();
    assert_eq!(fetch(&offline, &model()).unwrap().files.len(), 5);
    assert!(server.requests().is_empty());
}

#[test]
fn offline_and_not_there_says_what_is_missing_and_what_to_type() {
    let (server, home) = tiny();
    let offline = hub(&server, home.path(), &[("HF_HUB_OFFLINE", "yes")]);
    let problem = fetch(&offline, &model()).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("hub::offline", Exit::Missing));
    assert_eq!(problem.message, "hf:team/tiny@main is not in the cache, and no request may be made (HF_HUB_OFFLINE)");
    assert!(problem.notes[0].contains("models--team--tiny` has nothing of this revision"), "{problem}");
    assert!(problem.help[0].contains("`hf download team/tiny --revision main`"), "{problem}");
    assert!(server.requests().is_empty());
}

#[test]
fn a_connection_that_breaks_is_continued_where_it_stopped() {
    let (server, home) = tiny();
    server.fault("/store/team", Fault::Cut(400_000));
    server.fault("/store/team", Fault::Cut(300_000));
    server.fault("/resolve/", Fault::Hang);
    server.fault("/api/", Fault::Status(503, ""));
    let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
    let ranges: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|r| r.path.starts_with("/store/"))
        .map(|r| r.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges, [None, Some("bytes=400000-".into()), Some("bytes=700000-".into())]);
    assert_eq!(server.faults_left(), 0);
}

#[test]
fn many_broken_connections_are_not_given_up_while_each_brings_something() {
    let (server, home) = tiny();
    for _ in 0..12 {
        server.fault("/store/team", Fault::Cut(50_000));
    }
    let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
}

#[test]
fn a_server_without_ranges_is_read_from_the_start() {
    let (server, home) = tiny();
    server.fault("/store/team", Fault::Cut(400_000));
    server.fault("/store/team", Fault::IgnoreRange);
    assert_eq!(bytes(&fetch(&hub(&server, home.path(), &[]), &model()).unwrap(), "model.safetensors"), weights());
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says_and_a_dead_one_given_up() {
    let (server, home) = tiny();
    server.fault("/api/", Fault::Status(429, "retry-after: 0\r\n"));
    server.fault("/config.json", Fault::Status(500, ""));
    fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    let other = TempDir::new().unwrap();
    for _ in 0..5 {
        server.fault("/api/", Fault::Status(504, ""));
    }
    let problem = fetch(&hub(&server, other.path(), &[]), &model()).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("hub::unreachable", Exit::Missing));
    assert!(problem.message.contains("it answered 504"), "{problem}");
}

#[test]
fn bytes_that_are_not_the_files_are_never_published() {
    let (server, home) = tiny();
    server.fault("/store/team", Fault::Flip);
    let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
    let other = TempDir::new().unwrap();
    server.fault("/store/team", Fault::Flip);
    server.fault("/store/team", Fault::Flip);
    let problem = fetch(&hub(&server, other.path(), &[]), &model()).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("hub::corrupt", Exit::Missing));
    let root = repo_folder(other.path());
    assert!(!root.join("blobs").join(etag(&weights())).exists());
    assert!(!root.join("refs/main").exists());
    assert!(hub(&server, other.path(), &[]).cached(&model()).is_none());
}

#[test]
fn leftovers_of_another_file_do_not_spoil_a_download() {
    let (server, home) = tiny();
    let blobs = repo_folder(home.path()).join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    // Wrong bytes at the front, more bytes than the file has, and a small file's leftover.
    std::fs::write(blobs.join(format!("{}.incomplete", etag(&weights()))), [9; 1234]).unwrap();
    std::fs::write(blobs.join(format!("{}.incomplete", etag(b"{}"))), "{ {").unwrap();
    let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
    assert_eq!(bytes(&snapshot, "tokenizer.json"), b"{}");
    let other = TempDir::new().unwrap();
    std::fs::create_dir_all(repo_folder(other.path()).join("blobs")).unwrap();
    let longer = repo_folder(other.path()).join("blobs").join(format!("{}.incomplete", etag(&weights())));
    std::fs::write(longer, vec![9; 2_000_000]).unwrap();
    assert_eq!(bytes(&fetch(&hub(&server, other.path(), &[]), &model()).unwrap(), "model.safetensors"), weights());
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let (server, home) = tiny();
    let client = hub(&server, home.path(), &[("HF_TOKEN", TOKEN)]);
    fetch(&client, &model()).unwrap();
    let requests = server.requests();
    assert!(requests.iter().any(|request| request.path.starts_with("/store/")));
    for request in requests {
        let wanted = (!request.path.starts_with("/store/")).then(|| format!("Bearer {TOKEN}"));
        assert_eq!(request.headers.get("authorization").cloned(), wanted, "{}", request.path);
    }
    // Nor into a message, and neither does the signature of a redirect.
    let other = TempDir::new().unwrap();
    for _ in 0..5 {
        server.fault("/store/", Fault::Hang);
    }
    let problem = fetch(&hub(&server, other.path(), &[("HF_TOKEN", TOKEN)]), &model()).unwrap_err();
    assert_eq!(problem.code, "hub::unreachable");
    assert!(!problem.to_string().contains(TOKEN) && !problem.to_string().contains("SECRET"), "{problem}");
    let broken = fetch(&hub(&server, other.path(), &[("HF_TOKEN", "line\nend")]), &model()).unwrap_err();
    assert!(!broken.to_string().contains("line"), "{broken}");
}

#[test]
fn a_token_file_serves_where_no_variable_does() {
    let (server, home) = tiny();
    std::fs::write(home.path().join("token"), format!("{TOKEN}\n")).unwrap();
    fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(server.requests()[0].headers["authorization"], format!("Bearer {TOKEN}"));
}

#[test]
fn refusals_are_told_apart() {
    let (server, home) = tiny();
    let refused = |status, headers, path: &str| {
        server.fault(path, Fault::Status(status, headers));
        let problem = fetch(&hub(&server, home.path(), &[]), &model()).unwrap_err();
        assert_eq!(problem.exit, Exit::Missing, "{problem}");
        problem.code
    };
    assert_eq!(refused(401, "x-error-code: GatedRepo\r\n", "/resolve/"), "hub::gated");
    assert_eq!(refused(403, "", "/resolve/"), "hub::gated");
    assert_eq!(refused(401, "", "/api/"), "hub::no_repository");
    assert_eq!(refused(404, "x-error-code: RevisionNotFound\r\n", "/api/"), "hub::no_revision");
    assert_eq!(refused(404, "x-error-code: EntryNotFound\r\n", "/resolve/"), "hub::no_file");
    assert_eq!(refused(418, "", "/api/"), "hub::refused");
    assert_eq!(refused(302, "location: elsewhere\r\n", "/api/"), "hub::answer");
    let absent = Source::parse("team/absent", RepoKind::Model).unwrap();
    assert_eq!(fetch(&hub(&server, home.path(), &[]), &absent).unwrap_err().code, "hub::no_repository");
    server.put("team/old", "pytorch_model.bin", b"x");
    let old = Source::parse("team/old", RepoKind::Model).unwrap();
    let problem = fetch(&hub(&server, home.path(), &[]), &old).unwrap_err();
    assert_eq!(
        (problem.code, problem.message.as_str()),
        ("hub::nothing_there", "hf:team/old@main has no safetensors file")
    );
}

#[test]
fn a_dataset_a_folder_and_a_single_file_are_sources_too() {
    let server = Server::start();
    let home = TempDir::new().unwrap();
    let repo = "datasets/team/rows";
    for name in ["data/train-00000-of-00001.parquet", "extra/more.jsonl", "README.md", "dataset_infos.json"] {
        server.put(repo, name, name.as_bytes());
    }
    let client = hub(&server, home.path(), &[]);
    let names = |text: &str, kind| {
        let snapshot = fetch(&client, &Source::parse(text, kind).unwrap()).unwrap();
        (snapshot.files.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>(), snapshot.path)
    };
    assert_eq!(names("team/rows/extra", RepoKind::Dataset).0, ["more.jsonl"]);
    let (file, path) = names("datasets/team/rows#README.md", RepoKind::Model);
    assert_eq!(file, ["README.md"]);
    assert_eq!(std::fs::read_to_string(path).unwrap(), "README.md");
    assert_eq!(names("team/rows", RepoKind::Dataset).0, ["data/train-00000-of-00001.parquet", "extra/more.jsonl"]);
    let link =
        home.path().join("hub/datasets--team--rows/snapshots").join(COMMIT).join("data/train-00000-of-00001.parquet");
    assert!(std::fs::read_link(link).unwrap().starts_with("../../../blobs"));
}

#[test]
fn a_mirror_that_lists_names_only_is_asked_for_the_rest() {
    let (server, home) = tiny();
    server.terse();
    server.fault("/store/team", Fault::Cut(400_000));
    let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
    assert!(server.requests().iter().any(|request| request.method == "HEAD"));
}

#[test]
fn those_who_want_the_same_file_at_once_fetch_it_once() {
    let (server, home) = tiny();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
                assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
            });
        }
    });
    let large = server.requests().iter().filter(|request| request.path.starts_with("/store/")).count();
    assert_eq!(large, 1);
}

#[test]
fn a_stop_ends_the_download_and_keeps_what_has_come() {
    let (server, home) = tiny();
    let stop = AtomicBool::new(false);
    let problem = hub(&server, home.path(), &[])
        .fetch(
            &model(),
            &mut |step| {
                stop.store(
                    step.file == "model.safetensors" && step.done > 100_000,
                    std::sync::atomic::Ordering::Relaxed,
                )
            },
            &stop,
        )
        .unwrap_err();
    assert_eq!(problem.exit, Exit::Interrupted);
    let kept = repo_folder(home.path()).join("blobs").join(format!("{}.incomplete", etag(&weights())));
    assert!(kept.metadata().unwrap().len() > 100_000);
    server.requests();
    fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert!(server.requests().iter().any(|request| request.headers.contains_key("range")));
}

/// Not a test of its own: the process that [`a_killed_download_is_continued_by_the_next_run`] kills.
#[test]
fn download_for_the_killing() {
    let Ok(home) = std::env::var("PIPE_TEST_HUB_HOME") else { return };
    let settings = Settings::from_vars(&|name| match name {
        "HF_HOME" => Some(home.clone()),
        "HF_ENDPOINT" => std::env::var("PIPE_TEST_HUB_ENDPOINT").ok(),
        _ => None,
    });
    fetch(&Hub::new(settings.unwrap()), &model()).unwrap();
}

#[test]
fn a_killed_download_is_continued_by_the_next_run() {
    let (server, home) = tiny();
    server.fault("/store/team", Fault::Stall(600_000));
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "download_for_the_killing"])
        .env("PIPE_TEST_HUB_HOME", home.path())
        .env("PIPE_TEST_HUB_ENDPOINT", &server.endpoint)
        .spawn()
        .unwrap();
    let kept = repo_folder(home.path()).join("blobs").join(format!("{}.incomplete", etag(&weights())));
    while kept.metadata().map_or(0, |data| data.len()) < 600_000 {
        assert!(child.try_wait().unwrap().is_none(), "the child ended before it could be killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(hub(&server, home.path(), &[]).cached(&model()).is_none());
    server.requests();
    let snapshot = fetch(&hub(&server, home.path(), &[]), &model()).unwrap();
    assert_eq!(bytes(&snapshot, "model.safetensors"), weights());
    let ranges: Vec<String> = server.requests().into_iter().filter_map(|r| r.headers.get("range").cloned()).collect();
    assert!(!ranges.is_empty() && ranges.iter().all(|range| range == "bytes=600000-"), "{ranges:?}");
}

#[test]
fn sources_are_parsed_and_paths_cannot_leave_the_repository() {
    let shown = |text: &str| Source::parse(text, RepoKind::Model).map(|source| source.to_string());
    for (text, wanted) in [
        ("Qwen/Qwen2.5-3B-Instruct", "hf:Qwen/Qwen2.5-3B-Instruct@main"),
        ("a/b@v1.0/sub/folder", "hf:a/b@v1.0/sub/folder"),
        ("datasets/a/b@abc#data/x.jsonl", "hf:datasets/a/b@abc#data/x.jsonl"),
        ("models/a/b/sub#x.json", "hf:a/b@main#sub/x.json"),
    ] {
        assert_eq!(shown(text).unwrap(), wanted);
    }
    for text in [
        "",
        "a",
        "a/",
        "/b",
        "a/b@",
        "a/..",
        "../b",
        "a/b/../c",
        "a/b#../x",
        "a/b#",
        "a/b@x y",
        "datasets/a",
        "a/b#/etc/passwd",
    ] {
        let problem = shown(text).unwrap_err();
        assert_eq!((problem.code, problem.exit), ("hub::source", Exit::Usage), "{text}");
    }
}

#[test]
fn a_listing_with_a_name_that_climbs_out_is_refused() {
    let (server, home) = tiny();
    server.put("team/tiny", "../../../evil.safetensors", b"x");
    let problem = fetch(&hub(&server, home.path(), &[]), &model()).unwrap_err();
    assert_eq!(problem.code, "hub::answer");
}

#[test]
fn the_variables_of_the_hubs_own_tools_are_honoured() {
    let settings = |vars: &[(&str, &str)]| {
        Settings::from_vars(&|name| vars.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    };
    assert_eq!(settings(&[("HOME", "/h")]).unwrap().cache, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(settings(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).unwrap().cache, Path::new("/x/huggingface/hub"));
    assert_eq!(settings(&[("HOME", "/h"), ("HF_HOME", "/f")]).unwrap().cache, Path::new("/f/hub"));
    assert_eq!(settings(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]).unwrap().cache, Path::new("/c"));
    assert_eq!(settings(&[("HOME", "/h")]).unwrap().endpoint, "https://huggingface.co");
    assert!(!settings(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
    assert!(settings(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "on")]).unwrap().offline);
    assert_eq!(settings(&[]).err().unwrap().exit, Exit::Missing);
    assert_eq!(settings(&[("HOME", "/h"), ("HF_ENDPOINT", "hub.local")]).err().unwrap().code, "hub::endpoint");
}
