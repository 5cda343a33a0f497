//! What kinds have in common.

pub mod asking;
pub mod bundled;
pub mod decoding;
pub mod inputs;
pub mod judge;
pub mod readings;
pub mod thinking;
pub mod training;
