//! The keys of these kinds as a person writes them, through the manifest to resolved cells.

use pipe::manifest;
use pipe::plan;
use pipe::stage::KINDS;
use std::path::Path;

const TEXT: &str = r#"manifest = 1
title = "keys"

[stage.base]
kind = "model"
source = "init:random"
tokenizer = "init:mini"
init = { hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 48 }

[stage.rows]
kind = "dataset"
source = "path:rows.jsonl"

[stage.inverted]
kind = "generate"
model = "base"
data = "rows"
prompt = "Turn round: {{ question }} / {{answer}}"
max_tokens = 64
parse = { kind = "sections", fields = { prompt = "New Question", solution = "New Answer" } }
on_parse_failure = "drop"

[stage.solved]
kind = "generate"
model = "base"
data = "inverted"
prompt_file = "path:solve.txt"
max_tokens = 64
parse = { kind = "regex", pattern = '\\boxed\{(?<answer>\d{1,3})\}' }
keep = ["prompt"]

[stage.eval]
kind = "eval"
axes = { task = ["rows"] }
model = "base"
task = "{task}"
format = "s1"
max_tokens = 64

[stage.report]
kind = "command"
command = ["python3", "files/report.py", "inputs/1/scores.json"]
from = ["eval[task=rows]"]
files = { "report.py" = "path:report.py" }
outputs = ["report.txt"]
"#;

fn load(text: &str) -> (manifest::Manifest, Result<plan::Plan, Vec<pipe::problem::Problem>>) {
    let text = text.to_string();
    let manifest = manifest::load(Path::new("m.toml"), &move |_| Ok(text.clone()), KINDS, &[], &[]);
    let plan = plan::resolve(&manifest);
    (manifest, plan)
}

#[test]
fn a_manifest_of_all_three_kinds_resolves_with_its_sources_and_templates() {
    let (_, plan) = load(TEXT);
    let plan =
        plan.unwrap_or_else(|problems| panic!("{}", problems.iter().map(|p| format!("{p}\n")).collect::<String>()));
    let cell = |stage: &str| plan.cells.iter().find(|cell| cell.stage == stage).unwrap();
    assert_eq!(cell("inverted").params["prompt"], "Turn round: {{ question }} / {{answer}}");
    assert_eq!(cell("solved").sources[0].key, "prompt_file");
    assert_eq!(cell("solved").params["parse"]["pattern"], r"\\boxed\{(?<answer>\d{1,3})\}");
    assert_eq!(cell("report").sources[0].key, "files.report.py");
    assert_eq!(cell("report").sources[0].text, "path:report.py");
    assert_eq!(cell("eval").params["grader"], "auto");
}

#[test]
fn a_broken_rule_between_keys_is_a_problem_of_the_manifest() {
    let (_, plan) = load(&TEXT.replace(
        "kind = \"sections\", fields = { prompt = \"New Question\", solution = \"New Answer\" }",
        "kind = \"regex\"",
    ));
    let problems = plan.err().expect("a pattern is missing");
    assert!(problems.iter().any(|problem| problem.message.contains("pattern")), "{problems:?}");
}
