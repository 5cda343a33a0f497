//! Launchers of `kernels/bias.cu`: adding a bias to every row, and its gradient.

use super::residual::{THREADS, blocks_of_rows};
use crate::cuda::Buffer;
use crate::problem::Problem;
use half::bf16;

/// Columns that a block of the gradient's first step sums, and its warps.
const TILE: usize = 256;
const WARPS: usize = 8;

/// The gradient's rows are cut into at most this many slices, none with fewer rows than this.
const SLICES: usize = 64;

/// x [R, C] += b \[C\].
pub fn add(x: &mut Buffer<bf16>, b: &Buffer<f32>) -> Result<(), Problem> {
    let columns = b.len();
    if x.is_empty() {
        return Ok(());
    }
    assert!(columns > 0 && x.len().is_multiple_of(columns), "{} elements are no rows of {columns}", x.len());
    let rows = x.len() / columns;
    let launch =
        x.gpu().launch("bias_add", blocks_of_rows(rows, columns), THREADS).buffer(x).buffer(b).int(rows).int(columns);
    // SAFETY: the arguments of `bias_add` in their order; x has R * C elements and b has C.
    unsafe { launch.run() }
}

/// db \[C\] += the sum over the rows of dy [R, C]. The order of the additions depends on R only.
pub fn backward(db: &mut Buffer<f32>, dy: &Buffer<bf16>) -> Result<(), Problem> {
    let columns = db.len();
    if dy.is_empty() {
        return Ok(());
    }
    assert!(columns > 0 && dy.len().is_multiple_of(columns), "{} elements are no rows of {columns}", dy.len());
    let rows = dy.len() / columns;
    let slice_rows = slice_rows(rows);
    let slices = rows.div_ceil(slice_rows);

    let gpu = db.gpu();
    let partial = gpu.alloc::<f32>(slices * columns)?;
    let launch = gpu
        .launch("bias_backward_slices", (columns.div_ceil(TILE), slices), TILE)
        .shared(WARPS * TILE * size_of::<f32>())
        .buffer(&partial)
        .buffer(dy)
        .int(rows)
        .int(columns)
        .int(slice_rows);
    // SAFETY: the arguments of `bias_backward_slices` in their order; dy has R * C elements, partial C for each of the
    // slices, which are the grid's y; a warp's sums of a tile fit the shared memory.
    unsafe { launch.run()? };
    let launch = gpu
        .launch("bias_backward_join", columns.div_ceil(THREADS), THREADS)
        .buffer(db)
        .buffer(&partial)
        .int(slices)
        .int(columns);
    // SAFETY: the arguments of `bias_backward_join` in their order; db has C elements, partial C for each slice.
    unsafe { launch.run() }
}

/// Rows that one block sums.
fn slice_rows(rows: usize) -> usize {
    rows.div_ceil(SLICES).max(SLICES)
}
