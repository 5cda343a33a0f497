//! What completions took, as artifacts tell.

use super::endpoint::Endpoint;
use super::reply::Completion;
use serde::Serialize;
use std::collections::BTreeMap;

/// What stands in `usage.json`: what the completions of an artifact took, whoever paid for them when.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Bill {
    /// The model that was asked.
    pub model: String,
    /// Replies by the name the server gave the model.
    pub reported_models: BTreeMap<String, u64>,
    /// Replies.
    pub requests: u64,
    /// Of all prompts, as the server counts.
    pub prompt_tokens: u64,
    /// Of all answers, as the server counts.
    pub completion_tokens: u64,
    /// Of the completion tokens, those the server says were thinking.
    pub reasoning_tokens: u64,
    /// Replies that do not say how many tokens they took.
    pub without_usage: u64,
    /// In the currency of the prices; `None` where none are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

impl Bill {
    /// Nothing yet.
    pub fn new(endpoint: &Endpoint) -> Bill {
        let cost = endpoint.is_priced().then_some(0.0);
        Bill { model: endpoint.model.clone(), cost, ..Bill::default() }
    }

    /// Adds one reply.
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
