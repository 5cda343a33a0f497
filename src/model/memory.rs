//! How much memory a model takes while it is trained, measured or sampled from, worked out beforehand.
//!
//! What is counted are the buffers of the code as it stands: `qwen2.rs` and `decode.rs` on the host, `device.rs`
//! and `device_decode.rs` on a device. Some of them are there all the time ([`Plan::standing`]), the others at
//! some moments of a step ([`Plan::moments`]); the need is that of the moment that takes most. On a device each
//! buffer is rounded up to its block. Tests hold the sums to what the emulated device and an allocator count.
//!
//! Symbols: T tokens of a micro-batch, R rows that predict a learned token, H hidden, I intermediate, Q width of
//! the queries, K of the keys, h heads, D their size, V vocabulary, r rank, L layers, n trained layers, e bytes of
//! an element (4 on the host, 2 on a device). Bytes are:
//!
//! | part | host | device |
//! | --- | --- | --- |
//! | weights | matrices as packed, the rest f32 | bf16 matrices, the rest f32 |
//! | trained values | f32 | bf16 copies |
//! | gradients | f32 | f32, during the way back |
//! | optimizer states | as the optimizer says | none |
//! | kept activations | n T H e, and with nothing recomputed n `saved` | the same |
//! | one layer's work | input, output, gradients, `saved` = T (3 H + 2 Q + 2 K + 3 I + 7 r) e + T (2 + h) 4 | same |
//! | head | R (2 H + 3) e, a tile of logits | the same, parts of sums |
//! | keys and values | L 2 K e of every token of all that live at once | pages of 16 |
//!
//! What is not counted: the program itself, scratch of products (a few MiB a thread), the tokens of the data, and
//! what a driver takes for its context.

use super::config::Config;
use super::decode::{MOST_LIVE, PROMPT_TOKENS, most_live};
use super::lora::{self, LoraSpec};
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
}

/// All parts, in the order of tables.
pub const PARTS: [Part; 9] = [
    Part::Weights,
    Part::Trained,
    Part::Gradients,
    Part::Optimizer,
    Part::Activations,
    Part::Layer,
    Part::Head,
    Part::Cache,
    Part::Reading,
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
}

/// What is done with the model.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    Train {
        extent: Extent,
        /// Whether layers keep their input only.
        recompute: bool,
        /// Bytes of optimizer state for a tensor of so many values.
        state_bytes: &'a dyn Fn(usize) -> usize,
    },
    /// Log-probs, and of one sequence at a time all logits or all hidden states.
    Measure { extent: Extent, logits: bool, hidden_states: bool },
    /// `live` completions at once, none longer than `longest` with its prompt; prompts of `prompt_tokens` together.
    Decode { live: usize, longest: usize, prompt_tokens: usize },
}

impl Work<'_> {
    /// Decoding of `completions` completions, each of at most `longest` tokens with its prompt, of which at most
    /// `prompt` are the prompt's: as many at once as decoding takes.
    pub fn decode(config: &Config, completions: usize, longest: usize, prompt: usize) -> Work<'static> {
        let live = completions.min(MOST_LIVE).min(most_live(config, longest)).max(1);
        let together = live.saturating_mul(prompt).min(PROMPT_TOKENS.max(prompt)).max(1);
        Work::Decode { live, longest, prompt_tokens: together }
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

/// When something is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    /// On the way back only.
    Back,
}

