//! RMSNorm, RoPE, SwiGLU, bias and embedding.

use crate::common::{bits, close, derivative, numbers, weighted, wide, with_threads};
use pipe::tensor::ops::{self, RopeTable, bias, embedding, rmsnorm, rope, swiglu};
use pipe::tensor::{Dtype, Matrix};

#[test]
fn rmsnorm_backward_is_the_derivative_of_forward() {
    let (rows, channels) = (3, 7);
    let [x, dy] = ["x", "dy"].map(|name| wide(&numbers(rows * channels, name)));
    let w = wide(&numbers(channels, "w"));
    let (dx, dw) = rmsnorm::reference::backward(&dy, &x, &w, 1e-6);
    derivative(&x, &dx, |x| weighted(&dy, &rmsnorm::reference::forward(x, &w, 1e-6)), "dx");
    derivative(&w, &dw, |w| weighted(&dy, &rmsnorm::reference::forward(&x, w, 1e-6)), "dw");
}

#[test]
fn rmsnorm_follows_its_definition() {
    for (rows, channels) in [(0, 8), (1, 1), (1, 896), (7, 33), (33, 64), (100, 300)] {
        let [x, dy, start] = ["x", "dy", "start"].map(|name| numbers(rows * channels, name));
        let (w, dw_start) = (numbers(channels, "w"), numbers(channels, "dw"));
        let (mut y, mut rstd) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows]);
        ops::rmsnorm_forward(&mut y, &mut rstd, &x, &w, 1e-6);
        close(&y, &rmsnorm::reference::forward(&wide(&x), &wide(&w), f64::from(1e-6f32)), 1e-6, "y");

        let (want_dx, want_dw) = rmsnorm::reference::backward(&wide(&dy), &wide(&x), &wide(&w), 1e-6);
        let (mut dx, mut dw) = (vec![f32::NAN; x.len()], dw_start.clone());
        ops::rmsnorm_backward(&mut dx, Some(&mut dw), &dy, &x, &w, &rstd, false);
        close(&dx, &want_dx, 3e-6, "dx");
        let want_dw: Vec<f64> = want_dw.iter().zip(&dw_start).map(|(dw, start)| dw + f64::from(*start)).collect();
        close(&dw, &want_dw, 3e-6, "dw is added to");

        let mut added = start.clone();
        ops::rmsnorm_backward(&mut added, None, &dy, &x, &w, &rstd, true);
        for ((added, start), dx) in added.iter().zip(&start).zip(&dx) {
            assert_eq!(*added, start + dx);
        }
    }
}

#[test]
fn rope_follows_its_definition_and_its_inverse_undoes_it() {
    for (positions, heads, head_size) in
        [(vec![], 2, 8), (vec![0], 1, 2), (vec![0, 1, 2, 0, 1, 6, 40], 3, 8), (vec![900; 5], 2, 64)]
    {
        let x = numbers(positions.len() * heads * head_size, "x");
        let table = RopeTable::new(1000, head_size, 1e6);
        let mut y = x.clone();
        ops::rope(&mut y, heads, &table, &positions, false);
        // Angles are f32 as in transformers: up to 900 * 2^-24 off.
        let want = rope::reference::forward(&wide(&x), heads, head_size, 1e6, &positions);
        close(&y, &want, 1e-4, "turned");
        ops::rope(&mut y, heads, &table, &positions, true);
        close(&y, &wide(&x), 1e-6, "turned back");
    }
}

#[test]
fn rope_turns_back_by_the_transpose_which_is_the_gradient() {
    let (heads, head_size, positions) = (2, 6, [0u32, 3, 17]);
    let len = positions.len() * heads * head_size;
    let table = RopeTable::new(20, head_size, 1e4);
    let (x, dy) = (numbers(len, "x"), numbers(len, "dy"));
    let (mut y, mut dx) = (x.clone(), dy.clone());
    ops::rope(&mut y, heads, &table, &positions, false);
    ops::rope(&mut dx, heads, &table, &positions, true);
    // <dy, R x> = <Rᵀ dy, x>
    let error = (weighted(&wide(&dy), &wide(&y)) - weighted(&wide(&dx), &wide(&x))).abs();
    assert!(error <= 1e-5, "{error}");
}

#[test]
fn swiglu_backward_is_the_derivative_of_forward() {
    let [gate, up, dy] = ["gate", "up", "dy"].map(|name| wide(&numbers(40, name)));
    let (dgate, dup) = swiglu::reference::backward(&dy, &gate, &up);
    derivative(&gate, &dgate, |gate| weighted(&dy, &swiglu::reference::forward(gate, &up)), "dgate");
    derivative(&up, &dup, |up| weighted(&dy, &swiglu::reference::forward(&gate, up)), "dup");
}

#[test]
fn swiglu_follows_its_definition_far_from_zero_too() {
    for len in [0, 1, 15, 100, 40_000] {
        let [mut gate, up, dy] = ["gate", "up", "dy"].map(|name| numbers(len, name));
        for (i, gate) in gate.iter_mut().enumerate() {
            *gate *= [1.0, 10.0, 60.0][i % 3];
        }
        let mut y = vec![f32::NAN; len];
        ops::swiglu_forward(&mut y, &gate, &up);
        close(&y, &swiglu::reference::forward(&wide(&gate), &wide(&up)), 1e-6, "y");
        let (mut dgate, mut dup) = (vec![f32::NAN; len], vec![f32::NAN; len]);
        ops::swiglu_backward(&mut dgate, &mut dup, &dy, &gate, &up);
        let (want_dgate, want_dup) = swiglu::reference::backward(&wide(&dy), &wide(&gate), &wide(&up));
        close(&dgate, &want_dgate, 1e-6, "dgate");
        close(&dup, &want_dup, 1e-6, "dup");
    }
}

