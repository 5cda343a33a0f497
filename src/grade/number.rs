//! Real and complex numbers of about 31 decimal digits, for sampling what is not rational.
//!
//! A value is an unevaluated sum of two f64 (Dekker 1971; Hida, Li, Bailey, "Algorithms for
//! quad-double precision floating point arithmetic", 2001). Overflow becomes infinity and what is
//! undefined NaN; the caller decides what that proves.

/// `hi + lo` with |lo| at most half an ulp of `hi`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Real {
    /// The nearest f64.
    pub hi: f64,
    /// What `hi` leaves over.
    pub lo: f64,
}

/// 0.
pub const ZERO: Real = Real { hi: 0.0, lo: 0.0 };
/// 1.
pub const ONE: Real = Real { hi: 1.0, lo: 0.0 };
/// The ratio of a circle's circumference to its diameter.
pub const PI: Real = Real { hi: std::f64::consts::PI, lo: 1.224_646_799_147_353_2e-16 };
/// The natural logarithm of 2.
pub const LN_2: Real = Real { hi: std::f64::consts::LN_2, lo: 2.319_046_813_846_299_6e-17 };
/// Euler's number, the base of [`Real::ln`].
pub const E: Real = Real { hi: std::f64::consts::E, lo: 1.445_646_891_729_250_2e-16 };

fn two_sum(a: f64, b: f64) -> Real {
    let hi = a + b;
    let shadow = hi - a;
    let lo = (a - (hi - shadow)) + (b - shadow);
    if hi.is_finite() { Real { hi, lo } } else { Real { hi, lo: 0.0 } }
}

fn two_product(a: f64, b: f64) -> Real {
    let hi = a * b;
    let lo = a.mul_add(b, -hi);
    if hi.is_finite() { Real { hi, lo } } else { Real { hi, lo: 0.0 } }
}

impl Real {
    /// An f64, exactly.
    pub fn from(value: f64) -> Real {
        Real { hi: value, lo: 0.0 }
    }

    /// Exact below 2^106.
    pub fn from_i128(value: i128) -> Real {
        let hi = value as f64;
        // `hi` may round up to 2^127, which no i128 holds.
        if hi.abs() >= 1.7e38 {
            return Real::from(hi);
        }
        two_sum(hi, (value - hi as i128) as f64)
    }

    /// Digits times a power of ten.
    pub fn decimal(digits: &str, exponent: i64) -> Real {
        const KEPT: usize = 34;
        let digits = digits.trim_start_matches('0');
        let kept = &digits[..digits.len().min(KEPT)];
        let mut value = ZERO;
        for byte in kept.bytes() {
            value = value * Real::from(10.0) + Real::from(f64::from(byte - b'0'));
        }
        let exponent = exponent.saturating_add((digits.len() - kept.len()) as i64);
        if kept.is_empty() {
            return ZERO;
        }
        value * Real::from(10.0).powi(exponent)
    }

    /// Neither infinite nor NaN.
    pub fn is_finite(self) -> bool {
        self.hi.is_finite() && self.lo.is_finite()
    }

    /// Without its sign.
    pub fn abs(self) -> Real {
        if self.hi < 0.0 { -self } else { self }
    }

    /// The largest whole number that is not larger.
    pub fn floor(self) -> Real {
        let hi = self.hi.floor();
        if hi == self.hi { two_sum(hi, self.lo.floor()) } else { Real::from(hi) }
    }

    /// Whether it is a whole number, exactly.
    pub fn is_integer(self) -> bool {
        self.is_finite() && self.hi.fract() == 0.0 && self.lo.fract() == 0.0
    }

    /// The root that is not negative; NaN below zero.
    pub fn sqrt(self) -> Real {
        if self.hi <= 0.0 || !self.is_finite() {
            return Real::from(self.hi.sqrt());
        }
        // One Newton step from the f64 root (Karp and Markstein).
        let guess = 1.0 / self.hi.sqrt();
        let root = self.hi * guess;
        let correction = (self - two_product(root, root)).hi * (guess * 0.5);
        two_sum(root, correction)
    }

    /// Whole powers, by squaring.
    pub fn powi(self, exponent: i64) -> Real {
        let mut left = exponent.unsigned_abs();
        let mut base = self;
        let mut value = ONE;
        while left > 0 {
            if left & 1 == 1 {
                value = value * base;
            }
            left >>= 1;
            if left > 0 {
                base = base * base;
            }
        }
        if exponent < 0 { ONE / value } else { value }
    }

