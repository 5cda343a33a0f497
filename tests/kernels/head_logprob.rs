//! The head: log-probs and gradients against their f64 definition, independence of rows, planted faults.

use crate::support::{
    Emulated, HOPPER, PORTABLE, as_good_as, bytes, detector_is_silent, finds, gpu, numbers, on, on_device,
    on_each_kind_of_device, rounded, same_bits_on_every_schedule, through_bf16, values, wide,
};
use emulator::Schedule;
use half::bf16;
use pipe::cuda::ops::head_logprob::{Gradients, Lora, backward, forward};
use pipe::cuda::{Buffer, Gpu};
use pipe::problem::Problem;
use pipe::tensor::ops::head_logprob::reference;

/// What a run leaves in its buffers, each a list of bytes.
type Bits = Result<Vec<Vec<u8>>, Problem>;

const SCALE: f32 = 0.3;
const TOP: usize = 5;

/// Rows, vocabulary, hidden and rank. From the fifth on they are for the tiles of 128 x 256 and steps of 64 of the
/// kernels by warpgroups, too: tails in every extent, part of a warpgroup's rows, one and two tiles of rows and of entries, two
/// spans of the forward pass, more steps than stages, a rank of no, one and two steps.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 0),
    (1, 2, 1, 1),
    (3, 7, 5, 2),
    (2, 129, 8, 130),
    (1, 255, 8, 0),
    (63, 130, 40, 8),
    (65, 260, 264, 24),
    (130, 257, 72, 16),
    (5, 1100, 24, 72),
];

/// What the gradients that are added to hold before.
const BEFORE: f32 = 0.25;

#[derive(Clone)]
struct Case {
    h: Vec<bf16>,
    w: Vec<bf16>,
    a: Vec<bf16>,
    b: Vec<bf16>,
    targets: Vec<u32>,
    dlogprob: Vec<f32>,
    hidden: usize,
    rank: usize,
}

/// As `Case::run` returns them.
#[derive(Debug, PartialEq)]
struct Results {
    logprob: Vec<f32>,
    lse: Vec<f32>,
    entropy: Vec<f32>,
    ids: Vec<u32>,
    top: Vec<f32>,
    dh: Vec<bf16>,
    da: Vec<f32>,
    db: Vec<f32>,
    dw: Vec<f32>,
}

impl Results {
    fn of(bits: &[Vec<u8>]) -> Results {
        let [logprob, lse, entropy, ids, top, dh, da, db, dw, little_logprob, little_lse] = bits else {
            panic!("{} results", bits.len())
        };
        assert!(little_logprob == logprob && little_lse == lse, "who asks for less gets something else");
        Results {
            logprob: values(logprob),
            lse: values(lse),
            entropy: values(entropy),
            ids: values(ids),
            top: values(top),
            dh: values(dh),
            da: values(da),
            db: values(db),
            dw: values(dw),
        }
    }
}

impl Case {
    /// Logits of a few units: some entries likely, most not.
    fn new(rows: usize, vocabulary: usize, hidden: usize, rank: usize) -> Case {
        let scaled = |len, name, scale: f32| rounded(&numbers(len, name).iter().map(|x| x * scale).collect::<Vec<_>>());
        Case {
            h: scaled(rows * hidden, "h", 1.0),
            w: scaled(vocabulary * hidden, "w", 2.0 / (hidden as f32).sqrt()),
            a: scaled(rank * hidden, "a", 1.0 / (hidden as f32).sqrt()),
            b: scaled(vocabulary * rank, "b", 2.0 / (rank.max(1) as f32).sqrt()),
            targets: (0..rows).map(|r| (r * 7919 % vocabulary) as u32).collect(),
            dlogprob: numbers(rows, "dlogprob"),
            hidden,
            rank,
        }
    }

    fn rows(&self) -> usize {
        self.targets.len()
    }

    fn vocabulary(&self) -> usize {
        self.w.len() / self.hidden
    }

    /// These rows only.
    fn only(&self, rows: std::ops::Range<usize>) -> Case {
        Case {
            h: self.h[rows.start * self.hidden..rows.end * self.hidden].to_vec(),
            targets: self.targets[rows.clone()].to_vec(),
            dlogprob: self.dlogprob[rows].to_vec(),
            ..self.clone()
        }
    }

