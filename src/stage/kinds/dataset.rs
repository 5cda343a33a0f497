//! `dataset`: records from outside, or from other datasets, made into the records a study trains on.
//!
//! The steps run in one order, whatever the order of the keys: read (`source` or `concat`), `id`, `columns`,
//! `extract`, `tag`, `filter`, `only_in`/`not_in`, `pair`, `sample`, `shuffle_seed`, `shortest`, `limit`,
//! `select`/`drop`, `tokenize`. Another order is another stage.
//!
//! Every record has an `id`. Where a source has none it is made from the record's content, so it
//! stays the same when rows are added or columns chosen; a source that gives one twice is an error.
//! Two datasets may share ids: that is how a forward example knows its reverse.
//!
//! What is drawn at random is drawn by the hash of (seed, id), not by position: adding a row to the
//! source moves at most one row in or out of the sample.

mod filter;
mod read;
mod rows;
mod spec;
mod tokens;

use crate::data::{BadRows, Record, write_jsonl};
use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::problem::Problem;
use crate::random::Stream;
use crate::stage::context::Context;
use crate::stage::kind::StageKind;
use crate::stage::share::bundled;
use crate::stage::share::training;
use filter::filter;
use read::{read, read_input};
use regex::Regex;
use rows::{Row, lookup, too_few};
use serde_json::{Map, Value, json};
use spec::{Counterpart, Pairing, Sampling, Spec, Unmatched};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use tokens::{keep_shortest, tokenize};

