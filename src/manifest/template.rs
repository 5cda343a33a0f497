//! `{axis}` in strings, and references such as `sft[size=7B]`. Syntax only: nothing is looked up.
//!
//! Only `{name}` is an axis, where a name starts with a letter or `_` and goes on with letters,
//! digits, `_`, `-`. Everything else with braces is text: `{}`, `{2,3}`, `{in.data}`, `\boxed{42}`,
//! and whatever stands in doubled braces (`{{ question }}`), which belong to prompt templates.

use std::ops::Range;

/// The axes a text names: (bytes with the braces, name).
pub fn axes(text: &str) -> Vec<(Range<usize>, &str)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(open) = text[at..].find('{').map(|open| at + open) {
        let rest = &text[open + 1..];
        if let Some(inside) = rest.strip_prefix('{') {
            // Doubled: skip to the matching doubled close.
            at = inside.find("}}").map_or(text.len(), |close| open + 2 + close + 2);
            continue;
        }
        match rest.find(['{', '}']).filter(|&end| rest[end..].starts_with('}') && is_name(&rest[..end])) {
            Some(end) => {
                found.push((open..open + end + 2, &rest[..end]));
                at = open + end + 2;
            }
            None => at = open + 1,
        }
    }
    found
}

/// The axis, when the text is exactly `{axis}`: then its value keeps its own type.
pub fn whole(text: &str) -> Option<&str> {
    let name = text.strip_prefix('{')?.strip_suffix('}')?;
    is_name(name).then_some(name)
}

/// The text with each axis replaced. `Err` is the first name `value` does not know.
pub fn fill<'t>(text: &'t str, mut value: impl FnMut(&'t str) -> Option<String>) -> Result<String, &'t str> {
    let mut filled = String::with_capacity(text.len());
    let mut at = 0;
    for (range, name) in axes(text) {
        filled.push_str(&text[at..range.start]);
        filled.push_str(&value(name).ok_or(name)?);
        at = range.end;
    }
    filled.push_str(&text[at..]);
    Ok(filled)
}

/// Whether `text` can name an axis.
pub fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && is_stage_name(text)
}

/// Whether `text` can name a stage: letters, digits, `_`, `-`.
pub fn is_stage_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// `stage` or `stage[axis=value,...]`: the cells of a stage, or those with the given values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The name before the bracket.
    pub stage: String,
    /// Axis and value as text; quotes around a value are taken off.
    pub fixed: Vec<(String, String)>,
}

impl Reference {
    /// `Err` says what is wrong, as a fragment.
    pub fn parse(text: &str) -> Result<Reference, String> {
        let text = text.trim();
        let (stage, mut rest) = match text.split_once('[') {
            Some((stage, rest)) => {
                (stage, rest.strip_suffix(']').ok_or_else(|| "the `[` is not closed by a `]` at the end".to_string())?)
            }
            None => (text, ""),
        };
        if !is_stage_name(stage) {
            return Err(format!("`{stage}` is not the name of a stage (letters, digits, `_`, `-`)"));
        }
        let mut fixed: Vec<(String, String)> = Vec::new();
        while !rest.trim().is_empty() {
            let (axis, after) = rest.split_once('=').ok_or_else(|| format!("`{rest}` is not `axis=value`"))?;
            let axis = axis.trim();
            if !is_name(axis) {
                return Err(format!("`{axis}` is not the name of an axis"));
            }
            let after = after.trim_start();
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => {
                    let (value, after) = quoted.split_once('"').ok_or("a quote is not closed")?;
                    (value, after.trim_start())
                }
                None => {
                    let end = after.find(',').unwrap_or(after.len());
                    (after[..end].trim_end(), &after[end..])
                }
            };
            if fixed.iter().any(|(name, _)| name == axis) {
                return Err(format!("axis `{axis}` is given twice"));
            }
            fixed.push((axis.to_string(), value.to_string()));
            rest = match after.strip_prefix(',') {
                Some(rest) => rest,
                None if after.is_empty() => after,
                None => return Err(format!("expected `,` before `{after}`")),
            };
        }
        Ok(Reference { stage: stage.to_string(), fixed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<&str> {
        axes(text).into_iter().map(|(_, name)| name).collect()
    }

    #[test]
    fn only_plain_names_in_single_braces_are_axes() {
        assert_eq!(names("hf:Qwen/Qwen2.5-{size}-Instruct"), ["size"]);
        assert_eq!(names("{a}{b-2}-{_c}"), ["a", "b-2", "_c"]);
        assert_eq!(names(r"\boxed{42} {} {2,3} {in.data} { a } {a b}"), [] as [&str; 0]);
        assert_eq!(names("{{ question }} {size} {{x}}"), ["size"]);
        assert_eq!(names("{% if x %}{a{b}"), ["b"]);
        assert_eq!(names("{{ open"), [] as [&str; 0]);
    }

    #[test]
    fn filling_keeps_everything_else() {
        assert_eq!(fill("x-{a}/{{a}}é{a}", |_| Some("1".into())).unwrap(), "x-1/{{a}}é1");
        assert_eq!(fill("{a}{b}", |name| (name == "a").then(String::new)), Err("b"));
        assert_eq!(whole("{size}"), Some("size"));
        assert_eq!(whole("{size} "), None);
    }

    #[test]
    fn references_fix_axes() {
        let fixed = |text: &str| Reference::parse(text).map(|reference| (reference.stage, reference.fixed));
        let pair = |axis: &str, value: &str| (axis.to_string(), value.to_string());
        assert_eq!(fixed("sft"), Ok(("sft".into(), vec![])));
        assert_eq!(fixed("sft[]"), Ok(("sft".into(), vec![])));
        assert_eq!(
            fixed(r#"sft[ size = 7B , data="a,b]" ]"#),
            Ok(("sft".into(), vec![pair("size", "7B"), pair("data", "a,b]")]))
        );
        for bad in ["", "a b", "sft[size=7B", "sft[7B]", "sft[size=1,size=2]", "sft[a=\"x", "sft[a=\"x\"y]", "hf:x"] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }
}
