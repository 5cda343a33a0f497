//! `eval`: answers of a model to the problems of a task, graded, with an interval.
//!
//! Everything that could be wrong with the task (a record without its answer, a gold answer that no
//! rule understands, a prompt longer than the context) is found before the model is loaded. The score
//! is the mean over all samples; truncated, missing and undecided answers are counted beside it and
//! never score: `undecided_as_right` is what the score would be at most. The interval is over problems, for samples of
//! one problem are not independent: Wilson's for one sample, a bootstrap for several. `outcomes.jsonl` has the right
//! samples of each problem, for comparisons of two cells on the same problems.
//!
//! A model of this machine answers, or an endpoint; a `judge`, if there is one, decides what the grader does not.

mod questions;
mod spec;
mod tally;

use crate::data::{Record, Tokenizer};
use crate::grade::{self, Graded, Verdict};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::problem::Problem;
use crate::remote::{Ask, Bill, Connection, Endpoint, Replies};
use crate::stage::context::Context;
use crate::stage::forecast::completions::CompletionForecast;
use crate::stage::kind::{Forecast, StageKind};
use crate::stage::share::asking::{self, Asking, Pending, Taken};
use crate::stage::share::completing;
use crate::stage::share::decoding;
use crate::stage::share::inputs;
use crate::stage::share::judge::{self, Case, Judge, Whom};
use crate::stage::share::template::Template;
use crate::stage::share::thinking;
use crate::stage::share::turns::{Reply, Request};
use questions::{Prompt, Question};
use serde_json::{Value, json};
use spec::{Grader, OnMissing, Spec};
use std::path::{Path, PathBuf};
use tally::{Sample, Tally};

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "eval",
    about: "answers to the problems of a task, extracted and graded, with confidence intervals",
    recipe: 3,
    yields: ArtifactType::Scores,
    keys: &[
        Key::either("model", "endpoint", Type::Ref(&[ArtifactType::Model]), "The model that answers, on this machine."),
        Key::either("endpoint", "model", Type::Endpoint, "The server that answers: an `[endpoint.NAME]`."),
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
            "`choice`: a letter. `numeric`: a number or expression. `math`: also lists, intervals, equations, words. `auto`: `choice` where a record has choices or its answer is one capital letter, else `math`. `s1`: as `auto`, scored as the s1 study did: equal text, whole numbers by value, what else there is by the judge if there is one, no letter is A.",
        )
        .of_task(),
        judge::KEY,
        Key::default("n", Type::Int { min: 1, max: 100_000 }, "1", "Samples per problem.").of_task(),
        decoding::MAX_TOKENS.of_task(),
        thinking::KEY.of_task(),
        decoding::TEMPERATURE.of_task(),
        decoding::TOP_P.of_task(),
        decoding::TOP_K.of_task(),
        decoding::REPETITION_PENALTY.of_task(),
        decoding::SEED.of_task(),
        decoding::STOP.of_task(),
        Key::optional("limit", Type::Int { min: 1, max: i64::MAX }, "Only this many problems, from the first on.").of_task(),
        Key::default(
            "on_missing",
            Type::Choice(&["error", "wrong"]),
            "\"error\"",
            "What happens to an answer that an endpoint does not give: the stage fails, or it counts as wrong and in `missing`.",
        )
        .with("endpoint"),
        decoding::DTYPE,
        decoding::BATCH,
    ],
    floats: true,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind =
    StageKind { data: Some("task"), forecast, pending, stays: Some(decoding::STAYS), ..StageKind::new(&KIND, run) };

