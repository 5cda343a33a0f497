//! SwiGLU: y = silu(gate) * up, silu(g) = g * sigmoid(g). Shazeer, "GLU variants improve
//! transformer" (2020).
//!
//! Gradients, with s = sigmoid(gate):
//! d up = dy * gate * s;  d gate = dy * up * s * (1 + gate * (1 - s)).

use super::PER_TASK;
use crate::tensor::Isa;
use crate::tensor::isa::by_isa;
use crate::tensor::vector::{exp1, silu1};
use rayon::prelude::*;

by_isa! {
    fn forward_on(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = silu1(*gate) * *up;
        }
    }
}

by_isa! {
    fn backward_on(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        for ((((dgate, dup), dy), gate), up) in dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up) {
            let sigmoid = 1.0 / (1.0 + exp1(-*gate));
            *dup = *dy * (*gate * sigmoid);
            *dgate = *dy * *up * sigmoid * (*gate).mul_add(1.0 - sigmoid, 1.0);
        }
    }
}

/// y = silu(gate) * up, all of one length.
pub fn swiglu_forward(y: &mut [f32], gate: &[f32], up: &[f32]) {
    assert!(y.len() == gate.len() && y.len() == up.len());
    let isa = Isa::best();
    let operands = gate.par_chunks(PER_TASK).zip(up.par_chunks(PER_TASK));
    y.par_chunks_mut(PER_TASK).zip(operands).for_each(|(y, (gate, up))| forward_on(isa, y, gate, up));
}

/// dgate = and dup = the gradients for dy, all of one length.
pub fn swiglu_backward(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
    let len = dy.len();
    assert!(dgate.len() == len && dup.len() == len && gate.len() == len && up.len() == len);
    let isa = Isa::best();
    let operands = dy.par_chunks(PER_TASK).zip(gate.par_chunks(PER_TASK)).zip(up.par_chunks(PER_TASK));
    dgate
        .par_chunks_mut(PER_TASK)
        .zip(dup.par_chunks_mut(PER_TASK))
        .zip(operands)
        .for_each(|((dgate, dup), ((dy, gate), up))| backward_on(isa, dgate, dup, dy, gate, up));
}

/// The definition, in f64.
pub mod reference {
    /// silu(gate) * up.
    pub fn forward(gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    }

    /// (dgate, dup).
    pub fn backward(dy: &[f64], gate: &[f64], up: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let each = |((dy, g), u): ((&f64, &f64), &f64)| {
            let s = 1.0 / (1.0 + (-g).exp());
            (dy * u * s * (1.0 + g * (1.0 - s)), dy * g * s)
        };
        dy.iter().zip(gate).zip(up).map(each).unzip()
    }
}
