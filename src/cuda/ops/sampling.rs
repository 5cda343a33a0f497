//! The next token of each row of logits: `kernels/sampling.cu`. The rules are those of `model::sampling`.

use crate::cuda::{Buffer, Gpu};
use crate::problem::Problem;
use half::bf16;

const THREADS: usize = 512;
/// Three sums of eight bytes for each of a block's warps.
const SUM_BYTES: usize = 3 * THREADS / 32 * 8;
/// Sums of weights are integers of 64 bits, a weight one of up to 45.
const MOST_COLUMNS: usize = 1 << 19;
/// Shared memory that a block has without being granted more.
const MOST_SHARED: usize = 48 << 10;

/// How ids are drawn; the fields of `model::sampling::Sampling` that matter to one.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// 0 is greedy.
    pub temperature: f64,
    /// 1 keeps all.
    pub top_p: f64,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 is off.
    pub repetition_penalty: f64,
    pub seed: u64,
    /// Ids from here on are never drawn. 0 means no limit.
    pub id_limit: usize,
}

/// Logits `[B, V]`.
#[derive(Clone, Copy)]
pub enum Logits<'a> {
    F32(&'a Buffer<f32>),
    Bf16(&'a Buffer<bf16>),
}

/// The ids of each row so far, prompt included, in any order and as often as they occurred.
pub struct Seen<'a> {
    /// `[B, S]`. What is drawn is written behind those that count, where there is room.
    pub ids: &'a mut Buffer<u32>,
    /// `[B]`: how many count in each row, at most S.
    pub lengths: &'a Buffer<u32>,
}

/// What is drawn, `[B]` each.
pub struct Drawn {
    pub ids: Buffer<u32>,
    /// Log softmax of the raw logits at the id.
    pub log_probs: Buffer<f32>,
    /// Of the id in the distribution it was drawn from; 1 if greedy.
    pub probabilities: Buffer<f32>,
}

impl Drawn {
    /// Room for so many rows.
    pub fn new(gpu: &Gpu, rows: usize) -> Result<Drawn, Problem> {
        Ok(Drawn { ids: gpu.alloc(rows)?, log_probs: gpu.alloc(rows)?, probabilities: gpu.alloc(rows)? })
    }
}

/// How many elements of scratch memory [`next`] needs for `rows` rows of `columns` logits.
pub fn scratch_len(rows: usize, columns: usize, rule: &Rule) -> usize {
    if rule.temperature == 0.0 { 0 } else { rows * columns }
}

/// Draws an id per row into `drawn` (=), as `Sampling::next` does with number `counters[row]` of the stream
/// (`rule.seed`, `streams[row]`). `seen` may be missing if there is no penalty. `scratch` has [`scratch_len`]
/// elements.
pub fn next(
    drawn: &mut Drawn,
    scratch: &mut Buffer<f32>,
    logits: Logits,
    seen: Option<Seen>,
    streams: &Buffer<u64>,
    counters: &Buffer<u64>,
    rule: &Rule,
) -> Result<(), Problem> {
    let rows = drawn.ids.len();
    let (kernel, len) = match logits {
        Logits::F32(logits) => ("sample_f32", logits.len()),
        Logits::Bf16(logits) => ("sample_bf16", logits.len()),
    };
    assert_eq!((drawn.log_probs.len(), drawn.probabilities.len()), (rows, rows));
    assert_eq!((streams.len(), counters.len()), (rows, rows));
    if rows == 0 {
        return Ok(());
    }
    let columns = len / rows;
    assert!(columns > 0 && columns * rows == len, "{len} logits in {rows} rows");
    let penalty = rule.repetition_penalty as f32;
    let seen = seen.filter(|_| rule.repetition_penalty != 1.0);
    assert!(seen.is_some() || rule.repetition_penalty == 1.0, "a penalty is for ids that were seen");
    let seen_columns = seen.as_ref().map_or(0, |seen| seen.ids.len() / rows);
    if let Some(seen) = &seen {
        assert_eq!((seen.ids.len(), seen.lengths.len()), (rows * seen_columns, rows));
    }
    let shared = SUM_BYTES + if seen.is_some() { columns.div_ceil(32) * 4 } else { 0 };
    if columns > MOST_COLUMNS || shared > MOST_SHARED {
        return Err(Problem::new(
            "cuda::vocabulary",
            format!("{columns} logits per token are more than can be sampled"),
        ));
    }
    let limit = if rule.id_limit == 0 { columns } else { rule.id_limit.min(columns) };
    let temperature = rule.temperature as f32;
    assert_eq!(scratch.len(), scratch_len(rows, columns, rule));
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
    let launch = launch
        .optional(seen.as_ref().map(|seen| &*seen.ids))
        .optional(seen.as_ref().map(|seen| seen.lengths))
        .buffer(streams)
        .buffer(counters)
        .int(columns)
        .int(limit)
        .int(seen_columns)
        .float(penalty)
        .float(temperature)
        .int(rule.top_k.min(columns))
        .address(rule.top_p.to_bits())
        .address(rule.seed);
    // SAFETY: outputs, scratch, inputs, sizes and scalars of the kernel in order, a `double` and a `u64` by their
    // bits; sizes were checked above. A length in `seen` beyond its columns is the caller's fault, and is cut off
    // by the kernel.
    unsafe { launch.run() }
}
