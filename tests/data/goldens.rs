//! What the reference stack computed: the project's own goldens, and for whoever has them those below
//! the folder that `PIPE_GOLDENS` names. `PIPE_DATA` names one with `qwen-tokenizer/` and the paper's
//! released sample, which the tests look at beside our own.

use pipe::data::{Eos, Format, Limits, Overlength, Side, Tokenizer, pairs, read_records, samples};
use pipe::files::Files;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn folder(variable: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(variable).map(PathBuf::from);
    if folder.is_none() {
        println!("{variable} is not set: nothing compared");
    }
    folder
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Every golden folder that has a tokenization, whatever its name.
fn models() -> Vec<(PathBuf, Tokenizer)> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
    let mut folders = Vec::new();
    for root in [own].into_iter().chain(folder("PIPE_GOLDENS")) {
        let mut found: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.retain(|folder| folder.join("tokenization.json").exists());
        found.sort();
        folders.extend(found);
    }
    let load = |folder: PathBuf| {
        let tokenizer = Tokenizer::load(&Files::from_dir(&folder.join("model")).unwrap()).unwrap();
        (folder, tokenizer)
    };
    folders.into_iter().map(load).collect()
}

#[test]
fn texts_ids_and_chats_are_those_of_transformers() {
    for (folder, tokenizer) in models() {
        let golden = json_of(&folder.join("tokenization.json"));
        assert_eq!(tokenizer.id_limit() as u64, golden["special"]["len"].as_u64().unwrap());
        assert_eq!(u64::from(tokenizer.eos().unwrap()), golden["special"]["eos"].as_u64().unwrap());
        let encode = golden["encode"].as_array().unwrap();
        for case in encode {
            assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()), ids_of(&case["ids"]), "{case}");
        }
        let decode = golden["decode"].as_array().unwrap();
        for case in decode {
            let skip = case["skip_special_tokens"].as_bool().unwrap();
            assert_eq!(tokenizer.decode(&ids_of(&case["ids"]), skip), case["text"].as_str().unwrap(), "{case}");
        }
        let chat = golden["chat"].as_array().unwrap();
        for case in chat {
            let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
            let text =
                tokenizer.chat(&case["messages"], tools, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
            assert_eq!(text, case["text"].as_str().unwrap(), "{}", case["description"]);
            assert_eq!(tokenizer.encode(&text), ids_of(&case["ids"]), "{}", case["description"]);
        }
        println!("{}: {} texts, {} ids, {} chats", folder.display(), encode.len(), decode.len(), chat.len());
    }
}

#[test]
fn rows_are_those_of_trl_where_trl_is_asked_for() {
    for (folder, tokenizer) in models() {
        let rows = json_of(&folder.join("dpo/tokenize_row.json"));
        for row in rows.as_array().unwrap() {
            let record = super::records(&[
                json!({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}),
            ]);
            let limits = Limits {
                max_prompt_tokens: row["max_prompt_length"].as_u64().map(|max| max as usize),
                max_completion_tokens: row["max_completion_length"].as_u64().map(|max| max as usize),
                on_overlength: Overlength::Truncate,
                truncate_side: Side::Left,
                eos: Eos::Trl024,
                ..Limits::default()
            };
            let (made, _) = pairs(&record, &tokenizer, Format::Text, &limits).unwrap();
            let prompt = ids_of(&row["prompt_input_ids"]);
            for (sample, completion) in
                [(&made[0].chosen, "chosen_input_ids"), (&made[0].rejected, "rejected_input_ids")]
            {
                assert_eq!(sample.ids, [prompt.clone(), ids_of(&row[completion])].concat(), "{row}");
                assert_eq!(sample.learned.iter().filter(|&&learned| !learned).count(), prompt.len().max(1));
            }
        }
        println!("{}: {} rows", folder.display(), rows.as_array().unwrap().len());
    }
}

#[test]
fn training_rows_are_those_of_trl_where_trl_is_asked_for() {
    for (folder, tokenizer) in models() {
        let golden = json_of(&folder.join("sft/trl_sft.json"));
        let mut count = 0;
        for (name, rows) in golden.as_object().unwrap() {
            let Some((shape, max)) = name.split_once("|max_length=") else { continue };
            let format = if shape.contains("chat") || shape == "messages" { Format::Chat } else { Format::Text };
            let limits = Limits {
                max_tokens: max.parse().ok(),
                on_overlength: Overlength::Truncate,
                eos: Eos::Trl024,
                allow_unlearned: true,
                ..Limits::default()
            };
            for row in rows.as_array().unwrap() {
                let (made, _) = samples(&super::records(&[row["row"].clone()]), &tokenizer, format, &limits).unwrap();
                assert_eq!(made[0].ids, ids_of(&row["input_ids"]), "{name}: {}", row["row"]);
                // TRL learns all of a row that does not set its completion apart; here that is never done.
                if row["completion_mask"].is_array() {
                    let mask: Vec<bool> = ids_of(&row["completion_mask"]).iter().map(|&mask| mask == 1).collect();
                    assert_eq!(made[0].learned, mask, "{name}: {}", row["row"]);
                }
                count += 1;
            }
        }
        println!("{}: {count} rows", folder.display());
    }
}

