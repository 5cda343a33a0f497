//! A model where it computes: on the processor, or on a CUDA device. The only place that tells them apart.

use super::batch::{Batch, Extent};
use super::captured::{DeviceSide, DeviceTape};
use super::config::Config;
use super::decoder::{Decoder, Tape};
use super::device::Cuda;
use super::fit;
use super::host::{Host, sure};
use super::lora::LoraSpec;
use super::parameter::{Gradients, Parameter};
use super::place::Place;
use super::policy::{Policy, Recompute};
use crate::cuda::Gpu;
use crate::problem::Problem;
use std::borrow::Cow;

/// Where a stage computes.
#[derive(Clone)]
pub enum Device {
    /// The processor.
    Cpu,
    /// A CUDA device.
    Cuda(Gpu),
}

/// A model where it computes. On a device nothing of it is kept on the host.
pub enum Placed {
    /// On the processor.
    Host(Box<HostSide>),
    /// On a device.
    Device(Box<DeviceSide>),
}

/// A model on the processor, and what its training needs.
pub struct HostSide {
    /// The model.
    pub model: Decoder<Host>,
    /// How steps go about their work.
    pub policy: Policy,
    /// A sum for each trained tensor, once there is something to add.
    gradients: Option<Gradients>,
}

/// A batch between forward and backward pass, which has the model to itself.
pub struct Pass<'m> {
    /// `[R]` log p(target) of each row.
    pub logprobs: Vec<f32>,
    tape: PassTape<'m>,
}

enum PassTape<'m> {
    Host(&'m mut HostSide, Box<Tape<Host>>),
    Device(&'m mut DeviceSide, Box<DeviceTape>),
}

/// What a forward pass on the host gives.
pub struct Forward {
    /// `[R]` log p(target) of each row.
    pub logprobs: Vec<f32>,
    /// For [`Decoder::backward`].
    pub tape: Tape<Host>,
}

impl Decoder<Host> {
    /// Log-probs of the batch's targets, and what [`Decoder::backward`] needs.
    pub fn forward(&self, batch: &Batch) -> Forward {
        self.forward_with(Policy::default(), batch)
    }

    /// The same in another way, with the same bits.
    pub fn forward_with(&self, policy: Policy, batch: &Batch) -> Forward {
        let recompute = match policy.recompute {
            Recompute::Fit => fit::on_host(self, policy, Extent::of(batch)),
            decided => decided,
        };
        let (inputs, extent) = sure(self.inputs(batch));
        let (logprobs, tape) = sure(self.forward_pass(inputs, extent, Policy { recompute, ..policy }));
        Forward { logprobs, tape }
    }

    /// Adds to `grads` the gradient of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(&self, mut tape: Tape<Host>, dlogprobs: &[f32], grads: &mut Gradients) {
        let ids = if self.trains_everything() { tape.inputs.ids.clone() } else { Vec::new() };
        sure(self.place.slopes(&mut tape.inputs, dlogprobs));
        if let Some(dx) = sure(self.backward_pass(tape, &mut grads.values)) {
            sure(self.embed_backward(&dx, &ids, &mut grads.values));
        }
    }

    /// Log-probs of the batch's targets, keeping nothing.
    pub fn logprobs(&self, batch: &Batch) -> Vec<f32> {
        let (inputs, extent) = sure(self.inputs(batch));
        sure(self.logprobs_of(&inputs, extent))
    }

    /// [`Decoder::logprobs`] with the active adapter off: the model beneath it, as DPO's reference.
    pub fn base_logprobs(&mut self, batch: &Batch) -> Vec<f32> {
        self.without_adapter(|model| model.logprobs(batch))
    }

    /// All logits of one sequence, `[T, V]`: for tests and comparisons, never for training.
    pub fn logits(&self, ids: &[u32]) -> Vec<f32> {
        sure(self.sequence_logits(ids))
    }

    /// The residual stream of one sequence as embedded, after each layer, and after the final norm:
    /// layers + 2 times `[T, H]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Vec<Vec<f32>> {
        sure(self.sequence_states(ids))
    }
}

impl Decoder<Cuda> {
    fn logprobs(&self, batch: &Batch) -> Result<Vec<f32>, Problem> {
        let (inputs, extent) = self.inputs(batch)?;
        self.logprobs_of(&inputs, extent)?.download()
    }
}

impl HostSide {
    /// The sums of gradients, zero if nothing was added yet.
    pub fn gradients(&mut self) -> &mut Gradients {
        self.parts().1
    }

    /// The model, and its gradients.
    pub fn parts(&mut self) -> (&mut Decoder<Host>, &mut Gradients) {
        let HostSide { model, gradients, .. } = self;
        let gradients = gradients.get_or_insert_with(|| Gradients::zeros(&model.params));
        (model, gradients)
    }
}

impl HostSide {
    /// The forward pass.
    pub fn pass(&mut self, batch: &Batch) -> Pass<'_> {
        let Forward { logprobs, tape } = self.model.forward_with(self.policy, batch);
        Pass { logprobs, tape: PassTape::Host(self, Box::new(tape)) }
    }
}

