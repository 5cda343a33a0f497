//! One try at a cell: a look at the store, the lock, the inputs' bytes, the stage, the publication.

use super::events::{Event, Observer};
use super::report::tool;
use super::runner::{Progress, Task, TaskInput};
use super::schedule::{Scheduler, Step};
use super::status::Reason;
use crate::digest::Digest;
use crate::files::Files;
use crate::measure;
use crate::plan::{Cell, CellId, Fingerprint};
use crate::problem::{Exit, Problem};
use crate::store::{Artifact, Claim, Claimed, Lookup, Measured, Published, Record, Used, utc};
use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

impl Scheduler<'_> {
    /// One try at a ready cell, the state not locked. Returns the fingerprint it was at work on, too.
    pub(super) fn attempt(&self, cell: CellId) -> (Step, Option<Digest>) {
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
