//! A device that is the emulator, schedules, reproducible numbers, and ways to compare.

#![allow(dead_code)] // Not every test file needs every helper.

use bytemuck::Pod;
use emulator::{Order, Schedule};
use half::bf16;
use pipe::cuda::{Buffer, Dim, Driver, Gpu};
use pipe::problem::Problem;
use pipe::random::Stream;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, OnceLock};

/// The emulator, as a device.
pub struct Emulated;

impl Driver for Emulated {
    fn name(&self) -> String {
        "emulator".into()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Problem> {
        match emulator::alloc(bytes) {
            0 => Err(Problem::new("cuda::out_of_memory", "the emulator has no such amount of memory")),
            address => Ok(address),
        }
    }

    fn free(&self, address: u64) {
        emulator::free(address);
    }

    fn memory(&self) -> Result<(usize, usize), Problem> {
        Ok((16 << 30, 16 << 30))
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Problem> {
        // SAFETY: the pool hands out addresses of at least so many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Problem> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Problem> {
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Dim,
        block: Dim,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Problem> {
        let (grid, block) = ((grid.0, grid.1, grid.2), (block.0, block.1, block.2));
        // SAFETY: the caller's promise.
        unsafe { emulator::launch(kernel, grid, block, shared_bytes, arguments) }
            .map_err(|faults| Problem::new("cuda::fault", faults))
    }

    fn synchronize(&self) -> Result<(), Problem> {
        Ok(())
    }
}

/// The emulator with so many bytes of memory and no more.
pub struct Limited {
    left: Mutex<usize>,
    given: Mutex<HashMap<u64, usize>>,
}

impl Limited {
    pub fn to(bytes: usize) -> Gpu {
        Gpu::new(Box::new(Limited { left: Mutex::new(bytes), given: Mutex::default() }))
    }
}

impl Driver for Limited {
    fn name(&self) -> String {
        "small emulator".into()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Problem> {
        let mut left = self.left.lock().unwrap();
        let rest = left.checked_sub(bytes);
        let rest =
            rest.ok_or_else(|| Problem::new("cuda::out_of_memory", "small emulator has not enough free memory"))?;
        let address = Emulated.alloc(bytes)?;
        *left = rest;
        self.given.lock().unwrap().insert(address, bytes);
        Ok(address)
    }

    fn free(&self, address: u64) {
        *self.left.lock().unwrap() += self.given.lock().unwrap().remove(&address).expect("given before");
        Emulated.free(address);
    }

    fn memory(&self) -> Result<(usize, usize), Problem> {
        let (left, given) = (*self.left.lock().unwrap(), self.given.lock().unwrap().values().sum::<usize>());
        Ok((left, left + given))
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Problem> {
        Emulated.upload(to, bytes)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Problem> {
        Emulated.download(from, bytes)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Problem> {
        Emulated.zero(at, bytes)
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Dim,
        block: Dim,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Problem> {
        // SAFETY: the caller's promise.
        unsafe { Emulated.launch(kernel, grid, block, shared_bytes, arguments) }
    }

    fn synchronize(&self) -> Result<(), Problem> {
        Emulated.synchronize()
    }
}

/// Whether the tests run on a GPU: `PIPE_TEST_GPU=1`, for whoever has one.
pub fn on_device() -> bool {
    std::env::var_os("PIPE_TEST_GPU").is_some()
}

/// A new emulated device, its memory poisoned, blocks exactly as large as their buffers; or the GPU.
pub fn gpu() -> Gpu {
    static DEVICE: OnceLock<Gpu> = OnceLock::new();
    if on_device() {
        let open = || pipe::cuda::open(0).unwrap_or_else(|problem| panic!("PIPE_TEST_GPU is set, and {problem}"));
        return DEVICE.get_or_init(open).clone();
    }
    Gpu::exact(Box::new(Emulated))
}

/// Orders of threads and blocks, with asynchronous copies late and at once. A GPU has its own: it is asked twice
/// for the same.
pub fn schedules() -> Vec<Schedule> {
    if on_device() {
        return vec![Schedule::default(); 2];
    }
    let orders = [Order::Up, Order::Down, Order::Random(1), Order::Random(2)];
    let late = |late_copies| orders.map(|order| Schedule { order, late_copies, ..Schedule::default() });
    [late(true), late(false)].concat()
}

/// The results of `run`, each a list of bytes, which must not depend on the schedule. A fault fails the test.
#[track_caller]
pub fn same_bits_on_every_schedule(run: impl Fn(&Gpu) -> Result<Vec<Vec<u8>>, Problem>) -> Vec<Vec<u8>> {
    let mut first: Option<Vec<Vec<u8>>> = None;
    for schedule in schedules() {
        let results = match emulator::with(schedule, || run(&gpu())) {
            Ok(results) => results,
            Err(problem) => panic!("{schedule:?}: {problem}"),
        };
        match &first {
            None => first = Some(results),
            Some(first) => assert!(*first == results, "other bits with {schedule:?}"),
        }
    }
    first.expect("there are schedules")
}

/// `run` with every access watched reports nothing.
#[track_caller]
pub fn detector_is_silent(run: impl Fn(&Gpu) -> Result<Vec<Vec<u8>>, Problem>) {
    for order in [Order::Up, Order::Random(3)] {
        let schedule = Schedule { order, detector: true, ..Schedule::default() };
        if let Err(problem) = emulator::with(schedule, || run(&gpu())) {
            panic!("{schedule:?}: {problem}");
        }
    }
}

/// Who noticed a planted fault.
#[derive(Debug)]
pub struct Found {
    /// What the detector said, if anything.
    pub detector: Option<String>,
    /// Schedules, of those of [`schedules`], whose results differ from the sound kernel's or which ended with a report.
    pub schedules: usize,
}

/// Runs `run` with the kernels' variant of that fault, watched and under every schedule, and fails if nothing
/// shows it. The sound kernel's results are the measure.
#[track_caller]
pub fn finds(fault: &'static str, run: impl Fn(&Gpu) -> Result<Vec<Vec<u8>>, Problem>) -> Found {
    if on_device() {
        // Planted faults are for the emulator; some would bring a GPU down.
        return Found { detector: Some("not asked on a GPU".into()), schedules: schedules().len() };
    }
    let sound = run(&gpu()).unwrap_or_else(|problem| panic!("without a fault: {problem}"));
    let watched = Schedule { detector: true, fault: Some(fault), ..Schedule::default() };
    let detector = emulator::with(watched, || run(&gpu())).err().map(|problem| problem.to_string());
    let differs = |schedule: &Schedule| {
        let faulty = Schedule { fault: Some(fault), ..*schedule };
        emulator::with(faulty, || run(&gpu())).map_or(true, |results| results != sound)
    };
    let found = Found { detector, schedules: schedules().iter().filter(|schedule| differs(schedule)).count() };
    assert!(found.detector.is_some() || found.schedules > 0, "nothing shows the fault {fault}");
    found
}

/// The bits of a buffer.
pub fn bytes<T: Pod>(buffer: &Buffer<T>) -> Result<Vec<u8>, Problem> {
    Ok(bytemuck::cast_slice(&buffer.download()?).to_vec())
}

/// Bits as the values they are.
pub fn values<T: Pod>(bits: &[u8]) -> Vec<T> {
    bits.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// Standard normal numbers that depend on the name only.
pub fn numbers(len: usize, name: &str) -> Vec<f32> {
    let random = Stream::named(17, &[name]);
    (0..len).map(|i| random.normal(i as u64) as f32).collect()
}

/// To bf16, to the nearest.
pub fn rounded(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

/// Numbers as above, in bf16.
pub fn bf16_numbers(len: usize, name: &str) -> Vec<bf16> {
    rounded(&numbers(len, name))
}

/// What a store in bf16 leaves of exact results.
pub fn through_bf16(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| f64::from(bf16::from_f64(*x))).collect()
}

pub fn wide<T: Copy + Into<f64>>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| (*x).into()).collect()
}

/// The largest difference is at most `tolerance` times the largest wanted magnitude, or times 1, the size of
/// the inputs, where results cancel.
#[track_caller]
pub fn close<T: Copy + Into<f64>>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1.0f64, |max, x| max.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got: f64 = (*got).into();
        let error = (got - want).abs();
        assert!(error <= tolerance * size, "{what}, element {i}: {got} instead of {want}, scale {size}");
    }
}

/// The root of the mean squared difference.
fn error_of(got: &[f64], want: &[f64]) -> f64 {
    let squares: f64 = got.iter().zip(want).map(|(got, want)| (got - want).powi(2)).sum();
    (squares / want.len().max(1) as f64).sqrt()
}

/// `got` errs at most twice as much as `plain`, the plain composition with each stored value rounded to bf16;
/// both against `want`, in the largest difference and in the mean. `tiny`, relative to the largest magnitude,
/// is allowed beside that for what f32 sums lose.
#[track_caller]
pub fn as_good_as<T: Copy + Into<f64>>(got: &[T], plain: &[f64], want: &[f64], tiny: f64, what: &str) {
    assert!(got.len() == want.len() && plain.len() == want.len(), "{what}");
    let got = wide(got);
    let largest = |x: &[f64]| x.iter().zip(want).fold(0.0f64, |max, (x, want)| max.max((x - want).abs()));
    let size = want.iter().fold(1.0f64, |max, x| max.max(x.abs()));
    // `max` passes over NaN, so each element is asked for.
    assert!(got.iter().all(|x| x.is_finite()), "{what}: not a finite number");
    let (mine, theirs) = (largest(&got), largest(plain));
    assert!(mine <= 2.0 * theirs + tiny * size, "{what}: errs by {mine}, the plain composition by {theirs}");
    let (mine, theirs) = (error_of(&got, want), error_of(plain, want));
    assert!(
        mine <= 2.0 * theirs + tiny * size,
        "{what}: errs by {mine} in the mean, the plain composition by {theirs}"
    );
}
