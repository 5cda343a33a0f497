//! Counts over the samples of a task, and the scores they come to.

use super::spec::{Grader, Spec};
use crate::grade::{self, Graded, Kind, Verdict, stats};
use crate::random::Stream;
use crate::stage::context::Context;
use crate::stage::share::judge::Whom;
use crate::stage::share::thinking::Thought;
use serde_json::{Value, json};

/// What was answered.
pub struct Sample {
    /// As the grader sees it.
    pub response: String,
    /// Without what the answer was made to begin with.
    pub completion: String,
    pub finish: String,
    /// Where the server says it.
    pub tokens: Option<u64>,
    pub thought: Option<Thought>,
    /// Why there is none.
    pub missing: Option<String>,
}

/// Counts over samples, which come problem by problem.
#[derive(Default)]
pub struct Tally {
    /// Samples per problem.
    n: usize,
    /// Right samples of each problem.
    pub solved: Vec<u64>,
    /// The answers to the problem at hand, those that were found, and whether each is right.
    answers: Vec<(String, bool)>,
    /// Samples of the problem at hand.
    seen: usize,
    /// Problems whose most frequent answer is right.
    majority: u64,
    undecided: u64,
    unparsed: u64,
    truncated: u64,
    /// Samples whose number of tokens is known, and their tokens.
    counted: u64,
    tokens: u64,
    /// Of an endpoint, which may leave some out.
    missing: Option<u64>,
    /// Of thinking within a budget.
    thoughts: Option<Thoughts>,
    /// Of a judge.
    judge: Option<Judged>,
    /// Asked of the judge, and no verdict to be read.
    pub unread: u64,
}

#[derive(Default)]
struct Thoughts {
    tokens: u64,
    continued: u64,
    forced: u64,
}

#[derive(Default)]
struct Judged {
    /// Whether it is asked where the grader has decided too.
    beside: bool,
    total: u64,
    right: u64,
    both_right: u64,
    both_wrong: u64,
    only_grader_right: u64,
    only_judge_right: u64,
}

impl Tally {
    pub fn new(spec: &Spec) -> Tally {
        let asked = spec.judge.as_ref().map(|judge| judge.ask).filter(|whom| *whom != Whom::None);
        let judge = asked.map(|whom| {
            let beside = whom == Whom::All && spec.grader != Grader::S1;
            Judged { beside, ..Judged::default() }
        });
        let missing = spec.endpoint.is_some().then_some(0);
        let thoughts = spec.thinking.is_some().then(Thoughts::default);
        Tally { n: spec.n, missing, thoughts, judge, ..Tally::default() }
    }

    /// `by_grader`: the verdict before the judge's.
    pub fn count(&mut self, graded: &Graded, by_grader: Verdict, kind: Kind, sample: &Sample) {
        if self.seen == 0 {
            self.solved.push(0);
        }
        let right = graded.verdict == Verdict::Correct;
        *self.solved.last_mut().expect("pushed with the first sample") += u64::from(right);
        self.answers.extend(graded.extracted.clone().map(|answer| (answer, right)));
        self.undecided += u64::from(graded.verdict == Verdict::Undecided);
        self.unparsed += u64::from(graded.extracted.is_none() && sample.missing.is_none());
        self.truncated += u64::from(sample.finish == "length");
        self.counted += u64::from(sample.tokens.is_some());
        self.tokens += sample.tokens.unwrap_or(0);
        self.missing = self.missing.map(|missing| missing + u64::from(sample.missing.is_some()));
        if let (Some(thoughts), Some(thought)) = (&mut self.thoughts, &sample.thought) {
            thoughts.tokens += thought.tokens as u64;
            thoughts.continued += thought.continued;
            thoughts.forced += u64::from(thought.forced);
        }
        if let Some(judge) = self.judge.as_mut().filter(|_| graded.rule == "judge") {
            judge.total += 1;
            judge.right += u64::from(right);
            let both = match (by_grader, right) {
                (Verdict::Correct, true) => &mut judge.both_right,
                (Verdict::Correct, false) => &mut judge.only_grader_right,
                (Verdict::Wrong, true) => &mut judge.only_judge_right,
                (Verdict::Wrong, false) => &mut judge.both_wrong,
                (Verdict::Undecided, _) => &mut 0,
            };
            *both += 1;
        }
        self.seen += 1;
        if self.seen == self.n {
            self.majority += u64::from(self.most_say_right(kind));
            self.answers.clear();
            self.seen = 0;
        }
    }

