//! `[task.NAME]`: a benchmark as data, beneath the keys of the stages that name it; with the real kinds.

use super::*;
use insta::assert_snapshot;
use pipe::manifest::spec::{ArtifactType, Key, Type, no_lineage, no_rules};
use pipe::manifest::task;
use pipe::plan::{Arithmetic, fingerprint};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const TEXT: &str = r#"manifest = 1
[stage.base]
kind = "model"
source = "init:mini-3B"

[stage.rows]
kind = "dataset"
source = "path:rows.jsonl"

[stage.other]
kind = "dataset"
source = "path:other.jsonl"

[task.sums]
data = "rows"
prompt = "Add: {{ question }}"
grader = "numeric"
max_tokens = 100
stop = ["\n"]

[task.words]
data = "other"
prompt_file = "ask.txt"
max_tokens = 200
temperature = 0.7
n = 4

[stage.eval]
kind = "eval"
axes = { task = ["sums", "words"] }
model = "base"
task = "{task}"
seed = 7

[profile.short.task.words]
n = 1
prompt = "Say: {{ question }}"
"#;

fn manifest(text: &str, profiles: &[&str], sets: &[&str]) -> Manifest {
    load_with(pipe::stage::KINDS, &[("m.toml", text)], profiles, sets)
}

fn told_with(text: &str, profiles: &[&str], sets: &[&str]) -> String {
    let manifest = manifest(text, profiles, sets);
    match plan::resolve(&manifest) {
        Ok(_) => "no problem".into(),
        // Which keys there are is the matter of another test.
        Err(problems) => {
            let keys = |line: &str| match line.split_once("keys of a task: ") {
                Some((before, _)) => format!("{before}keys of a task: [KEYS]\n"),
                None => format!("{line}\n"),
            };
            render(&manifest, &problems).lines().map(keys).collect()
        }
    }
}

fn told(text: &str) -> String {
    told_with(text, &[], &[])
}

fn planned(text: &str, profiles: &[&str], sets: &[&str]) -> Plan {
    let manifest = manifest(text, profiles, sets);
    plan::resolve(&manifest).unwrap_or_else(|problems| panic!("{}", render(&manifest, &problems)))
}

fn cell<'p>(plan: &'p Plan, name: &str) -> &'p Cell {
    plan.cells.iter().find(|cell| cell.to_string() == name).unwrap()
}

fn parts(plan: &Plan, name: &str) -> BTreeMap<String, String> {
    let machine = Arithmetic { backend: "cpu", dtype: "f32" };
    let digest = || Some(pipe::digest::Digest::of(b"x"));
    fingerprint(cell(plan, name), machine, |_| Some((digest()?, String::new())), |_| digest()).unwrap().parts
}

#[test]
fn the_keys_of_a_task_lie_beneath_those_of_the_stage_that_names_it() {
    let plan = planned(TEXT, &[], &[]);
    let sums = cell(&plan, "eval[task=sums]");
    let of = |key: &str| sums.params.get(key).cloned().unwrap_or(Value::Null);
    assert_eq!(of("prompt"), "Add: {{ question }}");
    assert_eq!((of("grader"), of("max_tokens"), of("stop")), (json!("numeric"), json!(100), json!(["\n"])));
    assert_eq!((of("seed"), of("temperature"), of("n")), (json!(7), json!(0.0), json!(1)), "the stage's, and defaults");
    assert!(!sums.params.contains_key("task") && !sums.params.contains_key("data"));
    assert_eq!(
        wiring(&plan)[3..],
        ["eval[task=sums]: model=base task=rows", "eval[task=words]: model=base task=other"]
    );
    let words = cell(&plan, "eval[task=words]");
    assert_eq!((&words.params["n"], &words.params["temperature"]), (&json!(4), &json!(0.7)));
    let sources: Vec<(&str, &str)> = words.sources.iter().map(|s| (s.key.as_str(), s.text.as_str())).collect();
    assert_eq!(sources, [("prompt_file", "path:ask.txt")]);
    // The stage's own key wins, for every task; and of two that say the same, so does the one it has.
    let plan = planned(TEXT, &[], &["stage.eval.max_tokens=5", "stage.eval.prompt=Own: {{ question }}"]);
    for name in ["eval[task=sums]", "eval[task=words]"] {
        let params = &cell(&plan, name).params;
        assert_eq!((&params["max_tokens"], &params["prompt"]), (&json!(5), &json!("Own: {{ question }}")));
        assert!(!params.contains_key("prompt_file") && cell(&plan, name).sources.is_empty());
    }
}

