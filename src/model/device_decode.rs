//! Decoding on a CUDA device: where keys and values lie, and one token further for all completions.
//!
//! The cache of each layer is a pool of pages of 16 tokens (`pages.rs`). Completions of one prompt share the pages
//! that its tokens fill; of the last one, if it is not full, each has its own. Which pages these are changes no bit.
//!
//! A step is a fixed sequence of launches over fixed buffers: what changes from one to the next is uploaded at once,
//! into `Workspace::inputs`, and the ids that are drawn come down. So a step is captured once and then launched as a
//! whole, once for each [`Shape`]: completions and keys are rounded up to a few numbers, rows beyond the completions
//! write to a page of their own, and no row looks at another.

use super::decode::{Draw, Limits, Live};
use super::device::{DeviceModel, attention_dims};
use super::memory::{Decode, Plan, Trained, Work};
use super::pages::{Held, Pages};
use super::qwen2::Model;
use super::sampling::Sampling;
use crate::cuda::ops::attention_decode::{self, PAGE, Parts, SPAN};
use crate::cuda::ops::residual;
use crate::cuda::ops::rope::Table;
use crate::cuda::ops::sampling::{self, Drawn, Logits, Rule, Seen};
use crate::cuda::{Buffer, Gpu, Graph};
use crate::problem::{Exit, Problem};
use crate::tensor::Dtype;
use half::bf16;
use std::collections::HashMap;

/// Completions in the making on a device.
pub(super) struct DeviceDecoder<'m> {
    model: &'m Model,
    device: &'m DeviceModel,
    rule: Rule,
    max_tokens: usize,
    pages: Pages,
    /// The page that rows without a completion write to.
    spare: u32,
    /// `[pages, 16, KV, D]` of each layer.
    keys: Vec<Buffer<bf16>>,
    values: Vec<Buffer<bf16>>,
    table: Table,
    work: Workspace,
    /// What is known of each shape; absent if nothing is to be captured.
    graphs: Option<HashMap<Shape, Option<Graph>>>,
    prefix: Option<Prefix>,
}

/// A prompt that was run, kept for the next in line.
struct Prefix {
    ids: Vec<u32>,
    held: Held,
    /// After its last token, `[1, V]`.
    logits: Buffer<bf16>,
}

/// What a step is captured for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub rows: usize,
    /// The most that a row may attend to.
    pub keys: usize,
}

/// Completions are rounded up to so many: few enough to be captured one by one, at most 7 more than there are.
fn rounded(live: usize) -> usize {
    if live <= 8 { live.next_power_of_two() } else { live.next_multiple_of(8) }
}

impl Shape {
    pub fn of(live: usize, longest: usize) -> Shape {
        Shape { rows: rounded(live), keys: longest.div_ceil(SPAN).next_power_of_two() * SPAN }
    }

    /// Entries that a row has in the page table.
    fn pages(self) -> usize {
        self.keys / PAGE
    }

    /// Of what a step is given.
    pub fn input_bytes(self) -> usize {
        self.rows * (Inputs::ROW_BYTES + self.pages() * size_of::<u32>())
    }
}

/// The buffers of steps of at most so many rows and keys. Smaller steps use the first part of each.
struct Workspace {
    most: Shape,
    /// The sections that [`Inputs`] lists.
    inputs: Buffer<u8>,
    x: Buffer<bf16>,
    norm: Buffer<bf16>,
    rstd: Buffer<f32>,
    q: Buffer<bf16>,
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    attended: Buffer<bf16>,
    gate: Buffer<bf16>,
    up: Buffer<bf16>,
    gated: Buffer<bf16>,
    low: Buffer<bf16>,
    parts: Parts,
    logits: Buffer<bf16>,
    scratch: Buffer<f32>,
    /// Ids, log-probs and probabilities, one after the other.
    drawn: Buffer<u32>,
    seen: Option<Contexts>,
}

/// The ids of every completion so far, for the penalty.
struct Contexts {
    /// `[rows, longest]`.
    ids: Buffer<u32>,
    longest: usize,
    /// Whose each row is, by the number of its prompt.
    owners: Vec<Option<usize>>,
}

