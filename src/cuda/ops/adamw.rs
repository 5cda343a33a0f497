//! AdamW on all tensors in one launch, with f32 or 8-bit moments: `kernels/adamw.cu`. The arithmetic is that of
//! `train::adamw` and `train::adamw8bit`, bit by bit.

use super::grad_norm::{Piece, THREADS, Table, pieces};
use crate::cuda::{Buffer, Gpu, Launch};
use crate::problem::Problem;
use bytemuck::{Pod, Zeroable};
use half::bf16;

/// Consecutive elements that share a scale in 8 bits, here and on the processor. Part of the kernel: the elements of a warp.
pub const BLOCK: usize = 256;
/// Tensors with fewer elements keep f32 moments.
pub const SMALLEST: usize = 4096;

/// What both optimizers share, here and on the processor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// How much of the first moment stays from one update to the next.
    pub beta1: f64,
    /// The same of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// The part of a decayed parameter that goes at a learning rate of 1.
    pub weight_decay: f64,
}

impl Default for Options {
    /// The defaults of PyTorch.
    fn default() -> Options {
        Options { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

impl Options {
    /// By what the first moment of update number `step_index` is divided, and the root of the second.
    fn corrections(&self, step_index: u64) -> (f64, f64) {
        assert!(step_index > 0, "steps count from 1");
        (1.0 - self.beta1.powf(step_index as f64), (1.0 - self.beta2.powf(step_index as f64)).sqrt())
    }

    /// The first scalars of both kernels: how much of the moments stays, and how much comes of the gradient.
    fn decays<'g>(&self, launch: Launch<'g>) -> Launch<'g> {
        [self.beta1, self.beta2, 1.0 - self.beta1, 1.0 - self.beta2]
            .into_iter()
            .fold(launch, |launch, part| launch.float(part as f32))
    }

    /// The last one: what weight decay leaves of a parameter.
    fn shrinks(&self, rate: f64) -> f32 {
        (1.0 - rate * self.weight_decay) as f32
    }
}

/// A tensor to update. All its buffers have the same length.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    /// Updated in place.
    pub param: &'a Buffer<f32>,
    /// Of the loss by `param`.
    pub grad: &'a Buffer<f32>,
    /// Becomes `param` rounded to bf16, for products.
    pub copy: Option<&'a Buffer<bf16>>,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// `Tensor` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
struct Row {
    param: u64,
    grad: u64,
    copy: u64,
    first: u64,
    second: u64,
    first_max: u64,
    second_max: u64,
    length: u64,
    decays: u64,
}

/// The moments of one tensor.
enum Moments {
    Full { first: Buffer<f32>, second: Buffer<f32> },
    Blocks { first: Buffer<u8>, first_max: Buffer<f32>, second: Buffer<u8>, second_max: Buffer<f32> },
}

impl Moments {
    fn full(gpu: &Gpu, length: usize) -> Result<Moments, Problem> {
        Ok(Moments::Full { first: gpu.zeros(length)?, second: gpu.zeros(length)? })
    }

