//! Copies that nobody waits for, on an emulator that does them as late as it may.

use crate::support::{PORTABLE, gpu, numbers, on_device};
use pipe::cuda::ops::cast;
use pipe::cuda::{Driver, Gpu, Queue};

/// Devices whose blocks are used again, and whose blocks are not.
fn gpus() -> Vec<Gpu> {
    if on_device() { vec![gpu()] } else { vec![Gpu::exact(Box::new(PORTABLE)), Gpu::new(Box::new(PORTABLE))] }
}

#[test]
fn small_uploads_go_round_the_ring_many_times_and_all_arrive() {
    for gpu in gpus() {
        // Together some ten times the ring, and one that is larger than a part of it.
        let sizes = (0..160).map(|i| 1 + (i * 7919) % 130_000).chain([300_001, 5, 0]);
        let sent: Vec<Vec<f32>> = sizes.map(|len| numbers(1, &len.to_string()).repeat(len)).collect();
        let buffers: Vec<_> = sent.iter().map(|values| gpu.upload(values).unwrap()).collect();
        for (buffer, values) in buffers.iter().zip(&sent) {
            assert!(buffer.download().unwrap() == *values, "{} values", values.len());
        }
    }
}

#[test]
fn an_upload_is_behind_the_launches_before_it_and_ahead_of_those_after_it() {
    for gpu in gpus() {
        let mut x = gpu.upload(&[1.0f32; 100]).unwrap();
        let mut first = gpu.alloc(100).unwrap();
        cast::to_bf16(&mut first, &x).unwrap();
        x.write(&[2.0; 100]).unwrap();
        let mut second = gpu.alloc(100).unwrap();
        cast::to_bf16(&mut second, &x).unwrap();
        assert!(first.download().unwrap().iter().all(|value| value.to_f32() == 1.0));
        assert!(second.download().unwrap().iter().all(|value| value.to_f32() == 2.0));
    }
}

#[test]
fn what_leaves_comes_back_while_its_memory_is_used_for_something_else() {
    for gpu in gpus() {
        let values = numbers(5000, "values");
        let mut parked = Vec::new();
        for turn in 0..4 {
            let mut x = gpu.upload(&values).unwrap();
            cast::scale(&mut x, turn as f32).unwrap();
            let leaving = x.leave().unwrap();
            // Beside the copy.
            let mut other = gpu.zeros::<f32>(5000).unwrap();
            cast::scale(&mut other, 3.0).unwrap();
            parked.push(leaving.left());
            let mut next = gpu.alloc::<f32>(5000).unwrap();
            next.clear().unwrap();
        }
        for (turn, parked) in parked.into_iter().enumerate().rev() {
            let mut busy = gpu.upload(&values).unwrap();
            let arriving = parked.fetch().unwrap();
            cast::scale(&mut busy, 2.0).unwrap();
            let mut x = arriving.arrived();
            cast::scale(&mut x, 1.0).unwrap();
            let back = x.download().unwrap();
            assert!(back.iter().zip(&values).all(|(back, value)| *back == value * turn as f32), "turn {turn}");
        }
        // One that goes without anyone having waited for it.
        drop(gpu.upload(&values).unwrap().leave().unwrap());
        drop(gpu.upload(&values).unwrap().leave().unwrap().left().fetch().unwrap());
        assert_eq!(gpu.usage().now, 0);
    }
}

/// The emulator shows each wait that is left out: otherwise the tests above would prove little.
#[test]
fn a_wait_that_is_missing_shows_in_the_numbers() {
    if on_device() {
        return;
    }
    let driver = PORTABLE;
    let gpu = Gpu::exact(Box::new(PORTABLE));
    let host = driver.alloc_host(400).unwrap();
    // SAFETY: page-locked memory of 100 floats, here and below; the emulator reads it by the end of the test.
    let values = || unsafe { std::slice::from_raw_parts(host as *const f32, 100) };
    let fresh = || {
        let mut x = gpu.upload(&[1.0f32; 100]).unwrap();
        cast::scale(&mut x, 2.0).unwrap();
        x
    };
    for (before, after) in [(true, true), (false, true), (true, false)] {
        let mut x = fresh();
        if before {
            let mark = driver.mark(Queue::Compute).unwrap();
            driver.queue_wait(Queue::Copy, mark).unwrap();
        }
        // SAFETY: both places have 400 bytes.
        unsafe { driver.queue_download(Queue::Copy, x.address(), host, 400) }.unwrap();
        let mark = driver.mark(Queue::Copy).unwrap();
        if after {
            driver.queue_wait(Queue::Compute, mark).unwrap();
        }
        cast::scale(&mut x, 5.0).unwrap();
        driver.wait(mark).unwrap();
        let right = values().iter().all(|value| *value == 2.0);
        assert_eq!(right, before && after, "before {before}, after {after}: {:?}", values()[0]);
    }
    driver.free_host(host);
}
