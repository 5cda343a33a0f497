//! Kernels compiled at run time: what is compiled when, what is kept, and what is said when it cannot be.
//!
//! The compiler is a small library that answers in NVRTC's place, except where NVRTC_DIR names the real one.

use pipe::cuda::jit::Jit;
use pipe::cuda::prebuilt::{self, Capability};
use pipe::cuda::units;
use pipe::problem::{Exit, Problem};
use std::fs;
use std::path::{Path, PathBuf};

const H100: Capability = Capability { major: 9, minor: 0 };
const A100: Capability = Capability { major: 8, minor: 0 };

/// Finds "mistakes" by that word, and names the line; a cubin lists the kernels of its text. Each compilation is a
/// line of LOG.
const STUB: &str = r#"
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { char *name, *text, log[400], result[4000]; size_t bytes; } program;
int nvrtcCreateProgram(program** it, const char* text, const char* name, int count, const char** texts,
                       const char** names) {
    *it = calloc(1, sizeof **it);
    (*it)->name = strdup(name); (*it)->text = strdup(text);
    return 0;
}
int nvrtcDestroyProgram(program** it) { free((*it)->name); free((*it)->text); free(*it); *it = 0; return 0; }
int nvrtcCompileProgram(program* it, int count, const char** options) {
    const char* arch = strstr(options[0], "--gpu-architecture=") + 19;
    if (strncmp(arch, "compute_", 8) == 0) {
        it->bytes = sprintf(it->result, "// Cuda compilation tools, release 1.2, V" VERSION "\n") + 1;
        return 0;
    }
    FILE* log = fopen(LOG, "a");
    fprintf(log, "%s %s\n", it->name, arch);
    fclose(log);
    int line = 1;
    for (const char* at = it->text; *at; ++at) {
        if (strncmp(at, "mistake", 7) == 0) {
            sprintf(it->log, "%s(%d): error: identifier \"mistake\" is undefined\n", it->name, line);
            return 6;
        }
        line += *at == '\n';
    }
    memcpy(it->result, "\x7f" "ELF", 4);
    it->bytes = 4;
    for (const char* at = it->text; (at = strstr(at, "EXPORT_KERNEL(")); ) {
        at += 14;
        int length = strcspn(at, ")");
        it->bytes += sprintf(it->result + it->bytes, ".text.%.*s", length, at) + 1;
    }
    return 0;
}
const char* nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_OTHER"; }
int nvrtcGetProgramLogSize(program* it, size_t* bytes) { *bytes = strlen(it->log) + 1; return 0; }
int nvrtcGetProgramLog(program* it, char* text) { strcpy(text, it->log); return 0; }
int nvrtcGetPTXSize(program* it, size_t* bytes) { *bytes = it->bytes; return 0; }
int nvrtcGetPTX(program* it, char* text) { memcpy(text, it->result, it->bytes); return 0; }
int nvrtcGetCUBINSize(program* it, size_t* bytes) { *bytes = it->bytes; return 0; }
int nvrtcGetCUBIN(program* it, char* text) { memcpy(text, it->result, it->bytes); return 0; }
"#;

/// A folder of kernels, the compiler that stands for NVRTC, and a cache.
pub struct Workshop {
    folder: tempfile::TempDir,
}

impl Workshop {
    pub fn new() -> Workshop {
        let workshop = Workshop { folder: tempfile::tempdir().expect("a folder") };
        for folder in ["kernels", "nvrtc", "cache"] {
            fs::create_dir(workshop.at(folder)).expect("a folder");
        }
        workshop.write("manifest.toml", "archs = [\"sm_80\", \"sm_90a\"]\n\n[kernels.hopper]\narchs = [\"sm_90a\"]\n");
        workshop.write("dev.cuh", "#define EXPORT_KERNEL(name)\n");
        workshop.write("sum.cu", "#include \"dev.cuh\"\nEXPORT_KERNEL(sum)\nEXPORT_KERNEL(sum_of_rows)\n");
        workshop.write("product.cu", "#include \"dev.cuh\"\nEXPORT_KERNEL(product)\n");
        workshop.write("hopper.cu", "#include \"dev.cuh\"\nEXPORT_KERNEL(hopper)\n");
        workshop.compiler("1.2.3");
        workshop
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.at("kernels").join(name), text).expect("a file");
    }

    /// Puts a compiler of this version in place.
    fn compiler(&self, version: &str) {
        let source = self.at("nvrtc.c");
        fs::write(&source, STUB).expect("the stub's source");
        for library in ["libnvrtc-builtins.so.1", "libnvrtc.so.1"] {
            // Not over a library that is open.
            let _ = fs::remove_file(self.at("nvrtc").join(library));
            let done = std::process::Command::new("cc")
                .args(["-shared", "-fPIC", "-w", "-o"])
                .arg(self.at("nvrtc").join(library))
                .arg(format!("-DLOG=\"{}\"", self.at("compiled").display()))
                .arg(format!("-DVERSION=\"{version}\""))
                .arg(&source)
                .status();
            assert!(done.expect("a C compiler, `cc`").success());
        }
    }

    fn open(&self) -> Result<Jit, Problem> {
        Jit::open(&self.at("kernels"), Some(&self.at("nvrtc")), Some(self.at("cache")))
    }

    /// What was compiled, in order.
    pub fn compiled(&self) -> String {
        fs::read_to_string(self.at("compiled")).unwrap_or_default().replace('\n', ", ")
    }
}

