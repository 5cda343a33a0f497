//! Memory and kernels of a CUDA device: buffers, launches, and who carries them out. Knows no model.
//!
//! Work goes to one queue, in order: a launch returns at once, a download waits. Beside it there is a queue of
//! copies, which [`Mark`]s order against the first. There are two who carry them out, and nothing else may tell
//! them apart: NVIDIA's driver, and the emulator of the tests, which compiles the same kernels for the CPU.
//!
//! | file | holds |
//! |---|---|
//! | `memory.rs` | [`Gpu`] and [`Buffer`]: allocation from a pool, the peak, copies |
//! | `beside.rs` | copies nobody waits for: small uploads through a ring, buffers parked in host memory |
//! | `graph.rs` | launches captured once and carried out many times |
//! | `region.rs` | the memory that captured steps work in, one after another |
//! | `launch.rs` | one launch: name, grid, shared memory, arguments |
//! | `tensor_map.rs` | what kernels for compute capability 9.0 are told of a matrix |
//! | `driver.rs` | NVIDIA's driver; [`open`] says why there is none, [`survey`] what there is |
//! | `prebuilt.rs` | the compiled kernels, embedded, and which of them a device runs; its table is generated |
//! | `jit.rs` | kernels compiled at run time, for whoever works on them; `units.rs` and `nvrtc.rs`: what and by whom |
//! | `ops/` | the launcher of each kernel, under the stem of its `.cu` and of its reference in `tensor::ops` |

mod beside;
mod driver;
mod graph;
pub mod jit;
mod launch;
mod memory;
pub mod nvrtc;
pub mod ops;
pub mod prebuilt;
mod prebuilt_table;
mod region;
mod tensor_map;
pub mod units;

pub use beside::{Arriving, Leaving, Parked, STAGING_BYTES};
pub use driver::{Facts, Shown, open, open_with, survey};
pub use graph::{Graph, Turn};
pub use launch::{Dim, Launch};
pub use memory::{Buffer, Gpu, Usage, block_bytes};
pub use prebuilt::Capability;
pub use region::Region;
pub use tensor_map::{TensorMap, TensorView, copies_rows_of};

use crate::problem::Problem;
use std::ffi::c_void;

/// Where work is queued. Each is in order; between them only [`Mark`]s are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Launches, and all that has no queue of its own in its name.
    Compute,
    /// Copies beside it.
    Copy,
}

/// A place in a queue, by a number of the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(pub u64);

/// Who carries out what is asked of a device.
pub trait Driver: Send + Sync {
    /// For people: `NVIDIA H100 80GB HBM3`.
    fn name(&self) -> String;

    /// What decides which kernels it runs.
    fn capability(&self) -> Capability;

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

    /// The map by which kernels copy boxes of a tensor: asked only of a device that has such copies.
    fn tensor_map(&self, view: &TensorView) -> Result<TensorMap, Problem>;

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

    /// Page-locked memory of the host, by its address: what the copies below need.
    fn alloc_host(&self, bytes: usize) -> Result<u64, Problem>;

    /// Gives back what [`Driver::alloc_host`] gave.
    fn free_host(&self, address: u64);

    /// Queues a copy from page-locked memory to the device.
    ///
    /// # Safety
    /// There must be so many bytes at both places until the copy has been done.
    unsafe fn queue_upload(&self, queue: Queue, to: u64, from: u64, bytes: usize) -> Result<(), Problem>;

    /// Queues a copy from the device to page-locked memory.
    ///
    /// # Safety
    /// As of [`Driver::queue_upload`].
    unsafe fn queue_download(&self, queue: Queue, from: u64, to: u64, bytes: usize) -> Result<(), Problem>;

    /// Marks the end of what `queue` holds.
    fn mark(&self, queue: Queue) -> Result<Mark, Problem>;

    /// What is queued in `queue` from now on waits until `mark` is reached.
    fn queue_wait(&self, queue: Queue, mark: Mark) -> Result<(), Problem>;

    /// Waits until `mark` is reached.
    fn wait(&self, mark: Mark) -> Result<(), Problem>;

    /// Takes back a mark nobody asks for any more. Waits that are queued stay.
    fn forget(&self, mark: Mark);

    /// Whether capturing is of use. Not where every launch is to be waited for, so that one that fails is named.
    fn captures(&self) -> bool {
        true
    }

    /// From here on launches and zeros of this thread are noted down instead of carried out. Nothing else may be asked
    /// for before [`Driver::end_capture`], but tensor maps.
    fn begin_capture(&self) -> Result<(), Problem>;

    /// What was noted down, ready to be launched.
    fn end_capture(&self) -> Result<u64, Problem>;

    /// Queues all launches of a graph.
    ///
    /// # Safety
    /// What the launches were given on the device must still be there.
    unsafe fn launch_graph(&self, graph: u64) -> Result<(), Problem>;

    /// Gives back what [`Driver::end_capture`] gave.
    fn free_graph(&self, graph: u64);

    /// The seconds that passed between beginning and end of what `work` queues; waits for it. By the host's clock
    /// where a device has none of its own.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), Problem>) -> Result<f64, Problem> {
        self.synchronize()?;
        let started = std::time::Instant::now();
        work()?;
        self.synchronize()?;
        Ok(started.elapsed().as_secs_f64())
    }
}
