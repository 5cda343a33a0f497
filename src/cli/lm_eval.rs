//! `pipe export M EVAL DIR --format lm-eval`: evaluations as lm-evaluation-harness 0.4 writes them.
//!
//! `DIR/MODEL/samples_TASK_DATE.jsonl` has a row for each problem, `DIR/MODEL/results_DATE.json` the scores of all
//! tasks of a model. Field names, hashes and the date in file names are that program's, so that what reads its logs
//! (its own loaders, pandas, viewers) reads these. Everything comes from artifacts and their records: exporting
//! twice gives the same bytes.

use pipe::data::{Record as Row, read_records};
use pipe::exec::Engine;
use pipe::plan::{AxisValue, CellId};
use pipe::problem::{Exit, Problem};
use pipe::store::{Record, damaged};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// What our extraction is called among that program's filters.
const FILTER: &str = "extract";
/// The one metric of a sample.
const METRIC: &str = "exact_match";
/// What that program writes where nothing was extracted.
const NOTHING: &str = "[invalid]";

/// An evaluation to be written.
struct Evaluation {
    label: String,
    task: String,
    record: Record,
    transcripts: PathBuf,
    docs: Vec<Row>,
}

/// What was written of one model.
pub struct Written {
    pub model: String,
    pub folder: PathBuf,
    pub files: usize,
}

/// What a task came to.
struct Scored {
    rates: Vec<f64>,
    /// Over the hashes of its rows.
    hash: String,
}

/// Writes evaluations; the files of each model.
pub fn export(engine: &Engine, cells: &[CellId], dir: &Path) -> Result<Vec<Written>, Problem> {
    let mut models: BTreeMap<String, Vec<Evaluation>> = BTreeMap::new();
    for id in cells {
        let (model, evaluation) = evaluation(engine, *id)?;
        let others = models.entry(model).or_default();
        if let Some(other) = others.iter().find(|other| other.task == evaluation.task) {
            let message = format!("`{}` and `{}` are both `{}`", other.label, evaluation.label, evaluation.task);
            return Err(Problem::new("cli::lm_eval", message).help("export them into folders of their own"));
        }
        others.push(evaluation);
    }
    let mut written = Vec::new();
    for (model, evaluations) in models {
        let folder = dir.join(sanitized(&model));
        std::fs::create_dir_all(&folder).map_err(|error| Problem::io("cli::export", "make", &folder, &error))?;
        // One run of that program ends for all its tasks at once.
        let date = evaluations.iter().map(|one| date_id(&one.record.measured.ended)).max().unwrap_or_default();
        let mut scored = Vec::new();
        for evaluation in &evaluations {
            let path = folder.join(format!("samples_{}_{date}.jsonl", evaluation.task));
            scored.push(samples(evaluation, &path)?);
        }
        let path = folder.join(format!("results_{date}.json"));
        let text = pretty(&results(&model, &evaluations, &scored));
        std::fs::write(&path, text).map_err(|error| Problem::io("cli::export", "write", &path, &error))?;
        written.push(Written { model, folder, files: evaluations.len() + 1 });
    }
    Ok(written)
}

