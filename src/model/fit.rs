//! How many layers may keep their insides: `checkpointing = "fit"`. What a layer keeps changes no bit, so the answer
//! may depend on the memory that happens to be free.

use super::memory::{Extent, Plan, Trained, Work};
use super::qwen2::{Model, Recompute};
use crate::cuda::Gpu;
use crate::measure::host_memory;
use crate::problem::Problem;
use crate::tensor::Dtype;

/// What a plan says of a micro-batch while the last `kept` layers keep their insides.
fn planned<R>(model: &Model, on_device: bool, extent: Extent, kept: usize, of: impl FnOnce(Plan) -> R) -> R {
    let state_sizes = |_| Vec::new();
    let work = Work::Train { extent, kept, offload: model.offload, graphs: false, state_sizes: &state_sizes };
    let (config, trained) = (&model.config, Trained::from(model));
    // In whatever type weights are: they are not among it.
    of(Plan { config, dtype: Dtype::F32, trained, on_device, work })
}

/// Memory that a micro-batch takes beside weights, gradients and optimizer.
fn working(model: &Model, on_device: bool, extent: Extent, kept: usize) -> usize {
    planned(model, on_device, extent, kept, |plan| plan.working() as usize)
}

/// On the processor: all of them if half of the memory that is available holds what they need, else none.
pub(super) fn on_host(model: &Model, extent: Extent) -> Recompute {
    let needed = working(model, false, extent, model.layers.len());
    let available = host_memory().map_or(0, |memory| memory.available);
    if needed as u64 <= available / 2 { Recompute::None } else { Recompute::All }
}

/// On a device: the last layers, as many as its free memory holds. The very last one keeps them in any case: it is
/// walked back at once.
pub(super) fn on_device(model: &Model, gpu: &Gpu, extent: Extent) -> Result<Recompute, Problem> {
    let free = gpu.driver().memory()?.0 + gpu.usage().pooled;
    let trained = model.layers.len() - model.first_trained_layer();
    let fits = |kept: &usize| device_bytes(model, extent, *kept) <= free;
    let kept = (2..=trained).take_while(fits).last().unwrap_or(trained.min(LEAST_ON_DEVICE));
    Ok(Recompute::First(model.layers.len() - kept))
}

/// Trained layers that keep their insides.
pub(super) fn kept(model: &Model, recompute: Recompute) -> usize {
    (model.first_trained_layer()..model.layers.len()).filter(|layer| !recompute.of(*layer)).count()
}

/// Layers that keep their insides on a device however little memory there is.
pub const LEAST_ON_DEVICE: usize = 1;

/// Device memory that must be free for a micro-batch while `kept` layers keep their insides. An eighth too much, for
/// what pools and the driver cut off: at worst a layer is computed again that need not be.
pub fn device_bytes(model: &Model, extent: Extent, kept: usize) -> usize {
    let bytes = working(model, true, extent, kept);
    bytes + bytes / 8
}

/// The same of one that is captured: its region.
pub fn region_bytes(model: &Model, extent: Extent, kept: usize) -> usize {
    planned(model, true, extent, kept, |plan| plan.region())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Config, LoraSpec};

    #[test]
    fn a_kept_layer_costs_its_insides_and_offloaded_inputs_cost_little() {
        let config = r#"{"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true}"#;
        let mut model = Model::random(Config::parse(config).unwrap(), 1, Dtype::F32);
        let targets = vec!["q_proj".to_string()];
        model.add_lora(&LoraSpec { rank: 8, alpha: 8.0, targets }, 2).unwrap();
        // Sizes whose blocks are as large as what is in them.
        let extent = Extent { tokens: 2048, rows: 70, sequences: 8, longest: 256 };
        let insides = 2048 * (2 * (3 * 32 + 2 * 32 + 2 * 16 + 3 * 64 + 8) + 4 * (2 + 4));
        let cost = |model: &Model, on_device, kept| working(model, on_device, extent, kept);
        assert_eq!(cost(&model, true, 3) - cost(&model, true, 2), insides);
        assert_eq!(device_bytes(&model, extent, 2), cost(&model, true, 2) / 8 * 9);
        let (here, on_host) = (cost(&model, true, 2), cost(&model, false, 2));
        model.offload = true;
        // Of five below the last one stays: the next to be walked back through.
        assert_eq!(here - cost(&model, true, 2), 4 * 2048 * 32 * 2);
        assert_eq!(cost(&model, false, 2), on_host);
    }
}
