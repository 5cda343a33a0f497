//! The language-model head in one operation: linear + LoRA + log-softmax + gather.
//!
//!   logits[r, v] = h\[r\] . W\[v\] + scale * (h\[r\] Aᵀ) . B\[v\]
//!   lse\[r\] = ln of the sum over v of e^logits[r, v];  logprob\[r\] = logits[r, target\[r\]] - lse\[r\]
//!   entropy\[r\] = lse\[r\] - sum over v of softmax(logits\[r\])\[v\] * logits[r, v]
//! Gradients of sum over r of dlogprob\[r\] * logprob\[r\]:
//!   dl[r, v] = dlogprob\[r\] * ([v = target\[r\]] - softmax(logits\[r\])\[v\])
//!   dh = dl W + scale * (dl B) A;  dA += (scale * dl B)ᵀ h;  dB += scale * dlᵀ (h Aᵀ);  dW += dlᵀ h
//!
//! Logits exist for one tile of rows and vocabulary at a time. A row's results do not depend on the
//! other rows. Sums over the vocabulary are made in f32 within a tile and in f64 between tiles.

use crate::tensor::isa::by_isa;
use crate::tensor::matmul::{linear_backward_rows, linear_rows};
use crate::tensor::vector::{exp1, max_on};
use crate::tensor::{Isa, Matrix, gemm};
use rayon::prelude::*;
use std::ops::Range;

/// Vocabulary entries per tile, a multiple of 32. Part of the results.
const VOCABULARY: usize = 2048;
/// Rows per tile: 4 MiB of logits at once.
const ROWS: usize = 512;

/// LoRA on the head: A [r, C], B [V, r], and their factor alpha / r.
#[derive(Debug, Clone, Copy)]
pub struct HeadLora<'a> {
    /// A, `rank` rows as wide as the hidden states.
    pub a: &'a [f32],
    /// B, `rank` columns, a row for each token of the vocabulary.
    pub b: &'a [f32],
    /// The rank of the adapter.
    pub rank: usize,
    /// What the adapter's product is multiplied by.
    pub scale: f32,
}

/// What to compute beside logprob and lse.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadWant {
    /// Whether the entropy of each row is wanted.
    pub entropy: bool,
    /// How many of the most likely entries per row are wanted.
    pub top_k: usize,
}

/// A vocabulary entry and its logprob.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// Results, one entry per row.
#[derive(Debug, Clone, Default)]
pub struct HeadForward {
    /// The log-probability of each row's target.
    pub logprob: Vec<f32>,
    /// The logarithm of the sum of each row's exponentiated logits.
    pub lse: Vec<f32>,
    /// In nats; empty unless wanted.
    pub entropy: Vec<f32>,
    /// Most likely first, smaller id first among equals; empty unless wanted.
    pub top: Vec<Vec<Ranked>>,
}

/// Gradients that are added to (+=), each if it is wanted: dA [r, C] and dB [V, r] together, dW [V, C].
#[derive(Debug, Default)]
pub struct HeadGradients<'a> {
    /// Those of the adapter's A and B, added to.
    pub lora: Option<(&'a mut [f32], &'a mut [f32])>,
    /// That of the matrix itself, added to.
    pub weight: Option<&'a mut [f32]>,
}

/// What is known of a row after some tiles.
struct Row {
    max: f32,
    /// Sum of e^(logit - max), and the same weighted with (logit - max).
    sum: f64,
    weighted: f64,
    target: f32,
    top: Vec<(f32, u32)>,
}

by_isa! {
    /// Sums of e^(x - max) and of e^(x - max) * (x - max).
    fn sums(x: &[f32], max: f32) -> (f32, f32) {
        let (mut plain, mut weighted) = ([0.0f32; 16], [0.0f32; 16]);
        let mut add = |x: f32, lane: usize| {
            let shifted = x - max;
            let e = exp1(shifted);
            plain[lane] += e;
            // A logit of minus infinity has weight 0, not 0 * infinity.
            weighted[lane] += if shifted < -200.0 { 0.0 } else { e * shifted };
        };
        let mut chunks = x.chunks_exact(16);
        for chunk in &mut chunks {
            for (lane, x) in chunk.iter().enumerate() {
                add(*x, lane);
            }
        }
        for (lane, x) in chunks.remainder().iter().enumerate() {
            add(*x, lane);
        }
        let mut width = 8;
        while width > 0 {
            for i in 0..width {
                plain[i] += plain[i + width];
                weighted[i] += weighted[i + width];
            }
            width /= 2;
        }
        (plain[0], weighted[0])
    }
}

