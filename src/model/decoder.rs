//! A dense decoder: what it computes, and the gradient of it, written once over the operations that every place offers.
//!
//! ```text
//! x = embed[ids]
//! each layer:  n = rmsnorm(x);  q, k, v = linears of n, q and k turned by RoPE
//!              x += o_proj(attention(q, k, v))
//!              n = rmsnorm(x);  x += down_proj(silu(gate_proj n) * up_proj n)
//! log p(target | row) = log softmax(lm_head(rmsnorm(x[row])))[target]
//! ```
//!
//! Sequences are packed one after another and never padded; attention takes their lengths, positions start
//! at 0 in each. Everything a row computes depends on its own sequence only, to the bit, so that packing,
//! recomputing and the number of threads change nothing.
//!
//! **What is trained** is a flat list of [`Parameter`]s: the halves of an adapter, or every weight. Whatever is
//! computed with is frozen, or knows its place in that list. Frozen weights get no gradient, and the backward pass
//! ends at the first layer that has something to train.
//!
//! Shapes: T tokens of all sequences, R rows, H hidden, V vocabulary.

use super::batch::{Batch, Extent};
use super::config::Config;
use super::family::{DOWN, GATE, K, LINEARS, O, Q, UP, V};
use super::lora::LoraSpec;
use super::parameter::{Gradients, Parameter};
use super::place::{Factor, Inputs, Lora, Moment, Place, Places, Product};
use super::policy::Policy;

/// A model where it computes.
pub struct Decoder<P: Place> {
    /// Its shape.
    pub config: Config,
    pub(crate) place: P,
    /// `[V, H]`; also the head when that is tied.
    pub(super) embed: Held<P::Matrix>,
    pub(super) layers: Vec<Layer<P>>,
    pub(super) norm: Held<P::Floats>,
    pub(super) head: Linear<P>,
    pub(super) params: Vec<Parameter<P::Floats>>,
    /// Of each trained tensor, what products read in place of its values.
    pub(super) copies: Vec<Option<P::Matrix>>,
    pub(super) trained: Trained,
    pub(super) adapter_on: bool,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Trained {
    Nothing,
    Adapter(LoraSpec),
    Everything,
}

/// What is computed with: frozen, or the trained tensor in this place.
pub(super) enum Held<T> {
    Frozen(T),
    Trained(usize),
}

impl<T> Held<T> {
    pub fn place(&self) -> Option<usize> {
        match self {
            Held::Frozen(_) => None,
            Held::Trained(at) => Some(*at),
        }
    }
}

/// A linear layer: frozen or trained weight, with or without bias and adapter.
pub(super) struct Linear<P: Place> {
    /// `model.layers.0.self_attn.q_proj`
    pub name: String,
    /// `[out, in]`
    pub shape: [usize; 2],
    /// Absent for a tied head, which uses the embedding.
    pub weight: Option<Held<P::Matrix>>,
    pub bias: Option<Held<P::Floats>>,
    /// The active adapter.
    pub lora: Option<LoraSlot>,
}

#[derive(Clone, Copy)]
pub(super) struct LoraSlot {
    /// Place of A among the parameters; B is the next.
    pub at: usize,
    pub rank: usize,
    pub scale: f32,
}

pub(super) struct Layer<P: Place> {
    /// Before attention, and before the MLP.
    pub norms: [Held<P::Floats>; 2],
    /// In the order of `family::TARGETS`.
    pub linears: [Linear<P>; LINEARS],
}

impl<P: Place> Layer<P> {
    fn trains(&self) -> bool {
        let weight = |linear: &Linear<P>| linear.weight.as_ref().is_some_and(|weight| weight.place().is_some());
        self.linears.iter().any(|linear| linear.lora.is_some() || weight(linear))
    }
}

/// What the backward pass needs of the forward pass.
pub struct Tape<P: Place> {
    pub(super) inputs: Inputs<P>,
    extent: Extent,
    /// From the first trained layer on.
    layers: Vec<LayerTape<P>>,
    /// `[R, H]` the selected rows before and after the final norm, and its scales `[R]`.
    selected: P::Values,
    normed: P::Values,
    rstd: P::Floats,
    /// `[R]` log-sum-exp of the logits.
    lse: P::Floats,
}

struct LayerTape<P: Place> {
    input: Input<P>,
    /// Absent where it is computed again.
    saved: Option<Saved<P>>,
}

/// The input of a layer between forward and backward pass.
enum Input<P: Place> {
    Here(P::Values),
    Parked(P::Parked),
    Arriving(P::Arriving),
}

impl<P: Place> Input<P> {
    /// On its way here, if it is not here.
    fn start(self, place: &P) -> Result<Input<P>, P::Error> {
        Ok(match self {
            Input::Parked(parked) => Input::Arriving(place.fetch(parked)?),
            there => there,
        })
    }

