//! The numbers of a table, each in its row and column: gathered, averaged, compared, ranked.

use super::published::Published;
use super::spec::{Best, MEAN, Spec};
use crate::problem::Problem;
use crate::stage::share::readings::{self, Outcomes, Reading};
use serde_json::Value;
use std::collections::HashMap;
use std::rc::Rc;

/// What a column shows.
pub struct Column {
    pub title: String,
    pub metric: String,
    what: Shows,
}

enum Shows {
    /// The metric where the axis has this value.
    At(String),
    /// The mean of the metric over the axis.
    Mean,
    /// The field itself.
    Field,
}

#[derive(Clone, Default)]
pub struct Entry {
    pub value: Option<f64>,
    pub interval: Option<Interval>,
    pub published: Option<f64>,
    pub best: bool,
    outcomes: Option<Rc<Outcomes>>,
    /// p of the comparison with the entry of the row that `compare` names.
    pub p: Option<f64>,
    /// By the names of [`COUNTED`]; those that are there.
    pub counts: Vec<(&'static str, u64)>,
    /// Answers the counts are out of.
    total: Option<u64>,
}

/// What is counted of answers beside whether they are right.
pub const COUNTED: [&str; 5] = ["truncated", "unparsed", "undecided", "missing", "judged"];

/// A 95 % interval, as distances from the value it belongs to.
#[derive(Clone, Copy, PartialEq)]
pub struct Interval {
    pub below: f64,
    pub above: f64,
}

impl Interval {
    /// The longer side, if the other is within a quarter of it: what `±` can say without saying too little.
    pub fn one_width(self) -> Option<f64> {
        let (longer, shorter) = (self.below.max(self.above), self.below.min(self.above));
        (longer - shorter <= 0.25 * longer).then_some(longer)
    }
}

impl Entry {
    /// Whether it differs from the row it is compared with.
    pub fn differs(&self) -> bool {
        self.p.is_some_and(|p| p < SIGNIFICANT)
    }
}

/// The p below which a difference is marked.
pub const SIGNIFICANT: f64 = 0.05;

pub struct Grid {
    pub row_names: Vec<String>,
    pub rows: Vec<Vec<String>>,
    pub columns: Vec<Column>,
    /// [row][column]
    pub entries: Vec<Vec<Entry>>,
}

impl Grid {
    pub fn new(spec: &Spec, readings: &[Reading]) -> Result<Grid, Problem> {
        let axis = spec.value.is_some().then(|| spec.columns.iter().find(|name| *name != MEAN)).flatten();
        for name in spec.rows.iter().chain(axis) {
            if readings.iter().all(|reading| reading.label(name).is_none()) {
                return Err(Problem::new("table::unknown_name", format!("no input has an axis or field `{name}`"))
                    .note(readings::names(readings)));
            }
        }
        let label = |reading: &Reading, name: &String| {
            let missing = || spec.missing.get(name).cloned().unwrap_or_else(|| "-".to_string());
            reading.label(name).unwrap_or_else(missing)
        };
        let rows = ordered_rows(spec, readings, label);
        let columns = columns(spec, axis, readings, label);
        let mut entries = vec![vec![Entry::default(); columns.len()]; rows.len()];
        let row_at: HashMap<&Vec<String>, usize> = rows.iter().enumerate().map(|(at, row)| (row, at)).collect();
        let mut taken: HashMap<(usize, Option<String>), &Reading> = HashMap::new();
        for reading in readings {
            let key: Vec<String> = spec.rows.iter().map(|name| label(reading, name)).collect();
            let row = row_at[&key];
            let at = axis.map(|axis| label(reading, axis));
            if let Some(other) = taken.insert((row, at.clone()), reading) {
                return Err(ambiguous(&spec.rows, axis, other, reading));
            }
            let mut counted = !spec.counts;
            for (column, entry) in columns.iter().zip(&mut entries[row]) {
                let here = match &column.what {
                    Shows::At(value) => at.as_ref() == Some(value),
                    Shows::Mean => false,
                    Shows::Field => true,
                };
                if here {
                    entry.value = reading.number(&column.metric);
                    entry.interval = interval(reading, &column.metric).filter(|_| spec.interval);
                    entry.outcomes = reading.outcomes.clone().filter(|_| column.metric == "accuracy");
                    // Once for each reading, however many of its metrics are shown.
                    if !std::mem::replace(&mut counted, true) {
                        let count = |name: &str| reading.fields.get(name).and_then(Value::as_u64);
                        entry.counts = COUNTED.iter().filter_map(|name| Some((*name, count(name)?))).collect();
                        entry.total = count("total");
                    }
                }
            }
        }
        let mut grid = Grid { row_names: spec.rows.clone(), rows, columns, entries };
        if let Some(metric) = grid.unknown_metric() {
            return Err(Problem::new("table::unknown_name", format!("no input has the metric `{metric}`"))
                .note(readings::names(readings)));
        }
        grid.means();
        grid.compare(spec)?;
        Ok(grid)
    }

