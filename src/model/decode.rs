//! Generation: prompts in, completions out, many at once.
//!
//! Prompts are run packed, their keys and values kept; then every live completion advances by one token per
//! step, together. A finished one leaves at once and the next prompt takes its place, so no row is wasted; one that
//! might not find room for its longest end waits. How many live at once follows from memory alone and changes
//! nothing: a completion has the same tokens alone as in any company, to the bit, because every row is computed by
//! itself and draws its own random numbers.

use super::config::Config;
use super::device::DeviceModel;
use super::device_decode::DeviceDecoder;
use super::pages::Held;
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

/// What generation may take of a machine. Changes nothing of what comes out.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Completions at once.
    pub live: usize,
    /// Pages of keys and values on a device, of 16 tokens each; those that it has memory for, if they are fewer.
    pub pages: usize,
    /// Whether steps on a device are captured and launched as a whole.
    pub graphs: bool,
}

impl Default for Limits {
    /// As much as there is.
    fn default() -> Limits {
        Limits { live: MOST_LIVE, pages: usize::MAX, graphs: true }
    }
}

/// Bytes that keys and values of all live completions may take together, on the host.
const CACHE_BYTES: usize = 1 << 30;
/// Bytes of logits `[live, V]`, on the host.
const LOGIT_BYTES: usize = 128 << 20;
pub(super) const MOST_LIVE: usize = 256;
/// Tokens by which a cache grows: doubling would take twice the memory that is counted.
const GROWTH: usize = 256;
/// Tokens of prompts that are run together; one longer prompt is run alone.
const PROMPT_TOKENS: usize = 4096;

/// Tokens of prompts, none longer than `prompt`, that are run together at most for so many completions.
pub(super) fn prompts_together(live: usize, prompt: usize) -> usize {
    live.saturating_mul(prompt).min(prompt.max(PROMPT_TOKENS)).max(1)
}

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
    generate_within(placed, prompts, sampling, decode, on_step, &Limits::default())
}

/// [`generate_placed`] within limits.
pub fn generate_within(
    placed: &Placed,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
    limits: &Limits,
) -> Result<Vec<Completion>, Problem> {
    generate_on(placed, placed.device(), prompts, sampling, decode, on_step, limits)
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
    generate_on(model, None, prompts, sampling, decode, on_step, &Limits { live, ..Limits::default() })
}

fn generate_on(
    model: &Model,
    device: Option<&DeviceModel>,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
    limits: &Limits,
) -> Result<Vec<Completion>, Problem> {
    for prompt in prompts {
        model.check_ids(&prompt.ids)?;
        if prompt.ids.is_empty() {
            return Err(Problem::new("model::empty_prompt", "a prompt has no tokens"));
        }
    }
    if prompts.is_empty() || sampling.max_tokens == 0 {
        on_step(prompts.len())?;
        let nothing =
            || Completion { ids: Vec::new(), text: decode(&[]), finish: Finish::Length, logprobs: Vec::new() };
        return Ok(prompts.iter().map(|_| nothing()).collect());
    }
    let mut engine = Engine::new(model, device, prompts, sampling, limits)?;
    let mut completions: Vec<Option<Completion>> = prompts.iter().map(|_| None).collect();
    let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
    let mut live: Vec<Live> = Vec::new();
    let mut finished = 0;
    let mut end = |engine: &mut Engine, live: &mut Vec<Live>, drawn: Vec<Draw>| -> Result<(), Problem> {
        for (mut one, completion) in advance(live, drawn, sampling, decode)? {
            engine.release(&mut one);
            completions[one.prompt] = Some(completion);
            finished += 1;
        }
        on_step(finished)
    };
    loop {
        while live.len() < engine.width {
            let mut new = admit(&mut engine, prompts, &mut waiting, live.len(), sampling);
            if new.live.is_empty() {
                break;
            }
            let next = waiting.front().map(|&next| prompts[next].ids.as_slice());
            let drawn = engine.prefill(&mut new, live.len(), next)?;
            end(&mut engine, &mut new.live, drawn)?;
            live.append(&mut new.live);
        }
        if live.is_empty() {
            break;
        }
        let drawn = engine.step(&mut live)?;
        end(&mut engine, &mut live, drawn)?;
    }
    engine.end();
    Ok(completions.into_iter().flatten().collect())
}

/// A token, and its log p under the model itself.
pub(super) type Draw = (u32, f32);