    fn here(self, place: &P) -> Result<P::Values, P::Error> {
        Ok(match self {
            Input::Here(values) => values,
            Input::Parked(parked) => place.arrived(place.fetch(parked)?),
            Input::Arriving(arriving) => place.arrived(arriving),
        })
    }
}

/// Starts to bring the input of the layer whose turn is next in the backward pass.
fn start_next<P: Place>(place: &P, layers: &mut Vec<LayerTape<P>>) -> Result<(), P::Error> {
    if let Some(LayerTape { input, saved }) = layers.pop() {
        layers.push(LayerTape { input: input.start(place)?, saved });
    }
    Ok(())
}

/// The activations inside one layer.
pub(super) struct Saved<P: Place> {
    rstd1: P::Floats,
    norm1: P::Values,
    q: P::Values,
    pub k: P::Values,
    pub v: P::Values,
    attended: P::Values,
    lse: P::Floats,
    middle: P::Values,
    rstd2: P::Floats,
    norm2: P::Values,
    gate: P::Values,
    up: P::Values,
    gated: P::Values,
    /// `[T, rank]` A x of each linear's adapter.
    low: [Option<P::Values>; LINEARS],
}

/// What linears give, and A x of those with an adapter.
type Adapted<P, const N: usize> = ([<P as Place>::Values; N], [Option<<P as Place>::Values>; N]);

type AdaptedOne<P> = (<P as Place>::Values, Option<<P as Place>::Values>);

impl<P: Place> Decoder<P> {
    /// The forward pass: log-probs of the targets, and what [`Decoder::backward_pass`] needs.
    pub(super) fn forward_pass(
        &self,
        inputs: Inputs<P>,
        extent: Extent,
        policy: Policy,
    ) -> Result<(P::Floats, Tape<P>), P::Error> {
        let place = &self.place;
        let first = self.first_trained_layer();
        let mut layers = Vec::new();
        let mut x = self.embed_ids(&inputs.ids, extent.tokens)?;
        for (i, layer) in self.layers.iter().enumerate() {
            place.enters(Moment::Layer);
            if i < first {
                x = self.layer_forward(layer, &x, &inputs, extent.tokens)?.0;
                continue;
            }
            let (y, saved, input);
            if policy.offload {
                // The copy runs beside the layer that reads the same.
                let leaving = place.leave(x)?;
                (y, saved) = self.layer_forward(layer, place.leaving(&leaving), &inputs, extent.tokens)?;
                input = Input::Parked(place.left(leaving));
            } else {
                (y, saved) = self.layer_forward(layer, &x, &inputs, extent.tokens)?;
                input = Input::Here(x);
            }
            layers.push(LayerTape { input, saved: (!policy.recompute.of(i)).then_some(saved) });
            x = y;
        }
        place.enters(Moment::Head);
        let selected = self.select(&x, &inputs.rows, extent.rows)?;
        drop(x);
        let (normed, rstd) = self.norm(&selected, &self.norm, extent.rows)?;
        let [logprobs, lse] = place.head(&normed, &inputs, self.product(&self.head))?;
        Ok((logprobs, Tape { inputs, extent, layers, selected, normed, rstd, lse }))
    }

    /// Log-probs of the targets, keeping nothing.
    pub(super) fn logprobs_of(&self, inputs: &Inputs<P>, extent: Extent) -> Result<P::Floats, P::Error> {
        let x = self.stream(inputs, extent.tokens, &mut |_, _, _| Ok(()))?;
        self.place.enters(Moment::Head);
        let selected = self.select(&x, &inputs.rows, extent.rows)?;
        drop(x);
        let (normed, _) = self.norm(&selected, &self.norm, extent.rows)?;
        let [logprobs, _] = self.place.head(&normed, inputs, self.product(&self.head))?;
        Ok(logprobs)
    }

