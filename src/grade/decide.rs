//! Whether two answers are the same, by the type of the gold answer.
//!
//! Equality of expressions goes from cheap and certain to dear: the same tree; exact rationals;
//! identity in finite fields ([`crate::grade::modular`]); for roots, logarithms and angles, values
//! of 31 digits at several points. What none of them can settle is [`Verdict::Undecided`].
//!
//! Conventions (those of the hand-labelled sets this was built on): a unit may be left out, a
//! convertible one is converted, a contradicting one is wrong; a percent sign may be left out, a
//! factor of a hundred is wrong; a rounded decimal is not the exact value; solution lists have no
//! order, points have; `x =` may be left out, another variable is wrong.

use crate::grade::Verdict::{self, Correct, Undecided, Wrong};
use crate::grade::answer::{Answer, Region, Value, region};
use crate::grade::modular::{self, Field, Without};
use crate::grade::normalise::Token;
use crate::grade::number::{Complex, E, ONE, PI, Real, ZERO};
use crate::grade::parse::{Function, Node, expression};
use crate::grade::words;

/// A verdict and the rule that reached it.
pub type Ruling = (Verdict, &'static str);

/// Compares an answer with the gold one.
pub fn compare(gold: &Answer, given: &Answer) -> Ruling {
    match (gold, given) {
        (Answer::Text(gold), Answer::Text(given)) => texts(gold, given),
        // An expanded set against an expanded set: `\pm 5` is two values.
        _ if either(gold) || either(given) => match (expand(gold), expand(given)) {
            (Some(gold), Some(given)) => sets(&gold, &given),
            _ => (Undecided, "plus-minus"),
        },
        (Answer::Value(gold), Answer::Value(given)) => values(gold, given),
        (Answer::Value(gold), Answer::Equation(sides)) => match sides_for_value(sides) {
            Some(node) => values(gold, &bare(node)),
            None => (Undecided, "equation"),
        },
        (Answer::Value(gold), Answer::Text(words)) => match words::numbers(words) {
            Some(n) => values(gold, &bare(&Node::Number(n.to_string(), 0))),
            None if words.iter().any(|w| matches!(w.as_str(), "none" | "no" | "zero")) => (Undecided, "text"),
            None => (Wrong, "text"),
        },
        (Answer::Value(gold), Answer::Ratio(parts)) if parts.len() == 2 => {
            values(gold, &bare(&parts[0].clone().over(parts[1].clone())))
        }
        (Answer::Ratio(parts), Answer::Value(given)) if parts.len() == 2 => {
            values(&bare(&parts[0].clone().over(parts[1].clone())), given)
        }
        (Answer::Ratio(gold), Answer::Ratio(given)) => ratios(gold, given),
        (Answer::Clock(hour, minute, half), Answer::Clock(other_hour, other_minute, other_half)) => {
            let same = (hour, minute, half) == (other_hour, other_minute, other_half);
            (if same { Correct } else { Wrong }, "time of day")
        }
        (Answer::Clock(hour, minute, _), Answer::Ratio(parts))
        | (Answer::Ratio(parts), Answer::Clock(hour, minute, _)) => {
            let digits = [hour, minute].map(|n| Node::int(i64::from(*n)));
            let same = parts.len() == 2 && parts.iter().zip(&digits).all(|(a, b)| nodes(b, a).0 == Correct);
            (if same { Correct } else { Wrong }, "time of day")
        }
        (Answer::Based(digits, base), Answer::Based(other, other_base)) => {
            (if digits == other && base == other_base { Correct } else { Wrong }, "base")
        }
        (Answer::Based(digits, _), Answer::Value(value)) => match &value.node {
            Node::Number(other, 0) => (if other.trim_start_matches('0') == digits { Correct } else { Wrong }, "base"),
            _ => (Undecided, "base"),
        },
        (Answer::Equation(gold), given) => equation(gold, given),
        (Answer::Set(gold), Answer::Set(given)) => sets(gold, given),
        (Answer::Set(gold), Answer::Tuple(_, _, given)) => match ordered(gold, given) {
            (Correct, rule) => (Correct, rule),
            (_, rule) => (Undecided, rule),
        },
        (Answer::Set(gold), one @ (Answer::Value(_) | Answer::Equation(_))) => sets(gold, std::slice::from_ref(one)),
        (Answer::Tuple(open, close, gold), Answer::Tuple(other_open, other_close, given)) => {
            if (open, close) != (other_open, other_close) {
                return (Wrong, "brackets");
            }
            ordered(gold, given)
        }
        (Answer::Tuple(_, _, gold), Answer::Set(given)) => ordered(gold, given),
        (Answer::Tuple(_, _, gold), Answer::Named(given)) => {
            let values: Vec<Answer> = given.iter().map(|(_, value)| value.clone()).collect();
            ordered(gold, &values)
        }
        (Answer::Named(gold), Answer::Named(given)) => named(gold, given),
        (Answer::Named(gold), Answer::Tuple(_, _, given) | Answer::Set(given)) => {
            let values: Vec<Answer> = gold.iter().map(|(_, value)| value.clone()).collect();
            ordered(&values, given)
        }
        (Answer::Tuple(_, _, gold), Answer::Value(given)) | (Answer::Value(given), Answer::Tuple(_, _, gold)) if matches!(scaled_matrix(&given.node), Some(ref rows) if flat(rows).is_some()) =>
        {
            let cells = scaled_matrix(&given.node).and_then(|rows| flat(&rows)).unwrap_or_default();
            let cells: Vec<Answer> = cells.iter().map(|cell| Answer::Value(bare(cell))).collect();
            ordered(gold, &cells)
        }
        (Answer::Region(_, gold_name), Answer::Region(_, given_name))
            if gold_name.is_some() && given_name.is_some() && gold_name != given_name =>
        {
            (Wrong, "another variable")
        }
        (Answer::Region(..) | Answer::Tuple(..), Answer::Region(..) | Answer::Tuple(..)) => {
            match (region(gold), region(given)) {
                (Some(gold), Some(given)) => regions(&gold, &given),
                _ => (Wrong, "interval"),
            }
        }
        (Answer::Region(..), Answer::Set(_)) => match region(given) {
            Some(set) => region(gold).map_or((Undecided, "interval"), |gold| regions(&gold, &set)),
            None => (Undecided, "interval"),
        },
        (Answer::Region(gold, _), Answer::Text(words)) => {
            let all =
                words.iter().any(|w| w == "real" || w == "reals") && !words.iter().any(|w| w == "no" || w == "not");
            let verdict = if all { regions(gold, &Region::reals()).0 } else { Undecided };
            (if words.first().is_some_and(|w| w == "set") { Wrong } else { verdict }, "text")
        }
        (Answer::Set(gold), Answer::Text(words)) if gold.is_empty() => {
            const NOTHING: [&str; 12] =
                ["no", "none", "empty", "null", "set", "real", "solution", "solutions", "the", "there", "is", "are"];
            let says = words.iter().any(|w| matches!(w.as_str(), "no" | "none" | "empty" | "null"));
            let only = words.iter().all(|w| NOTHING.contains(&w.as_str()));
            (if says && only { Correct } else { Undecided }, "text")
        }
        (Answer::Text(_), _) => (Undecided, "text"),
        (_, Answer::Text(_)) => (Undecided, "text"),
        (Answer::Value(_), Answer::Set(given)) => match given.as_slice() {
            [] => (Undecided, "empty"),
            members => all(members.iter().map(|member| compare(gold, member)), "list"),
        },
        _ => (Wrong, "another kind"),
    }
}

fn bare(node: &Node) -> Value {
    Value { node: node.clone(), unit: None, percent: false, degrees: false }
}

/// All must hold: one wrong makes the whole wrong, else one undecided leaves it undecided.
fn all(rulings: impl Iterator<Item = Ruling>, rule: &'static str) -> Ruling {
    let mut verdict = Correct;
    for (one, _) in rulings {
        match one {
            Wrong => return (Wrong, rule),
            Undecided => verdict = Undecided,
            Correct => {}
        }
    }
    (verdict, rule)
}

fn ordered(gold: &[Answer], given: &[Answer]) -> Ruling {
    if gold.len() != given.len() {
        return (Wrong, "length");
    }
    all(gold.iter().zip(given).map(|(a, b)| compare(a, b)), "in order")
}

fn named(gold: &[(String, Answer)], given: &[(String, Answer)]) -> Ruling {
    if gold.len() != given.len() {
        return (Wrong, "length");
    }
    let one = |(name, value): &(String, Answer)| {
        given.iter().find(|(other, _)| other == name).map_or((Wrong, "names"), |(_, other)| compare(value, other))
    };
    all(gold.iter().map(one), "names")
}

/// Every gold member is given, and nothing else is.
fn sets(gold: &[Answer], given: &[Answer]) -> Ruling {
    // Comparisons are quadratic; sets of this size are no answers.
    if gold.len().saturating_mul(given.len()) > 2_500 {
        return (Undecided, "set");
    }
    let mut undecided = false;
    let mut found = vec![false; given.len()];
    for member in gold {
        let mut here = false;
        let mut maybe = false;
        for (other, found) in given.iter().zip(&mut found) {
            match compare(member, other).0 {
                Correct => {
                    here = true;
                    *found = true;
                }
                Undecided => maybe = true,
                Wrong => {}
            }
        }
        if !here && !maybe {
            return (Wrong, "set");
        }
        undecided |= !here;
    }
    if found.iter().all(|found| *found) {
        return (if undecided { Undecided } else { Correct }, "set");
    }
    (if undecided { Undecided } else { Wrong }, "set")
}

fn either(answer: &Answer) -> bool {
    match answer {
        Answer::Value(value) => value.node.any(&|n| matches!(n, Node::Either(..))),
        Answer::Set(members) => members.iter().any(either),
        _ => false,
    }
}

/// A value or set as a set, each plus-minus as its two cases (all signs of one value turn together).
fn expand(answer: &Answer) -> Option<Vec<Answer>> {
    match answer {
        Answer::Value(value) if either(answer) => {
            let case = |upper| Some(Answer::Value(Value { node: choose(&value.node, upper)?, ..value.clone() }));
            Some(vec![case(true)?, case(false)?])
        }
        Answer::Set(members) => {
            let cases = members.iter().map(expand).collect::<Option<Vec<_>>>()?;
            Some(cases.into_iter().flatten().collect())
        }
        Answer::Value(_) | Answer::Equation(_) => Some(vec![answer.clone()]),
        _ => None,
    }
}

fn choose(node: &Node, upper: bool) -> Option<Node> {
    let go = |n: &Node| choose(n, upper);
    let boxed = |n: &Node| choose(n, upper).map(Box::new);
    let list = |parts: &[Node]| parts.iter().map(go).collect::<Option<Vec<_>>>();
    Some(match node {
        Node::Either(plus, inner) if *plus == upper => go(inner)?,
        Node::Either(_, inner) => Node::Negative(boxed(inner)?),
        Node::Sum(parts) => Node::Sum(list(parts)?),
        Node::Product(parts) => Node::Product(list(parts)?),
        Node::Negative(a) => Node::Negative(boxed(a)?),
        Node::Quotient(a, b) => Node::Quotient(boxed(a)?, boxed(b)?),
        Node::Power(a, b) => Node::Power(boxed(a)?, boxed(b)?),
        Node::Apply(f, a) => Node::Apply(*f, boxed(a)?),
        other if other.any(&|n| matches!(n, Node::Either(..))) => return None,
        other => other.clone(),
    })
}

/// The side of `S = a = b` that is the answer.
fn sides_for_value(sides: &[Option<Node>]) -> Option<&Node> {
    let name = |side: &Option<Node>| matches!(side, None | Some(Node::Variable(_)));
    match sides {
        [first, .., last] if name(last) && !name(first) => first.as_ref(),
        [.., last] => last.as_ref(),
        [] => None,
    }
}

fn equation(gold: &[Option<Node>], given: &Answer) -> Ruling {
    let (Some(Some(left)), Some(Some(right))) = (gold.first(), gold.last()) else { return (Undecided, "equation") };
    match given {
        Answer::Equation(sides) => match (sides.first(), sides.last()) {
            (Some(Some(l)), Some(Some(r))) => {
                proportional(&left.clone().minus(right.clone()), &l.clone().minus(r.clone()))
            }
            _ => (Undecided, "equation"),
        },
        Answer::Value(value) => {
            let (zero, whole) = match (modular::rational(left), modular::rational(right)) {
                (_, Some((0, _))) => (true, left),
                (Some((0, _)), _) => (true, right),
                _ => (false, right),
            };
            // `x = 5` and `y = -2x` said by their right sides, `... = 0` by its left one.
            let named = names_a_quantity(left, right);
            if zero && !matches!(left, Node::Variable(_)) {
                return proportional(whole, &value.node);
            }
            if named {
                return values(&bare(right), value);
            }
            if matches!(right, Node::Variable(_)) { values(&bare(left), value) } else { (Undecided, "equation") }
        }
        Answer::Text(_) => (Undecided, "equation"),
        _ => (Wrong, "equation"),
    }
}

/// Whether the left side of an equation names what the right one is: `x`, `AB`, and for a number also `NO/BO`, `|AB|`.
fn names_a_quantity(left: &Node, right: &Node) -> bool {
    let name = |node: &Node| matches!(node, Node::Variable(_) | Node::Product(_));
    match left {
        Node::Quotient(over, under) => name(over) && name(under) && !right.has_variables(),
        Node::Apply(Function::Abs, inner) => name(inner) && !right.has_variables(),
        left => name(left),
    }
}

/// Two residues with their moduli; `None` where a modulus is no whole number or a residue is none.
pub fn congruent(gold: &[Token], m: &[Token], given: &[Token], n: &[Token]) -> Option<Ruling> {
    let whole = |tokens: &[Token]| match modular::rational(&expression(tokens)?)? {
        (whole, 1) => Some(whole),
        _ => None,
    };
    let residue = |tokens: &[Token]| match tokens {
        [Token::Letters(_), Token::Sign('='), rest @ ..] => whole(rest),
        tokens => whole(tokens),
    };
    let (m, n) = (whole(m)?, whole(n)?);
    if m != n || m == 0 {
        return Some((Wrong, "modulus"));
    }
    let same = (residue(gold)?.checked_sub(residue(given)?)?) % m == 0;
    Some((if same { Correct } else { Wrong }, "modulus"))
}

/// Whether `a = 0` and `b = 0` are the same equation: one is a constant times the other.
fn proportional(a: &Node, b: &Node) -> Ruling {
    const RULE: &str = "equation up to a factor";
    if !a.has_variables() || !b.has_variables() {
        return (Undecided, RULE);
    }
    let at = |node: &Node, which: usize, point: u64| Field::new(which, point).value(node);
    let mut exact = true;
    'exact: for which in 0..2 {
        let (Ok(a0), Ok(b0)) = (at(a, which, 1), at(b, which, 1)) else {
            exact = false;
            break 'exact;
        };
        for point in 2..4 {
            let (Ok(a1), Ok(b1)) = (at(a, which, point), at(b, which, point)) else {
                exact = false;
                break 'exact;
            };
            let p = u128::from(modular::PRIMES[which]);
            if u128::from(a0) * u128::from(b1) % p != u128::from(a1) * u128::from(b0) % p {
                return (Wrong, RULE);
            }
        }
    }
    if exact {
        return (Correct, RULE);
    }
    let mut ratio: Option<Complex> = None;
    let mut seen = 0;
    for point in 0..POINTS {
        let (Some(a), Some(b)) = (Sample::new(point).value(a), Sample::new(point).value(b)) else { continue };
        if !a.is_finite() || !b.is_finite() || b.is_zero() || a.is_zero() {
            continue;
        }
        let here = a / b;
        match ratio {
            None => ratio = Some(here),
            Some(before) => match close(before, here) {
                Correct => seen += 1,
                verdict => return (verdict, RULE),
            },
        }
    }
    (if seen >= 2 { Correct } else { Undecided }, RULE)
}

