//! `table`: gathered scores or measurements as the rows and columns a paper prints.
//!
//! A row is one combination of the labels in `rows`. With `value` the columns are the values of one
//! axis (and their mean); without it they are fields by name. Two readings never share a cell: that
//! is an error which names the axis left out, not an average nobody asked for.
//! With `compare`, accuracies are tested against those of another row, problem by problem.

use super::Context;
use super::readings::{self, Outcomes, Reading};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::plan::Cell;
use crate::problem::{Exit, Problem};
use comfy_table::{Cell as TextCell, CellAlignment, ContentArrangement, LineStyle, Table, presets};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::Path;
use std::rc::Rc;

pub const KIND: Kind = Kind {
    name: "table",
    about: "scores or measurements as a table: Markdown, CSV, LaTeX, text, JSON",
    recipe: 2,
    yields: ArtifactType::Table,
    keys: &[
        Key::required(
            "from",
            Type::Gather(&[ArtifactType::Scores, ArtifactType::Measurements, ArtifactType::Files]),
            "The stages whose numbers are shown: one name or a list. A `command` counts if it leaves scores.json or measurements.jsonl.",
        ),
        Key::required(
            "rows",
            Type::List(&Type::Str),
            "Names of axes (or `stage`, or fields of measurements such as `step`); a row per combination of their values.",
        ),
        Key::required(
            "columns",
            Type::List(&Type::Str),
            "With `value`: one axis, whose values are the columns, and `mean` for the mean over them. Without: names of fields.",
        ),
        Key::optional(
            "value",
            Type::Any(&[Type::Str, Type::List(&Type::Str)]),
            "The metric (or metrics) shown in the columns of an axis.",
        ),
        Key::optional(
            "missing",
            Type::Map(&Type::Str),
            "What stands for an axis that an input does not have, by axis: `{ data = \"base\" }`. Without it, `-`.",
        ),
        Key::optional(
            "published",
            Type::Source(&["path"]),
            "CSV with a column for each of `rows`, one for the axis of `columns` and one for the value; shown beside ours in brackets.",
        ),
        Key::default("decimals", Type::Int { min: 0, max: 9 }, "1", "Digits after the point."),
        Key::optional("caption", Type::Str, "A line above the table."),
        Key::optional(
            "best",
            Type::Choice(&["max", "min", "none"]),
            "Which number of each column is marked. With one metric in `value` the default is `max`, else `none`.",
        ),
        Key::optional(
            "compare",
            Type::Map(&Type::Str),
            "The row that each row is compared with, by the labels in which they differ: `{ data = \"base\" }`. An accuracy that differs from it on the same problems (exact paired permutation test, p < 0.05) is marked.",
        ),
        Key::default("interval", Type::Bool, "false", "Show half the 95 % interval beside each accuracy."),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    rows: Vec<String>,
    columns: Vec<String>,
    #[serde(default)]
    value: Option<Names>,
    #[serde(default)]
    missing: BTreeMap<String, String>,
    /// Read through the context's sources; here only whether there is one.
    #[serde(default)]
    published: Option<String>,
    decimals: usize,
    #[serde(default)]
    caption: Option<String>,
    #[serde(default)]
    best: Option<Best>,
    #[serde(default)]
    compare: BTreeMap<String, String>,
    interval: bool,
}

/// One name or a list of them.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
pub(super) enum Names {
    One(String),
    Many(Vec<String>),
}

impl Names {
    pub(super) fn list(&self) -> Vec<String> {
        match self {
            Names::One(name) => vec![name.clone()],
            Names::Many(names) => names.clone(),
        }
    }
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Best {
    Max,
    Min,
    None,
}

/// The name that stands for the mean over the columns of an axis.
const MEAN: &str = "mean";

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let mut wrong = |key: &'static str, message: String, help: &str| {
        broken.push(Broken { key, message, help: help.to_string() });
    };
    let (rows, columns) = (strings(params, "rows"), strings(params, "columns"));
    if rows.is_empty() {
        wrong("rows", "a table needs something in its rows".into(), "`rows = [\"size\", \"data\"]`");
    }
    if let Some(twice) = rows.iter().find(|row| columns.contains(row)) {
        wrong("columns", format!("`{twice}` stands both in `rows` and in `columns`"), "leave it in one of the two");
    }
    let value = strings(params, "value");
    if params.contains_key("value") {
        if value.is_empty() {
            wrong("value", "no metric is named".into(), "`value = \"accuracy\"`");
        }
        let axes = columns.iter().filter(|column| *column != MEAN).count();
        if axes != 1 {
            wrong(
                "columns",
                format!("with `value`, `columns` names exactly one axis beside `mean`; these are {axes}"),
                "`columns = [\"task\", \"mean\"]`, or leave out `value` to show fields by name",
            );
        }
    } else if columns.is_empty() {
        wrong(
            "columns",
            "a table needs columns".into(),
            "`columns = [\"task\", \"mean\"]` with `value = \"accuracy\"`",
        );
    } else if columns.iter().any(|column| column == MEAN) {
        wrong("columns", "`mean` needs `value`: the metric of which it is the mean".into(), "`value = \"accuracy\"`");
    }
    let shown = if params.contains_key("value") { &value } else { &columns };
    if params.get("interval") == Some(&Value::Bool(true)) && !shown.iter().any(|metric| metric == "accuracy") {
        wrong("interval", "only `accuracy` has an interval".into(), "`value = \"accuracy\"`, or leave out `interval`");
    }
    if let Some(compare) = params.get("compare").and_then(Value::as_object) {
        if let Some(other) = compare.keys().find(|name| !rows.contains(name)) {
            wrong(
                "compare",
                format!("`{other}` is none of `rows`, and rows are what is compared"),
                &format!("one of: {}", rows.join(", ")),
            );
        }
        if !shown.iter().any(|metric| metric == "accuracy") {
            wrong("compare", "only accuracies are compared".into(), "`value = \"accuracy\"`, or leave out `compare`");
        }
    }
    broken
}

