//! Records to samples.
