//! The `dataset` stage, run as the engine runs it: parameters and files in, `data.jsonl` out.

use pipe::data::{Record, read_records, write_jsonl};
use pipe::files::Files;
use pipe::plan::Axes;
use pipe::problem::Problem;
use pipe::stage::{Artifact, Context, Device, Progress, dataset};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl Progress for Said {
    fn begin(&self, _: u64, _: &'static str) {}
    fn at(&self, _: u64) {}
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

/// Datasets by slot, each a list of records; `source` becomes a file.
struct Stage {
    dir: TempDir,
    inputs: BTreeMap<String, Vec<Artifact>>,
    sources: BTreeMap<String, PathBuf>,
    said: Said,
}

impl Stage {
    fn new() -> Stage {
        Stage { dir: TempDir::new().unwrap(), inputs: BTreeMap::new(), sources: BTreeMap::new(), said: Said::default() }
    }

    fn input(mut self, slot: &str, name: &str, values: &[Value]) -> Stage {
        let path = self.dir.path().join(format!("{name}.jsonl"));
        write_jsonl(&path, &super::records(values)).unwrap();
        let mut files = Files::default();
        files.insert("data.jsonl", path);
        self.add(slot, name, files);
        self
    }

    fn add(&mut self, slot: &str, name: &str, files: Files) {
        let artifact = Artifact { stage: name.into(), kind: "dataset", axes: Axes::default(), files };
        self.inputs.entry(slot.into()).or_default().push(artifact);
    }

    fn source(mut self, name: &str, text: &str) -> Stage {
        let path = self.dir.path().join("source").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self.sources.insert("source".into(), self.dir.path().join("source"));
        self
    }

    fn run(&self, params: Value) -> Result<Vec<Record>, Problem> {
        let out = TempDir::new().unwrap();
        dataset::run(&Context {
            label: "data",
            params: params.as_object().unwrap(),
            inputs: &self.inputs,
            sources: &self.sources,
            out: out.path(),
            work: self.dir.path(),
            device: Device::Cpu,
            remote: &pipe::remote::Remote::new(Path::new("journal")),
            progress: &self.said,
            stop: &AtomicBool::new(false),
        })?;
        read_records(&out.path().join("data.jsonl"))
    }
}

fn values(records: Vec<Record>, field: &str) -> Vec<Value> {
    records.into_iter().map(|record| record.get(field).cloned().unwrap_or(Value::Null)).collect()
}

fn forward(n: usize) -> Vec<Value> {
    (0..n).map(|i| json!({"id": format!("p{i}"), "prompt": format!("f{i}?"), "thinking": "t".repeat(i + 1), "answer": format!("fa{i}")})).collect()
}

fn reverse(n: usize) -> Vec<Value> {
    (0..n)
        .map(
            |i| json!({"id": format!("p{i}"), "prompt": format!("r{i}?"), "thinking": "u", "answer": format!("ra{i}")}),
        )
        .collect()
}

#[test]
fn the_names_of_a_released_file_become_ours_and_ids_are_made_from_content() {
    let line = r#"{"question":"q","deep":{"trace":["a","b"]},"attempt":"x","grade":"Yes"}"#;
    let stage = Stage::new().source("train.jsonl", &format!("{line}\n{}\n{line}\n", line.replace("\"q\"", "\"q2\"")));
    let columns = json!({"prompt": "question", "thinking": "deep.trace.1", "answer": "attempt"});
    let made = stage.run(json!({"source": "path:source", "columns": columns, "drop": ["deep", "grade"]})).unwrap();
    assert_eq!(made[0].keys().collect::<Vec<_>>(), ["id", "answer", "prompt", "thinking"]);
    assert_eq!((made[0]["thinking"].as_str(), made[1]["prompt"].as_str()), (Some("b"), Some("q2")));
    let ids = values(made, "id");
    assert_eq!(ids[2], format!("{}-2", ids[0].as_str().unwrap()));
    // Which columns are chosen does not move an id.
    let other = stage.run(json!({"source": "path:source", "select": ["grade"]})).unwrap();
    assert_eq!(values(other, "id"), ids);
}

#[test]
fn half_the_mixed_set_is_forward_examples_each_with_its_own_reverse() {
    let mut reversed = reverse(20);
    reversed.reverse();
    let stage = Stage::new().input("concat", "s1k", &forward(22)).input("concat", "r1k", &reversed);
    let sample = |seed: u64| stage.run(json!({"sample": {"pairs": 8, "by": "id", "seed": seed}})).unwrap();
    let made = sample(0);
    let ids = values(made.clone(), "id");
    let (mut first, mut second) = (ids[..8].to_vec(), ids[8..].to_vec());
    assert!(made[..8].iter().all(|r| r["prompt"].as_str().unwrap().starts_with('f')));
    assert!(made[8..].iter().all(|r| r["prompt"].as_str().unwrap().starts_with('r')));
    first.sort_by_key(Value::to_string);
    second.sort_by_key(Value::to_string);
    assert_eq!(first, second);
    assert_eq!(made, sample(0));
    assert_ne!(ids, values(sample(1), "id"));
    let problem = stage.run(json!({"sample": {"pairs": 21}})).unwrap_err();
    assert_eq!(problem.code, "dataset::sample");
    assert!(problem.notes[0].contains("of 22 values of `id`, 20"), "{problem}");
}

#[test]
fn a_row_more_in_the_source_moves_at_most_one_row_of_a_sample() {
    let draw = |n: usize| {
        let stage = Stage::new().input("concat", "s1k", &forward(n));
        values(stage.run(json!({"sample": {"rows": 10}})).unwrap(), "id")
    };
    let (before, after) = (draw(40), draw(41));
    assert_eq!(before.len(), 10);
    assert!(before.iter().filter(|id| !after.contains(id)).count() <= 1);
}

#[test]
fn a_pair_prefers_the_answer_of_its_own_direction_both_ways() {
    let stage = Stage::new().input("concat", "s1k", &forward(2)).input("pair.with", "r1k", &reverse(3));
    let made = stage.run(json!({"pair": {"by": "id"}})).unwrap();
    assert_eq!(values(made.clone(), "id"), ["p0/forward", "p0/reverse", "p1/forward", "p1/reverse"]);
    let (f, r) = (json!({"thinking": "t", "answer": "fa0"}), json!({"thinking": "u", "answer": "ra0"}));
    assert_eq!(
        made[0],
        *json!({"id": "p0/forward", "prompt": "f0?", "direction": "forward", "chosen": f, "rejected": r})
            .as_object()
            .unwrap()
    );
    assert_eq!(
        made[1],
        *json!({"id": "p0/reverse", "prompt": "r0?", "direction": "reverse", "chosen": r, "rejected": f})
            .as_object()
            .unwrap()
    );
}

#[test]
fn a_forward_example_without_a_reverse_is_named_or_left_out_when_that_is_asked() {
    let stage = Stage::new().input("concat", "s1k", &forward(3)).input("pair.with", "r1k", &reverse(2));
    let problem = stage.run(json!({"pair": {}})).unwrap_err();
    assert_eq!(problem.code, "dataset::unmatched");
    assert_eq!(problem.notes, ["record 3 (`id` is `p2`): no counterpart in `pair.with`"]);
    assert_eq!(stage.run(json!({"pair": {"unmatched": "drop"}})).unwrap().len(), 4);
    assert!(stage.said.0.lock().unwrap().iter().any(|said| said.contains("1 of 3 records have no counterpart")));
}

#[test]
fn the_probe_set_is_the_shortest_examples_and_their_counterparts() {
    let mut stage = Stage::new().input("concat", "s1k", &forward(6));
    super::byte_tokenizer(stage.dir.path());
    let model = Files::from_dir(stage.dir.path()).unwrap();
    stage.add("shortest.tokenizer", "base", model);
    let made = stage.run(json!({"shortest": {"rows": 2, "fields": ["prompt", "thinking", "answer"]}})).unwrap();
    assert_eq!(values(made, "id"), ["p0", "p1"]);
    let counterparts = Stage::new().input("concat", "r1k", &reverse(6)).input("only_in.dataset", "probe", &forward(2));
    assert_eq!(values(counterparts.run(json!({"only_in": {"by": "id"}})).unwrap(), "prompt"), ["r0?", "r1?"]);
    let held_out = Stage::new().input("concat", "r1k", &reverse(6)).input("not_in.dataset", "probe", &forward(2));
    assert_eq!(values(held_out.run(json!({"not_in": {}})).unwrap(), "prompt"), ["r2?", "r3?", "r4?", "r5?"]);
}

#[test]
fn conditions_filter_and_a_misspelt_field_is_not_an_empty_result() {
    let rows = [
        json!({"id": 1, "grade": "Yes", "score": 3, "text": "abc", "tags": []}),
        json!({"id": 2, "grade": "No", "score": 1.5, "text": "abcdef", "tags": ["x"]}),
        json!({"id": 3, "grade": "Yes", "score": null, "text": " ", "tags": ["y"]}),
    ];
    let stage = Stage::new().input("concat", "graded", &rows);
    let ids = |conditions: Value| values(stage.run(json!({"filter": conditions})).unwrap(), "id");
    assert_eq!(ids(json!([{"field": "grade", "equals": "Yes"}])), [1, 3]);
    assert_eq!(ids(json!([{"field": "grade", "one_of": ["No", "Maybe"]}])), [2]);
    assert_eq!(ids(json!([{"field": "grade", "equals": "Yes", "invert": true}])), [2]);
    assert_eq!(ids(json!([{"field": "score", "at_least": 1, "at_most": 2}])), [2]);
    assert_eq!(ids(json!([{"field": "score", "equals": 3.0}])), [1]);
    assert_eq!(ids(json!([{"field": "text", "min_length": 2, "max_length": 3}])), [1]);
    assert_eq!(ids(json!([{"field": "text", "matches": "^abc"}, {"field": "tags", "not_empty": true}])), [2]);
    assert_eq!(ids(json!([{"field": "text", "not_empty": false}])), [3]);
    let misspelt = stage.run(json!({"filter": [{"field": "garde", "equals": "Yes"}]})).unwrap_err();
    assert_eq!(misspelt.code, "dataset::filter_field");
    let empty = stage.run(json!({"filter": [{"field": "grade", "equals": "yes"}]})).unwrap_err();
    assert_eq!((empty.code, empty.message.as_str()), ("data::empty", "no record is left of the 3 that were read"));
}

#[test]
fn shuffling_keeps_every_record_and_tags_and_limits_do_what_they_say() {
    let stage = Stage::new().input("concat", "s1k", &forward(30));
    let made = stage.run(json!({"shuffle_seed": 5, "tag": {"direction": "forward"}})).unwrap();
    assert!(made.iter().all(|record| record["direction"] == "forward"));
    let mut ids = values(made.clone(), "id");
    assert_ne!(ids, values(stage.run(json!({})).unwrap(), "id"));
    assert_eq!(values(stage.run(json!({"shuffle_seed": 5, "limit": 3})).unwrap(), "id"), ids[..3]);
    ids.sort_by_key(|id| id.as_str().unwrap()[1..].parse::<usize>().unwrap());
    assert_eq!(ids, values(stage.run(json!({})).unwrap(), "id"));
}

#[test]
fn a_folder_with_several_splits_is_not_mixed_in_silence() {
    let stage = Stage::new()
        .source("data/train-00000-of-00002.jsonl", "{\"id\": 1}\n")
        .source("data/train-00001-of-00002.jsonl", "{\"id\": 2}\n")
        .source("data/test-00000-of-00001.jsonl", "{\"id\": 3}\n");
    let problem = stage.run(json!({"source": "path:source"})).unwrap_err();
    assert_eq!(problem.code, "dataset::splits");
    assert_eq!(problem.help, ["name one: `split = \"train\"`, or `file = \"PATTERN\"`"]);
    assert_eq!(values(stage.run(json!({"source": "path:source", "split": "train"})).unwrap(), "id"), [1, 2]);
    assert_eq!(values(stage.run(json!({"source": "path:source", "file": "**/test-*.jsonl"})).unwrap(), "id"), [3]);
    let none = stage.run(json!({"source": "path:source", "file": "*.jsonl"})).unwrap_err();
    assert_eq!(none.code, "dataset::no_file");
    assert!(none.notes[0].contains("data/test-00000-of-00001.jsonl"), "{none}");
}

#[test]
fn a_missing_column_or_a_repeated_id_names_file_and_line() {
    let stage = Stage::new().source("a.jsonl", "{\"id\":1,\"q\":\"x\"}\n\n{\"id\":2}\n{\"id\":1,\"q\":\"y\"}\n");
    let problem = stage.run(json!({"source": "path:source", "columns": {"prompt": "q"}})).unwrap_err();
    assert_eq!(problem.code, "data::missing_field");
    assert!(problem.places[0].file.ends_with(Path::new("a.jsonl")), "{problem}");
    assert_eq!(problem.notes, ["line 3: no `q`; the record has `id`"]);
    let problem = stage.run(json!({"source": "path:source"})).unwrap_err();
    assert_eq!(problem.code, "dataset::duplicate_id");
    assert_eq!(problem.notes, ["line 4: id `1` is taken by line 1 of `a.jsonl`"]);
}

#[test]
fn an_id_moved_away_is_made_again_and_one_in_a_second_file_is_taken() {
    let stage = Stage::new().input("concat", "s1k", &forward(2));
    let made = stage.run(json!({"columns": {"question_id": "id"}})).unwrap();
    assert_eq!(values(made.clone(), "question_id"), ["p0", "p1"]);
    assert!(values(made, "id").iter().all(|id| id.as_str().unwrap().len() == 12));
    let stage = Stage::new().source("a.jsonl", "{\"id\":1}\n").source("b.jsonl", "{\"id\":\"\"}\n{\"id\":1}\n");
    let problem = stage.run(json!({"source": "path:source"})).unwrap_err();
    assert_eq!(
        problem.notes,
        ["line 1: `id` is empty, not a text or a number", "line 2: id `1` is taken by line 1 of `a.jsonl`"]
    );
}

#[test]
fn a_csv_file_is_read_by_its_header_and_every_bad_row_is_named() {
    let text =
        "Record ID,Question,Correct Answer\r\nrec1,\"Which, of\nthese?\",\"the \"\"first\"\"\"\r\nrec2,Why?, so \r\n";
    let stage = Stage::new().source("gpqa.csv", text);
    let records = stage.run(json!({"source": "path:source", "id": "Record ID"})).unwrap();
    assert_eq!(values(records.clone(), "id"), ["rec1", "rec2"]);
    assert_eq!(values(records.clone(), "Question"), ["Which, of\nthese?", "Why?"]);
    assert_eq!(values(records.clone(), "Correct Answer"), ["the \"first\"", " so "]);
    assert!(!records[0].contains_key("Record ID"));
    let bad = "Record ID,Question\nrec1\nrec2,x\nrec3,x,y\n";
    let problem = Stage::new().source("bad.csv", bad).run(json!({"source": "path:source"})).unwrap_err();
    assert_eq!(problem.code, "data::ragged_row");
    assert_eq!(problem.notes, ["line 2: 1 fields, and the header has 2", "line 4: 3 fields, and the header has 2"]);
    let problem = stage.run(json!({"source": "path:source", "id": "record id"})).unwrap_err();
    assert_eq!(problem.code, "data::missing_field");
    assert!(problem.places[0].file.ends_with(Path::new("gpqa.csv")) && problem.notes.len() == 2, "{problem}");
    assert_eq!(problem.notes[1], "line 4: no `record id`; the record has `Record ID`, `Question`, `Correct Answer`");
}

#[test]
fn the_gold_behind_the_hashes_is_taken_and_every_row_without_one_is_named() {
    let lines = "{\"q\":\"a\",\"answer\":\"2+3=5\\n#### 5 \"}\n{\"q\":\"b\",\"answer\":\"1,000\\n#### 1,080\"}\n";
    let keys = json!({
        "source": "path:source",
        "columns": {"prompt": "q", "solution": "answer"},
        "extract": {"answer": {"from": "solution", "pattern": "####\\s*(\\S.*)"}},
        "select": ["prompt", "answer"],
    });
    let stage = Stage::new().source("gsm8k.jsonl", lines);
    let records = stage.run(keys.clone()).unwrap();
    assert_eq!(values(records.clone(), "answer"), ["5", "1,080"]);
    assert_eq!(values(records, "prompt"), ["a", "b"]);
    let more = format!(
        "{lines}{{\"q\":\"c\",\"answer\":\"so it is 7\"}}\n{{\"q\":\"d\",\"answer\":7}}\n{{\"q\":\"e\",\"answer\":\"####\"}}\n"
    );
    let problem = Stage::new().source("gsm8k.jsonl", &more).run(keys).unwrap_err();
    assert_eq!(
        problem.notes,
        [
            "line 3: the pattern of `answer` finds nothing in `solution`, which ends \"so it is 7\"",
            "line 4: `solution` is a number, not a text",
            "line 5: the pattern of `answer` finds nothing in `solution`, which ends \"####\"",
        ]
    );
    assert_eq!(problem.help, ["`extract.answer` takes what `####\\s*(\\S.*)` finds in `solution`"]);
    // Without a group all that matches is taken; from a name that is not there, nothing.
    let whole = json!({"source": "path:source", "extract": {"n": {"from": "answer", "pattern": "\\d+$|\\d+ $"}}});
    assert_eq!(values(stage.run(whole).unwrap(), "n"), ["5", "080"]);
    let gone = json!({"source": "path:source", "extract": {"n": {"from": "gone", "pattern": "x"}}});
    assert_eq!(stage.run(gone).unwrap_err().notes, ["line 1: no `gone`", "line 2: no `gone`"]);
}

#[test]
fn text_that_is_not_utf8_is_named_by_line_in_either_format() {
    for (name, bytes, wanted) in [
        ("a.jsonl", b"{\"q\":\"x\"}\n{\"q\":\"\xe9\"}\n".as_slice(), "line 2: not UTF-8 at byte 7 of the line"),
        ("a.csv", b"q,r\nx,y\nz,\xe9\n".as_slice(), "line 3: `r` is not UTF-8 at its byte 1"),
    ] {
        let stage = Stage::new().source(name, "");
        std::fs::write(stage.dir.path().join("source").join(name), bytes).unwrap();
        let problem = stage.run(json!({"source": "path:source"})).unwrap_err();
        assert_eq!((problem.code, problem.notes[0].as_str()), ("data::not_utf8", wanted));
    }
}

#[test]
fn the_problems_of_the_mini_study_come_with_the_program() {
    for (name, first) in [("mini-math500", "4"), ("mini-aime24", "59"), ("mini-gpqa-diamond", "A")] {
        let records = Stage::new().run(json!({"source": format!("init:{name}"), "limit": 80})).unwrap();
        assert_eq!((records.len(), &records[0]["answer"]), (80, &json!(first)), "{name}");
    }
    let broken = (dataset::KIND.rules)(json!({"source": "init:mini-gsm8k"}).as_object().unwrap());
    assert_eq!(broken[0].message, "there is no bundled dataset `mini-gsm8k`");
}

#[test]
fn keys_that_contradict_each_other_are_found_before_anything_runs() {
    let broken = |params: Value| -> Vec<&'static str> {
        (dataset::KIND.rules)(params.as_object().unwrap()).into_iter().map(|broken| broken.key).collect()
    };
    assert_eq!(broken(json!({})), ["source"]);
    assert_eq!(broken(json!({"source": "path:x", "concat": "other"})), ["concat"]);
    assert_eq!(broken(json!({"concat": "other", "file": "a", "split": "b"})), ["file", "split", "split"]);
    assert_eq!(broken(json!({"concat": "other", "select": ["a"], "drop": ["b"]})), ["drop"]);
    assert_eq!(broken(json!({"concat": "other", "sample": {"by": "id"}})), ["sample"]);
    assert_eq!(
        broken(json!({"concat": "other", "filter": [{"field": "a", "invert": false}, {"field": "a", "matches": "("}]})),
        ["filter", "filter"]
    );
    let extract = json!({"source": "path:x", "extract": {"a": {"from": "b", "pattern": "("}}});
    assert_eq!(broken(extract), ["extract"]);
    assert!(broken(json!({"source": "path:x", "split": "train", "sample": {"rows": 3}, "select": ["a"]})).is_empty());
}
