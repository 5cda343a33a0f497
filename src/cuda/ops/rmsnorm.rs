//! Launches of `kernels/rmsnorm.cu`. Reference: `tensor::ops::rmsnorm`.

use crate::cuda::Buffer;
use crate::problem::Problem;
use half::bf16;

/// As in the kernel: what stands before a block's sums of dw.
const SCRATCH_BYTES: usize = 128;

/// Blocks among which rows are divided when dw is summed: enough to keep a device busy, few enough that their
/// sums are small beside the rows. A constant, so that the sums do not depend on the device.
const BLOCKS: usize = 512;

/// Columns a block of the last kernel sums.
const COLUMNS: usize = 32;

/// Threads for a row: one per 16 bytes of it, or per element, as far as a block goes.
fn threads(channels: usize) -> usize {
    let units = if channels.is_multiple_of(8) { channels / 8 } else { channels };
    units.next_multiple_of(32).clamp(32, 256)
}

/// y [R, C] bf16 = and rstd \[R\] =, from x [R, C] bf16 and w \[C\].
pub fn forward(
    y: &mut Buffer<bf16>,
    rstd: &mut Buffer<f32>,
    x: &Buffer<bf16>,
    w: &Buffer<f32>,
    eps: f32,
) -> Result<(), Problem> {
    let (rows, channels) = (rstd.len(), w.len());
    assert!(y.len() == x.len() && x.len() == rows * channels);
    if channels == 0 {
        return Ok(());
    }
    let launch = x.gpu().launch("rmsnorm_forward", rows, threads(channels)).shared(SCRATCH_BYTES);
    let launch = launch.buffer(y).buffer(rstd).buffer(x).buffer(w).int(channels).float(eps);
    // SAFETY: the arguments are the kernel's; a block touches its row, all C elements of it, and w's C.
    unsafe { launch.run() }
}

/// dx [R, C] bf16 = (+= with `add`) and dw \[C\] +=, from dy and x [R, C] bf16, w \[C\] and the forward's rstd \[R\].
pub fn backward(
    dx: &mut Buffer<bf16>,
    dw: Option<&mut Buffer<f32>>,
    dy: &Buffer<bf16>,
    x: &Buffer<bf16>,
    w: &Buffer<f32>,
    rstd: &Buffer<f32>,
    add: bool,
) -> Result<(), Problem> {
    let (rows, channels) = (rstd.len(), w.len());
    assert!(dx.len() == x.len() && dy.len() == x.len() && x.len() == rows * channels);
    if channels == 0 || rows == 0 {
        return Ok(());
    }
    let gpu = x.gpu();
    // Without dw nothing is gathered from several rows.
    let rows_per_block = if dw.is_some() { rows.div_ceil(BLOCKS).max(8) } else { 1 };
    let blocks = rows.div_ceil(rows_per_block);
    let partial = dw.as_ref().map(|_| gpu.alloc::<f32>(blocks * channels)).transpose()?;
    let gathered_bytes = if partial.is_some() { channels * size_of::<f32>() } else { 0 };

    let launch = gpu.launch("rmsnorm_backward", blocks, threads(channels)).shared(SCRATCH_BYTES + gathered_bytes);
    let launch = launch.buffer(dx).optional(partial.as_ref()).buffer(dy).buffer(x).buffer(w).buffer(rstd);
    let launch = launch.int(rows).int(channels).int(rows_per_block).int(add.into());
    // SAFETY: the arguments are the kernel's; blocks touch rows below `rows`, and one row each of `partial`.
    unsafe { launch.run() }?;

    let (Some(dw), Some(partial)) = (dw, partial) else { return Ok(()) };
    assert_eq!(dw.len(), channels);
    let launch = gpu.launch("rmsnorm_weights", channels.div_ceil(COLUMNS), 256usize).shared(8 * COLUMNS * 4);
    let launch = launch.buffer(dw).buffer(&partial).int(blocks).int(channels);
    // SAFETY: the arguments are the kernel's; `partial` has `blocks` rows of C, dw has C elements.
    unsafe { launch.run() }
}