const SCALAR: Type = Type::Any(&[
    Type::Bool,
    Type::Int { min: i64::MIN, max: i64::MAX },
    Type::Float { min: f64::MIN, max: f64::MAX, above: false },
    Type::Str,
]);
const COUNT: Type = Type::Int { min: 1, max: i64::MAX };
const SEED: Type = Type::Int { min: 0, max: i64::MAX };
const DATASET: &[ArtifactType] = &[ArtifactType::Dataset];
const BY: Key = Key::default("by", Type::Str, "\"id\"", "The field whose value two records share.");

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "dataset",
    about: "import, map columns, filter, sample, concatenate, build preference pairs",
    recipe: 1,
    yields: ArtifactType::Dataset,
    keys: &[
        Key::optional(
            "source",
            Type::Source(&["hf", "path", "init"]),
            "A JSON Lines, JSON, CSV (with a header) or Parquet file, a folder of them, or a dataset on the hub (`hf:OWNER/NAME`); or one that is bundled, such as `init:mini-math500`. Either this or `concat`.",
        ),
        Key::optional(
            "file",
            Type::Str,
            "Which files of a folder or repository: a path with `*` (not across `/`) and `**`. All matches are read, in name order.",
        ),
        Key::optional(
            "split",
            Type::Str,
            "Which files of a folder or repository: those of this split (`train.jsonl`, `train-00000-of-00002.parquet`, `train/...`).",
        ),
        Key::optional("concat", Type::Refs(DATASET), "Datasets, one after the other. Either this or `source`."),
        Key::optional(
            "id",
            Type::Str,
            "The field that holds a record's id; may be a dotted path. It becomes `id`. Absent: `id`, and where a record has none it is made of the record's content.",
        ),
        Key::default(
            "columns",
            Type::Map(&Type::Str),
            "{}",
            "New name = old name. Old names may be dotted paths (`messages.0.content`). A plain old name moves, a dotted path is copied.",
        ),
        Key::optional(
            "extract",
            Type::Map(&Type::Table(&[
                Key::required(
                    "from",
                    Type::Str,
                    "The text looked at; may be a dotted path, or a name that `columns` gave.",
                ),
                Key::required(
                    "pattern",
                    Type::Str,
                    "A regular expression. Its first group is taken, or all it matches if it has none; blanks around it go.",
                ),
            ])),
            "New field = a part of a text: `{ answer = { from = \"solution\", pattern = '#### (.*)' } }`. A record where the pattern finds nothing is an error.",
        ),
        Key::default(
            "tag",
            Type::Map(&SCALAR),
            "{}",
            "Constant fields added to every record, for example `direction`.",
        ),
        Key::default(
            "filter",
            Type::List(&Type::Table(&[
                Key::required("field", Type::Str, "The field looked at; may be a dotted path."),
                Key::optional("equals", SCALAR, "Is exactly this."),
                Key::optional("one_of", Type::List(&SCALAR), "Is exactly one of these."),
                Key::optional("matches", Type::Str, "Is a text in which this regular expression is found."),
                Key::optional("min_length", COUNT, "Is a text of at least this many characters."),
                Key::optional("max_length", COUNT, "Is a text of at most this many characters."),
                Key::optional("at_least", NUMBER, "Is a number, this or more."),
                Key::optional("at_most", NUMBER, "Is a number, this or less."),
                Key::optional(
                    "not_empty",
                    Type::Bool,
                    "Is there, and not null, blank or an empty list (`false`: the opposite).",
                ),
                Key::default("invert", Type::Bool, "false", "Keep the records for which this condition does not hold."),
            ])),
            "[]",
            "Conditions; a record stays if all hold.",
        ),
        Key::optional(
            "only_in",
            Type::Table(&[Key::required("dataset", Type::Ref(DATASET), "The other dataset."), BY]),
            "Keep the records that have a counterpart in another dataset.",
        ),
        Key::optional(
            "not_in",
            Type::Table(&[Key::required("dataset", Type::Ref(DATASET), "The other dataset."), BY]),
            "Keep the records that have no counterpart in another dataset, for example held-out ones.",
        ),
        Key::optional(
            "pair",
            Type::Table(&[
                Key::required("with", Type::Ref(DATASET), "The dataset of the reverse examples."),
                BY,
                Key::default(
                    "unmatched",
                    Type::Choice(&["error", "drop"]),
                    "\"error\"",
                    "What happens to a record without a counterpart in `with`.",
                ),
            ]),
            "Preference pairs in both directions: a forward prompt prefers its forward answer to the reverse one, a reverse prompt the other way round.",
        ),
        Key::optional(
            "sample",
            Type::Table(&[
                Key::optional("rows", COUNT, "This many records. Either this or `pairs`."),
                Key::optional(
                    "pairs",
                    COUNT,
                    "This many records of the first dataset of `concat`, each with its counterpart in every other.",
                ),
                Key::default("by", Type::Str, "\"id\"", "The field that counterparts share."),
                Key::default("seed", SEED, "0", "Another seed is another sample."),
            ]),
            "A random part of the records, in their order.",
        ),
        Key::optional(
            "shuffle_seed",
            SEED,
            "Shuffle the records; another seed is another order. Absent: the order stays.",
        ),
        Key::optional(
            "shortest",
            Type::Table(&[
                Key::required("rows", COUNT, "This many records."),
                Key::required("tokenizer", Type::Ref(&[ArtifactType::Model]), "The model whose tokenizer counts."),
                Key::default(
                    "fields",
                    Type::List(&Type::Str),
                    "[\"text\", \"prompt\", \"thinking\", \"answer\"]",
                    "The text fields counted together; absent ones count nothing.",
                ),
            ]),
            "The records with the fewest tokens, in their order; earlier ones first where lengths are equal.",
        ),
        Key::optional("limit", COUNT, "Only this many records, from the first on."),
        Key::optional("select", Type::List(&Type::Str), "Fields to keep; `id` stays in any case."),
        Key::optional("drop", Type::List(&Type::Str), "Fields to leave out."),
        Key::optional(
            "tokenize",
            Type::Table(&[
                Key::required(
                    "tokenizer",
                    Type::Ref(&[ArtifactType::Model]),
                    "The model whose tokenizer and chat template are used.",
                ),
                Key::default("format", Type::Choice(training::FORMATS), "\"chat\"", "As in a training stage."),
                Key::default("eos", Type::Choice(training::ENDS), "\"one\"", "As in a training stage."),
                Key::optional("max_tokens", COUNT, "Longest example, in tokens."),
                Key::optional("max_prompt_tokens", COUNT, "Longest prompt, in tokens."),
                Key::optional("max_completion_tokens", COUNT, "Longest completion, in tokens."),
                Key::default(
                    "on_overlength",
                    Type::Choice(training::OVERLENGTH),
                    "\"error\"",
                    "As in a training stage.",
                ),
                Key::default("truncate_side", Type::Choice(&["left", "right"]), "\"right\"", "As in a training stage."),
            ]),
            "Write what a training stage would see, in place of the text: `input_ids` and `labels` (-100: not learned); for preferences `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids`. Training stages use such records as they stand.",
        ),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind::new(&KIND, run);

const NUMBER: Type = Type::Float { min: f64::MIN, max: f64::MAX, above: false };

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let mut say = |key: &'static str, message: &str, help: &str| {
        broken.push(Broken { key, message: message.into(), help: help.into() });
    };
    let example = "`source = \"path:data.jsonl\"`, or `concat = [\"one\", \"other\"]`";
    match (params.contains_key("source"), params.contains_key("concat")) {
        (true, true) => say("concat", "`source` and `concat` are two origins; a dataset has one", example),
        (false, false) => say("source", "a dataset needs `source` or `concat`", example),
        _ => {}
    }
    let bundled = params.get("source").and_then(Value::as_str).and_then(|source| source.strip_prefix("init:"));
    if let Some(name) = bundled.filter(|name| bundled::dataset(name).is_none()) {
        let names: Vec<&str> = bundled::DATASETS.iter().map(|(name, _)| *name).collect();
        say("source", &format!("there is no bundled dataset `{name}`"), &format!("bundled: {}", names.join(", ")));
    }
    for key in ["file", "split"] {
        if params.contains_key(key) && !params.contains_key("source") {
            say(
                if key == "file" { "file" } else { "split" },
                "this key chooses among the files of a `source`",
                "add `source`, or remove the key",
            );
        }
    }
    if params.contains_key("file") && params.contains_key("split") {
        say("split", "`file` and `split` are two ways to say the same", "keep one of them");
    }
    if params.contains_key("select") && params.contains_key("drop") {
        say("drop", "`select` and `drop` are two ways to say the same", "keep one of them");
    }
    if let Some(sample) = params.get("sample")
        && sample.get("rows").is_some() == sample.get("pairs").is_some()
    {
        say("sample", "`sample` needs exactly one of `rows` and `pairs`", "`sample = { rows = 500, seed = 0 }`");
    }
    for condition in params.get("filter").and_then(Value::as_array).into_iter().flatten() {
        let tests = condition.as_object().into_iter().flat_map(|table| table.keys());
        if !tests.into_iter().any(|key| key != "field" && key != "invert") {
            say("filter", "a condition needs a test", "`filter = [{ field = \"grade\", equals = \"Yes\" }]`");
        }
        if let Some(pattern) = condition.get("matches").and_then(Value::as_str)
            && let Err(error) = Regex::new(pattern)
        {
            say(
                "filter",
                &format!("`{pattern}` is not a regular expression: {error}"),
                "see https://docs.rs/regex/#syntax",
            );
        }
    }
    for (name, extract) in params.get("extract").and_then(Value::as_object).into_iter().flatten() {
        if let Some(Err(error)) = extract.get("pattern").and_then(Value::as_str).map(Regex::new) {
            say(
                "extract",
                &format!("`{name}`: not a regular expression: {error}"),
                "see https://docs.rs/regex/#syntax",
            );
        }
    }
    broken
}

