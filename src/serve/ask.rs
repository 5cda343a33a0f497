//! What may be asked: the parameters of `/v1/chat/completions` and `/v1/completions`, read and checked.
//!
//! A parameter that would change the answer and that nothing here heeds is refused, whether it is known or not; one
//! that changes nothing is passed over. `null` is as good as absent.

use super::refusal::Refusal;
use super::service::Service;
use crate::generation::Sampling;
use serde_json::{Map, Value, json};

/// Completions that one request may ask for.
const MOST_CHOICES: usize = 128;
const MOST_STOPS: usize = 16;
/// Alternatives to each token.
const MOST_TOP: u64 = 20;

/// One of the two ways to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Chat,
    Text,
}

/// A request, understood.
#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    pub form: Form,
    pub prompts: Vec<Wish>,
    /// Completions of each prompt.
    pub n: usize,
    /// Log-probs, with this many alternatives.
    pub logprobs: Option<usize>,
    pub stream: bool,
    /// A stream ends with what was used.
    pub usage: bool,
}

/// One prompt, and how its completions are drawn.
#[derive(Debug, PartialEq)]
pub(super) struct Wish {
    pub ids: Vec<u32>,
    pub sampling: Sampling,
}

/// Read by one form or both.
const READ: &[&str] = &[
    "model",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "max_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
    "logprobs",
    "stream",
    "stream_options",
];
const READ_CHAT: &[&str] =
    &["messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt", "continue_final_message"];
const READ_TEXT: &[&str] = &["prompt"];

/// About who asks and what becomes of it, not about the answer.
const HARMLESS: &[&str] = &[
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "parallel_tool_calls",
    "request_id",
    "priority",
];

/// Whether a value of a parameter is the one that changes nothing.
type Neutral = fn(&Value) -> bool;

fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn no(value: &Value) -> bool {
    *value == json!(false)
}

fn empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(Map::is_empty)
        || value.as_str().is_some_and(str::is_empty)
}

/// Known, not heeded: taken with the value that changes nothing, and what that is.
const NEUTRAL: &[(&str, Neutral, &str)] = &[
    ("presence_penalty", zero, "0"),
    ("frequency_penalty", zero, "0"),
    ("min_p", zero, "0"),
    ("min_tokens", zero, "0"),
    ("logit_bias", empty, "{}"),
    ("tools", empty, "[]"),
    ("functions", empty, "[]"),
    ("tool_choice", |value| value == "none" || value == "auto", "\"none\""),
    ("function_call", |value| value == "none" || value == "auto", "\"none\""),
    ("response_format", |value| value["type"] == "text", "{\"type\": \"text\"}"),
    ("modalities", |value| *value == json!(["text"]), "[\"text\"]"),
    ("echo", no, "false"),
    ("suffix", empty, "\"\""),
    ("best_of", one, "1"),
    ("use_beam_search", no, "false"),
    ("length_penalty", one, "1"),
    ("skip_special_tokens", no, "false: special tokens are written out, as in the stages"),
    ("include_stop_str_in_output", no, "false"),
];

impl Wanted {
    /// Reads a body. `fresh`: the seed of a request that names none.
    pub fn read(form: Form, body: &[u8], service: &Service, fresh: u64) -> Result<Wanted, Refusal> {
        let text = std::str::from_utf8(body)
            .map_err(|error| Refusal::new(400, format!("the body is not UTF-8: byte {}", error.valid_up_to())))?;
        let body: Value =
            serde_json::from_str(text).map_err(|error| Refusal::new(400, format!("the body is not JSON: {error}")))?;
        let Value::Object(fields) = body else { return Err(Refusal::new(400, "the body is not a JSON object")) };
        let fields = Fields(fields);
        fields.known(form)?;
        match fields.text("model")? {
            None => return Err(Refusal::wrong("model", "`model` is missing")),
            Some(name) if name == service.name => {}
            Some(name) => return Err(unknown_model(name, service)),
        }
        let n = fields.integer("n", 1, MOST_CHOICES as u64)?.unwrap_or(1) as usize;
        let prompts = match form {
            Form::Chat => vec![fields.chat(service)?],
            Form::Text => fields.prompts(service)?,
        };
        if prompts.len() * n > MOST_CHOICES {
            let message = format!("{} prompts, {n} completions each: at most {MOST_CHOICES} at once", prompts.len());
            return Err(Refusal::wrong("n", message));
        }
        let sampling = fields.sampling(service, fresh)?;
        let limit = fields.max_tokens(form)?;
        let wish = |ids: Vec<u32>| {
            let max_tokens = room(form, ids.len(), limit, service)?;
            Ok(Wish { ids, sampling: Sampling { max_tokens, ..sampling.clone() } })
        };
        let (stream, usage) = fields.stream()?;
        Ok(Wanted {
            form,
            prompts: prompts.into_iter().map(wish).collect::<Result<_, Refusal>>()?,
            n,
            logprobs: fields.logprobs(form)?,
            stream,
            usage,
        })
    }
}

