//! Thinking within a budget: a model that is made to stop thinking, or to go on.
//!
//! The first turn thinks, for at most `max_tokens` tokens, up to the text that ends thinking or the end of the turn.
//! Where it ends early it may be sent back: the end is taken off, `wait` put in its place, and the rest of the same
//! budget is for another turn. Where the budget runs out, thinking is ended for it, with `final` behind the end. The
//! last turn answers, for at most the stage's `max_tokens`.
//!
//! What the s1 study calls it: `max_tokens_thinking` is `max_tokens`, `thinking_n_ignore` is `ignore_end`,
//! `thinking_n_ignore_str` is `wait`, `until_thinking` is `stop`. Its budget `auto` depends on the longest prompt of a
//! batch; a budget here is a number, of the stage or of the record. Its continued turns make one token at least before
//! they may end; here one that ends at once counts as one of `ignore_end`.

use crate::data::{Format, Record, Tokenizer};
use crate::manifest::spec::{Key, Type};
use crate::problem::Problem;
use crate::stage::share::decoding::{Reply, Request, Session, Turn};
use crate::stage::share::training;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub const KEY: Key = Key::optional(
    "thinking",
    Type::Table(&[
        Key::required("max_tokens", training::COUNT, "Longest thinking, in tokens."),
        Key::optional(
            "field",
            Type::Str,
            "A field of the records: one that has it thinks for at most so many tokens instead, from 0 on.",
        ),
        Key::optional(
            "end",
            Type::Str,
            "The text between thinking and answer. Absent: `<|im_start|>answer` for `s1`, else `</think>`.",
        ),
        Key::optional(
            "final",
            Type::Str,
            "What follows it where the budget has run out, for an answer at once. Absent: a line break (two, where thinking is a tag) and `Final Answer:`.",
        ),
        Key::optional(
            "stop",
            Type::List(&Type::Str),
            "Further texts that end the thinking. Absent: `<|im_start|>` for `s1`, else none. `stop` of the stage ends answers only.",
        ),
        Key::default(
            "ignore_end",
            Type::Int { min: 0, max: 1000 },
            "0",
            "How often thinking that ends within its budget is made to go on.",
        ),
        Key::default("wait", Type::Str, "\"Wait\"", "What it is made to go on with, in the place of its end."),
    ]),
    "Thinking and answer apart, each with its own limit: the model thinks for at most so many tokens and then answers, made to if need be. Absent: one completion.",
)
.with("model");

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thinking {
    max_tokens: usize,
    field: Option<String>,
    end: Option<String>,
    #[serde(rename = "final")]
    cue: Option<String>,
    stop: Option<Vec<String>>,
    ignore_end: u64,
    wait: String,
}

/// How a sample thought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thought {
    /// Up to where the answer was asked for, `wait` included.
    pub tokens: usize,
    /// How often it was made to go on.
    pub continued: u64,
    /// Its budget ran out.
    pub forced: bool,
}

/// Which random numbers the answer draws: others than any turn of thinking.
const ANSWER: u64 = u64::MAX;

/// Thinking under way.
struct Mind {
    ids: Vec<u32>,
    text: String,
    continued: u64,
    forced: bool,
    over: bool,
}

impl Thinking {
    /// The longest thinking of a record that has no budget of its own, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// A record's budget.
    pub fn budget(&self, record: &Record) -> Result<usize, String> {
        let Some((field, value)) = self.field.as_ref().and_then(|field| Some((field, record.get(field)?))) else {
            return Ok(self.max_tokens);
        };
        let tokens = value.as_u64().and_then(|tokens| usize::try_from(tokens).ok());
        tokens.ok_or_else(|| format!("`{field}` is no number of tokens: {value}"))
    }

    fn end(&self, format: Format) -> &str {
        self.end.as_deref().unwrap_or(if format == Format::S1 { "<|im_start|>answer" } else { "</think>" })
    }

    /// What ends a turn of thinking.
    fn stop(&self, format: Format) -> Vec<String> {
        let further = match &self.stop {
            Some(stop) => stop.clone(),
            None if format == Format::S1 => vec!["<|im_start|>".to_string()],
            None => Vec::new(),
        };
        further.into_iter().chain([self.end(format).to_string()]).collect()
    }

    /// What stands between thinking that ends with `text` and its answer.
    fn bridge(&self, format: Format, text: &str, forced: bool) -> String {
        let end = self.end(format);
        if !forced {
            return end.to_string();
        }
        let line = if text.ends_with('\n') { "" } else { "\n" };
        let cue = if format == Format::S1 { "\nFinal Answer:" } else { "\n\nFinal Answer:" };
        format!("{line}{end}{}", self.cue.as_deref().unwrap_or(cue))
    }

