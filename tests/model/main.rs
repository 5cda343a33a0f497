//! The model as a whole: gradients against differences, what must change no bit, folders, generation.

#[path = "lora.rs"]
mod adapters;
mod config;
mod decoding;
mod engine;
mod folders;
mod gradients;
mod invariance;

use pipe::model::{Batch, Config, LoraSpec, Model, lora};
use pipe::random::Stream;
use pipe::tensor::Dtype;

/// Odd sizes everywhere: 4 query heads on 2 key heads, heads of 10 in a hidden size of 24.
fn config(tied: bool) -> Config {
    let text = r#"{"model_type": "qwen2", "vocab_size": 101, "hidden_size": 24, "intermediate_size": 37,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.15, "torch_dtype": "float32",
        "tie_word_embeddings": TIED}"#;
    Config::parse(&text.replace("TIED", if tied { "true" } else { "false" })).unwrap()
}

fn targets(all: &[&str]) -> Vec<String> {
    all.iter().map(|target| target.to_string()).collect()
}

/// A model whose adapter does something: B is drawn too.
fn with_adapter(tied: bool, rank: usize, on: &[&str]) -> Model {
    let mut model = Model::random(config(tied), 5, Dtype::F32);
    model.add_lora(&LoraSpec { rank, alpha: 1.5 * rank as f64, targets: targets(on) }, 6).unwrap();
    model.update(|params| {
        for param in params.iter_mut().filter(|param| param.name.contains("lora_B")) {
            let random = Stream::named(7, &[&param.name]);
            param.value.iter_mut().zip(0..).for_each(|(value, i)| *value = random.normal(i) as f32 * 0.1);
        }
    });
    model
}

fn everything_trained(tied: bool) -> Model {
    let mut model = Model::random(config(tied), 5, Dtype::F32);
    model.train_all().unwrap();
    // Biases and norms away from 0 and 1, so that their gradients are those of a general point.
    model.update(|params| {
        for param in params.iter_mut().filter(|param| param.shape.len() == 1) {
            let random = Stream::named(8, &[&param.name]);
            param.value.iter_mut().zip(0..).for_each(|(value, i)| *value += random.normal(i) as f32 * 0.1);
        }
    });
    model
}

const ALL: [&str; 8] = lora::TARGETS;

/// Sequences of these lengths; every third token is no target.
struct Packed {
    ids: Vec<u32>,
    lengths: Vec<usize>,
    rows: Vec<usize>,
    targets: Vec<u32>,
}

impl Packed {
    fn of(sequences: &[Vec<u32>]) -> Packed {
        let mut packed = Packed { ids: vec![], lengths: vec![], rows: vec![], targets: vec![] };
        for ids in sequences {
            let start = packed.ids.len();
            for t in (1..ids.len()).filter(|t| t % 3 != 0) {
                packed.rows.push(start + t - 1);
                packed.targets.push(ids[t]);
            }
            packed.ids.extend(ids);
            packed.lengths.push(ids.len());
        }
        packed
    }

    fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }
}

fn sequences(lengths: &[usize]) -> Vec<Vec<u32>> {
    let random = Stream::named(9, &["sequences"]);
    let mut counter = 0;
    let mut next = || {
        counter += 1;
        (random.uniform(counter) * 101.0) as u32
    };
    lengths.iter().map(|&length| (0..length).map(|_| next()).collect()).collect()
}

/// Slopes of a loss that weighs every row differently.
fn slopes(rows: usize) -> Vec<f32> {
    let random = Stream::named(10, &["slopes"]);
    (0..rows as u64).map(|i| random.normal(i) as f32).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}
