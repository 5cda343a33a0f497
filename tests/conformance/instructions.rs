//! What each instruction of `kernels/dev.cuh` does, written down a second time: from the PTX manual, in Rust, knowing
//! nothing of the emulator.

use half::bf16;
use pipe::cuda::{Dim, Gpu};
use pipe::problem::Problem;
use pipe::random::Stream;

/// A kernel of this folder that takes (out, in), and its law. The words are bits, of floats mostly.
pub struct Instruction {
    /// The functions it is about.
    pub name: &'static str,
    kernel: &'static str,
    grid: usize,
    block: usize,
    shared: usize,
    input: fn() -> Vec<u32>,
    /// From the input, what the output has to be.
    law: fn(&[u32]) -> Vec<u32>,
    bound: Bound,
}

/// How far from its law a result may be, and a device from the emulator.
#[derive(Clone, Copy)]
pub enum Bound {
    /// Not at all: the same bits.
    Exact,
    /// So many units in the last place, of floats. Results below the normal numbers may be zero.
    Ulps(u32),
    /// So much, relative to this scale of each result, which is computed from the input.
    Relative(f64, fn(&[u32]) -> Vec<f64>),
}

/// A comparison of results.
pub struct Compared {
    pub values: usize,
    /// The largest difference, in the bound's unit.
    pub largest: f64,
    pub bound: f64,
    pub unit: &'static str,
    /// What is wrong first.
    pub wrong: Option<String>,
}

impl Instruction {
    pub fn input(&self) -> Vec<u32> {
        (self.input)()
    }

    pub fn law(&self) -> Vec<u32> {
        (self.law)(&self.input())
    }

    pub fn run(&self, gpu: &Gpu) -> Result<Vec<u32>, Problem> {
        let input = gpu.upload(&self.input())?;
        let output = gpu.zeros::<u32>(self.law().len())?;
        let block = Dim(self.block as u32, 1, 1);
        let launch = gpu.launch(self.kernel, self.grid, block).shared(self.shared).buffer(&output).buffer(&input);
        // SAFETY: the kernels of this folder take out and in; `in` has what the kernel's comment says, and `out` has
        // the length of the law.
        unsafe { launch.run()? };
        output.download()
    }

    /// Places of the output and words that are wrong there, if only just.
    pub fn just_beyond(&self, law: &[u32]) -> Vec<(usize, u32)> {
        let normal = |word: &u32| f32::from_bits(*word).is_normal();
        let at = law.iter().position(normal).unwrap_or(0);
        match self.bound {
            Bound::Exact => vec![(0, law[0] ^ 1), (law.len() - 1, law[law.len() - 1] ^ 1 << 31)],
            Bound::Ulps(most) => vec![(at, law[at] + most + 1), (at, law[at] - most - 1), (at, f32::NAN.to_bits())],
            Bound::Relative(most, scales) => {
                let beyond = f64::from(f32::from_bits(law[at])) + 1.1 * most * scales(&self.input())[at];
                vec![(at, (beyond as f32).to_bits()), (at, f32::NAN.to_bits())]
            }
        }
    }

    pub fn compare(&self, got: &[u32], want: &[u32]) -> Compared {
        assert_eq!(got.len(), want.len(), "{}", self.name);
        let float = f32::from_bits;
        let scales = match self.bound {
            Bound::Relative(_, scales) => scales(&self.input()),
            _ => vec![1.0; want.len()],
        };
        let (bound, unit) = match self.bound {
            Bound::Exact => (0.0, "bits"),
            Bound::Ulps(most) => (f64::from(most), "ulp"),
            Bound::Relative(most, _) => (most, "of scale"),
        };
        let mut compared = Compared { values: got.len(), largest: 0.0, bound, unit, wrong: None };
        for (i, ((&got, &want), scale)) in got.iter().zip(want).zip(scales).enumerate() {
            let difference = match self.bound {
                Bound::Exact => f64::from((got ^ want).count_ones()),
                Bound::Ulps(_) => ulps(float(got), float(want)),
                Bound::Relative(..) => (f64::from(float(got)) - f64::from(float(want))).abs() / scale,
            };
            // NaN, a difference from which nothing follows, is the largest.
            let larger = difference.is_nan() || difference > compared.largest;
            compared.largest = if larger && !compared.largest.is_nan() { difference } else { compared.largest };
            let fits = difference <= bound;
            if !fits && compared.wrong.is_none() {
                let (got_as, want_as) = (float(got), float(want));
                compared.wrong =
                    Some(format!("word {i}: {got:#010x} ({got_as:e}) instead of {want:#010x} ({want_as:e})"));
            }
        }
        compared
    }
}