#[test]
fn bias_is_added_to_every_row_and_its_gradient_sums_them() {
    let (rows, channels) = (50, 77);
    let (x, b, db_start) = (numbers(rows * channels, "x"), numbers(channels, "b"), numbers(channels, "db"));
    let mut y = x.clone();
    ops::bias_add(&mut y, &b);
    let mut db = db_start.clone();
    ops::bias_backward(&mut db, &x);
    for c in 0..channels {
        let mut sum = db_start[c];
        for r in 0..rows {
            assert_eq!(y[r * channels + c], x[r * channels + c] + b[c]);
            sum += x[r * channels + c];
        }
        assert_eq!(db[c].to_bits(), sum.to_bits(), "rows are summed in order");
    }
}

#[test]
fn embedding_copies_rows_and_adds_gradients_of_repeated_ids() {
    let (vocabulary, channels, ids) = (70, 9, [3u32, 69, 3, 0, 3]);
    let (w, dy) = (numbers(vocabulary * channels, "w"), numbers(ids.len() * channels, "dy"));
    let table = Matrix::pack(&w, vocabulary, channels, Dtype::F32);
    let mut y = vec![f32::NAN; ids.len() * channels];
    ops::embedding_forward(&mut y, &table, &ids);
    for (y, &id) in y.chunks_exact(channels).zip(&ids) {
        assert_eq!(y, &w[id as usize * channels..][..channels]);
    }
    let mut dw = vec![1.0; w.len()];
    ops::embedding_backward(&mut dw, &dy, &ids);
    for c in 0..channels {
        assert_eq!(dw[3 * channels + c], 1.0 + dy[c] + dy[2 * channels + c] + dy[4 * channels + c]);
        assert_eq!(dw[69 * channels + c], 1.0 + dy[channels + c]);
        assert_eq!(dw[50 * channels + c], 1.0);
    }
}

#[test]
fn no_result_depends_on_the_number_of_threads() {
    let (rows, channels) = (500, 200);
    let [x, dy] = ["x", "dy"].map(|name| numbers(rows * channels, name));
    let w = numbers(channels, "w");
    let all = |threads| {
        with_threads(threads, || {
            let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows]);
            ops::rmsnorm_forward(&mut y, &mut rstd, &x, &w, 1e-6);
            let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; channels], vec![0.0; channels]);
            ops::rmsnorm_backward(&mut dx, Some(&mut dw), &dy, &x, &w, &rstd, false);
            ops::bias_backward(&mut db, &dy);
            let (mut dgate, mut dup) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            ops::swiglu_backward(&mut dgate, &mut dup, &dy, &x, &y);
            [y, rstd, dx, dw, db, dgate, dup].map(|x| bits(&x))
        })
    };
    assert!(all(1) == all(3));
}

#[test]
fn bias_follows_its_reference_and_its_gradient_is_the_derivative() {
    for (rows, channels) in [(1, 1), (3, 7), (33, 70), (5, 896)] {
        let [y, dy] = ["y", "dy"].map(|name| numbers(rows * channels, name));
        let [b, start] = ["b", "start"].map(|name| numbers(channels, name));
        let mut got = y.clone();
        ops::bias_add(&mut got, &b);
        close(&got, &bias::reference::forward(&wide(&y), &wide(&b)), 1e-6, "y");

        let want = bias::reference::backward(&wide(&dy), channels);
        if channels <= 7 {
            derivative(&wide(&b), &want, |b| weighted(&wide(&dy), &bias::reference::forward(&wide(&y), b)), "db");
        }
        let mut db = start.clone();
        ops::bias_backward(&mut db, &dy);
        let want: Vec<f64> = want.iter().zip(&start).map(|(db, start)| db + f64::from(*start)).collect();
        close(&db, &want, 3e-6, "db is added to");
    }
}

#[test]
fn embedding_follows_its_reference_and_its_gradient_is_the_derivative() {
    let (rows, channels, ids) = (5, 3, [4u32, 0, 4, 2, 4]);
    let (table, dy) = (numbers(rows * channels, "table"), numbers(ids.len() * channels, "dy"));
    let mut y = vec![f32::NAN; dy.len()];
    ops::embedding_forward(&mut y, &Matrix::pack(&table, rows, channels, Dtype::F32), &ids);
    close(&y, &embedding::reference::forward(&wide(&table), channels, &ids), 0.0, "y");

    let want = embedding::reference::backward(&wide(&dy), rows, &ids);
    let loss = |table: &[f64]| weighted(&wide(&dy), &embedding::reference::forward(table, channels, &ids));
    derivative(&wide(&table), &want, loss, "dw");
    let mut dw = vec![0.0; table.len()];
    ops::embedding_backward(&mut dw, &dy, &ids);
    close(&dw, &want, 1e-6, "dw");
}
