//! What of a model is trained: nothing, the halves of an adapter, or every weight.

use super::{Linear, LoraSlot, Model, Trained};
use crate::model::Parameter;
use crate::model::load::{bias_name, weight_name};
use crate::model::lora::{self, LoraPair, LoraSpec};
use crate::problem::Problem;
use crate::tensor::Matrix;
use crate::tensor::ops::HeadLora;

impl Model {
    /// The trained tensors: of the active adapter, or all. Empty for a model without either.
    pub fn params(&self) -> &[Parameter] {
        &self.params
    }

    /// Whether every weight is trained.
    pub fn trains_everything(&self) -> bool {
        self.trained == Trained::Everything
    }

    /// Uses the active adapter or does not.
    pub(in crate::model) fn switch_adapter(&mut self, on: bool) {
        self.adapter_on = on;
    }

    /// Number of trained values.
    pub fn trained_values(&self) -> usize {
        self.params.iter().map(|param| param.value.len()).sum()
    }

    /// Bytes of weights in memory, trained copies included.
    pub fn bytes(&self) -> usize {
        let matrices = self.linears().filter_map(|linear| linear.weight.as_ref()).chain([&self.embed]);
        matrices.map(Matrix::bytes).sum::<usize>() + 4 * self.trained_values()
    }

    /// Lets `change` write to the trained tensors (an optimizer step, a checkpoint), then brings the
    /// weights that are computed with up to date.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [Parameter]) -> R) -> R {
        let result = change(&mut self.params);
        if self.trained == Trained::Everything {
            self.repack();
        }
        result
    }

    /// Puts a new adapter on the model (A random, B zero) and trains it. `Err` if a target does not exist, or
    /// if an adapter is active already: fold it in first (`LoadOptions::fold_last`).
    pub fn add_lora(&mut self, spec: &LoraSpec, seed: u64) -> Result<(), Problem> {
        spec.check()?;
        if self.trained != Trained::Nothing {
            return Err(Problem::new(
                "model::already_trained",
                "the model has an adapter, or all its weights are trained",
            ));
        }
        let targets = lora::TARGETS.iter().map(|target| target.to_string());
        let targets = targets.filter(|target| spec.targets.contains(target)).collect();
        self.set_lora(LoraSpec { targets, ..spec.clone() }, |name, shape| {
            let wanted = spec.targets.iter().any(|target| name.rsplit('.').next() == Some(target));
            Ok(wanted.then(|| lora::initial(spec, name, shape, seed)))
        })
    }

    /// Makes the adapter of the pairs that `pair` gives the active one.
    pub(in crate::model) fn set_lora(
        &mut self,
        spec: LoraSpec,
        mut pair: impl FnMut(&str, [usize; 2]) -> Result<Option<LoraPair>, Problem>,
    ) -> Result<(), Problem> {
        let mut params: Vec<Parameter> = Vec::new();
        for linear in self.linears_mut() {
            if let Some(LoraPair { a, b, rank, scale }) = pair(&linear.name, linear.shape)? {
                linear.lora = Some(LoraSlot { at: params.len(), rank, scale });
                let [out, input] = linear.shape;
                for (half, shape, value) in [('A', vec![rank, input], a), ('B', vec![out, rank], b)] {
                    params.push(Parameter { name: lora::peft_name(&linear.name, half), shape, value });
                }
            }
        }
        self.params = params;
        self.trained = Trained::Adapter(spec);
        Ok(())
    }

    /// The active adapter's rank, alpha and targets.
    pub fn lora(&self) -> Option<&LoraSpec> {
        match &self.trained {
            Trained::Adapter(spec) => Some(spec),
            _ => None,
        }
    }

    /// The active adapter of `linear`.
    pub(in crate::model) fn lora_of(&self, linear: &Linear) -> Option<HeadLora<'_>> {
        let LoraSlot { at, rank, scale } = linear.lora?;
        Some(HeadLora { a: &self.params[at].value, b: &self.params[at + 1].value, rank, scale })
    }

    /// Trains every weight. `Err` if an adapter is active.
    pub fn train_all(&mut self) -> Result<(), Problem> {
        if self.trained != Trained::Nothing {
            return Err(Problem::new(
                "model::already_trained",
                "the model has an adapter; fold it in before training every weight",
            ));
        }
        let mut params = Vec::new();
        let mut place = |name: String, shape: Vec<usize>, value: Vec<f32>| {
            params.push(Parameter { name, shape, value });
            params.len() - 1
        };
        let hidden = self.config.hidden_size;
        let vocab = self.config.vocab_size;
        self.embed_trained = Some(place("model.embed_tokens.weight".into(), vec![vocab, hidden], self.embed.unpack()));
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let names = ["input", "post_attention"].map(|which| format!("model.layers.{i}.{which}_layernorm.weight"));
            let [first, second] = names;
            layer.trained = Some([
                place(first, vec![hidden], layer.norm1.clone()),
                place(second, vec![hidden], layer.norm2.clone()),
            ]);
            for linear in &mut layer.linears {
                if let Some(weight) = &linear.weight {
                    linear.trained = Some(place(weight_name(&linear.name), linear.shape.to_vec(), weight.unpack()));
                }
                if let Some(bias) = &linear.bias {
                    place(bias_name(&linear.name), vec![linear.shape[0]], bias.clone());
                }
            }
        }
        self.norm_trained = Some(place("model.norm.weight".into(), vec![hidden], self.norm.clone()));
        if let Some(weight) = &self.head.weight {
            self.head.trained = Some(place(weight_name("lm_head"), vec![vocab, hidden], weight.unpack()));
        }
        self.params = params;
        self.trained = Trained::Everything;
        Ok(())
    }

    /// Copies trained weights into the packed ones.
    fn repack(&mut self) {
        let params = std::mem::take(&mut self.params);
        if let Some(at) = self.embed_trained {
            self.embed.repack(&params[at].value);
        }
        if let Some(at) = self.norm_trained {
            self.norm.copy_from_slice(&params[at].value);
        }
        for layer in &mut self.layers {
            if let Some([first, second]) = layer.trained {
                layer.norm1.copy_from_slice(&params[first].value);
                layer.norm2.copy_from_slice(&params[second].value);
            }
        }
        for linear in self.linears_mut() {
            if let (Some(at), Some(weight)) = (linear.trained, &mut linear.weight) {
                weight.repack(&params[at].value);
                if let Some(bias) = &mut linear.bias {
                    bias.copy_from_slice(&params[at + 1].value);
                }
            }
        }
        self.params = params;
    }
}
