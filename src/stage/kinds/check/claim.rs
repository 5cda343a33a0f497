//! The language of claims, and what a claim comes to over readings.
//!
//! ```text
//! claim     = sum ( ">" | ">=" | "<" | "<=" | "==" ) sum
//! sum       = term { ( "+" | "-" ) term }
//! term      = number | "-" term | "(" sum ")" | aggregate
//! aggregate = ( "mean" | "min" | "max" | "count" ) "(" metric [ "[" axis "=" value { "," axis "=" value } "]" ] ")"
//! ```
//!
//! Each side is a linear combination of readings (a `min` or `max` is the reading that attains it),
//! so the variance of left minus right follows from the coefficients, also when a reading stands on
//! both sides. A reading's own standard error comes from its 95 % interval; readings of the same problems go up
//! and down together as far as their outcomes show, others are taken as independent.

use crate::problem::Problem;
use crate::stage::share::readings::{self, Reading};
use std::collections::BTreeMap;
use std::fmt;

/// Both sides of a judged claim.
pub struct Verdict {
    /// Whether the comparison is true.
    pub holds: bool,
    /// What the left side comes to.
    pub left: f64,
    /// What the right side comes to.
    pub right: f64,
    /// Half the 95 % interval of left minus right (normal approximation); `None` where a reading
    /// that counts carries no interval.
    pub half_width: Option<f64>,
}

impl Verdict {
    /// Whether the difference is no larger than its 95 % interval.
    pub fn within_noise(&self) -> Option<bool> {
        self.half_width.map(|half| (self.left - self.right).abs() <= half)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let difference = self.left - self.right;
        write!(f, "left {}, right {}, difference {}", shown(self.left), shown(self.right), shown(difference))?;
        match (self.half_width, self.within_noise()) {
            (Some(half), Some(true)) => write!(f, " ± {} (95 %): within noise", shown(half)),
            (Some(half), _) => write!(f, " ± {} (95 %)", shown(half)),
            (None, _) => write!(f, " (its uncertainty is not known)"),
        }
    }
}

/// Four digits that matter, without trailing zeros.
fn shown(value: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let decimals = (3 - value.abs().log10().floor() as i32).clamp(0, 12) as usize;
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// A parsed claim.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    left: Sum,
    comparison: Comparison,
    right: Sum,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Equal,
}

/// Signed terms.
#[derive(Debug, Clone, PartialEq)]
struct Sum(Vec<(f64, Term)>);

#[derive(Debug, Clone, PartialEq)]
enum Term {
    Number(f64),
    Aggregate(Aggregate),
    Group(Sum),
}

/// A function of a metric over the readings that bear these labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Aggregate {
    function: Function,
    metric: String,
    /// Axis and value, all of which a reading has.
    pub only: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    Mean,
    Min,
    Max,
    Count,
}

/// Where and why a text is not a claim.
#[derive(Debug, PartialEq, Eq)]
pub struct NotAClaim {
    /// 1-based, in characters.
    pub column: usize,
    pub message: String,
}

impl fmt::Display for NotAClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at character {}", self.message, self.column)
    }
}

/// The value of a side: a constant and a coefficient for each reading that enters.
struct Linear {
    value: f64,
    coefficients: BTreeMap<usize, f64>,
    /// Metric of each reading that enters, for its interval.
    metric: BTreeMap<usize, String>,
}

impl Claim {
    /// # Errors
    /// The first place at which the text stops being a claim.
    pub fn parse(text: &str) -> Result<Claim, NotAClaim> {
        let mut parser = Parser { letters: text.chars().collect(), at: 0, depth: 0 };
        let left = parser.sum()?;
        let comparison = parser.comparison()?;
        let right = parser.sum()?;
        parser.space();
        match parser.at == parser.letters.len() {
            true => Ok(Claim { left, comparison, right }),
            false => Err(parser.expected("the end, `+` or `-`")),
        }
    }

