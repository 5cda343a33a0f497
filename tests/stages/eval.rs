use crate::{Bench, resolved};
use pipe::stage::eval::{KIND, run};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn params(given: Value) -> Value {
    resolved(&KIND, given)
}

/// The answer is put into the model's mouth, so that the score is known.
fn says(answer: &str) -> Value {
    params(json!({"max_tokens": 4, "prefill": format!("\\boxed{{{answer}}}\n")}))
}

fn scores(bench: &Bench) -> Value {
    serde_json::from_str(&bench.output("scores.json")).unwrap()
}

fn problems(golds: &[&str]) -> Vec<Value> {
    golds
        .iter()
        .enumerate()
        .map(|(i, gold)| json!({"id": format!("p{i}"), "problem": format!("Eva has {i} pens."), "answer": gold}))
        .collect()
}

#[test]
fn answers_are_graded_by_value_and_counted() {
    let bench = Bench::with_model("task", &problems(&["7", "\\frac{14}{2}", "8", "7.0"]));
    bench.run(run, says("7")).unwrap();
    let scores = scores(&bench);
    assert_eq!((scores["correct"].as_u64(), scores["total"].as_u64()), (Some(3), Some(4)));
    assert!((scores["accuracy"].as_f64().unwrap() - 75.0).abs() <= 1e-12);
    let (low, high) = (scores["ci_low"].as_f64().unwrap(), scores["ci_high"].as_f64().unwrap());
    assert!(low > 29.0 && low < 31.0 && high > 95.0 && high < 96.0, "{low} {high}");
    let lines = bench.lines("transcripts.jsonl");
    assert_eq!(lines[1]["verdict"], "correct");
    assert_eq!(lines[2]["verdict"], "wrong");
    assert_eq!(lines[1]["extracted"], "7");
    assert_eq!((lines[1]["found"].as_str(), lines[1]["rule"].as_str()), (Some("box"), Some("exact")));
    assert!(lines[0]["prompt"].as_str().unwrap().contains("Eva has 0 pens."));
    for field in ["id", "completion", "gold", "tokens", "finish", "sample"] {
        assert!(lines[0].get(field).is_some(), "{field}");
    }
}

#[test]
fn choices_are_lettered_in_an_order_that_depends_on_record_and_seed_only() {
    let record = |i: usize| json!({"id": format!("c{i}"), "question": "Which?", "choices": ["red", "green", "blue", "grey"], "answer": "blue"});
    let records: Vec<Value> = (0..16).map(record).collect();
    let bench = Bench::with_model("task", &records);
    bench.run(run, says("B")).unwrap();
    let lines = bench.lines("transcripts.jsonl");
    for line in &lines {
        let order: Vec<usize> = serde_json::from_value(line["order"].clone()).unwrap();
        let at = order.iter().position(|&choice| choice == 2).unwrap();
        assert_eq!(line["gold"], ["A", "B", "C", "D"][at], "the right choice moved with its letter");
        assert!(line["prompt"].as_str().unwrap().contains(&format!("{}) blue", ["A", "B", "C", "D"][at])));
        assert_eq!(line["verdict"] == "correct", at == 1);
    }
    let letters: std::collections::BTreeSet<&str> = lines.iter().map(|line| line["gold"].as_str().unwrap()).collect();
    assert_eq!(letters.len(), 4, "every letter is right somewhere");
    // Alone, a record keeps its order.
    let alone = Bench::with_model("task", &records[5..6]);
    alone.run(run, says("B")).unwrap();
    assert_eq!(alone.lines("transcripts.jsonl")[0]["order"], lines[5]["order"]);
}

#[test]
fn choices_in_columns_have_the_right_one_first() {
    let record = json!({"id": "g", "Question": "Which?", "Correct Answer": "red ", "Incorrect Answer 1": "green"});
    let bench = Bench::with_model("task", &[record]);
    let mut given = says("A");
    given["choices"] = json!(["Correct Answer", "Incorrect Answer 1"]);
    given["shuffle_choices"] = json!(false);
    bench.run(run, given).unwrap();
    assert_eq!(scores(&bench)["correct"], 1);
    assert!(bench.lines("transcripts.jsonl")[0]["prompt"].as_str().unwrap().contains("Which?\n\nA) red\nB) green"));
}

#[test]
fn a_lettered_answer_is_a_choice_and_silence_never_scores() {
    let bench = Bench::with_model("task", &problems(&["A", "A"]));
    bench.run(run, says("")).unwrap();
    let silent = scores(&bench);
    assert_eq!((silent["correct"].as_u64(), silent["unparsed"].as_u64()), (Some(0), Some(2)));
    bench.run(run, says("A")).unwrap();
    assert_eq!(scores(&bench)["correct"], 2);
}

#[test]
fn thinking_that_was_cut_off_is_truncated_and_no_answer() {
    let bench = Bench::with_model("task", &problems(&["7"]));
    bench
        .run(run, params(json!({"max_tokens": 4, "format": "s1", "prefill": "<|im_start|>think\n\\boxed{7}"})))
        .unwrap();
    let scores = scores(&bench);
    assert_eq!((scores["correct"].as_u64(), scores["unparsed"].as_u64()), (Some(0), Some(1)));
    assert_eq!(scores["truncated"], u64::from(bench.lines("transcripts.jsonl")[0]["finish"] == "length"));
}

