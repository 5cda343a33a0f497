//! Expressions at points, to 31 digits: for what no rule on their form settles.

use crate::grade::modular;
use crate::grade::number::{Complex, E, ONE, PI, Real, ZERO};
use crate::grade::parse::{Function, Node};
use crate::grade::verdict::Ruling;
use crate::grade::verdict::Verdict::{self, Correct, Undecided, Wrong};

/// Points tried; some fall outside the domain.
pub(super) const POINTS: u64 = 7;

pub(super) fn sampled(gold: &Node, given: &Node) -> Ruling {
    const RULE: &str = "31 digits at several points";
    let free = gold.has_variables() || given.has_variables();
    let mut agreed = 0;
    for point in 0..if free { POINTS } else { 1 } {
        let a = Sample::new(point).value(gold);
        let b = Sample::new(point).value(given);
        let (Some(a), Some(b)) = (a, b) else { continue };
        match (a.is_finite(), b.is_finite()) {
            (true, true) => {}
            // Beyond 10^308 and not undefined: certainly another number.
            (true, false) if b.re.hi.is_infinite() && b.is_real() && !free => return (Wrong, "size"),
            (false, true) if a.re.hi.is_infinite() && a.is_real() && !free => return (Wrong, "size"),
            _ => continue,
        }
        match close(a, b) {
            Correct => agreed += 1,
            verdict => return (verdict, RULE),
        }
    }
    (if agreed >= if free { 3 } else { 1 } { Correct } else { Undecided }, RULE)
}

/// Equal to 20 digits, different in the first 15, or too near to call.
pub(super) fn close(a: Complex, b: Complex) -> Verdict {
    let size = a.norm().hi.max(b.norm().hi);
    let difference = (a - b).norm().hi;
    if !(difference.is_finite() && size.is_finite()) {
        return Undecided;
    }
    // A value that underflowed says nothing, and what should be zero is known to 1e-24 at best.
    if size < 1e-24 {
        return if a.is_zero() == b.is_zero() || size > 1e-28 { Undecided } else { Correct };
    }
    if a.is_zero() || b.is_zero() {
        return if size <= 1e-22 { Correct } else { Wrong };
    }
    match difference / size {
        d if d <= 1e-20 => Correct,
        d if d >= 1e-15 => Wrong,
        _ => Undecided,
    }
}

/// Values at one point.
pub(super) struct Sample {
    point: u64,
    budget: u32,
    bound: Vec<(String, i64)>,
}

impl Sample {
    pub(super) fn new(point: u64) -> Sample {
        Sample { point, budget: 20_000, bound: Vec::new() }
    }

    /// Small ones, negative ones, large ones: a sign or an absolute value shows at one of them.
    fn variable(&self, name: &str) -> Real {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ (self.point + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for byte in name.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let unit = (hash >> 11) as f64 / (1u64 << 53) as f64;
        let value = match self.point % 4 {
            0 => 1.0 + unit,
            1 => -0.2 - 2.5 * unit,
            2 => 0.05 + 0.9 * unit,
            _ => 3.0 + 7.0 * unit,
        };
        Real::from(value)
    }

    pub(super) fn value(&mut self, node: &Node) -> Option<Complex> {
        self.budget = self.budget.checked_sub(1)?;
        let real = Complex::real;
        Some(match node {
            Node::Number(digits, exponent) => real(Real::decimal(digits, *exponent)),
            Node::Variable(name) => match self.bound.iter().rev().find(|(bound, _)| bound == name) {
                Some((_, value)) => real(Real::from_i128(i128::from(*value))),
                None => real(self.variable(name)),
            },
            Node::Pi => real(PI),
            Node::Euler => real(E),
            Node::Imaginary => Complex { re: ZERO, im: ONE },
            Node::Sum(parts) => {
                let mut sum = real(ZERO);
                for part in parts {
                    sum = sum + self.value(part)?;
                }
                sum
            }
            Node::Product(parts) => {
                let mut product = real(ONE);
                for part in parts {
                    product = product * self.value(part)?;
                }
                product
            }
            Node::Negative(inner) => -self.value(inner)?,
            Node::Quotient(a, b) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                if b.is_zero() {
                    return None;
                }
                a / b
            }
            Node::Power(base, exponent) => self.power(base, exponent)?,
            Node::Degrees(inner) => self.value(inner)? * real(PI / Real::from(180.0)),
            Node::Log(base, argument) => {
                let argument = self.value(argument)?;
                if argument.is_zero() {
                    return None;
                }
                let log = argument.ln();
                match &**base {
                    Node::Euler => log,
                    base => {
                        let base = self.value(base)?.ln();
                        if base.is_zero() {
                            return None;
                        }
                        log / base
                    }
                }
            }
            Node::Binomial(n, k) => {
                let (n, k) = (self.integer(n)?, self.integer(k)?);
                if k < 0 || k > n {
                    return None;
                }
                let k = k.min(n - k);
                self.budget = self.budget.checked_sub(u32::try_from(k).ok()?)?;
                let factor = |value: Real, i: i64| {
                    value * Real::from_i128(i128::from(n - i)) / Real::from_i128(i128::from(i + 1))
                };
                real((0..k).fold(ONE, factor))
            }
            Node::Series { product, variable, from, to, body } => {
                let (from, to) = (self.integer(from)?, self.integer(to)?);
                if to.checked_sub(from)? > 2_000 {
                    return None;
                }
                let mut whole = real(if *product { ONE } else { ZERO });
                for at in from..=to {
                    self.bound.push((variable.clone(), at));
                    let term = self.value(body);
                    self.bound.pop();
                    whole = if *product { whole * term? } else { whole + term? };
                }
                whole
            }
            Node::Apply(function, inner) => {
                let x = self.value(inner)?;
                apply(*function, x)?
            }
            Node::Infinity | Node::Either(..) | Node::Matrix(_) => return None,
        })
    }

