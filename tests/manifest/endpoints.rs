//! `[endpoint.NAME]`, and stages that take one instead of a model; with the real kinds.

use super::*;
use insta::assert_snapshot;
use pipe::plan::{Arithmetic, fingerprint};
use serde_json::json;

const TEXT: &str = r#"manifest = 1
[endpoint.teacher]
url = "https://api.deepseek.com/v1"
model = "deepseek-reasoner"
api_key_env = "DEEPSEEK_API_KEY"

[stage.rows]
kind = "dataset"
source = "path:rows.jsonl"

[stage.made]
kind = "generate"
endpoint = "teacher"
data = "rows"
prompt = "{{ question }}"
max_tokens = 10

[stage.local]
kind = "model"
source = "init:mini-3B"

[profile.api.endpoint.teacher]
url = "http://localhost:8000/v1"
max_concurrency = 64

[profile.local.stage.made]
model = "local"
dtype = "bf16"
"#;

fn manifest(text: &str, profiles: &[&str], sets: &[&str]) -> Manifest {
    load_with(pipe::stage::KINDS, &[("m.toml", text)], profiles, sets)
}

fn told(text: &str) -> String {
    let manifest = manifest(text, &[], &[]);
    match plan::resolve(&manifest) {
        Ok(_) => "no problem".into(),
        Err(problems) => render(&manifest, &problems),
    }
}

fn cell<'p>(plan: &'p Plan, name: &str) -> &'p Cell {
    plan.cells.iter().find(|cell| cell.to_string() == name).unwrap()
}

fn planned(text: &str, profiles: &[&str], sets: &[&str]) -> Plan {
    let manifest = manifest(text, profiles, sets);
    plan::resolve(&manifest).unwrap_or_else(|problems| panic!("{}", render(&manifest, &problems)))
}

fn parts(plan: &Plan, backend: &str) -> std::collections::BTreeMap<String, String> {
    let machine = Arithmetic { backend, dtype: "f32" };
    let input = |id: usize| Some((pipe::digest::Digest::of(b"x"), id.to_string()));
    fingerprint(cell(plan, "made"), machine, input, |_| None).unwrap().parts
}

#[test]
fn a_stage_gets_the_whole_endpoint_with_its_defaults() {
    let plan = planned(TEXT, &[], &["endpoint.teacher.timeout_s=30"]);
    let made = &cell(&plan, "made").params;
    assert_eq!(
        made["endpoint"],
        json!({"url": "https://api.deepseek.com/v1", "model": "deepseek-reasoner", "api_key_env": "DEEPSEEK_API_KEY",
            "max_concurrency": 8, "timeout_s": 30.0, "connect_timeout_s": 15.0, "max_attempts": 6, "send_seed": true,
            "max_tokens_key": "max_tokens"})
    );
    for local in ["model", "format", "prefill", "dtype", "batch", "token_ids", "stop_token_ids", "unmapped_ids"] {
        assert!(!made.contains_key(local), "{local}");
    }
    assert_eq!(made["max_parse_attempts"], 3);
    let endpoint: pipe::remote::Endpoint = serde_json::from_value(made["endpoint"].clone()).unwrap();
    assert_eq!((endpoint.max_concurrency, endpoint.budget), (8, None));
}

#[test]
fn only_the_models_name_is_in_the_fingerprint() {
    let before = parts(&planned(TEXT, &[], &[]), "cpu");
    let about: Vec<(&String, &String)> = before.iter().filter(|(part, _)| part.contains("endpoint")).collect();
    assert_eq!(about, [(&"endpoint.model".to_string(), &"\"deepseek-reasoner\"".to_string())]);
    assert!(!before.contains_key("backend") && !before.contains_key("dtype"), "a server is no backend of ours");
    let elsewhere = ["endpoint.teacher.api_key_env=OTHER", "endpoint.teacher.requests_per_minute=5"];
    assert_eq!(parts(&planned(TEXT, &["api"], &elsewhere), "cuda"), before);
    let other = parts(&planned(TEXT, &[], &["endpoint.teacher.model=deepseek-chat"]), "cpu");
    assert_ne!(other, before);
}

