//! What happens in a run, as values: the terminal shows them, `runs/<id>/events.jsonl` keeps them.

use super::status::Reason;
use crate::plan::{CellId, Plan};
use crate::problem::Problem;
use crate::store::{Damage, Holder};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Something that happened. Cells are indices into the plan.
#[derive(Debug)]
pub enum Event<'a> {
    /// Everything was looked at; the first stage may start.
    Begun {
        /// Of the run, and of its folder below `runs/`.
        id: &'a str,
        /// Cells whose artifact is there.
        fresh: usize,
        /// Cells that are going to run.
        stale: usize,
        /// Cells that wait for others.
        waits: usize,
    },
    /// `resumes`: an earlier try left something to go on from.
    Started {
        /// Which.
        cell: CellId,
        /// Why it has to run.
        reasons: &'a [Reason],
        /// Whether there is something to go on from.
        resumes: bool,
    },
    /// Work of a running cell, known in advance.
    Work {
        /// Which.
        cell: CellId,
        /// How much there is to do.
        total: u64,
        /// Of what: `steps`, `problems`.
        unit: &'static str,
    },
    /// How far a running cell is.
    At {
        /// Which.
        cell: CellId,
        /// Of the total.
        done: u64,
    },
    /// Numbers to show beside the bar of a running cell.
    Note {
        /// Which.
        cell: CellId,
        /// A short line.
        text: &'a str,
    },
    /// Something to know after the run too.
    Warned {
        /// Which.
        cell: CellId,
        /// A sentence.
        text: &'a str,
    },
    /// Another process works on the same fingerprint; its result will be used.
    WaitsForLock {
        /// Which.
        cell: CellId,
        /// Who works on it.
        holder: &'a Holder,
    },
    /// The artifact of `cell` is not what was stored; it is made again.
    Damaged {
        /// Whose.
        cell: CellId,
        /// The files.
        damage: &'a [Damage],
    },
    /// The artifact was there.
    Fresh {
        /// Which.
        cell: CellId,
    },
    /// `differs`: an earlier run of the same fingerprint gave other bytes, and those are served.
    Ran {
        /// Which.
        cell: CellId,
        /// How long the stage took, in seconds.
        wall_s: f64,
        /// Size of the artifact.
        bytes: u64,
        /// Whether an earlier result has other bytes.
        differs: bool,
    },
    /// The stage ended with an error, or could not begin.
    Failed {
        /// Which.
        cell: CellId,
        /// Why.
        problem: &'a Problem,
    },
    /// An input failed.
    Skipped {
        /// Which.
        cell: CellId,
        /// The one that failed.
        because: CellId,
    },
    /// Stopped on request; its work folder is kept.
    Interrupted {
        /// Which.
        cell: CellId,
    },
    /// Nothing runs any more.
    Ended {
        /// How long all took, in seconds.
        wall_s: f64,
    },
}

/// Whoever wants to know. Called from many threads, and waited for: be quick.
pub trait Observer: Sync {
    /// Something happened just now.
    fn event(&self, event: &Event);
}

/// Wants to know nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: &Event) {}
}

/// Writes events to a file and passes them on.
pub(super) struct Log<'a> {
    plan: &'a Plan,
    next: &'a dyn Observer,
    began: Instant,
    file: Mutex<Option<BufWriter<File>>>,
}

impl<'a> Log<'a> {
    /// No log is no reason not to run: a full disk shows itself where results are at stake.
    pub fn new(plan: &'a Plan, next: &'a dyn Observer, path: &Path) -> Log<'a> {
        let file = File::options().append(true).create(true).open(path).ok().map(BufWriter::new);
        Log { plan, next, began: Instant::now(), file: Mutex::new(file) }
    }

    fn write(&self, event: &Event) {
        let Some(mut line) = describe(self.plan, event) else { return };
        // Milliseconds are enough to read and few enough to compare.
        line["s"] = ((self.began.elapsed().as_secs_f64() * 1e3).round() / 1e3).into();
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_mut() {
            let _ = writeln!(file, "{line}");
            // A thousand fresh cells are one write; whatever takes time is on disk when it happened.
            if !matches!(event, Event::Fresh { .. }) {
                let _ = file.flush();
            }
        }
    }
}

impl Observer for Log<'_> {
    fn event(&self, event: &Event) {
        self.write(event);
        self.next.event(event);
    }
}

/// A line of the log, and of `--json`; `None` for what is only of the moment.
pub fn describe(plan: &Plan, event: &Event) -> Option<Value> {
    let label = |cell: &CellId| plan.cells[*cell].to_string();
    Some(match event {
        Event::Begun { id, fresh, stale, waits } => {
            json!({"event": "begun", "run": id, "fresh": fresh, "stale": stale, "waits": waits})
        }
        Event::Started { cell, reasons, resumes } => json!({
            "event": "started", "cell": label(cell), "resumes": resumes,
            "reasons": reasons.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }),
        Event::Work { .. } | Event::At { .. } | Event::Note { .. } => return None,
        Event::Warned { cell, text } => json!({"event": "warned", "cell": label(cell), "text": text}),
        Event::WaitsForLock { cell, holder } => {
            json!({"event": "waits_for_lock", "cell": label(cell), "holder": holder.to_string()})
        }
        Event::Damaged { cell, damage } => json!({
            "event": "damaged", "cell": label(cell),
            "files": damage.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }),
        Event::Fresh { cell } => json!({"event": "fresh", "cell": label(cell)}),
        Event::Ran { cell, wall_s, bytes, differs } => {
            json!({"event": "ran", "cell": label(cell), "wall_s": wall_s, "bytes": bytes, "differs": differs})
        }
        Event::Failed { cell, problem } => json!({
            "event": "failed", "cell": label(cell), "code": problem.code, "message": problem.message,
            "notes": problem.notes, "help": problem.help,
        }),
        Event::Skipped { cell, because } => {
            json!({"event": "skipped", "cell": label(cell), "because": label(because)})
        }
        Event::Interrupted { cell } => json!({"event": "interrupted", "cell": label(cell)}),
        Event::Ended { wall_s } => json!({"event": "ended", "wall_s": wall_s}),
    })
}
