//! A guest's kernel may crash; that is not an end of its workload.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;
use tests::Host;

use crate::HostTest;

pub(crate) const TESTS: &[(&str, HostTest)] = &[(
    "a_guest_that_crashes_has_failed_and_is_started_again",
    crash,
)];

/// Has the guest's kernel crash (Documentation/admin-guide/sysrq.rst), if this is its first run.
const WORKLOAD: &str =
    "[ -e /ran ] || { touch /ran; sync; echo c >/proc/sysrq-trigger; }; sleep 1000000";

fn crash(host: &Host) {
    let vm = ["--isolation", "vm", "--name"];
    let workload = ["busybox", "sh", "-c", WORKLOAD];
    let once = [&["run"], &vm[..], &["crashed"], &workload].concat();
    let run = host.hostctl(&once);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(run.stderr.contains("reset by its guest"), "{run:?}");
    let instance = host.hostctl(&["inspect", "--json", "crashed"]).json();
    assert_eq!(instance["state"], "stopped", "{instance:#}");
    assert_eq!(instance["reason"], "crashed", "{instance:#}");
    assert_eq!(instance["exit"]["code"], 125, "{instance:#}");

    // A policy for failures applies, and the second run finds what the first has written.
    host.hostctl(&["rm", "crashed"]).ok();
    let policy = ["-d", "--restart", "on-failure"];
    let again = [&["run"], &vm[..], &["crashing"], &policy, &workload].concat();
    host.hostctl(&again).ok();
    await_starts(host, "crashing", 2);
    host.hostctl(&["exec", "crashing", "test", "-e", "/ran"])
        .ok();
    host.hostctl(&["rm", "--force", "crashing"]).ok();
}

fn await_starts(host: &Host, name: &str, count: usize) {
    let mut command = host.hostctl_command(&["events", "--since", "0", "--json"]);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .expect("hostctl runs");
    let events = BufReader::new(child.stdout.take().expect("the stream is piped"));
    let starts = events.lines().map_while(Result::ok).filter(|line| {
        let event: Value = serde_json::from_str(line).expect("an event is JSON");
        event["kind"] == "instance.running" && event["subject"] == name
    });
    let seen = starts.take(count).count();
    let _ = child.kill();
    let _ = child.wait();
    assert_eq!(seen, count, "{name} was not started again");
}
