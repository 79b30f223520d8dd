//! Two verbs at once, and processes that die at any moment: one result, one clear refusal, and nothing
//! left.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::bundle::{Bundle, Ended, PATIENCE, finish_child, is_own};

/// A verb that is under way. Its messages go to a file: a pipe would stay open as long as the container.
struct Spawned {
    child: Child,
    errors: PathBuf,
}

fn spawn(bundle: &Bundle, verb: &[&str], arguments: &[&str]) -> Spawned {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let errors = bundle.path().join(format!("errors-{next}"));
    let mut command = bundle.command(verb);
    command
        .arg(&bundle.id)
        .args(arguments)
        .stdout(Stdio::null());
    command.stderr(fs::File::create(&errors).unwrap());
    Spawned {
        child: command.spawn().unwrap(),
        errors,
    }
}

impl Spawned {
    fn finish(self) -> Ended {
        let ended = finish_child(self.child);
        Ended {
            stderr: fs::read_to_string(self.errors).unwrap(),
            ..ended
        }
    }
}

/// Runs verbs at the same time.
fn together<const N: usize>(bundle: &Bundle, verbs: [(&[&str], &[&str]); N]) -> [Ended; N] {
    verbs
        .map(|(verb, arguments)| spawn(bundle, verb, arguments))
        .map(Spawned::finish)
}

/// A refusal that says what is the matter, and is no accident.
fn assert_clear(ended: &Ended, words: &[&str]) {
    let clear = words.iter().any(|words| ended.stderr.contains(words));
    assert!(ended.status == 0 || clear, "{ended:?}");
}

const GONE: &[&str] = &[
    "does not exist",
    "is being created, checkpointed or deleted",
    "it is stopped",
    "is stopped",
];

#[test]
fn of_many_deletes_one_deletes_and_the_others_find_nothing() {
    let bundle = Bundle::new("exec sleep 100");
    for _ in 0..5 {
        bundle.start();
        assert_eq!(bundle.verb(&["kill"], &["KILL"]).status, 0);
        bundle.wait_for_status("stopped");
        let ended = together(
            &bundle,
            [(&["delete"], &[]), (&["delete"], &[]), (&["delete"], &[])],
        );
        assert_eq!(
            ended.iter().filter(|ended| ended.status == 0).count(),
            1,
            "{ended:?}"
        );
        ended.iter().for_each(|ended| assert_clear(ended, GONE));
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn a_forced_delete_wins_against_every_other_verb() {
    for (verb, arguments) in [
        (&["start"][..], &[][..]),
        (&["exec"], &["true"]),
        (&["kill"], &["TERM"]),
        (&["pause"], &[]),
        (&["update", "--pids-limit", "50"], &[]),
        (&["state"], &[]),
        (&["ps"], &[]),
        (&["events", "--stats"], &[]),
    ] {
        for round in 0..3 {
            let bundle = Bundle::new("exec sleep 100");
            assert_eq!(bundle.quiet(&["create"]).status, 0);
            if verb != ["start"] {
                assert_eq!(bundle.verb(&["start"], &[]).status, 0);
            }
            let other = spawn(&bundle, verb, arguments);
            // In the last round the other is far, in the first it has hardly begun.
            std::thread::sleep(Duration::from_millis(round * 4));
            let deleted = spawn(&bundle, &["delete", "--force"], &[]).finish();
            assert_eq!(deleted.status, 0, "{verb:?}: {deleted:?}");
            let other = other.finish();
            assert!(other.status >= 0, "{verb:?} hung or was killed: {other:?}");
            assert!(!other.stderr.contains("panicked"), "{verb:?}: {other:?}");
            bundle.assert_nothing_is_left();
        }
    }
}

#[test]
fn pause_and_resume_at_once_leave_one_of_the_two_states() {
    let bundle = Bundle::new("while true; do sleep 0.01; done");
    bundle.start();
    for _ in 0..5 {
        let ended = together(
            &bundle,
            [
                (&["pause"], &[]),
                (&["resume"], &[]),
                (&["pause"], &[]),
                (&["resume"], &[]),
            ],
        );
        let words = ["cannot resume container", "cannot pause container"];
        ended.iter().for_each(|ended| assert_clear(ended, &words));
        let status = bundle.state()["status"].clone();
        assert!(
            ["running", "paused"].contains(&status.as_str().unwrap()),
            "{status}"
        );
        if status == "paused" {
            assert_eq!(bundle.verb(&["resume"], &[]).status, 0);
        }
    }
}

#[test]
fn a_create_during_a_delete_gets_all_or_is_refused() {
    let bundle = Bundle::new("exec sleep 100");
    for _ in 0..5 {
        bundle.start();
        let ended = together(&bundle, [(&["delete", "--force"], &[]), (&["create"], &[])]);
        assert_eq!(ended[0].status, 0, "{ended:?}");
        assert_clear(&ended[1], &["already exists"]);
        if ended[1].status == 0 {
            assert_eq!(bundle.state()["status"], "created");
        }
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
        bundle.assert_nothing_is_left();
    }
}

/// The first process is killed at each place where a hook can do it.
#[test]
fn a_first_process_that_is_killed_at_a_step_of_the_creation_leaves_nothing() {
    let script = "pid=$(grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*'); kill -9 $pid";
    for name in ["prestart", "createRuntime"] {
        let bundle = Bundle::new("echo ran").with(|config| {
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]});
            config["hooks"] = json!({name: [hook]});
        });
        let message = bundle.refusal();
        assert!(message.contains("died"), "{name}: {message}");
    }
}