    /// Everything there is to compute, and logprob and lse once more without the rest.
    fn run(&self, gpu: &Gpu) -> Bits {
        let [h, w, a, b] = [&self.h, &self.w, &self.a, &self.b].map(|x| gpu.upload(x));
        let (h, w, a, b) = (h?, w?, a?, b?);
        let (targets, dlogprob) = (gpu.upload(&self.targets)?, gpu.upload(&self.dlogprob)?);
        let lora = (self.rank > 0).then_some(Lora { a: &a, b: &b, rank: self.rank, scale: SCALE });
        let full = forward(&h, &w, lora, &targets, self.hidden, true, TOP)?;
        let (ids, top) = full.top.expect("asked for");
        let entropy = full.entropy.expect("asked for");
        let little = forward(&h, &w, lora, &targets, self.hidden, false, 0)?;
        assert!(little.entropy.is_none() && little.top.is_none());

        let before = |len: usize| gpu.upload(&vec![BEFORE; len]);
        let mut dh: Buffer<bf16> = gpu.alloc(self.h.len())?;
        let (mut da, mut db, mut dw) = (before(self.a.len())?, before(self.b.len())?, before(self.w.len())?);
        let gradients = Gradients { lora: lora.map(|_| (&mut da, &mut db)), weight: Some(&mut dw) };
        backward(&mut dh, gradients, &dlogprob, &h, &w, lora, &targets, &full.lse, self.hidden)?;
        Ok(vec![
            bytes(&full.logprob)?,
            bytes(&full.lse)?,
            bytes(&entropy)?,
            bytes(&ids)?,
            bytes(&top)?,
            bytes(&dh)?,
            bytes(&da)?,
            bytes(&db)?,
            bytes(&dw)?,
            bytes(&little.logprob)?,
            bytes(&little.lse)?,
        ])
    }

    fn results(&self) -> Results {
        Results::of(&self.run(&gpu()).unwrap_or_else(|problem| panic!("{problem}")))
    }
}

/// What the definition gives, with what is stored between products rounded by `store`.
struct Wanted {
    logits: Vec<f64>,
    logprob: Vec<f64>,
    lse: Vec<f64>,
    entropy: Vec<f64>,
    dh: Vec<f64>,
    da: Vec<f64>,
    db: Vec<f64>,
    dw: Vec<f64>,
}

/// c [m, n] += scale * sum over l of a(i, l) b(l, j).
fn product(
    c: &mut [f64],
    [m, n, k]: [usize; 3],
    scale: f64,
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize) -> usize,
    from: &[f64],
) {
    for i in 0..m {
        for l in 0..k {
            let factor = scale * a(i, l);
            for (j, c) in c[i * n..][..n].iter_mut().enumerate() {
                *c += factor * from[b(l) + j];
            }
        }
    }
}

