//! `pipe show M CELL --against CELL`: two evaluations side by side.

use super::found::Found;
use super::global::{Done, Global, print};
use super::screen::{self, short};
use super::transcripts::{ANSWER, Browse, ID, each_line, grid, id_of};
use pipe::exec::Engine;
use pipe::files::Files;
use pipe::problem::{Exit, Problem};
use pipe::stage::readings::{self, Outcomes};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Two evaluations of the same problems: where they differ, and whether more than by chance.
pub fn compare(global: &Global, engine: &Engine, pair: [&Found; 2], browse: &Browse) -> Done {
    let [one, other] = [side(engine, pair[0])?, side(engine, pair[1])?];
    if !one.outcomes.keys().eq(other.outcomes.keys()) {
        let both = one.outcomes.keys().filter(|id| other.outcomes.contains_key(*id)).count();
        let counts = format!("{} and {} problems, {both} of them the same", one.outcomes.len(), other.outcomes.len());
        let message = format!("`{}` and `{}` are not of the same problems", pair[0].label, pair[1].label);
        return Err(Problem::new("cli::other_problems", message).note(counts).exit(Exit::Usage).into());
    }
    let rate = |(correct, samples): (u64, u64)| correct as f64 / samples.max(1) as f64;
    let single = one.outcomes.values().chain(other.outcomes.values()).all(|(_, samples)| *samples == 1);
    let (mut differing, mut better, mut both_right) = (Vec::new(), [0usize; 2], 0usize);
    for ((id, first), second) in one.outcomes.iter().zip(other.outcomes.values()) {
        match rate(*first).total_cmp(&rate(*second)) {
            std::cmp::Ordering::Equal => both_right += usize::from(first.0 > 0),
            order => {
                better[usize::from(order.is_lt())] += 1;
                differing.push((id.as_str(), [*first, *second]));
            }
        }
    }
    let p = readings::paired_p(&one.outcomes, &other.outcomes);
    let alike = one.outcomes.len() - differing.len();
    let grep = browse.grep.as_ref().map(|text| text.to_lowercase());
    let extracted = [one.answers(&differing)?, other.answers(&differing)?];
    let said = |side: usize, id: &str| extracted[side].get(id);
    let kept = |id: &&str| {
        let texts = [said(0, id), said(1, id)]
            .into_iter()
            .flatten()
            .flat_map(|(gold, answers)| std::iter::once(gold).chain(answers).map(|text| text.to_lowercase()));
        grep.as_ref().is_none_or(|wanted| texts.chain([id.to_lowercase()]).any(|text| text.contains(wanted)))
    };
    let rows = differing.iter().filter(|(id, _)| kept(id)).skip(browse.offset);
    let rows: Vec<_> = rows.take(browse.limit.unwrap_or(usize::MAX)).collect();
    if global.json {
        let row = |(id, outcomes): &&(&str, [(u64, u64); 2])| {
            let of = |side: usize| {
                let (correct, samples) = outcomes[side];
                let extracted = said(side, id).map(|(_, answers)| answers);
                json!({ "correct": correct, "samples": samples, "extracted": extracted })
            };
            json!({ "id": id, "gold": said(0, id).map(|(gold, _)| gold), "first": of(0), "second": of(1) })
        };
        let object = json!({
            "first": pair[0].label, "second": pair[1].label, "problems": one.outcomes.len(), "alike": alike,
            "first_better": better[0], "second_better": better[1], "p": p,
            "differing": rows.iter().map(row).collect::<Vec<Value>>(),
        });
        return print(&screen::json_line(&object));
    }
    let mut lines: Vec<Vec<String>> = Vec::new();
    for (id, outcomes) in rows {
        let of = |side: usize| {
            let (correct, samples) = outcomes[side];
            let right = match (single, correct) {
                (true, 0) => "wrong".to_string(),
                (true, _) => "correct".to_string(),
                (false, _) => format!("{correct}/{samples}"),
            };
            let answers = said(side, id).map_or(String::new(), |(_, answers)| answers.join(" | "));
            (right, short(&answers, ANSWER))
        };
        let (first, second) = (of(0), of(1));
        let gold = said(0, id).map_or("-".to_string(), |(gold, _)| short(gold, ANSWER));
        lines.push(vec![short(id, ID), gold, first.0, first.1, second.0, second.1]);
    }
    let mut text = format!("first   {}\nsecond  {}\n\n", pair[0].label, pair[1].label);
    if !lines.is_empty() {
        text.push_str(&grid(&["id", "gold", "first", "it says", "second", "it says"], &lines, usize::MAX));
        text.push('\n');
    }
    let (wrong, total) = (alike - both_right, one.outcomes.len());
    let _ = writeln!(
        text,
        "{} of {total} differ: {} better in the first, {} in the second",
        differing.len(),
        better[0],
        better[1]
    );
    let _ = match single {
        true => writeln!(text, "{alike} alike: {both_right} right in both, {wrong} in neither"),
        false => writeln!(text, "{alike} alike"),
    };
    if let Some(p) = p {
        let p = if p < 0.0005 { "p < 0.001".to_string() } else { format!("p = {p:.3}") };
        let _ = writeln!(text, "{p}: how often chance alone is as far apart (exact paired permutation test)");
    }
    print(&text)
}

/// An evaluation to be compared.
struct Side {
    outcomes: Outcomes,
    files: Files,
}

/// The gold answer and what was extracted from each sample.
type Answers = BTreeMap<String, (String, Vec<String>)>;

fn side(engine: &Engine, found: &Found) -> Result<Side, Problem> {
    let files = found.record.as_ref().map(|record| engine.store.files(&record.artifact)).unwrap_or_default();
    match readings::outcomes_of(&files, &found.label)? {
        Some(outcomes) => Ok(Side { outcomes, files }),
        None => {
            let message = format!("`{}` does not say which problems it solves", found.label);
            let help = "evaluations are compared, of which this version made the scores";
            Err(Problem::new("cli::no_outcomes", message).help(help).exit(Exit::Usage))
        }
    }
}

impl Side {
    fn answers(&self, differing: &[(&str, [(u64, u64); 2])]) -> Result<Answers, Problem> {
        let mut answers: Answers =
            differing.iter().map(|(id, _)| (id.to_string(), (String::new(), Vec::new()))).collect();
        let Some(path) = self.files.get("transcripts.jsonl") else { return Ok(answers) };
        let mut line = 0;
        each_line(path, &mut |fields| {
            let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or("-").to_string();
            if let Some((gold, extracted)) = answers.get_mut(&id_of(&fields, line)) {
                *gold = text("gold");
                extracted.push(text("extracted"));
            }
            line += 1;
            true
        })?;
        Ok(answers)
    }
}
