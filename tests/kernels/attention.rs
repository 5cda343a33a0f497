//! Attention, forward and backward: against its f64 definition, on every schedule, with faults planted.

use crate::support::{
    Emulated, HOPPER, PORTABLE, Watched, Watcher, as_good_as, bf16_numbers, bytes, close, detector_is_silent, gpu, on,
    on_each_kind_of_device, rounded, same_bits_on_every_schedule, through_bf16, values, wide,
};
use emulator::Schedule;
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::attention::{Dims, backward, forward, supports};
use pipe::problem::{Exit, Problem};
use pipe::tensor::ops::Attention;
use pipe::tensor::ops::attention::reference;
use std::panic::{AssertUnwindSafe, catch_unwind};

const fn dims(heads: usize, kv_heads: usize, head_dim: usize) -> Dims {
    Dims { heads, kv_heads, head_dim }
}

struct Case {
    lengths: Vec<usize>,
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    d_o: Vec<bf16>,
    dims: Dims,
}

/// o, lse, dq, dk, dv.
type Exact = [Vec<f64>; 5];

impl Case {
    fn new(lengths: &[usize], dims: Dims) -> Case {
        let tokens: usize = lengths.iter().sum();
        let (queries, keys) = (tokens * dims.heads * dims.head_dim, tokens * dims.kv_heads * dims.head_dim);
        Case {
            lengths: lengths.to_vec(),
            q: bf16_numbers(queries, "q"),
            k: bf16_numbers(keys, "k"),
            v: bf16_numbers(keys, "v"),
            d_o: bf16_numbers(queries, "do"),
            dims,
        }
    }

    /// One sequence by itself.
    fn alone(&self, sequence: usize) -> Case {
        let from: usize = self.lengths[..sequence].iter().sum();
        let to = from + self.lengths[sequence];
        let cut = |x: &[bf16], heads| {
            let width = heads * self.dims.head_dim;
            x[from * width..to * width].to_vec()
        };
        Case {
            lengths: vec![to - from],
            q: cut(&self.q, self.dims.heads),
            k: cut(&self.k, self.dims.kv_heads),
            v: cut(&self.v, self.dims.kv_heads),
            d_o: cut(&self.d_o, self.dims.heads),
            dims: self.dims,
        }
    }

    /// The bits of o, lse, dq, dk, dv.
    fn run(&self, gpu: &Gpu) -> Result<Vec<Vec<u8>>, Problem> {
        let mut cu_seqlens = vec![0];
        for length in &self.lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *length as i32);
        }
        let cu_seqlens = gpu.upload(&cu_seqlens)?;
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let [q, k, v, d_o] = [&self.q, &self.k, &self.v, &self.d_o].map(|x| gpu.upload(x));
        let (q, k, v, d_o) = (q?, k?, v?, d_o?);
        let (mut o, mut lse) = (gpu.alloc(q.len())?, gpu.alloc(q.len() / self.dims.head_dim)?);
        let (mut dq, mut dk, mut dv) = (gpu.alloc(q.len())?, gpu.alloc(k.len())?, gpu.alloc(v.len())?);
        forward(&mut o, &mut lse, &q, &k, &v, &cu_seqlens, longest, self.dims)?;
        backward(&mut dq, &mut dk, &mut dv, &d_o, &q, &k, &v, &o, &lse, &cu_seqlens, longest, self.dims)?;
        Ok(vec![bytes(&o)?, bytes(&lse)?, bytes(&dq)?, bytes(&dk)?, bytes(&dv)?])
    }

    /// The definition, and what is left of it if probabilities, their slopes and the results are stored in bf16, but
    /// not the scores: stricter than the plain composition, which stores those too.
    fn exact_and_plain(&self) -> (Exact, Exact) {
        let (mut exact, mut plain) = (Exact::default(), Exact::default());
        let Dims { heads, kv_heads, head_dim } = self.dims;
        for sequence in 0..self.lengths.len() {
            let case = self.alone(sequence);
            let [q, k, v, d_o] = [&case.q, &case.k, &case.v, &case.d_o].map(|x| wide(x));
            let of = Attention { heads, kv_heads, head_size: head_dim };
            let (o, lse) = reference::forward(&q, &k, &v, of);
            let (dq, dk, dv) = reference::backward(&d_o, &q, &k, &v, of);
            let stored = plain_composition(&q, &k, &v, &d_o, &lse, self.dims);
            for (all, part) in exact.iter_mut().zip([o, lse.clone(), dq, dk, dv]) {
                all.extend(part);
            }
            let [o, dq, dk, dv] = stored;
            for (all, part) in plain.iter_mut().zip([o, lse, dq, dk, dv]) {
                all.extend(part);
            }
        }
        (exact, plain)
    }

    /// What a run gave is as good as it can be expected to be.
    #[track_caller]
    fn check(&self, results: &[Vec<u8>], (exact, plain): &(Exact, Exact)) {
        let what = format!("{:?}, {:?}", self.lengths, self.dims);
        close(&values::<f32>(&results[1]), &exact[1], 2e-6, &format!("lse, {what}"));
        for (i, name) in [(0, "o"), (2, "dq"), (3, "dk"), (4, "dv")] {
            as_good_as(&values::<bf16>(&results[i]), &plain[i], &exact[i], 1e-5, &format!("{name}, {what}"));
        }
    }
}

