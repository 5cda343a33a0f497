//! The emulator itself: its instructions against plain arithmetic, and planted faults, each of which it must find.

use crate::support::{HOPPER, PORTABLE, close, numbers, rounded, schedules};
use emulator::{Order, Schedule, launch, with};
use half::bf16;
use pipe::cuda::{Dim, Driver, Gpu};
use pipe::problem::Problem;
use std::ffi::c_void;

/// A buffer of the emulator, exactly as long as its values.
struct Memory {
    address: u64,
    len: usize,
}

impl Memory {
    fn of<T: bytemuck::Pod>(values: &[T]) -> Memory {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let address = emulator::alloc(bytes.len());
        PORTABLE.upload(address, bytes).expect("upload");
        Memory { address, len: values.len() }
    }

    fn fresh(len: usize) -> Memory {
        Memory { address: emulator::alloc(4 * len), len }
    }

    fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0f32; self.len];
        PORTABLE.download(self.address, bytemuck::cast_slice_mut(&mut values)).expect("download");
        values
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        emulator::free(self.address);
    }
}

/// Pointers to 64-bit values, as `cuLaunchKernel` wants them.
fn run(kernel: &'static str, grid: Dim, block: u32, shared: u32, values: &[u64]) -> Result<(), String> {
    let mut values = values.to_vec();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
    // SAFETY: the tests below know these kernels.
    unsafe { launch(kernel, (grid.0, grid.1, grid.2), (block, 1, 1), shared, &mut pointers) }
}

fn exchange() -> Result<Vec<f32>, String> {
    let (x, y) = (Memory::of(&numbers(32, "x")), Memory::fresh(32));
    run("exchange_lanes", Dim(1, 1, 1), 32, 128, &[y.address, x.address])?;
    Ok(y.values())
}

fn shuffles() -> Result<Vec<f32>, String> {
    let (x, y) = (Memory::of(&numbers(32, "x")), Memory::fresh(32 * 4 * 32));
    run("shuffle_lanes", Dim(1, 1, 1), 32, 0, &[y.address, x.address])?;
    Ok(y.values())
}

fn sums(n: usize) -> Result<Vec<f32>, String> {
    let (x, y) = (Memory::of(&numbers(n, "x")), Memory::fresh(n));
    let blocks = n.div_ceil(256) as u32;
    run("sum_of_block", Dim(blocks, 1, 1), 256, 32, &[y.address, x.address, n as u64])?;
    Ok(y.values())
}

const M: usize = 48;
const N: usize = 32;
const K: usize = 80;

fn operands() -> (Vec<bf16>, Vec<bf16>) {
    (rounded(&numbers(M * K, "a")), rounded(&numbers(K * N, "b")))
}

fn tiles() -> Result<Vec<f32>, String> {
    let (a, b) = operands();
    let (a, b, c) = (Memory::of(&a), Memory::of(&b), Memory::fresh(M * N));
    let values = [c.address, a.address, b.address, N as u64, K as u64];
    run("tile_product", Dim(M as u32 / 16, N as u32 / 16, 1), 32, 2048, &values)?;
    Ok(c.values())
}

fn copies(n: usize) -> Result<Vec<f32>, String> {
    let (x, y) = (Memory::of(&numbers(n, "x")), Memory::fresh(n));
    run("copy_all", Dim(n.div_ceil(64) as u32, 1, 1), 64, 0, &[y.address, x.address, n as u64])?;
    Ok(y.values())
}

fn handed_over() -> Result<Vec<f32>, String> {
    let (x, y) = (Memory::of(&numbers(160, "x")), Memory::fresh(160));
    run("hand_over", Dim(1, 1, 1), 64, 128, &[y.address, x.address, 160])?;
    Ok(y.values())
}

fn warp_sums() -> Result<Vec<f32>, String> {
    let (x, y) = (Memory::of(&numbers(64, "x")), Memory::fresh(64));
    run("sum_of_warp", Dim(1, 1, 1), 64, 0, &[y.address, x.address])?;
    Ok(y.values())
}

/// Rows and columns of whole boxes and of parts, three steps of 64 and a part: every stage comes again.
const BOXES: (usize, usize, usize) = (100, 136, 200);

