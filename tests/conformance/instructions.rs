//! What each instruction of `kernels/dev.cuh` and `kernels/hopper.cuh` does, written down a second time: from the PTX manual, in Rust, knowing
//! nothing of the emulator.

use half::bf16;
use pipe::cuda::{Dim, Gpu};
use pipe::problem::Problem;
use pipe::random::Stream;

/// A kernel of this folder that takes (out, in) and maps of `in`, and its law. The words are bits, of floats mostly.
pub struct Instruction {
    /// The functions it is about.
    pub name: &'static str,
    kernel: &'static str,
    grid: usize,
    block: usize,
    shared: usize,
    maps: &'static [Map],
    input: fn() -> Vec<u32>,
    /// From the input, what the output has to be.
    law: fn(&[u32]) -> Vec<u32>,
    bound: Bound,
}

/// A tensor of bf16 in the input, from element `first` on, and the box of a tensor copy: the contiguous extent last.
struct Map {
    first: usize,
    extents: &'static [usize],
    tile: &'static [usize],
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

    /// The output, as long as the law.
    pub fn run(&self, gpu: &Gpu, words: usize) -> Result<Vec<u32>, Problem> {
        let input = gpu.upload::<bf16>(bytemuck::cast_slice(&self.input()))?;
        let output = gpu.zeros::<u32>(words)?;
        let block = Dim(self.block as u32, 1, 1);
        let mut launch = gpu.launch(self.kernel, self.grid, block).shared(self.shared).buffer(&output).buffer(&input);
        for Map { first, extents, tile } in self.maps {
            launch = launch.map(gpu.tensor_map_from(&input, *first, extents, tile)?);
        }
        // SAFETY: the kernels of this folder take out, in and these maps; `in` has what the kernel's comment says, and
        // `out` has the length of the law.
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
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
        maps: &[],
        input: || any_bits(512, "atomics").into_iter().map(|word| word & 0x3f7).collect(),
        law: |input| {
            let mut words = vec![0; 8];
            input.iter().for_each(|word| words[(word % 8) as usize] |= 1 << (word / 8 % 32));
            words
        },
        bound: Bound::Exact,
    },
];

/// Those of `kernels/hopper.cuh`, which only devices of compute capability 9.0 have.
pub const HOPPER: &[Instruction] = &[
    Instruction {
        name: "tensor_load_2d, fence_proxy_async",
        kernel: "conform_box_2d",
        grid: BOXES_2D.len(),
        block: 128,
        shared: 21 * 128 + 8,
        maps: &[Map { first: 128, extents: &[50, 104], tile: &[20, 64] }],
        input: || around(BOXES_2D.as_flattened(), 50 * 104 / 2, "boxes 2d"),
        law: |input| boxes(input, &BOXES_2D.map(|[c0, c1]| [c0, c1, 0]), [1, 50, 104], [1, 20]),
        bound: Bound::Exact,
    },
    Instruction {
        name: "tensor_load_3d, fence_proxy_async",
        kernel: "conform_box_3d",
        grid: BOXES_3D.len(),
        block: 128,
        shared: 19 * 128 + 8,
        maps: &[Map { first: 128, extents: &[5, 12, 72], tile: &[3, 6, 64] }],
        input: || around(BOXES_3D.as_flattened(), 5 * 12 * 72 / 2, "boxes 3d"),
        law: |input| boxes(input, &BOXES_3D, [5, 12, 72], [3, 6]),
        bound: Bound::Exact,
    },
    Instruction {
        name: "wgmma_descriptor, k_major, mn_major",
        kernel: "conform_descriptors",
        grid: 1,
        block: 128,
        shared: 0,
        maps: &[],
        // Multiples of 16 below 227 KiB.
        input: || any_bits(3 * 128, "descriptors").into_iter().map(|word| word % (227 * 64) * 16).collect(),
        law: descriptors,
        bound: Bound::Exact,
    },
    warpgroup::<64>("wgmma, wgmma_registers of 64, whole numbers", "conform_wgmma_64", true),
    warpgroup::<128>("wgmma, wgmma_registers of 128, whole numbers", "conform_wgmma_128", true),
    warpgroup::<256>("wgmma, wgmma_registers of 256, whole numbers", "conform_wgmma_256", true),
    warpgroup::<64>("wgmma, wgmma_registers of 64, normal numbers", "conform_wgmma_64", false),
    warpgroup::<128>("wgmma, wgmma_registers of 128, normal numbers", "conform_wgmma_128", false),
    warpgroup::<256>("wgmma, wgmma_registers of 256, normal numbers", "conform_wgmma_256", false),
    Instruction {
        name: "mbarrier_*, a ring of tensor copies",
        kernel: "conform_ring",
        grid: 1,
        block: 160,
        shared: 3 * 2048 + 48,
        maps: &[
            Map { first: 0, extents: &[14 * 8, 64], tile: &[8, 64] },
            Map { first: 14 * 512, extents: &[14 * 8, 64], tile: &[8, 64] },
        ],
        // A counter: what comes twice, late or not at all shows.
        input: || (1..=14 * 512).collect(),
        law: |input| {
            let (x, y) = input.split_at(14 * 256);
            let times = x.chunks(256).zip(y.chunks(256));
            times.flat_map(|(x, y)| [swizzled(x), swizzled(y)].concat()).collect()
        },
        bound: Bound::Exact,
    },
    Instruction {
        name: "mbarrier_*, a ring among threads",
        kernel: "conform_phases",
        grid: 1,
        block: 128,
        shared: 512 + 32,
        maps: &[],
        input: || (1..=15 * 64).collect(),
        law: |input| input.chunks(64).flat_map(|time| time.iter().rev().copied()).collect(),
        bound: Bound::Exact,
    },
    Instruction {
        name: "registers_give, registers_take, wgmma_operand",
        kernel: "conform_registers",
        grid: 1,
        block: 384,
        shared: 0,
        maps: &[],
        input: || any_bits(384 * 192, "registers"),
        law: |input| {
            let held = |(thread, words): (usize, &[u32])| {
                let count = if thread < 128 { 16 } else { 192 };
                words[..count].iter().rev().copied().collect::<Vec<_>>()
            };
            input.chunks(192).enumerate().flat_map(held).collect()
        },
        bound: Bound::Exact,
    },
];

