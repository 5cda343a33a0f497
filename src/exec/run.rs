//! The scheduler: what is ready runs, what turns out fresh does not, what depends on a failure is skipped.

use super::events::{Event, Log, Observer};
use super::status::{Past, Reason, Status, Survey};
use super::{Engine, Progress, Runner, Task, TaskInput};
use crate::digest::Digest;
use crate::files::Files;
use crate::measure;
use crate::plan::Fingerprint;
use crate::plan::{Cell, CellId};
use crate::problem::{Exit, Problem};
use crate::store::{Artifact, Claim, Claimed, Holder, Lookup, Measured, Published, Record, Used, damaged, utc};
use serde_json::json;
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Stages at the same time, at least 1.
    pub jobs: usize,
    /// After a failure, go on with whatever does not depend on it.
    pub keep_going: bool,
    /// Run these even if they are fresh.
    pub force: BTreeSet<CellId>,
    /// Cells whose files the caller will read: their bytes are looked at even if they are fresh.
    pub serve: BTreeSet<CellId>,
    /// Only judge.
    pub dry_run: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { jobs: 1, keep_going: false, force: BTreeSet::new(), serve: BTreeSet::new(), dry_run: false }
    }
}

/// How a cell ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Fresh(Artifact),
    /// `differs`: an earlier result has other bytes; it is the one in `artifact`.
    Ran {
        artifact: Artifact,
        wall_s: f64,
        differs: bool,
    },
    Failed(Problem),
    /// An input failed: this one.
    Skipped {
        because: CellId,
    },
    Interrupted,
    /// The run ended before its turn: an interruption, a failure elsewhere, or `dry_run`.
    NotStarted,
}

/// A run that got as far as its first stage.
pub struct Report {
    /// Empty for `dry_run`, and if all was fresh in a cache that can only be read.
    pub id: String,
    /// `runs/<id>`; empty where `id` is.
    pub folder: PathBuf,
    /// How things stood before.
    pub before: Survey,
    /// By cell; `None` for cells that were not asked for.
    pub outcomes: Vec<Option<Outcome>>,
    pub wall_s: f64,
}

impl Report {
    pub fn artifact(&self, cell: CellId) -> Option<&Artifact> {
        match self.outcomes[cell].as_ref()? {
            Outcome::Fresh(artifact) | Outcome::Ran { artifact, .. } => Some(artifact),
            _ => None,
        }
    }

    /// In plan order.
    pub fn failures(&self) -> impl Iterator<Item = (CellId, &Problem)> {
        self.outcomes.iter().enumerate().filter_map(|(cell, outcome)| match outcome {
            Some(Outcome::Failed(problem)) => Some((cell, problem)),
            _ => None,
        })
    }

    /// `None`: all that was asked for is there (or `dry_run`).
    pub fn exit(&self) -> Option<Exit> {
        let any = |wanted: fn(&Outcome) -> bool| self.outcomes.iter().flatten().any(wanted);
        if any(|outcome| matches!(outcome, Outcome::Interrupted)) {
            return Some(Exit::Interrupted);
        }
        if any(|outcome| matches!(outcome, Outcome::Failed(_))) {
            return Some(Exit::Failed);
        }
        // Nothing failed, and yet something has not run: the user stopped it between two stages.
        (!self.id.is_empty() && any(|outcome| matches!(outcome, Outcome::NotStarted))).then_some(Exit::Interrupted)
    }
}

