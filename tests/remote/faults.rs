//! What is asked again, what is not, and what is said then.

use crate::server::{Fault, Server, echo};
use crate::{Client, KEY_VARIABLE, endpoint, questions};
use pipe::remote::Finish;
use serde_json::json;
use std::time::{Duration, Instant};

fn reply(finish: &str) -> Vec<u8> {
    json!({"model": "m", "choices": [{"message": {"content": "half"}, "finish_reason": finish}]})
        .to_string()
        .into_bytes()
}

#[test]
fn what_can_get_better_is_asked_again_until_it_does() {
    let mut faults: Vec<(&str, Fault)> =
        [408, 409, 425, 429, 500, 501, 502, 503, 504, 529].map(|s| ("status", Fault::Status(s, "", "busy"))).to_vec();
    faults.extend([
        ("reset in the middle of a reply", Fault::Reset),
        ("no word at all", Fault::Hang),
        ("truncated JSON", Fault::Body(b"{\"choices\": [{\"mess".to_vec())),
        ("no choices", Fault::Body(b"{\"choices\": []}".to_vec())),
        (
            "an error with status 200",
            Fault::Body(b"{\"error\": {\"message\": \"overloaded\", \"code\": 503}}".to_vec()),
        ),
        ("not UTF-8", Fault::Body(b"{\"choices\": [{\"message\": {\"content\": \"\xff\"}}]}".to_vec())),
        ("a page for people", Fault::Body(b"<html>maintenance</html>".to_vec())),
        ("broken off", Fault::Body(reply("insufficient_system_resource"))),
        ("asked to wait", Fault::Status(429, "retry-after: 0.05\r\n", "slow down")),
    ]);
    for (name, fault) in faults {
        let server = Server::start();
        let client = Client::new();
        server.fault("question 1", fault.clone());
        server.fault("question 1", fault);
        let made = client.complete(&endpoint(&server, json!({})), &questions(3), 50).unwrap();
        assert_eq!(server.faults_left(), 0, "{name}");
        assert_eq!(server.asked().len(), 5, "{name}: three questions, one of them three times");
        for (i, completion) in made.iter().enumerate() {
            let completion = completion.as_ref().unwrap_or_else(|why| panic!("{name}: {why}"));
            assert!(completion.answer.starts_with(&format!("You said: question {i}.")), "{name}");
        }
    }
}

#[test]
fn a_reply_that_drips_is_given_up_after_its_time() {
    let server = Server::start();
    let client = Client::new();
    server.fault("question 0", Fault::Drip);
    let begun = Instant::now();
    let made = client.complete(&endpoint(&server, json!({"timeout_s": 0.4})), &questions(1), 50).unwrap();
    assert!(made[0].is_ok());
    assert!(begun.elapsed() >= Duration::from_millis(400) && begun.elapsed() < Duration::from_secs(3));
    // And if it always does, it is said why.
    (0..2).for_each(|_| server.fault("question 1", Fault::Drip));
    let twice = endpoint(&server, json!({"timeout_s": 0.3, "max_attempts": 2}));
    let made = client.complete(&twice, &questions(2), 50).unwrap();
    assert_eq!(made[1], Err("no reply within 0.3 s (sent 2 times)".into()));
}

#[test]
fn a_server_that_asks_to_be_left_alone_is_left_alone_by_all() {
    let server = Server::start();
    let client = Client::new();
    server.fault("question 0", Fault::Status(429, "Retry-After: 1\r\n", "{\"error\": {\"message\": \"slow down\"}}"));
    server.latency(Duration::from_millis(60));
    let one_by_one = endpoint(&server, json!({"max_concurrency": 1}));
    client.complete(&one_by_one, &questions(3), 50).unwrap();
    let asked = server.asked();
    assert_eq!(asked.len(), 4);
    let wait = asked[1].at - asked[0].at;
    assert!(wait >= Duration::from_millis(950), "asked again after {wait:?}");
}

