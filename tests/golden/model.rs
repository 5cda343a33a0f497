//! Logits, gradients, training runs, probes, decoding and merges of transformers, PEFT and TRL.

use super::{Golden, Report, curve, distance, goldens, json};
use pipe::files::Files;
use pipe::model::{Batch, Gradients, LoadOptions, Model, Prompt, Sampling, generate};
use pipe::tensor::Dtype;
use pipe::train::{Curve, Kind, Optimizer, Options, Schedule, clip, global_norm};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Every folder below `PIPE_GOLDENS` that holds a model.
fn models() -> Vec<(String, PathBuf)> {
    let Some(folder) = goldens() else { return Vec::new() };
    let mut models: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("model/config.json").is_file())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .collect();
    models.sort();
    models
}

fn load(folder: &Path, adapters: &[&str], options: LoadOptions) -> Model {
    let folders: Vec<Files> =
        ["model"].iter().chain(adapters).map(|name| Files::from_dir(&folder.join(name)).unwrap()).collect();
    Model::load(&folders.iter().collect::<Vec<_>>(), &options).unwrap_or_else(|problem| panic!("{problem}"))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// Sequences with the positions that are predicted in each.
#[derive(Default)]
struct Rows {
    ids: Vec<u32>,
    lengths: Vec<usize>,
    rows: Vec<usize>,
    targets: Vec<u32>,
    /// How many rows each sequence has.
    counts: Vec<usize>,
}

impl Rows {
    /// A sequence; `learned(t)` says whether token t is a target.
    fn push(&mut self, ids: &[u32], learned: impl Fn(usize) -> bool) {
        let start = self.ids.len();
        let targets: Vec<usize> = (1..ids.len()).filter(|&t| learned(t)).collect();
        self.counts.push(targets.len());
        self.rows.extend(targets.iter().map(|t| start + t - 1));
        self.targets.extend(targets.iter().map(|&t| ids[t]));
        self.ids.extend(ids);
        self.lengths.push(ids.len());
    }

    fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, lengths: &self.lengths, rows: &self.rows, targets: &self.targets }
    }

    /// The sum over each sequence's rows, in f64.
    fn sums(&self, logprobs: &[f32]) -> Vec<f64> {
        let mut rest = logprobs;
        let mut sums = Vec::new();
        for count in &self.counts {
            let (these, others) = rest.split_at(*count);
            sums.push(these.iter().map(|&value| f64::from(value)).sum());
            rest = others;
        }
        sums
    }
}

/// The rows of a padded batch without its padding.
fn unpadded(batch: &Value, labels: &str) -> Rows {
    let mut rows = Rows::default();
    for i in 0..batch["input_ids"].as_array().unwrap().len() {
        let mask = ids(&batch["attention_mask"][i]);
        let all = ids(&batch["input_ids"][i]);
        let kept: Vec<u32> = all.iter().zip(&mask).filter(|(_, mask)| **mask == 1).map(|(id, _)| *id).collect();
        let marks = &batch[labels][i];
        rows.push(&kept, |t| if labels == "labels" { marks[t] != -100 } else { marks[t] == 1 });
    }
    rows
}

/// Largest |a - b| beyond `relative` of |b|.
fn beyond(a: &[f32], b: &[f32], relative: f64) -> f64 {
    let mut worst = 0.0f64;
    for (a, b) in a.iter().zip(b) {
        let over = f64::from((a - b).abs()) - relative * f64::from(b.abs());
        if over.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(over);
    }
    worst
}

