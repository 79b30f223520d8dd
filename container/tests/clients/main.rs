//! hostd-oci under the programs that people drive a runtime with: podman, buildah and containerd, from
//! Debian, with an image of busybox. Needs root; reaches no network.
//!
//! It has a `main` of its own: all of them are run in a mount and a network namespace that end with
//! this program, and with storage in a directory that is removed.

#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod containerd;
mod podman;
mod podman_life;
mod workshop;

use std::process::Command;
use std::sync::{Arc, OnceLock};

use libtest_mimic::{Arguments, Trial};
use nix::sched::{CloneFlags, unshare};

use workshop::Workshop;

fn main() {
    let mut arguments = Arguments::from_args();
    let groups = [
        (podman::SHELL, podman::CASES),
        (podman::SHELL, podman_life::CASES),
        (containerd::SHELL, containerd::CASES),
    ];
    let cases = groups
        .iter()
        .flat_map(|(shell, cases)| cases.iter().map(move |case| (*shell, case)));
    if arguments.list {
        let trials = cases.map(|(_, case)| Trial::test(case.0, || Ok(())));
        libtest_mimic::run(&arguments, trials.collect()).exit();
    }
    // More at once only wait for each other's storage locks.
    arguments.test_threads.get_or_insert(4);
    isolate();
    // Made by the first test, if any is selected.
    let workshop = Arc::new(OnceLock::new());
    let trials = cases.map(|(shell, case)| trial(shell, case, Arc::clone(&workshop)));
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if let Some(workshop) = workshop.get() {
        workshop.close();
    }
    conclusion.exit();
}

fn trial(shell: &str, case: &Case, workshop: Arc<OnceLock<Workshop>>) -> Trial {
    let (name, script, status, words) = *case;
    let script = format!("{shell}{script}");
    Trial::test(name, move || {
        let ended = workshop.get_or_init(Workshop::open).run(&script);
        if ended.status == status && ended.output.contains(words) {
            return Ok(());
        }
        Err(format!("wanted status {status} and `{words}`, got {ended:?}").into())
    })
}

/// What is mounted and what is configured of the network from here on ends with this program and those
/// that it started.
fn isolate() {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
    for (program, arguments) in [
        ("mount", &["--make-rprivate", "/"][..]),
        ("ip", &["link", "set", "lo", "up"]),
    ] {
        assert!(
            Command::new(program)
                .args(arguments)
                .status()
                .unwrap()
                .success()
        );
    }
}

/// One test: its name, the steps of a shell, the status they end with, and what they print, among
/// other things.
type Case = (&'static str, &'static str, i32, &'static str);
