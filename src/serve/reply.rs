//! What is answered: completions in OpenAI's two shapes, whole and in parts.

use super::ask::Form;
use crate::generation::Finish;
use serde_json::{Map, Value, json};

/// What stands in every part of one answer.
pub(super) struct Frame {
    pub form: Form,
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
}

/// A token as it is told: its bytes, and log p of it and of the likeliest.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Told {
    pub bytes: Vec<u8>,
    pub logprob: f32,
    pub top: Vec<(Vec<u8>, f32)>,
    /// Where in the text it begins, in bytes and in characters.
    pub place: (usize, usize),
}

/// What a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub prompt: usize,
    pub completion: usize,
}

impl Usage {
    pub fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        })
    }
}

pub(super) fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

impl Frame {
    fn around(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }

    /// The whole answer.
    pub fn whole(&self, choices: Vec<Value>, usage: Usage) -> Value {
        let object = match self.form {
            Form::Chat => "chat.completion",
            Form::Text => "text_completion",
        };
        let mut whole = self.around(object, choices);
        whole["usage"] = usage.json();
        whole
    }

    /// A choice of the whole answer.
    pub fn choice(&self, index: usize, text: &str, told: Option<&[Told]>, finish: Finish) -> Value {
        let (logprobs, finish) = (self.logprobs(told), finish_name(finish));
        match self.form {
            Form::Chat => json!({
                "index": index, "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": logprobs, "finish_reason": finish,
            }),
            Form::Text => json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish }),
        }
    }

    /// A part of a streamed answer. `usage`: that of the last part; `None` within where it is to come.
    pub fn part(&self, choices: Vec<Value>, usage: Option<Option<Usage>>) -> Value {
        let object = match self.form {
            Form::Chat => "chat.completion.chunk",
            Form::Text => "text_completion",
        };
        let mut part = self.around(object, choices);
        if let Some(usage) = usage {
            part["usage"] = usage.map_or(Value::Null, Usage::json);
        }
        part
    }

    /// The first part of a choice: who speaks. Plain completions have none.
    pub fn role(&self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        let choice = json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null });
        (self.form == Form::Chat).then_some(choice)
    }

    /// More text of a choice, or its end.
    pub fn delta(&self, index: usize, text: &str, told: Option<&[Told]>, finish: Option<Finish>) -> Value {
        let (logprobs, finish) = (self.logprobs(told), finish.map(finish_name));
        match self.form {
            Form::Chat => {
                let mut delta = Map::new();
                if !text.is_empty() {
                    delta.insert("content".into(), text.into());
                }
                json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish })
            }
            Form::Text => json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish }),
        }
    }

    fn logprobs(&self, told: Option<&[Told]>) -> Value {
        let Some(told) = told else { return Value::Null };
        match self.form {
            Form::Chat => {
                let one = |bytes: &[u8], logprob: f32| {
                    let token = String::from_utf8_lossy(bytes);
                    json!({ "token": token, "logprob": number(logprob), "bytes": bytes })
                };
                let content = |told: &Told| {
                    let mut content = one(&told.bytes, told.logprob);
                    let top: Vec<Value> = told.top.iter().map(|(bytes, logprob)| one(bytes, *logprob)).collect();
                    content["top_logprobs"] = top.into();
                    content
                };
                json!({ "content": told.iter().map(content).collect::<Vec<_>>(), "refusal": null })
            }
            Form::Text => {
                let top = |told: &Told| {
                    let mut top: Map<String, Value> =
                        told.top.iter().map(|(bytes, logprob)| (name(bytes), number(*logprob))).collect();
                    top.entry(name(&told.bytes)).or_insert_with(|| number(told.logprob));
                    Value::Object(top)
                };
                json!({
                    "tokens": told.iter().map(|told| name(&told.bytes)).collect::<Vec<_>>(),
                    "token_logprobs": told.iter().map(|told| number(told.logprob)).collect::<Vec<_>>(),
                    "top_logprobs": told.iter().map(top).collect::<Vec<_>>(),
                    "text_offset": told.iter().map(|told| told.place.1).collect::<Vec<_>>(),
                })
            }
        }
    }
}

/// JSON has no infinity; -9999 is what OpenAI says for it.
fn number(logprob: f32) -> Value {
    json!(f64::from(logprob).max(-9999.0))
}

/// A token as a key: parts of characters stay apart.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => bytes.iter().fold("bytes:".to_string(), |name, byte| format!("{name}\\x{byte:02x}")),
    }
}
