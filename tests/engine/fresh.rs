//! What runs again, what does not, and why.

use crate::bench::{Bench, blob_of, chain, speak, tamper};
use pipe::exec::{Options, Reason, Status, causes};
use pipe::store::{Disk, Store};
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn a_second_run_has_nothing_to_do_and_serves_the_same_bytes() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    let first = bench.run(&plan);
    assert_eq!(first.words(), ["tokens ran", "train ran", "score ran"]);
    let second = bench.run(&plan);
    assert_eq!(second.words(), ["tokens fresh", "train fresh", "score fresh"]);
    assert_eq!(bench.text(&second, 2), "s:t:hello");
    assert_eq!(second.report.exit(), None);
    bench.assert_sound();
}

#[test]
fn an_upstream_change_that_yields_the_same_bytes_stops_there() {
    let bench = Bench::new();
    bench.run(&chain(&bench, json!({"say": "hello"})));
    let told = bench.run(&chain(&bench, json!({"say": "hello", "aside": "changed"})));
    assert_eq!(told.words(), ["tokens ran", "train fresh", "score fresh"]);
}

#[test]
fn an_upstream_change_of_bytes_goes_all_the_way_down() {
    let bench = Bench::new();
    bench.run(&chain(&bench, json!({"say": "hello"})));
    let told = bench.run(&chain(&bench, json!({"say": "bye"})));
    assert_eq!(told.words(), ["tokens ran", "train ran", "score ran"]);
    assert_eq!(bench.text(&told, 2), "s:t:bye");
}

#[test]
fn revert_brings_the_old_result_back() {
    let bench = Bench::new();
    bench.run(&chain(&bench, json!({"say": "hello"})));
    bench.run(&chain(&bench, json!({"say": "bye"})));
    let told = bench.run(&chain(&bench, json!({"say": "hello"})));
    assert_eq!(told.words(), ["tokens fresh", "train fresh", "score fresh"]);
    assert_eq!(bench.text(&told, 2), "s:t:hello");
}

