//! `kernel`: the empirical tangent kernel between examples under one model, K(o, u) = <g_o, g_u>, where g_o is the
//! gradient of log pi(y_o | x_o) with respect to what is trained. Times a learning rate it is, to first order, how much
//! a plain step on u changes the log-probability of o.
//!
//! log pi(y | x) is the sum over the learned tokens. Gradients are exact and in f32, products and sums in f64 and in an
//! order that no number of threads changes. All gradients are held at once, on the host: examples times trained values
//! times 4 bytes, which the forecast counts. Of preferences both sides are examples.
//!
//! `kernel.csv` is the matrix, with the examples' ids as header and first column, in numbers that read back as the same
//! bits. `measurements.jsonl` has a line per two groups, for tables and checks: the mean of `kernel` and of `cosine`
//! over their pairs of different examples, and of a group with itself the mean of `kernel_self`, K(o, o).

use crate::data::segments::row_id;
use crate::data::{self, Eos, Format, Limits, Overlength, Pair, Record, Sample};
use crate::manifest::spec::{ArtifactType, Key, Kind, Params, Type, no_lineage, no_rules};
use crate::model::memory::{Need, Part, Plan, Trained, Work};
use crate::model::{Extent, Gradients, LoadOptions, Model, Placed, Policy, lora};
use crate::problem::Problem;
use crate::stage::context::{Context, read_params};
use crate::stage::forecast::needs::{Computes, Data, HALVE, MOST_TOKENS, Needs, Shape, Taking, shorten, untie};
use crate::stage::kind::{Forecast, StageKind};
use crate::stage::kinds::table::csv_line;
use crate::stage::share::inputs;
use crate::stage::share::training::{self, Packed};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "kernel",
    about: "empirical tangent kernel between examples: products of the gradients of their log-probabilities",
    recipe: 1,
    yields: ArtifactType::Measurements,
    keys: &[
        Key::required(
            "model",
            Type::Ref(&[ArtifactType::Model]),
            "The model under which gradients are taken; it has an adapter, unless `parameters` says otherwise.",
        ),
        Key::required(
            "data",
            Type::Ref(&[ArtifactType::Dataset]),
            "Preference records (`chosen` and `rejected`, an example each), or records with one completion, as a training stage takes them.",
        ),
        Key::default(
            "parameters",
            Type::Choice(&["adapter", "all"]),
            "\"adapter\"",
            "What gradients are with respect to: the model's last adapter, or every weight, adapters folded in.",
        ),
        Key::optional(
            "group_by",
            Type::Str,
            "A field of the records whose values are groups, over which means are taken; absent: one group, `all`. Of preferences each side is a group of its own: `all/chosen`.",
        ),
        Key::default(
            "format",
            Type::Choice(training::FORMATS),
            "\"chat\"",
            "How a record becomes tokens; as in the training stage.",
        ),
        Key::default("eos", Type::Choice(training::ENDS), "\"one\"", "As in the training stage."),
        Key::required("max_tokens", training::COUNT, "Longest example, in tokens, prompt and completion together."),
        Key::default(
            "on_overlength",
            Type::Choice(training::OVERLENGTH),
            "\"error\"",
            "What to do with longer examples.",
        ),
        Key::default("dtype", Type::Choice(&["f32", "bf16"]), "\"f32\"", "How frozen weights are held."),
    ],
    floats: true,
    lineage: no_lineage,
    rules: no_rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { data: Some("data"), forecast, ..StageKind::new(&KIND, run) };

