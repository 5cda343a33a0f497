//! The last JSON object of a completion, and texts out of it.

use serde_json::{Map, Value};

/// The text of the last object that holds anything: among those in a fence marked `json`, if one has an object,
/// else anywhere. `Err` says what there is instead.
pub(super) fn last_object(text: &str) -> Result<&str, String> {
    let fenced = fences(text).filter_map(|fence| last(fence).ok()).last();
    fenced.map_or_else(|| last(text), Ok)
}

/// What stands between a line "```json" and the next "```".
fn fences(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").skip(1).step_by(2).filter_map(|fence| {
        let (word, body) = fence.split_once('\n')?;
        word.trim().eq_ignore_ascii_case("json").then_some(body)
    })
}

fn last(text: &str) -> Result<&str, String> {
    let (mut at, mut found, mut broken) = (0, None, None);
    while let Some(open) = text[at..].find('{').map(|open| at + open) {
        let mut values = serde_json::Deserializer::from_str(&text[open..]).into_iter::<Map<String, Value>>();
        at = match values.next() {
            Some(Ok(object)) => {
                let end = open + values.byte_offset();
                // LaTeX has empty braces; they hold no field.
                found = if object.is_empty() { found } else { Some(&text[open..end]) };
                end
            }
            Some(Err(error)) => {
                // Braces without a quote behind them are not meant as JSON.
                if text[open + 1..].trim_start().starts_with('"') {
                    broken = Some(error.to_string());
                }
                open + 1
            }
            None => open + 1,
        };
    }
    found.ok_or_else(|| match broken {
        Some(why) => format!("no JSON object: the last that begins like one breaks off ({why})"),
        None => "no JSON object".to_string(),
    })
}

/// The value at a name or a dotted path of an object: a string without its quotes, anything else as it is written.
pub(super) fn value(object: &str, path: &str) -> Result<String, String> {
    let found = member(object, path).or_else(|| path.split('.').try_fold(object, member));
    let found = found.ok_or_else(|| format!("the JSON object has no `{path}`"))?;
    match serde_json::from_str(found) {
        Ok(Value::String(text)) => Ok(text.trim().to_string()),
        Ok(Value::Null) => Err(format!("`{path}` is null")),
        _ => Ok(found.to_string()),
    }
}

/// The text of a member of an object, or of an element of a list. `text` is valid JSON. Of a name that is
/// there twice the last counts, as JSON readers have it.
fn member<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let inside = text.strip_prefix(['{', '['])?;
    let named = text.starts_with('{');
    let (mut rest, mut index, mut found) = (inside.trim_start(), 0usize, None);
    while !rest.starts_with(['}', ']']) {
        let mut is_it = !named && name.parse() == Ok(index);
        if named {
            let key;
            (key, rest) = rest.split_at(length(rest)?);
            is_it = serde_json::from_str::<String>(key).is_ok_and(|key| key == name);
            rest = rest.trim_start().strip_prefix(':')?.trim_start();
        }
        let value;
        (value, rest) = rest.split_at(length(rest)?);
        found = if is_it { Some(value) } else { found };
        rest = rest.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
        index += 1;
    }
    found
}

