//! A chat template and the messages and tools it renders.
//!
//! Input: `chat_template.jinja`; the messages (JSON); the tools (JSON, may be empty).
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::data::Tokenizer;
use pipe_fuzz::{Folder, seeds, taken};
use serde_json::Value;

fuzz_target!(init: seeds::plant("chat"), |input: &[u8]| {
    let [template, messages, tools] = pipe_fuzz::parts(input);
    let folder = Folder::with(&[
        ("tokenizer.json", seeds::TOKENIZER.as_bytes()),
        ("tokenizer_config.json", seeds::TOKENIZER_CONFIG.as_bytes()),
        ("chat_template.jinja", template),
    ]);
    let Some(tokenizer) = taken(Tokenizer::load(&folder.files())) else { return };
    let Ok(messages) = serde_json::from_slice::<Value>(messages) else { return };
    let tools = serde_json::from_slice::<Value>(tools).ok();
    for open in [false, true] {
        if let Some(text) = taken(tokenizer.chat(&messages, tools.as_ref(), open)) {
            assert_eq!(taken(tokenizer.chat(&messages, tools.as_ref(), open)).as_ref(), Some(&text));
        }
    }
});