    fn integer(&mut self, node: &Node) -> Option<i64> {
        let value = self.value(node)?;
        (value.is_real() && value.re.is_integer() && value.re.hi.abs() < 1e15).then_some(value.re.hi as i64)
    }

    fn power(&mut self, base: &Node, exponent: &Node) -> Option<Complex> {
        let exact = modular::rational(exponent);
        let base = self.value(base)?;
        if let Some((n, d)) = exact {
            let n = i64::try_from(n).ok()?;
            if base.is_zero() {
                return match n {
                    0 => Some(Complex::real(ONE)),
                    n if n < 0 => None,
                    _ => Some(base),
                };
            }
            match d {
                1 => return Some(base.powi(n)),
                2 if base.is_real() => {
                    let root = base.re.abs().sqrt();
                    let root = if base.re.hi < 0.0 { Complex { re: ZERO, im: root } } else { Complex::real(root) };
                    return Some(root.powi(n));
                }
                // The real root of a negative number, as in school.
                d if d % 2 == 1 && base.is_real() && base.re.hi < 0.0 => {
                    let size = (base.re.abs().ln() * Real::from_i128(n.into()) / Real::from_i128(d)).exp();
                    return Some(Complex::real(if n % 2 == 0 { size } else { -size }));
                }
                _ => {}
            }
        }
        let exponent = self.value(exponent)?;
        if base.is_zero() {
            return (exponent.is_real() && exponent.re.hi > 0.0).then_some(base);
        }
        // A whole exponent too large to be a literal, as in 9^(9^9).
        if exponent.is_real() && exponent.re.is_integer() && exponent.re.hi.abs() < 1e15 {
            return Some(base.powi(exponent.re.hi as i64));
        }
        Some((base.ln() * exponent).exp())
    }
}

fn apply(function: Function, x: Complex) -> Option<Complex> {
    let real = Complex::real;
    let one = real(ONE);
    let over = |a: Complex, b: Complex| if b.norm().hi < 1e-25 { None } else { Some(a / b) };
    let arc = |x: Complex| (x.is_real() && x.re.abs().hi <= 1.0).then_some(x.re);
    Some(match function {
        Function::Sin => x.sin_cos().0,
        Function::Cos => x.sin_cos().1,
        Function::Tan => over(x.sin_cos().0, x.sin_cos().1)?,
        Function::Cot => over(x.sin_cos().1, x.sin_cos().0)?,
        Function::Sec => over(one, x.sin_cos().1)?,
        Function::Csc => over(one, x.sin_cos().0)?,
        Function::Arcsin => {
            let x = arc(x)?;
            real(Real::atan2(x, (ONE - x * x).sqrt()))
        }
        Function::Arccos => {
            let x = arc(x)?;
            real(Real::atan2((ONE - x * x).sqrt(), x))
        }
        Function::Arctan if x.is_real() => real(Real::atan2(x.re, ONE)),
        Function::Exp => x.exp(),
        Function::Abs => real(x.norm()),
        Function::Floor if x.is_real() => real(x.re.floor()),
        Function::Ceil if x.is_real() => real(-(-x.re).floor()),
        Function::Factorial if x.is_real() && x.re.is_integer() && x.re.hi >= 0.0 => {
            if x.re.hi > 171.0 {
                return Some(real(Real::from(f64::INFINITY)));
            }
            real((1..=x.re.hi as i64).fold(ONE, |v, i| v * Real::from_i128(i.into())))
        }
        _ => return None,
    })
}
