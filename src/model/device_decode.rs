//! Keys and values of completions in the making, on a CUDA device, and one token further for all of them.
//!
//! The cache of each layer is a pool of pages of 16 tokens. A completion owns the pages it needs; they are
//! given back when it ends. Which pages these are changes no bit.

use super::device::{DeviceModel, attention_dims};
use super::qwen2::Model;
use crate::cuda::Buffer;
use crate::cuda::ops::attention_decode::{self, PAGE};
use crate::cuda::ops::residual;
use crate::cuda::ops::rope::Table;
use crate::problem::Problem;
use half::bf16;

/// The pages of all layers.
pub struct DeviceCache<'m> {
    model: &'m Model,
    device: &'m DeviceModel,
    /// `[pages, 16, KV, D]` of each layer.
    keys: Vec<Buffer<bf16>>,
    values: Vec<Buffer<bf16>>,
    free: Vec<u32>,
    table: Table,
}

/// Tokens to be run: the pages and the place of each, by token.
struct Places<'p> {
    pages: Vec<&'p [u32]>,
    positions: Vec<u32>,
}

impl<'m> DeviceCache<'m> {
    /// Room for `live` completions of at most `longest` tokens, prompts included.
    pub fn new(
        model: &'m Model,
        device: &'m DeviceModel,
        live: usize,
        longest: usize,
    ) -> Result<DeviceCache<'m>, Problem> {
        let pages = live * longest.div_ceil(PAGE);
        let len = pages * PAGE * model.config.key_size();
        let pool = || model.layers.iter().map(|_| device.gpu().zeros(len)).collect::<Result<Vec<_>, _>>();
        let table = Table::upload(device.gpu(), longest, model.config.head_dim, model.config.rope_theta)?;
        Ok(DeviceCache {
            model,
            device,
            keys: pool()?,
            values: pool()?,
            free: (0..pages as u32).rev().collect(),
            table,
        })
    }

    /// Makes sure that `pages` hold `tokens` tokens.
    fn grow(&mut self, pages: &mut Vec<u32>, tokens: usize) {
        while pages.len() * PAGE < tokens {
            pages.push(self.free.pop().expect("the pool was made for the longest completions"));
        }
    }

    /// Takes back the pages of a completion that has ended.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        self.free.append(pages);
    }

    /// Runs whole prompts, packed, and fills their pages; `owners[i]` lists the pages of every completion of
    /// prompt `i`. Returns the logits after each prompt, `[prompts, V]`.
    pub fn prefill(&mut self, prompts: &[&[u32]], owners: &mut [Vec<&mut Vec<u32>>]) -> Result<Vec<f32>, Problem> {
        for (ids, owners) in prompts.iter().zip(owners.iter_mut()) {
            for pages in owners.iter_mut() {
                self.grow(pages, ids.len());
            }
        }
        let lengths: Vec<usize> = prompts.iter().map(|ids| ids.len()).collect();
        let DeviceCache { model, device, keys, values, .. } = self;
        let mut keep = |layer: usize, k: &Buffer<bf16>, v: &Buffer<bf16>| -> Result<(), Problem> {
            // Once for each completion of a prompt; most have one.
            let most = owners.iter().map(Vec::len).max().unwrap_or(0);
            for which in 0..most {
                let mut places = Places { pages: Vec::new(), positions: Vec::new() };
                let mut rows = Vec::new();
                let mut start = 0;
                for (ids, owners) in prompts.iter().zip(owners.iter()) {
                    if let Some(pages) = owners.get(which) {
                        places.pages.extend(std::iter::repeat_n(pages.as_slice(), ids.len()));
                        places.positions.extend(0..ids.len() as u32);
                        rows.extend((start..start + ids.len()).map(|row| row as u32));
                    }
                    start += ids.len();
                }
                append(device, model, (&mut keys[layer], &mut values[layer]), (k, v), &places, &rows)?;
            }
            Ok(())
        };
        device.run_prompts(model, &prompts.concat(), &lengths, &mut keep)
    }

    /// One token further for all: `ids` are their latest tokens, at `positions`. Returns `[live, V]` logits.
    pub fn step(&mut self, ids: &[u32], positions: &[u32], pages: &mut [&mut Vec<u32>]) -> Result<Vec<f32>, Problem> {
        for (pages, position) in pages.iter_mut().zip(positions) {
            self.grow(pages, *position as usize + 1);
        }
        let owned: Vec<&[u32]> = pages.iter().map(|pages| pages.as_slice()).collect();
        let places = Places { pages: owned, positions: positions.to_vec() };
        let gpu = self.device.gpu();
        let page_table = gpu.upload(&places.table())?;
        let lengths = gpu.upload(&positions.iter().map(|&position| position as i32 + 1).collect::<Vec<_>>())?;
        let longest = positions.iter().max().map_or(0, |&position| position as usize + 1);
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        let uploaded = gpu.upload(positions)?;
        let DeviceCache { model, device, keys, values, table, .. } = self;
        device.run_tokens(model, ids, table, &uploaded, &mut |layer, q, k, v, attended| {
            append(device, model, (&mut keys[layer], &mut values[layer]), (k, v), &places, &rows)?;
            let dims = attention_dims(model);
            let (keys, values) = (&keys[layer], &values[layer]);
            attention_decode::forward(attended, q, keys, values, &page_table, &lengths, longest, dims)
        })
    }
}

/// Puts rows of `k` and `v` into their pages of a layer's cache.
fn append(
    device: &DeviceModel,
    model: &Model,
    (keys, values): (&mut Buffer<bf16>, &mut Buffer<bf16>),
    (k, v): (&Buffer<bf16>, &Buffer<bf16>),
    places: &Places,
    rows: &[u32],
) -> Result<(), Problem> {
    let gpu = device.gpu();
    let dims = attention_dims(model);
    let width = dims.kv_heads * dims.head_dim;
    let rows = gpu.upload(rows)?;
    let (mut these_k, mut these_v) = (gpu.alloc(rows.len() * width)?, gpu.alloc(rows.len() * width)?);
    residual::gather_rows(&mut these_k, k, &rows, width)?;
    residual::gather_rows(&mut these_v, v, &rows, width)?;
    let table = gpu.upload(&places.table())?;
    let positions = gpu.upload(&places.positions.iter().map(|&position| position as i32).collect::<Vec<_>>())?;
    attention_decode::append(keys, values, &these_k, &these_v, &table, &positions, dims)
}

impl Places<'_> {
    /// `[tokens, most pages]`, filled up with page 0.
    fn table(&self) -> Vec<u32> {
        let width = self.pages.iter().map(|pages| pages.len()).max().unwrap_or(0).max(1);
        let row = |pages: &&[u32]| pages.iter().copied().chain(std::iter::repeat(0)).take(width).collect::<Vec<_>>();
        self.pages.iter().flat_map(row).collect()
    }
}
