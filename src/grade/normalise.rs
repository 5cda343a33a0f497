//! Text to tokens: what a model may write for the same answer comes to look alike here.
//!
//! One pass maps Unicode to LaTeX or ASCII, one pass reads tokens: digits with their thousands
//! separators, words, LaTeX commands; styling and spacing commands vanish. Both passes are linear,
//! neither recurses, and nothing is an error: what is not understood becomes [`Token::Unknown`],
//! which no later step can read, so that the verdict is "undecided" and not a guess.
//!
//! One file, for the second pass reads what the first has made of the text, and nobody else sees what lies between.

/// A piece of an answer. Brackets keep their shape, because `(3,4]` and `[3,4]` differ.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Digits with at most one point; thousands separators are gone.
    Num(String),
    /// A run of letters in math: one variable each, unless the whole run means something.
    Letters(String),
    /// A word in `\text{...}`, or one that cannot be meant as variables.
    Word(String),
    /// A LaTeX command that means something, without its backslash.
    Command(String),
    /// `+ - * / ^ _ ! ' ( ) [ ] { } | , ; : & % $ < >` and, for what has no ASCII sign:
    /// `\{` as `⟦`, `\}` as `⟧`, `≤ ≥ ≠ ≈ =`, row break `↵`, degree `°`.
    Sign(char),
    /// What nothing here understands.
    Unknown,
}

use Token::{Command, Letters, Num, Sign, Unknown, Word};

/// Commands that only style or space what follows.
const SILENT: &[&str] = &[
    "left",
    "right",
    "big",
    "Big",
    "bigg",
    "Bigg",
    "bigl",
    "bigr",
    "Bigl",
    "Bigr",
    "biggl",
    "biggr",
    "Biggl",
    "Biggr",
    "middle",
    "displaystyle",
    "textstyle",
    "scriptstyle",
    "limits",
    "quad",
    "qquad",
    "mathbf",
    "mathrm",
    "mathit",
    "mathsf",
    "mathtt",
    "mathcal",
    "boldsymbol",
    "bm",
    "bf",
    "rm",
    "it",
    "operatorname",
    "ensuremath",
    "thinspace",
    "enspace",
    "space",
    "nobreak",
    "boxed",
    "fbox",
    "hfill",
    "strut",
    "bold",
    "pmb",
    "underline",
    "mathop",
    "nolimits",
];
/// Commands whose braces hold words.
const TEXT: &[&str] = &[
    "text",
    "mbox",
    "textbf",
    "textit",
    "textrm",
    "textsf",
    "texttt",
    "textnormal",
    "hbox",
    "emph",
    "textup",
    "textsc",
];
/// Commands that vanish together with one argument.
const DROPPED: &[&str] = &["phantom", "hphantom", "vphantom", "hspace", "vspace", "color", "tag", "label", "mspace"];

/// Words that a run of letters in math stands for when written without `\text`.
const WORDS: &[&str] = &[
    "and",
    "or",
    "to",
    "units",
    "unit",
    "none",
    "no",
    "solution",
    "solutions",
    "all",
    "real",
    "numbers",
    "is",
    "the",
    "answer",
];
/// Words behind a number that multiply it, as powers of ten.
const MAGNITUDES: &[(&str, &str)] = &[("thousand", "3"), ("million", "6"), ("billion", "9"), ("trillion", "12")];
/// The same as the sign behind a number.
const PERCENT: &[&str] = &["percent", "pct", "percentage"];