by_isa! {
    /// x = -factor * e^(x - lse).
    fn negative_softmax(x: &mut [f32], lse: f32, factor: f32) {
        for x in x {
            *x = -factor * exp1(*x - lse);
        }
    }
}

impl Row {
    fn see(&mut self, isa: Isa, logits: &[f32], first: usize, target: u32, want: HeadWant) {
        let max = max_on(isa, logits);
        if max > self.max {
            let (shift, shrink) = (f64::from(self.max) - f64::from(max), (f64::from(self.max) - f64::from(max)).exp());
            if self.sum > 0.0 {
                self.weighted = (self.weighted + self.sum * shift) * shrink;
            }
            self.sum *= shrink;
            self.max = max;
        }
        let (sum, weighted) = sums(isa, logits, self.max);
        self.sum += f64::from(sum);
        self.weighted += f64::from(weighted);
        if let Some(logit) = (target as usize).checked_sub(first).and_then(|at| logits.get(at)) {
            self.target = *logit;
        }
        if want.top_k > 0 {
            for (i, &logit) in logits.iter().enumerate() {
                let full = self.top.len() == want.top_k;
                if full && self.top.last().is_some_and(|(least, _)| logit <= *least) {
                    continue;
                }
                // Ids come in ascending order, so an equal logit goes behind.
                let at = self.top.partition_point(|(other, _)| *other >= logit);
                self.top.insert(at, (logit, (first + i) as u32));
                self.top.truncate(want.top_k);
            }
        }
    }
}

/// logprob and lse of h [R, C] for `targets` \[R\], with W [V, C].
pub fn head_logprob_forward(
    h: &[f32],
    w: &Matrix,
    lora: Option<HeadLora>,
    targets: &[u32],
    want: HeadWant,
) -> HeadForward {
    let isa = Isa::best();
    let channels = w.k();
    check(h, w, lora, targets);
    let mut result = HeadForward::default();
    let mut tile = Tile::default();
    for (h, targets) in h.chunks(ROWS * channels).zip(targets.chunks(ROWS)) {
        let top = Vec::with_capacity(want.top_k + 1);
        let fresh = || Row { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, target: f32::NAN, top: top.clone() };
        let mut rows: Vec<Row> = targets.iter().map(|_| fresh()).collect();
        tile.start(h, targets.len(), lora, channels);
        for range in tiles(w.n()) {
            tile.logits(isa, h, targets.len(), w, lora, range.clone());
            let logits = tile.logits.par_chunks_exact(range.len()).zip(targets);
            rows.par_iter_mut().zip(logits).with_min_len(8).for_each(|(row, (logits, &target))| {
                row.see(isa, logits, range.start, target, want);
            });
        }
        for row in rows {
            let lse = f64::from(row.max) + row.sum.ln();
            result.lse.push(lse as f32);
            result.logprob.push((f64::from(row.target) - lse) as f32);
            if want.entropy {
                result.entropy.push((row.sum.ln() - row.weighted / row.sum) as f32);
            }
            if want.top_k > 0 {
                let ranked = |(logit, id): (f32, u32)| Ranked { id, logprob: (f64::from(logit) - lse) as f32 };
                result.top.push(row.top.into_iter().map(ranked).collect());
            }
        }
    }
    result
}

