//! Launches that are captured: carried out later, as often as one likes, over memory that nobody else gets.

use crate::support::{PORTABLE, gpu, on_device};
use half::bf16;
use pipe::cuda::ops::residual;
use pipe::cuda::{Buffer, Gpu, Region};
use pipe::problem::Problem;
use pipe::random::Stream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

fn numbers(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|value| bf16::from_f32(*value)).collect()
}

/// x += y, captured; it was launched once before, as it has to be.
fn captured(gpu: &Gpu, x: &mut Buffer<bf16>, y: &Buffer<bf16>) -> pipe::cuda::Graph {
    residual::add(x, y).unwrap();
    gpu.capture(|| residual::add(x, y)).unwrap()
}

#[test]
fn a_graph_reads_what_its_buffers_hold_when_it_is_launched() {
    let gpu = gpu();
    let (mut x, mut y) = (gpu.upload(&numbers(&[1.0, 2.0])).unwrap(), gpu.upload(&numbers(&[10.0, 20.0])).unwrap());
    let graph = captured(&gpu, &mut x, &y);
    assert_eq!(x.download().unwrap(), numbers(&[11.0, 22.0]), "nothing is carried out while it is captured");
    graph.launch().unwrap();
    y.write(&numbers(&[100.0, 0.0])).unwrap();
    graph.launch().unwrap();
    assert_eq!(x.download().unwrap(), numbers(&[121.0, 42.0]));
}

#[test]
fn the_memory_of_a_graph_is_nobody_elses_while_it_lives() {
    if on_device() {
        return eprintln!("not looked at: others allocate on this device too");
    }
    let gpu = Gpu::new(Box::new(PORTABLE));
    let (mut x, y) = (gpu.upload(&numbers(&[1.0, 2.0])).unwrap(), gpu.upload(&numbers(&[0.0, 0.0])).unwrap());
    let graph = captured(&gpu, &mut x, &y);
    let addresses = [x.address(), y.address()];
    drop((x, y));
    let other: Vec<Buffer<bf16>> = (0..3).map(|_| gpu.alloc(2).unwrap()).collect();
    assert!(other.iter().all(|other| !addresses.contains(&other.address())));
    graph.launch().unwrap();
    drop(graph);
    let other: Vec<Buffer<bf16>> = (0..2).map(|_| gpu.alloc(2).unwrap()).collect();
    assert!(other.iter().all(|other| addresses.contains(&other.address())), "and is somebody's again after that");
}

#[test]
fn asking_for_memory_or_copying_while_capturing_is_refused() {
    let gpu = gpu();
    let mut x = gpu.upload(&numbers(&[1.0])).unwrap();
    let mut asked: [Box<dyn FnMut() -> Result<(), Problem>>; 4] = [
        Box::new({
            let gpu = gpu.clone();
            move || gpu.alloc::<f32>(3).map(|_| ())
        }),
        Box::new({
            let gpu = gpu.clone();
            move || gpu.capture(|| Ok(())).map(|_| ())
        }),
        Box::new({
            let x = x.part::<bf16>(0, 1);
            move || x.download().map(|_| ())
        }),
        Box::new(|| x.write(&numbers(&[2.0]))),
    ];
    for ask in &mut asked {
        assert_eq!(gpu.capture(&mut *ask).err().map(|problem| problem.code), Some("cuda::capture"));
    }
    drop(asked);
    assert_eq!(x.download().unwrap(), numbers(&[1.0]), "and the device works on");
}

#[test]
fn work_that_asks_for_memory_gets_places_in_a_region_and_zeros_are_part_of_it() {
    let gpu = gpu();
    let y = gpu.upload(&numbers(&[1.0, 2.0])).unwrap();
    let mut sum = gpu.upload(&numbers(&[0.0, 0.0])).unwrap();
    // Twice what a buffer of two numbers takes there.
    let region = Region::new(&gpu, 512).unwrap();
    residual::add(&mut sum, &y).unwrap();
    let before = gpu.usage();
    let work = |sum: &mut Buffer<bf16>| {
        let mut places = Vec::new();
        // One after another they fit, being dropped in between.
        for _ in 0..3 {
            let mut x: Buffer<bf16> = gpu.zeros(2)?;
            residual::add(&mut x, &y)?;
            residual::add(sum, &x)?;
            places.push(x.address());
        }
        assert!(places.iter().all(|place| *place == places[0]), "the same place each time");
        Ok(())
    };
    let graph = gpu.capture_in(&region, || work(&mut sum)).unwrap();
    assert_eq!(gpu.usage(), before, "of the pool nothing was asked");
    for _ in 0..2 {
        graph.launch().unwrap();
    }
    assert_eq!(sum.download().unwrap(), numbers(&[7.0, 14.0]));

    let too_many =
        gpu.capture_in(&region, || (0..3).map(|_| gpu.alloc::<u8>(2)).collect::<Result<Vec<_>, _>>().map(drop));
    let problem = too_many.err().unwrap();
    assert!(problem.code == "cuda::capture" && problem.message.contains("512"), "{problem}");
    // The graph keeps the memory that it works in.
    drop(region);
    graph.launch().unwrap();
    assert_eq!(sum.download().unwrap(), numbers(&[10.0, 20.0]));
}

/// The places of buffers that come and go in any order, held against each other.
#[test]
fn places_in_a_region_are_nobody_elses_and_all_of_it_is_there_again_in_the_end() {
    const BYTES: usize = 64 << 10;
    let gpu = gpu();
    let region = Region::new(&gpu, BYTES).unwrap();
    let random = Stream::named(5, &["places"]);
    let mut held: Vec<Buffer<u8>> = Vec::new();
    let (mut given, mut refused) = (0, 0);
    for i in 0..4000 {
        if random.u64(3 * i).is_multiple_of(2) && !held.is_empty() {
            held.swap_remove(random.u64(3 * i + 1) as usize % held.len());
            continue;
        }
        match region.alloc::<u8>(1 + random.u64(3 * i + 2) as usize % 9000) {
            Ok(new) => {
                let apart = |old: &Buffer<u8>| {
                    old.address_of(old.len()) <= new.address() || new.address_of(new.len()) <= old.address()
                };
                assert!(held.iter().all(apart));
                held.push(new);
                given += 1;
            }
            Err(problem) => {
                assert_eq!(problem.code, "cuda::capture");
                refused += 1;
            }
        }
    }
    assert!(given > 500 && refused > 100, "{given} {refused}");
    held.clear();
    assert_eq!(region.alloc::<u8>(BYTES).unwrap().len(), BYTES, "in one piece");
}

#[test]
fn other_threads_wait_until_a_capture_has_ended() {
    let gpu = gpu();
    let (mut x, y) = (gpu.upload(&numbers(&[1.0])).unwrap(), gpu.upload(&numbers(&[1.0])).unwrap());
    let mut other = gpu.upload(&numbers(&[5.0])).unwrap();
    residual::add(&mut x, &y).unwrap();
    let (told, done) = channel();
    std::thread::scope(|scope| {
        let graph = gpu.capture(|| {
            scope.spawn(|| {
                residual::add(&mut other, &y).unwrap();
                told.send(()).unwrap();
            });
            assert_eq!(done.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
            residual::add(&mut x, &y)
        });
        done.recv().unwrap();
        graph.unwrap().launch().unwrap();
    });
    assert_eq!(x.download().unwrap(), numbers(&[3.0]));
    assert_eq!(other.download().unwrap(), numbers(&[6.0]), "its launch is not part of the graph");
}
