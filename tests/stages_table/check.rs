use crate::{Bench, broken};
use pipe::stage::check::{KIND, run};
use serde_json::{Value, json};

fn scores() -> Bench {
    let mut bench = Bench::new();
    for (data, accuracy) in [("s1k", 50.0), ("r1k", 53.0)] {
        for task in ["aime24", "math500"] {
            bench.scores("eval", &[("data", data), ("task", task)], accuracy);
        }
    }
    bench
}

#[test]
fn a_claim_that_holds_leaves_a_verdict_with_its_uncertainty() {
    let mut bench = scores();
    let claim = "mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])";
    bench.run(&KIND, run, json!({ "claim": claim })).expect("a verdict");
    let verdict: Value = serde_json::from_str(&bench.read("verdict.json")).expect("JSON");
    assert_eq!(verdict["holds"], json!(true));
    assert_eq!(verdict["left"], json!(53.0));
    assert_eq!(verdict["difference"], json!(3.0));
    assert_eq!(verdict["interval"], json!(4.0)); // four cells of ± 4, each counted half
    assert_eq!(verdict["within_noise"], json!(true));
    assert_eq!(verdict["sentence"], json!("left 53, right 50, difference 3 ± 4 (95 %): within noise"));
}

#[test]
fn a_claim_that_does_not_hold_fails_the_stage_or_warns() {
    let claim = json!("mean(accuracy[data=s1k]) > mean(accuracy[data=r1k]) + 5");
    let problem = scores().run(&KIND, run, json!({ "claim": claim })).expect_err("a problem");
    assert_eq!(problem.code, "check::does_not_hold");
    assert_eq!(problem.exit, pipe::problem::Exit::Failed);
    let mut bench = scores();
    bench.run(&KIND, run, json!({ "claim": claim, "severity": "warn" })).expect("a verdict");
    let verdict: Value = serde_json::from_str(&bench.read("verdict.json")).expect("JSON");
    assert_eq!(verdict["holds"], json!(false));
    assert_eq!(bench.warnings.0.lock().expect("one thread").len(), 1);
}

#[test]
fn a_text_that_is_no_claim_is_refused_before_anything_runs() {
    assert_eq!(
        broken(&KIND, json!({ "claim": "mean(accuracy[data=r1k]) ? 3" })),
        ["claim: expected `>`, `>=`, `<`, `<=`, `==`, `+` or `-`, found `?` at character 26"]
    );
}
