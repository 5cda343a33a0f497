//! Where a model computes: the operations of the architecture, offered by the host, by a CUDA device, and by a place that
//! only counts the memory that they take (`model::count`).
//!
//! Symbols: T tokens, R rows, H hidden, V vocabulary, r rank. Operations write what they are given first: `=` unless they
//! say that they add (`+=`). Room is asked for with [`Place::values`] and [`Place::floats`]; what is in it then is not
//! defined on a device, and zero elsewhere.

use super::batch::Batch;
use super::config::{Config, Heads};
use crate::problem::Problem;

/// Where a model computes.
pub trait Place: Sized {
    /// What can go wrong.
    type Error: Into<Problem>;
    /// Activations: f32 on the host, bf16 on a device.
    type Values;
    /// Norms, biases, trained values, log-probs, gradients: f32.
    type Floats;
    /// A weight as products read it.
    type Matrix;
    /// Token ids, positions, rows.
    type Ids;
    /// Where sequences begin.
    type Starts;
    /// What holds the parts of [`Inputs`].
    type Whole;
    /// Angles of positions.
    type Angles;
    /// An input of a layer on its way out of this place's memory, outside, and on its way back.
    type Leaving;
    /// Outside.
    type Parked;
    /// On its way back.
    type Arriving;

    /// Room for `len` activations.
    fn values(&self, len: usize) -> Result<Self::Values, Self::Error>;
    /// `len` activations that are zero.
    fn zeros(&self, len: usize) -> Result<Self::Values, Self::Error> {
        self.values(len)
    }
    /// Room for `len` floats.
    fn floats(&self, len: usize) -> Result<Self::Floats, Self::Error>;
    /// `len` floats that are zero.
    fn zero_floats(&self, len: usize) -> Result<Self::Floats, Self::Error> {
        self.floats(len)
    }
    /// What follows belongs to `moment`. For the place that counts.
    fn enters(&self, _moment: Moment) {}

    /// The angles of at least this many positions.
    fn angles(&self, config: &Config, positions: usize) -> Result<Self::Angles, Self::Error>;
    /// What a batch gives to a step.
    fn inputs(&self, batch: &Batch, angles: Self::Angles) -> Result<Inputs<Self>, Self::Error>;
    /// Ids of the host.
    fn ids(&self, ids: &[u32]) -> Result<Self::Ids, Self::Error>;
    /// Activations for the host, in f32.
    fn wide(&self, values: &Self::Values) -> Result<Vec<f32>, Self::Error>;
    /// The slopes of the log-probs, for the backward pass.
    fn slopes(&self, inputs: &mut Inputs<Self>, dlogprobs: &[f32]) -> Result<(), Self::Error>;

