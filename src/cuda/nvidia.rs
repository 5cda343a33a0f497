//! NVIDIA's driver, through `cudarc`: the [`Driver`] of a real device.
//!
//! `cudarc` would panic in any call to a function that the driver lacks: those used here are all in every driver from
//! 525 on, under the same names, whichever version of CUDA its bindings are for. They should be for the newest: a
//! driver's error that they do not know has no place in their enumeration. Its buffers, which record two events each,
//! are not used: the order of a queue is nearly all we need, and the few events between two queues are marked by hand.

use super::driver::{Dim, Driver, Mark, Queue, TensorMap, TensorView};
use super::jit::Jit;
use super::kernels::{Image, Kernels};
use super::memory::Gpu;
use super::survey::{
    NEEDED_CAPABILITY, NEEDED_FOR_PTX, capability, code, error_name, missing, no_device, no_start, old_device,
    out_of_memory, start,
};
use super::unit::{Capability, Unit};
use crate::problem::Problem;
use cudarc::driver::DriverError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// More dynamic shared memory than this has to be asked for, kernel by kernel.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// The `ordinal`-th device that the driver shows. `Err`: `cuda::no_driver`, `cuda::old_driver`,
/// `cuda::no_device`, `cuda::old_device`, each with what to do about it.
pub fn open(ordinal: usize) -> Result<Gpu, Problem> {
    open_with(ordinal, &[])
}

/// The same, and it also knows the kernels of these units, whose names are no others'.
pub fn open_with(ordinal: usize, more: &'static [Unit]) -> Result<Gpu, Problem> {
    Ok(Gpu::new(Box::new(Nvidia::open(ordinal, more)?)))
}

struct Nvidia {
    name: String,
    capability: Capability,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// The queue of launches.
    stream: sys::CUstream,
    /// The queue of copies beside it.
    copies: sys::CUstream,
    kernels: Kernels,
    loaded: Mutex<Loaded>,
    events: Mutex<Events>,
    /// Whether the driver waits for every launch: `CUDA_LAUNCH_BLOCKING=1`.
    waits: bool,
}

/// Events are made when there is none to use again.
#[derive(Default)]
struct Events {
    all: Vec<sys::CUevent>,
    free: Vec<sys::CUevent>,
}

// SAFETY: the driver's functions may be called from any thread; the handles are theirs to share.
unsafe impl Send for Nvidia {}
// SAFETY: as above; what changes on our side is behind a mutex.
unsafe impl Sync for Nvidia {}

/// Kernels are loaded when first launched.
#[derive(Default)]
struct Loaded {
    /// By unit.
    modules: HashMap<String, sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
    /// What was queued last, for messages about a failure that shows only later.
    last: Option<Last>,
}

