//! One question before anything is run: is the server there, does it take the key, has it the model?

use super::connection::Connection;
use super::endpoint::missing;
use super::lock::lock;
use super::send::Sent;
use crate::problem::{Exit, Problem};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How often a server that does not answer is asked before that is said.
const TRIES: u32 = 3;
/// How many names of models are shown.
const SHOWN: usize = 8;

impl Connection {
    /// Asks for the list of models, which costs nothing; where that does not tell of model and key, for a completion
    /// of one token. Once per process. `Err` exits 3: nothing has run yet.
    pub fn probe(self: &Arc<Self>, stop: &AtomicBool) -> Result<(), Problem> {
        if *lock(&self.probed) {
            return Ok(());
        }
        let (to, from) = channel();
        let connection = self.clone();
        let asked = std::thread::Builder::new().name("remote-probe".into()).spawn(move || {
            // Nobody listens any more if the user has stopped.
            let _ = to.send(connection.ask_first());
        });
        asked.map_err(|error| missing("remote::thread", format!("cannot start a thread: {error}")))?;
        loop {
            match from.recv_timeout(Duration::from_millis(50)) {
                Ok(Ok(())) => {
                    *lock(&self.probed) = true;
                    return Ok(());
                }
                Ok(Err(problem)) => return Err(problem.exit(Exit::Missing)),
                Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Relaxed) => {
                    return Err(Problem::new("exec::interrupted", "interrupted").exit(Exit::Interrupted));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(missing("remote::worker", "asking the server came to no end"));
                }
            }
        }
    }

    fn ask_first(&self) -> Result<(), Problem> {
        let Some(sender) = &self.sender else { return Ok(()) };
        let pace = self.gate.pace();
        let mut names: Vec<String> = Vec::new();
        for attempt in 1..=TRIES {
            let (status, why) = match sender.ask("GET", "/models", None, pace) {
                Ok(answer) if answer.status == 401 => {
                    return Err(sender.bad_key(&format!("status 401: {}", sender.words(&answer.body))));
                }
                Ok(answer) if (300..400).contains(&answer.status) => {
                    return Err(sender.redirected(answer.location()));
                }
                Ok(answer) if answer.status < 500 => {
                    names = names_in(&answer.body);
                    break;
                }
                Ok(answer) => (answer.status, format!("status {}: {}", answer.status, sender.words(&answer.body))),
                Err(broken) => (0, broken.why),
            };
            if attempt == TRIES {
                // A server without a list may fail at it in its own way.
                if status != 0 {
                    break;
                }
                return Err(self.unreachable(&why));
            }
            std::thread::sleep(pace.backoff(attempt, 0.5));
        }
        // A list that anybody may read says nothing about the key.
        let proven = || !sender.has_key() || !sender.ask_as_nobody("/models", pace).is_ok_and(|a| a.status < 300);
        if names.contains(&self.endpoint.model) && proven() {
            return Ok(());
        }
        // Names that are not listed may be known all the same.
        let mut body = json!({ "model": self.endpoint.model, "messages": [{ "role": "user", "content": "1" }] });
        body[self.endpoint.max_tokens_key.as_str()] = 1.into();
        let mut last = String::new();
        for attempt in 1..=TRIES {
            match sender.complete(&body, pace) {
                Sent::Reply(..) => return Ok(()),
                Sent::Stop(problem) if problem.code == "remote::not_found" => {
                    return Err(self.no_model(&names, problem.notes.first().map_or("", String::as_str)));
                }
                Sent::Stop(problem) => return Err(problem),
                Sent::Refused { why, .. } if !names.is_empty() || why.contains(&self.endpoint.model) => {
                    return Err(self.no_model(&names, &why));
                }
                Sent::Refused { why, .. } => {
                    return Err(missing(
                        "remote::refused",
                        format!("{} refuses a first request", self.endpoint.name()),
                    )
                    .note(why)
                    .help("look at `url` and `model` of the endpoint, and at `max_tokens_key`"));
                }
                // It is there and has much to do.
                Sent::Again { why, .. } if why.starts_with("status 429") => return Ok(()),
                // The server has answered, if with nothing to be used: one token may be none.
                Sent::Again { why, .. } if why.starts_with("the reply holds no") => return Ok(()),
                Sent::Again { why, .. } => last = why,
            }
            if attempt < TRIES {
                std::thread::sleep(pace.backoff(attempt, 0.5));
            }
        }
        Err(self.unreachable(&last))
    }

    fn unreachable(&self, why: &str) -> Problem {
        missing("remote::unreachable", format!("{} does not answer", self.endpoint.name()))
            .note(format!("asked {TRIES} times; the last time: {why}"))
            .help("look at `url` of the endpoint and at the network; `--offline` runs with the replies that are kept")
    }

    fn no_model(&self, names: &[String], said: &str) -> Problem {
        let (model, host) = (&self.endpoint.model, self.endpoint.host());
        let mut problem = missing("remote::unknown_model", format!("there is no model `{model}` at `{host}`"));
        if !said.is_empty() {
            problem = problem.note(said);
        }
        let mut by_likeness: Vec<(usize, &String)> =
            names.iter().map(|name| (strsim::osa_distance(model, name), name)).collect();
        by_likeness.sort();
        let listed = |names: &[(usize, &String)]| {
            names.iter().map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        };
        let like = by_likeness.iter().take_while(|(distance, name)| *distance * 2 <= name.chars().count()).count();
        if like > 0 {
            problem = problem.help(format!("models of similar name: {}", listed(&by_likeness[..like.min(3)])));
        } else if !names.is_empty() {
            let more = names.len().saturating_sub(SHOWN);
            let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
            problem = problem.note(format!("it has {}{rest}", listed(&by_likeness[..names.len().min(SHOWN)])));
        }
        problem
    }
}

/// The ids of `{"data": [{"id": ...}]}`.
fn names_in(body: &[u8]) -> Vec<String> {
    let Ok(list) = serde_json::from_slice::<Value>(body) else { return Vec::new() };
    let ids = list["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
    ids.map(|id| id.chars().take(200).collect()).collect()
}