    /// Whether the most frequent answer to the problem at hand is right. Answers are the same if the grader
    /// would take one for the other.
    fn most_say_right(&self, kind: Kind) -> bool {
        let answer = |at: usize| self.answers[at].0.as_str();
        let most = stats::majority(self.answers.len(), |i, j| grade::same(answer(i), answer(j), kind));
        most.is_some_and(|(_, first)| self.answers[first].1)
    }

    fn total(&self) -> u64 {
        (self.solved.len() * self.n) as u64
    }

    /// Says what the score does not.
    pub fn warn(&self, ctx: &Context) {
        let total = self.total();
        if self.undecided > 0 {
            ctx.progress.warn(&format!(
                "{} of {total} answers are undecided and count as wrong; see transcripts.jsonl",
                self.undecided
            ));
        }
        if self.unread > 0 {
            ctx.progress.warn(&format!("judgements without a verdict: {}; see judgements.jsonl", self.unread));
        }
        if let Some(missing) = self.missing.filter(|missing| *missing > 0) {
            ctx.progress.warn(&format!("{missing} of {total} answers are missing and count as wrong"));
        }
    }

    /// Rates in percent. With several samples per problem also pass@k, for k = 2, 4, 8, ... and all, and the
    /// rate of problems whose most frequent answer is right.
    pub fn scores(&self) -> Value {
        let problems = self.solved.len();
        let (total, correct) = (self.total(), self.solved.iter().sum::<u64>());
        let rate = correct as f64 / total as f64;
        let (low, high) = match self.n {
            1 => stats::wilson(correct, total),
            n => {
                let rates: Vec<f64> = self.solved.iter().map(|correct| *correct as f64 / n as f64).collect();
                let stream = Stream::named(0, &["bootstrap"]);
                stats::bootstrap(&rates, |at| stream.block(at))
            }
        };
        let mut scores = json!({
            "accuracy": 100.0 * rate,
            "correct": correct,
            "total": total,
            "problems": problems,
            "ci_low": 100.0 * low,
            "ci_high": 100.0 * high,
            "undecided_as_right": 100.0 * (correct + self.undecided) as f64 / total as f64,
            "truncated": self.truncated,
            "unparsed": self.unparsed,
            "undecided": self.undecided,
        });
        if self.counted > 0 {
            scores["mean_tokens"] = json!(self.tokens as f64 / self.counted as f64);
        }
        if let Some(missing) = self.missing {
            scores["missing"] = json!(missing);
        }
        if let Some(thoughts) = &self.thoughts {
            scores["mean_thinking_tokens"] = json!(thoughts.tokens as f64 / total as f64);
            scores["thinking_continued"] = json!(thoughts.continued);
            scores["thinking_forced"] = json!(thoughts.forced);
        }
        if let Some(judge) = &self.judge {
            scores["judged"] = json!(judge.total);
            scores["judge_right"] = json!(judge.right);
            scores["judge_unread"] = json!(self.unread);
            if judge.beside {
                scores["both_right"] = json!(judge.both_right);
                scores["both_wrong"] = json!(judge.both_wrong);
                scores["only_grader_right"] = json!(judge.only_grader_right);
                scores["only_judge_right"] = json!(judge.only_judge_right);
            }
        }
        if self.n > 1 {
            let n = self.n as u64;
            let powers = std::iter::successors(Some(2u64), |k| k.checked_mul(2)).take_while(|k| *k < n);
            for k in powers.chain([n]) {
                let one = |correct: &u64| stats::pass_at_k(n, *correct, k).expect("k is at most n");
                let mean = self.solved.iter().map(one).sum::<f64>() / problems as f64;
                scores[format!("pass@{k}")] = json!(100.0 * mean);
            }
            scores["majority"] = json!(100.0 * self.majority as f64 / problems as f64);
        }
        scores
    }
}