impl Engine<'_> {
    /// Runs what is stale among `selection` and what it needs.
    ///
    /// `Err` holds everything that was found to be missing before any stage ran. Afterwards the
    /// failures are in the report. Stops when `stop` is set: no stage starts any more, running ones
    /// are asked to end, and what they leave in their work folders is kept.
    pub fn run(
        &self,
        selection: &[CellId],
        options: &Options,
        runner: &dyn Runner,
        observer: &dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Report, Vec<Problem>> {
        let _span = tracing::info_span!("run", title = self.plan.title).entered();
        let began = Instant::now();
        // Held until the end: what was found fresh must not be collected meanwhile.
        let session = if options.dry_run { None } else { Some(self.store.session()) };
        let before = self.status(selection, &options.force, &options.serve);
        let mut problems = before.problems();
        if !options.dry_run {
            problems.extend(runner.fits(&before));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let all_fresh = before.statuses.iter().flatten().all(|status| matches!(status, Status::Fresh { .. }));
        let session = match session {
            Some(Ok(session)) => Some(session),
            // A cache that can only be read serves all the same what is in it.
            Some(Err(problem)) if problem.code != "store::read_only" || !all_fresh => return Err(vec![problem]),
            _ => None,
        };
        if session.is_none() {
            let outcomes = before.statuses.iter().map(|status| match status {
                Some(Status::Fresh { artifact, .. }) => Some(Outcome::Fresh(artifact.clone())),
                Some(_) => Some(Outcome::NotStarted),
                None => None,
            });
            let outcomes = outcomes.collect();
            return Ok(Report { id: String::new(), folder: PathBuf::new(), before, outcomes, wall_s: 0.0 });
        }
        let problems = self.unready(&before, runner, stop);
        if !problems.is_empty() {
            return Err(problems);
        }
        // Before any stage ran, whatever stands in the way is something missing.
        let missing = |problem: Problem| vec![problem.exit(Exit::Missing)];
        let (id, folder) = self.store.run_folder().map_err(missing)?;
        self.write_plan(&id, &folder, selection, &before).map_err(missing)?;
        let log = Log::new(self.plan, observer, &folder.join("events.jsonl"));
        let count =
            |wanted: fn(&Status) -> bool| before.statuses.iter().flatten().filter(|status| wanted(status)).count();
        log.event(&Event::Begun {
            id: &id,
            fresh: count(|status| matches!(status, Status::Fresh { .. })),
            stale: count(|status| matches!(status, Status::Stale { .. })),
            waits: count(|status| matches!(status, Status::Waits { .. })),
        });
        let outcomes = {
            let scheduler = Scheduler {
                engine: self,
                options,
                runner,
                observer: &log,
                stop,
                run: &id,
                sources: &before,
                past: Past::default(),
                state: Mutex::new(State::new(self, &before)),
                changed: Condvar::new(),
            };
            scheduler.run(&self.plan.closure(selection.iter().copied()))
        };
        // Only memory of digests and labels is at stake: without it the next run is slower.
        if let Err(problem) = self.store.flush() {
            tracing::warn!("{problem}");
        }
        let wall_s = began.elapsed().as_secs_f64();
        log.event(&Event::Ended { wall_s });
        drop(session);
        Ok(Report { id, folder, before, outcomes, wall_s })
    }

    /// What cells that may run need and is not there, each thing once.
    fn unready(&self, before: &Survey, runner: &dyn Runner, stop: &AtomicBool) -> Vec<Problem> {
        let mut problems: Vec<Problem> = Vec::new();
        for (cell, status) in before.statuses.iter().enumerate() {
            if !matches!(status, Some(Status::Stale { .. } | Status::Waits { .. })) {
                continue;
            }
            let Err(problem) = runner.ready(&self.plan.cells[cell], stop) else { continue };
            if problem.exit == Exit::Interrupted {
                return vec![problem];
            }
            if !problems.iter().any(|known| known.code == problem.code && known.message == problem.message) {
                let of = &self.plan.cells[cell];
                problems.push(problem.exit(Exit::Missing).at_span(&of.file, of.span.clone(), ""));
            }
        }
        problems
    }

    /// `runs/<id>/plan.json`: what was asked for, and how each cell stood. What a fresh cell would
    /// compute stands in its record; of the others the parameters are kept here too, for a stage
    /// that fails leaves no record.
    fn write_plan(&self, id: &str, folder: &Path, selection: &[CellId], before: &Survey) -> Result<(), Problem> {
        let label = |cell: &CellId| self.plan.cells[*cell].to_string();
        let mut cells = Vec::new();
        for (cell, status) in before.statuses.iter().enumerate() {
            let Some(status) = status else { continue };
            let text = |reasons: &[Reason]| reasons.iter().map(ToString::to_string).collect::<Vec<_>>();
            let mut entry = match status {
                Status::Fresh { fingerprint, .. } => {
                    cells.push(
                        json!({"cell": label(&cell), "status": "fresh", "fingerprint": fingerprint.digest().hex()}),
                    );
                    continue;
                }
                Status::Stale { fingerprint, reasons } => {
                    json!({"cell": label(&cell), "status": "stale", "fingerprint": fingerprint.digest().hex(), "reasons": text(reasons)})
                }
                Status::Waits { on, reasons } => {
                    json!({"cell": label(&cell), "status": "waits", "on": on.iter().map(label).collect::<Vec<_>>(), "reasons": text(reasons)})
                }
                // A run with anything missing ends before this.
                Status::Missing { .. } => continue,
            };
            entry["kind"] = self.plan.cells[cell].kind.name.into();
            entry["params"] = json!(*self.plan.cells[cell].params);
            entry["sources"] =
                before.sources[cell].iter().map(|(key, source)| (key.clone(), json!(source.identity))).collect();
            cells.push(entry);
        }
        let plan = json!({
            "run": id,
            "title": self.plan.title,
            "tool": tool(),
            "machine": measure::machine(),
            "started": utc(SystemTime::now()),
            "asked_for": selection.iter().map(label).collect::<Vec<_>>(),
            "cells": cells,
        });
        self.store.write_file(&folder.join("plan.json"), format!("{plan:#}\n").as_bytes())
    }
}

fn tool() -> String {
    format!("pipe {}", env!("CARGO_PKG_VERSION"))
}

/// How often a waiting worker looks whether the user wants to stop or a lock came free.
const GLANCE: Duration = Duration::from_millis(50);
/// How often an artifact is made again because it was damaged, before the disk is blamed.
const REDO_MAX: usize = 3;

struct Scheduler<'a> {
    engine: &'a Engine<'a>,
    options: &'a Options,
    runner: &'a dyn Runner,
    observer: &'a dyn Observer,
    stop: &'a AtomicBool,
    run: &'a str,
    sources: &'a Survey,
    past: Past,
    state: Mutex<State>,
    changed: Condvar,
}

