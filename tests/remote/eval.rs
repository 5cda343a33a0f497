//! Answers by an endpoint, graded: thinking, silence, and what no grader should choke on.

use crate::server::{Fault, Server, question};
use crate::study::Study;
use serde_json::{Value, json};

fn study(server: &Server, golds: &[&str], more: &str) -> Study {
    let text = format!(
        r#"manifest = 1

[endpoint.solver]
url = "{}"
model = "teacher-large"
max_concurrency = 1
price_in = 1.0
price_out = 2.0

[stage.task]
kind = "dataset"
source = "path:questions.jsonl"

[stage.scores]
kind = "eval"
endpoint = "solver"
task = "task"
system = "Box it."
max_tokens = 50
{more}
"#,
        server.url
    );
    let record =
        |(i, gold): (usize, &&str)| json!({"id": format!("p{i}"), "problem": format!("problem {i}."), "answer": gold});
    Study::of(&text, &golds.iter().enumerate().map(record).collect::<Vec<_>>())
}

fn scores(study: &Study) -> Value {
    serde_json::from_str(&study.exported("scores", "scores.json")).unwrap()
}

#[test]
fn an_answer_is_graded_behind_its_thinking_wherever_the_server_puts_that() {
    let server = Server::start();
    server.model(|body| {
        let said = match question(body) {
            "problem 0." => json!("\\boxed{7}"),
            "problem 1." => json!({"content": "It is \\boxed{7}.", "reasoning_content": "\\boxed{8}?"}),
            "problem 2." => json!("<think>\\boxed{7}</think>\\boxed{8}"),
            "problem 3." => return (json!({"content": "", "reasoning_content": "so \\boxed{7}"}), "length"),
            _ => return (json!({"content": null}), "content_filter"),
        };
        (said, "stop")
    });
    let study = study(&server, &["7"; 5], "");
    study.ok(&[]);
    let asked = server.asked();
    assert_eq!(
        asked[0].body["messages"],
        json!([{"role": "system", "content": "Box it."}, {"role": "user", "content": "problem 0."}])
    );
    let lines = study.lines("scores", "transcripts.jsonl");
    let verdicts: Vec<&str> = lines.iter().map(|line| line["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["correct", "correct", "wrong", "wrong", "wrong"]);
    let finishes: Vec<&str> = lines.iter().map(|line| line["finish"].as_str().unwrap()).collect();
    assert_eq!(finishes, ["stop", "stop", "stop", "length", "content_filter"]);
    assert_eq!(
        (&lines[2]["extracted"], &lines[3]["extracted"], &lines[0]["tokens"]),
        (&json!("8"), &Value::Null, &json!(10))
    );
    assert_eq!(lines[0]["prompt"], "system: Box it.\n\nuser: problem 0.");
    let scores = scores(&study);
    assert_eq!((&scores["truncated"], &scores["unparsed"], &scores["missing"]), (&json!(1), &json!(2), &json!(0)));
    let usage: Value = serde_json::from_str(&study.exported("scores", "usage.json")).unwrap();
    assert_eq!((&usage["requests"], &usage["cost"], usage.get("judge")), (&json!(5), &json!(200e-6), None));
    // Nothing is paid for twice, and with the replies that are kept nobody need be there.
    study.forget();
    study.ok(&["--offline"]);
    assert!(server.asked().is_empty());
}

#[test]
fn an_answer_that_does_not_come_fails_the_stage_or_is_counted_as_wrong() {
    let server = Server::start();
    server.model(|_| (json!("\\boxed{7}"), "stop"));
    let study = study(&server, &["7"; 3], "n = 2\ntemperature = 1.0");
    let refuse = || server.fault("problem 2", Fault::Status(400, "", "{\"error\": {\"message\": \"too long\"}}"));
    refuse();
    let said = study.fails(1, &[]);
    assert!(said.contains("eval::missing") && said.contains("1 of 6 answers are missing"), "{said}");
    assert!(said.contains("sample 0 of `p2`") && said.contains("too long"), "{said}");
    assert_eq!(server.asked().len(), 6);
    refuse();
    study.ok(&["--set", "stage.scores.on_missing=wrong"]);
    assert_eq!(server.asked().len(), 1, "the others are kept");
    let text = std::fs::read_to_string(study.path("m.toml")).unwrap();
    std::fs::write(study.path("m.toml"), text + "on_missing = \"wrong\"\n").unwrap();
    let line = &study.lines("scores", "transcripts.jsonl")[4];
    assert_eq!((&line["finish"], &line["verdict"], &line["tokens"]), (&json!("none"), &json!("wrong"), &Value::Null));
    let scores = scores(&study);
    assert_eq!((&scores["missing"], &scores["correct"], &scores["total"]), (&json!(1), &json!(5), &json!(6)));
    assert_eq!(scores["mean_tokens"], json!(10.0), "of those that came");
}

#[test]
fn hostile_answers_are_graded_and_none_is_credited() {
    let nested = |levels: usize| format!("\\boxed{{{}1{}}}", "\\frac{1}{1+".repeat(levels), "}".repeat(levels));
    let answers = [
        nested(300),
        "\\boxed{9^{9^{9}}}".to_string(),
        "\\boxed{}".to_string(),
        format!("\\boxed{{{}}}", "9".repeat(50_000)),
        format!("\\boxed{{{}", "{".repeat(5000)),
        "The answer is 7. I mean 8.\nSo 7? No: \\boxed{8}.".to_string(),
        "\\boxed{7}".repeat(3) + "\\boxed{8}",
        "\u{0}\u{202e}\\boxed{8}\u{feff}".to_string(),
    ];
    let server = Server::start();
    let said = answers.clone();
    server.model(move |body| {
        let at: usize = question(body).trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
        (json!(said[at]), "stop")
    });
    for grader in ["auto", "s1"] {
        let study = study(&server, &["7"; 8], &format!("grader = \"{grader}\""));
        let begun = std::time::Instant::now();
        study.ok(&[]);
        assert!(begun.elapsed().as_secs() < 30, "{:?}", begun.elapsed());
        let lines = study.lines("scores", "transcripts.jsonl");
        assert!(lines.iter().all(|line| line["verdict"] != "correct"), "{lines:?}");
        assert_eq!(lines.iter().map(|line| line["completion"].as_str().unwrap()).collect::<Vec<_>>(), answers);
    }
}

#[test]
fn a_missing_answer_is_no_choice_of_a_even_to_s1() {
    let server = Server::start();
    server.model(|_| (json!("Answer: B"), "stop"));
    let study = study(&server, &["B", "A"], "grader = \"s1\"\non_missing = \"wrong\"");
    server.fault("problem 1", Fault::Status(400, "", "{}"));
    study.ok(&[]);
    let line = &study.lines("scores", "transcripts.jsonl")[1];
    assert_eq!((&line["verdict"], &line["rule"]), (&json!("wrong"), &json!("no reply")));
    assert_eq!((&scores(&study)["correct"], &scores(&study)["missing"]), (&json!(1), &json!(1)));
}
