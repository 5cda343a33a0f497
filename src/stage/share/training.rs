//! What `sft` and `dpo` share: the keys of schedule, optimizer and adapter, and the book-keeping of a
//! run that may be interrupted at any instant. The loops themselves are in `sft.rs` and `dpo.rs`.

use crate::data::{self, Eos, Format, Limits, Overlength, Pair, Sample, Side};
use crate::files::Files;
use crate::manifest::spec::{Broken, Key, Lineage, Params, Type};
use crate::model::family;
use crate::model::{Batch, Config, LoadOptions, LoraSpec, Model, Placed, Policy, Recompute, load};
use crate::problem::Problem;
use crate::safetensors::{self, Element};
use crate::stage::context::{Context, read_params};
use crate::stage::share::inputs;
use crate::train::{self, Checkpoint, Curve, Options, Schedule, Trainer};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

const BETA: Type = Type::Float { min: 0.0, max: 0.999_999, above: false };
pub const COUNT: Type = Type::Int { min: 1, max: 1 << 40 };
pub const FORMATS: &[&str] = &["chat", "s1", "text"];
pub const ENDS: &[&str] = &["one", "keep", "trl-0.24"];
pub const OVERLENGTH: &[&str] = &["error", "drop", "truncate"];
pub const SEED: Type = Type::Int { min: 0, max: i64::MAX };

/// Keys every training kind has, in the order of the schema. `model` and `data` come before them.
macro_rules! training_keys {
    ($($own:expr),* $(,)?) => {
        &[
            Key::required("model", Type::Ref(&[ArtifactType::Model]), "The model, or the model with an adapter, training starts from."),
            Key::required("data", Type::Ref(&[ArtifactType::Dataset]), "The records trained on."),
            $($own,)*
            Key::default("epochs", Type::Float { min: 0.0, max: 1e6, above: true }, "1.0", "Passes over the data; a part of a pass is allowed."),
            Key::optional("max_steps", training::COUNT, "Optimizer updates; wins over `epochs`."),
            Key::default("batch_size", training::COUNT, "1", "Examples per optimizer update."),
            Key::default("micro_batch_tokens", training::COUNT, "4096", "A batch is worked through in parts of at most this many tokens (one example at least)."),
            Key::required("learning_rate", Type::Float { min: 0.0, max: 10.0, above: false }, "Highest learning rate of the schedule."),
            Key::default("schedule", Type::Table(training::SCHEDULE), "{}", "How the learning rate moves over the steps."),
            Key::default("optimizer", Type::Table(training::OPTIMIZER), "{}", "How gradients become updates."),
            Key::optional("lora", Type::Table(training::LORA), "Train an adapter of this shape; absent: train every weight."),
            Key::default("adapter", Type::Choice(&["new", "continue"]), "\"new\"", "If `model` has an adapter: fold it into the weights and put a new one on top, or train it further."),
            Key::default("format", Type::Choice(training::FORMATS), "\"chat\"", "How a record becomes tokens: the model's chat template, the s1 think/answer layout, or text as it stands."),
            Key::default("eos", Type::Choice(training::ENDS), "\"one\"", "`one`: every completion ends with exactly one end token; `keep`: as the text has it; `trl-0.24`: as that version appends it."),
            Key::required("max_tokens", training::COUNT, "Longest example, in tokens, prompt and completion together."),
            Key::default("on_overlength", Type::Choice(training::OVERLENGTH), "\"error\"", "What to do with longer examples."),
            Key::default("truncate_side", Type::Choice(&["left", "right"]), "\"right\"", "The side on which `on_overlength = \"truncate\"` cuts."),
            Key::default("shuffle", Type::Bool, "true", "Whether each epoch has its own order."),
            Key::default("seed", training::SEED, "0", "Seed of the order and of a new adapter."),
            Key::default("dtype", Type::Choice(&["f32", "bf16"]), "\"f32\"", "How frozen weights are held."),
            Key::default("checkpointing", Type::Choice(&["none", "layers", "fit"]), "\"layers\"", "`layers` keeps one activation per layer and computes the rest again in the backward pass: less memory, same bits. `fit` does so for as few layers as the device's free memory asks for, micro-batch by micro-batch; on the CPU for none if half of the available memory is enough, else for all.").no_result(),
            Key::default("offload", Type::Bool, "false", "Keep the activation of each layer in the host's memory until the backward pass: less device memory, same bits. Steps of a shape that comes again are not captured as CUDA graphs then. On the CPU it changes nothing.").no_result(),
            Key::optional("save_every_epochs", Type::Float { min: 0.0, max: 1e6, above: true }, "Keep a checkpoint in the artifact at the start, each time this many epochs are done and at the end, for `probe`."),
            Key::optional("save_every_steps", training::COUNT, "The same, counted in steps."),
            Key::default("keep_gradients", Type::List(&training::COUNT), "[]", "Steps (from 1) whose gradients, before clipping, are kept in the artifact as `gradients/step-000001.safetensors`."),
            Key::default("resume_every_s", Type::Int { min: 0, max: 86400 }, "60", "Seconds between the states an interrupted run resumes from.").no_result(),
        ]
    };
}
pub(in crate::stage) use training_keys;

