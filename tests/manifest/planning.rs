//! What a manifest comes to: cells, joins, chains, parameters.

use super::*;

pub const PAPER: &str = r#"
title = "Table 1"

[stage.base]
kind = "model"
axes = { size = ["3B", "7B", "14B"] }
source = "hf:Qwen/Qwen2.5-{size}-Instruct"

[stage.s1k]
kind = "dataset"
source = "path:data/s1k.jsonl"

[stage.r1k]
kind = "dataset"
source = "path:data/r1k.jsonl"

[stage.mixed-half]
kind = "dataset"
concat = ["s1k", "r1k"]
sample = { pairs = 500 }

[stage.mixed]
kind = "dataset"
concat = ["s1k", "r1k"]

[stage.sft]
kind = "sft"
axes = { data = ["s1k", "r1k", "mixed-half", "mixed"] }
skip = [{ size = "14B", data = "mixed-half" }]
model = "base"
data = "{data}"
epochs = 10
learning_rate = 3e-4
schedule = { kind = "cosine", warmup_ratio = 0.05 }
lora = { rank = 256, alpha = 512 }

[stage.eval]
kind = "eval"
axes = { task = ["aime24", "math500", "gpqa"] }
model = "sft"
task = "{task}"

[stage.table1]
kind = "table"
from = "eval"
rows = ["size", "data"]

[profile.mini]
title = "mini"
stage.base.source = "init:mini-{size}"
stage.sft.lora.rank = 4
stage.mixed-half.sample.pairs = 10
"#;

#[test]
fn the_papers_table_has_its_cells_less_the_skipped_one_and_what_hangs_on_it() {
    let plan = plan(PAPER);
    let count = |stage: &str| plan.cells.iter().filter(|cell| cell.stage == stage).count();
    assert_eq!(["base", "sft", "eval", "table1"].map(count), [3, 11, 33, 1]);
    assert_eq!(plan.title, "Table 1");
    let all = names(&plan);
    assert!(all.contains(&"eval[size=7B,data=mixed-half,task=gpqa]".to_string()));
    assert!(!all.iter().any(|name| name.contains("size=14B,data=mixed-half")));
    let table = plan.cells.last().unwrap();
    assert_eq!((table.inputs[0].cells.len(), table.inputs[0].labelled), (33, true));
}

#[test]
fn cells_come_dependencies_first_and_else_as_written() {
    let plan = plan(PAPER);
    for (id, cell) in plan.cells.iter().enumerate() {
        assert!(cell.inputs.iter().flat_map(|input| &input.cells).all(|&need| need < id), "{cell}");
    }
    assert_eq!(
        names(&plan)[..12],
        [
            "base[size=3B]",
            "base[size=7B]",
            "base[size=14B]",
            "s1k",
            "r1k",
            "mixed-half",
            "mixed",
            "sft[size=3B,data=s1k]",
            "sft[size=3B,data=r1k]",
            "sft[size=3B,data=mixed-half]",
            "sft[size=3B,data=mixed]",
            "sft[size=7B,data=s1k]",
        ]
    );
}

#[test]
fn shared_axes_join_and_others_broadcast() {
    let plan = plan(
        r#"
[stage.base]
kind = "model"
axes = { size = ["S", "L"] }
source = "hf:{size}"
[stage.data]
kind = "dataset"
axes = { size = ["L", "S"], seed = [0, 1] }
source = "path:{size}-{seed}"
[stage.sft]
kind = "sft"
model = "base"
data = "data"
seed = "{seed}"
[stage.large]
kind = "eval"
model = "sft[size=L]"
task = "gpqa"
[stage.one]
kind = "eval"
axes = { seed = [1] }
model = "sft[ size = \"S\" ]"
task = "data[size=L]"
"#,
    );
    assert_eq!(
        wiring(&plan)[6..],
        [
            "sft[size=S,seed=0]: model=base[size=S] data=data[size=S,seed=0]",
            "sft[size=S,seed=1]: model=base[size=S] data=data[size=S,seed=1]",
            "sft[size=L,seed=0]: model=base[size=L] data=data[size=L,seed=0]",
            "sft[size=L,seed=1]: model=base[size=L] data=data[size=L,seed=1]",
            "large[seed=0]: model=sft[size=L,seed=0]",
            "large[seed=1]: model=sft[size=L,seed=1]",
            "one[seed=1]: model=sft[size=S,seed=1] task=data[size=L,seed=1]",
        ]
    );
    assert_eq!(plan.cells[6].params["seed"], 0, "`{{seed}}` alone keeps the axis's type");
}

