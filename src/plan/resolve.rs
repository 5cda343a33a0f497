//! Stages to cells.
//!
//! Three passes. *Links*: which stages each stage names, in any of its cells; dangling names, wrong
//! artifacts and cycles are found here. *Cells*: stage by stage, dependencies first, the points of each stage
//! are joined from its inputs' cells and its own axes, less what `skip` names. *Parameters*: `{axis}`
//! is filled in, once per distinct filling.
//!
//! A stage with a problem makes no cells, nor do those that need it, and nothing is said about the
//! latter: the cause has been told. Every pass goes on past problems, so that one run tells all.

use super::axes::{AxisId, Domain, Interner, Point, ValueId, View, at};
use super::order::order;
use super::{Axes, AxisValue, Cell, CellId, Input, Plan, Source};
use crate::manifest::spec::{Kind, Lineage, Params, Type};
use crate::manifest::template::{self, Reference};
use crate::manifest::value::{Node, Origin, Table, Value};
use crate::manifest::{
    Arity, Check, Layer, Manifest, Mode, RefUse, SET_FILE, Stage, Step, Template, choices, names_stage, sort, words,
};
use crate::problem::{Exit, Problem};
use serde_json::Value as Json;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

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
        return Ok(Plan { title: manifest.title.clone(), cells: resolver.cells });
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

    // ---- links ----

    /// Which stages each stage names; returns those outside cycles, dependencies first.
    fn links(&mut self) -> Vec<usize> {
        let count = self.manifest.stages.len();
        for stage in 0..count {
            for reference in &self.stage_of(stage).found.refs {
                if template::axes(&reference.text).is_empty() {
                    self.tainted[stage] |= self.target_of(stage, reference, &reference.text).is_none();
                }
            }
        }
        // What `{axis}` names depends on the axes, which come along with what is named: repeat until
        // nothing new appears. Without such references once is enough.
        loop {
            let needs = self.needs();
            let order = self.order_or_cycles(&needs);
            let mut domains: Vec<Domain> = self.own.iter().map(|own| Domain(own.clone())).collect();
            for &stage in &order {
                domains[stage] = self.domain(stage, &domains);
            }
            let settled = domains == self.domains;
            self.domains = domains;
            if settled || self.needs() == needs {
                return order;
            }
        }
    }

    /// The stages that any cell of each stage may need, in the order of its keys.
    fn needs(&self) -> Vec<Vec<usize>> {
        (0..self.manifest.stages.len())
            .map(|stage| {
                let mut needs = Vec::new();
                for reference in &self.stage_of(stage).found.refs {
                    for (target, _) in self.candidates(reference, &self.domains[stage]) {
                        if !needs.contains(&target) {
                            needs.push(target);
                        }
                    }
                }
                needs
            })
            .collect()
    }

    /// The stages a reference may name, with the axes it fixes.
    fn candidates(&self, reference: &RefUse, domain: &Domain) -> Vec<(usize, Vec<String>)> {
        let mut targets: Vec<(usize, Vec<String>)> = Vec::new();
        let mut add = |text: &str| {
            if reference.also.is_none_or(|types| names_stage(types, text))
                && let Ok(parsed) = Reference::parse(text)
                && let Some((target, _)) = self.manifest.stage(&parsed.stage)
            {
                let fixed: Vec<String> = parsed.fixed.into_iter().map(|(axis, _)| axis).collect();
                if !targets.contains(&(target, fixed.clone())) {
                    targets.push((target, fixed));
                }
            }
        };
        let axes: BTreeSet<&str> = template::axes(&reference.text).into_iter().map(|(_, name)| name).collect();
        if axes.is_empty() {
            add(&reference.text);
            return targets;
        }
        let values: Option<Vec<(&str, &[ValueId])>> =
            axes.iter().map(|name| Some((*name, domain.get(self.ids.known_axis(name)?)?))).collect();
        // An axis that is not there is told when the cells are made.
        let Some(values) = values else { return targets };
        let combinations = values.iter().try_fold(1usize, |product, (_, values)| product.checked_mul(values.len()));
        let Some(combinations) = combinations.filter(|count| *count <= CELLS_MAX) else { return targets };
        for number in 0..combinations {
            let mut rest = number;
            let mut chosen = HashMap::new();
            for (name, values) in values.iter().rev() {
                chosen.insert(*name, values[rest % values.len()]);
                rest /= values.len();
            }
            let text = template::fill(&reference.text, |name| Some(self.ids.value_of(*chosen.get(name)?).to_string()));
            if let Ok(text) = text {
                add(&text);
            }
        }
        targets
    }

    /// Own axes and those that references bring, in the order of a cell's name: inherited first.
    fn domain(&self, stage: usize, domains: &[Domain]) -> Domain {
        let mut domain = Domain::default();
        for reference in self.stage_of(stage).found.refs.iter().filter(|reference| reference.arity == Arity::One) {
            for (target, fixed) in self.candidates(reference, &self.domains[stage]) {
                for (axis, values) in &domains[target].0 {
                    if !fixed.iter().any(|name| name == self.ids.axis_name(*axis)) {
                        domain.add(*axis, values);
                    }
                }
            }
        }
        for (axis, values) in &self.own[stage] {
            domain.add(*axis, values);
        }
        domain
    }

    /// Tells every cycle and returns an order of all stages; those on a cycle make no cells.
    fn order_or_cycles(&mut self, needs: &[Vec<usize>]) -> Vec<usize> {
        let mut needs = needs.to_vec();
        let mut told = 0;
        loop {
            let cycle = match order(&needs) {
                Ok(order) => return order,
                Err(cycle) => cycle,
            };
            if told < CYCLES_MAX {
                self.cycle(&cycle);
                told += 1;
            }
            for &stage in &cycle {
                self.tainted[stage] = true;
            }
            // Without its last edge the cycle is open, and others can be found.
            let (last, first) = (cycle[cycle.len() - 1], cycle[0]);
            needs[last].retain(|&need| need != first);
        }
    }

    fn cycle(&mut self, cycle: &[usize]) {
        let name = |stage: usize| self.stage_of(stage).name.as_str();
        let mut path: Vec<&str> = cycle.iter().map(|&stage| name(stage)).collect();
        path.push(path[0]);
        let message = match cycle.len() {
            1 => format!("stage `{}` waits for itself", path[0]),
            2 => format!("two stages wait for each other: {}", path.join(" -> ")),
            n => format!("{} stages wait for one another: {}", words::count(n), path.join(" -> ")),
        };
        let mut problem = Problem::new("plan::cycle", message).exit(Exit::Usage);
        for (i, &stage) in cycle.iter().enumerate() {
            let need = cycle[(i + 1) % cycle.len()];
            let names_it = |reference: &&RefUse| {
                self.candidates(reference, &self.domains[stage]).iter().any(|(target, _)| *target == need)
            };
            if let Some(reference) = self.stage_of(stage).found.refs.iter().find(names_it) {
                let label = format!("{} needs {}", name(stage), name(need));
                let file = self.manifest.path_of(reference.origin.file);
                problem = problem.at_span(file, reference.origin.span.clone(), &label);
            }
        }
        let help = match cycle.len() {
            1 => "its input has to come from elsewhere".to_string(),
            n => format!("one of these {} inputs has to come from elsewhere", words::count(n)),
        };
        let problem = problem.help(help);
        self.report(problem);
    }

    /// The stage a filled reference names, if it exists and yields what is taken; else says so.
    fn target_of(&mut self, stage: usize, reference: &RefUse, text: &str) -> Option<(usize, Vec<(String, String)>)> {
        let owner = &self.stage_of(stage).name;
        let parsed = match Reference::parse(text) {
            Ok(parsed) => parsed,
            Err(why) => {
                let message = format!("`{}` of stage `{owner}` is not a reference: {why}", reference.slot);
                let mut bad = self.problem("plan::bad_reference", message, &reference.origin);
                if text != reference.text {
                    bad = bad.note(format!("`{}` comes to `{text}`", reference.text));
                }
                self.report(bad);
                return None;
            }
        };
        let Some((target, found)) = self.manifest.stage(&parsed.stage) else {
            if !self.manifest.incomplete {
                self.missing_stage(owner, reference, &parsed.stage);
            }
            return None;
        };
        let kind = found.kind?;
        if !reference.takes.contains(&kind.yields) {
            let takes: Vec<&str> = reference.takes.iter().map(|ty| ty.noun()).collect();
            let message = format!(
                "`{}` of stage `{owner}` takes {}, and `{}` yields {}",
                reference.slot,
                takes.join(" or "),
                found.name,
                kind.yields.noun()
            );
            let fitting = self.manifest.stages.iter().filter(|stage| {
                stage.name != *owner && stage.kind.is_some_and(|kind| reference.takes.contains(&kind.yields))
            });
            let fitting: Vec<&str> = fitting.map(|stage| stage.name.as_str()).collect();
            let mut wrong = self.problem("plan::wrong_artifact", message, &reference.origin);
            wrong = wrong.note(format!("`{}` is of kind `{}`", found.name, kind.name));
            if !fitting.is_empty() {
                wrong = wrong.help(format!("stages that fit: {}", words::list(fitting)));
            }
            self.report(wrong);
            return None;
        }
        Some((target, parsed.fixed))
    }

    fn missing_stage(&mut self, owner: &str, reference: &RefUse, name: &str) {
        let message = format!("`{}` of stage `{owner}` names `{name}`, and there is no such stage", reference.slot);
        let mut missing = self.problem("plan::missing_stage", message, &reference.origin);
        let others = || self.manifest.stages.iter().map(|stage| stage.name.as_str()).filter(|name| *name != owner);
        let yields_it = |stage: &&Stage| stage.kind.is_some_and(|kind| reference.takes.contains(&kind.yields));
        let words_too: Vec<&str> = reference.also.map(choices).into_iter().flatten().collect();
        if !words_too.is_empty() {
            missing = missing.note(format!("it takes a stage or one of {}", words::list(words_too.iter().copied())));
        }
        missing = match words::nearest(name, others().chain(words_too)) {
            Some(near) if self.manifest.stage(near).is_none() => {
                missing.help(format!("a similar word exists: `{near}`"))
            }
            Some(near) => missing.help(format!("a stage with a similar name exists: `{near}`")),
            None => {
                let fitting = self.manifest.stages.iter().filter(yields_it).map(|stage| stage.name.as_str());
                let fitting: Vec<&str> = fitting.filter(|name| *name != owner).collect();
                if fitting.is_empty() {
                    missing
                } else {
                    missing.note(format!("stages that fit: {}", words::list(fitting)))
                }
            }
        };
        if reference.text != name && !template::axes(&reference.text).is_empty() {
            missing = missing.note(format!("`{}` comes to `{name}` here", reference.text));
        }
        self.report(missing);
    }

    // ---- cells ----

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

    // ---- parameters ----

    fn push_cells(&mut self, stage: usize, rows: Vec<Row>) {
        let owner = self.stage_of(stage);
        let Some(kind) = owner.kind else { return };
        let refs = &owner.found.refs;
        let mut fillings = Fillings::new(owner, &mut self.ids);
        self.made[stage] = self.cells.len()..self.cells.len() + rows.len();
        for row in rows {
            let filling = self.filling(stage, kind, &mut fillings, &row.point);
            let mut inputs: Vec<Input> = Vec::new();
            for (i, cells) in &row.picks {
                let reference = &refs[*i];
                let cells = match cells.as_slice() {
                    [cell] if reference.chain && !self.chains[*cell].is_empty() => self.chains[*cell].clone(),
                    _ => cells.clone(),
                };
                match inputs.iter_mut().find(|input| input.slot == reference.slot) {
                    Some(input) => input.cells.extend(cells),
                    None => {
                        let labelled = reference.arity == Arity::All;
                        inputs.push(Input { slot: reference.slot.clone(), cells, labelled });
                    }
                }
            }
            self.chains.push(chain(self.cells.len(), kind, &filling, owner.broken, &inputs));
            let axes = row
                .point
                .iter()
                .map(|(axis, value)| (self.ids.axis_name(*axis).to_string(), self.ids.value_of(*value).clone()));
            self.cells.push(Cell {
                stage: owner.name.clone(),
                axes: Axes(axes.collect()),
                kind,
                description: filling.description.clone(),
                params: filling.params.clone(),
                inputs,
                sources: filling.sources.clone(),
                file: self.manifest.path_of(owner.at.file).to_path_buf(),
                span: owner.at.span.clone(),
            });
            self.points.push(row.point);
        }
    }

    /// The parameters at a point, made once per distinct values of the axes that strings use.
    fn filling(&mut self, stage: usize, kind: &'static Kind, fillings: &mut Fillings, point: &Point) -> Arc<Filling> {
        let key: Vec<Option<ValueId>> = fillings.axes.iter().map(|axis| at(point, *axis)).collect();
        if let Some(known) = fillings.made.get(&key) {
            return known.clone();
        }
        let owner = self.stage_of(stage);
        let mut params = owner.params.clone();
        let mut sources: Vec<Source> =
            owner.found.sources.iter().map(|source| self.source(&source.key, &source.text, &source.origin)).collect();
        let mut whole = !owner.broken;
        for template in &owner.found.templates {
            match self.fill(stage, template, point) {
                Some((Some(json), filled)) => {
                    put(&mut params, &template.steps, json);
                    sources.extend(filled);
                }
                Some((None, _)) => take_out(&mut params, &template.steps),
                None => whole = false,
            }
        }
        sources.sort_by(|a, b| a.key.cmp(&b.key));
        let description = self.description(stage, point);
        if whole {
            let mut keys = params.clone();
            for reference in &owner.found.refs {
                keys.entry(&reference.slot).or_insert_with(|| Json::String(reference.text.clone()));
            }
            for broken in (kind.rules)(&keys) {
                let at = place_of(&owner.table, broken.key).unwrap_or(&owner.at);
                let message = format!("stage `{}`: {}", owner.name, broken.message);
                let mut rule = self.problem("manifest::rule", message, at);
                if !broken.help.is_empty() {
                    rule = rule.help(broken.help);
                }
                self.report(rule);
            }
        }
        let made = Arc::new(Filling { params: Arc::new(params), sources, description, whole });
        fillings.made.insert(key, made.clone());
        made
    }

    fn source(&self, key: &str, text: &str, origin: &Origin) -> Source {
        let file = self.manifest.path_of(origin.file);
        let folder = match file.parent() {
            Some(folder) if file.as_os_str() != SET_FILE => folder.to_path_buf(),
            _ => PathBuf::new(),
        };
        Source { key: key.to_string(), text: text.to_string(), folder }
    }

    fn description(&mut self, stage: usize, point: &Point) -> Option<Arc<str>> {
        let Value::Str(text) = &self.stage_of(stage).table.get("description")?.value.value else { return None };
        let origin = &self.stage_of(stage).table.get("description")?.value.origin;
        match template::fill(text, |name| Some(self.ids.value_of(at(point, self.ids.known_axis(name)?)?).to_string())) {
            Ok(text) => Some(text.into()),
            Err(name) => {
                self.unknown_axis(stage, stage, name, "description", origin);
                None
            }
        }
    }

    /// One string with its axes filled in, as its key's type; no value if it names a stage.
    fn fill(&mut self, stage: usize, template: &Template, point: &Point) -> Option<(Option<Json>, Vec<Source>)> {
        let owner = self.stage_of(stage);
        let whole = template::whole(&template.text)
            .and_then(|name| Some(self.ids.value_of(at(point, self.ids.known_axis(name)?)?).clone()));
        let text = template::fill(&template.text, |name| {
            Some(self.ids.value_of(at(point, self.ids.known_axis(name)?)?).to_string())
        });
        let text = match text {
            Ok(text) => text,
            Err(name) => {
                let key = crate::manifest::dotted(&template.steps);
                self.unknown_axis(stage, stage, name, &key, &template.origin);
                return None;
            }
        };
        if matches!(template.ty, Type::Any(types) if names_stage(types, &text)) {
            return Some((None, Vec::new()));
        }
        // The axis's own type first, then its text: `seed = "{seed}"` is a number, `name = "{seed}"` a string.
        let native = whole.map(|value| match value {
            AxisValue::Str(text) => Value::Str(text),
            AxisValue::Int(int) => Value::Int(int),
            AxisValue::Float(float) => Value::Float(float),
            AxisValue::Bool(bool) => Value::Bool(bool),
        });
        let mut problems = Vec::new();
        for value in native.into_iter().chain([Value::Str(text.clone())]) {
            let node = Node { origin: template.origin.clone(), value };
            let files = &self.manifest.files;
            let mut check = Check::new(files, &owner.name, Layer::File, Mode::Filled, &mut self.defaults);
            let json = check.one(&node, template.ty, &template.steps);
            let found = check.found;
            if let Some(json) = json.filter(|_| found.problems.is_empty()) {
                let sources = found.sources.iter().map(|source| self.source(&source.key, &source.text, &source.origin));
                return Some((Some(json), sources.collect()));
            }
            if problems.is_empty() {
                problems = found.problems;
            }
        }
        for problem in problems {
            self.report(problem.note(format!("`{}` comes to `{text}` here", template.text)));
        }
        None
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

/// Parameters at some points of a stage.
struct Filling {
    params: Arc<Params>,
    sources: Vec<Source>,
    description: Option<Arc<str>>,
    /// Every key could be filled.
    whole: bool,
}

struct Fillings {
    /// The axes that strings of the stage use.
    axes: Vec<AxisId>,
    made: HashMap<Vec<Option<ValueId>>, Arc<Filling>>,
}

impl Fillings {
    fn new(stage: &Stage, ids: &mut Interner) -> Fillings {
        let mut axes = BTreeSet::new();
        let description = match stage.table.get("description").map(|entry| &entry.value.value) {
            Some(Value::Str(text)) => text.as_str(),
            _ => "",
        };
        let texts = stage.found.templates.iter().map(|template| template.text.as_str());
        for text in texts.chain([description]) {
            axes.extend(template::axes(text).into_iter().map(|(_, name)| ids.axis(name)));
        }
        Fillings { axes: axes.into_iter().collect(), made: HashMap::new() }
    }
}

/// The chain of a model made by cell `cell`: what whoever takes it as a model has to load, base first.
fn chain(cell: CellId, kind: &Kind, filling: &Filling, broken: bool, inputs: &[Input]) -> Vec<CellId> {
    if kind.yields != crate::manifest::spec::ArtifactType::Model || broken || !filling.whole {
        return Vec::new();
    }
    let under = inputs.iter().find(|input| input.slot == "model").map_or(&[] as &[CellId], |input| &input.cells);
    let keep = match (kind.lineage)(&filling.params) {
        Lineage::Whole => 0,
        Lineage::OnTop => under.len(),
        // The base is not an adapter and stays.
        Lineage::Continues => under.len().saturating_sub(1).max(under.len().min(1)),
    };
    let mut chain = under[..keep].to_vec();
    chain.push(cell);
    chain
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

/// Where a dotted key is written.
fn place_of<'a>(table: &'a Table, dotted: &str) -> Option<&'a Origin> {
    let (first, rest) = dotted.split_once('.').map_or((dotted, None), |(first, rest)| (first, Some(rest)));
    let entry = table.get(first)?;
    match (rest, &entry.value.value) {
        (Some(rest), Value::Table(table)) => place_of(table, rest).or(Some(&entry.at)),
        _ => Some(&entry.at),
    }
}

/// Takes out the null of a string that turned out to name a stage.
fn take_out(params: &mut Params, steps: &[Step]) {
    match steps {
        [Step::Key(key)] => {
            params.shift_remove(key);
        }
        [Step::Key(first), .., Step::Key(last)] => {
            let parent = &steps[1..steps.len() - 1];
            let mut slot = params.get_mut(first);
            for step in parent {
                slot = slot.and_then(|slot| match step {
                    Step::Key(key) => slot.get_mut(key.as_str()),
                    Step::Item(i) => slot.get_mut(*i),
                });
            }
            if let Some(Json::Object(table)) = slot {
                table.shift_remove(last);
            }
        }
        _ => {}
    }
}

/// Puts a filled value where the walk left null.
fn put(params: &mut Params, steps: &[Step], json: Json) {
    let [Step::Key(first), rest @ ..] = steps else { return };
    let Some(mut slot) = params.get_mut(first) else { return };
    for step in rest {
        let next = match step {
            Step::Key(key) => slot.get_mut(key.as_str()),
            Step::Item(i) => slot.get_mut(*i),
        };
        match next {
            Some(next) => slot = next,
            None => return,
        }
    }
    *slot = json;
}
