//! Raw stages, profiles and `--set` to the stages of a [`Manifest`].
//!
//! Each piece is checked where it stands, chosen or not, so that a profile cannot rot unseen; what
//! is missing is known only after everything is laid over.
//!
//! One file, for it is one order: pieces are checked, laid over and checked whole, with the same layers and the same list
//! of problems for stages, tasks and endpoints.

use super::check::{Check, Endpoints, Found, Layer, Mode};
use super::endpoint;
use super::parse::{Loader, RawProfile, RawStage, Sort};
use super::reference::RefUse;
use super::spec::{Key, Kind, Params, Type};
use super::task::{self, Task};
use super::text::{RESERVED, SET_FILE, problem, sort};
use super::value::{Entry, Node, Origin, Reader, Table, Value};
use super::written::{Manifest, Stage};
use super::{template, words};
use crate::problem::Problem;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// The stages while layers are laid over them.
struct Layers<'a> {
    loader: Loader<'a>,
    stages: Vec<Laid>,
    defaults: HashMap<&'static str, Value>,
}

struct Laid {
    kind: Option<&'static Kind>,
    table: Table,
    /// A piece that took part has a problem, which is reported.
    broken: bool,
    broken_axes: bool,
}

/// What checking a piece came to.
struct Checked {
    kind: Option<&'static Kind>,
    problems: Vec<Problem>,
    axes_problems: Vec<Problem>,
}

pub(super) fn lay_over(path: &Path, loader: Loader<'_>, profiles: &[String], sets: &[String]) -> Manifest {
    let mut layers = Layers { loader, stages: Vec::new(), defaults: HashMap::new() };
    layers.loader.shared_names();
    layers.files();
    layers.other_pieces();
    let raw = std::mem::take(&mut layers.loader.profiles);
    let kinds = layers.profiles(&raw);
    for profile in &raw {
        let layer = Layer::Profile(&profile.name);
        profile.others.iter().for_each(|(sort, table)| layers.other_piece(*sort, table, layer));
    }
    let mut title = layers.loader.title.take();
    for name in profiles {
        if !raw.iter().any(|profile| profile.name == *name) {
            layers.unknown_profile(path, name, &raw);
        }
        for (profile, kinds) in raw.iter().zip(&kinds).filter(|(profile, _)| profile.name == *name) {
            title = profile.title.clone().or(title);
            profile.others.iter().for_each(|(sort, table)| layers.lay_other(*sort, table));
            for (stage, &kind) in profile.stages.iter().zip(kinds) {
                if let Some(&at) = layers.loader.by_name.get(&stage.name) {
                    layers.lay(at, &stage.table, kind, &stage.table.get("kind").map(|entry| entry.at.clone()));
                }
            }
        }
    }
    layers.sets(sets, &mut title);
    let names: BTreeSet<&str> = raw.iter().map(|profile| profile.name.as_str()).collect();
    let names = names.into_iter().map(String::from).collect();
    layers.finish(path, title, names)
}

