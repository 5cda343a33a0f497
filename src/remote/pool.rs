//! Many requests at once: a few threads, one journal.
//!
//! The threads are not waited for when the user stops: a request may take minutes. They own all they
//! need, and a reply that still comes before the process ends is journalled like any other.

use super::ask::{Ask, Sampling};
use super::connection::Connection;
use super::gate::{Ended, Refused};
use super::journal;
use super::lock::lock;
use super::reply::Completion;
use super::send::Sent;
use super::standing::Standing;
use crate::problem::{Exit, Problem};
use crate::random::Stream;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Requests that the journal had no reply to.
struct Job {
    asks: Vec<(String, Ask)>,
    sampling: Sampling,
    next: AtomicUsize,
    /// No further request is wanted.
    closed: AtomicBool,
    /// Some request of these was answered: one that is refused is wrong by itself.
    proven: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    workers: usize,
    replies: usize,
    /// By key, why there is no reply.
    failed: HashMap<String, String>,
    fatal: Option<Problem>,
}

/// Why a request has no reply.
enum End {
    Failed(String),
    Fatal(Problem),
    Closed,
}

impl Connection {
    /// A completion for every ask, in order, or why there is none. Asks only for what the journal does not
    /// have. `watch` is called several times a second, and stops the job by an error.
    pub fn complete(
        self: &Arc<Self>,
        asks: &[Ask],
        sampling: &Sampling,
        watch: &mut dyn FnMut(&Standing) -> Result<(), Problem>,
    ) -> Result<Vec<Result<Completion, String>>, Problem> {
        self.journal.refresh()?;
        let keys: Vec<String> = asks.iter().map(|ask| ask.key(&self.endpoint.model, sampling)).collect();
        let mut seen = HashSet::new();
        let missing: Vec<usize> = (0..asks.len())
            .filter(|&i| !self.journal.has(&keys[i], sampling.max_tokens) && seen.insert(&keys[i]))
            .collect();
        let job = Job {
            asks: missing.iter().map(|&i| (keys[i].clone(), asks[i].clone())).collect(),
            sampling: sampling.clone(),
            next: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            proven: AtomicBool::new(missing.len() < asks.len()),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        let had = asks.len() - missing.len();
        let failed = if missing.is_empty() { HashMap::new() } else { self.run(Arc::new(job), had, watch)? };
        let mut completions = Vec::with_capacity(asks.len());
        for key in &keys {
            completions.push(match (self.journal.get(key, sampling.max_tokens)?, failed.get(key)) {
                (Some(completion), _) => Ok(completion),
                (None, Some(why)) => Err(why.clone()),
                (None, None) => {
                    let message = "a reply that came is not in the journal any more";
                    return Err(Problem::new("remote::journal", message).help("run again"));
                }
            });
        }
        Ok(completions)
    }

    /// Sends what is missing; why some of it has no reply.
    fn run(
        self: &Arc<Self>,
        job: Arc<Job>,
        had: usize,
        watch: &mut dyn FnMut(&Standing) -> Result<(), Problem>,
    ) -> Result<HashMap<String, String>, Problem> {
        if self.sender.is_none() {
            let message = format!("{} replies of {} are not in the journal", job.asks.len(), self.endpoint.name());
            return Err(Problem::new("remote::offline", message)
                .exit(Exit::Missing)
                .note("nobody is asked with `--offline`")
                .help("run without `--offline`"));
        }
        self.gate.begin();
        let begun = Instant::now();
        let wanted = self.endpoint.max_concurrency.min(job.asks.len());
        for n in 0..wanted {
            let worker = Worker { connection: self.clone(), job: job.clone() };
            lock(&job.state).workers += 1;
            let builder = std::thread::Builder::new().name(format!("remote-{n}")).stack_size(1 << 20);
            // Counted out again by the worker that was not started; the others do its share.
            if let Err(error) = builder.spawn(move || worker.work())
                && n == 0
            {
                return Err(Problem::new("remote::thread", format!("cannot start a thread: {error}")));
            }
        }
        loop {
            let mut state = lock(&job.state);
            if state.fatal.is_some() {
                // What is under way is paid for: it is waited for.
                job.closed.store(true, Ordering::Relaxed);
            }
            let settled = state.replies + state.failed.len();
            if settled == job.asks.len() || state.workers == 0 {
                return match state.fatal.take() {
                    Some(problem) => Err(problem),
                    None if settled == job.asks.len() => Ok(std::mem::take(&mut state.failed)),
                    None => Err(Problem::new("remote::worker", "a request came to no end")
                        .note("this is a mistake in pipe; replies that came are kept")),
                };
            }
            let replies = state.replies;
            drop(job.changed.wait_timeout(state, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner));
            let standing = Standing {
                done: had + settled,
                rate: replies as f64 / begun.elapsed().as_secs_f64().max(1e-3),
                spent: self.endpoint.is_priced().then(|| self.spent()),
                pausing: self.gate.pausing(),
            };
            if let Err(problem) = watch(&standing) {
                job.closed.store(true, Ordering::Relaxed);
                return Err(problem);
            }
        }
    }

    /// What is paid, as far as anybody knows.
    fn spent(&self) -> f64 {
        self.paid() + self.gate.lost()
    }

    fn paid_by_now(&self) -> Result<f64, Problem> {
        self.journal.refresh()?;
        Ok(self.paid())
    }
}

struct Worker {
    connection: Arc<Connection>,
    job: Arc<Job>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        lock(&self.job.state).workers -= 1;
        self.job.changed.notify_all();
    }
}

