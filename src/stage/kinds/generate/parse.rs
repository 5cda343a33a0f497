//! From a completion to fields of a record, as the table `parse` says.

use super::json;
use crate::grade::extract;
use crate::manifest::spec::{Broken, Params};
use crate::problem::Problem;
use crate::stage::context::read_params;
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The table `parse`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parse {
    #[serde(default)]
    pub kind: ParseKind,
    #[serde(default)]
    pub fields: Map<String, Value>,
    pub pattern: Option<String>,
}

/// How a completion is taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ParseKind {
    #[default]
    Text,
    Sections,
    Boxed,
    ThinkAnswer,
    Regex,
    Json,
}

impl Parse {
    /// What is wrong between the keys of the table.
    pub fn broken(&self) -> Vec<Broken> {
        let mut broken = Vec::new();
        let mut say =
            |key: &'static str, message: String, help: &str| broken.push(Broken { key, message, help: help.into() });
        let sources: Vec<(&String, &str)> =
            self.fields.iter().map(|(new, from)| (new, from.as_str().unwrap_or(""))).collect();
        let mut only = |allowed: &[&str], what: &str| {
            for (new, from) in &sources {
                if *from != "text" && !allowed.contains(from) {
                    say(
                        "parse.fields",
                        format!("`{new}` takes `{from}`, which {what} does not give"),
                        &format!("one of: text {}", allowed.join(" ")),
                    );
                }
            }
        };
        match self.kind {
            ParseKind::Text => only(&[], "kind = \"text\""),
            ParseKind::Boxed => only(&["boxed"], "kind = \"boxed\""),
            ParseKind::ThinkAnswer => only(&["thinking", "answer"], "kind = \"think-answer\""),
            ParseKind::Sections if sources.is_empty() => {
                say(
                    "parse.fields",
                    "`sections` without `fields` gives nothing".into(),
                    "fields = { prompt = \"New Question\" }",
                );
            }
            ParseKind::Json if sources.is_empty() => {
                say("parse.fields", "`json` without `fields` gives nothing".into(), "fields = { answer = \"answer\" }");
            }
            ParseKind::Sections | ParseKind::Json => {}
            ParseKind::Regex => match self.pattern.as_deref().map(Regex::new) {
                None => say("parse.pattern", "`regex` needs a `pattern`".into(), "pattern = 'Answer: (?<answer>.*)'"),
                Some(Err(error)) => say(
                    "parse.pattern",
                    format!("not a regular expression: {error}"),
                    "test it on one completion first",
                ),
                Some(Ok(regex)) => {
                    let names: Vec<String> = regex
                        .capture_names()
                        .enumerate()
                        .map(|(i, name)| name.map_or(i.to_string(), String::from))
                        .collect();
                    only(&names.iter().map(String::as_str).collect::<Vec<_>>(), "the pattern");
                }
            },
        }
        broken
    }
}

/// The fields that a table `parse` makes of a completion: `Err` if the table is none, `Ok(Err)` if the text lacks
/// what it asks for.
pub fn parsed(parse: &Params, text: &str) -> Result<Result<Vec<(String, String)>, String>, Problem> {
    let parse: Parse = read_params("parse", parse.clone())?;
    Ok(Parser::new(&parse)?.fields(text))
}

/// Takes completions apart.
pub struct Parser {
    kind: ParseKind,
    /// New field and where it comes from.
    pub fields: Vec<(String, String)>,
    pattern: Option<Regex>,
}

impl Parser {
    /// With its pattern compiled.
    pub fn new(parse: &Parse) -> Result<Parser, Problem> {
        let pattern = parse.pattern.as_deref().map(Regex::new).transpose().map_err(|error| {
            Problem::new("generate::pattern", format!("`parse.pattern` is not a regular expression: {error}"))
        })?;
        let mut fields: Vec<(String, String)> =
            parse.fields.iter().map(|(new, from)| (new.clone(), from.as_str().unwrap_or("").to_string())).collect();
        if fields.is_empty() {
            let same = |name: &str| (name.to_string(), name.to_string());
            fields = match parse.kind {
                ParseKind::Text | ParseKind::Sections | ParseKind::Json => Vec::new(),
                ParseKind::Boxed => vec![("answer".into(), "boxed".into())],
                ParseKind::ThinkAnswer => vec![same("thinking"), same("answer")],
                ParseKind::Regex => pattern.iter().flat_map(Regex::capture_names).flatten().map(same).collect(),
            };
        }
        Ok(Parser { kind: parse.kind, fields, pattern })
    }

