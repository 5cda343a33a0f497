//! A table as text, Markdown, CSV, LaTeX and JSON.

use super::grid::{COUNTED, Entry, Grid, Interval, SIGNIFICANT};
use super::spec::Spec;
use comfy_table::{Cell as TextCell, CellAlignment, ContentArrangement, LineStyle, Table, presets};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

impl Grid {
    pub fn markdown(&self, spec: &Spec) -> String {
        let mut text = String::new();
        if let Some(caption) = &spec.caption {
            let _ = writeln!(text, "{caption}\n");
        }
        let titles = self.row_names.iter().cloned().chain(self.columns.iter().map(|column| column.title.clone()));
        let _ = writeln!(text, "| {} |", titles.map(|title| markdown_escape(&title)).collect::<Vec<_>>().join(" | "));
        let rules = self.row_names.iter().map(|_| "---").chain(self.columns.iter().map(|_| "---:"));
        let _ = writeln!(text, "| {} |", rules.collect::<Vec<_>>().join(" | "));
        for (row, entries) in self.rows.iter().zip(&self.entries) {
            let labels = row.iter().map(|label| markdown_escape(label));
            let cells = entries.iter().map(|entry| {
                let number = number(entry.value, spec.decimals);
                let mut cell = if entry.best { format!("**{number}**") } else { number };
                cell.push_str(if entry.differs() { "†" } else { "" });
                if let Some(interval) = entry.interval {
                    let _ = write!(cell, " {}", sides(interval, "± ", spec.decimals));
                }
                if let Some(published) = entry.published {
                    let _ = write!(cell, " ({published:.*})", spec.decimals);
                }
                cell
            });
            let _ = writeln!(text, "| {} |", labels.chain(cells).collect::<Vec<_>>().join(" | "));
        }
        for notes in [self.notes("**bold**", spec), self.count_notes()] {
            if !notes.is_empty() {
                let _ = writeln!(text, "\n{}.", markdown_escape(&notes.join("; ")));
            }
        }
        text
    }

