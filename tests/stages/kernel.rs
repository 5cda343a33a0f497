use crate::{Bench, resolved};
use pipe::data::{self, Eos, Format, Limits, Sample, Tokenizer};
use pipe::files::Files;
use pipe::manifest::spec::Params;
use pipe::model::{Batch, Gradients, LoadOptions, Model};
use pipe::problem::Problem;
use pipe::stage::forecast::needs::{Data, Needs, Shape};
use pipe::stage::kernel::{KIND, STAGE, run};
use pipe::stage::{Artifact, sft};
use pipe::tensor::Dtype;
use serde_json::{Value, json};
use std::path::Path;

const TARGETS: [&str; 3] = ["q_proj", "v_proj", "down_proj"];

fn params(given: Value) -> Value {
    let mut params = json!({ "max_tokens": 100 });
    params.as_object_mut().unwrap().extend(given.as_object().unwrap().clone());
    resolved(&KIND, params)
}

/// Sums, some forward and some reverse.
fn sums(count: usize) -> Vec<Value> {
    let direction = |i| if i % 2 == 0 { "forward" } else { "reverse" };
    let sum = |i| json!({"id": format!("s{i}"), "prompt": format!("{i} + 1"), "answer": format!("{}", i + 1), "direction": direction(i)});
    (0..count).map(sum).collect()
}

/// A bench with these records and a model that has an adapter, trained for two steps so that neither half is zero.
fn bench(records: &[Value]) -> Bench {
    let mut bench = Bench::with_model("data", records);
    let lora = json!({"rank": 2, "alpha": 4.0, "targets": TARGETS});
    let training = json!({"learning_rate": 0.05, "max_steps": 2, "max_tokens": 100, "lora": lora, "schedule": {}, "optimizer": {}});
    let before = bench.inputs.remove("data").unwrap();
    let lines: String = sums(2).iter().map(|record| format!("{record}\n")).collect();
    let path = bench.write("training.jsonl", &lines);
    bench.give("data", "dataset", &[("data.jsonl", &path)]);
    bench.run(sft::run, resolved(&sft::KIND, training)).unwrap();
    let folder = bench.path("adapter");
    std::fs::rename(bench.path("out"), &folder).unwrap();
    std::fs::create_dir(bench.path("out")).unwrap();
    bench.inputs.insert("data".into(), before);
    let axes = pipe::plan::Axes::default();
    let files = Files::from_dir(&folder).unwrap();
    bench.inputs.get_mut("model").unwrap().push(Artifact { stage: "sft".into(), kind: "sft", axes, files });
    bench
}

/// The ids, and the matrix.
fn matrix(bench: &Bench) -> (Vec<String>, Vec<Vec<f64>>) {
    let text = bench.output("kernel.csv");
    let mut lines = text.lines().map(|line| line.split(',').map(str::to_string).collect::<Vec<_>>());
    let header = lines.next().unwrap();
    assert_eq!(header[0], "id");
    let ids = header[1..].to_vec();
    let rows: Vec<Vec<String>> = lines.collect();
    assert_eq!(rows.iter().map(|row| row[0].clone()).collect::<Vec<_>>(), ids, "rows are named as columns are");
    let numbers = |row: &Vec<String>| row[1..].iter().map(|text| text.parse().unwrap()).collect();
    (ids, rows.iter().map(numbers).collect())
}

/// A sequence as the model takes it.
struct Sequence {
    ids: Vec<u32>,
    rows: Vec<usize>,
    targets: Vec<u32>,
}

impl Sequence {
    fn of(sample: &Sample) -> Sequence {
        let rows: Vec<usize> = (1..sample.ids.len()).filter(|&t| sample.learned[t]).map(|t| t - 1).collect();
        let targets = rows.iter().map(|&row| sample.ids[row + 1]).collect();
        Sequence { ids: sample.ids.clone(), rows, targets }
    }

    fn logprob(&self, model: &Model) -> f64 {
        let lengths = [self.ids.len()];
        let batch = Batch { ids: &self.ids, lengths: &lengths, rows: &self.rows, targets: &self.targets };
        model.logprobs(&batch).iter().map(|&logprob| f64::from(logprob)).sum()
    }