    /// Of a text that `max_tokens` has cut off: it is what it is, or it lacks its end.
    pub fn cut(&self, text: &str, tokens: u64) -> Result<Vec<(String, String)>, String> {
        match self.kind {
            ParseKind::Text => self.fields(text),
            _ => Err(format!("cut off after {tokens} tokens by `max_tokens`")),
        }
    }

    /// New field and value; `Err` says what is missing.
    pub fn fields(&self, text: &str) -> Result<Vec<(String, String)>, String> {
        let behind = || extract::segment(text).ok_or("nothing behind the thinking".to_string());
        let found: Vec<(&str, String)> = match self.kind {
            ParseKind::Text => Vec::new(),
            ParseKind::ThinkAnswer => {
                let (thinking, answer) = think_answer(text)?;
                vec![("thinking", thinking), ("answer", answer)]
            }
            ParseKind::Boxed => {
                let boxed = extract::boxed(behind()?).ok_or("no \\boxed{} with an answer")?;
                vec![("boxed", boxed)]
            }
            ParseKind::Sections => {
                let headings: Vec<&str> =
                    self.fields.iter().map(|(_, from)| from.as_str()).filter(|from| *from != "text").collect();
                sections(behind()?, &headings)?
            }
            ParseKind::Json => {
                let object = json::last_object(behind()?)?;
                let mut found = Vec::new();
                for (_, from) in self.fields.iter().filter(|(_, from)| from != "text") {
                    found.push((from.as_str(), json::value(object, from)?));
                }
                found
            }
            ParseKind::Regex => {
                let behind = behind()?;
                let captures =
                    self.pattern.as_ref().and_then(|p| p.captures(behind)).ok_or("the pattern does not match")?;
                let mut found = Vec::new();
                for (_, from) in &self.fields {
                    let group = from.parse().map_or_else(|_| captures.name(from), |i: usize| captures.get(i));
                    found.extend(group.map(|group| (from.as_str(), group.as_str().trim().to_string())));
                }
                found
            }
        };
        let value = |from: &str| match from {
            "text" => Some(text.trim().to_string()),
            from => found.iter().find(|(name, _)| *name == from).map(|(_, value)| value.clone()),
        };
        let field = |(new, from): &(String, String)| match value(from) {
            Some(value) if !value.is_empty() => Ok((new.clone(), value)),
            Some(_) => Err(format!("`{from}` is empty")),
            None => Err(format!("no `{from}`")),
        };
        self.fields.iter().map(field).collect()
    }
}

/// Thinking and answer, in the s1 layout or between `<think>` and `</think>`.
fn think_answer(text: &str) -> Result<(String, String), String> {
    let (thinking, answer) = text
        .split_once("<|im_start|>answer")
        .or_else(|| text.split_once("</think>"))
        .ok_or("the thinking does not end with `<|im_start|>answer` or `</think>`")?;
    let thinking = thinking.trim_start();
    let thinking =
        thinking.strip_prefix("<|im_start|>think").or_else(|| thinking.strip_prefix("<think>")).unwrap_or(thinking);
    let (thinking, answer) = (thinking.trim(), answer.trim());
    match (thinking.is_empty(), answer.is_empty()) {
        (true, _) => Err("no thinking".into()),
        (_, true) => Err("no answer behind the thinking".into()),
        _ => Ok((thinking.into(), answer.into())),
    }
}

