//! Decoding through the kernels: drawn on the device, captured, with common pages, within bounds.

use crate::model::model;
use crate::support::{Asked, PORTABLE, Watched, Watcher, gpu};
use emulator::{Order, Schedule};
use pipe::cuda::Gpu;
use pipe::generation::{Ask, Completion, Engine, Event, Finish, Limits, Prompt, Sampling, Ticket, generate};
use pipe::model::{Device, Model, Placed};
use pipe::problem::{Exit, Problem};
use pipe::random::Stream;
use pipe::tensor::Dtype;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

fn prompt(len: usize, stream: u64) -> Prompt {
    let random = Stream::named(9, &["prompt", &len.to_string()]);
    Prompt { ids: (0..len as u64).map(|i| (random.u64(i) % 203) as u32).collect(), stream }
}

fn prompts(lengths: &[usize]) -> Vec<Prompt> {
    lengths.iter().zip(0..).map(|(&len, stream)| prompt(len, stream)).collect()
}

fn words(ids: &[u32]) -> String {
    ids.iter().map(|id| format!("{id} ")).collect()
}

fn placed(gpu: Gpu) -> Placed {
    Placed::new(model(false, Dtype::Bf16), &Device::Cuda(gpu)).unwrap()
}

fn within(placed: &Placed, prompts: &[Prompt], sampling: &Sampling, limits: &Limits) -> Vec<Completion> {
    generate(placed, prompts, sampling, &words, &mut |_| Ok(()), limits).unwrap()
}

/// Everything a draw may depend on.
fn drawn() -> Sampling {
    Sampling {
        max_tokens: 9,
        temperature: 0.9,
        top_p: 0.95,
        top_k: 60,
        repetition_penalty: 1.2,
        seed: 7,
        ..Sampling::default()
    }
}

#[test]
fn tokens_are_those_that_the_processors_logits_and_the_same_random_numbers_give() {
    let law = model(false, Dtype::Bf16);
    let device = placed(gpu());
    let prompts = prompts(&[3, 19, 40]);
    let sampling = Sampling { top_p: 1.0, top_k: 0, id_limit: 190, ..drawn() };
    for sampling in [sampling.clone(), Sampling { temperature: 0.0, repetition_penalty: 1.8, ..sampling }] {
        for (prompt, made) in prompts.iter().zip(within(&device, &prompts, &sampling, &Limits::default())) {
            assert_eq!(made.ids.len(), sampling.max_tokens);
            let random = Stream::new(sampling.seed, prompt.stream);
            let mut context = prompt.ids.clone();
            for (at, (&id, &logprob)) in made.ids.iter().zip(&made.logprobs).enumerate() {
                check(&law, &sampling, &context, (id, logprob), random.uniform(at as u64));
                context.push(id);
            }
        }
    }
}

/// A draw is the processor's up to the rounding of activations to bf16.
#[track_caller]
fn check(law: &Model, sampling: &Sampling, context: &[u32], (id, logprob): (u32, f32), u: f64) {
    let logits = law.logits(context);
    let plain = logits[logits.len() - 203..].to_vec();
    let sum: f64 = plain.iter().map(|logit| f64::from(*logit).exp()).sum();
    let expected = f64::from(plain[id as usize]) - sum.ln();
    assert!((f64::from(logprob) - expected).abs() <= 0.08, "{logprob} against {expected}");
    assert!((id as usize) < sampling.id_limit);
    if sampling.temperature > 0.0 {
        let mut end = 0.0;
        for (candidate, probability) in sampling.candidates(&mut plain.clone(), context) {
            end += probability;
            if candidate == id {
                assert!((end - probability - 0.03..=end + 0.03).contains(&u), "{id} ends at {end}, {u} was drawn");
                return;
            }
        }
        panic!("{id} is no candidate");
    }
    let with_penalty = |id: u32| {
        let penalty = if context.contains(&id) { sampling.repetition_penalty as f32 } else { 1.0 };
        let logit = plain[id as usize];
        if logit < 0.0 { logit * penalty } else { logit / penalty }
    };
    let best = (0..190).map(with_penalty).fold(f32::MIN, f32::max);
    assert!(best - with_penalty(id) <= 0.1, "{id}: {} where {best} is the largest", with_penalty(id));
}

