//! One LoRA SFT step of a model of Qwen2.5-0.5B's shape: rank 16 on the seven linears, 512 tokens, all learned.
//!
//!     cargo bench --bench sft_step                 # f32 and bf16 weights, each in its own process
//!     cargo bench --bench sft_step -- peer.jsonl   # beside what benches/peers/sft_step.py printed
//!
//! A step is forward, loss, backward, clipping and AdamW. The first step is not timed. Peak memory is the
//! process's high-water mark; processor seconds are those of the process, for machines that are not idle.

use pipe::model::{Batch, Config, Gradients, LoraSpec, Model, Policy, Recompute};
use pipe::tensor::Dtype;
use pipe::train::{Kind, Optimizer, Options, clip, global_norm};
use serde_json::{Value, json};
use std::time::Instant;

const TOKENS: usize = 512;
const STEPS: usize = 4;
const SHAPE: &str = r#"{ "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu" }"#;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    if let Some(config) = args.iter().find_map(|arg| arg.strip_prefix("one:")) {
        println!("{}", measure(config));
        return;
    }
    let peers: Vec<Value> = args
        .first()
        .map(|path| std::fs::read_to_string(path).expect("the peer's lines"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    println!(
        "{:<26} {:>9} {:>11} {:>9}   against the peer: tokens/s, per cpu s, memory",
        "LoRA SFT step", "tokens/s", "per cpu s", "MiB"
    );
    for config in ["f32,layers", "f32,none", "bf16,layers", "bf16,none"] {
        let me = std::env::current_exe().expect("this program");
        let output = std::process::Command::new(me).arg(format!("one:{config}")).output().expect("a measurement");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let ours: Value = serde_json::from_slice(&output.stdout).expect("one JSON line");
        let get = |value: &Value, key: &str| value[key].as_f64().unwrap_or(f64::NAN);
        print!(
            "{:<26} {:>9.1} {:>11.1} {:>9.0}",
            format!(
                "{}, recompute {}",
                ours["dtype"].as_str().unwrap_or("?"),
                ours["recompute"].as_str().unwrap_or("?")
            ),
            get(&ours, "tokens_per_s"),
            get(&ours, "tokens_per_cpu_s"),
            get(&ours, "peak_mib")
        );
        match peers.iter().find(|peer| peer["dtype"] == ours["dtype"]) {
            Some(peer) => {
                let ratio = |key: &str| get(&ours, key) / get(peer, key);
                println!(
                    "   {:.2} x, {:.2} x, {:.2} x",
                    ratio("tokens_per_s"),
                    ratio("tokens_per_cpu_s"),
                    ratio("peak_mib")
                );
            }
            None => println!(),
        }
    }
}

fn measure(config: &str) -> Value {
    let (dtype, recompute) = config.split_once(',').expect("dtype,recompute");
    let storage = if dtype == "bf16" { Dtype::Bf16 } else { Dtype::F32 };
    let mut model = Model::random(Config::parse(SHAPE).expect("a shape"), 0, storage);
    let layers = if recompute == "none" { Recompute::None } else { Recompute::All };
    let policy = Policy { recompute: layers, ..Policy::default() };
    let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"].map(String::from);
    model.add_lora(&LoraSpec { rank: 16, alpha: 32.0, targets: targets.into() }, 0).expect("an adapter");
    let mut optimizer = Optimizer::new(Kind::AdamW, Options::default(), model.params());
    let mut grads = Gradients { values: model.params().iter().map(|param| vec![0.0; param.value.len()]).collect() };

    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761) % 151_000).collect();
    let (rows, targets): (Vec<usize>, Vec<u32>) = (0..TOKENS - 1).map(|t| (t, ids[t + 1])).unzip();
    let batch = Batch { ids: &ids, lengths: &[TOKENS], rows: &rows, targets: &targets };
    let mut start = (Instant::now(), cpu_seconds());
    for step in 0..=STEPS {
        grads.clear();
        let forward = model.forward_with(policy, &batch);
        let loss = -forward.logprobs.iter().sum::<f32>() / rows.len() as f32;
        assert!(loss.is_finite());
        model.backward(forward.tape, &vec![-1.0 / rows.len() as f32; rows.len()], &mut grads);
        let norm = global_norm(&grads);
        clip(&mut grads, norm, 1.0);
        model.update(|params| optimizer.step(params, &grads, 1e-4));
        if step == 0 {
            start = (Instant::now(), cpu_seconds());
        }
    }
    let done = (TOKENS * STEPS) as f64;
    json!({
        "dtype": dtype,
        "recompute": recompute,
        "tokens_per_s": done / start.0.elapsed().as_secs_f64(),
        "tokens_per_cpu_s": done / (cpu_seconds() - start.1),
        "peak_mib": status("VmHWM:") / 1024.0,
    })
}

/// User and system time of this process, in seconds.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks: f64 = [11, 12].iter().filter_map(|&i| fields.get(i)?.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux that exports it to programs.
    ticks / 100.0
}

/// A figure of /proc/self/status, in KiB.
fn status(name: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(f64::NAN)
}
