use super::*;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn reading(data: &str, accuracy: f64, half: f64) -> Reading {
    let fields = json!({ "accuracy": accuracy, "ci_low": accuracy - half, "ci_high": accuracy + half });
    let Value::Object(fields) = fields else { return Reading::empty() };
    Reading {
        cell: format!("eval[data={data}]"),
        stage: "eval".into(),
        axes: vec![("data".into(), data.into())],
        fields,
        outcomes: None,
    }
}

/// With one sample of each problem.
fn solved(mut reading: Reading, right: &[bool]) -> Reading {
    let outcomes = right.iter().enumerate().map(|(at, right)| (format!("p{at}"), (u64::from(*right), 1)));
    reading.outcomes = Some(outcomes.collect::<readings::Outcomes>().into());
    reading
}

impl Reading {
    fn empty() -> Reading {
        Reading { cell: String::new(), stage: String::new(), axes: vec![], fields: Map::new(), outcomes: None }
    }
}

fn judge(claim: &str, readings: &[Reading]) -> Verdict {
    Claim::parse(claim).expect("a claim").judge(readings).expect("a verdict")
}

#[test]
fn a_difference_larger_than_its_interval_is_not_noise() {
    let readings = [reading("r1k", 60.0, 3.0), reading("s1k", 50.0, 4.0)];
    let verdict = judge("mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])", &readings);
    assert!(verdict.holds);
    assert_eq!(verdict.half_width, Some(5.0)); // sqrt(3^2 + 4^2)
    assert_eq!(verdict.within_noise(), Some(false));
    assert_eq!(verdict.to_string(), "left 60, right 50, difference 10 ± 5 (95 %)");
}

#[test]
fn cells_that_solve_the_same_problems_differ_with_less_noise() {
    let (r1k, s1k) = (reading("r1k", 60.0, 3.0), reading("s1k", 50.0, 4.0));
    let same = [true, true, false, false, true, false, true, false];
    let half = |one: &[bool], other: &[bool]| {
        let readings = [solved(r1k.clone(), one), solved(s1k.clone(), other)];
        judge("mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])", &readings).half_width.unwrap()
    };
    assert!((half(&same, &same) - 1.0).abs() <= 1e-12); // 4 - 3: fully correlated
    let opposite = same.map(|right| !right);
    assert!((half(&same, &opposite) - 7.0).abs() <= 1e-12);
    // Other problems, or no variation: independent.
    assert_eq!(half(&same, &same[..4]), 5.0);
    assert_eq!(half(&same, &[true; 8]), 5.0);
}

#[test]
fn a_small_difference_is_said_to_be_noise() {
    let readings = [reading("r1k", 51.0, 3.0), reading("s1k", 50.0, 4.0)];
    let verdict = judge("mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])", &readings);
    assert!(verdict.holds);
    assert!(verdict.to_string().ends_with("within noise"), "{verdict}");
}

#[test]
fn a_reading_on_both_sides_cancels() {
    let readings = [reading("r1k", 60.0, 3.0)];
    let verdict = judge("mean(accuracy) >= max(accuracy) - 0.5", &readings);
    assert!(verdict.holds);
    assert_eq!(verdict.half_width, Some(0.0));
}

#[test]
fn minus_binds_to_its_term_and_brackets_group() {
    let readings = [reading("r1k", 60.0, 3.0), reading("s1k", 50.0, 4.0)];
    assert!(judge("10 - (4 - 1) == 7", &readings).holds);
    assert!(judge("max(accuracy) - min(accuracy) == 10", &readings).holds);
    assert!(judge("count(accuracy) == 2", &readings).holds);
    assert!(judge("--1.5e1 == 15", &readings).holds);
    assert!(!judge("- 1 > 0", &readings).holds);
}

