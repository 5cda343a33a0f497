//! What the cells of a plan need of this machine, where it can be known before they run, and whether it is there.

use super::global::Global;
use crate::report;
use pipe::cuda;
use pipe::exec::{Engine, Status, Survey};
use pipe::files::Files;
use pipe::measure::{HostMemory, host_memory};
use pipe::model::lora::is_adapter;
use pipe::model::memory::{Line, Need, kernels_count, kernels_fit};
use pipe::model::{Config, LoraSpec};
use pipe::plan::{Cell, CellId};
use pipe::problem::{Exit, Problem};
use pipe::stage::forecast::needs::{Computes, Data, Needs, Shape};
use pipe::stage::{self, Forecast, StageKind};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::Path;

/// Memory of the device: in all, and free if somebody looked.
#[derive(Clone)]
pub struct DeviceMemory {
    pub name: String,
    pub total: u64,
    pub free: Option<u64>,
}

/// What there is.
pub struct Machine {
    pub host: Option<HostMemory>,
    /// `None` where the CPU computes; `Err` where there is no device.
    pub device: Option<Result<DeviceMemory, Problem>>,
}

impl Machine {
    /// Looks without taking up a device.
    pub fn look(global: &Global) -> Machine {
        let device = global.on_device().then(|| {
            let first = cuda::survey()?.devices.into_iter().next();
            let none = || Problem::new("cuda::no_device", "the CUDA driver shows no device").exit(Exit::Missing);
            let facts = first.ok_or_else(none)?;
            Ok(DeviceMemory { name: facts.name, total: facts.total_bytes, free: None })
        });
        Machine { host: host_memory(), device }
    }

    fn on_device(&self) -> bool {
        self.device.is_some()
    }

    fn device(&self) -> Option<&DeviceMemory> {
        self.device.as_ref()?.as_ref().ok()
    }
}

/// Whether a need is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fit {
    Fits,
    /// It does, once others give back what they hold.
    NotNow,
    /// Not if examples are as long as the keys let them be.
    Perhaps,
    No,
}

impl Fit {
    pub fn words(self) -> &'static str {
        match self {
            Fit::Fits => "fits",
            Fit::NotNow => "more than is free now",
            Fit::Perhaps => "may not fit, if the data are as long as `max_tokens` lets them be",
            Fit::No => "does not fit",
        }
    }
}

/// One cell that computes with a model and would run.
pub struct Row {
    pub cell: CellId,
    /// `Err`: unknown until that cell is made.
    pub needs: Result<Needs, CellId>,
}

/// The cells of a survey that would run, and what is known of their models and data.
pub struct Look<'a> {
    engine: &'a Engine<'a>,
    survey: &'a Survey,
    configs: RefCell<HashMap<CellId, Option<Config>>>,
    data: RefCell<HashMap<CellId, Option<Data>>>,
    needs: RefCell<HashMap<(CellId, bool), Result<Needs, CellId>>>,
}

impl<'a> Look<'a> {
    pub fn new(engine: &'a Engine<'a>, survey: &'a Survey) -> Look<'a> {
        Look { engine, survey, configs: RefCell::default(), data: RefCell::default(), needs: RefCell::default() }
    }

    pub fn cell(&self, id: CellId) -> &'a Cell {
        &self.engine.plan.cells[id]
    }

    /// The files of a cell that is fresh.
    pub fn files(&self, id: CellId) -> Option<Files> {
        match self.survey.statuses[id].as_ref()? {
            Status::Fresh { artifact, .. } => Some(self.engine.store.files(artifact)),
            _ => None,
        }
    }