    pub fn csv(&self, spec: &Spec) -> String {
        let (with_interval, with_published) =
            (self.any(|entry| entry.interval.is_some()), self.any(|entry| entry.published.is_some()));
        // What was counted in a column's cells, of what occurs.
        let counted = |at: usize| -> Vec<&'static str> {
            let occurs =
                |name: &str, row: &Vec<Entry>| row[at].counts.iter().any(|(known, n)| *known == name && *n > 0);
            COUNTED.into_iter().filter(|name| self.entries.iter().any(|row| occurs(name, row))).collect()
        };
        let counted: Vec<Vec<&str>> = (0..self.columns.len()).map(counted).collect();
        let mut header = self.row_names.clone();
        for (column, counted) in self.columns.iter().zip(&counted) {
            let titled = |what: &str| format!("{} {what}", column.title);
            header.push(column.title.clone());
            header.extend(with_interval.then(|| [titled("low"), titled("high")]).into_iter().flatten());
            header.extend(with_published.then(|| titled("published")));
            header.extend(counted.iter().map(|name| titled(name)));
        }
        let mut text = csv_line(&header);
        let plain = |value: Option<f64>| value.map_or(String::new(), |value| number(Some(value), spec.decimals));
        for (row, entries) in self.rows.iter().zip(&self.entries) {
            let mut fields = row.clone();
            for (entry, counted) in entries.iter().zip(&counted) {
                fields.push(plain(entry.value));
                if with_interval {
                    let ends = entry.value.zip(entry.interval);
                    fields.push(plain(ends.map(|(value, interval)| value - interval.below)));
                    fields.push(plain(ends.map(|(value, interval)| value + interval.above)));
                }
                fields.extend(with_published.then(|| plain(entry.published)));
                let count = |name: &str| entry.counts.iter().find(|(known, _)| *known == name).map(|(_, n)| n);
                fields.extend(counted.iter().map(|name| count(name).map_or(String::new(), u64::to_string)));
            }
            text.push_str(&csv_line(&fields));
        }
        text
    }

    pub fn latex(&self, spec: &Spec) -> String {
        let mut text = String::from("% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n");
        if let Some(caption) = &spec.caption {
            let _ = writeln!(text, "\\caption{{{}}}", latex_escape(caption));
        }
        let _ = writeln!(
            text,
            "\\begin{{tabular}}{{{}{}}}\n\\toprule",
            "l".repeat(self.row_names.len()),
            "r".repeat(self.columns.len())
        );
        let titles = self.row_names.iter().chain(self.columns.iter().map(|column| &column.title));
        let _ = writeln!(text, "{} \\\\\n\\midrule", titles.map(|t| latex_escape(t)).collect::<Vec<_>>().join(" & "));
        for (at, (row, entries)) in self.rows.iter().zip(&self.entries).enumerate() {
            if self.row_names.len() > 1 && at > 0 && self.rows[at - 1][0] != row[0] {
                text.push_str("\\midrule\n");
            }
            let labels = row.iter().map(|label| latex_escape(label));
            let cells = entries.iter().map(|entry| {
                let mut cell = latex_number(entry, spec.decimals);
                if let Some(published) = entry.published {
                    let _ = write!(cell, " ({published:.*})", spec.decimals);
                }
                cell
            });
            let _ = writeln!(text, "{} \\\\", labels.chain(cells).collect::<Vec<_>>().join(" & "));
        }
        text.push_str("\\bottomrule\n\\end{tabular}\n");
        let counts = self.count_notes();
        if !counts.is_empty() {
            let _ = writeln!(text, "\\par\\smallskip{{\\footnotesize {}.\\par}}", latex_escape(&counts.join("; ")));
        }
        text.push_str("\\end{table}\n");
        text
    }

    /// For a terminal: a label equal to the one above it in the same group is left blank, numbers
    /// line up at the point, and what the marks mean stands below.
    pub fn text(&self, spec: &Spec) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.style_mut().header_separator = LineStyle::new('─', '─', '─', '─');
        let header =
            self.row_names.iter().map(TextCell::new).chain(
                self.columns.iter().map(|column| TextCell::new(&column.title).set_alignment(CellAlignment::Right)),
            );
        table.set_header(header.collect::<Vec<_>>());
        let cells = self.text_cells(spec);
        for (at, row) in self.rows.iter().enumerate() {
            let repeated =
                |depth: usize| at > 0 && depth + 1 < row.len() && self.rows[at - 1][..=depth] == row[..=depth];
            let labels = row.iter().enumerate().map(|(depth, label)| if repeated(depth) { "" } else { label.as_str() });
            let numbers = cells[at].iter().map(|cell| TextCell::new(cell).set_alignment(CellAlignment::Right));
            table.add_row(labels.map(TextCell::new).chain(numbers).collect::<Vec<_>>());
        }
        let mut text = String::new();
        if let Some(caption) = &spec.caption {
            let _ = writeln!(text, "{caption}");
        }
        let last = self.row_names.len() + self.columns.len() - 1;
        for (at, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, if at < last { 2 } else { 0 }));
        }
        for line in table.lines() {
            // The layout leaves a place for a border on the left.
            let line: String = line.chars().skip(1).collect();
            let _ = writeln!(text, "{}", line.replace(NO_BREAK_SPACE, " ").trim_end());
        }
        let notes = self.notes("*", spec);
        if !notes.is_empty() {
            let _ = writeln!(text, "{}", notes.join("; "));
        }
        for note in self.count_notes() {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    /// Cells of equal width within a column: number, mark, interval, published.
    fn text_cells(&self, spec: &Spec) -> Vec<Vec<String>> {
        let mut cells = vec![Vec::with_capacity(self.columns.len()); self.rows.len()];
        for at in 0..self.columns.len() {
            let column = || self.entries.iter().map(|row| &row[at]);
            let (marks, daggers) = (column().any(|entry| entry.best), column().any(Entry::differs));
            let interval = |entry: &Entry| {
                entry.interval.map_or(String::new(), |interval| format!(" {}", sides(interval, "±", spec.decimals)))
            };
            let published =
                |entry: &Entry| entry.published.map_or(String::new(), |p| format!(" ({p:.*})", spec.decimals));
            let width = |text: &dyn Fn(&Entry) -> String| column().map(|e| text(e).chars().count()).max().unwrap_or(0);
            let (interval_width, published_width) = (width(&interval), width(&published));
            for (row, entry) in column().enumerate() {
                let mark = match (marks, entry.best) {
                    (false, _) => "",
                    (true, true) => "*",
                    (true, false) => NO_BREAK_SPACE,
                };
                let dagger = match (daggers, entry.differs()) {
                    (false, _) => "",
                    (true, true) => "†",
                    (true, false) => NO_BREAK_SPACE,
                };
                let number = number(entry.value, spec.decimals);
                let tail = format!("{:>interval_width$}{:>published_width$}", interval(entry), published(entry));
                cells[row].push(format!("{number}{mark}{dagger}{}", tail.replace(' ', NO_BREAK_SPACE)));
            }
        }
        cells
    }

    /// What the marks mean, of those that occur.
    fn notes(&self, best: &str, spec: &Spec) -> Vec<String> {
        let mut notes = Vec::new();
        if self.any(|entry| entry.best) {
            notes.push(format!("{best}: best of the column"));
        }
        if self.any(Entry::differs) {
            let with: Vec<String> = spec.compare.iter().map(|(name, label)| format!("{name}={label}")).collect();
            notes.push(format!("†: differs from {} (paired, p < {SIGNIFICANT})", with.join(", ")));
        }
        let some = |one: bool| {
            move |entry: &Entry| entry.interval.is_some_and(|interval| interval.one_width().is_some() == one)
        };
        if self.any(some(true)) {
            notes.push("±: 95 % interval, its longer side".to_string());
        }
        if self.any(some(false)) {
            notes.push("−, +: 95 % interval, both sides".to_string());
        }
        if self.any(|entry| entry.published.is_some()) {
            notes.push("in brackets: as published".to_string());
        }
        if self.any(|entry| entry.value.is_none()) {
            notes.push("-: not measured".to_string());
        }
        notes
    }

    pub fn json(&self, spec: &Spec) -> String {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .zip(&self.entries)
            .map(|(row, entries)| {
                let labels: Map<String, Value> =
                    self.row_names.iter().cloned().zip(row.iter().map(|label| json!(label))).collect();
                let values: Map<String, Value> = self
                    .columns
                    .iter()
                    .zip(entries)
                    .map(|(column, entry)| {
                        let mut cell = Map::from_iter([("value".to_string(), json!(entry.value))]);
                        if let Some((value, interval)) = entry.value.zip(entry.interval) {
                            cell.insert("low".to_string(), json!(value - interval.below));
                            cell.insert("high".to_string(), json!(value + interval.above));
                        }
                        cell.extend(entry.published.map(|value| ("published".to_string(), json!(value))));
                        cell.extend(entry.p.map(|p| ("p".to_string(), json!(p))));
                        cell.extend(entry.best.then(|| ("best".to_string(), json!(true))));
                        cell.extend(entry.counts.iter().map(|(name, count)| (name.to_string(), json!(count))));
                        (column.title.clone(), Value::Object(cell))
                    })
                    .collect();
                json!({ "labels": labels, "values": values })
            })
            .collect();
        let titles: Vec<&String> = self.columns.iter().map(|column| &column.title).collect();
        let table = json!({ "caption": spec.caption, "rows": self.row_names, "columns": titles, "cells": rows });
        format!("{table:#}\n")
    }
}

