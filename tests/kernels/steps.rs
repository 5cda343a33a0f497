//! Training steps whose shape comes again: captured, launched as a whole, and the same bytes all the same.

use crate::bench::Bench;
use crate::model::{Rows, bench, config, model, rows, run, training};
use crate::support::{
    Asked, Emulated, HOPPER, Limited, PORTABLE, Watched, Watcher, before_launches, gpu, kind, on_device,
    on_each_kind_of_device, with_free_bytes,
};
use pipe::cuda::{Capability, Dim, Driver, Gpu, Mark, Queue, TensorMap, TensorView};
use pipe::files::Files;
use pipe::model::{Config, Device, Extent, Gradients, LoraSpec, Model, Placed, Policy, Recompute, fit, lora};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::stage;
use pipe::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What the host asked a device for. From the `after`-th graph on that is refused as lost.
#[derive(Default)]
struct Asks {
    launches: AtomicUsize,
    graphs: AtomicUsize,
    copies: AtomicUsize,
    memory: AtomicUsize,
    lost_after: AtomicUsize,
}

struct Counting(Arc<Asks>);

impl Watcher for Counting {
    fn asked(&self, asked: &Asked) -> Result<(), Problem> {
        let Asks { launches, graphs, copies, memory, lost_after } = &*self.0;
        let lost = lost_after.load(Ordering::Relaxed);
        match asked {
            Asked::Launch(_) => launches.fetch_add(1, Ordering::Relaxed),
            Asked::Graph => graphs.fetch_add(1, Ordering::Relaxed),
            Asked::Upload(_) | Asked::Download(_) => copies.fetch_add(1, Ordering::Relaxed),
            Asked::Memory(_) => memory.fetch_add(1, Ordering::Relaxed),
        };
        match lost > 0 && graphs.load(Ordering::Relaxed) >= lost {
            true => Err(Problem::new("cuda::lost", "the emulator was lost")),
            false => Ok(()),
        }
    }
}

/// A device with a pool, counted.
fn counted(kind: Emulated) -> (Gpu, Arc<Asks>) {
    let asks = Arc::<Asks>::default();
    (Gpu::new(Box::new(Watched(kind, Counting(asks.clone())))), asks)
}

impl Asks {
    /// Launches, graphs, copies and requests for memory since the last time.
    fn take(&self) -> [usize; 4] {
        [&self.launches, &self.graphs, &self.copies, &self.memory].map(|count| count.swap(0, Ordering::Relaxed))
    }
}

/// Steps that are launched kernel by kernel.
const PLAIN: Policy = Policy { recompute: Recompute::All, offload: false, graphs: false };

fn placed(gpu: &Gpu, policy: Policy) -> Placed {
    Placed::with(model(false, Dtype::Bf16), &Device::Cuda(gpu.clone()), policy).unwrap()
}

/// A model's memory for a step, by one of [`fit`].
fn bytes(
    of: fn(&pipe::model::decoder::Decoder<pipe::model::device::Cuda>, Policy, Extent, usize) -> usize,
    placed: &Placed,
    extent: Extent,
) -> usize {
    let Placed::Device(side) = placed else { panic!("on a device") };
    of(&side.model, side.policy, extent, 0)
}

/// One forward and one backward pass, added to the model's gradients.
fn step(placed: &mut Placed, rows: &Rows) -> Vec<f32> {
    let pass = placed.forward(&rows.batch()).unwrap();
    let (logprobs, slopes) = (pass.logprobs.clone(), slopes(&pass.logprobs));
    pass.backward(&slopes).unwrap();
    logprobs
}

/// Different for each step and each row.
fn slopes(logprobs: &[f32]) -> Vec<f32> {
    logprobs.iter().map(|logprob| -0.1 * logprob).collect()
}

/// The sequences of [`rows`] with other tokens, each time.
fn other_tokens(which: u64) -> Rows {
    let random = Stream::named(which, &["other"]);
    let ids: Vec<u32> = (0..42).map(|i| (random.u64(i) % 203) as u32).collect();
    let rows = rows();
    Rows { targets: rows.rows.iter().map(|row| ids[row + 1]).collect(), ids, ..rows }
}

