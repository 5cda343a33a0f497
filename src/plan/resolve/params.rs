//! The last pass: cells with their parameters, `{axis}` filled in.

use super::{Resolver, Row};
use crate::manifest::spec::{Kind, Lineage, Params, Type};
use crate::manifest::template;
use crate::manifest::value::{Node, Origin, Table, Value};
use crate::manifest::{Arity, Check, Found, Layer, Mode, Step, Template, names_stage};
use crate::plan::axes::{AxisId, Interner, Point, ValueId, at};
use crate::plan::cell::{Axes, AxisValue, Cell, CellId, Input, Source};
use crate::problem::Problem;
use serde_json::Value as Json;
use std::borrow::Cow;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

impl<'m> Resolver<'m> {
    pub(super) fn push_cells(&mut self, stage: usize, rows: Vec<Row>) {
        let owner = self.stage_of(stage);
        let Some(kind) = owner.kind else { return };
        let refs = &owner.found.refs;
        let mut by_task: HashMap<Option<usize>, Fillings> = HashMap::new();
        self.made[stage] = self.cells.len()..self.cells.len() + rows.len();
        for row in rows {
            let task = self.task_of(stage, &row.point);
            let fillings = match by_task.entry(task) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(self.fillings(stage, kind, task)),
            };
            let filling = self.filling(stage, kind, fillings, &row.point);
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

    /// The task that a stage names at a point, if it names one.
    fn task_of(&self, stage: usize, point: &Point) -> Option<usize> {
        let reference = self.stage_of(stage).found.refs.iter().find(|reference| reference.task)?;
        let text = template::fill(&reference.text, |name| {
            Some(self.ids.value_of(at(point, self.ids.known_axis(name)?)?).to_string())
        });
        let named = template::Reference::parse(&text.ok()?).ok()?;
        self.manifest.task(&named.stage).map(|(task, _)| task)
    }

    /// The keys of a stage, those of a task beneath them.
    fn fillings(&mut self, stage: usize, kind: &'static Kind, task: Option<usize>) -> Fillings<'m> {
        let owner = self.stage_of(stage);
        // Only where tasks are declared did the stage's own keys wait for one.
        if owner.broken || !owner.found.refs.iter().any(|reference| reference.task) || self.manifest.tasks.is_empty() {
            let keys = Keys {
                table: Cow::Borrowed(&owner.table),
                params: Cow::Borrowed(&owner.params),
                found: Cow::Borrowed(&owner.found),
                broken: owner.broken,
            };
            return Fillings::new(keys, &mut self.ids);
        }
        let task = task.map(|task| &self.manifest.tasks[task]);
        let table = task.map_or_else(|| owner.table.clone(), |task| task.beneath(kind, &owner.table));
        let files = &self.manifest.files;
        let name = format!("stage `{}`", owner.name);
        let mut check = Check::new(files, name, Layer::File, Mode::Whole, &mut self.defaults);
        check.endpoints = Some(&self.manifest.endpoints);
        let params = check.stage(kind, &table, &owner.at);
        let mut found = check.found;
        let broken = !found.problems.is_empty();
        for mut problem in std::mem::take(&mut found.problems) {
            let place = |problem: &Problem| problem.places.first().cloned();
            let missing = problem.code == "manifest::missing_key";
            if !missing && self.manifest.problems.iter().any(|said| place(said) == place(&problem)) {
                continue;
            }
            if let Some(task) = task.filter(|_| missing) {
                problem = problem.note(format!("task `{}` does not give it either", task.name));
            }
            self.report(problem);
        }
        let keys = Keys { table: Cow::Owned(table), params: Cow::Owned(params), found: Cow::Owned(found), broken };
        Fillings::new(keys, &mut self.ids)
    }

    /// The parameters at a point, made once per distinct values of the axes that strings use.
    fn filling(
        &mut self,
        stage: usize,
        kind: &'static Kind,
        fillings: &mut Fillings<'_>,
        point: &Point,
    ) -> Arc<Filling> {
        let key: Vec<Option<ValueId>> = fillings.axes.iter().map(|axis| at(point, *axis)).collect();
        if let Some(known) = fillings.made.get(&key) {
            return known.clone();
        }
        let owner = self.stage_of(stage);
        let Keys { table, params, found, broken } = &fillings.keys;
        let mut params = Params::clone(params);
        let mut sources: Vec<Source> =
            found.sources.iter().map(|source| self.source(&source.key, &source.text, &source.origin)).collect();
        let mut whole = !broken;
        for template in &found.templates {
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
            for reference in &found.refs {
                keys.entry(&reference.slot).or_insert_with(|| Json::String(reference.text.clone()));
            }
            for broken in (kind.rules)(&keys) {
                let at = place_of(table, broken.key).unwrap_or(&owner.at);
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
        let folder = self.manifest.files[origin.file].folder.clone();
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
            let mut check =
                Check::new(files, format!("stage `{}`", owner.name), Layer::File, Mode::Filled, &mut self.defaults);
            check.endpoints = Some(&self.manifest.endpoints);
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

/// Parameters at some points of a stage.
struct Filling {
    params: Arc<Params>,
    sources: Vec<Source>,
    description: Option<Arc<str>>,
    /// Every key could be filled.
    whole: bool,
}

/// The keys of a stage, or of a stage with a task beneath it.
struct Keys<'m> {
    table: Cow<'m, Table>,
    params: Cow<'m, Params>,
    found: Cow<'m, Found>,
    broken: bool,
}

struct Fillings<'m> {
    keys: Keys<'m>,
    /// The axes that their strings use.
    axes: Vec<AxisId>,
    made: HashMap<Vec<Option<ValueId>>, Arc<Filling>>,
}

impl<'m> Fillings<'m> {
    fn new(keys: Keys<'m>, ids: &mut Interner) -> Fillings<'m> {
        let mut axes = BTreeSet::new();
        let description = match keys.table.get("description").map(|entry| &entry.value.value) {
            Some(Value::Str(text)) => text.as_str(),
            _ => "",
        };
        let texts = keys.found.templates.iter().map(|template| template.text.as_str());
        for text in texts.chain([description]) {
            axes.extend(template::axes(text).into_iter().map(|(_, name)| ids.axis(name)));
        }
        Fillings { keys, axes: axes.into_iter().collect(), made: HashMap::new() }
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
