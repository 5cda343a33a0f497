//! The operations: the f64 definition against finite differences, then the CPU version against the
//! definition on odd shapes, then what must hold bit for bit.

mod attention;
mod common;
mod head_logprob;
mod rowwise;
