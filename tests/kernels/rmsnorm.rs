//! `kernels/rmsnorm.cu` against `tensor::ops::rmsnorm::reference`.

use crate::support::{
    as_good_as, bf16_numbers, bytes, close, detector_is_silent, finds, numbers, rounded, same_bits_on_every_schedule,
    through_bf16, values, wide,
};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::rmsnorm;
use pipe::problem::Problem;
use pipe::tensor::ops::rmsnorm::reference;

const EPS: f32 = 1e-6;

/// Rows and channels: single elements, primes, multiples of 8, rows longer than a block's reach, and so many
/// rows that several are summed before the last step.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 8), (7, 37), (2, 896), (5, 2056), (37, 264)];

fn forward(gpu: &Gpu, rows: usize, channels: usize) -> Result<Vec<Vec<u8>>, Problem> {
    let x = gpu.upload(&bf16_numbers(rows * channels, "x"))?;
    let w = gpu.upload(&numbers(channels, "w"))?;
    let (mut y, mut rstd) = (gpu.alloc(x.len())?, gpu.alloc(rows)?);
    rmsnorm::forward(&mut y, &mut rstd, &x, &w, EPS)?;
    Ok(vec![bytes(&y)?, bytes(&rstd)?])
}

/// dx, dw added to numbers of its own, and dx added to numbers of its own.
fn backward(gpu: &Gpu, rows: usize, channels: usize) -> Result<Vec<Vec<u8>>, Problem> {
    let len = rows * channels;
    let [x, dy] = [gpu.upload(&bf16_numbers(len, "x"))?, gpu.upload(&bf16_numbers(len, "dy"))?];
    let w = gpu.upload(&numbers(channels, "w"))?;
    let rstd = gpu.upload(&scales(rows, channels))?;
    let mut dw = gpu.upload(&numbers(channels, "dw"))?;
    let mut dx = gpu.alloc(len)?;
    rmsnorm::backward(&mut dx, Some(&mut dw), &dy, &x, &w, &rstd, false)?;
    let mut added = gpu.upload(&bf16_numbers(len, "start"))?;
    rmsnorm::backward(&mut added, None, &dy, &x, &w, &rstd, true)?;
    Ok(vec![bytes(&dx)?, bytes(&dw)?, bytes(&added)?])
}

/// The forward pass' rstd of the rows of "x".
fn scales(rows: usize, channels: usize) -> Vec<f32> {
    let x = wide(&bf16_numbers(rows * channels, "x"));
    let mean = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>() / channels as f64;
    x.chunks(channels).map(|x| (mean(x) + f64::from(EPS)).sqrt().recip() as f32).collect()
}

#[test]
fn forward_follows_its_reference_on_every_schedule() {
    for (rows, channels) in SHAPES {
        let results = same_bits_on_every_schedule(|gpu| forward(gpu, rows, channels));
        let x = wide(&bf16_numbers(rows * channels, "x"));
        let want = reference::forward(&x, &wide(&numbers(channels, "w")), f64::from(EPS));
        as_good_as(&values::<bf16>(&results[0]), &through_bf16(&want), &want, 0.0, "y");
        close(&values::<f32>(&results[1]), &wide(&scales(rows, channels)), 1e-6, "rstd");
    }
}

#[test]
fn backward_follows_its_reference_on_every_schedule() {
    for (rows, channels) in SHAPES {
        let results = same_bits_on_every_schedule(|gpu| backward(gpu, rows, channels));
        let [x, dy] = ["x", "dy"].map(|name| wide(&bf16_numbers(rows * channels, name)));
        let (want, dw) = reference::backward(&dy, &x, &wide(&numbers(channels, "w")), f64::from(EPS));
        as_good_as(&values::<bf16>(&results[0]), &through_bf16(&want), &want, 1e-6, "dx");

        let start = wide(&numbers(channels, "dw"));
        let dw: Vec<f64> = dw.iter().zip(&start).map(|(dw, start)| dw + start).collect();
        close(&values::<f32>(&results[1]), &dw, 1e-6, "dw is added to");

        let start = wide(&bf16_numbers(rows * channels, "start"));
        let sum = |dx: &[f64]| -> Vec<f64> { dx.iter().zip(&start).map(|(dx, start)| dx + start).collect() };
        let plain = through_bf16(&sum(&through_bf16(&want)));
        as_good_as(&values::<bf16>(&results[2]), &plain, &sum(&want), 1e-6, "dx is added to");
    }
}

#[test]
fn no_access_is_out_of_bounds_unordered_or_of_nothing() {
    for (rows, channels) in SHAPES {
        detector_is_silent(|gpu| forward(gpu, rows, channels));
        detector_is_silent(|gpu| backward(gpu, rows, channels));
    }
}

#[test]
fn a_row_is_the_same_whatever_its_neighbours() {
    let (rows, channels) = (37, 264);
    let gpu = crate::support::gpu();
    let x = bf16_numbers(rows * channels, "x");
    let all = forward(&gpu, rows, channels).expect("forward");
    for row in [0, 1, 36] {
        let w = gpu.upload(&numbers(channels, "w")).expect("upload");
        let x = gpu.upload(&x[row * channels..(row + 1) * channels]).expect("upload");
        let (mut y, mut rstd) = (gpu.alloc(channels).expect("alloc"), gpu.alloc(1).expect("alloc"));
        rmsnorm::forward(&mut y, &mut rstd, &x, &w, EPS).expect("forward");
        assert_eq!(bytes(&y).expect("bytes"), all[0][row * channels * 2..(row + 1) * channels * 2]);
    }
}

#[test]
fn large_and_small_rows_are_scaled_without_loss() {
    let gpu = crate::support::gpu();
    let channels = 40;
    for size in [1e-18f32, 1e-3, 1e15] {
        let x = rounded(&numbers(channels, "x").iter().map(|x| x * size).collect::<Vec<f32>>());
        let w = vec![1.0f32; channels];
        let (on_x, on_w) = (gpu.upload(&x).expect("upload"), gpu.upload(&w).expect("upload"));
        let (mut y, mut rstd) = (gpu.alloc(channels).expect("alloc"), gpu.alloc(1).expect("alloc"));
        rmsnorm::forward(&mut y, &mut rstd, &on_x, &on_w, EPS).expect("forward");
        let want = reference::forward(&wide(&x), &wide(&w), f64::from(EPS));
        as_good_as(&y.download().expect("download"), &through_bf16(&want), &want, 1e-30, "y");
    }
}

#[test]
fn nothing_is_done_for_no_rows() {
    let gpu = crate::support::gpu();
    forward(&gpu, 0, 8).expect("no rows");
    let unchanged = backward(&gpu, 0, 8).expect("no rows");
    assert_eq!(values::<f32>(&unchanged[1]), numbers(8, "dw"));
}

#[test]
fn planted_faults_are_found() {
    let run = |gpu: &Gpu| backward(gpu, 37, 264);
    for (fault, words) in [
        ("OTHERS_COLUMNS", "shared memory is read without a barrier after another thread's write"),
        ("NO_BARRIER", "shared memory is read"),
        ("EVERY_WARP", "two threads write to the same place without a barrier between"),
    ] {
        let found = finds(fault, run);
        let said = found.detector.unwrap_or_else(|| panic!("the detector does not see {fault}"));
        assert!(said.contains(words) && said.contains("rmsnorm.cu:"), "{fault}: {said}");
    }
}
