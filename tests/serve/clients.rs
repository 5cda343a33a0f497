//! Clients that break the rules, are slow, go away, or are too many. The server stays.

use crate::{Client, Server, chat, post, text};
use pipe::generation::{Completion, Finish};
use pipe::problem::Problem;
use pipe::serve::{Job, Piece, Service};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

const CHAT: &str = "/v1/chat/completions";

fn long() -> Value {
    chat("Hello", json!({"temperature": 2.5, "seed": 1, "ignore_eos": true}))
}

fn short() -> Value {
    chat("Hello", json!({"temperature": 0, "max_tokens": 3}))
}

fn quick(service: &mut Service) {
    service.bounds.head_time = Duration::from_secs(1);
    service.bounds.body_time = Duration::from_secs(1);
    service.bounds.idle_time = Duration::from_secs(2);
    service.bounds.write_time = Duration::from_millis(500);
}

fn still_serves(server: &Server) {
    server.post(CHAT, &short()).ok();
}

#[test]
fn bodies_that_are_no_requests_are_refused() {
    let server = Server::start(|_| {});
    for body in ["", "{", "{\"model\": \"mini\",}", "[]", "null", "\"x\"", "{\"model\": \"\\ud800\"}", "nan"] {
        server.connect().ask(post(CHAT, body)).error(400);
    }
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let error = server.connect().ask(post(CHAT, &deep)).error(400);
    assert!(error["message"].as_str().unwrap().contains("recursion"), "{error}");
    let mut bytes = post(CHAT, "{\"model\": \"mini\", \"messages\": \"____\"}").into_bytes();
    let at = bytes.len() - 5;
    bytes[at] = 0xff;
    let error = server.connect().ask(bytes).error(400);
    assert!(error["message"].as_str().unwrap().contains("not UTF-8"), "{error}");
    still_serves(&server);
}

