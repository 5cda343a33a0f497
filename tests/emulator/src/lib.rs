//! Runs the CUDA kernels below `kernels/` on the CPU. See README.md for what it catches and what it cannot.

mod place;

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};

/// Who goes first, of the blocks of a grid and of the threads of a block that could go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The one with the lowest number.
    Up,
    /// The one with the highest.
    Down,
    /// Any; the same ones for the same seed.
    Random(u64),
}

/// How launches are carried out. All of them are what a device may do: correct kernels cannot tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    pub order: Order,
    /// Asynchronous copies are done when they are waited for, instead of at once.
    pub late_copies: bool,
    /// Every access is watched: bounds, reads of what nobody wrote, races. Slower.
    pub detector: bool,
    /// Kernels that know this fault are those compiled with `FAULT_<name>` defined.
    pub fault: Option<&'static str>,
}

impl Default for Schedule {
    fn default() -> Schedule {
        Schedule { order: Order::Up, late_copies: true, detector: false, fault: None }
    }
}

thread_local! {
    static CURRENT: Cell<Schedule> = Cell::new(Schedule::default());
}

/// Runs `work` with its launches, those of this thread, under `schedule`.
pub fn with<T>(schedule: Schedule, work: impl FnOnce() -> T) -> T {
    /// Puts the old one back, also when `work` panics.
    struct Restore(Schedule);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _restore = Restore(CURRENT.replace(schedule));
    work()
}

/// The schedule of this thread's launches.
pub fn schedule() -> Schedule {
    CURRENT.get()
}

/// The most dynamic shared memory a block may have (compute capability 9.0).
pub const MOST_SHARED_BYTES: u32 = 227 * 1024;

#[repr(C)]
struct Entry {
    name: *const c_char,
    fault: *const c_char,
    instrumented: u32,
    threads: u32,
    parameters: u32,
    pointers: *const u8,
    call: *const c_void,
    function: *const c_void,
}

#[repr(C)]
struct Options {
    order: u32,
    late_copies: u32,
    detector: u32,
    unused: u32,
    seed: u64,
}

unsafe extern "C" {
    fn emulator_kernels() -> usize;
    fn emulator_kernel(index: usize) -> *const Entry;
    fn emulator_allocate(bytes: usize) -> u64;
    fn emulator_release(address: u64);
    fn emulator_launch(
        kernel: *const Entry,
        blocks: *const u32,
        threads: *const u32,
        shared_bytes: u32,
        arguments: *mut *mut c_void,
        options: *const Options,
    ) -> *mut c_char;
    #[link_name = "free"]
    fn free_text(pointer: *mut c_void);
}

/// A kernel as compiled, one of its variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Variant {
    pub name: &'static str,
    /// Empty for the kernel as it should be.
    pub fault: &'static str,
    pub instrumented: bool,
}

fn entries() -> impl Iterator<Item = (Variant, &'static Entry)> {
    // SAFETY: the table is complete before `main` and never changes; its texts are literals.
    (0..unsafe { emulator_kernels() }).map(|index| unsafe {
        let entry = &*emulator_kernel(index);
        let text = |pointer| CStr::from_ptr(pointer).to_str().expect("names are ASCII");
        (Variant { name: text(entry.name), fault: text(entry.fault), instrumented: entry.instrumented != 0 }, entry)
    })
}

/// Everything there is to launch.
pub fn variants() -> Vec<Variant> {
    let mut all: Vec<Variant> = entries().map(|(variant, _)| variant).collect();
    all.sort();
    all
}

/// `bytes` bytes of device memory, all 0xFF, between two pages out of bounds; 0 if there is no memory.
pub fn alloc(bytes: usize) -> u64 {
    // SAFETY: takes any number.
    unsafe { emulator_allocate(bytes) }
}

/// Gives back what [`alloc`] gave.
pub fn free(address: u64) {
    // SAFETY: takes any number; one that is no buffer's is ignored.
    unsafe { emulator_release(address) }
}

/// What a tensor map begins with, as in runtime/interface.hpp: no address and no number that is a kernel's argument.
pub const MAP: u64 = 0x7061_6d20_726f_736e;

/// A tensor map as the emulated kernels read it: extents in elements of two bytes and the box, innermost first; bytes
/// from one row and one plane to the next. Two extents or three.
pub fn tensor_map(address: u64, extents: &[u64], pitches: &[u64], tile: &[u32]) -> [u64; 16] {
    let mut map = [0; 16];
    map[..3].copy_from_slice(&[MAP, address, extents.len() as u64]);
    for i in 0..3 {
        map[3 + i] = extents.get(i).copied().unwrap_or(1);
        map[8 + i] = tile.get(i).map_or(1, |n| u64::from(*n));
    }
    map[6..][..pitches.len()].copy_from_slice(pitches);
    map
}

