//! The operations of a decoder on a CUDA device, launched.
//!
//! Weights, activations and the halves of an adapter are bf16, everything is accumulated in f32; norms, biases,
//! log-probs and gradients are f32. Trained values lie there in f32, those of products in bf16 beside that.

use super::batch::{Batch, Extent};
use super::config::{Config, Heads};
use super::decoder::{Decoder, Held, Layer, Linear};
use super::host::Host;
use super::parameter::{Gradients, Parameter};
use super::place::{Factor, Inputs, Lora, Place, Places, Product};
use crate::cuda::ops::adamw::Tensor;
use crate::cuda::ops::lora_matmul::{self, Dims, Rows};
use crate::cuda::ops::rope::Table;
use crate::cuda::ops::{attention, bias, cast, embedding, head_logprob, residual, rmsnorm, rope, swiglu};
use crate::cuda::{Arriving, Buffer, Gpu, Leaving, Parked, Region};
use crate::problem::Problem;
use crate::tensor::Matrix;
use half::bf16;
use std::sync::{Mutex, PoisonError};

/// A CUDA device.
pub struct Cuda {
    pub(super) gpu: Gpu,
    /// Angles of the longest sequence so far: they are many, and the same for every batch.
    table: Mutex<Option<Table>>,
}

impl Cuda {
    /// Computes on `gpu`.
    pub fn new(gpu: &Gpu) -> Cuda {
        Cuda { gpu: gpu.clone(), table: Mutex::new(None) }
    }

    fn matrix(&self, matrix: &Matrix) -> Result<Buffer<bf16>, Problem> {
        let values: Vec<bf16> = matrix.unpack().into_iter().map(bf16::from_f32).collect();
        self.gpu.upload(&values)
    }
}

impl Heads {
    pub(crate) fn on_device(self) -> attention::Dims {
        attention::Dims { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }
}

impl<'a> Factor<'a, Cuda> {
    fn read(&self) -> &'a Buffer<bf16> {
        self.copy.expect("a trained matrix has what products read")
    }
}

impl<'a> Product<'a, Cuda> {
    fn lora(&self) -> Option<lora_matmul::Lora<'a>> {
        let Lora { a, b, rank, scale } = self.lora?;
        Some(lora_matmul::Lora { a: a.read(), b: b.read(), rank, scale })
    }

    /// Of an x with this many elements.
    fn dims(&self, elements: usize) -> Dims {
        Dims { m: elements / self.input, n: self.out, k: self.input }
    }
}

impl Inputs<Cuda> {
    /// Where a section of `count` elements ends: the next begins where a buffer of its own might.
    fn padded(count: usize) -> usize {
        count.next_multiple_of(64)
    }

    /// Elements of all sections.
    pub(super) fn len(extent: Extent) -> usize {
        let [tokens, rows, starts] = [extent.tokens, extent.rows, extent.sequences + 1].map(Inputs::padded);
        2 * tokens + 3 * rows + starts
    }

    /// The sections of one buffer.
    pub(super) fn over(whole: Buffer<u32>, extent: Extent, angles: Table) -> Inputs<Cuda> {
        let Extent { tokens, rows, sequences, longest } = extent;
        let mut end = 0;
        let mut next = |count: usize| {
            let from = end * size_of::<u32>();
            end += Inputs::padded(count);
            from
        };
        Inputs {
            ids: whole.part(next(tokens), tokens),
            targets: whole.part(next(rows), rows),
            rows: whole.part(next(rows), rows),
            positions: whole.part(next(tokens), tokens),
            starts: whole.part(next(sequences + 1), sequences + 1),
            slopes: whole.part(next(rows), rows),
            longest,
            angles,
            whole,
        }
    }

    /// Uploads all of a batch in one piece.
    pub(super) fn write(&mut self, batch: &Batch) -> Result<(), Problem> {
        let mut all = Vec::with_capacity(self.whole.len());
        let mut section = |values: &mut dyn Iterator<Item = u32>| {
            all.extend(values);
            all.resize(Inputs::padded(all.len()), 0);
        };
        section(&mut batch.ids.iter().copied());
        // None, or one of each row.
        section(&mut batch.rows.iter().enumerate().map(|(i, _)| batch.targets.get(i).copied().unwrap_or(0)));
        section(&mut batch.rows.iter().map(|&row| row as u32));
        section(&mut batch.positions());
        section(&mut batch.starts().map(|start| start as u32));
        self.whole.part(0, all.len()).write(&all)
    }

    /// Without a hold on their place.
    pub(super) fn view(&self, region: &Region, extent: Extent) -> Inputs<Cuda> {
        Inputs::over(region.view(&self.whole), extent, self.angles.share())
    }
}

