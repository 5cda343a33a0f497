//! Products of `pipe` beside those of gemmkit, faer and rten: GFLOP/s, and the ratio to the best
//! other library.
//!
//! All contenders of a shape take turns in one process, and the best of all turns counts: on a
//! machine that others use too, that is the one number that means anything. Every result is checked
//! against f64 before its time is believed.
//!
//! usage: peers [THREADS [SECONDS PER SHAPE [PART OF A SHAPE'S NAME]]]

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use gemmkit::Parallelism;
use half::bf16;
use pipe::random::Stream;
use pipe::tensor::{self, Dtype, Matrix};
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::NdTensorView;
use std::time::{Duration, Instant};

/// One way to compute the product of a shape into the f32 slice it is given.
struct Contender<'a> {
    name: &'static str,
    own: bool,
    /// Allowed error relative to the sum of magnitudes.
    tolerance: f64,
    run: Box<dyn FnMut(&mut [f32]) + 'a>,
}

fn contender<'a>(name: &'static str, tolerance: f64, run: impl FnMut(&mut [f32]) + 'a) -> Contender<'a> {
    Contender { name, own: name.starts_with("pipe"), tolerance, run: Box::new(run) }
}

const F32: f64 = 1e-5;
const BF16: f64 = 1e-2;

struct Bench {
    threads: usize,
    seconds: f64,
    only: String,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |text| text.parse().expect("THREADS is a number"));
    let seconds = arguments.next().map_or(3.0, |text| text.parse().expect("SECONDS is a number"));
    let bench = Bench { threads, seconds, only: arguments.next().unwrap_or_default() };
    // rten reads its number of threads from the environment; nothing else runs yet.
    // SAFETY: no other thread exists.
    unsafe { std::env::set_var("RTEN_NUM_THREADS", threads.to_string()) };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("the first pool");

    println!("{threads} threads, {}; GFLOP/s, best of {seconds} s of turns", tensor::Isa::best().name());
    for (m, k, n) in [(512, 896, 4864), (2048, 896, 896), (512, 4864, 896), (2048, 64, 64), (1000, 128, 352), (1, 896, 4864), (8, 896, 4864)] {
        bench.forward(m, k, n);
    }
    for (m, k, n) in [(512, 896, 4864), (2048, 896, 896), (1000, 64, 64)] {
        bench.backward(m, k, n);
    }
    for (m, k, n) in [(512, 896, 4864), (1000, 64, 64)] {
        bench.weights(m, k, n);
    }
    for rank in [4, 16, 256] {
        bench.gemm("lora down", 512, 896, rank);
        bench.gemm("lora up", 512, rank, 896);
    }
}

impl Bench {
    /// y[m, n] = x[m, k] Wᵀ with a weight that does not change.
    fn forward(&self, m: usize, k: usize, n: usize) {
        let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
        let (x16, w16) = (halves(&x), halves(&w));
        let (packed, packed16) = (Matrix::pack(&w, n, k, Dtype::F32), Matrix::pack(&w, n, k, Dtype::Bf16));
        let threads = self.threads;
        let executor = GemmExecutor::<f32, f32, f32>::new();
        let prepacked = executor.prepack_b(NdTensorView::from_data([n, k], &w[..]).transposed());
        let mut all = vec![
            contender("pipe f32", F32, |y| tensor::linear(y, &x, m, &packed, false)),
            contender("pipe f32 plain", F32, |y| tensor::gemm(y, m, n, k, 1.0, &x, false, &w, true, false)),
        ];
        all.extend(others(threads, (m, n, k), Plain { data: &x, turned: false }, Plain { data: &w, turned: true }));
        all.push(contender("rten prepacked", F32, |y| {
            let a = GemmInputA::Unpacked(NdTensorView::from_data([m, k], &x[..]));
            executor.gemm(y, a, GemmInputB::Packed(&prepacked), GemmOptions::default()).expect("sizes fit");
        }));
        self.compare(&format!("x W'  {m}x{k}x{n} f32"), (m, n, k), |i, p| x[i * k + p], |p, j| w[j * k + p], all);

        let mut y16 = vec![bf16::ZERO; m * n];
        let all = vec![
            contender("pipe bf16", BF16, |y| tensor::linear(y, &x, m, &packed16, false)),
            contender("gemmkit bf16", BF16, |y| {
                gemmkit::gemm(
                    bf16::ONE,
                    gemmkit::MatRef::from_row_major(&x16, m, k),
                    gemmkit::MatRef::from_col_major(&w16, k, n),
                    bf16::ZERO,
                    gemmkit::MatMut::from_row_major(&mut y16, m, n),
                    gemmkit_threads(threads),
                );
                // Its result is bf16; only a sample is looked at, so only that is widened.
                for (i, j) in sample(m, n) {
                    y[i * n + j] = y16[i * n + j].to_f32();
                }
            }),
        ];
        self.compare(&format!("x W'  {m}x{k}x{n} bf16"), (m, n, k), |i, p| x[i * k + p], |p, j| w[j * k + p], all);
    }

