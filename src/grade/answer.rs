//! Tokens to typed answers: what kind of thing was said decides how it is compared.
//!
//! One file, for the kinds of answer call each other: a list holds equations, an equation an interval, an interval
//! values, and which of them a text is depends on the order in which they are tried.

use crate::grade::normalise::Token::{self, Command, Letters, Num, Sign, Unknown, Word};
use crate::grade::parse::{Node, expression, matches};
use crate::grade::words::{self, Unit};

/// How deep lists of tuples of sets may nest.
const DEPTH: usize = 8;
/// More members than this are not compared.
const MEMBERS: usize = 200;

/// An answer with its type.
#[derive(Debug, Clone)]
pub enum Answer {
    /// One number or expression.
    Value(Value),
    /// Words, lower case.
    Text(Vec<String>),
    /// Any order, repetitions do not count.
    Set(Vec<Answer>),
    /// In order, with its brackets; two members may also be an interval.
    Tuple(char, char, Vec<Answer>),
    /// `x = 15, y = -29`.
    Named(Vec<(String, Answer)>),
    /// A set of reals, and the variable it is said of.
    Region(Region, Option<String>),
    /// `a = b = c`; `None` for a side that is no expression (`\text{Area}`).
    Equation(Vec<Option<Node>>),
    /// `2 : 3 : 5`, two parts or more.
    Ratio(Vec<Node>),
    /// Hour and minute, and whether it is in the afternoon, if that was said.
    Clock(u32, u32, Option<bool>),
    /// Digits, and the base if it was written.
    Based(String, String),
}

/// A number or expression with what stands around it.
#[derive(Debug, Clone)]
pub struct Value {
    /// The expression itself.
    pub node: Node,
    /// The unit that was written beside it.
    pub unit: Option<Unit>,
    /// A percent sign stands behind it; the expression is not divided by 100.
    pub percent: bool,
    /// A degree sign stands behind it.
    pub degrees: bool,
}

/// A set of real numbers.
#[derive(Debug, Clone)]
pub enum Region {
    /// From and to; `None` is infinite. `true`: the end belongs to it.
    Interval(Option<Node>, bool, Option<Node>, bool),
    /// Exactly these numbers.
    Points(Vec<Node>),
    /// What is in either.
    Union(Box<Region>, Box<Region>),
    /// What is in both.
    Intersection(Box<Region>, Box<Region>),
    /// What is in the first and not in the second.
    Difference(Box<Region>, Box<Region>),
}

impl Region {
    /// All real numbers.
    pub fn reals() -> Region {
        Region::Interval(None, false, None, false)
    }
}

/// `None`: not in the language of this module.
pub fn answer(tokens: &[Token]) -> Option<Answer> {
    read(tokens, 0)
}

fn read(tokens: &[Token], depth: usize) -> Option<Answer> {
    if depth > DEPTH || tokens.is_empty() {
        return None;
    }
    let tokens = single_brackets(unwrap(tokens));
    if let Some(words) = text(tokens) {
        return Some(Answer::Text(words));
    }
    let tokens = without_filler(tokens);
    if let Some(clock) = clock(tokens) {
        return Some(clock);
    }
    // `x \in ...`
    if let [Letters(_) | Command(_), Command(is_in), rest @ ..] = tokens
        && is_in == "in"
        && !rest.is_empty()
    {
        return read(rest, depth + 1);
    }
    let partner = matches(tokens);
    if let [Command(name)] = tokens {
        match name.as_str() {
            "reals" => return Some(Answer::Region(Region::reals(), None)),
            "emptyset" => return Some(Answer::Set(Vec::new())),
            _ => {}
        }
    }
    let top = top_level(tokens, &partner);
    let at_top = |test: &dyn Fn(&Token) -> bool| top.iter().any(|&i| test(&tokens[i]));
    if at_top(&|t| matches!(t, Command(n) if matches!(n.as_str(), "cup" | "cap" | "setminus"))) {
        return set_operations(tokens, &top, depth);
    }
    let separator = |t: &Token| match t {
        Sign(',' | ';') => true,
        Word(w) => matches!(w.to_lowercase().as_str(), "and" | "or"),
        _ => false,
    };
    if (tokens.first() == Some(&Sign(']')) || tokens.last() == Some(&Sign('[')))
        && let Some(bracketed) = bracketed(tokens, &partner, depth)
    {
        return bracketed;
    }
    if at_top(&separator) {
        let any_or = at_top(&|t| matches!(t, Word(w) if w.eq_ignore_ascii_case("or")));
        return list(&split(tokens, &top, &separator), any_or, depth);
    }
    if at_top(&|t| matches!(t, Sign('<' | '>' | '≤' | '≥' | '≠'))) {
        return inequality(tokens, &top);
    }
    if at_top(&|t| matches!(t, Sign('=' | '≈'))) {
        return equation(tokens, &top, depth);
    }
    if let Some(bracketed) = bracketed(tokens, &partner, depth) {
        return bracketed;
    }
    if at_top(&|t| *t == Sign(':') || matches!(t, Word(w) if w == "to")) {
        let (tokens, _) = cut_words(tokens);
        let partner = matches(tokens);
        let top = top_level(tokens, &partner);
        let parts = split(tokens, &top, &|t| *t == Sign(':') || matches!(t, Word(w) if w == "to"));
        return parts.into_iter().map(expression).collect::<Option<Vec<_>>>().map(Answer::Ratio);
    }
    based(tokens).or_else(|| value(tokens).map(Answer::Value))
}

