//! What kinds have in common.

pub mod asking;
pub mod bundled;
pub mod completing;
pub mod decoding;
pub mod inputs;
pub mod judge;
pub mod readings;
pub mod template;
pub mod thinking;
pub mod training;
pub mod turns;
