//! From the records of a task to what is asked about each, and what its answer should be.

use super::spec::{Grader, Spec};
use crate::data::{BadRows, Record, Tokenizer};
use crate::grade::{self, Kind as AnswerKind};
use crate::problem::Problem;
use crate::random::Stream;
use crate::stage::share::asking;
use crate::stage::share::template::{self, QUESTIONS, Template};
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// A record made ready.
pub struct Question {
    pub id: String,
    pub gold: String,
    pub kind: AnswerKind,
    /// As the judge is shown it: the question and its options.
    pub text: String,
    pub asked: Prompt,
    /// For choices: the record's choice at each letter.
    pub order: Option<Vec<usize>>,
}

/// What is sent.
pub enum Prompt {
    Tokens {
        /// Of the whole prompt, the opening of the answer included.
        ids: Vec<u32>,
        /// Tokens it may be thought about for.
        budget: usize,
    },
    Messages(Value),
}

struct Templates {
    prompt: Option<Template>,
    system: Option<Template>,
}

/// What is asked about a record, and what the answer should be.
struct Asked {
    /// The question with its options, whatever the prompt makes of it.
    text: String,
    user: Value,
    system: Option<String>,
    gold: String,
    kind: AnswerKind,
    order: Option<Vec<usize>>,
}