#[test]
fn dates_to_wait_for_are_bounded_whatever_the_clocks_say() {
    for (headers, least, most) in [
        // The future by our clock, five seconds by the server's own; at most 1.5 s here.
        ("date: Mon, 06 Nov 2000 08:49:00 GMT\r\nretry-after: Mon, 06 Nov 2000 08:49:01 GMT\r\n", 950, 1500),
        ("retry-after: Sun, 06 Nov 1994 08:49:37 GMT\r\n", 0, 900),
        ("retry-after: Fri, 06 Nov 2099 08:49:37 GMT\r\n", 1450, 2500),
        ("retry-after: tomorrow\r\n", 0, 900),
        ("retry-after: 999999999\r\n", 1450, 2500),
    ] {
        let server = Server::start();
        let client = Client::new();
        server.fault("question 0", Fault::Status(429, headers, "slow down"));
        client.complete(&endpoint(&server, json!({})), &questions(1), 50).unwrap();
        let asked = server.asked();
        let wait = (asked[1].at - asked[0].at).as_millis();
        assert!((least..most).contains(&wait), "{headers}: {wait} ms");
    }
}

#[test]
fn what_cannot_get_better_is_asked_once_and_says_what_to_do() {
    for (status, code, help) in [
        (400, "remote::refused", "max_tokens"),
        (401, "remote::bad_key", KEY_VARIABLE),
        (402, "remote::no_credit", "top it up"),
        (403, "remote::bad_key", KEY_VARIABLE),
        (404, "remote::not_found", "`url`"),
        (405, "remote::refused", "`url`"),
        (413, "remote::refused", "max_tokens"),
        (422, "remote::refused", "max_tokens"),
    ] {
        let server = Server::start();
        let client = Client::new();
        server.fault("", Fault::Status(status, "", "{\"error\": {\"message\": \"the words of the server\"}}"));
        let one = endpoint(&server, json!({"max_concurrency": 1, "api_key_env": KEY_VARIABLE}));
        let problem = client.complete(&one, &questions(5), 50).unwrap_err();
        assert_eq!((problem.code, server.asked().len()), (code, 1), "{status}");
        let text = problem.to_string();
        assert!(text.contains("the words of the server") && text.contains(help), "{text}");
    }
    let server = Server::start();
    let quota = "{\"error\": {\"message\": \"You exceeded your current quota\", \"code\": \"insufficient_quota\"}}";
    server.fault("", Fault::Status(429, "", quota));
    let one = endpoint(&server, json!({"max_concurrency": 1}));
    assert_eq!(Client::new().complete(&one, &questions(5), 50).unwrap_err().code, "remote::no_credit");
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_request_that_is_refused_after_others_were_answered_is_wrong_by_itself() {
    let server = Server::start();
    let client = Client::new();
    server.fault("question 3", Fault::Status(400, "", "{\"error\": {\"message\": \"the prompt is too long\"}}"));
    let made = client.complete(&endpoint(&server, json!({"max_concurrency": 1})), &questions(5), 50).unwrap();
    assert_eq!(made[3], Err("status 400: the prompt is too long".into()));
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 4);
    assert_eq!(server.asked().len(), 5);
}

#[test]
fn no_redirect_is_followed_with_prompts_and_key() {
    let (server, other) = (Server::start(), Server::start());
    let location: &'static str =
        Box::leak(format!("location: {}/chat/completions?token=SECRET\r\n", other.url).into_boxed_str());
    for status in [301, 302, 307, 308] {
        server.fault("", Fault::Status(status, location, ""));
        let keyed = endpoint(&server, json!({"api_key_env": KEY_VARIABLE}));
        let problem = Client::new().complete(&keyed, &questions(1), 50).unwrap_err();
        assert_eq!(problem.code, "remote::redirect", "{status}");
        let text = problem.to_string();
        assert!(text.contains(&other.url) && !text.contains("SECRET"), "{text}");
    }
    assert!(other.seen().is_empty());
}

#[test]
fn a_reply_of_a_hundred_megabytes_is_cut_off() {
    let server = Server::start();
    let client = Client::new();
    server.fault("question 1", Fault::Huge(100 << 20));
    let made = client.complete(&endpoint(&server, json!({})), &questions(3), 50).unwrap();
    assert_eq!(made[1], Err("the reply is larger than 16 MiB and was cut off".into()));
    assert!(made[0].is_ok() && made[2].is_ok());
    assert_eq!(server.asked().len(), 3, "it is not asked for again");
    assert!(server.sent_bytes() < 64 << 20, "{} bytes were taken", server.sent_bytes());
}

