//! The manifest language as JSON Schema (draft-07, which the TOML editors read), made from the same key
//! tables that validation reads.
//!
//! The keys of a stage hang on its `kind` by `if`/`then`, not by `oneOf`: an editor then says which key is
//! wrong instead of "matches none of". What needs more than one value to judge (references, axes,
//! rules between keys) is left to `pipe validate`; everything that validates there validates here.

use crate::manifest::endpoint::ENDPOINT;
use crate::manifest::spec::{Key, Kind, Presence, Type};
use crate::manifest::task;
use crate::manifest::value::{Table, Value};
use crate::manifest::{RESERVED, VERSION, parse_default};
use serde_json::{Map, Value as Json, json};

/// A string that is exactly one axis: stands where a number or `true`/`false` is expected.
const WHOLE_AXIS: &str = r"^\{[A-Za-z_][A-Za-z0-9_-]*\}$";
/// A string with an axis in it: stands where one of a few words is expected.
const SOME_AXIS: &str = r"\{[A-Za-z_][A-Za-z0-9_-]*\}";
const STAGE_NAME: &str = "^[A-Za-z0-9_-]+$";

/// The JSON Schema of manifests with these kinds.
pub fn schema(kinds: &[&'static Kind]) -> Json {
    let mut definitions = Map::new();
    definitions.insert("stage".into(), stage(kinds));
    definitions.insert("overlay".into(), overlay(kinds));
    definitions.insert("endpoint".into(), keys(ENDPOINT, false));
    definitions.insert("endpoint-overlay".into(), keys(ENDPOINT, true));
    definitions.insert("task".into(), task_schema(kinds, false));
    definitions.insert("task-overlay".into(), task_schema(kinds, true));
    definitions.insert("axes".into(), axes());
    definitions.insert("skip".into(), skip());
    for kind in kinds {
        definitions.insert(format!("kind-{}", kind.name), kind_schema(kind));
    }
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "pipe manifest",
        "type": "object",
        "required": ["manifest"],
        "additionalProperties": false,
        "properties": {
            "manifest": { "const": VERSION, "description": "Version of the manifest language." },
            "title": { "type": "string", "description": "What the manifest is about, in a line." },
            "include": {
                "type": "array",
                "items": { "type": "string" },
                "description": "Manifests whose stages, tasks and profiles are part of this one; relative to this file. `task:NAME`: a task file that comes with the program."
            },
            "endpoint": {
                "type": "object",
                "description": "OpenAI-compatible servers that complete chats, by name.",
                "propertyNames": { "pattern": STAGE_NAME },
                "additionalProperties": { "$ref": "#/definitions/endpoint" }
            },
            "task": {
                "type": "object",
                "description": "Benchmarks, by name: what is asked, and how it is asked and scored. A stage that names one takes the keys it has not itself.",
                "propertyNames": { "pattern": STAGE_NAME },
                "additionalProperties": { "$ref": "#/definitions/task" }
            },
            "stage": {
                "type": "object",
                "description": "The stages, by name.",
                "propertyNames": { "pattern": STAGE_NAME },
                "additionalProperties": { "$ref": "#/definitions/stage" }
            },
            "profile": {
                "type": "object",
                "description": "Partial manifests, laid over the rest by `--profile NAME`.",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": false,
                    "properties": {
                        "title": { "type": "string" },
                        "endpoint": {
                            "type": "object",
                            "propertyNames": { "pattern": STAGE_NAME },
                            "additionalProperties": { "$ref": "#/definitions/endpoint-overlay" }
                        },
                        "task": {
                            "type": "object",
                            "propertyNames": { "pattern": STAGE_NAME },
                            "additionalProperties": { "$ref": "#/definitions/task-overlay" }
                        },
                        "stage": {
                            "type": "object",
                            "propertyNames": { "pattern": STAGE_NAME },
                            "additionalProperties": { "$ref": "#/definitions/overlay" }
                        }
                    }
                }
            }
        },
        "definitions": definitions
    })
}

