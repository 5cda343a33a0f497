//! What is to be compiled: units, for which architectures, from which sources.
//!
//! A unit is one `.cu` under one set of definitions; it becomes one cubin for each architecture. Every `.cu`
//! of `kernels/` is a unit of its own name, unless `kernels/manifest.toml` names variants of it.
//!
//! Two compile with this: `cargo xtask kernels`, a package of its own that includes the file, for what is shipped,
//! and `jit.rs` at run time for whoever works on kernels. Nothing here needs a compiler, so the tests see with it
//! whether what is committed was made from the sources that are there.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The compiler, pinned: its version is part of every fingerprint, since another one gives other bytes.
/// 12.9 knows every architecture we ship and its cubins load with drivers from 525 on.
pub const NVRTC_VERSION: &str = "12.9.86";

/// What the PTX says it needs is lowered to this: 12.9 writes 8.8, which only drivers from 575 on accept,
/// while nothing in the kernels is newer than 8.3 (drivers from 545 on). `ptxas` is asked in the check.
pub const PTX_VERSION: &str = "8.3";

const OPTIONS: &[&str] = &["--std=c++17", "-default-device", "--ptxas-options=-v"];

/// `kernels/manifest.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    archs: Vec<String>,
    #[serde(default)]
    kernels: BTreeMap<String, Entry>,
    #[serde(default)]
    shared: BTreeMap<String, u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Instead of those at the top.
    archs: Option<Vec<String>>,
    /// Name of the variant -> what is defined for it, as `NAME=VALUE`.
    #[serde(default)]
    variants: BTreeMap<String, Vec<String>>,
    /// The most registers a thread of any of its kernels may take.
    registers: Option<u32>,
    /// Instructions that each of its cubins must contain.
    #[serde(default)]
    expect: Vec<String>,
}

/// What is compiled together, from which text and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// `<stem>` or `<stem>-<variant>`.
    pub name: String,
    /// The file in `kernels/`.
    pub file: String,
    /// As `NAME=VALUE`.
    pub definitions: Vec<String>,
    /// `sm_..` become cubins, `compute_..` PTX.
    pub archs: Vec<String>,
    /// The most registers a thread of any of its kernels may take.
    pub registers: Option<u32>,
    /// Instructions that each of its cubins must contain.
    pub expect: Vec<String>,
    /// The file and whatever of `kernels/` it includes: name -> text.
    pub sources: BTreeMap<String, String>,
}

impl Unit {
    /// What the compiler is told.
    pub fn options(&self, arch: &str) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={arch}")];
        options.extend(OPTIONS.iter().map(ToString::to_string));
        options.extend(self.definitions.iter().map(|definition| format!("-D{definition}")));
        options
    }

    /// Equal fingerprints, equal output of the pinned compiler.
    pub fn fingerprint(&self, arch: &str) -> String {
        self.fingerprint_by(NVRTC_VERSION, arch)
    }

    /// The same for another version of the compiler.
    pub fn fingerprint_by(&self, version: &str, arch: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        // Each part after its length, or two different lists could read the same.
        let mut part = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        part(version);
        part(if is_ptx(arch) { PTX_VERSION } else { "" });
        let options = self.options(arch);
        part(&options.len().to_string());
        options.iter().for_each(|option| part(option));
        part(&self.file);
        for (name, text) in &self.sources {
            part(name);
            part(text);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The file in `kernels/prebuilt/`.
    pub fn blob(&self, arch: &str) -> String {
        format!("{}.{arch}.{}.zst", self.name, if is_ptx(arch) { "ptx" } else { "cubin" })
    }
}

/// Whether this architecture's form is PTX, which the driver compiles.
pub fn is_ptx(arch: &str) -> bool {
    arch.starts_with("compute_")
}

/// All units of a folder of kernels, by name; or everything that is wrong with its manifest. Headers that are not
/// beside the kernels are looked for in `headers`.
pub fn read(kernels: &Path, headers: &Path) -> Result<Vec<Unit>, Vec<String>> {
    let manifest_path = kernels.join("manifest.toml");
    let manifest = manifest(&manifest_path).map_err(|wrong| vec![wrong])?;
    let stems: BTreeSet<String> = fs::read_dir(kernels)
        .map_err(|error| vec![format!("{}: {error}", kernels.display())])?
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".cu")?.to_string()))
        .collect();
    let mut wrong = Vec::new();
    for stem in manifest.kernels.keys().filter(|stem| !stems.contains(*stem)) {
        wrong.push(format!("{}: there is no `{stem}.cu`", manifest_path.display()));
    }
    let mut units = Vec::new();
    for stem in stems {
        let nothing = Entry::default();
        let entry = manifest.kernels.get(&stem).unwrap_or(&nothing);
        let file = format!("{stem}.cu");
        let mut sources = BTreeMap::new();
        if let Err(problem) = gather([kernels, headers], &file, &mut sources) {
            wrong.push(problem);
            continue;
        }
        let unit = |name: String, definitions: &[String]| Unit {
            name,
            file: file.clone(),
            definitions: definitions.to_vec(),
            archs: entry.archs.as_ref().unwrap_or(&manifest.archs).clone(),
            registers: entry.registers,
            expect: entry.expect.clone(),
            sources: sources.clone(),
        };
        if entry.variants.is_empty() {
            units.push(unit(stem, &[]));
        } else {
            units.extend(entry.variants.iter().map(|(name, definitions)| unit(format!("{stem}-{name}"), definitions)));
        }
    }
    if wrong.is_empty() { Ok(units) } else { Err(wrong) }
}

/// Kernel -> the most dynamic shared memory that a launch of it asks for, in bytes, as the manifest of a folder says.
pub fn shared(kernels: &Path) -> Result<BTreeMap<String, u32>, String> {
    manifest(&kernels.join("manifest.toml")).map(|manifest| manifest.shared)
}

fn manifest(path: &Path) -> Result<Manifest, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    toml::from_str(&text).map_err(|error| format!("{}: {}", path.display(), error.to_string().trim_end()))
}

/// Adds `file`, of the first of the folders that has it, and what it includes. An include that is in none belongs to
/// the emulated side, which the compiler skips; if it does not, it says so itself.
fn gather(folders: [&Path; 2], file: &str, sources: &mut BTreeMap<String, String>) -> Result<(), String> {
    let path = folders.map(|folder| folder.join(file)).into_iter().find(|path| path.is_file());
    let Some(path) = path else { return Ok(()) };
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let included: Vec<String> = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include"))
        .filter_map(|rest| Some(rest.trim_start().strip_prefix('"')?.split_once('"')?.0.to_string()))
        .collect();
    sources.insert(file.to_string(), text);
    for name in included {
        if !sources.contains_key(&name) {
            gather(folders, &name, sources)?;
        }
    }
    Ok(())
}
