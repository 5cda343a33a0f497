//! The text of a completion while it is made: as much as can be shown already, and nothing that would have to be
//! taken back.
//!
//! Tokens are bytes, and a character may need several; a stop text, which is never shown, may begin in one token and end
//! in another. So bytes wait until their character is whole, and characters as long as they may be the beginning of a
//! stop text. What was shown is always the beginning of what the text is in the end.

/// One completion's text.
pub struct Shown<'s> {
    stop: &'s [String],
    /// Whether anything can be shown before the end.
    early: bool,
    /// The beginning of a character.
    pending: Vec<u8>,
    /// Whole characters that may be the beginning of a stop text, or follow one.
    held: String,
    /// Bytes and characters shown.
    sent: usize,
    sent_chars: usize,
    /// A stop text was seen: nothing more is shown but by [`Shown::end`].
    over: bool,
}

impl<'s> Shown<'s> {
    /// `early`: tokens are bytes, so that the text of the first ones does not depend on those after
    /// ([`crate::data::Tokenizer::is_byte_level`]).
    pub fn new(stop: &'s [String], early: bool) -> Shown<'s> {
        Shown { stop, early, pending: Vec::new(), held: String::new(), sent: 0, sent_chars: 0, over: false }
    }

    /// Bytes shown.
    pub fn sent(&self) -> usize {
        self.sent
    }

    /// Where in the text a token of these bytes begins, if it is the next one: in bytes and in characters. One that
    /// goes on with a character begins where that does.
    pub fn place(&self, bytes: &[u8]) -> (usize, usize) {
        let goes_on = bytes.first().is_some_and(|byte| byte & 0xc0 == 0x80);
        let broken = !self.pending.is_empty() && !goes_on;
        let before = if broken { char::REPLACEMENT_CHARACTER.len_utf8() } else { 0 };
        (self.sent + self.held.len() + before, self.sent_chars + self.held.chars().count() + usize::from(broken))
    }

    /// Takes the bytes of the next token and gives what can be shown now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        self.characters();
        if !self.early || self.over {
            return String::new();
        }
        let free = match self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            Some(at) => {
                self.over = true;
                at
            }
            None => self.held.len() - self.beginning_of_a_stop(),
        };
        let shown: String = self.held.drain(..free).collect();
        self.count(&shown);
        shown
    }

    /// The rest, now that the whole text is known.
    pub fn end(&mut self, text: &str) -> String {
        // It begins with what was shown; if it did not, what was shown could not be taken back.
        let rest = text.get(self.sent..).unwrap_or_default().to_string();
        self.held.clear();
        self.pending.clear();
        self.over = true;
        self.count(&rest);
        rest
    }

    fn count(&mut self, shown: &str) {
        self.sent += shown.len();
        self.sent_chars += shown.chars().count();
    }

    /// Moves whole characters from bytes to text. Bytes that can become none are U+FFFD, as everywhere.
    fn characters(&mut self) {
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(text) => {
                    self.held.push_str(text);
                    self.pending.clear();
                    return;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    self.held.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    match error.error_len() {
                        None => {
                            self.pending.drain(..valid);
                            return;
                        }
                        Some(length) => {
                            self.held.push(char::REPLACEMENT_CHARACTER);
                            self.pending.drain(..valid + length);
                        }
                    }
                }
            }
        }
    }

    /// Bytes at the end of what is held that a stop text may begin with.
    fn beginning_of_a_stop(&self) -> usize {
        let longest = |stop: &String| {
            let most = stop.len().saturating_sub(1).min(self.held.len());
            (1..=most).rev().find(|&length| self.held.as_bytes().ends_with(&stop.as_bytes()[..length])).unwrap_or(0)
        };
        self.stop.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text of all bytes, up to the first of the stop texts.
    fn whole(bytes: &[u8], stop: &[String]) -> String {
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        if let Some(at) = stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            text.truncate(at);
        }
        text
    }

    #[test]
    fn a_character_waits_until_it_is_whole() {
        let mut shown = Shown::new(&[], true);
        let parts: Vec<String> = [&b"a\xf0\x9f"[..], b"\x90", b"\x88b"].iter().map(|part| shown.push(part)).collect();
        assert_eq!(parts, ["a", "", "🐈b"]);
        assert_eq!((shown.sent(), shown.place(b"c"), shown.end("a🐈b").as_str()), (6, (6, 3), ""));
        let mut shown = Shown::new(&[], true);
        shown.push(b"a\xf0\x9f");
        assert_eq!((shown.place(b"\x90"), shown.place(b"b")), ((1, 1), (4, 2)), "after U+FFFD");
    }

    #[test]
    fn the_beginning_of_a_stop_text_waits_until_it_is_another() {
        let stop = ["END".to_string(), "NDE".to_string()];
        let mut shown = Shown::new(&stop, true);
        let parts: Vec<String> =
            ["xE", "N", "d", "EN", "D!", "more"].iter().map(|part| shown.push(part.as_bytes())).collect();
        assert_eq!(parts, ["x", "", "ENd", "", "", ""]);
        assert_eq!(shown.end("xENd"), "");
    }

    #[test]
    fn what_was_held_is_shown_if_the_length_ends_it() {
        let stop = ["END".to_string()];
        let mut shown = Shown::new(&stop, true);
        assert_eq!(shown.push(b"aEN"), "a");
        assert_eq!(shown.push(b"\xf0"), "");
        assert_eq!(shown.end("aEN\u{fffd}"), "EN\u{fffd}");
    }

    #[test]
    fn a_text_that_later_tokens_could_change_is_shown_at_its_end() {
        let mut shown = Shown::new(&[], false);
        assert_eq!(shown.push(b"abc"), "");
        assert_eq!(shown.end("abc"), "abc");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Bytes from a few letters and parts of characters, so that stop texts and broken characters are common.
        #[test]
        fn any_split_of_any_bytes_gives_the_same_text_and_no_part_of_a_stop_text(
            bytes in prop::collection::vec(prop::sample::select(b"ab\xc3\xa9\xe2\x82\xac\xf0\x9f\x90\x88\xff".to_vec()), 0..60),
            ends in prop::collection::vec(0usize..60, 0..20),
            stop in prop::collection::vec(prop::sample::select(vec!["ab", "ba", "aab", "é", "aé", "€b", "bbb", "🐈"]), 0..3),
        ) {
            let stop: Vec<String> = stop.into_iter().map(String::from).collect();
            let expected = whole(&bytes, &stop);
            let mut ends: Vec<usize> = ends.into_iter().map(|end| end.min(bytes.len())).chain([0, bytes.len()]).collect();
            ends.sort_unstable();
            let mut shown = Shown::new(&stop, true);
            let mut text = String::new();
            for range in ends.windows(2) {
                text += &shown.push(&bytes[range[0]..range[1]]);
                prop_assert!(expected.starts_with(&text), "{text:?} is not the beginning of {expected:?}");
                prop_assert_eq!(shown.sent(), text.len());
            }
            text += &shown.end(&expected);
            prop_assert_eq!(&text, &expected);
            prop_assert_eq!(shown.place(b"x"), (text.len(), text.chars().count()));
        }
    }
}
