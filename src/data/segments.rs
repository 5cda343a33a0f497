//! Records to samples: typed segments of text, each tokenised once and marked learned or not.
//!
//! A sample is context (what the chat template makes of system, user and earlier turns), then the
//! completion: thinking and answer, then exactly one end token. The ids are the segments' ids put in
//! a row; no joined text is ever tokenised again, so the border between context and completion is
//! where generation will have it, whatever the texts.
//!
//! | format | context | completion |
//! | --- | --- | --- |
//! | `chat` | `messages`, or `prompt` (with `system`, `tools`), through the template | the assistant's text |
//! | `s1` | the same | `<|im_start|>think\n` thinking `\n<|im_start|>answer\n` answer |
//! | `text` | `text` up to and with its first `<|im_start|>assistant\n`, or `prompt` as it stands | the rest |
//!
//! A completion is `completion`, or `thinking` and `answer`, or the last assistant message; in a
//! preference it is `chosen` and `rejected`, each a text, `{thinking, answer}` or a list of messages.
//! Rows with `input_ids` and `labels` (preferences: `prompt_input_ids`, `chosen_input_ids`,
//! `rejected_input_ids`) are used exactly as they stand, in every format.
//!
//! Every row that cannot be used is named, with its line in the dataset and its id.
//!
//! One file, for it is one walk: every format, mask and limit is a branch on the way of a row to its segments, and
//! speaks of the same row and the same complaint.

use super::record::{BadRows, Record};
use super::records::kind_of;
use super::tokenizer::Tokenizer;
use crate::problem::Problem;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

/// How the texts of a record become a prompt and a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The prompt through the chat template of the model, then what the assistant says.
    #[default]
    Chat,
    /// As `Chat`, with thinking and answer in the layout of the s1 study.
    S1,
    /// Text as it stands, without a template.
    Text,
}

/// What ends a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Eos {
    /// Exactly one end token, whatever the text ends with; the same for chosen and rejected.
    #[default]
    One,
    /// Whole texts stay as they are: no token is added or taken away.
    Keep,
    /// As TRL 0.24: `eos_token` is added to a preference's completions even where there is one, and to
    /// other completions unless they end with exactly it. Of these, prompt and completion are tokenised in
    /// one piece, so a token may reach over the border, and conversations end as the template ends them.
    /// What is learned is the completion, as ever (TRL learns all of rows that do not set it apart).
    #[serde(rename = "trl-0.24")]
    Trl024,
}

/// What happens to a row that is longer than a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overlength {
    /// All of them are named, and nothing is made.
    #[default]
    Error,
    /// It is left out and named.
    Drop,
    /// It is cut and named.
    Truncate,
}

/// The side on which `max_tokens` cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The first tokens go.
    Left,
    /// The last tokens go.
    #[default]
    Right,
}

/// Lengths in tokens, end token included; `None` is no limit.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// Prompt and completion together. `Truncate` cuts on `truncate_side`.
    pub max_tokens: Option<usize>,
    /// `Truncate` keeps the last tokens.
    pub max_prompt_tokens: Option<usize>,
    /// `Truncate` keeps the first tokens.
    pub max_completion_tokens: Option<usize>,
    /// What happens to a row that is too long.
    pub on_overlength: Overlength,
    /// Where `Truncate` cuts for `max_tokens`.
    pub truncate_side: Side,
    /// What ends a completion.
    pub eos: Eos,
    /// Rows that teach nothing are kept: for looking at them, not for training.
    pub allow_unlearned: bool,
}

/// One sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The record's id.
    pub id: String,
    /// All tokens, of the prompt and of the completion.
    pub ids: Vec<u32>,
    /// Whether token `t` is a target, predicted from the tokens before it; never the first. As long as `ids`.
    pub learned: Vec<bool>,
}

impl Sample {
    /// Tokens before the first learned one.
    pub fn prompt_len(&self) -> usize {
        self.learned.iter().position(|&learned| learned).unwrap_or(self.ids.len())
    }

    /// How many tokens are learned.
    pub fn learned_tokens(&self) -> usize {
        self.learned.iter().filter(|&&learned| learned).count()
    }
}

