//! What a stage that completes will need and do: memory of a model on this machine, or requests to an endpoint.
//!
//! Bounds hold: no prompt has more tokens than it is reckoned at, no completion more than `max_tokens`. What is
//! merely likely says by how many replies.

use crate::data::Record;
use crate::model::memory::{Decode, Plan, Trained, Work};
use crate::remote::{Connection, Endpoint, Replies};
use crate::stage::forecast::needs::{Computes, Data, HALVE, MARKUP, MOST_TOKENS, Needs, Shape, shorten, untie};
use crate::stage::share::asking::Pending;
use crate::stage::share::decoding::Decoding;
use crate::stage::share::inputs::Storage;
use crate::tensor::Dtype;
use std::collections::HashSet;

/// A stage that completes, as its parameters describe it.
#[derive(Default)]
pub struct CompletionForecast {
    /// How completions are drawn.
    pub decoding: Decoding,
    /// Who completes, if no model of this machine.
    pub endpoint: Option<Endpoint>,
    /// Bytes that are put before a record: prompt, system message, opening of the answer.
    pub asked_bytes: usize,
    /// Whether what is asked stands in a file, and may be of any length.
    pub asked_in_file: bool,
    /// Completions of a record.
    pub n: usize,
    /// Only the first this many records.
    pub limit: Option<usize>,
    /// How often one completion is asked for at most.
    pub tries: u64,
    /// Whether completions may be left out of what the stage yields.
    pub drops: bool,
    /// Who judges the completions.
    pub judge: Option<Box<CompletionForecast>>,
}

/// Completions by a model on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Completions {
    /// How many.
    pub wanted: u64,
    /// At most.
    pub tokens: u64,
}

/// Requests, with the most tokens they can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Requests {
    /// How many.
    pub count: u64,
    /// Of all prompts.
    pub prompt_tokens: u64,
    /// Of all completions.
    pub completion_tokens: u64,
}

impl Requests {
    /// `count` requests of the same bounds.
    fn of(count: u64, prompt_bound: u64, max_tokens: u64) -> Requests {
        let of = |tokens: u64| tokens.saturating_mul(count);
        Requests { count, prompt_tokens: of(prompt_bound), completion_tokens: of(max_tokens) }
    }

    /// Adds others.
    pub fn add(&mut self, more: &Requests) {
        self.count = self.count.saturating_add(more.count);
        self.prompt_tokens = self.prompt_tokens.saturating_add(more.prompt_tokens);
        self.completion_tokens = self.completion_tokens.saturating_add(more.completion_tokens);
    }

    /// What they cost at most; `None` where the endpoint has no prices.
    pub fn cost(&self, endpoint: &Endpoint) -> Option<f64> {
        endpoint.is_priced().then(|| endpoint.cost(self.prompt_tokens, self.completion_tokens))
    }
}

/// What is likely, going by replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Likely {
    /// Of all prompts.
    pub prompt_tokens: u64,
    /// Of all completions.
    pub completion_tokens: u64,
    /// How many replies it goes by.
    pub replies: u64,
    /// They are this stage's own; otherwise whatever was asked of the model there.
    pub own: bool,
}

/// What a stage asks of an endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    /// Who is asked.
    pub endpoint: Endpoint,
    /// Completions the stage is made of. If the records are not there yet: this many at most, of which none is
    /// looked up.
    pub wanted: u64,
    /// How many of them need no request: their replies are kept, or another stage asks the same.
    pub kept: u64,
    /// Whether the prompts are there; without them nothing is known of their tokens.
    pub prompts_known: bool,
    /// If every reply can be used.
    pub once: Requests,
    /// If none can, before the last try.
    pub most: Requests,
    /// Going by replies that are kept.
    pub likely: Option<Likely>,
}

impl CompletionForecast {
    fn max_tokens(&self) -> u64 {
        self.decoding.max_tokens as u64
    }

    /// How many completions the stage makes of this many records.
    pub fn wanted(&self, records: u64) -> u64 {
        records.min(self.limit.map_or(u64::MAX, |limit| limit as u64)).saturating_mul(self.n as u64)
    }

    /// Completions of this many records, by a model on this machine.
    pub fn completions(&self, records: u64) -> Completions {
        let wanted = self.wanted(records);
        Completions { wanted, tokens: wanted.saturating_mul(self.max_tokens()) }
    }

    /// The endpoint that judges, if there is one and it is asked.
    pub fn judging_endpoint(&self) -> Option<&Endpoint> {
        self.judge.as_ref()?.endpoint.as_ref()
    }

    /// What the stage asks of its endpoint if its records are not there, or its prompts cannot be told.
    pub fn calls_at_most(&self, endpoint: Endpoint, records: u64) -> Calls {
        self.calls_of(endpoint, self.wanted(records))
    }

    /// What a judge is asked about answers to this many problems, at most: about each of them. Its prompts hold the
    /// answers, which are not there yet. `None` without a judge.
    pub fn judging(&self, endpoint: Endpoint, records: u64) -> Option<Calls> {
        Some(self.judge.as_ref()?.calls_of(endpoint, self.wanted(records)))
    }

