//! How a key refers to other stages, and which key goes with which.

use super::spec::{ArtifactType, Key, Presence, Type};
use super::value::{Origin, Table};

/// How many cells of the stage it names a reference takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arity {
    /// One for each cell of the stage; brings axes.
    One,
    /// All of them; brings no axes.
    All,
}

/// A reference to a stage, at its key.
#[derive(Clone)]
pub(crate) struct RefUse {
    /// Dotted key.
    pub slot: String,
    pub arity: Arity,
    /// Of type `Ref`: a model comes with its whole chain.
    pub chain: bool,
    /// May name a task, and means the data of it then.
    pub task: bool,
    /// The whole type, where the key takes other things than a stage too: whether the text names one
    /// is known once its axes are filled in (see [`names_stage`]).
    pub also: Option<&'static [Type]>,
    pub takes: &'static [ArtifactType],
    pub text: String,
    pub origin: Origin,
}

/// What a key goes with and what is there instead of it.
pub(super) fn beside(key: &Key, keys: &[Key], table: &Table) -> Option<(&'static str, &'static str)> {
    let needs = key.with?;
    let Presence::Either(other) = keys.iter().find(|key| key.name == needs)?.presence else { return None };
    (table.get(needs).is_none() && table.get(other).is_some()).then_some((needs, other))
}
