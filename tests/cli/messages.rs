//! Messages word by word. Each says what is wrong, where, and what can be typed instead.

use crate::{Project, assert_transcript};

#[test]
fn an_unknown_key_and_a_wrong_type_come_together() {
    let project = Project::with(
        r#"manifest = 1
title = "Two mistakes"

[stage.hello]
kind = "command"
comand = ["echo", "hello"]
outputs = "hello.txt"
stdout = "hello.txt"
"#,
    );
    assert_transcript!(project, ["validate", "m.toml"]);
}

#[test]
fn a_cycle_is_shown_edge_by_edge() {
    let project = Project::with(
        r#"manifest = 1

[stage.one]
kind = "command"
command = ["cat", "inputs/1/a"]
from = "three"
outputs = ["a"]
stdout = "a"

[stage.two]
kind = "command"
command = ["cat", "inputs/1/a"]
from = "one"
outputs = ["a"]
stdout = "a"

[stage.three]
kind = "command"
command = ["cat", "inputs/1/a"]
from = "two"
outputs = ["a"]
stdout = "a"
"#,
    );
    assert_transcript!(project, ["validate", "m.toml"]);
}

#[test]
fn a_missing_stage_has_a_neighbour_of_like_name() {
    let project = Project::with(&hello("from = \"helo\""));
    assert_transcript!(project, ["plan", "m.toml"]);
}

/// A stage `hello` and a stage `shout` with an extra line.
fn hello(line: &str) -> String {
    format!(
        r#"manifest = 1

[stage.hello]
kind = "command"
command = ["echo", "hello"]
outputs = ["a"]
stdout = "a"

[stage.shout]
kind = "command"
command = ["cat", "inputs/1/a"]
{line}
outputs = ["a"]
stdout = "a"
"#
    )
}

#[test]
fn a_table_cannot_be_fed_with_a_table() {
    let project = Project::with(
        r#"manifest = 1

[stage.scores]
kind = "command"
command = ["echo", '{"accuracy": 50}']
outputs = ["scores.json"]
stdout = "scores.json"

[stage.first]
kind = "table"
from = "scores"
rows = ["stage"]
columns = ["accuracy"]

[stage.second]
kind = "table"
from = "first"
rows = ["stage"]
columns = ["accuracy"]
"#,
    );
    assert_transcript!(project, ["validate", "m.toml"]);
}

#[test]
fn manifests_that_include_one_another_are_told_so() {
    let project = Project::with("manifest = 1\ninclude = [\"other.toml\"]\n");
    project.write("other.toml", "manifest = 1\ninclude = [\"m.toml\"]\n");
    assert_transcript!(project, ["validate", "m.toml"]);
}

#[test]
fn a_profile_that_touches_nothing_is_an_error() {
    let project = Project::with(&format!("{}\n[profile.mini]\nstage.helo.stdout = \"b\"\n", hello("from = \"hello\"")));
    assert_transcript!(project, ["validate", "m.toml", "--profile", "mini"]);
    assert_transcript!(project, ["validate", "m.toml", "--profile", "maxi", "--set", "stage.shout.outputt=[]"]);
}

#[test]
fn a_claim_is_read_before_anything_runs() {
    let project = Project::with(
        r#"manifest = 1

[stage.scores]
kind = "command"
command = ["echo", '{"accuracy": 50}']
outputs = ["scores.json"]
stdout = "scores.json"

[stage.better]
kind = "check"
from = "scores"
claim = "mean(accuracy) => 40"
"#,
    );
    assert_transcript!(project, ["run", "m.toml"]);
}

#[test]
fn a_manifest_that_is_not_there_is_a_wrong_command_line() {
    assert_transcript!(Project::new(), ["run", "nowhere.toml"]);
}

#[test]
fn problems_are_also_written_for_programs_and_for_github() {
    let project = Project::with(&hello("from = \"helo\""));
    assert_transcript!(project, ["validate", "m.toml", "--format", "github"]);
    let report = project.json(&["validate", "m.toml", "--format", "json"]);
    assert_eq!(report["problems"], 1);
    let problem = &report["manifests"][0]["problems"][0];
    assert_eq!((&problem["places"][0]["line"], &problem["places"][0]["file"]), (&12.into(), &"m.toml".into()));
    assert_eq!(project.code(&["validate", "m.toml", "--format", "json"]), Some(2));
    let event = project.json(&["plan", "m.toml", "--json"]);
    assert_eq!(event["problems"][0]["code"], problem["code"]);
}

#[test]
fn there_is_no_cuda_in_this_build() {
    assert_transcript!(Project::with(&hello("from = \"hello\"")), ["run", "m.toml", "--device", "cuda"]);
}

#[test]
fn a_source_that_is_not_there_is_missing_before_any_stage_runs() {
    let project = Project::with(&hello("from = \"hello\"\nfiles = { a = \"path:nowhere.txt\" }"));
    assert_transcript!(project, ["run", "m.toml"]);
}
