//! Who may send a request now: concurrency, rates, back-off, circuit breaker, budget.
//!
//! One gate per endpoint. A request is admitted when all of them agree, and what it can cost at most is
//! reserved until its reply says what it did cost.

use super::endpoint::Endpoint;
use super::lock::lock;
use crate::problem::Problem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Waits, so that tests need not.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Before the second attempt; doubled for each further one.
    pub first_wait: Duration,
    /// The longest wait of its own accord.
    pub longest_wait: Duration,
    /// The longest that a server may ask for.
    pub longest_asked: Duration,
    /// This many failures in a row, of whatever requests, and nothing is sent for a while.
    pub breaker: u32,
    /// How long, before one request is tried; if that fails too the next pause begins, and after the last
    /// it is given up.
    pub pauses: Vec<Duration>,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(60),
            longest_asked: Duration::from_secs(300),
            breaker: 10,
            pauses: [15, 45, 120].map(Duration::from_secs).to_vec(),
        }
    }
}

impl Pace {
    /// The wait after a failed attempt (from 1): doubled each time, and drawn from its upper half.
    pub(super) fn backoff(&self, attempt: u32, uniform: f64) -> Duration {
        let doubled = self.first_wait.saturating_mul(1 << attempt.saturating_sub(1).min(16));
        doubled.min(self.longest_wait).mul_f64(0.5 + 0.5 * uniform)
    }
}

pub(super) struct Gate {
    pace: Pace,
    max_concurrency: usize,
    budget: Option<f64>,
    name: String,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    running: usize,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    not_before: Option<Instant>,
    /// What requests under way can cost at most.
    reserved: f64,
    /// What requests may have cost that ended without a reply.
    lost: f64,
    /// How many requests have ended.
    ended: u64,
    failures: u32,
    open: Option<Open>,
    /// Nothing is sent any more.
    given_up: Option<Problem>,
}

/// The breaker is open.
struct Open {
    until: Instant,
    round: usize,
    /// One request is being tried.
    trying: bool,
}

/// Why a request was not admitted.
pub(super) enum Refused {
    /// Whoever wanted it wants it no more.
    Closed,
    /// Nothing that is sent to this endpoint helps.
    Stop(Problem),
}

/// The right to send one request.
pub(super) struct Permit<'a> {
    gate: &'a Gate,
    worst: f64,
    tokens: u64,
    trying: bool,
    settled: bool,
}

/// How an attempt ended, for the gate.
pub(super) enum Ended {
    /// With a reply of this many tokens, if it says.
    Reply { tokens: Option<u64> },
    /// The server is there and said no. `wait`: asks to be left alone by all.
    Refused { wait: Option<Duration> },
    /// Without an answer to be had. `sent`: the server may have worked for it.
    Broken { sent: bool },
}