/// o, dq, dk, dv of one sequence.
fn plain_composition(q: &[f64], k: &[f64], v: &[f64], d_o: &[f64], lse: &[f64], dims: Dims) -> [Vec<f64>; 4] {
    let Dims { heads, kv_heads, head_dim } = dims;
    let (len, scale) = (q.len() / (heads * head_dim), 1.0 / (head_dim as f64).sqrt());
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let [mut o, mut dq] = [(); 2].map(|()| vec![0.0; q.len()]);
    let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; k.len()]);
    for t in 0..len {
        for h in 0..heads {
            let row = (t * heads + h) * head_dim..(t * heads + h + 1) * head_dim;
            let key = |s: usize| {
                let at = (s * kv_heads + h / (heads / kv_heads)) * head_dim;
                at..at + head_dim
            };
            let scores = (0..=t).map(|s| (product(&q[row.clone()], &k[key(s)]) * scale - lse[t * heads + h]).exp());
            let p = through_bf16(&scores.collect::<Vec<f64>>());
            for s in 0..=t {
                o[row.clone()].iter_mut().zip(&v[key(s)]).for_each(|(o, v)| *o += p[s] * v);
                dv[key(s)].iter_mut().zip(&d_o[row.clone()]).for_each(|(dv, d_o)| *dv += p[s] * d_o);
            }
            o.splice(row.clone(), through_bf16(&o[row.clone()]));
            let delta = product(&d_o[row.clone()], &o[row.clone()]);
            let ds = (0..=t).map(|s| p[s] * (product(&d_o[row.clone()], &v[key(s)]) - delta));
            let ds = through_bf16(&ds.collect::<Vec<f64>>());
            for s in 0..=t {
                dq[row.clone()].iter_mut().zip(&k[key(s)]).for_each(|(dq, k)| *dq += ds[s] * k * scale);
                dk[key(s)].iter_mut().zip(&q[row.clone()]).for_each(|(dk, q)| *dk += ds[s] * q * scale);
            }
        }
    }
    [o, dq, dk, dv].map(|x| through_bf16(&x))
}

/// Sequences of one token and of none, ends before, at and after the borders of tiles of 32, 64 and 128, groups of 1, 2
/// and 7.
fn cases() -> Vec<Case> {
    vec![
        Case::new(&[1], dims(1, 1, 64)),
        Case::new(&[37, 0, 1, 130, 64], dims(4, 2, 64)),
        Case::new(&[65, 31, 32, 33], dims(2, 2, 128)),
        Case::new(&[3, 67], dims(7, 1, 128)),
        Case::new(&[0, 17, 0], dims(14, 2, 64)),
        Case::new(&[63, 128, 127], dims(1, 1, 64)),
        Case::new(&[129, 1], dims(1, 1, 128)),
        Case::new(&[270], dims(2, 1, 64)),
        // Heads below 64: whole pieces of 16 bytes, and rows that start anywhere.
        Case::new(&[37, 0, 1, 66], dims(4, 2, 8)),
        Case::new(&[67, 5], dims(7, 1, 16)),
        Case::new(&[33, 70], dims(2, 1, 12)),
        Case::new(&[65, 1], dims(3, 3, 2)),
        Case::new(&[3, 67], dims(2, 1, 40)),
        Case::new(&[35], dims(2, 1, 62)),
    ]
}

#[test]
fn it_follows_its_definition_with_the_same_bits_on_every_schedule() {
    for case in cases() {
        let expected = case.exact_and_plain();
        on_each_kind_of_device(|| {
            let results = same_bits_on_every_schedule(|gpu| case.run(gpu));
            case.check(&results, &expected);
        });
    }
}

#[test]
fn the_detector_has_nothing_to_say() {
    for case in cases() {
        on_each_kind_of_device(|| detector_is_silent(|gpu| case.run(gpu)));
    }
}

