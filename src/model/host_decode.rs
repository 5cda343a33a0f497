//! Decoding on the host: where keys and values lie, and one token further for all completions.
//!
//! A page holds 64 tokens of every layer, which is as many keys as attention looks at at once: a sequence has the same
//! bits in pages as in one piece. Pages are allocated when they are first written to, and stay.

use super::config::Config;
use super::engine::{Beginning, Draw, KNOWN, Live, MOST_LIVE, pages_of};
use super::qwen2::{Layer, Model, Sequences};
use super::sampling::log_softmax;
use crate::random::Stream;
use crate::tensor::ops::{self, RopeTable};
use rayon::prelude::*;

pub(super) use crate::tensor::ops::PAGE;

/// Bytes that keys and values of all live completions may take together; one completion may always take its own.
const CACHE_BYTES: usize = 1 << 30;
/// Bytes of logits `[live, V]`.
const LOGIT_BYTES: usize = 128 << 20;

/// How many completions memory allows at once.
pub(super) fn most_live(config: &Config) -> usize {
    (LOGIT_BYTES / (config.vocab_size * size_of::<f32>())).clamp(1, MOST_LIVE)
}

/// Values of a page.
fn page_len(config: &Config) -> usize {
    config.num_hidden_layers * 2 * PAGE * config.key_size()
}

/// Pages that there are for `live` completions of at most `longest` tokens.
pub(super) fn pages(config: &Config, live: usize, longest: usize) -> usize {
    let (one, most) = (pages_of(longest, PAGE), CACHE_BYTES / (page_len(config) * size_of::<f32>()));
    live.saturating_mul(one).min(most).max(one)
}

pub(super) struct HostDecoder<'m> {
    model: &'m Model,
    rope: RopeTable,
    cache: Cache,
    /// The logits after the prompts that are known, by slot.
    kept: [Vec<f32>; KNOWN],
}

/// Keys and values.
struct Cache {
    /// `[layers, 2, PAGE, KV, D]` each; empty before it is written to.
    pages: Vec<Vec<f32>>,
    layers: usize,
    /// KV D
    width: usize,
}

impl Cache {
    /// Keys (0) or values (1) of a layer in a page.
    fn part(&self, page: u32, layer: usize, which: usize) -> &[f32] {
        let len = PAGE * self.width;
        &self.pages[page as usize][(2 * layer + which) * len..][..len]
    }

    /// Row `row` of a layer =.
    fn write(&mut self, row: u32, layer: usize, k: &[f32], v: &[f32]) {
        let (width, all) = (self.width, self.layers * 2 * PAGE * self.width);
        let page = &mut self.pages[row as usize / PAGE];
        if page.is_empty() {
            *page = vec![0.0; all];
        }
        for (which, new) in [k, v].into_iter().enumerate() {
            let at = ((2 * layer + which) * PAGE + row as usize % PAGE) * width;
            page[at..at + width].copy_from_slice(new);
        }
    }

    /// Copies rows of every layer. None of `from` is among `to`.
    fn copy(&mut self, from: &[u32], to: &[u32]) {
        for (&from, &to) in from.iter().zip(to) {
            for layer in 0..self.layers {
                let at = from as usize % PAGE * self.width;
                let [k, v] =
                    [0, 1].map(|which| self.part(from / PAGE as u32, layer, which)[at..at + self.width].to_vec());
                self.write(to, layer, &k, &v);
            }
        }
    }
}

