//! `check`: a claim about gathered numbers that must hold, with its uncertainty.
//!
//! What a claim is, and what it comes to, is in `claim`.

mod claim;

use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::plan::Cell;
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::kind::StageKind;

use crate::stage::kinds::table::{axis_names, strings, unknown_axis};
use crate::stage::share::readings;
use claim::Claim;
use serde::Deserialize;
use serde_json::json;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "check",
    about: "a claim about scores or measurements that must hold",
    recipe: 2,
    yields: ArtifactType::Verdict,
    keys: &[
        Key::required(
            "from",
            Type::Gather(&[ArtifactType::Scores, ArtifactType::Measurements, ArtifactType::Files]),
            "The stages whose numbers the claim is about: one name or a list. A `command` counts if it leaves scores.json or measurements.jsonl.",
        ),
        Key::required(
            "claim",
            Type::Str,
            "Two sides and a comparison, for example `mean(accuracy[data=r1k]) > mean(accuracy[data=s1k]) + 1`; \
             aggregates are mean, min, max and count.",
        ),
        Key::default(
            "severity",
            Type::Choice(&["error", "warn"]),
            "\"error\"",
            "Whether a claim that does not hold fails the run.",
        ),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { misfits, ..StageKind::new(&KIND, run) };

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    claim: String,
    severity: Severity,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Error,
    Warn,
}

fn rules(params: &Params) -> Vec<Broken> {
    let claim = strings(params, "claim").concat();
    match Claim::parse(&claim) {
        Ok(_) => Vec::new(),
        Err(wrong) => vec![Broken {
            key: "claim",
            message: wrong.to_string(),
            help: "a claim looks like `mean(accuracy[data=r1k]) > mean(accuracy[data=s1k])`".to_string(),
        }],
    }
}

/// What can be said against a claim from the axes of its inputs alone: an axis or a value of an
/// axis that no input has.
pub fn misfits(params: &Params, inputs: &[&Cell]) -> Vec<Broken> {
    let Ok(claim) = Claim::parse(&strings(params, "claim").concat()) else { return Vec::new() };
    if inputs.is_empty() || inputs.iter().any(|cell| cell.kind.yields != ArtifactType::Scores) {
        return Vec::new(); // a field of measurements, such as `step`, may be meant
    }
    let known = axis_names(inputs);
    let mut broken = Vec::new();
    for aggregate in claim.aggregates() {
        for (axis, value) in &aggregate.only {
            if axis == "stage" {
                continue;
            }
            if !known.contains(axis) {
                broken.push(unknown_axis("claim", axis, &known));
                continue;
            }
            let values = readings::distinct(inputs.iter().filter_map(|cell| Some(cell.axes.get(axis)?.to_string())));
            if !values.contains(value) {
                broken.push(Broken {
                    key: "claim",
                    message: format!("no input has `{axis}={value}`"),
                    help: format!("values of `{axis}`: {}", values.join(", ")),
                });
            }
        }
    }
    broken
}

/// Judges the claim and writes `verdict.json`.
///
/// # Errors
/// `check::does_not_hold` (unless `severity = "warn"`), `check::no_number`, `check::nothing_selected`.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let claim = Claim::parse(&spec.claim)
        .map_err(|wrong| Problem::new("check::claim", format!("{wrong} in the claim `{}`", spec.claim)))?;
    let readings = readings::readings(ctx.inputs("from"))?;
    let verdict = claim.judge(&readings)?;
    let path = ctx.out.join("verdict.json");
    let text = json!({
        "holds": verdict.holds,
        "claim": spec.claim,
        "left": verdict.left,
        "right": verdict.right,
        "difference": verdict.left - verdict.right,
        "interval": verdict.half_width,
        "within_noise": verdict.within_noise(),
        "sentence": verdict.to_string(),
    });
    std::fs::write(&path, format!("{text:#}\n"))
        .map_err(|error| Problem::io("check::write", "write", &path, &error))?;
    if verdict.holds {
        return Ok(());
    }
    if spec.severity == Severity::Warn {
        ctx.progress.warn(&format!("the claim does not hold: {verdict}"));
        return Ok(());
    }
    Err(Problem::new("check::does_not_hold", format!("the claim `{}` does not hold", spec.claim))
        .note(verdict.to_string())
        .help("`severity = \"warn\"` reports it and lets the run go on"))
}
