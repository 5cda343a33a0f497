//! Launches captured once and carried out many times: a step of hundreds of small kernels becomes one call.
//!
//! A launch is captured with the addresses and numbers it was given. So everything that changes from one time to
//! the next lies in buffers, which are written before the graph is launched.

use super::capture::{self, Ground, Held};
use super::memory::Gpu;
use super::region::Region;
use crate::problem::Problem;
use std::sync::Arc;

/// Captured launches. It keeps the memory of every buffer that they were given, so none is used for anything else
/// while it lives; what a launch got as a bare address is for whoever captured it to keep.
pub struct Graph {
    gpu: Gpu,
    handle: u64,
    _memory: Vec<Held>,
}

impl Gpu {
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
        ground: Option<Arc<dyn Ground>>,
        work: impl FnOnce() -> Result<(), Problem>,
    ) -> Result<Graph, Problem> {
        let inner = &*self.inner;
        let (handle, memory) = capture::capture(self.id(), inner.driver.as_ref(), &inner.turns, ground, work)?;
        Ok(Graph { gpu: self.clone(), handle, _memory: memory })
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