impl HostDecoder<'_> {
    /// For sequences of at most `longest` tokens in so many pages.
    pub fn new(model: &Model, longest: usize, pages: usize) -> HostDecoder<'_> {
        let config = &model.config;
        let (layers, width) = (config.num_hidden_layers, config.key_size());
        HostDecoder {
            model,
            rope: RopeTable::new(longest, config.head_dim, config.rope_theta),
            cache: Cache { pages: vec![Vec::new(); pages], layers, width },
            kept: Default::default(),
        }
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.cache.pages.len()
    }

    /// Runs prompts and draws the first token of each of `new`.
    pub fn begin(&mut self, new: &[Live], beginning: &Beginning) -> Vec<Draw> {
        let vocab = self.model.config.vocab_size;
        let fresh = match beginning.runs.is_empty() {
            true => Vec::new(),
            false => self.run_prompts(&beginning.runs.iter().map(|&run| &new[run]).collect::<Vec<_>>()),
        };
        self.cache.copy(&beginning.from, &beginning.to);
        let last = beginning.runs.len() - beginning.keep.len();
        for (&slot, logits) in beginning.keep.iter().zip(fresh.chunks_exact(vocab).skip(last)) {
            self.kept[slot] = logits.to_vec();
        }
        let row = |&at: &usize| if fresh.is_empty() { &self.kept[at][..] } else { &fresh[at * vocab..][..vocab] };
        draw(new, &beginning.prompt.iter().map(row).collect::<Vec<&[f32]>>())
    }

    /// Writes keys and values of whole prompts. Returns the logits after each.
    fn run_prompts(&mut self, prompts: &[&Live]) -> Vec<f32> {
        let (model, width) = (self.model, self.model.config.key_size());
        let lengths: Vec<usize> = prompts.iter().map(|one| one.prompt_len).collect();
        let sequences = Sequences::new(&model.config, &lengths);
        let row = |one: &Live, token: usize| one.held.pages()[token / PAGE] * PAGE as u32 + (token % PAGE) as u32;
        let rows: Vec<u32> =
            prompts.iter().flat_map(|one| (0..one.prompt_len).map(move |token| row(one, token))).collect();
        let mut x = model.embed_ids(&prompts.iter().flat_map(|one| one.prompt()).copied().collect::<Vec<u32>>());
        for (i, layer) in model.layers.iter().enumerate() {
            let (k, v) = model.layer_keys_values(layer, &mut x, &sequences);
            for ((k, v), &row) in k.chunks_exact(width).zip(v.chunks_exact(width)).zip(&rows) {
                self.cache.write(row, i, k, v);
            }
        }
        let hidden = model.config.hidden_size;
        let ends = lengths.iter().scan(0, |end, length| (*end += length, Some(*end)).1);
        head(model, &ends.flat_map(|end| &x[(end - 1) * hidden..end * hidden]).copied().collect::<Vec<f32>>())
    }

    /// One token further for all.
    pub fn step(&mut self, live: &[Live]) -> Vec<Draw> {
        let model = self.model;
        let ids: Vec<u32> = live.iter().map(|one| one.ids[one.ids.len() - 1]).collect();
        let positions: Vec<u32> = live.iter().map(|one| one.ids.len() as u32 - 1).collect();
        let mut x = model.embed_ids(&ids);
        for (i, layer) in model.layers.iter().enumerate() {
            self.step_layer(layer, i, &mut x, live, &positions);
        }
        draw(live, &head(model, &x).chunks_exact(model.config.vocab_size).collect::<Vec<&[f32]>>())
    }

    fn step_layer(&mut self, layer: &Layer, i: usize, x: &mut [f32], live: &[Live], positions: &[u32]) {
        let (model, cache) = (self.model, &mut self.cache);
        let (norm, _) = model.rmsnorm(x, &layer.norm1);
        let mut low = Default::default();
        let [q, k, v] = model.project(layer, &norm, (&self.rope, positions), &mut low);
        for ((one, k), v) in live.iter().zip(k.chunks_exact(cache.width)).zip(v.chunks_exact(cache.width)) {
            let last = one.ids.len() - 1;
            cache.write(one.held.pages()[last / PAGE] * PAGE as u32 + (last % PAGE) as u32, i, k, v);
        }
        let mut attended = vec![0.0; q.len()];
        let (width, dims, cache) = (model.config.query_size(), model.attention_dims(), &self.cache);
        let each = attended.par_chunks_exact_mut(width).zip(q.par_chunks_exact(width)).zip(live.par_iter());
        each.for_each(|((attended, q), one)| {
            let page = |&page: &u32| [0, 1].map(|which| cache.part(page, i, which));
            let pages: Vec<[&[f32]; 2]> = one.held.pages().iter().map(page).collect();
            ops::attention_decode(attended, q, &pages, one.ids.len(), dims);
        });
        model.after_attention(layer, x, &attended, &mut low);
    }
}

/// The next token of each from its logits.
fn draw(live: &[Live], logits: &[&[f32]]) -> Vec<Draw> {
    let draw = |(one, logits): (&Live, &&[f32])| {
        let (sampling, random) = (&one.sampling, Stream::new(one.sampling.seed, one.stream));
        let id = sampling.next(&mut logits.to_vec(), &one.ids, &random, one.counter());
        let mut top = sampling.likeliest(logits, one.top_logprobs);
        let log_p = log_softmax(&mut logits.to_vec());
        top.iter_mut().for_each(|(_, value)| *value = log_p(*value));
        Draw { id, logprob: log_p(logits[id as usize]), top }
    };
    live.par_iter().zip(logits).map(draw).collect()
}

fn head(model: &Model, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / model.config.hidden_size;
    let (normed, _) = model.final_norm(x);
    let mut logits = vec![0.0; rows * model.config.vocab_size];
    model.head.forward(model, &mut logits, &normed, rows);
    logits
}
