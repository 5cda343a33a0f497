//! Side by side, failing, panicking, stopping.

use crate::bench::{Bench, chain, speak};
use pipe::exec::{Options, Task};
use pipe::plan::Cell;
use pipe::problem::{Exit, Problem};
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

fn boom(cell: &Cell, task: &Task) -> Result<(), Problem> {
    if cell.stage == "bad" { Err(Problem::new("test::boom", "it went off")) } else { speak(cell, task) }
}

#[test]
fn two_jobs_run_at_the_same_time() {
    let bench = Bench::new();
    let plan = bench.plan(&[("a", json!({"say": "a"}), &[]), ("b", json!({"say": "b"}), &[])]);
    let (here, met) = (Mutex::new(0), Condvar::new());
    let meet = |cell: &Cell, task: &Task| {
        let mut here = here.lock().unwrap();
        *here += 1;
        met.notify_all();
        // Alone, it would wait in vain.
        let (here, late) = met.wait_timeout_while(here, Duration::from_secs(20), |here| *here < 2).unwrap();
        drop(here);
        if late.timed_out() { Err(Problem::new("test::alone", "nobody came")) } else { speak(cell, task) }
    };
    let told = bench.run_with(&plan, &Options { jobs: 2, ..Options::default() }, &meet);
    assert_eq!(told.words(), ["a ran", "b ran"]);
}

#[test]
fn cells_with_the_same_fingerprint_are_computed_once() {
    let bench = Bench::new();
    let same = json!({"say": "same"});
    let names = ["a", "b", "c", "d"];
    let plan = bench.plan(&names.map(|name| (name, same.clone(), &[][..])));
    let runs = AtomicUsize::new(0);
    let count = |cell: &Cell, task: &Task| {
        runs.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        speak(cell, task)
    };
    for force in [vec![], vec![0, 1, 2, 3]] {
        let options = Options { jobs: 4, force: force.into_iter().collect(), ..Options::default() };
        let told = bench.run_with(&plan, &options, &count);
        assert_eq!(told.words().iter().filter(|word| word.ends_with("ran")).count(), 1);
        assert_eq!(told.words().iter().filter(|word| word.ends_with("fresh")).count(), 3);
    }
    assert_eq!(runs.load(Ordering::SeqCst), 2);
}

#[test]
fn a_cell_that_waits_for_another_process_holds_nobody_up() {
    let bench = Bench::new();
    let plan = bench.plan(&[("held", json!({"say": "h"}), &[]), ("free", json!({"say": "f"}), &[])]);
    let survey = bench.status(&plan);
    let Some(pipe::exec::Status::Stale { fingerprint, .. }) = &survey.statuses[0] else { panic!() };
    let other = bench.store();
    let session = other.session().unwrap();
    let claim = match other.claim(&fingerprint.digest(), "held").unwrap() {
        pipe::store::Claimed::Mine(claim) => Mutex::new(Some(claim)),
        pipe::store::Claimed::Held(holder) => panic!("{holder}"),
    };
    // One job: were it to sit and wait for `held`, `free` would never let go of it.
    let lets_go = |cell: &Cell, task: &Task| {
        drop(claim.lock().unwrap().take());
        speak(cell, task)
    };
    let told = bench.run_with(&plan, &Options::default(), &lets_go);
    assert_eq!(told.words(), ["held ran", "free ran"]);
    let waits: Vec<_> = told.events.iter().filter(|event| event.starts_with("WaitsForLock")).collect();
    assert_eq!(waits.len(), 1, "said once: {waits:?}");
    drop(session);
}

#[test]
fn many_cells_on_many_threads_give_the_bytes_of_one() {
    let texts = [1, 8].map(|jobs| {
        let bench = Bench::new();
        let names: Vec<String> = (0..40).map(|n| format!("n{n}")).collect();
        let stages: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(n, name)| {
                let needs: Vec<&str> = [n / 2, n / 3].iter().filter(|&&m| m < n).map(|&m| names[m].as_str()).collect();
                (name.as_str(), json!({"say": n.to_string()}), needs)
            })
            .collect();
        let stages: Vec<_> = stages.iter().map(|(name, params, needs)| (*name, params.clone(), &needs[..])).collect();
        let told = bench.run_with(&bench.plan(&stages), &Options { jobs, ..Options::default() }, &speak);
        assert!(told.words().iter().all(|word| word.ends_with("ran")));
        bench.assert_sound();
        (0..40).map(|cell| bench.text(&told, cell)).collect::<Vec<_>>()
    });
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn what_depends_on_a_failure_is_skipped_and_the_rest_does_not_start() {
    let bench = Bench::new();
    let plan = bench.plan(&[
        ("bad", json!({}), &[]),
        ("child", json!({"say": "c"}), &["bad"]),
        ("grandchild", json!({"say": "g"}), &["child"]),
        ("other", json!({"say": "o"}), &[]),
    ]);
    let told = bench.run_with(&plan, &Options::default(), &boom);
    assert_eq!(told.words(), ["bad failed", "child skipped", "grandchild skipped", "other not started"]);
    assert_eq!((told.problem().code, told.report.exit()), ("test::boom", Some(Exit::Failed)));
    let told = bench.run_with(&plan, &Options { keep_going: true, ..Options::default() }, &boom);
    assert_eq!(told.words(), ["bad failed", "child skipped", "grandchild skipped", "other ran"]);
    assert_eq!(told.report.exit(), Some(Exit::Failed));
    assert_eq!(bench.run(&plan).words(), ["bad ran", "child ran", "grandchild ran", "other fresh"]);
}

