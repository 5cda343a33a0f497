//! Nothing is paid for twice, and no more than one has.

use crate::server::{Fault, Server};
use crate::{Client, asks, endpoint, questions, sampling};
use pipe::remote::Finish;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

#[test]
fn another_run_with_one_record_more_and_another_concurrency_pays_for_the_one() {
    let server = Server::start();
    let client = Client::new();
    let before = client.complete(&endpoint(&server, json!({})), &questions(20), 50).unwrap();
    assert_eq!(server.asked().len(), 20);
    let client = client.again();
    let other = endpoint(&server, json!({"max_concurrency": 1, "requests_per_minute": 6000, "send_seed": false}));
    let after = client.complete(&other, &questions(21), 50).unwrap();
    assert_eq!(server.asked().len(), 1);
    assert_eq!(before, after[..20]);
    let all = client.again().complete(&endpoint(&server, json!({})), &questions(21), 50).unwrap();
    assert_eq!((server.asked().len(), all), (0, after));
}

#[test]
fn a_larger_limit_asks_again_only_for_what_was_cut_or_failed() {
    let server = Server::start();
    server.model(|body| {
        let needs = 10 * (1 + crate::server::question(body).len() as u64 % 2);
        let cut = body["max_tokens"].as_u64().unwrap() < needs;
        (json!(if cut { "half" } else { "whole" }), if cut { "length" } else { "stop" })
    });
    let asked: Vec<String> = ["a", "bb", "c", "dd", "eee"].map(String::from).to_vec();
    let client = Client::new();
    server.fault("dd", Fault::Status(400, "", "no"));
    let one_by_one = endpoint(&server, json!({"max_concurrency": 1}));
    let short = client.complete(&one_by_one, &asked, 10).unwrap();
    let cut = |made: &[Result<pipe::remote::Completion, String>]| {
        made.iter().map(|made| made.as_ref().map(|made| made.finish == Finish::Length).ok()).collect::<Vec<_>>()
    };
    assert_eq!(cut(&short), [Some(true), Some(false), Some(true), None, Some(true)]);
    assert_eq!(server.asked().len(), 5);
    let client = client.again();
    let long = client.complete(&one_by_one, &asked, 20).unwrap();
    assert_eq!(cut(&long), [Some(false); 5].as_slice());
    let again: Vec<String> =
        server.asked().iter().map(|seen| crate::server::question(&seen.body).to_string()).collect();
    assert_eq!(again, ["a", "c", "dd", "eee"]);
    // A smaller limit than was paid for asks for nothing.
    let shorter = client.again().complete(&one_by_one, &asked, 5).unwrap();
    assert_eq!((server.asked().len(), shorter), (0, long));
}

