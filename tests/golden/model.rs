//! Logits, gradients, training runs, probes, decoding and merges of transformers, PEFT and TRL, each reached
//! with a manifest: through the ordinary command line on the processor, and through the CUDA kernels.

use super::bf16;
use super::study::{Place, Study, lines};
use super::support;
use super::{Golden, Report, beyond, distance, folders, json};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Every golden folder that holds a model, and what lines about it begin with.
fn models(place: Place) -> Vec<(String, PathBuf)> {
    let has_model = |folder: &PathBuf| folder.join("model/config.json").is_file();
    let on = if place == Place::Kernels { ", kernels" } else { "" };
    let name = |folder: &Path| format!("{}{on}", folder.file_name().unwrap().to_string_lossy());
    folders().into_iter().filter(has_model).map(|folder| (name(&folder), folder)).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn array(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

/// A sequence of which every token is looked at.
fn sequence(id: &str, ids: &[u32]) -> Value {
    json!({"id": id, "input_ids": ids, "labels": ids})
}

/// The rows of a padded batch without its padding, as records.
fn unpadded(batch: &Value, start: usize) -> Vec<Value> {
    let row = |(i, all): (usize, &Value)| {
        let kept: Vec<usize> = ids(&batch["attention_mask"][i])
            .iter()
            .enumerate()
            .filter(|(_, mask)| **mask == 1)
            .map(|(t, _)| t)
            .collect();
        let pick = |row: &Value| -> Vec<Value> { kept.iter().map(|&t| row[t].clone()).collect() };
        json!({"id": format!("row-{:04}", start + i), "input_ids": pick(all), "labels": pick(&batch["labels"][i])})
    };
    array(&batch["input_ids"]).iter().enumerate().map(row).collect()
}

/// The `lora` of a stage that continues an adapter folder.
fn lora(adapter: &Path) -> String {
    let config = json(adapter.join("adapter_config.json"));
    let (rank, alpha, targets) = (&config["r"], &config["lora_alpha"], &config["target_modules"]);
    format!("lora = {{ rank = {rank}, alpha = {alpha}, targets = {targets} }}\nadapter = \"continue\"")
}

/// `schedule` and `optimizer` of a golden run.
fn recipe(config: &Value, scheduler: &str, decay: &str) -> String {
    let kind = config[scheduler].as_str().unwrap().replace("cosine_with_restarts", "cosine-restarts");
    let kind = kind.replace("constant_with_warmup", "constant");
    let cycles = if kind == "cosine-restarts" { format!(", cycles = {}", config["cycles"]) } else { String::new() };
    format!(
        "learning_rate = {}\nschedule = {{ kind = \"{kind}\", warmup_ratio = {}{cycles} }}\n\
         optimizer = {{ beta1 = {}, beta2 = {}, epsilon = {}, weight_decay = {}, clip_norm = {} }}",
        config["lr"],
        config["warmup_ratio"],
        config["betas"][0],
        config["betas"][1],
        config["eps"],
        config[decay],
        config["max_grad_norm"],
    )
}

/// The emulator computes one to three thousand million operations a second: a run of at most so many tokens is done
/// whole through it, of a longer one the steps, one at least, that have at most so many.
const EMULATED_WHOLE: usize = 2_800;
const EMULATED_PART: usize = 1_700;

const NO_LIMIT: &str = "max_tokens = 1000000\nmax_completion_tokens = 1000000";

/// A probe that keeps logits.
fn logits_of(study: &mut Study, name: &str, model: &str, data: &str, keys: &str) {
    let all = format!("kind = \"probe\"\nmodel = \"{model}\"\ndata = \"{data}\"\nlogits = true\n{NO_LIMIT}\n{keys}");
    study.stage(name, &all);
}

/// Largest and mean difference of the tensors of an adapter folder from a golden's.
fn adapters_apart(folder: &Path, golden: &Path) -> (f64, f64) {
    let (ours, golden) = (Golden::open(folder.join("adapter_model.safetensors")), Golden::open(golden.to_path_buf()));
    let names: Vec<String> = golden.names().into_iter().filter(|name| !name.contains("base_layer")).collect();
    assert_eq!(ours.names(), names, "tensors of the adapter");
    let most = names.iter().map(|name| distance(&ours.f32(name), &golden.f32(name))).fold(0.0, worse);
    let (mut sum, mut count) = (0.0, 0);
    for name in &names {
        let (ours, golden) = (ours.f32(name), golden.f32(name));
        sum += ours.iter().zip(&golden).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
        count += ours.len();
    }
    (most, sum / count as f64)
}

/// The norm of the difference relative to the norm: of all tensors as one, and of the tensor where it is largest.
fn gradients_apart(got: &Golden, want: &Golden) -> (f64, f64) {
    let (mut all, mut worst) = ([0.0; 2], 0.0);
    for name in want.names() {
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let (got, want) = (got.f32(&name), want.f32(&name));
        let off = squares(&mut got.iter().zip(&want).map(|(a, b)| a - b));
        let size = squares(&mut want.iter().copied());
        all = [all[0] + off, all[1] + size];
        worst = worse(worst, (off / size).sqrt());
    }
    ((all[0] / all[1]).sqrt(), worst)
}

/// Whether only a part of what is there is looked at.
fn emulated(place: Place) -> bool {
    place == Place::Kernels && !support::on_device()
}

/// How many steps of a run, each of so many tokens, are compared. Through the emulator, later steps have records of two
/// or three tokens, so that the schedule stays what it was, and their results are not looked at.
fn steps_compared(place: Place, tokens: &[usize]) -> usize {
    if !emulated(place) || tokens.iter().sum::<usize>() <= EMULATED_WHOLE {
        return tokens.len();
    }
    let sums = tokens.iter().scan(0, |sum, tokens| {
        *sum += tokens;
        Some(*sum)
    });
    sums.take_while(|sum| *sum <= EMULATED_PART).count().max(1)
}

/// Tokens of a pair, its prompt counted on both sides.
fn pair_tokens(row: &Value) -> usize {
    let [prompt, chosen, rejected] = PAIR.map(|part| array(&row[part]).len());
    2 * prompt + chosen + rejected
}

const PAIR: [&str; 3] = ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"];

/// The larger one; NaN wins.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

#[test]
fn forward_passes_agree() {
    forward_passes(Place::Processor);
}

#[test]
fn forward_passes_agree_through_the_kernels() {
    forward_passes(Place::Kernels);
}

fn forward_passes(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let golden = Golden::open(folder.join("forward.safetensors"));
        let lengths: Vec<u64> = ids(&json(folder.join("forward.json"))["lengths"]).iter().map(|&t| t.into()).collect();
        let mut rows: Vec<Value> =
            lengths.iter().map(|t| sequence(&format!("T{t}"), &golden.ids(&format!("ids.T{t}")))).collect();
        // What a padded batch is for: each of its rows, as it stands alone.
        let mut padded = Vec::new();
        for side in ["right", "left"] {
            let (all, mask) = (golden.ids(&format!("{side}.ids")), golden.ids(&format!("{side}.mask")));
            let width = golden.shape(&format!("{side}.ids"))[1];
            for row in 0..all.len() / width {
                let at: Vec<usize> = (row * width..(row + 1) * width).filter(|&i| mask[i] == 1).collect();
                let id = format!("{side}-{row}");
                rows.push(sequence(&id, &at.iter().map(|&i| all[i]).collect::<Vec<_>>()));
                padded.push((side, id, at));
            }
        }
        let mut study = Study::of(&folder.join("model"), place);
        study.records("rows", &rows);
        logits_of(&mut study, "forward", "base", "rows", "hidden_states = true");
        let bf16 = folder.join("forward_bf16.safetensors");
        if bf16.is_file() {
            logits_of(&mut study, "forward-bf16", "base", "rows", "dtype = \"bf16\"");
        }
        study.run();
        let out = study.export("forward", &[]);
        let (logits, hidden) =
            (Golden::open(out.join("logits.safetensors")), Golden::open(out.join("hidden_states.safetensors")));
        let logprobs = lines(&out.join("logprobs.jsonl"));
        let (mut worst, mut states, mut logps) = (0.0, 0.0, 0.0);
        for t in &lengths {
            let want = golden.f32(&format!("logits.T{t}"));
            let got = logits.f32(&format!("final/T{t}"));
            worst = worse(worst, distance(&got[got.len() - want.len()..], &want));
            let got = hidden.f32(&format!("final/T{t}"));
            let one = got.len() / hidden.shape(&format!("final/T{t}"))[0];
            let state = |at: usize| &got[at * one..][..one];
            // Absolute, or for bf16 relative to the largest value.
            let off = |got: &[f32], want: &[f32]| {
                let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                distance(got, want) / place.bound(1.0, f64::from(largest))
            };
            states = worse(states, off(state(got.len() / one - 1), &golden.f32(&format!("last_hidden.T{t}"))));
            if golden.has(&format!("embed.T{t}")) {
                states = worse(states, off(state(0), &golden.f32(&format!("embed.T{t}"))));
                for layer in 0..got.len() / one - 2 {
                    let want = golden.f32(&format!("layer_out.{layer}.T{t}"));
                    states = worse(states, off(state(layer + 1), &want));
                }
            }
            if golden.has(&format!("logps.T{t}")) {
                let line = logprobs.iter().find(|line| line["id"] == format!("T{t}")).unwrap();
                let got: Vec<f32> = array(&line["logprobs"]).iter().map(|p| number(p) as f32).collect();
                logps = worse(logps, distance(&got, &golden.f32(&format!("logps.T{t}"))));
            }
        }
        report.line(&format!("{name}: logits"), worst, place.bound(5e-5, bf16::LOGIT));
        report.line(&format!("{name}: hidden states"), states, place.bound(5e-5, bf16::HIDDEN));
        report.line(&format!("{name}: token log-probs"), logps, place.bound(5e-5, bf16::LOGPROB));
        for side in ["right", "left"] {
            let want = golden.f32(&format!("{side}.logits"));
            let mut worst = 0.0;
            for (_, id, at) in padded.iter().filter(|(of, ..)| *of == side) {
                let got = logits.f32(&format!("final/{id}"));
                let vocab = got.len() / at.len();
                let want: Vec<f32> = at.iter().flat_map(|&i| &want[i * vocab..(i + 1) * vocab]).copied().collect();
                worst = worse(worst, distance(&got, &want));
            }
            report.line(&format!("{name}: logits of a batch padded {side}"), worst, place.bound(5e-5, bf16::LOGIT));
        }
        if bf16.is_file() {
            let got = Golden::open(study.export("forward-bf16", &[]).join("logits.safetensors"));
            let want = Golden::open(bf16);
            for tensor in want.names() {
                let Some(length) = tensor.strip_prefix("logits_bf16.") else { continue };
                let off = distance(&got.f32(&format!("final/{length}")), &want.f32(&tensor));
                report.line(&format!("{name}: bf16 logits, {length}"), off, bf16::LOGIT);
            }
        }
    }
    report.done();
}

#[test]
fn gradients_agree() {
    gradients(Place::Processor);
}

#[test]
fn gradients_agree_through_the_kernels() {
    gradients(Place::Kernels);
}

fn gradients(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let facts = json(folder.join("grads/grads.json"));
        let golden = Golden::open(folder.join("grads/logits_with_adapter.safetensors"));
        let mut study = Study::of(&folder.join("model"), place);
        study.adapter("start", &folder.join("grads/adapter"), "base");
        study.records("sequence", &[sequence("it", &golden.ids("ids"))]);
        logits_of(&mut study, "logits", "start", "sequence", "");
        let beta = number(&facts["dpo"]["beta"]);
        let rows = unpadded(&json(folder.join("grads/batch.json")), 0);
        study.records("rows", &rows);
        let once = |kind: &str, data: &str, batch: usize, keys: &str| {
            format!(
                "kind = \"{kind}\"\nmodel = \"start\"\ndata = \"{data}\"\n{}\nmax_steps = 1\nbatch_size = {batch}\n\
                 learning_rate = 0.0\nmax_tokens = 1000000\nkeep_gradients = [1]\n{keys}",
                lora(&folder.join("grads/adapter"))
            )
        };
        study.stage("sft", &once("sft", "rows", rows.len(), "shuffle = false"));
        let batch = json(folder.join("grads/dpo_batch.json"));
        let pairs = array(&batch["input_ids"]).len() / 2;
        // Chosen rows first, then as many rejected ones; both with their prompt.
        let pair = |i: usize| {
            let side = |row: usize| {
                let mask = ids(&batch["attention_mask"][row]);
                let all = ids(&batch["input_ids"][row]);
                let all: Vec<u32> = all.iter().zip(&mask).filter(|(_, mask)| **mask == 1).map(|(id, _)| *id).collect();
                let prompt = ids(&batch["completion_mask"][row]).iter().position(|&mask| mask == 1).unwrap();
                (all[..prompt].to_vec(), all[prompt..].to_vec())
            };
            let ((prompt, chosen), (same, rejected)) = (side(i), side(pairs + i));
            assert_eq!(prompt, same, "one prompt");
            json!({"prompt_input_ids": prompt, "chosen_input_ids": chosen, "rejected_input_ids": rejected})
        };
        let rows: Vec<Value> = (0..pairs).map(pair).collect();
        study.records("pairs", &rows);
        let longest = longest_completion(&rows);
        let keys = format!("shuffle = false\nreference = \"base\"\nbeta = {beta}");
        study.stage("dpo", &once("dpo", "pairs", pairs, &keys));
        study.run();

        let logits = Golden::open(study.export("logits", &[]).join("logits.safetensors"));
        let off = distance(&logits.f32("final/it"), &golden.f32("logits"));
        report.line(&format!("{name}: logits with an adapter"), off, place.bound(5e-5, bf16::LOGIT));
        let in_bf16 = |stage: &str| match stage {
            "sft" => (bf16::LOSS, bf16::GRADIENT, bf16::TENSOR),
            _ => {
                let loss = bf16::of_a_preference_loss(beta, longest);
                (loss, bf16::PREFERENCE_GRADIENT, bf16::PREFERENCE_GRADIENT)
            }
        };
        for (stage, facts, loss_bound, bound) in [("sft", &facts, 1e-5, 2e-6), ("dpo", &facts["dpo"], 1e-4, 3e-5)] {
            let (loss_in_bf16, gradient_in_bf16, tensor_in_bf16) = in_bf16(stage);
            let out = study.export(stage, &[]);
            let log = lines(&out.join("log.jsonl"));
            let off = (number(&log[0]["loss"]) - number(&facts["loss"])).abs();
            report.line(&format!("{name}: {stage} loss of one batch"), off, place.bound(loss_bound, loss_in_bf16));
            let off = (number(&log[0]["grad_norm"]) / number(&facts["grad_norm"]) - 1.0).abs();
            report.line(
                &format!("{name}: {stage} gradient norm of one batch (relative)"),
                off,
                place.bound(if stage == "sft" { 1e-5 } else { 1e-4 }, gradient_in_bf16),
            );
            let got = Golden::open(out.join("gradients/step-000001.safetensors"));
            let want = Golden::open(folder.join(format!("grads/grads_{stage}.safetensors")));
            assert_eq!(got.names(), want.names(), "a gradient per trained tensor");
            if place == Place::Kernels {
                let (all, tensor) = gradients_apart(&got, &want);
                report.line(&format!("{name}: {stage} gradients (relative, all as one)"), all, gradient_in_bf16);
                report.line(&format!("{name}: {stage} gradients (relative, worst tensor)"), tensor, tensor_in_bf16);
                continue;
            }
            let off = want.names().iter().map(|name| beyond(&got.f32(name), &want.f32(name), 1e-4)).fold(0.0, worse);
            report.line(&format!("{name}: {stage} gradients (beyond 1e-4 relative)"), off, bound);
        }
    }
    report.done();
}