/// A moment of a step: what is there beside what stands.
struct Moment {
    back: bool,
    parts: Vec<(Part, u128)>,
}

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

    /// Everything that is there at the moment that takes most of `place`.
    fn largest(&self, place: Place) -> Vec<(Part, u128)> {
        let standing = self.standing(place);
        let all = self.moments(place).into_iter().map(|Moment { back, mut parts }| {
            parts
                .extend(standing.iter().filter(|(_, when, _)| back || *when == When::Always).map(|(p, _, b)| (*p, *b)));
            parts
        });
        all.max_by_key(|parts| parts.iter().map(|(_, bytes)| bytes).sum::<u128>()).unwrap_or_default()
    }

    /// What is there all along: a line for each term and the place it lies at. A term that moves to the device is
    /// a line that moves.
    fn standing(&self, place: Place) -> Vec<(Part, When, u128)> {
        let trained = self.trained_tensors();
        let sum = |of: &dyn Fn(u128) -> u128| trained.iter().map(|&values| of(values)).sum::<u128>();
        let states = |values: u128| match self.work {
            Work::Train { state_bytes, .. } => state_bytes(usize::try_from(values).unwrap_or(usize::MAX)) as u128,
            _ => 0,
        };
        let trains = matches!(self.work, Work::Train { .. });
        let floats = |values: u128| place.floats(values);
        match place.device {
            false => vec![
                (Part::Weights, When::Always, self.host_weights()),
                (Part::Trained, When::Always, sum(&floats)),
                (Part::Gradients, When::Always, if trains { sum(&floats) } else { 0 }),
                (Part::Optimizer, When::Always, sum(&states)),
            ],
            true => vec![
                (Part::Weights, When::Always, self.device_weights()),
                (Part::Trained, When::Always, sum(&|values| place.values(values))),
                (Part::Gradients, When::Back, if trains { sum(&floats) } else { 0 }),
            ],
        }
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
            Trained::Everything => {
                let matrices = self.matrices().into_iter().map(|[n, k]| n * k);
                matrices.chain(self.vectors()).collect()
            }
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

    fn device_weights(&self) -> u128 {
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

    fn moments(&self, place: Place) -> Vec<Moment> {
        let forth = |parts: Vec<(Part, u128)>| Moment { back: false, parts };
        let mut moments = vec![forth(vec![(Part::Reading, self.reading(place))])];
        match self.work {
            Work::Train { extent, recompute, .. } => moments.extend(self.step(place, extent, recompute)),
            Work::Measure { extent, logits, hidden_states } => {
                let layer = self.sequences(place, extent) + self.forward(place, extent.tokens as u128);
                moments.push(forth(vec![(Part::Layer, layer)]));
                let head = self.kept_rows(place, extent.rows as u128) + self.head_forth(place, extent.rows as u128);
                let x = self.residual(place, extent.tokens as u128);
                moments.push(forth(vec![(Part::Layer, self.sequences(place, extent) + x), (Part::Head, head)]));
                if !place.device {
                    // One sequence after another, on the host whatever computes the log-probs.
                    let (t, x) = (extent.longest as u128, self.residual(place, extent.longest as u128));
                    if logits {
                        let all = t * self.config.vocab_size as u128 * 4;
                        moments.push(forth(vec![(Part::Head, all + 2 * x)]));
                    }
                    if hidden_states {
                        // The states, and again in one piece.
                        let states = 2 * (self.config.num_hidden_layers as u128 + 2) * x;
                        moments.push(forth(vec![(Part::Activations, states), (Part::Layer, x)]));
                    }
                }
            }
            Work::Decode { live, longest, prompt_tokens } => {
                moments.extend(self.decoding(place, live, longest, prompt_tokens));
            }
        }
        moments
    }

    /// The largest tensor between its file and its place: the embedding, as a plain copy on the host; for a device
    /// it is unpacked and rounded there.
    fn reading(&self, place: Place) -> u128 {
        if place.device {
            return 0;
        }
        let largest = self.matrices().into_iter().map(|[n, k]| n * k).max().unwrap_or(0);
        largest * if self.on_device { 6 } else { 4 }
    }

    /// `[T, H]`
    fn residual(&self, place: Place, tokens: u128) -> u128 {
        place.values(tokens * self.config.hidden_size as u128)
    }

    /// Where sequences begin, positions, and the angles of them.
    fn sequences(&self, place: Place, extent: Extent) -> u128 {
        let starts = extent.sequences as u128 + 1;
        let starts = if place.device { place.floats(starts) } else { starts * 8 };
        starts + place.floats(extent.tokens as u128) + self.angles(place, extent.longest)
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
    fn step(&self, place: Place, extent: Extent, recompute: bool) -> Vec<Moment> {
        let (t, r, n) = (extent.tokens as u128, extent.rows as u128, self.trained_layers());
        let (x, saved) = (self.residual(place, t), self.saved(place, t));
        let sequences = self.sequences(place, extent);
        let kept_per_layer = x + if recompute { 0 } else { saved };
        // Of the layers below the one at work, and of all.
        let below = sequences + n.saturating_sub(1) * kept_per_layer;
        let all = sequences + n * kept_per_layer;
        let (kept, slopes) = (self.kept_rows(place, r), place.floats(r));

        // The host keeps a copy of the input and works on the stream in place.
        let copy = if place.device { 0 } else { x };
        let mut moments = vec![
            Moment {
                back: false,
                parts: vec![(Part::Activations, below), (Part::Layer, self.forward(place, t) + copy)],
            },
            Moment {
                back: false,
                parts: vec![(Part::Activations, all), (Part::Head, kept + self.head_forth(place, r))],
            },
            Moment {
                back: true,
                parts: vec![
                    (Part::Activations, all),
                    (Part::Head, kept + slopes + self.residual(place, r) + self.head_back(place, r)),
                ],
            },
        ];
        if n > 0 {
            // The gradient of the rows after and before the norm stays; dx is the stream's.
            let head = kept + slopes + 2 * self.residual(place, r);
            for work in self.layer_back(place, t) {
                let layer = 2 * x + saved + work;
                moments.push(Moment {
                    back: true,
                    parts: vec![(Part::Activations, below), (Part::Layer, layer), (Part::Head, head)],
                });
            }
            if recompute {
                // Its insides are made again beside dx; on the host from a copy of the input.
                let layer = 2 * x + copy + saved + x;
                moments.push(Moment {
                    back: true,
                    parts: vec![(Part::Activations, below), (Part::Layer, layer), (Part::Head, head)],
                });
            }
        }
        if place.device {
            // After an update the largest trained tensor comes over in f32, to be rounded there.
            let largest = self.trained_tensors().into_iter().map(|values| place.floats(values)).max();
            moments.push(Moment { back: false, parts: vec![(Part::Reading, largest.unwrap_or(0))] });
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
        let at = |more: u128, less: u128| more.saturating_sub(less);
        vec![
            values(i) + scratch("down_proj", h, i),
            3 * values(i),
            at(2 * values(i) + norm + scratch("gate_proj", i, h).max(scratch("up_proj", i, h)), gates),
            at(norm + values(q) + scratch("o_proj", h, q), freed),
            at(norm + attention + if place.device { place.floats(t * heads) } else { 0 }, freed),
            at(norm + attention + scratch("q_proj", q, h).max(scratch("v_proj", k, h)), freed),
        ]
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

    /// The moments of decoding: prompts on their way in, and a step of all that live.
    fn decoding(&self, place: Place, live: usize, longest: usize, prompt_tokens: usize) -> Vec<Moment> {
        let Sizes { q, k, heads, d, .. } = self.sizes();
        let (layers, live, p) = (self.config.num_hidden_layers as u128, live as u128, prompt_tokens as u128);
        let v = self.config.vocab_size as u128;
        let page = cuda::ops::attention_decode::PAGE;
        let pages = longest.div_ceil(page) as u128;
        let cache = match place.device {
            false => layers * 2 * live * longest as u128 * k * 4,
            true => layers * 2 * place.values(live * pages * page as u128 * k),
        };
        let cache = cache + self.angles(place, longest);
        // A row of a table for each token: its pages.
        let prompt = p.div_ceil(live).max(1).min(longest as u128);
        let extent = Extent::full(prompt_tokens, usize::try_from(prompt).unwrap_or(usize::MAX));
        let table = |rows: u128, length: u128| {
            place.floats(rows * length.div_ceil(page as u128)) + 2 * place.floats(rows) + 2 * place.values(rows * k)
        };
        let logits = |rows: u128| match place.device {
            true => place.values(rows * v) + 2 * self.residual(place, rows) + place.values(rows * self.rank("lm_head")),
            // Downloaded in bf16; drawing overwrites a copy of each row.
            false => rows * v * 4 + if self.on_device { rows * v * 2 } else { 2 * self.residual(place, rows) },
        };
        let computes = place.device || !self.on_device;
        let layer = |rows: u128| if computes { self.forward(place, rows) } else { 0 };
        let prompts = self.sequences(place, extent);
        let mut moments = vec![
            (prompts + layer(p) + if place.device { table(p, prompt) } else { 0 }, 0),
            (prompts + if computes { self.residual(place, p) } else { 0 }, logits(live.min(p))),
            (layer(live), 0),
            (if computes { self.residual(place, live) } else { 0 }, logits(live)),
        ];
        if place.device {
            let spans = (longest as u128).div_ceil(DECODE_SPAN);
            let parts = place.floats(live * heads * spans * d) + place.floats(live * heads * spans * 2);
            let attended = 2 * self.residual(place, live) + 2 * place.values(live * q) + 2 * place.values(live * k);
            moments.push((attended + parts + table(live, longest as u128), 0));
        }
        moments
            .into_iter()
            .map(|(layer, head)| Moment {
                back: false,
                parts: vec![(Part::Cache, cache), (Part::Layer, layer), (Part::Head, head)],
            })
            .collect()
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
/// As in `cuda::ops::attention_decode`: keys that a block takes.
const DECODE_SPAN: u128 = 256;

struct Sizes {
    h: u128,
    q: u128,
    k: u128,
    i: u128,
    heads: u128,
    d: u128,
}
