//! What is asked, and by what it is known again.

use super::endpoint::Endpoint;
use crate::digest::Encoder;
use crate::random::Stream;
use serde_json::{Value, json};

/// How completions are drawn. What is absent is not sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The longest answer.
    pub max_tokens: u64,
    /// 0: the likeliest token each time.
    pub temperature: f64,
    /// Tokens are drawn from the likeliest that together have this probability.
    pub top_p: f64,
    /// Tokens are drawn from this many.
    pub top_k: Option<u64>,
    /// Above 1 what was said before becomes less likely.
    pub repetition_penalty: Option<f64>,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// From which each request's own is made.
    pub seed: u64,
}

/// One completion asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// `[{"role", "content"}, ...]`.
    pub messages: Value,
    /// Which of several completions of the same messages.
    pub sample: u64,
    /// Which try at that sample: the one before could be read but not used.
    pub attempt: u64,
}

impl Ask {
    /// Digest of what is asked of `model`. `max_tokens` is not in it: a reply that was not cut is as good
    /// an answer under another limit.
    pub fn key(&self, model: &str, sampling: &Sampling) -> String {
        let drawn = json!({
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty, "stop": sampling.stop, "seed": sampling.seed,
        });
        let mut encoder = Encoder::new("chat completion 1");
        encoder.field(model.as_bytes()).field(self.messages.to_string().as_bytes());
        encoder.field(drawn.to_string().as_bytes());
        encoder.field(&self.sample.to_le_bytes()).field(&self.attempt.to_le_bytes());
        encoder.finish().hex()
    }

    /// What is sent.
    pub(super) fn body(&self, endpoint: &Endpoint, sampling: &Sampling) -> Value {
        let mut body = json!({
            "model": endpoint.model, "messages": self.messages, "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        });
        body[endpoint.max_tokens_key.as_str()] = sampling.max_tokens.into();
        if let Some(top_k) = sampling.top_k {
            body["top_k"] = top_k.into();
        }
        if let Some(penalty) = sampling.repetition_penalty {
            body["repetition_penalty"] = penalty.into();
        }
        if !sampling.stop.is_empty() {
            body["stop"] = json!(sampling.stop);
        }
        if endpoint.send_seed {
            // Another one for each sample and try, of 31 bits, which every server takes.
            let words = ["completion", &self.sample.to_string(), &self.attempt.to_string()];
            body["seed"] = (Stream::named(sampling.seed, &words).u64(0) >> 33).into();
        }
        body
    }

    /// No prompt has more tokens: a token is a byte or more, and templates add a few to each message.
    pub fn prompt_bound(&self) -> u64 {
        let messages = self.messages.as_array().map_or(&[] as &[Value], Vec::as_slice);
        let texts = messages.iter().filter_map(|message| message["content"].as_str());
        texts.map(|text| text.len() as u64 + 32).sum::<u64>() + 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn sampling() -> Sampling {
        Sampling {
            max_tokens: 10,
            temperature: 0.5,
            top_p: 1.0,
            top_k: None,
            repetition_penalty: None,
            stop: vec![],
            seed: 3,
        }
    }

    fn ask(text: &str, sample: u64, attempt: u64) -> Ask {
        Ask { messages: json!([{"role": "user", "content": text}]), sample, attempt }
    }

    #[test]
    fn a_request_is_known_by_all_that_is_asked_but_its_limit() {
        let base = ask("q", 0, 0).key("m", &sampling());
        let mut others = vec![
            ask("p", 0, 0).key("m", &sampling()),
            ask("q", 1, 0).key("m", &sampling()),
            ask("q", 0, 1).key("m", &sampling()),
            ask("q", 0, 0).key("n", &sampling()),
        ];
        for change in [
            |s: &mut Sampling| s.temperature = 0.6,
            |s: &mut Sampling| s.top_p = 0.9,
            |s: &mut Sampling| s.top_k = Some(5),
            |s: &mut Sampling| s.repetition_penalty = Some(1.1),
            |s: &mut Sampling| s.stop.push("x".into()),
            |s: &mut Sampling| s.seed = 4,
        ] {
            let mut changed = sampling();
            change(&mut changed);
            others.push(ask("q", 0, 0).key("m", &changed));
        }
        let distinct: HashSet<&String> = others.iter().chain([&base]).collect();
        assert_eq!(distinct.len(), others.len() + 1);
        assert_eq!(base, ask("q", 0, 0).key("m", &Sampling { max_tokens: 99, ..sampling() }));
    }

    #[test]
    fn no_prompt_has_more_tokens_than_its_bound() {
        assert_eq!(ask("é", 0, 0).prompt_bound(), 2 + 32 + 64);
    }
}
