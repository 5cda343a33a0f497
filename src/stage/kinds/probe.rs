//! `probe`: log-probs of given completions, per token, under a model or under every checkpoint of a
//! training stage.
//!
//! ALP(y) is the mean over examples of the mean over the first `max_completion_tokens` tokens of
//! log p(y_t | x, y_<t). Of preferences both sides are measured, and the margin is ALP(chosen) -
//! ALP(rejected); of other records the one completion, with the negative log-likelihood per token, which is
//! what a training stage calls its loss. Per-token values are stored, so that every other aggregate is a
//! re-reading and not a re-run.

use crate::data::{self, Eos, Format, Limits, Overlength, Pair, Sample};
use crate::files::Files;
use crate::manifest::spec::{ArtifactType, Key, Kind, Params, Type, no_lineage, no_rules};
use crate::model::memory::{Plan, Trained, Work};
use crate::model::{LoadOptions, Model, Placed};
use crate::problem::Problem;
use crate::safetensors::{self, Element};
use crate::stage::context::{Context, read_params};
use crate::stage::forecast::needs::{Computes, Cut, Data, HALVE, Needs, Shape, Taking, shorten, untie};
use crate::stage::kind::{Forecast, StageKind};
use crate::stage::share::inputs;
use crate::stage::share::training::{self, Packed};
use serde::Deserialize;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "probe",
    about: "log-probabilities of given completions, at one model or at every checkpoint",
    recipe: 1,
    yields: ArtifactType::Measurements,
    keys: &[
        Key::required(
            "model",
            Type::Ref(&[ArtifactType::Model]),
            "The model, or the training stage whose checkpoints are measured.",
        ),
        Key::required(
            "data",
            Type::Ref(&[ArtifactType::Dataset]),
            "Preference records (`chosen` and `rejected`), or records with one completion, as a training stage takes them.",
        ),
        Key::default(
            "checkpoints",
            Type::Bool,
            "false",
            "Measure every checkpoint the training stage kept, not its end alone.",
        ),
        Key::default(
            "max_completion_tokens",
            training::COUNT,
            "1000",
            "Only this many tokens of a completion count, from the first on.",
        ),
        Key::default(
            "logits",
            Type::Bool,
            "false",
            "Also write `logits.safetensors`: f32 [tokens, vocabulary] of every sequence, named `final/ID` (`step-000010/ID` with `checkpoints`; `.../chosen`, `.../rejected` for preferences). Large.",
        ),
        Key::default(
            "hidden_states",
            Type::Bool,
            "false",
            "Also write `hidden_states.safetensors`: f32 [layers + 2, tokens, hidden], the residual stream as embedded, after each layer, and after the final norm.",
        ),
        Key::default(
            "format",
            Type::Choice(training::FORMATS),
            "\"chat\"",
            "How a record becomes tokens; as in the training stage.",
        ),
        Key::default("eos", Type::Choice(training::ENDS), "\"one\"", "As in the training stage."),
        Key::required("max_tokens", training::COUNT, "Longest example, in tokens, prompt and completion together."),
        Key::default(
            "on_overlength",
            Type::Choice(training::OVERLENGTH),
            "\"error\"",
            "What to do with longer examples.",
        ),
        Key::default("dtype", Type::Choice(&["f32", "bf16"]), "\"f32\"", "How weights are held."),
        Key::default(
            "micro_batch_tokens",
            training::COUNT,
            "4096",
            "Tokens worked on at once; examples do not see each other.",
        )
        .no_result(),
    ],
    floats: true,
    lineage: no_lineage,
    rules: no_rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { data: Some("data"), forecast, ..StageKind::new(&KIND, run) };

fn forecast(params: &Params) -> Option<Forecast> {
    Some(Forecast::Other(Box::new(read_params::<Spec>(KIND.name, params.clone()).ok()?)))
}