    fn gradient(&self, model: &Model) -> Vec<f64> {
        let lengths = [self.ids.len()];
        let batch = Batch { ids: &self.ids, lengths: &lengths, rows: &self.rows, targets: &self.targets };
        let mut gradients = Gradients::zeros(model.params());
        let forward = model.forward(&batch);
        model.backward(forward.tape, &vec![1.0; self.rows.len()], &mut gradients);
        gradients.values.concat().into_iter().map(f64::from).collect()
    }
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

/// The model of a bench with all weights or its adapter to be trained, and the completions of the records.
fn by_hand(bench: &Bench, records: &[Value], everything: bool) -> (Model, Vec<Sequence>) {
    let chain: Vec<&Files> = bench.inputs["model"].iter().map(|artifact| &artifact.files).collect();
    let mut model = Model::load(&chain, &LoadOptions { dtype: Dtype::F32, fold_last: everything }).unwrap();
    if everything {
        model.train_all().unwrap();
    }
    let tokenizer = Tokenizer::load(chain[0]).unwrap();
    let records: Vec<data::Record> = records.iter().map(|record| record.as_object().unwrap().clone()).collect();
    let limits = Limits { eos: Eos::One, ..Limits::default() };
    let (samples, _) = data::samples(&records, &tokenizer, Format::Chat, &limits).unwrap();
    (model, samples.iter().map(Sequence::of).collect())
}

#[test]
fn the_matrix_holds_the_products_of_gradients_taken_one_by_one() {
    let records = sums(4);
    let bench = bench(&records);
    for everything in [false, true] {
        let parameters = if everything { "all" } else { "adapter" };
        bench.run(run, params(json!({ "parameters": parameters }))).unwrap();
        let (ids, rows) = matrix(&bench);
        assert_eq!(ids, ["s0", "s1", "s2", "s3"]);
        let (model, sequences) = by_hand(&bench, &records, everything);
        let gradients: Vec<Vec<f64>> = sequences.iter().map(|sequence| sequence.gradient(&model)).collect();
        for (o, row) in rows.iter().enumerate() {
            assert!(row[o] > 0.0, "{parameters}: example {o} has no gradient");
            for (u, value) in row.iter().enumerate() {
                let expected = dot(&gradients[o], &gradients[u]);
                let size = (rows[o][o] * rows[u][u]).sqrt();
                assert!((value - expected).abs() <= 1e-12 * size, "{parameters}, {o}, {u}: {value}, not {expected}");
                assert_eq!(*value, rows[u][o], "{parameters}: symmetric to the bit");
                assert!(value.abs() <= size * (1.0 + 1e-12), "{parameters}, {o}, {u}: Cauchy and Schwarz");
            }
        }
    }
}

/// That is what the kernel is for: a small step along the gradient of one example moves the other by their product.
#[test]
fn a_step_on_one_example_moves_another_by_their_product() {
    let records = sums(3);
    let bench = bench(&records);
    bench.run(run, params(json!({}))).unwrap();
    let (_, rows) = matrix(&bench);
    let (mut model, sequences) = by_hand(&bench, &records, false);
    let start: Vec<Vec<f32>> = model.params().iter().map(|param| param.value.clone()).collect();
    for u in 0..3 {
        let direction = sequences[u].gradient(&model);
        let mut moved = |step: f64, o: usize| {
            let mut direction = direction.iter();
            model.update(|params| {
                for (param, start) in params.iter_mut().zip(&start) {
                    let values = param.value.iter_mut().zip(start).zip(&mut direction);
                    values.for_each(|((value, start), slope)| *value = start + (step * slope) as f32);
                }
            });
            sequences[o].logprob(&model)
        };
        for o in 0..3 {
            let size = (rows[o][o] * rows[u][u]).sqrt();
            let step = 1e-2 / rows[u][u].sqrt();
            let measured = (moved(step, o) - moved(-step, o)) / (2.0 * step);
            assert!((measured - rows[o][u]).abs() <= 1e-2 * size, "{o}, {u}: {measured}, not {}", rows[o][u]);
        }
        moved(0.0, 0);
    }
}

#[test]
fn groups_have_means_over_pairs_of_different_examples() {
    let bench = bench(&sums(5));
    bench.run(run, params(json!({ "group_by": "direction" }))).unwrap();
    let (_, rows) = matrix(&bench);
    let lines = bench.lines("measurements.jsonl");
    let named: Vec<(&str, &str)> =
        lines.iter().map(|line| (line["group"].as_str().unwrap(), line["with"].as_str().unwrap())).collect();
    assert_eq!(named, [("forward", "forward"), ("forward", "reverse"), ("reverse", "reverse")]);
    let mean = |pairs: &[(usize, usize)], of: &dyn Fn(usize, usize) -> f64| {
        pairs.iter().map(|&(o, u)| of(o, u)).sum::<f64>() / pairs.len() as f64
    };
    let near = |value: &Value, expected: f64| {
        assert!((value.as_f64().unwrap() - expected).abs() <= 1e-12 * rows[0][0].max(1.0), "{value}, not {expected}");
    };
    let pairs: [&[(usize, usize)]; 3] =
        [&[(0, 2), (0, 4), (2, 4)], &[(0, 1), (0, 3), (2, 1), (2, 3), (4, 1), (4, 3)], &[(1, 3)]];
    for (line, pairs) in lines.iter().zip(pairs) {
        assert_eq!(line["pairs"], pairs.len());
        near(&line["kernel"], mean(pairs, &|o, u| rows[o][u]));
        near(&line["cosine"], mean(pairs, &|o, u| rows[o][u] / (rows[o][o] * rows[u][u]).sqrt()));
    }
    near(&lines[0]["kernel_self"], (rows[0][0] + rows[2][2] + rows[4][4]) / 3.0);
    assert_eq!((&lines[0]["examples"], &lines[2]["examples"]), (&json!(3), &json!(2)));
    assert!(lines[1].get("kernel_self").is_none(), "two groups share no example");
}

#[test]
fn both_sides_of_a_preference_are_examples_and_groups() {
    let pair = |i: u32| json!({"id": format!("p{i}"), "prompt": format!("{i} + 1"), "chosen": format!("{}", i + 1), "rejected": "9 9"});
    let bench = bench(&[pair(0), pair(1)]);
    bench.run(run, params(json!({}))).unwrap();
    assert_eq!(matrix(&bench).0, ["p0/chosen", "p0/rejected", "p1/chosen", "p1/rejected"]);
    let lines = bench.lines("measurements.jsonl");
    assert_eq!(lines.len(), 3);
    assert_eq!((&lines[1]["group"], &lines[1]["with"]), (&json!("all/chosen"), &json!("all/rejected")));
    assert_eq!(lines[1]["pairs"], 4);
}

#[test]
fn one_thread_and_two_write_the_same_bytes() {
    let bench = bench(&sums(6));
    let written = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bench.run(run, params(json!({ "parameters": "all" })))).unwrap();
        ["kernel.csv", "measurements.jsonl"].map(|name| bench.output(name))
    };
    let one = written(1);
    assert_eq!(bench.outputs(), ["kernel.csv", "measurements.jsonl"]);
    assert!(one == written(2), "bytes differ");
}

