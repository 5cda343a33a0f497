//! `[task.NAME]`: how a benchmark is asked and scored, as data.
//!
//! A task names the dataset of its problems and gives keys of the stages that ask them: those that the
//! kind marks (`Key::of_task`), and no list of its own. They lie beneath the stage's keys, so that a stage
//! can say otherwise, and are resolved as if they stood there: a fingerprint holds them and not the
//! task's name.

use super::reference::{RefUse, beside};
use super::spec::{ArtifactType, Key, Kind, Type};
use super::value::Table;

/// What an `include` of a task file that comes with the program begins with.
pub const SCHEME: &str = "task:";

/// The task files that come with the program.
pub const SHIPPED: &[(&str, &str)] = &[
    ("aime24", include_str!("../../pipelines/tasks/aime24.toml")),
    ("math500", include_str!("../../pipelines/tasks/math500.toml")),
    ("gpqa-diamond", include_str!("../../pipelines/tasks/gpqa-diamond.toml")),
    ("gsm8k", include_str!("../../pipelines/tasks/gsm8k.toml")),
    ("mini", include_str!("../../pipelines/tasks/mini.toml")),
];

/// The key of a task that is no stage's.
pub const DATA: Key = Key::required("data", Type::Ref(&[ArtifactType::Dataset]), "The dataset stage of the problems.");

pub(super) static KEYS: &[Key] = &[DATA];

/// The kind whose keys tasks give.
pub fn asks(kinds: &[&'static Kind]) -> Option<&'static Kind> {
    kinds.iter().copied().find(|kind| kind.task_key().is_some())
}

/// The keys of that kind which a task may give.
pub fn keys(kinds: &[&'static Kind]) -> impl Iterator<Item = &'static Key> + Clone + use<> {
    asks(kinds).map_or(&[] as &'static [Key], |kind| kind.keys).iter().filter(|key| key.task)
}

/// A task as written, overlays applied.
pub(crate) struct Task {
    pub name: String,
    pub table: Table,
    /// `None` if it is missing or wrong, which is reported.
    pub data: Option<RefUse>,
}

impl Task {
    /// The keys of a stage of `kind` with those of the task beneath. What the stage says in another way
    /// (`prompt_file` for `prompt`), and what means nothing beside what it has, stays away.
    pub fn beneath(&self, kind: &Kind, own: &Table) -> Table {
        let mut table = Table::default();
        for entry in &self.table.entries {
            let Some(key) = kind.keys.iter().find(|key| key.task && key.name == entry.key) else { continue };
            let said = key.rival().is_some_and(|other| own.get(other).is_some());
            if !said && beside(key, kind.keys, own).is_none() {
                table.entries.push(entry.clone());
            }
        }
        table.overlay(own);
        table
    }
}
