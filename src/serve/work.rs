//! The one thread that runs the model: takes jobs, lets the engine step, hands out tokens.

use super::service::Service;
use crate::generation::Completion;
use crate::generation::{Ask, Engine, Event, Ticket};
use crate::model::Placed;
use crate::problem::Problem;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

/// The completions of one request.
pub struct Job {
    /// One for each completion.
    pub asks: Vec<Ask>,
    /// Where its tokens go.
    pub to: Sender<Piece>,
    /// Nobody waits for them any more.
    pub gone: Arc<AtomicBool>,
}

/// What comes of a job. Completions are known by their place among the asks.
pub enum Piece {
    /// All of it is in the queue.
    Begun,
    /// Nothing of it is.
    Refused(Problem),
    /// A token was drawn.
    Token {
        /// Which completion, counted from 0.
        choice: usize,
        /// Its id.
        id: u32,
        /// log p of the token under the model itself.
        logprob: f32,
        /// The likeliest ids that may be drawn, likeliest first, with the same log p; empty unless asked for.
        top: Vec<(u32, f32)>,
    },
    /// There is no more of one completion.
    End {
        /// Which one, counted from 0.
        choice: usize,
        /// All of it, with why it ended.
        completion: Completion,
    },
    /// The engine failed; there is no more.
    Failed(Problem),
}

/// How much is at work now.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Completions that tokens are drawn for.
    pub live: AtomicUsize,
    /// Completions that wait for a place.
    pub waiting: AtomicUsize,
}

/// A completion that somebody waits for.
struct Work {
    to: Sender<Piece>,
    gone: Arc<AtomicBool>,
    choice: usize,
}

/// Runs the engine until nobody can ask any more; `ready` is told when it is there. What fails, fails for those who are
/// being served, who are told; `Err` only if no engine can be made.
pub fn decode(
    placed: &Placed,
    service: &Service,
    jobs: Receiver<Job>,
    gauges: &Gauges,
    ready: impl FnOnce(),
) -> Result<(), Problem> {
    let decode = |ids: &[u32]| service.tokenizer.decode(ids, false);
    let mut ready = Some(ready);
    loop {
        let mut engine = Engine::new(placed, service.limits.clone(), &decode)?;
        if let Some(ready) = ready.take() {
            ready();
        }
        let mut works = HashMap::new();
        let run = catch_unwind(AssertUnwindSafe(|| run(&mut engine, &mut works, &jobs, gauges)));
        let problem = match run {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(problem)) => problem,
            Err(panic) => {
                let words = panic.downcast_ref::<String>().map(String::as_str);
                let words = words.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
                Problem::new("serve::panicked", format!("the engine failed: {words}"))
            }
        };
        for work in works.into_values() {
            let _ = work.to.send(Piece::Failed(problem.clone()));
        }
    }
}

fn run(
    engine: &mut Engine,
    works: &mut HashMap<Ticket, Work>,
    jobs: &Receiver<Job>,
    gauges: &Gauges,
) -> Result<(), Problem> {
    loop {
        loop {
            let job = match engine.is_idle() {
                true => match jobs.recv() {
                    Ok(job) => job,
                    Err(_) => return Ok(()),
                },
                false => match jobs.try_recv() {
                    Ok(job) => job,
                    // Those who asked wait for the rest.
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                },
            };
            take(engine, works, job);
        }
        works.retain(|ticket, work| {
            let gone = work.gone.load(Ordering::Relaxed);
            if gone {
                engine.cancel(*ticket);
            }
            !gone
        });
        if !engine.is_idle() {
            for event in engine.step()? {
                hand_out(works, event);
            }
        }
        gauges.live.store(engine.live(), Ordering::Relaxed);
        gauges.waiting.store(engine.waiting(), Ordering::Relaxed);
    }
}

/// Puts all of a job in the queue, or nothing.
fn take(engine: &mut Engine, works: &mut HashMap<Ticket, Work>, job: Job) {
    let Job { asks, to, gone } = job;
    let mut tickets = Vec::new();
    for (choice, ask) in asks.into_iter().enumerate() {
        match engine.submit(ask) {
            Ok(ticket) => {
                works.insert(ticket, Work { to: to.clone(), gone: gone.clone(), choice });
                tickets.push(ticket);
            }
            Err(problem) => {
                for ticket in tickets {
                    works.remove(&ticket);
                    engine.cancel(ticket);
                }
                let _ = to.send(Piece::Refused(problem));
                return;
            }
        }
    }
    let _ = to.send(Piece::Begun);
}

/// Who has gone away meanwhile is noticed before the next step.
fn hand_out(works: &mut HashMap<Ticket, Work>, event: Event) {
    match event {
        Event::Token { ticket, id, logprob, top } => {
            if let Some(work) = works.get(&ticket) {
                let _ = work.to.send(Piece::Token { choice: work.choice, id, logprob, top });
            }
        }
        Event::End { ticket, completion } => {
            if let Some(work) = works.remove(&ticket) {
                let _ = work.to.send(Piece::End { choice: work.choice, completion });
            }
        }
    }
}
