//! Dense decoders: read from and written to Hugging Face folders, run forward and backward.
//!
//! | file | holds |
//! |---|---|
//! | `family.rs` | what one architecture has that others have not, as data |
//! | `config.rs`, `tensors.rs` | `config.json`; names and shapes of a checkpoint's tensors |
//! | `place.rs` | the operations that every place offers |
//! | `host.rs`, `device.rs`, `count.rs` | the processor, a CUDA device, and a place that only counts memory |
//! | `decoder.rs` | the model, written once over those: forward pass, backward pass |
//! | `step.rs`, `sizes.rs` | the same while decoding: prompts, and one token of each completion; how many of them |
//! | `build.rs` | a model of tensors, and what of it is trained |
//! | `lora.rs`, `load.rs` | adapters and PEFT folders; a chain of folders to a model, and back |
//! | `placed.rs` | a model where it computes |
//! | `captured.rs` | training steps on a device, those of one shape captured |
//! | `policy.rs`, `fit.rs` | memory against time, and how many layers may keep what is inside them |
//! | `memory.rs` | how much memory all this takes, beforehand |

mod batch;
mod build;
mod captured;
pub mod config;
mod count;
pub mod decoder;
pub mod device;
pub mod family;
pub mod fit;
pub mod host;
pub mod load;
pub mod lora;
pub mod memory;
mod parameter;
pub mod place;
pub mod placed;
mod policy;
pub(crate) mod sizes;
pub(crate) mod step;
pub mod tensors;

pub use batch::{Batch, Extent};
pub use captured::DeviceSide;
pub use config::Config;
pub use decoder::Tape;
pub use load::LoadOptions;
pub use lora::LoraSpec;
pub use parameter::{Gradients, Parameter};
pub use placed::{Device, Forward, HostSide, Pass, Placed};
pub use policy::{Policy, Recompute};

/// A model on the processor.
pub type Model = decoder::Decoder<host::Host>;
