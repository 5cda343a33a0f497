//! Chat completions from any OpenAI-compatible server, as one would trust it with money.
//!
//! A request is known by the digest of what is asked ([`Ask`], [`Sampling`] less its `max_tokens`). Its raw
//! reply is appended to a journal below the cache and synced before it counts (`journal`), so that
//! nothing is paid for twice: not after a kill, not with one record more, another concurrency or another
//! `max_tokens`. Everything between is derived from the journal.
//!
//! Requests go through a few threads that share one `gate`: concurrency, rates, budget, back-off and
//! the circuit breaker are decided there, before a request is sent. `send` makes one attempt and says
//! whether another is worth it; `reply` reads what came. `look` tells beforehand what would be asked.
//!
//! A [`Remote`] is made once per process, so that stages that ask the same endpoint at the same time share
//! its limits.

mod ask;
mod bill;
mod connection;
mod date;
mod endpoint;
mod gate;
mod journal;
mod lock;
mod look;
mod pool;
mod probe;
mod replies;
mod reply;
mod send;
mod standing;

pub use ask::{Ask, Sampling};
pub use bill::Bill;
pub use connection::{Connection, Remote};
pub use date::retry_after;
pub use endpoint::Endpoint;
pub use gate::{Pace, money};
pub use replies::Replies;
pub use reply::{Completion, Finish, Read, Usage, error_words, read};
pub use standing::Standing;
