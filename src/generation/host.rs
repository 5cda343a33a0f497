//! Decoding on the host: where keys and values lie, and one token further for all completions.
//!
//! A page holds 64 tokens of every layer, which is as many keys as attention looks at at once: a sequence has the same
//! bits in pages as in one piece. Pages are allocated when they are first written to, and stay.

use super::request::{Beginning, Draw, Live};
use super::sampling::log_softmax;
use crate::model::decoder::Decoder;
use crate::model::host::{Host, sure};
use crate::model::place::Place;
use crate::model::sizes::{HOST_PAGE as PAGE, KNOWN};
use crate::model::step::StepRows;
use crate::random::Stream;
use crate::tensor::ops::{self, RopeTable};
use rayon::prelude::*;
use std::sync::Arc;

pub(super) struct HostDecoder<'m> {
    model: &'m Decoder<Host>,
    angles: Arc<RopeTable>,
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
    /// For sequences of at most `longest` tokens in this many pages.
    pub fn new(model: &Decoder<Host>, longest: usize, pages: usize) -> HostDecoder<'_> {
        let config = &model.config;
        let (layers, width) = (config.num_hidden_layers, config.key_size());
        HostDecoder {
            model,
            angles: sure(model.place.angles(config, longest)),
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
        let width = self.cache.width;
        let row = |one: &Live, token: usize| one.held.pages()[token / PAGE] * PAGE as u32 + (token % PAGE) as u32;
        let rows: Vec<u32> =
            prompts.iter().flat_map(|one| (0..one.prompt_len).map(move |token| row(one, token))).collect();
        let ids: Vec<&[u32]> = prompts.iter().map(|one| one.prompt()).collect();
        let cache = &mut self.cache;
        sure(self.model.run_prompts(&ids, self.angles.clone(), &mut |layer, k, v| {
            for ((k, v), &row) in k.chunks_exact(width).zip(v.chunks_exact(width)).zip(&rows) {
                cache.write(row, layer, k, v);
            }
            Ok(())
        }))
    }

    /// One token further for all.
    pub fn step(&mut self, live: &[Live]) -> Vec<Draw> {
        // In rayon's pool as a whole: handing over each of its hundred small loops from outside costs more.
        rayon::scope(|_| self.step_here(live))
    }

    fn step_here(&mut self, live: &[Live]) -> Vec<Draw> {
        let (model, cache) = (self.model, &mut self.cache);
        let ids: Vec<u32> = live.iter().map(|one| one.ids[one.ids.len() - 1]).collect();
        let positions: Vec<u32> = live.iter().map(|one| one.ids.len() as u32 - 1).collect();
        let mut rows = sure(StepRows::new(model, live.len()));
        sure(model.run_tokens(&mut rows, &ids, &positions, &self.angles, &mut |layer, rows| {
            cache.attend(model, layer, rows, live);
            Ok(())
        }));
        draw(live, &rows.logits.chunks_exact(model.config.vocab_size).collect::<Vec<&[f32]>>())
    }
}

impl Cache {
    /// Writes the keys and values of the last token of each, and attends to all of them.
    fn attend(&mut self, model: &Decoder<Host>, layer: usize, rows: &mut StepRows<Host>, live: &[Live]) {
        let StepRows { q, k, v, attended, .. } = rows;
        for ((one, k), v) in live.iter().zip(k.chunks_exact(self.width)).zip(v.chunks_exact(self.width)) {
            let last = one.ids.len() - 1;
            self.write(one.held.pages()[last / PAGE] * PAGE as u32 + (last % PAGE) as u32, layer, k, v);
        }
        let (width, dims, cache) = (model.config.query_size(), model.config.heads().on_host(), &*self);
        let each = attended.par_chunks_exact_mut(width).zip(q.par_chunks_exact(width)).zip(live.par_iter());
        each.for_each(|((attended, q), one)| {
            let page = |&page: &u32| [0, 1].map(|which| cache.part(page, layer, which));
            let pages: Vec<[&[f32]; 2]> = one.held.pages().iter().map(page).collect();
            ops::attention_decode(attended, q, &pages, one.ids.len(), dims);
        });
    }
}

/// The next token of each from its logits.
fn draw(live: &[Live], logits: &[&[f32]]) -> Vec<Draw> {
    let draw = |(one, logits): (&Live, &&[f32])| {
        let (sampling, random) = (&one.sampling, Stream::new(one.sampling.seed, one.stream));
        let id = sampling
            .plainly(logits)
            .unwrap_or_else(|| sampling.next(&mut logits.to_vec(), &one.ids, &random, one.counter()));
        let mut top = sampling.likeliest(logits, one.top_logprobs);
        let log_p = log_softmax(logits);
        top.iter_mut().for_each(|(_, value)| *value = log_p(*value));
        Draw { id, logprob: log_p(logits[id as usize]), top }
    };
    live.par_iter().zip(logits).map(draw).collect()
}
