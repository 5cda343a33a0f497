//! What a count of right answers says about the rate behind it.

/// The Wilson interval: bounds of the rate, between 0 and 1, at 95 %.
///
/// Unlike the normal approximation it stays inside [0, 1] and is no point at 0 of n or n of n
/// (Wilson 1927; recommended for small n by Brown, Cai, DasGupta 2001). `total` 0 gives (0, 1).
pub fn wilson(correct: u64, total: u64) -> (f64, f64) {
    wilson_rate(if total == 0 { 0.0 } else { correct.min(total) as f64 / total as f64 }, total)
}

/// The same for a mean of `total` values between 0 and 1, such as the rates of problems with several
/// samples each. Such values vary less than those that are 0 or 1, so the interval is on the wide side.
pub fn wilson_rate(rate: f64, total: u64) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    if total == 0 {
        return (0.0, 1.0);
    }
    let n = total as f64;
    let square = Z * Z;
    let middle = (rate + square / (2.0 * n)) / (1.0 + square / n);
    let half = Z / (1.0 + square / n) * (rate * (1.0 - rate) / n + square / (4.0 * n * n)).sqrt();
    let low = if rate <= 0.0 { 0.0 } else { (middle - half).max(0.0) };
    let high = if rate >= 1.0 { 1.0 } else { (middle + half).min(1.0) };
    (low, high)
}

#[cfg(test)]
mod tests {
    use super::wilson;

    #[test]
    fn the_published_example_comes_out() {
        // 15 of 148: Newcombe 1998, table I, method 3 gives 0.0624 to 0.1605 (score interval).
        let (low, high) = wilson(15, 148);
        assert!((low - 0.0624).abs() <= 5e-5 && (high - 0.1605).abs() <= 5e-5, "{low} {high}");
    }

    #[test]
    fn the_ends_are_ends() {
        assert_eq!(wilson(0, 30).0, 0.0);
        assert_eq!(wilson(30, 30).1, 1.0);
        assert!(wilson(0, 30).1 >= 0.11 && wilson(0, 30).1 <= 0.12);
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }
}
