//! A place that computes nothing and counts the memory that a decoder takes, so that what is planned is what the one
//! forward pass, backward pass and step ask for. Beside their buffers only the scratch inside an operation is told here,
//! where the operation's code is not walked through.
//!
//! Bytes are of the place that is stood in for: activations of 4 bytes on the host and 2 on a device, where each buffer
//! takes a block of the pool.

use super::batch::{Batch, Extent};
use super::build::{Builds, Source};
use super::config::{Config, Heads};
use super::device::Cuda;
use super::place::{Inputs, Lora, Moment, Place, Places, Product};
use crate::cuda;
use crate::problem::Problem;
use crate::tensor::Dtype;
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::fmt;
use std::rc::Rc;

/// What takes memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Those that are not trained.
    Weights,
    /// Those that are.
    Trained,
    /// A sum for each trained value.
    Gradients,
    /// Moments of the optimizer.
    Optimizer,
    /// What the forward pass keeps for the backward pass.
    Activations,
    /// What one layer works with.
    Layer,
    /// What the head works with.
    Head,
    /// Keys and values of completions.
    Cache,
    /// The largest tensor between a file and its place.
    Reading,
    /// A ring of page-locked memory.
    Uploads,
    /// The region of captured steps.
    Graphs,
}

/// All parts, in the order of tables.
pub const PARTS: [Part; 11] = [
    Part::Weights,
    Part::Trained,
    Part::Gradients,
    Part::Optimizer,
    Part::Activations,
    Part::Layer,
    Part::Head,
    Part::Cache,
    Part::Reading,
    Part::Uploads,
    Part::Graphs,
];

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Weights => "weights",
            Part::Trained => "trained values",
            Part::Gradients => "gradients",
            Part::Optimizer => "optimizer states",
            Part::Activations => "kept activations",
            Part::Layer => "one layer's work",
            Part::Head => "head",
            Part::Cache => "keys and values",
            Part::Reading => "a tensor on its way",
            Part::Uploads => "small uploads",
            Part::Graphs => "captured steps",
        })
    }
}

/// Bytes of each part, in the order of [`PARTS`].
pub(super) type Bytes = [u128; PARTS.len()];

/// What is taken of one memory, and what it was when it was most.
pub(super) struct Meter {
    now: RefCell<Bytes>,
    most: RefCell<Bytes>,
    /// Buffers so far.
    buffers: Cell<u64>,
    /// Those of a layer before this one are kept ones.
    kept: Cell<u64>,
}

impl Meter {
    fn new() -> Rc<Meter> {
        let zero = || RefCell::new([0; PARTS.len()]);
        Rc::new(Meter { now: zero(), most: zero(), buffers: Cell::new(0), kept: Cell::new(0) })
    }

    fn take(&self, part: Part, bytes: u128) {
        let mut now = self.now.borrow_mut();
        now[part as usize] += bytes;
        let mut most = self.most.borrow_mut();
        if now.iter().sum::<u128>() > most.iter().sum() {
            *most = *now;
        }
    }

    fn give(&self, part: Part, bytes: u128) {
        self.now.borrow_mut()[part as usize] -= bytes;
    }

    /// What is left of layers is kept.
    fn keep(&self) {
        self.kept.set(self.buffers.get());
        let mut now = self.now.borrow_mut();
        now[Part::Activations as usize] += std::mem::take(&mut now[Part::Layer as usize]);
    }

    /// What is taken.
    pub fn now(&self) -> Bytes {
        *self.now.borrow()
    }

    /// What was taken when it was most, since the beginning or the last [`Meter::begin`].
    pub fn most(&self) -> Bytes {
        *self.most.borrow()
    }

    /// Forgets what was.
    pub fn begin(&self) {
        *self.most.borrow_mut() = self.now();
    }
}

/// A buffer that takes memory and holds nothing.
pub(super) struct Counted {
    len: usize,
    bytes: u128,
    part: Part,
    number: u64,
    meter: Rc<Meter>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let kept = self.part == Part::Layer && self.number < self.meter.kept.get();
        self.meter.give(if kept { Part::Activations } else { self.part }, self.bytes);
    }
}

/// The place that counts.
pub(super) struct Count {
    device: bool,
    /// Of frozen matrices on the host.
    dtype: Dtype,
    /// What new buffers belong to.
    part: Cell<Part>,
    /// The memory of the place.
    pub here: Rc<Meter>,
    /// That of the host beside a device.
    pub outside: Rc<Meter>,
}

