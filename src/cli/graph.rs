//! `pipe graph M`: which stage needs which, as text, for Graphviz, for Mermaid, or as JSON.

use super::global::{Done, Global, OfManifest, print};
use super::session;
use clap::ValueEnum;
use pipe::manifest::spec::ArtifactType;
use pipe::plan::{Cell, Graph, Plan};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Show which stage needs which; pictures leave out arrows that follow from others
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe graph pipelines/table1.toml\n  \
    pipe graph pipelines/table1.toml --format dot | dot -Tsvg > graph.svg\n  \
    pipe graph pipelines/table1.toml --format mermaid --cells")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// A node for every cell instead of one for every stage (JSON always has cells)
    #[arg(long)]
    cells: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Dot,
    Mermaid,
    Json,
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    let plan = session::load(global, &arguments.of.manifest)?.plan;
    let format = if global.json { Format::Json } else { arguments.format };
    if format == Format::Json {
        return print(&format!("{:#}\n", as_json(&plan)));
    }
    let nodes = nodes(&plan, arguments.cells);
    print(&match format {
        Format::Dot => dot(&nodes, &arrows(&nodes)),
        Format::Mermaid => mermaid(&nodes, &arrows(&nodes)),
        Format::Text | Format::Json => text(&nodes),
    })
}

/// A stage or a cell, and what it needs.
struct Node {
    name: String,
    kind: &'static str,
    cells: usize,
    /// `size x data`.
    axes: String,
    /// Indices of nodes, in order of first need.
    needs: Vec<usize>,
}

/// The cells a cell was given by name: of a model's chain the last, which stands for the rest.
pub fn direct_needs(plan: &Plan, cell: &Cell) -> Vec<usize> {
    let mut needs = Vec::new();
    for input in &cell.inputs {
        let chain = !input.labelled && input.cells.iter().all(|at| plan.cells[*at].kind.yields == ArtifactType::Model);
        let skip = if chain { input.cells.len().saturating_sub(1) } else { 0 };
        needs.extend(&input.cells[skip..]);
    }
    needs
}

fn nodes(plan: &Plan, cells: bool) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut of_cell = Vec::with_capacity(plan.cells.len());
    let mut by_name: BTreeMap<String, usize> = BTreeMap::new();
    for cell in &plan.cells {
        let name = if cells { cell.to_string() } else { cell.stage.clone() };
        let at = *by_name.entry(name.clone()).or_insert_with(|| {
            let axes: Vec<&str> = cell.axes.0.iter().map(|(axis, _)| axis.as_str()).collect();
            nodes.push(Node { name, kind: cell.kind.name, cells: 0, axes: axes.join(" x "), needs: Vec::new() });
            nodes.len() - 1
        });
        nodes[at].cells += 1;
        of_cell.push(at);
    }
    for (at, cell) in plan.cells.iter().enumerate() {
        for need in direct_needs(plan, cell) {
            let (node, need) = (of_cell[at], of_cell[need]);
            if node != need && !nodes[node].needs.contains(&need) {
                nodes[node].needs.push(need);
            }
        }
    }
    nodes
}

fn text(nodes: &[Node]) -> String {
    let width = |length: &dyn Fn(&Node) -> usize| nodes.iter().map(length).max().unwrap_or(0);
    let (name_width, kind_width) = (width(&|node| node.name.chars().count()), width(&|node| node.kind.len()));
    let axes = |node: &Node| match (node.cells, node.axes.is_empty()) {
        (_, true) => String::new(),
        (1, false) => node.axes.clone(),
        (cells, false) => format!("{cells}: {}", node.axes),
    };
    let axes_width = width(&|node| axes(node).chars().count());
    let mut text = String::new();
    for node in nodes {
        let needs: Vec<&str> = node.needs.iter().map(|need| nodes[*need].name.as_str()).collect();
        let arrow = if needs.is_empty() { String::new() } else { format!("<- {}", needs.join(", ")) };
        let line = format!("{:name_width$}  {:kind_width$}  {:axes_width$}  {arrow}", node.name, node.kind, axes(node));
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// What a picture draws: of each node's needs those that do not follow from the others. The list has all.
fn arrows(nodes: &[Node]) -> Vec<Vec<usize>> {
    Graph::new(nodes.iter().map(|node| node.needs.clone())).reduced()
}

fn caption(node: &Node, newline: &str) -> String {
    match node.cells {
        1 => format!("{}{newline}{}", node.name, node.kind),
        cells => format!("{}{newline}{}, {cells} cells", node.name, node.kind),
    }
}

fn dot(nodes: &[Node], arrows: &[Vec<usize>]) -> String {
    let mut text = String::from("digraph pipe {\n  rankdir = LR;\n  node [shape = box, fontname = \"sans-serif\"];\n");
    for (at, node) in nodes.iter().enumerate() {
        let label = caption(node, "\n").replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = writeln!(text, "  n{at} [label = \"{label}\"];");
    }
    for (at, needs) in arrows.iter().enumerate() {
        for need in needs {
            let _ = writeln!(text, "  n{need} -> n{at};");
        }
    }
    text.push_str("}\n");
    text
}

fn mermaid(nodes: &[Node], arrows: &[Vec<usize>]) -> String {
    let mut text = String::from("flowchart LR\n");
    for (at, node) in nodes.iter().enumerate() {
        let label = caption(node, "<br>").replace('"', "#quot;");
        let _ = writeln!(text, "  n{at}[\"{label}\"]");
    }
    for (at, needs) in arrows.iter().enumerate() {
        for need in needs {
            let _ = writeln!(text, "  n{need} --> n{at}");
        }
    }
    text
}

fn as_json(plan: &Plan) -> Value {
    let cells: Vec<Value> = plan
        .cells
        .iter()
        .map(|cell| {
            let axes: Map<String, Value> =
                cell.axes.0.iter().map(|(axis, value)| (axis.clone(), json!(value.to_string()))).collect();
            let inputs: Map<String, Value> = cell
                .inputs
                .iter()
                .map(|input| {
                    let names: Vec<String> = input.cells.iter().map(|at| plan.cells[*at].to_string()).collect();
                    (input.slot.clone(), json!(names))
                })
                .collect();
            let sources: Map<String, Value> =
                cell.sources.iter().map(|source| (source.key.clone(), json!(source.text))).collect();
            json!({
                "cell": cell.to_string(), "stage": cell.stage, "kind": cell.kind.name, "axes": axes,
                "inputs": inputs, "sources": sources,
            })
        })
        .collect();
    json!({ "title": plan.title, "cells": cells })
}