#[test]
fn bad_problems_are_named_before_anything_is_decoded() {
    let mut records = problems(&["7", "\\frac{1}{", "8"]);
    records[2].as_object_mut().unwrap().remove("answer");
    let bench = Bench::with_model("task", &records);
    let text = bench.run(run, says("7")).unwrap_err().to_string();
    assert!(
        text.contains("line 2 (id `p1`)") && text.contains("line 3 (id `p2`)") && text.contains("no `answer`"),
        "{text}"
    );
    assert!(!bench.path("work/journal.jsonl").exists());
    let mut numeric = says("7");
    numeric["grader"] = json!("numeric");
    let words = Bench::with_model("task", &problems(&["\\text{even}"]));
    assert_eq!(words.run(run, numeric).unwrap_err().code, "eval::gold");
}

#[test]
fn what_is_asked_may_stand_in_a_file_and_an_empty_list_of_choices_is_none() {
    let mut bench = Bench::with_model("task", &problems(&["7", "8"]));
    let file = bench.write("ask.jinja", "Count: {{ question }}\n");
    bench.sources.insert("prompt_file".into(), file);
    let mut by_file = says("7");
    (by_file["prompt_file"], by_file["choices"]) = (json!("path:ask.jinja"), json!([]));
    bench.run(run, by_file.clone()).unwrap();
    let inline = Bench::with_model("task", &problems(&["7", "8"]));
    let mut keys = says("7");
    keys["prompt"] = json!("Count: {{ question }}");
    inline.run(run, keys).unwrap();
    assert_eq!(bench.output("transcripts.jsonl"), inline.output("transcripts.jsonl"));
    assert!(
        bench.lines("transcripts.jsonl")[1]["prompt"].as_str().unwrap().contains("Count: Eva has 1 pens.<|im_end|>")
    );
    // A file that is no template, or no text, is found before the model is loaded.
    for (bytes, code) in [(b"{{ question".as_slice(), "generate::template"), (b"\xff\xfe".as_slice(), "data::not_utf8")]
    {
        std::fs::write(bench.path("ask.jinja"), bytes).unwrap();
        let problem = bench.run(run, by_file.clone()).unwrap_err();
        assert_eq!(problem.code, code);
        assert!(problem.places[0].file.ends_with("ask.jinja"), "{problem}");
    }
}