/// A string, or the strings of a list, at `key`; empty if absent.
pub(super) fn strings(params: &Params, key: &str) -> Vec<String> {
    match params.get(key) {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => many.iter().filter_map(|name| name.as_str().map(str::to_string)).collect(),
        _ => Vec::new(),
    }
}

/// What can be said against a table from the axes of its inputs alone, before anything has run:
/// names that no input has, and scores that would fall in the same cell.
pub fn misfits(params: &Params, inputs: &[&Cell]) -> Vec<Broken> {
    let mut broken = Vec::new();
    let rows = strings(params, "rows");
    let axis = if params.contains_key("value") {
        strings(params, "columns").into_iter().find(|column| column != MEAN)
    } else {
        None
    };
    if inputs.is_empty() || inputs.iter().any(|cell| cell.kind.yields != ArtifactType::Scores) {
        return broken; // fields of measurements are known only when they are there
    }
    let known = axis_names(inputs);
    for (key, name) in rows.iter().map(|row| ("rows", row)).chain(axis.iter().map(|axis| ("columns", axis))) {
        if name != "stage" && !known.contains(name) {
            broken.push(unknown_axis(key, name, &known));
        }
    }
    if !broken.is_empty() {
        return broken;
    }
    let mut taken: HashMap<Vec<Option<String>>, &Cell> = HashMap::new();
    for cell in inputs {
        let place = rows.iter().chain(&axis).map(|name| label_of(cell, name)).collect();
        if let Some(other) = taken.insert(place, cell) {
            broken.push(Broken {
                key: "rows",
                message: format!("`{other}` and `{cell}` fall in the same cell of the table"),
                help: apart(&rows, axis.as_ref(), other, cell),
            });
            break;
        }
    }
    broken
}

fn label_of(cell: &Cell, name: &str) -> Option<String> {
    match cell.axes.get(name) {
        Some(value) => Some(value.to_string()),
        None => (name == "stage").then(|| cell.stage.clone()),
    }
}

pub(super) fn axis_names(inputs: &[&Cell]) -> Vec<String> {
    readings::distinct(inputs.iter().flat_map(|cell| cell.axes.0.iter().map(|(axis, _)| axis.clone())))
}

pub(super) fn unknown_axis(key: &'static str, name: &str, known: &[String]) -> Broken {
    let near = known.iter().find(|axis| strsim::osa_distance(axis, name) <= 2);
    Broken {
        key,
        message: format!("no input has the axis `{name}`"),
        help: match near {
            Some(near) => format!("an axis with a similar name exists: `{near}`"),
            None => format!("axes of the inputs: {}", known.join(", ")),
        },
    }
}

