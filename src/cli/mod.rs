//! The command line: what may be typed, and one file per command. Results go to stdout, everything
//! else to stderr; exit codes are [`pipe::problem::Exit`]'s.

mod cache;
mod completions;
mod counts;
mod doctor;
mod export;
mod gc;
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
use clap::{Args, Parser, Subcommand, ValueEnum};
use pipe::cuda;
use pipe::manifest::Text;
use pipe::plan::Arithmetic;
use pipe::problem::{Exit, Problem};
use pipe::stage;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
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

/// What every command understands.
#[derive(Args)]
pub struct Global {
    /// Where finished stages are kept
    #[arg(long, global = true, value_name = "DIR", default_value = "cache", help_heading = "Everywhere")]
    cache: PathBuf,
    /// Lay a profile of the manifest over it; may be given again, later ones win
    #[arg(long, global = true, value_name = "NAME", help_heading = "Everywhere")]
    profile: Vec<String>,
    /// Replace one key, for example `stage.sft.epochs=1`; may be given again
    #[arg(long, global = true, value_name = "KEY=VALUE", help_heading = "Everywhere")]
    set: Vec<String>,
    /// Where to compute; `auto` is the CPU as long as the CUDA backend has not been proved on a GPU
    #[arg(long, global = true, value_enum, default_value_t = Device::Auto, help_heading = "Everywhere")]
    device: Device,
    /// Stages that run at once [default: 2; 1 on a single core and with `--device cuda`]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Everywhere")]
    jobs: Option<u16>,
    /// Write one JSON object, or for `run` one event per line
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
    /// Say only results and problems
    #[arg(short, long, global = true, help_heading = "Everywhere")]
    quiet: bool,
    /// Say more: fresh stages too; twice: the log
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Everywhere")]
    verbose: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
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

impl Global {
    /// What floats are made by: part of fingerprints, whether the device is there or not.
    pub fn machine(&self) -> Arithmetic<'static> {
        match self.device {
            Device::Auto | Device::Cpu => Arithmetic { backend: "cpu", dtype: "f32" },
            Device::Cuda => Arithmetic { backend: "cuda", dtype: "bf16" },
        }
    }

    /// Whether a CUDA device is to compute.
    pub fn on_device(&self) -> bool {
        self.device == Device::Cuda
    }

    /// The device itself. `Err` (exit 3) says what is missing.
    pub fn open_device(&self) -> Result<stage::Device, Problem> {
        match self.device {
            Device::Auto | Device::Cpu => Ok(stage::Device::Cpu),
            Device::Cuda => cuda::open(0).map(stage::Device::Cuda),
        }
    }
}

/// The manifest a command is about.
#[derive(Args)]
pub struct OfManifest {
    /// The manifest, a TOML file
    #[arg(value_name = "MANIFEST")]
    manifest: PathBuf,
}

/// Why a command ends before its end.
pub enum Stop {
    /// With the texts their excerpts are from.
    Problems(Vec<Problem>, Vec<Text>),
    /// Everything was said; only the exit code is left.
    Code(Exit),
    /// Nobody reads stdout any more: the reader has what it wanted.
    NoReader,
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Stop {
        Stop::Problems(vec![problem], Vec::new())
    }
}

/// What a command comes to.
pub type Done = Result<(), Stop>;

/// Writes a result to stdout.
pub fn print(text: &str) -> Done {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Stop::NoReader),
        Err(error) => Err(Problem::new("cli::stdout", format!("cannot write to standard output: {error}")).into()),
    }
}

/// Writes something that is no result to stderr, unless `--quiet` or `--json`.
pub fn say(global: &Global, text: &str) {
    if !global.quiet && !global.json {
        live::above(|stderr| {
            let _ = writeln!(stderr, "{text}");
        });
    }
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
        Command::Completions(arguments) => completions::run(arguments),
    }
}

/// The clap description of the whole command line, for completions.
fn description() -> clap::Command {
    <CommandLine as clap::CommandFactory>::command()
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
