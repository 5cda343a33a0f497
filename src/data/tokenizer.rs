//! Text to ids and back, as the Hugging Face `tokenizers` library does it from `tokenizer.json`, and
//! the chat template that belongs to it.
//!
//! Special tokens written out in a text (`<|im_start|>`) are read as special tokens; none is added.
//! Ids above [`Tokenizer::id_limit`] exist in the embedding of Qwen2.5 but stand for nothing: no text
//! gives them and a sampler must not.

use super::chat::{Template, sources_of};
use crate::files::Files;
use crate::problem::{Exit, Problem};
use rayon::prelude::*;
use serde_json::{Map, Value};

/// The end of a turn in ChatML.
const TURN_END: &str = "<|im_end|>";

/// A model's tokenizer and chat template. Shared between threads freely.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<Template>,
    eos: Option<u32>,
    id_limit: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` where they are.
    pub fn load(files: &Files) -> Result<Tokenizer, Problem> {
        let path = files.get("tokenizer.json").ok_or_else(|| {
            Problem::new("data::no_tokenizer", "the model has no `tokenizer.json`")
                .exit(Exit::Missing)
                .help("put the `tokenizer.json` of its family into the model's folder")
        })?;
        let broken = |error: String| {
            Problem::new("data::tokenizer", format!("the tokenizer cannot be used: {error}")).at_file(path)
        };
        let read = || -> Result<tokenizers::Tokenizer, Problem> {
            let mut inner = tokenizers::Tokenizer::from_file(path).map_err(|error| broken(error.to_string()))?;
            // Both may be stored in the file and would cut or pad every text.
            inner.with_padding(None);
            inner.with_truncation(None).map_err(|error| broken(error.to_string()))?;
            // The one way left to fail is an unknown token that is named but missing: find out now.
            inner.encode_fast("a \u{e000}\u{10ffff}\0", false).map_err(|error| broken(error.to_string()))?;
            Ok(inner)
        };
        let inner = contained(read).unwrap_or_else(|| Err(broken("its parts do not fit one another".into())))?;

        let config = match files.get("tokenizer_config.json") {
            Some(path) => read_config(path)?,
            None => Map::new(),
        };
        let specials = special_texts(&config);
        let eos = specials.get("eos_token").and_then(Value::as_str).and_then(|text| inner.token_to_id(text));
        let sources = match files.get("chat_template.jinja") {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| Problem::io("data::unreadable", "read", path, &error))?;
                sources_of(&Value::String(text))
            }
            None => config.get("chat_template").map(sources_of).unwrap_or_default(),
        };
        let template = if sources.is_empty() { None } else { Some(Template::new(sources, specials)?) };
        let id_limit = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Tokenizer { inner, template, eos, id_limit })
    }

    /// The ids of a text; none are added in front or behind.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        // `load` has ruled out the one error there is.
        let encode = || self.inner.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec());
        contained(encode).and_then(Result::ok).unwrap_or_default()
    }

    /// As [`Tokenizer::encode`] for many texts, on all threads.
    pub fn encode_all<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Vec<Vec<u32>> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    /// The text of ids. Bytes that are not UTF-8 become U+FFFD. `skip_special` leaves out tokens marked
    /// special (not `<tool_call>` and its like). Ids without a token give nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        contained(|| self.inner.decode(ids, skip_special)).and_then(Result::ok).unwrap_or_default()
    }

    /// The bytes a token stands for; none for an id without a token. Where [`Tokenizer::is_byte_level`], the text
    /// of ids is that of their bytes in a row.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        match self.inner.id_to_token(id) {
            None => Vec::new(),
            Some(_) if !self.is_byte_level() => self.decode(&[id], false).into_bytes(),
            // As the library does it: a token with a mark from outside the alphabet is meant as it stands.
            Some(token) => token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into_bytes()),
        }
    }

    /// Whether tokens are bytes, as those of Qwen are, so that more tokens change nothing of the text before.
    pub fn is_byte_level(&self) -> bool {
        matches!(self.inner.get_decoder(), Some(tokenizers::DecoderWrapper::ByteLevel(_)))
    }

    /// The id of a token by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest id that has a token.
    pub fn id_limit(&self) -> usize {
        self.id_limit
    }

    /// `eos_token` of `tokenizer_config.json`.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that ends an answer: `<|im_end|>`, else the tokenizer's own end of sequence.
    pub fn end(&self) -> Result<u32, Problem> {
        self.id(TURN_END).or(self.eos).ok_or_else(|| {
            Problem::new("data::no_end_token", format!("the tokenizer has neither `{TURN_END}` nor an `eos_token`"))
                .help("name `eos_token` in the model's `tokenizer_config.json`")
        })
    }

    /// `Err` if a text could give an id that an embedding of `rows` rows does not have.
    pub fn fits(&self, rows: usize) -> Result<(), Problem> {
        if self.id_limit <= rows {
            return Ok(());
        }
        Err(Problem::new(
            "data::tokenizer_mismatch",
            format!("the tokenizer has {} ids, the model's embedding only {rows} rows", self.id_limit),
        )
        .help("use the tokenizer the model was made with"))
    }

    /// A conversation as text, by the model's chat template. `messages`: a list of {role, content, ..};
    /// `tools`: a list of function descriptions; `add_generation_prompt`: end with the opening of the answer.
    pub fn chat(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, Problem> {
        let template = self.template.as_ref().ok_or_else(|| {
            Problem::new("data::no_chat_template", "the model has no chat template")
                .help("put a `chat_template.jinja` into the model's folder, or use format = \"text\" with whole texts")
        })?;
        template.render(messages, tools, add_generation_prompt)
    }
}

/// One more than the largest id that has a token, from the text of a `tokenizer.json`; `None` if it is none.
pub fn id_limit(text: &[u8]) -> Option<usize> {
    let inner = contained(|| tokenizers::Tokenizer::from_bytes(text))?.ok()?;
    inner.get_vocab(true).values().max().map(|&id| id as usize + 1)
}

/// The byte that a mark of a byte-level vocabulary stands for: bytes that can be printed stand for themselves, the
/// other 68 in their order are U+0100 and on.
fn byte_of(mark: char) -> Option<u8> {
    match u32::from(mark) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// What the library gives, or nothing where it panics: it does so on files that were cut or mixed up.
fn contained<T>(work: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).ok()
}

fn read_config(path: &std::path::Path) -> Result<Map<String, Value>, Problem> {
    let bytes = std::fs::read(path).map_err(|error| Problem::io("data::unreadable", "read", path, &error))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Problem::new("data::tokenizer", format!("the tokenizer's configuration is not a JSON object: {error}"))
            .at_file(path)
    })
}

/// `*_token` entries: a text, or an object with `content` (older files).
fn special_texts(config: &Map<String, Value>) -> Map<String, Value> {
    config
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
            Some((name.clone(), Value::from(text)))
        })
        .collect()
}