/// Names the axis by which two cells differ.
fn apart(rows: &[String], axis: Option<&String>, one: &Cell, other: &Cell) -> String {
    let differing = one.axes.0.iter().find(|(name, value)| {
        !rows.contains(name) && Some(name) != axis && other.axes.get(name).is_some_and(|theirs| theirs != value)
    });
    let name = differing.map_or("stage", |(name, _)| name.as_str());
    format!("add `{name}` to `rows`")
}

/// Writes `table.{md,csv,tex,txt,json}`.
///
/// # Errors
/// `table::unknown_name`, `table::ambiguous`, `table::published`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let readings = readings::readings(ctx.inputs("from"))?;
    let mut grid = Grid::new(&spec, &readings)?;
    if spec.published.is_some() {
        let path = ctx.sources.get("published").ok_or_else(|| {
            Problem::new("table::published", "the published numbers were not found").exit(Exit::Missing)
        })?;
        let matched = grid.publish(&spec, &Published::read(path)?)?;
        if matched == 0 {
            ctx.progress.warn("none of the published numbers belongs to a row and column of this table");
        }
    }
    grid.mark_best(&spec);
    for (name, text) in [
        ("table.md", grid.markdown(&spec)),
        ("table.csv", grid.csv(&spec)),
        ("table.tex", grid.latex(&spec)),
        ("table.txt", grid.text(&spec)),
        ("table.json", grid.json(&spec)),
    ] {
        let path = ctx.out.join(name);
        std::fs::write(&path, text).map_err(|error| Problem::io("table::write", "write", &path, &error))?;
    }
    Ok(())
}

/// What a column shows.
struct Column {
    title: String,
    metric: String,
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
struct Entry {
    value: Option<f64>,
    half_width: Option<f64>,
    published: Option<f64>,
    best: bool,
    outcomes: Option<Rc<Outcomes>>,
    /// p of the comparison with the entry of the row that `compare` names.
    p: Option<f64>,
}

impl Entry {
    /// Whether it differs from the row it is compared with.
    fn differs(&self) -> bool {
        self.p.is_some_and(|p| p < SIGNIFICANT)
    }
}

/// The p below which a difference is marked.
const SIGNIFICANT: f64 = 0.05;

struct Grid {
    row_names: Vec<String>,
    rows: Vec<Vec<String>>,
    columns: Vec<Column>,
    /// [row][column]
    entries: Vec<Vec<Entry>>,
}

impl Grid {
    fn new(spec: &Spec, readings: &[Reading]) -> Result<Grid, Problem> {
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
            for (column, entry) in columns.iter().zip(&mut entries[row]) {
                let here = match &column.what {
                    Shows::At(value) => at.as_ref() == Some(value),
                    Shows::Mean => false,
                    Shows::Field => true,
                };
                if here {
                    entry.value = reading.number(&column.metric);
                    entry.half_width = reading.half_width(&column.metric).filter(|_| spec.interval);
                    entry.outcomes = reading.outcomes.clone().filter(|_| column.metric == "accuracy");
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
    /// taken as independent: the half width is the root of the sum of squares, over their number.
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
                let squares: Option<f64> = parts.iter().map(|part| part.half_width.map(|half| half * half)).sum();
                row[at].half_width = squares.filter(|_| !parts.is_empty()).map(|sum| sum.sqrt() / parts.len() as f64);
                row[at].published = row[at].published.or_else(|| mean(parts.iter().map(|part| part.published)));
            }
        }
    }

