//! What a server says: the body of a completion, the body of an error, and when it may be asked again.
//!
//! Input: a body; `Retry-After`; `Date`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::remote::{Finish, Read, error_words, read, retry_after};
use std::time::Duration;

/// Words for people are no longer.
const WORDS: usize = 1_000;
const LONGEST: Duration = Duration::from_secs(300);

fuzz_target!(init: pipe_fuzz::start("reply"), |input: &[u8]| {
    let [body, after, date] = pipe_fuzz::parts(input);
    let text = pipe_fuzz::text(body);
    let said = read(&text);
    assert_eq!(said, read(&text), "a reply is a function of its body");
    match said {
        Read::Completion(completion) => {
            let whole = completion.text();
            assert!(whole.contains(&completion.answer));
            assert!(completion.thinking.iter().all(|thinking| whole.contains(thinking) && !thinking.trim().is_empty()));
            assert_eq!(completion.refused().is_none(), matches!(completion.finish, Finish::Stop | Finish::Length));
            assert!(completion.refused().is_none_or(|why| why.chars().count() <= WORDS));
            assert!(!completion.finish().is_empty() || matches!(completion.finish, Finish::Other(_)));
            // What is added up over any number of replies stays a number.
            let usage = completion.usage.unwrap_or_default();
            let most = usage.prompt_tokens.max(usage.completion_tokens).max(usage.reasoning_tokens);
            assert!(most.checked_mul(1 << 20).is_some());
        }
        Read::Useless(why) => assert!(!why.is_empty() && why.len() <= WORDS),
        Read::Error(_, words) => assert!(words.chars().count() <= WORDS && !words.contains('\n')),
    }
    let words = error_words(body);
    assert!(words.chars().count() <= WORDS && !words.contains('\n'));
    let (after, date) = (pipe_fuzz::text(after), pipe_fuzz::text(date));
    for date in [None, Some(&*date)] {
        let wait = retry_after(&after, date, 1_700_000_000, LONGEST);
        assert!(wait.is_none_or(|wait| !wait.is_zero() && wait <= LONGEST));
    }
});
