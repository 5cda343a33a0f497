//! What is embedded of the kernels, and NVIDIA's driver as far as it goes without a GPU: where there is no
//! driver, and over a library that answers in its place.
//!
//! That library shows that the driver is asked in the right order, with what, and what becomes of its errors.
//! Whether a GPU then does what it should, it cannot show.

use bytemuck::Zeroable;
use pipe::cuda::{self, Dim, prebuilt, units};
use pipe::problem::Exit;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Unit -> architecture -> fingerprint, size, kernels, as `cargo xtask kernels` wrote them.
fn index() -> BTreeMap<String, BTreeMap<String, Value>> {
    index_of("kernels")
}

fn index_of(folder: &str) -> BTreeMap<String, BTreeMap<String, Value>> {
    let path = root().join(folder).join("prebuilt/index.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    toml::from_str(&text).expect("index.toml")
}

/// Units, each with the architectures for which another text was compiled than is there.
fn stale(folder: &str) -> Vec<String> {
    let index = index_of(folder);
    let mut wrong = Vec::new();
    for unit in units::read(&root().join(folder), &root().join("kernels")).expect(folder) {
        let made = |arch: &str| index.get(&unit.name)?.get(arch);
        let stale = |arch: &str| made(arch).is_none_or(|made| made["fingerprint"] != unit.fingerprint(arch));
        let stale: Vec<&str> = unit.archs.iter().map(String::as_str).filter(|arch| stale(arch)).collect();
        if !stale.is_empty() {
            wrong.push(format!("{folder}, {}: {}", unit.name, stale.join(", ")));
        }
    }
    wrong
}

#[test]
fn what_is_embedded_was_made_from_the_kernels_that_are_here() {
    let units = units::read(&root().join("kernels"), &root().join("kernels")).expect("kernels/");
    let mut wrong = [stale("kernels"), stale("tests/conformance")].concat();
    let embedded: BTreeSet<&str> = prebuilt::units().iter().map(|unit| unit.name).collect();
    let here: BTreeSet<&str> = units.iter().map(|unit| unit.name.as_str()).collect();
    wrong.extend(embedded.symmetric_difference(&here).map(|name| format!("{name}: embedded, or here, not both")));
    assert!(wrong.is_empty(), "run `cargo xtask kernels`; it is not up to date for\n{}", wrong.join("\n"));
}

#[test]
fn every_blob_is_whole_and_holds_its_kernels() {
    let index = index();
    let mut seen = 0;
    for unit in prebuilt::units() {
        assert!(!unit.kernels.is_empty(), "{}", unit.name);
        for blob in unit.blobs {
            let bytes = blob.unpack();
            let whose = format!("{}, {}", unit.name, blob.arch);
            let made = &index[unit.name][blob.arch];
            let names: Vec<String> = if blob.is_ptx() {
                assert_eq!(bytes.last(), Some(&0), "{whose}");
                assert!(contains(&bytes, format!("\n.version {}\n", units::PTX_VERSION).as_bytes()), "{whose}");
                unit.kernels.iter().map(|kernel| format!(".visible .entry {kernel}(")).collect()
            } else {
                assert!(bytes.starts_with(b"\x7fELF"), "{whose}");
                unit.kernels.iter().map(|kernel| format!(".text.{kernel}\0")).collect()
            };
            for name in names {
                assert!(contains(&bytes, name.as_bytes()), "{whose}: no {name}");
            }
            assert_eq!(made["bytes"], bytes.len() - usize::from(blob.is_ptx()), "{whose}");
            for (kernel, taken) in made["kernels"].as_object().expect("a table of kernels") {
                assert!(taken["spills"].as_u64().unwrap_or(0) == 0, "{whose}: {kernel} spills");
            }
            seen += 1;
        }
    }
    assert!(seen > 0, "nothing is embedded");
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// A name is all that ties a launch to a kernel.
#[test]
fn launchers_and_kernels_name_each_other() {
    let launchers: String = fs::read_dir(root().join("src/cuda/ops"))
        .expect("src/cuda/ops")
        .flatten()
        .map(|entry| fs::read_to_string(entry.path()).expect("source"))
        .collect();
    let embedded: BTreeSet<&str> = prebuilt::units().iter().flat_map(|unit| unit.kernels).copied().collect();
    let mut wrong = Vec::new();
    for kernel in &embedded {
        if !launchers.contains(&format!("\"{kernel}\"")) {
            wrong.push(format!("nothing launches `{kernel}`"));
        }
    }
    for part in launchers.split(".launch(").skip(1) {
        let literal = part.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
        if let Some((kernel, _)) = literal.filter(|(kernel, _)| !embedded.contains(kernel)) {
            wrong.push(format!("`{kernel}` is launched, and is in no .cu"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_device_from_8_0_on_has_something_to_run() {
    for unit in prebuilt::units() {
        if unit.name.ends_with("_hopper") {
            // The other kernels of its launcher run where this one does not.
            let on = |major, minor| unit.blob_for(prebuilt::Capability { major, minor }, "a GPU");
            assert!(on(9, 0).is_ok() && on(8, 9).is_err() && on(10, 0).is_err(), "{}", unit.name);
            continue;
        }
        for (major, minor) in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)] {
            let blob = unit.blob_for(prebuilt::Capability { major, minor }, "a GPU");
            assert!(blob.is_ok(), "{} on {major}.{minor}: {}", unit.name, blob.unwrap_err());
        }
    }
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let problem = prebuilt::unit_of("no_such_kernel").unwrap_err();
    assert_eq!(problem.code, "cuda::no_kernel");
    assert!(problem.message.contains("no_such_kernel"), "{problem}");
}

/// The library that answers in the driver's place. Device memory is the host's; what STUB says decides how
/// the device is. Only the functions that drivers from 525 on have, under the names they have there.
const STUB: &str = r#"
#include <stdlib.h>
#include <string.h>
typedef unsigned long long address;
static int is(const char* what) { const char* stub = getenv("STUB"); return stub && strcmp(stub, what) == 0; }
static int number(const char* name) { const char* text = getenv(name); return text ? atoi(text) : 0; }

int cuDriverGetVersion(int* version) { *version = is("old_driver") ? 11040 : 12000; return 0; }
int cuInit(unsigned flags) {
    return is("no_device") ? 100 : is("toolkit") ? 34 : is("mismatch") ? 803 : is("ill") ? 999 : 0;
}
int cuDeviceGetCount(int* count) { *count = is("none") ? 0 : 1; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int bytes, int device) { strncpy(name, "Stub 1", bytes); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    int capability = is("old_device") ? 75 : number("STUB_CAPABILITY");
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
    return 0;
}
static char context, stream;
static int current = 0;
int cuDevicePrimaryCtxRetain(void** it, int device) { *it = &context; return is("taken") ? 46 : 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void* it) { current = it == &context; return current ? 0 : 201; }
int cuStreamCreate(void** it, unsigned flags) { *it = &stream; return current && flags == 1 ? 0 : 1; }
int cuStreamDestroy_v2(void* it) { return it == &stream ? 0 : 400; }

/* What the kernel that ran last did to the device. */
static int broken = 0;
int cuStreamSynchronize(void* it) { return it == &stream ? broken : 400; }
int cuMemAlloc_v2(address* at, size_t bytes) {
    if (is("full")) return 2;
    *at = (address)aligned_alloc(256, bytes);
    return *at ? 0 : 2;
}
int cuMemFree_v2(address at) { free((void*)at); return 0; }
int cuMemHostAlloc(void** at, size_t bytes, unsigned flags) { *at = malloc(bytes); return *at && current ? 0 : 2; }
int cuMemFreeHost(void* at) { free(at); return 0; }
int cuStreamWaitEvent(void* it, void* event, unsigned flags) { return it == &stream ? 0 : 400; }
int cuMemGetInfo_v2(size_t* unused, size_t* total) { *unused = 3; *total = 5; return 0; }
int cuMemcpyHtoDAsync_v2(address to, const void* from, size_t bytes, void* it) {
    memcpy((void*)to, from, bytes);
    return broken;
}
int cuMemcpyDtoHAsync_v2(void* to, address from, size_t bytes, void* it) {
    memcpy(to, (void*)from, bytes);
    return broken;
}
int cuMemsetD8Async(address at, unsigned char value, size_t bytes, void* it) {
    memset((void*)at, value, bytes);
    return broken;
}
/* Each event that is recorded is a millisecond and a half later than the one before. */
static struct { int at; } events[8];
static int made = 0, recorded = 0, alive = 0;
int cuEventCreate(void** it, unsigned flags) { *it = &events[made++ % 8]; ++alive; return current ? 0 : 201; }
int cuEventRecord(void* event, void* it) { *(int*)event = ++recorded; return it == &stream ? 0 : 400; }
int cuEventSynchronize(void* event) { return broken; }
int cuEventElapsedTime(float* ms, void* from, void* to) {
    *ms = 1.5f * (*(int*)to - *(int*)from);
    return alive == 2 ? 0 : 1;
}
int cuEventDestroy_v2(void* event) { --alive; return 0; }

static int modules = 0;
static char allowed[64][2];
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
    int ptx = memcmp(image, "\x7f" "ELF", 4) != 0;
    if (ptx && is("old_compiler")) return 222;
    if (ptx && is("bad_ptx")) { strcpy(values[0], "line 7: what?"); return 218; }
    if (ptx && strlen(image) < 100) return 200;
    if (ptx != (number("STUB_CAPABILITY") > 120)) return 209;
    *module = &allowed[++modules];
    return 0;
}
static const char* names[64];
static int shared_bytes[64], functions = 0;
int cuModuleGetFunction(void** function, void* module, const char* name) {
    names[functions] = strdup(name); shared_bytes[functions] = 49152; *function = &names[functions++];
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value > 232448) return 1;
    shared_bytes[(const char**)function - names] = value;
    return 0;
}
/* Launches that are captured: the function, the sizes, and the values of two arguments. */
static struct launch { void* function; unsigned sizes[7]; void* first; int second; } captured[8];
static int capturing = 0, launches = 0, graphs = 0;
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuStreamBeginCapture_v2(void* it, int mode) {
    capturing = it == &stream && mode == 1 && !capturing;
    launches = 0;
    return capturing ? 0 : 1;
}
int cuStreamEndCapture(void* it, void** graph) { *graph = captured; capturing = 0; return it == &stream ? 0 : 400; }
int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long flags) {
    graphs++;
    *ready = graph;
    return flags ? 1 : 0;
}
int cuGraphDestroy(void* graph) { return graph == captured ? 0 : 1; }
int cuGraphExecDestroy(void* ready) { return ready == captured && graphs-- ? 0 : 1; }
int cuGraphLaunch(void* ready, void* it) {
    for (int i = 0; i < launches; i++) {
        struct launch* l = &captured[i];
        void* arguments[] = {&l->first, &l->second};
        unsigned* s = l->sizes;
        int failed = cuLaunchKernel(l->function, s[0], s[1], s[2], s[3], s[4], s[5], s[6], it, arguments, 0);
        if (failed) return failed;
    }
    return ready == captured ? 0 : 1;
}
/* No kernel runs. Its first argument gets what was asked for; a second, if it is 1 or 2, breaks the device. */
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* it, void** arguments, void** extra) {
    int at = (const char**)function - names;
    if (bx * by * bz > 1024 || (int)shared > shared_bytes[at]) return 1;
    int second = *(int*)arguments[1];
    if (capturing) {
        captured[launches++] = (struct launch){function, {gx, gy, gz, bx, by, bz, shared}, *(void**)arguments[0], second};
        return 0;
    }
    unsigned said[] = {gx, gy, gz, bx, by, bz, shared, second, modules, functions};
    memcpy(*(void**)arguments[0], said, sizeof said);
    if (second == 1) broken = 700;
    if (second == 2) broken = 214;
    return 0;
}
"#;

/// Compiles it, once.
fn stub_folder() -> &'static Path {
    static FOLDER: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stub-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder for the stub");
        let source = folder.join("libcuda.c");
        fs::write(&source, STUB).expect("the stub's source");
        let compiler = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .arg(folder.join("libcuda.so"))
            .arg(&source)
            .status();
        assert!(compiler.expect("a C compiler, `cc`").success());
        folder
    })
}

