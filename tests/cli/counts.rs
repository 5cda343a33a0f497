//! What a plan counts before anything is computed, and that it comes true.

use crate::Project;
use serde_json::{Value, json};

const STUDY: &str = r#"manifest = 1

[stage.base]
kind = "model"
source = "init:mini-3B"

[stage.rows]
kind = "dataset"
source = "path:rows.jsonl"

[stage.sft]
kind = "sft"
model = "base"
data = "rows"
format = "text"
learning_rate = 1e-3
batch_size = 2
epochs = 1.5
max_tokens = 30
on_overlength = "drop"
lora = { rank = 2, alpha = 4 }

[stage.asked]
kind = "generate"
model = "sft"
data = "rows"
prompt = "{{ prompt }}"
n = 2
temperature = 1.0
max_tokens = 4
"#;

/// Five short rows and one that is too long.
fn study() -> Project {
    let project = Project::with(STUDY);
    let row = |i: usize| json!({"id": format!("r{i}"), "prompt": "1 + 1 =", "completion": " 2".repeat(i)});
    let lines: String = (1..=5).chain([40]).map(|i| format!("{}\n", row(i))).collect();
    project.write("rows.jsonl", &lines);
    project
}

fn work(project: &Project, cell: &str, more: &[&str]) -> Value {
    let plan = project.json(&[&["plan", "m.toml", "--json"], more].concat());
    plan["cells"].as_array().expect("cells").iter().find(|found| found["cell"] == cell).expect("it")["work"].clone()
}

#[test]
fn rows_tokens_and_steps_are_those_that_the_run_then_takes() {
    let project = study();
    assert_eq!(work(&project, "sft", &[]), json!({"unknown_until": "rows"}));
    let told = project.stdout(&["plan", "m.toml"]);
    assert!(told.contains("sft    unknown until `rows` is made"), "{told}");
    assert_eq!(project.code(&["run", "m.toml", "rows"]), Some(0));
    // Without a tokenizer only rows and, if none is dropped, steps are known.
    let early = work(&project, "sft", &[]);
    assert_eq!((&early["rows"], &early["tokens"], &early["unknown_until"]), (&json!(6), &Value::Null, &json!("base")));
    assert_eq!(project.code(&["run", "m.toml", "base"]), Some(0));
    let planned = work(&project, "sft", &[]);
    assert_eq!((&planned["rows"], &planned["dropped"], &planned["steps"]), (&json!(6), &json!(1), &json!(5)));
    assert_eq!(work(&project, "asked", &[]), json!({"completions": 12, "tokens_at_most": 48}));
    let told = project.stdout(&["plan", "m.toml"]);
    let tokens = &planned["tokens"];
    assert!(told.contains(&format!("6 rows, 1 too long and dropped; 5 steps over {tokens} tokens")), "{told}");
    assert!(told.contains(&format!("total: 5 steps over {tokens} tokens; 12 completions of at most 48")), "{told}");
    assert!(told.contains(" on disk, ") && told.contains(" free there"), "{told}");
    assert_eq!(project.code(&["run", "m.toml", "sft"]), Some(0));
    assert_eq!(project.code(&["export", "m.toml", "sft", "out"]), Some(0));
    let log = std::fs::read_to_string(project.path("out/log.jsonl")).expect("a log");
    let steps: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let taken: u64 = steps.iter().map(|step| step["tokens"].as_u64().expect("a number")).sum();
    assert_eq!((steps.len(), Some(taken)), (5, tokens.as_u64()));
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    assert!(!project.stdout(&["plan", "m.toml"]).contains("work:"));
}

#[test]
fn data_that_a_stage_would_refuse_are_found_by_the_plan() {
    let project = study();
    assert_eq!(project.code(&["run", "m.toml", "rows", "base"]), Some(0));
    let refused = ["plan", "m.toml", "--set", "stage.sft.on_overlength=error"];
    let output = project.output(&refused);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() != Some(0) && said.contains("`sft` would fail: "), "{said}");
    assert!(said.contains("r40") && String::from_utf8_lossy(&output.stdout).contains("would fail: "), "{said}");
    // Whoever does not want to know is not told.
    assert_eq!(project.code(&[&refused[..], &["--no-counts"]].concat()), Some(0));
}
