//! Attention: against its f64 definition, and the equalities that packing and decoding rely on.

use crate::common::{bits, close, derivative, numbers, weighted, wide, with_threads};
use pipe::tensor::ops::{
    Attention, PAGE, attention::reference, attention_backward, attention_decode, attention_forward,
};
use proptest::prelude::*;

const fn dims(heads: usize, kv_heads: usize, head_size: usize) -> Attention {
    Attention { heads, kv_heads, head_size }
}

struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
    dims: Attention,
}

#[derive(PartialEq)]
struct Results {
    o: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Case {
    fn new(tokens: usize, dims: Attention) -> Case {
        let (queries, keys) = (tokens * dims.heads * dims.head_size, tokens * dims.kv_heads * dims.head_size);
        Case {
            q: numbers(queries, "q"),
            k: numbers(keys, "k"),
            v: numbers(keys, "v"),
            d_o: numbers(queries, "do"),
            dims,
        }
    }

    /// The tokens of one sequence.
    fn part(&self, from: usize, to: usize) -> Case {
        let (query, key) = (self.dims.heads * self.dims.head_size, self.dims.kv_heads * self.dims.head_size);
        let cut = |x: &[f32], width: usize| x[from * width..to * width].to_vec();
        Case {
            q: cut(&self.q, query),
            k: cut(&self.k, key),
            v: cut(&self.v, key),
            d_o: cut(&self.d_o, query),
            dims: self.dims,
        }
    }

    fn run(&self, cu_seqlens: &[usize]) -> Results {
        let rows = self.q.len() / self.dims.head_size;
        let mut r = Results {
            o: vec![f32::NAN; self.q.len()],
            lse: vec![f32::NAN; rows],
            dq: vec![f32::NAN; self.q.len()],
            dk: vec![f32::NAN; self.k.len()],
            dv: vec![f32::NAN; self.v.len()],
        };
        let Case { q, k, v, d_o, dims } = self;
        attention_forward(&mut r.o, &mut r.lse, q, k, v, cu_seqlens, *dims);
        attention_backward(&mut r.dq, &mut r.dk, &mut r.dv, d_o, q, k, v, &r.o, &r.lse, cu_seqlens, *dims);
        r
    }
}

#[test]
fn backward_is_the_derivative_of_forward() {
    let Case { q, k, v, d_o, dims } = Case::new(5, dims(4, 2, 3));
    let [q, k, v, d_o] = [q, k, v, d_o].map(|x| wide(&x));
    let (dq, dk, dv) = reference::backward(&d_o, &q, &k, &v, dims);
    derivative(&q, &dq, |q| weighted(&d_o, &reference::forward(q, &k, &v, dims).0), "dq");
    derivative(&k, &dk, |k| weighted(&d_o, &reference::forward(&q, k, &v, dims).0), "dk");
    derivative(&v, &dv, |v| weighted(&d_o, &reference::forward(&q, &k, v, dims).0), "dv");
}

#[test]
fn it_follows_its_definition_across_block_borders() {
    for tokens in [1, 7, 33, 64, 65, 130, 200] {
        for dims in [dims(7, 1, 8), dims(2, 2, 64), dims(4, 2, 20), dims(1, 1, 1)] {
            let case = Case::new(tokens, dims);
            let got = case.run(&[0, tokens]);
            let [q, k, v, d_o] = [&case.q, &case.k, &case.v, &case.d_o].map(|x| wide(x));
            let (o, lse) = reference::forward(&q, &k, &v, dims);
            close(&got.o, &o, 2e-6, "o");
            close(&got.lse, &lse, 2e-6, "lse");
            let (dq, dk, dv) = reference::backward(&d_o, &q, &k, &v, dims);
            close(&got.dq, &dq, 1e-5, "dq");
            close(&got.dk, &dk, 1e-5, "dk");
            close(&got.dv, &dv, 1e-5, "dv");
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let dims = dims(2, 1, 8);
    let mut case = Case::new(90, dims);
    case.q.iter_mut().for_each(|q| *q *= 300.0);
    let got = case.run(&[0, 90]);
    let [q, k, v] = [&case.q, &case.k, &case.v].map(|x| wide(x));
    let (o, lse) = reference::forward(&q, &k, &v, dims);
    // Scores around 1000 are known to 1e-4 in f32, so probabilities are too.
    close(&got.o, &o, 1e-3, "o");
    close(&got.lse, &lse, 1e-6, "lse");
    assert!(got.dq.iter().chain(&got.dk).chain(&got.dv).all(|x| x.is_finite()));
}

#[test]
fn an_empty_batch_and_an_empty_sequence_are_nothing() {
    let dims = dims(2, 1, 4);
    assert!(Case::new(0, dims).run(&[0]).o.is_empty());
    assert!(Case::new(0, dims).run(&[0, 0]).o.is_empty());
    let case = Case::new(6, dims);
    assert!(case.run(&[0, 6]) == case.run(&[0, 0, 6, 6]));
}

#[test]
fn decoding_token_by_token_gives_the_bits_of_the_whole_sequence() {
    for dims in [dims(7, 1, 8), dims(4, 2, 64)] {
        let case = Case::new(135, dims);
        let whole = case.run(&[0, 135]);
        let (query, key) = (dims.heads * dims.head_size, dims.kv_heads * dims.head_size);
        // Of a page that is not full, what lies beyond the tokens is nobody's.
        let pages = |values: &[f32], len: usize| -> Vec<Vec<f32>> {
            let mut values = values[..len * key].to_vec();
            values.resize(len.next_multiple_of(PAGE) * key, f32::NAN);
            values.chunks(PAGE * key).map(<[f32]>::to_vec).collect()
        };
        for t in 0..135 {
            let mut o = vec![f32::NAN; query];
            let (k, v) = (pages(&case.k, t + 1), pages(&case.v, t + 1));
            let pages: Vec<[&[f32]; 2]> = k.iter().zip(&v).map(|(k, v)| [&k[..], &v[..]]).collect();
            attention_decode(&mut o, &case.q[t * query..][..query], &pages, t + 1, dims);
            assert_eq!(bits(&o), bits(&whole.o[t * query..][..query]), "token {t}");
        }
    }
}

#[test]
fn no_result_depends_on_the_number_of_threads() {
    let case = Case::new(300, dims(6, 3, 16));
    let one = with_threads(1, || case.run(&[0, 100, 300]));
    let three = with_threads(3, || case.run(&[0, 100, 300]));
    assert!(one == three);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn packed_sequences_give_the_bits_of_each_alone(
        lengths in prop::collection::vec(0usize..150, 1..5),
        kv_heads in 1usize..3,
        group in 1usize..4,
        head_size in 1usize..20,
    ) {
        let mut cu_seqlens = vec![0];
        for length in &lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length);
        }
        let case = Case::new(cu_seqlens[lengths.len()], dims(kv_heads * group, kv_heads, head_size));
        let packed = case.run(&cu_seqlens);
        let mut joined = Results { o: vec![], lse: vec![], dq: vec![], dk: vec![], dv: vec![] };
        for sequence in cu_seqlens.windows(2) {
            let alone = case.part(sequence[0], sequence[1]).run(&[0, sequence[1] - sequence[0]]);
            joined.o.extend(alone.o);
            joined.lse.extend(alone.lse);
            joined.dq.extend(alone.dq);
            joined.dk.extend(alone.dk);
            joined.dv.extend(alone.dv);
        }
        prop_assert!(packed == joined);
    }
}