/// c [m, n] of the kernels of `hopper.cu` that multiply boxes; `b` is [n, k], or [k, n] where it is by rows.
fn box_product(kernel: &'static str) -> Result<Vec<f32>, String> {
    let (m, n, k) = BOXES;
    let by_rows = kernel.ends_with("rows");
    let run = || -> Result<Vec<f32>, Problem> {
        let gpu = Gpu::exact(Box::new(HOPPER));
        let (a, b) = (gpu.upload(&rounded(&numbers(m * k, "a")))?, gpu.upload(&rounded(&numbers(n * k, "b")))?);
        let c = gpu.alloc::<f32>(m * n)?;
        let a_map = gpu.tensor_map(&a, &[m, k], &[64, 64])?;
        let b_map =
            if by_rows { gpu.tensor_map(&b, &[k, n], &[64, 64]) } else { gpu.tensor_map(&b, &[n, k], &[128, 64]) }?;
        let launch = gpu.launch(kernel, (m.div_ceil(64), n.div_ceil(128)), 160usize).shared(2 * (8192 + 16384) + 32);
        let launch = launch.buffer(&c).map(a_map).map(b_map).int(m).int(n).int(k);
        // SAFETY: the arguments of the three kernels.
        unsafe { launch.run()? };
        c.download()
    };
    run().map_err(|problem| problem.to_string())
}

fn boxes() -> Result<Vec<f32>, String> {
    box_product("box_product")
}

fn boxes_by_rows() -> Result<Vec<f32>, String> {
    box_product("box_product_rows")
}

fn boxes_in_registers() -> Result<Vec<f32>, String> {
    box_product("box_product_registers")
}

/// c [64, 64 planes] = a^T b, of a [64, 64] and b [64, planes, 64].
fn planes(kernel: &'static str, planes: usize) -> Result<Vec<f32>, String> {
    let run = || -> Result<Vec<f32>, Problem> {
        let gpu = Gpu::exact(Box::new(HOPPER));
        let n = 64 * planes;
        let (a, b) = (gpu.upload(&rounded(&numbers(64 * 64, "a")))?, gpu.upload(&rounded(&numbers(64 * n, "b")))?);
        let c = gpu.alloc::<f32>(64 * n)?;
        let map = gpu.tensor_map(&b, &[64, planes, 64], &[64, 1, 64])?;
        let launch = gpu.launch(kernel, 1usize, 128usize).shared(8192 * (1 + planes) + 8);
        // SAFETY: the arguments of both kernels.
        unsafe { launch.buffer(&c).buffer(&a).map(map).run()? };
        c.download()
    };
    run().map_err(|problem| problem.to_string())
}

fn everywhere() -> Vec<Schedule> {
    let mut all = schedules();
    all.push(Schedule { detector: true, ..Schedule::default() });
    all.push(Schedule { detector: true, order: Order::Random(5), late_copies: false, fault: None });
    all
}

#[test]
fn exchanged_lanes_are_those_of_the_neighbours() {
    let x = numbers(32, "x");
    for schedule in everywhere() {
        let y = with(schedule, exchange).unwrap_or_else(|faults| panic!("{faults}"));
        assert!((0..32).all(|i| y[i] == x[i ^ 1]), "{schedule:?}");
    }
}

#[test]
fn shuffles_of_every_kind_and_distance_take_from_the_lane_they_name() {
    let x = numbers(32, "x");
    // Past the end a lane gets its own.
    let kinds: [fn(usize, usize) -> usize; 4] = [
        |_, by| by,
        |lane, by| lane ^ by,
        |lane, by| lane.checked_sub(by).unwrap_or(lane),
        |lane, by| if lane + by < 32 { lane + by } else { lane },
    ];
    for schedule in everywhere() {
        let y = with(schedule, shuffles).unwrap_or_else(|faults| panic!("{faults}"));
        for (at, got) in y.iter().enumerate() {
            let (by, kind, lane) = (at / 128, at / 32 % 4, at % 32);
            assert!(*got == x[kinds[kind](lane, by)], "kind {kind}, by {by}, lane {lane}, {schedule:?}");
        }
    }
}

