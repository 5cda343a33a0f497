//! Files outside: not there, moving, younger than the clock can tell.

use crate::bench::{Bench, speak};
use pipe::exec::{Options, Task};
use pipe::plan::Cell;
use pipe::problem::Exit;
use serde_json::json;
use std::fs;

#[test]
fn all_missing_sources_are_told_at_once_and_no_stage_runs() {
    let bench = Bench::new();
    let plan = bench.plan(&[
        ("fine", json!({"say": "x"}), &[]),
        ("one", json!({"source": "path:one.txt"}), &[]),
        ("two", json!({"source": "path:two.txt"}), &["one"]),
        ("again", json!({"source": "path:one.txt"}), &[]),
    ]);
    let never = |_: &Cell, _: &Task| panic!("a stage ran");
    let problems = bench.try_run(&plan, &Options::default(), &never).err().expect("missing");
    let told: Vec<_> = problems.iter().map(|problem| (problem.code, problem.exit)).collect();
    assert_eq!(told, [("source::not_found", Exit::Missing); 2]);
    assert!(problems[0].message.contains("one.txt") && problems[1].message.contains("two.txt"));
}

#[test]
fn a_source_counts_by_content_not_by_name_or_time() {
    let bench = Bench::new();
    let plan = |name: &str| bench.plan(&[("read", json!({"source": format!("path:{name}")}), &[])]);
    fs::write(bench.path("a"), "text").unwrap();
    bench.run(&plan("a"));
    fs::rename(bench.path("a"), bench.path("b")).unwrap();
    assert_eq!(bench.run(&plan("b")).words(), ["read fresh"]);
    fs::write(bench.path("b"), "text").unwrap();
    assert_eq!(bench.run(&plan("b")).words(), ["read fresh"]);
    fs::write(bench.path("b"), "test").unwrap();
    assert_eq!(bench.run(&plan("b")).words(), ["read ran"]);
}

#[test]
fn a_source_that_moved_while_the_stage_ran_publishes_nothing() {
    let bench = Bench::new();
    let source = bench.path("data.txt");
    fs::write(&source, "before").unwrap();
    let plan = bench.plan(&[("read", json!({"source": "path:data.txt"}), &[])]);
    let meddle = |cell: &Cell, task: &Task| {
        speak(cell, task)?;
        fs::write(&source, "behind").unwrap();
        Ok(())
    };
    let told = bench.run_with(&plan, &Options::default(), &meddle);
    assert_eq!(told.words(), ["read failed"]);
    assert_eq!((told.problem().code, told.report.exit()), ("exec::input_changed", Some(Exit::Failed)));
    assert!(crate::bench::files(&bench.cache().join("stages")).is_empty());
    let told = bench.run(&plan);
    assert_eq!(told.words(), ["read ran"]);
    assert_eq!(bench.text(&told, 0), "behind");
}

#[test]
fn a_write_in_the_same_tick_with_the_old_mtime_is_seen() {
    let bench = Bench::new();
    let file = bench.path("file");
    let store = bench.store();
    fs::write(&file, "0000").unwrap();
    let mtime = fs::metadata(&file).unwrap().modified().unwrap();
    let mut before = store.digest_source(&file).unwrap().0;
    for round in 1..300 {
        fs::write(&file, format!("{round:04}")).unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_modified(mtime).unwrap();
        let now = store.digest_source(&file).unwrap().0;
        assert!(now != before, "round {round}");
        before = now;
    }
}

#[test]
fn the_digest_of_a_settled_file_is_remembered_and_of_a_young_one_is_not() {
    let bench = Bench::new();
    let (old, young) = (bench.path("old"), bench.path("young"));
    fs::write(&old, "old").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(80));
    fs::write(&young, "young").unwrap();
    let store = bench.store();
    let _session = store.session().unwrap();
    let digest = store.digest_source(&old).unwrap().0;
    store.digest_source(&young).unwrap();
    store.flush().unwrap();
    let remembered = fs::read_to_string(bench.cache().join("stat")).unwrap();
    assert!(remembered.contains(&digest.to_string()));
    assert_eq!(remembered.lines().count(), 1, "{remembered}");
}

#[test]
fn a_folder_counts_by_the_names_and_bytes_of_its_files() {
    let bench = Bench::new();
    let store = bench.store();
    let folder = bench.path("folder");
    let digest = || store.digest_source(&folder).map(|(digest, _)| digest);
    fs::create_dir_all(folder.join("sub")).unwrap();
    assert_eq!(digest().unwrap_err().code, "source::empty");
    fs::write(folder.join("sub/a"), "1").unwrap();
    let one = digest().unwrap();
    fs::rename(folder.join("sub/a"), folder.join("sub/b")).unwrap();
    let renamed = digest().unwrap();
    fs::rename(folder.join("sub/b"), folder.join("sub/a")).unwrap();
    assert!(one != renamed && one == digest().unwrap());
    std::os::unix::fs::symlink(&folder, folder.join("loop")).unwrap();
    assert_eq!(digest().unwrap_err().code, "store::odd_file");
}

#[test]
fn links_and_shared_files_in_an_output_become_copies_of_our_own() {
    let bench = Bench::new();
    let outside = bench.path("outside");
    fs::write(&outside, "shared").unwrap();
    let plan = bench.plan(&[("link", json!({}), &[])]);
    let link = |_: &Cell, task: &Task| {
        std::os::unix::fs::symlink(&outside, task.out.join("text")).unwrap();
        fs::hard_link(&outside, task.out.join("hard")).unwrap();
        Ok(())
    };
    let told = bench.run_with(&plan, &Options::default(), &link);
    fs::write(&outside, "meddled").unwrap();
    assert_eq!(bench.text(&told, 0), "shared");
    bench.assert_sound();
    let bad = |_: &Cell, task: &Task| {
        std::os::unix::fs::symlink("nowhere", task.out.join("text")).unwrap();
        Ok(())
    };
    let told = bench.run_with(&bench.plan(&[("dangling", json!({"say": "d"}), &[])]), &Options::default(), &bad);
    assert_eq!(told.problem().code, "store::odd_file");
}
