//! The bundled corpus of the `mini` profile: its bytes, its answers, and what it keeps apart.

#[path = "../examples/mini_corpus.rs"]
#[allow(dead_code)] // the example's `main` and what it writes to are not used here
mod mini_corpus;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const TASKS: [&str; 3] = ["aime24", "math500", "gpqa-diamond"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/mini")
}

fn records(bytes: &[u8]) -> Vec<Value> {
    let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).expect("JSON")).collect()
}

fn read(name: &str) -> Vec<Value> {
    records(&std::fs::read(folder().join(format!("{name}.jsonl"))).expect("bundled"))
}

fn text<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key].as_str().unwrap_or_else(|| panic!("`{key}` in {record}"))
}

fn numbers(text: &str) -> Vec<i64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn sentences(question: &str) -> impl Iterator<Item = &str> {
    let story = question.split("How many").next().unwrap_or_default();
    story.split('.').map(str::trim).filter(|sentence| !sentence.is_empty())
}

/// The count at the end, `some` being `start`; `None` if a stated end is not reached or less than nothing is left.
fn end_of(question: &str, start: i64) -> Option<i64> {
    let mut boxes = None;
    let mut count = None;
    for sentence in sentences(question) {
        let number = numbers(sentence).first().copied().unwrap_or(start);
        if sentence.starts_with("Now") {
            return (count == Some(number)).then_some(number);
        } else if sentence.ends_with("boxes") {
            boxes = Some(number);
        } else if sentence.starts_with("Each box") {
            count = Some(boxes? * number);
        } else if sentence.contains("finds") {
            count = Some(count? + number);
        } else if sentence.contains("gives") {
            count = Some(count? - number);
        } else {
            count = Some(number);
        }
        if count.is_some_and(|count| count < 0) {
            return None;
        }
    }
    count
}

/// The only start from which the story comes to its stated end.
fn start_of(question: &str) -> i64 {
    let fits: Vec<i64> = (1..=99).filter(|&start| end_of(question, start).is_some()).collect();
    assert_eq!(fits.len(), 1, "one start fits: {question}");
    fits[0]
}

/// Solves a question from its words alone, by a way of its own: follows the events, for every possible start if need be.
fn solve(question: &str) -> String {
    let value = match question.contains("some") {
        true => start_of(question),
        false => end_of(question, 0).expect("a story that can be followed"),
    };
    let Some((_, options)) = question.split_once("? ").filter(|(_, options)| !options.is_empty()) else {
        return value.to_string();
    };
    let options: Vec<i64> = numbers(options);
    assert_eq!(options.len(), 4, "{question}");
    let right = options.iter().position(|&option| option == value).expect("one option is right");
    ["A", "B", "C", "D"][right].to_owned()
}

/// The events with their numbers, and the start, whatever the names: `has 28 finds 31 finds 3`.
fn arithmetic(question: &str) -> String {
    let mut words = Vec::new();
    for sentence in sentences(question).filter(|sentence| !sentence.starts_with("Now")) {
        let verb = ["boxes", "holds", "finds", "gives"].iter().find(|verb| sentence.contains(**verb)).unwrap_or(&"has");
        let number = numbers(sentence).first().copied().unwrap_or_else(|| start_of(question));
        words.push(format!("{verb} {number}"));
    }
    words.join(" ").replacen("boxes", "has boxes", 1)
}

#[test]
fn the_generator_writes_the_bundled_bytes() {
    for (name, bytes) in mini_corpus::bundled() {
        let path = folder().join(name);
        let on_disk = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(on_disk == bytes, "{name} differs from what `cargo run --example mini_corpus` writes");
    }
}

#[test]
fn every_stated_answer_follows_from_its_question() {
    for name in ["s1k", "reverse"] {
        for record in read(name) {
            let solution = text(&record, "solution");
            assert_eq!(solve(text(&record, "question")), solution, "{record}");
            assert_eq!(text(&record, "deepseek_attempt"), format!("The answer is \\boxed{{{solution}}}."));
        }
    }
    for name in TASKS {
        for record in read(name) {
            assert_eq!(solve(text(&record, "problem")), text(&record, "answer"), "{record}");
        }
    }
}

