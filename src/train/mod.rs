//! Parts of a training loop: optimizers, learning rate, clipping, checkpoints. The loop itself stands in
//! each stage, in plain sight.
//!
//! All of them compute the same bits for any number of threads: elementwise work is split, and sums are
//! over fixed blocks that are added in order.

pub mod adamw;
pub mod adamw8bit;
pub mod checkpoint;
pub mod clip;
pub mod optimizer;
pub mod schedule;
mod state;
pub mod trainer;

pub use adamw::{AdamW, Options};
pub use adamw8bit::AdamW8bit;
pub use checkpoint::{Checkpoint, Restored};
pub use clip::{clip, global_norm, require_finite};
pub use optimizer::{Kind, Optimizer};
pub use schedule::{Curve, Schedule};
pub use state::State;
pub use trainer::Trainer;
