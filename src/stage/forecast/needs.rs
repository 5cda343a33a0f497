//! What a cell will need of a machine, from its parameters and the shape of its model: for the plan, for the look
//! before a run, and for the message where memory runs out all the same.
//!
//! The largest micro-batch is what the keys allow, or less where the data are known and cannot fill it. Two needs
//! come of it: `surely`, for micro-batches as large as `micro_batch_tokens` says, and `most`, for examples and
//! prompts as long as they may be. Tokens of data are counted by their bytes: none has less than one.

use crate::data::Tokenizer;
use crate::files::Files;
use crate::manifest::spec::{Lineage, Params};
use crate::model::lora::{self, ADAPTER_CONFIG};
use crate::model::memory::{Decode, Extent, Need, Plan, Trained, Work};
use crate::model::{Config, LoraSpec, fit};
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::share::bundled;
use crate::stage::share::inputs::Storage;
use crate::stage::share::training;
use crate::tensor::Dtype;
use crate::train;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// A model as a stage takes it: the shape of its base, and the adapters on it in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub config: Config,
    pub adapters: Vec<LoraSpec>,
}

impl Shape {
    /// Of the model that all adapters are folded into.
    pub fn whole(mut self) -> Config {
        untie(&mut self.config, &self.adapters);
        self.config
    }
}

/// How much data there is, by the bytes of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    pub records: usize,
    /// Tokens of all, and of the longest one, at most.
    pub tokens: usize,
    pub longest: usize,
}

/// What a cell needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Needs {
    /// If the data fill micro-batches as they are asked for.
    pub surely: Need,
    /// If they are as long as the keys let them be.
    pub most: Need,
    /// Whether it goes faster with more memory than `most`, and takes it from what a device has.
    pub takes_more: bool,
    /// Updates of a training stage, where they are known.
    pub steps: Option<u64>,
    /// Bytes on disk, of a training stage: weights at the end and at its checkpoints, states to resume from.
    pub disk: u64,
}

/// Tokens that templates and end marks add to the text of a record, generously.
const MARKUP: usize = 256;
/// Beyond this nothing is a token count that means anything; it keeps sums from overflowing.
const MOST_TOKENS: usize = 1 << 32;

impl Data {
    /// Of `data.jsonl` of a dataset; `None` if it cannot be read.
    pub fn of(files: &Files) -> Option<Data> {
        let bytes = std::fs::read(files.get("data.jsonl")?).ok()?;
        let lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::len).filter(|length| *length > 0);
        let empty = Data { records: 0, tokens: 0, longest: 0 };
        Some(lines.fold(empty, |data, length| Data {
            records: data.records + 1,
            tokens: data.tokens + length + MARKUP,
            longest: data.longest.max(length + MARKUP),
        }))
    }
}

/// Whether stages of this kind compute with a model whose size is at stake.
pub fn computes(kind: &str) -> bool {
    ["sft", "dpo", "probe", "generate", "eval"].contains(&kind)
}