impl Gate {
    pub fn new(endpoint: &Endpoint, pace: Pace) -> Gate {
        let state = State {
            running: 0,
            requests: endpoint.requests_per_minute.map(|rate| Bucket::new(rate as f64, rate as f64 / 60.0)),
            tokens: endpoint.tokens_per_minute.map(|rate| Bucket::new(rate as f64, rate as f64 / 6.0)),
            not_before: None,
            reserved: 0.0,
            lost: 0.0,
            ended: 0,
            failures: 0,
            open: None,
            given_up: None,
        };
        Gate {
            pace,
            max_concurrency: endpoint.max_concurrency,
            budget: endpoint.budget,
            name: endpoint.name(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Forgets that it was given up: a new job may try again.
    pub fn begin(&self) {
        let mut state = lock(&self.state);
        if state.given_up.take().is_some() {
            state.open = None;
            state.failures = 0;
        }
    }

    pub fn pausing(&self) -> bool {
        lock(&self.state).open.is_some()
    }

    /// What may have been paid beside what the journal knows.
    pub fn lost(&self) -> f64 {
        lock(&self.state).lost
    }

    /// Waits until a request of at most `tokens`, costing at most `worst`, may be sent. `paid` looks up
    /// what was paid already; `closed` whether it is still wanted.
    pub fn admit(
        &self,
        tokens: u64,
        worst: f64,
        paid: &dyn Fn() -> Result<f64, Problem>,
        closed: &dyn Fn() -> bool,
    ) -> Result<Permit<'_>, Refused> {
        let mut state = lock(&self.state);
        // What was paid, and how many requests had ended when it was looked up.
        let mut known: Option<(u64, f64)> = None;
        loop {
            if closed() {
                return Err(Refused::Closed);
            }
            if let Some(problem) = &state.given_up {
                return Err(Refused::Stop(problem.clone()));
            }
            let now = Instant::now();
            if let Some(wait) = state.wait(self, now, tokens) {
                state = self.wait(state, wait);
                continue;
            }
            if let Some(budget) = self.budget {
                let Some((_, paid)) = known.take().filter(|(ended, _)| *ended == state.ended) else {
                    // A look at the disk, which nobody is to wait for. A request that ends meanwhile is no longer
                    // reserved and may not be in what was read: then it is looked up again.
                    let ended = state.ended;
                    drop(state);
                    known = Some((ended, paid().map_err(Refused::Stop)?));
                    state = lock(&self.state);
                    continue;
                };
                let could_be = paid + state.lost + state.reserved + worst;
                if could_be > budget {
                    // What is under way will cost less than it could.
                    if state.reserved > 0.0 {
                        state = self.wait(state, Duration::from_secs(1));
                        continue;
                    }
                    return Err(Refused::Stop(self.over_budget(budget, paid, state.lost, worst)));
                }
            }
            let trying = match &mut state.open {
                Some(open) => {
                    open.trying = true;
                    true
                }
                None => false,
            };
            state.running += 1;
            state.reserved += worst;
            let State { requests, tokens: bucket, .. } = &mut *state;
            requests.iter_mut().for_each(|bucket| bucket.take(1.0));
            bucket.iter_mut().for_each(|bucket| bucket.take(tokens as f64));
            return Ok(Permit { gate: self, worst, tokens, trying, settled: false });
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        // Short, so that whoever wants to stop is heard.
        let wait = at_most.clamp(Duration::from_millis(1), Duration::from_millis(50));
        self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
    }

    fn over_budget(&self, budget: f64, paid: f64, lost: f64, worst: f64) -> Problem {
        let problem = Problem::new(
            "remote::budget",
            format!("the next request to {} could pass the budget of {budget}", self.name),
        )
        .note(format!("{} is paid, and the request can cost {} more", money(paid), money(worst)));
        let problem = if lost > 0.0 {
            problem.note(format!("{} may have been paid for requests that ended without a reply", money(lost)))
        } else {
            problem
        };
        problem
            .note("replies that came are kept and are not paid for again")
            .help("a larger `budget`, or a smaller `max_tokens`, and run again")
    }
}

/// Enough digits to see that it is not nothing.
pub fn money(amount: f64) -> String {
    if amount == 0.0 || amount >= 0.1 { format!("{amount:.2}") } else { format!("{amount:.6}") }
}

impl State {
    /// How long to wait before looking again; `None`: everything but the budget agrees.
    fn wait(&mut self, gate: &Gate, now: Instant, tokens: u64) -> Option<Duration> {
        if let Some(open) = &self.open {
            if open.trying {
                return Some(Duration::from_secs(1));
            }
            if open.until > now {
                return Some(open.until - now);
            }
        }
        if self.running >= gate.max_concurrency {
            return Some(Duration::from_secs(1));
        }
        if let Some(wait) = self.not_before.filter(|moment| *moment > now) {
            return Some(wait - now);
        }
        let requests = self.requests.as_mut().and_then(|bucket| bucket.wait(1.0, now));
        let tokens = self.tokens.as_mut().and_then(|bucket| bucket.wait(tokens as f64, now));
        requests.max(tokens)
    }

    fn healthy(&mut self) {
        self.failures = 0;
        self.open = None;
    }

    fn failed(&mut self, gate: &Gate, was_trying: bool, why: &str) {
        self.failures += 1;
        let round = match &self.open {
            Some(open) if was_trying => open.round + 1,
            // Sent before it opened: says nothing new.
            Some(_) => return,
            None if self.failures < gate.pace.breaker => return,
            None => 0,
        };
        match gate.pace.pauses.get(round) {
            Some(pause) => self.open = Some(Open { until: Instant::now() + *pause, round, trying: false }),
            None => {
                let problem = Problem::new("remote::down", format!("{} does not answer", gate.name))
                    .note(format!("{} requests in a row failed, the last one: {why}", self.failures))
                    .note(format!("after each of {} pauses one more was tried", gate.pace.pauses.len()))
                    .help("run again when the server is well: replies that came are kept and are not paid for again");
                self.given_up = Some(problem);
                self.open = None;
            }
        }
    }
}

impl Permit<'_> {
    /// Enters how the attempt ended. `why`: in words, for failures.
    pub fn settle(mut self, ended: &Ended, why: &str) {
        self.settled = true;
        let mut state = lock(&self.gate.state);
        state.running -= 1;
        state.ended += 1;
        state.reserved = if state.running == 0 { 0.0 } else { state.reserved - self.worst };
        let unused = match ended {
            Ended::Reply { tokens } => {
                state.healthy();
                tokens.map_or(0, |tokens| self.tokens.saturating_sub(tokens))
            }
            Ended::Refused { wait } => {
                state.healthy();
                if let Some(wait) = wait {
                    let moment = Instant::now() + *wait;
                    state.not_before = Some(state.not_before.map_or(moment, |before| before.max(moment)));
                }
                self.tokens
            }
            Ended::Broken { sent } => {
                state.lost += if *sent { self.worst } else { 0.0 };
                state.failed(self.gate, self.trying, why);
                0
            }
        };
        state.tokens.iter_mut().for_each(|bucket| bucket.give(unused as f64));
        drop(state);
        self.gate.changed.notify_all();
    }
}

impl Drop for Permit<'_> {
    /// Whoever held it panicked.
    fn drop(&mut self) {
        if !self.settled {
            let mut state = lock(&self.gate.state);
            state.running -= 1;
            state.ended += 1;
            state.reserved -= self.worst;
            if let Some(open) = &mut state.open {
                open.trying &= !self.trying;
            }
        }
    }
}

/// Fills evenly; may be overdrawn by one that is larger than it.
struct Bucket {
    per_second: f64,
    capacity: f64,
    level: f64,
    at: Option<Instant>,
}

impl Bucket {
    fn new(per_minute: f64, capacity: f64) -> Bucket {
        let capacity = capacity.max(1.0);
        Bucket { per_second: per_minute / 60.0, capacity, level: capacity, at: None }
    }