/// `4:30 p.m.`; without the half of the day it is a ratio.
fn clock(tokens: &[Token]) -> Option<Answer> {
    let [Num(hour), Sign(':'), Num(minute), half @ ..] = tokens else { return None };
    let mut letters = String::new();
    for token in half {
        match token {
            Word(word) | Letters(word) => letters.push_str(&word.to_lowercase()),
            Sign('.' | '{' | '}') => {}
            _ => return None,
        }
    }
    let afternoon = match letters.as_str() {
        "am" => false,
        "pm" => true,
        _ => return None,
    };
    Some(Answer::Clock(hour.parse().ok()?, minute.parse().ok()?, Some(afternoon)))
}

/// `3 \pmod{7}` as `3` and `7`.
pub fn congruence(tokens: &[Token]) -> Option<(&[Token], &[Token])> {
    let at = tokens.iter().rposition(|token| match token {
        Command(name) => name == "mod",
        Word(word) | Letters(word) => word == "mod",
        _ => false,
    })?;
    let (mut before, mut modulus) = (&tokens[..at], &tokens[at + 1..]);
    if let ([head @ .., Sign('(')], [inner @ .., Sign(')')]) = (before, modulus) {
        (before, modulus) = (head, inner);
    }
    let modulus = unwrap(modulus);
    (!before.is_empty() && !modulus.is_empty()).then_some((before, modulus))
}

/// Positions outside all brackets. `partner` as from [`matches`].
fn top_level(tokens: &[Token], partner: &[Option<usize>]) -> Vec<usize> {
    let mut top = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        top.push(at);
        at = partner[at].map_or(at + 1, |close| close + 1);
    }
    top
}

fn split<'a>(tokens: &'a [Token], top: &[usize], separator: &dyn Fn(&Token) -> bool) -> Vec<&'a [Token]> {
    let mut parts = Vec::new();
    let mut start = 0;
    for &at in top.iter().filter(|&&at| separator(&tokens[at])) {
        parts.push(&tokens[start..at]);
        start = at + 1;
    }
    parts.push(&tokens[start..]);
    // `1, 2, and 3` has an empty part, and so has a trailing comma.
    parts.retain(|part| !part.is_empty());
    parts
}

/// Without braces around the whole.
fn unwrap(mut tokens: &[Token]) -> &[Token] {
    let partner = matches(tokens);
    let mut start = 0;
    while let [Sign('{'), _, .., _] = tokens {
        if partner[start] != Some(start + tokens.len() - 1) {
            break;
        }
        tokens = &tokens[1..tokens.len() - 1];
        start += 1;
    }
    tokens
}

/// `((5))` as `(5)`, however many there are: what is inside the last pair may still be a point.
fn single_brackets(mut tokens: &[Token]) -> &[Token] {
    let partner = matches(tokens);
    let mut start = 0;
    while let [Sign('('), Sign('('), .., Sign(')'), Sign(')')] = tokens {
        let last = start + tokens.len() - 1;
        if partner[start] != Some(last) || partner[start + 1] != Some(last - 1) {
            break;
        }
        tokens = &tokens[1..tokens.len() - 1];
        start += 1;
    }
    tokens
}

/// The words of an answer that consists of nothing else.
fn text(tokens: &[Token]) -> Option<Vec<String>> {
    let is_word = |t: &Token| matches!(t, Word(w) if w != "$");
    let is_mark = |t: &Token| matches!(t, Sign('(' | ')' | '.' | ',' | '\'' | '-' | '{' | '}'));
    (tokens.iter().any(is_word) && tokens.iter().all(|t| is_word(t) || is_mark(t))).then(|| words_of(tokens))
}