    /// All of both sides, from left to right.
    pub fn aggregates(&self) -> Vec<&Aggregate> {
        fn walk<'a>(sum: &'a Sum, found: &mut Vec<&'a Aggregate>) {
            for (_, term) in &sum.0 {
                match term {
                    Term::Number(_) => {}
                    Term::Aggregate(aggregate) => found.push(aggregate),
                    Term::Group(inner) => walk(inner, found),
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.left, &mut found);
        walk(&self.right, &mut found);
        found
    }

    /// What the claim comes to over these readings.
    ///
    /// # Errors
    /// `check::nothing_selected`, `check::no_number`.
    pub fn judge(&self, readings: &[Reading]) -> Result<Verdict, Problem> {
        let (left, right) = (self.left.value(readings)?, self.right.value(readings)?);
        let (a, b) = (left.value, right.value);
        let holds = match self.comparison {
            Comparison::Greater => a > b,
            Comparison::GreaterEqual => a >= b,
            Comparison::Less => a < b,
            Comparison::LessEqual => a <= b,
            Comparison::Equal => a == b,
        };
        let mut difference = left.coefficients;
        for (reading, coefficient) in right.coefficients {
            *difference.entry(reading).or_default() -= coefficient;
        }
        let mut metric = left.metric;
        metric.extend(right.metric);
        let weighted: Option<Vec<(&Reading, f64)>> = difference
            .iter()
            .map(|(at, coefficient)| Some((&readings[*at], coefficient * readings[*at].half_width(&metric[at])?)))
            .collect();
        let variance = weighted.map(|weighted| {
            let pairs =
                weighted.iter().enumerate().flat_map(|(i, one)| weighted[..i].iter().map(move |two| (one, two)));
            let together = |((one, a), (two, b)): (&(&Reading, f64), &(&Reading, f64))| {
                let outcomes = one.outcomes.as_ref().zip(two.outcomes.as_ref());
                2.0 * a * b * outcomes.and_then(|(one, two)| readings::correlation(one, two)).unwrap_or(0.0)
            };
            let alone: f64 = weighted.iter().map(|(_, half)| half * half).sum();
            (alone + pairs.map(together).sum::<f64>()).max(0.0)
        });
        // Half widths scale like standard errors, so the factor 1.96 need not be taken out and put back.
        let half_width = variance.filter(|_| !difference.is_empty()).map(f64::sqrt);
        Ok(Verdict { holds, left: a, right: b, half_width })
    }
}

impl Sum {
    fn value(&self, readings: &[Reading]) -> Result<Linear, Problem> {
        let mut sum = Linear { value: 0.0, coefficients: BTreeMap::new(), metric: BTreeMap::new() };
        for (sign, term) in &self.0 {
            let part = match term {
                Term::Number(number) => {
                    sum.value += sign * number;
                    continue;
                }
                Term::Group(inner) => inner.value(readings)?,
                Term::Aggregate(aggregate) => aggregate.value(readings)?,
            };
            sum.value += sign * part.value;
            for (reading, coefficient) in part.coefficients {
                *sum.coefficients.entry(reading).or_default() += sign * coefficient;
            }
            sum.metric.extend(part.metric);
        }
        Ok(sum)
    }
}

impl Aggregate {
    fn value(&self, readings: &[Reading]) -> Result<Linear, Problem> {
        let selected: Vec<usize> = (0..readings.len())
            .filter(|at| {
                self.only.iter().all(|(name, value)| readings[*at].label(name).as_deref() == Some(value.as_str()))
            })
            .collect();
        if self.function == Function::Count {
            let count = selected.iter().filter(|at| readings[**at].number(&self.metric).is_some()).count();
            return Ok(Linear { value: count as f64, coefficients: BTreeMap::new(), metric: BTreeMap::new() });
        }
        if selected.is_empty() {
            return Err(Problem::new("check::nothing_selected", format!("`{self}` selects nothing"))
                .note(readings::names(readings)));
        }
        let mut values = Vec::with_capacity(selected.len());
        for at in &selected {
            let value = readings[*at].number(&self.metric).filter(|value| !value.is_nan());
            values.push(value.ok_or_else(|| {
                Problem::new("check::no_number", format!("`{}` has no number `{}`", readings[*at].cell, self.metric))
                    .note(readings::names(readings))
            })?);
        }
        let first = |better: fn(&f64, &f64) -> bool| {
            (1..values.len()).fold(0, |best, at| if better(&values[at], &values[best]) { at } else { best })
        };
        let (value, weights): (f64, Vec<(usize, f64)>) = match self.function {
            Function::Min | Function::Max => {
                let at = first(if self.function == Function::Min { f64::lt } else { f64::gt });
                (values[at], vec![(selected[at], 1.0)])
            }
            Function::Mean | Function::Count => {
                let share = 1.0 / values.len() as f64;
                (values.iter().sum::<f64>() * share, selected.iter().map(|at| (*at, share)).collect())
            }
        };
        let metric = weights.iter().map(|(at, _)| (*at, self.metric.clone())).collect();
        Ok(Linear { value, coefficients: weights.into_iter().collect(), metric })
    }
}

impl fmt::Display for Aggregate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let function = match self.function {
            Function::Mean => "mean",
            Function::Min => "min",
            Function::Max => "max",
            Function::Count => "count",
        };
        write!(f, "{function}({}", self.metric)?;
        if !self.only.is_empty() {
            let only: Vec<String> = self.only.iter().map(|(axis, value)| format!("{axis}={}", quoted(value))).collect();
            write!(f, "[{}]", only.join(", "))?;
        }
        f.write_str(")")
    }
}

