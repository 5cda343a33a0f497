//! Between bf16 and f32: every bf16 there is, every kind of f32, and no element beyond the last.

use crate::support::{PORTABLE, bytes, detector_is_silent, gpu, numbers, rounded, same_bits_on_every_schedule, values};
use ::emulator::{Schedule, alloc, free, launch, with};
use half::bf16;
use pipe::cuda::ops::cast::{scale, to_bf16, to_f32};
use pipe::cuda::{self, Driver, Gpu};
use pipe::problem::{Exit, Problem};
use std::ffi::c_void;

/// The nearest bf16, its ties, what is beside them, for every exponent; then ordinary numbers.
fn floats() -> Vec<f32> {
    let mut all = Vec::new();
    for upper in (0..=0xffff_u32).step_by(0x3b) {
        all.extend([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|lower| f32::from_bits(upper << 16 | lower)));
    }
    for special in [0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY] {
        all.extend([special, -special]);
    }
    // NaN whose payload is below what bf16 keeps: cut off, it would be an infinity.
    all.extend([f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xff80_0001)]);
    all.extend(numbers(1001, "x"));
    all
}

fn narrowed(gpu: &Gpu, x: &[f32]) -> Result<Vec<Vec<u8>>, Problem> {
    let (x, mut y) = (gpu.upload(x)?, gpu.alloc(x.len())?);
    to_bf16(&mut y, &x)?;
    Ok(vec![bytes(&y)?])
}

fn widened(gpu: &Gpu, x: &[bf16]) -> Result<Vec<Vec<u8>>, Problem> {
    let (x, mut y) = (gpu.upload(x)?, gpu.alloc(x.len())?);
    to_f32(&mut y, &x)?;
    Ok(vec![bytes(&y)?])
}

fn scaled(gpu: &Gpu, x: &[f32]) -> Result<Vec<Vec<u8>>, Problem> {
    let mut x = gpu.upload(x)?;
    scale(&mut x, 0.3)?;
    Ok(vec![bytes(&x)?])
}

#[test]
fn a_float_becomes_the_nearest_bf16() {
    let x = floats();
    let got: Vec<bf16> = values(&same_bits_on_every_schedule(|gpu| narrowed(gpu, &x))[0]);
    for (x, got) in x.iter().zip(got) {
        let want = bf16::from_f32(*x);
        let same = if x.is_nan() { got.is_nan() } else { got.to_bits() == want.to_bits() };
        assert!(same, "{:08x} gives {:04x} instead of {:04x}", x.to_bits(), got.to_bits(), want.to_bits());
    }
}

#[test]
fn every_bf16_becomes_the_same_float() {
    let x: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let got: Vec<f32> = values(&same_bits_on_every_schedule(|gpu| widened(gpu, &x))[0]);
    for (x, got) in x.iter().zip(got) {
        assert_eq!(got.to_bits(), u32::from(x.to_bits()) << 16);
    }
}

#[test]
fn a_factor_multiplies_in_f32() {
    let x = floats();
    let got: Vec<f32> = values(&same_bits_on_every_schedule(|gpu| scaled(gpu, &x))[0]);
    for (x, got) in x.iter().zip(got) {
        let want = x * 0.3;
        assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{x}: {got} instead of {want}");
    }
}

#[test]
fn any_length_will_do() {
    for n in (0..=17).chain([2047, 2048, 2049, 4099]) {
        let x = numbers(n, "x");
        let narrow: Vec<bf16> = values(&same_bits_on_every_schedule(|gpu| narrowed(gpu, &x))[0]);
        assert!(narrow.iter().zip(&x).all(|(got, x)| *got == bf16::from_f32(*x)), "{n} elements");
        let wide: Vec<f32> = values(&same_bits_on_every_schedule(|gpu| widened(gpu, &narrow))[0]);
        assert!(wide.iter().zip(&narrow).all(|(got, x)| *got == x.to_f32()), "{n} elements");
        let products: Vec<f32> = values(&same_bits_on_every_schedule(|gpu| scaled(gpu, &x))[0]);
        assert!(products.iter().zip(&x).all(|(got, x)| *got == x * 0.3), "{n} elements");
        for run in [narrowed, scaled] {
            detector_is_silent(|gpu| run(gpu, &x));
        }
        detector_is_silent(|gpu| widened(gpu, &narrow));
    }
}

/// Memory that ends where its values end; a buffer of the pool ends later.
fn exact<T: bytemuck::Pod>(values: &[T]) -> u64 {
    let address = alloc(size_of_val(values));
    PORTABLE.upload(address, bytemuck::cast_slice(values)).unwrap();
    address
}

#[test]
fn no_element_beyond_the_last_is_touched() {
    for n in 1..=17 {
        let (x, y) = (exact(&numbers(n, "x")), exact(&rounded(&numbers(n, "y"))));
        for (kernel, to, from) in [("cast_to_bf16", y, x), ("cast_to_f32", x, y)] {
            let mut values = [to, from, n as u64];
            let mut arguments = values.each_mut().map(|value| std::ptr::from_mut(value).cast::<c_void>());
            let watched = Schedule { detector: true, ..Schedule::default() };
            // SAFETY: both kernels take two pointers and an `int`.
            let done = with(watched, || unsafe { launch(kernel, (1, 1, 1), (256, 1, 1), 0, &mut arguments) });
            assert_eq!(done, Ok(()), "{n} elements");
        }
        free(x);
        free(y);
    }
}

#[test]
fn a_number_that_no_kernel_can_count_to_is_an_error_and_nothing_runs() {
    let gpu = gpu();
    let x = gpu.upload(&[1.0f32; 8]).unwrap();
    let scale = |n: usize| {
        let launch = gpu.launch("cast_scale", 1usize, 256usize).buffer(&x).int(n).float(2.0);
        // SAFETY: the arguments of `cast_scale`, and no more elements than there are, or no launch at all.
        unsafe { launch.run() }
    };
    let problem = scale(cuda::LARGEST_COUNT + 1).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("cuda::too_large", Exit::Usage));
    assert!(problem.message.contains("`cast_scale`") && problem.message.contains("2147483648"), "{problem}");
    assert!(x.download().unwrap().iter().all(|value| *value == 1.0));
    scale(8).unwrap();
    assert!(x.download().unwrap().iter().all(|value| *value == 2.0));
}

#[test]
fn rows_that_are_too_many_are_refused_before_anything_is_launched() {
    // The widest of a model of 14 billion weights: an MLP of 13,824.
    cuda::check_rows(155_344, 13_824).unwrap();
    let problem = cuda::check_rows(155_345, 13_824).unwrap_err();
    assert_eq!(problem.code, "cuda::too_large");
    assert!(problem.notes.iter().any(|note| note.contains("at most 155344 tokens")), "{problem}");
    cuda::check_rows(usize::MAX, 2).unwrap_err();
    cuda::check_rows(0, 0).unwrap();
}