/// The buffers of one step, [`Shape::rows`] rows each.
pub(super) struct StepRows {
    pub ids: Buffer<u32>,
    pub positions: Buffer<u32>,
    /// How many keys each row attends to, its own included.
    lengths: Buffer<u32>,
    /// `[rows, pages]`.
    page_table: Buffer<u32>,
    streams: Buffer<u64>,
    counters: Buffer<u64>,
    pub x: Buffer<bf16>,
    pub norm: Buffer<bf16>,
    pub rstd: Buffer<f32>,
    pub q: Buffer<bf16>,
    pub k: Buffer<bf16>,
    pub v: Buffer<bf16>,
    pub attended: Buffer<bf16>,
    pub gate: Buffer<bf16>,
    pub up: Buffer<bf16>,
    pub gated: Buffer<bf16>,
    /// A x of an adapter, for as many rows as there are and the largest rank.
    pub low: Buffer<bf16>,
    pub logits: Buffer<bf16>,
    parts: Parts,
    scratch: Buffer<f32>,
    drawn: Drawn,
    /// `[rows, longest]`.
    seen: Option<Buffer<u32>>,
}

/// What a step is given, row by row. Uploaded in one piece: streams, counters, ids, positions, lengths, page table.
struct Inputs {
    shape: Shape,
    bytes: Vec<u8>,
}

impl Inputs {
    /// Of a row, without its pages.
    const ROW_BYTES: usize = 2 * size_of::<u64>() + 3 * size_of::<u32>();

    /// For rows without completions, which attend to nothing and write to `spare`, each to a place of its own.
    fn new(shape: Shape, spare: u32) -> Inputs {
        let mut inputs = Inputs { shape, bytes: vec![0; shape.input_bytes()] };
        for row in 0..shape.rows {
            inputs.set(20, row, &((row % PAGE) as u32).to_le_bytes());
            inputs.set(28, row * shape.pages(), &spare.to_le_bytes());
        }
        inputs
    }

    /// Element `index` of the section that begins after `before` bytes per row.
    fn set(&mut self, before: usize, index: usize, value: &[u8]) {
        let at = self.shape.rows * before + index * value.len();
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// A completion and its next token.
    fn row(&mut self, row: usize, one: &Live) {
        let counter = (one.ids.len() - one.prompt_len) as u64;
        let last = one.ids.len() as u32 - 1;
        self.set(0, row, &one.stream.to_le_bytes());
        self.set(8, row, &counter.to_le_bytes());
        self.set(16, row, &one.ids[last as usize].to_le_bytes());
        self.set(20, row, &last.to_le_bytes());
        self.set(24, row, &(last + 1).to_le_bytes());
        let width = self.shape.pages();
        for (entry, page) in one.held.pages().iter().take(width).enumerate() {
            self.set(28, row * width + entry, &page.to_le_bytes());
        }
    }
}

impl Workspace {
    fn new(gpu: &Gpu, model: &Model, most: Shape, longest: usize, rule: &Rule) -> Result<Workspace, Problem> {
        let config = &model.config;
        let (rows, hidden, inner) = (most.rows, config.hidden_size, config.intermediate_size);
        let linears = model.layers.iter().flat_map(|layer| &layer.linears).chain([&model.head]);
        let rank = linears.filter_map(|linear| linear.lora).map(|lora| lora.rank).max().unwrap_or(0);
        let seen = || -> Result<Contexts, Problem> {
            Ok(Contexts { ids: gpu.alloc(rows * longest)?, longest, owners: vec![None; rows] })
        };
        Ok(Workspace {
            most,
            inputs: gpu.alloc(most.input_bytes())?,
            x: gpu.alloc(rows * hidden)?,
            norm: gpu.alloc(rows * hidden)?,
            rstd: gpu.alloc(rows)?,
            q: gpu.alloc(rows * config.query_size())?,
            k: gpu.alloc(rows * config.key_size())?,
            v: gpu.alloc(rows * config.key_size())?,
            attended: gpu.alloc(rows * config.query_size())?,
            gate: gpu.alloc(rows * inner)?,
            up: gpu.alloc(rows * inner)?,
            gated: gpu.alloc(rows * inner)?,
            low: gpu.alloc(rows * rank)?,
            parts: Parts::new(gpu, rows, most.keys, attention_dims(model))?,
            logits: gpu.alloc(rows * config.vocab_size)?,
            scratch: gpu.alloc(sampling::scratch_len(rows, config.vocab_size, rule))?,
            drawn: gpu.alloc(rows * 3)?,
            seen: (rule.repetition_penalty != 1.0).then(seen).transpose()?,
        })
    }

