//! What a study brings in from elsewhere and looks at: adapters, gradients, logits, rows as the model sees them.

use super::{MANIFEST, Study, preferences, sums};
use pipe::files::Files;
use serde_json::Value;
use std::path::Path;

const LORA: &str = "lora = { rank = 4, alpha = 8 }";

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("exported");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The lines of a file of a stage's artifact.
fn exported(study: &Study, manifest: &str, stage: &str, file: &str) -> Vec<Value> {
    let to = study.path(&format!("out-{manifest}-{stage}-{file}"));
    study.ok(&["export", manifest, stage, to.to_str().expect("UTF-8")]);
    lines(&to.join(file))
}

/// A manifest that goes on from the adapter in the folder `adapter`.
fn from_outside(stages: &str) -> String {
    let base = &MANIFEST[..MANIFEST.find("[stage.sft]").expect("a stage")];
    format!("{base}[stage.taken]\nkind = \"model\"\nsource = \"path:adapter\"\nmodel = \"base\"\n\n{stages}")
}

#[test]
fn an_adapter_that_was_exported_is_taken_in_again_and_computes_the_same() {
    let study = Study::small();
    study.ok(&["run", "study.toml", "sft", "probe"]);
    study.ok(&["export", "study.toml", "sft", study.path("adapter").to_str().expect("UTF-8"), "--verify"]);
    let probe = "[stage.again]\nkind = \"probe\"\nmodel = \"taken\"\ndata = \"preferences\"\nformat = \"s1\"\nmax_tokens = 200\n";
    study.write("again.toml", &from_outside(probe));
    study.ok(&["run", "again.toml", "again"]);
    let again = exported(&study, "again.toml", "again", "measurements.jsonl");
    let before = exported(&study, "study.toml", "probe", "measurements.jsonl");
    assert_eq!(again[0]["alp_chosen"], before.last().expect("checkpoints")["alp_chosen"]);
}

#[test]
fn an_adapter_is_continued_only_in_its_own_shape_and_needs_its_base() {
    let study = Study::small();
    study.ok(&["run", "study.toml", "sft"]);
    study.ok(&["export", "study.toml", "sft", study.path("adapter").to_str().expect("UTF-8")]);
    let more = |lora: &str| {
        from_outside(&format!(
            "[stage.more]\nkind = \"sft\"\nmodel = \"taken\"\ndata = \"sums\"\nformat = \"s1\"\nmax_steps = 1\n\
             learning_rate = 1e-3\nmax_tokens = 200\nadapter = \"continue\"\n{lora}\n"
        ))
    };
    // The order of targets says nothing.
    let turned = r#"lora = { rank = 4, alpha = 8, targets = ["down_proj", "up_proj", "gate_proj", "o_proj", "v_proj", "k_proj", "q_proj"] }"#;
    study.write("more.toml", &more(turned));
    study.ok(&["run", "more.toml", "more"]);
    study.write("more.toml", &more("lora = { rank = 8, alpha = 8 }"));
    let stderr = study.fails(1, &["run", "more.toml", "more"]);
    assert!(stderr.contains("train::other_adapter") && stderr.contains("there: rank 4"), "{stderr}");

    study.write("alone.toml", &more(LORA).replace("\nmodel = \"base\"", ""));
    let stderr = study.fails(1, &["run", "alone.toml", "taken"]);
    assert!(stderr.contains("model::no_base") && stderr.contains("model = \"STAGE\""), "{stderr}");
    study.write("both.toml", &more(LORA).replace("model = \"base\"", "model = \"base\"\ntokenizer = \"init:mini\""));
    let stderr = study.fails(2, &["validate", "both.toml"]);
    assert!(stderr.contains("an adapter has no `tokenizer` of its own"), "{stderr}");
}

