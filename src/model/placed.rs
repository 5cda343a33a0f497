//! A model where it computes: on the processor, or on a CUDA device. The only place that tells them apart.

use super::device::{DeviceModel, DeviceTape};
use super::qwen2::{Batch, Model, Tape};
use super::{Gradients, Parameter};
use crate::cuda::Gpu;
use crate::problem::{Exit, Problem};
use std::ops::Deref;

/// Where a stage computes.
#[derive(Clone)]
pub enum Device {
    Cpu,
    Cuda(Gpu),
}

/// A model and, if it computes on a device, what of it lies there. Reads as the [`Model`] it is.
pub struct Placed {
    model: Model,
    device: Option<DeviceModel>,
}

/// What [`Placed::forward`] gives.
pub struct PlacedForward {
    /// `[R]` log p(target) of each row.
    pub logprobs: Vec<f32>,
    pub tape: PlacedTape,
}

/// What the way back needs of the way there.
pub enum PlacedTape {
    Host(Tape),
    Device(DeviceTape),
}

impl Deref for Placed {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Placed {
    /// `Err` (exit 3) if the device has no kernels for the model's shape, or not the memory.
    pub fn new(model: Model, device: &Device) -> Result<Placed, Problem> {
        let device = match device {
            Device::Cpu => None,
            Device::Cuda(_) if model.trains_everything() => {
                return Err(Problem::new("cuda::every_weight", "training every weight has no CUDA path yet")
                    .exit(Exit::Missing)
                    .help("train an adapter (`lora = { rank = 16, alpha = 32 }`), or `--device cpu`"));
            }
            Device::Cuda(gpu) => Some(DeviceModel::upload(gpu, &model)?),
        };
        Ok(Placed { model, device })
    }

    /// What of the model lies on a device.
    pub(super) fn device(&self) -> Option<&DeviceModel> {
        self.device.as_ref()
    }

    /// Log-probs of the batch's targets, and what [`Placed::backward`] needs.
    pub fn forward(&self, batch: &Batch) -> Result<PlacedForward, Problem> {
        Ok(match &self.device {
            None => {
                let forward = self.model.forward(batch);
                PlacedForward { logprobs: forward.logprobs, tape: PlacedTape::Host(forward.tape) }
            }
            Some(device) => {
                let (logprobs, tape) = device.forward(&self.model, batch)?;
                PlacedForward { logprobs, tape: PlacedTape::Device(tape) }
            }
        })
    }

    /// Adds to `grads` the gradient of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(&self, tape: PlacedTape, dlogprobs: &[f32], grads: &mut Gradients) -> Result<(), Problem> {
        match (tape, &self.device) {
            (PlacedTape::Host(tape), _) => self.model.backward(tape, dlogprobs, grads),
            (PlacedTape::Device(tape), Some(device)) => device.backward(&self.model, tape, dlogprobs, grads)?,
            (PlacedTape::Device(_), None) => unreachable!("a tape of a device that the model is not on"),
        }
        Ok(())
    }

    /// Log-probs of the batch's targets, keeping nothing.
    pub fn logprobs(&self, batch: &Batch) -> Result<Vec<f32>, Problem> {
        match &self.device {
            None => Ok(self.model.logprobs(batch)),
            Some(device) => device.logprobs(&self.model, batch),
        }
    }

    /// [`Placed::logprobs`] with the active adapter off.
    pub fn base_logprobs(&mut self, batch: &Batch) -> Result<Vec<f32>, Problem> {
        match &self.device {
            None => Ok(self.model.base_logprobs(batch)),
            Some(device) => {
                self.model.switch_adapter(false);
                let logprobs = device.logprobs(&self.model, batch);
                self.model.switch_adapter(true);
                logprobs
            }
        }
    }

    /// The logits of every token of one sequence: `[T, V]`.
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>, Problem> {
        match &self.device {
            None => Ok(self.model.logits(ids)),
            Some(device) => device.sequence_logits(&self.model, ids),
        }
    }

    /// The residual stream of one sequence as embedded, after each layer, and after the final norm:
    /// layers + 2 times `[T, H]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Result<Vec<Vec<f32>>, Problem> {
        match &self.device {
            None => Ok(self.model.hidden_states(ids)),
            Some(device) => device.hidden_states(&self.model, ids),
        }
    }

    /// Lets `change` write to the trained tensors, then brings up to date what is computed with.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [Parameter]) -> R) -> Result<R, Problem> {
        let result = self.model.update(change);
        if let Some(device) = &mut self.device {
            device.renew(self.model.params())?;
        }
        Ok(result)
    }
}