#[test]
fn forward_passes_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let model = load(&folder, &[], LoadOptions::default());
        let golden = Golden::open(folder.join("forward.safetensors"));
        let vocab = model.config.vocab_size;
        let (mut logits, mut logps) = (0.0f64, 0.0f64);
        let mut packed = Rows::default();
        let mut expected = Vec::new();
        for length in json(folder.join("forward.json"))["lengths"].as_array().unwrap() {
            let tokens = golden.ids(&format!("ids.T{length}"));
            let want = golden.f32(&format!("logits.T{length}"));
            let got = model.logits(&tokens);
            logits = logits.max(distance(&got[got.len() - want.len()..], &want));
            if tokens.len() > 1 {
                packed.push(&tokens, |_| true);
                expected.extend(golden.f32(&format!("logps.T{length}")));
            }
        }
        logps = logps.max(distance(&model.logprobs(&packed.batch()), &expected));
        report.line(&format!("{name}: logits"), logits, 5e-5);
        report.line(&format!("{name}: log-probs, all sequences packed"), logps, 5e-5);
        for side in ["right", "left"] {
            let (all, mask) = (golden.ids(&format!("{side}.ids")), golden.ids(&format!("{side}.mask")));
            let width = golden.shape(&format!("{side}.ids"))[1];
            let want = golden.f32(&format!("{side}.logits"));
            let mut worst = 0.0f64;
            for row in 0..all.len() / width {
                let at: Vec<usize> = (row * width..(row + 1) * width).filter(|&i| mask[i] == 1).collect();
                let tokens: Vec<u32> = at.iter().map(|&i| all[i]).collect();
                let want: Vec<f32> = at.iter().flat_map(|&i| &want[i * vocab..(i + 1) * vocab]).copied().collect();
                worst = worst.max(distance(&model.logits(&tokens), &want));
            }
            report.line(&format!("{name}: logits of a batch padded {side}"), worst, 5e-5);
        }
        let bf16 = folder.join("forward_bf16.safetensors");
        if bf16.is_file() {
            let model = load(&folder, &[], LoadOptions { dtype: Dtype::Bf16, ..LoadOptions::default() });
            let bf16 = Golden::open(bf16);
            for tensor in bf16.names() {
                let Some(length) = tensor.strip_prefix("logits_bf16.") else { continue };
                let got = model.logits(&golden.ids(&format!("ids.{length}")));
                report.line(&format!("{name}: bf16 logits, {length}"), distance(&got, &bf16.f32(&tensor)), 0.3);
            }
        }
    }
    report.done();
}

#[test]
fn gradients_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let mut model = load(&folder, &["grads/adapter"], LoadOptions::default());
        let golden = Golden::open(folder.join("grads/logits_with_adapter.safetensors"));
        let difference = distance(&model.logits(&golden.ids("ids")), &golden.f32("logits"));
        report.line(&format!("{name}: logits with an adapter"), difference, 5e-5);

        let facts = json(folder.join("grads/grads.json"));
        let rows = unpadded(&json(folder.join("grads/batch.json")), "labels");
        let forward = model.forward(&rows.batch());
        let count = rows.targets.len() as f32;
        let loss = -forward.logprobs.iter().map(|&p| f64::from(p)).sum::<f64>() / f64::from(count);
        report.line(&format!("{name}: SFT loss"), (loss - number(&facts["loss"])).abs(), 1e-5);
        let mut grads = Gradients::zeros(&model);
        model.backward(forward.tape, &vec![-1.0 / count; rows.targets.len()], &mut grads);
        let golden = Golden::open(folder.join("grads/grads_sft.safetensors"));
        compare_gradients(&mut report, &format!("{name}: SFT gradients"), &model, &grads, &golden, 2e-6);

        let rows = unpadded(&json(folder.join("grads/dpo_batch.json")), "completion_mask");
        let reference = rows.sums(&model.base_logprobs(&rows.batch()));
        let forward = model.forward(&rows.batch());
        let policy = rows.sums(&forward.logprobs);
        let (loss, slopes) = dpo(&policy, &reference, number(&facts["dpo"]["beta"]));
        report.line(&format!("{name}: DPO loss"), (loss - number(&facts["dpo"]["loss"])).abs(), 1e-4);
        let mut grads = Gradients::zeros(&model);
        model.backward(forward.tape, &spread(&rows, &slopes), &mut grads);
        let golden = Golden::open(folder.join("grads/grads_dpo.safetensors"));
        compare_gradients(&mut report, &format!("{name}: DPO gradients"), &model, &grads, &golden, 3e-5);
    }
    report.done();
}

fn compare_gradients(report: &mut Report, what: &str, model: &Model, grads: &Gradients, golden: &Golden, bound: f64) {
    let mut worst = 0.0f64;
    for (param, grad) in model.params().iter().zip(&grads.values) {
        let over = beyond(grad, &golden.f32(&param.name), 1e-4);
        worst = if over.is_nan() { f64::NAN } else { worst.max(over) };
    }
    assert_eq!(model.params().len(), golden.file().len(), "one gradient per trained tensor");
    report.line(&format!("{what} (beyond 1e-4 relative)"), worst, bound);
}

