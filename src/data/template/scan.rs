//! The text of a template, read as `minijinja`'s lexer reads it, before its parser does: how many symbols its tags have, and
//! the same text with the filters `__shown` and `__kept` where a value becomes text or stays in a `namespace`.
//!
//! No line is added. A text that ends within a tag stays as it is: the parser will refuse it.

/// What there is to a template before it is parsed.
pub(super) struct Scan {
    /// With the filters in it.
    pub text: String,
    /// Names, numbers, texts, operators and brackets within tags.
    pub symbols: usize,
    /// Those of them that can put a value into another.
    pub nesting: usize,
    /// It has a word by which a template comes back to itself: a macro, an include, a recursive loop.
    pub calls: bool,
}

/// Filters that neither walk nor print what they are given, or see to it themselves.
const QUIET: &[&str] = &[
    "length",
    "count",
    "list",
    "first",
    "last",
    "default",
    "d",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "items",
];
/// Words by which what is run once may be run again, deeper.
const CALLS: &[&str] =
    &["macro", "call", "caller", "recursive", "loop", "include", "import", "from", "extends", "block", "super", "self"];
/// Words that end what `~` takes.
const ENDS: &[&str] =
    &["and", "or", "not", "if", "else", "in", "recursive", "ignore", "with", "without", "as", "import"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Word,
    Number,
    Text,
    Operator,
}

/// A symbol: from where to where.
#[derive(Clone, Copy)]
struct Symbol {
    shape: Shape,
    from: usize,
    to: usize,
}

/// Within one pair of brackets, or a tag.
#[derive(Default, Clone)]
struct Level {
    /// The first symbol of what `~` would take, and of what `in` would.
    joined: Option<usize>,
    sought: Option<usize>,
    /// There is a `~` before it.
    after_tilde: bool,
}

pub(super) fn scan(text: &str) -> Scan {
    let mut scan = Scan { text: String::new(), symbols: 0, nesting: 0, calls: false };
    let mut marks = Marks::default();
    let mut at = 0;
    while let Some(start) = text[at..].find('{').map(|found| found + at) {
        let after = start + 2;
        match text.as_bytes().get(start + 1) {
            Some(b'{') => at = tag(text, after, "}}", &mut scan, &mut marks),
            Some(b'%') => match raw(&text[after..]) {
                Some(length) => at = after + length,
                None => at = tag(text, after, "%}", &mut scan, &mut marks),
            },
            Some(b'#') => {
                let body = after + usize::from(text[after..].starts_with(['-', '+']));
                at = text[body..].find("#}").map_or(text.len(), |end| body + end + 2);
            }
            _ => at = start + 1,
        }
    }
    scan.text = marks.into_text(text);
    scan
}

/// Behind `{%`: the length of a raw block, to the end of its `endraw` tag.
fn raw(text: &str) -> Option<usize> {
    let body = basic(text.strip_prefix(['-', '+']).unwrap_or(text), "raw")?;
    let body = text.len() - body.len();
    let mut at = body;
    while let Some(next) = text[at..].find("{%") {
        at += next + 2;
        let rest = text[at..].strip_prefix(['-', '+']).unwrap_or(&text[at..]);
        if let Some(rest) = basic(rest, "endraw") {
            return Some(text.len() - rest.len());
        }
    }
    Some(text.len())
}

/// What follows a tag of this one word.
fn basic<'t>(text: &'t str, word: &str) -> Option<&'t str> {
    let blank = |c: char| c.is_ascii_whitespace();
    let rest = text.trim_start_matches(blank).strip_prefix(word)?.trim_start_matches(blank);
    rest.strip_prefix(['-', '+']).unwrap_or(rest).strip_prefix("%}")
}

/// Reads a tag from behind its opening; returns where the text goes on.
fn tag(text: &str, start: usize, end: &str, scan: &mut Scan, marks: &mut Marks) -> usize {
    let (symbols, close, next) = lex(text, start + usize::from(text[start..].starts_with(['-', '+'])), end);
    let word = |symbol: &Symbol| &text[symbol.from..symbol.to];
    scan.symbols += symbols.len();
    for symbol in &symbols {
        match symbol.shape {
            Shape::Operator => {
                scan.nesting += usize::from(matches!(word(symbol), "[" | "{" | "(" | "*" | "+" | "|" | ","));
            }
            Shape::Word => scan.calls |= CALLS.contains(&word(symbol)),
            _ => {}
        }
    }
    // Cut off: the parser says so.
    if close.is_some() {
        mark(text, &symbols, end == "%}", marks);
    }
    next
}

