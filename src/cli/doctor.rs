//! `pipe doctor [M]`: what is wrong or suspicious with the machine, and with a manifest's sources, memory, disk and
//! data, before hours are spent. Looks and changes nothing; asks the network nothing.

use super::global::{Done, Global, Stop, print};
use super::needs::{Fit, Look, Machine, fit, size};
use super::open::with_engine;
use super::sources::Network;
use crate::report;
use pipe::cuda;
use pipe::data::inspect::{inspect, overlap};
use pipe::data::{self, Limits, Overlength, Record, Tokenizer};
use pipe::exec::{Engine, Survey};
use pipe::hub::Settings;
use pipe::measure;
use pipe::plan::{Cell, CellId};
use pipe::problem::{Exit, Problem};
use pipe::stage::StageKind;
use pipe::stage::forecast::needs::Taking;
use pipe::store::Store;
use pipe::tensor::Isa;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Look at the machine, and at a manifest's sources, memory, disk and data
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe doctor\n  \
    pipe doctor --device cuda\n  \
    pipe doctor pipelines/table1.toml --profile mini\n  \
    pipe doctor pipelines/table1.toml --json\n\n\
    Ends with 0 where nothing is missing, warnings or not; with 3 where something is.")]
pub struct Arguments {
    /// A manifest to look at too
    #[arg(value_name = "MANIFEST")]
    manifest: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Ok,
    Warn,
    Fail,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "FAIL",
        }
    }
}

/// One thing looked at.
struct Line {
    /// For programs: `disk`, `memory`, `data`.
    about: &'static str,
    state: State,
    text: String,
    /// What to type next.
    help: Vec<String>,
}

impl Line {
    fn object(&self) -> Value {
        let Line { about, state, text, help } = self;
        json!({ "about": about, "state": state.word(), "text": text, "help": help })
    }
}

#[derive(Default)]
struct Findings(Vec<Line>);

impl Findings {
    fn add(&mut self, about: &'static str, state: State, text: impl Into<String>) {
        self.0.push(Line { about, state, text: text.into(), help: Vec::new() });
    }

    fn advise(&mut self, about: &'static str, state: State, text: impl Into<String>, help: &[&str]) {
        let help = help.iter().map(|help| help.to_string()).collect();
        self.0.push(Line { about, state, text: text.into(), help });
    }

    fn problem(&mut self, about: &'static str, state: State, problem: &Problem) {
        let text = std::iter::once(&problem.message).chain(&problem.notes).cloned().collect::<Vec<_>>().join("\n");
        self.0.push(Line { about, state, text, help: problem.help.clone() });
    }

    fn words(&self) -> String {
        let mut text = String::new();
        for Line { state, text: said, help, .. } in &self.0 {
            let _ = writeln!(text, "{:4}  {}", state.word(), said.replace('\n', "\n      "));
            for help in help {
                let _ = writeln!(text, "      help: {help}");
            }
        }
        let count = |state: State| self.0.iter().filter(|line| line.state == state).count();
        let _ = writeln!(
            text,
            "{} looked at: {}, {} missing or wrong",
            report::count(self.0.len(), "thing"),
            report::count(count(State::Warn), "warning"),
            count(State::Fail)
        );
        text
    }

    fn failed(&self) -> bool {
        self.0.iter().any(|line| line.state == State::Fail)
    }
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let mut findings = Findings::default();
    machine(global, &mut findings);
    network(&mut findings);
    if let Err(problem) = cache(global, &mut findings) {
        // A folder that is no cache of ours: nothing can be said about a manifest's cells in it.
        findings.problem("cache", State::Fail, &problem);
    } else if let Some(path) = &arguments.manifest {
        with_engine(global, path, Network::Never, |engine, _| {
            let cells: Vec<CellId> = (0..engine.plan.cells.len()).collect();
            let survey = engine.status(&cells, &BTreeSet::new(), &BTreeSet::new());
            manifest(global, engine, &survey, &mut findings);
            Ok(())
        })?;
    }
    if global.json {
        let lines: Vec<Value> = findings.0.iter().map(Line::object).collect();
        print(&format!("{:#}\n", json!({ "ok": !findings.failed(), "findings": lines })))?;
    } else {
        print(&findings.words())?;
    }
    if findings.failed() { Err(Stop::Code(Exit::Missing)) } else { Ok(()) }
}