/// What a cell of `kind` needs with a model of `shape`; `None` for kinds that compute with none, or if the
/// parameters are not such a kind's. `data` are the records it takes, if they are there.
pub fn needs(kind: &str, params: &Params, shape: &Shape, data: Option<Data>, on_device: bool) -> Option<Needs> {
    let dtype = Storage::deserialize(params.get("dtype")?).ok()?.dtype();
    let mut config = shape.config.clone();
    match kind {
        "sft" | "dpo" => {
            let lora = params.get("lora").map(LoraSpec::deserialize).transpose().ok()?;
            let continues = params.get("adapter").and_then(Value::as_str) == Some("continue");
            let folded = if continues { shape.adapters.len().saturating_sub(1) } else { shape.adapters.len() };
            untie(&mut config, &shape.adapters[..folded]);
            let trained = lora.as_ref().map_or(Trained::Everything, Trained::Adapter);
            let optimizer = params.get("optimizer")?.get("kind")?.as_str()?;
            let optimizer = if optimizer == "adamw-8bit" { train::Kind::AdamW8bit } else { train::Kind::AdamW };
            let state_sizes = |values| optimizer.state_sizes(values);
            let kept = match params.get("checkpointing").and_then(Value::as_str) {
                Some("none") => usize::MAX,
                // Then as many as there is room for.
                Some("fit") if on_device => fit::LEAST_ON_DEVICE,
                _ => 0,
            };
            let offload = params.get("offload").and_then(Value::as_bool) == Some(true);
            let of = |extent| {
                let work = Work::Train { extent, kept, offload, graphs: false, state_sizes: &state_sizes };
                Plan { config: &config, dtype, trained, on_device, work }.need()
            };
            let (surely, most) = batches(kind, params, data)?;
            let steps = count(params, "max_steps").or_else(|| steps(params, data?)).map(|steps| steps as u64);
            let measure = Work::Measure { extent: Extent::full(1, 1), logits: false, hidden_states: false };
            let plan = Plan { config: &config, dtype, trained, on_device, work: measure };
            let state_bytes = |values| optimizer.state_sizes(values).iter().sum();
            let (weights, states) = (4 * plan.trained_values(), plan.sum_of(&state_bytes));
            // The two newest states are kept while it trains.
            let disk = weights.saturating_mul(1 + checkpoints(params, steps)).saturating_add(2 * (weights + states));
            // For insides of layers, or to capture steps.
            let fits = params.get("checkpointing").and_then(Value::as_str) == Some("fit");
            let takes_more = on_device && (fits || !offload);
            Some(Needs { surely: of(surely), most: of(most), takes_more, steps, disk })
        }
        "probe" => {
            let folded = shape.adapters.len().saturating_sub(1);
            untie(&mut config, &shape.adapters[..folded]);
            let trained = shape.adapters.last().map_or(Trained::Nothing, Trained::Adapter);
            let says = |key: &str| params.get(key).and_then(Value::as_bool) == Some(true);
            let of = |extent| {
                let (logits, hidden_states) = (says("logits"), says("hidden_states"));
                let work = Work::Measure { extent, logits, hidden_states };
                Plan { config: &config, dtype, trained, on_device, work }.need()
            };
            let (surely, most) = batches(kind, params, data)?;
            Some(Needs { surely: of(surely), most: of(most), takes_more: false, steps: None, disk: 0 })
        }
        "generate" | "eval" => {
            // In f32 the last adapter is folded in too.
            let active = if dtype == Dtype::Bf16 { shape.adapters.last() } else { None };
            untie(&mut config, &shape.adapters[..shape.adapters.len() - usize::from(active.is_some())]);
            let trained = active.map_or(Trained::Nothing, Trained::Adapter);
            let thinks = params.get("thinking").and_then(Value::as_object);
            let thinking = thinks.and_then(|table| count(table, "max_tokens")).map_or(0, |tokens| tokens + MARKUP);
            let max_tokens = count(params, "max_tokens")?.saturating_add(thinking);
            let limit = count(params, "limit").unwrap_or(usize::MAX);
            let records = data.map_or(usize::MAX, |data| data.records).min(limit);
            let completions = records.saturating_mul(count(params, "n")?).min(count(params, "batch")?).max(1);
            // A longer prompt is refused by the stage.
            let room = config.max_position_embeddings.saturating_sub(max_tokens).max(1);
            let asked: usize =
                ["prompt", "system", "prefill"].iter().filter_map(|key| Some(params.get(*key)?.as_str()?.len())).sum();
            let prompt = match data {
                Some(data) if !params.contains_key("prompt_file") => room.min(data.longest + asked),
                _ => room,
            };
            let of = |prompt: usize| {
                let longest = prompt.saturating_add(max_tokens).min(MOST_TOKENS);
                let work = Work::Decode(Decode::new(&config, on_device, completions, longest, prompt));
                Plan { config: &config, dtype, trained, on_device, work }.need()
            };
            Some(Needs { surely: of(1), most: of(prompt), takes_more: on_device, steps: None, disk: 0 })
        }
        _ => None,
    }
}

