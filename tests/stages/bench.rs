//! One stage, its inputs and its folders.

use pipe::files::Files;
use pipe::manifest::spec::{Key, Kind, Params, Presence, Type};
use pipe::plan::Axes;
use pipe::problem::Problem;
use pipe::remote::Remote;
use pipe::stage::{Artifact, Context, Device, Progress};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a stage is given and leaves behind, in a temporary folder.
pub struct Bench {
    pub folder: tempfile::TempDir,
    pub inputs: BTreeMap<String, Vec<Artifact>>,
    pub sources: BTreeMap<String, PathBuf>,
    pub device: Device,
    pub remote: Remote,
    pub stop: AtomicBool,
    /// Raise `stop` once progress reaches this; 0 = never.
    pub stop_at: AtomicU64,
    pub warnings: std::sync::Mutex<Vec<String>>,
}

/// Parameters as the manifest resolves them: what is given, and the defaults of the kind, in tables too.
pub fn resolved(kind: &Kind, given: serde_json::Value) -> serde_json::Value {
    fn table(keys: &[Key], given: serde_json::Value) -> serde_json::Value {
        let serde_json::Value::Object(mut params) = given else { panic!("parameters are an object") };
        for key in keys {
            if let (Type::Table(keys), Some(given)) = (&key.ty, params.get_mut(key.name)) {
                *given = table(keys, given.take());
            }
            // What goes with one of two is not there beside the other.
            let other = keys.iter().find(|either| Some(either.name) == key.with).map(|either| &either.presence);
            let beside = matches!(other, Some(Presence::Either(other)) if params.contains_key(*other));
            if let Presence::Default(text) = key.presence
                && !params.contains_key(key.name)
                && !beside
            {
                let table: serde_json::Value = toml::from_str(&format!("value = {text}")).unwrap();
                params.insert(key.name.into(), table["value"].clone());
            }
        }
        params.into()
    }
    table(kind.keys, given)
}

/// A small random model with the bundled tokenizer, made by the `model` stage in `folder`.
pub fn small_model(folder: &Path) -> Files {
    let bench = Bench::empty();
    let init = serde_json::json!({
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true, "initializer_range": 0.2, "seed": 1,
    });
    let params = serde_json::json!({"source": "init:random", "tokenizer": "init:mini", "init": init});
    bench.run(pipe::stage::model::run, params).unwrap();
    std::fs::rename(bench.path("out"), folder).unwrap();
    std::fs::create_dir(bench.path("out")).unwrap();
    Files::from_dir(folder).unwrap()
}

impl Bench {
    /// A bench whose slot `model` holds a small model and whose slot `data` these records.
    pub fn with_model(data: &str, records: &[serde_json::Value]) -> Bench {
        let mut bench = Bench::empty();
        let files = small_model(&bench.path("weights"));
        let artifact = Artifact { stage: "base".into(), kind: "model", axes: Axes::default(), files };
        bench.inputs.insert("model".into(), vec![artifact]);
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        let path = bench.write("data.jsonl", &lines);
        bench.give(data, "dataset", &[("data.jsonl", &path)]);
        bench
    }

    /// Lines of a JSON Lines output.
    pub fn lines(&self, name: &str) -> Vec<serde_json::Value> {
        self.output(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub fn empty() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        for name in ["out", "work"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let remote = Remote::new(&folder.path().join("journal"));
        Bench {
            folder,
            inputs: BTreeMap::new(),
            sources: BTreeMap::new(),
            device: Device::Cpu,
            remote,
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
            device: self.device.clone(),
            remote: &self.remote,
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
