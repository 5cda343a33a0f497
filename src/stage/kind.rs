//! All that the rest of the program may ask of a kind, in one row: each kind's file fills in its own.

use crate::data::Record;
use crate::files::Files;
use crate::manifest::spec::{ArtifactType, Broken, Kind, Lineage, Params};
use crate::model::{Config, LoraSpec};
use crate::plan::Cell;
use crate::problem::Problem;
use crate::remote::{Connection, Replies};
use crate::stage::context::Context;
use crate::stage::forecast::completions::CompletionForecast;
use crate::stage::forecast::needs::Computes;
use crate::stage::forecast::training::TrainingForecast;
use crate::stage::share::asking::Pending;
use std::path::Path;

/// A kind of stage: what a manifest may say of it, what it does, and what can be known before it does it.
pub struct StageKind {
    /// Its name and keys.
    pub kind: &'static Kind,
    /// What it does with a context.
    pub run: fn(&Context) -> Result<(), Problem>,
    /// The slot of the records it works through, if it takes some.
    pub data: Option<&'static str>,
    /// What can be known of its work from its parameters; `None` if they are not this kind's, or nothing can.
    pub forecast: fn(&Params) -> Option<Forecast>,
    /// What its parameters ask an endpoint over these records and no journal has yet, in the order asked, and a sum of
    /// the replies that are kept. `Err` if it would refuse the records.
    pub pending: PendingOf,
    /// What it says against its parameters once the axes of its inputs are known.
    pub misfits: fn(&Params, &[&Cell]) -> Vec<Broken>,
    /// What stays of a run that ends early, said where memory ran out.
    pub stays: Option<&'static str>,
    /// The shape of a base model it will come to, before it has run: by its parameters and the folders of its
    /// `source` and `tokenizer`. `None` if that says nothing.
    pub config: ConfigOf,
    /// The adapter it adds to the chain of its model, by its parameters and the folder of its `source`.
    pub adapter: fn(&Params, Option<&Path>) -> Option<LoraSpec>,
    /// Variables of the environment that it passes on.
    pub variables: fn(&Params) -> Vec<String>,
}

/// See [`StageKind::config`]. Parameters, folders of `source` and `tokenizer`.
pub type ConfigOf = fn(&Params, Option<&Path>, Option<&Path>) -> Option<Result<Config, Problem>>;

/// See [`StageKind::pending`]. Parameters, file of the prompt, records, the way to the endpoint.
pub type PendingOf = fn(&Params, Option<&Path>, &[Record], &Connection) -> Result<(Vec<Pending>, Replies), Problem>;

/// The work of a stage that computes, as its parameters describe it.
pub enum Forecast {
    /// Steps over examples.
    Training(Box<TrainingForecast>),
    /// Completions of records, here or by an endpoint.
    Completing(Box<CompletionForecast>),
    /// Another use of a model.
    Other(Box<dyn Computes>),
}

impl Forecast {
    /// What it needs of a machine, whatever it does.
    pub fn computes(&self) -> &dyn Computes {
        match self {
            Forecast::Training(training) => &**training,
            Forecast::Completing(completing) => &**completing,
            Forecast::Other(other) => &**other,
        }
    }
}

impl StageKind {
    /// A kind of which nothing is known but what it does.
    pub const fn new(kind: &'static Kind, run: fn(&Context) -> Result<(), Problem>) -> StageKind {
        StageKind {
            kind,
            run,
            data: None,
            forecast: |_| None,
            pending: |_, _, _, _| Ok((Vec::new(), Replies::default())),
            misfits: |_, _| Vec::new(),
            stays: None,
            config: |_, _, _| None,
            adapter: |_, _| None,
            variables: |_| Vec::new(),
        }
    }

    /// Whether it yields records.
    pub fn makes_records(&self) -> bool {
        self.kind.yields == ArtifactType::Dataset
    }

    /// Whether it yields a model.
    pub fn makes_model(&self) -> bool {
        self.kind.yields == ArtifactType::Model
    }

    /// Whether it makes a model of the data it is given.
    pub fn trains(&self) -> bool {
        self.makes_model() && self.data.is_some()
    }

    /// Whether it makes scores of the data it is given.
    pub fn scores(&self) -> bool {
        self.kind.yields == ArtifactType::Scores && self.data.is_some()
    }

    /// Whether it yields a whole model, of the shape of the one it was given.
    pub fn yields_whole(&self, params: &Params) -> bool {
        self.makes_model() && (self.kind.lineage)(params) == Lineage::Whole
    }

    /// The files of the records among these inputs.
    pub fn records<'c>(&self, ctx: &'c Context) -> Option<&'c Files> {
        ctx.inputs(self.data?).first().map(|artifact| &artifact.files)
    }
}
