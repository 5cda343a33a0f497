//! `pipe show M CELL --transcripts`: what was asked and said, a line for each sample, or one of them whole.
//!
//! An `eval` has `transcripts.jsonl` (and `judgements.jsonl`, where a judge was asked), a `generate` stage
//! `data.jsonl` and `failed.jsonl`, a dataset `data.jsonl`. Files are read line by line: they may be larger than
//! memory. What a model wrote reaches the terminal through `screen` alone.

use super::found::Found;
use super::global::{Done, Global, print, say};
use super::screen::{self, pad, printable, short};
use crate::report;
use clap::ValueEnum;
use pipe::exec::Engine;
use pipe::files::Files;
use pipe::problem::{Exit, Problem};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use unicode_width::UnicodeWidthStr;

/// Which samples are shown.
#[derive(clap::Args)]
pub struct Browse {
    /// List the samples of an evaluation, or the records a stage made; the options below say which
    #[arg(long, help_heading = "Transcripts")]
    transcripts: bool,
    /// Only samples with this verdict; of `generate`, what was made or failed
    #[arg(long, value_enum, value_name = "VERDICT", help_heading = "Transcripts")]
    verdict: Option<Verdict>,
    /// One of them, whole: prompt, thinking, answer, what was extracted, and why it counts as it does
    #[arg(long, value_name = "ID", help_heading = "Transcripts")]
    id: Option<String>,
    /// Which of its samples [default: the first]
    #[arg(long, value_name = "K", requires = "id", help_heading = "Transcripts")]
    sample: Option<u64>,
    /// Only samples with this text anywhere in them, in upper or lower case
    #[arg(long, value_name = "TEXT", help_heading = "Transcripts")]
    pub grep: Option<String>,
    /// At most this many
    #[arg(long, value_name = "N", help_heading = "Transcripts")]
    pub limit: Option<usize>,
    /// Without this many from the start
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, help_heading = "Transcripts")]
    pub offset: usize,
    /// Problems on which two evaluations differ, side by side
    #[arg(long, value_name = "CELL", conflicts_with_all = ["transcripts", "verdict", "id", "sample"], help_heading = "Transcripts")]
    pub against: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Verdict {
    Correct,
    Wrong,
    Undecided,
    Made,
    Failed,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Correct => "correct",
            Verdict::Wrong => "wrong",
            Verdict::Undecided => "undecided",
            Verdict::Made => "made",
            Verdict::Failed => "failed",
        }
    }
}

impl Browse {
    /// Whether samples are asked for, or the stage they belong to.
    pub fn asked(&self) -> bool {
        let filtered = self.verdict.is_some() || self.id.is_some() || self.grep.is_some();
        self.transcripts || filtered || self.limit.is_some() || self.offset > 0
    }

    /// `grep` is in lower case.
    fn wants(&self, item: &Item, grep: Option<&str>) -> bool {
        self.id.as_ref().is_none_or(|id| *id == item.id)
            && self.sample.is_none_or(|sample| sample == item.sample)
            && self.verdict.is_none_or(|verdict| verdict.name() == item.verdict)
            && grep.is_none_or(|text| item.holds(text))
    }
}

/// One sample, or one record.
struct Item {
    id: String,
    sample: u64,
    verdict: String,
    fields: Map<String, Value>,
}

impl Item {
    fn text(&self, name: &str) -> Option<&str> {
        self.fields.get(name).and_then(Value::as_str)
    }

    /// The value of a field on one line.
    fn brief(&self, name: &str, most: usize) -> String {
        match self.fields.get(name) {
            None | Some(Value::Null) => "-".to_string(),
            Some(Value::String(text)) => short(text, most),
            Some(other) => short(&other.to_string(), most),
        }
    }

