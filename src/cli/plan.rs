//! `pipe plan M [STAGE...]`: what would run, and why, whether it fits this machine, and what there is to do in numbers.

use super::counts::{Counts, Which};
use super::global::{Done, Global, OfManifest, print, say};
use super::needs::{self, Look, Machine};
use super::open::with_engine;
use super::sources::Network;
use crate::report;
use pipe::exec::{Engine, Reason, Status, Survey};
use pipe::plan::CellId;
use pipe::problem::Problem;
use pipe::remote::Remote;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Say what would run and why, and run nothing
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe plan pipelines/table1.toml --profile mini\n  \
    pipe plan pipelines/table1.toml 'eval[size=3B]' -v\n  \
    pipe plan pipelines/table1.toml --set stage.sft.epochs=1 --json")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    /// Stages or cells, `sft` or `sft[size=3B]`, with all they need [default: everything]
    #[arg(value_name = "STAGE")]
    stages: Vec<String>,
    /// Count nothing: neither rows, tokens and steps nor calls and their cost
    #[arg(long)]
    no_counts: bool,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    with_engine(global, &arguments.of.manifest, Network::Never, |engine, _| {
        let selection = engine.plan.select(&arguments.stages)?;
        let survey = engine.status(&selection, &BTreeSet::new(), &BTreeSet::new());
        show(global, engine, &survey, !arguments.no_counts)
    })
}

/// How long it is silent while data are read.
const SILENCE: Duration = Duration::from_secs(2);

/// Counts, and says how far it is if that takes long.
fn counted<'a>(global: &Global, engine: &Engine, look: &'a Look<'a>) -> Result<Counts<'a>, Problem> {
    let remote = Remote::new(&engine.store.journals()).offline(true);
    let (done, all) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (finished, waits) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let (done, all) = (&done, &all);
        scope.spawn(move || {
            while waits.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                let (done, all) = (done.load(Ordering::Relaxed), report::count(all.load(Ordering::Relaxed), "cell"));
                say(global, &format!("counting: {done} of {all}; `--no-counts` does without"));
            }
        });
        let counts = Counts::new(look, Which::All, global.on_device(), &remote, &|so_far, of| {
            done.store(so_far, Ordering::Relaxed);
            all.store(of, Ordering::Relaxed);
        });
        drop(finished);
        counts
    })
}

/// Fresh cells are counted, and listed under `--verbose`; the others stand with their reason.
pub fn show(global: &Global, engine: &Engine, survey: &Survey, count: bool) -> Done {
    let known = || survey.statuses.iter().enumerate().filter_map(|(id, status)| Some((id, status.as_ref()?)));
    let look = Look::new(engine, survey);
    let machine = Machine::look(global);
    let counts = if count { Some(counted(global, engine, &look)?) } else { None };
    if global.json {
        let cell = |(id, status): (CellId, &Status)| {
            let mut object = object(engine, id, status);
            if !matches!(status, Status::Fresh { .. } | Status::Missing { .. })
                && let Some(memory) = look.object(id, &machine)
            {
                object["memory"] = memory;
            }
            if let Some(work) = counts.as_ref().and_then(|counts| counts.object(id)) {
                object["work"] = work;
            }
            object
        };
        let cells: Vec<Value> = known().map(cell).collect();
        let machine = needs::machine_object(&machine);
        let mut object = json!({ "title": engine.plan.title, "machine": machine, "cells": cells });
        if let Some(counts) = &counts {
            (object["endpoints"], object["total"]) = counts.objects(global);
        }
        print(&format!("{object:#}\n"))?;
    } else {
        let listed = |status: &Status| global.verbose > 0 || !matches!(status, Status::Fresh { .. });
        let labels: Vec<(String, &Status)> = known()
            .filter(|(_, status)| listed(status))
            .map(|(id, status)| (engine.plan.cells[id].to_string(), status))
            .collect();
        let width = labels.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0).min(48);
        let mut text = String::new();
        for (label, status) in labels {
            let line = format!("{:5}  {label:width$}  {}", word(status), short_reason(engine, status));
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let number_of = |wanted: &str| known().filter(|(_, status)| word(status) == wanted).count();
        let mut states = Vec::new();
        for (state, what) in
            [("fresh", "fresh"), ("stale", "would run"), ("waits", "waiting"), ("lacks", "lacking a source")]
        {
            let number = number_of(state);
            if number > 0 {
                states.push(format!("{number} {what}"));
            }
        }
        let _ = writeln!(text, "{}: {}", report::count(known().count(), "cell"), states.join(", "));
        text.push_str(&look.table(&machine, global.verbose > 0));
        text.extend(counts.iter().map(|counts| counts.table(global)));
        print(&text)?;
    }
    let mut problems = survey.problems();
    if machine.device.is_some() {
        problems.extend(look.shape_problems());
    }
    problems.extend(look.memory_problems(&machine, 1).0);
    problems.extend(counts.iter().flat_map(Counts::failing));
    if problems.is_empty() { Ok(()) } else { Err(problems.into()) }
}

/// The state in one word.
pub fn word(status: &Status) -> &'static str {
    match status {
        Status::Fresh { .. } => "fresh",
        Status::Stale { .. } => "stale",
        Status::Waits { .. } => "waits",
        Status::Missing { .. } => "lacks",
    }
}

/// One line: the first reason, and how many more there are.
fn short_reason(engine: &Engine, status: &Status) -> String {
    let first = |all: Vec<String>| match all.len() {
        0 => String::new(),
        1 => all[0].clone(),
        more => format!("{} (and {} more)", all[0], more - 1),
    };
    match status {
        Status::Fresh { .. } => String::new(),
        Status::Stale { reasons, .. } => first(reasons.iter().map(one_line).collect()),
        Status::Waits { on, .. } => {
            format!("for {}", first(on.iter().map(|id| engine.plan.cells[*id].to_string()).collect()))
        }
        Status::Missing { problems } => first(problems.iter().map(|problem| problem.message.clone()).collect()),
    }
}

/// `never run` without its neighbour, which `why` tells.
fn one_line(reason: &Reason) -> String {
    match reason {
        Reason::NeverRun { .. } => "never run".to_string(),
        other => other.to_string(),
    }
}

/// For `--json`.
pub fn object(engine: &Engine, id: CellId, status: &Status) -> Value {
    let names = |cells: &[CellId]| cells.iter().map(|id| engine.plan.cells[*id].to_string()).collect::<Vec<_>>();
    let texts = |reasons: &[Reason]| reasons.iter().map(ToString::to_string).collect::<Vec<_>>();
    let cell = &engine.plan.cells[id];
    let mut object = json!({ "cell": cell.to_string(), "kind": cell.kind.name, "status": word(status) });
    match status {
        Status::Fresh { fingerprint, artifact } => {
            object["fingerprint"] = json!(fingerprint.digest().hex());
            object["artifact"] = json!(artifact.digest.hex());
        }
        Status::Stale { fingerprint, reasons } => {
            object["fingerprint"] = json!(fingerprint.digest().hex());
            object["reasons"] = json!(texts(reasons));
        }
        Status::Waits { on, reasons } => {
            object["on"] = json!(names(on));
            object["reasons"] = json!(texts(reasons));
        }
        Status::Missing { problems } => {
            object["problems"] = problems.iter().map(|p| report::problem_json(p, &report::no_texts)).collect();
        }
    }
    object
}
