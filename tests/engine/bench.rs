//! A small world to tell stories in: plans built by hand, closures as stages.

use pipe::exec::{Engine, Event, Observer, Options, Outcome, Paths, Report, Runner, Status, Survey, Task};
use pipe::manifest::spec::{ArtifactType, Key, Kind, Type, no_lineage, no_rules};
use pipe::plan::Arithmetic;
use pipe::plan::{Axes, Cell, CellId, Input, Plan, Source};
use pipe::problem::Problem;
use pipe::store::Store;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// `say` is written to the output; `aside` is part of the fingerprint and of nothing else; `pace`
/// cannot change the result.
pub static KIND: Kind = Kind {
    name: "say",
    about: "writes its text and that of its inputs",
    recipe: 1,
    yields: ArtifactType::Files,
    keys: &[
        Key::optional("say", Type::Str, "text"),
        Key::optional("aside", Type::Str, "text nobody writes"),
        Key::optional("pace", Type::Str, "how").no_result(),
        Key::optional("source", Type::Source(&["path"]), "a file"),
    ],
    floats: false,
    lineage: no_lineage,
    rules: no_rules,
};

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub stop: AtomicBool,
}

/// What happened in a run, in a word a cell: `["tokens ran", "train fresh"]`, in plan order.
pub struct Told {
    pub report: Report,
    pub events: Vec<String>,
    words: Vec<String>,
}

impl Told {
    pub fn words(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }

    pub fn problem(&self) -> &Problem {
        self.report.failures().next().map(|(_, problem)| problem).expect("a failure")
    }
}

#[derive(Default)]
pub struct Ear(pub Mutex<Vec<String>>);

impl Observer for Ear {
    fn event(&self, event: &Event) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

pub fn machine() -> Arithmetic<'static> {
    Arithmetic { backend: "cpu", dtype: "f32" }
}

/// Stages given as (name, params, names of inputs).
pub fn plan(folder: &Path, stages: &[(&str, Value, &[&str])]) -> Plan {
    let mut cells: Vec<Cell> = Vec::new();
    for (name, params, needs) in stages {
        let id = |name: &&str| cells.iter().position(|cell| cell.stage == **name).expect("inputs come first");
        let inputs = if needs.is_empty() {
            Vec::new()
        } else {
            vec![Input { slot: "from".into(), cells: needs.iter().map(id).collect(), labelled: false }]
        };
        let source = |text: &str| Source { key: "source".into(), text: text.into(), folder: folder.into() };
        cells.push(Cell {
            stage: (*name).into(),
            axes: Axes::default(),
            kind: &KIND,
            description: None,
            params: Arc::new(params.as_object().unwrap().clone()),
            inputs,
            sources: params.get("source").and_then(Value::as_str).map(source).into_iter().collect(),
            file: "plan.toml".into(),
            span: 0..0,
        });
    }
    Plan::new("a story".into(), cells)
}

/// Writes `say`, the source and the texts of all inputs to `text`.
pub fn speak(_: &Cell, task: &Task) -> Result<(), Problem> {
    let mut text = task.params.get("say").and_then(Value::as_str).unwrap_or_default().to_string();
    for path in task.sources.values() {
        text += &std::fs::read_to_string(path).unwrap();
    }
    for input in task.inputs.values().flatten() {
        text += &std::fs::read_to_string(input.files.get("text").unwrap()).unwrap();
    }
    std::fs::write(task.out.join("text"), text).unwrap();
    Ok(())
}