#[test]
fn a_packed_sequence_gives_the_bits_it_gives_alone() {
    let case = Case::new(&[70, 1, 0, 129, 64], dims(2, 1, 64));
    on_each_kind_of_device(|| {
        let packed = case.run(&gpu()).expect("a run");
        let mut joined = vec![Vec::new(); 5];
        for sequence in 0..case.lengths.len() {
            for (all, part) in joined.iter_mut().zip(case.alone(sequence).run(&gpu()).expect("a run")) {
                all.extend(part);
            }
        }
        assert!(packed == joined);
    });
}

/// Sequences 0 and 2 of a batch, alone, and what became of them beside a sequence of NaN.
fn beside_nan(gpu: &Gpu) -> Result<[Vec<Vec<u8>>; 2], Problem> {
    let mut case = Case::new(&[70, 3, 60], dims(2, 1, 64));
    for (x, heads) in [(&mut case.q, 2), (&mut case.k, 1), (&mut case.v, 1), (&mut case.d_o, 2)] {
        x[70 * heads * 64..73 * heads * 64].fill(bf16::NAN);
    }
    let packed = case.run(gpu)?;
    let of_neighbours = packed.iter().map(|bits| {
        let token = bits.len() / 133;
        [&bits[..70 * token], &bits[73 * token..]].concat()
    });
    let [first, last] = [case.alone(0).run(gpu)?, case.alone(2).run(gpu)?];
    let alone = first.into_iter().zip(last).map(|(first, last)| [first, last].concat());
    Ok([of_neighbours.collect(), alone.collect()])
}

#[test]
fn a_sequence_of_nan_does_not_reach_its_neighbours() {
    on_each_kind_of_device(|| {
        let [packed, alone] = beside_nan(&gpu()).expect("runs");
        assert!(packed == alone);
    });
}

#[test]
fn large_scores_do_not_overflow() {
    on_each_kind_of_device(|| {
        let mut case = Case::new(&[90], dims(2, 1, 64));
        case.q = rounded(&case.q.iter().map(|q| q.to_f32() * 300.0).collect::<Vec<f32>>());
        let results = case.run(&gpu()).expect("a run");
        let (exact, plain) = case.exact_and_plain();
        // Scores around 1000 are known to 1e-4 in f32, so probabilities are too.
        as_good_as(&values::<bf16>(&results[0]), &plain[0], &exact[0], 1e-3, "o");
        close(&values::<f32>(&results[1]), &exact[1], 1e-6, "lse");
        for gradient in &results[2..] {
            assert!(values::<bf16>(gradient).iter().all(|x| x.is_finite()));
        }
        // All scores far below zero: what is not visible must not win by being 0.
        case.q.iter_mut().for_each(|q| *q = bf16::from_f32(-300.0));
        case.k.iter_mut().for_each(|k| *k = bf16::from_f32(k.to_f32().abs() + 1.0));
        let results = case.run(&gpu()).expect("a run");
        let (exact, plain) = case.exact_and_plain();
        as_good_as(&values::<bf16>(&results[0]), &plain[0], &exact[0], 1e-2, "o below zero");
        close(&values::<f32>(&results[1]), &exact[1], 1e-6, "lse below zero");
    });
}

#[test]
fn an_empty_batch_is_nothing() {
    on_each_kind_of_device(|| {
        for lengths in [&[][..], &[0], &[0, 0]] {
            let results = Case::new(lengths, dims(2, 1, 64)).run(&gpu()).expect("a run");
            assert!(results.iter().all(Vec::is_empty));
        }
    });
}

#[test]
fn a_small_head_has_the_bits_of_one_filled_up_with_zeros() {
    // Sizes whose 1 / sqrt(D) is 2 or 4 times that of 64: queries times as much have the same scores to the bit.
    for (head_dim, factor) in [(16, 2.0), (4, 4.0)] {
        let case = Case::new(&[70, 33], dims(4, 2, head_dim));
        let pad = |x: &[bf16], factor: f32| -> Vec<bf16> {
            let scaled = |row: &[bf16]| row.iter().map(|x| bf16::from_f32(x.to_f32() * factor)).collect::<Vec<_>>();
            x.chunks(head_dim).flat_map(|row| [scaled(row), vec![bf16::ZERO; 64 - head_dim]].concat()).collect()
        };
        let padded = Case {
            lengths: case.lengths.clone(),
            q: pad(&case.q, factor),
            k: pad(&case.k, 1.0),
            v: pad(&case.v, 1.0),
            d_o: pad(&case.d_o, 1.0),
            dims: dims(4, 2, 64),
        };
        let (small, whole) = (case.run(&gpu()).expect("a run"), padded.run(&gpu()).expect("a run"));
        assert!(small[1] == whole[1], "lse of heads of {head_dim}");
        for (i, name, factor) in [(0, "o", 1.0), (2, "dq", 1.0 / factor), (3, "dk", 1.0), (4, "dv", 1.0)] {
            let (small, whole) = (values::<bf16>(&small[i]), values::<bf16>(&whole[i]));
            assert!(pad(&small, factor) == whole, "{name} of heads of {head_dim}");
        }
    }
}

