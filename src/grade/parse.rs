//! Tokens to expressions. Recursive descent with a bound on depth; what does not parse is `None`.
//!
//! Conventions where notation is ambiguous: `2^10` is two to the tenth, `\frac12` and `\sqrt12`
//! take one digit as LaTeX does (the sign `√12` takes both), `3\frac12` is a mixed number, a
//! division binds like a product from the left, and a function takes the product that follows it
//! up to the next sum or function (`\sin 2x`, `\cos x\sin y`).
//!
//! One file, for it is one grammar: its rules call each other in a circle, and none is of use without the rest.

use crate::grade::normalise::Token::{self, Command, Letters, Num, Sign, Word};

/// Nesting of brackets, braces, powers and functions together.
const DEPTH: usize = 120;

/// An expression as it was written; nothing is simplified.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// Digits without a point, and the power of ten they are multiplied by.
    Number(String, i64),
    /// A letter, its subscript or primes included, or the name of a Greek one.
    Variable(String),
    /// The number pi.
    Pi,
    /// Euler's number, written `e`.
    Euler,
    /// The imaginary unit, written `i`.
    Imaginary,
    /// `\infty`, without a sign.
    Infinity,
    /// The sum of all of them.
    Sum(Vec<Node>),
    /// The product of all of them.
    Product(Vec<Node>),
    /// Minus this.
    Negative(Box<Node>),
    /// Numerator and denominator.
    Quotient(Box<Node>, Box<Node>),
    /// Base and exponent; a root is a power too.
    Power(Box<Node>, Box<Node>),
    /// A function and its argument.
    Apply(Function, Box<Node>),
    /// Base and argument.
    Log(Box<Node>, Box<Node>),
    /// `n` over `k`.
    Binomial(Box<Node>, Box<Node>),
    /// `true`: plus or minus; `false`: minus or plus.
    Either(bool, Box<Node>),
    /// By rows, all of one length.
    Matrix(Vec<Vec<Node>>),
    /// Sum or product (`true`) of `body` for the variable from one bound to the other.
    Series {
        /// Whether the terms are multiplied, not added.
        product: bool,
        /// The letter that counts.
        variable: String,
        /// Its first value.
        from: Box<Node>,
        /// Its last value.
        to: Box<Node>,
        /// The term, in which the letter may stand.
        body: Box<Node>,
    },
    /// An angle of this many degrees.
    Degrees(Box<Node>),
}

/// A function of one argument. Angles are radians.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    /// Sine.
    Sin,
    /// Cosine.
    Cos,
    /// Tangent.
    Tan,
    /// Cotangent, 1 / tan.
    Cot,
    /// Secant, 1 / cos.
    Sec,
    /// Cosecant, 1 / sin.
    Csc,
    /// Inverse sine.
    Arcsin,
    /// Inverse cosine.
    Arccos,
    /// Inverse tangent.
    Arctan,
    /// The exponential function.
    Exp,
    /// The absolute value.
    Abs,
    /// The largest whole number not above.
    Floor,
    /// The smallest whole number not below.
    Ceil,
    /// `n!`.
    Factorial,
}

impl Node {
    /// A whole number; minus stands around the digits.
    pub fn int(value: i64) -> Node {
        Node::Number(value.unsigned_abs().to_string(), 0).signed(value < 0)
    }

    fn signed(self, negative: bool) -> Node {
        if negative { Node::Negative(Box::new(self)) } else { self }
    }

    /// The quotient of this and `below`.
    pub fn over(self, below: Node) -> Node {
        Node::Quotient(Box::new(self), Box::new(below))
    }

    /// The difference of this and `other`.
    pub fn minus(self, other: Node) -> Node {
        Node::Sum(vec![self, Node::Negative(Box::new(other))])
    }