/// Mean DPO loss of chosen rows followed by as many rejected ones, and its slope by each row's sum.
fn dpo(policy: &[f64], reference: &[f64], beta: f64) -> (f64, Vec<f64>) {
    let pairs = policy.len() / 2;
    let mut slopes = vec![0.0; policy.len()];
    let mut loss = 0.0;
    for i in 0..pairs {
        let margin = beta * ((policy[i] - reference[i]) - (policy[pairs + i] - reference[pairs + i]));
        loss += (1.0 + (-margin).exp()).ln() / pairs as f64;
        let slope = -beta / (1.0 + margin.exp()) / pairs as f64;
        slopes[i] = slope;
        slopes[pairs + i] = -slope;
    }
    (loss, slopes)
}

fn spread(rows: &Rows, slopes: &[f64]) -> Vec<f32> {
    rows.counts.iter().zip(slopes).flat_map(|(&count, &slope)| std::iter::repeat_n(slope as f32, count)).collect()
}

fn optimizer(model: &Model, config: &Value, decay: &str) -> Optimizer {
    let options = Options {
        beta1: number(&config["betas"][0]),
        beta2: number(&config["betas"][1]),
        epsilon: number(&config["eps"]),
        weight_decay: number(&config[decay]),
    };
    Optimizer::new(Kind::AdamW, options, model.params())
}

/// Norm before clipping.
fn update(model: &mut Model, optimizer: &mut Optimizer, grads: &mut Gradients, config: &Value, rate: f64) -> f64 {
    let norm = global_norm(grads);
    clip(grads, norm, number(&config["max_grad_norm"]));
    model.update(|params| optimizer.step(params, grads, rate));
    grads.clear();
    norm
}

#[test]
fn sft_runs_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let facts = json(folder.join("sft/sft.json"));
        let config = &facts["config"];
        let batches = json(folder.join("sft/batches.json"));
        let steps = batches["steps"].as_array().unwrap();
        for variant in ["num_items", "mean_of_means", "bf16_autocast_num_items"] {
            let Some(want) = facts.get(format!("variants.{variant}")).or(facts.get(variant)) else {
                continue;
            };
            let bf16 = variant.starts_with("bf16");
            let dtype = if bf16 { Dtype::Bf16 } else { Dtype::F32 };
            let mut model = load(&folder, &["sft/adapter_init"], LoadOptions { dtype, ..LoadOptions::default() });
            let curve = curve(&config["sched"], &config["cycles"]);
            let rate = number(&config["lr"]);
            let schedule = Schedule::new(curve, rate, number(&config["warmup_ratio"]), steps.len() as u64);
            let mut adamw = optimizer(&model, config, "weight_decay");
            let mut grads = Gradients::zeros(&model);
            let (mut loss_off, mut norm_off, mut rate_off) = (0.0f64, 0.0f64, 0.0f64);
            for (step, micros) in steps.iter().enumerate() {
                let micros: Vec<Rows> = micros.as_array().unwrap().iter().map(|m| unpadded(m, "labels")).collect();
                let total: usize = micros.iter().map(|rows| rows.targets.len()).sum();
                let mut loss = 0.0;
                for rows in &micros {
                    let count = if variant.ends_with("num_items") { total } else { rows.targets.len() * micros.len() };
                    let forward = model.forward(&rows.batch());
                    loss -= forward.logprobs.iter().map(|&p| f64::from(p)).sum::<f64>() / count as f64;
                    model.backward(forward.tape, &vec![-1.0 / count as f32; rows.targets.len()], &mut grads);
                }
                let rate = schedule.rate(step as u64);
                let norm = update(&mut model, &mut adamw, &mut grads, config, rate);
                loss_off = loss_off.max((loss - number(&want["loss"][step])).abs());
                if !bf16 {
                    norm_off = norm_off.max((norm / number(&want["grad_norm"][step]) - 1.0).abs());
                    let lr = number(&want["lr"][step]);
                    rate_off = rate_off.max((rate - lr).abs() / lr.max(1e-12));
                }
            }
            report.line(&format!("{name}: SFT losses, {variant}"), loss_off, if bf16 { 0.03 } else { 1e-5 });
            if bf16 {
                continue;
            }
            report.line(&format!("{name}: SFT gradient norms, {variant} (relative)"), norm_off, 1e-5);
            report.line(&format!("{name}: SFT learning rates, {variant} (relative)"), rate_off, 1e-9);
            let golden = folder.join("sft").join(variant).join("adapter_final/adapter_model.safetensors");
            let golden = Golden::open(golden);
            let off = model.params().iter().map(|param| distance(&param.value, &golden.f32(&param.name)));
            report.line(&format!("{name}: SFT final adapter, {variant}"), off.fold(0.0, f64::max), 2e-5);
        }
    }
    report.done();
}

