//! The model on a CUDA device: the steps of `qwen2.rs`, launched instead of computed.
//!
//! Frozen weights, activations and the halves of the adapter are bf16, everything is accumulated in f32;
//! norms, biases, log-probs and gradients are f32. The trained values themselves stay with the host, where
//! the optimizer is, and their copies here are renewed after every update.
//!
//! Shapes: T tokens of all sequences, R rows, H hidden, V vocabulary.

use super::qwen2::{Batch, DOWN, GATE, K, Layer, Linear, LoraSlot, Model, O, Q, UP, V};
use super::{Gradients, Parameter};
use crate::cuda::ops::lora_matmul::{self, Dims};
use crate::cuda::ops::rope::Table;
use crate::cuda::ops::{attention, cast, embedding, head_logprob, residual, rmsnorm, rope, swiglu};
use crate::cuda::{Buffer, Gpu};
use crate::problem::Problem;
use crate::tensor::Matrix;
use half::bf16;

/// What of a model lies on the device.
pub struct DeviceModel {
    gpu: Gpu,
    embed: Buffer<bf16>,
    layers: Vec<DeviceLayer>,
    norm: Buffer<f32>,
    /// Absent where the head is the embedding.
    head: Option<Buffer<bf16>>,
    /// Copies of the model's trained values, in their order.
    adapter: Vec<Buffer<bf16>>,
}

struct DeviceLayer {
    norm1: Buffer<f32>,
    norm2: Buffer<f32>,
    /// In the order of `lora::TARGETS`.
    weights: [Buffer<bf16>; 7],
    biases: [Option<Buffer<f32>>; 7],
}

/// What the way back needs of the way there.
pub struct DeviceTape {
    ids: usize,
    rows: Buffer<u32>,
    targets: Buffer<u32>,
    sequences: DeviceSequences,
    /// From the first trained layer on.
    layers: Vec<DeviceLayerTape>,
    selected: Buffer<bf16>,
    normed: Buffer<bf16>,
    rstd: Buffer<f32>,
    lse: Buffer<f32>,
}

