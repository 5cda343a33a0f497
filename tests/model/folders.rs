//! Hugging Face and PEFT folders: what is written is loaded with the same numbers, and what is wrong is named.

use super::*;
use pipe::files::Files;
use pipe::model::LoadOptions;
use pipe::problem::{Exit, Problem};
use pipe::safetensors::{Element, INDEX_FILE, MODEL_FILE, Tensors, write};
use std::borrow::Cow;
use std::path::Path;

fn files(dir: &Path) -> Files {
    Files::from_dir(dir).unwrap()
}

fn load(dirs: &[&Path], options: LoadOptions) -> Result<Model, Problem> {
    let chain: Vec<Files> = dirs.iter().map(|dir| files(dir)).collect();
    Model::load(&chain.iter().collect::<Vec<_>>(), &options)
}

fn logprobs(model: &Model) -> Vec<f32> {
    model.logprobs(&Packed::of(&sequences(&[20, 7])).batch())
}

fn near(a: &[f32], b: &[f32], tolerance: f32) {
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= tolerance, "{a} against {b}");
    }
}

#[test]
fn a_saved_model_is_the_same_model() {
    for tied in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::random(config(tied), 5, Dtype::F32);
        model.save(dir.path(), Element::F32).unwrap();
        let again = load(&[dir.path()], LoadOptions::default()).unwrap();
        assert_eq!(bits(&logprobs(&again)), bits(&logprobs(&model)));
        let tensors = Tensors::open(&dir.path().join(MODEL_FILE)).unwrap();
        assert_eq!(tensors.shape("lm_head.weight").is_none(), tied);
        assert_eq!(tensors.names().count(), 2 + 3 * 12 + usize::from(!tied));
    }
}

#[test]
fn half_precision_files_load_as_either_dtype() {
    for element in [Element::F16, Element::Bf16] {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::random(config(true), 5, Dtype::F32);
        model.save(dir.path(), element).unwrap();
        let wide = load(&[dir.path()], LoadOptions::default()).unwrap();
        near(&logprobs(&wide), &logprobs(&model), 0.1);
        let narrow = load(&[dir.path()], LoadOptions { dtype: Dtype::Bf16, ..LoadOptions::default() }).unwrap();
        near(&logprobs(&narrow), &logprobs(&model), 0.2);
        assert!(narrow.bytes() < wide.bytes());
    }
}

#[test]
fn a_trained_model_is_saved_with_its_trained_weights() {
    let dir = tempfile::tempdir().unwrap();
    let model = everything_trained(true);
    model.save(dir.path(), Element::F32).unwrap();
    assert_eq!(bits(&logprobs(&load(&[dir.path()], LoadOptions::default()).unwrap())), bits(&logprobs(&model)));
}

#[test]
fn an_adapter_comes_back_active_folded_and_merged() {
    for tied in [false, true] {
        let (base, adapter, merged) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let model = with_adapter(tied, 3, &ALL);
        model.save(base.path(), Element::F32).unwrap();
        model.save_adapter(adapter.path(), "base").unwrap();
        model.merged_save(merged.path(), Element::F32).unwrap();
        let chain = [base.path(), adapter.path()];

        let active = load(&chain, LoadOptions::default()).unwrap();
        assert_eq!(bits(&logprobs(&active)), bits(&logprobs(&model)));
        assert_eq!(active.params(), model.params());
        assert_eq!(active.lora(), model.lora());

        let folded = load(&chain, LoadOptions { fold_last: true, ..LoadOptions::default() }).unwrap();
        near(&logprobs(&folded), &logprobs(&model), 2e-5);
        assert!(folded.lora().is_none() && !folded.config.tie_word_embeddings);

        let merged_model = load(&[merged.path()], LoadOptions::default()).unwrap();
        assert_eq!(bits(&logprobs(&merged_model)), bits(&logprobs(&folded)));
        let tensors = |dir: &Path| Tensors::open(&dir.join(MODEL_FILE)).unwrap();
        let embedding = |dir: &Path| tensors(dir).f32("model.embed_tokens.weight", &[101, 24]).unwrap();
        assert_eq!(embedding(base.path()), embedding(merged.path()), "the embedding is unmoved");
        assert_ne!(tensors(merged.path()).f32("lm_head.weight", &[101, 24]).unwrap(), embedding(merged.path()));
    }
}

#[test]
fn a_chain_folds_all_adapters_but_the_last() {
    let (base, first, second) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = with_adapter(true, 3, &ALL);
    model.save(base.path(), Element::F32).unwrap();
    model.save_adapter(first.path(), "base").unwrap();
    let folded = LoadOptions { fold_last: true, ..LoadOptions::default() };
    let mut on_top = load(&[base.path(), first.path()], folded).unwrap();
    on_top.add_lora(&LoraSpec { rank: 2, alpha: 2.0, targets: targets(&["v_proj", "lm_head"]) }, 3).unwrap();
    on_top.update(|params| params.iter_mut().for_each(|param| param.value.fill(0.01)));
    on_top.save_adapter(second.path(), "base").unwrap();
    let chain = load(&[base.path(), first.path(), second.path()], LoadOptions::default()).unwrap();
    assert_eq!(bits(&logprobs(&chain)), bits(&logprobs(&on_top)));
    assert_eq!(chain.lora().unwrap().targets, ["v_proj", "lm_head"]);
}

