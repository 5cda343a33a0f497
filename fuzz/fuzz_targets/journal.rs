//! A journal of replies as another process, a kill or a foreign program left it: read, then written to, then read again.
//!
//! Input: the file. `KEY` in it stands for the key of the one request that is looked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::digest::Digest;
use pipe::remote::{Ask, Endpoint, Remote, Sampling};
use serde_json::json;

const HOST: &str = "127.0.0.1:9";

fuzz_target!(init: pipe_fuzz::start("journal"), |input: &[u8]| {
    let (ask, sampling, endpoint) = asked();
    let key = ask.key(&endpoint.model, &sampling);
    let file = pipe_fuzz::text(input).replace("KEY", &key);
    let name = format!("m-{}.jsonl", &Digest::of(b"m").hex()[..8]);
    let folder = pipe_fuzz::Folder::with(&[(&name, file.as_bytes())]);

    let look = || {
        let line = Remote::new(folder.path()).offline(true).line(&endpoint).expect("offline, no key is read");
        line.look().expect("whatever stands in it");
        let kept = line.kept(&ask, &sampling).expect("the file does not change");
        assert!(line.paid() >= 0.0 && line.paid().is_finite());
        let replies = line.replies();
        let likely = replies.likely(7, 700);
        assert_eq!(likely.is_some(), replies.count > 0);
        // Found by the index alone, and by a job that asks nobody.
        let done = line.complete(std::slice::from_ref(&ask), &sampling, &mut |_| Ok(()));
        match (&kept, pipe_fuzz::taken(done)) {
            (Some(kept), Some(done)) => assert_eq!(done, [Ok(kept.clone())]),
            (None, None) => {}
            _ => panic!("looked up, it is there; asked for, it is not (or the reverse)"),
        }
        kept
    };
    let before = look();
    // A cut last line is ended by the next writer, whose own line is then found, unless a better reply is there.
    let body = json!({"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]}).to_string();
    let line = json!({"key": key, "host": HOST, "max_tokens": 5, "prompt_bound": 9, "body": body});
    let torn = !file.is_empty() && !file.ends_with('\n');
    folder.put(&name, format!("{file}{}{line}\n", if torn { "\n" } else { "" }).as_bytes());
    let after = look().expect("a whole reply answers every request");
    if let Some(before) = before.filter(|before| before.finish != pipe::remote::Finish::Length) {
        assert_eq!(after, before, "the first whole reply stays the one");
    }
});

fn asked() -> (Ask, Sampling, Endpoint) {
    let ask = Ask { messages: json!([{"role": "user", "content": "q"}]), sample: 0, attempt: 0 };
    let sampling = Sampling {
        max_tokens: 5,
        temperature: 0.0,
        top_p: 1.0,
        top_k: None,
        repetition_penalty: None,
        stop: Vec::new(),
        seed: 0,
    };
    let endpoint = json!({
        "url": format!("http://{HOST}/v1"), "model": "m", "max_concurrency": 1, "timeout_s": 1.0,
        "connect_timeout_s": 1.0, "max_attempts": 1, "send_seed": true, "max_tokens_key": "max_tokens",
        "price_in": 1.0, "price_out": 2.0,
    });
    (ask, sampling, serde_json::from_value(endpoint).expect("an endpoint"))
}