#[test]
fn sft_runs_agree() {
    sft_runs(Place::Processor);
}

#[test]
fn sft_runs_agree_through_the_kernels() {
    sft_runs(Place::Kernels);
}

fn sft_runs(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let facts = json(folder.join("sft/sft.json"));
        let config = &facts["config"];
        let batches = json(folder.join("sft/batches.json"));
        let (mut rows, mut tokens) = (Vec::new(), Vec::new());
        for micros in array(&batches["steps"]) {
            let first = rows.len();
            for micro in array(micros) {
                rows.extend(unpadded(micro, rows.len()));
            }
            tokens.push(rows[first..].iter().map(|row| array(&row["input_ids"]).len()).sum());
        }
        let steps = steps_compared(place, &tokens);
        let whole = steps == tokens.len();
        let per_step = rows.len() / tokens.len();
        for row in &mut rows[steps * per_step..] {
            let ids = ids(&row["input_ids"]);
            row["input_ids"] = json!(ids[..2]);
            row["labels"] = json!([-100, ids[1]]);
        }
        let examples = json(folder.join("sft/examples.json"));
        let texts: Vec<Value> = array(&examples).iter().map(|row| json!({"text": row["text"]})).collect();
        let mut study = Study::of(&folder.join("model"), place);
        study.adapter("start", &folder.join("sft/adapter_init"), "base");
        study.records("rows", &rows);
        study.records("texts", &texts);
        study.stage("seen", "kind = \"dataset\"\nconcat = \"texts\"\ntokenize = { tokenizer = \"base\", format = \"text\", eos = \"keep\" }");
        let after = Golden::open(folder.join("sft/logits_after.safetensors"));
        study.records("sequences", &[sequence("0", &after.ids("ids.0")), sequence("1", &after.ids("ids.1"))]);
        let (size, accumulated) = (number(&config["bs"]) as usize, number(&config["ga"]) as usize);
        // The texts themselves, and the same as ids.
        let variants = [
            ("num_items", if place == Place::Processor { "texts" } else { "rows" }, "normalization = \"tokens\""),
            ("mean_of_means", "rows", "normalization = \"mean-of-means\""),
            ("bf16_autocast_num_items", "rows", "dtype = \"bf16\""),
        ];
        // How a step is normalised is the processor's affair; the kernels compute in bf16 in any case.
        let run_of = |variant: &'static str| if place == Place::Processor { variant } else { "num_items" };
        let facts_of = |variant: &str| facts.get(format!("variants.{variant}")).or(facts.get(variant));
        let wanted = |variant: &'static str| facts_of(variant).is_some() && run_of(variant) == variant;
        for (variant, data, keys) in variants.iter().filter(|(variant, ..)| wanted(variant)) {
            let all = format!(
                "kind = \"sft\"\nmodel = \"start\"\ndata = \"{data}\"\nformat = \"text\"\neos = \"keep\"\n{}\n\
                 max_steps = {}\nbatch_size = {}\nmicro_batch_size = {size}\nshuffle = false\nmax_tokens = 1000000\ncheckpointing = \"none\"\n{keys}\n{}",
                lora(&folder.join("sft/adapter_init")),
                config["steps"],
                size * accumulated,
                recipe(config, "sched", "weight_decay"),
            );
            study.stage(variant, &all);
            logits_of(&mut study, &format!("after-{variant}"), variant, "sequences", "");
        }
        study.run();

        let seen = lines(&study.export("seen", &[]).join("data.jsonl"));
        let wrong = seen.iter().zip(array(&examples)).filter(|(ours, row)| {
            let prompt = array(&ours["labels"]).iter().take_while(|label| **label == -100).count();
            ids(&ours["input_ids"]) != ids(&row["input_ids"]) || Some(prompt as u64) != row["prompt_len"].as_u64()
        });
        assert_eq!(seen.len(), array(&examples).len());
        report.line(&format!("{name}: texts with other ids or labels"), wrong.count() as f64, 0.0);
        for (variant, ..) in variants {
            let Some(want) = facts_of(variant) else { continue };
            if variant == "mean_of_means" && place == Place::Kernels {
                continue;
            }
            let out = study.export(run_of(variant), &[]);
            let log = lines(&out.join("log.jsonl"));
            assert_eq!(log.len(), array(&want["loss"]).len(), "steps");
            let off = |ours: &str, theirs: &str, relative: bool| {
                let pairs = log.iter().zip(array(&want[theirs])).take(steps);
                let off = pairs.map(|(line, want)| {
                    let (got, want) = (number(&line[ours]), number(want));
                    if relative { (got - want).abs() / want.abs().max(1e-12) } else { (got - want).abs() }
                });
                off.fold(0.0, worse)
            };
            let autocast = variant.starts_with("bf16");
            let bound = if autocast { bf16::LOSS } else { place.bound(1e-5, bf16::LOSS) };
            let label = format!("{name}: SFT losses of {steps} steps, {variant}");
            report.line(&label, off("loss", "loss", false), bound);
            if autocast {
                continue;
            }
            report.line(
                &format!("{name}: SFT gradient norms, {variant} (relative)"),
                off("grad_norm", "grad_norm", true),
                place.bound(1e-5, bf16::GRADIENT),
            );
            report.line(
                &format!("{name}: SFT learning rates, {variant} (relative)"),
                off("learning_rate", "lr", true),
                1e-9,
            );
            if !whole {
                continue;
            }
            let golden = folder.join("sft").join(variant).join("adapter_final/adapter_model.safetensors");
            let (most, mean) = adapters_apart(&out, &golden);
            if place == Place::Processor {
                report.line(&format!("{name}: SFT final adapter, {variant}"), most, 2e-5);
            } else {
                let off = mean / adapters_apart(&folder.join("sft/adapter_init"), &golden).1;
                report.line(&format!("{name}: SFT final adapter (mean, of the way to it)"), off, bf16::ADAPTER);
            }
            let logits = Golden::open(study.export(&format!("after-{variant}"), &[]).join("logits.safetensors"));
            for i in ["0", "1"] {
                let off = distance(&logits.f32(&format!("final/{i}")), &after.f32(&format!("{variant}.logits.{i}")));
                let bound = place.bound(5e-5, bf16::LOGIT);
                report.line(&format!("{name}: logits after SFT, {variant}, sequence {i}"), off, bound);
            }
        }
    }
    report.done();
}

