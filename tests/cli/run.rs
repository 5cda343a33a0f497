//! Runs: what runs and what does not, what is printed where, how it ends.

use crate::{Project, assert_transcript};
use serde_json::Value;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Scores made by a command, a table, a picture and a verdict.
const STUDY: &str = r#"manifest = 1
title = "A study in small"

[stage.eval]
kind = "command"
axes = { size = ["3B", "7B"], task = ["a", "b"] }
command = ["sh", "files/score", "{size}", "{task}"]
files = { score = "path:score.sh" }
outputs = ["scores.json"]
stdout = "scores.json"

[stage.table1]
kind = "table"
from = "eval"
rows = ["size"]
columns = ["task", "mean"]
value = "accuracy"
caption = "Table 1"

[stage.figure]
kind = "plot"
from = "eval"
x = "size"
y = "accuracy"
series = ["task"]
mark = "bar"

[stage.grows]
kind = "check"
from = "eval"
claim = "mean(accuracy[size=7B]) > mean(accuracy[size=3B])"
"#;

const SCORE: &str = r#"case $1$2 in 3Ba) n=20;; 3Bb) n=30;; 7Ba) n=41;; *) n=50;; esac
echo "{\"accuracy\": $n, \"ci_low\": $((n - 5)), \"ci_high\": $((n + 5))}"
"#;

pub fn study() -> Project {
    let project = Project::with(STUDY);
    project.write("score.sh", SCORE);
    project
}

#[test]
fn a_study_prints_its_table_its_verdict_and_where_its_picture_lies() {
    assert_transcript!(study(), ["run", "m.toml", "--jobs", "1"]);
}

#[test]
fn a_second_run_starts_nothing_and_prints_the_same_bytes() {
    let project = study();
    let first = project.output(&["run", "m.toml"]);
    let second = project.output(&["run", "m.toml", "-v", "--jobs", "3"]);
    assert_eq!(first.status.code(), Some(0));
    assert!(first.stdout == second.stdout && !first.stdout.is_empty());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("7 fresh") && !said.contains("started"), "{said}");
}

#[test]
fn one_changed_key_runs_what_depends_on_it_and_nothing_else() {
    let project = study();
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    let said = project.stderr(&["run", "m.toml", "--set", "stage.table1.decimals=2"]);
    assert!(said.contains("1 ran, 6 fresh"), "{said}");
    assert!(project.stdout(&["run", "m.toml", "--set", "stage.table1.decimals=2"]).contains("41.00"));
}

#[test]
fn named_stages_bring_what_they_need_and_force_runs_them_again() {
    let project = study();
    let said = project.stderr(&["run", "m.toml", "eval[size=3B]"]);
    assert!(said.contains("2 ran"), "{said}");
    let said = project.stderr(&["run", "m.toml", "grows", "--force", "eval[size=3B,task=a]"]);
    assert!(said.contains("4 ran, 1 fresh"), "{said}");
    assert_transcript!(project, ["run", "m.toml", "evil[size=3B]"]);
}

#[test]
fn a_dry_run_says_what_a_run_would_do_and_leaves_no_trace() {
    let project = study();
    assert_transcript!(project, ["run", "m.toml", "--dry-run"]);
    assert!(!project.path("cache").exists());
}

#[test]
fn a_claim_that_does_not_hold_ends_with_exit_code_1() {
    let project = study();
    let claim = "stage.grows.claim=\"mean(accuracy[size=7B]) < mean(accuracy[size=3B])\"";
    assert_transcript!(project, ["run", "m.toml", "--jobs", "1", "--set", claim]);
    assert_eq!(project.code(&["run", "m.toml", "--set", claim, "--set", "stage.grows.severity=warn"]), Some(0));
    let page = project.stdout(&["run", "m.toml", "--set", claim, "--set", "stage.grows.severity=warn"]);
    assert!(page.contains("grows does not hold"), "{page}");
}

#[test]
fn what_does_not_need_a_failed_stage_still_runs_if_asked_to() {
    let broken = ["run", "m.toml", "--jobs", "1", "--set", "stage.figure.y=f1"];
    let said = study().stderr(&[&broken[..], &["--keep-going"]].concat());
    assert!(said.contains("6 ran, 1 failed"), "{said}");
    assert!(said.contains("error[plot::unknown_name]: no input has a number `f1`"), "{said}");
    assert_eq!(study().code(&broken), Some(1));
}

