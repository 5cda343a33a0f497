//! A device that is the emulator, schedules, reproducible numbers, and ways to compare.

#![allow(dead_code)] // Not every test file needs every helper.

use bytemuck::Pod;
use emulator::{Order, Schedule};
use half::bf16;
use pipe::cuda::{Buffer, Capability, Dim, Driver, Gpu, Mark, Queue, TensorMap, TensorView};
use pipe::problem::Problem;
use pipe::random::Stream;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Mutex, OnceLock};

/// The emulator, as a device of a capability.
///
/// Launches are done at once. Copies that nobody waits for are done as late as the order of the queues allows, and
/// bytes whose copy was not ordered after what came before it in the other queue arrive as 0xFF, which is NaN: so a
/// wait that is missing shows in the numbers. A GPU might have been lucky.
#[derive(Clone, Copy)]
pub struct Emulated(pub Capability);

/// What every kernel without `_hopper` runs on, and the one that those with it need.
pub const PORTABLE: Emulated = Emulated(Capability { major: 8, minor: 0 });
pub const HOPPER: Emulated = Emulated(Capability { major: 9, minor: 0 });

thread_local! {
    static KIND: Cell<Emulated> = const { Cell::new(PORTABLE) };
}

/// Runs `body` once with each kind of device as what [`gpu`] gives this thread; on a GPU once.
pub fn on_each_kind_of_device(body: impl Fn()) {
    if on_device() {
        return body();
    }
    for kind in [PORTABLE, HOPPER] {
        on(kind, &body);
    }
}

/// The kind that [`on`] says.
pub fn kind() -> Emulated {
    KIND.get()
}

/// Runs `body` with that kind of device as what [`gpu`] gives this thread.
pub fn on<T>(kind: Emulated, body: impl FnOnce() -> T) -> T {
    /// Puts the old one back, also when `body` panics.
    struct Restore(Emulated);
    impl Drop for Restore {
        fn drop(&mut self) {
            KIND.set(self.0);
        }
    }
    let _restore = Restore(KIND.replace(kind));
    body()
}

/// The queues of this thread's devices.
#[derive(Default)]
struct Queues {
    /// Blocks of device memory, and the last work of the queue of launches that touched each.
    blocks: BTreeMap<u64, (usize, u64)>,
    /// Work of the queue of launches so far, and the uploads in it that have not been done.
    launched: u64,
    uploads: Vec<Queued>,
    /// Copies of the other queue so far, those that have not been done with their numbers, and how much of the queue of
    /// launches they have waited for.
    copied: u64,
    copies: VecDeque<(u64, Queued)>,
    seen: u64,
    /// What each mark marks.
    marks: BTreeMap<u64, (Queue, u64)>,
    next_mark: u64,
    host: BTreeMap<u64, Box<[u128]>>,
}

struct Queued {
    to: u64,
    from: u64,
    bytes: usize,
    /// The block on the device.
    block: u64,
    /// Whether anything may arrive.
    garbled: bool,
}

thread_local! {
    static QUEUES: RefCell<Queues> = RefCell::default();
    static FREE_BYTES: Cell<usize> = const { Cell::new(16 << 30) };
    static BEFORE_LAUNCH: RefCell<Option<BeforeLaunch>> = const { RefCell::new(None) };
}

/// Sees a launch of this thread before it is made: its kernel and arguments.
pub type BeforeLaunch = Box<dyn FnMut(&str, &[*mut c_void])>;

/// `work`, while every launch of this thread is shown to `hook` first.
pub fn before_launches<T>(hook: BeforeLaunch, work: impl FnOnce() -> T) -> T {
    BEFORE_LAUNCH.set(Some(hook));
    let result = work();
    BEFORE_LAUNCH.set(None);
    result
}

/// `work`, while devices of this thread say that they have so much free memory.
pub fn with_free_bytes<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let before = FREE_BYTES.replace(bytes);
    let result = work();
    FREE_BYTES.set(before);
    result
}

impl Queued {
    fn run(&self) {
        let Queued { to, from, bytes, .. } = *self;
        // SAFETY: both were there when the copy was queued; `Queues::free` sees to it for blocks that have gone.
        unsafe {
            match self.garbled {
                true => std::ptr::write_bytes(to as *mut u8, 0xFF, bytes),
                false => std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes),
            }
        }
    }
}

impl Queues {
    fn block(&self, address: u64) -> Option<u64> {
        let (start, (bytes, _)) = self.blocks.range(..=address).next_back()?;
        (address < start + *bytes as u64).then_some(*start)
    }

