//! Chat completions from any OpenAI-compatible server, as one would trust it with money.
//!
//! A request is known by the digest of what is asked ([`Ask`], [`Sampling`] less its `max_tokens`). Its raw
//! reply is appended to a journal below the cache and synced before it counts ([`journal`]), so that
//! nothing is paid for twice: not after a kill, not with one record more, another concurrency or another
//! `max_tokens`. Everything between is derived from the journal.
//!
//! Requests go through a few threads that share one [`gate`]: concurrency, rates, budget, back-off and
//! the circuit breaker are decided there, before a request is sent. [`send`] makes one attempt and says
//! whether another is worth it; [`reply`] reads what came. [`look`] tells beforehand what would be asked.
//!
//! A [`Remote`] is made once per process, so that stages that ask the same endpoint at the same time share
//! its limits.

mod date;
mod gate;
mod journal;
mod look;
mod pool;
mod probe;
mod reply;
mod send;

pub use date::retry_after;
pub use gate::{Pace, money};
pub use look::Replies;
pub use reply::{Completion, Finish, Read, Usage, error_words, read};

use crate::digest::Encoder;
use crate::problem::{Exit, Problem};
use crate::random::Stream;
use gate::Gate;
use journal::Journal;
use send::Sender;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// An `[endpoint.NAME]` of a manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    pub url: String,
    pub model: String,
    /// The variable, never its value.
    pub api_key_env: Option<String>,
    pub max_concurrency: usize,
    pub requests_per_minute: Option<u64>,
    pub tokens_per_minute: Option<u64>,
    pub timeout_s: f64,
    pub connect_timeout_s: f64,
    pub max_attempts: u32,
    /// Per million tokens.
    pub price_in: Option<f64>,
    pub price_out: Option<f64>,
    pub budget: Option<f64>,
    pub send_seed: bool,
    pub max_tokens_key: String,
}

impl Endpoint {
    /// What so many tokens cost; nothing where no prices are known.
    pub fn cost(&self, prompt: u64, completion: u64) -> f64 {
        let of = |tokens: u64, price: Option<f64>| tokens as f64 * price.unwrap_or(0.0) / 1e6;
        of(prompt, self.price_in) + of(completion, self.price_out)
    }

    pub fn is_priced(&self) -> bool {
        self.price_in.is_some()
    }

    /// `api.deepseek.com`, `localhost:8000`.
    fn host(&self) -> &str {
        let rest = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest)
    }

    /// For messages: where the server is, and nothing that could be a secret.
    pub fn name(&self) -> String {
        format!("`{}` at `{}`", self.model, self.host())
    }
}

/// How completions are drawn. What is absent is not sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    pub max_tokens: u64,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: Option<u64>,
    pub repetition_penalty: Option<f64>,
    pub stop: Vec<String>,
    pub seed: u64,
}

/// One completion asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// `[{"role", "content"}, ...]`.
    pub messages: Value,
    /// Which of several completions of the same messages.
    pub sample: u64,
    /// Which try at that sample: the one before could be read but not used.
    pub attempt: u64,
}

impl Ask {
    /// Digest of what is asked of `model`. `max_tokens` is not in it: a reply that was not cut is as good
    /// an answer under another limit.
    pub fn key(&self, model: &str, sampling: &Sampling) -> String {
        let drawn = json!({
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty, "stop": sampling.stop, "seed": sampling.seed,
        });
        let mut encoder = Encoder::new("chat completion 1");
        encoder.field(model.as_bytes()).field(self.messages.to_string().as_bytes());
        encoder.field(drawn.to_string().as_bytes());
        encoder.field(&self.sample.to_le_bytes()).field(&self.attempt.to_le_bytes());
        encoder.finish().hex()
    }

