//! An adapter folder on a small model: `adapter_config.json` and its safetensors, kept active and folded in.
//!
//! Input: `adapter_config.json`; the `config.json` it is held against (empty: that of the small model); the
//! weights (see [`pipe_fuzz::safetensors`]).
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::files::Files;
use pipe::model::lora::{ADAPTER_CONFIG, AdapterFolder};
use pipe::safetensors::{ADAPTER_FILE, Element};
use pipe::model::{Config, LoadOptions, LoraSpec, Model};
use pipe::tensor::Dtype;
use pipe_fuzz::{Folder, seeds, taken};
use std::sync::LazyLock;

static BASE: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::new();
    let config = Config::parse(seeds::CONFIG).expect("the small configuration is one");
    Model::random(config, 1, Dtype::F32).save(folder.path(), Element::F32).expect("the small model is saved");
    folder
});

fuzz_target!(init: pipe_fuzz::start("adapter"), |input: &[u8]| {
    let [adapter, config, weights] = pipe_fuzz::parts(input);
    let folder = Folder::with(&[(ADAPTER_CONFIG, adapter), (ADAPTER_FILE, &pipe_fuzz::safetensors(weights))]);
    let files = folder.files();
    if let Some(spec) = taken(LoraSpec::read(&folder.path().join(ADAPTER_CONFIG))) {
        let _ = taken(spec.check());
    }
    if !config.is_empty() {
        if let Some(config) = taken(Config::parse(&pipe_fuzz::text(config))) {
            let _ = taken(AdapterFolder::open(&files, &config));
        }
        return;
    }
    let base = BASE.files();
    for fold_last in [false, true] {
        let options = LoadOptions { dtype: Dtype::F32, fold_last };
        if let Some(model) = taken(Model::load(&[&base, &files], &options)) {
            assert_eq!(model.logits(&[0, 1]).len(), 2 * model.config.vocab_size);
            if !fold_last {
                saved(&model, &base);
            }
        }
    }
});

/// Saved, loaded and saved again, the bytes are the same.
fn saved(model: &Model, base: &Files) {
    let (once, twice) = (Folder::new(), Folder::new());
    model.save_adapter(once.path(), "base").expect("what was loaded is saved");
    let again = Model::load(&[base, &once.files()], &LoadOptions::default()).expect("what was saved is loaded");
    again.save_adapter(twice.path(), "base").expect("what was loaded is saved");
    for name in [ADAPTER_CONFIG, ADAPTER_FILE] {
        assert!(once.read(name) == twice.read(name), "{name} changes from saving to saving");
    }
}
