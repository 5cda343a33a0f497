//! What must change no bit: packing, recomputing, threads, an adapter that is off.

use super::*;
use pipe::generation::sampling::argmax;
use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::{Device, Gradients, Placed, Policy, Recompute};
use proptest::prelude::*;

fn run(model: &Model, packed: &Packed) -> (Vec<u32>, Vec<Vec<u32>>) {
    run_with(model, packed, Recompute::default())
}

fn run_with(model: &Model, packed: &Packed, recompute: Recompute) -> (Vec<u32>, Vec<Vec<u32>>) {
    let forward = model.forward_with(Policy { recompute, ..Policy::default() }, &packed.batch());
    let mut grads = Gradients::zeros(model.params());
    model.backward(forward.tape, &slopes(packed.rows.len()), &mut grads);
    (bits(&forward.logprobs), grads.values.iter().map(|values| bits(values)).collect())
}

/// That there is a gradient of everything that is trained: runs without any agree, too.
fn all_learn((_, gradients): &(Vec<u32>, Vec<Vec<u32>>)) {
    let is_some = |values: &Vec<u32>| values.iter().any(|bits| f32::from_bits(*bits) != 0.0);
    assert!(!gradients.is_empty() && gradients.iter().all(is_some), "a gradient of zeros");
}

#[test]
fn packed_sequences_give_what_each_gives_alone() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = Model::random(config(true), 5, dtype);
        let all = sequences(&[1, 17, 3, 70, 2, 33]);
        let together = model.logprobs(&Packed::of(&all).batch());
        let mut alone = Vec::new();
        for ids in &all {
            alone.extend(model.logprobs(&Packed::of(std::slice::from_ref(ids)).batch()));
        }
        assert_eq!(bits(&together), bits(&alone), "{dtype:?}");
        assert!(alone.iter().all(|p| p.is_finite() && *p < 0.0));
    }
}

#[test]
fn padding_behind_a_sequence_changes_no_bit_of_it() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = Model::random(config(false), 5, dtype);
        let all = sequences(&[1, 17, 3, 33]);
        let alone = Packed::of(&all);
        // What a padded batch would be: all as long as the longest, the rows of the padding not asked for.
        let padded: Vec<Vec<u32>> = all.iter().map(|ids| [ids.as_slice(), &[7; 33][ids.len()..]].concat()).collect();
        let mut batch = Packed::of(&padded);
        let real = |row: usize| row % 33 + 1 < all[row / 33].len();
        let kept: Vec<usize> = (0..batch.rows.len()).filter(|&i| real(batch.rows[i])).collect();
        batch.targets = kept.iter().map(|&i| batch.targets[i]).collect();
        batch.rows = kept.iter().map(|&i| batch.rows[i]).collect();
        assert_eq!(bits(&model.logprobs(&batch.batch())), bits(&model.logprobs(&alone.batch())), "{dtype:?}");
    }
}