fn choose(name: &str, schedule: Schedule) -> Result<&'static Entry, String> {
    let known: Vec<(Variant, &Entry)> = entries().filter(|(variant, _)| variant.name == name).collect();
    if known.is_empty() {
        let mut names: Vec<&str> = entries().map(|(variant, _)| variant.name).collect();
        names.sort();
        names.dedup();
        return Err(format!("there is no kernel `{name}`; there are: {}", names.join(", ")));
    }
    let wanted = schedule.fault.unwrap_or("");
    if !entries().any(|(variant, _)| variant.fault == wanted) {
        return Err(format!("no kernel knows the fault `{wanted}`"));
    }
    // A kernel that does not know the fault is as it should be.
    let fault = if known.iter().any(|(variant, _)| variant.fault == wanted) { wanted } else { "" };
    let watched = schedule.detector || !fault.is_empty();
    let found: Vec<&Entry> = known
        .iter()
        .filter(|(variant, _)| variant.fault == fault && variant.instrumented == watched)
        .map(|(_, entry)| *entry)
        .collect();
    match found[..] {
        [only] => Ok(only),
        [] => Err(format!("kernel `{name}` has no variant for {schedule:?}")),
        _ => Err(format!("kernel `{name}` is there {} times", found.len())),
    }
}

/// What a device would refuse, in words.
fn refusal(entry: &Entry, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, arguments: usize) -> Option<String> {
    let threads: u64 = block.iter().map(|n| u64::from(*n)).product();
    let blocks: u64 = grid.iter().map(|n| u64::from(*n)).product();
    if grid[0] > i32::MAX as u32 || grid[1] > 65_535 || grid[2] > 65_535 || blocks == 0 {
        Some(format!("a grid of {grid:?} blocks: 1 to 2^31 - 1, 65535 and 65535 are possible"))
    } else if blocks > u64::from(u32::MAX) {
        Some(format!("a grid of {blocks} blocks is more than the emulator counts"))
    } else if block[0] > 1024 || block[1] > 1024 || block[2] > 64 || threads > 1024 || threads == 0 {
        Some(format!("a block of {block:?} threads: 1 to 1024, 1024 and 64 are possible, 1024 in all"))
    } else if threads > u64::from(entry.threads) {
        Some(format!("a block of {threads} threads, while the kernel is compiled for {}", entry.threads))
    } else if shared_bytes > MOST_SHARED_BYTES {
        Some(format!("{shared_bytes} bytes of shared memory: at most {MOST_SHARED_BYTES} are possible"))
    } else if arguments != entry.parameters as usize {
        Some(format!("{arguments} arguments for {} parameters", entry.parameters))
    } else {
        None
    }
}

/// Carries out a launch under this thread's [`schedule`]. `Err` tells every fault that was found, with places.
///
/// # Safety
/// The arguments point to values of the kernel's parameters, in number, order and type. That device memory is
/// large enough is not asked for: it is found out.
pub unsafe fn launch(
    name: &str,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    shared_bytes: u32,
    arguments: &mut [*mut c_void],
) -> Result<(), String> {
    let schedule = schedule();
    let entry = choose(name, schedule)?;
    let (grid, block) = ([grid.0, grid.1, grid.2], [block.0, block.1, block.2]);
    if let Some(refusal) = refusal(entry, grid, block, shared_bytes, arguments.len()) {
        return Err(format!("kernel `{name}`: {refusal}"));
    }
    let (order, seed) = match schedule.order {
        Order::Up => (0, 0),
        Order::Down => (1, 0),
        Order::Random(seed) => (2, seed),
    };
    let options = Options {
        order,
        late_copies: schedule.late_copies.into(),
        detector: schedule.detector.into(),
        unused: 0,
        seed,
    };
    // SAFETY: the caller's promise; the text is ours to give back.
    let faults = unsafe {
        let text =
            emulator_launch(entry, grid.as_ptr(), block.as_ptr(), shared_bytes, arguments.as_mut_ptr(), &options);
        if text.is_null() {
            return Ok(());
        }
        let faults = CStr::from_ptr(text).to_string_lossy().into_owned();
        free_text(text.cast());
        faults
    };
    let fault = schedule.fault.map(|fault| format!("@{fault}")).unwrap_or_default();
    let lines: String = place::named(&faults).lines().map(|line| format!("\n  {line}")).collect();
    Err(format!("kernel `{name}{fault}`:{lines}"))
}
