//! `pipe export M STAGE DIR`: artifacts as ordinary files, for other programs.

use super::open::with_engine;
use super::sources::Network;
use super::{Done, Global, OfManifest, print, say};
use crate::report;
use pipe::exec::{Engine, Status};
use pipe::files::Files;
use pipe::manifest::spec::{ArtifactType, Lineage};
use pipe::model::weights::Element;
use pipe::model::{LoadOptions, Model};
use pipe::plan::{Cell, CellId, Plan};
use pipe::problem::{Exit, Problem};
use pipe::store::damaged;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Copy an artifact into a folder, as ordinary files
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe export pipelines/table1.toml 'sft[size=3B,data=r1k]' adapters/3B-r1k\n  \
    pipe export pipelines/table1.toml 'sft[size=3B,data=r1k]' models/3B-r1k --merge\n  \
    pipe export pipelines/table1.toml table1 tables/ --profile mini")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    /// A stage or cell, `sft` or `sft[size=3B]`; several cells get a folder each
    #[arg(value_name = "STAGE")]
    stage: String,
    /// Where to; made if it is not there, and empty if it is
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Fold the adapters of a trained model into full weights
    #[arg(long)]
    merge: bool,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    with_engine(global, &arguments.of.manifest, Network::Never, |engine, _| {
        let cells = engine.plan.find(&arguments.stage)?;
        let wanted: BTreeSet<CellId> = match arguments.merge {
            true => cells.iter().flat_map(|id| chain(engine.plan, *id)).collect(),
            false => cells.iter().copied().collect(),
        };
        if arguments.merge
            && let Some(other) = cells.iter().find(|id| engine.plan.cells[**id].kind.yields != ArtifactType::Model)
        {
            let message = format!("`{}` is no model: there is nothing to merge", engine.plan.cells[*other]);
            return Err(Problem::new("cli::no_model", message).help("leave out `--merge`").exit(Exit::Usage).into());
        }
        let survey = engine.status(&cells, &BTreeSet::new(), &BTreeSet::new());
        let mut there = BTreeMap::new();
        for id in wanted {
            let cell = &engine.plan.cells[id];
            let Some(Status::Fresh { artifact, .. }) = &survey.statuses[id] else {
                return Err(Problem::new(
                    "cli::not_fresh",
                    format!("`{cell}` is not there as the manifest has it now"),
                )
                .help(format!("pipe run {} '{cell}'", arguments.of.manifest.display()))
                .exit(Exit::Missing)
                .into());
            };
            let files = engine.store.verify(artifact).map_err(|damage| damaged(&cell.to_string(), &damage))?;
            there.insert(id, files);
        }
        vacant(&arguments.dir)?;
        let mut said = Vec::new();
        for id in &cells {
            let dir = match cells.len() {
                1 => arguments.dir.clone(),
                _ => arguments.dir.join(folder_name(&engine.plan.cells[*id])),
            };
            match arguments.merge {
                true => merge(&chain(engine.plan, *id).iter().map(|id| &there[id]).collect::<Vec<_>>(), &dir)?,
                false => copy(&there[id], &dir)?,
            }
            let written =
                Files::from_dir(&dir).map_err(|error| Problem::io("cli::export", "look into", &dir, &error))?;
            said.push((*id, dir, written));
        }
        print(&words(global, engine, &said))?;
        say(global, &format!("{} exported", report::count(said.len(), "artifact")));
        Ok(())
    })
}

fn words(global: &Global, engine: &Engine, said: &[(CellId, PathBuf, Files)]) -> String {
    let label = |id: &CellId| engine.plan.cells[*id].to_string();
    if global.json {
        let object = |(id, dir, files): &(CellId, PathBuf, Files)| {
            let names: Vec<&str> = files.iter().map(|(name, _)| name).collect();
            json!({ "cell": label(id), "folder": dir.display().to_string(), "files": names })
        };
        return format!("{:#}\n", json!({ "exports": said.iter().map(object).collect::<Vec<Value>>() }));
    }
    let mut text = String::new();
    for (id, dir, files) in said {
        let _ = writeln!(text, "{}: {} in {}", label(id), report::count(files.len(), "file"), dir.display());
    }
    text
}

/// What has to be loaded for the model of a cell, base first, itself last.
fn chain(plan: &Plan, id: CellId) -> Vec<CellId> {
    let cell = &plan.cells[id];
    let under = cell.inputs.iter().find(|input| input.slot == "model").map_or(&[][..], |input| &input.cells);
    let keep = match (cell.kind.lineage)(&cell.params) {
        Lineage::Whole => 0,
        Lineage::OnTop => under.len(),
        // It replaces the last adapter; a base is none and stays.
        Lineage::Continues => under.len().saturating_sub(1).max(under.len().min(1)),
    };
    under[..keep].iter().copied().chain([id]).collect()
}

/// Full weights in the base's own element type, with the base's tokenizer.
fn merge(chain: &[&Files], dir: &Path) -> Result<(), Problem> {
    let model = Model::load(chain, &LoadOptions::default())?;
    std::fs::create_dir_all(dir).map_err(|error| Problem::io("cli::export", "make", dir, &error))?;
    let mut others = Files::default();
    let mut element = Element::F32;
    for (name, path) in chain.first().into_iter().flat_map(|base| base.iter()) {
        if name == "config.json" {
            element = element_of(path);
        } else if BESIDE_WEIGHTS.contains(&name) {
            others.insert(name, path);
        }
    }
    model.merged_save(dir, element)?;
    copy(&others, dir)
}

/// What a model folder holds beside its weights and their configuration.
const BESIDE_WEIGHTS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];

/// What the configuration says its weights are stored in.
fn element_of(config: &Path) -> Element {
    let config: Value =
        std::fs::read_to_string(config).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let said = config.get("dtype").or(config.get("torch_dtype")).and_then(Value::as_str);
    match said {
        Some("bfloat16") => Element::Bf16,
        Some("float16") => Element::F16,
        _ => Element::F32,
    }
}

/// What is there is not mixed with what is written.
fn vacant(dir: &Path) -> Result<(), Problem> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Problem::new("cli::not_empty", format!("`{}` is not empty", dir.display()))
                .help("name a new folder")
                .exit(Exit::Usage)),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Problem::io("cli::export", "look into", dir, &error).exit(Exit::Usage)),
    }
}

/// `size=3B,data=r1k`, without what a file system may not take.
fn folder_name(cell: &Cell) -> String {
    let axes: Vec<String> = cell.axes.0.iter().map(|(axis, value)| format!("{axis}={value}")).collect();
    axes.join(",").replace(['/', '\\', '\0'], "_")
}

fn copy(files: &Files, dir: &Path) -> Result<(), Problem> {
    let refused = |path: &Path, error: std::io::Error| Problem::io("cli::export", "write", path, &error);
    std::fs::create_dir_all(dir).map_err(|error| refused(dir, error))?;
    for (name, from) in files.iter() {
        let to = dir.join(name);
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).map_err(|error| refused(parent, error))?;
        }
        // Bytes only: what lies in the store may be read-only, what is exported belongs to its owner.
        let mut source = std::fs::File::open(from).map_err(|error| Problem::io("cli::export", "read", from, &error))?;
        let mut target = std::fs::File::create(&to).map_err(|error| refused(&to, error))?;
        std::io::copy(&mut source, &mut target).map_err(|error| refused(&to, error))?;
    }
    Ok(())
}
