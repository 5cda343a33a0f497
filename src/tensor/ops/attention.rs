//! Causal attention with grouped key/value heads over packed sequences.
//!
//! For each sequence, query head h with key/value head g = h / (H / KV), positions s <= t:
//!   p[t, s] = softmax over s of q\[t\] . k\[s\] / sqrt(D);  o\[t\] = sum over s of p[t, s] v\[s\];
//!   lse\[t\] = ln of the sum over s of e^(q\[t\] . k\[s\] / sqrt(D)).
//! Gradients, with dp[t, s] = do\[t\] . v\[s\] and delta\[t\] = do\[t\] . o\[t\]:
//!   ds = p * (dp - delta) / sqrt(D);  dq\[t\] = sum ds[t, s] k\[s\];  dk\[s\] = sum ds[t, s] q\[t\];
//!   dv\[s\] = sum p[t, s] do\[t\].
//! Dao et al., "FlashAttention" (2022): keys are visited in blocks, and the backward pass makes the
//! probabilities again from `lse`, so nothing of size T x T is held.
//!
//! A row's result does not depend on its neighbours: blocks of keys start at the sequence's first
//! key whatever the query, so a sequence packed with others, alone, or decoded token by token
//! gives the same bits.

use super::Scatter;
use crate::tensor::Isa;
use crate::tensor::isa::by_isa;
use crate::tensor::matmul::{Block, gemm_here};
use crate::tensor::vector::{dot_on, exp_sum_on, exp1, max_on, scale_on};
use rayon::prelude::*;

/// Keys visited at once. Part of the results.
const KEYS: usize = 64;
/// Tokens of a page of keys and values while decoding.
pub const PAGE: usize = KEYS;
/// Queries handled together; at most KEYS, and they start at multiples of it.
const QUERIES: usize = 64;

/// Sizes of an attention: q and o are [T, heads, head_size], k and v [T, kv_heads, head_size].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, each shared by as many heads of queries.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_size: usize,
}

impl Attention {
    /// Query heads per key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        (self.head_size as f32).sqrt().recip()
    }

    fn check(&self, q: &[f32], k: &[f32], v: &[f32]) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_size > 0, "{self:?}");
        assert!(k.len() == v.len() && k.len().is_multiple_of(self.kv_heads * self.head_size));
        assert_eq!(q.len() % (self.heads * self.head_size), 0);
    }
}

/// One task of the forward pass: some queries of one sequence and one key/value head.
struct Task {
    /// First token of the sequence in the packed arrays.
    start: usize,
    /// Position in the sequence of the first query, and how many there are.
    first: usize,
    queries: usize,
    kv_head: usize,
}

