//! Stages run on real folders, without a plan or a store.
mod command;

use pipe::files::Files;
use pipe::manifest::spec::Params;
use pipe::plan::Axes;
use pipe::problem::Problem;
use pipe::stage::{Artifact, Context, Device, Progress};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a stage is given and leaves behind, in a temporary folder.
pub struct Bench {
    pub folder: tempfile::TempDir,
    pub inputs: BTreeMap<String, Vec<Artifact>>,
    pub sources: BTreeMap<String, PathBuf>,
    pub stop: AtomicBool,
    /// Raise `stop` once progress reaches this; 0 = never.
    pub stop_at: AtomicU64,
    pub warnings: std::sync::Mutex<Vec<String>>,
}

impl Bench {
    pub fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        for name in ["out", "work"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        Bench {
            folder,
            inputs: BTreeMap::new(),
            sources: BTreeMap::new(),
            stop: AtomicBool::new(false),
            stop_at: AtomicU64::new(0),
            warnings: std::sync::Mutex::default(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Adds an artifact with these files to a slot.
    pub fn give(&mut self, slot: &str, kind: &'static str, files: &[(&str, &Path)]) {
        let mut set = Files::default();
        for (name, path) in files {
            set.insert(*name, *path);
        }
        let artifact = Artifact { stage: "upstream".into(), kind, axes: Axes::default(), files: set };
        self.inputs.entry(slot.into()).or_default().push(artifact);
    }

    /// Runs with `params`; `out` is emptied first, `work` is kept, as the executor does.
    pub fn run(&self, run: fn(&Context) -> Result<(), Problem>, params: serde_json::Value) -> Result<(), Problem> {
        let out = self.path("out");
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::create_dir(&out).unwrap();
        let serde_json::Value::Object(params) = params else { panic!("params are an object") };
        let params: Params = params;
        run(&Context {
            label: "stage",
            params: &params,
            inputs: &self.inputs,
            sources: &self.sources,
            out: &out,
            work: &self.path("work"),
            device: Device::Cpu,
            progress: self,
            stop: &self.stop,
        })
    }

    pub fn output(&self, name: &str) -> String {
        std::fs::read_to_string(self.path("out").join(name)).unwrap()
    }

    /// Names below `out`, sorted.
    pub fn outputs(&self) -> Vec<String> {
        Files::from_dir(&self.path("out")).unwrap().iter().map(|(name, _)| name.to_string()).collect()
    }
}

impl Progress for Bench {
    fn begin(&self, _: u64, _: &'static str) {}

    fn at(&self, done: u64) {
        let limit = self.stop_at.load(Ordering::Relaxed);
        if limit > 0 && done >= limit {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn note(&self, _: &str) {}

    fn warn(&self, text: &str) {
        self.warnings.lock().unwrap().push(text.into());
    }
}
