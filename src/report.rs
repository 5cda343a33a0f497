//! The one place that chooses words: problems, with the excerpt they are about, and numbers as
//! people read them. Everything here makes text; nothing prints.

use crate::cli::screen::printable;
use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use pipe::problem::{Place, Problem};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;

/// The texts that may be excerpted: a manifest, its includes, what `--set` said.
pub type Texts<'a> = &'a dyn Fn(&Path) -> Option<&'a str>;

/// No text to excerpt: problems outside manifests.
pub fn no_texts(_: &Path) -> Option<&'static str> {
    None
}

/// Whether a stream wants colour: a terminal, and nobody said `NO_COLOR`.
pub fn colour(stream: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A problem as a terminal shows it, without a newline at its end.
///
/// ```text
/// error[manifest::unknown_key]: unknown key `learning_rat` in stage `sft`
///   --> pipelines/tiny.toml:14:1
///    |
/// 14 | learning_rat = 2e-4
///    | ^^^^^^^^^^^^
///    |
/// help: a key with a similar name exists: `learning_rate`
/// ```
pub fn problem(problem: &Problem, texts: Texts, colour: bool) -> String {
    let mut problem = problem.clone();
    // A message may quote what a model wrote.
    let quoted = problem.notes.iter_mut().chain(&mut problem.help).chain([&mut problem.message]);
    quoted.for_each(|text| *text = printable(text));
    let problem = &problem;
    if !problem.places.iter().any(|place| place.span.is_some() && texts(&place.file).is_some()) {
        return plain(problem, colour);
    }
    let mut main = Group::with_title(Level::ERROR.primary_title(&problem.message).id(problem.code));
    let mut rest = problem.places.as_slice();
    while let Some(first) = rest.first() {
        // Places of one file in a row share an excerpt.
        let same = rest.iter().take_while(|place| place.file == first.file).count();
        let (here, after) = rest.split_at(same);
        rest = after;
        let path = first.file.display().to_string();
        let spans: Vec<&Place> = here.iter().filter(|place| place.span.is_some()).collect();
        match texts(&first.file) {
            Some(text) if !spans.is_empty() => {
                let several = spans.len() > 1;
                let marks = spans.iter().enumerate().filter_map(|(at, place)| {
                    let span = clamp(place.span.clone()?, text);
                    let kind = if several && at > 0 && place.label.is_empty() {
                        AnnotationKind::Context
                    } else {
                        AnnotationKind::Primary
                    };
                    let label = (!place.label.is_empty()).then_some(place.label.as_str());
                    Some(kind.span(span).label(label))
                });
                main = main.element(Snippet::source(text).path(path).annotations(marks));
            }
            _ => {
                for place in here {
                    let origin = Origin::path(path.clone());
                    main = main.element(match place.line {
                        Some(line) => origin.line(line),
                        None => origin,
                    });
                }
            }
        }
    }
    let notes = problem.notes.iter().map(|note| Group::with_title(Level::NOTE.secondary_title(note.as_str())));
    let help = problem.help.iter().map(|help| Group::with_title(Level::HELP.secondary_title(help.as_str())));
    let report: Vec<Group> = std::iter::once(main).chain(notes).chain(help).collect();
    let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
    renderer.term_width(width()).render(&report)
}

/// A problem about no text: the same shape without an excerpt.
fn plain(problem: &Problem, colour: bool) -> String {
    let paint = |style: &str, text: &str| if colour { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_string() };
    let indent = |text: &str| text.replace('\n', "\n      ");
    let mut text = paint("1;91", &format!("error[{}]", problem.code));
    let _ = write!(text, "{}", paint("1", &format!(": {}", problem.message)));
    for place in &problem.places {
        let _ = write!(text, "\n  {} {}", paint("1;94", "-->"), place.file.display());
        if let Some(line) = place.line {
            let _ = write!(text, ":{line}");
        }
    }
    for note in &problem.notes {
        let _ = write!(text, "\n{}: {}", paint("1;92", "note"), indent(note));
    }
    for help in &problem.help {
        let _ = write!(text, "\n{}: {}", paint("1;96", "help"), indent(help));
    }
    text
}

/// A span that lies in the text, whatever was said.
fn clamp(span: std::ops::Range<usize>, text: &str) -> std::ops::Range<usize> {
    let inside = |at: usize| {
        let mut at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = inside(span.start);
    start..inside(span.end).max(start)
}

/// Columns to draw excerpts in: those of the terminal, else what everybody has.
fn width() -> usize {
    std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok())
        .filter(|columns| *columns >= 40)
        .unwrap_or(120)
}

/// A problem as an object, for `--json`.
pub fn problem_json(problem: &Problem, texts: Texts) -> Value {
    let places: Vec<Value> = problem
        .places
        .iter()
        .map(|place| {
            let mut object = json!({ "file": place.file.display().to_string() });
            if let (Some(span), Some(text)) = (&place.span, texts(&place.file)) {
                let span = clamp(span.clone(), text);
                let ((line, column), (end_line, end_column)) =
                    (line_column(text, span.start), line_column(text, span.end));
                object["line"] = json!(line);
                object["column"] = json!(column);
                object["end_line"] = json!(end_line);
                object["end_column"] = json!(end_column);
            } else if let Some(line) = place.line {
                object["line"] = json!(line);
            }
            if !place.label.is_empty() {
                object["label"] = json!(place.label);
            }
            object
        })
        .collect();
    json!({
        "code": problem.code,
        "message": problem.message,
        "places": places,
        "notes": problem.notes,
        "help": problem.help,
        "exit": problem.exit as i32,
    })
}

/// A problem as a workflow command of GitHub: an annotation in the changed files of a pull request.
pub fn problem_github(problem: &Problem, texts: Texts) -> String {
    let mut properties = Vec::new();
    let value = problem_json(problem, texts);
    if let Some(place) = value["places"].get(0) {
        let names = [
            ("file", "file"),
            ("line", "line"),
            ("col", "column"),
            ("endLine", "end_line"),
            ("endColumn", "end_column"),
        ];
        for (name, key) in names {
            match &place[key] {
                Value::String(text) => properties.push(format!("{name}={}", github_escape(text, true))),
                Value::Number(number) => properties.push(format!("{name}={number}")),
                _ => {}
            }
        }
    }
    properties.push(format!("title={}", github_escape(problem.code, true)));
    let mut text = problem.message.clone();
    for note in &problem.notes {
        let _ = write!(text, "\nnote: {note}");
    }
    for help in &problem.help {
        let _ = write!(text, "\nhelp: {help}");
    }
    format!("::error {}::{}", properties.join(","), github_escape(&text, false))
}

fn github_escape(text: &str, property: bool) -> String {
    let escaped = text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    if property { escaped.replace(':', "%3A").replace(',', "%2C") } else { escaped }
}

/// 1-based line and column (in characters) of a byte of `text`.
fn line_column(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..at];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
    (line, column)
}

