//! What is served, and within which bounds.

use crate::data::Tokenizer;
use crate::generation::Limits;
use crate::model::Config;
use crate::problem::Problem;
use std::time::Duration;

/// How much is let in, and how slow it may be.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Open at once; more are told to come again.
    pub connections: usize,
    /// Requests for completions that are waiting or at work; more are told to come again.
    pub requests: usize,
    /// Of one request; a longer one is refused.
    pub body_bytes: usize,
    /// Of all requests together.
    pub bodies_bytes: usize,
    /// From a request's first byte to the end of its headers.
    pub head_time: Duration,
    /// From the end of a request's headers to the end of its body.
    pub body_time: Duration,
    /// Between two requests on one connection.
    pub idle_time: Duration,
    /// For a client to take what is written to it.
    pub write_time: Duration,
    /// For requests at work to end, once the server is to stop.
    pub drain_time: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            connections: 512,
            requests: 256,
            body_bytes: 4 << 20,
            bodies_bytes: 64 << 20,
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(30),
            idle_time: Duration::from_secs(60),
            write_time: Duration::from_secs(30),
            drain_time: Duration::from_secs(20),
        }
    }
}

/// What is served.
pub struct Service {
    /// What clients call the model.
    pub name: String,
    /// What they are told of which one it is.
    pub fingerprint: String,
    /// What makes tokens of prompts and texts of answers.
    pub tokenizer: Tokenizer,
    /// Bytes of the longest token.
    pub(super) longest: usize,
    /// Tokens that prompt and answer have together.
    pub context: usize,
    /// What ends an answer.
    pub stop_ids: Vec<u32>,
    /// Longest answer that is given.
    pub max_tokens: Option<usize>,
    /// What requests have to bear. Never shown.
    pub key: Option<String>,
    /// Where the seeds of requests that name none begin.
    pub seed: u64,
    /// What clients may take.
    pub bounds: Bounds,
    /// What the engine may take of the machine.
    pub limits: Limits,
}

impl Service {
    /// `Err` if model and tokenizer do not belong together.
    pub fn new(name: &str, fingerprint: &str, tokenizer: Tokenizer, config: &Config) -> Result<Service, Problem> {
        tokenizer.fits(config.vocab_size)?;
        let mut stop_ids = vec![tokenizer.end()?];
        stop_ids.extend(tokenizer.eos());
        stop_ids.extend(tokenizer.id("<|endoftext|>"));
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let longest = (0..tokenizer.id_limit() as u32).map(|id| tokenizer.bytes(id).len()).max().unwrap_or(0);
        Ok(Service {
            name: name.to_string(),
            fingerprint: fingerprint.to_string(),
            tokenizer,
            longest: longest.max(1),
            context: config.max_position_embeddings,
            stop_ids,
            max_tokens: None,
            key: None,
            seed: 0,
            bounds: Bounds::default(),
            limits: Limits::default(),
        })
    }
}
