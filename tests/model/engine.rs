//! Requests that come and go, each with parameters of its own.

use super::*;
use pipe::generation::{Ask, Completion, Engine, Event, Finish, Limits, Sampling, Ticket};
use pipe::model::{Device, Placed};
use std::collections::HashMap;

fn words(ids: &[u32]) -> String {
    ids.iter().map(|id| format!("{id} ")).collect()
}

fn placed() -> Placed {
    Placed::new(Model::random(config(false), 5, Dtype::F32), &Device::Cpu).unwrap()
}

fn ask(ids: &[u32], sampling: Sampling) -> Ask {
    Ask { ids: ids.to_vec(), stream: 3, sampling, top_logprobs: 0 }
}

/// Requests that have nothing in common but, some of them, the prompt.
fn asks() -> Vec<Ask> {
    let prompts = sequences(&[3, 70, 1, 25]);
    let drawn = Sampling { temperature: 1.3, max_tokens: 9, ..Sampling::default() };
    vec![
        ask(&prompts[0], Sampling { max_tokens: 12, ..Sampling::default() }),
        ask(&prompts[1], Sampling { top_p: 0.8, seed: 1, ..drawn.clone() }),
        ask(&prompts[2], Sampling { top_k: 5, temperature: 0.4, max_tokens: 30, ..drawn.clone() }),
        Ask {
            top_logprobs: 4,
            ..ask(&prompts[1], Sampling { repetition_penalty: 1.5, id_limit: 60, ..drawn.clone() })
        },
        ask(&prompts[3], Sampling { max_tokens: 1, ..drawn.clone() }),
        Ask { stream: 9, ..ask(&prompts[1], Sampling { seed: 2, ..drawn.clone() }) },
        ask(&prompts[0], Sampling { max_tokens: 0, ..drawn }),
    ]
}

/// What became of each request, tokens as they were told.
#[derive(Default)]
struct Told {
    tokens: HashMap<Ticket, Vec<(u32, u32)>>,
    tops: HashMap<Ticket, Vec<Vec<(u32, f32)>>>,
    ends: HashMap<Ticket, Completion>,
}

impl Told {
    fn step(&mut self, engine: &mut Engine) {
        let mut this_step: Vec<Ticket> = Vec::new();
        for event in engine.step().unwrap() {
            match event {
                Event::Token { ticket, id, logprob, top } => {
                    assert!(!this_step.contains(&ticket), "one token a step");
                    assert!(!self.ends.contains_key(&ticket), "nothing follows the end");
                    this_step.push(ticket);
                    self.tokens.entry(ticket).or_default().push((id, logprob.to_bits()));
                    self.tops.entry(ticket).or_default().push(top);
                }
                Event::End { ticket, completion } => {
                    let told = self.tokens.remove(&ticket).unwrap_or_default();
                    let logprobs = completion.logprobs.iter().map(|p| p.to_bits());
                    assert_eq!(told, completion.ids.iter().copied().zip(logprobs).collect::<Vec<_>>());
                    assert!(self.ends.insert(ticket, completion).is_none(), "one end");
                }
            }
        }
    }

    fn run(&mut self, engine: &mut Engine) {
        while !engine.is_idle() {
            self.step(engine);
        }
    }
}

/// Each by itself.
fn alone(placed: &Placed) -> Vec<Completion> {
    let one = |ask: Ask| {
        let mut engine = Engine::new(placed, Limits::default(), &words).unwrap();
        let (ticket, mut told) = (engine.submit(ask).unwrap(), Told::default());
        told.run(&mut engine);
        told.ends.remove(&ticket).unwrap()
    };
    asks().into_iter().map(one).collect()
}

#[test]
fn requests_of_all_kinds_have_the_same_bits_whenever_they_come_and_whoever_is_there() {
    let placed = placed();
    let expected = alone(&placed);
    assert!(expected[1].ids != expected[5].ids, "samples differ");
    // All at once, then one every few steps; with room for all, for two, and with pages for the longest alone.
    for (every, limits) in [
        (0, Limits::default()),
        (3, Limits::default()),
        (1, Limits { live: 2, ..Limits::default() }),
        (1, Limits { pages: 2, ..Limits::default() }),
        (0, Limits { pages: 3, ..Limits::default() }),
    ] {
        let mut engine = Engine::new(&placed, limits.clone(), &words).unwrap();
        let (mut told, mut tickets) = (Told::default(), Vec::new());
        for ask in asks() {
            tickets.push(engine.submit(ask).unwrap());
            (0..every).for_each(|_| told.step(&mut engine));
        }
        told.run(&mut engine);
        for (at, (ticket, expected)) in tickets.iter().zip(&expected).enumerate() {
            assert_eq!(told.ends[ticket], *expected, "request {at}, one every {every} steps, {limits:?}");
        }
    }
}

