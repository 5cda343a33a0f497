//! `plot`: gathered measurements, scores or training logs as a picture: SVG, PNG and the numbers.
//!
//! The picture is a function of the numbers alone: kuva's process-wide clip ids are renumbered, and
//! the PNG is drawn with the font shipped here, never with one of the machine.

use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::plan::Cell;
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::kind::StageKind;
use crate::stage::kinds::table::{Names, axis_names, csv_line, strings, unknown_axis};
use crate::stage::share::readings::{self, Reading};
use kuva::plot::{BarPlot, LinePlot, LineStyle, ScatterPlot};
use kuva::render::layout::Layout;
use kuva::render::plots::Plot;
use resvg::{tiny_skia, usvg};
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::Arc;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "plot",
    about: "measurements, scores or a training log as a picture: SVG, PNG, CSV",
    recipe: 1,
    yields: ArtifactType::Plot,
    keys: &[
        Key::required(
            "from",
            Type::Gather(&[ArtifactType::Measurements, ArtifactType::Scores, ArtifactType::Model, ArtifactType::Files]),
            "The stages whose numbers are drawn: one name or a list. Of a trained model it is the training log; a `command` counts if it leaves scores.json, measurements.jsonl or log.jsonl.",
        ),
        Key::required("x", Type::Str, "The axis or field along the bottom: `step`, `size`."),
        Key::required(
            "y",
            Type::Any(&[Type::Str, Type::List(&Type::Str)]),
            "The field or fields drawn: `loss`, `[\"alp_chosen\", \"alp_rejected\"]`.",
        ),
        Key::default(
            "series",
            Type::List(&Type::Str),
            "[]",
            "Axes (or `stage`, or fields) by whose values the numbers are told apart; one colour each.",
        ),
        Key::default("mark", Type::Choice(&["line", "bar"]), "\"line\"", "How the numbers are drawn."),
        Key::optional("title", Type::Str, "Above the picture."),
        Key::optional("x_label", Type::Str, "Below it; the name of `x` if absent."),
        Key::optional("y_label", Type::Str, "Beside it; the name of `y`, if it is one, if absent."),
        Key::default(
            "width",
            Type::Int { min: 200, max: 4000 },
            "640",
            "Width in CSS pixels; the PNG has twice as many.",
        ),
        Key::default(
            "height",
            Type::Int { min: 150, max: 4000 },
            "400",
            "Height in CSS pixels; the PNG has twice as many.",
        ),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { misfits, ..StageKind::new(&KIND, run) };

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    x: String,
    y: Names,
    series: Vec<String>,
    mark: Mark,
    #[serde(default)]
    title: Option<String>,
    #[serde(default)]
    x_label: Option<String>,
    #[serde(default)]
    y_label: Option<String>,
    width: u32,
    height: u32,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Mark {
    Line,
    Bar,
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let (x, y, series) = (strings(params, "x").concat(), strings(params, "y"), strings(params, "series"));
    if y.is_empty() {
        broken.push(Broken {
            key: "y",
            message: "nothing is named to be drawn".to_string(),
            help: "`y = \"loss\"`".to_string(),
        });
    }
    if y.contains(&x) || series.contains(&x) {
        broken.push(Broken {
            key: "x",
            message: format!("`{x}` is along the bottom and cannot be drawn or told apart by as well"),
            help: "leave it in one of `x`, `y` and `series`".to_string(),
        });
    }
    broken
}

/// What can be said against a plot from the axes of its inputs alone: where all are scores, `x` and
/// `series` are axes.
pub fn misfits(params: &Params, inputs: &[&Cell]) -> Vec<Broken> {
    if inputs.is_empty() || inputs.iter().any(|cell| cell.kind.yields != ArtifactType::Scores) {
        return Vec::new(); // fields of measurements and logs are known only when they are there
    }
    let known = axis_names(inputs);
    let series = strings(params, "series");
    strings(params, "x")
        .iter()
        .map(|name| ("x", name))
        .chain(series.iter().map(|name| ("series", name)))
        .filter(|(_, name)| *name != "stage" && !known.contains(name))
        .map(|(key, name)| unknown_axis(key, name, &known))
        .collect()
}

/// Writes `plot.svg`, `plot.png` and `plot.csv`.
///
/// # Errors
/// `plot::unknown_name`, `plot::ambiguous`, `plot::nothing`, `plot::not_a_number`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let readings = readings::readings(ctx.inputs("from"))?;
    let lines = lines(&spec, &readings)?;
    let svg = picture(&spec, &lines)?;
    let png = rasterise(&svg)?;
    for (name, bytes) in
        [("plot.csv", numbers(&spec, &lines).into_bytes()), ("plot.png", png), ("plot.svg", svg.into_bytes())]
    {
        let path = ctx.out.join(name);
        std::fs::write(&path, bytes).map_err(|error| Problem::io("plot::write", "write", &path, &error))?;
    }
    Ok(())
}

