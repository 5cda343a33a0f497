//! The next token of each row of logits: `kernels/sampling.cu`. The rules are those of `model::sampling`.

use crate::cuda::{Buffer, Gpu};
use crate::problem::Problem;
use bytemuck::{Pod, Zeroable};
use half::bf16;

const THREADS: usize = 512;
/// Three sums of eight bytes for each of a block's warps.
const SUM_BYTES: usize = 3 * THREADS / 32 * 8;
/// Sums of weights are integers of 64 bits, a weight one of up to 45.
const MOST_COLUMNS: usize = 1 << 19;
/// Shared memory that a block has without being granted more.
const MOST_SHARED: usize = 48 << 10;

/// How the id of a row is drawn: the fields of `model::sampling::Sampling` that matter to one, and which number of
/// which stream it draws. Laid out as in the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Rule {
    /// Which random numbers: the seed, ...
    pub seed: u64,
    /// ... the stream of it, ...
    pub stream: u64,
    /// ... and which number of the stream.
    pub counter: u64,
    /// 1 keeps all.
    pub top_p: f64,
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// Ids from here on are never drawn. 0 means no limit.
    pub id_limit: u32,
}

impl Rule {
    /// The largest of all, whatever was seen.
    pub const GREEDY: Rule = Rule {
        seed: 0,
        stream: 0,
        counter: 0,
        top_p: 1.0,
        temperature: 0.0,
        repetition_penalty: 1.0,
        top_k: 0,
        id_limit: 0,
    };
}

/// Logits `[B, V]`.
#[derive(Clone, Copy)]
pub enum Logits<'a> {
    /// In f32.
    F32(&'a Buffer<f32>),
    /// In bf16.
    Bf16(&'a Buffer<bf16>),
}

/// The ids of each row so far, prompt included, in any order and as often as they occurred; anything in rows without a
/// penalty.
pub struct Seen<'a> {
    /// `[B, S]`. In rows with a penalty what is drawn is written behind those that count, where there is room.
    pub ids: &'a mut Buffer<u32>,
    /// `[B]`: how many count in each row, at most S.
    pub lengths: &'a Buffer<u32>,
}

/// What is drawn, `[B]` each.
pub struct Drawn {
    /// The token of each row.
    pub ids: Buffer<u32>,
    /// Log softmax of the raw logits at the id.
    pub log_probs: Buffer<f32>,
    /// Of the id in the distribution it was drawn from; 1 if greedy.
    pub probabilities: Buffer<f32>,
}

impl Drawn {
    /// Room for this many rows.
    pub fn new(gpu: &Gpu, rows: usize) -> Result<Drawn, Problem> {
        Ok(Drawn { ids: gpu.alloc(rows)?, log_probs: gpu.alloc(rows)?, probabilities: gpu.alloc(rows)? })
    }
}

/// Draws an id per row into `drawn` (=), as `Sampling::next` does with the row's rule. `seen` counts in rows with a
/// penalty. `scratch` has as many elements as `logits`.
pub fn next(
    drawn: &mut Drawn,
    scratch: &mut Buffer<f32>,
    logits: Logits,
    seen: Seen,
    rules: &Buffer<Rule>,
) -> Result<(), Problem> {
    let rows = drawn.ids.len();
    let (kernel, len) = match logits {
        Logits::F32(logits) => ("sample_f32", logits.len()),
        Logits::Bf16(logits) => ("sample_bf16", logits.len()),
    };
    assert_eq!((drawn.log_probs.len(), drawn.probabilities.len()), (rows, rows));
    assert_eq!(rules.len(), rows);
    if rows == 0 {
        return Ok(());
    }
    let columns = len / rows;
    assert!(columns > 0 && columns * rows == len, "{len} logits in {rows} rows");
    let seen_columns = seen.ids.len() / rows;
    assert_eq!((seen.ids.len(), seen.lengths.len()), (rows * seen_columns, rows));
    let shared = SUM_BYTES + columns.div_ceil(32) * 4;
    if columns > MOST_COLUMNS || shared > MOST_SHARED {
        return Err(Problem::new(
            "cuda::vocabulary",
            format!("{columns} logits per token are more than can be sampled"),
        ));
    }
    assert_eq!(scratch.len(), len);
    let launch = drawn
        .ids
        .gpu()
        .launch(kernel, rows, THREADS)
        .shared(shared)
        .buffer(&drawn.ids)
        .buffer(&drawn.log_probs)
        .buffer(&drawn.probabilities)
        .buffer(scratch);
    let launch = match logits {
        Logits::F32(logits) => launch.buffer(logits),
        Logits::Bf16(logits) => launch.buffer(logits),
    };
    let launch = launch.buffer(seen.ids).buffer(seen.lengths).buffer(rules).int(columns).int(seen_columns);
    // SAFETY: outputs, scratch, inputs and sizes of the kernel in order; sizes were checked above. A length in `seen`
    // beyond its columns is the caller's fault, and is cut off by the kernel.
    unsafe { launch.run() }
}
