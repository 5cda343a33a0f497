//! The whole model through the real kernels: log-probs, gradients, and the stages that train and measure.

use crate::bench::{Bench, resolved};
use crate::support::gpu;
use pipe::files::Files;
use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::{Batch, Config, Device, Gradients, LoraSpec, Model, Placed, Policy, Recompute, lora};
use pipe::plan::Axes;
use pipe::random::Stream;
use pipe::stage::{self, Artifact};
use pipe::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Two query heads on one key head, heads of 64; the other sizes are odd where they may be.
pub fn config(tied: bool) -> Config {
    let map = json!({
        "model_type": "qwen2", "vocab_size": 203, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": tied,
        "initializer_range": 0.12, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    });
    Config::parse(&map.to_string()).unwrap()
}

/// A model whose adapter does something.
pub fn model(tied: bool, dtype: Dtype) -> Model {
    let mut model = Model::random(config(tied), 3, dtype);
    let targets = lora::TARGETS.map(String::from).to_vec();
    model.add_lora(&LoraSpec { rank: 5, alpha: 10.0, targets }, 4).unwrap();
    model.update(|params| {
        for param in params.iter_mut().filter(|param| param.name.contains("lora_B")) {
            let random = Stream::named(7, &[&param.name]);
            param.value.iter_mut().zip(0..).for_each(|(value, i)| *value = random.normal(i) as f32 * 0.05);
        }
    });
    model
}

pub struct Rows {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>,
    pub rows: Vec<usize>,
    pub targets: Vec<u32>,
}

/// Two sequences, the first third of each not learned.
pub fn rows() -> Rows {
    let random = Stream::named(1, &["ids"]);
    let lengths = vec![37, 5];
    let ids: Vec<u32> = (0..42).map(|i| (random.u64(i) % 203) as u32).collect();
    let rows: Vec<usize> = (12..36).chain(38..41).collect();
    let targets = rows.iter().map(|row| ids[row + 1]).collect();
    Rows { ids, lengths, rows, targets }
}

impl Rows {
    pub fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }
}

/// Log-probs and gradients, the slope of every row being -1 / rows.
pub fn run(placed: &mut Placed, rows: &Rows) -> (Vec<f32>, Gradients) {
    placed.clear_gradients().unwrap();
    let pass = placed.forward(&rows.batch()).unwrap();
    let logprobs = pass.logprobs.clone();
    pass.backward(&vec![-1.0 / rows.rows.len() as f32; rows.rows.len()]).unwrap();
    (logprobs, placed.gradients().unwrap())
}

/// Root of the mean square of a - b, relative to that of b.
pub fn apart(a: &[f32], b: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (difference / squares(&mut b.iter().map(|&b| f64::from(b)))).sqrt()
}

#[test]
fn log_probs_and_gradients_are_those_of_the_processor() {
    for tied in [false, true] {
        let rows = rows();
        // The law: the same weights, rounded to bf16 once, and everything else in f32.
        let (law, law_grads) = run(&mut Placed::new(model(tied, Dtype::Bf16), &Device::Cpu).unwrap(), &rows);
        let mut placed = Placed::new(model(tied, Dtype::Bf16), &Device::Cuda(gpu())).unwrap();
        let (logprobs, grads) = run(&mut placed, &rows);
        for (got, want) in logprobs.iter().zip(&law) {
            assert!((got - want).abs() <= 0.08, "tied {tied}: {got} against {want}");
        }
        assert!(apart(&logprobs, &law) <= 6e-3, "tied {tied}: {}", apart(&logprobs, &law));
        for (param, (got, want)) in placed.params().unwrap().iter().zip(grads.values.iter().zip(&law_grads.values)) {
            assert!(apart(got, want) <= 0.05, "tied {tied}, {}: {}", param.name, apart(got, want));
        }
        assert_eq!(placed.logprobs(&rows.batch()).unwrap(), logprobs, "without a tape the same");
    }
}

#[test]
fn recomputing_layers_changes_no_bit() {
    let rows = rows();
    let runs = [Recompute::None, Recompute::All].map(|recompute| {
        let policy = Policy { recompute, ..Policy::default() };
        run(&mut Placed::with(model(false, Dtype::Bf16), &Device::Cuda(gpu()), policy).unwrap(), &rows)
    });
    assert_eq!(runs[0].0, runs[1].0);
    assert_eq!(runs[0].1, runs[1].1);
}

#[test]
fn a_sequence_gives_the_same_bits_in_any_company() {
    let rows = rows();
    let placed = Placed::new(model(true, Dtype::Bf16), &Device::Cuda(gpu())).unwrap();
    let together = placed.logprobs(&rows.batch()).unwrap();
    let (ids, targets) = (&rows.ids[..37], &rows.targets[..24]);
    let alone = Batch { ids, lengths: &[37], rows: &rows.rows[..24], targets };
    assert_eq!(placed.logprobs(&alone).unwrap(), together[..24]);
}

