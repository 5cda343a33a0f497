//! Embedding: y\[t\] = W[ids\[t\]]. Gradient: dW[ids\[t\]] += dy\[t\], tokens in ascending order.

use super::rows_per_task;
use crate::tensor::Matrix;
use crate::tensor::vector;
use rayon::prelude::*;

/// y [T, C] = the rows of `table` [V, C] that `ids` \[T\] name. Panics on an id that is not below V.
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

/// dw [V, C] += dy [T, C] in the rows that `ids` \[T\] name. One thread: it passes over `dy` once,
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

/// The law, in f64 and as read.
pub mod reference {
    /// The rows of `table` [V, C] that `ids` name.
    pub fn forward(table: &[f64], channels: usize, ids: &[u32]) -> Vec<f64> {
        ids.iter().flat_map(|&id| table[id as usize * channels..][..channels].to_vec()).collect()
    }

    /// dW [V, C]: every row is the sum of the dy [T, C] of its tokens.
    pub fn backward(dy: &[f64], rows: usize, ids: &[u32]) -> Vec<f64> {
        let channels = dy.len() / ids.len();
        let mut dw = vec![0.0; rows * channels];
        for (t, &id) in ids.iter().enumerate() {
            for c in 0..channels {
                dw[id as usize * channels + c] += dy[t * channels + c];
            }
        }
        dw
    }
}