/// A completion in the making.
pub(super) struct Live {
    /// Its place among the prompts.
    pub prompt: usize,
    /// Prompt and completion.
    pub ids: Vec<u32>,
    pub prompt_len: usize,
    /// Of its random numbers.
    pub stream: u64,
    logprobs: Vec<f32>,
    /// Keys and values of each layer, `[tokens, KV, D]`; empty on a device.
    cache: Vec<[Vec<f32>; 2]>,
    /// Where they are on a device.
    pub held: Held,
}

/// Completions that begin together. Their prompts are run, equal ones once.
struct Admitted<'p> {
    live: Vec<Live>,
    /// None if the one prompt of all of them was run before.
    different: Vec<&'p [u32]>,
    /// Which of these each has.
    same: Vec<usize>,
}

/// The next completions that there is room for beside `live` others.
fn admit<'p>(
    engine: &mut Engine,
    prompts: &'p [Prompt],
    waiting: &mut VecDeque<usize>,
    live: usize,
    sampling: &Sampling,
) -> Admitted<'p> {
    let mut new = Admitted { live: Vec::new(), different: Vec::new(), same: Vec::new() };
    let (mut place_of, mut tokens) = (HashMap::new(), 0);
    while let Some(&prompt) = waiting.front()
        && live + new.live.len() < engine.width
    {
        let Prompt { ids, stream } = &prompts[prompt];
        let known = engine.knows(ids);
        let at = if known { 0 } else { *place_of.get(ids).unwrap_or(&new.different.len()) };
        let runs = !known && at == new.different.len();
        let begun = !new.live.is_empty();
        // Either the prompt that is known, or some to run; and not too many tokens of those.
        if begun && (known != new.different.is_empty() || (runs && tokens + ids.len() > PROMPT_TOKENS)) {
            break;
        }
        let Some(held) = engine.promise(ids.len(), !runs) else { break };
        if runs {
            tokens += ids.len();
            place_of.insert(ids, at);
            new.different.push(ids);
        }
        new.same.push(at);
        new.live.push(Live {
            prompt,
            ids: ids.clone(),
            prompt_len: ids.len(),
            stream: *stream,
            logprobs: Vec::with_capacity(sampling.max_tokens.min(4096)),
            cache: Vec::new(),
            held,
        });
        waiting.pop_front();
    }
    new
}

/// Runs prompts and tokens and draws from what comes out.
struct Engine<'m> {
    /// Completions that it runs at once.
    width: usize,
    place: Place<'m>,
}

enum Place<'m> {
    Host(Host<'m>),
    Device(Box<DeviceDecoder<'m>>),
}

impl<'m> Engine<'m> {
    fn new(
        model: &'m Model,
        device: Option<&'m DeviceModel>,
        prompts: &[Prompt],
        sampling: &'m Sampling,
        limits: &Limits,
    ) -> Result<Engine<'m>, Problem> {
        let prompt = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        let longest = prompt + sampling.max_tokens;
        let width = limits.live.min(prompts.len());
        Ok(match device {
            None => {
                let rope = RopeTable::new(longest, model.config.head_dim, model.config.rope_theta);
                let width = width.min(most_live(&model.config, longest)).max(1);
                Engine { width, place: Place::Host(Host { model, rope, sampling }) }
            }
            Some(device) => {
                let width = width.clamp(1, MOST_LIVE);
                let decoder = DeviceDecoder::new(model, device, sampling, limits, width, longest, prompt)?;
                Engine { width, place: Place::Device(Box::new(decoder)) }
            }
        })
    }

    /// Whether a prompt need not be run again.
    fn knows(&self, ids: &[u32]) -> bool {
        match &self.place {
            Place::Host(_) => false,
            Place::Device(decoder) => decoder.knows(ids),
        }
    }

    /// Room for a completion of a prompt of `len` tokens, which are `shared` with another or not; none if it has to
    /// wait.
    fn promise(&mut self, len: usize, shared: bool) -> Option<Held> {
        match &mut self.place {
            Place::Host(_) => Some(Held::default()),
            Place::Device(decoder) => decoder.promise(len, shared),
        }
    }

    /// Runs whole prompts and draws the first token of each completion. There are `before` others; `next` is the
    /// prompt of the next in line.
    fn prefill(&mut self, new: &mut Admitted, before: usize, next: Option<&[u32]>) -> Result<Vec<Draw>, Problem> {
        let Admitted { live, different, same } = new;
        match &mut self.place {
            Place::Host(host) => {
                let mut logits = host.prefill(different, same, live);
                Ok(host.draw(live, &mut logits))
            }
            Place::Device(decoder) => decoder.prefill(live, different, same, before, next),
        }
    }

    /// One token further for all.
    fn step(&mut self, live: &mut [Live]) -> Result<Vec<Draw>, Problem> {
        match &mut self.place {
            Place::Host(host) => {
                let mut logits = host.step(live);
                Ok(host.draw(live, &mut logits))
            }
            Place::Device(decoder) => decoder.step(live),
        }
    }

    /// What a completion that has ended took.
    fn release(&mut self, live: &mut Live) {
        if let Place::Device(decoder) = &mut self.place {
            decoder.release(&mut live.held);
        }
    }

    fn end(self) {
        if let Place::Device(decoder) = self.place {
            decoder.end();
        }
    }
}

