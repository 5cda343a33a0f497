//! AdamW with block-wise 8-bit states (Dettmers et al., "8-bit optimizers via block-wise quantization"),
//! as bitsandbytes' CUDA kernel computes it.
//!
//! Each moment is stored as one byte per element and one f32 per block of 256 consecutive elements: the
//! block's largest magnitude. A byte indexes the *dynamic* map: 256 values in [-1, 1] (signed, first
//! moment) or [0, 1] (unsigned, second moment) whose spacing shrinks by decades towards 0. A value becomes the
//! nearest entry of the map; the first moment keeps its sign, moving by one entry if rounding lost it.
//! Tensors with fewer than 4,096 elements keep f32 states.
//!
//! ```text
//! m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//! p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + sqrt(1 - beta2^t) epsilon)
//! p -= lr * weight_decay * p            (after, where torch decays before)
//! ```
//!
//! bitsandbytes' CPU path rounds through a table of 65,536 cells instead and turns small values into about
//! 2e-5 of the block's maximum; that is not imitated.

use super::state::{StateMut, StateRef};
use crate::cuda::ops::adamw::Options;
use crate::model::{Gradients, Parameter};
use rayon::prelude::*;
use std::sync::LazyLock;

pub use crate::cuda::ops::adamw::{BLOCK, SMALLEST};

/// Blocks per task.
const TASK: usize = 64;

/// The 256 values a byte may mean, ascending.
pub type Map = [f32; 256];

/// Signed values: seven decades, the last bit of each decade doubling the number of steps in it, with 0 and 1.
pub static SIGNED: LazyLock<Map> = LazyLock::new(|| dynamic_map(true));
/// Unsigned values: as the signed ones with twice the steps.
pub static UNSIGNED: LazyLock<Map> = LazyLock::new(|| dynamic_map(false));

/// `create_dynamic_map` of bitsandbytes, in f32 as there.
fn dynamic_map(signed: bool) -> Map {
    let mut values = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let steps = (1usize << if signed { decade } else { decade + 1 }) + 1;
        let scale = 10f64.powi(decade - 6) as f32;
        let bounds = linspace(0.1, 1.0, steps);
        for pair in bounds.windows(2) {
            let mean = (pair[0] + pair[1]) / 2.0;
            values.push(scale * mean);
            if signed {
                values.push(-scale * mean);
            }
        }
    }
    values.resize(256, 0.0);
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// `torch.linspace`: the second half counts down from the end, each by one fused multiply-add.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    let at = |i: usize| {
        if i < steps / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - i - 1) as f32, end) }
    };
    (0..steps).map(at).collect()
}

/// The entry of `map` nearest to `x` in [-1, 1]; half-way goes to the entry the search arrives at, as in the
/// CUDA kernel (`quantize_2D`).
fn nearest(map: &Map, lowest: f32, x: f32) -> u8 {
    let (mut lower_pivot, mut upper_pivot, mut pivot) = (0, 255, 127);
    let (mut lower, mut upper) = (lowest, 1.0);
    let mut value = map[127];
    for step in [64, 32, 16, 8, 4, 2, 1] {
        if x > value {
            (lower_pivot, lower) = (pivot, value);
            pivot += step;
        } else {
            (upper_pivot, upper) = (pivot, value);
            pivot -= step;
        }
        value = map[pivot];
    }
    let code = if x > value {
        if x > (upper + value) * 0.5 { upper_pivot } else { pivot }
    } else if x < (lower + value) * 0.5 {
        lower_pivot
    } else {
        pivot
    };
    code as u8
}

/// The code of a signed value: nearest, but never across the sign.
fn signed_code(x: f32) -> u8 {
    let code = nearest(&SIGNED, -1.0, x);
    if SIGNED[usize::from(code)].is_sign_negative() == x.is_sign_negative() {
        code
    } else if x > 0.0 {
        code + 1
    } else {
        code - 1
    }
}

fn unsigned_code(x: f32) -> u8 {
    nearest(&UNSIGNED, 0.0, x)
}