    /// dx[m, k] = dy[m, n] W with the same packed weight.
    fn backward(&self, m: usize, k: usize, n: usize) {
        let (dy, w) = (numbers(m * n, 3), numbers(n * k, 2));
        let (dy16, w16) = (halves(&dy), halves(&w));
        let (packed, packed16) = (Matrix::pack(&w, n, k, Dtype::F32), Matrix::pack(&w, n, k, Dtype::Bf16));
        let threads = self.threads;
        let mut all = vec![contender("pipe f32", F32, |dx| tensor::linear_backward(dx, &dy, m, &packed, false))];
        all.extend(others(threads, (m, k, n), Plain { data: &dy, turned: false }, Plain { data: &w, turned: false }));
        self.compare(&format!("dy W  {m}x{n}x{k} f32"), (m, k, n), |i, p| dy[i * n + p], |p, j| w[p * k + j], all);

        let mut dx16 = vec![bf16::ZERO; m * k];
        let all = vec![
            contender("pipe bf16", BF16, |dx| tensor::linear_backward(dx, &dy, m, &packed16, false)),
            contender("gemmkit bf16", BF16, |dx| {
                gemmkit::gemm(
                    bf16::ONE,
                    gemmkit::MatRef::from_row_major(&dy16, m, n),
                    gemmkit::MatRef::from_row_major(&w16, n, k),
                    bf16::ZERO,
                    gemmkit::MatMut::from_row_major(&mut dx16, m, k),
                    gemmkit_threads(threads),
                );
                for (i, j) in sample(m, k) {
                    dx[i * k + j] = dx16[i * k + j].to_f32();
                }
            }),
        ];
        self.compare(&format!("dy W  {m}x{n}x{k} bf16"), (m, k, n), |i, p| dy[i * n + p], |p, j| w[p * k + j], all);
    }

    /// dW[n, k] = dyᵀ x.
    fn weights(&self, m: usize, k: usize, n: usize) {
        let (dy, x) = (numbers(m * n, 3), numbers(m * k, 1));
        let mut all =
            vec![contender("pipe f32", F32, |dw| tensor::gemm(dw, n, k, m, 1.0, &dy, true, &x, false, false))];
        let (left, right) = (Plain { data: &dy, turned: true }, Plain { data: &x, turned: false });
        all.extend(others(self.threads, (n, k, m), left, right));
        self.compare(&format!("dy' x {n}x{m}x{k} f32"), (n, k, m), |i, p| dy[p * n + i], |p, j| x[p * k + j], all);
    }

    /// c[m, n] = x[m, k] Wᵀ with a weight that changes all the time.
    fn gemm(&self, what: &str, m: usize, k: usize, n: usize) {
        let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
        let mut all =
            vec![contender("pipe f32", F32, |y| tensor::gemm(y, m, n, k, 1.0, &x, false, &w, true, false))];
        let (left, right) = (Plain { data: &x, turned: false }, Plain { data: &w, turned: true });
        all.extend(others(self.threads, (m, n, k), left, right));
        self.compare(&format!("{what} {m}x{k}x{n} f32"), (m, n, k), |i, p| x[i * k + p], |p, j| w[j * k + p], all);
    }

