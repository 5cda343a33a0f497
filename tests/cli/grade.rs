//! `pipe grade`: verdicts on files of responses.

use super::Project;

const CASES: &str = r#"{"id": "half", "kind": "math", "gold": "0.5", "response": "So it is \\boxed{\\frac{1}{2}}.", "correct": true, "set": "a"}
{"id": "letter", "kind": "choice", "gold": "B", "response": "The answer is (C).", "correct": false, "set": "a"}
{"id": "tower", "gold": "\\pi^{\\pi^{\\pi}}", "response": "\\boxed{\\pi^{\\pi^{\\pi+0}}}", "correct": true, "set": "b"}
{"id": "none", "gold": "12", "response": "<think>I never got there", "correct": false, "set": "b"}
"#;

fn project() -> Project {
    let project = Project::new();
    project.write("cases.jsonl", CASES);
    project
}

#[test]
fn every_response_gets_a_verdict_and_the_rules_that_made_it() {
    let stdout = project().stdout(&["grade", "cases.jsonl", "--json"]);
    let lines: Vec<serde_json::Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let verdict = |at: usize| (lines[at]["id"].as_str().unwrap(), lines[at]["verdict"].as_str().unwrap());
    assert_eq!(verdict(0), ("half", "correct"));
    assert_eq!(verdict(1), ("letter", "wrong"));
    assert_eq!(verdict(3), ("none", "wrong"));
    assert_eq!((&lines[0]["extracted"], &lines[0]["found"]), (&r"\frac{1}{2}".into(), &"box".into()));
    assert!(lines.iter().all(|line| line["rule"].is_string()));
    assert!(lines[3]["extracted"].is_null());
}

#[test]
fn labelled_records_give_a_table_of_agreement() {
    let summary = project().stdout(&["grade", "cases.jsonl", "--summary", "--by", "set"]);
    insta::assert_snapshot!(summary);
    let json = project().json(&["grade", "cases.jsonl", "--summary", "--json"]);
    assert_eq!(json["total"], 4);
    assert_eq!(json["labelled"]["false_positives"], 0);
}

#[test]
fn only_the_verdicts_asked_for_are_listed_and_s1_counts_text() {
    let wrong = project().stdout(&["grade", "cases.jsonl", "--only", "wrong"]);
    assert!(wrong.contains("letter") && wrong.contains("none") && !wrong.contains("half"), "{wrong}");
    let s1 = project().stdout(&["grade", "cases.jsonl", "--grader", "s1", "--json"]);
    assert!(s1.lines().next().unwrap().contains(r#""verdict":"wrong""#), "{s1}");
}

#[test]
fn records_that_cannot_be_graded_are_named_at_once() {
    let project = Project::new();
    project.write(
        "cases.jsonl",
        "{\"gold\": \"1\", \"response\": \"1\", \"kind\": \"essay\"}\n{\"response\": \"2\"}\n{\"gold\": 3, \"response\": [3]}\n",
    );
    assert_eq!(project.code(&["grade", "cases.jsonl"]), Some(1));
    insta::assert_snapshot!(project.stderr(&["grade", "cases.jsonl"]));
}
