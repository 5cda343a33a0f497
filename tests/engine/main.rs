//! The engine and the store together, told as stories. Stages are closures: no model is needed.

mod bench;
mod crash;
mod fresh;
mod outside;
mod running;
