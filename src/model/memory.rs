//! How much memory a model takes while it is trained, measured or sampled from, worked out beforehand: the decoder's own
//! passes are walked through at a place that counts (`model::count`). What stands around them is told here: optimizer,
//! keys and values, what a device leaves to the host. Tests hold the sums to what the emulated device and an allocator
//! count.
//!
//! A [`Need`] is that of the moment that takes most. Where a device computes, the host has: the model while it is loaded,
//! a tensor on its way, a ring of 4 MiB for small uploads, with `offload` the inputs of layers, and trained values and
//! optimizer states twice while a state is saved.
//!
//! A device takes as many pages of keys and values as there is memory for: [`Decode::ends`] says for how many completions
//! at their longest they are to be counted. It cannot do with fewer than for one. The region of captured steps
//! ([`Plan::region`]) is no need: it is taken where there is room for it beside the rest, and given back where not. So it is
//! counted for who asks for it.
//!
//! What is not counted: the program itself, scratch of products (a few MiB a thread), the tokens of the data, what a
//! driver takes for its context and for graphs (a sixteenth of a device is left to that), and blocks of other
//! sizes that a pool keeps (on a device they go back when they are wanted; those of `offload` stay with the host).

use super::batch::Extent;
use super::config::Config;
use super::count::{Bytes, Count, Sizes};
use super::decoder::Decoder;
use super::lora::{LoraPair, LoraSpec};
use super::place::Place;
use super::policy::{Policy, Recompute};
use super::sizes::{
    DEVICE_PAGE, HOST_PAGE, KNOWN, MOST_LIVE, StepShape, most_live_on_host, pages_of, pages_on_host, prompts_together,
};
use super::step::{LOGIT_ROWS, StepRows};
use super::tensors;
use crate::cuda;
use crate::measure::bytes;
use crate::problem::Problem;
use crate::tensor::Dtype;

pub use super::count::{PARTS, Part};

/// What is trained or, of a model that is only used, what is active.
#[derive(Debug, Clone, Copy)]
pub enum Trained<'a> {
    /// Nothing: full weights, used as they are.
    Nothing,
    /// An adapter of this shape on frozen weights.
    Adapter(&'a LoraSpec),
    /// Every weight.
    Everything,
}

impl<'a, P: Place> From<&'a Decoder<P>> for Trained<'a> {
    fn from(model: &'a Decoder<P>) -> Trained<'a> {
        match model.lora() {
            Some(spec) => Trained::Adapter(spec),
            None if model.trains_everything() => Trained::Everything,
            None => Trained::Nothing,
        }
    }
}

/// What is done with the model.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// Steps of training.
    Train {
        /// The largest micro-batch.
        extent: Extent,
        /// This many trained layers, from the last on, keep their activations, the others their input only.
        kept: usize,
        /// Whether inputs of layers leave a device for the host.
        offload: bool,
        /// Whether the region of captured steps is counted.
        graphs: bool,
        /// Bytes of each state that the optimizer has for a tensor of this many values.
        state_sizes: &'a dyn Fn(usize) -> Vec<usize>,
    },
    /// Log-probs, and of one sequence at a time all logits or all hidden states.
    Measure {
        /// The largest batch.
        extent: Extent,
        /// Whether all logits of a sequence are asked for.
        logits: bool,
        /// Whether all hidden states of a sequence are asked for.
        hidden_states: bool,
    },
    /// Completions are made.
    Decode(Decode),
}

impl Work<'_> {
    /// Tokens that are worked through at once, at the most.
    fn tokens(&self) -> usize {
        match self {
            Work::Train { extent, .. } | Work::Measure { extent, .. } => extent.tokens,
            Work::Decode(decode) => prompts_together(decode.live, decode.prompt),
        }
    }
}

/// Completions in the making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// At once.
    pub live: usize,
    /// Tokens of the longest, with its prompt.
    pub longest: usize,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// On a device there are pages for this many at their longest. It takes what it finds, up to `live`.
    pub ends: usize,
}