fn machine(global: &Global, findings: &mut Findings) {
    let facts = measure::machine();
    let fact = |name: &str| facts.get(name).map_or("unknown", String::as_str);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::best();
    let text = format!("processor: {}, {}, {}", fact("processor"), report::count(cores, "thread"), isa.name());
    match isa {
        Isa::Portable if cfg!(target_arch = "x86_64") => {
            findings.advise("processor", State::Warn, text, &["a processor with AVX2 is many times faster"]);
        }
        _ => findings.add("processor", State::Ok, text),
    }
    match measure::host_memory() {
        Some(memory) => {
            let (total, free) = (report::bytes(memory.total), report::bytes(memory.available));
            findings.add("memory", State::Ok, format!("memory: {total}, {free} free now"));
        }
        None => findings.add("memory", State::Warn, "memory: the system does not tell how much there is"),
    }
    devices(global, findings);
}

/// The GPUs. Without `--device cuda` none is needed.
fn devices(global: &Global, findings: &mut Findings) {
    let needed = if global.on_device() { State::Fail } else { State::Ok };
    let shown = match cuda::survey() {
        Ok(shown) => shown,
        Err(problem) if needed == State::Fail => return findings.problem("gpu", State::Fail, &problem),
        Err(problem) => {
            return findings.add(
                "gpu",
                State::Ok,
                format!("GPU: none is used, and none could be: {}", problem.message),
            );
        }
    };
    let ((major, minor), driver) = (shown.cuda, shown.driver.as_deref().unwrap_or("of unknown version"));
    findings.add("gpu", State::Ok, format!("GPU driver: {driver}, for CUDA {major}.{minor}"));
    if shown.devices.is_empty() {
        let help = ["`nvidia-smi -L` lists the devices; CUDA_VISIBLE_DEVICES and a container's options hide some"];
        findings.advise("gpu", needed, "GPU: the driver shows no device", &help);
    }
    for (ordinal, device) in shown.devices.iter().enumerate() {
        let memory = match cuda::open(ordinal).and_then(|gpu| gpu.driver().memory()) {
            Ok((free, _)) => format!("{}, {} free now", report::bytes(device.total_bytes), report::bytes(free as u64)),
            Err(problem) => {
                findings.problem("gpu", if ordinal == 0 { needed } else { State::Warn }, &problem);
                continue;
            }
        };
        match &device.kernels {
            Ok(archs) => {
                let how = match archs.iter().any(|arch| arch.starts_with("compute_")) {
                    true => format!("the driver compiles our kernels for it ({})", archs.join(", ")),
                    false => format!("it runs our kernels as they are ({})", archs.join(", ")),
                };
                let text = format!("GPU {ordinal}: {}, capability {}, {memory}; {how}", device.name, device.capability);
                findings.add("gpu", State::Ok, text);
            }
            Err(problem) => findings.problem("gpu", if ordinal == 0 { needed } else { State::Warn }, problem),
        }
    }
}

fn network(findings: &mut Findings) {
    match Settings::from_env() {
        Err(problem) => findings.problem("network", State::Fail, &problem),
        Ok(settings) => {
            let token = if settings.has_token() { "a token is there" } else { "no token: public models and data only" };
            let policy = if settings.offline { "not asked (HF_HUB_OFFLINE)" } else { "asked for what is not here" };
            let text = format!(
                "hub: {} is {policy}; {token}; downloads lie in {}",
                settings.endpoint,
                settings.cache.display()
            );
            findings.add("network", State::Ok, text);
        }
    }
}