/// dh [R, C] = and what `gradients` asks for +=, from dlogprob \[R\] and the forward's lse \[R\].
/// The caller leaves out rows that are not learned; a row with dlogprob 0 costs like any other.
#[expect(clippy::too_many_arguments, reason = "the gradients, then the forward's arguments and result")]
pub fn head_logprob_backward(
    dh: &mut [f32],
    mut gradients: HeadGradients,
    dlogprob: &[f32],
    h: &[f32],
    w: &Matrix,
    lora: Option<HeadLora>,
    targets: &[u32],
    lse: &[f32],
) {
    let isa = Isa::best();
    let channels = w.k();
    check(h, w, lora, targets);
    assert!(dh.len() == h.len() && dlogprob.len() == targets.len() && lse.len() == targets.len());
    let mut tile = Tile::default();
    let mut du = Vec::new();
    let row_tiles = dh.chunks_mut(ROWS * channels).zip(h.chunks(ROWS * channels)).zip(targets.chunks(ROWS));
    for (((dh, h), targets), (dlogprob, lse)) in row_tiles.zip(dlogprob.chunks(ROWS).zip(lse.chunks(ROWS))) {
        let rows = targets.len();
        tile.start(h, rows, lora, channels);
        du.clear();
        du.resize(rows * lora.map_or(0, |lora| lora.rank), 0.0);
        for range in tiles(w.n()) {
            let width = range.len();
            tile.logits(isa, h, rows, w, lora, range.clone());
            let operands = targets.par_iter().zip(dlogprob).zip(lse);
            tile.logits.par_chunks_exact_mut(width).zip(operands).with_min_len(8).for_each(
                |(logits, ((&target, &dlogprob), &lse))| {
                    negative_softmax(isa, logits, lse, dlogprob);
                    if let Some(slope) = (target as usize).checked_sub(range.start).and_then(|at| logits.get_mut(at)) {
                        *slope += dlogprob;
                    }
                },
            );
            let slopes = &tile.logits;
            linear_backward_rows(isa, dh, slopes, rows, w, range.clone(), range.start > 0);
            if let Some(HeadLora { b, rank, scale, .. }) = lora {
                let part = range.start * rank..range.end * rank;
                gemm(&mut du, rows, rank, width, scale, slopes, false, &b[part.clone()], false, true);
                if let Some((_, db)) = &mut gradients.lora {
                    gemm(&mut db[part], width, rank, rows, scale, slopes, true, &tile.u, false, true);
                }
            }
            if let Some(dw) = &mut gradients.weight {
                let part = range.start * channels..range.end * channels;
                gemm(&mut dw[part], width, channels, rows, 1.0, slopes, true, h, false, true);
            }
        }
        if let Some(HeadLora { a, rank, .. }) = lora {
            gemm(dh, rows, channels, rank, 1.0, &du, false, a, false, true);
            if let Some((da, _)) = &mut gradients.lora {
                gemm(da, rank, channels, rows, 1.0, &du, true, h, false, true);
            }
        }
    }
}

fn check(h: &[f32], w: &Matrix, lora: Option<HeadLora>, targets: &[u32]) {
    assert!(w.k() > 0 && w.n() > 0, "an empty head");
    assert_eq!(h.len(), targets.len() * w.k());
    assert!(targets.iter().all(|&target| (target as usize) < w.n()), "a target outside the vocabulary");
    if let Some(HeadLora { a, b, rank, .. }) = lora {
        assert!(a.len() == rank * w.k() && b.len() == w.n() * rank);
    }
}

fn tiles(vocabulary: usize) -> impl Iterator<Item = Range<usize>> {
    (0..vocabulary).step_by(VOCABULARY).map(move |first| first..vocabulary.min(first + VOCABULARY))
}

/// Scratch for one tile.
#[derive(Default)]
struct Tile {
    /// [rows, tile of the vocabulary].
    logits: Vec<f32>,
    /// h Aᵀ [rows, r].
    u: Vec<f32>,
}

impl Tile {
    /// What all vocabulary tiles of these rows share.
    fn start(&mut self, h: &[f32], rows: usize, lora: Option<HeadLora>, channels: usize) {
        if let Some(HeadLora { a, rank, .. }) = lora {
            self.u.resize(rows * rank, 0.0);
            gemm(&mut self.u, rows, rank, channels, 1.0, h, false, a, true, false);
        }
    }