    /// How long until `need` may be taken; `None`: now.
    fn wait(&mut self, need: f64, now: Instant) -> Option<Duration> {
        let past = self.at.replace(now).map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.level = (self.level + past * self.per_second).min(self.capacity);
        let lack = need.min(self.capacity) - self.level;
        // Less than a rounding's worth is not waited for.
        (lack > 1e-9).then(|| Duration::from_secs_f64((lack / self.per_second).min(3600.0)))
    }

    fn take(&mut self, need: f64) {
        self.level -= need;
    }

    fn give(&mut self, unused: f64) {
        self.level = (self.level + unused).min(self.capacity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(more: serde_json::Value) -> Endpoint {
        let mut all = serde_json::json!({
            "url": "http://h/v1", "model": "m", "max_concurrency": 2, "timeout_s": 1.0, "connect_timeout_s": 1.0,
            "max_attempts": 3, "send_seed": true, "max_tokens_key": "max_tokens",
        });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    fn admit(gate: &Gate, worst: f64, paid: f64) -> Result<Permit<'_>, Refused> {
        let end = Instant::now() + Duration::from_millis(60);
        gate.admit(10, worst, &|| Ok(paid), &|| Instant::now() > end)
    }

    #[test]
    fn a_bucket_never_lets_more_through_than_its_rate_in_any_minute() {
        let mut bucket = Bucket::new(120.0, 2.0);
        let begin = Instant::now();
        let mut taken: Vec<f64> = Vec::new();
        let mut now = begin;
        while taken.len() < 400 {
            match bucket.wait(1.0, now) {
                Some(wait) => now += wait,
                None => {
                    bucket.take(1.0);
                    taken.push((now - begin).as_secs_f64());
                }
            }
        }
        for (i, at) in taken.iter().enumerate() {
            let within = taken[i..].iter().filter(|later| **later < at + 60.0).count();
            assert!(within <= 122, "{within} within a minute of {at}");
        }
        assert!(taken[399] < 200.0, "but no less either: {}", taken[399]);
    }

    #[test]
    fn a_request_larger_than_a_bucket_passes_and_is_paid_off() {
        let mut bucket = Bucket::new(60.0, 10.0);
        let now = Instant::now();
        assert_eq!(bucket.wait(30.0, now), None);
        bucket.take(30.0);
        let wait = bucket.wait(1.0, now).unwrap().as_secs_f64();
        assert!((wait - 21.0).abs() < 1e-6, "{wait}");
        bucket.give(25.0);
        assert_eq!(bucket.wait(5.0, now), None);
    }

    #[test]
    fn no_more_than_so_many_run_at_once() {
        let gate = Gate::new(&endpoint(serde_json::json!({})), Pace::default());
        let first = admit(&gate, 0.0, 0.0).ok().unwrap();
        let _second = admit(&gate, 0.0, 0.0).ok().unwrap();
        assert!(matches!(admit(&gate, 0.0, 0.0), Err(Refused::Closed)));
        first.settle(&Ended::Reply { tokens: Some(3) }, "");
        assert!(admit(&gate, 0.0, 0.0).is_ok());
    }

    #[test]
    fn a_request_that_could_pass_the_budget_is_not_admitted() {
        let gate = Gate::new(
            &endpoint(serde_json::json!({"budget": 1.0, "price_in": 1.0, "price_out": 1.0})),
            Pace::default(),
        );
        assert!(admit(&gate, 0.3, 0.7).is_ok_and(|permit| {
            permit.settle(&Ended::Reply { tokens: None }, "");
            true
        }));
        let Err(Refused::Stop(problem)) = admit(&gate, 0.31, 0.7) else { panic!("admitted") };
        assert_eq!(problem.code, "remote::budget");
        // What is under way counts with all it can cost, and is waited for.
        let under_way = admit(&gate, 0.5, 0.0).ok().unwrap();
        assert!(matches!(admit(&gate, 0.6, 0.0), Err(Refused::Closed)));
        // It may have been worked for, so it may have to be paid for.
        under_way.settle(&Ended::Broken { sent: true }, "time-out");
        assert!(matches!(admit(&gate, 0.6, 0.0), Err(Refused::Stop(_))));
        assert!(admit(&gate, 0.4, 0.0).is_ok());
    }

    #[test]
    fn whoever_looks_up_what_was_paid_keeps_nobody_waiting() {
        let more = serde_json::json!({"budget": 1.0, "price_in": 1.0, "price_out": 1.0});
        let gate = std::sync::Arc::new(Gate::new(&endpoint(more), Pace::default()));
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let looks = || {
                let _ = tell.send(gate.pausing());
                Ok(0.0)
            };
            drop(gate.admit(10, 0.5, &looks, &|| false));
        });
        assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok(false), "the gate was held meanwhile");
    }

