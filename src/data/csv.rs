//! Comma-separated values as RFC 4180 has them: a header, quoted fields that may hold commas, quotes and
//! line ends. Every value is a text; nothing is trimmed, guessed or filled in.

use super::record::{BadRows, Record};
use crate::problem::Problem;
use ::csv::{ByteRecord, ReaderBuilder};
use serde_json::Value;
use std::path::Path;

/// The records of a file's bytes, each with the 1-based line it begins on.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Vec<(usize, Record)>, Problem> {
    let unreadable = |error: &::csv::Error| {
        Problem::new("data::not_csv", format!("not comma-separated values: {error}")).at_file(path)
    };
    let mut reader = ReaderBuilder::new().flexible(true).has_headers(false).from_reader(bytes);
    let mut row = ByteRecord::new();
    let header = if reader.read_byte_record(&mut row).map_err(|error| unreadable(&error))? {
        header(&row, path)?
    } else {
        return Ok(Vec::new());
    };
    let (mut records, mut bad, mut total) = (Vec::new(), BadRows::default(), 0);
    // The reader's own count of lines lags behind where lines end in CRLF or are blank.
    let (mut line, mut counted) = (1, 0);
    while reader.read_byte_record(&mut row).map_err(|error| unreadable(&error))? {
        total += 1;
        let from = row.position().map_or(counted, |position| position.byte() as usize);
        let start = from + bytes[from..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        line += bytes[counted..start].iter().filter(|byte| **byte == b'\n').count();
        counted = start;
        let place = format!("line {line}");
        if row.len() != header.len() {
            let what = format!("{} fields, and the header has {}", row.len(), header.len());
            bad.push("data::ragged_row", &place, &what);
            bad.help("a field with a comma or a line end in it stands in double quotes");
            continue;
        }
        let mut record = Record::new();
        for (name, field) in header.iter().zip(&row) {
            match std::str::from_utf8(field) {
                Ok(text) => drop(record.insert(name.clone(), Value::from(text))),
                Err(error) => {
                    let at = error.valid_up_to() + 1;
                    bad.push("data::not_utf8", &place, &format!("`{name}` is not UTF-8 at its byte {at}"));
                    bad.help("save the file as UTF-8, without compression");
                }
            }
        }
        records.push((line, record));
    }
    // The reader takes the rest of the file for a field whose quote is never closed.
    if bytes.iter().filter(|&&byte| byte == b'"').count() % 2 == 1 {
        let what = "a quoted field never ends: the file has an odd number of double quotes";
        return Err(Problem::new("data::not_csv", what)
            .at_line(path, line)
            .note("the last row that could be told apart begins here")
            .help("within a quoted field a double quote is written twice"));
    }
    bad.finish(total, Some(path))?;
    Ok(records)
}

/// The names of the columns; every one that cannot be a name is told.
fn header(row: &ByteRecord, path: &Path) -> Result<Vec<String>, Problem> {
    let mut names: Vec<String> = Vec::with_capacity(row.len());
    let mut wrong = Vec::new();
    for (at, field) in row.iter().enumerate() {
        match std::str::from_utf8(field) {
            Err(_) => wrong.push(format!("column {} is not UTF-8", at + 1)),
            Ok("") => wrong.push(format!("column {} has no name", at + 1)),
            Ok(name) => wrong.extend(
                names
                    .iter()
                    .position(|known| known == name)
                    .map(|first| format!("columns {} and {} are both called `{name}`", first + 1, at + 1)),
            ),
        }
        names.push(String::from_utf8_lossy(field).into_owned());
    }
    if wrong.is_empty() {
        return Ok(names);
    }
    let mut problem = Problem::new("data::csv_header", "the first line does not name the columns").at_line(path, 1);
    problem.notes = wrong;
    Err(problem.help("a CSV file begins with a line of names, each once"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Row = (usize, Vec<(String, String)>);

    fn rows(text: &[u8]) -> Result<Vec<Row>, Problem> {
        let fields = |record: Record| {
            record.into_iter().map(|(name, value)| (name, value.as_str().unwrap_or_default().to_string())).collect()
        };
        Ok(read(text, Path::new("a.csv"))?.into_iter().map(|(line, record)| (line, fields(record))).collect())
    }

    fn pair(line: usize, a: &str, b: &str) -> Row {
        (line, vec![("a".into(), a.into()), ("b".into(), b.into())])
    }

    #[test]
    fn quoted_fields_hold_commas_quotes_and_line_ends() {
        let text = b"a,b\r\n1,\"x, \"\"y\"\"\nz\"\r\n, 3 \r\n\r\n\"\",4";
        let wanted = [pair(2, "1", "x, \"y\"\nz"), pair(4, "", " 3 "), pair(6, "", "4")];
        assert_eq!(rows(text).unwrap(), wanted);
    }

    #[test]
    fn every_ragged_or_unreadable_row_is_named_by_its_line() {
        let problem = rows(b"a,b\n1\n1,2\n\"x\ny\",\xff\n1,2,3\n").unwrap_err();
        assert_eq!(problem.code, "data::bad_rows");
        let wanted = [
            "line 2: 1 fields, and the header has 2",
            "line 4: `b` is not UTF-8 at its byte 1",
            "line 6: 3 fields, and the header has 2",
        ];
        assert_eq!(problem.notes, wanted);
    }

    #[test]
    fn a_header_that_names_no_columns_is_refused() {
        let problem = rows(b"a,,a,\xff\n1,2,3,4\n").unwrap_err();
        assert_eq!(problem.code, "data::csv_header");
        let wanted = ["column 2 has no name", "columns 1 and 3 are both called `a`", "column 4 is not UTF-8"];
        assert_eq!(problem.notes, wanted);
        assert!(rows(b"").unwrap().is_empty() && rows(b"a,b\n").unwrap().is_empty());
    }

    #[test]
    fn a_quote_that_is_never_closed_swallows_no_rows() {
        let problem = rows(b"a,b\n1,2\n3,\"4\n5,6\n").unwrap_err();
        assert_eq!((problem.code, problem.places[0].line), ("data::not_csv", Some(3)));
    }

    proptest! {
        #[test]
        fn what_a_writer_writes_is_read_as_it_was(table in prop::collection::vec([".*", ".*"], 1..8)) {
            let mut writer = ::csv::Writer::from_writer(Vec::new());
            writer.write_record(["a", "b"]).unwrap();
            table.iter().for_each(|row| writer.write_record(row).unwrap());
            let bytes = writer.into_inner().unwrap();
            let read: Vec<[String; 2]> =
                rows(&bytes).unwrap().into_iter().map(|(_, row)| [row[0].1.clone(), row[1].1.clone()]).collect();
            prop_assert_eq!(read, table);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = rows(&bytes);
            let _ = rows(&[b"a,b\n", bytes.as_slice()].concat());
        }
    }
}
