//! What a cell would compute, in named parts, and what differs between two of them.

use super::cell::{Cell, CellId};
use crate::digest::{Digest, Encoder};
use crate::manifest::endpoint::ENDPOINT;
use crate::manifest::spec::{Key, Params, Type};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// What a cell would compute. Two cells with equal fingerprints yield the same artifact.
///
/// | part | why it is in | left out on purpose |
/// |---|---|---|
/// | `kind`, `recipe` | what the stage does, and the version of its meaning | the stage's name, its description |
/// | `KEY`, `KEY.KEY` | every resolved key that can change the result, defaults filled in, `{axis}` replaced; JSON, names sorted, floats in shortest form | comments, order of keys, keys marked as without effect (memory, pace), the file or the task a key stands in |
/// | `source.KEY` | digest of what a source came to | its path or name, mtimes |
/// | `KEY` of an `init:` source | the text, beside the digest of what it stands for | |
/// | `input.SLOT[i]` | digest of each input artifact: its content, not who made it | the fingerprint, stage name and time of the input |
/// | `input.SLOT[i]` of a gather | the cell's name too, because the result shows it | |
/// | `KEY.model` of an endpoint | which model answers, by its name | address, key, prices, limits |
/// | `backend`, `dtype` | where floats are made, unless a server makes them: backends do not round alike | host name, thread count, driver |
///
/// A kind that has a key `dtype` says by it what [`Arithmetic::dtype`] would say; then only the key is in.
/// Secrets are named by keys (`api_key_env`), never read here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint {
    /// Name to value, see above.
    pub parts: BTreeMap<String, String>,
}

/// Where floats are made.
#[derive(Debug, Clone, Copy)]
pub struct Arithmetic<'a> {
    /// `cpu`, `cuda`.
    pub backend: &'a str,
    /// What products accumulate and round in.
    pub dtype: &'a str,
}

/// One part that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Its name.
    pub part: String,
    /// `None`: the part is new.
    pub before: Option<String>,
    /// `None`: the part is gone.
    pub after: Option<String>,
}

/// The fingerprint of `cell`.
///
/// `input` gives the digest of an input's artifact and the name under which a gather shows it;
/// `source` the digest of what the source at a dotted key came to. `None` from either is the
/// answer `None`: the cell waits for it.
pub fn fingerprint(
    cell: &Cell,
    machine: Arithmetic<'_>,
    input: impl Fn(CellId) -> Option<(Digest, String)>,
    source: impl Fn(&str) -> Option<Digest>,
) -> Option<Fingerprint> {
    let mut parts = BTreeMap::new();
    parts.insert("kind".to_string(), cell.kind.name.to_string());
    parts.insert("recipe".to_string(), cell.kind.recipe.to_string());
    let mut by_content = Vec::new();
    for outside in &cell.sources {
        parts.insert(format!("source.{}", outside.key), source(&outside.key)?.hex());
        if !outside.text.starts_with("init:") {
            by_content.push(outside.key.as_str());
        }
    }
    Flatten { parts: &mut parts, by_content: &by_content }.keys(cell.kind.keys, &cell.params, "", "");
    for slot in &cell.inputs {
        for (i, &id) in slot.cells.iter().enumerate() {
            let (digest, name) = input(id)?;
            let value = if slot.labelled { format!("{name} {digest}") } else { digest.hex() };
            parts.insert(format!("input.{}[{i}]", slot.slot), value);
        }
    }
    // What a server computes, it computes the same whatever this machine is; a model in a table is one here.
    let served = cell.params.contains_key("endpoint") && !cell.inputs.iter().any(|slot| slot.slot.ends_with(".model"));
    if cell.kind.floats && !served {
        parts.insert("backend".to_string(), machine.backend.to_string());
        parts.entry("dtype".to_string()).or_insert_with(|| machine.dtype.to_string());
    }
    Some(Fingerprint { parts })
}

impl Fingerprint {
    /// Over the parts in name order.
    pub fn digest(&self) -> Digest {
        let mut encoder = Encoder::new("pipe fingerprint 1");
        for (part, value) in &self.parts {
            encoder.field(part.as_bytes()).field(value.as_bytes());
        }
        encoder.finish()
    }