#[test]
fn dpo_runs_agree() {
    dpo_runs(Place::Processor);
}

#[test]
fn dpo_runs_agree_through_the_kernels() {
    dpo_runs(Place::Kernels);
}

fn dpo_runs(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let mut runs: Vec<PathBuf> =
            std::fs::read_dir(folder.join("dpo")).unwrap().map(|entry| entry.unwrap().path()).collect();
        runs.retain(|path| path.join("dpo.json").is_file());
        runs.sort();
        if emulated(place) {
            // One run: a short one on a merged base if there is one. The first step of a continued one has the loss ln 2
            // whatever the model; a loss of others is that of the gradients above.
            let short = |run: &PathBuf| {
                let facts = json(run.join("dpo.json"));
                let tokens: usize = array(&facts["rows"]).iter().map(pair_tokens).sum();
                facts["config"]["policy"] == "merged" && tokens <= EMULATED_WHOLE
            };
            runs = vec![runs.iter().find(|run| short(run)).unwrap_or(&runs[0]).clone()];
        }
        let mut study = Study::of(&folder.join("model"), place);
        let pairs = json(folder.join("dpo/pairs.json"));
        study.records("pairs", array(&pairs));
        let mut compared = Vec::new();
        for run in &runs {
            let facts = json(run.join("dpo.json"));
            let (config, run_name) = (&facts["config"], run_name(run));
            let start = match config["policy"] == "merged" {
                true => folder.join("sft/num_items/adapter_final"),
                false => folder.join(config["start_adapter"].as_str().unwrap()),
            };
            study.adapter(&format!("sft-{run_name}"), &start, "base");
            let (mut model, mut adapter) = (format!("sft-{run_name}"), start.clone());
            if config["policy"] == "merged" {
                study.adapter(&format!("start-{run_name}"), &run.join("adapter_init"), &model);
                (model, adapter) = (format!("start-{run_name}"), run.join("adapter_init"));
            }
            let mut data = "pairs".to_string();
            let mut steps = number(&config["steps"]) as usize;
            if place == Place::Kernels {
                // The same pairs as ids, so that those of later steps can be shortened.
                let mut rows = array(&facts["rows"]).clone();
                let per_step = rows.len() / steps;
                let of_step = |rows: &[Value]| rows.iter().map(pair_tokens).sum::<usize>();
                steps = steps_compared(place, &rows.chunks(per_step).map(of_step).collect::<Vec<_>>());
                for row in &mut rows[steps * per_step..] {
                    let chosen = row["chosen_input_ids"][0].as_u64().unwrap();
                    let ids = [row["prompt_input_ids"][0].as_u64().unwrap(), chosen, u64::from(chosen == 0)];
                    PAIR.iter().zip(ids).for_each(|(part, id)| row[part] = json!([id]));
                }
                data = format!("pairs-{run_name}");
                study.records(&data, &rows);
            }
            compared.push(steps);
            let optional = |key: &str, value: &Value| match value.as_u64() {
                Some(value) => format!("{key} = {value}"),
                None => String::new(),
            };
            let prompt = optional("max_prompt_tokens", &config["max_prompt_length"]);
            let batch = number(&config["pairs_per_micro_batch"]) * number(&config["grad_accum"]);
            let all = format!(
                "kind = \"dpo\"\nmodel = \"{model}\"\ndata = \"{data}\"\nformat = \"text\"\neos = \"trl-0.24\"\n{}\n{prompt}\n\
                 max_tokens = {}\non_overlength = \"truncate\"\ntruncate_side = \"left\"\nbeta = {}\nshuffle = false\ncheckpointing = \"none\"\n\
                 max_steps = {}\nbatch_size = {batch}\n{}",
                lora(&adapter),
                config["max_length"].as_u64().unwrap_or(1_000_000),
                config["beta"],
                config["steps"],
                recipe(config, "scheduler", "wd"),
            );
            study.stage(&format!("dpo-{run_name}"), &all);
            let comma = if prompt.is_empty() { "" } else { ", " };
            let keys = format!(
                "kind = \"dataset\"\nconcat = \"pairs\"\ntokenize = {{ tokenizer = \"base\", format = \"text\", \
                 eos = \"trl-0.24\", on_overlength = \"truncate\", truncate_side = \"left\"{comma}{prompt} }}"
            );
            study.stage(&format!("seen-{run_name}"), &keys);
        }
        study.run();
        for (run, compared) in runs.iter().zip(compared) {
            let facts = json(run.join("dpo.json"));
            let config = &facts["config"];
            let label = format!("{name}: DPO {}", run.file_name().unwrap().to_string_lossy());
            let run_name = run_name(run);
            let (beta, longest) = (number(&config["beta"]), longest_completion(array(&facts["rows"])));
            let bounds = match place {
                Place::Processor => DpoBounds { loss: 1e-4, norm: 1e-4, logps: 1e-3 },
                Place::Kernels => DpoBounds {
                    loss: bf16::of_a_preference_loss(beta, longest),
                    norm: bf16::PREFERENCE_GRADIENT,
                    logps: bf16::of_a_sum(longest),
                },
            };
            let seen = lines(&study.export(&format!("seen-{run_name}"), &[]).join("data.jsonl"));
            let same = |ours: &Value, row: &Value| {
                ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"].iter().all(|key| ours[key] == row[key])
            };
            let wrong = seen.iter().zip(array(&facts["rows"])).filter(|(ours, row)| !same(ours, row)).count();
            report.line(&format!("{label} pairs with other ids"), wrong as f64, 0.0);

            let out = study.export(&format!("dpo-{run_name}"), &[]);
            let log = lines(&out.join("log.jsonl"));
            let steps = array(&facts["steps"]);
            assert_eq!(log.len(), steps.len(), "steps");
            let off = |ours: &str, theirs: &str, relative: bool| {
                let off = log.iter().zip(steps).take(compared).map(|(line, want)| {
                    let (got, want) = (number(&line[ours]), number(&want[theirs]));
                    if relative { (got - want).abs() / want.abs().max(1e-12) } else { (got - want).abs() }
                });
                off.fold(0.0, worse)
            };
            let first = (number(&log[0]["loss"]) - 2f64.ln()).abs();
            report.line(&format!("{label} first loss against ln 2"), first, 1e-6);
            report.line(&format!("{label} losses of {compared} steps"), off("loss", "loss", false), bounds.loss);
            let norms = off("grad_norm", "grad_norm", true);
            report.line(&format!("{label} gradient norms (relative)"), norms, bounds.norm);
            report.line(&format!("{label} learning rates (relative)"), off("learning_rate", "lr", true), 1e-9);
            let logps =
                worse(off("logps_chosen", "logps/chosen", false), off("logps_rejected", "logps/rejected", false));
            report.line(&format!("{label} summed log-probs"), logps, bounds.logps);
            let rewards = ["chosen", "rejected", "margins"]
                .map(|what| off(&format!("rewards_{what}"), &format!("rewards/{what}"), false));
            report.line(&format!("{label} rewards"), rewards.into_iter().fold(0.0, worse), beta * bounds.logps);
            if place == Place::Processor {
                let off = off("rewards_accuracies", "rewards/accuracies", false);
                report.line(&format!("{label} accuracies"), off, 1e-6);
            }
            let reference = lines(&out.join("reference.jsonl"));
            let per_step = reference.len() / steps.len();
            let wanted = steps.iter().flat_map(|step| array(&step["pairs"])).take(compared * per_step);
            let off = reference.iter().zip(wanted).flat_map(|(ours, want)| {
                ["chosen", "rejected"]
                    .map(|side| (number(&ours[side]) - number(&want[format!("ref_logp_{side}")])).abs())
            });
            let label_of_sums = format!("{label} summed log-probs of the reference");
            report.line(&label_of_sums, off.fold(0.0, worse), bounds.logps);
            if compared < steps.len() {
                continue;
            }
            let golden = run.join("adapter_final/adapter_model.safetensors");
            let (most, mean) = adapters_apart(&out, &golden);
            if place == Place::Processor {
                report.line(&format!("{label} final adapter"), most, 5e-4);
                report.line(&format!("{label} final adapter, mean"), mean, 1e-5);
            } else {
                let start = match config["policy"] == "merged" {
                    true => run.join("adapter_init"),
                    false => folder.join(config["start_adapter"].as_str().unwrap()),
                };
                let off = mean / adapters_apart(&start, &golden).1;
                report.line(&format!("{label} final adapter (mean, of the way to it)"), off, bf16::ADAPTER);
            }
        }
    }
    report.done();
}