/// What an evaluation needs, and the name of its model.
fn evaluation(engine: &Engine, id: CellId) -> Result<(String, Evaluation), Problem> {
    let cell = &engine.plan.cells[id];
    let label = cell.to_string();
    let gone = |what: &str| {
        Problem::new("cli::not_fresh", format!("{what} `{label}` is not in the cache")).exit(Exit::Missing)
    };
    let of_slot = |slot: &str| {
        let cells = cell.inputs.iter().find(|input| input.slot == slot).map(|input| &input.cells);
        cells.and_then(|cells| cells.last()).map(|id| &engine.plan.cells[*id])
    };
    let status = engine.status(&[id], &Default::default(), &Default::default());
    let record = match &status.statuses[id] {
        Some(pipe::exec::Status::Fresh { fingerprint, .. }) => engine.store.record(&fingerprint.digest()),
        _ => None,
    };
    let record = record.ok_or_else(|| gone("what is made by"))?;
    let files = engine.store.verify(&record.artifact).map_err(|damage| damaged(&label, &damage))?;
    let transcripts = files.get("transcripts.jsonl").ok_or_else(|| {
        let message = format!("`{label}` has no transcripts to be exported as samples");
        Problem::new("cli::no_transcripts", message).help("`--format lm-eval` takes `eval` stages").exit(Exit::Usage)
    })?;
    let used = record.inputs.get("task").and_then(|used| used.first()).ok_or_else(|| gone("the task of"))?;
    let task = engine.store.record(&used.fingerprint).ok_or_else(|| gone("the task of"))?;
    let docs = engine.store.verify(&task.artifact).map_err(|damage| damaged(&used.cell, &damage))?;
    let docs = read_records(docs.get("data.jsonl").ok_or_else(|| gone("the task of"))?)?;
    let (model, by) = match of_slot("model") {
        Some(model) => (name(&model.stage, model.axes.0.iter()), Some(model)),
        None => (record.params["endpoint"]["model"].as_str().unwrap_or("endpoint").to_string(), None),
    };
    // What tells evaluations of one model apart: the task, and axes that are the evaluation's own.
    let task = of_slot("task").unwrap_or(cell);
    let own = cell.axes.0.iter().filter(|(axis, value)| {
        let elsewhere = task.axes.get(axis).is_some() || by.is_some_and(|model| model.axes.get(axis).is_some());
        !elsewhere && value.to_string() != task.stage
    });
    let task = name(&task.stage, task.axes.0.iter().chain(own));
    Ok((model, Evaluation { label, task, transcripts: transcripts.to_path_buf(), record, docs }))
}

/// A stage's name and the values of axes, as a part of a file name.
fn name<'a>(stage: &str, axes: impl Iterator<Item = &'a (String, AxisValue)>) -> String {
    let mut name = stage.to_string();
    axes.for_each(|(_, value)| {
        let _ = write!(name, "-{value}");
    });
    name.chars().map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect()
}

/// A model's name as that program makes a folder of it.
fn sanitized(model: &str) -> String {
    let mut name = String::new();
    for letter in model.chars() {
        match "\"<>:/|\\?*[]".contains(letter) {
            true if name.ends_with("__") => {}
            true => name.push_str("__"),
            false => name.push(letter),
        }
    }
    name
}

/// `2026-11-23T12:14:15Z` as it stands in file names, where a fraction of the second is expected.
fn date_id(utc: &str) -> String {
    format!("{}.000000", utc.trim_end_matches('Z').replace(':', "-"))
}

/// Seconds since 1970 of `2026-11-23T12:14:15Z`; 0 of what is none.
fn seconds(utc: &str) -> i64 {
    utc.parse().map_or(0, |moment: jiff::Timestamp| moment.as_second())
}

/// Samples of one problem, in their order.
struct Problems<'a> {
    lines: BufReader<File>,
    path: &'a Path,
    /// The first sample of the next problem.
    next: Option<Map<String, Value>>,
}

impl Problems<'_> {
    fn open(path: &Path) -> Result<Problems<'_>, Problem> {
        let file = File::open(path).map_err(|error| Problem::io("cli::export", "read", path, &error))?;
        let mut problems = Problems { lines: BufReader::new(file), path, next: None };
        problems.next = problems.line()?;
        Ok(problems)
    }

    fn line(&mut self) -> Result<Option<Map<String, Value>>, Problem> {
        let mut line = String::new();
        self.lines.read_line(&mut line).map_err(|error| Problem::io("cli::export", "read", self.path, &error))?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).map_err(|error| {
            Problem::new("cli::export", format!("a transcript is no object: {error}")).at_file(self.path)
        })
    }

    fn next(&mut self) -> Result<Option<Vec<Map<String, Value>>>, Problem> {
        let Some(first) = self.next.take() else { return Ok(None) };
        let mut samples = vec![first];
        loop {
            match self.line()? {
                Some(sample) if sample.get("id") == samples[0].get("id") => samples.push(sample),
                other => {
                    self.next = other;
                    return Ok(Some(samples));
                }
            }
        }
    }
}