/// The points of one colour and one field, in the order they are drawn.
struct Line {
    /// Values of the `series` names.
    series: Vec<String>,
    field: String,
    points: Vec<(String, f64)>,
}

fn lines(spec: &Spec, readings: &[Reading]) -> Result<Vec<Line>, Problem> {
    for name in std::iter::once(&spec.x).chain(&spec.series) {
        if readings.iter().all(|reading| reading.label(name).is_none()) {
            return Err(Problem::new("plot::unknown_name", format!("no input has an axis or field `{name}`"))
                .note(readings::names(readings)));
        }
    }
    let label = |reading: &Reading, name: &String| reading.label(name).unwrap_or_else(|| "-".to_string());
    let mut lines: Vec<Line> = Vec::new();
    let mut at: HashMap<(Vec<String>, String), usize> = HashMap::new();
    for field in spec.y.list() {
        if readings.iter().all(|reading| reading.number(&field).is_none()) {
            return Err(Problem::new("plot::unknown_name", format!("no input has a number `{field}`"))
                .note(readings::names(readings)));
        }
        for reading in readings {
            // A line of a log may lack a field (an evaluation only now and then): no point there.
            let (Some(x), Some(y)) = (reading.label(&spec.x), reading.number(&field)) else { continue };
            let series: Vec<String> = spec.series.iter().map(|name| label(reading, name)).collect();
            let line = *at.entry((series.clone(), field.clone())).or_insert_with(|| {
                lines.push(Line { series, field: field.clone(), points: Vec::new() });
                lines.len() - 1
            });
            lines[line].points.push((x, y));
        }
    }
    let order = readings::distinct(readings.iter().filter_map(|reading| reading.label(&spec.x)));
    let rank: HashMap<&String, usize> = order.iter().enumerate().map(|(at, x)| (x, at)).collect();
    for line in &mut lines {
        line.points.sort_by_key(|(x, _)| rank[x]);
        if let Some(twice) = line.points.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let message = format!("two numbers `{}` at `{} = {}`", line.field, spec.x, twice[0].0);
            let varying = varying(spec, readings);
            let problem = Problem::new("plot::ambiguous", message);
            return Err(match varying.is_empty() {
                true => problem.note(readings::names(readings)),
                false => problem.help(format!("tell them apart: `series = [\"{}\"]`", varying.join("\", \""))),
            });
        }
    }
    match lines.is_empty() {
        true => Err(Problem::new("plot::nothing", "there is no number to draw")),
        false => Ok(lines),
    }
}

/// `series` and the axes beside it that have more than one value.
fn varying(spec: &Spec, readings: &[Reading]) -> Vec<String> {
    let axes =
        readings::distinct(readings.iter().flat_map(|reading| reading.axes.iter().map(|(axis, _)| axis.clone())));
    let several = |axis: &String| readings::distinct(readings.iter().filter_map(|r| r.label(axis))).len() > 1;
    let mut names = spec.series.clone();
    names.extend(axes.into_iter().filter(|axis| *axis != spec.x && !spec.series.contains(axis)).filter(several));
    if names == spec.series { Vec::new() } else { names }
}

