//! Qwen2: what it computes, and the gradient of it.
//!
//! ```text
//! x = embed[ids]
//! each layer:  n = rmsnorm(x);  q, k, v = linears of n (with bias), q and k turned by RoPE
//!              x += o_proj(attention(q, k, v))
//!              n = rmsnorm(x);  x += down_proj(silu(gate_proj n) * up_proj n)
//! log p(target | row) = log softmax(lm_head(rmsnorm(x[row])))[target]
//! ```
//!
//! Sequences are packed one after another and never padded; attention takes their lengths, positions start
//! at 0 in each. Everything a row computes depends on its own sequence only, to the bit, so that packing,
//! recomputing and the number of threads change nothing.
//!
//! **What is trained** is a flat list of [`Parameter`]s: the halves of an adapter, or every weight. The
//! linears know their places in it. Frozen weights get no gradient, and layers below the first trained one
//! are not walked back through.
//!
//! Shapes: T tokens of all sequences, R rows, H hidden, V vocabulary.

mod trained;

use super::config::Config;
use super::load::{Fetch, Values, bias_name, normal_values, weight_name};
use super::lora::{self, LoraSpec};
use super::memory::Extent;
use super::{Gradients, Parameter, fit};
use crate::problem::{Exit, Problem};
use crate::tensor::ops::{self, Attention, HeadForward, HeadGradients, HeadLora, HeadWant, RopeTable};
use crate::tensor::{self, Dtype, Matrix};

/// How many layers keep only their input and compute the rest again on the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recompute {
    /// Keep everything: fastest, most memory.
    None,
    /// Keep the inputs of layers: `[T, H]` each, about a third more time.
    #[default]
    All,
    /// The first `n` layers as `All`, the others as `None`.
    First(usize),
    /// As few as there is memory for, decided for each batch.
    Fit,
}

impl Recompute {
    pub(super) fn of(self, layer: usize) -> bool {
        match self {
            Recompute::None => false,
            // Undecided, the careful way.
            Recompute::All | Recompute::Fit => true,
            Recompute::First(n) => layer < n,
        }
    }
}

/// Packed sequences and what is asked of them.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// `[T]`, the sequences one after another.
    pub ids: &'a [u32],
    /// Length of each sequence; they add up to T.
    pub lengths: &'a [usize],
    /// `[R]` positions in `ids` whose hidden state predicts a target.
    pub rows: &'a [usize],
    /// `[R]` the predicted ids.
    pub targets: &'a [u32],
}

/// What a forward pass gives.
pub struct Forward {
    /// `[R]` log p(target) of each row.
    pub logprobs: Vec<f32>,
    pub tape: Tape,
}

/// What the way back needs of the way there.
pub struct Tape {
    ids: Vec<u32>,
    rows: Vec<usize>,
    targets: Vec<u32>,
    sequences: Sequences,
    /// From the first trained layer on.
    layers: Vec<LayerTape>,
    /// `[R, H]` the selected rows before and after the final norm, and its scales `[R]`.
    selected: Vec<f32>,
    normed: Vec<f32>,
    rstd: Vec<f32>,
    /// `[R]` log-sum-exp of the logits.
    lse: Vec<f32>,
}

struct LayerTape {
    /// `[T, H]`
    input: Vec<f32>,
    /// Absent where it is computed again.
    saved: Option<Saved>,
}

/// The insides of one layer.
pub(super) struct Saved {
    rstd1: Vec<f32>,
    norm1: Vec<f32>,
    q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    attended: Vec<f32>,
    lse: Vec<f32>,
    middle: Vec<f32>,
    rstd2: Vec<f32>,
    norm2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    gated: Vec<f32>,
    /// `[T, rank]` A x of each linear's adapter, in the order of `lora::TARGETS`; empty without adapter.
    low: [Vec<f32>; 7],
}

/// Where sequences begin, and the angles of their positions.
pub(super) struct Sequences {
    cu_seqlens: Vec<usize>,
    /// `[T]`, from 0 in each sequence.
    positions: Vec<u32>,
    rope: RopeTable,
}

