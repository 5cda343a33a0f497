//! Launchers: one file per kernel, which checks sizes and fills in grid and arguments.

pub mod adamw;
pub mod attention;
pub mod attention_decode;
pub mod bias;
pub mod cast;
pub mod embedding;
pub mod grad_norm;
pub mod head_logprob;
pub mod lora_matmul;
pub mod residual;
pub mod rmsnorm;
pub mod rope;
pub mod sampling;
pub mod swiglu;
