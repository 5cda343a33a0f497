//! What a judge's reply says: strictly, or it says nothing.

use serde::Deserialize;

/// What is to be read in a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// `correct` or `wrong`.
    Verdict,
    /// The number of one option of this many, or -1.
    Option(usize),
    /// A to D, or -1.
    Letter,
}

/// What a reply says, if it says it as it was told to.
pub fn read(reply: &str, cut: bool, reads: Reads) -> Result<String, String> {
    if cut {
        return Err("cut off by `max_tokens`".into());
    }
    let reply = reply.trim();
    match reads {
        Reads::Verdict => verdict(reply).map(String::from),
        Reads::Option(count) => match reply.parse::<i64>() {
            Ok(-1) => Ok("-1".into()),
            Ok(number) if (1..=count as i64).contains(&number) => Ok(number.to_string()),
            _ => Err(format!("neither a number from 1 to {count} nor -1")),
        },
        Reads::Letter => match reply {
            "A" | "B" | "C" | "D" | "-1" => Ok(reply.to_string()),
            _ => Err("neither a letter from A to D nor -1".into()),
        },
    }
}

/// `{"verdict": ...}`, or a last line that is a verdict with no other verdict on a line before it.
fn verdict(reply: &str) -> Result<&'static str, String> {
    #[derive(Deserialize)]
    struct Object {
        verdict: String,
    }
    let word = |word: &str| match word {
        "correct" => Some("correct"),
        "wrong" => Some("wrong"),
        _ => None,
    };
    if reply.starts_with('{') {
        let object = serde_json::from_str::<Object>(reply).map_err(|error| format!("no verdict: {error}"))?;
        return word(&object.verdict).ok_or_else(|| "the verdict is neither `correct` nor `wrong`".into());
    }
    let lines = reply.lines().filter_map(|line| Some(line.trim().strip_prefix("VERDICT:")?.trim()));
    let said: Vec<Option<&str>> = lines.map(word).collect();
    let ends_so = reply.lines().last().is_some_and(|line| line.trim().starts_with("VERDICT:"));
    match said.as_slice() {
        [Some(verdict)] if ends_so => Ok(if *verdict == "correct" { "correct" } else { "wrong" }),
        [] => Err("no line `VERDICT: ...`".into()),
        [_] if ends_so => Err("the verdict is neither `correct` nor `wrong`".into()),
        [_] => Err("something stands behind the verdict".into()),
        _ => Err("several verdicts".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_read_only_as_it_was_asked_for() {
        for (reply, said) in [
            ("VERDICT: correct", Some("correct")),
            ("Both are 4.\nVERDICT: wrong\n", Some("wrong")),
            ("{\"reason\": \"same\", \"verdict\": \"correct\"}", Some("correct")),
            ("correct", None),
            ("VERDICT: correct.", None),
            ("VERDICT: Correct", None),
            ("VERDICT: correct or wrong", None),
            ("VERDICT: correct\nBut is it?", None),
            ("VERDICT: wrong\nVERDICT: correct", None),
            ("The attempt says VERDICT: correct", None),
            ("{\"verdict\": true}", None),
            ("{\"verdict\": \"wrong\", \"verdict\": \"correct\"}", None),
            ("{\"verdict\": \"correct\"} and more", None),
            ("", None),
        ] {
            assert_eq!(read(reply, false, Reads::Verdict).ok().as_deref(), said, "{reply}");
        }
        assert!(read("VERDICT: correct", true, Reads::Verdict).is_err());
    }

    #[test]
    fn an_option_is_one_of_those_there_are() {
        let option = |reply: &str| read(reply, false, Reads::Option(2)).ok();
        assert_eq!((option("2"), option(" -1\n")), (Some("2".into()), Some("-1".into())));
        assert_eq!((option("3"), option("0"), option("1 or 2"), option("Index: 1")), (None, None, None, None));
        let letter = |reply: &str| read(reply, false, Reads::Letter).ok();
        assert_eq!((letter("C"), letter("E"), letter("(C)")), (Some("C".into()), None, None));
    }
}
