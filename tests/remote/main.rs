//! Generation and evaluation through a server that fails in every way servers fail, and what it costs.

mod eval;
mod faults;
mod judge;
mod paid;
mod plan;
mod probe;
mod replies;
mod server;
mod study;

use pipe::problem::Problem;
use pipe::remote::{Ask, Completion, Endpoint, Pace, Remote, Sampling};
use serde_json::{Value, json};
use server::Server;
use std::time::Duration;

/// A variable that the test runner sets and that looks like a key: long, without blanks.
const KEY_VARIABLE: &str = "CARGO_MANIFEST_PATH";

fn endpoint(server: &Server, more: Value) -> Endpoint {
    let mut all = json!({
        "url": server.url, "model": "teacher-large", "max_concurrency": 4, "timeout_s": 5.0, "connect_timeout_s": 2.0,
        "max_attempts": 4, "send_seed": true, "max_tokens_key": "max_tokens",
    });
    all.as_object_mut().unwrap().extend(more.as_object().expect("keys").clone());
    serde_json::from_value(all).expect("an endpoint")
}

/// Waits a thousandth of what it would.
fn quick() -> Pace {
    Pace {
        first_wait: Duration::from_millis(2),
        longest_wait: Duration::from_millis(20),
        longest_asked: Duration::from_millis(1500),
        breaker: 10,
        pauses: vec![Duration::from_millis(30); 3],
    }
}

fn sampling(max_tokens: u64) -> Sampling {
    Sampling {
        max_tokens,
        temperature: 0.7,
        top_p: 1.0,
        top_k: None,
        repetition_penalty: None,
        stop: Vec::new(),
        seed: 0,
    }
}

fn asks(questions: &[String]) -> Vec<Ask> {
    let ask = |text: &String| Ask { messages: json!([{"role": "user", "content": text}]), sample: 0, attempt: 0 };
    questions.iter().map(ask).collect()
}

fn questions(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("question {i}.")).collect()
}

/// A cache folder and the endpoints asked from it.
struct Client {
    folder: tempfile::TempDir,
    remote: Remote,
}

type Completions = Result<Vec<Result<Completion, String>>, Problem>;

impl Client {
    fn new() -> Client {
        let folder = tempfile::tempdir().unwrap();
        let remote = Remote::new(&folder.path().join("journal")).pace(quick());
        Client { folder, remote }
    }

    /// As another process would find it.
    fn again(self) -> Client {
        let remote = Remote::new(&self.folder.path().join("journal")).pace(quick());
        Client { folder: self.folder, remote }
    }

    fn complete(&self, endpoint: &Endpoint, questions: &[String], max_tokens: u64) -> Completions {
        let connection = self.remote.connection(endpoint)?;
        connection.complete(&asks(questions), &sampling(max_tokens), &mut |_| Ok(()))
    }
}