/// A head that an adapter which is folded in has changed is no longer the embedding.
fn untie(config: &mut Config, folded: &[LoraSpec]) {
    config.tie_word_embeddings &= !folded.iter().any(|spec| spec.targets.iter().any(|target| target == "lm_head"));
}

fn count(params: &Params, key: &str) -> Option<usize> {
    params.get(key)?.as_u64().map(|count| usize::try_from(count).unwrap_or(MOST_TOKENS).min(MOST_TOKENS))
}

/// The micro-batch that the keys ask for, and the largest that they allow.
fn batches(kind: &str, params: &Params, data: Option<Data>) -> Option<(Extent, Extent)> {
    // A preference counts with both sides.
    let sides = if kind == "sft" { 1 } else { 2 };
    let max_tokens = count(params, "max_tokens")?;
    let one = data.map_or(max_tokens, |data| max_tokens.min(data.longest));
    let example = one.saturating_mul(sides);
    let all = data.map_or(MOST_TOKENS, |data| data.tokens.saturating_mul(sides));
    let batch = count(params, "batch_size").unwrap_or(MOST_TOKENS).saturating_mul(example).min(all);
    let budget = count(params, "micro_batch_tokens")?;
    let (surely, most) = match count(params, "micro_batch_size") {
        Some(size) => (budget.min(size.saturating_mul(example)), size.saturating_mul(example)),
        None => (budget, budget.max(example)),
    };
    let extent = |tokens: usize| Extent::full(tokens.min(batch).clamp(1, MOST_TOKENS), one);
    Some((extent(surely), extent(most)))
}

/// Updates of a training stage over so many records, none of them dropped.
fn steps(params: &Params, data: Data) -> Option<usize> {
    let steps = training::Steps::new(data.records, count(params, "batch_size")?, params.get("epochs")?.as_f64()?, None);
    usize::try_from(steps.total).ok()
}

/// Checkpoints that are kept in the artifact beside the end; those of an unknown number of steps are not counted.
fn checkpoints(params: &Params, steps: Option<u64>) -> u64 {
    let number = |key: &str| params.get(key).and_then(Value::as_f64);
    let kept = match (number("save_every_epochs"), number("save_every_steps"), steps) {
        (Some(every), _, _) => number("epochs").unwrap_or(1.0) / every,
        (None, Some(every), Some(steps)) => steps as f64 / every,
        _ => return 0,
    };
    kept.ceil() as u64 + 1
}

/// The configuration that a cell of kind `model` comes to, before it has run: from the folder its `source` came to,
/// from what is bundled, or from its `init` table. `None` if it is an adapter or its files say nothing.
pub fn config_of_model(
    params: &Params,
    source: Option<&Path>,
    tokenizer: Option<&Path>,
) -> Option<Result<Config, Problem>> {
    let text = params.get("source")?.as_str()?;
    match text.strip_prefix("init:") {
        None => {
            let files = Files::from_dir(source?).ok()?;
            files.get("config.json")?;
            Some(Config::load(&files))
        }
        Some("random") => {
            let mut fields = params.get("init")?.as_object()?.clone();
            if !fields.contains_key("vocab_size") {
                let ids = match params.get("tokenizer")?.as_str()?.strip_prefix("init:") {
                    Some(name) => bundled::id_limit(name)?,
                    None => Tokenizer::load(&Files::from_dir(tokenizer?).ok()?).ok()?.id_limit(),
                };
                fields.insert("vocab_size".into(), ids.into());
            }
            fields.insert("model_type".into(), "qwen2".into());
            Some(Config::from_map(fields))
        }
        Some(name) => {
            let text = bundled::file(name, "config.json")?;
            Some(Config::parse(std::str::from_utf8(text).ok()?))
        }
    }
}

