//! Greedy decoding of a model of Qwen2.5-0.5B's shape with random weights: prompts of 128 tokens, 64 new ones.
//!
//!     cargo bench --bench decode                                  # beside the roof of the memory
//!     PEER_PYTHON=venv/bin/python cargo bench --bench decode      # and beside transformers, in turns
//!     cargo bench --bench decode -- bf16 8 new=16                 # one dtype, one batch, fewer tokens
//!
//! `PEER_PYTHON` runs benches/peers/decode.py, which waits while this program measures and the other way round;
//! the best of all turns counts, and each turn is printed. Tokens per second are those of the steps after the first
//! token, prompts left out; prompts are timed apart. `fastest` is the rate of the quickest step of all: on a machine
//! that others use too, what both sides could do. The roof: the bytes a step must read (every weight once, and
//! each completion's keys and values up to its middle) at the rate a plain loop of as many threads reads memory.

use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::{Config, Device, Model, Placed};
use pipe::tensor::Dtype;
use rayon::prelude::*;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

const PROMPT: usize = 128;
/// New tokens, unless the command says `new=`.
const NEW: usize = 64;
const ROUNDS: usize = 3;
const LAYERS: usize = 24;
/// Keys and values of a token in one layer.
const KEY_VALUES: usize = 2 * 2 * 64;
const SHAPE: &str = r#"{ "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu" }"#;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let new = args.iter().find_map(|arg| arg.strip_prefix("new=")?.parse().ok()).unwrap_or(NEW);
    let batches: Vec<usize> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let batches = if batches.is_empty() { vec![1, 8, 32] } else { batches };
    let threads = rayon::current_num_threads();
    let memory = Memory::new();
    println!("{threads} threads, load {}", load());
    for (word, dtype) in [("f32", Dtype::F32), ("bf16", Dtype::Bf16)] {
        if args.iter().any(|arg| arg == "f32" || arg == "bf16") && !args.iter().any(|arg| arg == word) {
            continue;
        }
        let model = Model::random(Config::parse(SHAPE).expect("a shape"), 0, dtype);
        let model = Placed::new(model, &Device::Cpu).expect("the host");
        let mut peer = std::env::var_os("PEER_PYTHON").map(|python| Peer::start(&python, word, new));
        for &batch in &batches {
            // What 32 at once are for is more than the roof; the peer's turns would take minutes.
            let rounds = if batch > 8 { 1 } else { ROUNDS };
            let (mut ours, mut theirs, mut bandwidth) = (Turn::default(), Turn::default(), 0f64);
            for round in 1..=rounds {
                bandwidth = bandwidth.max(memory.read_rate());
                let turn = decode(&model, batch, new);
                print!("  {word} batch {batch}, turn {round}: {turn}");
                ours = ours.best(turn);
                if let Some(peer) = peer.as_mut().filter(|_| batch <= 8) {
                    let turn = peer.decode(batch);
                    print!(" | {}: {turn}", peer.name);
                    theirs = theirs.best(turn);
                }
                println!(" | {:.1} GB/s, load {}", bandwidth / 1e9, load());
            }
            let weights = weight_bytes(dtype);
            let cache = batch * LAYERS * KEY_VALUES * size_of::<f32>() * (PROMPT + new / 2);
            let roof = bandwidth / (weights + cache) as f64 * batch as f64;
            let of = |rate: f64| 100.0 * rate / roof;
            print!("{word} batch {batch}: {ours}, {:.0} % of the roof of {roof:.1}", of(ours.steps));
            print!(", fastest {:.0} %", of(ours.fastest));
            if theirs.steps > 0.0 {
                let [steps, fastest, prompts] =
                    [ours.steps / theirs.steps, ours.fastest / theirs.fastest, ours.prompts / theirs.prompts];
                print!("; {steps:.2} x the peer, fastest {fastest:.2} x, prompts {prompts:.2} x");
            }
            println!();
        }
    }
}

/// Tokens per second.
#[derive(Default, Clone, Copy)]
struct Turn {
    steps: f64,
    fastest: f64,
    /// Of the steps, per second of processor time: what no other work on the machine changes much.
    per_cpu: f64,
    prompts: f64,
}

impl Turn {
    fn best(self, other: Turn) -> Turn {
        Turn {
            steps: self.steps.max(other.steps),
            fastest: self.fastest.max(other.fastest),
            per_cpu: self.per_cpu.max(other.per_cpu),
            prompts: self.prompts.max(other.prompts),
        }
    }
}

impl std::fmt::Display for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Turn { steps, fastest, per_cpu, prompts } = self;
        write!(f, "{steps:.1} tokens/s (fastest {fastest:.1}, per cpu s {per_cpu:.1}, prompts {prompts:.0})")
    }
}

