//! The next token against `model::Sampling`.
//!
//! Weights have the bits of the CPU's; their sums are integers where the CPU's are f64, which differ by some 1e-8 of
//! the sum at most. So ids are compared where the draw is at least 1e-7 away from a boundary, and probabilities
//! within 1e-6: a different set of candidates would show there.

use crate::support::{
    PORTABLE, bytes, detector_is_silent, finds, gpu, numbers, rounded, same_bits_on_every_schedule, values,
};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::sampling::{Drawn, Logits, Rule, Seen, next};
use pipe::generation::Sampling;
use pipe::problem::Problem;
use pipe::random::Stream;

/// Logits `[rows, V]`, and what was seen before.
struct Case {
    columns: usize,
    logits: Vec<f32>,
    seen: Vec<Vec<u32>>,
    streams: Vec<u64>,
    counters: Vec<u64>,
    /// Whether the device gets the logits as bf16, which they then are.
    narrow: bool,
}

impl Case {
    /// Rows of normal logits; contexts of different lengths, with ids that occur twice and ids beyond the end.
    fn new(rows: usize, columns: usize) -> Case {
        let logits = numbers(rows * columns, &format!("logits {columns}")).iter().map(|x| 2.0 * x).collect();
        let random = Stream::named(5, &["seen"]);
        let id = |row: u64, i: u64| (random.uniform(row * 1000 + i) * 1.1 * columns as f64) as u32;
        let seen = (0..rows as u64).map(|row| (0..7 * row).map(|i| id(row, i / 2)).collect()).collect();
        let streams = (0..rows as u64).map(|row| row.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
        let counters = (0..rows as u64).map(|row| 3 + row * ((1 << 32) + 1)).collect();
        Case { columns, logits, seen, streams, counters, narrow: false }
    }

    /// The same with few different values, so that many are equal.
    fn coarse(mut self) -> Case {
        self.logits.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0);
        self
    }

    fn narrow(mut self) -> Case {
        self.logits.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        self.narrow = true;
        self
    }

    fn run(&self, gpu: &Gpu, sampling: &Sampling) -> Result<Vec<Vec<u8>>, Problem> {
        self.run_each(gpu, &vec![sampling.clone(); self.seen.len()])
    }

    /// A sampling for each row.
    fn run_each(&self, gpu: &Gpu, samplings: &[Sampling]) -> Result<Vec<Vec<u8>>, Problem> {
        let rows = self.seen.len();
        // In the longest row there is no room for what is drawn.
        let widest = self.seen.iter().map(Vec::len).max().unwrap_or(0);
        let mut ids = vec![u32::MAX; rows * widest];
        for (row, seen) in self.seen.iter().enumerate() {
            ids[row * widest..][..seen.len()].copy_from_slice(seen);
        }
        let lengths: Vec<u32> = self.seen.iter().map(|seen| seen.len() as u32).collect();
        let (mut on_device, lengths) = (gpu.upload(&ids)?, gpu.upload(&lengths)?);
        let (wide, narrow) = (gpu.upload(&self.logits)?, gpu.upload(&rounded(&self.logits))?);
        let logits = if self.narrow { Logits::Bf16(&narrow) } else { Logits::F32(&wide) };
        let rule = |(row, sampling): (usize, &Sampling)| Rule {
            seed: sampling.seed,
            stream: self.streams[row],
            counter: self.counters[row],
            top_p: sampling.top_p,
            temperature: sampling.temperature as f32,
            repetition_penalty: sampling.repetition_penalty as f32,
            top_k: sampling.top_k as u32,
            id_limit: sampling.id_limit as u32,
        };
        let rules = gpu.upload(&samplings.iter().enumerate().map(rule).collect::<Vec<Rule>>())?;
        let mut drawn = Drawn::new(gpu, rows)?;
        let mut scratch = gpu.alloc(rows * self.columns)?;
        let seen = Seen { ids: &mut on_device, lengths: &lengths };
        next(&mut drawn, &mut scratch, logits, seen, &rules)?;
        for (row, (seen, drawn)) in self.seen.iter().zip(drawn.ids.download()?).enumerate() {
            if seen.len() < widest && samplings[row].repetition_penalty != 1.0 {
                ids[row * widest + seen.len()] = drawn;
            }
        }
        assert_eq!(on_device.download()?, ids, "an id is seen once it is drawn");
        assert!(wide.download()?.iter().zip(&self.logits).all(|(a, b)| a.to_bits() == b.to_bits()));
        Ok(vec![bytes(&drawn.ids)?, bytes(&drawn.log_probs)?, bytes(&drawn.probabilities)?])
    }

    /// Compares what [`Case::run`] gave with the CPU.
    #[track_caller]
    fn check(&self, got: &[Vec<u8>], sampling: &Sampling) {
        self.check_each(got, &vec![sampling.clone(); self.seen.len()]);
    }

