//! Confusion on labelled sets that are too large to ship: name their folder in `PIPE_GRADING`
//! (files `*.jsonl` with `gold`, `response`, `kind`, `correct`, and `convention` where a label rests
//! on one), and see the table with `--nocapture`.

use pipe::grade::{Kind, Verdict, grade};
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Default)]
struct Confusion {
    right: usize,
    undecided: usize,
    false_positive: usize,
    false_negative: usize,
}

impl Confusion {
    fn total(&self) -> usize {
        self.right + self.undecided + self.false_positive + self.false_negative
    }
}

#[test]
fn labelled_sets_are_graded_as_people_did() {
    let Some(folder) = std::env::var_os("PIPE_GRADING") else {
        eprintln!("PIPE_GRADING is not set: nothing was measured");
        return;
    };
    for name in ["grading.jsonl", "real_responses.jsonl"] {
        let path = std::path::Path::new(&folder).join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut sets: BTreeMap<&str, Confusion> = BTreeMap::new();
        let mut times = Vec::new();
        for line in text.lines() {
            let case: Value = serde_json::from_str(line).unwrap();
            let field = |name: &str| case[name].as_str().unwrap_or("");
            let kind = if field("kind") == "choice" { Kind::Choice } else { Kind::Math };
            let start = std::time::Instant::now();
            let graded = grade(field("gold"), field("response"), kind);
            times.push((start.elapsed(), field("id").to_string()));
            let correct = case["correct"].as_bool().unwrap();
            let convention = case["convention"].as_bool().unwrap_or(false);
            let sets_of_case = if convention { ["all", "by convention"] } else { ["all", "clear-cut"] };
            let fits = match graded.verdict {
                Verdict::Undecided => None,
                Verdict::Correct => Some(correct),
                Verdict::Wrong => Some(!correct),
            };
            for set in sets_of_case {
                let confusion = sets.entry(set).or_default();
                match fits {
                    None => confusion.undecided += 1,
                    Some(true) => confusion.right += 1,
                    Some(false) if correct => confusion.false_negative += 1,
                    Some(false) => confusion.false_positive += 1,
                }
            }
            if fits != Some(true) {
                let cut = |text: &str| text.chars().take(90).collect::<String>();
                eprintln!(
                    "{} {:?} (label {correct}{}) by {}/{}: gold {:?}, extracted {:?}",
                    field("id"),
                    graded.verdict,
                    if convention { ", convention" } else { "" },
                    graded.found,
                    graded.rule,
                    cut(field("gold")),
                    graded.extracted.as_deref().map(cut)
                );
            }
        }
        times.sort();
        let microseconds = |at: usize| times[at].0.as_secs_f64() * 1e6;
        for (set, c) in &sets {
            eprintln!(
                "{name} {set}: {} cases, right {} ({:.1} %), undecided {}, false positive {}, false negative {}",
                c.total(),
                c.right,
                100.0 * c.right as f64 / c.total() as f64,
                c.undecided,
                c.false_positive,
                c.false_negative
            );
        }
        eprintln!(
            "{name}: median {:.1} us, slowest {:.0} us ({})",
            microseconds(times.len() / 2),
            microseconds(times.len() - 1),
            times[times.len() - 1].1
        );
        let all = &sets["clear-cut"];
        assert_eq!(all.false_positive, 0, "credit where none is due, in {name}");
        assert!(all.right * 100 >= all.total() * if name.starts_with("real") { 99 } else { 97 }, "{name}");
    }
}