/// Every word, letter and number in it, lower case: how a text is compared with anything.
pub fn words_of(tokens: &[Token]) -> Vec<String> {
    let mut words = Vec::new();
    for token in tokens {
        match token {
            Word(w) | Letters(w) => words.extend(w.to_lowercase().split_whitespace().map(String::from)),
            Num(digits) => words.push(digits.clone()),
            Command(name) if name == "emptyset" => words.extend(["no".into(), "solution".into()]),
            Command(name) => words.push(name.clone()),
            Sign(_) | Unknown => {}
        }
    }
    words
}

/// `\text{the answer is } 17`
fn without_filler(tokens: &[Token]) -> &[Token] {
    const FILLER: &[&str] =
        &["the", "answer", "final", "is", "a", "so", "thus", "hence", "therefore", "equals", "about", "approximately"];
    let filler = |t: &Token| matches!(t, Word(w) if FILLER.contains(&w.to_lowercase().as_str()));
    let count = tokens.iter().take_while(|t| filler(t) || matches!(t, Sign(':'))).count();
    if count < tokens.len() { &tokens[count..] } else { tokens }
}

fn list(parts: &[&[Token]], any_or: bool, depth: usize) -> Option<Answer> {
    if parts.len() > MEMBERS {
        return None;
    }
    if let [only] = parts {
        return read(only, depth + 1);
    }
    let answers = parts.iter().map(|part| read(part, depth + 1)).collect::<Option<Vec<_>>>()?;
    if answers.iter().any(|a| matches!(a, Answer::Region(..))) {
        let mut whole: Option<Region> = None;
        let mut name = None;
        for answer in answers {
            let Answer::Region(region, variable) = answer else { return None };
            if name.is_some() && variable.is_some() && name != variable {
                return None;
            }
            name = name.or(variable);
            whole = Some(match whole {
                None => region,
                Some(whole) if any_or => Region::Union(Box::new(whole), Box::new(region)),
                Some(whole) => Region::Intersection(Box::new(whole), Box::new(region)),
            });
        }
        return Some(Answer::Region(whole?, name));
    }
    // `x = 1 or x = 2` and `x = 1, 2` are lists of values; `x = 1, y = 2` names them.
    let named: Vec<Option<(String, Answer)>> = answers.iter().map(assignment).collect();
    if let Some(Some((first, _))) = named.first() {
        let same = named.iter().zip(&answers).all(|(n, a)| match n {
            Some((name, _)) => name == first,
            None => matches!(a, Answer::Value(_)),
        });
        if same {
            let values = named.into_iter().zip(answers).map(|(n, a)| n.map_or(a, |(_, value)| value)).collect();
            return Some(Answer::Set(values));
        }
        if let Some(all) = named.into_iter().collect::<Option<Vec<_>>>() {
            return Some(Answer::Named(all));
        }
    }
    Some(Answer::Set(answers))
}

/// `x = 5` as name and value.
fn assignment(answer: &Answer) -> Option<(String, Answer)> {
    match answer {
        Answer::Equation(sides) => match sides.as_slice() {
            [Some(Node::Variable(name)), Some(node)] => {
                let value = Value { node: node.clone(), unit: None, percent: false, degrees: false };
                Some((name.clone(), Answer::Value(value)))
            }
            _ => None,
        },
        _ => None,
    }
}

fn equation(tokens: &[Token], top: &[usize], depth: usize) -> Option<Answer> {
    // What is only approximate is not the answer, if something exact is.
    let exact_end = top.iter().copied().find(|&at| tokens[at] == Sign('≈'));
    let (exact, rest) = match exact_end {
        Some(at) => (&tokens[..at], &tokens[at + 1..]),
        None => (tokens, &tokens[..0]),
    };
    let inside = |t: &Token| *t == Sign('=');
    let parts = split(exact, &top.iter().copied().filter(|&at| at < exact.len()).collect::<Vec<_>>(), &inside);
    if parts.len() > MEMBERS {
        return None;
    }
    if parts.len() < 2 {
        // `x ≈ 5`, or `4/9 ≈ 0.44`
        let name = matches!(exact, [] | [Letters(_) | Command(_) | Word(_)]) || expression(exact).is_none();
        return read(if name { rest } else { exact }, depth + 1);
    }
    let last = parts[parts.len() - 1];
    let sides: Vec<Option<Node>> = parts.iter().map(|part| value(part).map(|v| v.node)).collect();
    // `(r, \theta) = (3, \pi/2)`, `S = \{1, 2\}`, `x = \text{even}`, `t = 5\text{ cm}`, `x = 1 \pm 2`
    let plain_left = parts[..parts.len() - 1].iter().all(|part| part.iter().all(|t| !matches!(t, Num(_))));
    let right = read(last, depth + 1)?;
    let carries = match &right {
        Answer::Value(v) => {
            v.unit.is_some() || v.percent || v.degrees || v.node.any(&|n| matches!(n, Node::Either(..)))
        }
        _ => true,
    };
    if carries && plain_left {
        return Some(right);
    }
    Some(Answer::Equation(sides))
}