fn ratios(gold: &[Node], given: &[Node]) -> Ruling {
    if gold.len() != given.len() || gold.is_empty() {
        return (Wrong, "ratio");
    }
    let cross = |i: usize| {
        let left = Node::Product(vec![gold[i].clone(), given[0].clone()]);
        let right = Node::Product(vec![given[i].clone(), gold[0].clone()]);
        nodes(&left, &right)
    };
    all((1..gold.len()).map(cross), "ratio")
}

fn texts(gold: &[String], given: &[String]) -> Ruling {
    const FILLER: &[&str] = &[
        "the", "a", "an", "on", "in", "is", "are", "it", "its", "of", "function", "option", "choice", "there", "at",
        "by",
    ];
    let core = |words: &[String]| -> Vec<String> {
        let bare = |w: &String| w.strip_suffix('s').filter(|w| w.len() > 2).unwrap_or(w).to_string();
        let kept: Vec<String> = words.iter().filter(|w| !FILLER.contains(&w.as_str())).map(bare).collect();
        if kept.is_empty() { words.to_vec() } else { kept }
    };
    let (gold, given) = (core(gold), core(given));
    if gold == given || (gold.concat() == given.concat()) {
        return (Correct, "text");
    }
    let contained = gold.iter().all(|word| given.contains(word));
    (if contained { Undecided } else { Wrong }, "text")
}

