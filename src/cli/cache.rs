//! `pipe cache verify` and `pipe cache stats`: is everything in the store what it was, and how much.

use super::global::{Done, Global, Stop, print, say};
use crate::report;
use pipe::problem::Exit;
use pipe::store::Store;
use serde_json::json;
use std::fmt::Write as _;

/// Look after the cache folder
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Read every file and compare it with what was stored; what is damaged is set aside and made again
    #[command(after_help = "Examples:\n  pipe cache verify\n  pipe cache verify --cache /data/cache --json")]
    Verify,
    /// How many stages and bytes there are
    #[command(after_help = "Examples:\n  pipe cache stats\n  pipe cache stats --json")]
    Stats,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let store = Store::open(&global.cache)?;
    match arguments.what {
        What::Verify => verify(global, &store),
        What::Stats => stats(global, &store),
    }
}

fn verify(global: &Global, store: &Store) -> Done {
    let checked = store.verify_all(|_| {});
    if global.json {
        let object = json!({
            "records": checked.records, "files": checked.blobs, "bytes": checked.bytes,
            "damaged": checked.damaged, "lost": checked.lost,
        });
        print(&format!("{object:#}\n"))?;
    } else {
        let mut text = String::new();
        for damage in &checked.damaged {
            let _ = writeln!(text, "damaged: {damage}");
        }
        for cell in &checked.lost {
            let _ = writeln!(text, "lost: {cell}");
        }
        let (stages, files) = (report::count(checked.records, "finished stage"), report::count(checked.blobs, "file"));
        let verdict = match checked.damaged.len() {
            0 => "all as stored".to_string(),
            damaged => format!("{damaged} damaged"),
        };
        let _ = writeln!(text, "{stages}, {files}, {}: {verdict}", report::bytes(checked.bytes));
        print(&text)?;
    }
    if checked.damaged.is_empty() {
        return Ok(());
    }
    say(global, "what was damaged is in quarantine; the next run makes it again");
    Err(Stop::Code(Exit::Failed))
}

fn stats(global: &Global, store: &Store) -> Done {
    let stats = store.stats();
    if global.json {
        let kinds: serde_json::Map<String, serde_json::Value> = stats
            .kinds
            .iter()
            .map(|(kind, (records, bytes))| (kind.clone(), json!({ "stages": records, "bytes": bytes })))
            .collect();
        let object = json!({
            "stages": stats.records, "files": stats.blobs, "bytes": stats.bytes, "bytes_unshared": stats.bytes_unshared,
            "kinds": kinds, "runs": stats.runs, "unfinished": stats.unfinished, "quarantined": stats.quarantined,
        });
        return print(&format!("{object:#}\n"));
    }
    let mut text = String::new();
    let width = stats.kinds.keys().map(String::len).max().unwrap_or(0);
    for (kind, (records, bytes)) in &stats.kinds {
        let _ = writeln!(text, "{kind:width$}  {records:>6}  {:>10}", report::bytes(*bytes));
    }
    let _ = writeln!(
        text,
        "{}, {}, {} ({} if nothing were shared)",
        report::count(stats.records, "finished stage"),
        report::count(stats.blobs, "file"),
        report::bytes(stats.bytes),
        report::bytes(stats.bytes_unshared)
    );
    let _ = writeln!(
        text,
        "{}, {} to resume, {} in quarantine",
        report::count(stats.runs, "run"),
        report::count(stats.unfinished, "unfinished stage"),
        report::count(stats.quarantined, "file")
    );
    print(&text)
}
