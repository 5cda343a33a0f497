//! `pipe grade FILE...`: verdicts on responses that lie in files, with nothing else of a study needed.

use super::global::{Done, Global, print, say};
use super::screen;
use clap::ValueEnum;
use pipe::data::{Record, read_numbered};
use pipe::grade::{self, Graded, Kind, Verdict};
use pipe::problem::Problem;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Grade responses against gold answers: correct, wrong or undecided, and by which rules
///
/// Each record has `id`, `gold` and `response`, and a `kind`: `math` (the default), `number` or `choice`. Where
/// records say `correct` (true or false), the verdicts are held against it in a table.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe grade responses.jsonl\n  \
    pipe grade responses.jsonl --json > verdicts.jsonl\n  \
    pipe grade labelled.jsonl --only undecided\n  \
    pipe grade labelled.jsonl --summary --by category\n  \
    pipe grade responses.jsonl --grader s1")]
pub struct Arguments {
    /// JSON Lines, a JSON array, or Parquet
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// `auto`: the rules of this program; `s1`: text equality as the s1 study scored, without a judge
    #[arg(long, value_enum, default_value_t = Grader::Auto)]
    grader: Grader,
    /// Show only records with this verdict
    #[arg(long, value_enum, value_name = "VERDICT")]
    only: Option<Only>,
    /// Show counts, not records
    #[arg(long)]
    summary: bool,
    /// Counts also by the values of this field
    #[arg(long, value_name = "FIELD")]
    by: Option<String>,
    /// The field that says whether a response is right
    #[arg(long, value_name = "FIELD", default_value = "correct")]
    label: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Grader {
    Auto,
    S1,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    Correct,
    Wrong,
    Undecided,
}

impl Only {
    fn verdict(self) -> Verdict {
        match self {
            Only::Correct => Verdict::Correct,
            Only::Wrong => Verdict::Wrong,
            Only::Undecided => Verdict::Undecided,
        }
    }
}

/// A record made ready.
struct Case {
    id: String,
    gold: String,
    response: String,
    kind: Kind,
    label: Option<bool>,
    /// Its value of the field of `--by`.
    group: Option<String>,
}

/// Counts of verdicts, and of how they stand to labels.
#[derive(Default, Clone)]
struct Counts {
    total: usize,
    correct: usize,
    wrong: usize,
    undecided: usize,
    /// Of those with a label.
    labelled: usize,
    right: usize,
    false_positives: usize,
    false_negatives: usize,
    undecided_labelled: usize,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let mut cases = Vec::new();
    for file in &arguments.files {
        cases.extend(read(file, arguments)?);
    }
    let start = Instant::now();
    let graded: Vec<Graded> = cases
        .iter()
        .map(|case| match arguments.grader {
            Grader::Auto => grade::grade(&case.gold, &case.response, case.kind),
            Grader::S1 => grade::s1::grade(&case.gold, &case.response, case.kind),
        })
        .collect();
    let took = start.elapsed();

