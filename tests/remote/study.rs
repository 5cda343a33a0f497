//! The same through the program: a manifest, a key in the environment, a cache, kills.

use crate::server::{Fault, Server, echo, question};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const KEY: &str = "sk-0123456789abcdef-secret-0123456789";

/// A manifest `m.toml`, its data and its cache.
pub struct Study {
    dir: tempfile::TempDir,
}

impl Study {
    /// Of this manifest, with this `questions.jsonl`.
    pub fn of(manifest: &str, records: &[Value]) -> Study {
        let study = Study { dir: tempfile::tempdir().unwrap() };
        std::fs::write(study.path("m.toml"), manifest).unwrap();
        study.write_records(records);
        study
    }

    pub fn new(server: &Server, records: usize) -> Study {
        server.guard_list(true);
        let text = format!(
            r#"manifest = 1
title = "answers"

[endpoint.teacher]
url = "{}"
model = "teacher-large"
api_key_env = "PIPE_TEST_KEY"
max_concurrency = 3
price_in = 1.0
price_out = 2.0

[endpoint.small]
url = "{}"
model = "teacher-small"

[stage.questions]
kind = "dataset"
source = "path:questions.jsonl"

[stage.answers]
kind = "generate"
endpoint = "teacher"
data = "questions"
system = "Be brief."
prompt = "Solve: {{{{ question }}}}"
max_tokens = 50
parse = {{ kind = "boxed" }}
"#,
            server.url, server.url
        );
        let study = Study::of(&text, &[]);
        study.records(records);
        study
    }

    fn records(&self, count: usize) {
        let record = |i| json!({"id": format!("r{i}"), "question": format!("question {i}.")});
        self.write_records(&(0..count).map(record).collect::<Vec<_>>());
    }

    fn write_records(&self, records: &[Value]) {
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        std::fs::write(self.path("questions.jsonl"), lines).unwrap();
    }

    /// Throws away what stages made; what was paid for stays.
    pub fn forget(&self) {
        for folder in ["stages", "blobs", "runs", "results", "work"] {
            let _ = std::fs::remove_dir_all(self.path("cache").join(folder));
        }
        let _ = std::fs::remove_file(self.path("cache/index"));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command.current_dir(self.dir.path()).args(args).env("PIPE_TEST_KEY", KEY);
        command.env("PIPE_TEST_OTHER_KEY", KEY).env_remove("RUST_LOG");
        command
    }

    fn run(&self, more: &[&str]) -> Output {
        self.command(&[&["run", "m.toml"], more].concat()).output().unwrap()
    }

    pub fn ok(&self, more: &[&str]) -> String {
        let output = self.run(more);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    }

    pub fn fails(&self, code: i32, more: &[&str]) -> String {
        let output = self.run(more);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    }

    /// A file of the artifact of a cell.
    pub fn exported(&self, cell: &str, name: &str) -> String {
        let to = self.path("export");
        let _ = std::fs::remove_dir_all(&to);
        let done = self.command(&["export", "m.toml", cell, "export"]).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        std::fs::read_to_string(to.join(name)).unwrap()
    }

    pub fn lines(&self, cell: &str, name: &str) -> Vec<Value> {
        self.exported(cell, name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub fn journalled(&self) -> usize {
        let Ok(files) = std::fs::read_dir(self.path("cache/journal")) else { return 0 };
        let text: String =
            files.flatten().map(|file| std::fs::read_to_string(file.path()).unwrap_or_default()).collect();
        text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count()
    }
}

fn files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => files(&path, into),
            path => into.push(path),
        }
    }
}

