use super::*;
use crate::files::Files;
use crate::model::Config;
use crate::model::family;
use crate::model::memory::Part;
use crate::stage::share::bundled;
use serde_json::{Value, json};

/// A forecast of `sft` with these keys beside the defaults.
fn sft(more: Value) -> TrainingForecast {
    let mut all = json!({
        "max_tokens": 1000, "batch_size": 8, "micro_batch_tokens": 4096, "epochs": 2.0, "dtype": "f32",
        "optimizer": {
            "kind": "adamw", "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0,
        },
        "lora": {"rank": 4, "alpha": 8.0, "targets": [family::TARGETS[0]]}, "learning_rate": 0.1,
        "schedule": {"kind": "constant", "warmup_ratio": 0.0, "cycles": 1}, "adapter": "new", "format": "text",
        "eos": "one", "on_overlength": "error", "truncate_side": "right", "shuffle": true, "seed": 0,
        "checkpointing": "layers", "offload": false, "keep_gradients": [], "resume_every_s": 60,
    });
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let micro_batch_size = all.as_object_mut().unwrap().remove("micro_batch_size");
    let spec: Spec = serde_json::from_value(all).unwrap();
    let micro_batch_size = micro_batch_size.and_then(|size| size.as_u64()).map(|size| size as usize);
    TrainingForecast { limits: spec.limits(), spec, pairs: false, micro_batch_size }
}

