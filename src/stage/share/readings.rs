//! What `table`, `plot` and `check` read: the numbers of gathered artifacts, each with its labels.
//!
//! A reading is one line of numbers at one point of the axes: the `scores.json` of an evaluation
//! cell, a line of a probe's `measurements.jsonl`, a step of a training stage's `log.jsonl`.

use crate::files::Files;
use crate::grade::stats;
use crate::problem::Problem;
use crate::stage::context::Artifact;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::rc::Rc;

/// One line of numbers and where it belongs.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The cell it came from, for messages.
    pub cell: String,
    /// The stage's name: the label `stage`.
    pub stage: String,
    /// Axis names and values, in the cell's order.
    pub axes: Vec<(String, String)>,
    /// Its numbers and texts by name, as the artifact has them.
    pub fields: Map<String, Value>,
    /// Of an evaluation that left `outcomes.jsonl`.
    pub outcomes: Option<Rc<Outcomes>>,
}

/// Right samples and samples of each problem, by its id.
pub type Outcomes = BTreeMap<String, (u64, u64)>;

impl Reading {
    /// The value of axis or field `name` as a label; `None` if it has neither.
    pub fn label(&self, name: &str) -> Option<String> {
        if let Some((_, value)) = self.axes.iter().find(|(axis, _)| axis == name) {
            return Some(value.clone());
        }
        if name == "stage" {
            return Some(self.stage.clone());
        }
        match self.fields.get(name)? {
            Value::String(text) => Some(text.clone()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
            other => Some(other.to_string()),
        }
    }

    /// The number in field `name`; `None` if it is absent or null.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.fields.get(name).and_then(Value::as_f64)
    }

    /// The 95 % interval of `metric`, where the stage that made it gave one. Only `accuracy`
    /// carries an interval (`ci_low`, `ci_high`, in its own unit).
    pub fn interval(&self, metric: &str) -> Option<(f64, f64)> {
        (metric == "accuracy").then_some(())?;
        Some((self.number("ci_low")?, self.number("ci_high")?))
    }

    /// Half of it.
    pub fn half_width(&self, metric: &str) -> Option<f64> {
        self.interval(metric).map(|(low, high)| (high - low) / 2.0)
    }
}

/// All readings of the gathered artifacts, in the order given.
///
/// # Errors
/// `stage::no_numbers` if an artifact holds none of the three files, `stage::bad_numbers` if one
/// cannot be read.
pub fn readings(artifacts: &[Artifact]) -> Result<Vec<Reading>, Problem> {
    let mut all = Vec::new();
    for artifact in artifacts {
        let axes: Vec<(String, String)> =
            artifact.axes.0.iter().map(|(name, value)| (name.clone(), value.to_string())).collect();
        let cell = cell_name(&artifact.stage, &axes);
        let found = ["scores.json", "measurements.jsonl", "log.jsonl"]
            .iter()
            .find_map(|name| Some((*name, artifact.files.get(name)?)));
        let Some((name, path)) = found else {
            return Err(Problem::new("stage::no_numbers", format!("`{cell}` has no scores, measurements or log"))
                .note("looked for scores.json, measurements.jsonl and log.jsonl"));
        };
        let outcomes = match name {
            "scores.json" => outcomes_of(&artifact.files, &cell)?.map(Rc::new),
            _ => None,
        };
        for fields in lines(path, name == "scores.json", &cell)? {
            let (stage, axes, outcomes) = (artifact.stage.clone(), axes.clone(), outcomes.clone());
            all.push(Reading { cell: cell.clone(), stage, axes, fields, outcomes });
        }
    }
    Ok(all)
}

/// What became of each problem, where an evaluation has said so.
pub fn outcomes_of(files: &Files, cell: &str) -> Result<Option<Outcomes>, Problem> {
    let Some(path) = files.get("outcomes.jsonl") else { return Ok(None) };
    let bad = |line: usize| {
        Problem::new("stage::bad_numbers", format!("the outcomes of `{cell}` cannot be read")).at_line(path, line + 1)
    };
    let one = |(at, fields): (usize, Map<String, Value>)| {
        let count = |name: &str| fields.get(name).and_then(Value::as_u64).ok_or_else(|| bad(at));
        let id = fields.get("id").and_then(Value::as_str).ok_or_else(|| bad(at))?;
        Ok((id.to_string(), (count("correct")?, count("samples")?)))
    };
    lines(path, false, cell)?.into_iter().enumerate().map(one).collect::<Result<Outcomes, Problem>>().map(Some)
}