#[test]
fn the_likeliest_tokens_are_those_of_the_models_own_distribution() {
    let placed = placed();
    let mut engine = Engine::new(&placed, Limits::default(), &words).unwrap();
    let ask = asks().remove(3);
    let (ticket, mut told) = (engine.submit(ask.clone()).unwrap(), Told::default());
    told.run(&mut engine);
    let (made, mut context) = (&told.ends[&ticket], ask.ids.clone());
    for ((&id, &logprob), top) in made.ids.iter().zip(&made.logprobs).zip(&told.tops[&ticket]) {
        let logits = placed.logits(&context).unwrap();
        let last = &logits[logits.len() - 101..];
        let sum: f64 = last.iter().map(|logit| f64::from(*logit).exp()).sum();
        let mut order: Vec<u32> = (0..60).collect();
        order.sort_by(|&a, &b| last[b as usize].total_cmp(&last[a as usize]));
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..4]);
        for (id, p) in top {
            assert!((f64::from(*p) - (f64::from(last[*id as usize]) - sum.ln())).abs() <= 1e-5);
        }
        if let Some((_, same)) = top.iter().find(|(other, _)| *other == id) {
            assert_eq!(same.to_bits(), logprob.to_bits());
        }
        context.push(id);
    }
}

#[test]
fn a_cancelled_request_makes_room_at_once_and_nobody_notices() {
    let placed = placed();
    let long = Sampling { max_tokens: 40, temperature: 1.0, ..Sampling::default() };
    let prompts = sequences(&[30, 31, 32]);
    // Two pages each, and there are four.
    let mut engine = Engine::new(&placed, Limits { pages: 4, ..Limits::default() }, &words).unwrap();
    let tickets: Vec<Ticket> = prompts.iter().map(|ids| engine.submit(ask(ids, long.clone())).unwrap()).collect();
    let mut told = Told::default();
    (0..5).for_each(|_| told.step(&mut engine));
    assert_eq!((engine.live(), engine.waiting()), (2, 1));
    engine.cancel(tickets[0]);
    assert_eq!((engine.live(), engine.waiting()), (1, 1));
    told.step(&mut engine);
    assert_eq!((engine.live(), engine.waiting()), (2, 0), "the third has its pages");
    // One that waits, one that has not begun, and one that has ended.
    let fourth = engine.submit(ask(&prompts[0], long.clone())).unwrap();
    told.step(&mut engine);
    engine.cancel(fourth);
    let nothing = engine.submit(ask(&prompts[0], Sampling { max_tokens: 0, ..long.clone() })).unwrap();
    engine.cancel(nothing);
    told.run(&mut engine);
    engine.cancel(tickets[1]);
    assert_eq!(told.ends.len(), 2);
    for at in [1, 2] {
        let mut alone = Engine::new(&placed, Limits::default(), &words).unwrap();
        let (ticket, mut by_itself) = (alone.submit(ask(&prompts[at], long.clone())).unwrap(), Told::default());
        by_itself.run(&mut alone);
        assert_eq!(told.ends[&tickets[at]], by_itself.ends[&ticket]);
    }
    // Nothing was lost: one that needs every page is done.
    let all = Sampling { max_tokens: 257 - 30, ..long };
    let ticket = engine.submit(ask(&prompts[0], all)).unwrap();
    told.run(&mut engine);
    assert_eq!((told.ends[&ticket].finish, told.ends[&ticket].ids.len()), (Finish::Length, 227));
}

#[test]
fn first_come_first_served() {
    let placed = placed();
    let mut engine = Engine::new(&placed, Limits { pages: 3, ..Limits::default() }, &words).unwrap();
    let of = |max_tokens| ask(&[1, 2, 3], Sampling { max_tokens, ..Sampling::default() });
    let mut told = Told::default();
    // The second needs all pages, and the third, which would fit, does not overtake it.
    let tickets = [70, 150, 2].map(|max_tokens| engine.submit(of(max_tokens)).unwrap());
    told.step(&mut engine);
    assert_eq!((engine.live(), engine.waiting()), (1, 2));
    while !told.ends.contains_key(&tickets[1]) {
        assert!(!told.ends.contains_key(&tickets[2]));
        told.step(&mut engine);
    }
    told.run(&mut engine);
    assert_eq!(told.ends.len(), 3);
}

#[test]
fn what_can_never_be_done_is_refused_and_changes_nothing() {
    let placed = placed();
    let mut engine = Engine::new(&placed, Limits { pages: 4, ..Limits::default() }, &words).unwrap();
    let of = |ids: &[u32], max_tokens| ask(ids, Sampling { max_tokens, ..Sampling::default() });
    for (ask, code) in [
        (of(&[], 3), "model::empty_prompt"),
        (of(&[3, 101], 3), "model::id_out_of_range"),
        (of(&[3], 40_000), "model::context"),
        (of(&[3; 9], usize::MAX), "model::context"),
        (of(&vec![3; 40_000], 1), "model::context"),
        (of(&[3], 257), "model::pages"),
        (Ask { top_logprobs: 21, ..of(&[3], 3) }, "model::top_logprobs"),
        (ask(&[3], Sampling { top_p: -1.0, ..Sampling::default() }), "model::sampling"),
    ] {
        assert_eq!(engine.submit(ask).unwrap_err().code, code);
        assert!(engine.is_idle() && engine.waiting() == 0);
    }
    assert!(engine.submit(of(&[3], 256)).is_ok());
}
