//! What is measured on a GPU, and against what. Each operation is as training or decoding calls it.

use half::bf16;
use pipe::cuda::ops::lora_matmul::Rows;
use pipe::cuda::ops::{adamw, attention, head_logprob, lora_matmul, residual, rmsnorm, rope, swiglu};
use pipe::cuda::{Buffer, Gpu};
use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::{Batch, Config, Device, LoraSpec, Model, Placed, Policy, Recompute, lora};
use pipe::problem::Problem;
use pipe::random::Stream;
use pipe::tensor::Dtype;
use pipe::train::{Kind, Options, Trainer};

/// What an operation does at least, whichever way it is done.
#[derive(Debug, Clone, Copy)]
pub enum Amount {
    Flops(f64),
    Bytes(f64),
}

/// What a rate is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// The same operation of the peer, by time.
    Peer,
    /// The fastest large product measured in this run, the peer's or ours.
    Matmul,
    /// The fastest copy measured in this run.
    Copy,
    /// Nothing: it is a limit itself.
    Limit,
}

/// One run of an operation: the seconds it took.
pub type Run = Box<dyn FnMut() -> Result<f64, Problem>>;

/// Makes the operands.
pub type Make = Box<dyn Fn(&Gpu) -> Result<Run, Problem>>;

pub struct Plan {
    /// Op and shape are the name by which the peer's figure is found.
    pub op: &'static str,
    pub shape: String,
    pub amount: Amount,
    pub against: Against,
    /// The ratio to what it is held against that is aimed at.
    pub target: f64,
    pub make: Make,
}

