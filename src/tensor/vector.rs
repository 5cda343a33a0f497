//! Elementwise functions and sums over slices.
//!
//! Every sum runs in 16 lanes that are added up in one fixed tree, so it is the same number on
//! every instruction set. `exp` is our own polynomial for the same reason, and because it is
//! several times faster than the C library's.

use super::isa::{Isa, by_isa};

/// Lanes of all sums here. Part of the results: changing it changes their last bits.
const LANES: usize = 16;

/// e^x within 1 ulp: NaN stays NaN, below -104 gives 0, above 88.73 infinity; subnormal results
/// are rounded once. Method of Cephes `expf`: x = n ln 2 + r, a polynomial in r, times 2^n.
#[inline(always)]
pub fn exp1(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons rather than clamp/max, so that a NaN passes through and this vectorises.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-0.693_145_75, x); // ln 2 in two parts: the first has few bits, so n * part is exact
    let r = n.mul_add(-1.428_606_8e-6, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, because n reaches 128 and -150, where one factor would not be a normal number.
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let low = f32::from_bits((half.wrapping_add(127) << 23) as u32);
    let high = f32::from_bits((n.wrapping_sub(half).wrapping_add(127) << 23) as u32);
    y * low * high
}

/// x * sigmoid(x).
#[inline(always)]
pub fn silu1(x: f32) -> f32 {
    x / (1.0 + exp1(-x))
}

#[inline(always)]
fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

by_isa! {
    pub(crate) fn exp_on(x: &mut [f32]) {
        for x in x {
            *x = exp1(*x);
        }
    }
}

by_isa! {
    /// x = e^(x - shift); returns the sum of the results.
    pub(crate) fn exp_sum_on(x: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let mut chunks = x.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (x, lane) in chunk.iter_mut().zip(&mut lanes) {
                *x = exp1(*x - shift);
                *lane += *x;
            }
        }
        for (x, lane) in chunks.into_remainder().iter_mut().zip(&mut lanes) {
            *x = exp1(*x - shift);
            *lane += *x;
        }
        tree(lanes)
    }
}

by_isa! {
    pub(crate) fn max_on(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = x.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (x, lane) in chunk.iter().zip(&mut lanes) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        for (x, lane) in chunks.remainder().iter().zip(&mut lanes) {
            *lane = if *x > *lane { *x } else { *lane };
        }
        let mut max = f32::NEG_INFINITY;
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        max
    }
}

by_isa! {
    /// Lanes hold the first place of their largest; the lowest of the lanes' places wins.
    fn argmax_on(x: &[f32]) -> usize {
        let mut largest = [f32::NEG_INFINITY; LANES];
        let mut places = [u32::MAX; LANES];
        for (at, chunk) in (0u32..).zip(x.chunks(LANES)) {
            if let Ok(chunk) = <&[f32; LANES]>::try_from(chunk) {
                for i in 0..LANES {
                    let more = chunk[i] > largest[i];
                    largest[i] = if more { chunk[i] } else { largest[i] };
                    places[i] = if more { at } else { places[i] };
                }
            } else {
                for (i, x) in chunk.iter().enumerate() {
                    if *x > largest[i] {
                        (largest[i], places[i]) = (*x, at);
                    }
                }
            }
        }
        let mut best = (f32::NEG_INFINITY, 0);
        for (i, (x, place)) in largest.into_iter().zip(places).enumerate() {
            let place = place as usize * LANES + i;
            if x > best.0 || x == best.0 && x > f32::NEG_INFINITY && place < best.1 {
                best = (x, place);
            }
        }
        best.1
    }
}

by_isa! {
    /// One chain of additions in f64: it takes as long as they do, the exponentials are done beside it.
    fn exp_total_on(x: &[f32], shift: f32) -> f64 {
        let mut total = 0.0;
        let mut some = [0.0f32; 64];
        for chunk in x.chunks(64) {
            for (to, x) in some.iter_mut().zip(chunk) {
                *to = exp1(*x - shift);
            }
            for x in &some[..chunk.len()] {
                total += f64::from(*x);
            }
        }
        total
    }
}

by_isa! {
    pub(crate) fn dot_on(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        for (a, b) in (&mut a).zip(&mut b) {
            for ((a, b), lane) in a.iter().zip(b).zip(&mut lanes) {
                *lane = a.mul_add(*b, *lane);
            }
        }
        for ((a, b), lane) in a.remainder().iter().zip(b.remainder()).zip(&mut lanes) {
            *lane = a.mul_add(*b, *lane);
        }
        tree(lanes)
    }
}

by_isa! {
    pub(crate) fn axpy_on(y: &mut [f32], a: f32, x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = a.mul_add(*x, *y);
        }
    }
}

by_isa! {
    pub(crate) fn add_on(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
}

by_isa! {
    pub(crate) fn scale_on(x: &mut [f32], a: f32) {
        for x in x {
            *x *= a;
        }
    }
}

by_isa! {
    fn sum_squares_on(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let mut chunks = x.chunks_exact(8);
        for chunk in &mut chunks {
            for (x, lane) in chunk.iter().zip(&mut lanes) {
                *lane += f64::from(*x) * f64::from(*x);
            }
        }
        for (x, lane) in chunks.remainder().iter().zip(&mut lanes) {
            *lane += f64::from(*x) * f64::from(*x);
        }
        ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
    }
}

/// x = e^x, each within 1 ulp.
pub fn exp(x: &mut [f32]) {
    exp_on(Isa::best(), x);
}

/// x = e^(x - shift); returns the sum of the results. Softmax is this with `shift = max(x)`,
/// then [`scale`] by the inverse of the sum.
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    exp_sum_on(Isa::best(), x, shift)
}

