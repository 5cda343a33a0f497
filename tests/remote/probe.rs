//! What is found out before anything runs.

use crate::server::{Fault, Server};
use crate::{Client, KEY_VARIABLE, endpoint};
use pipe::problem::{Exit, Problem};
use pipe::remote::Endpoint;
use serde_json::json;
use std::sync::atomic::AtomicBool;

fn probe(endpoint: &Endpoint) -> Result<(), Problem> {
    Client::new().remote.connection(endpoint)?.probe(&AtomicBool::new(false))
}

fn missing(endpoint: &Endpoint, code: &str) -> String {
    let problem = probe(endpoint).unwrap_err();
    assert_eq!((problem.code, problem.exit), (code, Exit::Missing), "{problem}");
    problem.to_string()
}

#[test]
fn a_model_that_is_listed_costs_nothing_to_find_and_is_looked_for_once() {
    let server = Server::start();
    let client = Client::new();
    let connection = client.remote.connection(&endpoint(&server, json!({}))).unwrap();
    for _ in 0..3 {
        connection.probe(&AtomicBool::new(false)).unwrap();
    }
    let seen = server.seen();
    assert_eq!(seen.iter().map(|seen| seen.path.as_str()).collect::<Vec<_>>(), ["/v1/models"]);
}

#[test]
fn a_wrong_name_is_answered_with_names_that_are_like_it() {
    let server = Server::start();
    server.fault("", Fault::Status(404, "", "{\"error\": {\"message\": \"no such model\"}}"));
    let text = missing(&endpoint(&server, json!({"model": "teacher-larg"})), "remote::unknown_model");
    assert!(text.contains("models of similar name: `teacher-large`, `teacher-small`"), "{text}");
    server.fault("", Fault::Status(400, "", "{\"error\": {\"message\": \"no such model\"}}"));
    let text = missing(&endpoint(&server, json!({"model": "zzz"})), "remote::unknown_model");
    assert!(text.contains("it has `other`, `teacher-large`, `teacher-small`"), "{text}");
}

#[test]
fn a_name_that_is_not_listed_may_be_known_all_the_same() {
    let server = Server::start();
    probe(&endpoint(&server, json!({"model": "alias"}))).unwrap();
    assert_eq!(server.asked()[0].body["max_tokens"], 1);
    // And a server without a list is asked for one token.
    server.models(None);
    probe(&endpoint(&server, json!({"max_tokens_key": "max_completion_tokens"}))).unwrap();
    assert_eq!(server.asked()[0].body["max_completion_tokens"], 1);
}

#[test]
fn a_bad_key_names_its_variable_and_not_itself() {
    let server = Server::start();
    server.models(None);
    server.fault("", Fault::Status(401, "", "{\"error\": {\"message\": \"invalid key\"}}"));
    let text = missing(&endpoint(&server, json!({"api_key_env": KEY_VARIABLE})), "remote::bad_key");
    assert!(text.contains(KEY_VARIABLE) && !text.contains(&std::env::var(KEY_VARIABLE).unwrap()), "{text}");
    server.fault("", Fault::Status(401, "", "no"));
    let text = missing(&endpoint(&server, json!({})), "remote::no_key");
    assert!(text.contains("api_key_env"), "{text}");
    let text = missing(&endpoint(&server, json!({"api_key_env": "NO_SUCH_VARIABLE_HERE"})), "remote::no_key");
    assert!(text.contains("`NO_SUCH_VARIABLE_HERE` is not set"), "{text}");
}

#[test]
fn a_list_that_anybody_may_read_proves_no_key() {
    let server = Server::start();
    server.fault("", Fault::Status(401, "", "{\"error\": {\"message\": \"invalid key\"}}"));
    missing(&endpoint(&server, json!({"api_key_env": KEY_VARIABLE})), "remote::bad_key");
    assert_eq!(server.faults_left(), 0);
    server.guard_list(true);
    server.seen();
    probe(&endpoint(&server, json!({"api_key_env": KEY_VARIABLE}))).unwrap();
    assert_eq!(server.asked().len(), 0, "a list for those with a key costs nothing and tells enough");
}

#[test]
fn a_server_that_is_not_there_is_said_to_be_so() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = Server::start();
    let text = missing(&endpoint(&server, json!({"url": format!("http://{closed}/v1")})), "remote::unreachable");
    assert!(text.contains(&closed.to_string()), "{text}");
    let text = missing(&endpoint(&server, json!({"url": "http://no-such-host.invalid/v1"})), "remote::unreachable");
    assert!(text.contains("no-such-host.invalid"), "{text}");
}

#[test]
fn a_busy_server_is_a_server() {
    let server = Server::start();
    server.models(None);
    server.fault("", Fault::Status(429, "", "busy"));
    probe(&endpoint(&server, json!({}))).unwrap();
}
