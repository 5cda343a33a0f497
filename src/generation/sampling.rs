//! From logits to the next token.
//!
//! Filters are applied in transformers' order: repetition penalty over all ids so far (prompt included),
//! temperature, top-k, top-p, softmax. Temperature 0 is greedy: the largest logit after the penalty, the
//! lowest id among equals.
//!
//! Draws are counter-based: position `i` of a prompt uses number `i` of the stream (seed, prompt), so a
//! completion depends neither on the other prompts nor on when it was made.

use crate::problem::Problem;
use crate::random::Stream;
use crate::tensor::vector;

/// How completions are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Longest completion in tokens.
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Keep the smallest set of tokens with at least this probability; 1 keeps all.
    pub top_p: f64,
    /// Keep the k likeliest (and those equal to the last of them); 0 keeps all.
    pub top_k: usize,
    /// Logits of ids that occurred are divided (if positive) or multiplied by this; 1 is off.
    pub repetition_penalty: f64,
    /// The same seed, stream and logits give the same tokens.
    pub seed: u64,
    /// A completion ends before the first of these texts.
    pub stop: Vec<String>,
    /// A completion ends with the first of these ids, which is part of its ids and not of its text.
    pub stop_ids: Vec<u32>,
    /// Ids from here on are never drawn: rows of the embedding that no text maps to. 0 means no limit.
    pub id_limit: usize,
}

impl Default for Sampling {
    /// Greedy, 256 tokens, nothing stops it.
    fn default() -> Sampling {
        Sampling {
            max_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            repetition_penalty: 1.0,
            seed: 0,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            id_limit: 0,
        }
    }
}

/// The tokens that may follow, with their probabilities: (id, probability), ids ascending, summing to 1.
pub type Candidates = Vec<(u32, f64)>;

impl Sampling {
    /// Draws the token after `context` from `logits` `[vocab]`, which are overwritten. `counter` numbers the
    /// draws of one completion.
    pub fn next(&self, logits: &mut [f32], context: &[u32], random: &Stream, counter: u64) -> u32 {
        if self.temperature == 0.0 {
            let limit = self.limit(logits.len());
            self.penalise(logits, context);
            return argmax(&logits[..limit]);
        }
        draw(&self.candidates(logits, context), random.uniform(counter))
    }

    /// What [`Sampling::next`] gives where it need not change the logits first: greedy without a penalty.
    pub(super) fn plainly(&self, logits: &[f32]) -> Option<u32> {
        (self.temperature == 0.0 && self.repetition_penalty == 1.0).then(|| argmax(&logits[..self.limit(logits.len())]))
    }

    /// The distribution [`Sampling::next`] draws from (temperature above 0).
    pub fn candidates(&self, logits: &mut [f32], context: &[u32]) -> Candidates {
        let limit = self.limit(logits.len());
        self.penalise(logits, context);
        let logits = &mut logits[..limit];
        let temperature = self.temperature as f32;
        logits.iter_mut().for_each(|logit| *logit /= temperature);
        let mut kept: Vec<u32> = (0..limit as u32).collect();
        if self.top_k > 0 && self.top_k < limit {
            kept.select_nth_unstable_by(self.top_k - 1, |&a, &b| descending(logits, a, b));
            let last = logits[kept[self.top_k - 1] as usize];
            // Ties with the k-th stay, as in transformers (`scores < kth` goes).
            kept = (0..limit as u32).filter(|&id| logits[id as usize] >= last).collect();
        }
        // Not yet divided by their sum: the largest is 1.
        let mut weights: Vec<f32> = kept.iter().map(|&id| logits[id as usize]).collect();
        let max = vector::max(&weights);
        vector::exp_sum(&mut weights, max);
        let mut candidates: Vec<(u32, f32)> = kept.into_iter().zip(weights).collect();
        if self.top_p < 1.0 {
            nucleus(&mut candidates, self.top_p);
        }
        let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
        candidates.into_iter().map(|(id, weight)| (id, f64::from(weight) / total)).collect()
    }

    /// `Err` naming the first parameter that means nothing.
    pub fn check(&self) -> Result<(), Problem> {
        let bad = |name: &str, value: f64, range: &str| {
            Err(Problem::new("model::sampling", format!("`{name}` is {value}, which is not {range}")))
        };
        // Logits are divided in f32.
        if self.temperature != 0.0 && !(self.temperature > 0.0 && (self.temperature as f32).is_normal()) {
            return bad("temperature", self.temperature, "0 or a positive number of ordinary size");
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return bad("top_p", self.top_p, "between 0 and 1");
        }
        let penalty = self.repetition_penalty as f32;
        if !(penalty.is_normal() && penalty > 0.0) {
            return bad("repetition_penalty", self.repetition_penalty, "above 0");
        }
        Ok(())
    }

