//! The stages that show and judge numbers: `table`, `plot`, `check`, run on artifacts made by hand.

mod check;
mod misfits;
mod plot;
mod table;

use pipe::files::Files;
use pipe::manifest::spec::{Kind, Params, Presence};
use pipe::plan::{Axes, AxisValue};
use pipe::problem::Problem;
use pipe::stage::{Artifact, Context, Device, Progress};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// A stage about to be run on artifacts in a folder of its own.
struct Bench {
    dir: tempfile::TempDir,
    artifacts: Vec<Artifact>,
    sources: BTreeMap<String, PathBuf>,
    warnings: Warnings,
}

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Progress for Warnings {
    fn begin(&self, _: u64, _: &'static str) {}
    fn at(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn warn(&self, text: &str) {
        self.0.lock().expect("one thread").push(text.to_string());
    }
}

impl Bench {
    fn new() -> Bench {
        Bench {
            dir: tempfile::tempdir().expect("a folder"),
            artifacts: Vec::new(),
            sources: BTreeMap::new(),
            warnings: Warnings::default(),
        }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path
    }

    fn artifact(&mut self, stage: &str, axes: &[(&str, &str)], name: &str, text: &str) {
        let path = self.file(&format!("{}-{name}", self.artifacts.len()), text);
        let mut files = Files::default();
        files.insert(name, path);
        let axes = axes.iter().map(|(axis, value)| (axis.to_string(), AxisValue::Str(value.to_string()))).collect();
        self.artifacts.push(Artifact { stage: stage.to_string(), kind: "eval", axes: Axes(axes), files });
    }

    fn scores(&mut self, stage: &str, axes: &[(&str, &str)], accuracy: f64) {
        let half = 4.0;
        let scores =
            json!({ "accuracy": accuracy, "ci_low": accuracy - half, "ci_high": accuracy + half, "total": 100 });
        self.artifact(stage, axes, "scores.json", &scores.to_string());
    }

    /// Scores that come with what became of each problem, of one sample each.
    fn outcomes(&mut self, stage: &str, axes: &[(&str, &str)], right: &[bool]) {
        let share = right.iter().filter(|right| **right).count() as f64 / right.len() as f64;
        self.scores(stage, axes, 100.0 * share);
        let line =
            |(at, right): (usize, &bool)| json!({ "id": format!("p{at}"), "correct": *right as u64, "samples": 1 });
        let text: String = right.iter().enumerate().map(|row| format!("{}\n", line(row))).collect();
        let path = self.file(&format!("{}-outcomes", self.artifacts.len()), &text);
        self.artifacts.last_mut().expect("just added").files.insert("outcomes.jsonl", path);
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.out().join(name)).expect("a file of the artifact")
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.out().join(name)).expect("a file of the artifact")
    }

    /// Runs `run` with `params` laid over the defaults of `kind`, after its rules were asked.
    fn run(&mut self, kind: &Kind, run: fn(&Context) -> Result<(), Problem>, params: Value) -> Result<(), Problem> {
        let params = with_defaults(kind, params);
        let broken: Vec<String> = (kind.rules)(&params).into_iter().map(|broken| broken.message).collect();
        assert!(broken.is_empty(), "{broken:?}");
        let (out, work) = (self.out(), self.dir.path().join("work"));
        let _ = std::fs::remove_dir_all(&out);
        for dir in [&out, &work] {
            std::fs::create_dir_all(dir).expect("a folder");
        }
        let inputs = BTreeMap::from([("from".to_string(), std::mem::take(&mut self.artifacts))]);
        let result = run(&Context {
            label: "shown",
            params: &params,
            inputs: &inputs,
            sources: &self.sources,
            out: Path::new(&out),
            work: Path::new(&work),
            device: Device::Cpu,
            remote: &pipe::remote::Remote::new(Path::new("journal")),
            progress: &self.warnings,
            stop: &AtomicBool::new(false),
        });
        self.artifacts = inputs.into_values().next().unwrap_or_default();
        result
    }
}

fn with_defaults(kind: &Kind, params: Value) -> Params {
    let Value::Object(mut params) = params else { panic!("parameters are an object") };
    for key in kind.keys {
        if let Presence::Default(text) = key.presence {
            let table: toml::Table = toml::from_str(&format!("value = {text}")).expect("a default is TOML");
            let value = serde_json::to_value(&table["value"]).expect("a default is JSON");
            params.entry(key.name).or_insert(value);
        }
    }
    params
}

/// What the rules of a kind say against parameters.
fn broken(kind: &Kind, params: Value) -> Vec<String> {
    let broken = (kind.rules)(&with_defaults(kind, params));
    broken.into_iter().map(|broken| format!("{}: {}", broken.key, broken.message)).collect()
}
