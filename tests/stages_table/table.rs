use crate::{Bench, broken, with_defaults};
use pipe::stage::table::{KIND, run};
use serde_json::{Value, json};

const SIZES: [&str; 2] = ["3B", "7B"];
const DATA: [&str; 2] = ["s1k", "r1k"];
const TASKS: [&str; 2] = ["aime24", "math500"];

/// Two sizes, two training sets, two tasks, and the untrained models; 7B on r1k lacks `math500`.
fn study() -> Bench {
    let mut bench = Bench::new();
    for (s, size) in SIZES.iter().enumerate() {
        for (t, task) in TASKS.iter().enumerate() {
            bench.scores("base-eval", &[("size", size), ("task", task)], 5.0 * s as f64 + t as f64);
        }
    }
    for (s, size) in SIZES.iter().enumerate() {
        for (d, data) in DATA.iter().enumerate() {
            for (t, task) in TASKS.iter().enumerate() {
                if (*size, *data, *task) != ("7B", "r1k", "math500") {
                    let accuracy = 10.0 + 20.0 * s as f64 + 3.25 * d as f64 + 40.0 * t as f64;
                    bench.scores("eval", &[("size", size), ("data", data), ("task", task)], accuracy);
                }
            }
        }
    }
    bench
}

fn table1() -> Value {
    json!({ "rows": ["size", "data"], "columns": ["task", "mean"], "value": "accuracy",
            "missing": { "data": "base" }, "caption": "Table 1: accuracy_%" })
}

#[test]
fn a_study_becomes_a_table_in_five_formats() {
    let mut bench = study();
    bench.run(&KIND, run, table1()).expect("a table");
    insta::assert_snapshot!("text", bench.read("table.txt"));
    insta::assert_snapshot!("markdown", bench.read("table.md"));
    insta::assert_snapshot!("csv", bench.read("table.csv"));
    insta::assert_snapshot!("latex", bench.read("table.tex"));
    let json: Value = serde_json::from_str(&bench.read("table.json")).expect("JSON");
    assert_eq!(json["columns"], json!(["aime24", "math500", "mean"]));
    assert_eq!(json["cells"][1]["labels"], json!({ "size": "3B", "data": "s1k" }));
    assert_eq!(json["cells"][1]["values"]["mean"]["value"], json!(30.0));
}

#[test]
fn a_mean_over_an_incomplete_row_is_not_a_number() {
    let mut bench = study();
    bench.run(&KIND, run, table1()).expect("a table");
    let json: Value = serde_json::from_str(&bench.read("table.json")).expect("JSON");
    let last = &json["cells"][5];
    assert_eq!(last["labels"], json!({ "size": "7B", "data": "r1k" }));
    assert_eq!(last["values"]["aime24"]["value"], json!(33.25));
    assert_eq!(last["values"]["mean"]["value"], Value::Null);
}

#[test]
fn published_numbers_stand_in_brackets_and_their_mean_is_the_published_one() {
    let mut bench = study();
    let csv = "# from the paper\nsize,data,task,accuracy\n3B,s1k,aime24,3.3\n3B,s1k,math500,45.2\n\
               3B,s1k,mean,24.0\n7B,s1k,aime24,16.7\n7B,s1k,math500,77.0\n14B,s1k,aime24,1\n7B,r1k,aime24,-\n";
    let path = bench.file("published.csv", csv);
    bench.sources.insert("published".into(), path);
    let mut params = table1();
    params["published"] = json!("path:published.csv");
    params["interval"] = json!(true);
    bench.run(&KIND, run, params).expect("a table");
    insta::assert_snapshot!("published_text", bench.read("table.txt"));
    insta::assert_snapshot!("published_csv", bench.read("table.csv"));
    assert!(bench.warnings.0.lock().expect("one thread").is_empty());
}

