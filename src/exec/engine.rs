//! What a run is about.

use super::sources::Sources;
use crate::plan::{Arithmetic, Plan};
use crate::store::Store;

/// A plan with everything that is needed to judge it and to run it.
pub struct Engine<'a> {
    /// The cells.
    pub plan: &'a Plan,
    /// What was done before.
    pub store: &'a Store,
    /// How references to the outside are resolved.
    pub sources: &'a dyn Sources,
    /// Where floats are made.
    pub machine: Arithmetic<'a>,
}
