//! `generate`: a completion (or n) for every record, by a local model or an endpoint, parsed into fields.
//!
//! The prompt is a template over the record. What comes back is taken apart as `parse` says; what does
//! not parse, or was cut off by `max_tokens`, fails the stage or is left out and listed in
//! `failed.jsonl` with its text, never passed over in silence. Order and ids are those of the dataset.
//!
//! What an endpoint makes is paid for once (`remote`), and `usage.json` says what it took.

mod json;
mod parse;

use crate::data::{BadRows, Format, Record, write_jsonl};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::problem::Problem;
use crate::remote::{Ask, Completion, Connection, Endpoint, Finish, Replies};
use crate::stage::context::{Context, read_params};
use crate::stage::forecast::completions::CompletionForecast;
use crate::stage::kind::{Forecast, StageKind};

use crate::stage::share::asking::{self, Asking, Pending, Taken};
use crate::stage::share::completing;
use crate::stage::share::decoding::{self, Decoding};
use crate::stage::share::inputs::{self, Storage};
use crate::stage::share::template::{self, QUESTIONS, Template};
use crate::stage::share::thinking::{self, Thinking};
use crate::stage::share::turns::Request;
use parse::{Parse, ParseKind, Parser};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub use parse::parsed;

const PARSERS: &[&str] = &["text", "sections", "boxed", "think-answer", "regex", "json"];

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "generate",
    about: "a completion (or n) per record, parsed into fields",
    recipe: 1,
    yields: ArtifactType::Dataset,
    keys: &[
        Key::either("model", "endpoint", Type::Ref(&[ArtifactType::Model]), "The model that completes, on this machine."),
        Key::either("endpoint", "model", Type::Endpoint, "The server that completes: an `[endpoint.NAME]`."),
        Key::required("data", Type::Ref(&[ArtifactType::Dataset]), "The records."),
        Key::or(
            "prompt",
            "prompt_file",
            Type::Str,
            "What the model is asked: a minijinja template over the record (`{{ question }}`). Absent, and no `prompt_file`: the record's `input_ids` as they stand, its `messages`, or its `prompt`, `question` or `problem`.",
        ),
        Key::or("prompt_file", "prompt", Type::Source(&["path"]), "The same from a file."),
        decoding::SYSTEM,
        decoding::FORMAT,
        decoding::PREFILL,
        Key::default(
            "n",
            Type::Int { min: 1, max: 100_000 },
            "1",
            "Completions per record. Above 1 the ids become `ID#0`, `ID#1`, ...",
        ),
        decoding::MAX_TOKENS,
        thinking::KEY,
        decoding::TEMPERATURE,
        decoding::TOP_P,
        decoding::TOP_K,
        decoding::REPETITION_PENALTY,
        decoding::SEED,
        decoding::STOP,
        Key::default(
            "stop_token_ids",
            Type::List(&Type::Int { min: 0, max: u32::MAX as i64 }),
            "[]",
            "A completion also ends with the first of these tokens.",
        )
        .with("model"),
        Key::default("ignore_eos", Type::Bool, "false", "Go on behind the tokenizer's own end tokens.").with("model"),
        Key::default(
            "unmapped_ids",
            Type::Bool,
            "false",
            "Also draw ids that stand for no text: the embedding has more rows than the tokenizer has ids (transformers draws them).",
        )
        .with("model"),
        decoding::DTYPE,
        decoding::BATCH,
        Key::default(
            "parse",
            Type::Table(&[
                Key::default(
                    "kind",
                    Type::Choice(PARSERS),
                    "\"text\"",
                    "`text`: the completion as it is. `sections`: the texts under headings. `boxed`: the last `\\boxed{}`. `think-answer`: thinking and answer, in the s1 layout or as `<think>`. `regex`: the groups of `pattern`. `json`: values of the last JSON object, in a fence or bare.",
                ),
                Key::default(
                    "fields",
                    Type::Map(&Type::Str),
                    "{}",
                    "New field = what it gets: a heading (`sections`), a group (`regex`), a name or dotted path (`json`), `thinking` or `answer` (`think-answer`), `boxed`, or `text` (any kind: all of it). `{}`: thinking and answer by these names, `answer` for a box, the named groups of a pattern.",
                ),
                Key::optional("pattern", Type::Str, "The regular expression of `regex`."),
            ]),
            "{}",
            "How a completion becomes fields. All kinds but `text` and `think-answer` look behind the thinking only.",
        ),
        Key::default(
            "on_parse_failure",
            Type::Choice(&["error", "drop"]),
            "\"error\"",
            "What happens to a completion that does not parse, or that an endpoint does not give: the stage fails, or it is left out and listed in `failed.jsonl`.",
        ),
        Key::default(
            "max_parse_attempts",
            Type::Int { min: 1, max: 100 },
            "3",
            "How many completions are asked for until one parses. One that was cut off by `max_tokens` or withheld is not asked for again.",
        )
        .with("endpoint"),
        Key::optional("keep", Type::List(&Type::Str), "Fields of the record that stay, besides `id`. Absent: all."),
        Key::default("rename", Type::Map(&Type::Str), "{}", "New name = old name, for fields of the record that stay."),
        Key::default(
            "completion",
            Type::Str,
            "\"completion\"",
            "The field that gets the whole completion; empty: none does. Training stages learn a field `completion` as it stands, before `thinking` and `answer`.",
        ),
        Key::default(
            "token_ids",
            Type::Str,
            "\"\"",
            "The field that gets the ids of the tokens made, the end token included; empty: none does.",
        )
        .with("model"),
    ],
    floats: true,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind =
    StageKind { data: Some("data"), forecast, pending, stays: Some(decoding::STAYS), ..StageKind::new(&KIND, run) };

