//! What every command understands, and what each may come to.

use super::live;
use clap::{Args, ValueEnum};
use pipe::cuda;
use pipe::manifest::Text;
use pipe::plan::Arithmetic;
use pipe::problem::{Exit, Problem};
use pipe::stage;
use std::io::Write;
use std::path::PathBuf;

/// What every command understands.
#[derive(Args)]
pub struct Global {
    /// Where finished stages are kept
    #[arg(long, global = true, value_name = "DIR", default_value = "cache", help_heading = "Everywhere")]
    pub(super) cache: PathBuf,
    /// Lay a profile of the manifest over it; may be given again, later ones win
    #[arg(long, global = true, value_name = "NAME", help_heading = "Everywhere")]
    pub(super) profile: Vec<String>,
    /// Replace one key, for example `stage.sft.epochs=1`; may be given again
    #[arg(long, global = true, value_name = "KEY=VALUE", help_heading = "Everywhere")]
    pub(super) set: Vec<String>,
    /// Where to compute; `auto` is the CPU as long as the CUDA backend has not been proved on a GPU
    #[arg(long, global = true, value_enum, default_value_t = Device::Auto, help_heading = "Everywhere")]
    device: Device,
    /// Stages that run at once [default: 2; 1 on a single core and with `--device cuda`]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Everywhere")]
    pub(super) jobs: Option<u16>,
    /// Write one JSON object, or for `run` one event per line
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(super) json: bool,
    /// Say only results and problems
    #[arg(short, long, global = true, help_heading = "Everywhere")]
    pub(super) quiet: bool,
    /// Say more: fresh stages too; twice: the log
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Everywhere")]
    pub(super) verbose: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
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
    pub(super) manifest: PathBuf,
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

impl From<Vec<Problem>> for Stop {
    fn from(problems: Vec<Problem>) -> Stop {
        Stop::Problems(problems, Vec::new())
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
