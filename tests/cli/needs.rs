//! What a plan needs of the machine: shown by `plan`, looked at before a run, told by `doctor`.

use crate::{Project, assert_transcript};
use std::process::Output;

/// Fine-tuning of a model of which only the configuration is there, and its data.
const STUDY: &str = r#"manifest = 1

[stage.base]
kind = "model"
source = "path:base"

[stage.rows]
kind = "dataset"
source = "path:rows.jsonl"

[stage.sft]
kind = "sft"
model = "base"
data = "rows"
learning_rate = 1e-3
batch_size = 8
max_tokens = 512
lora = { rank = 16, alpha = 32 }
checkpointing = "none"
"#;

const ROWS: &str = r#"{"id": "a", "prompt": "1 + 1", "answer": "2"}
{"id": "b", "prompt": "1 + 1", "answer": "2"}
{"id": "c", "prompt": "How many legs have three cats?", "answer": ""}
"#;

/// `layers` layers with heads of `head_dim`.
fn study(layers: usize, head_dim: usize) -> Project {
    let project = Project::with(STUDY);
    project.write("rows.jsonl", ROWS);
    project.write(
        "base/config.json",
        &format!(
            r#"{{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 8192, "intermediate_size": 29568,
                "num_hidden_layers": {layers}, "num_attention_heads": 64, "num_key_value_heads": 8,
                "head_dim": {head_dim}, "max_position_embeddings": 32768}}"#
        ),
    );
    project
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_head_size_without_a_kernel_is_told_with_the_missing_driver_before_anything_runs() {
    assert_transcript!(study(1, 96), ["run", "m.toml", "--device", "cuda"]);
}

#[test]
fn a_plan_refuses_that_head_size_too_and_the_processor_takes_it() {
    let project = study(1, 96);
    let plan = project.output(&["plan", "m.toml", "--device", "cuda"]);
    assert_eq!(plan.status.code(), Some(3));
    let said = stderr(&plan);
    assert!(said.contains("cuda::head_dim") && said.contains("`sft` cannot run") && said.contains("96"), "{said}");
    assert!(!project.stderr(&["plan", "m.toml"]).contains("head_dim"));
    // Heads of 128 are taken; only the driver is missing.
    let said = study(1, 128).stderr(&["run", "m.toml", "--device", "cuda"]);
    assert!(said.contains("cuda::no_driver") && !said.contains("cuda::head_dim"), "{said}");
}

#[test]
fn what_no_memory_of_this_machine_can_hold_is_refused_before_any_stage_runs() {
    let project = study(4000, 128);
    assert_transcript!(project, ["run", "m.toml"]);
    let events = project.output(&["run", "m.toml", "--json"]);
    assert_eq!(events.status.code(), Some(3));
    assert!(!String::from_utf8_lossy(&events.stdout).contains("\"started\""));
}

#[test]
fn a_plan_shows_memory_needed_beside_memory_there() {
    let project = Project::with(&STUDY.replace("path:base", "init:mini-3B"));
    project.write("rows.jsonl", ROWS);
    assert_transcript!(project, ["plan", "m.toml", "-v"]);
    let plan = project.json(&["plan", "m.toml", "--json"]);
    let memory = &plan["cells"][2]["memory"];
    let parts: u64 = memory["parts"].as_array().expect("parts").iter().map(|part| part["host"].as_u64().unwrap()).sum();
    assert_eq!((memory["at_most"]["host"].as_u64(), &memory["fits"]), (Some(parts), &true.into()));
    assert!(plan["machine"]["host"]["total"].as_u64() > Some(parts));
    // Once the records are there the steps are known, and they are too few to fill the micro-batch.
    assert_eq!(project.code(&["run", "m.toml", "rows"]), Some(0));
    let known = project.json(&["plan", "m.toml", "--json"])["cells"][2]["memory"].clone();
    assert_eq!(known["steps"], 1);
    assert!(known["at_most"]["host"].as_u64() < Some(parts), "{known}");
}

