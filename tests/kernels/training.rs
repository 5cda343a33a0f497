//! Training where everything stays on the device: the updates of the processor, an interruption that leaves no
//! trace, gradients that are not numbers, and every weight.

use crate::model::{apart, bench, both, config, model, rows, run, training};
use crate::support::{
    Asked, BeforeLaunch, PORTABLE, Watched, Watcher, before_launches, gpu, on_device, with_free_bytes,
};
use pipe::cuda::Gpu;
use pipe::files::Files;
use pipe::model::{Device, Extent, Model, Placed, Policy, Recompute, fit};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::stage;
use pipe::tensor::Dtype;
use pipe::train::{Checkpoint, Kind, Options, Trainer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Every weight of a model trained; norms and biases away from 1 and 0.
fn everything(tied: bool) -> Model {
    let mut model = Model::random(config(tied), 3, Dtype::Bf16);
    model.train_all().unwrap();
    model.update(|params| {
        for param in params.iter_mut().filter(|param| param.shape.len() == 1) {
            let random = Stream::named(8, &[&param.name]);
            param.value.iter_mut().zip(0..).for_each(|(value, i)| *value += random.normal(i) as f32 * 0.1);
        }
    });
    model
}

/// Gradients that a step might have.
fn gradients(trainer: &mut Trainer, step: u64) {
    let mut grads = trainer.gradients().unwrap();
    for (values, (name, _)) in grads.values.iter_mut().zip(trainer.tensors()) {
        let random = Stream::named(step, &[&name, "gradient"]);
        values.iter_mut().zip(0..).for_each(|(value, i)| *value = random.normal(i) as f32);
    }
    match trainer {
        Trainer::Host(side, _) => *side.gradients() = grads,
        Trainer::Device(side, _) => {
            let sums = &mut side.gradients().unwrap().values;
            sums.iter_mut().zip(&grads.values).for_each(|(sum, values)| sum.write(values).unwrap());
        }
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = Files::from_dir(folder).unwrap();
    files.iter().map(|(name, path)| (name.to_string(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn updates_and_saved_states_have_the_bytes_of_the_processors() {
    let options = Options { beta2: 0.95, weight_decay: 0.1, ..Options::default() };
    for (kind, full) in [(Kind::AdamW, false), (Kind::AdamW8bit, false), (Kind::AdamW8bit, true)] {
        let model = || if full { everything(false) } else { model(false, Dtype::Bf16) };
        let runs = [Device::Cpu, Device::Cuda(gpu())].map(|device| {
            let folder = tempfile::tempdir().unwrap();
            let states = Checkpoint::in_folder(folder.path()).unwrap();
            let new = || Trainer::new(Placed::new(model(), &device).unwrap(), kind, options).unwrap();
            let mut trainer = new();
            for step in 1..=3 {
                gradients(&mut trainer, step);
                let norm = trainer.norm().unwrap();
                let near = (norm * 1e3).round() / 1e3;
                assert!((norm - near).abs() <= 1e-3);
                // The same number on both sides, whose sums differ in their last bits.
                trainer.clip(near, 10.0).unwrap();
                trainer.step(1e-3).unwrap();
            }
            trainer.save(&states, 3, json!("log")).unwrap();
            // A state goes on wherever it was saved.
            let mut again = new();
            assert_eq!(again.restore(&states).unwrap().unwrap().step, 3);
            assert_eq!(again.params().unwrap(), trainer.params().unwrap());
            again.save(&states, 4, json!("log")).unwrap();
            files(folder.path())
        });
        assert_eq!(runs[0].len(), 2);
        assert!(runs[0] == runs[1], "{kind:?}, every weight: {full}");
    }
}

fn counting(records: usize) -> Vec<Value> {
    let record = |i| json!({"id": format!("{i}"), "prompt": format!("{i} + 1"), "answer": format!("{}", i + 1)});
    (0..records).map(record).collect()
}

/// Parameters of five steps with everything that may be kept.
fn five_steps(optimizer: &str, lora: bool) -> Value {
    let optimizer = json!({
        "kind": optimizer, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0,
    });
    let more = json!({
        "max_steps": 5, "optimizer": optimizer, "resume_every_s": 0, "save_every_steps": 2, "keep_gradients": [3],
    });
    let mut params = training(&stage::sft::KIND, more);
    if !lora {
        params.as_object_mut().unwrap().remove("lora");
        params["learning_rate"] = json!(1e-3);
    }
    params
}

#[test]
fn an_interrupted_run_on_the_device_ends_with_the_same_bytes() {
    for (optimizer, lora) in [("adamw", true), ("adamw-8bit", true), ("adamw-8bit", false)] {
        let params = five_steps(optimizer, lora);
        let whole = bench(Device::Cuda(gpu()), &counting(4));
        whole.run(stage::sft::run, params.clone()).unwrap();

        let broken = bench(Device::Cuda(gpu()), &counting(4));
        for stop_at in [2, 3] {
            broken.stop_at.store(stop_at, Ordering::Relaxed);
            broken.stop.store(false, Ordering::Relaxed);
            let problem = broken.run(stage::sft::run, params.clone()).unwrap_err();
            assert_eq!(problem.code, "exec::interrupted");
        }
        broken.stop_at.store(0, Ordering::Relaxed);
        broken.stop.store(false, Ordering::Relaxed);
        broken.run(stage::sft::run, params).unwrap();
        assert_eq!(broken.warnings.lock().unwrap()[..], ["resumed after step 2", "resumed after step 3"]);
        assert!(files(&whole.path("out")) == files(&broken.path("out")), "{optimizer}, lora {lora}");
        assert!(whole.outputs().iter().any(|name| name == "gradients/step-000003.safetensors"));
    }
}

/// Writes NaN into the first gradient before its norm is taken for the `which`-th time.
fn spoil(which: usize) -> BeforeLaunch {
    let mut norms = 0;
    Box::new(move |kernel, arguments| {
        if kernel == "grad_norm_pieces" {
            norms += 1;
            if norms == which {
                // SAFETY: the second argument points to the table of gradients, each an address and a length; the
                // emulator's memory is ours.
                unsafe {
                    let table = arguments[1].cast::<*const *mut f32>().read_unaligned();
                    table.read().write(f32::NAN);
                }
            }
        }
    })
}

#[test]
fn a_gradient_that_is_not_a_number_stops_before_the_update_and_the_state_before_it_is_kept() {
    if on_device() {
        return;
    }
    let params = five_steps("adamw", true);
    let whole = bench(Device::Cuda(gpu()), &counting(4));
    whole.run(stage::sft::run, params.clone()).unwrap();

    let hurt = bench(Device::Cuda(gpu()), &counting(4));
    let problem = before_launches(spoil(3), || hurt.run(stage::sft::run, params.clone())).unwrap_err();
    assert_eq!(problem.code, "train::not_finite");
    assert!(problem.message.contains("gradient norm is NaN at step 3"), "{problem}");
    assert!(hurt.path("work/resume/step-00000002.checkpoint").exists());
    hurt.run(stage::sft::run, params).unwrap();
    assert_eq!(hurt.warnings.lock().unwrap()[..], ["resumed after step 2"]);
    assert!(files(&whole.path("out")) == files(&hurt.path("out")));
}

/// A device that answers every call with a problem from the `after`-th launch of a kernel on.
struct Fails {
    kernel: &'static str,
    after: usize,
    code: &'static str,
    seen: AtomicUsize,
}

impl Fails {
    fn at(kernel: &'static str, after: usize, code: &'static str) -> Gpu {
        Gpu::new(Box::new(Watched(PORTABLE, Fails { kernel, after, code, seen: AtomicUsize::new(0) })))
    }
}

impl Watcher for Fails {
    fn asked(&self, asked: &Asked) -> Result<(), Problem> {
        if matches!(asked, Asked::Launch(kernel) if *kernel == self.kernel) {
            self.seen.fetch_add(1, Ordering::Relaxed);
        }
        match self.seen.load(Ordering::Relaxed) >= self.after {
            true => Err(Problem::new(self.code, "the device says no")),
            false => Ok(()),
        }
    }
}

#[test]
fn a_gpu_that_is_lost_keeps_what_was_saved_and_another_one_ends_with_the_same_bytes() {
    if on_device() {
        return;
    }
    let params = five_steps("adamw", true);
    let whole = bench(Device::Cuda(gpu()), &counting(4));
    whole.run(stage::sft::run, params.clone()).unwrap();

    let mut hurt = bench(Device::Cuda(Fails::at("grad_norm_join", 3, "cuda::lost")), &counting(4));
    let problem = hurt.run(stage::sft::run, params.clone()).unwrap_err();
    assert_eq!(problem.code, "cuda::lost");
    assert!(hurt.path("work/resume/step-00000002.checkpoint").exists());
    hurt.device = Device::Cuda(gpu());
    hurt.run(stage::sft::run, params).unwrap();
    assert_eq!(hurt.warnings.lock().unwrap()[..], ["resumed after step 2"]);
    assert!(files(&whole.path("out")) == files(&hurt.path("out")));
}

#[test]
fn a_launch_that_is_refused_names_the_kernel_and_its_shape() {
    if on_device() {
        return;
    }
    let hurt = bench(Device::Cuda(Fails::at("swiglu_forward", 1, "cuda::launch")), &counting(4));
    let problem = hurt.run(stage::sft::run, five_steps("adamw", true)).unwrap_err();
    assert_eq!(problem.code, "cuda::launch");
    let said = problem.to_string();
    assert!(said.contains("kernel `swiglu_forward`, grid ") && said.contains("block "), "{said}");
}

#[test]
fn gradients_of_every_weight_are_those_of_the_processor() {
    for tied in [false, true] {
        let rows = rows();
        let (law, law_grads) = run(&mut Placed::new(everything(tied), &Device::Cpu).unwrap(), &rows);
        let mut placed = Placed::new(everything(tied), &Device::Cuda(gpu())).unwrap();
        let (logprobs, grads) = run(&mut placed, &rows);
        assert!(apart(&logprobs, &law) <= 6e-3, "tied {tied}: {}", apart(&logprobs, &law));
        assert_eq!(placed.params().unwrap().len(), 2 + 2 * (2 + 7 + 3) + usize::from(!tied));
        for (param, (got, want)) in placed.params().unwrap().iter().zip(grads.values.iter().zip(&law_grads.values)) {
            let off = apart(got, want);
            assert!(off <= 0.05, "tied {tied}, {}: {off}", param.name);
        }
    }
}

#[test]
fn training_every_weight_follows_the_processor() {
    let params = five_steps("adamw", false);
    let [law, ours] = both(stage::sft::run, &params, &counting(4), "log.jsonl");
    assert_eq!(ours.len(), 5);
    for (law, ours) in law.iter().zip(&ours) {
        for (column, bound) in [("loss", 0.03), ("grad_norm", 0.1)] {
            let (law, ours) = (law[column].as_f64().unwrap(), ours[column].as_f64().unwrap());
            assert!((law - ours).abs() <= bound * law.max(1.0), "{column}: {law} {ours}");
        }
    }
    assert!(ours[4]["loss"].as_f64().unwrap() < ours[0]["loss"].as_f64().unwrap(), "it learns: {ours:?}");
}

#[test]
fn layers_keep_their_activations_as_far_as_memory_goes_and_no_bit_tells_how_many() {
    if on_device() {
        return;
    }
    let rows = rows();
    let policy = Policy { recompute: Recompute::Fit, ..Policy::default() };
    let law = run(&mut Placed::new(model(true, Dtype::Bf16), &Device::Cuda(gpu())).unwrap(), &rows);
    let enough = fit::device_bytes(&model(true, Dtype::Bf16), policy, Extent::of(&rows.batch()), 2);
    let peaks = [0, enough - 1, enough, usize::MAX / 2].map(|free| {
        let gpu = gpu();
        let mut placed = Placed::with(model(true, Dtype::Bf16), &Device::Cuda(gpu.clone()), policy).unwrap();
        assert_eq!(with_free_bytes(free, || run(&mut placed, &rows)), law, "{free} bytes free");
        gpu.usage().peak
    });
    assert!(peaks[0] == peaks[1] && peaks[1] < peaks[2] && peaks[2] == peaks[3], "{peaks:?}");
}

#[test]
fn inputs_of_layers_that_wait_with_the_host_change_no_bit() {
    let rows = rows();
    for recompute in [Recompute::All, Recompute::None, Recompute::First(1)] {
        let with = |offload: bool, gpu: Gpu| {
            let policy = Policy { recompute, offload, ..Policy::default() };
            let mut placed = Placed::with(model(false, Dtype::Bf16), &Device::Cuda(gpu), policy).unwrap();
            // Twice: the second time in memory that was used before.
            [run(&mut placed, &rows), run(&mut placed, &rows)]
        };
        let law = with(false, gpu());
        assert!(law[0] == law[1]);
        assert!(with(true, gpu()) == law, "{recompute:?}");
        if !on_device() {
            assert!(with(true, Gpu::new(Box::new(PORTABLE))) == law, "{recompute:?}, blocks used again");
        }
    }
}

#[test]
fn a_stage_gives_the_same_bytes_however_its_memory_is_used() {
    let mut params = five_steps("adamw", true);
    params["max_steps"] = json!(2);
    let results = [("layers", false), ("none", false), ("fit", true)].map(|(checkpointing, offload)| {
        (params["checkpointing"], params["offload"]) = (json!(checkpointing), json!(offload));
        let bench = bench(Device::Cuda(gpu()), &counting(4));
        bench.run(stage::sft::run, params.clone()).unwrap();
        files(&bench.path("out"))
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}