struct DeviceLayerTape {
    input: Buffer<bf16>,
    /// Absent where it is computed again.
    saved: Option<Saved>,
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

/// Attends: layer, q, k, v, and what it writes.
pub(super) type Attend<'a> =
    dyn FnMut(usize, &Buffer<bf16>, &Buffer<bf16>, &Buffer<bf16>, &mut Buffer<bf16>) -> Result<(), Problem> + 'a;

/// Is shown a residual stream.
type Seen<'s> = dyn FnMut(&Buffer<bf16>) -> Result<(), Problem> + 's;

/// What a linear layer gives, and A x if it has an adapter.
type Adapted = (Buffer<bf16>, Option<Buffer<bf16>>);

impl DeviceModel {
    /// Copies a model to `gpu`. `Err` (exit 3) if no kernel fits its shape.
    pub fn upload(gpu: &Gpu, model: &Model) -> Result<DeviceModel, Problem> {
        attention_dims(model).check()?;
        let layers = model.layers.iter().map(|layer| DeviceLayer::upload(gpu, layer)).collect::<Result<_, _>>()?;
        let head = model.head.weight.as_ref().map(|weight| upload_matrix(gpu, weight)).transpose()?;
        let mut device = DeviceModel {
            gpu: gpu.clone(),
            embed: upload_matrix(gpu, &model.embed)?,
            layers,
            norm: gpu.upload(&model.norm)?,
            head,
            adapter: Vec::new(),
        };
        device.renew(model.params())?;
        Ok(device)
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Copies the trained values anew.
    pub fn renew(&mut self, params: &[Parameter]) -> Result<(), Problem> {
        if self.adapter.len() != params.len() {
            self.adapter = params.iter().map(|param| self.gpu.alloc(param.value.len())).collect::<Result<_, _>>()?;
        }
        for (copy, param) in self.adapter.iter_mut().zip(params) {
            cast::to_bf16(copy, &self.gpu.upload(&param.value)?)?;
        }
        Ok(())
    }

    /// Log-probs of the batch's targets, and what [`DeviceModel::backward`] needs.
    pub fn forward(&self, model: &Model, batch: &Batch) -> Result<(Vec<f32>, DeviceTape), Problem> {
        let first = model.first_trained_layer();
        let sequences = self.sequences(model, batch)?;
        let mut layers = Vec::new();
        let mut x = self.embed(model, batch.ids)?;
        for (i, layer) in model.layers.iter().enumerate() {
            let (y, saved) = self.layer_forward(model, layer, &self.layers[i], &x, &sequences)?;
            let input = std::mem::replace(&mut x, y);
            if i >= first {
                layers.push(DeviceLayerTape { input, saved: (!model.recompute.of(i)).then_some(saved) });
            }
        }
        let rows = self.gpu.upload(&batch.rows.iter().map(|&row| row as u32).collect::<Vec<_>>())?;
        let targets = self.gpu.upload(batch.targets)?;
        let mut selected = self.gpu.alloc(batch.rows.len() * model.config.hidden_size)?;
        residual::gather_rows(&mut selected, &x, &rows, model.config.hidden_size)?;
        drop(x);
        let (normed, rstd) = self.norm(&selected, &self.norm, model)?;
        let lora = self.head_lora(model);
        let head = head_logprob::forward(&normed, self.head(), lora, &targets, model.config.hidden_size, false, 0)?;
        let logprobs = head.logprob.download()?;
        let lse = head.lse;
        let ids = batch.ids.len();
        Ok((logprobs, DeviceTape { ids, rows, targets, sequences, layers, selected, normed, rstd, lse }))
    }

    /// Log-probs of the batch's targets, keeping nothing.
    pub fn logprobs(&self, model: &Model, batch: &Batch) -> Result<Vec<f32>, Problem> {
        let sequences = self.sequences(model, batch)?;
        let mut x = self.embed(model, batch.ids)?;
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

    /// Adds to `grads` the gradient of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(
        &self,
        model: &Model,
        tape: DeviceTape,
        dlogprobs: &[f32],
        grads: &mut Gradients,
    ) -> Result<(), Problem> {
        let DeviceTape { ids, rows, targets, sequences, mut layers, selected, normed, rstd, lse } = tape;
        let hidden = model.config.hidden_size;
        let first = model.first_trained_layer();
        let mut sums: Vec<Buffer<f32>> =
            grads.values.iter().map(|values| self.gpu.zeros(values.len())).collect::<Result<_, _>>()?;

        let dlogprobs = self.gpu.upload(dlogprobs)?;
        let mut dnormed = self.gpu.alloc(normed.len())?;
        let wanted = head_logprob::Gradients { lora: pair(&mut sums, model.head.lora), weight: None };
        let lora = self.head_lora(model);
        head_logprob::backward(&mut dnormed, wanted, &dlogprobs, &normed, self.head(), lora, &targets, &lse, hidden)?;
        if first < self.layers.len() {
            let mut dselected = self.gpu.alloc(selected.len())?;
            rmsnorm::backward(&mut dselected, None, &dnormed, &selected, &self.norm, &rstd, false)?;
            let mut dx = self.gpu.zeros(ids * hidden)?;
            residual::scatter_rows(&mut dx, &dselected, &rows, hidden)?;
            for i in (first..self.layers.len()).rev() {
                let DeviceLayerTape { input, saved } = layers.pop().expect("one tape per layer");
                let (layer, device) = (&model.layers[i], &self.layers[i]);
                let saved = match saved {
                    Some(saved) => saved,
                    None => self.layer_forward(model, layer, device, &input, &sequences)?.1,
                };
                self.layer_backward(model, layer, device, &mut dx, i > first, &input, saved, &sequences, &mut sums)?;
            }
        }
        for (values, sum) in grads.values.iter_mut().zip(&sums) {
            values.iter_mut().zip(sum.download()?).for_each(|(value, more)| *value += more);
        }
        Ok(())
    }

    /// Runs packed prompts, handing every layer's keys and values to `keep`. Returns the logits after each.
    pub(super) fn run_prompts(
        &self,
        model: &Model,
        ids: &[u32],
        lengths: &[usize],
        keep: &mut Keep,
    ) -> Result<Vec<f32>, Problem> {
        let sequences = self.sequences(model, &Batch { ids, lengths, rows: &[], targets: &[] })?;
        let mut x = self.embed(model, ids)?;
        for (i, layer) in model.layers.iter().enumerate() {
            let (y, saved) = self.layer_forward(model, layer, &self.layers[i], &x, &sequences)?;
            keep(i, &saved.k, &saved.v)?;
            x = y;
        }
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end as u32 - 1)
        });
        self.logits(model, &x, &ends.collect::<Vec<_>>())
    }

    /// Runs one token of each completion. `attend(layer, q, k, v, attended)` keeps k and v and attends.
    /// Returns the logits of each.
    pub(super) fn run_tokens(
        &self,
        model: &Model,
        ids: &[u32],
        table: &Table,
        positions: &Buffer<u32>,
        attend: &mut Attend,
    ) -> Result<Vec<f32>, Problem> {
        let mut x = self.embed(model, ids)?;
        for (i, layer) in model.layers.iter().enumerate() {
            let device = &self.layers[i];
            let (norm1, _) = self.norm(&x, &device.norm1, model)?;
            let [q, k, v] = self.project(model, layer, device, &norm1, table, positions)?.map(|(y, _)| y);
            let mut attended = self.gpu.alloc(q.len())?;
            attend(i, &q, &k, &v, &mut attended)?;
            x = self.after_attention(model, layer, device, &x, &attended)?.0;
        }
        self.logits(model, &x, &(0..ids.len() as u32).collect::<Vec<_>>())
    }

    /// The logits of every token of one sequence, `[T, V]`, a tile of tokens at a time.
    pub fn sequence_logits(&self, model: &Model, ids: &[u32]) -> Result<Vec<f32>, Problem> {
        const TILE: usize = 256;
        let x = self.stream(model, ids, &mut |_| Ok(()))?;
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        let mut all = Vec::with_capacity(ids.len() * model.config.vocab_size);
        for rows in rows.chunks(TILE) {
            all.extend(self.logits(model, &x, rows)?);
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
        let mut x = self.embed(model, ids)?;
        seen(&x)?;
        for (layer, device) in model.layers.iter().zip(&self.layers) {
            x = self.layer_forward(model, layer, device, &x, &sequences)?.0;
            seen(&x)?;
        }
        Ok(x)
    }

    /// `[rows, V]` of some rows of the residual stream.
    fn logits(&self, model: &Model, x: &Buffer<bf16>, rows: &[u32]) -> Result<Vec<f32>, Problem> {
        let hidden = model.config.hidden_size;
        let mut selected = self.gpu.alloc(rows.len() * hidden)?;
        residual::gather_rows(&mut selected, x, &self.gpu.upload(rows)?, hidden)?;
        let (normed, _) = self.norm(&selected, &self.norm, model)?;
        let dims = Dims { m: rows.len(), n: model.config.vocab_size, k: hidden };
        let mut logits = self.gpu.alloc(dims.m * dims.n)?;
        lora_matmul::forward(&mut logits, None, &normed, self.head(), None, self.head_lora(model), dims, false)?;
        Ok(logits.download()?.into_iter().map(bf16::to_f32).collect())
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
            table: Table::upload(&self.gpu, longest, model.config.head_dim, model.config.rope_theta)?,
        })
    }

    /// `[T, H]`
    fn embed(&self, model: &Model, ids: &[u32]) -> Result<Buffer<bf16>, Problem> {
        let mut x = self.gpu.alloc(ids.len() * model.config.hidden_size)?;
        embedding::forward(&mut x, &self.embed, &self.gpu.upload(ids)?)?;
        Ok(x)
    }

    fn norm(
        &self,
        x: &Buffer<bf16>,
        weight: &Buffer<f32>,
        model: &Model,
    ) -> Result<(Buffer<bf16>, Buffer<f32>), Problem> {
        let (mut y, mut rstd) = (self.gpu.alloc(x.len())?, self.gpu.alloc(x.len() / weight.len())?);
        rmsnorm::forward(&mut y, &mut rstd, x, weight, model.config.rms_norm_eps)?;
        Ok((y, rstd))
    }

    fn head(&self) -> &Buffer<bf16> {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The active adapter in a linear's place.
    fn lora(&self, model: &Model, slot: Option<LoraSlot>) -> Option<lora_matmul::Lora<'_>> {
        let LoraSlot { at, rank, scale } = slot.filter(|_| model.adapter_on)?;
        Some(lora_matmul::Lora { a: &self.adapter[at], b: &self.adapter[at + 1], rank, scale })
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
        let dims = dims(linear, x.len());
        let mut y = self.gpu.alloc(dims.m * dims.n)?;
        let lora = self.lora(model, linear.lora);
        let mut low = lora.as_ref().map(|lora| self.gpu.alloc(dims.m * lora.rank)).transpose()?;
        let bias = device.biases[which].as_ref();
        lora_matmul::forward(&mut y, low.as_mut(), x, &device.weights[which], bias, lora, dims, false)?;
        Ok((y, low))
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

    /// The layer's output and what is computed on the way from attention to it.
    fn after_attention(
        &self,
        model: &Model,
        layer: &Layer,
        device: &DeviceLayer,
        x: &Buffer<bf16>,
        attended: &Buffer<bf16>,
    ) -> Result<(Buffer<bf16>, AfterAttention), Problem> {
        let linear = |which: usize, x: &Buffer<bf16>| self.linear(model, layer, device, which, x);
        let (mut middle, low_o) = linear(O, attended)?;
        residual::add(&mut middle, x)?;
        let (norm2, rstd2) = self.norm(&middle, &device.norm2, model)?;
        let (gate, low_gate) = linear(GATE, &norm2)?;
        let (up, low_up) = linear(UP, &norm2)?;
        let mut gated = self.gpu.alloc(gate.len())?;
        swiglu::forward(&mut gated, &gate, &up)?;
        let (mut y, low_down) = linear(DOWN, &gated)?;
        residual::add(&mut y, &middle)?;
        let low = [low_o, low_gate, low_up, low_down];
        Ok((y, AfterAttention { middle, rstd2, norm2, gate, up, gated, low }))
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
        let (norm1, rstd1) = self.norm(x, &device.norm1, model)?;
        let projected = self.project(model, layer, device, &norm1, &sequences.table, &sequences.positions)?;
        let [(q, low_q), (k, low_k), (v, low_v)] = projected;
        let head_dim = model.config.head_dim;
        let (mut attended, mut lse) = (self.gpu.alloc(q.len())?, self.gpu.alloc(q.len() / head_dim)?);
        let dims = attention_dims(model);
        attention::forward(&mut attended, &mut lse, &q, &k, &v, &sequences.cu_seqlens, sequences.longest, dims)?;
        let (y, after) = self.after_attention(model, layer, device, x, &attended)?;
        let AfterAttention { middle, rstd2, norm2, gate, up, gated, low: [low_o, low_gate, low_up, low_down] } = after;
        let low = [low_q, low_k, low_v, low_o, low_gate, low_up, low_down];
        Ok((y, Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low }))
    }

    /// `dx` `[T, H]`: gradient of the layer's output on entry, of its input on return, unless nothing `below`
    /// wants it. The adapter's gradients are added to `sums`.
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
        let mut back = |which: usize,
                        dn: Option<(&mut Buffer<bf16>, bool)>,
                        dy: &Buffer<bf16>,
                        x: &Buffer<bf16>|
         -> Result<(), Problem> {
            let linear = &layer.linears[which];
            let grads = pair(sums, linear.lora).map(|(da, db)| lora_matmul::Gradients { da, db });
            let (w, lora) = (&device.weights[which], self.lora(model, linear.lora));
            lora_matmul::backward(dn, grads, dy, x, low[which].as_ref(), w, lora, dims(linear, x.len()))
        };
        let mut dgated = self.gpu.alloc(gated.len())?;
        back(DOWN, Some((&mut dgated, false)), dx, &gated)?;
        let (mut dgate, mut dup) = (self.gpu.alloc(gate.len())?, self.gpu.alloc(up.len())?);
        swiglu::backward(&mut dgate, &mut dup, &dgated, &gate, &up)?;
        drop((dgated, gated, gate, up));
        let mut dnorm = self.gpu.alloc(dx.len())?;
        back(GATE, Some((&mut dnorm, false)), &dgate, &norm2)?;
        back(UP, Some((&mut dnorm, true)), &dup, &norm2)?;
        drop((dgate, dup, norm2));
        rmsnorm::backward(dx, None, &dnorm, &middle, &device.norm2, &rstd2, true)?;

        let mut dattended = self.gpu.alloc(attended.len())?;
        back(O, Some((&mut dattended, false)), dx, &attended)?;
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
        for (which, dy) in [(Q, &dq), (K, &dk), (V, &dv)] {
            let dn = below.then_some((&mut dnorm, which != Q));
            back(which, dn, dy, &norm1)?;
        }
        if below {
            rmsnorm::backward(dx, None, &dnorm, input, &device.norm1, &rstd1, true)?;
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
            weights.push(upload_matrix(gpu, weight)?);
            biases.push(linear.bias.as_ref().map(|bias| gpu.upload(bias)).transpose()?);
        }
        let seven = "seven linears per layer";
        Ok(DeviceLayer {
            norm1: gpu.upload(&layer.norm1)?,
            norm2: gpu.upload(&layer.norm2)?,
            weights: weights.try_into().unwrap_or_else(|_| unreachable!("{seven}")),
            biases: biases.try_into().unwrap_or_else(|_| unreachable!("{seven}")),
        })
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
