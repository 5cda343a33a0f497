//! How much memory a model takes while it is trained, measured or sampled from, worked out beforehand.
//!
//! What is counted are the buffers of the code as it stands: `qwen2.rs` and `host_decode.rs` on the host, `device.rs`,
//! `device_decode.rs` and the optimizers of `cuda::ops` on a device. Some of them are there all the time
//! ([`Plan::standing`]), the others at some moments of the work ([`Plan::moments`]); the need is that of the moment
//! that takes most. On a device each buffer is rounded up to its block. Tests hold the sums to what the emulated
//! device and an allocator count.
//!
//! Symbols: T tokens of a micro-batch, R rows that predict a learned token, H hidden, I intermediate, Q width of
//! the queries, K of the keys, h heads, V vocabulary, r rank, L layers, n trained layers, m those of them that keep
//! their insides, e bytes of an element (4 on the host, 2 on a device). Bytes are:
//!
//! | part | the host computes | a device computes: there | and on the host |
//! | --- | --- | --- | --- |
//! | weights | matrices as packed, the rest f32 | frozen: bf16 matrices, the rest f32 | as without |
//! | trained values | f32 | f32, and bf16 copies of matrices | f32 |
//! | gradients | f32 | f32, all the time | none |
//! | optimizer states | as the optimizer says | the same, and tables | twice, while a state is saved |
//! | kept activations | n T H e + m `saved` | the same; with `offload` 2 inputs in place of n | the n inputs |
//! | one layer's work | input, output, gradients, `saved` | the same | none |
//! | head | R (2 H + 3) e, a tile of logits | the same, parts of sums | none |
//! | keys and values | L 2 K e of every token, in pages of 64 | pages of 16 tokens | none |
//! | small uploads | none | none | a ring of 4 MiB |
//!
//! `saved` = T (3 H + 2 Q + 2 K + 3 I + 7 r) e + T (2 + h) 4. On a device decoding also has a workspace for the most
//! completions at once (under `one layer's work` and `head`), and it takes as many pages as there is memory for:
//! [`Decode::ends`] says for how many completions at their longest they are to be counted. It cannot do with fewer
//! than for one.
//!
//! What is not counted: the program itself, scratch of products (a few MiB a thread), the tokens of the data, what a
//! driver takes for its context and for graphs (decoding leaves a sixteenth of a device to that), and blocks of other
//! sizes that a pool keeps (on a device they go back when they are wanted; those of `offload` stay with the host).
//! Kernels for wgmma have no buffers of their own.

use super::config::Config;
use super::device_decode::Shape;
use super::engine::{KNOWN, MOST_LIVE, pages_of, prompts_together};
use super::host_decode;
use super::lora::{self, LoraSpec};
use super::qwen2::{Batch, Model};
use crate::cuda;
use crate::problem::Problem;
use crate::tensor::Dtype;
use std::fmt;

/// What takes memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Weights,
    Trained,
    Gradients,
    Optimizer,
    Activations,
    Layer,
    Head,
    Cache,
    Reading,
    Uploads,
}

/// All parts, in the order of tables.
pub const PARTS: [Part; 10] = [
    Part::Weights,
    Part::Trained,
    Part::Gradients,
    Part::Optimizer,
    Part::Activations,
    Part::Layer,
    Part::Head,
    Part::Cache,
    Part::Reading,
    Part::Uploads,
];

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Weights => "weights",
            Part::Trained => "trained values",
            Part::Gradients => "gradients",
            Part::Optimizer => "optimizer states",
            Part::Activations => "kept activations",
            Part::Layer => "one layer's work",
            Part::Head => "head",
            Part::Cache => "keys and values",
            Part::Reading => "a tensor on its way",
            Part::Uploads => "small uploads",
        })
    }
}

/// What is trained or, of a model that is only used, what is active.
#[derive(Debug, Clone, Copy)]
pub enum Trained<'a> {
    Nothing,
    Adapter(&'a LoraSpec),
    Everything,
}

impl<'a> From<&'a Model> for Trained<'a> {
    fn from(model: &'a Model) -> Trained<'a> {
        match model.lora() {
            Some(spec) => Trained::Adapter(spec),
            None if model.trains_everything() => Trained::Everything,
            None => Trained::Nothing,
        }
    }
}

/// The largest micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub tokens: usize,
    /// Those that predict a learned token.
    pub rows: usize,
    pub sequences: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

