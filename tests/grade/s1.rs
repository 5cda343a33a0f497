//! Scoring as s1 did it, against what its own code gave: executed vectors (`s1_compat_vectors.jsonl`) in the
//! folder that `PIPE_GRADING` names.

use pipe::grade::{Kind, s1};
use serde_json::Value;

#[test]
fn the_executed_vectors_come_out_as_the_original_scored_them() {
    let Some(folder) = std::env::var_os("PIPE_GRADING") else {
        eprintln!("PIPE_GRADING is not set: nothing was compared");
        return;
    };
    let text = std::fs::read_to_string(std::path::Path::new(&folder).join("s1_compat_vectors.jsonl")).unwrap();
    let wrong: Vec<String> = text.lines().enumerate().filter_map(|(at, line)| difference(at, line)).collect();
    eprintln!("{} vectors, {} differ", text.lines().count(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is different, if anything.
fn difference(at: usize, line: &str) -> Option<String> {
    let case: Value = serde_json::from_str(line).unwrap();
    let kind = if case["task"].as_str().unwrap().starts_with("gpqa") { Kind::Choice } else { Kind::Math };
    let texts = |value: &Value| -> Vec<String> {
        match value {
            Value::Array(list) => list.iter().map(|text| text.as_str().unwrap().to_string()).collect(),
            text => vec![text.as_str().unwrap().to_string()],
        }
    };
    let responses = texts(&case["results"][0]);
    let responses: Vec<&str> = responses.iter().map(String::as_str).collect();
    let gold = case["doc"]["answer"].as_str().unwrap();
    let replies = case.get("judge_reply").map(texts);
    let mut remaining = replies.clone().unwrap_or_default().into_iter();
    // One reply for all stands for as many as are asked for.
    let mut judge = |_: s1::Question| remaining.next().or_else(|| replies.as_ref()?.last().cloned()).unwrap();
    let judge: Option<&mut s1::Judge> = if replies.is_some() { Some(&mut judge) } else { None };
    let want = &case["output"];
    match s1::score(gold, &responses, kind, judge) {
        Err((_, crash)) => (want["error"] != crash.name()).then(|| format!("{at}: crash {crash:?}, not {want}")),
        Ok(scored) => {
            let right = |value: bool| Value::from(u8::from(value));
            let extracted = want["extracted_answers"].as_array().unwrap();
            let mut same = extracted.len() == scored.extracted.len()
                && extracted.iter().zip(&scored.extracted).all(|(want, got)| same_text(want.as_str().unwrap(), got))
                && want["exact_match"] == right(scored.matches[0]);
            if let Some(all) = want["exact_matches"].as_array() {
                same &= all.iter().zip(&scored.matches).all(|(want, got)| *want == right(*got));
            }
            for (name, want) in want.as_object().unwrap() {
                if let Some(n) = name.strip_prefix("cov@") {
                    same &= *want == right(scored.covered(n.parse().unwrap()));
                } else if let Some(n) = name.strip_prefix("maj@") {
                    same &= *want == right(scored.majority(n.parse().unwrap(), gold, kind));
                }
            }
            (!same).then(|| format!("{at}: {scored:?}, not {want}"))
        }
    }
}

/// The file cuts very long answers: `beginning…(3000)` stands for 3000 characters.
fn same_text(want: &str, got: &str) -> bool {
    match want.rsplit_once("…(") {
        Some((beginning, length)) if got.chars().count() > 200 => {
            got.starts_with(beginning) && length.trim_end_matches(')') == got.chars().count().to_string()
        }
        _ => want == got,
    }
}
