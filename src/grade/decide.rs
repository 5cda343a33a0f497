//! Whether two answers are the same, by the type of the gold answer.
//!
//! Equality of expressions goes from cheap and certain to dear: the same tree; exact rationals;
//! identity in finite fields ([`crate::grade::modular`]); for roots, logarithms and angles, values
//! of 31 digits at several points. What none of them can settle is undecided.
//!
//! Conventions (those of the hand-labelled sets this was built on): a unit may be left out, a
//! convertible one is converted, a contradicting one is wrong; a percent sign may be left out, a
//! factor of a hundred is wrong; a rounded decimal is not the exact value; solution lists have no
//! order, points have; `x =` may be left out, another variable is wrong.

use crate::grade::answer::{Answer, Region, Value, region};
use crate::grade::modular::{self, Field, Without};
use crate::grade::normalise::Token;
use crate::grade::number::Complex;
use crate::grade::parse::{Function, Node, expression};
use crate::grade::region::regions;
use crate::grade::sampling::{POINTS, Sample, close, sampled};
use crate::grade::verdict::Ruling;
use crate::grade::verdict::Verdict::{Correct, Undecided, Wrong};
use crate::grade::words;

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