/// Kept by the text layout, which trims ordinary spaces; looks like one.
const NO_BREAK_SPACE: &str = "\u{a0}";

/// `-` for no number; never `-0.0`.
fn number(value: Option<f64>, decimals: usize) -> String {
    let Some(value) = value else { return "-".to_string() };
    let text = format!("{value:.decimals$}");
    match text.strip_prefix('-') {
        Some(rest) if rest.chars().all(|digit| matches!(digit, '0' | '.')) => rest.to_string(),
        _ => text,
    }
}

/// `± 3.4`, or `−4.5 +0.9` where one width would hide how far the sides differ.
fn sides(interval: Interval, sign: &str, decimals: usize) -> String {
    match interval.one_width() {
        Some(width) => format!("{sign}{width:.decimals$}"),
        None => format!("−{:.decimals$} +{:.decimals$}", interval.below, interval.above),
    }
}

/// The number with its marks: in one formula with its interval, else as text.
fn latex_number(entry: &Entry, decimals: usize) -> String {
    let value = latex_escape(&number(entry.value, decimals));
    let Some(interval) = entry.interval else {
        let cell = if entry.best { format!("\\textbf{{{value}}}") } else { value };
        return cell + if entry.differs() { "$^\\dagger$" } else { "" };
    };
    let value = if entry.best { format!("\\mathbf{{{value}}}") } else { value };
    let dagger = if entry.differs() { "^\\dagger" } else { "" };
    match interval.one_width() {
        Some(width) => format!("${value}{dagger} \\pm {width:.decimals$}$"),
        None => {
            let Interval { below, above } = interval;
            let dagger = if dagger.is_empty() { "" } else { "{}^\\dagger" };
            format!("${value}^{{+{above:.decimals$}}}_{{-{below:.decimals$}}}{dagger}$")
        }
    }
}

fn markdown_escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace('\n', " ")
}

fn latex_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => escaped.extend(['\\', letter]),
            '~' => escaped.push_str("\\textasciitilde{}"),
            '^' => escaped.push_str("\\textasciicircum{}"),
            '\\' => escaped.push_str("\\textbackslash{}"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

/// One line of CSV (RFC 4180), quoted where needed.
pub fn csv_line(fields: &[String]) -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    // Nothing keeps anyone from writing to memory.
    let line = writer.write_record(fields).ok().and_then(|()| writer.into_inner().ok());
    String::from_utf8(line.unwrap_or_default()).unwrap_or_default()
}
