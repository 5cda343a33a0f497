//! From a chain of folders to a model in memory, and from a model to folders.
//!
//! A chain is a base model and adapters trained on it one after another. The last adapter stays an adapter
//! (active: it is used, and can be trained further); earlier ones are folded into the weights,
//! `W + scale B A` in f32, before the weights are stored in their dtype.
//!
//! Tensors are read, folded, converted and packed one at a time, so the whole model is in memory once.

use super::build::Source;
use super::config::{self, Config};
use super::decoder::{Decoder, Held, Trained};
use super::family::{HEAD, TARGETS};
use super::host::Host;
use super::lora::{self, AdapterFolder, LoraSpec};
use super::parameter::Parameter;
use super::tensors;
use crate::files::Files;
use crate::problem::Problem;
use crate::safetensors::{self, Element, MODEL_FILE, Tensors};
use crate::tensor::{self, Dtype, Matrix};
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

/// Tensors of a folder, with adapters folded in.
struct Folder<'a> {
    tensors: Tensors,
    folded: &'a [AdapterFolder],
    dtype: Dtype,
    /// Whether the head is the embedding in the file.
    tied: bool,
}

impl Source<Host> for Folder<'_> {
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Problem> {
        let [out, input] = shape;
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        let stored = if self.tied && linear == TARGETS[HEAD] { tensors::EMBEDDING } else { name };
        let mut pairs = Vec::new();
        for adapter in self.folded {
            pairs.extend(adapter.pair(linear, shape)?);
        }
        if pairs.is_empty() && self.dtype == Dtype::Bf16 {
            return Ok(Matrix::pack_bf16(&self.tensors.bf16(stored, &shape)?, out, input));
        }
        let mut values = self.tensors.f32(stored, &shape)?;
        for pair in pairs {
            fold(&mut values, shape, &pair.a, &pair.b, pair.rank, pair.scale);
        }
        Ok(Matrix::pack(&values, out, input, self.dtype))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Problem> {
        self.tensors.f32(name, &[len])
    }
}

impl Decoder<Host> {
    /// Reads `chain`: a model folder, then adapter folders in the order they were trained. `Err` names the
    /// file and the tensor: see `weights.rs`, `config.rs` and `lora.rs` for what is refused.
    pub fn load(chain: &[&Files], options: &LoadOptions) -> Result<Decoder<Host>, Problem> {
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
        let tied = config.tie_word_embeddings;
        if folded.iter().any(|adapter| adapter.spec.adapts(TARGETS[HEAD])) {
            config.tie_word_embeddings = false;
        }
        let dtype = options.dtype;
        let mut model = Decoder::build(config, Host { dtype }, &mut Folder { tensors, folded: &folded, dtype, tied })?;
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

    /// [`Decoder::save`] with the active adapter folded in, in f32. A tied head that has an adapter is written
    /// as `lm_head.weight` of its own, the embedding unmoved, and the configuration says it is not tied.
    pub fn merged_save(&self, dir: &Path, element: Element) -> Result<(), Problem> {
        self.save_with(dir, element, true)
    }

    fn save_with(&self, dir: &Path, element: Element, merge: bool) -> Result<(), Problem> {
        if self.trained == Trained::Everything {
            return save_every(&self.config, self.params(), dir, element);
        }
        let mut config = self.config.clone();
        config.tie_word_embeddings &= !(merge && self.head.lora.is_some());
        config::save(&config, dir, element.torch_name())?;
        let tensors: Vec<_> = tensors::tensors(&config).into_iter().map(|tensor| (tensor.name, tensor.shape)).collect();
        safetensors::write(&dir.join(MODEL_FILE), element, &tensors, |i| Ok(self.plain(&tensors[i].0, merge)))
    }

    /// The values of a tensor by its name, row-major.
    fn plain(&self, name: &str, merge: bool) -> Cow<'_, [f32]> {
        let matrix = |held: &Held<Matrix>| self.matrix(held).unpack();
        if name == tensors::EMBEDDING {
            return Cow::Owned(matrix(&self.embed));
        }
        for linear in self.linears_in_order() {
            if tensors::weight_name(&linear.name) == name {
                let mut values = matrix(linear.weight.as_ref().unwrap_or(&self.embed));
                if let Some(lora) = self.product(linear).lora.filter(|_| merge) {
                    fold(&mut values, linear.shape, lora.a.value, lora.b.value, lora.rank, lora.scale);
                }
                return Cow::Owned(values);
            }
            if let Some(bias) = linear.bias.as_ref().filter(|_| tensors::bias_name(&linear.name) == name) {
                return Cow::Borrowed(self.vector(bias));
            }
        }
        let norms = self.layers.iter().enumerate().flat_map(|(i, layer)| {
            layer.norms.iter().enumerate().map(move |(which, norm)| (tensors::norm_name(i, which), norm))
        });
        let norm = norms.into_iter().find(|(there, _)| there == name).map_or(&self.norm, |(_, norm)| norm);
        Cow::Borrowed(self.vector(norm))
    }

    /// Writes the active adapter as a PEFT folder. `base` is shown to people as the model beneath.
    pub fn save_adapter(&self, dir: &Path, base: &str) -> Result<(), Problem> {
        match self.lora() {
            Some(spec) => lora::save(dir, spec, self.params(), base),
            None => Err(Problem::new("model::no_adapter", "the model has no adapter to save")),
        }
    }
}

/// Writes what is trained: an adapter as a PEFT folder, every weight in f32 as a Hugging Face folder.
pub fn save_trained(
    config: &Config,
    lora: Option<&LoraSpec>,
    params: &[Parameter],
    dir: &Path,
    base: &str,
) -> Result<(), Problem> {
    match lora {
        Some(spec) => lora::save(dir, spec, params, base),
        None => save_every(config, params, dir, Element::F32),
    }
}

/// Writes a Hugging Face folder of every weight.
fn save_every(config: &Config, params: &[Parameter], dir: &Path, element: Element) -> Result<(), Problem> {
    config::save(config, dir, element.torch_name())?;
    let tensors: Vec<_> = params.iter().map(|param| (param.name.clone(), param.shape.clone())).collect();
    safetensors::write(&dir.join(MODEL_FILE), element, &tensors, |i| Ok(Cow::Borrowed(params[i].value.as_slice())))
}

/// `W += scale B A`
fn fold(weight: &mut [f32], [out, input]: [usize; 2], a: &[f32], b: &[f32], rank: usize, scale: f32) {
    tensor::gemm(weight, out, input, rank, scale, b, false, a, false, true);
}