#[derive(Clone, Copy)]
enum Last {
    Kernel(&'static str),
    Graph,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// How much dynamic shared memory it may be given.
    shared_bytes: u32,
}

impl Nvidia {
    fn open(ordinal: usize, more: &'static [Unit]) -> Result<Nvidia, Problem> {
        start()?;
        let count = result::device::get_count().map_err(no_start)?;
        if ordinal >= count as usize {
            return Err(match count {
                0 => no_device("the CUDA driver shows no device"),
                _ => no_device(format!("there is no CUDA device {ordinal}: the driver shows {count}, counted from 0")),
            });
        }
        let device = result::device::get(ordinal as i32).map_err(no_start)?;
        let name = result::device::get_name(device).map_err(no_start)?;
        let capability = capability(device).map_err(no_start)?;
        if capability < NEEDED_CAPABILITY {
            return Err(old_device(&name, capability));
        }
        let kernels = Kernels { more, jit: Jit::of_environment()? };
        // SAFETY: the device is one that the driver named.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(|error| match error.0 as u32 {
            code::DEVICE_UNAVAILABLE => no_device(format!("{name} is taken: another process has it for itself")),
            code::OUT_OF_MEMORY => out_of_memory(&name),
            _ => no_device(format!("{name} cannot be used: {}", error_name(error))),
        })?;
        let (stream, copies) = (std::ptr::null_mut(), std::ptr::null_mut());
        let (loaded, events) = (Mutex::default(), Mutex::default());
        let waits = std::env::var_os("CUDA_LAUNCH_BLOCKING").is_some_and(|value| value == "1");
        let mut nvidia = Nvidia { name, capability, device, context, stream, copies, kernels, loaded, events, waits };
        nvidia.enter()?;
        // Not the default stream, which waits for others of the process.
        let queue = |nvidia: &Nvidia| {
            result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|error| nvidia.failed("making a queue", error))
        };
        nvidia.stream = queue(&nvidia)?;
        nvidia.copies = queue(&nvidia)?;
        Ok(nvidia)
    }

    fn queue(&self, queue: Queue) -> sys::CUstream {
        match queue {
            Queue::Compute => self.stream,
            Queue::Copy => self.copies,
        }
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver acts on the context of the calling thread.
    fn enter(&self) -> Result<(), Problem> {
        // SAFETY: the context is kept until `self` goes away.
        unsafe { result::ctx::set_current(self.context) }.map_err(|error| self.failed("taking up its context", error))
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver's answer to something that was asked of the device, as a problem. Answers come late: what
    /// fails may be a kernel queued long before, which is why the last one is named.
    fn failed(&self, doing: &str, error: DriverError) -> Problem {
        let (name, reason) = (&self.name, error_name(error));
        let number = error.0 as u32;
        if number == code::OUT_OF_MEMORY {
            return out_of_memory(name);
        }
        let problem = if code::LOST.contains(&number) {
            Problem::new("cuda::lost", format!("{name} was lost while {doing}: {reason}"))
                .help("`nvidia-smi -q` and the system's log say why; run again, what is finished is kept")
        } else if code::KERNEL.contains(&number) {
            Problem::new("cuda::launch", format!("a kernel failed on {name}, seen while {doing}: {reason}"))
                .help("CUDA_LAUNCH_BLOCKING=1 makes every launch wait, so that the kernel that fails is named")
        } else {
            Problem::new("cuda::driver", format!("the CUDA driver failed while {doing}: {reason}"))
        };
        match self.loaded.try_lock().ok().and_then(|loaded| loaded.last) {
            Some(Last::Kernel(kernel)) => problem.note(format!("queued last: kernel `{kernel}`")),
            Some(Last::Graph) => problem.note("queued last: a graph of captured launches"),
            None => problem,
        }
    }

    /// The kernel, loaded, and allowed this much shared memory.
    fn function(&self, kernel: &'static str, shared_bytes: u32) -> Result<sys::CUfunction, Problem> {
        let mut loaded = self.loaded();
        let mut function = match loaded.functions.get(kernel) {
            Some(function) => *function,
            None => Function { handle: self.load(&mut loaded, kernel)?, shared_bytes: SHARED_WITHOUT_ASKING },
        };
        if shared_bytes > function.shared_bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was loaded above or before, and modules stay.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared_bytes as i32) }
                .map_err(|error| {
                    let message = format!(
                        "kernel `{kernel}` cannot have {shared_bytes} bytes of shared memory on {}: {}",
                        self.name,
                        error_name(error)
                    );
                    Problem::new("cuda::launch", message)
                })?;
            function.shared_bytes = shared_bytes;
        }
        loaded.functions.insert(kernel, function);
        Ok(function.handle)
    }

    fn load(&self, loaded: &mut Loaded, kernel: &'static str) -> Result<sys::CUfunction, Problem> {
        let unit = self.kernels.unit_of(kernel, self.capability)?;
        let module = match loaded.modules.get(&unit) {
            Some(module) => *module,
            None => {
                let module = self.load_module(&self.kernels.image(&unit, self.capability, &self.name)?, &unit)?;
                loaded.modules.insert(unit, module);
                module
            }
        };
        let name = CString::new(kernel).expect("names of kernels are C identifiers");
        // SAFETY: the module was loaded above or before and stays.
        unsafe { result::module::get_function(module, name) }
            .map_err(|error| self.failed(&format!("looking for kernel `{kernel}`"), error))
    }

    fn load_module(&self, image: &Image, unit: &str) -> Result<sys::CUmodule, Problem> {
        let mut module = std::ptr::null_mut();
        let mut log = vec![0u8; if image.is_ptx { 8 << 10 } else { 0 }];
        let mut options =
            [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(log.len())];
        let used = if image.is_ptx { options.len() } else { 0 };
        // SAFETY: the image is a whole cubin, or PTX ending with zero; the log is as large as said.
        let done = unsafe {
            sys::cuModuleLoadDataEx(
                &mut module,
                image.bytes.as_ptr().cast(),
                used as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        done.result().map_err(|error| match error.0 as u32 {
            code::UNSUPPORTED_PTX_VERSION => {
                let message = format!("the CUDA driver is too old to compile kernels for {}", self.name);
                missing("cuda::old_driver", message, format!("install driver {NEEDED_FOR_PTX} or later"))
            }
            _ => {
                let problem = self.failed(&format!("loading the kernels of `{unit}` ({})", image.arch), error);
                let said = String::from_utf8_lossy(&log);
                match said.trim_end_matches('\0').trim() {
                    "" => problem,
                    said => problem.note(format!("its compiler says: {said}")),
                }
            }
        })?;
        Ok(module)
    }
}

impl Driver for Nvidia {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn capability(&self) -> Capability {
        self.capability
    }

    /// `cuMemAlloc` waits and is slow; the pool above asks seldom.
    fn alloc(&self, bytes: usize) -> Result<u64, Problem> {
        self.enter()?;
        // SAFETY: nothing is assumed of the memory; its owner is the pool.
        unsafe { result::malloc_sync(bytes) }.map_err(|error| self.failed("making room on it", error))
    }

    fn free(&self, address: u64) {
        // There is nobody to tell: a device that refuses this refuses the next launch too.
        if self.enter().is_ok() {
            // SAFETY: the caller's: it came from `alloc` and is not used any more. The driver waits.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn memory(&self) -> Result<(usize, usize), Problem> {
        self.enter()?;
        result::mem_get_info().map_err(|error| self.failed("asking for its memory", error))
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Problem> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller owns this much memory there. Where the GPU reads ordinary memory by itself the
        // copy may still run when the call returns, so wait: the bytes are only lent.
        let done = unsafe {
            result::memcpy_htod_async(to, bytes, self.stream).and_then(|()| result::stream::synchronize(self.stream))
        };
        done.map_err(|error| self.failed("copying to it", error))
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Problem> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller owns this much memory there, and the copy is over before the call returns.
        let done = unsafe {
            let queued = result::memcpy_dtoh_async(bytes, from, self.stream);
            queued.and_then(|()| result::stream::synchronize(self.stream))
        };
        done.map_err(|error| self.failed("copying from it", error))
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), Problem> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller owns this much memory there.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }
            .map_err(|error| self.failed("filling its memory with zeros", error))
    }

    fn tensor_map(&self, view: &TensorView) -> Result<TensorMap, Problem> {
        self.enter()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // Each element along every extent.
        let every = [1u32; 3];
        // SAFETY: the lists are as long as the rank says, the pitches one shorter; the driver writes the map, and
        // reads nothing of the tensor.
        let done = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                view.extents.len() as u32,
                std::ptr::with_exposed_provenance_mut(view.address as usize),
                view.extents.as_ptr(),
                view.pitches.as_ptr(),
                view.tile.as_ptr(),
                every.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        done.result().map_err(|error| self.failed(&format!("describing a tensor to it, {view:?}"), error))?;
        Ok(TensorMap(map.opaque))
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Dim,
        block: Dim,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Problem> {
        self.enter()?;
        let function = self.function(kernel, shared_bytes)?;
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        let done = unsafe {
            result::launch_kernel(
                function,
                (grid.0, grid.1, grid.2),
                (block.0, block.1, block.2),
                shared_bytes,
                self.stream,
                arguments,
            )
        };
        done.map_err(|error| match self.failed(&format!("launching `{kernel}`"), error) {
            problem if problem.code == "cuda::driver" => {
                let message = format!("{} refuses kernel `{kernel}`: {}", self.name, error_name(error));
                Problem { code: "cuda::launch", message, ..problem }
            }
            problem => problem,
        })?;
        self.loaded().last = Some(Last::Kernel(kernel));
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Problem> {
        self.enter()?;
        // SAFETY: the streams are there until `self` goes away.
        unsafe { result::stream::synchronize(self.copies).and_then(|()| result::stream::synchronize(self.stream)) }
            .map_err(|error| self.failed("waiting for it", error))
    }

    fn alloc_host(&self, bytes: usize) -> Result<u64, Problem> {
        self.enter()?;
        // SAFETY: nothing is assumed of the memory.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(|error| {
            let message =
                format!("the CUDA driver gives no {bytes} bytes of page-locked memory: {}", error_name(error));
            missing("cuda::host_memory", message, "make batches smaller, or leave `offload` out")
        })?;
        Ok(memory as u64)
    }

    fn free_host(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: the caller's: it came from `alloc_host` and no copy uses it any more.
            let _ = unsafe { result::free_host(address as *mut c_void) };
        }
    }

    unsafe fn queue_upload(&self, queue: Queue, to: u64, from: u64, bytes: usize) -> Result<(), Problem> {
        self.enter()?;
        // SAFETY: the caller's promise.
        let done = unsafe {
            let from = std::slice::from_raw_parts(from as *const u8, bytes);
            result::memcpy_htod_async(to, from, self.queue(queue))
        };
        done.map_err(|error| self.failed("copying to it", error))
    }

    unsafe fn queue_download(&self, queue: Queue, from: u64, to: u64, bytes: usize) -> Result<(), Problem> {
        self.enter()?;
        // SAFETY: the caller's promise.
        let done = unsafe { sys::cuMemcpyDtoHAsync_v2(to as *mut c_void, from, bytes, self.queue(queue)) };
        done.result().map_err(|error| self.failed("copying from it", error))
    }

    fn mark(&self, queue: Queue) -> Result<Mark, Problem> {
        self.enter()?;
        let free = self.events().free.pop();
        let event = match free {
            Some(event) => event,
            None => {
                let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(|error| self.failed("making an event", error))?;
                self.events().all.push(event);
                event
            }
        };
        // SAFETY: event and stream are there until `self` goes away.
        unsafe { result::event::record(event, self.queue(queue)) }
            .map_err(|error| self.failed("marking a place in a queue", error))?;
        Ok(Mark(event as u64))
    }

    fn queue_wait(&self, queue: Queue, mark: Mark) -> Result<(), Problem> {
        self.enter()?;
        let (event, flags) = (mark.0 as sys::CUevent, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT);
        // SAFETY: as above; a mark is an event of `mark`.
        unsafe { result::stream::wait_event(self.queue(queue), event, flags) }
            .map_err(|error| self.failed("ordering its queues", error))
    }

    fn wait(&self, mark: Mark) -> Result<(), Problem> {
        self.enter()?;
        // SAFETY: as above.
        unsafe { result::event::synchronize(mark.0 as sys::CUevent) }
            .map_err(|error| self.failed("waiting for it", error))
    }

    fn forget(&self, mark: Mark) {
        self.events().free.push(mark.0 as sys::CUevent);
    }

    fn captures(&self) -> bool {
        !self.waits
    }

    /// Only what this thread does counts: others may allocate meanwhile.
    fn begin_capture(&self) -> Result<(), Problem> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is there until `self` goes away.
        unsafe { result::stream::begin_capture(self.stream, mode) }
            .map_err(|error| self.failed("beginning to capture launches", error))
    }

    fn end_capture(&self) -> Result<u64, Problem> {
        self.enter()?;
        // SAFETY: as above; the graph is ours, and what is launched is made from it once.
        let made = unsafe {
            result::stream::end_capture(self.stream).and_then(|graph| {
                let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
                let _ = result::graph::destroy(graph);
                made
            })
        };
        let graph = made.map_err(|error| self.failed("capturing launches", error))?;
        Ok(graph.expose_provenance() as u64)
    }

    unsafe fn launch_graph(&self, graph: u64) -> Result<(), Problem> {
        self.enter()?;
        // SAFETY: the caller's promise; the handle is one that `end_capture` gave.
        unsafe { result::graph::launch(std::ptr::with_exposed_provenance_mut(graph as usize), self.stream) }
            .map_err(|error| self.failed("launching a graph", error))?;
        self.loaded().last = Some(Last::Graph);
        Ok(())
    }

    fn free_graph(&self, graph: u64) {
        if self.enter().is_ok() {
            // SAFETY: the handle is one that `end_capture` gave, and nothing of it runs any more. As with `free`,
            // there is nobody to tell.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::graph::exec_destroy(std::ptr::with_exposed_provenance_mut(graph as usize));
            }
        }
    }

    /// By two events in the queue: the device's own clock, which sees nothing of the host.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), Problem>) -> Result<f64, Problem> {
        let marks = [self.instant()?, self.instant()?];
        let timed = self.record(&marks[0]).and_then(|()| work()).and_then(|()| self.record(&marks[1]));
        timed.and_then(|()| self.seconds_between(&marks))
    }
}