    /// The residual stream after the last layer, `[T, H]`. `seen` is shown it as embedded (without a layer) and after
    /// each layer, with what was saved of that.
    pub(super) fn stream(
        &self,
        inputs: &Inputs<P>,
        tokens: usize,
        seen: &mut Seen<'_, P>,
    ) -> Result<P::Values, P::Error> {
        let mut x = self.embed_ids(&inputs.ids, tokens)?;
        seen(0, &x, None)?;
        for (i, layer) in self.layers.iter().enumerate() {
            self.place.enters(Moment::Layer);
            let (y, saved) = self.layer_forward(layer, &x, inputs, tokens)?;
            seen(i + 1, &y, Some(&saved))?;
            x = y;
        }
        Ok(x)
    }

    /// The backward pass: adds to `sums` the gradient of the sum of the log-probs, each times the slope that the inputs
    /// hold. Returns the gradient of what was embedded, if that is trained: which rows of the table it belongs to is no
    /// matter of shapes, so the rest is [`Decoder::embed_backward`]'s.
    pub(super) fn backward_pass(&self, tape: Tape<P>, sums: &mut [P::Floats]) -> Result<Option<P::Values>, P::Error> {
        assert_eq!(sums.len(), self.params.len(), "gradients of other parameters");
        assert!(self.adapter_on, "the adapter was off");
        let Tape { inputs, extent, mut layers, selected, normed, rstd, lse } = tape;
        let (place, hidden) = (&self.place, self.config.hidden_size);
        let first = self.first_trained_layer();
        place.enters(Moment::Head);
        start_next(place, &mut layers)?;
        let mut dnormed = place.values(extent.rows * hidden)?;
        let (product, places) = (self.product(&self.head), self.places(&self.head));
        place.head_backward(sums, places, &mut dnormed, &normed, &lse, &inputs, product)?;
        if first >= self.layers.len() && self.norm.place().is_none() {
            return Ok(None);
        }
        let mut dselected = place.values(extent.rows * hidden)?;
        self.norm_backward(&mut dselected, &self.norm, &dnormed, &selected, &rstd, false, sums)?;
        place.enters(Moment::Back);
        let mut dx = place.zeros(extent.tokens * hidden)?;
        place.scatter(&mut dx, &dselected, &inputs.rows, hidden)?;
        for i in (first..self.layers.len()).rev() {
            let LayerTape { input, saved } = layers.pop().expect("one tape per layer");
            let input = input.here(place)?;
            start_next(place, &mut layers)?;
            let layer = &self.layers[i];
            let saved = match saved {
                Some(saved) => saved,
                None => self.layer_forward(layer, &input, &inputs, extent.tokens)?.1,
            };
            let below = i > first || self.embed.place().is_some();
            self.layer_backward(layer, &mut dx, below, &input, saved, &inputs, extent.tokens, sums)?;
        }
        Ok(self.embed.place().map(|_| dx))
    }

    /// Adds the gradient of what was embedded to that of the table.
    pub(super) fn embed_backward(&self, dx: &P::Values, ids: &[u32], sums: &mut [P::Floats]) -> Result<(), P::Error> {
        self.embed.place().map_or(Ok(()), |at| self.place.embed_backward(&mut sums[at], dx, ids))
    }

    /// Layers below it have nothing to train.
    pub(super) fn first_trained_layer(&self) -> usize {
        self.layers.iter().position(Layer::trains).unwrap_or(self.layers.len())
    }

    /// `[T, H]`
    fn embed_ids(&self, ids: &P::Ids, tokens: usize) -> Result<P::Values, P::Error> {
        let mut x = self.place.values(tokens * self.config.hidden_size)?;
        self.place.embed(&mut x, self.matrix(&self.embed), ids)?;
        Ok(x)
    }