    fn blocks(gpu: &Gpu, length: usize) -> Result<Moments, Problem> {
        let blocks = length.div_ceil(BLOCK);
        Ok(Moments::Blocks {
            first: gpu.zeros(length)?,
            first_max: gpu.zeros(blocks)?,
            second: gpu.zeros(length)?,
            second_max: gpu.zeros(blocks)?,
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Moments::Full { first, second } => 4 * (first.len() + second.len()),
            Moments::Blocks { first, first_max, second, second_max } => {
                first.len() + second.len() + 4 * (first_max.len() + second_max.len())
            }
        }
    }

    fn states(&self) -> Result<Vec<Vec<u8>>, Problem> {
        Ok(match self {
            Moments::Full { first, second } => vec![to_bytes(first)?, to_bytes(second)?],
            Moments::Blocks { first, first_max, second, second_max } => {
                vec![to_bytes(first)?, to_bytes(first_max)?, to_bytes(second)?, to_bytes(second_max)?]
            }
        })
    }

    fn restore<'s>(&mut self, mut states: impl Iterator<Item = &'s Vec<u8>>) -> Result<(), Problem> {
        match self {
            Moments::Full { first, second } => {
                from_bytes(first, states.next())?;
                from_bytes(second, states.next())
            }
            Moments::Blocks { first, first_max, second, second_max } => {
                from_bytes(first, states.next())?;
                from_bytes(first_max, states.next())?;
                from_bytes(second, states.next())?;
                from_bytes(second_max, states.next())
            }
        }
    }
}

fn to_bytes<T: Pod>(buffer: &Buffer<T>) -> Result<Vec<u8>, Problem> {
    Ok(bytemuck::cast_slice(&buffer.download()?).to_vec())
}

fn from_bytes<T: Pod>(buffer: &mut Buffer<T>, bytes: Option<&Vec<u8>>) -> Result<(), Problem> {
    let wanted = buffer.len() * size_of::<T>();
    match bytes {
        Some(bytes) if bytes.len() == wanted => {
            let values: Vec<T> = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
            buffer.write(&values)
        }
        _ => Err(Problem::new(
            "cuda::optimizer_state",
            format!(
                "a state of the optimizer has {} bytes where the model needs {wanted}",
                bytes.map_or(0, |bytes| bytes.len())
            ),
        )),
    }
}

/// Moments of tensors of fixed lengths, and how the tensors are cut into pieces.
struct States {
    lengths: Vec<usize>,
    moments: Vec<Moments>,
    pieces: Buffer<Piece>,
    table: Table<Row>,
}

impl States {
    fn new(
        gpu: &Gpu,
        lengths: &[usize],
        moments: impl Fn(usize) -> Result<Moments, Problem>,
    ) -> Result<States, Problem> {
        Ok(States {
            lengths: lengths.to_vec(),
            moments: lengths.iter().map(|length| moments(*length)).collect::<Result<_, _>>()?,
            pieces: pieces(gpu, lengths)?,
            table: Table::new(),
        })
    }

    /// A launch over all pieces with the two tables as its first arguments.
    fn launch<'g>(&mut self, gpu: &'g Gpu, kernel: &'static str, tensors: &[Tensor]) -> Result<Launch<'g>, Problem> {
        assert_eq!(tensors.len(), self.lengths.len(), "the tensors are those given to `new`");
        let mut rows = Vec::with_capacity(tensors.len());
        for ((tensor, moments), length) in tensors.iter().zip(&self.moments).zip(&self.lengths) {
            assert_eq!((tensor.param.len(), tensor.grad.len()), (*length, *length));
            assert!(tensor.copy.is_none_or(|copy| copy.len() == *length));
            let (first, second, first_max, second_max) = match moments {
                Moments::Full { first, second } => (first.address(), second.address(), 0, 0),
                Moments::Blocks { first, first_max, second, second_max } => {
                    (first.address(), second.address(), first_max.address(), second_max.address())
                }
            };
            rows.push(Row {
                param: tensor.param.address(),
                grad: tensor.grad.address(),
                copy: tensor.copy.map_or(0, Buffer::address),
                first,
                second,
                first_max,
                second_max,
                length: *length as u64,
                decays: u64::from(tensor.decays),
            });
        }
        let launch = gpu.launch(kernel, self.pieces.len(), THREADS);
        Ok(launch.buffer(self.table.with(gpu, rows)?).buffer(&self.pieces))
    }

    fn bytes(&self) -> usize {
        self.moments.iter().map(Moments::bytes).sum()
    }

    fn states(&self) -> Result<Vec<Vec<u8>>, Problem> {
        let states: Vec<_> = self.moments.iter().map(Moments::states).collect::<Result<_, _>>()?;
        Ok(states.into_iter().flatten().collect())
    }

    fn restore(&mut self, states: &[Vec<u8>]) -> Result<(), Problem> {
        let mut states = states.iter();
        self.moments.iter_mut().try_for_each(|moments| moments.restore(&mut states))?;
        match states.len() {
            0 => Ok(()),
            more => Err(Problem::new(
                "cuda::optimizer_state",
                format!("the optimizer was given {more} states more than it has"),
            )),
        }
    }
}

/// First and second moments of all tensors in f32.
pub struct AdamW {
    states: States,
}

impl AdamW {
    /// Zero moments for tensors of these lengths.
    pub fn new(gpu: &Gpu, lengths: &[usize]) -> Result<AdamW, Problem> {
        Ok(AdamW { states: States::new(gpu, lengths, |length| Moments::full(gpu, length))? })
    }