    /// Tests every entry against that of the row named by `compare`.
    fn compare(&mut self, spec: &Spec) -> Result<(), Problem> {
        if spec.compare.is_empty() {
            return Ok(());
        }
        let with = |row: &Vec<String>| -> Vec<String> {
            let labels = self.row_names.iter().zip(row);
            labels.map(|(name, label)| spec.compare.get(name).unwrap_or(label).clone()).collect()
        };
        let others: Vec<Option<usize>> =
            self.rows.iter().map(|row| self.rows.iter().position(|other| *other == with(row))).collect();
        if others.iter().all(Option::is_none) {
            let labels: Vec<String> = spec.compare.iter().map(|(name, label)| format!("{name}={label}")).collect();
            return Err(Problem::new("table::unknown_name", format!("no row has {}", labels.join(", ")))
                .help("`compare` names labels of a row that is there"));
        }
        for (row, other) in others.into_iter().enumerate() {
            let Some(other) = other.filter(|other| *other != row) else { continue };
            for at in 0..self.columns.len() {
                let pair = self.entries[row][at].outcomes.as_ref().zip(self.entries[other][at].outcomes.as_ref());
                self.entries[row][at].p = pair.and_then(|(one, two)| readings::paired_p(one, two));
            }
        }
        Ok(())
    }

    /// A metric that no cell has a number for.
    fn unknown_metric(&self) -> Option<&str> {
        let has = |metric: &str| {
            self.columns
                .iter()
                .enumerate()
                .any(|(at, column)| column.metric == metric && self.entries.iter().any(|row| row[at].value.is_some()))
        };
        self.columns.iter().map(|column| column.metric.as_str()).find(|metric| !has(metric))
    }

    /// The mean over the columns of an axis, only where every one of them has a number. Columns are
    /// taken as independent: a side of the interval is the root of the sum of squares, over their number.
    fn means(&mut self) {
        for row in &mut self.entries {
            for at in 0..self.columns.len() {
                if !matches!(self.columns[at].what, Shows::Mean) {
                    continue;
                }
                let parts: Vec<Entry> = self
                    .columns
                    .iter()
                    .zip(row.iter())
                    .filter(|(column, _)| {
                        matches!(column.what, Shows::At(_)) && column.metric == self.columns[at].metric
                    })
                    .map(|(_, entry)| entry.clone())
                    .collect();
                row[at].value = mean(parts.iter().map(|part| part.value));
                let sides: Option<Vec<Interval>> = parts.iter().map(|part| part.interval).collect();
                row[at].interval = sides.filter(|sides| !sides.is_empty()).map(|sides| {
                    let mean = |side: fn(&Interval) -> f64| {
                        sides.iter().map(|interval| side(interval).powi(2)).sum::<f64>().sqrt() / sides.len() as f64
                    };
                    Interval { below: mean(|interval| interval.below), above: mean(|interval| interval.above) }
                });
                row[at].published = row[at].published.or_else(|| mean(parts.iter().map(|part| part.published)));
            }
        }
    }

    /// Puts the published numbers beside ours; how many found a place.
    pub fn publish(&mut self, spec: &Spec, published: &Published) -> Result<usize, Problem> {
        let axis = spec.value.is_some().then(|| spec.columns.iter().find(|name| *name != MEAN)).flatten();
        let row_columns: Vec<usize> =
            self.row_names.iter().map(|name| published.column(name)).collect::<Result<_, _>>()?;
        let axis_column = axis.map(|axis| published.column(axis)).transpose()?;
        let metrics: Vec<&str> = self.columns.iter().map(|column| column.metric.as_str()).collect();
        let single = metrics.iter().all(|metric| *metric == metrics[0]);
        let mut matched = 0;
        for at in 0..self.columns.len() {
            let column = &self.columns[at];
            // With one metric the column may also be called `value`.
            let value_column = match published.column(&column.metric) {
                Err(_) if single && published.column("value").is_ok() => published.column("value")?,
                found => found?,
            };
            let wanted = match &column.what {
                Shows::At(value) => Some(value.as_str()),
                Shows::Mean => Some(MEAN),
                Shows::Field => None,
            };
            for (line, record) in &published.records {
                if axis_column.is_some_and(|column| Some(record[column].as_str()) != wanted) {
                    continue;
                }
                let key: Vec<String> = row_columns.iter().map(|column| record[*column].clone()).collect();
                let Some(row) = self.rows.iter().position(|row| *row == key) else { continue };
                self.entries[row][at].published = published.number(*line, &record[value_column])?;
                matched += 1;
            }
        }
        self.means();
        Ok(matched)
    }

    pub fn mark_best(&mut self, spec: &Spec) {
        let one_metric = spec.value.as_ref().is_some_and(|value| value.list().len() == 1);
        let best = spec.best.unwrap_or(if one_metric { Best::Max } else { Best::None });
        if best == Best::None || self.rows.len() < 2 {
            return;
        }
        for at in 0..self.columns.len() {
            let values = || self.entries.iter().filter_map(|row| row[at].value);
            let (Some(low), Some(high)) = (values().reduce(f64::min), values().reduce(f64::max)) else { continue };
            // Where all are equal none is better than another.
            let top = if best == Best::Min { low } else { high };
            for row in &mut self.entries {
                row[at].best = low < high && row[at].value == Some(top);
            }
        }
    }