/// Steps between two floats; infinitely many where only one is NaN. Zero stands for the largest denormal too.
fn ulps(a: f32, b: f32) -> f64 {
    if a.is_nan() || b.is_nan() {
        return if a.is_nan() && b.is_nan() { 0.0 } else { f64::INFINITY };
    }
    let place = |x: f32| {
        let steps = i64::from(x.abs().to_bits().max(f32::MIN_POSITIVE.to_bits() - 1));
        if x < 0.0 { -steps } else { steps }
    };
    (place(a) - place(b)).abs() as f64
}

/// Those of `kernels/dev.cuh`, and of CUDA as far as kernels use it.
pub const COMMON: &[Instruction] = &[
    Instruction {
        name: "bf2f, f2bf, pack_bf16, lower_bf16, upper_bf16",
        kernel: "conform_conversions",
        grid: 16,
        block: 256,
        shared: 0,
        input: || any_bits(16 * 256, "conversions"),
        law: conversions,
        bound: Bound::Exact,
    },
    Instruction {
        name: "exp2_approx",
        kernel: "conform_exp2",
        grid: 16,
        block: 256,
        shared: 0,
        input: || [special(), uniform(16 * 256 - special().len(), -150.0, 130.0, "exp2")].concat(),
        law: |input| each(input, |x| flushed(if is_denormal(x) { 1.0 } else { x.exp2() })),
        bound: Bound::Ulps(2),
    },
    Instruction {
        name: "expf",
        kernel: "conform_exp",
        grid: 16,
        block: 256,
        shared: 0,
        input: || [special(), uniform(16 * 256 - special().len(), -87.0, 88.0, "exp")].concat(),
        law: |input| each(input, f64::exp),
        bound: Bound::Ulps(2),
    },
    Instruction {
        name: "logf",
        kernel: "conform_log",
        grid: 16,
        block: 256,
        shared: 0,
        input: || uniform(16 * 256, 1e-3, 4e4, "log"),
        law: |input| each(input, f64::ln),
        bound: Bound::Ulps(2),
    },
    Instruction {
        name: "__f*_rn, sqrtf, fmaf, fmaxf, division",
        kernel: "conform_arithmetic",
        grid: 16,
        block: 256,
        shared: 0,
        input: || uniform(3 * 16 * 256, -100.0, 100.0, "arithmetic"),
        law: arithmetic,
        bound: Bound::Exact,
    },
    Instruction {
        name: "ld_128, st_128, ld_vec4, st_vec4, ld_vec8, st_vec8",
        kernel: "conform_vectors",
        grid: 1,
        block: 64,
        shared: 1024,
        input: || normal_bf16(32 * 64, "vectors"),
        law: vectors,
        bound: Bound::Exact,
    },
    Instruction {
        name: "cp_async16, cp_async_commit, cp_async_wait",
        kernel: "conform_copies",
        grid: 1,
        block: 64,
        shared: 3072,
        input: || any_bits(12 * 64, "copies"),
        law: copies,
        bound: Bound::Exact,
    },
    Instruction {
        name: "ldmatrix_x4, ldmatrix_x2, _trans",
        kernel: "conform_ldmatrix",
        grid: 1,
        block: 32,
        shared: 1536,
        input: || any_bits(32 * 4, "ldmatrix"),
        law: matrices,
        bound: Bound::Exact,
    },
    Instruction {
        name: "mma_bf16_16816, whole numbers",
        kernel: "conform_mma",
        grid: 32,
        block: 64,
        shared: 0,
        // Sums stay below 2^24: exact in any order, so that a wrong place cannot hide.
        input: || fragments(32 * 2, |random, i| (random.u64(i) % 33) as f32 - 16.0),
        law: products,
        bound: Bound::Exact,
    },
    Instruction {
        name: "mma_bf16_16816, normal numbers",
        kernel: "conform_mma",
        grid: 32,
        block: 64,
        shared: 0,
        input: || fragments(32 * 2, |random, i| random.normal(i) as f32),
        law: products,
        // The order of the sum is the device's own, and it may cut off where f32 rounds: at most a unit in the last
        // place of the largest term for each of 16 products and the start, and once more in the emulator.
        bound: Bound::Relative(34.0 / (1 << 23) as f64, product_scales),
    },
    Instruction {
        name: "lane_index, warp_*, block_*, shuffles, ballot",
        kernel: "conform_together",
        grid: 1,
        block: 256,
        shared: 32,
        input: || [normal(256, "together"), any_bits(256, "words")].concat(),
        law: together,
        bound: Bound::Exact,
    },
    Instruction {
        name: "bar_sync, bar_arrive",
        kernel: "conform_barriers",
        grid: 1,
        block: 128,
        shared: 1024,
        input: || any_bits(128, "barriers"),
        law: |input| {
            let left = (0..64).map(|t| input[127 - t]).chain(input[64..].iter().copied());
            left.chain((0..128).map(|t| input[t ^ 33])).collect()
        },
        bound: Bound::Exact,
    },
    Instruction {
        name: "atomicOr",
        kernel: "conform_atomics",
        grid: 2,
        block: 256,
        shared: 0,
        input: || any_bits(512, "atomics").into_iter().map(|word| word & 0x3f7).collect(),
        law: |input| {
            let mut words = vec![0; 8];
            input.iter().for_each(|word| words[(word % 8) as usize] |= 1 << (word / 8 % 32));
            words
        },
        bound: Bound::Exact,
    },
];