#[test]
fn answers_come_parsed_with_their_bill_and_a_second_run_asks_nobody() {
    let server = Server::start();
    let study = Study::new(&server, 5);
    study.ok(&[]);
    let asked = server.asked();
    assert_eq!(asked.len(), 5);
    assert!(asked.iter().all(|seen| seen.authorization == Some(format!("Bearer {KEY}"))));
    let body = &asked[0].body;
    assert_eq!(body["messages"][0], json!({"role": "system", "content": "Be brief."}));
    assert_eq!((&body["max_tokens"], &body["temperature"]), (&json!(50), &json!(0.0)));
    assert!(body.get("top_k").is_none() && body.get("repetition_penalty").is_none() && body.get("stop").is_none());
    let lines = study.lines("answers", "data.jsonl");
    assert_eq!(
        lines.iter().map(|line| line["id"].as_str().unwrap()).collect::<Vec<_>>(),
        ["r0", "r1", "r2", "r3", "r4"]
    );
    assert_eq!((&lines[3]["answer"], &lines[3]["question"]), (&json!("7"), &json!("question 3.")));
    let usage: Value = serde_json::from_str(&study.exported("answers", "usage.json")).unwrap();
    assert_eq!(
        usage,
        json!({"model": "teacher-large", "reported_models": {"teacher-large-2026": 5}, "requests": 5, "prompt_tokens": 100,
            "completion_tokens": 50, "reasoning_tokens": 0, "without_usage": 0, "cost": 200e-6})
    );
    server.seen();
    study.ok(&[]);
    // Nor does it matter where the server stands, what it costs or who pays.
    let elsewhere = "endpoint.teacher.url=http://127.0.0.1:9/v1";
    study.ok(&[
        "--set",
        elsewhere,
        "--set",
        "endpoint.teacher.price_in=3",
        "--set",
        "endpoint.teacher.max_concurrency=1",
    ]);
    assert!(server.seen().is_empty());
}

#[test]
fn a_kill_in_the_middle_costs_no_reply_that_came() {
    let server = Server::start();
    let study = Study::new(&server, 20);
    server.hold_after(7);
    let mut child =
        study.command(&["run", "m.toml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("pipe starts");
    let begun = Instant::now();
    while study.journalled() < 7 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} replies in the journal", study.journalled());
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("reaped");
    // The kill may have torn a line, too.
    let journal = std::fs::read_dir(study.path("cache/journal")).unwrap().flatten().next().unwrap().path();
    let mut kept = std::fs::read(&journal).unwrap();
    kept.extend_from_slice(b"{\"key\":\"12");
    std::fs::write(&journal, kept).unwrap();
    server.hold_after(usize::MAX);
    study.ok(&[]);
    let paid = server.paid();
    assert_eq!(paid.len(), 20);
    assert!(paid.values().all(|times| *times == 1), "{paid:?}");
    assert_eq!(study.lines("answers", "data.jsonl").len(), 20);
}

#[test]
fn one_record_more_another_limit_and_an_emptied_store_pay_for_nothing_twice() {
    let server = Server::start();
    let study = Study::new(&server, 6);
    study.ok(&[]);
    study.records(7);
    study.ok(&["--set", "endpoint.teacher.max_concurrency=1"]);
    assert_eq!(server.paid().len(), 7);
    study.ok(&["--set", "stage.answers.max_tokens=500", "--set", "stage.answers.keep=[]"]);
    // Nothing is kept of what stages made; what was paid for is.
    let gone = study.command(&["gc", "--keep-runs", "0", "--keep-unfinished-days", "0"]).output().unwrap();
    assert!(gone.status.success());
    study.forget();
    study.ok(&["--offline"]);
    let paid = server.paid();
    assert_eq!((paid.len(), paid.values().sum::<u32>()), (7, 7));
}

#[test]
fn the_key_is_nowhere() {
    let server = Server::start();
    let study = Study::new(&server, 3);
    server.fault("question 1", Fault::Status(503, "", "no"));
    let echoing: &'static str =
        Box::leak(format!("{{\"error\": {{\"message\": \"bad request by {KEY}\"}}}}").into_boxed_str());
    server.fault("question 2", Fault::Status(400, "", echoing));
    let mut said = Vec::new();
    for more in [&["-v", "--set", "endpoint.teacher.max_concurrency=1"] as &[&str], &["-v", "--json"], &["-v"]] {
        let output = study.command(&[&["run", "m.toml"], more].concat()).env("RUST_LOG", "trace").output().unwrap();
        said.push([output.stdout, output.stderr].concat());
    }
    for args in
        [&["plan", "m.toml"] as &[&str], &["show", "m.toml", "answers", "--json"], &["why", "m.toml", "answers"]]
    {
        let output = study.command(args).output().unwrap();
        said.push([output.stdout, output.stderr].concat());
    }
    assert!(said.iter().all(|said| !said.is_empty()));
    let mut written = Vec::new();
    files(study.dir.path(), &mut written);
    assert!(written.len() > 10);
    said.extend(written.iter().map(|path| std::fs::read(path).unwrap()));
    for (i, text) in said.iter().enumerate() {
        let text = String::from_utf8_lossy(text);
        assert!(!text.contains(KEY) && !text.contains("secret-0123456789"), "{i} {:?}", written.get(i.wrapping_sub(6)));
    }
}

#[test]
fn a_bad_key_is_found_before_anything_runs() {
    let server = Server::start();
    let study = Study::new(&server, 3);
    server.models(None);
    server.fault("", Fault::Status(401, "", "{\"error\": {\"message\": \"who are you\"}}"));
    let said = study.fails(3, &[]);
    assert!(said.contains("remote::bad_key") && said.contains("PIPE_TEST_KEY"), "{said}");
    let output = study.command(&["run", "m.toml"]).env_remove("PIPE_TEST_KEY").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && said.contains("`PIPE_TEST_KEY` is not set"), "{said}");
    assert!(
        !study.path("cache/runs").exists() || std::fs::read_dir(study.path("cache/runs")).unwrap().next().is_none()
    );
    // A wrong name too.
    server.models(Some(&["teacher-large", "teacher-small"]));
    server.fault("", Fault::Status(404, "", "{}"));
    let said = study.fails(3, &["--set", "endpoint.teacher.model=teacher-huge"]);
    assert!(said.contains("remote::unknown_model") && said.contains("`teacher-large`"), "{said}");
}