impl Bench {
    pub fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap(), stop: AtomicBool::new(false) }
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn store(&self) -> Store {
        Store::open(&self.cache()).unwrap()
    }

    pub fn plan(&self, stages: &[(&str, Value, &[&str])]) -> Plan {
        plan(self.dir.path(), stages)
    }

    pub fn try_run(&self, plan: &Plan, options: &Options, runner: &dyn Runner) -> Result<Told, Vec<Problem>> {
        run_in(&self.store(), plan, options, runner, &self.stop)
    }

    pub fn run_with(&self, plan: &Plan, options: &Options, runner: &dyn Runner) -> Told {
        self.try_run(plan, options, runner).unwrap_or_else(|problems| panic!("{problems:?}"))
    }

    pub fn run(&self, plan: &Plan) -> Told {
        self.run_with(plan, &Options::default(), &speak)
    }

    pub fn status(&self, plan: &Plan) -> Survey {
        let store = self.store();
        let paths = Paths::new(&store);
        let engine = Engine { plan, store: &store, sources: &paths, machine: machine() };
        engine.status(&all(plan), &BTreeSet::new(), &BTreeSet::new())
    }

    /// The reasons of a stale or waiting cell, as `pipe why` prints them.
    pub fn why(&self, plan: &Plan, cell: CellId) -> Vec<String> {
        match &self.status(plan).statuses[cell] {
            Some(Status::Stale { reasons, .. } | Status::Waits { reasons, .. }) => {
                reasons.iter().map(ToString::to_string).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    /// The file `text` of a cell's artifact.
    pub fn text(&self, told: &Told, cell: CellId) -> String {
        let artifact = told.report.artifact(cell).expect("an artifact");
        let files = self.store().verify(artifact).expect("sound");
        std::fs::read_to_string(files.get("text").unwrap()).unwrap()
    }

    /// Nothing half-made lies about, every record has its blobs, every blob its bytes.
    pub fn assert_sound(&self) {
        let checked = self.store().verify_all(|_| {});
        assert!(checked.damaged.is_empty() && checked.lost.is_empty(), "{checked:?}");
        assert_eq!(names(&self.cache().join("work")), [""; 0]);
        assert!(!self.cache().join("tmp").exists());
    }
}

pub fn run_in(
    store: &Store,
    plan: &Plan,
    options: &Options,
    runner: &dyn Runner,
    stop: &AtomicBool,
) -> Result<Told, Vec<Problem>> {
    let paths = Paths::new(store);
    let engine = Engine { plan, store, sources: &paths, machine: machine() };
    let ear = Ear::default();
    let report = engine.run(&all(plan), options, runner, &ear, stop)?;
    let word = |outcome: &Option<Outcome>| match outcome.as_ref().unwrap() {
        Outcome::Fresh(_) => "fresh",
        Outcome::Ran { differs: false, .. } => "ran",
        Outcome::Ran { differs: true, .. } => "ran, differs",
        Outcome::Failed(_) => "failed",
        Outcome::Skipped { .. } => "skipped",
        Outcome::Interrupted => "interrupted",
        Outcome::NotStarted => "not started",
    };
    let words = plan.cells.iter().zip(&report.outcomes).map(|(cell, o)| format!("{cell} {}", word(o))).collect();
    Ok(Told { report, events: ear.0.into_inner().unwrap(), words })
}

pub fn all(plan: &Plan) -> Vec<CellId> {
    (0..plan.cells.len()).collect()
}

/// Names in a folder, sorted; none if it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// All files below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(files) = pipe::files::Files::from_dir(folder) else { return Vec::new() };
    files.iter().map(|(_, path)| path.to_path_buf()).collect()
}

/// The blob that holds exactly `text`.
pub fn blob_of(cache: &Path, text: &str) -> PathBuf {
    let digest = pipe::digest::Digest::of(text.as_bytes()).to_string();
    cache.join("blobs").join(&digest[..2]).join(digest)
}

/// Overwrites a file in place, as a bad disk or a careless hand does.
pub fn tamper(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// `[tokens -> train -> score]`, `tokens` with these parameters.
pub fn chain(bench: &Bench, tokens: Value) -> Plan {
    bench.plan(&[
        ("tokens", tokens, &[]),
        ("train", json!({"say": "t:"}), &["tokens"]),
        ("score", json!({"say": "s:"}), &["train"]),
    ])
}
