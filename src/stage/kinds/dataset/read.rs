//! From files and other datasets to rows with ids, their columns mapped.

use super::rows::{Row, lookup};
use super::spec::{Extract, Spec};
use crate::data::records::kind_of;
use crate::data::{BadRows, Record, parse_numbered, read_numbered};
use crate::digest::Digest;
use crate::files::Files;
use crate::problem::{Exit, Problem};
use crate::stage::context::{Artifact, Context};
use crate::stage::share::bundled;
use regex::Regex;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Records with their lines.
type Numbered = Vec<(usize, Record)>;

/// The records of `source` or `concat`, their columns mapped, each with an id.
pub(super) fn read(ctx: &Context, spec: &Spec) -> Result<Vec<Row>, Problem> {
    let inputs = ctx.inputs("concat");
    let mut rows = Vec::new();
    if let Some(source) = &spec.source {
        let mut ids = Ids::default();
        for (file, mut numbered) in sourced(ctx, spec, source)? {
            let made: Vec<String> = numbered.iter().map(|(_, record)| ids.made(record)).collect();
            name_ids(&mut numbered, &spec.id, &file)?;
            map_columns(&mut numbered, &spec.columns, &file.display().to_string(), &file)?;
            extract(&mut numbered, &spec.extract, &file)?;
            ids.fill(&mut numbered, made, &file, true)?;
            rows.extend(numbered.into_iter().map(|(_, record)| Row { record, origin: 0 }));
        }
    }
    for (origin, input) in inputs.iter().enumerate() {
        let mut numbered = read_artifact(input)?;
        let place = Path::new(&input.stage).join("data.jsonl");
        let mut ids = Ids::default();
        let made: Vec<String> = numbered.iter().map(|(_, record)| ids.made(record)).collect();
        name_ids(&mut numbered, &spec.id, &place)?;
        map_columns(&mut numbered, &spec.columns, &format!("`{}`", input.stage), &place)?;
        extract(&mut numbered, &spec.extract, &place)?;
        ids.fill(&mut numbered, made, &place, false)?;
        rows.extend(numbered.into_iter().map(|(_, record)| Row { record, origin }));
    }
    Ok(rows)
}

/// The records of each file that a source stands for.
fn sourced(ctx: &Context, spec: &Spec, source: &str) -> Result<Vec<(PathBuf, Numbered)>, Problem> {
    if let Some(bytes) = source.strip_prefix("init:").and_then(bundled::dataset) {
        let name = PathBuf::from(source);
        let records = parse_numbered(bytes, &name)?;
        return Ok(vec![(name, records)]);
    }
    let path = ctx
        .sources
        .get("source")
        .ok_or_else(|| Problem::new("dataset::source", format!("`{source}` was not fetched")).exit(Exit::Missing))?;
    let files = choose_files(path, spec.file.as_deref(), spec.split.as_deref())?;
    files.into_iter().map(|file| read_numbered(&file).map(|records| (file, records))).collect()
}

fn read_artifact(input: &Artifact) -> Result<Numbered, Problem> {
    let path = input.files.get("data.jsonl").ok_or_else(|| {
        Problem::new("dataset::input", format!("`{}` has no `data.jsonl`, so it is not a dataset", input.stage))
    })?;
    read_numbered(path)
}

pub(super) fn read_input(ctx: &Context, slot: &str) -> Result<Vec<Record>, Problem> {
    let mut records = Vec::new();
    for input in ctx.inputs(slot) {
        records.extend(read_artifact(input)?.into_iter().map(|(_, record)| record));
    }
    Ok(records)
}

