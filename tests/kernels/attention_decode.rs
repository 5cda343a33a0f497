//! Attention of new tokens over a paged cache: against its f64 definition, on every schedule, with faults planted.

use crate::support::{
    as_good_as, bf16_numbers, bytes, detector_is_silent, finds, gpu, rounded, same_bits_on_every_schedule,
    through_bf16, values, wide,
};
use emulator::Schedule;
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::attention::Dims;
use pipe::cuda::ops::attention_decode::{PAGE, Parts, append, forward};
use pipe::problem::Problem;
use pipe::tensor::ops::Attention;
use pipe::tensor::ops::attention::reference;
use std::panic::{AssertUnwindSafe, catch_unwind};

const fn dims(heads: usize, kv_heads: usize, head_dim: usize) -> Dims {
    Dims { heads, kv_heads, head_dim }
}

/// Sequences, the last token of each being new.
struct Case {
    lengths: Vec<usize>,
    /// [B, H, D].
    q: Vec<bf16>,
    /// Of each sequence [length, KV, D].
    k: Vec<Vec<bf16>>,
    v: Vec<Vec<bf16>>,
    dims: Dims,
}

impl Case {
    fn new(lengths: &[usize], dims: Dims) -> Case {
        let width = dims.kv_heads * dims.head_dim;
        let rows = |name: &str| {
            let of = |(i, length): (usize, &usize)| bf16_numbers(length * width, &format!("{name} {i}"));
            lengths.iter().enumerate().map(of).collect()
        };
        let q = bf16_numbers(lengths.len() * dims.heads * dims.head_dim, "q");
        Case { lengths: lengths.to_vec(), q, k: rows("k"), v: rows("v"), dims }
    }

    fn alone(&self, sequence: usize) -> Case {
        let width = self.dims.heads * self.dims.head_dim;
        Case {
            lengths: vec![self.lengths[sequence]],
            q: self.q[sequence * width..][..width].to_vec(),
            k: vec![self.k[sequence].clone()],
            v: vec![self.v[sequence].clone()],
            dims: self.dims,
        }
    }

    fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// One more than the longest sequence needs.
    fn max_pages(&self) -> usize {
        self.longest().div_ceil(PAGE) + 1
    }

    /// Pages in no order; entries that no length reaches name no page.
    fn table(&self) -> Vec<u32> {
        let (all, max) = (self.lengths.len() * self.max_pages(), self.max_pages());
        let step = (all / 2 + 1..).find(|step| greatest_common_divisor(*step, all) == 1).expect("a prime");
        let entry = |i: usize| if i % max < self.lengths[i / max].div_ceil(PAGE) { i * step % all } else { 1 << 30 };
        (0..all).map(|i| entry(i) as u32).collect()
    }

    /// The cache with the first tokens of each sequence, all but `but`. What is not written yet is NaN.
    fn cache(&self, rows: &[Vec<bf16>], but: usize) -> Vec<bf16> {
        let (width, table, max) = (self.dims.kv_heads * self.dims.head_dim, self.table(), self.max_pages());
        let mut cache = vec![bf16::NAN; self.lengths.len() * max * PAGE * width];
        for (b, rows) in rows.iter().enumerate() {
            for s in 0..self.lengths[b].saturating_sub(but) {
                let at = (table[b * max + s / PAGE] as usize * PAGE + s % PAGE) * width;
                cache[at..at + width].copy_from_slice(&rows[s * width..][..width]);
            }
        }
        cache
    }