/// Keys of the kind that asks, none of which a task has to have, and its data.
fn task_schema(kinds: &[&'static Kind], partial: bool) -> Json {
    let mut table = table(task::keys(kinds), true);
    table["properties"][task::DATA.name] = key_schema(&task::DATA, partial);
    if !partial {
        table["required"] = json!([task::DATA.name]);
    }
    table
}

fn names(kinds: &[&'static Kind]) -> Json {
    json!({ "enum": kinds.iter().map(|kind| kind.name).collect::<Vec<_>>(), "description": RESERVED[0].1 })
}

/// A stage of a file: its kind decides about the rest.
fn stage(kinds: &[&'static Kind]) -> Json {
    let by_kind: Vec<Json> = kinds
        .iter()
        .map(|kind| {
            json!({
                "if": { "required": ["kind"], "properties": { "kind": { "const": kind.name } } },
                "then": { "$ref": format!("#/definitions/kind-{}", kind.name) }
            })
        })
        .collect();
    json!({ "type": "object", "required": ["kind"], "properties": { "kind": names(kinds) }, "allOf": by_kind })
}

fn kind_schema(kind: &'static Kind) -> Json {
    let mut table = keys(kind.keys, false);
    table["description"] = kind.about.into();
    table["properties"]["kind"] = json!({ "const": kind.name });
    reserved(&mut table["properties"]);
    table
}

fn reserved(properties: &mut Json) {
    properties["axes"] = json!({ "$ref": "#/definitions/axes" });
    properties["skip"] = json!({ "$ref": "#/definitions/skip" });
    properties["description"] = json!({ "type": "string", "description": RESERVED[3].1 });
}

/// A stage of a profile: some keys of a kind that is not written there, so any kind's will do.
fn overlay(kinds: &[&'static Kind]) -> Json {
    let mut alternatives: Map<String, Json> = Map::new();
    for key in kinds.iter().flat_map(|kind| kind.keys) {
        let schema = key_schema(key, true);
        match alternatives.entry(key.name).or_insert_with(|| json!([])) {
            Json::Array(known) if !known.contains(&schema) => known.push(schema),
            _ => {}
        }
    }
    let properties: Map<String, Json> = alternatives
        .into_iter()
        .map(|(name, alternatives)| match alternatives {
            Json::Array(mut one) if one.len() == 1 => (name, one.remove(0)),
            several => (name, json!({ "anyOf": several })),
        })
        .collect();
    let mut properties = Json::Object(properties);
    properties["kind"] = names(kinds);
    reserved(&mut properties);
    json!({ "type": "object", "additionalProperties": false, "properties": properties })
}

fn axes() -> Json {
    json!({
        "type": "object",
        "description": RESERVED[1].1,
        "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_-]*$" },
        "additionalProperties": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": true,
            "items": { "type": ["string", "number", "boolean"] }
        }
    })
}

fn skip() -> Json {
    json!({
        "type": "array",
        "description": RESERVED[2].1,
        "items": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": { "type": ["string", "number", "boolean"] }
        }
    })
}

/// A table of keys. `partial`: laid over another, so nothing is required.
fn keys(keys: &'static [Key], partial: bool) -> Json {
    table(keys.iter(), partial)
}

fn table(keys: impl Iterator<Item = &'static Key> + Clone, partial: bool) -> Json {
    let properties: Map<String, Json> =
        keys.clone().map(|key| (key.name.to_string(), key_schema(key, partial))).collect();
    let mut table = json!({ "type": "object", "additionalProperties": false, "properties": properties });
    let required: Vec<&str> = keys
        .clone()
        .filter(|key| matches!(key.presence, Presence::Required) && !key.task)
        .map(|key| key.name)
        .collect();
    if !partial && !required.is_empty() {
        table["required"] = json!(required);
    }
    // Each pair stands in the table twice.
    let pairs = keys.filter_map(|key| match key.presence {
        Presence::Either(other) if key.name < other && !partial => {
            Some(json!({ "oneOf": [{ "required": [key.name] }, { "required": [other] }] }))
        }
        Presence::Or(other) if key.name < other => Some(json!({ "not": { "required": [key.name, other] } })),
        _ => None,
    });
    let pairs: Vec<Json> = pairs.collect();
    if !pairs.is_empty() {
        table["allOf"] = json!(pairs);
    }
    table
}

fn key_schema(key: &'static Key, partial: bool) -> Json {
    let mut schema = type_schema(&key.ty, partial);
    let pace = if key.result { "" } else { " Changes no result." };
    schema["description"] = format!("{}{pace}", key.doc).into();
    if let Presence::Default(text) = key.presence {
        schema["default"] = json_of(&parse_default(text));
    }
    schema
}

fn type_schema(ty: &'static Type, partial: bool) -> Json {
    let or_axis = |schema: Json, pattern: &str| json!({ "anyOf": [schema, { "type": "string", "pattern": pattern }] });
    match ty {
        Type::Bool => or_axis(json!({ "type": "boolean" }), WHOLE_AXIS),
        Type::Int { min, max } => {
            let mut number = json!({ "type": "integer" });
            if *min != i64::MIN {
                number["minimum"] = json!(min);
            }
            if *max != i64::MAX {
                number["maximum"] = json!(max);
            }
            or_axis(number, WHOLE_AXIS)
        }
        Type::Float { min, max, above } => {
            let mut number = json!({ "type": "number" });
            if *min > f64::MIN {
                number[if *above { "exclusiveMinimum" } else { "minimum" }] = json!(min);
            }
            if *max < f64::MAX {
                number["maximum"] = json!(max);
            }
            or_axis(number, WHOLE_AXIS)
        }
        Type::Str => json!({ "type": "string" }),
        Type::Choice(choices) => or_axis(json!({ "enum": choices }), SOME_AXIS),
        Type::Ref(_) | Type::Task(_) | Type::Endpoint => json!({ "type": "string", "minLength": 1 }),
        Type::Refs(_) | Type::Gather(_) => json!({
            "anyOf": [
                { "type": "string", "minLength": 1 },
                { "type": "array", "minItems": 1, "items": { "type": "string", "minLength": 1 } }
            ]
        }),
        Type::Source(["path"]) => json!({ "type": "string", "minLength": 1 }),
        Type::Source(schemes) => {
            json!({ "type": "string", "pattern": format!("^({}):.|{SOME_AXIS}", schemes.join("|")) })
        }
        Type::List(item) => json!({ "type": "array", "items": type_schema(item, partial) }),
        Type::Map(value) => json!({ "type": "object", "additionalProperties": type_schema(value, partial) }),
        Type::Table(table) => keys(table, partial),
        Type::Any(types) => {
            json!({ "anyOf": types.iter().map(|ty| type_schema(ty, partial)).collect::<Vec<_>>() })
        }
    }
}

fn json_of(value: &Value) -> Json {
    match value {
        Value::Str(text) | Value::Date(text) => json!(text),
        Value::Int(int) => json!(int),
        Value::Float(float) => json!(float),
        Value::Bool(bool) => json!(bool),
        Value::List(items) => items.iter().map(|item| json_of(&item.value)).collect(),
        Value::Table(Table { entries }) => {
            Json::Object(entries.iter().map(|entry| (entry.key.clone(), json_of(&entry.value.value))).collect())
        }
        Value::Invalid => Json::Null,
    }
}