    #[track_caller]
    fn check_each(&self, got: &[Vec<u8>], samplings: &[Sampling]) {
        let (ids, log_probs, probabilities) = (values::<u32>(&got[0]), values::<f32>(&got[1]), values::<f32>(&got[2]));
        let mut clear = 0;
        for ((row, logits), sampling) in self.logits.chunks(self.columns).enumerate().zip(samplings) {
            let what = format!("row {row} of {} columns, {sampling:?}", self.columns);
            let random = Stream::new(sampling.seed, self.streams[row]);
            let counter = self.counters[row];
            let id = sampling.next(&mut logits.to_vec(), &self.seen[row], &random, counter);
            let (mut probability, mut margin) = (1.0, 1.0f64);
            if sampling.temperature > 0.0 {
                let candidates = sampling.candidates(&mut logits.to_vec(), &self.seen[row]);
                let (mut sum, u) = (0.0, random.uniform(counter));
                for (candidate, p) in candidates {
                    sum += p;
                    // The end of the last is 1, which no draw reaches.
                    if sum < 1.0 - 1e-7 {
                        margin = margin.min((sum - u).abs());
                    }
                    if candidate == ids[row] {
                        probability = p;
                    }
                }
            }
            if margin > 1e-7 {
                assert_eq!(ids[row], id, "{what}");
                assert!((f64::from(probabilities[row]) - probability).abs() <= 1e-6, "{what}: {probability}");
                clear += 1;
            }
            let exact = |id: u32| {
                let max = logits.iter().fold(f64::NEG_INFINITY, |max, x| max.max(f64::from(*x)));
                let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
                f64::from(logits[id as usize]) - max - sum.ln()
            };
            assert!((f64::from(log_probs[row]) - exact(ids[row])).abs() <= 2e-6, "{what}: {}", log_probs[row]);
        }
        assert!(2 * clear > ids.len(), "only {clear} of {} draws are clear", ids.len());
    }
}

/// Everything at once.
fn all() -> Sampling {
    Sampling {
        temperature: 0.8,
        top_p: 0.9,
        top_k: 40,
        repetition_penalty: 1.3,
        seed: 0x1234_5678_9ABC_DEF0,
        ..Sampling::default()
    }
}

fn rules() -> Vec<Sampling> {
    let drawn = Sampling { temperature: 1.0, seed: 11, ..Sampling::default() };
    vec![
        Sampling::default(),
        Sampling { repetition_penalty: 1.7, ..Sampling::default() },
        drawn.clone(),
        Sampling { top_k: 1, ..drawn.clone() },
        Sampling { top_k: 7, temperature: 2.5, ..drawn.clone() },
        Sampling { top_p: 0.5, ..drawn.clone() },
        Sampling { top_p: 0.0, ..drawn.clone() },
        Sampling { top_p: 0.999, repetition_penalty: 0.8, ..drawn },
        all(),
    ]
}

#[track_caller]
fn check_on_the_device(case: &Case, sampling: &Sampling) {
    let got = case.run(&gpu(), sampling).unwrap_or_else(|problem| panic!("{sampling:?}: {problem}"));
    case.check(&got, sampling);
}

#[test]
fn ids_are_those_of_the_cpu() {
    for columns in [1, 2, 31, 513, 1003] {
        for sampling in rules() {
            check_on_the_device(&Case::new(2, columns), &sampling);
        }
    }
}

#[test]
fn every_schedule_gives_the_same_bits() {
    for (case, sampling) in [(Case::new(3, 700), all()), (Case::new(4, 1501), Sampling::default())] {
        let got = same_bits_on_every_schedule(|gpu| case.run(gpu, &sampling));
        case.check(&got, &sampling);
    }
}

#[test]
fn many_draws_from_one_row_are_those_of_the_cpu() {
    // The same logits and context for all, other numbers of the stream.
    let mut case = Case::new(24, 40);
    for row in 1..24 {
        let (first, rest) = case.logits.split_at_mut(row * 40);
        rest[..40].copy_from_slice(&first[..40]);
    }
    case.seen = vec![vec![3, 8, 3, 39]; 24];
    check_on_the_device(&case, &Sampling { temperature: 1.5, repetition_penalty: 1.2, ..Sampling::default() });
    check_on_the_device(&case, &Sampling { temperature: 1.5, top_p: 0.8, ..Sampling::default() });
}

#[test]
fn equal_logits_stay_or_go_as_on_the_cpu() {
    for sampling in [Sampling { top_k: 5, ..all() }, Sampling { top_p: 0.6, top_k: 0, ..all() }, Sampling::default()] {
        check_on_the_device(&Case::new(4, 900).coarse(), &sampling);
    }
    // All equal: a nucleus is the lowest ids, and spans the runs of several warps.
    let mut flat = Case::new(4, 1000);
    flat.logits.fill(-0.75);
    for top_p in [0.0004, 0.2995, 0.9995] {
        check_on_the_device(&flat, &Sampling { temperature: 1.0, top_p, ..Sampling::default() });
    }
    check_on_the_device(&flat, &Sampling::default());
    // Zeros of both signs are equal.
    let mut zeros = Case::new(2, 3);
    zeros.logits = vec![-0.0, 0.0, -1.0, -1.0, -0.0, 0.0];
    check_on_the_device(&zeros, &Sampling::default());
    check_on_the_device(&zeros, &Sampling { temperature: 1.0, top_k: 1, ..Sampling::default() });
}

