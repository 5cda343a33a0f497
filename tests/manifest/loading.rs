//! Files, includes, profiles, `--set`.

use super::*;
use pipe::plan::AxisValue;

const SMALL: &str = r#"
[stage.base]
kind = "model"
axes = { size = ["3B", "7B"] }
source = "hf:Qwen/{size}"
[stage.s1k]
kind = "dataset"
source = "path:s1k.jsonl"
[stage.sft]
kind = "sft"
model = "base"
data = "s1k"
schedule = { kind = "cosine", warmup_ratio = 0.5 }
lora = { rank = 8 }
[profile.mini]
title = "small"
stage.base.source = "init:mini-{size}"
stage.base.axes.size = ["3B"]
stage.sft = { epochs = 2, schedule.warmup_ratio = 0.25 }
[profile.fast.stage.sft]
epochs = 3
schedule = "constant"
[profile.other]
stage.base = { kind = "sft", model = "tiny", data = "s1k" }
[stage.tiny]
kind = "model"
source = "init:tiny"
"#;

fn sft(profiles: &[&str], sets: &[&str]) -> String {
    let plan = plan_of(SMALL, profiles, sets);
    let cell = plan.cells.iter().find(|cell| cell.stage == "sft").unwrap();
    serde_json::to_string(&*cell.params).unwrap()
}

