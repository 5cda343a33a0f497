//! Device memory: one pool per device, so that a step allocates nothing anew.
//!
//! A buffer that goes away leaves its block in the pool, to be given to the next buffer of its size class.
//! Since all work is in one queue, whoever gets the block next writes after the last reader. Parts of a buffer
//! share its block, which goes back when the last of them has gone.

use super::capture::{self, DeviceId, Ground, Held, Turn, Turns};
use super::driver::Driver;
use super::staging::Staging;
use crate::problem::Problem;
use bytemuck::Pod;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device and its memory. Cheap to clone: all clones are the same device.
#[derive(Clone)]
pub struct Gpu {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) driver: Box<dyn Driver>,
    pub(super) turns: Turns,
    pool: Mutex<Pool>,
    staging: Mutex<Staging>,
    /// Blocks of the size asked for, given back at once: so that an emulator notices what goes beyond.
    exact: bool,
}

#[derive(Default)]
struct Pool {
    /// Free blocks by size.
    free: BTreeMap<usize, Vec<u64>>,
    /// Page-locked blocks of the host, likewise.
    parking: BTreeMap<usize, Vec<u64>>,
    usage: Usage,
}

/// Device memory taken by buffers, in bytes of their blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Taken by the buffers there are.
    pub now: usize,
    /// The most there was at once.
    pub peak: usize,
    /// Kept for reuse beside that.
    pub pooled: usize,
}

/// Blocks are multiples of this; so are the driver's.
const GRAIN: usize = 512;

/// The size of the block for this many bytes: at most an eighth is left over.
pub fn block_bytes(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(GRAIN);
    bytes.max(1).next_multiple_of(step)
}

/// The most bytes that a block of at most this many holds.
fn largest_block(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(GRAIN);
    bytes / step * step
}

impl Gpu {
    /// A device with a pool, whose blocks are used again.
    pub fn new(driver: Box<dyn Driver>) -> Gpu {
        Gpu::with(driver, false)
    }

    /// A device whose blocks are exactly as large as their buffers and are not kept for reuse: slower, but an
    /// access beyond a buffer is one beyond what the driver gave.
    pub fn exact(driver: Box<dyn Driver>) -> Gpu {
        Gpu::with(driver, true)
    }

    fn with(driver: Box<dyn Driver>, exact: bool) -> Gpu {
        let (turns, pool, staging) = Default::default();
        Gpu { inner: Arc::new(Inner { driver, turns, pool, staging, exact }) }
    }

    /// The driver, for one call: while another thread captures launches, this waits for it to end.
    pub fn driver(&self) -> Turn<'_> {
        capture::turn(self.id(), self.inner.driver.as_ref(), &self.inner.turns)
    }

    /// The seconds that what `work` queues takes on the device ([`Driver::time`]). Without a turn of its own: the calls
    /// in `work` take theirs, and one of them may capture.
    pub fn time(&self, work: &mut dyn FnMut() -> Result<(), Problem>) -> Result<f64, Problem> {
        self.inner.driver.time(work)
    }

    pub(super) fn id(&self) -> DeviceId {
        Arc::as_ptr(&self.inner).cast()
    }

    /// `Err` (`cuda::capture`) while this thread captures.
    pub(super) fn not_capturing(&self, wanted: &str) -> Result<(), Problem> {
        capture::not_capturing(self.id(), wanted)
    }

    /// Keeps a buffer's memory for the graph that is being captured, if one is.
    pub(super) fn keep<T: Pod>(&self, buffer: &Buffer<T>) {
        capture::keep(self.id(), || buffer.held());
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.inner.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much memory buffers take and took.
    pub fn usage(&self) -> Usage {
        self.pool().usage
    }

    /// Bytes that each of `count` equal buffers may have, for all of them to fit into what is free beside `reserve`.
    pub fn room(&self, count: usize, reserve: usize) -> Result<usize, Problem> {
        let (free, _) = self.driver().memory()?;
        Ok(largest_block((free + self.usage().pooled).saturating_sub(reserve) / count))
    }

    /// Room for `len` elements whose values are not defined. `Err` (`cuda::out_of_memory`) tells how much was
    /// asked for and how much is taken. While launches are captured it comes from the region they are captured in.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>, Problem> {
        if let Some(ground) = capture::ground(self.id()) {
            return self.alloc_in(ground, len);
        }
        self.not_capturing("room for a buffer")?;
        let bytes = len * size_of::<T>();
        let bytes = if self.inner.exact { bytes.max(1) } else { block_bytes(bytes) };
        // Before the pool is locked: who captures may want the pool, and everyone waits for who captures.
        let driver = self.driver();
        let mut pool = self.pool();
        let reused = pool.free.get_mut(&bytes).and_then(Vec::pop);
        let address = match reused {
            Some(address) => {
                pool.usage.pooled -= bytes;
                address
            }
            None => fresh(&*driver, &mut pool, bytes)?,
        };
        pool.usage.now += bytes;
        pool.usage.peak = pool.usage.peak.max(pool.usage.now);
        let block = Block { gpu: self.clone(), address, bytes, ground: None };
        Ok(Buffer { block: Arc::new(block), address, len, of: PhantomData })
    }

    /// The same at a place of `ground`.
    pub(super) fn alloc_in<T: Pod>(&self, ground: Arc<dyn Ground>, len: usize) -> Result<Buffer<T>, Problem> {
        let (address, bytes) = ground.place(len * size_of::<T>())?;
        let block = Block { gpu: self.clone(), address, bytes, ground: Some(ground) };
        Ok(Buffer { block: Arc::new(block), address, len, of: PhantomData })
    }

    /// A buffer of zeros.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>, Problem> {
        let mut buffer = self.alloc(len)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// A buffer with these values.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>, Problem> {
        let mut buffer = self.alloc(values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// Page-locked memory of the host.
    pub(super) fn parking(&self, bytes: usize) -> Result<u64, Problem> {
        let bytes = block_bytes(bytes);
        let parked = self.pool().parking.get_mut(&bytes).and_then(Vec::pop);
        parked.map_or_else(|| self.driver().alloc_host(bytes), Ok)
    }

    /// Takes back what [`Gpu::parking`] gave for this many bytes.
    pub(super) fn park_again(&self, bytes: usize, address: u64) {
        self.pool().parking.entry(block_bytes(bytes)).or_default().push(address);
    }
}

