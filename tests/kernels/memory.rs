//! What `model::memory` plans for a device, held to what its buffers took.
//!
//! The device is `Gpu::new` over the emulator: buffers in blocks, as on a real one.

use crate::model::{bench, training};
use crate::support::{Limited, PORTABLE};
use pipe::cuda::Gpu;
use pipe::model::memory::{Extent, Need, Part, Plan, Trained, Work};
use pipe::model::{Batch, Config, Device, LoraSpec, Model, Placed, Prompt, Recompute, Sampling, generate_placed, lora};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::stage::{self, Context, needs};
use pipe::tensor::Dtype;
use pipe::train::{self, Options, PlacedOptimizer};
use serde_json::{Value, json};

/// How far a planned peak may be from the one counted.
const ALLOWED: f64 = 0.05;

/// The terms of a device's column. A term that moves there is added here.
const TERMS: &[Part] =
    &[Part::Weights, Part::Trained, Part::Gradients, Part::Activations, Part::Layer, Part::Head, Part::Cache];

fn config(tied: bool) -> Config {
    let map = json!({
        "model_type": "qwen2", "vocab_size": 2200, "hidden_size": 128, "intermediate_size": 344,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "tie_word_embeddings": tied, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    });
    Config::parse(&map.to_string()).unwrap()
}

fn spec(targets: &[&str]) -> LoraSpec {
    LoraSpec { rank: 8, alpha: 16.0, targets: targets.iter().map(|target| target.to_string()).collect() }
}

fn placed(gpu: &Gpu, tied: bool, spec: &LoraSpec, recompute: Recompute) -> Placed {
    let mut model = Model::random(config(tied), 3, Dtype::Bf16);
    model.add_lora(spec, 4).unwrap();
    model.recompute = recompute;
    Placed::new(model, &Device::Cuda(gpu.clone())).unwrap()
}

/// Ids and lengths of the sequences; every other token is learned.
struct Rows {
    ids: Vec<u32>,
    lengths: Vec<usize>,
    rows: Vec<usize>,
    targets: Vec<u32>,
}

fn rows(lengths: &[usize]) -> Rows {
    let random = Stream::named(1, &["ids"]);
    let tokens: usize = lengths.iter().sum();
    let ids: Vec<u32> = (0..tokens as u64).map(|i| (random.u64(i) % 2200) as u32).collect();
    let rows: Vec<usize> = (0..tokens).step_by(2).collect();
    Rows { targets: rows.iter().map(|row| ids[*row]).collect(), lengths: lengths.to_vec(), rows, ids }
}

impl Rows {
    fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }

    fn extent(&self) -> Extent {
        Extent {
            tokens: self.ids.len(),
            rows: self.rows.len(),
            sequences: self.lengths.len(),
            longest: self.lengths.iter().copied().max().unwrap(),
        }
    }
}

#[track_caller]
fn near(need: &Need, gpu: &Gpu, what: &str) {
    let (planned, counted) = (need.device as f64, gpu.usage().peak as f64);
    assert!((planned / counted - 1.0).abs() <= ALLOWED, "{what}: planned {planned}, counted {counted}: {need:?}");
    let lines = need.lines.iter().filter(|line| line.device > 0);
    assert!(lines.clone().all(|line| TERMS.contains(&line.part)), "{what}: a term of no name: {need:?}");
    assert_eq!(lines.map(|line| line.device).sum::<u64>(), need.device, "{what}: the lines add up");
}

#[test]
fn a_planned_training_step_is_what_the_buffers_take() {
    let seven = &lora::TARGETS[..7];
    let state_bytes = |values| train::Kind::AdamW.state_bytes(values);
    for (lengths, targets, tied, recompute) in [
        (&[200, 120, 60][..], &lora::TARGETS[..], true, true),
        (&[200, 120, 60], seven, false, false),
        (&[37], &["q_proj", "v_proj"], true, true),
        (&[150, 150], &["lm_head"], false, true),
        (&[9, 4], &lora::TARGETS, true, false),
    ] {
        let (rows, spec, gpu) = (rows(lengths), spec(targets), Gpu::new(Box::new(PORTABLE)));
        let mut placed = placed(&gpu, tied, &spec, if recompute { Recompute::All } else { Recompute::None });
        let mut optimizer = PlacedOptimizer::new(train::Kind::AdamW, Options::default(), &placed).unwrap();
        let mut grads = placed.zero_gradients().unwrap();
        let forward = placed.forward(&rows.batch()).unwrap();
        placed.backward(forward.tape, &vec![-1.0; rows.rows.len()], &mut grads).unwrap();
        let norm = optimizer.norm(&grads).unwrap();
        optimizer.clip(&mut grads, norm, 1.0).unwrap();
        optimizer.step(&mut placed, &grads, 1e-4).unwrap();
        let config = config(tied);
        let plan = Plan {
            config: &config,
            dtype: Dtype::Bf16,
            trained: Trained::Adapter(&spec),
            on_device: true,
            work: Work::Train { extent: rows.extent(), recompute, state_bytes: &state_bytes },
        };
        near(&plan.need(), &gpu, &format!("{lengths:?}, {targets:?}, tied {tied}, recomputed {recompute}"));
    }
}

