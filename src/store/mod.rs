//! What was done before: artifacts by fingerprint, in the cache folder (format: `cache/README.md`).
//!
//! The store knows files, digests and records. It does not know what a stage computes, nor how a
//! fingerprint comes about. Three promises: nothing half-made is ever visible; what was finished is
//! never lost; what is handed to a stage is, byte for byte, what was stored.

mod artifacts;
mod blob;
mod claim;
mod disk;
mod gc;
mod index;
mod lock;
mod record;
mod stat;

pub use artifacts::{Damage, Lookup, RunLock, Store, VERSION, damaged};
pub use claim::{Claim, Claimed, Published};
pub use disk::{Disk, Hook};
pub use gc::{Checked, Collected, Keep, Stats};
pub use lock::{Holder, Locks};
pub use record::{Artifact, Entry, Measured, Record, Used, utc};