type Done<T = ()> = Result<T, Problem>;

impl Place for Cuda {
    type Error = Problem;
    type Values = Buffer<bf16>;
    type Floats = Buffer<f32>;
    type Matrix = Buffer<bf16>;
    type Ids = Buffer<u32>;
    type Starts = Buffer<i32>;
    type Whole = Buffer<u32>;
    type Angles = Table;
    type Leaving = Leaving<bf16>;
    type Parked = Parked<bf16>;
    type Arriving = Arriving<bf16>;

    fn values(&self, len: usize) -> Done<Buffer<bf16>> {
        self.gpu.alloc(len)
    }

    fn zeros(&self, len: usize) -> Done<Buffer<bf16>> {
        self.gpu.zeros(len)
    }

    fn floats(&self, len: usize) -> Done<Buffer<f32>> {
        self.gpu.alloc(len)
    }

    fn zero_floats(&self, len: usize) -> Done<Buffer<f32>> {
        self.gpu.zeros(len)
    }

    fn angles(&self, config: &Config, positions: usize) -> Done<Table> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = table.as_ref().filter(|there| there.positions() >= positions) {
            return Ok(there.share());
        }
        // What is captured keeps the angles it was captured with.
        Ok(table.insert(Table::upload(&self.gpu, positions, config.head_dim, config.rope_theta)?).share())
    }

    fn inputs(&self, batch: &Batch, angles: Table) -> Done<Inputs<Cuda>> {
        let extent = Extent::of(batch);
        let mut inputs = Inputs::over(self.gpu.alloc(Inputs::len(extent))?, extent, angles);
        inputs.write(batch)?;
        Ok(inputs)
    }

    fn ids(&self, ids: &[u32]) -> Done<Buffer<u32>> {
        self.gpu.upload(ids)
    }

    fn wide(&self, values: &Buffer<bf16>) -> Done<Vec<f32>> {
        Ok(values.download()?.into_iter().map(bf16::to_f32).collect())
    }

    fn slopes(&self, inputs: &mut Inputs<Cuda>, dlogprobs: &[f32]) -> Done {
        inputs.slopes.write(dlogprobs)
    }

    fn leave(&self, values: Buffer<bf16>) -> Done<Leaving<bf16>> {
        values.leave()
    }

    fn leaving<'l>(&self, leaving: &'l Leaving<bf16>) -> &'l Buffer<bf16> {
        leaving.buffer()
    }

    fn left(&self, leaving: Leaving<bf16>) -> Parked<bf16> {
        leaving.left()
    }

    fn fetch(&self, parked: Parked<bf16>) -> Done<Arriving<bf16>> {
        parked.fetch()
    }

    fn arrived(&self, arriving: Arriving<bf16>) -> Buffer<bf16> {
        arriving.arrived()
    }

    fn embed(&self, y: &mut Buffer<bf16>, table: &Buffer<bf16>, ids: &Buffer<u32>) -> Done {
        embedding::forward(y, table, ids)
    }

    fn embed_backward(&self, dw: &mut Buffer<f32>, dy: &Buffer<bf16>, ids: &[u32]) -> Done {
        embedding::backward(dw, dy, ids)
    }

    fn rmsnorm(
        &self,
        y: &mut Buffer<bf16>,
        rstd: &mut Buffer<f32>,
        x: &Buffer<bf16>,
        weight: &Buffer<f32>,
        eps: f32,
    ) -> Done {
        rmsnorm::forward(y, rstd, x, weight, eps)
    }

    fn rmsnorm_backward(
        &self,
        dx: &mut Buffer<bf16>,
        dw: Option<&mut Buffer<f32>>,
        dy: &Buffer<bf16>,
        x: &Buffer<bf16>,
        weight: &Buffer<f32>,
        rstd: &Buffer<f32>,
        add: bool,
    ) -> Done {
        rmsnorm::backward(dx, dw, dy, x, weight, rstd, add)
    }

    fn linears<const N: usize>(
        &self,
        ys: [&mut Buffer<bf16>; N],
        lows: [Option<&mut Buffer<bf16>>; N],
        x: &Buffer<bf16>,
        products: [Product<'_, Cuda>; N],
    ) -> Done {
        for ((y, low), product) in ys.into_iter().zip(lows).zip(products) {
            let (dims, lora) = (product.dims(x.len()), product.lora());
            lora_matmul::forward(y, low, x, product.weight, product.bias, lora, dims, Rows::Sequences, false)?;
        }
        Ok(())
    }

    fn linears_of_step<const N: usize>(
        &self,
        ys: [&mut Buffer<bf16>; N],
        low: Option<&Buffer<bf16>>,
        x: &Buffer<bf16>,
        products: [Product<'_, Cuda>; N],
    ) -> Done {
        let mut each = ys.into_iter().zip(products);
        each.try_for_each(|(y, product)| self.linear_of_step(y, low, x, product, false))
    }

    fn linear_of_step(
        &self,
        y: &mut Buffer<bf16>,
        low: Option<&Buffer<bf16>>,
        x: &Buffer<bf16>,
        product: Product<'_, Cuda>,
        add: bool,
    ) -> Done {
        let (dims, lora) = (product.dims(x.len()), product.lora());
        let mut low = low.zip(lora).map(|(low, lora)| low.part(0, dims.m * lora.rank));
        lora_matmul::forward(y, low.as_mut(), x, product.weight, product.bias, lora, dims, Rows::Steps, add)
    }

    fn linear_backward(
        &self,
        sums: &mut [Buffer<f32>],
        places: Places,
        dx: Option<(&mut Buffer<bf16>, bool)>,
        dy: &Buffer<bf16>,
        x: &Buffer<bf16>,
        low: Option<&Buffer<bf16>>,
        product: Product<'_, Cuda>,
    ) -> Done {
        let dims = product.dims(x.len());
        if let Some(at) = places.weight {
            lora_matmul::weight_gradient(&mut sums[at], dy, x, dims)?;
        }
        if let Some(at) = places.bias {
            bias::backward(&mut sums[at], dy)?;
        }
        let grads = places.pair(sums).map(|(da, db)| lora_matmul::Gradients { da, db });
        lora_matmul::backward(dx, grads, dy, x, low, product.weight, product.lora(), dims)
    }

    fn rope(&self, x: &mut Buffer<bf16>, heads: usize, angles: &Table, positions: &Buffer<u32>, inverse: bool) -> Done {
        rope::rotate(x, heads, angles, positions, inverse)
    }

    fn attention(
        &self,
        y: &mut Buffer<bf16>,
        lse: &mut Buffer<f32>,
        [q, k, v]: [&Buffer<bf16>; 3],
        inputs: &Inputs<Cuda>,
        heads: Heads,
    ) -> Done {
        attention::forward(y, lse, q, k, v, &inputs.starts, inputs.longest, heads.on_device())
    }

    fn attention_backward(
        &self,
        [dq, dk, dv]: [&mut Buffer<bf16>; 3],
        dy: &Buffer<bf16>,
        [q, k, v]: [&Buffer<bf16>; 3],
        y: &Buffer<bf16>,
        lse: &Buffer<f32>,
        inputs: &Inputs<Cuda>,
        heads: Heads,
    ) -> Done {
        let (starts, longest) = (&inputs.starts, inputs.longest);
        attention::backward(dq, dk, dv, dy, q, k, v, y, lse, starts, longest, heads.on_device())
    }

    fn swiglu(&self, y: &mut Buffer<bf16>, gate: &Buffer<bf16>, up: &Buffer<bf16>) -> Done {
        swiglu::forward(y, gate, up)
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Buffer<bf16>,
        dup: &mut Buffer<bf16>,
        dy: &Buffer<bf16>,
        gate: &Buffer<bf16>,
        up: &Buffer<bf16>,
    ) -> Done {
        swiglu::backward(dgate, dup, dy, gate, up)
    }

    fn add(&self, x: &mut Buffer<bf16>, y: &Buffer<bf16>) -> Done {
        residual::add(x, y)
    }

    fn gather(&self, y: &mut Buffer<bf16>, x: &Buffer<bf16>, rows: &Buffer<u32>, width: usize) -> Done {
        residual::gather_rows(y, x, rows, width)
    }

    fn scatter(&self, x: &mut Buffer<bf16>, y: &Buffer<bf16>, rows: &Buffer<u32>, width: usize) -> Done {
        residual::scatter_rows(x, y, rows, width)
    }

    fn head(&self, normed: &Buffer<bf16>, inputs: &Inputs<Cuda>, product: Product<'_, Cuda>) -> Done<[Buffer<f32>; 2]> {
        let (lora, targets, hidden) = (product.lora(), &inputs.targets, product.input);
        let head = head_logprob::forward(normed, product.weight, lora, targets, hidden, false, 0)?;
        Ok([head.logprob, head.lse])
    }

    fn head_backward(
        &self,
        sums: &mut [Buffer<f32>],
        places: Places,
        dnormed: &mut Buffer<bf16>,
        normed: &Buffer<bf16>,
        lse: &Buffer<f32>,
        inputs: &Inputs<Cuda>,
        product: Product<'_, Cuda>,
    ) -> Done {
        let wanted = match (places.lora, places.weight) {
            (None, Some(at)) => head_logprob::Gradients { lora: None, weight: Some(&mut sums[at]) },
            _ => head_logprob::Gradients { lora: places.pair(sums), weight: None },
        };
        let (weight, lora, hidden) = (product.weight, product.lora(), product.input);
        head_logprob::backward(dnormed, wanted, &inputs.slopes, normed, weight, lora, &inputs.targets, lse, hidden)
    }
}

impl Decoder<Cuda> {
    /// Moves a model to `gpu`, tensor by tensor: what has arrived is given back on the host. `Err` (exit 3) if no kernel
    /// fits its shape, or if there is not the memory.
    pub fn moved(model: Decoder<Host>, gpu: &Gpu) -> Result<Decoder<Cuda>, Problem> {
        model.config.heads().on_device().check()?;
        let place = Cuda::new(gpu);
        let Decoder { config, embed, layers, norm, head, params, trained, adapter_on, copies, .. } = model;
        // Made again from the values.
        drop(copies);
        let (params, copies) = params.into_iter().map(|param| place.trained(param)).collect::<Result<_, _>>()?;
        let embed = place.held(embed, |matrix| place.matrix(&matrix))?;
        let layers = layers.into_iter().map(|layer| place.layer(layer)).collect::<Result<_, _>>()?;
        let (norm, head) = (place.held(norm, |values| gpu.upload(&values))?, place.linear(head)?);
        Ok(Decoder { config, embed, layers, norm, head, params, copies, trained, adapter_on, place })
    }

    /// The trained values, for the host.
    pub fn fetch(&self) -> Result<Vec<Parameter>, Problem> {
        let fetch = |Parameter { name, shape, value }: &Parameter<Buffer<f32>>| {
            Ok(Parameter { name: name.clone(), shape: shape.clone(), value: value.download()? })
        };
        self.params.iter().map(fetch).collect()
    }

    /// Takes trained values from the host.
    pub fn renew(&mut self, params: &[Parameter]) -> Result<(), Problem> {
        for ((there, copy), param) in self.params.iter_mut().zip(&mut self.copies).zip(params) {
            there.value.write(&param.value)?;
            copy.as_mut().map_or(Ok(()), |copy| cast::to_bf16(copy, &there.value))?;
        }
        Ok(())
    }

    /// The trained tensors as an optimizer takes them.
    pub fn tensors<'t>(&'t self, grads: &'t Gradients<Buffer<f32>>) -> Vec<Tensor<'t>> {
        let tensors = self.params.iter().zip(&self.copies).zip(&grads.values);
        tensors
            .map(|((param, copy), grad)| Tensor {
                param: &param.value,
                grad,
                copy: copy.as_ref(),
                decays: param.decays(),
            })
            .collect()
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.place.gpu
    }
}

/// A trained tensor and, of a matrix, what products read.
type TrainedTensor = (Parameter<Buffer<f32>>, Option<Buffer<bf16>>);

impl Cuda {
    fn trained(&self, param: Parameter) -> Result<TrainedTensor, Problem> {
        let value = self.gpu.upload(&param.value)?;
        let mut copy = (param.shape.len() > 1).then(|| self.gpu.alloc(value.len())).transpose()?;
        if let Some(copy) = &mut copy {
            cast::to_bf16(copy, &value)?;
        }
        Ok((Parameter { name: param.name, shape: param.shape, value }, copy))
    }

    fn held<T, U>(&self, held: Held<T>, upload: impl FnOnce(T) -> Result<U, Problem>) -> Result<Held<U>, Problem> {
        Ok(match held {
            Held::Frozen(there) => Held::Frozen(upload(there)?),
            Held::Trained(at) => Held::Trained(at),
        })
    }

    fn linear(&self, linear: Linear<Host>) -> Result<Linear<Cuda>, Problem> {
        let Linear { name, shape, weight, bias, lora } = linear;
        let weight = weight.map(|weight| self.held(weight, |matrix| self.matrix(&matrix))).transpose()?;
        let bias = bias.map(|bias| self.held(bias, |values| self.gpu.upload(&values))).transpose()?;
        Ok(Linear { name, shape, weight, bias, lora })
    }

    fn layer(&self, layer: Layer<Host>) -> Result<Layer<Cuda>, Problem> {
        let [first, second] = layer.norms;
        let norm = |norm| self.held(norm, |values: Vec<f32>| self.gpu.upload(&values));
        let norms = [norm(first)?, norm(second)?];
        let linears = layer.linears.into_iter().map(|linear| self.linear(linear)).collect::<Result<Vec<_>, _>>()?;
        Ok(Layer { norms, linears: linears.try_into().unwrap_or_else(|_| unreachable!("as many as there were")) })
    }
}
