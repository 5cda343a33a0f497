//! Kill -9 at every step, a full disk at every step, two runs at once, a folder that cannot be
//! written. Child processes are this test binary, entered at [`child`].

use crate::bench::{Bench, chain, files, names, run_in, speak};
use pipe::exec::{Options, Task};
use pipe::plan::Cell;
use pipe::problem::{Exit, Problem};
use pipe::store::{Disk, Store};
use serde_json::json;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How a child behaves, by the variable `PIPE_TEST_CHILD`: what to do, and a number.
const CHILD: &str = "PIPE_TEST_CHILD";

fn spawn(bench: &Bench, role: &str) -> Child {
    command(bench, role).spawn().unwrap()
}

fn command(bench: &Bench, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--ignored", "--exact", "crash::child", "--nocapture"])
        .env(CHILD, role)
        .env("PIPE_TEST_DIR", bench.dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn kill_myself() -> ! {
    let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
    unreachable!("killed")
}

fn killed(child: &mut Child) -> bool {
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(9), "{status}");
    status.signal() == Some(9)
}

/// Waits for something another process does. Gives up loudly.
fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let began = Instant::now();
    while !happened() {
        assert!(began.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "entry of the child processes of the other tests"]
fn child() {
    let role = std::env::var(CHILD).expect("started by another test");
    let dir = PathBuf::from(std::env::var("PIPE_TEST_DIR").unwrap());
    let (role, number) = role.split_once(' ').unwrap();
    let number: usize = number.parse().unwrap();
    let bench = Bench::new();
    let tokens = crate::bench::plan(&dir, &[("tokens", json!({"say": "hello"}), &[])]);
    let chain = crate::bench::plan(
        &dir,
        &[
            ("tokens", json!({"say": "hello"}), &[]),
            ("train", json!({"say": "t:"}), &["tokens"]),
            ("score", json!({"say": "s:"}), &["train"]),
        ],
    );
    let store = Store::open(&dir.join("cache")).unwrap();
    let count = |cell: &Cell, task: &Task| {
        fs::write(dir.join(format!("ran-{}-{}", cell.stage, std::process::id())), "").unwrap();
        speak(cell, task)
    };
    match role {
        // Kills itself before the step of this number that would change the disk.
        "dies-at-step" => {
            let steps = AtomicUsize::new(0);
            let disk = Disk::watched(Arc::new(move |_, _| {
                if steps.fetch_add(1, Ordering::SeqCst) == number {
                    kill_myself();
                }
                Ok(())
            }));
            let store = Store::open_on(&dir.join("cache"), disk).unwrap();
            run_in(&store, &chain, &Options::default(), &count, &bench.stop).unwrap();
        }
        // Kills itself in the middle of the stage `train`, its checkpoint written.
        "dies-in-stage" => {
            let dies = |cell: &Cell, task: &Task| {
                if cell.stage == "train" {
                    fs::write(task.work.join("checkpoint"), "step 7").unwrap();
                    fs::write(task.out.join("half"), "made").unwrap();
                    kill_myself();
                }
                speak(cell, task)
            };
            run_in(&store, &chain, &Options::default(), &dies, &bench.stop).unwrap();
        }
        // Works as fast as it can until somebody kills it.
        "works" => {
            for round in 0.. {
                let say = json!({"say": format!("{number}.{round}")});
                let plan = crate::bench::plan(&dir, &[("a", say, &[]), ("b", json!({"say": "b"}), &["a"])]);
                let told =
                    run_in(&store, &plan, &Options { jobs: 2, ..Options::default() }, &speak, &bench.stop).unwrap();
                fs::write(dir.join("done"), format!("{number}.{round}")).unwrap();
                assert_eq!(told.report.exit(), None);
            }
        }
        // Holds the stage until the file `go` is there.
        "slow" => {
            let slow = |cell: &Cell, task: &Task| {
                count(cell, task)?;
                fs::write(dir.join("holding"), "").unwrap();
                wait_until("go", || dir.join("go").exists());
                Ok(())
            };
            let told = run_in(&store, &tokens, &Options::default(), &slow, &bench.stop).unwrap();
            assert_eq!(told.words(), ["tokens ran"]);
        }
        "second" => {
            let told = run_in(&store, &tokens, &Options::default(), &count, &bench.stop).unwrap();
            assert_eq!(told.words(), ["tokens fresh"]);
        }
        // As another user: everything may be read, nothing written.
        "reads" => {
            let told = run_in(&store, &tokens, &Options::default(), &speak, &bench.stop).unwrap();
            assert_eq!(told.words(), ["tokens fresh"]);
            assert_eq!(told.report.id, "");
            let dry = Options { dry_run: true, ..Options::default() };
            let told = run_in(&store, &chain, &dry, &speak, &bench.stop).unwrap();
            assert_eq!(told.words(), ["tokens fresh", "train not started", "score not started"]);
            assert!(store.record(&store.last("tokens", "say").unwrap()).is_some());
            let problems = run_in(&store, &chain, &Options::default(), &speak, &bench.stop).err().expect("read-only");
            assert_eq!((problems[0].code, problems[0].exit), ("store::read_only", Exit::Missing));
        }
        // On a small disk of its own.
        "fills" => {
            let big = |cell: &Cell, task: &Task| {
                speak(cell, task)?;
                if cell.stage == "train" {
                    fs::write(task.out.join("big"), vec![7u8; number])
                        .map_err(|e| Problem::io("test::write", "write", task.out, &e))?;
                }
                Ok(())
            };
            let told = run_in(&store, &chain, &Options::default(), &big, &bench.stop).unwrap();
            assert_eq!(told.words()[..2], ["tokens ran", "train failed"]);
            let told = run_in(&store, &chain, &Options::default(), &speak, &bench.stop).unwrap();
            assert_eq!(told.words(), ["tokens fresh", "train ran", "score ran"]);
            let checked = store.verify_all(|_| {});
            assert!(checked.damaged.is_empty() && checked.lost.is_empty(), "{checked:?}");
        }
        other => panic!("no role `{other}`"),
    }
}

/// What was finished before a mishap is fresh after it, the rest runs, and all is sound.
fn recovers(bench: &Bench, mishap: &str) {
    let plan = chain(bench, json!({"say": "hello"}));
    let finished = files(&bench.cache().join("stages"))
        .iter()
        .filter(|file| file.extension().is_some_and(|e| e == "json"))
        .count();
    let checked = bench.store().verify_all(|_| {});
    assert!(checked.damaged.is_empty() && checked.lost.is_empty(), "{mishap}: {checked:?}");
    let told = bench.run(&plan);
    let fresh = told.words().iter().filter(|word| word.ends_with("fresh")).count();
    assert_eq!(fresh, finished, "{mishap}: {:?}", told.words());
    assert_eq!(told.report.exit(), None, "{mishap}");
    assert_eq!(bench.text(&told, 2), "s:t:hello", "{mishap}");
    bench.assert_sound();
    assert_eq!(names(&bench.cache().join("locks")), ["gc"], "{mishap}");
}

#[test]
fn kill_9_before_any_step_that_touches_the_disk_loses_nothing_finished() {
    let mut step = 0;
    loop {
        let bench = Bench::new();
        let died = killed(&mut spawn(&bench, &format!("dies-at-step {step}")));
        if !died {
            break;
        }
        recovers(&bench, &format!("killed before step {step}"));
        step += 1;
    }
    assert!(step > 30, "only {step} steps were seen");
}

#[test]
fn kill_9_during_a_stage_keeps_its_checkpoint_and_nothing_half_made() {
    let bench = Bench::new();
    assert!(killed(&mut spawn(&bench, "dies-in-stage 0")));
    let seen = AtomicBool::new(false);
    let resumes = |cell: &Cell, task: &Task| {
        assert_eq!(fs::read_dir(task.out).unwrap().count(), 0);
        if cell.stage == "train" {
            seen.store(task.work.join("checkpoint").exists(), Ordering::SeqCst);
        }
        speak(cell, task)
    };
    let told = bench.run_with(&chain(&bench, json!({"say": "hello"})), &Options::default(), &resumes);
    assert_eq!(told.words(), ["tokens fresh", "train ran", "score ran"]);
    assert!(seen.load(Ordering::SeqCst), "the checkpoint was kept");
    let artifact = told.report.artifact(1).unwrap();
    assert_eq!(artifact.entries.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["text"]);
    bench.assert_sound();
}

#[test]
fn a_worker_killed_at_random_times_again_and_again_never_breaks_the_store() {
    let bench = Bench::new();
    let random = pipe::random::Stream::new(7, 1);
    for life in 0..15 {
        let before = fs::read_to_string(bench.path("done")).unwrap_or_default();
        let mut child = spawn(&bench, &format!("works {life}"));
        wait_until("first round", || {
            fs::read_to_string(bench.path("done")).is_ok_and(|now| now != before && !now.is_empty())
        });
        std::thread::sleep(Duration::from_micros(random.u64(life) % 30_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let checked = bench.store().verify_all(|_| {});
        assert!(checked.damaged.is_empty() && checked.lost.is_empty(), "life {life}: {checked:?}");
    }
    recovers_after_lives(&bench);
}

fn recovers_after_lives(bench: &Bench) {
    let told = bench.run(&chain(bench, json!({"say": "hello"})));
    assert_eq!(told.report.exit(), None);
    let finished = files(&bench.cache().join("stages")).len();
    assert!(finished > 30, "{finished} stages were finished");
    assert!(bench.store().verify_all(|_| {}).damaged.is_empty());
}

#[test]
fn two_runs_at_once_compute_once_and_the_second_says_for_whom_it_waits() {
    let bench = Bench::new();
    let mut first = spawn(&bench, "slow 0");
    wait_until("the first holds", || bench.path("holding").exists());
    let mut second = spawn(&bench, "second 0");
    let said = || {
        files(&bench.cache().join("runs")).iter().any(|log| {
            fs::read_to_string(log)
                .is_ok_and(|text| text.contains("waits_for_lock") && text.contains(&format!("pid {}", first.id())))
        })
    };
    wait_until("the second says so", said);
    fs::write(bench.path("go"), "").unwrap();
    assert!(first.wait().unwrap().success());
    assert!(second.wait().unwrap().success());
    let ran: Vec<_> = names(bench.dir.path()).into_iter().filter(|name| name.starts_with("ran-")).collect();
    assert_eq!(ran, [format!("ran-tokens-{}", first.id())]);
    bench.assert_sound();
}

#[test]
fn the_lock_of_a_killed_run_is_free_at_once() {
    let bench = Bench::new();
    let mut first = spawn(&bench, "slow 0");
    wait_until("the first holds", || bench.path("holding").exists());
    let mut second = spawn(&bench, "second 0");
    first.kill().unwrap();
    first.wait().unwrap();
    // The second finds nothing finished and does the work itself, so its own check of the words fails.
    assert!(!second.wait().unwrap().success());
    assert_eq!(bench.run(&bench.plan(&[("tokens", json!({"say": "hello"}), &[])])).words(), ["tokens fresh"]);
    bench.assert_sound();
}

#[test]
fn a_disk_that_is_full_at_any_step_is_said_and_loses_nothing_finished() {
    let mut step = 0;
    loop {
        let bench = Bench::new();
        let plan = chain(&bench, json!({"say": "hello"}));
        let (steps, hit) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, flag) = (steps.clone(), hit.clone());
        let disk = Disk::watched(Arc::new(move |_, _| {
            if counter.fetch_add(1, Ordering::SeqCst) < step {
                return Ok(());
            }
            flag.store(true, Ordering::SeqCst);
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        }));
        let store = Store::open_on(&bench.cache(), disk).unwrap();
        let result = run_in(&store, &plan, &Options::default(), &speak, &bench.stop);
        if !hit.load(Ordering::SeqCst) {
            break;
        }
        match result {
            Err(problems) => assert_eq!((problems[0].code, problems[0].exit), ("store::full", Exit::Missing)),
            Ok(told) => {
                for (_, problem) in told.report.failures() {
                    assert_eq!((problem.code, problem.exit), ("store::full", Exit::Failed), "step {step}");
                }
            }
        }
        drop(store);
        recovers(&bench, &format!("disk full from step {step}"));
        step += 1;
    }
    assert!(step > 30, "only {step} steps were seen");
}

#[test]
fn a_small_disk_really_full() {
    let bench = Bench::new();
    let disk = bench.path("cache");
    fs::create_dir(&disk).unwrap();
    // A disk of 512 KiB, seen by the child alone; needs a kernel that lets us have one.
    let script = "mount -t tmpfs -o size=512k tmpfs \"$0\" || exit 77; exec \"$@\"";
    let child = command(&bench, "fills 2000000");
    let mut unshared = Command::new("unshare");
    unshared
        .args(["--mount", "--map-root-user", "sh", "-c", script])
        .arg(&disk)
        .arg(child.get_program())
        .args(child.get_args());
    unshared
        .envs(child.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    match unshared.status().map(|status| status.code()) {
        // Not allowed to mount, or no `unshare` here: the disk that is full by injection has to do.
        Ok(Some(77 | 1)) | Err(_) => eprintln!("skipped: this system lets us mount nothing"),
        Ok(code) => assert_eq!(code, Some(0)),
    }
}

#[test]
fn a_folder_that_can_only_be_read_serves_and_says_why_it_cannot_run() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    bench.run(&bench.plan(&[("tokens", json!({"say": "hello"}), &[])]));
    let exe = bench.path("exe");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    let chmod = |mode: u32| {
        let script = format!("chmod {mode:o} \"$0\"; find \"$0/cache\" -type d -exec chmod {mode:o} {{}} +");
        assert!(Command::new("sh").args(["-c", &script]).arg(bench.dir.path()).status().unwrap().success());
    };
    fs::set_permissions(&exe, fs::Permissions::from_mode(0o755)).unwrap();
    chmod(0o555);
    let like = command(&bench, "reads 0");
    let mut reader = Command::new(&exe);
    reader
        .args(like.get_args())
        .envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .env("TMPDIR", "/tmp");
    // Root may write anywhere: the reader is somebody else then.
    let root = fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
    if root {
        reader.uid(65_534).gid(65_534);
    }
    let output = reader.output().unwrap();
    chmod(0o755);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    bench.assert_sound();
}