/// The plain composition, each product's result (scaled, where there is a scale) in bf16. Its logits are not
/// rounded, which makes it a stricter measure than one that stores them.
fn plain(case: &Case) -> Wanted {
    let (rows, vocabulary, hidden, rank) = (case.rows(), case.vocabulary(), case.hidden, case.rank);
    let (h, w, a, b) = (wide(&case.h), wide(&case.w), wide(&case.a), wide(&case.b));
    let scale = f64::from(SCALE);
    let low: Vec<f64> = reference::logits(&h, &a, hidden, None).iter().map(|x| scale * x).collect();
    let low = through_bf16(&low);
    let mut logits = reference::logits(&h, &w, hidden, None);
    for (i, logit) in logits.iter_mut().enumerate() {
        let (row, entry) = (i / vocabulary, i % vocabulary);
        *logit += (0..rank).map(|j| low[row * rank + j] * b[entry * rank + j]).sum::<f64>();
    }
    let (logprob, lse, entropy) = reference::forward(&logits, &case.targets);
    let slope = |row: usize, entry: usize| {
        let hit = f64::from(u8::from(case.targets[row] as usize == entry));
        f64::from(case.dlogprob[row]) * (hit - (logits[row * vocabulary + entry] - lse[row]).exp())
    };
    let slopes: Vec<f64> = (0..rows * vocabulary).map(|i| slope(i / vocabulary, i % vocabulary)).collect();
    let slopes = through_bf16(&slopes);
    let across = |row: usize, entry: usize| slopes[row * vocabulary + entry];

    let mut up = vec![0.0; rows * rank];
    product(&mut up, [rows, rank, vocabulary], scale, across, |entry| entry * rank, &b);
    let up = through_bf16(&up);
    let mut dh = vec![0.0; rows * hidden];
    product(&mut dh, [rows, hidden, vocabulary], 1.0, across, |entry| entry * hidden, &w);
    product(&mut dh, [rows, hidden, rank], 1.0, |row, j| up[row * rank + j], |j| j * hidden, &a);
    let (mut da, mut db, mut dw) = (vec![0.0; a.len()], vec![0.0; b.len()], vec![0.0; w.len()]);
    product(&mut da, [rank, hidden, rows], 1.0, |j, row| up[row * rank + j], |row| row * hidden, &h);
    product(&mut db, [vocabulary, rank, rows], 1.0, |entry, row| across(row, entry), |row| row * rank, &low);
    product(&mut dw, [vocabulary, hidden, rows], 1.0, |entry, row| across(row, entry), |row| row * hidden, &h);
    Wanted { logits, logprob, lse, entropy, dh: through_bf16(&dh), da, db, dw }
}

fn exact(case: &Case) -> Wanted {
    let (h, w, a, b) = (wide(&case.h), wide(&case.w), wide(&case.a), wide(&case.b));
    let lora = (case.rank > 0).then_some((&a[..], &b[..], case.rank, f64::from(SCALE)));
    let logits = reference::logits(&h, &w, case.hidden, lora);
    let (logprob, lse, entropy) = reference::forward(&logits, &case.targets);
    let g = reference::backward(&wide(&case.dlogprob), &h, &w, case.hidden, lora, &case.targets);
    Wanted { logits, logprob, lse, entropy, dh: g.dh, da: g.da, db: g.db, dw: g.dw }
}

#[track_caller]
fn follows_its_definition(case: &Case, got: &Results) {
    is_as_good_as(&plain(case), &exact(case), case, got);
}

#[track_caller]
fn is_as_good_as(plain: &Wanted, exact: &Wanted, case: &Case, got: &Results) {
    let (rows, vocabulary) = (case.rows(), case.vocabulary());
    let what = |name: &str| format!("{name} of {rows} rows, {vocabulary} x {}, rank {}", case.hidden, case.rank);
    as_good_as(&got.logprob, &plain.logprob, &exact.logprob, 1e-6, &what("logprob"));
    as_good_as(&got.lse, &plain.lse, &exact.lse, 1e-6, &what("lse"));
    as_good_as(&got.entropy, &plain.entropy, &exact.entropy, 2e-6, &what("entropy"));
    as_good_as(&got.dh, &plain.dh, &exact.dh, 1e-6, &what("dh"));
    let added = |got: &[f32]| got.iter().map(|x| x - BEFORE).collect::<Vec<f32>>();
    as_good_as(&added(&got.da), &plain.da, &exact.da, 2e-6, &what("da"));
    as_good_as(&added(&got.db), &plain.db, &exact.db, 2e-6, &what("db"));
    as_good_as(&added(&got.dw), &plain.dw, &exact.dw, 2e-6, &what("dw"));

    for row in 0..rows {
        let (ids, top) = (&got.ids[row * TOP..][..TOP], &got.top[row * TOP..][..TOP]);
        let logits = &plain.logits[row * vocabulary..][..vocabulary];
        for (place, (&id, &logprob)) in ids.iter().zip(top).enumerate() {
            if place >= vocabulary {
                assert!(id == u32::MAX && logprob == f32::NEG_INFINITY, "{}", what("a place too many"));
                continue;
            }
            // A sum for `low` that is almost a tie may be rounded the other way: the logits differ by that.
            let (logit, near) = (logits[id as usize], if case.rank > 0 { 0.03 } else { 1e-5 });
            let likelier = logits.iter().filter(|&&other| other > logit + near).count();
            let certainly_less = logits.iter().filter(|&&other| other < logit - near).count();
            assert!(likelier <= place && vocabulary - certainly_less > place, "{}", what("order of the top"));
            assert!((f64::from(logprob) - (logit - plain.lse[row])).abs() <= near, "{}", what("top"));
            assert!(!ids[..place].contains(&id), "{}", what("an entry twice"));
        }
        assert!(top.is_sorted_by(|a, b| a >= b), "{}", what("top"));
    }
}

