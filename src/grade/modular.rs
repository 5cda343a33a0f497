//! Exact identity of rational expressions by evaluation in finite fields.
//!
//! Two rational functions with rational coefficients are equal if they agree at a random point
//! modulo a random large prime, up to a chance of about degree / 2^61 (Schwartz 1980, Zippel 1979);
//! two primes make that the square. Powers with huge exponents cost nothing: a^n is taken modulo
//! p and its exponent modulo p - 1, so 9^(9^9) is as easy as 9^2. `pi` and `e` are letters here (no
//! rational relation ties them to anything that reaches this module); `i` is a root of -1, for
//! which both primes are 1 modulo 4.
//!
//! Points are fixed by the names of the letters: the same question has the same answer for ever.

use crate::grade::parse::{Function, Node};

/// Both are prime, 1 modulo 4, and just below 2^61.
pub const PRIMES: [u64; 2] = [2_305_843_009_213_693_921, 2_305_843_009_213_693_693];
/// A root of -1 modulo each.
const ROOTS: [u64; 2] = [583_529_827_753_931_384, 966_685_122_347_009_555];
/// The largest factorial and binomial that is multiplied out, and the longest sum.
const FACTORIAL: u64 = 20_000;
const SERIES: i64 = 2_000;

/// Why an expression has no value here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// Not a rational expression, or past a bound.
    Outside,
    /// A division by zero (for all values of the letters, almost surely).
    Undefined,
}

use Without::{Outside, Undefined};

/// Evaluates at one point modulo one prime.
pub struct Field {
    which: usize,
    /// Other points for other draws.
    point: u64,
    /// Nodes still allowed to be looked at.
    budget: u32,
    /// Values of the variables of series.
    bound: Vec<(String, i64)>,
}

impl Field {
    /// The primes are numbered 0 and 1 (`which` is taken modulo 2). The same `point` gives the same letters the same values.
    pub fn new(which: usize, point: u64) -> Field {
        Field { which: which % 2, point, budget: 100_000, bound: Vec::new() }
    }

    fn prime(&self) -> u64 {
        PRIMES[self.which]
    }

