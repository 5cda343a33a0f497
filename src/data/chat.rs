//! Chat templates: the Jinja text a model comes with, rendered as `transformers` renders it, byte for
//! byte. A conversation in another layout is another prompt, so nothing is normalised.
//!
//! Where minijinja differs from Python's Jinja2 with `transformers`' settings, this file follows
//! Python: `tojson` (separators, non-ASCII kept, float notation, keyword arguments), `True`/`False`/`None`
//! in output, string methods, blocks trimmed, `raise_exception`, `{% generation %}` read as nothing.

use super::template::{self, Templates};
use crate::problem::Problem;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::{Map, Value as Json};
use std::io::{self, Write};

/// A model's template, parsed.
pub(crate) struct Template {
    templates: Templates,
    /// `bos_token`, `eos_token` and their like, visible to the template by these names.
    specials: Map<String, Json>,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// Wider indentation is taken for a mistake.
const INDENT_MAX: usize = 64;

impl Template {
    /// `sources`: (name, text); one is called `default`, another may be `tool_use`.
    pub(crate) fn new(sources: Vec<(String, String)>, specials: Map<String, Json>) -> Result<Template, Problem> {
        let invalid = |error: Error| {
            Problem::new("data::chat_template", format!("the chat template cannot be used: {}", chain(&error))).help(
                template::help_for(&error)
                    .unwrap_or("put a template that Jinja accepts into `chat_template.jinja` beside the tokenizer"),
            )
        };
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(invalid)?;
        env.set_syntax(syntax);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |state: &State, message: Value| -> Result<Value, Error> {
            template::shown(state, &message)?;
            Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
        });
        let mut templates = Templates::new(env, python_word);
        for (name, text) in sources {
            templates.add(&name, &without_generation_tags(&text)).map_err(invalid)?;
        }
        Ok(Template { templates, specials })
    }

    /// The conversation as text. With `tools`, the template `tool_use` is taken where there is one.
    pub(crate) fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, Problem> {
        let name = if tools.is_some() && self.templates.has(TOOL_USE) { TOOL_USE } else { DEFAULT };
        let mut context = self.specials.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("tools".into(), tools.cloned().unwrap_or(Json::Null));
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), Json::Bool(add_generation_prompt));
        self.templates.render(name, Value::from(Serde(&context))).map_err(|error| {
            Problem::new("data::chat_template", format!("the chat template refuses the messages: {}", chain(&error)))
                .help(template::help_for(&error).unwrap_or(
                "messages are a list of {role, content}; roles the template knows, usually system, user and assistant",
            ))
        })
    }
}

/// Where a template is kept: `tokenizer_config.json`'s `chat_template` is a text or a list of {name, template}.
pub(crate) fn sources_of(chat_template: &Json) -> Vec<(String, String)> {
    match chat_template {
        Json::String(text) => vec![(DEFAULT.into(), text.clone())],
        Json::Array(list) => list
            .iter()
            .filter_map(|entry| Some((entry["name"].as_str()?.to_string(), entry["template"].as_str()?.to_string())))
            .collect(),
        _ => Vec::new(),
    }
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// `{% generation %}` marks assistant tokens for masks; it renders nothing.
fn without_generation_tags(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        // Behind the opening, so that `{%}` is not taken for both.
        let Some(length) = rest[start + 2..].find("%}").map(|at| at + 2) else { break };
        let tag = &rest[start..start + length + 2];
        let word = tag[2..length].trim_matches('-').trim();
        // A trimming tag keeps trimming as an empty comment of the same form.
        let shown = match word {
            "generation" | "endgeneration" => tag.replacen("{%", "{#", 1).replace("%}", "#}"),
            _ => tag.to_string(),
        };
        kept.push_str(&rest[..start]);
        kept.push_str(&shown);
        rest = &rest[start + length + 2..];
    }
    kept + rest
}

