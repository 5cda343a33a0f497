//! The model on a CUDA device: the steps of `qwen2.rs`, launched instead of computed.
//!
//! Weights, activations and the halves of the adapter are bf16, everything is accumulated in f32; norms,
//! biases, log-probs and gradients are f32. Trained values lie here in f32, those of products in bf16 beside
//! that; an optimizer updates both, and the host asks for them when it has something to write.
//!
//! Shapes: T tokens of all sequences, R rows, H hidden, V vocabulary.

use super::Parameter;
use super::device_decode::StepRows;
use super::device_step::{Inputs, Steps};
use super::qwen2::{Batch, DOWN, GATE, K, Layer, Linear, LoraSlot, Model, O, Q, Recompute, UP, V};
use crate::cuda::ops::adamw::Tensor;
use crate::cuda::ops::lora_matmul::{self, Dims, Rows};
use crate::cuda::ops::rope::Table;
use crate::cuda::ops::{attention, bias, cast, embedding, head_logprob, residual, rmsnorm, rope, swiglu};
use crate::cuda::{Arriving, Buffer, Gpu, Parked};
use crate::problem::Problem;
use crate::tensor::Matrix;
use bytemuck::Pod;
use half::bf16;
use std::sync::{Mutex, PoisonError};

/// What of a model lies on the device.
pub struct DeviceModel {
    gpu: Gpu,
    embed: Held<bf16>,
    layers: Vec<DeviceLayer>,
    norm: Held<f32>,
    /// Absent where the head is the embedding.
    head: Option<Held<bf16>>,
    /// The model's trained tensors, in their order.
    trained: Vec<TrainedTensor>,
    /// Angles of the longest sequence so far: they are many, and the same for every batch.
    table: Mutex<Option<Table>>,
    /// Training steps that are captured.
    pub(super) steps: Steps,
}

struct DeviceLayer {
    norm1: Held<f32>,
    norm2: Held<f32>,
    /// In the order of `lora::TARGETS`.
    weights: [Held<bf16>; 7],
    biases: [Option<Held<f32>>; 7],
}

/// What is computed with: memory of its own, or that of the trained tensor in this place.
enum Held<T: Pod> {
    Frozen(Buffer<T>),
    Trained(usize),
}

struct TrainedTensor {
    value: Buffer<f32>,
    /// `value` in bf16, of a matrix.
    copy: Option<Buffer<bf16>>,
    decays: bool,
}

/// One sum of gradients per trained tensor.
pub struct DeviceGradients {
    pub sums: Vec<Buffer<f32>>,
}

/// What the way there leaves on the device for the way back.
pub(super) struct Walk {
    pub inputs: Inputs,
    sequences: DeviceSequences,
    /// From the first trained layer on.
    layers: Vec<DeviceLayerTape>,
    selected: Buffer<bf16>,
    normed: Buffer<bf16>,
    rstd: Buffer<f32>,
    lse: Buffer<f32>,
}

struct DeviceLayerTape {
    input: Input,
    /// Absent where it is computed again.
    saved: Option<Saved>,
}

/// The input of a layer between the way there and the way back.
enum Input {
    Here(Buffer<bf16>),
    Parked(Parked<bf16>),
    Arriving(Arriving<bf16>),
}

impl Input {
    /// On its way here, if it is not here.
    fn start(self) -> Result<Input, Problem> {
        Ok(match self {
            Input::Parked(parked) => Input::Arriving(parked.fetch()?),
            there => there,
        })
    }

    fn here(self) -> Result<Buffer<bf16>, Problem> {
        match self {
            Input::Here(buffer) => Ok(buffer),
            Input::Parked(parked) => Ok(parked.fetch()?.arrived()),
            Input::Arriving(arriving) => Ok(arriving.arrived()),
        }
    }
}

/// Starts to bring the input of the layer that is walked back next.
fn start_next(layers: &mut Vec<DeviceLayerTape>) -> Result<(), Problem> {
    if let Some(DeviceLayerTape { input, saved }) = layers.pop() {
        layers.push(DeviceLayerTape { input: input.start()?, saved });
    }
    Ok(())
}

/// The insides of one layer.
struct Saved {
    rstd1: Buffer<f32>,
    norm1: Buffer<bf16>,
    q: Buffer<bf16>,
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    attended: Buffer<bf16>,
    lse: Buffer<f32>,
    middle: Buffer<bf16>,
    rstd2: Buffer<f32>,
    norm2: Buffer<bf16>,
    gate: Buffer<bf16>,
    up: Buffer<bf16>,
    gated: Buffer<bf16>,
    /// A x of each linear's adapter.
    low: [Option<Buffer<bf16>>; 7],
}