fn bracketed(tokens: &[Token], partner: &[Option<usize>], depth: usize) -> Option<Option<Answer>> {
    let (open, inner, close) = match tokens {
        [Sign(open @ ('(' | '[' | '⟦')), inner @ .., Sign(close)] if partner[0] == Some(tokens.len() - 1) => {
            (*open, inner, *close)
        }
        // `]a,b[` and its halves
        [Sign(open @ (']' | '(' | '[')), inner @ .., Sign(close @ ('[' | ')' | ']'))]
            if (*open == ']' || *close == '[') && inner.iter().all(|t| !matches!(t, Sign('[' | ']'))) =>
        {
            let open = if *open == ']' { '(' } else { *open };
            (open, inner, if *close == '[' { ')' } else { *close })
        }
        _ => return None,
    };
    let inner_partner = matches(inner);
    let top = top_level(inner, &inner_partner);
    let comma = |t: &Token| matches!(t, Sign(',' | ';'));
    let parts = split(inner, &top, &comma);
    if parts.len() > MEMBERS {
        return Some(None);
    }
    let members = || parts.iter().map(|part| read(part, depth + 1)).collect::<Option<Vec<_>>>();
    if open == '⟦' {
        return Some(members().map(Answer::Set));
    }
    if parts.len() < 2 {
        // Redundant brackets around something that is no expression by itself.
        return match parts.first() {
            Some(part) if part.len() < tokens.len() && open == '(' && close == ')' => Some(read(part, depth + 1)),
            _ => None,
        };
    }
    Some(members().map(|members| Answer::Tuple(open, close, members)))
}

fn set_operations(tokens: &[Token], top: &[usize], depth: usize) -> Option<Answer> {
    let operator = |t: &Token| matches!(t, Command(n) if matches!(n.as_str(), "cup" | "cap" | "setminus"));
    let parts = split(tokens, top, &operator);
    let operators: Vec<&Token> = top.iter().map(|&at| &tokens[at]).filter(|t| operator(t)).collect();
    if parts.len() != operators.len() + 1 || parts.len() > MEMBERS {
        return None;
    }
    let mut whole: Option<Region> = None;
    for (i, part) in parts.iter().enumerate() {
        let region = region(&read(part, depth + 1)?)?;
        whole = Some(match (whole, i) {
            (None, _) => region,
            (Some(whole), i) => {
                let (a, b) = (Box::new(whole), Box::new(region));
                match operators[i - 1] {
                    Command(n) if n == "cup" => Region::Union(a, b),
                    Command(n) if n == "cap" => Region::Intersection(a, b),
                    _ => Region::Difference(a, b),
                }
            }
        });
    }
    Some(Answer::Region(whole?, None))
}

/// An answer as a set of reals, if it can be one.
pub fn region(answer: &Answer) -> Option<Region> {
    match answer {
        Answer::Region(region, _) => Some(region.clone()),
        Answer::Set(members) => {
            let points = members.iter().map(|m| match m {
                Answer::Value(v) => Some(v.node.clone()),
                _ => None,
            });
            Some(Region::Points(points.collect::<Option<Vec<_>>>()?))
        }
        Answer::Tuple(open, close, members) => match members.as_slice() {
            [Answer::Value(from), Answer::Value(to)] => {
                let end = |node: &Node, low: bool| match node {
                    Node::Infinity if !low => Some(None),
                    Node::Negative(inner) if low && **inner == Node::Infinity => Some(None),
                    node if node.any(&|n| *n == Node::Infinity) => None,
                    node => Some(Some(node.clone())),
                };
                let (from, to) = (end(&from.node, true)?, end(&to.node, false)?);
                // Infinity belongs to nothing.
                let (low, high) = (*open == '[', *close == ']');
                if (from.is_none() && low) || (to.is_none() && high) {
                    return None;
                }
                Some(Region::Interval(from, low, to, high))
            }
            _ => None,
        },
        _ => None,
    }
}

