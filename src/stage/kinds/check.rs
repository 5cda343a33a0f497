//! `check`: a claim about gathered numbers that must hold, with its uncertainty.
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

use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::plan::Cell;
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::kind::StageKind;

use crate::stage::kinds::table::{axis_names, strings, unknown_axis};
use crate::stage::share::readings::{self, Reading};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "check",
    about: "a claim about scores or measurements that must hold",
    recipe: 2,
    yields: ArtifactType::Verdict,
    keys: &[
        Key::required(
            "from",
            Type::Gather(&[ArtifactType::Scores, ArtifactType::Measurements, ArtifactType::Files]),
            "The stages whose numbers the claim is about: one name or a list. A `command` counts if it leaves scores.json or measurements.jsonl.",
        ),
        Key::required(
            "claim",
            Type::Str,
            "Two sides and a comparison, for example `mean(accuracy[data=r1k]) > mean(accuracy[data=s1k]) + 1`; \
             aggregates are mean, min, max and count.",
        ),
        Key::default(
            "severity",
            Type::Choice(&["error", "warn"]),
            "\"error\"",
            "Whether a claim that does not hold fails the run.",
        ),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { misfits, ..StageKind::new(&KIND, run) };

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    claim: String,
    severity: Severity,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Error,
    Warn,
}

fn rules(params: &Params) -> Vec<Broken> {
    let claim = strings(params, "claim").concat();
    match Claim::parse(&claim) {
        Ok(_) => Vec::new(),
        Err(wrong) => vec![Broken {
            key: "claim",
            message: wrong.to_string(),
            help: "a claim looks like `mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])`".to_string(),
        }],
    }
}

/// What can be said against a claim from the axes of its inputs alone: an axis or a value of an
/// axis that no input has.
pub fn misfits(params: &Params, inputs: &[&Cell]) -> Vec<Broken> {
    let Ok(claim) = Claim::parse(&strings(params, "claim").concat()) else { return Vec::new() };
    if inputs.is_empty() || inputs.iter().any(|cell| cell.kind.yields != ArtifactType::Scores) {
        return Vec::new(); // a field of measurements, such as `step`, may be meant
    }
    let known = axis_names(inputs);
    let mut broken = Vec::new();
    for aggregate in claim.aggregates() {
        for (axis, value) in &aggregate.only {
            if axis == "stage" {
                continue;
            }
            if !known.contains(axis) {
                broken.push(unknown_axis("claim", axis, &known));
                continue;
            }
            let values = readings::distinct(inputs.iter().filter_map(|cell| Some(cell.axes.get(axis)?.to_string())));
            if !values.contains(value) {
                broken.push(Broken {
                    key: "claim",
                    message: format!("no input has `{axis}={value}`"),
                    help: format!("values of `{axis}`: {}", values.join(", ")),
                });
            }
        }
    }
    broken
}

/// Judges the claim and writes `verdict.json`.
///
/// # Errors
/// `check::does_not_hold` (unless `severity = "warn"`), `check::no_number`, `check::nothing_selected`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let claim = Claim::parse(&spec.claim)
        .map_err(|wrong| Problem::new("check::claim", format!("{wrong} in the claim `{}`", spec.claim)))?;
    let readings = readings::readings(ctx.inputs("from"))?;
    let verdict = claim.judge(&readings)?;
    let path = ctx.out.join("verdict.json");
    let text = json!({
        "holds": verdict.holds,
        "claim": spec.claim,
        "left": verdict.left,
        "right": verdict.right,
        "difference": verdict.left - verdict.right,
        "interval": verdict.half_width,
        "within_noise": verdict.within_noise(),
        "sentence": verdict.to_string(),
    });
    std::fs::write(&path, format!("{text:#}\n"))
        .map_err(|error| Problem::io("check::write", "write", &path, &error))?;
    if verdict.holds {
        return Ok(());
    }
    if spec.severity == Severity::Warn {
        ctx.progress.warn(&format!("the claim does not hold: {verdict}"));
        return Ok(());
    }
    Err(Problem::new("check::does_not_hold", format!("the claim `{}` does not hold", spec.claim))
        .note(verdict.to_string())
        .help("`severity = \"warn\"` reports it and lets the run go on"))
}