/// Those of `kernels/hopper.cuh`, which only devices of compute capability 9.0 have. Their kernels go to `hopper.cu`
/// here, and its line in `manifest.toml` is `archs = ["sm_90a"]`; the table that is printed names the functions which
/// no row here does.
pub const HOPPER: &[Instruction] = &[];

// ---- Inputs ----

fn any_bits(len: usize, name: &str) -> Vec<u32> {
    let random = Stream::named(23, &[name]);
    (0..len as u64).map(|i| random.u64(i) as u32).collect()
}

fn normal(len: usize, name: &str) -> Vec<u32> {
    let random = Stream::named(23, &[name]);
    (0..len as u64).map(|i| (random.normal(i) as f32).to_bits()).collect()
}

/// Uniform floats. The fraction is that of the stream's upper 53 bits.
fn uniform(len: usize, from: f64, to: f64, name: &str) -> Vec<u32> {
    let random = Stream::named(23, &[name]);
    let unit = |i| (random.u64(i) >> 11) as f64 / (1u64 << 53) as f64;
    (0..len as u64).map(|i| ((from + (to - from) * unit(i)) as f32).to_bits()).collect()
}

/// Pairs of bf16 that are no NaN.
fn normal_bf16(len: usize, name: &str) -> Vec<u32> {
    let random = Stream::named(23, &[name]);
    let number = |i| u32::from(bf16::from_f64(random.normal(i)).to_bits());
    (0..len as u64).map(|i| number(2 * i) | number(2 * i + 1) << 16).collect()
}

/// Zeros, denormals, infinities, NaN.
fn special() -> Vec<u32> {
    vec![0, 0x8000_0000, 1, 0x8000_0001, 0x007f_ffff, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000]
}

/// Per product, lanes' registers: a (4), b (2), d (4).
fn fragments(products: usize, number: fn(&Stream, u64) -> f32) -> Vec<u32> {
    let random = Stream::named(23, &["fragments"]);
    let value = |i: usize| number(&random, i as u64);
    let pair = |i: usize| {
        let half = |i| u32::from(bf16::from_f32(value(i)).to_bits());
        half(2 * i) | half(2 * i + 1) << 16
    };
    let word = |i: usize| if i % 10 < 6 { pair(i) } else { value(2 * i).to_bits() };
    (0..10 * 32 * products).map(word).collect()
}

// ---- Laws ----

fn each(input: &[u32], law: impl Fn(f64) -> f64) -> Vec<u32> {
    input.iter().map(|bits| (law(f64::from(f32::from_bits(*bits))) as f32).to_bits()).collect()
}

