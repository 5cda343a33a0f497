//! `command`: runs a program over artifacts, the way out to another tool.
//!
//! The program sees a private folder and nothing of the store: the artifacts of `from` as links
//! below `inputs/1/`, `inputs/2/`, ... in the order written (numbers and not stage names, because a
//! name is no part of the fingerprint), the files named in `files` below `files/`, and an empty
//! `out/` in which it leaves exactly the files it declared. There is no shell, no standard input,
//! and an environment of `PATH`, `TMPDIR` and the variables named in `env`.
//!
//! The fingerprint knows the arguments, the inputs and `files`, not the program's own version: name
//! a version in the arguments, or ship the program through `files`, where that matters. A command
//! that was interrupted starts again from nothing.

use crate::manifest::spec::{ArtifactType, Broken, Key, Kind, Params, Type, no_lineage};
use crate::problem::{Exit, Problem};
use crate::stage::context::Context;
use crate::stage::kind::StageKind;

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Component, Path};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Every type of artifact can be handed out.
const ANY: &[ArtifactType] = &[
    ArtifactType::Model,
    ArtifactType::Dataset,
    ArtifactType::Measurements,
    ArtifactType::Scores,
    ArtifactType::Table,
    ArtifactType::Plot,
    ArtifactType::Verdict,
    ArtifactType::Files,
];

/// Its name and keys.
pub const KIND: Kind = Kind {
    name: "command",
    about: "run a program with declared inputs and outputs",
    recipe: 1,
    yields: ArtifactType::Files,
    keys: &[
        Key::required(
            "command",
            Type::List(&Type::Str),
            "Program and arguments, run as they stand: no shell. Paths are relative to the private folder (`inputs/1/data.jsonl`, `files/NAME`, `out/NAME`).",
        ),
        Key::optional(
            "from",
            Type::Refs(ANY),
            "Artifacts the program reads, linked below `inputs/1/`, `inputs/2/`, ... in this order.",
        ),
        Key::default(
            "files",
            Type::Map(&Type::Source(&["path"])),
            "{}",
            "Scripts and other files from outside, linked as `files/NAME`; their content is part of the fingerprint.",
        ),
        Key::required(
            "outputs",
            Type::List(&Type::Str),
            "Files the program leaves below `out/`: all of these and no others.",
        ),
        Key::optional("stdout", Type::Str, "The declared output that receives what the program prints."),
        Key::default(
            "env",
            Type::List(&Type::Str),
            "[]",
            "Names of environment variables passed on. Their values stay out of fingerprints, logs and messages.",
        )
        .no_result(),
        Key::optional(
            "timeout_s",
            Type::Int { min: 1, max: 31_536_000 },
            "Seconds after which the program is killed and the stage fails. Absent: no limit.",
        )
        .no_result(),
    ],
    floats: false,
    lineage: no_lineage,
    rules,
};

/// All that is said of it.
pub const STAGE: StageKind = StageKind { variables, ..StageKind::new(&KIND, run) };

fn variables(params: &Params) -> Vec<String> {
    crate::stage::context::read_params::<Spec>(KIND.name, params.clone()).map_or(Vec::new(), |spec| spec.env)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    command: Vec<String>,
    #[serde(default)]
    files: BTreeMap<String, String>,
    outputs: Vec<String>,
    stdout: Option<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout_s: Option<u64>,
}

fn rules(params: &Params) -> Vec<Broken> {
    let mut broken = Vec::new();
    let mut say =
        |key: &'static str, message: String, help: &str| broken.push(Broken { key, message, help: help.into() });
    let list = |key: &str| -> Vec<&str> {
        params.get(key).and_then(|v| v.as_array()).into_iter().flatten().filter_map(|v| v.as_str()).collect()
    };
    if list("command").first().is_none_or(|program| program.is_empty()) {
        say("command", "`command` names no program".into(), "`command = [\"python3\", \"files/score.py\"]`");
    }
    let outputs = list("outputs");
    if outputs.is_empty() {
        say("outputs", "`outputs` declares no file".into(), "name the files the program writes below `out/`");
    }
    let mut seen = BTreeSet::new();
    for name in &outputs {
        if !plain(name) {
            say("outputs", format!("`{name}` is not a plain relative file name"), "`outputs = [\"scores.csv\"]`");
        } else if !seen.insert(name) {
            say("outputs", format!("`{name}` is declared twice"), "remove one of the two");
        }
    }
    if let Some(stdout) = params.get("stdout").and_then(|v| v.as_str())
        && !outputs.contains(&stdout)
    {
        say("stdout", format!("`stdout` names `{stdout}`, which is not among `outputs`"), "add it to `outputs`");
    }
    for name in params.get("files").and_then(|v| v.as_object()).into_iter().flat_map(|map| map.keys()) {
        if !plain(name) || name.contains('/') {
            say(
                "files",
                format!("`{name}` is not a plain file name"),
                "`files = { \"score.py\" = \"path:score.py\" }`",
            );
        }
    }
    for name in list("env") {
        if name.is_empty() || name.contains(['=', '\0']) {
            say("env", format!("`{name}` is not the name of a variable"), "names only, never `NAME=value`");
        }
    }
    broken
}

