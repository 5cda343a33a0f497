//! One model behind HTTP, as OpenAI's clients ask for it: `/v1/chat/completions`, `/v1/completions`, `/v1/models`,
//! `/health`, `/metrics`.
//!
//! | file | holds |
//! |---|---|
//! | `http.rs` | a connection: requests in, replies out, bounds on both |
//! | `answer.rs` | who is let in, which path does what, one request from its body to its last token |
//! | `ask.rs` | the parameters of a request |
//! | `reply.rs` | the JSON of an answer, whole and streamed |
//! | `text.rs` | text that is shown while it is made |
//! | `work.rs` | the one thread that runs the model |
//! | `service.rs` | what is served, and within which bounds |
//! | `refusal.rs` | errors in OpenAI's shape |
//!
//! A connection has a thread of its own, of which there are a few hundred at most; what is asked goes to the thread that
//! called [`serve`], which runs the engine, and comes back token by token. A thread that nobody waits for takes its
//! request along: a client that goes away frees what it held of the cache.

mod answer;
mod ask;
mod http;
mod refusal;
mod reply;
mod service;
pub mod text;
mod work;

pub use answer::{Entry, answer};
pub use service::{Bounds, Service};
pub use work::{Gauges, Job, Piece, decode};

use crate::model::Placed;
use crate::problem::Problem;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

/// Answers at `listener` until `stop` is set, and then until what is at work has ended, within bounds. `ready` is told
/// when the model can be asked, `log` of every request when it is over. `Err` if the model cannot be run at all.
pub fn serve(
    listener: &TcpListener,
    placed: &Placed,
    service: &Service,
    stop: &AtomicBool,
    ready: impl FnOnce(),
    log: &(dyn Fn(&Entry) + Sync),
) -> Result<(), Problem> {
    let (jobs, asked) = mpsc::channel();
    let gauges = Gauges::default();
    std::thread::scope(|scope| {
        scope.spawn(|| answer(listener, service, jobs, &gauges, stop, log));
        let done = decode(placed, service, asked, &gauges, ready);
        // Where it ended by itself, nobody is left to answer.
        stop.store(true, Ordering::Relaxed);
        done
    })
}