/// The way OpenAI says that there is no such model.
pub(super) fn unknown_model(name: &str, service: &Service) -> Refusal {
    let message = format!("the model `{}` is not served here; `{}` is", shortened(name), service.name);
    Refusal { status: 404, code: Some("model_not_found"), ..Refusal::wrong("model", message) }
}

/// How long a completion of a prompt of this many tokens may become.
fn room(form: Form, length: usize, limit: Option<(&'static str, usize)>, service: &Service) -> Result<usize, Refusal> {
    let context = service.context;
    let too_long = |param: &str, message: String| {
        Err(Refusal { code: Some("context_length_exceeded"), ..Refusal::wrong(param, message) })
    };
    let left = context.saturating_sub(length);
    if left == 0 {
        return too_long(
            if form == Form::Chat { "messages" } else { "prompt" },
            format!("the prompt has {length} tokens or more, the model's context {context}, the answer included"),
        );
    }
    match limit {
        None => Ok(left.min(service.max_tokens.unwrap_or(left))),
        Some((param, limit)) => {
            if let Some(most) = service.max_tokens.filter(|most| limit > *most) {
                return Err(Refusal::wrong(param, format!("`{param}` is {limit}, this server gives {most} at most")));
            }
            if limit > left {
                return too_long(
                    param,
                    format!(
                        "the prompt has {length} tokens and `{param}` is {limit}: {} together, the model's context has {context}",
                        length.saturating_add(limit)
                    ),
                );
            }
            Ok(limit)
        }
    }
}

/// The ids of a text. One that cannot fit whatever its tokens are is not looked at: megabytes take seconds.
fn encode(form: Form, text: &str, service: &Service) -> Result<Vec<u32>, Refusal> {
    // Normalisation may make a text shorter, by less than this.
    let least = text.len() / (4 * service.longest);
    match least > service.context {
        true => room(form, least, None, service).map(|_| Vec::new()),
        false => Ok(service.tokenizer.encode(text)),
    }
}

/// Of a text that a client sent, as much as belongs in a message.
fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(80).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// What a JSON value is, for messages that do not repeat it.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The parameters of a request.
struct Fields(Map<String, Value>);

impl Fields {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// `Err` for a parameter that nothing here heeds and that could change the answer.
    fn known(&self, form: Form) -> Result<(), Refusal> {
        let (own, other) = match form {
            Form::Chat => (READ_CHAT, READ_TEXT),
            Form::Text => (READ_TEXT, READ_CHAT),
        };
        for (name, value) in self.0.iter().filter(|(_, value)| !value.is_null()) {
            let name = name.as_str();
            if READ.contains(&name) || own.contains(&name) || HARMLESS.contains(&name) {
                continue;
            }
            let unsupported =
                |message| Refusal { code: Some("unsupported_parameter"), ..Refusal::wrong(name, message) };
            if let Some((_, neutral, what)) = NEUTRAL.iter().find(|(known, ..)| *known == name) {
                if neutral(value) {
                    continue;
                }
                return Err(unsupported(format!("`{name}` is not supported other than as {what}")));
            }
            let elsewhere = if other.contains(&name) { " by this path" } else { "" };
            let message = format!("`{}` is not understood{elsewhere}, and could change the answer", shortened(name));
            return Err(Refusal { param: Some(shortened(name)), ..unsupported(message) });
        }
        Ok(())
    }

    fn text(&self, name: &str) -> Result<Option<&str>, Refusal> {
        let wrong = |value: &Value| Refusal::wrong(name, format!("`{name}` is {}, not a text", kind(value)));
        self.get(name).map(|value| value.as_str().ok_or_else(|| wrong(value))).transpose()
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, Refusal> {
        let wrong = |value: &Value| Refusal::wrong(name, format!("`{name}` is {}, not true or false", kind(value)));
        self.get(name).map(|value| value.as_bool().ok_or_else(|| wrong(value))).transpose()
    }

    fn integer(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().filter(|value| (min..=max).contains(value)) {
            Some(value) => Ok(Some(value)),
            None => {
                let range = if max == u64::MAX { format!("from {min}") } else { format!("from {min} to {max}") };
                Err(Refusal::wrong(name, format!("`{name}` is a whole number {range}")))
            }
        }
    }

    fn number(&self, name: &str, absent: f64, range: (f64, f64), above: bool) -> Result<f64, Refusal> {
        let Some(value) = self.get(name) else { return Ok(absent) };
        let (min, max) = range;
        let inside = |value: &f64| *value >= min && *value <= max && !(above && *value <= min);
        value.as_f64().filter(inside).ok_or_else(|| {
            let from = if above { "above" } else { "from" };
            Refusal::wrong(name, format!("`{name}` is a number {from} {min} to {max}"))
        })
    }

    fn sampling(&self, service: &Service, fresh: u64) -> Result<Sampling, Refusal> {
        let mut stop_ids = self.ids("stop_token_ids", service)?;
        if !self.flag("ignore_eos")?.unwrap_or(false) {
            stop_ids.extend(&service.stop_ids);
        }
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let seed = match self.get("seed") {
            None => fresh,
            Some(value) => match (value.as_u64(), value.as_i64()) {
                (Some(seed), _) => seed,
                (None, Some(seed)) => seed as u64,
                (None, None) => return Err(Refusal::wrong("seed", "`seed` is a whole number of 64 bits")),
            },
        };
        // vLLM says -1 where everybody else says 0.
        let all = self.get("top_k").is_some_and(|value| value.as_i64() == Some(-1));
        Ok(Sampling {
            max_tokens: 0,
            temperature: self.number("temperature", 1.0, (0.0, 100.0), false)?,
            top_p: self.number("top_p", 1.0, (0.0, 1.0), true)?,
            top_k: if all { 0 } else { self.integer("top_k", 0, 1_000_000)?.unwrap_or(0) as usize },
            repetition_penalty: self.number("repetition_penalty", 1.0, (0.0, 100.0), true)?,
            seed,
            stop: self.stop()?,
            stop_ids,
            id_limit: service.tokenizer.id_limit(),
        })
    }

    fn stop(&self) -> Result<Vec<String>, Refusal> {
        let texts = match self.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(Value::as_str).collect(),
            Some(value) => value.as_str().map(|text| vec![text]),
        };
        let texts =
            texts.filter(|texts: &Vec<&str>| texts.len() <= MOST_STOPS && texts.iter().all(|text| !text.is_empty()));
        let wrong =
            || Refusal::wrong("stop", format!("`stop` is a text or a list of at most {MOST_STOPS}, none empty"));
        Ok(texts.ok_or_else(wrong)?.into_iter().map(String::from).collect())
    }

    fn max_tokens(&self, form: Form) -> Result<Option<(&'static str, usize)>, Refusal> {
        let mut found = None;
        for name in ["max_completion_tokens", "max_tokens"] {
            if found.is_some() || (form == Form::Text && name != "max_tokens") {
                continue;
            }
            let limit = self.integer(name, 1, u64::MAX)?;
            found = limit.map(|limit| (name, usize::try_from(limit).unwrap_or(usize::MAX)));
        }
        Ok(found)
    }

    fn stream(&self) -> Result<(bool, bool), Refusal> {
        let stream = self.flag("stream")?.unwrap_or(false);
        let Some(options) = self.get("stream_options") else { return Ok((stream, false)) };
        let Value::Object(options) = options else {
            return Err(Refusal::wrong("stream_options", "`stream_options` is an object"));
        };
        if !stream {
            return Err(Refusal::wrong("stream_options", "`stream_options` belongs to `stream`, which is not true"));
        }
        let options = Fields(options.clone());
        for (name, value) in &options.0 {
            let harmless = name == "include_obfuscation" || name == "include_usage" || no(value) || value.is_null();
            if !harmless {
                let name = shortened(name);
                return Err(Refusal::wrong("stream_options", format!("`stream_options.{name}` is not supported")));
            }
        }
        Ok((true, options.flag("include_usage")?.unwrap_or(false)))
    }

    fn logprobs(&self, form: Form) -> Result<Option<usize>, Refusal> {
        if form == Form::Text {
            return Ok(self.integer("logprobs", 0, MOST_TOP)?.map(|top| top as usize));
        }
        let wanted = self.flag("logprobs")?.unwrap_or(false);
        match (wanted, self.integer("top_logprobs", 0, MOST_TOP)?) {
            (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => {
                Err(Refusal::wrong("top_logprobs", "`top_logprobs` belongs to `logprobs`, which is not true"))
            }
        }
    }

    /// The ids that the model's own chat template makes of a conversation.
    fn chat(&self, service: &Service) -> Result<Vec<u32>, Refusal> {
        let Some(Value::Array(list)) = self.get("messages") else {
            return Err(Refusal::wrong("messages", "`messages` is a list of {role, content}"));
        };
        let mut messages =
            list.iter().enumerate().map(|(i, value)| message(i, value)).collect::<Result<Vec<_>, _>>()?;
        let goes_on = self.flag("continue_final_message")?.unwrap_or(false);
        if self.flag("add_generation_prompt")?.is_some_and(|opens| opens == goes_on) {
            return Err(Refusal::wrong(
                "add_generation_prompt",
                "an answer is either begun or continued: `add_generation_prompt` is the contrary of `continue_final_message`",
            ));
        }
        let last = messages.last().is_some_and(|message| message["role"] == "assistant");
        let opening = match (last, goes_on) {
            (true, true) => messages.pop(),
            (false, true) => {
                return Err(Refusal::wrong("continue_final_message", "the last message is not the assistant's"));
            }
            (true, false) => {
                return Err(Refusal::wrong(
                    "messages",
                    "the last message is the assistant's own; `continue_final_message` makes it the beginning of the answer",
                ));
            }
            (false, false) => None,
        };
        if messages.is_empty() {
            return Err(Refusal::wrong("messages", "there is no message to answer"));
        }
        let text = service.tokenizer.chat(&Value::Array(messages), None, true);
        let text = text.map_err(|problem| Refusal::wrong("messages", problem.message))?;
        let mut ids = encode(Form::Chat, &text, service)?;
        if let Some(opening) = opening {
            ids.extend(encode(Form::Chat, opening["content"].as_str().unwrap_or_default(), service)?);
        }
        Ok(ids)
    }

    /// A text, a list of texts, a list of ids, or a list of those.
    fn prompts(&self, service: &Service) -> Result<Vec<Vec<u32>>, Refusal> {
        let wrong =
            || Refusal::wrong("prompt", "`prompt` is a text, a list of texts, a list of token ids, or a list of those");
        let encode = |text: &str| encode(Form::Text, text, service);
        let prompts = match self.get("prompt") {
            Some(Value::String(text)) => vec![encode(text)?],
            Some(Value::Array(list)) => match list.first() {
                Some(Value::Number(_)) => vec![ids(list, "prompt", service)?],
                _ if list.len() > MOST_CHOICES => {
                    return Err(Refusal::wrong("prompt", format!("at most {MOST_CHOICES} prompts at once")));
                }
                Some(Value::String(_)) => {
                    let one = |text: &Value| encode(text.as_str().ok_or_else(wrong)?);
                    list.iter().map(one).collect::<Result<_, _>>()?
                }
                Some(Value::Array(_)) => {
                    let one = |value: &Value| ids(value.as_array().ok_or_else(wrong)?, "prompt", service);
                    list.iter().map(one).collect::<Result<_, _>>()?
                }
                _ => return Err(wrong()),
            },
            _ => return Err(wrong()),
        };
        if prompts.iter().any(Vec::is_empty) {
            return Err(Refusal::wrong("prompt", "a prompt has no tokens: there is nothing to continue"));
        }
        Ok(prompts)
    }

    fn ids(&self, name: &str, service: &Service) -> Result<Vec<u32>, Refusal> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => ids(list, name, service),
            Some(_) => Err(Refusal::wrong(name, format!("`{name}` is a list of token ids"))),
        }
    }
}

