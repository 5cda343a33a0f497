//! All that a stage is given, and all that it may tell.

use crate::files::Files;
use crate::manifest::spec::Params;
use crate::model::Device;
use crate::plan::Axes;
use crate::problem::{Exit, Problem};
use crate::progress::Progress;
use crate::remote::Remote;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// One artifact given to a stage.
pub struct Artifact {
    /// The name of the stage it came from. Only labelled inputs may use them for results.
    pub stage: String,
    /// The name of that stage's kind.
    pub kind: &'static str,
    /// The point of its axes.
    pub axes: Axes,
    /// What it left.
    pub files: Files,
}

/// All a stage may see.
pub struct Context<'a> {
    /// `sft[size=7B]`, for messages only.
    pub label: &'a str,
    /// Its resolved keys, defaults filled in.
    pub params: &'a Params,
    /// By slot (dotted key). A model's slot holds its chain, base first.
    pub inputs: &'a BTreeMap<String, Vec<Artifact>>,
    /// By dotted key: the file or folder a `path:` or `hf:` source came to.
    pub sources: &'a BTreeMap<String, PathBuf>,
    /// Empty folder; its files become the artifact when `run` returns `Ok`.
    pub out: &'a Path,
    /// Kept when the stage is interrupted, for resuming; removed when it is published.
    pub work: &'a Path,
    /// Where models compute.
    pub device: Device,
    /// The way to endpoints, shared by the stages of a run.
    pub remote: &'a Remote,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
    /// Set on Ctrl-C; stages look at it at least once a second and return [`Context::stopped`].
    pub stop: &'a AtomicBool,
}

impl Context<'_> {
    /// `Err` once the user has asked to stop.
    pub fn stopped(&self) -> Result<(), Problem> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(
                Problem::new("exec::interrupted", format!("`{}` was interrupted", self.label)).exit(Exit::Interrupted)
            );
        }
        Ok(())
    }

    /// The parameters as the kind's own struct (`deny_unknown_fields`, so that every accepted key is read).
    pub fn spec<T: serde::de::DeserializeOwned>(&self) -> Result<T, Problem> {
        read_params(self.label, self.params.clone())
    }

    /// The artifacts of a slot; empty if the optional reference is absent.
    pub fn inputs(&self, slot: &str) -> &[Artifact] {
        self.inputs.get(slot).map_or(&[], Vec::as_slice)
    }
}

/// Parameters as a struct that knows every one of them. `Err` (`stage::params`) says which does not fit; `label` is
/// what the message calls their owner.
pub fn read_params<T: serde::de::DeserializeOwned>(label: &str, params: Params) -> Result<T, Problem> {
    serde_json::from_value(serde_json::Value::Object(params))
        .map_err(|error| Problem::new("stage::params", format!("parameters of `{label}` do not fit its kind: {error}")))
}
