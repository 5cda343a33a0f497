//! What was asked and said: `show --transcripts`, `show --against`, `export --format lm-eval`.

use crate::{Project, assert_transcript};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Files that an evaluation, a `generate` stage and a probe leave, made by hand.
const HAND: &str = r#"manifest = 1
title = "What was said"

[stage.eval]
kind = "command"
axes = { data = ["s1k", "r1k"] }
command = ["sh", "-c", "for part in transcripts outcomes judgements; do cp files/$part out/$part.jsonl; done"]
outputs = ["transcripts.jsonl", "outcomes.jsonl", "judgements.jsonl"]

[stage.eval.files]
transcripts = "path:{data}.jsonl"
outcomes = "path:{data}-outcomes.jsonl"
judgements = "path:judgements.jsonl"

[stage.reverse]
kind = "command"
command = ["sh", "-c", "cp files/made out/data.jsonl; cp files/failed out/failed.jsonl"]
files = { made = "path:made.jsonl", failed = "path:failed.jsonl" }
outputs = ["data.jsonl", "failed.jsonl"]

[stage.numbers]
kind = "command"
command = ["sh", "-c", "echo '{\"accuracy\": 1}' > out/scores.json"]
outputs = ["scores.json"]
"#;

/// Clears the screen, names the window, turns text round, rings the bell.
const HOSTILE: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}\u{7f}";

const OPEN: &str = "<|im_start|>assistant\n<|im_start|>think\n";
const THOUGHT: &str = "She had three, and was given four more, which makes seven in all; but wait, one was lost.";

fn sample(id: &str, extracted: Option<&str>, gold: &str, verdict: &str) -> Value {
    json!({
        "id": id, "sample": 0,
        "prompt": format!("<|im_start|>user\nProblem {id}: how many pens has Eva?<|im_end|>\n{OPEN}"),
        "completion": format!("{THOUGHT}\n<|im_start|>answer\nIt is \\boxed{{{}}}.", extracted.unwrap_or("")),
        "extracted": extracted, "gold": gold, "verdict": verdict,
        "found": if extracted.is_some() { "box" } else { "none" }, "rule": "exact", "tokens": 31, "finish": "stop",
    })
}

fn lines(all: &[Value]) -> String {
    all.iter().map(|line| format!("{line}\n")).collect()
}

fn hand() -> Project {
    let project = Project::with(HAND);
    let mut hostile = sample("p3 数学", Some("7"), "8", "wrong");
    hostile["completion"] = json!(format!("{HOSTILE} then {HOSTILE}"));
    hostile["extracted"] = json!(format!("{HOSTILE}7"));
    hostile["id"] = json!(format!("p3{HOSTILE}"));
    let mut choice = sample("p2", Some("B"), "B", "correct");
    choice["order"] = json!([2, 0, 1, 3]);
    choice["thinking"] = json!({ "tokens": 24, "forced": false });
    choice["grader_verdict"] = json!("undecided");
    let s1k = [
        sample("p0", Some("7"), "7", "correct"),
        sample("p1", None, "7", "wrong"),
        choice,
        hostile,
        sample("p4", Some("seven or so"), "7", "undecided"),
    ];
    let mut r1k = s1k.clone();
    r1k[0] = sample("p0", Some("11"), "7", "wrong");
    r1k[1] = sample("p1", Some("7.0"), "7", "correct");
    r1k[4] = sample("p4", Some("7"), "7", "correct");
    for (name, all) in [("s1k", &s1k), ("r1k", &r1k)] {
        project.write(&format!("{name}.jsonl"), &lines(all));
        let outcome = |line: &Value| {
            let correct = u64::from(line["verdict"] == "correct");
            json!({ "id": line["id"], "correct": correct, "samples": 1 })
        };
        project.write(&format!("{name}-outcomes.jsonl"), &lines(&all.iter().map(outcome).collect::<Vec<_>>()));
    }
    let judged = json!({ "id": "p4", "sample": 0, "extracted": "seven or so", "gold": "7", "verdict": "undecided",
                         "reply": "The student is not sure.\nVerdict: undecided" });
    project.write("judgements.jsonl", &lines(&[judged]));
    let question = "How many pens are left?";
    let made = json!({ "id": "q0", "prompt": question, "completion": format!("New Question\n{question}") });
    project.write("made.jsonl", &lines(&[made]));
    let cut = format!("Well,{HOSTILE}");
    let failed = json!({ "id": "q1", "reason": "no section `New Question`", "finish": "length", "completion": cut });
    project.write("failed.jsonl", &lines(&[failed]));
    assert_eq!(project.code(&["run", "m.toml"]), Some(0), "{}", project.stderr(&["run", "m.toml"]));
    project
}