fn longest_completion(rows: &[Value]) -> usize {
    rows.iter().flat_map(|row| PAIR[1..].iter().map(|side| array(&row[*side]).len())).max().unwrap()
}

struct DpoBounds {
    loss: f64,
    /// Relative.
    norm: f64,
    /// Of a sum over a completion; beta times that of a reward.
    logps: f64,
}

/// A run's folder name as part of a stage's name.
fn run_name(run: &Path) -> String {
    run.file_name().unwrap().to_string_lossy().replace('.', "-")
}

#[test]
fn probes_agree() {
    probes(Place::Processor);
}

#[test]
fn probes_agree_through_the_kernels() {
    probes(Place::Kernels);
}

fn probes(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let facts = json(folder.join("probe/probe.json"));
        let pairs = json(folder.join("probe/pairs.json"));
        let text =
            |pair: &Value| json!({"prompt": pair["prompt"], "chosen": pair["chosen"], "rejected": pair["rejected"]});
        let mut study = Study::of(&folder.join("model"), place);
        study.records("pairs", &array(&pairs).iter().map(text).collect::<Vec<_>>());
        let facts_of = |which: &str| &facts[format!("models.{which}")];
        let caps: Vec<u64> = array(&facts["caps"]).iter().map(|cap| cap.as_u64().unwrap()).collect();
        // Through the emulator, long completions under one model only.
        let caps_of = |which: &str| match emulated(place) && which != "sft" {
            true => vec![*caps.iter().min().unwrap()],
            false => caps.clone(),
        };
        for which in ["base", "sft", "dpo"] {
            let model = match facts_of(which)["adapter"].as_str() {
                Some(adapter) => {
                    study.adapter(&format!("model-{which}"), &folder.join(adapter), "base");
                    format!("model-{which}")
                }
                None => "base".to_string(),
            };
            let keys = format!(
                "kind = \"probe\"\naxes = {{ cap = {:?} }}\nmodel = \"{model}\"\ndata = \"pairs\"\nformat = \"text\"\n\
                 eos = \"keep\"\nmax_tokens = 1000000\nmax_completion_tokens = \"{{cap}}\"",
                caps_of(which)
            );
            study.stage(&format!("probe-{which}"), &keys);
        }
        study.run();
        let tokens = Golden::open(folder.join("probe/token_logps.safetensors"));
        for which in ["base", "sft", "dpo"] {
            let want = facts_of(which);
            let (mut alps, mut margins, mut per_token) = (0.0, 0.0, None);
            for cap in caps_of(which) {
                let out = study.export(&format!("probe-{which}[cap={cap}]"), &[]);
                let logprobs = lines(&out.join("logprobs.jsonl"));
                for row in array(&want["rows"]) {
                    let pair = row["pair"].as_u64().unwrap() as usize;
                    for side in ["chosen", "rejected"] {
                        let values: Vec<f64> = array(&logprobs[pair][side]).iter().map(number).collect();
                        let alp = values.iter().sum::<f64>() / values.len() as f64;
                        let row = &row["caps"][cap.to_string()];
                        alps = worse(alps, (alp - number(&row[format!("alp_{side}")])).abs());
                        assert_eq!(Some(values.len() as u64), row[format!("n_{side}")].as_u64(), "tokens counted");
                        let golden = format!("{which}.pair{pair}.{side}");
                        if tokens.has(&golden) {
                            let golden = tokens.f32(&golden);
                            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
                            let off = distance(&values, &golden[..values.len()]);
                            per_token = Some(worse(per_token.unwrap_or(0.0), off));
                        }
                    }
                }
                let measured = lines(&out.join("measurements.jsonl"));
                let margin = number(&want["mean_margin"][cap.to_string()]);
                margins = worse(margins, (number(&measured[0]["margin"]) - margin).abs());
            }
            report.line(&format!("{name}: average log-probs, {which}"), alps, place.bound(1e-5, bf16::LOSS));
            report.line(&format!("{name}: mean margins, {which}"), margins, place.bound(1e-5, bf16::LOSS));
            if let Some(per_token) = per_token {
                let label = format!("{name}: token log-probs of completions, {which}");
                report.line(&label, per_token, place.bound(5e-5, bf16::LOGPROB));
            }
        }
    }
    report.done();
}