    /// The next work of the queue of launches, on the block at each of these addresses.
    fn launch(&mut self, addresses: impl Iterator<Item = u64>) {
        self.finish_uploads();
        self.launched += 1;
        for address in addresses {
            if let Some(block) = self.block(address)
                && let Some((_, touched)) = self.blocks.get_mut(&block)
            {
                *touched = self.launched;
            }
        }
    }

    fn finish_uploads(&mut self) {
        self.uploads.drain(..).for_each(|copy| copy.run());
    }

    fn finish_copies(&mut self, up_to: u64) {
        while self.copies.front().is_some_and(|(number, _)| *number <= up_to) {
            self.copies.pop_front().expect("a first one").1.run();
        }
    }

    fn copy(&mut self, queue: Queue, on_device: u64, to: u64, from: u64, bytes: usize) {
        let block = self.block(on_device).expect("a copy of memory that is there");
        match queue {
            Queue::Compute => {
                self.launched += 1;
                self.blocks.get_mut(&block).expect("a block").1 = self.launched;
                self.uploads.push(Queued { to, from, bytes, block, garbled: false });
            }
            Queue::Copy => {
                self.copied += 1;
                let garbled = self.blocks[&block].1 > self.seen;
                self.copies.push_back((self.copied, Queued { to, from, bytes, block, garbled }));
            }
        }
    }

    /// What is on its way to a block that goes never arrives; what comes from it is anything.
    fn free(&mut self, address: u64) {
        self.uploads.retain(|copy| copy.block != address);
        self.copies.retain(|(_, copy)| copy.block != address || copy.to != address);
        self.copies.iter_mut().filter(|(_, copy)| copy.block == address).for_each(|(_, copy)| copy.garbled = true);
        self.blocks.remove(&address);
    }

    fn reach(&mut self, mark: Mark) {
        match self.marks[&mark.0] {
            (Queue::Compute, _) => self.finish_uploads(),
            (Queue::Copy, number) => self.finish_copies(number),
        }
    }
}