#[test]
fn why_compares_with_what_the_cell_was_last_even_after_a_revert() {
    let bench = Bench::new();
    for say in ["one", "two", "one"] {
        bench.run(&chain(&bench, json!({"say": say})));
    }
    assert_eq!(bench.why(&chain(&bench, json!({"say": "three"})), 0), [r#"say: "one" -> "three""#]);
}

#[test]
fn names_and_pace_are_no_reason_to_run_again() {
    let bench = Bench::new();
    bench.run(&bench.plan(&[("tokens", json!({"say": "x", "pace": "slow"}), &[])]));
    let told = bench.run(&bench.plan(&[("renamed", json!({"say": "x", "pace": "fast"}), &[])]));
    assert_eq!(told.words(), ["renamed fresh"]);
}

#[test]
fn only_the_root_is_stale_and_what_depends_on_it_waits() {
    let bench = Bench::new();
    bench.run(&chain(&bench, json!({"say": "hello"})));
    let changed = chain(&bench, json!({"say": "bye", "aside": "new"}));
    let survey = bench.status(&changed);
    assert!(matches!(survey.statuses[0], Some(Status::Stale { .. })));
    assert_eq!(bench.why(&changed, 0), [r#"aside: absent -> "new""#, r#"say: "hello" -> "bye""#]);
    assert_eq!(survey.statuses[1], Some(Status::Waits { on: vec![0], reasons: vec![] }));
    assert_eq!(survey.statuses[2], Some(Status::Waits { on: vec![1], reasons: vec![] }));
    assert_eq!(causes(&changed, &survey.statuses, 2), [0].into());
}

#[test]
fn a_waiting_cell_tells_its_own_changes_too() {
    let bench = Bench::new();
    let plan = |tokens: &str, train: &str| {
        bench.plan(&[("tokens", json!({"say": tokens}), &[]), ("train", json!({"say": train}), &["tokens"])])
    };
    bench.run(&plan("a", "b"));
    assert_eq!(bench.why(&plan("c", "d"), 1), [r#"say: "b" -> "d""#]);
    assert!(bench.why(&plan("c", "b"), 1).is_empty());
}

#[test]
fn a_cell_without_a_past_is_compared_with_its_nearest_kin() {
    let bench = Bench::new();
    let far = json!({"say": "x", "aside": "y"});
    bench.run(&bench.plan(&[("near", json!({"say": "x"}), &[]), ("far", far, &[])]));
    let why = bench.why(&bench.plan(&[("new", json!({"say": "z"}), &[])]), 0);
    assert_eq!(why, [r#"never run; nearest is near: say: "x" -> "z""#]);
    let elsewhere = Bench::new();
    assert_eq!(elsewhere.why(&elsewhere.plan(&[("new", json!({}), &[])]), 0), ["never run"]);
}

#[test]
fn status_says_what_run_does() {
    let bench = Bench::new();
    bench.run(&chain(&bench, json!({"say": "hello"})));
    let changed = chain(&bench, json!({"say": "hello", "aside": "x"}));
    let before = bench.status(&changed);
    let options = Options { dry_run: true, ..Options::default() };
    let dry = bench.run_with(&changed, &options, &speak);
    assert_eq!(dry.words(), ["tokens not started", "train not started", "score not started"]);
    assert_eq!(dry.report.before.statuses, before.statuses);
    assert_eq!(dry.report.exit(), None);
    assert_eq!(bench.run(&changed).report.before.statuses, before.statuses);
}

#[test]
fn a_lost_or_bent_index_costs_time_and_nothing_else() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    bench.run(&plan);
    let index = bench.cache().join("index");
    let whole = std::fs::read(&index).unwrap();
    let mut bent = whole.clone();
    bent[whole.len() / 2] ^= 1;
    for bytes in [None, Some(&whole[..whole.len() - 7]), Some(&bent[..]), Some(b""), Some(b"pipe index 1\n")] {
        match bytes {
            None => std::fs::remove_file(&index).unwrap(),
            Some(bytes) => std::fs::write(&index, bytes).unwrap(),
        }
        assert_eq!(bench.run(&plan).words(), ["tokens fresh", "train fresh", "score fresh"]);
        assert_eq!(bench.why(&chain(&bench, json!({"say": "bye"})), 0), [r#"say: "hello" -> "bye""#]);
    }
}

#[test]
fn a_record_with_flipped_bytes_is_found_and_made_again() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    bench.run(&plan);
    let record = crate::bench::files(&bench.cache().join("stages")).remove(0);
    let text = std::fs::read_to_string(&record).unwrap().replace("\"say\"", "\"sax\"");
    tamper(&record, text.as_bytes());
    let checked = bench.store().verify_all(|_| {});
    assert_eq!(checked.damaged.len(), 1, "{checked:?}");
    let told = bench.run(&plan);
    assert_eq!(told.words().iter().filter(|word| word.ends_with("ran")).count(), 1);
    bench.assert_sound();
}

#[test]
fn flipped_bytes_of_an_input_are_found_named_and_made_again() {
    let bench = Bench::new();
    bench.run(&chain(&bench, json!({"say": "hello"})));
    tamper(&blob_of(&bench.cache(), "t:hello"), b"t:jello");
    let changed = bench.plan(&[
        ("tokens", json!({"say": "hello"}), &[]),
        ("train", json!({"say": "t:"}), &["tokens"]),
        ("score", json!({"say": "S:"}), &["train"]),
    ]);
    let told = bench.run(&changed);
    assert_eq!(told.words(), ["tokens fresh", "train ran", "score ran"]);
    assert_eq!(bench.text(&told, 2), "S:t:hello");
    let damaged: Vec<_> = told.events.iter().filter(|event| event.starts_with("Damaged")).collect();
    assert!(damaged.len() == 1 && damaged[0].contains("its bytes are now those of"), "{damaged:?}");
    assert_eq!(crate::bench::names(&bench.cache().join("quarantine")).len(), 1);
    bench.assert_sound();
}

#[test]
fn two_cells_that_find_the_same_damage_have_it_mended_once() {
    let bench = Bench::new();
    let plan = |say: &str| {
        let tokens = ("tokens", json!({"say": "hello"}), &[][..]);
        bench.plan(&[
            tokens,
            ("a", json!({"say": format!("a{say}")}), &["tokens"]),
            ("b", json!({"say": format!("b{say}")}), &["tokens"]),
        ])
    };
    for round in 0..10 {
        bench.run(&plan(&round.to_string()));
        tamper(&blob_of(&bench.cache(), "hello"), b"jello");
        let (next, runs) = (plan(&format!("{round}x")), AtomicUsize::new(0));
        let count = |cell: &pipe::plan::Cell, task: &pipe::exec::Task| {
            runs.fetch_add(usize::from(cell.stage == "tokens"), Ordering::SeqCst);
            speak(cell, task)
        };
        let told = bench.run_with(&next, &Options { jobs: 2, ..Options::default() }, &count);
        assert_eq!(told.words(), ["tokens ran", "a ran", "b ran"]);
        assert_eq!(runs.load(Ordering::SeqCst), 1, "round {round}");
    }
    bench.assert_sound();
}

#[test]
fn a_disk_that_damages_everything_is_blamed_in_the_end() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    let blob = blob_of(&bench.cache(), "hello");
    let disk = Disk::watched(std::sync::Arc::new(move |step, _| {
        // Right after each publication, for the index is appended to then.
        if step == "append" && blob.exists() {
            tamper(&blob, b"jello");
        }
        Ok(())
    }));
    let store = Store::open_on(&bench.cache(), disk).unwrap();
    let told = crate::bench::run_in(&store, &plan, &Options::default(), &speak, &bench.stop).unwrap();
    assert_eq!(told.words(), ["tokens ran", "train failed", "score skipped"]);
    assert_eq!(told.problem().code, "store::damaged");
    assert_eq!(told.events.iter().filter(|event| event.starts_with("Damaged")).count(), 4);
}

#[test]
fn flipped_bytes_of_what_is_printed_are_never_served() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    bench.run(&plan);
    tamper(&blob_of(&bench.cache(), "s:t:hello"), b"s:t:jello");
    let told = bench.run_with(&plan, &Options { serve: [2].into(), ..Options::default() }, &speak);
    assert_eq!(told.words(), ["tokens fresh", "train fresh", "score ran"]);
    assert_eq!(bench.text(&told, 2), "s:t:hello");
}

#[test]
fn a_blob_cut_short_or_gone_is_seen_without_reading_it() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    bench.run(&plan);
    let blob = blob_of(&bench.cache(), "t:hello");
    tamper(&blob, b"t:");
    let survey = bench.status(&plan);
    let Some(Status::Stale { reasons, .. }) = &survey.statuses[1] else { panic!("{:?}", survey.statuses[1]) };
    assert!(matches!(&reasons[0], Reason::Damaged(damage) if damage[0].what == "expected 7 bytes, found 2"));
    assert_eq!(bench.run(&plan).words(), ["tokens fresh", "train ran", "score fresh"]);
    std::fs::remove_file(&blob).unwrap();
    assert_eq!(bench.run(&plan).words(), ["tokens fresh", "train ran", "score fresh"]);
    bench.assert_sound();
}

#[test]
fn the_first_result_wins_the_second_is_kept_and_it_is_said() {
    let bench = Bench::new();
    let plan = bench.plan(&[("dice", json!({}), &[]), ("after", json!({"say": "a:"}), &["dice"])]);
    let throws = AtomicUsize::new(0);
    let dice = |cell: &pipe::plan::Cell, task: &pipe::exec::Task| {
        if cell.stage == "after" {
            return speak(cell, task);
        }
        std::fs::write(task.out.join("text"), throws.fetch_add(1, Ordering::SeqCst).to_string()).unwrap();
        Ok(())
    };
    bench.run_with(&plan, &Options::default(), &dice);
    let forced = Options { force: [0].into(), ..Options::default() };
    for kept in 1..=2 {
        let told = bench.run_with(&plan, &forced, &dice);
        assert_eq!(told.words(), ["dice ran, differs", "after fresh"]);
        assert_eq!(bench.text(&told, 0), "0");
        let Some(Status::Stale { fingerprint, .. }) = &told.report.before.statuses[0] else { panic!() };
        assert_eq!(bench.store().other_results(&fingerprint.digest()).len(), kept);
    }
    assert_eq!(throws.load(Ordering::SeqCst), 3);
    bench.assert_sound();
}

#[test]
fn force_runs_a_fresh_cell_once_and_equal_bytes_go_no_further() {
    let bench = Bench::new();
    let plan = chain(&bench, json!({"say": "hello"}));
    bench.run(&plan);
    let told = bench.run_with(&plan, &Options { force: [0].into(), ..Options::default() }, &speak);
    assert_eq!(told.words(), ["tokens ran", "train fresh", "score fresh"]);
    assert!(told.events.iter().any(|event| event.starts_with("Started") && event.contains("Forced")));
}

#[test]
fn gc_drops_what_is_not_kept_and_the_rest_stays_whole() {
    let bench = Bench::new();
    let (old, new) = (chain(&bench, json!({"say": "old"})), chain(&bench, json!({"say": "new"})));
    bench.run(&old);
    bench.run(&new);
    let status = bench.status(&new);
    let keep = status.statuses.iter().flatten().map(|status| match status {
        Status::Fresh { fingerprint, .. } => fingerprint.digest(),
        other => panic!("{other:?}"),
    });
    let keep = pipe::store::Keep { fingerprints: Some(keep.collect()), runs: 1, ..Default::default() };
    let would = bench.store().gc(&keep, true).unwrap();
    assert_eq!(bench.run(&old).words(), ["tokens fresh", "train fresh", "score fresh"]);
    let did = bench.store().gc(&keep, false).unwrap();
    assert_eq!((would.records, would.blobs, would.runs), (3, 3, 1));
    assert_eq!((did.records, did.blobs, did.runs), (3, 3, 2));
    assert_eq!(bench.run(&new).words(), ["tokens fresh", "train fresh", "score fresh"]);
    bench.assert_sound();
    assert_eq!(bench.run(&old).words(), ["tokens ran", "train ran", "score ran"]);
}