#[test]
fn decoding_agrees() {
    decoding(Place::Processor);
}

#[test]
fn decoding_agrees_through_the_kernels() {
    decoding(Place::Kernels);
}

fn decoding(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let facts = json(folder.join("generate.json"));
        let mut study = Study::of(&folder.join("model"), place);
        let prompts = array(&facts["prompts"]);
        study.records("texts", &prompts.iter().map(|prompt| json!({"prompt": prompt["text"]})).collect::<Vec<_>>());
        study.records("ids", &prompts.iter().map(|prompt| json!({"input_ids": prompt["ids"]})).collect::<Vec<_>>());
        let stop = format!("stop_token_ids = [{}]", facts["greedy_eos"]["eos_token_id"]);
        let mut cases = vec![
            ("greedy", "base", "texts", "", &facts["greedy"]["new_ids"]),
            ("greedy-of-ids", "base", "ids", "", &facts["greedy"]["new_ids"]),
            ("greedy-to-a-stop-id", "base", "texts", stop.as_str(), &facts["greedy_eos"]["single_new_ids"]),
            (
                "greedy-with-a-penalty",
                "base",
                "texts",
                "repetition_penalty = 1.1",
                &facts["greedy_repetition_penalty_1.1"]["new_ids"],
            ),
        ];
        if let Some(want) = facts["greedy_sft_merged"].get("new_ids") {
            study.adapter("sft", &folder.join("sft/num_items/adapter_final"), "base");
            cases.push(("greedy-after-sft", "sft", "texts", "", want));
        }
        if place == Place::Kernels {
            cases.retain(|(case, ..)| *case != "greedy-of-ids"); // Where ids come from is no affair of the kernels.
        }
        for (case, model, data, keys, _) in &cases {
            let all = format!(
                "kind = \"generate\"\nmodel = \"{model}\"\ndata = \"{data}\"\nformat = \"text\"\nmax_tokens = {}\n\
                 ignore_eos = true\nunmapped_ids = true\ntoken_ids = \"new_ids\"\n{keys}",
                facts["max_new_tokens"]
            );
            study.stage(case, &all);
        }
        study.run();
        for (case, .., want) in cases {
            let made = lines(&study.export(case, &[]).join("data.jsonl"));
            assert_eq!(made.len(), array(want).len());
            if place == Place::Processor {
                let wrong = made.iter().zip(array(want)).filter(|(made, want)| made["new_ids"] != **want).count();
                report.line(&format!("{name}: completions that differ, {case}"), wrong as f64, 0.0);
            } else {
                let model = if case == "greedy-after-sft" { "sft" } else { "base" };
                let penalty = if case == "greedy-with-a-penalty" { 1.1 } else { 1.0 };
                let (behind, same, tokens) = choices_judged(&folder, model, penalty, prompts, &made, array(want));
                let label = format!("{name}: {case}, {same} of {tokens} ids; a choice is behind by");
                report.line(&label, behind, bf16::LOGIT);
            }
        }
    }
    report.done();
}

