//! `cargo xtask kernels`: compiles the kernels of `kernels/` for every GPU we ship for, and those of
//! `tests/conformance/`, which are for its test alone.
//!
//!     cargo xtask kernels              compiles what changed, writes prebuilt/ beside the kernels and its table
//!     cargo xtask kernels --check      compiles everything, compares, and looks at the result; writes nothing
//!     cargo xtask kernels --report     what the compiled kernels take and are made of; compiles nothing
//!
//! Needs no GPU and no CUDA: only Linux on x86-64 or ARM, and Python's pip once, for NVIDIA's compiler.

mod check;
mod compile;
#[path = "../../src/cuda/nvrtc.rs"]
mod nvrtc;
mod prebuilt;
mod report;
mod tools;
#[path = "../../src/cuda/units.rs"]
mod units;

use check::Tools;
use compile::{Compiled, Resources};
use nvrtc::Nvrtc;
use prebuilt::{Entry, Made, Prebuilt};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use units::Unit;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let root = std::env::current_dir().expect("a current folder");
    let done = match arguments.as_slice() {
        ["kernels"] => for_each_set(&root, generate),
        ["kernels", "--check"] => for_each_set(&root, verify),
        ["kernels", "--report"] => report(&root),
        _ => {
            eprintln!("usage: cargo xtask kernels [--check | --report]");
            return ExitCode::from(2);
        }
    };
    let Err(problems) = done else { return ExitCode::SUCCESS };
    for problem in &problems {
        eprintln!("error: {problem}");
    }
    eprintln!("{} {}", problems.len(), if problems.len() == 1 { "problem" } else { "problems" });
    ExitCode::FAILURE
}

type Done = Result<(), Vec<String>>;

/// A unit and one of its architectures.
type Job<'u> = (&'u Unit, &'u str);

/// Both sets, though there be problems in the first.
fn for_each_set(root: &Path, work: fn(&Path, &Prebuilt) -> Done) -> Done {
    let results = Prebuilt::all(root).map(|set| work(root, &set));
    let problems: Vec<String> = results.into_iter().filter_map(Result::err).flatten().collect();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn generate(root: &Path, prebuilt: &Prebuilt) -> Done {
    let started = Instant::now();
    let units = units::read(&prebuilt.sources, &root.join("kernels"))?;
    let old = prebuilt.made();
    let fresh = |(unit, arch): &Job| {
        let entry = old.get(&unit.name).and_then(|archs| archs.get(*arch));
        entry.is_some_and(|entry| entry.fingerprint == unit.fingerprint(arch)) && prebuilt.has(&unit.blob(arch))
    };
    let (kept, jobs): (Vec<Job>, Vec<Job>) = all_jobs(&units).into_iter().partition(fresh);
    let mut problems = Vec::new();
    let mut made = Made::new();
    let mut put =
        |(unit, arch): Job, entry: Entry| made.entry(unit.name.clone()).or_default().insert(arch.to_string(), entry);
    for (unit, arch) in &kept {
        put((unit, arch), old[&unit.name][*arch].clone());
    }
    let changed = jobs.len();
    if !jobs.is_empty() {
        let nvrtc = open(root)?;
        for (job, result) in compile_all(&nvrtc, jobs) {
            let (unit, arch) = job;
            let written = result.and_then(|compiled| {
                prebuilt.write_blob(&unit.blob(arch), &compiled.bytes)?;
                Ok(Entry::new(unit, arch, &compiled))
            });
            match written {
                Ok(entry) => _ = put(job, entry),
                Err(error) => {
                    refused(&mut problems, job, &error);
                    // What was there stays, under the fingerprint it was made from.
                    if let Some(entry) = old.get(&unit.name).and_then(|archs| archs.get(arch)) {
                        put(job, entry.clone());
                    }
                }
            }
        }
    }
    problems.extend(clashes(&made));
    for stray in prebuilt.strays(&units) {
        println!("removed {stray}");
        problems.extend(prebuilt.remove(&stray).err());
    }
    problems.extend(prebuilt.write(&units, &made).err());
    tell(&units, &made, prebuilt);
    println!("{changed} compiled, {} unchanged, {:.1} s", kept.len(), started.elapsed().as_secs_f32());
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn verify(root: &Path, prebuilt: &Prebuilt) -> Done {
    let started = Instant::now();
    let units = units::read(&prebuilt.sources, &root.join("kernels"))?;
    let nvrtc = open(root)?;
    let tools = Tools {
        ptxas: optional("whether older drivers take the PTX", tools::ptxas(root)),
        nvdisasm: optional("for the instructions that kernels/manifest.toml expects", tools::nvdisasm(root)),
    };
    let scratch = Scratch::new()?;
    let mut problems = Vec::new();
    let mut made = Made::new();
    for ((unit, arch), result) in compile_all(&nvrtc, all_jobs(&units)) {
        let compiled = match result {
            Ok(compiled) => compiled,
            Err(error) => {
                refused(&mut problems, (unit, arch), &error);
                continue;
            }
        };
        problems.extend(check::problems(&tools, &scratch.0, unit, arch, &compiled));
        match prebuilt.blob(&unit.blob(arch)) {
            Ok(bytes) if bytes == compiled.bytes => {}
            Ok(_) => problems.push(format!("{} is not what {} gives", unit.blob(arch), unit.file)),
            Err(error) => problems.push(error),
        }
        made.entry(unit.name.clone()).or_default().insert(arch.to_string(), Entry::new(unit, arch, &compiled));
    }
    problems.extend(clashes(&made));
    problems.extend(
        prebuilt.strays(&units).into_iter().map(|stray| format!("{}/{stray} has no kernel", prebuilt.folder.display())),
    );
    problems.extend(prebuilt.compare(&units, &made));
    tell(&units, &made, prebuilt);
    println!("{} compiled and compared, {:.1} s", all_jobs(&units).len(), started.elapsed().as_secs_f32());
    if problems.is_empty() {
        return Ok(());
    }
    eprintln!("after `cargo xtask kernels`, what is still named here is to be mended in the kernels:");
    Err(problems)
}

/// Of what is committed and embedded.
fn report(root: &Path) -> Done {
    let [ours, _] = Prebuilt::all(root);
    let units = units::read(&ours.sources, &ours.sources)?;
    let scratch = Scratch::new()?;
    let told = tools::nvdisasm(root)
        .and_then(|nvdisasm| report::report(&units, &ours.made(), &ours, &nvdisasm, &scratch.0))
        .map_err(|error| vec![error])?;
    print!("{told}");
    Ok(())
}

/// The compiler, which must be of the pinned version.
fn open(root: &Path) -> Result<Nvrtc, Vec<String>> {
    let open = || {
        let folder = tools::nvrtc(root)?;
        let nvrtc = Nvrtc::open(&folder)?;
        match nvrtc.version()? {
            version if version == units::NVRTC_VERSION => Ok(nvrtc),
            version => Err(format!("{} has NVRTC {version}, not {}", folder.display(), units::NVRTC_VERSION)),
        }
    };
    open().map_err(|error: String| vec![error])
}

fn optional(what: &str, tool: Result<PathBuf, String>) -> Option<PathBuf> {
    tool.map_err(|error| eprintln!("note: not looked at: {what}: {error}")).ok()
}

fn all_jobs(units: &[Unit]) -> Vec<Job<'_>> {
    units.iter().flat_map(|unit| unit.archs.iter().map(move |arch| (unit, arch.as_str()))).collect()
}

/// Compiles on all cores; the results come in the order of the jobs.
fn compile_all<'u>(nvrtc: &Nvrtc, jobs: Vec<Job<'u>>) -> Vec<(Job<'u>, Result<Compiled, String>)> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let work = || {
        while let Some((at, (unit, arch))) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, *jobs.get(at)?)))
        {
            let result = compile::compile(nvrtc, unit, arch);
            results.lock().expect("no panic while held").insert(at, result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len()) {
            scope.spawn(work);
        }
    });
    let results = results.into_inner().expect("no panic while held");
    let done: Vec<_> = jobs.iter().copied().zip(results.into_values()).collect();
    for ((unit, arch), compiled) in done.iter().filter_map(|(job, result)| Some((job, result.as_ref().ok()?))) {
        if !compiled.warnings.is_empty() {
            eprintln!("{}, {arch}:\n{}", unit.name, compiled.warnings);
        }
    }
    done
}