/// The largest element; minus infinity for none. NaNs are passed over.
pub fn max(x: &[f32]) -> f32 {
    max_on(Isa::best(), x)
}

/// The first place of the largest element; 0 if no element is above minus infinity. NaNs are passed over.
pub fn argmax(x: &[f32]) -> usize {
    argmax_on(Isa::best(), x)
}

/// Sum of e^(x - shift) in f64, in order.
pub fn exp_total(x: &[f32], shift: f32) -> f64 {
    exp_total_on(Isa::best(), x, shift)
}

/// Sum of a * b.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    dot_on(Isa::best(), a, b)
}

/// y += a * x, one fused multiply-add per element.
pub fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    assert_eq!(y.len(), x.len());
    axpy_on(Isa::best(), y, a, x);
}

/// y += x.
pub fn add(y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len());
    add_on(Isa::best(), y, x);
}

/// x *= a.
pub fn scale(x: &mut [f32], a: f32) {
    scale_on(Isa::best(), x, a);
}

/// Sum of x^2, in f64.
pub fn sum_squares(x: &[f32]) -> f64 {
    sum_squares_on(Isa::best(), x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_isa_gives(f: impl Fn(Isa) -> Vec<u32>) {
        let law = f(Isa::Portable);
        for isa in Isa::available() {
            assert!(f(isa) == law, "{isa:?} differs from the portable path");
        }
    }

    #[test]
    fn exp_is_within_one_ulp_over_the_whole_range_of_normal_results() {
        let steps = 400_000;
        let mut worst = 0.0f64;
        let inputs: Vec<f32> = (0..=steps).map(|i| -87.3 + i as f32 * (88.7 + 87.3) / steps as f32).collect();
        let mut outputs = inputs.clone();
        exp(&mut outputs);
        for (x, y) in inputs.iter().zip(&outputs) {
            let exact = f64::from(*x).exp();
            let nearest = exact as f32;
            let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
            worst = worst.max((f64::from(*y) - exact).abs() / ulp);
        }
        assert!(worst <= 1.0, "{worst} ulp");
    }

    #[test]
    fn exp_keeps_nan_and_ends_in_zero_and_infinity() {
        assert!(exp1(f32::NAN).is_nan());
        assert_eq!(exp1(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp1(-1e30), 0.0);
        assert_eq!(exp1(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp1(88.8), f32::INFINITY);
        assert_eq!(exp1(0.0), 1.0);
        assert_eq!(exp1(-0.0), 1.0);
        assert!(exp1(88.72).is_finite());
        // A subnormal result has one rounding, so it is the nearest one or its neighbour.
        for x in [-87.5f32, -95.0, -100.25, -103.0] {
            let nearest = f64::from(x).exp() as f32;
            assert!(exp1(x).to_bits().abs_diff(nearest.to_bits()) <= 1, "{x}");
        }
    }

    #[test]
    fn sums_and_exp_are_the_same_bits_on_every_instruction_set() {
        let random = crate::random::Stream::named(3, &["vector"]);
        for len in [0, 1, 15, 16, 17, 100, 1000] {
            let a: Vec<f32> = (0..len).map(|i| random.normal(i) as f32 * 3.0).collect();
            let b: Vec<f32> = (0..len).map(|i| random.normal(i + 5000) as f32).collect();
            every_isa_gives(|isa| vec![dot_on(isa, &a, &b).to_bits()]);
            every_isa_gives(|isa| vec![max_on(isa, &a).to_bits()]);
            every_isa_gives(|isa| vec![(sum_squares_on(isa, &a) as f32).to_bits()]);
            every_isa_gives(|isa| {
                let mut x = a.clone();
                let sum = exp_sum_on(isa, &mut x, 0.5);
                x.iter().map(|x| x.to_bits()).chain([sum.to_bits()]).collect()
            });
        }
    }

    #[test]
    fn the_largest_is_found_at_its_first_place() {
        let random = crate::random::Stream::named(4, &["argmax"]);
        for len in [1, 15, 16, 17, 100, 1001] {
            for case in 0..40 {
                // Few different values, so that equal ones are common.
                let x: Vec<f32> = (0..len).map(|i| (random.u64(case * 2000 + i) % 9) as f32 - 4.0).collect();
                let want = (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best });
                for isa in Isa::available() {
                    assert_eq!(argmax_on(isa, &x), want, "{isa:?} {x:?}");
                }
            }
        }
        assert_eq!(argmax(&[f32::NEG_INFINITY; 20]), 0);
        assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN, 1.0, -0.0, 1.0]), 2);
        assert_eq!(argmax(&[-0.0, 0.0]), 0);
        assert_eq!(argmax(&[]), 0);
    }

    #[test]
    fn a_total_of_exponentials_is_their_sum_in_order() {
        let random = crate::random::Stream::named(4, &["total"]);
        for len in [0, 1, 63, 64, 65, 1000] {
            let x: Vec<f32> = (0..len).map(|i| random.normal(i) as f32 * 5.0).collect();
            let mut exponentials = x.clone();
            exp_sum(&mut exponentials, 1.5);
            let want: f64 = exponentials.iter().map(|x| f64::from(*x)).sum();
            for isa in Isa::available() {
                assert_eq!(exp_total_on(isa, &x, 1.5).to_bits(), (0.0 + want).to_bits(), "{isa:?} {len}");
            }
        }
    }

    #[test]
    fn silu_saturates_without_a_nan() {
        assert_eq!(silu1(200.0), 200.0);
        assert_eq!(silu1(-200.0), -0.0);
        assert!((silu1(1.0) - 0.731_058_6).abs() <= 1e-7);
    }
}