#[test]
fn other_sizes_of_a_head_are_refused_by_name() {
    for head_dim in [1, 7, 63, 66, 80, 96, 127, 256] {
        assert!(!supports(head_dim));
        let problem = Case::new(&[3], dims(2, 1, head_dim)).run(&gpu()).expect_err("a refusal");
        assert_eq!((problem.code, problem.exit), ("cuda::head_dim", Exit::Missing));
        let text = problem.to_string();
        assert!([&head_dim.to_string(), "64", "128"].iter().all(|size| text.contains(*size)), "{text}");
    }
}

/// An end within a tile, and so many tiles that each turn of the double buffer comes again: of 64 keys, and of 128.
fn faulty_case(kind: Emulated) -> Case {
    Case::new(&[if kind.0 == PORTABLE.0 { 130 } else { 260 }], dims(1, 1, 64))
}

/// The emulator, with the schedule's fault in one kernel only: a launch that reports one ends a run, so that a
/// fault in all of them would prove the first one's only.
struct FaultIn(&'static str);

impl Watcher for FaultIn {
    fn launching(&self, kernel: &'static str, launch: &mut dyn FnMut() -> Result<(), Problem>) -> Result<(), Problem> {
        let mut schedule = emulator::schedule();
        if !kernel.starts_with(self.0) {
            schedule.fault = None;
        }
        emulator::with(schedule, launch)
    }
}

const LOOPS: [&str; 3] = ["attention_forward", "attention_key_gradients", "attention_query_gradients"];

#[test]
fn the_detector_finds_every_fault_of_synchronisation() {
    let portable = ["NO_END_BARRIER", "LAX_WAIT", "NO_WAIT_BARRIER"].map(|fault| (PORTABLE, fault));
    let hopper = ["FULL", "EMPTY", "RELEASE", "CLEAR_FENCE"].map(|fault| (HOPPER, fault));
    let everywhere = LOOPS
        .iter()
        .flat_map(|kernel| portable.iter().chain(&hopper).map(move |(kind, fault)| (*kind, *kernel, *fault)));
    for (kind, kernel, fault) in everywhere.chain([(HOPPER, "attention_forward", "P_EARLY")]) {
        let schedule = Schedule { detector: true, fault: Some(fault), ..Schedule::default() };
        let run = || faulty_case(kind).run(&Gpu::exact(Box::new(Watched(kind, FaultIn(kernel)))));
        let said = emulator::with(schedule, run).err().map(|problem| problem.to_string());
        let said = said.unwrap_or_else(|| panic!("the detector does not see {fault} in {kernel}"));
        assert!(said.contains(kernel), "{said}");
    }
}

#[test]
fn the_comparison_finds_every_fault_of_arithmetic() {
    let faulty = |kind, kernel, fault| {
        let schedule = Schedule { fault: Some(fault), ..Schedule::default() };
        (schedule, Gpu::exact(Box::new(Watched(kind, FaultIn(kernel)))))
    };
    for kind in [PORTABLE, HOPPER] {
        let case = faulty_case(kind);
        let expected = case.exact_and_plain();
        let sound = on(kind, || case.run(&gpu())).expect("a run");
        case.check(&sound, &expected);
        let masks = LOOPS.map(|kernel| (kernel, "MASK_OFF_BY_ONE"));
        for (kernel, fault) in masks.into_iter().chain([("attention_forward", "NO_RESCALE")]) {
            let (schedule, gpu) = faulty(kind, kernel, fault);
            let results = emulator::with(schedule, || case.run(&gpu)).expect("a run");
            let checked = catch_unwind(AssertUnwindSafe(|| case.check(&results, &expected)));
            assert!(checked.is_err(), "nothing shows the fault {fault} in {kernel}");
        }
    }
    for kernel in LOOPS {
        let (schedule, gpu) = faulty(HOPPER, kernel, "NO_CLEAR");
        let [packed, alone] = emulator::with(schedule, || beside_nan(&gpu)).expect("runs");
        assert!(packed != alone, "nothing shows the fault NO_CLEAR in {kernel}");
    }
}