    /// Cells that would run.
    pub fn to_run(&self) -> impl Iterator<Item = CellId> + '_ {
        let would = |status: &Option<Status>| matches!(status, Some(Status::Stale { .. } | Status::Waits { .. }));
        self.survey.statuses.iter().enumerate().filter(move |(_, status)| would(status)).map(|(id, _)| id)
    }

    /// All that is said of a cell's kind.
    pub fn kind(&self, id: CellId) -> Option<&'static StageKind> {
        stage::find(self.cell(id).kind.name)
    }

    /// What can be known of a cell's work.
    pub fn forecast(&self, id: CellId) -> Option<Forecast> {
        (self.kind(id)?.forecast)(&self.cell(id).params)
    }

    /// Whether a cell computes with a model on this machine.
    fn computes(&self, id: CellId) -> bool {
        !self.input(id, "model").is_empty() && self.forecast(id).is_some()
    }

    /// The cell of the records that a cell works through.
    pub fn data_of(&self, id: CellId) -> Option<CellId> {
        self.input(id, self.kind(id)?.data?).last().copied()
    }

    /// What those of them need that compute with a model.
    pub fn rows(&self, on_device: bool) -> Vec<Row> {
        let computing = self.to_run().filter(|id| self.computes(*id));
        computing.map(|cell| Row { cell, needs: self.needs(cell, on_device) }).collect()
    }

    pub fn needs(&self, id: CellId, on_device: bool) -> Result<Needs, CellId> {
        if let Some(known) = self.needs.borrow().get(&(id, on_device)) {
            return known.clone();
        }
        let needs = self.reckoned(id, on_device);
        self.needs.borrow_mut().insert((id, on_device), needs.clone());
        needs
    }

    fn reckoned(&self, id: CellId, on_device: bool) -> Result<Needs, CellId> {
        let judge = self.judge_needs(id, on_device).transpose()?;
        match judge {
            Some(judge) if self.input(id, "model").is_empty() => return Ok(judge),
            _ => {}
        }
        let shape = self.shape(id)?;
        let data = self.data_of(id).and_then(|data| self.data(data));
        let needs = self.forecast(id).ok_or(id)?.computes().needs(&shape, data, on_device);
        // The judge is loaded when the model that answers is gone.
        let all = |needs: &Needs| needs.most.host + needs.most.device;
        Ok(judge.filter(|judge| all(judge) > all(&needs)).unwrap_or(needs))
    }

    /// What the judge of an evaluation needs, if it is a model of this machine.
    fn judge_needs(&self, id: CellId, on_device: bool) -> Option<Result<Needs, CellId>> {
        if self.input(id, "judge.model").is_empty() {
            return None;
        }
        let Some(Forecast::Completing(completing)) = self.forecast(id) else { return None };
        let judge = completing.judge?;
        let data = self.data_of(id).and_then(|data| self.data(data));
        Some(self.shape_in(id, "judge.model").map(|shape| judge.needs(&shape, data, on_device)))
    }

    /// The cells of a slot.
    pub fn input(&self, id: CellId, slot: &str) -> &'a [CellId] {
        let found = self.cell(id).inputs.iter().find(|input| input.slot == slot);
        found.map_or(&[], |input| input.cells.as_slice())
    }

    /// How much data a cell holds, if it is made.
    pub fn data(&self, id: CellId) -> Option<Data> {
        if let Some(known) = self.data.borrow().get(&id) {
            return *known;
        }
        let data = self.files(id).and_then(|files| Data::of(&files));
        self.data.borrow_mut().insert(id, data);
        data
    }

    /// The model that a cell is given. `Err`: the cell that has to be made before that can be known.
    pub fn shape(&self, id: CellId) -> Result<Shape, CellId> {
        self.shape_in(id, "model")
    }

    fn shape_in(&self, id: CellId, slot: &str) -> Result<Shape, CellId> {
        let chain = self.input(id, slot);
        let (base, rest) = chain.split_first().ok_or(id)?;
        let config = self.config(*base).ok_or(*base)?;
        let adapters = rest.iter().map(|id| self.adapter(*id).ok_or(*id)).collect::<Result<_, _>>()?;
        Ok(Shape { config, adapters })
    }

    fn config(&self, id: CellId) -> Option<Config> {
        if let Some(known) = self.configs.borrow().get(&id) {
            return known.clone();
        }
        let cell = self.cell(id);
        let fresh = self.files(id).and_then(|files| Config::load(&files).ok());
        let config = fresh.or_else(|| {
            let kind = self.kind(id)?;
            match kind.yields_whole(&cell.params) {
                true => Some(self.shape(id).ok()?.whole()),
                false => (kind.config)(&cell.params, self.source(id, "source"), self.source(id, "tokenizer"))?.ok(),
            }
        });
        self.configs.borrow_mut().insert(id, config.clone());
        config
    }

    fn adapter(&self, id: CellId) -> Option<LoraSpec> {
        let cell = self.cell(id);
        (self.kind(id)?.adapter)(&cell.params, self.source(id, "source")).or_else(|| {
            let files = self.files(id).filter(is_adapter)?;
            LoraSpec::read(files.get(pipe::model::lora::ADAPTER_CONFIG)?).ok()
        })
    }

    /// The folder that a source came to.
    pub fn source(&self, id: CellId, key: &str) -> Option<&'a Path> {
        let resolved = self.survey.sources[id].get(key)?;
        (!resolved.path.as_os_str().is_empty()).then_some(resolved.path.as_path())
    }

    /// The files of a base model's tokenizer, whether the model is made or not.
    pub fn tokenizer_files(&self, base: CellId) -> Option<Files> {
        let folder = || Files::from_dir(self.source(base, "tokenizer").or_else(|| self.source(base, "source"))?).ok();
        self.files(base).or_else(folder)
    }

    /// Bytes that models and trained weights will take in the cache, and how many cells it is not known of.
    pub fn disk(&self, on_device: bool) -> (u64, usize) {
        let (mut needed, mut unknown) = (0u64, 0);
        for id in self.to_run() {
            let bytes = match self.kind(id) {
                Some(kind) if kind.trains() => self.needs(id, on_device).ok().map(|needs| needs.disk),
                Some(kind) if kind.makes_model() => self.source(id, "source").map_or(Some(0), size),
                _ => Some(0),
            };
            match bytes {
                Some(bytes) => needed = needed.saturating_add(bytes),
                None => unknown += 1,
            }
        }
        (needed, unknown)
    }

    /// Models that no kernel of a device takes, a problem for each stage that computes with one.
    pub fn shape_problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = Vec::new();
        let mut said: Vec<(&str, usize)> = Vec::new();
        for id in self.to_run().filter(|id| self.computes(*id)) {
            let cell = self.cell(id);
            let Ok(shape) = self.shape(id) else { continue };
            let tokens = self.needs(id, true).map_or(0, |needs| needs.surely.tokens);
            if let Err(mut problem) = kernels_fit(&shape.config).and(kernels_count(&shape.config, tokens)) {
                if said.contains(&(cell.stage.as_str(), shape.config.head_dim)) {
                    continue;
                }
                said.push((&cell.stage, shape.config.head_dim));
                problem.message = format!("`{cell}` cannot run on a CUDA device: {}", problem.message);
                let problem = problem.at_span(&cell.file, cell.span.clone(), "").exit(Exit::Missing);
                problems.push(problem.help("run on the CPU: `--device cpu`"));
            }
        }
        problems
    }

    /// Cells that certainly do not fit, the largest of each stage as a problem, and what is merely doubtful as a
    /// warning. `jobs`: how many may run at once.
    pub fn memory_problems(&self, machine: &Machine, jobs: usize) -> (Vec<Problem>, Vec<String>) {
        let rows = self.rows(machine.on_device());
        let (mut problems, mut warnings) = (BTreeMap::new(), BTreeMap::new());
        for row in &rows {
            let Ok(needs) = &row.needs else { continue };
            let cell = self.cell(row.cell);
            let size = needs.most.host.saturating_add(needs.most.device);
            let of_stage = match fit(needs, machine) {
                Fit::Fits => continue,
                Fit::No => problems.entry(cell.stage.as_str()),
                _ => warnings.entry(cell.stage.as_str()),
            };
            let largest = of_stage.or_insert((size, row.cell, needs));
            if largest.0 < size {
                *largest = (size, row.cell, needs);
            }
        }
        let problem = |(_, id, needs): (u64, CellId, &Needs)| misfit(self.cell(id), needs, machine);
        let problems: Vec<Problem> = problems.into_values().map(problem).collect();
        let warning = |(_, id, needs): (u64, CellId, &Needs)| {
            let words = fit(needs, machine).words();
            format!("{} needs {}: {words}", self.cell(id), bounded(needs))
        };
        let mut warnings: Vec<String> = warnings.into_values().map(warning).collect();
        if problems.is_empty() && warnings.is_empty() {
            warnings.extend(together(&rows, machine, jobs));
        }
        (problems, warnings)
    }

    /// For `plan`: what is needed beside what there is, cells that need the same in one line. Empty if nothing
    /// that would run computes with a model.
    pub fn table(&self, machine: &Machine, verbose: bool) -> String {
        let rows = self.rows(machine.on_device());
        if rows.is_empty() {
            return String::new();
        }
        let mut text = format!("\nmemory: {}\n", there(machine));
        let mut groups: Vec<(String, Vec<CellId>, Option<&Needs>)> = Vec::new();
        for row in &rows {
            let words = match &row.needs {
                Ok(needs) => format!("{}: {}", bounded(needs), fit(needs, machine).words()),
                Err(until) => format!("unknown until `{}` is made", self.cell(*until)),
            };
            let stage = &self.cell(row.cell).stage;
            let alike =
                groups.iter_mut().find(|(known, cells, _)| *known == words && self.cell(cells[0]).stage == *stage);
            match alike {
                Some((_, cells, _)) => cells.push(row.cell),
                None => groups.push((words, vec![row.cell], row.needs.as_ref().ok())),
            }
        }
        let name = |cells: &[CellId]| match cells {
            [one] => self.cell(*one).to_string(),
            many => format!("{} ({} cells)", self.cell(many[0]).stage, many.len()),
        };
        let width = groups.iter().map(|(_, cells, _)| name(cells).chars().count()).max().unwrap_or(0).min(48);
        for (words, cells, needs) in &groups {
            let _ = writeln!(text, "  {:width$}  {words}", name(cells));
            if let Some(needs) = needs.filter(|_| verbose) {
                needs.most.table().lines().for_each(|line| {
                    let _ = writeln!(text, "      {line}");
                });
            }
        }
        text
    }

    /// For `--json`: what a cell needs, if it computes with a model.
    pub fn object(&self, id: CellId, machine: &Machine) -> Option<Value> {
        if !self.computes(id) {
            return None;
        }
        Some(match self.needs(id, machine.on_device()) {
            Err(until) => json!({ "unknown_until": self.cell(until).to_string() }),
            Ok(needs) => {
                let sums = |need: &Need| json!({ "host": need.host, "device": need.device });
                json!({
                    "surely": sums(&needs.surely), "at_most": sums(&needs.most), "takes_more": needs.takes_more,
                    "parts": needs.most.lines.iter().map(part_object).collect::<Vec<_>>(),
                    "fits": fit(&needs, machine) < Fit::No, "steps": needs.steps,
                })
            }
        })
    }
}

