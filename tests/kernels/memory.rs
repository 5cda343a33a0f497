//! What `model::memory` plans for a device, held to what its buffers took.
//!
//! The device is `Gpu::new` over the emulator: buffers in blocks, as on a real one.

use crate::model::{bench, training};
use crate::support::{Limited, PORTABLE};
use pipe::cuda::Gpu;
use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::memory::{Decode, Need, Part, Plan, Trained, Work};
use pipe::model::{Batch, Config, Device, Extent, LoraSpec, Model, Placed, Policy, Recompute, fit, lora};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::stage::forecast::needs;
use pipe::stage::{self, Context};
use pipe::tensor::Dtype;
use pipe::train::{self, Options, Trainer};
use serde_json::{Value, json};

/// How far a planned peak may be from the one counted.
const ALLOWED: f64 = 0.01;

/// The terms of a device's column. A term that moves there is added here.
const TERMS: &[Part] = &[
    Part::Weights,
    Part::Trained,
    Part::Gradients,
    Part::Optimizer,
    Part::Activations,
    Part::Layer,
    Part::Head,
    Part::Cache,
    Part::Graphs,
];

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

fn placed(gpu: &Gpu, tied: bool, spec: &LoraSpec) -> Placed {
    let mut model = Model::random(config(tied), 3, Dtype::Bf16);
    model.add_lora(spec, 4).unwrap();
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
}

#[track_caller]
fn near(need: &Need, gpu: &Gpu, what: &str) {
    let (planned, counted) = (need.device as f64, gpu.usage().peak as f64);
    assert!((planned / counted - 1.0).abs() <= ALLOWED, "{what}: planned {planned}, counted {counted}: {need:?}");
    let lines = need.lines.iter().filter(|line| line.device > 0);
    assert!(lines.clone().all(|line| TERMS.contains(&line.part)), "{what}: a term of no name: {need:?}");
    assert_eq!(lines.map(|line| line.device).sum::<u64>(), need.device, "{what}: the lines add up");
}

/// A step of one micro-batch.
fn step(trainer: &mut Trainer, rows: &Rows) {
    trainer.forward(&rows.batch()).unwrap().backward(&vec![-1.0; rows.rows.len()]).unwrap();
    let norm = trainer.norm().unwrap();
    trainer.clip(norm, 1.0).unwrap();
    trainer.step(1e-4).unwrap();
}

/// One micro-batch and its update: what the plan says, and what is counted.
fn step_is_planned(lengths: &[usize], tied: bool, spec: Option<&LoraSpec>, kept: Kept, kind: train::Kind) {
    let (rows, gpu) = (rows(lengths), Gpu::new(Box::new(PORTABLE)));
    let mut model = Model::random(config(tied), 3, Dtype::Bf16);
    match spec {
        Some(spec) => model.add_lora(spec, 4).unwrap(),
        None => model.train_all().unwrap(),
    }
    let policy = Policy { recompute: Recompute::First(3 - kept.layers), offload: kept.offload, ..Policy::default() };
    let placed = Placed::with(model, &Device::Cuda(gpu.clone()), policy).unwrap();
    let mut trainer = Trainer::new(placed, kind, Options::default()).unwrap();
    trainer.clear_gradients().unwrap();
    step(&mut trainer, &rows);
    let (config, state_sizes) = (config(tied), |values| kind.state_sizes(values));
    let (extent, Kept { layers, offload }) = (Extent::of(&rows.batch()), kept);
    let trained = spec.map_or(Trained::Everything, Trained::Adapter);
    let work = Work::Train { extent, kept: layers, offload, graphs: false, state_sizes: &state_sizes };
    let plan = Plan { config: &config, dtype: Dtype::Bf16, trained, on_device: true, work };
    let need = plan.need();
    let what = spec.map_or("every weight".to_string(), |spec| spec.targets.join(", "));
    near(&need, &gpu, &format!("{lengths:?}, {what}, tied {tied}, {kept:?}, {kind:?}"));
    // What is there for a while, by itself; angles have come to stay, and after the peak tables of addresses.
    let blocks = |bytes: usize| pipe::cuda::block_bytes(bytes) as u64;
    let planned = (plan.working() - 2 * blocks(extent.longest * 32 * 4)) as f64;
    let counted = (gpu.usage().peak - gpu.usage().now) as f64;
    let apart = (planned - counted).abs();
    assert!(apart <= ALLOWED * counted + 8192.0, "{what}: {planned} for a while, counted {counted}");
    // Of what is there all the time, the gradients by themselves.
    let values: Vec<usize> = trainer.tensors().iter().map(|(_, shape)| shape.iter().product()).collect();
    assert_eq!(need.of(Part::Gradients), (0, values.iter().map(|values| blocks(4 * values)).sum()), "{what}");
    drop(trainer);
    assert_eq!(gpu.usage().now, 0, "{what}");
}

