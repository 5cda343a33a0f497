//! A checkpoint file, restored into two small tensors under both optimizers.
//!
//! Input: the file, its digest put right; or, where it begins with `{`, a header (one line) and data, from which
//! a file is made. `!` in front of a file leaves its last bytes as they are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::model::{Gradients, Parameter};
use pipe::train::{Checkpoint, Kind, Optimizer, Options};
use pipe_fuzz::{Folder, seeds, taken};
use serde_json::Value;

fuzz_target!(init: pipe_fuzz::start("checkpoint"), |input: &[u8]| {
    let bytes = file(input);
    for kind in [Kind::AdamW, Kind::AdamW8bit] {
        let folder = Folder::with(&[("step-00000007.checkpoint", &bytes)]);
        let Some(checkpoints) = taken(Checkpoint::in_folder(folder.path())) else { return };
        let (mut params, mut optimizer) = start(kind);
        let Some(Some(restored)) = taken(checkpoints.restore(&mut params, &mut optimizer)) else { continue };
        restored.ignored.iter().for_each(pipe_fuzz::check);

        // Saved again, it is restored again, to the same bits.
        let copy = Folder::new();
        let Some(checkpoints) = taken(Checkpoint::in_folder(copy.path())) else { return };
        let saved = checkpoints.save(restored.step, &params, &optimizer, restored.caller.clone());
        saved.expect("what was restored is saved");
        let (mut params_again, mut optimizer_again) = start(kind);
        let again = checkpoints.restore(&mut params_again, &mut optimizer_again);
        let again = again.ok().flatten().expect("what was saved is restored");
        assert_eq!((again.step, &again.caller), (restored.step, &restored.caller));
        assert_eq!(optimizer_again.steps(), optimizer.steps());
        assert!(bits(&params_again) == bits(&params));

        if optimizer.steps() < u64::MAX {
            let grads = Gradients { values: params.iter().map(|param| vec![0.5; param.value.len()]).collect() };
            optimizer.step(&mut params, &grads, 1e-3);
        }
    }
});

fn start(kind: Kind) -> (Vec<Parameter>, Optimizer) {
    let zero = |(name, shape): (&str, Vec<usize>)| {
        let value = vec![0.0; shape.iter().product()];
        Parameter { name: name.into(), shape, value }
    };
    let params: Vec<Parameter> = seeds::trained().map(zero).into();
    let optimizer = Optimizer::new(kind, Options::default(), &params);
    (params, optimizer)
}

fn bits(params: &[Parameter]) -> Vec<u32> {
    params.iter().flat_map(|param| param.value.iter().map(|value| value.to_bits())).collect()
}

fn file(input: &[u8]) -> Vec<u8> {
    if let Some(raw) = input.strip_prefix(b"!") {
        return raw.to_vec();
    }
    let mut bytes = if input.starts_with(b"{") {
        let (header, data) = pipe_fuzz::split_line(input);
        let said = serde_json::from_slice::<Value>(header).unwrap_or_default();
        let tensors = said["tensors"].as_array().into_iter().flatten();
        let length = tensors.filter_map(|tensor| tensor[1].as_u64()).fold(0u64, u64::saturating_add);
        let mut bytes = b"pipe checkpoint 1\n".to_vec();
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header);
        bytes.extend(pipe_fuzz::filled(data, length));
        bytes
    } else {
        input.to_vec()
    };
    let digest = *blake3::hash(&bytes).as_bytes();
    bytes.extend(digest);
    bytes
}