/// The cache folder, and room on its disk.
fn cache(global: &Global, findings: &mut Findings) -> Result<(), Problem> {
    let store = Store::open(&global.cache)?;
    let folder = global.cache.display();
    // Made by the first run: until then its parent has to be writable.
    let absolute = std::path::absolute(&global.cache).unwrap_or_else(|_| global.cache.clone());
    let there = absolute.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("."));
    match tempfile::tempfile_in(there) {
        Err(error) => {
            let text = format!("cache: `{}` cannot be written: {error}", there.display());
            findings.advise(
                "cache",
                State::Fail,
                text,
                &["give write permission, or choose another folder with `--cache DIR`"],
            );
        }
        Ok(_) if !global.cache.exists() => findings.add("cache", State::Ok, format!("cache: {folder} will be made")),
        Ok(_) => {
            let stats = store.stats();
            let stages = report::count(stats.records, "finished stage");
            let mut text = format!("cache: {folder}, {stages}, {}", report::bytes(stats.bytes));
            if stats.unfinished > 0 {
                let _ = write!(text, ", {} to resume", stats.unfinished);
            }
            findings.add("cache", State::Ok, text);
            if stats.quarantined > 0 {
                let text = format!("cache: {} in quarantine", report::count(stats.quarantined, "damaged file"));
                findings.advise(
                    "cache",
                    State::Warn,
                    text,
                    &["`pipe cache verify` reads the rest; `pipe gc` drops them"],
                );
            }
        }
    }
    let locks = store.locks();
    for holder in &locks.held {
        findings.add("cache", State::Ok, format!("cache: `{}` is being made by {holder}", holder.what));
    }
    if locks.left > 0 {
        let text =
            format!("cache: {} of a run that was killed; the next run takes over", report::count(locks.left, "lock"));
        findings.add("cache", State::Ok, text);
    }
    match measure::disk_free(&global.cache) {
        Some(free) if free < 1 << 30 => {
            let text = format!("disk: {} free at {folder}", report::bytes(free));
            findings.advise("disk", State::Warn, text, &["`pipe gc` drops what nothing refers to"]);
        }
        Some(free) => findings.add("disk", State::Ok, format!("disk: {} free at {folder}", report::bytes(free))),
        None => {
            findings.add("disk", State::Warn, format!("disk: the system does not tell how much is free at {folder}"))
        }
    }
    Ok(())
}

fn manifest(global: &Global, engine: &Engine, survey: &Survey, findings: &mut Findings) {
    let look = Look::new(engine, survey);
    sources(engine, survey, findings);
    variables(engine, &look, findings);
    let machine = Machine::look(global);
    if machine.device.is_some() {
        look.shape_problems().iter().for_each(|problem| findings.problem("gpu", State::Fail, problem));
    }
    memory(engine, &look, &machine, findings);
    disk(global, &look, findings);
    datasets(engine, &look, findings);
}

/// What the stages take from outside, each source once.
fn sources(engine: &Engine, survey: &Survey, findings: &mut Findings) {
    let mut there: BTreeMap<&str, Option<u64>> = BTreeMap::new();
    for (cell, sources) in engine.plan.cells.iter().zip(&survey.sources) {
        for source in cell.sources.iter().filter(|source| !source.text.starts_with("init:")) {
            if let Some(resolved) = sources.get(&source.key) {
                there.entry(&source.text).or_insert_with(|| size(&resolved.path));
            }
        }
    }
    for (text, size) in there {
        let size = size.map_or(String::new(), |size| format!(", {}", report::bytes(size)));
        findings.add("source", State::Ok, format!("source {text}: here{size}"));
    }
    let offline = Settings::from_env().is_ok_and(|settings| settings.offline);
    for problem in survey.problems() {
        match problem.code {
            "hub::not_here" if !offline => {
                let text = format!("{}: `pipe run` fetches it; its size is known then", problem.message);
                findings.add("source", State::Warn, text);
            }
            _ => findings.problem("source", State::Fail, &problem),
        }
    }
}

/// Variables that programs are promised: keys of services among them.
fn variables(engine: &Engine, look: &Look, findings: &mut Findings) {
    let mut wanted: BTreeMap<String, &Cell> = BTreeMap::new();
    for id in look.to_run() {
        let cell = &engine.plan.cells[id];
        for name in look.kind(id).map_or(Vec::new(), |kind| (kind.variables)(&cell.params)) {
            wanted.entry(name).or_insert(cell);
        }
    }
    for (name, cell) in wanted {
        match std::env::var_os(&name) {
            Some(_) => findings.add("variable", State::Ok, format!("variable {name}: set, for `{cell}`")),
            None => {
                let text = format!("variable {name}: not set, and `{cell}` passes it on");
                findings.advise("variable", State::Fail, text, &[&format!("export {name}=...")]);
            }
        }
    }
}