/// How many layers keep their activations, and whether inputs leave.
#[derive(Debug, Clone, Copy)]
struct Kept {
    layers: usize,
    offload: bool,
}

const NONE: Kept = Kept { layers: 0, offload: false };
const LAST: Kept = Kept { layers: 1, offload: false };
const ALL: Kept = Kept { layers: 3, offload: false };
const LEAVING: Kept = Kept { layers: 0, offload: true };
const LEAVING_BUT_ACTIVATIONS: Kept = Kept { layers: 2, offload: true };

#[test]
fn a_planned_training_step_is_what_the_buffers_take() {
    for (lengths, targets, tied, kept, kind) in [
        (&[60, 40, 20][..], &lora::TARGETS[..], true, NONE, train::Kind::AdamW),
        (&[60, 40, 20], &lora::TARGETS[..7], false, ALL, train::Kind::AdamW8bit),
        (&[37], &["q_proj", "v_proj"], true, NONE, train::Kind::AdamW8bit),
        (&[60, 60], &["lm_head"], false, NONE, train::Kind::AdamW),
        (&[9, 4], &lora::TARGETS, true, ALL, train::Kind::AdamW),
        (&[70, 50], &lora::TARGETS[..7], true, LAST, train::Kind::AdamW),
        (&[70, 50], &lora::TARGETS[..7], true, LEAVING, train::Kind::AdamW),
        (&[70, 50], &lora::TARGETS[..7], false, LEAVING_BUT_ACTIVATIONS, train::Kind::AdamW),
    ] {
        step_is_planned(lengths, tied, Some(&spec(targets)), kept, kind);
    }
}

#[test]
fn a_planned_step_of_every_weight_is_what_the_buffers_take() {
    for (lengths, tied, kept, kind) in [
        (&[60, 40, 20][..], true, NONE, train::Kind::AdamW),
        (&[60, 40, 20], false, ALL, train::Kind::AdamW8bit),
        (&[37], false, LEAVING, train::Kind::AdamW8bit),
    ] {
        step_is_planned(lengths, tied, None, kept, kind);
    }
}

