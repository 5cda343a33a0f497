//! What is asked of an engine, what it tells, and what its places are given.

use super::pages::Held;
use super::sampling::Sampling;
use crate::model::sizes::MOST_LIVE;

/// A prompt and the random numbers of its completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Which numbers it draws; make it from the record's id and the index of the sample.
    pub stream: u64,
}

/// What is asked of an [`super::Engine`].
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Which random numbers it draws, beside the seed.
    pub stream: u64,
    /// How tokens are drawn, and what ends it.
    pub sampling: Sampling,
    /// This many of the likeliest ids are told with each token, at most [`MOST_TOP`].
    pub top_logprobs: usize,
}

/// A request's name, in the order of their coming: the first of an engine is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub(super) u64);

/// What a step tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was drawn; a stop id too, and those that a stop text is cut off with.
    Token {
        /// The request it belongs to.
        ticket: Ticket,
        /// The token.
        id: u32,
        /// log p under the model itself: before penalty, temperature and filters.
        logprob: f32,
        /// The likeliest ids that may be drawn, likeliest first, with the same log p.
        top: Vec<(u32, f32)>,
    },
    /// There is no more of it.
    End {
        /// The request it belongs to.
        ticket: Ticket,
        /// All of it.
        completion: Completion,
    },
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// At a stop id or a stop text.
    Stop,
    /// At `max_tokens`.
    Length,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// New ids, the stop id included.
    pub ids: Vec<u32>,
    /// Their text, without stop id and from the stop text on cut off.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// log p of each id under the model itself: before penalty, temperature and filters.
    pub logprobs: Vec<f32>,
}

/// What generation may take of a machine. Changes nothing of what comes out.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Completions at once.
    pub live: usize,
    /// Pages of keys and values, of 16 tokens on a device and of 64 on the host; those that there is memory for, if
    /// they are fewer.
    pub pages: usize,
    /// Tokens of the longest request, completion included; the model's context, if that is shorter.
    pub longest: usize,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Whether steps on a device are captured and launched as a whole.
    pub graphs: bool,
}

impl Default for Limits {
    /// As much as there is.
    fn default() -> Limits {
        Limits { live: MOST_LIVE, pages: usize::MAX, longest: usize::MAX, prompt: usize::MAX, graphs: true }
    }
}

/// The most [`Ask::top_logprobs`].
pub const MOST_TOP: usize = 20;

/// A request, waiting or a completion in the making.
pub(super) struct Live {
    pub ticket: Ticket,
    /// Prompt and completion.
    pub ids: Vec<u32>,
    pub prompt_len: usize,
    pub stream: u64,
    pub sampling: Sampling,
    pub top_logprobs: usize,
    /// Where keys and values are.
    pub held: Held,
    pub logprobs: Vec<f32>,
}

impl Live {
    pub fn prompt(&self) -> &[u32] {
        &self.ids[..self.prompt_len]
    }

    /// Number of the next draw.
    pub fn counter(&self) -> u64 {
        (self.ids.len() - self.prompt_len) as u64
    }
}

/// What is drawn for a row.
pub(super) struct Draw {
    pub id: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// Requests that begin together. Either all of their prompts are known or none is.
#[derive(Default)]
pub(super) struct Beginning {
    /// Those of them whose prompts are run, each to the pages that it holds; empty if all are known.
    pub runs: Vec<usize>,
    /// Of each, the place of its prompt among those, or the slot of the known one.
    pub prompt: Vec<usize>,
    /// Then these rows of the cache are copied: row `i` of a page is its number times the page's tokens, and `i`.
    pub from: Vec<u32>,
    pub to: Vec<u32>,
    /// In which slots the logits of the last of `runs` are kept.
    pub keep: Vec<usize>,
}