    fn letter(&self, name: &str) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ self.point.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for byte in name.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        // The finisher of splitmix64: similar names land far apart.
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (hash ^ (hash >> 31)) % self.prime()
    }

    /// Takes `cost` off the budget; a division costs about sixty products.
    fn spend(&mut self, cost: u64) -> Result<(), Without> {
        let cost = u32::try_from(cost).map_err(|_| Outside)?;
        self.budget = self.budget.checked_sub(cost).ok_or(Outside)?;
        Ok(())
    }

    /// The value of `node` below the prime.
    pub fn value(&mut self, node: &Node) -> Result<u64, Without> {
        self.spend(1)?;
        let p = self.prime();
        match node {
            Node::Number(digits, exponent) => {
                self.spend(digits.len() as u64 / 16)?;
                let mut value = 0;
                for byte in digits.bytes() {
                    value = add(multiply(value, 10, p), u64::from(byte - b'0'), p);
                }
                let scale = power(10, exponent.unsigned_abs(), p);
                if *exponent < 0 { divide(value, scale, p) } else { Ok(multiply(value, scale, p)) }
            }
            Node::Variable(name) => match self.bound.iter().rev().find(|(bound, _)| bound == name) {
                Some((_, value)) => Ok(signed(*value, p)),
                None => Ok(self.letter(name)),
            },
            Node::Pi => Ok(self.letter("the number pi")),
            Node::Euler => Ok(self.letter("the number e")),
            Node::Imaginary => Ok(ROOTS[self.which]),
            Node::Sum(parts) => parts.iter().try_fold(0, |sum, part| Ok(add(sum, self.value(part)?, p))),
            Node::Product(parts) => {
                parts.iter().try_fold(1, |product, part| Ok(multiply(product, self.value(part)?, p)))
            }
            Node::Negative(inner) => Ok((p - self.value(inner)?) % p),
            Node::Quotient(a, b) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                self.spend(64)?;
                divide(a, b, p)
            }
            Node::Power(base, exponent) => self.raise(base, exponent),
            Node::Binomial(n, k) => {
                let (n, k) = (self.small(n)?, self.small(k)?);
                if k < 0 || k > n {
                    return if n >= 0 { Ok(0) } else { Err(Outside) };
                }
                let (n, k) = (n as u64, (k as u64).min((n - k) as u64));
                if k > FACTORIAL {
                    return Err(Outside);
                }
                self.spend(k)?;
                let above = (0..k).fold(1, |v, i| multiply(v, (n - i) % p, p));
                let below = (1..=k).fold(1, |v, i| multiply(v, i, p));
                divide(above, below, p)
            }
            Node::Apply(Function::Factorial, inner) => {
                let n = self.small(inner)?;
                if !(0..=FACTORIAL as i64).contains(&n) {
                    return Err(Outside);
                }
                self.spend(n as u64 / 2)?;
                Ok((1..=n as u64).fold(1, |v, i| multiply(v, i, p)))
            }
            Node::Series { product, variable, from, to, body } => {
                let (from, to) = (self.small(from)?, self.small(to)?);
                if to.checked_sub(from).is_none_or(|terms| terms >= SERIES) {
                    return Err(Outside);
                }
                let mut value = u64::from(*product);
                for at in from..=to {
                    self.bound.push((variable.clone(), at));
                    let term = self.value(body);
                    self.bound.pop();
                    value = if *product { multiply(value, term?, p) } else { add(value, term?, p) };
                }
                Ok(value)
            }
            Node::Infinity
            | Node::Apply(..)
            | Node::Log(..)
            | Node::Either(..)
            | Node::Matrix(_)
            | Node::Degrees(_) => Err(Outside),
        }
    }

    fn raise(&mut self, base: &Node, exponent: &Node) -> Result<u64, Without> {
        let p = self.prime();
        if let Some((n, d)) = self.rational(exponent) {
            let value = self.value(base)?;
            if d != 1 {
                return Err(Outside);
            }
            let raised = power(value, (n.unsigned_abs() % u128::from(p - 1)) as u64, p);
            if value == 0 {
                return match n {
                    0 => Ok(1),
                    n if n < 0 => Err(Undefined),
                    _ => Ok(0),
                };
            }
            return if n < 0 { divide(1, raised, p) } else { Ok(raised) };
        }
        let exponent = self.tower(exponent, p - 1)?;
        let value = self.value(base)?;
        if value == 0 { Err(Outside) } else { Ok(power(value, exponent, p)) }
    }

    /// A natural number too large to write out, modulo `m`: digits, sums, products and powers only.
    fn tower(&mut self, node: &Node, m: u64) -> Result<u64, Without> {
        self.spend(1)?;
        match node {
            Node::Number(digits, exponent) if *exponent == 0 => {
                Ok(digits.bytes().fold(0, |v, byte| add(multiply(v, 10, m), u64::from(byte - b'0'), m)))
            }
            Node::Sum(parts) => parts.iter().try_fold(0, |v, part| Ok(add(v, self.tower(part, m)?, m))),
            Node::Product(parts) => parts.iter().try_fold(1, |v, part| Ok(multiply(v, self.tower(part, m)?, m))),
            Node::Power(base, exponent) => {
                let exponent = self.small(exponent)?;
                let exponent = u64::try_from(exponent).map_err(|_| Outside)?;
                Ok(power(self.tower(base, m)?, exponent, m))
            }
            _ => Err(Outside),
        }
    }

    fn small(&mut self, node: &Node) -> Result<i64, Without> {
        match self.rational(node) {
            Some((n, 1)) => i64::try_from(n).map_err(|_| Outside),
            _ => Err(Outside),
        }
    }

    /// The exact value of an expression without letters, if it fits.
    fn rational(&mut self, node: &Node) -> Option<(i128, i128)> {
        self.budget = self.budget.checked_sub(1)?;
        if let Node::Variable(name) = node {
            return self.bound.iter().rev().find(|(bound, _)| bound == name).map(|(_, v)| (i128::from(*v), 1));
        }
        combine(node, &mut |inner| self.rational(inner))
    }
}

/// The exact value of an expression of whole numbers, decimals and the four operations; `None` if
/// it is something else, does not fit into 127 bits or divides by zero. Lowest terms, positive denominator.
pub fn rational(node: &Node) -> Option<(i128, i128)> {
    combine(node, &mut rational)
}