/// The symbols up to the tag's end, where that is if there is one, and where the text goes on.
fn lex(text: &str, start: usize, end: &str) -> (Vec<Symbol>, Option<usize>, usize) {
    let bytes = text.as_bytes();
    let (mut symbols, mut depth, mut at) = (Vec::new(), 0i64, start);
    while at < text.len() {
        let (from, rest) = (at, &text[at..]);
        if bytes[at].is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if depth == 0 {
            let bare = rest.strip_prefix(['-', '+']).filter(|bare| bare.starts_with(end)).unwrap_or(rest);
            if bare.starts_with(end) {
                return (symbols, Some(from), from + (rest.len() - bare.len()) + end.len());
            }
        }
        let shape = match bytes[at] {
            quote @ (b'\'' | b'"') => match string(&bytes[at..], quote) {
                Some(length) => {
                    at += length;
                    Shape::Text
                }
                None => break,
            },
            b'0'..=b'9' => {
                at += number(&bytes[at..], at > 0 && bytes[at - 1] == b'.');
                Shape::Number
            }
            byte if byte == b'_' || byte.is_ascii_alphabetic() || !byte.is_ascii() => {
                at += bytes[at..]
                    .iter()
                    .take_while(|b| **b == b'_' || b.is_ascii_alphanumeric() || !b.is_ascii())
                    .count();
                Shape::Word
            }
            byte => {
                depth += i64::from(b"([{".contains(&byte)) - i64::from(b")]}".contains(&byte));
                let two = matches!(bytes.get(at..at + 2), Some(b"//" | b"**" | b"==" | b"!=" | b">=" | b"<="));
                at += 1 + usize::from(two);
                Shape::Operator
            }
        };
        symbols.push(Symbol { shape, from, to: at });
    }
    (symbols, None, text.len())
}

/// The length of a text in quotes.
fn string(bytes: &[u8], quote: u8) -> Option<usize> {
    let mut escaped = false;
    let end = bytes.iter().skip(1).position(|&byte| {
        let ends = !escaped && byte == quote;
        escaped = !escaped && byte == b'\\';
        ends
    })?;
    Some(end + 2)
}

/// The length of a number; behind a dot it has no fraction.
fn number(bytes: &[u8], behind_dot: bool) -> usize {
    let radix = matches!(bytes.get(..2), Some(b"0x" | b"0X" | b"0b" | b"0B" | b"0o" | b"0O"));
    let (mut at, mut fraction) = (1, radix || behind_dot);
    while let Some(&byte) = bytes.get(at) {
        let sign = matches!(byte, b'+' | b'-') && !radix && matches!(bytes[at - 1], b'e' | b'E');
        let dot = byte == b'.'
            && !fraction
            && !bytes.get(at + 1).is_some_and(|next| *next == b'_' || next.is_ascii_alphabetic() || !next.is_ascii());
        if !(sign || dot || byte == b'_' || byte.is_ascii_alphanumeric()) {
            break;
        }
        fraction |= dot;
        at += 1;
    }
    at
}

/// Where filters are put into a text.
#[derive(Default)]
struct Marks {
    /// Where, what comes first at one place, what.
    puts: Vec<(usize, i64, &'static str)>,
}

impl Marks {
    fn put(&mut self, at: usize, what: &'static str) {
        self.puts.push((at, self.puts.len() as i64, what));
    }

    /// An opening bracket stands outside of those that were put there before, and behind what ends there.
    fn around(&mut self, from: usize, to: usize, close: &'static str) {
        self.put(to, close);
        self.puts.push((from, i64::MAX - self.puts.len() as i64, "("));
    }