/// A block from the driver; if there is none, what the pool keeps is given back first.
fn fresh(driver: &dyn Driver, pool: &mut Pool, bytes: usize) -> Result<u64, Problem> {
    driver.alloc(bytes).or_else(|_| {
        driver.synchronize()?;
        for address in std::mem::take(&mut pool.free).into_values().flatten() {
            driver.free(address);
        }
        pool.usage.pooled = 0;
        driver.alloc(bytes).map_err(|problem| {
            problem.note(format!("asked for {bytes} bytes while buffers take {} bytes", pool.usage.now))
        })
    })
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Copies may still read or write what is given back.
        let _ = self.driver.synchronize();
        self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).end(self.driver.as_ref());
        let pool = self.pool.get_mut().unwrap_or_else(PoisonError::into_inner);
        for address in std::mem::take(&mut pool.free).into_values().flatten() {
            self.driver.free(address);
        }
        for address in std::mem::take(&mut pool.parking).into_values().flatten() {
            self.driver.free_host(address);
        }
    }
}

/// Memory that goes back to the pool, or to the ground it is a place of, when nobody has it any more.
struct Block {
    gpu: Gpu,
    address: u64,
    bytes: usize,
    ground: Option<Arc<dyn Ground>>,
}

/// `len` elements on a device.
pub struct Buffer<T: Pod> {
    block: Arc<Block>,
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// The device it is on.
    pub fn gpu(&self) -> &Gpu {
        &self.block.gpu
    }

    /// What a graph that uses it has to keep: of a place the whole ground.
    pub(super) fn held(&self) -> Held {
        self.block.ground.as_ref().map_or_else(|| self.block.clone() as Held, |ground| ground.whole())
    }

    /// `len` elements of any type from byte `from` on, in the same memory: what is written to one is read from the
    /// other, in the order of the queue.
    pub fn part<U: Pod>(&self, from: usize, len: usize) -> Buffer<U> {
        let bytes = self.len * size_of::<T>();
        assert!(from + len * size_of::<U>() <= bytes, "{len} elements from byte {from} of {bytes}");
        let address = self.address + from as u64;
        assert!(address.is_multiple_of(align_of::<U>() as u64), "elements at byte {from} are not aligned");
        Buffer { block: self.block.clone(), address, len, of: PhantomData }
    }

    /// All of it once more.
    pub fn share(&self) -> Buffer<T> {
        self.part(0, self.len)
    }

    /// The number of its elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Of element `index`, which may be one past the last.
    pub fn address_of(&self, index: usize) -> u64 {
        assert!(index <= self.len, "element {index} of a buffer of {}", self.len);
        self.address + (index * size_of::<T>()) as u64
    }

    /// Its values, once everything queued has been done.
    pub fn download(&self) -> Result<Vec<T>, Problem> {
        self.gpu().not_capturing("a buffer's values")?;
        let mut values = vec![T::zeroed(); self.len];
        self.download_to(&mut values)?;
        Ok(values)
    }

    /// [`Buffer::download`] into memory that is there.
    pub fn download_to(&self, values: &mut [T]) -> Result<(), Problem> {
        assert_eq!(values.len(), self.len);
        self.gpu().driver().download(self.address, bytemuck::cast_slice_mut(values))
    }

    /// New values for all elements.
    pub fn write(&mut self, values: &[T]) -> Result<(), Problem> {
        assert_eq!(values.len(), self.len);
        self.gpu().not_capturing("other values in a buffer")?;
        let driver = self.gpu().driver();
        let mut staging = self.gpu().inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
        staging.upload(&*driver, self.address, bytemuck::cast_slice(values))
    }

    /// Zeros. While launches are captured that is one of them.
    pub fn clear(&mut self) -> Result<(), Problem> {
        self.gpu().keep(self);
        self.gpu().driver().zero(self.address, self.len * size_of::<T>())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(ground) = &self.ground {
            return ground.take_back(self.address, self.bytes);
        }
        // Before the pool is locked, as in `alloc`.
        let driver = self.gpu.inner.exact.then(|| self.gpu.driver());
        let mut pool = self.gpu.pool();
        pool.usage.now -= self.bytes;
        if let Some(driver) = driver {
            return driver.free(self.address);
        }
        pool.usage.pooled += self.bytes;
        pool.free.entry(self.bytes).or_default().push(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_no_smaller_than_asked_and_wastes_little() {
        for bytes in [0, 1, 511, 512, 513, 9000, 100_000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let block = block_bytes(bytes);
            assert!(block >= bytes && block.is_multiple_of(GRAIN), "{bytes}: {block}");
            assert!(block <= bytes + (bytes / 8).max(GRAIN), "{bytes}: {block}");
            assert!(block_bytes(largest_block(bytes).max(1)) <= bytes.max(GRAIN), "{bytes}");
            assert!(largest_block(bytes) + (bytes / 8).max(GRAIN) >= bytes, "{bytes}");
        }
    }
}
