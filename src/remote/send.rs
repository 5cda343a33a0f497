//! One attempt at a request, and what it came to: a reply, something worth another attempt, or the end.

use super::date::retry_after;
use super::endpoint::{Endpoint, missing};
use super::gate::{Ended, Pace};
use super::reply::{self, Completion, Read, one_line};
use crate::problem::Problem;
use serde_json::Value;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use ureq::http::{HeaderMap, Request};
use ureq::{Agent, Error, Timeout};

/// No completion is longer; what is was not written by a model.
const REPLY_MAX: u64 = 16 << 20;
/// Of an error, so much is read.
const ERROR_MAX: u64 = 64 << 10;

/// What a server said.
pub(super) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    wait: Option<Duration>,
    location: Option<String>,
}

/// Nothing that can be used came.
pub(super) struct Broken {
    pub why: String,
    /// The server may have worked for it.
    sent: bool,
    /// It would come again.
    lasting: bool,
}

pub(super) enum Sent {
    /// The raw body, and what it says.
    Reply(String, Box<Completion>),
    Again {
        why: String,
        ended: Ended,
        wait: Option<Duration>,
    },
    /// This request gets no answer, however often it is sent; others may get theirs.
    Refused {
        why: String,
        ended: Ended,
    },
    /// No request does.
    Stop(Problem),
}

pub(super) struct Sender {
    agent: Agent,
    endpoint: Endpoint,
    key: Option<Key>,
}

/// A secret: it has no `Debug`, and leaves only in a header.
struct Key(String);

impl Sender {
    /// Reads the key. `Err` (exit 3) if it is named and not there.
    pub fn new(endpoint: &Endpoint) -> Result<Sender, Problem> {
        let key = match &endpoint.api_key_env {
            None => None,
            Some(variable) => {
                let value = std::env::var(variable).unwrap_or_default();
                let value = value.trim();
                if value.is_empty() {
                    return Err(missing(
                        "remote::no_key",
                        format!("`{variable}` is not set, and {} wants a key", endpoint.name()),
                    )
                    .help(format!("`export {variable}=...`, then run again")));
                }
                if !value.bytes().all(|byte| (0x21..0x7f).contains(&byte)) {
                    let message = format!(
                        "what `{variable}` holds is not a key: it has blanks or characters no header can carry"
                    );
                    return Err(missing("remote::bad_key", message).help(format!("set `{variable}` again")));
                }
                Some(Key(value.to_string()))
            }
        };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect is refused here: the key and the prompts are for one host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("pipe/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(Duration::from_secs_f64(endpoint.timeout_s)))
            .timeout_connect(Some(Duration::from_secs_f64(endpoint.connect_timeout_s.min(endpoint.timeout_s))))
            .max_idle_connections(endpoint.max_concurrency)
            .max_idle_connections_per_host(endpoint.max_concurrency)
            .build()
            .into();
        Ok(Sender { agent, endpoint: endpoint.clone(), key })
    }

    /// One attempt at a completion.
    pub fn complete(&self, body: &Value, pace: &Pace) -> Sent {
        let answer = match self.ask("POST", "/chat/completions", Some(body), pace) {
            Ok(answer) => answer,
            Err(Broken { why, sent, lasting }) => {
                let ended = Ended::Broken { sent };
                return if lasting { Sent::Refused { why, ended } } else { Sent::Again { why, ended, wait: None } };
            }
        };
        if !(200..300).contains(&answer.status) {
            let words = self.words(&answer.body);
            return self.refusal(answer.status, &words, answer.wait, answer.location.as_deref());
        }
        // The server has worked for it, so it may have to be paid for.
        let again = |why: String| Sent::Again { why, ended: Ended::Broken { sent: true }, wait: answer.wait };
        let Ok(text) = String::from_utf8(answer.body) else { return again("the reply is not UTF-8".into()) };
        let text = self.clean(text);
        match reply::read(&text) {
            Read::Completion(completion) => Sent::Reply(text, Box::new(completion)),
            Read::Useless(why) => again(why),
            Read::Error(Some(status), words) if (400..600).contains(&status) => {
                self.refusal(status, &words, answer.wait, None)
            }
            Read::Error(_, words) => again(format!("the server says: {words}")),
        }
    }

    /// What a status that is no success means.
    fn refusal(&self, status: u16, words: &str, wait: Option<Duration>, location: Option<&str>) -> Sent {
        let said = if words.is_empty() { format!("status {status}") } else { format!("status {status}: {words}") };
        let refused = Ended::Refused { wait: None };
        match status {
            429 if words.contains("insufficient_quota") || words.contains("exceeded your current quota") => {
                Sent::Stop(self.no_credit(&said))
            }
            429 => Sent::Again { why: said, ended: Ended::Refused { wait }, wait },
            408 | 409 | 425 => Sent::Again { why: said, ended: refused, wait },
            500..=599 => Sent::Again { why: said, ended: Ended::Broken { sent: false }, wait },
            400 | 413 | 422 => Sent::Refused { why: said, ended: refused },
            401 | 403 => Sent::Stop(self.bad_key(&said)),
            402 => Sent::Stop(self.no_credit(&said)),
            404 => Sent::Stop(
                Problem::new("remote::not_found", format!("{} is not to be found there", self.endpoint.name()))
                    .note(said)
                    .help("look at `url` (the base of the API, often ending in `/v1`) and `model` of the endpoint"),
            ),
            300..=399 => Sent::Stop(self.redirected(location)),
            _ => Sent::Stop(
                Problem::new("remote::refused", format!("{} cannot be asked", self.endpoint.name()))
                    .note(said)
                    .help("look at `url` of the endpoint: it is the base of an OpenAI-compatible API"),
            ),
        }
    }

    pub fn bad_key(&self, said: &str) -> Problem {
        let problem = match &self.endpoint.api_key_env {
            Some(variable) => Problem::new(
                "remote::bad_key",
                format!("{} does not accept the key in `{variable}`", self.endpoint.name()),
            )
            .help(format!("set `{variable}` to a key that is valid there, and run again")),
            None => Problem::new("remote::no_key", format!("{} wants a key", self.endpoint.name()))
                .help("name the variable that holds it: `api_key_env = \"MY_API_KEY\"` of the endpoint"),
        };
        problem.note(said)
    }

    pub fn no_credit(&self, said: &str) -> Problem {
        Problem::new("remote::no_credit", format!("the account at {} has no credit left", self.endpoint.name()))
            .note(said)
            .help("top it up and run again: replies that came are kept and are not paid for again")
    }

    pub fn redirected(&self, location: Option<&str>) -> Problem {
        // Without its query, which may be a secret.
        let target = location.map(|to| self.clean(one_line(to.split(['?', '#']).next().unwrap_or(to))));
        let problem =
            Problem::new("remote::redirect", format!("{} sends its visitors elsewhere", self.endpoint.name()));
        let problem = match target {
            Some(target) => problem.note(format!("to `{target}`")),
            None => problem,
        };
        problem
            .note("prompts and key are for the host that the manifest names, so no redirect is followed")
            .help("if it is meant, write the new address as `url` of the endpoint")
    }

    /// Whether there is a key to be looked at.
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// Sends a request and reads all of the answer, whatever its status.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>, pace: &Pace) -> Result<Answer, Broken> {
        self.ask_as(self.key.as_ref(), method, path, body, pace)
    }

