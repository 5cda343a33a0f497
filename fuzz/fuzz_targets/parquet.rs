//! A Parquet file, read as records.
//!
//! Input: the file. The reader turns panics of the Parquet library into a refusal, so here a panic is a
//! failure only if it comes out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::data::read_records;
use pipe_fuzz::{Folder, quietly, taken};

fuzz_target!(init: pipe_fuzz::start("parquet"), |input: &[u8]| {
    let folder = Folder::with(&[("data.parquet", input)]);
    if let Some(records) = taken(quietly(|| read_records(&folder.path().join("data.parquet")))) {
        assert!(!records.is_empty());
    }
});