impl Spec {
    fn cut(&self) -> Cut {
        let Spec { max_tokens, micro_batch_tokens, .. } = *self;
        Cut { sides: 2, max_tokens, batch_size: None, micro_batch_tokens, micro_batch_size: None }
    }
}

impl Computes for Spec {
    fn needs(&self, shape: &Shape, data: Option<Data>, on_device: bool) -> Needs {
        let mut config = shape.config.clone();
        let folded = shape.adapters.len().saturating_sub(1);
        untie(&mut config, &shape.adapters[..folded]);
        let trained = shape.adapters.last().map_or(Trained::Nothing, Trained::Adapter);
        let of = |extent| {
            let work = Work::Measure { extent, logits: self.logits, hidden_states: self.hidden_states };
            Plan { config: &config, dtype: self.dtype.dtype(), trained, on_device, work }.need()
        };
        let (surely, most) = self.cut().micro_batches(data);
        Needs { surely: of(surely), most: of(most), takes_more: false, steps: None, disk: 0 }
    }

    fn advice(&self, _on_device: bool) -> Vec<String> {
        let halve = (self.dtype == inputs::Storage::F32).then(|| HALVE.to_string());
        self.cut().advice().into_iter().chain(halve).chain([shorten(self.max_tokens)]).collect()
    }

    fn takes(&self) -> Option<Taking> {
        let Spec { format, eos, max_tokens, on_overlength, .. } = *self;
        Some(Taking { format, eos, max_tokens, on_overlength, allow_unlearned: true })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    checkpoints: bool,
    max_completion_tokens: usize,
    logits: bool,
    hidden_states: bool,
    format: Format,
    eos: Eos,
    max_tokens: usize,
    on_overlength: Overlength,
    dtype: inputs::Storage,
    micro_batch_tokens: usize,
}

/// One model to be measured.
struct Point {
    name: String,
    step: Option<u64>,
    epoch: Option<f64>,
    chain: Vec<Files>,
}

/// A record to be measured: its one completion, or a preference's two.
struct Example {
    id: String,
    sides: Vec<Sample>,
}

impl Example {
    fn tokens(&self) -> usize {
        self.sides.iter().map(|side| side.ids.len()).sum()
    }
}

/// What the sides of a preference are called, in files and columns.
const SIDES: [&str; 2] = ["chosen", "rejected"];

/// Writes `measurements.jsonl` and `logprobs.jsonl`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let examples = examples(ctx, &spec)?;
    let points = points(ctx, spec.checkpoints)?;
    ctx.progress.begin((points.len() * examples.len()) as u64, "examples");
    let (mut measurements, mut tokens) = (Vec::new(), Vec::new());
    for (number, point) in points.iter().enumerate() {
        let chain: Vec<&Files> = point.chain.iter().collect();
        let model = Model::load(&chain, &LoadOptions { dtype: spec.dtype.dtype(), fold_last: false })?;
        let model = Placed::new(model, &ctx.device)?;
        training::check_ids(model.config(), examples.iter().flat_map(|example| &example.sides))?;
        let mut sums = vec![Sums::default(); examples[0].sides.len()];
        let lengths: Vec<usize> = examples.iter().map(Example::tokens).collect();
        for part in data::micro_batches(&lengths, spec.micro_batch_tokens) {
            let done = number * examples.len() + part.end;
            let part = &examples[part];
            let packed = Packed::new(part.iter().flat_map(|example| &example.sides));
            let logprobs = model.logprobs(&packed.batch())?;
            for (example, sides) in part.iter().zip(packed.per_sequence(&logprobs).chunks_exact(sums.len())) {
                sums.iter_mut().zip(sides).for_each(|(sums, side)| sums.add(side));
                let mut line = json!({ "checkpoint": point.name, "id": example.id });
                match sides {
                    [one] => line["logprobs"] = json!(one),
                    sides => SIDES.iter().zip(sides).for_each(|(name, side)| line[name] = json!(side)),
                }
                tokens.push(line);
            }
            ctx.progress.at(done as u64);
            ctx.stopped()?;
        }
        let measurement = point.measurement(&sums, examples.len())?;
        ctx.progress.note(&format!("{}  {}", point.name, headline(&measurement)));
        measurements.push(measurement);
        if spec.logits || spec.hidden_states {
            write_insides(ctx, &spec, &point.name, &model, &examples)?;
        }
    }
    inputs::write_lines(&ctx.out.join("measurements.jsonl"), &measurements)?;
    inputs::write_lines(&ctx.out.join("logprobs.jsonl"), &tokens)
}

