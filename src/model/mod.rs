//! Qwen2 / Qwen2.5: read from and written to Hugging Face folders, run forward and backward, sampled from.
//!
//! | file | holds |
//! |---|---|
//! | `config.rs` | `config.json` |
//! | `weights.rs` | safetensors in and out |
//! | `lora.rs` | adapters and PEFT folders |
//! | `qwen2.rs` | the model: forward, backward, what is trained |
//! | `device.rs`, `device_decode.rs` | the same on a CUDA device |
//! | `placed.rs` | a model where it computes |
//! | `fit.rs` | how many layers may keep their insides |
//! | `load.rs` | a chain of folders to a model, and back to folders |
//! | `engine.rs` | generation: requests in at any time, tokens out |
//! | `host_decode.rs` | where its keys and values lie on the host, and a step there |
//! | `pages.rs` | who has which pages of keys and values |
//! | `sampling.rs` | logits to the next token |
//! | `memory.rs` | how much memory all this takes, beforehand |

pub mod config;
pub mod device;
mod device_decode;
pub mod engine;
pub mod fit;
mod host_decode;
pub mod load;
pub mod lora;
pub mod memory;
mod pages;
pub mod placed;
pub mod qwen2;
pub mod sampling;
pub mod weights;

pub use config::Config;
pub use engine::{Ask, Completion, Engine, Event, Finish, Limits, Prompt, Ticket, generate};
pub use load::LoadOptions;
pub use lora::LoraSpec;
pub use placed::{Device, Placed, PlacedGradients};
pub use qwen2::{Batch, Forward, Model, Recompute, Tape};
pub use sampling::Sampling;

/// One trained tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Its name in the file it is saved to.
    pub name: String,
    pub shape: Vec<usize>,
    /// Row-major, in f32 whatever the storage of the model.
    pub value: Vec<f32>,
}

impl Parameter {
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// One gradient per trained tensor, in the order of [`Model::params`].
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    pub values: Vec<Vec<f32>>,
}

impl Gradients {
    /// Zeros for every trained tensor of `model`.
    pub fn zeros(model: &Model) -> Gradients {
        Gradients { values: model.params().iter().map(|param| vec![0.0; param.value.len()]).collect() }
    }

    /// Back to zero, keeping the memory.
    pub fn clear(&mut self) {
        self.values.iter_mut().for_each(|values| values.fill(0.0));
    }
}