    /// Update number `step_index`, from 1, of `tensors`, whose lengths are those given to [`AdamW::new`].
    pub fn step(
        &mut self,
        gpu: &Gpu,
        tensors: &[Tensor],
        rate: f64,
        options: &Options,
        step_index: u64,
    ) -> Result<(), Problem> {
        let (correction1, correction2) = options.corrections(step_index);
        let launch = options
            .decays(self.states.launch(gpu, "adamw_step", tensors)?)
            .float((rate / correction1) as f32)
            .float(correction2 as f32)
            .float(options.epsilon as f32)
            .float(options.shrinks(rate));
        // SAFETY: tables and scalars of `adamw_step` in order; each row of the table has buffers of its length, and
        // pieces name rows there are.
        unsafe { launch.run() }
    }

    /// Bytes of the moments.
    pub fn bytes(&self) -> usize {
        self.states.bytes()
    }

    /// For each tensor in order the bytes of m and of v, f32: the order of `train::Optimizer`'s states.
    pub fn states(&self) -> Result<Vec<Vec<u8>>, Problem> {
        self.states.states()
    }

    /// Takes what [`AdamW::states`] gave, of this or another optimizer for tensors of the same lengths.
    pub fn restore(&mut self, states: &[Vec<u8>]) -> Result<(), Problem> {
        self.states.restore(states)
    }
}

/// Moments of all tensors, one byte each and an f32 per 256; of tensors with fewer than [`SMALLEST`] elements
/// in f32.
pub struct AdamW8bit {
    states: States,
    signed: Buffer<f32>,
    unsigned: Buffer<f32>,
}

impl AdamW8bit {
    /// Zero moments for tensors of these lengths. `signed` and `unsigned` say what a byte means in the first and in
    /// the second moment, ascending: `SIGNED` and `UNSIGNED` of `train::adamw8bit`.
    pub fn new(gpu: &Gpu, lengths: &[usize], signed: &[f32; 256], unsigned: &[f32; 256]) -> Result<AdamW8bit, Problem> {
        let moments = |length| {
            if length < SMALLEST { Moments::full(gpu, length) } else { Moments::blocks(gpu, length) }
        };
        Ok(AdamW8bit {
            states: States::new(gpu, lengths, moments)?,
            signed: gpu.upload(signed)?,
            unsigned: gpu.upload(unsigned)?,
        })
    }

    /// Update number `step_index`, from 1, of `tensors`, whose lengths are those given to [`AdamW8bit::new`].
    pub fn step(
        &mut self,
        gpu: &Gpu,
        tensors: &[Tensor],
        rate: f64,
        options: &Options,
        step_index: u64,
    ) -> Result<(), Problem> {
        let (correction1, correction2) = options.corrections(step_index);
        let launch = self
            .states
            .launch(gpu, "adamw8_step", tensors)?
            .shared((self.signed.len() + self.unsigned.len()) * size_of::<f32>())
            .buffer(&self.signed)
            .buffer(&self.unsigned);
        let launch = options
            .decays(launch)
            .float((rate * correction2 / correction1) as f32)
            .float((correction2 * options.epsilon) as f32)
            .float(options.shrinks(rate));
        // SAFETY: tables, maps and scalars of `adamw8_step` in order; each row of the table has buffers of its
        // length, maxima per 256 elements where there are any, and pieces name rows there are.
        unsafe { launch.run() }
    }

    /// Bytes of the moments.
    pub fn bytes(&self) -> usize {
        self.states.bytes()
    }

    /// For each tensor in order the bytes of m and of v, f32; or of m's codes, its maxima (f32), v's codes and its
    /// maxima: the order of `train::Optimizer`'s states.
    pub fn states(&self) -> Result<Vec<Vec<u8>>, Problem> {
        self.states.states()
    }

    /// Takes what [`AdamW8bit::states`] gave, of this or another optimizer for tensors of the same lengths.
    pub fn restore(&mut self, states: &[Vec<u8>]) -> Result<(), Problem> {
        self.states.restore(states)
    }
}
