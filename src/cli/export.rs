//! `pipe export M STAGE DIR`: artifacts as ordinary files, for other programs.

use super::global::{Done, Global, OfManifest, print, say};
use super::lm_eval;
use super::open::with_engine;
use super::sources::Network;
use crate::report;
use pipe::exec::{Engine, Status};
use pipe::files::Files;
use pipe::manifest::spec::{ArtifactType, Lineage};
use pipe::model::lora::is_adapter;
use pipe::model::{Batch, LoadOptions, LoraSpec, Model};
use pipe::plan::{Cell, CellId, Plan};
use pipe::problem::{Exit, Problem};
use pipe::random::Stream;
use pipe::safetensors::Element;
use pipe::store::damaged;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Copy an artifact into a folder, as ordinary files
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe export pipelines/table1.toml 'sft[size=3B,data=r1k]' adapters/3B-r1k\n  \
    pipe export pipelines/table1.toml 'sft[size=3B,data=r1k]' models/3B-r1k --merge --verify\n  \
    pipe export pipelines/table1.toml table1 tables/ --profile mini\n  \
    pipe export pipelines/table1.toml eval logs/ --profile mini --format lm-eval")]
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
    /// What full weights are written in [default: as the base model stores them]
    #[arg(long, value_name = "DTYPE", requires = "merge")]
    dtype: Option<Written>,
    /// Load what was written and compare its log-probs with those of the stage
    #[arg(long)]
    verify: bool,
    /// `files`: as the stage left them; `lm-eval`: samples and results as lm-evaluation-harness logs them
    #[arg(long, value_enum, default_value_t = Format::Files, conflicts_with_all = ["merge", "verify"])]
    format: Format,
}

/// What an artifact is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Files,
    LmEval,
}

/// Element types of written weights.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Written {
    F32,
    Bf16,
    F16,
}

impl Written {
    fn element(self) -> Element {
        match self {
            Written::F32 => Element::F32,
            Written::Bf16 => Element::Bf16,
            Written::F16 => Element::F16,
        }
    }
}

/// What was written of one cell.
struct Exported {
    cell: CellId,
    dir: PathBuf,
    files: Files,
    /// With `--verify`.
    verified: Option<Verified>,
}

