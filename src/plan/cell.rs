//! What will be done: cells, and the plan of them.

use super::graph::Graph;
use crate::manifest::spec::{Kind, Params};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Index into [`Plan::cells`].
pub type CellId = usize;

/// The value of an axis at a cell.
#[derive(Debug, Clone, PartialEq)]
pub enum AxisValue {
    /// `"r1k"`.
    Str(String),
    /// `7`.
    Int(i64),
    /// `3e-4`.
    Float(f64),
    /// `true`.
    Bool(bool),
}

/// Axis names and values, in the order the axes were declared along the inputs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Axes(pub Vec<(String, AxisValue)>);

/// One stage at one point of its axes.
pub struct Cell {
    /// The stage's name.
    pub stage: String,
    /// The point.
    pub axes: Axes,
    /// What the stage does.
    pub kind: &'static Kind,
    /// What the manifest says the stage is for; not part of what it computes.
    pub description: Option<Arc<str>>,
    /// Everything but references; sources as written after `{axis}` substitution. Shared by the
    /// cells of a stage that have the same.
    pub params: Arc<Params>,
    /// In the order of the kind's keys. Cells come earlier in the plan than those that need them.
    pub inputs: Vec<Input>,
    /// References to the outside, in the order of the kind's keys.
    pub sources: Vec<Source>,
    /// The manifest file that declares the stage.
    pub file: PathBuf,
    /// The stage's table header.
    pub span: Range<usize>,
}

/// A reference to the outside, as written after `{axis}` substitution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Dotted key of type `Source`.
    pub key: String,
    /// `scheme:rest`.
    pub text: String,
    /// What a relative `path:` is relative to: the folder of the file in which the text stands (a
    /// profile may stand elsewhere than the stage), and the current folder for `--set`. May be empty.
    pub folder: PathBuf,
}

/// What a reference came to.
pub struct Input {
    /// Dotted key (`model`, `data`, `concat`, `from`).
    pub slot: String,
    /// For a model: the chain, base first, adapters after. For lists: in order. For gathers: all.
    pub cells: Vec<CellId>,
    /// Whether the labels of the cells are part of the input (gathers).
    pub labelled: bool,
}

/// What will be done: cells, and which of them needs which.
pub struct Plan {
    /// As the manifest has it.
    pub title: String,
    /// Dependencies first, ties in the order written.
    pub cells: Vec<Cell>,
    graph: Graph,
}

impl Plan {
    /// A plan of `cells`, dependencies first.
    pub fn new(title: String, cells: Vec<Cell>) -> Plan {
        let needs = |cell: &Cell| {
            let needs: BTreeSet<CellId> = cell.inputs.iter().flat_map(|input| input.cells.iter().copied()).collect();
            needs.into_iter().collect()
        };
        let graph = Graph::new(cells.iter().map(needs));
        Plan { title, cells, graph }
    }

    /// The graph: node `i` is cell `i`, an edge goes from a cell to one it needs.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// `cells` and everything they need, directly or not.
    pub fn closure(&self, cells: impl IntoIterator<Item = CellId>) -> BTreeSet<CellId> {
        self.graph.above(cells, |_| true)
    }
}

impl fmt::Display for AxisValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AxisValue::Str(text) => f.write_str(text),
            AxisValue::Int(int) => write!(f, "{int}"),
            AxisValue::Float(float) => write!(f, "{float:?}"),
            AxisValue::Bool(bool) => write!(f, "{bool}"),
        }
    }
}

impl Axes {
    /// The value of an axis; `None` if the cell does not have it.
    pub fn get(&self, name: &str) -> Option<&AxisValue> {
        self.0.iter().find(|(axis, _)| axis == name).map(|(_, value)| value)
    }
}

/// `sft[size=7B,data=r1k]`, as on the command line and in messages.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.stage)?;
        for (i, (axis, value)) in self.axes.0.iter().enumerate() {
            write!(f, "{}{axis}={value}", if i == 0 { '[' } else { ',' })?;
        }
        if self.axes.0.is_empty() { Ok(()) } else { f.write_str("]") }
    }
}