impl Worker {
    fn work(self) {
        loop {
            let at = self.job.next.fetch_add(1, Ordering::Relaxed);
            let Some((key, ask)) = self.job.asks.get(at) else { return };
            let end = self.settle(key, ask);
            let mut state = lock(&self.job.state);
            match end {
                Ok(()) => state.replies += 1,
                Err(End::Failed(why)) => drop(state.failed.insert(key.clone(), why)),
                Err(End::Fatal(problem)) => {
                    state.fatal.get_or_insert(problem);
                    self.job.closed.store(true, Ordering::Relaxed);
                }
                Err(End::Closed) => return,
            }
            drop(state);
            self.job.changed.notify_all();
        }
    }

    fn closed(&self) -> bool {
        self.job.closed.load(Ordering::Relaxed)
    }

    /// Sends a request until its reply is in the journal.
    fn settle(&self, key: &str, ask: &Ask) -> Result<(), End> {
        let Worker { connection, job } = self;
        let (endpoint, max_tokens) = (&connection.endpoint, job.sampling.max_tokens);
        let _asking = self.alone_with(key)?;
        // Somebody else may have asked meanwhile.
        if connection.journal.has(key, max_tokens) {
            return Ok(());
        }
        let sender = connection.sender.as_ref().ok_or(End::Closed)?;
        let (body, bound) = (ask.body(endpoint, &job.sampling), ask.prompt_bound());
        let worst = endpoint.cost(bound, max_tokens);
        let scatter = Stream::named(job.sampling.seed, &["retry", key]);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let permit =
                match connection.gate.admit(bound + max_tokens, worst, &|| connection.paid_by_now(), &|| self.closed())
                {
                    Ok(permit) => permit,
                    Err(Refused::Closed) => return Err(End::Closed),
                    Err(Refused::Stop(problem)) => return Err(End::Fatal(problem)),
                };
            let (why, wait) = match sender.complete(&body, connection.gate.pace()) {
                Sent::Reply(body, completion) => {
                    let host = endpoint.host();
                    let entry = journal::Entry { key, host, max_tokens, prompt_bound: bound, body: &body };
                    let kept = connection.journal.add(&entry);
                    let tokens = completion.usage.map(|usage| usage.prompt_tokens + usage.completion_tokens);
                    permit.settle(&Ended::Reply { tokens }, "");
                    job.proven.store(true, Ordering::Relaxed);
                    return kept.map_err(End::Fatal);
                }
                Sent::Again { why, ended, wait } => {
                    permit.settle(&ended, &why);
                    (why, wait)
                }
                Sent::Refused { why, ended } => {
                    permit.settle(&ended, &why);
                    if !job.proven.load(Ordering::Relaxed) && !matches!(ended, Ended::Broken { .. }) {
                        return Err(End::Fatal(first_refused(&endpoint.name(), &why)));
                    }
                    return Err(End::Failed(why));
                }
                Sent::Stop(problem) => {
                    permit.settle(&Ended::Refused { wait: None }, "");
                    return Err(End::Fatal(problem));
                }
            };
            if attempt >= endpoint.max_attempts {
                return Err(End::Failed(format!("{why} (sent {attempt} times)")));
            }
            let backoff = connection.gate.pace().backoff(attempt, scatter.uniform(u64::from(attempt)));
            self.sleep(wait.unwrap_or_default().max(backoff))?;
        }
    }

    /// Waits until nobody else has this request under way, and keeps others from it.
    fn alone_with(&self, key: &str) -> Result<Asking<'_>, End> {
        let mut asked = lock(&self.connection.asked);
        while !asked.insert(key.to_string()) {
            if self.closed() {
                return Err(End::Closed);
            }
            let waited = self.connection.answered.wait_timeout(asked, Duration::from_millis(50));
            asked = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Asking { connection: &self.connection, key: key.to_string() })
    }

    fn sleep(&self, wait: Duration) -> Result<(), End> {
        let end = Instant::now() + wait;
        loop {
            if self.closed() {
                return Err(End::Closed);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// A request under way.
struct Asking<'a> {
    connection: &'a Connection,
    key: String,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        lock(&self.connection.asked).remove(&self.key);
        self.connection.answered.notify_all();
    }
}

/// Before any was answered, what is wrong with one is wrong with all.
fn first_refused(name: &str, why: &str) -> Problem {
    Problem::new("remote::refused", format!("{name} refuses the request"))
        .note(why)
        .note("no request was answered before it, so no other is sent")
        .help("a key that the server does not know, a `max_tokens` beyond its limit or a prompt beyond its context; `send_seed = false` and `max_tokens_key` of the endpoint change what is sent")
}
