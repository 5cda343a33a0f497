//! `dpo`: direct preference optimisation (Rafailov et al., 2023) against a frozen reference.
//!
//! The reference is the model training starts from, or with `reference = "base"` the same without the
//! adapter that is continued. Its sequence log-probs (sums over the completion, in f64 over f32 tokens)
//! are computed once, before the first step, and are part of the artifact; no second model is held. With
//! them
//!
//! ```text
//! margin = beta * ((logp(chosen) - ref(chosen)) - (logp(rejected) - ref(rejected)))
//! loss   = mean over the pairs of the batch of -log sigmoid(margin)
//! ```
//!
//! At step 0 a policy that starts at its reference has the loss ln 2; anything else is a bug and stops.

use crate::data::{self, Limits, Pair};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type};
use crate::model::Placed;
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::forecast::training::TrainingForecast;
use crate::stage::kind::{Forecast, StageKind};

use crate::stage::share::inputs;
use crate::stage::share::training::{self, Packed, Session, Spec, training_keys};
use crate::train::require_finite;
use serde::Deserialize;
use serde_json::{Value, json};

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "dpo",
    about: "direct preference optimisation against the frozen start",
    recipe: 1,
    yields: ArtifactType::Model,
    keys: training_keys![
        Key::default(
            "beta",
            Type::Float { min: 0.0, max: 100.0, above: true },
            "0.1",
            "Strength of the pull towards the reference.",
        ),
        Key::default(
            "reference",
            Type::Choice(&["start", "base"]),
            "\"start\"",
            "What the policy is pulled towards: the model training starts from, or that model without the adapter that is continued (as TRL does when it is given neither a reference model nor a reference adapter).",
        ),
        Key::optional(
            "max_prompt_tokens",
            training::COUNT,
            "Longest prompt, in tokens; longer ones are handled as `on_overlength` says, losing their beginning when cut.",
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
const OWN: &[&str] = &["beta", "reference", "max_prompt_tokens"];

fn forecast(params: &Params) -> Option<Forecast> {
    let (spec, own): (Spec, Own) = training::specs(KIND.name, params, OWN).ok()?;
    let (limits, micro_batch_size) = (own.limits(&spec), None);
    Some(Forecast::Training(Box::new(TrainingForecast { spec, limits, pairs: true, micro_batch_size })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    beta: f64,
    reference: Reference,
    max_prompt_tokens: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reference {
    Start,
    Base,
}

impl Own {
    fn limits(&self, spec: &Spec) -> Limits {
        Limits { max_prompt_tokens: self.max_prompt_tokens, ..spec.limits() }
    }
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = training::rules(params);
    let says = |key: &str, value: &str| params.get(key).is_some_and(|there| there == value);
    if says("reference", "base") && !says("adapter", "continue") {
        broken.push(Broken {
            key: "reference",
            message: "`reference = \"base\"` takes away the adapter that is continued, and none is".into(),
            help: "`adapter = \"continue\"`, or leave `reference` out: then it is the model training starts from"
                .into(),
        });
    }
    broken
}

/// Sequence log-probs of one pair.
#[derive(Clone, Copy)]
struct Logps {
    chosen: f64,
    rejected: f64,
}

/// Trains on the pairs of `data`, from the newest checkpoint on if there is one.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let (spec, own): (Spec, Own) = training::specs(ctx.label, ctx.params, OWN)?;
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let limits = own.limits(&spec);
    let (pairs, notes) = data::pairs(&inputs::records(ctx, "data")?, &tokenizer, spec.format, &limits)?;
    inputs::warn(ctx, &notes);

    let mut model = spec.model(ctx)?;
    training::check_ids(model.config(), pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]))?;
    let reference = reference(ctx, &mut model, own.reference, &pairs, spec.micro_batch_tokens)?;
    let steps = spec.steps(pairs.len());
    let schedule = spec.schedule(steps);
    let saved = spec.saved(steps);
    let mut trainer = spec.optimizer.over(model)?;
    let (mut session, done) = Session::resume(ctx, &mut trainer, spec.resume_every_s)?;
    ctx.progress.begin(steps.total, "steps");
    if done == 0 && saved.contains(&0) {
        session.keep(&trainer, 0, 0.0)?;
    }
    let mut batches = spec.batches(pairs.len());
    for step in done..steps.total {
        let _span = tracing::debug_span!("step", step = step + 1).entered();
        let batch = batches.of(step);
        let lengths: Vec<usize> = batch.iter().map(|&i| training::pair_tokens(&pairs[i])).collect();

        trainer.clear_gradients()?;
        let mut sums = Sums::default();
        for part in data::micro_batches(&lengths, spec.micro_batch_tokens) {
            let part = &batch[part];
            let packed = Packed::new(part.iter().flat_map(|&i| [&pairs[i].chosen, &pairs[i].rejected]));
            let pass = trainer.forward(&packed.batch())?;
            let mut dlogprobs = Vec::with_capacity(pass.logprobs.len());
            for (policy, &i) in policy_logps(&packed, &pass.logprobs).into_iter().zip(part) {
                // d loss / d logp(chosen) = -beta sigmoid(-margin) / pairs, and its opposite for rejected
                let margin = sums.add(policy, reference[i], own.beta);
                let slope = (own.beta * sigmoid(-margin) / batch.len() as f64) as f32;
                dlogprobs.extend(std::iter::repeat_n(-slope, pairs[i].chosen.learned_tokens()));
                dlogprobs.extend(std::iter::repeat_n(slope, pairs[i].rejected.learned_tokens()));
            }
            pass.backward(&dlogprobs)?;
        }
        let count = batch.len() as f64;
        let loss = sums.loss / count;
        if step == 0 && own.reference == Reference::Start && (loss - std::f64::consts::LN_2).abs() > 1e-6 {
            return Err(Problem::new("dpo::reference", format!("the loss before any update is {loss}, not ln 2"))
                .note("policy and reference are the same model then; this is a bug of the engine"));
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
            "rewards_chosen": sums.reward_chosen / count,
            "rewards_rejected": sums.reward_rejected / count,
            "rewards_margins": (sums.reward_chosen - sums.reward_rejected) / count,
            "rewards_accuracies": sums.right / count,
            "logps_chosen": sums.logp_chosen / count,
            "logps_rejected": sums.logp_rejected / count,
            "tokens": lengths.iter().sum::<usize>(),
        });
        ctx.progress.at(updates);
        ctx.progress.note(&format!("loss {loss:.4}  accuracy {:.2}", sums.right / count));
        session.finish_step(&trainer, updates, line)?;
    }
    let lines: Vec<Value> = pairs
        .iter()
        .zip(&reference)
        .map(|(pair, logps)| json!({ "id": pair.id, "chosen": logps.chosen, "rejected": logps.rejected }))
        .collect();
    inputs::write_lines(&ctx.out.join("reference.jsonl"), &lines)?;
    session.publish(trainer)
}

/// Sums over the pairs of a batch.
#[derive(Default)]
struct Sums {
    loss: f64,
    reward_chosen: f64,
    reward_rejected: f64,
    logp_chosen: f64,
    logp_rejected: f64,
    right: f64,
}

impl Sums {
    /// Adds a pair; returns its margin.
    fn add(&mut self, policy: Logps, reference: Logps, beta: f64) -> f64 {
        let chosen = beta * (policy.chosen - reference.chosen);
        let rejected = beta * (policy.rejected - reference.rejected);
        let margin = chosen - rejected;
        // -log sigmoid(m) = log(1 + exp(-m)), without overflow on either side
        self.loss += (-margin).max(0.0) + (-margin.abs()).exp().ln_1p();
        self.reward_chosen += chosen;
        self.reward_rejected += rejected;
        self.logp_chosen += policy.chosen;
        self.logp_rejected += policy.rejected;
        self.right += f64::from(u8::from(margin > 0.0));
        margin
    }
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// Sums per completion of a packed batch of chosen, rejected, chosen, rejected, ...
fn policy_logps(packed: &Packed, logprobs: &[f32]) -> Vec<Logps> {
    let sums = packed.sequence_sums(logprobs);
    sums.chunks_exact(2).map(|pair| Logps { chosen: pair[0], rejected: pair[1] }).collect()
}

/// The reference's log-probs of every pair, by the model as it stands before the first update.
fn reference(
    ctx: &Context,
    model: &mut Placed,
    which: Reference,
    pairs: &[Pair],
    budget: usize,
) -> Result<Vec<Logps>, Problem> {
    ctx.progress.begin(pairs.len() as u64, "reference pairs");
    let lengths: Vec<usize> = pairs.iter().map(training::pair_tokens).collect();
    let mut all = Vec::with_capacity(pairs.len());
    for part in data::micro_batches(&lengths, budget) {
        let packed = Packed::new(pairs[part].iter().flat_map(|pair| [&pair.chosen, &pair.rejected]));
        let logprobs = match which {
            Reference::Start => model.logprobs(&packed.batch())?,
            Reference::Base => model.base_logprobs(&packed.batch())?,
        };
        all.extend(policy_logps(&packed, &logprobs));
        ctx.progress.at(all.len() as u64);
        ctx.stopped()?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arithmetic written out: beta 0.5, policy 2 nats up on chosen and 1 nat down on rejected.
    #[test]
    fn the_loss_is_minus_log_sigmoid_of_the_margin() {
        let mut sums = Sums::default();
        let policy = Logps { chosen: -8.0, rejected: -13.0 };
        let margin = sums.add(policy, Logps { chosen: -10.0, rejected: -12.0 }, 0.5);
        assert!((margin - 1.5).abs() <= 1e-12);
        assert!((sums.loss - (1.0 + (-1.5f64).exp()).ln()).abs() <= 1e-12);
        assert_eq!(sums.right, 1.0);
    }

    #[test]
    fn a_margin_of_a_thousand_overflows_nowhere() {
        let at = |chosen: f64| {
            let mut sums = Sums::default();
            sums.add(Logps { chosen, rejected: 0.0 }, Logps { chosen: 0.0, rejected: 0.0 }, 1.0);
            sums.loss
        };
        assert!(at(1000.0) <= 1e-300 && (at(-1000.0) - 1000.0).abs() <= 1e-9);
    }
}