/// Rows are (query, head of the group) pairs; buffers for a block of them.
#[derive(Default)]
struct Rows {
    o: Vec<f32>,
    scores: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

/// o [T, H, D] = and lse [T, H] =. Sequence i holds the tokens `cu_seqlens[i]..cu_seqlens[i + 1]`;
/// the last entry is T.
pub fn attention_forward(
    o: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    cu_seqlens: &[usize],
    dims: Attention,
) {
    forward_on(Isa::best(), o, lse, q, k, v, cu_seqlens, dims);
}

#[expect(clippy::too_many_arguments, reason = "the public signature and the instruction set")]
fn forward_on(
    isa: Isa,
    o: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    cu_seqlens: &[usize],
    dims: Attention,
) {
    dims.check(q, k, v);
    let width = dims.heads * dims.head_size;
    let tokens = check_sequences(cu_seqlens);
    assert!(q.len() == tokens * width && o.len() == q.len() && lse.len() == tokens * dims.heads);
    assert_eq!(k.len(), tokens * dims.kv_heads * dims.head_size);

    let mut tasks = Vec::new();
    for sequence in cu_seqlens.windows(2) {
        let len = sequence[1] - sequence[0];
        for kv_head in 0..dims.kv_heads {
            for first in (0..len).step_by(QUERIES) {
                tasks.push(Task { start: sequence[0], first, queries: QUERIES.min(len - first), kv_head });
            }
        }
    }
    let (o, lse) = (Scatter::new(o), Scatter::new(lse));
    let (group, chunk) = (dims.group(), dims.group() * dims.head_size);
    tasks.into_par_iter().with_max_len(1).for_each_init(
        || (Rows::default(), Vec::new()),
        |(rows, queries), task| {
            queries.clear();
            for t in 0..task.queries {
                let at = (task.start + task.first + t) * width + task.kv_head * chunk;
                queries.extend_from_slice(&q[at..at + chunk]);
            }
            let keys = |key: usize| {
                let from = (task.start + key) * dims.kv_heads * dims.head_size;
                [&k[from..], &v[from..]]
            };
            attend(isa, rows, queries, keys, (task.first, task.queries), task.kv_head, dims);
            for t in 0..task.queries {
                let token = task.start + task.first + t;
                // SAFETY: (token, key/value head) belongs to this task only.
                unsafe {
                    o.write(token * width + task.kv_head * chunk, &rows.o[t * chunk..][..chunk]);
                    lse.write(token * dims.heads + task.kv_head * group, &rows.sum[t * group..][..group]);
                }
            }
        },
    );
}

/// o [H, D] = the attention of one query [H, D], the last of a sequence of `len` tokens whose keys and values, its
/// own included, lie in pages in the order of the tokens, [PAGE, KV, D] each. Equals the last row of
/// [`attention_forward`]. Runs on the calling thread: several sequences are decoded in parallel by the caller.
pub fn attention_decode(o: &mut [f32], q: &[f32], pages: &[[&[f32]; 2]], len: usize, dims: Attention) {
    dims.check(q, &[], &[]);
    assert!(q.len() == dims.heads * dims.head_size && o.len() == q.len());
    assert!(len > 0, "a query sees at least its own key");
    let (chunk, page) = (dims.group() * dims.head_size, PAGE * dims.kv_heads * dims.head_size);
    assert!(pages.len() >= len.div_ceil(PAGE) && pages.iter().flatten().all(|values| values.len() == page));
    let mut rows = Rows::default();
    for kv_head in 0..dims.kv_heads {
        let at = kv_head * chunk;
        let keys = |key: usize| pages[key / PAGE];
        attend(Isa::best(), &mut rows, &q[at..at + chunk], keys, (len - 1, 1), kv_head, dims);
        o[at..at + chunk].copy_from_slice(&rows.o[..chunk]);
    }
}

/// Attention of some queries of a sequence, gathered as [query, head of the group, D]. Leaves o in
/// `rows.o` and lse in `rows.sum`. `first` is the first query's position; `block` gives the keys and values from a
/// position on, at least [`KEYS`] of them or to the sequence's end.
fn attend<'a>(
    isa: Isa,
    rows: &mut Rows,
    queries: &[f32],
    block: impl Fn(usize) -> [&'a [f32]; 2],
    (first, count): (usize, usize),
    kv_head: usize,
    dims: Attention,
) {
    let (size, group) = (dims.head_size, dims.group());
    let stride = dims.kv_heads * size;
    let m = count * group;
    rows.o.resize(m * size, 0.0);
    rows.scores.resize(m * KEYS, 0.0);
    rows.max.clear();
    rows.max.resize(m, f32::NEG_INFINITY);
    rows.sum.clear();
    rows.sum.resize(m, 0.0);
    let last = first + count;
    for key in (0..last).step_by(KEYS) {
        let keys = KEYS.min(last - key);
        let [k, v] = block(key).map(|values| &values[kv_head * size..]);
        let q = Block { data: queries, stride: size, turned: false };
        let turned_k = Block { data: k, stride, turned: true };
        gemm_here(isa, (&mut rows.scores, KEYS), (m, keys, size), dims.scale(), q, turned_k, false);
        for row in 0..m {
            let visible = keys.min(first + row / group + 1 - key);
            let scores = &mut rows.scores[row * KEYS..][..keys];
            let max = max_on(isa, &scores[..visible]);
            let max = if max > rows.max[row] { max } else { rows.max[row] };
            let shrink = exp1(rows.max[row] - max);
            rows.max[row] = max;
            rows.sum[row] = rows.sum[row] * shrink + exp_sum_on(isa, &mut scores[..visible], max);
            scores[visible..].fill(0.0);
            if key > 0 {
                scale_on(isa, &mut rows.o[row * size..][..size], shrink);
            }
        }
        let p = Block { data: &rows.scores, stride: KEYS, turned: false };
        let v = Block { data: v, stride, turned: false };
        gemm_here(isa, (&mut rows.o, size), (m, size, keys), 1.0, p, v, key > 0);
    }
    for row in 0..m {
        scale_on(isa, &mut rows.o[row * size..][..size], 1.0 / rows.sum[row]);
        rows.sum[row] = (f64::from(rows.max[row]) + f64::from(rows.sum[row]).ln()) as f32;
    }
}

by_isa! {
    /// scores = e^(scores - lse) and slopes = scores * (slopes - delta).
    fn slopes_row(scores: &mut [f32], slopes: &mut [f32], lse: f32, delta: f32) {
        for (score, slope) in scores.iter_mut().zip(slopes) {
            *score = exp1(*score - lse);
            *slope = *score * (*slope - delta);
        }
    }
}

/// dq, dk and dv =, from do, the forward's operands and its results o and lse.
#[expect(clippy::too_many_arguments, reason = "three gradients, the forward's five arrays and its sizes")]
pub fn attention_backward(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    d_o: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &[f32],
    lse: &[f32],
    cu_seqlens: &[usize],
    dims: Attention,
) {
    dims.check(q, k, v);
    let tokens = check_sequences(cu_seqlens);
    let (size, group, isa) = (dims.head_size, dims.group(), Isa::best());
    let (width, kv_width) = (dims.heads * size, dims.kv_heads * size);
    assert!(q.len() == tokens * width && dq.len() == q.len() && o.len() == q.len() && d_o.len() == q.len());
    assert!(k.len() == tokens * kv_width && dk.len() == k.len() && dv.len() == k.len());
    assert_eq!(lse.len(), tokens * dims.heads);

    let tasks: Vec<(usize, usize, usize)> = cu_seqlens
        .windows(2)
        .filter(|sequence| sequence[1] > sequence[0])
        .flat_map(|sequence| (0..dims.kv_heads).map(move |kv_head| (sequence[0], sequence[1] - sequence[0], kv_head)))
        .collect();
    let (dq, dk, dv) = (Scatter::new(dq), Scatter::new(dk), Scatter::new(dv));
    tasks.into_par_iter().with_max_len(1).for_each(|(start, len, kv_head)| {
        let chunk = group * size;
        let (mut local_dk, mut local_dv) = (vec![0.0; len * size], vec![0.0; len * size]);
        let rows = QUERIES.min(len) * group;
        let [mut local_q, mut local_do, mut local_dq] = [(); 3].map(|()| vec![0.0; rows * size]);
        let [mut scores, mut slopes] = [(); 2].map(|()| vec![0.0; rows * KEYS]);
        let (mut delta, mut local_lse) = (vec![0.0; rows], vec![0.0; rows]);
        for first in (0..len).step_by(QUERIES) {
            let queries = QUERIES.min(len - first);
            let m = queries * group;
            for t in 0..queries {
                let token = start + first + t;
                let at = token * width + kv_head * chunk;
                local_q[t * chunk..][..chunk].copy_from_slice(&q[at..at + chunk]);
                local_do[t * chunk..][..chunk].copy_from_slice(&d_o[at..at + chunk]);
                for j in 0..group {
                    let row = at + j * size..at + (j + 1) * size;
                    delta[t * group + j] = dot_on(isa, &d_o[row.clone()], &o[row]);
                    local_lse[t * group + j] = lse[token * dims.heads + kv_head * group + j];
                }
            }
            for key in (0..first + queries).step_by(KEYS) {
                let keys = KEYS.min(first + queries - key);
                let at = (start + key) * kv_width + kv_head * size;
                let rows_of = |data| Block { data, stride: size, turned: false };
                let columns_of = |data| Block { data, stride: KEYS, turned: true };
                let k = Block { data: &k[at..], stride: kv_width, turned: false };
                let v = Block { data: &v[at..], stride: kv_width, turned: true };
                let turned_k = Block { turned: true, ..k };
                gemm_here(isa, (&mut scores, KEYS), (m, keys, size), dims.scale(), rows_of(&local_q), turned_k, false);
                gemm_here(isa, (&mut slopes, KEYS), (m, keys, size), 1.0, rows_of(&local_do), v, false);
                for row in 0..m {
                    let visible = keys.min(first + row / group + 1 - key);
                    let (scores, slopes) = (&mut scores[row * KEYS..][..keys], &mut slopes[row * KEYS..][..keys]);
                    let (lse, delta) = (local_lse[row], delta[row]);
                    slopes_row(isa, &mut scores[..visible], &mut slopes[..visible], lse, delta);
                    scores[visible..].fill(0.0);
                    slopes[visible..].fill(0.0);
                }
                let (dk, dv) = (&mut local_dk[key * size..], &mut local_dv[key * size..]);
                gemm_here(isa, (dv, size), (keys, size, m), 1.0, columns_of(&scores), rows_of(&local_do), true);
                gemm_here(isa, (dk, size), (keys, size, m), dims.scale(), columns_of(&slopes), rows_of(&local_q), true);
                let slopes = Block { data: &slopes, stride: KEYS, turned: false };
                gemm_here(isa, (&mut local_dq, size), (m, size, keys), dims.scale(), slopes, k, key > 0);
            }
            for t in 0..queries {
                // SAFETY: (token, key/value head) belongs to this task only.
                unsafe { dq.write((start + first + t) * width + kv_head * chunk, &local_dq[t * chunk..][..chunk]) };
            }
        }
        for t in 0..len {
            let at = (start + t) * kv_width + kv_head * size;
            // SAFETY: as above.
            unsafe {
                dk.write(at, &local_dk[t * size..][..size]);
                dv.write(at, &local_dv[t * size..][..size]);
            }
        }
    });
}

/// The number of tokens.
fn check_sequences(cu_seqlens: &[usize]) -> usize {
    assert!(cu_seqlens.first() == Some(&0) && cu_seqlens.is_sorted(), "cumulative lengths start at 0 and do not fall");
    cu_seqlens.last().copied().unwrap_or(0)
}

/// The definition, in f64, for one sequence.
pub mod reference {
    use super::Attention;