/// Runs [`over_the_stub`] in a process of its own, whose driver is the stub.
fn with_stub(device: &str, capability: u32) {
    in_process_of_its_own("prebuilt::over_the_stub", device, capability, &[]);
}

fn in_process_of_its_own(test: &str, device: &str, capability: u32, variables: &[(&str, PathBuf)]) {
    let output = std::process::Command::new(std::env::current_exe().expect("this test's path"))
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env_remove("PIPE_KERNELS_JIT")
        .envs(variables.iter().cloned())
        .env("LD_LIBRARY_PATH", stub_folder())
        .env("STUB", device)
        .env("STUB_CAPABILITY", capability.to_string())
        .output()
        .expect("a process of its own");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{device}, {capability}:\n{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn what_a_driver_may_answer_becomes_problems() {
    for device in
        ["no_device", "none", "toolkit", "mismatch", "ill", "old_driver", "old_device", "taken", "other", "full"]
    {
        with_stub(device, 90);
    }
    for device in ["old_compiler", "bad_ptx"] {
        with_stub(device, 121);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_device_is_asked_in_the_right_order() {
    with_stub("works", 90);
    with_stub("works", 86);
    // No cubin of ours is for this one.
    with_stub("works", 121);
    with_stub("faults", 80);
    with_stub("breaks", 80);
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "the tests above run it in processes of their own"]
fn over_the_stub() {
    let Ok(device) = std::env::var("STUB") else { return };
    let refused = |ordinal: usize, code: &str, words: &str, help: &str| {
        let problem = cuda::open(ordinal).err().expect("no device");
        assert_eq!((problem.code, problem.exit), (code, Exit::Missing), "{problem}");
        assert!(problem.message.contains(words) && problem.help[0].contains(help), "{problem}");
    };
    match device.as_str() {
        "no_device" | "none" => return refused(0, "cuda::no_device", "shows no device", "CUDA_VISIBLE_DEVICES"),
        "toolkit" => return refused(0, "cuda::no_driver", "stub", "LD_LIBRARY_PATH"),
        "mismatch" => return refused(0, "cuda::no_driver", "different versions", "restart"),
        "ill" => return refused(0, "cuda::no_driver", "CUDA_ERROR_UNKNOWN", "nvidia-smi"),
        "old_driver" => return refused(0, "cuda::old_driver", "11.4, needed is 12.0", "525"),
        "old_device" => return refused(0, "cuda::old_device", "7.5, needed is 8.0", "A100"),
        "taken" => return refused(0, "cuda::no_device", "Stub 1 is taken", "nvidia-smi"),
        "other" => return refused(1, "cuda::no_device", "no CUDA device 1: the driver shows 1", "nvidia-smi"),
        _ => {}
    }
    let gpu = cuda::open(0).expect("the stub's device");
    assert_eq!(gpu.driver().name(), "Stub 1", "not to be run on a real device");
    assert_eq!(gpu.driver().memory().unwrap(), (3, 5));
    if device == "full" {
        let problem = gpu.alloc::<u8>(1000).err().expect("no room");
        assert_eq!((problem.code, problem.exit), ("cuda::out_of_memory", Exit::Missing));
        return assert!(problem.to_string().contains("asked for 1024 bytes"), "{problem}");
    }

    // Any two kernels of one unit and one of another.
    let several = prebuilt::units().iter().find(|unit| unit.kernels.len() > 1).expect("a unit with two kernels");
    let other = prebuilt::units().iter().find(|unit| unit.name != several.name).expect("two units");
    let [first, second, third] = [several.kernels[0], several.kernels[1], other.kernels[0]];
    let said = gpu.zeros::<u32>(10).unwrap();
    let launch = |kernel: &'static str, shared: usize, int: usize| {
        let launch = gpu.launch(kernel, (3, 2), Dim(32, 4, 1)).shared(shared).buffer(&said).int(int);
        // SAFETY: the stub runs no kernel; it takes a pointer and an int.
        unsafe { launch.run() }
    };
    if ["old_compiler", "bad_ptx"].contains(&device.as_str()) {
        let problem = launch(first, 0, 0).unwrap_err();
        let (code, words) = match device.as_str() {
            "old_compiler" => ("cuda::old_driver", "545"),
            _ => ("cuda::driver", "line 7: what?"),
        };
        assert!(problem.code == code && problem.to_string().contains(words), "{problem}");
        return;
    }
    launch(first, 0, 7).unwrap();
    assert_eq!(said.download().unwrap(), [3, 2, 1, 32, 4, 1, 0, 7, 1, 1]);
    // Loaded once, and more shared memory asked for where it is needed.
    launch(first, 100_000, 8).unwrap();
    assert_eq!(said.download().unwrap(), [3, 2, 1, 32, 4, 1, 100_000, 8, 1, 1]);
    launch(second, 49_152, 9).unwrap();
    assert_eq!(said.download().unwrap(), [3, 2, 1, 32, 4, 1, 49_152, 9, 1, 2]);
    launch(third, 0, 10).unwrap();
    assert_eq!(said.download().unwrap(), [3, 2, 1, 32, 4, 1, 0, 10, 2, 3]);
    // The calling thread has no context of its own until it is given one.
    std::thread::scope(|scope| scope.spawn(|| launch(first, 0, 11).unwrap()).join().unwrap());

    // What is captured is carried out later, and as often as one likes.
    let graph = gpu.capture(|| launch(first, 0, 12).and_then(|()| launch(second, 0, 13))).unwrap();
    assert_eq!(said.download().unwrap()[7], 11, "a launch is carried out while it is captured");
    for _ in 0..2 {
        launch(third, 0, 14).unwrap();
        graph.launch().unwrap();
        assert_eq!(said.download().unwrap(), [3, 2, 1, 32, 4, 1, 0, 13, 2, 3]);
    }
    drop(graph);

    let problem = launch(first, 300_000, 0).unwrap_err();
    assert!(problem.code == "cuda::launch" && problem.message.contains("300000 bytes of shared memory"), "{problem}");
    // SAFETY: as above.
    let problem = unsafe { gpu.launch(first, 1, 2048).buffer(&said).int(0).run() }.unwrap_err();
    assert!(problem.code == "cuda::launch" && problem.to_string().contains("CUDA_ERROR_INVALID_VALUE"), "{problem}");

    // By the device's clock, and its events are given back.
    for launches in [1, 3] {
        let work = &mut || (0..launches).try_for_each(|_| launch(first, 0, 12));
        assert_eq!(gpu.time(work).unwrap(), 1.5e-3);
    }

    let mut copy = gpu.upload(&[1.5f32, -2.0]).unwrap();
    assert_eq!(copy.download().unwrap(), [1.5, -2.0]);
    copy.clear().unwrap();
    assert_eq!(copy.download().unwrap(), [f32::zeroed(); 2]);
    assert!(gpu.upload::<u8>(&[]).unwrap().download().unwrap().is_empty());

    let (int, code, words) = match device.as_str() {
        "faults" => (1, "cuda::launch", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        "breaks" => (2, "cuda::lost", "CUDA_ERROR_ECC_UNCORRECTABLE"),
        _ => return gpu.driver().synchronize().unwrap(),
    };
    // A launch is only queued; what came of it shows later, and the kernel is named then.
    launch(third, 0, int).unwrap();
    for problem in [gpu.driver().synchronize().unwrap_err(), copy.download().unwrap_err()] {
        assert!(problem.code == code && problem.exit == Exit::Failed, "{problem}");
        assert!(problem.message.contains(words) && problem.notes[0].contains(third), "{problem}");
    }
}

/// The whole way of a kernel in the making: the variable, the compiler, the driver.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_named_by_the_environment_takes_the_place_of_what_is_embedded() {
    let workshop = crate::jit::Workshop::new();
    let of = |kernels: &str| {
        let cache = ("XDG_CACHE_HOME", workshop.at("cache"));
        [("PIPE_KERNELS_JIT", workshop.at(kernels)), ("NVRTC_DIR", workshop.at("nvrtc")), cache]
    };
    in_process_of_its_own("prebuilt::over_the_stub_compiling", "works", 90, &of("kernels"));
    in_process_of_its_own("prebuilt::over_the_stub_compiling", "nowhere", 90, &of("nowhere"));
    assert_eq!(workshop.compiled(), "hopper.cu sm_90a, product.cu sm_90a, ");
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "the test above runs it in processes of their own"]
fn over_the_stub_compiling() {
    let Ok(device) = std::env::var("STUB") else { return };
    if device == "nowhere" {
        let problem = cuda::open(0).err().expect("no kernels");
        return assert!(problem.code == "cuda::jit" && problem.message.contains("PIPE_KERNELS_JIT"), "{problem}");
    }
    let gpu = cuda::open(0).expect("the stub's device");
    let said = gpu.zeros::<u32>(10).unwrap();
    // SAFETY: the stub runs no kernel; it takes a pointer and an int.
    unsafe { gpu.launch("product", 3, 32).buffer(&said).int(7).run() }.unwrap();
    assert_eq!(said.download().unwrap(), [3, 1, 1, 32, 1, 1, 0, 7, 1, 1]);
}

#[test]
fn without_a_driver_there_is_a_way_out() {
    let Err(problem) = cuda::open(0) else { return eprintln!("not looked at: this machine has a CUDA device") };
    if problem.code != "cuda::no_driver" {
        return eprintln!("not looked at: this machine has a CUDA driver");
    }
    insta::assert_snapshot!(problem, @"
    error[cuda::no_driver]: there is no CUDA driver: libcuda.so.1 is not found
    help: install NVIDIA's driver, 525 or later
    help: or run on the CPU: `--device cpu`
    ");
}
