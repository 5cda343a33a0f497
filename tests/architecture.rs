//! House rules as tests: the arrows between modules, what may be named where, and that the
//! project speaks of itself alone.

#[path = "architecture/circles.rs"]
mod circles;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module -> the modules it may name. Reviewed in ARCHITECTURE.md whenever an arrow changes.
const ARROWS: &[(&str, &[&str])] = &[
    ("problem", &[]),
    ("progress", &[]),
    ("files", &[]),
    ("digest", &[]),
    ("random", &["digest"]),
    ("grade", &[]),
    ("measure", &[]),
    ("manifest", &["problem"]),
    ("plan", &["manifest", "digest", "problem"]),
    ("store", &["digest", "files", "problem"]),
    ("hub", &["digest", "files", "problem"]),
    ("data", &["digest", "files", "problem", "random"]),
    ("remote", &["digest", "problem", "random"]),
    ("tensor", &["random"]),
    ("cuda", &["problem"]),
    ("safetensors", &["files", "problem"]),
    ("model", &["cuda", "files", "measure", "problem", "random", "safetensors", "tensor"]),
    ("generation", &["cuda", "model", "problem", "random", "tensor"]),
    ("train", &["cuda", "digest", "files", "model", "problem", "random", "tensor"]),
    ("serve", &["data", "generation", "model", "problem", "random"]),
    (
        "stage",
        &[
            "data",
            "digest",
            "files",
            "generation",
            "grade",
            "manifest",
            "model",
            "plan",
            "problem",
            "progress",
            "random",
            "remote",
            "safetensors",
            "tensor",
            "train",
        ],
    ),
    ("exec", &["digest", "files", "manifest", "measure", "plan", "problem", "progress", "store"]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(dir: &Path, ends: &[&str], into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_below(&path, ends, into);
        } else if ends.iter().any(|end| path.to_string_lossy().ends_with(end)) {
            into.push(path);
        }
    }
    into.sort();
}

/// The library module a file belongs to; `None` for the binary, which may see everything.
fn module_of(path: &Path) -> Option<String> {
    let inside = path.strip_prefix(root().join("src")).ok()?;
    let first = inside.components().next()?.as_os_str().to_string_lossy().into_owned();
    let name = first.trim_end_matches(".rs").to_string();
    (!["main", "lib", "cli", "report"].contains(&name.as_str())).then_some(name)
}

/// `crate::NAME` outside comments, with line numbers.
fn named_modules(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for part in code.split("crate::").skip(1) {
            let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !name.is_empty() {
                found.push((number + 1, name));
            }
        }
    }
    found
}

