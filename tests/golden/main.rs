//! Numbers of another implementation: walks `tests/golden/data` and the folder that `PIPE_GOLDENS` names, if it
//! does, and prints one line per golden (largest difference, bound). What a model computes is compared twice: on the
//! processor, and through the CUDA kernels, on the emulator or, with `PIPE_TEST_GPU=1`, on a GPU.
//!
//!     cargo test --release --test golden

mod bf16;
mod model;
mod optimizer;
mod study;
#[path = "../kernels/support.rs"]
mod support;

use pipe::train::Curve;
use safetensors::{Dtype, SafeTensors};
use std::io::Write;
use std::path::PathBuf;

/// Where goldens lie: the project's own, and those of `PIPE_GOLDENS`.
fn roots() -> Vec<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
    let other = std::env::var_os("PIPE_GOLDENS").map(PathBuf::from);
    if other.is_none() {
        println!("PIPE_GOLDENS names no folder: only the project's own goldens are compared");
    }
    [own].into_iter().chain(other).collect()
}

/// Every folder in them, whatever its name.
fn folders() -> Vec<PathBuf> {
    let below = |root: PathBuf| {
        let entries = std::fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        let mut folders: Vec<PathBuf> =
            entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
        folders.sort();
        folders
    };
    roots().into_iter().flat_map(below).collect()
}

fn json(path: PathBuf) -> serde_json::Value {
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// A scheduler by its name in transformers.
fn curve(name: &serde_json::Value, cycles: &serde_json::Value) -> Curve {
    match name.as_str().unwrap() {
        "constant" | "constant_with_warmup" => Curve::Constant,
        "linear" => Curve::Linear,
        "cosine" => Curve::Cosine,
        "cosine_with_restarts" => Curve::CosineRestarts { cycles: cycles.as_f64().unwrap() },
        other => panic!("a scheduler `{other}` in the goldens"),
    }
}

/// A safetensors file, read by the format's own crate.
struct Golden(Vec<u8>);

impl Golden {
    fn open(path: PathBuf) -> Golden {
        Golden(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.file().names().into_iter().map(str::to_string).collect();
        names.sort();
        names
    }

    fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).unwrap().shape().to_vec()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        match tensor.dtype() {
            Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::BF16 => {
                tensor.data().as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let file = self.file();
        let data = file.tensor(name).unwrap().data();
        data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
    }

    fn u8(&self, name: &str) -> Vec<u8> {
        self.file().tensor(name).unwrap().data().to_vec()
    }
}

/// The largest absolute difference; NaN if there is one.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut max = 0.0f64;
    for (a, b) in a.iter().zip(b) {
        let difference = f64::from((a - b).abs());
        if difference.is_nan() {
            return f64::NAN;
        }
        max = max.max(difference);
    }
    max
}

/// Largest |a - b| beyond `relative` of |b|; NaN if there is one.
fn beyond(a: &[f32], b: &[f32], relative: f64) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut worst = 0.0f64;
    for (a, b) in a.iter().zip(b) {
        let over = f64::from((a - b).abs()) - relative * f64::from(b.abs());
        if over.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(over);
    }
    worst
}

/// Prints the line of one golden and counts it as failed when out of bounds.
struct Report {
    failed: Vec<String>,
}

impl Report {
    fn new() -> Report {
        Report { failed: Vec::new() }
    }

    fn line(&mut self, what: &str, difference: f64, bound: f64) {
        let pass = difference <= bound;
        // Past the test harness, which shows what a test prints only when it fails.
        let word = if pass { "ok" } else { "FAIL" };
        let line = format!("{word:4} {what:64} {difference:10.3e}  bound {bound:8.1e}\n");
        std::io::stdout().write_all(line.as_bytes()).expect("stdout is there");
        if !pass {
            self.failed.push(what.to_string());
        }
    }

    fn done(self) {
        assert!(self.failed.is_empty(), "out of bounds: {:#?}", self.failed);
    }
}
