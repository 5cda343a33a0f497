//! The command line: what may be typed, and one file per command. Results go to stdout, everything
//! else to stderr; exit codes are [`pipe::problem::Exit`]'s.

mod cache;
mod completions;
mod counts;
mod doctor;
mod export;
mod found;
mod gc;
mod global;
mod grade;
mod graph;
mod live;
mod lm_eval;
mod logging;
mod needs;
mod open;
mod plan;
mod results;
mod run;
mod schema;
pub mod screen;
mod serve;
mod session;
mod show;
mod sources;
mod timeline;
mod transcripts;
mod validate;
mod why;

use crate::report;
use clap::{Parser, Subcommand};
use global::{Done, Global, Stop};
use pipe::manifest::Text;
use pipe::problem::{Exit, Problem};
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;

/// Runs studies that fine-tune language models in several stages, from one manifest.
#[derive(Parser)]
#[command(
    name = "pipe",
    version,
    max_term_width = 100,
    after_help = "Examples:\n  \
        pipe validate pipelines/*.toml\n  \
        pipe run pipelines/table1.toml --profile mini\n  \
        pipe why pipelines/table1.toml 'sft[size=3B,data=r1k]' --profile mini\n\n\
        Exit codes: 0 done; 1 a stage failed or a check did not hold; 2 the manifest or the command line\n\
        is wrong; 3 something needed is missing; 130 interrupted."
)]
struct CommandLine {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Arguments),
    Plan(plan::Arguments),
    Validate(validate::Arguments),
    Why(why::Arguments),
    Graph(graph::Arguments),
    Show(show::Arguments),
    Export(export::Arguments),
    Serve(serve::Arguments),
    Doctor(doctor::Arguments),
    Grade(grade::Arguments),
    Schema(schema::Arguments),
    Cache(cache::Arguments),
    Gc(gc::Arguments),
    Completions(completions::Arguments),
}

pub fn main() -> ExitCode {
    let line = CommandLine::parse();
    let trace = match &line.command {
        Command::Run(arguments) => arguments.trace.as_deref(),
        _ => None,
    };
    let done = logging::start(line.global.verbose, trace).map_err(Stop::from).and_then(|()| dispatch(&line));
    logging::end();
    match done {
        Ok(()) | Err(Stop::NoReader) => ExitCode::SUCCESS,
        Err(Stop::Code(exit)) => ExitCode::from(exit as u8),
        Err(Stop::Problems(problems, texts)) => {
            tell(&line.global, &problems, &texts);
            let exit = problems.iter().map(|problem| problem.exit).max().unwrap_or(Exit::Failed);
            ExitCode::from(exit as u8)
        }
    }
}

fn dispatch(line: &CommandLine) -> Done {
    let global = &line.global;
    match &line.command {
        Command::Run(arguments) => run::run(global, arguments),
        Command::Plan(arguments) => plan::run(global, arguments),
        Command::Validate(arguments) => validate::run(global, arguments),
        Command::Why(arguments) => why::run(global, arguments),
        Command::Graph(arguments) => graph::run(global, arguments),
        Command::Show(arguments) => show::run(global, arguments),
        Command::Export(arguments) => export::run(global, arguments),
        Command::Serve(arguments) => serve::run(global, arguments),
        Command::Doctor(arguments) => doctor::run(global, arguments),
        Command::Grade(arguments) => grade::run(global, arguments),
        Command::Schema(arguments) => schema::run(arguments),
        Command::Cache(arguments) => cache::run(global, arguments),
        Command::Gc(arguments) => gc::run(global, arguments),
        Command::Completions(arguments) => {
            completions::run(arguments, &mut <CommandLine as clap::CommandFactory>::command())
        }
    }
}

/// All problems: to stderr for people, with `--json` as one object to stdout.
fn tell(global: &Global, problems: &[Problem], texts: &[Text]) {
    let text_of = |file: &std::path::Path| pipe::manifest::text(texts, file);
    if global.json {
        let problems: Vec<_> = problems.iter().map(|problem| report::problem_json(problem, &text_of)).collect();
        let line = screen::json_line(&json!({ "event": "problems", "problems": problems }));
        let _ = std::io::stdout().lock().write_all(line.as_bytes());
        return;
    }
    let colour = report::colour(&std::io::stderr());
    let blocks: Vec<String> = problems.iter().map(|problem| report::problem(problem, &text_of, colour)).collect();
    live::above(|stderr| {
        let _ = writeln!(stderr, "{}", blocks.join("\n\n"));
        if problems.len() > 1 {
            let _ = writeln!(stderr, "\n{}", report::count(problems.len(), "problem"));
        }
    });
}