#[test]
fn company_graphs_and_limits_change_no_bit() {
    let device = placed(gpu());
    // One of them grows beyond 256 keys on the way; some are equal; some stop early and leave their row to another.
    let mut prompts = prompts(&[3, 250, 1, 17, 32, 5]);
    prompts.extend([prompt(17, 30), prompt(17, 31), prompt(32, 30)]);
    let free = within(&device, &prompts, &drawn(), &Limits::default());
    let sampling = Sampling { stop_ids: vec![free[0].ids[2], free[3].ids[4], free[6].ids[1]], ..drawn() };
    let together = within(&device, &prompts, &sampling, &Limits::default());
    assert!(together.iter().any(|made| made.finish == Finish::Stop), "some stop");
    assert!(together.iter().any(|made| made.finish == Finish::Length), "and some do not");
    for limits in [
        Limits { graphs: false, ..Limits::default() },
        // The longest needs 17 of them.
        Limits { live: 3, pages: 17, ..Limits::default() },
    ] {
        assert_eq!(within(&device, &prompts, &sampling, &limits), together, "{limits:?}");
    }
    for (prompt, expected) in prompts.iter().zip(&together).take(4) {
        let alone = within(&device, std::slice::from_ref(prompt), &sampling, &Limits::default());
        assert_eq!(alone, std::slice::from_ref(expected), "alone");
    }
}

#[test]
fn no_row_touches_what_is_anothers() {
    // Five completions are eight rows, three of them for nobody.
    let (prompts, sampling) = (prompts(&[3, 2, 17, 1, 3]), Sampling { max_tokens: 3, ..drawn() });
    for schedule in [
        Schedule { detector: true, ..Schedule::default() },
        Schedule { detector: true, order: Order::Random(3), ..Schedule::default() },
    ] {
        emulator::with(schedule, || within(&placed(gpu()), &prompts, &sampling, &Limits::default()));
    }
}

#[test]
fn a_completion_ends_at_a_stop_id_a_stop_text_or_its_length() {
    let device = placed(gpu());
    let prompts = prompts(&[6]);
    let run = |sampling: Sampling| within(&device, &prompts, &sampling, &Limits::default()).remove(0);
    let free = run(drawn());
    assert_eq!((free.ids.len(), free.finish), (9, Finish::Length));
    let at = free.ids.iter().position(|id| *id == free.ids[4]).unwrap();
    let stopped = run(Sampling { stop_ids: vec![free.ids[4]], ..drawn() });
    assert_eq!((&stopped.ids[..], stopped.finish), (&free.ids[..=at], Finish::Stop));
    assert_eq!(stopped.text, words(&free.ids[..at]));
    let text = format!("{} {} ", free.ids[2], free.ids[3]);
    assert_eq!(run(Sampling { stop: vec![text], ..drawn() }).finish, Finish::Stop);
    let short = run(Sampling { max_tokens: 1, ..drawn() });
    assert_eq!((&short.ids[..], short.finish), (&free.ids[..1], Finish::Length));
    assert!(run(Sampling { max_tokens: 0, ..drawn() }).ids.is_empty());
}

#[test]
fn a_model_that_has_diverged_is_named() {
    let mut model = model(false, Dtype::Bf16);
    model.update(|params| params[0].value.fill(f32::NAN));
    let device = Placed::new(model, &Device::Cuda(gpu())).unwrap();
    let result = generate(&device, &prompts(&[3]), &drawn(), &words, &mut |_| Ok(()), &Limits::default());
    assert_eq!(result.unwrap_err().code, "model::not_finite");
}

/// What a device was asked for, in numbers.
#[derive(Debug, Clone, Default, PartialEq)]
struct Counts {
    allocations: usize,
    uploads: usize,
    downloads: usize,
    downloaded: usize,
    graphs: usize,
    launches: BTreeMap<&'static str, usize>,
}

/// With as much memory as is said, counting.
struct Counting {
    counts: Arc<Mutex<Counts>>,
    free: usize,
}

impl Counting {
    fn gpu(free: usize) -> (Gpu, Arc<Mutex<Counts>>) {
        let counts = Arc::<Mutex<Counts>>::default();
        (Gpu::new(Box::new(Watched(PORTABLE, Counting { counts: counts.clone(), free }))), counts)
    }
}

impl Watcher for Counting {
    fn asked(&self, asked: &Asked) -> Result<(), Problem> {
        let mut counts = self.counts.lock().unwrap();
        match asked {
            Asked::Memory(_) => counts.allocations += 1,
            Asked::Upload(_) => counts.uploads += 1,
            Asked::Download(bytes) => {
                counts.downloads += 1;
                counts.downloaded += bytes;
            }
            Asked::Launch(kernel) => *counts.launches.entry(kernel).or_default() += 1,
            Asked::Graph => counts.graphs += 1,
        }
        Ok(())
    }