/// Both sides of a judged claim.
struct Verdict {
    holds: bool,
    left: f64,
    right: f64,
    /// Half the 95 % interval of left minus right (normal approximation); `None` where a reading
    /// that counts carries no interval.
    half_width: Option<f64>,
}

impl Verdict {
    /// Whether the difference is no larger than its 95 % interval.
    fn within_noise(&self) -> Option<bool> {
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

#[derive(Debug, Clone, PartialEq)]
struct Aggregate {
    function: Function,
    metric: String,
    only: Vec<(String, String)>,
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

    fn aggregates(&self) -> Vec<&Aggregate> {
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

    fn judge(&self, readings: &[Reading]) -> Result<Verdict, Problem> {
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    fn reading(data: &str, accuracy: f64, half: f64) -> Reading {
        let fields = json!({ "accuracy": accuracy, "ci_low": accuracy - half, "ci_high": accuracy + half });
        let Value::Object(fields) = fields else { return Reading::empty() };
        Reading {
            cell: format!("eval[data={data}]"),
            stage: "eval".into(),
            axes: vec![("data".into(), data.into())],
            fields,
            outcomes: None,
        }
    }

    /// With one sample of each problem.
    fn solved(mut reading: Reading, right: &[bool]) -> Reading {
        let outcomes = right.iter().enumerate().map(|(at, right)| (format!("p{at}"), (u64::from(*right), 1)));
        reading.outcomes = Some(outcomes.collect::<readings::Outcomes>().into());
        reading
    }

    impl Reading {
        fn empty() -> Reading {
            Reading { cell: String::new(), stage: String::new(), axes: vec![], fields: Map::new(), outcomes: None }
        }
    }

    fn judge(claim: &str, readings: &[Reading]) -> Verdict {
        Claim::parse(claim).expect("a claim").judge(readings).expect("a verdict")
    }

    #[test]
    fn a_difference_larger_than_its_interval_is_not_noise() {
        let readings = [reading("r1k", 60.0, 3.0), reading("s1k", 50.0, 4.0)];
        let verdict = judge("mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])", &readings);
        assert!(verdict.holds);
        assert_eq!(verdict.half_width, Some(5.0)); // sqrt(3^2 + 4^2)
        assert_eq!(verdict.within_noise(), Some(false));
        assert_eq!(verdict.to_string(), "left 60, right 50, difference 10 ± 5 (95 %)");
    }

    #[test]
    fn cells_that_solve_the_same_problems_differ_with_less_noise() {
        let (r1k, s1k) = (reading("r1k", 60.0, 3.0), reading("s1k", 50.0, 4.0));
        let same = [true, true, false, false, true, false, true, false];
        let half = |one: &[bool], other: &[bool]| {
            let readings = [solved(r1k.clone(), one), solved(s1k.clone(), other)];
            judge("mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])", &readings).half_width.unwrap()
        };
        assert!((half(&same, &same) - 1.0).abs() <= 1e-12); // 4 - 3: fully correlated
        let opposite = same.map(|right| !right);
        assert!((half(&same, &opposite) - 7.0).abs() <= 1e-12);
        // Other problems, or no variation: independent.
        assert_eq!(half(&same, &same[..4]), 5.0);
        assert_eq!(half(&same, &[true; 8]), 5.0);
    }

    #[test]
    fn a_small_difference_is_said_to_be_noise() {
        let readings = [reading("r1k", 51.0, 3.0), reading("s1k", 50.0, 4.0)];
        let verdict = judge("mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])", &readings);
        assert!(verdict.holds);
        assert!(verdict.to_string().ends_with("within noise"), "{verdict}");
    }

    #[test]
    fn a_reading_on_both_sides_cancels() {
        let readings = [reading("r1k", 60.0, 3.0)];
        let verdict = judge("mean(accuracy) >= max(accuracy) - 0.5", &readings);
        assert!(verdict.holds);
        assert_eq!(verdict.half_width, Some(0.0));
    }

    #[test]
    fn minus_binds_to_its_term_and_brackets_group() {
        let readings = [reading("r1k", 60.0, 3.0), reading("s1k", 50.0, 4.0)];
        assert!(judge("10 - (4 - 1) == 7", &readings).holds);
        assert!(judge("max(accuracy) - min(accuracy) == 10", &readings).holds);
        assert!(judge("count(accuracy) == 2", &readings).holds);
        assert!(judge("--1.5e1 == 15", &readings).holds);
        assert!(!judge("- 1 > 0", &readings).holds);
    }

    #[test]
    fn without_an_interval_the_uncertainty_is_not_invented() {
        let mut bare = reading("r1k", 60.0, 3.0);
        bare.fields.remove("ci_low");
        assert_eq!(judge("mean(accuracy) > 0", &[bare]).half_width, None);
        assert_eq!(judge("1 > 0", &[]).half_width, None);
    }

    #[test]
    fn a_claim_that_is_none_says_where() {
        for (claim, wrong) in [
            ("", "expected a number or mean, min, max, count, found the end at character 1"),
            ("mean(accuracy)", "expected `>`, `>=`, `<`, `<=`, `==`, `+` or `-`, found the end at character 15"),
            ("avg(accuracy) > 1", "`avg` is none of mean, min, max, count at character 1"),
            ("mean(accuracy[data]) > 1", "expected `=`, found `]` at character 19"),
            ("mean(accuracy[data=]) > 1", "expected the value of the axis, found `]` at character 20"),
            ("mean(accuracy) > 1 2", "expected the end, `+` or `-`, found `2` at character 20"),
            ("1 > 1.2.3", "`1.2.3` is not a number at character 5"),
            ("1 > 1e999", "`1e999` is not a number at character 5"),
        ] {
            assert_eq!(Claim::parse(claim).map_err(|wrong| wrong.to_string()), Err(wrong.to_string()), "{claim}");
        }
        assert!(Claim::parse(&format!("{} > 1", "(".repeat(100_000))).is_err());
    }

    #[test]
    fn an_absent_metric_and_an_empty_selection_are_errors() {
        let readings = [reading("r1k", 60.0, 3.0)];
        let code = |claim: &str| Claim::parse(claim).expect("a claim").judge(&readings).err().map(|p| p.code);
        assert_eq!(code("mean(f1) > 0"), Some("check::no_number"));
        assert_eq!(code("mean(accuracy[data=x]) > 0"), Some("check::nothing_selected"));
        assert_eq!(code("count(accuracy[data=x]) == 0"), None);
    }

    fn term() -> impl Strategy<Value = Term> {
        let pair = ("[a-z][a-z_]{0,5}", "[ -!#-~]{1,6}");
        let aggregate = (
            prop_oneof![Just(Function::Mean), Just(Function::Min), Just(Function::Max), Just(Function::Count)],
            "[a-z][a-z0-9_]{0,8}",
            proptest::collection::vec(pair, 0..3),
        )
            .prop_map(|(function, metric, only)| Term::Aggregate(Aggregate { function, metric, only }));
        let leaf = prop_oneof![(0u32..100_000).prop_map(|n| Term::Number(f64::from(n) / 64.0)), aggregate];
        leaf.prop_recursive(3, 12, 3, |inner| {
            proptest::collection::vec((prop_oneof![Just(1.0), Just(-1.0)], inner), 1..3)
                .prop_map(|terms| Term::Group(Sum(terms)))
        })
    }

    fn sum() -> impl Strategy<Value = Sum> {
        proptest::collection::vec((prop_oneof![Just(1.0), Just(-1.0)], term()), 1..4).prop_map(Sum)
    }

    fn claim() -> impl Strategy<Value = Claim> {
        let comparison = prop_oneof![
            Just(Comparison::Greater),
            Just(Comparison::GreaterEqual),
            Just(Comparison::Less),
            Just(Comparison::LessEqual),
            Just(Comparison::Equal)
        ];
        (sum(), comparison, sum()).prop_map(|(left, comparison, right)| Claim { left, comparison, right })
    }

    proptest! {
        #[test]
        fn a_claim_reads_back_as_it_was_written(claim in claim()) {
            prop_assert_eq!(Claim::parse(&claim.to_string()), Ok(claim));
        }

        #[test]
        fn no_text_breaks_the_parser(text in "[\\PC]{0,40}|[a-z()\\[\\]=<>+\\-.0-9 \",]{0,40}") {
            if let Err(wrong) = Claim::parse(&text) {
                prop_assert!(wrong.column <= text.chars().count() + 1);
            }
        }
    }
}