fn forecast(params: &Params) -> Option<Forecast> {
    let spec: Spec = read_params(KIND.name, params.clone()).ok()?;
    let text = spec.parse.kind == ParseKind::Text;
    Some(Forecast::Completing(Box::new(CompletionForecast {
        asked_bytes: decoding::bytes([&spec.prompt, &spec.system, &spec.prefill]),
        asked_in_file: spec.prompt_file.is_some(),
        n: spec.n,
        tries: if text { 1 } else { spec.max_parse_attempts.unwrap_or(1) },
        drops: spec.on_parse_failure == OnFailure::Drop,
        decoding: spec.decoding(),
        endpoint: spec.endpoint,
        limit: None,
        judge: None,
    })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    endpoint: Option<Endpoint>,
    prompt: Option<String>,
    /// As written; the file itself comes through the context.
    prompt_file: Option<String>,
    system: Option<String>,
    #[serde(default)]
    format: Format,
    prefill: Option<String>,
    n: usize,
    max_tokens: usize,
    thinking: Option<Thinking>,
    temperature: f64,
    top_p: f64,
    top_k: usize,
    repetition_penalty: f64,
    seed: u64,
    stop: Vec<String>,
    #[serde(default)]
    stop_token_ids: Vec<u32>,
    #[serde(default)]
    ignore_eos: bool,
    #[serde(default)]
    unmapped_ids: bool,
    #[serde(default)]
    dtype: Storage,
    #[serde(default)]
    batch: usize,
    parse: Parse,
    on_parse_failure: OnFailure,
    max_parse_attempts: Option<u64>,
    keep: Option<Vec<String>>,
    rename: Map<String, Value>,
    completion: String,
    #[serde(default)]
    token_ids: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OnFailure {
    Error,
    Drop,
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let mut say =
        |key: &'static str, message: String, help: &str| broken.push(Broken { key, message, help: help.into() });
    let text = |key: &str| params.get(key).and_then(Value::as_str);
    for (key, template) in [("prompt", text("prompt")), ("system", text("system"))] {
        if let Some(Err(problem)) = template.map(|template| Template::new(key, template)) {
            say(key, problem.message, "fields of the record stand in double braces: `{{ question }}`");
        }
    }
    if let Some((key, message, help)) = thinking::broken(params.get("thinking")) {
        say(key, message, &help);
    }
    let Some(parse) = params.get("parse").and_then(|parse| Parse::deserialize(parse).ok()) else { return broken };
    for Broken { key, message, help } in parse.broken() {
        say(key, message, &help);
    }
    // `id` is the record's own, whatever else is called so.
    let own = |name: &str| name == "id";
    let groups = parse.pattern.as_deref().and_then(|pattern| Regex::new(pattern).ok());
    let named = groups.iter().flat_map(Regex::capture_names).flatten().any(own);
    let renamed = params.get("rename").and_then(Value::as_object).is_some_and(|table| table.keys().any(|key| own(key)));
    for (key, taken) in [
        ("parse.fields", parse.fields.keys().any(|key| own(key))),
        ("parse.pattern", parse.kind == ParseKind::Regex && parse.fields.is_empty() && named),
        ("rename", renamed),
        ("completion", text("completion").is_some_and(own)),
        ("token_ids", text("token_ids").is_some_and(own)),
    ] {
        if taken {
            say(key, "`id` is the record's own, by which it is known in every later stage".into(), "take another name");
        }
    }
    if parse.pattern.is_some() && parse.kind != ParseKind::Regex {
        say("parse.pattern", "`pattern` belongs to kind = \"regex\"".into(), "kind = \"regex\", or take it out");
    }
    broken
}

/// What became of one completion.
struct Made {
    text: String,
    finish: String,
    /// Empty where nobody has asked for them.
    ids: Vec<u32>,
    /// New fields and values, or why there are none.
    parsed: Result<Vec<(String, String)>, String>,
}

/// Makes the completions and writes what `parse` finds in them.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let records = inputs::records(ctx, "data")?;
    if records.is_empty() {
        return Err(Problem::new("generate::empty", "the dataset has no records"));
    }
    let parser = Parser::new(&spec.parse)?;
    let asker = Asker::new(&spec, ctx.sources.get("prompt_file").map(PathBuf::as_path))?;
    let all = match &spec.endpoint {
        Some(endpoint) => by_endpoint(ctx, &spec, endpoint, &asker, &parser, &records)?,
        None => by_model(ctx, &spec, &asker, &parser, &records)?,
    };
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    let total = all.len();
    for (i, one) in all.into_iter().enumerate() {
        let record = &records[i / spec.n];
        let id = template::record_id(record, i / spec.n);
        let id = if spec.n == 1 { id } else { format!("{id}#{}", i % spec.n) };
        match one.parsed {
            Ok(fields) => {
                let mut record = output(&spec, record, &id, fields, one.text);
                if !spec.token_ids.is_empty() {
                    record.insert(spec.token_ids.clone(), json!(one.ids));
                }
                made.push(record);
            }
            Err(reason) => {
                failed.push(json!({"id": id, "reason": reason, "finish": one.finish, "completion": one.text}))
            }
        }
    }
    settle(ctx, &spec, total, &failed, made.is_empty())?;
    inputs::write_lines(&ctx.out.join("failed.jsonl"), &failed)?;
    write_jsonl(&ctx.out.join("data.jsonl"), &made)
}

/// Completions by a model on this machine, `n` for each record.
fn by_model(
    ctx: &Context,
    spec: &Spec,
    asker: &Asker,
    parser: &Parser,
    records: &[Record],
) -> Result<Vec<Made>, Problem> {
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let decoding = spec.decoding();
    let prompts = every(records, |record| {
        let budget = spec.thinking.as_ref().map_or(Ok(0), |thinking| thinking.budget(record))?;
        if asker.takes_ids(record) {
            let ids = decoding.continued(&tokenizer, record).map_err(|problem| problem.message)?;
            return Ok((ids, budget));
        }
        let (user, system) = asker.ask(record)?;
        let ids = decoding.prompt(&tokenizer, user, system).map_err(|problem| problem.message)?;
        Ok((ids, budget))
    })?;
    let mut requests = Vec::with_capacity(records.len() * spec.n);
    for (index, (record, (ids, budget))) in records.iter().zip(prompts).enumerate() {
        let id = template::record_id(record, index);
        requests.extend((0..spec.n).map(|sample| Request { id: id.clone(), sample, ids: ids.clone(), budget }));
    }
    let replies = completing::complete(ctx, &decoding, &tokenizer, &requests, "completions")?;
    let made = replies.into_iter().map(|reply| {
        let text = format!("{}{}", decoding.opening(), reply.text);
        let parsed = if reply.cut { parser.cut(&text, reply.tokens() as u64) } else { parser.fields(&text) };
        Made { finish: reply.finish().into(), ids: reply.ids, parsed, text }
    });
    Ok(made.collect())
}

/// The same by an endpoint. A reply that does not parse is asked for again, as another request.
fn by_endpoint(
    ctx: &Context,
    spec: &Spec,
    endpoint: &Endpoint,
    asker: &Asker,
    parser: &Parser,
    records: &[Record],
) -> Result<Vec<Made>, Problem> {
    let messages = conversations(asker, records)?;
    let ask = |i: usize| Ask { messages: messages[i / spec.n].clone(), sample: (i % spec.n) as u64, attempt: 0 };
    let asks = (0..records.len() * spec.n).map(ask).collect();
    let mut asking = Asking::new(ctx, endpoint)?;
    let attempts = spec.max_parse_attempts.unwrap_or(1);
    let made = asking.ask(asks, &spec.decoding().remotely(), attempts, "completions", &|_, completion, attempt| {
        let (one, final_word) = judged(parser, completion);
        let several = |why: String| if attempt > 1 { format!("{why} (the last of {attempt} attempts)") } else { why };
        let again = one.parsed.is_err() && !final_word;
        let one = Made { parsed: one.parsed.map_err(several), ..one };
        if again { Taken::Again(one) } else { Taken::Final(one) }
    })?;
    asking::write_usage(ctx, &json!(asking.bill()))?;
    Ok(made)
}

/// What every record asks an endpoint.
fn conversations(asker: &Asker, records: &[Record]) -> Result<Vec<Value>, Problem> {
    every(records, |record| {
        if asker.takes_ids(record) {
            return Err("`input_ids` mean nothing to an endpoint; the stage needs a `prompt`".into());
        }
        let (user, system) = asker.ask(record)?;
        Ok(asking::messages(user, system))
    })
}

/// What a stage with these parameters would ask its endpoint. With a sum of the replies to it that are kept.
fn pending(
    params: &Params,
    prompt_file: Option<&Path>,
    records: &[Record],
    line: &Connection,
) -> Result<(Vec<Pending>, Replies), Problem> {
    let spec: Spec = read_params(KIND.name, params.clone())?;
    let mut kept = Replies::default();
    let model = spec.endpoint.as_ref().map_or("", |endpoint| &endpoint.model);
    let (parser, asker) = (Parser::new(&spec.parse)?, Asker::new(&spec, prompt_file)?);
    let sampling = spec.decoding().remotely();
    let attempts = if parser.fields.is_empty() { 1 } else { spec.max_parse_attempts.unwrap_or(1) };
    let mut pending = Vec::new();
    for messages in conversations(&asker, records)? {
        for sample in 0..spec.n as u64 {
            for attempt in 0..attempts {
                let ask = Ask { messages: messages.clone(), sample, attempt };
                let Some(completion) = line.kept(&ask, &sampling)? else {
                    let key = ask.key(model, &sampling);
                    pending.push(Pending { key, prompt_bound: ask.prompt_bound(), tries: attempts - attempt });
                    break;
                };
                kept.add(ask.prompt_bound(), &completion);
                let (one, final_word) = judged(&parser, &Ok(completion));
                if one.parsed.is_ok() || final_word {
                    break;
                }
            }
        }
    }
    Ok((pending, kept))
}

/// What a reply comes to, and whether asking again would be of no use.
fn judged(parser: &Parser, completion: &Result<Completion, String>) -> (Made, bool) {
    let completion = match completion {
        Ok(completion) => completion,
        Err(why) => {
            let parsed = Err(format!("no reply: {why}"));
            return (Made { text: String::new(), finish: "none".into(), ids: Vec::new(), parsed }, true);
        }
    };
    let text = completion.text();
    let cut = completion.finish == Finish::Length;
    let parsed = match completion.refused() {
        Some(why) => Err(why),
        None if cut => parser.cut(&text, completion.usage.map_or(0, |usage| usage.completion_tokens)),
        None => parser.fields(&text),
    };
    let final_word = cut || completion.refused().is_some();
    (Made { finish: completion.finish().into(), ids: Vec::new(), parsed, text }, final_word)
}

impl Spec {
    fn decoding(&self) -> Decoding {
        Decoding {
            format: self.format,
            prefill: self.prefill.clone(),
            thinking: self.thinking.clone(),
            stop: self.stop.clone(),
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            dtype: self.dtype,
            batch: self.batch,
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            unmapped_ids: self.unmapped_ids,
        }
    }
}

/// Makes of a record what is asked.
struct Asker {
    prompt: Option<Template>,
    system: Option<Template>,
}

impl Asker {
    fn new(spec: &Spec, prompt_file: Option<&Path>) -> Result<Asker, Problem> {
        let prompt = Template::asked(spec.prompt.as_deref(), spec.prompt_file.as_deref(), prompt_file)?;
        let system = spec.system.as_deref().map(|text| Template::new("system", text)).transpose()?;
        Ok(Asker { prompt, system })
    }

    /// The record's own ids are continued as they stand.
    fn takes_ids(&self, record: &Record) -> bool {
        self.prompt.is_none() && record.contains_key("input_ids")
    }

    /// The user's text or whole turns, and the system message.
    fn ask(&self, record: &Record) -> Result<(Value, Option<String>), String> {
        let user = match &self.prompt {
            Some(template) => Value::String(template.render(record)?),
            None => match record.get("messages") {
                Some(messages) => messages.clone(),
                None => template::text_field(record, QUESTIONS)
                    .map(|text| Value::String(text.into()))
                    .ok_or("neither `input_ids`, `messages` nor `prompt`, `question` or `problem`, and the stage has no `prompt`")?,
            },
        };
        let system = self.system.as_ref().map(|template| template.render(record)).transpose()?;
        Ok((user, system))
    }
}

/// Every record's prompt; all that cannot be made are named at once, before anything is asked.
fn every<T>(records: &[Record], one: impl Fn(&Record) -> Result<T, String>) -> Result<Vec<T>, Problem> {
    let (mut all, mut bad, mut seen) = (Vec::new(), BadRows::default(), HashSet::new());
    for (index, record) in records.iter().enumerate() {
        let id = template::record_id(record, index);
        if !seen.insert(id.clone()) {
            bad.push("generate::duplicate_id", &format!("line {}", index + 1), &format!("the id `{id}` occurs twice"));
            continue;
        }
        match one(record) {
            Ok(prompt) => all.push(prompt),
            Err(what) => bad.push("generate::record", &format!("line {} (id `{id}`)", index + 1), &what),
        }
    }
    bad.finish(records.len(), None)?;
    Ok(all)
}

/// Fails, or tells the user, as `on_parse_failure` says.
fn settle(ctx: &Context, spec: &Spec, total: usize, failed: &[Value], none_left: bool) -> Result<(), Problem> {
    if failed.is_empty() {
        return Ok(());
    }
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or("").to_string();
    let named: Vec<String> =
        failed.iter().take(5).map(|f| format!("`{}`: {}", text(f, "id"), text(f, "reason"))).collect();
    let missing = failed.iter().any(|failed| failed["finish"] == "none");
    let what = if missing { "are missing or do not parse" } else { "do not parse" };
    let count = format!("{} of {total} completions {what}", failed.len());
    if spec.on_parse_failure == OnFailure::Drop && !none_left {
        ctx.progress.warn(&format!("{count}; left out and listed in failed.jsonl: {}", named[0]));
        return Ok(());
    }
    let first: String = text(&failed[0], "completion").chars().take(400).collect();
    let mut problem = Problem::new("generate::parse", count);
    problem.notes = named;
    let problem = problem.note(format!("the first of them begins: {first}"));
    Err(if none_left {
        problem.help("the prompt, or `parse`, does not fit what the model writes")
    } else {
        problem
            .help("on_parse_failure = \"drop\" leaves them out and lists them; the completions already made are kept")
    })
}

fn output(spec: &Spec, record: &Record, id: &str, fields: Vec<(String, String)>, text: String) -> Record {
    let mut out = Record::new();
    out.insert("id".into(), id.into());
    for (name, value) in record {
        let stays = spec.keep.as_ref().is_none_or(|keep| keep.contains(name));
        if name == "id" || !stays {
            continue;
        }
        let new = spec.rename.iter().find(|(_, old)| old.as_str() == Some(name)).map_or(name, |(new, _)| new);
        out.insert(new.clone(), value.clone());
    }
    for (name, value) in fields {
        out.insert(name, Value::String(value));
    }
    if !spec.completion.is_empty() {
        out.insert(spec.completion.clone(), Value::String(text));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_between_keys_are_checked_before_anything_runs() {
        let keys =
            |params: Value| -> Vec<&'static str> { rules(params.as_object().unwrap()).iter().map(|b| b.key).collect() };
        assert_eq!(keys(json!({"prompt": "{{ a", "parse": {}})), ["prompt"]);
        assert_eq!(keys(json!({"parse": {"kind": "regex"}})), ["parse.pattern"]);
        assert_eq!(keys(json!({"parse": {"kind": "sections"}})), ["parse.fields"]);
        assert_eq!(keys(json!({"parse": {"kind": "json"}})), ["parse.fields"]);
        assert_eq!(keys(json!({"parse": {"kind": "boxed", "fields": {"a": "thinking"}}})), ["parse.fields"]);
        assert_eq!(
            keys(json!({"parse": {"kind": "regex", "pattern": "(?<a>x)", "fields": {"b": "c"}}})),
            ["parse.fields"]
        );
        assert!(keys(json!({"prompt": "{{ q }}", "parse": {"kind": "think-answer"}})).is_empty());
    }

    #[test]
    fn nothing_that_a_completion_gives_takes_the_place_of_the_records_id() {
        let keys =
            |params: Value| -> Vec<&'static str> { rules(params.as_object().unwrap()).iter().map(|b| b.key).collect() };
        assert_eq!(keys(json!({"parse": {"kind": "json", "fields": {"id": "answer"}}})), ["parse.fields"]);
        assert_eq!(keys(json!({"parse": {"kind": "regex", "pattern": "(?<id>x)"}})), ["parse.pattern"]);
        assert!(keys(json!({"parse": {"kind": "regex", "pattern": "(?<id>x)", "fields": {"name": "id"}}})).is_empty());
        assert_eq!(keys(json!({"parse": {}, "rename": {"id": "number"}})), ["rename"]);
        assert_eq!(keys(json!({"parse": {}, "completion": "id", "token_ids": "id"})), ["completion", "token_ids"]);
    }
}