impl Extent {
    /// Of `tokens` tokens in sequences of at most `longest`, all of them learned.
    pub fn full(tokens: usize, longest: usize) -> Extent {
        let longest = longest.clamp(1, tokens.max(1));
        Extent { tokens, rows: tokens, sequences: tokens.div_ceil(longest), longest }
    }

    pub fn of(batch: &Batch) -> Extent {
        Extent {
            tokens: batch.ids.len(),
            rows: batch.rows.len(),
            sequences: batch.lengths.len(),
            longest: batch.lengths.iter().copied().max().unwrap_or(0),
        }
    }
}

/// What is done with the model.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    Train {
        extent: Extent,
        /// So many trained layers, from the last on, keep their insides, the others their input only.
        kept: usize,
        /// Whether inputs of layers leave a device for the host.
        offload: bool,
        /// Bytes of each state that the optimizer has for a tensor of so many values.
        state_sizes: &'a dyn Fn(usize) -> Vec<usize>,
    },
    /// Log-probs, and of one sequence at a time all logits or all hidden states.
    Measure {
        extent: Extent,
        logits: bool,
        hidden_states: bool,
    },
    Decode(Decode),
}

/// Completions in the making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// At once.
    pub live: usize,
    /// Tokens of the longest, with its prompt, and of its prompt.
    pub longest: usize,
    pub prompt: usize,
    /// On a device there are pages for so many at their longest. It takes what it finds, up to `live`.
    pub ends: usize,
}

impl Decode {
    /// Of `completions` completions, as many at once as decoding takes, with the fewest pages.
    pub fn new(config: &Config, on_device: bool, completions: usize, longest: usize, prompt: usize) -> Decode {
        let most = if on_device { MOST_LIVE } else { host_decode::most_live(config) };
        Decode { live: completions.min(most).max(1), longest, prompt, ends: 1 }
    }

    /// Pages that a device must have for a completion of so many tokens. Prompts that are kept give theirs up for it.
    pub(super) fn pages(longest: usize) -> usize {
        pages_of(longest, cuda::ops::attention_decode::PAGE)
    }
}

/// A model and what is to be done with it.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    pub config: &'a Config,
    /// Storage of the frozen matrices on the host.
    pub dtype: Dtype,
    pub trained: Trained<'a>,
    /// Whether a CUDA device computes.
    pub on_device: bool,
    pub work: Work<'a>,
}

/// Bytes of one part, each at the moment when its place holds most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    pub part: Part,
    pub host: u64,
    pub device: u64,
}

/// What is needed. The lines of a column add up to its peak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    pub lines: Vec<Line>,
    pub host: u64,
    pub device: u64,
}

impl Need {
    /// Bytes of a part: host, device.
    pub fn of(&self, part: Part) -> (u64, u64) {
        self.lines.iter().find(|line| line.part == part).map_or((0, 0), |line| (line.host, line.device))
    }
}

impl Need {
    /// A line for each part and one for their sum, a column for each place that is needed, the largest part marked.
    ///
    /// ```text
    /// weights            1.8 GiB host   988 MiB device
    /// kept activations         - host   2.1 GiB device  <- the largest part
    /// together           1.8 GiB host   3.1 GiB device
    /// ```
    pub fn table(&self) -> String {
        let on_device = self.device > 0;
        let weight = |line: &Line| if on_device { line.device } else { line.host };
        let most = self.lines.iter().map(weight).max().unwrap_or(0);
        let row = |name: &str, host: u64, device: u64| {
            let cell = |value: u64| if value == 0 { "-".to_string() } else { bytes(value) };
            let device = if on_device { format!("  {:>8} device", cell(device)) } else { String::new() };
            let host = if on_device { format!("{:>8} host", cell(host)) } else { format!("{:>8}", cell(host)) };
            format!("{name:16}  {host}{device}")
        };
        let mut text = String::new();
        for line in &self.lines {
            text += &row(&line.part.to_string(), line.host, line.device);
            text += if weight(line) == most { "  <- the largest part\n" } else { "\n" };
        }
        text + &row("together", self.host, self.device)
    }
}

/// `Err` (`cuda::head_dim`, exit 3) if no kernel of a device takes a model of this shape.
pub fn kernels_fit(config: &Config) -> Result<(), Problem> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    cuda::ops::attention::Dims { heads, kv_heads, head_dim: config.head_dim }.check()
}

