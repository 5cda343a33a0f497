//! The backward pass against differences of the forward pass.

use super::*;
use pipe::model::Gradients;

/// sum of slope * log p, in f64.
fn loss(model: &Model, packed: &Packed, slopes: &[f32]) -> f64 {
    let logprobs = model.logprobs(&packed.batch());
    logprobs.iter().zip(slopes).map(|(p, slope)| f64::from(*p) * f64::from(*slope)).sum()
}

/// For each trained tensor, moves it along a random direction and compares the change of the loss with the
/// gradient. Central differences of an f32 model carry an error of about 1e-6 / step, so the step is large,
/// and Richardson's combination of two steps removes the error of its size.
fn check(mut model: Model, label: &str) {
    let packed = Packed::of(&sequences(&[7, 1, 12, 5]));
    let slopes = slopes(packed.rows.len());
    let forward = model.forward(&packed.batch());
    let mut grads = Gradients::zeros(model.params());
    model.backward(forward.tape, &slopes, &mut grads);
    for at in 0..model.params().len() {
        let name = model.params()[at].name.clone();
        let start = model.params()[at].value.clone();
        let random = Stream::named(11, &[&name]);
        let mut direction: Vec<f32> = (0..start.len() as u64).map(|i| random.normal(i) as f32).collect();
        let length = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
        direction.iter_mut().for_each(|d| *d /= length);
        let expected: f64 = grads.values[at].iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let mut moved = |step: f32| {
            model.update(|params| {
                params[at].value.iter_mut().zip(&start).zip(&direction).for_each(|((v, s), d)| *v = s + step * d);
            });
            loss(&model, &packed, &slopes)
        };
        let mut difference = |step: f32| (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        let (wide, narrow) = (difference(0.04), difference(0.02));
        let measured = (4.0 * narrow - wide) / 3.0;
        moved(0.0);
        let size = grads.values[at].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let error = (measured - expected).abs();
        assert!(
            error <= 2e-3 * size.max(1.0) + 1e-3,
            "{label} {name}: measured {measured}, gradient {expected}, norm {size}"
        );
        assert!(size > 0.0, "{label} {name}: no gradient at all");
    }
}

#[test]
fn adapters_on_every_linear() {
    for tied in [false, true] {
        check(with_adapter(tied, 3, &ALL), if tied { "tied" } else { "untied" });
    }
}

#[test]
fn an_adapter_whose_rank_is_above_the_hidden_size() {
    check(with_adapter(false, 40, &["q_proj", "down_proj", "lm_head"]), "rank 40");
}

#[test]
fn an_adapter_on_the_head_alone() {
    check(with_adapter(true, 4, &["lm_head"]), "head");
}

#[test]
fn every_weight() {
    for tied in [false, true] {
        check(everything_trained(tied), if tied { "tied" } else { "untied" });
    }
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let model = with_adapter(true, 3, &ALL);
    let all = sequences(&[9, 4, 13, 6]);
    let whole = Packed::of(&all);
    let slopes = slopes(whole.rows.len());
    let mut at_once = Gradients::zeros(model.params());
    let forward = model.forward(&whole.batch());
    model.backward(forward.tape, &slopes, &mut at_once);
    let mut added = Gradients::zeros(model.params());
    let mut done = 0;
    for ids in &all {
        let one = Packed::of(std::slice::from_ref(ids));
        let forward = model.forward(&one.batch());
        model.backward(forward.tape, &slopes[done..done + one.rows.len()], &mut added);
        done += one.rows.len();
    }
    for (a, b) in at_once.values.iter().flatten().zip(added.values.iter().flatten()) {
        assert!((a - b).abs() <= 1e-4 + 1e-4 * a.abs(), "{a} against {b}");
    }
}

#[test]
fn a_row_that_is_not_learned_gets_no_gradient() {
    let model = with_adapter(false, 3, &ALL);
    let packed = Packed::of(&sequences(&[8, 9]));
    let forward = model.forward(&packed.batch());
    let mut grads = Gradients::zeros(model.params());
    model.backward(forward.tape, &vec![0.0; packed.rows.len()], &mut grads);
    assert!(grads.values.iter().flatten().all(|&g| g == 0.0));
}
