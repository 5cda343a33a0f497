//! Text of models and data on a terminal: nothing in it is obeyed, and lines end where the terminal does.

use std::io::IsTerminal;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Columns of stdout; `None` where it is no terminal, so that what is kept in a file keeps its lines.
pub fn columns() -> Option<usize> {
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let stdout = std::io::stdout();
    let measured = || stdout.is_terminal().then(|| terminal_size::terminal_size_of(&stdout)).flatten();
    said.or_else(|| measured().map(|(width, _)| usize::from(width.0))).filter(|columns| *columns >= 20)
}

/// Whether a terminal would act on a character instead of showing it: escape sequences begin with one of the
/// controls (C0, DEL, C1), marks of direction reorder what stands around them, and tags are not seen at all.
fn acts(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(letter, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// A text with line breaks, everything else that a terminal would act on written out: `\x1b`, `\u{202e}`.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\n' => shown.push('\n'),
            '\t' => shown.push_str("    "),
            letter if !acts(letter) => shown.push(letter),
            letter if u32::from(letter) < 0x100 => shown.push_str(&format!("\\x{:02x}", u32::from(letter))),
            letter => shown.extend(letter.escape_unicode()),
        }
    }
    shown
}

/// On one line, in at most `most` columns.
pub fn short(text: &str, most: usize) -> String {
    // A text may be long: what cannot be seen need not be made ready.
    let head: String = text.chars().take(4 * most).collect();
    let line = printable(&head.split_whitespace().collect::<Vec<_>>().join(" "));
    if line.width() <= most && head.len() == text.len() {
        return line;
    }
    let mut width = 0;
    let fits = |letter: &char| {
        width += letter.width().unwrap_or(0);
        width < most
    };
    line.chars().take_while(fits).collect::<String>() + "…"
}

/// Blanks behind a text up to `width` columns.
pub fn pad(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(text.width())))
}

/// Lines no wider than `columns`, each behind `indent`: broken at blanks where there are any, anywhere otherwise.
/// The text is as [`printable`] made it.
pub fn wrap(text: &str, columns: Option<usize>, indent: &str) -> String {
    let room = columns.map_or(usize::MAX, |columns| columns.saturating_sub(indent.width()).max(10));
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    let mut put = |line: &str| {
        if !line.trim_end().is_empty() {
            out.push_str(indent);
            out.push_str(line.trim_end());
        }
        out.push('\n');
    };
    for line in text.lines() {
        let (mut start, mut width, mut blank) = (0, 0, None);
        for (at, letter) in line.char_indices() {
            let wide = letter.width().unwrap_or(0);
            if width + wide > room {
                // The blank itself is left out, unless it is the indentation of the line.
                let end = blank.filter(|blank| !line[start..*blank].trim().is_empty());
                put(&line[start..end.unwrap_or(at)]);
                start = end.map_or(at, |end| end + 1);
                blank = None;
                if end.is_none() && letter == ' ' {
                    (start, width) = (at + 1, 0);
                    continue;
                }
                width = line[start..at].width();
            }
            if letter == ' ' {
                blank = Some(at);
            }
            width += wide;
        }
        put(&line[start..]);
    }
    out
}

/// An object on a line of its own, as JSON of which a terminal obeys nothing either.
pub fn json_line(value: &serde_json::Value) -> String {
    let text = value.to_string();
    let mut line = String::with_capacity(text.len() + 1);
    for letter in text.chars() {
        // These occur inside strings only, where an escape stands for the same character.
        match acts(letter) {
            true => letter.encode_utf16(&mut [0; 2]).iter().for_each(|unit| line.push_str(&format!("\\u{unit:04x}"))),
            false => line.push(letter),
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        let text = "a\x1b[31mred\x07 \u{9b}2J\x7f\r\nb\u{202e}c\u{e0041}\t|";
        assert_eq!(printable(text), "a\\x1b[31mred\\x07 \\x9b2J\\x7f\\x0d\nb\\u{202e}c\\u{e0041}    |");
        let line = json_line(&serde_json::json!({ "text": text }));
        assert!(line.trim_end().chars().all(|letter| !acts(letter)), "{line}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).expect("JSON")["text"], text);
    }

    #[test]
    fn lines_are_broken_at_blanks_and_long_words_anywhere() {
        assert_eq!(wrap("one two three\n\n  four", Some(12), "  "), "  one two\n  three\n\n    four\n");
        assert_eq!(wrap("abcdefghijklmnop q", Some(12), "  "), "  abcdefghij\n  klmnop q\n");
        // Letters of two columns.
        assert_eq!(wrap("数学数学数学", Some(10), ""), "数学数学数\n学\n");
        assert_eq!(wrap("one two three", None, ""), "one two three\n");
    }

    #[test]
    fn a_short_text_is_cut_by_columns() {
        assert_eq!(short("two\n words", 9), "two words");
        assert_eq!(short("two words more", 9), "two word…");
        assert_eq!(short("数学数学", 6), "数学…");
        assert_eq!(short(&"x".repeat(1_000_000), 4), "xxx…");
    }

    proptest! {
        #[test]
        fn no_wrapped_line_is_too_wide_and_no_letter_is_lost(text in "[ a-z数\\n]{0,80}", columns in 12usize..40) {
            let wrapped = wrap(&text, Some(columns), "  ");
            prop_assert!(wrapped.lines().all(|line| line.width() <= columns), "{}", wrapped);
            let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            prop_assert_eq!(letters(&wrapped), letters(&text));
        }
    }
}