/// Text gold against anything, by its words.
pub fn text_against(gold: &[String], given: &[String]) -> Ruling {
    texts(gold, given)
}

fn values(gold: &Value, given: &Value) -> Ruling {
    // Degrees beside radians or beside a bare number.
    if gold.degrees != given.degrees {
        let plain = nodes(&gold.node, &given.node);
        if plain.0 == Correct {
            return plain;
        }
        let (degrees, other) = if gold.degrees { (gold, given) } else { (given, gold) };
        let in_radians = Node::Degrees(Box::new(degrees.node.clone()));
        if other.node.any(&|n| *n == Node::Pi) {
            return nodes(&in_radians, &other.node);
        }
        return plain;
    }
    if gold.percent != given.percent {
        let hundredth = |node: &Node| node.clone().over(Node::int(100));
        let plain = nodes(&gold.node, &given.node);
        let scaled = if gold.percent {
            nodes(&hundredth(&gold.node), &given.node)
        } else {
            nodes(&gold.node, &hundredth(&given.node))
        };
        return if scaled.0 == Correct { scaled } else { plain };
    }
    match (&gold.unit, &given.unit) {
        (Some(a), Some(b)) if a != b => {
            if a.thing.is_some() || b.thing.is_some() {
                let same = nodes(&gold.node, &given.node);
                // Other things counted: a person has to say whether "students" are "people".
                return if same.0 == Wrong { same } else { (Undecided, "unit") };
            }
            if a.dims != b.dims {
                return (Wrong, "unit");
            }
            let scaled = |value: &Value, scale: (i128, i128)| {
                let ratio = Node::Number(scale.0.to_string(), 0).over(Node::Number(scale.1.to_string(), 0));
                Node::Product(vec![value.node.clone(), ratio])
            };
            (nodes(&scaled(gold, a.scale), &scaled(given, b.scale)).0, "unit")
        }
        _ => nodes(&gold.node, &given.node),
    }
}