    /// The same as somebody without a key.
    pub fn ask_as_nobody(&self, path: &str, pace: &Pace) -> Result<Answer, Broken> {
        self.ask_as(None, "GET", path, None, pace)
    }

    fn ask_as(
        &self,
        key: Option<&Key>,
        method: &str,
        path: &str,
        body: Option<&Value>,
        pace: &Pace,
    ) -> Result<Answer, Broken> {
        let _span = tracing::debug_span!("request", model = self.endpoint.model, path).entered();
        let url = format!("{}{path}", self.endpoint.url.trim_end_matches('/'));
        let mut request = Request::builder()
            .method(method)
            .uri(&url)
            .header("accept-encoding", "identity")
            .header("accept", "application/json");
        if let Some(Key(key)) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let malformed = |_| Broken { why: "the address is malformed".into(), sent: false, lasting: true };
        let run = match body {
            Some(body) => {
                let request =
                    request.header("content-type", "application/json").body(body.to_string()).map_err(malformed)?;
                self.agent.run(request)
            }
            None => self.agent.run(request.body(()).map_err(malformed)?),
        };
        let mut response = run.map_err(|error| self.broken(&error))?;
        let status = response.status().as_u16();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let headers = response.headers();
        let wait = text(headers, "retry-after")
            .and_then(|value| retry_after(value, text(headers, "date"), now, pace.longest_asked));
        let location = text(headers, "location").map(String::from);
        let limit = if (200..300).contains(&status) { REPLY_MAX } else { ERROR_MAX };
        let body = match response.body_mut().with_config().limit(limit).read_to_vec() {
            Ok(body) => body,
            // Of an error the status says enough.
            Err(_) if !(200..300).contains(&status) => Vec::new(),
            Err(error) => return Err(self.broken(&error)),
        };
        Ok(Answer { status, body, wait, location })
    }

    fn broken(&self, error: &Error) -> Broken {
        let unsent = match error {
            Error::ConnectionFailed | Error::HostNotFound | Error::Timeout(Timeout::Connect | Timeout::Resolve) => true,
            Error::Io(error) => error.kind() == io::ErrorKind::ConnectionRefused,
            Error::Rustls(_) | Error::Tls(_) => true,
            _ => false,
        };
        let why = match error {
            Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                format!("no connection within {} s", self.endpoint.connect_timeout_s)
            }
            Error::Timeout(_) => format!("no reply within {} s", self.endpoint.timeout_s),
            Error::BodyExceedsLimit(_) => format!("the reply is larger than {} MiB and was cut off", REPLY_MAX >> 20),
            Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => "the reply is garbled".into(),
            other => self.clean(one_line(&other.to_string())),
        };
        Broken { why, sent: !unsent, lasting: matches!(error, Error::BodyExceedsLimit(_)) }
    }

    /// The words of an error's body.
    pub fn words(&self, body: &[u8]) -> String {
        self.clean(reply::error_words(body))
    }

    /// The text without the key, should a server have echoed it. Keys are long; a dummy that a local
    /// server is content with may be a word of any text, and is no secret.
    fn clean(&self, text: String) -> String {
        match &self.key {
            Some(Key(key)) if key.len() >= 16 && text.contains(key.as_str()) => text.replace(key.as_str(), "[key]"),
            _ => text,
        }
    }
}

impl Answer {
    pub fn location(&self) -> Option<&str> {
        self.location.as_deref()
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}