pub const SCHEDULE: &[Key] = &[
    Key::default(
        "kind",
        Type::Choice(&["constant", "linear", "cosine", "cosine-restarts"]),
        "\"constant\"",
        "Shape of the learning rate over the steps, after the warm-up; as in transformers.",
    ),
    Key::default(
        "warmup_ratio",
        Type::Float { min: 0.0, max: 1.0, above: false },
        "0.0",
        "Part of all steps spent warming up from 0; rounded up.",
    ),
    Key::optional("warmup_steps", Type::Int { min: 0, max: 1 << 40 }, "Steps of warm-up; wins over `warmup_ratio`."),
    Key::default("cycles", Type::Int { min: 1, max: 1000 }, "1", "Restarts of `cosine-restarts`."),
];

pub const OPTIMIZER: &[Key] = &[
    Key::default(
        "kind",
        Type::Choice(&["adamw", "adamw-8bit"]),
        "\"adamw\"",
        "`adamw-8bit` keeps block-wise quantised states.",
    ),
    Key::default("beta1", BETA, "0.9", "Decay of the mean of gradients."),
    Key::default("beta2", BETA, "0.999", "Decay of the mean of squared gradients."),
    Key::default(
        "epsilon",
        Type::Float { min: 0.0, max: 1.0, above: true },
        "1e-8",
        "Added to the root of the second moment.",
    ),
    Key::default(
        "weight_decay",
        Type::Float { min: 0.0, max: 10.0, above: false },
        "0.0",
        "Decoupled weight decay of matrices.",
    ),
    Key::default(
        "clip_norm",
        Type::Float { min: 0.0, max: 1e9, above: true },
        "1.0",
        "Gradients are scaled down to this L2 norm.",
    ),
];

pub const LORA: &[Key] = &[
    Key::required("rank", Type::Int { min: 1, max: 65536 }, "Rank r of the update B A."),
    Key::required("alpha", Type::Float { min: 0.0, max: 1e6, above: true }, "The update is scaled by alpha / rank."),
    Key::default(
        "targets",
        Type::List(&Type::Choice(&family::TARGETS)),
        family::LAYER_TARGETS,
        "The linear layers that carry an adapter, in every decoder layer.",
    ),
];

/// The keys of [`training_keys`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub epochs: f64,
    pub max_steps: Option<u64>,
    pub batch_size: usize,
    pub micro_batch_tokens: usize,
    learning_rate: f64,
    schedule: ScheduleSpec,
    pub optimizer: OptimizerSpec,
    pub lora: Option<LoraSpec>,
    pub adapter: String,
    pub format: Format,
    pub eos: Eos,
    pub max_tokens: usize,
    pub on_overlength: Overlength,
    truncate_side: Side,
    pub shuffle: bool,
    pub seed: u64,
    pub dtype: inputs::Storage,
    pub checkpointing: String,
    pub offload: bool,
    pub save_every_epochs: Option<f64>,
    pub save_every_steps: Option<u64>,
    pub keep_gradients: Vec<u64>,
    pub resume_every_s: u64,
}