#[test]
fn published_numbers_of_another_study_are_noticed() {
    let mut bench = study();
    let path = bench.file("published.csv", "size,data,task,value\n72B,s1k,aime24,3.3\n");
    bench.sources.insert("published".into(), path);
    let mut params = table1();
    params["published"] = json!("path:published.csv");
    bench.run(&KIND, run, params).expect("a table");
    assert_eq!(bench.warnings.0.lock().expect("one thread").len(), 1);
    assert!(!bench.read("table.txt").contains("published"));
}

#[test]
fn a_wrong_number_in_the_published_file_is_named_by_line() {
    for (csv, wrong) in [
        ("size,data,task,accuracy\n\n3B,s1k,aime24,many\n", "`many` is not a number"),
        ("size,data,task,accuracy\n\n3B,s1k,aime24,NaN\n", "`NaN` is not a number"),
        ("size,data,task,accuracy\n\n3B,s1k,aime24\n", "expected 4 fields, found 3"),
    ] {
        let mut bench = study();
        let path = bench.file("published.csv", csv);
        bench.sources.insert("published".into(), path);
        let mut params = table1();
        params["published"] = json!("path:published.csv");
        let problem = bench.run(&KIND, run, params).expect_err("a problem");
        assert_eq!((problem.code, problem.message.as_str()), ("table::published", wrong));
        assert_eq!(problem.places[0].line, Some(3));
    }
}

#[test]
fn measurements_show_fields_by_name_with_steps_in_order_of_number() {
    let mut bench = Bench::new();
    let lines: String = [10, 2, 1]
        .iter()
        .map(|step| format!("{}\n", json!({ "step": step, "alp_chosen": -0.5 / f64::from(*step), "margin": 0.04 })))
        .collect();
    bench.artifact("probe", &[("size", "7B")], "measurements.jsonl", &lines);
    let params = json!({ "rows": ["size", "step"], "columns": ["alp_chosen", "margin"], "decimals": 3 });
    bench.run(&KIND, run, params).expect("a table");
    insta::assert_snapshot!("measurements", bench.read("table.txt"));
}

#[test]
fn two_numbers_for_one_cell_are_an_error_that_names_the_axis() {
    let mut bench = study();
    bench.scores("eval", &[("size", "3B"), ("data", "s1k"), ("task", "aime24"), ("seed", "1")], 1.0);
    bench.scores("eval", &[("size", "3B"), ("data", "new"), ("task", "aime24"), ("seed", "1")], 1.0);
    bench.scores("eval", &[("size", "3B"), ("data", "new"), ("task", "aime24"), ("seed", "2")], 1.0);
    bench.artifacts.remove(4);
    let problem = bench.run(&KIND, run, table1()).expect_err("a problem");
    assert_eq!(problem.code, "table::ambiguous");
    assert_eq!(problem.help, ["add `seed` to `rows`"]);
}

#[test]
fn names_that_nothing_has_are_errors() {
    for (key, value) in [("rows", json!(["sise"])), ("columns", json!(["tusk"])), ("value", json!("acuracy"))] {
        let mut bench = study();
        let mut params = table1();
        params[key] = value;
        let problem = bench.run(&KIND, run, params).expect_err("a problem");
        assert_eq!(problem.code, "table::unknown_name", "{key}");
        assert!(problem.notes[0].contains("axes: size, task, data"), "{:?}", problem.notes);
    }
}

#[test]
fn the_same_numbers_give_the_same_bytes() {
    let files = || {
        let mut bench = study();
        bench.run(&KIND, run, table1()).expect("a table");
        ["table.txt", "table.md", "table.csv", "table.tex", "table.json"].map(|name| bench.bytes(name))
    };
    assert_eq!(files(), files());
}

#[test]
fn several_metrics_share_the_columns_of_an_axis() {
    let mut bench = study();
    let params = json!({ "rows": ["stage", "size", "data"], "columns": ["task"], "value": ["accuracy", "total"],
                         "best": "min", "decimals": 0 });
    bench.run(&KIND, run, params).expect("a table");
    let header = bench.read("table.csv").lines().next().map(str::to_string);
    assert_eq!(header.as_deref(), Some("stage,size,data,aime24 accuracy,aime24 total,math500 accuracy,math500 total"));
    assert!(bench.read("table.md").contains("| base-eval | 3B | - | **0** |"), "{}", bench.read("table.md"));
}

