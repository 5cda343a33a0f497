//! A cell that `pipe show` found, for its pages and its transcripts.

use pipe::store::Record;

/// A cell and the record of what it yielded, now or when it was last made.
pub struct Found {
    /// The cell as the user writes it: `sft[size=3B]`.
    pub label: String,
    /// A word for how it stands now: `fresh`, `stale`.
    pub state: &'static str,
    /// What it yielded, if it was ever made.
    pub record: Option<Record>,
}
