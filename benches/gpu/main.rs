//! Every kernel that matters on a GPU, a training step and decoding, beside PyTorch where it is installed and against
//! what the device can do at most.
//!
//!     cargo bench --bench gpu                      # the table
//!     cargo bench --bench gpu -- --json            # a JSON line each, the machine first
//!     cargo bench --bench gpu -- attention RoPE    # ops whose names have one of these words (limits always)
//!
//! Times are the device's own, between two events in its queue; medians after runs that are not counted. Counts of
//! operations: attention 4 T² D for each head, half of it if causal, 2.5 times as much backward; products 2 m n k. Bytes
//! are those that have to be read and written once. Without a GPU nothing is measured, and that is said.

mod ops;
mod table;

use ops::{Against, Plan, Sizes};
use pipe::cuda::Gpu;
use pipe::problem::Problem;
use serde_json::json;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;
use table::{Limits, Line, Peer, median};

/// Runs that are not counted, at least so many that are, and at most.
const WARM_UP: usize = 3;
const FEWEST: usize = 3;
const MOST: usize = 50;
/// No more runs of an op once it has had so many seconds.
const ENOUGH_SECONDS: f64 = 2.0;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let as_json = arguments.iter().any(|argument| argument == "--json");
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let gpu = match pipe::cuda::open(0) {
        Ok(gpu) => gpu,
        Err(problem) => return println!("nothing is measured: {}", problem.message),
    };
    let plans: Vec<Plan> = ops::plans(&Sizes::of_a_gpu())
        .into_iter()
        .filter(|plan| {
            let limit = plan.against == Against::Limit;
            limit || words.is_empty() || words.iter().any(|word| plan.op.contains(word.as_str()))
        })
        .collect();
    let peer = ask_peer(&plans);
    let machine = json!({
        "device": gpu.driver().name(), "driver": driver(), "date": said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        "commit": said("git", &["describe", "--always", "--dirty"]), "peer": peer.name,
    });
    match as_json {
        true => println!("{machine}"),
        false => {
            let field = |key: &str| machine[key].as_str().unwrap_or("?").to_string();
            println!("{}, driver {}, {}, commit {}", field("device"), field("driver"), field("date"), field("commit"));
            println!("peer: {}\n{}", field("peer"), table::head());
        }
    }
    let mut limits = Limits::default();
    for plan in &plans {
        match measured(&gpu, plan) {
            Ok((seconds, memory)) => {
                limits.learn(plan, seconds, &peer);
                let line = Line::new(plan, seconds, memory, limits, &peer);
                if as_json { println!("{}", line.json()) } else { println!("{}", line.text()) }
            }
            // What does not fit this device does not keep the rest from being measured.
            Err(problem) if as_json => {
                println!("{}", json!({ "op": plan.op, "shape": plan.shape, "error": problem.message }))
            }
            Err(problem) => println!("{:<28}{:<38}{problem}", plan.op, plan.shape),
        }
    }
}

/// The median seconds of an op, and the most memory there was while it ran, by a device of its own so that nothing is
/// left of the op before.
fn measured(gpu: &Gpu, plan: &Plan) -> Result<(f64, usize), Problem> {
    gpu.driver().synchronize()?;
    let own = pipe::cuda::open(0)?;
    let mut run = (plan.make)(&own)?;
    let started = Instant::now();
    for _ in 0..WARM_UP {
        run()?;
        if started.elapsed().as_secs_f64() > ENOUGH_SECONDS {
            break;
        }
    }
    let started = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < FEWEST || seconds.len() < MOST && started.elapsed().as_secs_f64() < ENOUGH_SECONDS {
        seconds.push(run()?);
    }
    Ok((median(seconds), own.usage().peak))
}

/// Has `peer.py` measure the same shapes on the same device, before us.
fn ask_peer(plans: &[Plan]) -> Peer {
    let none = |why: String| Peer { name: format!("no peer here: {why}"), ..Peer::default() };
    let wanted: Vec<_> = plans.iter().map(|plan| json!({ "op": plan.op, "shape": plan.shape })).collect();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gpu/peer.py");
    let child = Command::new("python3").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return none(format!("python3: {error}")),
    };
    // A script that ends at once, as without PyTorch, has said why.
    let _ = child.stdin.take().expect("piped").write_all(json!(wanted).to_string().as_bytes());
    let output = match child.wait_with_output() {
        Ok(output) => output,
        Err(error) => return none(error.to_string()),
    };
    let peer = Peer::read(&String::from_utf8_lossy(&output.stdout));
    if peer.name.is_empty() { none(format!("peer.py ended with {}", output.status)) } else { peer }
}

/// The version of NVIDIA's kernel module.
fn driver() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let version =
        text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'));
    version.unwrap_or("?").to_string()
}

/// What a program prints, in one line.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output.map_or("?".to_string(), |output| String::from_utf8_lossy(&output.stdout).trim().to_string())
}