/// Unicode to what the tokeniser knows. Zero-width characters vanish.
fn latex(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
            continue;
        }
        let code = c as u32;
        let replacement = match c {
            '−' | '–' | '—' | '－' | '‐' | '‑' | '﹣' => "-",
            '×' | '✕' => "\\times ",
            '·' | '⋅' | '∙' | '•' => "\\cdot ",
            '÷' | '∕' | '⁄' | '／' => "/",
            '≤' | '⩽' | '≦' => "\\le ",
            '≥' | '⩾' | '≧' => "\\ge ",
            '≠' => "\\ne ",
            '≈' | '≃' | '≅' => "\\approx ",
            '∞' => "\\infty ",
            'π' | 'Π' => "\\pi ",
            '°' | 'º' => "^\\circ ",
            '√' => "\\surd ",
            '∛' => "\\cuberoot ",
            '∪' => "\\cup ",
            '∩' => "\\cap ",
            '∈' => "\\in ",
            '∅' => "\\emptyset ",
            '±' => "\\pm ",
            '∓' => "\\mp ",
            'ℝ' => "\\mathbb{R}",
            '∖' => "\\setminus ",
            '′' => "'",
            '…' | '⋯' => "\\ldots ",
            '½' => "\\frac{1}{2}",
            '⅓' => "\\frac{1}{3}",
            '⅔' => "\\frac{2}{3}",
            '¼' => "\\frac{1}{4}",
            '¾' => "\\frac{3}{4}",
            '⅕' => "\\frac{1}{5}",
            '⅛' => "\\frac{1}{8}",
            '⁰' => "^{0}",
            '¹' => "^{1}",
            '²' => "^{2}",
            '³' => "^{3}",
            '⁴' => "^{4}",
            '⁵' => "^{5}",
            '⁶' => "^{6}",
            '⁷' => "^{7}",
            '⁸' => "^{8}",
            '⁹' => "^{9}",
            '⁻' => "^-",
            'α' => "\\alpha ",
            'β' => "\\beta ",
            'γ' => "\\gamma ",
            'δ' => "\\delta ",
            'ε' => "\\epsilon ",
            'θ' => "\\theta ",
            'λ' => "\\lambda ",
            'μ' | 'µ' => "\\mu ",
            'φ' | 'ϕ' => "\\phi ",
            'σ' => "\\sigma ",
            'ω' => "\\omega ",
            '％' => "%",
            '，' => ",",
            '（' => "(",
            '）' => ")",
            '＝' => "=",
            '＋' => "+",
            '．' => ".",
            '⟨' | '〈' => "\\langle ",
            '⟩' | '〉' => "\\rangle ",
            '€' | '£' | '¥' => "\\text{ currency }",
            '\u{200b}'..='\u{200f}' | '\u{2060}' | '\u{feff}' | '\u{ad}' => "",
            _ if c.is_whitespace() => " ",
            _ => "?",
        };
        if replacement != "?" {
            out.push_str(replacement);
        } else if let Some(ascii) = plain_form(code) {
            out.push(ascii);
        } else {
            out.push(c);
        }
    }
    out
}

/// Letters and digits of other alphabets and faces that mean the ASCII ones.
fn plain_form(code: u32) -> Option<char> {
    let digit = |from: u32| char::from_digit((code - from) % 10, 10);
    let letter = |from: u32| {
        let at = (code - from) % 52;
        char::from_u32(if at < 26 { 65 + at } else { 97 + at - 26 })
    };
    match code {
        0x0660..=0x0669 => digit(0x0660),
        0x06f0..=0x06f9 => digit(0x06f0),
        0x0966..=0x096f => digit(0x0966),
        0xff10..=0xff19 => digit(0xff10),
        0x1d7ce..=0x1d7ff => digit(0x1d7ce),
        0xff21..=0xff3a => char::from_u32(code - 0xff21 + 65),
        0xff41..=0xff5a => char::from_u32(code - 0xff41 + 97),
        0x1d400..=0x1d6a3 => letter(0x1d400),
        0x210e => Some('h'),
        _ => None,
    }
}

/// The tokens of an answer.
pub fn tokens(text: &str) -> Vec<Token> {
    let text = latex(text);
    let mut reader =
        Reader { bytes: text.as_bytes(), text: &text, at: 0, out: Vec::new(), depth: 0, texts: Vec::new(), braces: 0 };
    while reader.at < reader.bytes.len() {
        reader.next();
    }
    trim(joined(reader.out))
}

/// `5{6}` shows as 56.
fn joined(tokens: Vec<Token>) -> Vec<Token> {
    let mut out: Vec<Token> = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        if let [Num(first), Sign('{'), Num(second), Sign('}'), ..] = &tokens[at..]
            && matches!(out.last(), None | Some(Sign('{' | '(' | '+' | '-' | '=' | ',')))
        {
            out.push(Num(format!("{first}{second}")));
            at += 4;
        } else {
            out.push(tokens[at].clone());
            at += 1;
        }
    }
    out
}

