//! Every kernel on the emulator, against its reference in `f64`; the model and its stages through all of them.

mod adamw;
mod attention;
mod attention_decode;
#[path = "../stages/bench.rs"]
#[allow(dead_code, reason = "the tests of the stages use more of it")]
mod bench;
mod bias;
mod cast;
mod decode;
mod embedding;
mod emulator;
mod gpu_bench;
mod grad_norm;
mod graph;
mod head_logprob;
mod jit;
mod lora_matmul;
mod memory;
mod model;
mod prebuilt;
mod queues;
mod residual;
mod rmsnorm;
mod rope;
mod sampling;
mod steps;
mod support;
mod swiglu;
mod training;
