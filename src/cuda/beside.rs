//! Copies beside the launches: buffers are parked in page-locked memory of the host while the device needs its own for
//! something else.

use super::driver::{Driver, Mark, Queue};
use super::memory::{Buffer, Gpu};
use crate::problem::Problem;
use bytemuck::Pod;
use std::marker::PhantomData;

/// Values of a buffer that has gone, in page-locked memory of the host.
pub struct Parked<T: Pod> {
    gpu: Gpu,
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Parked<T> {
    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Pod> Drop for Parked<T> {
    /// Its next user is a copy queued behind the last one that read it: all of them are in the queue of copies.
    fn drop(&mut self) {
        self.gpu.park_again(self.bytes(), self.address);
    }
}

/// A buffer on its way to the host. What is queued before [`Leaving::left`] runs beside the copy, and may read the
/// buffer.
pub struct Leaving<T: Pod> {
    parked: Parked<T>,
    // Gone after the wait that `end` queues, so that whoever gets its memory writes after the copy.
    end: End,
    buffer: Buffer<T>,
}

/// Values on their way back. What is queued before [`Arriving::arrived`] runs beside the copy.
pub struct Arriving<T: Pod> {
    // Before the buffer, as above.
    end: End,
    buffer: Buffer<T>,
    parked: Parked<T>,
}

/// The end of a copy. Dropped, the queue of launches waits for it, whether or not anything went wrong.
struct End {
    gpu: Gpu,
    mark: Mark,
}

impl Drop for End {
    fn drop(&mut self) {
        // A device that refuses this refuses the next launch too.
        let _ = self.gpu.driver().queue_wait(Queue::Compute, self.mark);
        self.gpu.driver().forget(self.mark);
    }
}

impl<T: Pod> Leaving<T> {
    /// To be read while it leaves.
    pub fn buffer(&self) -> &Buffer<T> {
        &self.buffer
    }

    /// Launches queued from now on may write to the buffer's memory.
    pub fn left(self) -> Parked<T> {
        let Leaving { parked, end, buffer } = self;
        drop(end);
        drop(buffer);
        parked
    }
}

impl<T: Pod> Arriving<T> {
    /// Launches queued from now on find the values.
    pub fn arrived(self) -> Buffer<T> {
        let Arriving { end, buffer, parked } = self;
        drop((end, parked));
        buffer
    }
}

impl<T: Pod> Buffer<T> {
    /// Starts to copy what has been queued into it so far to the host.
    pub fn leave(self) -> Result<Leaving<T>, Problem> {
        let gpu = self.gpu().clone();
        let bytes = self.len() * size_of::<T>();
        let parked = Parked { gpu: gpu.clone(), address: gpu.parking(bytes)?, len: self.len(), of: PhantomData };
        let end = gpu.beside(|driver| {
            // SAFETY: both have this many bytes; the buffer stays in `Leaving` until launches wait for the copy.
            unsafe { driver.queue_download(Queue::Copy, self.address(), parked.address, bytes) }
        })?;
        Ok(Leaving { parked, end, buffer: self })
    }
}

impl<T: Pod> Parked<T> {
    /// Starts to copy the values back to the device.
    pub fn fetch(self) -> Result<Arriving<T>, Problem> {
        let buffer = self.gpu.alloc(self.len)?;
        let end = self.gpu.beside(|driver| {
            // SAFETY: both have this many bytes; the values stay in `Arriving` until launches wait for the copy.
            unsafe { driver.queue_upload(Queue::Copy, buffer.address(), self.address, self.bytes()) }
        })?;
        Ok(Arriving { end, buffer, parked: self })
    }
}

impl Gpu {
    /// Queues a copy beside the launches, after those that are queued already: they write what it reads, or read
    /// what was in its memory before.
    fn beside(&self, copy: impl FnOnce(&dyn Driver) -> Result<(), Problem>) -> Result<End, Problem> {
        let driver = self.driver();
        let now = driver.mark(Queue::Compute)?;
        let queued = driver.queue_wait(Queue::Copy, now).and_then(|()| copy(&*driver));
        driver.forget(now);
        queued?;
        Ok(End { gpu: self.clone(), mark: driver.mark(Queue::Copy)? })
    }
}
