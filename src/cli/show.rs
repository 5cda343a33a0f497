//! `pipe show M STAGE`: what a stage yielded: files, parameters, numbers, the end of its log, its transcripts.

use super::found::Found;
use super::global::{Done, Global, OfManifest, print};
use super::open::with_engine;
use super::plan::word;
use super::sources::Network;
use super::transcripts::{self, Browse};
use super::{results, screen};
use crate::report;
use pipe::exec::{Engine, Status};
use pipe::files::Files;
use pipe::plan::CellId;
use pipe::problem::{Exit, Problem};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Show what a stage yielded: artifact, files, parameters, metrics, log tail; and its transcripts
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe show pipelines/table1.toml eval --profile mini\n  \
    pipe show pipelines/table1.toml 'sft[size=3B,data=r1k]' --profile mini\n  \
    pipe show pipelines/table1.toml table1 --json\n  \
    pipe show M.toml 'eval[data=s1k]' --transcripts --verdict wrong\n  \
    pipe show M.toml 'eval[data=s1k]' --id p17 --sample 3\n  \
    pipe show M.toml 'eval[data=s1k]' --against 'eval[data=r1k]'")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    /// A stage or cell, `sft` or `sft[size=3B]`; of several cells each has one line
    #[arg(value_name = "STAGE")]
    stage: String,
    #[command(flatten)]
    browse: Browse,
}

/// Lines shown of logs and transcripts.
const LINES: usize = 3;

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    with_engine(global, &arguments.of.manifest, Network::Never, |engine, _| {
        let found = made(engine, arguments, &arguments.stage)?;
        if let Some(other) = &arguments.browse.against {
            let (other_found, first) = (made(engine, arguments, other)?, transcripts::one(&found, &arguments.stage)?);
            return transcripts::compare(
                global,
                engine,
                [first, transcripts::one(&other_found, other)?],
                &arguments.browse,
            );
        }
        if arguments.browse.asked() {
            return transcripts::show(global, engine, transcripts::one(&found, &arguments.stage)?, &arguments.browse);
        }
        if global.json {
            let objects: Vec<Value> = found.iter().map(|found| object(engine, found)).collect();
            return print(&format!("{:#}\n", json!({ "cells": objects })));
        }
        print(&match found.as_slice() {
            [one] => page(engine, one),
            many => list(engine, many),
        })
    })
}

/// The cells of a name, at least one of which has been made.
fn made(engine: &Engine, arguments: &Arguments, stage: &str) -> Result<Vec<Found>, Problem> {
    let cells = engine.plan.find(stage)?;
    let survey = engine.status(&cells, &BTreeSet::new(), &BTreeSet::new());
    let found: Vec<Found> =
        cells.iter().filter_map(|id| Some(find(engine, *id, survey.statuses[*id].as_ref()?))).collect();
    if found.iter().all(|found| found.record.is_none()) {
        return Err(Problem::new("cli::not_made", format!("nothing of `{stage}` has been made yet"))
            .help(format!("pipe run {} '{stage}'", arguments.of.manifest.display()))
            .exit(Exit::Missing));
    }
    Ok(found)
}

fn find(engine: &Engine, id: CellId, status: &Status) -> Found {
    let cell = &engine.plan.cells[id];
    let label = cell.to_string();
    let fingerprint = match status {
        Status::Fresh { fingerprint, .. } => Some(fingerprint.digest()),
        _ => engine.store.last(&label, cell.kind.name),
    };
    let record = fingerprint.and_then(|fingerprint| engine.store.record(&fingerprint));
    Found { label, state: word(status), record }
}

fn object(engine: &Engine, found: &Found) -> Value {
    let mut object = json!({ "cell": found.label, "status": found.state });
    if let Some(record) = &found.record {
        let files = engine.store.files(&record.artifact);
        object["record"] = Value::Object(record.body());
        object["paths"] =
            files.iter().map(|(name, path)| (name.to_string(), json!(path.display().to_string()))).collect();
        object["metrics"] = Value::Object(metrics(&files));
        object["log"] =
            last_lines(&files).into_iter().map(|line| serde_json::from_str(&line).unwrap_or(json!(line))).collect();
    }
    object
}

