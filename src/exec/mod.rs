//! Walks a plan: asks the store what is there, runs what is stale and nothing else, writes the log.
//!
//! [`Engine::status`] is the one judge of fresh, stale and waiting: `plan` and `why` print what it
//! says, `run` does it. The engine knows cells, fingerprints and files. What a stage computes it
//! learns from nobody: a [`Runner`] is handed parameters, input files and an empty folder.

mod attempt;
mod engine;
mod events;
mod report;
mod run;
mod runner;
mod schedule;
mod sources;
mod status;

pub use engine::Engine;
pub use events::{Event, Observer, Silent, describe};
pub use report::{Options, Outcome, Report};
pub use runner::{Progress, Runner, Task, TaskInput};
pub use sources::{Paths, Resolved, Sources};
pub use status::{Reason, Status, Survey, causes};
