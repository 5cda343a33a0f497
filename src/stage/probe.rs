//! `probe`: log-probs of given completions, per token, under a model or under every checkpoint of a
//! training stage.
//!
//! ALP(y) is the mean over examples of the mean over the first `max_completion_tokens` tokens of
//! log p(y_t | x, y_<t); the margin is ALP(chosen) - ALP(rejected). Per-token values are stored, so that
//! every other aggregate is a re-reading and not a re-run.

use super::Context;
use super::inputs;
use super::training::{self, Packed};
use crate::data::{self, Eos, Format, Limits, Overlength, Pair};
use crate::files::Files;
use crate::manifest::spec::{ArtifactType, Key, Kind, Type, no_lineage, no_rules};
use crate::model::{LoadOptions, Model};
use crate::problem::Problem;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs;

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
            "Preference records: `chosen` and `rejected` completions.",
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
            "Only the first so many tokens of a completion count.",
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    checkpoints: bool,
    max_completion_tokens: usize,
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

pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let limits = Limits {
        max_tokens: Some(spec.max_tokens),
        on_overlength: spec.on_overlength,
        eos: spec.eos,
        ..Limits::default()
    };
    let (pairs, notes) = data::pairs(&inputs::records(ctx, "data")?, &tokenizer, spec.format, &limits)?;
    inputs::warn(ctx, &notes);
    let pairs: Vec<Pair> = pairs.into_iter().map(|pair| capped(pair, spec.max_completion_tokens)).collect();

    let points = points(ctx, spec.checkpoints)?;
    ctx.progress.begin((points.len() * pairs.len()) as u64, "pairs");
    let (mut measurements, mut tokens) = (Vec::new(), Vec::new());
    for (number, point) in points.iter().enumerate() {
        let chain: Vec<&Files> = point.chain.iter().collect();
        let model = Model::load(&chain, &LoadOptions { dtype: spec.dtype.dtype(), fold_last: false })?;
        training::check_ids(&model, pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]))?;
        let mut alp = [0.0; 2];
        let mut done = 0;
        let lengths: Vec<usize> = pairs.iter().map(training::pair_tokens).collect();
        for part in data::micro_batches(&lengths, spec.micro_batch_tokens) {
            let part = &pairs[part];
            let packed = Packed::new(part.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]));
            let logprobs = model.logprobs(&packed.batch());
            for (pair, sides) in part.iter().zip(packed.per_sequence(&logprobs).chunks_exact(2)) {
                for (sum, side) in alp.iter_mut().zip(sides) {
                    *sum += side.iter().map(|&logprob| f64::from(logprob)).sum::<f64>() / side.len() as f64;
                }
                tokens.push(json!({
                    "checkpoint": point.name, "id": pair.id, "chosen": sides[0], "rejected": sides[1],
                }));
            }
            done += part.len();
            ctx.progress.at((number * pairs.len() + done) as u64);
            ctx.stopped()?;
        }
        let [chosen, rejected] = alp.map(|sum| sum / pairs.len() as f64);
        if !(chosen.is_finite() && rejected.is_finite()) {
            return Err(Problem::new(
                "probe::not_finite",
                format!("`{}` gives log-probs that are not numbers", point.name),
            )
            .help("look at the training log of the model: `pipe show`"));
        }
        ctx.progress.note(&format!("{}  margin {:.4}", point.name, chosen - rejected));
        measurements.push(json!({
            "checkpoint": point.name,
            "step": point.step,
            "epoch": point.epoch,
            "alp_chosen": chosen,
            "alp_rejected": rejected,
            "margin": chosen - rejected,
            "examples": pairs.len(),
        }));
    }
    inputs::write_lines(&ctx.out.join("measurements.jsonl"), &measurements)?;
    inputs::write_lines(&ctx.out.join("logprobs.jsonl"), &tokens)
}

/// Only the first `cap` learned tokens of either completion.
fn capped(mut pair: Pair, cap: usize) -> Pair {
    for side in [&mut pair.chosen, &mut pair.rejected] {
        if let Some((last, _)) = side.learned.iter().enumerate().filter(|(_, learned)| **learned).nth(cap - 1) {
            side.ids.truncate(last + 1);
            side.learned.truncate(last + 1);
        }
    }
    pair
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