/// Two completions of one prompt. The prompts may differ in white space where whole texts were given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The record's id.
    pub id: String,
    /// The prompt and the completion that is preferred.
    pub chosen: Sample,
    /// The prompt and the other completion.
    pub rejected: Sample,
}

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    /// Rows left out because of their length: line, id and length.
    pub dropped: Vec<String>,
    /// Rows cut because of their length.
    pub truncated: Vec<String>,
    /// Rows whose completion has an end token before its end.
    pub inner_end: Vec<String>,
    /// Pairs whose two prompts differ in white space. Each side keeps its own.
    pub prompts_differ: Vec<String>,
    /// Tokens of all samples kept (of both sides of pairs).
    pub tokens: usize,
    /// Those of them that are learned.
    pub learned_tokens: usize,
    /// Tokens of the longest sample kept.
    pub longest: usize,
}

impl Notes {
    /// What the user should know, a sentence each, naming at most three rows.
    pub fn warnings(&self) -> Vec<String> {
        let sentence = |rows: &[String], what: &str| {
            let (noun, dots) = (if rows.len() == 1 { "row" } else { "rows" }, if rows.len() > 3 { ", .." } else { "" });
            let named = rows[..rows.len().min(3)].join("; ");
            (!rows.is_empty()).then(|| format!("{} {noun} {what}: {named}{dots}", rows.len()))
        };
        [
            sentence(&self.dropped, "dropped because of their length"),
            sentence(&self.truncated, "cut because of their length"),
            sentence(&self.inner_end, "with an end token inside the completion"),
            sentence(&self.prompts_differ, "with prompts that differ in white space"),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn count(&mut self, sample: &Sample) {
        self.tokens += sample.ids.len();
        self.learned_tokens += sample.learned_tokens();
        self.longest = self.longest.max(sample.ids.len());
    }
}

/// Training samples in the order of the records. Fails on any row that cannot be used, naming all.
pub fn samples(
    records: &[Record],
    tokenizer: &Tokenizer,
    format: Format,
    limits: &Limits,
) -> Result<(Vec<Sample>, Notes), Problem> {
    let maker = Maker { tokenizer, format, limits };
    let (kept, mut notes) = maker.rows(records, |record, id| maker.sample(record, id))?;
    kept.iter().for_each(|sample| notes.count(sample));
    Ok((kept, notes))
}

/// Preference pairs in the order of the records. Fails on any row that cannot be used, naming all.
pub fn pairs(
    records: &[Record],
    tokenizer: &Tokenizer,
    format: Format,
    limits: &Limits,
) -> Result<(Vec<Pair>, Notes), Problem> {
    let maker = Maker { tokenizer, format, limits };
    let (kept, mut notes) = maker.rows(records, |record, id| maker.pair(record, id))?;
    for pair in &kept {
        notes.count(&pair.chosen);
        notes.count(&pair.rejected);
    }
    Ok((kept, notes))
}

/// Whether a record has two completions of one prompt to be preferred between.
pub fn is_preference(record: &Record) -> bool {
    ["chosen", "chosen_input_ids"].iter().any(|name| present(record, name).is_some())
}

/// The ids that a model continues for this record: the context, without any completion.
pub fn prompt(record: &Record, tokenizer: &Tokenizer, format: Format) -> Result<Vec<u32>, Problem> {
    let maker = Maker { tokenizer, format, limits: &Limits::default() };
    maker.prompt(record).map_err(|bad| {
        let name = row_id(record).map_or("the record".into(), |id| format!("record `{id}`"));
        let mut problem = Problem::new(bad.code, format!("{name}: {}", bad.what));
        problem.help.extend(bad.help);
        problem
    })
}

/// The kinds of segment. What the template renders before the completion is one segment, because a
/// template is a program and may join turns as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Context,
    Think,
    Answer,
    End,
}

impl Part {
    fn learned(self) -> bool {
        self != Part::Context
    }
}

/// A segment, tokenised.
struct Segment {
    part: Part,
    ids: Vec<u32>,
}

/// A completion as the record has it.
enum Completion {
    Text(String),
    Parts { thinking: Option<String>, answer: String },
}

/// Why a row cannot be used.
struct Bad {
    code: &'static str,
    what: String,
    help: Option<String>,
}

impl Bad {
    fn new(code: &'static str, what: impl Into<String>) -> Bad {
        Bad { code, what: what.into(), help: None }
    }