    /// What is sent.
    fn body(&self, endpoint: &Endpoint, sampling: &Sampling) -> Value {
        let mut body = json!({
            "model": endpoint.model, "messages": self.messages, "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        });
        body[endpoint.max_tokens_key.as_str()] = sampling.max_tokens.into();
        if let Some(top_k) = sampling.top_k {
            body["top_k"] = top_k.into();
        }
        if let Some(penalty) = sampling.repetition_penalty {
            body["repetition_penalty"] = penalty.into();
        }
        if !sampling.stop.is_empty() {
            body["stop"] = json!(sampling.stop);
        }
        if endpoint.send_seed {
            // Another one for each sample and try, of 31 bits, which every server takes.
            let words = ["completion", &self.sample.to_string(), &self.attempt.to_string()];
            body["seed"] = (Stream::named(sampling.seed, &words).u64(0) >> 33).into();
        }
        body
    }

    /// No prompt has more tokens: a token is a byte or more, and templates add a few to each message.
    pub fn prompt_bound(&self) -> u64 {
        let messages = self.messages.as_array().map_or(&[] as &[Value], Vec::as_slice);
        let texts = messages.iter().filter_map(|message| message["content"].as_str());
        texts.map(|text| text.len() as u64 + 32).sum::<u64>() + 64
    }
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// Of the asks, those answered or failed; what the journal had included.
    pub done: usize,
    /// Replies a second since the job began.
    pub rate: f64,
    /// Money paid to the endpoint so far, as far as prices are known.
    pub spent: Option<f64>,
    /// The server fails, and nothing is sent until it was tried again.
    pub pausing: bool,
}

/// Every endpoint of a process.
pub struct Remote {
    folder: PathBuf,
    offline: bool,
    pace: Pace,
    lines: Mutex<HashMap<String, Arc<Line>>>,
}

impl Remote {
    /// `folder`: where journals are.
    pub fn new(folder: &Path) -> Remote {
        Remote { folder: folder.to_path_buf(), offline: false, pace: Pace::default(), lines: Mutex::default() }
    }

    /// Asks nobody: what the journals do not have is missing.
    pub fn offline(mut self, offline: bool) -> Remote {
        self.offline = offline;
        self
    }

    pub fn pace(mut self, pace: Pace) -> Remote {
        self.pace = pace;
        self
    }

    /// The way to an endpoint, the same for all who ask it. Reads its key; `Err` if it is not there.
    pub fn line(&self, endpoint: &Endpoint) -> Result<Arc<Line>, Problem> {
        let known = serde_json::to_string(endpoint).unwrap_or_default();
        let mut lines = lock(&self.lines);
        if let Some(line) = lines.get(&known) {
            return Ok(line.clone());
        }
        let sender = if self.offline { None } else { Some(Sender::new(endpoint)?) };
        let line = Arc::new(Line {
            gate: Gate::new(endpoint, self.pace.clone()),
            journal: Journal::new(&self.folder, &endpoint.model),
            endpoint: endpoint.clone(),
            sender,
            probed: Mutex::new(self.offline),
            asked: Mutex::default(),
            answered: Condvar::new(),
        });
        lines.insert(known, line.clone());
        Ok(line)
    }
}

/// The way to one endpoint.
pub struct Line {
    endpoint: Endpoint,
    /// `None`: nobody is to be asked.
    sender: Option<Sender>,
    gate: Gate,
    journal: Journal,
    /// The server answered before, or nobody is to be asked.
    probed: Mutex<bool>,
    /// Keys of requests under way: whoever wants the same waits for the reply.
    asked: Mutex<HashSet<String>>,
    answered: Condvar,
}

/// What stands in `usage.json`: what the completions of an artifact took, whoever paid for them when.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Bill {
    pub model: String,
    /// Replies by the name the server gave the model.
    pub reported_models: BTreeMap<String, u64>,
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Of the completion tokens, those the server says were thinking.
    pub reasoning_tokens: u64,
    /// Replies that do not say how many tokens they took.
    pub without_usage: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

impl Bill {
    pub fn new(endpoint: &Endpoint) -> Bill {
        let cost = endpoint.is_priced().then_some(0.0);
        Bill { model: endpoint.model.clone(), cost, ..Bill::default() }
    }

    pub fn add(&mut self, endpoint: &Endpoint, completion: &Completion) {
        self.requests += 1;
        *self.reported_models.entry(completion.model.clone().unwrap_or_else(|| "not named".into())).or_default() += 1;
        let usage = completion.usage.unwrap_or_default();
        self.prompt_tokens += usage.prompt_tokens;
        self.completion_tokens += usage.completion_tokens;
        self.reasoning_tokens += usage.reasoning_tokens;
        self.without_usage += u64::from(completion.usage.is_none());
        // From the sums, so that the order of the replies cannot show in the last digit.
        self.cost = self.cost.map(|_| endpoint.cost(self.prompt_tokens, self.completion_tokens));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A problem found before any stage ran.
fn missing(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(code, message).exit(Exit::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> Sampling {
        Sampling {
            max_tokens: 10,
            temperature: 0.5,
            top_p: 1.0,
            top_k: None,
            repetition_penalty: None,
            stop: vec![],
            seed: 3,
        }
    }

    fn ask(text: &str, sample: u64, attempt: u64) -> Ask {
        Ask { messages: json!([{"role": "user", "content": text}]), sample, attempt }
    }

    #[test]
    fn a_request_is_known_by_all_that_is_asked_but_its_limit() {
        let base = ask("q", 0, 0).key("m", &sampling());
        let mut others = vec![
            ask("p", 0, 0).key("m", &sampling()),
            ask("q", 1, 0).key("m", &sampling()),
            ask("q", 0, 1).key("m", &sampling()),
            ask("q", 0, 0).key("n", &sampling()),
        ];
        for change in [
            |s: &mut Sampling| s.temperature = 0.6,
            |s: &mut Sampling| s.top_p = 0.9,
            |s: &mut Sampling| s.top_k = Some(5),
            |s: &mut Sampling| s.repetition_penalty = Some(1.1),
            |s: &mut Sampling| s.stop.push("x".into()),
            |s: &mut Sampling| s.seed = 4,
        ] {
            let mut changed = sampling();
            change(&mut changed);
            others.push(ask("q", 0, 0).key("m", &changed));
        }
        let distinct: HashSet<&String> = others.iter().chain([&base]).collect();
        assert_eq!(distinct.len(), others.len() + 1);
        assert_eq!(base, ask("q", 0, 0).key("m", &Sampling { max_tokens: 99, ..sampling() }));
    }

    #[test]
    fn no_prompt_has_more_tokens_than_its_bound() {
        assert_eq!(ask("é", 0, 0).prompt_bound(), 2 + 32 + 64);
    }
}