/// DPO's reference and a probe: log-probs that keep nothing.
#[test]
fn planned_log_probs_are_what_the_buffers_take() {
    let (rows, spec, gpu) = (rows(&[180, 77, 31]), spec(&lora::TARGETS), Gpu::new(Box::new(PORTABLE)));
    placed(&gpu, true, &spec, Recompute::All).logprobs(&rows.batch()).unwrap();
    let config = config(true);
    let plan = Plan {
        config: &config,
        dtype: Dtype::Bf16,
        trained: Trained::Adapter(&spec),
        on_device: true,
        work: Work::Measure { extent: rows.extent(), logits: false, hidden_states: false },
    };
    near(&plan.need(), &gpu, "log-probs");
}

#[test]
fn planned_decoding_is_what_the_buffers_take() {
    let (spec, config) = (spec(&lora::TARGETS[..7]), config(false));
    for (prompts, prompt, max_tokens) in [(3, 40, 3), (5, 2, 700)] {
        let gpu = Gpu::new(Box::new(PORTABLE));
        let placed = placed(&gpu, false, &spec, Recompute::All);
        let stream = |i: usize| Prompt { ids: (0..prompt as u32).map(|id| id + i as u32).collect(), stream: i as u64 };
        let prompts: Vec<Prompt> = (0..prompts).map(stream).collect();
        // The cache is made for the longest completion there may be; a few tokens show the rest.
        let mut steps = 0;
        let sampling = Sampling { max_tokens, ..Sampling::default() };
        let stop = pipe::problem::Problem::new("test::enough", "enough");
        let mut on_step = |_: usize| {
            steps += 1;
            if steps > 3 { Err(stop.clone()) } else { Ok(()) }
        };
        let _ = generate_placed(&placed, &prompts, &sampling, &|_| String::new(), &mut on_step);
        let plan = Plan {
            config: &config,
            dtype: Dtype::Bf16,
            trained: Trained::Adapter(&spec),
            on_device: true,
            work: Work::decode(&config, prompts.len(), prompt + max_tokens, prompt),
        };
        near(&plan.need(), &gpu, &format!("{} prompts of {prompt}", prompts.len()));
    }
}

/// A short record and one many times as long, in this order.
fn growing(words: usize) -> Vec<Value> {
    let record = |id: &str, words: usize| json!({"id": id, "prompt": "1 + 1 ".repeat(words), "answer": "2"});
    vec![record("short", 1), record("long", words)]
}

fn sft(more: Value) -> Value {
    let mut params = json!({"batch_size": 1, "shuffle": false, "resume_every_s": 0, "max_steps": 2, "max_tokens": 400});
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    training(&stage::sft::KIND, params)
}

fn run_sft(ctx: &Context) -> Result<(), Problem> {
    stage::run("sft", ctx)
}

#[test]
fn a_stage_takes_no_more_than_was_planned_from_its_keys_and_its_data() {
    let gpu = Gpu::new(Box::new(PORTABLE));
    let (records, params) = (growing(20), sft(json!({})));
    let bench = bench(Device::Cuda(gpu.clone()), &records);
    bench.run(run_sft, params.clone()).unwrap();
    let data = needs::Data::of(&bench.inputs["data"][0].files);
    let config = Config::load(&bench.inputs["model"][0].files).unwrap();
    let shape = needs::Shape { config, adapters: Vec::new() };
    let planned = |data| needs::needs("sft", params.as_object().unwrap(), &shape, data, true).unwrap().most.device;
    let counted = gpu.usage().peak as u64;
    assert!(
        counted <= planned(data) && planned(data) <= planned(None),
        "{counted} {} {}",
        planned(data),
        planned(None)
    );
}

#[test]
fn memory_that_runs_out_names_the_step_what_takes_how_much_and_what_is_kept() {
    let (records, params) = (growing(40), sft(json!({})));
    let peak = |records: &[Value]| {
        let gpu = Gpu::new(Box::new(PORTABLE));
        bench(Device::Cuda(gpu.clone()), records).run(run_sft, params.clone()).unwrap();
        gpu.usage().peak
    };
    // Enough for the short example and not for the long one.
    let (short, long) = (
        peak(&[
            records[0].clone(),
            records[0]
                .as_object()
                .map(|record| {
                    let mut other = record.clone();
                    other.insert("id".into(), json!("other"));
                    Value::Object(other)
                })
                .unwrap(),
        ]),
        peak(&records),
    );
    assert!(short < long, "{short} {long}");
    let mut bench = bench(Device::Cuda(Limited::to((short + long) / 2)), &records);
    let problem = bench.run(run_sft, params.clone()).unwrap_err();
    assert_eq!(problem.code, "cuda::out_of_memory");
    assert!(problem.message.contains("at step 2 of 2"), "{problem}");
    let said = problem.to_string();
    for part in ["one layer's work", "together", "device", "goes on from it", "help: `micro_batch_tokens = 2048`"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    // And it does: with more memory only the second step is left.
    bench.device = Device::Cuda(Gpu::new(Box::new(PORTABLE)));
    bench.run(run_sft, params).unwrap();
    assert_eq!(bench.lines("log.jsonl").len(), 2);
    assert!(bench.warnings.lock().unwrap().iter().any(|warning| warning == "resumed after step 1"));
}
