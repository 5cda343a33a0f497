//! Launchers of `kernels/residual.cu`: adding to the residual stream, taking rows out, putting them back. The grid
//! of all kernels that go by eights (`kernels/eight.cuh`) is here too.

use crate::cuda::Buffer;
use crate::problem::Problem;
use half::bf16;

/// Threads of a block.
pub(super) const THREADS: usize = 256;

/// Elements of a thread.
pub(super) const EIGHT: usize = 8;

/// Blocks for `n` elements without rows.
pub(super) fn blocks(n: usize) -> usize {
    n.div_ceil(EIGHT * THREADS)
}

/// Blocks for rows of `width` elements, if no thread has elements of two rows.
pub(super) fn blocks_of_rows(rows: usize, width: usize) -> usize {
    let units = rows * width.div_ceil(EIGHT);
    assert!(units < 1 << 31, "{rows} rows of {width} elements are too many for one launch");
    units.div_ceil(THREADS)
}

/// x += y, of one length.
pub fn add(x: &mut Buffer<bf16>, y: &Buffer<bf16>) -> Result<(), Problem> {
    let n = x.len();
    assert_eq!(y.len(), n);
    let launch = x.gpu().launch("residual_add", blocks(n), THREADS).buffer(x).buffer(y).int(n);
    // SAFETY: the arguments of `residual_add` in their order; both buffers have n elements.
    unsafe { launch.run() }
}

/// y [K, width] = the rows of x [N, width] that `rows` \[K\] name. A row whose index is not below N becomes NaN.
pub fn gather_rows(y: &mut Buffer<bf16>, x: &Buffer<bf16>, rows: &Buffer<u32>, width: usize) -> Result<(), Problem> {
    let there = rows_of(x, width);
    assert_eq!(y.len(), rows.len() * width);
    let launch = y
        .gpu()
        .launch("residual_gather_rows", blocks_of_rows(rows.len(), width), THREADS)
        .buffer(y)
        .buffer(x)
        .buffer(rows)
        .int(rows.len())
        .int(there)
        .int(width);
    // SAFETY: the arguments of `residual_gather_rows` in their order; y has K * width elements and x N * width.
    // The kernel takes a row of x only after comparing its index with N.
    unsafe { launch.run() }
}

/// The rows of dx [N, width] that `rows` \[K\] name = those of dy [K, width]; the others stay. The rows must be
/// distinct; one that is not below N is left out. This is the gradient of [`gather_rows`] if dx is zero before.
pub fn scatter_rows(dx: &mut Buffer<bf16>, dy: &Buffer<bf16>, rows: &Buffer<u32>, width: usize) -> Result<(), Problem> {
    let there = rows_of(dx, width);
    assert_eq!(dy.len(), rows.len() * width);
    let launch = dx
        .gpu()
        .launch("residual_scatter_rows", blocks_of_rows(rows.len(), width), THREADS)
        .buffer(dx)
        .buffer(dy)
        .buffer(rows)
        .int(rows.len())
        .int(there)
        .int(width);
    // SAFETY: the arguments of `residual_scatter_rows` in their order; dx has N * width elements and dy K * width.
    // The kernel writes a row of dx only after comparing its index with N.
    unsafe { launch.run() }
}

fn rows_of(x: &Buffer<bf16>, width: usize) -> usize {
    assert!(width > 0 && x.len().is_multiple_of(width), "{} elements are no rows of {width}", x.len());
    x.len() / width
}