    fn calls_of(&self, endpoint: Endpoint, wanted: u64) -> Calls {
        let of = |count: u64| Requests::of(count, 0, self.max_tokens());
        let (once, most) = (of(wanted), of(wanted.saturating_mul(self.tries)));
        Calls { endpoint, wanted, kept: 0, prompts_known: false, once, most, likely: None }
    }

    /// What the stage asks of its endpoint over these records, less what the journal has: `pending`, and `own` are
    /// its replies that are kept. `asked`: keys of requests that other stages send already; its own are added.
    pub fn calls(
        &self,
        (pending, own): (Vec<Pending>, Replies),
        endpoint: Endpoint,
        records: &[Record],
        line: &Connection,
        asked: &mut HashSet<String>,
    ) -> Calls {
        let max_tokens = self.max_tokens();
        let (mut once, mut most) = (Requests::default(), Requests::default());
        for Pending { key, prompt_bound, tries } in pending {
            let first = asked.insert(key);
            // What another stage asks already may still have to be asked again by this one alone.
            let again = if first { tries } else { tries - 1 };
            once.add(&Requests::of(u64::from(first), prompt_bound, max_tokens));
            most.add(&Requests::of(again, prompt_bound, max_tokens));
        }
        let (basis, is_own) = if own.count > 0 { (own, true) } else { (line.replies(), false) };
        let likely = basis.likely(once.count, once.prompt_tokens).map(|(prompt_tokens, completion_tokens)| {
            // Replies under another limit may have been longer.
            let completion_tokens = completion_tokens.min(once.completion_tokens);
            Likely { prompt_tokens, completion_tokens, replies: basis.count, own: is_own }
        });
        let wanted = self.wanted(records.len() as u64);
        let kept = wanted - once.count.min(wanted);
        Calls { endpoint, wanted, kept, prompts_known: true, once, most, likely }
    }
}

impl Computes for CompletionForecast {
    fn needs(&self, shape: &Shape, data: Option<Data>, on_device: bool) -> Needs {
        let Decoding { thinking, max_tokens, batch, dtype, .. } = &self.decoding;
        let dtype = dtype.dtype();
        let mut config = shape.config.clone();
        // In f32 the last adapter is folded in too.
        let active = if dtype == Dtype::Bf16 { shape.adapters.last() } else { None };
        untie(&mut config, &shape.adapters[..shape.adapters.len() - usize::from(active.is_some())]);
        let trained = active.map_or(Trained::Nothing, Trained::Adapter);
        let thinking = thinking.as_ref().map_or(0, |thinking| thinking.max_tokens().min(MOST_TOKENS) + MARKUP);
        let max_tokens = (*max_tokens).min(MOST_TOKENS).saturating_add(thinking);
        let records = data.map_or(usize::MAX, |data| data.records).min(self.limit.unwrap_or(usize::MAX));
        let completions = records.saturating_mul(self.n).min(*batch).max(1);
        // A longer prompt is refused by the stage.
        let room = config.max_position_embeddings.saturating_sub(max_tokens).max(1);
        let prompt = match data {
            Some(data) if !self.asked_in_file => room.min(data.longest + self.asked_bytes),
            _ => room,
        };
        let of = |prompt: usize| {
            let longest = prompt.saturating_add(max_tokens).min(MOST_TOKENS);
            let work = Work::Decode(Decode::new(&config, on_device, completions, longest, prompt));
            Plan { config: &config, dtype, trained, on_device, work }.need()
        };
        Needs { surely: of(1), most: of(prompt), takes_more: on_device, steps: None, disk: 0 }
    }

    fn advice(&self, _on_device: bool) -> Vec<String> {
        let mut advice = Vec::new();
        advice.extend((self.decoding.dtype == Storage::F32).then(|| HALVE.to_string()));
        advice.push(shorten(self.decoding.max_tokens));
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Config;
    use crate::model::memory::Part;
    use serde_json::json;

    fn forecast(batch: usize) -> CompletionForecast {
        let decoding = Decoding { max_tokens: 100, batch, dtype: Storage::Bf16, ..Decoding::default() };
        CompletionForecast { decoding, n: 1, tries: 1, ..CompletionForecast::default() }
    }

    #[test]
    fn completions_on_a_device_need_pages_for_one_and_a_workspace_for_all() {
        let config = json!({
            "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        });
        let shape = Shape { config: Config::parse(&config.to_string()).unwrap(), adapters: Vec::new() };
        let cache = |needs: &Needs| needs.most.of(Part::Cache).1;
        let (many, one) = (forecast(64).needs(&shape, None, true), forecast(1).needs(&shape, None, true));
        assert!(many.takes_more);
        assert_eq!(cache(&many), cache(&one));
        assert!(one.most.device < many.most.device && cache(&many) > many.surely.of(Part::Cache).1);
    }

    #[test]
    fn a_limit_and_samples_say_how_many_completions_there_are() {
        let mut forecast = forecast(1);
        (forecast.n, forecast.limit, forecast.decoding.max_tokens) = (4, Some(3), 10);
        assert_eq!(forecast.completions(100), Completions { wanted: 12, tokens: 120 });
        assert_eq!(forecast.completions(2), Completions { wanted: 8, tokens: 80 });
    }
}