#[test]
fn shards_are_one_model() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = Model::random(config(false), 5, Dtype::F32);
    model.save(whole.path(), Element::F32).unwrap();
    std::fs::copy(whole.path().join("config.json"), parts.path().join("config.json")).unwrap();
    let tensors = Tensors::open(&whole.path().join(MODEL_FILE)).unwrap();
    let all: Vec<(String, Vec<usize>)> =
        tensors.names().map(|name| (name.to_string(), tensors.shape(name).unwrap().to_vec())).collect();
    let mut map = serde_json::Map::new();
    for (i, shard) in all.chunks(9).enumerate() {
        let file = format!("model-{i}.safetensors");
        write(&parts.path().join(&file), Element::F32, shard, |i| {
            Ok(Cow::Owned(tensors.f32(&shard[i].0, &shard[i].1).unwrap()))
        })
        .unwrap();
        map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    std::fs::write(parts.path().join(INDEX_FILE), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    let sharded = load(&[parts.path()], LoadOptions::default()).unwrap();
    assert_eq!(bits(&logprobs(&sharded)), bits(&logprobs(&model)));

    std::fs::remove_file(parts.path().join("model-2.safetensors")).unwrap();
    let problem = load(&[parts.path()], LoadOptions::default()).err().unwrap();
    assert!(problem.code == "model::missing_shard" && problem.message.contains("model-2.safetensors"), "{problem}");
    assert_eq!(problem.exit, Exit::Missing);
}

/// A saved model whose tensors `change` may alter: (name, shape, values).
fn altered(change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>)) -> Problem {
    let dir = tempfile::tempdir().unwrap();
    Model::random(config(false), 5, Dtype::F32).save(dir.path(), Element::F32).unwrap();
    let path = dir.path().join(MODEL_FILE);
    let tensors = Tensors::open(&path).unwrap();
    let mut all: Vec<_> = tensors
        .names()
        .map(|name| {
            let shape = tensors.shape(name).unwrap().to_vec();
            (name.to_string(), shape.clone(), tensors.f32(name, &shape).unwrap())
        })
        .collect();
    change(&mut all);
    let shapes: Vec<_> = all.iter().map(|(name, shape, _)| (name.clone(), shape.clone())).collect();
    write(&path, Element::F32, &shapes, |i| Ok(Cow::Borrowed(&all[i].2))).unwrap();
    load(&[dir.path()], LoadOptions::default()).err().expect("the weights are refused")
}

#[test]
fn a_missing_tensor_is_named() {
    let problem = altered(|all| all.retain(|(name, ..)| name != "model.layers.1.mlp.up_proj.weight"));
    assert!(problem.code == "model::missing_tensor", "{problem}");
    assert!(problem.message.contains("model.layers.1.mlp.up_proj.weight"), "{problem}");
}

#[test]
fn a_tensor_of_another_shape_is_named() {
    let problem = altered(|all| {
        let norm = all.iter_mut().find(|(name, ..)| name == "model.norm.weight").unwrap();
        (norm.1, norm.2) = (vec![23], vec![1.0; 23]);
    });
    assert!(problem.code == "model::wrong_shape" && problem.message.contains("model.norm.weight"), "{problem}");
}

#[test]
fn a_nan_in_the_weights_is_found_at_load() {
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let problem = altered(|all| {
            let weight = all.iter_mut().find(|(name, ..)| name.ends_with("layers.2.self_attn.k_proj.weight")).unwrap();
            weight.2[7] = bad;
        });
        assert!(problem.code == "model::not_finite" && problem.message.contains("k_proj"), "{problem}");
    }
}

#[test]
fn an_adapter_where_a_model_should_be_and_the_reverse_are_told_apart() {
    let (base, adapter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = with_adapter(true, 3, &ALL);
    model.save(base.path(), Element::F32).unwrap();
    model.save_adapter(adapter.path(), "base").unwrap();
    assert_eq!(load(&[adapter.path()], LoadOptions::default()).err().unwrap().code, "model::no_config");
    assert_eq!(load(&[base.path(), base.path()], LoadOptions::default()).err().unwrap().code, "model::no_adapter");
    assert_eq!(load(&[], LoadOptions::default()).err().unwrap().code, "model::no_weights");
}

#[test]
fn saving_twice_gives_the_same_bytes() {
    let bytes = || {
        let dir = tempfile::tempdir().unwrap();
        let model = with_adapter(true, 3, &ALL);
        model.merged_save(dir.path(), Element::Bf16).unwrap();
        model.save_adapter(dir.path(), "base").unwrap();
        let names = ["config.json", MODEL_FILE, "adapter_config.json", "adapter_model.safetensors"];
        names.map(|name| std::fs::read(dir.path().join(name)).unwrap())
    };
    assert!(bytes() == bytes());
}