    /// The buffers of a step. The contexts are those from row `first` on.
    fn rows(&self, shape: Shape, first: usize, model: &Model) -> StepRows {
        let (rows, most) = (shape.rows, self.most.rows);
        let numbers = |before: usize| self.inputs.part(rows * before, rows);
        let drawn = |which: usize| which * rows * size_of::<u32>();
        /// The same number of elements of each row.
        fn of<T: bytemuck::Pod>(buffer: &Buffer<T>, rows: usize, most: usize) -> Buffer<T> {
            buffer.part(0, buffer.len() / most * rows)
        }
        StepRows {
            ids: numbers(16),
            positions: numbers(20),
            lengths: numbers(24),
            page_table: self.inputs.part(rows * 28, rows * shape.pages()),
            streams: self.inputs.part(0, rows),
            counters: self.inputs.part(rows * 8, rows),
            x: of(&self.x, rows, most),
            norm: of(&self.norm, rows, most),
            rstd: of(&self.rstd, rows, most),
            q: of(&self.q, rows, most),
            k: of(&self.k, rows, most),
            v: of(&self.v, rows, most),
            attended: of(&self.attended, rows, most),
            gate: of(&self.gate, rows, most),
            up: of(&self.up, rows, most),
            gated: of(&self.gated, rows, most),
            low: of(&self.low, rows, most),
            logits: of(&self.logits, rows, most),
            parts: self.parts.part(rows, shape.keys, attention_dims(model)),
            scratch: of(&self.scratch, rows, most),
            drawn: Drawn {
                ids: self.drawn.part(drawn(0), rows),
                log_probs: self.drawn.part(drawn(1), rows),
                probabilities: self.drawn.part(drawn(2), rows),
            },
            seen: self
                .seen
                .as_ref()
                .map(|seen| seen.ids.part(first * seen.longest * size_of::<u32>(), rows * seen.longest)),
        }
    }

    /// Uploads inputs, and the contexts of rows from `first` on that have changed hands.
    fn upload(&mut self, inputs: &Inputs, live: &[Live], first: usize) -> Result<(), Problem> {
        self.inputs.part(0, inputs.bytes.len()).write(&inputs.bytes)?;
        let Some(seen) = &mut self.seen else { return Ok(()) };
        for row in first..first + inputs.shape.rows {
            let one = live.get(row - first);
            let owner = &mut seen.owners[row];
            if let Some(one) = one.filter(|one| *owner != Some(one.prompt)) {
                seen.ids.part(row * seen.longest * size_of::<u32>(), one.ids.len()).write(&one.ids)?;
            }
            *owner = one.map(|one| one.prompt);
        }
        Ok(())
    }

    /// What the first rows of `rows` drew.
    fn drawn(&self, rows: usize, live: usize) -> Result<Vec<Draw>, Problem> {
        let drawn = self.drawn.part::<u32>(0, 2 * rows).download()?;
        let (ids, log_probs) = drawn.split_at(rows);
        Ok((0..live).map(|row| (ids[row], f32::from_bits(log_probs[row]))).collect())
    }
}

impl<'m> DeviceDecoder<'m> {
    /// Room for at most `live` completions of at most `longest` tokens, prompts included; for fewer if the device has
    /// not the memory. No prompt has more than `prompt` tokens. `Err` (`cuda::out_of_memory`) if there is not enough
    /// for one.
    pub fn new(
        model: &'m Model,
        device: &'m DeviceModel,
        sampling: &Sampling,
        limits: &Limits,
        live: usize,
        longest: usize,
        prompt: usize,
    ) -> Result<DeviceDecoder<'m>, Problem> {
        let (gpu, config) = (device.gpu(), &model.config);
        let rule = Rule {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
            id_limit: sampling.id_limit,
        };
        let table = Table::upload(gpu, longest, config.head_dim, config.rope_theta)?;
        let work = Workspace::new(gpu, model, Shape::of(live, longest), longest, &rule)?;
        let decode = Decode::new(config, true, live, longest, prompt);
        let needed = Decode::pages(longest);
        let count = room(gpu, model, decode)?.min(limits.pages).min(live * needed);
        if count < needed {
            let (there, wanted) = (count * PAGE, needed * PAGE);
            let message =
                format!("there is room for {there} tokens of keys and values, and one completion may need {wanted}");
            return Err(Problem::new("cuda::out_of_memory", message)
                .exit(Exit::Missing)
                .help("lower `max_tokens`, or end what else uses the device: `nvidia-smi` lists it")
                .help("or run on the CPU: `--device cpu`"));
        }
        let len = (count + 1) * PAGE * config.key_size();
        let pool = || model.layers.iter().map(|_| gpu.alloc(len)).collect::<Result<Vec<_>, _>>();
        Ok(DeviceDecoder {
            model,
            device,
            rule,
            max_tokens: sampling.max_tokens,
            pages: Pages::new(count),
            spare: count as u32,
            keys: pool()?,
            values: pool()?,
            table,
            work,
            graphs: limits.graphs.then(HashMap::new),
            prefix: None,
        })
    }