#[test]
fn samples_are_listed_a_line_each_and_filtered() {
    let project = hand();
    let s1k = ["show", "m.toml", "eval[data=s1k]"];
    assert_transcript!(project, [&s1k[..], &["--transcripts"]].concat());
    assert_transcript!(project, [&s1k[..], &["--verdict", "wrong", "--offset", "1", "--limit", "1"]].concat());
    let grepped = project.stdout(&[&s1k[..], &["--grep", "SEVEN OR"]].concat());
    assert!(grepped.contains("p4") && grepped.lines().count() == 2, "{grepped}");
    let none = project.output(&[&s1k[..], &["--grep", "nowhere"]].concat());
    assert_eq!((none.status.code(), String::from_utf8_lossy(&none.stderr).as_ref()), (Some(0), "0 of 5 samples\n"));
    let object = project.stdout(&[&s1k[..], &["--verdict", "undecided", "--json"]].concat());
    let object: Value = serde_json::from_str(&object).expect("one object");
    assert_eq!((&object["id"], &object["judgement"]["gold"]), (&json!("p4"), &json!("7")));
}

#[test]
fn one_sample_is_shown_whole_and_wrapped() {
    let project = hand();
    let mut command = project.command(&["show", "m.toml", "eval[data=s1k]", "--id", "p2"]);
    let narrow = String::from_utf8(command.env("COLUMNS", "40").output().expect("runs").stdout).expect("UTF-8");
    assert!(narrow.lines().skip_while(|line| *line != "prompt").all(|line| line.chars().count() <= 40), "{narrow}");
    insta::assert_snapshot!(narrow);
    let judged = project.stdout(&["show", "m.toml", "eval[data=s1k]", "--id", "p4"]);
    assert!(judged.contains("judged      undecided") && judged.contains("  The student is not sure.\n"), "{judged}");
}

/// A model may write what it likes; a terminal that reads its words must not do what they say.
#[test]
fn nothing_a_model_wrote_is_obeyed_by_the_terminal() {
    let project = hand();
    let id = format!("p3{HOSTILE}");
    let eval = "eval[data=s1k]";
    for arguments in [
        vec!["show", "m.toml", eval],
        vec!["show", "m.toml", eval, "--transcripts"],
        vec!["show", "m.toml", eval, "--transcripts", "--json"],
        vec!["show", "m.toml", eval, "--id", &id],
        vec!["show", "m.toml", eval, "--id", &id, "--json"],
        vec!["show", "m.toml", "eval[data=r1k]", "--against", eval],
        vec!["show", "m.toml", "reverse", "--transcripts"],
        vec!["show", "m.toml", "reverse", "--id", "q1"],
    ] {
        let output = project.output(&arguments);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        for bytes in [output.stdout, output.stderr] {
            let text = String::from_utf8(bytes).expect("UTF-8");
            let acts = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
            assert!(!text.contains(acts), "{arguments:?}: {text:?}");
        }
    }
    let whole = project.stdout(&["show", "m.toml", eval, "--id", &id]);
    assert!(whole.contains("\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u{202e}\\x7f then"), "{whole}");
    let object = project.stdout(&["show", "m.toml", eval, "--id", &id, "--json"]);
    let object: Value = serde_json::from_str(&object).expect("JSON");
    assert_eq!(object["completion"], json!(format!("{HOSTILE} then {HOSTILE}")), "what was said is kept");
    let unknown = project.stderr(&["show", "m.toml", eval, "--id", &format!("x{HOSTILE}")]);
    assert!(!unknown.contains('\u{1b}') && unknown.contains("no_sample"), "{unknown:?}");
}

#[test]
fn records_made_and_failed_are_browsed_too() {
    let project = hand();
    assert_transcript!(project, ["show", "m.toml", "reverse", "--transcripts"]);
    assert_transcript!(project, ["show", "m.toml", "reverse", "--id", "q0"]);
    let failed = project.stdout(&["show", "m.toml", "reverse", "--verdict", "failed"]);
    assert!(failed.contains("no section `New Question`") && !failed.contains("q0"), "{failed}");
}

#[test]
fn two_evaluations_are_held_against_one_another() {
    let project = hand();
    assert_transcript!(project, ["show", "m.toml", "eval[data=s1k]", "--against", "eval[data=r1k]"]);
    let object = project.json(&["show", "m.toml", "eval[data=s1k]", "--against", "eval[data=r1k]", "--json"]);
    assert_eq!(
        (&object["first_better"], &object["second_better"], &object["alike"]),
        (&json!(1), &json!(2), &json!(2))
    );
    // One against two of three fair coins: every outcome is at least as far apart.
    assert_eq!(object["p"], json!(1.0));
    assert_eq!(
        object["differing"][0],
        json!({
            "id": "p0", "gold": "7",
            "first": { "correct": 1, "samples": 1, "extracted": ["7"] },
            "second": { "correct": 0, "samples": 1, "extracted": ["11"] },
        })
    );
}