/// The memory of what would run, the largest cell of each stage.
fn memory(engine: &Engine, look: &Look, machine: &Machine, findings: &mut Findings) {
    let (problems, _) = look.memory_problems(machine, 1);
    problems.iter().for_each(|problem| findings.problem("memory", State::Fail, problem));
    let mut stages: BTreeMap<&str, (u64, Line)> = BTreeMap::new();
    for row in look.rows(machine.device.is_some()) {
        let cell = &engine.plan.cells[row.cell];
        let (size, state, words) = match &row.needs {
            Err(until) => (0, State::Ok, format!("unknown until `{}` is made", engine.plan.cells[*until])),
            Ok(needs) => {
                let fit = fit(needs, machine);
                if fit == Fit::No {
                    continue;
                }
                let state = if fit == Fit::Fits { State::Ok } else { State::Warn };
                let words = format!("{}: {}", super::needs::bounded(needs), fit.words());
                (needs.most.host.saturating_add(needs.most.device), state, words)
            }
        };
        let line = Line { about: "memory", state, text: format!("memory of {cell}: {words}"), help: Vec::new() };
        let entry = stages.entry(&cell.stage).or_insert_with(|| (size, Line { text: line.text.clone(), ..line }));
        if entry.0 < size {
            *entry =
                (size, Line { about: "memory", state, text: format!("memory of {cell}: {words}"), help: Vec::new() });
        }
    }
    findings.0.extend(stages.into_values().map(|(_, line)| line));
}

/// What models and trained weights will take in the cache, where it can be known.
fn disk(global: &Global, look: &Look, findings: &mut Findings) {
    let (needed, unknown) = look.disk(global.on_device());
    if needed == 0 && unknown == 0 {
        return;
    }
    let rest =
        if unknown > 0 { format!(" and what {} need", report::count(unknown, "other cell")) } else { String::new() };
    let text = format!("disk: models, adapters and states of this manifest take about {}{rest}", report::bytes(needed));
    match measure::disk_free(&global.cache) {
        Some(free) if needed > free => {
            let help = ["`pipe gc` drops what nothing refers to", "`--cache DIR` on a larger disk"];
            findings.advise("disk", State::Fail, format!("{text}, and {} are free", report::bytes(free)), &help);
        }
        _ => findings.add("disk", State::Ok, text),
    }
}

/// The data doctor: records that are there, as the stages that take them see them.
fn datasets(engine: &Engine, look: &Look, findings: &mut Findings) {
    let mut all: BTreeMap<CellId, Vec<Record>> = BTreeMap::new();
    let mut waiting = 0;
    for id in 0..engine.plan.cells.len() {
        if !look.kind(id).is_some_and(StageKind::makes_records) {
            continue;
        }
        let files = look.files(id);
        match files.as_ref().and_then(|files| files.get("data.jsonl")).map(data::read_records) {
            Some(Ok(records)) => {
                let _ = all.insert(id, records);
            }
            Some(Err(problem)) => findings.problem("data", State::Fail, &problem),
            None => waiting += 1,
        }
    }
    for (id, records) in &all {
        let found = inspect(records);
        let mut odd = Vec::new();
        if found.duplicates > 0 {
            odd.push(format!("{} that say the same as another", found.duplicates));
        }
        odd.extend(found.empty.iter().map(|(field, count)| format!("{count} with an empty `{field}`")));
        let text = format!("data of {}: {}", engine.plan.cells[*id], report::count(found.records, "record"));
        match odd.as_slice() {
            [] => findings.add("data", State::Ok, text),
            odd => findings.add("data", State::Warn, format!("{text}, {}", odd.join(", "))),
        }
    }
    if waiting > 0 {
        let text = format!("data: {} not made yet; ask again when they are", report::count(waiting, "dataset"));
        findings.add("data", State::Ok, text);
    }
    lengths(engine, look, &all, findings);
    contamination(engine, look, &all, findings);
}