#[test]
fn sums_are_right_on_every_schedule() {
    for n in [1, 255, 256, 300, 1000] {
        let x = numbers(n, "x");
        let first = sums(n).unwrap_or_else(|faults| panic!("{faults}"));
        for (i, sum) in first.iter().enumerate() {
            let want: f64 = x.chunks(256).nth(i / 256).expect("chunk").iter().map(|x| f64::from(*x)).sum();
            assert!((f64::from(*sum) - want).abs() <= 1e-4, "element {i} of {n}: {sum} instead of {want}");
        }
        for schedule in everywhere() {
            assert!(with(schedule, || sums(n)) == Ok(first.clone()), "{n}, {schedule:?}");
        }
    }
}

#[test]
fn what_is_copied_or_handed_over_arrives() {
    for schedule in everywhere() {
        assert_eq!(with(schedule, || copies(333)), Ok(numbers(333, "x")), "{schedule:?}");
        assert_eq!(with(schedule, handed_over), Ok(numbers(160, "x")), "{schedule:?}");
    }
}

#[test]
fn matrix_fragments_are_where_the_manual_puts_them() {
    let (a, b) = operands();
    let mut want = vec![0.0f64; M * N];
    for (i, want) in want.iter_mut().enumerate() {
        *want = (0..K).map(|j| f64::from(a[i / N * K + j]) * f64::from(b[j * N + i % N])).sum();
    }
    for schedule in everywhere() {
        let got = with(schedule, tiles).unwrap_or_else(|faults| panic!("{faults}"));
        close(&got, &want, 1e-6, &format!("{schedule:?}"));
    }
}

/// Sum over l of a(i, l) b(l, j), i ascending and within it j.
fn product_of(
    (m, n, k): (usize, usize, usize),
    a: impl Fn(usize, usize) -> bf16,
    b: impl Fn(usize, usize) -> bf16,
) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..k).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum();
    (0..m * n).map(|i| at(i / n, i % n)).collect()
}

#[test]
fn boxes_and_products_of_warpgroups_are_where_the_manual_puts_them() {
    let (m, n, k) = BOXES;
    let (a, b) = (rounded(&numbers(m * k, "a")), rounded(&numbers(n * k, "b")));
    let inner = product_of(BOXES, |i, l| a[i * k + l], |l, j| b[j * k + l]);
    let by_rows = product_of(BOXES, |i, l| a[i * k + l], |l, j| b[l * n + j]);
    let small = |planes: usize| {
        let (a, b, n) = (rounded(&numbers(64 * 64, "a")), rounded(&numbers(64 * 64 * planes, "b")), 64 * planes);
        product_of((64, n, 64), |i, l| a[l * 64 + i], |l, j| b[l * n + j])
    };
    let runs: [(Run, &[f64]); 5] = [
        (boxes, &inner),
        (boxes_in_registers, &inner),
        (boxes_by_rows, &by_rows),
        (|| planes("planes_1", 1), &small(1)),
        (|| planes("planes_4", 4), &small(4)),
    ];
    for schedule in everywhere() {
        for (i, (run, want)) in runs.iter().enumerate() {
            let got = with(schedule, run).unwrap_or_else(|faults| panic!("run {i}, {schedule:?}: {faults}"));
            close(&got, want, 1e-6, &format!("run {i}, {schedule:?}"));
        }
    }
}

type Run = fn() -> Result<Vec<f32>, String>;