/// As many learned rows, other ones.
fn other_rows(which: u64) -> Rows {
    let mut rows = other_tokens(which);
    rows.rows[0] -= 1 + which as usize % 10;
    rows
}

fn bits(placed: &mut Placed) -> Gradients {
    placed.gradients().unwrap()
}

/// Every weight, norms and biases away from 1 and 0.
fn everything(tied: bool) -> Model {
    let mut model = Model::random(config(tied), 3, Dtype::Bf16);
    model.train_all().unwrap();
    model
}

#[test]
fn from_the_third_time_on_a_step_is_two_graphs_two_uploads_and_one_download() {
    if on_device() {
        return;
    }
    let (gpu, asks) = counted(PORTABLE);
    let mut placed = placed(&gpu, Policy::default());
    placed.clear_gradients().unwrap();
    asks.take();
    step(&mut placed, &other_rows(0));
    let [launches, graphs, ..] = asks.take();
    assert!(launches > 100 && graphs == 0, "{launches} launches");
    step(&mut placed, &other_rows(1));
    assert_eq!(asks.take()[..2], [launches, 2], "captured, each kernel is told of once more");
    for which in 2..5 {
        step(&mut placed, &other_rows(which));
        assert_eq!(asks.take(), [0, 2, 3, 0], "no launch, and no memory");
    }
    println!("{launches} launches of the host become 2");
}

#[test]
fn captured_steps_add_the_same_bits_whatever_is_trained_and_kept() {
    on_each_kind_of_device(|| {
        let adapted = || model(false, Dtype::Bf16);
        for (make, recompute) in [
            (&adapted as &dyn Fn() -> Model, Recompute::All),
            (&adapted, Recompute::None),
            (&adapted, Recompute::First(1)),
            (&adapted, Recompute::Fit),
            (&|| everything(false), Recompute::All),
            (&|| everything(true), Recompute::All),
        ] {
            let steps = |graphs: bool| {
                let (gpu, asks) = counted(kind());
                let policy = Policy { recompute, offload: false, graphs };
                let mut placed = Placed::with(make(), &Device::Cuda(gpu), policy).unwrap();
                let logprobs: Vec<_> = (0..3).map(|which| step(&mut placed, &other_rows(which))).collect();
                (logprobs, bits(&mut placed), asks.take()[1])
            };
            let (law, ours) = (steps(false), steps(true));
            assert!(law.0 == ours.0 && law.1 == ours.1);
            assert_eq!((law.2, ours.2), (0, 4));
        }
    });
}

/// Records of three lengths.
fn examples() -> Vec<Value> {
    let record = |i: usize| {
        let (prompt, answer) = (format!("{i} + 1 ").repeat(i), format!("{}", i + 1));
        json!({"id": format!("{i}"), "prompt": prompt, "answer": answer, "chosen": answer, "rejected": "9 9"})
    };
    (1..4).map(record).collect()
}

fn epochs(kind: &pipe::manifest::spec::Kind, more: Value) -> Value {
    let mut params = training(
        kind,
        json!({
            "epochs": 4.0, "batch_size": 1, "resume_every_s": 0, "save_every_steps": 5, "keep_gradients": [11],
        }),
    );
    let params_of = params.as_object_mut().unwrap();
    params_of.remove("max_steps");
    params_of.extend(more.as_object().unwrap().clone());
    params
}

fn files(bench: &Bench) -> BTreeMap<String, Vec<u8>> {
    let files = Files::from_dir(&bench.path("out")).unwrap();
    files.iter().map(|(name, path)| (name.to_string(), std::fs::read(path).unwrap())).collect()
}

type Run = fn(&stage::Context) -> Result<(), Problem>;