/// Bytes of a file or of all files of a folder.
pub fn size(path: &Path) -> Option<u64> {
    let of = |path: &Path| std::fs::metadata(path).ok().map(|metadata| metadata.len());
    match path.is_dir() {
        true => Files::from_dir(path).ok()?.iter().map(|(_, path)| of(path)).sum(),
        false => of(path),
    }
}

fn part_object(Line { part, host, device }: &Line) -> Value {
    json!({ "part": part.to_string(), "host": host, "device": device })
}

/// How the needs of a cell stand to what there is; what is not known stands in nobody's way.
pub fn fit(needs: &Needs, machine: &Machine) -> Fit {
    let of = |total: u64, free: u64, surely: u64, most: u64| match () {
        () if surely > total => Fit::No,
        () if most > total => Fit::Perhaps,
        () if most > free => Fit::NotNow,
        () => Fit::Fits,
    };
    let Needs { surely, most, .. } = needs;
    let host = machine.host.map_or(Fit::Fits, |host| of(host.total, host.available, surely.host, most.host));
    let device = machine
        .device()
        .map_or(Fit::Fits, |device| of(device.total, device.free.unwrap_or(device.total), surely.device, most.device));
    host.max(device)
}

/// A cell that cannot run here, with what takes how much.
fn misfit(cell: &Cell, needs: &Needs, machine: &Machine) -> Problem {
    let device = machine.device().filter(|device| needs.surely.device > device.total);
    let (place, needed, total) = match (device, machine.host) {
        (Some(device), _) => (format!("on {}", device.name), needs.surely.device, device.total),
        (None, host) => ("in memory".to_string(), needs.surely.host, host.map_or(0, |host| host.total)),
    };
    let (needed, total) = (report::bytes(needed), report::bytes(total));
    let message = format!("`{cell}` does not fit {place}: it needs {needed}, and there are {total} in all");
    let problem = Problem::new("plan::memory", message)
        .exit(Exit::Missing)
        .at_span(&cell.file, cell.span.clone(), "")
        .note(format!("what takes how much:\n{}", needs.surely.table()));
    let forecast = stage::find(cell.kind.name).and_then(|kind| (kind.forecast)(&cell.params));
    let advice = forecast.map_or(Vec::new(), |forecast| forecast.computes().advice(device.is_some()));
    advice.into_iter().fold(problem, Problem::help)
}