    /// The bits of o and of both caches, the new tokens' rows being appended first. `longest` may be larger than need
    /// be.
    fn run(&self, gpu: &Gpu, longest: usize) -> Result<Vec<Vec<u8>>, Problem> {
        let width = self.dims.kv_heads * self.dims.head_dim;
        let table = gpu.upload(&self.table())?;
        let mut caches = [gpu.upload(&self.cache(&self.k, 1))?, gpu.upload(&self.cache(&self.v, 1))?];
        let [k_cache, v_cache] = &mut caches;
        // The kernel has no rows for sequences of no token: those get some that nobody reads.
        if self.lengths.iter().all(|length| *length > 0) {
            let last = |rows: &[Vec<bf16>]| rows.iter().flat_map(|rows| rows[rows.len() - width..].to_vec()).collect();
            let (k, v): (Vec<bf16>, Vec<bf16>) = (last(&self.k), last(&self.v));
            let positions: Vec<u32> = self.lengths.iter().map(|length| *length as u32 - 1).collect();
            let (k, v, positions) = (gpu.upload(&k)?, gpu.upload(&v)?, gpu.upload(&positions)?);
            append(k_cache, v_cache, &k, &v, &table, &positions, self.dims)?;
        } else {
            k_cache.write(&self.cache(&self.k, 0))?;
            v_cache.write(&self.cache(&self.v, 0))?;
        }
        let lengths: Vec<u32> = self.lengths.iter().map(|length| *length as u32).collect();
        let (q, lengths) = (gpu.upload(&self.q)?, gpu.upload(&lengths)?);
        let mut o = gpu.alloc(q.len())?;
        let mut parts = Parts::new(gpu, self.lengths.len(), longest, self.dims)?;
        forward(&mut o, &q, k_cache, v_cache, &table, &lengths, &mut parts, self.dims)?;
        Ok(vec![bytes(&o)?, bytes(k_cache)?, bytes(v_cache)?])
    }

    /// o by its definition, and with probabilities and o stored in bf16.
    fn exact_and_plain(&self) -> (Vec<f64>, Vec<f64>) {
        let Dims { heads, kv_heads, head_dim } = self.dims;
        let (mut exact, mut plain) = (Vec::new(), Vec::new());
        for (b, length) in self.lengths.iter().copied().enumerate() {
            let width = heads * head_dim;
            if length == 0 {
                exact.extend(vec![0.0; width]);
                plain.extend(vec![0.0; width]);
                continue;
            }
            // The definition wants a query for every token: only the last one's result is looked at.
            let mut q = vec![0.0; (length - 1) * width];
            q.extend(wide(&self.q[b * width..][..width]));
            let (k, v) = (wide(&self.k[b]), wide(&self.v[b]));
            let of = Attention { heads, kv_heads, head_size: head_dim };
            let (o, lse) = reference::forward(&q, &k, &v, of);
            exact.extend(&o[(length - 1) * width..]);
            for h in 0..heads {
                let key = |s: usize| (s * kv_heads + h / (heads / kv_heads)) * head_dim;
                let row = &q[((length - 1) * heads + h) * head_dim..][..head_dim];
                let p = (0..length).map(|s| {
                    let score: f64 = row.iter().zip(&k[key(s)..]).map(|(q, k)| q * k).sum();
                    (score / (head_dim as f64).sqrt() - lse[(length - 1) * heads + h]).exp()
                });
                let p = through_bf16(&p.collect::<Vec<f64>>());
                let o = (0..head_dim).map(|i| (0..length).map(|s| p[s] * v[key(s) + i]).sum::<f64>());
                plain.extend(through_bf16(&o.collect::<Vec<f64>>()));
            }
        }
        (exact, plain)
    }

