//! Where a job stands, for the eye.

use super::gate::money;

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

impl Standing {
    /// `31 of a second, 0.42 paid`: beside a bar.
    pub fn note(&self) -> String {
        let mut parts = Vec::new();
        if self.pausing {
            parts.push("the server fails; waiting before it is tried again".to_string());
        } else if self.rate > 0.0 {
            parts.push(format!("{:.1}/s", self.rate));
        }
        parts.extend(self.spent.map(|spent| format!("{} paid", money(spent))));
        parts.join(", ")
    }
}
