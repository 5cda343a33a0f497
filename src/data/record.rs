//! A record of a dataset, and the rows of which none can be made.

use crate::problem::Problem;
use serde_json::{Map, Value};

/// One record of a dataset; fields in the order of the file.
pub type Record = Map<String, Value>;

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