    /// The `count` largest logits among the ids that may be drawn, the largest first, then lower ids.
    pub(super) fn likeliest(&self, logits: &[f32], count: usize) -> Vec<(u32, f32)> {
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
        for (id, &logit) in (0..).zip(&logits[..self.limit(logits.len())]) {
            if best.len() < count || best.last().is_some_and(|(_, least)| logit > *least) {
                best.insert(best.partition_point(|(_, other)| *other >= logit), (id, logit));
                best.truncate(count);
            }
        }
        best
    }

    fn limit(&self, vocab: usize) -> usize {
        if self.id_limit == 0 { vocab } else { self.id_limit.min(vocab) }
    }

    /// Once per id, however often it occurred.
    fn penalise(&self, logits: &mut [f32], context: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        let mut seen: Vec<u32> = context.iter().copied().filter(|&id| (id as usize) < logits.len()).collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

/// Log softmax of any of the logits, the sum in f64.
pub(super) fn log_softmax(logits: &[f32]) -> impl Fn(f32) -> f32 + use<> {
    let max = vector::max(logits);
    let sum = vector::exp_total(logits, max).ln();
    move |logit| (f64::from(logit - max) - sum) as f32
}

/// The lowest index of the largest value.
pub fn argmax(logits: &[f32]) -> u32 {
    vector::argmax(logits) as u32
}

/// Likelier first, then lower ids: a total order, so that selection has one outcome.
fn descending(logits: &[f32], a: u32, b: u32) -> std::cmp::Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Keeps the likeliest candidates whose weights together reach `top_p` of all, at least one, ids ascending: one
/// stays if those before it have less than `top_p`. Sorts only as many as are needed.
fn nucleus(candidates: &mut Vec<(u32, f32)>, top_p: f64) {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
    let (mut sorted, mut mass, mut kept) = (0, 0.0, 0);
    while kept < candidates.len() && (kept == 0 || mass < top_p * total) {
        if kept == sorted {
            let rest = &mut candidates[sorted..];
            let more = (sorted * 3 + 64).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more, order);
            }
            rest[..more].sort_unstable_by(order);
            sorted += more;
        }
        mass += f64::from(candidates[kept].1);
        kept += 1;
    }
    candidates.truncate(kept);
    candidates.sort_unstable_by_key(|(id, _)| *id);
}

