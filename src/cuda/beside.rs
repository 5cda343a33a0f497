//! Copies that nobody waits for: small uploads through a ring of page-locked memory, and buffers that are parked
//! in such memory while the device needs its own for something else.

use super::{Buffer, Driver, Gpu, Mark, Queue};
use crate::problem::Problem;
use bytemuck::Pod;
use std::marker::PhantomData;

/// Bytes of a part of the ring. What is larger goes up in a copy of its own, which is waited for.
const PART: usize = 1 << 20;
/// A part is written to again when the copies out of it have been done, by then long ago.
const PARTS: usize = 4;
/// Of the ring of each device, in the host's memory.
pub const STAGING_BYTES: usize = PARTS * PART;

/// A ring of page-locked memory, through which values go up in the order they come.
#[derive(Default)]
pub(super) struct Staging {
    /// Of its first byte, once there is one.
    address: Option<u64>,
    /// The part that is written to, and how far.
    part: usize,
    at: usize,
    /// The ends of the copies out of each part.
    marks: [Option<Mark>; PARTS],
}

impl Staging {
    /// Copies `bytes` to the device's address `to`, before whatever is queued next.
    pub(super) fn upload(&mut self, driver: &dyn Driver, to: u64, bytes: &[u8]) -> Result<(), Problem> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() > PART {
            return driver.upload(to, bytes);
        }
        let ring = match self.address {
            Some(address) => address,
            None => *self.address.insert(driver.alloc_host(STAGING_BYTES)?),
        };
        if self.at + bytes.len() > PART {
            self.next_part(driver)?;
        }
        let from = ring + (self.part * PART + self.at) as u64;
        // SAFETY: the part has room for them, and `next_part` has waited for the copies that read it before.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), from as *mut u8, bytes.len()) };
        self.at += bytes.len().next_multiple_of(64);
        // SAFETY: the caller owns so much memory at `to`, whose next use is queued behind this; the bytes in the ring
        // stay until the copy has been done.
        unsafe { driver.queue_upload(Queue::Compute, to, from, bytes.len()) }
    }

    fn next_part(&mut self, driver: &dyn Driver) -> Result<(), Problem> {
        self.marks[self.part] = Some(driver.mark(Queue::Compute)?);
        (self.part, self.at) = ((self.part + 1) % PARTS, 0);
        if let Some(mark) = self.marks[self.part].take() {
            driver.wait(mark)?;
            driver.forget(mark);
        }
        Ok(())
    }

    /// Gives the ring back. Nothing is queued any more.
    pub(super) fn end(&mut self, driver: &dyn Driver) {
        self.marks.iter_mut().filter_map(Option::take).for_each(|mark| driver.forget(mark));
        if let Some(address) = self.address.take() {
            driver.free_host(address);
        }
    }
}

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
            // SAFETY: both have so many bytes; the buffer stays in `Leaving` until launches wait for the copy.
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
            // SAFETY: both have so many bytes; the values stay in `Arriving` until launches wait for the copy.
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
