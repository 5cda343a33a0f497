//! Other test programs, run for a GPU and put in the table: every kernel's comparisons, and the goldens.

use crate::{Row, failed};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// One line per kernel, then one per golden test.
pub fn rows(meant: &dyn Fn(&str) -> bool) -> Vec<Row> {
    let mut rows = Vec::new();
    if meant("kernels") {
        rows.extend(kernels());
    }
    if meant("golden") {
        let started = Instant::now();
        match run("golden", None) {
            Ok(tests) => rows.extend(tests.into_iter().map(|(test, verdict)| Row {
                name: format!("tests/golden: {test}"),
                values: 1,
                difference: "-".into(),
                bound: "its own".into(),
                seconds: started.elapsed().as_secs_f64(),
                wrong: verdict.err(),
            })),
            Err(wrong) => rows.push(failed("tests/golden".into(), started, wrong)),
        }
    }
    rows
}

/// What the comparisons of one kernel's tests left.
#[derive(Default)]
struct Kernel {
    tests: usize,
    values: usize,
    /// Of the comparison that came nearest to its bound: difference and bound.
    nearest: Option<(f64, f64)>,
    wrong: Vec<String>,
}

fn kernels() -> Vec<Row> {
    let started = Instant::now();
    let notes = std::env::temp_dir().join(format!("pipe-comparisons-{}", std::process::id()));
    let tests = run("kernels", Some(&notes));
    let text = std::fs::read_to_string(&notes).unwrap_or_default();
    let _ = std::fs::remove_file(&notes);
    let tests = match tests {
        Ok(tests) => tests,
        Err(wrong) => return vec![failed("tests/kernels".into(), started, wrong)],
    };
    let mut kernels: BTreeMap<&str, Kernel> = BTreeMap::new();
    for (test, verdict) in &tests {
        let kernel = kernels.entry(test.split("::").next().unwrap_or(test)).or_default();
        kernel.tests += 1;
        kernel.wrong.extend(verdict.as_ref().err().map(|wrong| format!("{test}: {wrong}")));
    }
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [test, values, difference, bound] = fields[..] else { continue };
        let number = |field: &str| field.parse::<f64>().unwrap_or(f64::NAN);
        let Some(kernel) = kernels.get_mut(test.split("::").next().unwrap_or(test)) else { continue };
        kernel.values += number(values) as usize;
        let pair = (number(difference), number(bound));
        if kernel.nearest.is_none_or(|(difference, bound)| pair.0 / pair.1 > difference / bound) {
            kernel.nearest = Some(pair);
        }
    }
    let mut rows: Vec<Row> = kernels
        .into_iter()
        .map(|(name, kernel)| Row {
            name: format!("tests/kernels: {name} ({} tests)", kernel.tests),
            values: kernel.values,
            difference: kernel.nearest.map_or("-".into(), |(difference, _)| format!("{difference:.1e}")),
            bound: kernel.nearest.map_or("same bits".into(), |(_, bound)| format!("{bound:.1e}")),
            seconds: 0.0,
            wrong: (!kernel.wrong.is_empty()).then(|| kernel.wrong.join("; ")),
        })
        .collect();
    // They run side by side: one time for all.
    if let Some(last) = rows.last_mut() {
        last.seconds = started.elapsed().as_secs_f64();
    }
    rows
}

/// A test and what came of it.
type Verdict = (String, Result<(), String>);

/// Runs a test program as `cargo test` does: its tests, each with what came of it.
fn run(program: &str, notes: Option<&Path>) -> Result<Vec<Verdict>, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["test", "--test", program]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    if let Some(notes) = notes {
        command.env(crate::support::NOTES, notes);
    }
    let output = command.output().map_err(|error| format!("cargo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let tests = verdicts(&text);
    match tests.is_empty() {
        true => Err(format!("no test ran:\n{text}{}", String::from_utf8_lossy(&output.stderr))),
        // A program that dies, as by a signal, has not said so of a test.
        false if !output.status.success() && tests.iter().all(|(_, verdict)| verdict.is_ok()) => {
            Err(format!("it ended before its end ({}):\n{text}", output.status))
        }
        false => Ok(tests),
    }
}

/// Reads `test NAME ... ok`, and of what failed the words of its panic.
fn verdicts(text: &str) -> Vec<Verdict> {
    let results = text.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    let verdict = |(test, verdict): (&str, &str)| match verdict.split([' ', ',']).next() {
        Some("ok") => Some((test.to_string(), Ok(()))),
        Some("FAILED") => {
            let said = text.split(&format!("---- {test} stdout ----")).nth(1).unwrap_or("it failed");
            let said = said.split("\n----").next().unwrap_or(said).trim();
            Some((test.to_string(), Err(said.lines().take(6).collect::<Vec<_>>().join(" | "))))
        }
        _ => None,
    };
    results.filter_map(verdict).collect()
}