#[test]
fn a_unit_is_compiled_when_its_kernel_is_wanted_and_then_kept() {
    let workshop = Workshop::new();
    let jit = workshop.open().unwrap();
    assert_eq!(workshop.compiled(), "", "nothing before it is needed");
    assert_eq!(jit.unit_of("product", H100).unwrap(), "product");
    // Units are searched by name: the one that only this architecture has is looked into first.
    assert_eq!(workshop.compiled(), "hopper.cu sm_90a, product.cu sm_90a, ");
    assert!(jit.image("product", H100).unwrap().starts_with(b"\x7fELF.text.product\0"));
    assert_eq!(jit.unit_of("sum_of_rows", H100).unwrap(), "sum");
    assert_eq!(workshop.open().unwrap().unit_of("sum", H100).unwrap(), "sum");
    assert_eq!(workshop.compiled(), "hopper.cu sm_90a, product.cu sm_90a, sum.cu sm_90a, ", "kept for the next");
}

#[test]
fn a_changed_source_header_option_or_compiler_compiles_again() {
    let workshop = Workshop::new();
    let count = || {
        workshop.open().unwrap().unit_of("product", A100).unwrap();
        workshop.compiled().matches("product.cu").count()
    };
    assert_eq!((count(), count()), (1, 1));
    workshop.write("sum.cu", "// Another text of a unit that is not asked for.\n");
    assert_eq!(count(), 1);
    workshop.write("product.cu", "#include \"dev.cuh\"\n// Changed.\nEXPORT_KERNEL(product)\n");
    assert_eq!(count(), 2);
    workshop.write("dev.cuh", "// Changed.\n");
    assert_eq!(count(), 3);
    workshop.write("manifest.toml", "archs = [\"sm_80\"]\n[kernels.product.variants]\nfast = [\"FAST=1\"]\n");
    assert_eq!(count(), 4);
    // Another file under the name that is open would still be the old library.
    fs::rename(workshop.at("nvrtc"), workshop.at("old")).unwrap();
    fs::create_dir(workshop.at("nvrtc")).unwrap();
    workshop.compiler("1.2.4");
    assert_eq!((count(), count()), (5, 5));
    // What lies there damaged is made again.
    for file in fs::read_dir(workshop.at("cache")).unwrap().flatten() {
        fs::write(file.path(), "half a cub").unwrap();
    }
    assert_eq!((count(), count()), (6, 6));
}

#[test]
fn an_architecture_gets_its_own_code_and_no_other_s_units() {
    let workshop = Workshop::new();
    let jit = workshop.open().unwrap();
    assert_eq!(jit.unit_of("sum", A100).unwrap(), "sum");
    assert_eq!(workshop.compiled(), "product.cu sm_80, sum.cu sm_80, ");
    let problem = jit.unit_of("hopper", A100).unwrap_err();
    assert_eq!(problem.code, "cuda::no_kernel");
    assert!(problem.message.contains("no kernel `hopper`") && problem.notes[0].contains("8.0"), "{problem}");
    assert_eq!(jit.unit_of("hopper", H100).unwrap(), "hopper");
    assert_eq!(jit.unit_of("sum", Capability { major: 12, minor: 1 }).unwrap(), "sum");
    assert!(workshop.compiled().ends_with("sum.cu sm_121a, "), "{}", workshop.compiled());
}