/// Where boxes of 20 rows of 64 begin, column first, in a tensor of 50 rows of 104: inside, up to two edges, across
/// each edge and two corners, outside of each edge and of a corner.
const BOXES_2D: [[i32; 2]; 14] = [
    [0, 0],
    [3, 7],
    [40, 30],
    [-5, 4],
    [70, 9],
    [16, -7],
    [8, 41],
    [-9, -3],
    [99, 44],
    [104, 0],
    [-64, 10],
    [0, 50],
    [0, -20],
    [200, -100],
];

/// The same of 3 planes of 6 rows of 64, in a tensor of 5 planes of 12 rows of 72.
const BOXES_3D: [[i32; 3]; 17] = [
    [0, 0, 0],
    [5, 3, 1],
    [8, 6, 2],
    [-7, 2, 1],
    [20, 2, 1],
    [2, -2, 0],
    [2, 9, 1],
    [2, 2, -1],
    [2, 2, 4],
    [-3, -1, -2],
    [40, 10, 4],
    [72, 0, 0],
    [-64, 0, 0],
    [0, 12, 0],
    [0, -6, 0],
    [0, 0, 5],
    [0, 0, -3],
];

/// A row of products by a warpgroup, N columns, 64 summed: as `products_body` of instructions_hopper.cu has them.
const fn warpgroup<const N: usize>(name: &'static str, kernel: &'static str, whole: bool) -> Instruction {
    Instruction {
        name,
        kernel,
        grid: 12,
        block: 128,
        shared: 8192 + 144 * N,
        maps: &[],
        // Sums stay below 2^24: exact in any order.
        input: if whole {
            || warpgroup_operands(N, |random, i| (random.u64(i) % 33) as f32 - 16.0)
        } else {
            || warpgroup_operands(N, |random, i| random.normal(i) as f32)
        },
        law: |input| {
            let sum = |start: f64, terms: &mut dyn Iterator<Item = f64>| terms.fold(start, |sum, term| sum + term);
            warpgroup_sums(N, input, sum).map(|sum| (sum as f32).to_bits()).collect()
        },
        // As of mma_bf16_16816: 16 products and the start, four times, and once more in the emulator.
        bound: if whole {
            Bound::Exact
        } else {
            Bound::Relative(136.0 / (1 << 23) as f64, |input| {
                let sum = |start: f64, terms: &mut dyn Iterator<Item = f64>| {
                    terms.fold(start.abs(), |sum, term| sum + term.abs())
                };
                warpgroup_sums(N, input, sum).collect()
            })
        },
    }
}

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

/// Coordinates of boxes in 64 words, then `words` words and 64 more: what lies around a tensor is not zero.
fn around(coordinates: &[i32], words: usize, name: &str) -> Vec<u32> {
    let mut all = any_bits(64 + words + 64, name);
    all.iter_mut().zip(coordinates).for_each(|(word, coordinate)| *word = *coordinate as u32);
    all
}