/// The queues of this thread, if it is not ending.
fn queues<T>(work: impl FnOnce(&mut Queues) -> T) -> T {
    QUEUES.with_borrow_mut(work)
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "emulator".into()
    }

    fn capability(&self) -> Capability {
        self.0
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Problem> {
        match emulator::alloc(bytes) {
            0 => Err(Problem::new("cuda::out_of_memory", "the emulator has no such amount of memory")),
            address => {
                queues(|queues| queues.blocks.insert(address, (bytes.max(1), 0)));
                Ok(address)
            }
        }
    }

    fn free(&self, address: u64) {
        queues(|queues| queues.free(address));
        emulator::free(address);
    }

    fn memory(&self) -> Result<(usize, usize), Problem> {
        Ok((FREE_BYTES.get(), 16 << 30))
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Problem> {
        queues(|queues| queues.launch([to].into_iter()));
        // SAFETY: the pool hands out addresses of at least so many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Problem> {
        queues(Queues::finish_uploads);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Problem> {
        Captured::Zeros { at, bytes }.note_or_run()
    }

    fn tensor_map(&self, view: &TensorView) -> Result<TensorMap, Problem> {
        Ok(TensorMap(emulator::tensor_map(view.address, &view.extents, &view.pitches, &view.tile)))
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Dim,
        block: Dim,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Problem> {
        // SAFETY: an argument has at least eight bytes, and a map is one.
        let value = |argument: &*mut c_void| unsafe {
            match argument.cast::<u64>().read_unaligned() {
                emulator::MAP => argument.cast::<TensorMap>().read_unaligned(),
                word => TensorMap(std::array::from_fn(|i| if i == 0 { word } else { 0 })),
            }
        };
        let arguments = arguments.iter().map(value).collect();
        Captured::Launch { kernel, grid, block, shared_bytes, arguments }.note_or_run()
    }

    fn synchronize(&self) -> Result<(), Problem> {
        queues(|queues| {
            queues.finish_uploads();
            queues.finish_copies(u64::MAX);
        });
        Ok(())
    }

    fn alloc_host(&self, bytes: usize) -> Result<u64, Problem> {
        let memory = vec![u128::MAX; bytes.div_ceil(16)].into_boxed_slice();
        let address = memory.as_ptr() as u64;
        queues(|queues| queues.host.insert(address, memory));
        Ok(address)
    }

    fn free_host(&self, address: u64) {
        queues(|queues| queues.host.remove(&address));
    }

    unsafe fn queue_upload(&self, queue: Queue, to: u64, from: u64, bytes: usize) -> Result<(), Problem> {
        queues(|queues| queues.copy(queue, to, to, from, bytes));
        Ok(())
    }

    unsafe fn queue_download(&self, queue: Queue, from: u64, to: u64, bytes: usize) -> Result<(), Problem> {
        queues(|queues| queues.copy(queue, from, to, from, bytes));
        Ok(())
    }

    fn mark(&self, queue: Queue) -> Result<Mark, Problem> {
        Ok(queues(|queues| {
            queues.next_mark += 1;
            let at = if queue == Queue::Compute { queues.launched } else { queues.copied };
            queues.marks.insert(queues.next_mark, (queue, at));
            Mark(queues.next_mark)
        }))
    }

    fn queue_wait(&self, queue: Queue, mark: Mark) -> Result<(), Problem> {
        queues(|queues| match (queue, queues.marks[&mark.0]) {
            (Queue::Copy, (Queue::Compute, at)) => {
                queues.finish_uploads();
                queues.seen = queues.seen.max(at);
            }
            _ => queues.reach(mark),
        });
        Ok(())
    }

    fn wait(&self, mark: Mark) -> Result<(), Problem> {
        queues(|queues| queues.reach(mark));
        Ok(())
    }

    fn forget(&self, mark: Mark) {
        queues(|queues| queues.marks.remove(&mark.0));
    }

    fn begin_capture(&self) -> Result<(), Problem> {
        CAPTURED.with_borrow_mut(|captured| match captured {
            Some(_) => Err(Problem::new("cuda::driver", "launches are being captured already")),
            None => {
                *captured = Some(Vec::new());
                Ok(())
            }
        })
    }

    fn end_capture(&self) -> Result<u64, Problem> {
        let launches = CAPTURED.take().ok_or_else(|| Problem::new("cuda::driver", "nothing was captured"))?;
        let mut graphs = GRAPHS.lock().unwrap();
        graphs.1 += 1;
        let handle = graphs.1;
        graphs.0.insert(handle, launches);
        Ok(handle)
    }

    unsafe fn launch_graph(&self, graph: u64) -> Result<(), Problem> {
        let launches = GRAPHS.lock().unwrap().0.get(&graph).cloned();
        let launches = launches.ok_or_else(|| Problem::new("cuda::driver", "there is no such graph"))?;
        launches.iter().try_for_each(Captured::run)
    }

    fn free_graph(&self, graph: u64) {
        assert!(GRAPHS.lock().unwrap().0.remove(&graph).is_some(), "graph {graph} is not there");
    }
}

/// What may be captured. A launch has its arguments' values: maps, or words at their beginning.
#[derive(Clone)]
enum Captured {
    Launch { kernel: &'static str, grid: Dim, block: Dim, shared_bytes: u32, arguments: Vec<TensorMap> },
    Zeros { at: u64, bytes: usize },
}

thread_local! {
    /// What this thread has captured so far, if it captures.
    static CAPTURED: RefCell<Option<Vec<Captured>>> = const { RefCell::new(None) };
}

/// All graphs, and how many there were.
static GRAPHS: Mutex<(BTreeMap<u64, Vec<Captured>>, u64)> = Mutex::new((BTreeMap::new(), 0));

impl Captured {
    /// Notes it down if this thread captures, else carries it out.
    fn note_or_run(self) -> Result<(), Problem> {
        CAPTURED.with_borrow_mut(|captured| match captured {
            Some(captured) => {
                captured.push(self);
                Ok(())
            }
            None => self.run(),
        })
    }

    fn run(&self) -> Result<(), Problem> {
        match self {
            Captured::Launch { kernel, grid, block, shared_bytes, arguments } => {
                let mut values = arguments.clone();
                let mut arguments: Vec<*mut c_void> =
                    values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
                carry_out(kernel, *grid, *block, *shared_bytes, &mut arguments)
            }
            Captured::Zeros { at, bytes } => {
                queues(|queues| queues.launch([*at].into_iter()));
                // SAFETY: the pool hands out addresses of at least so many bytes, and graphs keep theirs.
                unsafe { std::ptr::write_bytes(*at as *mut u8, 0, *bytes) };
                Ok(())
            }
        }
    }
}

/// The first eight bytes of every argument: all of it, but for maps (`cuda::Launch`).
fn first_words(arguments: &[*mut c_void]) -> Vec<u64> {
    // SAFETY: an argument has at least eight bytes.
    arguments.iter().map(|argument| unsafe { argument.cast::<u64>().read_unaligned() }).collect()
}

fn carry_out(
    kernel: &'static str,
    grid: Dim,
    block: Dim,
    shared_bytes: u32,
    arguments: &mut [*mut c_void],
) -> Result<(), Problem> {
    queues(|queues| queues.launch(first_words(arguments).into_iter()));
    BEFORE_LAUNCH.with_borrow_mut(|hook| {
        if let Some(hook) = hook {
            hook(kernel, arguments);
        }
    });
    if let Some(most) = shared_by_manifest().get(kernel).filter(|most| shared_bytes > **most) {
        let message = format!("`{kernel}` asks for {shared_bytes} bytes; kernels/manifest.toml says at most {most}");
        return Err(Problem::new("cuda::fault", message));
    }
    let (grid, block) = ((grid.0, grid.1, grid.2), (block.0, block.1, block.2));
    // SAFETY: the arguments are the kernel's, as whoever launched it promised.
    unsafe { emulator::launch(kernel, grid, block, shared_bytes, arguments) }
        .map_err(|faults| Problem::new("cuda::fault", faults))
}

/// Someone who looks on while a device works, and may refuse.
pub trait Watcher: Send + Sync {
    /// Before it is done; `Err` is what the device answers instead.
    fn asked(&self, _: &Asked) -> Result<(), Problem> {
        Ok(())
    }

    /// After it was done.
    fn given(&self, _: &Given) {}

    /// Bytes that are free and bytes that there are, where it knows better.
    fn memory(&self) -> Option<(usize, usize)> {
        None
    }

    /// Has a kernel launched by `launch`.
    fn launching(&self, _: &'static str, launch: &mut dyn FnMut() -> Result<(), Problem>) -> Result<(), Problem> {
        launch()
    }
}

/// What a device is asked for.
#[derive(Debug, Clone, Copy)]
pub enum Asked {
    /// So many bytes of memory.
    Memory(usize),
    Upload(usize),
    Download(usize),
    Launch(&'static str),
    Graph,
}

/// What came of it, where that is for the watcher.
#[derive(Debug, Clone, Copy)]
pub enum Given {
    /// Bytes at an address.
    Memory(u64, usize),
    /// The memory at an address went back.
    Back(u64),
}

/// An emulator, watched.
pub struct Watched<W>(pub Emulated, pub W);

impl<W: Watcher> Driver for Watched<W> {
    fn name(&self) -> String {
        self.0.name()
    }

    fn capability(&self) -> Capability {
        self.0.capability()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Problem> {
        self.1.asked(&Asked::Memory(bytes))?;
        let address = self.0.alloc(bytes)?;
        self.1.given(&Given::Memory(address, bytes));
        Ok(address)
    }

    fn free(&self, address: u64) {
        self.1.given(&Given::Back(address));
        self.0.free(address);
    }

    fn memory(&self) -> Result<(usize, usize), Problem> {
        self.1.memory().map_or_else(|| self.0.memory(), Ok)
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Problem> {
        self.1.asked(&Asked::Upload(bytes.len()))?;
        self.0.upload(to, bytes)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Problem> {
        self.1.asked(&Asked::Download(bytes.len()))?;
        self.0.download(from, bytes)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Problem> {
        self.0.zero(at, bytes)
    }

    fn tensor_map(&self, view: &TensorView) -> Result<TensorMap, Problem> {
        self.0.tensor_map(view)
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Dim,
        block: Dim,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Problem> {
        self.1.asked(&Asked::Launch(kernel))?;
        // SAFETY: the caller's promise.
        self.1.launching(kernel, &mut || unsafe { self.0.launch(kernel, grid, block, shared_bytes, arguments) })
    }

    fn synchronize(&self) -> Result<(), Problem> {
        self.0.synchronize()
    }

    fn alloc_host(&self, bytes: usize) -> Result<u64, Problem> {
        self.0.alloc_host(bytes)
    }

    fn free_host(&self, address: u64) {
        self.0.free_host(address);
    }

    unsafe fn queue_upload(&self, queue: Queue, to: u64, from: u64, bytes: usize) -> Result<(), Problem> {
        self.1.asked(&Asked::Upload(bytes))?;
        // SAFETY: the caller's promise.
        unsafe { self.0.queue_upload(queue, to, from, bytes) }
    }

    unsafe fn queue_download(&self, queue: Queue, from: u64, to: u64, bytes: usize) -> Result<(), Problem> {
        self.1.asked(&Asked::Download(bytes))?;
        // SAFETY: the caller's promise.
        unsafe { self.0.queue_download(queue, from, to, bytes) }
    }

    fn mark(&self, queue: Queue) -> Result<Mark, Problem> {
        self.0.mark(queue)
    }

    fn queue_wait(&self, queue: Queue, mark: Mark) -> Result<(), Problem> {
        self.0.queue_wait(queue, mark)
    }

    fn wait(&self, mark: Mark) -> Result<(), Problem> {
        self.0.wait(mark)
    }

    fn forget(&self, mark: Mark) {
        self.0.forget(mark);
    }

    fn begin_capture(&self) -> Result<(), Problem> {
        self.0.begin_capture()
    }

    fn end_capture(&self) -> Result<u64, Problem> {
        self.0.end_capture()
    }

    unsafe fn launch_graph(&self, graph: u64) -> Result<(), Problem> {
        self.1.asked(&Asked::Graph)?;
        // SAFETY: the caller's promise.
        unsafe { self.0.launch_graph(graph) }
    }

    fn free_graph(&self, graph: u64) {
        self.0.free_graph(graph);
    }
}

/// A device with so many bytes of memory and no more.
pub struct Limited {
    left: Mutex<usize>,
    given: Mutex<BTreeMap<u64, usize>>,
}

impl Limited {
    pub fn to(bytes: usize) -> Gpu {
        Gpu::new(Box::new(Watched(PORTABLE, Limited { left: Mutex::new(bytes), given: Mutex::default() })))
    }
}

impl Watcher for Limited {
    fn asked(&self, asked: &Asked) -> Result<(), Problem> {
        match asked {
            Asked::Memory(bytes) if *bytes > *self.left.lock().unwrap() => {
                Err(Problem::new("cuda::out_of_memory", "the emulator has not enough free memory"))
            }
            _ => Ok(()),
        }
    }

    fn given(&self, given: &Given) {
        let (mut left, mut all) = (self.left.lock().unwrap(), self.given.lock().unwrap());
        match given {
            Given::Memory(address, bytes) => {
                *left -= bytes;
                all.insert(*address, *bytes);
            }
            Given::Back(address) => *left += all.remove(address).expect("given before"),
        }
    }

    fn memory(&self) -> Option<(usize, usize)> {
        let (left, given) = (*self.left.lock().unwrap(), self.given.lock().unwrap().values().sum::<usize>());
        Some((left, left + given))
    }
}

/// What the report of `cargo xtask kernels` calculates with; here it is held against the launches.
fn shared_by_manifest() -> &'static BTreeMap<String, u32> {
    static SHARED: OnceLock<BTreeMap<String, u32>> = OnceLock::new();
    SHARED.get_or_init(|| {
        let kernels = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        pipe::cuda::units::shared(&kernels).expect("kernels/manifest.toml")
    })
}

/// Whether the tests run on a GPU: `PIPE_TEST_GPU=1`, for whoever has one.
pub fn on_device() -> bool {
    std::env::var_os("PIPE_TEST_GPU").is_some()
}

/// A new emulated device of the kind that [`on`] says, its memory poisoned, blocks exactly as large as their buffers; or the GPU.
pub fn gpu() -> Gpu {
    static DEVICE: OnceLock<Gpu> = OnceLock::new();
    if on_device() {
        let open = || pipe::cuda::open(0).unwrap_or_else(|problem| panic!("PIPE_TEST_GPU is set, and {problem}"));
        return DEVICE.get_or_init(open).clone();
    }
    Gpu::exact(Box::new(KIND.get()))
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

/// Names the file that comparisons are noted in, by `tests/conformance`: a line for each, with its test, the number
/// of values, the largest difference and the bound.
pub const NOTES: &str = "PIPE_TEST_NOTES";

fn note(values: usize, difference: f64, bound: f64) {
    let Some(path) = std::env::var_os(NOTES) else { return };
    let thread = std::thread::current();
    let line = format!("{}\t{values}\t{difference:e}\t{bound:e}\n", thread.name().unwrap_or("?"));
    let file = std::fs::File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The largest difference is at most `tolerance` times the largest wanted magnitude, or times 1, the size of
/// the inputs, where results cancel.
#[track_caller]
pub fn close<T: Copy + Into<f64>>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1.0f64, |max, x| max.max(x.abs()));
    let differences = got.iter().zip(want).map(|(got, want)| ((*got).into() - want).abs());
    note(got.len(), differences.fold(0.0, f64::max), tolerance * size);
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
    note(got.len(), mine, 2.0 * theirs + tiny * size);
    assert!(mine <= 2.0 * theirs + tiny * size, "{what}: errs by {mine}, the plain composition by {theirs}");
    let (mine, theirs) = (error_of(&got, want), error_of(plain, want));
    assert!(
        mine <= 2.0 * theirs + tiny * size,
        "{what}: errs by {mine} in the mean, the plain composition by {theirs}"
    );
}
