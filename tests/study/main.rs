//! Whole small studies through the program: what a user does, from manifest to table, and what
//! happens when it is stopped, killed, changed or fed with bad rows.

mod bad_rows;
mod insides;
mod interrupted;

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with a manifest, data and a cache of its own.
pub struct Study {
    dir: tempfile::TempDir,
}

/// Sums a small model can begin to learn, as records of the s1 layout.
pub fn sums(count: usize) -> Vec<Value> {
    (0..count)
        .map(|i| {
            let (a, b) = (i % 7 + 1, i % 5 + 2);
            json!({
                "id": format!("sum-{i}"),
                "prompt": format!("What is {a} plus {b}?"),
                "thinking": format!("{a} + {b} = {}", a + b),
                "answer": format!("\\boxed{{{}}}", a + b),
            })
        })
        .collect()
}

/// The same as preferences: the right sum over a wrong one.
pub fn preferences(count: usize) -> Vec<Value> {
    sums(count)
        .into_iter()
        .enumerate()
        .map(|(i, record)| {
            json!({
                "id": record["id"],
                "prompt": record["prompt"],
                "chosen": { "thinking": record["thinking"], "answer": record["answer"] },
                "rejected": { "thinking": "Let me guess.", "answer": format!("\\boxed{{{}}}", 40 + i % 9) },
            })
        })
        .collect()
}

/// SFT, DPO, probe, eval and tables over one tiny random model.
pub const MANIFEST: &str = r#"manifest = 1
title = "a small study"

[stage.base]
kind = "model"
source = "init:random"
tokenizer = "init:mini"
init = { hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 48, seed = 1 }

[stage.sums]
kind = "dataset"
source = "path:sums.jsonl"

[stage.preferences]
kind = "dataset"
source = "path:preferences.jsonl"

[stage.sft]
kind = "sft"
model = "base"
data = "sums"
format = "s1"
max_steps = 12
batch_size = 4
learning_rate = 5e-3
lora = { rank = 4, alpha = 8 }
max_tokens = 200
save_every_steps = 4

[stage.dpo]
kind = "dpo"
model = "sft"
data = "preferences"
format = "s1"
max_steps = 4
batch_size = 4
learning_rate = 1e-3
lora = { rank = 4, alpha = 8 }
adapter = "continue"
max_tokens = 200

[stage.probe]
kind = "probe"
model = "sft"
data = "preferences"
checkpoints = true
format = "s1"
max_tokens = 200

[stage.curve]
kind = "table"
from = "probe"
rows = ["step"]
columns = ["alp_chosen", "alp_rejected", "margin"]
"#;

impl Study {
    pub fn small() -> Study {
        Study::with(MANIFEST, &sums(16), &preferences(8))
    }

    pub fn with(manifest: &str, sums: &[Value], preferences: &[Value]) -> Study {
        let study = Study { dir: tempfile::tempdir().expect("a temporary folder") };
        study.write("study.toml", manifest);
        study.write_lines("sums.jsonl", sums);
        study.write_lines("preferences.jsonl", preferences);
        study
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("written");
    }

    pub fn write_lines(&self, name: &str, records: &[Value]) {
        self.write(name, &records.iter().map(|record| format!("{record}\n")).collect::<String>());
    }

    /// `pipe` in the study's folder.
    pub fn pipe(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command.current_dir(self.dir.path()).args(args).env_remove("RUST_LOG").env("NO_COLOR", "1");
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.pipe(args).output().expect("pipe starts")
    }

    /// Runs to success; returns stdout.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "pipe {args:?}\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs to failure with this code; returns stderr.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.output(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "pipe {args:?}\n{stderr}");
        stderr
    }

    /// Every file a stage's artifact exports, with its bytes.
    pub fn exported(&self, cache: &str, stage: &str) -> Vec<(String, Vec<u8>)> {
        let to = self.path(&format!("export-{cache}-{stage}"));
        self.ok(&["export", "study.toml", stage, to.to_str().expect("UTF-8"), "--cache", cache]);
        let mut files = Vec::new();
        gather(&to, &to, &mut files);
        files.sort();
        assert!(!files.is_empty(), "{stage} exported nothing");
        files
    }
}

fn gather(root: &Path, dir: &Path, into: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(dir).expect("the exported folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            gather(root, &path, into);
        } else {
            let name = path.strip_prefix(root).expect("below the root").display().to_string();
            into.push((name, fs::read(&path).expect("an exported file")));
        }
    }
}

#[test]
fn a_second_run_starts_no_stage_and_prints_the_same_bytes() {
    let study = Study::small();
    let first = study.ok(&["run", "study.toml"]);
    assert!(first.contains("margin"), "{first}");
    let events = study.ok(&["run", "study.toml", "--json"]);
    assert!(!events.contains("\"started\""), "{events}");
    assert_eq!(study.ok(&["run", "study.toml"]), first);
}

#[test]
fn one_changed_value_reruns_what_depends_on_it_and_nothing_else() {
    let study = Study::small();
    study.ok(&["run", "study.toml"]);
    let changed = ["--set", "stage.dpo.learning_rate=2e-3"];
    let why = study.ok(&[&["why", "study.toml", "dpo"], changed.as_slice()].concat());
    assert!(why.contains("learning_rate") && why.contains("0.002"), "{why}");
    let plan = study.ok(&[&["plan", "study.toml", "--json"], changed.as_slice()].concat());
    let plan: Value = serde_json::from_str(&plan).expect("JSON");
    let cells = plan["cells"].as_array().expect("cells");
    let stale: Vec<&str> =
        cells.iter().filter(|cell| cell["status"] != "fresh").filter_map(|cell| cell["cell"].as_str()).collect();
    assert_eq!(stale, ["dpo"], "{plan}");
}

#[test]
fn the_number_of_jobs_changes_no_byte() {
    let study = Study::small();
    study.ok(&["run", "study.toml", "--jobs", "1", "--cache", "one"]);
    study.ok(&["run", "study.toml", "--jobs", "4", "--cache", "four"]);
    for stage in ["base", "sft", "dpo", "probe", "curve"] {
        assert_eq!(study.exported("one", stage), study.exported("four", stage), "{stage}");
    }
}

#[test]
fn training_every_weight_and_merging_both_give_a_model_that_loads_again() {
    let study = Study::small();
    let full = study.path("full");
    study.write(
        "full.toml",
        &MANIFEST
            .replace("lora = { rank = 4, alpha = 8 }\nmax_tokens", "max_tokens")
            .replace("adapter = \"continue\"\n", ""),
    );
    study.ok(&["run", "full.toml", "sft", "--cache", "full-cache"]);
    study.ok(&["export", "full.toml", "sft", full.to_str().expect("UTF-8"), "--cache", "full-cache"]);
    study.ok(&["run", "study.toml", "sft"]);
    let merged = study.path("merged");
    study.ok(&["export", "study.toml", "sft", merged.to_str().expect("UTF-8"), "--merge"]);
    for folder in ["full", "merged"] {
        let source = format!("stage.base.source=path:{folder}");
        let text = MANIFEST
            .lines()
            .filter(|line| !line.starts_with("tokenizer") && !line.starts_with("init ="))
            .map(|line| format!("{line}\n"))
            .collect::<String>();
        study.write("again.toml", &text);
        study.ok(&["run", "again.toml", "probe", "--cache", &format!("{folder}-cache"), "--set", &source]);
    }
}