#[test]
fn a_probe_of_the_training_rows_gives_the_loss_of_the_first_step() {
    let text = MANIFEST.replace("max_steps = 12\nbatch_size = 4", "max_steps = 2\nbatch_size = 16");
    let probe =
        "\n[stage.loss]\nkind = \"probe\"\nmodel = \"base\"\ndata = \"sums\"\nformat = \"s1\"\nmax_tokens = 200\n";
    let study = Study::with(&format!("{text}{probe}"), &sums(16), &preferences(8));
    study.ok(&["run", "study.toml", "sft", "loss"]);
    let log = exported(&study, "study.toml", "sft", "log.jsonl");
    let measured = exported(&study, "study.toml", "loss", "measurements.jsonl");
    let (loss, nll) = (log[0]["loss"].as_f64().expect("a loss"), measured[0]["nll"].as_f64().expect("a measurement"));
    assert!((loss - nll).abs() <= 1e-6, "{loss} against {nll}");
    assert_eq!(measured[0]["tokens"], log[0]["learned_tokens"]);
    assert_eq!(exported(&study, "study.toml", "loss", "logprobs.jsonl").len(), 16);
}

#[test]
fn gradients_are_kept_of_the_steps_that_were_named_and_of_no_other() {
    let text = MANIFEST.replace("save_every_steps = 4", "keep_gradients = [1, 12, 99]");
    let study = Study::with(&text, &sums(16), &preferences(8));
    study.ok(&["run", "study.toml", "sft"]);
    let to = study.path("out");
    study.ok(&["export", "study.toml", "sft", to.to_str().expect("UTF-8")]);
    let names: Vec<String> =
        Files::from_dir(&to.join("gradients")).expect("kept").iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names, ["step-000001.safetensors", "step-000012.safetensors"]);
    let bytes = std::fs::read(to.join("gradients/step-000001.safetensors")).expect("kept");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(tensors.len(), 2 * 7 * 2, "A and B of seven linears in two layers");
    let squares = |name: &str| -> f64 {
        let values = tensors.tensor(name).expect("a tensor").data().as_chunks::<4>().0;
        values.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)).powi(2)).sum()
    };
    let norm = tensors.names().iter().map(|name| squares(name)).sum::<f64>().sqrt();
    let logged = lines(&to.join("log.jsonl"))[0]["grad_norm"].as_f64().expect("a norm");
    assert!((norm / logged - 1.0).abs() <= 1e-6, "{norm} against {logged}");
}

#[test]
fn rows_tokenised_beforehand_train_to_the_same_bytes() {
    let tokenised = "\n[stage.seen]\nkind = \"dataset\"\nconcat = \"sums\"\ntokenize = { tokenizer = \"base\", format = \"s1\" }\n\
         \n[stage.pairs]\nkind = \"dataset\"\nconcat = \"preferences\"\ntokenize = { tokenizer = \"base\", format = \"s1\" }\n";
    let study = Study::with(&format!("{MANIFEST}{tokenised}"), &sums(16), &preferences(8));
    study.ok(&["run", "study.toml", "sft", "dpo", "seen"]);
    let before = (study.exported("cache", "sft"), study.exported("cache", "dpo"));
    let again = format!("{MANIFEST}{tokenised}").replace("data = \"sums\"", "data = \"seen\"").replacen(
        "data = \"preferences\"",
        "data = \"pairs\"",
        1,
    );
    study.write("study.toml", &again);
    study.ok(&["run", "study.toml", "sft", "dpo", "--cache", "other"]);
    assert!(before == (study.exported("other", "sft"), study.exported("other", "dpo")));
    let rows = exported(&study, "study.toml", "seen", "data.jsonl");
    let learned = rows[0]["labels"].as_array().expect("labels").iter().filter(|label| **label != -100).count();
    assert!(learned > 0 && learned < rows[0]["input_ids"].as_array().expect("ids").len());
}

#[test]
fn equal_micro_batches_make_both_normalisations_one() {
    let rows: Vec<Value> = (0..8)
        .map(|i| serde_json::json!({"input_ids": [5, 6, i + 20, 7], "labels": [-100, -100, i + 20, 7]}))
        .collect();
    let run = |keys: &str| {
        let text = MANIFEST.replace("save_every_steps = 4", &format!("shuffle = false\n{keys}"));
        let study = Study::with(&text, &rows, &preferences(8));
        study.ok(&["run", "study.toml", "sft"]);
        exported(&study, "study.toml", "sft", "log.jsonl")
    };
    let means = run("normalization = \"mean-of-means\"\nmicro_batch_size = 2");
    for (a, b) in run("micro_batch_size = 2").iter().zip(&means) {
        assert_eq!(a["loss"], b["loss"]);
    }
    let study = Study::with(&MANIFEST.replace("save_every_steps = 4", "normalization = \"mean-of-means\""), &rows, &[]);
    let stderr = study.fails(2, &["validate", "study.toml"]);
    assert!(stderr.contains("nothing says how") && stderr.contains("micro_batch_size"), "{stderr}");
}

