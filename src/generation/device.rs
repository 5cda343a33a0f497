//! Decoding on a CUDA device: where keys and values lie, and one token further for all completions.
//!
//! The cache of each layer is a pool of pages of 16 tokens. Which of them hold what is the engine's business and changes
//! no bit.
//!
//! A step is a fixed sequence of launches over fixed buffers: what changes from one to the next is uploaded at once,
//! into `Workspace::inputs`, and the ids that are drawn come down. So a step is captured once and then launched as a
//! whole, once for each [`StepShape`]: completions and keys are rounded up to a few numbers, rows beyond the completions
//! write to a page of their own, and no row looks at another. How a row is drawn is among the inputs, so that requests
//! of all kinds go through the same launches.

use super::request::{Beginning, Draw, Limits, Live, Ticket};
use super::sampling::log_softmax;
use crate::cuda::ops::attention_decode::{self, Parts, SPAN};
use crate::cuda::ops::residual;
use crate::cuda::ops::rope::Table;
use crate::cuda::ops::sampling::{self, Drawn, Logits, Rule, Seen};
use crate::cuda::{Buffer, Gpu, Graph};
use crate::model::decoder::Decoder;
use crate::model::device::Cuda;
use crate::model::memory::{Decode, Plan, Trained, Work};
use crate::model::sizes::{DEVICE_PAGE as PAGE, KNOWN, Sections, StepShape};
use crate::model::step::StepRows;
use crate::problem::Problem;
use crate::tensor::Dtype;
use half::bf16;
use std::collections::HashMap;

/// Completions in the making on a device.
pub(super) struct DeviceDecoder<'m> {
    model: &'m Decoder<Cuda>,
    /// The page that rows without a completion write to, behind all others.
    spare: u32,
    /// `[pages, 16, KV, D]` of each layer.
    keys: Vec<Buffer<bf16>>,
    values: Vec<Buffer<bf16>>,
    table: Table,
    work: Workspace,
    /// What is known of each shape; absent if nothing is to be captured.
    graphs: Option<HashMap<StepShape, Option<Graph>>>,
    /// The logits after the prompts that are known, `[KNOWN, V]`.
    kept: Buffer<bf16>,
}

/// The buffers of steps of at most this many rows and keys. Smaller steps use the first part of each.
struct Workspace {
    most: StepShape,
    /// The sections that [`Inputs`] lists.
    inputs: Buffer<u8>,
    rows: StepRows<Cuda>,
    parts: Parts,
    scratch: Buffer<f32>,
    /// Ids, log-probs and probabilities, one after the other.
    drawn: Buffer<u32>,
    seen: Contexts,
}

/// The ids so far of every completion with a penalty.
struct Contexts {
    /// `[rows, longest]`.
    ids: Buffer<u32>,
    longest: usize,
    /// Whose each row is.
    owners: Vec<Option<Ticket>>,
}

/// What a step has beside [`StepRows`], [`StepShape::rows`] rows each.
struct Beside {
    ids: Buffer<u32>,
    positions: Buffer<u32>,
    /// How many keys each row attends to, its own included.
    lengths: Buffer<u32>,
    /// `[rows, pages]`.
    page_table: Buffer<u32>,
    rules: Buffer<Rule>,
    parts: Parts,
    scratch: Buffer<f32>,
    drawn: Drawn,
    /// `[rows, longest]`.
    seen: Buffer<u32>,
}

/// What a step is given, row by row. Uploaded in one piece: rules, ids, positions, lengths, page table.
struct Inputs {
    shape: StepShape,
    bytes: Vec<u8>,
}

