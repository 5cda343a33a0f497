//! Generation: prompts in, completions out, many at once.
//!
//! Prompts are run packed, their keys and values kept; then every live completion advances by one token per
//! step, together. A finished one leaves at once and the next prompt takes its place, so no row is wasted.
//! How many live at once follows from memory alone and changes nothing: a completion has the same
//! tokens alone as in any company, to the bit, because every row is computed by itself and draws its own
//! random numbers.

use super::config::Config;
use super::device::DeviceModel;
use super::device_decode::DeviceCache;
use super::placed::Placed;
use super::qwen2::{Layer, Model, Sequences};
use super::sampling::Sampling;
use crate::problem::Problem;
use crate::random::Stream;
use crate::tensor::ops::{self, RopeTable};
use crate::tensor::vector;
use rayon::prelude::*;
use std::collections::{HashMap, VecDeque};

/// A prompt and the random numbers of its completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// Which numbers it draws; make it from the record's id and the index of the sample.
    pub stream: u64,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// At a stop id or a stop text.
    Stop,
    /// At `max_tokens`.
    Length,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// New ids, the stop id included.
    pub ids: Vec<u32>,
    /// Their text, without stop id and from the stop text on cut off.
    pub text: String,
    pub finish: Finish,
    /// log p of each id under the model itself: before penalty, temperature and filters.
    pub logprobs: Vec<f32>,
}

/// Bytes that keys and values of all live completions may take together.
const CACHE_BYTES: usize = 1 << 30;
/// Bytes of logits `[live, V]`.
const LOGIT_BYTES: usize = 128 << 20;
pub(super) const MOST_LIVE: usize = 256;
/// Tokens by which a cache grows: doubling would take twice the memory that is counted.
const GROWTH: usize = 256;
/// Tokens of prompts that are run together; one longer prompt is run alone.
pub(super) const PROMPT_TOKENS: usize = 4096;

/// Completes `prompts`, in order. `decode` turns ids to text (without special tokens, if that is wanted).
/// `on_step` is told how many are finished, at least once per token; its `Err` ends the work. `Err` also for
/// an empty prompt or an id without a row in the embedding.
pub fn generate(
    model: &Model,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
) -> Result<Vec<Completion>, Problem> {
    generate_at_most(model, prompts, sampling, decode, on_step, MOST_LIVE)
}

/// [`generate`] where the model computes.
pub fn generate_placed(
    placed: &Placed,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
) -> Result<Vec<Completion>, Problem> {
    generate_on(placed, placed.device(), prompts, sampling, decode, on_step, MOST_LIVE)
}

/// [`generate`] with at most `live` completions at once, and no more than memory allows.
pub fn generate_at_most(
    model: &Model,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
    live: usize,
) -> Result<Vec<Completion>, Problem> {
    generate_on(model, None, prompts, sampling, decode, on_step, live)
}

fn generate_on(
    model: &Model,
    device: Option<&DeviceModel>,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
    live: usize,
) -> Result<Vec<Completion>, Problem> {
    for prompt in prompts {
        model.check_ids(&prompt.ids)?;
        if prompt.ids.is_empty() {
            return Err(Problem::new("model::empty_prompt", "a prompt has no tokens"));
        }
    }
    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0) + sampling.max_tokens;
    let width = live.min(most_live(&model.config, longest)).min(prompts.len()).max(1);
    let mut engine = Engine::new(model, device, width, longest)?;
    let mut completions: Vec<Option<Completion>> = prompts.iter().map(|_| None).collect();
    let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
    let mut live: Vec<Live> = Vec::new();
    let mut finished = 0;
    let mut end = |engine: &mut Engine, live: &mut Vec<Live>, logits: &mut [f32]| -> Result<(), Problem> {
        for (mut one, completion) in advance(model, live, logits, sampling, decode)? {
            engine.release(&mut one);
            completions[one.prompt] = Some(completion);
            finished += 1;
        }
        on_step(finished)
    };
    loop {
        while live.len() < width && !waiting.is_empty() {
            let mut new = admit(model, prompts, &mut waiting, width - live.len(), sampling);
            let mut logits = engine.prefill(prompts, &mut new)?;
            end(&mut engine, &mut new, &mut logits)?;
            live.append(&mut new);
        }
        if live.is_empty() {
            break;
        }
        let mut logits = engine.step(&mut live)?;
        end(&mut engine, &mut live, &mut logits)?;
    }
    Ok(completions.into_iter().flatten().collect())
}