#[test]
fn epochs_over_the_same_examples_end_with_the_same_bytes_and_fewer_launches() {
    if on_device() {
        return;
    }
    for (run, params) in [
        (stage::sft::run as Run, epochs(&stage::sft::KIND, json!({}))),
        (stage::dpo::run, epochs(&stage::dpo::KIND, json!({"beta": 0.2}))),
        (
            stage::sft::run,
            epochs(&stage::sft::KIND, json!({"checkpointing": "fit", "batch_size": 2, "micro_batch_size": 1})),
        ),
    ] {
        let ended = |free: usize| {
            let (gpu, asks) = counted(PORTABLE);
            let bench = bench(Device::Cuda(gpu), &examples());
            with_free_bytes(free, || bench.run(run, params.clone())).unwrap();
            (files(&bench), asks.take())
        };
        // Where memory is short nothing is captured.
        let ((law, plain), (ours, captured)) = (ended(0), ended(16 << 30));
        assert!(law == ours);
        assert_eq!(plain[1], 0);
        // Of each of three examples in four epochs: a step by itself, one that is captured, two more.
        assert_eq!(captured[1], 3 * 3 * 2);
        assert!(captured[0] < plain[0] * 2 / 3, "{} launches instead of {}", captured[0], plain[0]);
    }
}

#[test]
fn a_run_that_is_interrupted_among_captured_steps_ends_with_the_same_bytes() {
    let params = epochs(&stage::sft::KIND, json!({}));
    // What is launched as a graph is counted where the device is an emulated one.
    let device = || {
        if on_device() {
            return (gpu(), None);
        }
        let (gpu, asks) = counted(PORTABLE);
        (gpu, Some(asks))
    };
    let whole = bench(Device::Cuda(device().0), &examples());
    whole.run(stage::sft::run, params.clone()).unwrap();
    let (gpu, asks) = device();
    let captured = |least: usize| {
        let graphs = asks.as_ref().map(|asks| asks.take()[1]);
        assert!(graphs.is_none_or(|graphs| graphs >= least), "{graphs:?} graphs, {least} or more are to be launched");
    };
    let broken = bench(Device::Cuda(gpu), &examples());
    // Three examples an epoch: from the fourth step on they are captured, two graphs each, and anew after a stop.
    for (stop_at, least) in [(5, 2), (8, 0)] {
        broken.stop_at.store(stop_at, Ordering::Relaxed);
        broken.stop.store(false, Ordering::Relaxed);
        assert_eq!(broken.run(stage::sft::run, params.clone()).unwrap_err().code, "exec::interrupted");
        captured(least);
    }
    broken.stop_at.store(0, Ordering::Relaxed);
    broken.stop.store(false, Ordering::Relaxed);
    broken.run(stage::sft::run, params).unwrap();
    captured(2);
    assert!(files(&whole) == files(&broken));
}

#[test]
fn a_number_that_is_none_in_a_captured_step_stops_before_the_update() {
    if on_device() {
        return;
    }
    let params = epochs(&stage::sft::KIND, json!({}));
    let whole = bench(Device::Cuda(gpu()), &examples());
    whole.run(stage::sft::run, params.clone()).unwrap();

    let hurt = bench(Device::Cuda(gpu()), &examples());
    // The eighth is a captured one, in the third epoch.
    let mut steps = 0;
    let spoil = Box::new(move |kernel: &str, arguments: &[*mut c_void]| {
        steps += usize::from(kernel == "head_forward");
        if kernel == "head_forward" && steps == 8 {
            // SAFETY: the third argument points to the address of the hidden states, bf16; the emulator's memory is ours.
            unsafe { arguments[2].cast::<*mut u16>().read_unaligned().write(0x7FC0) }
        }
    });
    let problem = before_launches(spoil, || hurt.run(stage::sft::run, params.clone())).unwrap_err();
    assert_eq!(problem.code, "train::not_finite");
    assert!(problem.message.contains("the loss is NaN at step 8"), "{problem}");
    assert!(hurt.path("work/resume/step-00000007.checkpoint").exists());
    hurt.run(stage::sft::run, params).unwrap();
    assert!(files(&whole) == files(&hurt));
}