    fn holds(&self, wanted: &str) -> bool {
        fn any(value: &Value, wanted: &str) -> bool {
            match value {
                Value::String(text) => text.to_lowercase().contains(wanted),
                Value::Array(all) => all.iter().any(|value| any(value, wanted)),
                Value::Object(all) => all.values().any(|value| any(value, wanted)),
                other => other.to_string().contains(wanted),
            }
        }
        self.fields.values().any(|value| any(value, wanted))
    }
}

/// The files of a cell that hold samples, in the order they are shown.
struct Source<'a> {
    graded: bool,
    files: Vec<(&'a Path, &'static str)>,
    judgements: HashMap<(String, u64), Value>,
}

impl<'a> Source<'a> {
    fn of(found: &Found, files: &'a Files) -> Result<Source<'a>, Problem> {
        if let Some(path) = files.get("transcripts.jsonl") {
            let mut judgements = HashMap::new();
            if let Some(path) = files.get("judgements.jsonl") {
                each_line(path, &mut |fields| {
                    let key = (id_of(&fields, judgements.len()), sample_of(&fields));
                    judgements.insert(key, Value::Object(fields));
                    true
                })?;
            }
            return Ok(Source { graded: true, files: vec![(path, "")], judgements });
        }
        let both = [("data.jsonl", "made"), ("failed.jsonl", "failed")];
        let files: Vec<(&Path, &'static str)> =
            both.into_iter().filter_map(|(name, verdict)| Some((files.get(name)?, verdict))).collect();
        if files.is_empty() {
            let message = format!("`{}` has neither samples nor records", found.label);
            return Err(Problem::new("cli::no_transcripts", message)
                .help("`eval` has samples, `generate` and `dataset` have records")
                .exit(Exit::Usage));
        }
        Ok(Source { graded: false, files, judgements: HashMap::new() })
    }

    /// Hands every item to `see` until that says it is enough.
    fn each(&self, see: &mut dyn FnMut(Item) -> bool) -> Result<(), Problem> {
        for (path, state) in &self.files {
            let (mut line, mut enough) = (0, false);
            each_line(path, &mut |mut fields| {
                let id = id_of(&fields, line);
                line += 1;
                let sample = sample_of(&fields);
                let verdict = match state.is_empty() {
                    true => fields.get("verdict").and_then(Value::as_str).unwrap_or("-").to_string(),
                    false => state.to_string(),
                };
                if let Some(judgement) = self.judgements.get(&(id.clone(), sample)) {
                    fields.insert("judgement".to_string(), judgement.clone());
                }
                enough = !see(Item { id, sample, verdict, fields });
                !enough
            })?;
            if enough {
                break;
            }
        }
        Ok(())
    }
}

/// Objects of a file of lines, until `see` says it is enough.
pub fn each_line(path: &Path, see: &mut dyn FnMut(Map<String, Value>) -> bool) -> Result<(), Problem> {
    let unreadable = |error: std::io::Error| Problem::io("cli::transcripts", "read", path, &error);
    let mut lines = BufReader::new(File::open(path).map_err(unreadable)?);
    let (mut bytes, mut number) = (Vec::new(), 0);
    loop {
        bytes.clear();
        number += 1;
        if lines.read_until(b'\n', &mut bytes).map_err(unreadable)? == 0 {
            return Ok(());
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let fields = serde_json::from_slice(&bytes).map_err(|error| {
            Problem::new("cli::transcripts", format!("not an object: {error}")).at_line(path, number)
        })?;
        if !see(fields) {
            return Ok(());
        }
    }
}

/// A record's id, or its place; `line` is from 0.
pub fn id_of(fields: &Map<String, Value>, line: usize) -> String {
    match fields.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("line-{}", line + 1),
    }
}

fn sample_of(fields: &Map<String, Value>) -> u64 {
    fields.get("sample").and_then(Value::as_u64).unwrap_or(0)
}

/// The one cell that samples are of.
pub fn one<'a>(found: &'a [Found], stage: &str) -> Result<&'a Found, Problem> {
    let [one] = found else {
        let made = found.iter().find(|found| found.record.is_some()).unwrap_or(&found[0]);
        return Err(Problem::new(
            "cli::several_cells",
            format!("`{stage}` is {}; samples are shown of one", report::count(found.len(), "cell")),
        )
        .help(format!("'{}'", made.label))
        .exit(Exit::Usage));
    };
    Ok(one)
}

