//! `sft`: cross-entropy on the learned tokens of completions; gradients into an adapter, or into
//! every weight when `lora` is absent.
//!
//! A step is one optimizer update over `batch_size` examples. Its loss is the sum over the learned
//! tokens of the whole batch divided by their number, however the batch is cut into micro-batches
//! (transformers since 4.46 with `num_items_in_batch`). Before that a step's loss was the mean of its
//! micro-batches' means, which gives the tokens of short examples more weight: `normalization =
//! "mean-of-means"` does so again, for results that were made that way.

use crate::data::{self, Sample};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type};
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::forecast::training::TrainingForecast;
use crate::stage::kind::{Forecast, StageKind};

use crate::stage::share::inputs;
use crate::stage::share::training::{self, Packed, Session, Spec, training_keys};
use crate::train::require_finite;
use serde::Deserialize;
use serde_json::json;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "sft",
    about: "supervised fine-tuning on completions: LoRA, or every weight",
    recipe: 1,
    yields: ArtifactType::Model,
    keys: training_keys![
        Key::default(
            "normalization",
            Type::Choice(&["tokens", "mean-of-means"]),
            "\"tokens\"",
            "What a step's loss is the mean over: the learned tokens of the whole batch, or the means of its micro-batches (transformers before 4.46).",
        ),
        Key::optional(
            "micro_batch_size",
            training::COUNT,
            "Examples per micro-batch, in place of `micro_batch_tokens`; `mean-of-means` needs it, because its result depends on the cut.",
        ),
    ],
    floats: true,
    lineage: training::lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind {
    data: Some("data"),
    forecast,
    stays: Some(training::STAYS),
    adapter: training::adapter,
    ..StageKind::new(&KIND, run)
};

/// The keys that are its own.
const OWN: &[&str] = &["normalization", "micro_batch_size"];

fn forecast(params: &Params) -> Option<Forecast> {
    let (spec, own): (Spec, Own) = training::specs(KIND.name, params, OWN).ok()?;
    let (limits, micro_batch_size) = (spec.limits(), own.micro_batch_size);
    Some(Forecast::Training(Box::new(TrainingForecast { spec, limits, pairs: false, micro_batch_size })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    normalization: Normalization,
    micro_batch_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Normalization {
    Tokens,
    MeanOfMeans,
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = training::rules(params);
    let means = params.get("normalization").is_some_and(|value| value == "mean-of-means");
    if means && !params.contains_key("micro_batch_size") {
        broken.push(Broken {
            key: "normalization",
            message: "`mean-of-means` depends on how a batch is cut, and nothing says how".into(),
            help: "add `micro_batch_size`, the batch size per device of the run you compare with".into(),
        });
    }
    broken
}

/// Trains on the samples of `data`, from the newest checkpoint on if there is one.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let (spec, own): (Spec, Own) = training::specs(ctx.label, ctx.params, OWN)?;
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let (samples, notes) = data::samples(&inputs::records(ctx, "data")?, &tokenizer, spec.format, &spec.limits())?;
    inputs::warn(ctx, &notes);

    let model = spec.model(ctx)?;
    training::check_ids(model.config(), samples.iter())?;
    let steps = spec.steps(samples.len());
    let schedule = spec.schedule(steps);
    let saved = spec.saved(steps);
    let mut trainer = spec.optimizer.over(model)?;
    let (mut session, done) = Session::resume(ctx, &mut trainer, spec.resume_every_s)?;
    ctx.progress.begin(steps.total, "steps");
    if done == 0 && saved.contains(&0) {
        session.keep(&trainer, 0, 0.0)?;
    }
    let mut batches = spec.batches(samples.len());
    for step in done..steps.total {
        let _span = tracing::debug_span!("step", step = step + 1).entered();
        let batch: Vec<&Sample> = batches.of(step).iter().map(|&i| &samples[i]).collect();
        let lengths: Vec<usize> = batch.iter().map(|sample| sample.ids.len()).collect();
        let learned: usize = batch.iter().map(|sample| sample.learned_tokens()).sum();

        trainer.clear_gradients()?;
        let mut loss = 0.0;
        let parts = match own.micro_batch_size {
            Some(size) => data::equal_parts(batch.len(), size),
            None => data::micro_batches(&lengths, spec.micro_batch_tokens),
        };
        let count = parts.len();
        for part in parts {
            let packed = Packed::new(batch[part].iter().copied());
            let pass = trainer.forward(&packed.batch())?;
            let tokens = match own.normalization {
                Normalization::Tokens => learned,
                Normalization::MeanOfMeans => pass.logprobs.len() * count,
            };
            loss -= pass.logprobs.iter().map(|&logprob| f64::from(logprob)).sum::<f64>() / tokens as f64;
            // d loss / d logprob, the same for every learned token of the micro-batch
            let dlogprobs = vec![-1.0 / tokens as f32; pass.logprobs.len()];
            pass.backward(&dlogprobs)?;
        }
        let grad_norm = trainer.norm()?;
        require_finite(loss, grad_norm, step + 1)?;
        if spec.keep_gradients.contains(&(step + 1)) {
            session.keep_gradients(&mut trainer, step + 1)?;
        }
        trainer.clip(grad_norm, spec.optimizer.clip_norm)?;
        let learning_rate = schedule.rate(step);
        trainer.step(learning_rate)?;

        let updates = step + 1;
        if saved.contains(&updates) {
            session.keep(&trainer, updates, steps.epochs(updates))?;
        }
        let line = json!({
            "step": updates,
            "epoch": steps.epochs(updates),
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": lengths.iter().sum::<usize>(),
            "learned_tokens": learned,
        });
        ctx.progress.at(updates);
        ctx.progress.note(&format!("loss {loss:.4}  lr {learning_rate:.2e}"));
        session.finish_step(&trainer, updates, line)?;
    }
    session.publish(trainer)
}