/// The data files a source stands for: itself, or the chosen ones of a folder, in name order.
fn choose_files(path: &Path, pattern: Option<&str>, split: Option<&str>) -> Result<Vec<PathBuf>, Problem> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let files = Files::from_dir(path).map_err(|error| Problem::io("data::unreadable", "list", path, &error))?;
    let data: Vec<(&str, &Path)> = files
        .iter()
        .filter(|(name, _)| [".jsonl", ".json", ".csv", ".parquet"].iter().any(|end| name.ends_with(end)))
        .collect();
    let chosen: Vec<(&str, &Path)> = match (pattern, split) {
        (Some(pattern), _) => {
            let glob = glob(pattern)?;
            data.iter().copied().filter(|(name, _)| glob.is_match(name)).collect()
        }
        (None, Some(split)) => data.iter().copied().filter(|(name, _)| is_split(name, split)).collect(),
        (None, None) => data.iter().copied().filter(|(name, _)| !name.ends_with("dataset_infos.json")).collect(),
    };
    let list =
        |files: &[(&str, &Path)]| files.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let splits: BTreeSet<&str> = chosen.iter().filter_map(|(name, _)| split_of(name)).collect();
    if chosen.is_empty() {
        let there =
            if data.is_empty() { "there is no data file at all".into() } else { format!("there are {}", list(&data)) };
        return Err(Problem::new("dataset::no_file", "no data file of the folder is chosen").at_file(path).note(there));
    }
    if pattern.is_none() && split.is_none() && splits.len() > 1 {
        return Err(Problem::new("dataset::splits", "the folder holds several splits")
            .at_file(path)
            .note(format!("found {}", list(&chosen)))
            .help(format!(
                "name one: `split = \"{}\"`, or `file = \"PATTERN\"`",
                splits.iter().next_back().unwrap_or(&"train")
            )));
    }
    Ok(chosen.into_iter().map(|(_, path)| path.to_path_buf()).collect())
}

/// Whether a file belongs to a split, by the hub's habits: `train.jsonl`, `data/train-00000-of-00002.parquet`, `train/0.parquet`.
fn is_split(name: &str, split: &str) -> bool {
    let (folders, file) = name.rsplit_once('/').unwrap_or(("", name));
    let rest = file.strip_prefix(split).unwrap_or("x");
    rest.starts_with(['-', '.', '_']) || folders.split('/').any(|folder| folder == split)
}

/// The split a file's name speaks of, among the usual ones.
fn split_of(name: &str) -> Option<&'static str> {
    ["train", "test", "validation", "dev", "val"].into_iter().find(|split| is_split(name, split))
}

/// `*` stays inside a folder, `**` does not, `?` is one character.
fn glob(pattern: &str) -> Result<Regex, Problem> {
    let body = regex::escape(pattern)
        .replace(r"\*\*/", "(?:.*/)?")
        .replace(r"\*\*", ".*")
        .replace(r"\*", "[^/]*")
        .replace(r"\?", "[^/]");
    Regex::new(&format!("^{body}$"))
        .map_err(|error| Problem::new("dataset::file", format!("`{pattern}` is not a file pattern: {error}")))
}

/// Ids given and made across the files of a source.
#[derive(Default)]
struct Ids {
    seen: HashMap<String, String>,
    made: HashMap<String, usize>,
}

impl Ids {
    /// The id this record gets if it has none: the digest of its content; a repeated record gets a number too.
    fn made(&mut self, record: &Record) -> String {
        let digest = Digest::of(Value::Object(record.clone()).to_string().as_bytes()).short();
        let times = self.made.entry(digest.clone()).or_default();
        *times += 1;
        if *times == 1 { digest } else { format!("{digest}-{times}") }
    }

    /// Gives every record an id, in front. With `unique`, an id that is given twice is an error.
    fn fill(
        &mut self,
        rows: &mut [(usize, Record)],
        made: Vec<String>,
        file: &Path,
        unique: bool,
    ) -> Result<(), Problem> {
        let mut bad = BadRows::default();
        for ((line, record), made) in rows.iter_mut().zip(made) {
            let place = format!("line {line}");
            let id = match record.get("id") {
                None | Some(Value::Null) => {
                    record.shift_remove("id");
                    record.shift_insert(0, "id".into(), Value::String(made.clone()));
                    made
                }
                Some(Value::String(id)) if !id.is_empty() => id.clone(),
                Some(Value::Number(id)) => id.to_string(),
                Some(other) => {
                    let what = if other.is_string() { "empty" } else { kind_of(other) };
                    bad.push("dataset::id", &place, &format!("`id` is {what}, not a text or a number"));
                    continue;
                }
            };
            let here = format!("{place} of `{}`", file.file_name().unwrap_or_default().display());
            if let Some(first) = self.seen.insert(id.clone(), here).filter(|_| unique) {
                bad.push("dataset::duplicate_id", &place, &format!("id `{id}` is taken by {first}"));
                bad.help("make ids unique, or let them be made: columns = { source_id = \"id\" } moves the field away");
            }
        }
        bad.finish(rows.len(), Some(file))
    }
}

