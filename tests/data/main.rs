//! Text to tokens to samples, through the library's own doors.

mod dataset;
mod goldens;
mod records;
mod samples;

use pipe::data::Tokenizer;
use pipe::files::Files;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Qwen2.5's chat layout in a few lines: a default system prompt, turns, the opening of the answer.
const TEMPLATE: &str = "{%- if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}";

/// A byte-level tokenizer: ids 0..256 are the bytes, 256 is `he`, then the three special tokens.
pub const TURN_START: u32 = 257;
pub const TURN_END: u32 = 258;
pub const END_OF_TEXT: u32 = 259;

/// Writes `tokenizer.json` and `tokenizer_config.json` and loads them.
pub fn byte_tokenizer(dir: &Path) -> Tokenizer {
    let mut vocab = Map::new();
    // GPT-2's printable stand-ins for the 256 bytes.
    let (mut stand_in, mut spare) = (Vec::new(), 256);
    for byte in 0..256u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        stand_in.push(char::from_u32(if printable { byte } else { spare }).unwrap());
        spare += u32::from(!printable);
    }
    for (id, character) in stand_in.iter().enumerate() {
        vocab.insert(character.to_string(), json!(id));
    }
    vocab.insert("he".into(), json!(256));
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(TURN_START, "<|im_start|>"), special(TURN_END, "<|im_end|>"), special(END_OF_TEXT, "<|endoftext|>")],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": ["h e"]},
    });
    let config =
        json!({"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"});
    for (name, value) in [("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)] {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    }
    Tokenizer::load(&Files::from_dir(dir).unwrap()).unwrap()
}

/// Records from JSON objects.
pub fn records(values: &[Value]) -> Vec<pipe::data::Record> {
    values.iter().map(|value| value.as_object().unwrap().clone()).collect()
}
