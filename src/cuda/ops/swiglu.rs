//! Launchers of `kernels/swiglu.cu`: SwiGLU, forward and backward.

use super::residual::{THREADS, blocks};
use crate::cuda::Buffer;
use crate::problem::Problem;
use half::bf16;

/// y = silu(gate) * up, all of one length.
pub fn forward(y: &mut Buffer<bf16>, gate: &Buffer<bf16>, up: &Buffer<bf16>) -> Result<(), Problem> {
    let n = y.len();
    assert!(gate.len() == n && up.len() == n);
    let launch = y.gpu().launch("swiglu_forward", blocks(n), THREADS).buffer(y).buffer(gate).buffer(up).int(n);
    // SAFETY: the arguments of `swiglu_forward` in their order; each buffer has n elements.
    unsafe { launch.run() }
}

/// dgate = and dup = the gradients for dy, all of one length.
pub fn backward(
    dgate: &mut Buffer<bf16>,
    dup: &mut Buffer<bf16>,
    dy: &Buffer<bf16>,
    gate: &Buffer<bf16>,
    up: &Buffer<bf16>,
) -> Result<(), Problem> {
    let n = dy.len();
    assert!(dgate.len() == n && dup.len() == n && gate.len() == n && up.len() == n);
    let launch = dy
        .gpu()
        .launch("swiglu_backward", blocks(n), THREADS)
        .buffer(dgate)
        .buffer(dup)
        .buffer(dy)
        .buffer(gate)
        .buffer(up)
        .int(n);
    // SAFETY: the arguments of `swiglu_backward` in their order; each buffer has n elements.
    unsafe { launch.run() }
}
