//! Compiles the runtime, and each kernel once plain, once instrumented, once more per planted fault.
//!
//! A fault is a macro whose name begins with `FAULT_` and which the kernel's text mentions. Objects that are
//! newer than all they are made of are kept.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

/// One call of the compiler.
struct Job {
    source: PathBuf,
    object: PathBuf,
    flags: Vec<String>,
    /// A file with this text is compiled in the source's stead.
    wrapper: Option<String>,
}

fn files_in(folder: &Path, ends: &[&str]) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| ends.iter().any(|end| path.to_string_lossy().ends_with(end)));
    files.sort();
    files
}

/// A kernel's text, with those of the headers of `device` it includes, once each.
fn whole_text(source: &Path, device: &Path, seen: &mut BTreeSet<PathBuf>) -> String {
    let mut text = fs::read_to_string(source).expect("a kernel's text");
    let lines: Vec<String> = text.lines().map(str::to_string).collect();
    for name in lines.iter().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next()) {
        let header = device.join(name);
        if header.exists() && seen.insert(header.clone()) {
            text += &whole_text(&header, device, seen);
        }
    }
    text
}

/// The faults a kernel's text knows, without `FAULT_`.
fn faults(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for rest in text.split("FAULT_").skip(1) {
        let name: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        if !name.is_empty() {
            found.insert(name);
        }
    }
    found
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}

/// The kernel in a namespace of its own, so that no variant's function is taken for another's.
fn wrapper(source: &Path, namespace: &str, fault: &str, instrumented: bool) -> String {
    let planted = if fault.is_empty() { String::new() } else { format!("#define FAULT_{fault} 1\n") };
    format!(
        "#include \"hopper.hpp\"\n\
         #define EMULATOR_FAULT \"{fault}\"\n\
         #define EMULATOR_DETECTOR {instrumented}\n\
         {planted}\
         namespace {namespace} {{\n\
         #include \"{}\"\n\
         }}\n",
        source.display()
    )
}

fn jobs(root: &Path, out: &Path, device: &Path, kernels: &[PathBuf]) -> Vec<Job> {
    let strings = |list: &[&str]| -> Vec<String> { list.iter().map(|flag| flag.to_string()).collect() };
    let mut jobs: Vec<Job> = files_in(&root.join("runtime"), &[".cpp"])
        .into_iter()
        .map(|source| {
            let stem = source.file_stem().expect("stem").to_string_lossy().into_owned();
            Job { object: out.join(format!("{stem}.o")), source, flags: strings(&["-O3"]), wrapper: None }
        })
        .collect();
    for source in kernels {
        let text = whole_text(source, device, &mut BTreeSet::new());
        let stem = source.file_stem().expect("stem").to_string_lossy().into_owned();
        // A faulty kernel is slow enough to be instrumented always: the detector is then on or off at run time.
        let mut variants = vec![(String::new(), false), (String::new(), true)];
        variants.extend(faults(&text).into_iter().map(|fault| (fault, true)));
        for (fault, instrumented) in variants {
            let suffix = match (fault.as_str(), instrumented) {
                ("", false) => "plain".to_string(),
                ("", true) => "watched".to_string(),
                (fault, _) => format!("fault_{fault}"),
            };
            let namespace = format!("kernel_{stem}_{suffix}");
            jobs.push(Job {
                source: source.clone(),
                object: out.join(format!("{namespace}.o")),
                // `__syncthreads` or a shuffle must stay one place in the code, as on the device: no pass may
                // copy one into two branches, nor make one of two. Contraction would depend on the CPU.
                flags: strings(&[
                    "-O2",
                    "-fno-thread-jumps",
                    "-fno-split-paths",
                    "-fno-crossjumping",
                    "-fno-tree-tail-merge",
                    "-fno-optimize-sibling-calls",
                    // A stack too small is met at its guard page, not behind it.
                    "-fstack-clash-protection",
                    if instrumented { "-fsanitize=thread" } else { "-fno-sanitize=thread" },
                    // What is wrong with a faulty kernel is known.
                    if fault.is_empty() { "-Wall" } else { "-w" },
                ]),
                wrapper: Some(wrapper(source, &namespace, &fault, instrumented)),
            });
        }
    }
    jobs
}

