//! What is suspicious about records before a model sees them. Counts only; nothing is repaired.

use super::record::Record;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};

/// What was found in one dataset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspection {
    /// How many there are.
    pub records: usize,
    /// Records that say the same as an earlier one, ids aside.
    pub duplicates: usize,
    /// Fields that hold nothing: null, an empty text or list; and in how many records.
    pub empty: BTreeMap<String, usize>,
}

/// Looks at all records of a dataset.
pub fn inspect(records: &[Record]) -> Inspection {
    let mut found = Inspection { records: records.len(), ..Inspection::default() };
    let mut seen = HashSet::new();
    for record in records {
        let said: BTreeMap<&String, &Value> = record.iter().filter(|(name, _)| *name != "id").collect();
        if !seen.insert(serde_json::to_string(&said).unwrap_or_default()) {
            found.duplicates += 1;
        }
        for (name, value) in record {
            let empty = match value {
                Value::Null => true,
                Value::String(text) => text.trim().is_empty(),
                Value::Array(list) => list.is_empty(),
                _ => false,
            };
            if empty {
                *found.empty.entry(name.clone()).or_default() += 1;
            }
        }
    }
    found
}

/// What a task has in common with the data a model is trained on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Records of the task whose question is one of the training data.
    pub prompts: usize,
    /// Records of the task whose answer is; short answers say nothing and are passed over.
    pub answers: usize,
    /// Ids of the first of either, in training data and task.
    pub first: Option<(String, String)>,
}

/// Normalised answers shorter than this are the same by chance.
const TELLING: usize = 24;

/// Texts that are the same when case and white space are passed over.
pub fn overlap(training: &[Record], task: &[Record]) -> Overlap {
    let (mut prompts, mut answers) = (HashMap::new(), HashMap::new());
    for (i, record) in training.iter().enumerate() {
        if let Some(text) = prompt(record) {
            prompts.entry(text).or_insert(i);
        }
        for text in said(record) {
            answers.entry(text).or_insert(i);
        }
    }
    let mut found = Overlap::default();
    for (at, record) in task.iter().enumerate() {
        let asked = prompt(record).and_then(|text| prompts.get(&text));
        let answered = said(record).into_iter().find_map(|text| answers.get(&text));
        found.prompts += usize::from(asked.is_some());
        found.answers += usize::from(answered.is_some());
        if let (Some(&i), None) = (asked.or(answered), &found.first) {
            found.first = Some((id(&training[i], i), id(record, at)));
        }
    }
    found
}

fn id(record: &Record, at: usize) -> String {
    match record.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("line-{}", at + 1),
    }
}

fn normalised(text: &str) -> Option<String> {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    (!words.is_empty()).then(|| words.join(" "))
}

/// The question of a record: a field of its own, the last turn of a user, or that turn within a whole text.
fn prompt(record: &Record) -> Option<String> {
    let text = |name: &str| record.get(name).and_then(Value::as_str);
    let plain = ["prompt", "question", "problem", "Question", "Problem"].into_iter().find_map(text);
    let turn = || {
        let turns = record.get("messages")?.as_array()?;
        turns.iter().rev().find(|turn| turn["role"] == "user")?["content"].as_str()
    };
    let within = || {
        let whole = ["text", "chosen"].into_iter().find_map(text)?;
        let (_, rest) = whole.rsplit_once("<|im_start|>user\n")?;
        rest.split("<|im_end|>").next()
    };
    normalised(plain.or_else(turn).or_else(within)?)
}

/// The answers of a record that are long enough to mean something.
fn said(record: &Record) -> Vec<String> {
    let texts = ["answer", "completion", "chosen"].into_iter().filter_map(|name| record.get(name)?.as_str());
    texts.filter_map(normalised).filter(|text| text.chars().count() >= TELLING).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn records(all: &[Value]) -> Vec<Record> {
        all.iter().map(|record| record.as_object().unwrap().clone()).collect()
    }

    #[test]
    fn a_record_that_says_the_same_is_a_duplicate_whatever_its_id_and_the_order_of_its_fields() {
        let found = inspect(&records(&[
            json!({"id": 1, "prompt": "a", "answer": "b"}),
            json!({"answer": "b", "prompt": "a", "id": 2}),
            json!({"id": 3, "prompt": "a", "answer": " "}),
            json!({"id": 4, "prompt": null, "answer": ""}),
        ]));
        assert_eq!((found.records, found.duplicates), (4, 1));
        assert_eq!(found.empty, BTreeMap::from([("answer".to_string(), 2), ("prompt".to_string(), 1)]));
    }

    #[test]
    fn a_question_is_known_again_in_a_field_in_a_conversation_and_within_a_text() {
        let task = records(&[json!({"id": "t", "question": "What is  2 + 2?", "answer": "4"})]);
        for same in [
            json!({"id": "s", "prompt": "what is 2 + 2?", "answer": "5"}),
            json!({"id": "s", "messages": [{"role": "user", "content": "What is 2 + 2?\n"}]}),
            json!({"id": "s", "text": "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4"}),
        ] {
            let found = overlap(&records(&[json!({"prompt": "other"}), same]), &task);
            assert_eq!(found, Overlap { prompts: 1, answers: 0, first: Some(("s".into(), "t".into())) });
        }
    }

    #[test]
    fn short_answers_are_no_overlap_and_long_ones_are() {
        let long = "the train leaves at half past seven";
        let training = records(&[json!({"prompt": "a", "answer": "4"}), json!({"prompt": "b", "answer": long})]);
        let of = |answer: &str| overlap(&training, &records(&[json!({"question": "c", "answer": answer})])).answers;
        assert_eq!((of("4"), of("The train\nleaves at half past seven")), (0, 1));
    }
}
