//! TOML values that know where they were written: the same shape whether they come from a
//! manifest, an included file, a profile or `--set`.
//!
//! Tables keep the order of the text. Numbers that no key can take (beyond 64 bits, infinite, not a
//! number) are reported when they are read and become [`Value::Invalid`], which nothing complains
//! about a second time.

use crate::problem::{Exit, Problem};
use std::ops::Range;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Index into the manifest's files.
pub type FileId = usize;

/// Where something was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file, or the pseudo file of `--set`.
    pub file: FileId,
    /// Bytes of that file.
    pub span: Range<usize>,
}

/// A value and its place.
#[derive(Debug, Clone)]
pub struct Node {
    /// The place of the value, without its key.
    pub origin: Origin,
    /// What was written there.
    pub value: Value,
}

/// What was written for a key.
#[derive(Debug, Clone)]
pub enum Value {
    /// A text, escapes resolved.
    Str(String),
    /// A whole number of 64 bits.
    Int(i64),
    /// A finite number; zero has no sign.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
    /// No key takes a date; kept to say so (and as text for `--set`).
    Date(String),
    /// In the order written.
    List(Vec<Node>),
    /// Inline, or under a header of its own.
    Table(Table),
    /// Already reported.
    Invalid,
}

/// Entries in the order written.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// No two have the same key.
    pub entries: Vec<Entry>,
}

/// A key of a table and its value.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Without quotes.
    pub key: String,
    /// The place of the key.
    pub at: Origin,
    /// The value and its place.
    pub value: Node,
}

impl Table {
    /// The entry of that key.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// The value of that key, to be changed in place.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Value> {
        let entry = self.entries.iter_mut().find(|entry| entry.key == key)?;
        Some(&mut entry.value.value)
    }

    /// Takes the entry of that key out; the others keep their order.
    pub fn remove(&mut self, key: &str) -> Option<Entry> {
        let at = self.entries.iter().position(|entry| entry.key == key)?;
        Some(self.entries.remove(at))
    }

    /// Lays `over` on top: tables merge key by key, everything else is replaced, place included.
    pub fn overlay(&mut self, over: &Table) {
        for entry in &over.entries {
            match self.entries.iter_mut().find(|mine| mine.key == entry.key) {
                Some(mine) => mine.overlay(entry),
                None => self.entries.push(entry.clone()),
            }
        }
    }
}

impl Entry {
    fn overlay(&mut self, over: &Entry) {
        match (&mut self.value.value, &over.value.value) {
            (Value::Table(mine), Value::Table(theirs)) => mine.overlay(theirs),
            _ => *self = over.clone(),
        }
    }
}

impl Value {
    /// What it is, for messages: `a string`.
    pub fn is_a(&self) -> &'static str {
        match self {
            Value::Str(_) => "a string",
            Value::Int(_) => "a whole number",
            Value::Float(_) => "a decimal number",
            Value::Bool(_) => "a truth value",
            Value::Date(_) => "a date",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
            Value::Invalid => "not readable",
        }
    }
}

/// Turns parsed TOML into [`Table`]s and [`Node`]s, and collects the numbers that nothing can take.
pub(crate) struct Reader<'a> {
    pub file: FileId,
    pub path: &'a Path,
    /// Added to every span: where the parsed text starts in the file.
    pub shift: usize,
    pub problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    fn origin(&self, span: Range<usize>) -> Origin {
        Origin { file: self.file, span: span.start + self.shift..span.end + self.shift }
    }

    pub fn table(&mut self, table: &DeTable<'_>) -> Table {
        let mut entries: Vec<Entry> = table
            .iter()
            .map(|(key, value)| Entry {
                key: key.get_ref().to_string(),
                at: self.origin(key.span()),
                value: self.node(value.get_ref(), value.span()),
            })
            .collect();
        // The parser iterates by name.
        entries.sort_by_key(|entry| entry.at.span.start);
        Table { entries }
    }

    pub fn node(&mut self, value: &DeValue<'_>, span: Range<usize>) -> Node {
        let origin = self.origin(span);
        let value = match value {
            DeValue::String(text) => Value::Str(text.to_string()),
            DeValue::Integer(int) => match i64::from_str_radix(int.as_str(), int.radix()) {
                Ok(int) => Value::Int(int),
                Err(_) => self.invalid(&origin, "manifest::out_of_range", "a whole number has to fit 64 bits"),
            },
            // 0.0 and -0.0 are one value.
            DeValue::Float(float) => match float.as_str().parse::<f64>() {
                Ok(float) if float.is_finite() => Value::Float(float + 0.0),
                _ => self.invalid(&origin, "manifest::not_finite", "a number has to be finite"),
            },
            DeValue::Boolean(bool) => Value::Bool(*bool),
            DeValue::Datetime(date) => Value::Date(date.to_string()),
            DeValue::Array(list) => {
                Value::List(list.iter().map(|item| self.node(item.get_ref(), item.span())).collect())
            }
            DeValue::Table(table) => Value::Table(self.table(table)),
        };
        Node { origin, value }
    }

    fn invalid(&mut self, origin: &Origin, code: &'static str, message: &str) -> Value {
        self.problems.push(Problem::new(code, message).exit(Exit::Usage).at_span(self.path, origin.span.clone(), ""));
        Value::Invalid
    }
}
