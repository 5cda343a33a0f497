//! The kinds of stage, a file or folder each.

pub mod check;
pub mod command;
pub mod dataset;
pub mod dpo;
pub mod eval;
pub mod generate;
pub mod kernel;
pub mod model;
pub mod plot;
pub mod probe;
pub mod sft;
pub mod table;