    /// Calls `see` on this node and all below it.
    pub fn walk(&self, see: &mut dyn FnMut(&Node)) {
        see(self);
        match self {
            Node::Sum(parts) | Node::Product(parts) => parts.iter().for_each(|part| part.walk(see)),
            Node::Negative(a) | Node::Apply(_, a) | Node::Either(_, a) | Node::Degrees(a) => a.walk(see),
            Node::Quotient(a, b) | Node::Power(a, b) | Node::Log(a, b) | Node::Binomial(a, b) => {
                a.walk(see);
                b.walk(see);
            }
            Node::Matrix(rows) => rows.iter().flatten().for_each(|cell| cell.walk(see)),
            Node::Series { from, to, body, .. } => {
                from.walk(see);
                to.walk(see);
                body.walk(see);
            }
            Node::Number(..) | Node::Variable(_) | Node::Pi | Node::Euler | Node::Imaginary | Node::Infinity => {}
        }
    }

    /// Whether `test` holds for this node or any below it.
    pub fn any(&self, test: &dyn Fn(&Node) -> bool) -> bool {
        let mut found = false;
        self.walk(&mut |node| found |= test(node));
        found
    }

    /// Whether a letter stands in it, the one that counts a series included where the term uses it.
    pub fn has_variables(&self) -> bool {
        self.any(&|node| matches!(node, Node::Variable(_)))
    }
}

/// The whole of `tokens` as one expression.
pub fn expression(tokens: &[Token]) -> Option<Node> {
    let tokens = peel(tokens);
    // A number of one digit still to be given out splits a token, so the parser owns its tokens.
    let mut parser = Parser { tokens: tokens.to_vec(), at: 0, depth: 0, bars: 0 };
    let mut node = parser.sum()?;
    if parser.take_command("choose").is_some() {
        node = Node::Binomial(Box::new(node), Box::new(parser.sum()?));
    }
    (parser.at == parser.tokens.len()).then_some(node)
}

/// Without brackets around the whole, however many.
pub fn peel(mut tokens: &[Token]) -> &[Token] {
    let closing = matches(tokens);
    let mut start = 0;
    while let (Some(Sign('(' | '{')), [_, .., _]) = (tokens.first(), tokens) {
        // `closing` speaks of positions in the slice we started from.
        if closing[start] != Some(start + tokens.len() - 1) {
            break;
        }
        tokens = &tokens[1..tokens.len() - 1];
        start += 1;
    }
    tokens
}