/// Okabe and Ito's colours, told apart also by those who see red and green alike, without yellow.
const COLOURS: &[&str] = &["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999"];

/// One dash per field.
fn dash(field: usize) -> LineStyle {
    match field % 4 {
        0 => LineStyle::Solid,
        1 => LineStyle::Dashed,
        2 => LineStyle::Dotted,
        _ => LineStyle::DashDot,
    }
}

/// Up to this many points a line shows each as a dot, so that a single checkpoint is seen at all.
const DOTS_MAX: usize = 40;

fn picture(spec: &Spec, lines: &[Line]) -> Result<String, Problem> {
    let fields = spec.y.list();
    let series: Vec<&Vec<String>> = lines.iter().fold(Vec::new(), |mut seen, line| {
        if !seen.contains(&&line.series) {
            seen.push(&line.series);
        }
        seen
    });
    let place = |line: &Line| {
        let by_series = series.iter().position(|s| **s == line.series).unwrap_or_default();
        (by_series, fields.iter().position(|field| *field == line.field).unwrap_or_default())
    };
    // One field: colours tell the series apart. One series: colours tell the fields apart. Both: dashes tell fields.
    let colour = |line: &Line| {
        let (by_series, by_field) = place(line);
        COLOURS[if series.len() == 1 { by_field } else { by_series } % COLOURS.len()]
    };
    let name = |line: &Line| match (series.len(), fields.len()) {
        (_, 1) => line.series.join(", "),
        (1, _) => line.field.clone(),
        _ => format!("{}, {}", line.series.join(", "), line.field),
    };
    let plots = match spec.mark {
        Mark::Line => {
            let xs = places_along(lines);
            let mut plots = Vec::new();
            for line in lines {
                let points: Vec<(f64, f64)> = line.points.iter().map(|(x, y)| (xs.of(x), *y)).collect();
                let style = if series.len() > 1 { dash(place(line).1) } else { LineStyle::Solid };
                let mut plot = LinePlot::new()
                    .with_data(points)
                    .with_color(colour(line))
                    .with_stroke_width(1.8)
                    .with_line_style(style);
                if lines.len() > 1 {
                    plot = plot.with_legend(name(line));
                }
                let dots = (line.points.len() <= DOTS_MAX).then(|| {
                    let points: Vec<(f64, f64)> = line.points.iter().map(|(x, y)| (xs.of(x), *y)).collect();
                    ScatterPlot::new().with_data(points).with_color(colour(line)).with_size(2.8)
                });
                plots.push(Plot::Line(plot));
                plots.extend(dots.map(Plot::Scatter));
            }
            plots
        }
        Mark::Bar => vec![Plot::Bar(bars(lines, colour, name))],
    };
    let mut layout = Layout::auto_from_plots(&plots)
        .with_width(f64::from(spec.width))
        .with_height(f64::from(spec.height))
        .with_legend_box(false)
        .with_x_label(spec.x_label.clone().unwrap_or_else(|| spec.x.clone()));
    let y_label = spec.y_label.clone().or_else(|| (fields.len() == 1).then(|| fields[0].clone()));
    if let Some(label) = y_label {
        layout = layout.with_y_label(label);
    }
    if let Some(title) = &spec.title {
        layout = layout.with_title(title.clone());
    }
    if let (Mark::Line, Along::Names(names)) = (spec.mark, places_along(lines)) {
        let end = names.len() as f64 + 0.5;
        layout = layout.with_x_categories(names).with_x_axis_min(0.5).with_x_axis_max(end);
    }
    Ok(renumber_clips(&kuva::render_to_svg(plots, layout)))
}

/// Where the values of `x` stand: numbers where they are, names side by side.
enum Along {
    Numbers,
    Names(Vec<String>),
}

