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
pub mod record;
pub mod records;
pub mod segments;
pub mod template;
pub mod tokenizer;

pub use order::{batches, epoch_order, equal_parts, micro_batches};
pub(crate) use record::BadRows;
pub use record::Record;
pub use records::{parse_numbered, read_numbered, read_records, write_jsonl};
pub use segments::{Eos, Format, Limits, Notes, Overlength, Pair, Sample, Side, is_preference, pairs, prompt, samples};
pub use tokenizer::Tokenizer;
