//! Reproducible numbers and two ways to compare.

use pipe::random::Stream;

/// Standard normal numbers that depend on the name only.
pub fn numbers(len: usize, name: &str) -> Vec<f32> {
    let random = Stream::named(17, &[name]);
    (0..len).map(|i| random.normal(i as u64) as f32).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The largest difference is at most `tolerance` times the largest wanted magnitude, or times 1,
/// the size of the inputs, where results cancel.
#[track_caller]
pub fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1.0f64, |max, x| max.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= tolerance * size, "{what}, element {i}: {got} instead of {want}, scale {size}");
    }
}

/// `gradient` is the derivative of `loss` at `x`, by central differences in f64.
#[track_caller]
pub fn derivative(x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64, what: &str) {
    assert_eq!(x.len(), gradient.len(), "{what}");
    let (mut moved, step) = (x.to_vec(), 1e-5);
    for i in 0..x.len() {
        moved[i] = x[i] + step;
        let up = loss(&moved);
        moved[i] = x[i] - step;
        let down = loss(&moved);
        moved[i] = x[i];
        let slope = (up - down) / (2.0 * step);
        let error = (slope - gradient[i]).abs();
        assert!(error <= 1e-7 * (1.0 + slope.abs()), "{what}, element {i}: {} instead of {slope}", gradient[i]);
    }
}

/// Sum of a * b: a loss whose gradient with respect to `b` is `a`.
pub fn weighted(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Runs `f` on a pool of so many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
}
