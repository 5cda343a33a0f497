//! What a training stage will need and do: memory, steps, tokens, bytes on disk.

use crate::data::{self, Limits, Record, Tokenizer};
use crate::model::Extent;
use crate::model::fit;
use crate::model::memory::{Plan, Trained, Work};
use crate::problem::Problem;
use crate::stage::forecast::needs::{Computes, Cut, Data, HALVE, MOST_TOKENS, Needs, Shape, Taking, shorten, untie};
use crate::stage::share::inputs::Storage;
use crate::stage::share::training::Spec;
use crate::train;

/// A training stage, as its parameters describe it.
pub struct TrainingForecast {
    /// What training kinds share.
    pub spec: Spec,
    /// How examples are cut, those of this kind's own keys included.
    pub limits: Limits,
    /// Whether an example is a preference, with two sides.
    pub pairs: bool,
    /// Examples of a micro-batch, if they are counted.
    pub micro_batch_size: Option<usize>,
}

/// The rows of a dataset, as a training stage takes them.
pub struct TakenRows {
    /// How many there are, before any is left out.
    pub rows: u64,
    /// Longer than allowed, and therefore left out.
    pub dropped: u64,
    /// Longer than allowed, and therefore cut.
    pub truncated: u64,
    /// Tokens of the examples that are left; of a preference, those of both sides.
    lengths: Vec<u64>,
}

/// What a training stage does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingCount {
    /// Of its dataset; `None`: not known before that is made.
    pub rows: Option<u64>,
    /// Rows left out for their length.
    pub dropped: u64,
    /// Rows cut for their length.
    pub truncated: u64,
    /// `None`: not known before the data are made.
    pub steps: Option<u64>,
    /// Of all steps together; `None`: not known before data and tokenizer are there.
    pub tokens: Option<u64>,
}

impl TrainingForecast {
    fn cut(&self) -> Cut {
        let Spec { max_tokens, batch_size, micro_batch_tokens, .. } = self.spec;
        let (sides, micro_batch_size) = (1 + usize::from(self.pairs), self.micro_batch_size);
        Cut { sides, max_tokens, batch_size: Some(batch_size), micro_batch_tokens, micro_batch_size }
    }

    /// Updates over this many records, none of them dropped.
    fn steps(&self, data: Option<Data>) -> Option<u64> {
        let asked = self.spec.max_steps.map(|steps| steps.min(MOST_TOKENS as u64));
        asked.or_else(|| Some(self.spec.steps(data?.records).total))
    }

    /// Checkpoints that are kept in the artifact beside the end; those of an unknown number of steps are not counted.
    fn checkpoints(&self, steps: Option<u64>) -> u64 {
        let kept = match (self.spec.save_every_epochs, self.spec.save_every_steps, steps) {
            (Some(every), _, _) => self.spec.epochs / every,
            (None, Some(every), Some(steps)) => steps as f64 / every as f64,
            _ => return 0,
        };
        kept.ceil() as u64 + 1
    }

    /// By what it takes its rows: two that say the same take the same data alike.
    pub fn taken_as(&self) -> String {
        format!("{} {:?} {:?}", self.pairs, self.spec.format, self.limits)
    }

    /// The rows as the stage takes them. `Err` if it would refuse them.
    pub fn taken(&self, records: &[Record], tokenizer: &Tokenizer) -> Result<TakenRows, Problem> {
        let (lengths, notes) = if self.pairs {
            let (pairs, notes) = data::pairs(records, tokenizer, self.spec.format, &self.limits)?;
            (pairs.iter().map(|pair| (pair.chosen.ids.len() + pair.rejected.ids.len()) as u64).collect(), notes)
        } else {
            let (samples, notes) = data::samples(records, tokenizer, self.spec.format, &self.limits)?;
            (samples.iter().map(|sample| sample.ids.len() as u64).collect(), notes)
        };
        let (dropped, truncated) = (notes.dropped.len() as u64, notes.truncated.len() as u64);
        Ok(TakenRows { rows: records.len() as u64, dropped, truncated, lengths })
    }

