//! What is run first where there is a GPU: does it do what the emulator says it does?
//!
//!     cargo test --release --test conformance                  # the emulator against the laws, no GPU asked
//!     PIPE_TEST_GPU=1 cargo test --release --test conformance  # the GPU against the emulator; then every kernel,
//!                                                              # the model, the goldens
//!
//! The emulator and the kernels were both written from the manual; a misreading that they share would pass every
//! other test. So each instruction is done three times on the same random bits: by the law in `instructions.rs`, by
//! the emulator, by the GPU. One table says what was compared, the largest difference and the bound. Those that only
//! compute capability 9.0 has are the emulator's as of such a device; on another GPU their lines say so.

mod instructions;
mod model;
mod prebuilt_table;
mod suites;
#[path = "../kernels/support.rs"]
mod support;

use instructions::{COMMON, Compared, HOPPER, Instruction};
use pipe::cuda::Gpu;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// A line of the table.
pub struct Row {
    pub name: String,
    pub values: usize,
    /// Largest difference and bound, with their unit, or that there is none.
    pub difference: String,
    pub bound: String,
    pub seconds: f64,
    /// What is wrong, if anything.
    pub wrong: Option<String>,
}

/// In place of a bound, where the GPU has no such instruction.
const NOT_THIS_GPU: &str = "not this GPU";

impl Row {
    fn of(name: String, started: Instant, compared: Compared) -> Row {
        let Compared { values, largest, bound, unit, wrong } = compared;
        let bound = if bound == 0.0 { "same bits".to_string() } else { format!("{bound:.1e} {unit}") };
        Row {
            name,
            values,
            difference: format!("{largest:.1e}"),
            bound,
            seconds: started.elapsed().as_secs_f64(),
            wrong,
        }
    }

    fn print(&self) {
        let Row { name, values, difference, bound, seconds, wrong } = self;
        let verdict = match wrong {
            Some(_) => "FAIL",
            None if bound == NOT_THIS_GPU => "-",
            None => "ok",
        };
        println!("{name:<66} {values:>9} {difference:>10} {bound:>18} {verdict:>5} {seconds:>7.2}");
    }
}

/// The words of a command line of `cargo test` that choose tests; `None` if none of ours is meant.
fn wanted() -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" | "--ignored" => return None,
            "--test-threads" | "--skip" | "--color" | "--format" | "--logfile" => _ = arguments.next(),
            option if option.starts_with('-') => {}
            word => words.push(word.to_string()),
        }
    }
    Some(words)
}

