//! What a chat completion says, whatever server wrote it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A completion, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// What stands in `reasoning_content`, in `reasoning` or between `<think>` and `</think>`.
    pub thinking: Option<String>,
    /// The rest.
    pub answer: String,
    /// How it ended.
    pub finish: Finish,
    /// `None`: the server does not say.
    pub usage: Option<Usage>,
    /// What the server calls the model.
    pub model: Option<String>,
}

/// How a completion ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// Of its own accord.
    Stop,
    /// Ended by `max_tokens`.
    Length,
    /// Withheld by the server, with its words if it has any.
    Filtered(String),
    /// Ended for another reason, which makes no answer (`tool_calls`).
    Other(String),
}

/// Tokens, as the server counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the answer, thinking included.
    pub completion_tokens: u64,
    /// Of the answer, those of thinking.
    pub reasoning_tokens: u64,
}

impl Completion {
    /// Thinking and answer in one text.
    pub fn text(&self) -> String {
        match &self.thinking {
            Some(thinking) if self.answer.is_empty() && self.finish == Finish::Length => format!("<think>\n{thinking}"),
            Some(thinking) => format!("<think>\n{thinking}\n</think>\n\n{}", self.answer),
            None => self.answer.clone(),
        }
    }

    /// The end in one word, as records have it.
    pub fn finish(&self) -> &str {
        match &self.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Filtered(_) => "content_filter",
            Finish::Other(reason) => reason,
        }
    }

    /// Why this is no answer, if it is none.
    pub fn refused(&self) -> Option<String> {
        match &self.finish {
            Finish::Stop | Finish::Length => None,
            Finish::Filtered(words) if words.is_empty() => Some("withheld by the server's content filter".into()),
            Finish::Filtered(words) => Some(format!("withheld by the server: {words}")),
            Finish::Other(reason) => Some(format!("ended with `{reason}`")),
        }
    }
}

/// What a body came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// A completion that can be used.
    Completion(Completion),
    /// Another try may give one.
    Useless(String),
    /// An error in the clothes of a reply, with its status if it names one.
    Error(Option<u16>, String),
}

/// What is not as expected beside the text spoils no reply that is paid for, so it is read as whatever it is.
#[derive(Deserialize)]
struct Body {
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    usage: Value,
    #[serde(default)]
    model: Value,
    #[serde(default)]
    error: Value,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<Message>,
    #[serde(default)]
    finish_reason: Value,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Value,
    #[serde(default)]
    reasoning_content: Value,
    #[serde(default)]
    reasoning: Value,
    #[serde(default)]
    refusal: Value,
}

/// No reply and no prompt has more tokens; what claims so counts as this many, and sums stay numbers.
pub(super) const TOKENS_MAX: u64 = 1 << 40;

/// Reads the body of a chat completion.
pub fn read(body: &str) -> Read {
    let body: Body = match serde_json::from_str(body) {
        Ok(body) => body,
        Err(error) => return Read::Useless(format!("the reply is not a chat completion: {error}")),
    };
    let choice = body.choices.and_then(|choices| choices.into_iter().next());
    let error = &body.error;
    if choice.is_none() && !error.is_null() {
        let code =
            ["code", "status"].iter().find_map(|name| error[*name].as_u64()).and_then(|code| code.try_into().ok());
        return Read::Error(code, words(error));
    }
    let Some(choice) = choice else { return Read::Useless("the reply holds no choice".into()) };
    let Some(message) = choice.message else { return Read::Useless("the reply holds no message".into()) };
    let finish = match choice.finish_reason.as_str() {
        // Some servers give no reason for an ordinary end.
        None | Some("stop" | "eos" | "end_turn" | "stop_sequence") => Finish::Stop,
        Some("length" | "max_tokens") => Finish::Length,
        Some("content_filter") => Finish::Filtered(String::new()),
        Some(broken @ ("insufficient_system_resource" | "error" | "abort")) => {
            return Read::Useless(format!("the server broke off: `{broken}`"));
        }
        Some(other) => Finish::Other(other.chars().take(80).collect()),
    };
    let some = |value: Value| Some(text(value)).filter(|text| !text.trim().is_empty());
    let finish = match some(message.refusal) {
        Some(words) => Finish::Filtered(words.trim().chars().take(300).collect()),
        None => finish,
    };
    let content = text(message.content);
    let (thinking, answer) = match some(message.reasoning_content).or_else(|| some(message.reasoning)) {
        Some(thinking) => (Some(thinking.trim().to_string()), content.trim().to_string()),
        None => apart(&content),
    };
    let usage = tokens(&body.usage["prompt_tokens"]).map(|prompt_tokens| Usage {
        prompt_tokens,
        completion_tokens: tokens(&body.usage["completion_tokens"]).unwrap_or(0),
        reasoning_tokens: tokens(&body.usage["completion_tokens_details"]["reasoning_tokens"]).unwrap_or(0),
    });
    let model = body.model.as_str().map(String::from);
    Read::Completion(Completion { thinking, answer, finish, usage, model })
}

