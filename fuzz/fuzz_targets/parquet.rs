//! A Parquet file, read as records.
//!
//! Input: the file. The reader turns panics of the Parquet library into a refusal, so here a panic is a
//! failure only if it comes out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipe::data::read_records;
use pipe_fuzz::{Folder, seeds, taken};
use std::panic;

fuzz_target!(init: seeds::plant("parquet"), |input: &[u8]| {
    let folder = Folder::with(&[("data.parquet", input)]);
    // The fuzzer's hook ends the process before anything can be caught.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let read = read_records(&folder.path().join("data.parquet"));
    panic::set_hook(hook);
    if let Some(records) = taken(read) {
        assert!(!records.is_empty());
    }
});