/// Twelve times A [64, 64], B [64, n], both bf16, and d [64, n], f32.
fn warpgroup_operands(n: usize, number: fn(&Stream, u64) -> f32) -> Vec<u32> {
    let random = Stream::named(23, &["warpgroup", &n.to_string()]);
    let halves = 32 * (64 + n);
    let half = |i: usize| u32::from(bf16::from_f32(number(&random, i as u64)).to_bits());
    let word = |i: usize| match i % (halves + 64 * n) < halves {
        true => half(2 * i) | half(2 * i + 1) << 16,
        false => number(&random, 2 * i as u64).to_bits(),
    };
    (0..12 * (halves + 64 * n)).map(word).collect()
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

/// Rows of 128 bytes as the 128-byte swizzle leaves them: chunk c of 16 bytes of row r is chunk c ^ (r mod 8).
fn swizzled(rows: &[u32]) -> Vec<u32> {
    let mut out = vec![0; rows.len()];
    for (i, chunk) in rows.chunks(4).enumerate() {
        let (row, place) = (i / 8, (i % 8) ^ (i / 8 % 8));
        out[32 * row + 4 * place..][..4].copy_from_slice(chunk);
    }
    out
}

/// Boxes of [planes, rows] rows of 64 at (c0, c1, c2) of a tensor that begins at word 64, zeros beyond its edges; after
/// each the 32 words that were behind it.
fn boxes(input: &[u32], at: &[[i32; 3]], extents: [i32; 3], tile: [i32; 2]) -> Vec<u32> {
    let element = |place: [i32; 3]| {
        let inside = place.iter().zip(extents).all(|(i, extent)| (0..extent).contains(i));
        let i = ((place[0] * extents[1] + place[1]) * extents[2] + place[2]) as usize;
        if inside { input[64 + i / 2] >> (16 * (i % 2)) & 0xffff } else { 0 }
    };
    let mut out = Vec::new();
    for [c0, c1, c2] in at {
        let rows = (0..tile[0]).flat_map(|plane| (0..tile[1]).map(move |row| (c2 + plane, c1 + row)));
        let words = rows.flat_map(|(plane, row)| (0..32).map(move |i| [plane, row, c0 + 2 * i]));
        let word =
            |[plane, row, column]: [i32; 3]| element([plane, row, column]) | element([plane, row, column + 1]) << 16;
        out.extend(swizzled(&words.map(word).collect::<Vec<_>>()));
        out.extend([u32::MAX; 32]);
    }
    out
}

/// "Matrix Descriptor Format", without a base offset, of the 128-byte swizzle.
fn descriptors(input: &[u32]) -> Vec<u32> {
    let descriptor = |address: u32, leading: u32, stride: u32| {
        let field = |bytes: u32| u64::from(bytes % (1 << 18)) / 16;
        let bits = field(address) + (field(leading) << 16) + (field(stride) << 32) + (1 << 62);
        [bits as u32, (bits >> 32) as u32]
    };
    let of = |words: &[u32]| {
        let [address, leading, stride] = [words[0], words[1], words[2]];
        // Eight rows of 128 bytes from one group to the next.
        [descriptor(address, leading, stride), descriptor(address, 16, 1024), descriptor(address, leading, 1024)]
    };
    input.chunks_exact(3).flat_map(of).flatten().collect()
}

/// Of each thread's elements of d, in the order of `conform_wgmma_*`, what `sum` makes of the start and the 64 terms.
fn warpgroup_sums(
    n: usize,
    input: &[u32],
    sum: impl Fn(f64, &mut dyn Iterator<Item = f64>) -> f64,
) -> impl Iterator<Item = f64> {
    input.chunks_exact(64 * 32 + 32 * n + 64 * n).enumerate().flat_map(move |(block, operands)| {
        let (a_words, rest) = operands.split_at(64 * 32);
        let (b_words, starts) = rest.split_at(32 * n);
        let half = |words: &[u32], i: usize| f64::from(f32::from_bits(words[i / 2] >> (16 * (i % 2)) << 16));
        // Rows of A, columns of B.
        let (mut a, mut b) = (vec![[0.0; 64]; 64], vec![[0.0; 64]; n]);
        for i in 0..64 * 64 {
            match block % 6 {
                0 | 1 => a[i / 64][i % 64] = half(a_words, i),
                2 | 3 => a[i % 64][i / 64] = half(a_words, i),
                _ => {
                    let (thread, step) = (i / 32, i % 32 / 8);
                    let (row, column) = place_in_a(thread % 32, i % 8);
                    a[thread / 32 * 16 + row][16 * step + column] = half(a_words, i);
                }
            }
        }
        for i in 0..64 * n {
            match block % 2 {
                0 => b[i / 64][i % 64] = half(b_words, i),
                _ => b[i / 4096 * 64 + i % 64][i / 64 % 64] = half(b_words, i),
            }
        }
        let mut out = Vec::with_capacity(64 * n);
        for (i, start) in starts.iter().enumerate() {
            let (thread, i) = (i / (n / 2), i % (n / 2));
            let (row, column) = place_in_d(thread % 32, i % 4);
            let (a, b) = (&a[thread / 32 * 16 + row], &b[i / 4 * 8 + column]);
            let start = if block >= 6 { f64::from(f32::from_bits(*start)) } else { 0.0 };
            out.push(sum(start, &mut a.iter().zip(b).map(|(a, b)| a * b)));
        }
        out
    })
}
