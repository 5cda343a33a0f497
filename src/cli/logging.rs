//! `tracing` to stderr, when `RUST_LOG` or `-vv` asks for it, and to the file of `--trace`.
//!
//! Only what pipe itself says is let through, whatever `RUST_LOG` asks for: the HTTP client logs the headers it
//! sends, and a key stands in them.

use super::live;
use super::timeline::Timeline;
use crate::report;
use pipe::problem::{Exit, Problem};
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use tracing::Metadata;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The file of `--trace`, to be completed at the end.
static TIMELINE: OnceLock<Timeline> = OnceLock::new();

/// Starts nothing unless asked: an ordinary run pays nothing for logging. `Err` (exit 3): the file of
/// `--trace` cannot be written.
pub fn start(verbose: u8, trace: Option<&Path>) -> Result<(), Problem> {
    let filter = filter(verbose);
    let all = filter.as_ref().and_then(EnvFilter::max_level_hint) == Some(LevelFilter::TRACE);
    let timeline = match trace {
        None => None,
        Some(path) => {
            let timeline = Timeline::create(path)
                .map_err(|error| Problem::io("cli::trace", "write", path, &error).exit(Exit::Missing))?;
            Some(TIMELINE.get_or_init(|| timeline).clone())
        }
    };
    if filter.is_none() && timeline.is_none() {
        return Ok(());
    }
    // A launch takes microseconds, and a timeline of all of them gigabytes: only for who asks for `trace`.
    let most = if all { LevelFilter::TRACE } else { LevelFilter::DEBUG };
    let timeline = timeline.map(|timeline| timeline.with_filter(filter_fn(ours).and(most)));
    let log = filter.map(|filter| {
        let log = tracing_subscriber::fmt::layer().with_ansi(report::colour(&std::io::stderr())).with_writer(Above);
        log.with_filter(filter.and(filter_fn(ours)))
    });
    tracing_subscriber::registry().with(log).with(timeline).init();
    Ok(())
}

/// Completes the file of `--trace`. To be called before the process ends, however it ends.
pub fn end() {
    if let Some(timeline) = TIMELINE.get() {
        timeline.end();
    }
}

/// What is to be logged; `None`: nothing.
fn filter(verbose: u8) -> Option<EnvFilter> {
    let asked = std::env::var("RUST_LOG").ok().filter(|value| !value.is_empty());
    let text = match (asked, verbose) {
        (Some(filter), _) => filter,
        (None, 0 | 1) => return None,
        (None, 2) => "pipe=debug".to_string(),
        (None, _) => "pipe=trace".to_string(),
    };
    EnvFilter::builder().parse(&text).map_err(|error| {
        live::above(|stderr| {
            let _ = writeln!(
                stderr,
                "warning: nothing is logged, for `RUST_LOG={text}` is no filter: {error}; for example `RUST_LOG=pipe=debug`"
            );
        });
    })
    .ok()
}

/// Whether it is pipe that speaks.
fn ours(metadata: &Metadata) -> bool {
    let target = metadata.target();
    target == "pipe" || target.starts_with("pipe::")
}
/// Gathers a line and writes it above the live ones.
struct Above;

struct LogLine(Vec<u8>);

impl<'a> MakeWriter<'a> for Above {
    type Writer = LogLine;

    fn make_writer(&'a self) -> LogLine {
        LogLine(Vec::new())
    }
}

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for LogLine {
    fn drop(&mut self) {
        live::above(|stderr| {
            let _ = stderr.write_all(&self.0);
        });
    }
}
