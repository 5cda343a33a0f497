//! `tracing` to stderr, when `RUST_LOG` or `-vv` asks for it; colour only on a terminal.

use super::live;
use crate::report;
use std::io::Write;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Starts nothing unless asked: an ordinary run pays nothing for logging.
pub fn start(verbose: u8) {
    let asked = std::env::var("RUST_LOG").ok().filter(|value| !value.is_empty());
    let filter = match (asked, verbose) {
        (Some(filter), _) => filter,
        (None, 0 | 1) => return,
        (None, 2) => "pipe=debug".to_string(),
        (None, _) => "pipe=trace".to_string(),
    };
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(report::colour(&std::io::stderr()))
        .with_writer(Above)
        .init();
}

/// Gathers a line and writes it above the live ones.
struct Above;

struct Line(Vec<u8>);

impl<'a> MakeWriter<'a> for Above {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        live::above(|stderr| {
            let _ = stderr.write_all(&self.0);
        });
    }
}