fn compile(job: &Job, compiler: &cc::Tool, headers: &[PathBuf], root: &Path, newest_rule: Option<SystemTime>) -> bool {
    let mut source = job.source.clone();
    if let Some(text) = &job.wrapper {
        source = job.object.with_extension("cpp");
        if fs::read_to_string(&source).ok().as_ref() != Some(text) {
            fs::write(&source, text).expect("the wrapper");
        }
    }
    let newest =
        headers.iter().chain([&job.source, &source]).filter_map(|path| modified(path)).chain(newest_rule).max();
    if modified(&job.object).is_some_and(|made| Some(made) > newest) {
        return true;
    }
    let mut command = compiler.to_command();
    command.args(&job.flags).arg("-I").arg(root.join("runtime")).arg("-I").arg(root.join("../../kernels"));
    command.arg("-c").arg(&source).arg("-o").arg(&job.object);
    let begun = SystemTime::now();
    let output = command.output().expect("the C++ compiler starts");
    if !output.status.success() {
        // Half an object would look newer than its source.
        let _ = fs::remove_file(&job.object);
        eprintln!("{} does not compile:\n{}", job.source.display(), String::from_utf8_lossy(&output.stderr));
        return false;
    }
    // A source saved while the compiler ran is newer than what was made of it.
    fs::File::options().append(true).open(&job.object).and_then(|file| file.set_modified(begun)).expect("the object");
    let said = String::from_utf8_lossy(&output.stderr);
    for line in said.lines().filter(|line| line.contains("warning:")) {
        println!("cargo:warning={line}");
    }
    true
}

fn main() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo"));
    let device = fs::canonicalize(root.join("../../kernels")).expect("kernels/");
    println!("cargo:rerun-if-env-changed=KERNELS");
    // Kernels of tests, and of tests alone.
    let others = [root.join("planted"), root.join("../conformance")];
    for watched in others.iter().chain([&device, &root.join("runtime"), &root.join("build.rs")]) {
        println!("cargo:rerun-if-changed={}", watched.display());
    }

    let mut kernels = files_in(&device, &[".cu"]);
    kernels.extend(others.iter().flat_map(|folder| files_in(folder, &[".cu"])));
    if let Ok(wanted) = std::env::var("KERNELS")
        && !wanted.is_empty()
    {
        let wanted: Vec<&str> = wanted.split(',').map(str::trim).collect();
        kernels.retain(|path| wanted.iter().any(|stem| path.file_stem().is_some_and(|s| s == *stem)));
    }
    let mut headers = files_in(&device, &[".cuh"]);
    headers.extend(files_in(&root.join("runtime"), &[".hpp"]));

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").no_default_flags(true).cpp_link_stdlib("stdc++");
    for flag in ["-g", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi"] {
        build.flag(flag);
    }
    for harmless in ["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-parameter"] {
        build.flag(harmless);
    }
    let compiler = build.get_compiler();
    let newest_rule = modified(&root.join("build.rs"));

    let jobs = jobs(&root, &out, &device, &kernels);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let workers = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    std::thread::scope(|scope| {
        for _ in 0..workers.min(jobs.len()) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !compile(job, &compiler, &headers, &root, newest_rule) {
                        failed.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    if failed.into_inner() {
        std::process::exit(1);
    }

    // The archive is made anew: `ar` would keep the objects of kernels that are gone.
    let archive = out.join("libemulated_kernels.a");
    let _ = fs::remove_file(&archive);
    let mut library = cc::Build::new();
    library.cpp(true);
    for job in &jobs {
        library.object(&job.object);
    }
    // Nothing names the kernels: their constructors do.
    library.link_lib_modifier("+whole-archive").compile("emulated_kernels");
}
