//! How many layers may keep their activations: `checkpointing = "fit"`. What a layer keeps changes no bit, so the answer
//! may depend on the memory that happens to be free.

use super::batch::Extent;
use super::decoder::Decoder;
use super::memory::{Plan, Trained, Work};
use super::place::Place;
use super::policy::{Policy, Recompute};
use crate::cuda::Gpu;
use crate::measure::host_memory;
use crate::problem::Problem;
use crate::tensor::Dtype;

/// What a plan says of a micro-batch while the last `kept` layers keep what is inside them.
fn planned<P: Place, R>(
    model: &Decoder<P>,
    policy: Policy,
    on_device: bool,
    extent: Extent,
    kept: usize,
    of: impl FnOnce(Plan) -> R,
) -> R {
    let state_sizes = |_| Vec::new();
    let work = Work::Train { extent, kept, offload: policy.offload, graphs: false, state_sizes: &state_sizes };
    let (config, trained) = (&model.config, Trained::from(model));
    // In whatever type weights are: they are not among it.
    of(Plan { config, dtype: Dtype::F32, trained, on_device, work })
}

/// Memory that a micro-batch takes beside weights, gradients and optimizer.
fn working<P: Place>(model: &Decoder<P>, policy: Policy, on_device: bool, extent: Extent, kept: usize) -> usize {
    planned(model, policy, on_device, extent, kept, |plan| plan.working() as usize)
}

/// On the processor: all of them if half of the memory that is available holds what they need, else none.
pub(super) fn on_host<P: Place>(model: &Decoder<P>, policy: Policy, extent: Extent) -> Recompute {
    let needed = working(model, policy, false, extent, model.layers.len());
    let available = host_memory().map_or(0, |memory| memory.available);
    if needed as u64 <= available / 2 { Recompute::None } else { Recompute::All }
}

/// On a device: the last layers, as many as its free memory holds. The very last one keeps them in any case: its turn in
/// the backward pass comes at once.
pub(super) fn on_device<P: Place>(
    model: &Decoder<P>,
    policy: Policy,
    gpu: &Gpu,
    extent: Extent,
) -> Result<Recompute, Problem> {
    let free = gpu.driver().memory()?.0 + gpu.usage().pooled;
    let trained = model.layers.len() - model.first_trained_layer();
    // The more are kept the more it takes: the last number that fits, by halves.
    let (mut fits, mut beyond) = (trained.min(LEAST_ON_DEVICE), trained + 1);
    while fits + 1 < beyond {
        let kept = fits.midpoint(beyond);
        if device_bytes(model, policy, extent, kept) <= free { fits = kept } else { beyond = kept }
    }
    Ok(Recompute::First(model.layers.len() - fits))
}

/// Trained layers that keep what is inside them.
pub(super) fn kept<P: Place>(model: &Decoder<P>, recompute: Recompute) -> usize {
    (model.first_trained_layer()..model.layers.len()).filter(|layer| !recompute.of(*layer)).count()
}

/// Layers that keep what is inside them on a device however little memory there is.
pub const LEAST_ON_DEVICE: usize = 1;

/// Device memory that must be free for a micro-batch while `kept` layers keep what is inside them. An eighth too much, for
/// what pools and the driver cut off: at worst a layer is computed again that need not be.
pub fn device_bytes<P: Place>(model: &Decoder<P>, policy: Policy, extent: Extent, kept: usize) -> usize {
    let bytes = working(model, policy, true, extent, kept);
    bytes + bytes / 8
}

/// The same of one that is captured: its region.
pub fn region_bytes<P: Place>(model: &Decoder<P>, policy: Policy, extent: Extent, kept: usize) -> usize {
    planned(model, policy, true, extent, kept, |plan| plan.region())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Config, LoraSpec, Model};

    #[test]
    fn a_kept_layer_costs_its_activations_and_offloaded_inputs_cost_little() {
        let config = r#"{"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true}"#;
        let mut model = Model::random(Config::parse(config).unwrap(), 1, Dtype::F32);
        let targets = vec!["q_proj".to_string()];
        model.add_lora(&LoraSpec { rank: 8, alpha: 8.0, targets }, 2).unwrap();
        // Sizes whose blocks are as large as what is in them.
        let extent = Extent { tokens: 2048, rows: 70, sequences: 8, longest: 256 };
        let inside = 2048 * (2 * (3 * 32 + 2 * 32 + 2 * 16 + 3 * 64 + 8) + 4 * (2 + 4));
        let here = Policy::default();
        let cost = |policy, on_device, kept| working(&model, policy, on_device, extent, kept);
        assert_eq!(cost(here, true, 3) - cost(here, true, 2), inside);
        assert_eq!(device_bytes(&model, here, extent, 2), cost(here, true, 2) / 8 * 9);
        let leaving = Policy { offload: true, ..here };
        // Of five below the last one stays: its turn is next.
        assert_eq!(cost(here, true, 2) - cost(leaving, true, 2), 4 * 2048 * 32 * 2);
        assert_eq!(cost(leaving, false, 2), cost(here, false, 2));
    }
}