#[test]
fn a_task_is_in_the_fingerprint_by_what_it_says_and_not_by_its_name() {
    let before = parts(&planned(TEXT, &[], &[]), "eval[task=sums]");
    let renamed = TEXT.replace("sums", "plus").replace("[task.plus]", "[task.plus] # add\n# up");
    assert_eq!(parts(&planned(&renamed, &[], &[]), "eval[task=plus]"), before);
    // Written out in the stage, on the dataset itself, it is the same computation.
    let written =
        TEXT.replace("axes = { task = [\"sums\", \"words\"] }", "").replace("task = \"{task}\"", "task = \"rows\"");
    let keys = "prompt = \"Add: {{ question }}\"\ngrader = \"numeric\"\nmax_tokens = 100\nstop = [\"\\n\"]";
    let written = written.replace("seed = 7", &format!("seed = 7\n{keys}"));
    assert_eq!(parts(&planned(&written, &[], &[]), "eval"), before);
    let after = parts(&planned(TEXT, &[], &["task.sums.prompt=Plus: {{ question }}"]), "eval[task=sums]");
    let differ: Vec<_> = before.iter().filter(|(part, value)| after.get(*part) != Some(value)).collect();
    assert_eq!(differ, [(&"prompt".to_string(), &"\"Add: {{ question }}\"".to_string())]);
}