#[test]
fn cut_and_withheld_replies_are_told_apart() {
    let server = Server::start();
    let client = Client::new();
    server.model(|body| match crate::server::question(body) {
        "question 0." => (json!({"content": "", "reasoning_content": "let me"}), "length"),
        "question 1." => (json!(""), "content_filter"),
        "question 2." => (json!({"content": "\\boxed{4}", "reasoning": "two and two"}), "stop"),
        _ => echo(body),
    });
    let made = client.complete(&endpoint(&server, json!({})), &questions(4), 50).unwrap();
    let [cut, filtered, thought, plain] = <[_; 4]>::try_from(made).unwrap().map(Result::unwrap);
    assert_eq!((cut.finish.clone(), cut.text().as_str()), (Finish::Length, "<think>\nlet me"));
    assert_eq!(filtered.refused().as_deref(), Some("withheld by the server's content filter"));
    assert_eq!(thought.text(), "<think>\ntwo and two\n</think>\n\n\\boxed{4}");
    assert_eq!((plain.thinking.as_ref(), plain.finish()), (None, "stop"));
}

#[test]
fn a_server_that_is_down_is_not_hammered() {
    let server = Server::start();
    let client = Client::new();
    (0..90).for_each(|_| server.fault("", Fault::Status(503, "", "down")));
    let many = endpoint(&server, json!({"max_attempts": 50}));
    let problem = client.complete(&many, &questions(100), 50).unwrap_err();
    assert_eq!(problem.code, "remote::down");
    let asked = server.asked().len();
    assert!((13..=10 + 4 + 3).contains(&asked), "ten in a row, what was under way, three more: {asked}");
    // It comes back, and so does the next job.
    let again = client.complete(&many, &questions(2), 50);
    assert_eq!(again.unwrap_err().code, "remote::down");
    while server.faults_left() > 0 {
        server.seen();
        let _ = client.complete(&many, &questions(100), 50);
    }
    assert!(client.complete(&many, &questions(2), 50).unwrap().iter().all(Result::is_ok));
}

#[test]
fn a_server_that_comes_back_is_used_again() {
    let server = Server::start();
    let client = Client::new();
    (0..11).for_each(|_| server.fault("", Fault::Status(503, "", "down")));
    let many = endpoint(&server, json!({"max_attempts": 50}));
    let made = client.complete(&many, &questions(20), 50).unwrap();
    assert!(made.iter().all(Result::is_ok));
}

#[test]
fn stopping_is_heard_within_a_second_whatever_is_under_way() {
    let server = Server::start();
    server.latency(Duration::from_secs(4));
    let client = Client::new();
    let connection = client.remote.connection(&endpoint(&server, json!({}))).unwrap();
    let begun = Instant::now();
    let stopped =
        connection.complete(&crate::asks(&questions(9)), &crate::sampling(50), &mut |_| match begun.elapsed()
            > Duration::from_millis(300)
        {
            true => Err(pipe::problem::Problem::new("test::stop", "stop")),
            false => Ok(()),
        });
    assert_eq!(stopped.unwrap_err().code, "test::stop");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn rates_and_concurrency_are_kept() {
    let server = Server::start();
    let client = Client::new();
    server.latency(Duration::from_millis(30));
    let few = endpoint(&server, json!({"max_concurrency": 3}));
    client.complete(&few, &questions(12), 50).unwrap();
    assert_eq!(server.most_running(), 3);

    let server = Server::start();
    let slow = endpoint(&server, json!({"requests_per_minute": 600, "max_concurrency": 16}));
    Client::new().complete(&slow, &questions(20), 50).unwrap();
    let asked = server.asked();
    let took = (asked.last().unwrap().at - asked[0].at).as_secs_f64();
    // Ten at once, then ten a second.
    assert!((0.85..3.0).contains(&took), "{took}");

    // A reply says that it took 30 tokens, where 50 + 108 might have been: the rest is given back.
    let server = Server::start();
    let slow = endpoint(&server, json!({"tokens_per_minute": 6000, "max_concurrency": 16}));
    let begun = Instant::now();
    Client::new().complete(&slow, &questions(40), 50).unwrap();
    let took = begun.elapsed().as_secs_f64();
    // 40 of 30 tokens at 100 a second, 1,000 of them at once.
    assert!((1.5..7.0).contains(&took), "{took}");
}