type Bad = (&'static str, String);

impl Prompt {
    /// For transcripts: the text of the tokens, or of the messages, each behind its role if there are several.
    pub fn text(&self, tokenizer: Option<&Tokenizer>) -> String {
        match self {
            Prompt::Tokens { ids, .. } => tokenizer.map_or_else(String::new, |tokenizer| tokenizer.decode(ids, false)),
            Prompt::Messages(messages) => flat(messages),
        }
    }
}

/// A text, or the texts of several turns.
fn flat(user: &Value) -> String {
    let turn = |turn: &Value| turn["content"].as_str().map_or_else(|| turn["content"].to_string(), String::from);
    match user {
        Value::String(text) => text.clone(),
        Value::Array(turns) if turns.len() == 1 => turn(&turns[0]),
        Value::Array(turns) => {
            let line = |one: &Value| format!("{}: {}", one["role"].as_str().unwrap_or("?"), turn(one));
            turns.iter().map(line).collect::<Vec<_>>().join("\n\n")
        }
        other => other.to_string(),
    }
}

impl Spec {
    /// Every record made ready, for a model with this tokenizer or for an endpoint; all that cannot be are named at
    /// once, before anything is asked.
    pub fn questions(
        &self,
        prompt_file: Option<&Path>,
        records: &[Record],
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Vec<Question>, Problem> {
        let decoding = self.decoding();
        let templates = Templates {
            prompt: Template::asked(self.prompt.as_deref(), self.prompt_file.as_deref(), prompt_file)?,
            system: self.system.as_deref().map(|text| Template::new("system", text)).transpose()?,
        };
        let (mut questions, mut bad, mut seen) = (Vec::new(), BadRows::default(), HashSet::new());
        for (index, record) in records.iter().enumerate() {
            let id = template::record_id(record, index);
            let line = format!("line {} (id `{id}`)", index + 1);
            if !seen.insert(id.clone()) {
                bad.push("eval::duplicate_id", &line, "the id occurs twice");
                continue;
            }
            let made = self.ask(record, &id, &templates).and_then(|asked| {
                let Asked { text, gold, kind, order, .. } = asked;
                let asked = match tokenizer {
                    Some(tokenizer) => {
                        let budget = self.thinking.as_ref().map_or(Ok(0), |thinking| thinking.budget(record));
                        let budget = budget.map_err(|what| ("eval::field", what))?;
                        let ids = decoding.prompt(tokenizer, asked.user, asked.system);
                        Prompt::Tokens { ids: ids.map_err(|problem| ("eval::prompt", problem.message))?, budget }
                    }
                    None => Prompt::Messages(asking::messages(asked.user, asked.system)),
                };
                Ok(Question { id, gold, kind, text, asked, order })
            });
            match made {
                Ok(question) => questions.push(question),
                Err((code, what)) => {
                    bad.push(code, &line, &what);
                    if code == "eval::field" {
                        bad.help(
                            "`question`, `answer` and `choices`, of the stage or of its task, name fields of the records",
                        );
                    }
                }
            }
        }
        bad.finish(records.len(), None)?;
        Ok(questions)
    }

    fn ask(&self, record: &Record, id: &str, templates: &Templates) -> Result<Asked, Bad> {
        let question = match &self.question {
            Some(name) => Some(template::text_field(record, &[name]).ok_or_else(|| missing(record, name))?),
            None => template::text_field(record, QUESTIONS),
        };
        let choices = self.listed_choices(record)?;
        let (gold, kind, order, options) = match choices {
            Some((choices, right)) => {
                let order: Vec<usize> = if self.shuffle_choices {
                    Stream::named(self.seed, &["choices", id]).permutation(choices.len())
                } else {
                    (0..choices.len()).collect()
                };
                let at = order.iter().position(|&choice| choice == right).unwrap_or(0);
                let line = |(at, &choice): (usize, &usize)| format!("{}) {}", letter(at), choices[choice]);
                let options = order.iter().enumerate().map(line).collect::<Vec<_>>().join("\n");
                (letter(at).to_string(), AnswerKind::Choice, Some(order), Some(options))
            }
            None => {
                let gold = self.gold(record)?;
                let capital = matches!(gold.trim().as_bytes(), [b'A'..=b'Z']);
                let kind = match self.grader {
                    Grader::Choice => AnswerKind::Choice,
                    Grader::Auto | Grader::S1 if capital => AnswerKind::Choice,
                    Grader::Numeric => AnswerKind::Number,
                    Grader::Auto | Grader::Math | Grader::S1 => AnswerKind::Math,
                };
                grade::check_gold(&gold, kind)
                    .map_err(|why| ("eval::gold", format!("the answer `{gold}` cannot be graded: {why}")))?;
                (gold, kind, None, None)
            }
        };
        let render = |template: &Template| {
            let mut record = record.clone();
            record.extend(question.map(|question| ("question".to_string(), Value::from(question))));
            record.extend(options.clone().map(|options| ("options".to_string(), Value::from(options))));
            template.render(&record).map_err(|what| ("eval::field", what))
        };
        let user = match (&templates.prompt, question, &options) {
            (Some(template), ..) => Value::String(render(template)?),
            (None, Some(question), Some(options)) => Value::String(format!("{question}\n\n{options}")),
            (None, Some(question), None) => question.into(),
            (None, None, _) => match record.get("messages") {
                Some(messages) => messages.clone(),
                None => return Err(missing(record, "question")),
            },
        };
        let system = templates.system.as_ref().map(render).transpose()?;
        let text = match (question, &options) {
            (Some(question), Some(options)) => format!("{question}\n\n{options}"),
            (Some(question), None) => question.to_string(),
            (None, _) => flat(&user),
        };
        Ok(Asked { text, user, system, gold, kind, order })
    }

    fn gold(&self, record: &Record) -> Result<String, Bad> {
        match record.get(&self.answer) {
            Some(Value::String(gold)) => Ok(gold.clone()),
            Some(Value::Number(gold)) => Ok(gold.to_string()),
            Some(_) => Err(("eval::field", format!("`{}` is neither text nor a number", self.answer))),
            None => Err(missing(record, &self.answer)),
        }
    }

    /// The choices of a record and the index of the right one.
    fn listed_choices(&self, record: &Record) -> Result<Option<(Vec<String>, usize)>, Bad> {
        if let Some(fields) = self.choices.as_ref().filter(|fields| !fields.is_empty()) {
            let text = |name: &String| {
                template::text_field(record, &[name]).map(|t| t.trim().to_string()).ok_or_else(|| missing(record, name))
            };
            return Ok(Some((fields.iter().map(text).collect::<Result<_, _>>()?, 0)));
        }
        let Some(list) =
            record.get("choices").filter(|_| matches!(self.grader, Grader::Auto | Grader::Choice | Grader::S1))
        else {
            return Ok(None);
        };
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.trim().to_string()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let choices: Option<Vec<String>> = list.as_array().and_then(|list| list.iter().map(text).collect());
        let choices = choices
            .filter(|choices| (2..=26).contains(&choices.len()))
            .ok_or(("eval::field", "`choices` is not a list of 2 to 26 texts".to_string()))?;
        let gold = match record.get(&self.answer) {
            Some(Value::Number(index)) => index.as_u64().map(|index| index as usize),
            Some(Value::String(text)) => {
                let text = text.trim();
                let by_letter = match text.as_bytes() {
                    [letter] if letter.is_ascii_alphabetic() => Some(usize::from(letter.to_ascii_uppercase() - b'A')),
                    _ => None,
                };
                choices.iter().position(|choice| choice == text).or(by_letter)
            }
            Some(_) => None,
            None => return Err(missing(record, &self.answer)),
        };
        let right = gold.filter(|right| *right < choices.len());
        let right = right.ok_or_else(|| {
            let answer = record.get(&self.answer).map(Value::to_string).unwrap_or_default();
            ("eval::gold", format!("the answer {answer} is none of the {} choices", choices.len()))
        })?;
        Ok(Some((choices, right)))
    }
}

fn missing(record: &Record, name: &str) -> Bad {
    let fields: Vec<&str> = record.keys().map(String::as_str).collect();
    ("eval::field", format!("no `{name}`; the record has {}", fields.join(", ")))
}

fn letter(at: usize) -> char {
    char::from(b'A' + (at % 26) as u8)
}
