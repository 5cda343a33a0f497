//! Kernels compiled while the program runs, for whoever works on them: `PIPE_KERNELS_JIT=DIR`, the folder with
//! the `.cu` files, takes their text as it is in place of what is embedded.
//!
//! NVIDIA's NVRTC compiles them, found in `NVRTC_DIR`, a toolkit or where the system looks for libraries, and for
//! exactly the device's architecture; otherwise with the options of what is shipped, so that the same text gives
//! the same code. A unit is compiled when its first kernel is launched and then kept in the user's cache folder,
//! under the digest of its sources, options and the compiler's version.

use super::nvrtc::{self, Nvrtc};
use super::prebuilt;
use super::unit::Capability;
use super::units::{self, Unit};
use crate::problem::{Exit, Problem};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What asks for it.
pub const VARIABLE: &str = "PIPE_KERNELS_JIT";

/// Folders that may hold a toolkit, by the variables that name them, and where it is installed without asking.
const TOOLKITS: [&str; 2] = ["CUDA_HOME", "CUDA_PATH"];
const TOOLKIT: &str = "/usr/local/cuda";
/// Names under which the system may know the library; the newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// A folder of kernels, as it was when this was opened, and their compiler.
pub struct Jit {
    folder: PathBuf,
    units: Vec<Unit>,
    nvrtc: Nvrtc,
    version: String,
    cache: Option<PathBuf>,
    /// Cubins by unit and architecture, as `rmsnorm.sm_90a`.
    made: Mutex<BTreeMap<String, Arc<Vec<u8>>>>,
}

impl Jit {
    /// As the environment asks for; `None` if it does not.
    pub fn of_environment() -> Result<Option<Jit>, Problem> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let Some(folder) = variable(VARIABLE) else { return Ok(None) };
        let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
        let cache = cache.map(|cache| cache.join("pipe").join("kernels"));
        Jit::open(&folder, variable("NVRTC_DIR").as_deref(), cache).map(Some)
    }

    /// The kernels of `folder`, compiled by the NVRTC in `compiler` or by the one that is found, and kept in `cache`.
    pub fn open(folder: &Path, compiler: Option<&Path>, cache: Option<PathBuf>) -> Result<Jit, Problem> {
        let units = units::read(folder, folder).map_err(|wrong| {
            let message = format!("{VARIABLE} names `{}`, which is no folder of kernels", folder.display());
            let help = "name the `kernels` folder of the sources: it has `manifest.toml` and the `.cu` files";
            wrong.into_iter().fold(unset(Problem::new("cuda::jit", message).help(help)), Problem::note)
        })?;
        let found = compiler.map_or_else(find, |folder| Nvrtc::open(folder).map_err(|error| vec![error]));
        let opened = found.and_then(|nvrtc| Ok((nvrtc.version().map_err(|error| vec![error])?, nvrtc)));
        let (version, nvrtc) = opened.map_err(|wrong| {
            let message = format!("{VARIABLE} is set, and NVRTC, which compiles kernels, does not open");
            let wheel = format!("nvidia-cuda-nvrtc-cu12=={}", units::NVRTC_VERSION);
            let help = format!("`pip install --target FOLDER {wheel}`, then NVRTC_DIR=FOLDER");
            wrong.into_iter().fold(unset(Problem::new("cuda::jit", message).help(help)), Problem::note)
        })?;
        Ok(Jit { folder: folder.to_path_buf(), units, nvrtc, version, cache, made: Mutex::default() })
    }

    /// The name of the unit that holds a kernel.
    pub fn unit_of(&self, kernel: &str, capability: Capability) -> Result<String, Problem> {
        // Where it is in what is embedded, it most likely still is. Elsewhere the compiler has to say, for a name
        // may be put together by the preprocessor.
        let likely = prebuilt::unit_of(kernel).map(|unit| unit.name).unwrap_or_default();
        let (first, others): (Vec<&Unit>, _) = self.units.iter().partition(|unit| unit.name == likely);
        for unit in first.into_iter().chain(others).filter(|unit| is_for(unit, capability)) {
            if holds(&self.compiled(unit, capability)?, kernel) {
                return Ok(unit.name.clone());
            }
        }
        let message = format!("no kernel `{kernel}` in the `.cu` files of `{}`", self.folder.display());
        Err(unset(
            Problem::new("cuda::no_kernel", message).note(format!("for a device of compute capability {capability}")),
        ))
    }

    /// The cubin of a unit.
    pub fn image(&self, unit: &str, capability: Capability) -> Result<Arc<Vec<u8>>, Problem> {
        let named = self.units.iter().find(|candidate| candidate.name == unit);
        self.compiled(named.expect("a name that `unit_of` gave"), capability)
    }

    fn compiled(&self, unit: &Unit, capability: Capability) -> Result<Arc<Vec<u8>>, Problem> {
        let arch = exact(capability);
        let name = format!("{}.{arch}", unit.name);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = made.get(&name) {
            return Ok(image.clone());
        }
        let image = Arc::new(self.kept_or_made(unit, &arch)?);
        made.insert(name, image.clone());
        Ok(image)
    }

    fn kept_or_made(&self, unit: &Unit, arch: &str) -> Result<Vec<u8>, Problem> {
        let kept = self.cache.as_ref().map(|cache| {
            let digest = unit.fingerprint_by(&self.version, arch);
            cache.join(format!("{}.{arch}.{digest}.cubin", unit.name))
        });
        // What is not a cubin, whatever happened to it, is made again.
        let there = kept.as_ref().and_then(|path| std::fs::read(path).ok());
        if let Some(image) = there.filter(|image| image.starts_with(b"\x7fELF")) {
            return Ok(image);
        }
        let started = Instant::now();
        let output = self.nvrtc.compile(&unit.file, &unit.sources, &unit.options(arch), false).map_err(|log| {
            let message = format!("`{}` does not compile for {arch}", self.folder.join(&unit.file).display());
            unset(Problem::new("cuda::jit", message).note(format!("NVRTC {}: {log}", self.version)))
        })?;
        tracing::info!(unit = unit.name, arch, seconds = started.elapsed().as_secs_f32(), "kernels compiled");
        tracing::debug!("{}", nvrtc::text(output.log.into_bytes()));
        if let Some(path) = &kept
            && let Err(error) = keep(path, &output.bytes)
        {
            // It only costs the time to compile again.
            tracing::debug!("cannot keep `{}`: {error}", path.display());
        }
        Ok(output.bytes)
    }
}