/// Where every wanted cell is. A cell is in exactly one of: `ready`, `later`, `running`, parked
/// behind a running one, waiting for `needs > 0` inputs, or done (`outcome`).
struct State {
    ready: BTreeSet<CellId>,
    /// Cells whose lock another process has, and when to ask again.
    later: Vec<(Instant, CellId)>,
    /// Fingerprints at work in this run, with the cells of the same fingerprint that wait for them.
    at_work: HashMap<Digest, Vec<CellId>>,
    running: usize,
    /// How many inputs are not done.
    needs: Vec<usize>,
    /// Who waits for a cell; grows when a damaged artifact has to be made again.
    waiters: Vec<Vec<CellId>>,
    artifacts: Vec<Option<(Digest, Artifact)>>,
    outcomes: Vec<Option<Outcome>>,
    /// Fingerprints that ran in this run: `--force` is satisfied by one run of each.
    ran: HashSet<Digest>,
    /// Cells of whose lock it was said that another process has it.
    told: HashSet<CellId>,
    /// How often a cell found its inputs damaged.
    redone: HashMap<CellId, usize>,
    /// A stage failed, and nothing more is to start.
    halted: bool,
}

impl State {
    fn new(engine: &Engine, survey: &Survey) -> State {
        let cells = engine.plan.cells.len();
        let mut state = State {
            ready: BTreeSet::new(),
            later: Vec::new(),
            at_work: HashMap::new(),
            running: 0,
            needs: vec![0; cells],
            waiters: vec![Vec::new(); cells],
            artifacts: vec![None; cells],
            outcomes: vec![None; cells],
            ran: HashSet::new(),
            told: HashSet::new(),
            redone: HashMap::new(),
            halted: false,
        };
        for (cell, status) in survey.statuses.iter().enumerate() {
            match status {
                Some(Status::Fresh { fingerprint, artifact }) => {
                    state.artifacts[cell] = Some((fingerprint.digest(), artifact.clone()));
                    state.outcomes[cell] = Some(Outcome::Fresh(artifact.clone()));
                }
                Some(_) => state.enqueue(engine, cell),
                None => {}
            }
        }
        state
    }

    /// Ready, or waiting for those of its inputs that are not done.
    fn enqueue(&mut self, engine: &Engine, cell: CellId) {
        let missing: BTreeSet<CellId> =
            engine.plan.graph().needs(cell).filter(|&input| self.artifacts[input].is_none()).collect();
        self.needs[cell] = missing.len();
        for &input in &missing {
            self.waiters[input].push(cell);
        }
        if missing.is_empty() {
            self.ready.insert(cell);
        }
    }
}

/// What became of an attempt at a cell.
enum Step {
    Fresh(Digest, Artifact),
    Ran {
        fingerprint: Digest,
        artifact: Artifact,
        wall_s: f64,
        differs: bool,
    },
    Failed(Problem),
    Interrupted,
    /// Another process is at it.
    Busy(Holder),
    /// The same fingerprint is at work in this run; the cell waits there.
    Parked,
    /// An input is being made again.
    Early,
    /// Artifacts of these inputs are damaged.
    Redo(Vec<CellId>),
}