#[test]
fn a_model_that_is_not_here_yet_is_unknown_until_it_is_made() {
    let project = Project::with(&STUDY.replace("path:base", "hf:nobody/nothing"));
    project.write("rows.jsonl", ROWS);
    let output = project.command(&["plan", "m.toml"]).env("HF_HOME", project.path("hf")).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("sft  unknown until `base` is made"), "{said}");
    let output = project.command(&["doctor", "m.toml"]).env("HF_HOME", project.path("hf")).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("warn  `hf:nobody/nothing` is not in the hub's cache: `pipe run` fetches it"), "{said}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn the_doctor_looks_at_the_machine_and_never_shows_a_token() {
    let project = Project::new();
    let run = |arguments: &[&str], offline: &str| {
        let mut command = project.command(arguments);
        command.env("HF_HOME", project.path("hf")).env("HF_TOKEN", "hf_SECRET").env("HF_HUB_OFFLINE", offline);
        command.output().expect("it starts")
    };
    let output = run(&["doctor"], "1");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    for part in
        ["ok    processor: ", "ok    memory: ", "ok    GPU: none is used", "ok    cache: cache will be made", "disk: "]
    {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(said.contains("not asked (HF_HUB_OFFLINE)") && said.contains("a token is there"), "{said}");
    assert!(!said.contains("SECRET") && !stderr(&output).contains("SECRET"));
    assert!(!project.path("cache").exists());
    // Asked for, a missing GPU is a failure, with a way out.
    let output = run(&["doctor", "--device", "cuda", "--json"], "0");
    assert_eq!(output.status.code(), Some(3));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = report["findings"].as_array().expect("a list");
    let gpu = findings.iter().find(|line| line["about"] == "gpu").expect("about the GPU");
    assert_eq!((&gpu["state"], &report["ok"]), (&"FAIL".into(), &false.into()));
    assert!(!gpu["help"].as_array().expect("help").is_empty());
}

/// Data with a duplicate, an empty answer and a question of the task, longer than the stage takes.
#[test]
fn the_data_doctor_names_what_is_suspicious_before_hours_are_spent() {
    let project = Project::with(&format!(
        r#"{}
[stage.task]
kind = "dataset"
source = "path:task.jsonl"

[stage.eval]
kind = "eval"
model = "sft"
task = "task"
max_tokens = 8

[stage.report]
kind = "command"
command = ["echo", "done"]
env = ["PIPE_TEST_KEY"]
outputs = ["a"]
stdout = "a"
"#,
        STUDY.replace("path:base", "init:mini-3B").replace("max_tokens = 512", "max_tokens = 16")
    ));
    project.write(
        "rows.jsonl",
        &ROWS.replace("\"answer\": \"\"", "\"answer\": \"twelve of them, as everybody knows\", \"note\": \"\""),
    );
    project.write(
        "task.jsonl",
        "{\"id\": \"t\", \"question\": \"how many legs have  three cats?\", \"answer\": \"12\"}\n",
    );
    assert_eq!(project.code(&["run", "m.toml", "base", "rows", "task"]), Some(0));
    let output = project.output(&["doctor", "m.toml"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    for part in [
        "warn  data of rows: 3 records, 1 that say the same as another, 1 with an empty `note`",
        "FAIL  data of rows, as `sft` takes it: longest ",
        "help: max_tokens = ",
        "warn  data of rows and task task: 1 question and 0 answers in common, `c` and `t` first",
        "FAIL  variable PIPE_TEST_KEY: not set, and `report` passes it on",
        "help: export PIPE_TEST_KEY=...",
        "ok    memory of sft: up to ",
        "ok    source path:rows.jsonl: here, ",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let mut command = project.command(&["doctor", "m.toml", "--set", "stage.sft.max_tokens=512"]);
    let output = command.env("PIPE_TEST_KEY", "anything").output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("ok    variable PIPE_TEST_KEY: set") && !said.contains("anything"), "{said}");
}
