//! Fingerprints: what is in, what is out, and what is said when they differ.

use super::*;
use pipe::digest::Digest;
use pipe::plan::{Arithmetic, Change, Fingerprint, fingerprint};

const CPU: Arithmetic<'_> = Arithmetic { backend: "cpu", dtype: "f32" };

const TEXT: &str = r#"
[stage.base]
kind = "model"
source = "init:mini"
[stage.d]
kind = "dataset"
source = "path:d.jsonl"
filter = { "a.b" = 1, level = "hard" }
[stage.sft]
kind = "sft"
model = "base"
data = "d"
lora = { rank = 4 }
learning_rate = 3e-4
[stage.eval]
kind = "eval"
model = "sft"
task = "gpqa"
[stage.t]
kind = "table"
from = "eval"
"#;

/// Inputs and sources whose content is their own name.
fn print_of(plan: &Plan, stage: &str, machine: Arithmetic<'_>) -> Fingerprint {
    let cell = plan.cells.iter().find(|cell| cell.stage == stage).unwrap();
    let input = |id: usize| Some((Digest::of(plan.cells[id].kind.name.as_bytes()), plan.cells[id].to_string()));
    fingerprint(cell, machine, input, |_| Some(Digest::of(b"content"))).unwrap()
}

fn parts(print: &Fingerprint) -> Vec<String> {
    print.parts.iter().map(|(part, value)| format!("{part}={}", value.chars().take(30).collect::<String>())).collect()
}

#[test]
fn the_parts_are_those_of_the_table() {
    let plan = plan(TEXT);
    assert_eq!(
        parts(&print_of(&plan, "sft", CPU)),
        [
            "backend=cpu",
            "dtype=f32",
            "epochs=1",
            "input.data[0]=5d0b4bd5ae4dbbc5e13ba7ea88b6c9",
            "input.model[0]=2e2b9a1d0a5a3d2f1d2a1c8f4b4d0e",
            "kind=sft",
            "learning_rate=0.0003",
            "lora.alpha=16.0",
            "lora.rank=4",
            "lora.targets=[\"q_proj\"]",
            "recipe=3",
            "schedule=\"constant\"",
            "seed=0",
            "shuffle=true",
        ]
        .map(|part| match part.strip_prefix("input.") {
            Some(rest) => {
                let kind = if rest.starts_with("data") { "dataset" } else { "model" };
                let digest = Digest::of(kind.as_bytes()).hex();
                format!("{}={}", part.split('=').next().unwrap(), &digest[..30])
            }
            None => part.to_string(),
        })
    );
    let content = &Digest::of(b"content").hex()[..30];
    assert_eq!(
        parts(&print_of(&plan, "d", CPU)),
        ["filter.\"a.b\"=1", "filter.level=\"hard\"", "kind=dataset", "recipe=1", &format!("source.source={content}")]
    );
    assert_eq!(
        parts(&print_of(&plan, "base", CPU)),
        ["kind=model", "recipe=1", "source=\"init:mini\"", &format!("source.source={content}")],
        "what is bundled under a name may change with the program"
    );
    assert!(print_of(&plan, "t", CPU).parts["input.from[0]"].starts_with("eval "), "a gather shows its labels");
}

#[test]
fn what_cannot_change_the_result_changes_nothing() {
    let before = print_of(&plan(TEXT), "sft", CPU);
    let same = TEXT
        .replace(
            "learning_rate = 3e-4",
            "# slow\nmicro_batch = 8\nlearning_rate = 0.00030\nepochs = 1\ndescription = \"x\"",
        )
        .replace("stage.sft", "stage.tuned")
        .replace("\"sft\"\ntask", "\"tuned\"\ntask")
        .replace("path:d.jsonl", "path:elsewhere/e.jsonl")
        .replace("\"a.b\" = 1, level = \"hard\"", "level = \"hard\", \"a.b\" = 1");
    let after = plan(&same);
    assert_eq!(print_of(&after, "tuned", CPU), before);
    assert_eq!(print_of(&after, "d", CPU), print_of(&plan(TEXT), "d", CPU));
    assert_eq!(print_of(&after, "tuned", CPU).digest(), before.digest());
}

#[test]
fn what_changes_the_result_is_named_with_its_values() {
    let before = print_of(&plan(TEXT), "sft", CPU);
    let after =
        print_of(&plan(&TEXT.replace("3e-4", "1e-6").replace("rank = 4", "rank = 4, targets = []")), "sft", CPU);
    let change = |part: &str, before: &str, after: &str| Change {
        part: part.into(),
        before: Some(before.into()),
        after: Some(after.into()),
    };
    assert_eq!(
        after.changed(&before),
        [change("learning_rate", "0.0003", "1e-6"), change("lora.targets", "[\"q_proj\"]", "[]")]
    );
    assert_ne!(after.digest(), before.digest());
    let bare = print_of(&plan(&TEXT.replace("lora = { rank = 4 }\n", "")), "sft", CPU);
    assert!(bare.changed(&before).iter().all(|change| change.part.starts_with("lora.") && change.after.is_none()));
    assert_eq!(bare.changed(&bare), []);
}

#[test]
fn the_machine_counts_only_where_floats_are_made() {
    let plan = plan(TEXT);
    let cuda = Arithmetic { backend: "cuda", dtype: "bf16" };
    assert_eq!(print_of(&plan, "d", cuda), print_of(&plan, "d", CPU));
    let changed: Vec<String> =
        print_of(&plan, "eval", cuda).changed(&print_of(&plan, "eval", CPU)).into_iter().map(|c| c.part).collect();
    assert_eq!(changed, ["backend", "dtype"]);
    // A kind's own `dtype` says it instead.
    let own = super::plan(&TEXT.replace("lora =", "dtype = \"bf16\"\nlora ="));
    assert_eq!(print_of(&own, "sft", CPU).parts["dtype"], "\"bf16\"");
}

#[test]
fn a_cell_waits_for_inputs_and_sources_that_are_not_there() {
    let plan = plan(TEXT);
    let sft = plan.cells.iter().find(|cell| cell.stage == "sft").unwrap();
    assert_eq!(fingerprint(sft, CPU, |_| None, |_| None), None);
    let data = plan.cells.iter().find(|cell| cell.stage == "d").unwrap();
    assert_eq!(fingerprint(data, CPU, |_| None, |_| None), None);
}

#[test]
fn a_fingerprint_survives_json() {
    let print = print_of(&plan(TEXT), "sft", CPU);
    let text = serde_json::to_string(&print).unwrap();
    assert_eq!(serde_json::from_str::<Fingerprint>(&text).unwrap(), print);
}