#[test]
fn data_named_by_an_axis_bring_the_axes_that_each_has() {
    let plan = plan(
        r#"
[stage.m]
kind = "model"
source = "init:m"
[stage.plain]
kind = "dataset"
source = "path:p"
[stage.drawn]
kind = "dataset"
axes = { seed = [0, 1] }
source = "path:d{seed}"
[stage.sft]
kind = "sft"
axes = { data = ["plain", "drawn"] }
model = "m"
data = "{data}"
[stage.eval]
kind = "eval"
model = "sft"
task = "gpqa"
[stage.per-seed]
kind = "eval"
axes = { seed = [0, 1] }
model = "sft[data=drawn]"
task = "math500"
[stage.t]
kind = "table"
from = ["eval", "per-seed"]
[stage.each]
kind = "table"
axes = { seed = [0, 1] }
from = "eval"
"#,
    );
    assert_eq!(
        wiring(&plan)[4..],
        [
            "sft[data=plain]: model=m data=plain",
            "sft[seed=0,data=drawn]: model=m data=drawn[seed=0]",
            "sft[seed=1,data=drawn]: model=m data=drawn[seed=1]",
            "eval[data=plain]: model=sft[data=plain]",
            "eval[seed=0,data=drawn]: model=sft[seed=0,data=drawn]",
            "eval[seed=1,data=drawn]: model=sft[seed=1,data=drawn]",
            "per-seed[seed=0]: model=sft[seed=0,data=drawn]",
            "per-seed[seed=1]: model=sft[seed=1,data=drawn]",
            "t: from=eval[data=plain]+eval[seed=0,data=drawn]+eval[seed=1,data=drawn]+per-seed[seed=0]+per-seed[seed=1]",
            "each[seed=0]: from=eval[data=plain]+eval[seed=0,data=drawn]",
            "each[seed=1]: from=eval[data=plain]+eval[seed=1,data=drawn]",
        ]
    );
}

#[test]
fn an_inherited_axis_may_name_a_stage_too() {
    let plan = plan(
        r#"
[stage.m]
kind = "model"
source = "init:m"
[stage.probe]
kind = "eval"
model = "sft"
task = "test-{data}"
[stage.sft]
kind = "sft"
axes = { data = ["a", "b"] }
model = "m"
data = "{data}"
[stage.a]
kind = "dataset"
source = "path:a"
[stage.b]
kind = "dataset"
source = "path:b"
[stage.test-a]
kind = "dataset"
concat = "a"
[stage.test-b]
kind = "dataset"
concat = "b"
"#,
    );
    let lines = wiring(&plan);
    assert!(lines.contains(&"probe[data=a]: model=sft[data=a] task=test-a".to_string()), "{lines:?}");
    assert!(lines.contains(&"probe[data=b]: model=sft[data=b] task=test-b".to_string()), "{lines:?}");
}

#[test]
fn a_word_and_a_stage_may_share_an_axis() {
    let plan = plan(
        r#"
[stage.m]
kind = "model"
source = "init:m"
[stage.held-out]
kind = "dataset"
source = "path:h"
[stage.eval]
kind = "eval"
axes = { task = ["gpqa", "held-out"] }
model = "m"
task = "{task}"
"#,
    );
    assert_eq!(wiring(&plan)[2..], ["eval[task=gpqa]: model=m", "eval[task=held-out]: model=m task=held-out"]);
    assert_eq!(plan.cells[2].params.get("task"), Some(&"gpqa".into()));
    assert_eq!(plan.cells[3].params.get("task"), None);
}

#[test]
fn a_model_comes_with_all_that_lies_under_it() {
    let plan = plan(
        r#"
[stage.base]
kind = "model"
source = "hf:b"
[stage.d]
kind = "dataset"
source = "path:d"
[stage.sft]
kind = "sft"
model = "base"
data = "d"
lora = { rank = 4 }
[stage.again]
kind = "sft"
model = "sft"
data = "d"
lora = { rank = 4 }
[stage.dpo]
kind = "dpo"
model = "again"
data = "d"
[stage.straight]
kind = "dpo"
model = "base"
data = "d"
[stage.full]
kind = "sft"
model = "dpo"
data = "d"
[stage.eval]
kind = "eval"
model = "full"
task = "gpqa"
"#,
    );
    assert_eq!(
        wiring(&plan)[2..],
        [
            "sft: model=base data=d",
            "again: model=base+sft data=d",
            "dpo: model=base+sft+again data=d",
            "straight: model=base data=d",
            "full: model=base+sft+dpo data=d",
            "eval: model=full",
        ]
    );
}

#[test]
fn defaults_are_filled_in_and_numbers_take_their_keys_type() {
    let plan = plan(
        "[stage.m]\nkind = \"model\"\nsource = \"init:m\"\n[stage.d]\nkind = \"dataset\"\nsource = [\"path:a\", \"hf:b/c\"]\nfilter = { z = 1, a = \"x\" }\nsample = { pairs = 2 }\n[stage.s]\nkind = \"sft\"\nmodel = \"m\"\ndata = \"d\"\nlearning_rate = 1\nschedule.kind = \"cosine\"\n",
    );
    let params = |stage: &str| {
        let cell = plan.cells.iter().find(|cell| cell.stage == stage).unwrap();
        serde_json::to_string(&*cell.params).unwrap()
    };
    assert_eq!(
        params("d"),
        r#"{"source":["path:a","hf:b/c"],"filter":{"a":"x","z":1},"sample":{"pairs":2,"by":"id","seed":0}}"#
    );
    assert_eq!(
        params("s"),
        r#"{"epochs":1,"learning_rate":1.0,"schedule":{"kind":"cosine","warmup_ratio":0.0},"shuffle":true,"seed":0,"micro_batch":1}"#
    );
    let sources: Vec<&str> = plan.cells[1].sources.iter().map(|source| source.key.as_str()).collect();
    assert_eq!(sources, ["source.0", "source.1"]);
}

