//! Turns of a model, one completion each, with a journal.
//!
//! A request is known by the digest of what is asked: prompt ids, random stream, sampling. Its
//! completion is appended to `journal.jsonl` in the stage's work folder, a batch at a time, and synced
//! before it counts. A stage that was interrupted reads the journal first and decodes only what is
//! missing; since a completion depends on nothing but its request, the end is the same, to the byte.
//!
//! The [`Session`] takes turns and knows nothing of what they add up to: that is `completing`.

use crate::data::Tokenizer;
use crate::digest::Encoder;
use crate::generation::{self, Ask, Finish, Limits, Sampling};
use crate::model::{Config, LoadOptions, Model, Placed};
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::share::decoding::Decoding;
use crate::stage::share::inputs;
use crate::stage::share::thinking::Thought;
use crate::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One completion asked for.
pub struct Request {
    /// The record's id; for messages and for the random numbers.
    pub id: String,
    /// Which of the record's samples.
    pub sample: usize,
    /// Context and prefill.
    pub ids: Vec<u32>,
    /// Tokens it may think for; nothing reads it without `thinking`.
    pub budget: usize,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Digest of the request.
    key: String,
    /// Without the prefill, special tokens written out.
    pub text: String,
    /// Tokens made, the end token included; with `thinking` also those that were put between.
    pub ids: Vec<u32>,
    /// Ended by `max_tokens`.
    pub cut: bool,
    /// How it thought, if that was measured out.
    #[serde(skip)]
    pub thought: Option<Thought>,
}

impl Reply {
    /// The end of the last turn behind what the turns before it came to.
    pub(in crate::stage) fn behind(self, text: String, ids: Vec<u32>, thought: Thought) -> Reply {
        let (text, ids) = (text + &self.text, [ids, self.ids].concat());
        Reply { text, ids, thought: Some(thought), ..self }
    }

    /// How many tokens were made.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn finish(&self) -> &'static str {
        if self.cut { "length" } else { "stop" }
    }
}

/// One continuation by the model.
pub(in crate::stage) struct Turn<'r> {
    pub request: &'r Request,
    /// 0 for the first; another one draws other random numbers.
    pub number: u64,
    pub ids: Vec<u32>,
    pub max_tokens: usize,
}

/// A model that takes turns, loaded once the journal lacks one.
pub(in crate::stage) struct Session<'a> {
    ctx: &'a Context<'a>,
    /// Where the model comes from.
    slot: &'static str,
    pub decoding: &'a Decoding,
    pub tokenizer: &'a Tokenizer,
    /// The longest prompt and completion together.
    context: usize,
    model: Option<Placed>,
    journal: PathBuf,
}