#[test]
fn a_panic_is_a_failed_stage_with_its_name() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({}));
    let panics = |_: &Cell, _: &Task| -> Result<(), Problem> { panic!("index out of bounds") };
    let told = bench.run_with(&plan, &Options::default(), &panics);
    assert_eq!(told.words(), ["tokens failed", "train skipped", "score skipped"]);
    assert_eq!(told.problem().code, "exec::panic");
    assert_eq!(told.problem().message, "`tokens` panicked: index out of bounds");
    assert_eq!(bench.run(&plan).words(), ["tokens ran", "train ran", "score ran"]);
}

#[test]
fn a_stage_that_leaves_no_file_has_failed() {
    let bench = Bench::new();
    let plan = bench.plan(&[("idle", json!({}), &[])]);
    let told = bench.run_with(&plan, &Options::default(), &|_: &Cell, _: &Task| Ok(()));
    assert_eq!(told.problem().code, "exec::no_output");
}

#[test]
fn an_interrupted_stage_resumes_from_its_work_folder() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    let step = |cell: &Cell, task: &Task| {
        if cell.stage != "train" {
            return speak(cell, task);
        }
        let checkpoint = task.work.join("checkpoint");
        if checkpoint.exists() {
            assert_eq!(std::fs::read_dir(task.out).unwrap().count(), 0, "the half-made output is gone");
            return speak(cell, task);
        }
        std::fs::write(&checkpoint, "step 7").unwrap();
        std::fs::write(task.out.join("half"), "made").unwrap();
        task.stop.store(true, Ordering::SeqCst);
        Err(Problem::new("exec::interrupted", "stopped").exit(Exit::Interrupted))
    };
    let told = bench.run_with(&plan, &Options::default(), &step);
    assert_eq!(told.words(), ["tokens ran", "train interrupted", "score not started"]);
    assert_eq!(told.report.exit(), Some(Exit::Interrupted));
    bench.stop.store(false, Ordering::SeqCst);
    let told = bench.run_with(&plan, &Options::default(), &step);
    assert_eq!(told.words(), ["tokens fresh", "train ran", "score ran"]);
    assert!(told.events.iter().any(|event| event.contains("cell: 1") && event.contains("resumes: true")));
    assert_eq!(bench.text(&told, 2), "s:t:hello");
    bench.assert_sound();
}

#[test]
fn a_failed_stage_keeps_its_checkpoints_and_drops_its_output() {
    let bench = Bench::new();
    let plan = bench.plan(&[("train", json!({}), &[])]);
    let nan = |_: &Cell, task: &Task| {
        std::fs::write(task.work.join("checkpoint"), "good").unwrap();
        std::fs::write(task.out.join("half"), "made").unwrap();
        Err(Problem::new("train::not_finite", "the loss is not finite at step 9"))
    };
    bench.run_with(&plan, &Options::default(), &nan);
    let work = bench.cache().join("work");
    let left: Vec<_> = crate::bench::files(&work);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(std::fs::read_to_string(&left[0]).unwrap(), "good");
}

#[test]
fn stopping_between_two_stages_is_an_interruption_too() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "x"}));
    let stop_after = |cell: &Cell, task: &Task| {
        task.stop.store(true, Ordering::SeqCst);
        speak(cell, task)
    };
    let told = bench.run_with(&plan, &Options::default(), &stop_after);
    assert_eq!(told.words(), ["tokens ran", "train not started", "score not started"]);
    assert_eq!(told.report.exit(), Some(Exit::Interrupted));
}

#[test]
fn the_log_and_the_record_tell_the_story_of_a_run() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    let warns = |cell: &Cell, task: &Task| {
        task.progress.begin(1, "steps");
        task.progress.warn("3 rows dropped");
        std::thread::sleep(std::time::Duration::from_millis(5));
        speak(cell, task)
    };
    let told = bench.run_with(&plan, &Options::default(), &warns);
    let log = std::fs::read_to_string(told.report.folder.join("events.jsonl")).unwrap();
    let events: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names[..4], ["begun", "started", "warned", "ran"]);
    assert_eq!(names[names.len() - 1], "ended");
    let written: serde_json::Value =
        serde_json::from_slice(&std::fs::read(told.report.folder.join("plan.json")).unwrap()).unwrap();
    assert_eq!(written["cells"][0]["params"]["say"], "hello");
    let store = bench.store();
    let fingerprint = store.last("train", "say").unwrap();
    let record = store.record(&fingerprint).unwrap();
    assert_eq!(record.warnings, ["3 rows dropped"]);
    assert_eq!(record.inputs["from"][0].cell, "tokens");
    assert_eq!(record.run, told.report.id);
    assert!(record.measured.wall_s >= 0.005 && record.machine.contains_key("architecture"));
}
