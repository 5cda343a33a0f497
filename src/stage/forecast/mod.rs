//! What a stage will need and do, told before it runs: what is the same for all kinds that train, or complete.

pub mod completions;
pub mod needs;
pub mod training;