#[test]
fn ids_from_the_limit_on_are_not_drawn_but_count_in_the_log_prob() {
    // One device that keeps its blocks: what the scratch memory holds of earlier draws is no candidate.
    let (gpu, case) = (Gpu::new(Box::new(PORTABLE)), Case::new(3, 600));
    for id_limit in [10_000, 600, 599, 40, 1] {
        for sampling in [Sampling::default(), all(), Sampling { top_k: 0, ..all() }] {
            let sampling = Sampling { id_limit, ..sampling };
            let got = case.run(&gpu, &sampling).unwrap_or_else(|problem| panic!("{sampling:?}: {problem}"));
            case.check(&got, &sampling);
        }
    }
}

#[test]
fn bf16_logits_are_their_values() {
    for sampling in [Sampling::default(), Sampling { top_p: 0.7, top_k: 0, ..all() }] {
        check_on_the_device(&Case::new(3, 777).narrow(), &sampling);
    }
}

/// And the rules of some say what the others must not do.
#[test]
fn rows_have_rules_of_their_own_and_do_not_depend_on_their_neighbours() {
    let mut samplings = rules();
    samplings.extend([
        all(),
        Sampling { id_limit: 70, top_k: 0, ..all() },
        Sampling { id_limit: 9, ..Sampling::default() },
    ]);
    let rows = samplings.len();
    let case = Case::new(rows, 250);
    let together = case.run_each(&gpu(), &samplings).unwrap_or_else(|problem| panic!("{problem}"));
    case.check_each(&together, &samplings);
    for (row, sampling) in samplings.iter().enumerate() {
        let alone = Case {
            columns: 250,
            logits: case.logits[row * 250..][..250].to_vec(),
            seen: vec![case.seen[row].clone()],
            streams: vec![case.streams[row]],
            counters: vec![case.counters[row]],
            narrow: false,
        };
        let alone = alone.run(&gpu(), sampling).unwrap_or_else(|problem| panic!("{problem}"));
        for (alone, together) in alone.iter().zip(&together) {
            assert!(*alone == together[4 * row..][..4], "row {row}");
        }
    }
}

#[test]
fn what_is_not_finite_shows_in_the_log_prob() {
    let mut case = Case::new(4, 100);
    case.logits[7] = f32::NAN;
    case.logits[100 + 50] = f32::INFINITY;
    case.logits[200..300].fill(f32::NEG_INFINITY);
    case.logits[300..350].fill(f32::NEG_INFINITY);
    for sampling in [Sampling::default(), all()] {
        let got = case.run(&gpu(), &sampling).unwrap_or_else(|problem| panic!("{problem}"));
        let (ids, log_probs) = (values::<u32>(&got[0]), values::<f32>(&got[1]));
        assert!(ids.iter().all(|id| *id < 100), "{ids:?}");
        assert!(log_probs[..3].iter().all(|x| x.is_nan()), "{log_probs:?}");
        // Some ids that cannot follow are nothing wrong.
        assert!(ids[3] >= 50 && log_probs[3].is_finite(), "{ids:?}, {log_probs:?}");
    }
}

#[test]
fn no_access_is_out_of_place() {
    detector_is_silent(|gpu| Case::new(2, 300).run(gpu, &Sampling { id_limit: 299, ..all() }));
    detector_is_silent(|gpu| Case::new(2, 300).narrow().run(gpu, &Sampling::default()));
}

#[test]
fn planted_faults_are_found() {
    // No top-k or top-p, whose many reductions would only take longer.
    let (case, sampling) = (Case::new(2, 300), Sampling { top_k: 0, top_p: 1.0, ..all() });
    // In the detector's words; marks are set by atomics, which are no races to it.
    for (fault, said) in [
        ("SAMPLING_NO_BARRIER", Some("that nobody has written")),
        ("SAMPLING_NO_BARRIER_BEFORE", Some("without a barrier after another thread's read")),
        ("SAMPLING_NO_BARRIER_BEFORE_DRAW", Some("without a barrier after another thread's write")),
        ("SAMPLING_NO_BARRIER_AFTER_MARKS", None),
        ("SAMPLING_ONE_TOO_MANY", Some("that nobody has written")),
    ] {
        let found = finds(fault, |gpu| case.run(gpu, &sampling));
        let expected = |said| found.detector.as_ref().is_some_and(|words| words.contains(said));
        assert!(said.is_none_or(expected), "{fault}: {found:?}");
    }
}