impl Decode {
    /// Of `completions` completions, as many at once as decoding takes, with the fewest pages.
    pub fn new(config: &Config, on_device: bool, completions: usize, longest: usize, prompt: usize) -> Decode {
        let most = if on_device { MOST_LIVE } else { most_live_on_host(config) };
        Decode { live: completions.min(most).max(1), longest, prompt, ends: 1 }
    }

    /// Pages that a device must have for a completion of this many tokens. Prompts that are kept give theirs up for it.
    pub(crate) fn pages(longest: usize) -> usize {
        pages_of(longest, DEVICE_PAGE)
    }
}

/// A model and what is to be done with it.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// The model's shape.
    pub config: &'a Config,
    /// Storage of the frozen matrices on the host.
    pub dtype: Dtype,
    /// What of it is trained or active.
    pub trained: Trained<'a>,
    /// Whether a CUDA device computes.
    pub on_device: bool,
    /// What is done with it.
    pub work: Work<'a>,
}

/// Bytes of one part, each at the moment when its place holds most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Which part.
    pub part: Part,
    /// Bytes of the host's memory.
    pub host: u64,
    /// Bytes of the device's memory; 0 without a device.
    pub device: u64,
}

/// What is needed. The lines of a column add up to its peak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Tokens that are worked through at once.
    pub tokens: usize,
    /// One for each part that takes something.
    pub lines: Vec<Line>,
    /// Bytes of the host's memory at its peak.
    pub host: u64,
    /// Bytes of the device's memory at its peak; 0 without a device.
    pub device: u64,
}

impl Need {
    /// Bytes of a part: host, device.
    pub fn of(&self, part: Part) -> (u64, u64) {
        self.lines.iter().find(|line| line.part == part).map_or((0, 0), |line| (line.host, line.device))
    }

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

/// `Err` (`cuda::too_large`) if kernels cannot count the values of this many tokens at once.
pub fn kernels_count(config: &Config, tokens: usize) -> Result<(), Problem> {
    let widest = config.hidden_size.max(config.intermediate_size).max(config.query_size());
    cuda::check_rows(tokens, widest)
}

/// `Err` (`cuda::head_dim`, exit 3) if no kernel of a device takes a model of this shape.
pub fn kernels_fit(config: &Config) -> Result<(), Problem> {
    config.heads().on_device().check()
}

/// Bytes taken, at the moment that takes most.
#[derive(Clone, Copy)]
struct Taken {
    /// Where the model computes: all along, and at the most.
    standing: Bytes,
    most: Bytes,
    /// On the host beside a device, at the most.
    outside: Bytes,
}

impl Plan<'_> {
    /// What is needed, by part and place.
    pub fn need(&self) -> Need {
        let taken = self.walk();
        let mut here = taken.most;
        // Between a file and its place, before any work.
        if !self.on_device {
            here = larger(here, with(taken.standing, Part::Reading, self.reading()));
        }
        let (host, device) = if self.on_device { (self.beside(taken.outside), here) } else { (here, [0; PARTS.len()]) };
        let wide = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
        let line = |part: Part| Line { part, host: wide(host[part as usize]), device: wide(device[part as usize]) };
        let lines: Vec<Line> = PARTS.into_iter().map(line).filter(|line| line.host > 0 || line.device > 0).collect();
        let sum = |of: fn(&Line) -> u64| lines.iter().map(of).fold(0u64, u64::saturating_add);
        let (host, device) = (sum(|line| line.host), sum(|line| line.device));
        Need { tokens: self.work.tokens(), host, device, lines }
    }

    /// What the work takes for a while where it is done, beside what is there all the time.
    pub fn working(&self) -> u64 {
        let Taken { standing, most, .. } = self.walk();
        u64::try_from(sum(&most) - sum(&standing)).unwrap_or(u64::MAX)
    }