/// And between any two instructions: as soon as it is recorded, and then later and later.
#[test]
fn a_first_process_that_is_killed_at_any_time_leaves_nothing_that_blocks_the_id() {
    let bundle = Bundle::new("exec sleep 100");
    if !is_own() {
        // It is told by a file of our own.
        return;
    }
    let record = bundle.states().join(&bundle.id).join("process");
    let mut survived = 0;
    for microseconds in (0..6000).step_by(300) {
        let mut creator = spawn(&bundle, &["create"], &[]);
        let start = Instant::now();
        let pid = loop {
            let ended = creator.child.try_wait().unwrap().is_some();
            let link = fs::read_link(&record).ok();
            let text = link.as_ref().and_then(|link| link.to_str());
            if let Some((pid, _)) = text.and_then(|text| text.split_once(':')) {
                break pid.parse().unwrap();
            }
            let errors = || fs::read_to_string(&creator.errors);
            let late = ended || start.elapsed() > PATIENCE;
            assert!(!late, "no process was recorded: {:?}", errors());
            std::hint::spin_loop();
        };
        let recorded = Instant::now();
        while recorded.elapsed() < Duration::from_micros(microseconds) {
            std::hint::spin_loop();
        }
        // It may be gone already only if the creation failed.
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        let ended = creator.finish();
        if ended.status == 0 {
            survived += 1;
            bundle.wait_for_status("stopped");
            assert_eq!(bundle.verb(&["delete"], &[]).status, 0);
        } else {
            assert!(
                ended.stderr.contains("died") || ended.stderr.contains("go on"),
                "{ended:?}"
            );
        }
        bundle.assert_nothing_is_left();
    }
    // Whichever it was each time, the id is free.
    assert!(survived <= 20);
    bundle.start();
}

#[test]
fn a_starter_that_is_killed_leaves_a_container_that_can_be_started_or_has_been() {
    let bundle = Bundle::new("exec sleep 100");
    for microseconds in (0..3000).step_by(300) {
        assert_eq!(bundle.quiet(&["create"]).status, 0);
        let mut starter = spawn(&bundle, &["start"], &[]);
        std::thread::sleep(Duration::from_micros(microseconds));
        let _ = starter.child.kill();
        starter.child.wait().unwrap();
        let status = bundle.state()["status"].clone();
        if status == "created" {
            let ended = bundle.verb(&["start"], &[]);
            // The first process may have been let go by the starter that was killed, and may end with it.
            let late = ["another process starts it", "it is stopped"]
                .iter()
                .any(|words| ended.stderr.contains(words));
            assert!(ended.status == 0 || late, "{ended:?}");
        } else {
            // A first process whose starter dies in the middle ends, too.
            assert!(status == "running" || status == "stopped", "{status}");
        }
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
        bundle.assert_nothing_is_left();
    }
}