/// A fault, a run of a kernel that knows it, what the detector says, and where.
const PLANTED: [(&str, Run, &str, &str); 34] = [
    ("NO_SYNCWARP", exchange, "shared memory is read without a barrier after another thread's write", "exchange.cu:12"),
    ("NO_BARRIER", || sums(1000), "shared memory is read that nobody has written", "exchange.cu:35"),
    ("BRANCH", || sums(1000), "deadlock", "224 wait for __syncthreads at exchange.cu:28, 32 have left"),
    ("PAST_END", || sums(1000), "an access past the end of shared memory", "exchange.cu:33"),
    ("DIVERGENT", || sums(1000), "a shuffle reads a lane that has left", "exchange.cu:38"),
    ("NO_BOUND", || sums(1000), "a read outside its buffer", "exchange.cu:21"),
    ("EARLY", tiles, "shared memory is used while an asynchronous copy to it is under way", "tiles.cu:39"),
    ("UNSEEN", tiles, "shared memory is read without a barrier after another thread's write", "tiles.cu:39"),
    ("OVERWRITE", tiles, "shared memory is written without a barrier after another thread's read", "tiles.cu:26"),
    ("FAR", || copies(333), "an access where there is no memory", "stray.cu:9"),
    ("BEHIND", || copies(333), "a write outside its buffer", "stray.cu:11"),
    ("AHEAD", || copies(333), "a write outside its buffer", "stray.cu:13"),
    ("NO_MEMORY", || copies(333), "an access where there is no memory", "stray.cu:15"),
    ("SKEWED", || copies(333), "an access whose address is no multiple of its size", "stray.cu:17"),
    ("ONE_PLACE", || copies(333), "two blocks write to the same place", "stray.cu:20"),
    ("NEIGHBOUR", || copies(332), "memory is written without a barrier after another thread's read", "stray.cu:22"),
    ("DIVIDE", || copies(333), "a division by zero", "stray.cu:25"),
    ("DEEP", || copies(333), "a thread's own variables do not fit its stack", "stray.cu:"),
    ("IGNORES_EMPTY", handed_over, "a thread comes twice to a barrier before it is complete", "stray.cu:48"),
    (
        "IGNORES_FULL",
        handed_over,
        "shared memory is read without a barrier after another thread's write",
        "stray.cu:54",
    ),
    ("NEVER_FULL", handed_over, "deadlock", "32 wait for a named barrier at stray.cu:52"),
    ("TWO_PLACES", warp_sums, "lanes of a warp meet at different instructions", "stray.cu:68"),
    ("NO_INIT_FENCE", boxes, "an mbarrier is used without mbarrier_init_fence after its initialisation", "hopper.cu:"),
    ("NO_INIT_BARRIER", boxes, "shared memory is read without a barrier after another thread's write", "hopper.cu:"),
    ("STAGE_NOT_EMPTY", boxes, "more arrivals at an mbarrier than it counts", "hopper.cu:40"),
    ("STAGE_NOT_FULL", boxes, "shared memory is read that nobody has written", "hopper.cu:75"),
    ("BYTES", boxes, "deadlock", "128 wait for an mbarrier at hopper.cu:59"),
    ("BYTES", boxes_by_rows, "deadlock", "the mbarrier at byte 49152 misses 0 arrivals and 16 bytes"),
    ("NO_BATCH", boxes, "a batch of products that wgmma_fence does not begin", "hopper.cu:75"),
    ("REGISTERS", boxes_in_registers, "registers of A are changed before their product is waited for", "hopper.cu:79"),
    ("ACCUMULATORS", boxes, "accumulators are used before their product is waited for", "hopper.cu:82"),
    (
        "RELEASED_EARLY",
        boxes_by_rows,
        "shared memory is written without a barrier after another thread's read",
        "products of warpgroup 0 not waited for",
    ),
    ("RESULT_EARLY", boxes, "accumulators are used before their product is waited for", "hopper.cu:101"),
    (
        "NO_PROXY_FENCE",
        || planes("planes_4", 4),
        "a product reads what a thread has written without fence_proxy_async",
        "hopper.cu:",
    ),
];

#[test]
fn planted_faults_are_found_and_named() {
    for (fault, run, words, place) in PLANTED {
        let watched = Schedule { detector: true, fault: Some(fault), ..Schedule::default() };
        let said = with(watched, run).err().unwrap_or_else(|| panic!("the detector does not see {fault}"));
        let line = said.lines().find(|line| line.contains(words)).unwrap_or_else(|| panic!("{fault}: {said}"));
        assert!(line.contains(place), "{fault}: {said}");
        // The next launch is as if nothing had been.
        assert!(with(Schedule { fault: None, ..watched }, run).is_ok(), "after {fault}");
    }
}

