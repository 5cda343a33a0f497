//! Manifest text, an included file, profiles and `--set`: loaded, resolved to a plan, fingerprinted.
//!
//! Input: `m.toml`, `n.toml`, names of profiles (a line each), `--set` texts (a line each).
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::digest::Digest;
use pipe::manifest::{self, Manifest};
use pipe::plan::{self, Arithmetic, Plan};
use pipe::problem::Problem;
use pipe::stage::KINDS;
use std::io;
use std::path::Path;

/// Plans with more cells are made, but not walked through.
const WALKED: usize = 2_000;

fuzz_target!(init: pipe_fuzz::start("manifest"), |input: &[u8]| {
    let [main, other, profiles, sets] = pipe_fuzz::parts(input).map(pipe_fuzz::text);
    let read = |path: &Path| match path.to_str() {
        Some("m.toml") => Ok(main.to_string()),
        Some("n.toml") => Ok(other.to_string()),
        _ => Err(io::Error::from(io::ErrorKind::NotFound)),
    };
    let lines = |text: &str| text.lines().map(String::from).collect::<Vec<_>>();
    let manifest = manifest::load(Path::new("m.toml"), &read, KINDS, &lines(&profiles), &lines(&sets));
    manifest.problems.iter().for_each(|problem| shown(&manifest, problem));
    match plan::resolve(&manifest) {
        Ok(plan) => {
            assert!(manifest.problems.is_empty(), "what has a problem gives no plan");
            if plan.cells.len() <= WALKED {
                in_order(&plan);
            }
        }
        Err(problems) => {
            assert!(!problems.is_empty(), "no plan and no reason");
            problems.iter().for_each(|problem| shown(&manifest, problem));
        }
    }
});

/// Every place of a problem can be shown: a file that was read, a span on its characters.
fn shown(manifest: &Manifest, problem: &Problem) {
    pipe_fuzz::check(problem);
    for place in &problem.places {
        if let (Some(text), Some(span)) = (manifest.text(&place.file), &place.span) {
            assert!(text.get(span.clone()).is_some(), "{}: {span:?} cannot be cut out", problem.code);
        }
    }
}

/// What a cell needs comes before it, its label finds it, and its fingerprint is a function of the plan.
fn in_order(plan: &Plan) {
    let machine = Arithmetic { backend: "cpu", dtype: "f32" };
    let all = plan.closure(0..plan.cells.len());
    assert_eq!(all.len(), plan.cells.len());
    for (id, cell) in plan.cells.iter().enumerate() {
        assert!(plan.needs(id).into_iter().all(|need| need < id), "{cell} comes before what it needs");
        let fingerprint = || {
            let input = |need: usize| Some((Digest::of(b"input"), plan.cells.get(need)?.to_string()));
            let made = plan::fingerprint(cell, machine, input, |_| Some(Digest::of(b"source")));
            made.expect("nothing is left open").digest()
        };
        assert_eq!(fingerprint(), fingerprint());
        if let Ok(found) = plan.find(&cell.to_string()) {
            assert!(found.contains(&id), "{cell} is another cell's label");
        }
    }
}