struct Reader<'a> {
    bytes: &'a [u8],
    text: &'a str,
    at: usize,
    out: Vec<Token>,
    /// Open round, square and set brackets: inside, a comma separates.
    depth: usize,
    /// Brace levels at which a `\text{` was opened; inside any, letters are words.
    texts: Vec<usize>,
    braces: usize,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    fn sign(&mut self, sign: char, bytes: usize) {
        self.out.push(Sign(sign));
        self.at += bytes;
    }

    fn next(&mut self) {
        let byte = self.peek(0);
        match byte {
            b'0'..=b'9' => self.number(),
            b'.' if self.peek(1).is_ascii_digit() => self.number(),
            b'a'..=b'z' | b'A'..=b'Z' => self.letters(),
            b'\\' => self.command(),
            b' ' | b'\t' | b'\n' | b'\r' | b'~' => self.at += 1,
            // Inside `\text{...}` a dollar switches to math and back; outside it is currency or a delimiter.
            b'$' => self.at += 1,
            b'{' => {
                self.braces += 1;
                self.sign('{', 1);
            }
            b'}' => {
                let text = self.texts.last() == Some(&self.braces);
                self.braces = self.braces.saturating_sub(1);
                if text {
                    self.texts.pop();
                    self.at += 1;
                } else {
                    self.sign('}', 1);
                }
            }
            b'(' | b'[' => {
                self.depth += 1;
                self.sign(byte as char, 1);
            }
            b')' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                self.sign(byte as char, 1);
            }
            b'*' if self.peek(1) == b'*' => self.sign('^', 2),
            b'<' if self.peek(1) == b'=' => self.sign('≤', 2),
            b'>' if self.peek(1) == b'=' => self.sign('≥', 2),
            b'!' if self.peek(1) == b'=' => self.sign('≠', 2),
            b'=' if self.peek(1) == b'=' => self.sign('=', 2),
            b'+' | b'-' | b'*' | b'/' | b'^' | b'_' | b'!' | b'\'' | b'|' | b',' | b';' | b':' | b'&' | b'%' | b'<'
            | b'>' | b'=' => self.sign(byte as char, 1),
            b'.' if self.bytes[self.at..].starts_with(b"...") => {
                self.out.push(Command("ldots".into()));
                self.at += 3;
            }
            b'.' => self.sign('.', 1),
            b'`' | b'"' | b'?' => self.at += 1,
            _ => {
                // A character beyond ASCII may be a letter of a word.
                let c = self.text[self.at..].chars().next().unwrap_or(' ');
                if c.is_alphabetic() {
                    self.letters();
                } else {
                    self.out.push(Unknown);
                    self.at += c.len_utf8();
                }
            }
        }
    }

    /// Digits, a point, thousands separators, an exponent (`6.72e-5`).
    fn number(&mut self) {
        let mut digits = String::new();
        let start = self.at;
        self.digits(&mut digits);
        while let Some(skip) = self.separator(start, digits.len()) {
            self.at += skip;
            self.digits(&mut digits);
        }
        if self.peek(0) == b'.' && (self.peek(1).is_ascii_digit() || !self.bytes[self.at..].starts_with(b"...")) {
            self.at += 1;
            digits.push('.');
            self.digits(&mut digits);
            // 0.000\,001 and the like
            while self.bytes[self.at..].starts_with(b"\\,") && self.peek(2).is_ascii_digit() {
                self.at += 2;
                self.digits(&mut digits);
            }
        }
        let sign = usize::from(matches!(self.peek(1), b'+' | b'-'));
        if matches!(self.peek(0), b'e' | b'E') && self.peek(1 + sign).is_ascii_digit() {
            let negative = self.peek(1) == b'-';
            self.at += 1 + sign;
            let mut exponent = String::new();
            self.digits(&mut exponent);
            self.out.extend([Num(digits), Sign('*'), Num("10".into()), Sign('^'), Sign('{')]);
            if negative {
                self.out.push(Sign('-'));
            }
            self.out.extend([Num(exponent), Sign('}')]);
            return;
        }
        self.out.push(Num(digits));
    }

    fn digits(&mut self, into: &mut String) {
        while self.peek(0).is_ascii_digit() {
            into.push(self.peek(0) as char);
            self.at += 1;
        }
    }

    /// Bytes of a thousands separator here, if three digits and no more follow it. A bare comma
    /// separates only outside brackets and only where the whole has the form of a grouped number.
    fn separator(&self, start: usize, so_far: usize) -> Option<usize> {
        let rest = &self.bytes[self.at..];
        let explicit = [&b"{,}"[..], b",\\!", b"\\,", b"\\!", b"\\ ", b"{\\,}", b"{, }", b"\\;", b"\\:", b"~"]
            .into_iter()
            .find(|s| rest.starts_with(s));
        let skip = match explicit {
            Some(separator) => {
                let spaces = rest[separator.len()..].iter().take_while(|b| **b == b' ').count();
                separator.len() + spaces
            }
            None if rest.starts_with(b",") && self.depth == 0 => 1,
            None if rest.starts_with(b" ") => 1,
            None => return None,
        };
        let grouped = so_far <= 3 || (self.at - start) > so_far;
        let three = (0..3).all(|i| self.peek(skip + i).is_ascii_digit()) && !self.peek(skip + 3).is_ascii_digit();
        (grouped && three && self.bytes[start] != b'0' && so_far > 0).then_some(skip)
    }

    fn letters(&mut self) {
        let rest = &self.text[self.at..];
        let word: String = rest.chars().take_while(|c| c.is_alphabetic()).collect();
        self.at += word.len();
        let lower = word.to_lowercase();
        let after_number = matches!(self.out.last(), Some(Num(_) | Sign('}')));
        if let (Some((_, zeros)), Some(Num(_))) = (MAGNITUDES.iter().find(|(name, _)| *name == lower), self.out.last())
        {
            self.out.extend([Sign('*'), Num("10".into()), Sign('^'), Num((*zeros).into())]);
            return;
        }
        if after_number && PERCENT.contains(&lower.as_str()) {
            self.out.push(Sign('%'));
            return;
        }
        // `NO` is a segment.
        let shouted = word.len() == 2 && word == word.to_uppercase();
        let known = (WORDS.contains(&lower.as_str()) && !shouted)
            || crate::grade::words::number(&lower).is_some()
            || (word.len() > 1 && after_number && crate::grade::words::unit(&lower).is_some());
        if !self.texts.is_empty() || known || !word.is_ascii() {
            self.out.push(Word(word));
        } else {
            self.out.push(Letters(word));
        }
    }

    fn command(&mut self) {
        let next = self.peek(1);
        if !next.is_ascii_alphabetic() {
            match next {
                b'\\' => {
                    self.sign('↵', 2);
                    // The optional height of a row break: `\\[4pt]`.
                    if self.peek(0) == b'['
                        && let Some(length) = self.bytes[self.at..].iter().take(12).position(|b| *b == b']')
                        && self.bytes[self.at..self.at + length].ends_with(b"pt")
                    {
                        self.at += length + 1;
                    }
                }
                b'{' => {
                    self.depth += 1;
                    self.sign('⟦', 2);
                }
                b'}' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.sign('⟧', 2);
                }
                b'$' => {
                    self.out.push(Word("$".into()));
                    self.at += 2;
                }
                b'%' => self.sign('%', 2),
                b'&' | b'#' | b'_' => self.at += 2,
                b'|' => self.sign('|', 2),
                // `\,` `\!` `\;` `\:` `\ ` and the delimiters `\( \) \[ \]`
                _ => {
                    let width = self.text[self.at + 1..].chars().next().map_or(0, char::len_utf8);
                    self.at += 1 + width;
                }
            }
            return;
        }
        let name: String =
            self.bytes[self.at + 1..].iter().take_while(|b| b.is_ascii_alphabetic()).map(|b| *b as char).collect();
        // `\quadx` lost its space.
        let name = ["qquad", "quad"].iter().find(|quad| name.starts_with(**quad)).map_or(name.as_str(), |quad| quad);
        self.at += 1 + name.len();
        if TEXT.contains(&name) {
            while self.peek(0) == b' ' {
                self.at += 1;
            }
            if self.peek(0) == b'{' {
                self.braces += 1;
                self.texts.push(self.braces);
                self.at += 1;
            }
        } else if DROPPED.contains(&name) {
            self.skip_argument();
        } else if matches!(name, "mathrm" | "rm" | "operatorname") && self.roman_unit() {
        } else if !SILENT.contains(&name) {
            self.meaning(name);
        } else if matches!(name, "left" | "right") && self.peek(0) == b'.' {
            self.at += 1;
        }
    }

    /// `\mathrm{~cm}`: a unit in roman type. Takes it if it is one.
    fn roman_unit(&mut self) -> bool {
        let rest = self.text[self.at..].trim_start();
        let Some((inner, _)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) else { return false };
        let word = inner.trim_matches([' ', '~', '\\', ',']);
        let is = word.len() <= 16 && crate::grade::words::unit(&word.to_lowercase()).is_some();
        if is {
            self.out.push(Word(word.to_string()));
            self.skip_argument();
        }
        is
    }

    /// Skips one `{...}`; an unclosed one goes to the end.
    fn skip_argument(&mut self) {
        while self.peek(0) == b' ' {
            self.at += 1;
        }
        if self.peek(0) != b'{' {
            return;
        }
        let mut open = 0usize;
        while self.at < self.bytes.len() {
            match self.peek(0) {
                b'{' => open += 1,
                b'}' => open -= 1,
                _ => {}
            }
            self.at += 1;
            if open == 0 {
                return;
            }
        }
    }

    fn meaning(&mut self, name: &str) {
        let sign = match name {
            "le" | "leq" | "leqslant" => '≤',
            "ge" | "geq" | "geqslant" => '≥',
            "lt" => '<',
            "gt" => '>',
            "ne" | "neq" => '≠',
            "approx" | "simeq" | "sim" | "cong" => '≈',
            "equiv" => '=',
            "times" | "cdot" | "ast" => '*',
            "div" => '/',
            "lbrace" => '⟦',
            "rbrace" => '⟧',
            "langle" | "lparen" => '(',
            "rangle" | "rparen" => ')',
            "lbrack" => '[',
            "rbrack" => ']',
            "mid" | "vert" | "lvert" | "rvert" | "Vert" => '|',
            "circ" | "degree" | "textdegree" => '°',
            "colon" => ':',
            "prime" => '\'',
            "cr" => '↵',
            _ => '\0',
        };
        match name {
            _ if sign != '\0' => {
                // `^\circ` is one thing.
                if sign == '°' && self.out.last() == Some(&Sign('^')) {
                    self.out.pop();
                } else if sign == '°' && self.out.ends_with(&[Sign('^'), Sign('{')]) {
                    self.out.truncate(self.out.len() - 2);
                    self.out.push(Sign('°'));
                    while self.peek(0) == b' ' {
                        self.at += 1;
                    }
                    if self.peek(0) == b'}' {
                        self.at += 1;
                        self.braces = self.braces.saturating_sub(1);
                    }
                    return;
                }
                self.out.push(Sign(sign));
            }
            "mathbb" | "Bbb" => {
                let rest = &self.text[self.at..];
                let set: String = rest.trim_start_matches([' ', '{']).chars().take(1).collect();
                if rest.trim_start().starts_with('{') {
                    self.skip_argument();
                } else {
                    self.at += rest.len() - rest.trim_start_matches(' ').len() + set.len();
                }
                self.out.push(if set == "R" { Command("reals".into()) } else { Word(format!("set of {set}")) });
            }
            "begin" | "end" => {
                let rest = &self.text[self.at..];
                let inner = rest.trim_start().strip_prefix('{').and_then(|r| r.split_once('}')).map(|(env, _)| env);
                let env = inner.unwrap_or("").trim_end_matches('*').to_string();
                self.skip_argument();
                // The column specification of an array.
                if name == "begin" && env == "array" {
                    self.skip_argument();
                }
                self.out.push(if env.ends_with("matrix") || env == "array" {
                    self.depth = if name == "begin" { self.depth + 1 } else { self.depth.saturating_sub(1) };
                    Command(format!("{name} matrix"))
                } else if matches!(env.as_str(), "aligned" | "align" | "cases" | "gathered" | "equation") {
                    return;
                } else {
                    Unknown
                });
            }
            "dfrac" | "tfrac" | "cfrac" => self.out.push(Command("frac".into())),
            "dbinom" | "tbinom" => self.out.push(Command("binom".into())),
            "varnothing" => self.out.push(Command("emptyset".into())),
            "bar" | "overline" | "dot" => self.out.push(Command("overline".into())),
            "dots" | "cdots" | "dotsc" | "dotsb" => self.out.push(Command("ldots".into())),
            "backslash" => self.out.push(Command("setminus".into())),
            "pmod" | "bmod" => self.out.push(Command("mod".into())),
            "lor" | "vee" => self.out.push(Word("or".into())),
            "land" | "wedge" => self.out.push(Word("and".into())),
            _ => self.out.push(Command(name.to_string())),
        }
    }
}