    #[track_caller]
    fn check(&self, results: &[Vec<u8>], (exact, plain): &(Vec<f64>, Vec<f64>)) {
        let what = format!("{:?}, {:?}", self.lengths, self.dims);
        as_good_as(&values::<bf16>(&results[0]), plain, exact, 1e-5, &what);
        assert!(results[1] == bytemuck::cast_slice::<_, u8>(&self.cache(&self.k, 0)), "keys appended, {what}");
        assert!(results[2] == bytemuck::cast_slice::<_, u8>(&self.cache(&self.v, 0)), "values appended, {what}");
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Ends before, at and after the borders of pages and spans; groups of 1, 2, 7 and of more than a block takes.
fn cases() -> Vec<Case> {
    vec![
        Case::new(&[1], dims(1, 1, 64)),
        Case::new(&[1, 300, 16, 257, 17], dims(7, 1, 64)),
        Case::new(&[513, 0, 15, 0], dims(2, 2, 128)),
        Case::new(&[256, 77, 65], dims(4, 2, 128)),
        Case::new(&[77], dims(34, 2, 64)),
        // Heads below 64: whole pieces of 16 bytes, and rows that start anywhere.
        Case::new(&[1, 300, 16, 257, 17], dims(8, 1, 8)),
        Case::new(&[77, 270], dims(6, 2, 16)),
        Case::new(&[33, 5, 16], dims(2, 1, 12)),
        Case::new(&[19, 260], dims(3, 3, 2)),
        Case::new(&[40, 1], dims(4, 2, 40)),
        Case::new(&[20], dims(2, 1, 62)),
    ]
}

#[test]
fn it_follows_its_definition_with_the_same_bits_on_every_schedule() {
    for case in cases() {
        let results = same_bits_on_every_schedule(|gpu| case.run(gpu, case.longest()));
        case.check(&results, &case.exact_and_plain());
    }
}

#[test]
fn the_detector_has_nothing_to_say() {
    for case in cases() {
        detector_is_silent(|gpu| case.run(gpu, case.longest()));
    }
}

#[test]
fn a_sequence_gives_the_same_bits_whatever_else_is_in_the_batch() {
    let case = Case::new(&[300, 5, 33], dims(7, 1, 64));
    let together = case.run(&gpu(), case.longest()).expect("a run");
    let mut joined = Vec::new();
    for sequence in 0..case.lengths.len() {
        let alone = case.alone(sequence);
        joined.extend(alone.run(&gpu(), alone.longest()).expect("a run")[0].clone());
    }
    assert!(together[0] == joined);
    // Nor does it depend on how long the longest might be.
    assert!(together == case.run(&gpu(), case.max_pages() * PAGE).expect("a run"));
}

#[test]
fn large_scores_do_not_overflow() {
    let mut case = Case::new(&[90, 270], dims(2, 1, 64));
    case.q = rounded(&case.q.iter().map(|q| q.to_f32() * 300.0).collect::<Vec<f32>>());
    let results = case.run(&gpu(), case.longest()).expect("a run");
    let (exact, plain) = case.exact_and_plain();
    as_good_as(&values::<bf16>(&results[0]), &plain, &exact, 1e-3, "o");
}

#[test]
fn an_empty_batch_is_nothing() {
    let case = Case::new(&[], dims(2, 1, 64));
    assert!(case.run(&gpu(), 0).expect("a run").iter().all(Vec::is_empty));
}

#[test]
fn other_sizes_of_a_head_are_refused() {
    let problem = Case::new(&[3], dims(2, 1, 96)).run(&gpu(), 3).expect_err("a refusal");
    assert_eq!(problem.code, "cuda::head_dim");
}

#[test]
fn the_detector_finds_every_fault_of_synchronisation() {
    let case = Case::new(&[300, 70], dims(2, 1, 64));
    for fault in ["NO_END_BARRIER", "LAX_WAIT", "NO_WAIT_BARRIER", "NO_MERGE_BARRIER"] {
        let found = finds(fault, |gpu| case.run(gpu, case.longest()));
        let said = found.detector.unwrap_or_else(|| panic!("the detector does not see {fault}"));
        assert!(said.contains("attention_decode"), "{said}");
        println!("{fault}: the detector and {} of 8 schedules", found.schedules);
    }
}

#[test]
fn the_comparison_finds_a_mask_that_is_off_by_one() {
    let case = Case::new(&[20, 7], dims(2, 1, 64));
    let expected = case.exact_and_plain();
    let schedule = Schedule { fault: Some("MASK_OFF_BY_ONE"), ..Schedule::default() };
    let results = emulator::with(schedule, || case.run(&gpu(), case.longest())).expect("a run");
    assert!(catch_unwind(AssertUnwindSafe(|| case.check(&results, &expected))).is_err());
}