#[test]
fn what_does_not_parse_is_asked_for_again_and_then_listed() {
    let server = Server::start();
    let study = Study::new(&server, 4);
    server.model(|body| match question(body) {
        text if text.contains("question 1.") => (json!("I would rather not."), "stop"),
        text if text.contains("question 2.") => (json!({"content": null}), "content_filter"),
        _ => echo(body),
    });
    let said = study.fails(1, &[]);
    assert!(said.contains("2 of 4 completions do not parse") && said.contains("`r1`"), "{said}");
    assert_eq!(server.asked().len(), 6, "r1 three times, the others once");
    study.ok(&["--set", "stage.answers.on_parse_failure=drop"]);
    assert_eq!(server.asked().len(), 0);
    let m = std::fs::read_to_string(study.path("m.toml")).unwrap();
    std::fs::write(study.path("m.toml"), m + "on_parse_failure = \"drop\"\n").unwrap();
    let failed = study.lines("answers", "failed.jsonl");
    assert_eq!(study.lines("answers", "data.jsonl").len(), 2);
    assert_eq!((&failed[0]["id"], &failed[0]["completion"]), (&json!("r1"), &json!("I would rather not.")));
    assert_eq!(failed[0]["reason"], "no \\boxed{} with an answer (the last of 3 attempts)");
    assert_eq!(failed[1]["reason"], "withheld by the server's content filter");
    let usage: Value = serde_json::from_str(&study.exported("answers", "usage.json")).unwrap();
    assert_eq!(usage["requests"], 6);
    // A model that comes to its senses at the second try.
    server.model(|body| if body["seed"].as_u64().unwrap() % 2 == 0 { echo(body) } else { (json!("no"), "stop") });
    study.ok(&[
        "--set",
        "stage.answers.n=4",
        "--set",
        "stage.answers.temperature=1.0",
        "--set",
        "stage.answers.max_parse_attempts=50",
    ]);
}

#[test]
fn a_request_that_never_succeeds_leaves_no_silent_hole() {
    let server = Server::start();
    let study = Study::new(&server, 4);
    server.fault("question 3", Fault::Status(400, "", "{\"error\": {\"message\": \"too long\"}}"));
    let said = study.fails(1, &["--set", "endpoint.teacher.max_concurrency=1"]);
    assert!(said.contains("1 of 4 completions are missing or do not parse") && said.contains("too long"), "{said}");
    study.ok(&[]);
    assert_eq!(study.lines("answers", "data.jsonl").len(), 4);
}

#[test]
fn a_budget_stops_the_run_and_more_of_it_goes_on() {
    let server = Server::start();
    let study = Study::new(&server, 30);
    let said = study.fails(1, &["--set", "endpoint.teacher.budget=0.001"]);
    assert!(said.contains("remote::budget") && said.contains("budget of 0.001"), "{said}");
    let paid = server.paid().len();
    assert!((5..=25).contains(&paid), "{paid}");
    study.ok(&["--set", "endpoint.teacher.budget=1"]);
    assert!(server.paid().values().all(|times| *times == 1));
}