/// One line for each cell.
fn list(engine: &Engine, all: &[Found]) -> String {
    let width = all.iter().map(|found| found.label.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for found in all {
        let rest = match &found.record {
            None => "not made yet".to_string(),
            Some(record) => {
                let files = engine.store.files(&record.artifact);
                let numbers: Vec<String> =
                    metrics(&files).iter().take(4).map(|(name, value)| format!("{name} {}", short(value))).collect();
                let took = report::duration(record.measured.wall_s);
                format!("{:>9}  {took:>7}  {}", report::bytes(record.artifact.size()), numbers.join(", "))
            }
        };
        let line = format!("{:5}  {:width$}  {rest}", found.state, found.label);
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Everything about one cell.
fn page(engine: &Engine, found: &Found) -> String {
    let mut text = String::new();
    let Some(record) = &found.record else { return text };
    let files = engine.store.files(&record.artifact);
    let now =
        if found.state == "fresh" { String::new() } else { format!(", {} now: this is what it was last", found.state) };
    let _ = writeln!(text, "{} ({}{now})", found.label, record.kind);
    let _ = writeln!(text, "fingerprint  {}", record.fingerprint.short());
    let _ = writeln!(text, "artifact     {}", record.artifact.digest.short());
    let memory = record
        .measured
        .process_peak_memory_bytes
        .map_or(String::new(), |peak| format!(", peak {}", report::bytes(peak)));
    let _ = writeln!(
        text,
        "made         {} in {}{memory}, by {}",
        record.measured.ended,
        report::duration(record.measured.wall_s),
        record.tool
    );
    let _ = writeln!(text, "\nfiles");
    let width = record.artifact.entries.iter().map(|entry| entry.name.chars().count()).max().unwrap_or(0);
    for entry in &record.artifact.entries {
        let path = files.get(&entry.name).map_or(String::new(), |path| path.display().to_string());
        let _ = writeln!(text, "  {:width$}  {:>9}  {path}", entry.name, report::bytes(entry.size));
    }
    section(&mut text, "parameters", &record.params);
    let sources = record.sources.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    section(&mut text, "sources", &sources);
    if !record.inputs.is_empty() {
        let _ = writeln!(text, "\ninputs");
        for (slot, used) in &record.inputs {
            for used in used {
                let _ = writeln!(text, "  {slot}  {}  {}", used.cell, used.artifact.short());
            }
        }
    }
    section(&mut text, "metrics", &metrics(&files));
    for (title, lines) in [
        ("end of the log", last_lines(&files)),
        ("first transcripts (`--transcripts` lists all)", first_transcripts(&files)),
    ] {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{title}");
            for line in lines {
                let _ = writeln!(text, "  {}", screen::printable(&cut(&line, 400)));
            }
        }
    }
    for warning in &record.warnings {
        let _ = writeln!(text, "\nwarning: {warning}");
    }
    text
}

fn section(text: &mut String, title: &str, map: &Map<String, Value>) {
    if map.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{title}");
    let width = map.keys().map(|key| key.chars().count()).max().unwrap_or(0);
    for (key, value) in map {
        let _ = writeln!(text, "  {key:width$}  {}", short(value));
    }
}

/// Numbers as they are read: floats to six digits, nested values as compact JSON.
fn short(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap_or_default();
            let text = format!("{float:.6}");
            match float == 0.0 || float.abs() >= 1e-3 {
                true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
                false => format!("{float:e}"),
            }
        }
        other => other.to_string(),
    }
}

fn cut(text: &str, length: usize) -> String {
    match text.char_indices().nth(length) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_string(),
    }
}

/// The numbers an artifact is known by: scores, the verdict, or the last measurements.
fn metrics(files: &Files) -> Map<String, Value> {
    for (name, whole) in [("scores.json", true), ("verdict.json", true), ("measurements.jsonl", false)] {
        let Some(path) = files.get(name) else { continue };
        let text = match whole {
            true => std::fs::read_to_string(path).unwrap_or_default(),
            false => results::tail(path, 1).concat(),
        };
        if let Ok(Value::Object(map)) = serde_json::from_str(&text) {
            return map;
        }
    }
    Map::new()
}

fn last_lines(files: &Files) -> Vec<String> {
    files.get("log.jsonl").map_or(Vec::new(), |path| results::tail(path, LINES))
}

fn first_transcripts(files: &Files) -> Vec<String> {
    files.get("transcripts.jsonl").map_or(Vec::new(), |path| results::head(path, LINES))
}