impl Sequences {
    pub(super) fn new(config: &Config, lengths: &[usize]) -> Sequences {
        let mut cu_seqlens = vec![0];
        let mut positions = Vec::new();
        for &length in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length);
            positions.extend(0..length as u32);
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        Sequences { cu_seqlens, positions, rope: RopeTable::new(longest, config.head_dim, config.rope_theta) }
    }
}

/// A linear layer: frozen or trained weight, with or without bias and adapter.
pub(super) struct Linear {
    /// `model.layers.0.self_attn.q_proj`
    pub(super) name: String,
    /// `[out, in]`
    pub(super) shape: [usize; 2],
    /// Absent for a tied head, which uses the embedding.
    pub(super) weight: Option<Matrix>,
    pub(super) bias: Option<Vec<f32>>,
    /// The active adapter.
    pub(super) lora: Option<LoraSlot>,
    /// Place of the weight among the parameters, the bias after it, when every weight is trained.
    pub(super) trained: Option<usize>,
}

#[derive(Clone, Copy)]
pub(super) struct LoraSlot {
    /// Place of A among the parameters; B is the next.
    pub(super) at: usize,
    pub(super) rank: usize,
    pub(super) scale: f32,
}

pub(super) struct Layer {
    pub(super) norm1: Vec<f32>,
    pub(super) norm2: Vec<f32>,
    /// In the order of `lora::TARGETS`.
    pub(super) linears: [Linear; 7],
    /// Places of the norms among the parameters.
    pub(super) trained: Option<[usize; 2]>,
}

pub(super) const Q: usize = 0;
pub(super) const K: usize = 1;
pub(super) const V: usize = 2;
pub(super) const O: usize = 3;
pub(super) const GATE: usize = 4;
pub(super) const UP: usize = 5;
pub(super) const DOWN: usize = 6;

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Trained {
    Nothing,
    Adapter(LoraSpec),
    Everything,
}

/// A model in memory.
pub struct Model {
    pub config: Config,
    /// Memory against time on the way back; changes no bit of the result.
    pub recompute: Recompute,
    /// On a device: the inputs of layers wait in the host's memory for the way back; changes no bit either.
    pub offload: bool,
    /// On a device: training steps whose shape comes again are captured and launched as a whole, where there is the
    /// memory; changes no bit either.
    pub graphs: bool,
    /// `[V, H]`; also the head when that is tied.
    pub(super) embed: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    pub(super) head: Linear,
    params: Vec<Parameter>,
    pub(super) trained: Trained,
    pub(super) adapter_on: bool,
    /// Places of embedding and final norm among the parameters.
    pub(super) embed_trained: Option<usize>,
    pub(super) norm_trained: Option<usize>,
}

impl Linear {
    fn out(&self) -> usize {
        self.shape[0]
    }

    fn input(&self) -> usize {
        self.shape[1]
    }

    /// `y = W x + b + scale B A x` for `rows` rows. Returns `A x` if there is an adapter.
    pub(super) fn forward(&self, model: &Model, y: &mut [f32], x: &[f32], rows: usize) -> Vec<f32> {
        tensor::linear(y, x, rows, self.matrix(model), false);
        self.add_rest(model, y, x, rows)
    }

    fn matrix<'a>(&'a self, model: &'a Model) -> &'a Matrix {
        self.weight.as_ref().unwrap_or(&model.embed)
    }

    /// [`Linear::forward`] after `y = W x`.
    fn add_rest(&self, model: &Model, y: &mut [f32], x: &[f32], rows: usize) -> Vec<f32> {
        if let Some(bias) = &self.bias {
            ops::bias_add(y, bias);
        }
        let Some(LoraSlot { at, rank, scale }) = self.lora.filter(|_| model.adapter_on) else { return Vec::new() };
        let (a, b) = (&model.params[at].value, &model.params[at + 1].value);
        let mut low = vec![0.0; rows * rank];
        tensor::gemm(&mut low, rows, rank, self.input(), 1.0, x, false, a, true, false);
        tensor::gemm(y, rows, self.out(), rank, scale, &low, false, b, true, true);
        low
    }

