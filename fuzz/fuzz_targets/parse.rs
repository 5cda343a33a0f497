//! Completions taken apart: text, sections, a box, thinking and answer, a pattern.
//!
//! Input: a table `parse` as JSON, or nothing for one of each kind; the completion.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::stage::generate::parsed;
use serde_json::{Map, Value, json};

/// A pattern of more bytes is not tried: what it may cost is the library's to bound, and counted there.
const PATTERN: usize = 200;

fuzz_target!(init: pipe_fuzz::start("parse"), |input: &[u8]| {
    let [table, text] = pipe_fuzz::parts(input);
    let text = pipe_fuzz::text(text);
    match serde_json::from_slice::<Map<String, Value>>(table) {
        Ok(table) if table.get("pattern").and_then(Value::as_str).is_none_or(|pattern| pattern.len() <= PATTERN) => {
            look(&table, &text);
        }
        Ok(_) => {}
        Err(_) => {
            for table in [
                json!({"kind": "text", "fields": {"all": "text"}}),
                json!({"kind": "boxed"}),
                json!({"kind": "think-answer"}),
                json!({"kind": "sections", "fields": {"q": "New Question", "a": "Réponse", "t": "text"}}),
                json!({"kind": "regex", "pattern": "(?s)Q: (?<q>.*?)\nA: (?<a>.*)"}),
            ] {
                look(table.as_object().expect("a table"), &text);
            }
        }
    }
});

fn look(table: &Map<String, Value>, text: &str) {
    let Some(fields) = pipe_fuzz::taken(parsed(table, text)) else { return };
    match fields {
        Ok(fields) => {
            for (name, value) in &fields {
                assert!(!value.is_empty() && value.trim() == value, "{name}: {value:?}");
                // Nothing is made up: each line of a field stands in the text. Boxes side by side are joined by commas.
                let parts = value.lines().flat_map(|line| line.split(", "));
                assert!(parts.into_iter().all(|part| text.contains(part.trim())), "{name}: {value:?}");
            }
            let again = parsed(table, text).expect("as before");
            assert_eq!(again.as_ref(), Ok(&fields));
        }
        Err(why) => assert!(!why.is_empty()),
    }
}
