//! Files and their includes to raw stages and profiles.

use super::spec::Kind;
use super::text::{SET_FILE, Text, VERSION, problem};
use super::value::{Entry, FileId, Node, Origin, Reader, Table, Value};
use super::{task, template, words};
use crate::problem::Problem;
use std::collections::HashMap;
use std::io;
use std::path::{Component, Path, PathBuf};
use toml::de::DeTable;

/// Includes within includes beyond this are taken for a mistake (and would use up the stack).
const DEPTH_MAX: usize = 64;

const TOP: [&str; 7] = ["manifest", "title", "include", "endpoint", "task", "stage", "profile"];

/// What tables by name there are beside the stages: `[endpoint.NAME]`, `[task.NAME]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Endpoint,
    Task,
}

impl Sort {
    pub fn named(word: &str) -> Option<Sort> {
        [Sort::Endpoint, Sort::Task].into_iter().find(|sort| sort.word() == word)
    }

    pub fn word(self) -> &'static str {
        match self {
            Sort::Endpoint => "endpoint",
            Sort::Task => "task",
        }
    }

    /// With its article.
    pub fn noun(self) -> &'static str {
        match self {
            Sort::Endpoint => "an endpoint",
            Sort::Task => "a task",
        }
    }

    fn twice(self) -> &'static str {
        match self {
            Sort::Endpoint => "manifest::duplicate_endpoint",
            Sort::Task => "manifest::duplicate_task",
        }
    }
}

/// A `[stage.NAME]`, or a table of another sort.
pub(super) struct RawStage {
    pub name: String,
    pub at: Origin,
    pub table: Table,
}

/// One `[profile.NAME]` of one file. Those of the same name in several files are laid over in file order.
pub(super) struct RawProfile {
    pub name: String,
    pub title: Option<Node>,
    pub stages: Vec<RawStage>,
    pub others: Vec<(Sort, RawStage)>,
}

pub(super) struct Loader<'a> {
    pub kinds: &'static [&'static Kind],
    read: &'a dyn Fn(&Path) -> io::Result<String>,
    pub files: Vec<Text>,
    /// Normalised paths of `files`.
    seen: HashMap<PathBuf, FileId>,
    /// The files being read, outermost first, each with the `include` that named it.
    open: Vec<(FileId, Option<Origin>)>,
    pub title: Option<Node>,
    pub stages: Vec<RawStage>,
    pub others: Vec<(Sort, RawStage)>,
    pub by_name: HashMap<String, usize>,
    pub profiles: Vec<RawProfile>,
    pub problems: Vec<Problem>,
    pub incomplete: bool,
}