/// `812 MiB`, `3.4 GiB`.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match value < 10.0 && unit != "B" {
                true => format!("{value:.1} {unit}"),
                false => format!("{value:.0} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// What is there at once: bytes of parts, in any order.
type Parts = Vec<(Part, u128)>;

/// Memory of one kind: how large an element of an activation is, and a buffer.
#[derive(Clone, Copy)]
struct Place {
    device: bool,
    element: u128,
}

const HOST: Place = Place { device: false, element: 4 };
const DEVICE: Place = Place { device: true, element: 2 };

impl Place {
    /// One buffer of `count` values of `size` bytes.
    fn buffer(self, count: u128, size: u128) -> u128 {
        let bytes = count * size;
        match usize::try_from(bytes) {
            Ok(bytes) if self.device && bytes < 1 << 60 => cuda::block_bytes(bytes) as u128,
            _ => bytes,
        }
    }

    /// One buffer of activations.
    fn values(self, count: u128) -> u128 {
        self.buffer(count, self.element)
    }

    fn floats(self, count: u128) -> u128 {
        self.buffer(count, 4)
    }
}

impl Plan<'_> {
    pub fn need(&self) -> Need {
        let host = self.largest(HOST);
        let device = if self.on_device { self.largest(DEVICE) } else { Vec::new() };
        let of = |parts: &[(Part, u128)], part: Part| {
            let sum: u128 = parts.iter().filter(|(which, _)| *which == part).map(|(_, bytes)| bytes).sum();
            u64::try_from(sum).unwrap_or(u64::MAX)
        };
        let lines: Vec<Line> = PARTS
            .iter()
            .map(|&part| Line { part, host: of(&host, part), device: of(&device, part) })
            .filter(|line| line.host > 0 || line.device > 0)
            .collect();
        let sum = |of: fn(&Line) -> u64| lines.iter().map(of).fold(0u64, u64::saturating_add);
        Need { host: sum(|line| line.host), device: sum(|line| line.device), lines }
    }

    /// What the work takes for a while where it is done, beside what is there all the time.
    pub fn working(&self) -> u64 {
        let place = if self.on_device { DEVICE } else { HOST };
        let sums = self.work(place).into_iter().map(|parts| parts.iter().map(|(_, bytes)| bytes).sum::<u128>());
        u64::try_from(sums.max().unwrap_or(0)).unwrap_or(u64::MAX)
    }

    /// Everything that is there at the moment that takes most of `place`.
    fn largest(&self, place: Place) -> Parts {
        let all = self.moments(place).into_iter().map(|parts| [self.standing(place), parts].concat());
        all.max_by_key(|parts| parts.iter().map(|(_, bytes)| bytes).sum::<u128>()).unwrap_or_default()
    }

    /// Whether only what the device's work leaves to the host is looked at.
    fn beside(&self, place: Place) -> bool {
        self.on_device && !place.device
    }

    /// What is there all along: a line for each term and the place it lies at.
    fn standing(&self, place: Place) -> Parts {
        let matrices = |of: &dyn Fn(u128) -> u128| self.trained_matrices().into_iter().map(of).sum::<u128>();
        let vectors = |of: &dyn Fn(u128) -> u128| self.trained_vectors().into_iter().map(of).sum::<u128>();
        let floats = |values: u128| place.floats(values);
        let all = matrices(&floats) + vectors(&floats);
        let mut parts = vec![];
        if place.device {
            parts.push((Part::Weights, self.device_weights()));
            parts.push((Part::Trained, all + matrices(&|values| place.values(values))));
        } else {
            parts.push((Part::Weights, self.host_weights()));
            parts.push((Part::Trained, all));
            parts.push((Part::Uploads, if self.on_device { cuda::STAGING_BYTES as u128 } else { 0 }));
        }
        match self.work {
            Work::Train { extent, offload, .. } if self.beside(place) => {
                let parked = if offload { self.trained_layers() } else { 0 };
                parts.push((Part::Activations, parked * self.residual(DEVICE, extent.tokens as u128)));
            }
            Work::Train { .. } => {
                parts.push((Part::Gradients, all));
                parts.push((Part::Optimizer, self.states(place)));
                parts.push((Part::Optimizer, if place.device { self.optimizer_tables() } else { 0 }));
            }
            Work::Decode(decode) if place.device => parts.extend(self.decoder(decode)),
            Work::Measure { .. } | Work::Decode(_) => {}
        }
        parts
    }

    /// The states of an optimizer, each in a buffer of its own.
    fn states(&self, place: Place) -> u128 {
        let Work::Train { state_sizes, .. } = self.work else { return 0 };
        let of = |values: u128| {
            let sizes = state_sizes(usize::try_from(values).unwrap_or(usize::MAX));
            sizes.into_iter().map(|bytes| place.buffer(bytes as u128, 1)).sum::<u128>()
        };
        self.trained_tensors().into_iter().map(of).sum()
    }

    /// What the device's optimizer and the norm of gradients have beside states: tensors in pieces, each with a sum,
    /// tables of their addresses, and what a byte of an 8-bit state means.
    fn optimizer_tables(&self) -> u128 {
        let tensors = self.trained_tensors();
        let pieces = tensors.iter().map(|values| values.div_ceil(cuda::ops::grad_norm::PIECE as u128)).sum::<u128>();
        let rows = tensors.len() as u128;
        3 * DEVICE.buffer(pieces, 8) + DEVICE.buffer(rows, 72) + DEVICE.buffer(rows, 16) + 2 * DEVICE.floats(256)
    }

    /// How many values are trained.
    pub fn trained_values(&self) -> u64 {
        self.sum_of(&|values| values)
    }

    /// The sum over the trained tensors of a function of their sizes.
    pub fn sum_of(&self, of: &dyn Fn(usize) -> usize) -> u64 {
        let size = |values: u128| of(usize::try_from(values).unwrap_or(usize::MAX)) as u64;
        self.trained_tensors().into_iter().map(size).fold(0, u64::saturating_add)
    }

    /// Values of each trained tensor.
    fn trained_tensors(&self) -> Vec<u128> {
        [self.trained_matrices(), self.trained_vectors()].concat()
    }

    fn trained_vectors(&self) -> Vec<u128> {
        if let Trained::Everything = self.trained { self.vectors() } else { Vec::new() }
    }

    fn trained_matrices(&self) -> Vec<u128> {
        match self.trained {
            Trained::Nothing => Vec::new(),
            Trained::Adapter(spec) => {
                let linears = lora::linears(self.config);
                let adapted = linears.iter().filter(|(_, target, _)| spec.targets.iter().any(|t| t == target));
                adapted
                    .flat_map(|(_, _, [out, input])| [*input, *out])
                    .map(|side| side as u128 * spec.rank as u128)
                    .collect()
            }
            Trained::Everything => self.matrices().into_iter().map(|[n, k]| n * k).collect(),
        }
    }

    /// `[out, in]` of every matrix there is: the embedding, seven linears a layer, a head of its own.
    fn matrices(&self) -> Vec<[u128; 2]> {
        let config = self.config;
        let head = !self.tied();
        let wide = |shape: [usize; 2]| shape.map(|side| side as u128);
        let linears = lora::linears(config).into_iter().filter(|(_, target, _)| *target != "lm_head" || head);
        std::iter::once(wide([config.vocab_size, config.hidden_size]))
            .chain(linears.map(|(_, _, shape)| wide(shape)))
            .collect()
    }

    /// Norms and biases.
    fn vectors(&self) -> Vec<u128> {
        let config = self.config;
        let (h, q, k) = (config.hidden_size as u128, config.query_size() as u128, config.key_size() as u128);
        let layers = (0..config.num_hidden_layers).flat_map(|_| [h, h, q, k, k]);
        layers.chain([h]).collect()
    }

    fn tied(&self) -> bool {
        self.config.tie_word_embeddings
    }

    /// Matrices in panels of 32 outputs, pairs of inputs in bf16; see `tensor::Matrix`.
    fn host_weights(&self) -> u128 {
        let steps = |k: u128| if self.dtype == Dtype::Bf16 { k.div_ceil(2) } else { k };
        let matrices: u128 = self.matrices().into_iter().map(|[n, k]| n.next_multiple_of(32) * steps(k) * 4).sum();
        matrices + self.vectors().iter().map(|len| len * 4).sum::<u128>()
    }

    /// Those that are not trained.
    fn device_weights(&self) -> u128 {
        if let Trained::Everything = self.trained {
            return 0;
        }
        let matrices: u128 = self.matrices().into_iter().map(|[n, k]| DEVICE.values(n * k)).sum();
        matrices + self.vectors().into_iter().map(|len| DEVICE.floats(len)).sum::<u128>()
    }

    /// The rank of the adapter on a target; 0 without.
    fn rank(&self, target: &str) -> u128 {
        match self.trained {
            Trained::Adapter(spec) if spec.targets.iter().any(|there| there == target) => spec.rank as u128,
            _ => 0,
        }
    }

    /// Layers that are walked back through.
    fn trained_layers(&self) -> u128 {
        let any = match self.trained {
            Trained::Nothing => false,
            Trained::Adapter(_) => lora::TARGETS[..7].iter().any(|target| self.rank(target) > 0),
            Trained::Everything => true,
        };
        if any { self.config.num_hidden_layers as u128 } else { 0 }
    }

    /// Of the work, and of what comes before and after it.
    fn moments(&self, place: Place) -> Vec<Parts> {
        let mut moments = self.work(place);
        moments.push(vec![(Part::Reading, self.reading(place))]);
        if self.beside(place) {
            // A state on its way to a file or from one: as it comes from the device, and as the host has it. It is
            // no less than gradients that are to be kept.
            moments.push(vec![(Part::Optimizer, 2 * self.states(HOST))]);
        }
        moments
    }

    fn work(&self, place: Place) -> Vec<Parts> {
        match self.work {
            Work::Train { extent, kept, offload, .. } => self.step(place, extent, kept, offload),
            Work::Measure { extent, logits, hidden_states } => self.measuring(place, extent, logits, hidden_states),
            Work::Decode(decode) if place.device => self.prompts_on_device(decode),
            Work::Decode(decode) => self.decoding(place, decode),
        }
    }

    /// The largest tensor between its file and its place: the embedding, as a plain copy on the host; for a device
    /// it is unpacked and rounded there. Where everything is trained, that is more than one more copy.
    fn reading(&self, place: Place) -> u128 {
        if place.device || matches!(self.trained, Trained::Everything) {
            return 0;
        }
        let largest = self.matrices().into_iter().map(|[n, k]| n * k).max().unwrap_or(0);
        largest * if self.on_device { 6 } else { 4 }
    }

    /// The moments of log-probs that keep nothing, and of one sequence after another.
    fn measuring(&self, place: Place, extent: Extent, logits: bool, hidden_states: bool) -> Vec<Parts> {
        let (t, rows, longest) = (extent.tokens as u128, extent.rows as u128, extent.longest as u128);
        let mut moments = Vec::new();
        if !self.beside(place) {
            let sequences = self.sequences(place, extent);
            moments.push(vec![(Part::Layer, sequences + self.forward(place, t))]);
            let head = self.kept_rows(place, rows) + self.head_forth(place, rows);
            moments.push(vec![(Part::Layer, sequences + self.residual(place, t)), (Part::Head, head)]);
        }
        let x = self.residual(place, longest);
        let tile = longest.min(LOGIT_ROWS);
        if logits && place.device {
            // Angles stay where they are for the next.
            let x = x + self.angles(place, extent.longest);
            moments.push(vec![(Part::Layer, x), (Part::Head, self.logits_on_device(tile))]);
        } else if logits {
            let all = longest * self.config.vocab_size as u128 * 4;
            let tile = tile * self.config.vocab_size as u128 * 2;
            moments.push(vec![(Part::Head, all + if self.on_device { tile } else { 2 * x })]);
        }
        if hidden_states && !place.device {
            // The states, and again in one piece.
            let states = 2 * (self.config.num_hidden_layers as u128 + 2) * x;
            moments.push(vec![(Part::Activations, states), (Part::Layer, x)]);
        }
        moments
    }

    /// Logits of some rows of a stream, and what they are made of.
    fn logits_on_device(&self, rows: u128) -> u128 {
        let made_of = 2 * DEVICE.floats(rows) + 2 * self.residual(DEVICE, rows);
        let low = match self.rank("lm_head") {
            0 => 0,
            rank => DEVICE.values(rows * rank),
        };
        made_of + low + DEVICE.values(rows * self.config.vocab_size as u128)
    }

    /// `[T, H]`
    fn residual(&self, place: Place, tokens: u128) -> u128 {
        place.values(tokens * self.config.hidden_size as u128)
    }

    /// Where sequences begin, positions, and the angles of them.
    fn sequences(&self, place: Place, extent: Extent) -> u128 {
        self.starts(place, extent.sequences as u128, extent.tokens as u128) + self.angles(place, extent.longest)
    }

    fn starts(&self, place: Place, sequences: u128, tokens: u128) -> u128 {
        let starts = sequences + 1;
        let starts = if place.device { place.floats(starts) } else { starts * 8 };
        starts + place.floats(tokens)
    }

    fn angles(&self, place: Place, positions: usize) -> u128 {
        2 * place.floats(positions as u128 * (self.config.head_dim as u128 / 2))
    }

    /// The insides of one layer that its way back needs: `Saved`.
    fn saved(&self, place: Place, t: u128) -> u128 {
        let Sizes { h, q, k, i, heads, .. } = self.sizes();
        let values = [h, q, k, k, q, h, h, i, i, i].into_iter().map(|width| place.values(t * width)).sum::<u128>();
        let low = lora::TARGETS[..7].iter().map(|target| self.rank(target)).filter(|rank| *rank > 0);
        values + low.map(|rank| place.values(t * rank)).sum::<u128>() + 2 * place.floats(t) + place.floats(t * heads)
    }

    /// A layer on the way there: its input, its insides and its output.
    fn forward(&self, place: Place, t: u128) -> u128 {
        2 * self.residual(place, t) + self.saved(place, t)
    }

    /// Rows of the head that stay until the way back is over: which they are, before and after the norm, scales and
    /// log-sum-exps.
    fn kept_rows(&self, place: Place, rows: u128) -> u128 {
        let which = if place.device { 2 * place.floats(rows) } else { rows * 12 };
        which + 2 * self.residual(place, rows) + 2 * place.floats(rows)
    }

    /// Scratch of `head_logprob`'s forward pass.
    fn head_forth(&self, place: Place, rows: u128) -> u128 {
        let (v, rank) = (self.config.vocab_size as u128, self.rank("lm_head"));
        match place.device {
            false => self.tile(rows) + rows.min(TILE_ROWS) * rank * 4 + rows * 4,
            true => {
                let low = if rank > 0 { place.values(rows * rank.next_multiple_of(8)) } else { 0 };
                2 * place.floats(rows) + low + place.floats(rows * v.div_ceil(FORWARD_SPAN) * 3)
            }
        }
    }

    /// A tile of logits on the host.
    fn tile(&self, rows: u128) -> u128 {
        rows.min(TILE_ROWS) * (self.config.vocab_size as u128).min(TILE_VOCABULARY) * 4
    }

    /// Scratch of `head_logprob`'s backward pass.
    fn head_back(&self, place: Place, rows: u128) -> u128 {
        let (v, h, rank) = (self.config.vocab_size as u128, self.sizes().h, self.rank("lm_head"));
        if !place.device {
            return self.tile(rows) + 2 * rows.min(TILE_ROWS) * rank * 4;
        }
        let count = rows.min(BACKWARD_ROWS);
        let spans = (BACKWARD_ROWS / count.max(1)).clamp(1, v.div_ceil(BACKWARD_SPAN).max(1));
        let chunk = (spans * BACKWARD_SPAN).min(v);
        let slopes = place.values(count * chunk.next_multiple_of(8));
        // A sum and room for its parts.
        let sum = |columns: u128, parts: u128| {
            let parts = if parts > 0 { place.floats(parts * count * columns) } else { 0 };
            place.floats(count * columns) + parts
        };
        let several = if spans > 1 { spans } else { 0 };
        match rank {
            0 => slopes + sum(h, several),
            _ => {
                let low = place.values(count * rank.next_multiple_of(8));
                slopes + sum(h, several.max(1)) + sum(rank, several) + 2 * low
            }
        }
    }

    /// The moments of a training step.
    fn step(&self, place: Place, extent: Extent, kept: usize, offload: bool) -> Vec<Parts> {
        if self.beside(place) {
            return Vec::new();
        }
        let (t, r, n) = (extent.tokens as u128, extent.rows as u128, self.trained_layers());
        let (x, saved) = (self.residual(place, t), self.saved(place, t));
        let sequences = self.sequences(place, extent);
        let recomputed = n.saturating_sub(kept as u128);
        let offload = offload && place.device;
        // Of so many layers from the first on: insides, and inputs that have not left or are on their way back.
        let below = |layers: u128, arriving: u128| {
            let inputs = if offload { layers.min(arriving) } else { layers };
            sequences + inputs * x + layers.saturating_sub(recomputed) * saved
        };
        let (rows, slopes) = (self.kept_rows(place, r), place.floats(r));
        let last = n.saturating_sub(1);

        // The host keeps a copy of the input and works on the stream in place.
        let copy = if place.device { 0 } else { x };
        let back = slopes + self.residual(place, r) + self.head_back(place, r);
        let mut moments = vec![
            vec![(Part::Activations, below(last, 0)), (Part::Layer, self.forward(place, t) + copy)],
            vec![(Part::Activations, below(n, 0)), (Part::Head, rows + self.head_forth(place, r))],
            vec![(Part::Activations, below(n, 1)), (Part::Head, rows + back)],
        ];
        if n > 0 {
            // The gradient of the rows after and before the norm stays; dx is the stream's.
            let head = rows + slopes + 2 * self.residual(place, r);
            let at =
                |layers, layer| vec![(Part::Activations, below(layers, 1)), (Part::Layer, layer), (Part::Head, head)];
            moments.extend(self.layer_back(place, t).into_iter().map(|work| at(last, 2 * x + saved + work)));
            if recomputed > 0 {
                // Its insides are made again beside dx; on the host from a copy of the input.
                moments.push(at(recomputed - 1, 2 * x + copy + saved + x));
            }
        }
        moments
    }

    /// What the way back through a layer takes beside input, gradient of the stream and `saved`, at each of its
    /// stations. What of `saved` is given back before is taken off: hence the signs.
    fn layer_back(&self, place: Place, t: u128) -> Vec<u128> {
        let Sizes { h, q, k, i, heads, .. } = self.sizes();
        let values = |width: u128| place.values(t * width);
        let scratch = |target: &str, out: u128, input: u128| self.adapter_back(place, t, target, out, input);
        let (gates, norm) = (3 * values(i), values(h));
        let attention = values(q) + values(q) + 2 * values(k);
        let freed = gates + norm;
        let sums = if place.device { self.vectors_back(t) } else { 0 };
        let at = |more: u128, less: u128| more.saturating_sub(less);
        vec![
            values(i) + scratch("down_proj", h, i),
            3 * values(i),
            at(2 * values(i) + norm + scratch("gate_proj", i, h).max(scratch("up_proj", i, h)), gates),
            at(norm + values(q) + scratch("o_proj", h, q), freed),
            at(norm + attention + if place.device { place.floats(t * heads) } else { 0 }, freed),
            at(norm + attention + scratch("q_proj", q, h).max(scratch("v_proj", k, h)).max(sums), freed),
        ]
    }

    /// Parts of a norm's gradient, which are no fewer than a bias's, as in `cuda::ops::rmsnorm`.
    fn vectors_back(&self, t: u128) -> u128 {
        match self.trained {
            Trained::Everything => {
                let rows = t.div_ceil(NORM_BLOCKS).max(8);
                DEVICE.floats(t.div_ceil(rows) * self.sizes().h)
            }
            _ => 0,
        }
    }

    /// Scratch of an adapter's way back: the gradient of A x, and on a device parts of a factor's gradient.
    fn adapter_back(&self, place: Place, t: u128, target: &str, out: u128, input: u128) -> u128 {
        let rank = self.rank(target);
        if rank == 0 {
            return 0;
        }
        let parts = if place.device {
            let m = usize::try_from(t).unwrap_or(usize::MAX);
            place.floats(cuda::ops::lora_matmul::gradient_parts(m) as u128 * rank * out.max(input))
        } else {
            0
        };
        place.values(t * rank) + parts
    }

    /// The moments of decoding on the host: prompts on their way in, and a step of all that live.
    fn decoding(&self, place: Place, decode: Decode) -> Vec<Parts> {
        if self.beside(place) {
            return Vec::new();
        }
        let Decode { live, longest, prompt, .. } = decode;
        let (layers, v) = (self.config.num_hidden_layers as u128, self.config.vocab_size as u128);
        let p = prompts_together(live, prompt) as u128;
        let live = live as u128;
        let pages = host_decode::pages(self.config, decode.live, longest) as u128;
        let cache = layers * 2 * pages * host_decode::PAGE as u128 * self.sizes().k * 4 + self.angles(place, longest);
        let prompts = self.starts(place, p.div_ceil(prompt.max(1) as u128), p) + self.angles(place, prompt);
        // Drawing overwrites a copy of a row, which is scratch. The logits after prompts that are kept are more rows.
        let kept = KNOWN as u128 * v * 4;
        let logits = |rows: u128| rows * v * 4 + 2 * self.residual(place, rows);
        let moments = [
            (prompts + self.forward(place, p), 0),
            (prompts + self.residual(place, p), logits(live.min(p))),
            (self.forward(place, live), 0),
            (self.residual(place, live), logits(live)),
        ];
        moments
            .map(|(layer, head)| vec![(Part::Cache, cache), (Part::Layer, layer), (Part::Head, kept + head)])
            .to_vec()
    }

    /// What is there while a device decodes: `DeviceDecoder::new`.
    fn decoder(&self, decode: Decode) -> Parts {
        let Sizes { h, q, k, i, heads, d } = self.sizes();
        let Decode { live, longest, ends, .. } = decode;
        let shape = Shape::of(live, longest);
        let (rows, v) = (shape.rows as u128, self.config.vocab_size as u128);
        let pages = ends.min(live).max(1).saturating_mul(Decode::pages(longest)) as u128 + 1;
        let pool = DEVICE.values(pages * cuda::ops::attention_decode::PAGE as u128 * k);
        let cache = 2 * self.config.num_hidden_layers as u128 * pool + self.angles(DEVICE, longest);

        let values = |width: u128| DEVICE.values(rows * width);
        let spans = (shape.keys / cuda::ops::attention_decode::SPAN) as u128;
        let parts = DEVICE.floats(rows * heads * spans * d) + DEVICE.floats(rows * heads * spans * 2);
        let rank = if let Trained::Adapter(spec) = self.trained { spec.rank as u128 } else { 0 };
        let stream = [h, h, q, k, k, q, i, i, i, rank].into_iter().map(values).sum::<u128>() + DEVICE.floats(rows);
        let layer = DEVICE.buffer(shape.input_bytes() as u128, 1) + stream + parts;
        let seen = DEVICE.floats(rows * longest as u128);
        // The logits after prompts that are kept are more rows.
        let logits = values(v) + DEVICE.values(KNOWN as u128 * v) + DEVICE.floats(rows * v);
        let head = logits + DEVICE.floats(3 * rows) + seen;
        vec![(Part::Cache, cache), (Part::Layer, layer), (Part::Head, head)]
    }

    /// The moments of prompts that a device runs. A step of all that live takes nothing anew.
    fn prompts_on_device(&self, decode: Decode) -> Vec<Parts> {
        let p = prompts_together(decode.live, decode.prompt) as u128;
        // Where they are, and where their keys and values go.
        let different = (decode.live as u128).min(p);
        let prompts = self.starts(DEVICE, different, p) + DEVICE.floats(p);
        vec![
            vec![(Part::Layer, prompts + self.forward(DEVICE, p))],
            vec![(Part::Layer, prompts + self.residual(DEVICE, p)), (Part::Head, self.logits_on_device(different))],
        ]
    }

    fn sizes(&self) -> Sizes {
        let config = self.config;
        Sizes {
            h: config.hidden_size as u128,
            q: config.query_size() as u128,
            k: config.key_size() as u128,
            i: config.intermediate_size as u128,
            heads: config.num_attention_heads as u128,
            d: config.head_dim as u128,
        }
    }
}

/// As in `tensor::ops::head_logprob`: rows and entries of a tile.
const TILE_ROWS: u128 = 512;
const TILE_VOCABULARY: u128 = 2048;
/// As in `cuda::ops::head_logprob`: entries of a part on the way there, rows and entries at once on the way back.
const FORWARD_SPAN: u128 = 1024;
const BACKWARD_ROWS: u128 = 2048;
const BACKWARD_SPAN: u128 = 8192;
/// As in `cuda::ops::rmsnorm`: blocks among which rows are divided.
const NORM_BLOCKS: u128 = 512;
/// As in `device.rs`: rows whose logits are made at once.
const LOGIT_ROWS: u128 = 256;

struct Sizes {
    h: u128,
    q: u128,
    k: u128,
    i: u128,
    heads: u128,
    d: u128,
}