#[derive(Debug, Clone)]
enum Moments {
    Full { first: Vec<f32>, second: Vec<f32> },
    Blocks { first: Vec<u8>, first_max: Vec<f32>, second: Vec<u8>, second_max: Vec<f32> },
}

/// Moments of every parameter, one byte each.
#[derive(Debug, Clone)]
pub struct AdamW8bit {
    /// The constants of the update.
    pub options: Options,
    /// Updates made so far.
    pub steps: u64,
    moments: Vec<(String, Moments)>,
}

impl AdamW8bit {
    /// Zero moments for `params`.
    pub fn new(options: Options, params: &[Parameter]) -> AdamW8bit {
        let zero = |param: &Parameter| {
            let len = param.value.len();
            let moments = if len < SMALLEST {
                Moments::Full { first: vec![0.0; len], second: vec![0.0; len] }
            } else {
                let blocks = len.div_ceil(BLOCK);
                Moments::Blocks {
                    first: vec![0; len],
                    first_max: vec![0.0; blocks],
                    second: vec![0; len],
                    second_max: vec![0.0; blocks],
                }
            };
            (param.name.clone(), moments)
        };
        AdamW8bit { options, steps: 0, moments: params.iter().map(zero).collect() }
    }

    /// One update of `params`, which must be those given to [`AdamW8bit::new`].
    pub fn step(&mut self, params: &mut [Parameter], grads: &Gradients, learning_rate: f64) {
        self.steps += 1;
        let Options { beta1, beta2, epsilon, weight_decay } = self.options;
        let correction1 = 1.0 - beta1.powf(self.steps as f64);
        let correction2 = (1.0 - beta2.powf(self.steps as f64)).sqrt();
        let rates = Rates {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (learning_rate * correction2 / correction1) as f32,
            epsilon: (correction2 * epsilon) as f32,
        };
        for ((param, grad), (_, moments)) in params.iter_mut().zip(&grads.values).zip(&mut self.moments) {
            let keep = if param.decays() { (1.0 - learning_rate * weight_decay) as f32 } else { 1.0 };
            match moments {
                Moments::Full { first, second } => rates.update(&mut param.value, grad, first, second, keep),
                Moments::Blocks { first, first_max, second, second_max } => {
                    let size = TASK * BLOCK;
                    param
                        .value
                        .par_chunks_mut(size)
                        .zip(grad.par_chunks(size))
                        .zip(first.par_chunks_mut(size).zip(first_max.par_chunks_mut(TASK)))
                        .zip(second.par_chunks_mut(size).zip(second_max.par_chunks_mut(TASK)))
                        .for_each(|(((param, grad), (first, first_max)), (second, second_max))| {
                            let blocks = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
                            let first = first.chunks_mut(BLOCK).zip(first_max);
                            let second = second.chunks_mut(BLOCK).zip(second_max);
                            for (((param, grad), first), second) in blocks.zip(first).zip(second) {
                                rates.update_block(param, grad, first, second, keep);
                            }
                        });
                }
            }
        }
    }