#[test]
fn dpo_against_the_base_starts_elsewhere_than_at_ln_2() {
    let text = MANIFEST.replace("adapter = \"continue\"", "adapter = \"continue\"\nreference = \"base\"");
    let study = Study::with(&text, &sums(16), &preferences(8));
    study.ok(&["run", "study.toml", "dpo"]);
    let log = exported(&study, "study.toml", "dpo", "log.jsonl");
    assert!((log[0]["loss"].as_f64().expect("a loss") - 2f64.ln()).abs() > 1e-4, "{}", log[0]);
    let study = Study::with(&MANIFEST.replace("adapter = \"continue\"", "reference = \"base\""), &[], &[]);
    let stderr = study.fails(2, &["validate", "study.toml"]);
    assert!(stderr.contains("takes away the adapter that is continued"), "{stderr}");
}

#[test]
fn an_export_is_verified_and_says_what_others_will_not_serve() {
    let head = r#"lora = { rank = 24, alpha = 8, targets = ["q_proj", "lm_head"] }"#;
    let study = Study::with(&MANIFEST.replacen(LORA, head, 1), &sums(16), &preferences(8));
    study.ok(&["run", "study.toml", "sft"]);
    let output = study.output(&["export", "study.toml", "sft", "adapter", "--verify"]);
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success() && stdout.contains("loaded again: log-probs of 252 tokens differ by"), "{stdout}");
    assert!(stderr.contains("`lm_head`") && stderr.contains("--merge"), "{stderr}");
    assert!(stderr.contains("`--max-lora-rank 32`"), "{stderr}");

    let merged = study.ok(&["export", "study.toml", "sft", "merged", "--merge", "--verify", "--json"]);
    let merged: Value = serde_json::from_str(&merged).expect("JSON");
    let difference = merged["exports"][0]["largest_logprob_difference"].as_f64().expect("a number");
    assert!(difference > 0.0 && difference <= 5e-5, "{difference}");
    let rounded = study.ok(&["export", "study.toml", "sft", "rounded", "--merge", "--dtype", "bf16", "--verify"]);
    assert!(rounded.contains("from rounding the weights"), "{rounded}");

    let stderr = study.fails(2, &["export", "study.toml", "sums", "rows", "--verify"]);
    assert!(stderr.contains("is no model: there is nothing to verify"), "{stderr}");
    study.fails(2, &["export", "study.toml", "sft", "bf16", "--dtype", "bf16"]);
}

#[test]
fn completions_come_with_their_ids_when_asked() {
    let stage = "\n[stage.told]\nkind = \"generate\"\nmodel = \"base\"\ndata = \"sums\"\nmax_tokens = 6\ntoken_ids = \"ids\"\n\
         ignore_eos = true\n";
    let study = Study::with(&format!("{MANIFEST}{stage}"), &sums(3), &preferences(8));
    study.ok(&["run", "study.toml", "told"]);
    let told = exported(&study, "study.toml", "told", "data.jsonl");
    let third = told[0]["ids"][2].clone();
    assert!(told.iter().all(|record| record["ids"].as_array().map(Vec::len) == Some(6)), "{told:?}");
    study.write("study.toml", &format!("{MANIFEST}{stage}stop_token_ids = [{third}]\n"));
    study.ok(&["run", "study.toml", "told"]);
    let study_again = study.path("again");
    study.ok(&["export", "study.toml", "told", study_again.to_str().expect("UTF-8")]);
    let ids = lines(&study_again.join("data.jsonl"))[0]["ids"].as_array().expect("ids").clone();
    assert!(ids.len() <= 3 && ids.last() == Some(&third), "{ids:?}");
}
