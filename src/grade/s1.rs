//! Scoring as the s1 study did it (simplescaling/s1, commit 77272c6, its fork of lm-evaluation-harness), for
//! results that are to be compared with published ones.
//!
//! An answer is taken from the part behind the last answer mark: the last box, or what follows `Answer:`, or
//! all of it. It is right if it equals the gold answer as text, whole numbers apart, which are compared as
//! numbers. What is neither goes to a judge, if there is one. Choices without a letter count as `A`.
//! Some responses end the original with an exception, and with it the evaluation: such a response is
//! wrong here and marked ([`Crash`]).

use super::verdict::{Graded, Kind, Verdict};
use regex::Regex;
use std::sync::LazyLock;

/// What ends the original program on a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// Its way to take a box apart expects `\boxed{` at the start and a brace at the end.
    Assertion,
    /// A digit that is no number (`²`), or more digits than Python turns into one.
    Value,
}

impl Crash {
    /// The exception's name.
    pub fn name(self) -> &'static str {
        match self {
            Crash::Assertion => "AssertionError",
            Crash::Value => "ValueError",
        }
    }

    fn rule(self) -> &'static str {
        match self {
            Crash::Assertion => "s1 crash: AssertionError",
            Crash::Value => "s1 crash: ValueError",
        }
    }
}

/// Digits that Python's `int` reads at most, since 3.11.
const MOST_DIGITS: usize = 4300;

/// Whoever compares an answer with options: for mathematics a reply that should be an option's number
/// counted from 1, or -1; for choices a letter.
pub type Judge<'j> = dyn FnMut(Question) -> String + 'j;

/// What a judge is asked about a sample.
#[derive(Debug, Clone, Copy)]
pub enum Question<'q> {
    /// Which of these the attempt is; the first is the gold answer.
    Options {
        /// Which sample of the problem, counted from 0.
        sample: usize,
        /// The gold answer and those of the samples before, each once.
        options: &'q [String],
        /// What the sample answers.
        attempt: &'q str,
    },
    /// Which letter the attempt picks.
    Letter {
        /// Which sample of the problem, counted from 0.
        sample: usize,
        /// What the sample answers.
        attempt: &'q str,
    },
}

/// What several samples of one problem come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scored {
    /// As the original logs them: an answer that the judge found equal to an option is that option.
    pub extracted: Vec<String>,
    /// By sample; the first alone is the original's `exact_match`.
    pub matches: Vec<bool>,
}

impl Scored {
    /// `cov@n`: whether one of the first `n` samples is right.
    pub fn covered(&self, n: usize) -> bool {
        self.matches.iter().take(n).any(|right| *right)
    }

    /// `maj@n`: whether the most frequent answer of the first `n`, the earliest among equals, is the gold one.
    pub fn majority(&self, n: usize, gold: &str, kind: Kind) -> bool {
        let first = &self.extracted[..n.min(self.extracted.len())];
        let count = |answer: &String| first.iter().filter(|other| *other == answer).count();
        let most = first.iter().map(count).max().unwrap_or(0);
        first.iter().find(|answer| count(answer) == most).is_some_and(|answer| *answer == gold_of(gold, kind))
    }
}

/// Grades one response without a judge.
pub fn grade(gold: &str, response: &str, kind: Kind) -> Graded {
    match score(gold, &[response], kind, None) {
        Ok(scored) => {
            let verdict = if scored.matches[0] { Verdict::Correct } else { Verdict::Wrong };
            let extracted = scored.extracted.into_iter().next();
            Graded { verdict, extracted, found: "s1", rule: "s1" }
        }
        Err((_, crash)) => Graded { verdict: Verdict::Wrong, extracted: None, found: "none", rule: crash.rule() },
    }
}

/// Scores the samples of one problem in order. `Err`: the number of the sample (from 0) that ends the
/// original, and how.
pub fn score(
    gold: &str,
    responses: &[&str],
    kind: Kind,
    mut judge: Option<&mut Judge>,
) -> Result<Scored, (usize, Crash)> {
    let gold = gold_of(gold, kind);
    let mut scored = Scored { extracted: Vec::new(), matches: Vec::new() };
    for (sample, response) in responses.iter().enumerate() {
        let answer = extract(response).map_err(|crash| (sample, crash))?;
        let answer = match kind {
            Kind::Choice => letter(answer, sample, judge.as_deref_mut()),
            Kind::Math | Kind::Number => settle(answer, sample, &gold, &scored.extracted, judge.as_deref_mut())
                .map_err(|crash| (sample, crash))?,
        };
        scored.matches.push(answer == gold);
        scored.extracted.push(answer);
    }
    Ok(scored)
}