    fn memory(&self) -> Option<(usize, usize)> {
        Some((self.free, 16 << 30))
    }
}

#[test]
fn a_step_is_one_upload_one_graph_and_one_download_of_ids_and_log_probs() {
    let (gpu, asked) = Counting::gpu(16 << 30);
    let device = placed(gpu);
    let mut steps: Vec<Counts> = Vec::new();
    let mut on_step = |_| {
        steps.push(asked.lock().unwrap().clone());
        Ok(())
    };
    generate(&device, &prompts(&[3, 20, 7]), &drawn(), &words, &mut on_step, &Limits::default()).unwrap();
    // The prompts, a step by itself, a captured one, six more.
    assert_eq!(steps.len(), 9);
    for pair in steps[2..].windows(2) {
        let [before, after] = pair else { unreachable!() };
        assert_eq!(after.graphs - before.graphs, 1);
        assert_eq!(after.uploads - before.uploads, 1);
        assert_eq!(after.downloads - before.downloads, 1);
        assert_eq!(after.downloaded - before.downloaded, 4 * 8, "an id and a log-prob for each of four rows");
        assert_eq!(after.allocations, before.allocations);
        assert_eq!(after.launches, before.launches);
    }
}

/// Requests of all kinds.
fn asks() -> Vec<Ask> {
    let ask = |len, stream, top_logprobs, sampling| Ask { ids: prompt(len, 0).ids, stream, sampling, top_logprobs };
    vec![
        ask(3, 0, 0, Sampling { max_tokens: 12, ..Sampling::default() }),
        ask(40, 1, 3, drawn()),
        ask(17, 2, 0, Sampling { repetition_penalty: 1.0, temperature: 1.4, top_k: 0, seed: 1, ..drawn() }),
        ask(40, 3, 20, Sampling { temperature: 0.0, repetition_penalty: 1.7, id_limit: 150, ..drawn() }),
        ask(5, 4, 0, Sampling { top_p: 1.0, top_k: 4, max_tokens: 1, ..drawn() }),
        ask(40, 5, 0, Sampling { top_p: 0.5, top_k: 0, max_tokens: 20, ..drawn() }),
    ]
}

type Token = (u32, u32, Vec<(u32, u32)>);

/// The tokens of each request as they were told, numbers by their bits, and those that have ended.
#[derive(Default)]
struct Told(BTreeMap<usize, Vec<Token>>, Vec<Ticket>);

impl Told {
    fn step(&mut self, engine: &mut Engine, tickets: &[Ticket]) {
        for event in engine.step().unwrap() {
            match event {
                Event::Token { ticket, id, logprob, top } => {
                    let at = tickets.iter().position(|other| *other == ticket).unwrap();
                    let top = top.into_iter().map(|(id, p)| (id, p.to_bits())).collect();
                    self.0.entry(at).or_default().push((id, logprob.to_bits(), top));
                }
                Event::End { ticket, completion } => {
                    let at = tickets.iter().position(|other| *other == ticket).unwrap();
                    assert_eq!(completion.ids, self.0[&at].iter().map(|token| token.0).collect::<Vec<_>>());
                    self.1.push(ticket);
                }
            }
        }
    }
}

/// Each by itself.
fn alone(device: &Placed) -> Vec<Vec<Token>> {
    let one = |ask| {
        let limits = Limits { live: 1, longest: 64, ..Limits::default() };
        let mut engine = Engine::new(device, limits, &words).unwrap();
        let (tickets, mut told) = ([engine.submit(ask).unwrap()], Told::default());
        while !engine.is_idle() {
            told.step(&mut engine, &tickets);
        }
        told.0.remove(&0).unwrap()
    };
    asks().into_iter().map(one).collect()
}

