//! Whatever a server writes, reading it ends in a completion, in words, or in another try; and a text that is paid for
//! is not thrown away for what stands beside it.

use crate::{Client, endpoint, sampling};
use pipe::remote::{Ask, Finish, Read, Remote, error_words, read, retry_after};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::time::Duration;

/// Any small JSON value.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        (-1e30f64..1e30).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn a_text_is_read_whatever_stands_beside_it(
        text in "[a-z ]{1,20}", usage in anything(), model in anything(), index in anything(), extra in anything(),
    ) {
        let body = json!({
            "id": extra, "object": index, "model": model, "usage": usage, "created": extra,
            "choices": [{"index": index, "message": {"role": extra, "content": text, "tool_calls": extra}, "logprobs": extra}],
        });
        let Read::Completion(completion) = read(&body.to_string()) else { panic!("{body}") };
        prop_assert_eq!((&completion.answer, &completion.finish, completion.thinking), (&text, &Finish::Stop, None));
    }

    #[test]
    fn no_bytes_make_a_reader_fail_or_talk_without_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let text = String::from_utf8_lossy(&bytes);
        if let Read::Useless(words) | Read::Error(_, words) = read(&text) {
            prop_assert!(words.chars().count() <= 500, "{}", words);
        }
        let words = error_words(&bytes);
        prop_assert!(words.chars().count() <= 500 && !words.contains('\n'));
        let wait = retry_after(&text, Some(&text), 0, Duration::from_secs(9));
        prop_assert!(wait.is_none_or(|wait| wait <= Duration::from_secs(9)));
    }

    /// Of a proper reply that is cut anywhere nothing is taken for whole.
    #[test]
    fn a_reply_that_is_cut_is_none(share in 0.0f64..1.0) {
        let body = json!({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}).to_string();
        let at = (share * body.len() as f64) as usize;
        prop_assert!(matches!(read(&body[..at]), Read::Useless(_)));
    }
}

#[test]
fn numbers_of_tokens_that_nobody_can_have_used_stay_numbers() {
    let body = |tokens: Value| json!({"choices": [{"message": {"content": "4"}}], "usage": {"prompt_tokens": tokens, "completion_tokens": 2}});
    let prompt = |tokens: Value| match read(&body(tokens).to_string()) {
        Read::Completion(completion) => completion.usage.map(|usage| usage.prompt_tokens),
        other => panic!("{other:?}"),
    };
    assert_eq!(prompt(json!(u64::MAX)), prompt(json!(1e300)));
    assert!(prompt(json!(u64::MAX)) < Some(1 << 50));
    assert_eq!(
        (prompt(json!(12.0)), prompt(json!(-3)), prompt(json!("12")), prompt(json!({}))),
        (Some(12), None, None, None)
    );
}

/// A journal cut at every place: the next reader has every line before the cut, and the next writer loses nothing.
#[test]
fn a_journal_that_is_cut_anywhere_costs_its_last_line_alone() {
    let server = crate::server::Server::start();
    let (client, endpoint) = (Client::new(), endpoint(&server, json!({})));
    let questions = crate::questions(3);
    client.complete(&endpoint, &questions, 10).unwrap();
    let folder = client.folder.path().join("journal");
    let path = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&path).unwrap();
    let asks = crate::asks(&questions);
    let kept = |asks: &[Ask]| {
        let line = Remote::new(&folder).offline(true).connection(&endpoint).unwrap();
        line.look().unwrap();
        asks.iter().filter(|ask| line.kept(ask, &sampling(10)).unwrap().is_some()).count()
    };
    for at in 0..whole.len() {
        std::fs::write(&path, &whole[..at]).unwrap();
        assert_eq!(kept(&asks), whole[..at].iter().filter(|byte| **byte == b'\n').count(), "cut at {at}");
    }
    // Doubled, and with lines of others in between, it says the same.
    let foreign = [whole.as_slice(), b"{}\nnull\n[1]\n\xff\xfe\n{\"key\": 3}\n", &whole].concat();
    std::fs::write(&path, foreign).unwrap();
    assert_eq!(kept(&asks), 3);
    server.asked();
    // Cut in the middle of the last line: that one is asked for again, and all are there.
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let client = client.again();
    client.complete(&endpoint, &questions, 10).unwrap();
    assert_eq!((server.asked().len(), kept(&asks)), (1, 3));
}