    let (mut all, mut groups): (Counts, BTreeMap<String, Counts>) = Default::default();
    for (case, graded) in cases.iter().zip(&graded) {
        all.count(case, graded.verdict);
        if let Some(group) = &case.group {
            groups.entry(group.clone()).or_default().count(case, graded.verdict);
        }
    }
    let shown = || {
        let wanted = arguments.only.map(Only::verdict);
        cases.iter().zip(&graded).filter(move |(_, graded)| wanted.is_none_or(|wanted| graded.verdict == wanted))
    };
    let mut out = String::new();
    if global.json {
        if arguments.summary {
            let groups: BTreeMap<&String, Value> = groups.iter().map(|(name, counts)| (name, counts.json())).collect();
            let mut object = all.json();
            if let Some(by) = &arguments.by {
                object["by"] = json!({ "field": by, "values": groups });
            }
            let _ = writeln!(out, "{object:#}");
        } else {
            for (case, graded) in shown() {
                let _ = writeln!(out, "{}", line(case, graded));
            }
        }
        return print(&out);
    }
    if !arguments.summary {
        for (case, graded) in shown() {
            let extracted = graded.extracted.as_deref().unwrap_or("-");
            let _ = writeln!(
                out,
                "{:<9}  {}  {}  (gold {}; {}, {})",
                graded.verdict.name(),
                screen::printable(&case.id),
                short(extracted),
                short(&case.gold),
                graded.found,
                graded.rule
            );
        }
        if !out.is_empty() {
            out.push('\n');
        }
    }
    out.push_str(&table(&all, &groups, arguments.by.as_deref()));
    say(global, &format!("{} graded in {:.1} ms", cases.len(), took.as_secs_f64() * 1e3));
    print(&out)
}

/// The records of a file, all that lack something named at once.
fn read(file: &Path, arguments: &Arguments) -> Result<Vec<Case>, Problem> {
    let records = read_numbered(file)?;
    let (mut cases, mut bad) = (Vec::with_capacity(records.len()), Vec::new());
    for (line, record) in &records {
        match case(*line, record, arguments) {
            Ok(case) => cases.push(case),
            Err(what) => bad.push(format!("line {line}: {what}")),
        }
    }
    if bad.is_empty() {
        return Ok(cases);
    }
    let mut problem =
        Problem::new("grade::bad_rows", format!("{} of {} records cannot be graded", bad.len(), records.len()))
            .at_file(file);
    problem.notes = bad.iter().take(10).cloned().collect();
    if bad.len() > 10 {
        problem = problem.note(format!("and {} more", bad.len() - 10));
    }
    Err(problem.help("a record is `{\"id\": .., \"gold\": .., \"response\": .., \"kind\": \"math\" or \"choice\"}`"))
}

fn case(line: usize, record: &Record, arguments: &Arguments) -> Result<Case, String> {
    let text = |name: &str| match record.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(_) => Err(format!("`{name}` is not text")),
        None => Err(format!("no `{name}`; the record has {}", names(record))),
    };
    let id = match record.get("id") {
        None => format!("line-{line}"),
        Some(_) => text("id")?,
    };
    let kind = match record.get("kind").map(|kind| kind.as_str().unwrap_or("")) {
        None | Some("math") => Kind::Math,
        Some("number" | "numeric") => Kind::Number,
        Some("choice") => Kind::Choice,
        Some(_) => return Err(format!("`kind` is {}, not math, number or choice", record["kind"])),
    };
    let label = match record.get(&arguments.label) {
        None | Some(Value::Null) => None,
        Some(Value::Bool(label)) => Some(*label),
        Some(_) => return Err(format!("`{}` is neither true nor false", arguments.label)),
    };
    let group = match &arguments.by {
        None => None,
        Some(by) => match record.get(by) {
            None => return Err(format!("no `{by}`; the record has {}", names(record))),
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => Some(other.to_string()),
        },
    };
    Ok(Case { id, gold: text("gold")?, response: text("response")?, kind, label, group })
}

fn names(record: &Record) -> String {
    record.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A verdict as a program reads it.
fn line(case: &Case, graded: &Graded) -> Value {
    json!({
        "id": case.id,
        "verdict": graded.verdict.name(),
        "extracted": graded.extracted,
        "rule": graded.rule,
        "found": graded.found,
        "gold": case.gold,
    })
}

impl Counts {
    fn count(&mut self, case: &Case, verdict: Verdict) {
        self.total += 1;
        match verdict {
            Verdict::Correct => self.correct += 1,
            Verdict::Wrong => self.wrong += 1,
            Verdict::Undecided => self.undecided += 1,
        }
        let Some(label) = case.label else { return };
        self.labelled += 1;
        match (verdict, label) {
            (Verdict::Correct, true) | (Verdict::Wrong, false) => self.right += 1,
            (Verdict::Correct, false) => self.false_positives += 1,
            (Verdict::Wrong, true) => self.false_negatives += 1,
            (Verdict::Undecided, _) => self.undecided_labelled += 1,
        }
    }

    fn json(&self) -> Value {
        let mut object = json!({
            "total": self.total,
            "correct": self.correct,
            "wrong": self.wrong,
            "undecided": self.undecided,
        });
        if self.labelled > 0 {
            object["labelled"] = json!({
                "total": self.labelled,
                "right": self.right,
                "undecided": self.undecided_labelled,
                "false_positives": self.false_positives,
                "false_negatives": self.false_negatives,
            });
        }
        object
    }
}

/// Counts, and below them their halves by the field of `--by`.
fn table(all: &Counts, groups: &BTreeMap<String, Counts>, by: Option<&str>) -> String {
    let rows: Vec<(&str, &Counts)> =
        [("all", all)].into_iter().chain(groups.iter().map(|(name, counts)| (name.as_str(), counts))).collect();
    let labelled = all.labelled > 0;
    let mut head = vec![by.unwrap_or(""), "total", "correct", "wrong", "undecided"];
    if labelled {
        head.extend(["right", "false pos.", "false neg.", "right %"]);
    }
    let mut lines: Vec<Vec<String>> = vec![head.into_iter().map(String::from).collect()];
    for (name, counts) in rows {
        let numbers = [counts.total, counts.correct, counts.wrong, counts.undecided];
        let mut line = vec![short(name)];
        line.extend(numbers.map(|number| number.to_string()));
        if labelled {
            let numbers = [counts.right, counts.false_positives, counts.false_negatives];
            line.extend(numbers.map(|number| number.to_string()));
            line.push(match counts.labelled {
                0 => "-".into(),
                labelled => format!("{:.2}", 100.0 * counts.right as f64 / labelled as f64),
            });
        }
        lines.push(line);
    }
    let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let cells = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(at, (cell, width))| if at == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// On one line, and not too long for it.
fn short(text: &str) -> String {
    const MOST: usize = 48;
    let line = screen::printable(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    match line.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}
