//! One table of a stage against its kind's keys: every problem, and what the values come to.
//!
//! The same walk serves three moments: a piece as it stands in a file or profile ([`Mode::Piece`]: nothing
//! is missing yet), the whole after overlays ([`Mode::Whole`]: missing keys, defaults), and a string after
//! its `{axis}` has been replaced ([`Mode::Filled`]).
//!
//! One file, for it is one walk: each type of value is a method that shares the place, the findings and the words for
//! what is wrong.

use super::endpoint::ENDPOINT;
use super::reference::{Arity, RefUse, beside};
use super::spec::{ArtifactType, Key, Kind, Params, Presence, Type};
use super::task;
use super::template::{self, Reference};
use super::text::{RESERVED, Text, problem};
use super::value::{Entry, Node, Origin, Table, Value};
use super::words;
use crate::problem::Problem;
use serde_json::{Map, Number, Value as Json};
use std::collections::{BTreeMap, HashMap};
use toml::de::DeValue;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Piece,
    Whole,
    Filled,
}

/// Which layer a piece belongs to: an unknown key is told differently in each.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layer<'a> {
    File,
    Profile(&'a str),
    Set,
}

/// A step of a dotted key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Item(usize),
}

/// A string with `{axis}` in it, to be filled for each cell.
#[derive(Clone)]
pub(crate) struct Template {
    pub steps: Vec<Step>,
    pub text: String,
    pub ty: &'static Type,
    pub origin: Origin,
}

/// How many cells a reference stands for.
#[derive(Debug, Clone)]
pub(crate) struct SourceUse {
    /// Dotted key.
    pub key: String,
    pub text: String,
    pub origin: Origin,
}

/// What a walk came to.
#[derive(Default, Clone)]
pub(crate) struct Found {
    pub problems: Vec<Problem>,
    pub templates: Vec<Template>,
    pub refs: Vec<RefUse>,
    pub sources: Vec<SourceUse>,
}

/// What a value came to.
enum Got {
    Json(Json),
    /// A reference: taken out of the parameters.
    Taken,
    /// Reported.
    Bad,
}

/// The endpoints by name; `None`: something is wrong with it, which is reported.
pub(crate) type Endpoints = BTreeMap<String, Option<Params>>;

/// The walk over one stage or one endpoint.
pub(crate) struct Check<'a> {
    pub files: &'a [Text],
    /// ``stage `sft` ``.
    pub owner: String,
    /// Known once everything is laid over.
    pub endpoints: Option<&'a Endpoints>,
    pub layer: Layer<'a>,
    pub mode: Mode,
    /// Keys that a task may give are not missing: which task it is comes out later.
    pub open: bool,
    pub found: Found,
    /// Values of [`Presence::Default`], parsed once.
    pub defaults: &'a mut HashMap<&'static str, Value>,
    steps: Vec<Step>,
}

impl<'a> Check<'a> {
    pub fn new(
        files: &'a [Text],
        owner: String,
        layer: Layer<'a>,
        mode: Mode,
        defaults: &'a mut HashMap<&'static str, Value>,
    ) -> Self {
        let (found, steps) = (Found::default(), Vec::new());
        Check { files, owner, endpoints: None, layer, mode, open: false, found, defaults, steps }
    }

    /// Checks the keys of a stage, reserved ones left aside, and returns the parameters. `at`: the
    /// place of what is missing. Where a template stands, the parameters hold null.
    pub fn stage(&mut self, kind: &'static Kind, table: &Table, at: &Origin) -> Map<String, Json> {
        for entry in &table.entries {
            let reserved = RESERVED.iter().any(|(name, _)| *name == entry.key);
            if !reserved && !kind.keys.iter().any(|key| key.name == entry.key) {
                let what = format!("kind `{}`", kind.name);
                self.unknown("", &what, &entry.key, &entry.at, kind.keys.iter(), RESERVED);
            }
        }
        self.keys(kind.keys, table, at)
    }

    /// Checks the keys of an endpoint, and returns them.
    pub fn endpoint(&mut self, table: &Table, at: &Origin) -> Params {
        for entry in &table.entries {
            if !ENDPOINT.iter().any(|key| key.name == entry.key) {
                self.unknown("", "an endpoint", &entry.key, &entry.at, ENDPOINT.iter(), &[]);
            }
        }
        let params = self.keys(ENDPOINT, table, at);
        for template in std::mem::take(&mut self.found.templates) {
            let axis = template::axes(&template.text)[0].1;
            let message =
                format!("`{}` of {} uses axis `{axis}`, and an endpoint has none", dotted(&template.steps), self.owner);
            let help = "declare an endpoint for each, and name them by an axis: `endpoint = \"{teacher}\"`";
            self.bad(problem("plan::unknown_axis", message).help(help), &template.origin);
        }
        params
    }

