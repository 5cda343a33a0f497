//! The head: against its f64 definition, tile borders, and independence of rows.

use crate::common::{bits, close, derivative, numbers, weighted, wide, with_threads};
use pipe::tensor::ops::{
    HeadGradients, HeadLora, HeadWant, head_logprob::reference, head_logprob_backward, head_logprob_forward,
};
use pipe::tensor::{Dtype, Matrix};
use proptest::prelude::*;

struct Case {
    h: Vec<f32>,
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    targets: Vec<u32>,
    dlogprob: Vec<f32>,
    channels: usize,
    rank: usize,
}

const SCALE: f32 = 0.5;

#[derive(PartialEq)]
struct Gradients {
    dh: Vec<f32>,
    da: Vec<f32>,
    db: Vec<f32>,
    dw: Vec<f32>,
}

impl Case {
    fn new(rows: usize, vocabulary: usize, channels: usize, rank: usize) -> Case {
        Case {
            h: numbers(rows * channels, "h"),
            w: numbers(vocabulary * channels, "w"),
            a: numbers(rank * channels, "a"),
            b: numbers(vocabulary * rank, "b"),
            targets: (0..rows).map(|r| (r * 7919 % vocabulary) as u32).collect(),
            dlogprob: numbers(rows, "dlogprob"),
            channels,
            rank,
        }
    }

    fn matrix(&self, dtype: Dtype) -> Matrix {
        Matrix::pack(&self.w, self.w.len() / self.channels, self.channels, dtype)
    }

    fn lora(&self) -> Option<HeadLora<'_>> {
        (self.rank > 0).then_some(HeadLora { a: &self.a, b: &self.b, rank: self.rank, scale: SCALE })
    }

    fn backward(&self, w: &Matrix, lse: &[f32]) -> Gradients {
        let mut g = Gradients {
            dh: vec![f32::NAN; self.h.len()],
            da: vec![0.0; self.a.len()],
            db: vec![0.0; self.b.len()],
            dw: vec![0.0; self.w.len()],
        };
        let wanted = HeadGradients { lora: Some((&mut g.da, &mut g.db)), weight: Some(&mut g.dw) };
        let (h, targets) = (&self.h, &self.targets);
        head_logprob_backward(&mut g.dh, wanted, &self.dlogprob, h, w, self.lora(), targets, lse);
        g
    }
}

#[test]
fn backward_is_the_derivative_of_forward() {
    let case = Case::new(3, 11, 5, 2);
    let [h, w, a, b, dlogprob] = [&case.h, &case.w, &case.a, &case.b, &case.dlogprob].map(|x| wide(x));
    let loss = |h: &[f64], w: &[f64], a: &[f64], b: &[f64]| {
        let logits = reference::logits(h, w, 5, Some((a, b, 2, 0.5)));
        weighted(&dlogprob, &reference::forward(&logits, &case.targets).0)
    };
    let g = reference::backward(&dlogprob, &h, &w, 5, Some((&a, &b, 2, 0.5)), &case.targets);
    derivative(&h, &g.dh, |h| loss(h, &w, &a, &b), "dh");
    derivative(&w, &g.dw, |w| loss(&h, w, &a, &b), "dw");
    derivative(&a, &g.da, |a| loss(&h, &w, a, &b), "da");
    derivative(&b, &g.db, |b| loss(&h, &w, &a, b), "db");
}

#[test]
fn it_follows_its_definition_on_both_sides_of_a_tile_border() {
    for (rows, vocabulary, channels, rank) in [
        (0, 50, 8, 2),
        (1, 1, 1, 0),
        (7, 33, 16, 4),
        (33, 2048, 9, 0),
        (5, 2049, 24, 3),
        (600, 300, 8, 1),
        (3, 5000, 17, 16),
    ] {
        let what = format!("{rows} rows, {vocabulary} entries");
        let case = Case::new(rows, vocabulary, channels, rank);
        let matrix = case.matrix(Dtype::F32);
        let want = HeadWant { entropy: true, top_k: 3 };
        let got = head_logprob_forward(&case.h, &matrix, case.lora(), &case.targets, want);

        let [h, w, a, b, dlogprob] = [&case.h, &case.w, &case.a, &case.b, &case.dlogprob].map(|x| wide(x));
        let lora = (rank > 0).then_some((&a[..], &b[..], rank, f64::from(SCALE)));
        let logits = reference::logits(&h, &w, channels, lora);
        let (logprob, lse, entropy) = reference::forward(&logits, &case.targets);
        close(&got.logprob, &logprob, 2e-6, &what);
        close(&got.lse, &lse, 2e-6, &what);
        close(&got.entropy, &entropy, 2e-5, &what);
        assert_eq!(got.top.len(), rows);
        for (r, top) in got.top.iter().enumerate() {
            let logits = &logits[r * vocabulary..][..vocabulary];
            let mut order: Vec<usize> = (0..vocabulary).collect();
            order.sort_by(|&i, &j| logits[j].total_cmp(&logits[i]));
            assert_eq!(top.len(), vocabulary.min(3));
            for (ranked, &id) in top.iter().zip(&order) {
                assert_eq!(ranked.id as usize, id, "{what}");
                assert!((f64::from(ranked.logprob) - (logits[id] - lse[r])).abs() <= 1e-4, "{what}");
            }
        }

        let g = case.backward(&matrix, &got.lse);
        let want = reference::backward(&dlogprob, &h, &w, channels, lora, &case.targets);
        close(&g.dh, &want.dh, 1e-5, &format!("dh, {what}"));
        close(&g.da, &want.da, 1e-5, &format!("da, {what}"));
        close(&g.db, &want.db, 1e-5, &format!("db, {what}"));
        close(&g.dw, &want.dw, 1e-5, &format!("dw, {what}"));
    }
}

