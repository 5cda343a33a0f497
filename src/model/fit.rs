//! How many layers may keep their insides: `checkpointing = "fit"`. What a layer keeps changes no bit, so the answer
//! may depend on the memory that happens to be free.

use super::qwen2::{Layer, Model, Recompute};
use crate::cuda::Gpu;
use crate::problem::Problem;

/// Bytes of the insides of `layer` for so many tokens: what `Saved` holds, in elements of so many bytes, and the
/// f32 of the norms' and the attention's scales.
fn insides_bytes(model: &Model, layer: &Layer, tokens: usize, element: usize) -> usize {
    let config = &model.config;
    let ranks: usize = layer.linears.iter().filter_map(|linear| linear.lora).map(|slot| slot.rank).sum();
    let elements =
        3 * config.hidden_size + 2 * config.query_size() + 2 * config.key_size() + 3 * config.intermediate_size;
    tokens * ((elements + ranks) * element + (2 + config.num_attention_heads) * 4)
}

/// Of the largest layer; all but the ranks of adapters are the same.
fn largest_insides_bytes(model: &Model, tokens: usize, element: usize) -> usize {
    model.layers.iter().map(|layer| insides_bytes(model, layer, tokens, element)).max().unwrap_or(0)
}

/// On the processor: all of them if half of the memory that is available holds them, else none.
pub(super) fn on_host(model: &Model, tokens: usize) -> Recompute {
    let trained = model.layers.len() - model.first_trained_layer();
    let needed = trained * largest_insides_bytes(model, tokens, size_of::<f32>());
    if needed <= available_bytes() / 2 { Recompute::None } else { Recompute::All }
}

/// Memory that could be had without swapping, as Linux estimates it; 0 where nobody says so.
fn available_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// On a device: the last layers, as many as its free memory holds. The very last one keeps them in any case: it is
/// walked back at once.
pub(super) fn on_device(model: &Model, gpu: &Gpu, tokens: usize, rows: usize) -> Result<Recompute, Problem> {
    let free = gpu.driver().memory()?.0 + gpu.usage().pooled;
    let trained = model.layers.len() - model.first_trained_layer();
    let fits = |kept: &usize| device_bytes(model, tokens, rows, *kept) <= free;
    let kept = (2..=trained).take_while(fits).last().unwrap_or(trained.min(1));
    Ok(Recompute::First(model.layers.len() - kept))
}

/// Device memory that a micro-batch of so many tokens and rows takes while `kept` layers keep their insides, beside
/// weights, gradients and optimizer. Rather too much: at worst a layer is computed again that need not be.
pub fn device_bytes(model: &Model, tokens: usize, rows: usize, kept: usize) -> usize {
    let (config, element) = (&model.config, 2);
    let stream = tokens * config.hidden_size * element;
    let inputs = if model.offload { 2 } else { model.layers.len() - model.first_trained_layer() };
    let insides = largest_insides_bytes(model, tokens, element);
    // One layer's at least are there while it is walked back, and their gradients.
    let working = (kept.max(1) + 1) * insides + 4 * stream;
    // Partial sums of an adapter's gradients, at most 16, and the f32 partial sums of norms.
    let linears = model.linears().filter_map(|linear| Some(linear.lora?.rank * linear.shape[0].max(linear.shape[1])));
    let partial = 16 * 4 * linears.max().unwrap_or(0) + 512 * 4 * config.hidden_size;
    // See `cuda::ops::head_logprob`.
    let head = (64 << 20) + (16 << 10) * config.hidden_size + 4 * rows * config.hidden_size * element + rows * 2048;
    let bytes = inputs * stream + working + partial + head;
    // Blocks are up to an eighth larger than what is in them.
    bytes + bytes / 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Config, LoraSpec};
    use crate::tensor::Dtype;

    #[test]
    fn a_kept_layer_costs_its_insides_and_offloaded_inputs_cost_nothing() {
        let config = r#"{"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true}"#;
        let mut model = Model::random(Config::parse(config).unwrap(), 1, Dtype::F32);
        let targets = vec!["q_proj".to_string()];
        model.add_lora(&LoraSpec { rank: 8, alpha: 8.0, targets }, 2).unwrap();
        // bf16: 3 H + 2 (q + o) + 2 (k + v) + 3 I + rank, f32: two norms and four heads.
        let insides = 100 * (2 * (3 * 32 + 2 * 32 + 2 * 16 + 3 * 64 + 8) + 4 * (2 + 4));
        let cost = |model: &Model, kept| device_bytes(model, 100, 70, kept);
        assert_eq!(cost(&model, 2) - cost(&model, 1), insides * 9 / 8);
        assert_eq!(cost(&model, 1), cost(&model, 0));
        let here = cost(&model, 0);
        model.offload = true;
        assert_eq!(here - cost(&model, 0), 100 * 32 * 2 * 9 / 8);
    }

    #[test]
    fn this_machine_says_how_much_memory_is_available() {
        assert!(!std::path::Path::new("/proc/meminfo").exists() || available_bytes() > 1 << 20);
    }
}