/// Whether two expressions are equal for all values of their variables.
pub fn nodes(gold: &Node, given: &Node) -> Ruling {
    if gold == given {
        return (Correct, "identical");
    }
    if let (Some(a), Some(b)) = (modular::rational(gold), modular::rational(given)) {
        return (if a == b { Correct } else { Wrong }, "exact");
    }
    let infinite = |n: &Node| match n {
        Node::Infinity => Some(true),
        Node::Negative(inner) if **inner == Node::Infinity => Some(false),
        _ => None,
    };
    match (infinite(gold), infinite(given)) {
        (None, None) => {}
        (a, b) => return (if a == b { Correct } else { Wrong }, "infinity"),
    }
    if let (Some(a), Some(b)) = (scaled_matrix(gold), scaled_matrix(given)) {
        if a.len() != b.len() || a[0].len() != b[0].len() {
            return (Wrong, "matrix");
        }
        let cells = a.iter().flatten().zip(b.iter().flatten());
        return all(cells.map(|(a, b)| nodes(a, b)), "matrix");
    }
    let matrix = |n: &Node| n.any(&|n| matches!(n, Node::Matrix(_)));
    if matrix(gold) || matrix(given) {
        // A number is no matrix; a product of matrices is beyond this.
        let plain = scaled_matrix(gold).is_some() || scaled_matrix(given).is_some();
        return (if plain && matrix(gold) != matrix(given) { Wrong } else { Undecided }, "matrix");
    }
    // Engineers write j.
    let is = |n: &Node, name: &str| n.any(&|n| matches!(n, Node::Variable(v) if v == name));
    if gold.any(&|n| *n == Node::Imaginary) && is(given, "j") && !is(gold, "j") {
        return nodes(gold, &imaginary_j(given));
    }
    match in_fields(gold, given) {
        Some(ruling) => ruling,
        None => sampled(gold, given),
    }
}