    /// The codes of both moments of parameter `index`, unless it is small.
    pub fn codes(&self, index: usize) -> Option<(&[u8], &[u8])> {
        match &self.moments.get(index)?.1 {
            Moments::Full { .. } => None,
            Moments::Blocks { first, second, .. } => Some((first, second)),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let size = |moments: &Moments| match moments {
            Moments::Full { first, second } => 4 * (first.len() + second.len()),
            Moments::Blocks { first, first_max, second, second_max } => {
                first.len() + second.len() + 4 * (first_max.len() + second_max.len())
            }
        };
        self.moments.iter().map(|(_, moments)| size(moments)).sum()
    }

    pub(super) fn states(&self) -> Vec<(String, StateRef<'_>)> {
        let mut states = Vec::new();
        for (name, moments) in &self.moments {
            match moments {
                Moments::Full { first, second } => {
                    states.push((format!("{name}.m"), StateRef::F32(first)));
                    states.push((format!("{name}.v"), StateRef::F32(second)));
                }
                Moments::Blocks { first, first_max, second, second_max } => {
                    states.push((format!("{name}.m8"), StateRef::U8(first)));
                    states.push((format!("{name}.m8.max"), StateRef::F32(first_max)));
                    states.push((format!("{name}.v8"), StateRef::U8(second)));
                    states.push((format!("{name}.v8.max"), StateRef::F32(second_max)));
                }
            }
        }
        states
    }

    pub(super) fn states_mut(&mut self) -> Vec<StateMut<'_>> {
        let mut states = Vec::new();
        for (_, moments) in &mut self.moments {
            match moments {
                Moments::Full { first, second } => states.extend([StateMut::F32(first), StateMut::F32(second)]),
                Moments::Blocks { first, first_max, second, second_max } => states.extend([
                    StateMut::U8(first),
                    StateMut::F32(first_max),
                    StateMut::U8(second),
                    StateMut::F32(second_max),
                ]),
            }
        }
        states
    }
}

/// The scalars of one step.
struct Rates {
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    epsilon: f32,
}

impl Rates {
    fn update(&self, param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32], keep: f32) {
        for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(first).zip(second) {
            *m = self.beta1 * *m + self.one_minus_beta1 * g;
            *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
            *p = (*p - self.step_size * (*m / (v.sqrt() + self.epsilon))) * keep;
        }
    }

    /// Decode, update, encode: one block of at most [`BLOCK`] elements.
    fn update_block(
        &self,
        param: &mut [f32],
        grad: &[f32],
        (first, first_max): (&mut [u8], &mut f32),
        (second, second_max): (&mut [u8], &mut f32),
        keep: f32,
    ) {
        let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (m, v) = (&mut m[..param.len()], &mut v[..param.len()]);
        for (m, code) in m.iter_mut().zip(&*first) {
            *m = SIGNED[usize::from(*code)] * *first_max;
        }
        for (v, code) in v.iter_mut().zip(&*second) {
            *v = UNSIGNED[usize::from(*code)] * *second_max;
        }
        self.update(param, grad, m, v, keep);
        *first_max = m.iter().fold(0.0, |max, value| value.abs().max(max));
        *second_max = v.iter().fold(0.0, |max, value| value.abs().max(max));
        encode(first, m, *first_max, signed_code);
        encode(second, v, *second_max, unsigned_code);
    }
}

