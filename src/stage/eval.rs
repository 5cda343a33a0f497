//! `eval`: answers of a model to the problems of a task, graded, with an interval.
//!
//! Everything that could be wrong with the task (a record without its answer, a gold answer that no
//! rule understands, a prompt longer than the context) is found before the model is loaded. The score
//! is the mean over all samples; truncated, missing and undecided answers are counted beside it and
//! never score: `undecided_as_right` is what the score would be at most. The interval is Wilson's over problems,
//! for samples of one problem are not independent. `outcomes.jsonl` has the right samples of each problem, for
//! comparisons of two cells on the same problems.

use super::Context;
use super::decoding::{self, Decoding, QUESTIONS, Reply, Request, Template};
use super::inputs::{self, Storage};
use crate::data::{BadRows, Format, Record};
use crate::grade::{self, Graded, Kind as AnswerKind, Verdict, stats};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::problem::Problem;
use crate::random::Stream;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashSet;

pub const KIND: Kind = Kind {
    name: "eval",
    about: "answers to the problems of a task, extracted and graded, with confidence intervals",
    recipe: 2,
    yields: ArtifactType::Scores,
    keys: &[
        Key::required("model", Type::Ref(&[ArtifactType::Model]), "The model that answers."),
        Key::required(
            "task",
            Type::Task(&[ArtifactType::Dataset]),
            "The problems: a question and its answer, with `choices` for multiple choice. A `[task.NAME]`, whose keys lie beneath those of the stage, or a dataset.",
        ),
        Key::or(
            "prompt",
            "prompt_file",
            Type::Str,
            "What the model is asked: a minijinja template over the record, with `question` and, for choices, `options` (`A) ...` a line). Absent, and no `prompt_file`: the question, and below it the options.",
        )
        .of_task(),
        Key::or("prompt_file", "prompt", Type::Source(&["path"]), "The same from a file.").of_task(),
        decoding::SYSTEM.of_task(),
        decoding::FORMAT.of_task(),
        decoding::PREFILL.of_task(),
        Key::optional("question", Type::Str, "The field of the question. Absent: `prompt`, `question` or `problem`.")
            .of_task(),
        Key::default(
            "answer",
            Type::Str,
            "\"answer\"",
            "The field of the right answer. For choices a letter, an index from 0, or the choice itself.",
        )
        .of_task(),
        Key::optional(
            "choices",
            Type::List(&Type::Str),
            "Fields that hold the choices, the right one first. Absent or `[]`: the record's list `choices`, if it has one.",
        )
        .of_task(),
        Key::default(
            "shuffle_choices",
            Type::Bool,
            "true",
            "Put choices in an order drawn from `seed` and the record's id, kept in the transcript.",
        )
        .of_task(),
        Key::default(
            "grader",
            Type::Choice(&["auto", "math", "numeric", "choice", "s1"]),
            "\"auto\"",
            "`choice`: a letter. `numeric`: a number or expression. `math`: also lists, intervals, equations, words. `auto`: `choice` where a record has choices or its answer is one capital letter, else `math`. `s1`: as `auto`, scored as the s1 study did without a judge: equal text, whole numbers by value, no letter is A.",
        )
        .of_task(),
        Key::default("n", Type::Int { min: 1, max: 100_000 }, "1", "Samples per problem.").of_task(),
        decoding::MAX_TOKENS.of_task(),
        decoding::TEMPERATURE.of_task(),
        decoding::TOP_P.of_task(),
        decoding::TOP_K.of_task(),
        decoding::REPETITION_PENALTY.of_task(),
        decoding::SEED.of_task(),
        decoding::STOP.of_task(),
        Key::optional("limit", Type::Int { min: 1, max: i64::MAX }, "Only the first so many problems.").of_task(),
        decoding::DTYPE,
        decoding::BATCH,
    ],
    floats: true,
    lineage: no_lineage,
    rules,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    prompt: Option<String>,
    prompt_file: Option<String>,
    system: Option<String>,
    format: Format,
    prefill: Option<String>,
    question: Option<String>,
    answer: String,
    choices: Option<Vec<String>>,
    shuffle_choices: bool,
    grader: Grader,
    n: usize,
    max_tokens: usize,
    temperature: f64,
    top_p: f64,
    top_k: usize,
    repetition_penalty: f64,
    seed: u64,
    stop: Vec<String>,
    limit: Option<usize>,
    dtype: Storage,
    batch: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Grader {
    Auto,
    Math,
    Numeric,
    Choice,
    S1,
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    for key in ["prompt", "system"] {
        let template = params.get(key).and_then(Value::as_str).map(|text| Template::new(key, text));
        if let Some(Err(problem)) = template {
            broken.push(Broken {
                key,
                message: problem.message,
                help: "fields stand in double braces: `{{ question }}`".into(),
            });
        }
    }
    let samples = params.get("n").and_then(Value::as_u64).unwrap_or(1);
    if samples > 1 && params.get("temperature").and_then(Value::as_f64) == Some(0.0) {
        broken.push(Broken {
            key: "n",
            message: format!("{samples} samples at temperature 0 are {samples} times the same"),
            help: "`temperature = 1.0`, or `n = 1`".into(),
        });
    }
    let fields = params.get("choices").and_then(Value::as_array).map(Vec::len);
    if fields.is_some_and(|fields| !matches!(fields, 0 | 2..=26)) {
        broken.push(Broken {
            key: "choices",
            message: "a choice is between 2 and 26 fields".into(),
            help: "name the fields, the right answer first".into(),
        });
    }
    broken
}

/// A record made ready.
struct Question {
    id: String,
    gold: String,
    kind: AnswerKind,
    ids: Vec<u32>,
    /// For choices: the record's choice at each letter.
    order: Option<Vec<usize>>,
}

pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let mut records = inputs::records(ctx, "task")?;
    records.truncate(spec.limit.unwrap_or(usize::MAX));
    if records.is_empty() {
        return Err(Problem::new("eval::empty", "the task has no problems"));
    }
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let decoding = Decoding {
        format: spec.format,
        prefill: spec.prefill.clone(),
        stop: spec.stop.clone(),
        max_tokens: spec.max_tokens,
        temperature: spec.temperature,
        top_p: spec.top_p,
        top_k: spec.top_k,
        repetition_penalty: spec.repetition_penalty,
        seed: spec.seed,
        dtype: spec.dtype,
        batch: spec.batch,
        ..Decoding::default()
    };
    let templates = Templates {
        prompt: Template::asked(ctx, spec.prompt.as_deref(), spec.prompt_file.as_deref())?,
        system: spec.system.as_deref().map(|text| Template::new("system", text)).transpose()?,
    };
    let (mut questions, mut bad, mut seen) = (Vec::new(), BadRows::default(), HashSet::new());
    for (index, record) in records.iter().enumerate() {
        let id = decoding::record_id(record, index);
        let line = format!("line {} (id `{id}`)", index + 1);
        if !seen.insert(id.clone()) {
            bad.push("eval::duplicate_id", &line, "the id occurs twice");
            continue;
        }
        let made = spec.ask(record, &id, &templates).and_then(|asked| {
            let ids = decoding.prompt(&tokenizer, asked.user, asked.system).map_err(|p| ("eval::prompt", p.message))?;
            Ok(Question { id, gold: asked.gold, kind: asked.kind, ids, order: asked.order })
        });
        match made {
            Ok(question) => questions.push(question),
            Err((code, what)) => {
                bad.push(code, &line, &what);
                if code == "eval::field" {
                    bad.help(
                        "`question`, `answer` and `choices`, of the stage or of its task, name fields of the records",
                    );
                }
            }
        }
    }
    bad.finish(records.len(), None)?;

    let request =
        |(question, sample): (&Question, usize)| Request { id: question.id.clone(), sample, ids: question.ids.clone() };
    let requests: Vec<Request> = questions.iter().flat_map(|q| (0..spec.n).map(move |k| (q, k))).map(request).collect();
    let replies = decoding.complete(ctx, &tokenizer, &requests, "answers")?;

    let mut tally = Tally::new(spec.n);
    let mut transcripts = Vec::with_capacity(requests.len());
    for (i, (request, reply)) in requests.iter().zip(&replies).enumerate() {
        let question = &questions[i / spec.n];
        let response = format!("{}{}", decoding.opening(), reply.text);
        let graded = match spec.grader {
            Grader::S1 => grade::s1::grade(&question.gold, &response, question.kind),
            _ => grade::grade(&question.gold, &response, question.kind),
        };
        tally.count(&graded, question.kind, reply);
        let mut line = json!({
            "id": question.id,
            "sample": request.sample,
            "prompt": tokenizer.decode(&request.ids, false),
            "completion": reply.text,
            "extracted": graded.extracted,
            "gold": question.gold,
            "verdict": graded.verdict.name(),
            "found": graded.found,
            "rule": graded.rule,
            "tokens": reply.tokens(),
            "finish": reply.finish(),
        });
        if let Some(order) = &question.order {
            line["order"] = json!(order);
        }
        transcripts.push(line);
    }
    if tally.undecided > 0 {
        ctx.progress.warn(&format!(
            "{} of {} answers are undecided and count as wrong; see transcripts.jsonl",
            tally.undecided,
            requests.len()
        ));
    }
    inputs::write_lines(&ctx.out.join("transcripts.jsonl"), &transcripts)?;
    let outcome =
        |(question, correct): (&Question, &u64)| json!({ "id": question.id, "correct": correct, "samples": spec.n });
    let outcomes: Vec<Value> = questions.iter().zip(&tally.solved).map(outcome).collect();
    inputs::write_lines(&ctx.out.join("outcomes.jsonl"), &outcomes)?;
    let path = ctx.out.join("scores.json");
    std::fs::write(&path, format!("{:#}\n", tally.scores()))
        .map_err(|error| Problem::io("eval::unwritable", "write", &path, &error))
}

