use crate::{Bench, resolved};
use pipe::problem::Exit;
use pipe::stage::generate::{KIND, run};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn records(n: usize) -> Vec<Value> {
    (0..n)
        .map(|i| json!({"id": format!("r{i}"), "question": format!("Eva has {i} pens. How many?"), "level": i}))
        .collect()
}

fn params(given: Value) -> Value {
    resolved(&KIND, given)
}

#[test]
fn every_record_gets_a_completion_under_its_own_id() {
    let bench = Bench::with_model("data", &records(3));
    bench.run(run, params(json!({"max_tokens": 6, "keep": ["level"], "rename": {"grade": "level"}}))).unwrap();
    let lines = bench.lines("data.jsonl");
    let ids: Vec<&Value> = lines.iter().map(|line| &line["id"]).collect();
    assert_eq!(ids, ["r0", "r1", "r2"]);
    assert_eq!(lines[2]["grade"], 2);
    assert!(lines[2].get("question").is_none() && lines[2]["completion"].is_string());
    assert_eq!(bench.output("failed.jsonl"), "");
}

#[test]
fn samples_of_a_record_are_numbered_and_differ() {
    let bench = Bench::with_model("data", &records(1));
    bench
        .run(run, params(json!({"max_tokens": 12, "n": 3, "temperature": 1.0, "prompt": "{{ question }} {{ level }}"})))
        .unwrap();
    let lines = bench.lines("data.jsonl");
    assert_eq!(lines.iter().map(|l| l["id"].as_str().unwrap()).collect::<Vec<_>>(), ["r0#0", "r0#1", "r0#2"]);
    assert_ne!(lines[0]["completion"], lines[1]["completion"]);
}

#[test]
fn a_record_is_completed_the_same_in_any_company_and_batch() {
    let sampled = json!({"max_tokens": 12, "temperature": 1.0});
    let all = Bench::with_model("data", &records(5));
    all.run(run, params(sampled.clone())).unwrap();
    let alone = Bench::with_model("data", &records(5)[3..4]);
    alone.run(run, params(sampled.clone())).unwrap();
    assert_eq!(all.lines("data.jsonl")[3], alone.lines("data.jsonl")[0]);
    let small = Bench::with_model("data", &records(5));
    let mut one_by_one = sampled;
    one_by_one["batch"] = json!(1);
    small.run(run, params(one_by_one)).unwrap();
    assert_eq!(all.output("data.jsonl"), small.output("data.jsonl"));
}

#[test]
fn an_interrupted_run_goes_on_where_it_was_and_ends_with_the_same_bytes() {
    let given = json!({"max_tokens": 12, "temperature": 1.0, "batch": 2});
    let whole = Bench::with_model("data", &records(6));
    whole.run(run, params(given.clone())).unwrap();

    let bench = Bench::with_model("data", &records(6));
    bench.stop_at.store(3, Ordering::Relaxed);
    let problem = bench.run(run, params(given.clone())).unwrap_err();
    assert_eq!(problem.exit, Exit::Interrupted);
    let journal = bench.path("work/journal.jsonl");
    let made = std::fs::read_to_string(&journal).unwrap();
    let kept = made.lines().filter(|line| !line.is_empty()).count();
    assert!((2..6).contains(&kept), "{kept} completions were journalled");
    // A kill may cut the last line.
    std::fs::write(&journal, format!("{made}{{\"key\":\"00")).unwrap();

    bench.stop_at.store(0, Ordering::Relaxed);
    bench.stop.store(false, Ordering::Relaxed);
    bench.run(run, params(given)).unwrap();
    assert_eq!(bench.output("data.jsonl"), whole.output("data.jsonl"));
    let journal = std::fs::read_to_string(&journal).unwrap();
    let complete = journal.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
    assert_eq!(complete, 6, "nothing was made twice");
    assert!(journal.starts_with(&made), "what was journalled stays");
}

#[test]
fn what_does_not_parse_fails_the_stage_or_is_listed() {
    let bench = Bench::with_model("data", &records(2));
    let mut given = json!({"max_tokens": 4, "parse": {"kind": "think-answer"}});
    let problem = bench.run(run, params(given.clone())).unwrap_err();
    assert_eq!(problem.code, "generate::parse");
    assert!(problem.notes[0].contains("`r0`"), "{problem}");
    // Nothing left is an error even where dropping is allowed.
    given["on_parse_failure"] = json!("drop");
    assert_eq!(bench.run(run, params(given)).unwrap_err().code, "generate::parse");
}

#[test]
fn dropped_completions_are_listed_with_their_text() {
    let bench = Bench::with_model("data", &records(12));
    // A completion of three tokens is cut off unless a stop text ends it first.
    let parse = json!({"kind": "regex", "pattern": "^=(?s)(.*)", "fields": {"answer": "1"}});
    let given = json!({
        "max_tokens": 3, "format": "text", "temperature": 2.0, "parse": parse, "on_parse_failure": "drop", "stop": ["e", "a", "o", " "],
        "prefill": "=",
    });
    bench.run(run, params(given)).unwrap_or_else(|problem| panic!("{problem}"));
    let (kept, failed) = (bench.lines("data.jsonl"), bench.lines("failed.jsonl"));
    assert_eq!(kept.len() + failed.len(), 12);
    assert!(!failed.is_empty(), "the stop texts end some at once, the limit cuts others");
    for line in &failed {
        assert!(line["reason"].is_string() && line["completion"].as_str().unwrap().starts_with('='));
    }
    assert!(bench.warnings.lock().unwrap().iter().any(|text| text.contains("failed.jsonl")));
}

#[test]
fn a_template_that_names_a_field_no_record_has_names_the_records() {
    let bench = Bench::with_model("data", &records(2));
    let problem = bench.run(run, params(json!({"max_tokens": 4, "prompt": "{{ solution }}"}))).unwrap_err();
    assert_eq!(problem.code, "generate::record");
    assert!(problem.to_string().contains("line 1 (id `r0`)") && problem.to_string().contains("question"), "{problem}");
}

#[test]
fn max_tokens_above_the_context_is_found_before_decoding() {
    let bench = Bench::with_model("data", &records(1));
    let problem = bench.run(run, params(json!({"max_tokens": 100_000}))).unwrap_err();
    assert_eq!(problem.code, "generate::context");
    assert!(problem.help[0].starts_with("`max_tokens = "), "{problem}");
}

#[test]
fn prompts_come_from_a_file_too_and_systems_are_templates() {
    let mut bench = Bench::with_model("data", &records(1));
    let file = bench.write("ask.txt", "Turn round: {{ question }}\n");
    bench.sources.insert("prompt_file".into(), file);
    bench
        .run(run, params(json!({"max_tokens": 4, "prompt_file": "path:ask.txt", "system": "Level {{ level }}."})))
        .unwrap();
    let by_file = bench.output("data.jsonl");
    let inline = Bench::with_model("data", &records(1));
    inline
        .run(run, params(json!({"max_tokens": 4, "prompt": "Turn round: {{ question }}", "system": "Level 0."})))
        .unwrap();
    assert_eq!(by_file, inline.output("data.jsonl"));
}