/// Shows the samples of a cell that were asked for.
pub fn show(global: &Global, engine: &Engine, found: &Found, browse: &Browse) -> Done {
    let Some(record) = &found.record else { return Ok(()) };
    let files = engine.store.files(&record.artifact);
    let source = Source::of(found, &files)?;
    let possible: &[Verdict] = match source.graded {
        true => &[Verdict::Correct, Verdict::Wrong, Verdict::Undecided],
        false => &[Verdict::Made, Verdict::Failed],
    };
    if let Some(verdict) = browse.verdict.filter(|verdict| !possible.contains(verdict)) {
        let names: Vec<&str> = possible.iter().map(|verdict| verdict.name()).collect();
        let message = format!("nothing of `{}` can be {}", found.label, verdict.name());
        let problem = Problem::new("cli::verdict", message).help(format!("--verdict {}", names.join("|")));
        return Err(problem.exit(Exit::Usage).into());
    }
    let grep = browse.grep.as_ref().map(|text| text.to_lowercase());
    let (mut all, mut matching, mut known_id) = (0usize, 0usize, browse.id.is_none());
    let (mut rows, mut whole, mut printed) = (Vec::new(), None, Ok(()));
    source.each(&mut |item| {
        all += 1;
        known_id |= browse.id.as_ref() == Some(&item.id);
        if !browse.wants(&item, grep.as_deref()) {
            return true;
        }
        matching += 1;
        if matching <= browse.offset || matching - browse.offset > browse.limit.unwrap_or(usize::MAX) {
            return true;
        }
        // A file may hold more than memory: of a list only a line of each sample is kept.
        match (global.json, browse.id.is_some(), source.graded) {
            (true, ..) => printed = print(&screen::json_line(&Value::Object(item.fields))),
            (false, true, _) => whole = whole.take().or(Some(item)),
            (false, false, true) => rows.push(graded_row(&item)),
            (false, false, false) => rows.push(record_row(&item)),
        }
        printed.is_ok()
    })?;
    printed?;
    if !known_id {
        let id = browse.id.as_deref().unwrap_or_default();
        return Err(Problem::new("cli::no_sample", format!("`{}` has no record `{id}`", found.label))
            .help("`--transcripts` lists them")
            .exit(Exit::Usage)
            .into());
    }
    let what = if source.graded { "sample" } else { "record" };
    if browse.id.is_some() {
        match &whole {
            Some(item) => print(&page(found, item, source.graded))?,
            None if matching == 0 => say(global, "none of its samples is one of those asked for"),
            None => {}
        }
        if matching > 1 {
            say(global, &format!("one of {}; `--sample K` shows another", report::count(matching, what)));
        }
        return Ok(());
    }
    if !global.json {
        let head: &[&str] = match source.graded {
            true => &["id", "sample", "verdict", "extracted", "gold", "tokens", "finish", "found by", "decided by"],
            false => &["id", "state", "what"],
        };
        let cut = if rows.len() < matching { format!("{matching} that match, of ") } else { String::new() };
        let summary = format!("{} of {cut}{}", rows.len(), report::count(all, what));
        if !rows.is_empty() {
            print(&grid(head, &rows, if source.graded { 2 } else { 1 }))?;
        }
        say(global, &summary);
    }
    Ok(())
}

/// Widest that an id gets in a list.
pub const ID: usize = 32;
/// Widest that an answer gets.
pub const ANSWER: usize = 24;
/// Widest that the beginning of a text gets.
const TEXT: usize = 80;

