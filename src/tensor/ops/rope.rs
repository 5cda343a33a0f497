//! Rotary position embedding in the "rotate half" layout of Hugging Face's Qwen2: element i of a
//! head is paired with element i + D/2 and the pair is turned by the angle position * theta^(-2i/D).
//! Su et al., "RoFormer" (2021).
//!
//! Angles are made as transformers makes them: inverse frequencies and their product with the
//! position are rounded to f32, and the sine and cosine are those of that f32 angle. The gradient
//! turns back, by the opposite angle.

use super::rows_per_task;
use crate::tensor::Isa;
use crate::tensor::isa::by_isa;
use rayon::prelude::*;

/// Cosines and sines of the positions from 0 on.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// For positions `0..positions` of heads of `head_size` elements (even).
    pub fn new(positions: usize, head_size: usize, theta: f32) -> RopeTable {
        assert!(head_size.is_multiple_of(2), "head size {head_size} is odd");
        let half = head_size / 2;
        let inverse: Vec<f32> = (0..half)
            .map(|i| 1.0 / f64::from(theta).powf(f64::from((2 * i) as f32 / head_size as f32)) as f32)
            .collect();
        let angles = (0..positions).flat_map(|position| inverse.iter().map(move |inverse| position as f32 * inverse));
        let (cos, sin) = angles.map(|angle| (f64::from(angle).cos() as f32, f64::from(angle).sin() as f32)).unzip();
        RopeTable { half, cos, sin }
    }

    /// How many positions it covers.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }
}

by_isa! {
    fn turn(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y, sin) = (*low, *high, *sin * sign);
            *low = x.mul_add(*cos, -(y * sin));
            *high = y.mul_add(*cos, x * sin);
        }
    }
}

/// Turns x [T, H, D] in place; token t stands at `positions[t]`. `inverse` turns back, which is
/// the gradient.
pub fn rope(x: &mut [f32], heads: usize, table: &RopeTable, positions: &[u32], inverse: bool) {
    let half = table.half;
    let width = heads * 2 * half;
    assert_eq!(x.len(), positions.len() * width);
    if width == 0 {
        return;
    }
    let (isa, sign, rows) = (Isa::best(), if inverse { -1.0 } else { 1.0 }, rows_per_task(width));
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        for (x, &position) in x.chunks_exact_mut(width).zip(positions) {
            let at = position as usize * half;
            let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
            for head in x.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                turn(isa, low, high, cos, sin, sign);
            }
        }
    });
}

/// The definition, in f64.
pub mod reference {
    /// x [T, H, D] turned by positions * theta^(-2i/D).
    pub fn forward(x: &[f64], heads: usize, head_size: usize, theta: f64, positions: &[u32]) -> Vec<f64> {
        let half = head_size / 2;
        let mut y = x.to_vec();
        for (t, &position) in positions.iter().enumerate() {
            for head in 0..heads {
                for i in 0..half {
                    let (sin, cos) = (f64::from(position) * theta.powf(-2.0 * i as f64 / head_size as f64)).sin_cos();
                    let at = (t * heads + head) * head_size + i;
                    y[at] = x[at] * cos - x[at + half] * sin;
                    y[at + half] = x[at + half] * cos + x[at] * sin;
                }
            }
        }
        y
    }
}
