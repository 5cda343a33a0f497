//! A model that says whether an answer is right: for the answers that no rule decides, or for all of them.
//!
//! It is shown the question, the gold answer, the answer that was found and the end of the response, each between
//! lines with a mark that is made of their digest and stands in none of them: what an answer says about itself, or to
//! the judge, stays inside. Its reply is read strictly. One that cannot be read is asked for again; if none can, the
//! answer stays what it was. Temperature is 0.
//!
//! Replies are journalled like all others (`remote`, `decoding`), so a judgement is paid for once and can be repeated
//! with nobody there. `judgements.jsonl` has every one of them.

use crate::data::Record;
use crate::digest::{Digest, Encoder};
use crate::grade::{Graded, Kind, Verdict, extract, s1};
use crate::manifest::spec::{ArtifactType, Key, Type};
use crate::problem::Problem;
use crate::remote::{Ask, Bill, Completion, Endpoint, Finish};
use crate::stage::context::Context;
use crate::stage::forecast::completions::CompletionForecast;
use crate::stage::share::asking;
use crate::stage::share::asking::{Asking, Taken};
use crate::stage::share::decoding::{self, Decoding};
use crate::stage::share::inputs::{self, Storage};
use crate::stage::share::template::Template;
use crate::stage::share::training;
use crate::stage::share::turns::{Reply, Request, Session};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;

pub const KEY: Key = Key::optional(
    "judge",
    Type::Table(&[
        Key::either("model", "endpoint", Type::Ref(&[ArtifactType::Model]), "The model that judges, on this machine."),
        Key::either("endpoint", "model", Type::Endpoint, "The server that judges: an `[endpoint.NAME]`."),
        Key::default(
            "ask",
            Type::Choice(&["undecided", "all", "none"]),
            "\"undecided\"",
            "About which answers: those that no rule decides; all that were found, and then its verdicts count and the grader's are compared with them; none, and then the server need not be there and the score is an interval, from `accuracy` to `undecided_as_right`.",
        ),
        Key::optional(
            "prompt",
            Type::Str,
            "What it is asked: a minijinja template over `question`, `gold`, `answer`, `response` (its end) and `mark` (a word that stands in none of them); with `grader = \"s1\"` over `options` (the gold answer first; none for choices), `attempt`, `question`, `gold` and `mark`. Absent, and no `prompt_file`: a prompt of our own.",
        ),
        Key::optional("prompt_file", Type::Source(&["path"]), "The same from a file."),
        Key::default(
            "max_tokens",
            training::COUNT,
            "1024",
            "Longest reply, in tokens, thinking included. One that is cut off decides nothing.",
        ),
        Key::default(
            "max_attempts",
            Type::Int { min: 1, max: 100 },
            "3",
            "How many replies are asked for until one can be read. Then the answer stays undecided.",
        )
        .with("endpoint"),
        Key::default(
            "max_chars",
            Type::Int { min: 100, max: 1_000_000 },
            "4000",
            "How much of an attempt it is shown, in characters: the answer, and before it as much of the response's end as there is room for. A longer answer is not judged.",
        ),
        Key::default("seed", Type::Int { min: 0, max: i64::MAX }, "0", "Sent to servers that take one."),
        Key::default(
            "on_missing",
            Type::Choice(&["error", "undecided"]),
            "\"error\"",
            "What happens to an answer about which no reply comes at all: the stage fails, or it stays undecided.",
        )
        .with("endpoint"),
        decoding::DTYPE,
        decoding::BATCH,
    ]),
    "Another model that decides about answers. Absent: what no rule decides stays undecided, and counts as wrong in `accuracy` and as right in `undecided_as_right`.",
);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    endpoint: Option<Endpoint>,
    pub ask: Whom,
    prompt: Option<String>,
    /// As written; the file itself comes through the context.
    prompt_file: Option<String>,
    max_tokens: usize,
    #[serde(default = "once")]
    max_attempts: u64,
    max_chars: usize,
    seed: u64,
    #[serde(default)]
    on_missing: OnMissing,
    #[serde(default)]
    dtype: Storage,
    #[serde(default)]
    batch: usize,
}

impl Spec {
    /// What its judgements need and ask, one of each.
    pub fn forecast(&self) -> CompletionForecast {
        /// Bytes of a prompt of our own, generously.
        const PROMPT: usize = 4096;
        CompletionForecast {
            decoding: self.decoding(),
            endpoint: self.endpoint.clone().filter(|_| self.ask != Whom::None),
            // It is shown the question and an attempt, whose characters take four bytes at most.
            asked_bytes: self.prompt.as_ref().map_or(0, String::len) + 4 * self.max_chars + PROMPT,
            asked_in_file: self.prompt_file.is_some(),
            n: 1,
            tries: self.max_attempts,
            ..CompletionForecast::default()
        }
    }

