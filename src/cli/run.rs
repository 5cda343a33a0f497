//! `pipe run M [STAGE...]`: runs what is stale, then prints tables, verdicts and where pictures lie.
//!
//! What is printed at the end comes from the store and names nothing of this run, so it is the same
//! whether it was computed now or found.

use super::counts::{Counts, Which};
use super::global::{Done, Global, OfManifest, Stop, print, say};
use super::live::{Live, Running};
use super::needs::{DeviceMemory, Look, Machine};
use super::open::with_engine;
use super::sources::Network;
use super::{plan, results};
use crate::report;
use pipe::exec::{Engine, Event, Observer, Options, Outcome, Report, Runner, Survey, Task};
use pipe::manifest::{self, Text};
use pipe::measure;
use pipe::plan::{Cell, CellId, Plan};
use pipe::problem::{Exit, Problem};
use pipe::remote::Remote;
use pipe::stage::{self, Artifact, Context, Device};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Run what is stale and print the tables
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe run pipelines/table1.toml --profile mini\n  \
    pipe run pipelines/table1.toml 'eval[size=3B]' --jobs 4\n  \
    pipe run pipelines/table1.toml --set stage.sft.epochs=1 --keep-going\n  \
    pipe run pipelines/table1.toml --force sft --dry-run")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    /// Stages or cells, `sft` or `sft[size=3B]`, with all they need [default: everything]
    #[arg(value_name = "STAGE")]
    stages: Vec<String>,
    /// Go on with what does not need a stage that failed
    #[arg(long)]
    keep_going: bool,
    /// Run this stage or cell again even if it is fresh; may be given again
    #[arg(long, value_name = "STAGE")]
    force: Vec<String>,
    /// Say what would run, and run nothing
    #[arg(long)]
    dry_run: bool,
    /// Download nothing and ask no endpoint: what is not here is missing
    #[arg(long)]
    offline: bool,
    /// Write a timeline of stages, steps and requests that ui.perfetto.dev opens
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
}

/// Ctrl-C, SIGTERM: the first asks the stages to stop, the second ends the process.
static STOP: AtomicBool = AtomicBool::new(false);

fn catch_interrupts() {
    // Refused only if somebody else caught them before: then there is nothing to add.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            super::logging::end();
            std::process::exit(Exit::Interrupted as i32);
        }
        super::live::above(|stderr| {
            let _ = writeln!(
                stderr,
                "stopping: finished stages are kept, unfinished ones go on next time (again to end at once)"
            );
        });
    });
}

/// The kinds of stage as the engine runs them, and the look at the machine before.
struct Stages<'a> {
    global: &'a Global,
    engine: &'a Engine<'a>,
    live: Arc<Live>,
    device: OnceLock<Device>,
    remote: Remote,
    offline: bool,
}

impl Stages<'_> {
    /// Says what will be asked of endpoints, and what it may cost. What is wrong with one is found right after.
    fn announce(&self, look: &Look) {
        if let Ok(counts) = Counts::new(look, Which::Asking, self.global.on_device(), &self.remote, &|_, _| {}) {
            counts.endpoints.iter().for_each(|asked| self.live.line(&counts.asked_words(asked)));
        }
    }
}

impl Runner for Stages<'_> {
    /// Shapes are looked at before the device is asked for, and all that is missing is told together.
    fn fits(&self, survey: &Survey) -> Vec<Problem> {
        let look = Look::new(self.engine, survey);
        if look.to_run().next().is_none() {
            return Vec::new();
        }
        let mut problems = if self.global.on_device() { look.shape_problems() } else { Vec::new() };
        let device = match self.global.open_device() {
            Err(problem) => {
                problems.push(problem);
                return problems;
            }
            Ok(device) => device,
        };
        let memory = match &device {
            Device::Cpu => None,
            Device::Cuda(gpu) => match gpu.driver().memory() {
                Ok((free, total)) => {
                    Some(Ok(DeviceMemory { name: gpu.driver().name(), total: total as u64, free: Some(free as u64) }))
                }
                Err(problem) => Some(Err(problem)),
            },
        };
        let machine = Machine { host: measure::host_memory(), device: memory };
        let (misfits, warnings) = look.memory_problems(&machine, jobs(self.global));
        problems.extend(misfits);
        warnings.iter().for_each(|warning| self.live.always(&format!("warning: {warning}")));
        if !self.offline {
            self.announce(&look);
        }
        let _ = self.device.set(device);
        problems
    }

    fn ready(&self, cell: &Cell, stop: &AtomicBool) -> Result<(), Problem> {
        stage::ready(cell.kind, &cell.params, &self.remote, stop)
    }

    fn run(&self, cell: &Cell, task: &Task) -> Result<(), Problem> {
        run_stage(self, cell, task)
    }
}