/// Greedy decoding through the kernels by the law in f32: how far, in logits, an id that was chosen is behind the best
/// one after the same ids; how many ids are the golden's, up to where a completion first differs; of how many. A golden
/// id that is ahead of all others by more than the bound of the former is therefore met.
fn choices_judged(
    folder: &Path,
    model: &str,
    penalty: f32,
    prompts: &[Value],
    made: &[Value],
    want: &[Value],
) -> (f64, usize, usize) {
    let mut study = Study::of(&folder.join("model"), Place::Processor);
    study.adapter("sft", &folder.join("sft/num_items/adapter_final"), "base");
    let sides = |i: usize| (ids(&prompts[i]["ids"]), ids(&made[i]["new_ids"]));
    let row = |i: usize| {
        let (prompt, new) = sides(i);
        sequence(&i.to_string(), &[prompt, new].concat())
    };
    study.records("rows", &(0..made.len()).map(row).collect::<Vec<_>>());
    logits_of(&mut study, "law", model, "rows", "");
    study.run();
    let law = Golden::open(study.export("law", &[]).join("logits.safetensors"));
    let (mut behind, mut same, mut tokens) = (0.0, 0, 0);
    for (i, want) in want.iter().enumerate() {
        let (prompt, new) = sides(i);
        let all = law.f32(&format!("final/{i}"));
        let vocab = all.len() / (prompt.len() + new.len());
        for (t, id) in new.iter().enumerate() {
            let mut logits = all[(prompt.len() - 1 + t) * vocab..][..vocab].to_vec();
            for seen in prompt.iter().chain(&new[..t]).collect::<BTreeSet<_>>() {
                let logit = &mut logits[*seen as usize];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
            let best = logits.iter().fold(f32::NEG_INFINITY, |best, &logit| best.max(logit));
            behind = worse(behind, f64::from(best - logits[*id as usize]));
        }
        let want = ids(want);
        tokens += want.len();
        same += new.iter().zip(&want).take_while(|(new, want)| new == want).count();
    }
    (behind, same, tokens)
}

#[test]
fn merges_agree() {
    merges(Place::Processor);
}

#[test]
fn merges_agree_through_the_kernels() {
    merges(Place::Kernels);
}

fn merges(place: Place) {
    let mut report = Report::new();
    for (name, folder) in models(place) {
        let golden = Golden::open(folder.join("merged/logits.safetensors"));
        let rows = [sequence("it", &golden.ids("ids"))];
        let mut study = Study::of(&folder.join("model"), place);
        study.records("rows", &rows);
        study.adapter("sft", &folder.join("sft/num_items/adapter_final"), "base");
        logits_of(&mut study, "of-base", "base", "rows", "");
        logits_of(&mut study, "of-sft", "sft", "rows", "");
        // The extra tensor that PEFT writes changes nothing.
        let peft = folder.join("sft/num_items/adapter_final_peft_default_save");
        if peft.is_dir() {
            study.adapter("peft", &peft, "base");
            logits_of(&mut study, "of-peft", "peft", "rows", "");
        }
        study.run();
        let logits = |study: &Study, stage: &str| {
            Golden::open(study.export(stage, &[]).join("logits.safetensors")).f32("final/it")
        };
        for (stage, want) in [("of-base", "logits_base"), ("of-sft", "logits_adapter"), ("of-peft", "logits_adapter")] {
            if stage != "of-peft" || peft.is_dir() {
                let off = distance(&logits(&study, stage), &golden.f32(want));
                report.line(&format!("{name}: logits, {stage}"), off, place.bound(5e-5, bf16::LOGIT));
            }
        }
        if place == Place::Kernels {
            continue; // Weights are folded by the processor, whatever the device.
        }
        let merged = study.export("sft", &["--merge", "--dtype", "f32", "--verify"]);
        let weights = Golden::open(folder.join("merged/merged_weights_fp32.safetensors"));
        let written = Golden::open(merged.join("model.safetensors"));
        let off = weights.names().iter().map(|name| distance(&written.f32(name), &weights.f32(name))).fold(0.0, worse);
        report.line(&format!("{name}: merged weights, {} tensors", weights.names().len()), off, 1e-6);
        let bf16 = folder.join("merged/merged_weights_bf16_peft.safetensors");
        if bf16.is_file() {
            let weights = Golden::open(bf16);
            let rounded = study.export("sft", &["--merge", "--dtype", "bf16", "--verify"]);
            let written = Golden::open(rounded.join("model.safetensors"));
            // PEFT rounds the update to bf16 before it adds it; the bound is that rounding.
            let names = weights.names();
            let off = names.iter().map(|name| beyond(&written.f32(name), &weights.f32(name), 1.0 / 256.0));
            report.line(&format!("{name}: merged bf16 weights (beyond one rounding)"), off.fold(0.0, worse), 1e-4);
        }
        let mut again = Study::of(&merged, place);
        again.records("rows", &rows);
        logits_of(&mut again, "of-merged", "base", "rows", "");
        again.run();
        let off = distance(&logits(&again, "of-merged"), &golden.f32("logits_merged"));
        report.line(&format!("{name}: logits, merged, exported and taken in again"), off, 5e-5);
    }
    report.done();
}
