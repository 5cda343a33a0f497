//! `tokenizer.json` and `tokenizer_config.json`: what loads encodes, decodes and makes a sample.
//!
//! Input: the two files, then a text. Panics of the tokenizer library are to end in a refusal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::data::{Format, Limits, Tokenizer, samples};
use pipe_fuzz::{Folder, quietly, taken};
use serde_json::json;

fuzz_target!(init: pipe_fuzz::start("tokenizer"), |input: &[u8]| {
    let [tokenizer, config, text] = pipe_fuzz::parts(input);
    let folder = Folder::with(&[("tokenizer.json", tokenizer)]);
    if !config.is_empty() {
        folder.put("tokenizer_config.json", config);
    }
    quietly(|| used(&folder, &pipe_fuzz::text(text)));
});

fn used(folder: &Folder, text: &str) {
    let Some(tokenizer) = taken(Tokenizer::load(&folder.files())) else { return };
    for text in [text, "", "a", " Ab\u{301}c\u{4e2d}\n\n<|im_end|>  12"] {
        let ids = tokenizer.encode(text);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.id_limit()), "an id that no token has");
        assert_eq!(tokenizer.encode_all(&[text]), [&ids[..]]);
        let _ = (tokenizer.decode(&ids, false), tokenizer.decode(&ids, true));
    }
    let _ = tokenizer.decode(&[0, 1, 2, u32::MAX, tokenizer.id_limit() as u32], false);
    let _ = (tokenizer.eos(), taken(tokenizer.end()), taken(tokenizer.fits(10)));
    let record = json!({"prompt": text, "completion": "b"});
    let records = [record.as_object().cloned().unwrap_or_default()];
    let _ = taken(samples(&records, &tokenizer, Format::Text, &Limits::default()));
    let turns = json!([{"role": "user", "content": text}]);
    let _ = taken(tokenizer.chat(&turns, None, true));
}