/// A way out that all of these have.
fn unset(problem: Problem) -> Problem {
    problem.help(format!("or unset {VARIABLE}, and the embedded kernels run")).exit(Exit::Missing)
}

/// The compiler where toolkits are, or where the system looks; or all that was tried.
fn find() -> Result<Nvrtc, Vec<String>> {
    let named = TOOLKITS.iter().filter_map(std::env::var_os).map(PathBuf::from);
    let mut tried = Vec::new();
    for folder in named.chain([PathBuf::from(TOOLKIT)]) {
        match Nvrtc::open(&folder) {
            Ok(nvrtc) => return Ok(nvrtc),
            Err(error) => tried.push(error),
        }
    }
    for name in NAMES {
        // Installed for the system, it finds its built-in headers beside itself.
        match nvrtc::library(Path::new(name)).and_then(|library| Nvrtc::of(library, None)) {
            Ok(nvrtc) => return Ok(nvrtc),
            Err(error) => tried.push(error),
        }
    }
    Err(tried)
}

/// The architecture with all its own instructions, which from 9.0 on have a letter.
fn exact(Capability { major, minor }: Capability) -> String {
    format!("sm_{}{}", 10 * major + minor, if major >= 9 { "a" } else { "" })
}

/// Whether a unit is made for such a device: for it alone, or for devices in general.
fn is_for(unit: &Unit, capability: Capability) -> bool {
    let own = exact(capability);
    unit.archs.iter().any(|arch| *arch == own || arch.ends_with(|last: char| last.is_ascii_digit()))
}

/// Whether a cubin has the kernel's code: a section of its name.
fn holds(cubin: &[u8], kernel: &str) -> bool {
    let section = format!(".text.{kernel}\0");
    cubin.windows(section.len()).any(|window| window == section.as_bytes())
}

/// Under another name until it is whole.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().expect("a file in a folder");
    std::fs::create_dir_all(folder)?;
    let unfinished = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(unfinished.path(), bytes)?;
    unfinished.persist(path)?;
    Ok(())
}
