//! A study as its user would write it: a manifest and data files in a folder, run and exported by the program.

use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A manifest in the making, in a folder of its own.
pub struct Study {
    folder: tempfile::TempDir,
    manifest: String,
}

impl Study {
    /// With the stage `base`: a model folder.
    pub fn of(model: &Path) -> Study {
        let manifest = "manifest = 1\ntitle = \"goldens\"\n".to_string();
        let mut study = Study { folder: tempfile::tempdir().unwrap(), manifest };
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
        self.pipe(&["run", "m.toml", "-q"]);
    }

    /// `pipe export` of one stage: the folder it was written to.
    pub fn export(&self, stage: &str, flags: &[&str]) -> PathBuf {
        let name = format!("export-{stage}{}", flags.concat()).replace(['[', ']', '='], "-");
        self.pipe(&[&["export", "m.toml", stage, &name], flags].concat());
        self.folder.path().join(name)
    }

    fn pipe(&self, arguments: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        let output = command.args(arguments).current_dir(self.folder.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "pipe {arguments:?}\n{stderr}\n{}", self.manifest);
    }
}

fn path(path: &Path) -> Value {
    format!("path:{}", path.canonicalize().unwrap().display()).into()
}

/// The objects of a file of lines.
pub fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