/// What Python's `str` gives where minijinja prints another word.
fn python_word(value: &Value) -> Option<&'static str> {
    if value.is_none() {
        return Some("None");
    }
    match bool::try_from(value.clone()) {
        Ok(truth) if value.kind() == minijinja::value::ValueKind::Bool => Some(if truth { "True" } else { "False" }),
        _ => None,
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=None, sort_keys=False)`, with these keywords.
fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if indent.is_some_and(|width| width > INDENT_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("`indent` is at most {INDENT_MAX}")));
    }
    let failed = |error: serde_json::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
    let mut json = serde_json::to_value(&value).map_err(failed)?;
    if sort == Some(true) {
        json.sort_all_objects();
    }
    let mut bytes = Vec::new();
    let python = Python { indent, ascii: ascii == Some(true), depth: 0, filled: false };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, python)).map_err(failed)?;
    String::from_utf8(bytes)
        .map(Value::from_safe_string)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// The layout of Python's `json.dumps`.
struct Python {
    indent: Option<usize>,
    ascii: bool,
    depth: usize,
    filled: bool,
}

impl Python {
    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(writer)?;
        }
        writer.write_all(bracket)
    }

    fn separate<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(if self.indent.is_some() { b"," } else { b", " })?;
        }
        self.line(writer)
    }

    fn line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for unit in fragment.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte) if byte.is_ascii() => writer.write_all(&[byte])?,
                _ => write!(writer, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }

    /// Python's `repr`: shortest digits, exponents of two digits outside 1e-4 .. 1e16.
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        let size = value.abs();
        if size == 0.0 || (1e-4..1e16).contains(&size) {
            return write!(writer, "{value:?}");
        }
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
        write!(writer, "{digits}e{sign}{exponent:0>2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, messages: Json, tools: Option<Json>) -> Result<String, Problem> {
        Template::new(sources_of(&json!(template)), Map::new())?.render(&messages, tools.as_ref(), true)
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let value =
            json!([{"ü": [1, 2.5, null, true], "e": [1e-5, 1e16, 1.0, 123456789.125], "s": "<a>&'\"\n\u{7f}"}, {}, []]);
        assert_eq!(
            render("{{ messages | tojson }}", value.clone(), None).unwrap(),
            "[{\"ü\": [1, 2.5, null, true], \"e\": [1e-05, 1e+16, 1.0, 123456789.125], \"s\": \"<a>&'\\\"\\n\u{7f}\"}, {}, []]"
        );
        assert_eq!(
            render(
                "{{ messages | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}",
                json!([{"b": "ü🦙", "a": []}]),
                None
            )
            .unwrap(),
            "[\n  {\n    \"a\": [],\n    \"b\": \"\\u00fc\\ud83e\\udd99\"\n  }\n]"
        );
    }

    #[test]
    fn none_and_truth_are_printed_as_python_prints_them() {
        let shown =
            render("{{ messages[0] }} {{ messages[1] }} {{ messages[2] }} {{ gone }}", json!([null, true, 1]), None);
        assert_eq!(shown.unwrap(), "None True 1 ");
    }

    #[test]
    fn a_list_of_templates_has_one_for_tools() {
        let list = json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]);
        let template = Template::new(sources_of(&list), Map::new()).unwrap();
        assert_eq!(template.render(&json!([]), None, false).unwrap(), "plain");
        assert_eq!(template.render(&json!([]), Some(&json!([{}])), false).unwrap(), "tools");
    }

    #[test]
    fn generation_tags_render_nothing_and_python_methods_work() {
        let text = "{% for m in messages %}{%- generation -%} {{ m.content.strip().split('|')[0] }} {%- endgeneration %}{% endfor %}.";
        assert_eq!(render(text, json!([{"content": " a|b "}]), None).unwrap(), "a.");
    }

    #[test]
    fn a_template_that_refuses_or_is_broken_is_a_problem_with_its_own_words() {
        let refused = render("{{ raise_exception('roles must alternate') }}", json!([]), None).unwrap_err();
        assert_eq!(refused.code, "data::chat_template");
        assert!(refused.message.contains("roles must alternate"), "{refused}");
        let broken = render("{% if %}", json!([]), None).unwrap_err();
        assert!(broken.message.contains("cannot be used"), "{broken}");
    }
}