/// For each opening bracket the position of its partner, in one pass. Round and square ones may
/// close one another, as in `(3,4]`.
pub fn matches(tokens: &[Token]) -> Vec<Option<usize>> {
    let mut partner = vec![None; tokens.len()];
    let mut open: Vec<(usize, char)> = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let class = match token {
            Sign('(' | '[' | ')' | ']') => '(',
            Sign('{' | '}') => '{',
            Sign('⟦' | '⟧') => '⟦',
            Command(name) if name == "begin matrix" || name == "end matrix" => 'm',
            _ => continue,
        };
        let opens = matches!(token, Sign('(' | '[' | '{' | '⟦')) || matches!(token, Command(n) if n == "begin matrix");
        if opens {
            open.push((at, class));
        } else if let Some((from, wanted)) = open.pop()
            && wanted == class
        {
            partner[from] = Some(at);
        }
    }
    partner
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Open `|` at this point.
    bars: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn is(&self, sign: char) -> bool {
        self.peek() == Some(&Sign(sign))
    }

    fn command(&self) -> Option<&str> {
        match self.peek() {
            Some(Command(name)) => Some(name),
            _ => None,
        }
    }

    fn take(&mut self, sign: char) -> Option<()> {
        self.is(sign).then(|| self.at += 1)
    }

    fn take_command(&mut self, name: &str) -> Option<()> {
        (self.command() == Some(name)).then(|| self.at += 1)
    }

    /// One level deeper, or `None` past the bound.
    fn deeper<T>(&mut self, read: impl FnOnce(&mut Parser) -> Option<T>) -> Option<T> {
        if self.depth >= DEPTH {
            return None;
        }
        self.depth += 1;
        let value = read(self);
        self.depth -= 1;
        value
    }

    fn sum(&mut self) -> Option<Node> {
        let mut parts = Vec::new();
        loop {
            let mut negative = false;
            let mut either = None;
            let mut signs = 0;
            loop {
                match self.peek() {
                    Some(Sign('-')) => negative = !negative,
                    Some(Sign('+')) => {}
                    Some(Command(name)) if name == "pm" && either.is_none() => either = Some(true),
                    Some(Command(name)) if name == "mp" && either.is_none() => either = Some(false),
                    _ => break,
                }
                self.at += 1;
                signs += 1;
            }
            if signs == 0 && !parts.is_empty() {
                break;
            }
            let mut node = self.product()?;
            if let Some(plus) = either {
                node = Node::Either(plus, Box::new(node));
            }
            parts.push(node.signed(negative));
            if !matches!(self.peek(), Some(Sign('+' | '-'))) && !matches!(self.command(), Some("pm" | "mp")) {
                break;
            }
        }
        Some(if parts.len() == 1 { parts.remove(0) } else { Node::Sum(parts) })
    }

    fn product(&mut self) -> Option<Node> {
        let mut product = self.mixed()?;
        loop {
            if self.take('*').is_some() {
                let factor = self.signed_factor()?;
                product = times(product, factor);
            } else if self.take('/').is_some() {
                let divisor = self.signed_factor()?;
                product = product.over(divisor);
            } else if self.starts_factor() {
                // Two numbers side by side are no product; `15 39/40` was read by `mixed`.
                if matches!(self.peek(), Some(Num(_)))
                    && !matches!(self.tokens.get(self.at.wrapping_sub(1)), Some(Sign(')' | '}' | '|' | '!')))
                {
                    return None;
                }
                let factor = self.factor()?;
                product = times(product, factor);
            } else {
                return Some(product);
            }
        }
    }

    /// `3\frac12` and `15 39/40`: a whole number and a proper fraction side by side.
    fn mixed(&mut self) -> Option<Node> {
        if let Some((whole, n, d, next)) = self.mixed_ahead()
            && n < d
        {
            self.at = next;
            let number = |v: u64| Node::Number(v.to_string(), 0);
            return Some(Node::Sum(vec![number(whole), number(n).over(number(d))]));
        }
        self.factor()
    }

    /// Whole, numerator, denominator and the position behind them, if these tokens come next. Looks
    /// only: trying and going back would double the work at every level of nesting.
    fn mixed_ahead(&self) -> Option<(u64, u64, u64, usize)> {
        let int = |at: usize| match self.tokens.get(at) {
            Some(Num(digits)) if !digits.contains('.') && digits.len() <= 18 => digits.parse::<u64>().ok(),
            _ => None,
        };
        let braced = |at: usize| match (self.tokens.get(at), int(at + 1), self.tokens.get(at + 2)) {
            (Some(Sign('{')), Some(value), Some(Sign('}'))) => Some((value, at + 3)),
            _ => int(at).filter(|value| *value < 10).map(|value| (value, at + 1)),
        };
        let whole = int(self.at)?;
        let at = self.at + 1;
        let (n, d, next) = if self.tokens.get(at) == Some(&Command("frac".into())) {
            match int(at + 1) {
                // `\frac12`
                Some(both) if (10..100).contains(&both) => (both / 10, both % 10, at + 2),
                _ => {
                    let (n, below) = braced(at + 1)?;
                    let (d, next) = braced(below)?;
                    (n, d, next)
                }
            }
        } else if self.tokens.get(at + 1) == Some(&Sign('/')) {
            (int(at)?, int(at + 2)?, at + 3)
        } else {
            return None;
        };
        (!matches!(self.tokens.get(next), Some(Sign('^' | '!' | '_')))).then_some((whole, n, d, next))
    }

    /// A factor after an explicit sign of multiplication may itself carry a sign: `2\cdot-3`.
    fn signed_factor(&mut self) -> Option<Node> {
        let mut negative = false;
        while self.is('-') || self.is('+') {
            negative ^= self.is('-');
            self.at += 1;
        }
        Some(self.factor()?.signed(negative))
    }

    fn starts_factor(&self) -> bool {
        match self.peek() {
            Some(Num(_) | Letters(_)) => true,
            Some(Sign('(' | '[' | '{')) => true,
            Some(Sign('|')) => self.bars == 0,
            Some(Command(name)) => starts(name),
            _ => false,
        }
    }

    /// A base with what is written behind it: powers, factorials, degrees, percent inside sums.
    fn factor(&mut self) -> Option<Node> {
        let base = self.deeper(Parser::base)?;
        self.after(base)
    }

    fn after(&mut self, mut node: Node) -> Option<Node> {
        loop {
            if self.take('^').is_some() {
                // `12^{\text{th}}`
                if self.ordinal() {
                    continue;
                }
                if self.is('\'') {
                    return None;
                }
                let exponent = self.deeper(Parser::exponent)?;
                node = Node::Power(Box::new(node), Box::new(exponent));
            } else if self.take('!').is_some() {
                node = Node::Apply(Function::Factorial, Box::new(node));
            } else if self.take('°').is_some() {
                node = Node::Degrees(Box::new(node));
            } else if self.take('%').is_some() {
                node = node.over(Node::int(100));
            } else {
                return Some(node);
            }
        }
    }

    fn ordinal(&mut self) -> bool {
        let rest = &self.tokens[self.at..];
        let words: Vec<&Token> = rest.iter().take(5).filter(|t| !matches!(t, Sign('{' | '}'))).collect();
        let is = matches!(words.first(), Some(Word(w) | Letters(w)) if matches!(w.as_str(), "th" | "st" | "nd" | "rd"));
        if is {
            let mut open = 0;
            while let Some(token) = self.peek() {
                match token {
                    Sign('{') => open += 1,
                    Sign('}') if open == 0 => break,
                    Sign('}') => open -= 1,
                    Word(_) | Letters(_) => {}
                    _ => break,
                }
                self.at += 1;
                if open == 0 {
                    break;
                }
            }
        }
        is
    }

    /// `^{...}`, `^10`, `^-1`, `^x`.
    fn exponent(&mut self) -> Option<Node> {
        let mut negative = false;
        while self.is('-') || self.is('+') {
            negative ^= self.is('-');
            self.at += 1;
        }
        let node = match self.peek()? {
            Sign('{') => self.group(),
            Sign('(') => self.round(),
            Num(_) => self.number(),
            Letters(_) => self.letter(),
            Command(_) => self.base(),
            _ => None,
        };
        Some(node?.signed(negative))
    }

    /// An argument of `\frac`, `\sqrt`, `\binom`: a group, or one digit, letter or command.
    fn argument(&mut self) -> Option<Node> {
        match self.peek()?.clone() {
            Sign('{') => self.deeper(Parser::group),
            Num(digits) => {
                let (first, rest) = digits.split_at(1);
                if !first.as_bytes()[0].is_ascii_digit() || rest.starts_with('.') {
                    return self.number();
                }
                if rest.is_empty() {
                    self.at += 1;
                } else {
                    self.tokens[self.at] = Num(rest.to_string());
                }
                Some(Node::Number(first.to_string(), 0))
            }
            Letters(_) => self.letter(),
            Command(_) => self.deeper(Parser::base),
            Sign('-') => None,
            _ => None,
        }
    }

    /// `{...}`, where `{n \choose k}` is possible.
    fn group(&mut self) -> Option<Node> {
        self.take('{')?;
        let bars = std::mem::take(&mut self.bars);
        let above = self.sum()?;
        let node = if self.take_command("choose").is_some() {
            Node::Binomial(Box::new(above), Box::new(self.sum()?))
        } else if self.take_command("over").is_some() {
            above.over(self.sum()?)
        } else {
            above
        };
        self.bars = bars;
        self.take('}')?;
        Some(node)
    }

    fn round(&mut self) -> Option<Node> {
        let square = self.is('[');
        self.at += 1;
        let bars = std::mem::take(&mut self.bars);
        let node = self.sum()?;
        self.bars = bars;
        self.take(if square { ']' } else { ')' })?;
        Some(node)
    }

    fn number(&mut self) -> Option<Node> {
        let Some(Num(text)) = self.peek() else { return None };
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = format!("{whole}{fraction}");
        let node = Node::Number(digits, -(fraction.len() as i64));
        let (point, places) = (text.contains('.'), fraction.len() as i64);
        let last_three = fraction.len() >= 2
            && fraction.bytes().rev().take(2).all(|b| b == fraction.as_bytes()[0])
            && fraction.bytes().all(|b| b == fraction.as_bytes()[0]);
        self.at += 1;
        // 0.1\overline{6}
        if point && self.command() == Some("overline") {
            self.at += 1;
            let period = match self.argument()? {
                Node::Number(period, 0) if !period.is_empty() && period.len() < 1000 => period,
                _ => return None,
            };
            return Some(repeating(node, &period, places));
        }
        // 0.333\ldots
        if self.command() == Some("ldots") {
            self.at += 1;
            let Node::Number(digits, _) = &node else { return None };
            let period = last_three.then(|| digits[digits.len() - 1..].to_string())?;
            return Some(repeating(node, &period, places));
        }
        Some(node)
    }

    /// One variable off a run of letters, with its subscript; `sqrt`, `sin` and the like written plainly.
    fn letter(&mut self) -> Option<Node> {
        let Some(Letters(run)) = self.peek() else { return None };
        // Nobody multiplies so many; taking them one by one would be quadratic.
        if run.len() > 64 {
            return None;
        }
        if let Some(function) = plain(run) {
            self.tokens[self.at] = Command(function.to_string());
            return self.deeper(Parser::base);
        }
        let mut chars = run.chars();
        let first = chars.next()?.to_string();
        let rest = chars.as_str().to_string();
        // C(10,3)
        if let ("C", Some([Sign('('), Num(n), Sign(','), Num(k), Sign(')')])) =
            (run.as_str(), self.tokens.get(self.at + 1..self.at + 6))
            && !n.contains('.')
            && !k.contains('.')
        {
            let number = |digits: &String| Box::new(Node::Number(digits.clone(), 0));
            let node = Node::Binomial(number(n), number(k));
            self.at += 6;
            return Some(node);
        }
        if rest.is_empty() {
            self.at += 1;
        } else {
            self.tokens[self.at] = Letters(rest.clone());
        }
        let name = if rest.is_empty() { first.clone() + &self.subscript()? } else { first.clone() };
        Some(match name.as_str() {
            "e" => Node::Euler,
            "i" => Node::Imaginary,
            _ => Node::Variable(name),
        })
    }

    /// `_1`, `_{12}`, `'`: part of a name. Empty if there is none.
    fn subscript(&mut self) -> Option<String> {
        let mut name = String::new();
        while self.take('\'').is_some() {
            name.push('\'');
        }
        if self.take('_').is_some() {
            name.push('_');
            if self.take('{').is_some() {
                while !self.is('}') {
                    match self.peek()? {
                        Num(t) | Letters(t) | Word(t) => name.push_str(t),
                        Sign(',') => name.push(','),
                        _ => return None,
                    }
                    self.at += 1;
                }
                self.at += 1;
            } else {
                match self.peek()?.clone() {
                    Num(t) => name.push_str(&t),
                    Letters(t) if t.len() == 1 => name.push_str(&t),
                    _ => return None,
                }
                self.at += 1;
            }
        }
        Some(name)
    }

    fn base(&mut self) -> Option<Node> {
        match self.peek()?.clone() {
            Num(_) => self.number(),
            Letters(_) => self.letter(),
            Sign('(' | '[') => self.round(),
            Sign('{') => self.group(),
            Sign('|') => {
                self.at += 1;
                self.bars += 1;
                let inner = self.sum()?;
                self.take('|')?;
                self.bars -= 1;
                Some(Node::Apply(Function::Abs, Box::new(inner)))
            }
            Command(name) => {
                self.at += 1;
                self.named(&name)
            }
            _ => None,
        }
    }

    fn named(&mut self, name: &str) -> Option<Node> {
        let boxed = Box::new;
        Some(match name {
            "frac" => {
                let above = self.argument()?;
                above.over(self.argument()?)
            }
            "binom" => Node::Binomial(boxed(self.argument()?), boxed(self.argument()?)),
            "sqrt" => {
                let index = match self.is('[') {
                    true => self.deeper(Parser::round)?,
                    false => Node::int(2),
                };
                let inner = if self.is('(') { self.deeper(Parser::round)? } else { self.argument()? };
                root(inner, index)
            }
            "surd" | "cuberoot" => {
                let inner = self.deeper(Parser::base)?;
                root(inner, Node::int(if name == "surd" { 2 } else { 3 }))
            }
            "pi" => Node::Pi,
            "infty" => Node::Infinity,
            "lfloor" | "lceil" => {
                let inner = self.deeper(Parser::sum)?;
                let (close, function) =
                    if name == "lfloor" { ("rfloor", Function::Floor) } else { ("rceil", Function::Ceil) };
                self.take_command(close)?;
                Node::Apply(function, boxed(inner))
            }
            "ln" | "log" | "lg" => {
                let base = if name != "lg" && self.take('_').is_some() {
                    self.argument()?
                } else if name == "ln" {
                    Node::Euler
                } else {
                    Node::int(10)
                };
                let power = self.power_of_function()?;
                let inner = self.function_argument()?;
                let log = Node::Log(boxed(base), boxed(inner));
                raised(log, power)
            }
            "begin matrix" => self.matrix()?,
            "sum" | "prod" => self.series(name == "prod")?,
            _ => {
                if let Some(function) = function(name) {
                    let power = self.power_of_function()?;
                    // `\sin^{-1}` is the inverse function, not the reciprocal.
                    let minus_one = matches!(&power, Some(Node::Negative(one)) if **one == Node::int(1));
                    let inverse = match function {
                        Function::Sin => Some(Function::Arcsin),
                        Function::Cos => Some(Function::Arccos),
                        Function::Tan => Some(Function::Arctan),
                        _ => None,
                    };
                    let inner = self.function_argument()?;
                    match inverse.filter(|_| minus_one) {
                        Some(inverse) => Node::Apply(inverse, boxed(inner)),
                        None => raised(Node::Apply(function, boxed(inner)), power),
                    }
                } else if greek(name) {
                    Node::Variable(format!("{name}{}", self.subscript()?))
                } else {
                    return None;
                }
            }
        })
    }

    fn power_of_function(&mut self) -> Option<Option<Node>> {
        if self.take('^').is_some() { Some(Some(self.deeper(Parser::exponent)?)) } else { Some(None) }
    }

    fn function_argument(&mut self) -> Option<Node> {
        if self.is('(') || self.is('{') || self.is('[') {
            return self.deeper(Parser::base);
        }
        self.deeper(|parser| {
            let negative = parser.take('-').is_some();
            let mut product = parser.factor()?;
            while parser.starts_factor()
                && !parser.command().is_some_and(|n| function(n).is_some() || n.starts_with("lo") || n == "ln")
                && !parser.is('(')
            {
                let next = parser.factor()?;
                product = times(product, next);
            }
            Some(product.signed(negative))
        })
    }

    fn matrix(&mut self) -> Option<Node> {
        let mut rows = vec![Vec::new()];
        loop {
            if self.take_command("end matrix").is_some() {
                break;
            }
            if self.take('↵').is_some() {
                rows.push(Vec::new());
            } else if self.take('&').is_none() {
                let cell = self.deeper(Parser::sum)?;
                rows.last_mut()?.push(cell);
                if !self.is('&') && !self.is('↵') && self.command() != Some("end matrix") {
                    return None;
                }
            }
        }
        rows.retain(|row| !row.is_empty());
        let width = rows.first()?.len();
        rows.iter().all(|row| row.len() == width).then_some(Node::Matrix(rows))
    }

    /// `\sum_{k=0}^{8} x^k`
    fn series(&mut self, product: bool) -> Option<Node> {
        self.take('_')?;
        self.take('{')?;
        let Some(Letters(variable)) = self.peek().cloned() else { return None };
        self.at += 1;
        self.take('=')?;
        let from = Box::new(self.deeper(Parser::sum)?);
        self.take('}')?;
        self.take('^')?;
        let to = Box::new(self.deeper(Parser::exponent)?);
        let body = Box::new(self.deeper(Parser::product)?);
        Some(Node::Series { product, variable, from, to, body })
    }
}