#[test]
fn the_adapter_can_be_switched_off() {
    let rows = rows();
    let mut placed = Placed::new(model(true, Dtype::Bf16), &Device::Cuda(gpu())).unwrap();
    let base = Placed::new(Model::random(config(true), 3, Dtype::Bf16), &Device::Cuda(gpu())).unwrap();
    let on = placed.logprobs(&rows.batch()).unwrap();
    assert_eq!(placed.base_logprobs(&rows.batch()).unwrap(), base.logprobs(&rows.batch()).unwrap());
    assert_eq!(placed.logprobs(&rows.batch()).unwrap(), on, "and it is on again");
}

#[test]
fn a_head_size_without_a_kernel_is_refused_before_anything_runs() {
    let map = json!({
        "model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 96,
    });
    let model = Model::random(Config::parse(&map.to_string()).unwrap(), 1, Dtype::Bf16);
    let problem = Placed::new(model, &Device::Cuda(gpu())).err().unwrap();
    assert_eq!((problem.code, problem.exit), ("cuda::head_dim", pipe::problem::Exit::Missing));
    assert!(problem.message.contains("96") && problem.notes[0].contains("64"), "{problem}");
}

#[test]
fn greedy_completions_are_those_of_the_processor_alone_and_in_company() {
    let prompts: Vec<Prompt> = [vec![5u32, 9, 2], vec![7; 19], vec![5, 9, 2], vec![100, 3]]
        .into_iter()
        .map(|ids| Prompt { ids, stream: 0 })
        .collect();
    let sampling = Sampling { max_tokens: 5, ..Sampling::default() };
    let placed = Placed::new(model(false, Dtype::Bf16), &Device::Cuda(gpu())).unwrap();
    let on = |placed: &Placed, prompts: &[Prompt]| {
        generate(placed, prompts, &sampling, &|_| String::new(), &mut |_| Ok(()), &Limits::default()).unwrap()
    };
    let run = |prompts: &[Prompt]| on(&placed, prompts);
    let together = run(&prompts);
    for (prompt, completion) in prompts.iter().zip(&together) {
        assert_eq!(run(std::slice::from_ref(prompt)), std::slice::from_ref(completion));
    }
    let law = on(&Placed::new(model(false, Dtype::Bf16), &Device::Cpu).unwrap(), &prompts);
    for (law, ours) in law.iter().zip(&together) {
        // Where the two best are as near as rounding, either may come first, and all that follows differs.
        let agree = law.ids.iter().zip(&ours.ids).take_while(|(a, b)| a == b).count();
        assert!(agree >= 1, "{law:?}\n{ours:?}");
        for (a, b) in law.logprobs.iter().zip(&ours.logprobs).take(agree) {
            assert!((a - b).abs() <= 0.08, "{law:?}\n{ours:?}");
        }
    }
}

/// A small model with the bundled tokenizer and heads of 64, made by the `model` stage.
pub fn base(bench: &Bench) -> Files {
    let init = json!({
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "intermediate_size": 48, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true, "initializer_range": 0.2, "seed": 1,
    });
    let params = json!({"source": "init:random", "tokenizer": "init:mini", "init": init});
    bench.run(stage::model::run, params).unwrap();
    let folder = bench.path("weights");
    std::fs::rename(bench.path("out"), &folder).unwrap();
    std::fs::create_dir(bench.path("out")).unwrap();
    Files::from_dir(&folder).unwrap()
}

/// A bench on `device` whose slots hold a model and these records.
pub fn bench(device: Device, records: &[Value]) -> Bench {
    let mut bench = Bench::empty();
    let files = base(&bench);
    bench
        .inputs
        .insert("model".into(), vec![Artifact { stage: "base".into(), kind: "model", axes: Axes::default(), files }]);
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let path = bench.write("data.jsonl", &lines);
    bench.give("data", "dataset", &[("data.jsonl", &path)]);
    bench.device = device;
    bench
}

/// The log of a stage run on the processor and through the kernels.
pub fn both(
    run: fn(&stage::Context) -> Result<(), pipe::problem::Problem>,
    params: &Value,
    records: &[Value],
    file: &str,
) -> [Vec<Value>; 2] {
    both_and(run, params, records, |bench| bench.lines(file))
}

/// The same of whatever is read of what it left.
fn both_and<T>(
    run: fn(&stage::Context) -> Result<(), pipe::problem::Problem>,
    params: &Value,
    records: &[Value],
    read: impl Fn(&Bench) -> T,
) -> [T; 2] {
    [Device::Cpu, Device::Cuda(gpu())].map(|device| {
        let bench = bench(device, records);
        bench.run(run, params.clone()).unwrap();
        read(&bench)
    })
}