/// The records as tokens, each completion cut to the tokens that count.
fn examples(ctx: &Context, spec: &Spec) -> Result<Vec<Example>, Problem> {
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let records = inputs::records(ctx, "data")?;
    let limits = Limits {
        max_tokens: Some(spec.max_tokens),
        on_overlength: spec.on_overlength,
        eos: spec.eos,
        allow_unlearned: spec.logits || spec.hidden_states,
        ..Limits::default()
    };
    let cut = |sample| capped(sample, spec.max_completion_tokens);
    if records.first().is_some_and(data::is_preference) {
        let (pairs, notes) = data::pairs(&records, &tokenizer, spec.format, &limits)?;
        inputs::warn(ctx, &notes);
        let both = |pair: Pair| Example { id: pair.id, sides: vec![cut(pair.chosen), cut(pair.rejected)] };
        return Ok(pairs.into_iter().map(both).collect());
    }
    let (samples, notes) = data::samples(&records, &tokenizer, spec.format, &limits)?;
    inputs::warn(ctx, &notes);
    Ok(samples.into_iter().map(|sample| Example { id: sample.id.clone(), sides: vec![cut(sample)] }).collect())
}

/// Over the completions of one side.
#[derive(Debug, Clone, Default)]
struct Sums {
    /// Of the completions' mean log-probs.
    means: f64,
    /// Completions with a token that counts.
    completions: usize,
    /// Of all tokens' log-probs.
    logprobs: f64,
    tokens: usize,
}

impl Sums {
    fn add(&mut self, logprobs: &[f32]) {
        if logprobs.is_empty() {
            return;
        }
        let sum: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
        self.means += sum / logprobs.len() as f64;
        self.completions += 1;
        self.logprobs += sum;
        self.tokens += logprobs.len();
    }

    /// The mean of means; `None` if no token counted.
    fn alp(&self) -> Option<f64> {
        (self.completions > 0).then(|| self.means / self.completions as f64)
    }

    /// Cross-entropy per token, in nats: the loss of training.
    fn nll(&self) -> Option<f64> {
        (self.tokens > 0).then(|| -self.logprobs / self.tokens as f64)
    }
}

impl Point {
    /// The line of this model in `measurements.jsonl`.
    fn measurement(&self, sums: &[Sums], examples: usize) -> Result<Value, Problem> {
        if sums.iter().any(|sums| !sums.logprobs.is_finite()) {
            return Err(Problem::new(
                "probe::not_finite",
                format!("`{}` gives log-probs that are not numbers", self.name),
            )
            .help("look at the training log of the model: `pipe show`"));
        }
        let mut line = json!({ "checkpoint": self.name, "step": self.step, "epoch": self.epoch });
        match sums {
            [one] => {
                line["alp"] = json!(one.alp());
                line["nll"] = json!(one.nll());
                line["tokens"] = json!(one.tokens);
            }
            sides => {
                for (name, side) in SIDES.iter().zip(sides) {
                    line[format!("alp_{name}")] = json!(side.alp());
                }
                let margin = sides[0].alp().zip(sides[1].alp()).map(|(chosen, rejected)| chosen - rejected);
                line["margin"] = json!(margin);
            }
        }
        line["examples"] = json!(examples);
        Ok(line)
    }
}

/// The one number shown while a probe runs.
fn headline(measurement: &Value) -> String {
    let name = if measurement.get("margin").is_some() { "margin" } else { "alp" };
    measurement[name].as_f64().map_or(String::new(), |value| format!("{name} {value:.4}"))
}