#[test]
fn profiles_merge_tables_and_replace_the_rest_in_the_order_given() {
    let epochs_and_schedule = |profiles: &[&str]| {
        let plan = plan_of(SMALL, profiles, &[]);
        let cell = plan.cells.iter().find(|cell| cell.stage == "sft").unwrap();
        (cell.params["epochs"].clone(), cell.params["schedule"].to_string())
    };
    assert_eq!(epochs_and_schedule(&[]), (1.into(), r#"{"kind":"cosine","warmup_ratio":0.5}"#.into()));
    assert_eq!(epochs_and_schedule(&["mini"]), (2.into(), r#"{"kind":"cosine","warmup_ratio":0.25}"#.into()));
    assert_eq!(epochs_and_schedule(&["mini", "fast"]), (3.into(), r#""constant""#.into()));
    // A table over what is no table replaces it, and then lacks what it does not say.
    assert!(problems_of(SMALL, &["fast", "mini"], &[]).contains("`schedule` of stage `sft` needs the key `kind`"));
    assert_eq!(plan_of(SMALL, &["mini"], &[]).title, "small");
    assert_eq!(names(&plan_of(SMALL, &["mini"], &[])), ["base[size=3B]", "s1k", "sft[size=3B]", "tiny"]);
}

#[test]
fn a_profile_may_make_a_stage_another_kind_and_then_replaces_its_keys() {
    let plan = plan_of(SMALL, &["other"], &[]);
    assert_eq!(
        wiring(&plan),
        [
            "tiny:",
            "s1k:",
            "base[size=3B]: model=tiny data=s1k",
            "base[size=7B]: model=tiny data=s1k",
            "sft[size=3B]: model=base[size=3B] data=s1k",
            "sft[size=7B]: model=base[size=7B] data=s1k",
        ]
    );
    // `mini` sets a key that only the first kind has.
    assert!(problems_of(SMALL, &["other", "mini"], &[]).contains("unknown key `source` in stage `base`"));
}

#[test]
fn set_takes_toml_and_bare_strings_and_wins() {
    let sets = ["stage.sft.epochs=7", "stage.sft.schedule=cosine", "stage.sft.lora.targets=[\"k_proj\"]"];
    assert_eq!(
        sft(&["mini", "fast"], &sets),
        r#"{"epochs":7,"learning_rate":0.0001,"schedule":"cosine","lora":{"rank":8,"alpha":16.0,"targets":["k_proj"]},"shuffle":true,"seed":0,"micro_batch":1}"#
    );
    let plan = plan_of(
        SMALL,
        &[],
        &[
            "stage.s1k.source=path:/tmp/a b.jsonl",
            "title=new",
            "stage.base.axes.size = [\"0.5B\"]",
            "stage.\"sft\".seed = 3 ",
        ],
    );
    let data = plan.cells.iter().find(|cell| cell.stage == "s1k").unwrap();
    assert_eq!(data.sources[0].text, "path:/tmp/a b.jsonl");
    assert_eq!(plan.title, "new");
    assert_eq!(plan.cells[0].axes.get("size"), Some(&AxisValue::Str("0.5B".into())));
    assert_eq!(plan.cells[2].params["seed"], 3);
    // A date is no TOML that any key takes: it is a bare string.
    assert_eq!(plan_of(SMALL, &[], &["title=2026-01-01"]).title, "2026-01-01");
}

#[test]
fn sources_are_relative_to_where_their_text_stands() {
    let files = [
        (
            "study/m.toml",
            "manifest = 1\ninclude = [\"shared/common.toml\"]\n[profile.p.stage.d]\nsource = \"path:mine.jsonl\"\n",
        ),
        ("study/shared/common.toml", "manifest = 1\n[stage.d]\nkind = \"dataset\"\nsource = \"path:theirs.jsonl\"\n"),
    ];
    let folder = |profiles: &[&str], sets: &[&str]| {
        let plan = plan::resolve(&load(&files, profiles, sets)).expect("valid");
        assert_eq!(plan.cells[0].file, Path::new("study/shared/common.toml"));
        let source = &plan.cells[0].sources[0];
        (source.folder.display().to_string(), source.text.clone())
    };
    assert_eq!(folder(&[], &[]), ("study/shared".into(), "path:theirs.jsonl".into()));
    assert_eq!(folder(&["p"], &[]), ("study".into(), "path:mine.jsonl".into()));
    assert_eq!(folder(&["p"], &["stage.d.source=path:here.jsonl"]), (String::new(), "path:here.jsonl".into()));
}

#[test]
fn a_file_included_on_two_ways_is_there_once_and_before_what_includes_it() {
    let files = [
        (
            "m.toml",
            "manifest = 1\ninclude = [\"a.toml\", \"sub/b.toml\"]\ntitle = \"root\"\n[stage.m]\nkind = \"dataset\"\nconcat = [\"b\", \"a\", \"c\"]\n",
        ),
        (
            "a.toml",
            "manifest = 1\ninclude = [\"c.toml\"]\ntitle = \"a\"\n[stage.a]\nkind = \"dataset\"\nsource = \"path:a\"\n",
        ),
        ("sub/b.toml", "manifest = 1\ninclude = [\"../c.toml\"]\n[stage.b]\nkind = \"dataset\"\nsource = \"path:b\"\n"),
        (
            "c.toml",
            "manifest = 1\n[stage.c]\nkind = \"dataset\"\nsource = \"path:c\"\n[profile.p]\nstage.a.source = \"path:pc\"\n",
        ),
    ];
    let read_paths = |path: &Path| {
        files
            .iter()
            .find(|(name, _)| *name == path.to_str().unwrap() || path.ends_with("sub/../c.toml") && *name == "c.toml")
    };
    let read = |path: &Path| read_paths(path).map(|(_, text)| text.to_string()).ok_or_else(|| io::Error::other("gone"));
    let manifest = manifest::load(Path::new("m.toml"), &read, kinds::KINDS, &["p".to_string()], &[]);
    let plan = plan::resolve(&manifest).unwrap_or_else(|problems| panic!("{}", render(&manifest, &problems)));
    assert_eq!(names(&plan), ["c", "a", "b", "m"]);
    assert_eq!(plan.title, "root");
    assert_eq!(plan.cells[1].sources[0].text, "path:pc", "a profile of an included file counts");
    assert_eq!(manifest.profiles, ["p"]);
}

#[test]
fn a_manifest_that_cannot_be_read_is_one_problem() {
    let read = |_: &Path| Err(io::Error::new(io::ErrorKind::NotFound, "no such file"));
    let manifest = manifest::load(Path::new("gone.toml"), &read, kinds::KINDS, &["p".into()], &["stage.a.b=1".into()]);
    let problems = plan::resolve(&manifest).err().unwrap();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].code, "manifest::unreadable");
}

#[test]
fn includes_without_end_are_stopped() {
    let read = |path: &Path| {
        let n: usize = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        Ok(format!("manifest = 1\ninclude = [\"{}.toml\"]\n", n + 1))
    };
    let manifest = manifest::load(Path::new("0.toml"), &read, kinds::KINDS, &[], &[]);
    let codes: Vec<&str> = manifest.problems.iter().map(|problem| problem.code).collect();
    assert_eq!(codes, ["manifest::include_too_deep"]);
}