    fn help(mut self, help: impl Into<String>) -> Bad {
        self.help = Some(help.into());
        self
    }
}

impl From<Problem> for Bad {
    fn from(problem: Problem) -> Bad {
        Bad { code: problem.code, what: problem.message, help: problem.help.into_iter().next() }
    }
}

/// What became of one row that was not bad.
struct Row<T> {
    /// `None`: dropped.
    made: Option<T>,
    /// What was over its limit ("1403 tokens, `max_tokens` is 600"), where something was.
    over: Option<String>,
    inner_end: bool,
    prompts_differ: bool,
}

const ASSISTANT: &str = "<|im_start|>assistant\n";

/// Texts that open a conversation: a completion that begins so carries its own prompt.
const OPENINGS: [&str; 2] = ["<|im_start|>system\n", "<|im_start|>user\n"];

struct Maker<'a> {
    tokenizer: &'a Tokenizer,
    format: Format,
    limits: &'a Limits,
}

impl Maker<'_> {
    /// Makes every row, on all threads; gathers what is bad, dropped and cut in the order of the records.
    fn rows<T: Send>(
        &self,
        records: &[Record],
        make: impl Fn(&Record, &str) -> Result<Row<T>, Bad> + Sync,
    ) -> Result<(Vec<T>, Notes), Problem> {
        let made: Vec<_> = records
            .par_iter()
            .enumerate()
            .map(|(i, record)| {
                let id = row_id(record).unwrap_or_else(|| format!("line-{}", i + 1));
                make(record, &id)
            })
            .collect();
        let (mut kept, mut notes, mut bad) = (Vec::new(), Notes::default(), BadRows::default());
        for (i, row) in made.into_iter().enumerate() {
            let name = match row_id(&records[i]) {
                Some(id) => format!("line {} (id `{id}`)", i + 1),
                None => format!("line {}", i + 1),
            };
            match row {
                Err(Bad { code, what, help }) => {
                    bad.push(code, &name, &what);
                    help.iter().for_each(|help| bad.help(help));
                }
                Ok(row) => {
                    if row.inner_end {
                        notes.inner_end.push(name.clone());
                    }
                    if row.prompts_differ {
                        notes.prompts_differ.push(name.clone());
                    }
                    if let Some(over) = row.over {
                        let rows = if row.made.is_some() { &mut notes.truncated } else { &mut notes.dropped };
                        rows.push(format!("{name}, {over}"));
                    }
                    kept.extend(row.made);
                }
            }
        }
        bad.finish(records.len(), None)?;
        if kept.is_empty() {
            let mut problem = Problem::new("data::empty", "no row is left to train on");
            problem.notes = notes.warnings();
            return Err(problem.help("raise `max_tokens`, or give a dataset with shorter rows"));
        }
        Ok((kept, notes))
    }

    fn sample(&self, record: &Record, id: &str) -> Result<Row<Sample>, Bad> {
        if record.contains_key("input_ids") {
            let sample = labelled(record, id)?;
            let over = self.over(None, None, sample.ids.len());
            return self.limited(over, false, || {
                let mut sample = sample;
                self.cut(&mut sample.ids, &mut sample.learned);
                learns(sample, self.limits)
            });
        }
        let (context, completion) = self.texts(record)?;
        if self.limits.eos == Eos::Trl024 {
            let (context, completion) = self.joined(record, &context, completion)?;
            return self.finish(id, context, vec![completion]);
        }
        let completion = self.completion(completion, false)?;
        self.finish(id, self.context(context), completion)
    }

    /// Context and completion cut from the ids of both in one piece, as TRL's `SFTTrainer` does it.
    fn joined(&self, record: &Record, context: &str, completion: Completion) -> Result<(Segment, Segment), Bad> {
        let answer = match completion {
            Completion::Text(text) => text,
            Completion::Parts { thinking: Some(thinking), answer } if self.format == Format::S1 => {
                format!("<|im_start|>think\n{thinking}\n<|im_start|>answer\n{answer}")
            }
            Completion::Parts { thinking: None, answer } if self.format != Format::S1 => answer,
            // The same refusals as everywhere.
            parts => return self.completion(parts, false).map(|_| unreachable!("thinking where it has no place")),
        };
        let turns = match self.format {
            Format::Chat => Some(self.turns(record)?),
            _ => None,
        };
        let whole = match turns {
            Some(mut turns) => {
                turns.push(json!({"role": "assistant", "content": answer}));
                self.tokenizer.chat(&Value::Array(turns), present(record, "tools"), false)?
            }
            None => {
                let eos = match self.tokenizer.eos() {
                    Some(eos) => eos,
                    None => self.tokenizer.end()?,
                };
                let eos = self.tokenizer.decode(&[eos], false);
                let end = if answer.ends_with(&eos) { "" } else { &eos };
                format!("{context}{answer}{end}")
            }
        };
        let ids = self.tokenizer.encode(&whole);
        let prompt = self.tokenizer.encode(context).len().min(ids.len());
        let (context, completion) = ids.split_at(prompt);
        Ok((
            Segment { part: Part::Context, ids: context.to_vec() },
            Segment { part: Part::Answer, ids: completion.to_vec() },
        ))
    }

    /// The turns before a completion of a conversation.
    fn turns(&self, record: &Record) -> Result<Vec<Value>, Bad> {
        let mut messages = self.messages(record)?;
        if let Some(value) = present(record, "completion") {
            append(&mut messages, completion_of(value, "completion")?.0)?;
        } else if let (Context::Turns(turns), None) = (&mut messages, present(record, "answer")) {
            turns.pop_if(|turn| is_assistant(turn));
        }
        match messages {
            Context::Turns(turns) => Ok(turns),
            Context::Raw(_) => Err(Bad::new("data::wrong_type", "the prompt is a text, not a conversation")),
        }
    }

    fn pair(&self, record: &Record, id: &str) -> Result<Row<Pair>, Bad> {
        let (chosen_context, chosen, rejected_context, rejected) = if record.contains_key("chosen_input_ids") {
            let side = |name| Ok::<_, Bad>(vec![Segment { part: Part::Answer, ids: ids_of(record, name)? }]);
            let context = || Ok::<_, Bad>(Segment { part: Part::Context, ids: ids_of(record, "prompt_input_ids")? });
            (context()?, side("chosen_input_ids")?, context()?, side("rejected_input_ids")?)
        } else {
            let (chosen_context, chosen) = self.preference(record, "chosen")?;
            let (rejected_context, rejected) = self.preference(record, "rejected")?;
            let marks = |text: &str| text.chars().filter(|mark| !mark.is_whitespace()).collect::<String>();
            if chosen_context != rejected_context && marks(&chosen_context) != marks(&rejected_context) {
                return Err(Bad::new("data::prompts_differ", "`chosen` and `rejected` answer different prompts").help(
                    "a pair needs one prompt; give it as `prompt` and only the answers as `chosen` and `rejected`",
                ));
            }
            let (chosen, rejected) = (self.completion(chosen, true)?, self.completion(rejected, true)?);
            (self.context(chosen_context), chosen, self.context(rejected_context), rejected)
        };
        let flat = |side: &[Segment]| side.iter().flat_map(|segment| segment.ids.clone()).collect::<Vec<_>>();
        if flat(&chosen) == flat(&rejected) {
            return Err(Bad::new("data::equal_pair", "`chosen` and `rejected` are the same tokens")
                .help("drop such pairs, or look at the step that made them"));
        }
        let prompts_differ = chosen_context.ids != rejected_context.ids;
        let chosen = self.finish(id, chosen_context, chosen)?;
        let rejected = self.finish(id, rejected_context, rejected)?;
        Ok(Row {
            made: chosen.made.zip(rejected.made).map(|(chosen, rejected)| Pair { id: id.into(), chosen, rejected }),
            over: chosen.over.or(rejected.over),
            inner_end: chosen.inner_end || rejected.inner_end,
            prompts_differ,
        })
    }

    /// Context and completion put in a row, limits applied.
    fn finish(&self, id: &str, context: Segment, completion: Vec<Segment>) -> Result<Row<Sample>, Bad> {
        let prompt_tokens = context.ids.len();
        let completion_tokens = completion.iter().map(|segment| segment.ids.len()).sum();
        let over = self.over(Some(prompt_tokens), Some(completion_tokens), prompt_tokens + completion_tokens);
        let end = self.tokenizer.end().ok();
        let ends = completion.iter().flat_map(|segment| &segment.ids).rev().skip_while(|&&token| Some(token) != end);
        let inner_end = self.limits.eos != Eos::Trl024 && ends.skip(1).any(|&token| Some(token) == end);
        self.limited(over, inner_end, || {
            let cut = self.limits.on_overlength == Overlength::Truncate;
            let mut ids = context.ids;
            if let (true, Some(max)) = (cut, self.limits.max_prompt_tokens) {
                ids.drain(..ids.len().saturating_sub(max));
            }
            let prompt_kept = ids.len();
            let mut learned = vec![context.part.learned(); prompt_kept];
            for segment in completion {
                learned.resize(learned.len() + segment.ids.len(), segment.part.learned());
                ids.extend(segment.ids);
            }
            if let (true, Some(max)) = (cut, self.limits.max_completion_tokens) {
                ids.truncate(prompt_kept + max);
                learned.truncate(prompt_kept + max);
            }
            self.cut(&mut ids, &mut learned);
            learns(Sample { id: id.to_string(), ids, learned }, self.limits)
        })
    }

    /// Which limit a row breaks, in words.
    fn over(&self, prompt: Option<usize>, completion: Option<usize>, total: usize) -> Option<String> {
        let Limits { max_tokens, max_prompt_tokens, max_completion_tokens, .. } = *self.limits;
        [
            (prompt, max_prompt_tokens, "prompt tokens", "max_prompt_tokens"),
            (completion, max_completion_tokens, "completion tokens", "max_completion_tokens"),
            (Some(total), max_tokens, "tokens", "max_tokens"),
        ]
        .into_iter()
        .find_map(|(length, max, what, key)| match (length, max) {
            (Some(length), Some(max)) if length > max => Some(format!("{length} {what}, `{key}` is {max}")),
            _ => None,
        })
    }

    fn limited<T>(
        &self,
        over: Option<String>,
        inner_end: bool,
        make: impl FnOnce() -> Result<T, Bad>,
    ) -> Result<Row<T>, Bad> {
        let made = match (&over, self.limits.on_overlength) {
            (Some(over), Overlength::Error) => {
                return Err(Bad::new("data::overlength", over.clone())
                    .help("raise the limit, or say on_overlength = \"drop\" or \"truncate\""));
            }
            (Some(_), Overlength::Drop) => None,
            _ => Some(make()?),
        };
        Ok(Row { made, over, inner_end, prompts_differ: false })
    }

    /// Applies `max_tokens` on its side, where rows are to be cut.
    fn cut(&self, ids: &mut Vec<u32>, learned: &mut Vec<bool>) {
        let Some(max) = self.limits.max_tokens.filter(|_| self.limits.on_overlength == Overlength::Truncate) else {
            return;
        };
        match self.limits.truncate_side {
            Side::Right => {
                ids.truncate(max);
                learned.truncate(max);
            }
            Side::Left => {
                let gone = ids.len().saturating_sub(max);
                ids.drain(..gone);
                learned.drain(..gone);
            }
        }
    }

    fn context(&self, text: String) -> Segment {
        Segment { part: Part::Context, ids: self.tokenizer.encode(&text) }
    }

    /// The segments of a completion, its end token included. `preference`: a side of a pair.
    fn completion(&self, completion: Completion, preference: bool) -> Result<Vec<Segment>, Bad> {
        let segment = |part, text: &str| Segment { part, ids: self.tokenizer.encode(text) };
        let end = self.tokenizer.end()?;
        let end_text = self.tokenizer.decode(&[end], false);
        let mut segments = Vec::new();
        let mut answer = match completion {
            Completion::Text(text) => {
                if OPENINGS.iter().any(|opening| text.starts_with(opening)) {
                    return Err(Bad::new("data::doubled_prompt", "the completion begins with a prompt of its own")
                        .help(
                            "leave `prompt` out and use format = \"text\" where the texts hold the whole conversation",
                        ));
                }
                if self.limits.eos == Eos::Keep {
                    return Ok(vec![segment(Part::Answer, &text)]);
                }
                text
            }
            Completion::Parts { thinking, answer } => {
                match (self.format, thinking) {
                    (Format::S1, Some(thinking)) => {
                        segments.push(segment(Part::Think, &format!("<|im_start|>think\n{thinking}\n")));
                        segments.push(segment(Part::Answer, "<|im_start|>answer\n"));
                    }
                    (Format::S1, None) => {
                        return Err(Bad::new(
                            "data::missing_field",
                            "no `thinking`, which format = \"s1\" places before the answer",
                        )
                        .help("use format = \"chat\" for answers without thinking"));
                    }
                    (_, Some(_)) => {
                        return Err(Bad::new("data::unplaced_field", "`thinking` has no place in this format").help(
                            "use format = \"s1\", or leave the field out with drop = [\"thinking\"] in a dataset stage",
                        ));
                    }
                    (_, None) => {}
                }
                answer
            }
        };
        let end = if self.limits.eos == Eos::Trl024 {
            let eos = self.tokenizer.eos().unwrap_or(end);
            let there = answer.ends_with(&self.tokenizer.decode(&[eos], false));
            (preference || !there).then_some(eos)
        } else {
            // However many, and whatever white space stands between or behind them: one is left.
            while !end_text.is_empty()
                && let Some(shorter) = answer.trim_end().strip_suffix(&end_text)
            {
                answer.truncate(shorter.len());
            }
            Some(end)
        };
        segments.push(segment(Part::Answer, &answer));
        segments.extend(end.map(|end| Segment { part: Part::End, ids: vec![end] }));
        Ok(segments)
    }

    /// Context and completion of a training record.
    fn texts(&self, record: &Record) -> Result<(String, Completion), Bad> {
        if self.format == Format::Text && record.contains_key("text") {
            let text = text_of(record, "text")?;
            return self.split(text).map(|(context, rest)| (context.into(), Completion::Text(rest.into())));
        }
        let mut messages = self.messages(record)?;
        let completion = if let Some(value) = present(record, "completion") {
            let (before, completion) = completion_of(value, "completion")?;
            append(&mut messages, before)?;
            completion
        } else if present(record, "answer").is_some() {
            let thinking = present(record, "thinking").map(|_| text_of(record, "thinking")).transpose()?;
            Completion::Parts { thinking: thinking.map(String::from), answer: text_of(record, "answer")?.into() }
        } else if let Context::Turns(turns) = &mut messages
            && turns.last().is_some_and(is_assistant)
        {
            let last = turns.pop().unwrap_or_default();
            completion_of(&last, "messages")?.1
        } else {
            let wanted = match self.format {
                Format::Text => "`text`, or `prompt` with `completion`",
                Format::S1 => "`completion`, or `thinking` and `answer`",
                Format::Chat => "`completion`, `answer` or a last assistant message",
            };
            return Err(Bad::new("data::missing_field", format!("no {wanted}; the record has {}", names(record)))
                .help("name the fields with columns = { answer = \"their name\" } in a dataset stage"));
        };
        Ok((self.render(record, &messages)?, completion))
    }

    /// Context and completion of one side of a preference.
    fn preference(&self, record: &Record, side: &'static str) -> Result<(String, Completion), Bad> {
        let value = present(record, side).ok_or_else(|| missing(record, side))?;
        let has_prompt = present(record, "prompt").is_some() || present(record, "messages").is_some();
        if self.format == Format::Text && !has_prompt {
            let text = value.as_str().ok_or_else(|| wrong_type(side, "a text", value))?;
            return self.split(text).map(|(context, rest)| (context.into(), Completion::Text(rest.into())));
        }
        let (before, completion) = completion_of(value, side)?;
        let mut messages =
            if has_prompt || before.is_empty() { self.messages(record)? } else { Context::Turns(vec![]) };
        append(&mut messages, before)?;
        Ok((self.render(record, &messages)?, completion))
    }

    fn prompt(&self, record: &Record) -> Result<Vec<u32>, Bad> {
        if record.contains_key("input_ids") {
            let sample = labelled(record, "")?;
            let first = sample.learned.iter().position(|&learned| learned).unwrap_or(sample.ids.len());
            return Ok(sample.ids[..first].to_vec());
        }
        if record.contains_key("prompt_input_ids") {
            return ids_of(record, "prompt_input_ids");
        }
        if self.format == Format::Text && record.contains_key("text") {
            let text = text_of(record, "text")?;
            return self.split(text).map(|(context, _)| self.tokenizer.encode(context));
        }
        let mut messages = self.messages(record)?;
        if let Context::Turns(turns) = &mut messages {
            turns.pop_if(|turn| is_assistant(turn));
        }
        self.render(record, &messages).map(|text| self.tokenizer.encode(&text))
    }

    /// A whole text at the end of its first `<|im_start|>assistant` line. A text without ChatML is all
    /// completion: plain language modelling.
    fn split<'t>(&self, text: &'t str) -> Result<(&'t str, &'t str), Bad> {
        match text.find(ASSISTANT) {
            Some(at) => Ok(text.split_at(at + ASSISTANT.len())),
            None if !text.contains("<|im_start|>") => Ok(("", text)),
            None => {
                Err(Bad::new("data::no_assistant_turn", "the text is ChatML without an `<|im_start|>assistant` line")
                    .help("the completion is what follows that line; give whole conversations"))
            }
        }
    }

    fn messages(&self, record: &Record) -> Result<Context, Bad> {
        let (name, value) = match (present(record, "messages"), present(record, "prompt")) {
            (Some(value), _) => ("messages", value),
            (None, Some(value)) => ("prompt", value),
            (None, None) => return Err(missing(record, "prompt` or `messages")),
        };
        match (value, self.format) {
            (Value::String(text), Format::Text) => Ok(Context::Raw(text.clone())),
            (Value::String(text), _) if name == "prompt" => {
                let system = present(record, "system").map(|_| text_of(record, "system")).transpose()?;
                let system = system.map(|content| json!({"role": "system", "content": content}));
                Ok(Context::Turns(system.into_iter().chain([json!({"role": "user", "content": text})]).collect()))
            }
            (Value::Array(turns), _) => Ok(Context::Turns(turns.clone())),
            _ => Err(wrong_type(
                name,
                if name == "prompt" { "a text or a list of messages" } else { "a list of messages" },
                value,
            )),
        }
    }

    fn render(&self, record: &Record, context: &Context) -> Result<String, Bad> {
        match context {
            Context::Raw(text) => Ok(text.clone()),
            Context::Turns(turns) if turns.is_empty() => {
                Err(Bad::new("data::missing_field", "the conversation has no turn before the answer"))
            }
            Context::Turns(turns) => {
                Ok(self.tokenizer.chat(&Value::Array(turns.clone()), present(record, "tools"), true)?)
            }
        }
    }
}