/// The shared keys, and those named `own` as the stage's own struct. `label`: whose they are, for messages.
pub fn specs<Own: DeserializeOwned>(label: &str, params: &Params, own: &[&str]) -> Result<(Spec, Own), Problem> {
    let (mine, shared): (Params, Params) = params.clone().into_iter().partition(|(key, _)| own.contains(&key.as_str()));
    Ok((read_params(label, shared)?, read_params(label, mine)?))
}

impl Spec {
    /// The model at the start: earlier adapters folded in, the trained one attached.
    pub fn model(&self, ctx: &Context) -> Result<Placed, Problem> {
        let continues = self.lora.is_some() && self.adapter == "continue";
        let options = LoadOptions { dtype: self.dtype.dtype(), fold_last: !continues };
        let mut model = Model::load(&inputs::chain(ctx, "model"), &options)?;
        match (&self.lora, model.lora()) {
            (None, _) => model.train_all()?,
            (Some(lora), None) => model.add_lora(lora, self.seed)?,
            (Some(lora), Some(there)) if lora.is(there) => {}
            (Some(lora), Some(there)) => {
                return Err(Problem::new(
                    "train::other_adapter",
                    format!("`{}` continues an adapter of another shape than `lora` says", ctx.label),
                )
                .note(format!(
                    "there: rank {}, alpha {}, targets {}",
                    there.rank,
                    there.alpha,
                    there.targets.join(", ")
                ))
                .note(format!("asked: rank {}, alpha {}, targets {}", lora.rank, lora.alpha, lora.targets.join(", ")))
                .help("write the shape that is there, or `adapter = \"new\"` to fold it in and put a new one on top"));
            }
        }
        let recompute = match self.checkpointing.as_str() {
            "none" => Recompute::None,
            "fit" => Recompute::Fit,
            _ => Recompute::All,
        };
        Placed::with(model, &ctx.device, Policy { recompute, offload: self.offload, ..Policy::default() })
    }

    pub fn limits(&self) -> Limits {
        Limits {
            max_tokens: Some(self.max_tokens),
            on_overlength: self.on_overlength,
            truncate_side: self.truncate_side,
            eos: self.eos,
            ..Limits::default()
        }
    }

    pub fn steps(&self, examples: usize) -> Steps {
        Steps::new(examples, self.batch_size, self.epochs, self.max_steps)
    }

    /// The batches of a run over this many samples.
    pub fn batches(&self, samples: usize) -> Batches {
        let Spec { seed, shuffle, batch_size, .. } = *self;
        let per_epoch = self.steps(samples).per_epoch;
        Batches { samples, seed, shuffle, batch_size, per_epoch, epoch: None, order: Vec::new() }
    }

    /// The learning rate of each step.
    pub fn schedule(&self, steps: Steps) -> Schedule {
        self.schedule.over(self.learning_rate, steps.total)
    }

    /// The steps after which a checkpoint is kept.
    pub fn saved(&self, steps: Steps) -> BTreeSet<u64> {
        steps.saved(self.save_every_epochs, self.save_every_steps)
    }
}

/// Which of the chain's parts the result replaces.
pub fn lineage(params: &Params) -> Lineage {
    match (params.contains_key("lora"), params.get("adapter").and_then(Value::as_str)) {
        (false, _) => Lineage::Whole,
        (true, Some("continue")) => Lineage::Continues,
        (true, _) => Lineage::OnTop,
    }
}

/// The adapter that a training stage adds.
pub fn adapter(params: &Params, _: Option<&Path>) -> Option<LoraSpec> {
    LoraSpec::deserialize(params.get("lora")?).ok()
}

/// What is said of a training stage that ends early.
pub const STAYS: &str = "the last state that was kept stays: the next run goes on from it";