/// Relative, with no `..`, `.`, root, empty or odd component.
fn plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Runs the program in a folder of its own. `Err` if it fails or leaves other files than it declared.
pub fn run(ctx: &Context) -> Result<(), Problem> {
    let spec: Spec = ctx.spec()?;
    let folder = std::path::absolute(ctx.work.join("run"))
        .map_err(|error| Problem::io("command::folder", "resolve", ctx.work, &error))?;
    prepare(ctx, &spec, &folder)?;
    let passed = environment(&spec)?;
    let output = |name: &str| -> Result<File, Problem> {
        let path = folder.join(name);
        File::create(&path).map_err(|error| Problem::io("command::folder", "create", &path, &error))
    };
    let stdout = match &spec.stdout {
        Some(name) => {
            make_parent(&folder.join("out").join(name))?;
            output(&format!("out/{name}"))?
        }
        None => output("stdout.log")?,
    };
    let Some((program, arguments)) = spec.command.split_first() else {
        return Err(Problem::new("command::empty", "`command` names no program"));
    };
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&folder).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("TMPDIR", folder.join("tmp"));
    command.envs(passed.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(stdout).stderr(output("stderr.log")?);
    // Its own group, so that whatever it starts can be stopped with it.
    command.process_group(0);
    let child = command.spawn().map_err(|error| cannot_start(program, &error))?;
    ctx.progress.note(program);
    let status = wait(ctx, child, spec.timeout_s).map_err(|problem| with_tail(problem, &folder, &passed))?;
    if !status.success() {
        let problem = Problem::new("command::failed", format!("`{program}` ended with {}", ended(status)));
        return Err(with_tail(problem, &folder, &passed));
    }
    collect(&folder.join("out"), &spec.outputs, ctx.out)
}

/// An empty private folder with links to all the program may read.
fn prepare(ctx: &Context, spec: &Spec, folder: &Path) -> Result<(), Problem> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).map_err(|error| Problem::io("command::folder", "empty", folder, &error))?;
    }
    for name in ["inputs", "files", "out", "tmp"] {
        let path = folder.join(name);
        std::fs::create_dir_all(&path).map_err(|error| Problem::io("command::folder", "create", &path, &error))?;
    }
    for (index, artifact) in ctx.inputs("from").iter().enumerate() {
        for (name, path) in artifact.files.iter() {
            link(path, &folder.join(format!("inputs/{}/{name}", index + 1)))?;
        }
    }
    for name in spec.files.keys() {
        let source = ctx.sources.get(&format!("files.{name}")).ok_or_else(|| {
            Problem::new("command::files", format!("`files.{name}` was not resolved to a file")).exit(Exit::Missing)
        })?;
        link(source, &folder.join("files").join(name))?;
    }
    Ok(())
}

fn link(target: &Path, at: &Path) -> Result<(), Problem> {
    make_parent(at)?;
    std::path::absolute(target)
        .and_then(|target| std::os::unix::fs::symlink(target, at))
        .map_err(|error| Problem::io("command::folder", "link", at, &error))
}

fn make_parent(path: &Path) -> Result<(), Problem> {
    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent).map_err(|error| Problem::io("command::folder", "create", parent, &error))
}

/// The variables named in `env`, with their values.
fn environment(spec: &Spec) -> Result<Vec<(String, String)>, Problem> {
    let value = |name: &String| match std::env::var(name) {
        Ok(value) => Ok((name.clone(), value)),
        Err(_) => Err(Problem::new("command::env", format!("the environment variable `{name}` is not set"))
            .note("`env` passes it to the program")
            .help(format!("`export {name}=...`, or take it out of `env`"))
            .exit(Exit::Missing)),
    };
    spec.env.iter().map(value).collect()
}

fn cannot_start(program: &str, error: &std::io::Error) -> Problem {
    let problem = Problem::new("command::start", format!("cannot start `{program}`: {error}"));
    match error.kind() {
        std::io::ErrorKind::NotFound => problem
            .help("install it, or name its full path; a relative path starts in the private folder")
            .exit(Exit::Missing),
        _ => problem,
    }
}

