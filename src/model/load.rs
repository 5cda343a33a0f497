//! From a chain of folders to a model in memory, and from a model to folders.
//!
//! A chain is a base model and adapters trained on it one after another. The last adapter stays an adapter
//! (active: it is used, and can be trained further); earlier ones are folded into the weights,
//! `W + scale B A` in f32, before the weights are stored in their dtype.
//!
//! Tensors are read, folded, converted and packed one at a time, so the whole model is in memory once.

use super::config::{self, Config};
use super::lora::{self, AdapterFolder};
use super::qwen2::{Linear, Model, Trained};
use super::weights::{self, Element, MODEL_FILE, Tensors};
use crate::files::Files;
use crate::problem::Problem;
use crate::random::Stream;
use crate::tensor::ops::HeadLora;
use crate::tensor::{self, Dtype, Matrix};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::path::Path;

/// How weights are held.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Storage of the frozen matrices. Adapters, norms and biases are always f32.
    pub dtype: Dtype,
    /// Fold the last adapter too: to put a new one on top, to train every weight, or to decode faster.
    pub fold_last: bool,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { dtype: Dtype::F32, fold_last: false }
    }
}

/// Gives the tensor of a name and shape.
pub(super) type Fetch<'a> = dyn FnMut(&str, &[usize]) -> Result<Values, Problem> + 'a;

/// A tensor on its way into a model.
pub(super) enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Values {
    pub(super) fn f32(self) -> Vec<f32> {
        match self {
            Values::F32(values) => values,
            Values::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        }
    }

    pub(super) fn pack(self, n: usize, k: usize, dtype: Dtype) -> Matrix {
        match (self, dtype) {
            (Values::Bf16(values), Dtype::Bf16) => Matrix::pack_bf16(&values, n, k),
            (values, dtype) => Matrix::pack(&values.f32(), n, k, dtype),
        }
    }
}

pub(super) fn weight_name(linear: &str) -> String {
    format!("{linear}.weight")
}

pub(super) fn bias_name(linear: &str) -> String {
    format!("{linear}.bias")
}

/// Normal numbers of one tensor: a function of seed, name and place. Four of each block of random bits, by
/// Box and Muller's transform of both pairs.
pub(super) fn normal_values(seed: u64, name: &str, len: usize, deviation: f64) -> Vec<f32> {
    let random = Stream::named(seed, &["weights", name]);
    let mut values = vec![0.0; len];
    values.par_chunks_mut(4).with_min_len(4096).enumerate().for_each(|(i, values)| {
        let [a, b, c, d] = random.block(i as u64).map(|bits| (f64::from(bits) + 0.5) / 4_294_967_296.0);
        for (values, [radius, angle]) in values.chunks_mut(2).zip([[a, b], [c, d]]) {
            let (sin, cos) = (std::f64::consts::TAU * angle).sin_cos();
            let radius = (-2.0 * radius.ln()).sqrt() * deviation;
            for (value, turn) in values.iter_mut().zip([cos, sin]) {
                *value = (radius * turn) as f32;
            }
        }
    });
    values
}

impl Model {
    /// Reads `chain`: a model folder, then adapter folders in the order they were trained. `Err` names the
    /// file and the tensor: see `weights.rs`, `config.rs` and `lora.rs` for what is refused.
    pub fn load(chain: &[&Files], options: &LoadOptions) -> Result<Model, Problem> {
        let Some((base, adapters)) = chain.split_first() else {
            return Err(Problem::new("model::no_weights", "a model is a folder of weights, and none is given"));
        };
        if let Some(at) = adapters.iter().position(|files| !lora::is_adapter(files)) {
            return Err(Problem::new(
                "model::no_adapter",
                format!("folder {} of the chain holds no `{}`", at + 2, lora::ADAPTER_CONFIG),
            ));
        }
        let mut config = Config::load(base)?;
        let tensors = Tensors::of_model(base)?;
        let mut folded =
            adapters.iter().map(|files| AdapterFolder::open(files, &config)).collect::<Result<Vec<_>, _>>()?;
        let active = if options.fold_last { None } else { folded.pop() };
        // A head that an adapter has changed is no longer the embedding.
        let head_name = weight_name("lm_head");
        let tied = config.tie_word_embeddings;
        if folded.iter().any(|adapter| adapter.spec.targets.iter().any(|target| target == "lm_head")) {
            config.tie_word_embeddings = false;
        }
        let mut fetch = |name: &str, shape: &[usize]| -> Result<Values, Problem> {
            let stored = if tied && name == head_name { "model.embed_tokens.weight" } else { name };
            let mut pairs = Vec::new();
            if let (Some(linear), &[out, input]) = (name.strip_suffix(".weight"), shape) {
                for adapter in &folded {
                    pairs.extend(adapter.pair(linear, [out, input])?);
                }
            }
            let matrix = shape.len() == 2;
            if matrix && pairs.is_empty() && options.dtype == Dtype::Bf16 {
                return Ok(Values::Bf16(tensors.bf16(stored, shape)?));
            }
            let mut values = tensors.f32(stored, shape)?;
            for pair in pairs {
                fold(&mut values, [shape[0], shape[1]], &pair.a, &pair.b, pair.rank, pair.scale);
            }
            Ok(Values::F32(values))
        };
        let mut model = Model::build(config, options.dtype, &mut fetch)?;
        if let Some(adapter) = active {
            model.set_lora(adapter.spec.clone(), |linear, shape| adapter.pair(linear, shape))?;
        }
        Ok(model)
    }