fn lines(path: &Path, whole: bool, cell: &str) -> Result<Vec<Map<String, Value>>, Problem> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Problem::io("stage::bad_numbers", "read the numbers of", path, &error))?;
    let bad = |line: usize, error: serde_json::Error| {
        Problem::new("stage::bad_numbers", format!("the numbers of `{cell}` cannot be read: {error}"))
            .at_line(path, line)
    };
    if whole {
        return Ok(vec![serde_json::from_str(&text).map_err(|error| bad(1, error))?]);
    }
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(at, line)| serde_json::from_str(line).map_err(|error| bad(at + 1, error)))
        .collect()
}

/// `eval[size=3B,task=math500]`.
fn cell_name(stage: &str, axes: &[(String, String)]) -> String {
    if axes.is_empty() {
        return stage.to_string();
    }
    let inside: Vec<String> = axes.iter().map(|(axis, value)| format!("{axis}={value}")).collect();
    format!("{stage}[{}]", inside.join(","))
}

/// Distinct values in order of first appearance; all-numeric ones ascend.
pub fn distinct(values: impl Iterator<Item = String>) -> Vec<String> {
    let mut known = HashSet::new();
    let mut seen: Vec<String> = values.filter(|value| known.insert(value.clone())).collect();
    sort_numbers(&mut seen);
    seen
}

fn sort_numbers(values: &mut [String]) {
    let numbers: Option<Vec<f64>> = values.iter().map(|value| value.parse().ok()).collect();
    if numbers.is_some_and(|numbers| numbers.iter().all(|number: &f64| !number.is_nan())) {
        values.sort_by(|a, b| {
            let (a, b): (f64, f64) = (a.parse().unwrap_or_default(), b.parse().unwrap_or_default());
            a.total_cmp(&b)
        });
    }
}

/// The correlation of two evaluations over their problems, where these are the same: how much of what one gets
/// right the other gets right too. `None` where they are not, or where one has no variation.
pub fn correlation(one: &Outcomes, other: &Outcomes) -> Option<f64> {
    if one.len() != other.len() || !one.keys().eq(other.keys()) {
        return None;
    }
    let rates = |outcomes: &Outcomes| -> Vec<f64> {
        let rates: Vec<f64> = outcomes.values().map(|(correct, n)| *correct as f64 / *n as f64).collect();
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        rates.into_iter().map(|rate| rate - mean).collect()
    };
    let (x, y) = (rates(one), rates(other));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let size = (dot(&x, &x) * dot(&y, &y)).sqrt();
    (size > 0.0).then(|| (dot(&x, &y) / size).clamp(-1.0, 1.0))
}

/// The exact paired permutation test of two evaluations of the same problems: p that they differ as much by
/// chance. `None` where the problems are not the same.
pub fn paired_p(one: &Outcomes, other: &Outcomes) -> Option<f64> {
    if one.is_empty() || !one.keys().eq(other.keys()) {
        return None;
    }
    let pairs = || one.values().zip(other.values());
    let equal = pairs().all(|((_, n), (_, m))| n == m);
    let difference = |((a, n), (b, m)): (&(u64, u64), &(u64, u64))| match equal {
        true => *a as i64 - *b as i64,
        false => (*a * *m) as i64 - (*b * *n) as i64,
    };
    Some(stats::permutation(&pairs().map(difference).collect::<Vec<_>>()))
}

/// The names a reading can be asked for, for messages: axes, then fields.
pub fn names(readings: &[Reading]) -> String {
    let axes = distinct(readings.iter().flat_map(|reading| reading.axes.iter().map(|(axis, _)| axis.clone())));
    let fields = distinct(readings.iter().flat_map(|reading| reading.fields.keys().cloned()));
    format!("axes: {}; fields: {}", or_none(&axes), or_none(&fields))
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(", ") }
}