/// The part of [`Saved`] behind attention.
struct AfterAttention {
    middle: Buffer<bf16>,
    rstd2: Buffer<f32>,
    norm2: Buffer<bf16>,
    gate: Buffer<bf16>,
    up: Buffer<bf16>,
    gated: Buffer<bf16>,
    /// Of o, gate, up and down.
    low: [Option<Buffer<bf16>>; 4],
}

/// Where sequences begin, and the angles of their positions.
struct DeviceSequences {
    cu_seqlens: Buffer<i32>,
    longest: usize,
    positions: Buffer<u32>,
    table: Table,
}

/// Takes a layer's keys and values.
pub(super) type Keep<'k> = dyn FnMut(usize, &Buffer<bf16>, &Buffer<bf16>) -> Result<(), Problem> + 'k;

/// Keeps the keys and values of a layer's rows and attends.
pub(super) type Attend<'a> = dyn FnMut(usize, &mut StepRows) -> Result<(), Problem> + 'a;

/// Is shown a residual stream.
type Seen<'s> = dyn FnMut(&Buffer<bf16>) -> Result<(), Problem> + 's;

/// What a linear layer gives, and A x if it has an adapter.
type Adapted = (Buffer<bf16>, Option<Buffer<bf16>>);

impl DeviceModel {
    /// Copies a model to `gpu`. `Err` (exit 3) if no kernel fits its shape.
    pub fn upload(gpu: &Gpu, model: &Model) -> Result<DeviceModel, Problem> {
        attention_dims(model).check()?;
        let trained = model.params().iter().map(|param| TrainedTensor::upload(gpu, param)).collect::<Result<_, _>>()?;
        let layers = model.layers.iter().map(|layer| DeviceLayer::upload(gpu, layer)).collect::<Result<_, _>>()?;
        let head = model.head.weight.as_ref().map(|weight| Held::matrix(gpu, weight, model.head.trained));
        Ok(DeviceModel {
            gpu: gpu.clone(),
            embed: Held::matrix(gpu, &model.embed, model.embed_trained)?,
            layers,
            norm: Held::vector(gpu, &model.norm, model.norm_trained)?,
            head: head.transpose()?,
            trained,
            table: Mutex::new(None),
            steps: Steps::default(),
        })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Takes the trained values from the host.
    pub fn renew(&mut self, params: &[Parameter]) -> Result<(), Problem> {
        self.trained.iter_mut().zip(params).try_for_each(|(tensor, param)| tensor.renew(param))
    }

    /// Gives the trained values to the host.
    pub fn fetch(&self, params: &mut [Parameter]) -> Result<(), Problem> {
        for (tensor, param) in self.trained.iter().zip(params) {
            tensor.value.download_to(&mut param.value)?;
        }
        Ok(())
    }

    /// The trained tensors as an optimizer takes them.
    pub fn tensors<'t>(&'t self, grads: &'t DeviceGradients) -> Vec<Tensor<'t>> {
        let pairs = self.trained.iter().zip(&grads.sums);
        pairs
            .map(|(tensor, grad)| Tensor {
                param: &tensor.value,
                grad,
                copy: tensor.copy.as_ref(),
                decays: tensor.decays,
            })
            .collect()
    }

    /// Zeros for every trained tensor.
    pub fn zero_gradients(&self) -> Result<DeviceGradients, Problem> {
        let sums = self.trained.iter().map(|tensor| self.gpu.zeros(tensor.value.len()));
        Ok(DeviceGradients { sums: sums.collect::<Result<_, _>>()? })
    }

    /// The launches of the way there: log-probs of the targets, and what [`DeviceModel::way_back`] needs.
    pub(super) fn way_there(
        &self,
        model: &Model,
        inputs: Inputs,
        longest: usize,
        table: Table,
        recompute: Recompute,
    ) -> Result<(Buffer<f32>, Walk), Problem> {
        let first = model.first_trained_layer();
        let (cu_seqlens, positions) = (inputs.cu_seqlens.share(), inputs.positions.share());
        let sequences = DeviceSequences { cu_seqlens, longest, positions, table };
        let mut layers = Vec::new();
        let mut x = self.embed(model, &inputs.ids)?;
        for (i, layer) in model.layers.iter().enumerate() {
            let device = &self.layers[i];
            if i < first {
                x = self.layer_forward(model, layer, device, &x, &sequences)?.0;
                continue;
            }
            let (y, saved, input);
            if model.offload {
                // The copy runs beside the layer that reads the same.
                let leaving = x.leave()?;
                (y, saved) = self.layer_forward(model, layer, device, leaving.buffer(), &sequences)?;
                input = Input::Parked(leaving.left());
            } else {
                (y, saved) = self.layer_forward(model, layer, device, &x, &sequences)?;
                input = Input::Here(x);
            }
            layers.push(DeviceLayerTape { input, saved: (!recompute.of(i)).then_some(saved) });
            x = y;
        }
        let mut selected = self.gpu.alloc(inputs.rows.len() * model.config.hidden_size)?;
        residual::gather_rows(&mut selected, &x, &inputs.rows, model.config.hidden_size)?;
        drop(x);
        let (normed, rstd) = self.norm(&selected, &self.norm, model)?;
        let (lora, hidden) = (self.head_lora(model), model.config.hidden_size);
        let head = head_logprob::forward(&normed, self.head(), lora, &inputs.targets, hidden, false, 0)?;
        Ok((head.logprob, Walk { inputs, sequences, layers, selected, normed, rstd, lse: head.lse }))
    }

    /// Log-probs of the batch's targets, keeping nothing.
    pub fn logprobs(&self, model: &Model, batch: &Batch) -> Result<Vec<f32>, Problem> {
        let sequences = self.sequences(model, batch)?;
        let mut x = self.embed(model, &self.gpu.upload(batch.ids)?)?;
        for (i, layer) in model.layers.iter().enumerate() {
            x = self.layer_forward(model, layer, &self.layers[i], &x, &sequences)?.0;
        }
        let rows = self.gpu.upload(&batch.rows.iter().map(|&row| row as u32).collect::<Vec<_>>())?;
        let targets = self.gpu.upload(batch.targets)?;
        let mut selected = self.gpu.alloc(batch.rows.len() * model.config.hidden_size)?;
        residual::gather_rows(&mut selected, &x, &rows, model.config.hidden_size)?;
        let (normed, _) = self.norm(&selected, &self.norm, model)?;
        let lora = self.head_lora(model);
        head_logprob::forward(&normed, self.head(), lora, &targets, model.config.hidden_size, false, 0)?
            .logprob
            .download()
    }

    pub(super) fn check_gradients(&self, model: &Model, grads: &DeviceGradients) {
        assert_eq!(grads.sums.len(), self.trained.len(), "gradients of other parameters");
        assert!(model.adapter_on, "the adapter was off");
    }

    /// The launches of the way back: adds to `sums` the gradient of the log-probs' sum with the slopes that the inputs
    /// hold. Returns the gradient of what was embedded, if that is trained: which rows of the table it belongs to is no
    /// matter of shapes, so the rest is [`DeviceModel::embed_backward`]'s.
    pub(super) fn way_back(
        &self,
        model: &Model,
        walk: Walk,
        sums: &mut [Buffer<f32>],
    ) -> Result<Option<Buffer<bf16>>, Problem> {
        let Walk { inputs, sequences, mut layers, selected, normed, rstd, lse } = walk;
        let Inputs { rows, targets, slopes, .. } = &inputs;
        let hidden = model.config.hidden_size;
        let first = model.first_trained_layer();
        start_next(&mut layers)?;

        let mut dnormed = self.gpu.alloc(normed.len())?;
        let wanted = match model.head.lora {
            Some(_) => head_logprob::Gradients { lora: pair(sums, model.head.lora), weight: None },
            // A tied head adds to the gradient of the embedding.
            None => {
                let weight = self.head.as_ref().unwrap_or(&self.embed).place();
                head_logprob::Gradients { lora: None, weight: weight.map(|at| &mut sums[at]) }
            }
        };
        let lora = self.head_lora(model);
        head_logprob::backward(&mut dnormed, wanted, slopes, &normed, self.head(), lora, targets, &lse, hidden)?;
        if first >= self.layers.len() && self.norm.place().is_none() {
            return Ok(None);
        }
        let mut dselected = self.gpu.alloc(selected.len())?;
        self.norm_backward(&mut dselected, &self.norm, &dnormed, &selected, &rstd, false, sums)?;
        let mut dx = self.gpu.zeros(inputs.ids.len() * hidden)?;
        residual::scatter_rows(&mut dx, &dselected, rows, hidden)?;
        for i in (first..self.layers.len()).rev() {
            let DeviceLayerTape { input, saved } = layers.pop().expect("one tape per layer");
            let input = input.here()?;
            start_next(&mut layers)?;
            let (layer, device) = (&model.layers[i], &self.layers[i]);
            let saved = match saved {
                Some(saved) => saved,
                None => self.layer_forward(model, layer, device, &input, &sequences)?.1,
            };
            let below = i > first || self.embed.place().is_some();
            self.layer_backward(model, layer, device, &mut dx, below, &input, saved, &sequences, sums)?;
        }
        Ok(self.embed.place().map(|_| dx))
    }

    /// Adds the gradient of what was embedded to that of the table.
    pub(super) fn embed_backward(
        &self,
        dx: &Buffer<bf16>,
        ids: &[u32],
        sums: &mut [Buffer<f32>],
    ) -> Result<(), Problem> {
        self.embed.place().map_or(Ok(()), |at| embedding::backward(&mut sums[at], dx, ids))
    }

    /// Runs packed prompts, handing every layer's keys and values to `keep`. Returns the logits after each,
    /// `[prompts, V]`.
    pub(super) fn run_prompts(
        &self,
        model: &Model,
        prompts: &[&[u32]],
        table: &Table,
        keep: &mut Keep,
    ) -> Result<Buffer<bf16>, Problem> {
        let lengths = || prompts.iter().map(|ids| ids.len());
        let ends = || lengths().scan(0, |end, length| (*end += length as u32, Some(*end)).1);
        let positions: Vec<u32> = lengths().flat_map(|length| 0..length as u32).collect();
        let sequences = DeviceSequences {
            cu_seqlens: self.gpu.upload(&std::iter::once(0).chain(ends().map(|end| end as i32)).collect::<Vec<_>>())?,
            longest: lengths().max().unwrap_or(0),
            positions: self.gpu.upload(&positions)?,
            table: table.share(),
        };
        let mut x = self.embed(model, &self.gpu.upload(&prompts.concat())?)?;
        for (i, layer) in model.layers.iter().enumerate() {
            let (y, saved) = self.layer_forward(model, layer, &self.layers[i], &x, &sequences)?;
            keep(i, &saved.k, &saved.v)?;
            x = y;
        }
        let rows = self.gpu.upload(&ends().map(|end| end - 1).collect::<Vec<_>>())?;
        self.logits(model, &x, &rows)
    }

    /// Runs one token of each row, `rows.ids`, to its logits. Nothing is allocated and nothing copied, so that it
    /// can be captured; `attend` takes care of that too.
    pub(super) fn run_tokens(
        &self,
        model: &Model,
        rows: &mut StepRows,
        table: &Table,
        attend: &mut Attend,
    ) -> Result<(), Problem> {
        let config = &model.config;
        let eps = config.rms_norm_eps;
        embedding::forward(&mut rows.x, self.matrix(&self.embed), &rows.ids)?;
        for (i, layer) in model.layers.iter().enumerate() {
            let device = &self.layers[i];
            let linear = |which: usize, y: &mut Buffer<bf16>, x: &Buffer<bf16>, low: &Buffer<bf16>, add: bool| {
                let linear = &layer.linears[which];
                let (dims, lora) = (dims(linear, x.len()), self.lora(model, linear.lora));
                let mut low = lora.as_ref().map(|lora| low.part(0, dims.m * lora.rank));
                let weight = self.matrix(&device.weights[which]);
                let bias = device.biases[which].as_ref().map(|bias| self.vector(bias));
                lora_matmul::forward(y, low.as_mut(), x, weight, bias, lora, dims, Rows::Steps, add)
            };
            rmsnorm::forward(&mut rows.norm, &mut rows.rstd, &rows.x, self.vector(&device.norm1), eps)?;
            linear(Q, &mut rows.q, &rows.norm, &rows.low, false)?;
            linear(K, &mut rows.k, &rows.norm, &rows.low, false)?;
            linear(V, &mut rows.v, &rows.norm, &rows.low, false)?;
            rope::rotate(&mut rows.q, config.num_attention_heads, table, &rows.positions, false)?;
            rope::rotate(&mut rows.k, config.num_key_value_heads, table, &rows.positions, false)?;
            attend(i, rows)?;
            linear(O, &mut rows.x, &rows.attended, &rows.low, true)?;
            rmsnorm::forward(&mut rows.norm, &mut rows.rstd, &rows.x, self.vector(&device.norm2), eps)?;
            linear(GATE, &mut rows.gate, &rows.norm, &rows.low, false)?;
            linear(UP, &mut rows.up, &rows.norm, &rows.low, false)?;
            swiglu::forward(&mut rows.gated, &rows.gate, &rows.up)?;
            linear(DOWN, &mut rows.x, &rows.gated, &rows.low, true)?;
        }
        rmsnorm::forward(&mut rows.norm, &mut rows.rstd, &rows.x, self.vector(&self.norm), eps)?;
        let dims = Dims { m: rows.ids.len(), n: config.vocab_size, k: config.hidden_size };
        let lora = self.head_lora(model);
        let mut low = lora.as_ref().map(|lora| rows.low.part(0, dims.m * lora.rank));
        let (logits, norm, head) = (&mut rows.logits, &rows.norm, self.head());
        lora_matmul::forward(logits, low.as_mut(), norm, head, None, lora, dims, Rows::Steps, false)
    }

    /// The logits of every token of one sequence, `[T, V]`, a tile of tokens at a time.
    pub fn sequence_logits(&self, model: &Model, ids: &[u32]) -> Result<Vec<f32>, Problem> {
        const TILE: usize = 256;
        let x = self.stream(model, ids, &mut |_| Ok(()))?;
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        let mut all = Vec::with_capacity(ids.len() * model.config.vocab_size);
        for rows in rows.chunks(TILE) {
            let logits = self.logits(model, &x, &self.gpu.upload(rows)?)?;
            all.extend(logits.download()?.into_iter().map(bf16::to_f32));
        }
        Ok(all)
    }

    /// The residual stream of one sequence as embedded, after each layer, and after the final norm.
    pub fn hidden_states(&self, model: &Model, ids: &[u32]) -> Result<Vec<Vec<f32>>, Problem> {
        let wide = |x: &Buffer<bf16>| Ok(x.download()?.into_iter().map(bf16::to_f32).collect::<Vec<f32>>());
        let mut states = Vec::new();
        let x = self.stream(model, ids, &mut |x| {
            states.push(wide(x)?);
            Ok(())
        })?;
        states.push(wide(&self.norm(&x, &self.norm, model)?.0)?);
        Ok(states)
    }

    /// The residual stream of one sequence behind the last layer; `seen` is shown it as embedded and after each.
    fn stream(&self, model: &Model, ids: &[u32], seen: &mut Seen) -> Result<Buffer<bf16>, Problem> {
        let sequences = self.sequences(model, &Batch { ids, lengths: &[ids.len()], rows: &[], targets: &[] })?;
        let mut x = self.embed(model, &self.gpu.upload(ids)?)?;
        seen(&x)?;
        for (layer, device) in model.layers.iter().zip(&self.layers) {
            x = self.layer_forward(model, layer, device, &x, &sequences)?.0;
            seen(&x)?;
        }
        Ok(x)
    }

    /// `[rows, V]` of some rows of the residual stream.
    fn logits(&self, model: &Model, x: &Buffer<bf16>, rows: &Buffer<u32>) -> Result<Buffer<bf16>, Problem> {
        let hidden = model.config.hidden_size;
        let mut selected = self.gpu.alloc(rows.len() * hidden)?;
        residual::gather_rows(&mut selected, x, rows, hidden)?;
        let (normed, _) = self.norm(&selected, &self.norm, model)?;
        let dims = Dims { m: rows.len(), n: model.config.vocab_size, k: hidden };
        let mut logits = self.gpu.alloc(dims.m * dims.n)?;
        let (head, lora) = (self.head(), self.head_lora(model));
        lora_matmul::forward(&mut logits, None, &normed, head, None, lora, dims, Rows::Steps, false)?;
        Ok(logits)
    }

    fn sequences(&self, model: &Model, batch: &Batch) -> Result<DeviceSequences, Problem> {
        assert_eq!(batch.lengths.iter().sum::<usize>(), batch.ids.len(), "lengths of a batch");
        assert_eq!(batch.rows.len(), batch.targets.len(), "rows and targets of a batch");
        let mut cu_seqlens = vec![0i32];
        let mut positions = Vec::with_capacity(batch.ids.len());
        for &length in batch.lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length as i32);
            positions.extend(0..length as u32);
        }
        let longest = batch.lengths.iter().copied().max().unwrap_or(0);
        Ok(DeviceSequences {
            cu_seqlens: self.gpu.upload(&cu_seqlens)?,
            longest,
            positions: self.gpu.upload(&positions)?,
            table: self.table(model, longest)?,
        })
    }

    /// The angles of at least so many positions.
    pub(super) fn table(&self, model: &Model, positions: usize) -> Result<Table, Problem> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = table.as_ref().filter(|there| there.positions() >= positions) {
            return Ok(there.share());
        }
        // What is captured keeps the angles it was captured with.
        self.steps.forget();
        let (head_dim, theta) = (model.config.head_dim, model.config.rope_theta);
        Ok(table.insert(Table::upload(&self.gpu, positions, head_dim, theta)?).share())
    }

    /// `[T, H]`
    fn embed(&self, model: &Model, ids: &Buffer<u32>) -> Result<Buffer<bf16>, Problem> {
        let mut x = self.gpu.alloc(ids.len() * model.config.hidden_size)?;
        embedding::forward(&mut x, self.matrix(&self.embed), ids)?;
        Ok(x)
    }

    fn norm(
        &self,
        x: &Buffer<bf16>,
        weight: &Held<f32>,
        model: &Model,
    ) -> Result<(Buffer<bf16>, Buffer<f32>), Problem> {
        let weight = self.vector(weight);
        let (mut y, mut rstd) = (self.gpu.alloc(x.len())?, self.gpu.alloc(x.len() / weight.len())?);
        rmsnorm::forward(&mut y, &mut rstd, x, weight, model.config.rms_norm_eps)?;
        Ok((y, rstd))
    }

    /// Adds the gradient of a norm's input to `dx`, or with `add` off writes it, and that of its weight to `sums`
    /// if it is trained.
    #[expect(clippy::too_many_arguments, reason = "the operands of the op and the place of the weight")]
    fn norm_backward(
        &self,
        dx: &mut Buffer<bf16>,
        weight: &Held<f32>,
        dy: &Buffer<bf16>,
        x: &Buffer<bf16>,
        rstd: &Buffer<f32>,
        add: bool,
        sums: &mut [Buffer<f32>],
    ) -> Result<(), Problem> {
        let dw = weight.place().map(|at| &mut sums[at]);
        rmsnorm::backward(dx, dw, dy, x, self.vector(weight), rstd, add)
    }

    fn matrix<'h>(&'h self, held: &'h Held<bf16>) -> &'h Buffer<bf16> {
        match held {
            Held::Frozen(buffer) => buffer,
            Held::Trained(at) => self.trained[*at].copy(),
        }
    }

    fn vector<'h>(&'h self, held: &'h Held<f32>) -> &'h Buffer<f32> {
        match held {
            Held::Frozen(buffer) => buffer,
            Held::Trained(at) => &self.trained[*at].value,
        }
    }

    fn head(&self) -> &Buffer<bf16> {
        self.matrix(self.head.as_ref().unwrap_or(&self.embed))
    }

    /// The active adapter in a linear's place.
    fn lora(&self, model: &Model, slot: Option<LoraSlot>) -> Option<lora_matmul::Lora<'_>> {
        let LoraSlot { at, rank, scale } = slot.filter(|_| model.adapter_on)?;
        Some(lora_matmul::Lora { a: self.trained[at].copy(), b: self.trained[at + 1].copy(), rank, scale })
    }

    fn head_lora(&self, model: &Model) -> Option<lora_matmul::Lora<'_>> {
        self.lora(model, model.head.lora)
    }

    /// `y = W x + b + scale B A x` of linear `which`, and A x if there is an adapter.
    fn linear(
        &self,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        which: usize,
        x: &Buffer<bf16>,
    ) -> Result<Adapted, Problem> {
        let linear = &layer.linears[which];
        let mut y = self.gpu.alloc(dims(linear, x.len()).m * linear.shape[0])?;
        let low = self.linear_into(&mut y, model, layer, device, which, x)?;
        Ok((y, low))
    }

    /// The same, where there is room for y.
    fn linear_into(
        &self,
        y: &mut Buffer<bf16>,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        which: usize,
        x: &Buffer<bf16>,
    ) -> Result<Option<Buffer<bf16>>, Problem> {
        let linear = &layer.linears[which];
        let dims = dims(linear, x.len());
        let lora = self.lora(model, linear.lora);
        let mut low = lora.as_ref().map(|lora| self.gpu.alloc(dims.m * lora.rank)).transpose()?;
        let bias = device.biases[which].as_ref().map(|bias| self.vector(bias));
        let weight = self.matrix(&device.weights[which]);
        lora_matmul::forward(y, low.as_mut(), x, weight, bias, lora, dims, Rows::Sequences, false)?;
        Ok(low)
    }

    /// q, k and v of normed rows, q and k turned by their positions, each with A x of its adapter.
    fn project(
        &self,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        norm: &Buffer<bf16>,
        table: &Table,
        positions: &Buffer<u32>,
    ) -> Result<[Adapted; 3], Problem> {
        let mut q = self.linear(model, layer, device, Q, norm)?;
        let mut k = self.linear(model, layer, device, K, norm)?;
        let v = self.linear(model, layer, device, V, norm)?;
        rope::rotate(&mut q.0, model.config.num_attention_heads, table, positions, false)?;
        rope::rotate(&mut k.0, model.config.num_key_value_heads, table, positions, false)?;
        Ok([q, k, v])
    }

    /// y = the layer's output; returns what is computed on the way from attention to it.
    fn after_attention(
        &self,
        y: &mut Buffer<bf16>,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        x: &Buffer<bf16>,
        attended: &Buffer<bf16>,
    ) -> Result<AfterAttention, Problem> {
        let linear = |which: usize, x: &Buffer<bf16>| self.linear(model, layer, device, which, x);
        let (mut middle, low_o) = linear(O, attended)?;
        residual::add(&mut middle, x)?;
        let (norm2, rstd2) = self.norm(&middle, &device.norm2, model)?;
        let (gate, low_gate) = linear(GATE, &norm2)?;
        let (up, low_up) = linear(UP, &norm2)?;
        let mut gated = self.gpu.alloc(gate.len())?;
        swiglu::forward(&mut gated, &gate, &up)?;
        let low_down = self.linear_into(y, model, layer, device, DOWN, &gated)?;
        residual::add(y, &middle)?;
        let low = [low_o, low_gate, low_up, low_down];
        Ok(AfterAttention { middle, rstd2, norm2, gate, up, gated, low })
    }

    /// The layer's output, and its insides.
    fn layer_forward(
        &self,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        x: &Buffer<bf16>,
        sequences: &DeviceSequences,
    ) -> Result<(Buffer<bf16>, Saved), Problem> {
        // Before its insides, or in a region it would leave a hole when they go.
        let mut y = self.gpu.alloc(x.len())?;
        let (norm1, rstd1) = self.norm(x, &device.norm1, model)?;
        let projected = self.project(model, layer, device, &norm1, &sequences.table, &sequences.positions)?;
        let [(q, low_q), (k, low_k), (v, low_v)] = projected;
        let head_dim = model.config.head_dim;
        let (mut attended, mut lse) = (self.gpu.alloc(q.len())?, self.gpu.alloc(q.len() / head_dim)?);
        let dims = attention_dims(model);
        attention::forward(&mut attended, &mut lse, &q, &k, &v, &sequences.cu_seqlens, sequences.longest, dims)?;
        let after = self.after_attention(&mut y, model, layer, device, x, &attended)?;
        let AfterAttention { middle, rstd2, norm2, gate, up, gated, low: [low_o, low_gate, low_up, low_down] } = after;
        let low = [low_q, low_k, low_v, low_o, low_gate, low_up, low_down];
        Ok((y, Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low }))
    }

    /// `dx` `[T, H]`: gradient of the layer's output on entry, of its input on return, unless nothing `below`
    /// wants it. The gradients of what is trained are added to `sums`.
    #[expect(clippy::too_many_arguments, reason = "the way back has the operands of the way there and its own")]
    fn layer_backward(
        &self,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        dx: &mut Buffer<bf16>,
        below: bool,
        input: &Buffer<bf16>,
        saved: Saved,
        sequences: &DeviceSequences,
        sums: &mut [Buffer<f32>],
    ) -> Result<(), Problem> {
        let Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low } = saved;
        let back = |which: usize,
                    dn: Option<(&mut Buffer<bf16>, bool)>,
                    dy: &Buffer<bf16>,
                    x: &Buffer<bf16>,
                    sums: &mut [Buffer<f32>]|
         -> Result<(), Problem> {
            let linear = &layer.linears[which];
            let (weight, dims) = (&device.weights[which], dims(linear, x.len()));
            if let Some(at) = weight.place() {
                lora_matmul::weight_gradient(&mut sums[at], dy, x, dims)?;
            }
            if let Some(at) = device.biases[which].as_ref().and_then(Held::place) {
                bias::backward(&mut sums[at], dy)?;
            }
            let grads = pair(sums, linear.lora).map(|(da, db)| lora_matmul::Gradients { da, db });
            let lora = self.lora(model, linear.lora);
            lora_matmul::backward(dn, grads, dy, x, low[which].as_ref(), self.matrix(weight), lora, dims)
        };
        let mut dgated = self.gpu.alloc(gated.len())?;
        back(DOWN, Some((&mut dgated, false)), dx, &gated, sums)?;
        let (mut dgate, mut dup) = (self.gpu.alloc(gate.len())?, self.gpu.alloc(up.len())?);
        swiglu::backward(&mut dgate, &mut dup, &dgated, &gate, &up)?;
        drop((dgated, gated, gate, up));
        let mut dnorm = self.gpu.alloc(dx.len())?;
        back(GATE, Some((&mut dnorm, false)), &dgate, &norm2, sums)?;
        back(UP, Some((&mut dnorm, true)), &dup, &norm2, sums)?;
        drop((dgate, dup, norm2));
        self.norm_backward(dx, &device.norm2, &dnorm, &middle, &rstd2, true, sums)?;

        let mut dattended = self.gpu.alloc(attended.len())?;
        back(O, Some((&mut dattended, false)), dx, &attended, sums)?;
        let (mut dq, mut dk, mut dv) = (self.gpu.alloc(q.len())?, self.gpu.alloc(k.len())?, self.gpu.alloc(v.len())?);
        attention::backward(
            &mut dq,
            &mut dk,
            &mut dv,
            &dattended,
            &q,
            &k,
            &v,
            &attended,
            &lse,
            &sequences.cu_seqlens,
            sequences.longest,
            attention_dims(model),
        )?;
        let config = &model.config;
        rope::rotate(&mut dq, config.num_attention_heads, &sequences.table, &sequences.positions, true)?;
        rope::rotate(&mut dk, config.num_key_value_heads, &sequences.table, &sequences.positions, true)?;
        let below = below || device.norm1.place().is_some();
        for (which, dy) in [(Q, &dq), (K, &dk), (V, &dv)] {
            let dn = below.then_some((&mut dnorm, which != Q));
            back(which, dn, dy, &norm1, sums)?;
        }
        if below {
            self.norm_backward(dx, &device.norm1, &dnorm, input, &rstd1, true, sums)?;
        }
        Ok(())
    }
}