/// Sizes of everything measured: a GPU's, or small ones for a test of this code.
pub struct Sizes {
    pub matmul: usize,
    pub copy: usize,
    pub attention: (attention::Dims, Vec<usize>),
    /// Rows, then (outputs, inputs) of the linear layers, then ranks.
    pub linears: (usize, Vec<(usize, usize)>, Vec<usize>),
    /// Rows, hidden size, vocabulary.
    pub head: (usize, usize, usize),
    /// Rows, hidden size, intermediate size.
    pub rows: (usize, usize, usize),
    pub parameters: usize,
    /// Configuration, tokens, rank; and of a step whose launches cost more than its kernels.
    pub step: (&'static str, usize, usize),
    pub short_step: (&'static str, usize, usize),
    /// Configuration, sequences, tokens before, steps.
    pub decode: (&'static str, usize, usize, usize),
}

const QWEN_7B: &str = r#"{ "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "hidden_act": "silu" }"#;

const QWEN_1_5B: &str = r#"{ "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu" }"#;

const QWEN_0_5B: &str = r#"{ "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu" }"#;

impl Sizes {
    /// Those of Qwen2.5-7B; decoding those of 1.5B, and the short step of 0.5B.
    pub fn of_a_gpu() -> Sizes {
        Sizes {
            matmul: 8192,
            copy: 1 << 28,
            attention: (attention::Dims { heads: 28, kv_heads: 4, head_dim: 128 }, vec![4096, 8192, 16384]),
            linears: (8192, vec![(3584, 3584), (18944, 3584), (3584, 18944)], vec![16, 256]),
            head: (8192, 3584, 152_064),
            rows: (20_000, 3584, 18_944),
            parameters: 100_000_000,
            step: (QWEN_7B, 20_000, 256),
            short_step: (QWEN_0_5B, 256, 16),
            decode: (QWEN_1_5B, 64, 1024, 32),
        }
    }
}

/// bf16 numbers of about this size. A million different ones, over and over: what they are matters little for time, but
/// zeros would be cheaper than life.
fn noise(gpu: &Gpu, len: usize, size: f64) -> Result<Buffer<bf16>, Problem> {
    let random = Stream::named(31, &["noise"]);
    let period: Vec<bf16> = (0..len.min(1 << 20) as u64).map(|i| bf16::from_f64(size * random.normal(i))).collect();
    gpu.upload(&period.iter().copied().cycle().take(len).collect::<Vec<bf16>>())
}

/// By the device's clock.
fn timed(gpu: &Gpu, mut work: impl FnMut() -> Result<(), Problem> + 'static) -> Run {
    let gpu = gpu.clone();
    Box::new(move || gpu.time(&mut work))
}

/// Everything, limits first.
pub fn plans(sizes: &Sizes) -> Vec<Plan> {
    let mut plans = vec![product(sizes.matmul), copy(sizes.copy)];
    let (dims, lengths) = &sizes.attention;
    for &length in lengths {
        plans.extend([attention_forward(*dims, length), attention_backward(*dims, length)]);
    }
    let (rows, linears, ranks) = &sizes.linears;
    for &(n, k) in linears {
        for &rank in ranks {
            plans.extend([linear(*rows, n, k, rank), linear_backward(*rows, n, k, rank)]);
        }
    }
    plans.extend([head_forward(sizes.head), head_backward(sizes.head)]);
    let (rows, hidden, wide) = sizes.rows;
    plans.extend([norm(rows, hidden), norm_backward(rows, hidden), gate(rows, wide), gate_backward(rows, wide)]);
    plans.extend([rotation(rows, sizes.attention.0), update(sizes.parameters)]);
    plans.extend([decode(sizes.decode), step("SFT step", Against::Matmul, sizes.step, true)]);
    // These two are there for each other.
    let short = |op, graphs| step(op, Against::Peer, sizes.short_step, graphs);
    plans.extend([short("short SFT step", true), short("short SFT step, no graphs", false)]);
    plans
}

fn product(n: usize) -> Plan {
    Plan {
        op: "product",
        shape: format!("{n} x {n} x {n}"),
        amount: Amount::Flops(2.0 * (n as f64).powi(3)),
        against: Against::Limit,
        target: 1.0,
        make: Box::new(move |gpu| {
            let (x, w, mut y) = (noise(gpu, n * n, 1.0)?, noise(gpu, n * n, 0.02)?, gpu.alloc(n * n)?);
            let dims = lora_matmul::Dims { m: n, n, k: n };
            Ok(timed(gpu, move || lora_matmul::forward(&mut y, None, &x, &w, None, None, dims, Rows::Sequences, false)))
        }),
    }
}

/// Rows gathered in their order: as many bytes are read as written.
fn copy(elements: usize) -> Plan {
    const WIDTH: usize = 1024;
    let rows = elements / WIDTH;
    Plan {
        op: "copy",
        shape: format!("{} MB", 2 * elements / 1_000_000),
        amount: Amount::Bytes(4.0 * elements as f64),
        against: Against::Limit,
        target: 1.0,
        make: Box::new(move |gpu| {
            let (x, mut y) = (noise(gpu, rows * WIDTH, 1.0)?, gpu.alloc(rows * WIDTH)?);
            let order = gpu.upload(&(0..rows as u32).collect::<Vec<_>>())?;
            Ok(timed(gpu, move || residual::gather_rows(&mut y, &x, &order, WIDTH)))
        }),
    }
}

/// Two products of half a square each.
fn attention_flops(dims: attention::Dims, length: usize) -> f64 {
    2.0 * (dims.heads * dims.head_dim) as f64 * (length as f64).powi(2)
}

fn attention_shape(dims: attention::Dims, length: usize) -> String {
    format!("{length} causal, {}:{} heads of {}", dims.heads, dims.kv_heads, dims.head_dim)
}

/// One sequence and what its attention gives.
struct Attended {
    dims: attention::Dims,
    length: usize,
    q: Buffer<bf16>,
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    o: Buffer<bf16>,
    lse: Buffer<f32>,
    bounds: Buffer<i32>,
}

impl Attended {
    fn new(gpu: &Gpu, dims: attention::Dims, length: usize) -> Result<Attended, Problem> {
        let (wide, narrow) = (length * dims.heads * dims.head_dim, length * dims.kv_heads * dims.head_dim);
        Ok(Attended {
            dims,
            length,
            q: noise(gpu, wide, 1.0)?,
            k: noise(gpu, narrow, 1.0)?,
            v: noise(gpu, narrow, 1.0)?,
            o: gpu.alloc(wide)?,
            lse: gpu.alloc(length * dims.heads)?,
            bounds: gpu.upload(&[0, length as i32])?,
        })
    }

    fn forward(&mut self) -> Result<(), Problem> {
        let Attended { dims, length, q, k, v, o, lse, bounds } = self;
        attention::forward(o, lse, q, k, v, bounds, *length, *dims)
    }
}

fn attention_forward(dims: attention::Dims, length: usize) -> Plan {
    Plan {
        op: "attention forward",
        shape: attention_shape(dims, length),
        amount: Amount::Flops(attention_flops(dims, length)),
        against: Against::Peer,
        target: 1.0,
        make: Box::new(move |gpu| {
            let mut attended = Attended::new(gpu, dims, length)?;
            Ok(timed(gpu, move || attended.forward()))
        }),
    }
}

fn attention_backward(dims: attention::Dims, length: usize) -> Plan {
    Plan {
        op: "attention backward",
        shape: attention_shape(dims, length),
        amount: Amount::Flops(2.5 * attention_flops(dims, length)),
        against: Against::Peer,
        target: 0.9,
        make: Box::new(move |gpu| {
            let mut of = Attended::new(gpu, dims, length)?;
            of.forward()?;
            let d_o = noise(gpu, of.o.len(), 1.0)?;
            let (mut dq, mut dk, mut dv) = (gpu.alloc(of.q.len())?, gpu.alloc(of.k.len())?, gpu.alloc(of.v.len())?);
            Ok(timed(gpu, move || {
                let Attended { dims, length, q, k, v, o, lse, bounds } = &of;
                attention::backward(&mut dq, &mut dk, &mut dv, &d_o, q, k, v, o, lse, bounds, *length, *dims)
            }))
        }),
    }
}

fn linear_shape(m: usize, n: usize, k: usize, rank: usize) -> String {
    format!("{m} x {n} x {k}, r {rank}")
}

/// The peer's figure is the base product alone, so a ratio of 1 is an adapter that costs nothing.
fn linear(m: usize, n: usize, k: usize, rank: usize) -> Plan {
    Plan {
        op: "LoRA linear forward",
        shape: linear_shape(m, n, k, rank),
        amount: Amount::Flops(2.0 * m as f64 * (n * k + rank * (n + k)) as f64),
        against: Against::Peer,
        target: 0.9,
        make: Box::new(move |gpu| {
            let (x, w) = (noise(gpu, m * k, 1.0)?, noise(gpu, n * k, 0.02)?);
            let (a, b) = (noise(gpu, rank * k, 0.02)?, noise(gpu, n * rank, 0.02)?);
            let (mut y, mut low) = (gpu.alloc(m * n)?, gpu.alloc(m * rank)?);
            let dims = lora_matmul::Dims { m, n, k };
            Ok(timed(gpu, move || {
                let lora = lora_matmul::Lora { a: &a, b: &b, rank, scale: 2.0 };
                lora_matmul::forward(&mut y, Some(&mut low), &x, &w, None, Some(lora), dims, Rows::Sequences, false)
            }))
        }),
    }
}

/// dx and the adapter's gradients; again the peer's is the base product dy W alone.
fn linear_backward(m: usize, n: usize, k: usize, rank: usize) -> Plan {
    Plan {
        op: "LoRA linear backward",
        shape: linear_shape(m, n, k, rank),
        amount: Amount::Flops(2.0 * m as f64 * (n * k + 2 * rank * (n + k)) as f64),
        against: Against::Peer,
        target: if rank <= 16 { 0.85 } else { 0.7 },
        make: Box::new(move |gpu| {
            let (x, w, dy) = (noise(gpu, m * k, 1.0)?, noise(gpu, n * k, 0.02)?, noise(gpu, m * n, 1.0)?);
            let (a, b, low) = (noise(gpu, rank * k, 0.02)?, noise(gpu, n * rank, 0.02)?, noise(gpu, m * rank, 1.0)?);
            let (mut dx, mut da, mut db) = (gpu.alloc(m * k)?, gpu.zeros(rank * k)?, gpu.zeros(n * rank)?);
            let dims = lora_matmul::Dims { m, n, k };
            Ok(timed(gpu, move || {
                let lora = lora_matmul::Lora { a: &a, b: &b, rank, scale: 2.0 };
                let grads = lora_matmul::Gradients { da: &mut da, db: &mut db };
                lora_matmul::backward(Some((&mut dx, false)), Some(grads), &dy, &x, Some(&low), &w, Some(lora), dims)
            }))
        }),
    }
}

type Head = (usize, usize, usize);

fn head_operands(gpu: &Gpu, (rows, hidden, vocabulary): Head) -> Result<[Buffer<bf16>; 2], Problem> {
    Ok([noise(gpu, rows * hidden, 1.0)?, noise(gpu, vocabulary * hidden, 0.02)?])
}

fn head_targets(gpu: &Gpu, (rows, _, vocabulary): Head) -> Result<Buffer<u32>, Problem> {
    let random = Stream::named(31, &["targets"]);
    gpu.upload(&(0..rows as u64).map(|i| (random.u64(i) % vocabulary as u64) as u32).collect::<Vec<_>>())
}

fn head_forward(head: Head) -> Plan {
    let (rows, hidden, vocabulary) = head;
    Plan {
        op: "head and log-prob forward",
        shape: format!("{rows} x {hidden} x {vocabulary}"),
        amount: Amount::Flops(2.0 * rows as f64 * (hidden * vocabulary) as f64),
        against: Against::Matmul,
        target: 0.8,
        make: Box::new(move |gpu| {
            let ([h, w], targets) = (head_operands(gpu, head)?, head_targets(gpu, head)?);
            Ok(timed(gpu, move || head_logprob::forward(&h, &w, None, &targets, hidden, false, 0).map(drop)))
        }),
    }
}

/// The frozen head: logits again, and dh.
fn head_backward(head: Head) -> Plan {
    let (rows, hidden, vocabulary) = head;
    Plan {
        op: "head and log-prob backward",
        shape: format!("{rows} x {hidden} x {vocabulary}"),
        amount: Amount::Flops(4.0 * rows as f64 * (hidden * vocabulary) as f64),
        against: Against::Matmul,
        target: 0.8,
        make: Box::new(move |gpu| {
            let ([h, w], targets) = (head_operands(gpu, head)?, head_targets(gpu, head)?);
            let lse = head_logprob::forward(&h, &w, None, &targets, hidden, false, 0)?.lse;
            let (mut dh, slopes) = (gpu.alloc(rows * hidden)?, gpu.upload(&vec![-1.0 / rows as f32; rows])?);
            Ok(timed(gpu, move || {
                let nothing = head_logprob::Gradients::default();
                head_logprob::backward(&mut dh, nothing, &slopes, &h, &w, None, &targets, &lse, hidden)
            }))
        }),
    }
}

/// Memory-bound: so many bytes for each of `rows` x `width` elements.
fn bound_by_memory(
    op: &'static str,
    (rows, width): (usize, usize),
    bytes: f64,
    make: impl Fn(&Gpu) -> Result<Run, Problem> + 'static,
) -> Plan {
    let amount = Amount::Bytes(bytes * (rows * width) as f64);
    let shape = format!("{rows} x {width}");
    Plan { op, shape, amount, against: Against::Copy, target: 0.8, make: Box::new(make) }
}

fn norm(rows: usize, width: usize) -> Plan {
    bound_by_memory("RMSNorm forward", (rows, width), 4.0, move |gpu| {
        let (x, w) = (noise(gpu, rows * width, 1.0)?, gpu.upload(&vec![1.0f32; width])?);
        let (mut y, mut rstd) = (gpu.alloc(rows * width)?, gpu.alloc(rows)?);
        Ok(timed(gpu, move || rmsnorm::forward(&mut y, &mut rstd, &x, &w, 1e-6)))
    })
}

fn norm_backward(rows: usize, width: usize) -> Plan {
    bound_by_memory("RMSNorm backward", (rows, width), 6.0, move |gpu| {
        let (x, dy, w) =
            (noise(gpu, rows * width, 1.0)?, noise(gpu, rows * width, 1.0)?, gpu.upload(&vec![1.0; width])?);
        let (mut dx, rstd) = (gpu.alloc(rows * width)?, gpu.upload(&vec![1.0f32; rows])?);
        Ok(timed(gpu, move || rmsnorm::backward(&mut dx, None, &dy, &x, &w, &rstd, false)))
    })
}

fn gate(rows: usize, width: usize) -> Plan {
    bound_by_memory("SwiGLU forward", (rows, width), 6.0, move |gpu| {
        let (gate, up) = (noise(gpu, rows * width, 1.0)?, noise(gpu, rows * width, 1.0)?);
        let mut y = gpu.alloc(rows * width)?;
        Ok(timed(gpu, move || swiglu::forward(&mut y, &gate, &up)))
    })
}

fn gate_backward(rows: usize, width: usize) -> Plan {
    bound_by_memory("SwiGLU backward", (rows, width), 10.0, move |gpu| {
        let elements = rows * width;
        let (gate, up, dy) = (noise(gpu, elements, 1.0)?, noise(gpu, elements, 1.0)?, noise(gpu, elements, 1.0)?);
        let (mut dgate, mut dup) = (gpu.alloc(elements)?, gpu.alloc(elements)?);
        Ok(timed(gpu, move || swiglu::backward(&mut dgate, &mut dup, &dy, &gate, &up)))
    })
}

fn rotation(rows: usize, dims: attention::Dims) -> Plan {
    let attention::Dims { heads, head_dim, .. } = dims;
    bound_by_memory("RoPE", (rows, heads * head_dim), 4.0, move |gpu| {
        let mut x = noise(gpu, rows * heads * head_dim, 1.0)?;
        let table = rope::Table::upload(gpu, rows, head_dim, 1e6)?;
        let positions = gpu.upload(&(0..rows as u32).collect::<Vec<_>>())?;
        Ok(timed(gpu, move || rope::rotate(&mut x, heads, &table, &positions, false)))
    })
}

/// Parameter, gradient and two moments in f32, all but the gradient read and written.
fn update(parameters: usize) -> Plan {
    bound_by_memory("AdamW", (1, parameters), 28.0, move |gpu| {
        let values = |value: f32| gpu.upload(&vec![value; parameters]);
        let (param, grad) = (values(0.5)?, values(0.01)?);
        let mut optimizer = adamw::AdamW::new(gpu, &[parameters])?;
        let (device, mut step) = (gpu.clone(), 0);
        Ok(timed(gpu, move || {
            step += 1;
            let options = adamw::Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
            let tensor = adamw::Tensor { param: &param, grad: &grad, copy: None, decays: false };
            optimizer.step(&device, &[tensor], 1e-4, &options, step)
        }))
    })
}

/// Weights of the linear layers.
fn linear_parameters(config: &Config) -> f64 {
    lora::linears(config).iter().map(|(_, _, [out, input])| (out * input) as f64).sum()
}

/// One sequence, all of it learned, adapters on every linear and the head, recomputing layers. At least two products
/// forward and two backward for each weight, and attention. With `graphs` the step is captured in the second run, if
/// there is the memory.
fn step(op: &'static str, against: Against, (shape, tokens, rank): (&'static str, usize, usize), graphs: bool) -> Plan {
    let config = Config::parse(shape).expect("a shape");
    let dims = attention::Dims { heads: config.num_attention_heads, kv_heads: 1, head_dim: config.head_dim };
    let attention = 3.5 * config.num_hidden_layers as f64 * attention_flops(dims, tokens);
    Plan {
        op,
        shape: format!("hidden {}, {tokens} tokens, r {rank}", config.hidden_size),
        amount: Amount::Flops(4.0 * linear_parameters(&config) * tokens as f64 + attention),
        against,
        target: 0.5,
        make: Box::new(move |gpu| {
            let mut model = Model::random(config.clone(), 0, Dtype::Bf16);
            let targets = lora::TARGETS.map(String::from).to_vec();
            model.add_lora(&LoraSpec { rank, alpha: 2.0 * rank as f64, targets }, 0)?;
            let policy = Policy { recompute: Recompute::All, graphs, ..Policy::default() };
            let placed = Placed::with(model, &Device::Cuda(gpu.clone()), policy)?;
            let mut trainer = Trainer::new(placed, Kind::AdamW, Options::default())?;
            let vocabulary = config.vocab_size as u32;
            let ids: Vec<u32> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocabulary).collect();
            let (rows, targets): (Vec<usize>, Vec<u32>) = (0..tokens - 1).map(|t| (t, ids[t + 1])).unzip();
            let device = gpu.clone();
            Ok(Box::new(move || {
                device.time(&mut || {
                    let batch = Batch { ids: &ids, lengths: &[tokens], rows: &rows, targets: &targets };
                    trainer.clear_gradients()?;
                    trainer.forward(&batch)?.backward(&vec![-1.0 / rows.len() as f32; rows.len()])?;
                    let norm = trainer.norm()?;
                    trainer.clip(norm, 1.0)?;
                    trainer.step(1e-4)
                })
            }))
        }),
    }
}

/// A step of greedy decoding: the time of longer completions less that of shorter ones, so that reading the prompts
/// falls out. Every weight and every key and value that is there is read once.
fn decode((shape, sequences, context, steps): (&'static str, usize, usize, usize)) -> Plan {
    let config = Config::parse(shape).expect("a shape");
    let cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;
    let read = linear_parameters(&config) + (cached * sequences * (context + steps)) as f64;
    Plan {
        op: "decoding step",
        shape: format!("hidden {}, {sequences} sequences of {context}", config.hidden_size),
        amount: Amount::Bytes(2.0 * read),
        against: Against::Copy,
        target: 0.7,
        make: Box::new(move |gpu| {
            let placed = Placed::new(Model::random(config.clone(), 0, Dtype::Bf16), &Device::Cuda(gpu.clone()))?;
            let random = Stream::named(31, &["prompts"]);
            let token = |i: usize| (random.u64(i as u64) % config.vocab_size as u64) as u32;
            let prompt = |s: usize| (0..context).map(|t| token(s * context + t)).collect::<Vec<_>>();
            let prompts: Vec<Prompt> = (0..sequences).map(|s| Prompt { ids: prompt(s), stream: s as u64 }).collect();
            let device = gpu.clone();
            Ok(Box::new(move || {
                let completed = |max_tokens: usize| {
                    let sampling = Sampling { max_tokens, ..Sampling::default() };
                    let (words, limits) = (&|_: &[u32]| String::new(), Limits::default());
                    device
                        .time(&mut || generate(&placed, &prompts, &sampling, words, &mut |_| Ok(()), &limits).map(drop))
                };
                Ok((completed(2 * steps + 1)? - completed(1)?) / (2 * steps) as f64)
            }))
        }),
    }
}