/// A completion in the making.
struct Live {
    prompt: usize,
    /// Prompt and completion.
    ids: Vec<u32>,
    prompt_len: usize,
    random: Stream,
    logprobs: Vec<f32>,
    /// Keys and values of each layer, `[tokens, KV, D]`; empty on a device.
    cache: Vec<[Vec<f32>; 2]>,
    /// Where they are on a device.
    pages: Vec<u32>,
}

/// Who runs prompts and tokens.
enum Engine<'m> {
    Host(&'m Model, RopeTable),
    Device(Box<DeviceCache<'m>>),
}

impl<'m> Engine<'m> {
    fn new(
        model: &'m Model,
        device: Option<&'m DeviceModel>,
        live: usize,
        longest: usize,
    ) -> Result<Engine<'m>, Problem> {
        Ok(match device {
            None => Engine::Host(model, RopeTable::new(longest, model.config.head_dim, model.config.rope_theta)),
            Some(device) => Engine::Device(Box::new(DeviceCache::new(model, device, live, longest)?)),
        })
    }

    /// Runs whole prompts, filling their caches; equal prompts are run once. Returns the logits after each,
    /// `[live, V]`.
    fn prefill(&mut self, prompts: &[Prompt], new: &mut [Live]) -> Result<Vec<f32>, Problem> {
        let (different, same) = distinct(prompts, new);
        match self {
            Engine::Host(model, _) => Ok(prefill(model, &different, &same, new)),
            Engine::Device(cache) => {
                let mut owners: Vec<Vec<&mut Vec<u32>>> = different.iter().map(|_| Vec::new()).collect();
                for (live, &at) in new.iter_mut().zip(&same) {
                    owners[at].push(&mut live.pages);
                }
                let logits = cache.prefill(&different, &mut owners)?;
                let width = logits.len() / different.len();
                Ok(same.iter().flat_map(|&at| &logits[at * width..(at + 1) * width]).copied().collect())
            }
        }
    }

    /// One token further for all. Returns their next logits `[live, V]`.
    fn step(&mut self, live: &mut [Live]) -> Result<Vec<f32>, Problem> {
        match self {
            Engine::Host(model, rope) => Ok(step(model, live, rope)),
            Engine::Device(cache) => {
                let ids: Vec<u32> = live.iter().map(|live| live.ids[live.ids.len() - 1]).collect();
                let positions: Vec<u32> = live.iter().map(|live| live.ids.len() as u32 - 1).collect();
                let mut pages: Vec<&mut Vec<u32>> = live.iter_mut().map(|live| &mut live.pages).collect();
                cache.step(&ids, &positions, &mut pages)
            }
        }
    }

    /// What a completion that has ended took.
    fn release(&mut self, live: &mut Live) {
        if let Engine::Device(cache) = self {
            cache.release(&mut live.pages);
        }
    }
}

/// The different ones among the prompts of `new`, and which of them each has.
fn distinct<'p>(prompts: &'p [Prompt], new: &[Live]) -> (Vec<&'p [u32]>, Vec<usize>) {
    let mut first_of: HashMap<&[u32], usize> = HashMap::new();
    let mut different: Vec<&[u32]> = Vec::new();
    let same = new.iter().map(|live| {
        let ids = prompts[live.prompt].ids.as_slice();
        *first_of.entry(ids).or_insert_with(|| {
            different.push(ids);
            different.len() - 1
        })
    });
    let same = same.collect();
    (different, same)
}

/// How many completions of so many tokens, prompts included, memory allows at once.
pub(super) fn most_live(config: &Config, longest: usize) -> usize {
    let token = config.num_hidden_layers * 2 * config.key_size() * size_of::<f32>();
    let cache = longest.saturating_mul(token);
    let logits = config.vocab_size * size_of::<f32>();
    (CACHE_BYTES / cache.max(1)).min(LOGIT_BYTES / logits)
}

