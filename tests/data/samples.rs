//! Records to samples: what is learned, how a completion ends, what happens at the limits, and how a
//! row that cannot be used is named.

use super::{END_OF_TEXT, TURN_END, byte_tokenizer, records};
use pipe::data::{Eos, Format, Limits, Overlength, Side, Tokenizer, pairs, prompt, samples};
use pipe::files::Files;
use pipe::problem::{Exit, Problem};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn tokenizer() -> Tokenizer {
    byte_tokenizer(TempDir::new().unwrap().path())
}

const CONTEXT: &str =
    "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n";

/// Context and learned part of the only sample, as text.
fn made(record: Value, format: Format, limits: &Limits) -> Result<(String, String), Problem> {
    let tokenizer = tokenizer();
    let (made, _) = samples(&records(&[record]), &tokenizer, format, limits)?;
    let sample = &made[0];
    assert_eq!(sample.ids.len(), sample.learned.len());
    let first = sample.learned.iter().position(|&learned| learned).unwrap();
    assert!(sample.learned[first..].iter().all(|&learned| learned));
    Ok((tokenizer.decode(&sample.ids[..first], false), tokenizer.decode(&sample.ids[first..], false)))
}

fn refused(record: Value, format: Format) -> Problem {
    made(record, format, &Limits::default()).unwrap_err()
}

#[test]
fn the_ways_to_write_a_turn_are_one_sample() {
    let user = json!({"role": "user", "content": "q"});
    let answer = json!({"role": "assistant", "content": "a"});
    for record in [
        json!({"prompt": "q", "completion": "a"}),
        json!({"prompt": "q", "answer": "a", "thinking": null}),
        json!({"messages": [user, answer]}),
        json!({"messages": [user], "answer": "a"}),
        json!({"prompt": [user], "completion": [answer]}),
        json!({"prompt": "q", "completion": "a<|im_end|>"}),
        json!({"prompt": "q", "completion": "a<|im_end|>\n"}),
        json!({"prompt": "q", "completion": "a<|im_end|>\n<|im_end|>\n"}),
    ] {
        let wanted = (CONTEXT.to_string(), "a<|im_end|>".to_string());
        assert_eq!(made(record.clone(), Format::Chat, &Limits::default()).unwrap(), wanted, "{record}");
    }
    let (context, _) =
        made(json!({"prompt": "q", "system": "S", "answer": "a"}), Format::Chat, &Limits::default()).unwrap();
    assert!(context.starts_with("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq"));
}

#[test]
fn the_s1_layout_puts_thinking_before_the_answer() {
    let (context, learned) =
        made(json!({"prompt": "q", "thinking": "hm", "answer": "4"}), Format::S1, &Limits::default()).unwrap();
    assert_eq!(context, CONTEXT);
    assert_eq!(learned, "<|im_start|>think\nhm\n<|im_start|>answer\n4<|im_end|>");
    assert_eq!(refused(json!({"prompt": "q", "answer": "4"}), Format::S1).code, "data::missing_field");
    assert_eq!(
        refused(json!({"prompt": "q", "thinking": "hm", "answer": "4"}), Format::Chat).code,
        "data::unplaced_field"
    );
}

#[test]
fn a_whole_text_is_learned_after_its_first_assistant_line() {
    let text = format!("{CONTEXT}<|im_start|>think\nhm\n<|im_start|>answer\n4<|im_end|>\n");
    let keep = Limits { eos: Eos::Keep, ..Limits::default() };
    let (context, learned) = made(json!({"text": text}), Format::Text, &keep).unwrap();
    assert_eq!((context.as_str(), learned.as_str()), (CONTEXT, &text[CONTEXT.len()..]));
    let (_, learned) = made(json!({"text": text}), Format::Text, &Limits::default()).unwrap();
    assert!(learned.ends_with("answer\n4<|im_end|>"));
    // Without turns it is plain text: all but the first token has something to be predicted from.
    let (first, rest) = made(json!({"text": "plain"}), Format::Text, &Limits::default()).unwrap();
    assert_eq!((first.as_str(), rest.as_str()), ("p", "lain<|im_end|>"));
    assert_eq!(
        refused(json!({"text": "<|im_start|>user\nq<|im_end|>\n"}), Format::Text).code,
        "data::no_assistant_turn"
    );
}