    /// Writes a Hugging Face folder of the weights without the active adapter: `config.json` and
    /// `model.safetensors`. The caller adds the tokenizer's files.
    pub fn save(&self, dir: &Path, element: Element) -> Result<(), Problem> {
        self.save_with(dir, element, false)
    }

    /// [`Model::save`] with the active adapter folded in, in f32. A tied head that has an adapter is written
    /// as `lm_head.weight` of its own, the embedding unmoved, and the configuration says it is not tied.
    pub fn merged_save(&self, dir: &Path, element: Element) -> Result<(), Problem> {
        self.save_with(dir, element, true)
    }

    fn save_with(&self, dir: &Path, element: Element, merge: bool) -> Result<(), Problem> {
        let mut config = self.config.clone();
        let untie = merge && self.lora_of(&self.head).is_some();
        config.tie_word_embeddings &= !untie;
        config::save(&config, dir, element.torch_name())?;
        if self.trained == Trained::Everything {
            let tensors: Vec<_> = self.params().iter().map(|param| (param.name.clone(), param.shape.clone())).collect();
            return weights::write(&dir.join(MODEL_FILE), element, &tensors, |i| {
                Ok(Cow::Borrowed(self.params()[i].value.as_slice()))
            });
        }
        let hidden = config.hidden_size;
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![config.vocab_size, hidden])];
        let mut sources = vec![Source::Embedding];
        for (i, layer) in self.layers.iter().enumerate() {
            for (which, norm) in [("input", &layer.norm1), ("post_attention", &layer.norm2)] {
                tensors.push((format!("model.layers.{i}.{which}_layernorm.weight"), vec![hidden]));
                sources.push(Source::Vector(norm));
            }
        }
        tensors.push(("model.norm.weight".into(), vec![hidden]));
        sources.push(Source::Vector(&self.norm));
        for linear in self.linears() {
            if linear.weight.is_some() || untie {
                tensors.push((weight_name(&linear.name), linear.shape.to_vec()));
                sources.push(Source::Linear(linear));
            }
            if let Some(bias) = &linear.bias {
                tensors.push((bias_name(&linear.name), vec![bias.len()]));
                sources.push(Source::Vector(bias));
            }
        }
        weights::write(&dir.join(MODEL_FILE), element, &tensors, |i| {
            Ok(match sources[i] {
                Source::Embedding => Cow::Owned(self.embed.unpack()),
                Source::Vector(values) => Cow::Borrowed(values),
                Source::Linear(linear) => {
                    let mut values = linear.weight.as_ref().unwrap_or(&self.embed).unpack();
                    if let Some(HeadLora { a, b, rank, scale }) = self.lora_of(linear).filter(|_| merge) {
                        fold(&mut values, linear.shape, a, b, rank, scale);
                    }
                    Cow::Owned(values)
                }
            })
        })
    }

    /// Writes the active adapter as a PEFT folder. `base` is shown to people as the model beneath.
    pub fn save_adapter(&self, dir: &Path, base: &str) -> Result<(), Problem> {
        match self.lora() {
            Some(spec) => lora::save(dir, spec, self.params(), base),
            None => Err(Problem::new("model::no_adapter", "the model has no adapter to save")),
        }
    }
}

/// Where a saved tensor comes from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Embedding,
    Vector(&'a [f32]),
    Linear(&'a Linear),
}

/// `W += scale B A`
fn fold(weight: &mut [f32], [out, input]: [usize; 2], a: &[f32], b: &[f32], rank: usize, scale: f32) {
    tensor::gemm(weight, out, input, rank, scale, b, false, a, false, true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_are_normal_and_depend_on_seed_name_and_place_only() {
        let values = normal_values(1, "a", 100_003, 0.02);
        assert_eq!(values[..501], normal_values(1, "a", 501, 0.02));
        assert!(values[..8] != normal_values(2, "a", 8, 0.02) && values[..8] != normal_values(1, "b", 8, 0.02));
        let moment = |power: i32| values.iter().map(|v| (f64::from(*v) / 0.02).powi(power)).sum::<f64>() / 100_003.0;
        for (power, expected, tolerance) in [(1, 0.0, 0.01), (2, 1.0, 0.015), (3, 0.0, 0.04), (4, 3.0, 0.1)] {
            assert!((moment(power) - expected).abs() <= tolerance, "moment {power}: {}", moment(power));
        }
        let neighbours = values.windows(2).map(|v| f64::from(v[0]) * f64::from(v[1]) / 4e-4).sum::<f64>() / 100_002.0;
        assert!(neighbours.abs() <= 0.01, "{neighbours}");
    }
}
