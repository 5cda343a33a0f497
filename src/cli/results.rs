//! What a run is for, as text: tables, verdicts, and where the pictures lie.

use pipe::files::Files;
use pipe::manifest::spec::ArtifactType;
use pipe::plan::{Cell, CellId, Plan};
use pipe::problem::Problem;
use pipe::store::{Artifact, Store, damaged};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// What one cell has to show.
pub struct Shown {
    pub cell: String,
    pub kind: &'static str,
    /// For people, with a newline at its end.
    pub text: String,
    /// For programs.
    pub object: Value,
    /// A table stands apart from its neighbours by empty lines.
    block: bool,
}

/// Whether a cell has anything to show.
pub fn shows(cell: &Cell) -> bool {
    matches!(cell.kind.yields, ArtifactType::Table | ArtifactType::Plot | ArtifactType::Verdict)
}

/// Everything that the finished cells among `artifacts` have to show, in the plan's order.
///
/// # Errors
/// `store::damaged` if a file shown is not what was stored; the next run makes it again.
pub fn collect(plan: &Plan, store: &Store, artifacts: &BTreeMap<CellId, Artifact>) -> Result<Vec<Shown>, Problem> {
    let mut all = Vec::new();
    for (id, artifact) in artifacts {
        let cell = &plan.cells[*id];
        let yields = cell.kind.yields;
        if !shows(cell) {
            continue;
        }
        let label = cell.to_string();
        let files = store.verify(artifact).map_err(|damage| damaged(&label, &damage))?;
        let (text, object) = match yields {
            ArtifactType::Table => table(cell, &files)?,
            ArtifactType::Plot => plot(cell, &files),
            _ => verdict(cell, &files)?,
        };
        all.push(Shown { cell: label, kind: cell.kind.name, text, object, block: yields == ArtifactType::Table });
    }
    Ok(all)
}

/// One text: tables with an empty line between them, the rest in lines.
pub fn page(all: &[Shown]) -> String {
    let mut page = String::new();
    for (at, shown) in all.iter().enumerate() {
        if at > 0 && (shown.block || all[at - 1].block) {
            page.push('\n');
        }
        page.push_str(&shown.text);
    }
    page
}

fn read(files: &Files, name: &str, cell: &Cell) -> Result<String, Problem> {
    let path = files
        .get(name)
        .ok_or_else(|| Problem::new("cli::no_file", format!("the artifact of `{cell}` has no file `{name}`")))?;
    std::fs::read_to_string(path).map_err(|error| Problem::io("cli::read", "read", path, &error))
}

fn table(cell: &Cell, files: &Files) -> Result<(String, Value), Problem> {
    let text = read(files, "table.txt", cell)?;
    let object = serde_json::from_str(&read(files, "table.json", cell)?).unwrap_or(Value::Null);
    Ok((text, object))
}

fn plot(cell: &Cell, files: &Files) -> (String, Value) {
    let mut text = String::new();
    let mut paths = serde_json::Map::new();
    for name in ["plot.svg", "plot.png"] {
        if let Some(path) = files.get(name) {
            let _ = writeln!(text, "{cell}: {name} is {}", path.display());
            paths.insert(name.to_string(), json!(path.display().to_string()));
        }
    }
    (text, Value::Object(paths))
}

fn verdict(cell: &Cell, files: &Files) -> Result<(String, Value), Problem> {
    let verdict: Value = serde_json::from_str(&read(files, "verdict.json", cell)?).unwrap_or(Value::Null);
    let holds = if verdict["holds"] == json!(true) { "holds" } else { "does not hold" };
    let (claim, sentence) = (verdict["claim"].as_str().unwrap_or(""), verdict["sentence"].as_str().unwrap_or(""));
    Ok((format!("{cell} {holds}: {claim}\n  {sentence}\n"), verdict))
}

/// The last lines of a file of lines, the newest last.
pub fn tail(path: &Path, lines: usize) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| line.to_string()).collect()
}

/// The first lines of a file of lines.
pub fn head(path: &Path, lines: usize) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().take(lines).map(str::to_string).collect()
}