fn is_denormal(x: f64) -> bool {
    x != 0.0 && x.abs() < f64::from(f32::MIN_POSITIVE)
}

fn flushed(x: f64) -> f64 {
    if is_denormal(f64::from(x as f32)) { 0.0 } else { x }
}

/// To the nearest, ties to even, by looking at the two neighbours; `cvt` makes every NaN 0x7fff.
fn to_bf16(bits: u32) -> u32 {
    let x = f32::from_bits(bits);
    if x.is_nan() {
        return 0x7fff;
    }
    let below = bits >> 16;
    let distance = |upper: u32| {
        // One past the largest finite number counts as if exponents went on.
        let magnitude = |upper: u32| match upper & 0x7fff {
            0x7f80 => 2f64.powi(128),
            rest => f64::from(f32::from_bits(rest << 16)),
        };
        (magnitude(upper) - f64::from(x.abs())).abs()
    };
    if x.is_infinite() {
        return below;
    }
    match distance(below).partial_cmp(&distance(below + 1)).expect("finite") {
        std::cmp::Ordering::Less => below,
        std::cmp::Ordering::Greater => below + 1,
        std::cmp::Ordering::Equal => below + below % 2,
    }
}

fn conversions(input: &[u32]) -> Vec<u32> {
    let of = |i: usize| {
        let (own, next) = (to_bf16(input[i]), to_bf16(input[i ^ 1]));
        [input[i] << 16, own, own | next << 16, own << 16, next << 16]
    };
    (0..input.len()).flat_map(of).collect()
}

fn arithmetic(input: &[u32]) -> Vec<u32> {
    let of = |abc: &[u32]| {
        let [a, b, c] = [0, 1, 2].map(|i| f32::from_bits(abc[i]));
        let results = [a + b, a - b, a * b, a / b, a.abs().sqrt(), b.abs().sqrt(), a.mul_add(b, c), a.max(b), a / b];
        results.map(f32::to_bits)
    };
    input.chunks_exact(3).flat_map(of).collect()
}

fn vectors(input: &[u32]) -> Vec<u32> {
    let mut out = Vec::with_capacity(input.len());
    for (thread, own) in input.chunks_exact(32).enumerate() {
        let next = &input[32 * (thread ^ 1)..];
        let halves = |words: &[u32]| words.iter().flat_map(|word| [word & 0xffff, word >> 16]).collect::<Vec<_>>();
        out.extend(next[..4].iter().rev());
        out.extend(own[4..8].iter().rev());
        out.extend(own[8..16].iter().rev());
        let reversed: Vec<u32> = halves(&own[16..20]).into_iter().rev().collect();
        out.extend(reversed.chunks(2).map(|pair| pair[0] | pair[1] << 16));
        out.extend(halves(&own[20..24]).into_iter().map(|half| half << 16));
        out.extend(&own[28..32]);
    }
    out
}

fn copies(input: &[u32]) -> Vec<u32> {
    let mut out = Vec::with_capacity(input.len());
    for thread in 0..64 {
        let of = |thread: usize, group: usize| &input[12 * thread + 4 * group..][..4];
        out.extend(of(thread, 0));
        out.extend(if thread % 2 == 1 { of(thread, 1) } else { &[0; 4] });
        out.extend(of(thread ^ 1, 2));
    }
    out
}

/// `r[i]` of lane l: the elements 2 (l % 4) and the next of row l / 4 of matrix i; or, transposed, of column l / 4.
fn matrices(input: &[u32]) -> Vec<u32> {
    let element = |matrix: usize, row: usize, column: usize| {
        let word = input[4 * (8 * matrix + row) + column / 2];
        if column.is_multiple_of(2) { word & 0xffff } else { word >> 16 }
    };
    let mut out = Vec::new();
    for lane in 0..32 {
        let (row, column) = (lane / 4, 2 * (lane % 4));
        let plain = |i| element(i, row, column) | element(i, row, column + 1) << 16;
        let turned = |i| element(i, column, row) | element(i, column + 1, row) << 16;
        out.extend((0..4).map(plain));
        out.extend((0..4).map(turned));
        out.extend((0..2).map(plain));
        out.extend((0..2).map(turned));
    }
    out
}