    /// The region that a captured step works in on a device: a quarter more than its buffers take together, for what is
    /// lost between them. In a few shapes that is a fifth.
    pub fn region(&self) -> usize {
        let work = match self.work {
            Work::Train { extent, kept, offload, state_sizes, .. } => {
                Work::Train { extent, kept, offload, graphs: false, state_sizes }
            }
            other => other,
        };
        let bytes = usize::try_from(Plan { work, ..*self }.working()).unwrap_or(usize::MAX);
        bytes.saturating_add(bytes / 4)
    }

    /// How many values are trained.
    pub fn trained_values(&self) -> u64 {
        self.sum_of(&|values| values)
    }

    /// The sum over the trained tensors of a function of their sizes.
    pub fn sum_of(&self, of: &dyn Fn(usize) -> usize) -> u64 {
        let of = |values: usize| of(values) as u64;
        match self.trained {
            Trained::Nothing => 0,
            Trained::Adapter(spec) => {
                let linears = tensors::linears(self.config);
                let adapted = linears.iter().filter(|(name, ..)| spec.adapts(name));
                adapted.flat_map(|(_, _, shape)| shape.map(|side| of(side * spec.rank))).fold(0, u64::saturating_add)
            }
            Trained::Everything => {
                let sizes = tensors::tensors(self.config).into_iter().map(|tensor| tensor.shape.iter().product());
                sizes.map(of).fold(0, u64::saturating_add)
            }
        }
    }

    /// A model of the plan's shape at a place that counts.
    fn model(&self, on_device: bool) -> Decoder<Count> {
        let place = Count::new(on_device, self.dtype);
        let mut source = Sizes { place: place.clone() };
        let model = Decoder::build(self.config.clone(), place, &mut source);
        let Ok(mut model) = model else { unreachable!("nothing is read") };
        model.place.part(Part::Trained);
        let done = match self.trained {
            Trained::Nothing => Ok(()),
            Trained::Everything => model.train_all(),
            Trained::Adapter(spec) => {
                let place = model.place.clone();
                model.set_lora(spec.clone(), |name, [out, input]| {
                    let half = |side: usize| place.buffer(side * spec.rank, 4);
                    let pair = || LoraPair { a: half(input), b: half(out), rank: spec.rank, scale: 1.0 };
                    Ok(spec.adapts(name).then(pair))
                })
            }
        };
        assert!(done.is_ok(), "the model is new");
        model
    }

    /// Does the work where the model computes, and counts.
    fn walk(&self) -> Taken {
        let model = self.model(self.on_device);
        let (place, here) = (&model.place, model.place.here.clone());
        let standing = match self.work {
            Work::Train { extent, kept, offload, graphs, state_sizes } => {
                place.part(Part::Gradients);
                let Ok(mut sums) = model.zero_gradients();
                self.optimizer(&model, state_sizes);
                if graphs && self.on_device {
                    place.takes(Part::Graphs, place.block(self.region() as u128));
                }
                here.begin();
                let standing = here.now();
                let recompute = Recompute::First(self.config.num_hidden_layers.saturating_sub(kept));
                train(&model, extent, Policy { recompute, offload, graphs }, &mut sums.values);
                standing
            }
            Work::Measure { extent, logits, hidden_states } => {
                here.begin();
                let standing = here.now();
                measure(&model, extent, logits, hidden_states);
                standing
            }
            Work::Decode(decode) if self.on_device => self.decode_on_device(&model, decode),
            Work::Decode(decode) => self.decode_on_host(&model, decode),
        };
        Taken { standing, most: here.most(), outside: model.place.outside.most() }
    }

