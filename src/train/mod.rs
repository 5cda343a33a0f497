//! Parts of a training loop: optimizers, learning rate, clipping, checkpoints. The loop itself stands in
//! each stage, in plain sight.
//!
//! All of them compute the same bits for any number of threads: elementwise work is split, and sums are
//! over fixed blocks that are added in order.

pub mod adamw;
pub mod adamw8bit;
pub mod checkpoint;
pub mod clip;
pub mod schedule;
pub mod trainer;

pub use adamw::{AdamW, Options};
pub use adamw8bit::AdamW8bit;
pub use checkpoint::{Checkpoint, Restored};
pub use clip::{clip, global_norm, require_finite};
pub use schedule::{Curve, Schedule};
pub use trainer::Trainer;

use crate::model::{Gradients, Parameter};
use crate::problem::Problem;

/// The optimizer a manifest names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `adamw`: f32 states, as `torch.optim.AdamW`.
    AdamW,
    /// `adamw-8bit`: block-wise 8-bit states, as bitsandbytes.
    AdamW8bit,
}

impl Kind {
    /// Bytes of each state of a tensor of this many values.
    pub fn state_sizes(self, values: usize) -> Vec<usize> {
        match self {
            Kind::AdamW8bit if values >= adamw8bit::SMALLEST => {
                let maxima = size_of::<f32>() * values.div_ceil(adamw8bit::BLOCK);
                vec![values, maxima, values, maxima]
            }
            Kind::AdamW | Kind::AdamW8bit => vec![size_of::<f32>() * values; 2],
        }
    }
}

/// Either optimizer, with one state per parameter.
#[derive(Debug, Clone)]
pub enum Optimizer {
    AdamW(AdamW),
    AdamW8bit(AdamW8bit),
}

/// One named piece of an optimizer's state, as a checkpoint holds it.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    F32(Vec<f32>),
    U8(Vec<u8>),
}

impl Optimizer {
    /// Zero states for `params`.
    pub fn new(kind: Kind, options: Options, params: &[Parameter]) -> Optimizer {
        match kind {
            Kind::AdamW => Optimizer::AdamW(AdamW::new(options, params)),
            Kind::AdamW8bit => Optimizer::AdamW8bit(AdamW8bit::new(options, params)),
        }
    }

    /// One update of all parameters at `learning_rate`.
    pub fn step(&mut self, params: &mut [Parameter], grads: &Gradients, learning_rate: f64) {
        match self {
            Optimizer::AdamW(adamw) => adamw.step(params, grads, learning_rate),
            Optimizer::AdamW8bit(adamw) => adamw.step(params, grads, learning_rate),
        }
    }

    /// Updates made so far.
    pub fn steps(&self) -> u64 {
        match self {
            Optimizer::AdamW(adamw) => adamw.steps,
            Optimizer::AdamW8bit(adamw) => adamw.steps,
        }
    }

    /// Bytes of state.
    pub fn bytes(&self) -> usize {
        match self {
            Optimizer::AdamW(adamw) => adamw.bytes(),
            Optimizer::AdamW8bit(adamw) => adamw.bytes(),
        }
    }

    /// The states by name, in a fixed order.
    pub(crate) fn states(&self) -> Vec<(String, StateRef<'_>)> {
        match self {
            Optimizer::AdamW(adamw) => adamw.states(),
            Optimizer::AdamW8bit(adamw) => adamw.states(),
        }
    }

    /// The states again as places to write to, in the order of [`Optimizer::states`].
    pub(crate) fn states_mut(&mut self) -> Vec<StateMut<'_>> {
        match self {
            Optimizer::AdamW(adamw) => adamw.states_mut(),
            Optimizer::AdamW8bit(adamw) => adamw.states_mut(),
        }
    }

    pub(crate) fn set_steps(&mut self, steps: u64) {
        match self {
            Optimizer::AdamW(adamw) => adamw.steps = steps,
            Optimizer::AdamW8bit(adamw) => adamw.steps = steps,
        }
    }
}

/// Borrowed state, to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StateRef<'a> {
    F32(&'a [f32]),
    U8(&'a [u8]),
}

/// Borrowed state, to be read into.
pub(crate) enum StateMut<'a> {
    F32(&'a mut [f32]),
    U8(&'a mut [u8]),
}

fn not_finite(what: &str, value: f64, step: u64) -> Problem {
    Problem::new("train::not_finite", format!("the {what} is {value} at step {step}"))
        .note("the update was not made; the last checkpoint is from before it")
        .help("lower `learning_rate` or `optimizer.clip_norm`; the next run goes on from the state before this step")
}
