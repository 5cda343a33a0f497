//! Killed, stopped, run twice at once: finished work survives and the end is the same.

use super::{MANIFEST, Study};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Enough steps to be caught in the middle, and a state to resume from after every one of them.
fn long_study() -> Study {
    let study = Study::small();
    let text = MANIFEST
        .replace("max_steps = 12", "max_steps = 300\nresume_every_s = 0")
        .replace("save_every_steps = 4", "save_every_steps = 100");
    study.write("study.toml", &text);
    study
}

#[test]
fn training_killed_again_and_again_ends_with_the_same_bytes() {
    let study = long_study();
    study.ok(&["run", "study.toml", "sft", "--cache", "calm"]);
    let mut kills = 0;
    for round in 0..60u64 {
        let mut child = study
            .pipe(&["run", "study.toml", "sft", "--cache", "storm"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("pipe starts");
        let until = Instant::now() + Duration::from_millis(60 + 45 * (round % 9));
        let mut ended = None;
        while ended.is_none() && Instant::now() < until {
            sleep(Duration::from_millis(5));
            ended = child.try_wait().expect("a child");
        }
        if let Some(status) = ended {
            assert!(status.success());
            break;
        }
        child.kill().expect("SIGKILL");
        child.wait().expect("reaped");
        kills += 1;
    }
    assert!(kills > 0, "the run was never caught");
    study.ok(&["run", "study.toml", "sft", "--cache", "storm"]);
    assert_eq!(study.exported("calm", "sft"), study.exported("storm", "sft"));
    study.ok(&["cache", "verify", "--cache", "storm"]);
}

#[test]
fn ctrl_c_exits_130_and_the_next_run_goes_on_from_there() {
    let study = long_study();
    let child = study
        .pipe(&["run", "study.toml", "sft"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("pipe starts");
    let resume = Instant::now();
    while !has_state(&study) {
        assert!(resume.elapsed() < Duration::from_secs(60), "no state to resume from appeared");
        sleep(Duration::from_millis(5));
    }
    // SAFETY: kill(2) on a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let output = child.wait_with_output().expect("a child");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let again = study.output(&["run", "study.toml", "sft"]);
    let stderr = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success() && stderr.contains("resumed after step"), "{stderr}");
}

fn has_state(study: &Study) -> bool {
    let Ok(work) = std::fs::read_dir(study.path("cache/work")) else { return false };
    work.flatten().any(|folder| {
        let state = find(&folder.path(), "resume");
        state.is_some_and(|state| std::fs::read_dir(state).is_ok_and(|mut files| files.next().is_some()))
    })
}

fn find(dir: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        if entry.file_name() == name {
            return Some(entry.path());
        }
        if let Some(found) = find(&entry.path(), name) {
            return Some(found);
        }
    }
    None
}

/// The second one ends the process where it stands, without waiting for the stage; that is as good as a kill.
#[test]
fn ctrl_c_twice_ends_at_once_and_loses_nothing_finished() {
    // A step may end between the two: then the run does as after one. That this happens every time is the fault.
    let cut_short = (0..10).any(|_| {
        let study = long_study();
        interrupt_twice(&study);
        let events = find(&study.path("cache"), "events.jsonl").expect("the log of the run");
        let events = std::fs::read_to_string(events).expect("events");
        study.ok(&["run", "study.toml", "sft"]);
        study.ok(&["cache", "verify"]);
        !events.contains("\"ended\"")
    });
    assert!(cut_short, "the second Ctrl-C never ended the process");
}

fn interrupt_twice(study: &Study) {
    let child = study
        .pipe(&["run", "study.toml", "sft"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("pipe starts");
    let begun = Instant::now();
    while !has_state(study) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no state to resume from appeared");
        sleep(Duration::from_millis(5));
    }
    for _ in 0..2 {
        // SAFETY: kill(2) on a child that has not been waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().expect("a child");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn two_runs_at_once_train_once() {
    let study = long_study();
    let start =
        || study.pipe(&["run", "study.toml", "sft", "--json"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let children = [start().expect("pipe starts"), start().expect("pipe starts")];
    let mut trained = 0;
    for child in children {
        let output = child.wait_with_output().expect("a child");
        assert!(output.status.success());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        trained += text.lines().filter(|line| line.contains("\"ran\"") && line.contains("\"sft\"")).count();
    }
    assert_eq!(trained, 1, "both runs trained, or neither says it did");
}

/// At this rate each step's decay multiplies the weights by -99, so they leave f32 within twenty.
#[test]
fn a_loss_that_is_not_a_number_names_the_step_and_keeps_the_state_before_it() {
    let study = Study::small();
    let text = MANIFEST.replacen(
        "learning_rate = 5e-3",
        "learning_rate = 10.0\nresume_every_s = 0\noptimizer = { weight_decay = 10.0 }",
        1,
    );
    study.write("study.toml", &text.replace("max_steps = 12", "max_steps = 60"));
    let stderr = study.fails(1, &["run", "study.toml", "sft"]);
    assert!(stderr.contains("train::not_finite") && stderr.contains("at step "), "{stderr}");
    assert!(has_state(&study), "the last good state is gone");
}