    fn into_text(mut self, text: &str) -> String {
        self.puts.sort_by_key(|(at, order, _)| (*at, *order));
        let mut marked = String::with_capacity(text.len() + 12 * self.puts.len());
        let mut done = 0;
        for (at, _, what) in self.puts {
            marked.push_str(&text[done..at]);
            marked.push_str(what);
            done = at;
        }
        marked + &text[done..]
    }
}

/// Marks one tag.
fn mark(text: &str, symbols: &[Symbol], block: bool, marks: &mut Marks) {
    let word = |at: usize| symbols.get(at).map_or("", |symbol| &text[symbol.from..symbol.to]);
    let is = |at: usize, shape: Shape| symbols.get(at).is_some_and(|symbol| symbol.shape == shape);
    let operator = |at: usize| if is(at, Shape::Operator) { word(at) } else { "" };
    let mut levels = vec![Level::default()];
    // The `in` of a loop's head is no operator.
    let mut head = block && word(0) == "for";
    // What stands before a symbol is something that an operator can follow.
    let mut ended = false;
    // The `not` of `not in`.
    let mut negated = false;
    for at in 0..symbols.len() {
        let Some(level) = levels.last_mut() else { return };
        let before = |at: usize| at.checked_sub(1);
        // A name behind a dot, a bar or `is` is no word of the language.
        let name = before(at).is_some_and(|before| {
            matches!(operator(before), "." | "|")
                || (is(before, Shape::Word)
                    && (word(before) == "is" || (word(before) == "not" && before > 0 && word(before - 1) == "is")))
        });
        let is_not = word(at) == "not" && before(at).is_some_and(|before| word(before) == "is");
        // Where a value has to stand, they are names, but for `not`.
        let language = ENDS.contains(&word(at)) && (ended || negated || word(at) == "not");
        let ends = match symbols[at].shape {
            Shape::Operator => matches!(word(at), ")" | "]" | "}"),
            Shape::Word => name || !((block && at == 0) || language),
            _ => true,
        };
        match symbols[at].shape {
            Shape::Word if block && at == 0 => *level = Level::default(),
            Shape::Word if !name && !is_not && language => {
                let sought = word(at) == "in" || (word(at) == "not" && ended);
                let header = word(at) == "in" && levels.len() == 1 && std::mem::take(&mut head);
                if let Some(level) = levels.last_mut() {
                    close(symbols, level, at, marks);
                    if sought && !header {
                        around(symbols, level.sought, at, marks);
                    }
                    *level = Level::default();
                }
            }
            Shape::Operator => match word(at) {
                "(" | "[" | "{" => {
                    begin(level, at);
                    levels.push(Level::default());
                }
                ")" | "]" | "}" => {
                    close(symbols, level, at, marks);
                    levels.pop();
                }
                "~" => {
                    around(symbols, level.joined, at, marks);
                    (level.joined, level.after_tilde) = (None, true);
                }
                "+" | "-" if ended => {
                    close(symbols, level, at, marks);
                    (level.joined, level.after_tilde) = (None, false);
                }
                "*" | "**" if !ended => *level = Level::default(),
                "," | ":" | "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" => {
                    close(symbols, level, at, marks);
                    *level = Level::default();
                }
                "|" if !QUIET.contains(&word(at + 1)) => marks.put(symbols[at].from, "|__shown"),
                _ => begin(level, at),
            },
            _ => begin(level, at),
        }
        negated = word(at) == "not" && ended && !name && !is_not;
        ended = ends;
    }
    if let Some(level) = levels.last() {
        close(symbols, level, symbols.len(), marks);
    }
    if block && word(0) == "set" {
        keep(symbols, word, operator, marks);
    }
}

fn begin(level: &mut Level, at: usize) {
    level.joined.get_or_insert(at);
    level.sought.get_or_insert(at);
}

/// What stands behind a `~`, up to the symbol `end`.
fn close(symbols: &[Symbol], level: &Level, end: usize, marks: &mut Marks) {
    if level.after_tilde {
        around(symbols, level.joined, end, marks);
    }
}

/// Puts the symbols from `start` to before `end` through `__shown`; one text or number needs none.
fn around(symbols: &[Symbol], start: Option<usize>, end: usize, marks: &mut Marks) {
    let Some(start) = start.filter(|start| *start < end) else { return };
    if end - start > 1 || symbols[start].shape == Shape::Word || symbols[start].shape == Shape::Operator {
        marks.around(symbols[start].from, symbols[end - 1].to, ")|__shown");
    }
}

/// `{% set a.b = ... %}` and `{% set a.b | ... %}`: what is kept.
fn keep<'t>(
    symbols: &[Symbol],
    word: impl Fn(usize) -> &'t str,
    operator: impl Fn(usize) -> &'t str,
    marks: &mut Marks,
) {
    let target_end = (1..symbols.len()).find(|&at| matches!(operator(at), "=" | "|")).unwrap_or(symbols.len());
    let Some(last) = symbols.last() else { return };
    if !(1..target_end).any(|at| word(at) == ".") || target_end + 1 >= symbols.len() {
        return;
    }
    match operator(target_end) {
        "=" => marks.around(symbols[target_end + 1].from, last.to, ")|__kept"),
        _ => marks.put(last.to, "|__kept"),
    }
}
