//! Launches captured once and carried out many times: a step of hundreds of small kernels becomes one call.
//!
//! A launch is captured with the addresses and numbers it was given. So everything that changes from one time to
//! the next lies in buffers, which are written before the graph is launched. While a thread captures, others that
//! want something of the same device wait: there is one queue, and what they queued would be captured too.

use super::memory::{Block, Inner};
use super::{Driver, Gpu, Region};
use crate::problem::Problem;
use std::cell::RefCell;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Captured launches. It keeps the memory of every buffer that they were given, so none is used for anything else
/// while it lives; what a launch got as a bare address is for whoever captured it to keep.
pub struct Graph {
    gpu: Gpu,
    handle: u64,
    _blocks: Vec<Arc<Block>>,
}

/// Held alone by whoever captures, shared by every other call of the driver.
pub(super) type Turns = RwLock<()>;

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
    device: *const Inner,
    /// Where buffers are asked for meanwhile, if anywhere.
    region: Option<Arc<Region>>,
    blocks: Vec<Arc<Block>>,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

impl Gpu {
    pub(super) fn turn(&self) -> Turn<'_> {
        let inner = &*self.inner;
        let shared = (!self.captures()).then(|| inner.turns.read().unwrap_or_else(PoisonError::into_inner));
        Turn { driver: inner.driver.as_ref(), _shared: shared }
    }

    /// The seconds that what `work` queues takes on the device ([`Driver::time`]). Without a turn of its own: the calls
    /// in `work` take theirs, and one of them may capture.
    pub fn time(&self, work: &mut dyn FnMut() -> Result<(), Problem>) -> Result<f64, Problem> {
        self.inner.driver.time(work)
    }

    /// Whether this thread captures launches on this device.
    fn captures(&self) -> bool {
        CAPTURE
            .with_borrow(|capture| capture.as_ref().is_some_and(|capture| capture.device == Arc::as_ptr(&self.inner)))
    }

    /// The region that this thread captures launches in, if it does.
    pub(super) fn captures_in(&self) -> Option<Arc<Region>> {
        CAPTURE.with_borrow(|capture| {
            let here = capture.as_ref().filter(|capture| capture.device == Arc::as_ptr(&self.inner));
            here.and_then(|capture| capture.region.clone())
        })
    }

    /// `Err` while this thread captures: a graph would not do again what it then asks for.
    pub(super) fn not_capturing(&self, wanted: &str) -> Result<(), Problem> {
        if !self.captures() {
            return Ok(());
        }
        Err(Problem::new("cuda::capture", format!("{wanted} was asked for while launches were captured"))
            .note("whatever a captured step needs has to be there before"))
    }

    /// Keeps a buffer's memory for the graph that is being captured, if one is.
    pub(super) fn keep(&self, block: &Arc<Block>) {
        if self.captures() {
            CAPTURE.with_borrow_mut(|capture| {
                capture.iter_mut().for_each(|capture| capture.blocks.push(block.kept().clone()));
            });
        }
    }

    /// The launches of `work`, which are not carried out. Every kernel must have been launched before, with as much
    /// shared memory: loading one is nothing that can be captured. `Err` (`cuda::capture`) if `work` asks for
    /// memory, or copies.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Problem>) -> Result<Graph, Problem> {
        self.captured(None, work)
    }

    /// The same of work that asks for memory: it gets places in `region`, which are its own until it lets go of them.
    /// `Err` (`cuda::capture`) also if they do not suffice.
    pub fn capture_in(
        &self,
        region: &Arc<Region>,
        work: impl FnOnce() -> Result<(), Problem>,
    ) -> Result<Graph, Problem> {
        self.captured(Some(region.clone()), work)
    }

    fn captured(
        &self,
        region: Option<Arc<Region>>,
        work: impl FnOnce() -> Result<(), Problem>,
    ) -> Result<Graph, Problem> {
        self.not_capturing("a graph")?;
        let _alone = self.inner.turns.write().unwrap_or_else(PoisonError::into_inner);
        let driver = self.inner.driver.as_ref();
        driver.begin_capture()?;
        CAPTURE.set(Some(Capture { device: Arc::as_ptr(&self.inner), region, blocks: Vec::new() }));
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
                let mut blocks = capture.map(|capture| capture.blocks).unwrap_or_default();
                blocks.sort_unstable_by_key(Arc::as_ptr);
                blocks.dedup_by_key(|block| Arc::as_ptr(block));
                Ok(Graph { gpu: self.clone(), handle: handle?, _blocks: blocks })
            }
        }
    }
}

impl Graph {
    /// Queues all of its launches.
    pub fn launch(&self) -> Result<(), Problem> {
        self.gpu.not_capturing("a graph")?;
        let _span = tracing::trace_span!("launch", kernel = "graph").entered();
        // SAFETY: the handle is our own, and the buffers are kept.
        unsafe { self.gpu.driver().launch_graph(self.handle) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.gpu.driver().free_graph(self.handle);
    }
}