impl Along {
    fn of(&self, x: &str) -> f64 {
        match self {
            Along::Numbers => x.parse().unwrap_or_default(),
            Along::Names(names) => names.iter().position(|name| name == x).unwrap_or_default() as f64 + 1.0,
        }
    }
}

fn places_along(lines: &[Line]) -> Along {
    let names = readings::distinct(lines.iter().flat_map(|line| line.points.iter().map(|(x, _)| x.clone())));
    match names.iter().all(|name| name.parse::<f64>().is_ok_and(f64::is_finite)) {
        true => Along::Numbers,
        false => Along::Names(names),
    }
}

fn bars<'a>(lines: &'a [Line], colour: impl Fn(&Line) -> &'static str, name: impl Fn(&'a Line) -> String) -> BarPlot {
    let xs = readings::distinct(lines.iter().flat_map(|line| line.points.iter().map(|(x, _)| x.clone())));
    let mut plot = BarPlot::new();
    for x in &xs {
        // A group has a bar for every line, so that colours keep their place; no number is no height.
        let height = |line: &Line| line.points.iter().find(|(at, _)| at == x).map_or(0.0, |(_, y)| *y);
        let group: Vec<(f64, &str)> = lines.iter().map(|line| (height(line), colour(line))).collect();
        plot = plot.with_group(x.as_str(), group);
    }
    if lines.len() > 1 {
        let names: Vec<String> = lines.iter().map(name).collect();
        plot = plot.with_legend(names.iter().map(String::as_str).collect());
    }
    plot
}

/// kuva draws its clip ids from a counter of the process; within one picture they are 0, 1, ... here.
fn renumber_clips(svg: &str) -> String {
    const ID: &str = "kuva-clip-";
    let mut ids: Vec<&str> = Vec::new();
    let mut out = String::with_capacity(svg.len());
    let mut rest = svg;
    while let Some(at) = rest.find(ID) {
        let after = &rest[at + ID.len()..];
        let digits = &after[..after.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(after.len())];
        let known = ids.iter().position(|id| *id == digits).unwrap_or_else(|| {
            ids.push(digits);
            ids.len() - 1
        });
        out.push_str(&rest[..at + ID.len()]);
        out.push_str(&known.to_string());
        rest = &after[digits.len()..];
    }
    out.push_str(rest);
    out
}

/// DejaVu Sans 2.37, under the licence beside it.
static FONT: &[u8] = include_bytes!("assets/DejaVuSans.ttf");

/// Pixels of the PNG for one of the SVG.
const SCALE: f32 = 2.0;

fn rasterise(svg: &str) -> Result<Vec<u8>, Problem> {
    let refused = |why: String| Problem::new("plot::raster", format!("the picture cannot be drawn: {why}"));
    let mut options = usvg::Options { font_family: "DejaVu Sans".to_string(), ..usvg::Options::default() };
    Arc::make_mut(&mut options.fontdb).load_font_data(FONT.to_vec());
    let tree = usvg::Tree::from_str(svg, &options).map_err(|error| refused(error.to_string()))?;
    let size = tree.size();
    let (width, height) = ((size.width() * SCALE).ceil() as u32, (size.height() * SCALE).ceil() as u32);
    let mut pixels =
        tiny_skia::Pixmap::new(width, height).ok_or_else(|| refused(format!("{width} x {height} pixels")))?;
    pixels.fill(tiny_skia::Color::WHITE);
    resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| refused(error.to_string()))
}

/// The numbers drawn, one to a line.
fn numbers(spec: &Spec, lines: &[Line]) -> String {
    let mut header = spec.series.clone();
    header.extend(["field".to_string(), spec.x.clone(), "value".to_string()]);
    let mut text = csv_line(&header);
    for line in lines {
        for (x, y) in &line.points {
            let mut fields = line.series.clone();
            fields.extend([line.field.clone(), x.clone(), y.to_string()]);
            text.push_str(&csv_line(&fields));
        }
    }
    text
}