/// Steps of one shape, of which the second and the third are captured, and one of another that is not, beside them.
#[test]
fn planned_steps_with_the_region_of_captured_ones_are_what_the_buffers_take() {
    for (lengths, targets, kept) in [
        (&[60, 40, 20][..], &lora::TARGETS[..], NONE),
        (&[60, 40, 20], &lora::TARGETS[..7], ALL),
        (&[30, 7], &["q_proj", "v_proj"], LAST),
    ] {
        let (spec, gpu) = (spec(targets), Gpu::new(Box::new(PORTABLE)));
        let mut model = Model::random(config(true), 3, Dtype::Bf16);
        model.add_lora(&spec, 4).unwrap();
        let policy = Policy { recompute: Recompute::First(3 - kept.layers), ..Policy::default() };
        let placed = Placed::with(model, &Device::Cuda(gpu.clone()), policy).unwrap();
        let mut trainer = Trainer::new(placed, train::Kind::AdamW, Options::default()).unwrap();
        let mut step = |rows: &Rows| {
            step(&mut trainer, rows);
            gpu.usage()
        };
        let rows = rows(lengths);
        let plain = step(&rows);
        let captured = [step(&rows), step(&rows)];
        assert!(captured[0].now > plain.now && captured[0].now == captured[1].now, "captured, and then launched again");
        // Another shape that takes as much.
        let mut other = rows;
        other.lengths.rotate_left(1);
        step(&other);
        let (config, state_sizes) = (config(true), |values| train::Kind::AdamW.state_sizes(values));
        let extent = Extent::of(&other.batch());
        let work = Work::Train { extent, kept: kept.layers, offload: false, graphs: true, state_sizes: &state_sizes };
        let plan =
            Plan { config: &config, dtype: Dtype::Bf16, trained: Trained::Adapter(&spec), on_device: true, work };
        near(&plan.need(), &gpu, &format!("{lengths:?}, {targets:?}, {kept:?}"));
        assert_eq!(plan.need().of(Part::Graphs), (0, pipe::cuda::block_bytes(plan.region()) as u64));
    }
}

/// Whatever there is beside weights and gradients, as many layers keep their activations as fit, and a batch of another
/// shape finds room too.
#[test]
fn as_many_layers_as_fit_keep_their_activations_and_none_too_many() {
    let spec = spec(&lora::TARGETS[..7]);
    let fitting = |gpu: &Gpu| {
        let mut model = Model::random(config(true), 3, Dtype::Bf16);
        model.add_lora(&spec, 4).unwrap();
        let policy = Policy { recompute: Recompute::Fit, ..Policy::default() };
        let mut placed = Placed::with(model, &Device::Cuda(gpu.clone()), policy).unwrap();
        placed.clear_gradients().unwrap();
        placed
    };
    let (first, second) = (rows(&[50, 40]), rows(&[40]));
    let mut peaks = Vec::new();
    for kept in 1..=3 {
        let gpu = Gpu::new(Box::new(PORTABLE));
        let Placed::Device(side) = fitting(&gpu) else { panic!("on a device") };
        let free = fit::device_bytes(&side.model, side.policy, Extent::of(&first.batch()), kept);
        let gpu = Limited::to(gpu.usage().now + free);
        let mut placed = fitting(&gpu);
        for rows in [&second, &first] {
            placed.forward(&rows.batch()).unwrap().backward(&vec![-1.0; rows.rows.len()]).unwrap();
        }
        peaks.push(gpu.usage().peak);
    }
    assert!(peaks.is_sorted() && peaks[0] < peaks[2], "{peaks:?}");
}

/// DPO's reference and a probe: log-probs that keep nothing.
#[test]
fn planned_log_probs_are_what_the_buffers_take() {
    let (rows, spec, gpu) = (rows(&[180, 77, 31]), spec(&lora::TARGETS), Gpu::new(Box::new(PORTABLE)));
    placed(&gpu, true, &spec).logprobs(&rows.batch()).unwrap();
    let (config, extent) = (config(true), Extent::of(&rows.batch()));
    let (dtype, trained) = (Dtype::Bf16, Trained::Adapter(&spec));
    let of = |extent, logits, hidden_states| {
        let work = Work::Measure { extent, logits, hidden_states };
        Plan { config: &config, dtype, trained, on_device: true, work }.need()
    };
    near(&of(extent, false, false), &gpu, "log-probs");

    let gpu = Gpu::new(Box::new(PORTABLE));
    let placed = placed(&gpu, true, &spec);
    let one = Extent { rows: 1, ..Extent::full(288, 288) };
    placed.hidden_states(&rows.ids).unwrap();
    near(&of(one, false, true), &gpu, "hidden states");
    placed.logits(&rows.ids).unwrap();
    near(&of(one, true, true), &gpu, "logits");
}

