//! How requests and their cost are told.

use crate::report::{self, number};
use pipe::remote::{Endpoint, money};
use pipe::stage::forecast::completions::{Calls, Likely, Requests};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// What is asked of an endpoint as JSON: once, if nothing parses, and likely.
pub fn requests_object(endpoint: &Endpoint, once: &Requests, most: &Requests, likely: Option<&Likely>) -> Value {
    let of = |requests: &Requests| {
        json!({
            "calls": requests.count, "prompt_tokens": requests.prompt_tokens,
            "completion_tokens": requests.completion_tokens, "cost": requests.cost(endpoint),
        })
    };
    let likely = likely.map(|likely| {
        let cost = endpoint.is_priced().then(|| endpoint.cost(likely.prompt_tokens, likely.completion_tokens));
        json!({
            "prompt_tokens": likely.prompt_tokens, "completion_tokens": likely.completion_tokens, "cost": cost,
            "by_replies": likely.replies, "of_this_stage": likely.own,
        })
    });
    json!({ "at_most": of(once), "if_none_parses": of(most), "likely": likely })
}

/// What a cell asks, in words; `until` says what has to be made before all is known.
pub fn call_words(calls: &Calls, until: Option<String>) -> String {
    let Calls { endpoint, wanted, kept, prompts_known, once, most, likely } = calls;
    let there = if *kept > 0 {
        format!(" ({} of {} replies are there)", number(*kept), number(*wanted))
    } else {
        String::new()
    };
    if once.count == 0 && *prompts_known {
        return format!("no call of `{}`{there}", endpoint.model);
    }
    let up_to = if until.is_some() { "up to " } else { "" };
    let mut text = format!("{up_to}{} of `{}`{there}", report::count(once.count as usize, "call"), endpoint.model);
    let completions = number(once.completion_tokens);
    match prompts_known {
        true => {
            let _ = write!(
                text,
                "; at most {} tokens of prompts and {completions} of completions",
                number(once.prompt_tokens)
            );
        }
        false => {
            let _ = write!(text, "; at most {completions} tokens of completions");
        }
    }
    if let Some(cost) = once.cost(endpoint) {
        let _ = write!(text, ", cost {}", money(cost));
    }
    if !prompts_known {
        let _ = write!(text, "; prompts {}", until.as_deref().unwrap_or("are not known"));
    }
    if most.count > once.count {
        let _ = write!(text, "; at most {} calls, if no reply parses", number(most.count));
    }
    text + &likely_words(likely.as_ref(), endpoint)
}

/// `1 reply`, `1,200 replies`.
pub fn replies(count: u64) -> String {
    format!("{} {}", number(count), if count == 1 { "reply" } else { "replies" })
}

/// What the tokens will likely be, in words, going by replies that are there.
pub fn likely_words(likely: Option<&Likely>, endpoint: &Endpoint) -> String {
    let Some(Likely { prompt_tokens, completion_tokens, replies, own }) = likely else { return String::new() };
    let cost = if endpoint.is_priced() {
        format!(", cost {}", money(endpoint.cost(*prompt_tokens, *completion_tokens)))
    } else {
        String::new()
    };
    let by = self::replies(*replies);
    let whose = if *own { " of its own" } else { "" };
    format!("; likely {} and {} tokens{cost}, going by {by}{whose}", number(*prompt_tokens), number(*completion_tokens))
}