#[test]
fn modules_name_only_those_they_may() {
    let arrows: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut sources = Vec::new();
    files_below(&root().join("src"), &[".rs"], &mut sources);
    assert!(sources.len() > 20, "found only {} sources", sources.len());
    let mut wrong = Vec::new();
    for path in sources {
        let Some(module) = module_of(&path) else { continue };
        let Some(allowed) = arrows.get(module.as_str()) else {
            wrong.push(format!("{}: module `{module}` is not in the list of arrows", path.display()));
            continue;
        };
        for (line, name) in named_modules(&fs::read_to_string(&path).expect("source")) {
            if name != module && !allowed.contains(&name.as_str()) {
                wrong.push(format!("{}:{line}: `{module}` -> `{name}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows that are not drawn:\n{}", wrong.join("\n"));
}

#[test]
fn the_arrows_form_no_circle() {
    let arrows: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut done: Vec<&str> = Vec::new();
    while done.len() < arrows.len() {
        let next = arrows
            .iter()
            .find(|(module, needs)| !done.contains(*module) && needs.iter().all(|need| done.contains(need)));
        done.push(next.expect("a circle among the modules that are left").0);
    }
}

#[test]
fn no_file_is_in_a_circle() {
    let mut paths = Vec::new();
    files_below(&root().join("src"), &[".rs"], &mut paths);
    let below = |path: &PathBuf| path.strip_prefix(root()).expect("below the root").to_path_buf();
    let sources = paths.iter().map(|path| (below(path), fs::read_to_string(path).expect("source"))).collect();
    let circles = circles::circles(&sources, "pipe");
    let wrong: Vec<String> = circles.iter().map(circles::Circle::told).collect();
    assert!(wrong.is_empty(), "files that name each other in a circle:\n{}", wrong.join("\n"));
}

#[test]
fn a_planted_arrow_is_found() {
    let text = "use crate::store::Store; // crate::exec in a comment is fine\n";
    assert_eq!(named_modules(text), [(1, "store".to_string())]);
}

#[test]
fn the_library_prints_nothing_and_leaves_nothing_undone() {
    let mut sources = Vec::new();
    files_below(&root().join("src"), &[".rs"], &mut sources);
    let mut wrong = Vec::new();
    for path in sources {
        let in_library = module_of(&path).is_some();
        for (number, line) in fs::read_to_string(&path).expect("source").lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            let stub = ["todo!(", "unimplemented!(", "dbg!("].iter().any(|bad| code.contains(bad));
            let print = in_library && ["println!(", "eprintln!(", "print!("].iter().any(|bad| code.contains(bad));
            if stub || print {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "stubs, or output from the library:\n{}", wrong.join("\n"));
}

#[test]
fn every_op_has_a_reference_and_a_test_against_it() {
    let mut ops = Vec::new();
    files_below(&root().join("src/tensor/ops"), &[".rs"], &mut ops);
    let mut tests = Vec::new();
    files_below(&root().join("tests/tensor"), &[".rs"], &mut tests);
    let tests: String = tests.iter().map(|path| fs::read_to_string(path).expect("test")).collect();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for path in ops {
        let stem = path.file_stem().expect("stem").to_string_lossy().into_owned();
        if stem == "mod" {
            continue;
        }
        seen += 1;
        let text = fs::read_to_string(&path).expect("op");
        if !text.contains("mod reference") {
            wrong.push(format!("{stem}: no reference implementation beside it"));
        }
        if !tests.contains(&format!("{stem}::reference")) {
            wrong.push(format!("{stem}: nothing in tests/tensor compares it with {stem}::reference"));
        }
    }
    assert!(seen >= 6, "only {seen} ops found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_kernel_has_a_launcher_a_test_and_its_section() {
    let mut kernels = Vec::new();
    files_below(&root().join("kernels"), &[".cu"], &mut kernels);
    let rows = fs::read_to_string(root().join("kernels/README.md")).expect("kernels/README.md");
    let mut wrong = Vec::new();
    for path in kernels {
        let stem = path.file_stem().expect("stem").to_string_lossy().into_owned();
        // `x_hopper.cu` has other kernels for the launchers of `x.cu`.
        let stem = stem.strip_suffix("_hopper").unwrap_or(&stem).to_string();
        for partner in [format!("src/cuda/ops/{stem}.rs"), format!("tests/kernels/{stem}.rs")] {
            if !root().join(&partner).exists() {
                wrong.push(format!("kernels/{stem}.cu has no {partner}"));
            }
        }
        if !rows.contains(&format!("### `{stem}`")) {
            wrong.push(format!("kernels/{stem}.cu has no section in kernels/README.md"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn architecture_md_stays_short_and_draws_these_arrows() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    assert!(text.lines().count() < 200, "ARCHITECTURE.md has {} lines", text.lines().count());
    for (module, needs) in ARROWS {
        let line = format!("{module} -> {}", if needs.is_empty() { "nothing".to_string() } else { needs.join(", ") });
        assert!(text.contains(&line), "ARCHITECTURE.md lacks the line `{line}`");
    }
}

#[test]
fn no_path_of_one_machine_is_in_a_text() {
    let mut texts = Vec::new();
    for folder in [
        "src",
        "tests",
        "pipelines",
        "kernels",
        "benches",
        "examples",
        "cache",
        "fuzz/src",
        "fuzz/fuzz_targets",
        "xtask/src",
    ] {
        files_below(
            &root().join(folder),
            &[".rs", ".toml", ".md", ".cu", ".cuh", ".cpp", ".csv", ".sh", ".py"],
            &mut texts,
        );
    }
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "Cargo.toml", ".ci/run"] {
        texts.push(root().join(name));
    }
    // Written in halves, or this file would find itself.
    let banned = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/tmp/", "wt"), concat!("/ho", "me/")];
    let mut wrong = Vec::new();
    for path in texts {
        let text = fs::read_to_string(&path).unwrap_or_default();
        for (number, line) in text.lines().enumerate() {
            // A path of the machine starts there; `FINGERPRINT/work/` only ends like one.
            let starts = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_.-".contains(c));
            if banned.iter().any(|bad| line.match_indices(bad).any(|(at, _)| starts(at))) {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "paths of one machine:\n{}", wrong.join("\n"));
}

/// A key a manifest may hold is a field of the struct its stage reads (`deny_unknown_fields` refuses any
/// other), and a field nobody reads is a dead-code warning, which CI refuses. References arrive as inputs
/// and are asked for by name.
#[test]
fn every_accepted_manifest_key_is_read() {
    use pipe::manifest::spec::{Key, Type};
    fn names(keys: &[Key], into: &mut Vec<(String, bool)>) {
        for key in keys {
            let reference = matches!(key.ty, Type::Ref(_) | Type::Task(_) | Type::Refs(_) | Type::Gather(_));
            into.push((key.name.to_string(), reference));
            match &key.ty {
                Type::Table(keys) => names(keys, into),
                Type::List(Type::Table(keys)) => names(keys, into),
                _ => {}
            }
        }
    }
    let read = |name: &str| {
        let mut parts = vec![root().join(format!("src/stage/{name}.rs"))];
        files_below(&root().join(format!("src/stage/{name}")), &[".rs"], &mut parts);
        parts.iter().map(|path| fs::read_to_string(path).unwrap_or_default()).collect::<String>()
    };
    // `lora` is read as the model's own `LoraSpec`.
    let lora = fs::read_to_string(root().join("src/model/lora.rs")).expect("lora.rs");
    let shared = read("share") + &lora;
    let mut wrong = Vec::new();
    for kind in pipe::stage::KINDS {
        let own = read(&format!("kinds/{}", kind.name));
        assert!(own.contains("deny_unknown_fields") || shared.contains("deny_unknown_fields"), "{}", kind.name);
        let text = format!("{own}{shared}");
        let mut keys = Vec::new();
        names(kind.keys, &mut keys);
        for (name, reference) in keys {
            let read = match reference {
                // Once where it is declared, once more where it is asked for.
                true => text.matches(&format!("{name}\"")).count() >= 2,
                false => text.lines().any(|line| {
                    if line.contains(&format!("serde(rename = \"{name}\")")) {
                        return true;
                    }
                    let line = line.trim_start().trim_start_matches("pub ").trim_start_matches("r#");
                    line.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with(": "))
                }),
            };
            if !read {
                wrong.push(format!("{}.{name}", kind.name));
            }
        }
    }
    assert!(wrong.is_empty(), "keys that nothing reads: {}", wrong.join(", "));
}

/// Adding a kind touches its own file and the table: nobody else says its name. `model` and `command` are slots and
/// keys too, and `dataset` is a key, so their own names cannot be told apart by text.
#[test]
fn a_kind_is_named_in_its_own_file_alone() {
    let mut sources = Vec::new();
    files_below(&root().join("src/stage"), &[".rs"], &mut sources);
    files_below(&root().join("src/cli"), &[".rs"], &mut sources);
    let (mut wrong, mut own) = (Vec::new(), 0);
    for path in sources {
        let text = fs::read_to_string(&path).expect("source");
        let code = if path.ends_with("tests.rs") { "" } else { text.split("#[cfg(test)]").next().unwrap_or("") };
        for kind in pipe::stage::KINDS.iter().filter(|kind| !["model", "command", "dataset"].contains(&kind.name)) {
            let named = code.contains(&format!("\"{}\"", kind.name));
            let inside = path.to_string_lossy().contains(&format!("src/stage/kinds/{}", kind.name));
            own += usize::from(named && inside);
            if named && !inside {
                wrong.push(format!("{} names `{}`", path.display(), kind.name));
            }
        }
    }
    assert!(own >= pipe::stage::KINDS.len() - 3, "only {own} kinds say their own name");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
