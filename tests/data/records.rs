//! Files of records, good and bad.

use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use pipe::data::{Record, read_numbered, read_records, write_jsonl};
use pipe::problem::Problem;
use proptest::prelude::*;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data.jsonl");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn refused(bytes: &[u8]) -> Problem {
    let (_dir, path) = file(bytes);
    let problem = read_records(&path).unwrap_err();
    assert_eq!(problem.places[0].file, path);
    problem
}

#[test]
fn lines_an_array_a_byte_order_mark_and_windows_line_ends_read_alike() {
    let wanted = super::records(&[json!({"a": 1}), json!({"b": [0.1, 1e300, -0.0]})]);
    for text in [
        "{\"a\":1}\n{\"b\":[0.1,1e300,-0.0]}\n",
        "\u{feff}{\"a\":1}\r\n\r\n  \r\n{\"b\":[0.1,1e300,-0.0]}",
        " [{\"a\":1},\n{\"b\":[0.1,1e300,-0.0]}]\n",
    ] {
        let (_dir, path) = file(text.as_bytes());
        assert_eq!(read_records(&path).unwrap(), wanted, "{text}");
    }
    let (_dir, path) = file(b"\n{\"a\":1}\n\n{\"b\":2}\n");
    assert_eq!(read_numbered(&path).unwrap().iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn what_is_written_reads_back_and_writes_the_same_bytes_again() {
    let (dir, path) = file(
        b"{\"z\":0.30000000000000004,\"a\":\"\\u2028\\\"\xf0\x9f\xa6\x99\",\"n\":18446744073709551615}\n{\"y\":null}\n",
    );
    let records = read_records(&path).unwrap();
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    write_jsonl(&first, &records).unwrap();
    write_jsonl(&second, &read_records(&first).unwrap()).unwrap();
    let bytes = std::fs::read(&first).unwrap();
    assert_eq!(bytes, std::fs::read(&second).unwrap());
    assert!(bytes.starts_with(b"{\"z\":0.30000000000000004,\"a\":\"\xe2\x80\xa8"));
    let nowhere = write_jsonl(&dir.path().join("no/where"), &[Record::new()]).unwrap_err();
    assert_eq!(nowhere.code, "data::unwritable");
}

#[test]
fn nothing_to_read_is_an_error() {
    for nothing in ["", "\n \n", "[]", "\u{feff}"] {
        assert_eq!(refused(nothing.as_bytes()).code, "data::empty", "{nothing:?}");
    }
    assert_eq!(read_records(&PathBuf::from("no/such/file.jsonl")).unwrap_err().code, "data::unreadable");
}

#[test]
fn every_bad_line_is_named_with_its_place() {
    let problem = refused(b"{\"a\":1}\n[1]\n{\"a\":}\n\"x\xff\"\n{\"a\":2}\n");
    assert_eq!((problem.code, problem.message.as_str()), ("data::bad_rows", "3 of 5 rows cannot be used"));
    assert_eq!(
        problem.notes,
        [
            "line 2: an array, not an object",
            "line 3: not JSON: expected value at column 6",
            "line 4: not UTF-8 at byte 3 of the line"
        ]
    );
    assert_eq!(refused(b"{\"a\":1}\n{\"a\":1").code, "data::not_json");
    assert_eq!(refused(b"{\"a\": NaN}\n").code, "data::not_json");
    assert_eq!(refused(b"[{}, 3]").notes, ["element 2: a number, not an object"]);
    assert_eq!(refused(b"[{},\n{]").places[0].line, Some(2));
    assert_eq!(refused(b"\xff\xfe{\0}\0").code, "data::not_utf8");
}

#[test]
fn of_many_bad_lines_twenty_are_named_and_the_rest_counted() {
    let problem = refused("nonsense\n".repeat(33).as_bytes());
    assert_eq!(problem.notes.len(), 21);
    assert_eq!(problem.notes[20], "and 13 more");
    assert!(problem.message.starts_with("33 of 33"));
}

/// `{q: "a", m: [{role: "user", n: 1}], x: 0.5}` and `{q: "b", m: [], x: null}`, by definition and
/// repetition levels.
fn two_rows_of_parquet() -> Vec<u8> {
    let schema = "message row {
        optional binary q (UTF8);
        optional group m (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional int64 n; } } }
        optional double x;
    }";
    let mut bytes = Vec::new();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let text = |words: &[&str]| words.iter().map(|&word| ByteArray::from(word)).collect::<Vec<_>>();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&text(&["a", "b"]), Some(&[1, 1]), None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&text(&["user"]), Some(&[4, 1]), Some(&[0, 0])).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[1], Some(&[4, 1]), Some(&[0, 0])).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<DoubleType>().write_batch(&[0.5], Some(&[1, 0]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
    bytes
}

#[test]
fn a_damaged_parquet_file_is_an_error_wherever_the_damage_is() {
    let whole = two_rows_of_parquet();
    let (_dir, path) = file(&whole);
    let rows = read_records(&path).unwrap();
    assert_eq!(
        rows,
        super::records(&[
            json!({"q": "a", "m": [{"role": "user", "n": 1}], "x": 0.5}),
            json!({"q": "b", "m": [], "x": null})
        ])
    );
    for length in (4..whole.len()).step_by(7) {
        assert_eq!(refused(&whole[..length]).code, "data::not_parquet", "cut at {length}");
    }
    for at in 4..whole.len() {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 0x5a;
        let (_dir, path) = file(&bytes);
        // A flipped bit may hit a value, or a byte nobody reads; it must not take the process down.
        let _ = read_records(&path);
    }
}

proptest! {
    #[test]
    fn bytes_of_any_kind_are_records_or_a_problem(bytes in proptest::collection::vec(any::<u8>(), 0..200), mark in 0usize..4) {
        let start: &[u8] = [b"".as_slice(), b"PAR1", b"[{", b"{\"a\":"][mark];
        let (_dir, path) = file(&[start, &bytes].concat());
        if let Ok(records) = read_records(&path) {
            prop_assert!(!records.is_empty());
        }
    }
}