/// Writes `data.jsonl`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let mut rows = read(ctx, &spec)?;
    let read = rows.len();
    ctx.stopped()?;

    for row in &mut rows {
        for (name, value) in &spec.tag {
            row.record.insert(name.clone(), value.clone());
        }
    }
    filter(&mut rows, &spec.filter)?;
    for (counterpart, slot, wanted) in
        [(&spec.only_in, "only_in.dataset", true), (&spec.not_in, "not_in.dataset", false)]
    {
        let Some(Counterpart { by }) = counterpart else { continue };
        let other: BTreeSet<String> =
            keys_of(&read_input(ctx, slot)?, by, slot)?.into_iter().map(|(key, _)| key).collect();
        let mut keys = row_keys(&rows, by)?.into_iter();
        rows.retain(|_| keys.next().is_some_and(|key| other.contains(&key)) == wanted);
    }
    if let Some(pairing) = &spec.pair {
        rows = pair(ctx, rows, pairing)?;
    }
    if let Some(sampling) = &spec.sample {
        rows = sample(rows, sampling)?;
    }
    if let Some(seed) = spec.shuffle_seed {
        let order = Stream::named(seed, &["dataset"]).permutation(rows.len());
        let mut slots: Vec<Option<Row>> = rows.into_iter().map(Some).collect();
        rows = order.into_iter().filter_map(|at| slots[at].take()).collect();
    }
    if let Some(shortest) = &spec.shortest {
        rows = keep_shortest(ctx, rows, shortest)?;
    }
    rows.truncate(spec.limit.unwrap_or(usize::MAX));
    if let Some(select) = &spec.select {
        choose_fields(&mut rows, select, "select", true)?;
    }
    if let Some(drop) = &spec.drop {
        choose_fields(&mut rows, drop, "drop", false)?;
    }
    if rows.is_empty() {
        return Err(Problem::new("data::empty", format!("no record is left of the {read} that were read"))
            .help("loosen `filter`, `only_in` or `not_in`"));
    }
    ctx.progress.note(&format!("{read} records read, {} written", rows.len()));
    let mut records: Vec<Record> = rows.into_iter().map(|row| row.record).collect();
    if let Some(spec) = &spec.tokenize {
        records = tokenize(ctx, &records, spec)?;
    }
    write_jsonl(&ctx.out.join("data.jsonl"), &records)
}

