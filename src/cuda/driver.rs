//! Who carries out what is asked of a device: one trait, for NVIDIA's driver and for the emulator of the tests.

use super::unit::Capability;
use crate::problem::Problem;
use std::ffi::c_void;

/// Blocks of a grid or threads of a block: x, y, z.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dim(pub u32, pub u32, pub u32);

impl From<usize> for Dim {
    fn from(x: usize) -> Dim {
        Dim(u32::try_from(x).expect("a grid has fewer than 2^32 blocks"), 1, 1)
    }
}

impl From<(usize, usize)> for Dim {
    fn from((x, y): (usize, usize)) -> Dim {
        Dim(Dim::from(x).0, Dim::from(y).0, 1)
    }
}

impl From<(usize, usize, usize)> for Dim {
    fn from((x, y, z): (usize, usize, usize)) -> Dim {
        Dim(Dim::from(x).0, Dim::from(y).0, Dim::from(z).0)
    }
}

impl Dim {
    /// How many of them there are.
    pub fn count(self) -> u64 {
        u64::from(self.0) * u64::from(self.1) * u64::from(self.2)
    }
}

/// A map as the driver makes it; an argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// What a map is made of: a row-major tensor of two or three extents, and the box that one copy takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorView {
    /// Of the first element.
    pub address: u64,
    /// In elements of two bytes, the contiguous one first, as the device counts them.
    pub extents: Vec<u64>,
    /// Bytes from one row to the next, and from one plane to the next: one fewer than the extents.
    pub pitches: Vec<u64>,
    /// In elements, in the order of the extents.
    pub tile: Vec<u32>,
}

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

    /// Memory of at least `bytes` bytes, its address a multiple of 256. `Err` if there is not that much.
    fn alloc(&self, bytes: usize) -> Result<u64, Problem>;

    /// Gives back what [`Driver::alloc`] gave.
    fn free(&self, address: u64);

    /// Bytes that are free and bytes that there are.
    fn memory(&self) -> Result<(usize, usize), Problem>;

    /// Copies `bytes` to the device, in the order of the queue of launches; they are read before it returns.
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
    /// There must be this many bytes at both places until the copy has been done.
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