#[test]
fn whole_texts_split_and_label_as_in_the_reference_run() {
    for (folder, tokenizer) in models() {
        let keep = Limits { eos: Eos::Keep, ..Limits::default() };
        let examples = json_of(&folder.join("sft/examples.json"));
        let records = super::records(examples.as_array().unwrap());
        let texts: Vec<_> = records.iter().map(|r| json!({"text": r["text"]})).collect();
        let (made, _) = samples(&super::records(&texts), &tokenizer, Format::Text, &keep).unwrap();
        for (sample, golden) in made.iter().zip(&records) {
            assert_eq!(sample.ids, ids_of(&golden["input_ids"]));
            let prompt = golden["prompt_len"].as_u64().unwrap() as usize;
            assert!(sample.learned.iter().enumerate().all(|(t, &learned)| learned == (t >= prompt)));
        }
        let probe = json_of(&folder.join("probe/pairs.json"));
        let records = super::records(probe.as_array().unwrap());
        let (made, _) = pairs(&records, &tokenizer, Format::Text, &Limits::default()).unwrap();
        for (pair, golden) in made.iter().zip(&records) {
            assert_eq!(pair.chosen.ids, [ids_of(&golden["prompt_ids"]), ids_of(&golden["chosen_ids"])].concat());
            assert_eq!(pair.rejected.ids, [ids_of(&golden["prompt_ids"]), ids_of(&golden["rejected_ids"])].concat());
        }
        println!("{}: {} texts, {} pairs", folder.display(), texts.len(), made.len());
    }
    if let Some(data) = folder("PIPE_DATA") {
        the_released_sample_has_the_listed_token_counts(&data);
    }
}

#[test]
fn many_texts_at_once_have_the_listed_ids_and_come_back_from_them() {
    for (folder, tokenizer) in models() {
        let golden = json_of(&folder.join("tokenization.json"));
        let vectors: Vec<Value> =
            ["encode", "chat"].iter().flat_map(|part| golden[part].as_array().unwrap().clone()).collect();
        assert!(vectors.len() > 20, "{}", vectors.len());
        vectors_hold(&tokenizer, &vectors);
    }
    // The real tokenizer, for whoever has it.
    let Some(data) = folder("PIPE_DATA") else { return };
    let tokenizer = Tokenizer::load(&Files::from_dir(&data.join("qwen-tokenizer")).unwrap()).unwrap();
    assert_eq!(tokenizer.id_limit(), 151_665);
    let vectors: Vec<Value> =
        read_records(&data.join("qwen-tokenizer/vectors.jsonl")).unwrap().into_iter().map(Value::Object).collect();
    vectors_hold(&tokenizer, &vectors);
}

fn vectors_hold(tokenizer: &Tokenizer, vectors: &[Value]) {
    let mut texts = Vec::new();
    for vector in vectors {
        if !vector["messages"].is_null() {
            let prompt = vector["add_generation_prompt"].as_bool().unwrap();
            let tools = Some(&vector["tools"]).filter(|tools| !tools.is_null());
            assert_eq!(tokenizer.chat(&vector["messages"], tools, prompt).unwrap(), vector["text"]);
        }
        texts.push(vector["text"].as_str().unwrap());
    }
    for (vector, ids) in vectors.iter().zip(tokenizer.encode_all(&texts)) {
        assert_eq!(ids, ids_of(&vector["ids"]), "{}", vector["text"]);
        if vector["text"] == *tokenizer.decode(&ids, false) {
            continue;
        }
        // Only what NFC changes comes back otherwise.
        assert_eq!(tokenizer.encode(&tokenizer.decode(&ids, false)), ids);
    }
    println!("{} vectors", vectors.len());
}

/// Of the released sample, for whoever has it: the listed token counts, from either file.
fn the_released_sample_has_the_listed_token_counts(data: &Path) {
    let tokenizer = Tokenizer::load(&Files::from_dir(&data.join("qwen-tokenizer")).unwrap()).unwrap();
    let rows = read_records(&data.join("reasonalign_sample70.jsonl")).unwrap();
    assert_eq!(rows, read_records(&data.join("reasonalign_sample70.parquet")).unwrap());
    let counts = json_of(&data.join("reasonalign_sample70.tokens.json"));
    let texts: Vec<_> = rows.iter().map(|r| json!({"chosen": r["text"], "rejected": r["worse-text"]})).collect();
    for (eos, over) in [(Eos::Keep, 0), (Eos::One, 1)] {
        let limits = Limits { eos, ..Limits::default() };
        let (made, _) = pairs(&super::records(&texts), &tokenizer, Format::Text, &limits).unwrap();
        for (pair, count) in made.iter().zip(counts.as_array().unwrap()) {
            let learned = |sample: &pipe::data::Sample| sample.learned.iter().filter(|&&l| l).count() as u64;
            let listed = |name: &str| count[name].as_u64().unwrap();
            // The preferred texts alone have a line end behind the end token: it goes with `one`.
            assert_eq!(pair.chosen.ids.len() as u64, listed("text") - over);
            assert_eq!(learned(&pair.chosen), listed("completion_chosen") - over);
            assert_eq!(pair.rejected.ids.len() as u64, listed("worse_text"));
            assert_eq!(learned(&pair.rejected), listed("completion_rejected"));
        }
        println!("{} pairs, {eos:?}", made.len());
    }
}
