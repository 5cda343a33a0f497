//! Whether a response answers a question rightly: three verdicts, no computer algebra, no clock.
//!
//! The way of an answer: [`extract`] finds it, [`normalise`] makes tokens, [`answer`] types them,
//! [`decide`] compares with the gold answer. Each step is linear or bounded, so no input takes
//! long, and none panics. "Undecided" is an answer: it is counted apart, never as right.

pub mod answer;
pub mod decide;
pub mod extract;
pub mod modular;
pub mod normalise;
pub mod number;
pub mod parse;
mod region;
pub mod s1;
mod sampling;
pub mod stats;
mod verdict;
pub mod words;

pub use stats::wilson;
pub use verdict::{Graded, Kind, Ruling, Verdict};

use std::borrow::Cow;

/// Longer answers are not read; a response may be of any length.
const ANSWER_BYTES: usize = 60_000;

/// Grades a response.
pub fn grade(gold: &str, response: &str, kind: Kind) -> Graded {
    let found = extract::segment(response).and_then(|segment| extract::extract(segment, kind));
    let Some(found) = found else {
        return Graded { verdict: Verdict::Wrong, extracted: None, found: "none", rule: "no answer" };
    };
    let (verdict, rule) = match kind {
        Kind::Choice => choice(gold, &found.text),
        Kind::Math | Kind::Number => judge(gold, &found.text),
    };
    Graded { verdict, extracted: Some(found.text), found: found.rule, rule }
}

/// Compares two answers as they stand, without extraction; a gold answer in a box is what the box holds.
pub fn judge(gold: &str, given: &str) -> Ruling {
    let inner = unboxed(gold);
    if [gold, &*inner].iter().any(|gold| gold.trim() == given.trim()) {
        return (Verdict::Correct, "same text");
    }
    let gold = &*inner;
    if given.len() > ANSWER_BYTES || gold.len() > ANSWER_BYTES {
        return (Verdict::Undecided, "too long");
    }
    let (gold_tokens, given_tokens) = (normalise::tokens(&unescaped(gold)), normalise::tokens(&unescaped(given)));
    if gold_tokens == given_tokens && !gold_tokens.is_empty() && !gold_tokens.contains(&normalise::Token::Unknown) {
        return (Verdict::Correct, "same tokens");
    }
    let (gold_tokens, given_tokens) = match (answer::congruence(&gold_tokens), answer::congruence(&given_tokens)) {
        (Some((gold, m)), Some((given, n))) => match decide::congruent(gold, m, given, n) {
            Some(ruling) => return ruling,
            None => (gold, given),
        },
        // Its modulus may be left out, or said too much.
        (gold, given) => (gold.map_or(&gold_tokens[..], |g| g.0), given.map_or(&given_tokens[..], |g| g.0)),
    };
    let Some(gold_answer) = answer::answer(gold_tokens) else { return (Verdict::Undecided, "gold not understood") };
    // Words are compared as words, whatever the other side could also be read as.
    if let answer::Answer::Text(words) = &gold_answer {
        return decide::text_against(words, &answer::words_of(given_tokens));
    }
    // A word without `\text` looks like variables.
    if let ([normalise::Token::Letters(word)], [normalise::Token::Word(_)]) = (gold_tokens, given_tokens)
        && word.len() > 1
        && answer::words_of(gold_tokens) == answer::words_of(given_tokens)
    {
        return (Verdict::Correct, "text");
    }
    match answer::answer(given_tokens) {
        Some(given_answer) => decide::compare(&gold_answer, &given_answer),
        None => (Verdict::Undecided, "answer not understood"),
    }
}

/// Whether two answers are the same one, for counting how often each was given.
pub fn same(one: &str, other: &str, kind: Kind) -> bool {
    match kind {
        Kind::Choice => match (single_letter(one), single_letter(other)) {
            (Some(one), Some(other)) => one == other,
            _ => one.trim() == other.trim(),
        },
        Kind::Math | Kind::Number => judge(one, other).0 == Verdict::Correct,
    }
}

/// `Err` says why a gold answer cannot be compared with anything.
pub fn check_gold(gold: &str, kind: Kind) -> Result<(), String> {
    if gold.trim().is_empty() {
        return Err("it is empty".into());
    }
    match kind {
        Kind::Choice => match single_letter(gold) {
            Some(_) => Ok(()),
            None => Err("it is not a letter".into()),
        },
        Kind::Math | Kind::Number => match typed(gold) {
            None => Err("it is no number, expression, list, interval, equation or text known here".into()),
            Some(answer::Answer::Text(_)) if kind == Kind::Number => Err("it is text, not a number".into()),
            Some(_) => Ok(()),
        },
    }
}

fn typed(gold: &str) -> Option<answer::Answer> {
    let tokens = normalise::tokens(&unescaped(&unboxed(gold)));
    answer::answer(answer::congruence(&tokens).map_or(&tokens[..], |(residue, _)| residue))
}

/// What the boxes of a gold answer hold, for who keeps whole solutions.
fn unboxed(gold: &str) -> Cow<'_, str> {
    match gold.contains("\\boxed").then(|| extract::boxed(gold)).flatten() {
        Some(inner) => Cow::Owned(inner),
        None => Cow::Borrowed(gold),
    }
}

/// `\\frac` as `\frac`: LaTeX that was escaped once too often. In matrices `\\` ends a row.
fn unescaped(text: &str) -> Cow<'_, str> {
    let twice = text.as_bytes().windows(3).any(|w| w[..2] == *b"\\\\" && w[2].is_ascii_alphabetic());
    let rows = ["\\begin", "\\matrix", "\\pmatrix", "\\substack"].iter().any(|name| text.contains(name));
    if twice && (!rows || text.contains("\\\\begin")) {
        return Cow::Owned(text.replace("\\\\", "\\"));
    }
    Cow::Borrowed(text)
}

fn choice(gold: &str, given: &str) -> Ruling {
    let Some(gold) = single_letter(gold) else { return (Verdict::Undecided, "gold not understood") };
    match single_letter(given) {
        Some(letter) if letter == gold => (Verdict::Correct, "letter"),
        _ => (Verdict::Wrong, "letter"),
    }
}

/// The one letter a text names: `B`, `(b)`, `\text{B}`, `Option B`, `B) because`.
fn single_letter(text: &str) -> Option<char> {
    const FILLER: &[&str] = &["option", "choice", "answer", "text", "textbf", "mathrm", "mathbf", "the", "is"];
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    let words: Vec<&str> = words.filter(|w| !FILLER.contains(&w.to_ascii_lowercase().as_str())).take(20).collect();
    let as_letter = |word: &&str| {
        let mut chars = word.chars();
        chars.next().filter(|c| c.is_ascii_alphabetic() && chars.next().is_none()).map(|c| c.to_ascii_uppercase())
    };
    match words.as_slice() {
        [only] => as_letter(only),
        // `B) because ...`: the letter stands first and is marked as one.
        [first, rest @ ..] => {
            let letter = as_letter(first)?;
            let at = text.find(first)? + first.len();
            let marked = text[at..].starts_with([')', '.', ':', '}']);
            let another = rest.iter().any(|w| {
                as_letter(w).is_some_and(|l| l != letter && w.chars().all(|c| c.is_ascii_uppercase()) && l != 'I')
            });
            (marked && !another).then_some(letter)
        }
        [] => None,
    }
}