    /// Begins to move an input of a layer out; it can be read until [`Place::left`].
    fn leave(&self, values: Self::Values) -> Result<Self::Leaving, Self::Error>;
    /// What leaves.
    fn leaving<'l>(&self, leaving: &'l Self::Leaving) -> &'l Self::Values;
    /// Ends it.
    fn left(&self, leaving: Self::Leaving) -> Self::Parked;
    /// Begins to bring it back.
    fn fetch(&self, parked: Self::Parked) -> Result<Self::Arriving, Self::Error>;
    /// Ends that.
    fn arrived(&self, arriving: Self::Arriving) -> Self::Values;

    /// `y[T, H]` = rows of the table.
    fn embed(&self, y: &mut Self::Values, table: &Self::Matrix, ids: &Self::Ids) -> Result<(), Self::Error>;
    /// `dw[V, H]` += the gradient of what was embedded.
    fn embed_backward(&self, dw: &mut Self::Floats, dy: &Self::Values, ids: &[u32]) -> Result<(), Self::Error>;
    /// `y` = x, normed by rows; `rstd` = their scales.
    fn rmsnorm(
        &self,
        y: &mut Self::Values,
        rstd: &mut Self::Floats,
        x: &Self::Values,
        weight: &Self::Floats,
        eps: f32,
    ) -> Result<(), Self::Error>;
    /// `dx` = (or with `add` +=) and, if it is wanted, `dw` +=.
    #[expect(clippy::too_many_arguments, reason = "the operands of the op")]
    fn rmsnorm_backward(
        &self,
        dx: &mut Self::Values,
        dw: Option<&mut Self::Floats>,
        dy: &Self::Values,
        x: &Self::Values,
        weight: &Self::Floats,
        rstd: &Self::Floats,
        add: bool,
    ) -> Result<(), Self::Error>;
    /// Linears of one input: each `y` =, and `low` = A x where there is an adapter, for rows that are tokens of
    /// sequences.
    fn linears<const N: usize>(
        &self,
        ys: [&mut Self::Values; N],
        lows: [Option<&mut Self::Values>; N],
        x: &Self::Values,
        products: [Product<'_, Self>; N],
    ) -> Result<(), Self::Error>;
    /// Linears of one input, for rows that are the last tokens of completions. `low` is scratch.
    fn linears_of_step<const N: usize>(
        &self,
        ys: [&mut Self::Values; N],
        low: Option<&Self::Values>,
        x: &Self::Values,
        products: [Product<'_, Self>; N],
    ) -> Result<(), Self::Error>;
    /// One of them, `y` += with `add`.
    fn linear_of_step(
        &self,
        y: &mut Self::Values,
        low: Option<&Self::Values>,
        x: &Self::Values,
        product: Product<'_, Self>,
        add: bool,
    ) -> Result<(), Self::Error>;
    /// `dx` =, or += where it says so, if it is wanted; the gradients of what is trained are added to `sums`.
    #[expect(clippy::too_many_arguments, reason = "gradients and their places, and what the forward pass was given")]
    fn linear_backward(
        &self,
        sums: &mut [Self::Floats],
        places: Places,
        dx: Option<(&mut Self::Values, bool)>,
        dy: &Self::Values,
        x: &Self::Values,
        low: Option<&Self::Values>,
        product: Product<'_, Self>,
    ) -> Result<(), Self::Error>;
    /// Turns the heads of x in place by their positions, or back.
    fn rope(
        &self,
        x: &mut Self::Values,
        heads: usize,
        angles: &Self::Angles,
        positions: &Self::Ids,
        inverse: bool,
    ) -> Result<(), Self::Error>;
    /// `y` = attention of each sequence, `lse` = its log-sum-exps.
    fn attention(
        &self,
        y: &mut Self::Values,
        lse: &mut Self::Floats,
        qkv: [&Self::Values; 3],
        inputs: &Inputs<Self>,
        heads: Heads,
    ) -> Result<(), Self::Error>;
    /// `dqkv` =.
    #[expect(clippy::too_many_arguments, reason = "the operands of the op")]
    fn attention_backward(
        &self,
        dqkv: [&mut Self::Values; 3],
        dy: &Self::Values,
        qkv: [&Self::Values; 3],
        y: &Self::Values,
        lse: &Self::Floats,
        inputs: &Inputs<Self>,
        heads: Heads,
    ) -> Result<(), Self::Error>;
    /// `y` = silu(gate) up.
    fn swiglu(&self, y: &mut Self::Values, gate: &Self::Values, up: &Self::Values) -> Result<(), Self::Error>;
    /// `dgate` =, `dup` =.
    fn swiglu_backward(
        &self,
        dgate: &mut Self::Values,
        dup: &mut Self::Values,
        dy: &Self::Values,
        gate: &Self::Values,
        up: &Self::Values,
    ) -> Result<(), Self::Error>;
    /// `x` += y.
    fn add(&self, x: &mut Self::Values, y: &Self::Values) -> Result<(), Self::Error>;
    /// `y[R, width]` = rows of x.
    fn gather(&self, y: &mut Self::Values, x: &Self::Values, rows: &Self::Ids, width: usize)
    -> Result<(), Self::Error>;
    /// Rows of `x`, which are zero, = those of y; no two are the same.
    fn scatter(
        &self,
        x: &mut Self::Values,
        y: &Self::Values,
        rows: &Self::Ids,
        width: usize,
    ) -> Result<(), Self::Error>;
    /// Log-probs of the targets `[R]`, and log-sum-exps, of normed rows. Logits are never in memory as a whole.
    fn head(
        &self,
        normed: &Self::Values,
        inputs: &Inputs<Self>,
        product: Product<'_, Self>,
    ) -> Result<[Self::Floats; 2], Self::Error>;
    /// `dnormed` =; the gradients of head and adapter are added to `sums`.
    #[expect(clippy::too_many_arguments, reason = "gradients and their places, and what the forward pass was given")]
    fn head_backward(
        &self,
        sums: &mut [Self::Floats],
        places: Places,
        dnormed: &mut Self::Values,
        normed: &Self::Values,
        lse: &Self::Floats,
        inputs: &Inputs<Self>,
        product: Product<'_, Self>,
    ) -> Result<(), Self::Error>;
}

/// What a step works at, for the place that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A layer. What is left of the one before is kept for the backward pass.
    Layer,
    /// The head.
    Head,
    /// A layer of the backward pass.
    Back,
}

