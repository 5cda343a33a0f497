//! Gradient clipping by global norm, as `torch.nn.utils.clip_grad_norm_`:
//! `g *= min(1, max_norm / (norm + 1e-6))`. The norm is summed in f64 over fixed blocks, in order.

use crate::model::Gradients;
use crate::problem::Problem;
use rayon::prelude::*;

/// Values per partial sum. Fixed, so that the sum does not depend on threads.
const BLOCK: usize = 1 << 14;

/// L2 norm over all gradients.
pub fn global_norm(grads: &Gradients) -> f64 {
    grads.values.iter().map(|values| sum_of_squares(values)).sum::<f64>().sqrt()
}

fn sum_of_squares(values: &[f32]) -> f64 {
    let blocks: Vec<f64> = values
        .par_chunks(BLOCK)
        .map(|block| {
            // Eight running sums: the compiler may not reorder one.
            let mut sums = [0.0f64; 8];
            let (whole, rest) = block.as_chunks::<8>();
            for values in whole {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += f64::from(*value) * f64::from(*value);
                }
            }
            let rest: f64 = rest.iter().map(|value| f64::from(*value).powi(2)).sum();
            sums.iter().sum::<f64>() + rest
        })
        .collect();
    blocks.iter().sum()
}

/// Scales `grads` to a norm of at most `max_norm`. `norm` is what [`global_norm`] gave.
pub fn clip(grads: &mut Gradients, norm: f64, max_norm: f64) {
    let scale = (max_norm / (norm + 1e-6)).min(1.0) as f32;
    if scale < 1.0 {
        for values in &mut grads.values {
            values.par_chunks_mut(BLOCK).for_each(|block| block.iter_mut().for_each(|value| *value *= scale));
        }
    }
}

/// `Err`, naming the step, unless loss and gradient norm are finite. Call it before the update.
pub fn require_finite(loss: f64, norm: f64, step: u64) -> Result<(), Problem> {
    match (loss.is_finite(), norm.is_finite()) {
        (false, _) => Err(not_finite("loss", loss, step)),
        (true, false) => Err(not_finite("gradient norm", norm, step)),
        (true, true) => Ok(()),
    }
}

fn not_finite(what: &str, value: f64, step: u64) -> Problem {
    Problem::new("train::not_finite", format!("the {what} is {value} at step {step}"))
        .note("the update was not made; the last checkpoint is from before it")
        .help("lower `learning_rate` or `optimizer.clip_norm`; the next run goes on from the state before this step")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_gradient_is_scaled_and_a_short_one_is_left_alone() {
        let mut grads = Gradients { values: vec![vec![3.0; 100], vec![4.0; 100]] };
        let norm = global_norm(&grads);
        assert!((norm - 50.0).abs() <= 1e-12);
        clip(&mut grads, norm, 100.0);
        assert_eq!(grads.values[0][0], 3.0);
        clip(&mut grads, norm, 5.0);
        assert!((global_norm(&grads) - 5.0).abs() <= 1e-5);
    }

    #[test]
    fn the_norm_has_the_same_bits_on_any_number_of_threads() {
        let values: Vec<f32> = (0..100_003).map(|i| ((i * 7919) % 1013) as f32 * 1e-3 - 0.4).collect();
        let grads = Gradients { values: vec![values] };
        let norms: Vec<u64> = [1, 2, 5]
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| global_norm(&grads)).to_bits()
            })
            .to_vec();
        assert!(norms.iter().all(|&norm| norm == norms[0]));
    }

    #[test]
    fn a_nan_stops_and_names_the_step() {
        assert!(require_finite(1.0, 1.0, 3).is_ok());
        assert!(require_finite(f64::NAN, 1.0, 3).unwrap_err().message.contains("the loss is NaN at step 3"));
        let grads = Gradients { values: vec![vec![f32::NAN]] };
        let problem = require_finite(1.0, global_norm(&grads), 4).unwrap_err();
        assert!(problem.message.contains("gradient norm is NaN at step 4"), "{problem}");
    }
}