#[test]
fn every_equation_of_every_solution_holds() {
    for name in ["s1k", "reverse"] {
        for record in read(name) {
            let thinking = text(&record, "deepseek_thinking_trajectory");
            let equations: Vec<&str> = thinking.split(' ').filter(|word| word.contains('=')).collect();
            assert!(!equations.is_empty(), "{record}");
            for equation in equations {
                let n = numbers(equation);
                let operator = equation.chars().find(|c| "+-*/".contains(*c)).expect("an operator");
                let holds = match operator {
                    '+' => n[0] + n[1] == n[2],
                    '-' => n[0] - n[1] == n[2],
                    '*' => n[0] * n[1] == n[2],
                    _ => n[1] * n[2] == n[0],
                };
                assert!(holds, "{equation} in {record}");
            }
        }
    }
}

#[test]
fn every_forward_problem_has_its_reverse() {
    let reverse: BTreeMap<String, Value> =
        read("reverse").into_iter().map(|record| (text(&record, "id").to_owned(), record)).collect();
    let forward = read("s1k");
    assert_eq!(forward.len(), reverse.len());
    for record in &forward {
        let (question, back) = (text(record, "question"), text(&reverse[text(record, "id")], "question"));
        assert_eq!(arithmetic(question), arithmetic(back), "the same numbers told backwards");
        assert!(!question.contains("some") && back.contains("some"), "{back}");
    }
}

#[test]
fn no_task_shares_its_arithmetic_with_any_training_text() {
    let mut trained: BTreeSet<String> = BTreeSet::new();
    for name in ["s1k", "reverse"] {
        trained.extend(read(name).iter().map(|record| arithmetic(text(record, "question"))));
    }
    let training = mini_corpus::training(4_000, 2_000);
    for record in training.iter().flat_map(|(_, bytes)| records(bytes)) {
        let story = text(&record, "text");
        if let Some((_, question)) = story.split_once("Question: ") {
            trained.insert(arithmetic(question));
        } else if let Some((_, question)) = story.split_once("step by step.\n") {
            trained.insert(arithmetic(question));
        } else if !story.contains("<|im_start|>") && story.contains(" has ") {
            trained.insert(arithmetic(story.trim_end_matches("<|endoftext|>")));
        }
    }
    assert!(trained.len() > 3_000, "the comparison is not empty: {}", trained.len());
    for name in TASKS {
        for record in read(name) {
            let arithmetic = arithmetic(text(&record, "problem"));
            assert!(!trained.contains(&arithmetic), "{name}: {arithmetic} was trained on");
        }
    }
}

#[test]
fn the_options_of_the_choice_task_are_right_about_equally_often() {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for record in read("gpqa-diamond") {
        *counts.entry(text(&record, "answer").to_owned()).or_default() += 1;
    }
    assert_eq!(counts.keys().collect::<Vec<_>>(), ["A", "B", "C", "D"]);
    assert!(counts.values().all(|&count| count >= 10), "{counts:?}");
}

#[test]
fn the_tokenizer_reads_back_what_it_wrote() {
    let path = folder().join("tokenizer/tokenizer.json");
    let tokenizer = tokenizers::Tokenizer::from_file(path).expect("a tokenizer");
    let ids = tokenizer.get_vocab_size(true) as u32;
    assert!(ids <= 512, "the bundled models have 512 rows: {ids}");
    for record in read("s1k").iter().take(100) {
        let question = text(record, "question");
        let encoding = tokenizer.encode(question, false).expect("any text");
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).expect("its own ids"), question);
        let words = question.split(' ').count();
        assert!(encoding.len() <= 2 * words + 5, "words are single tokens: {} of {words}", encoding.len());
    }
    let encoding = tokenizer.encode("<|im_start|>user\nÄ 42<|im_end|>", false).expect("any text");
    assert_eq!(encoding.get_ids()[0], ids - 2);
    assert_eq!(encoding.get_ids()[encoding.len() - 1], ids - 1);
}
