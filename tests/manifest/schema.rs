//! The JSON Schema says the same as validation, as far as one can without looking at other stages.

use super::*;
use serde_json::Value;

fn valid(schema: &Value, text: &str) -> Result<(), String> {
    let value: toml::Value = toml::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let json = serde_json::to_value(value).unwrap();
    let validator = jsonschema::validator_for(schema).expect("the schema itself is valid");
    let errors: Vec<String> =
        validator.iter_errors(&json).map(|error| format!("{}: {error}", error.instance_path())).collect();
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

#[test]
fn what_validates_fits_the_schema() {
    let schema = plan::schema(kinds::KINDS);
    let text = format!("manifest = 1\n{}", planning::PAPER);
    assert_eq!(valid(&schema, &text), Ok(()));
    let more = r#"
manifest = 1
include = ["x.toml"]
[stage.s]
kind = "sft"
description = "d"
axes = { seed = [0, 1], rate = [1e-4], on = [true], word = ["sine"] }
model = "m[size=3B]"
data = "{data}"
seed = "{seed}"
learning_rate = "{rate}"
shuffle = "{on}"
schedule = "co{word}"
[stage.d]
kind = "dataset"
concat = "a"
filter = { a = true, b = "x", c = 2 }
[profile.p.stage.s]
lora.rank = 2
schedule.warmup_ratio = 0.5
"#;
    assert_eq!(valid(&schema, more), Ok(()));
}

#[test]
fn what_does_not_validate_is_told_key_by_key() {
    let schema = plan::schema(kinds::KINDS);
    let told = |text: &str| valid(&schema, &format!("manifest = 1\n{text}")).unwrap_err();
    let stage = "[stage.s]\nkind = \"sft\"\nmodel = \"m\"\ndata = \"d\"\n";
    assert!(told(&format!("{stage}lerning_rate = 1\n")).contains("lerning_rate"));
    for wrong in [
        "epochs = 0",
        "epochs = \"1{x}\"",
        "learning_rate = 0",
        "schedule = \"cosin\"",
        "lora = {}",
        "axes = { a = [] }",
    ] {
        assert!(told(&format!("{stage}{wrong}\n")).contains("/stage/s"), "{wrong}");
    }
    assert!(told("[stage.s]\nkind = \"sft\"\nmodel = \"m\"\n").contains("data"));
    assert!(told("[stage.s]\nkind = \"stf\"\n").contains("stf"));
    assert!(told("[stage.s]\nkind = \"model\"\nsource = \"ftp:x\"\n").contains("ftp:x"));
    assert!(told("[profile.p]\nstage.s.lora.rnk = 2\n").contains("/profile/p"));
    assert!(told("tilte = \"x\"\n").contains("tilte"));
    assert!(valid(&schema, "title = \"x\"\n").unwrap_err().contains("manifest"));
}

#[test]
fn the_schema_of_the_real_kinds_is_one_and_keeps_its_documentation() {
    let schema = plan::schema(pipe::stage::KINDS);
    jsonschema::validator_for(&schema).expect("valid");
    for kind in pipe::stage::KINDS {
        let definition = &schema["definitions"][format!("kind-{}", kind.name)];
        assert_eq!(definition["description"], kind.about);
        for key in kind.keys {
            let described = definition["properties"][key.name]["description"].as_str().unwrap_or_default();
            assert!(described.starts_with(key.doc), "{}.{}", kind.name, key.name);
        }
    }
}

/// Every manifest that ships is what an editor with our schema would accept, and loads and resolves.
#[test]
fn every_shipped_manifest_fits_the_schema_and_resolves_with_each_of_its_profiles() {
    let schema = plan::schema(pipe::stage::KINDS);
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut seen = 0;
    let entries = [folder.join("tasks"), folder].map(|folder| std::fs::read_dir(folder).expect("pipelines"));
    for entry in entries.into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|end| end != "toml") {
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&path).expect("a manifest");
        assert_eq!(valid(&schema, &text), Ok(()), "{}", path.display());
        assert!(valid(&schema, &text.replace("kind ", "knid ")).is_err(), "{}", path.display());
        let profiles: toml::Value = toml::from_str(&text).expect("TOML");
        let mut choices: Vec<Vec<String>> = vec![Vec::new()];
        if let Some(table) = profiles.get("profile").and_then(|table| table.as_table()) {
            choices.extend(table.keys().map(|name| vec![name.clone()]));
        }
        for profiles in choices {
            let read = |path: &std::path::Path| std::fs::read_to_string(path);
            let manifest = pipe::manifest::load(&path, &read, pipe::stage::KINDS, &profiles, &[]);
            let resolved = plan::resolve(&manifest);
            assert!(resolved.is_ok(), "{} {profiles:?}: {:?}", path.display(), resolved.err());
        }
    }
    assert!(seen >= 8, "found only {seen} manifests");
}
