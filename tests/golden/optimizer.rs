//! Parts with numbers of their own: schedules and sampling filters of transformers, 8-bit AdamW of bitsandbytes.

use super::{Golden, Report, curve, distance, folders, json, roots};
use pipe::generation::Sampling;
use pipe::model::{Gradients, Parameter};
use pipe::train::adamw8bit::{SIGNED, UNSIGNED};
use pipe::train::{AdamW8bit, Options, Schedule};
use std::path::Path;

#[test]
fn schedules_are_those_of_transformers() {
    let mut report = Report::new();
    let files = roots().into_iter().map(|root| root.join("schedules.json")).filter(|file| file.is_file());
    for case in files.flat_map(|file| json(file).as_array().unwrap().clone()) {
        let name = case["scheduler"].as_str().unwrap();
        let curve = curve(&case["scheduler"], &case["num_cycles"]);
        let steps = case["total_steps"].as_u64().unwrap();
        let schedule = Schedule::new(curve, 1.0, case["warmup_ratio"].as_f64().unwrap(), steps);
        assert_eq!(schedule.warmup_steps, case["warmup_steps"].as_u64().unwrap());
        let mut worst = 0.0f64;
        for (step, expected) in case["multiplier"].as_array().unwrap().iter().enumerate() {
            let expected = expected.as_f64().unwrap();
            let difference = (schedule.multiplier(step as u64) - expected).abs() / expected.max(1e-9);
            worst = worst.max(difference);
        }
        report.line(&format!("schedule {name} of {steps} steps (relative)"), worst, 1e-9);
    }
    report.done();
}

#[test]
fn eight_bit_adamw_is_that_of_bitsandbytes() {
    let mut report = Report::new();
    for folder in folders().into_iter().filter(|folder| folder.join("adamw8bit.json").is_file()) {
        eight_bit_adamw(&mut report, &folder);
    }
    report.done();
}

fn eight_bit_adamw(report: &mut Report, folder: &Path) {
    let maps = json(folder.join("dynamic_maps.json"));
    for (name, map) in [("signed", &SIGNED), ("unsigned", &UNSIGNED)] {
        let expected: Vec<f32> = maps[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        report.line(&format!("8-bit {name} map"), distance(&map[..], &expected), 0.0);
    }
    let golden = Golden::open(folder.join("adamw8bit.safetensors"));
    let settings = json(folder.join("adamw8bit.json"));
    let number = |key: &str| settings[key].as_f64().unwrap();
    let options = Options {
        beta1: settings["betas"][0].as_f64().unwrap(),
        beta2: settings["betas"][1].as_f64().unwrap(),
        epsilon: number("eps"),
        weight_decay: number("weight_decay"),
    };
    for name in ["a", "b", "small"] {
        let start = format!("param0.{name}");
        let mut params = vec![Parameter { name: name.into(), shape: golden.shape(&start), value: golden.f32(&start) }];
        let mut adamw = AdamW8bit::new(options, &params);
        for step in 0..10 {
            let grads = Gradients { values: vec![golden.f32(&format!("grad{step}.{name}"))] };
            adamw.step(&mut params, &grads, number("lr"));
            let key = |what: &str| format!("nearest.step{step}.{what}.{name}");
            if !golden.has(&key("param")) {
                continue;
            }
            let difference = distance(&params[0].value, &golden.f32(&key("param")));
            report.line(&format!("8-bit step {step} parameter {name}"), difference, 1e-6);
            if let Some((first, second)) = adamw.codes(0)
                && golden.has(&key("state1"))
            {
                for (what, codes) in [("state1", first), ("state2", second)] {
                    let expected = golden.u8(&key(what));
                    let differing = codes.iter().zip(&expected).filter(|(a, b)| a != b).count();
                    report.line(&format!("8-bit step {step} {what} {name} (codes that differ)"), differing as f64, 0.0);
                }
            }
        }
    }
}

#[test]
fn sampling_filters_are_those_of_transformers() {
    let mut report = Report::new();
    for folder in folders().into_iter().filter(|folder| folder.join("sampling.json").is_file()) {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let golden = Golden::open(folder.join("sampling.safetensors"));
        let context = golden.ids("context_ids");
        for case in json(folder.join("sampling.json"))["cases"].as_array().unwrap() {
            let number = |key: &str| case[key].as_f64().unwrap();
            let sampling = Sampling {
                temperature: number("temperature"),
                top_p: number("top_p"),
                top_k: number("top_k") as usize,
                repetition_penalty: number("repetition_penalty"),
                ..Sampling::default()
            };
            let want = golden.f32(&format!("probs.{}", case["case"]));
            let mut got = vec![0.0; want.len()];
            for (id, probability) in sampling.candidates(&mut golden.f32("logits"), &context) {
                got[id as usize] = probability as f32;
            }
            report.line(&format!("{name}: sampling probabilities, case {}", case["case"]), distance(&got, &want), 1e-6);
        }
    }
    report.done();
}
