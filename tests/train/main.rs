//! Training a small model with the parts of `train`: it learns, and an interruption leaves no trace.

use pipe::model::{Batch, Config, Gradients, LoraSpec, Model, lora};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::tensor::Dtype;
use pipe::train::{Checkpoint, Curve, Kind, Optimizer, Options, Schedule, clip, global_norm, require_finite};
use std::path::Path;

const STEPS: u64 = 100;
const VOCAB: u32 = 50;

fn model(full: bool) -> Model {
    let config = r#"{"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true, "initializer_range": 0.1}"#;
    let mut model = Model::random(Config::parse(config).unwrap(), 1, Dtype::F32);
    if full {
        model.train_all().unwrap();
    } else {
        let targets = lora::TARGETS.iter().map(|target| target.to_string()).collect();
        model.add_lora(&LoraSpec { rank: 64, alpha: 64.0, targets }, 2).unwrap();
    }
    model
}

/// A sequence that counts up by a step of its own; each run sees the same ones.
fn sequence(step: u64) -> Vec<u32> {
    let random = Stream::named(step, &["data"]);
    let (start, by) = ((random.uniform(0) * 50.0) as u32, 1 + (random.uniform(1) * 3.0) as u32);
    (0..24).map(|i| (start + i * by) % VOCAB).collect()
}

fn optimizer(kind: Kind, model: &Model) -> Optimizer {
    Optimizer::new(kind, Options { beta2: 0.95, weight_decay: 1e-4, ..Options::default() }, model.params())
}

/// Runs steps `from..to`, saving after a number of steps. Returns the losses.
fn train(
    model: &mut Model,
    optimizer: &mut Optimizer,
    steps: std::ops::Range<u64>,
    save: Option<(&Path, u64)>,
) -> Result<Vec<f64>, Problem> {
    let schedule = Schedule::new(Curve::Cosine, 5e-3, 0.1, STEPS);
    let mut grads = Gradients::zeros(model.params());
    let mut losses = Vec::new();
    for step in steps {
        let mut loss = 0.0;
        for micro in 0..2 {
            let ids = sequence(2 * step + micro);
            let (rows, targets): (Vec<usize>, Vec<u32>) = (1..ids.len()).map(|t| (t - 1, ids[t])).unzip();
            let batch = Batch { ids: &ids, lengths: &[ids.len()], rows: &rows, targets: &targets };
            let forward = model.forward(&batch);
            let weight = 1.0 / (2.0 * rows.len() as f32);
            loss -= forward.logprobs.iter().map(|&p| f64::from(p * weight)).sum::<f64>();
            model.backward(forward.tape, &vec![-weight; rows.len()], &mut grads);
        }
        let norm = global_norm(&grads);
        require_finite(loss, norm, step)?;
        clip(&mut grads, norm, 1.0);
        model.update(|params| optimizer.step(params, &grads, schedule.rate(step)));
        grads.clear();
        losses.push(loss);
        if let Some((dir, at)) = save
            && step + 1 == at
        {
            Checkpoint::in_folder(dir)?.save(at, model.params(), optimizer, serde_json::json!({ "losses": losses }))?;
        }
    }
    Ok(losses)
}

fn cases() -> [(bool, Kind); 3] {
    [(false, Kind::AdamW), (false, Kind::AdamW8bit), (true, Kind::AdamW8bit)]
}

#[test]
fn a_small_model_learns_to_count() {
    for (full, kind) in cases() {
        let mut model = model(full);
        let mut optimizer = optimizer(kind, &model);
        let losses = train(&mut model, &mut optimizer, 0..STEPS, None).unwrap();
        let (first, last) = (losses[0], losses[losses.len() - 5..].iter().sum::<f64>() / 5.0);
        assert!(last <= 0.6 * first, "full: {full}, {kind:?}: from {first} to {last}");
    }
}

#[test]
fn a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one() {
    for (full, kind) in cases() {
        let dir = tempfile::tempdir().unwrap();
        let mut whole = model(full);
        let mut whole_optimizer = optimizer(kind, &whole);
        let losses = train(&mut whole, &mut whole_optimizer, 0..STEPS, Some((dir.path(), 17))).unwrap();

        let mut resumed = model(full);
        let mut resumed_optimizer = optimizer(kind, &resumed);
        let checkpoint = Checkpoint::in_folder(dir.path()).unwrap();
        let restored = resumed.update(|params| checkpoint.restore(params, &mut resumed_optimizer)).unwrap().unwrap();
        assert_eq!(restored.step, 17);
        assert_eq!(restored.caller["losses"].as_array().unwrap().len(), 17);
        let rest = train(&mut resumed, &mut resumed_optimizer, 17..STEPS, None).unwrap();
        assert_eq!(rest, losses[17..], "full: {full}, {kind:?}");
        for (a, b) in whole.params().iter().zip(resumed.params()) {
            assert!(a.value.iter().zip(&b.value).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", a.name);
        }
    }
}

#[test]
fn a_diverged_run_stops_before_the_update_and_names_the_step() {
    let mut model = model(true);
    let mut optimizer = optimizer(Kind::AdamW, &model);
    train(&mut model, &mut optimizer, 0..2, None).unwrap();
    model.update(|params| params[1].value[0] = f32::NAN);
    let before = model.params().to_vec();
    let problem = train(&mut model, &mut optimizer, 2..3, None).unwrap_err();
    assert!(problem.code == "train::not_finite" && problem.message.contains("step 2"), "{problem}");
    let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits();
    for (a, b) in before.iter().zip(model.params()) {
        assert!(a.value.iter().zip(&b.value).all(|(a, b)| same(a, b)));
    }
}