impl Inputs {
    /// For rows without completions, which attend to nothing and write to `spare`, each to a place of its own.
    fn new(shape: StepShape, spare: u32) -> Inputs {
        let mut inputs = Inputs { shape, bytes: vec![0; shape.input_bytes()] };
        for row in 0..shape.rows {
            inputs.set(0, row, bytemuck::bytes_of(&Rule::GREEDY));
            inputs.set(Sections::POSITIONS, row, &((row % PAGE) as u32).to_le_bytes());
            inputs.set(Sections::PAGES, row * shape.pages(), &spare.to_le_bytes());
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
        let last = one.ids.len() as u32 - 1;
        self.set(0, row, bytemuck::bytes_of(&rule(one)));
        self.set(Sections::IDS, row, &one.ids[last as usize].to_le_bytes());
        self.set(Sections::POSITIONS, row, &last.to_le_bytes());
        self.set(Sections::LENGTHS, row, &(last + 1).to_le_bytes());
        let width = self.shape.pages();
        for (entry, page) in one.held.pages().iter().take(width).enumerate() {
            self.set(Sections::PAGES, row * width + entry, &page.to_le_bytes());
        }
    }
}

/// How the next token is drawn.
fn rule(one: &Live) -> Rule {
    let sampling = &one.sampling;
    // Beyond the vocabulary they cut nothing, whatever their size.
    let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Rule {
        seed: sampling.seed,
        stream: one.stream,
        counter: one.counter(),
        top_p: sampling.top_p,
        temperature: sampling.temperature as f32,
        repetition_penalty: sampling.repetition_penalty as f32,
        top_k: count(sampling.top_k),
        id_limit: count(sampling.id_limit),
    }
}

impl Workspace {
    fn new(gpu: &Gpu, model: &Decoder<Cuda>, most: StepShape, longest: usize) -> Result<Workspace, Problem> {
        let (rows, vocab) = (most.rows, model.config.vocab_size);
        Ok(Workspace {
            most,
            inputs: gpu.alloc(most.input_bytes())?,
            rows: StepRows::new(model, rows)?,
            parts: Parts::new(gpu, rows, most.keys, model.config.heads().on_device())?,
            scratch: gpu.alloc(rows * vocab)?,
            drawn: gpu.alloc(rows * 3)?,
            seen: Contexts { ids: gpu.alloc(rows * longest)?, longest, owners: vec![None; rows] },
        })
    }

    /// The buffers of a step. The contexts are those from row `first` on.
    fn of(&self, shape: StepShape, first: usize, model: &Decoder<Cuda>) -> (StepRows<Cuda>, Beside) {
        let (rows, most) = (shape.rows, self.most.rows);
        let numbers = |before: usize| self.inputs.part(rows * before, rows);
        let drawn = |which: usize| which * rows * size_of::<u32>();
        /// The same number of elements of each row.
        fn of<T: bytemuck::Pod>(buffer: &Buffer<T>, rows: usize, most: usize) -> Buffer<T> {
            buffer.part(0, buffer.len() / most * rows)
        }
        let all = &self.rows;
        let step = StepRows {
            x: of(&all.x, rows, most),
            norm: of(&all.norm, rows, most),
            rstd: of(&all.rstd, rows, most),
            q: of(&all.q, rows, most),
            k: of(&all.k, rows, most),
            v: of(&all.v, rows, most),
            attended: of(&all.attended, rows, most),
            gate: of(&all.gate, rows, most),
            up: of(&all.up, rows, most),
            gated: of(&all.gated, rows, most),
            low: all.low.as_ref().map(|low| of(low, rows, most)),
            logits: of(&all.logits, rows, most),
        };
        let beside = Beside {
            ids: numbers(Sections::IDS),
            positions: numbers(Sections::POSITIONS),
            lengths: numbers(Sections::LENGTHS),
            page_table: self.inputs.part(rows * Sections::PAGES, rows * shape.pages()),
            rules: self.inputs.part(0, rows),
            parts: self.parts.part(rows, shape.keys, model.config.heads().on_device()),
            scratch: of(&self.scratch, rows, most),
            drawn: Drawn {
                ids: self.drawn.part(drawn(0), rows),
                log_probs: self.drawn.part(drawn(1), rows),
                probabilities: self.drawn.part(drawn(2), rows),
            },
            seen: self.seen.ids.part(first * self.seen.longest * size_of::<u32>(), rows * self.seen.longest),
        };
        (step, beside)
    }

    /// Uploads inputs, and the contexts of rows with a penalty, from row `first` on, that have changed hands.
    fn upload(&mut self, inputs: &Inputs, live: &[Live], first: usize) -> Result<(), Problem> {
        self.inputs.part(0, inputs.bytes.len()).write(&inputs.bytes)?;
        let Contexts { ids, longest, owners } = &mut self.seen;
        for (row, owner) in owners.iter_mut().enumerate().skip(first).take(inputs.shape.rows) {
            let one = live.get(row - first).filter(|one| one.sampling.repetition_penalty as f32 != 1.0);
            if let Some(one) = one.filter(|one| *owner != Some(one.ticket)) {
                ids.part(row * *longest * size_of::<u32>(), one.ids.len()).write(&one.ids)?;
            }
            *owner = one.map(|one| one.ticket);
        }
        Ok(())
    }

