//! Products against the law itself: one chain of fused multiply-adds per element.

use super::*;
use crate::random::Stream;

fn numbers(len: usize, name: &str) -> Vec<f32> {
    let random = Stream::named(11, &[name]);
    (0..len).map(|i| random.normal(i as u64) as f32).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The law, literally: op(a) is [m, k], op(b) is [k, n].
fn law(
    start: &[f32],
    (m, n, k): (usize, usize, usize),
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let mut c = start.to_vec();
    for i in 0..m {
        for j in 0..n {
            for p in 0..k {
                c[i * n + j] = a(i, p).mul_add(b(p, j), c[i * n + j]);
            }
        }
    }
    c
}

const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 64, 33),
    (1, 300, 70),
    (2, 200, 5),
    (3, 95, 17),
    (5, 4, 64),
    (7, 16, 40),
    (12, 32, 64),
    (13, 33, 65),
    (29, 48, 31),
    (50, 100, 3),
    (0, 5, 5),
    (5, 0, 5),
    (5, 5, 0),
];

#[test]
fn linear_is_one_ascending_chain_on_every_instruction_set() {
    for &(m, n, k) in SHAPES {
        let (x, w, start) = (numbers(m * k, "x"), numbers(n * k, "w"), numbers(m * n, "y"));
        let matrix = Matrix::pack(&w, n, k, Dtype::F32);
        for add in [false, true] {
            let from = if add { start.clone() } else { vec![0.0; m * n] };
            let want = law(&from, (m, n, k), |i, p| x[i * k + p], |p, j| w[j * k + p]);
            for isa in Isa::available() {
                let mut y = start.clone();
                linear_rows(isa, &mut y, &x, m, &matrix, 0..n, add);
                assert!(bits(&y) == bits(&want), "{isa:?} {m}x{n}x{k} add {add}");
            }
        }
    }
}

#[test]
fn linear_backward_is_one_ascending_chain_on_every_instruction_set() {
    for &(m, n, k) in SHAPES {
        let (dy, w, start) = (numbers(m * n, "dy"), numbers(n * k, "w"), numbers(m * k, "dx"));
        let matrix = Matrix::pack(&w, n, k, Dtype::F32);
        for add in [false, true] {
            let from = if add { start.clone() } else { vec![0.0; m * k] };
            let want = law(&from, (m, k, n), |i, p| dy[i * n + p], |p, j| w[p * k + j]);
            for isa in Isa::available() {
                let mut dx = start.clone();
                linear_backward_rows(isa, &mut dx, &dy, m, &matrix, 0..n, add);
                assert!(bits(&dx) == bits(&want), "{isa:?} {m}x{n}x{k} add {add}");
            }
        }
    }
}

#[test]
fn gemm_is_one_ascending_chain_for_every_layout() {
    for &(m, n, k) in SHAPES {
        let (a, b, start) = (numbers(m * k, "a"), numbers(k * n, "b"), numbers(m * n, "c"));
        for (ta, tb, add) in (0..8).map(|i| (i & 1 > 0, i & 2 > 0, i & 4 > 0)) {
            let from = if add { start.clone() } else { vec![0.0; m * n] };
            let left = |i: usize, p: usize| 0.3 * if ta { a[p * m + i] } else { a[i * k + p] };
            let right = |p: usize, j: usize| if tb { b[j * k + p] } else { b[p * n + j] };
            let want = law(&from, (m, n, k), left, right);
            let mut c = start.clone();
            gemm(&mut c, m, n, k, 0.3, &a, ta, &b, tb, add);
            assert!(bits(&c) == bits(&want), "{m}x{n}x{k} ta {ta} tb {tb} add {add}");
        }
    }
}

/// Long enough for several blocks of the summed index and several groups of panels, and tall
/// enough for several blocks of rows; both large enough for several tasks.
const LARGE: [(usize, usize, usize); 2] = [(40, 300, 2100), (1100, 40, 70)];