fn quoted(value: &str) -> String {
    match !value.is_empty() && value.chars().all(is_bare) {
        true => value.to_string(),
        false => format!("\"{value}\""),
    }
}

/// What a value may hold without quotes.
fn is_bare(letter: char) -> bool {
    letter.is_alphanumeric() || matches!(letter, '_' | '-' | '.' | ':' | '/')
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (sign, term)) in self.0.iter().enumerate() {
            match (at, *sign < 0.0) {
                (0, false) => {}
                (0, true) => f.write_str("-")?,
                (_, false) => f.write_str(" + ")?,
                (_, true) => f.write_str(" - ")?,
            }
            match term {
                Term::Number(number) => write!(f, "{number}")?,
                Term::Aggregate(aggregate) => write!(f, "{aggregate}")?,
                Term::Group(inner) => write!(f, "({inner})")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let comparison = match self.comparison {
            Comparison::Greater => ">",
            Comparison::GreaterEqual => ">=",
            Comparison::Less => "<",
            Comparison::LessEqual => "<=",
            Comparison::Equal => "==",
        };
        write!(f, "{} {comparison} {}", self.left, self.right)
    }
}

struct Parser {
    letters: Vec<char>,
    at: usize,
    depth: usize,
}

/// Brackets within brackets: beyond this nobody wrote it by hand, and the stack is finite.
const DEEPEST: usize = 64;

impl Parser {
    fn space(&mut self) {
        while self.letters.get(self.at).is_some_and(|letter| letter.is_whitespace()) {
            self.at += 1;
        }
    }

    fn expected(&self, what: &str) -> NotAClaim {
        let found = match self.letters.get(self.at) {
            Some(letter) => format!("`{letter}`"),
            None => "the end".to_string(),
        };
        NotAClaim { column: self.at + 1, message: format!("expected {what}, found {found}") }
    }

    /// Takes `text` if it comes next.
    fn take(&mut self, text: &str) -> bool {
        self.space();
        let here = text.chars().enumerate().all(|(ahead, letter)| self.letters.get(self.at + ahead) == Some(&letter));
        if here {
            self.at += text.chars().count();
        }
        here
    }

    fn need(&mut self, text: &str) -> Result<(), NotAClaim> {
        match self.take(text) {
            true => Ok(()),
            false => Err(self.expected(&format!("`{text}`"))),
        }
    }

    fn comparison(&mut self) -> Result<Comparison, NotAClaim> {
        let longest_first = [
            (">=", Comparison::GreaterEqual),
            ("<=", Comparison::LessEqual),
            ("==", Comparison::Equal),
            (">", Comparison::Greater),
            ("<", Comparison::Less),
        ];
        for (text, comparison) in longest_first {
            if self.take(text) {
                return Ok(comparison);
            }
        }
        Err(self.expected("`>`, `>=`, `<`, `<=`, `==`, `+` or `-`"))
    }