impl<'a> Session<'a> {
    pub fn new(
        ctx: &'a Context<'a>,
        slot: &'static str,
        decoding: &'a Decoding,
        tokenizer: &'a Tokenizer,
    ) -> Result<Session<'a>, Problem> {
        let chain = inputs::chain(ctx, slot);
        let base = chain.first().ok_or_else(|| Problem::new("stage::input", format!("no model for `{slot}`")))?;
        let context = Config::load(base)?.max_position_embeddings;
        // Two models may be asked the same.
        let journal = if slot == "model" { "journal.jsonl".into() } else { format!("journal-{slot}.jsonl") };
        let journal = ctx.work.join(journal);
        Ok(Session { ctx, slot, decoding, tokenizer, context, model: None, journal })
    }

    /// The requests answered in one turn each.
    pub fn answers<'r>(&mut self, requests: &'r [Request], unit: &'static str) -> Result<Vec<Reply>, Problem> {
        let max_tokens = self.decoding.max_tokens;
        let turn = |request: &'r Request| Turn { request, number: 0, ids: request.ids.clone(), max_tokens };
        self.take(&requests.iter().map(turn).collect::<Vec<_>>(), &self.decoding.stop, unit)
    }

    /// Every turn's reply, in order, each with a limit of its own; `stop` are the texts that end one.
    pub fn take(&mut self, turns: &[Turn], stop: &[String], unit: &'static str) -> Result<Vec<Reply>, Problem> {
        let sampling = Sampling { stop: stop.to_vec(), ..self.decoding.sampling(self.tokenizer)? };
        let path = self.journal.clone();
        let keys: Vec<String> = turns.iter().map(|turn| key(turn, &sampling)).collect();
        let mut replies = read_journal(&path, &keys)?;
        let mut missing: Vec<usize> = (0..turns.len()).filter(|&i| !replies.contains_key(&keys[i])).collect();
        missing.sort_by_key(|&i| std::cmp::Reverse(turns[i].max_tokens));
        let progress = self.ctx.progress;
        progress.begin(turns.len() as u64, unit);
        let mut done = turns.len() - missing.len();
        progress.at(done as u64);
        let mut journal = if missing.is_empty() { None } else { Some(Journal::open(&path)?) };
        for batch in self.batches(&missing, turns) {
            for reply in self.batch(turns, &keys, batch, done, &sampling)? {
                journal.as_mut().map_or(Ok(()), |journal| journal.add(&reply))?;
                replies.insert(reply.key.clone(), reply);
            }
            journal.as_mut().map_or(Ok(()), Journal::sync)?;
            done += batch.len();
        }
        let all = keys.iter().map(|key| replies.get(key).cloned());
        all.collect::<Option<Vec<_>>>().ok_or_else(|| {
            Problem::new("generate::incomplete", "the model returned fewer completions than it was asked for")
        })
    }

    /// Turns that are made together, all of them for as long as the longest of them may be: so that none goes
    /// beyond the context, one that is far into it is not put beside one that has far to go.
    fn batches<'m>(&self, missing: &'m [usize], turns: &[Turn]) -> Vec<&'m [usize]> {
        let mut batches = Vec::new();
        let mut rest = missing;
        while let Some(&first) = rest.first() {
            let room = self.context.saturating_sub(turns[first].max_tokens);
            let fit = rest.iter().skip(1).take_while(|&&i| turns[i].ids.len() <= room).count() + 1;
            let (batch, others) = rest.split_at(fit.min(self.decoding.batch.max(1)));
            batches.push(batch);
            rest = others;
        }
        batches
    }

    fn batch(
        &mut self,
        turns: &[Turn],
        keys: &[String],
        batch: &[usize],
        done: usize,
        sampling: &Sampling,
    ) -> Result<Vec<Reply>, Problem> {
        self.load()?;
        let Some(model) = &self.model else { return Ok(Vec::new()) };
        let ask = |&i: &usize| {
            let sampling = Sampling { max_tokens: turns[i].max_tokens, ..sampling.clone() };
            Ask { ids: turns[i].ids.clone(), stream: stream(&turns[i]), sampling, top_logprobs: 0 }
        };
        let asks: Vec<Ask> = batch.iter().map(ask).collect();
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, false);
        let mut on_step = |finished: usize| {
            self.ctx.progress.at((done + finished) as u64);
            self.ctx.stopped()
        };
        let made = generation::complete(model, asks, &decode, &mut on_step, &Limits::default())?;
        let reply = |(&i, made): (&usize, generation::Completion)| Reply {
            key: keys[i].clone(),
            text: made.text,
            ids: made.ids,
            cut: made.finish == Finish::Length,
            thought: None,
        };
        Ok(batch.iter().zip(made).map(reply).collect())
    }

    fn load(&mut self) -> Result<(), Problem> {
        if self.model.is_some() {
            return Ok(());
        }
        let chain = inputs::chain(self.ctx, self.slot);
        // In f32 a folded adapter is the same function and decodes faster; in bf16 folding would
        // round what the adapter has learned.
        let dtype = self.decoding.dtype.dtype();
        let model = Model::load(&chain, &LoadOptions { dtype, fold_last: matches!(dtype, Dtype::F32) })?;
        let model = Placed::new(model, &self.ctx.device)?;
        self.tokenizer.fits(model.config().vocab_size)?;
        self.model = Some(model);
        Ok(())
    }

    /// `Err` if a prompt and all that may follow it are longer than the model's context.
    pub fn fits(&self, requests: &[Request]) -> Result<(), Problem> {
        let (context, max_tokens) = (self.context, self.decoding.max_tokens);
        let thinking = self.decoding.thinking.as_ref();
        let between = thinking.map_or(0, |thinking| thinking.between(self.decoding.format, self.tokenizer));
        let before = |request: &Request| {
            let budget = if thinking.is_some() { request.budget.saturating_add(between) } else { 0 };
            request.ids.len().saturating_add(budget)
        };
        let Some(longest) = requests.iter().max_by_key(|request| before(request)) else { return Ok(()) };
        if before(longest).saturating_add(max_tokens) <= context {
            return Ok(());
        }
        let (id, prompt) = (&longest.id, longest.ids.len());
        let (what, prompt) = match thinking {
            None => (format!("`max_tokens` {max_tokens} does not"), format!("{prompt} tokens")),
            Some(_) => (
                format!("`thinking.max_tokens` {} and `max_tokens` {max_tokens} do not", longest.budget),
                format!("{prompt} tokens, and {between} stand between thinking and answer"),
            ),
        };
        let problem = Problem::new("generate::context", format!("{what} fit the model's context of {context} tokens"))
            .note(format!("the longest prompt, of record `{id}`, has {prompt}"));
        Err(match context.checked_sub(before(longest)).filter(|left| *left > 0) {
            Some(left) => problem.help(format!("`max_tokens = {left}`")),
            None if thinking.is_some() => problem.help("a smaller `thinking.max_tokens`, or shorter prompts"),
            None => problem.help("shorten the prompt, or leave such records out"),
        })
    }
}