#[test]
fn requests_of_all_kinds_have_the_same_bits_whenever_they_come_and_whoever_is_there() {
    let device = placed(gpu());
    let expected = alone(&device);
    let all = Limits { live: 8, longest: 64, ..Limits::default() };
    for (every, limits) in [(0, all.clone()), (2, all.clone()), (1, Limits { live: 3, pages: 7, graphs: false, ..all })]
    {
        let mut engine = Engine::new(&device, limits.clone(), &words).unwrap();
        let (mut told, mut tickets) = (Told::default(), Vec::new());
        for ask in asks() {
            tickets.push(engine.submit(ask).unwrap());
            (0..every).for_each(|_| told.step(&mut engine, &tickets));
        }
        while !engine.is_idle() {
            told.step(&mut engine, &tickets);
        }
        assert_eq!(told.1.len(), tickets.len());
        for (at, expected) in expected.iter().enumerate() {
            assert_eq!(told.0[&at], *expected, "request {at}, one every {every} steps, {limits:?}");
        }
    }
}

#[test]
fn the_likeliest_tokens_come_with_the_log_probs_of_the_model() {
    let (device, law) = (placed(gpu()), model(false, Dtype::Bf16));
    let (asked, all) = (asks(), alone(&device));
    for at in [1, 3] {
        let mut context = asked[at].ids.clone();
        for (id, logprob, top) in &all[at] {
            assert_eq!(top.len(), asked[at].top_logprobs);
            assert!(top.windows(2).all(|pair| f32::from_bits(pair[0].1) >= f32::from_bits(pair[1].1) - 1e-6));
            let logits = law.logits(&context);
            let last = &logits[logits.len() - 203..];
            let sum: f64 = last.iter().map(|logit| f64::from(*logit).exp()).sum();
            for (other, p) in top {
                let expected = f64::from(last[*other as usize]) - sum.ln();
                assert!((f64::from(f32::from_bits(*p)) - expected).abs() <= 0.08, "{other} of {top:?}");
                assert!(other != id || p == logprob, "one token, one log-prob");
                assert!(asked[at].sampling.id_limit == 0 || (*other as usize) < asked[at].sampling.id_limit);
            }
            context.push(*id);
        }
    }
}

#[test]
fn a_cancelled_request_gives_its_row_and_its_pages_to_the_next() {
    let device = placed(gpu());
    let expected = alone(&device);
    // Its three pages and the four of the last are all there are.
    let limits = Limits { pages: 7, longest: 64, ..Limits::default() };
    let mut engine = Engine::new(&device, limits, &words).unwrap();
    let long = Ask { ids: prompt(33, 7).ids, ..asks().remove(1) };
    let order = [1, 5, 2, 3].map(|at| asks().remove(at));
    let mut tickets = vec![engine.submit(long).unwrap()];
    tickets.extend(order.map(|ask| engine.submit(ask).unwrap()));
    let mut told = Told::default();
    (0..3).for_each(|_| told.step(&mut engine, &tickets));
    let waiting = engine.waiting();
    assert!(waiting > 0 && told.0.contains_key(&0));
    engine.cancel(tickets[0]);
    told.step(&mut engine, &tickets);
    assert!(engine.waiting() < waiting, "the next has begun");
    while !engine.is_idle() {
        told.step(&mut engine, &tickets);
    }
    assert_eq!(told.0[&0].len(), 3);
    assert_eq!(told.1.len(), 4);
    for (at, ask) in [(1, 1), (2, 5), (3, 2), (4, 3)] {
        assert_eq!(told.0[&at], expected[ask], "request {ask}");
    }
}

#[test]
fn graphs_are_replayed_for_requests_that_came_later_and_are_drawn_otherwise() {
    let (gpu, asked) = Counting::gpu(16 << 30);
    let device = placed(gpu);
    let mut engine = Engine::new(&device, Limits { live: 8, longest: 64, ..Limits::default() }, &words).unwrap();
    let graphs = || asked.lock().unwrap().graphs;
    let of = |stream, temperature| {
        let sampling = Sampling { max_tokens: 20, temperature, ..Sampling::default() };
        Ask { ids: prompt(5, stream).ids, stream, sampling, top_logprobs: 0 }
    };
    for stream in 0..3 {
        engine.submit(of(stream, 0.0)).unwrap();
    }
    // The prompts; steps of four rows by themselves and captured, then launched.
    (0..4).for_each(|_| drop(engine.step().unwrap()));
    assert_eq!(graphs(), 2);
    engine.submit(of(3, 1.2)).unwrap();
    engine.step().unwrap();
    assert_eq!((graphs(), engine.live()), (3, 4), "three of four rows, and one that begins");
    let launches = asked.lock().unwrap().launches.clone();
    (0..3).for_each(|_| assert_eq!(engine.step().unwrap().len(), 4));
    assert_eq!(graphs(), 6, "the fourth row was nobody's");
    assert_eq!(asked.lock().unwrap().launches, launches);
}

