//! Numbers on the CPU: matrix products, vector helpers, and the operations of the model.
//!
//! What everything here keeps to:
//! - slices are row-major and dense; sizes are checked with assertions, because a wrong size is a
//!   fault of the caller and not of its input;
//! - a result depends on its operands only: not on the number of threads, not on how many rows are
//!   computed together, and, in f32, not on the instruction set;
//! - storage may be bf16, sums never are.
//!
//! Symbols: T tokens, C channels, H heads, KV key/value heads, D head size, V vocabulary, R rows,
//! r LoRA rank.

mod isa;
mod matmul;
pub mod ops;
pub mod vector;

pub use isa::Isa;
pub use matmul::{Dtype, Matrix, gemm, linear, linear_backward, linears};