#[test]
fn planned_decoding_is_what_the_buffers_take_with_pages_for_one_or_for_all() {
    let (spec, config) = (spec(&lora::TARGETS[..7]), config(false));
    for (count, prompt, max_tokens, ends) in [(3, 40, 3, 3), (3, 40, 3, 1), (5, 2, 700, 5), (5, 2, 700, 1)] {
        for (temperature, repetition_penalty) in [(0.0, 1.0), (1.0, 1.2)] {
            let gpu = Gpu::new(Box::new(PORTABLE));
            let placed = placed(&gpu, false, &spec);
            let stream = |i: usize| {
                let ids = (0..prompt as u32).map(|id| id + i as u32).collect();
                Prompt { ids, stream: i as u64 }
            };
            let prompts: Vec<Prompt> = (0..count).map(stream).collect();
            // Room is made for the longest completion there may be; a few tokens show the rest.
            let (mut steps, mut there) = (0, 0);
            let sampling = Sampling { max_tokens, temperature, repetition_penalty, ..Sampling::default() };
            let mut on_step = |_: usize| {
                there = gpu.usage().now;
                steps += 1;
                if steps > 3 { Err(Problem::new("test::enough", "enough")) } else { Ok(()) }
            };
            let longest = prompt + max_tokens;
            let limits = Limits { pages: ends * (longest - 1).div_ceil(16), ..Limits::default() };
            let _ = generate(&placed, &prompts, &sampling, &|_| String::new(), &mut on_step, &limits);
            assert!(steps >= 3);
            let decode = Decode { ends, ..Decode::new(&config, true, count, longest, prompt) };
            let plan = Plan {
                config: &config,
                dtype: Dtype::Bf16,
                trained: Trained::Adapter(&spec),
                on_device: true,
                work: Work::Decode(decode),
            };
            let (need, what) =
                (plan.need(), format!("{count} prompts of {prompt}, pages for {ends}, at {temperature}"));
            let all_the_time = (need.device - plan.working()) as f64;
            assert!((all_the_time / there as f64 - 1.0).abs() <= ALLOWED, "{what}: {all_the_time}, {there}: {need:?}");
            // Room is left for all prompts together, even if pages are so few that only one is begun.
            if ends == count {
                near(&need, &gpu, &what);
            } else {
                assert!(gpu.usage().peak as u64 <= need.device, "{what}");
            }
        }
    }
}

/// Wherever it is planned to fit, with what a decoder leaves to others, it does; a fifth below it does not begin.
#[test]
fn a_decoder_begins_where_its_planned_least_is_free() {
    let (spec, config) = (spec(&lora::TARGETS[..7]), config(false));
    let decode = Decode::new(&config, true, 4, 600, 200);
    let (dtype, trained, work) = (Dtype::Bf16, Trained::Adapter(&spec), Work::Decode(decode));
    let least = Plan { config: &config, dtype, trained, on_device: true, work }.need().device as usize;
    let sampling = Sampling { max_tokens: 400, stop_ids: (0..2200).collect(), ..Sampling::default() };
    let prompts: Vec<Prompt> = (0..4).map(|i| Prompt { ids: (i..i + 200).collect(), stream: u64::from(i) }).collect();
    let run = |bytes: usize| {
        let placed = placed(&Limited::to(bytes), false, &spec);
        let limits = Limits { graphs: false, ..Limits::default() };
        generate(&placed, &prompts, &sampling, &|_| String::new(), &mut |_| Ok(()), &limits)
    };
    let made = run(least * 5 / 4).unwrap();
    assert_eq!(made.len(), 4);
    let problem = run(least * 4 / 5).unwrap_err();
    assert_eq!(problem.code, "cuda::out_of_memory");
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
    let forecast = (stage::sft::STAGE.forecast)(params.as_object().unwrap()).unwrap();
    let planned = |data| forecast.computes().needs(&shape, data, true).most.device;
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
