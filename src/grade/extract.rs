//! Which part of a response is its answer.
//!
//! First the segment: what stands behind the end of the turn does not count, and thinking is no
//! answer. Then the last box, then what follows "the answer is" and its kin, then weaker marks.
//! Every scan is linear, and every result says which rule found it.

use crate::grade::verdict::Kind;

/// What was found, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The answer as it stands in the response.
    pub text: String,
    /// The name of the rule that found it, such as `box` or `mark`.
    pub rule: &'static str,
}

/// The answer part of a response; `None` if there is none, as when it was cut off while thinking.
pub fn segment(response: &str) -> Option<&str> {
    let mut text = response;
    for end in ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>"] {
        text = text.split(end).next().unwrap_or(text);
    }
    if let Some((_, answer)) = text.rsplit_once("<|im_start|>answer") {
        // The rest of that line belongs to the mark unless s1's forced "Final Answer:" follows on it.
        let answer = answer.split("<|im_start|>").next().unwrap_or(answer);
        return (!answer.trim().is_empty()).then_some(answer);
    }
    if text.contains("<|im_start|>think") {
        return None;
    }
    if let Some((_, answer)) = text.rsplit_once("<answer>") {
        return Some(answer.split("</answer>").next().unwrap_or(answer));
    }
    if let Some((_, answer)) = text.rsplit_once("</think>") {
        return (!answer.trim().is_empty()).then_some(answer);
    }
    if text.contains("<think>") {
        return None;
    }
    // Another turn made up by the model itself.
    Some(text.split("<|im_start|>").next().unwrap_or(text))
}

/// The answer in a segment.
pub fn extract(segment: &str, kind: Kind) -> Option<Found> {
    let boxes = boxes(segment);
    if let Some(found) = last_box(segment, &boxes) {
        return Some(found);
    }
    match kind {
        Kind::Choice => choice(segment),
        Kind::Math | Kind::Number => marked(segment).or_else(|| weak(segment)),
    }
}

/// What the last box of a segment holds.
pub fn boxed(segment: &str) -> Option<String> {
    last_box(segment, &boxes(segment)).map(|found| found.text)
}

/// A `\boxed{...}`: where it starts, where its content lies, where it ends.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: usize,
    from: usize,
    to: usize,
    end: usize,
}

/// Every box of the text in order, nested ones after the one they stand in.
fn boxes(text: &str) -> Vec<Span> {
    let bytes = text.as_bytes();
    let partner = brace_partners(bytes);
    let mut spans = Vec::new();
    // Looked for once per line, however many boxes are left open on it.
    let mut line: std::ops::Range<usize> = 0..0;
    let mut end_of_line = |at: usize| {
        if !(line.contains(&at) || line.end == at && at > 0) {
            line = at..line_end(text, at);
        }
        line.end
    };
    for name in ["boxed", "fbox", "framebox"] {
        for (at, _) in text.match_indices(name) {
            let commanded = at > 0 && bytes[at - 1] == b'\\';
            let space = bytes[at + name.len()..].iter().take_while(|b| b.is_ascii_whitespace()).count();
            let next = at + name.len() + space;
            if bytes.get(next) == Some(&b'{') {
                // Without its backslash (lost in an escape) only the word `boxed` counts.
                if commanded || name == "boxed" {
                    let to = partner[next].unwrap_or_else(|| end_of_line(next));
                    let end = if partner[next].is_some() { to + 1 } else { to };
                    spans.push(Span { start: at - usize::from(commanded), from: next + 1, to, end });
                }
            } else if commanded && next < bytes.len() {
                // `\boxed 5`, `\boxed\frac{3}{56}`: up to the end of the formula or the line.
                let to = {
                    let line = end_of_line(next);
                    text[next..line].find('$').map_or(line, |i| next + i)
                };
                spans.push(Span { start: at - 1, from: next, to, end: to });
            }
        }
    }
    spans.sort_by_key(|span| span.start);
    spans
}

