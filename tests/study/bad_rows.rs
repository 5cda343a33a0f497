//! Rows and folders that cannot be used: a clear error, the right exit code, before hours are spent.

use super::{MANIFEST, Study, preferences, sums};
use serde_json::json;

fn with_row(row: serde_json::Value) -> Study {
    let mut rows = sums(3);
    rows.push(row);
    Study::with(MANIFEST, &rows, &preferences(2))
}

#[test]
fn an_empty_dataset_is_an_error() {
    let study = Study::with(MANIFEST, &[], &preferences(2));
    let stderr = study.fails(1, &["run", "study.toml", "sft"]);
    assert!(stderr.contains("sums.jsonl") && stderr.contains("empty"), "{stderr}");
}

#[test]
fn a_record_without_a_prompt_is_named_by_its_line() {
    let study = with_row(json!({ "id": "odd", "answer": "7" }));
    let stderr = study.fails(1, &["run", "study.toml", "sft"]);
    assert!(stderr.contains("line 4") && stderr.contains("prompt"), "{stderr}");
}

#[test]
fn a_row_longer_than_max_tokens_is_named_with_its_length() {
    let study = with_row(json!({ "id": "long", "prompt": "so ".repeat(900), "thinking": "", "answer": "7" }));
    let stderr = study.fails(1, &["run", "study.toml", "sft"]);
    assert!(stderr.contains("long") && stderr.contains("200") && stderr.contains("on_overlength"), "{stderr}");
    study.ok(&["run", "study.toml", "sft", "--set", "stage.sft.on_overlength=drop"]);
}

#[test]
fn a_sample_without_a_learned_token_is_an_error() {
    let study = with_row(json!({ "id": "mute", "input_ids": [65, 66, 67], "labels": [-100, -100, -100] }));
    let stderr = study.fails(1, &["run", "study.toml", "sft"]);
    assert!(stderr.contains("mute") && stderr.contains("learned"), "{stderr}");
}

#[test]
fn chosen_equal_to_rejected_is_an_error() {
    let mut rows = preferences(3);
    rows[1]["rejected"] = rows[1]["chosen"].clone();
    let study = Study::with(MANIFEST, &sums(8), &rows);
    let stderr = study.fails(1, &["run", "study.toml", "dpo"]);
    assert!(stderr.contains("sum-1") && stderr.contains("chosen"), "{stderr}");
}

#[test]
fn a_missing_folder_is_found_before_any_stage_runs() {
    let study = Study::small();
    let stderr = study.fails(3, &["run", "study.toml", "--set", "stage.preferences.source=path:nowhere.jsonl"]);
    assert!(stderr.contains("nowhere.jsonl"), "{stderr}");
    assert!(
        !study.path("cache/stages").exists()
            || std::fs::read_dir(study.path("cache/stages")).is_ok_and(|mut d| d.next().is_none())
    );
}

#[test]
fn a_model_folder_with_a_damaged_weight_is_refused_by_name() {
    let study = Study::small();
    study.ok(&["run", "study.toml", "base"]);
    let folder = study.path("weights");
    study.ok(&["export", "study.toml", "base", folder.to_str().expect("UTF-8")]);
    let file = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("weights");
    let text = MANIFEST
        .lines()
        .filter(|line| !line.starts_with("tokenizer") && !line.starts_with("init ="))
        .map(|line| format!("{line}\n"))
        .collect::<String>()
        .replace("init:random", "path:weights");
    study.write("again.toml", &text);

    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, &bytes).expect("written");
    let stderr = study.fails(1, &["run", "again.toml", "base"]);
    assert!(stderr.contains("NaN") || stderr.contains("not finite") || stderr.contains("not a number"), "{stderr}");

    std::fs::write(&file, &bytes[..end - 8]).expect("written");
    let stderr = study.fails(1, &["run", "again.toml", "base"]);
    assert!(stderr.contains("model.safetensors"), "{stderr}");
}

#[test]
fn a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused() {
    let study = Study::small();
    let text = MANIFEST.replace("intermediate_size = 48", "intermediate_size = 48, vocab_size = 100");
    study.write("study.toml", &text);
    let stderr = study.fails(1, &["run", "study.toml", "base"]);
    assert!(stderr.contains("tokenizer_mismatch") && stderr.contains("100"), "{stderr}");
}
