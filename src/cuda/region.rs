//! Memory that captured steps work in. Graphs run one after another and keep nothing from one run to the next, so all
//! of them share one region: while a step is captured its buffers get places in it, a place that is free again goes to
//! the next buffer, and the next step begins with an empty one.

use super::capture::{Ground, Held};
use super::memory::{Buffer, Gpu};
use crate::problem::Problem;
use bytemuck::Pod;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One piece of a device's memory, given out place by place.
pub struct Region {
    memory: Buffer<u8>,
    /// What is free: where it begins and how long it is, in bytes. No two stretches touch.
    free: Mutex<BTreeMap<usize, usize>>,
}

/// Places begin at multiples of this, as the driver's own do.
const GRAIN: usize = 256;

impl Region {
    /// `Err` (`cuda::out_of_memory`) if the device has not that much.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Arc<Region>, Problem> {
        let memory = gpu.alloc(bytes)?;
        Ok(Arc::new(Region { memory, free: Mutex::new(BTreeMap::from([(0, bytes)])) }))
    }

    /// The length of all of it.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer in the first place that is long enough. `Err` (`cuda::capture`) if there is none.
    pub fn alloc<T: Pod>(self: &Arc<Region>, len: usize) -> Result<Buffer<T>, Problem> {
        self.memory.gpu().alloc_in(self.clone(), len)
    }

    /// The same bytes as a buffer of the region's, without a hold on its place: for who looks at them between one run
    /// of a graph and the next.
    pub fn view<T: Pod>(&self, buffer: &Buffer<T>) -> Buffer<T> {
        self.memory.part((buffer.address() - self.memory.address()) as usize, buffer.len())
    }
}

impl Ground for Region {
    fn place(&self, bytes: usize) -> Result<(u64, usize), Problem> {
        let bytes = bytes.max(1).next_multiple_of(GRAIN);
        let mut free = self.free();
        let Some((&at, &there)) = free.iter().find(|(_, there)| **there >= bytes) else {
            let message = format!("a captured step has no place for {bytes} bytes in its {}", self.bytes());
            return Err(Problem::new("cuda::capture", message));
        };
        free.remove(&at);
        if there > bytes {
            free.insert(at + bytes, there - bytes);
        }
        Ok((self.memory.address() + at as u64, bytes))
    }

    fn take_back(&self, address: u64, bytes: usize) {
        let (mut at, mut bytes) = ((address - self.memory.address()) as usize, bytes);
        let mut free = self.free();
        if let Some(behind) = free.remove(&(at + bytes)) {
            bytes += behind;
        }
        if let Some((&before, &there)) = free.range(..at).next_back()
            && before + there == at
        {
            (at, bytes) = (before, there + bytes);
        }
        free.insert(at, bytes);
    }

    fn whole(&self) -> Held {
        self.memory.held()
    }
}