fn times(a: Node, b: Node) -> Node {
    match a {
        Node::Product(mut parts) => {
            parts.push(b);
            Node::Product(parts)
        }
        a => Node::Product(vec![a, b]),
    }
}

fn root(inner: Node, index: Node) -> Node {
    Node::Power(Box::new(inner), Box::new(Node::int(1).over(index)))
}

fn raised(node: Node, power: Option<Node>) -> Node {
    match power {
        Some(power) => Node::Power(Box::new(node), Box::new(power)),
        None => node,
    }
}

/// `digits` (with `places` decimals) followed by `period` for ever: digits + period / (10^places * (10^n - 1)).
fn repeating(digits: Node, period: &str, places: i64) -> Node {
    let nines = "9".repeat(period.len());
    let tail = Node::Number(period.to_string(), -places).over(Node::Number(nines, 0));
    Node::Sum(vec![digits, tail])
}

fn function(name: &str) -> Option<Function> {
    Some(match name {
        "sin" => Function::Sin,
        "cos" => Function::Cos,
        "tan" => Function::Tan,
        "cot" => Function::Cot,
        "sec" => Function::Sec,
        "csc" => Function::Csc,
        "arcsin" => Function::Arcsin,
        "arccos" => Function::Arccos,
        "arctan" => Function::Arctan,
        "exp" => Function::Exp,
        "abs" => Function::Abs,
        _ => return None,
    })
}