fn graded_row(item: &Item) -> Vec<String> {
    let mut row = vec![short(&item.id, ID), item.sample.to_string(), item.verdict.clone()];
    row.extend(["extracted", "gold"].map(|name| item.brief(name, ANSWER)));
    row.extend(["tokens", "finish", "found", "rule"].map(|name| item.brief(name, ANSWER)));
    row
}

fn record_row(item: &Item) -> Vec<String> {
    let what = match item.verdict.as_str() {
        "failed" => format!("{} (finish: {})", item.brief("reason", TEXT), item.brief("finish", ANSWER)),
        // What a record is about, whatever its fields are called.
        _ => {
            let fields = item.fields.keys().filter(|name| *name != "id");
            fields.map(|name| format!("{}: {}", short(name, ID), item.brief(name, ID))).collect::<Vec<_>>().join("  ")
        }
    };
    vec![short(&item.id, ID), item.verdict.clone(), what]
}

/// Rows under a head, columns as wide as what is in them; the column `verdict` in its colour.
pub fn grid(head: &[&str], rows: &[Vec<String>], verdict: usize) -> String {
    let colour = report::colour(&std::io::stdout());
    let room = screen::columns();
    let heads: Vec<String> = head.iter().map(|title| title.to_string()).collect();
    let width = |at: usize| rows.iter().chain([&heads]).map(|row| row[at].width()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = String::new();
    for (number, row) in [&heads].into_iter().chain(rows).enumerate() {
        let mut line = String::new();
        let mut left = room.unwrap_or(usize::MAX);
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let cell = if left < cell.width() { short(cell, left.max(1)) } else { cell.clone() };
            let padded = if at + 1 == row.len() { cell.clone() } else { pad(&cell, *width) };
            if left > 0 {
                match colour && at == verdict && number > 0 {
                    true => line.push_str(&painted(&cell, &padded)),
                    false => line.push_str(&padded),
                }
            }
            left = left.saturating_sub(width + 2);
            if left > 0 {
                line.push_str("  ");
            }
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// A verdict in its colour, with the blanks behind it.
fn painted(verdict: &str, padded: &str) -> String {
    let style = match verdict {
        "correct" | "made" => "32",
        "wrong" | "failed" => "31",
        "undecided" => "33",
        _ => return padded.to_string(),
    };
    format!("\x1b[{style}m{verdict}\x1b[0m{}", " ".repeat(padded.width().saturating_sub(verdict.width())))
}

/// One sample whole.
fn page(found: &Found, item: &Item, graded: bool) -> String {
    let colour = report::colour(&std::io::stdout());
    let verdict = if colour { painted(&item.verdict, &item.verdict) } else { printable(&item.verdict) };
    let sample = if graded { format!(", sample {}", item.sample) } else { String::new() };
    let mut out = format!("{}  {}{sample}: {verdict}\n", found.label, short(&item.id, TEXT));
    let (facts, sections) = if graded { of_sample(item) } else { of_record(item) };
    let width = facts.iter().map(|(name, _)| name.width()).max().unwrap_or(0);
    for (name, fact) in facts {
        let _ = writeln!(out, "{}  {fact}", pad(&name, width));
    }
    for (title, text) in sections {
        let title = if colour { format!("\x1b[1m{title}\x1b[0m") } else { title };
        let text = if text.trim().is_empty() { "(nothing)" } else { text.trim_end() };
        let _ = write!(out, "\n{title}\n{}", screen::wrap(&printable(text), screen::columns(), "  "));
    }
    out
}

/// Facts of a line each, then texts of many.
type Parts = (Vec<(String, String)>, Vec<(String, String)>);

fn of_sample(item: &Item) -> Parts {
    let mut facts = vec![
        ("gold".to_string(), item.brief("gold", TEXT)),
        (
            "extracted".to_string(),
            format!("{}  (found by: {})", item.brief("extracted", TEXT), item.brief("found", TEXT)),
        ),
        ("decided by".to_string(), item.brief("rule", TEXT)),
        ("tokens".to_string(), format!("{}, finish: {}", item.brief("tokens", TEXT), item.brief("finish", TEXT))),
    ];
    if let Some(order) = item.fields.get("order").and_then(Value::as_array) {
        let letter = |(at, choice): (usize, &Value)| format!("{} {choice}", char::from(b'A' + (at % 26) as u8));
        let order: Vec<String> = order.iter().enumerate().map(letter).collect();
        facts.push(("choices".to_string(), format!("{}  (places in the record, from 0)", order.join(", "))));
    }
    let mut sections = vec![("prompt".to_string(), text_of(item.fields.get("prompt")))];
    let (thinking, answer) = thinking_and_answer(item);
    sections.extend(thinking.map(|thinking| ("thinking".to_string(), thinking)));
    sections.extend(answer.map(|answer| ("answer".to_string(), answer)));
    if let Some(judgement) = item.fields.get("judgement") {
        let verdict = [&judgement["verdict"], &judgement["why_none"]].into_iter().find_map(Value::as_str);
        facts.push(("judged".to_string(), short(verdict.unwrap_or("-"), TEXT)));
        sections.push(("judge".to_string(), text_of(judgement.get("reply"))));
    }
    // What else an evaluation has to say of a sample.
    for (name, value) in &item.fields {
        let elsewhere = SHOWN.contains(&name.as_str()) || (name == "thinking" && value.is_string());
        if elsewhere {
            continue;
        }
        let part = |(name, part): (&String, &Value)| format!("{name} {}", text_of(Some(part)));
        let text = match value {
            Value::Object(parts) => parts.iter().map(part).collect::<Vec<_>>().join(", "),
            other => text_of(Some(other)),
        };
        facts.push((short(&name.replace('_', " "), ID), short(&text, TEXT)));
    }
    (facts, sections)
}

/// Fields of a sample that have places of their own on its page.
const SHOWN: [&str; 13] = [
    "id",
    "sample",
    "prompt",
    "completion",
    "extracted",
    "gold",
    "verdict",
    "found",
    "rule",
    "tokens",
    "finish",
    "order",
    "judgement",
];

fn of_record(item: &Item) -> Parts {
    let (mut facts, mut sections) = (Vec::new(), Vec::new());
    for (name, value) in item.fields.iter().filter(|(name, _)| *name != "id") {
        let (name, text) = (short(name, ID), text_of(Some(value)));
        match text.contains('\n') || text.width() > TEXT {
            true => sections.push((name, text)),
            false => facts.push((name, short(&text, TEXT))),
        }
    }
    (facts, sections)
}

fn text_of(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_string(),
        Some(Value::String(text)) => text.clone(),
        // Turns of a conversation read better one below another.
        Some(Value::Array(turns)) if turns.iter().all(|turn| turn["content"].is_string()) => {
            let turn = |turn: &Value| format!("[{}] {}", text_of(turn.get("role")), text_of(turn.get("content")));
            turns.iter().map(turn).collect::<Vec<_>>().join("\n")
        }
        Some(other) => other.to_string(),
    }
}

/// A completion in its parts, either of which it may lack. What opens the thinking may stand in the prompt.
fn thinking_and_answer(item: &Item) -> (Option<String>, Option<String>) {
    let text = item.text("completion").unwrap_or_default();
    if let Some(thinking) = item.text("thinking") {
        return (Some(thinking.to_string()), Some(text.to_string()));
    }
    let opened = item.text("prompt").map_or("", str::trim_end);
    let opened = ["<|im_start|>think", "<think>"].iter().any(|open| opened.ends_with(open) || text.contains(open));
    let ends = ["<|im_start|>answer", "</think>"];
    match ends.iter().find_map(|end| text.rsplit_once(end)) {
        Some((thinking, answer)) => (Some(thinking.to_string()), Some(answer.trim_start().to_string())),
        None if opened => (Some(text.to_string()), None),
        None => (None, Some(text.to_string())),
    }
}