#[test]
fn it_follows_its_definition_on_every_schedule() {
    for (rows, vocabulary, hidden, rank) in SHAPES {
        let case = Case::new(rows, vocabulary, hidden, rank);
        let (plain, exact) = (plain(&case), exact(&case));
        let follows = || {
            let bits = same_bits_on_every_schedule(|gpu| case.run(gpu));
            is_as_good_as(&plain, &exact, &case, &Results::of(&bits));
        };
        // The kernels by warpgroups take no others.
        if hidden % 8 == 0 && rank % 8 == 0 { on_each_kind_of_device(follows) } else { follows() }
    }
}

#[test]
fn the_detector_has_nothing_to_report_of_the_kernels_by_warpgroups() {
    for (rows, vocabulary, hidden, rank) in [(1, 255, 8, 0), (65, 270, 328, 24), (3, 1100, 72, 8)] {
        let case = Case::new(rows, vocabulary, hidden, rank);
        on(HOPPER, || detector_is_silent(|gpu| case.run(gpu)));
    }
}

#[test]
fn the_detector_has_nothing_to_report() {
    for (rows, vocabulary, hidden, rank) in [(1, 1, 1, 1), (3, 131, 5, 0), (129, 130, 33, 9), (6, 1100, 104, 8)] {
        let case = Case::new(rows, vocabulary, hidden, rank);
        detector_is_silent(|gpu| case.run(gpu));
    }
}

#[test]
fn the_vocabulary_may_have_several_spans_and_their_number_at_once_changes_no_bit() {
    on(PORTABLE, || several_spans(2));
    on(HOPPER, || several_spans(0));
}

fn several_spans(rank: usize) {
    // So many rows are made one span at a time, a few of them two.
    let many = Case::new(1025, 8192 + 13, 8, rank);
    let few = many.only(0..3);
    let got = few.results();
    follows_its_definition(&few, &got);

    let gpu = gpu();
    let upload = |x: &[bf16]| gpu.upload(x).unwrap();
    let (h, w, a, b) = (upload(&many.h), upload(&many.w), upload(&many.a), upload(&many.b));
    let lora = (rank > 0).then_some(Lora { a: &a, b: &b, rank, scale: SCALE });
    let (targets, dlogprob) = (gpu.upload(&many.targets).unwrap(), gpu.upload(&many.dlogprob).unwrap());
    // Nobody asks for the other rows' results, so that any lse will do.
    let lse = [&got.lse[..], &[f32::INFINITY; 1022]].concat();
    let lse = gpu.upload(&lse).unwrap();
    let mut dh = gpu.alloc(many.h.len()).unwrap();
    backward(&mut dh, Gradients::default(), &dlogprob, &h, &w, lora, &targets, &lse, many.hidden).unwrap();
    assert!(dh.download().unwrap()[..got.dh.len()] == got.dh);
}

#[test]
fn more_rows_than_fit_at_once_are_made_in_turn() {
    let case = Case::new(2050, 24, 8, 2);
    follows_its_definition(&case, &case.results());
}

#[test]
fn a_row_gives_the_same_bits_alone_and_among_others() {
    on(PORTABLE, || alone_and_among_others(17, 3));
    on(HOPPER, || alone_and_among_others(24, 8));
}

