//! Stages to cells.
//!
//! Three passes. *Links*: which stages each stage names, in any of its cells; dangling names, wrong
//! artifacts and cycles are found here. *Cells*: stage by stage, dependencies first, the points of each stage
//! are joined from its inputs' cells and its own axes, less what `skip` names. *Parameters*: `{axis}`
//! is filled in, once per distinct filling.
//!
//! A stage with a problem makes no cells, nor do those that need it, and nothing is said about the
//! latter: the cause has been told. Every pass goes on past problems, so that one run tells all.

mod links;
mod params;

use super::axes::{AxisId, Domain, Interner, Point, ValueId, View, at};
use super::cell::{AxisValue, Cell, CellId, Plan};
use crate::manifest::template;
use crate::manifest::value::{Node, Origin, Value};
use crate::manifest::{Arity, Manifest, Stage, names_stage, sort, words};
use crate::problem::{Exit, Problem};
use std::collections::{BTreeSet, HashMap, HashSet};

/// Cells a plan may have: more is taken for a mistake in the axes.
pub const CELLS_MAX: usize = 100_000;
/// Cycles told in one run.
const CYCLES_MAX: usize = 10;

/// The plan of a manifest, or every problem of the manifest and of the plan, sorted by place.
pub fn resolve(manifest: &Manifest) -> Result<Plan, Vec<Problem>> {
    let mut resolver = Resolver::new(manifest);
    let order = resolver.links();
    for stage in order {
        resolver.stage(stage);
    }
    let mut problems = resolver.problems;
    problems.extend(manifest.problems.iter().cloned());
    if problems.is_empty() {
        return Ok(Plan::new(manifest.title.clone(), resolver.cells));
    }
    sort(&mut problems, &manifest.files);
    Err(problems)
}

struct Resolver<'m> {
    manifest: &'m Manifest,
    ids: Interner,
    /// The axes each stage declares.
    own: Vec<Vec<(AxisId, Vec<ValueId>)>>,
    /// All axes of each stage before `skip`.
    domains: Vec<Domain>,
    /// No cells can be made of it.
    tainted: Vec<bool>,
    /// The cells of each stage made so far.
    made: Vec<std::ops::Range<CellId>>,
    cells: Vec<Cell>,
    points: Vec<Point>,
    /// For cells that yield a model: the chain, itself last.
    chains: Vec<Vec<CellId>>,
    defaults: HashMap<&'static str, Value>,
    problems: Vec<Problem>,
    too_many: bool,
}

/// What a filled-in text comes to.
#[derive(Clone, Copy)]
enum Target {
    /// Cells: index into [`StagePoints::views`].
    View(usize),
    /// No stage, but something else that the key takes.
    Value,
}

/// A point of a stage in the making, with what each reference came to there.
#[derive(Clone, Default)]
struct Row {
    point: Point,
    picks: Vec<(usize, Vec<CellId>)>,
}

impl<'m> Resolver<'m> {
    fn new(manifest: &'m Manifest) -> Self {
        let mut ids = Interner::default();
        let own: Vec<_> = manifest.stages.iter().map(|stage| own_axes(stage, &mut ids)).collect();
        let tainted = manifest.stages.iter().map(|stage| stage.broken_axes || stage.kind.is_none()).collect();
        Resolver {
            manifest,
            ids,
            domains: own.iter().map(|own| Domain(own.clone())).collect(),
            own,
            tainted,
            made: vec![0..0; manifest.stages.len()],
            cells: Vec::new(),
            points: Vec::new(),
            chains: Vec::new(),
            defaults: HashMap::new(),
            problems: Vec::new(),
            too_many: false,
        }
    }