/// Rules between the shared keys.
pub fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    if params.contains_key("save_every_epochs") && params.contains_key("save_every_steps") {
        broken.push(Broken {
            key: "save_every_steps",
            message: "`save_every_epochs` and `save_every_steps` exclude each other".into(),
            help: "keep one of them".into(),
        });
    }
    if params.get("adapter").and_then(Value::as_str) == Some("continue") && !params.contains_key("lora") {
        broken.push(Broken {
            key: "adapter",
            message: "`adapter = \"continue\"` needs `lora`, the shape of the adapter that is continued".into(),
            help: "add `lora = { rank = .., alpha = .. }`, or leave `adapter` out to train every weight".into(),
        });
    }
    broken
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSpec {
    kind: String,
    warmup_ratio: f64,
    warmup_steps: Option<u64>,
    cycles: u32,
}

impl ScheduleSpec {
    pub fn over(&self, learning_rate: f64, total_steps: u64) -> Schedule {
        let curve = match self.kind.as_str() {
            "linear" => Curve::Linear,
            "cosine" => Curve::Cosine,
            "cosine-restarts" => Curve::CosineRestarts { cycles: f64::from(self.cycles) },
            _ => Curve::Constant,
        };
        let mut schedule = Schedule::new(curve, learning_rate, self.warmup_ratio, total_steps);
        if let Some(steps) = self.warmup_steps {
            schedule.warmup_steps = steps;
        }
        schedule
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSpec {
    kind: String,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    pub clip_norm: f64,
}

impl OptimizerSpec {
    /// The optimizer that is named.
    pub fn kind(&self) -> train::Kind {
        if self.kind == "adamw-8bit" { train::Kind::AdamW8bit } else { train::Kind::AdamW }
    }

    /// A model in training, with states for all that it trains.
    pub fn over(&self, model: Placed) -> Result<Trainer, Problem> {
        let options =
            Options { beta1: self.beta1, beta2: self.beta2, epsilon: self.epsilon, weight_decay: self.weight_decay };
        Trainer::new(model, self.kind(), options)
    }
}

/// Steps of a run, and what each of them is over. A function of counts alone, so that a resumed run
/// needs to know nothing but its step.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    pub per_epoch: u64,
    pub total: u64,
}

impl Steps {
    pub fn new(examples: usize, batch_size: usize, epochs: f64, max_steps: Option<u64>) -> Steps {
        let per_epoch = examples.div_ceil(batch_size) as u64;
        // A hair below, so that 3 epochs of 7 steps are not 22 for want of an exact product.
        let whole = (epochs * per_epoch as f64 - 1e-9).ceil().max(1.0) as u64;
        Steps { per_epoch, total: max_steps.unwrap_or(whole) }
    }

    /// Epochs done after `step` updates.
    pub fn epochs(&self, step: u64) -> f64 {
        step as f64 / self.per_epoch as f64
    }

