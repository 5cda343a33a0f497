//! Thinking within a budget, by a small random model: it rarely ends by itself.

use crate::{Bench, resolved};
use pipe::stage::{eval, generate};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn problems(count: usize) -> Vec<Value> {
    (0..count).map(|i| json!({"id": format!("p{i}"), "problem": format!("Eva has {i} pens."), "answer": "7"})).collect()
}

fn params(thinking: Value, more: Value) -> Value {
    let mut given = json!({"max_tokens": 5, "temperature": 1.0, "thinking": thinking});
    given.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    resolved(&eval::KIND, given)
}

fn scores(bench: &Bench) -> Value {
    serde_json::from_str(&bench.output("scores.json")).unwrap()
}

/// Texts that a random model comes across soon.
fn soon() -> Value {
    json!(["a", "e", "i", "o", "n", "t", "s", "r"])
}

#[test]
fn a_budget_that_runs_out_ends_the_thinking_and_asks_for_the_answer() {
    let bench = Bench::with_model("task", &problems(3));
    let cue = "\nFinal Answer: \\boxed{7}\n";
    bench.run(eval::run, params(json!({"max_tokens": 6, "final": cue}), json!({"format": "s1"}))).unwrap();
    for line in bench.lines("transcripts.jsonl") {
        let text = line["completion"].as_str().unwrap();
        assert!(text.contains(&format!("<|im_start|>answer{cue}")), "{text}");
        assert_eq!(line["thinking"], json!({"tokens": 6, "continued": 0, "forced": true}));
        assert_eq!((&line["verdict"], &line["extracted"]), (&json!("correct"), &json!("7")));
        assert!(line["tokens"].as_u64().unwrap() > 6 + 5, "what was put between counts");
        assert!(line["prompt"].as_str().unwrap().ends_with("<|im_start|>think\n"));
    }
    let scores = scores(&bench);
    assert_eq!((&scores["mean_thinking_tokens"], &scores["thinking_forced"]), (&json!(6.0), &json!(3)));
}

#[test]
fn thinking_between_tags_is_opened_and_closed_and_no_answer_itself() {
    let bench = Bench::with_model("task", &problems(2));
    bench.run(eval::run, params(json!({"max_tokens": 6}), json!({"prefill": "<think>\n\\boxed{7}\n"}))).unwrap();
    let lines = bench.lines("transcripts.jsonl");
    assert!(lines.iter().all(|line| line["completion"].as_str().unwrap().contains("\n</think>\n\nFinal Answer:")));
    assert!(lines.iter().all(|line| line["verdict"] != "correct"), "what is boxed while thinking does not count");
    bench.run(eval::run, params(json!({"max_tokens": 6}), json!({}))).unwrap();
    assert!(bench.lines("transcripts.jsonl")[0]["prompt"].as_str().unwrap().ends_with("<think>\n"));
}

#[test]
fn thinking_that_ends_is_answered_at_once_or_made_to_go_on() {
    let bench = Bench::with_model("task", &problems(4));
    let thinking = json!({"max_tokens": 60, "stop": soon()});
    bench.run(eval::run, params(thinking.clone(), json!({}))).unwrap();
    let first = bench.lines("transcripts.jsonl");
    for line in &first {
        let text = line["completion"].as_str().unwrap();
        assert_eq!((&line["thinking"]["forced"], &line["thinking"]["continued"]), (&json!(false), &json!(0)), "{text}");
        let (thought, _) = text.split_once("</think>").unwrap();
        assert!(
            !thought.contains(['a', 'e', 'i', 'o', 'n', 't', 's', 'r']) && !text.contains("Final Answer"),
            "{text}"
        );
        assert!(line["thinking"]["tokens"].as_u64().unwrap() < 60);
    }
    let mut going_on = thinking;
    going_on["ignore_end"] = json!(3);
    going_on["wait"] = json!(" Hmm ");
    bench.run(eval::run, params(going_on, json!({}))).unwrap();
    for (before, line) in first.iter().zip(bench.lines("transcripts.jsonl")) {
        let text = line["completion"].as_str().unwrap();
        let (begun, _) = before["completion"].as_str().unwrap().split_once("</think>").unwrap();
        assert!(text.starts_with(&format!("{begun} Hmm ")), "{text}");
        assert_eq!(line["thinking"]["continued"], text.matches(" Hmm ").count());
        assert!(line["thinking"]["tokens"].as_u64().unwrap() <= 60);
    }
    assert!(scores(&bench)["thinking_continued"].as_u64().unwrap() >= 8);
}