/// Writes the rows of one evaluation.
fn samples(evaluation: &Evaluation, path: &Path) -> Result<Scored, Problem> {
    let refused = |error: std::io::Error| Problem::io("cli::export", "write", path, &error);
    let places: HashMap<String, usize> =
        evaluation.docs.iter().enumerate().map(|(at, doc)| (id_of(doc, at), at)).collect();
    let mut problems = Problems::open(&evaluation.transcripts)?;
    let mut out = BufWriter::new(File::create(path).map_err(refused)?);
    let (mut rates, mut hashes) = (Vec::new(), String::new());
    let settings = settings(&evaluation.record.params);
    while let Some(samples) = problems.next()? {
        let id = text(samples[0].get("id"));
        let at = *places.get(&id).ok_or_else(|| {
            Problem::new("cli::export", format!("the task of `{}` has no record `{id}`", evaluation.label))
        })?;
        let doc = Value::Object(evaluation.docs[at].clone());
        let (prompt, target) = (text(samples[0].get("prompt")), text(samples[0].get("gold")));
        let each = |field: &str, or: &str| -> Vec<String> {
            samples.iter().map(|sample| sample.get(field).and_then(Value::as_str).unwrap_or(or).to_string()).collect()
        };
        let right = samples.iter().filter(|sample| sample.get("verdict") == Some(&json!("correct"))).count();
        let rate = right as f64 / samples.len() as f64;
        let found = each("extracted", NOTHING);
        let hash = [hashed(&python(&doc)), hashed(&prompt), hashed(&target)];
        let row = json!({
            "doc_id": at,
            "doc": doc,
            "target": target,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": settings}},
            "resps": [each("completion", "")],
            // Of one sample itself, of several their list.
            "filtered_resps": if let [only] = &found[..] { json!([only]) } else { json!([found]) },
            "filter": FILTER,
            "metrics": [METRIC],
            "doc_hash": hash[0],
            "prompt_hash": hash[1],
            "target_hash": hash[2],
            METRIC: rate,
        });
        writeln!(out, "{row}").map_err(refused)?;
        rates.push(rate);
        hashes.extend(hash);
    }
    out.flush().map_err(refused)?;
    Ok(Scored { rates, hash: hashed(&hashes) })
}

fn id_of(doc: &Row, at: usize) -> String {
    match doc.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("line-{}", at + 1),
    }
}

