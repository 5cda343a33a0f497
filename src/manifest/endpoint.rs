//! `[endpoint.NAME]`: a server that completes chats, by what is written about it.
//!
//! A key of type [`Type::Endpoint`] names one; its value is then this table, resolved. Only the model's
//! name enters fingerprints: where the server stands, who pays and how fast one may ask change no result.

use super::spec::{Broken, Key, Params, Type};

const COUNT: Type = Type::Int { min: 1, max: i64::MAX };
const SECONDS: Type = Type::Float { min: 0.0, max: 86_400.0, above: true };
const MONEY: Type = Type::Float { min: 0.0, max: f64::MAX, above: false };

/// The keys of an endpoint, as `remote::Endpoint` reads them.
pub const ENDPOINT: &[Key] = &[
    Key::required("url", Type::Str, "The base of an OpenAI-compatible server: `https://api.deepseek.com/v1`.").no_result(),
    Key::required("model", Type::Str, "The model's name there."),
    Key::optional(
        "api_key_env",
        Type::Str,
        "The environment variable that holds the key. The key itself is never written down. Absent: none is sent.",
    )
    .no_result(),
    Key::default("max_concurrency", Type::Int { min: 1, max: 1024 }, "8", "Requests under way at the same time.")
        .no_result(),
    Key::optional("requests_per_minute", COUNT, "No more requests than this are sent.").no_result(),
    Key::optional(
        "tokens_per_minute",
        COUNT,
        "No more tokens than this are asked for, a prompt and its `max_tokens` counted until the reply says how many there were.",
    )
    .no_result(),
    Key::default("timeout_s", SECONDS, "600", "Seconds for a whole request, its reply included.").no_result(),
    Key::default("connect_timeout_s", SECONDS, "15", "Seconds to be connected.").no_result(),
    Key::default(
        "max_attempts",
        Type::Int { min: 1, max: 100 },
        "6",
        "How often a request is sent before it counts as failed. What cannot get better by asking again is asked once.",
    )
    .no_result(),
    Key::optional("price_in", MONEY, "Price of a million tokens of prompt. With `price_out`, costs are counted.")
        .no_result(),
    Key::optional("price_out", MONEY, "Price of a million tokens of completion, thinking included.").no_result(),
    Key::optional(
        "budget",
        Type::Float { min: 0.0, max: f64::MAX, above: true },
        "The most that may be paid to this endpoint, replies kept in the cache from earlier runs included. A request that could pass it, were it as long as it may be, is not sent.",
    )
    .no_result(),
    Key::default(
        "send_seed",
        Type::Bool,
        "true",
        "Whether requests carry a `seed`, another one for each sample. Some servers refuse what they do not know.",
    )
    .no_result(),
    Key::default(
        "max_tokens_key",
        Type::Choice(&["max_tokens", "max_completion_tokens"]),
        "\"max_tokens\"",
        "What the server calls the longest completion.",
    )
    .no_result(),
];

/// What is wrong between the keys of an endpoint. A rule with an empty key is about the table: its text
/// may hold a secret that has no business there.
pub fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let text = |key: &str| params.get(key).and_then(serde_json::Value::as_str);
    if let Some(url) = text("url") {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        let host = rest.map(|rest| rest.split('/').next().unwrap_or_default());
        if url.contains('@') || url.contains(['?', '#']) {
            broken.push(Broken {
                key: "",
                message: "`url` holds more than an address: no user, no password and no query belongs there".into(),
                help: "name the variable that holds the key: `api_key_env = \"MY_API_KEY\"`".into(),
            });
        } else if host.is_none_or(|host| host.is_empty() || host.contains(char::is_whitespace)) {
            broken.push(Broken {
                key: "url",
                message: "`url` is not the address of a server".into(),
                help: "the base of the API: `url = \"https://HOST/v1\"`, `url = \"http://localhost:8000/v1\"`".into(),
            });
        } else if url.trim_end_matches('/').ends_with("/completions") {
            broken.push(Broken {
                key: "url",
                message: "`url` is the base of the API, without `/chat/completions`".into(),
                help: format!("`url = \"{}\"`", url.split("/chat").next().unwrap_or_default()),
            });
        }
    }
    if let Some(name) = text("api_key_env") {
        let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !begins || name.len() > 100 || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            broken.push(Broken {
                key: "",
                message: "`api_key_env` is not the name of an environment variable".into(),
                help: "a key is named, not written: `api_key_env = \"MY_API_KEY\"` and, in the shell, `export MY_API_KEY=...`".into(),
            });
        }
    }
    if text("model").is_some_and(|model| model.trim().is_empty()) {
        broken.push(Broken {
            key: "model",
            message: "`model` names nothing".into(),
            help: "the model's name at the server".into(),
        });
    }
    let has = |key: &str| params.contains_key(key);
    for (one, other) in [("price_in", "price_out"), ("price_out", "price_in")] {
        if has(one) && !has(other) {
            broken.push(Broken {
                key: one,
                message: format!("`{one}` without `{other}` says nothing about what a request costs"),
                help: format!("`{other} = 0` if it is free"),
            });
        }
    }
    if has("budget") && !has("price_in") && !has("price_out") {
        broken.push(Broken {
            key: "budget",
            message: "a `budget` needs prices: what nothing costs nothing can pass".into(),
            help: "`price_in` and `price_out`, for a million tokens".into(),
        });
    }
    broken
}