impl Layers<'_> {
    /// The stages as the files have them.
    fn files(&mut self) {
        let raw = std::mem::take(&mut self.loader.stages);
        for stage in &raw {
            let checked = self.piece(stage, None, Layer::File);
            let mut table = stage.table.clone();
            table.remove("kind");
            self.stages.push(Laid {
                kind: checked.kind,
                table,
                broken: !checked.problems.is_empty(),
                broken_axes: !checked.axes_problems.is_empty(),
            });
            self.report(checked);
        }
        self.loader.stages = raw;
    }

    fn report(&mut self, checked: Checked) {
        self.loader.problems.extend(checked.problems);
        self.loader.problems.extend(checked.axes_problems);
    }

    /// Checks every profile, chosen or not. Returns the kinds their stages end up with.
    fn profiles(&mut self, raw: &[RawProfile]) -> Vec<Vec<Option<&'static Kind>>> {
        // A profile that changes no kind may be meant to lie over one that does.
        let mut changed: BTreeMap<&str, Vec<&'static Kind>> = BTreeMap::new();
        for stage in raw.iter().flat_map(|profile| &profile.stages) {
            if let Some(Value::Str(kind)) = stage.table.get("kind").map(|entry| &entry.value.value)
                && let Some(kind) = self.kind_named(kind)
            {
                changed.entry(&stage.name).or_default().push(kind);
            }
        }
        raw.iter()
            .map(|profile| {
                profile
                    .stages
                    .iter()
                    .map(|stage| {
                        let others = changed.get(stage.name.as_str()).map_or(&[] as &[_], Vec::as_slice);
                        self.profile_stage(&profile.name, stage, others)
                    })
                    .collect()
            })
            .collect()
    }

    fn profile_stage(&mut self, profile: &str, stage: &RawStage, others: &[&'static Kind]) -> Option<&'static Kind> {
        let layer = Layer::Profile(profile);
        let Some(&at) = self.loader.by_name.get(&stage.name) else {
            self.no_such_stage(layer, stage);
            return None;
        };
        let mut checked = self.piece(stage, self.stages[at].kind, layer);
        if !checked.problems.is_empty() && stage.table.get("kind").is_none() {
            for &other in others {
                let again = self.piece(stage, Some(other), layer);
                if again.problems.is_empty() {
                    checked = again;
                    break;
                }
            }
        }
        let own_kind = stage.table.get("kind").and(checked.kind);
        self.report(checked);
        own_kind
    }

    fn no_such_stage(&mut self, layer: Layer<'_>, stage: &RawStage) {
        if self.loader.incomplete {
            return;
        }
        let (code, message) = match layer {
            Layer::Profile(profile) => (
                "manifest::profile_touches_nothing",
                format!("profile `{profile}` changes stage `{}`, which does not exist", stage.name),
            ),
            _ => {
                ("manifest::set_touches_nothing", format!("`--set` names stage `{}`, which does not exist", stage.name))
            }
        };
        let mut nothing = problem(code, message);
        let names = || self.loader.stages.iter().map(|stage| stage.name.as_str());
        nothing = match words::nearest(&stage.name, names()) {
            Some(near) => nothing.help(format!("a stage with a similar name exists: `{near}`")),
            None => nothing.note(format!("stages: {}", words::list(names()))),
        };
        let nothing = self.loader.at(nothing, &stage.at, "");
        self.loader.problems.push(nothing);
    }

    fn kind_named(&self, name: &str) -> Option<&'static Kind> {
        self.loader.kinds.iter().copied().find(|kind| kind.name == name)
    }

    /// Checks a piece of a stage. `under`: the kind it lies over, `None` for the first layer.
    fn piece(&mut self, stage: &RawStage, under: Option<&'static Kind>, layer: Layer<'_>) -> Checked {
        let mut problems = Vec::new();
        let kind = match stage.table.get("kind") {
            None => {
                if matches!(layer, Layer::File) {
                    let missing =
                        problem("manifest::missing_key", format!("stage `{}` needs the key `kind`", stage.name))
                            .note(self.kinds_note());
                    problems.push(self.loader.at(missing, &stage.at, ""));
                }
                under
            }
            Some(Entry { value: Node { origin, value }, .. }) => match value {
                Value::Str(name) => self.kind_named(name).or_else(|| {
                    let mut unknown = problem(
                        "manifest::unknown_kind",
                        format!("stage `{}` is of unknown kind `{name}`", stage.name),
                    );
                    if let Some(near) = words::nearest(name, self.loader.kinds.iter().map(|kind| kind.name)) {
                        unknown = unknown.help(format!("a kind with a similar name exists: `{near}`"));
                    }
                    problems.push(self.loader.at(unknown.note(self.kinds_note()), origin, ""));
                    None
                }),
                Value::Invalid => None,
                other => {
                    let message = format!("`kind` of stage `{}` takes a string, not {}", stage.name, other.is_a());
                    problems.push(self.loader.at(problem("manifest::wrong_type", message), origin, ""));
                    None
                }
            },
        };
        if let Some(kind) = kind {
            let mut check = {
                let owner = format!("stage `{}`", stage.name);
                Check::new(&self.loader.files, owner, layer, Mode::Piece, &mut self.defaults)
            };
            check.stage(kind, &stage.table, &stage.at);
            problems.extend(check.found.problems);
        }
        if let Some(Entry { value: Node { origin, value }, .. }) = stage.table.get("description")
            && !matches!(value, Value::Str(_) | Value::Invalid)
        {
            let message = format!("`description` of stage `{}` takes a string, not {}", stage.name, value.is_a());
            problems.push(self.loader.at(problem("manifest::wrong_type", message), origin, ""));
        }
        let new_kind = stage.table.get("kind").is_some();
        let axes_problems = self.axes(stage, if new_kind { Layer::File } else { layer });
        Checked { kind, problems, axes_problems }
    }

    fn kinds_note(&self) -> String {
        format!("kinds: {}", self.loader.kinds.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", "))
    }

    /// The forms of `axes` and `skip`. What their names and values stand for is the plan's.
    fn axes(&self, stage: &RawStage, layer: Layer<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        let name = &stage.name;
        let mut bad = |code, message: String, origin: &Origin| {
            problems.push(self.loader.at(problem(code, message), origin, ""));
        };
        if let Some(Entry { value: Node { origin, value }, .. }) = stage.table.get("axes") {
            match value {
                Value::Table(axes) => {
                    for axis in &axes.entries {
                        self.axis(name, axis, &mut bad);
                        self.axis_exists(name, axis, layer, &mut bad);
                    }
                }
                Value::Invalid => {}
                other => {
                    let message = format!("`axes` of stage `{name}` takes a table of lists, not {}", other.is_a());
                    bad("manifest::wrong_type", message, origin);
                }
            }
        }
        let takes = format!("`skip` of stage `{name}` takes a list of tables such as `{{ axis = value }}`");
        match stage.table.get("skip").map(|entry| &entry.value) {
            None | Some(Node { value: Value::Invalid, .. }) => {}
            Some(Node { value: Value::List(items), .. }) => {
                for item in items {
                    match &item.value {
                        Value::Table(table) if !table.entries.is_empty() => {
                            for entry in table.entries.iter().filter(|entry| !is_scalar(&entry.value.value)) {
                                let message = format!("`skip` of stage `{name}` gives each axis one value");
                                bad("manifest::wrong_type", message, &entry.value.origin);
                            }
                        }
                        Value::Invalid => {}
                        Value::Table(_) => {
                            bad("manifest::wrong_type", format!("{takes}, not an empty one"), &item.origin)
                        }
                        other => bad("manifest::wrong_type", format!("{takes}, not {}", other.is_a()), &item.origin),
                    }
                }
            }
            Some(Node { origin, value }) => {
                bad("manifest::wrong_type", format!("{takes}, not {}", value.is_a()), origin)
            }
        }
        problems
    }

    fn axis(&self, stage: &str, axis: &Entry, bad: &mut impl FnMut(&'static str, String, &Origin)) {
        let key = &axis.key;
        if !template::is_name(key) {
            let message = format!("`{key}` cannot name an axis: begin with a letter, then letters, digits, `_`, `-`");
            return bad("manifest::bad_name", message, &axis.at);
        }
        let values = match &axis.value.value {
            Value::List(values) => values,
            Value::Invalid => return,
            other => {
                let message = format!("axis `{key}` of stage `{stage}` takes a list, not {}", other.is_a());
                return bad("manifest::wrong_type", message, &axis.value.origin);
            }
        };
        if values.is_empty() {
            bad("manifest::empty_axis", format!("axis `{key}` of stage `{stage}` has no values"), &axis.value.origin);
        }
        let mut seen = BTreeSet::new();
        for node in values {
            let Some(text) = label(&node.value) else {
                if !matches!(node.value, Value::Invalid) {
                    let message = format!(
                        "a value of axis `{key}` is a string, a number or true/false, not {}",
                        node.value.is_a()
                    );
                    bad("manifest::wrong_type", message, &node.origin);
                }
                continue;
            };
            // A cell is written `stage[axis=value,...]`, and axes are not filled into one another.
            if text.trim() != text || text.is_empty() || text.contains([',', '[', ']', '{', '}', '"', '=', '\n']) {
                let message = format!(
                    "`{text}` cannot be a value of axis `{key}`: no blanks around it, none of , [ ] {{ }} \" ="
                );
                bad("plan::bad_axis_value", message, &node.origin);
            } else if !seen.insert(text.clone()) {
                bad("plan::bad_axis_value", format!("axis `{key}` has the value `{text}` twice"), &node.origin);
            }
        }
    }

    /// A profile or `--set` may give an axis other values, not make one up.
    fn axis_exists(
        &self,
        stage: &str,
        axis: &Entry,
        layer: Layer<'_>,
        bad: &mut impl FnMut(&'static str, String, &Origin),
    ) {
        let (code, who) = match layer {
            Layer::File => return,
            Layer::Profile(profile) => ("manifest::profile_touches_nothing", format!("profile `{profile}`")),
            Layer::Set => ("manifest::set_touches_nothing", "`--set`".to_string()),
        };
        let Some(&at) = self.loader.by_name.get(stage) else { return };
        let declared = match self.loader.stages[at].table.get("axes").map(|entry| &entry.value.value) {
            Some(Value::Table(axes)) => axes.entries.iter().map(|entry| entry.key.as_str()).collect(),
            Some(_) => return,
            None => Vec::new(),
        };
        if !declared.contains(&axis.key.as_str()) {
            let has = if declared.is_empty() { "none".into() } else { words::list(declared) };
            let message =
                format!("{who} changes axis `{}` of stage `{stage}`, which declares {has} of its own", axis.key);
            bad(code, message, &axis.at);
        }
    }

    /// Lays a piece over stage `at`. `kind`: the kind the piece itself names.
    fn lay(&mut self, at: usize, piece: &Table, kind: Option<&'static Kind>, names_kind: &Option<Origin>) {
        let laid = &mut self.stages[at];
        if names_kind.is_some() {
            let same = matches!((laid.kind, kind), (Some(old), Some(new)) if std::ptr::eq(old, new));
            if !same {
                laid.kind = kind;
                laid.table.entries.retain(|entry| RESERVED.iter().any(|(name, _)| *name == entry.key));
            }
        }
        lay_over_table(laid.kind.map_or(&[] as &[_], |kind| kind.keys), &mut laid.table, piece);
        laid.table.remove("kind");
        let name = &self.loader.stages[at].name;
        let stage = RawStage { name: name.clone(), at: self.loader.stages[at].at.clone(), table: laid.table.clone() };
        let axes = self.axes(&stage, Layer::File);
        self.stages[at].broken_axes = !axes.is_empty();
    }

    fn unknown_profile(&mut self, path: &Path, name: &str, raw: &[RawProfile]) {
        if self.loader.incomplete {
            return;
        }
        let mut unknown = problem("manifest::unknown_profile", format!("there is no profile `{name}`"));
        let names: BTreeSet<&str> = raw.iter().map(|profile| profile.name.as_str()).collect();
        unknown = match words::nearest(name, names.iter().copied()) {
            Some(near) => unknown.help(format!("a profile with a similar name exists: `--profile {near}`")),
            None if names.is_empty() => unknown.note("the manifest declares no profile"),
            None => unknown.note(format!("profiles: {}", words::list(names))),
        };
        self.loader.problems.push(unknown.at_file(path));
    }

    fn sets(&mut self, sets: &[String], title: &mut Option<Node>) {
        if sets.is_empty() {
            return;
        }
        let file = self.loader.add_set_file(sets.join("\n"));
        let mut shift = 0;
        for set in sets {
            self.set(set, file, shift, title);
            shift += set.len() + 1;
        }
    }

    fn set(&mut self, set: &str, file: usize, shift: usize, title: &mut Option<Node>) {
        let line = Origin { file, span: shift..shift + set.len() };
        let parsed = set.split_once('=').and_then(|(key, value)| {
            let path = set_path(key, file, shift)?;
            let node = set_value(value, file, shift + key.len() + 1, &mut self.loader.problems);
            Some((path, node))
        });
        let Some((path, node)) = parsed else {
            let bad = problem("manifest::bad_set", format!("`--set {set}` is not `KEY=VALUE`"))
                .help("`--set stage.NAME.KEY=VALUE`, the value in TOML or a bare string");
            let bad = self.loader.at(bad, &line, "");
            return self.loader.problems.push(bad);
        };
        match path.as_slice() {
            [(top, _)] if top == "title" && matches!(node.value, Value::Str(_)) => *title = Some(node),
            [(top, _), (name, at), rest @ ..] if top == "stage" || Sort::named(top).is_some() => {
                let node = rest.iter().rev().fold(node, |node, (key, at)| Node {
                    origin: at.clone(),
                    value: Value::Table(Table {
                        entries: vec![Entry { key: key.clone(), at: at.clone(), value: node }],
                    }),
                });
                let Value::Table(table) = node.value else {
                    let bad = problem("manifest::bad_set", format!("`--set {set}` replaces a whole {top}"))
                        .help(format!("name one of its keys: `--set {top}.{name}.KEY=VALUE`"));
                    let bad = self.loader.at(bad, &line, "");
                    return self.loader.problems.push(bad);
                };
                let named = RawStage { name: name.clone(), at: at.clone(), table };
                match Sort::named(top) {
                    None => self.set_stage(&named),
                    Some(sort) => {
                        self.other_piece(sort, &named, Layer::Set);
                        self.lay_other(sort, &named);
                    }
                }
            }
            _ => {
                let nothing =
                    problem("manifest::set_touches_nothing", format!("`--set {set}` names nothing that can be set"))
                        .help("`title`, `stage.NAME.KEY`, `task.NAME.KEY` or `endpoint.NAME.KEY`");
                let nothing = self.loader.at(nothing, &line, "");
                self.loader.problems.push(nothing);
            }
        }
    }

    fn check_endpoint(&mut self, endpoint: &RawStage, layer: Layer<'_>, mode: Mode) -> (Params, Vec<Problem>) {
        let owner = format!("endpoint `{}`", endpoint.name);
        let mut check = Check::new(&self.loader.files, owner, layer, mode, &mut self.defaults);
        let params = check.endpoint(&endpoint.table, &endpoint.at);
        (params, check.found.problems)
    }

    fn check_task(&mut self, task: &RawStage, layer: Layer<'_>, mode: Mode) -> (Option<RefUse>, Vec<Problem>) {
        let owner = format!("task `{}`", task.name);
        let mut check = Check::new(&self.loader.files, owner, layer, mode, &mut self.defaults);
        let data = check.task(self.loader.kinds, &task.table, &task.at);
        (data, check.found.problems)
    }

    fn check_piece(&mut self, sort: Sort, piece: &RawStage, layer: Layer<'_>) {
        let problems = match sort {
            Sort::Endpoint => self.check_endpoint(piece, layer, Mode::Piece).1,
            Sort::Task => self.check_task(piece, layer, Mode::Piece).1,
        };
        self.loader.problems.extend(problems);
    }

    fn other_pieces(&mut self) {
        let raw = std::mem::take(&mut self.loader.others);
        raw.iter().for_each(|(sort, table)| self.check_piece(*sort, table, Layer::File));
        self.loader.others = raw;
    }

    /// A piece of a profile or of `--set`, chosen or not.
    fn other_piece(&mut self, sort: Sort, piece: &RawStage, layer: Layer<'_>) {
        if self.loader.others.iter().any(|(of, known)| *of == sort && known.name == piece.name) {
            return self.check_piece(sort, piece, layer);
        }
        if self.loader.incomplete {
            return;
        }
        let (code, who) = match layer {
            Layer::Profile(profile) => ("manifest::profile_touches_nothing", format!("profile `{profile}` changes")),
            _ => ("manifest::set_touches_nothing", "`--set` names".to_string()),
        };
        let word = sort.word();
        let mut nothing = problem(code, format!("{who} {word} `{}`, which does not exist", piece.name));
        let others = &self.loader.others;
        let names = || others.iter().filter(|(of, _)| *of == sort).map(|(_, known)| known.name.as_str());
        nothing = match words::nearest(&piece.name, names()) {
            Some(near) => nothing.help(format!("{} with a similar name exists: `{near}`", sort.noun())),
            None if names().next().is_none() => nothing.note(format!("the manifest declares no {word}")),
            None => nothing.note(format!("{word}s: {}", words::list(names()))),
        };
        let nothing = self.loader.at(nothing, &piece.at, "");
        self.loader.problems.push(nothing);
    }

    fn lay_other(&mut self, sort: Sort, piece: &RawStage) {
        let keys = match sort {
            Sort::Endpoint => &[],
            Sort::Task => task::asks(self.loader.kinds).map_or(&[] as &[_], |kind| kind.keys),
        };
        let mut others = self.loader.others.iter_mut();
        if let Some((_, known)) = others.find(|(of, known)| *of == sort && known.name == piece.name) {
            lay_over_table(keys, &mut known.table, &piece.table);
        }
    }

    /// The tables of a sort as they are after everything was laid over.
    fn take(&mut self, sort: Sort) -> Vec<RawStage> {
        let others = std::mem::take(&mut self.loader.others);
        let (taken, left): (Vec<_>, Vec<_>) = others.into_iter().partition(|(of, _)| *of == sort);
        self.loader.others = left;
        taken.into_iter().map(|(_, table)| table).collect()
    }

    fn tasks(&mut self) -> Vec<Task> {
        let mut tasks = Vec::new();
        for raw in self.take(Sort::Task) {
            let (data, problems) = self.check_task(&raw, Layer::File, Mode::Whole);
            self.say_new(problems);
            tasks.push(Task { name: raw.name, table: raw.table, data });
        }
        tasks
    }

    /// The endpoints as they are after everything was laid over, and what only the whole can tell.
    fn endpoints(&mut self) -> Endpoints {
        let mut endpoints = Endpoints::new();
        for raw in self.take(Sort::Endpoint) {
            let (params, mut problems) = self.check_endpoint(&raw, Layer::File, Mode::Whole);
            if problems.is_empty() {
                for broken in endpoint::rules(&params) {
                    let at = raw.table.get(broken.key).map_or(&raw.at, |entry| &entry.at);
                    let message = format!("endpoint `{}`: {}", raw.name, broken.message);
                    problems.push(self.loader.at(problem("manifest::rule", message).help(broken.help), at, ""));
                }
            }
            endpoints.insert(raw.name, problems.is_empty().then_some(params));
            self.say_new(problems);
        }
        endpoints
    }

    /// Everything else has been said of the piece it stands in, unless only the pieces together are wrong.
    fn say_new(&mut self, problems: Vec<Problem>) {
        let said = self.loader.problems.len();
        for new in problems {
            let known = &self.loader.problems[..said];
            if new.code == "manifest::missing_key" || !known.iter().any(|said| same_place(said, &new)) {
                self.loader.problems.push(new);
            }
        }
    }

    fn set_stage(&mut self, stage: &RawStage) {
        let Some(&at) = self.loader.by_name.get(&stage.name) else {
            return self.no_such_stage(Layer::Set, stage);
        };
        let checked = self.piece(stage, self.stages[at].kind, Layer::Set);
        let kind = stage.table.get("kind").and(checked.kind);
        self.stages[at].broken |= !checked.problems.is_empty();
        self.report(checked);
        self.lay(at, &stage.table, kind, &stage.table.get("kind").map(|entry| entry.at.clone()));
    }

    /// What only the whole can tell: missing keys. And the parameters.
    fn finish(mut self, path: &Path, title: Option<Node>, profiles: Vec<String>) -> Manifest {
        let (endpoints, tasks) = (self.endpoints(), self.tasks());
        let mut stages = Vec::with_capacity(self.stages.len());
        let raw = std::mem::take(&mut self.loader.stages);
        for (raw, laid) in raw.into_iter().zip(std::mem::take(&mut self.stages)) {
            let (mut params, mut found) = (Params::new(), Found::default());
            if let Some(kind) = laid.kind {
                let owner = format!("stage `{}`", raw.name);
                let mut check = Check::new(&self.loader.files, owner, Layer::File, Mode::Whole, &mut self.defaults);
                check.endpoints = Some(&endpoints);
                check.open = !tasks.is_empty() && kind.task_key().is_some_and(|key| laid.table.get(key).is_some());
                params = check.stage(kind, &laid.table, &raw.at);
                found = check.found;
            }
            let problems = std::mem::take(&mut found.problems);
            let broken = laid.kind.is_none() || !problems.is_empty();
            self.say_new(problems);
            stages.push(Stage {
                name: raw.name,
                at: raw.at,
                kind: laid.kind,
                table: laid.table,
                broken: broken || laid.broken,
                broken_axes: laid.broken_axes,
                params,
                found,
            });
        }
        let title = match title.map(|node| node.value) {
            Some(Value::Str(title)) => title,
            _ => path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
        };
        let mut problems = self.loader.problems;
        sort(&mut problems, &self.loader.files);
        Manifest {
            path: path.to_path_buf(),
            title,
            kinds: self.loader.kinds,
            files: self.loader.files,
            stages,
            endpoints,
            tasks,
            problems,
            profiles,
            incomplete: self.loader.incomplete,
            by_name: self.loader.by_name,
        }
    }
}

/// Lays a piece over a table with these keys.
fn lay_over_table(keys: &[Key], under: &mut Table, piece: &Table) {
    make_room(keys, under, piece);
    under.overlay(piece);
}

fn same_place(a: &Problem, b: &Problem) -> bool {
    let place = |problem: &Problem| problem.places.first().map(|place| (place.file.clone(), place.span.clone()));
    place(a) == place(b)
}

fn is_scalar(value: &Value) -> bool {
    matches!(value, Value::Str(_) | Value::Int(_) | Value::Float(_) | Value::Bool(_) | Value::Invalid)
}

/// The text of an axis value, as in a cell's name.
fn label(value: &Value) -> Option<String> {
    match value {
        Value::Str(text) => Some(text.clone()),
        Value::Int(int) => Some(int.to_string()),
        Value::Float(float) => Some(format!("{float:?}")),
        Value::Bool(bool) => Some(bool.to_string()),
        Value::Date(_) | Value::List(_) | Value::Table(_) | Value::Invalid => None,
    }
}

/// `stage."a b".key` to its parts.
fn set_path(key: &str, file: usize, shift: usize) -> Option<Vec<(String, Origin)>> {
    let text = format!("{key} = 0");
    let parsed = DeTable::parse(&text).ok()?;
    let mut problems = Vec::new();
    let reader = &mut Reader { file, path: Path::new(SET_FILE), shift, problems: &mut problems };
    let mut table = reader.table(parsed.get_ref());
    let mut path = Vec::new();
    loop {
        let [entry] = <[Entry; 1]>::try_from(table.entries).ok()?;
        path.push((entry.key, entry.at));
        match entry.value.value {
            Value::Table(inner) => table = inner,
            _ => return Some(path),
        }
    }
}

/// A value in TOML; what is none is a bare string.
fn set_value(text: &str, file: usize, shift: usize, problems: &mut Vec<Problem>) -> Node {
    let bare = || Node {
        origin: Origin { file, span: shift..shift + text.len() },
        value: Value::Str(text.trim().to_string()),
    };
    let trimmed = text.trim();
    let lead = text.len() - text.trim_start().len();
    match DeValue::parse(trimmed) {
        Ok(value) => {
            let reader = &mut Reader { file, path: Path::new(SET_FILE), shift: shift + lead, problems };
            let span = value.span();
            match reader.node(value.get_ref(), span) {
                Node { value: Value::Date(_), .. } => bare(),
                node => node,
            }
        }
        Err(_) => bare(),
    }
}

/// Where one of two keys comes in, the other goes, and what means something only beside that; in tables too.
fn make_room(keys: &[Key], laid: &mut Table, piece: &Table) {
    for key in keys {
        let Some(comes) = piece.get(key.name) else { continue };
        if let Some(other) = key.rival()
            && piece.get(other).is_none()
        {
            laid.remove(other);
            keys.iter().filter(|key| key.with == Some(other)).for_each(|key| drop(laid.remove(key.name)));
        }
        if let (Type::Table(keys), Value::Table(piece)) = (&key.ty, &comes.value.value)
            && let Some(Value::Table(laid)) = laid.get_mut(key.name)
        {
            make_room(keys, laid, piece);
        }
    }
}
