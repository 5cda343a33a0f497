//! A model folder: `config.json`, safetensors, the index of shards. What loads is used, saved and loaded again.
//!
//! Input: `config.json`; the index (if empty, there is one file and no index); the weights (see
//! [`pipe_fuzz::safetensors`]).
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::files::Files;
use pipe::safetensors::{Element, INDEX_FILE, MODEL_FILE, Tensors};
use pipe::model::{Batch, Config, LoadOptions, Model};
use pipe::tensor::Dtype;
use pipe_fuzz::{Folder, taken};

/// The name under which an index finds the weights.
const SHARD: &str = "model-1.safetensors";
/// Larger models are not run: time is for the reader.
const RUN: usize = 50_000;

fuzz_target!(init: pipe_fuzz::start("model"), |input: &[u8]| {
    let [config, index, weights] = pipe_fuzz::parts(input);
    let weights = pipe_fuzz::safetensors(weights);
    let folder = match index {
        [] => Folder::with(&[("config.json", config), (MODEL_FILE, &weights)]),
        _ => Folder::with(&[("config.json", config), (INDEX_FILE, index), (SHARD, &weights)]),
    };
    let files = folder.files();
    if let Some(config) = taken(Config::parse(&pipe_fuzz::text(config))) {
        let again = Config::parse(&config.to_json("float32")).expect("what is written is read");
        assert_eq!(again.to_json("float32"), config.to_json("float32"));
    }
    read_all(&files, weights.len());
    for dtype in [Dtype::F32, Dtype::Bf16] {
        if let Some(model) = taken(Model::load(&[&files], &LoadOptions { dtype, fold_last: false })) {
            run(&model);
            saved(&model, dtype);
        }
    }
});

/// Every tensor, whatever the configuration says: values no larger than the file, or a refusal.
fn read_all(files: &Files, length: usize) {
    let Some(tensors) = taken(Tensors::of_model(files)) else { return };
    for name in tensors.names() {
        let shape = tensors.shape(name).expect("a tensor has a shape").to_vec();
        if let Some(values) = taken(tensors.f32(name, &shape)) {
            assert!(values.len() * 2 <= length && values.iter().all(|value| value.is_finite()), "{name}");
        }
        let _ = taken(tensors.bf16(name, &shape));
    }
}

fn run(model: &Model) {
    let last = model.config.vocab_size - 1;
    if model.config.parameters() > RUN || u32::try_from(last).is_err() {
        return;
    }
    let batch = Batch { ids: &[0, last as u32, 0], lengths: &[2, 1], rows: &[0], targets: &[last as u32] };
    assert_eq!(model.logprobs(&batch).len(), 1);
}

/// Saved, loaded and saved again, the bytes are the same.
fn saved(model: &Model, dtype: Dtype) {
    let (once, twice) = (Folder::new(), Folder::new());
    model.save(once.path(), Element::F32).expect("what was loaded is saved");
    let options = LoadOptions { dtype, fold_last: false };
    let again = Model::load(&[&once.files()], &options).expect("what was saved is loaded");
    again.save(twice.path(), Element::F32).expect("what was loaded is saved");
    for name in ["config.json", MODEL_FILE] {
        assert!(once.read(name) == twice.read(name), "{name} changes from saving to saving");
    }
}
