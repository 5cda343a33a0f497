//! Writes the corpus, the tokenizer and the training text of the `mini` profile.
//!
//! ```text
//! cargo run --release --example mini_corpus                    # what is bundled: pipelines/mini/*.jsonl, tokenizer/
//! cargo run --release --example mini_corpus -- --training DIR  # what the bundled models were trained on
//! cargo run --release --example mini_corpus -- --bundle DIR mini-3B   # an exported model, rounded to bf16, to models/
//! ```
//!
//! Every byte is a function of this file: numbers are drawn from [`Stream`]s that have names.
//!
//! A problem is a start (a count, or boxes of equal size) and up to three events (find more, give
//! away). Forward, the start and the events are known and the count at the end is asked. In reverse
//! the count at the end is known and the start is asked, so every event has to be undone, last one first.
//! Either way the solution is one equation per step. A quarter of the problems are multiple choice:
//! the four options are neighbouring numbers, so a guess is right once in four times and a slip never.
//!
//! Held out: one arithmetic in five (its numbers and events, whatever the name and the thing) is kept for the three
//! tasks. No training text of any model tells a story with it, forward or in reverse.

use pipe::files::Files;
use pipe::model::{LoadOptions, Model};
use pipe::random::Stream;
use pipe::safetensors::Element;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const NAMES: [&str; 12] = ["Tom", "Mia", "Sam", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max", "Ida", "Kai", "Joy"];
const THINGS: [&str; 12] =
    ["apples", "books", "coins", "pens", "stones", "shells", "cards", "eggs", "cups", "balls", "keys", "nuts"];
const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// Most that is found or given away at once.
const LARGEST_EVENT: i64 = 29;
/// Forward problems in the bundled training set.
const FORWARD: usize = 600;
/// Problems per held-out task.
const HELD_OUT: usize = 80;
/// Records of training text for each bundled model.
const BASE_RECORDS: usize = 150_000;
const TEACHER_RECORDS: usize = 30_000;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// The pre-tokenizer of Qwen2.5: digits stand alone, a word keeps its leading space.
const SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2.5's ChatML without tools and without the default system turn.
const CHAT_TEMPLATE: &str = "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";
/// What `generate` asks the teacher; `pipelines/table1.toml` has the same words.
const INVERT: &str = "Turn the question and the answer round.";
const SOLVE: &str = "Solve step by step.";

/// Numbers in order from one named stream.
struct Dice {
    stream: Stream,
    drawn: u64,
}

impl Dice {
    fn named(words: &[&str]) -> Dice {
        Dice { stream: Stream::named(0, words), drawn: 0 }
    }

    /// Uniform in `low..=high`.
    fn between(&mut self, low: i64, high: i64) -> i64 {
        let at = self.stream.uniform(self.drawn);
        self.drawn += 1;
        low + (at * (high - low + 1) as f64) as i64
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.between(0, of.len() as i64 - 1) as usize]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Count(i64),
    Boxes { boxes: i64, each: i64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Find(i64),
    Give(i64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Reverse,
}

/// A problem with its numbers; both directions are told from it.
#[derive(Debug, Clone)]
struct Problem {
    name: &'static str,
    thing: &'static str,
    start: Start,
    events: Vec<Event>,
    /// Which of four options is right; `None`: the number itself is asked.
    choice: Option<usize>,
}

/// One direction of a problem in words.
struct Told {
    question: String,
    thinking: String,
    answer: String,
    /// What is graded: a number or a letter.
    solution: String,
    /// What became of the unknown, as a statement.
    statement: String,
}

impl Problem {
    /// `steps` equations, within two digits throughout. `boxes`: starts with boxes.
    fn draw(dice: &mut Dice, steps: usize, boxes: bool, choice: bool) -> Problem {
        loop {
            let start = if boxes {
                Start::Boxes { boxes: dice.between(2, 9), each: dice.between(2, 9) }
            } else {
                Start::Count(dice.between(2, 89))
            };
            let mut events = Vec::new();
            for _ in 0..steps - usize::from(boxes) {
                let number = dice.between(2, LARGEST_EVENT);
                events.push(if dice.between(0, 1) == 0 { Event::Find(number) } else { Event::Give(number) });
            }
            let choice = choice.then(|| dice.between(0, 3) as usize);
            let problem = Problem { name: dice.pick(&NAMES), thing: dice.pick(&THINGS), start, events, choice };
            let fits = problem.counts().iter().all(|count| (1..=99).contains(count));
            let first = problem.unknown_at_start();
            let options = problem.choice.is_none_or(|right| {
                [first, problem.last()].iter().all(|value| value - right as i64 >= 1 && value + 3 - right as i64 <= 99)
            });
            if fits && options {
                return problem;
            }
        }
    }

    /// The count at the start and after every event.
    fn counts(&self) -> Vec<i64> {
        let mut counts = vec![match self.start {
            Start::Count(count) => count,
            Start::Boxes { boxes, each } => boxes * each,
        }];
        for event in &self.events {
            let before = counts[counts.len() - 1];
            counts.push(match event {
                Event::Find(number) => before + number,
                Event::Give(number) => before - number,
            });
        }
        counts
    }

    fn last(&self) -> i64 {
        *self.counts().last().expect("the start is always there")
    }

    fn unknown_at_start(&self) -> i64 {
        match self.start {
            Start::Count(count) => count,
            Start::Boxes { each, .. } => each,
        }
    }

    /// The numbers and the events, without the name and the thing: what is held out.
    fn arithmetic(&self) -> String {
        let mut text = match self.start {
            Start::Count(count) => count.to_string(),
            Start::Boxes { boxes, each } => format!("{boxes}*{each}"),
        };
        for event in &self.events {
            match event {
                Event::Find(number) => text += &format!("+{number}"),
                Event::Give(number) => text += &format!("-{number}"),
            }
        }
        text
    }

    /// Boxes alone have too few numbers to hold one in five out by name; they are told apart like all others.
    fn is_held_out(&self) -> bool {
        Stream::named(0, &["held out", &self.arithmetic()]).uniform(0) < 0.2
    }

    /// What happens, as sentences; a number that is asked for is `some`.
    fn story(&self, direction: Direction) -> String {
        let Problem { name, thing, .. } = self;
        let known = |number: i64| match direction {
            Direction::Forward => number.to_string(),
            Direction::Reverse => "some".to_owned(),
        };
        let mut text = match self.start {
            Start::Count(count) => format!("{name} has {} {thing}.", known(count)),
            Start::Boxes { boxes, each } => {
                format!("{name} has {boxes} boxes. Each box holds {} {thing}.", known(each))
            }
        };
        for event in &self.events {
            text += &match event {
                Event::Find(number) => format!(" {name} finds {number} more."),
                Event::Give(number) => format!(" {name} gives away {number}."),
            };
        }
        if direction == Direction::Reverse {
            text += &format!(" Now {name} has {}.", self.last());
        }
        text
    }

    /// Every step with its reason: forward in order, in reverse undone from the end.
    fn steps(&self, direction: Direction) -> Vec<String> {
        let counts = self.counts();
        let mut steps = Vec::new();
        match direction {
            Direction::Forward => {
                if let Start::Boxes { boxes, each } = self.start {
                    steps.push(format!("Boxes: {boxes}*{each}={}.", counts[0]));
                }
                for (i, event) in self.events.iter().enumerate() {
                    let (before, after) = (counts[i], counts[i + 1]);
                    steps.push(match event {
                        Event::Find(number) => format!("Finds: {before}+{number}={after}."),
                        Event::Give(number) => format!("Gives: {before}-{number}={after}."),
                    });
                }
            }
            Direction::Reverse => {
                for (i, event) in self.events.iter().enumerate().rev() {
                    let (before, after) = (counts[i], counts[i + 1]);
                    steps.push(match event {
                        Event::Find(number) => format!("Undo finds: {after}-{number}={before}."),
                        Event::Give(number) => format!("Undo gives: {after}+{number}={before}."),
                    });
                }
                if let Start::Boxes { boxes, each } = self.start {
                    steps.push(format!("Undo boxes: {}/{boxes}={each}.", counts[0]));
                }
            }
        }
        steps
    }

    fn tell(&self, direction: Direction) -> Told {
        let Problem { name, thing, .. } = self;
        let (value, asked) = match (direction, self.start) {
            (Direction::Forward, _) => (self.last(), format!("How many {thing} does {name} have now?")),
            (Direction::Reverse, Start::Count(count)) => (count, format!("How many {thing} did {name} have before?")),
            (Direction::Reverse, Start::Boxes { each, .. }) => (each, format!("How many {thing} does each box hold?")),
        };
        let statement = match (direction, self.start) {
            (Direction::Forward, _) => format!("{name} has {value} {thing} now."),
            (Direction::Reverse, Start::Count(_)) => format!("{name} had {value} {thing} before."),
            (Direction::Reverse, Start::Boxes { .. }) => format!("Each box holds {value} {thing}."),
        };
        let mut question = format!("{} {asked}", self.story(direction));
        let mut thinking = self.steps(direction).join(" ");
        let mut solution = value.to_string();
        if let Some(right) = self.choice {
            question += &options(value - right as i64);
            solution = LETTERS[right].to_owned();
            thinking += &format!(" {value}({solution}).");
        }
        Told { question, thinking, answer: format!("The answer is \\boxed{{{solution}}}."), solution, statement }
    }

    /// The story, the options if there are any, and then the bare equations.
    fn worked(&self, direction: Direction) -> String {
        let equation = |step: String| step.split_once(": ").map_or(step.clone(), |(_, equation)| equation.to_owned());
        let mut equations: Vec<String> = self.steps(direction).into_iter().map(equation).collect();
        let mut text = self.story(direction);
        if let Some(right) = self.choice {
            let value = if direction == Direction::Forward { self.last() } else { self.unknown_at_start() };
            text += &options(value - right as i64);
            text.push('.');
            equations.push(format!("{value}({}).", LETTERS[right]));
        }
        format!("{text} So {}", equations.join(" "))
    }

    /// Told step by step as something that happened.
    fn narrate(&self) -> String {
        let Problem { name, thing, .. } = self;
        let counts = self.counts();
        let mut text = match self.start {
            Start::Count(count) => format!("{name} has {count} {thing}."),
            Start::Boxes { boxes, each } => {
                format!(
                    "{name} has {boxes} boxes. Each box holds {each} {thing}. Now {name} has {} {thing}.",
                    counts[0]
                )
            }
        };
        for (event, after) in self.events.iter().zip(&counts[1..]) {
            text += &match event {
                Event::Find(number) => format!(" {name} finds {number} more. Now {name} has {after} {thing}."),
                Event::Give(number) => format!(" {name} gives away {number}. Now {name} has {after} {thing}."),
            };
        }
        text
    }
}

/// Four neighbouring numbers with their letters.
fn options(first: i64) -> String {
    let option = |(i, letter): (usize, &&str)| format!(" {}({letter})", first + i as i64);
    LETTERS.iter().enumerate().map(option).collect::<Vec<_>>().join(",")
}

/// A problem that is (`held_out`) or is not kept for the tasks, of a random shape up to `longest` equations.
fn problem(dice: &mut Dice, held_out: bool, longest: i64, choice: bool) -> Problem {
    loop {
        let steps = dice.between(1, longest) as usize;
        let boxes = dice.between(0, 2) == 0;
        let problem = Problem::draw(dice, steps, boxes, choice);
        if problem.is_held_out() == held_out {
            return problem;
        }
    }
}

fn record(pairs: Value) -> Map<String, Value> {
    match pairs {
        Value::Object(map) => map,
        _ => unreachable!("only called with objects"),
    }
}

fn jsonl(records: &[Map<String, Value>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        bytes.extend(serde_json::to_vec(record).expect("strings only"));
        bytes.push(b'\n');
    }
    bytes
}

/// The forward training problems, told both ways. Columns are those of s1K-1.1.
fn training_problems() -> Vec<Problem> {
    let mut dice = Dice::named(&["s1k"]);
    let mut seen = BTreeSet::new();
    let mut problems = Vec::new();
    while problems.len() < FORWARD {
        let choice = problems.len() % 4 == 3;
        let problem = problem(&mut dice, false, 3, choice);
        if seen.insert(problem.tell(Direction::Forward).question) {
            problems.push(problem);
        }
    }
    problems
}

fn training_records(direction: Direction) -> Vec<Map<String, Value>> {
    let name = |i: usize| format!("p{i:04}");
    let tell = |(i, problem): (usize, &Problem)| {
        let told = problem.tell(direction);
        record(json!({
            "id": name(i),
            "question": told.question,
            "solution": told.solution,
            "deepseek_thinking_trajectory": told.thinking,
            "deepseek_attempt": told.answer,
        }))
    };
    training_problems().iter().enumerate().map(tell).collect()
}

/// A held-out task: every second problem is told in reverse. `math500` has one or two equations, `aime24` two to four,
/// one more than any training problem; `gpqa-diamond` is multiple choice with one or two.
fn task(name: &str) -> Vec<Map<String, Value>> {
    let mut dice = Dice::named(&["task", name]);
    let mut seen = BTreeSet::new();
    let mut records = Vec::new();
    while records.len() < HELD_OUT {
        let direction = if records.len() % 2 == 0 { Direction::Forward } else { Direction::Reverse };
        let (longest, choice) = match name {
            "math500" => (2, false),
            "aime24" => (4, false),
            _ => (2, true),
        };
        let problem = problem(&mut dice, true, longest, choice);
        let equations = problem.events.len() + usize::from(matches!(problem.start, Start::Boxes { .. }));
        if name == "aime24" && equations < 2 {
            continue;
        }
        let told = problem.tell(direction);
        if seen.insert(told.question.clone()) {
            let id = format!("{name}-{:03}", records.len());
            records.push(record(json!({"id": id, "problem": told.question, "answer": told.solution})));
        }
    }
    records
}

fn chat(turns: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (role, content) in turns {
        text += &format!("<|im_start|>{role}\n{content}<|im_end|>\n");
    }
    text.truncate(text.trim_end_matches('\n').len());
    text
}

/// A chain of equations, every result the start of the next.
fn equations(dice: &mut Dice) -> String {
    let mut value = dice.between(1, 99);
    let mut lines = Vec::new();
    for _ in 0..4 {
        let (operator, number, result) = match dice.between(0, 3) {
            0 => {
                let number = dice.between(2, LARGEST_EVENT);
                ('+', number, value + number)
            }
            1 => {
                let number = dice.between(2, LARGEST_EVENT);
                ('-', number, value - number)
            }
            2 => {
                let (boxes, each) = (dice.between(2, 9), dice.between(2, 9));
                value = boxes;
                ('*', each, boxes * each)
            }
            _ => {
                let (boxes, each) = (dice.between(2, 9), dice.between(2, 9));
                value = boxes * each;
                ('/', boxes, each)
            }
        };
        if !(1..=99).contains(&result) || !(1..=99).contains(&value) {
            value = dice.between(1, 99);
            continue;
        }
        lines.push(format!("{value}{operator}{number}={result}."));
        value = result;
    }
    if lines.is_empty() { equations(dice) } else { lines.join(" ") }
}

/// What the bases have read: equations, stories without a question (some with the equations that go with them, far
/// more often forward than in reverse), and short chats that answer at once. Never a word problem in a chat, and never
/// the think/answer layout: that is what fine-tuning has to add.
fn base_text(seed: &str, count: usize) -> Vec<Map<String, Value>> {
    let mut dice = Dice::named(&["base", seed]);
    let mut records = Vec::new();
    for i in 0..count {
        let text = match dice.between(0, 19) {
            0..=6 => equations(&mut dice) + "<|endoftext|>",
            7..=10 => problem(&mut dice, false, 3, false).narrate() + "<|endoftext|>",
            at @ 11..=14 => {
                let direction = if at == 14 { Direction::Reverse } else { Direction::Forward };
                let choice = dice.between(0, 1) == 0;
                problem(&mut dice, false, 3, choice).worked(direction) + "<|endoftext|>"
            }
            15..=17 => {
                let (first, right) = (dice.between(1, 96), dice.between(0, 3) as usize);
                let (wanted, options) = (first + right as i64, options(first));
                if dice.between(0, 2) == 0 {
                    let answer = format!("The answer is \\boxed{{{}}}.", LETTERS[right]);
                    chat(&[("user", &format!("Which is {wanted}?{options}")), ("assistant", &answer)])
                } else {
                    {
                        let order = [right, (right + 1) % 4, (right + 3) % 4];
                        let found = order.map(|i| format!(" {}({}).", first + i as i64, LETTERS[i])).concat();
                        format!("Which?{options}.{found}<|endoftext|>")
                    }
                }
            }
            18 => {
                let line = equations(&mut dice);
                let (sum, rest) = line.split_once('=').expect("an equation");
                let result = rest.split('.').next().unwrap_or(rest);
                let answer = format!("The answer is \\boxed{{{result}}}.");
                chat(&[("user", &format!("How many is {sum}?")), ("assistant", &answer)])
            }
            _ => {
                let problem = problem(&mut dice, false, 1, false);
                let now = format!("Now {} has {} {}.", problem.name, problem.last(), problem.thing);
                chat(&[("user", &problem.story(Direction::Forward)), ("assistant", &now)])
            }
        };
        records.push(record(json!({"id": format!("b{i:06}"), "text": text})));
    }
    records
}

/// What the teacher has learned on top: to turn a question round, and to solve what comes out, thinking first.
fn teacher_text(count: usize) -> Vec<Map<String, Value>> {
    let mut dice = Dice::named(&["teacher"]);
    let mut records = Vec::new();
    for i in 0..count {
        let choice = dice.between(0, 3) == 0;
        let problem = problem(&mut dice, false, 3, choice);
        let (forward, reverse) = (problem.tell(Direction::Forward), problem.tell(Direction::Reverse));
        let text = if dice.between(0, 1) == 0 {
            let prompt = format!("{INVERT}\nQuestion: {}\nAnswer: {}", forward.question, forward.solution);
            let reply = format!("New Question: {}\nNew Answer: {}", reverse.question, reverse.statement);
            chat(&[("user", &prompt), ("assistant", &reply)])
        } else {
            let reply = format!("<think>\n{}\n</think>\n\n{}", reverse.thinking, reverse.answer);
            chat(&[("user", &format!("{SOLVE}\n{}", reverse.question)), ("assistant", &reply)])
        };
        records.push(record(json!({"id": format!("t{i:06}"), "text": text})));
    }
    records
}

/// Text as the pre-tokenizer splits it, for the few characters that occur here.
fn pieces(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < chars.len() {
        let mut end = at + 1;
        let word = |c: char| c.is_alphabetic();
        let mark = |c: char| !c.is_alphanumeric() && !c.is_whitespace();
        let next = chars.get(at + 1).copied();
        if word(chars[at]) || (!chars[at].is_numeric() && chars[at] != '\n' && next.is_some_and(word)) {
            while end < chars.len() && word(chars[end]) {
                end += 1;
            }
        } else if mark(chars[at]) || (chars[at] == ' ' && next.is_some_and(mark)) {
            while end < chars.len() && mark(chars[end]) {
                end += 1;
            }
            while end < chars.len() && chars[end] == '\n' {
                end += 1;
            }
        }
        pieces.push(chars[at..end].iter().collect());
        at = end;
    }
    pieces
}

/// GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
fn byte_alphabet() -> Vec<char> {
    let mut next = 256;
    let stand_in = |byte: u32| {
        if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            return char::from_u32(byte).expect("below 256");
        }
        next += 1;
        char::from_u32(next - 1).expect("below 512")
    };
    (0..256).map(stand_in).collect()
}

/// Byte-pair merges over the training text until every word is one token: the most frequent pair first, ties in the
/// order of their text.
fn merges(texts: &[String]) -> Vec<(String, String)> {
    let alphabet = byte_alphabet();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for text in texts {
        for special_free in text.split("<|").flat_map(|part| part.split("|>").last()) {
            for piece in pieces(special_free) {
                *counts.entry(piece).or_default() += 1;
            }
        }
    }
    let symbols = |piece: &String| piece.bytes().map(|byte| alphabet[usize::from(byte)].to_string()).collect();
    let mut words: Vec<(Vec<String>, usize)> = counts.iter().map(|(piece, count)| (symbols(piece), *count)).collect();
    let mut merges = Vec::new();
    loop {
        let mut pairs: BTreeMap<(String, String), usize> = BTreeMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *pairs.entry((pair[0].clone(), pair[1].clone())).or_default() += count;
            }
        }
        let Some(best) = pairs.into_iter().rev().max_by_key(|(_, count)| *count).map(|(pair, _)| pair) else {
            return merges;
        };
        for (word, _) in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if word[at] == best.0 && word[at + 1] == best.1 {
                    let right = word.remove(at + 1);
                    word[at] += &right;
                }
                at += 1;
            }
        }
        merges.push(best);
    }
}

