//! TOML text to [`Manifest`]: spans kept, nothing resolved.
pub mod spec;
