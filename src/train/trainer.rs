//! A model in training where it computes: its gradients' norm, clipping, and the optimizer. On a device nothing of them
//! passes through the host but the norm; the updates have the same bits.

use super::adamw::Options;
use super::adamw8bit;
use super::checkpoint::{Checkpoint, Restored};
use super::clip::{clip, global_norm};
use super::optimizer::{Kind, Optimizer};
use super::state::{StateMut, StateRef};
use crate::cuda::Gpu;
use crate::cuda::ops::{adamw, grad_norm::GradNorm};
use crate::model::{Batch, Config, DeviceSide, Gradients, HostSide, LoraSpec, Parameter, Pass, Placed};
use crate::problem::Problem;
use std::borrow::Cow;

/// A model in training: on the processor, or on a device.
pub enum Trainer {
    /// On the processor.
    Host(Box<HostSide>, Optimizer),
    /// On a device.
    Device(Box<DeviceSide>, Box<DeviceOptimizer>),
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

impl Trainer {
    /// Takes a model, with zero states for what it trains.
    pub fn new(model: Placed, kind: Kind, options: Options) -> Result<Trainer, Problem> {
        Ok(match model {
            Placed::Host(side) => {
                let optimizer = Optimizer::new(kind, options, side.model.params());
                Trainer::Host(side, optimizer)
            }
            Placed::Device(side) => {
                let lengths: Vec<usize> = side.model.params().iter().map(Parameter::values).collect();
                let optimizer = DeviceOptimizer::new(side.model.gpu(), kind, options, &lengths)?;
                Trainer::Device(side, Box::new(optimizer))
            }
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        match self {
            Trainer::Host(side, _) => &side.model.config,
            Trainer::Device(side, _) => &side.model.config,
        }
    }

    /// The adapter that is trained; `None` if every weight is.
    pub fn lora(&self) -> Option<&LoraSpec> {
        match self {
            Trainer::Host(side, _) => side.model.lora(),
            Trainer::Device(side, _) => side.model.lora(),
        }
    }

    /// Log-probs of the batch's targets, and what the backward pass needs.
    pub fn forward(&mut self, batch: &Batch) -> Result<Pass<'_>, Problem> {
        match self {
            Trainer::Host(side, _) => Ok(side.pass(batch)),
            Trainer::Device(side, _) => side.pass(batch),
        }
    }

    /// Gradients back to zero.
    pub fn clear_gradients(&mut self) -> Result<(), Problem> {
        match self {
            Trainer::Host(side, _) => {
                side.gradients().clear();
                Ok(())
            }
            Trainer::Device(side, _) => side.gradients()?.values.iter_mut().try_for_each(|sum| sum.clear()),
        }
    }

    /// The gradients of this moment, for the host.
    pub fn gradients(&mut self) -> Result<Gradients, Problem> {
        Ok(match self {
            Trainer::Host(side, _) => side.gradients().clone(),
            Trainer::Device(side, _) => {
                let values = side.gradients()?.values.iter().map(|sum| sum.download()).collect::<Result<_, _>>()?;
                Gradients { values }
            }
        })
    }

    /// L2 norm over all gradients; not finite if one of them is not.
    pub fn norm(&mut self) -> Result<f64, Problem> {
        match self {
            Trainer::Host(side, _) => Ok(global_norm(side.gradients())),
            Trainer::Device(side, optimizer) => {
                optimizer.norm.norm(&side.gradients()?.values.iter().collect::<Vec<_>>())
            }
        }
    }

    /// Scales the gradients to a norm of at most `max_norm`. `norm` is what [`Trainer::norm`] gave.
    pub fn clip(&mut self, norm: f64, max_norm: f64) -> Result<(), Problem> {
        match self {
            Trainer::Host(side, _) => {
                clip(side.gradients(), norm, max_norm);
                Ok(())
            }
            Trainer::Device(side, optimizer) => {
                optimizer.norm.clip(&side.gradients()?.values.iter().collect::<Vec<_>>(), norm, max_norm)
            }
        }
    }

    /// One update of everything that is trained at `learning_rate`.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), Problem> {
        match self {
            Trainer::Host(side, optimizer) => {
                let (model, gradients) = side.parts();
                model.update(|params| optimizer.step(params, gradients, learning_rate));
                Ok(())
            }
            Trainer::Device(side, optimizer) => {
                let (model, gradients) = side.parts()?;
                optimizer.step(model.gpu(), &model.tensors(gradients), learning_rate)
            }
        }
    }

    /// Names and shapes of the trained tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        fn of<V>(params: &[Parameter<V>]) -> Vec<(String, Vec<usize>)> {
            params.iter().map(|param| (param.name.clone(), param.shape.clone())).collect()
        }
        match self {
            Trainer::Host(side, _) => of(side.model.params()),
            Trainer::Device(side, _) => of(side.model.params()),
        }
    }

    /// The trained tensors of this moment: what is written to files.
    pub fn params(&self) -> Result<Cow<'_, [Parameter]>, Problem> {
        Ok(match self {
            Trainer::Host(side, _) => Cow::Borrowed(side.model.params()),
            Trainer::Device(side, _) => Cow::Owned(side.model.fetch()?),
        })
    }

    /// Saves model and optimizer after `step` updates: the same bytes wherever they are.
    pub fn save(&self, to: &Checkpoint, step: u64, caller: serde_json::Value) -> Result<(), Problem> {
        let params = self.params()?;
        match self {
            Trainer::Host(_, optimizer) => to.save(step, &params, optimizer, caller),
            Trainer::Device(_, optimizer) => to.save(step, &params, &optimizer.host(&params)?, caller),
        }
    }

    /// Restores model and optimizer from the newest whole checkpoint; `None` if there is none.
    pub fn restore(&mut self, from: &Checkpoint) -> Result<Option<Restored>, Problem> {
        match self {
            Trainer::Host(side, optimizer) => side.model.update(|params| from.restore(params, optimizer)),
            Trainer::Device(side, optimizer) => {
                let mut params = side.model.fetch()?;
                let mut host = Optimizer::new(optimizer.kind, optimizer.options, &params);
                let restored = from.restore(&mut params, &mut host)?;
                if restored.is_some() {
                    side.model.renew(&params)?;
                    optimizer.take(&host)?;
                }
                Ok(restored)
            }
        }
    }
}

impl DeviceOptimizer {
    fn new(gpu: &Gpu, kind: Kind, options: Options, lengths: &[usize]) -> Result<DeviceOptimizer, Problem> {
        let moments = match kind {
            Kind::AdamW => Moments::Full(adamw::AdamW::new(gpu, lengths)?),
            Kind::AdamW8bit => {
                let (signed, unsigned) = (&adamw8bit::SIGNED, &adamw8bit::UNSIGNED);
                Moments::EightBit(adamw::AdamW8bit::new(gpu, lengths, signed, unsigned)?)
            }
        };
        Ok(DeviceOptimizer { kind, options, steps: 0, moments, norm: GradNorm::new(gpu, lengths)? })
    }

    fn step(&mut self, gpu: &Gpu, tensors: &[adamw::Tensor], rate: f64) -> Result<(), Problem> {
        self.steps += 1;
        match &mut self.moments {
            Moments::Full(adamw) => adamw.step(gpu, tensors, rate, &self.options, self.steps),
            Moments::EightBit(adamw) => adamw.step(gpu, tensors, rate, &self.options, self.steps),
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