    pub fn any(&self, has: impl Fn(&Entry) -> bool) -> bool {
        self.entries.iter().flatten().any(has)
    }

    /// A sentence for each thing that was counted and occurs: how often, and the two cells with most of it.
    pub fn count_notes(&self) -> Vec<String> {
        let note = |name: &&'static str| {
            let mut places: Vec<(u64, Option<u64>, String)> = Vec::new();
            let (mut sum, mut total) = (0u64, Some(0u64));
            for (row, entries) in self.rows.iter().zip(&self.entries) {
                for (column, entry) in self.columns.iter().zip(entries) {
                    let Some((_, count)) = entry.counts.iter().find(|(known, _)| known == name) else { continue };
                    sum += count;
                    total = total.zip(entry.total).map(|(sum, total)| sum + total);
                    let mut place = row.join(" ");
                    if let Shows::At(value) = &column.what {
                        place = format!("{place} {value}");
                    }
                    places.push((*count, entry.total, place));
                }
            }
            // A stable sort: of equals the first in the table's order.
            places.sort_by_key(|(count, ..)| std::cmp::Reverse(*count));
            let of = |total: Option<u64>| total.map_or(String::new(), |total| format!(" of {total}"));
            let worst: Vec<String> = places
                .iter()
                .take(2)
                .filter(|(count, ..)| *count > 0)
                .map(|(count, total, place)| format!("{place} ({count}{})", of(*total)))
                .collect();
            (sum > 0).then(|| format!("{name}: {sum}{}, most in {}", of(total), worst.join(", ")))
        };
        COUNTED.iter().filter_map(note).collect()
    }
}

/// Every combination of row labels that occurs, ordered by each label's place in its own order.
fn ordered_rows(spec: &Spec, readings: &[Reading], label: impl Fn(&Reading, &String) -> String) -> Vec<Vec<String>> {
    let ranks: Vec<HashMap<String, usize>> = spec
        .rows
        .iter()
        .map(|name| {
            let values = readings::distinct(readings.iter().map(|reading| label(reading, name)));
            values.into_iter().enumerate().map(|(rank, value)| (value, rank)).collect()
        })
        .collect();
    let rank = |row: &Vec<String>| row.iter().zip(&ranks).map(|(value, ranks)| ranks[value]).collect::<Vec<_>>();
    let mut rows: Vec<Vec<String>> =
        readings.iter().map(|reading| spec.rows.iter().map(|name| label(reading, name)).collect()).collect();
    rows.sort_by_cached_key(rank);
    rows.dedup();
    rows
}

fn columns(
    spec: &Spec,
    axis: Option<&String>,
    readings: &[Reading],
    label: impl Fn(&Reading, &String) -> String,
) -> Vec<Column> {
    let Some(value) = &spec.value else {
        let field = |name: &String| Column { title: name.clone(), metric: name.clone(), what: Shows::Field };
        return spec.columns.iter().map(field).collect();
    };
    let metrics = value.list();
    let title = |head: &str, metric: &str| match metrics.len() {
        1 => head.to_string(),
        _ => format!("{head} {metric}"),
    };
    let mut columns = Vec::new();
    for name in &spec.columns {
        let heads = match axis {
            Some(axis) if axis == name => readings::distinct(readings.iter().map(|reading| label(reading, axis))),
            _ => vec![MEAN.to_string()],
        };
        for head in heads {
            for metric in &metrics {
                let what = if name == MEAN { Shows::Mean } else { Shows::At(head.clone()) };
                columns.push(Column { title: title(&head, metric), metric: metric.clone(), what });
            }
        }
    }
    columns
}

fn ambiguous(rows: &[String], axis: Option<&String>, one: &Reading, other: &Reading) -> Problem {
    let differing = one.axes.iter().find(|(name, value)| {
        !rows.contains(name) && Some(name) != axis && other.axes.iter().any(|(n, v)| n == name && v != value)
    });
    let problem = Problem::new(
        "table::ambiguous",
        format!("`{}` and `{}` fall in the same cell of the table", one.cell, other.cell),
    );
    match differing {
        Some((name, _)) => problem.help(format!("add `{name}` to `rows`")),
        None if one.cell == other.cell => problem.help("add the field by which its lines differ to `rows`: `\"step\"`"),
        None => problem.help("add `stage` to `rows`"),
    }
}

/// The mean of all, if all are there and there is at least one.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.collect::<Option<_>>()?;
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The interval of a reading's metric as distances; none where the number does not lie in it.
fn interval(reading: &Reading, metric: &str) -> Option<Interval> {
    let (value, (low, high)) = (reading.number(metric)?, reading.interval(metric)?);
    // A bound that was rounded may lie on the wrong side by its last digit.
    let inside = |distance: f64| distance >= -1e-6;
    let (below, above) = (value - low, high - value);
    (inside(below) && inside(above)).then(|| Interval { below: below.max(0.0), above: above.max(0.0) })
}