fn alone_and_among_others(hidden: usize, rank: usize) {
    let case = Case::new(131, 1030, hidden, rank);
    let together = case.results();
    for rows in [0..1, 77..80, 127..129, 130..131] {
        let alone = case.only(rows.clone()).results();
        assert_eq!(alone.logprob, together.logprob[rows.clone()]);
        assert_eq!(alone.lse, together.lse[rows.clone()]);
        assert_eq!(alone.entropy, together.entropy[rows.clone()]);
        assert_eq!(alone.ids, together.ids[rows.start * TOP..rows.end * TOP]);
        assert_eq!(alone.top, together.top[rows.start * TOP..rows.end * TOP]);
        assert!(alone.dh == together.dh[rows.start * case.hidden..rows.end * case.hidden]);
    }
}

#[test]
fn equal_logits_rank_by_id_and_their_entropy_is_that_of_a_uniform_choice() {
    on_each_kind_of_device(equal_logits);
}

fn equal_logits() {
    let mut case = Case::new(2, 3000, 8, 0);
    case.w.fill(bf16::ZERO);
    let got = case.results();
    assert_eq!(got.ids, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
    let uniform = 3000f32.ln();
    assert!(got.entropy.iter().all(|x| (x - uniform).abs() <= 2e-6), "{:?}", got.entropy);
    assert!(got.logprob.iter().chain(&got.top).all(|x| (x + uniform).abs() <= 2e-6), "{:?}", got.logprob);
}

#[test]
fn the_longest_list_is_in_order_across_spans() {
    on_each_kind_of_device(the_longest_list);
}

fn the_longest_list() {
    let case = Case::new(2, 2500, 8, 0);
    let gpu = gpu();
    let [h, w] = [&case.h, &case.w].map(|x| gpu.upload(x).unwrap());
    let targets = gpu.upload(&case.targets).unwrap();
    let (ids, _) = forward(&h, &w, None, &targets, 8, false, 32).unwrap().top.unwrap();
    let logits = reference::logits(&wide(&case.h), &wide(&case.w), 8, None);
    for (ids, logits) in ids.download().unwrap().chunks(32).zip(logits.chunks(2500)) {
        let mut order: Vec<u32> = (0..2500).collect();
        order.sort_by(|&i, &j| logits[j as usize].total_cmp(&logits[i as usize]));
        assert_eq!(ids, &order[..32]);
    }
}

#[test]
fn a_row_that_is_not_a_number_spoils_no_other() {
    on(PORTABLE, || not_a_number(4));
    on(HOPPER, || not_a_number(8));
}

fn not_a_number(rank: usize) {
    let sound = Case::new(5, 140, 16, rank);
    let want = sound.results();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = sound.clone();
        case.h[2 * 16] = bf16::from_f32(bad);
        let got = case.results();
        for row in 0..5 {
            let dh = row * 16..row * 16 + 16;
            if row == 2 {
                assert!(got.logprob[row].is_nan() && got.dh[dh].iter().all(|x| x.is_nan()), "{bad}");
            } else {
                assert_eq!((got.logprob[row], got.lse[row]), (want.logprob[row], want.lse[row]), "{bad}");
                assert!(got.dh[dh.clone()] == want.dh[dh], "{bad}, row {row}");
                assert_eq!(got.ids[row * TOP..][..TOP], want.ids[row * TOP..][..TOP], "{bad}");
            }
        }
    }
}

#[test]
fn huge_logits_and_logits_of_minus_infinity_are_met() {
    on(PORTABLE, || huge_and_infinite(1));
    on(HOPPER, || huge_and_infinite(8));
}