/// A block of zeros has no scale to divide by; its codes are 0, and whatever they mean is multiplied by 0.
fn encode(codes: &mut [u8], values: &[f32], max: f32, code: impl Fn(f32) -> u8) {
    if max == 0.0 {
        return codes.fill(0);
    }
    for (to, value) in codes.iter_mut().zip(values) {
        *to = code(*value / max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;
    use crate::train::AdamW;

    const OPTIONS: Options = Options { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 1e-6 };

    fn parameter(len: usize) -> Vec<Parameter> {
        let random = Stream::named(1, &["parameter"]);
        let value = (0..len).map(|i| random.normal(i as u64) as f32 * 0.02).collect();
        vec![Parameter { name: "p".into(), shape: vec![1, len], value }]
    }

    /// Gradients whose elements keep their scale from step to step, as real ones do.
    fn gradient(step: u64, len: usize) -> Gradients {
        let scale = Stream::named(2, &["scale"]);
        let random = Stream::named(step, &["gradient"]);
        let value = |i| (random.normal(i) * 0.3 + 1.0) * scale.normal(i) * 1e-3;
        Gradients { values: vec![(0..len as u64).map(|i| value(i) as f32).collect()] }
    }

    #[test]
    fn the_maps_ascend_from_end_to_end() {
        for (map, ends) in [(&*SIGNED, (-0.992_968_74, 1.0)), (&*UNSIGNED, (0.0, 1.0))] {
            assert_eq!((map[0], map[255]), ends);
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(SIGNED[127], 0.0);
        assert_eq!(SIGNED[128], 5.500_000_4e-7);
    }

    #[test]
    fn a_code_is_the_nearest_entry_and_keeps_the_sign() {
        let random = Stream::named(3, &["codes"]);
        for i in 0..20_000 {
            let x = ((random.uniform(2 * i) * 2.0 - 1.0) * 10f64.powf(-7.0 * random.uniform(2 * i + 1))) as f32;
            let best = |map: &Map, x: f32| map.iter().map(|value| (value - x).abs()).fold(f32::INFINITY, f32::min);
            let error = (UNSIGNED[usize::from(unsigned_code(x.abs()))] - x.abs()).abs();
            assert!(error <= best(&UNSIGNED, x.abs()), "{x}");
            let value = SIGNED[usize::from(signed_code(x))];
            assert!(value.is_sign_negative() == x.is_sign_negative(), "{x} became {value}");
            assert!((value - x).abs() <= best(&SIGNED, x).max(5.5e-7), "{x} became {value}");
        }
        assert_eq!(SIGNED[usize::from(signed_code(0.0))], 0.0);
        assert_eq!(UNSIGNED[usize::from(unsigned_code(0.0))], 0.0);
    }

    #[test]
    fn small_tensors_follow_the_f32_optimizer() {
        let (mut small, mut full) = (parameter(SMALLEST - 1), parameter(SMALLEST - 1));
        let (mut eight, mut law) = (AdamW8bit::new(OPTIONS, &small), AdamW::new(OPTIONS, &full));
        for step in 0..10 {
            let grads = gradient(step, SMALLEST - 1);
            eight.step(&mut small, &grads, 1e-3);
            law.step(&mut full, &grads, 1e-3);
        }
        assert_eq!(eight.bytes(), 8 * (SMALLEST - 1));
        for (a, b) in small[0].value.iter().zip(&full[0].value) {
            assert!((a - b).abs() <= 1e-7, "{a} against {b}");
        }
    }

    #[test]
    fn large_tensors_stay_near_the_f32_optimizer_with_a_quarter_of_its_memory() {
        let len = 40 * BLOCK + 77;
        let start = parameter(len);
        let (mut eight_params, mut full_params) = (start.clone(), start.clone());
        let (mut eight, mut full) = (AdamW8bit::new(OPTIONS, &start), AdamW::new(OPTIONS, &start));
        for step in 0..20 {
            let grads = gradient(step, len);
            eight.step(&mut eight_params, &grads, 1e-3);
            full.step(&mut full_params, &grads, 1e-3);
        }
        assert!(eight.bytes() * 39 <= full.bytes() * 10, "{} against {}", eight.bytes(), full.bytes());
        let (mut apart, mut moved) = (0.0, 0.0);
        for ((a, b), start) in eight_params[0].value.iter().zip(&full_params[0].value).zip(&start[0].value) {
            apart += f64::from((a - b).abs());
            moved += f64::from((b - start).abs());
        }
        assert!(apart <= 0.1 * moved, "mean distance {apart} where the parameters moved {moved}");
        assert!(apart > 0.0, "eight bits are not f32");
    }

    #[test]
    fn a_block_without_gradient_stays_finite() {
        let mut params = parameter(SMALLEST);
        let before = params[0].value.clone();
        let mut adamw = AdamW8bit::new(Options { weight_decay: 0.0, ..OPTIONS }, &params);
        for _ in 0..3 {
            adamw.step(&mut params, &Gradients { values: vec![vec![0.0; SMALLEST]] }, 1e-3);
        }
        assert_eq!(params[0].value, before);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let len = 300 * BLOCK + 5;
        let runs = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut params = parameter(len);
                let mut adamw = AdamW8bit::new(OPTIONS, &params);
                (0..3).for_each(|step| adamw.step(&mut params, &gradient(step, len), 1e-3));
                params
            })
        });
        assert_eq!(runs[0][0].value, runs[1][0].value);
    }
}