/// A chain of relations about one variable or its absolute value.
fn inequality(tokens: &[Token], top: &[usize]) -> Option<Answer> {
    let relation = |t: &Token| matches!(t, Sign('<' | '>' | '≤' | '≥' | '≠' | '='));
    let sides = split(tokens, top, &relation);
    let relations: Vec<char> = top
        .iter()
        .filter_map(|&at| match &tokens[at] {
            Sign(c @ ('<' | '>' | '≤' | '≥' | '≠' | '=')) => Some(*c),
            _ => None,
        })
        .collect();
    // `> 17`
    if let ([bound], [relation], Some(Sign(first))) = (sides.as_slice(), relations.as_slice(), tokens.first())
        && first == relation
    {
        let bound = expression(bound).filter(|bound| !bound.has_variables())?;
        return Some(Answer::Region(half_line(&bound, *relation, false)?, None));
    }
    if sides.len() != relations.len() + 1 || sides.len() > 4 {
        return None;
    }
    let sides = sides.into_iter().map(expression).collect::<Option<Vec<_>>>()?;
    let mut whole: Option<Region> = None;
    let mut name = None;
    for (pair, relation) in sides.windows(2).zip(relations) {
        let (left, right) = (&pair[0], &pair[1]);
        let (subject, bound, relation) = if left.has_variables() {
            (left, right, relation)
        } else {
            let turned = match relation {
                '<' => '>',
                '>' => '<',
                '≤' => '≥',
                '≥' => '≤',
                other => other,
            };
            (right, left, turned)
        };
        if bound.has_variables() {
            return None;
        }
        let (variable, absolute) = match subject {
            Node::Variable(v) => (v.clone(), false),
            Node::Apply(crate::grade::parse::Function::Abs, inner) => match &**inner {
                Node::Variable(v) => (v.clone(), true),
                _ => return None,
            },
            _ => return None,
        };
        if name.as_ref().is_some_and(|n| *n != variable) {
            return None;
        }
        name = Some(variable);
        let region = half_line(bound, relation, absolute)?;
        whole = Some(match whole {
            None => region,
            Some(whole) => Region::Intersection(Box::new(whole), Box::new(region)),
        });
    }
    Some(Answer::Region(whole?, name))
}

fn half_line(bound: &Node, relation: char, absolute: bool) -> Option<Region> {
    let end = || match bound {
        Node::Infinity => None,
        Node::Negative(inner) if **inner == Node::Infinity => None,
        node => Some(node.clone()),
    };
    if absolute {
        let minus = Some(Node::Negative(Box::new(bound.clone())));
        let outside = |closed| {
            let below = Region::Interval(None, false, minus.clone(), closed);
            Region::Union(Box::new(below), Box::new(Region::Interval(end(), closed, None, false)))
        };
        return match relation {
            '<' => Some(Region::Interval(minus, false, end(), false)),
            '≤' => Some(Region::Interval(minus, true, end(), true)),
            '>' => Some(outside(false)),
            '≥' => Some(outside(true)),
            _ => None,
        };
    }
    Some(match relation {
        '<' => Region::Interval(None, false, end(), false),
        '≤' => Region::Interval(None, false, end(), end().is_some()),
        '>' => Region::Interval(end(), false, None, false),
        '≥' => Region::Interval(end(), end().is_some(), None, false),
        '=' => Region::Points(vec![bound.clone()]),
        _ => Region::Difference(Box::new(Region::reals()), Box::new(Region::Points(vec![bound.clone()]))),
    })
}

/// `2516_8`, `(4210)_{5}`
fn based(tokens: &[Token]) -> Option<Answer> {
    let bare: Vec<&Token> = tokens.iter().filter(|t| !matches!(t, Sign('(' | ')' | '{' | '}'))).collect();
    match bare.as_slice() {
        [Num(digits), Sign('_'), Num(base)] if !digits.contains('.') => {
            Some(Answer::Based(digits.trim_start_matches('0').to_string(), base.clone()))
        }
        _ => None,
    }
}

