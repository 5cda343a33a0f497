//! The optimizers a manifest may name.

use super::adamw::{AdamW, Options};
use super::adamw8bit::{self, AdamW8bit};
use super::state::{StateMut, StateRef};
use crate::model::{Gradients, Parameter};

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
    /// States of 32 bits.
    AdamW(AdamW),
    /// States of 8 bits.
    AdamW8bit(AdamW8bit),
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
