//! A model where it computes: on the processor, or on a CUDA device. The only place that tells them apart.

use super::device::{DeviceGradients, DeviceModel};
use super::device_step::DeviceTape;
use super::qwen2::{Batch, Model, Tape};
use super::{Gradients, Parameter};
use crate::cuda::Gpu;
use crate::cuda::ops::adamw::Tensor;
use crate::problem::Problem;
use std::borrow::Cow;
use std::ops::Deref;

/// Where a stage computes.
#[derive(Clone)]
pub enum Device {
    Cpu,
    Cuda(Gpu),
}

/// A model and, if it computes on a device, what of it lies there. Reads as the [`Model`] it is, with the trained
/// values it had when it was placed, or when [`Placed::host`] or [`Placed::update`] last asked for them.
pub struct Placed {
    model: Model,
    device: Option<DeviceModel>,
    /// Whether the values on the device are newer than the host's.
    ahead: bool,
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

/// One sum of gradients per trained tensor, where the model computes.
pub enum PlacedGradients {
    Host(Gradients),
    Device(DeviceGradients),
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
            Device::Cuda(gpu) => Some(DeviceModel::upload(gpu, &model)?),
        };
        Ok(Placed { model, device, ahead: false })
    }

    /// What of the model lies on a device.
    pub(super) fn device(&self) -> Option<&DeviceModel> {
        self.device.as_ref()
    }

    /// The device the model computes on, if it is not the processor.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.device.as_ref().map(DeviceModel::gpu)
    }

    /// Zeros for every trained tensor.
    pub fn zero_gradients(&self) -> Result<PlacedGradients, Problem> {
        Ok(match &self.device {
            None => PlacedGradients::Host(Gradients::zeros(&self.model)),
            Some(device) => PlacedGradients::Device(device.zero_gradients()?),
        })
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
    pub fn backward(&self, tape: PlacedTape, dlogprobs: &[f32], grads: &mut PlacedGradients) -> Result<(), Problem> {
        match (tape, grads, &self.device) {
            (PlacedTape::Host(tape), PlacedGradients::Host(grads), None) => {
                self.model.backward(tape, dlogprobs, grads);
                Ok(())
            }
            (PlacedTape::Device(tape), PlacedGradients::Device(grads), Some(device)) => {
                device.backward(&self.model, tape, dlogprobs, grads)
            }
            _ => unreachable!("a tape or gradients of another place than the model's"),
        }
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

    /// The model with the trained values of this moment: what is written to files.
    pub fn host(&mut self) -> Result<&Model, Problem> {
        if self.ahead
            && let Some(device) = &self.device
        {
            self.model.update(|params| device.fetch(params))?;
            self.ahead = false;
        }
        Ok(&self.model)
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
        self.host()?;
        let result = self.model.update(change);
        if let Some(device) = &mut self.device {
            device.renew(self.model.params())?;
        }
        Ok(result)
    }

    /// Lets `change` write to the trained tensors where they lie on the device, each beside its gradient.
    pub fn update_there<R>(
        &mut self,
        grads: &PlacedGradients,
        change: impl FnOnce(&Gpu, &[Tensor]) -> Result<R, Problem>,
    ) -> Result<R, Problem> {
        let (Some(device), PlacedGradients::Device(grads)) = (&self.device, grads) else {
            unreachable!("neither model nor gradients are on a device")
        };
        self.ahead = true;
        change(device.gpu(), &device.tensors(grads))
    }
}

impl PlacedGradients {
    /// Back to zero, keeping the memory.
    pub fn clear(&mut self) -> Result<(), Problem> {
        match self {
            PlacedGradients::Host(grads) => {
                grads.clear();
                Ok(())
            }
            PlacedGradients::Device(grads) => grads.clear(),
        }
    }

    /// Their values of this moment: what is written to files.
    pub fn host(&self) -> Result<Cow<'_, Gradients>, Problem> {
        Ok(match self {
            PlacedGradients::Host(grads) => Cow::Borrowed(grads),
            PlacedGradients::Device(grads) => Cow::Owned(Gradients { values: grads.download()? }),
        })
    }
}