    #[test]
    fn a_request_that_ends_while_what_was_paid_is_looked_up_is_counted_once_more() {
        let more = serde_json::json!({"budget": 1.0, "price_in": 1.0, "price_out": 1.0});
        let gate = Gate::new(&endpoint(more), Pace::default());
        let under_way = Mutex::new(admit(&gate, 0.6, 0.0).ok());
        // Read before the reply was kept, told after it was settled.
        let looks = || {
            Ok(match lock(&under_way).take() {
                Some(permit) => {
                    permit.settle(&Ended::Reply { tokens: None }, "");
                    0.0
                }
                None => 0.6,
            })
        };
        assert!(matches!(gate.admit(10, 0.6, &looks, &|| false), Err(Refused::Stop(_))));
    }

    #[test]
    fn failures_in_a_row_open_the_breaker_and_one_request_tries_it() {
        let pace = Pace { breaker: 3, pauses: vec![Duration::from_millis(20); 2], ..Pace::default() };
        let gate = Gate::new(&endpoint(serde_json::json!({})), pace);
        let fail = || admit(&gate, 0.0, 0.0).ok().unwrap().settle(&Ended::Broken { sent: false }, "503");
        (0..3).for_each(|_| fail());
        assert!(gate.pausing());
        let trying = admit(&gate, 0.0, 0.0).ok().unwrap();
        assert!(matches!(admit(&gate, 0.0, 0.0), Err(Refused::Closed)), "one at a time");
        trying.settle(&Ended::Reply { tokens: None }, "");
        assert!(!gate.pausing());
        (0..3).for_each(|_| fail());
        fail();
        fail();
        let Err(Refused::Stop(problem)) = admit(&gate, 0.0, 0.0) else { panic!("admitted") };
        assert_eq!(problem.code, "remote::down");
        assert!(problem.notes[0].contains("503"), "{problem}");
        gate.begin();
        assert!(admit(&gate, 0.0, 0.0).is_ok());
    }

    #[test]
    fn waits_double_and_scatter_within_their_upper_half() {
        let pace = Pace::default();
        assert_eq!(pace.backoff(1, 0.0), Duration::from_millis(500));
        assert_eq!(pace.backoff(3, 0.5), Duration::from_secs(3));
        assert_eq!(pace.backoff(60, 1.0), Duration::from_secs(60));
    }
}