#[test]
fn axes_are_filled_into_any_string_and_prompt_templates_are_left_alone() {
    let plan = plan(
        r#"
[stage.m]
kind = "model"
description = "the {size} one"
axes = { size = ["3B"], n = [2] }
source = "hf:m-{size}"
[stage.e]
kind = "eval"
model = "m"
task = "gpqa"
prompt = "{{ question }} {size}x{n} \\boxed{42} {} {a, b}"
temperature = "{n}"
[stage.d]
kind = "dataset"
axes = { n = [7] }
concat = "x"
filter = { size = "{n}", name = "n{n}" }
[stage.x]
kind = "dataset"
source = "path:x"
"#,
    );
    assert_eq!(plan.cells[0].description.as_deref(), Some("the 3B one"));
    assert_eq!(plan.cells[1].params["prompt"], r"{{ question }} 3Bx2 \boxed{42} {} {a, b}");
    assert_eq!(plan.cells[1].params["temperature"], 2.0);
    let data = plan.cells.iter().find(|cell| cell.stage == "d").unwrap();
    assert_eq!(data.params["filter"], serde_json::json!({ "name": "n7", "size": 7 }));
}

#[test]
fn cells_without_anything_of_their_own_share_their_parameters() {
    let plan = plan(PAPER);
    let evals: Vec<&Cell> = plan.cells.iter().filter(|cell| cell.stage == "eval").collect();
    let distinct: std::collections::HashSet<_> =
        evals.iter().map(|cell| std::sync::Arc::as_ptr(&cell.params)).collect();
    assert_eq!(distinct.len(), 3, "one for each task");
}

#[test]
fn selection_names_stages_and_cells_and_takes_what_they_need() {
    let plan = plan(PAPER);
    let select = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let cells = plan.closure(plan.select(&names).unwrap());
        cells.into_iter().map(|id| plan.cells[id].to_string()).collect::<Vec<_>>()
    };
    assert_eq!(
        select(&["sft[data=mixed-half,size=3B]"]),
        ["base[size=3B]", "s1k", "r1k", "mixed-half", "sft[size=3B,data=mixed-half]"]
    );
    assert_eq!(select(&["base", "s1k"]).len(), 4);
    assert_eq!(select(&["table1"]).len(), plan.cells.len());
    assert_eq!(select(&[]).len(), plan.cells.len());
    assert_eq!(plan.find("sft[data=mixed-half]").unwrap().len(), 2);
    let code = |name: &str| plan.find(name).unwrap_err().code;
    assert_eq!(code("stf"), "plan::missing_stage");
    assert_eq!(code("sft[siz=3B]"), "plan::unknown_axis");
    assert_eq!(code("sft[size=9B]"), "plan::bad_axis_value");
    assert_eq!(code("sft[size=14B,data=mixed-half]"), "plan::no_cells");
    assert_eq!(code("sft[size"), "plan::bad_reference");
    assert_eq!(plan.select(&["stf".into(), "x".into()]).unwrap_err().len(), 2);
    assert_eq!(plan.find("stf").unwrap_err().help, ["a stage with a similar name exists: `sft`"]);
}

#[test]
fn the_graph_has_an_edge_for_every_need() {
    let plan = plan(PAPER);
    let needs = |cell| plan.graph().needs(cell).count();
    // concat 2 x 2; sft 11 x 2; eval 33 x a chain of 2; the table 33.
    assert_eq!((0..plan.cells.len()).map(needs).sum::<usize>(), 4 + 22 + 66 + 33);
    assert_eq!(needs(plan.find("sft[size=3B,data=s1k]").unwrap()[0]), 2);
}

#[test]
fn a_thousand_stages_in_a_row_and_five_thousand_cells_side_by_side() {
    let mut chain = String::from("[stage.s0]\nkind = \"dataset\"\nsource = \"path:x\"\n");
    for i in 1..1000 {
        chain += &format!("[stage.s{i}]\nkind = \"dataset\"\nconcat = \"s{}\"\n", i - 1);
    }
    assert_eq!(plan(&chain).cells.len(), 1000);
    let values = |n: usize| (0..n).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
    let wide = format!(
        "[stage.a]\nkind = \"model\"\naxes = {{ x = [{}], y = [{}] }}\nsource = \"hf:{{x}}\"\n[stage.b]\nkind = \"eval\"\nmodel = \"a\"\ntask = \"gpqa\"\n[stage.t]\nkind = \"table\"\nfrom = \"b\"\n",
        values(50),
        values(50)
    );
    let plan = plan(&wide);
    assert_eq!(plan.cells.len(), 5001);
    assert_eq!(plan.cells[5000].inputs[0].cells.len(), 2500);
}