#[test]
fn a_gpu_that_is_lost_in_a_captured_step_keeps_what_was_saved() {
    if on_device() {
        return;
    }
    let params = epochs(&stage::sft::KIND, json!({}));
    let whole = bench(Device::Cuda(gpu()), &examples());
    whole.run(stage::sft::run, params.clone()).unwrap();

    let (gpu, asks) = counted(PORTABLE);
    // The backward pass of the second step of the third epoch.
    asks.lost_after.store(6 + 4, Ordering::Relaxed);
    let mut hurt = bench(Device::Cuda(gpu), &examples());
    let problem = hurt.run(stage::sft::run, params.clone()).unwrap_err();
    assert_eq!(problem.code, "cuda::lost");
    let said = problem.to_string();
    assert!(
        said.contains("a captured step: sequences 1, tokens ") && said.contains("CUDA_LAUNCH_BLOCKING=1"),
        "{said}"
    );
    assert!(hurt.path("work/resume/step-00000007.checkpoint").exists());
    hurt.device = Device::Cuda(crate::support::gpu());
    hurt.run(stage::sft::run, params).unwrap();
    assert!(files(&whole) == files(&hurt));
}

#[test]
fn a_pass_without_an_end_and_gradients_that_begin_anew_change_no_bit() {
    let mut placed = placed(&gpu(), Policy::default());
    let mut plain = self::placed(&gpu(), PLAIN);
    let batches: Vec<Rows> = (0..8).map(other_rows).collect();
    for rows in &batches[..3] {
        assert_eq!(step(&mut plain, rows), step(&mut placed, rows));
    }
    // Dropped before its backward pass: captured again when the shape comes.
    drop(placed.forward(&batches[5].batch()).unwrap());
    for rows in &batches[5..7] {
        assert_eq!(step(&mut plain, rows), step(&mut placed, rows));
    }
    assert!(bits(&mut plain) == bits(&mut placed));
    // From zero.
    assert!(run(&mut plain, &batches[7]) == run(&mut placed, &batches[7]));
    assert_eq!(step(&mut plain, &batches[7]), step(&mut placed, &batches[7]));
    assert!(bits(&mut plain) == bits(&mut placed));
}

/// One sequence of this many tokens, all learned.
fn sequence(tokens: usize) -> Rows {
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 37 % 203).collect();
    let targets = ids[1..].to_vec();
    Rows { ids, lengths: vec![tokens], rows: (0..tokens - 1).collect(), targets }
}

#[test]
fn all_shapes_work_in_one_region_that_is_as_large_as_the_largest_needs() {
    if on_device() {
        return;
    }
    let (gpu, asks) = counted(PORTABLE);
    let mut placed = placed(&gpu, Policy::default());
    let lengths = [20, 60, 33, 41];
    let largest = bytes(fit::region_bytes, &placed, Extent::of(&sequence(60).batch()));
    let mut taken = Vec::new();
    for _ in 0..4 {
        for tokens in lengths {
            step(&mut placed, &sequence(tokens));
        }
        taken.push(gpu.usage().now);
    }
    assert_eq!(taken[1] - taken[0], pipe::cuda::block_bytes(largest), "made once, for the longest there was");
    assert_eq!(taken[1..], [taken[1]; 3]);
    assert_eq!(asks.take()[1], 2 * 3 * lengths.len());
    // A larger one comes twice: the region grows, and what was captured in it is captured again.
    for tokens in [90, 90, 90, 20, 20] {
        step(&mut placed, &sequence(tokens));
    }
    let [_, graphs, ..] = asks.take();
    assert_eq!(graphs, 2 * 4);
    drop(placed);
    assert_eq!(gpu.usage().now, 0);
}

#[test]
fn the_region_is_given_back_before_a_step_that_needs_its_memory() {
    if on_device() {
        return;
    }
    let (gpu, asks) = counted(PORTABLE);
    let mut placed = placed(&gpu, Policy::default());
    let mut plain = self::placed(&self::gpu(), PLAIN);
    let mut both = |tokens: usize| {
        let rows = sequence(tokens);
        assert_eq!(step(&mut plain, &rows), step(&mut placed, &rows));
        gpu.usage().now
    };
    let before = both(30);
    assert!(both(30) > before && both(30) > before);
    assert_eq!(asks.take()[1], 4);
    // As much as there is in the pool, and no more.
    assert_eq!(
        with_free_bytes(0, || both(80)),
        before + 2 * (pipe::cuda::block_bytes(80 * 128) - pipe::cuda::block_bytes(30 * 128))
    );
    both(30);
    both(30);
    assert_eq!(asks.take()[1], 0, "and is not made again");
    assert!(bits(&mut plain) == bits(&mut placed));
}

