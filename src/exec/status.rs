//! Fresh, stale or waiting, and why: the one judgement behind `plan`, `why` and `run`.

use super::engine::Engine;
use super::sources::Resolved;
use crate::digest::Digest;
use crate::plan::{CellId, Plan};
use crate::plan::{Change, Fingerprint, fingerprint};
use crate::problem::Problem;
use crate::store::{Artifact, Damage, Lookup, Record};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// How a cell stands to the store.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    /// This fingerprint is known, and its files are there.
    Fresh {
        /// What it would compute.
        fingerprint: Fingerprint,
        /// What it came to.
        artifact: Artifact,
    },
    /// Its inputs are there; it would run, for these reasons.
    Stale {
        /// What it would compute.
        fingerprint: Fingerprint,
        /// Why it would run.
        reasons: Vec<Reason>,
    },
    /// These inputs are not there yet, so that nobody can know whether it will have to run.
    /// `reasons`: parts of its own that differ already.
    Waits {
        /// Inputs that are not there yet.
        on: Vec<CellId>,
        /// Why it would run whatever they come to.
        reasons: Vec<Reason>,
    },
    /// Its sources could not be resolved.
    Missing {
        /// What is wrong with each source.
        problems: Vec<Problem>,
    },
}

/// Why a cell is stale.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// No cell of this name was ever finished here. `nearest`: the finished cell of the same kind
    /// that differs least, and in what.
    NeverRun {
        /// Its label, and in what it differs.
        nearest: Option<(String, Vec<Change>)>,
    },
    /// Differs from what the cell was last.
    Changed(Change),
    /// It was finished, but files of its artifact are damaged or gone.
    Damaged(Vec<Damage>),
    /// Asked for.
    Forced,
}

/// `learning_rate: 3e-4 -> 1e-4`.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NeverRun { nearest: None } => f.write_str("never run"),
            Reason::NeverRun { nearest: Some((cell, changes)) } => {
                write!(f, "never run; nearest is {cell}")?;
                changes
                    .iter()
                    .enumerate()
                    .try_for_each(|(i, change)| write!(f, "{} {}", if i == 0 { ":" } else { "," }, Shown(change)))
            }
            Reason::Changed(change) => Shown(change).fmt(f),
            Reason::Damaged(damage) => match damage.first() {
                Some(first) if damage.len() == 1 => write!(f, "damaged: {first}"),
                Some(first) => write!(f, "damaged: {first} and {} more", damage.len() - 1),
                None => f.write_str("damaged"),
            },
            Reason::Forced => f.write_str("forced"),
        }
    }
}

/// A change as people write it: digests cut to twelve digits.
struct Shown<'a>(&'a Change);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<String>| match value {
            None => "absent".to_string(),
            Some(text) => match text.rsplit(' ').next().unwrap_or_default().parse::<Digest>() {
                Ok(digest) => text.replace(&digest.to_string(), &digest.short()),
                Err(_) => text.clone(),
            },
        };
        write!(f, "{}: {} -> {}", self.0.part, value(&self.0.before), value(&self.0.after))
    }
}

/// What was found out about the cells of a plan that were asked for.
pub struct Survey {
    /// By cell; `None` for cells that nobody asked for and nothing asked for needs.
    pub statuses: Vec<Option<Status>>,
    /// By cell, by dotted key.
    pub sources: Vec<BTreeMap<String, Resolved>>,
}

impl Survey {
    /// Everything that is missing, each once.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = Vec::new();
        for status in self.statuses.iter().flatten() {
            let Status::Missing { problems: found } = status else { continue };
            for problem in found {
                // The same file is often the source of many cells: the first place says enough.
                if !problems.iter().any(|known| known.code == problem.code && known.message == problem.message) {
                    problems.push(problem.clone());
                }
            }
        }
        problems
    }
}

/// The root causes for which a cell is not fresh: stale or missing cells above it that themselves
/// wait for nothing; the cell itself if it is one.
pub fn causes(plan: &Plan, statuses: &[Option<Status>], cell: CellId) -> BTreeSet<CellId> {
    let waits = |cell: CellId| matches!(statuses[cell], Some(Status::Waits { .. }));
    let mut causes = plan.graph().above([cell], waits);
    causes.retain(|cell| matches!(statuses[*cell], Some(Status::Stale { .. } | Status::Missing { .. })));
    causes
}