/// For each `{` its `}`; escaped braces do not count.
fn brace_partners(bytes: &[u8]) -> Vec<Option<usize>> {
    let mut partner = vec![None; bytes.len()];
    let mut open = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 1,
            b'{' => open.push(at),
            b'}' => {
                if let Some(from) = open.pop() {
                    partner[from] = Some(at);
                }
            }
            _ => {}
        }
        at += 1;
    }
    partner
}

fn line_end(text: &str, from: usize) -> usize {
    text[from..].find('\n').map_or(text.len(), |i| from + i)
}

/// The last box that says something, with the boxes listed right before it and with a sign or
/// power that stands outside.
fn last_box(text: &str, boxes: &[Span]) -> Option<Found> {
    let content = |span: &Span| text.get(span.from..span.to).unwrap_or("").trim();
    let last = boxes.iter().rposition(|span| !placeholder(content(span)))?;
    let mut first = last;
    while first > 0 {
        let (before, after) = (&boxes[first - 1], &boxes[first]);
        if before.end > after.start || !listed(&text[before.end..after.start]) || placeholder(content(before)) {
            break;
        }
        first -= 1;
    }
    if first < last {
        let parts: Vec<&str> = boxes[first..=last].iter().map(content).collect();
        return Some(Found { text: parts.join(", "), rule: "boxes" });
    }
    let span = &boxes[last];
    let mut answer = content(span).to_string();
    // `-\boxed{5}` says minus five, `\boxed{5}^2` twenty-five.
    let before = text[..span.start].trim_end_matches([' ', '\t']);
    let sign_of_a_list = before.len() < 2 || before.trim_end_matches('-').ends_with('\n');
    if before.ends_with('-') && !before.ends_with("--") && !sign_of_a_list {
        let lead = before.trim_end_matches('-').trim_end();
        if lead.ends_with(['$', '=', '(', '[']) {
            answer = format!("-({answer})");
        }
    }
    let after = &text[span.end..];
    if after.starts_with('^') || after.starts_with('!') {
        let power: String =
            after.chars().take_while(|c| !c.is_whitespace() && !matches!(c, '$' | '\\' | '.' | ',')).collect();
        if !after.starts_with("!\n") && power != "!" {
            answer = format!("({answer}){power}");
        }
    }
    Some(Found { text: answer, rule: "box" })
}

/// Whether what stands between two boxes makes them a list.
fn listed(between: &str) -> bool {
    let mut plain = between.replace(['$', '\\', '{', '}', '(', ')', '[', ']', ' ', '\n', '\t'], "");
    for word in ["text", "quad", "mbox", "and", "or"] {
        plain = plain.replace(word, ",");
    }
    plain.contains(',') && plain.chars().all(|c| matches!(c, ',' | ';'))
}

/// A box that only shows where an answer would go.
fn placeholder(content: &str) -> bool {
    // Boxes are looked at from the last: one that begins with a box holds one that was rejected.
    if content.starts_with("\\boxed") {
        return true;
    }
    if content.len() > 64 {
        return false;
    }
    let plain: String = content.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_lowercase();
    let dots = content.chars().all(|c| c.is_whitespace() || matches!(c, '.' | '…' | '{' | '}' | '~'));
    dots || content.trim_matches(['\\', ' ', ',', ';']).is_empty()
        || matches!(
            plain.as_str(),
            "ldots"
                | "dots"
                | "cdots"
                | "answer"
                | "textanswer"
                | "youranswer"
                | "textyouranswer"
                | "finalanswer"
                | "textfinalanswer"
                | "quad"
        )
}

/// What introduces an answer, lower case; each has to be followed by it.
const MARKS: &[&str] = &[
    "final answer is",
    "answer is",
    "answer:",
    "answer**",
    "answers are",
    "solution is",
    "solutions are",
    "####",
    "answer\n",
];

