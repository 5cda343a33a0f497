//! A chat template and the messages and tools it renders.
//!
//! A template is a program: it can ask for a text of any length, and nest deeper than any stack. Templates that
//! obviously do so are passed over; what is looked for is the small one that ends the process.
//!
//! Input: `chat_template.jinja`; the messages (JSON); the tools (JSON, may be empty).
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::data::Tokenizer;
use pipe_fuzz::{Folder, seeds, taken};
use serde_json::Value;

fuzz_target!(init: pipe_fuzz::start("chat"), |input: &[u8]| {
    let [template, messages, tools] = pipe_fuzz::parts(input);
    if excessive(template) {
        return;
    }
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

/// Longer than templates of this kind are, or with a number that is a width or a count of nothing real.
fn excessive(template: &[u8]) -> bool {
    template.len() > 4_096 || template.split(|byte| !byte.is_ascii_digit()).any(|digits| digits.len() > 3)
}
