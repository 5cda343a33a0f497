//! What the journal has, for a look beforehand: nobody is asked, nothing is written.

use super::ask::{Ask, Sampling};
use super::connection::Connection;
use super::replies::Replies;
use super::reply::Completion;
use crate::problem::Problem;

impl Connection {
    /// Takes in what the journal has by now. To be called before the others.
    pub fn look(&self) -> Result<(), Problem> {
        self.journal.refresh()
    }

    /// The reply that is kept for what is asked, if there is one.
    pub fn kept(&self, ask: &Ask, sampling: &Sampling) -> Result<Option<Completion>, Problem> {
        self.journal.get(&ask.key(&self.endpoint.model, sampling), sampling.max_tokens)
    }

    /// All replies that are kept from this endpoint's host.
    pub fn replies(&self) -> Replies {
        self.journal.replies(self.endpoint.host())
    }

    /// What is paid to the endpoint by the replies that are kept: what counts against its budget.
    pub fn paid(&self) -> f64 {
        let paid = self.journal.paid(self.endpoint.host());
        self.endpoint.cost(paid.prompt, paid.completion)
    }
}