    /// Checks the keys of a task, and returns the reference to its data. `kinds`: where its other keys come from.
    pub fn task(&mut self, kinds: &[&'static Kind], table: &Table, at: &Origin) -> Option<RefUse> {
        let known = || task::KEYS.iter().chain(task::keys(kinds));
        let mut given = Table::default();
        for entry in &table.entries {
            match known().any(|key| key.name == entry.key) {
                true => given.entries.push(entry.clone()),
                false => self.unknown("", "a task", &entry.key, &entry.at, known(), &[]),
            }
        }
        self.keys(task::KEYS, &given, at);
        let data = self.found.refs.pop();
        if let Some(data) = data.as_ref().filter(|data| !template::axes(&data.text).is_empty()) {
            let axis = template::axes(&data.text)[0].1;
            let message = format!("`data` of {} uses axis `{axis}`, and a task has none", self.owner);
            let help = "name the stage; the axes it has come along with it";
            self.bad(problem("plan::unknown_axis", message).help(help), &data.origin);
            return None;
        }
        // The rest is a part of a stage, wherever it stands.
        let mode = std::mem::replace(&mut self.mode, Mode::Piece);
        if let Some(kind) = task::asks(kinds) {
            given.remove(task::DATA.name);
            self.keys(kind.keys, &given, at);
        }
        self.mode = mode;
        data
    }

    /// Checks one value against a type. `steps`: its dotted key.
    pub fn one(&mut self, node: &Node, ty: &'static Type, steps: &[Step]) -> Option<Json> {
        self.steps = steps.to_vec();
        match self.value(node, ty) {
            Got::Json(json) => Some(json),
            Got::Taken | Got::Bad => None,
        }
    }

    fn keys(&mut self, keys: &'static [Key], table: &Table, at: &Origin) -> Map<String, Json> {
        let mut params = Map::new();
        for key in keys {
            self.steps.push(Step::Key(key.name.to_string()));
            if let Some((needs, has)) = beside(key, keys, table) {
                if let Some(entry) = table.get(key.name) {
                    self.goes_with(entry, needs, has);
                }
                self.steps.pop();
                continue;
            }
            let got = match (table.get(key.name), &key.presence) {
                (Some(entry), Presence::Either(other) | Presence::Or(other)) => {
                    self.both(keys, key.name, other, entry, table);
                    self.value(&entry.value, &key.ty)
                }
                (Some(entry), _) => self.value(&entry.value, &key.ty),
                (None, Presence::Either(other)) if self.mode == Mode::Whole && table.get(other).is_none() => {
                    if is_first(keys, key.name, other) {
                        self.neither(keys, key, other, at);
                    }
                    Got::Bad
                }
                (None, Presence::Required) if self.mode == Mode::Whole => {
                    if !(self.open && key.task) {
                        self.missing(key, at);
                    }
                    Got::Bad
                }
                (None, Presence::Default(text)) if self.mode == Mode::Whole => {
                    let value = self.default(text);
                    self.value(&Node { origin: at.clone(), value }, &key.ty)
                }
                (None, _) => Got::Taken,
            };
            if let Got::Json(json) = got {
                params.insert(key.name.to_string(), json);
            }
            self.steps.pop();
        }
        params
    }

    /// A default is TOML, or a bare string (`cosine`), as with `--set`.
    fn default(&mut self, text: &'static str) -> Value {
        self.defaults.entry(text).or_insert_with(|| parse_default(text)).clone()
    }

    fn value(&mut self, node: &Node, ty: &'static Type) -> Got {
        if matches!(node.value, Value::Invalid) {
            return Got::Bad;
        }
        if let Type::Any(types) = ty {
            return self.any(node, ty, types);
        }
        if let (Value::Str(text), true) = (&node.value, self.mode != Mode::Filled)
            && !template::axes(text).is_empty()
        {
            return self.template(text, node, ty);
        }
        match (ty, &node.value) {
            (Type::Bool, Value::Bool(bool)) => Got::Json(Json::Bool(*bool)),
            (Type::Int { min, max }, Value::Int(int)) => self.int(*int, *min, *max, node),
            (Type::Float { min, max, above }, Value::Float(float)) => self.float(*float, *min, *max, *above, node),
            (Type::Float { min, max, above }, Value::Int(int)) => self.float(*int as f64, *min, *max, *above, node),
            (Type::Str, Value::Str(text)) => Got::Json(Json::String(text.clone())),
            (Type::Choice(choices), Value::Str(text)) => self.choice(text, choices, node),
            (Type::Source(schemes), Value::Str(text)) => self.source(text, schemes, node),
            (Type::Endpoint, Value::Str(text)) => self.named_endpoint(text, node),
            (Type::Ref(types), Value::Str(text)) => self.reference(text, types, Arity::One, true, node),
            (Type::Task(types), Value::Str(text)) => {
                let got = self.reference(text, types, Arity::One, false, node);
                self.names_task(got)
            }
            (Type::Refs(types), Value::Str(text)) => self.reference(text, types, Arity::One, false, node),
            (Type::Gather(types), Value::Str(text)) => self.reference(text, types, Arity::All, false, node),
            (Type::Refs(_) | Type::Gather(_), Value::List(items)) => self.references(items, ty, node),
            (Type::List(item_ty), Value::List(items)) => {
                let mut list = Vec::with_capacity(items.len());
                let mut bad = false;
                for (i, item) in items.iter().enumerate() {
                    self.steps.push(Step::Item(i));
                    match self.value(item, item_ty) {
                        Got::Json(json) => list.push(json),
                        // Items keep their index for templates and sources.
                        Got::Taken => list.push(Json::Null),
                        Got::Bad => bad = true,
                    }
                    self.steps.pop();
                }
                if bad { Got::Bad } else { Got::Json(Json::Array(list)) }
            }
            (Type::Map(value_ty), Value::Table(table)) => {
                let mut map = Map::new();
                // Order does not matter to a map, so it must not reach anything made from it.
                let mut entries: Vec<_> = table.entries.iter().collect();
                entries.sort_by(|a, b| a.key.cmp(&b.key));
                for entry in entries {
                    self.steps.push(Step::Key(entry.key.clone()));
                    if let Got::Json(json) = self.value(&entry.value, value_ty) {
                        map.insert(entry.key.clone(), json);
                    }
                    self.steps.pop();
                }
                Got::Json(Json::Object(map))
            }
            (Type::Table(keys), Value::Table(table)) => {
                for entry in &table.entries {
                    if !keys.iter().any(|key| key.name == entry.key) {
                        let owner = self.dotted();
                        let what = format!("`{owner}`");
                        self.unknown(&owner, &what, &entry.key, &entry.at, keys.iter(), &[]);
                    }
                }
                Got::Json(Json::Object(self.keys(keys, table, &node.origin)))
            }
            _ => self.wrong_type(node, ty),
        }
    }

    /// The first alternative that fits; if none does, what is wrong with the one of the same shape.
    fn any(&mut self, node: &Node, ty: &'static Type, types: &'static [Type]) -> Got {
        if let (Value::Str(text), true) = (&node.value, self.mode != Mode::Filled)
            && !template::axes(text).is_empty()
        {
            // Which alternative fits is known once the axes have values; what could be a reference has
            // to be known before, because it brings axes.
            let sourcelike = text.split('[').next().is_some_and(|head| head.contains(':'));
            let Some(reference) = types.iter().find(|ty| is_ref(ty) && !sourcelike) else {
                return self.template(text, node, ty);
            };
            let got = self.template(text, node, reference);
            if types.iter().all(|ty| is_ref(ty) || matches!(ty, Type::List(_) | Type::Map(_) | Type::Table(_))) {
                return got;
            }
            if let Some(last) = self.found.refs.last_mut() {
                last.also = Some(types);
            }
            let template =
                Template { steps: self.steps.clone(), text: text.to_string(), ty, origin: node.origin.clone() };
            self.found.templates.push(template);
            return Got::Json(Json::Null);
        }
        for alternative in types {
            let mark = self.mark();
            let got = self.value(node, alternative);
            if self.found.problems.len() == mark.0 {
                for reference in &mut self.found.refs[mark.2..] {
                    reference.also = Some(types);
                }
                return got;
            }
            self.back_to(mark);
        }
        match types.iter().find(|ty| same_shape(&node.value, ty)) {
            Some(alternative) => self.value(node, alternative),
            None => self.wrong_type(node, ty),
        }
    }

    fn mark(&self) -> (usize, usize, usize, usize) {
        let Found { problems, templates, refs, sources } = &self.found;
        (problems.len(), templates.len(), refs.len(), sources.len())
    }

    fn back_to(&mut self, (problems, templates, refs, sources): (usize, usize, usize, usize)) {
        self.found.problems.truncate(problems);
        self.found.templates.truncate(templates);
        self.found.refs.truncate(refs);
        self.found.sources.truncate(sources);
    }

    fn template(&mut self, text: &str, node: &Node, ty: &'static Type) -> Got {
        match ty {
            Type::Ref(types) => return self.push_ref(text, types, Arity::One, true, node),
            Type::Task(types) => {
                let got = self.push_ref(text, types, Arity::One, false, node);
                return self.names_task(got);
            }
            Type::Refs(types) => return self.push_ref(text, types, Arity::One, false, node),
            Type::Gather(types) => return self.push_ref(text, types, Arity::All, false, node),
            Type::Bool | Type::Int { .. } | Type::Float { .. } if template::whole(text).is_none() => {
                let whole = template::axes(text)[0].1;
                self.wrong_type(node, ty);
                let last = self.found.problems.len() - 1;
                self.found.problems[last]
                    .help
                    .push(format!("a string that is exactly `{{{whole}}}` takes the axis's own type"));
                return Got::Bad;
            }
            Type::List(_) | Type::Map(_) | Type::Table(_) => return self.wrong_type(node, ty),
            _ => {}
        }
        let template = Template { steps: self.steps.clone(), text: text.to_string(), ty, origin: node.origin.clone() };
        self.found.templates.push(template);
        Got::Json(Json::Null)
    }

    fn references(&mut self, items: &[Node], ty: &'static Type, node: &Node) -> Got {
        if items.is_empty() {
            let message = format!("{} names no stage", self.subject());
            return self.bad(problem("manifest::out_of_range", message), &node.origin);
        }
        let mut bad = false;
        for item in items {
            bad |= match &item.value {
                Value::Str(_) => matches!(self.value(item, ty), Got::Bad),
                _ => matches!(self.wrong_type(item, ty), Got::Bad),
            };
        }
        if bad { Got::Bad } else { Got::Taken }
    }

    fn reference(&mut self, text: &str, types: &'static [ArtifactType], arity: Arity, chain: bool, node: &Node) -> Got {
        if let Err(why) = Reference::parse(text) {
            let bad = problem("plan::bad_reference", format!("{} is not a reference: {why}", self.subject()));
            let help = match text.split_once('.') {
                Some((stage, _)) if template::is_stage_name(stage) => {
                    format!("the name of a stage stands alone: `{stage}`; what it yields follows from its kind")
                }
                _ => "a reference is the name of a stage, or `stage[axis=value]`".to_string(),
            };
            let bad = bad.help(help);
            return self.bad(bad, &node.origin);
        }
        self.push_ref(text, types, arity, chain, node)
    }

    fn push_ref(&mut self, text: &str, types: &'static [ArtifactType], arity: Arity, chain: bool, node: &Node) -> Got {
        self.found.refs.push(RefUse {
            slot: self.dotted(),
            arity,
            chain,
            task: false,
            takes: types,
            also: None,
            text: text.to_string(),
            origin: node.origin.clone(),
        });
        Got::Taken
    }

    /// The reference just found may name a task.
    fn names_task(&mut self, got: Got) -> Got {
        if let (Got::Taken, Some(reference)) = (&got, self.found.refs.last_mut()) {
            reference.task = true;
        }
        got
    }

    fn source(&mut self, text: &str, schemes: &[&str], node: &Node) -> Got {
        // Where nothing but a file can be meant, its path alone will do.
        let bare = (schemes == ["path"] && !text.starts_with("path:")).then(|| format!("path:{text}"));
        let text = bare.as_deref().unwrap_or(text);
        let list = || schemes.iter().map(|scheme| format!("`{scheme}:`")).collect::<Vec<_>>().join(", ");
        let Some((scheme, rest)) = text.split_once(':').filter(|(scheme, _)| schemes.contains(scheme)) else {
            let mut unknown =
                problem("manifest::unknown_scheme", format!("{} begins with no scheme known for it", self.subject()))
                    .note(format!("schemes: {}", list()));
            if !text.contains(':') && schemes.contains(&"path") {
                unknown = unknown.help(format!("for a file beside the manifest: `path:{text}`"));
            } else if let Some(near) =
                text.split_once(':').and_then(|(scheme, _)| words::nearest(scheme, schemes.iter().copied()))
            {
                unknown = unknown.help(format!("a similar scheme exists: `{near}:`"));
            }
            return self.bad(unknown, &node.origin);
        };
        if rest.trim().is_empty() {
            let empty =
                problem("manifest::out_of_range", format!("{} names nothing after `{scheme}:`", self.subject()));
            return self.bad(empty, &node.origin);
        }
        let key = self.dotted();
        self.found.sources.push(SourceUse { key, text: text.to_string(), origin: node.origin.clone() });
        Got::Json(Json::String(text.to_string()))
    }

    fn named_endpoint(&mut self, name: &str, node: &Node) -> Got {
        // A piece may be laid over by what declares it.
        let Some(endpoints) = self.endpoints else { return Got::Json(Json::String(name.to_string())) };
        match endpoints.get(name) {
            Some(Some(params)) => return Got::Json(Json::Object(params.clone())),
            Some(None) => return Got::Bad,
            None => {}
        }
        let message = format!("{} names `{name}`, and there is no such endpoint", self.subject());
        let mut missing = problem("manifest::unknown_endpoint", message);
        missing = match words::nearest(name, endpoints.keys().map(String::as_str)) {
            Some(near) => missing.help(format!("an endpoint with a similar name exists: `{near}`")),
            None if endpoints.is_empty() => {
                missing.help(format!("declare it: `[endpoint.{name}]` with `url` and `model`"))
            }
            None => missing.note(format!("endpoints: {}", words::list(endpoints.keys().map(String::as_str)))),
        };
        self.bad(missing, &node.origin)
    }

    /// A key that means nothing beside what the stage has.
    fn goes_with(&mut self, entry: &Entry, needs: &str, has: &str) {
        let place = match self.steps.len() {
            1 => "the stage".to_string(),
            n => quoted(&self.steps[..n - 1]),
        };
        let message = format!("{} goes with `{needs}`, and {place} has `{has}`", self.subject());
        self.bad(problem("manifest::key_without_effect", message).help("take it out"), &entry.at);
    }

    /// Told once, at the later of the two.
    fn both(&mut self, keys: &[Key], name: &str, other: &str, entry: &Entry, table: &Table) {
        let Some(first) = table.get(other).filter(|_| !is_first(keys, name, other)) else { return };
        let message = format!("{} has both `{other}` and `{name}`", self.table());
        let twice = problem("manifest::one_of_two", message).help("keep one of the two");
        let file = &self.files[first.at.file].path;
        let twice = twice.at_span(file, first.at.span.clone(), "");
        self.bad(twice, &entry.at);
    }

    fn neither(&mut self, keys: &[Key], key: &Key, other: &str, at: &Origin) {
        let mut missing =
            problem("manifest::missing_key", format!("{} needs `{}` or `{other}`", self.table(), key.name))
                .note(format!("`{}`: {}", key.name, key.doc));
        if let Some(other) = keys.iter().find(|key| key.name == other) {
            missing = missing.note(format!("`{}`: {}", other.name, other.doc));
        }
        self.bad(missing, at);
    }

    fn choice(&mut self, text: &str, choices: &[&str], node: &Node) -> Got {
        if choices.contains(&text) {
            return Got::Json(Json::String(text.to_string()));
        }
        let list = words::list(choices.iter().copied());
        let mut unknown = problem("manifest::unknown_choice", format!("{} cannot be `{text}`", self.subject()))
            .note(format!("it takes one of {list}"));
        if let Some(near) = words::nearest(text, choices.iter().copied()) {
            unknown = unknown.help(format!("a similar one exists: `{near}`"));
        }
        self.bad(unknown, &node.origin)
    }

    fn int(&mut self, int: i64, min: i64, max: i64, node: &Node) -> Got {
        if (min..=max).contains(&int) {
            return Got::Json(Json::from(int));
        }
        let low = (min != i64::MIN).then(|| format!("at least {min}"));
        let high = (max != i64::MAX).then(|| format!("at most {max}"));
        self.out_of_range(low, high, &int.to_string(), node)
    }

    fn float(&mut self, float: f64, min: f64, max: f64, above: bool, node: &Node) -> Got {
        let low_holds = if above { float > min } else { float >= min };
        if low_holds
            && float <= max
            && let Some(number) = Number::from_f64(float)
        {
            return Got::Json(Json::Number(number));
        }
        let word = if above { "above" } else { "at least" };
        let low = (min > f64::MIN).then(|| format!("{word} {}", plain(min)));
        let high = (max < f64::MAX).then(|| format!("at most {}", plain(max)));
        self.out_of_range(low, high, &plain(float), node)
    }

    fn out_of_range(&mut self, low: Option<String>, high: Option<String>, found: &str, node: &Node) -> Got {
        let range = [low, high].into_iter().flatten().collect::<Vec<_>>().join(" and ");
        let message = format!("{} has to be {range}, not {found}", self.subject());
        self.bad(problem("manifest::out_of_range", message), &node.origin)
    }

    fn wrong_type(&mut self, node: &Node, ty: &'static Type) -> Got {
        if matches!(node.value, Value::Invalid) {
            return Got::Bad;
        }
        let message = format!("{} takes {}, not {}", self.subject(), takes(ty), node.value.is_a());
        let mut wrong = problem("manifest::wrong_type", message);
        if let Value::Str(text) = &node.value
            && numeric(ty)
            && (text.parse::<f64>().is_ok() || text.parse::<bool>().is_ok())
        {
            wrong = wrong.help(format!("without quotes: `{text}`"));
        }
        self.bad(wrong, &node.origin)
    }

    fn missing(&mut self, key: &Key, at: &Origin) {
        let missing = problem("manifest::missing_key", format!("{} needs the key `{}`", self.table(), key.name))
            .note(format!("`{}`: {}", key.name, key.doc));
        self.bad(missing, at);
    }

    /// `table`: the dotted key of the table it stands in; empty: the owner itself. `what`: whose keys are listed.
    fn unknown(
        &mut self,
        table: &str,
        what: &str,
        name: &str,
        at: &Origin,
        keys: impl Iterator<Item = &'static Key>,
        reserved: &[(&'static str, &'static str)],
    ) {
        let mut known: Vec<&str> = keys.map(|key| key.name).collect();
        let near = words::nearest(name, known.iter().copied().chain(reserved.iter().map(|(reserved, _)| *reserved)));
        known.sort_unstable();
        let place = if table.is_empty() { self.owner.clone() } else { format!("`{table}` of {}", self.owner) };
        let (code, message) = match self.layer {
            Layer::File => ("manifest::unknown_key", format!("unknown key `{name}` in {place}")),
            Layer::Profile(profile) => (
                "manifest::profile_touches_nothing",
                format!("profile `{profile}` sets `{name}` in {place}, and there is no such key"),
            ),
            Layer::Set => (
                "manifest::set_touches_nothing",
                format!("`--set` names `{name}` in {place}, and there is no such key"),
            ),
        };
        let mut unknown = problem(code, message);
        if let Some(near) = near {
            unknown = unknown.help(format!("a key with a similar name exists: `{near}`"));
        }
        unknown = unknown.note(format!("keys of {what}: {}", known.join(", ")));
        self.bad(unknown, at);
    }

    /// Adds `problem` at `origin`.
    fn bad(&mut self, problem: Problem, origin: &Origin) -> Got {
        let file = &self.files[origin.file].path;
        self.found.problems.push(problem.at_span(file, origin.span.clone(), ""));
        Got::Bad
    }

    fn dotted(&self) -> String {
        dotted(&self.steps)
    }

    /// The table that the key at hand stands in.
    fn table(&self) -> String {
        match self.steps.len() {
            0 | 1 => self.owner.clone(),
            n => format!("{} of {}", quoted(&self.steps[..n - 1]), self.owner),
        }
    }

    fn subject(&self) -> String {
        format!("{} of {}", quoted(&self.steps), self.owner)
    }
}

fn is_first(keys: &[Key], name: &str, other: &str) -> bool {
    keys.iter().map(|key| key.name).find(|key| *key == name || *key == other) == Some(name)
}

fn is_ref(ty: &Type) -> bool {
    matches!(ty, Type::Ref(_) | Type::Task(_) | Type::Refs(_) | Type::Gather(_))
}

/// Whether the first of `types` that `text` fits is a reference.
pub(crate) fn names_stage(types: &[Type], text: &str) -> bool {
    for ty in types {
        let fits = match ty {
            Type::Ref(_) | Type::Task(_) | Type::Refs(_) | Type::Gather(_) => {
                if Reference::parse(text).is_ok() {
                    return true;
                }
                false
            }
            Type::Str => true,
            Type::Choice(choices) => choices.contains(&text),
            Type::Source(schemes) => text.split_once(':').is_some_and(|(scheme, _)| schemes.contains(&scheme)),
            Type::Bool => text.parse::<bool>().is_ok(),
            Type::Int { .. } => text.parse::<i64>().is_ok(),
            Type::Float { .. } => text.parse::<f64>().is_ok(),
            Type::Any(types) => {
                if names_stage(types, text) {
                    return true;
                }
                false
            }
            Type::List(_) | Type::Map(_) | Type::Table(_) | Type::Endpoint => false,
        };
        if fits {
            return false;
        }
    }
    false
}

/// The words among `types`.
pub(crate) fn choices(types: &[Type]) -> impl Iterator<Item = &'static str> {
    types
        .iter()
        .flat_map(|ty| match ty {
            Type::Choice(choices) => *choices,
            _ => &[],
        })
        .copied()
}

