//! The operations of the model, one file each: formula, CPU version, and the readable f64
//! implementation (`reference`) that defines it.
//!
//! Every file says which outputs are overwritten (=) and which are added to (+=). Loops over rows
//! run on rayon's current pool when there is enough work; the results do not depend on that.

pub mod attention;
pub mod bias;
pub mod embedding;
pub mod head_logprob;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;

pub use attention::{Attention, PAGE, attention_backward, attention_decode, attention_forward};
pub use bias::{bias_add, bias_backward};
pub use embedding::{embedding_backward, embedding_forward};
pub use head_logprob::{
    HeadForward, HeadGradients, HeadLora, HeadWant, Ranked, head_logprob_backward, head_logprob_forward,
};
pub use rmsnorm::{rmsnorm_backward, rmsnorm_forward};
pub use rope::{RopeTable, rope};
pub use swiglu::{swiglu_backward, swiglu_forward};

/// Elements that one task should have at least, for operations that only pass over memory.
const PER_TASK: usize = 16 * 1024;

/// Rows per task for rows of `width` elements.
fn rows_per_task(width: usize) -> usize {
    (PER_TASK / width.max(1)).max(1)
}

/// A slice that tasks write disjoint parts of.
struct Scatter<'a> {
    start: *mut f32,
    len: usize,
    lives: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `write`, whose callers promise disjoint parts.
unsafe impl Sync for Scatter<'_> {}

impl<'a> Scatter<'a> {
    fn new(slice: &'a mut [f32]) -> Scatter<'a> {
        Scatter { start: slice.as_mut_ptr(), len: slice.len(), lives: std::marker::PhantomData }
    }

    /// Copies `values` to `at..`. Panics beyond the end.
    ///
    /// # Safety
    /// No other thread may write the same elements.
    unsafe fn write(&self, at: usize, values: &[f32]) {
        assert!(at + values.len() <= self.len);
        // SAFETY: inside the slice, which is borrowed exclusively by `self`; disjoint by the caller's promise.
        unsafe { self.start.add(at).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
}
