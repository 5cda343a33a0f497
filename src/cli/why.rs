//! `pipe why M STAGE`: why a cell is fresh or stale, with values, down to the root causes.

use super::global::{Done, Global, OfManifest, print};
use super::open::with_engine;
use super::plan::{object, word};
use super::sources::Network;
use pipe::exec::{Engine, Reason, Status, Survey, causes};
use pipe::plan::CellId;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Say why a stage is fresh or stale
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe why pipelines/table1.toml sft --profile mini\n  \
    pipe why pipelines/table1.toml 'eval[size=3B,data=r1k,task=aime24]' --set stage.sft.learning_rate=1e-4")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    /// A stage or cell, `sft` or `sft[size=3B]`
    #[arg(value_name = "STAGE")]
    stage: String,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    with_engine(global, &arguments.of.manifest, Network::Never, |engine, _| {
        let cells = engine.plan.find(&arguments.stage)?;
        let survey = engine.status(&cells, &BTreeSet::new(), &cells.iter().copied().collect());
        let explained = cells.iter().filter_map(|id| Some((*id, survey.statuses[*id].as_ref()?)));
        if global.json {
            let objects: Vec<Value> = explained.map(|(id, status)| with_causes(engine, &survey, id, status)).collect();
            print(&format!("{:#}\n", json!({ "cells": objects })))?;
        } else {
            let mut text = String::new();
            for (id, status) in explained {
                explain(&mut text, engine, &survey, id, status);
            }
            print(&text)?;
        }
        let problems = survey.problems();
        if problems.is_empty() { Ok(()) } else { Err(problems.into()) }
    })
}

fn with_causes(engine: &Engine, survey: &Survey, id: CellId, status: &Status) -> Value {
    let mut explained = object(engine, id, status);
    if let Status::Waits { .. } = status {
        let roots = causes(engine.plan, &survey.statuses, id);
        explained["causes"] =
            roots.into_iter().filter_map(|root| Some(object(engine, root, survey.statuses[root].as_ref()?))).collect();
    }
    explained
}

fn explain(text: &mut String, engine: &Engine, survey: &Survey, id: CellId, status: &Status) {
    let cell = &engine.plan.cells[id];
    let _ = match status {
        Status::Fresh { fingerprint, .. } => {
            let digest = fingerprint.digest();
            let made = engine.store.record(&digest).map_or(String::new(), |record| {
                let as_other =
                    if record.cell == cell.to_string() { String::new() } else { format!(" as {}", record.cell) };
                format!(", made {}{as_other}", record.measured.ended)
            });
            writeln!(text, "{cell} is fresh: fingerprint {} is known{made}", digest.short())
        }
        Status::Stale { reasons, .. } => {
            let _ = writeln!(text, "{cell} is stale:");
            lines(text, reasons);
            Ok(())
        }
        Status::Waits { reasons, .. } => {
            let roots = causes(engine.plan, &survey.statuses, id);
            let _ = writeln!(text, "{cell} waits: what it needs is not there yet");
            if !reasons.is_empty() {
                let _ = writeln!(text, "  it differs itself:");
                lines(text, reasons);
            }
            for (cells, words) in alike(engine, survey, roots) {
                let _ = write!(text, "  {cells}{words}");
            }
            Ok(())
        }
        Status::Missing { problems } => {
            let _ = writeln!(text, "{cell} lacks a source:");
            for problem in problems {
                let _ = writeln!(text, "    {}", problem.message);
            }
            Ok(())
        }
    };
}

/// Root causes in words, those that say the same together: a changed key makes many cells stale.
fn alike(engine: &Engine, survey: &Survey, roots: BTreeSet<CellId>) -> Vec<(String, String)> {
    let mut groups: Vec<(String, Vec<CellId>)> = Vec::new();
    for root in roots {
        let Some(status) = &survey.statuses[root] else { continue };
        let mut words = format!(" {}:\n", is(status));
        match status {
            Status::Stale { reasons, .. } => lines(&mut words, reasons),
            Status::Missing { problems } => {
                for problem in problems {
                    let _ = writeln!(words, "    {}", problem.message);
                }
            }
            Status::Fresh { .. } | Status::Waits { .. } => {}
        }
        match groups.iter_mut().find(|(known, _)| *known == words) {
            Some((_, cells)) => cells.push(root),
            None => groups.push((words, vec![root])),
        }
    }
    let name = |cells: &[CellId]| match cells {
        [] => String::new(),
        [one] => engine.plan.cells[*one].to_string(),
        [first, more @ ..] => format!("{} (and {} more alike)", engine.plan.cells[*first], more.len()),
    };
    groups.into_iter().map(|(words, cells)| (name(&cells), words)).collect()
}

fn is(status: &Status) -> String {
    match word(status) {
        "lacks" => "lacks a source".to_string(),
        word => format!("is {word}"),
    }
}

/// A new cell is compared with the one that differs least, part by part.
fn lines(text: &mut String, reasons: &[Reason]) {
    for reason in reasons {
        let _ = match reason {
            Reason::NeverRun { nearest: Some((cell, changes)) } if !changes.is_empty() => {
                let _ = writeln!(text, "    never run; nearest is {cell}, which differs in");
                for change in changes {
                    let _ = writeln!(text, "      {}", Reason::Changed(change.clone()));
                }
                Ok(())
            }
            other => writeln!(text, "    {other}"),
        };
    }
}