impl Scheduler<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn run(self, wanted: &BTreeSet<CellId>) -> Vec<Option<Outcome>> {
        for (cell, outcome) in self.lock().outcomes.iter().enumerate() {
            if let (Some(Outcome::Fresh(_)), Some(Status::Fresh { fingerprint, .. })) =
                (outcome, &self.sources.statuses[cell])
            {
                self.found_fresh(cell, &fingerprint.digest());
            }
        }
        let work =
            self.lock().outcomes.iter().enumerate().filter(|(cell, o)| o.is_none() && wanted.contains(cell)).count();
        let workers = self.options.jobs.clamp(1, work.max(1));
        if work > 0 {
            std::thread::scope(|scope| {
                for n in 0..workers {
                    let builder = std::thread::Builder::new().name(format!("stage-{n}")).stack_size(16 << 20);
                    // Without the thread the others, or the last resort below, do the work.
                    if let Err(error) = builder.spawn_scoped(scope, || self.work()) {
                        tracing::warn!("cannot start a thread: {error}");
                    }
                }
            });
            self.work();
        }
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        for &cell in wanted {
            state.outcomes[cell].get_or_insert(Outcome::NotStarted);
        }
        state.outcomes
    }

    fn found_fresh(&self, cell: CellId, fingerprint: &Digest) {
        let of = &self.engine.plan.cells[cell];
        self.engine.store.touch(fingerprint, &of.to_string(), of.kind.name);
        self.observer.event(&Event::Fresh { cell });
    }

    /// Takes cells until there is nothing left to take or to wait for.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            let over = state.halted || self.stopping();
            let now = Instant::now();
            let State { later, ready, .. } = &mut *state;
            later.retain(|&(when, cell)| {
                let wait = when > now;
                if !wait {
                    ready.insert(cell);
                }
                wait
            });
            match if over { None } else { state.ready.pop_first() } {
                Some(cell) => {
                    state.running += 1;
                    drop(state);
                    let (step, at_work) = self.attempt(cell);
                    state = self.lock();
                    state.running -= 1;
                    let parked = at_work.and_then(|digest| state.at_work.remove(&digest)).unwrap_or_default();
                    self.release(&mut state, cell, &step, parked);
                    self.settle(&mut state, cell, step);
                    self.changed.notify_all();
                }
                None if state.running == 0 && (over || state.later.is_empty()) => {
                    self.changed.notify_all();
                    return;
                }
                None => {
                    let waited = self.changed.wait_timeout(state, GLANCE).unwrap_or_else(PoisonError::into_inner);
                    state = waited.0;
                }
            }
        }
    }

    /// Cells of the same fingerprint as one that was at work find its artifact, or fail the same way.
    fn release(&self, state: &mut State, cell: CellId, step: &Step, parked: Vec<CellId>) {
        for same in parked {
            match step {
                Step::Failed(problem) => {
                    let label = &self.engine.plan.cells[cell];
                    let problem = problem.clone().note(format!("`{label}` has the same fingerprint"));
                    self.settle(state, same, Step::Failed(problem));
                }
                Step::Interrupted => self.settle(state, same, Step::Interrupted),
                _ => {
                    state.ready.insert(same);
                }
            }
        }
    }

    /// One try at a ready cell, the state not locked. Returns the fingerprint it was at work on, too.
    fn attempt(&self, cell: CellId) -> (Step, Option<Digest>) {
        let engine = self.engine;
        let (artifacts, forced, fingerprint) = {
            let mut state = self.lock();
            // Between its turn and now, another cell may have found one of its inputs damaged.
            if engine.plan.graph().needs(cell).any(|input| state.artifacts[input].is_none()) {
                return (Step::Early, None);
            }
            let of_input = |input: CellId| state.artifacts[input].as_ref().map(|(_, artifact)| artifact.digest);
            let Some(fingerprint) = engine.fingerprint(cell, &self.sources.sources[cell], of_input) else {
                let label = engine.plan.cells[cell].to_string();
                let problem =
                    Problem::new("exec::not_ready", format!("`{label}` was started before its inputs were there"));
                return (Step::Failed(problem), None);
            };
            let digest = fingerprint.digest();
            if let Some(parked) = state.at_work.get_mut(&digest) {
                parked.push(cell);
                return (Step::Parked, None);
            }
            state.at_work.insert(digest, Vec::new());
            let artifacts: BTreeMap<CellId, (Digest, Artifact)> = engine
                .plan
                .graph()
                .needs(cell)
                .filter_map(|input| Some((input, state.artifacts[input].clone()?)))
                .collect();
            let forced = self.options.force.contains(&cell) && !state.ran.contains(&digest);
            (artifacts, forced, fingerprint)
        };
        let step = self.attempt_at(cell, &fingerprint, &artifacts, forced);
        (step.unwrap_or_else(Step::Failed), Some(fingerprint.digest()))
    }

    fn attempt_at(
        &self,
        cell: CellId,
        fingerprint: &Fingerprint,
        artifacts: &BTreeMap<CellId, (Digest, Artifact)>,
        forced: bool,
    ) -> Result<Step, Problem> {
        let store = self.engine.store;
        let digest = fingerprint.digest();
        let label = self.engine.plan.cells[cell].to_string();
        let there = |damage: &mut Option<Vec<Reason>>| match store.get(&digest) {
            Lookup::Known(artifact) if self.options.serve.contains(&cell) => match store.verify(&artifact) {
                Ok(_) => Some(artifact),
                Err(found) => {
                    *damage = Some(vec![Reason::Damaged(found)]);
                    None
                }
            },
            Lookup::Known(artifact) => Some(artifact),
            Lookup::Damaged(_, found) => {
                *damage = Some(vec![Reason::Damaged(found)]);
                None
            }
            Lookup::Unknown => None,
        };
        let mut damage = None;
        if !forced && let Some(artifact) = there(&mut damage) {
            return Ok(Step::Fresh(digest, artifact));
        }
        let claim = match store.claim(&digest, &label)? {
            Claimed::Mine(claim) => claim,
            Claimed::Held(holder) => return Ok(Step::Busy(holder)),
        };
        // Between the look and the lock another process may have finished it.
        if !forced && let Some(artifact) = there(&mut damage) {
            claim.already_done();
            return Ok(Step::Fresh(digest, artifact));
        }
        let files = match self.verified(artifacts) {
            Ok(files) => files,
            Err(bad) => {
                claim.abandon();
                return Ok(Step::Redo(bad));
            }
        };
        let reasons = match (forced, damage) {
            (true, _) => vec![Reason::Forced],
            (false, Some(damage)) => damage,
            (false, None) => self.engine.reasons(cell, fingerprint, &self.past),
        };
        let resumes = store.unfinished(&digest).is_some();
        self.observer.event(&Event::Started { cell, reasons: &reasons, resumes });
        self.compute(cell, claim, fingerprint, artifacts, &files)
    }

    /// The files of each input, after their bytes were looked at; else the inputs that are damaged.
    fn verified(
        &self,
        artifacts: &BTreeMap<CellId, (Digest, Artifact)>,
    ) -> Result<BTreeMap<CellId, Files>, Vec<CellId>> {
        let (mut files, mut bad) = (BTreeMap::new(), Vec::new());
        for (&input, (_, artifact)) in artifacts {
            match self.engine.store.verify(artifact) {
                Ok(found) => {
                    files.insert(input, found);
                }
                Err(damage) => {
                    self.observer.event(&Event::Damaged { cell: input, damage: &damage });
                    bad.push(input);
                }
            }
        }
        if bad.is_empty() { Ok(files) } else { Err(bad) }
    }

    /// Runs the stage and publishes what it left.
    fn compute(
        &self,
        cell: CellId,
        claim: Claim,
        fingerprint: &Fingerprint,
        artifacts: &BTreeMap<CellId, (Digest, Artifact)>,
        files: &BTreeMap<CellId, Files>,
    ) -> Result<Step, Problem> {
        let plan = self.engine.plan;
        let of = &plan.cells[cell];
        let label = of.to_string();
        let _span = tracing::info_span!("cell", cell = label, kind = of.kind.name).entered();
        let sources = &self.sources.sources[cell];
        let (out, work) = claim.begin()?;
        let reporter = Reporter { cell, observer: self.observer, warnings: Mutex::default() };
        let task = Task {
            label: &label,
            params: &of.params,
            inputs: task_inputs(plan.cells.as_slice(), of, files),
            sources: sources
                .iter()
                .filter(|(_, source)| !source.path.as_os_str().is_empty())
                .map(|(key, source)| (key.clone(), source.path.clone()))
                .collect(),
            out: &out,
            work: &work,
            progress: &reporter,
            stop: self.stop,
        };
        if self.lock().running == 1 {
            measure::reset_peak();
        }
        let (started, began, cpu) = (SystemTime::now(), Instant::now(), measure::process_cpu_s());
        let done = catch_unwind(AssertUnwindSafe(|| self.runner.run(of, &task)));
        let wall_s = began.elapsed().as_secs_f64();
        let done = done.unwrap_or_else(|panic| Err(panicked(&label, &*panic)));
        let done = done.and_then(|()| self.stood_still(cell)).and_then(|()| not_empty(&label, &out));
        if let Err(problem) = done {
            claim.abandon();
            let interrupted = problem.exit == Exit::Interrupted && self.stopping();
            return if interrupted { Ok(Step::Interrupted) } else { Err(problem.exit(Exit::Failed)) };
        }
        let used = |input: &CellId| {
            let (fingerprint, artifact) = artifacts.get(input)?;
            Some(Used { cell: plan.cells[*input].to_string(), fingerprint: *fingerprint, artifact: artifact.digest })
        };
        let digest = fingerprint.digest();
        let record = Record {
            fingerprint: digest,
            cell: label.clone(),
            kind: of.kind.name.into(),
            parts: fingerprint.parts.clone(),
            params: (*of.params).clone(),
            inputs: of.inputs.iter().map(|i| (i.slot.clone(), i.cells.iter().filter_map(used).collect())).collect(),
            sources: sources.iter().map(|(key, source)| (key.clone(), source.identity.clone())).collect(),
            artifact: Artifact::new(Vec::new()),
            tool: tool(),
            machine: measure::machine(),
            run: self.run.into(),
            measured: Measured {
                started: utc(started),
                ended: utc(SystemTime::now()),
                wall_s,
                process_cpu_s: measure::process_cpu_s() - cpu,
                process_peak_memory_bytes: measure::peak_memory_bytes(),
            },
            warnings: reporter.warnings.into_inner().unwrap_or_else(PoisonError::into_inner),
        };
        let published = claim.publish(record).map_err(|problem| {
            problem.exit(Exit::Failed).note(format!("`{label}` had finished; its result could not be stored"))
        })?;
        let differs = matches!(published, Published::Differs { .. });
        Ok(Step::Ran { fingerprint: digest, artifact: published.artifact().clone(), wall_s, differs })
    }

    /// Looks again at the sources of a stage that has just run.
    fn stood_still(&self, cell: CellId) -> Result<(), Problem> {
        let of = &self.engine.plan.cells[cell];
        for (key, source) in &self.sources.sources[cell] {
            if !self.engine.sources.unchanged(source)? {
                return Err(Problem::new(
                    "exec::input_changed",
                    format!("`{}` changed while `{of}` ran", source.path.display()),
                )
                .at_span(&of.file, of.span.clone(), key)
                .note("what the stage made of it was not stored: nobody could say what it was made of")
                .help("run again when the file stands still"));
            }
        }
        Ok(())
    }

    /// Enters what became of an attempt, and what follows from it.
    fn settle(&self, state: &mut State, cell: CellId, step: Step) {
        match step {
            Step::Fresh(fingerprint, artifact) => {
                self.found_fresh(cell, &fingerprint);
                let ran_before = matches!(state.outcomes[cell], Some(Outcome::Ran { .. }));
                if !ran_before {
                    state.outcomes[cell] = Some(Outcome::Fresh(artifact.clone()));
                }
                self.finish(state, cell, fingerprint, artifact);
            }
            Step::Ran { fingerprint, artifact, wall_s, differs } => {
                self.observer.event(&Event::Ran { cell, wall_s, bytes: artifact.size(), differs });
                state.outcomes[cell] = Some(Outcome::Ran { artifact: artifact.clone(), wall_s, differs });
                state.ran.insert(fingerprint);
                self.finish(state, cell, fingerprint, artifact);
            }
            Step::Failed(problem) => {
                self.observer.event(&Event::Failed { cell, problem: &problem });
                state.outcomes[cell] = Some(Outcome::Failed(problem));
                state.halted |= !self.options.keep_going;
                self.skip_dependents(state, cell);
            }
            Step::Interrupted => {
                self.observer.event(&Event::Interrupted { cell });
                state.outcomes[cell] = Some(Outcome::Interrupted);
            }
            Step::Busy(holder) => {
                if state.told.insert(cell) {
                    self.observer.event(&Event::WaitsForLock { cell, holder: &holder });
                }
                state.later.push((Instant::now() + GLANCE, cell));
            }
            Step::Parked => {}
            Step::Early => state.enqueue(self.engine, cell),
            Step::Redo(bad) => self.redo(state, cell, bad),
        }
    }

    fn finish(&self, state: &mut State, cell: CellId, fingerprint: Digest, artifact: Artifact) {
        state.artifacts[cell] = Some((fingerprint, artifact));
        for waiter in std::mem::take(&mut state.waiters[cell]) {
            state.needs[waiter] -= 1;
            if state.needs[waiter] == 0 && state.outcomes[waiter].is_none() {
                state.ready.insert(waiter);
            }
        }
    }

    /// Sends damaged inputs back to work, and the cell back to wait for them.
    fn redo(&self, state: &mut State, cell: CellId, bad: Vec<CellId>) {
        let times = state.redone.entry(cell).or_default();
        *times += 1;
        if *times > REDO_MAX {
            let labels: Vec<String> = bad.iter().map(|&input| self.engine.plan.cells[input].to_string()).collect();
            let problem = damaged(&labels.join("`, `"), &[])
                .note(format!("it was made again {REDO_MAX} times, and was damaged each time: is the disk sound?"));
            return self.settle(state, cell, Step::Failed(problem));
        }
        for input in bad {
            // Another cell may have found the same damage and sent it back already, or it may be mended by now.
            let Some((fingerprint, _)) = &state.artifacts[input] else { continue };
            if matches!(self.engine.store.get(fingerprint), Lookup::Known(_)) {
                continue;
            }
            state.artifacts[input] = None;
            state.outcomes[input] = None;
            state.enqueue(self.engine, input);
        }
        state.enqueue(self.engine, cell);
    }

    fn skip_dependents(&self, state: &mut State, failed: CellId) {
        let open = |cell: CellId| self.sources.statuses[cell].is_some() && state.outcomes[cell].is_none();
        let mut below = self.engine.plan.graph().below(failed, open);
        below.remove(&failed);
        for cell in below {
            state.outcomes[cell] = Some(Outcome::Skipped { because: failed });
            self.observer.event(&Event::Skipped { cell, because: failed });
        }
    }
}