fn imaginary_j(node: &Node) -> Node {
    let go = |n: &Node| imaginary_j(n);
    let boxed = |n: &Node| Box::new(imaginary_j(n));
    match node {
        Node::Variable(v) if v == "j" => Node::Imaginary,
        Node::Sum(parts) => Node::Sum(parts.iter().map(go).collect()),
        Node::Product(parts) => Node::Product(parts.iter().map(go).collect()),
        Node::Negative(a) => Node::Negative(boxed(a)),
        Node::Quotient(a, b) => Node::Quotient(boxed(a), boxed(b)),
        Node::Power(a, b) => Node::Power(boxed(a), boxed(b)),
        Node::Apply(f, a) => Node::Apply(*f, boxed(a)),
        other => other.clone(),
    }
}

fn in_fields(gold: &Node, given: &Node) -> Option<Ruling> {
    const RULE: &str = "identity in a finite field";
    for which in 0..2 {
        let a = Field::new(which, 0).value(gold);
        let b = Field::new(which, 0).value(given);
        match (a, b) {
            (Ok(a), Ok(b)) if a == b => {}
            (Ok(_), Ok(_)) => return Some((Wrong, RULE)),
            (Ok(_), Err(Without::Undefined)) => return Some((Wrong, "undefined")),
            _ => return None,
        }
    }
    Some((Correct, RULE))
}

