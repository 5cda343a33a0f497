//! Device memory: one pool per device, so that a step allocates nothing anew.
//!
//! A buffer that goes away leaves its block in the pool, to be given to the next buffer of its size class.
//! Since all work is in one queue, whoever gets the block next writes after the last reader.

use super::Driver;
use crate::problem::Problem;
use bytemuck::Pod;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device and its memory. Cheap to clone: all clones are the same device.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
}

struct Inner {
    driver: Box<dyn Driver>,
    pool: Mutex<Pool>,
    /// Blocks of the size asked for, given back at once: so that an emulator notices what goes beyond.
    exact: bool,
}

#[derive(Default)]
struct Pool {
    /// Free blocks by size.
    free: BTreeMap<usize, Vec<u64>>,
    usage: Usage,
}

/// Device memory taken by buffers, in bytes of their blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub now: usize,
    /// The most there was at once.
    pub peak: usize,
    /// Kept for reuse beside that.
    pub pooled: usize,
}

/// Blocks are multiples of this; so are the driver's.
const GRAIN: usize = 512;

/// The size of the block for so many bytes: at most an eighth is left over.
pub fn block_bytes(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(GRAIN);
    bytes.max(1).next_multiple_of(step)
}

impl Gpu {
    pub fn new(driver: Box<dyn Driver>) -> Gpu {
        Gpu { inner: Arc::new(Inner { driver, pool: Mutex::default(), exact: false }) }
    }

    /// A device whose blocks are exactly as large as their buffers and are not kept for reuse: slower, but an
    /// access beyond a buffer is one beyond what the driver gave.
    pub fn exact(driver: Box<dyn Driver>) -> Gpu {
        Gpu { inner: Arc::new(Inner { driver, pool: Mutex::default(), exact: true }) }
    }

    pub fn driver(&self) -> &dyn Driver {
        self.inner.driver.as_ref()
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.inner.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much memory buffers take and took.
    pub fn usage(&self) -> Usage {
        self.pool().usage
    }

    /// Room for `len` elements whose values are not defined. `Err` (`cuda::out_of_memory`) tells how much was
    /// asked for and how much is taken.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>, Problem> {
        let bytes = len * size_of::<T>();
        let bytes = if self.inner.exact { bytes.max(1) } else { block_bytes(bytes) };
        let mut pool = self.pool();
        let reused = pool.free.get_mut(&bytes).and_then(Vec::pop);
        let address = match reused {
            Some(address) => {
                pool.usage.pooled -= bytes;
                address
            }
            None => self.fresh(&mut pool, bytes)?,
        };
        pool.usage.now += bytes;
        pool.usage.peak = pool.usage.peak.max(pool.usage.now);
        Ok(Buffer { gpu: self.clone(), address, len, bytes, of: PhantomData })
    }

    /// A block from the driver; if there is none, what the pool keeps is given back first.
    fn fresh(&self, pool: &mut Pool, bytes: usize) -> Result<u64, Problem> {
        let driver = self.driver();
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

    /// A buffer of zeros.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>, Problem> {
        let buffer = self.alloc(len)?;
        self.driver().zero(buffer.address, len * size_of::<T>())?;
        Ok(buffer)
    }

    /// A buffer with these values.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>, Problem> {
        let buffer = self.alloc(values.len())?;
        self.driver().upload(buffer.address, bytemuck::cast_slice(values))?;
        Ok(buffer)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let pool = self.pool.get_mut().unwrap_or_else(PoisonError::into_inner);
        for address in std::mem::take(&mut pool.free).into_values().flatten() {
            self.driver.free(address);
        }
    }
}

/// `len` elements on a device.
pub struct Buffer<T: Pod> {
    gpu: Gpu,
    address: u64,
    len: usize,
    /// Of its block.
    bytes: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn len(&self) -> usize {
        self.len
    }

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
        let mut values = vec![T::zeroed(); self.len];
        self.gpu.driver().download(self.address, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// New values for all elements.
    pub fn write(&mut self, values: &[T]) -> Result<(), Problem> {
        assert_eq!(values.len(), self.len);
        self.gpu.driver().upload(self.address, bytemuck::cast_slice(values))
    }

    /// Zeros.
    pub fn clear(&mut self) -> Result<(), Problem> {
        self.gpu.driver().zero(self.address, self.len * size_of::<T>())
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        let mut pool = self.gpu.pool();
        pool.usage.now -= self.bytes;
        if self.gpu.inner.exact {
            return self.gpu.driver().free(self.address);
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
        }
    }
}
