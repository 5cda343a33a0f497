//! Which records of a dataset stay.

use super::rows::{Row, lookup};
use super::spec::Condition;
use crate::problem::{Exit, Problem};
use regex::Regex;
use serde_json::Value;
use std::collections::BTreeSet;

/// Keeps the rows for which all conditions hold.
///
/// # Errors
/// `dataset::filter_field` for a name that no record has; `dataset::filter`.
pub fn filter(rows: &mut Vec<Row>, conditions: &[Condition]) -> Result<(), Problem> {
    for condition in conditions {
        let field = &condition.field;
        // A condition on a name that nobody has is a misspelling, not a filter.
        if condition.not_empty != Some(false)
            && !rows.is_empty()
            && !rows.iter().any(|row| lookup(&row.record, field).is_some())
        {
            let names: BTreeSet<&String> = rows.iter().flat_map(|row| row.record.keys()).collect();
            let names = names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            return Err(Problem::new(
                "dataset::filter_field",
                format!("`filter` asks for `{field}`, which no record has"),
            )
            .note(format!("the records have {names}")));
        }
        let regex = condition.matches.as_deref().map(Regex::new).transpose().map_err(|error| {
            Problem::new("dataset::filter", format!("`matches` is not a regular expression: {error}")).exit(Exit::Usage)
        })?;
        rows.retain(|row| condition.holds(lookup(&row.record, field), regex.as_ref()) != condition.invert);
    }
    Ok(())
}

impl Condition {
    fn holds(&self, value: Option<&Value>, regex: Option<&Regex>) -> bool {
        let text = value.and_then(Value::as_str);
        let length = text.map(|text| text.chars().count());
        let number = value.and_then(Value::as_f64);
        let filled = match value {
            None | Some(Value::Null) => false,
            Some(Value::String(text)) => !text.trim().is_empty(),
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        };
        self.equals.as_ref().is_none_or(|wanted| value.is_some_and(|value| same(value, wanted)))
            && self
                .one_of
                .as_ref()
                .is_none_or(|list| value.is_some_and(|value| list.iter().any(|wanted| same(value, wanted))))
            && regex.is_none_or(|regex| text.is_some_and(|text| regex.is_match(text)))
            && self.min_length.is_none_or(|min| length.is_some_and(|length| length >= min))
            && self.max_length.is_none_or(|max| length.is_some_and(|length| length <= max))
            && self.at_least.is_none_or(|min| number.is_some_and(|number| number >= min))
            && self.at_most.is_none_or(|max| number.is_some_and(|number| number <= max))
            && self.not_empty.is_none_or(|wanted| filled == wanted)
    }
}

/// Equal values; 1 and 1.0 are.
fn same(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && b.is_number() && a.as_f64() == b.as_f64())
}