/// Bytes of every weight that a step reads: the embedding as head, and the linears.
fn weight_bytes(dtype: Dtype) -> usize {
    let (hidden, inner, vocab, keys) = (896, 4864, 151_936, 128);
    let layer = 2 * hidden * hidden + 2 * keys * hidden + 3 * hidden * inner;
    (vocab * hidden + LAYERS * layer) * if dtype == Dtype::Bf16 { 2 } else { 4 }
}

/// Ids of the prompts, none like another; those of benches/peers/decode.py.
fn ids(row: usize) -> Vec<u32> {
    (0..PROMPT as u32).map(|i| (i + 1000 * row as u32).wrapping_mul(2_654_435_761) % 151_000).collect()
}

fn decode(model: &Placed, batch: usize, new: usize) -> Turn {
    let prompts: Vec<Prompt> = (0..batch).map(|row| Prompt { ids: ids(row), stream: row as u64 }).collect();
    let sampling = Sampling { max_tokens: new, ..Sampling::default() };
    let (mut at, mut cpu) = (Vec::with_capacity(new), Vec::with_capacity(new));
    let start = Instant::now();
    let mut on_step = |_| {
        at.push(Instant::now());
        cpu.push(cpu_seconds());
        Ok(())
    };
    let limits = Limits::default();
    let completions =
        generate(model, &prompts, &sampling, &|_| String::new(), &mut on_step, &limits).expect("completions");
    assert!(completions.len() == batch && completions.iter().all(|one| one.ids.len() == new) && at.len() == new);
    let quickest = at.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()).fold(f64::INFINITY, f64::min);
    Turn {
        fastest: batch as f64 / quickest,
        per_cpu: ((new - 1) * batch) as f64 / (cpu[new - 1] - cpu[0]),
        steps: ((new - 1) * batch) as f64 / (at[new - 1] - at[0]).as_secs_f64(),
        prompts: (PROMPT * batch) as f64 / (at[0] - start).as_secs_f64(),
    }
}

/// transformers, which decodes when it is told a batch.
struct Peer {
    name: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    fn start(python: &std::ffi::OsStr, dtype: &str, new: usize) -> Peer {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/decode.py");
        let lengths = [PROMPT.to_string(), new.to_string(), rayon::current_num_threads().to_string()];
        let mut child = Command::new(python)
            .args([script, dtype])
            .args(lengths)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        let (to, from) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let mut peer = Peer { name: String::new(), child, to, from: BufReader::new(from) };
        peer.name = peer.line()["name"].as_str().expect("the peer's name").into();
        peer
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("a line of the peer");
        serde_json::from_str(&line).expect("the peer ended; its error is above")
    }

    fn decode(&mut self, batch: usize) -> Turn {
        writeln!(self.to, "{batch}").expect("the peer listens");
        let line = self.line();
        let get = |key: &str| line[key].as_f64().expect("a figure");
        Turn { steps: get("steps"), fastest: get("fastest"), per_cpu: get("per_cpu"), prompts: get("prompts") }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Memory far larger than the caches, on large pages where the system has them, as the weights are.
struct Memory(Vec<u64>);

impl Memory {
    fn new() -> Memory {
        const WORDS: usize = 64 << 20;
        let mut words: Vec<u64> = Vec::with_capacity(WORDS);
        #[cfg(target_os = "linux")]
        {
            let start = words.as_mut_ptr().map_addr(|at| at.next_multiple_of(4096));
            // SAFETY: the memory was just allocated; the advice changes none of it, and may be refused.
            unsafe { libc::madvise(start.cast(), 8 * WORDS - 4096, libc::MADV_HUGEPAGE) };
        }
        words.extend(0..WORDS as u64);
        Memory(words)
    }

    /// Bytes per second that all threads together read of it: the best of many pieces of 32 MiB, so that others' work
    /// on the machine does not lower the roof.
    fn read_rate(&self) -> f64 {
        const PIECE: usize = 4 << 20;
        let sum = |words: &[u64]| words.iter().fold(0, |all, word| all ^ word);
        let each = PIECE / rayon::current_num_threads();
        rayon::scope(|_| {
            let rate = |piece: &[u64]| {
                let start = Instant::now();
                piece.par_chunks(each).for_each(|words| {
                    std::hint::black_box(sum(words));
                });
                size_of_val(piece) as f64 / start.elapsed().as_secs_f64()
            };
            (0..4).flat_map(|_| self.0.chunks_exact(PIECE)).map(rate).fold(0.0, f64::max)
        })
    }
}

/// User and system time of this process, in seconds.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks: f64 = [11, 12].iter().filter_map(|&i| fields.get(i)?.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux that exports it to programs.
    ticks / 100.0
}

/// The load average of the last minute: others' work counts against both sides.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").into()
}