    /// Adds this layer's gradients to `grads` and, if `dx` is wanted, writes (or with `add` adds) the
    /// gradient of the input. `low` is what [`Linear::forward`] gave.
    fn backward(
        &self,
        model: &Model,
        grads: &mut Gradients,
        dx: Option<(&mut [f32], bool)>,
        dy: &[f32],
        x: &[f32],
        low: &[f32],
    ) {
        let rows = dy.len() / self.out();
        let [out, input] = self.shape;
        if let Some(at) = self.trained {
            tensor::gemm(&mut grads.values[at], out, input, rows, 1.0, dy, true, x, false, true);
            if self.bias.is_some() {
                ops::bias_backward(&mut grads.values[at + 1], dy);
            }
        }
        let mut dlow = Vec::new();
        if let Some(LoraSlot { at, rank, scale }) = self.lora {
            let (a, b) = grads.values.split_at_mut(at + 1);
            let (da, db) = (&mut a[at], &mut b[0]);
            dlow = vec![0.0; rows * rank];
            tensor::gemm(&mut dlow, rows, rank, out, scale, dy, false, &model.params[at + 1].value, false, false);
            tensor::gemm(db, out, rank, rows, scale, dy, true, low, false, true);
            tensor::gemm(da, rank, input, rows, 1.0, &dlow, true, x, false, true);
        }
        if let Some((dx, add)) = dx {
            tensor::linear_backward(dx, dy, rows, self.matrix(model), add);
            if let Some(LoraSlot { at, rank, .. }) = self.lora {
                tensor::gemm(dx, rows, input, rank, 1.0, &dlow, false, &model.params[at].value, false, true);
            }
        }
    }
}

impl Model {
    /// New weights as transformers initialises them: normal(0, `initializer_range`) for matrices, zero for
    /// biases, one for norms. Each tensor depends on `seed` and its name only.
    pub fn random(config: Config, seed: u64, dtype: Dtype) -> Model {
        let range = config.initializer_range;
        let built = Model::build(config, dtype, &mut |name, shape| {
            let len = shape.iter().product();
            Ok(Values::F32(match name {
                _ if name.ends_with("norm.weight") => vec![1.0; len],
                _ if name.ends_with(".bias") => vec![0.0; len],
                _ => normal_values(seed, name, len, range),
            }))
        });
        match built {
            Ok(model) => model,
            Err(problem) => unreachable!("nothing is read: {problem}"),
        }
    }