#[test]
fn evaluations_of_several_samples_are_compared_by_their_rates() {
    let project = hand();
    let ids = ["p0", "p1", "p2", &format!("p3{HOSTILE}"), "p4"];
    let outcome = |(id, correct): (&&str, u64)| json!({ "id": id, "correct": correct, "samples": 2 });
    let outcomes: Vec<Value> = ids.iter().zip([1, 0, 2, 0, 2]).map(outcome).collect();
    project.write("r1k-outcomes.jsonl", &lines(&outcomes));
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    let text = project.stdout(&["show", "m.toml", "eval[data=s1k]", "--against", "eval[data=r1k]"]);
    assert!(text.contains("2 of 5 differ: 1 better in the first, 1 in the second\n3 alike\n"), "{text}");
    assert!(text.contains("1/1") && text.contains("1/2") && text.contains("2/2"), "{text}");
    // Halves: one problem half a problem worse, one a whole one better; of four signs all are as far.
    let object = project.json(&["show", "m.toml", "eval[data=s1k]", "--against", "eval[data=r1k]", "--json"]);
    assert_eq!(object["p"], json!(1.0));
    project.write("r1k-outcomes.jsonl", &lines(&outcomes[..4]));
    assert_eq!(project.code(&["run", "m.toml"]), Some(0));
    let other = project.stderr(&["show", "m.toml", "eval[data=s1k]", "--against", "eval[data=r1k]"]);
    assert!(other.contains("cli::other_problems") && other.contains("5 and 4 problems, 4 of them the same"), "{other}");
}

#[test]
fn what_cannot_be_browsed_is_said() {
    let project = hand();
    assert_transcript!(project, ["show", "m.toml", "eval", "--transcripts"]);
    assert_transcript!(project, ["show", "m.toml", "eval[data=s1k]", "--id", "p9"]);
    assert_transcript!(project, ["show", "m.toml", "eval[data=s1k]", "--verdict", "failed"]);
    assert_transcript!(project, ["show", "m.toml", "numbers", "--transcripts"]);
    assert_transcript!(project, ["show", "m.toml", "eval[data=s1k]", "--against", "numbers"]);
}

/// Two evaluations of one small random model, with one sample of a problem and with two.
const STUDY: &str = r#"manifest = 1
title = "Samples for another program"

[stage.base]
kind = "model"
source = "init:random"
tokenizer = "init:mini"

[stage.base.init]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 48
seed = 1

[stage.pens]
kind = "dataset"
source = "path:pens.jsonl"

[stage.once]
kind = "eval"
model = "base"
task = "pens"
prefill = "\\boxed{7}\n"
max_tokens = 4

[stage.twice]
kind = "eval"
axes = { seed = [1, 2] }
model = "base"
task = "pens"
prefill = "\\boxed{7}\n"
max_tokens = 4
n = 2
temperature = 1.0
seed = "{seed}"
limit = 2
"#;