/// The bridge between the engine and the kinds: the only place that knows both.
fn run_stage(with: &Stages, cell: &Cell, task: &Task) -> Result<(), Problem> {
    let mut inputs = BTreeMap::new();
    for (slot, given) in &task.inputs {
        let artifacts = given.iter().map(|input| Artifact {
            stage: input.stage.clone(),
            kind: input.kind,
            axes: input.axes.clone(),
            files: input.files.clone(),
        });
        inputs.insert(slot.clone(), artifacts.collect::<Vec<_>>());
    }
    stage::run(
        cell.kind.name,
        &Context {
            label: task.label,
            params: task.params,
            inputs: &inputs,
            sources: &task.sources,
            out: task.out,
            work: task.work,
            device: with.device.get().cloned().unwrap_or(Device::Cpu),
            remote: &with.remote,
            progress: task.progress,
            stop: task.stop,
        },
    )
}

/// Shows the events of a run.
struct Screen<'a> {
    plan: &'a Plan,
    texts: &'a [Text],
    live: Arc<Live>,
    verbose: bool,
    running: Mutex<HashMap<CellId, Running>>,
    peak_bytes: AtomicU64,
}

impl Screen<'_> {
    fn running(&self) -> MutexGuard<'_, HashMap<CellId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, cell: CellId, tell: impl FnOnce(&Running)) {
        if let Some(running) = self.running().get(&cell) {
            tell(running);
        }
    }

    fn show(&self, event: &Event) {
        let label = |cell: &CellId| self.plan.cells[*cell].to_string();
        match event {
            Event::Begun { fresh, stale, waits, .. } => {
                if stale + waits > 0 {
                    self.live.line(&format!("{} to run, {fresh} fresh", report::count(stale + waits, "stage")));
                }
            }
            Event::Started { cell, reasons, resumes } => {
                let label = label(cell);
                let why = match (self.verbose, resumes) {
                    (true, _) => reasons.iter().map(|reason| format!("\n    {reason}")).collect(),
                    (false, true) => " (goes on from where it was)".to_string(),
                    (false, false) => String::new(),
                };
                match self.verbose {
                    true => self.live.line(&format!("{label}: started{why}")),
                    false => self.live.plain(&format!("{label}: started{why}")),
                }
                self.running().insert(*cell, self.live.stage(&label));
            }
            Event::Work { cell, total, unit } => self.with(*cell, |running| running.begin(*total, unit)),
            Event::At { cell, done } => self.with(*cell, |running| running.at(*done)),
            Event::Note { cell, text } => self.with(*cell, |running| running.note(text)),
            Event::Warned { cell, text } => self.live.always(&format!("warning: {}: {text}", label(cell))),
            Event::WaitsForLock { cell, holder } => {
                self.live.line(&format!("{}: another run is at it ({holder}); its result will be used", label(cell)));
            }
            Event::Damaged { cell, damage } => {
                let problem = pipe::store::damaged(&label(cell), damage);
                self.live.always(&format!("{}\nit is made again", self.words(&problem)));
            }
            Event::Fresh { cell } => {
                if self.verbose {
                    self.live.line(&format!("{}: fresh", label(cell)));
                }
            }
            Event::Ran { cell, wall_s, bytes, differs } => {
                self.running().remove(cell);
                // The engine lets the peak begin anew with a stage, to measure each.
                self.peak_bytes.fetch_max(peak_memory_bytes().unwrap_or(0), Ordering::Relaxed);
                let (took, size) = (report::duration(*wall_s), report::bytes(*bytes));
                self.live.line(&format!("{}: ran in {took}, {size}", label(cell)));
                if *differs {
                    let label = label(cell);
                    self.live.always(&format!(
                        "warning: {label}: an earlier run of the same fingerprint gave other bytes; both are kept, the first is used"
                    ));
                }
            }
            Event::Failed { cell, problem } => {
                self.running().remove(cell);
                self.live.always(&format!("{}: failed\n{}", label(cell), self.words(problem)));
            }
            Event::Skipped { cell, because } => {
                self.live.line(&format!("{}: skipped, because `{}` failed", label(cell), label(because)));
            }
            Event::Interrupted { cell } => {
                self.running().remove(cell);
                self.live.line(&format!("{}: interrupted", label(cell)));
            }
            Event::Ended { .. } => self.running().clear(),
        }
    }

    fn words(&self, problem: &Problem) -> String {
        let texts = |file: &std::path::Path| manifest::text(self.texts, file);
        report::problem(problem, &texts, report::colour(&std::io::stderr()))
    }
}

