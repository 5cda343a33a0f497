//! What a stage will need and do, told before it runs.

pub mod counts;
pub mod needs;
