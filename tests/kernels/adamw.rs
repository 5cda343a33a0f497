//! AdamW against `train::AdamW` and `train::AdamW8bit`: the same bits.

use crate::support::{bytes, detector_is_silent, finds, gpu, numbers, same_bits_on_every_schedule};
use half::bf16;
use pipe::cuda::ops::adamw::{self, Tensor};
use pipe::cuda::{Buffer, Gpu};
use pipe::model::{Gradients, Parameter};
use pipe::problem::Problem;
use pipe::train::adamw8bit::{SIGNED, UNSIGNED};
use pipe::train::{Kind, Optimizer, Options};

const OPTIONS: Options = Options { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
const RATE: f64 = 1e-2;
/// Around eights, warps, pieces, and the size from which moments have 8 bits; two whose last block is short.
const LENGTHS: [usize; 10] = [1, 7, 8, 257, 2047, 2049, 4095, 4096, 4096 + 2 * 256 + 13, 4097];

/// Matrices and vectors in turn, so that some decay.
fn params(lengths: &[usize]) -> Vec<Parameter> {
    let param = |(i, len): (usize, &usize)| Parameter {
        name: format!("{i}"),
        shape: if i % 2 == 0 { vec![1, *len] } else { vec![*len] },
        value: numbers(*len, &format!("param {i}")),
    };
    lengths.iter().enumerate().map(param).collect()
}

/// Gradients of all magnitudes: some squares vanish or are no normal numbers. Zeros of both signs, and a whole
/// block of them.
fn gradients(lengths: &[usize], step: u64) -> Gradients {
    let value = |i: usize, len: usize| {
        let mut g = numbers(len, &format!("gradient {i} {step}"));
        for (at, g) in g.iter_mut().enumerate() {
            *g *= match at % 11 {
                0 => 1e-22,
                1 => 1e-19,
                2 => 1e4,
                3 => 0.0,
                _ => 1e-3,
            };
            if (256..512).contains(&at) {
                *g = 0.0;
            }
        }
        // Shrinks the moment of a last element. A block that it has to itself shrinks with it, if lanes beyond the
        // end have no part in it.
        if let Some(last) = g.last_mut() {
            *last = if step % 2 == 1 { 1.0 } else { -0.5 };
        }
        g
    };
    Gradients { values: lengths.iter().enumerate().map(|(i, len)| value(i, *len)).collect() }
}

enum Device {
    Full(adamw::AdamW),
    Eight(adamw::AdamW8bit),
}

impl Device {
    fn new(gpu: &Gpu, kind: Kind, lengths: &[usize]) -> Result<Device, Problem> {
        Ok(match kind {
            Kind::AdamW => Device::Full(adamw::AdamW::new(gpu, lengths)?),
            Kind::AdamW8bit => Device::Eight(adamw::AdamW8bit::new(gpu, lengths, &SIGNED, &UNSIGNED)?),
        })
    }

    fn step(&mut self, gpu: &Gpu, tensors: &[Tensor], step: u64) -> Result<(), Problem> {
        match self {
            Device::Full(adamw) => adamw.step(gpu, tensors, RATE, &OPTIONS, step),
            Device::Eight(adamw) => adamw.step(gpu, tensors, RATE, &OPTIONS, step),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Device::Full(adamw) => adamw.bytes(),
            Device::Eight(adamw) => adamw.bytes(),
        }
    }

    fn states(&self) -> Result<Vec<Vec<u8>>, Problem> {
        match self {
            Device::Full(adamw) => adamw.states(),
            Device::Eight(adamw) => adamw.states(),
        }
    }

    fn restore(&mut self, states: &[Vec<u8>]) -> Result<(), Problem> {
        match self {
            Device::Full(adamw) => adamw.restore(states),
            Device::Eight(adamw) => adamw.restore(states),
        }
    }
}

/// Parameters, their copies, and the states after so many steps. `again`: before the last step the states go
/// through the host into a new optimizer.
fn run(gpu: &Gpu, kind: Kind, lengths: &[usize], steps: u64, again: bool) -> Result<Vec<Vec<u8>>, Problem> {
    let upload = |values: &Vec<f32>| gpu.upload(values);
    let params: Vec<Buffer<f32>> =
        params(lengths).iter().map(|param| upload(&param.value)).collect::<Result<_, _>>()?;
    // Every third has no copy.
    let copies: Vec<Option<Buffer<bf16>>> = (0..)
        .zip(lengths)
        .map(|(i, len)| if i % 3 == 2 { Ok(None) } else { gpu.alloc(*len).map(Some) })
        .collect::<Result<_, _>>()?;
    let mut optimizer = Device::new(gpu, kind, lengths)?;
    for step in 1..=steps {
        if again && step == steps {
            let states = optimizer.states()?;
            optimizer = Device::new(gpu, kind, lengths)?;
            optimizer.restore(&states)?;
        }
        let grads: Vec<Buffer<f32>> = gradients(lengths, step).values.iter().map(upload).collect::<Result<_, _>>()?;
        let tensors: Vec<Tensor> = (0..lengths.len())
            .map(|i| Tensor { param: &params[i], grad: &grads[i], copy: copies[i].as_ref(), decays: i % 2 == 0 })
            .collect();
        optimizer.step(gpu, &tensors, step)?;
    }
    let mut results: Vec<Vec<u8>> = params.iter().map(bytes).collect::<Result<_, _>>()?;
    for copy in copies.iter().flatten() {
        results.push(bytes(copy)?);
    }
    results.extend(optimizer.states()?);
    Ok(results)
}

/// What the CPU makes of it: parameters, their copies, codes and the bytes of all moments.
fn law(kind: Kind, lengths: &[usize], steps: u64) -> (Vec<Parameter>, Optimizer) {
    let mut params = params(lengths);
    let mut optimizer = Optimizer::new(kind, OPTIONS, &params);
    for step in 1..=steps {
        optimizer.step(&mut params, &gradients(lengths, step), RATE);
    }
    (params, optimizer)
}

fn bits_of_the_cpu(kind: Kind) {
    let steps = 4;
    let got = same_bits_on_every_schedule(|gpu| run(gpu, kind, &LENGTHS, steps, false));
    let (params, optimizer) = law(kind, &LENGTHS, steps);
    let mut at = 0;
    let mut next = || {
        at += 1;
        &got[at - 1]
    };
    for param in &params {
        assert!(*next() == bytemuck::cast_slice::<f32, u8>(&param.value), "{} elements", param.value.len());
    }
    for (_, param) in params.iter().enumerate().filter(|(i, _)| i % 3 != 2) {
        let copy: Vec<bf16> = param.value.iter().map(|x| bf16::from_f32(*x)).collect();
        assert!(*next() == bytemuck::cast_slice::<bf16, u8>(&copy), "copy of {} elements", copy.len());
    }
    for (i, len) in LENGTHS.iter().enumerate() {
        let codes = match &optimizer {
            Optimizer::AdamW8bit(adamw) => adamw.codes(i),
            Optimizer::AdamW(_) => None,
        };
        match codes {
            Some((first, second)) => {
                assert!(next() == first, "codes of m, {len} elements");
                assert_eq!(next().len(), 4 * len.div_ceil(256));
                assert!(next() == second, "codes of v, {len} elements");
                assert_eq!(next().len(), 4 * len.div_ceil(256));
            }
            None => assert_eq!([next().len(), next().len()], [4 * len; 2]),
        }
    }
    let left: usize = got[at..].len();
    assert_eq!(left, 0, "states that nobody expects");
    let made = Device::new(&gpu(), kind, &LENGTHS).unwrap_or_else(|problem| panic!("{problem}"));
    assert_eq!(made.bytes(), optimizer.bytes());
}

#[test]
fn f32_moments_give_the_bits_of_the_cpu() {
    bits_of_the_cpu(Kind::AdamW);
}

#[test]
fn eight_bit_moments_give_the_bits_of_the_cpu() {
    bits_of_the_cpu(Kind::AdamW8bit);
}

#[test]
fn states_go_through_the_host_and_back() {
    for kind in [Kind::AdamW, Kind::AdamW8bit] {
        let through = run(&gpu(), kind, &LENGTHS, 3, true).unwrap_or_else(|problem| panic!("{problem}"));
        let straight = run(&gpu(), kind, &LENGTHS, 3, false).unwrap_or_else(|problem| panic!("{problem}"));
        assert!(through == straight, "{kind:?}");
        let gpu = gpu();
        let states = |lengths: &[usize]| Device::new(&gpu, kind, lengths).and_then(|device| device.states());
        let restored = |lengths: &[usize]| {
            Device::new(&gpu, kind, &[4096, 3]).and_then(|mut device| device.restore(&states(lengths)?))
        };
        assert!(restored(&[4096, 3]).is_ok());
        for other in [&[4096, 4][..], &[4096], &[4096, 3, 1], &[4097, 3]] {
            assert!(restored(other).is_err_and(|problem| problem.code == "cuda::optimizer_state"), "{other:?}");
        }
    }
}

#[test]
fn no_access_is_out_of_place() {
    for kind in [Kind::AdamW, Kind::AdamW8bit] {
        detector_is_silent(|gpu| run(gpu, kind, &LENGTHS, 2, false));
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let found = finds("ADAMW_NO_BARRIER", |gpu| run(gpu, Kind::AdamW8bit, &[4096 + 300], 2, false));
    assert!(found.detector.is_some_and(|said| said.contains("shared memory")));
    assert!(found.schedules > 0);
}