fn combine(node: &Node, value: &mut dyn FnMut(&Node) -> Option<(i128, i128)>) -> Option<(i128, i128)> {
    match node {
        Node::Number(digits, exponent) => {
            let digits = digits.trim_start_matches('0');
            if digits.len() > 36 || exponent.unsigned_abs() > 36 {
                return None;
            }
            let n: i128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
            let scale = 10_i128.checked_pow(exponent.unsigned_abs() as u32)?;
            if *exponent < 0 { lowest(n, scale) } else { Some((n.checked_mul(scale)?, 1)) }
        }
        Node::Negative(inner) => value(inner).map(|(n, d)| (-n, d)),
        Node::Sum(parts) => {
            let mut sum = (0_i128, 1_i128);
            for part in parts {
                let (n, d) = value(part)?;
                let above = sum.0.checked_mul(d)?.checked_add(n.checked_mul(sum.1)?)?;
                sum = lowest(above, sum.1.checked_mul(d)?)?;
            }
            Some(sum)
        }
        Node::Product(parts) => {
            let mut product = (1_i128, 1_i128);
            for part in parts {
                let (n, d) = value(part)?;
                product = lowest(product.0.checked_mul(n)?, product.1.checked_mul(d)?)?;
            }
            Some(product)
        }
        Node::Quotient(a, b) => {
            let ((a, b), (c, d)) = (value(a)?, value(b)?);
            lowest(a.checked_mul(d)?, b.checked_mul(c)?)
        }
        Node::Power(base, exponent) => {
            let ((a, b), (n, 1)) = (value(base)?, value(exponent)?) else { return None };
            let n = i32::try_from(n).ok()?;
            let (a, b) = if n < 0 { (b, a) } else { (a, b) };
            lowest(a.checked_pow(n.unsigned_abs())?, b.checked_pow(n.unsigned_abs())?)
        }
        _ => None,
    }
}

fn lowest(n: i128, d: i128) -> Option<(i128, i128)> {
    // One bit of room keeps every negation below safe.
    const LIMIT: i128 = i128::MAX / 2;
    if d == 0 || n.checked_abs()? > LIMIT || d.checked_abs()? > LIMIT {
        return None;
    }
    let (mut a, mut b) = (n.abs(), d.abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let sign = if d < 0 { -1 } else { 1 };
    Some((sign * n / a.max(1), sign * d / a.max(1)))
}

fn add(a: u64, b: u64, p: u64) -> u64 {
    ((u128::from(a) + u128::from(b)) % u128::from(p)) as u64
}

fn multiply(a: u64, b: u64, p: u64) -> u64 {
    (u128::from(a) * u128::from(b) % u128::from(p)) as u64
}

fn power(base: u64, mut exponent: u64, p: u64) -> u64 {
    let (mut base, mut value) = (base % p, 1 % p);
    while exponent > 0 {
        if exponent & 1 == 1 {
            value = multiply(value, base, p);
        }
        base = multiply(base, base, p);
        exponent >>= 1;
    }
    value
}

fn divide(a: u64, b: u64, p: u64) -> Result<u64, Without> {
    if b == 0 { Err(Undefined) } else { Ok(multiply(a, power(b, p - 2, p), p)) }
}

fn signed(value: i64, p: u64) -> u64 {
    let size = value.unsigned_abs() % p;
    if value < 0 { (p - size) % p } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_moduli_are_prime_by_fermat_and_have_their_root_of_minus_one() {
        for (p, root) in PRIMES.into_iter().zip(ROOTS) {
            for base in [2, 3, 5, 7, 11, 13] {
                assert_eq!(power(base, p - 1, p), 1);
            }
            assert_eq!(multiply(root, root, p), p - 1);
        }
    }

    #[test]
    fn exact_values_are_in_lowest_terms() {
        let half = Node::Number("50".into(), -2);
        assert_eq!(rational(&half), Some((1, 2)));
        assert_eq!(rational(&Node::int(3).over(Node::int(-6))), Some((-1, 2)));
        assert_eq!(rational(&Node::int(3).over(Node::int(0))), None);
    }
}