/// Schedules with a wrong result or a report.
fn schedules_that_show(fault: &'static str, run: Run) -> usize {
    let sound = run().unwrap_or_else(|faults| panic!("{faults}"));
    let shows = |schedule: &Schedule| {
        with(Schedule { fault: Some(fault), ..*schedule }, run).map_or(true, |results| results != sound)
    };
    schedules().iter().filter(|schedule| shows(schedule)).count()
}

/// Without the detector too, where a fault can show at all: what the schedules are for.
#[test]
fn planted_faults_show_in_the_results_of_some_schedule() {
    // Right by luck on every schedule: reads outside that are not used, copies that are there all the same.
    let unseen = ["NO_BOUND", "UNSEEN", "OVERWRITE", "ONE_PLACE", "NO_PROXY_FENCE"];
    for (fault, run, ..) in PLANTED {
        let shown = schedules_that_show(fault, run);
        assert_eq!(shown == 0, unseen.contains(&fault), "{fault}: {shown}");
    }
    assert_eq!(schedules_that_show("EARLY", tiles), 4, "a copy done at once hides that nobody waits for it");
}

#[test]
fn a_write_next_to_a_buffer_is_noticed_without_the_detector() {
    for fault in ["BEHIND", "AHEAD"] {
        let said = with(Schedule { fault: Some(fault), ..Schedule::default() }, || copies(333)).unwrap_err();
        assert!(said.contains("the buffer of argument 0 has been written outside its 1332 bytes"), "{said}");
    }
}

#[test]
fn only_whole_warps_meet() {
    let said = with(Schedule { fault: Some("HALF_A_MASK"), ..Schedule::default() }, warp_sums).unwrap_err();
    assert!(said.contains("a warp collective without all lanes is not emulated"), "{said}");
}

#[test]
fn what_a_device_would_refuse_is_refused() {
    let (x, y) = (Memory::of(&numbers(32, "x")), Memory::fresh(32));
    let values = [y.address, x.address];
    let refused = |grid, block, shared, values: &[u64], words: &str| {
        let said = run("exchange_lanes", grid, block, shared, values).unwrap_err();
        assert!(said.contains(words), "{said}");
    };
    let one = Dim(1, 1, 1);
    refused(one, 64, 128, &values, "a block of 64 threads, while the kernel is compiled for 32");
    refused(one, 2048, 128, &values, "a block of [2048, 1, 1] threads");
    refused(one, 0, 128, &values, "a block of [0, 1, 1] threads");
    refused(Dim(1, 65_536, 1), 32, 128, &values, "a grid of [1, 65536, 1] blocks");
    refused(one, 32, 228 * 1024, &values, "233472 bytes of shared memory: at most 232448 are possible");
    refused(one, 32, 128, &values[..1], "1 arguments for 2 parameters");
    refused(one, 32, 128, &[y.address, 7], "argument 1 is a pointer to no buffer");

    let said = run("no_such_kernel", one, 32, 0, &[]).unwrap_err();
    assert!(said.contains("there is no kernel `no_such_kernel`; there are: ") && said.contains("exchange_lanes"));
    let said = with(Schedule { fault: Some("NO_SUCH"), ..Schedule::default() }, exchange).unwrap_err();
    assert!(said.contains("no kernel knows the fault `NO_SUCH`"), "{said}");
}

#[test]
fn fresh_memory_is_poisoned_and_a_missing_argument_is_named() {
    assert!(Memory::fresh(5).values().iter().all(|x| x.is_nan()));
    let y = Memory::fresh(32);
    let said = run("exchange_lanes", Dim(1, 1, 1), 32, 128, &[y.address, 0]).unwrap_err();
    assert!(said.contains("an access where there is no memory") && said.contains("exchange.cu:8"), "{said}");
}

#[test]
fn launches_side_by_side_do_not_see_each_other() {
    std::thread::scope(|scope| {
        for i in 0..4 {
            scope.spawn(move || {
                let fault = (i % 2 == 0).then_some("NO_BARRIER");
                let schedule = Schedule { detector: i < 2, fault, ..Schedule::default() };
                for _ in 0..20 {
                    let right = with(schedule, || sums(300)) == with(Schedule::default(), || sums(300));
                    assert_eq!(right, fault.is_none());
                }
            });
        }
    });
}
