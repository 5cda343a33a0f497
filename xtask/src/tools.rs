//! Where NVIDIA's tools come from: wheels of the Python package index, unpacked below `target/nvrtc/`.

use crate::units::NVRTC_VERSION;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A wheel that can be fetched.
struct Wheel {
    package: &'static str,
    version: &'static str,
}

const NVRTC: Wheel = Wheel { package: "nvidia-cuda-nvrtc-cu12", version: NVRTC_VERSION };
const PTXAS: Wheel = Wheel { package: "nvidia-cuda-nvcc-cu12", version: NVRTC_VERSION };
/// The oldest there is; it reads cubins of 12.9.
const NVDISASM: Wheel = Wheel { package: "nvidia-cuda-nvdisasm", version: "13.2.78" };

/// The folder with the compiler's library: `NVRTC_DIR`, or the wheel.
pub fn nvrtc(root: &Path) -> Result<PathBuf, String> {
    match std::env::var_os("NVRTC_DIR") {
        Some(folder) => Ok(folder.into()),
        None => NVRTC.fetch(root).map_err(|error| {
            format!(
                "{error}\nor unpack NVRTC {NVRTC_VERSION} anywhere and say where: NVRTC_DIR=/folder/with/libnvrtc.so"
            )
        }),
    }
}

/// NVIDIA's assembler, which tells whether PTX is valid.
pub fn ptxas(root: &Path) -> Result<PathBuf, String> {
    PTXAS.fetch(root).map(|folder| folder.join("nvidia/cuda_nvcc/bin/ptxas"))
}

/// NVIDIA's disassembler.
pub fn nvdisasm(root: &Path) -> Result<PathBuf, String> {
    NVDISASM.fetch(root).map(|folder| folder.join("nvidia/cu13/bin/nvdisasm"))
}

impl Wheel {
    /// The folder it is unpacked in, which is filled if it is not there.
    fn fetch(&self, root: &Path) -> Result<PathBuf, String> {
        let Wheel { package, version } = self;
        let folder = root.join("target/nvrtc").join(format!("{package}-{version}"));
        if folder.is_dir() {
            return Ok(folder);
        }
        eprintln!("fetching {package} {version} ...");
        // Under another name until it is whole.
        let unfinished = folder.with_extension("unfinished");
        let _ = std::fs::remove_dir_all(&unfinished);
        let arguments = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"];
        let requirement = format!("{package}=={version}");
        let typed = format!("python3 {} {} {requirement}", arguments.join(" "), folder.display());
        let output = Command::new("python3").args(arguments).arg(&unfinished).arg(&requirement).output();
        let why = match output {
            Ok(output) if output.status.success() => {
                std::fs::rename(&unfinished, &folder).map_err(|error| format!("{}: {error}", folder.display()))?;
                return Ok(folder);
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim_end().to_string(),
            Err(error) => format!("python3: {error}"),
        };
        Err(format!("cannot fetch {package} {version}: {why}\nwhere Python has pip, type\n  {typed}"))
    }
}