/// The device has the memory for the steps and for nothing else: whether any is captured, none fails.
#[test]
fn steps_that_fit_still_fit() {
    if on_device() {
        return;
    }
    let lengths = [50, 50, 50, 70, 70, 50, 70, 20, 20, 20, 70];
    let run = |gpu: &Gpu| {
        let mut placed = placed(gpu, Policy::default());
        let logprobs: Vec<_> = lengths.map(|tokens| step(&mut placed, &sequence(tokens))).to_vec();
        (logprobs, bits(&mut placed))
    };
    let plenty = Gpu::new(Box::new(PORTABLE));
    let law = run(&plenty);
    let alone = Gpu::new(Box::new(PORTABLE));
    let mut model = placed(&alone, PLAIN);
    step(&mut model, &sequence(70));
    let (least, step) = (alone.usage().peak, bytes(fit::device_bytes, &model, Extent::of(&sequence(70).batch())));
    let captured = Mutex::new(Vec::new());
    for more in [step / 8, step, 2 * step, 5 * step] {
        let gpu = Limited::to(least + more);
        assert!(run(&gpu) == law, "{more} bytes more than a step takes");
        captured.lock().unwrap().push(gpu.usage().peak);
    }
    let peaks = captured.into_inner().unwrap();
    assert!(peaks.is_sorted() && peaks[0] < peaks[3], "{peaks:?}");
}

/// A device that does nothing, at once, with as much memory as is asked for: what is asked of it can be counted at any
/// size.
struct Idle {
    capability: Capability,
    next: AtomicU64,
    launches: Arc<AtomicUsize>,
    graphs: Arc<AtomicUsize>,
}

impl Driver for Idle {
    fn name(&self) -> String {
        "nothing".into()
    }

