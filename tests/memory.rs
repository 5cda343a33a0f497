//! What `model::memory` plans for the host, held to what an allocator that counts has given.
//!
//! Scratch of products and of attention is not planned: each thread may have some beside.

use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::memory::{Decode, Part, Plan, Trained, Work};
use pipe::model::{Batch, Config, Device, Extent, Gradients, LoraSpec, Model, Placed, Policy, Recompute, lora};
use pipe::tensor::Dtype;
use pipe::train::{self, Optimizer, Options};
use serde_json::json;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work; only sizes are noted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One measurement at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// How far a planned peak may be from the one counted, and scratch of a thread, in bytes.
const ALLOWED: f64 = 0.1;
const SCRATCH: f64 = (1 << 20) as f64;

/// Bytes that `work` held at most, beside what was there before.
fn peak_of<T>(work: impl FnOnce() -> T) -> f64 {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    std::hint::black_box(work());
    (PEAK.load(Ordering::Relaxed) - before) as f64
}

#[track_caller]
fn near(planned: u64, counted: f64, what: &str) {
    let planned = planned as f64;
    let scratch = SCRATCH * std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let (least, most) = (planned * (1.0 - ALLOWED), planned * (1.0 + ALLOWED) + scratch);
    assert!(least <= counted && counted <= most, "{what}: planned {planned}, counted {counted}");
}

fn config() -> Config {
    let map = json!({
        "model_type": "qwen2", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": false,
    });
    Config::parse(&map.to_string()).unwrap()
}

/// A training step, from loading to the update.
fn step(dtype: Dtype, spec: Option<&LoraSpec>, recompute: bool, kind: train::Kind, lengths: &[usize]) {
    let mut model = Model::random(config(), 3, dtype);
    let policy = Policy { recompute: if recompute { Recompute::All } else { Recompute::None }, ..Policy::default() };
    match spec {
        Some(spec) => model.add_lora(spec, 4).unwrap(),
        None => model.train_all().unwrap(),
    }
    let tokens: usize = lengths.iter().sum();
    let ids: Vec<u32> = (0..tokens).map(|i| (i * 7 % 2048) as u32).collect();
    let rows: Vec<usize> = (0..tokens).collect();
    let batch = Batch { ids: &ids, lengths, rows: &rows, targets: &ids };
    let mut grads = Gradients::zeros(model.params());
    let mut optimizer = Optimizer::new(kind, Options::default(), model.params());
    let forward = model.forward_with(policy, &batch);
    model.backward(forward.tape, &vec![-1e-3; tokens], &mut grads);
    model.update(|params| optimizer.step(params, &grads, 1e-3));
}

#[test]
fn a_planned_step_on_the_processor_is_what_was_allocated() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let targets = lora::TARGETS.map(String::from).to_vec();
    let spec = LoraSpec { rank: 8, alpha: 16.0, targets };
    let lengths = [400, 300, 200];
    for (dtype, spec, recompute, kind) in [
        (Dtype::F32, Some(&spec), false, train::Kind::AdamW),
        (Dtype::Bf16, Some(&spec), true, train::Kind::AdamW8bit),
        (Dtype::F32, None, true, train::Kind::AdamW),
        (Dtype::F32, None, false, train::Kind::AdamW8bit),
    ] {
        let counted = peak_of(|| step(dtype, spec, recompute, kind, &lengths));
        let (config, state_sizes) = (config(), |values| kind.state_sizes(values));
        let kept = if recompute { 0 } else { usize::MAX };
        let extent = Extent { tokens: 900, rows: 900, sequences: 3, longest: 400 };
        let plan = Plan {
            config: &config,
            dtype,
            trained: spec.map_or(Trained::Everything, Trained::Adapter),
            on_device: false,
            work: Work::Train { extent, kept, offload: false, graphs: false, state_sizes: &state_sizes },
        };
        let what = format!("{dtype:?}, adapter {}, recomputed {recompute}, {kind:?}", spec.is_some());
        near(plan.need().host, counted, &what);
    }
}

#[test]
fn optimizer_states_and_weights_are_planned_to_the_byte() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let mut model = Model::random(config(), 3, dtype);
        let frozen = model.bytes();
        model.train_all().unwrap();
        for kind in [train::Kind::AdamW, train::Kind::AdamW8bit] {
            let optimizer = Optimizer::new(kind, Options::default(), model.params());
            let state_sizes = |values| kind.state_sizes(values);
            let (extent, offload) = (Extent::full(1, 1), false);
            let work = Work::Train { extent, kept: 0, offload, graphs: false, state_sizes: &state_sizes };
            let config = config();
            let plan = Plan { config: &config, dtype, trained: Trained::Everything, on_device: false, work };
            let planned = plan.need();
            assert_eq!(planned.of(Part::Optimizer).0, optimizer.bytes() as u64);
            assert_eq!(planned.of(Part::Trained).0, 4 * model.trained_values() as u64);
            assert_eq!(plan.trained_values(), model.trained_values() as u64);
            // A trained norm or bias is there once, among the trained values.
            assert_eq!(planned.of(Part::Weights).0, frozen as u64);
        }
    }
}

#[test]
fn planned_decoding_on_the_processor_is_what_was_allocated() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let model = Placed::new(Model::random(config(), 3, Dtype::F32), &Device::Cpu).unwrap();
    let config = config();
    // All at once, their pages full but for a few tokens; and one after another, whose prompts stay for a while.
    for (count, len, max_tokens, live) in [(6, 300, 4, 6), (20, 250, 2, 2)] {
        let ids = |i: u32| (0..len as u32).map(|id| (id * 3 + i) % 2048).collect();
        let prompts: Vec<Prompt> = (0..count).map(|i| Prompt { ids: ids(i), stream: 0 }).collect();
        let sampling = Sampling { max_tokens, ..Sampling::default() };
        let limits = Limits { live, ..Limits::default() };
        let words = |_: &[u32]| String::new();
        let counted = peak_of(|| generate(&model, &prompts, &sampling, &words, &mut |_| Ok(()), &limits).unwrap());
        let work = Work::Decode(Decode::new(&config, false, live, len + max_tokens, len));
        let plan = Plan { config: &config, dtype: Dtype::F32, trained: Trained::Nothing, on_device: false, work };
        let need = plan.need();
        near(need.host - need.of(Part::Weights).0, counted, &format!("{count} prompts of {len}, {live} at once"));
    }
}