/// The next prompts that fit, at least one.
fn admit(
    model: &Model,
    prompts: &[Prompt],
    waiting: &mut VecDeque<usize>,
    most: usize,
    sampling: &Sampling,
) -> Vec<Live> {
    let (mut new, mut tokens) = (Vec::new(), 0);
    while let Some(&prompt) = waiting.front()
        && new.len() < most
    {
        let Prompt { ids, stream } = &prompts[prompt];
        tokens += ids.len();
        if !new.is_empty() && tokens > PROMPT_TOKENS {
            break;
        }
        new.push(Live {
            prompt,
            ids: ids.clone(),
            prompt_len: ids.len(),
            random: Stream::new(sampling.seed, *stream),
            logprobs: Vec::new(),
            cache: model.layers.iter().map(|_| Default::default()).collect(),
            pages: Vec::new(),
        });
        waiting.pop_front();
    }
    new
}

/// [`Engine::prefill`] on the host: `same[i]` is the place of `new[i]`'s prompt in `different`.
fn prefill(model: &Model, different: &[&[u32]], same: &[usize], new: &mut [Live]) -> Vec<f32> {
    let lengths: Vec<usize> = different.iter().map(|ids| ids.len()).collect();
    let ends: Vec<usize> = lengths.iter().scan(0, |end, length| (*end += length, Some(*end)).1).collect();
    let sequences = Sequences::new(&model.config, &lengths);
    let mut x = model.embed_ids(&different.concat());
    for (i, layer) in model.layers.iter().enumerate() {
        let (k, v) = model.layer_keys_values(layer, &mut x, &sequences);
        for (live, &at) in new.iter_mut().zip(same) {
            let width = model.config.key_size();
            let range = (ends[at] - lengths[at]) * width..ends[at] * width;
            live.cache[i] = [k[range.clone()].to_vec(), v[range].to_vec()];
        }
    }
    let hidden = model.config.hidden_size;
    let last = same.iter().flat_map(|&at| &x[(ends[at] - 1) * hidden..ends[at] * hidden]);
    head(model, &last.copied().collect::<Vec<f32>>())
}

/// [`Engine::step`] on the host.
fn step(model: &Model, live: &mut [Live], rope: &RopeTable) -> Vec<f32> {
    let ids: Vec<u32> = live.iter().map(|live| live.ids[live.ids.len() - 1]).collect();
    let positions: Vec<u32> = live.iter().map(|live| live.ids.len() as u32 - 1).collect();
    let mut x = model.embed_ids(&ids);
    for (i, layer) in model.layers.iter().enumerate() {
        step_layer(model, layer, i, &mut x, live, (rope, &positions));
    }
    head(model, &x)
}

fn step_layer(model: &Model, layer: &Layer, i: usize, x: &mut [f32], live: &mut [Live], rope: (&RopeTable, &[u32])) {
    let (norm, _) = model.rmsnorm(x, &layer.norm1);
    let mut low = Default::default();
    let [q, k, v] = model.project(layer, &norm, rope, &mut low);
    let mut attended = vec![0.0; q.len()];
    let (q_width, k_width) = (model.config.query_size(), model.config.key_size());
    let dims = model.attention_dims();
    let each = live.par_iter_mut().zip(attended.par_chunks_exact_mut(q_width)).zip(q.par_chunks_exact(q_width));
    each.zip(k.par_chunks_exact(k_width).zip(v.par_chunks_exact(k_width))).for_each(
        |(((live, attended), q), (k, v))| {
            let [keys, values] = &mut live.cache[i];
            for (cache, new) in [(&mut *keys, k), (&mut *values, v)] {
                if cache.len() == cache.capacity() {
                    cache.reserve_exact(GROWTH * new.len());
                }
                cache.extend_from_slice(new);
            }
            ops::attention_decode(attended, q, keys, values, dims);
        },
    );
    model.after_attention(layer, x, &attended, &mut low);
}

fn head(model: &Model, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / model.config.hidden_size;
    let (normed, _) = model.final_norm(x);
    let mut logits = vec![0.0; rows * model.config.vocab_size];
    model.head.forward(model, &mut logits, &normed, rows);
    logits
}

