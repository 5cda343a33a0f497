//! What a run is for: tables, verdicts and pictures, as text and as files with names of their own.

use pipe::files::Files;
use pipe::manifest::spec::ArtifactType;
use pipe::plan::{Cell, CellId, Plan};
use pipe::problem::Problem;
use pipe::store::{Artifact, Store, damaged};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};

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

/// Everything that the finished cells among `artifacts` have to show, in the plan's order. Their files are
/// put into `folder` as `STAGE.png`, `STAGE.csv`, ...: what is there from before is replaced.
///
/// # Errors
/// `store::damaged` if a file shown is not what was stored; the next run makes it again.
pub fn collect(
    plan: &Plan,
    store: &Store,
    artifacts: &BTreeMap<CellId, Artifact>,
    folder: &Path,
) -> Result<Vec<Shown>, Problem> {
    let mut all = Vec::new();
    for (id, artifact) in artifacts {
        let cell = &plan.cells[*id];
        let yields = cell.kind.yields;
        if !shows(cell) {
            continue;
        }
        let label = cell.to_string();
        let files = store.verify(artifact).map_err(|damage| damaged(&label, &damage))?;
        let named = put(cell, &files, folder);
        let (text, object) = match yields {
            ArtifactType::Table => table(cell, &files)?,
            ArtifactType::Plot => plot(cell, &named),
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

fn plot(cell: &Cell, files: &BTreeMap<String, PathBuf>) -> (String, Value) {
    let mut text = String::new();
    let mut paths = serde_json::Map::new();
    for name in ["plot.svg", "plot.png"] {
        if let Some(path) = files.get(name) {
            let _ = writeln!(text, "{cell}: {}", path.display());
            paths.insert(name.to_string(), json!(path.display().to_string()));
        }
    }
    (text, Value::Object(paths))
}

/// Where the results of a manifest lie in a cache: the same for every run of it with these profiles.
pub fn folder(cache: &Path, manifest: &Path, profiles: &[String]) -> PathBuf {
    let stem = manifest.file_stem().map_or_else(|| "manifest".into(), |stem| stem.to_string_lossy());
    let name = std::iter::once(stem.as_ref()).chain(profiles.iter().map(String::as_str)).collect::<Vec<_>>().join("-");
    cache.join("results").join(plain(&name))
}

/// Puts the files of a cell under names that say what they are: `table1.csv`, `curves[size=3B].png`. Returns
/// where each one lies: in the store, if the folder cannot be written (a cache may be read-only).
fn put(cell: &Cell, files: &Files, folder: &Path) -> BTreeMap<String, PathBuf> {
    let named = files.iter().map(|(name, from)| {
        let ending = Path::new(name).extension().map_or("".into(), |ending| ending.to_string_lossy());
        let to = folder.join(plain(&format!("{cell}.{ending}")));
        let place = match copy(from, folder, &to) {
            Ok(()) => to,
            Err(error) => {
                tracing::info!(to = %to.display(), %error, "a result keeps its place in the store");
                from.to_path_buf()
            }
        };
        (name.to_string(), place)
    });
    named.collect()
}

/// A name without what no file system or shell takes well.
fn plain(name: &str) -> String {
    name.replace(['/', '\\', '\0', ' '], "_")
}

/// Whole or not at all: somebody may look at the file while it is replaced.
fn copy(from: &Path, folder: &Path, to: &Path) -> std::io::Result<()> {
    let bytes = std::fs::read(from)?;
    if std::fs::read(to).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().permissions(readable()).tempfile_in(folder)?;
    file.write_all(&bytes)?;
    file.persist(to).map_err(|error| error.error)?;
    Ok(())
}

fn readable() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o644)
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
    let Ok(file) = std::fs::File::open(path) else { return Vec::new() };
    std::io::BufReader::new(file).lines().map_while(Result::ok).take(lines).collect()
}