    /// Whether the prompt need not be run.
    pub fn knows(&self, ids: &[u32]) -> bool {
        self.prefix.as_ref().is_some_and(|prefix| prefix.ids == ids)
    }

    /// The pages that a completion of a prompt of `len` tokens may need, if there are so many; `shared` if those that
    /// the prompt fills are there. The last token is drawn and never run.
    pub fn promise(&mut self, len: usize, shared: bool) -> Option<Held> {
        let all = (len + self.max_tokens - 1).div_ceil(PAGE);
        self.pages.promise(all - if shared { len / PAGE } else { 0 })
    }

    /// Takes back the pages of a completion that has ended.
    pub fn release(&mut self, held: &mut Held) {
        self.pages.release(held);
    }

    /// Runs the prompts `different`, and draws the first token of every completion of `new`, whose prompt is
    /// `different[same[i]]`; if there are no different ones it is the one that is known. They become the rows from
    /// `first` on. The prompt is kept if it is that of the `next` completion, which is still to come.
    pub fn prefill(
        &mut self,
        new: &mut [Live],
        different: &[&[u32]],
        same: &[usize],
        first: usize,
        next: Option<&[u32]>,
    ) -> Result<Vec<Draw>, Problem> {
        let logits = self.fill_pages(new, different, same)?;
        let shape = Shape { rows: new.len(), keys: SPAN };
        let mut inputs = Inputs::new(shape, self.spare);
        new.iter().enumerate().for_each(|(row, one)| inputs.row(row, one));
        self.work.upload(&inputs, new, first)?;
        let mut rows = self.work.rows(shape, first, self.model);
        let vocab = self.model.config.vocab_size;
        let which = |which: &[usize]| self.device.gpu().upload(&which.iter().map(|&i| i as u32).collect::<Vec<_>>());
        residual::gather_rows(&mut rows.logits, &logits, &which(same)?, vocab)?;
        draw(&self.rule, &mut rows)?;
        let drawn = self.work.drawn(shape.rows, new.len())?;

        if !next.is_some_and(|next| self.knows(next)) {
            self.forget();
            if let Some(at) = next.and_then(|next| different.iter().position(|ids| *ids == next)) {
                let mut row = self.device.gpu().alloc(vocab)?;
                residual::gather_rows(&mut row, &logits, &which(&[at])?, vocab)?;
                let ids = different[at].to_vec();
                let writer = same.iter().position(|which| *which == at).expect("every prompt is somebody's");
                let mut held = Held::default();
                self.pages.share(&mut held, new[writer].held.pages());
                self.prefix = Some(Prefix { ids, held, logits: row });
            }
        }
        Ok(drawn)
    }

    /// Gives the completions pages with the keys and values of their prompts. Returns the logits after each different
    /// one, or after the known one.
    fn fill_pages(&mut self, new: &mut [Live], different: &[&[u32]], same: &[usize]) -> Result<Buffer<bf16>, Problem> {
        let row_of = |pages: &[u32], token: usize| pages[token / PAGE] * PAGE as u32 + (token % PAGE) as u32;
        let known = if different.is_empty() { self.prefix.as_ref() } else { None };
        // Whose pages a prompt is written to, or was; copies of rows of the cache: from, to.
        let mut written: Vec<Option<Vec<u32>>> = match known {
            Some(prefix) => vec![Some(prefix.held.pages().to_vec())],
            None => vec![None; different.len()],
        };
        let (mut from, mut to): (Vec<u32>, Vec<u32>) = Default::default();
        for (one, &at) in new.iter_mut().zip(same) {
            let (tokens, whole) = (one.prompt_len, one.prompt_len / PAGE);
            if let Some(pages) = &written[at] {
                self.pages.share(&mut one.held, &pages[..whole]);
            }
            while one.held.pages().len() * PAGE < tokens {
                self.pages.take(&mut one.held);
            }
            match &written[at] {
                Some(pages) => {
                    from.extend((whole * PAGE..tokens).map(|token| row_of(pages, token)));
                    to.extend((whole * PAGE..tokens).map(|token| row_of(one.held.pages(), token)));
                }
                None => written[at] = Some(one.held.pages().to_vec()),
            }
        }

        let (device, width) = (self.device, self.model.config.key_size());
        let logits = match known {
            Some(prefix) => prefix.logits.part(0, prefix.logits.len()),
            None => {
                let owned = different.iter().zip(&written);
                let rows = owned.flat_map(|(ids, pages)| {
                    let pages = pages.as_deref().unwrap_or_default();
                    (0..ids.len()).map(move |token| row_of(pages, token))
                });
                let rows = device.gpu().upload(&rows.collect::<Vec<u32>>())?;
                let (keys, values) = (&mut self.keys, &mut self.values);
                device.run_prompts(self.model, different, &self.table, &mut |layer, k, v| {
                    residual::scatter_rows(&mut keys[layer], k, &rows, width)?;
                    residual::scatter_rows(&mut values[layer], v, &rows, width)
                })?
            }
        };
        if !from.is_empty() {
            let (from, to) = (device.gpu().upload(&from)?, device.gpu().upload(&to)?);
            let mut rows = device.gpu().alloc(from.len() * width)?;
            for cache in self.keys.iter_mut().chain(&mut self.values) {
                residual::gather_rows(&mut rows, cache, &from, width)?;
                residual::scatter_rows(cache, &rows, &to, width)?;
            }
        }
        Ok(logits)
    }

