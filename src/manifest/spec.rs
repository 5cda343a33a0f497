//! How a kind of stage declares itself: its keys, their types, ranges and defaults, as data.
//!
//! One table drives validation, suggestions, defaults, the JSON Schema and the documentation. The
//! tables themselves live in `src/stage/kinds/<kind>.rs`, beside the code that reads the values.

use serde_json::{Map, Value};

/// Resolved keys of a cell: defaults filled in, `{axis}` replaced, references taken out.
pub type Params = Map<String, Value>;

/// What a stage yields, and what an input asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArtifactType {
    /// Full weights, or an adapter together with what it sits on.
    Model,
    /// Records, one JSON object per line.
    Dataset,
    /// Per-checkpoint numbers of a probe.
    Measurements,
    /// What an evaluation counted: right answers, samples, an interval.
    Scores,
    /// Gathered numbers in rows and columns.
    Table,
    /// A drawing of gathered numbers.
    Plot,
    /// Whether a claim held, with the numbers it is about.
    Verdict,
    /// Files of a `command`.
    Files,
}

impl ArtifactType {
    /// What it is called in messages, article included.
    pub const fn noun(self) -> &'static str {
        match self {
            ArtifactType::Model => "a model",
            ArtifactType::Dataset => "a dataset",
            ArtifactType::Measurements => "measurements",
            ArtifactType::Scores => "scores",
            ArtifactType::Table => "a table",
            ArtifactType::Plot => "a plot",
            ArtifactType::Verdict => "a verdict",
            ArtifactType::Files => "files",
        }
    }
}

/// What the artifact of a stage means to whoever takes it as a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lineage {
    /// Full weights: nothing before it is needed.
    Whole,
    /// An adapter on top of the whole chain of the input `model`.
    OnTop,
    /// An adapter that continues, and so replaces, the last adapter of the input `model`'s chain
    /// (`OnTop` if that chain has no adapter).
    Continues,
}

/// A kind of stage.
pub struct Kind {
    /// What `kind` names it.
    pub name: &'static str,
    /// One line for `--help` and the schema.
    pub about: &'static str,
    /// Bumped when the same keys and inputs come to mean another result.
    pub recipe: u32,
    /// The type of its artifact.
    pub yields: ArtifactType,
    /// The keys a stage of this kind may have, beside those of every stage.
    pub keys: &'static [Key],
    /// Whether floats are made, so that backend and dtype enter the fingerprint.
    pub floats: bool,
    /// For kinds that yield a model.
    pub lineage: fn(&Params) -> Lineage,
    /// Rules between keys, after types and ranges held. The keys it is given are those of the cell, and
    /// those that are references with the text that names the stage.
    pub rules: fn(&Params) -> Vec<Broken>,
}

