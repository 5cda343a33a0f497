//! What the engine costs where stages cost nothing: whole processes over manifests of 1,000 and 5,000
//! trivial cells.
//!
//!     cargo bench --bench cells
//!
//! `validate` reads and checks the manifest; the second `run` finds every cell fresh. Times are the
//! best and the median of several whole processes, and the best as a ratio to `true`, the cheapest
//! process there is. For the same graph of 1,000 no-op steps on a 2-core machine: ninja 8 ms, cargo
//! 360, turbo 450, snakemake 1,500, dvc 9,600.

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::Instant;

const PIPE: &str = env!("CARGO_BIN_EXE_pipe");
const ROUNDS: usize = 15;

fn main() {
    let folder = std::env::temp_dir().join(format!("pipe-bench-cells-{}", std::process::id()));
    println!("{:<34} {:>10} {:>10} {:>10}", "whole process", "best ms", "median ms", "x `true`");
    let floor = best_and_median(|| Command::new("true"));
    report("true", floor, floor);
    for cells in [1000, 5000] {
        let dir = folder.join(cells.to_string());
        std::fs::create_dir_all(&dir).expect("a folder for the bench");
        std::fs::write(dir.join("cells.toml"), text(cells)).expect("the manifest");
        let pipe = |verb: &str| {
            let mut command = Command::new(PIPE);
            command.current_dir(&dir).args([verb, "cells.toml"]);
            command
        };
        let first = Instant::now();
        assert!(quiet(pipe("run")).success(), "the first run failed");
        println!("{:<34} {:>10.1}", format!("run, {cells} cells, nothing there"), first.elapsed().as_secs_f64() * 1e3);
        for (name, verb) in [("validate", "validate"), ("run, all fresh", "run")] {
            report(&format!("{name}, {cells} cells"), best_and_median(|| pipe(verb)), floor);
        }
    }
    // What stays behind in the system's own temporary folder is the system's to sweep.
    let _ = std::fs::remove_dir_all(&folder);
}

/// Two layers: a writer per cell and a reader of each.
fn text(cells: usize) -> String {
    let mut values = String::new();
    for i in 0..cells / 2 {
        let _ = write!(values, "{}\"{i}\"", if i == 0 { "" } else { ", " });
    }
    format!(
        "manifest = 1\ntitle = \"trivial cells\"\n\n[stage.write]\nkind = \"command\"\naxes = {{ i = [{values}] }}\n\
         command = [\"echo\", \"{{i}}\"]\noutputs = [\"line.txt\"]\nstdout = \"line.txt\"\n\n\
         [stage.read]\nkind = \"command\"\nfrom = \"write\"\ncommand = [\"cat\", \"inputs/1/line.txt\"]\n\
         outputs = [\"line.txt\"]\nstdout = \"line.txt\"\n"
    )
}

fn quiet(mut command: Command) -> std::process::ExitStatus {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().expect("the process starts")
}

fn best_and_median(command: impl Fn() -> Command) -> (f64, f64) {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            assert!(quiet(command()).success());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[ROUNDS / 2])
}

fn report(name: &str, (best, median): (f64, f64), floor: (f64, f64)) {
    println!("{name:<34} {best:>10.1} {median:>10.1} {:>10.1}", best / floor.0);
}
