//! What is asked about a record: a template over its fields, and the fields that have a place of their own.

use crate::data::Record;
use crate::data::template::{self, Templates};
use crate::problem::{Exit, Problem};
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde_json::Value;
use std::path::Path;

/// A template over the fields of a record. A field the record lacks is an error, not nothing.
pub struct Template(Templates);

impl Template {
    pub fn new(key: &str, text: &str) -> Result<Template, Problem> {
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        let mut templates = Templates::new(env, |_| None);
        templates.add("template", text).map_err(|error| {
            let help = template::help_for(&error);
            let what = if help.is_some() { "is a template that cannot be used" } else { "is not a template" };
            Problem::new("generate::template", format!("`{key}` {what}: {}", reason(&error)))
                .help(help.unwrap_or("fields of the record stand in double braces: `{{ question }}`"))
        })?;
        Ok(Template(templates))
    }

    /// What the keys `prompt` and `prompt_file` say is asked, if they do; `resolved` is where the file is. One newline at the end of a file is
    /// not part of what is asked.
    pub fn asked(
        prompt: Option<&str>,
        file: Option<&str>,
        resolved: Option<&Path>,
    ) -> Result<Option<Template>, Problem> {
        let Some(file) = file else {
            return prompt.map(|text| Template::new("prompt", text)).transpose();
        };
        let path = resolved.ok_or_else(|| {
            Problem::new("generate::prompt_file", format!("`{file}` was not resolved to a file")).exit(Exit::Missing)
        })?;
        let bytes = std::fs::read(path).map_err(|error| Problem::io("generate::prompt_file", "read", path, &error))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to() + 1;
            Problem::new("data::not_utf8", format!("`prompt_file` is not UTF-8 at byte {at}"))
                .at_file(path)
                .help("save the file as UTF-8")
        })?;
        Template::new("prompt_file", &text).map(Some).map_err(|problem| problem.at_file(path))
    }

    /// `Err` says what is wrong with this record, without naming it.
    pub fn render(&self, record: &Record) -> Result<String, String> {
        self.0.render("template", minijinja::Value::from(Serde(record))).map_err(|error| {
            if let Some(help) = template::help_for(&error) {
                return format!("the template cannot be used: {}; {help}", reason(&error));
            }
            let fields: Vec<&str> = record.keys().map(String::as_str).collect();
            format!("{}; the record has {}", reason(&error), fields.join(", "))
        })
    }
}

fn reason(error: &minijinja::Error) -> String {
    match (error.detail(), error.line()) {
        (Some(detail), _) => detail.to_string(),
        (None, Some(line)) => format!("{} in line {line}", error.kind()),
        (None, None) => error.kind().to_string(),
    }
}

/// A record's id, or its place.
pub fn record_id(record: &Record, index: usize) -> String {
    match record.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("line-{}", index + 1),
    }
}

/// The first of these fields that the record has, as text.
pub fn text_field<'r>(record: &'r Record, names: &[&str]) -> Option<&'r str> {
    names.iter().find_map(|name| record.get(*name)).and_then(Value::as_str)
}

/// Where a question may stand, most particular first.
pub const QUESTIONS: &[&str] = &["prompt", "question", "problem", "Question", "Problem"];
