//! What is said against tables, plots and checks once the axes of their inputs are known, before
//! anything has run.

use pipe::manifest::spec::{ArtifactType, Key, Kind, Type, no_lineage, no_rules};
use pipe::manifest::{self, spec::Broken, spec::Params};
use pipe::plan::{self, Cell};
use pipe::stage;
use std::path::Path;

/// Yields scores without doing anything.
static SCORED: Kind = Kind {
    name: "scored",
    about: "scores, for these tests",
    recipe: 1,
    yields: ArtifactType::Scores,
    keys: &[Key::optional("on", Type::Str, "What is scored.")],
    floats: false,
    lineage: no_lineage,
    rules: no_rules,
};

const KINDS: &[&Kind] = &[&SCORED, &stage::table::KIND, &stage::plot::KIND, &stage::check::KIND];

/// What `misfits` says about the stage `shown`, fed with three tasks and two seeds.
fn said(misfits: fn(&Params, &[&Cell]) -> Vec<Broken>, shown: &str) -> Vec<String> {
    let text = format!(
        "manifest = 1\n[stage.eval]\nkind = \"scored\"\non = \"{{task}}\"\n\
         axes = {{ task = [\"aime24\", \"math500\", \"gpqa\"], seed = [1, 2] }}\n[stage.shown]\nfrom = \"eval\"\n{shown}"
    );
    let manifest = manifest::load(Path::new("m.toml"), &|_: &Path| Ok(text.clone()), KINDS, &[], &[]);
    let plan = plan::resolve(&manifest).unwrap_or_else(|problems| panic!("{problems:?}"));
    let shown = plan.cells.last().expect("a cell");
    let inputs: Vec<&Cell> = shown.inputs[0].cells.iter().map(|id| &plan.cells[*id]).collect();
    misfits(&shown.params, &inputs)
        .into_iter()
        .map(|broken| format!("{}: {}; {}", broken.key, broken.message, broken.help))
        .collect()
}

#[test]
fn a_table_names_axes_that_are_there_and_leaves_none_out() {
    let table = |lines: &str| said(stage::table::misfits, &format!("kind = \"table\"\n{lines}"));
    let whole = "columns = [\"task\", \"mean\"]\nvalue = \"accuracy\"\n";
    assert_eq!(table(&format!("rows = [\"seed\"]\n{whole}")), [""; 0]);
    assert_eq!(table(&format!("rows = [\"stage\", \"seed\"]\n{whole}")), [""; 0]);
    assert_eq!(
        table(&format!("rows = [\"sed\"]\n{whole}")),
        ["rows: no input has the axis `sed`; an axis with a similar name exists: `seed`"]
    );
    assert_eq!(
        table("rows = [\"seed\"]\ncolumns = [\"size\"]\nvalue = \"accuracy\"\n"),
        ["columns: no input has the axis `size`; axes of the inputs: task, seed"]
    );
    assert_eq!(
        table(&format!("rows = [\"stage\"]\n{whole}")),
        ["rows: `eval[task=aime24,seed=1]` and `eval[task=aime24,seed=2]` fall in the same cell of the table; \
          add `seed` to `rows`"]
    );
}

#[test]
fn a_plot_is_drawn_along_axes_that_are_there() {
    let plot = |lines: &str| said(stage::plot::misfits, &format!("kind = \"plot\"\ny = \"accuracy\"\n{lines}"));
    assert_eq!(plot("x = \"seed\"\nseries = [\"task\"]\n"), [""; 0]);
    assert_eq!(
        plot("x = \"tusk\"\nseries = [\"size\"]\n"),
        [
            "x: no input has the axis `tusk`; an axis with a similar name exists: `task`",
            "series: no input has the axis `size`; axes of the inputs: task, seed"
        ]
    );
}

#[test]
fn a_claim_selects_cells_that_are_there() {
    let check = |claim: &str| said(stage::check::misfits, &format!("kind = \"check\"\nclaim = \"{claim}\"\n"));
    assert_eq!(check("mean(accuracy[task=gpqa,seed=2]) > 10"), [""; 0]);
    assert_eq!(
        check("mean(accuracy[task=gpqq]) > mean(accuracy[size=3B])"),
        [
            "claim: no input has `task=gpqq`; values of `task`: aime24, math500, gpqa",
            "claim: no input has the axis `size`; axes of the inputs: task, seed"
        ]
    );
}
