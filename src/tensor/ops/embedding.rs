//! Embedding: y[t] = W[ids[t]]. Gradient: dW[ids[t]] += dy[t], tokens in ascending order.

use super::rows_per_task;
use crate::tensor::Matrix;
use crate::tensor::vector;
use rayon::prelude::*;

/// y [T, C] = the rows of `table` [V, C] that `ids` [T] name. Panics on an id that is not below V.
pub fn embedding_forward(y: &mut [f32], table: &Matrix, ids: &[u32]) {
    let channels = table.k();
    assert_eq!(y.len(), ids.len() * channels);
    if channels == 0 {
        return;
    }
    let rows = rows_per_task(channels);
    y.par_chunks_mut(rows * channels).zip(ids.par_chunks(rows)).for_each(|(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(channels).zip(ids) {
            table.row(id as usize, y);
        }
    });
}

/// dw [V, C] += dy [T, C] in the rows that `ids` [T] name. One thread: it passes over `dy` once,
/// and so the order of additions is that of the tokens.
pub fn embedding_backward(dw: &mut [f32], dy: &[f32], ids: &[u32]) {
    if ids.is_empty() {
        return;
    }
    let channels = dy.len() / ids.len();
    assert_eq!(dy.len(), ids.len() * channels);
    for (dy, &id) in dy.chunks_exact(channels).zip(ids) {
        vector::add(&mut dw[id as usize * channels..][..channels], dy);
    }
}