/// The text behind the last mark.
fn behind_mark<'a>(text: &'a str, marks: &[&str]) -> Option<&'a str> {
    // ASCII lower case keeps byte positions.
    let lower = text.to_ascii_lowercase();
    let last = marks.iter().filter_map(|mark| lower.rfind(mark).map(|at| at + mark.len())).max()?;
    Some(&text[last..])
}

fn marked(text: &str) -> Option<Found> {
    let rest = behind_mark(text, MARKS)?.trim_start_matches([' ', '\n', '\t', ':', '*', '=', '#', '\r', '_']);
    let answer = formula(rest).unwrap_or_else(|| said_of(sentence(rest)));
    let answer = answer.trim().trim_end_matches(['*', '.', '_']).trim();
    (!answer.is_empty()).then(|| Found { text: answer.to_string(), rule: "mark" })
}

/// The formula at the very start of `text`.
fn formula(text: &str) -> Option<&str> {
    for (open, close) in [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")] {
        if let Some(rest) = text.strip_prefix(open) {
            return Some(rest.split(close).next().unwrap_or(rest)).filter(|inner| !inner.trim().is_empty());
        }
    }
    None
}

/// `The largest $n$ is 34` says 34: behind the only verb, if a number or formula is there.
fn said_of(sentence: &str) -> &str {
    let prose = sentence.split(' ').next().is_some_and(|w| w.len() > 2 && w.chars().all(char::is_alphabetic));
    let lists = [" and ", " or ", ","].iter().any(|separator| sentence.contains(separator));
    match sentence.split_once(" is ") {
        Some((_, said)) if prose && !lists && !said.contains(" is ") => {
            let said = said.trim_start_matches(['*', ' ', ':']);
            let plain = said.starts_with(['$', '\\', '-']) || said.starts_with(|c: char| c.is_ascii_digit());
            if plain { formula(said).unwrap_or(said) } else { sentence }
        }
        _ => sentence,
    }
}

/// Up to the end of the sentence: a line break, or a stop that is no decimal point.
fn sentence(text: &str) -> &str {
    let mut end = line_end(text, 0);
    if let Some(at) = text[..end].find(". ") {
        end = at;
    }
    for word in [" because", " since ", ", because", ", since", ", not ", ", but "] {
        end = end.min(text[..end].find(word).unwrap_or(end));
    }
    &text[..end]
}

/// The last bold text, the last formula, an equation or the only number in the last line.
fn weak(text: &str) -> Option<Found> {
    let found = |text: &str, rule| Some(Found { text: text.trim().trim_end_matches('.').to_string(), rule });
    let last_line = text.trim_end().rsplit('\n').next().unwrap_or("").trim();
    if let Some(bold) = between_last(last_line, "**", "**").filter(|bold| bold.chars().any(|c| c.is_ascii_digit())) {
        return found(bold, "bold");
    }
    for (open, close) in [("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$")] {
        if let Some(inner) = between_last(text, open, close) {
            return found(inner, "formula");
        }
    }
    let words = |line: &str| line.split([' ', ',']).any(|word| word.len() > 3 && word.chars().all(char::is_alphabetic));
    if text.trim() == last_line && last_line.len() < 200 && is_expression(last_line) {
        return found(last_line, "whole");
    }
    if last_line.len() < 200 {
        const LEADS: [&str; 6] = ["So ", "Thus ", "Hence ", "Therefore ", "Then ", "We get "];
        let bare = LEADS.iter().find_map(|lead| last_line.strip_prefix(lead)).unwrap_or(last_line);
        if (1..=2).contains(&bare.matches(['=', '≈']).count()) && !words(bare) {
            return found(bare, "last line");
        }
        if let Some(number) = only_number(last_line) {
            return found(number, "last line");
        }
    }
    None
}

/// A number or formula with no word beside it: commands apart, no two letters are neighbours.
fn is_expression(line: &str) -> bool {
    let (mut letters, mut command) = (0, false);
    for c in line.chars() {
        command = c == '\\' || (command && c.is_alphabetic());
        letters = if c.is_alphabetic() && !command { letters + 1 } else { 0 };
        if letters > 1 {
            return false;
        }
    }
    line.contains(|c: char| c.is_ascii_digit()) && !["\\boxed", "\\fbox"].iter().any(|name| line.contains(name))
}

