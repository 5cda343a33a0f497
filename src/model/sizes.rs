//! How much is decoded at once: pages, prompts, completions.

use super::config::Config;
use crate::cuda::ops::attention_decode::SPAN;
use crate::cuda::ops::sampling::Rule;

/// Tokens of a page of keys and values on a device.
pub(crate) use crate::cuda::ops::attention_decode::PAGE as DEVICE_PAGE;
/// On the host: as many keys as attention looks at at once.
pub(crate) use crate::tensor::ops::PAGE as HOST_PAGE;

/// Completions at once.
pub(crate) const MOST_LIVE: usize = 256;
/// Tokens of prompts that are run in one step; one longer prompt is run alone.
pub(crate) const PROMPT_TOKENS: usize = 4096;
/// Prompts whose pages, and the logits after them, are kept for those who come with the same.
pub(crate) const KNOWN: usize = 8;
/// Bytes that keys and values of all live completions may take together on the host; one may always take its own.
const CACHE_BYTES: usize = 1 << 30;
/// Bytes of logits `[live, V]` on the host.
const LOGIT_BYTES: usize = 128 << 20;

/// Tokens of prompts, none longer than `prompt`, that are run together at most for this many completions.
pub(crate) fn prompts_together(live: usize, prompt: usize) -> usize {
    live.saturating_mul(prompt).min(prompt.max(PROMPT_TOKENS)).max(1)
}

/// Pages for a request of at most `longest` tokens: the last one is drawn and never run.
pub(crate) fn pages_of(longest: usize, page: usize) -> usize {
    (longest.max(2) - 1).div_ceil(page)
}

/// How many completions memory allows at once on the host.
pub(crate) fn most_live_on_host(config: &Config) -> usize {
    (LOGIT_BYTES / (config.vocab_size * size_of::<f32>())).clamp(1, MOST_LIVE)
}

/// Values of a page on the host.
fn page_len(config: &Config) -> usize {
    config.num_hidden_layers * 2 * HOST_PAGE * config.key_size()
}

/// Pages that there are on the host for `live` completions of at most `longest` tokens.
pub(crate) fn pages_on_host(config: &Config, live: usize, longest: usize) -> usize {
    let (one, most) = (pages_of(longest, HOST_PAGE), CACHE_BYTES / (page_len(config) * size_of::<f32>()));
    live.saturating_mul(one).min(most).max(one)
}

/// Where the sections of a device's step begin, in bytes per row before them: rules, ids, positions, lengths, page table.
pub(crate) struct Sections;

impl Sections {
    pub const IDS: usize = size_of::<Rule>();
    pub const POSITIONS: usize = Sections::IDS + 4;
    pub const LENGTHS: usize = Sections::POSITIONS + 4;
    /// Also what a row takes without its pages.
    pub const PAGES: usize = Sections::LENGTHS + 4;
}

/// What a step on a device is captured for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StepShape {
    pub rows: usize,
    /// The most that a row may attend to.
    pub keys: usize,
}

/// Completions are rounded up: to few enough numbers to be captured one by one, at most 7 more than there are.
fn rounded(live: usize) -> usize {
    if live <= 8 { live.next_power_of_two() } else { live.next_multiple_of(8) }
}

impl StepShape {
    pub fn of(live: usize, longest: usize) -> StepShape {
        StepShape { rows: rounded(live), keys: longest.div_ceil(SPAN).next_power_of_two() * SPAN }
    }

    /// Entries that a row has in the page table.
    pub fn pages(self) -> usize {
        self.keys / DEVICE_PAGE
    }

    /// Of what a step is given.
    pub fn input_bytes(self) -> usize {
        self.rows * (Sections::PAGES + self.pages() * size_of::<u32>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_few_and_hold_what_they_are_for() {
        for live in 1..300 {
            let rows = rounded(live);
            // Each of the rows beyond has a token of the spare page for itself.
            assert!(rows >= live && rows - live < 8, "{live}: {rows}");
            assert_eq!(rounded(rows), rows);
        }
        for (longest, keys) in [(1, 256), (256, 256), (257, 512), (600, 1024), (1025, 2048)] {
            assert_eq!(StepShape::of(3, longest), StepShape { rows: 4, keys });
        }
    }
}