/// Draws the next token of each from its logits and takes out those that are finished.
fn advance(
    model: &Model,
    live: &mut Vec<Live>,
    logits: &mut [f32],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
) -> Result<Vec<(Live, Completion)>, Problem> {
    if sampling.max_tokens > 0 {
        live.par_iter_mut().zip(logits.par_chunks_exact_mut(model.config.vocab_size)).for_each(|(live, logits)| {
            let mut plain = logits.to_vec();
            let counter = (live.ids.len() - live.prompt_len) as u64;
            let id = sampling.next(logits, &live.ids, &live.random, counter);
            live.logprobs.push(log_probability(&mut plain, id));
            live.ids.push(id);
        });
    }
    if let Some(one) = live.iter().find(|one| one.logprobs.last().is_some_and(|p| !p.is_finite())) {
        let at = one.logprobs.len();
        return Err(Problem::new(
            "model::not_finite",
            format!("the logits of token {at} of prompt {} are not finite", one.prompt + 1),
        )
        .note("the weights are finite, so an activation overflowed: the model has diverged in training"));
    }
    let mut done = Vec::new();
    let mut kept = Vec::with_capacity(live.len());
    for mut one in live.drain(..) {
        match finish(&one.ids[one.prompt_len..], sampling, decode) {
            Some((finish, text)) => {
                let ids = one.ids.split_off(one.prompt_len);
                let logprobs = std::mem::take(&mut one.logprobs);
                done.push((one, Completion { ids, text, finish, logprobs }));
            }
            None => kept.push(one),
        }
    }
    *live = kept;
    Ok(done)
}

/// log softmax(logits)[id], the sum in f64. Overwrites the logits.
fn log_probability(logits: &mut [f32], id: u32) -> f32 {
    let (max, logit) = (vector::max(logits), logits[id as usize]);
    vector::exp_sum(logits, max);
    let sum: f64 = logits.iter().map(|weight| f64::from(*weight)).sum();
    (f64::from(logit - max) - sum.ln()) as f32
}

/// Whether a completion is over, and then its text.
fn finish(ids: &[u32], sampling: &Sampling, decode: &dyn Fn(&[u32]) -> String) -> Option<(Finish, String)> {
    if let Some((last, before)) = ids.split_last()
        && sampling.stop_ids.contains(last)
    {
        return Some((Finish::Stop, cut(decode(before), &sampling.stop).0));
    }
    // A token is at least one byte, so a new stop text lies within that many last tokens; a few more keep
    // the first character of the tail whole.
    let tail = sampling.stop.iter().map(|stop| stop.len() + 4).max().unwrap_or(0).min(ids.len());
    if tail > 0 && cut(decode(&ids[ids.len() - tail..]), &sampling.stop).1 {
        let (text, found) = cut(decode(ids), &sampling.stop);
        if found {
            return Some((Finish::Stop, text));
        }
    }
    (ids.len() >= sampling.max_tokens).then(|| (Finish::Length, decode(ids)))
}

/// The text before the first of the stop texts, and whether there was one.
fn cut(mut text: String, stop: &[String]) -> (String, bool) {
    match stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
        Some(at) => {
            text.truncate(at);
            (text, true)
        }
        None => (text, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(ids: &[u32]) -> String {
        ids.iter().map(|&id| char::from(b'a' + id as u8)).collect()
    }

    fn stopping(stop: &[&str], stop_ids: &[u32]) -> Sampling {
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        Sampling { max_tokens: 6, stop, stop_ids: stop_ids.to_vec(), ..Sampling::default() }
    }

    #[test]
    fn a_stop_text_may_span_tokens_and_is_cut_off() {
        let sampling = stopping(&["cd", "zz"], &[]);
        assert_eq!(finish(&[0, 1, 2], &sampling, &letters), None);
        assert_eq!(finish(&[0, 1, 2, 3], &sampling, &letters), Some((Finish::Stop, "ab".into())));
    }

    #[test]
    fn a_stop_id_is_not_part_of_the_text() {
        assert_eq!(finish(&[0, 1, 9], &stopping(&[], &[9]), &letters), Some((Finish::Stop, "ab".into())));
    }

    #[test]
    fn the_length_ends_it_otherwise() {
        assert_eq!(finish(&[0; 5], &stopping(&["b"], &[9]), &letters), None);
        assert_eq!(finish(&[0; 6], &stopping(&["b"], &[9]), &letters), Some((Finish::Length, "aaaaaa".into())));
        assert_eq!(
            finish(&[], &Sampling { max_tokens: 0, ..Sampling::default() }, &letters),
            Some((Finish::Length, "".into()))
        );
    }

    #[test]
    fn a_log_probability_is_a_log_softmax() {
        let logits = [1.0f32, 2.0, 3.0];
        let total: f32 = (0..3).map(|id| log_probability(&mut logits.clone(), id).exp()).sum();
        assert!((total - 1.0).abs() <= 1e-6, "{total}");
        assert!((log_probability(&mut logits.clone(), 2) + 0.407_606).abs() <= 1e-6);
    }
}
