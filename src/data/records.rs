//! Datasets on disk: JSON Lines, a JSON array, or Parquet, told apart by their first bytes (a file in
//! the store has no extension), or CSV, by the end of its name. Read whole into memory.
//!
//! Text is strict JSON in UTF-8. A byte order mark, CRLF line ends and blank lines are accepted,
//! anything else that is not an object per line is an error; all bad lines come in one message.
//! Numbers keep every bit of an f64 and fields keep their order, so that reading and writing again
//! gives the same bytes.

use super::csv;
use super::record::{BadRows, Record};
use crate::problem::Problem;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// All records of a `.jsonl`, `.json` (array of objects), `.csv` or `.parquet` file. Never empty.
pub fn read_records(path: &Path) -> Result<Vec<Record>, Problem> {
    Ok(read_numbered(path)?.into_iter().map(|(_, record)| record).collect())
}

/// As [`read_records`], each with its 1-based line (JSON Lines, CSV) or row (array, Parquet), for messages.
pub fn read_numbered(path: &Path) -> Result<Vec<(usize, Record)>, Problem> {
    let bytes = std::fs::read(path).map_err(|error| Problem::io("data::unreadable", "read", path, &error))?;
    parse_numbered(&bytes, path)
}

/// The same of what has been read from `path`.
pub fn parse_numbered(bytes: &[u8], path: &Path) -> Result<Vec<(usize, Record)>, Problem> {
    let records = if bytes.starts_with(b"PAR1") {
        read_parquet(path)?
    } else {
        let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        match text.iter().find(|byte| !byte.is_ascii_whitespace()) {
            _ if path.extension().is_some_and(|end| end.eq_ignore_ascii_case("csv")) => csv::read(text, path)?,
            Some(b'[') => read_array(text, path)?,
            _ => read_lines(text, path)?,
        }
    };
    if records.is_empty() {
        return Err(Problem::new("data::empty", "the dataset holds no record")
            .at_file(path)
            .help("give a file with at least one record"));
    }
    Ok(records)
}

fn read_lines(text: &[u8], path: &Path) -> Result<Vec<(usize, Record)>, Problem> {
    let mut records = Vec::new();
    let mut bad = BadRows::default();
    let mut total = 0;
    for (line, bytes) in (1..).zip(text.split(|&byte| byte == b'\n')) {
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        total += 1;
        let row = format!("line {line}");
        match std::str::from_utf8(bytes) {
            Err(error) => {
                bad.push("data::not_utf8", &row, &format!("not UTF-8 at byte {} of the line", error.valid_up_to() + 1));
                bad.help("save the file as UTF-8, without compression");
            }
            Ok(line_text) => match serde_json::from_str(line_text) {
                Ok(Value::Object(record)) => records.push((line, record)),
                Ok(other) => bad.push("data::not_an_object", &row, &format!("{}, not an object", kind_of(&other))),
                Err(error) => bad.push("data::not_json", &row, &json_error(&error)),
            },
        }
    }
    bad.finish(total, Some(path))?;
    Ok(records)
}

fn read_array(text: &[u8], path: &Path) -> Result<Vec<(usize, Record)>, Problem> {
    let values: Vec<Value> = serde_json::from_slice(text).map_err(|error| {
        Problem::new("data::not_json", json_error(&error))
            .at_line(path, error.line())
            .help("a file that begins with `[` must be one array of objects; otherwise write one object per line")
    })?;
    let total = values.len();
    let mut records = Vec::with_capacity(total);
    let mut bad = BadRows::default();
    for (row, value) in (1..).zip(values) {
        match value {
            Value::Object(record) => records.push((row, record)),
            other => bad.push(
                "data::not_an_object",
                &format!("element {row}"),
                &format!("{}, not an object", kind_of(&other)),
            ),
        }
    }
    bad.finish(total, Some(path))?;
    Ok(records)
}

/// Columns become fields; lists and structs become arrays and objects; nulls stay nulls. Binary
/// columns become base64, decimals strings, timestamps text with a zone.
fn read_parquet(path: &Path) -> Result<Vec<(usize, Record)>, Problem> {
    let broken = |error: &dyn std::fmt::Display| {
        Problem::new("data::not_parquet", format!("not a readable Parquet file: {error}"))
            .at_file(path)
            .help("fetch the file again; a download that was cut short looks like this")
    };
    // The Parquet reader indexes by offsets that the file itself gives, and a damaged file can make it
    // panic; that must end in a message like any other bad input.
    let read = || -> Result<Vec<(usize, Record)>, Problem> {
        let file = File::open(path).map_err(|error| Problem::io("data::unreadable", "read", path, &error))?;
        let reader = SerializedFileReader::new(file).map_err(|error| broken(&error))?;
        let rows = reader.get_row_iter(None).map_err(|error| broken(&error))?;
        let mut records = Vec::new();
        for (number, row) in (1..).zip(rows) {
            if let Value::Object(record) = row.map_err(|error| broken(&error))?.to_json_value() {
                records.push((number, record));
            }
        }
        Ok(records)
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(broken(&"its pages do not fit its footer")))
}

fn json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("not JSON: {what} at column {}", error.column())
}

/// What a value is, with its article, for messages.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// One record per line, `\n` ends every line; the bytes depend on the records only.
pub fn write_jsonl(path: &Path, records: &[Record]) -> Result<(), Problem> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        for record in records {
            serde_json::to_writer(&mut file, record)?;
            file.write_all(b"\n")?;
        }
        file.flush()
    };
    write().map_err(|error| Problem::io("data::unwritable", "write", path, &error))
}
