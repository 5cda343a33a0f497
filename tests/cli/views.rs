//! The commands that look: plan, why, graph, show, export, cache, completions.

use crate::run::study;
use crate::{Project, assert_transcript};

#[test]
fn a_plan_says_what_would_run_and_why() {
    let project = study();
    assert_transcript!(project, ["plan", "m.toml"]);
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    assert_transcript!(project, ["plan", "m.toml", "--set", "stage.table1.decimals=2"]);
    let plan = project.json(&["plan", "m.toml", "--json"]);
    assert_eq!(plan["cells"][0]["status"], "fresh");
}

#[test]
fn why_gives_values_and_root_causes() {
    let project = study();
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    assert_transcript!(project, ["why", "m.toml", "table1", "--set", "stage.table1.decimals=2"]);
    project.write("score.sh", "echo '{\"accuracy\": 1}'\n");
    assert_transcript!(project, ["why", "m.toml", "table1"]);
    let why = project.json(&["why", "m.toml", "table1", "--json"]);
    assert_eq!(why["cells"][0]["causes"].as_array().map(Vec::len), Some(4));
}

#[test]
fn a_graph_has_four_forms() {
    let project = study();
    for format in ["text", "dot", "mermaid"] {
        assert_transcript!(project, ["graph", "m.toml", "--format", format]);
    }
    assert!(project.stdout(&["graph", "m.toml", "--cells"]).contains("eval[size=7B,task=b]"));
    let graph = project.json(&["graph", "m.toml", "--format", "json"]);
    assert_eq!(graph["cells"].as_array().map(Vec::len), Some(7));
    assert_eq!(graph["cells"][4]["inputs"]["from"].as_array().map(Vec::len), Some(4));
}

#[test]
fn a_picture_leaves_out_what_follows_and_a_list_does_not() {
    let project = crate::Project::with(
        r#"manifest = 1
title = "three in a row, and all of them together"

[stage.a]
kind = "dataset"
source = "path:a.jsonl"

[stage.b]
kind = "dataset"
concat = ["a"]

[stage.all]
kind = "dataset"
concat = ["a", "b"]
"#,
    );
    let arrows = |format: &str, arrow: &str| {
        let text = project.stdout(&["graph", "m.toml", "--format", format]);
        text.lines().filter(|line| line.contains(arrow)).map(|line| line.trim().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(arrows("dot", "->"), ["n0 -> n1;", "n1 -> n2;"]);
    assert_eq!(arrows("mermaid", "-->"), ["n0 --> n1", "n1 --> n2"]);
    assert!(arrows("text", "<-")[1].ends_with("<- a, b"));
    let graph = project.json(&["graph", "m.toml", "--format", "json"]);
    assert_eq!(graph["cells"][2]["inputs"]["concat"], serde_json::json!(["a", "b"]));
}

#[test]
fn show_tells_everything_about_one_cell_and_a_line_about_each_of_many() {
    let project = study();
    assert_transcript!(project, ["show", "m.toml", "table1"]);
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    assert_transcript!(project, ["show", "m.toml", "eval"]);
    let page = project.stdout(&["show", "m.toml", "grows"]);
    for part in ["grows (check)", "fingerprint", "verdict.json", "claim", "from  eval[size=3B,task=a]"] {
        assert!(page.contains(part), "{part} in {page}");
    }
    let stale = project.stdout(&["show", "m.toml", "table1", "--set", "stage.table1.decimals=2"]);
    assert!(stale.contains("stale now: this is what it was last"), "{stale}");
}

#[test]
fn export_copies_ordinary_files_and_mixes_with_nothing() {
    let project = study();
    assert_transcript!(project, ["export", "m.toml", "table1", "tables"]);
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    assert_transcript!(project, ["export", "m.toml", "table1", "tables"]);
    let table = std::fs::read_to_string(project.path("tables/table.csv")).expect("exported");
    assert!(table.starts_with("size,a,b,mean\n3B,20.0,30.0,25.0\n"), "{table}");
    assert_transcript!(project, ["export", "m.toml", "table1", "tables"]);
    assert_eq!(project.code(&["export", "m.toml", "eval", "scores"]), Some(0));
    assert!(project.path("scores/size=7B,task=b/scores.json").exists());
}

#[test]
fn the_cache_can_be_counted_and_checked() {
    let project = study();
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    let stats = project.json(&["cache", "stats", "--json"]);
    assert_eq!((&stats["stages"], &stats["kinds"]["command"]["stages"]), (&7.into(), &4.into()));
    assert!(project.stdout(&["cache", "stats"]).contains("7 finished stages"));
    assert!(project.stdout(&["cache", "verify"]).contains("all as stored"));
}

#[test]
fn every_command_has_help_with_examples() {
    let project = Project::new();
    for command in ["run", "plan", "validate", "why", "graph", "show", "export", "doctor", "schema", "completions"] {
        let help = project.stdout(&[command, "--help"]);
        assert!(help.contains(&format!("pipe {command}")) && help.contains("Examples:"), "{help}");
    }
    assert!(project.stdout(&["--help"]).contains("Exit codes: 0 done"));
    assert!(project.stdout(&["completions", "bash"]).contains("_pipe()"));
    assert_eq!(project.code(&["rum"]), Some(2));
}

#[test]
fn the_schema_is_one_and_names_every_kind() {
    let schema = Project::new().stdout(&["schema"]);
    let value: serde_json::Value = serde_json::from_str(&schema).expect("JSON");
    assert!(value.is_object());
    for kind in pipe::stage::KINDS {
        assert!(schema.contains(&format!("\"{}\"", kind.name)), "{}", kind.name);
    }
}