    /// What the first rows of `rows` drew.
    fn drawn(&self, rows: usize, live: &[Live]) -> Result<Vec<Draw>, Problem> {
        let drawn = self.drawn.part::<u32>(0, 2 * rows).download()?;
        let (ids, log_probs) = drawn.split_at(rows);
        let draw = |(row, one): (usize, &Live)| {
            let (id, logprob) = (ids[row], f32::from_bits(log_probs[row]));
            let top = if one.top_logprobs > 0 { self.likeliest(row, one, (id, logprob))? } else { Vec::new() };
            Ok(Draw { id, logprob, top })
        };
        live.iter().enumerate().map(draw).collect()
    }

    /// The likeliest ids of a row. What is known of the one that was drawn is not said in two ways.
    fn likeliest(&self, row: usize, one: &Live, drawn: (u32, f32)) -> Result<Vec<(u32, f32)>, Problem> {
        let all = &self.rows.logits;
        let vocab = all.len() / self.most.rows;
        let logits = all.part::<bf16>(row * vocab * size_of::<bf16>(), vocab).download()?;
        let logits: Vec<f32> = logits.into_iter().map(bf16::to_f32).collect();
        let top = one.sampling.likeliest(&logits, one.top_logprobs);
        let log_p = log_softmax(&logits);
        Ok(top.into_iter().map(|(id, logit)| if id == drawn.0 { drawn } else { (id, log_p(logit)) }).collect())
    }
}

impl<'m> DeviceDecoder<'m> {
    /// Room for at most `live` completions of at most `longest` tokens, prompts included, with as many pages as there
    /// are limits and memory for. No prompt has more than `prompt` tokens.
    pub fn new(
        model: &'m Decoder<Cuda>,
        limits: &Limits,
        live: usize,
        longest: usize,
        prompt: usize,
    ) -> Result<DeviceDecoder<'m>, Problem> {
        let (gpu, config) = (model.gpu(), &model.config);
        let table = Table::upload(gpu, longest, config.head_dim, config.rope_theta)?;
        let work = Workspace::new(gpu, model, StepShape::of(live, longest), longest)?;
        let kept = gpu.alloc(KNOWN * config.vocab_size)?;
        let decode = Decode::new(config, true, live, longest, prompt);
        let count = room(gpu, model, decode)?.min(limits.pages).min(live.saturating_mul(Decode::pages(longest)));
        let len = (count + 1) * PAGE * config.key_size();
        let pool = || (0..config.num_hidden_layers).map(|_| gpu.alloc(len)).collect::<Result<Vec<_>, _>>();
        let graphs = limits.graphs.then(HashMap::new);
        Ok(DeviceDecoder { model, spare: count as u32, keys: pool()?, values: pool()?, table, work, graphs, kept })
    }

    /// How many pages there are for completions.
    pub fn pages(&self) -> usize {
        self.spare as usize
    }

    /// Runs prompts and draws the first token of each of `new`, which become the rows from `first` on.
    pub fn begin(&mut self, new: &[Live], first: usize, beginning: &Beginning) -> Result<Vec<Draw>, Problem> {
        let (gpu, vocab) = (self.model.gpu().clone(), self.model.config.vocab_size);
        let which = |which: &[usize]| gpu.upload(&which.iter().map(|&i| i as u32).collect::<Vec<_>>());
        let fresh = match beginning.runs.is_empty() {
            true => None,
            false => Some(self.run_prompts(&beginning.runs.iter().map(|&run| &new[run]).collect::<Vec<_>>())?),
        };
        self.copy(&beginning.from, &beginning.to)?;
        if let Some(fresh) = &fresh {
            let keep = beginning.keep.len();
            let last = fresh.part(fresh.len() * size_of::<bf16>() - keep * vocab * size_of::<bf16>(), keep * vocab);
            residual::scatter_rows(&mut self.kept, &last, &which(&beginning.keep)?, vocab)?;
        }
        let shape = StepShape { rows: new.len(), keys: SPAN };
        let mut inputs = Inputs::new(shape, self.spare);
        new.iter().enumerate().for_each(|(row, one)| inputs.row(row, one));
        self.work.upload(&inputs, new, first)?;
        let (mut rows, mut beside) = self.work.of(shape, first, self.model);
        let logits = fresh.as_ref().unwrap_or(&self.kept);
        residual::gather_rows(&mut rows.logits, logits, &which(&beginning.prompt)?, vocab)?;
        draw(&rows, &mut beside)?;
        self.work.drawn(shape.rows, new)
    }