    fn decoding(&self) -> Decoding {
        Decoding {
            max_tokens: self.max_tokens,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: self.seed,
            dtype: self.dtype,
            batch: self.batch,
            ..Decoding::default()
        }
    }
}

fn once() -> u64 {
    1
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Whom {
    Undecided,
    All,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OnMissing {
    #[default]
    Error,
    Undecided,
}

/// An answer to be judged.
pub struct Case<'c> {
    pub id: &'c str,
    pub sample: usize,
    pub kind: Kind,
    pub question: &'c str,
    pub gold: &'c str,
    pub response: &'c str,
    /// There is none, and nothing to be judged.
    pub missing: bool,
}

/// What the judge has said, and what that took.
pub struct Judgements {
    /// Of `judgements.jsonl`, in the order of the cases.
    pub lines: Vec<Value>,
    /// Asked, and no verdict to be read.
    pub unread: u64,
    pub bill: Option<Bill>,
}

/// One question to the judge, and what is to be read in its reply.
#[derive(Clone)]
struct Prompt {
    text: String,
    reads: Reads,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reads {
    Verdict,
    /// The number of one option of this many, or -1.
    Option(usize),
    /// A to D, or -1.
    Letter,
}

/// What came of it.
#[derive(Debug, Clone)]
struct Said {
    reply: Option<String>,
    /// `correct` or `wrong`, a number, a letter; or why there is none.
    read: Result<String, String>,
    attempts: u64,
    /// As the server calls it.
    model: Option<String>,
}

pub struct Judge<'a> {
    ctx: &'a Context<'a>,
    spec: &'a Spec,
    template: Template,
}

impl<'a> Judge<'a> {
    /// With its prompt proven, so that nothing is found wrong with it after the answers are made.
    pub fn new(ctx: &'a Context<'a>, spec: &'a Spec, as_s1: bool) -> Result<Judge<'a>, Problem> {
        let template = match (&spec.prompt, ctx.sources.get("judge.prompt_file")) {
            (Some(text), _) => Template::new("judge.prompt", text)?,
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| Problem::io("eval::judge_prompt", "read", path, &error))?;
                Template::new("judge.prompt_file", &text)?
            }
            (None, None) if spec.prompt_file.is_some() => {
                return Err(Problem::new("eval::judge_prompt", "`judge.prompt_file` was not resolved to a file"));
            }
            (None, None) if as_s1 => Template::new("judge.prompt", include_str!("prompts/judge-s1.txt"))?,
            (None, None) => Template::new("judge.prompt", include_str!("prompts/judge.txt"))?,
        };
        let judge = Judge { ctx, spec, template };
        let tried = if as_s1 {
            let letters = judge.option_prompt("q", "g", &[], "a").map(|_| ());
            letters.and_then(|()| judge.option_prompt("q", "g", &["g".to_string()], "a").map(|_| ()))
        } else {
            judge.verdict_prompt("q", "g", "a", "r").map(|_| ())
        };
        tried.map(|()| judge)
    }

    /// Decides about `graded`, in place, as the spec says whom about.
    pub fn decide(&self, cases: &[Case], graded: &mut [Graded]) -> Result<Judgements, Problem> {
        let wanted = |graded: &Graded| self.spec.ask == Whom::All || graded.verdict == Verdict::Undecided;
        let (mut asked, mut prompts, mut lines) = (Vec::new(), Vec::new(), Vec::new());
        for (at, (case, graded)) in cases.iter().zip(graded.iter()).enumerate() {
            // Where no answer was found there is none to be judged.
            let Some(answer) = graded.extracted.as_deref().filter(|_| wanted(graded)) else { continue };
            if answer.chars().count() > self.spec.max_chars {
                lines.push((at, line(case, Some(answer), &Said::too_long())));
                continue;
            }
            asked.push(at);
            let response = self.end_of(case.response, answer);
            prompts.push(self.verdict_prompt(case.question, case.gold, answer, &response)?);
        }
        let (said, bill) = self.with_way(&mut |say| say(&prompts))?;
        self.all_came(asked.iter().map(|&at| &cases[at]).zip(&said))?;
        for (&at, said) in asked.iter().zip(&said) {
            lines.push((at, line(&cases[at], graded[at].extracted.as_deref(), said)));
            let verdict = match said.read.as_deref() {
                Ok("correct") => Verdict::Correct,
                Ok(_) => Verdict::Wrong,
                Err(_) => continue,
            };
            (graded[at].verdict, graded[at].rule) = (verdict, "judge");
        }
        lines.sort_by_key(|(at, _)| *at);
        let lines: Vec<Value> = lines.into_iter().map(|(_, line)| line).collect();
        Ok(Judgements { unread: unread(&lines), lines, bill })
    }

    /// The same for answers scored as s1 did it, `n` samples a problem: what is asked about one depends on what
    /// came of those before it.
    pub fn decide_as_s1(&self, cases: &[Case], n: usize, graded: &mut [Graded]) -> Result<Judgements, Problem> {
        let problems: Vec<&[Case]> = cases.chunks(n).collect();
        let (scored, bill) = self.with_way(&mut |say| self.rounds(&problems, say))?;
        let every = cases.iter().zip(scored.iter().flatten());
        self.all_came(every.filter_map(|(case, scored)| Some((case, scored.said.as_ref()?))))?;
        let mut lines = Vec::new();
        for (case, (graded, scored)) in cases.iter().zip(graded.iter_mut().zip(scored.iter().flatten())) {
            if case.missing {
                continue;
            }
            let Some(said) = &scored.said else {
                *graded = scored.graded.clone();
                continue;
            };
            *graded = match said.read {
                Ok(_) => Graded { rule: "judge", ..scored.graded.clone() },
                // What the original does with such a reply could be to its credit.
                Err(_) => Graded { verdict: Verdict::Undecided, ..scored.graded.clone() },
            };
            let mut line = line(case, scored.attempt.as_deref(), said);
            line["verdict"] = said.read.is_ok().then(|| graded.verdict.name()).into();
            line["options"] = json!(scored.options);
            lines.push(line);
        }
        Ok(Judgements { unread: unread(&lines), lines, bill })
    }

    /// All samples of all problems, as many rounds of questions as a problem has samples at most.
    fn rounds(&self, problems: &[&[Case]], say: &mut Say) -> Result<Vec<Vec<Scored>>, Problem> {
        let mut known: HashMap<String, Said> = HashMap::new();
        let mut scored: Vec<Option<Vec<Scored>>> = problems.iter().map(|_| None).collect();
        loop {
            let mut wanted: Vec<Prompt> = Vec::new();
            for (problem, scored) in problems.iter().zip(&mut scored) {
                if scored.is_none() {
                    *scored = self.scored(problem, &known, &mut wanted)?;
                }
            }
            if wanted.is_empty() {
                return Ok(scored.into_iter().flatten().collect());
            }
            let said = say(&wanted)?;
            known.extend(wanted.into_iter().map(|prompt| prompt.text).zip(said));
        }
    }

    /// One problem with the replies there are; `None` if it wants others.
    fn scored(
        &self,
        problem: &[Case],
        known: &HashMap<String, Said>,
        wanted: &mut Vec<Prompt>,
    ) -> Result<Option<Vec<Scored>>, Problem> {
        let Some(first) = problem.first() else { return Ok(Some(Vec::new())) };
        let mut samples: Vec<Scored> = problem.iter().map(|_| Scored::default()).collect();
        // Those that are there and do not end the original program.
        let mut left: Vec<usize> = (0..problem.len()).filter(|&at| !problem[at].missing).collect();
        loop {
            let (mut complete, mut failed) = (true, None);
            let responses: Vec<&str> = left.iter().map(|&at| problem[at].response).collect();
            let mut judge = |question: s1::Question| {
                let (at, options, attempt) = match question {
                    s1::Question::Options { sample, options, attempt } => (left[sample], options, attempt),
                    s1::Question::Letter { sample, attempt } => (left[sample], &[] as &[String], attempt),
                };
                let sample = &mut samples[at];
                (sample.options, sample.attempt) = (options.to_vec(), Some(attempt.to_string()));
                if attempt.chars().count() > self.spec.max_chars {
                    sample.said = Some(Said::too_long());
                    return "-1".to_string();
                }
                match self.option_prompt(first.question, first.gold, options, attempt) {
                    Err(problem) => failed = Some(problem),
                    Ok(prompt) => match known.get(&prompt.text) {
                        Some(said) => {
                            sample.said = Some(said.clone());
                            return said.read.clone().unwrap_or_else(|_| "-1".into());
                        }
                        // Further options depend on the reply, letters do not.
                        None if complete || prompt.reads == Reads::Letter => {
                            complete = false;
                            if !wanted.iter().any(|known| known.text == prompt.text) {
                                wanted.push(prompt);
                            }
                        }
                        None => {}
                    },
                }
                "-1".to_string()
            };
            let scored = s1::score(first.gold, &responses, first.kind, Some(&mut judge));
            if let Some(problem) = failed {
                return Err(problem);
            }
            match scored {
                Err((sample, _)) => {
                    let at = left.remove(sample);
                    samples[at] = Scored::default();
                    samples[at].graded = s1::grade(first.gold, problem[at].response, first.kind);
                    if left.is_empty() {
                        return Ok(Some(samples));
                    }
                }
                Ok(_) if !complete => return Ok(None),
                Ok(scored) => {
                    for ((&at, extracted), right) in left.iter().zip(scored.extracted).zip(scored.matches) {
                        let verdict = if right { Verdict::Correct } else { Verdict::Wrong };
                        samples[at].graded = Graded { verdict, extracted: Some(extracted), found: "s1", rule: "s1" };
                    }
                    return Ok(Some(samples));
                }
            }
        }
    }

    /// Hands `rounds` the way to ask, and says what it took.
    fn with_way<T>(
        &self,
        rounds: &mut dyn FnMut(&mut Say) -> Result<T, Problem>,
    ) -> Result<(T, Option<Bill>), Problem> {
        let (ctx, spec) = (self.ctx, self.spec);
        let decoding = spec.decoding();
        if let Some(endpoint) = &spec.endpoint {
            let mut asking = Asking::new(ctx, endpoint)?;
            let done = rounds(&mut |prompts| by_endpoint(&mut asking, &decoding, spec.max_attempts, prompts))?;
            return Ok((done, Some(asking.bill())));
        }
        let tokenizer = inputs::tokenizer(ctx, "judge.model")?;
        let mut session = Session::new(ctx, "judge.model", &decoding, &tokenizer)?;
        Ok((rounds(&mut |prompts| by_model(&mut session, prompts))?, None))
    }

    fn verdict_prompt(&self, question: &str, gold: &str, answer: &str, response: &str) -> Result<Prompt, Problem> {
        let fields = [("question", question), ("gold", gold), ("answer", answer), ("response", response)];
        let mut record: Record = fields.iter().map(|(name, text)| (name.to_string(), Value::from(*text))).collect();
        record.insert("mark".into(), mark(fields.iter().map(|(_, text)| *text)).into());
        Ok(Prompt { text: self.rendered(&record)?, reads: Reads::Verdict })
    }

    fn option_prompt(&self, question: &str, gold: &str, options: &[String], attempt: &str) -> Result<Prompt, Problem> {
        let mark = mark([question, gold, attempt].into_iter().chain(options.iter().map(String::as_str)));
        let record = json!({
            "question": question, "gold": gold, "options": options, "attempt": attempt, "mark": mark,
        });
        let Value::Object(record) = record else { return Err(Problem::new("eval::judge_prompt", "no fields")) };
        let reads = if options.is_empty() { Reads::Letter } else { Reads::Option(options.len()) };
        Ok(Prompt { text: self.rendered(&record)?, reads })
    }

    fn rendered(&self, record: &Record) -> Result<String, Problem> {
        self.template.render(record).map_err(|what| {
            Problem::new("eval::judge_prompt", format!("the judge's prompt cannot be made: {what}"))
                .help("look at `judge.prompt` or `judge.prompt_file`")
        })
    }

    /// The end of what is graded of a response, as long as there is room for beside the answer.
    fn end_of(&self, response: &str, answer: &str) -> String {
        let segment = extract::segment(response).unwrap_or("");
        let room = self.spec.max_chars - answer.chars().count();
        let from = segment.char_indices().rev().take(room).last().map_or(segment.len(), |(at, _)| at);
        segment[from..].to_string()
    }

    /// `Err` if there are some about whom no reply came, and that is no way to go on.
    fn all_came<'c>(&self, said: impl Iterator<Item = (&'c Case<'c>, &'c Said)>) -> Result<(), Problem> {
        if self.spec.on_missing == OnMissing::Undecided {
            return Ok(());
        }
        let mut asked = 0;
        let missing: Vec<String> = said
            .inspect(|_| asked += 1)
            .filter(|(_, said)| said.reply.is_none() && said.attempts > 0)
            .map(|(case, said)| {
                let why = said.read.as_ref().err().map_or("", String::as_str);
                format!("sample {} of `{}`: {why}", case.sample, case.id)
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut problem =
            Problem::new("eval::judge_missing", format!("{} of {asked} judgements are missing", missing.len()));
        problem.notes = missing.into_iter().take(5).collect();
        Err(problem
            .help("run again: the answers and the judgements that came are kept")
            .help("`judge.on_missing = \"undecided\"` goes on without them"))
    }
}

/// Asks the judge.
type Say<'s> = dyn FnMut(&[Prompt]) -> Result<Vec<Said>, Problem> + 's;

/// A sample scored as s1 did it, and what the judge was asked about it.
#[derive(Clone)]
struct Scored {
    graded: Graded,
    options: Vec<String>,
    attempt: Option<String>,
    said: Option<Said>,
}

impl Default for Scored {
    fn default() -> Scored {
        let graded = Graded { verdict: Verdict::Wrong, extracted: None, found: "none", rule: "s1" };
        Scored { graded, options: Vec::new(), attempt: None, said: None }
    }
}

impl Said {
    fn too_long() -> Said {
        Said { reply: None, read: Err("longer than `max_chars`: not asked".into()), attempts: 0, model: None }
    }
}

fn by_endpoint(
    asking: &mut Asking,
    decoding: &Decoding,
    attempts: u64,
    prompts: &[Prompt],
) -> Result<Vec<Said>, Problem> {
    let ask =
        |prompt: &Prompt| Ask { messages: asking::messages(prompt.text.as_str().into(), None), sample: 0, attempt: 0 };
    let asks = prompts.iter().map(ask).collect();
    let reads: Vec<Reads> = prompts.iter().map(|prompt| prompt.reads).collect();
    asking.ask(asks, &decoding.remotely(), attempts, "judgements", &|at, completion, attempt| {
        let completion: &Completion = match completion {
            Ok(completion) => completion,
            Err(why) => {
                let read = Err(format!("no reply: {why}"));
                return Taken::Final(Said { reply: None, read, attempts: attempt, model: None });
            }
        };
        let read = match completion.refused() {
            Some(why) => Err(why),
            None => read(&completion.answer, completion.finish == Finish::Length, reads[at]),
        };
        let unread = read.is_err();
        let (reply, model) = (Some(completion.answer.clone()), completion.model.clone());
        let said = Said { reply, read, attempts: attempt, model };
        if unread { Taken::Again(said) } else { Taken::Final(said) }
    })
}

/// A model of this machine says at temperature 0 the same every time: it is asked once.
fn by_model(session: &mut Session, prompts: &[Prompt]) -> Result<Vec<Said>, Problem> {
    let request = |prompt: &Prompt| {
        let ids = session.decoding.prompt(session.tokenizer, prompt.text.as_str().into(), None)?;
        Ok(Request { id: "judge".into(), sample: 0, ids, budget: 0 })
    };
    let requests: Vec<Request> = prompts.iter().map(request).collect::<Result<_, Problem>>()?;
    session.fits(&requests).map_err(|problem| problem.note("`max_tokens` is that of the judge"))?;
    let replies = session.answers(&requests, "judgements")?;
    let said = |(prompt, reply): (&Prompt, Reply)| {
        let answer = reply.text.rsplit_once("</think>").map_or(reply.text.as_str(), |(_, answer)| answer);
        let read = read(answer, reply.cut, prompt.reads);
        Said { read, reply: Some(reply.text), attempts: 1, model: None }
    };
    Ok(prompts.iter().zip(replies).map(said).collect())
}

/// A line of `judgements.jsonl`.
fn line(case: &Case, extracted: Option<&str>, said: &Said) -> Value {
    json!({
        "id": case.id,
        "sample": case.sample,
        "question": Digest::of(case.question.as_bytes()).hex(),
        "gold": case.gold,
        "extracted": extracted,
        "verdict": said.read.as_ref().ok(),
        "why_none": said.read.as_ref().err(),
        "reply": said.reply,
        "attempts": said.attempts,
        "model": said.model,
    })
}

fn unread(lines: &[Value]) -> u64 {
    lines.iter().filter(|line| line["verdict"].is_null() && line["attempts"] != 0).count() as u64
}

/// A word that stands in none of these texts: whoever wrote one cannot have known its digest.
fn mark<'t>(texts: impl Iterator<Item = &'t str> + Clone) -> String {
    let mut number = 0u64;
    loop {
        let mut encoder = Encoder::new("judge's mark");
        for text in texts.clone() {
            encoder.field(text.as_bytes());
        }
        let mark = encoder.field(&number.to_le_bytes()).finish().hex()[..16].to_string();
        if !texts.clone().any(|text| text.contains(&mark)) {
            return mark;
        }
        number += 1;
    }
}

