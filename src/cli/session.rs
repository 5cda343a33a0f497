//! From a manifest's path to its plan: what most commands begin with.

use super::global::{Global, Stop};
use pipe::manifest::{self, Manifest, Text};
use pipe::plan::{self, Cell, Plan};
use pipe::problem::{Exit, Problem};
use pipe::stage;
use std::collections::HashSet;
use std::path::Path;

pub struct Session {
    pub manifest: Manifest,
    pub plan: Plan,
}

/// Everything that is wrong with a manifest, and the texts it is wrong in.
pub struct Broken {
    pub problems: Vec<Problem>,
    pub texts: Vec<Text>,
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Stop {
        Stop::Problems(broken.problems, broken.texts)
    }
}

/// Reads the manifest at `path` with the profiles and settings of the command line.
pub fn load(global: &Global, path: &Path) -> Result<Session, Broken> {
    let read = |path: &Path| std::fs::read_to_string(path);
    let manifest = manifest::load(path, &read, stage::KINDS, &global.profile, &global.set);
    let plan = match plan::resolve(&manifest) {
        Ok(plan) => plan,
        Err(problems) => return Err(Broken { problems, texts: manifest.files }),
    };
    let problems = misfits(&manifest, &plan);
    match problems.is_empty() {
        true => Ok(Session { manifest, plan }),
        false => Err(Broken { problems, texts: manifest.files }),
    }
}

/// A table whose row names no axis would otherwise fail when all that it shows has been computed.
fn misfits(manifest: &Manifest, plan: &Plan) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut said = HashSet::new();
    for cell in &plan.cells {
        let Some(kind) = stage::find(cell.kind.name) else { continue };
        let inputs: Vec<&Cell> =
            cell.inputs.iter().flat_map(|input| &input.cells).map(|need| &plan.cells[*need]).collect();
        for broken in (kind.misfits)(&cell.params, &inputs) {
            if said.insert((cell.stage.clone(), broken.message.clone())) {
                let (file, span) = place(manifest, cell, broken.key);
                let message = format!("{} (`{}` of stage `{}`)", broken.message, broken.key, cell.stage);
                let problem = Problem::new("plan::misfit", message).exit(Exit::Usage).help(broken.help);
                problems.push(problem.at_span(file, span, ""));
            }
        }
    }
    problems
}

/// The value of a key, or else the header of the stage.
fn place<'a>(manifest: &'a Manifest, cell: &'a Cell, key: &str) -> (&'a Path, std::ops::Range<usize>) {
    match manifest.stage(&cell.stage).and_then(|(_, stage)| stage.table.get(key)) {
        Some(entry) => {
            let origin = &entry.value.origin;
            (&manifest.files[origin.file].path, origin.span.clone())
        }
        None => (&cell.file, cell.span.clone()),
    }
}
