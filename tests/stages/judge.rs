//! A judge on this machine: a small random model, which never says what a judge has to say.

use crate::{Bench, resolved};
use pipe::plan::Axes;
use pipe::stage::Artifact;
use pipe::stage::eval::{KIND, run};
use serde_json::{Value, json};

const UNDECIDED: &str = "24\\ldots";

fn bench() -> Bench {
    let task =
        [json!({"id": "p0", "problem": "4!", "answer": "24"}), json!({"id": "p1", "problem": "x", "answer": "y"})];
    let mut bench = Bench::with_model("task", &task);
    let files = bench.inputs["model"][0].files.clone();
    let artifact = Artifact { stage: "judge".into(), kind: "model", axes: Axes::default(), files };
    bench.inputs.insert("judge.model".into(), vec![artifact]);
    bench
}

fn params(judge: Value) -> Value {
    let prefill = format!("\\boxed{{{UNDECIDED}}}\n");
    resolved(&KIND, json!({"max_tokens": 2, "prefill": prefill, "limit": 1, "judge": judge}))
}

#[test]
fn a_judge_that_babbles_credits_nothing() {
    let bench = bench();
    let prompt = "{{ gold }}? {{ answer }}";
    bench.run(run, params(json!({"max_tokens": 6, "prompt": prompt}))).unwrap();
    let scores: Value = serde_json::from_str(&bench.output("scores.json")).unwrap();
    assert_eq!((&scores["correct"], &scores["undecided"], &scores["judged"]), (&json!(0), &json!(1), &json!(0)));
    assert_eq!((&scores["judge_unread"], &scores["undecided_as_right"]), (&json!(1), &json!(100.0)));
    let judgement = &bench.lines("judgements.jsonl")[0];
    assert_eq!((&judgement["verdict"], &judgement["extracted"]), (&Value::Null, &json!(UNDECIDED)));
    assert!(judgement["reply"].is_string() && judgement["why_none"].is_string() && judgement["attempts"] == 1);
    assert_eq!(bench.lines("transcripts.jsonl")[0]["verdict"], "undecided");
    assert!(bench.warnings.lock().unwrap().iter().any(|text| text.contains("judgements.jsonl")));
    assert!(!bench.outputs().contains(&"usage.json".to_string()), "nobody was paid");
    // What was judged is in a journal of its own.
    let judged = std::fs::read_to_string(bench.path("work/journal-judge.model.jsonl")).unwrap();
    assert_eq!(judged.lines().filter(|line| !line.is_empty()).count(), 1);
    let before = bench.output("judgements.jsonl");
    bench.run(run, params(json!({"max_tokens": 6, "prompt": prompt}))).unwrap();
    assert_eq!(std::fs::read_to_string(bench.path("work/journal-judge.model.jsonl")).unwrap(), judged);
    assert_eq!(bench.output("judgements.jsonl"), before);
}

#[test]
fn a_judges_prompt_that_cannot_be_made_is_found_before_the_model_answers() {
    let bench = bench();
    let problem = bench.run(run, params(json!({"max_tokens": 6, "prompt": "{{ attempt }}"}))).unwrap_err();
    assert_eq!(problem.code, "eval::judge_prompt");
    assert!(problem.to_string().contains("the record has"), "{problem}");
    assert!(!bench.path("work/journal.jsonl").exists());
    let broken = (KIND.rules)(params(json!({"prompt": "{{ answer"})).as_object().unwrap());
    assert_eq!(broken[0].key, "judge.prompt");
    let mut as_s1 = params(json!({"ask": "all"}));
    as_s1["grader"] = json!("s1");
    assert_eq!((KIND.rules)(as_s1.as_object().unwrap())[0].key, "judge.ask");
}

#[test]
fn whoever_is_not_to_be_asked_is_not() {
    let bench = bench();
    bench.run(run, params(json!({"ask": "none"}))).unwrap();
    assert!(!bench.outputs().contains(&"judgements.jsonl".to_string()));
    let scores: Value = serde_json::from_str(&bench.output("scores.json")).unwrap();
    assert_eq!((&scores["accuracy"], &scores["undecided_as_right"]), (&json!(0.0), &json!(100.0)));
    assert!(scores.get("judged").is_none());
}