    /// The most tokens that are put between thinking and answer.
    pub fn between(&self, format: Format, tokenizer: &Tokenizer) -> usize {
        let tokens = |forced| tokenizer.encode(&self.bridge(format, "", forced)).len();
        tokens(false).max(tokens(true))
    }

    /// Turn by turn: every thought that is not over takes another, then all answer.
    pub(in crate::stage) fn complete(
        &self,
        session: &mut Session,
        requests: &[Request],
        unit: &'static str,
    ) -> Result<Vec<Reply>, Problem> {
        let (decoding, tokenizer) = (session.decoding, session.tokenizer);
        let (format, stop) = (decoding.format, self.stop(decoding.format));
        let wait = tokenizer.encode(&self.wait);
        let begin = |request: &Request| {
            let none = request.budget == 0;
            Mind { ids: Vec::new(), text: String::new(), continued: 0, forced: none, over: none }
        };
        let mut minds: Vec<Mind> = requests.iter().map(begin).collect();
        for number in 0..=self.ignore_end {
            let open: Vec<usize> = (0..minds.len()).filter(|&i| !minds[i].over).collect();
            if open.is_empty() {
                break;
            }
            let turn = |&i: &usize| Turn {
                request: &requests[i],
                number,
                ids: [requests[i].ids.as_slice(), &minds[i].ids].concat(),
                max_tokens: requests[i].budget - minds[i].ids.len(),
            };
            let turns: Vec<Turn> = open.iter().map(turn).collect();
            let replies = session.take(&turns, &stop, "thoughts")?;
            for (&i, reply) in open.iter().zip(replies) {
                let mind = &mut minds[i];
                mind.text += &reply.text;
                (mind.forced, mind.over) = (reply.cut, true);
                if reply.cut {
                    mind.ids.extend(reply.ids);
                    continue;
                }
                mind.ids.extend(without_end(tokenizer, &reply));
                // What was encoded anew may have become more.
                if mind.ids.len() > requests[i].budget {
                    mind.ids.truncate(requests[i].budget);
                    mind.text = tokenizer.decode(&mind.ids, false);
                }
                // There has to be room to go on.
                if number < self.ignore_end && mind.ids.len() + wait.len() < requests[i].budget {
                    mind.ids.extend(&wait);
                    mind.text += &self.wait;
                    mind.continued += 1;
                    mind.over = false;
                }
            }
        }
        let bridges: Vec<String> = minds.iter().map(|mind| self.bridge(format, &mind.text, mind.forced)).collect();
        let before: Vec<Vec<u32>> = minds
            .iter()
            .zip(&bridges)
            .map(|(mind, bridge)| [mind.ids.clone(), tokenizer.encode(bridge)].concat())
            .collect();
        let turn = |(request, before): (_, &Vec<u32>)| {
            let request: &Request = request;
            let ids = [request.ids.as_slice(), before].concat();
            Turn { request, number: ANSWER, ids, max_tokens: decoding.max_tokens }
        };
        let turns: Vec<Turn> = requests.iter().zip(&before).map(turn).collect();
        let answers = session.take(&turns, &decoding.stop, unit)?;
        let whole = |(((mind, bridge), before), answer): (((Mind, String), Vec<u32>), Reply)| {
            let thought = Thought { tokens: mind.ids.len(), continued: mind.continued, forced: mind.forced };
            answer.behind(mind.text + &bridge, before, thought)
        };
        Ok(minds.into_iter().zip(bridges).zip(before).zip(answers).map(whole).collect())
    }
}

/// The tokens of a turn up to the text that ended it. Where that begins inside a token, the part before it is
/// encoded anew.
fn without_end(tokenizer: &Tokenizer, reply: &Reply) -> Vec<u32> {
    for kept in (0..=reply.ids.len()).rev() {
        let ids = &reply.ids[..kept];
        if let Some(rest) = reply.text.strip_prefix(tokenizer.decode(ids, false).as_str()) {
            return [ids.to_vec(), tokenizer.encode(rest)].concat();
        }
    }
    tokenizer.encode(&reply.text)
}

/// What is wrong between the keys of the table.
pub fn broken(table: Option<&Value>) -> Option<(&'static str, String, String)> {
    let table = table?;
    let empty = |key: &str| table.get(key).and_then(Value::as_str) == Some("");
    if empty("end") {
        let help = "the text that the model's thinking ends with: `end = \"</think>\"`";
        return Some(("thinking.end", "thinking that ends with nothing ends nowhere".into(), help.into()));
    }
    let goes_on = table.get("ignore_end").and_then(Value::as_u64).is_some_and(|times| times > 0);
    if goes_on && empty("wait") {
        let help = "`wait = \"Wait\"`, or leave it out";
        return Some((
            "thinking.wait",
            "nothing to go on with: a model sent back ends again at once".into(),
            help.into(),
        ));
    }
    None
}