fn refused(bench: &Bench, given: Value) -> Problem {
    bench.run(run, params(given)).expect_err("a problem")
}

#[test]
fn a_model_without_an_adapter_is_refused_by_name() {
    let bench = Bench::with_model("data", &sums(2));
    let problem = refused(&bench, json!({}));
    assert_eq!(problem.code, "kernel::no_adapter");
    assert!(problem.message.contains("`base`"), "{problem}");
    assert!(problem.help.iter().any(|help| help.contains("parameters = \"all\"")), "{problem}");
    bench.run(run, params(json!({ "parameters": "all" }))).unwrap();
}

#[test]
fn records_that_cannot_be_told_apart_or_grouped_are_refused_by_name() {
    let mut records = sums(3);
    records[2]["id"] = json!("s0");
    let problem = refused(&bench(&records), json!({}));
    assert!(problem.code == "kernel::same_id" && problem.message.contains("`s0`"), "{problem}");
    let problem = refused(&bench(&sums(2)), json!({ "group_by": "way" }));
    assert!(problem.code == "kernel::no_group" && problem.message.contains("`way`"), "{problem}");
    assert!(problem.notes[0].contains("direction"), "{problem}");
}

#[test]
fn a_stop_is_heeded_between_examples() {
    let bench = bench(&sums(6));
    bench.stop_at.store(2, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(refused(&bench, json!({})).code, "exec::interrupted");
    assert!(bench.outputs().is_empty());
}

#[test]
fn the_gradients_of_all_examples_are_counted_before_it_runs() {
    let bench = bench(&sums(2));
    let files = |at: usize| &bench.inputs["model"][at].files;
    let adapter: &Path = files(1).get("adapter_config.json").unwrap();
    let shape = Shape {
        config: pipe::model::Config::load(files(0)).unwrap(),
        adapters: vec![pipe::model::LoraSpec::read(adapter).unwrap()],
    };
    let needs = |given: Value, records: usize, on_device: bool| -> Needs {
        let given: Params = params(given).as_object().unwrap().clone();
        let data = Data { records, tokens: 300 * records, longest: 300 };
        (STAGE.forecast)(&given).unwrap().computes().needs(&shape, Some(data), on_device)
    };
    for everything in [false, true] {
        let given = json!({ "parameters": if everything { "all" } else { "adapter" } });
        let values = by_hand(&bench, &sums(1), everything).0.trained_values() as u64;
        for on_device in [false, true] {
            // Enough to be more than a model that is on its way to a device.
            let more = 1 << 20;
            let [few, many] = [more, 2 * more].map(|records| needs(given.clone(), records, on_device));
            let grown = 4 * values * more as u64;
            assert_eq!(many.surely.host - few.surely.host, grown, "{given}, on a device: {on_device}");
            assert_eq!(many.most.host - few.most.host, 2 * grown, "both sides of preferences");
            assert_eq!(many.surely.device, few.surely.device);
            assert_eq!(many.most.lines.iter().map(|line| line.host).sum::<u64>(), many.most.host);
        }
        let dropped = json!({ "parameters": given["parameters"], "on_overlength": "drop" });
        assert!(needs(dropped, 1 << 20, false).surely.host < 1 << 30, "some may be left out");
    }
}