    fn capability(&self) -> Capability {
        self.capability
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Problem> {
        Ok(self.next.fetch_add(bytes.next_multiple_of(512) as u64, Ordering::Relaxed))
    }

    fn free(&self, _: u64) {}

    fn memory(&self) -> Result<(usize, usize), Problem> {
        Ok((1 << 50, 1 << 50))
    }

    fn upload(&self, _: u64, _: &[u8]) -> Result<(), Problem> {
        Ok(())
    }

    fn download(&self, _: u64, _: &mut [u8]) -> Result<(), Problem> {
        Ok(())
    }

    fn zero(&self, _: u64, _: usize) -> Result<(), Problem> {
        Ok(())
    }

    fn tensor_map(&self, _: &TensorView) -> Result<TensorMap, Problem> {
        Ok(TensorMap([0; 16]))
    }

    unsafe fn launch(&self, _: &'static str, _: Dim, _: Dim, _: u32, _: &mut [*mut c_void]) -> Result<(), Problem> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Problem> {
        Ok(())
    }

    /// Memory of the host is written to, so it is there, and stays.
    fn alloc_host(&self, bytes: usize) -> Result<u64, Problem> {
        Ok(Box::leak(vec![0u64; bytes.div_ceil(8)].into_boxed_slice()).as_ptr() as u64)
    }

    fn free_host(&self, _: u64) {}

    unsafe fn queue_upload(&self, _: Queue, _: u64, _: u64, _: usize) -> Result<(), Problem> {
        Ok(())
    }

    unsafe fn queue_download(&self, _: Queue, _: u64, _: u64, _: usize) -> Result<(), Problem> {
        Ok(())
    }

    fn mark(&self, _: Queue) -> Result<Mark, Problem> {
        Ok(Mark(0))
    }

    fn queue_wait(&self, _: Queue, _: Mark) -> Result<(), Problem> {
        Ok(())
    }

    fn wait(&self, _: Mark) -> Result<(), Problem> {
        Ok(())
    }

    fn forget(&self, _: Mark) {}

    fn begin_capture(&self) -> Result<(), Problem> {
        Ok(())
    }

    fn end_capture(&self) -> Result<u64, Problem> {
        Ok(1)
    }

    unsafe fn launch_graph(&self, _: u64) -> Result<(), Problem> {
        self.graphs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn free_graph(&self, _: u64) {}
}

/// A model of these layers, hidden size, intermediate size and vocabulary on a device that does nothing; launches and
/// graphs of each of three equal steps.
fn asked_of_nothing(
    [layers, hidden, inner, vocabulary]: [usize; 4],
    capability: Capability,
    recompute: Recompute,
    change: impl FnOnce(&mut Model),
    steps: &[Rows],
) -> Vec<[[usize; 2]; 3]> {
    let map = json!({
        "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "tie_word_embeddings": true,
    });
    let mut model = Model::random(Config::parse(&map.to_string()).unwrap(), 3, Dtype::Bf16);
    change(&mut model);
    let (launches, graphs) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let (next, counts) = (AtomicU64::new(1 << 20), [launches.clone(), graphs.clone()]);
    let gpu = Gpu::new(Box::new(Idle { capability, next, launches, graphs }));
    let mut placed = Placed::with(model, &Device::Cuda(gpu), Policy { recompute, ..Policy::default() }).unwrap();
    placed.clear_gradients().unwrap();
    counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    let mut once = |rows: &Rows| {
        step(&mut placed, rows);
        counts.each_ref().map(|count| count.swap(0, Ordering::Relaxed))
    };
    steps.iter().map(|rows| [once(rows), once(rows), once(rows)]).collect()
}

fn adapter(targets: &[&str], rank: usize) -> LoraSpec {
    LoraSpec { rank, alpha: 8.0, targets: targets.iter().map(|target| target.to_string()).collect() }
}

/// This many tokens in equal sequences, of which every `every`-th token is learned.
fn equal(sequences: usize, tokens: usize, every: usize) -> Rows {
    let ids: Vec<u32> = (0..(sequences * tokens) as u32).map(|i| i % 101).collect();
    let rows: Vec<usize> = (0..ids.len()).step_by(every).collect();
    Rows { targets: rows.iter().map(|row| ids[*row]).collect(), ids, lengths: vec![tokens; sequences], rows }
}

#[test]
fn a_region_holds_the_step_it_was_made_for_whatever_its_shape() {
    let (portable, hopper) = (PORTABLE.0, HOPPER.0);
    // Wide as Qwen2.5's: the intermediate size is five times the hidden one, the vocabulary 170 times.
    let wide = [5, 64, 344, 10_880];
    let steps = [(1, 1, 1), (1, 37, 1), (3, 50, 2), (1, 700, 40), (2, 2600, 1), (1, 9000, 3)]
        .map(|(sequences, tokens, every)| equal(sequences, tokens, every));
    let recomputed = [Recompute::All, Recompute::None, Recompute::First(3)];
    let of = |capability, embedded: usize, change: &dyn Fn(&mut Model)| {
        for recompute in recomputed {
            for (counts, rows) in asked_of_nothing(wide, capability, recompute, change, &steps).iter().zip(&steps) {
                let [[launches, 0], [the_same, 2], [outside, 2]] = *counts else {
                    panic!("{recompute:?}, {:?}, {} rows: {counts:?}", rows.lengths, rows.rows.len())
                };
                // The gradient of an embedding depends on which tokens there are: it is launched by itself.
                assert_eq!((the_same, outside), (launches, embedded), "{recompute:?}, {:?}", rows.lengths);
            }
        }
    };
    for capability in [portable, hopper] {
        for targets in [&lora::TARGETS[..], &["q_proj", "v_proj"], &["lm_head"]] {
            for rank in [8, 64] {
                of(capability, 0, &|model| model.add_lora(&adapter(targets, rank), 4).unwrap());
            }
        }
        of(capability, 1, &|model| model.train_all().unwrap());
    }
}

/// The layers and the vocabulary of Qwen2.5-0.5B and 7B, which is all that the number of launches depends on.
#[test]
fn a_step_of_qwen_is_thousands_of_launches_or_two_graphs() {
    for (layers, vocabulary, launches) in [(24, 151_936, 2295), (28, 152_064, 2671)] {
        let change = |model: &mut Model| model.add_lora(&adapter(&lora::TARGETS, 8), 4).unwrap();
        let counts =
            asked_of_nothing([layers, 16, 16, vocabulary], PORTABLE.0, Recompute::All, change, &[sequence(512)]);
        assert_eq!(counts[0], [[launches, 0], [launches, 2], [0, 2]], "{layers} layers");
    }
}
