//! Records, tokens and samples: everything between a file of text and the ids a model sees.
//!
//! [`records`] reads and writes datasets, [`tokenizer`] and [`chat`] turn text into ids exactly as the
//! Hugging Face libraries do, [`segments`] makes training samples and preference pairs from typed
//! pieces of text, [`order`] says which sample comes when, [`inspect`] counts what looks wrong.
//!
//! Nothing here truncates, drops or repairs a row in silence: what cannot be used is an error that
//! names every such row, unless the caller asked for less, and then it is counted.

pub mod chat;
mod csv;
pub mod inspect;
pub mod order;
pub mod records;
pub mod segments;
pub mod template;
pub mod tokenizer;

pub use order::{batches, epoch_order, equal_parts, micro_batches};
pub use records::{Record, parse_numbered, read_numbered, read_records, write_jsonl};
pub use segments::{Eos, Format, Limits, Notes, Overlength, Pair, Sample, Side, is_preference, pairs, prompt, samples};
pub use tokenizer::Tokenizer;

use crate::problem::Problem;

/// How many bad rows a message names before it only counts.
const NAMED: usize = 20;

/// Rows that cannot be used, gathered so that one run shows all of them.
#[derive(Debug, Default)]
pub(crate) struct BadRows {
    codes: Vec<&'static str>,
    named: Vec<String>,
    count: usize,
    help: Vec<String>,
}

impl BadRows {
    /// `row` says which ("line 3"), `what` why.
    pub(crate) fn push(&mut self, code: &'static str, row: &str, what: &str) {
        self.count += 1;
        if !self.codes.contains(&code) {
            self.codes.push(code);
        }
        if self.named.len() < NAMED {
            self.named.push(format!("{row}: {what}"));
        }
    }

    /// Advice shown once, however many rows it is about.
    pub(crate) fn help(&mut self, help: &str) {
        if !self.help.iter().any(|known| known == help) {
            self.help.push(help.to_string());
        }
    }

    /// `Err` if there was a bad row among `total`. The code is that of the rows where they share one,
    /// `data::bad_rows` where they do not.
    pub(crate) fn finish(self, total: usize, source: Option<&std::path::Path>) -> Result<(), Problem> {
        let code = match self.codes.as_slice() {
            [] => return Ok(()),
            [code] => code,
            _ => "data::bad_rows",
        };
        let mut problem = Problem::new(code, format!("{} of {total} rows cannot be used", self.count));
        if let Some(path) = source {
            problem = problem.at_file(path);
        }
        let unnamed = self.count - self.named.len();
        problem.notes = self.named;
        if unnamed > 0 {
            problem = problem.note(format!("and {unnamed} more"));
        }
        problem.help = self.help;
        Err(problem)
    }
}