/// The texts under headings: a heading begins a line, in any case, bare or dressed up in Markdown
/// (`## New Question`, `**New Question:** ...`, `1. New Question:`), and its text goes up to the next.
fn sections<'h>(text: &str, headings: &[&'h str]) -> Result<Vec<(&'h str, String)>, String> {
    let mut found: Vec<(&'h str, String)> = Vec::new();
    for line in text.lines() {
        if let Some((heading, rest)) = headings.iter().find_map(|h| Some((*h, after_heading(line, h)?))) {
            // A model that starts over means the second attempt.
            found.retain(|(known, _)| *known != heading);
            found.push((heading, rest.to_string()));
        } else if let Some((_, body)) = found.last_mut() {
            body.push('\n');
            body.push_str(line);
        }
    }
    if let Some(missing) = headings.iter().find(|h| !found.iter().any(|(known, _)| known == *h)) {
        return Err(format!("no section `{missing}`"));
    }
    found.iter_mut().for_each(|(_, body)| *body = body.trim().to_string());
    Ok(found)
}

/// What follows a heading on its line, if the line begins with it.
fn after_heading<'t>(line: &'t str, heading: &str) -> Option<&'t str> {
    let bare = line
        .trim_start()
        .trim_start_matches(|c: char| matches!(c, '#' | '*' | '_' | ' ' | '-' | '>' | '.' | ')') || c.is_ascii_digit());
    let start = bare.get(..heading.len())?;
    if !start.eq_ignore_ascii_case(heading) {
        return None;
    }
    let rest = &bare[heading.len()..];
    let stripped = rest.trim_start_matches(['*', '_', ' ']);
    // `New Questions are ...` is prose: a heading ends with a colon, emphasis or the line.
    let marked =
        rest.trim().is_empty() || stripped.starts_with(':') || (stripped.len() < rest.trim_start_matches(' ').len());
    marked.then(|| stripped.trim_start_matches([':', '*', '_', ' ']).trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value, text: &str) -> Result<Vec<(String, String)>, String> {
        Parser::new(&Parse::deserialize(value).unwrap()).unwrap().fields(text)
    }

    fn pairs(fields: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        Ok(fields.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect())
    }

    #[test]
    fn sections_are_found_under_headings_of_any_dress() {
        let spec = json!({"kind": "sections", "fields": {"prompt": "New Question", "answer": "New Answer"}});
        let wanted = pairs(&[("prompt", "How many?\nSay it."), ("answer", "Six.")]);
        for text in [
            "New Question: How many?\nSay it.\nNew Answer: Six.",
            "Sure!\n\n## New Question\nHow many?\nSay it.\n\n## New Answer\n\nSix.",
            "**New Question:** How many?\nSay it.\n**New Answer**: Six.",
            "1. new question:\nHow many?\nSay it.\n2. NEW ANSWER:\nSix.",
            "<think>New Question: no</think>New Question: How many?\nSay it.\nNew Answer: Six.",
        ] {
            assert_eq!(parse(spec.clone(), text), wanted, "{text}");
        }
    }

    #[test]
    fn what_a_section_lacks_is_named() {
        let spec = json!({"kind": "sections", "fields": {"prompt": "New Question", "answer": "New Answer"}});
        assert_eq!(parse(spec.clone(), "New Question: How many?"), Err("no section `New Answer`".into()));
        assert_eq!(parse(spec.clone(), "New Question:\nNew Answer: 6"), Err("`New Question` is empty".into()));
        assert_eq!(parse(spec, "<think>New Question: ..."), Err("nothing behind the thinking".into()));
    }

    #[test]
    fn thinking_and_answer_come_apart_in_both_layouts() {
        let spec = json!({"kind": "think-answer"});
        let wanted = pairs(&[("thinking", "two and two"), ("answer", "It is 4.")]);
        assert_eq!(parse(spec.clone(), "<|im_start|>think\ntwo and two\n<|im_start|>answer\nIt is 4."), wanted);
        assert_eq!(parse(spec.clone(), "<think>\ntwo and two\n</think>\n\nIt is 4."), wanted);
        assert!(parse(spec.clone(), "<think>\ntwo and two").is_err());
        assert!(parse(spec, "<think>two</think>").is_err());
    }

    #[test]
    fn a_box_and_a_pattern_give_what_they_hold() {
        assert_eq!(parse(json!({"kind": "boxed"}), "so \\boxed{5}, no \\boxed{6}"), pairs(&[("answer", "6")]));
        assert!(parse(json!({"kind": "boxed"}), "so 6").is_err());
        let spec = json!({"kind": "regex", "pattern": "Q: (?<prompt>.*)\nA: (?<answer>.*)"});
        assert_eq!(parse(spec.clone(), "Q: why\nA: so"), pairs(&[("prompt", "why"), ("answer", "so")]));
        assert_eq!(parse(spec, "nothing"), Err("the pattern does not match".into()));
    }

    #[test]
    fn values_of_an_object_are_fields() {
        let spec = json!({"kind": "json", "fields": {"answer": "result.value", "whole": "text"}});
        let text = "<think>{\"result\": {\"value\": 1}}</think>So:\n```json\n{\"result\": {\"value\": 2.50}}\n```";
        assert_eq!(parse(spec.clone(), text), pairs(&[("answer", "2.50"), ("whole", text)]));
        assert_eq!(parse(spec.clone(), "{\"result\": 2}"), Err("the JSON object has no `result.value`".into()));
        assert_eq!(parse(spec, "{\"result\": {\"value\": \"\"}}"), Err("`result.value` is empty".into()));
    }
}