/// The random numbers of a turn: a function of the record's id, the sample's number and its own.
fn stream(turn: &Turn) -> u64 {
    let mut encoder = Encoder::new("completion");
    encoder.field(turn.request.id.as_bytes()).field(&(turn.request.sample as u64).to_le_bytes());
    if turn.number > 0 {
        encoder.field(&turn.number.to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&encoder.finish().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

fn key(turn: &Turn, sampling: &Sampling) -> String {
    let mut encoder = Encoder::new("request");
    let ids: Vec<u8> = turn.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    encoder.field(&ids).field(&stream(turn).to_le_bytes());
    encoder.field(written(sampling, turn.max_tokens).as_bytes());
    encoder.finish().hex()
}

/// How completions are drawn, as a part of the key by which a journal knows them. Written out, so that no name in the
/// program is a part of it: a journal outlives the names. What it says may not change, or its completions are made
/// again.
fn written(sampling: &Sampling, max_tokens: usize) -> String {
    // A field more is one to be written here.
    let Sampling { max_tokens: _, temperature, top_p, top_k, repetition_penalty, seed, stop, stop_ids, id_limit } =
        sampling;
    format!(
        "Sampling {{ max_tokens: {max_tokens}, temperature: {temperature:?}, top_p: {top_p:?}, top_k: {top_k}, \
         repetition_penalty: {repetition_penalty:?}, seed: {seed}, stop: {stop:?}, stop_ids: {stop_ids:?}, \
         id_limit: {id_limit} }}"
    )
}

/// The journal's replies to any of these requests. A last line cut off by a kill is passed over.
fn read_journal(path: &Path, keys: &[String]) -> Result<HashMap<String, Reply>, Problem> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(Problem::io("generate::journal", "read", path, &error)),
    };
    let wanted: HashSet<&String> = keys.iter().collect();
    let replies = bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Reply>(line).ok());
    Ok(replies.filter(|reply| wanted.contains(&reply.key)).map(|reply| (reply.key.clone(), reply)).collect())
}

struct Journal<'a> {
    path: &'a Path,
    file: File,
}

impl Journal<'_> {
    fn open(path: &Path) -> Result<Journal<'_>, Problem> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|error| Problem::io("generate::journal", "open", path, &error))?;
        // Ends the line a kill may have cut.
        file.write_all(b"\n").map_err(|error| Problem::io("generate::journal", "write", path, &error))?;
        Ok(Journal { path, file })
    }

    fn add(&mut self, reply: &Reply) -> Result<(), Problem> {
        let mut line = json!(reply).to_string();
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .map_err(|error| Problem::io("generate::journal", "write", self.path, &error))
    }

    fn sync(&mut self) -> Result<(), Problem> {
        self.file.sync_data().map_err(|error| Problem::io("generate::journal", "sync", self.path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_of_an_older_program_still_has_its_completions() {
        let sampling = Sampling {
            max_tokens: 256,
            temperature: 0.7,
            top_p: 1.0,
            top_k: 20,
            repetition_penalty: 1e-7,
            seed: 3,
            stop: vec!["</think>\n".into(), "\"é\"".into()],
            stop_ids: vec![1, 2],
            id_limit: 300,
        };
        let request = Request { id: "r1".into(), sample: 2, ids: vec![5, 6], budget: 0 };
        let turn = |number| Turn { request: &request, number, ids: vec![5, 6, 7], max_tokens: 100 };
        let encoded = written(&sampling, 100);
        assert_eq!(encoded, format!("{:?}", Sampling { max_tokens: 100, ..sampling.clone() }), "as it was first made");
        assert_eq!(key(&turn(0), &sampling), "3651733d0a39f085f2e8abe85b74bb032354d64e8ce8db4e637dd844967e9ed6");
        assert_eq!(key(&turn(1), &sampling), "a01d219162ddb14db3a00014824cd90b529317df653bc79d94c0981921e02e50");
    }
}