    /// A model of the tensors that `fetch` gives, asked for one by one.
    pub(super) fn build(config: Config, dtype: Dtype, fetch: &mut Fetch) -> Result<Model, Problem> {
        let hidden = config.hidden_size;
        let embed =
            fetch("model.embed_tokens.weight", &[config.vocab_size, hidden])?.pack(config.vocab_size, hidden, dtype);
        let mut linears = Vec::new();
        for (name, target, shape) in lora::linears(&config) {
            let tied = target == "lm_head" && config.tie_word_embeddings;
            let weight = match tied {
                true => None,
                false => Some(fetch(&weight_name(&name), &shape)?.pack(shape[0], shape[1], dtype)),
            };
            let bias = match target {
                "q_proj" | "k_proj" | "v_proj" => Some(fetch(&bias_name(&name), &shape[..1])?.f32()),
                _ => None,
            };
            linears.push(Linear { name, shape, weight, bias, lora: None, trained: None });
        }
        let mut linears = linears.into_iter();
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let mut norm = |which: &str| {
                fetch(&format!("model.layers.{layer}.{which}_layernorm.weight"), &[hidden]).map(Values::f32)
            };
            let (norm1, norm2) = (norm("input")?, norm("post_attention")?);
            let linears = std::array::from_fn(|_| linears.next().expect("seven linears per layer"));
            layers.push(Layer { norm1, norm2, linears, trained: None });
        }
        let norm = fetch("model.norm.weight", &[hidden])?.f32();
        let head = linears.next().expect("the head is the last linear");
        Ok(Model {
            config,
            recompute: Recompute::default(),
            offload: false,
            graphs: true,
            embed,
            layers,
            norm,
            head,
            params: Vec::new(),
            trained: Trained::Nothing,
            adapter_on: true,
            embed_trained: None,
            norm_trained: None,
        })
    }

    /// Every linear in order, the head last.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| &layer.linears).chain([&self.head])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(|layer| &mut layer.linears).chain([&mut self.head])
    }

    /// `Err` naming the first id that the embedding has no row for.
    pub fn check_ids(&self, ids: &[u32]) -> Result<(), Problem> {
        match ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            None => Ok(()),
            Some(id) => Err(Problem::new(
                "model::id_out_of_range",
                format!("token id {id} has no row in an embedding of {}", self.config.vocab_size),
            )
            .exit(Exit::Failed)
            .note("the tokenizer or the token ids belong to another model")),
        }
    }

    /// Log-probs of the batch's targets, and what [`Model::backward`] needs.
    pub fn forward(&self, batch: &Batch) -> Forward {
        let sequences = self.sequences(batch);
        let first = self.first_trained_layer();
        let recompute = match self.recompute {
            Recompute::Fit => fit::on_host(self, Extent::of(batch)),
            decided => decided,
        };
        let mut layers = Vec::new();
        let mut x = self.embed_ids(batch.ids);
        for (i, layer) in self.layers.iter().enumerate() {
            let input = if i >= first { x.clone() } else { Vec::new() };
            let saved = self.layer_forward(layer, &mut x, &sequences);
            if i >= first {
                layers.push(LayerTape { input, saved: (!recompute.of(i)).then_some(saved) });
            }
        }
        let selected = self.select(&x, batch.rows);
        drop(x);
        let (normed, rstd) = self.final_norm(&selected);
        let HeadForward { logprob: logprobs, lse, .. } = self.head_forward(&normed, batch.targets, HeadWant::default());
        let tape = Tape {
            ids: batch.ids.to_vec(),
            rows: batch.rows.to_vec(),
            targets: batch.targets.to_vec(),
            sequences,
            layers,
            selected,
            normed,
            rstd,
            lse,
        };
        Forward { logprobs, tape }
    }

    /// Log-probs of the batch's targets, keeping nothing.
    pub fn logprobs(&self, batch: &Batch) -> Vec<f32> {
        self.measure(batch, HeadWant::default()).logprob
    }

    /// [`Model::logprobs`] with entropy and the likeliest ids of each row, as wanted.
    pub fn measure(&self, batch: &Batch, want: HeadWant) -> HeadForward {
        let sequences = self.sequences(batch);
        let mut x = self.embed_ids(batch.ids);
        for layer in &self.layers {
            self.layer_forward(layer, &mut x, &sequences);
        }
        let (normed, _) = self.final_norm(&self.select(&x, batch.rows));
        self.head_forward(&normed, batch.targets, want)
    }

    /// [`Model::logprobs`] with the active adapter off: the model beneath it, as DPO's reference.
    pub fn base_logprobs(&mut self, batch: &Batch) -> Vec<f32> {
        self.adapter_on = false;
        let logprobs = self.logprobs(batch);
        self.adapter_on = true;
        logprobs
    }

    /// All logits of one sequence, `[T, V]`: for tests and comparisons, never for training.
    pub fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let x = self.hidden(ids);
        let (normed, _) = self.final_norm(&x);
        let mut logits = vec![0.0; ids.len() * self.config.vocab_size];
        self.head.forward(self, &mut logits, &normed, ids.len());
        logits
    }

    /// The residual stream of one sequence after the last layer, before the final norm: `[T, H]`.
    pub fn hidden(&self, ids: &[u32]) -> Vec<f32> {
        let sequences = Sequences::new(&self.config, &[ids.len()]);
        let mut x = self.embed_ids(ids);
        for layer in &self.layers {
            self.layer_forward(layer, &mut x, &sequences);
        }
        x
    }

    /// The residual stream of one sequence as embedded, after each layer, and after the final norm:
    /// layers + 2 times `[T, H]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Vec<Vec<f32>> {
        let sequences = Sequences::new(&self.config, &[ids.len()]);
        let mut x = self.embed_ids(ids);
        let mut states = vec![x.clone()];
        for layer in &self.layers {
            self.layer_forward(layer, &mut x, &sequences);
            states.push(x.clone());
        }
        states.push(self.final_norm(&x).0);
        states
    }

    /// Adds to `grads` the gradient of `sum_r dlogprobs[r] * logprobs[r]`.
    pub fn backward(&self, tape: Tape, dlogprobs: &[f32], grads: &mut Gradients) {
        assert_eq!(grads.values.len(), self.params.len(), "gradients of other parameters");
        assert!(self.adapter_on, "the adapter was off");
        let Tape { ids, rows, targets, sequences, mut layers, selected, normed, rstd, lse } = tape;
        let hidden = self.config.hidden_size;
        let first = self.first_trained_layer();
        let dnormed = self.head_backward(&normed, &targets, &lse, dlogprobs, grads);
        if first >= self.layers.len() && self.norm_trained.is_none() {
            return;
        }
        let mut dselected = vec![0.0; selected.len()];
        self.norm_backward(&mut dselected, self.norm_trained, &dnormed, &selected, &rstd, &self.norm, grads);
        let mut dx = vec![0.0; ids.len() * hidden];
        for (row, dselected) in rows.iter().zip(dselected.chunks_exact(hidden)) {
            for (dx, d) in dx[row * hidden..][..hidden].iter_mut().zip(dselected) {
                *dx += d;
            }
        }
        for i in (first..self.layers.len()).rev() {
            let LayerTape { input, saved } = layers.pop().expect("one tape per layer");
            let saved = saved.unwrap_or_else(|| self.layer_forward(&self.layers[i], &mut input.clone(), &sequences));
            let below = i > first || self.embed_trained.is_some();
            self.layer_backward(&self.layers[i], &mut dx, below, &input, saved, &sequences, grads);
        }
        if let Some(at) = self.embed_trained {
            ops::embedding_backward(&mut grads.values[at], &dx, &ids);
        }
    }

    /// Layers below it have nothing to train.
    pub(super) fn first_trained_layer(&self) -> usize {
        let trained =
            |layer: &Layer| layer.linears.iter().any(|linear| linear.lora.is_some() || linear.trained.is_some());
        self.layers.iter().position(trained).unwrap_or(self.layers.len())
    }

    fn sequences(&self, batch: &Batch) -> Sequences {
        assert_eq!(batch.lengths.iter().sum::<usize>(), batch.ids.len(), "lengths of a batch");
        assert_eq!(batch.rows.len(), batch.targets.len(), "rows and targets of a batch");
        Sequences::new(&self.config, batch.lengths)
    }

    /// `[T, H]`
    pub(super) fn embed_ids(&self, ids: &[u32]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let mut x = vec![0.0; ids.len() * hidden];
        ops::embedding_forward(&mut x, &self.embed, ids);
        x
    }

    fn select(&self, x: &[f32], rows: &[usize]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        rows.iter().flat_map(|row| &x[row * hidden..][..hidden]).copied().collect()
    }

    pub(super) fn rmsnorm(&self, x: &[f32], weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; x.len() / weight.len()]);
        ops::rmsnorm_forward(&mut y, &mut rstd, x, weight, self.config.rms_norm_eps);
        (y, rstd)
    }

    pub(super) fn final_norm(&self, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        self.rmsnorm(x, &self.norm)
    }

    /// [`Model::layer_forward`], giving its keys and values only.
    pub(super) fn layer_keys_values(
        &self,
        layer: &Layer,
        x: &mut [f32],
        sequences: &Sequences,
    ) -> (Vec<f32>, Vec<f32>) {
        let Saved { k, v, .. } = self.layer_forward(layer, x, sequences);
        (k, v)
    }

    pub(super) fn attention_dims(&self) -> Attention {
        Attention {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_size: self.config.head_dim,
        }
    }

    /// Some linears of one input.
    fn together<const N: usize>(
        &self,
        layer: &Layer,
        which: [usize; N],
        x: &[f32],
        low: &mut [Vec<f32>; 7],
    ) -> [Vec<f32>; N] {
        let linears = which.map(|which| &layer.linears[which]);
        let rows = x.len() / linears[0].input();
        let mut all = linears.map(|linear| vec![0.0; rows * linear.out()]);
        let products = all.iter_mut().zip(linears).map(|(y, linear)| (&mut y[..], linear.matrix(self)));
        tensor::linears(&mut products.collect::<Vec<_>>(), x, rows);
        for ((y, linear), which) in all.iter_mut().zip(linears).zip(which) {
            low[which] = linear.add_rest(self, y, x, rows);
        }
        all
    }

    /// Normed input to queries and keys (turned) and values.
    pub(super) fn project(
        &self,
        layer: &Layer,
        norm: &[f32],
        rope: (&RopeTable, &[u32]),
        low: &mut [Vec<f32>; 7],
    ) -> [Vec<f32>; 3] {
        let mut qkv = self.together(layer, [Q, K, V], norm, low);
        let (table, positions) = rope;
        ops::rope(&mut qkv[Q], self.config.num_attention_heads, table, positions, false);
        ops::rope(&mut qkv[K], self.config.num_key_value_heads, table, positions, false);
        qkv
    }

    /// The second half of a layer: from the attention's output to the residual stream `x`, which it adds to.
    /// Returns everything [`Saved`] holds beyond attention.
    pub(super) fn after_attention(
        &self,
        layer: &Layer,
        x: &mut [f32],
        attended: &[f32],
        low: &mut [Vec<f32>; 7],
    ) -> AfterAttention {
        let rows = x.len() / self.config.hidden_size;
        let mut y = vec![0.0; x.len()];
        low[O] = layer.linears[O].forward(self, &mut y, attended, rows);
        add(x, &y);
        let middle = x.to_vec();
        let (norm2, rstd2) = self.rmsnorm(x, &layer.norm2);
        let [gate, up] = self.together(layer, [GATE, UP], &norm2, low);
        let mut gated = vec![0.0; gate.len()];
        ops::swiglu_forward(&mut gated, &gate, &up);
        low[DOWN] = layer.linears[DOWN].forward(self, &mut y, &gated, rows);
        add(x, &y);
        AfterAttention { middle, rstd2, norm2, gate, up, gated }
    }

    /// One layer on the residual stream `x` `[T, H]`.
    pub(super) fn layer_forward(&self, layer: &Layer, x: &mut [f32], sequences: &Sequences) -> Saved {
        let (norm1, rstd1) = self.rmsnorm(x, &layer.norm1);
        let mut low: [Vec<f32>; 7] = Default::default();
        let [q, k, v] = self.project(layer, &norm1, (&sequences.rope, &sequences.positions), &mut low);
        let mut attended = vec![0.0; q.len()];
        let mut lse = vec![0.0; q.len() / self.config.head_dim];
        ops::attention_forward(&mut attended, &mut lse, &q, &k, &v, &sequences.cu_seqlens, self.attention_dims());
        let AfterAttention { middle, rstd2, norm2, gate, up, gated } =
            self.after_attention(layer, x, &attended, &mut low);
        Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low }
    }

    /// `dx` `[T, H]`: gradient of the layer's output on entry, of its input on return, unless nothing `below`
    /// wants it.
    #[expect(clippy::too_many_arguments, reason = "the way back has the operands of the way there and its own")]
    fn layer_backward(
        &self,
        layer: &Layer,
        dx: &mut [f32],
        below: bool,
        input: &[f32],
        saved: Saved,
        sequences: &Sequences,
        grads: &mut Gradients,
    ) {
        let Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low } = saved;
        let linears = &layer.linears;
        let [norm1_at, norm2_at] = [0, 1].map(|which| layer.trained.map(|at| at[which]));

        let mut dgated = vec![0.0; gated.len()];
        linears[DOWN].backward(self, grads, Some((&mut dgated, false)), dx, &gated, &low[DOWN]);
        let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; up.len()]);
        ops::swiglu_backward(&mut dgate, &mut dup, &dgated, &gate, &up);
        drop((dgated, gated, gate, up));
        let mut dnorm = vec![0.0; dx.len()];
        linears[GATE].backward(self, grads, Some((&mut dnorm, false)), &dgate, &norm2, &low[GATE]);
        linears[UP].backward(self, grads, Some((&mut dnorm, true)), &dup, &norm2, &low[UP]);
        drop((dgate, dup, norm2));
        self.norm_backward(dx, norm2_at, &dnorm, &middle, &rstd2, &layer.norm2, grads);

        let mut dattended = vec![0.0; attended.len()];
        linears[O].backward(self, grads, Some((&mut dattended, false)), dx, &attended, &low[O]);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        ops::attention_backward(
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
            self.attention_dims(),
        );
        ops::rope(&mut dq, self.config.num_attention_heads, &sequences.rope, &sequences.positions, true);
        ops::rope(&mut dk, self.config.num_key_value_heads, &sequences.rope, &sequences.positions, true);
        let below = below || norm1_at.is_some();
        for (which, dy) in [(Q, &dq), (K, &dk), (V, &dv)] {
            let dn = below.then_some((&mut dnorm[..], which != Q));
            linears[which].backward(self, grads, dn, dy, &norm1, &low[which]);
        }
        if below {
            self.norm_backward(dx, norm1_at, &dnorm, input, &rstd1, &layer.norm1, grads);
        }
    }

    /// Adds the gradient of a norm's input to `dx` and, if it is trained, of its weight to `grads`.
    #[expect(clippy::too_many_arguments, reason = "the operands of the op and the place of the weight")]
    fn norm_backward(
        &self,
        dx: &mut [f32],
        at: Option<usize>,
        dy: &[f32],
        x: &[f32],
        rstd: &[f32],
        weight: &[f32],
        grads: &mut Gradients,
    ) {
        let dw = at.map(|at| grads.values[at].as_mut_slice());
        ops::rmsnorm_backward(dx, dw, dy, x, weight, rstd, true);
    }

    fn head_weight(&self) -> &Matrix {
        self.head.weight.as_ref().unwrap_or(&self.embed)
    }

    fn head_lora(&self) -> Option<HeadLora<'_>> {
        self.lora_of(&self.head).filter(|_| self.adapter_on)
    }

    fn head_forward(&self, normed: &[f32], targets: &[u32], want: HeadWant) -> HeadForward {
        ops::head_logprob_forward(normed, self.head_weight(), self.head_lora(), targets, want)
    }

    /// Gradient of the normed rows `[R, H]`; those of head and adapter are added to `grads`.
    fn head_backward(
        &self,
        normed: &[f32],
        targets: &[u32],
        lse: &[f32],
        dlogprobs: &[f32],
        grads: &mut Gradients,
    ) -> Vec<f32> {
        let mut dnormed = vec![0.0; normed.len()];
        let mut wanted = HeadGradients::default();
        // A tied head adds to the gradient of the embedding.
        let weight = self.head.trained.or(self.embed_trained.filter(|_| self.head.weight.is_none()));
        if let Some(LoraSlot { at, .. }) = self.head.lora {
            let (a, b) = grads.values.split_at_mut(at + 1);
            wanted.lora = Some((&mut a[at], &mut b[0]));
        } else if let Some(at) = weight {
            wanted.weight = Some(&mut grads.values[at]);
        }
        ops::head_logprob_backward(
            &mut dnormed,
            wanted,
            dlogprobs,
            normed,
            self.head_weight(),
            self.head_lora(),
            targets,
            lse,
        );
        dnormed
    }
}

/// What [`Model::after_attention`] computed on the way.
pub(super) struct AfterAttention {
    middle: Vec<f32>,
    rstd2: Vec<f32>,
    norm2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    gated: Vec<f32>,
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