    fn stage_of(&self, stage: usize) -> &'m Stage {
        &self.manifest.stages[stage]
    }

    fn problem(&self, code: &'static str, message: impl Into<String>, at: &Origin) -> Problem {
        let problem = Problem::new(code, message).exit(Exit::Usage);
        problem.at_span(self.manifest.path_of(at.file), at.span.clone(), "")
    }

    fn report(&mut self, problem: Problem) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Makes the cells of a stage whose inputs are made.
    fn stage(&mut self, stage: usize) {
        self.made[stage] = self.cells.len()..self.cells.len();
        if self.tainted[stage] {
            return;
        }
        let mut points =
            StagePoints { stage, views: Vec::new(), by_key: HashMap::new(), targets: HashMap::new(), ok: true };
        let rows = self.rows(&mut points);
        if !points.ok {
            self.tainted[stage] = true;
            return;
        }
        if rows.is_empty() {
            self.tainted[stage] = true;
            let owner = self.stage_of(stage);
            let message = format!("no cell is left of stage `{}`", owner.name);
            let empty = self.problem("plan::no_cells", message, &owner.at);
            let note = "its inputs have no values of their axes in common, or `skip` names every cell";
            self.report(empty.note(note));
            return;
        }
        if self.cells.len() + rows.len() > CELLS_MAX {
            self.tainted[stage] = true;
            self.too_many(stage, self.cells.len() + rows.len());
            return;
        }
        self.push_cells(stage, rows);
    }

    fn too_many(&mut self, stage: usize, count: usize) {
        if std::mem::replace(&mut self.too_many, true) {
            return;
        }
        let owner = self.stage_of(stage);
        let at = owner.table.get("axes").map_or(&owner.at, |entry| &entry.at);
        let message = format!(
            "with stage `{}` the plan has {count} cells or more, the most it may have is {CELLS_MAX}",
            owner.name
        );
        let problem = self.problem("plan::too_many_cells", message, at).help("give an axis fewer values");
        self.report(problem);
    }

    /// The points of a stage and what each reference comes to there.
    fn rows(&mut self, points: &mut StagePoints) -> Vec<Row> {
        let stage = points.stage;
        let refs = &self.stage_of(stage).found.refs;
        let (plain, templated): (Vec<usize>, Vec<usize>) = (0..refs.len())
            .filter(|&i| refs[i].arity == Arity::One)
            .partition(|&i| template::axes(&refs[i].text).is_empty());
        let mut skips = self.skips(stage);
        let mut rows = vec![Row::default()];
        for i in plain {
            rows = self.join(points, rows, i);
        }
        rows = self.own_axes(points, rows);
        let mut waiting = templated;
        while !waiting.is_empty() && points.ok {
            skips.apply(&mut rows);
            let ready = waiting.iter().position(|&i| self.all_there(&refs[i].text, &rows)).unwrap_or(0);
            rows = self.join(points, rows, waiting.remove(ready));
        }
        skips.apply(&mut rows);
        if points.ok {
            self.skip_problems(points, &skips);
        }
        for i in (0..refs.len()).filter(|&i| refs[i].arity == Arity::All) {
            self.gather(points, &mut rows, i);
        }
        // A row for which a gather finds nothing depends on skipped cells only.
        let gathers: BTreeSet<&str> = refs
            .iter()
            .filter(|reference| reference.arity == Arity::All && reference.also.is_none())
            .map(|reference| reference.slot.as_str())
            .collect();
        rows.retain(|row| {
            gathers.iter().all(|slot| row.picks.iter().any(|(i, cells)| refs[*i].slot == *slot && !cells.is_empty()))
        });
        // Inherited axes in the order of the keys that bring them, then the stage's own.
        let names = &self.domains[stage].0;
        for row in &mut rows {
            row.point.sort_by_key(|(axis, _)| names.iter().position(|(name, _)| name == axis));
            row.picks.sort_by_key(|(i, _)| *i);
        }
        rows
    }

    fn all_there(&self, text: &str, rows: &[Row]) -> bool {
        template::axes(text).iter().all(|(_, name)| {
            self.ids.known_axis(name).is_some_and(|axis| rows.iter().all(|row| at(&row.point, axis).is_some()))
        })
    }

    /// What reference `i` names at a point; `None` if it names nothing, which is reported.
    fn target(&mut self, points: &mut StagePoints, i: usize, point: &Point) -> Option<Target> {
        let stage = self.stage_of(points.stage);
        let reference = &stage.found.refs[i];
        let filled = template::fill(&reference.text, |name| {
            let value = at(point, self.ids.known_axis(name)?)?;
            Some(self.ids.value_of(value).to_string())
        });
        let text = match filled {
            Ok(text) => text,
            Err(name) => {
                points.ok = false;
                self.unknown_axis(points.stage, points.stage, name, &reference.slot, &reference.origin);
                return None;
            }
        };
        if let Some(known) = points.targets.get(&(i, text.clone())) {
            return *known;
        }
        let target = match reference.also {
            Some(types) if !names_stage(types, &text) => Some(Target::Value),
            _ => self.new_target(points, i, &text).map(Target::View),
        };
        points.ok &= target.is_some();
        points.targets.insert((i, text), target);
        target
    }

    fn new_target(&mut self, points: &mut StagePoints, i: usize, text: &str) -> Option<usize> {
        let reference = &self.stage_of(points.stage).found.refs[i];
        let (target, fixed) = self.target_of(points.stage, reference, text)?;
        if self.tainted[target] {
            points.ok = false;
            return None;
        }
        let mut axes = Vec::new();
        for (name, text) in &fixed {
            let owner = &self.stage_of(target).name;
            let axis = self.ids.known_axis(name);
            let Some((axis, values)) = axis.and_then(|axis| Some((axis, self.domains[target].get(axis)?))) else {
                self.unknown_axis(points.stage, target, name, &reference.slot, &reference.origin);
                return None;
            };
            let matching: Vec<ValueId> =
                values.iter().copied().filter(|value| self.ids.value_of(*value).to_string() == *text).collect();
            match matching.as_slice() {
                [] => {
                    let message = format!("axis `{name}` of stage `{owner}` has no value `{text}`");
                    let values = values.to_vec();
                    let bad = self.problem("plan::bad_axis_value", message, &reference.origin);
                    let bad = bad.note(self.values_note(name, &values));
                    self.report(bad);
                    return None;
                }
                [value] => axes.push((axis, *value)),
                _ => {
                    let message = format!(
                        "`{}[{name}={text}]` is ambiguous: axis `{name}` has values of several types that are written `{text}`",
                        owner
                    );
                    let bad = self.problem("plan::ambiguous_reference", message, &reference.origin);
                    self.report(bad);
                    return None;
                }
            }
        }
        let next = points.views.len();
        let view = *points.by_key.entry((target, axes.clone())).or_insert(next);
        if view == next {
            let cells = self.made[target].clone().map(|cell| (cell, &self.points[cell]));
            let names: Vec<AxisId> = axes.iter().map(|(axis, _)| *axis).collect();
            let keep = |point: &Point| axes.iter().all(|(axis, value)| at(point, *axis) == Some(*value));
            points.views.push(View::new(cells, &names, keep));
        }
        Some(view)
    }

    /// Joins the cells of reference `i` to the rows: shared axes agree, others multiply.
    fn join(&mut self, points: &mut StagePoints, rows: Vec<Row>, i: usize) -> Vec<Row> {
        let mut joined: Vec<Row> = Vec::with_capacity(rows.len());
        for row in rows {
            let view = match self.target(points, i, &row.point) {
                Some(Target::View(view)) => view,
                Some(Target::Value) => {
                    joined.push(row);
                    continue;
                }
                None => continue,
            };
            let mut matches: Vec<(CellId, Vec<AxisId>)> = Vec::new();
            points.views[view].matching(&row.point, &self.points, |axes, cells| {
                matches.extend(cells.iter().map(|&cell| (cell, axes.to_vec())));
            });
            matches.sort_by_key(|(cell, _)| *cell);
            if joined.len() + matches.len() > CELLS_MAX {
                points.ok = false;
                self.too_many(points.stage, joined.len() + matches.len());
                return Vec::new();
            }
            for (cell, axes) in matches {
                let mut next = row.clone();
                for axis in axes {
                    if at(&next.point, axis).is_none() {
                        next.point.extend(at(&self.points[cell], axis).map(|value| (axis, value)));
                    }
                }
                next.picks.push((i, vec![cell]));
                joined.push(next);
            }
        }
        joined
    }

    /// Multiplies the rows by the axes the stage declares; one that is inherited too is joined.
    fn own_axes(&mut self, points: &mut StagePoints, mut rows: Vec<Row>) -> Vec<Row> {
        for (axis, values) in self.own[points.stage].clone() {
            if !rows.is_empty() && rows.iter().all(|row| at(&row.point, axis).is_some()) {
                let there: HashSet<ValueId> = rows.iter().filter_map(|row| at(&row.point, axis)).collect();
                for value in values.iter().filter(|value| !there.contains(value)) {
                    self.useless_value(points.stage, axis, *value, &there);
                    points.ok = false;
                }
            }
            let mut multiplied = Vec::with_capacity(rows.len());
            for row in rows {
                match at(&row.point, axis) {
                    Some(value) => multiplied.extend(values.contains(&value).then_some(row)),
                    None => {
                        if multiplied.len() + values.len() > CELLS_MAX {
                            points.ok = false;
                            self.too_many(points.stage, multiplied.len() + values.len());
                            return Vec::new();
                        }
                        multiplied.extend(values.iter().map(|&value| {
                            let mut next = row.clone();
                            next.point.push((axis, value));
                            next
                        }));
                    }
                }
            }
            rows = multiplied;
        }
        rows
    }

    fn useless_value(&mut self, stage: usize, axis: AxisId, value: ValueId, there: &HashSet<ValueId>) {
        let owner = self.stage_of(stage);
        let (name, value) = (self.ids.axis_name(axis), self.ids.value_of(value).to_string());
        let message =
            format!("`{value}` of axis `{name}` of stage `{}` is not a value of that axis in its inputs", owner.name);
        let mut values: Vec<ValueId> = there.iter().copied().collect();
        values.sort_unstable();
        let bad = self.problem("plan::bad_axis_value", message, &axis_value_origin(owner, name, &value));
        let bad = bad.note(self.values_note(name, &values));
        self.report(bad);
    }

    /// All cells that agree with the axes the stage itself declares.
    fn gather(&mut self, points: &mut StagePoints, rows: &mut [Row], i: usize) {
        let own: Vec<AxisId> = self.own[points.stage].iter().map(|(axis, _)| *axis).collect();
        for row in rows {
            let Some(Target::View(view)) = self.target(points, i, &row.point) else { continue };
            let point: Point = row.point.iter().copied().filter(|(axis, _)| own.contains(axis)).collect();
            let mut cells = Vec::new();
            points.views[view].matching(&point, &self.points, |_, found| cells.extend_from_slice(found));
            cells.sort_unstable();
            row.picks.push((i, cells));
        }
    }

    /// `key` of stage `user` uses an axis that stage `owner`, the same or the one it names, has not.
    fn unknown_axis(&mut self, user: usize, owner: usize, name: &str, key: &str, origin: &Origin) {
        let (user, its) = (&self.stage_of(user).name, user == owner);
        let axes: Vec<&str> = self.domains[owner].0.iter().map(|(axis, _)| self.ids.axis_name(*axis)).collect();
        let owner = &self.stage_of(owner).name;
        let message = match (its, axes.contains(&name)) {
            (true, true) => {
                format!("`{key}` of stage `{user}` uses axis `{name}`, which not every cell of the stage has")
            }
            (true, false) => format!("`{key}` of stage `{user}` uses axis `{name}`, which the stage does not have"),
            (false, _) => format!("`{key}` of stage `{user}` fixes axis `{name}`, which stage `{owner}` does not have"),
        };
        let mut unknown = self.problem("plan::unknown_axis", message, origin);
        if let Some(near) = words::nearest(name, axes.iter().copied()).filter(|near| *near != name) {
            unknown = unknown.help(format!("an axis with a similar name exists: `{near}`"));
        }
        let has = if axes.is_empty() { "none".to_string() } else { words::list(axes) };
        self.report(unknown.note(format!("axes of stage `{owner}`: {has}")));
    }

    fn values_note(&self, name: &str, values: &[ValueId]) -> String {
        let values: Vec<String> = values.iter().map(|value| self.ids.value_of(*value).to_string()).collect();
        format!("values of `{name}`: {}", words::list(values.iter().map(String::as_str)))
    }

    // ---- skip ----

    fn skips(&mut self, stage: usize) -> Skips {
        let mut entries = Vec::new();
        if let Some(Value::List(items)) = self.stage_of(stage).table.get("skip").map(|entry| &entry.value.value) {
            for item in items {
                let Value::Table(table) = &item.value else { continue };
                let point = table.entries.iter().filter_map(|entry| {
                    let axis = self.ids.axis(&entry.key);
                    Some((axis, self.ids.value(axis_value(&entry.value.value)?)))
                });
                entries.push(Skip { point: point.collect(), item: item.clone(), used: false });
            }
        }
        Skips { entries }
    }

    fn skip_problems(&mut self, points: &StagePoints, skips: &Skips) {
        let stage = points.stage;
        for skip in skips.entries.iter().filter(|skip| !skip.used) {
            let Value::Table(table) = &skip.item.value else { continue };
            let mut said = false;
            for (entry, (axis, value)) in table.entries.iter().zip(&skip.point) {
                let name = &entry.key;
                match self.domains[stage].get(*axis) {
                    None => self.unknown_axis(stage, stage, name, "skip", &entry.at),
                    Some(values) if !values.contains(value) => {
                        let owner = &self.stage_of(stage).name;
                        let value = self.ids.value_of(*value);
                        let message = format!("axis `{name}` of stage `{owner}` has no value `{value}`");
                        let bad = self.problem("plan::bad_axis_value", message, &entry.value.origin);
                        let note = self.values_note(name, values);
                        let like: Vec<String> = values.iter().map(|v| self.ids.value_of(*v).to_string()).collect();
                        let near =
                            words::nearest(&value.to_string(), like.iter().map(String::as_str)).map(String::from);
                        let bad = match near {
                            Some(near) if near != value.to_string() => {
                                bad.help(format!("a similar value exists: `{near}`"))
                            }
                            Some(_) => bad.help("it is there as another type: quotes make a string"),
                            None => bad,
                        };
                        self.report(bad.note(note));
                    }
                    Some(_) => continue,
                }
                said = true;
            }
            if !said {
                let owner = &self.stage_of(stage).name;
                let message = format!("this `skip` matches no cell of stage `{owner}`");
                let note = "another `skip`, or one of an input, leaves these cells out already";
                let nothing = self.problem("plan::skip_matches_nothing", message, &skip.item.origin).note(note);
                self.report(nothing);
            }
        }
    }
}

