//! Adapters and their PEFT folders.

use pipe::files::Files;
use pipe::model::lora::{AdapterFolder, initial, linears, peft_name, save};
use pipe::model::{Config, LoraSpec, Parameter};
use pipe::problem::Exit;
use std::path::Path;

fn config() -> Config {
    Config::parse(
        r#"{"model_type": "qwen2", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}"#,
    )
    .unwrap()
}

fn saved(dir: &Path, targets: &[&str]) -> (LoraSpec, Vec<Parameter>) {
    let targets = targets.iter().map(|target| target.to_string()).collect();
    let spec = LoraSpec { rank: 3, alpha: 6.0, targets };
    let mut params = Vec::new();
    for (name, target, shape) in linears(&config()) {
        if spec.targets.iter().any(|wanted| wanted == target) {
            let pair = initial(&spec, &name, shape, 7);
            params.push(Parameter { name: peft_name(&name, 'A'), shape: vec![3, shape[1]], value: pair.a });
            let value = (0..3 * shape[0]).map(|i| i as f32 * 0.5).collect();
            params.push(Parameter { name: peft_name(&name, 'B'), shape: vec![shape[0], 3], value });
        }
    }
    save(dir, &spec, &params, "base").unwrap();
    (spec, params)
}

#[test]
fn a_folder_comes_back_as_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, params) = saved(dir.path(), &["q_proj", "down_proj", "lm_head"]);
    let folder = AdapterFolder::open(&Files::from_dir(dir.path()).unwrap(), &config()).unwrap();
    assert_eq!(folder.spec, spec);
    let pair = folder.pair("model.layers.1.mlp.down_proj", [8, 12]).unwrap().unwrap();
    let at = params.iter().position(|param| param.name.contains("layers.1.mlp.down_proj.lora_A")).unwrap();
    assert_eq!((pair.a, pair.b), (params[at].value.clone(), params[at + 1].value.clone()));
    assert_eq!(pair.scale, 2.0);
    assert!(folder.pair("model.layers.1.mlp.up_proj", [12, 8]).unwrap().is_none());
}

#[test]
fn a_new_adapter_starts_as_peft_starts_it_and_depends_on_its_name_only() {
    let spec = LoraSpec { rank: 64, alpha: 64.0, targets: vec!["q_proj".into()] };
    let pair = initial(&spec, "model.layers.0.self_attn.q_proj", [10, 100], 1);
    assert!(pair.b.iter().all(|&b| b == 0.0) && pair.b.len() == 640);
    assert!(pair.a.iter().all(|a| a.abs() <= 0.1));
    let variance = pair.a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>() / 6400.0;
    assert!((variance - 0.01 / 3.0).abs() <= 2e-4, "{variance}");
    assert_eq!(pair, initial(&spec, "model.layers.0.self_attn.q_proj", [10, 100], 1));
    assert_ne!(pair.a, initial(&spec, "model.layers.1.self_attn.q_proj", [10, 100], 1).a);
    assert_ne!(pair.a, initial(&spec, "model.layers.0.self_attn.q_proj", [10, 100], 2).a);
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), &["q_proj"]);
    let files = Files::from_dir(dir.path()).unwrap();
    let text = config().to_json("float32").replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    let problem = AdapterFolder::open(&files, &Config::parse(&text).unwrap()).err().unwrap();
    assert!(problem.message.contains("layers.1.self_attn.q_proj"), "{problem}");
    let folder = AdapterFolder::open(&files, &config()).unwrap();
    let problem = folder.pair("model.layers.0.self_attn.q_proj", [24, 9]).unwrap_err();
    assert_eq!(problem.code, "model::wrong_shape");
}

#[test]
fn a_target_that_does_not_exist_is_a_mistake_of_the_manifest() {
    let spec = LoraSpec { rank: 4, alpha: 8.0, targets: vec!["qproj".into()] };
    let problem = spec.check().unwrap_err();
    assert!(problem.exit == Exit::Usage && problem.help[0].contains("q_proj"), "{problem}");
}