/// What stands before a completion.
enum Context {
    Raw(String),
    Turns(Vec<Value>),
}

/// Adds the turns that a completion given as messages has before its last one.
fn append(context: &mut Context, before: &[Value]) -> Result<(), Bad> {
    match context {
        Context::Turns(turns) => turns.extend_from_slice(before),
        Context::Raw(_) if before.is_empty() => {}
        Context::Raw(_) => {
            return Err(Bad::new("data::wrong_type", "the completion is a conversation, the prompt is a text")
                .help("give both as texts or both as messages"));
        }
    }
    Ok(())
}

/// A completion, and the turns before its last message if it is a conversation.
fn completion_of<'v>(value: &'v Value, name: &str) -> Result<(&'v [Value], Completion), Bad> {
    let text = |value: &'v Value, name: &str| {
        value.as_str().map(String::from).ok_or_else(|| wrong_type(name, "a text", value))
    };
    match value {
        Value::String(text) => Ok((&[], Completion::Text(text.clone()))),
        Value::Object(object) => match (object.get("answer"), object.get("content")) {
            (Some(answer), _) => {
                let thinking = object.get("thinking").filter(|value| !value.is_null());
                let thinking = thinking.map(|value| text(value, &format!("{name}.thinking"))).transpose()?;
                Ok((&[], Completion::Parts { thinking, answer: text(answer, &format!("{name}.answer"))? }))
            }
            (None, Some(content)) => Ok((&[], Completion::Text(text(content, &format!("{name}.content"))?))),
            (None, None) => {
                Err(Bad::new("data::missing_field", format!("no `answer` in `{name}`; it has {}", names(object))))
            }
        },
        Value::Array(turns) => match turns.split_last() {
            Some((last, before)) if is_assistant(last) => Ok((before, completion_of(last, name)?.1)),
            _ => Err(Bad::new("data::missing_field", format!("`{name}` does not end with an assistant message"))),
        },
        _ => Err(wrong_type(name, "a text, {thinking, answer} or a list of messages", value)),
    }
}

