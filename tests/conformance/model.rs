//! A small model on a device against the processor: what it makes of every token, and ten steps of learning.

use crate::{Row, failed};
use pipe::cuda::Gpu;
use pipe::model::{Batch, Config, Device, LoraSpec, Model, Placed, lora};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::tensor::Dtype;
use pipe::train::{Kind, Options, Trainer};
use std::time::Instant;

const VOCABULARY: usize = 131;
const STEPS: usize = 10;
/// Of a log-prob: activations are bf16 on a device and f32 on the processor, the weights the same.
const LOGPROB_BOUND: f64 = 0.08;
const LOSS_BOUND: f64 = 0.03;

const SHAPE: &str = r#"{ "model_type": "qwen2", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "tie_word_embeddings": false, "initializer_range": 0.1, "rope_theta": 10000.0, "rms_norm_eps": 1e-6 }"#;

fn placed(device: &Device) -> Result<Placed, Problem> {
    let mut model = Model::random(Config::parse(SHAPE)?, 3, Dtype::Bf16);
    let targets = lora::TARGETS.map(String::from).to_vec();
    model.add_lora(&LoraSpec { rank: 8, alpha: 16.0, targets }, 4)?;
    Placed::new(model, device)
}

fn ids(tokens: usize) -> Vec<u32> {
    let random = Stream::named(29, &["ids"]);
    (0..tokens as u64).map(|i| (random.u64(i) % VOCABULARY as u64) as u32).collect()
}

/// log p of every token of the vocabulary at every position: logits, as far as they mean anything.
fn logits(device: &Device) -> Result<Vec<f64>, Problem> {
    let ids = ids(12);
    let (rows, targets): (Vec<usize>, Vec<u32>) =
        (0..ids.len()).flat_map(|row| (0..VOCABULARY as u32).map(move |token| (row, token))).unzip();
    let batch = Batch { ids: &ids, lengths: &[ids.len()], rows: &rows, targets: &targets };
    Ok(placed(device)?.logprobs(&batch)?.into_iter().map(f64::from).collect())
}

/// The loss before each step of AdamW on one batch.
fn losses(device: &Device) -> Result<Vec<f64>, Problem> {
    let ids = ids(40);
    // Two sequences; the last token of each predicts nothing.
    let rows: Vec<usize> = (0..27).chain(28..39).collect();
    let targets: Vec<u32> = rows.iter().map(|row| ids[row + 1]).collect();
    let batch = Batch { ids: &ids, lengths: &[28, 12], rows: &rows, targets: &targets };
    let mut trainer = Trainer::new(placed(device)?, Kind::AdamW, Options::default())?;
    let slope = -1.0 / rows.len() as f32;
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        trainer.clear_gradients()?;
        let pass = trainer.forward(&batch)?;
        losses.push(pass.logprobs.iter().map(|logprob| f64::from(logprob * slope)).sum());
        pass.backward(&vec![slope; rows.len()])?;
        let norm = trainer.norm()?;
        trainer.clip(norm, 1.0)?;
        trainer.step(5e-3)?;
    }
    Ok(losses)
}

pub fn rows(gpu: &Gpu, meant: &dyn Fn(&str) -> bool) -> Vec<Row> {
    let of = |name: &str, run: fn(&Device) -> Result<Vec<f64>, Problem>, bound: f64, sound: fn(&[f64]) -> bool| {
        let name = format!("{name}: {}, processor", gpu.driver().name());
        let started = Instant::now();
        meant(&name).then(|| match (run(&Device::Cuda(gpu.clone())), run(&Device::Cpu)) {
            (Ok(got), _) if !sound(&got) => failed(name, started, format!("{got:?} cannot be")),
            (Ok(got), Ok(want)) => compared(name, started, &got, &want, bound),
            (Err(problem), _) | (_, Err(problem)) => failed(name, started, problem.to_string()),
        })
    };
    let probabilities = |got: &[f64]| got.chunks(VOCABULARY).all(|row| (sum_of_exp(row) - 1.0).abs() <= 0.01);
    // A loss that stays where it is would agree with anything.
    let learns = |got: &[f64]| got[STEPS - 1] < 0.9 * got[0];
    let logits = of("a small model, every log-prob", logits, LOGPROB_BOUND, probabilities);
    let losses = of("the same, losses of ten steps", losses, LOSS_BOUND, learns);
    logits.into_iter().chain(losses).collect()
}

fn sum_of_exp(logprobs: &[f64]) -> f64 {
    logprobs.iter().map(|logprob| logprob.exp()).sum()
}

fn compared(name: String, started: Instant, got: &[f64], want: &[f64], bound: f64) -> Row {
    let fits = |(got, want): (&f64, &f64)| (got - want).abs() <= bound;
    let at = got.iter().zip(want).position(|pair| !fits(pair));
    let wrong = match at {
        _ if got.len() != want.len() => Some(format!("{} values against {}", got.len(), want.len())),
        Some(i) => Some(format!("value {i}: {} against {}", got[i], want[i])),
        None => None,
    };
    let largest = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
    let seconds = started.elapsed().as_secs_f64();
    Row { name, values: got.len(), difference: format!("{largest:.1e}"), bound: format!("{bound:.1e}"), seconds, wrong }
}
