//! `table`: gathered scores or measurements as the rows and columns a paper prints.
//!
//! A row is one combination of the labels in `rows`. With `value` the columns are the values of one
//! axis (and their mean); without it they are fields by name. Two readings never share a cell: that
//! is an error which names the axis left out, not an average nobody asked for.
//! With `compare`, accuracies are tested against those of another row, problem by problem.
//!
//! `grid` gathers the numbers, `write` makes text of them, `published` reads those of a paper.

mod grid;
mod published;
mod spec;
mod write;

use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::plan::Cell;
use crate::problem::{Exit, Problem};
use crate::stage::context::Context;
use crate::stage::kind::StageKind;

use crate::stage::share::readings;
use grid::Grid;
use published::Published;
use serde_json::Value;
use spec::{MEAN, Spec};
use std::collections::HashMap;

pub(in crate::stage) use spec::Names;
pub(in crate::stage) use write::csv_line;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "table",
    about: "scores or measurements as a table: Markdown, CSV, LaTeX, text, JSON",
    recipe: 3,
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
        Key::default(
            "interval",
            Type::Bool,
            "false",
            "Show the 95 % interval beside each accuracy: `46.6 ± 3.4` (its longer side), or both sides where they differ by more than a quarter. In CSV its two ends.",
        ),
        Key::default(
            "counts",
            Type::Bool,
            "false",
            "Count below the table the answers that were truncated, unparsed, undecided, missing or judged, and say where most are.",
        ),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { misfits, ..StageKind::new(&KIND, run) };

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
pub(in crate::stage) fn strings(params: &Params, key: &str) -> Vec<String> {
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

pub(in crate::stage) fn axis_names(inputs: &[&Cell]) -> Vec<String> {
    readings::distinct(inputs.iter().flat_map(|cell| cell.axes.0.iter().map(|(axis, _)| axis.clone())))
}

pub(in crate::stage) fn unknown_axis(key: &'static str, name: &str, known: &[String]) -> Broken {
    let near = known.iter().find(|axis| strsim::osa_distance(axis, name) <= 2);
    Broken {
        key,
        message: format!("no input has the axis `{name}`"),
        help: match near {
            Some(near) => format!("an axis with a similar name exists: `{near}`"),
            None if known.is_empty() => "the inputs have no axes; `stage` tells one stage from another".into(),
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
