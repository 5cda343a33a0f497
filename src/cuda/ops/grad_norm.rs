//! The L2 norm over all gradients and clipping by it: `kernels/grad_norm.cu`. The arithmetic is that of `train::clip`.
//!
//! Also what every kernel over many tensors needs: the tensors cut into pieces, and tables on the device.

use crate::cuda::{Buffer, Gpu};
use crate::problem::Problem;
use bytemuck::{Pod, Zeroable};

/// Elements of a piece: what one block of such a kernel works on. As in `kernels/pieces.cuh`.
pub const PIECE: usize = 2048;
/// Threads of such a block.
pub(super) const THREADS: usize = 256;

/// Shared memory of a sum over a block: a number per thread, and one for each of 16 groups of threads.
const SUM_BYTES: usize = (THREADS + 16) * size_of::<f64>();

/// One piece: which tensor, and its place there in pieces.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Piece {
    tensor: u32,
    index: u32,
}

/// Tensors of these lengths in pieces, tensor by tensor, on the device.
pub(super) fn pieces(gpu: &Gpu, lengths: &[usize]) -> Result<Buffer<Piece>, Problem> {
    let mut all = Vec::new();
    for (tensor, length) in (0..).zip(lengths) {
        let count = u32::try_from(length.div_ceil(PIECE)).expect("a tensor has fewer than 2^43 elements");
        all.extend((0..count).map(|index| Piece { tensor, index }));
    }
    gpu.upload(&all)
}

/// A table on the device that is copied there only when it has changed: from step to step the tensors stay where
/// they are.
pub(super) struct Table<T: Pod> {
    rows: Vec<T>,
    device: Option<Buffer<T>>,
}

impl<T: Pod + PartialEq> Table<T> {
    pub(super) fn new() -> Table<T> {
        Table { rows: Vec::new(), device: None }
    }

    /// The table with these rows.
    pub(super) fn with(&mut self, gpu: &Gpu, rows: Vec<T>) -> Result<&Buffer<T>, Problem> {
        if self.device.is_none() || self.rows != rows {
            // A new buffer: kernels that are still queued read the old one, whose memory comes back after them.
            self.device = Some(gpu.upload(&rows)?);
            self.rows = rows;
        }
        Ok(self.device.as_ref().expect("just made"))
    }
}

/// `Gradient` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
struct Gradient {
    values: u64,
    length: u64,
}

/// The norm of gradients of fixed lengths, and the memory it takes.
pub struct GradNorm {
    lengths: Vec<usize>,
    pieces: Buffer<Piece>,
    gradients: Table<Gradient>,
    partial: Buffer<f64>,
    norm: Buffer<f64>,
}

impl GradNorm {
    /// Room for the norm of tensors of these lengths.
    pub fn new(gpu: &Gpu, lengths: &[usize]) -> Result<GradNorm, Problem> {
        let pieces = pieces(gpu, lengths)?;
        Ok(GradNorm {
            lengths: lengths.to_vec(),
            partial: gpu.alloc(pieces.len())?,
            norm: gpu.alloc(1)?,
            gradients: Table::new(),
            pieces,
        })
    }

    fn rows(&self, gradients: &[&Buffer<f32>]) -> Vec<Gradient> {
        assert!(
            gradients.iter().map(|gradient| gradient.len()).eq(self.lengths.iter().copied()),
            "the gradients have the lengths given to `new`"
        );
        gradients.iter().map(|g| Gradient { values: g.address(), length: g.len() as u64 }).collect()
    }

    /// The L2 norm over all `gradients`, which have the lengths given to [`GradNorm::new`]; NaN or infinite if an
    /// element is. Waits for it.
    pub fn norm(&mut self, gradients: &[&Buffer<f32>]) -> Result<f64, Problem> {
        let (gpu, rows) = (self.pieces.gpu(), self.rows(gradients));
        let table = self.gradients.with(gpu, rows)?;
        let sums = gpu.launch("grad_norm_pieces", self.pieces.len(), THREADS).shared(SUM_BYTES);
        // SAFETY: outputs and inputs of `grad_norm_pieces` in order; `partial` has a place per piece, and the table
        // a row per tensor named by one, with its true length.
        unsafe { sums.buffer(&self.partial).buffer(table).buffer(&self.pieces).run()? };
        let join = gpu.launch("grad_norm_join", 1, THREADS).shared(SUM_BYTES);
        // SAFETY: outputs, inputs and size of `grad_norm_join` in order; `partial` has as many places as are told.
        unsafe { join.buffer(&self.norm).buffer(&self.partial).int(self.partial.len()).run()? };
        Ok(self.norm.download()?[0])
    }

    /// Scales `gradients` in place to a norm of at most `max_norm`, as `train::clip` does. `norm` is what
    /// [`GradNorm::norm`] gave; a NaN changes nothing.
    pub fn clip(&mut self, gradients: &[&Buffer<f32>], norm: f64, max_norm: f64) -> Result<(), Problem> {
        let scale = (max_norm / (norm + 1e-6)).min(1.0) as f32;
        if scale < 1.0 {
            let (gpu, rows) = (self.pieces.gpu(), self.rows(gradients));
            let table = self.gradients.with(gpu, rows)?;
            let launch = gpu.launch("grad_scale", self.pieces.len(), THREADS);
            // SAFETY: inputs and scalar of `grad_scale` in order; the table has a row per tensor named by a piece,
            // with its true length.
            unsafe { launch.buffer(table).buffer(&self.pieces).float(scale).run()? };
        }
        Ok(())
    }
}