    /// One token further for all.
    pub fn step(&mut self, live: &mut [Live]) -> Result<Vec<Draw>, Problem> {
        for one in live.iter_mut() {
            while one.held.pages().len() * PAGE < one.ids.len() {
                self.pages.take(&mut one.held);
            }
        }
        let longest = live.iter().map(|one| one.ids.len()).max().unwrap_or(0);
        let shape = Shape::of(live.len(), longest);
        let mut inputs = Inputs::new(shape, self.spare);
        live.iter().enumerate().for_each(|(row, one)| inputs.row(row, one));
        self.work.upload(&inputs, live, 0)?;
        self.run(shape)?;
        self.work.drawn(shape.rows, live.len())
    }

    /// Launches a step: by itself the first time, when kernels may have to be loaded; captured the second time; from
    /// then on as a whole.
    fn run(&mut self, shape: Shape) -> Result<(), Problem> {
        let known = self.graphs.as_ref().and_then(|graphs| graphs.get(&shape));
        if let Some(Some(graph)) = known {
            return graph.launch();
        }
        let capture = known.is_some();
        let mut rows = self.work.rows(shape, 0, self.model);
        let graph = if capture {
            let gpu = self.device.gpu().clone();
            let graph = gpu.capture(|| self.launch(&mut rows))?;
            graph.launch()?;
            Some(graph)
        } else {
            self.launch(&mut rows)?;
            None
        };
        if let Some(graphs) = &mut self.graphs {
            graphs.insert(shape, graph);
        }
        Ok(())
    }

    fn launch(&mut self, rows: &mut StepRows) -> Result<(), Problem> {
        let (keys, values, dims) = (&mut self.keys, &mut self.values, attention_dims(self.model));
        self.device.run_tokens(self.model, rows, &self.table, &mut |layer, rows| {
            let (keys, values) = (&mut keys[layer], &mut values[layer]);
            let StepRows { q, k, v, attended, page_table, lengths, positions, parts, .. } = rows;
            attention_decode::append(keys, values, k, v, page_table, positions, dims)?;
            attention_decode::forward(attended, q, keys, values, page_table, lengths, parts, dims)
        })?;
        draw(&self.rule, rows)
    }

    /// Lets go of the prompt that is kept.
    fn forget(&mut self) {
        if let Some(mut prefix) = self.prefix.take() {
            self.pages.release(&mut prefix.held);
        }
    }

    /// Called when all completions have been released.
    pub fn end(mut self) {
        self.forget();
        assert!(self.pages.all_free(), "pages are lost: {:?}", self.pages);
    }
}

/// Draws a token from each row's logits.
fn draw(rule: &Rule, rows: &mut StepRows) -> Result<(), Problem> {
    let StepRows { drawn, scratch, logits, seen, lengths, streams, counters, .. } = rows;
    let seen = seen.as_mut().map(|ids| Seen { ids, lengths });
    sampling::next(drawn, scratch, Logits::Bf16(logits), seen, streams, counters, rule)
}

/// Pages that there is memory for, beside what it takes to run prompts and a sixteenth of the device, for graphs and
/// for whoever else has a little of it.
fn room(gpu: &Gpu, model: &Model, decode: Decode) -> Result<usize, Problem> {
    let config = &model.config;
    let (_, total) = gpu.driver().memory()?;
    let (dtype, trained, work) = (Dtype::Bf16, Trained::from(model), Work::Decode(decode));
    let prompts = Plan { config, dtype, trained, on_device: true, work }.working() as usize;
    let layer = gpu.room(2 * config.num_hidden_layers, total / 16 + prompts + prompts / 8)?;
    // One of them is the spare one.
    Ok((layer / (PAGE * config.key_size() * size_of::<bf16>())).saturating_sub(1))
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
            assert_eq!(Shape::of(3, longest), Shape { rows: 4, keys });
        }
    }
}
