//! The scheduler: what is ready runs, what turns out fresh does not, what depends on a failure is skipped.

use super::engine::Engine;
use super::events::{Event, Observer};
use super::report::{Options, Outcome};
use super::runner::Runner;
use super::status::{Past, Status, Survey};
use crate::digest::Digest;
use crate::plan::CellId;
use crate::problem::Problem;
use crate::store::{Artifact, Holder, Lookup, damaged};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a waiting worker looks whether the user wants to stop or a lock came free.
const GLANCE: Duration = Duration::from_millis(50);
/// How often an artifact is made again because it was damaged, before the disk is blamed.
const REDO_MAX: usize = 3;

pub(super) struct Scheduler<'a> {
    pub(super) engine: &'a Engine<'a>,
    pub(super) options: &'a Options,
    pub(super) runner: &'a dyn Runner,
    pub(super) observer: &'a dyn Observer,
    pub(super) stop: &'a AtomicBool,
    pub(super) run: &'a str,
    pub(super) sources: &'a Survey,
    pub(super) past: Past,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
}

/// Where every wanted cell is. A cell is in exactly one of: `ready`, `later`, `running`, parked
/// behind a running one, waiting for `needs > 0` inputs, or done (`outcome`).
pub(super) struct State {
    ready: BTreeSet<CellId>,
    /// Cells whose lock another process has, and when to ask again.
    later: Vec<(Instant, CellId)>,
    /// Fingerprints at work in this run, with the cells of the same fingerprint that wait for them.
    pub(super) at_work: HashMap<Digest, Vec<CellId>>,
    pub(super) running: usize,
    /// How many inputs are not done.
    needs: Vec<usize>,
    /// Who waits for a cell; grows when a damaged artifact has to be made again.
    waiters: Vec<Vec<CellId>>,
    pub(super) artifacts: Vec<Option<(Digest, Artifact)>>,
    outcomes: Vec<Option<Outcome>>,
    /// Fingerprints that ran in this run: `--force` is satisfied by one run of each.
    pub(super) ran: HashSet<Digest>,
    /// Cells of whose lock it was said that another process has it.
    told: HashSet<CellId>,
    /// How often a cell found its inputs damaged.
    redone: HashMap<CellId, usize>,
    /// A stage failed, and nothing more is to start.
    halted: bool,
}

impl State {
    pub(super) fn new(engine: &Engine, survey: &Survey) -> State {
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
pub(super) enum Step {
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
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn run(self, wanted: &BTreeSet<CellId>) -> Vec<Option<Outcome>> {
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