/// The id at `u` in [0, 1) of the cumulative distribution.
fn draw(candidates: &Candidates, u: f64) -> u32 {
    let mut sum = 0.0;
    for (id, probability) in candidates {
        sum += probability;
        if u < sum {
            return *id;
        }
    }
    // Rounding may leave the sum just below 1.
    candidates.iter().rev().find(|(_, probability)| *probability > 0.0).map_or(0, |(id, _)| *id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ids(sampling: &Sampling, logits: &[f32], context: &[u32]) -> Vec<u32> {
        sampling.candidates(&mut logits.to_vec(), context).into_iter().map(|(id, _)| id).collect()
    }

    fn drawn() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::default() }
    }

    #[test]
    fn top_k_keeps_ties_with_the_last() {
        let sampling = Sampling { top_k: 2, ..drawn() };
        assert_eq!(ids(&sampling, &[1.0, 3.0, 2.0, 2.0, 0.0], &[]), [1, 2, 3]);
    }

    #[test]
    fn top_p_keeps_the_token_that_reaches_it() {
        // Probabilities 1/2, 1/4, 1/8, 1/8.
        let logits = [0.0f32, (0.5f32).ln(), (0.25f32).ln(), (0.25f32).ln()];
        for (top_p, expected) in
            [(0.05, vec![0]), (0.49, vec![0]), (0.6, vec![0, 1]), (0.8, vec![0, 1, 2]), (1.0, vec![0, 1, 2, 3])]
        {
            assert_eq!(ids(&Sampling { top_p, ..drawn() }, &logits, &[]), expected, "{top_p}");
        }
    }

    #[test]
    fn the_penalty_counts_an_id_once_and_works_on_both_signs() {
        let sampling = Sampling { repetition_penalty: 2.0, ..drawn() };
        let mut logits = [2.0, -2.0, 2.0, -2.0];
        sampling.candidates(&mut logits, &[0, 1, 0, 1, 99]);
        assert_eq!(logits, [1.0, -4.0, 2.0, -2.0]);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_logits_and_obeys_the_penalty_and_the_limit() {
        let random = Stream::new(0, 0);
        let next = |sampling: Sampling, context: &[u32]| sampling.next(&mut [1.0, 5.0, 5.0, 9.0], context, &random, 0);
        let limited = Sampling { id_limit: 3, ..Sampling::default() };
        assert_eq!(next(Sampling::default(), &[]), 3);
        assert_eq!(next(limited.clone(), &[]), 1);
        assert_eq!(next(Sampling { repetition_penalty: 1.5, ..limited }, &[1]), 2);
    }

    #[test]
    fn draws_follow_the_distribution_and_depend_on_the_counter_alone() {
        let sampling = Sampling { temperature: 0.5, seed: 3, ..Sampling::default() };
        let random = Stream::new(3, 11);
        let logits = [0.0, 0.5, -1.0, 1.0];
        let expected = sampling.candidates(&mut logits.clone(), &[]);
        let mut counts = [0.0; 4];
        for counter in 0..40_000 {
            counts[sampling.next(&mut logits.clone(), &[], &random, counter) as usize] += 1.0 / 40_000.0;
        }
        for (id, probability) in expected {
            assert!(
                (counts[id as usize] - probability).abs() <= 0.01,
                "{id}: {} against {probability}",
                counts[id as usize]
            );
        }
        let again = |counter| sampling.next(&mut logits.clone(), &[], &random, counter);
        assert_eq!(again(17), again(17));
    }

    #[test]
    fn a_log_probability_is_a_log_softmax() {
        let logits = [1.0f32, 2.0, 3.0];
        let log_p = log_softmax(&logits);
        let total: f32 = logits.iter().map(|&logit| log_p(logit).exp()).sum();
        assert!((total - 1.0).abs() <= 1e-6, "{total}");
        assert!((log_p(3.0) + 0.407_606).abs() <= 1e-6);
    }

    #[test]
    fn the_likeliest_are_in_order_and_below_the_limit() {
        let logits = [1.0, 5.0, f32::NEG_INFINITY, 5.0, 9.0];
        let likeliest = |id_limit, count| Sampling { id_limit, ..Sampling::default() }.likeliest(&logits, count);
        assert_eq!(likeliest(0, 3), [(4, 9.0), (1, 5.0), (3, 5.0)]);
        assert_eq!(likeliest(4, 2), [(1, 5.0), (3, 5.0)]);
        assert_eq!(likeliest(4, 9), [(1, 5.0), (3, 5.0), (0, 1.0), (2, f32::NEG_INFINITY)]);
        assert!(likeliest(0, 0).is_empty());
    }

    #[test]
    fn parameters_that_mean_nothing_are_named() {
        let sampling = Sampling::default;
        for (bad, name) in [
            (Sampling { temperature: -1.0, ..sampling() }, "temperature"),
            (Sampling { temperature: f64::NAN, ..sampling() }, "temperature"),
            (Sampling { temperature: 1e-60, ..sampling() }, "temperature"),
            (Sampling { top_p: 1.5, ..sampling() }, "top_p"),
            (Sampling { repetition_penalty: 0.0, ..sampling() }, "repetition_penalty"),
        ] {
            assert!(bad.check().unwrap_err().message.contains(name), "{name}");
        }
        assert!(sampling().check().is_ok());
    }

    #[test]
    fn a_draw_at_the_very_end_still_gives_a_token() {
        assert_eq!(draw(&vec![(4, 0.5), (7, 0.5 - 1e-12), (9, 0.0)], 1.0 - 1e-16), 7);
    }

    proptest! {
        /// The nucleus by partial selection is the one a full sort gives.
        #[test]
        fn the_nucleus_is_that_of_a_full_sort(weights in prop::collection::vec(0.0f32..1.0, 1..2000), top_p in 0.01f64..1.0) {
            let all: Vec<(u32, f32)> = (0..).zip(weights).collect();
            let mut expected = all.clone();
            expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let total: f64 = all.iter().map(|(_, weight)| f64::from(*weight)).sum();
            let (mut mass, mut keep) = (0.0, 0);
            while keep < expected.len() && (keep == 0 || mass < top_p * total) {
                mass += f64::from(expected[keep].1);
                keep += 1;
            }
            expected.truncate(keep);
            expected.sort_by_key(|(id, _)| *id);
            let mut got = all;
            nucleus(&mut got, top_p);
            prop_assert_eq!(got, expected);
        }
    }
}
