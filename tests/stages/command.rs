use crate::Bench;
use pipe::problem::Exit;
use pipe::stage::command::{KIND, run};
use serde_json::json;
use std::sync::atomic::Ordering;

#[test]
fn a_program_reads_its_inputs_and_its_declared_files_are_the_artifact() {
    let mut bench = Bench::empty();
    let data = bench.write("upstream/data.jsonl", "b\na\n");
    bench.give("from", "dataset", &[("data.jsonl", &data)]);
    let script = bench.write("outside/join.sh", "sort inputs/1/data.jsonl > out/sorted/lines.txt\necho done");
    bench.sources.insert("files.join.sh".into(), script);
    let params = json!({
        "command": ["sh", "-c", "mkdir out/sorted && . files/join.sh"],
        "files": {"join.sh": "path:join.sh"},
        "outputs": ["sorted/lines.txt", "log.txt"],
        "stdout": "log.txt",
    });
    bench.run(run, params).unwrap();
    assert_eq!(bench.outputs(), ["log.txt", "sorted/lines.txt"]);
    assert_eq!(bench.output("sorted/lines.txt"), "a\nb\n");
    assert_eq!(bench.output("log.txt"), "done\n");
}

#[test]
fn a_program_that_fails_is_quoted() {
    let bench = Bench::empty();
    let params =
        json!({"command": ["sh", "-c", "echo half > out/x; echo no such column: y >&2; exit 7"], "outputs": ["x"]});
    let problem = bench.run(run, params).unwrap_err();
    assert_eq!(problem.code, "command::failed");
    assert_eq!(problem.message, "`sh` ended with exit code 7");
    assert!(problem.notes[0].contains("no such column: y"), "{problem}");
    assert!(bench.outputs().is_empty(), "nothing of a failed program is kept");
}

#[test]
fn missing_and_undeclared_outputs_are_both_named() {
    let bench = Bench::empty();
    let params = json!({"command": ["sh", "-c", "echo > out/extra"], "outputs": ["wanted"]});
    let problem = bench.run(run, params).unwrap_err();
    assert_eq!(problem.code, "command::outputs");
    assert_eq!(problem.notes, ["missing below `out/`: `wanted`", "not declared: `extra`"]);
}

#[test]
fn a_link_is_not_taken_for_an_output() {
    let bench = Bench::empty();
    let params = json!({"command": ["ln", "-s", "/etc/hostname", "out/x"], "outputs": ["x"]});
    assert_eq!(bench.run(run, params).unwrap_err().code, "command::outputs");
}

#[test]
fn what_an_earlier_attempt_left_is_gone() {
    let bench = Bench::empty();
    let params = json!({"command": ["sh", "-c", "echo > out/x; exit 1"], "outputs": ["x"]});
    bench.run(run, params).unwrap_err();
    let params = json!({"command": ["true"], "outputs": ["x"]});
    assert_eq!(bench.run(run, params).unwrap_err().notes, ["missing below `out/`: `x`"]);
}

#[test]
fn a_program_that_is_not_there_is_missing_not_failed() {
    let bench = Bench::empty();
    let problem = bench.run(run, json!({"command": ["no-such-program-here"], "outputs": ["x"]})).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("command::start", Exit::Missing));
}

#[test]
fn a_time_out_ends_the_program_and_what_it_started() {
    let bench = Bench::empty();
    let script = "sh -c 'sleep 30; echo late > late' & sleep 30";
    let params = json!({"command": ["sh", "-c", script], "outputs": ["x"], "timeout_s": 1});
    let problem = bench.run(run, params).unwrap_err();
    assert_eq!(problem.code, "command::timeout");
    assert!(!group_is_alive(&bench), "the helper is gone too");
}

#[test]
fn a_stop_ends_the_program_as_an_interruption() {
    let bench = Bench::empty();
    bench.stop.store(true, Ordering::Relaxed);
    let problem = bench.run(run, json!({"command": ["sleep", "30"], "outputs": ["x"]})).unwrap_err();
    assert_eq!(problem.exit, Exit::Interrupted);
    assert!(!group_is_alive(&bench));
}

/// Whether any process keeps the private folder as its current one; a killed process needs a
/// moment until the system has taken it down, so this looks for a while before it says yes.
fn group_is_alive(bench: &Bench) -> bool {
    let folder = bench.path("work/run").canonicalize().unwrap();
    let alive = || {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        processes.filter_map(|process| std::fs::read_link(process.path().join("cwd")).ok()).any(|cwd| cwd == folder)
    };
    (0..200).all(|_| {
        std::thread::sleep(std::time::Duration::from_millis(25));
        alive()
    })
}

#[test]
fn only_named_variables_reach_the_program_and_their_values_no_message() {
    let bench = Bench::empty();
    let params = json!({
        "command": ["sh", "-c", "echo \"manifest dir: ${CARGO_MANIFEST_DIR:-absent}; $CARGO_PKG_DESCRIPTION\" >&2; exit 1"],
        "outputs": ["x"],
        "env": ["CARGO_PKG_DESCRIPTION"],
    });
    let problem = bench.run(run, params).unwrap_err();
    assert!(problem.notes[0].ends_with("manifest dir: absent; <CARGO_PKG_DESCRIPTION>"), "{problem}");
}

#[test]
fn a_named_variable_that_is_not_set_is_missing() {
    let bench = Bench::empty();
    let params = json!({"command": ["true"], "outputs": ["x"], "env": ["PIPE_TEST_NEVER_SET"]});
    let problem = bench.run(run, params).unwrap_err();
    assert_eq!((problem.code, problem.exit), ("command::env", Exit::Missing));
}

#[test]
fn rules_name_each_key_that_is_wrong() {
    let params = json!({
        "command": [], "outputs": ["../x", "a", "a"], "stdout": "b",
        "files": {"a/b": "path:c"}, "env": ["A=1"],
    });
    let broken = (KIND.rules)(params.as_object().unwrap());
    let keys: Vec<_> = broken.iter().map(|broken| broken.key).collect();
    assert_eq!(keys, ["command", "outputs", "outputs", "stdout", "files", "env"]);
}