    /// The steps after which a checkpoint is kept; empty without either key.
    pub fn saved(&self, every_epochs: Option<f64>, every_steps: Option<u64>) -> BTreeSet<u64> {
        let mut steps = BTreeSet::new();
        let every = match (every_epochs, every_steps) {
            (Some(epochs), _) => epochs * self.per_epoch as f64,
            (None, Some(steps)) => steps as f64,
            (None, None) => return steps,
        };
        let points = (self.total as f64 / every).floor() as u64;
        steps.extend((0..=points).map(|point| (point as f64 * every).round() as u64).filter(|s| *s <= self.total));
        steps.insert(self.total);
        steps
    }
}

/// The batches of a run, each epoch's made once: a function of the step alone, whichever comes first.
pub struct Batches {
    samples: usize,
    seed: u64,
    shuffle: bool,
    batch_size: usize,
    per_epoch: u64,
    /// The epoch whose order is there, from 0.
    epoch: Option<u64>,
    order: Vec<usize>,
}

impl Batches {
    /// Which samples step `step`, from 0, is over.
    pub fn of(&mut self, step: u64) -> &[usize] {
        let epoch = step / self.per_epoch;
        if self.epoch != Some(epoch) {
            self.order = data::epoch_order(self.samples, self.seed, epoch, self.shuffle);
            self.epoch = Some(epoch);
        }
        let start = (step % self.per_epoch) as usize * self.batch_size;
        &self.order[start..self.samples.min(start + self.batch_size)]
    }
}

/// Samples put in a row, as the model takes them.
pub struct Packed {
    ids: Vec<u32>,
    lengths: Vec<usize>,
    rows: Vec<usize>,
    targets: Vec<u32>,
    /// Targets of each sequence.
    counts: Vec<usize>,
}

impl Packed {
    pub fn new<'s>(samples: impl Iterator<Item = &'s Sample>) -> Packed {
        let mut packed = Packed { ids: vec![], lengths: vec![], rows: vec![], targets: vec![], counts: vec![] };
        for sample in samples {
            let (start, before) = (packed.ids.len(), packed.rows.len());
            for (t, _) in sample.learned.iter().enumerate().filter(|(_, learned)| **learned) {
                // The hidden state of the token before predicts it; the first token is never learned.
                packed.rows.push(start + t - 1);
                packed.targets.push(sample.ids[t]);
            }
            packed.ids.extend_from_slice(&sample.ids);
            packed.lengths.push(sample.ids.len());
            packed.counts.push(packed.rows.len() - before);
        }
        packed
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }

    /// The log-probs of each sequence's targets.
    pub fn per_sequence<'l>(&self, mut logprobs: &'l [f32]) -> Vec<&'l [f32]> {
        let split = |count: &usize| {
            let (head, tail) = logprobs.split_at(*count);
            logprobs = tail;
            head
        };
        self.counts.iter().map(split).collect()
    }

    /// Their sums, in f64.
    pub fn sequence_sums(&self, logprobs: &[f32]) -> Vec<f64> {
        let sum = |side: &[f32]| side.iter().map(|&logprob| f64::from(logprob)).sum();
        self.per_sequence(logprobs).into_iter().map(sum).collect()
    }
}

/// `Err` if a sample holds an id the embedding has no row for.
pub fn check_ids<'s>(config: &Config, samples: impl Iterator<Item = &'s Sample>) -> Result<(), Problem> {
    for sample in samples {
        config.check_ids(&sample.ids).map_err(|problem| problem.note(format!("record `{}`", sample.id)))?;
    }
    Ok(())
}

/// Tokens of both sides of a pair.
pub fn pair_tokens(pair: &Pair) -> usize {
    pair.chosen.ids.len() + pair.rejected.ids.len()
}

/// What survives an interruption: the log so far, the kept checkpoints and the state to go on from.
pub struct Session<'a> {
    ctx: &'a Context<'a>,
    states: Checkpoint,
    log: Vec<Value>,
    every: Duration,
    last: Instant,
}

impl<'a> Session<'a> {
    /// Goes on from the last state in the work folder, if there is one. Returns the updates done.
    pub fn resume(ctx: &'a Context<'a>, trainer: &mut Trainer, every_s: u64) -> Result<(Session<'a>, u64), Problem> {
        let states = Checkpoint::in_folder(&ctx.work.join("resume"))?;
        let restored = trainer.restore(&states)?;
        let mut session =
            Session { ctx, states, log: Vec::new(), every: Duration::from_secs(every_s), last: Instant::now() };
        let Some(restored) = restored else { return Ok((session, 0)) };
        for damaged in &restored.ignored {
            ctx.progress.warn(&format!("a state to resume from was left aside: {}", damaged.message));
        }
        session.log = restored.caller.as_array().cloned().unwrap_or_default();
        ctx.progress.warn(&format!("resumed after step {}", restored.step));
        Ok((session, restored.step))
    }

