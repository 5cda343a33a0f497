//! Launchers of `kernels/cast.cu`: between bf16 and f32, and a factor on f32.

use super::residual::{THREADS, blocks};
use crate::cuda::Buffer;
use crate::problem::Problem;
use half::bf16;

/// y = x, rounded to the nearest bf16, ties to even. NaN stays NaN.
pub fn to_bf16(y: &mut Buffer<bf16>, x: &Buffer<f32>) -> Result<(), Problem> {
    let n = y.len();
    assert_eq!(x.len(), n);
    let launch = y.gpu().launch("cast_to_bf16", blocks(n), THREADS).buffer(y).buffer(x).int(n);
    // SAFETY: the arguments of `cast_to_bf16` in their order; both buffers have n elements.
    unsafe { launch.run() }
}

/// y = x.
pub fn to_f32(y: &mut Buffer<f32>, x: &Buffer<bf16>) -> Result<(), Problem> {
    let n = y.len();
    assert_eq!(x.len(), n);
    let launch = y.gpu().launch("cast_to_f32", blocks(n), THREADS).buffer(y).buffer(x).int(n);
    // SAFETY: the arguments of `cast_to_f32` in their order; both buffers have n elements.
    unsafe { launch.run() }
}

/// x *= factor.
pub fn scale(x: &mut Buffer<f32>, factor: f32) -> Result<(), Problem> {
    let n = x.len();
    let launch = x.gpu().launch("cast_scale", blocks(n), THREADS).buffer(x).int(n).float(factor);
    // SAFETY: the arguments of `cast_scale` in their order; x has n elements.
    unsafe { launch.run() }
}
