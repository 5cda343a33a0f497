//! From seconds to the table: rates, limits, ratios, and whether they are what is aimed at.

use super::ops::{Against, Amount, Plan};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What the peer measured: seconds by op and shape.
#[derive(Default)]
pub struct Peer {
    /// Its version, or why there is none.
    pub name: String,
    pub seconds: BTreeMap<(String, String), f64>,
}

impl Peer {
    /// Reads the lines of `peer.py`: its name, then a figure each.
    pub fn read(lines: &str) -> Peer {
        let mut peer = Peer::default();
        for line in lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let text = |key: &str| line[key].as_str().map(str::to_string);
            if let (Some(op), Some(shape), Some(seconds)) = (text("op"), text("shape"), line["seconds"].as_f64()) {
                peer.seconds.insert((op, shape), seconds);
            } else if let Some(name) = text("peer") {
                peer.name = name;
            }
        }
        peer
    }

    fn of(&self, plan: &Plan) -> Option<f64> {
        self.seconds.get(&(plan.op.to_string(), plan.shape.clone())).copied()
    }
}

/// The best large product, in FLOP/s, and the best copy, in bytes/s, of this run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    pub matmul: f64,
    pub copy: f64,
}

impl Limits {
    /// Takes a limit's own figure, ours and the peer's, if `plan` is one.
    pub fn learn(&mut self, plan: &Plan, seconds: f64, peer: &Peer) {
        if plan.against != Against::Limit {
            return;
        }
        for seconds in [Some(seconds), peer.of(plan)].into_iter().flatten() {
            match plan.amount {
                Amount::Flops(flops) => self.matmul = self.matmul.max(flops / seconds),
                Amount::Bytes(bytes) => self.copy = self.copy.max(bytes / seconds),
            }
        }
    }
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub op: &'static str,
    pub shape: String,
    pub seconds: f64,
    /// TFLOP/s or GB/s.
    pub rate: f64,
    pub unit: &'static str,
    /// The peer's rate by the same count, or the limit.
    pub against: Option<f64>,
    pub name: &'static str,
    /// Ours by theirs: above 1 is faster.
    pub ratio: Option<f64>,
    pub target: f64,
    /// Peak of device memory, in bytes.
    pub memory: usize,
}

impl Line {
    pub fn new(plan: &Plan, seconds: f64, memory: usize, limits: Limits, peer: &Peer) -> Line {
        let (amount, unit, size) = match plan.amount {
            Amount::Flops(flops) => (flops, "TFLOP/s", 1e12),
            Amount::Bytes(bytes) => (bytes, "GB/s", 1e9),
        };
        let known = |limit: f64| (limit > 0.0).then_some(limit / size);
        let (against, name) = match (plan.against, plan.amount) {
            (Against::Peer, _) => (peer.of(plan).map(|theirs| amount / theirs / size), "peer"),
            (Against::Matmul, _) => (known(limits.matmul), "matmul"),
            (Against::Copy, _) => (known(limits.copy), "copy"),
            (Against::Limit, Amount::Flops(_)) => (known(limits.matmul), "best"),
            (Against::Limit, Amount::Bytes(_)) => (known(limits.copy), "best"),
        };
        let rate = amount / seconds / size;
        let ratio = against.map(|against| rate / against);
        Line {
            op: plan.op,
            shape: plan.shape.clone(),
            seconds,
            rate,
            unit,
            against,
            name,
            ratio,
            target: plan.target,
            memory,
        }
    }

    /// Whether the aim is reached; `None` where nothing is there to compare with.
    pub fn met(&self) -> Option<bool> {
        self.ratio.map(|ratio| ratio >= self.target)
    }

    pub fn json(&self) -> Value {
        json!({
            "op": self.op, "shape": self.shape, "milliseconds": self.seconds * 1e3, "rate": self.rate, "unit": self.unit,
            "against": self.name, "against_rate": self.against, "ratio": self.ratio, "target": self.target,
            "met": self.met(), "peak_bytes": self.memory,
        })
    }

    pub fn text(&self) -> String {
        let Line { op, shape, seconds, rate, unit, name, target, .. } = self;
        let against = match self.against {
            Some(against) => format!("{name} {against:.0}"),
            None => format!("no {name} here"),
        };
        let ratio = self.ratio.map_or("-".to_string(), |ratio| format!("{ratio:.2}"));
        let met = match self.met() {
            Some(true) => "yes",
            Some(false) => "no",
            None => "-",
        };
        let (milliseconds, gib) = (seconds * 1e3, self.memory as f64 / f64::from(1 << 30));
        format!(
            "{op:<28}{shape:<38}{milliseconds:>11.3}{rate:>9.1} {unit:<8}{against:>15}{ratio:>7}{target:>8.2}  {met:<4}{gib:>8.1}"
        )
    }
}

pub fn head() -> String {
    format!(
        "{:<28}{:<38}{:>11}{:>9} {:<8}{:>15}{:>7}{:>8}  {:<4}{:>8}",
        "op", "shape", "ms", "ours", "", "against", "ratio", "target", "met", "GiB"
    )
}

/// The middle of several.
pub fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