struct Templates {
    prompt: Option<Template>,
    system: Option<Template>,
}

/// What is asked about a record, and what the answer should be.
struct Asked {
    user: Value,
    system: Option<String>,
    gold: String,
    kind: AnswerKind,
    order: Option<Vec<usize>>,
}

type Bad = (&'static str, String);

impl Spec {
    fn ask(&self, record: &Record, id: &str, templates: &Templates) -> Result<Asked, Bad> {
        let question = match &self.question {
            Some(name) => Some(decoding::text_field(record, &[name]).ok_or_else(|| missing(record, name))?),
            None => decoding::text_field(record, QUESTIONS),
        };
        let choices = self.listed_choices(record)?;
        let (gold, kind, order, options) = match choices {
            Some((choices, right)) => {
                let order: Vec<usize> = if self.shuffle_choices {
                    Stream::named(self.seed, &["choices", id]).permutation(choices.len())
                } else {
                    (0..choices.len()).collect()
                };
                let at = order.iter().position(|&choice| choice == right).unwrap_or(0);
                let line = |(at, &choice): (usize, &usize)| format!("{}) {}", letter(at), choices[choice]);
                let options = order.iter().enumerate().map(line).collect::<Vec<_>>().join("\n");
                (letter(at).to_string(), AnswerKind::Choice, Some(order), Some(options))
            }
            None => {
                let gold = self.gold(record)?;
                let capital = matches!(gold.trim().as_bytes(), [b'A'..=b'Z']);
                let kind = match self.grader {
                    Grader::Choice => AnswerKind::Choice,
                    Grader::Auto | Grader::S1 if capital => AnswerKind::Choice,
                    Grader::Numeric => AnswerKind::Number,
                    Grader::Auto | Grader::Math | Grader::S1 => AnswerKind::Math,
                };
                grade::check_gold(&gold, kind)
                    .map_err(|why| ("eval::gold", format!("the answer `{gold}` cannot be graded: {why}")))?;
                (gold, kind, None, None)
            }
        };
        let render = |template: &Template| {
            let mut record = record.clone();
            record.extend(question.map(|question| ("question".to_string(), Value::from(question))));
            record.extend(options.clone().map(|options| ("options".to_string(), Value::from(options))));
            template.render(&record).map_err(|what| ("eval::field", what))
        };
        let user = match (&templates.prompt, question, &options) {
            (Some(template), ..) => Value::String(render(template)?),
            (None, Some(question), Some(options)) => Value::String(format!("{question}\n\n{options}")),
            (None, Some(question), None) => question.into(),
            (None, None, _) => match record.get("messages") {
                Some(messages) => messages.clone(),
                None => return Err(missing(record, "question")),
            },
        };
        let system = templates.system.as_ref().map(render).transpose()?;
        Ok(Asked { user, system, gold, kind, order })
    }

    fn gold(&self, record: &Record) -> Result<String, Bad> {
        match record.get(&self.answer) {
            Some(Value::String(gold)) => Ok(gold.clone()),
            Some(Value::Number(gold)) => Ok(gold.to_string()),
            Some(_) => Err(("eval::field", format!("`{}` is neither text nor a number", self.answer))),
            None => Err(missing(record, &self.answer)),
        }
    }

    /// The choices of a record and the index of the right one.
    fn listed_choices(&self, record: &Record) -> Result<Option<(Vec<String>, usize)>, Bad> {
        if let Some(fields) = self.choices.as_ref().filter(|fields| !fields.is_empty()) {
            let text = |name: &String| {
                decoding::text_field(record, &[name]).map(|t| t.trim().to_string()).ok_or_else(|| missing(record, name))
            };
            return Ok(Some((fields.iter().map(text).collect::<Result<_, _>>()?, 0)));
        }
        let Some(list) =
            record.get("choices").filter(|_| matches!(self.grader, Grader::Auto | Grader::Choice | Grader::S1))
        else {
            return Ok(None);
        };
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.trim().to_string()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let choices: Option<Vec<String>> = list.as_array().and_then(|list| list.iter().map(text).collect());
        let choices = choices
            .filter(|choices| (2..=26).contains(&choices.len()))
            .ok_or(("eval::field", "`choices` is not a list of 2 to 26 texts".to_string()))?;
        let gold = match record.get(&self.answer) {
            Some(Value::Number(index)) => index.as_u64().map(|index| index as usize),
            Some(Value::String(text)) => {
                let text = text.trim();
                let by_letter = match text.as_bytes() {
                    [letter] if letter.is_ascii_alphabetic() => Some(usize::from(letter.to_ascii_uppercase() - b'A')),
                    _ => None,
                };
                choices.iter().position(|choice| choice == text).or(by_letter)
            }
            Some(_) => None,
            None => return Err(missing(record, &self.answer)),
        };
        let right = gold.filter(|right| *right < choices.len());
        let right = right.ok_or_else(|| {
            let answer = record.get(&self.answer).map(Value::to_string).unwrap_or_default();
            ("eval::gold", format!("the answer {answer} is none of the {} choices", choices.len()))
        })?;
        Ok(Some((choices, right)))
    }
}

fn missing(record: &Record, name: &str) -> Bad {
    let fields: Vec<&str> = record.keys().map(String::as_str).collect();
    ("eval::field", format!("no `{name}`; the record has {}", fields.join(", ")))
}

fn letter(at: usize) -> char {
    char::from(b'A' + (at % 26) as u8)
}

/// Counts over samples, which come problem by problem.
struct Tally {
    /// Samples per problem.
    n: usize,
    /// Right samples of each problem.
    solved: Vec<u64>,
    /// The answers to the problem at hand, those that were found, and whether each is right.
    answers: Vec<(String, bool)>,
    /// Samples of the problem at hand.
    seen: usize,
    /// Problems whose most frequent answer is right.
    majority: u64,
    undecided: u64,
    unparsed: u64,
    truncated: u64,
    tokens: u64,
}

impl Tally {
    fn new(n: usize) -> Tally {
        let (solved, answers) = (Vec::new(), Vec::new());
        Tally { n, solved, answers, seen: 0, majority: 0, undecided: 0, unparsed: 0, truncated: 0, tokens: 0 }
    }

    fn count(&mut self, graded: &Graded, kind: AnswerKind, reply: &Reply) {
        if self.seen == 0 {
            self.solved.push(0);
        }
        let right = graded.verdict == Verdict::Correct;
        *self.solved.last_mut().expect("pushed with the first sample") += u64::from(right);
        self.answers.extend(graded.extracted.clone().map(|answer| (answer, right)));
        self.undecided += u64::from(graded.verdict == Verdict::Undecided);
        self.unparsed += u64::from(graded.extracted.is_none());
        self.truncated += u64::from(reply.cut);
        self.tokens += reply.tokens() as u64;
        self.seen += 1;
        if self.seen == self.n {
            self.majority += u64::from(self.most_say_right(kind));
            self.answers.clear();
            self.seen = 0;
        }
    }

    /// Whether the most frequent answer to the problem at hand is right. Answers are the same if the grader
    /// would take one for the other.
    fn most_say_right(&self, kind: AnswerKind) -> bool {
        let answer = |at: usize| self.answers[at].0.as_str();
        let most = stats::majority(self.answers.len(), |i, j| grade::same(answer(i), answer(j), kind));
        most.is_some_and(|(_, first)| self.answers[first].1)
    }

    /// Rates in percent. With several samples per problem also pass@k, for k = 2, 4, 8, ... and all, and the
    /// rate of problems whose most frequent answer is right.
    fn scores(&self) -> Value {
        let problems = self.solved.len();
        let (total, correct) = ((problems * self.n) as u64, self.solved.iter().sum::<u64>());
        let rate = correct as f64 / total as f64;
        let (low, high) = stats::wilson_rate(rate, problems as u64);
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
            "mean_tokens": self.tokens as f64 / total as f64,
        });
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