    fn sum(&mut self) -> Result<Sum, NotAClaim> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(NotAClaim { column: self.at + 1, message: "the brackets are nested too deep".to_string() });
        }
        let mut terms = vec![self.term()?];
        loop {
            let sign = match (self.take("+"), self.at) {
                (true, _) => 1.0,
                (false, _) if self.take("-") => -1.0,
                (false, _) => break,
            };
            let (inner, term) = self.term()?;
            terms.push((sign * inner, term));
        }
        self.depth -= 1;
        Ok(Sum(terms))
    }

    fn term(&mut self) -> Result<(f64, Term), NotAClaim> {
        let mut sign = 1.0;
        while self.take("-") {
            sign = -sign;
        }
        if self.take("(") {
            let inner = self.sum()?;
            self.need(")")?;
            return Ok((sign, Term::Group(inner)));
        }
        self.space();
        match self.letters.get(self.at) {
            Some(letter) if letter.is_ascii_digit() || *letter == '.' => Ok((sign, Term::Number(self.number()?))),
            _ => Ok((sign, Term::Aggregate(self.aggregate()?))),
        }
    }

    fn number(&mut self) -> Result<f64, NotAClaim> {
        let start = self.at;
        while self.letters.get(self.at).is_some_and(|letter| letter.is_ascii_digit() || *letter == '.') {
            self.at += 1;
        }
        if self.letters.get(self.at).is_some_and(|letter| matches!(letter, 'e' | 'E')) {
            self.at += 1;
            if self.letters.get(self.at).is_some_and(|letter| matches!(letter, '+' | '-')) {
                self.at += 1;
            }
            while self.letters.get(self.at).is_some_and(char::is_ascii_digit) {
                self.at += 1;
            }
        }
        let text: String = self.letters[start..self.at].iter().collect();
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(NotAClaim { column: start + 1, message: format!("`{text}` is not a number") }),
        }
    }

    fn word(&mut self, what: &str) -> Result<String, NotAClaim> {
        self.space();
        let start = self.at;
        while self.letters.get(self.at).is_some_and(|letter| letter.is_alphanumeric() || matches!(letter, '_' | '-')) {
            self.at += 1;
        }
        match start == self.at {
            true => Err(self.expected(what)),
            false => Ok(self.letters[start..self.at].iter().collect()),
        }
    }

    fn aggregate(&mut self) -> Result<Aggregate, NotAClaim> {
        let start = {
            self.space();
            self.at
        };
        let name = self.word("a number or mean, min, max, count")?;
        let function = match name.as_str() {
            "mean" => Function::Mean,
            "min" => Function::Min,
            "max" => Function::Max,
            "count" => Function::Count,
            _ => {
                let message = format!("`{name}` is none of mean, min, max, count");
                return Err(NotAClaim { column: start + 1, message });
            }
        };
        self.need("(")?;
        let metric = self.word("a metric")?;
        let mut only = Vec::new();
        if self.take("[") {
            loop {
                let axis = self.word("an axis")?;
                self.need("=")?;
                only.push((axis, self.axis_value()?));
                if !self.take(",") {
                    break;
                }
            }
            self.need("]")?;
        }
        self.need(")")?;
        Ok(Aggregate { function, metric, only })
    }

    fn axis_value(&mut self) -> Result<String, NotAClaim> {
        if self.take("\"") {
            let start = self.at;
            while self.letters.get(self.at).is_some_and(|letter| *letter != '"') {
                self.at += 1;
            }
            let value = self.letters[start..self.at].iter().collect();
            return match self.letters.get(self.at) {
                Some(_) => {
                    self.at += 1;
                    Ok(value)
                }
                None => Err(self.expected("a closing `\"`")),
            };
        }
        let start = self.at;
        while self.letters.get(self.at).copied().is_some_and(is_bare) {
            self.at += 1;
        }
        match start == self.at {
            true => Err(self.expected("the value of the axis")),
            false => Ok(self.letters[start..self.at].iter().collect()),
        }
    }
}

#[cfg(test)]
mod tests;