#[test]
fn no_token_spans_the_border_between_prompt_and_completion() {
    // `h` and `e` merge inside a text; across the border they must not.
    let tokenizer = tokenizer();
    let row = records(&[json!({"prompt": "h", "completion": "e"})]);
    let (made, _) = samples(&row, &tokenizer, Format::Text, &Limits::default()).unwrap();
    assert_eq!(made[0].ids, [u32::from(b'h'), u32::from(b'e'), TURN_END]);
    assert_eq!(made[0].learned, [false, true, true]);
    assert_eq!(tokenizer.encode("he"), [256]);
}

#[test]
fn tokens_given_are_used_as_they_stand_in_every_format() {
    for format in [Format::Chat, Format::S1, Format::Text] {
        let tokenizer = tokenizer();
        let row =
            records(&[json!({"id": 7, "prompt": "ignored", "input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]})]);
        let (made, notes) = samples(&row, &tokenizer, format, &Limits::default()).unwrap();
        assert_eq!((made[0].id.as_str(), made[0].ids.as_slice()), ("7", [5, 6, 7, 8].as_slice()));
        assert_eq!(made[0].learned, [false, true, false, true]);
        assert_eq!((notes.tokens, notes.learned_tokens, notes.longest), (4, 2, 4));
        let row =
            records(&[json!({"prompt_input_ids": [1, 2], "chosen_input_ids": [3], "rejected_input_ids": [4, 5]})]);
        let (made, _) = pairs(&row, &tokenizer, format, &Limits::default()).unwrap();
        assert_eq!(
            (made[0].chosen.ids.as_slice(), made[0].rejected.ids.as_slice()),
            ([1, 2, 3].as_slice(), [1, 2, 4, 5].as_slice())
        );
        assert_eq!(made[0].rejected.learned, [false, false, true, true]);
    }
    for (labels, what) in [
        (json!([-100, 6]), "2 `labels` for 3 `input_ids`"),
        (json!([-100, 9, 7]), "label 9 at 1 is neither -100 nor the token 6"),
        (json!("x"), "`labels` is a string, not a list of integers"),
        (json!([5, -100, -100]), "no token is learned"),
        (json!(null), "no token is learned"),
    ] {
        let problem = refused(json!({"input_ids": [5, 6, 7], "labels": labels}), Format::Chat);
        assert!(problem.notes[0].ends_with(what), "{problem}");
    }
    assert_eq!(refused(json!({"input_ids": [5, -6]}), Format::Chat).code, "data::wrong_type");
}

#[test]
fn chosen_and_rejected_end_alike_whatever_their_texts_end_with() {
    let tokenizer = tokenizer();
    let row = records(&[json!({"prompt": "q", "chosen": "good<|im_end|>\n", "rejected": {"answer": "bad"}})]);
    let (made, _) = pairs(&row, &tokenizer, Format::Chat, &Limits::default()).unwrap();
    let ends = |limits: &Limits| {
        let row = records(&[json!({"prompt": "p", "chosen": "good<|im_end|>\n", "rejected": "bad<|im_end|>"})]);
        let (made, _) = pairs(&row, &tokenizer, Format::Text, limits).unwrap();
        [&made[0].chosen, &made[0].rejected].map(|side| tokenizer.decode(&side.ids, false)[1..].to_string())
    };
    assert_eq!(tokenizer.decode(&made[0].chosen.ids, false), format!("{CONTEXT}good<|im_end|>"));
    assert_eq!(tokenizer.decode(&made[0].rejected.ids, false), format!("{CONTEXT}bad<|im_end|>"));
    assert_eq!(ends(&Limits::default()), ["good<|im_end|>", "bad<|im_end|>"]);
    let eos = |eos| Limits { eos, ..Limits::default() };
    assert_eq!(ends(&eos(Eos::Keep)), ["good<|im_end|>\n", "bad<|im_end|>"]);
    assert_eq!(ends(&eos(Eos::Trl024)), ["good<|im_end|>\n<|im_end|>", "bad<|im_end|><|im_end|>"]);
    // For single completions TRL adds the token only where the text does not end with exactly it.
    let single = |text: &str| made_text(text, &eos(Eos::Trl024));
    assert_eq!(single("a<|im_end|>"), "a<|im_end|>");
    assert_eq!(single("a<|im_end|>\n"), "a<|im_end|>\n<|im_end|>");
}

fn made_text(completion: &str, limits: &Limits) -> String {
    made(json!({"prompt": "p", "completion": completion}), Format::Text, limits).unwrap().1
}

#[test]
fn a_preference_may_be_given_as_whole_texts_or_conversations() {
    let tokenizer = tokenizer();
    let user = json!({"role": "user", "content": "q"});
    let conversation = |answer: &str| json!([user, {"role": "assistant", "content": answer}]);
    for (row, format) in [
        (
            json!({"chosen": format!("{CONTEXT}a<|im_end|>\n"), "rejected": format!("{CONTEXT}b<|im_end|>")}),
            Format::Text,
        ),
        (json!({"chosen": conversation("a"), "rejected": conversation("b")}), Format::Chat),
        (json!({"prompt": [user], "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}), Format::Chat),
    ] {
        let (made, _) = pairs(&records(&[row]), &tokenizer, format, &Limits::default()).unwrap();
        assert_eq!(tokenizer.decode(&made[0].chosen.ids, false), format!("{CONTEXT}a<|im_end|>"));
        assert_eq!(tokenizer.decode(&made[0].rejected.ids, false), format!("{CONTEXT}b<|im_end|>"));
    }
}

#[test]
fn pairs_that_teach_nothing_or_the_wrong_thing_are_refused() {
    let refused =
        |row: Value, format| pairs(&records(&[row]), &tokenizer(), format, &Limits::default()).unwrap_err().code;
    assert_eq!(
        refused(json!({"prompt": "q", "chosen": "a<|im_end|>\n", "rejected": "a"}), Format::Chat),
        "data::equal_pair"
    );
    assert_eq!(refused(json!({"prompt": "q", "chosen": "a"}), Format::Chat), "data::missing_field");
    assert_eq!(refused(json!({"prompt": "q", "chosen": 3, "rejected": "a"}), Format::Chat), "data::wrong_type");
    let whole = |question: &str, answer: &str| format!("{}{answer}", CONTEXT.replace("q<", &format!("{question}<")));
    assert_eq!(
        refused(json!({"chosen": whole("q", "a"), "rejected": whole("other", "b")}), Format::Text),
        "data::prompts_differ"
    );
    assert_eq!(
        refused(json!({"prompt": "q", "chosen": whole("q", "a"), "rejected": whole("q", "b")}), Format::Chat),
        "data::doubled_prompt"
    );
    // A blank more in one of two prompts, as in the released sample, is told and kept.
    let row = records(&[json!({"chosen": whole("q ", "a"), "rejected": whole("q", "b")})]);
    let (made, notes) = pairs(&row, &tokenizer(), Format::Text, &Limits::default()).unwrap();
    assert_eq!(made[0].chosen.ids.len(), made[0].rejected.ids.len() + 1);
    assert_eq!(notes.warnings(), ["1 row with prompts that differ in white space: line 1"]);
}

/// Context and learned part of every sample kept, and the warnings.
type Limited = (Vec<(String, String)>, Vec<String>);

fn limited(limits: Limits) -> Result<Limited, Problem> {
    let tokenizer = tokenizer();
    let rows = records(&[
        json!({"id": "long", "prompt": "12345", "completion": "abcde"}),
        json!({"id": "short", "prompt": "1", "completion": "a"}),
    ]);
    let (made, notes) = samples(&rows, &tokenizer, Format::Text, &limits)?;
    let shown = |sample: &pipe::data::Sample| {
        let first = sample.learned.iter().position(|&learned| learned).unwrap();
        (tokenizer.decode(&sample.ids[..first], false), tokenizer.decode(&sample.ids[first..], false))
    };
    Ok((made.iter().map(shown).collect(), notes.warnings()))
}

#[test]
fn a_row_over_a_limit_stops_the_run_unless_told_otherwise() {
    let error = limited(Limits { max_tokens: Some(10), ..Limits::default() }).unwrap_err();
    assert_eq!((error.code, error.message.as_str()), ("data::overlength", "1 of 2 rows cannot be used"));
    assert_eq!(error.notes, ["line 1 (id `long`): 11 tokens, `max_tokens` is 10"]);
    assert!(limited(Limits { max_tokens: Some(11), ..Limits::default() }).is_ok());
    let drop = Limits { max_prompt_tokens: Some(4), on_overlength: Overlength::Drop, ..Limits::default() };
    let (made, warnings) = limited(drop).unwrap();
    assert_eq!(made.len(), 1);
    assert_eq!(
        warnings,
        ["1 row dropped because of their length: line 1 (id `long`), 5 prompt tokens, `max_prompt_tokens` is 4"]
    );
    let all = Limits { max_tokens: Some(1), on_overlength: Overlength::Drop, ..Limits::default() };
    assert_eq!(limited(all).unwrap_err().code, "data::empty");
}

#[test]
fn cutting_keeps_the_end_of_the_prompt_and_the_asked_side_of_the_whole() {
    let cut = |max_tokens, max_prompt_tokens, max_completion_tokens, truncate_side| {
        let on_overlength = Overlength::Truncate;
        let limits = Limits {
            max_tokens,
            max_prompt_tokens,
            max_completion_tokens,
            on_overlength,
            truncate_side,
            eos: Eos::One,
            ..Limits::default()
        };
        limited(limits).map(|(made, _)| (made[0].0.clone(), made[0].1.clone()))
    };
    let shown = |prompt: &str, completion: &str| Ok((prompt.to_string(), completion.to_string()));
    assert_eq!(cut(None, Some(2), None, Side::Right), shown("45", "abcde<|im_end|>"));
    assert_eq!(cut(None, None, Some(3), Side::Right), shown("12345", "abc"));
    assert_eq!(cut(Some(8), None, None, Side::Right), shown("12345", "abc"));
    assert_eq!(cut(Some(8), None, None, Side::Left), shown("45", "abcde<|im_end|>"));
    assert_eq!(cut(Some(4), Some(2), None, Side::Right), shown("45", "ab"));
    let nothing = cut(Some(5), None, None, Side::Right).unwrap_err();
    assert_eq!(nothing.code, "data::nothing_learned");
    assert!(nothing.notes[0].contains("id `long`"), "{nothing}");
}

#[test]
fn every_bad_row_is_named_in_one_message() {
    let rows: Vec<Value> = (0..25).map(|i| json!({"id": i, "prompt": "q"})).collect();
    let problem = samples(&records(&rows), &tokenizer(), Format::Chat, &Limits::default()).unwrap_err();
    assert_eq!((problem.code, problem.message.as_str()), ("data::missing_field", "25 of 25 rows cannot be used"));
    assert_eq!(
        problem.notes[3],
        "line 4 (id `3`): no `completion`, `answer` or a last assistant message; the record has `id`, `prompt`"
    );
    assert_eq!((problem.notes.len(), problem.notes[20].as_str()), (21, "and 5 more"));
    assert_eq!(problem.help.len(), 1);
}

#[test]
fn an_end_token_inside_a_completion_is_told() {
    let rows = records(&[json!({"id": "x", "prompt": "q", "completion": "a<|im_end|>b"})]);
    let (_, notes) = samples(&rows, &tokenizer(), Format::Chat, &Limits::default()).unwrap();
    assert_eq!(notes.warnings(), ["1 row with an end token inside the completion: line 1 (id `x`)"]);
}

#[test]
fn a_prompt_is_what_comes_before_any_completion() {
    let tokenizer = tokenizer();
    let of = |record: Value, format| prompt(records(&[record]).first().unwrap(), &tokenizer, format);
    let context = tokenizer.encode(CONTEXT);
    let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    assert_eq!(of(json!({"prompt": "q", "answer": "a"}), Format::S1).unwrap(), context);
    assert_eq!(of(json!({"messages": turns}), Format::Chat).unwrap(), context);
    assert_eq!(of(json!({"text": format!("{CONTEXT}a")}), Format::Text).unwrap(), context);
    assert_eq!(of(json!({"prompt": "q"}), Format::Text).unwrap(), [u32::from(b'q')]);
    assert_eq!(of(json!({"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}), Format::Chat).unwrap(), [1, 2]);
    assert_eq!(of(json!({"input_ids": [1, 2, 3]}), Format::Chat).unwrap(), [1, 2, 3]);
    let problem = of(json!({"id": "x"}), Format::Chat).unwrap_err();
    assert!(problem.message.starts_with("record `x`: no `prompt` or `messages`"), "{problem}");
}

#[test]
fn bytes_that_are_no_character_decode_to_the_replacement_character() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.encode("\u{e9}"), [0xc3, 0xa9]);
    assert_eq!(tokenizer.encode("e\u{301}"), [0xc3, 0xa9], "NFC");
    assert_eq!(tokenizer.decode(&[0xc3, 0x28, 0xc3, 0xa9], false), "\u{fffd}(\u{e9}");
    assert_eq!(tokenizer.decode(&[END_OF_TEXT, 0x61, 9999, TURN_END], true), "a");
    assert_eq!(tokenizer.decode(&[0x61, TURN_END], false), "a<|im_end|>");
    assert_eq!(tokenizer.id_limit(), 260);
    assert!(tokenizer.fits(260).is_ok());
    assert_eq!(tokenizer.fits(259).unwrap_err().code, "data::tokenizer_mismatch");
}

#[test]
fn a_model_without_tokenizer_or_template_says_what_is_missing() {
    let dir = TempDir::new().unwrap();
    let problem = Tokenizer::load(&Files::from_dir(dir.path()).unwrap()).err().unwrap();
    assert_eq!((problem.code, problem.exit), ("data::no_tokenizer", Exit::Missing));
    byte_tokenizer(dir.path());
    std::fs::write(dir.path().join("tokenizer_config.json"), "{\"chat_template\": \"{% for %}\"}").unwrap();
    let load = || Tokenizer::load(&Files::from_dir(dir.path()).unwrap());
    assert_eq!(load().err().unwrap().code, "data::chat_template");
    std::fs::write(dir.path().join("chat_template.jinja"), "from its own file").unwrap();
    assert_eq!(load().unwrap().chat(&json!([]), None, true).unwrap(), "from its own file");
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    assert_eq!(load().unwrap().chat(&json!([]), None, true).unwrap_err().code, "data::no_chat_template");
    for broken in ["", "{", "{\"model\": {}}", "[]"] {
        std::fs::write(dir.path().join("tokenizer.json"), broken).unwrap();
        assert_eq!(load().err().unwrap().code, "data::tokenizer");
    }
}

/// Texts with what usually breaks borders: special tokens, line ends, characters that compose.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("<|im_end|>"),
        Just("<|im_start|>"),
        Just("\n"),
        Just(" "),
        Just("h"),
        Just("e"),
        Just("e\u{301}"),
        Just("\u{301}"),
        Just("<|im_start|>assistant\n"),
        Just("🦙"),
        Just("12"),
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_the_texts_the_prompt_is_its_own_tokens_and_one_end_token_is_last(question in text(), a in text(), b in text()) {
        let tokenizer = tokenizer();
        let row = records(&[json!({"id": "x", "prompt": question, "chosen": a, "rejected": b})]);
        match pairs(&row, &tokenizer, Format::Chat, &Limits::default()) {
            Err(problem) => prop_assert_eq!(problem.code, "data::equal_pair"),
            Ok((made, notes)) => {
                let context = prompt(&row[0], &tokenizer, Format::Chat).unwrap();
                for (side, text) in [(&made[0].chosen, &a), (&made[0].rejected, &b)] {
                    prop_assert_eq!(&side.ids[..context.len()], context.as_slice());
                    let (last, answer) = side.ids[context.len()..].split_last().unwrap();
                    prop_assert_eq!(*last, TURN_END);
                    prop_assert!(!tokenizer.decode(answer, false).trim_end().ends_with("<|im_end|>"));
                    prop_assert!(tokenizer.encode(text).starts_with(answer) || text.contains("<|im_end|>"));
                    prop_assert!(side.learned.iter().enumerate().all(|(t, &learned)| learned == (t >= context.len())));
                    prop_assert!(!answer.contains(&TURN_END) || !notes.inner_end.is_empty());
                }
            }
        }
    }
}

#[test]
fn a_tokenizer_file_cut_in_the_middle_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read_to_string("pipelines/mini/tokenizer/tokenizer.json").unwrap();
    for cut in [0, 1, 100, whole.find("\"decoder\"").unwrap() + 20, whole.len() / 2, whole.len() - 2] {
        std::fs::write(folder.path().join("tokenizer.json"), &whole[..cut]).unwrap();
        let problem = Tokenizer::load(&Files::from_dir(folder.path()).unwrap()).err().unwrap();
        assert_eq!(problem.code, "data::tokenizer", "cut at {cut}");
    }
}

#[test]
fn a_chat_template_that_does_not_end_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("pipelines/mini/tokenizer/{name}"), folder.path().join(name)).unwrap();
    }
    for template in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ messages | tojson(indent=70000) }}",
        "{%}",
    ] {
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let messages = json!([{"role": "user", "content": "hi"}]);
        let made = Tokenizer::load(&Files::from_dir(folder.path()).unwrap())
            .and_then(|tokenizer| tokenizer.chat(&messages, None, true));
        assert!(made.is_err(), "{template}");
    }
}