/// The matrices of the adapter that begin as zeros: what they are is what their gradients were.
fn learned(bench: &Bench) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(bench.path("out/adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values =
        |data: &[u8]| data.as_chunks::<4>().0.iter().map(|four| f64::from(f32::from_le_bytes(*four))).collect();
    let learned = tensors.iter().filter(|(name, _)| name.contains("lora_B"));
    learned.map(|(name, tensor)| (name.to_string(), values(tensor.data()))).collect()
}

/// Every target is learned, and on the device in the direction in which the processor learns it.
fn same_direction([law, ours]: [&BTreeMap<String, Vec<f64>>; 2]) {
    assert!(law.len() == 4 && law.keys().eq(ours.keys()), "{:?}", ours.keys());
    for (name, law) in law {
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let (ours, both) = (&ours[name], product(law, &ours[name]));
        let cosine = both / (product(law, law) * product(ours, ours)).sqrt();
        assert!(cosine >= 0.8, "{name}: {cosine}");
    }
}

pub fn training(kind: &pipe::manifest::spec::Kind, more: Value) -> Value {
    let lora = json!({"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj", "lm_head"]});
    let mut params = json!({
        "learning_rate": 1e-2, "max_steps": 3, "batch_size": 2, "max_tokens": 100, "lora": lora, "dtype": "bf16",
        "schedule": {"kind": "cosine", "warmup_ratio": 0.0, "cycles": 1},
        "optimizer": {"kind": "adamw", "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0},
    });
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    resolved(kind, params)
}

#[test]
fn supervised_steps_follow_those_of_the_processor() {
    let records: Vec<Value> = (0..4)
        .map(|i| json!({"id": i.to_string(), "prompt": format!("{i} + 1"), "answer": format!("{}", i + 1)}))
        .collect();
    let params = training(&stage::sft::KIND, json!({}));
    let read = |bench: &Bench| (bench.lines("log.jsonl"), learned(bench));
    let [(law, law_learned), (ours, our_learned)] = both_and(stage::sft::run, &params, &records, read);
    same_direction([&law_learned, &our_learned]);
    assert_eq!(ours.len(), 3);
    for (law, ours) in law.iter().zip(&ours) {
        let off = (law["loss"].as_f64().unwrap() - ours["loss"].as_f64().unwrap()).abs();
        assert!(off <= 0.03, "{law}\n{ours}");
    }
    assert!(ours[2]["loss"].as_f64().unwrap() < ours[0]["loss"].as_f64().unwrap(), "it learns: {ours:?}");
}

#[test]
fn preference_steps_start_at_ln_2_and_follow_those_of_the_processor() {
    let records: Vec<Value> = (0..2)
        .map(|i| json!({"id": i.to_string(), "prompt": format!("{i} + 1"), "chosen": format!("{}", i + 1), "rejected": "9 9"}))
        .collect();
    let params = training(&stage::dpo::KIND, json!({"beta": 0.2}));
    let read = |bench: &Bench| (bench.lines("log.jsonl"), learned(bench));
    let [(law, law_learned), (ours, our_learned)] = both_and(stage::dpo::run, &params, &records, read);
    same_direction([&law_learned, &our_learned]);
    assert!((ours[0]["loss"].as_f64().unwrap() - 2f64.ln()).abs() <= 1e-6);
    for (law, ours) in law.iter().zip(&ours) {
        let off = (law["loss"].as_f64().unwrap() - ours["loss"].as_f64().unwrap()).abs();
        assert!(off <= 0.03, "{law}\n{ours}");
    }
}

#[test]
fn products_of_gradients_are_near_those_of_the_processor() {
    let records: Vec<Value> = (0..3)
        .map(|i| json!({"id": i.to_string(), "prompt": format!("{i} + 1"), "answer": format!("{}", i + 1)}))
        .collect();
    let params = resolved(&stage::kernel::KIND, json!({"max_tokens": 100, "dtype": "bf16", "parameters": "all"}));
    let [law, ours] = both(stage::kernel::run, &params, &records, "measurements.jsonl");
    for name in ["kernel", "kernel_self", "cosine"] {
        let (law, ours) = (law[0][name].as_f64().unwrap(), ours[0][name].as_f64().unwrap());
        assert!(law > 0.0 && (law - ours).abs() <= 0.05 * law, "{name}: {ours}, not {law}");
    }
}

#[test]
fn a_probe_measures_what_the_processor_measures() {
    let records = [json!({"id": "a", "prompt": "2 + 2", "chosen": "4", "rejected": "five"})];
    let params = resolved(&stage::probe::KIND, json!({"max_tokens": 100, "dtype": "bf16"}));
    let [law, ours] = both(stage::probe::run, &params, &records, "measurements.jsonl");
    for name in ["alp_chosen", "alp_rejected"] {
        let off = (law[0][name].as_f64().unwrap() - ours[0][name].as_f64().unwrap()).abs();
        assert!(off <= 0.03, "{}\n{}", law[0], ours[0]);
    }
}
