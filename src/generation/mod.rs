//! Generation: requests in at any time, tokens out, many at once. What a model computes for it is in
//! [`crate::model`]; here is who begins, where keys and values lie, and how a token is drawn.
//!
//! | file | holds |
//! |---|---|
//! | `engine.rs` | requests in line, completions in the making |
//! | `request.rs` | what is asked, and what is told |
//! | `pages.rs` | who has which pages of keys and values |
//! | `host.rs`, `device.rs` | where those lie, and a step there |
//! | `sampling.rs` | logits to the next token |

mod device;
pub mod engine;
mod host;
mod pages;
pub mod request;
pub mod sampling;

pub use engine::{Engine, complete, generate};
pub use request::{Ask, Completion, Event, Finish, Limits, MOST_TOP, Prompt, Ticket};
pub use sampling::Sampling;