#[test]
fn a_mistake_is_told_with_file_and_line() {
    let workshop = Workshop::new();
    workshop.write("product.cu", "#include \"dev.cuh\"\n\nmistake\nEXPORT_KERNEL(product)\n");
    let problem = workshop.open().unwrap().unit_of("product", A100).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("cuda::jit", Exit::Missing));
    let file = workshop.at("kernels").join("product.cu");
    assert_eq!(problem.message, format!("`{}` does not compile for sm_80", file.display()));
    let log = "NVRTC 1.2.3: NVRTC_ERROR_COMPILATION\nproduct.cu(3): error: identifier \"mistake\" is undefined";
    assert_eq!(problem.notes, [log]);
    assert!(problem.help[0].contains("unset PIPE_KERNELS_JIT"), "{problem}");
    workshop.write("product.cu", "EXPORT_KERNEL(product)\n");
    workshop.open().unwrap().unit_of("product", A100).expect("a failure is not kept");
}

#[test]
fn a_wrong_folder_and_a_missing_compiler_say_what_to_do() {
    let workshop = Workshop::new();
    let nowhere = workshop.at("nowhere");
    let problem = Jit::open(&nowhere, Some(&workshop.at("nvrtc")), None).err().unwrap();
    assert_eq!((problem.code, problem.exit), ("cuda::jit", Exit::Missing));
    assert!(problem.message.contains(&*nowhere.to_string_lossy()), "{problem}");
    assert!(problem.notes[0].contains("manifest.toml") && problem.help[0].contains("`kernels` folder"), "{problem}");
    workshop.write("manifest.toml", "archs = 3\n");
    assert!(workshop.open().err().unwrap().notes[0].contains("archs"), "what is wrong with it is told");

    let workshop = Workshop::new();
    fs::remove_file(workshop.at("nvrtc").join("libnvrtc.so.1")).unwrap();
    let problem = workshop.open().err().unwrap();
    assert_eq!((problem.code, problem.exit), ("cuda::jit", Exit::Missing));
    assert!(problem.notes[0].contains("no libnvrtc.so* in"), "{problem}");
    assert!(problem.help[0].contains("NVRTC_DIR=") && problem.help[1].contains("unset PIPE_KERNELS_JIT"), "{problem}");
    fs::write(workshop.at("nvrtc").join("libnvrtc.so.1"), "not a library").unwrap();
    assert!(workshop.open().err().unwrap().notes[0].contains("cannot open"));
}

#[test]
fn a_cache_that_cannot_be_written_costs_time_only() {
    let workshop = Workshop::new();
    let file = workshop.at("cache").join("a file");
    fs::write(&file, "").unwrap();
    let jit = Jit::open(&workshop.at("kernels"), Some(&workshop.at("nvrtc")), Some(file.join("below"))).unwrap();
    assert_eq!(jit.unit_of("product", A100).unwrap(), "product");
}

/// With the compiler that made what is embedded, the bytes are the same; any other is at least content.
#[test]
fn the_real_compiler_gives_what_is_embedded() {
    let Some(compiler) = std::env::var_os("NVRTC_DIR") else {
        return eprintln!("not looked at: NVRTC_DIR does not name NVIDIA's compiler");
    };
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let cache = tempfile::tempdir().unwrap();
    let jit = Jit::open(&kernels, Some(Path::new(&compiler)), Some(cache.path().to_path_buf())).unwrap();
    for (kernel, capability) in [("rmsnorm_forward", H100), ("swiglu_backward", A100)] {
        let unit = prebuilt::unit_of(kernel).unwrap();
        assert_eq!(jit.unit_of(kernel, capability).unwrap(), unit.name);
        let image = jit.image(unit.name, capability).unwrap();
        let file = fs::read_dir(cache.path()).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
        let digest = units::read(&kernels, &kernels).unwrap();
        let digest = digest.iter().find(|candidate| candidate.name == unit.name).unwrap();
        let blob = unit.blob_for(capability, "a GPU").unwrap();
        // Its digest says whether it is the pinned version.
        if file.into_iter().any(|file| file.contains(&digest.fingerprint(blob.arch))) {
            assert!(*image == blob.unpack(), "{kernel}: other bytes than those embedded");
        }
    }

    // Its own words about a mistake.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("manifest.toml"), "archs = [\"sm_80\"]\n").unwrap();
    fs::write(folder.path().join("wrong.cu"), "extern \"C\" __global__ void wrong() {\n    return 1 +;\n}\n").unwrap();
    let jit = Jit::open(folder.path(), Some(Path::new(&compiler)), None).unwrap();
    let problem = jit.unit_of("wrong", A100).unwrap_err();
    assert!(problem.notes[0].contains("wrong.cu(2): error: expected an expression"), "{problem}");
}