impl Observer for Screen<'_> {
    fn event(&self, event: &Event) {
        if let Some(object) = pipe::exec::describe(self.plan, event) {
            self.live.event(object);
        }
        self.show(event);
    }
}

/// The largest resident size of this process since it was last made to begin anew; Linux tells.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let live = Arc::new(Live::new(global.quiet, global.json));
    let network = Network::Fetch { live: live.clone(), stop: &STOP, offline: arguments.offline };
    catch_interrupts();
    with_engine(global, &arguments.of.manifest, network, |engine, session| {
        let selection = engine.plan.select(&arguments.stages)?;
        let force = if arguments.force.is_empty() { Vec::new() } else { engine.plan.select(&arguments.force)? };
        let wanted = engine.plan.closure(selection.iter().copied());
        let options = Options {
            jobs: jobs(global),
            keep_going: arguments.keep_going,
            force: force.into_iter().collect(),
            serve: wanted.iter().copied().filter(|id| results::shows(&engine.plan.cells[*id])).collect(),
            dry_run: arguments.dry_run,
        };
        let screen = Screen {
            plan: engine.plan,
            texts: &session.manifest.files,
            live: live.clone(),
            verbose: global.verbose > 0,
            running: Mutex::default(),
            peak_bytes: AtomicU64::new(0),
        };
        let remote = Remote::new(&engine.store.journals()).offline(arguments.offline);
        let offline = arguments.offline;
        let stages = Stages { global, engine, live: live.clone(), device: OnceLock::new(), remote, offline };
        let report = engine.run(&selection, &options, &stages, &screen, &STOP)?;
        if arguments.dry_run {
            return plan::show(global, engine, &report.before, true);
        }
        let artifacts = wanted.iter().filter_map(|id| Some((*id, report.artifact(*id)?.clone()))).collect();
        let folder = results::folder(&global.cache, &arguments.of.manifest, &global.profile);
        let shown = results::collect(engine.plan, engine.store, &artifacts, &folder)?;
        if !report.folder.as_os_str().is_empty() {
            // Beside the events: a note of what was seen. The run is over; want of it harms nothing.
            let _ = std::fs::write(report.folder.join("printed.txt"), results::page(&shown));
        }
        match global.json {
            true => {
                for result in &shown {
                    screen.live.event(json!({
                        "event": "result", "cell": result.cell, "kind": result.kind, "value": result.object,
                    }));
                }
            }
            false => print(&results::page(&shown))?,
        }
        let peak = screen.peak_bytes.load(Ordering::Relaxed).max(peak_memory_bytes().unwrap_or(0));
        let mut said = summary(&report, peak);
        if let Some(Device::Cuda(gpu)) = stages.device.get() {
            said += &format!(", peak on the device {}", report::bytes(gpu.usage().peak as u64));
        }
        say(global, &said);
        report.exit().map_or(Ok(()), |exit| Err(Stop::Code(exit)))
    })
}

/// On a device one at a time: decoding takes all the memory that it finds there.
fn jobs(global: &Global) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = if global.on_device() { 1 } else { 2 };
    global.jobs.map_or(cores.min(most), usize::from)
}

/// `33 ran, 12 fresh, 3m 12s, peak 812 MiB`
fn summary(report: &Report, peak_bytes: u64) -> String {
    let count = |wanted: fn(&Outcome) -> bool| report.outcomes.iter().flatten().filter(|end| wanted(end)).count();
    let counts = [
        (count(|end| matches!(end, Outcome::Ran { .. })), "ran"),
        (count(|end| matches!(end, Outcome::Fresh(_))), "fresh"),
        (count(|end| matches!(end, Outcome::Failed(_))), "failed"),
        (count(|end| matches!(end, Outcome::Interrupted)), "interrupted"),
        (count(|end| matches!(end, Outcome::Skipped { .. } | Outcome::NotStarted)), "not run"),
    ];
    let mut parts: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    parts.push(report::duration(report.wall_s));
    parts.push(format!("peak {}", report::bytes(peak_bytes)));
    parts.join(", ")
}