/// `schedule.warmup_ratio`, `files.0`.
pub(crate) fn dotted(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        if !text.is_empty() {
            text.push('.');
        }
        match step {
            Step::Key(key) => text.push_str(key),
            Step::Item(i) => text += &i.to_string(),
        }
    }
    text
}

fn quoted(steps: &[Step]) -> String {
    format!("`{}`", dotted(steps))
}

/// The value of a default in a kind's table.
pub(crate) fn parse_default(text: &'static str) -> Value {
    match DeValue::parse(text) {
        Ok(value) => {
            let mut problems = Vec::new();
            let span = value.span();
            let path = std::path::Path::new("");
            super::value::Reader { file: 0, path, shift: 0, problems: &mut problems }.node(value.get_ref(), span).value
        }
        Err(_) => Value::Str(text.to_string()),
    }
}

/// `3`, `0.1`, `1e-6`: as a person writes it.
fn plain(float: f64) -> String {
    let text = format!("{float:?}");
    text.strip_suffix(".0").unwrap_or(&text).to_string()
}

fn numeric(ty: &Type) -> bool {
    matches!(ty, Type::Int { .. } | Type::Float { .. } | Type::Bool)
}

/// Whether a value of this sort could have the type at all.
fn same_shape(value: &Value, ty: &Type) -> bool {
    match value {
        Value::Str(_) => is_ref(ty) || matches!(ty, Type::Str | Type::Choice(_) | Type::Source(_) | Type::Endpoint),
        Value::Int(_) | Value::Float(_) => matches!(ty, Type::Int { .. } | Type::Float { .. }),
        Value::Bool(_) => matches!(ty, Type::Bool),
        Value::List(_) => matches!(ty, Type::List(_) | Type::Refs(_) | Type::Gather(_)),
        Value::Table(_) => matches!(ty, Type::Map(_) | Type::Table(_)),
        Value::Date(_) | Value::Invalid => false,
    }
}