/// The value two records share, as text.
fn key_of(record: &Record, by: &str) -> Option<String> {
    match lookup(record, by)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn keys_of<'r>(
    records: impl IntoIterator<Item = &'r Record>,
    by: &str,
    what: &str,
) -> Result<Vec<(String, usize)>, Problem> {
    let mut bad = BadRows::default();
    let mut keys = Vec::new();
    let mut total = 0;
    for (at, record) in records.into_iter().enumerate() {
        total += 1;
        match key_of(record, by) {
            Some(key) => keys.push((key, at)),
            None => {
                bad.push(
                    "data::missing_field",
                    &format!("record {} of {what}", at + 1),
                    &format!("no text or number `{by}`"),
                );
                bad.help("`by` names a field that every record of both datasets has");
            }
        }
    }
    bad.finish(total, None)?;
    Ok(keys)
}

fn row_keys(rows: &[Row], by: &str) -> Result<Vec<String>, Problem> {
    let keys = keys_of(rows.iter().map(|row| &row.record), by, "this dataset")?;
    Ok(keys.into_iter().map(|(key, _)| key).collect())
}

/// Both directions of every record and its counterpart.
fn pair(ctx: &Context, rows: Vec<Row>, pairing: &Pairing) -> Result<Vec<Row>, Problem> {
    let others = read_input(ctx, "pair.with")?;
    let mut reverse: HashMap<String, &Record> = HashMap::new();
    let mut bad = BadRows::default();
    for (key, at) in keys_of(&others, &pairing.by, "`pair.with`")? {
        if reverse.insert(key.clone(), &others[at]).is_some() {
            bad.push(
                "dataset::pair_key",
                &format!("record {} of `pair.with`", at + 1),
                &format!("`{}` is `{key}` a second time", pairing.by),
            );
        }
    }
    bad.finish(others.len(), None)?;

    let mut bad = BadRows::default();
    let (mut pairs, mut unmatched) = (Vec::new(), 0);
    let keys = row_keys(&rows, &pairing.by)?;
    for (at, (row, key)) in rows.iter().zip(&keys).enumerate() {
        let place = format!("record {} (`{}` is `{key}`)", at + 1, pairing.by);
        let Some(reverse) = reverse.get(key) else {
            unmatched += 1;
            if pairing.unmatched == Unmatched::Error {
                bad.push("dataset::unmatched", &place, "no counterpart in `pair.with`");
                bad.help("say unmatched = \"drop\" to leave such records out");
            }
            continue;
        };
        for (direction, own, other) in [("forward", &row.record, *reverse), ("reverse", *reverse, &row.record)] {
            match preference(key, direction, own, other) {
                Ok(record) => pairs.push(Row { record, origin: 0 }),
                Err(what) => bad.push("data::missing_field", &place, &format!("{direction}: {what}")),
            }
        }
    }
    bad.finish(rows.len(), None)?;
    if unmatched > 0 {
        ctx.progress.warn(&format!(
            "{unmatched} of {} records have no counterpart in `pair.with` and are left out",
            rows.len()
        ));
    }
    Ok(pairs)
}

/// The fields of a record that make its completion; they become `chosen` and `rejected`.
const COMPLETION: [&str; 3] = ["completion", "thinking", "answer"];

