//! What a run is about.

use super::sources::Sources;
use crate::plan::{Arithmetic, Plan};
use crate::store::Store;

/// A plan with everything that is needed to judge it and to run it.
pub struct Engine<'a> {
    pub plan: &'a Plan,
    pub store: &'a Store,
    pub sources: &'a dyn Sources,
    /// Where floats are made.
    pub machine: Arithmetic<'a>,
}
