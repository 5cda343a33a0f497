//! The compiled kernels that are part of the library: `cargo xtask kernels` makes them from `kernels/*.cu` and writes
//! `prebuilt_table.rs`.

use super::prebuilt_table::UNITS;
use crate::problem::Problem;

pub use super::unit::{Blob, Capability, Unit};

/// Everything that is embedded.
pub fn units() -> &'static [Unit] {
    UNITS
}

/// The unit that holds a kernel.
pub fn unit_of(kernel: &str) -> Result<&'static Unit, Problem> {
    UNITS.iter().find(|unit| unit.kernels.contains(&kernel)).ok_or_else(|| {
        Problem::new("cuda::no_kernel", format!("no kernel `{kernel}` is embedded in this build"))
            .help("if its `.cu` is in kernels/, `cargo xtask kernels` compiles and embeds it")
    })
}