/// `own` prefers its own completion to that of `other`. Its remaining fields stay.
fn preference(key: &str, direction: &str, own: &Record, other: &Record) -> Result<Record, String> {
    if lookup(own, "prompt").is_none() && lookup(own, "messages").is_none() {
        return Err("no `prompt` or `messages`".into());
    }
    let mut record = Record::new();
    record.insert("id".into(), json!(format!("{key}/{direction}")));
    for (name, value) in own.iter().filter(|(name, _)| *name != "id" && !COMPLETION.contains(&name.as_str())) {
        record.insert(name.clone(), value.clone());
    }
    record.insert("direction".into(), json!(direction));
    for (side, from) in [("chosen", own), ("rejected", other)] {
        record.insert(side.into(), completion(from).ok_or("no `completion` or `answer`")?);
    }
    Ok(record)
}

fn completion(record: &Record) -> Option<Value> {
    let present = |name: &str| record.get(name).filter(|value| !value.is_null());
    if let Some(text) = present("completion") {
        return Some(text.clone());
    }
    let mut parts = Map::new();
    if let Some(thinking) = present("thinking") {
        parts.insert("thinking".into(), thinking.clone());
    }
    parts.insert("answer".into(), present("answer")?.clone());
    Some(Value::Object(parts))
}

/// A random part of the rows, in their order.
fn sample(rows: Vec<Row>, sampling: &Sampling) -> Result<Vec<Row>, Problem> {
    let Sampling { rows: count, pairs, by, seed } = sampling;
    let keys = row_keys(&rows, by)?;
    let rank = |words: &[&str]| Stream::named(*seed, words).block(0);
    let kept: BTreeSet<usize> = if let Some(pairs) = pairs {
        let datasets: BTreeSet<usize> = rows.iter().map(|row| row.origin).collect();
        if datasets.len() < 2 {
            return Err(Problem::new("dataset::sample", "`sample.pairs` needs the records of at least two datasets")
                .help("name both in `concat = [\"forward\", \"reverse\"]`"));
        }
        let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (at, key) in keys.iter().enumerate() {
            groups.entry(key).or_default().push(at);
        }
        let complete = |group: &[usize]| {
            group.len() == datasets.len()
                && group.iter().map(|&at| rows[at].origin).collect::<BTreeSet<_>>() == datasets
        };
        let total = groups.len();
        groups.retain(|_, group| complete(group));
        let mut ranked: Vec<(&str, Vec<usize>)> = groups.into_iter().collect();
        if ranked.len() < *pairs {
            return Err(too_few(*pairs, ranked.len(), "pairs").note(format!(
                "of {total} values of `{by}`, {} occur exactly once in every dataset of `concat`",
                ranked.len()
            )));
        }
        ranked.sort_by_key(|(key, _)| rank(&["pairs", key]));
        ranked.into_iter().take(*pairs).flat_map(|(_, group)| group).collect()
    } else {
        let count = count.unwrap_or(rows.len());
        if rows.len() < count {
            return Err(too_few(count, rows.len(), "rows"));
        }
        // Records that share a key are told apart by which of them it is.
        let mut times: HashMap<&str, usize> = HashMap::new();
        let mut ranked: Vec<usize> = (0..rows.len()).collect();
        let ranks: Vec<[u32; 4]> = keys
            .iter()
            .map(|key| {
                let time = times.entry(key).or_default();
                *time += 1;
                rank(&["rows", key, &time.to_string()])
            })
            .collect();
        ranked.sort_by_key(|&at| ranks[at]);
        ranked.into_iter().take(count).collect()
    };
    Ok(rows.into_iter().enumerate().filter(|(at, _)| kept.contains(at)).map(|(_, row)| row).collect())
}

/// Keeps (`keep`) or leaves out the named fields. A name that no record has is an error.
fn choose_fields(rows: &mut [Row], names: &[String], key: &str, keep: bool) -> Result<(), Problem> {
    for name in names {
        if !rows.is_empty() && !rows.iter().any(|row| row.record.contains_key(name)) {
            return Err(Problem::new("dataset::field", format!("`{key}` names `{name}`, which no record has")));
        }
    }
    for row in rows {
        row.record.retain(|name, _| name == "id" || names.contains(name) == keep);
    }
    Ok(())
}
