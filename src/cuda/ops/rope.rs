//! Launcher of `kernels/rope.cu`: rotary position embedding in place, forward and backward.

use super::residual::{THREADS, blocks_of_rows};
use crate::cuda::{Buffer, Gpu};
use crate::problem::Problem;
use half::bf16;

/// Cosines and sines of the positions from 0 on, with the bits of `tensor::ops::RopeTable`.
pub struct Table {
    /// [P, D/2].
    pub cos: Buffer<f32>,
    /// [P, D/2].
    pub sin: Buffer<f32>,
    /// D, even.
    pub head_dim: usize,
}

impl Table {
    /// For positions `0..positions` of heads of `head_dim` elements (even). As in transformers, the inverse
    /// frequencies and their product with the position are rounded to f32 before the cosine is taken.
    pub fn upload(gpu: &Gpu, positions: usize, head_dim: usize, theta: f32) -> Result<Table, Problem> {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "heads of {head_dim} elements have no halves");
        let inverse: Vec<f32> = (0..head_dim / 2)
            .map(|i| 1.0 / f64::from(theta).powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32)
            .collect();
        let angles = (0..positions).flat_map(|position| inverse.iter().map(move |inverse| position as f32 * inverse));
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            angles.map(|angle| (f64::from(angle).cos() as f32, f64::from(angle).sin() as f32)).unzip();
        Ok(Table { cos: gpu.upload(&cos)?, sin: gpu.upload(&sin)?, head_dim })
    }

    /// The same table, in the same memory.
    pub fn share(&self) -> Table {
        Table { cos: self.cos.share(), sin: self.sin.share(), head_dim: self.head_dim }
    }

    /// How many positions it covers.
    pub fn positions(&self) -> usize {
        self.cos.len() / (self.head_dim / 2)
    }
}

/// Turns x [T, heads, D] in place (=); token t stands at `positions[t]`. `inverse` turns back, which is the
/// gradient. A token at a position that the table lacks becomes NaN.
pub fn rotate(
    x: &mut Buffer<bf16>,
    heads: usize,
    table: &Table,
    positions: &Buffer<u32>,
    inverse: bool,
) -> Result<(), Problem> {
    let (tokens, half) = (positions.len(), table.head_dim / 2);
    assert!(half > 0 && table.head_dim == 2 * half, "heads of {} elements have no halves", table.head_dim);
    assert_eq!(x.len(), tokens * heads * table.head_dim);
    assert!(table.cos.len() == table.sin.len() && table.cos.len().is_multiple_of(half));
    let launch = x
        .gpu()
        .launch("rope_rotate", blocks_of_rows(tokens * heads, half), THREADS)
        .buffer(x)
        .buffer(&table.cos)
        .buffer(&table.sin)
        .buffer(positions)
        .int(tokens)
        .int(heads)
        .int(table.head_dim)
        .int(table.positions())
        .float(if inverse { -1.0 } else { 1.0 });
    // SAFETY: the arguments of `rope_rotate` in their order; x has T * heads * D elements and positions T, as asserted.
    // The kernel looks for a position in the table only after comparing it with the table's length.
    unsafe { launch.run() }
}
