//! `pipe serve` as its users meet it, and the product itself as its client.

use crate::{Client, Reply, chat, post};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const KEY: &str = "sk-0123456789abcdef-secret-0123456789";

const MANIFEST: &str = r#"manifest = 1
title = "A model to be served"

[stage.base]
kind = "model"
axes = { size = ["3B", "7B"] }
source = "init:mini-{size}"

[stage.sums]
kind = "dataset"
source = "path:sums.jsonl"

[stage.sft]
kind = "sft"
model = "base"
data = "sums"
format = "chat"
max_steps = 2
batch_size = 2
learning_rate = 1e-3
lora = { rank = 4, alpha = 8 }
max_tokens = 200
"#;

struct Project(tempfile::TempDir);

impl Project {
    /// With the model and its adapter made.
    fn made(stages: &[&str]) -> Project {
        let project = Project(tempfile::tempdir().unwrap());
        project.write("m.toml", MANIFEST);
        let line =
            |i: u32| format!("{}\n", json!({"prompt": format!("What is {i} plus 2?"), "answer": (i + 2).to_string()}));
        project.write("sums.jsonl", &(0..8).map(line).collect::<String>());
        for stage in stages {
            project.ok(&["run", "m.toml", stage]);
        }
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command.current_dir(self.0.path()).args(arguments).env("SERVE_KEY", KEY).env_remove("RUST_LOG");
        command
    }

    fn ok(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    }

    fn serve(&self, stage: &str, more: &[&str]) -> Serving {
        let arguments = [&["serve", "m.toml", stage, "--port", "0", "--json"], more].concat();
        let mut command = self.command(&arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap_or_else(|_| {
            let mut said = String::new();
            let _ = child.stderr.take().unwrap().read_to_string(&mut said);
            panic!("{line}{said}")
        });
        let url = told["url"].as_str().unwrap().to_string();
        let address = url.trim_start_matches("http://").trim_end_matches("/v1").parse().unwrap();
        Serving { child, told, url, address }
    }

    fn journalled(&self) -> usize {
        let Ok(files) = std::fs::read_dir(self.path("cache/journal")) else { return 0 };
        let text: String =
            files.flatten().map(|file| std::fs::read_to_string(file.path()).unwrap_or_default()).collect();
        text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count()
    }
}

/// A server in a process of its own.
struct Serving {
    child: Child,
    told: Value,
    url: String,
    address: SocketAddr,
}

impl Serving {
    fn ask(&self, body: &Value) -> Reply {
        Client::to(self.address).ask(post("/v1/chat/completions", &body.to_string()))
    }