/// A rule between keys that does not hold.
pub struct Broken {
    /// The key the message points at, dotted (`sample.pairs`).
    pub key: &'static str,
    /// What does not hold: one lower-case sentence without a full stop.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

/// A key of a kind, or of a table below one.
pub struct Key {
    /// As it is written in the manifest.
    pub name: &'static str,
    /// Which values it takes.
    pub ty: Type,
    /// Whether it has to be there.
    pub presence: Presence,
    /// Units included. One or two sentences.
    pub doc: &'static str,
    /// Whether it can change the result and so enters the fingerprint.
    pub result: bool,
    /// The key without which this one means nothing: one of two of which a stage has exactly one.
    pub with: Option<&'static str>,
    /// Says how a benchmark is asked or scored: a `[task.NAME]` may give it to the stages that name the task.
    pub task: bool,
}

/// Whether a key has to be there, and what holds if it is not.
pub enum Presence {
    /// A stage without it is a mistake.
    Required,
    /// Absent stays absent.
    Optional,
    /// Filled in with this TOML value.
    Default(&'static str),
    /// Exactly one of this key and that one, which says the same of this. A profile that gives one takes
    /// the other out, and the keys that go with it.
    Either(&'static str),
    /// As `Either`, but a stage may have neither.
    Or(&'static str),
}

/// Which values a key takes.
pub enum Type {
    /// `true` or `false`.
    Bool,
    /// Both ends included.
    Int {
        /// The smallest value.
        min: i64,
        /// The largest value.
        max: i64,
    },
    /// Both ends included; `above` excludes the lower one. Never NaN or infinite.
    Float {
        /// The lower end.
        min: f64,
        /// The upper end, which is allowed.
        max: f64,
        /// Whether `min` itself is refused.
        above: bool,
    },
    /// Any text.
    Str,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Exactly one cell per cell of this stage; axes are joined. `axes`: brings the axes along.
    Ref(&'static [ArtifactType]),
    /// As `Ref`, or the name of a `[task.NAME]`: that stands for the cell its `data` names, and gives the
    /// stage the keys of the task (see [`Key::of_task`]) that it has not itself.
    Task(&'static [ArtifactType]),
    /// One reference or a list of them; one cell each.
    Refs(&'static [ArtifactType]),
    /// All cells of one stage or of several, with their labels; only axes this stage declares are joined.
    Gather(&'static [ArtifactType]),
    /// `scheme:rest` with one of these schemes; content enters the fingerprint, not the text, for
    /// `path` (relative to the manifest) and `hf`. Where `path` is the only one, it need not be written.
    Source(&'static [&'static str]),
    /// The name of an `[endpoint.NAME]`; its value is that table.
    Endpoint,
    /// A list, all of one type.
    List(&'static Type),
    /// A table with any names, and values of one type.
    Map(&'static Type),
    /// A table with these keys.
    Table(&'static [Key]),
    /// The first that fits.
    Any(&'static [Type]),
}

impl Key {
    /// The other of two keys of which a stage has one.
    pub const fn rival(&self) -> Option<&'static str> {
        match self.presence {
            Presence::Either(other) | Presence::Or(other) => Some(other),
            _ => None,
        }
    }

    /// A key that enters the fingerprint and has to be there.
    pub const fn required(name: &'static str, ty: Type, doc: &'static str) -> Key {
        Key { name, ty, presence: Presence::Required, doc, result: true, with: None, task: false }
    }

    /// A key that enters the fingerprint where it is given.
    pub const fn optional(name: &'static str, ty: Type, doc: &'static str) -> Key {
        Key { name, ty, presence: Presence::Optional, doc, result: true, with: None, task: false }
    }

    /// A key that enters the fingerprint, and is `value` (TOML) where it is not given.
    pub const fn default(name: &'static str, ty: Type, value: &'static str, doc: &'static str) -> Key {
        Key { name, ty, presence: Presence::Default(value), doc, result: true, with: None, task: false }
    }

    /// One of two keys of which a stage has exactly one.
    pub const fn either(name: &'static str, other: &'static str, ty: Type, doc: &'static str) -> Key {
        Key { name, ty, presence: Presence::Either(other), doc, result: true, with: None, task: false }
    }

    /// One of two keys of which a stage has at most one.
    pub const fn or(name: &'static str, other: &'static str, ty: Type, doc: &'static str) -> Key {
        Key { name, ty, presence: Presence::Or(other), doc, result: true, with: None, task: false }
    }

    /// A `[task.NAME]` may give it.
    pub const fn of_task(mut self) -> Key {
        self.task = true;
        self
    }

    /// Means something only beside `other`.
    pub const fn with(mut self, other: &'static str) -> Key {
        self.with = Some(other);
        self
    }

    /// Cannot change the result (memory, pace): stays out of the fingerprint.
    pub const fn no_result(mut self) -> Key {
        self.result = false;
        self
    }
}

impl Kind {
    /// The key that names a task, if there is one.
    pub fn task_key(&self) -> Option<&'static str> {
        self.keys.iter().find(|key| matches!(key.ty, Type::Task(_))).map(|key| key.name)
    }
}

/// For kinds that yield no model.
pub fn no_lineage(_: &Params) -> Lineage {
    Lineage::Whole
}

/// For kinds without rules between keys.
pub fn no_rules(_: &Params) -> Vec<Broken> {
    Vec::new()
}
