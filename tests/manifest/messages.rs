//! The words: every code once, whole, as it is told.

use super::*;
use insta::assert_snapshot;

/// Two stages that later lines can lean on.
const BASE: &str = r#"
[stage.base]
kind = "model"
axes = { size = ["3B", "7B"] }
source = "hf:Qwen/{size}"
[stage.s1k]
kind = "dataset"
source = "path:s1k.jsonl"
"#;

fn with_base(text: &str) -> String {
    problems(&format!("{BASE}{text}"))
}

#[test]
fn a_misspelt_key_gets_the_nearest_key_and_the_keys_of_the_kind() {
    assert_snapshot!(with_base("[stage.sft]\nkind = \"sft\"\nmodel = \"base\"\ndata = \"s1k\"\nlearning_rat = 2e-4\nlora = { rank = 1, alhpa = 2 }\n"), @r#"
error[manifest::unknown_key]: unknown key `learning_rat` in stage `sft`
  m.toml:14 "learning_rat"
  note: keys of kind `sft`: data, dtype, epochs, learning_rate, lora, micro_batch, model, schedule, seed, shuffle
  help: a key with a similar name exists: `learning_rate`
error[manifest::unknown_key]: unknown key `alhpa` in `lora` of stage `sft`
  m.toml:15 "alhpa"
  note: keys of `lora`: alpha, rank, targets
  help: a key with a similar name exists: `alpha`
"#);
}

#[test]
fn a_misspelt_reserved_key_is_found_too() {
    assert_snapshot!(problems("[stage.a]\nkind = \"model\"\nsource = \"hf:a\"\nskp = []\n"), @r#"
error[manifest::unknown_key]: unknown key `skp` in stage `a`
  m.toml:5 "skp"
  note: keys of kind `model`: source
  help: a key with a similar name exists: `skip`
"#);
}

#[test]
fn unknown_keys_outside_of_stages() {
    assert_snapshot!(problems("tilte = \"x\"\n[stages.a]\nkind = \"model\"\n[profile.p]\ninclude = []\n"), @r#"
error[manifest::unknown_key]: unknown key `tilte` in the manifest
  m.toml:2 "tilte"
  note: keys of the manifest: manifest, title, include, endpoint, task, stage, profile
  help: a key with a similar name exists: `title`
error[manifest::unknown_key]: unknown key `stages` in the manifest
  m.toml:3 "stages"
  note: keys of the manifest: manifest, title, include, endpoint, task, stage, profile
  help: a key with a similar name exists: `stage`
error[manifest::unknown_key]: unknown key `include` in profile `p`
  m.toml:6 "include"
  note: keys of profile `p`: title, endpoint, task, stage
"#);
}

#[test]
fn wrong_types_say_what_is_taken() {
    assert_snapshot!(with_base(r#"
[stage.sft]
kind = "sft"
model = 3
data = ["s1k"]
epochs = "10"
learning_rate = true
schedule = 1
lora = "yes"
shuffle = "true"
seed = 1.5
dtype = { a = 1 }
description = 4
[stage.t]
kind = "table"
from = [1]
rows = "size"
"#), @r#"
error[manifest::wrong_type]: `model` of stage `sft` takes the name of a stage that yields a model, not a whole number
  m.toml:13 "3"
error[manifest::wrong_type]: `data` of stage `sft` takes the name of a stage that yields a dataset, not a list
  m.toml:14 "[\"s1k\"]"
error[manifest::wrong_type]: `epochs` of stage `sft` takes a whole number, not a string
  m.toml:15 "\"10\""
  help: without quotes: `10`
error[manifest::wrong_type]: `learning_rate` of stage `sft` takes a number, not a truth value
  m.toml:16 "true"
error[manifest::wrong_type]: `schedule` of stage `sft` takes one of `constant`, `cosine`, or a table, not a whole number
  m.toml:17 "1"
error[manifest::wrong_type]: `lora` of stage `sft` takes a table, not a string
  m.toml:18 "\"yes\""
error[manifest::wrong_type]: `shuffle` of stage `sft` takes `true` or `false`, not a string
  m.toml:19 "\"true\""
  help: without quotes: `true`
error[manifest::wrong_type]: `seed` of stage `sft` takes a whole number, not a decimal number
  m.toml:20 "1.5"
error[manifest::wrong_type]: `dtype` of stage `sft` takes one of `f32`, `bf16`, not a table
  m.toml:21 "{ a = 1 }"
error[manifest::wrong_type]: `description` of stage `sft` takes a string, not a whole number
  m.toml:22 "4"
error[manifest::wrong_type]: `from` of stage `t` takes the name of a stage that yields scores or measurements, or a list of them, not a whole number
  m.toml:25 "1"
error[manifest::wrong_type]: `rows` of stage `t` takes a list, not a string
  m.toml:26 "\"size\""
"#);
}

#[test]
fn ranges_say_both_ends() {
    assert_snapshot!(with_base(r#"
[stage.sft]
kind = "sft"
model = "base"
data = "s1k"
epochs = 0
learning_rate = 0
schedule = { kind = "cosine", warmup_ratio = 1.5 }
[stage.eval]
kind = "eval"
model = "base"
task = "gpqa"
temperature = -0.1
"#), @r#"
error[manifest::out_of_range]: `epochs` of stage `sft` has to be at least 1, not 0
  m.toml:15 "0"
error[manifest::out_of_range]: `learning_rate` of stage `sft` has to be above 0, not 0
  m.toml:16 "0"
error[manifest::out_of_range]: `schedule.warmup_ratio` of stage `sft` has to be at least 0 and at most 1, not 1.5
  m.toml:17 "1.5"
error[manifest::out_of_range]: `temperature` of stage `eval` has to be at least 0 and at most 2, not -0.1
  m.toml:22 "-0.1"
"#);
}

#[test]
fn numbers_that_nothing_can_take() {
    assert_snapshot!(problems("title = 99999999999999999999\n[stage.a]\nkind = \"eval\"\ntemperature = nan\n[stage.b]\nkind = \"eval\"\ntemperature = 1e999\n[profile.p]\nstage.a.temperature = -inf\n"), @r#"
error[manifest::out_of_range]: a whole number has to fit 64 bits
  m.toml:2 "99999999999999999999"
error[manifest::missing_key]: stage `a` needs the key `model`
  m.toml:3 "[stage.a]"
  note: `model`: Who answers.
error[manifest::missing_key]: stage `a` needs the key `task`
  m.toml:3 "[stage.a]"
  note: `task`: What is asked.
error[manifest::not_finite]: a number has to be finite
  m.toml:5 "nan"
error[manifest::missing_key]: stage `b` needs the key `model`
  m.toml:6 "[stage.b]"
  note: `model`: Who answers.
error[manifest::missing_key]: stage `b` needs the key `task`
  m.toml:6 "[stage.b]"
  note: `task`: What is asked.
error[manifest::not_finite]: a number has to be finite
  m.toml:8 "1e999"
error[manifest::not_finite]: a number has to be finite
  m.toml:10 "-inf"
"#);
}

#[test]
fn missing_keys_are_told_at_the_table_that_lacks_them() {
    assert_snapshot!(with_base("[stage.sft]\nkind = \"sft\"\nmodel = \"base\"\nlora = { alpha = 2 }\n[stage.x]\n"), @r#"
error[manifest::missing_key]: stage `sft` needs the key `data`
  m.toml:10 "[stage.sft]"
  note: `data`: What to learn.
error[manifest::missing_key]: `lora` of stage `sft` needs the key `rank`
  m.toml:13 "{ alpha = 2 }"
  note: `rank`: Inner size.
error[manifest::missing_key]: stage `x` needs the key `kind`
  m.toml:14 "[stage.x]"
  note: kinds: model, dataset, sft, dpo, eval, table
"#);
}

#[test]
fn unknown_words_and_schemes_get_the_nearest() {
    assert_snapshot!(with_base(r#"
[stage.sft]
kind = "sftt"
[stage.d]
kind = "dataset"
source = "paht:x"
[stage.e]
kind = "dataset"
source = "data/x.jsonl"
[stage.f]
kind = "dataset"
source = "hf:"
[stage.g]
kind = "sft"
model = "base"
data = "s1k"
schedule = "cosin"
"#), @r#"
error[manifest::unknown_kind]: stage `sft` is of unknown kind `sftt`
  m.toml:12 "\"sftt\""
  note: kinds: model, dataset, sft, dpo, eval, table
  help: a kind with a similar name exists: `sft`
error[manifest::unknown_scheme]: `source` of stage `d` begins with no scheme known for it
  m.toml:15 "\"paht:x\""
  note: schemes: `hf:`, `path:`
  help: a similar scheme exists: `path:`
error[manifest::unknown_scheme]: `source` of stage `e` begins with no scheme known for it
  m.toml:18 "\"data/x.jsonl\""
  note: schemes: `hf:`, `path:`
  help: for a file beside the manifest: `path:data/x.jsonl`
error[manifest::out_of_range]: `source` of stage `f` names nothing after `hf:`
  m.toml:21 "\"hf:\""
error[manifest::unknown_choice]: `schedule` of stage `g` cannot be `cosin`
  m.toml:26 "\"cosin\""
  note: it takes one of `constant`, `cosine`
  help: a similar one exists: `cosine`
"#);
}

#[test]
fn a_missing_stage_gets_the_nearest_and_the_stages_that_fit() {
    assert_snapshot!(with_base(r#"
[stage.sft]
kind = "sft"
model = "bas"
data = "zzzz"
[stage.eval]
kind = "eval"
model = "base.model"
task = "aime25"
"#), @r#"
error[plan::missing_stage]: `model` of stage `sft` names `bas`, and there is no such stage
  m.toml:13 "\"bas\""
  help: a stage with a similar name exists: `base`
error[plan::missing_stage]: `data` of stage `sft` names `zzzz`, and there is no such stage
  m.toml:14 "\"zzzz\""
  note: stages that fit: `s1k`
error[plan::bad_reference]: `model` of stage `eval` is not a reference: `base.model` is not the name of a stage (letters, digits, `_`, `-`)
  m.toml:17 "\"base.model\""
  help: the name of a stage stands alone: `base`; what it yields follows from its kind
error[plan::missing_stage]: `task` of stage `eval` names `aime25`, and there is no such stage
  m.toml:18 "\"aime25\""
  note: it takes a stage or one of `aime24`, `math500`, `gpqa`
  help: a similar word exists: `aime24`
"#);
}

#[test]
fn a_table_fed_with_a_model_is_told_what_it_takes() {
    assert_snapshot!(with_base("[stage.t]\nkind = \"table\"\nfrom = \"base\"\n[stage.u]\nkind = \"table\"\nfrom = [\"t\"]\n[stage.sft]\nkind = \"sft\"\nmodel = \"base\"\naxes = { data = [\"s1k\", \"base\"] }\ndata = \"{data}\"\n"), @r#"
error[plan::wrong_artifact]: `from` of stage `t` takes scores or measurements, and `base` yields a model
  m.toml:12 "\"base\""
  note: `base` is of kind `model`
error[plan::wrong_artifact]: `from` of stage `u` takes scores or measurements, and `t` yields a table
  m.toml:15 "\"t\""
  note: `t` is of kind `table`
error[plan::wrong_artifact]: `data` of stage `sft` takes a dataset, and `base` yields a model
  m.toml:20 "\"{data}\""
  note: `base` is of kind `model`
  help: stages that fit: `s1k`
"#);
}

#[test]
fn a_cycle_is_told_edge_by_edge() {
    assert_snapshot!(problems(r#"
[stage.data]
kind = "dataset"
source = "path:a"
[stage.dpo]
kind = "sft"
model = "eval"
data = "data"
[stage.eval]
kind = "sft"
model = "sft"
data = "data"
[stage.sft]
kind = "sft"
model = "dpo"
data = "data"
"#), @r#"
error[plan::cycle]: three stages wait for one another: dpo -> eval -> sft -> dpo
  m.toml:8 "\"eval\""  # dpo needs eval
  m.toml:12 "\"sft\""  # eval needs sft
  m.toml:16 "\"dpo\""  # sft needs dpo
  help: one of these three inputs has to come from elsewhere
"#);
}

#[test]
fn short_cycles_and_cycles_by_axis_are_told_as_such() {
    assert_snapshot!(problems(r#"
[stage.self]
kind = "dataset"
concat = "self"
[stage.a]
kind = "dataset"
concat = ["b"]
[stage.b]
kind = "dataset"
axes = { from = ["a", "c"] }
concat = ["{from}"]
[stage.c]
kind = "dataset"
source = "path:x"
"#), @r#"
error[plan::cycle]: stage `self` waits for itself
  m.toml:5 "\"self\""  # self needs self
  help: its input has to come from elsewhere
error[plan::cycle]: two stages wait for each other: a -> b -> a
  m.toml:8 "\"b\""  # a needs b
  m.toml:12 "\"{from}\""  # b needs a
  help: one of these two inputs has to come from elsewhere
"#);
}

#[test]
fn duplicates_across_files_show_both_places() {
    let root = "manifest = 1\ninclude = [\"common.toml\"]\n[stage.a]\nkind = \"model\"\nsource = \"hf:a\"\n";
    let common = "manifest = 1\n[stage.a]\nkind = \"model\"\nsource = \"hf:b\"\n";
    assert_snapshot!(problems_in(&[("dir/m.toml", root), ("dir/common.toml", common)], &[], &[]), @r#"
error[manifest::duplicate_stage]: stage `a` is declared twice
  dir/m.toml:3 "[stage.a]"  # declared again
  dir/common.toml:2 "[stage.a]"  # first declared
  help: rename one of the two, or change the other's keys by a profile
"#);
}

#[test]
fn include_cycles_show_the_way_round() {
    let files = [
        ("m.toml", "manifest = 1\ninclude = [\"a.toml\"]\n"),
        ("a.toml", "manifest = 1\ninclude = [\"sub/b.toml\"]\n"),
        ("sub/b.toml", "manifest = 1\ninclude = [\"../a.toml\", \"./b.toml\"]\n"),
    ];
    assert_snapshot!(problems_in(&files, &[], &[]), @r#"
error[manifest::include_cycle]: two files include one another: a.toml -> sub/b.toml -> a.toml
  a.toml:2 "\"sub/b.toml\""  # a.toml includes sub/b.toml
  sub/b.toml:2 "\"../a.toml\""  # sub/b.toml includes a.toml
  help: one of these includes has to go
error[manifest::include_cycle]: `sub/b.toml` includes itself
  sub/b.toml:2 "\"./b.toml\""  # sub/b.toml includes sub/b.toml
  help: one of these includes has to go
"#);
}

#[test]
fn every_file_is_told_about_even_if_one_does_not_parse() {
    let files = [
        (
            "m.toml",
            "manifest = 1\ninclude = [\"a.toml\", \"gone.toml\"]\n[stage.x]\nkind = \"table\"\nfrom = \"in-a\"\nrow = 1\n",
        ),
        ("a.toml", "include = [\"b.toml\"]\n[stage.in-a]\nkind = = 1\n"),
        ("b.toml", "manifest = 2\n[stage.y]\nkind = \"nope\"\n"),
    ];
    assert_snapshot!(problems_in(&files, &[], &[]), @r#"
error[manifest::unreadable]: cannot read `gone.toml`: not found
  m.toml:2 "\"gone.toml\""
  help: `include` is relative to the file it stands in
error[manifest::unknown_key]: unknown key `row` in stage `x`
  m.toml:6 "row"
  note: keys of kind `table`: from, published, rows
  help: a key with a similar name exists: `rows`
error[manifest::syntax]: extra `=`, expected nothing
  a.toml:3 "="
error[manifest::syntax]: unexpected key or value, expected newline, `#`
  a.toml:3 ""
error[manifest::wrong_version]: `manifest = 2` is not a version known here
  b.toml:1 "2"
  note: this program reads version 1
error[manifest::unknown_kind]: stage `y` is of unknown kind `nope`
  b.toml:3 "\"nope\""
  note: kinds: model, dataset, sft, dpo, eval, table
"#);
}

#[test]
fn the_version_has_to_be_there() {
    assert_snapshot!(problems_in(&[("m.toml", "title = \"x\"\n")], &[], &[]), @r#"
error[manifest::missing_version]: the file does not say which manifest language it is in
  m.toml:1 ""
  help: begin it with `manifest = 1`
"#);
    assert_snapshot!(problems_in(&[("m.toml", "manifest = \"1\"\ninclude = \"a\"\n")], &[], &[]), @r#"
error[manifest::wrong_type]: `manifest` takes a whole number, not a string
  m.toml:1 "\"1\""
error[manifest::wrong_type]: `include` takes a list of files, not a string
  m.toml:2 "\"a\""
"#);
}

#[test]
fn a_profile_that_touches_nothing_is_an_error_chosen_or_not() {
    assert_snapshot!(with_base(r#"
[profile.mini]
stage.bse.source = "init:x"
stage.base.sorce = "init:x"
stage.s1k.sample.paris = 3
stage.base.axes.sizes = ["3B"]
stage.s1k.axes.size = ["3B"]
stage.base.source = 3
"#), @r#"
error[manifest::profile_touches_nothing]: profile `mini` changes stage `bse`, which does not exist
  m.toml:12 "bse"
  help: a stage with a similar name exists: `base`
error[manifest::profile_touches_nothing]: profile `mini` sets `sorce` in stage `base`, and there is no such key
  m.toml:13 "sorce"
  note: keys of kind `model`: source
  help: a key with a similar name exists: `source`
error[manifest::profile_touches_nothing]: profile `mini` sets `paris` in `sample` of stage `s1k`, and there is no such key
  m.toml:14 "paris"
  note: keys of `sample`: by, pairs, seed
  help: a key with a similar name exists: `pairs`
error[manifest::profile_touches_nothing]: profile `mini` changes axis `sizes` of stage `base`, which declares `size` of its own
  m.toml:15 "sizes"
error[manifest::profile_touches_nothing]: profile `mini` changes axis `size` of stage `s1k`, which declares none of its own
  m.toml:16 "size"
error[manifest::wrong_type]: `source` of stage `base` takes a source (`hf:...`, `path:...`, `init:...`), not a whole number
  m.toml:17 "3"
"#);
    assert_snapshot!(problems_of(&format!("{BASE}[profile.mini]\ntitle = \"m\"\n"), &["mimi"], &[]), @r#"
error[manifest::unknown_profile]: there is no profile `mimi`
  m.toml
  help: a profile with a similar name exists: `--profile mini`
"#);
    assert_snapshot!(problems_of(BASE, &["mini"], &[]), @r#"
error[manifest::unknown_profile]: there is no profile `mini`
  m.toml
  note: the manifest declares no profile
"#);
}

#[test]
fn a_set_that_touches_nothing_is_an_error() {
    let sets = [
        "stage.bse.source=init:x",
        "stage.base.sorce=init:x",
        "stage.base.source=3",
        "stage.base.axes.size=[]",
        "include=x",
        "stage.base=3",
        "nothing",
        "stage..x=1",
    ];
    assert_snapshot!(problems_of(BASE, &[], &sets), @r#"
error[manifest::set_touches_nothing]: `--set` names stage `bse`, which does not exist
  --set:1 "bse"
  help: a stage with a similar name exists: `base`
error[manifest::set_touches_nothing]: `--set` names `sorce` in stage `base`, and there is no such key
  --set:2 "sorce"
  note: keys of kind `model`: source
  help: a key with a similar name exists: `source`
error[manifest::wrong_type]: `source` of stage `base` takes a source (`hf:...`, `path:...`, `init:...`), not a whole number
  --set:3 "3"
error[manifest::empty_axis]: axis `size` of stage `base` has no values
  --set:4 "[]"
error[manifest::set_touches_nothing]: `--set include=x` names nothing that can be set
  --set:5 "include=x"
  help: `title`, `stage.NAME.KEY`, `task.NAME.KEY` or `endpoint.NAME.KEY`
error[manifest::bad_set]: `--set stage.base=3` replaces a whole stage
  --set:6 "stage.base=3"
  help: name one of its keys: `--set stage.base.KEY=VALUE`
error[manifest::bad_set]: `--set nothing` is not `KEY=VALUE`
  --set:7 "nothing"
  help: `--set stage.NAME.KEY=VALUE`, the value in TOML or a bare string
error[manifest::bad_set]: `--set stage..x=1` is not `KEY=VALUE`
  --set:8 "stage..x=1"
  help: `--set stage.NAME.KEY=VALUE`, the value in TOML or a bare string
"#);
}

#[test]
fn axes_that_are_not_there() {
    assert_snapshot!(with_base(r#"
[stage.sft]
kind = "sft"
description = "on {dta}"
axes = { data = ["s1k"] }
skip = [{ data = "s1k", siz = "3B" }, { size = "70B" }, { size = "3B" }, { size = "3B", data = "s1k" }]
model = "base[sizes=3B]"
data = "{data}"
[stage.sft2]
kind = "sft"
model = "base[size=8B]"
data = "{dat}"
[stage.sft3]
kind = "sft"
axes = { data = ["s1k"] }
skip = [{ data = "s1k", siz = "3B" }, { size = "70B" }, { size = "3B" }, { size = "3B", data = "s1k" }]
model = "base"
data = "{data}"
[stage.sft4]
kind = "sft"
axes = { seed = [0, 1] }
skip = [{ seed = "0" }]
model = "base"
data = "s1k"
seed = "{see}"
"#), @r#"
error[plan::unknown_axis]: `model` of stage `sft` fixes axis `sizes`, which stage `base` does not have
  m.toml:16 "\"base[sizes=3B]\""
  note: axes of stage `base`: `size`
  help: an axis with a similar name exists: `size`
error[plan::bad_axis_value]: axis `size` of stage `base` has no value `8B`
  m.toml:20 "\"base[size=8B]\""
  note: values of `size`: `3B`, `7B`
error[plan::unknown_axis]: `skip` of stage `sft3` uses axis `siz`, which the stage does not have
  m.toml:25 "siz"
  note: axes of stage `sft3`: `size`, `data`
  help: an axis with a similar name exists: `size`
error[plan::bad_axis_value]: axis `size` of stage `sft3` has no value `70B`
  m.toml:25 "\"70B\""
  note: values of `size`: `3B`, `7B`
  help: a similar value exists: `7B`
error[plan::bad_axis_value]: axis `seed` of stage `sft4` has no value `0`
  m.toml:31 "\"0\""
  note: values of `seed`: `0`, `1`
  help: it is there as another type: quotes make a string
error[plan::unknown_axis]: `seed` of stage `sft4` uses axis `see`, which the stage does not have
  m.toml:34 "\"{see}\""
  note: axes of stage `sft4`: `size`, `seed`
  help: an axis with a similar name exists: `seed`
"#);
}

#[test]
fn axis_values_that_lead_nowhere() {
    assert_snapshot!(with_base(r#"
[stage.sft]
kind = "sft"
axes = { size = ["3B", "8B"], data = ["s1k", "s2k"], "0x" = [1] }
model = "base"
data = "{data}"
[stage.a]
kind = "sft"
axes = { size = ["3B", "8B"], data = ["s1k"] }
model = "base"
data = "{data}"
[stage.b]
kind = "sft"
axes = { data = ["s1k", "s2k"] }
model = "base"
data = "{data}"
[stage.c]
kind = "model"
axes = { a = [], b = 3, c = [[1]], d = [1, 1], e = ["x,y"], f = [1, "1"] }
source = "hf:x"
[stage.d]
kind = "model"
axes = { epochs = [0, 3], word = ["x"] }
source = "{word}"
[stage.e]
kind = "sft"
axes = { epochs = [0, 3], word = ["x"] }
model = "base"
data = "s1k"
epochs = "{epochs}"
learning_rate = "{word}"
schedule = "co{word}"
seed = "1{word}"
"#), @r#"
error[manifest::bad_name]: `0x` cannot name an axis: begin with a letter, then letters, digits, `_`, `-`
  m.toml:13 "\"0x\""
error[plan::bad_axis_value]: `8B` of axis `size` of stage `a` is not a value of that axis in its inputs
  m.toml:18 "\"8B\""
  note: values of `size`: `3B`, `7B`
error[plan::missing_stage]: `data` of stage `b` names `s2k`, and there is no such stage
  m.toml:25 "\"{data}\""
  note: `{data}` comes to `s2k` here
  help: a stage with a similar name exists: `s1k`
error[manifest::empty_axis]: axis `a` of stage `c` has no values
  m.toml:28 "[]"
error[manifest::wrong_type]: axis `b` of stage `c` takes a list, not a whole number
  m.toml:28 "3"
error[manifest::wrong_type]: a value of axis `c` is a string, a number or true/false, not a list
  m.toml:28 "[1]"
error[plan::bad_axis_value]: axis `d` has the value `1` twice
  m.toml:28 "1"
error[plan::bad_axis_value]: `x,y` cannot be a value of axis `e`: no blanks around it, none of , [ ] { } " =
  m.toml:28 "\"x,y\""
error[plan::bad_axis_value]: axis `f` has the value `1` twice
  m.toml:28 "\"1\""
error[manifest::unknown_scheme]: `source` of stage `d` begins with no scheme known for it
  m.toml:33 "\"{word}\""
  note: schemes: `hf:`, `path:`, `init:`
  note: `{word}` comes to `x` here
  help: for a file beside the manifest: `path:x`
error[manifest::out_of_range]: `epochs` of stage `e` has to be at least 1, not 0
  m.toml:39 "\"{epochs}\""
  note: `{epochs}` comes to `0` here
error[manifest::wrong_type]: `learning_rate` of stage `e` takes a number, not a string
  m.toml:40 "\"{word}\""
  note: `{word}` comes to `x` here
error[manifest::unknown_choice]: `schedule` of stage `e` cannot be `cox`
  m.toml:41 "\"co{word}\""
  note: it takes one of `constant`, `cosine`
  note: `co{word}` comes to `cox` here
error[manifest::wrong_type]: `seed` of stage `e` takes a whole number, not a string
  m.toml:42 "\"1{word}\""
  help: a string that is exactly `{word}` takes the axis's own type
"#);
}

#[test]
fn skipping_everything_leaves_nothing() {
    assert_snapshot!(with_base("[stage.a]\nkind = \"sft\"\nskip = [{ size = \"3B\" }, { size = \"7B\" }]\nmodel = \"base\"\ndata = \"s1k\"\n[stage.b]\nkind = \"eval\"\nmodel = \"a\"\ntask = \"gpqa\"\n"), @r#"
error[plan::no_cells]: no cell is left of stage `a`
  m.toml:10 "[stage.a]"
  note: its inputs have no values of their axes in common, or `skip` names every cell
"#);
}

#[test]
fn skips_have_to_be_tables_of_values() {
    assert_snapshot!(with_base("[stage.a]\nkind = \"eval\"\nskip = [1, {}, { size = [\"3B\"] }]\nmodel = \"base\"\ntask = \"gpqa\"\n[stage.b]\nkind = \"eval\"\nskip = { size = \"3B\" }\nmodel = \"base\"\ntask = \"gpqa\"\n"), @r#"
error[manifest::wrong_type]: `skip` of stage `a` takes a list of tables such as `{ axis = value }`, not a whole number
  m.toml:12 "1"
error[manifest::wrong_type]: `skip` of stage `a` takes a list of tables such as `{ axis = value }`, not an empty one
  m.toml:12 "{}"
error[manifest::wrong_type]: `skip` of stage `a` gives each axis one value
  m.toml:12 "[\"3B\"]"
error[manifest::wrong_type]: `skip` of stage `b` takes a list of tables such as `{ axis = value }`, not a table
  m.toml:17 "{ size = \"3B\" }"
"#);
}

#[test]
fn malformed_references_and_names() {
    assert_snapshot!(with_base("[stage.a]\nkind = \"eval\"\nmodel = \"base[size]\"\ntask = \"gpqa\"\n[stage.\"b c\"]\nkind = \"eval\"\n[stage.d]\nkind = \"table\"\nfrom = []\n[stage.e]\nkind = \"eval\"\naxes = { m = [\"a b\"] }\nmodel = \"{m}\"\ntask = \"gpqa\"\n"), @r#"
error[plan::bad_reference]: `model` of stage `a` is not a reference: `size` is not `axis=value`
  m.toml:12 "\"base[size]\""
  help: a reference is the name of a stage, or `stage[axis=value]`
error[manifest::bad_name]: `b c` cannot name a stage
  m.toml:14 "[stage.\"b c\"]"
  help: use letters, digits, `_` and `-`
error[manifest::out_of_range]: `from` of stage `d` names no stage
  m.toml:18 "[]"
error[plan::bad_reference]: `model` of stage `e` is not a reference: `a b` is not the name of a stage (letters, digits, `_`, `-`)
  m.toml:22 "\"{m}\""
  note: `{m}` comes to `a b`
"#);
}

#[test]
fn too_many_cells_are_not_made() {
    let axis = |name: &str| format!("{name} = [{}]", (0..400).map(|i| i.to_string()).collect::<Vec<_>>().join(", "));
    let text = format!("[stage.a]\nkind = \"model\"\naxes = {{ {}, {} }}\nsource = \"hf:x\"\n", axis("x"), axis("y"));
    assert_snapshot!(problems(&text), @r#"
error[plan::too_many_cells]: with stage `a` the plan has 100400 cells or more, the most it may have is 100000
  m.toml:4 "axes"
  help: give an axis fewer values
"#);
}

#[test]
fn rules_between_keys_point_at_the_key() {
    assert_snapshot!(with_base("[stage.d]\nkind = \"dataset\"\nconcat = \"s1k\"\nsample = { pairs = 3 }\n[stage.e]\nkind = \"dataset\"\naxes = { n = [1, 2, 5] }\nconcat = \"s1k\"\nsample = { pairs = \"{n}\" }\n"), @r#"
error[manifest::rule]: stage `d`: 3 pairs cannot be halved
  m.toml:13 "pairs"
  help: `sample.pairs = 4`
error[manifest::rule]: stage `e`: 1 pairs cannot be halved
  m.toml:18 "pairs"
  help: `sample.pairs = 2`
error[manifest::rule]: stage `e`: 5 pairs cannot be halved
  m.toml:18 "pairs"
  help: `sample.pairs = 6`
"#);
}

#[test]
fn problems_come_in_the_order_of_the_text() {
    let told = with_base(
        "[stage.t]\nkind = \"table\"\nfrom = \"base\"\nrwos = []\n[stage.a]\nkind = \"eval\"\nmodle = \"base\"\ntask = \"x\"\n",
    );
    let codes: Vec<&str> = told.lines().filter_map(|line| line.strip_prefix("error[")?.split(']').next()).collect();
    assert_eq!(
        codes,
        [
            "plan::wrong_artifact",
            "manifest::unknown_key",
            "manifest::missing_key",
            "manifest::unknown_key",
            "plan::missing_stage"
        ]
    );
}