impl DeviceLayer {
    fn upload(gpu: &Gpu, layer: &Layer) -> Result<DeviceLayer, Problem> {
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for linear in &layer.linears {
            let weight = linear.weight.as_ref().expect("only a head can lack a weight of its own");
            weights.push(Held::matrix(gpu, weight, linear.trained)?);
            let place = linear.trained.map(|at| at + 1);
            biases.push(linear.bias.as_ref().map(|bias| Held::vector(gpu, bias, place)).transpose()?);
        }
        let [norm1, norm2] = [0, 1].map(|which| layer.trained.map(|places| places[which]));
        let seven = "seven linears per layer";
        Ok(DeviceLayer {
            norm1: Held::vector(gpu, &layer.norm1, norm1)?,
            norm2: Held::vector(gpu, &layer.norm2, norm2)?,
            weights: weights.try_into().unwrap_or_else(|_| unreachable!("{seven}")),
            biases: biases.try_into().unwrap_or_else(|_| unreachable!("{seven}")),
        })
    }
}

impl<T: Pod> Held<T> {
    /// Its place among the trained tensors.
    fn place(&self) -> Option<usize> {
        match self {
            Held::Frozen(_) => None,
            Held::Trained(at) => Some(*at),
        }
    }
}

impl Held<bf16> {
    fn matrix(gpu: &Gpu, matrix: &Matrix, trained: Option<usize>) -> Result<Held<bf16>, Problem> {
        Ok(match trained {
            Some(at) => Held::Trained(at),
            None => Held::Frozen(upload_matrix(gpu, matrix)?),
        })
    }
}