#[test]
fn gpqa_in_its_own_columns_is_asked_by_letters_in_an_order_of_the_record() {
    let record = |i: usize| {
        json!({"id": format!("rec{i}"), "Question": format!("Which, {i}?"), "Correct Answer": " right ",
               "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"})
    };
    let mut records: Vec<Value> = (0..12).map(record).collect();
    let mut keys = says("C");
    keys["question"] = json!("Question");
    keys["choices"] = json!(["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]);
    let bench = Bench::with_model("task", &records);
    bench.run(run, keys.clone()).unwrap();
    let lines = bench.lines("transcripts.jsonl");
    let golds: std::collections::BTreeSet<&str> = lines.iter().map(|line| line["gold"].as_str().unwrap()).collect();
    assert!(golds.len() > 1, "the right one moves: {golds:?}");
    for line in &lines {
        let prompt = line["prompt"].as_str().unwrap();
        assert!(prompt.contains("\n\nA) ") && prompt.contains(&format!("{}) right", line["gold"].as_str().unwrap())));
    }
    // All that lack a column are named at once.
    for at in [3, 7] {
        records[at].as_object_mut().unwrap().remove("Incorrect Answer 2");
    }
    let problem = Bench::with_model("task", &records).run(run, keys).unwrap_err();
    let wanted =
        "no `Incorrect Answer 2`; the record has id, Question, Correct Answer, Incorrect Answer 1, Incorrect Answer 3";
    assert_eq!((problem.code, problem.notes.len()), ("eval::field", 2));
    assert_eq!(problem.notes[0], format!("line 4 (id `rec3`): {wanted}"));
    assert!(problem.help[0].contains("`choices`") && problem.help[0].contains("task"), "{problem}");
}

#[test]
fn the_same_bytes_come_out_again_and_after_an_interruption() {
    let golds: Vec<String> = (0..6).map(|i| i.to_string()).collect();
    let golds: Vec<&str> = golds.iter().map(String::as_str).collect();
    let given = params(json!({"max_tokens": 10, "temperature": 1.0, "n": 2, "batch": 3}));
    let bench = Bench::with_model("task", &problems(&golds));
    bench.run(run, given.clone()).unwrap();
    let before = (bench.output("scores.json"), bench.output("transcripts.jsonl"));
    let again = Bench::with_model("task", &problems(&golds));
    again.stop_at.store(5, Ordering::Relaxed);
    again.run(run, given.clone()).unwrap_err();
    again.stop_at.store(0, Ordering::Relaxed);
    again.stop.store(false, Ordering::Relaxed);
    again.run(run, given).unwrap();
    assert_eq!(before, (again.output("scores.json"), again.output("transcripts.jsonl")));
}

#[test]
fn limit_takes_the_first_problems_and_samples_are_all_counted() {
    let bench = Bench::with_model("task", &problems(&["7", "7", "8", "9"]));
    let mut given = says("7");
    given["limit"] = json!(3);
    given["n"] = json!(2);
    given["temperature"] = json!(0.5);
    bench.run(run, given).unwrap();
    let scores = scores(&bench);
    assert_eq!(
        (scores["correct"].as_u64(), scores["total"].as_u64(), scores["problems"].as_u64()),
        (Some(4), Some(6), Some(3))
    );
    assert!((scores["pass@2"].as_f64().unwrap() - 200.0 / 3.0).abs() <= 1e-9, "{scores}");
    assert!((scores["majority"].as_f64().unwrap() - 200.0 / 3.0).abs() <= 1e-9, "{scores}");
    // Of several samples the interval is a bootstrap over problems: not that of six independent answers.
    let (low, high) = (scores["ci_low"].as_f64().unwrap(), scores["ci_high"].as_f64().unwrap());
    assert!((0.0..10.0).contains(&low) && (95.0..=100.0).contains(&high), "{scores}");
    let outcomes = bench.lines("outcomes.jsonl");
    assert_eq!(outcomes[0], json!({"id": "p0", "correct": 2, "samples": 2}));
    assert_eq!(outcomes[2]["correct"], 0);
}

#[test]
fn s1_scoring_counts_text_and_takes_no_letter_for_a() {
    let bench = Bench::with_model("task", &problems(&["7", "\\frac{14}{2}", "007"]));
    let mut given = says("7");
    given["grader"] = json!("s1");
    bench.run(run, given).unwrap();
    let verdicts: Vec<Value> = bench.lines("transcripts.jsonl").iter().map(|line| line["verdict"].clone()).collect();
    assert_eq!(verdicts, ["correct", "wrong", "correct"]);
}

#[test]
fn many_samples_of_a_greedy_answer_are_refused_in_the_manifest() {
    let broken = (KIND.rules)(json!({"n": 4, "temperature": 0.0}).as_object().unwrap());
    assert_eq!(broken[0].key, "n");
    assert!((KIND.rules)(json!({"n": 4, "temperature": 0.7}).as_object().unwrap()).is_empty());
}

#[test]
fn columns_that_are_missing_are_named_with_every_row_that_lacks_one() {
    let whole = json!({"id": "g0", "Question": "Which?", "Correct Answer": "red", "Incorrect Answer 1": "green"});
    let mut records = vec![whole.clone(), whole.clone(), whole];
    records[1].as_object_mut().unwrap().remove("Incorrect Answer 1");
    records[2].as_object_mut().unwrap().remove("Question");
    for (i, record) in records.iter_mut().enumerate() {
        record["id"] = json!(format!("g{i}"));
    }
    let bench = Bench::with_model("task", &records);
    let mut given = says("A");
    given["choices"] = json!(["Correct Answer", "Incorrect Answer 1"]);
    let problem = bench.run(run, given).unwrap_err();
    let text = problem.to_string();
    assert!(text.contains("2 of 3 rows") && text.contains("line 2 (id `g1`): no `Incorrect Answer 1`"), "{text}");
    assert!(text.contains("line 3 (id `g2`): no `question`"), "{text}");
    assert!(!bench.path("work/journal.jsonl").exists());
}

#[test]
fn a_task_that_is_no_text_is_an_error_with_its_place() {
    let bench = Bench::with_model("task", &problems(&["7", "8"]));
    let mut bytes = std::fs::read(bench.path("data.jsonl")).unwrap();
    let at = bytes.iter().rposition(|byte| *byte == b'8').unwrap();
    bytes[at] = 0xff;
    std::fs::write(bench.path("data.jsonl"), bytes).unwrap();
    let problem = bench.run(run, says("7")).unwrap_err();
    assert!(problem.to_string().contains("data.jsonl"), "{problem}");
}

#[test]
fn max_tokens_beyond_the_context_is_found_before_decoding_with_what_would_fit() {
    let bench = Bench::with_model("task", &problems(&["7"]));
    let problem = bench.run(run, params(json!({"max_tokens": 100_000}))).unwrap_err();
    assert_eq!(problem.code, "generate::context");
    let fits: usize = problem.help[0].trim_matches('`').trim_start_matches("max_tokens = ").parse().unwrap();
    assert_eq!(bench.run(run, params(json!({"max_tokens": fits + 1}))).unwrap_err().code, "generate::context");
    assert!(!bench.path("work/journal.jsonl").exists());
    bench.run(run, params(json!({"max_tokens": fits}))).unwrap();
}

#[test]
fn an_empty_box_is_no_answer() {
    let bench = Bench::with_model("task", &problems(&["7", "0"]));
    for nothing in ["\\boxed{}", "\\boxed{ }", "\\boxed{\\;}"] {
        bench.run(run, params(json!({"max_tokens": 1, "prefill": format!("{nothing}\n")}))).unwrap();
        assert_eq!(scores(&bench)["correct"], 0, "{nothing}");
    }
}