/// A sample that teaches something. The first token has nothing to be predicted from.
fn learns(mut sample: Sample, limits: &Limits) -> Result<Sample, Bad> {
    if let Some(first) = sample.learned.first_mut() {
        *first = false;
    }
    if limits.allow_unlearned || sample.learned.contains(&true) {
        return Ok(sample);
    }
    let cut = limits.on_overlength == Overlength::Truncate;
    let what = if cut { "no learned token is left after cutting to the limits" } else { "no token is learned" };
    Err(Bad::new("data::nothing_learned", what)
        .help("a sample needs a completion; with `labels`, at least one that is not -100 after the first"))
}

/// A pre-tokenised record: `labels` are -100 or the token itself. Without `labels` all is prompt.
fn labelled(record: &Record, id: &str) -> Result<Sample, Bad> {
    let ids = ids_of(record, "input_ids")?;
    let learned = match present(record, "labels") {
        None => vec![false; ids.len()],
        Some(Value::Array(labels)) if labels.len() == ids.len() => labels
            .iter()
            .zip(&ids)
            .enumerate()
            .map(|(at, (label, &token))| match label.as_i64() {
                Some(-100) => Ok(false),
                Some(label) if label == i64::from(token) => Ok(true),
                _ => Err(Bad::new(
                    "data::labels",
                    format!("label {label} at {at} is neither -100 nor the token {token}"),
                )),
            })
            .collect::<Result<_, _>>()?,
        Some(Value::Array(labels)) => {
            return Err(Bad::new("data::labels", format!("{} `labels` for {} `input_ids`", labels.len(), ids.len())));
        }
        Some(other) => return Err(wrong_type("labels", "a list of integers", other)),
    };
    Ok(Sample { id: id.to_string(), ids, learned })
}