/// What a reply says, if it says it as it was told to.
fn read(reply: &str, cut: bool, reads: Reads) -> Result<String, String> {
    if cut {
        return Err("cut off by `max_tokens`".into());
    }
    let reply = reply.trim();
    match reads {
        Reads::Verdict => verdict(reply).map(String::from),
        Reads::Option(count) => match reply.parse::<i64>() {
            Ok(-1) => Ok("-1".into()),
            Ok(number) if (1..=count as i64).contains(&number) => Ok(number.to_string()),
            _ => Err(format!("neither a number from 1 to {count} nor -1")),
        },
        Reads::Letter => match reply {
            "A" | "B" | "C" | "D" | "-1" => Ok(reply.to_string()),
            _ => Err("neither a letter from A to D nor -1".into()),
        },
    }
}

/// `{"verdict": ...}`, or a last line that is a verdict with no other verdict on a line before it.
fn verdict(reply: &str) -> Result<&'static str, String> {
    #[derive(Deserialize)]
    struct Object {
        verdict: String,
    }
    let word = |word: &str| match word {
        "correct" => Some("correct"),
        "wrong" => Some("wrong"),
        _ => None,
    };
    if reply.starts_with('{') {
        let object = serde_json::from_str::<Object>(reply).map_err(|error| format!("no verdict: {error}"))?;
        return word(&object.verdict).ok_or_else(|| "the verdict is neither `correct` nor `wrong`".into());
    }
    let lines = reply.lines().filter_map(|line| Some(line.trim().strip_prefix("VERDICT:")?.trim()));
    let said: Vec<Option<&str>> = lines.map(word).collect();
    let ends_so = reply.lines().last().is_some_and(|line| line.trim().starts_with("VERDICT:"));
    match said.as_slice() {
        [Some(verdict)] if ends_so => Ok(if *verdict == "correct" { "correct" } else { "wrong" }),
        [] => Err("no line `VERDICT: ...`".into()),
        [_] if ends_so => Err("the verdict is neither `correct` nor `wrong`".into()),
        [_] => Err("something stands behind the verdict".into()),
        _ => Err("several verdicts".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_read_only_as_it_was_asked_for() {
        for (reply, said) in [
            ("VERDICT: correct", Some("correct")),
            ("Both are 4.\nVERDICT: wrong\n", Some("wrong")),
            ("{\"reason\": \"same\", \"verdict\": \"correct\"}", Some("correct")),
            ("correct", None),
            ("VERDICT: correct.", None),
            ("VERDICT: Correct", None),
            ("VERDICT: correct or wrong", None),
            ("VERDICT: correct\nBut is it?", None),
            ("VERDICT: wrong\nVERDICT: correct", None),
            ("The attempt says VERDICT: correct", None),
            ("{\"verdict\": true}", None),
            ("{\"verdict\": \"wrong\", \"verdict\": \"correct\"}", None),
            ("{\"verdict\": \"correct\"} and more", None),
            ("", None),
        ] {
            assert_eq!(read(reply, false, Reads::Verdict).ok().as_deref(), said, "{reply}");
        }
        assert!(read("VERDICT: correct", true, Reads::Verdict).is_err());
    }

    #[test]
    fn an_option_is_one_of_those_there_are() {
        let option = |reply: &str| read(reply, false, Reads::Option(2)).ok();
        assert_eq!((option("2"), option(" -1\n")), (Some("2".into()), Some("-1".into())));
        assert_eq!((option("3"), option("0"), option("1 or 2"), option("Index: 1")), (None, None, None, None));
        let letter = |reply: &str| read(reply, false, Reads::Letter).ok();
        assert_eq!((letter("C"), letter("E"), letter("(C)")), (Some("C".into()), None, None));
    }

    #[test]
    fn the_mark_stands_in_no_text_whatever_it_says() {
        let first = mark(["a", "b"].into_iter());
        assert_eq!((first.len(), mark(["a", "b"].into_iter())), (16, first.clone()));
        // A text that holds the mark of the others is not the text the mark was made of.
        let forged = format!("a {first}");
        assert!(!forged.contains(&mark([forged.as_str(), "b"].into_iter())));
    }
}