#[test]
fn a_profile_may_put_a_model_in_the_place_of_an_endpoint_and_back() {
    let plan = planned(TEXT, &["local"], &[]);
    let made = cell(&plan, "made");
    assert!(!made.params.contains_key("endpoint") && !made.params.contains_key("max_parse_attempts"));
    assert_eq!((&made.params["dtype"], &made.params["format"]), (&json!("bf16"), &json!("chat")));
    assert_eq!(made.inputs[0].slot, "model");
    // `dtype` went with the model, and goes with it.
    let plan = planned(TEXT, &["local"], &["stage.made.endpoint=teacher"]);
    assert!(!cell(&plan, "made").params.contains_key("dtype"));
    assert_eq!(wiring(&plan).iter().find(|line| line.starts_with("made")).unwrap(), "made: data=rows");
}

#[test]
fn an_axis_may_name_endpoints() {
    let text =
        TEXT.replace("endpoint = \"teacher\"", "axes = { who = [\"teacher\", \"small\"] }\nendpoint = \"{who}\"");
    let text = format!("{text}[endpoint.small]\nurl = \"http://h/v1\"\nmodel = \"small\"\n");
    let plan = planned(&text, &[], &[]);
    assert_eq!(cell(&plan, "made[who=small]").params["endpoint"]["model"], "small");
    assert_eq!(cell(&plan, "made[who=teacher]").params["endpoint"]["model"], "deepseek-reasoner");
    assert_snapshot!(told(&text.replace("\"small\"] }", "\"smal\"] }")), @r#"
error[manifest::unknown_endpoint]: `endpoint` of stage `made` names `smal`, and there is no such endpoint
  m.toml:14 "\"{who}\""
  note: `{who}` comes to `smal` here
  help: an endpoint with a similar name exists: `small`
"#);
}

#[test]
fn a_stage_has_a_model_or_an_endpoint() {
    assert_snapshot!(told(&TEXT.replace("endpoint = \"teacher\"\n", "")), @r#"
error[manifest::missing_key]: stage `made` needs `model` or `endpoint`
  m.toml:11 "[stage.made]"
  note: `model`: The model that completes, on this machine.
  note: `endpoint`: The server that completes: an `[endpoint.NAME]`.
"#);
    assert_snapshot!(told(&TEXT.replace("endpoint = \"teacher\"\n", "endpoint = \"teacher\"\nmodel = \"local\"\n")), @r#"
error[manifest::one_of_two]: stage `made` has both `model` and `endpoint`
  m.toml:14 "model"
  m.toml:13 "endpoint"
  help: keep one of the two
"#);
    assert_snapshot!(told(&TEXT.replace("endpoint = \"teacher\"", "endpoint = \"techer\"")), @r#"
error[manifest::unknown_endpoint]: `endpoint` of stage `made` names `techer`, and there is no such endpoint
  m.toml:13 "\"techer\""
  help: an endpoint with a similar name exists: `teacher`
"#);
    assert_snapshot!(told(&TEXT.replace("endpoint = \"teacher\"", "endpoint = 3")), @r#"
error[manifest::wrong_type]: `endpoint` of stage `made` takes the name of an endpoint, not a whole number
  m.toml:13 "3"
"#);
}

#[test]
fn keys_that_mean_nothing_to_an_endpoint_are_refused() {
    let with = |line: &str| told(&TEXT.replace("max_tokens = 10", &format!("max_tokens = 10\n{line}")));
    assert_snapshot!(with("dtype = \"f32\"\nprefill = \"<think>\""), @r#"
error[manifest::key_without_effect]: `dtype` of stage `made` goes with `model`, and the stage has `endpoint`
  m.toml:17 "dtype"
  help: take it out
error[manifest::key_without_effect]: `prefill` of stage `made` goes with `model`, and the stage has `endpoint`
  m.toml:18 "prefill"
  help: take it out
"#);
    for line in [
        "format = \"chat\"",
        "batch = 1",
        "token_ids = \"ids\"",
        "stop_token_ids = []",
        "ignore_eos = false",
        "unmapped_ids = true",
    ] {
        assert!(with(line).contains("goes with `model`, and the stage has `endpoint`"), "{line}");
    }
    let local = TEXT.replace("endpoint = \"teacher\"", "model = \"local\"\nmax_parse_attempts = 2");
    assert!(
        told(&local).contains("`max_parse_attempts` of stage `made` goes with `endpoint`, and the stage has `model`")
    );
}

#[test]
fn what_is_wrong_with_an_endpoint_is_told_key_by_key() {
    let with = |lines: &str| told(&TEXT.replace("model = \"deepseek-reasoner\"", lines));
    assert_snapshot!(with("modle = \"m\"\nmax_concurrency = 0\ntimeout_s = \"1\""), @r#"
error[manifest::missing_key]: endpoint `teacher` needs the key `model`
  m.toml:2 "[endpoint.teacher]"
  note: `model`: The model's name there.
error[manifest::unknown_key]: unknown key `modle` in endpoint `teacher`
  m.toml:4 "modle"
  note: keys of an endpoint: api_key_env, budget, connect_timeout_s, max_attempts, max_concurrency, max_tokens_key, model, price_in, price_out, requests_per_minute, send_seed, timeout_s, tokens_per_minute, url
  help: a key with a similar name exists: `model`
error[manifest::out_of_range]: `max_concurrency` of endpoint `teacher` has to be at least 1 and at most 1024, not 0
  m.toml:5 "0"
error[manifest::wrong_type]: `timeout_s` of endpoint `teacher` takes a number, not a string
  m.toml:6 "\"1\""
  help: without quotes: `1`
"#);
    assert_snapshot!(with("model = \"m\"\nbudget = 3"), @r#"
error[manifest::rule]: endpoint `teacher`: a `budget` needs prices: what nothing costs nothing can pass
  m.toml:5 "budget"
  help: `price_in` and `price_out`, for a million tokens
"#);
    assert_snapshot!(with("model = \"m\"\nprice_in = 3"), @r#"
error[manifest::rule]: endpoint `teacher`: `price_in` without `price_out` says nothing about what a request costs
  m.toml:5 "price_in"
  help: `price_out = 0` if it is free
"#);
    assert_snapshot!(with("model = \"{size}\""), @r#"
error[plan::unknown_axis]: `model` of endpoint `teacher` uses axis `size`, and an endpoint has none
  m.toml:4 "\"{size}\""
  help: declare an endpoint for each, and name them by an axis: `endpoint = "{teacher}"`
"#);
    assert_snapshot!(told(&TEXT.replace("https://api.deepseek.com/v1", "api.deepseek.com")), @r#"
error[manifest::rule]: endpoint `teacher`: `url` is not the address of a server
  m.toml:3 "url"
  help: the base of the API: `url = "https://HOST/v1"`, `url = "http://localhost:8000/v1"`
"#);
    assert_snapshot!(told(&TEXT.replace("deepseek.com/v1", "deepseek.com/v1/chat/completions")), @r#"
error[manifest::rule]: endpoint `teacher`: `url` is the base of the API, without `/chat/completions`
  m.toml:3 "url"
  help: `url = "https://api.deepseek.com/v1"`
"#);
}

/// The excerpt under a message shows the line it points at.
#[test]
fn a_key_that_was_written_down_is_not_shown() {
    for text in [
        TEXT.replace("DEEPSEEK_API_KEY", "sk-abcdef-123456"),
        TEXT.replace("https://api", "https://user:sk-abcdef-123456@api"),
        TEXT.replace("com/v1", "com/v1?key=sk-abcdef-123456"),
    ] {
        let told = told(&text);
        assert!(told.contains("manifest::rule") && !told.contains("sk-abcdef"), "{told}");
        assert!(told.contains("m.toml:2 \"[endpoint.teacher]\""), "{told}");
    }
}

#[test]
fn profiles_settings_and_includes_touch_endpoints_that_are_there() {
    let more = format!(
        "{TEXT}\n[profile.x.endpoint.techer]\nurl = \"http://h\"\n[profile.y.endpoint.teacher]\nurll = \"x\"\n"
    );
    assert_snapshot!(told(&more), @r#"
error[manifest::profile_touches_nothing]: profile `x` changes endpoint `techer`, which does not exist
  m.toml:30 "[profile.x.endpoint.techer]"
  help: an endpoint with a similar name exists: `teacher`
error[manifest::profile_touches_nothing]: profile `y` sets `urll` in endpoint `teacher`, and there is no such key
  m.toml:33 "urll"
  note: keys of an endpoint: api_key_env, budget, connect_timeout_s, max_attempts, max_concurrency, max_tokens_key, model, price_in, price_out, requests_per_minute, send_seed, timeout_s, tokens_per_minute, url
  help: a key with a similar name exists: `url`
"#);
    let set = manifest(TEXT, &[], &["endpoint.nobody.url=x", "endpoint.teacher=3", "endpoint.teacher.budgt=3"]);
    assert_snapshot!(render(&set, &plan::resolve(&set).err().unwrap()), @r#"
error[manifest::set_touches_nothing]: `--set` names endpoint `nobody`, which does not exist
  --set:1 "nobody"
  note: endpoints: `teacher`
error[manifest::bad_set]: `--set endpoint.teacher=3` replaces a whole endpoint
  --set:2 "endpoint.teacher=3"
  help: name one of its keys: `--set endpoint.teacher.KEY=VALUE`
error[manifest::set_touches_nothing]: `--set` names `budgt` in endpoint `teacher`, and there is no such key
  --set:3 "budgt"
  note: keys of an endpoint: api_key_env, budget, connect_timeout_s, max_attempts, max_concurrency, max_tokens_key, model, price_in, price_out, requests_per_minute, send_seed, timeout_s, tokens_per_minute, url
  help: a key with a similar name exists: `budget`
"#);
    let twice = [
        ("m.toml", "manifest = 1\ninclude = [\"n.toml\"]\n[endpoint.a]\nurl = \"http://h\"\nmodel = \"m\"\n"),
        ("n.toml", "manifest = 1\n[endpoint.a]\nurl = \"http://h\"\nmodel = \"m\"\n"),
    ];
    let twice = load_with(pipe::stage::KINDS, &twice, &[], &[]);
    assert_snapshot!(render(&twice, &plan::resolve(&twice).err().unwrap()), @r#"
error[manifest::duplicate_endpoint]: endpoint `a` is declared twice
  m.toml:3 "[endpoint.a]"  # declared again
  n.toml:2 "[endpoint.a]"  # first declared
  help: rename one of the two, or change the other's keys by a profile
"#);
}

#[test]
fn every_key_of_an_endpoint_is_one_the_client_reads() {
    use pipe::manifest::spec::Type;
    let mut all = serde_json::Map::new();
    for key in pipe::manifest::endpoint::ENDPOINT {
        let value = match key.ty {
            Type::Bool => json!(true),
            Type::Int { .. } => json!(2),
            Type::Float { .. } => json!(2.5),
            _ => json!("text"),
        };
        all.insert(key.name.into(), value);
    }
    let endpoint: pipe::remote::Endpoint = serde_json::from_value(json!(all)).expect("each key is a field");
    assert_eq!(serde_json::to_value(&endpoint).unwrap(), json!(all), "each field is a key");
}

const JUDGED: &str = r#"manifest = 1
[endpoint.referee]
url = "http://h/v1"
model = "small"

[stage.task]
kind = "dataset"
source = "path:rows.jsonl"

[stage.local]
kind = "model"
source = "init:mini-3B"

[stage.made]
kind = "eval"
endpoint = "referee"
task = "task"
max_tokens = 10
judge = { endpoint = "referee", max_attempts = 2 }

[profile.local.stage.made.judge]
model = "local"
dtype = "bf16"
"#;

#[test]
fn a_table_may_take_an_endpoint_or_a_model_and_a_profile_the_other() {
    let plan = planned(JUDGED, &[], &[]);
    assert_eq!(wiring(&plan).iter().find(|line| line.starts_with("made")).unwrap(), "made: task=task");
    let before = parts(&plan, "cpu");
    assert_eq!(before["judge.endpoint.model"], "\"small\"");
    assert!(!before.contains_key("judge.dtype") && !before.contains_key("backend"));
    let plan = planned(JUDGED, &["local"], &[]);
    let judge = &cell(&plan, "made").params["judge"];
    assert!(judge.get("endpoint").is_none() && judge.get("max_attempts").is_none() && judge["dtype"] == "bf16");
    assert_eq!(
        wiring(&plan).iter().find(|line| line.starts_with("made")).unwrap(),
        "made: task=task judge.model=local"
    );
    assert_eq!(parts(&plan, "cuda")["backend"], "cuda", "a judge on this machine makes floats");
    let plan = planned(JUDGED, &["local"], &["stage.made.judge.endpoint=referee"]);
    assert!(cell(&plan, "made").params["judge"].get("dtype").is_none());
}

#[test]
fn what_is_wrong_in_a_table_is_said_of_the_table() {
    let judge = "judge = { endpoint = \"referee\", max_attempts = 2 }";
    assert_snapshot!(told(&JUDGED.replace(judge, "judge = { max_tokens = 9 }")), @r#"
error[manifest::missing_key]: `judge` of stage `made` needs `model` or `endpoint`
  m.toml:19 "{ max_tokens = 9 }"
  note: `model`: The model that judges, on this machine.
  note: `endpoint`: The server that judges: an `[endpoint.NAME]`.
"#);
    assert_snapshot!(told(&JUDGED.replace(judge, "judge = { endpoint = \"referee\", model = \"local\" }")), @r#"
error[manifest::one_of_two]: `judge` of stage `made` has both `model` and `endpoint`
  m.toml:19 "model"
  m.toml:19 "endpoint"
  help: keep one of the two
"#);
    assert_snapshot!(told(&JUDGED.replace(judge, "judge = { endpoint = \"referee\", dtype = \"bf16\" }")), @r#"
error[manifest::key_without_effect]: `judge.dtype` of stage `made` goes with `model`, and `judge` has `endpoint`
  m.toml:19 "dtype"
  help: take it out
"#);
    assert_snapshot!(told(&JUDGED.replace(judge, "judge = { endpoint = \"refere\" }")), @r#"
error[manifest::unknown_endpoint]: `judge.endpoint` of stage `made` names `refere`, and there is no such endpoint
  m.toml:19 "\"refere\""
  help: an endpoint with a similar name exists: `referee`
"#);
    assert_snapshot!(told(&JUDGED.replace(judge, "judge = { model = \"locl\" }")), @r#"
error[plan::missing_stage]: `judge.model` of stage `made` names `locl`, and there is no such stage
  m.toml:19 "\"locl\""
  help: a stage with a similar name exists: `local`
"#);
    assert_snapshot!(told(&JUDGED.replace(judge, "judge = { model = \"task\" }")), @r#"
error[plan::wrong_artifact]: `judge.model` of stage `made` takes a model, and `task` yields a dataset
  m.toml:19 "\"task\""
  note: `task` is of kind `dataset`
  help: stages that fit: `local`
"#);
}