/// Of `hidden` elements all but the first are 0.
fn huge_and_infinite(hidden: usize) {
    let only_first = |case: &mut Case, h: f32, w: &dyn Fn(usize) -> f32| {
        case.h.fill(bf16::ZERO);
        case.w.fill(bf16::ZERO);
        case.h.iter_mut().step_by(hidden).for_each(|x| *x = bf16::from_f32(h));
        case.w.iter_mut().step_by(hidden).enumerate().for_each(|(entry, x)| *x = bf16::from_f32(w(entry)));
    };
    // Logits of +-1e36 and less: the largest wins, and nothing becomes infinite on the way.
    let mut case = Case::new(1, 1100, hidden, 0);
    only_first(&mut case, 1e18, &|entry| if entry == 1060 { 1e18 } else { -1e18 });
    case.targets[0] = 1060;
    let got = case.results();
    let largest = (case.h[0].to_f64() * case.w[1060 * hidden].to_f64()) as f32;
    assert_eq!((got.lse[0], got.logprob[0], got.entropy[0], got.ids[0]), (largest, 0.0, 0.0, 1060));
    assert!(got.dh[0].is_finite() && got.dw.iter().all(|x| *x == BEFORE));

    // -1e30 * 1e30 is minus infinity in f32: such an entry has no weight, be it a whole span of them.
    let mut case = Case::new(2, 2100, hidden, 0);
    only_first(&mut case, -1e30, &|entry| if entry < 1030 { 1e30 } else { 0.0 });
    case.targets = vec![3, 2000];
    let got = case.results();
    let uniform = (2100.0f32 - 1030.0).ln();
    assert_eq!(got.logprob[0], f32::NEG_INFINITY);
    assert!((got.logprob[1] + uniform).abs() <= 2e-6 && (got.lse[0] - uniform).abs() <= 2e-6, "{:?}", got.logprob);
    assert!(got.entropy.iter().all(|x| (x - uniform).abs() <= 2e-6), "{:?}", got.entropy);
    assert_eq!(got.ids[..TOP], [1030, 1031, 1032, 1033, 1034]);
}

#[test]
fn a_target_outside_the_vocabulary_has_no_number_and_spoils_no_other() {
    on_each_kind_of_device(a_target_outside);
}

fn a_target_outside() {
    let mut case = Case::new(3, 50, 8, 0);
    let want = case.results();
    case.targets[1] = 50;
    let got = case.results();
    assert!(got.logprob[1].is_nan());
    assert_eq!([got.logprob[0], got.logprob[2]], [want.logprob[0], want.logprob[2]]);
    assert_eq!(got.lse, want.lse);
}

#[test]
fn no_rows_are_no_work() {
    on(PORTABLE, || no_rows(2));
    on(HOPPER, || no_rows(8));
}

fn no_rows(rank: usize) {
    let case = Case::new(0, 50, 8, rank);
    let got = case.results();
    assert!(got.logprob.is_empty() && got.da.iter().chain(&got.db).chain(&got.dw).all(|x| *x == BEFORE));
}

#[test]
fn a_missing_barrier_is_found() {
    let case = Case::new(3, 150, 72, 4);
    let found = finds("NO_BARRIER", |gpu| case.run(gpu));
    assert!(found.detector.is_some(), "{found:?}");
    let found = finds("LAX_WAIT", |gpu| case.run(gpu));
    assert!(found.detector.is_some(), "{found:?}");
    let found = finds("NO_TOP_BARRIER", |gpu| case.run(gpu));
    assert!(found.detector.is_some(), "{found:?}");
}

#[test]
fn memory_taken_for_sums_while_a_warp_still_multiplies_is_found() {
    // One stage in all, so that the sums go where the operands are.
    let case = Case::new(3, 100, 24, 0);
    let run = |gpu: &Gpu| {
        let [h, w] = [&case.h, &case.w].map(|x| gpu.upload(x));
        let result = forward(&h?, &w?, None, &gpu.upload(&case.targets)?, case.hidden, false, 0)?;
        Ok(vec![bytes(&result.logprob)?])
    };
    let found = finds("NO_REUSE_BARRIER", run);
    assert!(found.detector.is_some(), "{found:?}");
}

#[test]
fn a_missing_bound_is_found() {
    // Rows of W beyond the vocabulary are read; logits of entries that are not there are counted.
    let case = Case::new(3, 150, 72, 4);
    let found = finds("NO_ROW_BOUND", |gpu| case.run(gpu));
    assert!(found.detector.is_some_and(|said| said.contains("head_logprob.cu")), "the place is named");
    let found = finds("NO_MASK", |gpu| case.run(gpu));
    assert!(found.detector.is_none() && found.schedules > 0, "the numbers show it: {found:?}");
}

#[test]
fn parts_that_are_added_without_rescaling_are_found() {
    let case = Case::new(3, 150, 72, 4);
    let found = finds("NO_RESCALE", |gpu| case.run(gpu));
    assert!(found.detector.is_none() && found.schedules > 0, "the numbers show it: {found:?}");
}