#[test]
fn a_body_may_be_so_large_and_no_larger() {
    let server = Server::start(|service| service.bounds.body_bytes = 100_000);
    let padded = |length: usize| {
        let body = short().to_string();
        format!("{}{}", " ".repeat(length - body.len()), body)
    };
    server.connect().ask(post(CHAT, &padded(100_000))).ok();
    let mut client = server.connect();
    client.ask(post(CHAT, &padded(100_001))).error(413);
    assert!(client.is_closed());
    for length in ["99999999999", "99999999999999999999999999"] {
        let head =
            format!("POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
        server.connect().ask(head).error(413);
    }
    let head = format!("POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
    for body in [format!("{:x}\r\n{}\r\n", 60_000, padded(60_000)).repeat(2), "fffffffff\r\n".to_string()] {
        server.connect().ask(format!("{head}{body}")).error(413);
    }
    for body in ["xyz\r\n", "3\r\nabcd\r\n0\r\n\r\n", "ffffffffffffffffff\r\n"] {
        server.connect().ask(format!("{head}{body}")).error(400);
    }
    let headers = format!("GET /health HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(40_000));
    server.connect().ask(headers).error(431);
    still_serves(&server);
}

#[test]
fn bodies_together_hold_so_much_memory_and_no_more() {
    let server = Server::start(|service| service.bounds.bodies_bytes = 1000);
    let head = format!("POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 950\r\n");
    let mut slow = server.connect();
    slow.send(format!("{head}Expect: 100-continue\r\n\r\n"));
    // The word says that it holds its part.
    assert_eq!(slow.opening().expect("a word").status, 100);
    assert_eq!(server.post(CHAT, &short()).status, 429);
    slow.send(" ".repeat(950));
    assert_eq!(slow.reply().expect("a reply").status, 400);
    server.post(CHAT, &short()).ok();
}

#[test]
fn a_body_comes_in_chunks_or_after_a_word() {
    let server = Server::start(|_| {});
    let body = short().to_string();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    let expected = server.post(CHAT, &short()).ok()["choices"].clone();
    for size in [1, 7, 1000] {
        let chunks: String = body
            .as_bytes()
            .chunks(size)
            .map(|chunk| format!("{:X};ext=1\r\n{}\r\n", chunk.len(), std::str::from_utf8(chunk).unwrap()))
            .collect();
        let mut client = server.connect();
        let request = format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunks}0\r\nTrailer: x\r\n\r\n");
        assert_eq!(client.ask(&request).ok()["choices"], expected);
        // What follows is read as a new request.
        for byte in request.as_bytes().chunks(1) {
            client.send(byte);
        }
        assert_eq!(client.reply().unwrap().ok()["choices"], expected);
    }
    let mut client = server.connect();
    client.send(format!("{head}Content-Length: {}\r\nExpect: 100-continue\r\n\r\n", body.len()));
    assert_eq!(client.opening().expect("a word").status, 100);
    assert_eq!(client.ask(&body).ok()["choices"], expected);
    client.send(format!("{head}Content-Length: 999999999\r\nExpect: 100-continue\r\n\r\n"));
    client.reply().expect("instead of the word").error(413);
}

#[test]
fn connections_are_kept_as_the_client_wants() {
    let server = Server::start(quick);
    let mut client = server.connect();
    for _ in 0..3 {
        let reply = client.post(CHAT, &short());
        assert_eq!(reply.header("connection"), Some("keep-alive"));
        reply.ok();
        client.post(CHAT, &chat("x", json!({"n": 0}))).error(400);
        assert!(client.post(CHAT, &chat("Hello", json!({"stream": true, "max_tokens": 2}))).events().len() > 2);
        client.send("HEAD /health HTTP/1.1\r\n\r\n");
        assert_eq!(client.opening().expect("no body").header("content-length"), Some("15"));
        client.ask("\r\nGET /v1/models HTTP/1.1\r\n\r\n").ok();
    }
    // Two requests at once, answered in order.
    client.send(format!("{}GET /health HTTP/1.1\r\n\r\n", post(CHAT, &short().to_string())));
    assert!(client.reply().unwrap().ok().get("choices").is_some());
    assert_eq!(client.reply().unwrap().ok(), json!({"status": "ok"}));
    assert!(client.is_closed(), "idle for too long");

    let closing = "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n";
    let mut client = server.connect();
    assert_eq!(client.ask(closing).header("connection"), Some("close"));
    assert!(client.is_closed());
    let mut client = server.connect();
    client.ask("GET /health HTTP/1.0\r\n\r\n").ok();
    assert!(client.is_closed());
    let mut client = server.connect();
    let reply = client.ask("GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!(reply.header("connection"), Some("keep-alive"));
    client.ask("GET /health HTTP/1.0\r\n\r\n").ok();
}

#[test]
fn an_old_client_gets_a_stream_that_ends_with_the_connection() {
    let server = Server::start(|_| {});
    let request = post(CHAT, &chat("Hello", json!({"stream": true, "max_tokens": 5, "temperature": 0})).to_string());
    let mut client = server.connect();
    let reply = client.ask(request.replacen("HTTP/1.1", "HTTP/1.0", 1));
    assert_eq!((reply.header("transfer-encoding"), reply.header("connection")), (None, Some("close")));
    assert!(reply.events().len() > 2);
}

#[test]
fn paths_methods_and_kinds_of_body_that_are_not_there_are_named() {
    let server = Server::start(|_| {});
    assert_eq!(server.get("/").error(404)["code"], "unknown_url");
    server.get("/v1/embeddings").error(404);
    for (method, path, allow) in [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("OPTIONS", "/health", "GET")]
    {
        let reply = server.connect().ask(format!("{method} {path} HTTP/1.1\r\n\r\n"));
        assert_eq!(reply.header("allow"), Some(allow));
        reply.error(405);
    }
    let body = short().to_string();
    for kind in ["", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n"] {
        let request = format!("POST {CHAT} HTTP/1.1\r\n{kind}Content-Length: {}\r\n\r\n{body}", body.len());
        server.connect().ask(request).error(415);
    }
    server.connect().ask("GET / HTTP/3.0\r\n\r\n").error(505);
    server.connect().ask("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").error(505);
    server.connect().ask("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0").error(400);
    still_serves(&server);
}

#[test]
fn a_key_is_asked_for_and_never_shown() {
    let server = Server::start(|service| service.key = Some("sk-secret-0123456789".into()));
    server.get("/health").ok();
    for path in ["/v1/models", "/metrics", "/v1/models/mini"] {
        server.get(path).error(401);
        let get = |key: &str| server.connect().ask(format!("GET {path} HTTP/1.1\r\nAuthorization: {key}\r\n\r\n"));
        assert_eq!(get("Bearer sk-secret-0123456789").status, 200);
        for wrong in [
            "Bearer",
            "Bearer ",
            "Basic sk-secret-0123456789",
            "Bearer sk-secret-012345678",
            "Bearer sk-secret-01234567890",
        ] {
            let reply = get(wrong);
            assert!(!String::from_utf8_lossy(&reply.body).contains("secret"));
            assert_eq!(reply.error(401)["code"], "invalid_api_key");
        }
    }
    assert_eq!(server.post(CHAT, &short()).error(401)["type"], "invalid_request_error");
    assert!(!format!("{:?}", server.log.lock().unwrap()).contains("secret"));
}

#[test]
fn a_request_that_drips_in_is_not_waited_for() {
    let server = Server::start(quick);
    let body = short().to_string();
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    for (sent, drip) in [("", head.as_str()), (head.as_str(), body.as_str())] {
        let mut client = server.connect();
        client.send(sent);
        let begun = Instant::now();
        let mut writer = client.stream.try_clone().unwrap();
        let bytes = drip.as_bytes().to_vec();
        let dripping = std::thread::spawn(move || {
            for byte in bytes {
                if std::io::Write::write_all(&mut writer, &[byte]).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(40));
            }
        });
        client.reply().expect("a refusal").error(408);
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        drop(client);
        dripping.join().unwrap();
    }
    // One that says nothing at all is closed without a word.
    assert!(server.connect().is_closed());
    still_serves(&server);
}

#[test]
fn a_client_that_goes_away_frees_what_it_held() {
    let server = Server::start(|_| {});
    for stream in [true, false] {
        let before = server.metric("pipe_requests_cancelled_total");
        let mut client = server.connect();
        let more = json!({"n": 64, "stream": stream, "ignore_eos": true, "temperature": 2.5, "seed": 1});
        client.send(post(CHAT, &chat("Hello", more).to_string()));
        let begun = Instant::now();
        while server.metric("pipe_completions_live") == 0 {
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
        if stream {
            assert_eq!(client.opening().expect("a stream").status, 200);
        }
        drop(client);
        server.until("pipe_requests_cancelled_total", before + 1);
        server.until("pipe_completions_live", 0);
        server.until("pipe_completions_waiting", 0);
        server.until("pipe_requests", 0);
    }
    let entry = server.log.lock().unwrap().iter().find(|entry| entry.cancelled).cloned().unwrap();
    assert!(entry.prompt_tokens > 0 && entry.completion_tokens < 64 * 400, "{entry:?}");
    still_serves(&server);
}

/// Begins every job and gives it no token until it is gone.
fn never(jobs: Receiver<Job>) {
    let mut held = Vec::new();
    for job in jobs {
        let _ = job.to.send(Piece::Begun);
        held.push(job);
        held.retain(|job| !job.gone.load(Ordering::Relaxed));
    }
}

#[test]
fn two_hundred_at_once_are_served_or_told_to_come_again() {
    let server = Server::start(|service| service.bounds.requests = 40);
    let outcomes: Vec<u16> = std::thread::scope(|scope| {
        let ask = || {
            let reply = server.post(CHAT, &chat("Hello", json!({"temperature": 0, "max_tokens": 30})));
            match reply.status {
                200 => assert!(reply.json()["choices"][0]["message"]["content"].is_string()),
                _ => {
                    assert_eq!(reply.error(429)["type"], "rate_limit_error");
                    assert_eq!(reply.header("retry-after"), Some("1"));
                }
            }
            reply.status
        };
        let threads: Vec<_> = (0..200).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let served = outcomes.iter().filter(|status| **status == 200).count();
    assert!(served >= 40 && outcomes.len() == 200, "{served}");
    server.until("pipe_requests", 0);
    still_serves(&server);
}

#[test]
fn more_than_the_bound_are_refused_and_the_next_ones_served_again() {
    let server = Server::scripted(|service| service.bounds.requests = 3, never);
    let mut held: Vec<Client> = (0..3).map(|_| server.connect()).collect();
    held.iter_mut().for_each(|client| client.send(post(CHAT, &long().to_string())));
    server.until("pipe_requests", 3);
    let reply = server.post(CHAT, &short());
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(reply.error(429)["code"], "rate_limit_exceeded");
    server.get("/health").ok();
    held.pop();
    server.until("pipe_requests", 2);
}

/// A connection that was let in: nobody tells it to come again.
fn let_in(server: &Server) -> Client {
    let begun = Instant::now();
    loop {
        let client = server.connect();
        client.stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        if client.stream.peek(&mut [0]).is_err() {
            return client;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "no place becomes free");
    }
}

#[test]
fn connections_beyond_the_bound_are_told_to_come_again() {
    let server = Server::start(|service| service.bounds.connections = 4);
    let mut open: Vec<Client> = (0..4).map(|_| server.connect()).collect();
    // Kept when there is room, given up when places get scarce. The last: the others were let in before it.
    let last = open.pop().unwrap().ask("GET /health HTTP/1.1\r\n\r\n");
    assert_eq!(last.header("connection"), Some("close"));
    open.push(let_in(&server));
    for _ in 0..20 {
        let reply = server.connect().reply().expect("told");
        assert_eq!(reply.header("retry-after"), Some("1"));
        reply.error(429);
    }
    open.clear();
    let begun = Instant::now();
    while server.get("/health").status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

/// Answers in a given way.
fn script(answer: impl Fn(usize, &Job)) -> impl FnOnce(Receiver<Job>) {
    move |jobs| jobs.into_iter().enumerate().for_each(|(i, job)| answer(i, &job))
}

fn say(job: &Job, ids: &[u32], end: &str) {
    for &id in ids {
        let _ = job.to.send(Piece::Token { choice: 0, id, logprob: -0.5, top: Vec::new() });
    }
    let completion = Completion { ids: ids.to_vec(), text: end.into(), finish: Finish::Length, logprobs: Vec::new() };
    let _ = job.to.send(Piece::End { choice: 0, completion });
}

#[test]
fn a_failing_engine_is_an_error_and_not_the_end() {
    let failing = |i: usize, job: &Job| match i % 3 {
        0 => job.to.send(Piece::Refused(Problem::new("model::context", "too long for it"))).unwrap(),
        1 => {
            job.to.send(Piece::Begun).unwrap();
            job.to.send(Piece::Token { choice: 0, id: 70, logprob: -1.0, top: Vec::new() }).unwrap();
            job.to.send(Piece::Failed(Problem::new("model::not_finite", "it has diverged"))).unwrap();
        }
        _ => {
            job.to.send(Piece::Begun).unwrap();
            say(job, &[70], "fine");
        }
    };
    let server = Server::scripted(|_| {}, script(move |i, job| failing(i, job)));
    assert_eq!(server.post(CHAT, &short()).error(400)["message"], "too long for it");
    let error = server.post(CHAT, &short()).error(500);
    assert_eq!((&error["message"], &error["type"]), (&json!("it has diverged"), &json!("server_error")));
    server.post(CHAT, &short()).ok();
    let streamed = chat("Hello", json!({"stream": true}));
    server.post(CHAT, &streamed).error(400);
    let reply = server.post(CHAT, &streamed);
    let text = String::from_utf8(reply.body.clone()).unwrap();
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("data: {\"error\":") && last.contains("diverged"), "{text}");
    server.post(CHAT, &streamed).events();
    let problems: Vec<Option<String>> = server.log.lock().unwrap().iter().map(|entry| entry.problem.clone()).collect();
    assert!(problems[..4].contains(&Some("model::not_finite".into())), "{problems:?}");
}

/// The bundled model as training that diverged may leave it: finite weights, and logits that are not.
#[test]
fn a_model_that_has_diverged_is_an_error_each_time_and_the_server_stays() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/mini/models/mini-3B");
    let mut bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let place = |i: usize| header["model.norm.weight"]["data_offsets"][i].as_u64().unwrap() as usize + 8 + length;
    bytes[place(0)..place(1)].chunks_mut(2).for_each(|value| value.copy_from_slice(&0x7f00_u16.to_le_bytes()));
    let broken = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("config.json"), broken.path().join("config.json")).unwrap();
    std::fs::write(broken.path().join("model.safetensors"), bytes).unwrap();
    let files = pipe::files::Files::from_dir(broken.path()).unwrap();
    let model = pipe::model::Model::load(&[&files], &pipe::model::LoadOptions::default()).unwrap();
    let server = Server::of(model, |_| {});
    for stream in [false, true, false] {
        let reply = server.post(CHAT, &chat("Hello", json!({"stream": stream, "n": 2})));
        let text = String::from_utf8(reply.body.clone()).unwrap();
        assert!(text.contains("not finite") && text.contains("server_error"), "{text}");
        assert_eq!(reply.status, if stream { 200 } else { 500 });
        server.get("/health").ok();
    }
}

#[test]
fn characters_and_stop_texts_that_span_tokens_are_streamed_whole() {
    // Bytes of the tokenizer's alphabet: those of "é" are two tokens, or none of its texts would hold one.
    let (_, tokenizer) = crate::mini("mini-3B");
    let ids: Vec<u32> = "a é🐈 STOP".split("").flat_map(|part| tokenizer.encode(part)).collect();
    let made = ids.clone();
    let server = Server::scripted(
        |_| {},
        script(move |_, job| {
            job.to.send(Piece::Begun).unwrap();
            say(job, &made, "a é🐈 ");
        }),
    );
    let reply =
        server.post("/v1/completions", &text(json!("x"), json!({"stream": true, "stop": ["STOP"], "logprobs": 0})));
    let events = reply.events();
    let parts: Vec<&str> = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(parts.concat(), "a é🐈 ");
    assert!(parts.contains(&"é") && parts.contains(&"🐈"), "{parts:?}");
    let tokens: Vec<&Value> = events
        .iter()
        .flat_map(|event| event["choices"][0]["logprobs"]["tokens"].as_array().into_iter().flatten())
        .collect();
    assert!(tokens.iter().any(|token| token.as_str().unwrap().starts_with("bytes:\\x")), "{tokens:?}");
    assert!(tokens.len() < ids.len(), "those of the stop text are not told");
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let endless = script(|_, job| {
        job.to.send(Piece::Begun).unwrap();
        while !job.gone.load(Ordering::Relaxed) {
            if job.to.send(Piece::Token { choice: 0, id: 70, logprob: 0.0, top: vec![(70, 0.0); 20] }).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    });
    let server = Server::scripted(quick, endless);
    let mut client = server.connect();
    let more = json!({"stream": true, "logprobs": true, "top_logprobs": 20});
    client.send(post(CHAT, &chat("Hello", more).to_string()));
    server.until("pipe_requests_cancelled_total", 1);
    server.until("pipe_requests", 0);
}

#[test]
fn what_is_at_work_may_end_when_the_server_stops() {
    let server = Server::scripted(
        |service| service.bounds.drain_time = Duration::from_secs(30),
        script(|_, job| {
            job.to.send(Piece::Begun).unwrap();
            std::thread::sleep(Duration::from_millis(700));
            say(job, &[70], "said");
        }),
    );
    let mut idle = server.connect();
    idle.ask("GET /health HTTP/1.1\r\n\r\n").ok();
    let mut client = server.connect();
    client.send(post(CHAT, &short().to_string()));
    server.until("pipe_requests", 1);
    let address = server.address;
    let stopped = Instant::now();
    let ending = std::thread::spawn(move || server.end());
    assert_eq!(client.reply().expect("a reply").ok()["choices"][0]["message"]["content"], "said");
    assert!(client.is_closed() && idle.is_closed());
    ending.join().unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(10));
    assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens");
}

#[test]
fn what_does_not_end_is_cut_when_the_server_stops() {
    for stream in [false, true] {
        let server = Server::scripted(|service| service.bounds.drain_time = Duration::from_millis(300), never);
        let mut client = server.connect();
        client.send(post(CHAT, &chat("Hello", json!({"stream": stream})).to_string()));
        server.until("pipe_requests", 1);
        let stopped = Instant::now();
        let ending = std::thread::spawn(move || server.end());
        let reply = client.reply().expect("a reply");
        let text = String::from_utf8(reply.body.clone()).unwrap();
        assert!(text.contains("the server is stopping"), "{text}");
        assert_eq!(reply.status, if stream { 200 } else { 503 });
        ending.join().unwrap();
        assert!(stopped.elapsed() < Duration::from_secs(5), "{:?}", stopped.elapsed());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// One server for all would be quicker and would not show which request broke it.
    #[test]
    fn no_bytes_bring_the_server_down(
        at in prop::collection::vec((0usize..400, any::<u8>()), 0..6),
        cut in 0usize..400,
        noise in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        static SERVER: std::sync::OnceLock<Server> = std::sync::OnceLock::new();
        let server = SERVER.get_or_init(|| Server::scripted(quick, script(|_, job| {
            job.to.send(Piece::Begun).unwrap();
            say(job, &[70], "fine");
        })));
        let mut bytes = post(CHAT, &chat("Hello", json!({"stop": "x", "n": 1})).to_string()).into_bytes();
        for (at, byte) in at {
            let length = bytes.len();
            bytes[at % length] = byte;
        }
        bytes.truncate(cut.max(1));
        bytes.extend(noise);
        let mut client = server.connect();
        client.send(&bytes);
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        if let Some(reply) = client.opening() {
            prop_assert!(reply.status == 200 || (400..=505).contains(&reply.status), "{}", reply.status);
        }
        prop_assert_eq!(server.get("/health").status, 200);
    }
}