/// New = old. All old values are read before any is moved, so two columns may swap names.
fn map_columns(
    rows: &mut [(usize, Record)],
    columns: &BTreeMap<String, String>,
    source: &str,
    file: &Path,
) -> Result<(), Problem> {
    let mut bad = BadRows::default();
    for (line, record) in rows.iter_mut() {
        let mut found = Vec::with_capacity(columns.len());
        for (new, old) in columns {
            match lookup(record, old) {
                Some(value) => found.push((new.clone(), value.clone())),
                None => {
                    let names: Vec<String> = record.keys().map(|name| format!("`{name}`")).collect();
                    bad.push(
                        "data::missing_field",
                        &format!("line {line}"),
                        &format!("no `{old}`; the record has {}", names.join(", ")),
                    );
                    bad.help(&format!("`columns` takes `{new}` from `{old}` of {source}"));
                }
            }
        }
        for old in columns.values() {
            record.shift_remove(old);
        }
        record.extend(found);
    }
    bad.finish(rows.len(), Some(file))
}

/// Makes the field called `name` the id, if another than `id` is to be it.
fn name_ids(rows: &mut [(usize, Record)], name: &str, file: &Path) -> Result<(), Problem> {
    if name == "id" {
        return Ok(());
    }
    let mut bad = BadRows::default();
    for (line, record) in rows.iter_mut() {
        match lookup(record, name).cloned() {
            Some(id) => {
                record.shift_remove(name);
                record.shift_remove("id");
                record.shift_insert(0, "id".into(), id);
            }
            None => {
                let names: Vec<String> = record.keys().map(|name| format!("`{name}`")).collect();
                let what = format!("no `{name}`; the record has {}", names.join(", "));
                bad.push("data::missing_field", &format!("line {line}"), &what);
                bad.help("`id` names the field that holds the id of a record; without the key ids are made");
            }
        }
    }
    bad.finish(rows.len(), Some(file))
}

/// New field = what a pattern finds in a text.
fn extract(rows: &mut [(usize, Record)], fields: &BTreeMap<String, Extract>, file: &Path) -> Result<(), Problem> {
    let mut bad = BadRows::default();
    for (new, Extract { from, pattern }) in fields {
        let regex = Regex::new(pattern).map_err(|error| {
            Problem::new("dataset::extract", format!("`{pattern}` is not a regular expression: {error}"))
                .exit(Exit::Usage)
        })?;
        for (line, record) in rows.iter_mut() {
            let found = match lookup(record, from) {
                None => Err(("data::missing_field", format!("no `{from}`"))),
                Some(Value::String(text)) => match regex.captures(text) {
                    Some(captures) => {
                        let group = captures.get(1).or_else(|| captures.get(0)).map_or("", |group| group.as_str());
                        Ok(group.trim().to_string())
                    }
                    None => {
                        let end: String = text.chars().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect();
                        let what = format!("the pattern of `{new}` finds nothing in `{from}`, which ends {end:?}");
                        Err(("dataset::extract", what))
                    }
                },
                Some(other) => Err(("data::wrong_type", format!("`{from}` is {}, not a text", kind_of(other)))),
            };
            match found {
                Ok(text) => drop(record.insert(new.clone(), Value::String(text))),
                Err((code, what)) => {
                    bad.push(code, &format!("line {line}"), &what);
                    bad.help(&format!("`extract.{new}` takes what `{pattern}` finds in `{from}`"));
                }
            }
        }
    }
    bad.finish(rows.len(), Some(file))
}