/// A gold answer of ASCII digits loses its leading zeros.
fn gold_of(gold: &str, kind: Kind) -> String {
    match kind {
        Kind::Choice => gold.to_string(),
        Kind::Math | Kind::Number if is_digits(gold) => number(gold).unwrap_or_else(|_| gold.to_string()),
        Kind::Math | Kind::Number => gold.to_string(),
    }
}

/// An answer to a mathematics problem made comparable.
fn settle(
    answer: String,
    sample: usize,
    gold: &str,
    earlier: &[String],
    judge: Option<&mut Judge>,
) -> Result<String, Crash> {
    if is_digits(&answer) && is_digits(gold) {
        return number(&answer);
    }
    let Some(judge) = judge else { return Ok(answer) };
    let mut options = vec![gold.to_string()];
    for answer in earlier {
        if !options.contains(answer) {
            options.push(answer.clone());
        }
    }
    let reply = judge(Question::Options { sample, options: &options, attempt: &answer });
    // An index beyond the options, and a reply that is none, be it for a blank, leave the answer as it is.
    let index = reply.bytes().all(|byte| byte.is_ascii_digit()).then(|| reply.parse::<usize>().ok()).flatten();
    let chosen = index.and_then(|index| index.checked_sub(1)).and_then(|index| options.into_iter().nth(index));
    Ok(chosen.unwrap_or(answer))
}

/// One of A to D, whatever the response says.
fn letter(answer: String, sample: usize, judge: Option<&mut Judge>) -> String {
    let upper = |text: String| if matches!(text.as_str(), "a" | "b" | "c" | "d") { text.to_uppercase() } else { text };
    let known = |text: &str| matches!(text, "A" | "B" | "C" | "D");
    let mut answer = upper(answer);
    if !known(&answer)
        && let Some(judge) = judge
    {
        answer = judge(Question::Letter { sample, attempt: &answer });
    }
    if known(&answer) { answer } else { "A".into() }
}

/// The answer in a response.
fn extract(response: &str) -> Result<String, Crash> {
    static ANSWER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?is)Answer\s*:\s*(.*)").expect("a regular expression"));
    let part = part(response);
    if let Some(boxed) = last_boxed(part) {
        return unboxed(boxed).map(String::from);
    }
    // Its group takes the rest of the text, so the first match is the only one.
    Ok(ANSWER.captures(part).map_or(part, |found| found.get(1).map_or("", |rest| rest.as_str())).to_string())
}

/// The part of a response that is looked at.
fn part(response: &str) -> &str {
    if let Some((_, answer)) = response.rsplit_once("<|im_start|>answer\n") {
        return answer;
    }
    match response.rsplit_once("<|im_start|>") {
        Some((_, turn)) => turn.split_once('\n').map_or(turn, |(_, rest)| rest),
        None => response,
    }
}

/// The last box, from its command to its closing brace.
fn last_boxed(text: &str) -> Option<&str> {
    if let Some(at) = text.rfind(r"\boxed ") {
        let end = text[at..].find('$').map_or(text.len(), |length| at + length);
        return Some(&text[at..end]);
    }
    let at = text.rfind(r"\boxed").or_else(|| text.rfind(r"\fbox"))?;
    let mut open = 0usize;
    for (offset, byte) in text[at..].bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            // A brace that closes none before one opens is never the last: counting goes below zero there.
            b'}' if open == 0 => return None,
            b'}' => {
                open -= 1;
                if open == 0 {
                    return Some(&text[at..=at + offset]);
                }
            }
            _ => {}
        }
    }
    None
}

/// What a box holds.
fn unboxed(boxed: &str) -> Result<&str, Crash> {
    if boxed.contains(r"\boxed ") {
        return boxed.strip_prefix(r"\boxed ").ok_or(Crash::Assertion);
    }
    boxed.strip_prefix(r"\boxed{").and_then(|rest| rest.strip_suffix('}')).ok_or(Crash::Assertion)
}

/// Python's `str.isdigit`: not empty, decimal digits of any script, and small raised or circled ones.
fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| digit(c).is_some() || raised(c))
}