/// What stands between the last closing mark and the opening one before it.
fn between_last<'a>(text: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let end = text.rfind(close)?;
    let start = text[..end].rfind(open)? + open.len();
    Some(&text[start..end]).filter(|inner| !inner.trim().is_empty())
}

/// The number of a line that holds exactly one.
fn only_number(line: &str) -> Option<&str> {
    let is = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',' | '/');
    let mut only = None;
    for word in line.split(|c: char| !is(c) && c != '-') {
        let word = word.trim_matches(['.', ',']);
        if word.chars().any(|c| c.is_ascii_digit()) && only.replace(word).is_some() {
            return None;
        }
    }
    only
}

/// The letter of a choice without a box.
fn choice(text: &str) -> Option<Found> {
    const CHOICE_MARKS: &[&str] = &[
        "answer is",
        "answer:",
        "answer**",
        "answer\n",
        "option is",
        "choice is",
        "option:",
        "choice:",
        "####",
        "choose",
        "answer would be",
    ];
    if let Some(rest) = behind_mark(text, CHOICE_MARKS) {
        return letters(rest).map(|text| Found { text, rule: "mark" });
    }
    let trimmed = text.trim();
    let mut chars = trimmed.trim_start_matches(['(', '*']).chars();
    let first = chars.next().filter(char::is_ascii_uppercase)?;
    let next = chars.next();
    matches!(next, None | Some(')' | '.' | ':' | '*')).then(|| Found { text: first.to_string(), rule: "start" })
}

/// The letters right behind a mark: `(B)`, `**B**`, `\text{B}`, `option b`, `A, B`.
fn letters(rest: &str) -> Option<String> {
    let mut rest = rest;
    loop {
        let before = rest.len();
        rest = rest.trim_start_matches([' ', ':', '*', '(', '$', '\n', '[', '{', '"', '\'', '_', '\r', '\t']);
        for filler in [
            "\\textbf",
            "\\text",
            "\\mathrm",
            "\\mathbf",
            "\\(",
            "\\[",
            "therefore",
            "option",
            "Option",
            "choice",
            "Choice",
            "the ",
            "clearly",
            "letter",
        ] {
            rest = rest.strip_prefix(filler).unwrap_or(rest);
        }
        if rest.len() == before {
            break;
        }
    }
    let mut found = Vec::new();
    let mut chars = rest.char_indices().peekable();
    while let Some((_, c)) = chars.next() {
        let next = chars.peek().map(|(_, next)| *next);
        let alone = next.is_none_or(|next| !next.is_alphanumeric());
        // A small letter alone is a choice only where nothing else follows: "is a number" is none.
        let ends = next.is_none_or(|next| matches!(next, ')' | '.' | '}' | '*' | '\n' | ']' | '$'));
        if !(alone && (c.is_ascii_uppercase() || (c.is_ascii_lowercase() && ends))) {
            break;
        }
        found.push(c.to_ascii_uppercase());
        // `A, B` and `A and B` name two.
        let tail: String = chars.clone().map(|(_, c)| c).take(12).collect();
        let separated = tail.trim_start_matches([')', '}', '*', '$', '.']);
        let skip = [", and ", " and ", " or ", ", ", "/", " & "].iter().find(|s| separated.starts_with(**s));
        let Some(skip) = skip else { break };
        let skipped = tail.chars().count() - separated.chars().count() + skip.chars().count();
        for _ in 0..skipped {
            chars.next();
        }
        while chars.peek().is_some_and(|(_, c)| matches!(c, '(' | '*' | '$')) {
            chars.next();
        }
    }
    (!found.is_empty()).then(|| found.iter().map(char::to_string).collect::<Vec<_>>().join(", "))
}