/// Functions written without a backslash.
fn plain(run: &str) -> Option<&'static str> {
    const NAMES: &[&str] = &[
        "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "ln", "log", "exp", "abs", "pi",
    ];
    NAMES.iter().find(|name| **name == run).copied()
}

fn starts(name: &str) -> bool {
    matches!(
        name,
        "frac"
            | "binom"
            | "sqrt"
            | "surd"
            | "cuberoot"
            | "pi"
            | "infty"
            | "lfloor"
            | "lceil"
            | "ln"
            | "log"
            | "lg"
            | "begin matrix"
            | "sum"
            | "prod"
    ) || function(name).is_some()
        || greek(name)
}

fn greek(name: &str) -> bool {
    matches!(
        name,
        "alpha"
            | "beta"
            | "gamma"
            | "delta"
            | "epsilon"
            | "varepsilon"
            | "zeta"
            | "eta"
            | "theta"
            | "vartheta"
            | "iota"
            | "kappa"
            | "lambda"
            | "mu"
            | "nu"
            | "xi"
            | "rho"
            | "sigma"
            | "tau"
            | "upsilon"
            | "phi"
            | "varphi"
            | "chi"
            | "psi"
            | "omega"
            | "Gamma"
            | "Delta"
            | "Theta"
            | "Lambda"
            | "Xi"
            | "Sigma"
            | "Phi"
            | "Psi"
            | "Omega"
            | "ell"
    )
}
