//! Generation through the cache.

use super::*;
use pipe::generation::sampling::argmax;
use pipe::generation::{Completion, Finish, Limits, Prompt, Sampling, generate};
use pipe::model::{Device, Placed};
use pipe::problem::Problem;

fn words(ids: &[u32]) -> String {
    ids.iter().map(|id| format!("{id} ")).collect()
}

fn prompts(lengths: &[usize]) -> Vec<Prompt> {
    sequences(lengths).into_iter().zip(0..).map(|(ids, stream)| Prompt { ids, stream }).collect()
}

fn placed(model: Model) -> Placed {
    Placed::new(model, &Device::Cpu).unwrap()
}

fn run(model: &Placed, prompts: &[Prompt], sampling: &Sampling, live: usize) -> Vec<Completion> {
    let limits = Limits { live, ..Limits::default() };
    generate(model, prompts, sampling, &words, &mut |_| Ok(()), &limits).unwrap()
}

#[test]
fn greedy_tokens_are_those_of_the_whole_sequence_run_again() {
    let model = placed(with_adapter(true, 3, &ALL));
    for prompt in prompts(&[1, 9, 30]) {
        let sampling = Sampling { max_tokens: 12, ..Sampling::default() };
        let completion = run(&model, std::slice::from_ref(&prompt), &sampling, 1).remove(0);
        assert_eq!(completion.ids.len(), 12);
        let mut ids = prompt.ids.clone();
        for (id, logprob) in completion.ids.iter().zip(&completion.logprobs) {
            let logits = model.logits(&ids).unwrap();
            let last = &logits[logits.len() - 101..];
            assert_eq!(*id, argmax(last));
            let max = last[*id as usize];
            let expected = -last.iter().map(|l| f64::from(l - max).exp()).sum::<f64>().ln();
            assert!((f64::from(*logprob) - expected).abs() <= 1e-4, "{logprob} against {expected}");
            ids.push(*id);
        }
    }
}

#[test]
fn a_prompt_gets_the_same_tokens_alone_and_in_any_batch() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = placed(Model::random(config(false), 5, dtype));
        let prompts = prompts(&[3, 40, 1, 11, 11, 25, 7, 2]);
        let sampling = Sampling { max_tokens: 15, temperature: 0.9, top_p: 0.95, top_k: 50, ..Sampling::default() };
        let together = run(&model, &prompts, &sampling, 8);
        for live in [1, 3] {
            assert_eq!(run(&model, &prompts, &sampling, live), together, "{live} at once");
        }
        for (prompt, expected) in prompts.iter().zip(&together) {
            assert_eq!(run(&model, std::slice::from_ref(prompt), &sampling, 1), std::slice::from_ref(expected));
        }
        assert_eq!(on_threads(1, || run(&model, &prompts, &sampling, 8)), together, "one thread");
        let other = Sampling { seed: 1, ..sampling };
        assert_ne!(run(&model, &prompts, &other, 8), together, "another seed draws other tokens");
    }
}

#[test]
fn equal_prompts_with_their_own_streams_draw_their_own_tokens() {
    let model = placed(Model::random(config(false), 5, Dtype::F32));
    let ids = sequences(&[6]).remove(0);
    let prompts =
        [Prompt { ids: ids.clone(), stream: 1 }, Prompt { ids: ids.clone(), stream: 2 }, Prompt { ids, stream: 1 }];
    let sampling = Sampling { max_tokens: 20, temperature: 1.5, ..Sampling::default() };
    let completions = run(&model, &prompts, &sampling, 3);
    assert_eq!(completions[0], completions[2]);
    assert_ne!(completions[0].ids, completions[1].ids);
}

#[test]
fn ids_beyond_the_limit_are_never_drawn() {
    let model = placed(Model::random(config(false), 5, Dtype::F32));
    let sampling = Sampling { max_tokens: 40, temperature: 3.0, id_limit: 10, ..Sampling::default() };
    for completion in run(&model, &prompts(&[3, 4]), &sampling, 2) {
        assert!(completion.ids.iter().all(|&id| id < 10));
    }
}

#[test]
fn a_completion_ends_at_a_stop_id_or_a_stop_text() {
    let model = placed(Model::random(config(false), 5, Dtype::F32));
    let prompts = prompts(&[5]);
    let free = Sampling { max_tokens: 20, temperature: 1.0, ..Sampling::default() };
    let ids = run(&model, &prompts, &free, 1).remove(0).ids;
    let first = |id: u32| ids.iter().position(|other| *other == id).unwrap();

    let at = first(ids[8]);
    let stopped = run(&model, &prompts, &Sampling { stop_ids: vec![ids[8]], ..free.clone() }, 1).remove(0);
    assert_eq!((&stopped.ids[..], stopped.finish), (&ids[..=at], Finish::Stop));
    assert_eq!(stopped.text, words(&ids[..at]));

    let stop = format!("{} {} ", ids[5], ids[6]);
    let stopped = run(&model, &prompts, &Sampling { stop: vec![stop.clone()], ..free }, 1).remove(0);
    assert_eq!(stopped.finish, Finish::Stop);
    assert_eq!(stopped.text, words(&ids).split(&stop).next().unwrap());
    assert!(stopped.ids.len() <= 7);
}

#[test]
fn a_diverged_model_is_named_instead_of_sampled_from() {
    let mut model = everything_trained(true);
    model.update(|params| params[0].value.fill(f32::NAN));
    let (model, limits) = (placed(model), Limits::default());
    let result = generate(&model, &prompts(&[3]), &Sampling::default(), &words, &mut |_| Ok(()), &limits);
    assert_eq!(result.unwrap_err().code, "model::not_finite");
}

#[test]
fn an_interruption_is_passed_on_at_once() {
    let model = placed(Model::random(config(false), 5, Dtype::F32));
    let mut calls = 0;
    let mut on_step = |_| {
        calls += 1;
        if calls == 3 { Err(Problem::new("test::stop", "stop")) } else { Ok(()) }
    };
    let (sampling, limits) = (Sampling::default(), Limits::default());
    let result = generate(&model, &prompts(&[3, 4]), &sampling, &words, &mut on_step, &limits);
    assert_eq!(result.unwrap_err().code, "test::stop");
    assert_eq!(calls, 3);
}

#[test]
fn an_empty_prompt_and_a_foreign_id_are_problems() {
    let model = placed(Model::random(config(false), 5, Dtype::F32));
    for (ids, code) in [(vec![], "model::empty_prompt"), (vec![3, 101], "model::id_out_of_range")] {
        let prompts = [Prompt { ids, stream: 0 }];
        let limits = Limits::default();
        let result = generate(&model, &prompts, &Sampling::default(), &words, &mut |_| Ok(()), &limits);
        assert_eq!(result.unwrap_err().code, code);
    }
    assert!(run(&model, &[], &Sampling::default(), 4).is_empty());
}
