//! Numbers as a paper has them, from a CSV file.

use crate::problem::Problem;
use std::path::Path;

/// A CSV file of published numbers.
pub struct Published<'a> {
    path: &'a Path,
    header: Vec<String>,
    /// With 1-based line numbers.
    pub records: Vec<(usize, Vec<String>)>,
}

impl Published<'_> {
    pub fn read(path: &Path) -> Result<Published<'_>, Problem> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Problem::io("table::published", "read the published numbers in", path, &error))?;
        let mut lines = text.trim_start_matches('\u{feff}').lines().enumerate().filter(|(_, line)| {
            let line = line.trim();
            !line.is_empty() && !line.starts_with('#')
        });
        let header = match lines.next() {
            Some((_, line)) => csv_fields(line),
            None => return Err(Problem::new("table::published", "the published numbers are empty").at_file(path)),
        };
        let mut records = Vec::new();
        for (at, line) in lines {
            let fields = csv_fields(line);
            if fields.len() != header.len() {
                let message = format!("expected {} fields, found {}", header.len(), fields.len());
                return Err(Problem::new("table::published", message).at_line(path, at + 1));
            }
            records.push((at + 1, fields));
        }
        Ok(Published { path, header, records })
    }

    pub fn column(&self, name: &str) -> Result<usize, Problem> {
        self.header.iter().position(|header| header == name).ok_or_else(|| {
            Problem::new("table::published", format!("the published numbers have no column `{name}`"))
                .at_line(self.path, 1)
                .note(format!("columns: {}", self.header.join(", ")))
        })
    }

    /// `None` for an empty field or `-`.
    pub fn number(&self, line: usize, text: &str) -> Result<Option<f64>, Problem> {
        if text.is_empty() || text == "-" {
            return Ok(None);
        }
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(Problem::new("table::published", format!("`{text}` is not a number")).at_line(self.path, line)),
        }
    }
}

/// The fields of one line, trimmed; quotes may hold commas and doubled quotes, not line ends.
fn csv_fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_string()),
            _ => field.push(letter),
        }
    }
    fields.push(field.trim().to_string());
    fields
}