    /// The parts that differ from those of `before`, in name order; empty when the two agree.
    pub fn changed(&self, before: &Fingerprint) -> Vec<Change> {
        let names: std::collections::BTreeSet<&String> = self.parts.keys().chain(before.parts.keys()).collect();
        names
            .into_iter()
            .filter(|part| self.parts.get(*part) != before.parts.get(*part))
            .map(|part| Change {
                part: part.clone(),
                before: before.parts.get(part).cloned(),
                after: self.parts.get(part).cloned(),
            })
            .collect()
    }
}

/// Parameters to parts.
struct Flatten<'a> {
    parts: &'a mut BTreeMap<String, String>,
    /// Dotted keys whose text stays out.
    by_content: &'a [&'a str],
}

impl Flatten<'_> {
    /// `prefix` leads the names of parts, `dotted` the keys as sources are called: the two differ
    /// where a map has a name with a dot in it.
    fn keys(&mut self, keys: &'static [Key], table: &Params, prefix: &str, dotted: &str) {
        for key in keys.iter().filter(|key| key.result) {
            if let Some(value) = table.get(key.name) {
                self.value(&key.ty, value, format!("{prefix}{}", key.name), &format!("{dotted}{}", key.name));
            }
        }
    }

    fn value(&mut self, ty: &'static Type, value: &Json, part: String, dotted: &str) {
        if self.by_content.contains(&dotted) {
            return;
        }
        match (ty, value) {
            (Type::Any(types), value) => match types.iter().find(|ty| fits(ty, value)) {
                Some(ty) => self.value(ty, value, part, dotted),
                None => self.leaf(part, value),
            },
            (Type::Endpoint, Json::Object(table)) => {
                self.keys(ENDPOINT, table, &format!("{part}."), &format!("{dotted}."));
            }
            (Type::Table(keys), Json::Object(table)) => {
                let before = self.parts.len();
                self.keys(keys, table, &format!("{part}."), &format!("{dotted}."));
                // A table that is there and says nothing is not a table that is absent.
                if self.parts.len() == before {
                    self.parts.insert(part, "{}".to_string());
                }
            }
            (Type::Map(ty), Json::Object(table)) => {
                for (name, value) in table {
                    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
                    let quoted =
                        if plain && !name.is_empty() { name.clone() } else { Json::from(name.as_str()).to_string() };
                    self.value(ty, value, format!("{part}.{quoted}"), &format!("{dotted}.{name}"));
                }
                if table.is_empty() {
                    self.parts.insert(part, "{}".to_string());
                }
            }
            // A list of plain values is one part; one whose items have keys or sources of their own is not.
            (Type::List(ty), Json::Array(items)) if !items.is_empty() && structured(ty) => {
                for (i, item) in items.iter().enumerate() {
                    self.value(ty, item, format!("{part}.{i}"), &format!("{dotted}.{i}"));
                }
                self.parts.insert(format!("{part}.len"), items.len().to_string());
            }
            (_, value) => self.leaf(part, value),
        }
    }

    fn leaf(&mut self, part: String, value: &Json) {
        self.parts.insert(part, canonical(value));
    }
}

fn structured(ty: &Type) -> bool {
    match ty {
        Type::Table(_) | Type::Map(_) | Type::Source(_) => true,
        Type::List(ty) => structured(ty),
        Type::Any(types) => types.iter().any(structured),
        _ => false,
    }
}

/// Whether a resolved value can be of the type: enough to walk on with the right keys.
fn fits(ty: &Type, value: &Json) -> bool {
    match (ty, value) {
        (Type::Table(keys), Json::Object(table)) => table.keys().all(|name| keys.iter().any(|key| key.name == *name)),
        (Type::Map(_), Json::Object(_)) | (Type::List(_), Json::Array(_)) => true,
        (Type::Any(types), value) => types.iter().any(|ty| fits(ty, value)),
        _ => false,
    }
}

/// JSON with sorted names, no blanks, and shortest floats.
fn canonical(value: &Json) -> String {
    match value {
        Json::Object(table) => {
            let sorted: BTreeMap<&String, &Json> = table.iter().collect();
            let fields: Vec<String> = sorted
                .into_iter()
                .map(|(name, value)| format!("{}:{}", Json::from(name.as_str()), canonical(value)))
                .collect();
            format!("{{{}}}", fields.join(","))
        }
        Json::Array(items) => {
            format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(","))
        }
        Json::Number(number) if number.is_f64() => format!("{:?}", number.as_f64().unwrap_or(0.0) + 0.0),
        other => other.to_string(),
    }
}
