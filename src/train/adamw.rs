//! AdamW with f32 states, as `torch.optim.AdamW` (Loshchilov and Hutter, "Decoupled weight decay
//! regularization", algorithm 2):
//!
//! ```text
//! p -= lr * weight_decay * p
//! m  = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//! p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//! ```
//!
//! Vectors (norm weights, biases) are not decayed, as in transformers' `Trainer`; matrices are, those of
//! adapters included. Scalars are formed in f64 and rounded once.

use super::state::{StateMut, StateRef};
use crate::model::{Gradients, Parameter};
use rayon::prelude::*;

pub use crate::cuda::ops::adamw::Options;

/// First and second moments of every parameter.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// The constants of the update.
    pub options: Options,
    /// Updates made so far.
    pub steps: u64,
    moments: Vec<(String, Vec<f32>, Vec<f32>)>,
}

/// Elements per task.
const BLOCK: usize = 1 << 14;

impl AdamW {
    /// Zero moments for `params`.
    pub fn new(options: Options, params: &[Parameter]) -> AdamW {
        let zero = |p: &Parameter| (p.name.clone(), vec![0.0; p.value.len()], vec![0.0; p.value.len()]);
        AdamW { options, steps: 0, moments: params.iter().map(zero).collect() }
    }

    /// One update of `params`, which must be those given to [`AdamW::new`].
    pub fn step(&mut self, params: &mut [Parameter], grads: &Gradients, learning_rate: f64) {
        self.steps += 1;
        let Options { beta1, beta2, epsilon, weight_decay } = self.options;
        let correction1 = 1.0 - beta1.powf(self.steps as f64);
        let correction2 = 1.0 - beta2.powf(self.steps as f64);
        let rates = Rates {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (learning_rate / correction1) as f32,
            root2: correction2.sqrt() as f32,
            epsilon: epsilon as f32,
        };
        for ((param, grad), (_, first, second)) in params.iter_mut().zip(&grads.values).zip(&mut self.moments) {
            let keep = if param.decays() { (1.0 - learning_rate * weight_decay) as f32 } else { 1.0 };
            param
                .value
                .par_chunks_mut(BLOCK)
                .zip(grad.par_chunks(BLOCK))
                .zip(first.par_chunks_mut(BLOCK).zip(second.par_chunks_mut(BLOCK)))
                .for_each(|((param, grad), (first, second))| rates.update(param, grad, first, second, keep));
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.moments.iter().map(|(_, first, second)| 4 * (first.len() + second.len())).sum()
    }

    pub(super) fn states(&self) -> Vec<(String, StateRef<'_>)> {
        self.moments
            .iter()
            .flat_map(|(name, first, second)| {
                [(format!("{name}.m"), StateRef::F32(first)), (format!("{name}.v"), StateRef::F32(second))]
            })
            .collect()
    }

    pub(super) fn states_mut(&mut self) -> Vec<StateMut<'_>> {
        self.moments.iter_mut().flat_map(|(_, first, second)| [StateMut::F32(first), StateMut::F32(second)]).collect()
    }
}

/// The scalars of one step.
struct Rates {
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root2: f32,
    epsilon: f32,
}

impl Rates {
    fn update(&self, param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32], keep: f32) {
        for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(first).zip(second) {
            *m = self.beta1 * *m + self.one_minus_beta1 * g;
            *v = self.beta2 * *v + self.one_minus_beta2 * (g * g);
            *p = *p * keep - self.step_size * (*m / (v.sqrt() / self.root2 + self.epsilon));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(values: &[f32], shape: &[usize]) -> Vec<Parameter> {
        vec![Parameter { name: "p".into(), shape: shape.to_vec(), value: values.to_vec() }]
    }

    /// The same in f64, written from the formula.
    fn law(mut p: f64, grads: &[f64], lr: f64, o: Options) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (t, g) in (1..).zip(grads) {
            p -= lr * o.weight_decay * p;
            m = o.beta1 * m + (1.0 - o.beta1) * g;
            v = o.beta2 * v + (1.0 - o.beta2) * g * g;
            let m_hat = m / (1.0 - o.beta1.powi(t));
            let v_hat = v / (1.0 - o.beta2.powi(t));
            p -= lr * m_hat / (v_hat.sqrt() + o.epsilon);
        }
        p
    }

    #[test]
    fn ten_steps_follow_the_formula() {
        let options = Options { weight_decay: 0.1, ..Options::default() };
        let mut params = params(&[0.5, -1.5], &[1, 2]);
        let mut adamw = AdamW::new(options, &params);
        let grads: Vec<f64> = (0..10).map(|i| f64::from(i - 4) * 0.25).collect();
        for &g in &grads {
            adamw.step(&mut params, &Gradients { values: vec![vec![g as f32, -g as f32]] }, 1e-2);
        }
        let negated: Vec<f64> = grads.iter().map(|g| -g).collect();
        let expected = [law(0.5, &grads, 1e-2, options), law(-1.5, &negated, 1e-2, options)];
        for (got, expected) in params[0].value.iter().zip(expected) {
            assert!((f64::from(*got) - expected).abs() <= 1e-6, "{got} against {expected}");
        }
    }

    #[test]
    fn vectors_are_not_decayed() {
        for (shape, moved) in [(vec![2], false), (vec![1, 2], true)] {
            let mut params = params(&[1.0, 2.0], &shape);
            let mut adamw = AdamW::new(Options { weight_decay: 0.1, ..Options::default() }, &params);
            adamw.step(&mut params, &Gradients { values: vec![vec![0.0; 2]] }, 0.1);
            assert_eq!(params[0].value[0] != 1.0, moved, "{shape:?}");
        }
    }

    #[test]
    fn a_rate_of_zero_moves_nothing_but_the_moments() {
        let mut params = params(&[1.0, 2.0], &[1, 2]);
        let mut adamw = AdamW::new(Options::default(), &params);
        adamw.step(&mut params, &Gradients { values: vec![vec![1.0; 2]] }, 0.0);
        assert_eq!(params[0].value, [1.0, 2.0]);
        assert!(adamw.moments[0].1[0] > 0.09);
    }
}