/// logprob, lse and, with `top`, lists.
fn forward_alone(case: &Case, gpu: &Gpu, top: usize) -> Bits {
    let [h, w, a, b] = [&case.h, &case.w, &case.a, &case.b].map(|x| gpu.upload(x));
    let (h, w, a, b) = (h?, w?, a?, b?);
    let lora = (case.rank > 0).then_some(Lora { a: &a, b: &b, rank: case.rank, scale: SCALE });
    let result = forward(&h, &w, lora, &gpu.upload(&case.targets)?, case.hidden, false, top)?;
    let mut all = vec![bytes(&result.logprob)?, bytes(&result.lse)?];
    if let Some((ids, logprobs)) = &result.top {
        all.extend([bytes(ids)?, bytes(logprobs)?]);
    }
    Ok(all)
}

/// dh.
fn backward_alone(case: &Case, gpu: &Gpu) -> Bits {
    let [h, w] = [&case.h, &case.w].map(|x| gpu.upload(x));
    let (h, w) = (h?, w?);
    let (targets, dlogprob) = (gpu.upload(&case.targets)?, gpu.upload(&case.dlogprob)?);
    let lse = gpu.upload(&vec![3.0; case.rows()])?;
    let mut dh = gpu.alloc(case.h.len())?;
    backward(&mut dh, Gradients::default(), &dlogprob, &h, &w, None, &targets, &lse, case.hidden)?;
    Ok(vec![bytes(&dh)?])
}

/// By warpgroups, whatever the number of rows; rows whose tensor copies cannot begin are left to the other kernels.
#[test]
fn the_kernels_by_warpgroups_run_where_they_can() {
    if on_device() {
        return;
    }
    let watched = Schedule { detector: true, fault: Some("FULL"), ..Schedule::default() };
    let shows_a_fault =
        |kind: Emulated, run: &dyn Fn(&Gpu) -> Bits| on(kind, || emulator::with(watched, || run(&gpu())).is_err());
    for (kind, shape, by_warpgroups) in [
        (HOPPER, (1, 20, 72, 8), true),
        (HOPPER, (65, 9, 8, 0), true),
        (PORTABLE, (65, 20, 72, 8), false),
        (HOPPER, (65, 20, 76, 8), false),
        (HOPPER, (65, 20, 72, 4), false),
    ] {
        let case = Case::new(shape.0, shape.1, shape.2, shape.3);
        for top in [0, 2] {
            let run = |gpu: &Gpu| forward_alone(&case, gpu, top);
            assert_eq!(shows_a_fault(kind, &run), by_warpgroups, "{shape:?}, {top}");
        }
        if shape.3 == 0 || !shape.2.is_multiple_of(8) {
            assert_eq!(shows_a_fault(kind, &|gpu| backward_alone(&case, gpu)), by_warpgroups, "back, {shape:?}");
        }
    }
}

#[test]
fn planted_faults_of_the_kernels_by_warpgroups_are_found() {
    // More steps than stages, two tiles.
    let case = Case::new(65, 270, 328, 0);
    let runs: [&dyn Fn(&Gpu) -> Bits; 3] =
        [&|gpu| forward_alone(&case, gpu, 0), &|gpu| forward_alone(&case, gpu, 3), &|gpu| backward_alone(&case, gpu)];
    for (i, run) in runs.iter().enumerate() {
        for fault in ["FULL", "EMPTY", "RELEASE"] {
            let found = on(HOPPER, || finds(fault, run));
            assert!(found.detector.is_some() && found.schedules > 0, "{fault} in run {i}: {found:?}");
        }
    }
    let found = on(HOPPER, || finds("NO_TOP_BARRIER", runs[1]));
    assert!(found.detector.is_some(), "{found:?}");
    for (fault, run) in [("NO_MASK", runs[0]), ("NO_RESCALE", runs[0])] {
        let found = on(HOPPER, || finds(fault, run));
        assert!(found.detector.is_none() && found.schedules > 0, "the numbers show it: {found:?}");
    }
}
