//! The rows of a dataset on their way through its steps.

use crate::data::Record;
use crate::problem::Problem;
use serde_json::Value;

/// A record, and which of the datasets read it came from.
pub struct Row {
    pub record: Record,
    pub origin: usize,
}

/// A field by its name, or else by a dotted path.
pub fn lookup<'r>(record: &'r Record, path: &str) -> Option<&'r Value> {
    if let Some(value) = record.get(path) {
        return Some(value);
    }
    let mut steps = path.split('.');
    let mut value = record.get(steps.next()?)?;
    for step in steps {
        value = match value {
            Value::Object(object) => object.get(step)?,
            Value::Array(array) => array.get(step.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(value)
}

/// Fewer rows or pairs than `sample.{key}` asks for.
pub fn too_few(wanted: usize, there: usize, key: &str) -> Problem {
    Problem::new("dataset::sample", format!("`sample.{key}` is {wanted}, but there are only {there}"))
        .help(format!("ask for at most {there}"))
}