    /// States, each in a buffer of its own; and what the device's optimizer and the norm of gradients have beside them:
    /// tensors in pieces, each with a sum, tables of their addresses, and what a byte of an 8-bit state means.
    fn optimizer(&self, model: &Decoder<Count>, state_sizes: &dyn Fn(usize) -> Vec<usize>) {
        let place = &model.place;
        let lengths: Vec<usize> = model.params().iter().map(|param| param.values()).collect();
        for bytes in lengths.iter().flat_map(|len| state_sizes(*len)) {
            place.takes(Part::Optimizer, place.block(bytes as u128));
        }
        if self.on_device {
            let pieces: u128 = lengths.iter().map(|len| len.div_ceil(cuda::ops::grad_norm::PIECE) as u128).sum();
            let rows = lengths.len() as u128;
            for bytes in [pieces * 8, pieces * 8, pieces * 8, rows * 72, rows * 16, 1024, 1024] {
                place.takes(Part::Optimizer, place.block(bytes));
            }
        }
    }

    /// What a device leaves to the host, at the moment that takes most.
    fn beside(&self, outside: Bytes) -> Bytes {
        let model = self.model(false);
        // While it is loaded.
        let loaded = with(model.place.here.now(), Part::Reading, self.reading());
        // A state on its way to a file or from one: as it comes from the device, and as the host has it.
        let mut saved = [0; PARTS.len()];
        if let Work::Train { state_sizes, .. } = self.work {
            saved[Part::Trained as usize] = u128::from(self.sum_of(&|values| 4 * values));
            let states = self.sum_of(&|values| state_sizes(values).iter().sum());
            saved[Part::Optimizer as usize] = 2 * u128::from(states);
        }
        let most = larger(larger(loaded, saved), outside);
        with(most, Part::Uploads, cuda::STAGING_BYTES as u128)
    }

    /// The largest tensor between its file and its place: the embedding, as a plain copy on the host; for a device
    /// it is unpacked and rounded there. Where everything is trained, that is more than one more copy.
    fn reading(&self) -> u128 {
        if let Trained::Everything = self.trained {
            return 0;
        }
        let sizes = tensors::tensors(self.config).into_iter();
        let largest = sizes.map(|tensor| tensor.shape.into_iter().map(|side| side as u128).product()).max();
        largest.unwrap_or(0) * if self.on_device { 6 } else { 4 }
    }

    /// Completions on the host: prompts on their way in, and a step of all that live.
    fn decode_on_host(&self, model: &Decoder<Count>, decode: Decode) -> Bytes {
        let Decode { live, longest, prompt, .. } = decode;
        let (place, config) = (&model.place, self.config);
        let standing = place.here.now();
        place.part(Part::Cache);
        let page = config.num_hidden_layers * 2 * HOST_PAGE * config.key_size();
        let _cache = place.buffer(pages_on_host(config, live, longest) * page, 4);
        let Ok(_angles) = place.angles(config, longest);
        place.part(Part::Head);
        // The logits after prompts that are kept.
        let _kept = place.buffer(KNOWN * config.vocab_size, 4);
        place.here.begin();
        let tokens = prompts_together(live, prompt);
        prompts(model, tokens, live.min(tokens), tokens.div_ceil(prompt.max(1)));
        place.part(Part::Layer);
        let Ok(_rows) = StepRows::new(model, live);
        let _onto = place.buffer(live * config.hidden_size, 4);
        standing
    }

