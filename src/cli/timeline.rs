//! `--trace FILE`: what took how long, as a file that Perfetto and `chrome://tracing` open.
//!
//! The format is Chrome's: an array of events, a line each, one row for each thread. Spans are a beginning and
//! an end, events an instant. An array without its last bracket is read all the same, so a killed
//! run has its timeline too, up to the last stage that ended.

use serde_json::{Map, Value, json};
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Writes spans and events to a file.
#[derive(Clone)]
pub struct Timeline(Arc<Shared>);

struct Shared {
    began: Instant,
    /// `None` once it has ended.
    file: Mutex<Option<BufWriter<File>>>,
}

/// The fields of a span.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Timeline {
    /// Begins the file anew.
    pub fn create(path: &Path) -> std::io::Result<Timeline> {
        let mut file = BufWriter::with_capacity(1 << 16, File::create(path)?);
        write!(file, "[\n{}", json!({"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "pipe"}}))?;
        file.flush()?;
        Ok(Timeline(Arc::new(Shared { began: Instant::now(), file: Mutex::new(Some(file)) })))
    }

    /// Completes the file; nothing is written to it any more.
    pub fn end(&self) {
        if let Some(mut file) = self.0.file.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = file.write_all(b"\n]\n").and_then(|()| file.flush());
        }
    }

    /// A full disk spoils the timeline and nothing else.
    fn write(&self, phase: &str, name: &str, level: Level, fields: Map<String, Value>) {
        let thread = self.thread();
        let micros = self.0.began.elapsed().as_nanos() as f64 / 1e3;
        let mut event = json!({"name": name, "cat": "pipe", "ph": phase, "ts": micros, "pid": 1, "tid": thread});
        if phase == "i" {
            event["s"] = "t".into();
        }
        if !fields.is_empty() {
            event["args"] = Value::Object(fields);
        }
        self.line(&event, phase == "E" && level <= Level::INFO);
    }

    fn line(&self, event: &Value, flush: bool) {
        if let Some(file) = self.0.file.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            let _ = write!(file, ",\n{event}");
            if flush {
                let _ = file.flush();
            }
        }
    }

    /// The row of this thread; the first time its name is written.
    fn thread(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        thread_local! {
            static MINE: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
        }
        if MINE.get() == 0 {
            MINE.set(NEXT.fetch_add(1, Ordering::Relaxed));
            let name = std::thread::current().name().unwrap_or("thread").to_string();
            let row = json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": MINE.get(), "args": {"name": name}});
            self.line(&row, false);
        }
        MINE.get()
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Timeline {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let fields = span.extensions().get::<Fields>().map(|fields| fields.0.clone()).unwrap_or_default();
        self.write("B", span.name(), *span.metadata().level(), fields);
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        self.write("E", span.name(), *span.metadata().level(), Map::new());
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let message = fields.0.remove("message");
        let name = message.as_ref().and_then(Value::as_str).unwrap_or(event.metadata().name());
        self.write("i", name, *event.metadata().level(), fields.0);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_string(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_string(), value.into());
    }
}
