//! A decoder of tensors that a source gives one by one, and what of it is trained: nothing, the halves of an adapter, or
//! every weight.

use super::config::Config;
use super::decoder::{Decoder, Held, Layer, Linear, LoraSlot, Trained};
use super::family::{HEAD, LINEARS, TARGETS};
use super::host::Host;
use super::lora::{self, LoraPair, LoraSpec};
use super::parameter::Parameter;
use super::place::Place;
use super::tensors;
use crate::problem::Problem;
use crate::random::Stream;
use crate::tensor::{Dtype, Matrix};
use rayon::prelude::*;

/// Gives tensors by name.
pub(super) trait Source<P: Place> {
    /// `[out, in]`
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<P::Matrix, Problem>;
    fn vector(&mut self, name: &str, len: usize) -> Result<P::Floats, Problem>;
}

/// A place that a decoder can be built at and trained from there.
pub trait Builds: Place {
    /// What products read of an adapter's half, if not its values.
    fn factor(&self, len: usize) -> Option<Self::Matrix>;
    /// A frozen matrix as a trained one: its values, and what products read.
    fn thaw(&self, matrix: Self::Matrix, shape: [usize; 2]) -> (Self::Floats, Self::Matrix);
    /// A frozen vector as a trained one.
    fn thaw_vector(&self, vector: Self::Floats) -> Self::Floats;
}

impl Builds for Host {
    fn factor(&self, _len: usize) -> Option<Matrix> {
        None
    }

    fn thaw(&self, matrix: Matrix, _shape: [usize; 2]) -> (Vec<f32>, Matrix) {
        (matrix.unpack(), matrix)
    }

    fn thaw_vector(&self, vector: Vec<f32>) -> Vec<f32> {
        vector
    }
}

impl<P: Place> Decoder<P> {
    /// A model of the tensors that `source` gives.
    pub(super) fn build(config: Config, place: P, source: &mut dyn Source<P>) -> Result<Decoder<P>, Problem> {
        let hidden = config.hidden_size;
        let embed = Held::Frozen(source.matrix(tensors::EMBEDDING, [config.vocab_size, hidden])?);
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let mut norm = |which| source.vector(&tensors::norm_name(layer, which), hidden).map(Held::Frozen);
            let norms = [norm(0)?, norm(1)?];
            let linears =
                (0..LINEARS).map(|target| linear(&config, layer, target, source)).collect::<Result<Vec<_>, _>>()?;
            let linears = linears.try_into().unwrap_or_else(|_| unreachable!("as many as there are"));
            layers.push(Layer { norms, linears });
        }
        let norm = Held::Frozen(source.vector(tensors::FINAL_NORM, hidden)?);
        let head = linear(&config, 0, HEAD, source)?;
        let (params, copies, trained) = (Vec::new(), Vec::new(), Trained::Nothing);
        Ok(Decoder { config, place, embed, layers, norm, head, params, copies, trained, adapter_on: true })
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<P>> {
        self.layers.iter_mut().flat_map(|layer| &mut layer.linears).chain([&mut self.head])
    }
}

fn linear<P: Place>(
    config: &Config,
    layer: usize,
    target: usize,
    source: &mut dyn Source<P>,
) -> Result<Linear<P>, Problem> {
    let (name, shape) = (tensors::linear_name(layer, target), tensors::linear_shape(config, target));
    let tied = target == HEAD && config.tie_word_embeddings;
    let weight = (!tied).then(|| source.matrix(&tensors::weight_name(&name), shape)).transpose()?.map(Held::Frozen);
    let biased = tensors::has_bias(config, target);
    let bias = biased.then(|| source.vector(&tensors::bias_name(&name), shape[0])).transpose()?.map(Held::Frozen);
    Ok(Linear { name, shape, weight, bias, lora: None })
}

fn already() -> Problem {
    Problem::new("model::already_trained", "the model has an adapter, or all its weights are trained")
        .help("fold the adapter in before something else is trained")
}

impl<P: Builds> Decoder<P> {
    /// Makes the adapter of the pairs that `pair` gives the active one.
    pub(super) fn set_lora(
        &mut self,
        spec: LoraSpec,
        mut pair: impl FnMut(&str, [usize; 2]) -> Result<Option<LoraPair<P::Floats>>, Problem>,
    ) -> Result<(), Problem> {
        if self.trained != Trained::Nothing {
            return Err(already());
        }
        let (mut params, mut copies) = (Vec::new(), Vec::new());
        for linear in self.linears_mut() {
            if let Some(LoraPair { a, b, rank, scale }) = pair(&linear.name, linear.shape)? {
                linear.lora = Some(LoraSlot { at: params.len(), rank, scale });
                let [out, input] = linear.shape;
                for (half, shape, value) in [('A', vec![rank, input], a), ('B', vec![out, rank], b)] {
                    params.push(Parameter { name: lora::peft_name(&linear.name, half), shape, value });
                }
            }
        }
        copies.extend(params.iter().map(|param| self.place.factor(param.values())));
        (self.params, self.copies, self.trained) = (params, copies, Trained::Adapter(spec));
        Ok(())
    }