/// What a type takes, for messages.
fn takes(ty: &Type) -> String {
    let stage = |types: &[ArtifactType]| {
        let nouns: Vec<&str> = types.iter().map(|ty| ty.noun()).collect();
        format!("the name of a stage that yields {}", nouns.join(" or "))
    };
    match ty {
        Type::Bool => "`true` or `false`".into(),
        Type::Int { .. } => "a whole number".into(),
        Type::Float { .. } => "a number".into(),
        Type::Str => "a string".into(),
        Type::Choice(choices) => format!("one of {}", words::list(choices.iter().copied())),
        Type::Ref(types) => stage(types),
        Type::Task(types) => format!("the name of a task, or {}", stage(types)),
        Type::Refs(types) | Type::Gather(types) => format!("{}, or a list of them", stage(types)),
        Type::Source(schemes) => {
            let list: Vec<String> = schemes.iter().map(|scheme| format!("`{scheme}:...`")).collect();
            if *schemes == ["path"] { "the path of a file".into() } else { format!("a source ({})", list.join(", ")) }
        }
        Type::Endpoint => "the name of an endpoint".into(),
        Type::List(_) => "a list".into(),
        Type::Map(_) | Type::Table(_) => "a table".into(),
        Type::Any(types) => types.iter().map(takes).collect::<Vec<_>>().join(", or "),
    }
}
