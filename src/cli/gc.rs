//! `pipe gc`: what no record refers to any more goes; records too, if only the latest runs are wanted.

use super::global::{Done, Global, print};
use crate::report;
use pipe::store::{Keep, Store};
use serde_json::json;
use std::time::Duration;

/// Remove what is no longer needed from the cache
///
/// Finished stages stay. What goes: files that no finished stage refers to, what was set aside as damaged,
/// the logs of old runs, and the work of stages that were interrupted long ago.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  pipe gc --dry-run\n  pipe gc --keep-runs 20 --keep-unfinished-days 7")]
pub struct Arguments {
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// The logs of this many latest runs stay
    #[arg(long, value_name = "N", default_value_t = 100)]
    keep_runs: usize,
    /// Stages interrupted within this many days can still be resumed
    #[arg(long, value_name = "DAYS", default_value_t = 30)]
    keep_unfinished_days: u64,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let store = Store::open(&global.cache)?;
    let work = Duration::from_secs(arguments.keep_unfinished_days * 24 * 3600);
    let gone = store.gc(&Keep { fingerprints: None, runs: arguments.keep_runs, work }, arguments.dry_run)?;
    if global.json {
        let object = json!({
            "dry_run": arguments.dry_run, "files": gone.blobs, "runs": gone.runs, "unfinished": gone.work,
            "set_aside": gone.quarantined, "bytes": gone.bytes,
        });
        return print(&format!("{object:#}\n"));
    }
    let parts = [
        report::count(gone.blobs, "file"),
        report::count(gone.runs, "run"),
        report::count(gone.work, "unfinished stage"),
        report::count(gone.quarantined, "damaged file"),
    ];
    let verb = if arguments.dry_run { "would remove" } else { "removed" };
    print(&format!("{verb} {}: {}\n", parts.join(", "), report::bytes(gone.bytes)))
}