/// Steps, and launches of a kernel that runs in each layer of prompts alone.
fn effort(samples: &[Prompt], limits: &Limits) -> (Vec<Completion>, usize, usize) {
    let (gpu, asked) = Counting::gpu(16 << 30);
    let device = placed(gpu);
    let mut steps = 0;
    let mut on_step = |_| {
        steps += 1;
        Ok(())
    };
    let made = generate(&device, samples, &drawn(), &words, &mut on_step, limits).unwrap();
    let asked = asked.lock().unwrap();
    (made, steps, asked.launches["attention_forward_64"])
}

#[test]
fn samples_of_one_prompt_run_it_once_and_share_the_pages_that_it_fills() {
    // Forty tokens: two pages for all and half of one for each, which has room for the nine new ones.
    let samples: Vec<Prompt> = (0..4).map(|stream| prompt(40, stream)).collect();
    let alone: Vec<Completion> =
        samples.iter().map(|sample| effort(std::slice::from_ref(sample), &Limits::default()).0.remove(0)).collect();
    assert!(alone.iter().any(|made| made.ids != alone[0].ids), "samples differ");
    // Six pages are two completions without anything in common.
    let (made, steps, prompts) = effort(&samples, &Limits { pages: 6, ..Limits::default() });
    assert_eq!((steps, prompts), (9, 2), "all at once, and one prompt through two layers");
    assert_eq!(made, alone);
    // Those that come later find the prompt still there.
    let (made, steps, prompts) = effort(&samples, &Limits { live: 2, ..Limits::default() });
    assert_eq!((steps, prompts), (17, 2), "two at a time: when two end two begin");
    assert_eq!(made, alone);
    // Between them others, whose prompts are another's and stay for nobody.
    let mixed: Vec<Prompt> =
        samples.iter().flat_map(|sample| [sample.clone(), prompt(16, 90 + sample.stream)]).collect();
    let (made, _, _) = effort(&mixed, &Limits { live: 3, pages: 9, ..Limits::default() });
    let made: Vec<Completion> = made.into_iter().step_by(2).collect();
    assert_eq!(made, alone);
}

#[test]
fn a_prompt_stays_known_when_its_requests_have_ended_until_others_have_come() {
    let (gpu, asked) = Counting::gpu(16 << 30);
    let device = placed(gpu);
    let mut engine = Engine::new(&device, Limits { live: 16, longest: 64, ..Limits::default() }, &words).unwrap();
    let mut complete = |len: usize, stream: u64| {
        let sampling = Sampling { max_tokens: 4, temperature: 1.0, ..Sampling::default() };
        let ticket = engine.submit(Ask { ids: prompt(len, 0).ids, stream, sampling, top_logprobs: 0 }).unwrap();
        let mut told = Told::default();
        while !engine.is_idle() {
            told.step(&mut engine, &[ticket]);
        }
        let runs = asked.lock().unwrap().launches["attention_forward_64"] / 2;
        (told.0.remove(&0).unwrap(), runs)
    };
    let (first, runs) = complete(20, 1);
    assert_eq!(runs, 1);
    let (other, runs) = complete(20, 2);
    assert!(runs == 1 && other != first);
    assert_eq!(complete(20, 1), (first.clone(), 1));
    // Seven others beside it; the eighth takes its place.
    (21..28).for_each(|len| drop(complete(len, 1)));
    assert_eq!(complete(20, 1), (first.clone(), 8));
    (28..36).for_each(|len| drop(complete(len, 1)));
    assert_eq!(complete(20, 1), (first, 17));
}

#[test]
fn too_little_memory_for_one_completion_is_said_before_anything_runs() {
    let device = placed(Counting::gpu(1 << 20).0);
    let run =
        |device: &Placed, limits: &Limits| generate(device, &prompts(&[30]), &drawn(), &words, &mut |_| Ok(()), limits);
    let device_of_plenty = placed(gpu());
    let refused = [run(&device, &Limits::default()), run(&device_of_plenty, &Limits { pages: 2, ..Limits::default() })];
    for problem in refused.map(Result::unwrap_err) {
        assert_eq!((problem.code, problem.exit), ("cuda::out_of_memory", Exit::Missing));
        assert!(problem.message.contains("may need 48") && problem.help[0].contains("max_tokens"), "{problem}");
    }
    assert_eq!(run(&device_of_plenty, &Limits { pages: 3, ..Limits::default() }).unwrap().len(), 1);
}