    /// Trains every weight. `Err` if an adapter is active.
    pub fn train_all(&mut self) -> Result<(), Problem> {
        if self.trained != Trained::Nothing {
            return Err(already());
        }
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let mut thawed = Thawed { place: &self.place, params: Vec::new(), copies: Vec::new() };
        thawed.matrix(&mut self.embed, tensors::EMBEDDING.into(), [vocab, hidden]);
        for (i, layer) in self.layers.iter_mut().enumerate() {
            for (which, norm) in layer.norms.iter_mut().enumerate() {
                thawed.vector(norm, tensors::norm_name(i, which), hidden);
            }
            layer.linears.iter_mut().for_each(|linear| thawed.linear(linear));
        }
        thawed.vector(&mut self.norm, tensors::FINAL_NORM.into(), hidden);
        thawed.linear(&mut self.head);
        let Thawed { params, copies, .. } = thawed;
        (self.params, self.copies, self.trained) = (params, copies, Trained::Everything);
        Ok(())
    }
}

/// Tensors that were frozen and are trained.
struct Thawed<'p, P: Place> {
    place: &'p P,
    params: Vec<Parameter<P::Floats>>,
    copies: Vec<Option<P::Matrix>>,
}

impl<P: Builds> Thawed<'_, P> {
    fn matrix(&mut self, held: &mut Held<P::Matrix>, name: String, shape: [usize; 2]) {
        if let Held::Frozen(matrix) = std::mem::replace(held, Held::Trained(self.params.len())) {
            let (value, copy) = self.place.thaw(matrix, shape);
            self.params.push(Parameter { name, shape: shape.to_vec(), value });
            self.copies.push(Some(copy));
        }
    }

    fn vector(&mut self, held: &mut Held<P::Floats>, name: String, len: usize) {
        if let Held::Frozen(vector) = std::mem::replace(held, Held::Trained(self.params.len())) {
            self.params.push(Parameter { name, shape: vec![len], value: self.place.thaw_vector(vector) });
            self.copies.push(None);
        }
    }

    fn linear(&mut self, linear: &mut Linear<P>) {
        if let Some(weight) = &mut linear.weight {
            self.matrix(weight, tensors::weight_name(&linear.name), linear.shape);
        }
        if let Some(bias) = &mut linear.bias {
            self.vector(bias, tensors::bias_name(&linear.name), linear.shape[0]);
        }
    }
}

impl Decoder<Host> {
    /// New weights as transformers initialises them: normal(0, `initializer_range`) for matrices, zero for
    /// biases, one for norms. Each tensor depends on `seed` and its name only.
    pub fn random(config: Config, seed: u64, dtype: Dtype) -> Decoder<Host> {
        let mut source = Random { seed, deviation: config.initializer_range, dtype };
        match Decoder::build(config, Host { dtype }, &mut source) {
            Ok(model) => model,
            Err(problem) => unreachable!("nothing is read: {problem}"),
        }
    }

    /// Puts a new adapter on the model (A random, B zero) and trains it. `Err` if a target does not exist, or
    /// if an adapter is active already: fold it in first (`LoadOptions::fold_last`).
    pub fn add_lora(&mut self, spec: &LoraSpec, seed: u64) -> Result<(), Problem> {
        spec.check()?;
        let targets = TARGETS.iter().map(|target| target.to_string());
        let targets = targets.filter(|target| spec.targets.contains(target)).collect();
        self.set_lora(LoraSpec { targets, ..spec.clone() }, |name, shape| {
            Ok(spec.adapts(name).then(|| lora::initial(spec, name, shape, seed)))
        })
    }

    /// Lets `change` write to the trained tensors (an optimizer step, a checkpoint), then brings what products read up
    /// to date.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [Parameter]) -> R) -> R {
        let result = change(&mut self.params);
        for (param, copy) in self.params.iter().zip(&mut self.copies) {
            if let Some(copy) = copy {
                copy.repack(&param.value);
            }
        }
        result
    }

    /// Bytes of weights in memory, trained copies included.
    pub fn bytes(&self) -> usize {
        let held = |held: &Held<Matrix>| match held {
            Held::Frozen(matrix) => matrix.bytes(),
            Held::Trained(_) => 0,
        };
        let frozen: usize = self.linears_in_order().filter_map(|linear| linear.weight.as_ref()).map(held).sum();
        let copies: usize = self.copies.iter().flatten().map(Matrix::bytes).sum();
        frozen + held(&self.embed) + copies + 4 * self.trained_values()
    }
}

struct Random {
    seed: u64,
    deviation: f64,
    dtype: Dtype,
}

impl Source<Host> for Random {
    fn matrix(&mut self, name: &str, [out, input]: [usize; 2]) -> Result<Matrix, Problem> {
        let values = normal_values(self.seed, name, out * input, self.deviation);
        Ok(Matrix::pack(&values, out, input, self.dtype))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Problem> {
        Ok(vec![if tensors::is_norm(name) { 1.0 } else { 0.0 }; len])
    }
}

/// Normal numbers of one tensor: a function of seed, name and place. Four of each block of random bits, by
/// Box and Muller's transform of both pairs.
fn normal_values(seed: u64, name: &str, len: usize, deviation: f64) -> Vec<f32> {
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
