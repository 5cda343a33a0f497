//! Numbers of another implementation, when there are some: walks the folder that `PIPE_GOLDENS` names and prints
//! one line per golden (largest difference, bound). Without the variable it says so and passes.

mod model;
mod optimizer;

use pipe::train::Curve;
use safetensors::{Dtype, SafeTensors};
use std::path::PathBuf;

/// The folder of golden data, or a printed note that there is none.
fn goldens() -> Option<PathBuf> {
    let folder = std::env::var_os("PIPE_GOLDENS").map(PathBuf::from).filter(|folder| folder.is_dir());
    if folder.is_none() {
        println!("PIPE_GOLDENS names no folder: nothing is compared");
    }
    folder
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
        println!("{:4} {what:64} {difference:10.3e}  bound {bound:8.1e}", if pass { "ok" } else { "FAIL" });
        if !pass {
            self.failed.push(what.to_string());
        }
    }

    fn done(self) {
        assert!(self.failed.is_empty(), "out of bounds: {:#?}", self.failed);
    }
}