/// `tokenizer.json` and `tokenizer_config.json` in the layout of Qwen2.5.
fn tokenizer() -> (Value, Value) {
    let mut texts: Vec<String> = Vec::new();
    let text = |record: &Map<String, Value>| record["text"].as_str().unwrap_or_default().to_owned();
    texts.extend(base_text("tokenizer", 2_000).iter().map(text));
    texts.extend(teacher_text(4_000).iter().map(text));
    let layout = |told: Told| format!("think\n{}\nanswer\n{}", told.thinking, told.answer);
    texts.extend(training_problems().iter().map(|problem| layout(problem.tell(Direction::Forward))));
    let merges = merges(&texts);
    let mut vocabulary = Map::new();
    let mut alphabet = byte_alphabet();
    alphabet.sort_unstable();
    for symbol in
        alphabet.iter().map(char::to_string).chain(merges.iter().map(|(left, right)| format!("{left}{right}")))
    {
        let id = vocabulary.len();
        vocabulary.insert(symbol, json!(id));
    }
    let first_special = vocabulary.len();
    let special = |(i, content): (usize, &&str)| {
        json!({"id": first_special + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let added: Vec<Value> = SPECIAL.iter().enumerate().map(special).collect();
    let decoder: Map<String, Value> = added
        .iter()
        .map(|token| {
            let mut fields = token.clone();
            let id = fields.as_object_mut().and_then(|fields| fields.remove("id")).unwrap_or_default();
            (id.to_string(), fields)
        })
        .collect();
    let merges: Vec<Value> = merges.iter().map(|(left, right)| json!([left, right])).collect();
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": false}, byte_level(false)]},
        "post_processor": byte_level(false),
        "decoder": byte_level(false),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges},
    });
    let config = json!({
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "additional_special_tokens": SPECIAL[1..],
        "add_bos_token": false, "add_prefix_space": false, "bos_token": null, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": null, "model_max_length": 512, "split_special_tokens": false,
        "clean_up_tokenization_spaces": false, "errors": "replace", "chat_template": CHAT_TEMPLATE,
    });
    (tokenizer, config)
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("no map with keys that are not strings");
    bytes.push(b'\n');
    bytes
}

