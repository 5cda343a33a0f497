//! A server as the manifest has it.

use crate::problem::{Exit, Problem};
use serde::{Deserialize, Serialize};

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