#[test]
fn every_event_is_an_object_on_a_line_of_its_own() {
    let project = study();
    let output = project.output(&["run", "m.toml", "--json"]);
    assert!(output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    let count = |event: &str| events.iter().filter(|object| object["event"] == event).count();
    assert_eq!((count("begun"), count("started"), count("ran"), count("ended")), (1, 7, 7, 1));
    let table = events.iter().find(|object| object["event"] == "result" && object["kind"] == "table");
    assert_eq!(table.expect("a table")["value"]["columns"], serde_json::json!(["a", "b", "mean"]));
}

#[test]
fn quiet_leaves_the_results() {
    let output = study().output(&["run", "m.toml", "--quiet"]);
    assert!(output.stderr.is_empty());
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("Table 1\n"));
}

#[test]
fn what_is_damaged_in_the_store_is_said_and_made_again() {
    let project = study();
    let before = project.stdout(&["run", "m.toml"]);
    // The smallest score file: flip a byte of what the table was made from.
    let scores = project.json(&["show", "m.toml", "eval[size=3B,task=a]", "--json"]);
    let path = project.path(scores["cells"][0]["paths"]["scores.json"].as_str().expect("a path"));
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[2] ^= 1;
    let mut writable = std::fs::metadata(&path).expect("there").permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "a test in its own folder")]
    writable.set_readonly(false);
    std::fs::set_permissions(&path, writable).expect("writable");
    std::fs::write(&path, &bytes).expect("written");
    assert_transcript!(project, ["export", "m.toml", "eval[size=3B,task=a]", "out"]);
    let again = project.output(&["run", "m.toml"]);
    assert_eq!(again.status.code(), Some(0));
    assert_eq!(String::from_utf8(again.stdout).expect("UTF-8"), before);
    assert_eq!(project.code(&["cache", "verify"]), Some(0));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let project = study();
    let mut command = project.command(&["schema"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    drop(child.stdout.take());
    let status = child.wait().expect("it ends");
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));
}

/// A stage that sleeps, and the signal that ends it.
#[test]
fn an_interrupted_run_ends_with_130_and_the_next_one_goes_on() {
    let project = Project::with(
        "manifest = 1\n\n[stage.slow]\nkind = \"command\"\ncommand = [\"sh\", \"-c\", \"sleep 30; echo done\"]\n\
         outputs = [\"a\"]\nstdout = \"a\"\n\n[stage.quick]\nkind = \"command\"\ncommand = [\"echo\", \"hello\"]\n\
         outputs = [\"a\"]\nstdout = \"a\"\n",
    );
    let mut child = project
        .command(&["run", "m.toml", "--jobs", "2"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    let began = Instant::now();
    while !project.stdout(&["plan", "m.toml", "-v"]).contains("fresh  quick") {
        assert!(began.elapsed() < Duration::from_secs(60), "the quick stage never ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let signalled = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(signalled.expect("kill runs").success());
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    let said = project.stderr(&["run", "m.toml", "quick"]);
    assert!(said.contains("1 fresh"), "{said}");
}

#[test]
fn a_run_that_fails_leaves_a_whole_timeline() {
    let project = Project::with(STUDY);
    project.write("score.sh", "exit 3\n");
    assert_eq!(project.code(&["run", "m.toml", "--trace", "t.json", "--keep-going"]), Some(1));
    let events: Value =
        serde_json::from_str(&std::fs::read_to_string(project.path("t.json")).expect("written")).expect("JSON");
    let of = |phase: &str| events.as_array().expect("events").iter().filter(|event| event["ph"] == phase).count();
    // Four cells at work, and the run around them.
    assert_eq!((of("B"), of("E")), (5, 5), "{events}");
    let problem = project.stderr(&["run", "m.toml", "--trace", "nowhere/t.json"]);
    assert!(problem.contains("cannot write `nowhere/t.json`"), "{problem}");
    assert_eq!(project.code(&["run", "m.toml", "--trace", "nowhere/t.json"]), Some(3));
}

#[test]
fn a_log_filter_that_is_none_is_said_and_stops_nothing() {
    let project = study();
    let output = project.command(&["plan", "m.toml"]).env("RUST_LOG", "pipe=loud").output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("`RUST_LOG=pipe=loud` is no filter") && said.contains("RUST_LOG=pipe=debug"), "{said}");
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("eval"), "{}", String::from_utf8_lossy(&output.stdout));
}
