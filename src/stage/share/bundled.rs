//! Small models, their tokenizer and problems for them that come inside the program, so that a first run
//! needs no download. `pipelines/mini-base.toml` makes the weights again.

use crate::digest::{Digest, Encoder};
use crate::files::Files;
use crate::problem::Problem;
use std::fs;
use std::path::Path;

/// Names after `init:`.
pub const MODELS: &[&str] = &["mini-3B", "mini-7B", "mini-14B", "mini-teacher"];

/// Datasets after `init:`, JSON Lines.
pub const DATASETS: &[(&str, &[u8])] = &[
    ("mini-math500", include_bytes!("../../../pipelines/mini/math500.jsonl")),
    ("mini-aime24", include_bytes!("../../../pipelines/mini/aime24.jsonl")),
    ("mini-gpqa-diamond", include_bytes!("../../../pipelines/mini/gpqa-diamond.jsonl")),
];

/// The bundled dataset of that name.
pub fn dataset(name: &str) -> Option<&'static [u8]> {
    DATASETS.iter().find_map(|(known, bytes)| (*known == name).then_some(*bytes))
}

/// Files to be written: from memory or from a folder.
pub enum Bundle {
    /// Names and bytes, inside the program.
    Embedded(Vec<(&'static str, &'static [u8])>),
    /// Files that lie somewhere, to be copied.
    Folder(Files),
}

macro_rules! embedded {
    ($($name:literal => $path:expr),* $(,)?) => {
        Bundle::Embedded(vec![$(($name, include_bytes!(concat!("../../../pipelines/mini/", $path)).as_slice())),*])
    };
}

/// The bundled tokenizer of that name.
pub fn tokenizer(name: &str) -> Option<Bundle> {
    (name == "mini").then(|| {
        embedded! {
            "tokenizer.json" => "tokenizer/tokenizer.json",
            "tokenizer_config.json" => "tokenizer/tokenizer_config.json",
        }
    })
}

/// The bundled model of that name, tokenizer included.
pub fn model(name: &str) -> Option<Bundle> {
    let Some(Bundle::Embedded(mut files)) = weights(name) else { return None };
    if let Some(Bundle::Embedded(tokenizer)) = tokenizer("mini") {
        files.extend(tokenizer);
    }
    Some(Bundle::Embedded(files))
}

macro_rules! weights {
    ($name:literal) => {
        embedded! {
            "config.json" => concat!("models/", $name, "/config.json"),
            "model.safetensors" => concat!("models/", $name, "/model.safetensors"),
        }
    };
}

fn weights(name: &str) -> Option<Bundle> {
    Some(match name {
        "mini-3B" => weights!("mini-3B"),
        "mini-7B" => weights!("mini-7B"),
        "mini-14B" => weights!("mini-14B"),
        "mini-teacher" => weights!("mini-teacher"),
        _ => return None,
    })
}

/// The bytes of one file of a bundled model.
pub fn file(name: &str, file: &str) -> Option<&'static [u8]> {
    let Bundle::Embedded(files) = model(name)? else { return None };
    files.into_iter().find_map(|(there, bytes)| (there == file).then_some(bytes))
}

/// One more than the largest id of a bundled tokenizer.
pub fn id_limit(name: &str) -> Option<usize> {
    let Bundle::Embedded(files) = tokenizer(name)? else { return None };
    let (_, bytes) = files.into_iter().find(|(there, _)| *there == "tokenizer.json")?;
    crate::data::tokenizer::id_limit(bytes)
}

/// What is bundled under a source's text (`init:mini-3B`, `init:mini` for the tokenizer, `init:mini-aime24`), by content.
pub fn digest(text: &str) -> Option<Digest> {
    let name = text.strip_prefix("init:")?;
    if let Some(bytes) = dataset(name) {
        return Some(Digest::of(bytes));
    }
    let Bundle::Embedded(files) = model(name).or_else(|| tokenizer(name))? else { return None };
    let mut encoder = Encoder::new("pipe bundle 1");
    for (name, bytes) in files {
        encoder.field(name.as_bytes()).field(Digest::of(bytes).as_bytes());
    }
    Some(encoder.finish())
}

impl Bundle {
    /// Writes the files whose name `keep` accepts into `out`. Folders are linked where the system
    /// can (copy-on-write), copied otherwise: a later change of the original must not reach ours.
    pub fn write(&self, out: &Path, keep: impl Fn(&str) -> bool) -> Result<(), Problem> {
        let put = |name: &str, write: &dyn Fn(&Path) -> std::io::Result<()>| {
            let path = out.join(name);
            write(&path).map_err(|error| Problem::io("model::unwritable", "write", &path, &error))
        };
        match self {
            Bundle::Embedded(files) => {
                for (name, bytes) in files.iter().filter(|(name, _)| keep(name)) {
                    put(name, &|path| fs::write(path, bytes))?;
                }
            }
            Bundle::Folder(files) => {
                for (name, from) in files.iter().filter(|(name, _)| keep(name)) {
                    put(name, &|path| fs::copy(from, path).map(drop))?;
                }
            }
        }
        Ok(())
    }
}