impl Held<f32> {
    fn vector(gpu: &Gpu, values: &[f32], trained: Option<usize>) -> Result<Held<f32>, Problem> {
        Ok(match trained {
            Some(at) => Held::Trained(at),
            None => Held::Frozen(gpu.upload(values)?),
        })
    }
}

impl TrainedTensor {
    fn upload(gpu: &Gpu, param: &Parameter) -> Result<TrainedTensor, Problem> {
        let matrix = param.shape.len() > 1;
        let copy = matrix.then(|| gpu.alloc(param.value.len())).transpose()?;
        let mut tensor = TrainedTensor { value: gpu.alloc(param.value.len())?, copy, decays: param.decays() };
        tensor.renew(param)?;
        Ok(tensor)
    }

    fn renew(&mut self, param: &Parameter) -> Result<(), Problem> {
        self.value.write(&param.value)?;
        match &mut self.copy {
            Some(copy) => cast::to_bf16(copy, &self.value),
            None => Ok(()),
        }
    }

    fn copy(&self) -> &Buffer<bf16> {
        self.copy.as_ref().expect("products are with matrices, which have a copy")
    }
}

impl DeviceGradients {
    /// Back to zero, keeping the memory.
    pub fn clear(&mut self) -> Result<(), Problem> {
        self.sums.iter_mut().try_for_each(Buffer::clear)
    }

    /// Their values, for the host.
    pub fn download(&self) -> Result<Vec<Vec<f32>>, Problem> {
        self.sums.iter().map(Buffer::download).collect()
    }
}

/// Row-major, rounded to bf16 if it is not yet.
fn upload_matrix(gpu: &Gpu, matrix: &Matrix) -> Result<Buffer<bf16>, Problem> {
    let values: Vec<bf16> = matrix.unpack().into_iter().map(bf16::from_f32).collect();
    gpu.upload(&values)
}

/// Sizes of the product of a linear with `len` elements of x.
fn dims(linear: &Linear, len: usize) -> Dims {
    let [n, k] = linear.shape;
    Dims { m: len / k, n, k }
}

pub(super) fn attention_dims(model: &Model) -> attention::Dims {
    let config = &model.config;
    attention::Dims {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// The sums of the two halves of an adapter.
fn pair(sums: &mut [Buffer<f32>], slot: Option<LoraSlot>) -> Option<(&mut Buffer<f32>, &mut Buffer<f32>)> {
    let LoraSlot { at, .. } = slot?;
    let (a, b) = sums.split_at_mut(at + 1);
    Some((&mut a[at], &mut b[0]))
}
