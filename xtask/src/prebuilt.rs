//! What is committed: `prebuilt/*.zst` beside the kernels, its `index.toml`, and the table through which it is embedded:
//! of `kernels/` in `pipe`, of `tests/conformance/` in that test.

use crate::compile::{Compiled, Resources};
use crate::units::{NVRTC_VERSION, Unit};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Unit -> architecture -> what was made.
pub type Made = BTreeMap<String, BTreeMap<String, Entry>>;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub fingerprint: String,
    /// Before compression.
    pub bytes: usize,
    pub kernels: BTreeMap<String, Resources>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(flatten)]
    units: Made,
}

impl Entry {
    pub fn new(unit: &Unit, arch: &str, compiled: &Compiled) -> Entry {
        Entry { fingerprint: unit.fingerprint(arch), bytes: compiled.bytes.len(), kernels: compiled.kernels.clone() }
    }
}

/// A folder of kernels and what is generated from it.
pub struct Prebuilt {
    pub sources: PathBuf,
    pub folder: PathBuf,
    table: PathBuf,
    /// From the table to the folder.
    embedded: &'static str,
    /// How the table begins.
    types: &'static str,
    visibility: &'static str,
}

impl Prebuilt {
    /// Those of a repository.
    pub fn all(root: &Path) -> [Prebuilt; 2] {
        let ours = root.join("kernels");
        let tests = root.join("tests/conformance");
        [
            Prebuilt {
                folder: ours.join("prebuilt"),
                sources: ours,
                table: root.join("src/cuda/prebuilt_table.rs"),
                embedded: "../../kernels/prebuilt/",
                types: "super::unit",
                visibility: "pub(super) ",
            },
            Prebuilt {
                folder: tests.join("prebuilt"),
                table: tests.join("prebuilt_table.rs"),
                sources: tests,
                embedded: "prebuilt/",
                types: "pipe::cuda::prebuilt",
                visibility: "pub ",
            },
        ]
    }

    /// What the index says was made; nothing where there is no index, or an unreadable one.
    pub fn made(&self) -> Made {
        let text = fs::read_to_string(self.folder.join("index.toml")).unwrap_or_default();
        toml::from_str::<Index>(&text).map(|index| index.units).unwrap_or_default()
    }

    /// A cubin or PTX, unpacked.
    pub fn blob(&self, name: &str) -> Result<Vec<u8>, String> {
        let path = self.folder.join(name);
        let packed = fs::read(&path).map_err(|error| format!("{name}: {error}"))?;
        zstd::decode_all(packed.as_slice()).map_err(|error| format!("{name}: {error}"))
    }

    pub fn has(&self, name: &str) -> bool {
        self.folder.join(name).is_file()
    }

    /// Size of a file as it is committed and embedded.
    pub fn packed_bytes(&self, name: &str) -> u64 {
        fs::metadata(self.folder.join(name)).map_or(0, |metadata| metadata.len())
    }

    pub fn write_blob(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        // The highest ordinary level: it is packed once and read by everyone.
        let packed = zstd::encode_all(bytes, 19).map_err(|error| format!("{name}: {error}"))?;
        fs::create_dir_all(&self.folder).map_err(|error| format!("{}: {error}", self.folder.display()))?;
        fs::write(self.folder.join(name), packed).map_err(|error| format!("{name}: {error}"))
    }

    /// Files in the folder that nothing stands for.
    pub fn strays(&self, units: &[Unit]) -> Vec<String> {
        let mut known: BTreeSet<String> = BTreeSet::from(["index.toml".to_string()]);
        known.extend(units.iter().flat_map(|unit| unit.archs.iter().map(|arch| unit.blob(arch))));
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut strays: Vec<String> = files
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|file| !known.contains(file))
            .collect();
        strays.sort();
        strays
    }

    pub fn remove(&self, name: &str) -> Result<(), String> {
        fs::remove_file(self.folder.join(name)).map_err(|error| format!("{name}: {error}"))
    }

    /// Writes index and table.
    pub fn write(&self, units: &[Unit], made: &Made) -> Result<(), String> {
        let write = |path: &Path, text: String| {
            fs::create_dir_all(path.parent().expect("a file in a folder"))
                .and_then(|()| fs::write(path, text))
                .map_err(|error| format!("{}: {error}", path.display()))
        };
        write(&self.folder.join("index.toml"), index(made))?;
        write(&self.table, self.table_text(units, made))
    }

    /// Whether index and table say this; what does not.
    pub fn compare(&self, units: &[Unit], made: &Made) -> Vec<String> {
        let same = |path: &Path, text: String| fs::read_to_string(path).is_ok_and(|there| there == text);
        let mut wrong = Vec::new();
        if !same(&self.folder.join("index.toml"), index(made)) {
            wrong.push(format!("{}/index.toml is not what the kernels give", self.folder.display()));
        }
        if !same(&self.table, self.table_text(units, made)) {
            wrong.push(format!("{} is not what the kernels give", self.table.display()));
        }
        wrong
    }

    /// Rust that embeds the blobs, so that building `pipe` needs neither this tool nor a compiler of kernels.
    fn table_text(&self, units: &[Unit], made: &Made) -> String {
        let Prebuilt { embedded, types, visibility, .. } = self;
        let mut text = format!(
            "//! Generated by `cargo xtask kernels`: the compiled kernels, embedded.\n\n\
             use {types}::{{Blob, Unit}};\n\n\
             #[rustfmt::skip]\n{visibility}const UNITS: &[Unit] = &[\n"
        );
        for unit in units {
            let Some(archs) = made.get(&unit.name) else { continue };
            let kernels: BTreeSet<&String> = archs.values().flat_map(|entry| entry.kernels.keys()).collect();
            let _ = writeln!(text, "    Unit {{\n        name: {:?},\n        kernels: &[", unit.name);
            for kernel in kernels {
                let _ = writeln!(text, "            {kernel:?},");
            }
            let _ = writeln!(text, "        ],\n        blobs: &[");
            for arch in unit.archs.iter().filter(|arch| archs.contains_key(*arch)) {
                let file = unit.blob(arch);
                let embedded = format!("include_bytes!(\"{embedded}{file}\")");
                let _ = writeln!(text, "            Blob {{ arch: {arch:?}, packed: {embedded} }},");
            }
            let _ = writeln!(text, "        ],\n    }},");
        }
        text.push_str("];\n");
        text
    }
}

fn index(made: &Made) -> String {
    let mut text = String::from(
        "# Generated by `cargo xtask kernels`: what was compiled from what, and what it takes per thread\n",
    );
    let _ = writeln!(
        text,
        "# (registers, bytes of spills and stack) and per block (static shared memory). NVRTC {NVRTC_VERSION}."
    );
    for (unit, archs) in made {
        for (arch, entry) in archs {
            let _ =
                writeln!(text, "\n[{unit}.{arch}]\nfingerprint = \"{}\"\nbytes = {}", entry.fingerprint, entry.bytes);
            let _ = writeln!(text, "\n[{unit}.{arch}.kernels]");
            for (name, Resources { registers, spills, stack, shared }) in &entry.kernels {
                let resources = match registers {
                    0 => "{}".to_string(),
                    _ => {
                        format!("{{ registers = {registers}, spills = {spills}, stack = {stack}, shared = {shared} }}")
                    }
                };
                let _ = writeln!(text, "{name} = {resources}");
            }
        }
    }
    text
}