/// A number of tokens, also where it is written as `12.0`.
fn tokens(value: &Value) -> Option<u64> {
    let tokens = value.as_u64().or_else(|| value.as_f64().filter(|tokens| *tokens >= 0.0).map(|tokens| tokens as u64));
    tokens.map(|tokens| tokens.min(TOKENS_MAX))
}

/// A text, or the text parts of a list of parts.
fn text(content: Value) -> String {
    match content {
        Value::String(text) => text,
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

/// Thinking and answer where the server leaves them in one text. The opening tag may belong to the prompt.
fn apart(content: &str) -> (Option<String>, String) {
    let trimmed = content.trim();
    let opened = trimmed.strip_prefix("<think>");
    let (thinking, answer) = match opened.unwrap_or(trimmed).split_once("</think>") {
        Some((thinking, answer)) => (thinking, answer),
        None => match opened {
            Some(cut) => (cut, ""),
            None => return (None, content.to_string()),
        },
    };
    let thinking = Some(thinking.trim().to_string()).filter(|thinking| !thinking.is_empty());
    (thinking, answer.trim().to_string())
}

/// The words of an error object or text, in one line.
pub(super) fn words(error: &Value) -> String {
    let message = error["message"].as_str().or_else(|| error.as_str()).map_or_else(|| error.to_string(), String::from);
    one_line(&message)
}

/// The words of the body of a reply that is an error.
pub fn error_words(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    match serde_json::from_str::<Value>(&text) {
        Ok(value) if !value["error"].is_null() => {
            let code = value["error"]["code"].as_str().map(|code| format!(" ({})", one_line(code)));
            format!("{}{}", words(&value["error"]), code.unwrap_or_default())
        }
        Ok(value) => words(&value),
        // A page for people.
        Err(_) if text.trim_start().starts_with('<') => String::new(),
        Err(_) => one_line(&text),
    }
}

pub(super) fn one_line(text: &str) -> String {
    let words: Vec<&str> =
        text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    words.join(" ").chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn completion(message: Value, finish: &str) -> Completion {
        let body = json!({"model": "m-1", "choices": [{"message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 2}}});
        match read(&body.to_string()) {
            Read::Completion(completion) => completion,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn thinking_is_found_wherever_servers_put_it() {
        for message in [
            json!({"content": "It is 4.", "reasoning_content": "two and two\n"}),
            json!({"content": "It is 4.", "reasoning": "two and two", "refusal": null}),
            json!({"content": "<think>\ntwo and two\n</think>\n\nIt is 4."}),
            json!({"content": "two and two\n</think>\n\nIt is 4."}),
            json!({"content": [{"type": "text", "text": "<think>two and two</think>It is 4."}], "reasoning_content": ""}),
        ] {
            let read = completion(message.clone(), "stop");
            assert_eq!(
                (read.thinking.as_deref(), read.answer.as_str()),
                (Some("two and two"), "It is 4."),
                "{message}"
            );
            assert_eq!(read.text(), "<think>\ntwo and two\n</think>\n\nIt is 4.");
            assert_eq!(read.usage, Some(Usage { prompt_tokens: 3, completion_tokens: 5, reasoning_tokens: 2 }));
        }
        let plain = completion(json!({"content": " 4\n"}), "stop");
        assert_eq!((plain.thinking.as_ref(), plain.text().as_str()), (None, " 4\n"));
    }

    #[test]
    fn how_it_ended_is_kept() {
        let cut = completion(json!({"content": "<think>\nso"}), "length");
        assert_eq!((cut.finish(), cut.text().as_str(), cut.refused()), ("length", "<think>\nso", None));
        assert_eq!(completion(json!({"content": null}), "content_filter").finish(), "content_filter");
        let refused = completion(json!({"content": null, "refusal": "I will\nnot"}), "stop");
        assert_eq!(refused.refused().as_deref(), Some("withheld by the server: I will\nnot"));
        assert_eq!(
            completion(json!({"content": ""}), "tool_calls").refused().as_deref(),
            Some("ended with `tool_calls`")
        );
    }

    #[test]
    fn what_is_no_completion_says_so() {
        for useless in
            ["", "{", "[]", "{}", "{\"choices\": []}", "{\"choices\": null}", "{\"choices\": [{}]}", "<html>"]
        {
            assert!(matches!(read(useless), Read::Useless(_)), "{useless}");
        }
        let broken =
            json!({"choices": [{"message": {"content": "x"}, "finish_reason": "insufficient_system_resource"}]});
        assert!(matches!(read(&broken.to_string()), Read::Useless(_)));
        let error = json!({"error": {"message": "over\nloaded", "code": 503}});
        assert_eq!(read(&error.to_string()), Read::Error(Some(503), "over loaded".into()));
        assert_eq!(read("{\"error\": \"no\"}"), Read::Error(None, "no".into()));
    }
}
