//! One launch, its arguments gathered in the order of the kernel's parameters.

use super::driver::{Dim, TensorMap};
use super::memory::{Buffer, Gpu};
use crate::problem::{Exit, Problem};
use bytemuck::Pod;
use std::ffi::c_void;

/// The largest number that a kernel is given: it counts with an `int`.
pub const LARGEST_COUNT: usize = i32::MAX as usize;

/// Whether kernels can count the values of `rows` rows that are `width` wide: the tokens of a micro-batch, and the widest
/// thing that is computed of each. `Err` (`cuda::too_large`) says how many rows can be.
pub fn check_rows(rows: usize, width: usize) -> Result<(), Problem> {
    if rows.checked_mul(width).is_some_and(|values| values <= LARGEST_COUNT) {
        return Ok(());
    }
    let most = LARGEST_COUNT / width.max(1);
    Err(too_large(format!("{rows} tokens of {width} values at once are more than a kernel counts"))
        .note(format!("at this width at most {most} tokens can be worked through at once")))
}

fn too_large(message: String) -> Problem {
    Problem::new("cuda::too_large", message)
        .note(format!("kernels count up to {LARGEST_COUNT}"))
        .help("make micro-batches smaller, or run on the CPU: `--device cpu`")
        .exit(Exit::Usage)
}

/// A launch in the making.
#[must_use = "nothing is launched before `run`"]
pub struct Launch<'g> {
    gpu: &'g Gpu,
    kernel: &'static str,
    grid: Dim,
    block: Dim,
    shared_bytes: u32,
    arguments: Vec<Argument>,
    /// A number that is too large for the kernel.
    too_large: Option<usize>,
}

enum Argument {
    /// A value in its low bytes.
    Word(u64),
    /// In a box of its own, which is aligned as the kernel's parameter is.
    Map(Box<TensorMap>),
}

impl Gpu {
    /// A launch of `kernel`, one of those below `kernels/`.
    pub fn launch(&self, kernel: &'static str, grid: impl Into<Dim>, block: impl Into<Dim>) -> Launch<'_> {
        Launch {
            gpu: self,
            kernel,
            grid: grid.into(),
            block: block.into(),
            shared_bytes: 0,
            arguments: Vec::new(),
            too_large: None,
        }
    }
}

impl Launch<'_> {
    /// Dynamic shared memory per block.
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = u32::try_from(bytes).expect("shared memory is small");
        self
    }

    /// A pointer to the first element.
    pub fn buffer<T: Pod>(self, buffer: &Buffer<T>) -> Self {
        self.gpu.keep(buffer);
        self.address(buffer.address())
    }

    /// A pointer to element `index`.
    pub fn at<T: Pod>(self, buffer: &Buffer<T>, index: usize) -> Self {
        self.gpu.keep(buffer);
        self.address(buffer.address_of(index))
    }

    /// A pointer that may be null.
    pub fn optional<T: Pod>(self, buffer: Option<&Buffer<T>>) -> Self {
        match buffer {
            Some(buffer) => self.buffer(buffer),
            None => self.address(0),
        }
    }

    /// A pointer, as a number.
    pub fn address(mut self, address: u64) -> Self {
        self.arguments.push(Argument::Word(address));
        self
    }

    /// An `int`. One above [`LARGEST_COUNT`] is an error of [`Launch::run`].
    pub fn int(mut self, value: usize) -> Self {
        if value > LARGEST_COUNT {
            self.too_large = Some(value);
        }
        self.arguments.push(Argument::Word(u64::from(value as u32)));
        self
    }

    /// A `float`.
    pub fn float(mut self, value: f32) -> Self {
        self.arguments.push(Argument::Word(u64::from(value.to_bits())));
        self
    }

    /// A `TENSOR_MAP`.
    pub fn map(mut self, map: TensorMap) -> Self {
        self.arguments.push(Argument::Map(Box::new(map)));
        self
    }

    /// Queues it; an empty grid is nothing. `Err` names the kernel and its shape, or (`cuda::too_large`) a number that the
    /// kernel cannot count to.
    ///
    /// # Safety
    /// The arguments must be the kernel's, in number, order and type, and the buffers as large as it reads
    /// and writes. Launchers below `ops/` see to that; nothing else launches.
    pub unsafe fn run(mut self) -> Result<(), Problem> {
        if let Some(count) = self.too_large {
            return Err(too_large(format!("kernel `{}` was asked to count to {count}", self.kernel)));
        }
        if self.grid.count() == 0 {
            return Ok(());
        }
        let _span = tracing::trace_span!("launch", kernel = self.kernel).entered();
        let pointer = |argument: &mut Argument| -> *mut c_void {
            match argument {
                Argument::Word(word) => std::ptr::from_mut(word).cast(),
                Argument::Map(map) => std::ptr::from_mut(map.as_mut()).cast(),
            }
        };
        let mut pointers: Vec<*mut c_void> = self.arguments.iter_mut().map(pointer).collect();
        // SAFETY: the caller's promise.
        let done =
            unsafe { self.gpu.driver().launch(self.kernel, self.grid, self.block, self.shared_bytes, &mut pointers) };
        done.map_err(|problem| {
            let Launch { kernel, grid, block, shared_bytes, .. } = &self;
            problem.note(format!(
                "kernel `{kernel}`, grid {} x {} x {}, block {} x {} x {}, {shared_bytes} bytes of shared memory",
                grid.0, grid.1, grid.2, block.0, block.1, block.2
            ))
        })
    }
}