/// `3m 12s`, `4.2s`, `85ms`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match seconds {
        s if s < 1.0 => format!("{:.0}ms", s * 1000.0),
        s if s < 60.0 => format!("{s:.1}s"),
        s if s < 3600.0 => format!("{}m {:02}s", whole / 60, whole % 60),
        _ => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
    }
}

pub use pipe::measure::bytes;

/// `1 stage`, `12 stages`, `1,204 cells`.
pub fn count(number: usize, what: &str) -> String {
    format!("{} {what}{}", self::number(number as u64), if number == 1 { "" } else { "s" })
}

/// `1,204,000`.
pub fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!([0.0851, 4.23, 192.4, 7384.0].map(duration), ["85ms", "4.2s", "3m 12s", "2h 03m"]);
        assert_eq!([512, 4096, 851_443_712, 3_650_722_202].map(bytes), ["512 B", "4.0 KiB", "812 MiB", "3.4 GiB"]);
        assert_eq!(
            [count(1, "stage"), count(12, "stage"), count(1_204_000, "cell")],
            ["1 stage", "12 stages", "1,204,000 cells"]
        );
    }

    #[test]
    fn a_span_outside_the_text_or_inside_a_letter_is_shown_where_it_can_be() {
        let text = "é = 1\n";
        let wrong = Problem::new("a::b", "wrong").at_span("m.toml", 1..900, "here");
        assert!(problem(&wrong, &|_| Some(text), false).contains("m.toml:1:1"));
    }

    #[test]
    fn a_workflow_command_stays_on_one_line() {
        let wrong = Problem::new("a::b", "50 %: wrong").at_span("m,1.toml", 2..3, "").note("line\nbreak");
        assert_eq!(
            problem_github(&wrong, &|_| Some("a\nb\n")),
            "::error file=m%2C1.toml,line=2,col=1,endLine=2,endColumn=2,title=a%3A%3Ab::50 %25: wrong%0Anote: line%0Abreak"
        );
    }
}