fn shape() -> Shape {
    let config = json!({
        "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    });
    Shape { config: Config::parse(&config.to_string()).unwrap(), adapters: Vec::new() }
}

fn tokens(forecast: &TrainingForecast, data: Option<Data>) -> (usize, usize) {
    let (surely, most) = forecast.cut().micro_batches(data);
    (surely.tokens, most.tokens)
}

fn tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    bundled::tokenizer("mini").unwrap().write(folder.path(), |_| true).unwrap();
    Tokenizer::load(&Files::from_dir(folder.path()).unwrap()).unwrap()
}

fn rows() -> Vec<Record> {
    let row = |i: usize| json!({"prompt": "1 + 1", "completion": " = 2".repeat(i)}).as_object().unwrap().clone();
    (1..=5).map(row).collect()
}

/// Two examples a step, once.
fn by_two(more: Value) -> TrainingForecast {
    let mut all = json!({"batch_size": 2, "epochs": 1.0});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    sft(all)
}

#[test]
fn a_micro_batch_is_no_larger_than_its_budget_an_example_its_batch_or_the_data() {
    assert_eq!(tokens(&sft(json!({})), None), (4096, 4096));
    assert_eq!(tokens(&sft(json!({"max_tokens": 20_000})), None), (4096, 20_000));
    assert_eq!(tokens(&sft(json!({"batch_size": 2})), None), (2000, 2000));
    assert_eq!(tokens(&sft(json!({"micro_batch_size": 3})), None), (3000, 3000));
    let data = Data { records: 5, tokens: 3000, longest: 700 };
    assert_eq!(tokens(&sft(json!({"max_tokens": 20_000})), Some(data)), (3000, 3000));
    assert_eq!(tokens(&sft(json!({"max_tokens": 1u64 << 40})), None), (4096, MOST_TOKENS));
}

#[test]
fn steps_are_known_once_the_records_are() {
    let data = Data { records: 20, tokens: 3000, longest: 700 };
    let steps = |more: Value, data| sft(more).needs(&shape(), data, false).steps;
    assert_eq!(steps(json!({}), None), None);
    assert_eq!(steps(json!({}), Some(data)), Some(6));
    assert_eq!(steps(json!({"max_steps": 4}), None), Some(4));
    // Rank 4 on the queries, 64 to 64, of two layers: 1,024 values; at the start, after steps 2 and 4, and as artifact.
    let disk = |more: Value| sft(more).needs(&shape(), None, false).disk;
    assert_eq!(disk(json!({"max_steps": 4, "save_every_steps": 2})), 4 * 4096 + 2 * (4096 + 8192));
    assert_eq!(disk(json!({"max_steps": 4})), 4096 + 2 * (4096 + 8192));
}

#[test]
fn each_advice_makes_the_need_smaller() {
    let keys = json!({"checkpointing": "none", "lora": {"rank": 64, "alpha": 8.0, "targets": [family::TARGETS[0]]}});
    let given = sft(keys.clone());
    let need = |forecast: &TrainingForecast, on_device: bool| {
        // With two layers the one that is worked at and the next are all of them.
        let mut shape = shape();
        shape.config.num_hidden_layers = 4;
        let need = forecast.needs(&shape, None, on_device).surely;
        if on_device { need.device } else { need.host }
    };
    assert_eq!(given.advice(false).len(), 6);
    let advice = given.advice(true);
    assert_eq!(advice.len(), 7, "{advice:?}");
    for (key, value) in [
        ("checkpointing", json!("layers")),
        ("offload", json!(true)),
        ("micro_batch_tokens", json!(2048)),
        ("lora", json!({"rank": 32, "alpha": 8.0, "targets": [family::TARGETS[0]]})),
        (
            "optimizer",
            json!({
                "kind": "adamw-8bit", "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0,
                "clip_norm": 1.0,
            }),
        ),
        ("dtype", json!("bf16")),
    ] {
        let mut taken = keys.clone();
        taken[key] = value;
        let taken = sft(taken);
        // The storage of weights is the host's, the inputs of layers are in the way on a device.
        assert!(key == "offload" || need(&taken, false) < need(&given, false), "{key}");
        assert!(key == "dtype" || need(&taken, true) < need(&given, true), "{key}");
        assert!(advice.iter().any(|line| line.contains(key)), "{key}: {advice:?}");
    }
}

#[test]
fn what_is_kept_as_memory_allows_is_needed_for_the_last_layer_only() {
    let need = |more: Value, on_device| sft(more).needs(&shape(), None, on_device);
    let of = |checkpointing: &str, on_device| need(json!({"checkpointing": checkpointing}), on_device);
    assert_eq!(of("fit", false), of("layers", false));
    let (least, fit, most) = (of("layers", true), of("fit", true), of("none", true));
    assert!(least.most.device <= fit.most.device && fit.most.device < most.most.device);
    let offloaded = |checkpointing: &str| need(json!({"checkpointing": checkpointing, "offload": true}), true);
    assert!(fit.takes_more && least.takes_more && offloaded("fit").takes_more);
    assert!(!offloaded("layers").takes_more && !of("fit", false).takes_more, "neither is captured");
}

#[test]
fn beside_a_device_the_host_holds_what_waits_there_and_weights_only_while_they_are_loaded() {
    let need = |more: Value| sft(more).needs(&shape(), None, true).most;
    let (plain, offloaded) = (need(json!({})), need(json!({"offload": true})));
    for part in [Part::Gradients, Part::Layer, Part::Head, Part::Activations] {
        assert!(plain.of(part).0 == 0 && plain.of(part).1 > 0, "{part}");
    }
    // The inputs of two layers; one of them is on the device too, one that was there is not.
    let inputs = 2 * 4096 * 64 * 2;
    assert_eq!(offloaded.of(Part::Activations).0, inputs);
    let uploads = plain.of(Part::Uploads).0;
    assert_eq!(offloaded.host, uploads + inputs, "no weights are left when inputs come");
    assert!(plain.of(Part::Weights).0 > 0 && plain.host < uploads + inputs, "loading takes less");
    // Doubling what is trained leaves gradients and optimizer to the device.
    let wide = need(json!({"lora": {"rank": 8, "alpha": 8.0, "targets": [family::TARGETS[0]]}}));
    assert_eq!(wide.of(Part::Trained).0, 2 * plain.of(Part::Trained).0);
    assert_eq!(wide.host - plain.host, plain.of(Part::Trained).0);
}

#[test]
fn a_pass_and_a_half_counts_the_rows_that_the_half_begins_with() {
    let of = |more: Value| {
        let forecast = by_two(more);
        forecast.count(&forecast.taken(&rows(), &tokenizer()).unwrap())
    };
    let (once, thrice) = (of(json!({})), of(json!({"epochs": 3.0})));
    assert_eq!((once.rows, once.steps), (Some(5), Some(3)));
    assert_eq!((thrice.steps, thrice.tokens), (Some(9), Some(3 * once.tokens.unwrap())));
    let lengths = by_two(json!({})).taken(&rows(), &tokenizer()).unwrap().lengths;
    let order = data::epoch_order(5, 0, 1, true);
    let more: u64 = order[..2].iter().map(|&i| lengths[i]).sum();
    let partly = of(json!({"max_steps": 4}));
    assert_eq!((partly.steps, partly.tokens), (Some(4), Some(once.tokens.unwrap() + more)));
    assert!(of(json!({"max_steps": 1u64 << 40})).tokens > Some(1 << 40));
}

#[test]
fn rows_over_the_limit_are_counted_as_the_stage_treats_them() {
    let lengths = by_two(json!({})).taken(&rows(), &tokenizer()).unwrap().lengths;
    let limit = lengths[2];
    let of = |how: &str| {
        let forecast = by_two(json!({"max_tokens": limit, "on_overlength": how}));
        forecast.taken(&rows(), &tokenizer()).map(|taken| forecast.count(&taken))
    };
    let (dropped, cut) = (of("drop").unwrap(), of("truncate").unwrap());
    assert_eq!((dropped.dropped, dropped.truncated, dropped.steps), (2, 0, Some(2)));
    assert_eq!((cut.dropped, cut.truncated, cut.steps), (0, 2, Some(3)));
    assert_eq!(dropped.tokens, Some(lengths[..3].iter().sum()));
    assert_eq!(cut.tokens, Some(lengths[..3].iter().sum::<u64>() + 2 * limit));
    assert!(of("error").is_err());
}

#[test]
fn without_the_data_only_what_the_keys_say_is_known() {
    let nothing = by_two(json!({})).count_of(None);
    assert_eq!((nothing.rows, nothing.steps, nothing.tokens), (None, None, None));
    assert_eq!(by_two(json!({"max_steps": 7})).count_of(None).steps, Some(7));
    assert_eq!(by_two(json!({})).count_of(Some(5)).steps, Some(3));
}