    /// How many completions it has given.
    fn answered(&self) -> usize {
        let request = format!("GET /metrics HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\r\n");
        let text = String::from_utf8(Client::to(self.address).ask(request).body).unwrap();
        let wanted = "pipe_requests_total{what=\"POST /v1/chat/completions\",status=\"200\"} ";
        text.lines().find_map(|line| line.strip_prefix(wanted)).map_or(0, |count| count.parse().unwrap())
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill(2) on a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Exit code and what was said on stderr.
    fn end(mut self, signal: i32) -> (Option<i32>, String) {
        self.signal(signal);
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hello(model: &str) -> Value {
    chat("What is secretly 3 plus 2?", json!({"model": model, "temperature": 0, "max_tokens": 8}))
}

#[test]
fn a_model_and_its_adapter_are_served_until_a_signal() {
    let project = Project::made(&["sft[size=3B]"]);
    let mut said = Vec::new();
    for (stage, signal) in [("base[size=3B]", libc::SIGINT), ("sft[size=3B]", libc::SIGTERM)] {
        let serving = project.serve(stage, &["-v"]);
        assert_eq!((&serving.told["event"], &serving.told["cell"]), (&json!("serving"), &json!(stage)));
        let reply = serving.ask(&hello(stage)).ok();
        assert_eq!(reply["system_fingerprint"], serving.told["fingerprint"]);
        said.push(reply);
        serving.ask(&hello("other")).error(404);
        let (code, log) = serving.end(signal);
        assert_eq!(code, Some(130), "{log}");
        assert!(log.contains("POST /v1/chat/completions 200, ") && log.contains("model_not_found"), "{log}");
        assert!(!log.contains("secret"), "no text of a request: {log}");
    }
    assert!(said[0]["system_fingerprint"] != said[1]["system_fingerprint"]);
}

#[test]
fn a_key_and_a_name_are_given_at_the_command_line() {
    let project = Project::made(&["base[size=3B]"]);
    let serving = project
        .serve("base[size=3B]", &["--api-key-env", "SERVE_KEY", "--model-name", "mine", "-v", "--dtype", "bf16"]);
    serving.ask(&hello("mine")).error(401);
    let body = hello("mine").to_string();
    let request = post("/v1/chat/completions", &body);
    let keyed = request.replacen("\r\n", &format!("\r\nAuthorization: Bearer {KEY}\r\n"), 1);
    assert_eq!(Client::to(serving.address).ask(keyed).ok()["model"], "mine");
    let told = serving.told.to_string();
    let (_, log) = serving.end(libc::SIGTERM);
    assert!(!format!("{told}{log}").contains("secret"), "{log}");
    assert!(log.contains(" 401, invalid_api_key"), "{log}");
}

#[test]
fn what_is_missing_or_wrong_is_said_before_anything_is_served() {
    let project = Project::made(&["base[size=3B]"]);
    let serve = |code, more: &[&str]| project.fails(code, &[&["serve", "m.toml"], more].concat());
    let said = serve(3, &["sft[size=3B]"]);
    assert!(said.contains("cli::not_fresh") && said.contains("pipe run m.toml 'sft[size=3B]'"), "{said}");
    let said = serve(2, &["base"]);
    assert!(said.contains("2 cells") && said.contains("'base[size=3B]', 'base[size=7B]'"), "{said}");
    assert!(serve(2, &["sums"]).contains("no model"));
    serve(2, &["nothing"]);
    serve(2, &["base[size=3B]", "--max-concurrency", "0"]);
    let said = serve(3, &["base[size=3B]", "--api-key-env", "NOT_SET_ANYWHERE"]);
    assert!(said.contains("NOT_SET_ANYWHERE"), "{said}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = serve(3, &["base[size=3B]", "--port", &port]);
    assert!(said.contains("cli::port") && said.contains(&port) && said.contains("--port 0"), "{said}");
    let said = serve(3, &["base[size=3B]", "--host", "203.0.113.7"]);
    assert!(said.contains("cli::port"), "{said}");
}

#[test]
fn anyone_may_ask_is_a_warning() {
    let project = Project::made(&["base[size=3B]"]);
    let open = project.serve("base[size=3B]", &["--host", "0.0.0.0"]);
    assert!(open.url.starts_with("http://127.0.0.1:"));
    assert!(open.end(libc::SIGTERM).1.contains("warning: anyone who reaches 0.0.0.0:"));
    let keyed = project.serve("base[size=3B]", &["--host", "0.0.0.0", "--api-key-env", "SERVE_KEY"]);
    assert!(!keyed.end(libc::SIGTERM).1.contains("warning"));
}

#[test]
fn a_stage_asks_a_served_model_and_a_kill_in_the_middle_asks_nothing_twice() {
    const RECORDS: usize = 24;
    let server = Project::made(&["base[size=3B]"]);
    let serving = server.serve("base[size=3B]", &["--api-key-env", "SERVE_KEY", "--model-name", "teacher"]);
    let client = Project(tempfile::tempdir().unwrap());
    client.write(
        "m.toml",
        &format!(
            r#"manifest = 1
title = "Answers of a served model"

[endpoint.local]
url = "{}"
model = "teacher"
api_key_env = "SERVE_KEY"
max_concurrency = 1

[stage.questions]
kind = "dataset"
source = "path:questions.jsonl"

[stage.answers]
kind = "generate"
endpoint = "local"
data = "questions"
prompt = "{{{{ question }}}}"
temperature = 1.0
max_tokens = 100
"#,
            serving.url
        ),
    );
    let line = |i| {
        format!(
            "{}\n",
            json!({"id": format!("q{i}"), "question": format!("Tom has {i} pens. He finds 3 pens. How many pens does Tom have?")})
        )
    };
    client.write("questions.jsonl", &(0..RECORDS).map(line).collect::<String>());

    let mut child = client.command(&["run", "m.toml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while client.journalled() < RECORDS / 4 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", client.journalled());
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = client.journalled();
    assert!((RECORDS / 4..RECORDS).contains(&before), "killed in the middle: {before}");
    std::thread::sleep(Duration::from_millis(500));
    let first = serving.answered();
    // At most the one under way may have been answered to nobody.
    assert!(first == before || first == before + 1, "{first} answered, {before} kept");

    client.ok(&["run", "m.toml", "--set", "endpoint.local.max_concurrency=4"]);
    let second = serving.answered() - first;
    assert_eq!((client.journalled(), second), (RECORDS, RECORDS - before));
    println!("{before} replies in the journal when killed, {first} given; then {second} more: {RECORDS} records");
    client.ok(&["run", "m.toml", "--force", "answers"]);
    assert_eq!(serving.answered(), first + second, "what is in the journal is not asked again");
    client.ok(&["export", "m.toml", "answers", "answers"]);
    let data = std::fs::read_to_string(client.path("answers/data.jsonl")).unwrap();
    assert_eq!(data.lines().count(), RECORDS);
}