impl<'a> Loader<'a> {
    pub fn new(kinds: &'static [&'static Kind], read: &'a dyn Fn(&Path) -> io::Result<String>) -> Self {
        Loader {
            kinds,
            read,
            files: Vec::new(),
            seen: HashMap::new(),
            open: Vec::new(),
            title: None,
            stages: Vec::new(),
            others: Vec::new(),
            by_name: HashMap::new(),
            profiles: Vec::new(),
            problems: Vec::new(),
            incomplete: false,
        }
    }

    pub fn at(&self, problem: Problem, origin: &Origin, label: &str) -> Problem {
        problem.at_span(&self.files[origin.file].path, origin.span.clone(), label)
    }

    fn report(&mut self, problem: Problem, origin: &Origin) {
        let problem = self.at(problem, origin, "");
        self.problems.push(problem);
    }

    /// Reads `path` and, before its own stages, what it includes. `from`: the `include` that names it.
    pub fn open(&mut self, path: &Path, from: Option<&Origin>) {
        let normal = normalise(path);
        if let Some(&file) = self.seen.get(&normal) {
            if let Some(depth) = self.open.iter().position(|(open, _)| *open == file) {
                self.include_cycle(depth, from);
            }
            return;
        }
        if self.open.len() >= DEPTH_MAX {
            let deep =
                problem("manifest::include_too_deep", format!("more than {DEPTH_MAX} files include one another"));
            return from.map_or((), |from| self.report(deep, from));
        }
        let text = match (self.read)(path) {
            Ok(text) => text,
            Err(error) => {
                self.incomplete = true;
                let unreadable = problem("manifest::unreadable", format!("cannot read `{}`: {error}", path.display()));
                match from {
                    Some(from) => {
                        let help = match error.kind() {
                            io::ErrorKind::InvalidData => "save the file as UTF-8",
                            _ => "`include` is relative to the file it stands in",
                        };
                        self.report(unreadable.help(help), from);
                    }
                    None => self.problems.push(unreadable),
                }
                return;
            }
        };
        self.read_in(path, folder(path), text, from);
    }

    fn include_cycle(&mut self, depth: usize, from: Option<&Origin>) {
        let chain = &self.open[depth..];
        let name = |file: FileId| self.files[file].path.display().to_string();
        let mut files: Vec<String> = chain.iter().map(|(file, _)| name(*file)).collect();
        files.push(files[0].clone());
        let message = match chain.len() {
            1 => format!("`{}` includes itself", files[0]),
            n => format!("{} files include one another: {}", words::count(n), files.join(" -> ")),
        };
        let mut cycle = problem("manifest::include_cycle", message);
        let includes = chain[1..].iter().filter_map(|(_, from)| from.as_ref()).chain(from);
        for (origin, pair) in includes.zip(files.windows(2)) {
            cycle = self.at(cycle, origin, &format!("{} includes {}", pair[0], pair[1]));
        }
        self.problems.push(cycle.help("one of these includes has to go"));
    }

    fn file(&mut self, file: FileId) {
        let path = self.files[file].path.clone();
        let text = std::mem::take(&mut self.files[file].text);
        let (parsed, errors) = DeTable::parse_recoverable(&text);
        let table = Reader { file, path: &path, shift: 0, problems: &mut self.problems }.table(parsed.get_ref());
        self.files[file].text = text;
        if errors.is_empty() {
            self.top(file, &path, table);
            return;
        }
        // What is left of a file that does not parse is not worth messages of its own, except that
        // the files it includes are checked too.
        self.incomplete = true;
        self.problems.retain(|problem| problem.places.first().is_none_or(|place| place.file != path));
        let length = self.files[file].text.len();
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            let span = span.start.min(length)..span.end.min(length);
            self.problems.push(problem("manifest::syntax", error.message()).at_span(&path, span, ""));
        }
        if let Some(include) = table.get("include") {
            self.include(&path, &include.value.clone());
        }
    }

    fn top(&mut self, file: FileId, path: &Path, table: Table) {
        self.version(file, &table);
        if let Some(include) = table.get("include") {
            self.include(path, &include.value);
        }
        for entry in table.entries {
            match (entry.key.as_str(), entry.value.value) {
                ("manifest" | "include", _) | (_, Value::Invalid) => {}
                ("title", Value::Str(text)) => {
                    // An included file's own title is for when it is run by itself.
                    if self.open.len() == 1 {
                        self.title = Some(Node { origin: entry.value.origin, value: Value::Str(text) });
                    }
                }
                ("stage", Value::Table(stages)) => {
                    for stage in stages.entries {
                        self.stage(stage);
                    }
                }
                ("profile", Value::Table(profiles)) => {
                    for profile in profiles.entries {
                        self.profile(profile);
                    }
                }
                ("title", other) => self.wrong_type("`title`", "a string", &other, &entry.value.origin),
                ("stage", other) => {
                    self.wrong_type("`stage`", "tables (`[stage.NAME]`)", &other, &entry.value.origin);
                }
                ("profile", other) => {
                    self.wrong_type("`profile`", "tables (`[profile.NAME]`)", &other, &entry.value.origin);
                }
                (key, value) => match (Sort::named(key), value) {
                    (Some(sort), Value::Table(tables)) => tables.entries.into_iter().for_each(|t| self.other(sort, t)),
                    (Some(sort), other) => {
                        let takes = format!("tables (`[{}.NAME]`)", sort.word());
                        self.wrong_type(&format!("`{key}`"), &takes, &other, &entry.value.origin);
                    }
                    (None, _) => self.unknown_top(key, "the manifest", &TOP, &entry.at),
                },
            }
        }
    }

    fn version(&mut self, file: FileId, table: &Table) {
        let Some(entry) = table.get("manifest") else {
            let missing =
                problem("manifest::missing_version", "the file does not say which manifest language it is in")
                    .help(format!("begin it with `manifest = {VERSION}`"));
            return self.report(missing, &Origin { file, span: 0..0 });
        };
        match entry.value.value {
            Value::Int(VERSION) | Value::Invalid => {}
            Value::Int(other) => {
                let wrong =
                    problem("manifest::wrong_version", format!("`manifest = {other}` is not a version known here"))
                        .note(format!("this program reads version {VERSION}"));
                self.report(wrong, &entry.value.origin);
            }
            ref other => self.wrong_type("`manifest`", "a whole number", other, &entry.value.origin),
        }
    }

    fn include(&mut self, path: &Path, include: &Node) {
        let folder = folder(path).to_path_buf();
        let Value::List(files) = &include.value else {
            return self.wrong_type("`include`", "a list of files", &include.value, &include.origin);
        };
        for node in files {
            match &node.value {
                Value::Str(text) => match text.strip_prefix(task::SCHEME) {
                    Some(name) => self.shipped(name, &folder, &node.origin),
                    None => self.open(&folder.join(text), Some(&node.origin)),
                },
                other => self.wrong_type("`include`", "a list of files", other, &node.origin),
            }
        }
    }

    /// A task file that is part of the program; what it names by path lies in `folder`, where it is included.
    fn shipped(&mut self, name: &str, folder: &Path, from: &Origin) {
        let path = PathBuf::from(format!("{}{name}", task::SCHEME));
        if self.seen.contains_key(&path) {
            return;
        }
        let names = || task::SHIPPED.iter().map(|(name, _)| *name);
        let Some((_, text)) = task::SHIPPED.iter().find(|(shipped, _)| *shipped == name) else {
            let mut unknown =
                problem("manifest::unknown_task", format!("no task file `{name}` comes with the program"));
            if let Some(near) = words::nearest(name, names()) {
                unknown = unknown.help(format!("one with a similar name does: `{}{near}`", task::SCHEME));
            }
            self.incomplete = true;
            return self.report(unknown.note(format!("task files that come with it: {}", words::list(names()))), from);
        };
        self.read_in(&path, folder, text.to_string(), Some(from));
    }

    fn read_in(&mut self, path: &Path, folder: &Path, text: String, from: Option<&Origin>) {
        let file = self.files.len();
        self.seen.insert(normalise(path), file);
        self.files.push(Text { path: path.to_path_buf(), folder: folder.to_path_buf(), text });
        self.open.push((file, from.cloned()));
        self.file(file);
        self.open.pop();
    }

    fn other(&mut self, sort: Sort, entry: Entry) {
        let word = sort.word();
        let Some(table) = self.named_table(word, entry) else { return };
        if !template::is_stage_name(&table.name) {
            let bad = problem("manifest::bad_name", format!("`{}` cannot name {}", table.name, sort.noun()))
                .help("use letters, digits, `_` and `-`");
            return self.report(bad, &table.at);
        }
        match self.others.iter().find(|(of, known)| *of == sort && known.name == table.name) {
            Some((_, first)) => {
                let twice = problem(sort.twice(), format!("{word} `{}` is declared twice", table.name));
                let twice = self.at(twice, &table.at, "declared again");
                let twice = self.at(twice, &first.at, "first declared");
                self.problems.push(twice.help("rename one of the two, or change the other's keys by a profile"));
            }
            None => self.others.push((sort, table)),
        }
    }

    /// `task = "NAME"` names a task or a stage: where a name is both, nobody could say which.
    pub fn shared_names(&mut self) {
        for (_, task) in self.others.iter().filter(|(sort, _)| *sort == Sort::Task) {
            let Some(&stage) = self.by_name.get(&task.name) else { continue };
            let shared =
                problem("manifest::shared_name", format!("`{}` is the name of a task and of a stage", task.name));
            let shared = self.at(shared, &task.at, "the task");
            let shared = self.at(shared, &self.stages[stage].at, "the stage");
            let help = format!("rename one of the two, for instance the stage to `{}-problems`", task.name);
            self.problems.push(shared.help(help));
        }
    }

    fn stage(&mut self, entry: Entry) {
        let Some(stage) = self.named_table("stage", entry) else { return };
        if !template::is_stage_name(&stage.name) {
            let bad = problem("manifest::bad_name", format!("`{}` cannot name a stage", stage.name))
                .help("use letters, digits, `_` and `-`");
            return self.report(bad, &stage.at);
        }
        match self.by_name.get(&stage.name) {
            Some(&first) => {
                let twice = problem("manifest::duplicate_stage", format!("stage `{}` is declared twice", stage.name));
                let twice = self.at(twice, &stage.at, "declared again");
                let twice = self.at(twice, &self.stages[first].at, "first declared");
                self.problems.push(twice.help("rename one of the two, or change the other's keys by a profile"));
            }
            None => {
                self.by_name.insert(stage.name.clone(), self.stages.len());
                self.stages.push(stage);
            }
        }
    }

    fn profile(&mut self, entry: Entry) {
        let Value::Table(table) = entry.value.value else {
            let subject = format!("profile `{}`", entry.key);
            return self.wrong_type(&subject, "a table", &entry.value.value, &entry.value.origin);
        };
        let mut profile = RawProfile { name: entry.key, title: None, stages: Vec::new(), others: Vec::new() };
        for entry in table.entries {
            match (entry.key.as_str(), &entry.value.value) {
                ("title", Value::Str(_)) => profile.title = Some(entry.value),
                ("title", other) => self.wrong_type("`title`", "a string", other, &entry.value.origin),
                ("stage", Value::Table(stages)) => {
                    for stage in stages.entries.clone() {
                        profile.stages.extend(self.named_table("stage", stage));
                    }
                }
                ("stage", other) => self.wrong_type("`stage`", "tables", other, &entry.value.origin),
                (key, value) => match (Sort::named(key), value) {
                    (Some(sort), Value::Table(tables)) => {
                        for table in tables.entries.clone() {
                            profile.others.extend(self.named_table(key, table).map(|table| (sort, table)));
                        }
                    }
                    (Some(_), other) => {
                        self.wrong_type(&format!("`{key}`"), "tables", other, &entry.value.origin);
                    }
                    (None, _) => {
                        let owner = format!("profile `{}`", profile.name);
                        self.unknown_top(key, &owner, &["title", "endpoint", "task", "stage"], &entry.at);
                    }
                },
            }
        }
        self.profiles.push(profile);
    }

    fn named_table(&mut self, what: &str, entry: Entry) -> Option<RawStage> {
        match entry.value.value {
            // A header `[stage.x]` is the value's place; a dotted or inline form has only its key.
            Value::Table(table) => {
                let text = &self.files[entry.at.file].text;
                let header = entry.value.origin.span.clone();
                let at = if text.get(header.clone()).is_some_and(|text| text.starts_with('[')) {
                    Origin { file: entry.at.file, span: header }
                } else {
                    entry.at
                };
                Some(RawStage { name: entry.key, at, table })
            }
            other => {
                self.wrong_type(&format!("{what} `{}`", entry.key), "a table", &other, &entry.value.origin);
                None
            }
        }
    }

    fn wrong_type(&mut self, subject: &str, takes: &str, found: &Value, origin: &Origin) {
        if !matches!(found, Value::Invalid) {
            let message = format!("{subject} takes {takes}, not {}", found.is_a());
            self.report(problem("manifest::wrong_type", message), origin);
        }
    }

    fn unknown_top(&mut self, key: &str, owner: &str, known: &[&str], origin: &Origin) {
        let mut unknown = problem("manifest::unknown_key", format!("unknown key `{key}` in {owner}"));
        if let Some(near) = words::nearest(key, known.iter().copied()) {
            unknown = unknown.help(format!("a key with a similar name exists: `{near}`"));
        }
        let unknown = unknown.note(format!("keys of {owner}: {}", known.join(", ")));
        self.report(unknown, origin);
    }

    /// The pseudo file that holds what `--set` gave.
    pub fn add_set_file(&mut self, text: String) -> FileId {
        self.files.push(Text { path: PathBuf::from(SET_FILE), folder: PathBuf::new(), text });
        self.files.len() - 1
    }
}

/// The folder a file lies in; empty for a bare name.
pub(super) fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// `a/./b/../c` -> `a/c`, without looking at the disk: how an include is known to be the same file.
fn normalise(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if matches!(normal.components().next_back(), Some(Component::Normal(_))) => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    normal
}