#[test]
fn a_budget_is_its_records_own_whatever_else_is_asked() {
    let mut records = problems(5);
    for (i, record) in records.iter_mut().enumerate() {
        if i != 2 {
            record["tokens"] = json!(4 * i);
        }
    }
    let thinking = json!({"max_tokens": 9, "field": "tokens", "ignore_end": 2, "stop": ["e", "a"]});
    let run = |records: &[Value], batch: usize| {
        let bench = Bench::with_model("task", records);
        bench.run(eval::run, params(thinking.clone(), json!({"batch": batch}))).unwrap();
        bench.lines("transcripts.jsonl")
    };
    let together = run(&records, 128);
    for (i, line) in together.iter().enumerate() {
        let budget = if i == 2 { 9 } else { 4 * i as u64 };
        let (tokens, forced) = (line["thinking"]["tokens"].as_u64().unwrap(), &line["thinking"]["forced"]);
        assert!(tokens <= budget && (*forced == json!(false) || tokens == budget), "{line}");
        assert_eq!(run(&records[i..=i], 1)[0], *line);
    }
    assert_eq!(together[0]["thinking"], json!({"tokens": 0, "continued": 0, "forced": true}));
    assert_eq!(run(&records, 2), together);
    records[1]["tokens"] = json!("many");
    let bench = Bench::with_model("task", &records);
    let problem = bench.run(eval::run, params(thinking.clone(), json!({}))).unwrap_err();
    assert!(problem.to_string().contains("line 2 (id `p1`): `tokens` is no number of tokens"), "{problem}");
}

#[test]
fn an_interruption_at_any_time_loses_no_turn_and_changes_no_byte() {
    let thinking = json!({"max_tokens": 12, "ignore_end": 1, "stop": ["e", "a"]});
    let given = params(thinking, json!({"batch": 2, "n": 2}));
    let bench = Bench::with_model("task", &problems(3));
    bench.run(eval::run, given.clone()).unwrap();
    let whole = (bench.output("scores.json"), bench.output("transcripts.jsonl"));
    let journal = |bench: &Bench| std::fs::read_to_string(bench.path("work/journal.jsonl")).unwrap_or_default();
    let turns = journal(&bench).lines().filter(|line| !line.is_empty()).count();
    assert!(turns >= 12, "two turns a sample at least: {turns}");
    let again = Bench::with_model("task", &problems(3));
    let mut interrupted = 0;
    for at in [1, 3, 5, 6, 0] {
        again.stop_at.store(at, Ordering::Relaxed);
        again.stop.store(false, Ordering::Relaxed);
        interrupted += usize::from(again.run(eval::run, given.clone()).is_err());
    }
    assert!(interrupted >= 3, "{interrupted}");
    assert_eq!(whole, (again.output("scores.json"), again.output("transcripts.jsonl")));
    let mut kept: Vec<String> = journal(&again).lines().filter(|line| !line.is_empty()).map(String::from).collect();
    kept.sort_unstable();
    kept.dedup();
    assert_eq!(kept.len(), turns, "nothing was made that the whole run did not make");
}

#[test]
fn both_limits_have_to_fit_the_context() {
    let bench = Bench::with_model("task", &problems(1));
    let problem = bench.run(eval::run, params(json!({"max_tokens": 400}), json!({"max_tokens": 200}))).unwrap_err();
    assert_eq!(problem.code, "generate::context");
    let text = problem.to_string();
    assert!(text.contains("`thinking.max_tokens` 400 and `max_tokens` 200 do not fit"), "{text}");
    let fits: usize = problem.help[0].trim_matches('`').trim_start_matches("max_tokens = ").parse().unwrap();
    let with = |max_tokens: usize| params(json!({"max_tokens": 400}), json!({"max_tokens": max_tokens}));
    assert_eq!(bench.run(eval::run, with(fits + 1)).unwrap_err().code, "generate::context");
    bench.run(eval::run, with(fits)).unwrap();
    assert!((eval::KIND.rules)(params(json!({"max_tokens": 1, "end": ""}), json!({})).as_object().unwrap()).len() == 1);
}

#[test]
fn generated_thinking_and_answer_come_apart_in_both_layouts() {
    let bench = Bench::with_model("data", &problems(2));
    for format in ["s1", "chat"] {
        let given = json!({"max_tokens": 60, "stop": soon(), "format": format, "temperature": 1.0,
            "token_ids": "ids", "thinking": {"max_tokens": 7}, "parse": {"kind": "think-answer"}});
        bench.run(generate::run, resolved(&generate::KIND, given)).unwrap();
        for line in bench.lines("data.jsonl") {
            let (thinking, answer) = (line["thinking"].as_str().unwrap(), line["answer"].as_str().unwrap());
            assert!(answer.starts_with("Final Answer:") && !thinking.is_empty(), "{line}");
            assert!(line["ids"].as_array().unwrap().len() >= 7 + 3);
        }
    }
}
