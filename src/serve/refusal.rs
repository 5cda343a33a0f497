//! Why a request is not answered, in the shape that OpenAI's clients read.

use serde_json::{Value, json};

/// A status of 400 or above and its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: u16,
    pub message: String,
    /// The parameter that is wrong.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Beside those of every reply.
    pub headers: Vec<(&'static str, String)>,
}

impl Refusal {
    pub fn new(status: u16, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code: None, headers: Vec::new() }
    }

    /// A parameter that cannot be what it is.
    pub fn wrong(param: &str, message: impl Into<String>) -> Refusal {
        Refusal { param: Some(param.to_string()), ..Refusal::new(400, message) }
    }

    /// More is asked at once than is taken on: try again soon.
    pub fn busy(message: &str) -> Refusal {
        Refusal::new(429, message).code("rate_limit_exceeded").header("Retry-After", "1")
    }

    pub fn code(mut self, code: &'static str) -> Refusal {
        self.code = Some(code);
        self
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Refusal {
        self.headers.push((name, value.into()));
        self
    }

    pub fn json(&self) -> Value {
        let kind = match self.status {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}
