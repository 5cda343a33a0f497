//! A study as its user would write it: a manifest and data files in a folder. The program runs and exports it; or the
//! engine does here, its stages computing on the emulator, which the program knows nothing of, or on a GPU.

use crate::support;
use pipe::exec::{self, Engine, Options, Paths, Silent, Task};
use pipe::plan::{self, Arithmetic, Cell};
use pipe::problem::Problem;
use pipe::remote::Remote;
use pipe::stage::{self, Artifact, Context, Device};
use pipe::store::Store;
use pipe::{files::Files, manifest};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

/// Where a study computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// `pipe run --device cpu`.
    Processor,
    /// `--device cuda` without the program: through the kernels, on the emulator or, with `PIPE_TEST_GPU`, on a GPU.
    Kernels,
}

impl Place {
    /// The bound for f32, or the one for bf16, in which the kernels compute.
    pub fn bound(self, f32: f64, bf16: f64) -> f64 {
        match self {
            Place::Processor => f32,
            Place::Kernels => bf16,
        }
    }
}

/// A manifest in the making, in a folder of its own.
pub struct Study {
    folder: tempfile::TempDir,
    manifest: String,
    place: Place,
}

impl Study {
    /// With the stage `base`: a model folder.
    pub fn of(model: &Path, place: Place) -> Study {
        let manifest = "manifest = 1\ntitle = \"goldens\"\n".to_string();
        let mut study = Study { folder: tempfile::tempdir().unwrap(), manifest, place };
        study.stage("base", &format!("kind = \"model\"\nsource = {}", path(model)));
        study
    }

    pub fn stage(&mut self, name: &str, keys: &str) {
        let _ = writeln!(self.manifest, "\n[stage.{name}]\n{keys}");
    }

    /// An adapter that PEFT wrote, on top of the model of another stage.
    pub fn adapter(&mut self, name: &str, folder: &Path, model: &str) {
        self.stage(name, &format!("kind = \"model\"\nsource = {}\nmodel = \"{model}\"", path(folder)));
    }

    /// Records, written beside the manifest.
    pub fn records(&mut self, name: &str, records: &[Value]) {
        self.records_with(name, records, "");
    }

    /// The same with further keys of the `dataset` stage.
    pub fn records_with(&mut self, name: &str, records: &[Value], keys: &str) {
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        std::fs::write(self.folder.path().join(format!("{name}.jsonl")), lines).unwrap();
        self.stage(name, &format!("kind = \"dataset\"\nsource = \"path:{name}.jsonl\"\n{keys}"));
    }

    /// `pipe run` of everything.
    pub fn run(&self) {
        std::fs::write(self.folder.path().join("m.toml"), &self.manifest).unwrap();
        match self.place {
            Place::Processor => self.pipe(&["run", "m.toml", "-q", "--device", "cpu"]),
            Place::Kernels => self.run_here(&Device::Cuda(support::gpu())),
        }
    }

    /// `pipe export` of one stage: the folder it was written to.
    pub fn export(&self, stage: &str, flags: &[&str]) -> PathBuf {
        let name = format!("export-{stage}{}", flags.concat()).replace(['[', ']', '='], "-");
        match self.place {
            Place::Processor => self.pipe(&[&["export", "m.toml", stage, &name], flags].concat()),
            Place::Kernels => assert!(flags.is_empty(), "only the program knows {flags:?}"),
        }
        self.folder.path().join(name)
    }

    /// What the program does with a manifest: plan, engine, stages. Every cell's files are put where `export` says.
    fn run_here(&self, device: &Device) {
        let told = |problems: &[Problem]| -> ! {
            let all: Vec<String> = problems.iter().map(Problem::to_string).collect();
            panic!("{}\n{}", all.join("\n"), self.manifest)
        };
        let path = self.folder.path().join("m.toml");
        let manifest = manifest::load(&path, &|path| std::fs::read_to_string(path), stage::KINDS, &[], &[]);
        let plan = plan::resolve(&manifest).unwrap_or_else(|problems| told(&problems));
        let store = Store::open(&self.folder.path().join("cache")).unwrap_or_else(|problem| told(&[problem]));
        let sources = Paths::new(&store);
        let machine = Arithmetic { backend: "cuda", dtype: "bf16" };
        let engine = Engine { plan: &plan, store: &store, sources: &sources, machine };
        let cells: Vec<usize> = (0..plan.cells.len()).collect();
        let runner = |cell: &Cell, task: &Task| run_stage(device, cell, task);
        let report = engine
            .run(&cells, &Options::default(), &runner, &Silent, &AtomicBool::new(false))
            .unwrap_or_else(|problems| told(&problems));
        let failed: Vec<Problem> = report.failures().map(|(_, problem)| problem.clone()).collect();
        if !failed.is_empty() {
            told(&failed);
        }
        for cell in cells {
            let files = store.files(report.artifact(cell).expect("it ran"));
            let folder = self.export(&plan.cells[cell].to_string(), &[]);
            copy(&files, &folder);
        }
    }

    fn pipe(&self, arguments: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        let output = command.args(arguments).current_dir(self.folder.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "pipe {arguments:?}\n{stderr}\n{}", self.manifest);
    }
}

fn copy(files: &Files, folder: &Path) {
    for (name, from) in files.iter() {
        let to = folder.join(name);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).unwrap();
    }
}

/// One cell on `device`.
fn run_stage(device: &Device, cell: &Cell, task: &Task) -> Result<(), Problem> {
    let artifact = |input: &exec::TaskInput| Artifact {
        stage: input.stage.clone(),
        kind: input.kind,
        axes: input.axes.clone(),
        files: input.files.clone(),
    };
    let inputs: BTreeMap<String, Vec<Artifact>> =
        task.inputs.iter().map(|(slot, given)| (slot.clone(), given.iter().map(artifact).collect())).collect();
    let context = Context {
        label: task.label,
        params: task.params,
        inputs: &inputs,
        sources: &task.sources,
        out: task.out,
        work: task.work,
        device: device.clone(),
        remote: &Remote::new(&task.work.join("journal")),
        progress: &Quiet,
        stop: task.stop,
    };
    stage::run(cell.kind.name, &context)
}

/// Nobody watches.
struct Quiet;

impl stage::Progress for Quiet {
    fn begin(&self, _: u64, _: &'static str) {}
    fn at(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn warn(&self, _: &str) {}
}

fn path(path: &Path) -> Value {
    format!("path:{}", path.canonicalize().unwrap().display()).into()
}

/// The objects of a file of lines.
pub fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