fn files_below(dir: &std::path::Path) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").path());
    let read = |path: std::path::PathBuf| match path.is_dir() {
        true => files_below(&path),
        false => {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            BTreeMap::from([(name, std::fs::read_to_string(&path).expect("text"))])
        }
    };
    entries.flat_map(read).collect()
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn evaluations_are_exported_as_another_program_logs_them() {
    let project = Project::with(STUDY);
    let pens = [
        json!({ "id": "p0", "problem": "Eva has 7 pens. \u{e9}", "answer": "7", "weight": 1e-7 }),
        json!({ "problem": "Eva has 8 pens.", "answer": 8 }),
        json!({ "id": "p2", "problem": "Eva has 9 pens.", "answer": "7.0" }),
    ];
    project.write("pens.jsonl", &lines(&pens));
    let run = project.output(&["run", "m.toml"]);
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
    let said = project.stdout(&["export", "m.toml", "once", "logs", "--format", "lm-eval"]);
    assert!(said.starts_with("base: 2 files in logs"), "{said}");
    let files = files_below(&project.path("logs"));
    let names: Vec<&String> = files.keys().collect();
    let date = names[0].trim_start_matches("results_").trim_end_matches(".json");
    assert!(date.len() == 26 && date.as_bytes()[13] == b'-' && date.ends_with(".000000"), "{date}");
    assert_eq!(names, [&format!("results_{date}.json"), &format!("samples_pens_{date}.jsonl")]);
    let rows: Vec<Value> = files[names[1]].lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((rows.len(), &rows[1]["doc_id"], &rows[1]["target"]), (3, &json!(1), &json!("8")));
    let exact: Vec<&Value> = rows.iter().map(|row| &row["exact_match"]).collect();
    assert_eq!(exact, [&json!(1.0), &json!(0.0), &json!(1.0)]);
    assert_eq!((&rows[0]["filtered_resps"], &rows[0]["filter"]), (&json!(["7"]), &json!("extract")));
    assert_eq!(rows[0]["resps"][0].as_array().map(Vec::len), Some(1));
    let prompt = rows[0]["arguments"]["gen_args_0"]["arg_0"].as_str().expect("the prompt");
    assert!(prompt.contains("Eva has 7 pens. \u{e9}") && prompt.ends_with("\\boxed{7}\n"), "{prompt}");
    assert_eq!(rows[0]["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"], 4);
    assert_eq!(
        (rows[0]["prompt_hash"].as_str(), rows[0]["target_hash"].as_str()),
        (Some(&*sha256(prompt)), Some(&*sha256("7")))
    );
    let doc = concat!(
        "{\n  \"id\": \"p0\",\n  \"problem\": \"Eva has 7 pens. \u{e9}\",\n",
        "  \"answer\": \"7\",\n  \"weight\": 1e-07\n}"
    );
    assert_eq!(rows[0]["doc_hash"].as_str(), Some(&*sha256(doc)));
    let results: Value = serde_json::from_str(&files[names[0]]).expect("JSON");
    let score = results["results"]["pens"]["exact_match,extract"].as_f64().expect("a number");
    assert!((score - 2.0 / 3.0).abs() <= 1e-12);
    assert!(
        (results["results"]["pens"]["exact_match_stderr,extract"].as_f64().expect("a number") - 1.0 / 3.0).abs()
            <= 1e-12
    );
    assert_eq!(results["n-samples"]["pens"], json!({ "original": 3, "effective": 3 }));
    let all: String = rows
        .iter()
        .flat_map(|row| ["doc_hash", "prompt_hash", "target_hash"].map(|name| row[name].as_str().expect("a hash")))
        .collect();
    assert_eq!(results["task_hashes"]["pens"].as_str(), Some(&*sha256(&all)));
    assert_eq!(project.code(&["export", "m.toml", "once", "again", "--format", "lm-eval"]), Some(0));
    assert_eq!(files, files_below(&project.path("again")), "the clock has no part in it");
    // The other view of the same samples.
    let listed = project.stdout(&["show", "m.toml", "once", "--verdict", "correct"]);
    assert!(listed.lines().count() == 3 && listed.contains("p2"), "{listed}");
}

#[test]
fn samples_of_one_problem_share_a_row_and_evaluations_of_one_model_a_folder() {
    let project = Project::with(STUDY);
    let pens = [
        json!({ "id": 0, "problem": "Eva has 7 pens.", "answer": "7" }),
        json!({ "id": 1, "problem": "Eva has 8 pens.", "answer": "8" }),
    ];
    project.write("pens.jsonl", &lines(&pens));
    assert_eq!(project.code(&["run", "m.toml", "twice"]), Some(0), "{}", project.stderr(&["run", "m.toml", "twice"]));
    assert_eq!(project.code(&["export", "m.toml", "twice", "logs", "--format", "lm-eval"]), Some(0));
    let files = files_below(&project.path("logs/base"));
    let tasks: Vec<&str> =
        files.keys().filter_map(|name| name.strip_prefix("samples_")?.split_once('_')).map(|(task, _)| task).collect();
    assert_eq!((files.len(), tasks), (3, vec!["pens-1", "pens-2"]));
    let rows = files.iter().find(|(name, _)| name.contains("pens-2")).expect("its samples").1;
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((rows.len(), rows[0]["resps"][0].as_array().map(Vec::len)), (2, Some(2)));
    assert_eq!((&rows[0]["filtered_resps"], &rows[0]["exact_match"]), (&json!([["7", "7"]]), &json!(1.0)));
    assert_eq!((&rows[1]["doc_id"], &rows[1]["exact_match"]), (&json!(1), &json!(0.0)));
    let second = project.stdout(&["show", "m.toml", "twice[seed=2]", "--id", "0", "--sample", "1"]);
    assert!(second.contains("0, sample 1: correct") && second.contains("found by: box"), "{second}");
    assert_eq!(project.code(&["export", "m.toml", "base", "logs2", "--format", "lm-eval"]), Some(2));
}