#[test]
fn ctrl_c_ends_within_a_second_and_keeps_what_came() {
    let server = Server::start();
    let study = Study::new(&server, 20);
    server.hold_after(5);
    let child =
        study.command(&["run", "m.toml"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("pipe starts");
    let begun = Instant::now();
    while study.journalled() < 5 {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(5));
    }
    let asked = Instant::now();
    // SAFETY: kill(2) on a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let output = child.wait_with_output().expect("a child");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(asked.elapsed() < Duration::from_millis(1500), "{:?}", asked.elapsed());
    server.hold_after(usize::MAX);
    study.ok(&[]);
    assert!(server.paid().values().all(|times| *times == 1));
}

#[test]
fn an_axis_may_name_the_endpoint() {
    let server = Server::start();
    let study = Study::new(&server, 3);
    let text = std::fs::read_to_string(study.path("m.toml")).unwrap();
    let text =
        text.replace("endpoint = \"teacher\"", "axes = { who = [\"teacher\", \"small\"] }\nendpoint = \"{who}\"");
    std::fs::write(study.path("m.toml"), text).unwrap();
    // One of the two has no key.
    server.guard_list(false);
    study.ok(&[]);
    let asked = server.asked();
    let asked: Vec<_> = asked.iter().filter(|seen| seen.body["max_tokens"] != 1).collect();
    let by = |model: &str| asked.iter().filter(|seen| seen.body["model"] == model).collect::<Vec<_>>();
    assert_eq!((by("teacher-large").len(), by("teacher-small").len()), (3, 3));
    assert!(by("teacher-small").iter().all(|seen| seen.authorization.is_none()));
    let usage: Value = serde_json::from_str(&study.exported("answers[who=small]", "usage.json")).unwrap();
    assert_eq!((&usage["model"], usage.get("cost")), (&json!("teacher-small"), None));
}

/// Bytes in base64, less those at the end that depend on what follows.
fn base64(bytes: &[u8]) -> String {
    let letters: Vec<char> = ('A'..='Z').chain('a'..='z').chain('0'..='9').chain(['+', '/']).collect();
    let group = |three: &[u8]| {
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        [18, 12, 6, 0].map(|shift| letters[(bits >> shift) as usize & 63])
    };
    bytes.chunks_exact(3).flat_map(group).collect()
}

#[test]
fn no_log_and_no_timeline_at_any_level_holds_the_key() {
    assert_eq!(base64(b"sk-0123"), "c2stMDEy");
    let server = Server::start();
    let study = Study::new(&server, 3);
    for (asked, file) in [("trace", "all.json"), ("ureq=trace,ureq_proto=trace,rustls=trace,pipe=debug", "some.json")] {
        study.forget();
        let _ = std::fs::remove_dir_all(study.path("cache/journal"));
        let output = study.command(&["run", "m.toml", "--trace", file]).env("RUST_LOG", asked).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let timeline = std::fs::read_to_string(study.path(file)).unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        for text in [&timeline, &log] {
            let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
            for at in 0..3 {
                let (plain, coded) = (&KEY[at * 8..at * 8 + 8], base64(&KEY.as_bytes()[at..]));
                assert!(!text.contains(plain) && !text.contains(&coded), "{plain} or {coded} in {text}");
            }
            assert!(!text.contains("Bearer") && !text.contains("authorization"), "{text}");
        }
        assert!(!log.contains("ureq"), "{log}");
        let events: Vec<Value> = serde_json::from_str(&timeline).expect("an array of events");
        let count = |name: &str, phase: &str| {
            events.iter().filter(|event| event["name"] == name && event["ph"] == phase).count()
        };
        for (name, least) in [("run", 1), ("cell", 2), ("request", 3)] {
            assert!(count(name, "B") >= least, "{name} in {timeline}");
            assert_eq!(count(name, "B"), count(name, "E"), "{name} in {timeline}");
        }
        let cell = events.iter().find(|event| event["args"]["cell"] == "answers").expect("a span of the stage");
        assert_eq!((&cell["name"], &cell["args"]["kind"]), (&json!("cell"), &json!("generate")));
    }
    assert!(server.seen().iter().any(|seen| seen.authorization.as_deref().is_some_and(|said| said.contains(KEY))));
}