/// Only the first `cap` learned tokens of a completion.
fn capped(mut sample: Sample, cap: usize) -> Sample {
    if let Some((last, _)) = sample.learned.iter().enumerate().filter(|(_, learned)| **learned).nth(cap - 1) {
        sample.ids.truncate(last + 1);
        sample.learned.truncate(last + 1);
    }
    sample
}

/// Logits `[T, V]` and hidden states `[layers + 2, T, H]` of every sequence, one at a time.
fn write_insides(ctx: &Context, spec: &Spec, point: &str, model: &Placed, examples: &[Example]) -> Result<(), Problem> {
    let mut names = Vec::new();
    let mut sequences = Vec::new();
    for example in examples {
        for (side, name) in example.sides.iter().zip(SIDES) {
            let one = format!("{point}/{}", example.id);
            names.push(if example.sides.len() == 1 { one } else { format!("{one}/{name}") });
            sequences.push(side.ids.as_slice());
        }
    }
    let config = model.config();
    let path = |what: &str| match spec.checkpoints {
        true => ctx.out.join(format!("{what}-{point}.safetensors")),
        false => ctx.out.join(format!("{what}.safetensors")),
    };
    let shapes = |shape: &dyn Fn(usize) -> Vec<usize>| -> Vec<(String, Vec<usize>)> {
        names.iter().cloned().zip(sequences.iter().map(|ids| shape(ids.len()))).collect()
    };
    if spec.logits {
        let tensors = shapes(&|tokens| vec![tokens, config.vocab_size]);
        safetensors::write(&path("logits"), Element::F32, &tensors, |i| {
            ctx.stopped()?;
            Ok(Cow::Owned(model.logits(sequences[i])?))
        })?;
    }
    if spec.hidden_states {
        let states = config.num_hidden_layers + 2;
        let tensors = shapes(&|tokens| vec![states, tokens, config.hidden_size]);
        safetensors::write(&path("hidden_states"), Element::F32, &tensors, |i| {
            ctx.stopped()?;
            Ok(Cow::Owned(model.hidden_states(sequences[i])?.concat()))
        })?;
    }
    Ok(())
}

/// The model itself, or what its training stage kept, in step order.
fn points(ctx: &Context, checkpoints: bool) -> Result<Vec<Point>, Problem> {
    let chain = ctx.inputs("model");
    let Some((last, before)) = chain.split_last() else {
        return Err(Problem::new("probe::model", format!("`{}` has no model", ctx.label)));
    };
    let with = |files: Files| before.iter().map(|artifact| artifact.files.clone()).chain([files]).collect();
    if !checkpoints {
        return Ok(vec![Point { name: "final".into(), step: None, epoch: None, chain: with(last.files.clone()) }]);
    }
    let kept = last.files.below("checkpoints");
    let mut points = Vec::new();
    for (name, path) in kept.iter() {
        let Some(name) = name.strip_suffix("/checkpoint.json") else { continue };
        let text = fs::read_to_string(path).map_err(|error| Problem::io("probe::unreadable", "read", path, &error))?;
        let about: Value = serde_json::from_str(&text)
            .map_err(|error| Problem::new("probe::unreadable", format!("`{}`: {error}", path.display())))?;
        let mut files = kept.below(name);
        for (other, path) in last.files.iter().filter(|(other, _)| other.starts_with("tokenizer")) {
            files.insert(other, path);
        }
        points.push(Point {
            name: name.to_string(),
            step: about["step"].as_u64(),
            epoch: about["epoch"].as_f64(),
            chain: with(files),
        });
    }
    points.sort_by_key(|point| point.step);
    if points.is_empty() {
        return Err(Problem::new("probe::no_checkpoints", format!("`{}` kept no checkpoints", last.stage))
            .help(format!("`save_every_epochs = 1` in [stage.{}]", last.stage)));
    }
    Ok(points)
}
