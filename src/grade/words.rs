//! Words that mean numbers or units.

/// Exact measure of a unit: dimensions and the factor to the base unit of its kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// Powers of length, time, mass, money, angle, volume of liquids counted as length^3.
    pub dims: [i32; 5],
    /// Numerator and denominator.
    pub scale: (i128, i128),
    /// A thing counted ("apples"); compared by name.
    pub thing: Option<String>,
}

impl Unit {
    /// A bare number's.
    pub const NONE: Unit = Unit { dims: [0; 5], scale: (1, 1), thing: None };

    /// `self * other^power`; `None` on overflow.
    pub fn times(&self, other: &Unit, power: i32) -> Option<Unit> {
        let mut unit = self.clone();
        for (mine, theirs) in unit.dims.iter_mut().zip(other.dims) {
            *mine += theirs.checked_mul(power)?;
        }
        let (n, d) = if power < 0 { (other.scale.1, other.scale.0) } else { other.scale };
        for _ in 0..power.unsigned_abs().min(9) {
            unit.scale = (unit.scale.0.checked_mul(n)?, unit.scale.1.checked_mul(d)?);
        }
        if unit.thing.is_none() {
            unit.thing.clone_from(&other.thing);
        }
        Some(unit)
    }
}

/// What a unit word or abbreviation means, plural or not, in lower case.
pub fn unit(word: &str) -> Option<Unit> {
    let exact = known(word).or_else(|| known(word.strip_suffix('s')?));
    exact.or_else(|| known(word.strip_suffix("es")?))
}

fn known(word: &str) -> Option<Unit> {
    let of = |kind: usize, n: i128, d: i128| {
        let mut dims = [0; 5];
        dims[kind] = 1;
        Some(Unit { dims, scale: (n, d), thing: None })
    };
    let volume = |n: i128, d: i128| Some(Unit { dims: [3, 0, 0, 0, 0], scale: (n, d), thing: None });
    match word {
        "m" | "meter" | "metre" => of(0, 1, 1),
        "km" | "kilometer" | "kilometre" => of(0, 1000, 1),
        "cm" | "centimeter" | "centimetre" => of(0, 1, 100),
        "mm" | "millimeter" | "millimetre" => of(0, 1, 1000),
        "in" | "inch" => of(0, 254, 10_000),
        "ft" | "foot" | "feet" => of(0, 3048, 10_000),
        "yd" | "yard" => of(0, 9144, 10_000),
        "mi" | "mile" => of(0, 1_609_344, 1000),
        "s" | "sec" | "second" => of(1, 1, 1),
        "min" | "minute" => of(1, 60, 1),
        "h" | "hr" | "hour" => of(1, 3600, 1),
        "day" => of(1, 86_400, 1),
        "week" => of(1, 604_800, 1),
        "year" | "yr" => of(1, 31_536_000, 1),
        "g" | "gram" => of(2, 1, 1000),
        "kg" | "kilogram" => of(2, 1, 1),
        "mg" | "milligram" => of(2, 1, 1_000_000),
        "lb" | "pound" => of(2, 45_359_237, 100_000_000),
        "oz" | "ounce" => of(2, 45_359_237, 1_600_000_000),
        "$" | "dollar" | "usd" | "buck" => of(3, 1, 1),
        "cent" | "¢" | "penny" | "pennie" => of(3, 1, 100),
        "liter" | "litre" | "l" => volume(1, 1000),
        "ml" | "milliliter" => volume(1, 1_000_000),
        "mph" => Some(Unit { dims: [1, -1, 0, 0, 0], scale: (1_609_344, 3_600_000), thing: None }),
        "kph" | "kmh" => Some(Unit { dims: [1, -1, 0, 0, 0], scale: (1000, 3600), thing: None }),
        "degree" | "deg" => of(4, 1, 1),
        "unit" => Some(Unit::NONE),
        _ => None,
    }
}

/// A number written out: `twelve`, `twenty-one` word by word, in lower case.
pub fn number(word: &str) -> Option<u64> {
    const UPTO_NINETEEN: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 8] = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let small = UPTO_NINETEEN.iter().position(|w| *w == word);
    let tens = || TENS.iter().position(|w| *w == word).map(|at| at * 10 + 20);
    small.or_else(tens).map(|n| n as u64)
}

/// Several words as one number: `twenty one`, `two hundred`.
pub fn numbers(words: &[String]) -> Option<u64> {
    let mut total = 0u64;
    let mut current = 0u64;
    let mut any = false;
    for word in words.iter().flat_map(|w| w.split('-')) {
        match word {
            "hundred" if any => current = current.checked_mul(100)?,
            "thousand" if any => {
                total = total.checked_add(current)?.checked_mul(1000)?;
                current = 0;
            }
            "and" if any => {}
            _ => {
                let n = number(word)?;
                // "three four" is no number.
                if !current.is_multiple_of(10) || (n >= 10 && !current.is_multiple_of(100)) {
                    return None;
                }
                current = current.checked_add(n)?;
                any = true;
            }
        }
    }
    any.then_some(total + current)
}