/// What a step is given.
pub struct Inputs<P: Place> {
    /// `[T]`
    pub ids: P::Ids,
    /// `[R]`
    pub targets: P::Ids,
    /// `[R]` positions among the ids.
    pub rows: P::Ids,
    /// `[T]`, from 0 in each sequence.
    pub positions: P::Ids,
    /// Where sequences begin.
    pub starts: P::Starts,
    /// `[R]` of each row's log-prob, for the backward pass.
    pub slopes: P::Floats,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Of the positions.
    pub angles: P::Angles,
    /// Holds what the others are parts of.
    pub whole: P::Whole,
}

/// A linear layer as an operation takes it: `y = W x + b + scale B A x`.
pub struct Product<'a, P: Place> {
    /// W
    pub weight: &'a P::Matrix,
    /// b
    pub bias: Option<&'a P::Floats>,
    /// The active adapter.
    pub lora: Option<Lora<'a, P>>,
    /// Values of y.
    pub out: usize,
    /// Values of x.
    pub input: usize,
}

/// An adapter as an operation takes it.
pub struct Lora<'a, P: Place> {
    /// `[rank, in]`
    pub a: Factor<'a, P>,
    /// `[out, rank]`
    pub b: Factor<'a, P>,
    /// r
    pub rank: usize,
    /// alpha / rank
    pub scale: f32,
}

/// A trained matrix: its values, and as products read it where that is something else.
pub struct Factor<'a, P: Place> {
    /// In f32.
    pub value: &'a P::Floats,
    /// As products read it.
    pub copy: Option<&'a P::Matrix>,
}

// Derived they would ask the same of the place.
macro_rules! copied {
    ($($name:ident),*) => {$(
        impl<P: Place> Clone for $name<'_, P> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<P: Place> Copy for $name<'_, P> {}
    )*};
}
copied!(Factor, Lora, Product);

/// Where among the trained tensors those of a linear are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Places {
    /// The weight.
    pub weight: Option<usize>,
    /// The bias.
    pub bias: Option<usize>,
    /// The adapter's A; B is the next.
    pub lora: Option<usize>,
}

impl Places {
    /// The sums of both halves of the adapter.
    pub fn pair<'s, F>(&self, sums: &'s mut [F]) -> Option<(&'s mut F, &'s mut F)> {
        let at = self.lora?;
        let (a, b) = sums.split_at_mut(at + 1);
        Some((&mut a[at], &mut b[0]))
    }
}