/// As in `tensor::ops::head_logprob`: rows and entries of a tile.
const TILE_ROWS: usize = 512;
const TILE_VOCABULARY: usize = 2048;
/// As in `cuda::ops::head_logprob`: entries of a part of the forward pass, rows and entries at once in the backward pass.
const FORWARD_SPAN: usize = 1024;
const BACKWARD_ROWS: usize = 2048;
const BACKWARD_SPAN: usize = 8192;
/// As in `cuda::ops::rmsnorm`: blocks among which rows are divided.
const NORM_BLOCKS: usize = 512;
/// As in `cuda::ops::bias`: slices among which rows are divided.
const BIAS_SLICES: usize = 64;

impl Count {
    /// In place of a device, or of the host with frozen matrices of `dtype`.
    pub fn new(device: bool, dtype: Dtype) -> Count {
        Count { device, dtype, part: Cell::new(Part::Weights), here: Meter::new(), outside: Meter::new() }
    }

    /// What follows belongs to this part.
    pub fn part(&self, part: Part) {
        self.part.set(part);
    }

    /// Bytes that a buffer takes.
    pub fn block(&self, bytes: u128) -> u128 {
        match usize::try_from(bytes) {
            Ok(bytes) if self.device && bytes < 1 << 60 => cuda::block_bytes(bytes) as u128,
            _ => bytes,
        }
    }

    fn counted(&self, len: usize, bytes: u128, meter: &Rc<Meter>, part: Part) -> Counted {
        let number = meter.buffers.replace(meter.buffers.get() + 1);
        meter.take(part, bytes);
        Counted { len, bytes, part, number, meter: meter.clone() }
    }

    /// A buffer of `count` elements of `size` bytes.
    pub fn buffer(&self, count: usize, size: usize) -> Counted {
        self.counted(count, self.block(count as u128 * size as u128), &self.here, self.part.get())
    }

    /// Bytes that are taken to the end.
    pub fn takes(&self, part: Part, bytes: u128) {
        self.here.take(part, bytes);
    }

    /// Memory of the host, whoever computes.
    pub fn result(&self, part: Part, bytes: u128) -> Counted {
        self.counted(0, bytes, if self.device { &self.outside } else { &self.here }, part)
    }

    fn room(&self, len: usize) -> Counted {
        self.buffer(len, if self.device { 2 } else { 4 })
    }

    fn f32s(&self, len: usize) -> Counted {
        self.buffer(len, 4)
    }

    /// Bytes of a frozen matrix: on the host in panels of 32 outputs, pairs of inputs in bf16; see `tensor::Matrix`.
    fn matrix_bytes(&self, [out, input]: [usize; 2]) -> u128 {
        let (out, input) = (out as u128, input as u128);
        if self.device {
            return self.block(out * input * 2);
        }
        let steps = if self.dtype == Dtype::Bf16 { input.div_ceil(2) } else { input };
        out.next_multiple_of(32) * steps * 4
    }

    fn packed(&self, shape: [usize; 2], part: Part) -> Counted {
        self.counted(shape.iter().product(), self.matrix_bytes(shape), &self.here, part)
    }

    /// A tile of logits on the host.
    fn tile(&self, rows: usize, vocabulary: usize) -> Counted {
        self.f32s(rows.min(TILE_ROWS) * vocabulary.min(TILE_VOCABULARY))
    }
}

type Done<T = ()> = Result<T, Infallible>;

/// Operations that take no memory beside what they are given.
macro_rules! nothing {
    ($($name:ident($($argument:ident: $of:ty),*);)*) => {
        $(fn $name(&self, $($argument: $of),*) -> Done {
            Ok(())
        })*
    };
}

impl Place for Count {
    type Error = Infallible;
    type Values = Counted;
    type Floats = Counted;
    type Matrix = Counted;
    type Ids = Counted;
    type Starts = Counted;
    type Whole = Counted;
    type Angles = [Counted; 2];
    type Leaving = Counted;
    type Parked = Counted;
    type Arriving = Counted;

    fn values(&self, len: usize) -> Done<Counted> {
        Ok(self.room(len))
    }

    fn floats(&self, len: usize) -> Done<Counted> {
        Ok(self.f32s(len))
    }

    nothing! {
        embed(_y: &mut Counted, _table: &Counted, _ids: &Counted);
        embed_backward(_dw: &mut Counted, _dy: &Counted, _ids: &[u32]);
        rmsnorm(_y: &mut Counted, _rstd: &mut Counted, _x: &Counted, _weight: &Counted, _eps: f32);
        rope(_x: &mut Counted, _heads: usize, _angles: &[Counted; 2], _at: &Counted, _inverse: bool);
        attention(_y: &mut Counted, _lse: &mut Counted, _qkv: [&Counted; 3], _inputs: &Inputs<Count>, _heads: Heads);
        swiglu(_y: &mut Counted, _gate: &Counted, _up: &Counted);
        swiglu_backward(_dgate: &mut Counted, _dup: &mut Counted, _dy: &Counted, _gate: &Counted, _up: &Counted);
        add(_x: &mut Counted, _y: &Counted);
        gather(_y: &mut Counted, _x: &Counted, _rows: &Counted, _width: usize);
        scatter(_x: &mut Counted, _y: &Counted, _rows: &Counted, _width: usize);
        slopes(_inputs: &mut Inputs<Count>, _dlogprobs: &[f32]);
    }