/// An expression with its unit, percent sign or degrees.
fn value(tokens: &[Token]) -> Option<Value> {
    let (tokens, mut unit) = cut_words(unwrap(tokens));
    let mut tokens = tokens;
    let mut money = None;
    if let [Word(w), rest @ ..] = tokens
        && w == "$"
    {
        money = words::unit("$");
        tokens = rest;
    } else if let [Sign('-'), Word(w), ..] = tokens
        && w == "$"
    {
        // -$5
        let mut shifted = vec![Sign('-')];
        shifted.extend_from_slice(&tokens[2..]);
        let node = expression(&shifted)?;
        return Some(Value { node, unit: words::unit("$"), percent: false, degrees: false });
    }
    if unit == Some(Unit::NONE) {
        unit = None;
    }
    let unit = unit.or(money);
    let degrees_word = unit.as_ref().is_some_and(|u| u.dims == [0, 0, 0, 0, 1]);
    let (mut percent, mut degrees) = (false, degrees_word);
    match tokens {
        [rest @ .., Sign('%')] => {
            tokens = rest;
            percent = true;
        }
        // In `\cos 60^\circ` the sign belongs to the 60, in `30° + 45°` to each.
        [rest @ .., Sign('°')]
            if rest.iter().all(|t| matches!(t, Num(_) | Sign(_)) || *t == Command("frac".into()))
                && !rest.contains(&Sign('°')) =>
        {
            tokens = rest;
            degrees = true;
        }
        _ => {}
    }
    let percent_word = unit.as_ref().and_then(|u| u.thing.as_deref()).is_some_and(|t| t == "percent");
    let node = expression(tokens)?;
    Some(Value {
        node,
        unit: unit.filter(|_| !degrees_word && !percent_word),
        percent: percent || percent_word,
        degrees,
    })
}

/// Splits off the words behind an expression: a unit, or a thing counted.
fn cut_words(tokens: &[Token]) -> (&[Token], Option<Unit>) {
    let is_word = |t: &Token| matches!(t, Word(w) if w != "$");
    let Some(first) = tokens.iter().position(is_word).filter(|at| *at > 0) else { return (tokens, None) };
    // `20 \frac{\text{mi}}{\text{hr}}`
    if let [head @ .., Command(frac), Sign('{'), Word(above), Sign('}'), Sign('{'), Word(below), Sign('}')] = tokens
        && frac == "frac"
        && let (Some(above), Some(below)) = (words::unit(&above.to_lowercase()), words::unit(&below.to_lowercase()))
        && let Some(unit) = above.times(&below, -1)
    {
        return (head, Some(unit));
    }
    let (head, tail) = tokens.split_at(first);
    // A brace or sign left hanging belongs to something this does not understand.
    if matches!(head.last(), Some(Sign('{' | '(' | '^' | '+' | '-' | '*' | '=' | ','))) {
        return (tokens, None);
    }
    match unit_of(tail) {
        Some(unit) => (head, Some(unit)),
        None => (tokens, None),
    }
}

/// `cm^2`, `miles per hour`, `square feet`, `apples`.
fn unit_of(tail: &[Token]) -> Option<Unit> {
    let mut unit = Unit::NONE;
    let mut things = Vec::new();
    let mut direction = 1;
    let mut power = 1;
    let mut at = 0;
    while at < tail.len() {
        match &tail[at] {
            Word(word) => {
                let word = word.to_lowercase();
                match word.as_str() {
                    "per" => direction = -1,
                    "square" | "sq" => power = 2,
                    "cubic" | "cu" => power = 3,
                    "a" | "an" | "the" | "of" | "approximately" => {}
                    _ => {
                        let mut raised = power;
                        // `cm^2`, `cm^{2}`
                        let exponent: Vec<&Token> =
                            tail[at + 1..].iter().take(4).filter(|t| !matches!(t, Sign('{' | '}'))).collect();
                        if let [Sign('^'), Num(digits), ..] = exponent.as_slice() {
                            raised = digits.parse().ok().filter(|p| (1..=9).contains(p))?;
                            let braced = tail.get(at + 2) == Some(&Sign('{'));
                            at += if braced { 4 } else { 2 };
                        }
                        match words::unit(&word) {
                            Some(known) => unit = unit.times(&known, raised * direction)?,
                            None => things.push(word),
                        }
                        power = 1;
                    }
                }
            }
            Sign('/') => direction = -1,
            Sign('.' | ' ') => {}
            _ => return None,
        }
        at += 1;
    }
    if !things.is_empty() {
        unit.thing = Some(things.join(" "));
    }
    Some(unit)
}