#[test]
fn blocks_and_threads_leave_the_chain_as_it_is() {
    for (m, n, k) in LARGE {
        let (x, w, dy) = (numbers(m * k, "x"), numbers(n * k, "w"), numbers(m * n, "dy"));
        let matrix = Matrix::pack(&w, n, k, Dtype::F32);
        let forward = law(&vec![0.0; m * n], (m, n, k), |i, p| x[i * k + p], |p, j| w[j * k + p]);
        let backward = law(&vec![0.0; m * k], (m, k, n), |i, p| dy[i * n + p], |p, j| w[p * k + j]);
        let weights = law(&vec![0.0; n * k], (n, k, m), |i, p| dy[p * n + i], |p, j| x[p * k + j]);
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| {
                let mut y = vec![0.0; m * n];
                linear(&mut y, &x, m, &matrix, false);
                assert!(bits(&y) == bits(&forward), "forward, {threads} threads");
                let mut dx = vec![0.0; m * k];
                linear_backward(&mut dx, &dy, m, &matrix, false);
                assert!(bits(&dx) == bits(&backward), "backward, {threads} threads");
                let mut dw = vec![0.0; n * k];
                gemm(&mut dw, n, k, m, 1.0, &dy, true, &x, false, false);
                assert!(bits(&dw) == bits(&weights), "weights, {threads} threads");
            });
        }
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (m, n, k) = (37, 130, 301);
        let (x, dy) = (numbers(m * k, "x"), numbers(m * n, "dy"));
        let matrix = Matrix::pack(&numbers(n * k, "w"), n, k, dtype);
        for isa in Isa::available() {
            let (mut y, mut dx) = (vec![0.0; m * n], vec![0.0; m * k]);
            linear_rows(isa, &mut y, &x, m, &matrix, 0..n, false);
            linear_backward_rows(isa, &mut dx, &dy, m, &matrix, 0..n, false);
            for i in 0..m {
                let (mut row, mut drow) = (vec![0.0; n], vec![0.0; k]);
                linear_rows(isa, &mut row, &x[i * k..][..k], 1, &matrix, 0..n, false);
                linear_backward_rows(isa, &mut drow, &dy[i * n..][..n], 1, &matrix, 0..n, false);
                assert!(bits(&row) == bits(&y[i * n..][..n]), "{isa:?} {dtype:?} row {i}");
                assert!(bits(&drow) == bits(&dx[i * k..][..k]), "{isa:?} {dtype:?} row {i}, backward");
            }
        }
    }
}