    /// `[R, H]`
    pub(super) fn select(&self, x: &P::Values, rows: &P::Ids, count: usize) -> Result<P::Values, P::Error> {
        let hidden = self.config.hidden_size;
        let mut selected = self.place.values(count * hidden)?;
        self.place.gather(&mut selected, x, rows, hidden)?;
        Ok(selected)
    }

    /// Of `rows` rows of the residual stream, normed, and their scales.
    pub(super) fn norm(
        &self,
        x: &P::Values,
        weight: &Held<P::Floats>,
        rows: usize,
    ) -> Result<(P::Values, P::Floats), P::Error> {
        let (mut y, mut rstd) = (self.place.values(rows * self.config.hidden_size)?, self.place.floats(rows)?);
        self.place.rmsnorm(&mut y, &mut rstd, x, self.vector(weight), self.config.rms_norm_eps)?;
        Ok((y, rstd))
    }

    /// Some linears of one input.
    fn linears<const N: usize>(
        &self,
        layer: &Layer<P>,
        which: [usize; N],
        x: &P::Values,
        rows: usize,
    ) -> Result<Adapted<P, N>, P::Error> {
        let linears = which.map(|which| &layer.linears[which]);
        let mut ys = every(linears, |linear| self.place.values(rows * linear.shape[0]))?;
        let mut lows = every(linears, |linear| match linear.lora.filter(|_| self.adapter_on) {
            Some(LoraSlot { rank, .. }) => self.place.values(rows * rank).map(Some),
            None => Ok(None),
        })?;
        self.place.linears(
            ys.each_mut(),
            lows.each_mut().map(Option::as_mut),
            x,
            linears.map(|one| self.product(one)),
        )?;
        Ok((ys, lows))
    }

    /// One linear.
    fn linear(&self, layer: &Layer<P>, which: usize, x: &P::Values, rows: usize) -> Result<AdaptedOne<P>, P::Error> {
        let ([y], [low]) = self.linears(layer, [which], x, rows)?;
        Ok((y, low))
    }

    /// The layer's output, and the activations inside it, of its input `[T, H]`.
    fn layer_forward(
        &self,
        layer: &Layer<P>,
        x: &P::Values,
        inputs: &Inputs<P>,
        tokens: usize,
    ) -> Result<(P::Values, Saved<P>), P::Error> {
        let (place, config) = (&self.place, &self.config);
        // Before what is inside, or in a region it would leave a hole when that goes.
        let mut y = place.values(tokens * config.hidden_size)?;
        let (norm1, rstd1) = self.norm(x, &layer.norms[0], tokens)?;
        let ([mut q, mut k, v], [low_q, low_k, low_v]) = self.linears(layer, [Q, K, V], &norm1, tokens)?;
        place.rope(&mut q, config.num_attention_heads, &inputs.angles, &inputs.positions, false)?;
        place.rope(&mut k, config.num_key_value_heads, &inputs.angles, &inputs.positions, false)?;
        let mut attended = place.values(tokens * config.query_size())?;
        let mut lse = place.floats(tokens * config.num_attention_heads)?;
        place.attention(&mut attended, &mut lse, [&q, &k, &v], inputs, config.heads())?;

        let (mut middle, low_o) = self.linear(layer, O, &attended, tokens)?;
        place.add(&mut middle, x)?;
        let (norm2, rstd2) = self.norm(&middle, &layer.norms[1], tokens)?;
        let ([gate, up], [low_gate, low_up]) = self.linears(layer, [GATE, UP], &norm2, tokens)?;
        let mut gated = place.values(tokens * config.intermediate_size)?;
        place.swiglu(&mut gated, &gate, &up)?;
        let down = &layer.linears[DOWN];
        let mut low_down = match down.lora.filter(|_| self.adapter_on) {
            Some(LoraSlot { rank, .. }) => Some(place.values(tokens * rank)?),
            None => None,
        };
        place.linears([&mut y], [low_down.as_mut()], &gated, [self.product(down)])?;
        place.add(&mut y, &middle)?;
        let low = [low_q, low_k, low_v, low_o, low_gate, low_up, low_down];
        Ok((y, Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low }))
    }