    /// Euler's number to this power; from 700 or -700 on what an f64 makes of it, infinite or zero in the end.
    pub fn exp(self) -> Real {
        if self.hi.is_nan() || self.hi.abs() >= 700.0 {
            return Real::from(self.hi.exp());
        }
        // exp(x) = 2^k exp(r)^512, r so small that ten terms of the series are enough; the squarings
        // work on exp - 1, which keeps the low digits.
        let k = (self.hi / std::f64::consts::LN_2).round();
        let r = (self - LN_2 * Real::from(k)) * Real::from(1.0 / 512.0);
        let mut term = r;
        let mut sum = r;
        for n in 2..=10 {
            term = term * r / Real::from(f64::from(n));
            sum = sum + term;
        }
        for _ in 0..9 {
            sum = sum * Real::from(2.0) + sum * sum;
        }
        let scale = 2f64.powi(k as i32);
        let value = sum + ONE;
        Real { hi: value.hi * scale, lo: value.lo * scale }
    }

    /// The natural logarithm: minus infinity at zero, NaN below it.
    pub fn ln(self) -> Real {
        let guess = self.hi.ln();
        if !guess.is_finite() {
            return Real::from(guess);
        }
        // y + x exp(-y) - 1: the error of `y`, squared.
        let mut y = Real::from(guess);
        for _ in 0..2 {
            y = y + self * (-y).exp() - ONE;
        }
        y
    }

    /// Sine and cosine.
    pub fn sin_cos(self) -> (Real, Real) {
        if self.hi.is_nan() || self.hi.abs() >= 1e9 {
            return (Real::from(f64::NAN), Real::from(f64::NAN));
        }
        let quarter = PI * Real::from(0.5);
        let turns = (self.hi / quarter.hi).round();
        let x = self - quarter * Real::from(turns);
        let square = x * x;
        let (mut sin, mut cos) = (x, ONE);
        let (mut s, mut c) = (x, ONE);
        for n in 1..=14 {
            let n = f64::from(n);
            c = -(c * square) / Real::from((2.0 * n - 1.0) * (2.0 * n));
            s = -(s * square) / Real::from((2.0 * n) * (2.0 * n + 1.0));
            cos = cos + c;
            sin = sin + s;
        }
        match turns.rem_euclid(4.0) as u8 {
            0 => (sin, cos),
            1 => (cos, -sin),
            2 => (-sin, -cos),
            _ => (-cos, sin),
        }
    }

    /// The angle of the point (x, y), in (-pi, pi].
    pub fn atan2(y: Real, x: Real) -> Real {
        let radius = (x * x + y * y).sqrt();
        if !radius.is_finite() || radius.hi == 0.0 {
            return Real::from(f64::NAN);
        }
        let (x, y) = (x / radius, y / radius);
        let guess = Real::from(y.hi.atan2(x.hi));
        let (sin, cos) = guess.sin_cos();
        // sin(angle - guess), which is the difference itself up to its third power.
        guess + (y * cos - x * sin)
    }
}

impl std::ops::Add for Real {
    type Output = Real;

    fn add(self, other: Real) -> Real {
        let high = two_sum(self.hi, other.hi);
        let low = two_sum(self.lo, other.lo);
        let first = two_sum(high.hi, high.lo + low.hi);
        two_sum(first.hi, first.lo + low.lo)
    }
}

impl std::ops::Neg for Real {
    type Output = Real;

    fn neg(self) -> Real {
        Real { hi: -self.hi, lo: -self.lo }
    }
}

impl std::ops::Sub for Real {
    type Output = Real;

    fn sub(self, other: Real) -> Real {
        self + -other
    }
}

impl std::ops::Mul for Real {
    type Output = Real;

    fn mul(self, other: Real) -> Real {
        let product = two_product(self.hi, other.hi);
        if !product.hi.is_finite() {
            return product;
        }
        two_sum(product.hi, product.lo + (self.hi * other.lo + self.lo * other.hi))
    }
}

impl std::ops::Div for Real {
    type Output = Real;

    fn div(self, other: Real) -> Real {
        let first = self.hi / other.hi;
        if !first.is_finite() || !other.is_finite() {
            return Real::from(first);
        }
        let rest = self - other * Real::from(first);
        let second = rest.hi / other.hi;
        let rest = rest - other * Real::from(second);
        let third = rest.hi / other.hi;
        two_sum(first, second) + Real::from(third)
    }
}

/// `re + im i`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Complex {
    /// The real part.
    pub re: Real,
    /// The factor of i.
    pub im: Real,
}

impl Complex {
    /// A real number, with zero as its imaginary part.
    pub fn real(re: Real) -> Complex {
        Complex { re, im: ZERO }
    }

    /// Whether the imaginary part is zero.
    pub fn is_real(self) -> bool {
        self.im.hi == 0.0
    }

    /// Whether both parts are finite.
    pub fn is_finite(self) -> bool {
        self.re.is_finite() && self.im.is_finite()
    }

