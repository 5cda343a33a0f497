//! Decoding, written once: prompts to their keys and values, and one token further for all completions. Where keys and
//! values lie is the place's business: [`super::host_decode`], [`super::device_decode`].
//!
//! Shapes: B completions, V vocabulary.

use super::batch::Batch;
use super::decoder::Decoder;
use super::family::{DOWN, GATE, K, O, Q, UP, V};
use super::place::{Place, Product};

/// Rows whose logits are made at once.
pub(crate) const LOGIT_ROWS: usize = 256;

/// The buffers of one step, B rows each.
pub(crate) struct StepRows<P: Place> {
    pub x: P::Values,
    pub norm: P::Values,
    pub rstd: P::Floats,
    pub q: P::Values,
    pub k: P::Values,
    pub v: P::Values,
    pub attended: P::Values,
    pub gate: P::Values,
    pub up: P::Values,
    pub gated: P::Values,
    /// A x of an adapter, of the largest rank; absent without one.
    pub low: Option<P::Values>,
    /// `[B, V]`
    pub logits: P::Values,
}

/// Keeps the keys and values of a layer's rows, and attends.
pub(crate) type Attend<'a, P> = dyn FnMut(usize, &mut StepRows<P>) -> Result<(), <P as Place>::Error> + 'a;

/// Takes a layer's keys and values.
pub(crate) type Keep<'k, P> =
    dyn FnMut(usize, &<P as Place>::Values, &<P as Place>::Values) -> Result<(), <P as Place>::Error> + 'k;

impl<P: Place> StepRows<P> {
    /// Room for `rows` completions.
    pub fn new(model: &Decoder<P>, rows: usize) -> Result<StepRows<P>, P::Error> {
        let (place, config, rank) = (&model.place, &model.config, model.rank());
        let values = |width: usize| place.values(rows * width);
        Ok(StepRows {
            x: values(config.hidden_size)?,
            norm: values(config.hidden_size)?,
            rstd: place.floats(rows)?,
            q: values(config.query_size())?,
            k: values(config.key_size())?,
            v: values(config.key_size())?,
            attended: values(config.query_size())?,
            gate: values(config.intermediate_size)?,
            up: values(config.intermediate_size)?,
            gated: values(config.intermediate_size)?,
            low: (rank > 0).then(|| values(rank)).transpose()?,
            logits: values(config.vocab_size)?,
        })
    }
}

impl<P: Place> Decoder<P> {
    /// Runs one token of each row to its logits. `attend` writes the rows' keys and values and what they attend to.
    /// On a device nothing is allocated and nothing copied, so that it can be captured; `attend` takes care of that too.
    pub(crate) fn run_tokens(
        &self,
        rows: &mut StepRows<P>,
        ids: &P::Ids,
        positions: &P::Ids,
        angles: &P::Angles,
        attend: &mut Attend<P>,
    ) -> Result<(), P::Error> {
        let (place, config) = (&self.place, &self.config);
        let eps = config.rms_norm_eps;
        let linear = |product: Product<P>, y: &mut P::Values, x: &P::Values, low: &Option<P::Values>, add: bool| {
            place.linear_of_step(y, low.as_ref(), x, product, add)
        };
        place.embed(&mut rows.x, self.matrix(&self.embed), ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let [q, k, v, o, gate, up, down] =
                [Q, K, V, O, GATE, UP, DOWN].map(|which| self.product(&layer.linears[which]));
            place.rmsnorm(&mut rows.norm, &mut rows.rstd, &rows.x, self.vector(&layer.norms[0]), eps)?;
            place.linears_of_step([&mut rows.q, &mut rows.k, &mut rows.v], rows.low.as_ref(), &rows.norm, [q, k, v])?;
            place.rope(&mut rows.q, config.num_attention_heads, angles, positions, false)?;
            place.rope(&mut rows.k, config.num_key_value_heads, angles, positions, false)?;
            attend(i, rows)?;
            linear(o, &mut rows.x, &rows.attended, &rows.low, true)?;
            place.rmsnorm(&mut rows.norm, &mut rows.rstd, &rows.x, self.vector(&layer.norms[1]), eps)?;
            place.linears_of_step([&mut rows.gate, &mut rows.up], rows.low.as_ref(), &rows.norm, [gate, up])?;
            place.swiglu(&mut rows.gated, &rows.gate, &rows.up)?;
            linear(down, &mut rows.x, &rows.gated, &rows.low, true)?;
        }
        place.rmsnorm(&mut rows.norm, &mut rows.rstd, &rows.x, self.vector(&self.norm), eps)?;
        linear(self.product(&self.head), &mut rows.logits, &rows.norm, &rows.low, false)
    }

    /// Runs packed prompts, handing every layer's keys and values to `keep`. Returns the logits after each,
    /// `[prompts, V]`.
    pub(crate) fn run_prompts(
        &self,
        prompts: &[&[u32]],
        angles: P::Angles,
        keep: &mut Keep<P>,
    ) -> Result<P::Values, P::Error> {
        let lengths: Vec<usize> = prompts.iter().map(|ids| ids.len()).collect();
        let last = |end: &mut usize, length: &usize| {
            *end += length;
            Some(*end - 1)
        };
        let rows: Vec<usize> = lengths.iter().scan(0, last).collect();
        let ids = prompts.concat();
        let inputs = self.place.inputs(&Batch { ids: &ids, lengths: &lengths, rows: &rows, targets: &[] }, angles)?;
        let x = self.stream(&inputs, ids.len(), &mut |layers, _, saved| match saved {
            Some(saved) => keep(layers - 1, &saved.k, &saved.v),
            None => Ok(()),
        })?;
        self.logits_of(&x, &inputs.rows, rows.len())
    }

    /// `[count, V]` of some rows of the residual stream.
    pub(crate) fn logits_of(&self, x: &P::Values, rows: &P::Ids, count: usize) -> Result<P::Values, P::Error> {
        let selected = self.select(x, rows, count)?;
        let (normed, _) = self.norm(&selected, &self.norm, count)?;
        let mut logits = self.place.values(count * self.config.vocab_size)?;
        self.place.linear_of_step(&mut logits, None, &normed, self.product(&self.head), false)?;
        Ok(logits)
    }

    /// The logits of every token of one sequence, `[T, V]`, a tile of tokens at a time: for comparisons, never for
    /// training.
    pub(crate) fn sequence_logits(&self, ids: &[u32]) -> Result<Vec<f32>, P::Error> {
        let x = self.stream(&self.inputs_of(ids)?, ids.len(), &mut |_, _, _| Ok(()))?;
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        let mut all = Vec::with_capacity(ids.len() * self.config.vocab_size);
        for rows in rows.chunks(LOGIT_ROWS) {
            all.extend(self.place.wide(&self.logits_of(&x, &self.place.ids(rows)?, rows.len())?)?);
        }
        Ok(all)
    }

    /// The residual stream of one sequence as embedded, after each layer, and after the final norm:
    /// layers + 2 times `[T, H]`.
    pub(crate) fn sequence_states(&self, ids: &[u32]) -> Result<Vec<Vec<f32>>, P::Error> {
        let mut states = Vec::new();
        let x = self.stream(&self.inputs_of(ids)?, ids.len(), &mut |_, x, _| {
            states.push(self.place.wide(x)?);
            Ok(())
        })?;
        states.push(self.place.wide(&self.norm(&x, &self.norm, ids.len())?.0)?);
        Ok(states)
    }
}
