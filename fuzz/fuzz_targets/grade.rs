//! Grading: a gold answer and a response, in every kind, each in bounded time.
//!
//! Input: gold answer; beginning of the response; a unit that is repeated until the response has 60,000 bytes;
//! end of the response. The unit finds work that grows faster than the text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::grade::{Graded, Kind, Verdict, check_gold, grade, judge, s1, same};
use pipe::measure::process_cpu_s;

const LONGEST: usize = 60_000;
/// Longer responses are graded once, for speed.
const SHORT: usize = 1_000;
/// Seconds of processor time for one grading: the 20 ms that are promised, and as much again as instrumentation costs.
const TIME_S: f64 = 0.5;

fuzz_target!(init: pipe_fuzz::start("grade"), |input: &[u8]| {
    let [gold, head, unit, tail] = pipe_fuzz::parts(input).map(pipe_fuzz::text);
    let room = LONGEST.saturating_sub(head.len() + tail.len());
    let times = if unit.is_empty() { 0 } else { room / unit.len() };
    let response = format!("{head}{}{tail}", unit.repeat(times));
    for kind in [Kind::Math, Kind::Number, Kind::Choice] {
        let graded = in_time(|| grade(&gold, &response, kind));
        if response.len() <= SHORT {
            assert_eq!(graded, grade(&gold, &response, kind), "a grade is a function of its texts");
        }
        coherent(&graded);
        let _ = in_time(|| check_gold(&gold, kind));
        coherent(&in_time(|| s1::grade(&gold, &response, kind)));
        assert!(same(&gold, &gold, kind));
    }
    let (verdict, rule) = in_time(|| judge(&gold, &response));
    assert!(!rule.is_empty() && (gold.trim() != response.trim() || verdict == Verdict::Correct));
    assert_eq!(judge(&gold, &gold).0, Verdict::Correct, "the gold answer is its own answer");
});

/// Without an answer nothing is right, and every verdict has a rule.
fn coherent(graded: &Graded) {
    assert!(!graded.rule.is_empty() && !graded.found.is_empty());
    assert_eq!(graded.extracted.is_none(), graded.found == "none");
    assert!(graded.extracted.is_some() || graded.verdict == Verdict::Wrong);
}

/// By processor time, so that a busy machine is no finding; a second try forgives the first use of a table.
fn in_time<T>(work: impl Fn() -> T) -> T {
    let mut last = 0.0;
    for _ in 0..2 {
        let began = process_cpu_s();
        let made = work();
        last = process_cpu_s() - began;
        if last <= TIME_S {
            return made;
        }
    }
    panic!("it takes {last:.2} s");
}
