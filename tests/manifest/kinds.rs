//! Toy kinds of the same shape as the real ones.

use pipe::manifest::spec::{ArtifactType as A, Broken, Key, Kind, Lineage, Params, Type as T, no_lineage, no_rules};

const UNIT: T = T::Float { min: 0.0, max: 1.0, above: false };
const POSITIVE: T = T::Float { min: 0.0, max: f64::MAX, above: true };
const COUNT: T = T::Int { min: 1, max: i64::MAX };
const SEED: T = T::Int { min: 0, max: i64::MAX };

pub const MODEL: Kind = Kind {
    name: "model",
    about: "base weights",
    recipe: 1,
    yields: A::Model,
    keys: &[Key::required("source", T::Source(&["hf", "path", "init"]), "Where the weights come from.")],
    floats: false,
    lineage: no_lineage,
    rules: no_rules,
};

pub const DATASET: Kind = Kind {
    name: "dataset",
    about: "records",
    recipe: 1,
    yields: A::Dataset,
    keys: &[
        Key::optional(
            "source",
            T::Any(&[T::Source(&["hf", "path"]), T::List(&T::Source(&["hf", "path"]))]),
            "File or files.",
        ),
        Key::optional("concat", T::Refs(&[A::Dataset]), "Datasets to put one after the other."),
        Key::optional("filter", T::Map(&T::Any(&[T::Bool, SEED, T::Str])), "Field to value."),
        Key::optional(
            "sample",
            T::Table(&[
                Key::required("pairs", COUNT, "How many."),
                Key::default("by", T::Str, "id", "Field that pairs share."),
                Key::default("seed", SEED, "0", "Of the draw."),
            ]),
            "Draws some records.",
        ),
    ],
    floats: false,
    lineage: no_lineage,
    rules: dataset_rules,
};

fn dataset_rules(params: &Params) -> Vec<Broken> {
    let pairs = params.get("sample").and_then(|sample| sample["pairs"].as_i64());
    match pairs {
        Some(pairs) if pairs % 2 == 1 => vec![Broken {
            key: "sample.pairs",
            message: format!("{pairs} pairs cannot be halved"),
            help: format!("`sample.pairs = {}`", pairs + 1),
        }],
        _ => Vec::new(),
    }
}

pub const SFT: Kind = Kind {
    name: "sft",
    about: "fine-tuning",
    recipe: 3,
    yields: A::Model,
    keys: &[
        Key::required("model", T::Ref(&[A::Model]), "What to start from."),
        Key::required("data", T::Ref(&[A::Dataset]), "What to learn."),
        Key::default("epochs", COUNT, "1", "Passes over the data."),
        Key::default("learning_rate", POSITIVE, "1e-4", "Peak learning rate."),
        Key::default(
            "schedule",
            T::Any(&[T::Choice(&["constant", "cosine"]), T::Table(SCHEDULE)]),
            "constant",
            "Of the learning rate.",
        ),
        Key::optional(
            "lora",
            T::Table(&[
                Key::required("rank", COUNT, "Inner size."),
                Key::default("alpha", POSITIVE, "16", "Scale times rank."),
                Key::default("targets", T::List(&T::Str), "[\"q_proj\"]", "Linears."),
            ]),
            "Trains an adapter.",
        ),
        Key::default("shuffle", T::Bool, "true", "Draw the order."),
        Key::default("seed", SEED, "0", "Of the order."),
        Key::optional("dtype", T::Choice(&["f32", "bf16"]), "Of the frozen weights."),
        Key::default("micro_batch", COUNT, "1", "Memory against pace.").no_result(),
    ],
    floats: true,
    lineage: |params| if params.contains_key("lora") { Lineage::OnTop } else { Lineage::Whole },
    rules: no_rules,
};

const SCHEDULE: &[Key] = &[
    Key::required("kind", T::Choice(&["constant", "cosine"]), "Shape."),
    Key::default("warmup_ratio", UNIT, "0", "Share of the steps."),
];

pub const DPO: Kind = Kind {
    name: "dpo",
    about: "preferences",
    recipe: 1,
    yields: A::Model,
    keys: &[
        Key::required("model", T::Ref(&[A::Model]), "Policy and reference."),
        Key::required("data", T::Ref(&[A::Dataset]), "Pairs."),
        Key::default("beta", POSITIVE, "0.1", "Strength."),
    ],
    floats: true,
    lineage: |_| Lineage::Continues,
    rules: no_rules,
};

pub const EVAL: Kind = Kind {
    name: "eval",
    about: "grades answers",
    recipe: 1,
    yields: A::Scores,
    keys: &[
        Key::required("model", T::Ref(&[A::Model]), "Who answers."),
        Key::required(
            "task",
            T::Any(&[T::Choice(&["aime24", "math500", "gpqa"]), T::Ref(&[A::Dataset])]),
            "What is asked.",
        ),
        Key::optional("prompt", T::Str, "Template of the question."),
        Key::optional("temperature", T::Float { min: 0.0, max: 2.0, above: false }, "Of sampling."),
    ],
    floats: true,
    lineage: no_lineage,
    rules: no_rules,
};

pub const TABLE: Kind = Kind {
    name: "table",
    about: "prints",
    recipe: 1,
    yields: A::Table,
    keys: &[
        Key::required("from", T::Gather(&[A::Scores, A::Measurements]), "What is shown."),
        Key::default("rows", T::List(&T::Str), "[]", "Axes."),
        Key::optional("published", T::Source(&["path"]), "Numbers to show beside."),
    ],
    floats: false,
    lineage: no_lineage,
    rules: no_rules,
};

pub static KINDS: &[&Kind] = &[&MODEL, &DATASET, &SFT, &DPO, &EVAL, &TABLE];