    /// Writes keys and values of whole prompts. Returns the logits after each.
    fn run_prompts(&mut self, prompts: &[&Live]) -> Result<Buffer<bf16>, Problem> {
        let width = self.model.config.key_size();
        let row = |one: &Live, token: usize| one.held.pages()[token / PAGE] * PAGE as u32 + (token % PAGE) as u32;
        let rows = prompts.iter().flat_map(|one| (0..one.prompt_len).map(move |token| row(one, token)));
        let rows = self.model.gpu().upload(&rows.collect::<Vec<u32>>())?;
        let (keys, values) = (&mut self.keys, &mut self.values);
        let ids: Vec<&[u32]> = prompts.iter().map(|one| one.prompt()).collect();
        self.model.run_prompts(&ids, self.table.share(), &mut |layer, k, v| {
            residual::scatter_rows(&mut keys[layer], k, &rows, width)?;
            residual::scatter_rows(&mut values[layer], v, &rows, width)
        })
    }

    /// Copies rows of the cache of every layer.
    fn copy(&mut self, from: &[u32], to: &[u32]) -> Result<(), Problem> {
        if from.is_empty() {
            return Ok(());
        }
        let (gpu, width) = (self.model.gpu(), self.model.config.key_size());
        let (from, to) = (gpu.upload(from)?, gpu.upload(to)?);
        let mut rows = gpu.alloc(from.len() * width)?;
        for cache in self.keys.iter_mut().chain(&mut self.values) {
            residual::gather_rows(&mut rows, cache, &from, width)?;
            residual::scatter_rows(cache, &rows, &to, width)?;
        }
        Ok(())
    }

    /// One token further for all.
    pub fn step(&mut self, live: &[Live]) -> Result<Vec<Draw>, Problem> {
        let longest = live.iter().map(|one| one.ids.len()).max().unwrap_or(0);
        let shape = StepShape::of(live.len(), longest);
        let mut inputs = Inputs::new(shape, self.spare);
        live.iter().enumerate().for_each(|(row, one)| inputs.row(row, one));
        self.work.upload(&inputs, live, 0)?;
        self.run(shape)?;
        self.work.drawn(shape.rows, live)
    }

    /// Launches a step: by itself the first time, when kernels may have to be loaded; captured the second time; from
    /// then on as a whole.
    fn run(&mut self, shape: StepShape) -> Result<(), Problem> {
        let known = self.graphs.as_ref().and_then(|graphs| graphs.get(&shape));
        if let Some(Some(graph)) = known {
            return graph.launch();
        }
        let capture = known.is_some();
        let (mut rows, mut beside) = self.work.of(shape, 0, self.model);
        let graph = if capture {
            let gpu = self.model.gpu().clone();
            let graph = gpu.capture(|| self.launch(&mut rows, &mut beside))?;
            graph.launch()?;
            Some(graph)
        } else {
            self.launch(&mut rows, &mut beside)?;
            None
        };
        if let Some(graphs) = &mut self.graphs {
            graphs.insert(shape, graph);
        }
        Ok(())
    }

    fn launch(&mut self, rows: &mut StepRows<Cuda>, beside: &mut Beside) -> Result<(), Problem> {
        let (keys, values, dims) = (&mut self.keys, &mut self.values, self.model.config.heads().on_device());
        let Beside { ids, positions, lengths, page_table, parts, .. } = beside;
        self.model.run_tokens(rows, ids, positions, &self.table, &mut |layer, rows| {
            let (keys, values) = (&mut keys[layer], &mut values[layer]);
            let StepRows { q, k, v, attended, .. } = rows;
            attention_decode::append(keys, values, k, v, page_table, positions, dims)?;
            attention_decode::forward(attended, q, keys, values, page_table, lengths, parts, dims)
        })?;
        draw(rows, beside)
    }
}

/// Draws a token from each row's logits.
fn draw(rows: &StepRows<Cuda>, beside: &mut Beside) -> Result<(), Problem> {
    let Beside { drawn, scratch, seen: ids, lengths, rules, .. } = beside;
    sampling::next(drawn, scratch, Logits::Bf16(&rows.logits), Seen { ids, lengths }, rules)
}

/// Pages that there is memory for, beside what it takes to run prompts and a sixteenth of the device, for graphs and
/// for whoever else has a little of it.
fn room(gpu: &Gpu, model: &Decoder<Cuda>, decode: Decode) -> Result<usize, Problem> {
    let config = &model.config;
    let (_, total) = gpu.driver().memory()?;
    let (dtype, trained, work) = (Dtype::Bf16, Trained::from(model), Work::Decode(decode));
    let prompts = Plan { config, dtype, trained, on_device: true, work }.working() as usize;
    let layer = gpu.room(2 * config.num_hidden_layers, total / 16 + prompts + prompts / 8)?;
    // One of them is the spare one.
    Ok((layer / (PAGE * config.key_size() * size_of::<bf16>())).saturating_sub(1))
}
