//! A thousand chat completions from a server that takes 50 ms for each, 64 at a time: `cargo bench --bench client`.
//!
//! The ideal is 16 rounds of 50 ms. The server is another process, so that the memory is that of the client;
//! every reply is journalled and synced as in a run, and read back from the journal in the end.

#[path = "../tests/remote/server.rs"]
#[allow(dead_code, reason = "the tests' faults are not wanted here")]
mod server;

use pipe::remote::{Ask, Endpoint, Remote, Sampling};
use serde_json::json;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const REQUESTS: usize = 1000;
const CONCURRENCY: usize = 64;
const LATENCY: Duration = Duration::from_millis(50);
const ROUNDS: usize = 5;

fn main() {
    if std::env::args().any(|argument| argument == "serve") {
        return serve();
    }
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .arg("serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the server starts");
    let mut url = String::new();
    BufReader::new(child.stdout.take().expect("its output")).read_line(&mut url).expect("its address");
    let ideal = LATENCY.as_secs_f64() * REQUESTS.div_ceil(CONCURRENCY) as f64;
    println!("{REQUESTS} requests, {CONCURRENCY} at a time, {} ms each: {ideal:.3} s at best", LATENCY.as_millis());
    println!("before: peak {:.1} MiB", peak_mib());
    for round in 1..=ROUNDS {
        let folder = tempfile::tempdir().expect("a folder");
        let took = once(url.trim(), folder.path());
        println!("round {round}: {took:.3} s, {:.2} times the best, peak {:.1} MiB", took / ideal, peak_mib());
    }
    drop(child.stdin.take());
    child.wait().expect("the server ends");
}

fn once(url: &str, folder: &std::path::Path) -> f64 {
    let endpoint: Endpoint = serde_json::from_value(json!({
        "url": url, "model": "teacher-large", "max_concurrency": CONCURRENCY, "timeout_s": 60.0, "connect_timeout_s": 5.0,
        "max_attempts": 6, "send_seed": true, "max_tokens_key": "max_tokens",
    }))
    .expect("an endpoint");
    let question = |i: usize| format!("Question {i}: {}", "how many are there in all? ".repeat(40));
    let ask = |i| Ask { messages: json!([{"role": "user", "content": question(i)}]), sample: 0, attempt: 0 };
    let asks: Vec<Ask> = (0..REQUESTS).map(ask).collect();
    let sampling = Sampling {
        max_tokens: 4096,
        temperature: 0.6,
        top_p: 0.95,
        top_k: None,
        repetition_penalty: None,
        stop: Vec::new(),
        seed: 0,
    };
    let line = Remote::new(folder).connection(&endpoint).expect("no key is wanted");
    let begun = Instant::now();
    let made = line.complete(&asks, &sampling, &mut |_| Ok(())).expect("every request is answered");
    let took = begun.elapsed().as_secs_f64();
    assert!(made.len() == REQUESTS && made.iter().all(Result::is_ok));
    took
}

/// Until its input ends.
fn serve() {
    let server = server::Server::start();
    server.latency(LATENCY);
    server.model(|body| (json!(format!("{} \\boxed{{7}}", server::question(body).repeat(8))), "stop"));
    println!("{}", server.url);
    let _ = std::io::stdin().lines().count();
}

fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}