    /// Puts the published numbers beside ours; how many found a place.
    fn publish(&mut self, spec: &Spec, published: &Published) -> Result<usize, Problem> {
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

    fn mark_best(&mut self, spec: &Spec) {
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

    fn any(&self, has: impl Fn(&Entry) -> bool) -> bool {
        self.entries.iter().flatten().any(has)
    }

    fn markdown(&self, spec: &Spec) -> String {
        let mut text = String::new();
        if let Some(caption) = &spec.caption {
            let _ = writeln!(text, "{caption}\n");
        }
        let titles = self.row_names.iter().cloned().chain(self.columns.iter().map(|column| column.title.clone()));
        let _ = writeln!(text, "| {} |", titles.map(|title| markdown_escape(&title)).collect::<Vec<_>>().join(" | "));
        let rules = self.row_names.iter().map(|_| "---").chain(self.columns.iter().map(|_| "---:"));
        let _ = writeln!(text, "| {} |", rules.collect::<Vec<_>>().join(" | "));
        for (row, entries) in self.rows.iter().zip(&self.entries) {
            let labels = row.iter().map(|label| markdown_escape(label));
            let cells = entries.iter().map(|entry| {
                let number = number(entry.value, spec.decimals);
                let mut cell = if entry.best { format!("**{number}**") } else { number };
                cell.push_str(if entry.differs() { "†" } else { "" });
                if let Some(half) = entry.half_width {
                    let _ = write!(cell, " ± {half:.*}", spec.decimals);
                }
                if let Some(published) = entry.published {
                    let _ = write!(cell, " ({published:.*})", spec.decimals);
                }
                cell
            });
            let _ = writeln!(text, "| {} |", labels.chain(cells).collect::<Vec<_>>().join(" | "));
        }
        let notes = self.notes("**bold**", spec);
        if !notes.is_empty() {
            let _ = writeln!(text, "\n{}.", notes.join("; "));
        }
        text
    }

    fn csv(&self, spec: &Spec) -> String {
        let (with_half, with_published) =
            (self.any(|entry| entry.half_width.is_some()), self.any(|entry| entry.published.is_some()));
        let mut header = self.row_names.clone();
        for column in &self.columns {
            header.push(column.title.clone());
            header.extend(with_half.then(|| format!("{} interval", column.title)));
            header.extend(with_published.then(|| format!("{} published", column.title)));
        }
        let mut text = csv_line(&header);
        let plain = |value: Option<f64>| value.map_or(String::new(), |value| number(Some(value), spec.decimals));
        for (row, entries) in self.rows.iter().zip(&self.entries) {
            let mut fields = row.clone();
            for entry in entries {
                fields.push(plain(entry.value));
                fields.extend(with_half.then(|| plain(entry.half_width)));
                fields.extend(with_published.then(|| plain(entry.published)));
            }
            text.push_str(&csv_line(&fields));
        }
        text
    }

    fn latex(&self, spec: &Spec) -> String {
        let mut text = String::from("% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n");
        if let Some(caption) = &spec.caption {
            let _ = writeln!(text, "\\caption{{{}}}", latex_escape(caption));
        }
        let _ = writeln!(
            text,
            "\\begin{{tabular}}{{{}{}}}\n\\toprule",
            "l".repeat(self.row_names.len()),
            "r".repeat(self.columns.len())
        );
        let titles = self.row_names.iter().chain(self.columns.iter().map(|column| &column.title));
        let _ = writeln!(text, "{} \\\\\n\\midrule", titles.map(|t| latex_escape(t)).collect::<Vec<_>>().join(" & "));
        for (at, (row, entries)) in self.rows.iter().zip(&self.entries).enumerate() {
            if self.row_names.len() > 1 && at > 0 && self.rows[at - 1][0] != row[0] {
                text.push_str("\\midrule\n");
            }
            let labels = row.iter().map(|label| latex_escape(label));
            let cells = entries.iter().map(|entry| {
                let value = latex_escape(&number(entry.value, spec.decimals));
                let mut cell = if entry.best { format!("\\textbf{{{value}}}") } else { value };
                cell.push_str(if entry.differs() { "$^\\dagger$" } else { "" });
                if let Some(half) = entry.half_width {
                    let _ = write!(cell, " $\\pm$ {half:.*}", spec.decimals);
                }
                if let Some(published) = entry.published {
                    let _ = write!(cell, " ({published:.*})", spec.decimals);
                }
                cell
            });
            let _ = writeln!(text, "{} \\\\", labels.chain(cells).collect::<Vec<_>>().join(" & "));
        }
        text.push_str("\\bottomrule\n\\end{tabular}\n\\end{table}\n");
        text
    }

    /// For a terminal: a label equal to the one above it in the same group is left blank, numbers
    /// line up at the point, and what the marks mean stands below.
    fn text(&self, spec: &Spec) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.style_mut().header_separator = LineStyle::new('─', '─', '─', '─');
        let header =
            self.row_names.iter().map(TextCell::new).chain(
                self.columns.iter().map(|column| TextCell::new(&column.title).set_alignment(CellAlignment::Right)),
            );
        table.set_header(header.collect::<Vec<_>>());
        let cells = self.text_cells(spec);
        for (at, row) in self.rows.iter().enumerate() {
            let repeated =
                |depth: usize| at > 0 && depth + 1 < row.len() && self.rows[at - 1][..=depth] == row[..=depth];
            let labels = row.iter().enumerate().map(|(depth, label)| if repeated(depth) { "" } else { label.as_str() });
            let numbers = cells[at].iter().map(|cell| TextCell::new(cell).set_alignment(CellAlignment::Right));
            table.add_row(labels.map(TextCell::new).chain(numbers).collect::<Vec<_>>());
        }
        let mut text = String::new();
        if let Some(caption) = &spec.caption {
            let _ = writeln!(text, "{caption}");
        }
        let last = self.row_names.len() + self.columns.len() - 1;
        for (at, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, if at < last { 2 } else { 0 }));
        }
        for line in table.lines() {
            // The layout leaves a place for a border on the left.
            let line: String = line.chars().skip(1).collect();
            let _ = writeln!(text, "{}", line.replace(NO_BREAK_SPACE, " ").trim_end());
        }
        let notes = self.notes("*", spec);
        if !notes.is_empty() {
            let _ = writeln!(text, "{}", notes.join("; "));
        }
        text
    }