fn main() -> ExitCode {
    let Some(words) = wanted() else { return ExitCode::SUCCESS };
    let meant = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let device = support::on_device().then(|| match pipe::cuda::open_with(0, prebuilt_table::UNITS) {
        Ok(gpu) => gpu,
        Err(problem) => panic!("PIPE_TEST_GPU is set, and {problem}"),
    });
    let emulator = Gpu::exact(Box::new(support::PORTABLE));
    let emulated_hopper = Gpu::exact(Box::new(support::HOPPER));
    // Each instruction with the emulator, as of a device that has it, and whether every device does.
    let instructions: Vec<(&Instruction, &Gpu, bool)> = [(COMMON, &emulator, true), (HOPPER, &emulated_hopper, false)]
        .into_iter()
        .flat_map(|(some, emulator, everywhere)| some.iter().map(move |one| (one, emulator, everywhere)))
        .collect();

    println!("{:<66} {:>9} {:>10} {:>18} {:>5} {:>7}", "compared", "values", "largest", "bound", "", "seconds");
    let started = Instant::now();
    let mut rows: Vec<Row> = Vec::new();
    let mut put = |row: Row| {
        row.print();
        rows.push(row);
    };
    for (instruction, emulator, _) in &instructions {
        let name = format!("{}: emulator, law", instruction.name);
        if meant(&name) {
            put(emulator_against_law(instruction, emulator, name));
        }
    }
    let sources = [
        ("dev.cuh", "instructions.cu", include_str!("instructions.cu")),
        ("hopper.cuh", "instructions_hopper.cu", include_str!("instructions_hopper.cu")),
    ];
    for (header, file, kernels) in sources {
        let name = format!("every function of {header} is called");
        if meant(&name) {
            put(every_function_has_a_row(name, header, file, kernels));
        }
    }
    if meant("differences that are planted") {
        put(planted_differences_are_found());
    }
    if let Some(gpu) = &device {
        for (instruction, emulator, everywhere) in &instructions {
            let name = format!("{}: GPU, emulator", instruction.name);
            match meant(&name) {
                true if *everywhere || gpu.has_wgmma() => {
                    put(device_against_emulator(instruction, gpu, emulator, name))
                }
                true => put(not_this_gpu(name)),
                false => {}
            }
        }
    }
    for row in model::rows(device.as_ref().unwrap_or(&emulator), &meant) {
        put(row);
    }
    if device.is_some() {
        suites::rows(&meant).into_iter().for_each(&mut put);
    }

    match &device {
        Some(gpu) => println!("on {}; {:.1} s", gpu.driver().name(), started.elapsed().as_secs_f64()),
        None => println!("no GPU was asked (PIPE_TEST_GPU=1 asks); {:.1} s", started.elapsed().as_secs_f64()),
    }
    let wrong: Vec<&Row> = rows.iter().filter(|row| row.wrong.is_some()).collect();
    for row in &wrong {
        println!("FAIL {}: {}", row.name, row.wrong.as_deref().unwrap_or_default());
    }
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn emulator_against_law(instruction: &Instruction, emulator: &Gpu, name: String) -> Row {
    let started = Instant::now();
    let law = instruction.law();
    // On every schedule, for what depends on one is no instruction's doing.
    let mut worst: Option<Compared> = None;
    for schedule in [support::schedules(), vec![emulator::Schedule { detector: true, ..Default::default() }]].concat() {
        let compared = match emulator::with(schedule, || instruction.run(emulator, law.len())) {
            Ok(got) => instruction.compare(&got, &law),
            Err(problem) => return failed(name, started, format!("{schedule:?}: {problem}")),
        };
        if worst.as_ref().is_none_or(|worst| worst.wrong.is_none()) {
            worst = Some(compared);
        }
    }
    Row::of(name, started, worst.expect("there are schedules"))
}

fn device_against_emulator(instruction: &Instruction, gpu: &Gpu, emulator: &Gpu, name: String) -> Row {
    let started = Instant::now();
    let words = instruction.law().len();
    match (instruction.run(gpu, words), instruction.run(emulator, words)) {
        (Ok(got), Ok(want)) => Row::of(name, started, instruction.compare(&got, &want)),
        (Err(problem), _) | (_, Err(problem)) => failed(name, started, problem.to_string()),
    }
}

fn not_this_gpu(name: String) -> Row {
    Row { name, values: 0, difference: "-".into(), bound: NOT_THIS_GPU.into(), seconds: 0.0, wrong: None }
}

/// Each comparison, given its law with one word just beyond the bound, or NaN.
fn planted_differences_are_found() -> Row {
    let started = Instant::now();
    let mut missed = Vec::new();
    let mut values = 0;
    for instruction in COMMON.iter().chain(HOPPER) {
        let law = instruction.law();
        for (at, changed) in instruction.just_beyond(&law) {
            let mut got = law.clone();
            got[at] = changed;
            values += 1;
            if instruction.compare(&got, &law).wrong.is_none() {
                missed.push(format!("{}: word {at}, {changed:#x} instead of {:#x}", instruction.name, law[at]));
            }
        }
    }
    let (difference, seconds) = (missed.len().to_string(), started.elapsed().as_secs_f64());
    let wrong = (!missed.is_empty()).then(|| missed.join("; "));
    Row {
        name: "differences that are planted are found".into(),
        values,
        difference,
        bound: "all".into(),
        seconds,
        wrong,
    }
}

pub fn failed(name: String, started: Instant, wrong: String) -> Row {
    let nothing = || "-".to_string();
    let seconds = started.elapsed().as_secs_f64();
    Row { name, values: 0, difference: nothing(), bound: nothing(), seconds, wrong: Some(wrong) }
}

/// The functions that a header of `kernels/` defines for kernels.
fn functions(header: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(header);
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let heads = text.lines().filter_map(|line| Some(line.split_once("DEV ")?.1.split_once('(')?.0));
    let names = heads.filter_map(|head| head.rsplit([' ', '*', '&']).next());
    names.filter(|name| name.starts_with(|first: char| first.is_ascii_lowercase())).map(str::to_string).collect()
}

/// A function that nobody compares is one that a GPU may do in its own way.
fn every_function_has_a_row(name: String, header: &str, file: &str, kernels: &str) -> Row {
    let started = Instant::now();
    let called = |name: &String| [format!("{name}("), format!("{name}<")].iter().any(|call| kernels.contains(call));
    let (called, missing): (Vec<String>, Vec<String>) = functions(header).into_iter().partition(called);
    let wrong = match (called.len(), missing.len()) {
        (0, 0) => Some(format!("no function is found in kernels/{header}")),
        (_, 0) => None,
        _ => Some(format!("tests/conformance/{file} does not call {}", missing.join(", "))),
    };
    let (values, seconds) = (called.len() + missing.len(), started.elapsed().as_secs_f64());
    let difference = missing.len().to_string();
    Row { name, values, difference, bound: "all".into(), seconds, wrong }
}