/// Takes off what sentence and layout leave around an answer: final stops and commas, braces
/// around the whole, unmatched closing braces at the end.
fn trim(mut tokens: Vec<Token>) -> Vec<Token> {
    while matches!(tokens.last(), Some(Sign('.' | ',' | ';' | ':' | '↵'))) {
        tokens.pop();
    }
    let leading = tokens.iter().take_while(|t| matches!(t, Sign('.' | ',' | ';' | ':' | '↵' | '≈' | '='))).count();
    tokens.drain(..leading);
    let opened = tokens.iter().filter(|t| **t == Sign('{')).count();
    let mut closed = tokens.iter().filter(|t| **t == Sign('}')).count();
    while closed > opened && tokens.last() == Some(&Sign('}')) {
        tokens.pop();
        closed -= 1;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(text: &str) -> String {
        let show = |token: &Token| match token {
            Num(t) | Letters(t) => t.clone(),
            Word(t) => format!("<{t}>"),
            Command(t) => format!("\\{t}"),
            Sign(c) => c.to_string(),
            Unknown => "?".into(),
        };
        tokens(text).iter().map(show).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn thousands_separators_of_every_style_make_one_number() {
        for text in ["11,111", "11,\\!111", "11{,}111", "11\\,111", "11 111", "11,\\! 111"] {
            assert_eq!(signs(text), "11111", "{text}");
        }
    }

    #[test]
    fn commas_that_group_nothing_separate() {
        assert_eq!(signs("(1,234)"), "( 1 , 234 )");
        assert_eq!(signs("1, 234"), "1 , 234");
        assert_eq!(signs("72,00"), "72 , 00");
        assert_eq!(signs("0,125"), "0 , 125");
    }

    #[test]
    fn styles_and_spaces_vanish() {
        assert_eq!(signs("\\displaystyle\\left(2,\\,4\\right)."), "( 2 , 4 )");
        assert_eq!(signs("\\boldsymbol{073}"), "{ 073 }");
        assert_eq!(signs("\\color{blue}{42}\\phantom{}"), "{ 42 }");
    }

    #[test]
    fn unicode_means_what_it_shows() {
        assert_eq!(signs("6·√2"), "6 * \\surd 2");
        assert_eq!(signs("−½"), "- \\frac { 1 } { 2 }");
        assert_eq!(signs("２٢𝑥²"), "22 x ^ { 2 }");
        assert_eq!(signs("75°"), "75 °");
    }

    #[test]
    fn words_are_told_from_variables() {
        assert_eq!(signs("5\\text{ cm}^2"), "5 <cm> ^ 2");
        assert_eq!(signs("5\\mathrm{~cm}"), "5 <cm>");
        assert_eq!(signs("xy"), "xy");
        assert_eq!(signs("x=1 or x=2"), "x = 1 <or> x = 2");
    }
}