/// The files of the inputs by slot, in the order of the plan.
fn task_inputs(cells: &[Cell], of: &Cell, files: &BTreeMap<CellId, Files>) -> BTreeMap<String, Vec<TaskInput>> {
    let task_input = |input: &CellId| TaskInput {
        stage: cells[*input].stage.clone(),
        kind: cells[*input].kind.name,
        axes: cells[*input].axes.clone(),
        files: files.get(input).cloned().unwrap_or_default(),
    };
    of.inputs.iter().map(|input| (input.slot.clone(), input.cells.iter().map(task_input).collect())).collect()
}

fn not_empty(label: &str, out: &Path) -> Result<(), Problem> {
    match Files::from_dir(out) {
        Ok(files) if files.is_empty() => {
            Err(Problem::new("exec::no_output", format!("`{label}` ended without an error and without a file")))
        }
        // What cannot be read is told by the publication, with its name.
        _ => Ok(()),
    }
}

fn panicked(label: &str, panic: &(dyn Any + Send)) -> Problem {
    let said = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
    let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into());
    Problem::new("exec::panic", format!("`{label}` panicked: {said}"))
        .note("this is a mistake in pipe, not in the manifest; what was finished before is kept")
}

/// Hands a stage's progress on, and keeps its warnings for the record.
struct Reporter<'a> {
    cell: CellId,
    observer: &'a dyn Observer,
    warnings: Mutex<Vec<String>>,
}

impl Progress for Reporter<'_> {
    fn begin(&self, total: u64, unit: &'static str) {
        self.observer.event(&Event::Work { cell: self.cell, total, unit });
    }

    fn at(&self, done: u64) {
        self.observer.event(&Event::At { cell: self.cell, done });
    }

    fn note(&self, text: &str) {
        self.observer.event(&Event::Note { cell: self.cell, text });
    }

    fn warn(&self, text: &str) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text.into());
        self.observer.event(&Event::Warned { cell: self.cell, text });
    }
}
