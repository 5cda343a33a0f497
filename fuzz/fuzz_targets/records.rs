//! JSON Lines and JSON arrays: read, written, read again; then samples, pairs and prompts of them.
//!
//! Input: five digits (format, end, overlength, side, limit), then the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::data::{
    Eos, Format, Limits, Overlength, Record, Sample, Side, Tokenizer, pairs, prompt, read_numbered, samples,
    write_jsonl,
};
use pipe::stage::bundled::{self, Bundle};
use pipe_fuzz::{Folder, taken};
use std::sync::LazyLock;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let Some(Bundle::Embedded(files)) = bundled::tokenizer("mini") else { panic!("the small tokenizer is bundled") };
    Tokenizer::load(&Folder::with(&files).files()).expect("the bundled tokenizer loads")
});

fuzz_target!(init: pipe_fuzz::start("records"), |input: &[u8]| {
    let [options, file] = pipe_fuzz::parts(input);
    let option = |at: usize| usize::from(options.get(at).copied().unwrap_or(b'0'));
    let folder = Folder::with(&[("data.jsonl", file)]);
    let path = folder.path().join("data.jsonl");
    let Some(numbered) = taken(read_numbered(&path)) else { return };
    assert!(!numbered.is_empty() && numbered.is_sorted_by_key(|(number, _)| *number));
    let records: Vec<Record> = numbered.into_iter().map(|(_, record)| record).collect();
    round_trip(&folder, &records);

    let format = [Format::Chat, Format::S1, Format::Text][option(0) % 3];
    let limit = [None, Some(1), Some(8), Some(40)][option(4) % 4];
    let limits = Limits {
        max_tokens: limit,
        max_prompt_tokens: limit.filter(|_| option(4) > usize::from(b'3')),
        max_completion_tokens: limit.filter(|_| option(4) > usize::from(b'5')),
        on_overlength: [Overlength::Error, Overlength::Drop, Overlength::Truncate][option(2) % 3],
        truncate_side: [Side::Left, Side::Right][option(3) % 2],
        eos: [Eos::One, Eos::Keep, Eos::Trl024][option(1) % 3],
        allow_unlearned: option(3) > usize::from(b'4'),
    };
    if let Some((made, notes)) = taken(samples(&records, &TOKENIZER, format, &limits)) {
        made.iter().for_each(|sample| fits(sample, &limits));
        assert!(made.len() <= records.len());
        assert_eq!(notes.tokens, made.iter().map(|sample| sample.ids.len()).sum::<usize>());
        let _ = notes.warnings();
    }
    if let Some((made, _)) = taken(pairs(&records, &TOKENIZER, format, &limits)) {
        made.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]).for_each(|side| fits(side, &limits));
    }
    for record in &records {
        let _ = taken(prompt(record, &TOKENIZER, format));
    }
});

/// Written and read again, the records are the same; written once more, so are the bytes.
fn round_trip(folder: &Folder, records: &[Record]) {
    let [once, twice] = ["once.jsonl", "twice.jsonl"].map(|name| folder.path().join(name));
    write_jsonl(&once, records).expect("records are written");
    let again = pipe::data::read_records(&once).expect("what was written is read");
    assert_eq!(again, records);
    write_jsonl(&twice, &again).expect("records are written");
    assert!(folder.read("once.jsonl") == folder.read("twice.jsonl"));
}

fn fits(sample: &Sample, limits: &Limits) {
    assert_eq!(sample.ids.len(), sample.learned.len());
    assert_ne!(sample.learned.first(), Some(&true), "nothing predicts the first token");
    assert!(limits.max_tokens.is_none_or(|max| sample.ids.len() <= max));
    assert!(limits.allow_unlearned || sample.learned_tokens() > 0);
}
