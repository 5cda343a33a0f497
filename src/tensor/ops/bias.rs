//! Bias: y[r, c] += b\[c\]. Gradient: db\[c\] += sum over r of dy[r, c].

use super::rows_per_task;
use crate::tensor::Isa;
use crate::tensor::vector::add_on;
use rayon::prelude::*;

/// Columns whose gradient one task sums.
const COLUMNS: usize = 64;

/// y [R, C] += b \[C\].
pub fn bias_add(y: &mut [f32], b: &[f32]) {
    if b.is_empty() {
        return;
    }
    assert_eq!(y.len() % b.len(), 0);
    let isa = Isa::best();
    y.par_chunks_mut(rows_per_task(b.len()) * b.len()).for_each(|rows| {
        for row in rows.chunks_exact_mut(b.len()) {
            add_on(isa, row, b);
        }
    });
}

/// db \[C\] += sum over rows of dy [R, C], rows in ascending order.
pub fn bias_backward(db: &mut [f32], dy: &[f32]) {
    if db.is_empty() {
        return;
    }
    let channels = db.len();
    assert_eq!(dy.len() % channels, 0);
    let isa = Isa::best();
    db.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, db)| {
        for row in dy.chunks_exact(channels) {
            add_on(isa, db, &row[part * COLUMNS..][..db.len()]);
        }
    });
}

/// The law, in f64 and as read.
pub mod reference {
    /// y [R, C] + b \[C\].
    pub fn forward(y: &[f64], b: &[f64]) -> Vec<f64> {
        y.iter().enumerate().map(|(at, y)| y + b[at % b.len()]).collect()
    }

    /// db \[C\] of dy [R, C].
    pub fn backward(dy: &[f64], channels: usize) -> Vec<f64> {
        (0..channels).map(|c| dy.iter().skip(c).step_by(channels).sum()).collect()
    }
}