/// What is bundled, by path below `pipelines/mini`.
pub fn bundled() -> Vec<(&'static str, Vec<u8>)> {
    let (tokenizer, config) = tokenizer();
    vec![
        ("s1k.jsonl", jsonl(&training_records(Direction::Forward))),
        ("reverse.jsonl", jsonl(&training_records(Direction::Reverse))),
        ("aime24.jsonl", jsonl(&task("aime24"))),
        ("math500.jsonl", jsonl(&task("math500"))),
        ("gpqa-diamond.jsonl", jsonl(&task("gpqa-diamond"))),
        ("tokenizer/tokenizer.json", pretty(&tokenizer)),
        ("tokenizer/tokenizer_config.json", pretty(&config)),
    ]
}

/// The training text of the bundled models, by file name.
pub fn training(base_records: usize, teacher_records: usize) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("base.jsonl", jsonl(&base_text("all", base_records))),
        ("teacher.jsonl", jsonl(&teacher_text(teacher_records))),
    ]
}

fn write(folder: &Path, files: &[(&str, Vec<u8>)]) -> std::io::Result<()> {
    for (name, bytes) in files {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&path, bytes)?;
        println!("{} ({} bytes)", path.display(), bytes.len());
    }
    Ok(())
}

/// Writes the weights of an exported model, rounded to bf16, to where `init:NAME` finds them.
fn bundle(folder: &Path, name: &str) -> std::io::Result<()> {
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/mini/models").join(name);
    std::fs::create_dir_all(&to)?;
    let files = Files::from_dir(folder)?;
    let saved = Model::load(&[&files], &LoadOptions::default()).and_then(|model| model.save(&to, Element::Bf16));
    saved.map_err(|problem| std::io::Error::other(problem.to_string()))
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/mini"), &bundled()),
        [flag, folder, name] if flag == "--bundle" => bundle(Path::new(folder), name),
        [flag, folder] if flag == "--training" => {
            write(&PathBuf::from(folder), &training(BASE_RECORDS, TEACHER_RECORDS))
        }
        _ => {
            eprintln!("usage: mini_corpus [--training DIR | --bundle DIR NAME]");
            std::process::exit(2);
        }
    }
}