impl DeviceSide {
    /// The forward pass.
    pub fn pass(&mut self, batch: &Batch) -> Result<Pass<'_>, Problem> {
        let (logprobs, tape) = self.forward(batch)?;
        Ok(Pass { logprobs, tape: PassTape::Device(self, Box::new(tape)) })
    }
}

impl Pass<'_> {
    /// Adds to the model's gradients that of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(self, dlogprobs: &[f32]) -> Result<(), Problem> {
        match self.tape {
            PassTape::Host(side, tape) => {
                let (model, gradients) = side.parts();
                model.backward(*tape, dlogprobs, gradients);
                Ok(())
            }
            PassTape::Device(side, tape) => side.backward(*tape, dlogprobs),
        }
    }
}

impl Placed {
    /// Moves a model to where it computes. `Err` (exit 3) if the device has no kernels for the model's shape, or not the
    /// memory.
    pub fn new(model: Decoder<Host>, device: &Device) -> Result<Placed, Problem> {
        Placed::with(model, device, Policy::default())
    }

    /// The same with another way to go about training.
    pub fn with(model: Decoder<Host>, device: &Device, policy: Policy) -> Result<Placed, Problem> {
        Ok(match device {
            Device::Cpu => Placed::Host(Box::new(HostSide { model, policy, gradients: None })),
            Device::Cuda(gpu) => Placed::Device(Box::new(DeviceSide::new(Decoder::moved(model, gpu)?, policy))),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        match self {
            Placed::Host(side) => &side.model.config,
            Placed::Device(side) => &side.model.config,
        }
    }

    /// The device the model computes on, if it is not the processor.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Placed::Host(_) => None,
            Placed::Device(side) => Some(side.model.gpu()),
        }
    }

    /// The active adapter's rank, alpha and targets.
    pub fn lora(&self) -> Option<&LoraSpec> {
        match self {
            Placed::Host(side) => side.model.lora(),
            Placed::Device(side) => side.model.lora(),
        }
    }

    /// How training goes about its work.
    pub fn policy(&mut self) -> &mut Policy {
        match self {
            Placed::Host(side) => &mut side.policy,
            Placed::Device(side) => &mut side.policy,
        }
    }

    /// Log-probs of the batch's targets, and what the backward pass needs.
    pub fn forward(&mut self, batch: &Batch) -> Result<Pass<'_>, Problem> {
        Ok(match self {
            Placed::Host(side) => side.pass(batch),
            Placed::Device(side) => side.pass(batch)?,
        })
    }

    /// Gradients back to zero.
    pub fn clear_gradients(&mut self) -> Result<(), Problem> {
        match self {
            Placed::Host(side) => {
                side.gradients().clear();
                Ok(())
            }
            Placed::Device(side) => side.gradients()?.values.iter_mut().try_for_each(|sum| sum.clear()),
        }
    }

    /// The gradients of this moment, for the host.
    pub fn gradients(&mut self) -> Result<Gradients, Problem> {
        Ok(match self {
            Placed::Host(side) => side.gradients().clone(),
            Placed::Device(side) => {
                let values = side.gradients()?.values.iter().map(|sum| sum.download()).collect::<Result<_, _>>()?;
                Gradients { values }
            }
        })
    }

    /// Log-probs of the batch's targets, keeping nothing.
    pub fn logprobs(&self, batch: &Batch) -> Result<Vec<f32>, Problem> {
        match self {
            Placed::Host(side) => Ok(side.model.logprobs(batch)),
            Placed::Device(side) => side.model.logprobs(batch),
        }
    }

    /// [`Placed::logprobs`] with the active adapter off.
    pub fn base_logprobs(&mut self, batch: &Batch) -> Result<Vec<f32>, Problem> {
        match self {
            Placed::Host(side) => Ok(side.model.base_logprobs(batch)),
            Placed::Device(side) => side.model.without_adapter(|model| model.logprobs(batch)),
        }
    }

    /// The logits of every token of one sequence: `[T, V]`.
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>, Problem> {
        match self {
            Placed::Host(side) => Ok(side.model.logits(ids)),
            Placed::Device(side) => side.model.sequence_logits(ids),
        }
    }

    /// The residual stream of one sequence as embedded, after each layer, and after the final norm:
    /// layers + 2 times `[T, H]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Result<Vec<Vec<f32>>, Problem> {
        match self {
            Placed::Host(side) => Ok(side.model.hidden_states(ids)),
            Placed::Device(side) => side.model.sequence_states(ids),
        }
    }

    /// The trained tensors of this moment: what is written to files.
    pub fn params(&self) -> Result<Cow<'_, [Parameter]>, Problem> {
        Ok(match self {
            Placed::Host(side) => Cow::Borrowed(side.model.params()),
            Placed::Device(side) => Cow::Owned(side.model.fetch()?),
        })
    }

    /// Lets `change` write to the trained tensors, then brings up to date what is computed with.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [Parameter]) -> R) -> Result<R, Problem> {
        Ok(match self {
            Placed::Host(side) => side.model.update(change),
            Placed::Device(side) => {
                let mut params = side.model.fetch()?;
                let result = change(&mut params);
                side.model.renew(&params)?;
                result
            }
        })
    }
}
