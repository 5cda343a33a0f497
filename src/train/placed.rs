//! Gradient norm, clipping and optimizer where the model computes. On a device nothing of them passes through the
//! host but the norm; the updates have the same bits.

use super::{Checkpoint, Kind, Optimizer, Options, Restored, StateMut, StateRef, adamw8bit, clip, global_norm};
use crate::cuda::Gpu;
use crate::cuda::ops::{adamw, grad_norm::GradNorm};
use crate::model::{Parameter, Placed, PlacedGradients};
use crate::problem::Problem;

/// What turns gradients into updates of a [`Placed`] model.
pub enum PlacedOptimizer {
    Host(Optimizer),
    Device(Box<DeviceOptimizer>),
}

/// An optimizer whose states lie on a device.
pub struct DeviceOptimizer {
    kind: Kind,
    options: Options,
    /// Updates made so far.
    steps: u64,
    moments: Moments,
    norm: GradNorm,
}

enum Moments {
    Full(adamw::AdamW),
    EightBit(adamw::AdamW8bit),
}

impl PlacedOptimizer {
    /// Zero states for what `model` trains.
    pub fn new(kind: Kind, options: Options, model: &Placed) -> Result<PlacedOptimizer, Problem> {
        Ok(match model.gpu() {
            None => PlacedOptimizer::Host(Optimizer::new(kind, options, model.params())),
            Some(gpu) => PlacedOptimizer::Device(Box::new(DeviceOptimizer::new(gpu, kind, options, model.params())?)),
        })
    }

    /// L2 norm over all gradients; not finite if one of them is not.
    pub fn norm(&mut self, grads: &PlacedGradients) -> Result<f64, Problem> {
        match (self, grads) {
            (PlacedOptimizer::Host(_), PlacedGradients::Host(grads)) => Ok(global_norm(grads)),
            (PlacedOptimizer::Device(optimizer), PlacedGradients::Device(grads)) => {
                optimizer.norm.norm(&grads.sums.iter().collect::<Vec<_>>())
            }
            _ => elsewhere(),
        }
    }

    /// Scales `grads` to a norm of at most `max_norm`. `norm` is what [`PlacedOptimizer::norm`] gave.
    pub fn clip(&mut self, grads: &mut PlacedGradients, norm: f64, max_norm: f64) -> Result<(), Problem> {
        match (self, grads) {
            (PlacedOptimizer::Host(_), PlacedGradients::Host(grads)) => {
                clip(grads, norm, max_norm);
                Ok(())
            }
            (PlacedOptimizer::Device(optimizer), PlacedGradients::Device(grads)) => {
                optimizer.norm.clip(&grads.sums.iter().collect::<Vec<_>>(), norm, max_norm)
            }
            _ => elsewhere(),
        }
    }

    /// One update of everything `model` trains at `learning_rate`.
    pub fn step(&mut self, model: &mut Placed, grads: &PlacedGradients, learning_rate: f64) -> Result<(), Problem> {
        match (self, grads) {
            (PlacedOptimizer::Host(optimizer), PlacedGradients::Host(grads)) => {
                model.update(|params| optimizer.step(params, grads, learning_rate))
            }
            (PlacedOptimizer::Device(optimizer), PlacedGradients::Device(_)) => {
                model.update_there(grads, |gpu, tensors| optimizer.step(gpu, tensors, learning_rate))
            }
            _ => elsewhere(),
        }
    }

    /// Saves model and optimizer after `step` updates: the same bytes wherever they are.
    pub fn save(
        &self,
        to: &Checkpoint,
        step: u64,
        model: &mut Placed,
        caller: serde_json::Value,
    ) -> Result<(), Problem> {
        let params = model.host()?.params();
        match self {
            PlacedOptimizer::Host(optimizer) => to.save(step, params, optimizer, caller),
            PlacedOptimizer::Device(optimizer) => to.save(step, params, &optimizer.host(params)?, caller),
        }
    }

    /// Restores model and optimizer from the newest whole checkpoint; `None` if there is none.
    pub fn restore(&mut self, from: &Checkpoint, model: &mut Placed) -> Result<Option<Restored>, Problem> {
        match self {
            PlacedOptimizer::Host(optimizer) => model.update(|params| from.restore(params, optimizer))?,
            PlacedOptimizer::Device(optimizer) => {
                let mut host = Optimizer::new(optimizer.kind, optimizer.options, model.params());
                let restored = model.update(|params| from.restore(params, &mut host))??;
                if restored.is_some() {
                    optimizer.take(&host)?;
                }
                Ok(restored)
            }
        }
    }
}

fn elsewhere() -> ! {
    unreachable!("gradients of another place than the optimizer's")
}

impl DeviceOptimizer {
    fn new(gpu: &Gpu, kind: Kind, options: Options, params: &[Parameter]) -> Result<DeviceOptimizer, Problem> {
        let lengths: Vec<usize> = params.iter().map(|param| param.value.len()).collect();
        let moments = match kind {
            Kind::AdamW => Moments::Full(adamw::AdamW::new(gpu, &lengths)?),
            Kind::AdamW8bit => {
                let (signed, unsigned) = (&adamw8bit::SIGNED, &adamw8bit::UNSIGNED);
                Moments::EightBit(adamw::AdamW8bit::new(gpu, &lengths, signed, unsigned)?)
            }
        };
        Ok(DeviceOptimizer { kind, options, steps: 0, moments, norm: GradNorm::new(gpu, &lengths)? })
    }

    fn step(&mut self, gpu: &Gpu, tensors: &[adamw::Tensor], rate: f64) -> Result<(), Problem> {
        self.steps += 1;
        let Options { beta1, beta2, epsilon, weight_decay } = self.options;
        let options = adamw::Options { beta1, beta2, epsilon, weight_decay };
        match &mut self.moments {
            Moments::Full(adamw) => adamw.step(gpu, tensors, rate, &options, self.steps),
            Moments::EightBit(adamw) => adamw.step(gpu, tensors, rate, &options, self.steps),
        }
    }

    /// The same optimizer on the host.
    fn host(&self, params: &[Parameter]) -> Result<Optimizer, Problem> {
        let states = match &self.moments {
            Moments::Full(adamw) => adamw.states(),
            Moments::EightBit(adamw) => adamw.states(),
        }?;
        let mut host = Optimizer::new(self.kind, self.options, params);
        for (to, bytes) in host.states_mut().into_iter().zip(states) {
            match to {
                StateMut::F32(values) => bytemuck::cast_slice_mut(values).copy_from_slice(&bytes),
                StateMut::U8(values) => values.copy_from_slice(&bytes),
            }
        }
        host.set_steps(self.steps);
        Ok(host)
    }

    /// Takes the states of an optimizer of the same kind on the host.
    fn take(&mut self, host: &Optimizer) -> Result<(), Problem> {
        self.steps = host.steps();
        let bytes = |(_, state): (String, StateRef)| match state {
            StateRef::F32(values) => bytemuck::cast_slice(values).to_vec(),
            StateRef::U8(values) => values.to_vec(),
        };
        let states: Vec<Vec<u8>> = host.states().into_iter().map(bytes).collect();
        match &mut self.moments {
            Moments::Full(adamw) => adamw.restore(&states),
            Moments::EightBit(adamw) => adamw.restore(&states),
        }
    }
}