fn forecast(params: &Params) -> Option<Forecast> {
    Some(Forecast::Other(Box::new(read_params::<Spec>(KIND.name, params.clone()).ok()?)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    parameters: Parameters,
    group_by: Option<String>,
    format: Format,
    eos: Eos,
    max_tokens: usize,
    on_overlength: Overlength,
    dtype: inputs::Storage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Parameters {
    Adapter,
    All,
}

/// What the examples of a preference are called, after its id.
const SIDES: [&str; 2] = ["chosen", "rejected"];

impl Computes for Spec {
    fn needs(&self, shape: &Shape, data: Option<Data>, on_device: bool) -> Needs {
        let (mut config, dtype) = (shape.config.clone(), self.dtype.dtype());
        let trained = match (self.parameters, shape.adapters.last()) {
            (Parameters::All, _) => Trained::Everything,
            (Parameters::Adapter, Some(adapter)) => Trained::Adapter(adapter),
            // To be refused.
            (Parameters::Adapter, None) => Trained::Nothing,
        };
        let active = usize::from(matches!(trained, Trained::Adapter(_)));
        untie(&mut config, &shape.adapters[..shape.adapters.len() - active]);
        // One example at a time.
        let longest = data.map_or(MOST_TOKENS, |data| data.longest).min(self.max_tokens).clamp(1, MOST_TOKENS);
        let extent = Extent::full(longest, longest);
        let work = match trained {
            Trained::Nothing => Work::Measure { extent, logits: false, hidden_states: false },
            _ => Work::Train { extent, kept: 0, offload: false, graphs: false, state_sizes: &|_| Vec::new() },
        };
        let plan = Plan { config: &config, dtype, trained, on_device, work };
        let records = data.map_or(1, |data| data.records as u64);
        let sure = if self.on_overlength == Overlength::Drop { 1 } else { records };
        let of = |examples: u64| {
            let kept = examples.saturating_mul(4).saturating_mul(plan.trained_values());
            with_gradients(plan.need(), kept, on_device)
        };
        let most = of(records.saturating_mul(SIDES.len() as u64));
        Needs { surely: of(sure), most, takes_more: false, steps: None, disk: 0 }
    }

    fn advice(&self, _on_device: bool) -> Vec<String> {
        let mut advice = vec!["fewer records: the gradients of all of them are held at once".to_string()];
        if self.parameters == Parameters::All {
            advice.push("`parameters = \"adapter\"`: far fewer values than every weight".to_string());
        }
        advice.extend((self.dtype == inputs::Storage::F32).then(|| HALVE.to_string()));
        advice.push(shorten(self.max_tokens));
        advice
    }

    fn takes(&self) -> Option<Taking> {
        let Spec { format, eos, max_tokens, on_overlength, .. } = *self;
        Some(Taking { format, eos, max_tokens, on_overlength, allow_unlearned: false })
    }
}

/// The same with this many bytes of gradients held on the host.
fn with_gradients(mut need: Need, kept: u64, on_device: bool) -> Need {
    if on_device {
        // The model has left the host before the first gradient comes.
        let stays = |part| kept.saturating_add(if part == Part::Uploads { need.of(part).0 } else { 0 });
        if stays(Part::Uploads) <= need.host {
            return need;
        }
        need.host = stays(Part::Uploads);
        need.lines.iter_mut().filter(|line| line.part != Part::Uploads).for_each(|line| line.host = 0);
    } else {
        need.host = need.host.saturating_add(kept);
    }
    for line in need.lines.iter_mut().filter(|line| line.part == Part::Gradients) {
        line.host = line.host.saturating_add(kept);
    }
    need
}

/// One completion.
struct Example {
    id: String,
    group: String,
    sample: Sample,
}

/// K of all examples. It is symmetric: row `o` holds K(o, u) of u <= o.
struct Matrix(Vec<Vec<f64>>);

impl Matrix {
    fn at(&self, o: usize, u: usize) -> f64 {
        self.0[o.max(u)][o.min(u)]
    }

    /// `None` if one of the two gradients is zero.
    fn cosine(&self, o: usize, u: usize) -> Option<f64> {
        let norms = (self.at(o, o) * self.at(u, u)).sqrt();
        (norms > 0.0).then(|| self.at(o, u) / norms)
    }
}

/// Takes the gradient of every example and writes the products of all pairs.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let mut model = model(ctx, &spec)?;
    let examples = examples(ctx, &spec)?;
    training::check_ids(model.config(), examples.iter().map(|example| &example.sample))?;
    ctx.progress.begin(examples.len() as u64, "examples");
    let (mut gradients, mut rows) = (Vec::with_capacity(examples.len()), Vec::new());
    for example in &examples {
        gradients.push(gradient(&mut model, &example.sample)?);
        let newest = &gradients[gradients.len() - 1];
        let row: Vec<f64> = gradients.par_iter().map(|other| product(newest, other)).collect();
        if row.iter().any(|value| !value.is_finite()) {
            let message = format!("the gradient of example `{}` has values that are not numbers", example.id);
            return Err(
                Problem::new("kernel::not_finite", message).help("look at the training log of the model: `pipe show`")
            );
        }
        rows.push(row);
        ctx.progress.at(rows.len() as u64);
        ctx.stopped()?;
    }
    let matrix = Matrix(rows);
    write_matrix(ctx, &examples, &matrix)?;
    let means = means(&examples, &matrix);
    for line in &means {
        ctx.progress.note(&format!("{} with {}: {}", line["group"], line["with"], line["kernel"]));
    }
    inputs::write_lines(&ctx.out.join("measurements.jsonl"), &means)
}

/// The model where it computes, with what gradients are taken of.
fn model(ctx: &Context, spec: &Spec) -> Result<Placed, Problem> {
    let everything = spec.parameters == Parameters::All;
    if let (false, Some(last)) = (everything, ctx.inputs("model").last())
        && !lora::is_adapter(&last.files)
    {
        let message = format!("`{}` has no adapter, and `{}` takes gradients of one", last.stage, ctx.label);
        return Err(Problem::new("kernel::no_adapter", message)
            .help("name a stage that trains one, with `lora` among its keys")
            .help("`parameters = \"all\"` takes gradients of every weight"));
    }
    let options = LoadOptions { dtype: spec.dtype.dtype(), fold_last: everything };
    let mut model = Model::load(&inputs::chain(ctx, "model"), &options)?;
    if everything {
        model.train_all()?;
    }
    // Hardly two examples have the same shape.
    Placed::with(model, &ctx.device, Policy { graphs: false, ..Policy::default() })
}

/// The records as tokens, each with its group.
fn examples(ctx: &Context, spec: &Spec) -> Result<Vec<Example>, Problem> {
    let tokenizer = inputs::tokenizer(ctx, "model")?;
    let records = inputs::records(ctx, "data")?;
    let Spec { max_tokens, on_overlength, eos, .. } = *spec;
    let limits = Limits { max_tokens: Some(max_tokens), on_overlength, eos, ..Limits::default() };
    let groups = groups(&records, spec.group_by.as_deref())?;
    let examples: Vec<Example> = if records.first().is_some_and(data::is_preference) {
        let (pairs, notes) = data::pairs(&records, &tokenizer, spec.format, &limits)?;
        inputs::warn(ctx, &notes);
        let both = |Pair { id, chosen, rejected }: Pair| {
            let group = &groups[&id];
            SIDES.into_iter().zip([chosen, rejected]).map(move |(side, sample)| Example {
                id: format!("{id}/{side}"),
                group: format!("{group}/{side}"),
                sample,
            })
        };
        pairs.into_iter().flat_map(both).collect()
    } else {
        let (samples, notes) = data::samples(&records, &tokenizer, spec.format, &limits)?;
        inputs::warn(ctx, &notes);
        let one = |sample: Sample| Example { id: sample.id.clone(), group: groups[&sample.id].clone(), sample };
        samples.into_iter().map(one).collect()
    };
    Ok(examples)
}

/// The group of each record, by its id. `Err` if two have the same, or one has no group.
fn groups(records: &[Record], group_by: Option<&str>) -> Result<BTreeMap<String, String>, Problem> {
    let mut groups = BTreeMap::new();
    for (at, record) in records.iter().enumerate() {
        let id = row_id(record).unwrap_or_else(|| format!("line-{}", at + 1));
        let group = match group_by {
            None => Some("all".to_string()),
            Some(field) => match record.get(field) {
                Some(Value::String(text)) => Some(text.clone()),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => Some(value.to_string()),
                _ => None,
            },
        };
        let Some(group) = group else {
            let message = format!("record `{id}` has no `{}` to be grouped by", group_by.unwrap_or_default());
            let fields: Vec<&str> = record.keys().map(String::as_str).collect();
            return Err(Problem::new("kernel::no_group", message).note(format!("it has: {}", fields.join(", "))));
        };
        if groups.insert(id.clone(), group).is_some() {
            return Err(Problem::new("kernel::same_id", format!("two records are called `{id}`"))
                .help("rows and columns of the matrix are known by the ids of the records: give each its own"));
        }
    }
    Ok(groups)
}

/// Of the log-probability of the learned tokens of a sequence, their sum.
fn gradient(model: &mut Placed, sample: &Sample) -> Result<Gradients, Problem> {
    let packed = Packed::new(std::iter::once(sample));
    model.clear_gradients()?;
    let pass = model.forward(&packed.batch())?;
    let ones = vec![1.0; pass.logprobs.len()];
    pass.backward(&ones)?;
    model.gradients()
}

/// Sums that run beside each other, so that the order of addition is fixed and yet not one by one.
const LANES: usize = 16;

/// The inner product. Each product is exact in f64.
fn product(one: &Gradients, other: &Gradients) -> f64 {
    let mut sums = [0.0; LANES];
    let mut add = |one: &[f32], other: &[f32]| {
        for ((sum, a), b) in sums.iter_mut().zip(one).zip(other) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    };
    for (one, other) in one.values.iter().zip(&other.values) {
        let ((one, one_rest), (other, other_rest)) = (one.as_chunks::<LANES>(), other.as_chunks::<LANES>());
        one.iter().zip(other).for_each(|(one, other)| add(one, other));
        add(one_rest, other_rest);
    }
    sums.iter().sum()
}

fn write_matrix(ctx: &Context, examples: &[Example], matrix: &Matrix) -> Result<(), Problem> {
    let ids = || examples.iter().map(|example| example.id.clone());
    let mut text = csv_line(&std::iter::once("id".to_string()).chain(ids()).collect::<Vec<_>>());
    for (o, id) in ids().enumerate() {
        // The shortest text that reads back as the same number.
        let row = (0..examples.len()).map(|u| format!("{:?}", matrix.at(o, u)));
        text.push_str(&csv_line(&std::iter::once(id).chain(row).collect::<Vec<_>>()));
    }
    let path = ctx.out.join("kernel.csv");
    fs::write(&path, text).map_err(|error| Problem::io("stage::unwritable", "write", &path, &error))
}

/// A line for each group with itself and with those after it, in the order in which the examples bring them.
fn means(examples: &[Example], matrix: &Matrix) -> Vec<Value> {
    let mut known = BTreeSet::new();
    let groups: Vec<&str> =
        examples.iter().map(|example| example.group.as_str()).filter(|group| known.insert(*group)).collect();
    let of = |group: &str| -> Vec<usize> { (0..examples.len()).filter(|&at| examples[at].group == group).collect() };
    let mut lines = Vec::new();
    for (at, group) in groups.iter().enumerate() {
        for with in &groups[at..] {
            let (same, one, other) = (group == with, of(group), of(with));
            let pairs: Vec<(usize, usize)> = one
                .iter()
                .flat_map(|&o| other.iter().map(move |&u| (o, u)))
                .filter(|(o, u)| if same { o < u } else { true })
                .collect();
            let kernel = mean(pairs.iter().map(|&(o, u)| Some(matrix.at(o, u))));
            let cosine = mean(pairs.iter().map(|&(o, u)| matrix.cosine(o, u)));
            let mut line =
                json!({ "group": group, "with": with, "pairs": pairs.len(), "kernel": kernel, "cosine": cosine });
            if same {
                line["examples"] = json!(one.len());
                line["kernel_self"] = json!(mean(one.iter().map(|&o| Some(matrix.at(o, o)))));
            }
            lines.push(line);
        }
    }
    lines
}

/// `None` if there is none, or one of them is not known.
fn mean(values: impl ExactSizeIterator<Item = Option<f64>>) -> Option<f64> {
    let count = values.len();
    let sum: f64 = values.sum::<Option<f64>>()?;
    (count > 0).then(|| sum / count as f64)
}