#[test]
fn bf16_weights_cost_the_rounding_of_operands_and_no_more() {
    let case = Case::new(20, 2500, 64, 4);
    let matrix = case.matrix(Dtype::Bf16);
    let got = head_logprob_forward(&case.h, &matrix, case.lora(), &case.targets, HeadWant::default());
    // The law with operands rounded to bf16; LoRA stays in f32.
    let round = |x: &[f32]| x.iter().map(|x| half::bf16::from_f32(*x).to_f64()).collect::<Vec<f64>>();
    let mut logits = reference::logits(&round(&case.h), &round(&case.w), 64, None);
    let [h, a, b] = [&case.h, &case.a, &case.b].map(|x| wide(x));
    let zero = vec![0.0; case.w.len()];
    let low = reference::logits(&h, &zero, 64, Some((&a, &b, 4, f64::from(SCALE))));
    logits.iter_mut().zip(low).for_each(|(logit, low)| *logit += low);
    let (logprob, lse, _) = reference::forward(&logits, &case.targets);
    close(&got.logprob, &logprob, 2e-6, "logprob");
    close(&got.lse, &lse, 2e-6, "lse");
}

#[test]
fn an_untrained_adapter_changes_no_bit() {
    let mut case = Case::new(10, 200, 16, 8);
    case.b.fill(0.0);
    let matrix = case.matrix(Dtype::F32);
    let with = head_logprob_forward(&case.h, &matrix, case.lora(), &case.targets, HeadWant::default());
    let without = head_logprob_forward(&case.h, &matrix, None, &case.targets, HeadWant::default());
    assert_eq!(bits(&with.logprob), bits(&without.logprob));
}

#[test]
fn equal_logits_rank_by_id_and_their_entropy_is_that_of_a_uniform_choice() {
    let matrix = Matrix::pack(&vec![0.0; 3000 * 4], 3000, 4, Dtype::F32);
    let want = HeadWant { entropy: true, top_k: 4 };
    let got = head_logprob_forward(&[1.0, 2.0, 3.0, 4.0], &matrix, None, &[2999], want);
    let ids: Vec<u32> = got.top[0].iter().map(|ranked| ranked.id).collect();
    assert_eq!(ids, [0, 1, 2, 3]);
    assert!((got.entropy[0] - 3000f32.ln()).abs() <= 1e-5);
    assert!((got.logprob[0] + 3000f32.ln()).abs() <= 1e-6);
}

#[test]
fn a_logit_that_is_not_a_number_makes_its_row_so_and_no_other() {
    let mut case = Case::new(5, 100, 8, 0);
    case.h[2 * 8] = f32::NAN;
    let got = head_logprob_forward(&case.h, &case.matrix(Dtype::F32), None, &case.targets, HeadWant::default());
    for (r, logprob) in got.logprob.iter().enumerate() {
        assert_eq!(logprob.is_nan(), r == 2, "row {r}");
    }
}

#[test]
fn no_result_depends_on_the_number_of_threads() {
    let case = Case::new(530, 2300, 40, 8);
    let matrix = case.matrix(Dtype::F32);
    let run = || {
        let forward = head_logprob_forward(&case.h, &matrix, case.lora(), &case.targets, HeadWant::default());
        (bits(&forward.logprob), case.backward(&matrix, &forward.lse))
    };
    assert!(with_threads(1, run) == with_threads(3, run));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn a_row_gives_the_same_bits_alone(rows in 1usize..40, vocabulary in 1usize..3000, channels in 1usize..40, rank in 0usize..5) {
        let case = Case::new(rows, vocabulary, channels, rank);
        let matrix = case.matrix(Dtype::F32);
        let want = HeadWant { entropy: true, top_k: 2 };
        let together = head_logprob_forward(&case.h, &matrix, case.lora(), &case.targets, want);
        for r in 0..rows {
            let h = &case.h[r * channels..][..channels];
            let alone = head_logprob_forward(h, &matrix, case.lora(), &case.targets[r..=r], want);
            prop_assert_eq!(alone.logprob[0].to_bits(), together.logprob[r].to_bits());
            prop_assert_eq!(alone.lse[0].to_bits(), together.lse[r].to_bits());
            prop_assert_eq!(alone.entropy[0].to_bits(), together.entropy[r].to_bits());
            prop_assert_eq!(&alone.top[0], &together.top[r]);
        }
    }
}