/// Examples that are longer than the stage that takes them allows, each kind of look once.
fn lengths(engine: &Engine, look: &Look, all: &BTreeMap<CellId, Vec<Record>>, findings: &mut Findings) {
    let mut said = BTreeSet::new();
    let mut tokenizers: BTreeMap<CellId, Option<Tokenizer>> = BTreeMap::new();
    for (id, cell) in engine.plan.cells.iter().enumerate() {
        let Some(taking) = look.forecast(id).and_then(|forecast| forecast.computes().takes()) else { continue };
        let (Some(data), Some(base)) = (look.data_of(id), look.input(id, "model").first()) else { continue };
        let Some(records) = all.get(&data) else { continue };
        let Taking { format, eos, max_tokens: limit, on_overlength, allow_unlearned } = taking;
        if !said.insert((cell.stage.clone(), data, *base, limit)) {
            continue;
        }
        let tokenizer = tokenizers.entry(*base).or_insert_with(|| Tokenizer::load(&look.tokenizer_files(*base)?).ok());
        let Some(tokenizer) = tokenizer else { continue };
        let limits = Limits { eos, allow_unlearned, ..Limits::default() };
        let lengths = match records.first().is_some_and(data::is_preference) {
            true => data::pairs(records, tokenizer, format, &limits).map(|(pairs, _)| {
                pairs.iter().map(|pair| pair.chosen.ids.len().max(pair.rejected.ids.len())).collect::<Vec<_>>()
            }),
            false => data::samples(records, tokenizer, format, &limits)
                .map(|(samples, _)| samples.iter().map(|sample| sample.ids.len()).collect()),
        };
        let data = &engine.plan.cells[data];
        match lengths {
            Err(problem) => {
                findings.add("data", State::Fail, format!("data of {data}, as `{cell}` takes it: {}", problem.message));
                if let Some(line) = findings.0.last_mut() {
                    line.text.extend(problem.notes.iter().take(3).map(|note| format!("\n{note}")));
                    line.help = problem.help.clone();
                }
            }
            Ok(lengths) => {
                let (longest, over) =
                    (lengths.iter().max().copied().unwrap_or(0), lengths.iter().filter(|l| **l > limit).count());
                let text =
                    format!("data of {data}, as `{cell}` takes it: longest {longest} tokens, `max_tokens` is {limit}");
                match (over, on_overlength) {
                    (0, _) => findings.add("data", State::Ok, text),
                    (over, Overlength::Error) => {
                        let (first, second) =
                            (format!("max_tokens = {longest}"), "on_overlength = \"drop\" or \"truncate\"");
                        findings.advise(
                            "data",
                            State::Fail,
                            format!("{text}, and {over} are longer"),
                            &[&first, second],
                        );
                    }
                    (over, how) => {
                        let how = if how == Overlength::Drop { "dropped" } else { "cut" };
                        findings.add("data", State::Warn, format!("{text}, and {over} are longer and will be {how}"));
                    }
                }
            }
        }
    }
}

/// Tasks that have questions or answers in common with what some stage trains on.
fn contamination(engine: &Engine, look: &Look, all: &BTreeMap<CellId, Vec<Record>>, findings: &mut Findings) {
    let (mut trained, mut asked) = (BTreeSet::new(), BTreeSet::new());
    for id in 0..engine.plan.cells.len() {
        match look.kind(id) {
            Some(kind) if kind.trains() => trained.extend(look.data_of(id)),
            Some(kind) if kind.scores() => asked.extend(look.data_of(id)),
            _ => {}
        }
    }
    let mut clean = 0;
    for task in &asked {
        for data in &trained {
            let (Some(training), Some(records)) = (all.get(data), all.get(task)) else { continue };
            let found = overlap(training, records);
            let Some((one, other)) = found.first else {
                clean += 1;
                continue;
            };
            let (data, task) = (&engine.plan.cells[*data], &engine.plan.cells[*task]);
            let text = format!(
                "data of {data} and task {task}: {} and {} in common, `{one}` and `{other}` first",
                report::count(found.prompts, "question"),
                report::count(found.answers, "answer")
            );
            findings.advise(
                "data",
                State::Warn,
                text,
                &[&format!(
                    "`not_in = {{ dataset = \"{}\", by = \"prompt\" }}` in [stage.{}] leaves them out",
                    task.stage, data.stage
                )],
            );
        }
    }
    if clean > 0 {
        let text = format!(
            "data: no question or answer in common in {} of training data and task",
            report::count(clean, "pair")
        );
        findings.add("data", State::Ok, text);
    }
}