/// A mistake in a source shows for every architecture; it is told for the first.
fn refused(problems: &mut Vec<String>, (unit, arch): Job, error: &str) {
    let (start, end) = (format!("{}, ", unit.name), format!(": {error}"));
    if !problems.iter().any(|problem| problem.starts_with(&start) && problem.ends_with(&end)) {
        problems.push(format!("{start}{arch}{end}"));
    }
}

/// A kernel is found by its name alone: no two units may have the same, and an architecture may lack none.
fn clashes(made: &Made) -> Vec<String> {
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (unit, archs) in made {
        let Some(first) = archs.values().next() else { continue };
        for (arch, entry) in archs.iter().filter(|(_, entry)| !entry.kernels.keys().eq(first.kernels.keys())) {
            let names: Vec<&String> = entry.kernels.keys().collect();
            wrong.push(format!("{unit}, {arch}: its kernels are {names:?}, other architectures have others"));
        }
        for kernel in first.kernels.keys() {
            if let Some(other) = owners.insert(kernel, unit) {
                wrong.push(format!("kernel `{kernel}` is in {other} and in {unit}"));
            }
        }
    }
    wrong
}

/// One line for each kernel: registers per architecture, and the sizes of its unit.
fn tell(units: &[Unit], made: &Made, prebuilt: &Prebuilt) {
    let mut total = (0, 0);
    for unit in units {
        let Some(archs) = made.get(&unit.name) else { continue };
        let plain: usize = archs.values().map(|entry| entry.bytes).sum();
        let packed: u64 = archs.keys().map(|arch| prebuilt.packed_bytes(&unit.blob(arch))).sum();
        total = (total.0 + plain, total.1 + packed);
        println!("{} ({plain} bytes, packed {packed})", unit.name);
        let Some(first) = archs.values().next() else { continue };
        for kernel in first.kernels.keys() {
            let taken = |arch: &String| {
                let Resources { registers, spills, stack, .. } = *archs.get(arch)?.kernels.get(kernel)?;
                let extra = match (spills, stack) {
                    (0, 0) => String::new(),
                    _ => format!(" ({spills} spilled, {stack} on the stack)"),
                };
                (registers > 0).then(|| format!("{arch} {registers}{extra}"))
            };
            println!(
                "  {kernel:<40} registers: {}",
                unit.archs.iter().filter_map(taken).collect::<Vec<_>>().join(", ")
            );
        }
    }
    println!("{} bytes, packed {}", total.0, total.1);
}

/// A folder that goes away with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch, Vec<String>> {
        let folder = std::env::temp_dir().join(format!("xtask-kernels-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|error| vec![format!("{}: {error}", folder.display())])?;
        Ok(Scratch(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