    fn logits(&mut self, isa: Isa, h: &[f32], rows: usize, w: &Matrix, lora: Option<HeadLora>, range: Range<usize>) {
        let width = range.len();
        self.logits.resize(rows * width, 0.0);
        linear_rows(isa, &mut self.logits, h, rows, w, range.clone(), false);
        if let Some(HeadLora { b, rank, scale, .. }) = lora {
            let b = &b[range.start * rank..range.end * rank];
            gemm(&mut self.logits, rows, width, rank, scale, &self.u, false, b, true, true);
        }
    }
}

/// The definition, in f64, with the logits in full.
pub mod reference {
    /// A, B, rank and scale.
    pub type Lora<'a> = Option<(&'a [f64], &'a [f64], usize, f64)>;

    /// logits [R, V] of h [R, C] and w [V, C].
    pub fn logits(h: &[f64], w: &[f64], channels: usize, lora: Lora) -> Vec<f64> {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut logits = Vec::new();
        for h in h.chunks_exact(channels) {
            for (v, w) in w.chunks_exact(channels).enumerate() {
                let low = lora.map_or(0.0, |(a, b, rank, scale)| {
                    let u: Vec<f64> = a.chunks_exact(channels).map(|a| dot(h, a)).collect();
                    scale * dot(&u, &b[v * rank..][..rank])
                });
                logits.push(dot(h, w) + low);
            }
        }
        logits
    }

    /// (logprob, lse, entropy), each \[R\].
    pub fn forward(logits: &[f64], targets: &[u32]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let vocabulary = logits.len() / targets.len().max(1);
        let (mut logprob, mut all_lse, mut entropy) = (Vec::new(), Vec::new(), Vec::new());
        for (logits, &target) in logits.chunks_exact(vocabulary.max(1)).zip(targets) {
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            logprob.push(logits[target as usize] - lse);
            entropy.push(lse - logits.iter().map(|x| (x - lse).exp() * x).sum::<f64>());
            all_lse.push(lse);
        }
        (logprob, all_lse, entropy)
    }

    /// Gradients of the sum of dlogprob * logprob.
    pub struct Gradients {
        /// Of the hidden states.
        pub dh: Vec<f64>,
        /// Of the adapter's A.
        pub da: Vec<f64>,
        /// Of the adapter's B.
        pub db: Vec<f64>,
        /// Of the matrix.
        pub dw: Vec<f64>,
    }

    /// All gradients; `da` and `db` are empty without LoRA.
    pub fn backward(dlogprob: &[f64], h: &[f64], w: &[f64], channels: usize, lora: Lora, targets: &[u32]) -> Gradients {
        let vocabulary = w.len() / channels;
        let logits = logits(h, w, channels, lora);
        let (_, lse, _) = forward(&logits, targets);
        let (a, b, rank, scale) = lora.unwrap_or((&[], &[], 0, 0.0));
        let mut g = Gradients {
            dh: vec![0.0; h.len()],
            da: vec![0.0; a.len()],
            db: vec![0.0; b.len()],
            dw: vec![0.0; w.len()],
        };
        for (r, h) in h.chunks_exact(channels).enumerate() {
            let u: Vec<f64> = a.chunks_exact(channels).map(|a| a.iter().zip(h).map(|(a, h)| a * h).sum()).collect();
            for v in 0..vocabulary {
                let hit = if targets[r] as usize == v { 1.0 } else { 0.0 };
                let dl = dlogprob[r] * (hit - (logits[r * vocabulary + v] - lse[r]).exp());
                for c in 0..channels {
                    g.dh[r * channels + c] += dl * w[v * channels + c];
                    g.dw[v * channels + c] += dl * h[c];
                }
                for j in 0..rank {
                    g.db[v * rank + j] += scale * dl * u[j];
                    for c in 0..channels {
                        g.dh[r * channels + c] += scale * dl * b[v * rank + j] * a[j * channels + c];
                        g.da[j * channels + c] += scale * dl * b[v * rank + j] * h[c];
                    }
                }
            }
        }
        g
    }
}