    /// The probabilities [T, H, T]; zero where they look ahead. And lse [T, H].
    fn probabilities(q: &[f64], k: &[f64], dims: Attention) -> (Vec<f64>, Vec<f64>) {
        let Attention { heads, kv_heads, head_size } = dims;
        let len = q.len() / (heads * head_size);
        let (mut p, mut lse) = (vec![0.0; len * heads * len], vec![0.0; len * heads]);
        for t in 0..len {
            for h in 0..heads {
                let g = h / (heads / kv_heads);
                let score = |s: usize| {
                    let pairs = (0..head_size)
                        .map(|i| q[(t * heads + h) * head_size + i] * k[(s * kv_heads + g) * head_size + i]);
                    pairs.sum::<f64>() / (head_size as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=t).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let log_sum = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
                lse[t * heads + h] = log_sum;
                for (s, score) in scores.iter().enumerate() {
                    p[(t * heads + h) * len + s] = (score - log_sum).exp();
                }
            }
        }
        (p, lse)
    }

    /// (o, lse).
    pub fn forward(q: &[f64], k: &[f64], v: &[f64], dims: Attention) -> (Vec<f64>, Vec<f64>) {
        let Attention { heads, kv_heads, head_size } = dims;
        let len = q.len() / (heads * head_size);
        let (p, lse) = probabilities(q, k, dims);
        let mut o = vec![0.0; q.len()];
        for t in 0..len {
            for h in 0..heads {
                for s in 0..=t {
                    for i in 0..head_size {
                        o[(t * heads + h) * head_size + i] +=
                            p[(t * heads + h) * len + s] * v[(s * kv_heads + h / (heads / kv_heads)) * head_size + i];
                    }
                }
            }
        }
        (o, lse)
    }

    /// (dq, dk, dv).
    pub fn backward(d_o: &[f64], q: &[f64], k: &[f64], v: &[f64], dims: Attention) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let Attention { heads, kv_heads, head_size } = dims;
        let len = q.len() / (heads * head_size);
        let (p, _) = probabilities(q, k, dims);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        for t in 0..len {
            for h in 0..heads {
                let query = (t * heads + h) * head_size;
                let key = |s: usize| (s * kv_heads + h / (heads / kv_heads)) * head_size;
                let p = &p[(t * heads + h) * len..][..len];
                let dp: Vec<f64> =
                    (0..=t).map(|s| (0..head_size).map(|i| d_o[query + i] * v[key(s) + i]).sum()).collect();
                let delta: f64 = dp.iter().zip(p).map(|(dp, p)| dp * p).sum();
                for s in 0..=t {
                    let ds = p[s] * (dp[s] - delta) / (head_size as f64).sqrt();
                    for i in 0..head_size {
                        dq[query + i] += ds * k[key(s) + i];
                        dk[key(s) + i] += ds * q[query + i];
                        dv[key(s) + i] += p[s] * d_o[query + i];
                    }
                }
            }
        }
        (dq, dk, dv)
    }
}