/// A place in the queue whose time is taken.
struct Timed(sys::CUevent);

impl Drop for Timed {
    fn drop(&mut self) {
        // SAFETY: made by the driver, and in use nowhere else; one that is recorded goes once it has passed.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Nvidia {
    fn instant(&self) -> Result<Timed, Problem> {
        self.enter()?;
        let made = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        made.map(Timed).map_err(|error| self.failed("making an event", error))
    }

    fn record(&self, mark: &Timed) -> Result<(), Problem> {
        self.enter()?;
        // SAFETY: event and stream are of this context, and are there.
        unsafe { result::event::record(mark.0, self.stream) }.map_err(|error| self.failed("queueing an event", error))
    }

    /// Waits for both. `cudarc` asks for the time in a way that drivers before CUDA 12.8 lack; this is the older one.
    fn seconds_between(&self, marks: &[Timed; 2]) -> Result<f64, Problem> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let mut milliseconds = 0.0;
        // SAFETY: both events were recorded; the function has been in every driver, with this type.
        let done = unsafe {
            result::event::synchronize(marks[1].0).and_then(|()| {
                let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime").expect("in every driver");
                elapsed(&mut milliseconds, marks[0].0, marks[1].0).result()
            })
        };
        done.map_err(|error| self.failed("waiting for an event", error))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        // Modules go with the context. What fails now has failed before.
        if self.enter().is_ok() {
            for event in std::mem::take(&mut self.events().all) {
                // SAFETY: nobody holds a mark any more.
                let _ = unsafe { result::event::destroy(event) };
            }
            for stream in [self.stream, self.copies].into_iter().filter(|stream| !stream.is_null()) {
                // SAFETY: nothing is queued by anyone any more.
                let _ = unsafe { result::stream::destroy(stream) };
            }
        }
        // SAFETY: retained once, in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}