/// The making of one stage's points.
struct StagePoints {
    stage: usize,
    views: Vec<View>,
    by_key: HashMap<(usize, Point), usize>,
    /// What each reference comes to, by its filled text.
    targets: HashMap<(usize, String), Option<Target>>,
    ok: bool,
}

struct Skips {
    entries: Vec<Skip>,
}

struct Skip {
    point: Point,
    item: Node,
    used: bool,
}

impl Skips {
    /// Takes out the rows that an entry matches on all its axes.
    fn apply(&mut self, rows: &mut Vec<Row>) {
        if self.entries.is_empty() {
            return;
        }
        rows.retain(|row| {
            let mut keep = true;
            for skip in &mut self.entries {
                if !skip.point.is_empty()
                    && skip.point.iter().all(|(axis, value)| at(&row.point, *axis) == Some(*value))
                {
                    skip.used = true;
                    keep = false;
                }
            }
            keep
        });
    }
}

fn own_axes(stage: &Stage, ids: &mut Interner) -> Vec<(AxisId, Vec<ValueId>)> {
    let Some(Value::Table(axes)) = stage.table.get("axes").map(|entry| &entry.value.value) else {
        return Vec::new();
    };
    let mut own = Vec::new();
    for entry in &axes.entries {
        if let Value::List(values) = &entry.value.value {
            let values = values.iter().filter_map(|node| axis_value(&node.value)).map(|value| ids.value(value));
            let values = values.collect();
            own.push((ids.axis(&entry.key), values));
        }
    }
    own
}

fn axis_value(value: &Value) -> Option<AxisValue> {
    match value {
        Value::Str(text) => Some(AxisValue::Str(text.clone())),
        Value::Int(int) => Some(AxisValue::Int(*int)),
        Value::Float(float) => Some(AxisValue::Float(*float)),
        Value::Bool(bool) => Some(AxisValue::Bool(*bool)),
        Value::Date(_) | Value::List(_) | Value::Table(_) | Value::Invalid => None,
    }
}

fn axis_value_origin(stage: &Stage, axis: &str, value: &str) -> Origin {
    let Some(Value::Table(axes)) = stage.table.get("axes").map(|entry| &entry.value.value) else {
        return stage.at.clone();
    };
    let Some(Value::List(values)) = axes.get(axis).map(|entry| &entry.value.value) else { return stage.at.clone() };
    let node = values.iter().find(|node| axis_value(&node.value).is_some_and(|found| found.to_string() == value));
    node.map_or_else(|| stage.at.clone(), |node| node.origin.clone())
}