    /// Cells of equal width within a column: number, mark, interval, published.
    fn text_cells(&self, spec: &Spec) -> Vec<Vec<String>> {
        let mut cells = vec![Vec::with_capacity(self.columns.len()); self.rows.len()];
        for at in 0..self.columns.len() {
            let column = || self.entries.iter().map(|row| &row[at]);
            let (marks, daggers) = (column().any(|entry| entry.best), column().any(Entry::differs));
            let half = |entry: &Entry| entry.half_width.map_or(String::new(), |h| format!(" ±{h:.*}", spec.decimals));
            let published =
                |entry: &Entry| entry.published.map_or(String::new(), |p| format!(" ({p:.*})", spec.decimals));
            let width = |text: &dyn Fn(&Entry) -> String| column().map(|e| text(e).chars().count()).max().unwrap_or(0);
            let (half_width, published_width) = (width(&half), width(&published));
            for (row, entry) in column().enumerate() {
                let mark = match (marks, entry.best) {
                    (false, _) => "",
                    (true, true) => "*",
                    (true, false) => NO_BREAK_SPACE,
                };
                let dagger = match (daggers, entry.differs()) {
                    (false, _) => "",
                    (true, true) => "†",
                    (true, false) => NO_BREAK_SPACE,
                };
                let number = number(entry.value, spec.decimals);
                let tail = format!("{:>half_width$}{:>published_width$}", half(entry), published(entry));
                cells[row].push(format!("{number}{mark}{dagger}{}", tail.replace(' ', NO_BREAK_SPACE)));
            }
        }
        cells
    }

    /// What the marks mean, of those that occur.
    fn notes(&self, best: &str, spec: &Spec) -> Vec<String> {
        let mut notes = Vec::new();
        if self.any(|entry| entry.best) {
            notes.push(format!("{best}: best of the column"));
        }
        if self.any(Entry::differs) {
            let with: Vec<String> = spec.compare.iter().map(|(name, label)| format!("{name}={label}")).collect();
            notes.push(format!("†: differs from {} (paired, p < {SIGNIFICANT})", with.join(", ")));
        }
        if self.any(|entry| entry.half_width.is_some()) {
            notes.push("±: half of the 95 % interval".to_string());
        }
        if self.any(|entry| entry.published.is_some()) {
            notes.push("in brackets: as published".to_string());
        }
        if self.any(|entry| entry.value.is_none()) {
            notes.push("-: not measured".to_string());
        }
        notes
    }