/// A matrix times numbers, written out; `None` for what is none.
fn scaled_matrix(node: &Node) -> Option<Vec<Vec<Node>>> {
    let scale = |rows: Vec<Vec<Node>>, by: &dyn Fn(Node) -> Node| -> Vec<Vec<Node>> {
        rows.into_iter().map(|row| row.into_iter().map(by).collect()).collect()
    };
    match node {
        Node::Matrix(rows) => Some(rows.clone()),
        Node::Negative(inner) => Some(scale(scaled_matrix(inner)?, &|cell| Node::Negative(Box::new(cell)))),
        Node::Quotient(inner, by) => Some(scale(scaled_matrix(inner)?, &|cell| cell.over((**by).clone()))),
        Node::Product(parts) => {
            let at = parts.iter().position(|part| part.any(&|n| matches!(n, Node::Matrix(_))))?;
            let rows = scaled_matrix(&parts[at])?;
            let rest: Vec<Node> = parts.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, n)| n.clone()).collect();
            if rest.iter().any(|n| n.any(&|n| matches!(n, Node::Matrix(_))))
                || rows.len() * rows[0].len() * rest.len() > 2_000
            {
                return None;
            }
            Some(scale(rows, &|cell| {
                let mut factors = rest.clone();
                factors.push(cell);
                Node::Product(factors)
            }))
        }
        _ => None,
    }
}