#[test]
fn without_an_interval_the_uncertainty_is_not_invented() {
    let mut bare = reading("r1k", 60.0, 3.0);
    bare.fields.remove("ci_low");
    assert_eq!(judge("mean(accuracy) > 0", &[bare]).half_width, None);
    assert_eq!(judge("1 > 0", &[]).half_width, None);
}

#[test]
fn a_claim_that_is_none_says_where() {
    for (claim, wrong) in [
        ("", "expected a number or mean, min, max, count, found the end at character 1"),
        ("mean(accuracy)", "expected `>`, `>=`, `<`, `<=`, `==`, `+` or `-`, found the end at character 15"),
        ("avg(accuracy) > 1", "`avg` is none of mean, min, max, count at character 1"),
        ("mean(accuracy[data]) > 1", "expected `=`, found `]` at character 19"),
        ("mean(accuracy[data=]) > 1", "expected the value of the axis, found `]` at character 20"),
        ("mean(accuracy) > 1 2", "expected the end, `+` or `-`, found `2` at character 20"),
        ("1 > 1.2.3", "`1.2.3` is not a number at character 5"),
        ("1 > 1e999", "`1e999` is not a number at character 5"),
    ] {
        assert_eq!(Claim::parse(claim).map_err(|wrong| wrong.to_string()), Err(wrong.to_string()), "{claim}");
    }
    assert!(Claim::parse(&format!("{} > 1", "(".repeat(100_000))).is_err());
}

#[test]
fn an_absent_metric_and_an_empty_selection_are_errors() {
    let readings = [reading("r1k", 60.0, 3.0)];
    let code = |claim: &str| Claim::parse(claim).expect("a claim").judge(&readings).err().map(|p| p.code);
    assert_eq!(code("mean(f1) > 0"), Some("check::no_number"));
    assert_eq!(code("mean(accuracy[data=x]) > 0"), Some("check::nothing_selected"));
    assert_eq!(code("count(accuracy[data=x]) == 0"), None);
}

fn term() -> impl Strategy<Value = Term> {
    let pair = ("[a-z][a-z_]{0,5}", "[ -!#-~]{1,6}");
    let aggregate = (
        prop_oneof![Just(Function::Mean), Just(Function::Min), Just(Function::Max), Just(Function::Count)],
        "[a-z][a-z0-9_]{0,8}",
        proptest::collection::vec(pair, 0..3),
    )
        .prop_map(|(function, metric, only)| Term::Aggregate(Aggregate { function, metric, only }));
    let leaf = prop_oneof![(0u32..100_000).prop_map(|n| Term::Number(f64::from(n) / 64.0)), aggregate];
    leaf.prop_recursive(3, 12, 3, |inner| {
        proptest::collection::vec((prop_oneof![Just(1.0), Just(-1.0)], inner), 1..3)
            .prop_map(|terms| Term::Group(Sum(terms)))
    })
}

fn sum() -> impl Strategy<Value = Sum> {
    proptest::collection::vec((prop_oneof![Just(1.0), Just(-1.0)], term()), 1..4).prop_map(Sum)
}

fn claim() -> impl Strategy<Value = Claim> {
    let comparison = prop_oneof![
        Just(Comparison::Greater),
        Just(Comparison::GreaterEqual),
        Just(Comparison::Less),
        Just(Comparison::LessEqual),
        Just(Comparison::Equal)
    ];
    (sum(), comparison, sum()).prop_map(|(left, comparison, right)| Claim { left, comparison, right })
}

proptest! {
    #[test]
    fn a_claim_reads_back_as_it_was_written(claim in claim()) {
        prop_assert_eq!(Claim::parse(&claim.to_string()), Ok(claim));
    }

    #[test]
    fn no_text_breaks_the_parser(text in "[\\PC]{0,40}|[a-z()\\[\\]=<>+\\-.0-9 \",]{0,40}") {
        if let Err(wrong) = Claim::parse(&text) {
            prop_assert!(wrong.column <= text.chars().count() + 1);
        }
    }
}