#[test]
fn profiles_and_set_change_a_task_as_they_change_a_stage() {
    let plan = planned(TEXT, &["short"], &["task.sums.limit=10"]);
    let words = cell(&plan, "eval[task=words]");
    assert_eq!((&words.params["n"], &words.params["prompt"]), (&json!(1), &json!("Say: {{ question }}")));
    assert!(words.sources.is_empty(), "the prompt of the profile takes the place of the file");
    assert_eq!(cell(&plan, "eval[task=sums]").params["limit"], 10);
    assert_snapshot!(told_with(TEXT, &[], &["task.sum.limit=10", "task.sums.limt=10", "task.sums=1", "task.sums.n=0"]), @r#"
error[manifest::set_touches_nothing]: `--set` names task `sum`, which does not exist
  --set:1 "sum"
  help: a task with a similar name exists: `sums`
error[manifest::set_touches_nothing]: `--set` names `limt` in task `sums`, and there is no such key
  --set:2 "limt"
  note: keys of a task: [KEYS]
  help: a key with a similar name exists: `limit`
error[manifest::bad_set]: `--set task.sums=1` replaces a whole task
  --set:3 "task.sums=1"
  help: name one of its keys: `--set task.sums.KEY=VALUE`
error[manifest::out_of_range]: `n` of task `sums` has to be at least 1 and at most 100000, not 0
  --set:4 "0"
    "#);
    let profile = format!("{TEXT}\n[profile.p.task.wrods]\nn = 2\n[profile.p.task.sums]\nmodel = \"base\"\n");
    assert_snapshot!(told(&profile), @r#"
error[manifest::profile_touches_nothing]: profile `p` changes task `wrods`, which does not exist
  m.toml:39 "[profile.p.task.wrods]"
  help: a task with a similar name exists: `words`
error[manifest::profile_touches_nothing]: profile `p` sets `model` in task `sums`, and there is no such key
  m.toml:42 "model"
  note: keys of a task: [KEYS]
    "#);
}

#[test]
fn axes_of_the_stage_stand_in_the_strings_of_its_task() {
    let text = TEXT.replace("axes = { task", "axes = { mood = [\"kindly\", \"at once\"], task");
    let text = text.replace("\"Add: ", "\"Add {mood}: ");
    let plan = planned(&text, &[], &[]);
    assert_eq!(cell(&plan, "eval[mood=at once,task=sums]").params["prompt"], "Add at once: {{ question }}");
    assert!(!cell(&plan, "eval[mood=kindly,task=words]").params.contains_key("prompt"));
    // And those of its data come along.
    let text = TEXT.replace("source = \"path:rows.jsonl\"", "axes = { year = [1, 2] }\nsource = \"path:{year}.jsonl\"");
    let plan = planned(&text, &[], &[]);
    assert_eq!(names(&plan).iter().filter(|name| name.starts_with("eval[")).count(), 3, "{:?}", names(&plan));
    let fixed =
        text.replace("task = \"{task}\"", "task = \"sums[year=2]\"").replace("task = [\"sums\", \"words\"]", "x = [1]");
    assert_eq!(wiring(&planned(&fixed, &[], &[])).last().unwrap(), "eval[x=1]: model=base task=rows[year=2]");
    assert_snapshot!(told(&TEXT.replace("data = \"rows\"", "data = \"{task}\"")), @r#"
error[plan::unknown_axis]: `data` of task `sums` uses axis `task`, and a task has none
  m.toml:15 "\"{task}\""
  help: name the stage; the axes it has come along with it
    "#);
}

#[test]
fn every_problem_of_a_task_is_told_where_it_is_written() {
    let text = TEXT
        .replace("data = \"rows\"", "data = \"rwos\"")
        .replace("grader = \"numeric\"", "grader = \"numerical\"\nbatch = 4\npromt = \"x\"")
        .replace("data = \"other\"", "max_toknes = 1")
        .replace("temperature = 0.7", "temperature = \"warm\"");
    assert_snapshot!(told(&text), @r#"
error[plan::missing_stage]: `data` of task `sums` names `rwos`, and there is no such stage
  m.toml:15 "\"rwos\""
  help: a stage with a similar name exists: `rows`
error[manifest::unknown_choice]: `grader` of task `sums` cannot be `numerical`
  m.toml:17 "\"numerical\""
  note: it takes one of `auto`, `math`, `numeric`, `choice`, `s1`
  help: a similar one exists: `numeric`
error[manifest::unknown_key]: unknown key `batch` in task `sums`
  m.toml:18 "batch"
  note: keys of a task: [KEYS]
error[manifest::unknown_key]: unknown key `promt` in task `sums`
  m.toml:19 "promt"
  note: keys of a task: [KEYS]
  help: a key with a similar name exists: `prompt`
error[manifest::missing_key]: task `words` needs the key `data`
  m.toml:23 "[task.words]"
  note: `data`: The dataset stage of the problems.
error[manifest::unknown_key]: unknown key `max_toknes` in task `words`
  m.toml:24 "max_toknes"
  note: keys of a task: [KEYS]
  help: a key with a similar name exists: `max_tokens`
error[manifest::wrong_type]: `temperature` of task `words` takes a number, not a string
  m.toml:27 "\"warm\""
    "#);
    let text = "manifest = 1\n[task.a]\n[task.b]\ndata = \"a\"\n[task.\"c d\"]\n[profile.p]\ntask = 4\n";
    assert_snapshot!(told(text), @r#"
error[manifest::missing_key]: task `a` needs the key `data`
  m.toml:2 "[task.a]"
  note: `data`: The dataset stage of the problems.
error[plan::missing_stage]: `data` of task `b` names `a`, and there is no such stage
  m.toml:4 "\"a\""
  note: `a` is a task, and its problems are a stage of their own
error[manifest::bad_name]: `c d` cannot name a task
  m.toml:5 "[task.\"c d\"]"
  help: use letters, digits, `_` and `-`
error[manifest::wrong_type]: `task` takes tables, not a whole number
  m.toml:7 "4"
    "#);
}

#[test]
fn rules_between_keys_of_stage_and_task_point_at_the_one_that_is_written() {
    // Four samples are the task's; that they are greedy is the stage's.
    assert_snapshot!(told(&TEXT.replace("seed = 7", "temperature = 0.0")), @r#"
error[manifest::rule]: stage `eval`: 4 samples at temperature 0 are 4 times the same
  m.toml:26 "n"
  help: `temperature = 1.0`, or `n = 1`
    "#);
    assert_snapshot!(told(&TEXT.replace("grader = \"numeric\"", "choices = [\"only\"]")), @r#"
error[manifest::rule]: stage `eval`: a choice is between 2 and 26 fields
  m.toml:17 "choices"
  help: name the fields, the right answer first
    "#);
    assert_snapshot!(told(&TEXT.replace("grader = \"numeric\"", "prompt_file = \"x\"")), @r#"
error[manifest::one_of_two]: task `sums` has both `prompt` and `prompt_file`
  m.toml:16 "prompt"
  m.toml:17 "prompt_file"
  help: keep one of the two
    "#);
}

#[test]
fn what_neither_the_task_nor_the_stage_gives_is_missing_for_that_task_alone() {
    assert_snapshot!(told(&TEXT.replace("max_tokens = 200\n", "")), @r#"
error[manifest::missing_key]: stage `eval` needs the key `max_tokens`
  m.toml:27 "[stage.eval]"
  note: `max_tokens`: Longest completion, in tokens, thinking included; with `thinking`, of what follows it. With the prompt it has to fit the model's context.
  note: task `words` does not give it either
    "#);
    // A dataset of its own has no task to wait for.
    let own = TEXT.replace("task = [\"sums\", \"words\"]", "task = [\"sums\", \"rows\"]");
    assert_snapshot!(told(&own), @r#"
error[manifest::missing_key]: stage `eval` needs the key `max_tokens`
  m.toml:28 "[stage.eval]"
  note: `max_tokens`: Longest completion, in tokens, thinking included; with `thinking`, of what follows it. With the prompt it has to fit the model's context.
    "#);
    assert_eq!(told(&own.replace("seed = 7", "max_tokens = 7")), "no problem");
}

#[test]
fn a_name_that_is_nothing_has_a_neighbour_among_tasks_and_datasets() {
    assert_snapshot!(told(&TEXT.replace("[\"sums\", \"words\"]", "[\"sum\", \"othr\", \"gsm8k\", \"nothing\"]")), @r#"
error[plan::missing_stage]: `task` of stage `eval` names `sum`, and there is no such task or stage
  m.toml:32 "\"{task}\""
  note: `{task}` comes to `sum` here
  help: a task with a similar name exists: `sums`
error[plan::missing_stage]: `task` of stage `eval` names `othr`, and there is no such task or stage
  m.toml:32 "\"{task}\""
  note: `{task}` comes to `othr` here
  help: a stage with a similar name exists: `other`
error[plan::missing_stage]: `task` of stage `eval` names `gsm8k`, and there is no such task or stage
  m.toml:32 "\"{task}\""
  note: tasks: `sums`, `words`
  note: stages that fit: `rows`, `other`
  note: `{task}` comes to `gsm8k` here
  help: it comes with the program: `include = ["task:gsm8k"]`
error[plan::missing_stage]: `task` of stage `eval` names `nothing`, and there is no such task or stage
  m.toml:32 "\"{task}\""
  note: tasks: `sums`, `words`
  note: stages that fit: `rows`, `other`
  note: `{task}` comes to `nothing` here
    "#);
    // Every model yields no problems.
    assert_snapshot!(told(&TEXT.replace("data = \"other\"", "data = \"base\"")), @r#"
error[plan::wrong_artifact]: `data` of task `words` takes a dataset, and `base` yields a model
  m.toml:22 "\"base\""
  note: `base` is of kind `model`
  help: stages that fit: `rows`, `other`
    "#);
}

#[test]
fn a_task_and_a_stage_of_one_name_are_one_too_many() {
    let text = TEXT.replace("[stage.other]", "[stage.sums]").replace("data = \"other\"", "data = \"rows\"");
    assert_snapshot!(told(&text), @r#"
error[manifest::shared_name]: `sums` is the name of a task and of a stage
  m.toml:14 "[task.sums]"  # the task
  m.toml:10 "[stage.sums]"  # the stage
  help: rename one of the two, for instance the stage to `sums-problems`
    "#);
}

#[test]
fn a_cycle_through_a_task_names_it() {
    static MADE: pipe::manifest::spec::Kind = pipe::manifest::spec::Kind {
        name: "made",
        about: "problems made of answers",
        recipe: 1,
        yields: ArtifactType::Dataset,
        keys: &[Key::required("task", Type::Task(&[ArtifactType::Dataset]), "What is answered.")],
        floats: false,
        lineage: no_lineage,
        rules: no_rules,
    };
    static KINDS: &[&Kind] = &[&MADE];
    let text = "manifest = 1\n[stage.one]\nkind = \"made\"\ntask = \"round\"\n[stage.two]\nkind = \"made\"\ntask = \"one\"\n[task.round]\ndata = \"two\"\n";
    let manifest = load_with(KINDS, &[("m.toml", text)], &[], &[]);
    assert_snapshot!(render(&manifest, &plan::resolve(&manifest).err().expect("a cycle")), @r#"
error[plan::cycle]: two stages wait for each other: one -> two -> one
  m.toml:4 "\"round\""  # one needs two through task round
  m.toml:7 "\"one\""  # two needs one
  help: one of these two inputs has to come from elsewhere
    "#);
}

#[test]
fn the_task_files_that_come_with_the_program_need_nothing_beside_a_model() {
    let names: Vec<&str> = task::SHIPPED.iter().map(|(name, _)| *name).collect();
    let include: Vec<String> = names.iter().map(|name| format!("\"task:{name}\"")).collect();
    // The file of the mini study has three.
    let tasks = names.iter().map(|name| if *name == "mini" { "mini-aime24" } else { *name });
    let tasks: Vec<String> = tasks.map(|name| format!("\"{name}\"")).collect();
    let text = format!(
        "manifest = 1\ninclude = [{}, \"task:gsm8k\"]\n[stage.base]\nkind = \"model\"\nsource = \"init:mini-3B\"\n\
         [stage.eval]\nkind = \"eval\"\naxes = {{ task = [{}] }}\nmodel = \"base\"\ntask = \"{{task}}\"\n",
        include.join(", "),
        tasks.join(", ")
    );
    let read = |path: &Path| match path == Path::new("deep/m.toml") {
        true => Ok(text.clone()),
        false => Err(io::Error::new(io::ErrorKind::NotFound, "not found")),
    };
    let manifest =
        manifest::load(Path::new("deep/m.toml"), &read, pipe::stage::KINDS, &[], &["task.aime24.limit=3".into()]);
    let plan = plan::resolve(&manifest).unwrap_or_else(|problems| panic!("{}", render(&manifest, &problems)));
    let of = |task: &str| &cell(&plan, &format!("eval[task={task}]")).params;
    assert_eq!((&of("aime24")["max_tokens"], &of("aime24")["limit"]), (&json!(20000), &json!(3)));
    assert_eq!(of("gpqa-diamond")["choices"][0], "Correct Answer");
    assert_eq!(of("gsm8k")["grader"], "numeric");
    // A file of the user's lies where the manifest that includes the task is.
    let source = &cell(&plan, "gpqa-diamond-problems").sources[0];
    assert_eq!((source.text.as_str(), source.folder.as_path()), ("path:gpqa-diamond.csv", Path::new("deep")));
    // What is in the program is what lies beside the other manifests.
    for (name, text) in task::SHIPPED {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("pipelines/tasks/{name}.toml"));
        assert_eq!(std::fs::read_to_string(path).unwrap(), *text);
    }
    assert_snapshot!(told("manifest = 1\ninclude = [\"task:aime25\", \"task:\"]\n"), @r#"
error[manifest::unknown_task]: no task file `aime25` comes with the program
  m.toml:2 "\"task:aime25\""
  note: task files that come with it: `aime24`, `math500`, `gpqa-diamond`, `gsm8k`, `mini`
  help: one with a similar name does: `task:aime24`
error[manifest::unknown_task]: no task file `` comes with the program
  m.toml:2 "\"task:\""
  note: task files that come with it: `aime24`, `math500`, `gpqa-diamond`, `gsm8k`, `mini`
    "#);
}

#[test]
fn the_schema_knows_a_task_by_the_marks_on_the_keys_of_eval() {
    let schema = plan::schema(pipe::stage::KINDS);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let valid =
        |text: &str| validator.is_valid(&serde_json::to_value(toml::from_str::<toml::Value>(text).unwrap()).unwrap());
    assert!(valid(TEXT));
    for (right, wrong) in [
        ("data = \"rows\"\n", ""),
        ("grader = \"numeric\"", "grader = \"numerical\""),
        ("max_tokens = 100", "max_tokns = 100"),
        ("max_tokens = 100", "model = \"base\""),
        ("max_tokens = 100", "prompt_file = \"x\""),
        ("n = 1\n", "m = 1\n"),
    ] {
        assert!(!valid(&TEXT.replace(right, wrong)), "{wrong}");
    }
    let marked: Vec<&str> = task::keys(pipe::stage::KINDS).map(|key| key.name).collect();
    for key in ["prompt", "prompt_file", "choices", "grader", "n", "max_tokens", "limit"] {
        assert!(marked.contains(&key), "{key}");
    }
    for key in ["model", "task", "dtype", "batch"] {
        assert!(!marked.contains(&key), "{key}");
    }
    let properties = schema["definitions"]["task"]["properties"].as_object().unwrap();
    assert_eq!(properties.len(), marked.len() + 1);
}
