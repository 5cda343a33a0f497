//! `pipe validate M...`: every problem of every manifest, without touching anything but their text.

use super::global::{Done, Global, Stop, print};
use super::session;
use crate::report;
use clap::ValueEnum;
use pipe::manifest;
use pipe::problem::Exit;
use serde_json::json;
use std::path::PathBuf;

/// Find every problem of manifests; touches no network, no weights, no cache
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe validate pipelines/*.toml\n  \
    pipe validate pipelines/table1.toml --profile mini\n  \
    pipe validate pipelines/*.toml --format github")]
pub struct Arguments {
    /// Manifests, TOML files
    #[arg(required = true, value_name = "MANIFEST")]
    manifests: Vec<PathBuf>,
    /// For people, programs, or annotations of a pull request
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Human,
    Json,
    Github,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let format = if global.json { Format::Json } else { arguments.format };
    let (mut out, mut all, mut blocks, mut found, mut shared) = (String::new(), Vec::new(), Vec::new(), 0, Vec::new());
    for path in &arguments.manifests {
        let (counts, problems, texts) = match session::load(global, path) {
            Ok(session) => (Some((session.manifest.stages.len(), session.plan.cells.len())), Vec::new(), Vec::new()),
            Err(session::Broken { problems, texts }) => (None, problems, texts),
        };
        // What stands in a file that several manifests include is said once.
        let problems: Vec<_> = problems.into_iter().filter(|problem| !shared.contains(problem)).collect();
        let text_of = |file: &std::path::Path| manifest::text(&texts, file);
        found += problems.len();
        match format {
            Format::Human => {
                let colour = report::colour(&std::io::stderr());
                blocks.extend(problems.iter().map(|problem| report::problem(problem, &text_of, colour)));
                if let Some((stages, cells)) = counts {
                    let (stages, cells) = (report::count(stages, "stage"), report::count(cells, "cell"));
                    out.push_str(&format!("{}: {stages}, {cells}, no problem\n", path.display()));
                }
            }
            Format::Github => {
                for problem in &problems {
                    out.push_str(&report::problem_github(problem, &text_of));
                    out.push('\n');
                }
            }
            Format::Json => all.push(json!({
                "manifest": path.display().to_string(),
                "stages": counts.map(|(stages, _)| stages),
                "cells": counts.map(|(_, cells)| cells),
                "problems": problems.iter().map(|problem| report::problem_json(problem, &text_of)).collect::<Vec<_>>(),
            })),
        }
        shared.extend(problems);
    }
    if format == Format::Json {
        out = format!("{:#}\n", json!({ "problems": found, "manifests": all }));
    }
    print(&out)?;
    if !blocks.is_empty() {
        super::live::above(|stderr| {
            let _ = writeln!(stderr, "{}\n\n{}", blocks.join("\n\n"), report::count(found, "problem"));
        });
    }
    if found > 0 { Err(Stop::Code(Exit::Usage)) } else { Ok(()) }
}
