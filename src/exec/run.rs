//! A run: what is missing is told before, then the scheduler has it; the plan and the events stay in `runs/`.

use super::engine::Engine;
use super::events::{Event, Log, Observer};
use super::report::{Options, Outcome, Report, tool};
use super::runner::Runner;
use super::schedule::{Scheduler, State};
use super::status::{Past, Reason, Status, Survey};
use crate::measure;
use crate::plan::CellId;
use crate::problem::{Exit, Problem};
use crate::store::utc;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex};
use std::time::{Instant, SystemTime};

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