#[test]
fn what_does_not_go_together_is_said_before_anything_runs() {
    let one = |params: Value| broken(&KIND, params).join("; ");
    assert_eq!(one(json!({ "rows": [], "columns": ["a"] })), "rows: a table needs something in its rows");
    assert_eq!(
        one(json!({ "rows": ["a"], "columns": ["b", "c"], "value": "accuracy" })),
        "columns: with `value`, `columns` names exactly one axis beside `mean`; these are 2"
    );
    assert_eq!(
        one(json!({ "rows": ["a"], "columns": ["a"], "value": "accuracy" })),
        "columns: `a` stands both in `rows` and in `columns`"
    );
    assert_eq!(
        one(json!({ "rows": ["a"], "columns": ["mean"] })),
        "columns: `mean` needs `value`: the metric of which it is the mean"
    );
    assert_eq!(
        one(json!({ "rows": ["a"], "columns": ["margin"], "interval": true })),
        "interval: only `accuracy` has an interval"
    );
    assert_eq!(one(json!({ "rows": ["a"], "columns": ["task", "mean"], "value": "accuracy" })), "");
}

#[test]
fn what_differs_from_the_row_compared_with_is_marked() {
    let mut bench = Bench::new();
    let base: Vec<bool> = (0..40).map(|i| i % 4 == 0).collect();
    // Ten more are right and none is lost; one more is right and one is lost.
    let better: Vec<bool> = (0..40).map(|i| i % 4 < 2).collect();
    let moved: Vec<bool> = (0..40).map(|i| (i % 4 == 0 && i > 0) || i == 1).collect();
    for (data, right) in [("base", &base), ("mixed", &better), ("s1k", &moved)] {
        bench.outcomes("eval", &[("data", data), ("task", "math500")], right);
    }
    let params =
        json!({ "rows": ["data"], "columns": ["task", "mean"], "value": "accuracy", "compare": { "data": "base" } });
    bench.run(&KIND, run, params).expect("a table");
    insta::assert_snapshot!("compared", bench.read("table.txt"));
    let json: Value = serde_json::from_str(&bench.read("table.json")).expect("JSON");
    let p = |row: usize| json["cells"][row]["values"]["math500"]["p"].as_f64();
    assert!((p(1).unwrap() - 2.0 / 1024.0).abs() <= 1e-12, "{json}");
    assert_eq!((p(0), p(2)), (None, Some(1.0)));
    assert!(bench.read("table.md").contains("**50.0**†"), "{}", bench.read("table.md"));
}

#[test]
fn a_comparison_with_a_row_that_is_not_there_is_refused() {
    let mut bench = study();
    let params =
        json!({ "rows": ["size", "data"], "columns": ["task"], "value": "accuracy", "compare": { "data": "nosuch" } });
    let problem = bench.run(&KIND, run, params).unwrap_err();
    assert!(problem.message.contains("no row has data=nosuch"), "{problem}");
    let params = with_defaults(
        &KIND,
        json!({ "rows": ["size"], "columns": ["task"], "value": "accuracy", "compare": { "data": "base" } }),
    );
    assert_eq!((KIND.rules)(&params)[0].key, "compare");
}