    /// `dx` `[T, H]`: gradient of the layer's output on entry, of its input on return, unless nothing `below`
    /// wants it. The gradients of what is trained are added to `sums`.
    #[expect(clippy::too_many_arguments, reason = "the operands of the forward pass and those of the backward pass")]
    fn layer_backward(
        &self,
        layer: &Layer<P>,
        dx: &mut P::Values,
        below: bool,
        input: &P::Values,
        saved: Saved<P>,
        inputs: &Inputs<P>,
        tokens: usize,
        sums: &mut [P::Floats],
    ) -> Result<(), P::Error> {
        let Saved { rstd1, norm1, q, k, v, attended, lse, middle, rstd2, norm2, gate, up, gated, low } = saved;
        let (place, config) = (&self.place, &self.config);
        let (inner, width, kv) = (config.intermediate_size, config.query_size(), config.key_size());
        let back = |which: usize,
                    dn: Option<(&mut P::Values, bool)>,
                    dy: &P::Values,
                    x: &P::Values,
                    sums: &mut [P::Floats]|
         -> Result<(), P::Error> {
            let linear = &layer.linears[which];
            let low = low[which].as_ref();
            place.linear_backward(sums, self.places(linear), dn, dy, x, low, self.product(linear))
        };

        let mut dgated = place.values(tokens * inner)?;
        back(DOWN, Some((&mut dgated, false)), dx, &gated, sums)?;
        let (mut dgate, mut dup) = (place.values(tokens * inner)?, place.values(tokens * inner)?);
        place.swiglu_backward(&mut dgate, &mut dup, &dgated, &gate, &up)?;
        drop((dgated, gated, gate, up));
        let mut dnorm = place.values(tokens * config.hidden_size)?;
        back(GATE, Some((&mut dnorm, false)), &dgate, &norm2, sums)?;
        back(UP, Some((&mut dnorm, true)), &dup, &norm2, sums)?;
        drop((dgate, dup, norm2));
        self.norm_backward(dx, &layer.norms[1], &dnorm, &middle, &rstd2, true, sums)?;

        let mut dattended = place.values(tokens * width)?;
        back(O, Some((&mut dattended, false)), dx, &attended, sums)?;
        let mut dqkv = [place.values(tokens * width)?, place.values(tokens * kv)?, place.values(tokens * kv)?];
        let heads = config.heads();
        place.attention_backward(dqkv.each_mut(), &dattended, [&q, &k, &v], &attended, &lse, inputs, heads)?;
        let [dq, dk, _] = &mut dqkv;
        place.rope(dq, heads.heads, &inputs.angles, &inputs.positions, true)?;
        place.rope(dk, heads.kv_heads, &inputs.angles, &inputs.positions, true)?;
        let below = below || layer.norms[0].place().is_some();
        for (which, dy) in [Q, K, V].into_iter().zip(&dqkv) {
            let dn = below.then_some((&mut dnorm, which != Q));
            back(which, dn, dy, &norm1, sums)?;
        }
        if below {
            self.norm_backward(dx, &layer.norms[0], &dnorm, input, &rstd1, true, sums)?;
        }
        Ok(())
    }

    /// Adds the gradient of a norm's input to `dx`, or with `add` off writes it, and that of its weight to `sums`
    /// if it is trained.
    #[expect(clippy::too_many_arguments, reason = "the operands of the op and the place of the weight")]
    fn norm_backward(
        &self,
        dx: &mut P::Values,
        weight: &Held<P::Floats>,
        dy: &P::Values,
        x: &P::Values,
        rstd: &P::Floats,
        add: bool,
        sums: &mut [P::Floats],
    ) -> Result<(), P::Error> {
        let dw = weight.place().map(|at| &mut sums[at]);
        self.place.rmsnorm_backward(dx, dw, dy, x, self.vector(weight), rstd, add)
    }

    pub(super) fn matrix<'h>(&'h self, held: &'h Held<P::Matrix>) -> &'h P::Matrix {
        match held {
            Held::Frozen(matrix) => matrix,
            Held::Trained(at) => self.copies[*at].as_ref().expect("a trained matrix has what products read"),
        }
    }

    pub(super) fn vector<'h>(&'h self, held: &'h Held<P::Floats>) -> &'h P::Floats {
        match held {
            Held::Frozen(vector) => vector,
            Held::Trained(at) => &self.params[*at].value,
        }
    }