/// How far the log-probs of what was written are from those of the stage.
struct Verified {
    difference: f64,
    tokens: usize,
    /// `None` where weights were rounded on purpose.
    bound: Option<f64>,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    with_engine(global, &arguments.of.manifest, Network::Never, |engine, _| {
        let cells = engine.plan.find(&arguments.stage)?;
        let whole = arguments.merge || arguments.verify;
        let wanted: BTreeSet<CellId> = match whole {
            true => cells.iter().flat_map(|id| chain(engine.plan, *id)).collect(),
            false => cells.iter().copied().collect(),
        };
        if whole && let Some(other) = cells.iter().find(|id| !is_model(&engine.plan.cells[**id])) {
            let (what, flag) = if arguments.merge { ("merge", "--merge") } else { ("verify", "--verify") };
            let message = format!("`{}` is no model: there is nothing to {what}", engine.plan.cells[*other]);
            let problem = Problem::new("cli::no_model", message).help(format!("leave out `{flag}`"));
            return Err(problem.exit(Exit::Usage).into());
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
        if arguments.format == Format::LmEval {
            return logs(global, engine, &cells, &arguments.dir);
        }
        let mut said = Vec::new();
        for id in &cells {
            let cell = &engine.plan.cells[*id];
            let dir = match cells.len() {
                1 => arguments.dir.clone(),
                _ => arguments.dir.join(folder_name(cell)),
            };
            let ids = chain(engine.plan, *id);
            let parts: Vec<&Files> = ids.iter().filter_map(|id| there.get(id)).collect();
            let mut bound = Some(BOUND);
            match arguments.merge {
                true => {
                    let element = arguments.dtype.map_or_else(|| element_of(parts[0]), Written::element);
                    bound = bound.filter(|_| matches!(element, Element::F32));
                    merge(&parts, element, &dir)?;
                }
                false => copy(&there[id], &dir)?,
            }
            let files = Files::from_dir(&dir).map_err(|error| Problem::io("cli::export", "look into", &dir, &error))?;
            let verified = match arguments.verify {
                true => Some(verify(&parts, &files, arguments.merge, bound)?),
                false => None,
            };
            if is_adapter(&files) {
                advise(global, engine.plan, &ids, &files);
            }
            said.push(Exported { cell: *id, dir, files, verified });
        }
        print(&words(global, engine, &said))?;
        let over = |exported: &&Exported| exported.verified.as_ref().is_some_and(|verified| !verified.holds());
        if let Some(exported) = said.iter().find(over) {
            let message = format!("what was written of `{}` computes something else", engine.plan.cells[exported.cell]);
            let problem = Problem::new("export::differs", message).note("see the largest difference above");
            return Err(problem.help("this is a bug; please report it with the model's config.json").into());
        }
        say(global, &format!("{} exported", report::count(said.len(), "artifact")));
        Ok(())
    })
}

/// Evaluations as another program's logs, a folder for each model.
fn logs(global: &Global, engine: &Engine, cells: &[CellId], dir: &Path) -> Done {
    let written = lm_eval::export(engine, cells, dir)?;
    if global.json {
        let object = |one: &lm_eval::Written| json!({ "model": one.model, "folder": one.folder.display().to_string() });
        return print(&format!("{:#}\n", json!({ "exports": written.iter().map(object).collect::<Vec<Value>>() })));
    }
    let line = |one: &lm_eval::Written| {
        format!("{}: {} in {}\n", one.model, report::count(one.files, "file"), one.folder.display())
    };
    print(&written.iter().map(line).collect::<String>())?;
    say(global, &format!("{} exported", report::count(cells.len(), "evaluation")));
    Ok(())
}

fn words(global: &Global, engine: &Engine, said: &[Exported]) -> String {
    let label = |exported: &Exported| engine.plan.cells[exported.cell].to_string();
    if global.json {
        let object = |exported: &Exported| {
            let names: Vec<&str> = exported.files.iter().map(|(name, _)| name).collect();
            let folder = exported.dir.display().to_string();
            let mut object = json!({ "cell": label(exported), "folder": folder, "files": names });
            if let Some(verified) = &exported.verified {
                object["largest_logprob_difference"] = json!(verified.difference);
                object["verified_tokens"] = json!(verified.tokens);
                object["verified"] = json!(verified.holds());
            }
            object
        };
        return format!("{:#}\n", json!({ "exports": said.iter().map(object).collect::<Vec<Value>>() }));
    }
    let mut text = String::new();
    for exported in said {
        let (count, folder) = (report::count(exported.files.len(), "file"), exported.dir.display());
        let _ = writeln!(text, "{}: {count} in {folder}", label(exported));
        if let Some(Verified { difference, tokens, bound }) = &exported.verified {
            let _ = write!(text, "  loaded again: log-probs of {tokens} tokens differ by {difference:.1e} at most");
            let _ = match bound {
                Some(bound) => writeln!(text, ", {bound:.0e} is allowed"),
                None => writeln!(text, ", from rounding the weights"),
            };
        }
    }
    text
}

fn is_model(cell: &Cell) -> bool {
    cell.kind.yields == ArtifactType::Model
}

impl Verified {
    fn holds(&self) -> bool {
        self.difference.is_finite() && self.bound.is_none_or(|bound| self.difference <= bound)
    }
}

/// Largest difference of a log-prob between two ways to compute one model in f32.
const BOUND: f64 = 5e-5;
/// Sequences compared, and their tokens.
const SEQUENCES: usize = 4;
const LENGTH: usize = 64;

/// Loads what was written and compares it with the chain it was made of, on random ids: all of the vocabulary
/// that has a row, so that no part of the head goes unseen for want of a word.
fn verify(chain: &[&Files], written: &Files, merged: bool, bound: Option<f64>) -> Result<Verified, Problem> {
    let model = Model::load(chain, &LoadOptions::default())?;
    let length = LENGTH.min(model.config.max_position_embeddings);
    let random = Stream::named(0, &["export", "verify"]);
    let vocabulary = model.config.vocab_size as u64;
    let ids: Vec<u32> = (0..SEQUENCES * length).map(|i| (random.u64(i as u64) % vocabulary) as u32).collect();
    let rows: Vec<usize> = (0..ids.len()).filter(|i| (i + 1) % length != 0).collect();
    let targets: Vec<u32> = rows.iter().map(|row| ids[row + 1]).collect();
    let lengths = [length; SEQUENCES];
    let batch = Batch { ids: &ids, lengths: &lengths, rows: &rows, targets: &targets };
    let expected = model.logprobs(&batch);
    drop(model);
    let beneath = if merged || !is_adapter(written) { &[][..] } else { &chain[..chain.len() - 1] };
    let again: Vec<&Files> = beneath.iter().copied().chain([written]).collect();
    let found = Model::load(&again, &LoadOptions::default())?.logprobs(&batch);
    let difference = expected.iter().zip(&found).fold(0.0f64, |most, (a, b)| {
        let difference = f64::from((a - b).abs());
        // A NaN is kept, whichever side of the comparison it is on.
        if difference <= most { most } else { difference }
    });
    Ok(Verified { difference, tokens: rows.len(), bound })
}

/// Ranks that vLLM can be told to serve (`--max-lora-rank`).
const VLLM_RANKS: [usize; 8] = [8, 16, 32, 64, 128, 256, 320, 512];

/// Says what other programs will not do with an adapter as it is.
fn advise(global: &Global, plan: &Plan, chain: &[CellId], files: &Files) {
    let cell = &plan.cells[chain[chain.len() - 1]];
    let merge = "export again with `--merge` for a model that any of them loads";
    if let [base, folded @ .., _] = chain
        && let Some(last) = folded.last()
    {
        let (base, last) = (&plan.cells[*base], &plan.cells[*last]);
        say(
            global,
            &format!(
                "note: the adapter of `{cell}` sits on `{last}`, not on `{base}` alone: export `{last}` with `--merge` and load it on that, or {merge}"
            ),
        );
    }
    let Some(Ok(spec)) = files.get(pipe::model::lora::ADAPTER_CONFIG).map(LoraSpec::read) else { return };
    if spec.targets.iter().any(|target| target == "lm_head") {
        say(global, &format!("note: vLLM serves no adapter that changes `lm_head`, as this one does: {merge}"));
    }
    match VLLM_RANKS.iter().find(|rank| **rank >= spec.rank) {
        Some(rank) if *rank > 16 => say(
            global,
            &format!("note: vLLM serves rank {} only with `--max-lora-rank {rank}`; its default is 16", spec.rank),
        ),
        Some(_) => {}
        None => say(global, &format!("note: vLLM serves ranks up to 512, this one has {}: {merge}", spec.rank)),
    }
}

/// What has to be loaded for the model of a cell, base first, itself last.
pub(super) fn chain(plan: &Plan, id: CellId) -> Vec<CellId> {
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

/// Full weights, with the base's tokenizer.
fn merge(chain: &[&Files], element: Element, dir: &Path) -> Result<(), Problem> {
    let model = Model::load(chain, &LoadOptions::default())?;
    std::fs::create_dir_all(dir).map_err(|error| Problem::io("cli::export", "make", dir, &error))?;
    let mut others = Files::default();
    for (name, path) in chain.first().into_iter().flat_map(|base| base.iter()) {
        if BESIDE_WEIGHTS.contains(&name) {
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

/// What the configuration of a model folder says its weights are stored in.
fn element_of(base: &Files) -> Element {
    let text = base.get("config.json").and_then(|path| std::fs::read_to_string(path).ok());
    let config: Value = text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
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