    fn enters(&self, moment: Moment) {
        if moment != Moment::Back {
            self.here.keep();
        }
        self.part.set(if moment == Moment::Head { Part::Head } else { Part::Layer });
    }

    fn angles(&self, config: &Config, positions: usize) -> Done<[Counted; 2]> {
        let half = positions * (config.head_dim / 2);
        Ok([self.f32s(half), self.f32s(half)])
    }

    fn inputs(&self, batch: &Batch, angles: [Counted; 2]) -> Done<Inputs<Count>> {
        Ok(self.inputs_of(Extent::of(batch), angles))
    }

    fn ids(&self, ids: &[u32]) -> Done<Counted> {
        Ok(self.f32s(ids.len()))
    }

    fn wide(&self, _values: &Counted) -> Done<Vec<f32>> {
        Ok(Vec::new())
    }

    fn leave(&self, values: Counted) -> Done<Counted> {
        Ok(values)
    }

    fn leaving<'l>(&self, leaving: &'l Counted) -> &'l Counted {
        leaving
    }

    fn left(&self, leaving: Counted) -> Counted {
        if !self.device {
            return leaving;
        }
        self.counted(leaving.len, leaving.bytes, &self.outside, Part::Activations)
    }

    fn fetch(&self, parked: Counted) -> Done<Counted> {
        if !self.device {
            return Ok(parked);
        }
        Ok(self.counted(parked.len, parked.bytes, &self.here, Part::Activations))
    }

    fn arrived(&self, arriving: Counted) -> Counted {
        arriving
    }

    fn rmsnorm_backward(
        &self,
        _dx: &mut Counted,
        dw: Option<&mut Counted>,
        _dy: &Counted,
        x: &Counted,
        weight: &Counted,
        _rstd: &Counted,
        _add: bool,
    ) -> Done {
        if self.device && dw.is_some() {
            let rows = x.len / weight.len;
            self.f32s(rows.div_ceil(rows.div_ceil(NORM_BLOCKS).max(8)) * weight.len);
        }
        Ok(())
    }

    fn linears<const N: usize>(
        &self,
        _ys: [&mut Counted; N],
        _lows: [Option<&mut Counted>; N],
        _x: &Counted,
        _products: [Product<'_, Count>; N],
    ) -> Done {
        Ok(())
    }

    fn linears_of_step<const N: usize>(
        &self,
        ys: [&mut Counted; N],
        low: Option<&Counted>,
        x: &Counted,
        products: [Product<'_, Count>; N],
    ) -> Done {
        let mut each = ys.into_iter().zip(products);
        each.try_for_each(|(y, product)| self.linear_of_step(y, low, x, product, false))
    }

    fn linear_of_step(
        &self,
        y: &mut Counted,
        low: Option<&Counted>,
        x: &Counted,
        product: Product<'_, Count>,
        add: bool,
    ) -> Done {
        // The host sums beside y, and needs no room that stays.
        let whole = (add && !self.device).then(|| self.room(y.len));
        let rank = product.lora.map_or(0, |lora| lora.rank);
        let scratch = (rank > 0 && (low.is_none() || !self.device)).then(|| self.room(x.len / product.input * rank));
        drop((whole, scratch));
        Ok(())
    }

    fn linear_backward(
        &self,
        _sums: &mut [Counted],
        places: Places,
        _dx: Option<(&mut Counted, bool)>,
        dy: &Counted,
        _x: &Counted,
        _low: Option<&Counted>,
        product: Product<'_, Count>,
    ) -> Done {
        let Product { lora, out, input, .. } = product;
        let rows = dy.len / out;
        if self.device && places.bias.is_some() {
            self.f32s(rows.div_ceil(rows.div_ceil(BIAS_SLICES).max(BIAS_SLICES)) * out);
        }
        if let Some(Lora { rank, .. }) = lora {
            // The gradient of A x, and on a device parts of a factor's gradient.
            let dlow = self.room(rows * rank);
            let parts =
                if self.device { cuda::ops::lora_matmul::gradient_parts(rows) * rank * out.max(input) } else { 0 };
            drop((dlow, self.f32s(parts)));
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        _dqkv: [&mut Counted; 3],
        _dy: &Counted,
        _qkv: [&Counted; 3],
        _y: &Counted,
        lse: &Counted,
        _inputs: &Inputs<Count>,
        _heads: Heads,
    ) -> Done {
        if self.device {
            self.f32s(lse.len);
        }
        Ok(())
    }

    fn head(&self, normed: &Counted, _inputs: &Inputs<Count>, product: Product<'_, Count>) -> Done<[Counted; 2]> {
        let (rows, vocabulary) = (normed.len / product.input, product.out);
        let rank = product.lora.map_or(0, |lora| lora.rank);
        let results = [self.f32s(rows), self.f32s(rows)];
        if self.device {
            let low = (rank > 0).then(|| self.room(rows * rank.next_multiple_of(8)));
            let parts = self.f32s(rows * vocabulary.div_ceil(FORWARD_SPAN) * 3);
            drop((low, parts, self.f32s(rows)));
        } else {
            drop((self.tile(rows, vocabulary), self.f32s(rows.min(TILE_ROWS) * rank)));
        }
        Ok(results)
    }

    fn head_backward(
        &self,
        _sums: &mut [Counted],
        _places: Places,
        _dnormed: &mut Counted,
        normed: &Counted,
        _lse: &Counted,
        _inputs: &Inputs<Count>,
        product: Product<'_, Count>,
    ) -> Done {
        let (rows, vocabulary, hidden) = (normed.len / product.input, product.out, product.input);
        let rank = product.lora.map_or(0, |lora| lora.rank);
        if !self.device {
            drop((self.tile(rows, vocabulary), self.f32s(2 * rows.min(TILE_ROWS) * rank)));
            return Ok(());
        }
        let count = rows.min(BACKWARD_ROWS);
        let spans = (BACKWARD_ROWS / count.max(1)).clamp(1, vocabulary.div_ceil(BACKWARD_SPAN).max(1));
        let chunk = (spans * BACKWARD_SPAN).min(vocabulary);
        let slopes = self.room(count * chunk.next_multiple_of(8));
        // A sum and room for its parts.
        let sum = |columns: usize, parts: usize| {
            (self.f32s(count * columns), (parts > 0).then(|| self.f32s(parts * count * columns)))
        };
        let several = if spans > 1 { spans } else { 0 };
        if rank == 0 {
            drop((slopes, sum(hidden, several)));
        } else {
            let low = [0, 1].map(|_| self.room(count * rank.next_multiple_of(8)));
            drop((slopes, sum(hidden, several.max(1)), sum(rank, several), low));
        }
        Ok(())
    }
}

impl Count {
    /// What a batch of this extent gives.
    pub fn inputs_of(&self, extent: Extent, angles: [Counted; 2]) -> Inputs<Count> {
        let Extent { tokens, rows, sequences, longest } = extent;
        // On a device all of it lies in one buffer.
        let own = |count: usize, size: usize| match self.device {
            true => self.counted(count, 0, &self.here, self.part.get()),
            false => self.buffer(count, size),
        };
        Inputs {
            ids: own(tokens, 4),
            targets: own(rows, 4),
            rows: own(rows, 4),
            positions: own(tokens, 4),
            starts: own(sequences + 1, 8),
            slopes: own(rows, 4),
            longest,
            angles,
            whole: self.buffer(if self.device { Inputs::<Cuda>::len(extent) } else { 0 }, 4),
        }
    }
}

impl Builds for Count {
    fn factor(&self, len: usize) -> Option<Counted> {
        self.device.then(|| self.buffer(len, 2))
    }

    fn thaw(&self, matrix: Counted, [out, input]: [usize; 2]) -> (Counted, Counted) {
        let value = self.f32s(out * input);
        // What a device's products read is counted with the values.
        match self.device {
            true => (value, self.packed([out, input], Part::Trained)),
            false => (value, matrix),
        }
    }

    fn thaw_vector(&self, vector: Counted) -> Counted {
        self.f32s(vector.len)
    }
}

/// Gives the sizes of tensors.
pub(super) struct Sizes {
    /// A place that shares its meters with the decoder's.
    pub place: Count,
}

impl Source<Count> for Sizes {
    fn matrix(&mut self, _name: &str, shape: [usize; 2]) -> Result<Counted, Problem> {
        Ok(self.place.packed(shape, Part::Weights))
    }

    fn vector(&mut self, _name: &str, len: usize) -> Result<Counted, Problem> {
        Ok(self.place.buffer(len, 4))
    }
}

impl Clone for Count {
    fn clone(&self) -> Count {
        Count { part: self.part.clone(), here: self.here.clone(), outside: self.outside.clone(), ..*self }
    }
}