/// Accuracies near the middle and near the end, with intervals as Wilson gives them, and what was counted.
fn counted() -> Bench {
    let mut bench = Bench::new();
    for (data, task, accuracy, low, high, truncated, undecided) in [
        ("s1k", "aime24", 46.67, 30.2, 63.86, 4, 0),
        ("s1k", "math500", 46.6, 42.27, 50.98, 0, 3),
        ("r1k", "aime24", 96.67, 83.33, 99.41, 7, 0),
        ("r1k", "math500", 98.8, 97.4, 99.45, 31, 0),
    ] {
        let scores = json!({ "accuracy": accuracy, "ci_low": low, "ci_high": high, "truncated": truncated,
                             "undecided": undecided, "unparsed": 0, "total": if task == "aime24" { 30 } else { 500 } });
        bench.artifact("eval", &[("data", data), ("task", task)], "scores.json", &scores.to_string());
    }
    bench
}

#[test]
fn intervals_show_both_sides_where_one_width_would_hide_them() {
    let mut bench = counted();
    let params = json!({ "rows": ["data"], "columns": ["task", "mean"], "value": "accuracy", "interval": true,
                         "counts": true, "caption": "Both sides" });
    bench.run(&KIND, run, params).expect("a table");
    insta::assert_snapshot!("sides_text", bench.read("table.txt"));
    insta::assert_snapshot!("sides_markdown", bench.read("table.md"));
    insta::assert_snapshot!("sides_csv", bench.read("table.csv"));
    insta::assert_snapshot!("sides_latex", bench.read("table.tex"));
    let json: Value = serde_json::from_str(&bench.read("table.json")).expect("JSON");
    let cell = &json["cells"][1]["values"]["math500"];
    assert!((cell["low"].as_f64().expect("low") - 97.4).abs() <= 1e-9 && cell["truncated"] == 31, "{cell}");
}

#[test]
fn what_was_counted_is_noted_only_where_it_occurs_and_is_asked_for() {
    let params = |counts: bool| json!({ "rows": ["data"], "columns": ["task"], "value": ["accuracy", "total"], "counts": counts });
    let mut bench = counted();
    bench.run(&KIND, run, params(false)).expect("a table");
    assert!(!bench.read("table.txt").contains("truncated"));
    bench.run(&KIND, run, params(true)).expect("a table");
    let text = bench.read("table.txt");
    let notes = "truncated: 42 of 1060, most in r1k math500 (31 of 500), r1k aime24 (7 of 30)\n\
                 undecided: 3 of 1060, most in s1k math500 (3 of 500)\n";
    assert!(text.ends_with(notes) && !text.contains("unparsed"), "{text}");
    let header = bench.read("table.csv").lines().next().map(str::to_string);
    assert_eq!(
        header.as_deref(),
        Some(
            "data,aime24 accuracy,aime24 accuracy truncated,aime24 total,math500 accuracy,math500 accuracy truncated,\
             math500 accuracy undecided,math500 total"
        )
    );
}

#[test]
fn one_width_says_the_longer_side_up_to_a_quarter_apart() {
    for (low, high, shown) in [(46.0, 54.0, "±4.0"), (47.0, 54.0, "±4.0"), (47.1, 54.0, "−2.9 +4.0")] {
        let mut bench = Bench::new();
        let scores = json!({ "accuracy": 50.0, "ci_low": low, "ci_high": high });
        bench.artifact("eval", &[("task", "a")], "scores.json", &scores.to_string());
        let params = json!({ "rows": ["stage"], "columns": ["task"], "value": "accuracy", "interval": true });
        bench.run(&KIND, run, params).expect("a table");
        assert!(bench.read("table.txt").contains(&format!("50.0 {shown}\n")), "{}", bench.read("table.txt"));
    }
}

#[test]
fn an_interval_that_does_not_hold_its_number_is_not_shown() {
    let mut bench = Bench::new();
    let scores = json!({ "accuracy": 50.0, "ci_low": 51.0, "ci_high": 55.0 });
    bench.artifact("eval", &[("task", "a")], "scores.json", &scores.to_string());
    let params = json!({ "rows": ["stage"], "columns": ["task"], "value": "accuracy", "interval": true });
    bench.run(&KIND, run, params).expect("a table");
    assert!(bench.read("table.txt").ends_with("eval    50.0\n"), "{}", bench.read("table.txt"));
}