#[test]
fn recomputing_layers_changes_no_bit() {
    for model in [with_adapter(true, 3, &ALL), everything_trained(false)] {
        let packed = Packed::of(&sequences(&[20, 7, 31]));
        let runs = [Recompute::None, Recompute::First(2), Recompute::All, Recompute::Fit]
            .map(|recompute| run_with(&model, &packed, recompute));
        all_learn(&runs[0]);
        assert!(runs.iter().all(|run| *run == runs[0]));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let packed = Packed::of(&sequences(&[90, 7, 131]));
    for model in [with_adapter(true, 3, &ALL), everything_trained(true)] {
        let runs = [1, 2, 5].map(|threads| on_threads(threads, || run(&model, &packed)));
        all_learn(&runs[0]);
        assert!(runs[0] == runs[1] && runs[1] == runs[2]);
    }
}

#[test]
fn an_adapter_that_is_off_is_the_base() {
    let packed = Packed::of(&sequences(&[20, 7]));
    let base = Model::random(config(true), 5, Dtype::F32).logprobs(&packed.batch());
    let mut model = with_adapter(true, 3, &ALL);
    assert_ne!(bits(&model.logprobs(&packed.batch())), bits(&base));
    assert_eq!(bits(&model.base_logprobs(&packed.batch())), bits(&base));
    assert_ne!(bits(&model.logprobs(&packed.batch())), bits(&base), "and it is on again");
}

#[test]
fn a_new_adapter_changes_nothing_yet() {
    let packed = Packed::of(&sequences(&[20, 7]));
    let mut model = Model::random(config(false), 5, Dtype::F32);
    let base = model.logprobs(&packed.batch());
    model.add_lora(&LoraSpec { rank: 4, alpha: 8.0, targets: targets(&ALL) }, 1).unwrap();
    for (a, b) in base.iter().zip(model.logprobs(&packed.batch())) {
        assert_eq!(*a, b);
    }
}

#[test]
fn layers_below_the_first_adapter_are_left_alone_and_the_gradient_is_the_same() {
    let whole = with_adapter(false, 3, &ALL);
    let packed = Packed::of(&sequences(&[20, 7]));
    let (_, all) = run(&whole, &packed);
    let mut part = Model::random(config(false), 5, Dtype::F32);
    part.add_lora(&LoraSpec { rank: 3, alpha: 4.5, targets: targets(&["lm_head"]) }, 6).unwrap();
    assert_eq!(part.params().len(), 2);
    let (_, head) = run(&part, &packed);
    assert_eq!(head.len(), 2);
    assert_eq!(all.len(), 2 * (3 * 7 + 1));
}

#[test]
fn log_probs_are_those_of_the_logits() {
    let model = with_adapter(true, 3, &ALL);
    let ids = sequences(&[40]).remove(0);
    let packed = Packed::of(std::slice::from_ref(&ids));
    let logits = model.logits(&ids);
    for ((row, target), logprob) in packed.rows.iter().zip(&packed.targets).zip(model.logprobs(&packed.batch())) {
        let logits = &logits[row * 101..(row + 1) * 101];
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
        let expected = f64::from(logits[*target as usize] - max) - sum.ln();
        assert!((f64::from(logprob) - expected).abs() <= 1e-5, "{logprob} against {expected}");
    }
}

#[test]
fn a_batch_without_targets_is_no_special_case() {
    let model = with_adapter(true, 3, &ALL);
    let (logprobs, grads) = run(&model, &Packed::of(&sequences(&[1, 1])));
    assert!(logprobs.is_empty() && grads.iter().flatten().all(|&bits| bits == 0));
}

/// Any shape: up to seven query heads per key head, heads of any even size, one to three layers.
fn any_config() -> impl Strategy<Value = Config> {
    let heads = (1usize..=3, 1usize..=7, 1usize..=9);
    (heads, 1usize..40, 1usize..50, 1usize..=3, 2usize..200, any::<bool>()).prop_map(
        |((kv, group, half), hidden, inter, layers, vocab, tied)| {
            let map = serde_json::json!({
                "model_type": "qwen2", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inter,
                "num_hidden_layers": layers, "num_attention_heads": kv * group, "num_key_value_heads": kv,
                "head_dim": 2 * half, "tie_word_embeddings": tied, "initializer_range": 0.2
            });
            Config::parse(&map.to_string()).unwrap()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_packs_recomputes_and_decodes_alike(
        config in any_config(),
        lengths in prop::collection::vec(1usize..40, 1..5),
        bf16 in any::<bool>(),
        rank in 1usize..20,
    ) {
        let vocab = config.vocab_size;
        let all: Vec<Vec<u32>> = sequences(&lengths).into_iter().map(|ids| ids.into_iter().map(|id| id % vocab as u32).collect()).collect();
        let mut model = Model::random(config, 3, if bf16 { Dtype::Bf16 } else { Dtype::F32 });
        model.add_lora(&LoraSpec { rank, alpha: 2.0, targets: targets(&ALL) }, 4).unwrap();
        model.update(|params| params.iter_mut().for_each(|param| param.value[0] = 0.25));

        let packed = Packed::of(&all);
        let together = bits(&model.logprobs(&packed.batch()));
        let alone: Vec<f32> = all.iter().flat_map(|ids| model.logprobs(&Packed::of(std::slice::from_ref(ids)).batch())).collect();
        prop_assert_eq!(&together, &bits(&alone));

        let recomputed = run(&model, &packed);
        prop_assert!(recomputed == run_with(&model, &packed, Recompute::None));
        prop_assert_eq!(&recomputed.0, &together);

        let prompts: Vec<Prompt> = all.iter().map(|ids| Prompt { ids: ids.clone(), stream: 0 }).collect();
        let sampling = Sampling { max_tokens: 3, ..Sampling::default() };
        let (model, limits) = (Placed::new(model, &Device::Cpu).unwrap(), Limits::default());
        let completions = generate(&model, &prompts, &sampling, &|_| String::new(), &mut |_| Ok(()), &limits).unwrap();
        for (ids, completion) in all.iter().zip(completions) {
            let mut ids = ids.clone();
            for id in completion.ids {
                let logits = model.logits(&ids).unwrap();
                prop_assert_eq!(id, argmax(&logits[logits.len() - vocab..]));
                ids.push(id);
            }
        }
    }
}