fn ids_of(record: &Record, name: &str) -> Result<Vec<u32>, Bad> {
    let value = present(record, name).ok_or_else(|| missing(record, name))?;
    value
        .as_array()
        .and_then(|ids| ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect())
        .ok_or_else(|| wrong_type(name, "a list of token ids", value))
}

/// A field that is there and not null (Parquet writes absent fields as nulls).
fn present<'r>(record: &'r Record, name: &str) -> Option<&'r Value> {
    record.get(name).filter(|value| !value.is_null())
}

fn text_of<'r>(record: &'r Record, name: &str) -> Result<&'r str, Bad> {
    let value = present(record, name).ok_or_else(|| missing(record, name))?;
    value.as_str().ok_or_else(|| wrong_type(name, "a text", value))
}

fn missing(record: &Record, name: &str) -> Bad {
    Bad::new("data::missing_field", format!("no `{name}`; the record has {}", names(record)))
        .help("name the fields with columns = { prompt = \"their name\" } in a dataset stage")
}

fn wrong_type(name: &str, wanted: &str, value: &Value) -> Bad {
    Bad::new("data::wrong_type", format!("`{name}` is {}, not {wanted}", kind_of(value)))
}

fn names(record: &Record) -> String {
    record.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn is_assistant(turn: &Value) -> bool {
    turn["role"] == "assistant"
}

/// `id` as text, where there is one.
pub(crate) fn row_id(record: &Record) -> Option<String> {
    match record.get("id")? {
        Value::String(id) => Some(id.clone()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    }
}