    fn compare(
        &self,
        shape: &str,
        (m, n, k): (usize, usize, usize),
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
        mut contenders: Vec<Contender>,
    ) {
        if !shape.contains(&self.only) {
            return;
        }
        let mut c = vec![0.0; m * n];
        for contender in &mut contenders {
            c.fill(f32::NAN);
            (contender.run)(&mut c);
            for (i, j) in sample(m, n) {
                let products = (0..k).map(|p| f64::from(a(i, p)) * f64::from(b(p, j)));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                let error = (f64::from(c[i * n + j]) - sum).abs();
                assert!(error <= contender.tolerance * size, "{} is wrong at {i},{j} of {shape}", contender.name);
            }
        }
        let mut best = vec![Duration::MAX; contenders.len()];
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < self.seconds {
            for (contender, best) in contenders.iter_mut().zip(&mut best) {
                // Twice: the first run brings the operands back into the caches.
                for _ in 0..2 {
                    let turn = Instant::now();
                    (contender.run)(&mut c);
                    *best = turn.elapsed().min(*best);
                }
            }
        }
        let rate = |time: Duration| 2.0 * (m * n * k) as f64 / time.as_secs_f64() / 1e9;
        let of = |own: bool| contenders.iter().zip(&best).filter(move |(c, _)| c.own == own).map(|(_, time)| rate(*time));
        let ratio = of(true).fold(0.0, f64::max) / of(false).fold(0.0, f64::max);
        print!("{shape:28} ratio {ratio:4.2} |");
        for (contender, best) in contenders.iter().zip(&best) {
            print!(" {} {:.1}", contender.name, rate(*best));
        }
        println!();
    }
}

/// A row-major operand, or the transpose of one.
#[derive(Clone, Copy)]
struct Plain<'a> {
    data: &'a [f32],
    turned: bool,
}

/// The other libraries on c[m, n] = a[m, k] b[k, n].
fn others<'a>(threads: usize, (m, n, k): (usize, usize, usize), a: Plain<'a>, b: Plain<'a>) -> Vec<Contender<'a>> {
    let kit = |x: Plain<'a>, rows, columns| match x.turned {
        false => gemmkit::MatRef::from_row_major(x.data, rows, columns),
        true => gemmkit::MatRef::from_col_major(x.data, rows, columns),
    };
    let faer = |x: Plain<'a>, rows, columns| match x.turned {
        false => MatRef::from_row_major_slice(x.data, rows, columns),
        true => MatRef::from_column_major_slice(x.data, rows, columns),
    };
    let executor = GemmExecutor::<f32, f32, f32>::new();
    vec![
        contender("gemmkit", F32, move |c| {
            let c = gemmkit::MatMut::from_row_major(c, m, n);
            gemmkit::gemm(1.0, kit(a, m, k), kit(b, k, n), 0.0, c, gemmkit_threads(threads));
        }),
        contender("faer", F32, move |c| {
            let par = if threads > 1 { Par::rayon(threads) } else { Par::Seq };
            let c = MatMut::from_row_major_slice_mut(c, m, n);
            matmul(c, Accum::Replace, faer(a, m, k), faer(b, k, n), 1.0, par);
        }),
        contender("rten", F32, move |c| {
            let view = |x: Plain<'a>, rows, columns| match x.turned {
                false => NdTensorView::from_data([rows, columns], x.data),
                true => NdTensorView::from_data([columns, rows], x.data).transposed(),
            };
            let (a, b) = (GemmInputA::Unpacked(view(a, m, k)), GemmInputB::Unpacked(view(b, k, n)));
            executor.gemm(c, a, b, GemmOptions::default()).expect("sizes fit");
        }),
    ]
}

fn gemmkit_threads(threads: usize) -> Parallelism {
    if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::Serial }
}

/// Some elements of an m by n result.
fn sample(m: usize, n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..50).map(move |q| (q * 7919 % m, q * 104_729 % n))
}

fn numbers(len: usize, stream: u64) -> Vec<f32> {
    let random = Stream::new(1, stream);
    (0..len).map(|i| random.uniform(i as u64) as f32 - 0.5).collect()
}

fn halves(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}