/// Records of a kind, read once per judgement.
#[derive(Default)]
pub(super) struct Past(Mutex<HashMap<&'static str, Vec<Record>>>);

/// How many finished cells of a kind a new cell is compared with.
const NEAREST_OF: usize = 32;

impl Engine<'_> {
    /// How each of the cells asked for, and of those they need, stands. Writes nothing, except that
    /// a damaged file of a cell in `serve` is put aside.
    ///
    /// `force`: stale whatever the store says. `serve`: cells whose files somebody is going to read
    /// even if they are fresh, so that their bytes are looked at too.
    pub fn status(&self, selection: &[CellId], force: &BTreeSet<CellId>, serve: &BTreeSet<CellId>) -> Survey {
        let cells = self.plan.cells.len();
        let mut survey = Survey { statuses: (0..cells).map(|_| None).collect(), sources: vec![BTreeMap::new(); cells] };
        let past = Past::default();
        for cell in self.plan.closure(selection.iter().copied()) {
            let status = match self.resolve(cell) {
                Err(problems) => Status::Missing { problems },
                Ok(sources) => {
                    survey.sources[cell] = sources;
                    self.judge(cell, &survey, force.contains(&cell), serve.contains(&cell), &past)
                }
            };
            survey.statuses[cell] = Some(status);
        }
        survey
    }

    fn resolve(&self, cell: CellId) -> Result<BTreeMap<String, Resolved>, Vec<Problem>> {
        let cell = &self.plan.cells[cell];
        let (mut resolved, mut problems) = (BTreeMap::new(), Vec::new());
        for source in &cell.sources {
            match self.sources.resolve(cell, source) {
                Ok(found) => {
                    resolved.insert(source.key.clone(), found);
                }
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() { Ok(resolved) } else { Err(problems) }
    }

    fn judge(&self, cell: CellId, survey: &Survey, forced: bool, served: bool, past: &Past) -> Status {
        let artifact = |input: CellId| match &survey.statuses[input] {
            Some(Status::Fresh { artifact, .. }) => Some(artifact.digest),
            _ => None,
        };
        let sources = &survey.sources[cell];
        let needs = self.plan.graph().needs(cell);
        let mut on: Vec<CellId> = needs.filter(|&input| artifact(input).is_none()).collect();
        if !on.is_empty() {
            on.sort_unstable();
            // Inputs that are not there yet stand for themselves; only the other parts are compared.
            let known = |input| Some(artifact(input).unwrap_or(Digest::of(b"")));
            let reasons = match self.fingerprint(cell, sources, known) {
                Some(fingerprint) => self.own_changes(cell, &fingerprint),
                None => Vec::new(),
            };
            return Status::Waits { on, reasons };
        }
        let Some(fingerprint) = self.fingerprint(cell, sources, artifact) else {
            // Every source was resolved and every input is there: only a scheme that nobody plugged
            // in could end here, and its source would have been a problem.
            return Status::Missing { problems: Vec::new() };
        };
        if forced {
            return Status::Stale { fingerprint, reasons: vec![Reason::Forced] };
        }
        match self.store.get(&fingerprint.digest()) {
            Lookup::Known(artifact) => match if served { self.store.verify(&artifact).err() } else { None } {
                None => Status::Fresh { fingerprint, artifact },
                Some(damage) => Status::Stale { fingerprint, reasons: vec![Reason::Damaged(damage)] },
            },
            Lookup::Damaged(_, damage) => Status::Stale { fingerprint, reasons: vec![Reason::Damaged(damage)] },
            Lookup::Unknown => {
                let reasons = self.reasons(cell, &fingerprint, past);
                Status::Stale { fingerprint, reasons }
            }
        }
    }

    /// What `cell` would compute, given the digests of its inputs' artifacts.
    pub(super) fn fingerprint(
        &self,
        cell: CellId,
        sources: &BTreeMap<String, Resolved>,
        artifact: impl Fn(CellId) -> Option<Digest>,
    ) -> Option<Fingerprint> {
        let input = |id: CellId| Some((artifact(id)?, self.plan.cells[id].to_string()));
        let source = |key: &str| sources.get(key).map(|resolved| resolved.digest);
        fingerprint(&self.plan.cells[cell], self.machine, input, source)
    }

    /// Why a fingerprint that the store does not know is not one it knows.
    pub(super) fn reasons(&self, cell: CellId, fingerprint: &Fingerprint, past: &Past) -> Vec<Reason> {
        let label = self.plan.cells[cell].to_string();
        let kind = self.plan.cells[cell].kind.name;
        let before = self.store.last(&label, kind).and_then(|last| self.store.record(&last));
        if let Some(before) = before {
            let before = Fingerprint { parts: before.parts };
            return fingerprint.changed(&before).into_iter().map(Reason::Changed).collect();
        }
        let mut past = past.0.lock().unwrap_or_else(PoisonError::into_inner);
        let records = past.entry(kind).or_insert_with(|| self.store.newest_of_kind(kind, NEAREST_OF));
        let nearest = records
            .iter()
            .map(|record| (record, fingerprint.changed(&Fingerprint { parts: record.parts.clone() })))
            // The newest of those that differ least.
            .rev()
            .min_by_key(|(_, changes)| changes.len());
        vec![Reason::NeverRun { nearest: nearest.map(|(record, changes)| (record.cell.clone(), changes)) }]
    }

    fn own_changes(&self, cell: CellId, fingerprint: &Fingerprint) -> Vec<Reason> {
        let label = self.plan.cells[cell].to_string();
        let last = self.store.last(&label, self.plan.cells[cell].kind.name);
        let Some(before) = last.and_then(|last| self.store.record(&last)) else { return Vec::new() };
        let changes = fingerprint.changed(&Fingerprint { parts: before.parts });
        changes.into_iter().filter(|change| !change.part.starts_with("input.")).map(Reason::Changed).collect()
    }
}