    /// A linear with the active adapter, unless that is off.
    pub(super) fn product<'h>(&'h self, linear: &'h Linear<P>) -> Product<'h, P> {
        let factor = |at: usize| Factor { value: &self.params[at].value, copy: self.copies[at].as_ref() };
        let lora = linear.lora.filter(|_| self.adapter_on);
        Product {
            weight: self.matrix(linear.weight.as_ref().unwrap_or(&self.embed)),
            bias: linear.bias.as_ref().map(|bias| self.vector(bias)),
            lora: lora.map(|LoraSlot { at, rank, scale }| Lora { a: factor(at), b: factor(at + 1), rank, scale }),
            out: linear.shape[0],
            input: linear.shape[1],
        }
    }

    /// Where its trained tensors are. A tied head adds to the gradient of the embedding.
    fn places(&self, linear: &Linear<P>) -> Places {
        Places {
            weight: linear.weight.as_ref().unwrap_or(&self.embed).place(),
            bias: linear.bias.as_ref().and_then(Held::place),
            lora: linear.lora.map(|lora| lora.at),
        }
    }

    /// Every linear in order, the head last.
    pub(super) fn linears_in_order(&self) -> impl Iterator<Item = &Linear<P>> {
        self.layers.iter().flat_map(|layer| &layer.linears).chain([&self.head])
    }

    /// The largest rank of the active adapter; 0 without one.
    pub(crate) fn rank(&self) -> usize {
        self.linears_in_order().filter_map(|linear| linear.lora).map(|lora| lora.rank).max().unwrap_or(0)
    }

    /// Zeros for every trained tensor.
    pub fn zero_gradients(&self) -> Result<Gradients<P::Floats>, P::Error> {
        let lengths = self.params.iter().map(|param| param.values());
        let values = lengths.map(|len| self.place.zero_floats(len)).collect::<Result<_, _>>()?;
        Ok(Gradients { values })
    }

    /// What `batch` gives to a step.
    pub(super) fn inputs(&self, batch: &Batch) -> Result<(Inputs<P>, Extent), P::Error> {
        batch.check();
        let extent = Extent::of(batch);
        let angles = self.place.angles(&self.config, extent.longest)?;
        Ok((self.place.inputs(batch, angles)?, extent))
    }

    /// What one sequence gives, of which nothing is asked.
    pub(super) fn inputs_of(&self, ids: &[u32]) -> Result<Inputs<P>, P::Error> {
        Ok(self.inputs(&Batch { ids, lengths: &[ids.len()], rows: &[], targets: &[] })?.0)
    }

    /// The active adapter's rank, alpha and targets.
    pub fn lora(&self) -> Option<&LoraSpec> {
        match &self.trained {
            Trained::Adapter(spec) => Some(spec),
            _ => None,
        }
    }

    /// Whether every weight is trained.
    pub fn trains_everything(&self) -> bool {
        self.trained == Trained::Everything
    }

    /// The trained tensors: of the active adapter, or all. Empty for a model without either.
    pub fn params(&self) -> &[Parameter<P::Floats>] {
        &self.params
    }

    /// Number of trained values.
    pub fn trained_values(&self) -> usize {
        self.params.iter().map(|param| param.values()).sum()
    }

    /// With the active adapter off: the model beneath it, as DPO's reference.
    pub(super) fn without_adapter<R>(&mut self, work: impl FnOnce(&Self) -> R) -> R {
        self.adapter_on = false;
        let done = work(self);
        self.adapter_on = true;
        done
    }
}

/// Is shown a residual stream after this many layers, and what the last of them saved.
pub(super) type Seen<'s, P> =
    dyn FnMut(usize, &<P as Place>::Values, Option<&Saved<P>>) -> Result<(), <P as Place>::Error> + 's;

/// `make` of each, or the first that went wrong.
fn every<T: Copy, U, E, const N: usize>(of: [T; N], mut make: impl FnMut(T) -> Result<U, E>) -> Result<[U; N], E> {
    let mut made = Vec::with_capacity(N);
    for one in of {
        made.push(make(one)?);
    }
    Ok(made.try_into().unwrap_or_else(|_| unreachable!("one of each")))
}
