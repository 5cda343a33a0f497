//! Stages run on real folders, without a plan or a store.
mod bench;
mod command;
mod eval;
mod generate;
mod judge;
mod kernel;
mod manifest;
mod thinking;

pub use bench::{Bench, resolved};