/// Decoding on the host.
struct Host<'m> {
    model: &'m Model,
    rope: RopeTable,
    sampling: &'m Sampling,
}

impl Host<'_> {
    /// Runs whole prompts, filling their caches: `same[i]` is the place of `new[i]`'s prompt in `different`. Returns
    /// the logits after each, `[live, V]`.
    fn prefill(&self, different: &[&[u32]], same: &[usize], new: &mut [Live]) -> Vec<f32> {
        let model = self.model;
        let lengths: Vec<usize> = different.iter().map(|ids| ids.len()).collect();
        let ends: Vec<usize> = lengths.iter().scan(0, |end, length| (*end += length, Some(*end)).1).collect();
        let sequences = Sequences::new(&model.config, &lengths);
        let mut x = model.embed_ids(&different.concat());
        for layer in &model.layers {
            let (k, v) = model.layer_keys_values(layer, &mut x, &sequences);
            for (live, &at) in new.iter_mut().zip(same) {
                let width = model.config.key_size();
                let range = (ends[at] - lengths[at]) * width..ends[at] * width;
                live.cache.push([k[range.clone()].to_vec(), v[range].to_vec()]);
            }
        }
        let hidden = model.config.hidden_size;
        let last = same.iter().flat_map(|&at| &x[(ends[at] - 1) * hidden..ends[at] * hidden]);
        head(model, &last.copied().collect::<Vec<f32>>())
    }

    /// One token further for all. Returns their next logits `[live, V]`.
    fn step(&self, live: &mut [Live]) -> Vec<f32> {
        let model = self.model;
        let ids: Vec<u32> = live.iter().map(|live| live.ids[live.ids.len() - 1]).collect();
        let positions: Vec<u32> = live.iter().map(|live| live.ids.len() as u32 - 1).collect();
        let mut x = model.embed_ids(&ids);
        for (i, layer) in model.layers.iter().enumerate() {
            step_layer(model, layer, i, &mut x, live, (&self.rope, &positions));
        }
        head(model, &x)
    }

    /// The next token of each from its logits `[live, V]`, which are overwritten.
    fn draw(&self, live: &[Live], logits: &mut [f32]) -> Vec<Draw> {
        let sampling = self.sampling;
        let rows = live.par_iter().zip(logits.par_chunks_exact_mut(self.model.config.vocab_size));
        let draw = |(live, logits): (&Live, &mut [f32])| {
            let mut plain = logits.to_vec();
            let counter = (live.ids.len() - live.prompt_len) as u64;
            let id = sampling.next(logits, &live.ids, &Stream::new(sampling.seed, live.stream), counter);
            (id, log_probability(&mut plain, id))
        };
        rows.map(draw).collect()
    }
}

/// How many completions of so many tokens, prompts included, memory allows at once.
pub(super) fn most_live(config: &Config, longest: usize) -> usize {
    let token = config.num_hidden_layers * 2 * config.key_size() * size_of::<f32>();
    let cache = longest.saturating_mul(token);
    let logits = config.vocab_size * size_of::<f32>();
    (CACHE_BYTES / cache.max(1)).min(LOGIT_BYTES / logits)
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

/// Gives each completion the token that was drawn for it and takes out those that are finished.
fn advance(
    live: &mut Vec<Live>,
    drawn: Vec<Draw>,
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
) -> Result<Vec<(Live, Completion)>, Problem> {
    for (live, (id, logprob)) in live.iter_mut().zip(drawn) {
        live.ids.push(id);
        live.logprobs.push(logprob);
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
    // From the end, so that what takes the place of one that goes has been looked at, and few change places.
    for at in (0..live.len()).rev() {
        if let Some((finish, text)) = finish(&live[at].ids[live[at].prompt_len..], sampling, decode) {
            let mut one = live.swap_remove(at);
            let ids = one.ids.split_off(one.prompt_len);
            let logprobs = std::mem::take(&mut one.logprobs);
            done.push((one, Completion { ids, text, finish, logprobs }));
        }
    }
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
