//! Memory and kernels of a CUDA device: buffers, launches, and who carries them out. Knows no model.
//!
//! Work goes to one queue, in order: a launch returns at once, a download waits. There are two who carry
//! it out, and nothing else may tell them apart: NVIDIA's driver, and the emulator of the tests, which
//! compiles the same kernels for the CPU.
//!
//! | file | holds |
//! |---|---|
//! | `memory.rs` | [`Gpu`] and [`Buffer`]: allocation from a pool, the peak, copies |
//! | `launch.rs` | one launch: name, grid, shared memory, arguments |
//! | `driver.rs` | NVIDIA's driver; [`open`] says why there is none, [`survey`] what there is |
//! | `prebuilt.rs` | the compiled kernels, embedded, and which of them a device runs; its table is generated |
//! | `ops/` | the launcher of each kernel, under the stem of its `.cu` and of its reference in `tensor::ops` |

mod driver;
mod launch;
mod memory;
pub mod ops;
pub mod prebuilt;
mod prebuilt_table;

pub use driver::{Facts, Shown, open, survey};
pub use launch::{Dim, Launch};
pub use memory::{Buffer, Gpu, Usage, block_bytes};

use crate::problem::Problem;
use std::ffi::c_void;

/// Who carries out what is asked of a device.
pub trait Driver: Send + Sync {
    /// For people: `NVIDIA H100 80GB HBM3`.
    fn name(&self) -> String;

    /// Memory of at least `bytes` bytes, its address a multiple of 256. `Err` if there is not so much.
    fn alloc(&self, bytes: usize) -> Result<u64, Problem>;

    /// Gives back what [`Driver::alloc`] gave.
    fn free(&self, address: u64);

    /// Bytes that are free and bytes that there are.
    fn memory(&self) -> Result<(usize, usize), Problem>;

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Problem>;

    /// Waits for everything queued before.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Problem>;

    /// Fills with zero bytes.
    fn zero(&self, at: u64, bytes: usize) -> Result<(), Problem>;

    /// Queues a kernel. `arguments` point to values as in `cuLaunchKernel`.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and what they point to on the device must be there.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Dim,
        block: Dim,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Problem>;

    /// Waits for everything queued. `Err` tells of a kernel that failed.
    fn synchronize(&self) -> Result<(), Problem>;
}