#[test]
fn dpo_runs_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let mut runs: Vec<PathBuf> = std::fs::read_dir(folder.join("dpo"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("dpo.json").is_file())
            .collect();
        runs.sort();
        for run in runs {
            let label = format!("{name}: DPO {}", run.file_name().unwrap().to_string_lossy());
            let facts = json(run.join("dpo.json"));
            let config = &facts["config"];
            let merged = config["policy"] == "merged";
            let mut model = if merged {
                let init = run.strip_prefix(&folder).unwrap().join("adapter_init");
                load(&folder, &["sft/num_items/adapter_final", init.to_str().unwrap()], LoadOptions::default())
            } else {
                load(&folder, &[config["start_adapter"].as_str().unwrap()], LoadOptions::default())
            };
            let steps = facts["steps"].as_array().unwrap();
            let schedule = Schedule::new(
                Curve::Cosine,
                number(&config["lr"]),
                number(&config["warmup_ratio"]),
                steps.len() as u64,
            );
            let mut adamw = optimizer(&model, config, "wd");
            let mut grads = Gradients::zeros(&model);
            let all = facts["rows"].as_array().unwrap();
            let per_micro = config["pairs_per_micro_batch"].as_u64().unwrap() as usize;
            let micros = config["grad_accum"].as_u64().unwrap() as usize;
            let micro = |step: usize, micro: usize| {
                let first = (step * micros + micro) * per_micro;
                let mut rows = Rows::default();
                for side in ["chosen_input_ids", "rejected_input_ids"] {
                    for row in &all[first..first + per_micro] {
                        let prompt = ids(&row["prompt_input_ids"]);
                        let mut tokens = prompt.clone();
                        tokens.extend(ids(&row[side]));
                        let cut =
                            config["max_length"].as_u64().map_or(0, |max| tokens.len().saturating_sub(max as usize));
                        rows.push(&tokens[cut..], |t| t + cut >= prompt.len());
                    }
                }
                rows
            };
            // The reference is the model as it starts.
            let reference: Vec<Vec<Vec<f64>>> = (0..steps.len())
                .map(|step| {
                    (0..micros).map(|m| micro(step, m)).map(|rows| rows.sums(&model.logprobs(&rows.batch()))).collect()
                })
                .collect();
            let (mut loss_off, mut norm_off, mut sums_off, mut first_loss) = (0.0f64, 0.0f64, 0.0f64, f64::NAN);
            for (step, want) in steps.iter().enumerate() {
                let mut loss = 0.0;
                for m in 0..micros {
                    let rows = micro(step, m);
                    let forward = model.forward(&rows.batch());
                    let policy = rows.sums(&forward.logprobs);
                    let (micro_loss, mut slopes) = dpo(&policy, &reference[step][m], number(&config["beta"]));
                    slopes.iter_mut().for_each(|slope| *slope /= micros as f64);
                    loss += micro_loss / micros as f64;
                    model.backward(forward.tape, &spread(&rows, &slopes), &mut grads);
                    for i in 0..per_micro {
                        let pair = &want["pairs"][m * per_micro + i];
                        for (got, key) in [
                            (policy[i], "logp_chosen"),
                            (policy[per_micro + i], "logp_rejected"),
                            (reference[step][m][i], "ref_logp_chosen"),
                            (reference[step][m][per_micro + i], "ref_logp_rejected"),
                        ] {
                            sums_off = sums_off.max((got - number(&pair[key])).abs());
                        }
                    }
                }
                let norm = update(&mut model, &mut adamw, &mut grads, config, schedule.rate(step as u64));
                if step == 0 {
                    first_loss = loss;
                }
                loss_off = loss_off.max((loss - number(&want["loss"])).abs());
                norm_off = norm_off.max((norm / number(&want["grad_norm"]) - 1.0).abs());
            }
            report.line(&format!("{label} first loss against ln 2"), (first_loss - 2f64.ln()).abs(), 1e-6);
            report.line(&format!("{label} losses"), loss_off, 1e-4);
            report.line(&format!("{label} gradient norms (relative)"), norm_off, 1e-4);
            report.line(&format!("{label} summed log-probs"), sums_off, 1e-3);
            let golden = Golden::open(run.join("adapter_final/adapter_model.safetensors"));
            let off = model.params().iter().map(|param| distance(&param.value, &golden.f32(&param.name)));
            report.line(&format!("{label} final adapter"), off.fold(0.0, f64::max), 5e-4);
        }
    }
    report.done();
}