#[test]
fn samples_and_further_tries_are_requests_of_their_own_and_equal_ones_are_one() {
    let server = Server::start();
    let client = Client::new();
    let mut all = asks(&["same".to_string(), "same".to_string(), "same".to_string(), "same".to_string()]);
    all[2].sample = 1;
    all[3].attempt = 1;
    let connection = client.remote.connection(&endpoint(&server, json!({}))).unwrap();
    let made = connection.complete(&all, &sampling(50), &mut |_| Ok(())).unwrap();
    assert_eq!(made.len(), 4);
    let seeds: std::collections::HashSet<u64> =
        server.asked().iter().map(|seen| seen.body["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds.len(), 3, "two of the four are the same request");
    assert!(server.paid().values().all(|times| *times == 1));
}

#[test]
fn two_jobs_at_once_that_want_the_same_ask_once_and_share_the_limits() {
    let server = Server::start();
    server.latency(Duration::from_millis(40));
    let client = Arc::new(Client::new());
    let one = endpoint(&server, json!({"max_concurrency": 3}));
    std::thread::scope(|scope| {
        for limit in [50, 60] {
            let (client, one) = (client.clone(), one.clone());
            scope.spawn(move || {
                assert!(client.complete(&one, &questions(12), limit).unwrap().iter().all(Result::is_ok))
            });
        }
    });
    assert_eq!(server.asked().len(), 12);
    assert_eq!(server.most_running(), 3);
}

#[test]
fn a_budget_is_never_passed_and_more_of_it_goes_on_from_there() {
    let server = Server::start();
    server.latency(Duration::from_millis(10));
    let client = Client::new();
    // A reply costs 20 * 1 + 10 * 2 = 40 millionths; a request might cost (11 + 96) * 1 + 50 * 2 = 207.
    let budget = |money: f64| endpoint(&server, json!({"price_in": 1.0, "price_out": 2.0, "budget": money}));
    let problem = client.complete(&budget(1000e-6), &questions(100), 50).unwrap_err();
    assert_eq!(problem.code, "remote::budget");
    let paid = server.paid().len();
    assert!(paid as f64 * 40e-6 <= 1000e-6, "{paid}");
    assert!((paid as f64 + 1.0) * 40e-6 + 207e-6 > 1000e-6, "{paid}: it stopped too early");
    // A new process knows what was paid.
    let client = client.again();
    assert_eq!(client.complete(&budget(1000e-6), &questions(100), 50).unwrap_err().code, "remote::budget");
    assert_eq!(server.paid().len(), paid);
    let made = client.complete(&budget(1.0), &questions(100), 50).unwrap();
    assert!(made.iter().all(Result::is_ok));
    assert!(server.paid().values().all(|times| *times == 1));
}

#[test]
fn a_server_that_does_not_say_what_it_charges_is_taken_to_charge_the_most() {
    let server = Server::start();
    server.no_usage();
    let priced = endpoint(&server, json!({"price_in": 1.0, "price_out": 2.0, "budget": 1000e-6}));
    let problem = Client::new().complete(&priced, &questions(100), 50).unwrap_err();
    assert_eq!(problem.code, "remote::budget");
    assert_eq!(server.paid().len(), 4, "207 millionths each");
}

#[test]
fn offline_takes_what_is_there_and_asks_nobody() {
    let server = Server::start();
    let client = Client::new();
    let keyless = endpoint(&server, json!({}));
    client.complete(&keyless, &questions(3), 50).unwrap();
    server.seen();
    let offline = pipe::remote::Remote::new(&client.folder.path().join("journal")).offline(true);
    // Not even a key is needed.
    let keyed = endpoint(&server, json!({"api_key_env": "NO_SUCH_VARIABLE_HERE"}));
    let connection = offline.connection(&keyed).unwrap();
    connection.probe(&std::sync::atomic::AtomicBool::new(false)).unwrap();
    assert_eq!(connection.complete(&asks(&questions(3)), &sampling(50), &mut |_| Ok(())).unwrap().len(), 3);
    let problem = connection.complete(&asks(&questions(4)), &sampling(50), &mut |_| Ok(())).unwrap_err();
    assert_eq!(problem.code, "remote::offline");
    assert!(server.seen().is_empty());
}

#[test]
fn a_key_that_a_server_echoes_reaches_neither_journal_nor_message() {
    let key = std::env::var(crate::KEY_VARIABLE).unwrap();
    let server = Server::start();
    let client = Client::new();
    let echoed = key.clone();
    server.model(move |_| (json!(format!("your key is {echoed}!")), "stop"));
    let keyed = endpoint(&server, json!({"api_key_env": crate::KEY_VARIABLE}));
    let made = client.complete(&keyed, &questions(1), 50).unwrap();
    assert_eq!(made[0].as_ref().unwrap().answer, "your key is [key]!");
    assert_eq!(server.asked()[0].authorization.as_deref(), Some(format!("Bearer {key}").as_str()));
    for entry in std::fs::read_dir(client.folder.path().join("journal")).unwrap() {
        assert!(!std::fs::read_to_string(entry.unwrap().path()).unwrap().contains(&key));
    }
    let words: &'static str = Box::leak(format!("{{\"error\": {{\"message\": \"bad key {key}\"}}}}").into_boxed_str());
    server.fault("", Fault::Status(401, "", words));
    let problem = client.complete(&keyed, &questions(2), 50).unwrap_err();
    assert!(!format!("{problem} {problem:?}").contains(&key), "{problem}");
}
