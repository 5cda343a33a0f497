//! The global norm and clipping against `train::clip`.

use crate::support::{bytes, detector_is_silent, finds, gpu, numbers, same_bits_on_every_schedule, values};
use pipe::cuda::ops::grad_norm::GradNorm;
use pipe::cuda::{Buffer, Gpu};
use pipe::model::Gradients;
use pipe::problem::Problem;
use pipe::train::{clip, global_norm};

/// Around eights, pieces and blocks.
const LENGTHS: [usize; 8] = [1, 7, 8, 255, 2048, 2049, 5003, 40_001];

fn gradients(lengths: &[usize]) -> Vec<Vec<f32>> {
    lengths.iter().enumerate().map(|(i, len)| numbers(*len, &format!("gradient {i}"))).collect()
}

/// The norm, and the gradients clipped to a norm of `max`.
fn run(gpu: &Gpu, gradients: &[Vec<f32>], max: f64) -> Result<Vec<Vec<u8>>, Problem> {
    let lengths: Vec<usize> = gradients.iter().map(Vec::len).collect();
    let buffers: Vec<Buffer<f32>> = gradients.iter().map(|g| gpu.upload(g)).collect::<Result<_, _>>()?;
    let all: Vec<&Buffer<f32>> = buffers.iter().collect();
    let mut grad_norm = GradNorm::new(gpu, &lengths)?;
    let norm = grad_norm.norm(&all)?;
    // A second time, by the table that is there already.
    assert_eq!(norm.to_bits(), grad_norm.norm(&all)?.to_bits());
    grad_norm.clip(&all, norm, max)?;
    let mut results = vec![norm.to_bits().to_le_bytes().to_vec()];
    for buffer in &buffers {
        results.push(bytes(buffer)?);
    }
    Ok(results)
}

fn norm_of(gradients: &[Vec<f32>]) -> f64 {
    let results = run(&gpu(), gradients, f64::INFINITY).unwrap_or_else(|problem| panic!("{problem}"));
    values(&results[0])[0]
}

#[test]
fn the_norm_is_that_of_the_cpu_and_clipping_gives_its_bits() {
    for max in [1.0, 1e6] {
        let start = gradients(&LENGTHS);
        let got = same_bits_on_every_schedule(|gpu| run(gpu, &start, max));
        let mut grads = Gradients { values: start };
        let (norm, want): (f64, f64) = (values(&got[0])[0], global_norm(&grads));
        assert!((norm - want).abs() <= 1e-14 * want, "{norm} instead of {want}");
        // Scaled by the same norm, or left alone.
        clip(&mut grads, norm, max);
        for (got, want) in got[1..].iter().zip(&grads.values) {
            assert!(got == bytemuck::cast_slice::<f32, u8>(want), "{} elements, {max}", want.len());
        }
    }
}

#[test]
fn each_length_alone_and_more_pieces_than_threads() {
    for len in LENGTHS.into_iter().chain([2048 * 259 + 1]) {
        let gradients = gradients(&[len]);
        let (norm, want) = (norm_of(&gradients), global_norm(&Gradients { values: gradients }));
        assert!((norm - want).abs() <= 1e-14 * want, "{len}: {norm} instead of {want}");
    }
    assert_eq!(norm_of(&[]), 0.0);
    assert_eq!(norm_of(&[vec![], vec![3.0], vec![], vec![-4.0]]), 5.0);
}

#[test]
fn what_is_not_finite_comes_out_as_not_finite_and_what_is_large_does_not() {
    let with = |value: f32| {
        let mut gradients = gradients(&[300, 5003]);
        gradients[1][4999] = value;
        norm_of(&gradients)
    };
    assert!(with(f32::NAN).is_nan());
    assert_eq!(with(f32::INFINITY), f64::INFINITY);
    assert_eq!(with(f32::NEG_INFINITY), f64::INFINITY);
    let large = with(-3e38);
    assert!((large / f64::from(3e38f32) - 1.0).abs() <= 1e-14, "{large}");
    assert_eq!(norm_of(&[vec![1e-40; 4]]), 2.0 * f64::from(1e-40f32));
}

#[test]
fn a_norm_that_is_nan_scales_nothing() {
    let gpu = gpu();
    let mut grad_norm = GradNorm::new(&gpu, &[2]).unwrap_or_else(|problem| panic!("{problem}"));
    let gradient = gpu.upload(&[f32::NAN, 2.0]).unwrap_or_else(|problem| panic!("{problem}"));
    let norm = grad_norm.norm(&[&gradient]).unwrap_or_else(|problem| panic!("{problem}"));
    grad_norm.clip(&[&gradient], norm, 1.0).unwrap_or_else(|problem| panic!("{problem}"));
    assert_eq!(gradient.download().unwrap_or_else(|problem| panic!("{problem}"))[1], 2.0);
}

#[test]
fn no_access_is_out_of_place() {
    let gradients = gradients(&LENGTHS);
    detector_is_silent(|gpu| run(gpu, &gradients, 1.0));
}

#[test]
fn planted_faults_are_found() {
    let gradients = gradients(&[5003, 77]);
    let run = |gpu: &Gpu| run(gpu, &gradients, 1.0);
    for (fault, said) in [
        ("GRAD_NORM_NO_FIRST_BARRIER", "shared memory"),
        ("GRAD_NORM_NO_SECOND_BARRIER", "shared memory"),
        ("GRAD_NORM_ONE_TOO_MANY", "shared memory"),
    ] {
        let found = finds(fault, run);
        assert!(found.detector.as_ref().is_some_and(|words| words.contains(said)), "{fault}: {found:?}");
        assert!(found.schedules > 0, "{fault}: {found:?}");
    }
}
