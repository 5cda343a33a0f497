//! What a cell will need of a machine, from its parameters and the shape of its model: for the plan, for the look
//! before a run, and for the message where memory runs out all the same. What is the same for all kinds that compute.
//!
//! The largest micro-batch is what the keys allow, or less where the data are known and cannot fill it. Two needs
//! come of it: `surely`, for micro-batches as large as `micro_batch_tokens` says, and `most`, for examples and
//! prompts as long as they may be. Tokens of data are counted by their bytes: none has less than one.

use crate::data::{Eos, Format, Overlength};
use crate::files::Files;
use crate::model::Extent;
use crate::model::lora::{self, ADAPTER_CONFIG};
use crate::model::memory::Need;
use crate::model::{Config, LoraSpec};
use crate::stage::context::{Artifact, Context};

/// A model as a stage takes it: the shape of its base, and the adapters on it in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Of the base.
    pub config: Config,
    /// Those on it, the first one lowest.
    pub adapters: Vec<LoraSpec>,
}

impl Shape {
    /// Of the model that all adapters are folded into.
    pub fn whole(mut self) -> Config {
        untie(&mut self.config, &self.adapters);
        self.config
    }

    /// The shape of the model that a running stage was given, by its files.
    pub fn given(ctx: &Context) -> Option<Shape> {
        let (base, adapters) = ctx.inputs("model").split_first()?;
        let config = Config::load(&base.files).ok()?;
        let spec = |artifact: &Artifact| {
            lora::is_adapter(&artifact.files)
                .then(|| LoraSpec::read(artifact.files.get(ADAPTER_CONFIG)?).ok())
                .flatten()
        };
        Some(Shape { config, adapters: adapters.iter().map(spec).collect::<Option<_>>()? })
    }
}

/// How much data there is, by the bytes of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// How many there are.
    pub records: usize,
    /// Tokens of all, and of the longest one, at most.
    pub tokens: usize,
    /// Tokens of the longest one, at most.
    pub longest: usize,
}

/// What a cell needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Needs {
    /// If the data fill micro-batches as they are asked for.
    pub surely: Need,
    /// If they are as long as the keys let them be.
    pub most: Need,
    /// Whether it goes faster with more memory than `most`, and takes it from what a device has.
    pub takes_more: bool,
    /// Updates of a training stage, where they are known.
    pub steps: Option<u64>,
    /// Bytes on disk, of a training stage: weights at the end and at its checkpoints, states to resume from.
    pub disk: u64,
}

/// How a stage takes records as examples.
pub struct Taking {
    /// How a record becomes tokens.
    pub format: Format,
    /// What ends a completion.
    pub eos: Eos,
    /// Longest example, in tokens.
    pub max_tokens: usize,
    /// What happens to longer ones.
    pub on_overlength: Overlength,
    /// Whether examples without a learned token are taken too.
    pub allow_unlearned: bool,
}

/// A stage that computes with a model, as its parameters describe it.
pub trait Computes {
    /// What it needs with a model of `shape`. `data` are the records it takes, if they are there.
    fn needs(&self, shape: &Shape, data: Option<Data>, on_device: bool) -> Needs;

    /// What makes it need less, the gentlest first.
    fn advice(&self, on_device: bool) -> Vec<String>;

    /// How it takes its records, if as examples.
    fn takes(&self) -> Option<Taking> {
        None
    }
}

/// Tokens that templates and end marks add to the text of a record, generously.
pub const MARKUP: usize = 256;
/// Beyond this nothing is a token count that means anything; it keeps sums from overflowing.
pub const MOST_TOKENS: usize = 1 << 32;

impl Data {
    /// Of `data.jsonl` of a dataset; `None` if it cannot be read.
    pub fn of(files: &Files) -> Option<Data> {
        let bytes = std::fs::read(files.get("data.jsonl")?).ok()?;
        let lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::len).filter(|length| *length > 0);
        let empty = Data { records: 0, tokens: 0, longest: 0 };
        Some(lines.fold(empty, |data, length| Data {
            records: data.records + 1,
            tokens: data.tokens + length + MARKUP,
            longest: data.longest.max(length + MARKUP),
        }))
    }
}

/// A head that an adapter which is folded in has changed is no longer the embedding.
pub fn untie(config: &mut Config, folded: &[LoraSpec]) {
    config.tie_word_embeddings &= !folded.iter().any(|spec| spec.targets.iter().any(|target| target == "lm_head"));
}

/// How examples are put into micro-batches.
pub struct Cut {
    /// Sequences of an example: a preference counts with both sides.
    pub sides: usize,
    /// Longest example, in tokens.
    pub max_tokens: usize,
    /// Examples of an update; `None` where there are no updates.
    pub batch_size: Option<usize>,
    /// Tokens worked on at once.
    pub micro_batch_tokens: usize,
    /// Examples worked on at once, in their place.
    pub micro_batch_size: Option<usize>,
}

impl Cut {
    /// The micro-batch that the keys ask for, and the largest that they allow.
    pub fn micro_batches(&self, data: Option<Data>) -> (Extent, Extent) {
        let max_tokens = self.max_tokens.min(MOST_TOKENS);
        let one = data.map_or(max_tokens, |data| max_tokens.min(data.longest));
        let example = one.saturating_mul(self.sides);
        let all = data.map_or(MOST_TOKENS, |data| data.tokens.saturating_mul(self.sides));
        let batch = self.batch_size.unwrap_or(MOST_TOKENS).min(MOST_TOKENS).saturating_mul(example).min(all);
        let budget = self.micro_batch_tokens.min(MOST_TOKENS);
        let (surely, most) = match self.micro_batch_size.map(|size| size.min(MOST_TOKENS)) {
            Some(size) => (budget.min(size.saturating_mul(example)), size.saturating_mul(example)),
            None => (budget, budget.max(example)),
        };
        let extent = |tokens: usize| Extent::full(tokens.min(batch).clamp(1, MOST_TOKENS), one);
        (extent(surely), extent(most))
    }

    /// Smaller parts, if they can be.
    pub fn advice(&self) -> Option<String> {
        let budget = Some(self.micro_batch_tokens.min(MOST_TOKENS)).filter(|budget| *budget > 256)?;
        Some(format!("`micro_batch_tokens = {}`: the same batch in smaller parts", budget / 2))
    }
}

/// What is said of weights that could be half as large.
pub const HALVE: &str = "`dtype = \"bf16\"` halves the weights on the host";

/// What is said of examples that could be shorter.
pub fn shorten(max_tokens: usize) -> String {
    format!("a `max_tokens` below {}, if the data are shorter", max_tokens.min(MOST_TOKENS))
}