#[test]
fn probes_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let facts = json(folder.join("probe/probe.json"));
        let pairs = json(folder.join("probe/pairs.json"));
        for which in ["base", "sft", "dpo"] {
            let want = &facts[format!("models.{which}")];
            let adapters: Vec<&str> = want["adapter"].as_str().into_iter().collect();
            let model = load(&folder, &adapters, LoadOptions::default());
            let mut off = 0.0f64;
            for row in want["rows"].as_array().unwrap() {
                let pair = &pairs[row["pair"].as_u64().unwrap() as usize];
                let mut rows = Rows::default();
                for side in ["chosen_ids", "rejected_ids"] {
                    let mut tokens = ids(&pair["prompt_ids"]);
                    let prompt = tokens.len();
                    tokens.extend(ids(&pair[side]));
                    rows.push(&tokens, |t| t >= prompt);
                }
                let logprobs = model.logprobs(&rows.batch());
                let (chosen, rejected) = logprobs.split_at(rows.counts[0]);
                for (cap, want) in row["caps"].as_object().unwrap() {
                    let cap: usize = cap.parse().unwrap();
                    for (side, values) in [("chosen", chosen), ("rejected", rejected)] {
                        let n = values.len().min(cap);
                        let alp = values[..n].iter().map(|&p| f64::from(p)).sum::<f64>() / n as f64;
                        off = off.max((alp - number(&want[format!("alp_{side}")])).abs());
                    }
                }
            }
            report.line(&format!("{name}: average log-probs, {which}"), off, 1e-5);
        }
    }
    report.done();
}

#[test]
fn decoding_agrees() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let facts = json(folder.join("generate.json"));
        let all = facts["prompts"].as_array().unwrap();
        let prompts: Vec<Prompt> = all.iter().map(|prompt| Prompt { ids: ids(&prompt["ids"]), stream: 0 }).collect();
        let run = |model: &Model, sampling: &Sampling| -> Vec<Vec<u32>> {
            let completions = generate(model, &prompts, sampling, &|_| String::new(), &mut |_| Ok(())).unwrap();
            completions.into_iter().map(|completion| completion.ids).collect()
        };
        let wrong = |got: &[Vec<u32>], want: &Value| -> f64 {
            let want = want.as_array().unwrap();
            assert_eq!(got.len(), want.len());
            got.iter().zip(want).filter(|(got, want)| **got != ids(want)).count() as f64
        };
        let greedy = Sampling { max_tokens: facts["max_new_tokens"].as_u64().unwrap() as usize, ..Sampling::default() };
        let model = load(&folder, &[], LoadOptions::default());
        let off = wrong(&run(&model, &greedy), &facts["greedy"]["new_ids"]);
        report.line(&format!("{name}: greedy completions that differ"), off, 0.0);
        let stop_ids = vec![facts["greedy_eos"]["eos_token_id"].as_u64().unwrap() as u32];
        let off = wrong(&run(&model, &Sampling { stop_ids, ..greedy.clone() }), &facts["greedy_eos"]["single_new_ids"]);
        report.line(&format!("{name}: greedy completions to a stop id that differ"), off, 0.0);
        let penalty = Sampling { repetition_penalty: 1.1, ..greedy.clone() };
        let off = wrong(&run(&model, &penalty), &facts["greedy_repetition_penalty_1.1"]["new_ids"]);
        report.line(&format!("{name}: greedy completions with a penalty that differ"), off, 0.0);
        if let Some(want) = facts["greedy_sft_merged"].get("new_ids") {
            for fold_last in [false, true] {
                let options = LoadOptions { fold_last, ..LoadOptions::default() };
                let off = wrong(&run(&load(&folder, &["sft/num_items/adapter_final"], options), &greedy), want);
                report.line(
                    &format!("{name}: greedy completions after SFT that differ, folded: {fold_last}"),
                    off,
                    0.0,
                );
            }
        }
    }
    report.done();
}