/// Text as it stands, anything else as JSON.
fn text(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

/// How completions were drawn, by that program's names.
fn settings(params: &Map<String, Value>) -> Value {
    let temperature = params.get("temperature").and_then(Value::as_f64).unwrap_or(0.0);
    json!({
        "until": params.get("stop").cloned().unwrap_or(json!([])),
        "max_gen_toks": params.get("max_tokens"),
        "do_sample": temperature > 0.0,
        "temperature": temperature,
        "top_p": params.get("top_p"),
        "top_k": params.get("top_k"),
    })
}

/// The scores of all tasks of a model.
fn results(model: &str, evaluations: &[Evaluation], scored: &[Scored]) -> Value {
    let by_task = |of: &dyn Fn(&Evaluation, &Scored) -> Value| -> Value {
        let mut all: Vec<(String, Value)> =
            evaluations.iter().zip(scored).map(|(one, scored)| (one.task.clone(), of(one, scored))).collect();
        all.sort_by(|one, other| one.0.cmp(&other.0));
        Value::Object(all.into_iter().collect())
    };
    let score = |one: &Evaluation, scored: &Scored| {
        let count = scored.rates.len() as f64;
        let mean = scored.rates.iter().sum::<f64>() / count;
        let squares: f64 = scored.rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        let error =
            if scored.rates.len() > 1 { json!((squares / (count - 1.0)).sqrt() / count.sqrt()) } else { json!("N/A") };
        json!({"alias": one.task, format!("{METRIC},{FILTER}"): mean, format!("{METRIC}_stderr,{FILTER}"): error})
    };
    let config = |one: &Evaluation, _: &Scored| {
        let params = &one.record.params;
        json!({
            "task": one.task,
            "output_type": "generate_until",
            "description": "",
            "num_fewshot": 0,
            "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": true}],
            "generation_kwargs": settings(params),
            "repeats": params.get("n"),
            "filter_list": [{"name": FILTER, "filter": [{"function": params.get("grader")}]}],
            "metadata": {
                "version": one.record.tool,
                "cell": one.label,
                "fingerprint": one.record.fingerprint.to_string(),
            },
        })
    };
    let effective =
        |one: &Evaluation, scored: &Scored| json!({"original": one.docs.len(), "effective": scored.rates.len()});
    let first = &evaluations[0].record;
    let start = evaluations.iter().map(|one| seconds(&one.record.measured.started)).min().unwrap_or(0);
    let end = evaluations.iter().map(|one| seconds(&one.record.measured.ended)).max().unwrap_or(0);
    let machine: Vec<String> = first.machine.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let seed = first.params.get("seed");
    json!({
        "results": by_task(&score),
        "group_subtasks": by_task(&|_, _| json!([])),
        "configs": by_task(&config),
        "versions": by_task(&|one, _| json!(one.record.tool)),
        "n-shot": by_task(&|_, _| json!(0)),
        "higher_is_better": by_task(&|_, _| json!({METRIC: true})),
        "n-samples": by_task(&effective),
        "config": {
            "model": "pipe",
            "model_args": format!("pretrained={model}"),
            "batch_size": first.params.get("batch"),
            "batch_sizes": [],
            "device": null,
            "use_cache": null,
            "limit": first.params.get("limit"),
            "bootstrap_iters": 0,
            "gen_kwargs": null,
            "random_seed": seed,
            "numpy_seed": seed,
            "torch_seed": seed,
            "fewshot_seed": seed,
        },
        "git_hash": null,
        "date": start as f64,
        "pretty_env_info": format!("{}\n{}", first.tool, machine.join("\n")),
        "task_hashes": by_task(&|_, scored| json!(scored.hash)),
        "model_source": "pipe",
        "model_name": model,
        "model_name_sanitized": sanitized(model),
        "system_instruction": null,
        "system_instruction_sha": null,
        "fewshot_as_multiturn": false,
        "chat_template": null,
        "chat_template_sha": null,
        "start_time": start as f64,
        "end_time": end as f64,
        "total_evaluation_time_seconds": format!("{:?}", (end - start) as f64),
    })
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn hashed(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// A record as Python's `json.dumps(.., indent=2, ensure_ascii=False)` writes it: that is what is hashed. It differs
/// from JSON's usual form in how floats are written.
fn python(value: &Value) -> String {
    fn put(value: &Value, depth: usize, out: &mut String) {
        let line = |out: &mut String, depth: usize| {
            out.push('\n');
            out.extend(std::iter::repeat_n("  ", depth));
        };
        match value {
            Value::Array(items) if !items.is_empty() => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    line(out, depth + 1);
                    put(item, depth + 1, out);
                }
                line(out, depth);
                out.push(']');
            }
            Value::Object(fields) if !fields.is_empty() => {
                out.push('{');
                for (at, (name, item)) in fields.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    line(out, depth + 1);
                    let _ = write!(out, "{}: ", Value::String(name.clone()));
                    put(item, depth + 1, out);
                }
                line(out, depth);
                out.push('}');
            }
            Value::Number(number) if number.is_f64() => out.push_str(&python_float(number.as_f64().unwrap_or(0.0))),
            other => {
                let _ = write!(out, "{other}");
            }
        }
    }
    let mut out = String::new();
    put(value, 0, &mut out);
    out
}

/// Python's `repr`: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As printed by Python 3.11.
    #[test]
    fn floats_and_records_are_written_as_python_does() {
        let floats = [1.0, 0.1, 1e-5, 0.0001, 1.5e-7, 1e15, 1e16, 123_456_789_012_345_680.0, -2.5e300, 0.0, -0.0];
        let python_says = [
            "1.0",
            "0.1",
            "1e-05",
            "0.0001",
            "1.5e-07",
            "1000000000000000.0",
            "1e+16",
            "1.2345678901234568e+17",
            "-2.5e+300",
            "0.0",
            "-0.0",
        ];
        assert_eq!(floats.map(python_float), python_says);
        let record = json!({"q": "é\n\"\u{7f}\u{1}", "none": null, "list": [1, 1e-7, [], {}], "yes": true});
        let text = concat!(
            "{\n  \"q\": \"é\\n\\\"\u{7f}\\u0001\",\n  \"none\": null,\n",
            "  \"list\": [\n    1,\n    1e-07,\n    [],\n    {}\n  ],\n  \"yes\": true\n}"
        );
        assert_eq!(python(&record), text);
    }

    #[test]
    fn names_and_dates_are_those_of_the_other_program() {
        assert_eq!(sanitized("a/b:[c]d"), "a__b__c__d");
        assert_eq!(date_id("2026-11-23T12:14:15Z"), "2026-11-23T12-14-15.000000");
        assert_eq!(
            ["1970-01-01T00:00:00Z", "2000-02-29T00:00:00Z", "2100-03-01T00:00:00Z"].map(seconds),
            [0, 951_782_400, 4_107_542_400]
        );
    }
}