    fn json(&self, spec: &Spec) -> String {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .zip(&self.entries)
            .map(|(row, entries)| {
                let labels: Map<String, Value> =
                    self.row_names.iter().cloned().zip(row.iter().map(|label| json!(label))).collect();
                let values: Map<String, Value> = self
                    .columns
                    .iter()
                    .zip(entries)
                    .map(|(column, entry)| {
                        let mut cell = Map::from_iter([("value".to_string(), json!(entry.value))]);
                        cell.extend(entry.half_width.map(|half| ("interval".to_string(), json!(half))));
                        cell.extend(entry.published.map(|value| ("published".to_string(), json!(value))));
                        cell.extend(entry.p.map(|p| ("p".to_string(), json!(p))));
                        cell.extend(entry.best.then(|| ("best".to_string(), json!(true))));
                        (column.title.clone(), Value::Object(cell))
                    })
                    .collect();
                json!({ "labels": labels, "values": values })
            })
            .collect();
        let titles: Vec<&String> = self.columns.iter().map(|column| &column.title).collect();
        let table = json!({ "caption": spec.caption, "rows": self.row_names, "columns": titles, "cells": rows });
        format!("{table:#}\n")
    }
}

/// Kept by the text layout, which trims ordinary spaces; looks like one.
const NO_BREAK_SPACE: &str = "\u{a0}";

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

/// `-` for no number; never `-0.0`.
fn number(value: Option<f64>, decimals: usize) -> String {
    let Some(value) = value else { return "-".to_string() };
    let text = format!("{value:.decimals$}");
    match text.strip_prefix('-') {
        Some(rest) if rest.chars().all(|digit| matches!(digit, '0' | '.')) => rest.to_string(),
        _ => text,
    }
}

fn markdown_escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace('\n', " ")
}

fn latex_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => escaped.extend(['\\', letter]),
            '~' => escaped.push_str("\\textasciitilde{}"),
            '^' => escaped.push_str("\\textasciicircum{}"),
            '\\' => escaped.push_str("\\textbackslash{}"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

/// One line of CSV (RFC 4180), quoted where needed.
pub(super) fn csv_line(fields: &[String]) -> String {
    let quoted: Vec<String> = fields
        .iter()
        .map(|field| match field.contains([',', '"', '\n', '\r']) {
            true => format!("\"{}\"", field.replace('"', "\"\"")),
            false => field.clone(),
        })
        .collect();
    format!("{}\n", quoted.join(","))
}

/// A CSV file of published numbers.
struct Published<'a> {
    path: &'a Path,
    header: Vec<String>,
    /// With 1-based line numbers.
    records: Vec<(usize, Vec<String>)>,
}

impl Published<'_> {
    fn read(path: &Path) -> Result<Published<'_>, Problem> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Problem::io("table::published", "read the published numbers in", path, &error))?;
        let mut lines = text.trim_start_matches('\u{feff}').lines().enumerate().filter(|(_, line)| {
            let line = line.trim();
            !line.is_empty() && !line.starts_with('#')
        });
        let header = match lines.next() {
            Some((_, line)) => csv_fields(line),
            None => return Err(Problem::new("table::published", "the published numbers are empty").at_file(path)),
        };
        let mut records = Vec::new();
        for (at, line) in lines {
            let fields = csv_fields(line);
            if fields.len() != header.len() {
                let message = format!("expected {} fields, found {}", header.len(), fields.len());
                return Err(Problem::new("table::published", message).at_line(path, at + 1));
            }
            records.push((at + 1, fields));
        }
        Ok(Published { path, header, records })
    }

    fn column(&self, name: &str) -> Result<usize, Problem> {
        self.header.iter().position(|header| header == name).ok_or_else(|| {
            Problem::new("table::published", format!("the published numbers have no column `{name}`"))
                .at_line(self.path, 1)
                .note(format!("columns: {}", self.header.join(", ")))
        })
    }

    /// `None` for an empty field or `-`.
    fn number(&self, line: usize, text: &str) -> Result<Option<f64>, Problem> {
        if text.is_empty() || text == "-" {
            return Ok(None);
        }
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(Problem::new("table::published", format!("`{text}` is not a number")).at_line(self.path, line)),
        }
    }
}

/// The fields of one line, trimmed; quotes may hold commas and doubled quotes, not line ends.
fn csv_fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_string()),
            _ => field.push(letter),
        }
    }
    fields.push(field.trim().to_string());
    fields
}