    /// Whether both parts are zero.
    pub fn is_zero(self) -> bool {
        self.re.hi == 0.0 && self.im.hi == 0.0
    }

    /// The distance from zero.
    pub fn norm(self) -> Real {
        if self.is_real() { self.re.abs() } else { (self.re * self.re + self.im * self.im).sqrt() }
    }

    /// The principal logarithm, its imaginary part in (-pi, pi].
    pub fn ln(self) -> Complex {
        if self.is_real() && self.re.hi > 0.0 {
            return Complex::real(self.re.ln());
        }
        Complex { re: self.norm().ln(), im: Real::atan2(self.im, self.re) }
    }

    /// Euler's number to this power.
    pub fn exp(self) -> Complex {
        let size = self.re.exp();
        if self.is_real() {
            return Complex::real(size);
        }
        let (sin, cos) = self.im.sin_cos();
        Complex { re: size * cos, im: size * sin }
    }

    /// Sine and cosine, of complex angles too.
    pub fn sin_cos(self) -> (Complex, Complex) {
        let (sin, cos) = self.re.sin_cos();
        if self.is_real() {
            return (Complex::real(sin), Complex::real(cos));
        }
        let (up, down) = (self.im.exp(), (-self.im).exp());
        let half = Real::from(0.5);
        let (cosh, sinh) = ((up + down) * half, (up - down) * half);
        (Complex { re: sin * cosh, im: cos * sinh }, Complex { re: cos * cosh, im: -(sin * sinh) })
    }

    /// Whole powers, by squaring.
    pub fn powi(self, exponent: i64) -> Complex {
        if self.is_real() {
            return Complex::real(self.re.powi(exponent));
        }
        let mut left = exponent.unsigned_abs();
        let (mut base, mut value) = (self, Complex::real(ONE));
        while left > 0 {
            if left & 1 == 1 {
                value = value * base;
            }
            left >>= 1;
            if left > 0 {
                base = base * base;
            }
        }
        if exponent < 0 { Complex::real(ONE) / value } else { value }
    }
}

impl std::ops::Add for Complex {
    type Output = Complex;

    fn add(self, other: Complex) -> Complex {
        Complex { re: self.re + other.re, im: self.im + other.im }
    }
}

impl std::ops::Sub for Complex {
    type Output = Complex;

    fn sub(self, other: Complex) -> Complex {
        Complex { re: self.re - other.re, im: self.im - other.im }
    }
}

impl std::ops::Neg for Complex {
    type Output = Complex;

    fn neg(self) -> Complex {
        Complex { re: -self.re, im: -self.im }
    }
}

impl std::ops::Mul for Complex {
    type Output = Complex;

    fn mul(self, other: Complex) -> Complex {
        if self.is_real() && other.is_real() {
            return Complex::real(self.re * other.re);
        }
        Complex { re: self.re * other.re - self.im * other.im, im: self.re * other.im + self.im * other.re }
    }
}

impl std::ops::Div for Complex {
    type Output = Complex;

    fn div(self, other: Complex) -> Complex {
        if other.is_real() {
            return Complex { re: self.re / other.re, im: if self.is_real() { ZERO } else { self.im / other.re } };
        }
        let size = other.re * other.re + other.im * other.im;
        let over = self * Complex { re: other.re, im: -other.im };
        Complex { re: over.re / size, im: over.im / size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: Real, b: Real) {
        let difference = (a - b).abs().hi;
        assert!(difference <= 1e-29 * b.abs().hi.max(1.0), "{a:?} {b:?}: off by {difference:e}");
    }

    #[test]
    fn functions_undo_one_another_to_29_digits() {
        for value in [0.3, 1.0, 2.5, 17.0, 123.456] {
            let x = Real::from(value) + Real::from(1e-18);
            near(x.ln().exp() / x, ONE);
            near(x.sqrt() * x.sqrt() / x, ONE);
            let (sin, cos) = x.sin_cos();
            near(sin * sin + cos * cos, ONE);
            let angle = Real::from(value.min(3.0));
            let (sin, cos) = angle.sin_cos();
            near(Real::atan2(sin, cos), angle);
        }
    }

    #[test]
    fn known_constants_come_out_to_29_digits() {
        near(Real::from(2.0).ln(), LN_2);
        near(ONE.exp(), E);
        near(Real::atan2(ONE, ONE) * Real::from(4.0), PI);
        near(Real::decimal("31415926535897932384626433832795028841", -37), PI);
    }

    #[test]
    fn overflow_is_infinite_and_not_a_panic() {
        assert!(!Real::from(10.0).powi(999_999_999).is_finite());
        assert_eq!(Real::from(10.0).powi(-999_999_999).hi, 0.0);
        assert!(!Real::from(1e6).exp().is_finite());
    }
}
