//! What a thread is capturing, and who may ask the driver for something meanwhile.
//!
//! While a thread captures, others that want something of the same device wait: there is one queue, and what they queued
//! would be captured too.

use super::driver::Driver;
use crate::problem::Problem;
use std::any::Any;
use std::cell::RefCell;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Held alone by whoever captures, shared by every other call of the driver.
pub(super) type Turns = RwLock<()>;

/// Which device, by an address that is its own while it lives.
pub(super) type DeviceId = *const ();

/// Memory that a graph keeps while it lives.
pub(super) type Held = Arc<dyn Any + Send + Sync>;

/// Memory that is given out place by place, and takes its places back.
pub(super) trait Ground: Send + Sync {
    /// A place of at least `bytes` bytes: its address and its length. `Err` (`cuda::capture`) if there is none.
    fn place(&self, bytes: usize) -> Result<(u64, usize), Problem>;

    /// Takes back what [`Ground::place`] gave.
    fn take_back(&self, address: u64, bytes: usize);

    /// All of it, for whoever uses a place to keep.
    fn whole(&self) -> Held;
}

/// The right to one call of the driver.
pub struct Turn<'g> {
    driver: &'g dyn Driver,
    _shared: Option<RwLockReadGuard<'g, ()>>,
}

impl<'g> Deref for Turn<'g> {
    type Target = dyn Driver + 'g;

    fn deref(&self) -> &Self::Target {
        self.driver
    }
}

/// What this thread is capturing.
struct Capture {
    device: DeviceId,
    /// Where buffers are asked for meanwhile, if anywhere.
    ground: Option<Arc<dyn Ground>>,
    held: Vec<Held>,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

/// Waits while another thread captures; not while this one does.
pub(super) fn turn<'g>(device: DeviceId, driver: &'g dyn Driver, turns: &'g Turns) -> Turn<'g> {
    let shared = (!captures(device)).then(|| turns.read().unwrap_or_else(PoisonError::into_inner));
    Turn { driver, _shared: shared }
}

/// Whether this thread captures launches on this device.
pub(super) fn captures(device: DeviceId) -> bool {
    CAPTURE.with_borrow(|capture| capture.as_ref().is_some_and(|capture| capture.device == device))
}

/// Where this thread's captured launches get their memory, if it captures with such a place.
pub(super) fn ground(device: DeviceId) -> Option<Arc<dyn Ground>> {
    CAPTURE.with_borrow(|capture| {
        let here = capture.as_ref().filter(|capture| capture.device == device);
        here.and_then(|capture| capture.ground.clone())
    })
}

/// Keeps memory for the graph that is being captured, if one is.
pub(super) fn keep(device: DeviceId, memory: impl FnOnce() -> Held) {
    if captures(device) {
        let memory = memory();
        CAPTURE.with_borrow_mut(|capture| capture.iter_mut().for_each(|capture| capture.held.push(memory.clone())));
    }
}

/// `Err` while this thread captures: a graph would not do again what it then asks for.
pub(super) fn not_capturing(device: DeviceId, wanted: &str) -> Result<(), Problem> {
    if !captures(device) {
        return Ok(());
    }
    Err(Problem::new("cuda::capture", format!("{wanted} was asked for while launches were captured"))
        .note("whatever a captured step needs has to be there before"))
}

/// Captures the launches of `work`: the driver's handle of them, and the memory that they were given.
pub(super) fn capture(
    device: DeviceId,
    driver: &dyn Driver,
    turns: &Turns,
    ground: Option<Arc<dyn Ground>>,
    work: impl FnOnce() -> Result<(), Problem>,
) -> Result<(u64, Vec<Held>), Problem> {
    not_capturing(device, "a graph")?;
    let _alone = turns.write().unwrap_or_else(PoisonError::into_inner);
    driver.begin_capture()?;
    CAPTURE.set(Some(Capture { device, ground, held: Vec::new() }));
    // Whatever `work` does, the queue has to be told that it ends.
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    let capture = CAPTURE.take();
    let handle = driver.end_capture();
    match done {
        Err(panic) => {
            let _ = handle.map(|handle| driver.free_graph(handle));
            std::panic::resume_unwind(panic)
        }
        Ok(Err(problem)) => {
            let _ = handle.map(|handle| driver.free_graph(handle));
            Err(problem)
        }
        Ok(Ok(())) => {
            let mut held = capture.map(|capture| capture.held).unwrap_or_default();
            let address = |memory: &Held| Arc::as_ptr(memory).cast::<()>();
            held.sort_unstable_by_key(address);
            held.dedup_by_key(|memory| address(memory));
            Ok((handle?, held))
        }
    }
}