/// How many bytes the JSON value takes that a text begins with; `None` if it never ends.
fn length(text: &str) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => {
                in_string = !in_string;
                if !in_string && depth == 0 {
                    return Some(at + 1);
                }
            }
            _ if in_string => {}
            b'{' | b'[' => depth += 1,
            // The end of what surrounds a number or a word, or of the value itself.
            b'}' | b']' if depth == 0 => return Some(at),
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            b',' | b' ' | b'\t' | b'\r' | b'\n' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn get(text: &str, path: &str) -> Result<String, String> {
        value(last_object(text)?, path)
    }

    #[test]
    fn the_last_object_counts_and_a_fence_before_all() {
        assert_eq!(get("{\"a\": \"one\"} then {\"a\": \" two \"}.", "a"), Ok("two".into()));
        let fenced = "Sure:\n```json\n{\"a\": \"in\"}\n```\nthat is {\"a\": \"out\"}, \\text{}";
        assert_eq!(get(fenced, "a"), Ok("in".into()));
        assert_eq!(get("```python\nx = {\"a\": 1}\n```", "a"), Ok("1".into()));
        assert_eq!(get("no fence ends: ```json\n{\"a\": 1}", "a"), Ok("1".into()));
        assert_eq!(
            get("so \\boxed{5} and {\"a\": {\"b\": [{\"c\": true}, 2]}} \\frac{}{}", "a.b.0.c"),
            Ok("true".into())
        );
    }

    #[test]
    fn numbers_stay_as_they_are_written_and_strings_lose_their_quotes() {
        let text =
            r#"{ "n" : 1.50 , "big":12345678901234567890123, "e":1e-3,"l": [1, 2 ],"q": "a \"b\" \\ {c}", "n.m": 7}"#;
        for (path, wanted) in [
            ("n", "1.50"),
            ("big", "12345678901234567890123"),
            ("e", "1e-3"),
            ("l", "[1, 2 ]"),
            ("l.1", "2"),
            ("q", r#"a "b" \ {c}"#),
            ("n.m", "7"),
        ] {
            assert_eq!(get(text, path), Ok(wanted.to_string()), "{path}");
        }
        assert_eq!(get(r#"{"a": 1, "a": 2}"#, "a"), Ok("2".into()));
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(get("six", "a"), Err("no JSON object".into()));
        assert_eq!(get("x \\boxed{6}", "a"), Err("no JSON object".into()));
        assert_eq!(get("{\"a\": null}", "a"), Err("`a` is null".into()));
        assert_eq!(get("{\"a\": {\"c\": 1}}", "a.b"), Err("the JSON object has no `a.b`".into()));
        let broken = get("{\"a\": \"six", "a").unwrap_err();
        assert!(broken.starts_with("no JSON object: the last that begins like one breaks off (EOF"), "{broken}");
    }

    #[test]
    fn braces_without_end_take_no_time() {
        let begun = std::time::Instant::now();
        for text in ["{", "{\"a\":", "{\"a\":[", "{\"a\":\"", "{\"a\":1,"] {
            assert!(last_object(&text.repeat(60_000 / text.len())).is_err());
        }
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-z\"{}]{0,3}", inner), 0..4).prop_map(Value::from_iter),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_text_panics(text in r#"([{}\[\]",:\\ \n`a1é]|json|```)*"#, path in "[a-z.0-9]{0,4}") {
            let _ = get(&text, &path);
        }

        #[test]
        fn an_object_that_stands_in_prose_is_found(
            fields in prop::collection::vec(("[a-z]{1,3}", any_json()), 1..5),
            before in "[a-z .\\\\$(){}]*",
            after in "[a-z .\\\\$()}]*",
            pretty in any::<bool>(),
        ) {
            let object = Value::from_iter(fields);
            let text = if pretty { format!("{object:#}") } else { object.to_string() };
            let whole = format!("{before} {text} {after}");
            prop_assert_eq!(last_object(&whole), Ok(text.as_str()));
            for (name, wanted) in object.as_object().unwrap() {
                let got = value(&text, name);
                match wanted {
                    Value::Null => prop_assert!(got.is_err()),
                    Value::String(wanted) => prop_assert_eq!(got.unwrap(), wanted.trim()),
                    wanted => prop_assert_eq!(&serde_json::from_str::<Value>(&got.unwrap()).unwrap(), wanted),
                }
            }
        }
    }

    #[test]
    fn an_object_is_found_by_its_own_name_first() {
        let object = json!({"a.b": "whole", "a": {"b": "path"}}).to_string();
        assert_eq!(value(&object, "a.b"), Ok("whole".into()));
    }
}
