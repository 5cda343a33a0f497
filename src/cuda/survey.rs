//! What NVIDIA's driver shows, and how it says no: starting it, its devices, its errors as problems.
//!
//! `libcuda.so.1` is opened at run time, so the same binary runs where there is none. `cudarc` would panic in its first
//! call, hence the look before it. Errors are told by number and name, for `cudarc`'s own way to print them calls the
//! driver again.

use super::prebuilt;
use super::unit::Capability;
use crate::problem::{Exit, Problem};
use cudarc::driver::DriverError;
use cudarc::driver::result;
use cudarc::driver::sys;

/// As the driver counts: 12.0, which driver 525 brought. Our cubins need no more.
const NEEDED_VERSION: i32 = 12_000;
const NEEDED_DRIVER: u32 = 525;
/// Drivers from this on compile our PTX, which is for devices that we have no cubin for.
pub(super) const NEEDED_FOR_PTX: u32 = 545;
pub(super) const NEEDED_CAPABILITY: Capability = Capability { major: 8, minor: 0 };

/// What the driver shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The version of CUDA that the driver is for: 12.4.
    pub cuda: (u32, u32),
    /// Of the driver itself, `535.104.05`, where the system tells.
    pub driver: Option<String>,
    /// In the driver's order.
    pub devices: Vec<Facts>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// For people: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// What decides which kernels it runs.
    pub capability: Capability,
    /// Of its memory, free or not.
    pub total_bytes: u64,
    /// The architectures of our kernels that it runs, `sm_90a` or, compiled by the driver, `compute_90`; or why
    /// it runs none.
    pub kernels: Result<Vec<&'static str>, Problem>,
}

/// All devices that the driver shows, without taking up any. `Err` as of [`super::open`] if there is no driver to ask.
pub fn survey() -> Result<Shown, Problem> {
    let version = start()?;
    let count = result::device::get_count().map_err(no_start)?;
    let facts = |ordinal: i32| -> Result<Facts, DriverError> {
        let device = result::device::get(ordinal)?;
        let (name, capability) = (result::device::get_name(device)?, capability(device)?);
        // SAFETY: the device is one that the driver named.
        let total_bytes = unsafe { result::device::total_mem(device) }? as u64;
        Ok(Facts { kernels: kernels_for(capability, &name), name, capability, total_bytes })
    };
    let devices = (0..count).map(facts).collect::<Result<Vec<_>, _>>().map_err(no_start)?;
    Ok(Shown { cuda: version, driver: module_version(), devices })
}

/// The architectures that a device takes our units from.
fn kernels_for(capability: Capability, name: &str) -> Result<Vec<&'static str>, Problem> {
    if capability < NEEDED_CAPABILITY {
        return Err(old_device(name, capability));
    }
    let mut archs = Vec::new();
    for unit in prebuilt::units() {
        let arch = unit.blob_for(capability, name)?.arch;
        if !archs.contains(&arch) {
            archs.push(arch);
        }
    }
    Ok(archs)
}

/// `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ...`
fn module_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let dotted = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(dotted).map(String::from)
}

/// Opens the library and starts it. Returns the version of CUDA that it is for.
pub(super) fn start() -> Result<(u32, u32), Problem> {
    // SAFETY: opens and closes the library, as its first use would.
    if !unsafe { sys::is_culib_present() } {
        let help = format!("install NVIDIA's driver, {NEEDED_DRIVER} or later");
        return Err(missing("cuda::no_driver", "there is no CUDA driver: libcuda.so.1 is not found", help));
    }
    let version = driver_is_new_enough()?;
    result::init().map_err(no_start)?;
    Ok(version)
}

pub(super) fn old_device(name: &str, capability: Capability) -> Problem {
    let message = format!("{name} is too old: its compute capability is {capability}, needed is 8.0 or more");
    missing("cuda::old_device", message, "use a GPU of 2020 or later: A100, RTX 30, or newer")
}

/// The driver's error numbers that mean something to us. By number: which names `cudarc` has depends on the
/// version of CUDA that its bindings are for.
pub(super) mod code {
    pub const OUT_OF_MEMORY: u32 = 2;
    pub const STUB_LIBRARY: u32 = 34;
    pub const DEVICE_UNAVAILABLE: u32 = 46;
    pub const NO_DEVICE: u32 = 100;
    pub const UNSUPPORTED_PTX_VERSION: u32 = 222;
    pub const SYSTEM_DRIVER_MISMATCH: u32 = 803;

    /// The device, or the way to it, is broken: uncorrectable memory, NVLink, contained fault, destroyed
    /// context, hardware stack, a system that is not ready.
    pub const LOST: &[u32] = &[214, 220, 226, 709, 714, 802];

    /// Something a kernel did: an illegal address, too many resources, a time-out, an assertion, an illegal
    /// instruction, a misaligned address, a wrong address space or program counter, anything else.
    pub const KERNEL: &[u32] = &[700, 701, 702, 710, 715, 716, 717, 718, 719];
}

/// `CUDA_ERROR_NO_DEVICE`.
pub(super) fn error_name(error: DriverError) -> String {
    format!("{:?}", error.0)
}

fn driver_is_new_enough() -> Result<(u32, u32), Problem> {
    let mut version = 0;
    // SAFETY: writes the number, and needs nothing to have been started.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(no_start)?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if version >= NEEDED_VERSION {
        return Ok((major as u32, minor as u32));
    }
    let message = format!("the CUDA driver is too old: it is for CUDA {major}.{minor}, needed is 12.0");
    let help = format!("install driver {NEEDED_DRIVER} or later; `nvidia-smi` shows which is there");
    Err(missing("cuda::old_driver", message, help))
}

pub(super) fn capability(device: sys::CUdevice) -> Result<Capability, DriverError> {
    use sys::CUdevice_attribute_enum as Attribute;
    // SAFETY: the device is one that the driver named.
    let number = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    Ok(Capability {
        major: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
        minor: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
    })
}

/// The driver's answer before there is a device.
pub(super) fn no_start(error: DriverError) -> Problem {
    let (message, help) = match error.0 as u32 {
        code::NO_DEVICE => return no_device("the CUDA driver shows no device"),
        code::STUB_LIBRARY => (
            "there is no CUDA driver: the libcuda.so.1 that is found is the toolkit's stub".to_string(),
            "install NVIDIA's driver, or take the toolkit's `stubs` folder out of LD_LIBRARY_PATH",
        ),
        code::SYSTEM_DRIVER_MISMATCH => (
            "the CUDA driver's library and its kernel module are of different versions".to_string(),
            "restart the machine after an update of the driver",
        ),
        _ => (
            format!("the CUDA driver does not start: {}", error_name(error)),
            "`nvidia-smi` says whether the driver works at all",
        ),
    };
    missing("cuda::no_driver", message, help)
}

pub(super) fn no_device(message: impl Into<String>) -> Problem {
    let help = "`nvidia-smi -L` lists the devices; CUDA_VISIBLE_DEVICES and a container's options hide some";
    missing("cuda::no_device", message, help)
}

pub(super) fn out_of_memory(name: &str) -> Problem {
    let help = "make batches smaller, or end what else uses the device: `nvidia-smi` lists it";
    missing("cuda::out_of_memory", format!("{name} has not enough free memory"), help)
}

/// All of these have a way out.
pub(super) fn missing(code: &'static str, message: impl Into<String>, help: impl Into<String>) -> Problem {
    Problem::new(code, message).help(help).help("or run on the CPU: `--device cpu`").exit(Exit::Missing)
}