fn forecast(params: &Params) -> Option<Forecast> {
    let spec = Spec::read(KIND.name, params).ok()?;
    Some(Forecast::Completing(Box::new(CompletionForecast {
        asked_bytes: decoding::bytes([&spec.prompt, &spec.system, &spec.decoding.prefill]),
        asked_in_file: spec.prompt_file.is_some(),
        n: spec.n,
        tries: 1,
        drops: false,
        decoding: spec.decoding,
        judge: spec.judge.as_ref().map(|judge| Box::new(judge.forecast())),
        endpoint: spec.endpoint,
        limit: spec.limit,
    })))
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let judge = |key: &str| params.get("judge").and_then(|judge| judge.get(key)).and_then(Value::as_str);
    let text = |key: &str| params.get(key).and_then(Value::as_str);
    for (key, text) in [("prompt", text("prompt")), ("system", text("system")), ("judge.prompt", judge("prompt"))] {
        let template = text.map(|text| Template::new(key, text));
        if let Some(Err(problem)) = template {
            broken.push(Broken {
                key,
                message: problem.message,
                help: "fields stand in double braces: `{{ question }}`".into(),
            });
        }
    }
    if judge("prompt").is_some() && judge("prompt_file").is_some() {
        broken.push(Broken {
            key: "judge.prompt_file",
            message: "`judge.prompt` and `judge.prompt_file` both say what is asked".into(),
            help: "keep one of the two".into(),
        });
    }
    if text("grader") == Some("s1") && judge("ask") == Some("all") {
        broken.push(Broken {
            key: "judge.ask",
            message: "with `grader = \"s1\"` the judge is asked as s1 asked it: about all that is no whole number"
                .into(),
            help: "leave `ask` out".into(),
        });
    }
    if let Some((key, message, help)) = thinking::broken(params.get("thinking")) {
        broken.push(Broken { key, message, help });
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

/// Writes `scores.json`, `transcripts.jsonl` and `outcomes.jsonl`; with a judge also `judgements.jsonl`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec = Spec::read(ctx.label, ctx.params)?;
    let mut records = inputs::records(ctx, "task")?;
    records.truncate(spec.limit.unwrap_or(usize::MAX));
    if records.is_empty() {
        return Err(Problem::new("eval::empty", "the task has no problems"));
    }
    let tokenizer = if spec.endpoint.is_none() { Some(inputs::tokenizer(ctx, "model")?) } else { None };
    let judge = match spec.judge.as_ref().filter(|judge| judge.ask != Whom::None) {
        Some(judge) => Some(Judge::new(ctx, judge, spec.grader == Grader::S1)?),
        None => None,
    };
    let prompt_file = ctx.sources.get("prompt_file").map(PathBuf::as_path);
    let questions = spec.questions(prompt_file, &records, tokenizer.as_ref())?;
    let (samples, bill) = match (&spec.endpoint, &tokenizer) {
        (Some(endpoint), _) => by_endpoint(ctx, &spec, endpoint, &questions)?,
        (None, Some(tokenizer)) => (by_model(ctx, &spec, tokenizer, &questions)?, None),
        (None, None) => return Err(Problem::new("stage::input", "neither a model nor an endpoint")),
    };
    let mut usage = bill.map_or(Value::Null, |bill| json!(bill));

    let question = |i: usize| &questions[i / spec.n];
    let grade = |(i, sample): (usize, &Sample)| {
        let question = question(i);
        match spec.grader {
            // To s1 silence is a choice, but this is not even silence.
            _ if sample.missing.is_some() => {
                Graded { verdict: Verdict::Wrong, extracted: None, found: "none", rule: "no reply" }
            }
            Grader::S1 => grade::s1::grade(&question.gold, &sample.response, question.kind),
            _ => grade::grade(&question.gold, &sample.response, question.kind),
        }
    };
    let mut graded: Vec<Graded> = samples.iter().enumerate().map(grade).collect();
    let by_grader: Vec<Verdict> = graded.iter().map(|graded| graded.verdict).collect();
    let mut tally = Tally::new(&spec);
    if let Some(judge) = judge {
        let mut cases = Vec::with_capacity(samples.len());
        for (i, Sample { response, missing, .. }) in samples.iter().enumerate() {
            let Question { id, kind, text, gold, .. } = &questions[i / spec.n];
            let (sample, kind, missing) = (i % spec.n, *kind, missing.is_some());
            cases.push(Case { id, sample, kind, question: text, gold, response, missing });
        }
        let judgements = match spec.grader {
            Grader::S1 => judge.decide_as_s1(&cases, spec.n, &mut graded)?,
            _ => judge.decide(&cases, &mut graded)?,
        };
        inputs::write_lines(&ctx.out.join("judgements.jsonl"), &judgements.lines)?;
        tally.unread = judgements.unread;
        if let Some(bill) = judgements.bill {
            usage["judge"] = json!(bill);
        }
    }
    if !usage.is_null() {
        asking::write_usage(ctx, &usage)?;
    }

    let mut transcripts = Vec::with_capacity(samples.len());
    for (i, ((sample, graded), by_grader)) in samples.iter().zip(&graded).zip(by_grader).enumerate() {
        let question = question(i);
        tally.count(graded, by_grader, question.kind, sample);
        let mut line = json!({
            "id": question.id,
            "sample": i % spec.n,
            "prompt": question.asked.text(tokenizer.as_ref()),
            "completion": sample.completion,
            "extracted": graded.extracted,
            "gold": question.gold,
            "verdict": graded.verdict.name(),
            "found": graded.found,
            "rule": graded.rule,
            "tokens": sample.tokens,
            "finish": sample.finish,
        });
        if let Some(order) = &question.order {
            line["order"] = json!(order);
        }
        if let Some(thought) = &sample.thought {
            line["thinking"] = json!(thought);
        }
        if graded.rule == "judge" {
            line["grader_verdict"] = by_grader.name().into();
        }
        transcripts.push(line);
    }
    tally.warn(ctx);
    inputs::write_lines(&ctx.out.join("transcripts.jsonl"), &transcripts)?;
    let outcome =
        |(question, correct): (&Question, &u64)| json!({ "id": question.id, "correct": correct, "samples": spec.n });
    let outcomes: Vec<Value> = questions.iter().zip(&tally.solved).map(outcome).collect();
    inputs::write_lines(&ctx.out.join("outcomes.jsonl"), &outcomes)?;
    let path = ctx.out.join("scores.json");
    std::fs::write(&path, format!("{:#}\n", tally.scores()))
        .map_err(|error| Problem::io("eval::unwritable", "write", &path, &error))
}

/// Answers by a model of this machine, `n` to each question.
fn by_model(ctx: &Context, spec: &Spec, tokenizer: &Tokenizer, questions: &[Question]) -> Result<Vec<Sample>, Problem> {
    let decoding = &spec.decoding;
    let mut requests = Vec::with_capacity(questions.len() * spec.n);
    for question in questions {
        let Prompt::Tokens { ids, budget } = &question.asked else { continue };
        let request = |sample| Request { id: question.id.clone(), sample, ids: ids.clone(), budget: *budget };
        requests.extend((0..spec.n).map(request));
    }
    let replies = completing::complete(ctx, decoding, tokenizer, &requests, "answers")?;
    let sample = |reply: Reply| Sample {
        response: format!("{}{}", decoding.opening(), reply.text),
        finish: reply.finish().into(),
        tokens: Some(reply.tokens() as u64),
        thought: reply.thought.clone(),
        completion: reply.text,
        missing: None,
    };
    Ok(replies.into_iter().map(sample).collect())
}

/// The same by an endpoint. An answer that does not come fails the stage or stays missing, as the spec says.
fn by_endpoint(
    ctx: &Context,
    spec: &Spec,
    endpoint: &Endpoint,
    questions: &[Question],
) -> Result<(Vec<Sample>, Option<Bill>), Problem> {
    let asks = asks(spec, questions);
    let mut asking = Asking::new(ctx, endpoint)?;
    let samples = asking.ask(asks, &spec.decoding.remotely(), 1, "answers", &|_, reply, _| {
        Taken::Final(match reply {
            Ok(completion) => Sample {
                response: completion.text(),
                completion: completion.text(),
                finish: completion.finish().into(),
                tokens: completion.usage.map(|usage| usage.completion_tokens),
                thought: None,
                missing: None,
            },
            Err(why) => Sample {
                response: String::new(),
                completion: String::new(),
                finish: "none".into(),
                tokens: None,
                thought: None,
                missing: Some(why.clone()),
            },
        })
    })?;
    let why = |(i, sample): (usize, &Sample)| {
        let why = sample.missing.as_ref()?;
        Some(format!("sample {} of `{}`: {why}", i % spec.n, questions[i / spec.n].id))
    };
    let missing: Vec<String> = samples.iter().enumerate().filter_map(why).collect();
    let all = missing.len() == samples.len();
    if !missing.is_empty() && (spec.on_missing == OnMissing::Error || all) {
        let mut problem =
            Problem::new("eval::missing", format!("{} of {} answers are missing", missing.len(), samples.len()));
        problem.notes = missing.into_iter().take(5).collect();
        let problem = problem.help("run again: the answers that came are kept");
        return Err(if all { problem } else { problem.help("`on_missing = \"wrong\"` counts them as wrong") });
    }
    Ok((samples, Some(asking.bill())))
}

/// `n` for each question.
fn asks(spec: &Spec, questions: &[Question]) -> Vec<Ask> {
    let mut asks = Vec::with_capacity(questions.len() * spec.n);
    for question in questions {
        let Prompt::Messages(messages) = &question.asked else { continue };
        asks.extend((0..spec.n as u64).map(|sample| Ask { messages: messages.clone(), sample, attempt: 0 }));
    }
    asks
}

/// What a stage with these parameters would ask its endpoint. With a sum of the replies to it that are kept.
fn pending(
    params: &Params,
    prompt_file: Option<&Path>,
    records: &[Record],
    line: &Connection,
) -> Result<(Vec<Pending>, Replies), Problem> {
    let spec = Spec::read(KIND.name, params)?;
    let mut kept = Replies::default();
    let model = spec.endpoint.as_ref().map_or("", |endpoint| &endpoint.model);
    let sampling = spec.decoding.remotely();
    let records = &records[..records.len().min(spec.limit.unwrap_or(usize::MAX))];
    let mut pending = Vec::new();
    for ask in asks(&spec, &spec.questions(prompt_file, records, None)?) {
        match line.kept(&ask, &sampling)? {
            Some(completion) => kept.add(ask.prompt_bound(), &completion),
            None => {
                let key = ask.key(model, &sampling);
                pending.push(Pending { key, prompt_bound: ask.prompt_bound(), tries: 1 });
            }
        }
    }
    Ok((pending, kept))
}