#[test]
fn sampling_filters_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let golden = Golden::open(folder.join("sampling.safetensors"));
        let context = golden.ids("context_ids");
        for case in json(folder.join("sampling.json"))["cases"].as_array().unwrap() {
            let sampling = Sampling {
                temperature: number(&case["temperature"]),
                top_p: number(&case["top_p"]),
                top_k: case["top_k"].as_u64().unwrap() as usize,
                repetition_penalty: number(&case["repetition_penalty"]),
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

#[test]
fn merges_agree() {
    let mut report = Report::new();
    for (name, folder) in models() {
        let adapter = "sft/num_items/adapter_final";
        let golden = Golden::open(folder.join("merged/logits.safetensors"));
        let tokens = golden.ids("ids");
        let folded = load(&folder, &[adapter], LoadOptions { fold_last: true, ..LoadOptions::default() });
        let off = distance(&folded.logits(&tokens), &golden.f32("logits_merged"));
        report.line(&format!("{name}: logits, folded at load"), off, 5e-5);

        let active = load(&folder, &[adapter], LoadOptions::default());
        let off = distance(&active.logits(&tokens), &golden.f32("logits_adapter"));
        report.line(&format!("{name}: logits, adapter active"), off, 5e-5);

        let dir = tempfile::tempdir().unwrap();
        active.merged_save(dir.path(), pipe::model::weights::Element::F32).unwrap();
        let written = Golden::open(dir.path().join("model.safetensors"));
        let weights = Golden::open(folder.join("merged/merged_weights_fp32.safetensors"));
        let names = weights.names();
        let mut off = 0.0f64;
        for tensor in &names {
            off = off.max(distance(&written.f32(tensor), &weights.f32(tensor)));
        }
        report.line(&format!("{name}: merged weights, {} tensors", names.len()), off, 1e-6);
        let bf16 = folder.join("merged/merged_weights_bf16_peft.safetensors");
        if bf16.is_file() {
            let weights = Golden::open(bf16);
            active.merged_save(dir.path(), pipe::model::weights::Element::Bf16).unwrap();
            let written = Golden::open(dir.path().join("model.safetensors"));
            // PEFT rounds the update to bf16 before it adds it; the bound is that rounding.
            let names = weights.names();
            let off = names.iter().map(|name| beyond(&written.f32(name), &weights.f32(name), 1.0 / 256.0));
            report.line(&format!("{name}: merged bf16 weights (beyond one rounding)"), off.fold(0.0, f64::max), 1e-4);
            active.merged_save(dir.path(), pipe::model::weights::Element::F32).unwrap();
        }
        let again = Model::load(&[&Files::from_dir(dir.path()).unwrap()], &LoadOptions::default()).unwrap();
        let off = distance(&again.logits(&tokens), &golden.f32("logits_merged"));
        report.line(&format!("{name}: logits, merged, saved and loaded"), off, 5e-5);
        let off = distance(&load(&folder, &[], LoadOptions::default()).logits(&tokens), &golden.f32("logits_base"));
        report.line(&format!("{name}: logits, base"), off, 5e-5);
        // The extra tensor that PEFT writes changes nothing.
        let peft = folder.join("sft/num_items/adapter_final_peft_default_save");
        if peft.is_dir() {
            let model = load(&folder, &["sft/num_items/adapter_final_peft_default_save"], LoadOptions::default());
            let off = distance(&model.logits(&tokens), &golden.f32("logits_adapter"));
            report.line(&format!("{name}: logits, adapter as PEFT saves it by default"), off, 5e-5);
        }
    }
    report.done();
}
