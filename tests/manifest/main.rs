//! Manifest text to plan, and to the exact messages: the language as its users meet it.
//!
//! The kinds here are toys of the same shape as the real ones, so that these tests say what the
//! language does, not what today's stages happen to accept.
mod endpoints;
mod kinds;
mod loading;
mod messages;
mod planning;
mod prints;
mod random;
mod schema;
mod tasks;

use pipe::manifest::{self, Manifest, spec::Kind};
use pipe::plan::{self, Cell, Plan};
use pipe::problem::{Exit, Problem};
use std::io;
use std::path::Path;

/// Files of a test: (path, text).
type Files<'a> = &'a [(&'a str, &'a str)];

fn load_with(kinds: &'static [&'static Kind], files: Files<'_>, profiles: &[&str], sets: &[&str]) -> Manifest {
    let read = |path: &Path| {
        let found = files.iter().find(|(name, _)| Path::new(name) == path);
        found.map(|(_, text)| text.to_string()).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not found"))
    };
    let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    manifest::load(Path::new(files[0].0), &read, kinds, &own(profiles), &own(sets))
}

fn load(files: Files<'_>, profiles: &[&str], sets: &[&str]) -> Manifest {
    load_with(kinds::KINDS, files, profiles, sets)
}

/// The plan of one file without `manifest = 1`, which is put before.
fn plan(text: &str) -> Plan {
    plan_of(text, &[], &[])
}

fn plan_of(text: &str, profiles: &[&str], sets: &[&str]) -> Plan {
    let text = format!("manifest = 1\n{text}");
    let manifest = load(&[("m.toml", &text)], profiles, sets);
    plan::resolve(&manifest).unwrap_or_else(|problems| panic!("{}", render(&manifest, &problems)))
}

/// Every problem of one file, which begins with `manifest = 1` on line 1.
fn problems(text: &str) -> String {
    problems_of(text, &[], &[])
}

fn problems_of(text: &str, profiles: &[&str], sets: &[&str]) -> String {
    let text = format!("manifest = 1\n{text}");
    problems_in(&[("m.toml", &text)], profiles, sets)
}

fn problems_in(files: Files<'_>, profiles: &[&str], sets: &[&str]) -> String {
    let manifest = load(files, profiles, sets);
    match plan::resolve(&manifest) {
        Ok(plan) => format!("no problem: {}", names(&plan).join(" ")),
        Err(problems) => {
            assert!(problems.iter().all(|problem| problem.exit == Exit::Usage));
            render(&manifest, &problems)
        }
    }
}

/// `code: message`, then each place with the text it covers: what a renderer has to work with.
fn render(manifest: &Manifest, problems: &[Problem]) -> String {
    let mut out = String::new();
    for problem in problems {
        out += &format!("error[{}]: {}\n", problem.code, problem.message);
        for place in &problem.places {
            let file = place.file.display();
            match &place.span {
                Some(span) => {
                    let text = manifest.text(&place.file).expect("the place is in a file that was read");
                    let line = text[..span.start].matches('\n').count() + 1;
                    out += &format!("  {file}:{line} {:?}", &text[span.clone()]);
                }
                None => out += &format!("  {file}"),
            }
            out += if place.label.is_empty() { "\n" } else { "  " };
            if !place.label.is_empty() {
                out += &format!("# {}\n", place.label);
            }
        }
        for note in &problem.notes {
            out += &format!("  note: {note}\n");
        }
        for help in &problem.help {
            out += &format!("  help: {help}\n");
        }
    }
    out
}

fn names(plan: &Plan) -> Vec<String> {
    plan.cells.iter().map(Cell::to_string).collect()
}

/// `cell: slot=cell+cell slot=cell`.
fn wiring(plan: &Plan) -> Vec<String> {
    plan.cells
        .iter()
        .map(|cell| {
            let mut line = format!("{cell}:");
            for input in &cell.inputs {
                let cells: Vec<String> = input.cells.iter().map(|&id| plan.cells[id].to_string()).collect();
                line += &format!(" {}={}", input.slot, cells.join("+"));
            }
            line
        })
        .collect()
}