    /// Completions on a device: what is there as long as it decodes, and prompts on their way in. A step of all that live
    /// takes nothing anew.
    fn decode_on_device(&self, model: &Decoder<Count>, decode: Decode) -> Bytes {
        let Decode { live, longest, prompt, ends } = decode;
        let (place, config) = (&model.place, self.config);
        let shape = StepShape::of(live, longest);
        let (rows, vocab) = (shape.rows, config.vocab_size);
        let pages = ends.min(live).max(1).saturating_mul(Decode::pages(longest)) + 1;
        place.part(Part::Cache);
        let pools = 2 * config.num_hidden_layers;
        let _pools: Vec<_> =
            (0..pools).map(|_| place.buffer(pages.saturating_mul(DEVICE_PAGE * config.key_size()), 2)).collect();
        let Ok(_angles) = place.angles(config, longest);
        place.part(Part::Layer);
        let Ok(_rows) = StepRows::new(model, rows);
        let _inputs = place.buffer(shape.input_bytes(), 1);
        let parts = rows * config.num_attention_heads * (shape.keys / cuda::ops::attention_decode::SPAN);
        let _parts = [place.buffer(parts * config.head_dim, 4), place.buffer(parts * 2, 4)];
        place.part(Part::Head);
        // The logits after prompts that are kept, what is drawn from, what is drawn, and the ids so far.
        let _kept = place.buffer(KNOWN * vocab, 2);
        let _others = [rows * vocab, 3 * rows, rows * longest].map(|len| place.buffer(len, 4));
        place.here.begin();
        let standing = place.here.now();
        let tokens = prompts_together(live, prompt);
        place.part(Part::Layer);
        // Where their keys and values go.
        let _to = place.buffer(tokens, 4);
        prompts(model, tokens, live.min(tokens), live.min(tokens));
        standing
    }
}

/// A training step.
fn train(model: &Decoder<Count>, extent: Extent, policy: Policy, sums: &mut [<Count as Place>::Floats]) {
    let place = &model.place;
    place.part(Part::Activations);
    let Ok(angles) = place.angles(&model.config, extent.longest);
    let Ok((logprobs, tape)) = model.forward_pass(place.inputs_of(extent, angles), extent, policy);
    drop(logprobs);
    let Ok(_dx) = model.backward_pass(tape, sums);
}

/// Log-probs of a batch, and of one sequence at a time all logits or all hidden states.
fn measure(model: &Decoder<Count>, extent: Extent, logits: bool, hidden_states: bool) {
    let (place, config) = (&model.place, &model.config);
    let sequence = |extent: Extent| {
        place.part(Part::Layer);
        let Ok(angles) = place.angles(config, extent.longest);
        place.inputs_of(extent, angles)
    };
    let Ok(_logprobs) = model.logprobs_of(&sequence(extent), extent);
    let longest = extent.longest;
    let one = Extent { tokens: longest, rows: 0, sequences: 1, longest };
    let results = |len: usize| {
        let bytes = len as u128 * 4;
        place.result(Part::Head, bytes)
    };
    if logits {
        let _all = results(longest * config.vocab_size);
        let inputs = sequence(one);
        let Ok(x) = model.stream(&inputs, longest, &mut |_, _, _| Ok(()));
        let tile = longest.min(LOGIT_ROWS);
        let _wide = results(tile * config.vocab_size);
        place.part(Part::Head);
        let Ok(_logits) = model.logits_of(&x, &inputs.ids, tile);
    }
    if hidden_states {
        // The states, and again in one piece.
        let _states = results(2 * (config.num_hidden_layers + 2) * longest * config.hidden_size);
        let Ok(_x) = model.stream(&sequence(one), longest, &mut |_, _, _| Ok(()));
    }
}

/// Prompts of this many tokens on their way into the cache, and the logits after them.
fn prompts(model: &Decoder<Count>, tokens: usize, rows: usize, sequences: usize) {
    let place = &model.place;
    place.part(Part::Layer);
    let extent = Extent { tokens, rows, sequences, longest: tokens };
    let Ok(angles) = place.angles(&model.config, 0);
    let inputs = place.inputs_of(extent, angles);
    let Ok(x) = model.stream(&inputs, tokens, &mut |_, _, _| Ok(()));
    place.part(Part::Head);
    let Ok(_logits) = model.logits_of(&x, &inputs.rows, rows);
}

fn sum(bytes: &Bytes) -> u128 {
    bytes.iter().sum()
}

fn larger(one: Bytes, other: Bytes) -> Bytes {
    if sum(&one) >= sum(&other) { one } else { other }
}

/// And this much of a part.
fn with(mut bytes: Bytes, part: Part, more: u128) -> Bytes {
    bytes[part as usize] += more;
    bytes
}