    /// What the stage does with the rows it takes.
    pub fn count(&self, taken: &TakenRows) -> TrainingCount {
        let spec = &self.spec;
        let steps = spec.steps(taken.lengths.len());
        let (passes, rest) = (steps.total / steps.per_epoch.max(1), steps.total % steps.per_epoch.max(1));
        let begun = (rest as usize).saturating_mul(spec.batch_size);
        let last: u64 = match begun {
            0 => 0,
            begun => {
                let order = data::epoch_order(taken.lengths.len(), spec.seed, passes, spec.shuffle);
                order.iter().take(begun).map(|&i| taken.lengths[i]).sum()
            }
        };
        let tokens = taken.lengths.iter().sum::<u64>().saturating_mul(passes).saturating_add(last);
        let TakenRows { rows, dropped, truncated, .. } = *taken;
        TrainingCount { rows: Some(rows), dropped, truncated, steps: Some(steps.total), tokens: Some(tokens) }
    }

    /// The same where rows cannot be told in tokens yet: this many, or an unknown number.
    pub fn count_of(&self, rows: Option<u64>) -> TrainingCount {
        let of = |rows: u64| self.spec.steps(rows as usize).total;
        TrainingCount { rows, dropped: 0, truncated: 0, steps: rows.map(of).or(self.spec.max_steps), tokens: None }
    }
}

impl Computes for TrainingForecast {
    fn needs(&self, shape: &Shape, data: Option<Data>, on_device: bool) -> Needs {
        let Spec { dtype, lora, adapter, optimizer, checkpointing, offload, .. } = &self.spec;
        let (dtype, offload, optimizer) = (dtype.dtype(), *offload, optimizer.kind());
        let mut config = shape.config.clone();
        let continues = adapter == "continue";
        let folded = if continues { shape.adapters.len().saturating_sub(1) } else { shape.adapters.len() };
        untie(&mut config, &shape.adapters[..folded]);
        let trained = lora.as_ref().map_or(Trained::Everything, Trained::Adapter);
        let state_sizes = |values| optimizer.state_sizes(values);
        let kept = match checkpointing.as_str() {
            "none" => usize::MAX,
            // Then as many as there is room for.
            "fit" if on_device => fit::LEAST_ON_DEVICE,
            _ => 0,
        };
        let of = |extent| {
            let work = Work::Train { extent, kept, offload, graphs: false, state_sizes: &state_sizes };
            Plan { config: &config, dtype, trained, on_device, work }.need()
        };
        let (surely, most) = self.cut().micro_batches(data);
        let steps = self.steps(data);
        let measure = Work::Measure { extent: Extent::full(1, 1), logits: false, hidden_states: false };
        let plan = Plan { config: &config, dtype, trained, on_device, work: measure };
        let state_bytes = |values| optimizer.state_sizes(values).iter().sum();
        let (weights, states) = (4 * plan.trained_values(), plan.sum_of(&state_bytes));
        // The two newest states are kept while it trains.
        let disk = weights.saturating_mul(1 + self.checkpoints(steps)).saturating_add(2 * (weights + states));
        // For insides of layers, or to capture steps.
        let takes_more = on_device && (checkpointing == "fit" || !offload);
        Needs { surely: of(surely), most: of(most), takes_more, steps, disk }
    }

    fn advice(&self, on_device: bool) -> Vec<String> {
        let spec = &self.spec;
        let mut advice = Vec::new();
        if spec.checkpointing == "none" {
            advice.push(
                "`checkpointing = \"layers\"` keeps one activation a layer: the same bits, a third more time"
                    .to_string(),
            );
        }
        advice.extend(self.cut().advice());
        if on_device && !spec.offload {
            advice.push("`offload = true` leaves the inputs of layers to the host's memory: the same bits".to_string());
        }
        match &spec.lora {
            None => {
                advice.push("`lora = { rank = 16, alpha = 32 }` trains an adapter in place of every weight".to_string())
            }
            Some(lora) if lora.rank > 8 => advice.push(format!("`lora.rank = {}`", lora.rank / 2)),
            Some(_) => {}
        }
        if matches!(spec.optimizer.kind(), train::Kind::AdamW) {
            advice.push("`optimizer.kind = \"adamw-8bit\"` takes a quarter for its states".to_string());
        }
        advice.extend((spec.dtype == Storage::F32).then(|| HALVE.to_string()));
        advice.push(shorten(spec.max_tokens));
        advice
    }

    fn takes(&self) -> Option<Taking> {
        let Spec { format, eos, max_tokens, on_overlength, .. } = self.spec;
        Some(Taking { format, eos, max_tokens, on_overlength, allow_unlearned: false })
    }
}

#[cfg(test)]
mod tests;
