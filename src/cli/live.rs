//! What a run shows while it runs, on stderr: one live line per running stage on a terminal, plain
//! lines at intervals elsewhere, nothing under `--quiet`; with `--json` one event per line on stdout.

use crate::report;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Between two lines about the same stage where no terminal is.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Between two progress events of the same stage with `--json`.
const EVENT_EVERY: Duration = Duration::from_secs(1);

/// The bars of this process: what is logged beside them goes through here, or they would tear.
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// Writes to stderr above the live lines, if there are any.
pub fn above(write: impl FnOnce(&mut dyn Write)) {
    let mut write = Some(write);
    let mut once = || {
        if let Some(write) = write.take() {
            write(&mut std::io::stderr().lock());
        }
    };
    match BARS.get() {
        Some(bars) => bars.suspend(once),
        None => once(),
    }
}

enum Shown {
    Nothing,
    Lines,
    Bars(MultiProgress),
    Events,
}

/// The screen of one run.
pub struct Live {
    shown: Shown,
}

impl Live {
    pub fn new(quiet: bool, json: bool) -> Live {
        let shown = match (json, quiet) {
            (true, _) => Shown::Events,
            (false, true) => Shown::Nothing,
            (false, false) if std::io::stderr().is_terminal() => {
                let bars = BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
                Shown::Bars(bars.clone())
            }
            (false, false) => Shown::Lines,
        };
        Live { shown }
    }

    /// One object on a line of stdout, with `--json`. A reader that has gone away is no error.
    pub fn event(&self, event: Value) {
        if matches!(self.shown, Shown::Events) {
            let _ = writeln!(std::io::stdout().lock(), "{event}");
        }
    }

    /// A line for people, above what is live.
    pub fn line(&self, text: &str) {
        if matches!(self.shown, Shown::Lines | Shown::Bars(_)) {
            above(|stderr| {
                let _ = writeln!(stderr, "{text}");
            });
        }
    }

    /// A line for people where nothing is live, and so nothing else shows that a stage runs.
    pub fn plain(&self, text: &str) {
        if matches!(self.shown, Shown::Lines) {
            self.line(text);
        }
    }

    /// A line that `--quiet` does not silence: warnings and errors.
    pub fn always(&self, text: &str) {
        if !matches!(self.shown, Shown::Events) {
            above(|stderr| {
                let _ = writeln!(stderr, "{text}");
            });
        }
    }

    /// A stage has started: its line, until the value is dropped.
    pub fn stage(self: &Arc<Live>, label: &str) -> Running {
        let bar = match &self.shown {
            Shown::Bars(bars) => {
                let bar = bars.add(ProgressBar::new_spinner());
                bar.set_style(style("{spinner} {prefix}  {elapsed}  {wide_msg}"));
                bar.set_prefix(label.to_string());
                bar.enable_steady_tick(Duration::from_millis(120));
                Some(bar)
            }
            _ => None,
        };
        let now = Instant::now();
        let state = State { total: 0, unit: "", done: 0, note: String::new(), begun: now, shown: now };
        Running { live: self.clone(), label: label.to_string(), bar, state: Mutex::new(state) }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a wrong one would show as the default bar.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─")
}

/// The line of one running stage.
pub struct Running {
    live: Arc<Live>,
    label: String,
    bar: Option<ProgressBar>,
    state: Mutex<State>,
}

struct State {
    total: u64,
    unit: &'static str,
    done: u64,
    note: String,
    begun: Instant,
    /// When a line or an event last told of it.
    shown: Instant,
}

impl Running {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Tells where it stands, if that was not told lately.
    fn tell(&self, state: &mut State) {
        match &self.live.shown {
            Shown::Lines if state.shown.elapsed() >= LINE_EVERY => {
                state.shown = Instant::now();
                self.live.line(&format!("{}: {}", self.label, state.sentence()));
            }
            Shown::Events if state.shown.elapsed() >= EVENT_EVERY => {
                state.shown = Instant::now();
                self.live.event(json!({
                    "event": "progress", "cell": self.label, "done": state.done, "total": state.total,
                    "unit": state.unit, "note": state.note,
                }));
            }
            _ => {}
        }
    }

    pub fn begin(&self, total: u64, unit: &'static str) {
        let mut state = self.state();
        (state.total, state.unit, state.done, state.begun) = (total, unit, 0, Instant::now());
        if let Some(bar) = &self.bar {
            bar.reset();
            bar.set_length(total);
            bar.set_style(style(&format!(
                "{{spinner}} {{prefix}}  {{bar:20}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{eta}} left  {{wide_msg}}"
            )));
        }
    }

    pub fn at(&self, done: u64) {
        let mut state = self.state();
        state.done = done;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
        self.tell(&mut state);
    }

    pub fn note(&self, text: &str) {
        let mut state = self.state();
        state.note = text.to_string();
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_string());
        }
        self.tell(&mut state);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl State {
    /// `120/800 steps, 4.2/s, 2m 41s left, loss 1.234`.
    fn sentence(&self) -> String {
        let mut parts = Vec::new();
        if self.total > 0 {
            parts.push(format!("{}/{} {}", self.done, self.total, self.unit));
            let elapsed = self.begun.elapsed().as_secs_f64();
            if self.done > 0 && elapsed > 0.0 {
                let rate = self.done as f64 / elapsed;
                parts.push(if rate >= 1.0 { format!("{rate:.1}/s") } else { format!("{:.1} s each", 1.0 / rate) });
                let left = self.total.saturating_sub(self.done) as f64 / rate;
                parts.push(format!("{} left", report::duration(left)));
            }
        }
        if !self.note.is_empty() {
            parts.push(self.note.clone());
        }
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_about_a_running_stage_says_how_far_and_how_long() {
        let begun = Instant::now().checked_sub(Duration::from_secs(10)).expect("ten seconds ago");
        let mut state = State { total: 800, unit: "steps", done: 200, note: "loss 1.2".into(), begun, shown: begun };
        assert_eq!(state.sentence(), "200/800 steps, 20.0/s, 30.0s left, loss 1.2");
        state.done = 2;
        assert_eq!(state.sentence(), "2/800 steps, 5.0 s each, 1h 06m left, loss 1.2");
        state.total = 0;
        assert_eq!(state.sentence(), "loss 1.2");
    }
}
