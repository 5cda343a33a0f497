//! Small uploads that nobody waits for, through a ring of page-locked memory of the host.

use super::driver::{Driver, Mark, Queue};
use crate::problem::Problem;

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
        // SAFETY: the caller owns this much memory at `to`, whose next use is queued behind this; the bytes in the ring
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
