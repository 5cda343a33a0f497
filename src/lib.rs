//! `pipe`: a declarative pipeline engine for studies that fine-tune language models in several stages.
pub mod cuda;
pub mod data;
pub mod digest;
pub mod exec;
pub mod files;
pub mod grade;
pub mod hub;
pub mod manifest;
pub mod model;
pub mod plan;
pub mod problem;
pub mod random;
pub mod remote;
pub mod stage;
pub mod store;
pub mod tensor;
pub mod train;
