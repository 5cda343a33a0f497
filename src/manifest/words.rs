//! Small pieces of wording that several messages share.

/// The name among `known` that is most like `name`, if one is like it.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .filter_map(|candidate| {
            let length = name.chars().count().max(candidate.chars().count());
            let distance = strsim::osa_distance(name, candidate);
            let alike = distance < length && distance <= (length / 3).clamp(1, 4)
                || name.len() > 2
                    && (candidate.starts_with(name) || name.starts_with(candidate) && candidate.len() > 2);
            alike.then_some((distance, candidate))
        })
        .min()
        .map(|(_, candidate)| candidate)
}

/// `` `a`, `b`, `c` ``; after twelve, how many more.
pub fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 12;
    let names: Vec<&str> = names.into_iter().collect();
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

/// `one`, `two`, ... `twelve`, then digits.
pub fn count(n: usize) -> String {
    const WORDS: [&str; 13] =
        ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
    WORDS.get(n).map_or_else(|| n.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_finds_its_neighbour_and_a_strange_one_none() {
        let known = ["learning_rate", "epochs", "lora", "schedule"];
        assert_eq!(nearest("lerning_rate", known), Some("learning_rate"));
        assert_eq!(nearest("learning_rat", known), Some("learning_rate"));
        assert_eq!(nearest("epoch", known), Some("epochs"));
        assert_eq!(nearest("zzz", known), None);
        assert_eq!(nearest("x", ["y"]), None);
        assert_eq!(nearest("", known), None);
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..15).map(|i| i.to_string()).collect();
        assert!(list(names.iter().map(String::as_str)).ends_with("`11` and 3 more"));
    }
}