#[test]
fn few_rows_are_the_same_in_any_number_for_any_threads_and_beside_other_products() {
    // Large enough for several tasks, and for two blocks of the summed index in both dtypes.
    let (widths, k, most) = ([200, 64, 33], 2100, 33);
    let x = numbers(most * k, "x");
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let matrices = widths.map(|n| Matrix::pack(&numbers(n * k, "w"), n, k, dtype));
        for isa in Isa::available() {
            let alone = |matrix: &Matrix, row: usize| {
                let mut y = vec![f32::NAN; matrix.n];
                linear_rows(isa, &mut y, &x[row * k..][..k], 1, matrix, 0..matrix.n, false);
                bits(&y)
            };
            let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
            let want: Vec<Vec<Vec<u32>>> =
                one.install(|| matrices.iter().map(|w| (0..most).map(|row| alone(w, row)).collect()).collect());
            if dtype == Dtype::F32 {
                let w = matrices[2].unpack();
                let law = law(&[0.0; 33], (1, 33, k), |_, p| x[p], |p, j| w[j * k + p]);
                assert!(want[2][0] == bits(&law), "{isa:?}");
            }
            for threads in 1..=4 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
                // Plain Rust multiplies and adds a hundred times slower here.
                let some: &[usize] =
                    if isa == Isa::Portable { &[1, 8] } else { &[1, 2, 3, 4, 7, 8, 12, 13, 31, 32, 33] };
                for &m in some {
                    let mut all = matrices.each_ref().map(|w| vec![f32::NAN; m * w.n]);
                    let mut products: Vec<_> = all.iter_mut().map(|y| &mut y[..]).zip(&matrices).collect();
                    pool.install(|| match m <= FEW_ROWS {
                        true => linears_on(isa, &mut products, &x[..m * k], m),
                        false => linears(&mut products, &x[..m * k], m),
                    });
                    if m > FEW_ROWS && isa != Isa::best() {
                        continue;
                    }
                    for ((y, w), want) in all.iter().zip(&matrices).zip(&want) {
                        for (y, want) in y.chunks_exact(w.n).zip(want) {
                            assert!(bits(y) == *want, "{isa:?} {dtype:?}, {m} rows, {threads} threads, {w:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bf16_products_are_those_of_the_rounded_operands() {
    let round = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect::<Vec<f32>>();
    for &(m, n, k) in SHAPES.iter().chain([&(40, 70, 2300)]) {
        let (x, dy, w) = (numbers(m * k, "x"), numbers(m * n, "dy"), numbers(n * k, "w"));
        let matrix = Matrix::pack(&w, n, k, Dtype::Bf16);
        let (x_rounded, dy_rounded, w_rounded) = (round(&x), round(&dy), round(&w));
        let close = |got: &[f32],
                     terms: usize,
                     a: &dyn Fn(usize, usize) -> f32,
                     b: &dyn Fn(usize, usize) -> f32,
                     what: &str| {
            let columns = got.len() / m.max(1);
            for (at, got) in got.iter().enumerate() {
                let (i, j) = (at / columns, at % columns);
                let products = (0..terms).map(|p| f64::from(a(i, p)) * f64::from(b(p, j)));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                // Each of `terms` additions may round by half an ulp of a partial sum.
                let tolerance = size * terms as f64 * 6e-8 + 1e-30;
                assert!((f64::from(*got) - sum).abs() <= tolerance, "{what} {m}x{n}x{k} at {i},{j}: {got} for {sum}");
            }
        };
        for isa in Isa::available() {
            let (mut y, mut dx) = (vec![f32::NAN; m * n], vec![f32::NAN; m * k]);
            linear_rows(isa, &mut y, &x, m, &matrix, 0..n, false);
            close(&y, k, &|i, p| x_rounded[i * k + p], &|p, j| w_rounded[j * k + p], &format!("{isa:?} forward"));
            linear_backward_rows(isa, &mut dx, &dy, m, &matrix, 0..n, false);
            close(&dx, n, &|i, p| dy_rounded[i * n + p], &|p, j| w_rounded[p * k + j], &format!("{isa:?} backward"));
        }
    }
}

#[test]
fn some_rows_of_a_matrix_give_that_part_of_the_product() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (m, n, k) = (9, 150, 45);
        let (x, isa) = (numbers(m * k, "x"), Isa::best());
        let matrix = Matrix::pack(&numbers(n * k, "w"), n, k, dtype);
        let mut whole = vec![0.0; m * n];
        linear(&mut whole, &x, m, &matrix, false);
        let mut part = vec![0.0; m * 86];
        linear_rows(isa, &mut part, &x, m, &matrix, 64..150, false);
        for i in 0..m {
            assert_eq!(bits(&part[i * 86..][..86]), bits(&whole[i * n + 64..][..86]));
        }
        // Backward in two parts continues the chain of backward in one.
        let (mut at_once, mut in_parts) = (vec![0.0; m * k], vec![0.0; m * k]);
        linear_backward(&mut at_once, &whole, m, &matrix, false);
        let columns = |from: usize, to: usize| -> Vec<f32> {
            whole.chunks_exact(n).flat_map(|row| row[from..to].to_vec()).collect()
        };
        linear_backward_rows(isa, &mut in_parts, &columns(0, 64), m, &matrix, 0..64, false);
        linear_backward_rows(isa, &mut in_parts, &columns(64, 150), m, &matrix, 64..150, true);
        assert_eq!(bits(&in_parts), bits(&at_once));
    }
}

#[test]
fn blocks_of_larger_matrices_are_read_and_written_in_place() {
    let (m, n, k, stride) = (6, 10, 7, 40);
    let (a, b, start) = (numbers(m * stride, "a"), numbers(n * stride, "b"), numbers(m * stride, "c"));
    let mut c = start.clone();
    let (left, right) = (Block { data: &a[3..], stride, turned: false }, Block { data: &b[5..], stride, turned: true });
    gemm_here(Isa::best(), (&mut c[2..], stride), (m, n, k), 1.0, left, right, true);
    for i in 0..m {
        for j in 0..stride {
            let mut want = start[i * stride + j];
            if (2..2 + n).contains(&j) {
                for p in 0..k {
                    want = a[i * stride + 3 + p].mul_add(b[(j - 2) * stride + 5 + p], want);
                }
            }
            assert_eq!(c[i * stride + j].to_bits(), want.to_bits(), "{i},{j}");
        }
    }
}

#[test]
fn a_matrix_gives_back_what_was_packed() {
    for (n, k) in [(1, 1), (33, 7), (64, 64), (100, 45)] {
        let w = numbers(n * k, "w");
        assert_eq!(bits(&Matrix::pack(&w, n, k, Dtype::F32).unpack()), bits(&w));
        let halves: Vec<bf16> = w.iter().map(|x| bf16::from_f32(*x)).collect();
        let rounded: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        assert_eq!(bits(&Matrix::pack(&w, n, k, Dtype::Bf16).unpack()), bits(&rounded));
        let mut matrix = Matrix::pack_bf16(&halves, n, k);
        assert_eq!(bits(&matrix.unpack()), bits(&rounded));
        matrix.repack(&vec![2.5; n * k]);
        assert_eq!(matrix.unpack(), vec![2.5; n * k]);
    }
}

#[test]
fn not_a_number_is_not_lost_and_stays_in_its_row() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (m, n, k) = (14, 40, 33);
        let mut x = numbers(m * k, "x");
        x[5 * k + 32] = f32::NAN;
        let mut y = vec![0.0; m * n];
        linear(&mut y, &x, m, &Matrix::pack(&numbers(n * k, "w"), n, k, dtype), false);
        for (i, row) in y.chunks_exact(n).enumerate() {
            assert!(row.iter().all(|y| y.is_nan() == (i == 5)), "{dtype:?} row {i}");
        }
    }
}