/// Row and column of element `i` of a lane's part of a, b and d, as the tables of the manual have them.
fn place_in_a(lane: usize, i: usize) -> (usize, usize) {
    let row = if matches!(i, 0 | 1 | 4 | 5) { lane / 4 } else { lane / 4 + 8 };
    (row, lane % 4 * 2 + i % 2 + if i < 4 { 0 } else { 8 })
}

fn place_in_b(lane: usize, i: usize) -> (usize, usize) {
    (lane % 4 * 2 + i % 2 + if i < 2 { 0 } else { 8 }, lane / 4)
}

fn place_in_d(lane: usize, i: usize) -> (usize, usize) {
    (if i < 2 { lane / 4 } else { lane / 4 + 8 }, lane % 4 * 2 + i % 2)
}

/// Per element of d, the terms of its sum, the start first.
fn terms(input: &[u32]) -> impl Iterator<Item = [f64; 17]> {
    input.chunks_exact(320).flat_map(|product| {
        let half = |word: u32, i: usize| {
            f64::from(f32::from_bits(if i.is_multiple_of(2) { word << 16 } else { word >> 16 << 16 }))
        };
        let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
        for (lane, own) in product.chunks_exact(10).enumerate() {
            for i in 0..8 {
                let (row, column) = place_in_a(lane, i);
                a[row][column] = half(own[i / 2], i);
            }
            for i in 0..4 {
                let (row, column) = place_in_b(lane, i);
                b[row][column] = half(own[4 + i / 2], i);
            }
        }
        let of = move |lane: usize, i: usize, start: u32| {
            let (row, column) = place_in_d(lane, i);
            std::array::from_fn(|k| match k {
                0 => f64::from(f32::from_bits(start)),
                k => a[row][k - 1] * b[k - 1][column],
            })
        };
        let lanes = product.chunks_exact(10).enumerate();
        lanes.flat_map(move |(lane, own)| (0..4).map(move |i| of(lane, i, own[6 + i])))
    })
}

fn products(input: &[u32]) -> Vec<u32> {
    terms(input).map(|terms| (terms.iter().sum::<f64>() as f32).to_bits()).collect()
}

fn product_scales(input: &[u32]) -> Vec<f64> {
    terms(input).map(|terms| terms.iter().map(|term| term.abs()).sum()).collect()
}

/// The halves of a pair in each of five steps; every lane ends with the same bits.
fn over_warp(values: &[f32], join: fn(f32, f32) -> f32) -> f32 {
    let mut values = values.to_vec();
    for step in [16, 8, 4, 2, 1] {
        values = (0..32).map(|lane| join(values[lane], values[lane ^ step])).collect();
    }
    assert!(values.iter().all(|value| value.to_bits() == values[0].to_bits()));
    values[0]
}

fn together(input: &[u32]) -> Vec<u32> {
    let (floats, words) = input.split_at(input.len() / 2);
    let floats: Vec<f32> = floats.iter().map(|bits| f32::from_bits(*bits)).collect();
    let of_warps = |join: fn(f32, f32) -> f32| floats.chunks(32).map(|warp| over_warp(warp, join)).collect::<Vec<_>>();
    let of_block = |join: fn(f32, f32) -> f32, nothing: f32| {
        let mut parts = of_warps(join);
        parts.resize(32, nothing);
        over_warp(&parts, join)
    };
    let sum = |a: f32, b: f32| a + b;
    let (sums, maxima) = (of_warps(sum), of_warps(f32::max));
    let (block_sum, block_max) = (of_block(sum, 0.0), of_block(f32::max, f32::NEG_INFINITY));
    let mut out = Vec::new();
    for thread in 0..floats.len() {
        let (warp, lane) = (thread / 32, thread % 32);
        let words = &words[32 * warp..32 * warp + 32];
        let ballot = words.iter().enumerate().fold(0, |votes, (lane, word)| votes | (word & 1) << lane);
        out.extend([lane as u32, warp as u32]);
        out.extend([sums[warp], maxima[warp], block_sum, block_max].map(f32::to_bits));
        out.extend([words[words[lane] as usize % 32], words[lane ^ 5]]);
        out.extend([words[lane.checked_sub(3).unwrap_or(lane)], words[if lane + 9 > 31 { lane } else { lane + 9 }]]);
        out.push(ballot);
    }
    out
}