/// Waits, looking for the stop flag and the time limit; on either the whole group ends.
fn wait(ctx: &Context, mut child: Child, timeout_s: Option<u64>) -> Result<ExitStatus, Problem> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        let status =
            child.try_wait().map_err(|error| Problem::new("command::wait", format!("cannot wait: {error}")))?;
        if let Some(status) = status {
            // A helper left running could still write into `out/` while it is collected.
            signal(&child, libc::SIGKILL);
            return Ok(status);
        }
        if let Err(stopped) = ctx.stopped() {
            end(&mut child);
            return Err(stopped);
        }
        if let Some(limit) = timeout_s
            && started.elapsed() >= Duration::from_secs(limit)
        {
            end(&mut child);
            return Err(Problem::new("command::timeout", format!("the program was still running after {limit} s"))
                .help(format!("`timeout_s = {}`", limit.saturating_mul(2))));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Asks the group to end, waits two seconds, then kills it.
fn end(child: &mut Child) {
    signal(child, libc::SIGTERM);
    for _ in 0..40 {
        if matches!(child.try_wait(), Ok(Some(_))) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    signal(child, libc::SIGKILL);
    // The result is the caller's problem already; this only reaps.
    let _ = child.wait();
}

/// Sends a signal to the child's process group; a group that is gone is no error.
fn signal(child: &Child, signal: libc::c_int) {
    let Ok(group) = libc::pid_t::try_from(child.id()) else { return };
    // SAFETY: kill(2) touches no memory of ours. The child leads a group of its own id
    // (`process_group(0)`), and an id above 1 negated addresses that group only.
    unsafe {
        if group > 1 {
            libc::kill(-group, signal);
        }
    }
}

fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no exit code".into(),
    }
}

/// Adds the last lines the program wrote to stderr, values of passed variables blanked out.
fn with_tail(problem: Problem, folder: &Path, passed: &[(String, String)]) -> Problem {
    const TAIL: u64 = 4096;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(folder.join("stderr.log"))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        // A line cut in two may hold half a secret, which no replacement would find.
        let cut =
            if length > TAIL { bytes.iter().position(|&b| b == b'\n').map_or(bytes.len(), |at| at + 1) } else { 0 };
        Ok(String::from_utf8_lossy(&bytes[cut..]).into_owned())
    };
    let Ok(mut text) = read() else { return problem };
    // Longest first, so that a value inside another one does not leave a remainder.
    let mut secrets: Vec<_> = passed.iter().filter(|(_, value)| value.trim().len() >= 4).collect();
    secrets.sort_by_key(|(_, value)| std::cmp::Reverse(value.len()));
    for (name, value) in secrets {
        text = text.replace(value.as_str(), &format!("<{name}>"));
    }
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(20)..].join("\n");
    if last.trim().is_empty() {
        return problem.note("it wrote nothing to stderr");
    }
    problem.note(format!("the end of its stderr:\n{last}"))
}

/// Moves the declared files to `to`; missing, additional and odd ones are errors.
fn collect(from: &Path, declared: &[String], to: &Path) -> Result<(), Problem> {
    let mut found = BTreeSet::new();
    let mut open = vec![(from.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = open.pop() {
        let entries = std::fs::read_dir(&folder)
            .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
            .map_err(|error| Problem::io("command::outputs", "list", &folder, &error))?;
        for entry in entries {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let kind =
                entry.file_type().map_err(|error| Problem::io("command::outputs", "look at", &folder, &error))?;
            if kind.is_dir() {
                open.push((entry.path(), format!("{name}/")));
            } else if kind.is_file() {
                found.insert(name);
            } else {
                return Err(Problem::new("command::outputs", format!("`out/{name}` is not an ordinary file"))
                    .help("let the program write the file itself, not a link to it"));
            }
        }
    }
    let missing: Vec<&String> = declared.iter().filter(|name| !found.contains(*name)).collect();
    let extra: Vec<&String> = found.iter().filter(|name| !declared.contains(name)).collect();
    if !missing.is_empty() || !extra.is_empty() {
        let names = |list: &[&String]| list.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
        let mut problem = Problem::new("command::outputs", "the program did not leave the files it declared");
        if !missing.is_empty() {
            problem = problem.note(format!("missing below `out/`: {}", names(&missing)));
        }
        if !extra.is_empty() {
            problem = problem.note(format!("not declared: {}", names(&extra)));
        }
        return Err(problem.help("make `outputs` and what the program writes agree"));
    }
    for name in declared {
        let (source, target) = (from.join(name), to.join(name));
        make_parent(&target)?;
        if std::fs::rename(&source, &target).is_err() {
            std::fs::copy(&source, &target)
                .map_err(|error| Problem::io("command::outputs", "copy", &source, &error))?;
        }
    }
    Ok(())
}
