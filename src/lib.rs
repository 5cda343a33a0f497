//! `pipe`: a declarative pipeline engine for studies that fine-tune language models in several stages.
#![deny(missing_docs)]
pub mod cuda;
pub mod data;
pub mod digest;
pub mod exec;
pub mod files;
pub mod generation;
pub mod grade;
pub mod hub;
pub mod manifest;
pub mod measure;
pub mod model;
pub mod plan;
pub mod problem;
pub mod progress;
pub mod random;
pub mod remote;
pub mod safetensors;
pub mod serve;
pub mod stage;
pub mod store;
pub mod tensor;
pub mod train;
