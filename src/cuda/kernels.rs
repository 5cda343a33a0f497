//! Where the kernels of a device come from: what is embedded, units of a test's own, or what is compiled now.

use super::jit::Jit;
use super::prebuilt;
use super::unit::{Capability, Unit};
use crate::problem::Problem;
use std::sync::Arc;

/// Where the kernels of a device come from.
pub(super) struct Kernels {
    /// Units that are not ours, and go before: those of a test.
    pub more: &'static [Unit],
    /// Takes the place of what is embedded.
    pub jit: Option<Jit>,
}

/// A unit as the driver takes it: a cubin, or PTX that ends with zero.
pub(super) struct Image {
    /// What it was compiled for, for messages.
    pub arch: String,
    /// The whole file.
    pub bytes: Arc<Vec<u8>>,
    /// Whether the driver has to compile it.
    pub is_ptx: bool,
}

impl Kernels {
    /// The name of the unit that holds a kernel.
    pub fn unit_of(&self, kernel: &str, capability: Capability) -> Result<String, Problem> {
        match (self.more.iter().find(|unit| unit.kernels.contains(&kernel)), &self.jit) {
            (Some(unit), _) => Ok(unit.name.to_string()),
            (None, Some(jit)) => jit.unit_of(kernel, capability),
            (None, None) => Ok(prebuilt::unit_of(kernel)?.name.to_string()),
        }
    }

    /// What a device of this capability and name runs of a unit, whose name [`Kernels::unit_of`] gave.
    pub fn image(&self, unit: &str, capability: Capability, device: &str) -> Result<Image, Problem> {
        let named = |units: &'static [Unit]| units.iter().find(|candidate| candidate.name == unit);
        let embedded = match (named(self.more), &self.jit) {
            (Some(unit), _) => unit,
            (None, Some(jit)) => {
                let bytes = jit.image(unit, capability)?;
                return Ok(Image { arch: "compiled now".to_string(), bytes, is_ptx: false });
            }
            (None, None) => named(prebuilt::units()).expect("a name that `unit_of` gave"),
        };
        let blob = embedded.blob_for(capability, device)?;
        Ok(Image { arch: blob.arch.to_string(), bytes: Arc::new(blob.unpack()), is_ptx: blob.is_ptx() })
    }
}