    /// Notes a finished update; keeps the state when it is time, or when the user has asked to stop.
    pub fn finish_step(&mut self, trainer: &Trainer, step: u64, line: Value) -> Result<(), Problem> {
        self.log.push(line);
        let stopped = self.ctx.stopped();
        if stopped.is_err() || self.last.elapsed() >= self.every {
            trainer.save(&self.states, step, Value::Array(self.log.clone()))?;
            self.last = Instant::now();
        }
        stopped
    }

    /// Keeps the weights after `step` updates among the artifact's checkpoints. Doing it again, after
    /// a resume from before that step, writes the same bytes.
    pub fn keep(&self, trainer: &Trainer, step: u64, epoch: f64) -> Result<(), Problem> {
        let dir = self.ctx.work.join("checkpoints").join(format!("step-{step:06}"));
        create(&dir)?;
        save_trained(trainer, &dir)?;
        let about = json!({ "step": step, "epoch": epoch });
        write(&dir.join("checkpoint.json"), format!("{about}\n").as_bytes())
    }

    /// Keeps the gradients of a step, named as the tensors they belong to, among the artifact's files.
    pub fn keep_gradients(&self, trainer: &mut Trainer, step: u64) -> Result<(), Problem> {
        let dir = self.ctx.work.join("gradients");
        create(&dir)?;
        let tensors = trainer.tensors();
        let path = dir.join(format!("step-{step:06}.safetensors"));
        let grads = trainer.gradients()?;
        safetensors::write(&path, Element::F32, &tensors, |i| Ok(Cow::Borrowed(grads.values[i].as_slice())))
    }

    /// Puts weights, log, checkpoints and gradients into the output folder.
    pub fn publish(self, trainer: Trainer) -> Result<(), Problem> {
        save_trained(&trainer, self.ctx.out)?;
        if trainer.lora().is_none() {
            for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
                if let Some(from) = self.ctx.inputs("model")[0].files.get(name) {
                    let to = self.ctx.out.join(name);
                    fs::copy(from, &to).map_err(|error| Problem::io("stage::unwritable", "write", &to, &error))?;
                }
            }
        }
        let lines: String = self.log.iter().map(|line| format!("{line}\n")).collect();
        write(&self.ctx.out.join("log.jsonl"), lines.as_bytes())?;
        // Linked, not moved: until the artifact is published, a kill must find them in the work folder.
        for folder in ["checkpoints", "gradients"] {
            let kept = self.ctx.work.join(folder);
            if !kept.exists() {
                continue;
            }
            let files =
                Files::from_dir(&kept).map_err(|error| Problem::io("stage::unreadable", "read", &kept, &error))?;
            for (name, from) in files.iter() {
                let to = self.ctx.out.join(folder).join(name);
                create(to.parent().unwrap_or(self.ctx.out))?;
                fs::hard_link(from, &to)
                    .or_else(|_| fs::copy(from, &to).map(drop))
                    .map_err(|error| Problem::io("stage::unwritable", "write", &to, &error))?;
            }
        }
        Ok(())
    }
}

fn save_trained(trainer: &Trainer, dir: &Path) -> Result<(), Problem> {
    load::save_trained(trainer.config(), trainer.lora(), &trainer.params()?, dir, "base")
}

fn create(dir: &Path) -> Result<(), Problem> {
    fs::create_dir_all(dir).map_err(|error| Problem::io("stage::unwritable", "make the folder", dir, &error))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Problem> {
    fs::File::create(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| Problem::io("stage::unwritable", "write", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_over_the_same_samples_whichever_steps_came_before_it() {
        let (samples, seed, shuffle, batch_size, per_epoch) = (7, 3, true, 3, 3);
        let fresh = || Batches { samples, seed, shuffle, batch_size, per_epoch, epoch: None, order: Vec::new() };
        let mut batches = fresh();
        for step in [0, 1, 2, 3, 4, 5, 1, 8] {
            let order = data::epoch_order(samples, seed, step / per_epoch, shuffle);
            let expected = &data::batches(&order, batch_size)[(step % per_epoch) as usize];
            assert_eq!(batches.of(step), expected, "step {step}");
            assert_eq!(fresh().of(step), expected, "step {step}, resumed");
        }
    }
}
