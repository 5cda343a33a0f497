//! A server as the manifest has it.

use crate::problem::{Exit, Problem};
use serde::{Deserialize, Serialize};

/// An `[endpoint.NAME]` of a manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// The base of the API, often ending in `/v1`.
    pub url: String,
    /// As the server calls it.
    pub model: String,
    /// The variable, never its value.
    pub api_key_env: Option<String>,
    /// Requests under way at once.
    pub max_concurrency: usize,
    /// `None`: as many as go.
    pub requests_per_minute: Option<u64>,
    /// `None`: as many as go.
    pub tokens_per_minute: Option<u64>,
    /// The longest wait for a whole reply, in seconds.
    pub timeout_s: f64,
    /// The longest wait for a connection, in seconds.
    pub connect_timeout_s: f64,
    /// How often a request is sent before it has failed.
    pub max_attempts: u32,
    /// Per million tokens.
    pub price_in: Option<f64>,
    /// Per million tokens.
    pub price_out: Option<f64>,
    /// The most that may be paid, in the currency of the prices.
    pub budget: Option<f64>,
    /// Whether requests bear a seed.
    pub send_seed: bool,
    /// The key that limits the answer in a request.
    pub max_tokens_key: String,
}

impl Endpoint {
    /// What this many tokens cost; nothing where no prices are known.
    pub fn cost(&self, prompt: u64, completion: u64) -> f64 {
        let of = |tokens: u64, price: Option<f64>| tokens as f64 * price.unwrap_or(0.0) / 1e6;
        of(prompt, self.price_in) + of(completion, self.price_out)
    }

    /// Whether it is known what tokens cost.
    pub fn is_priced(&self) -> bool {
        self.price_in.is_some()
    }

    /// `api.deepseek.com`, `localhost:8000`.
    pub(super) fn host(&self) -> &str {
        let rest = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest)
    }

    /// For messages: where the server is, and nothing that could be a secret.
    pub fn name(&self) -> String {
        format!("`{}` at `{}`", self.model, self.host())
    }
}

/// A problem found before any stage ran.
pub(super) fn missing(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(code, message).exit(Exit::Missing)
}