/// Cells that fit each by itself, and not as many at once as may run.
fn together(rows: &[Row], machine: &Machine, jobs: usize) -> Option<String> {
    let over = |of: &dyn Fn(&Needs) -> u64, free: u64| {
        let mut all: Vec<u64> = rows.iter().filter_map(|row| row.needs.as_ref().ok()).map(of).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        let sum = all.iter().take(jobs).fold(0u64, |sum, more| sum.saturating_add(*more));
        (sum > free).then_some(sum)
    };
    let host = machine.host.and_then(|host| over(&|needs| needs.most.host, host.available));
    let device =
        machine.device().and_then(|device| over(&|needs| needs.most.device, device.free.unwrap_or(device.total)));
    let sum = host.or(device)?;
    Some(format!(
        "{jobs} stages at once may need {} together, more than is free now; `--jobs 1` runs one at a time",
        report::bytes(sum)
    ))
}

/// `3.4 GiB`, or `1.1 GiB on the host and 12 GiB on the device`.
fn amounts(need: &Need) -> String {
    match need.device {
        0 => report::bytes(need.host),
        device => format!("{} on the host and {} on the device", report::bytes(need.host), report::bytes(device)),
    }
}

/// `up to 3.4 GiB`, or `at least` so much where a device's free memory is used whatever there is of it.
pub fn bounded(needs: &Needs) -> String {
    format!("{} {}", if needs.takes_more { "at least" } else { "up to" }, amounts(&needs.most))
}

fn there(machine: &Machine) -> String {
    let host = match machine.host {
        Some(host) => format!("{} here, {} free now", report::bytes(host.total), report::bytes(host.available)),
        None => "not known here".to_string(),
    };
    match &machine.device {
        None => host,
        Some(Ok(device)) => format!("{host}; {} on {}", report::bytes(device.total), device.name),
        Some(Err(problem)) => format!("{host}; no device: {}", problem.message),
    }
}

/// For `--json`.
pub fn machine_object(machine: &Machine) -> Value {
    json!({
        "host": machine.host.map(|host| json!({ "total": host.total, "available": host.available })),
        "device": machine.device().map(|DeviceMemory { name, total, free }| {
            json!({ "name": name, "total": total, "free": free })
        }),
    })
}