/// The cells of a row or a column.
fn flat(rows: &[Vec<Node>]) -> Option<Vec<Node>> {
    (rows.len() == 1 || rows[0].len() == 1).then(|| rows.iter().flatten().cloned().collect())
}

/// Points tried; some fall outside the domain.
const POINTS: u64 = 7;

fn sampled(gold: &Node, given: &Node) -> Ruling {
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
fn close(a: Complex, b: Complex) -> Verdict {
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
struct Sample {
    point: u64,
    budget: u32,
    bound: Vec<(String, i64)>,
}

impl Sample {
    fn new(point: u64) -> Sample {
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

    fn value(&mut self, node: &Node) -> Option<Complex> {
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

/// Compares sets of reals at their ends, between them and beyond them.
fn regions(gold: &Region, given: &Region) -> Ruling {
    const RULE: &str = "ends and midpoints";
    let mut ends = Vec::new();
    if collect_ends(gold, &mut ends).is_none() || collect_ends(given, &mut ends).is_none() || ends.len() > 200 {
        return (Undecided, RULE);
    }
    ends.sort_by(|a, b| a.hi.total_cmp(&b.hi).then(a.lo.total_cmp(&b.lo)));
    ends.dedup_by(|a, b| same_end(*a, *b));
    let mut points = ends.clone();
    points.extend(ends.windows(2).map(|pair| (pair[0] + pair[1]) * Real::from(0.5)));
    let beyond = |end: Option<&Real>, by: f64| end.map_or(ZERO, |end| *end + Real::from(by) * (ONE + end.abs()));
    points.push(beyond(ends.first(), -1.0));
    points.push(beyond(ends.last(), 1.0));
    for point in points {
        match (contains(gold, point), contains(given, point)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(_), Some(_)) => return (Wrong, RULE),
            _ => return (Undecided, RULE),
        }
    }
    (Correct, RULE)
}

fn same_end(a: Real, b: Real) -> bool {
    (a - b).abs().hi <= 1e-20 * a.abs().hi.max(b.abs().hi)
}

fn end_value(node: &Node) -> Option<Real> {
    if node.has_variables() {
        return None;
    }
    let value = Sample::new(0).value(node)?;
    (value.is_real() && value.is_finite()).then_some(value.re)
}

fn collect_ends(region: &Region, into: &mut Vec<Real>) -> Option<()> {
    match region {
        Region::Interval(from, _, to, _) => {
            for end in [from, to].into_iter().flatten() {
                into.push(end_value(end)?);
            }
        }
        Region::Points(points) => {
            for point in points {
                into.push(end_value(point)?);
            }
        }
        Region::Union(a, b) | Region::Intersection(a, b) | Region::Difference(a, b) => {
            collect_ends(a, into)?;
            collect_ends(b, into)?;
        }
    }
    Some(())
}

fn contains(region: &Region, point: Real) -> Option<bool> {
    Some(match region {
        Region::Interval(from, with_from, to, with_to) => {
            let above = match from {
                None => true,
                Some(end) => {
                    let end = end_value(end)?;
                    if same_end(end, point) { *with_from } else { (point - end).hi > 0.0 }
                }
            };
            let below = match to {
                None => true,
                Some(end) => {
                    let end = end_value(end)?;
                    if same_end(end, point) { *with_to } else { (end - point).hi > 0.0 }
                }
            };
            above && below
        }
        Region::Points(points) => {
            let mut is = false;
            for end in points {
                is |= same_end(end_value(end)?, point);
            }
            is
        }
        Region::Union(a, b) => contains(a, point)? | contains(b, point)?,
        Region::Intersection(a, b) => contains(a, point)? & contains(b, point)?,
        Region::Difference(a, b) => contains(a, point)? & !contains(b, point)?,
    })
}