/// The adapter that a cell adds to the chain of its model, by its parameters or, of an imported one, by its folder.
pub fn adapter_of(kind: &str, params: &Params, source: Option<&Path>) -> Option<LoraSpec> {
    match kind {
        "sft" | "dpo" => params.get("lora").map(LoraSpec::deserialize)?.ok(),
        "model" => LoraSpec::read(&source?.join(ADAPTER_CONFIG)).ok(),
        _ => None,
    }
}

/// Whether a training cell yields a whole model, of the shape it was given.
pub fn yields_whole(kind: &str, params: &Params) -> bool {
    ["sft", "dpo"].contains(&kind) && training::lineage(params) == Lineage::Whole
}

/// The shape of the model that a running stage was given, by its files.
fn shape(ctx: &Context) -> Option<Shape> {
    let (base, adapters) = ctx.inputs("model").split_first()?;
    let config = Config::load(&base.files).ok()?;
    let spec = |artifact: &crate::stage::context::Artifact| {
        lora::is_adapter(&artifact.files).then(|| LoraSpec::read(artifact.files.get(ADAPTER_CONFIG)?).ok()).flatten()
    };
    Some(Shape { config, adapters: adapters.iter().map(spec).collect::<Option<_>>()? })
}

/// What to say where a device ran out of memory while a stage worked: where it was, what takes how much, what helps.
pub(in crate::stage) fn explained(
    problem: Problem,
    kind: &str,
    ctx: &Context,
    at: Option<(u64, u64, &'static str)>,
) -> Problem {
    if problem.code != "cuda::out_of_memory" {
        return problem;
    }
    let mut problem = problem;
    problem.message = match at {
        // What counts is what is done: the one at work is the next.
        Some((done, total, "steps")) => {
            format!("{} (`{}`, at step {} of {total})", problem.message, ctx.label, done + 1)
        }
        Some((done, total, unit)) => format!("{} (`{}`, after {done} of {total} {unit})", problem.message, ctx.label),
        None => format!("{} (`{}`, before its first step)", problem.message, ctx.label),
    };
    let slot = if kind == "eval" { "task" } else { "data" };
    let data = ctx.inputs(slot).first().and_then(|artifact| Data::of(&artifact.files));
    let needs = shape(ctx).and_then(|shape| needs(kind, ctx.params, &shape, data, true));
    if let Some(needs) = needs {
        let bound = if needs.takes_more { "at least" } else { "at most" };
        problem = problem.note(format!("it was expected to take {bound}\n{}", needs.most.table()));
        problem.help.splice(0..0, help(kind, ctx.params, true));
    }
    let kept = match kind {
        "sft" | "dpo" => "the last state that was kept stays: the next run goes on from it",
        "generate" | "eval" => "the completions that were journalled stay: the next run goes on from them",
        _ => return problem,
    };
    problem.note(kept)
}

/// What makes a cell need less, the gentlest first.
pub fn help(kind: &str, params: &Params, on_device: bool) -> Vec<String> {
    let mut help = Vec::new();
    let says = |key: &str, value: &str| params.get(key).and_then(Value::as_str) == Some(value);
    if says("checkpointing", "none") {
        help.push(
            "`checkpointing = \"layers\"` keeps one activation a layer: the same bits, a third more time".to_string(),
        );
    }
    if let Some(budget) = count(params, "micro_batch_tokens").filter(|budget| *budget > 256) {
        help.push(format!("`micro_batch_tokens = {}`: the same batch in smaller parts", budget / 2));
    }
    if ["sft", "dpo"].contains(&kind) {
        if on_device && params.get("offload").and_then(Value::as_bool) != Some(true) {
            help.push("`offload = true` leaves the inputs of layers to the host's memory: the same bits".to_string());
        }
        if !params.contains_key("lora") {
            help.push("`lora = { rank = 16, alpha = 32 }` trains an adapter in place of every weight".to_string());
        } else if let Some(rank) = params["lora"].get("rank").and_then(Value::as_u64).filter(|rank| *rank > 8) {
            help.push(format!("`lora.rank = {}`", rank / 2));
        }
        if params.get("optimizer").and_then(|optimizer| optimizer.get("kind")).is_some_and(|kind| kind == "adamw") {
            help.push("`optimizer.kind = \"adamw-8bit\"` takes a quarter for its states".to_string());
        }
    }
    if says("dtype", "f32") {
        help.push("`dtype = \"bf16\"` halves the weights on the host".to_string());
    }
    if let Some(tokens) = count(params, "max_tokens") {
        help.push(format!("a `max_tokens` below {tokens}, if the data are shorter"));
    }
    help
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::memory::Part;
    use serde_json::json;

    fn params(value: Value) -> Params {
        value.as_object().unwrap().clone()
    }

    fn sft(more: Value) -> Params {
        let mut all = params(json!({
            "max_tokens": 1000, "batch_size": 8, "micro_batch_tokens": 4096, "epochs": 2.0, "dtype": "f32",
            "optimizer": {"kind": "adamw"}, "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj"]},
        }));
        all.extend(params(more));
        all
    }

    fn shape() -> Shape {
        let config = json!({
            "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        });
        Shape { config: Config::parse(&config.to_string()).unwrap(), adapters: Vec::new() }
    }

    fn tokens(params: &Params, data: Option<Data>) -> (usize, usize) {
        let (surely, most) = batches("sft", params, data).unwrap();
        (surely.tokens, most.tokens)
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
        let steps = |more: Value, data| needs("sft", &sft(more), &shape(), data, false).unwrap().steps;
        assert_eq!(steps(json!({}), None), None);
        assert_eq!(steps(json!({}), Some(data)), Some(6));
        assert_eq!(steps(json!({"max_steps": 4}), None), Some(4));
        // Rank 4 on q_proj, 64 to 64, of two layers: 1,024 values; at the start, after steps 2 and 4, and as artifact.
        let disk = |more: Value| needs("sft", &sft(more), &shape(), None, false).unwrap().disk;
        assert_eq!(disk(json!({"max_steps": 4, "save_every_steps": 2})), 4 * 4096 + 2 * (4096 + 8192));
        assert_eq!(disk(json!({"max_steps": 4})), 4096 + 2 * (4096 + 8192));
    }

    #[test]
    fn each_advice_makes_the_need_smaller() {
        let given = sft(json!({"checkpointing": "none", "lora": {"rank": 64, "alpha": 8.0, "targets": ["q_proj"]}}));
        let need = |params: &Params, on_device: bool| {
            // With two layers the one that is worked at and the next are all of them.
            let mut shape = shape();
            shape.config.num_hidden_layers = 4;
            let need = needs("sft", params, &shape, None, on_device).unwrap().surely;
            if on_device { need.device } else { need.host }
        };
        assert_eq!(help("sft", &given, false).len(), 6);
        let advice = help("sft", &given, true);
        assert_eq!(advice.len(), 7, "{advice:?}");
        for (key, value) in [
            ("checkpointing", json!("layers")),
            ("offload", json!(true)),
            ("micro_batch_tokens", json!(2048)),
            ("lora", json!({"rank": 32, "alpha": 8.0, "targets": ["q_proj"]})),
            ("optimizer", json!({"kind": "adamw-8bit"})),
            ("dtype", json!("bf16")),
        ] {
            let mut taken = given.clone();
            taken.insert(key.into(), value);
            // The storage of weights is the host's, the inputs of layers are in the way on a device.
            assert!(key == "offload" || need(&taken, false) < need(&given, false), "{key}");
            assert!(key == "dtype" || need(&taken, true) < need(&given, true), "{key}");
            assert!(advice.iter().any(|line| line.contains(key)), "{key}: {advice:?}");
        }
    }

    #[test]
    fn what_is_kept_as_memory_allows_is_needed_for_the_last_layer_only() {
        let need = |more: Value, on_device| needs("sft", &sft(more), &shape(), None, on_device).unwrap();
        let of = |checkpointing: &str, on_device| need(json!({"checkpointing": checkpointing}), on_device);
        assert_eq!(of("fit", false), of("layers", false));
        let (least, fit, most) = (of("layers", true), of("fit", true), of("none", true));
        assert!(least.most.device <= fit.most.device && fit.most.device < most.most.device);
        let offloaded = |checkpointing: &str| need(json!({"checkpointing": checkpointing, "offload": true}), true);
        assert!(fit.takes_more && least.takes_more && offloaded("fit").takes_more);
        assert!(!offloaded("layers").takes_more && !of("fit", false).takes_more, "neither is captured");
    }

    #[test]
    fn beside_a_device_the_host_holds_weights_and_what_waits_there() {
        let need = |more: Value| needs("sft", &sft(more), &shape(), None, true).unwrap().most;
        let (plain, offloaded) = (need(json!({})), need(json!({"offload": true})));
        for part in [Part::Gradients, Part::Layer, Part::Head, Part::Activations] {
            assert!(plain.of(part).0 == 0 && plain.of(part).1 > 0, "{part}");
        }
        // The inputs of two layers; one of them is on the device too, one that was there is not.
        let inputs = 2 * 4096 * 64 * 2;
        assert_eq!(offloaded.of(Part::Activations).0, inputs);
        assert_eq!(offloaded.host, plain.host + inputs);
        // Doubling what is trained leaves gradients and optimizer to the device.
        let wide = need(json!({"lora": {"rank": 8, "alpha": 8.0, "targets": ["q_proj"]}}));
        assert_eq!(wide.of(Part::Trained).0, 2 * plain.of(Part::Trained).0);
        assert_eq!(wide.host - plain.host, plain.of(Part::Trained).0);
    }

    #[test]
    fn completions_on_a_device_need_pages_for_one_and_a_workspace_for_all() {
        let params = |more: Value| {
            let mut all = params(json!({
                "max_tokens": 100, "batch": 64, "n": 1, "dtype": "bf16",
            }));
            all.extend(self::params(more));
            all
        };
        let need = |more: Value| needs("generate", &params(more), &shape(), None, true).unwrap();
        let cache = |needs: &Needs| needs.most.of(Part::Cache).1;
        let (many, one) = (need(json!({})), need(json!({"batch": 1})));
        assert!(many.takes_more);
        assert_eq!(cache(&many), cache(&one));
        assert!(one.most.device < many.most.device && cache(&many) > many.surely.of(Part::Cache).1);
    }

    #[test]
    fn the_shape_of_a_model_is_known_before_it_is_made() {
        let known = config_of_model(&params(json!({"source": "init:mini-3B"})), None, None).unwrap().unwrap();
        assert!(known.hidden_size > 0);
        let init = json!({
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 48, "tie_word_embeddings": true,
        });
        let random = params(json!({"source": "init:random", "tokenizer": "init:mini", "init": init}));
        let random = config_of_model(&random, None, None).unwrap().unwrap();
        // As many rows as the tokenizer, once it lies in a folder, has ids.
        let folder = tempfile::tempdir().unwrap();
        bundled::tokenizer("mini").unwrap().write(folder.path(), |_| true).unwrap();
        let ids = Tokenizer::load(&Files::from_dir(folder.path()).unwrap()).unwrap().id_limit();
        assert_eq!((random.hidden_size, random.vocab_size), (32, ids));
        assert!(config_of_model(&params(json!({"source": "hf:A/B"})), None, None).is_none());
    }
}