/// Digits that are not decimal: Python's `int` refuses them.
fn raised(c: char) -> bool {
    matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨' | '⑴'..='⑼' | '⒈'..='⒐' | '⓪' | '⓵'..='⓽' | '⓿' | '❶'..='❾' | '➀'..='➈' | '➊'..='➒')
}

/// The value of a decimal digit, of the scripts met in answers.
fn digit(c: char) -> Option<u32> {
    const ZEROS: [char; 8] = ['0', '٠', '۰', '०', '০', '๐', '０', '߀'];
    let value = |zero: &char| (c as u32).checked_sub(*zero as u32).filter(|value| *value < 10);
    ZEROS.iter().find_map(value)
}

/// `str(int(text))`.
fn number(text: &str) -> Result<String, Crash> {
    let digits: String = text
        .chars()
        .map(|c| digit(c).and_then(|value| char::from_digit(value, 10)))
        .collect::<Option<_>>()
        .ok_or(Crash::Value)?;
    if digits.len() > MOST_DIGITS {
        return Err(Crash::Value);
    }
    let short = digits.trim_start_matches('0');
    Ok(if short.is_empty() { "0" } else { short }.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extracted(response: &str) -> String {
        extract(response).unwrap()
    }

    #[test]
    fn the_answer_is_the_last_box_then_what_follows_the_word_then_everything() {
        assert_eq!(extracted(r"so \boxed{1} or \boxed{\frac{1}{2}} then"), r"\frac{1}{2}");
        assert_eq!(extracted(r"$\boxed 7$ and more"), "7");
        assert_eq!(extracted("first Answer: one\nand answer : two"), "one\nand answer : two");
        assert_eq!(extracted("just 42"), "just 42");
        assert_eq!(extracted("<|im_start|>think\n\\boxed{1}<|im_start|>answer\n\\boxed{2}"), "2");
        assert_eq!(extracted("<|im_start|>solution\n3"), "3");
        assert_eq!(extracted(r"\boxed{3"), r"\boxed{3");
    }

    #[test]
    fn what_ends_the_original_is_a_marked_failure() {
        for (response, crash) in
            [(r"\fbox{42}", "AssertionError"), ("\\boxed\n{42}", "AssertionError"), (r"\boxed{²}", "ValueError")]
        {
            let graded = grade("42", response, Kind::Math);
            assert!(graded.verdict == Verdict::Wrong && graded.rule.ends_with(crash), "{response}: {graded:?}");
        }
        let long = format!("\\boxed{{{}}}", "1".repeat(4301));
        assert_eq!(grade("42", &long, Kind::Math).rule, "s1 crash: ValueError");
    }

    #[test]
    fn whole_numbers_are_compared_as_numbers_and_everything_else_as_text() {
        assert_eq!(grade("023", r"\boxed{23}", Kind::Math).verdict, Verdict::Correct);
        assert_eq!(grade("23", r"\boxed{٢٣}", Kind::Math).verdict, Verdict::Correct);
        assert_eq!(grade("0.5", r"\boxed{\frac{1}{2}}", Kind::Math).verdict, Verdict::Wrong);
    }

    #[test]
    fn no_letter_counts_as_a() {
        assert_eq!(grade("A", "no idea", Kind::Choice).verdict, Verdict::Correct);
        assert_eq!(grade("B", "Answer: b", Kind::Choice).verdict, Verdict::Correct);
        assert_eq!(grade("C", "**Answer: C**", Kind::Choice).verdict, Verdict::Wrong);
    }

    #[test]
    fn a_judge_names_the_option_and_nonsense_changes_nothing() {
        let mut asked = Vec::new();
        let mut replies = ["1", "9", "maybe", "-1"].into_iter();
        let mut judge = |question: Question| {
            if let Question::Options { options, attempt, .. } = question {
                asked.push((options.to_vec(), attempt.to_string()));
            }
            replies.next().unwrap().to_string()
        };
        let responses = [r"\boxed{5}", r"\boxed{6}", r"\boxed{7}", r"\boxed{8}"];
        let scored = score("x=5", &responses, Kind::Math, Some(&mut judge)).unwrap();
        assert_eq!(scored.extracted, ["x=5", "6", "7", "8"]);
        assert_eq!(scored.matches, [true, false, false, false]);
        assert!(scored.covered(1) && scored.majority(1, "x=5", Kind::Math));
        assert_eq!(asked[3].0, ["x=5", "6", "7"]);
    }
}