fn ids(list: &[Value], name: &str, service: &Service) -> Result<Vec<u32>, Refusal> {
    let limit = service.tokenizer.id_limit();
    let id = |value: &Value| value.as_u64().filter(|id| *id < limit as u64).map(|id| id as u32);
    let wrong = || Refusal::wrong(name, format!("`{name}`: token ids are whole numbers below {limit}"));
    list.iter().map(id).collect::<Option<_>>().ok_or_else(wrong)
}

/// One message as chat templates take it: the content one text, `developer` by its older name.
fn message(i: usize, value: &Value) -> Result<Value, Refusal> {
    let wrong = |what: &str| Refusal::wrong(&format!("messages[{i}]"), format!("message {}: {what}", i + 1));
    let Value::Object(message) = value else { return Err(wrong("is no object with `role` and `content`")) };
    let role = match message.get("role").and_then(Value::as_str) {
        // A template that does not know the name would leave the message out without a word.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role,
        Some(_) => return Err(wrong("`role` is `system`, `developer`, `user`, `assistant` or `tool`")),
        None => return Err(wrong("`role` is missing")),
    };
    let calls = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part["type"] == "text" {
                true => part["text"].as_str().map(String::from),
                false => None,
            };
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            texts
                .ok_or_else(|| {
                    wrong("the parts of `content` are {\"type\": \"text\", \"text\": ...}; nothing else is read")
                })?
                .join("\n")
        }
        None | Some(Value::Null) if calls => String::new(),
        None | Some(Value::Null) => return Err(wrong("`content` is missing")),
        Some(other) => return Err(wrong(&format!("`content` is {}, not a text", kind(other)))),
    };
    let mut message = message.clone();
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    Ok(Value::Object(message))
}
