//! From creation to removal, and what is left: nothing.

use std::fs;

use serde_json::Value;
use tests::{Host, Kind};

use crate::KindTest;
use crate::process::{start_idle, start_script};

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    ("the_states_follow_the_verbs", states),
    ("a_stop_lets_the_workload_finish", graceful_stop),
    ("a_paused_instance_does_no_work", pause),
    ("a_paused_instance_can_be_stopped", stop_paused),
    ("logs_keep_what_the_workload_said", logs),
    ("removal_leaves_nothing_behind", removal),
    ("a_stopped_instance_starts_again_with_its_files", restart),
];

fn state(host: &Host, name: &str) -> String {
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    instance["state"]
        .as_str()
        .expect("an instance has a state")
        .to_owned()
}

/// What an instance uses.
pub(crate) fn stats(host: &Host, name: &str) -> Value {
    let stats = host.hostctl(&["stats", "--no-stream", "--json", name]);
    let mut stats = stats.json();
    stats.get_mut(0).map_or(Value::Null, Value::take)
}

fn states(host: &Host, kind: Kind) {
    let name = format!("states-{}", kind.name());
    let create = [
        "create",
        "--name",
        &name,
        "--isolation",
        kind.name(),
        "busybox",
    ];
    host.hostctl(&[&create[..], &["sleep", "1000000"]].concat())
        .ok();
    assert_eq!(state(host, &name), "created");
    host.hostctl(&["start", &name]).ok();
    assert_eq!(state(host, &name), "running");
    let twice = host.hostctl(&[&create[..], &["true"]].concat()).exits(125);
    assert!(
        twice.stderr.contains(&name),
        "the error names the name: {}",
        twice.stderr
    );
    host.hostctl(&["kill", &name]).ok();
    host.hostctl(&["wait", &name]).exits(137);
    assert_eq!(state(host, &name), "stopped");
    host.hostctl(&["rm", &name]).ok();
    host.hostctl(&["inspect", &name]).exits(125);
}

fn graceful_stop(host: &Host, kind: Kind) {
    let name = format!("stop-{}", kind.name());
    let script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    start_script(host, kind, &name, &[], script);
    await_log(host, &name, "ready");
    host.hostctl(&["stop", &name]).ok();
    let instance = host.hostctl(&["inspect", "--json", &name]).json();
    assert_eq!(instance["exit"]["code"], 5, "{instance:#}");
    assert!(host.hostctl(&["logs", &name]).ok().contains("bye"));
    host.hostctl(&["rm", &name]).ok();
}

/// Returns once the log holds `text`; `logs --follow` ends by itself when the instance does.
pub(crate) fn await_log(host: &Host, name: &str, text: &str) {
    await_output(host, &["logs", "--follow", name], text);
}

/// Returns once a VM's console has shown `text`; it ends with the machine.
pub(crate) fn await_console(host: &Host, name: &str, text: &str) {
    await_output(host, &["console", "--no-stdin", name], text);
}

fn await_output(host: &Host, arguments: &[&str], text: &str) {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let mut command = host.hostctl_command(arguments);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .expect("hostctl runs");
    let out = BufReader::new(child.stdout.take().expect("the stream is piped"));
    let found = out
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains(text));
    let _ = child.kill();
    let _ = child.wait();
    assert!(found, "{arguments:?} ended and never said `{text}`");
}

fn pause(host: &Host, kind: Kind) {
    let name = format!("pause-{}", kind.name());
    let script = "while :; do :; done";
    start_script(host, kind, &name, &[], script);
    host.hostctl(&["pause", &name]).ok();
    assert_eq!(state(host, &name), "paused");
    let used = || {
        let stats = stats(host, &name);
        match kind {
            Kind::Container => stats["cpu_usage_us"].as_u64(),
            // To be asked costs the VMM time of its own.
            Kind::Vm => stats["vm"]["vcpus"][0]["run_us"].as_u64(),
        }
    };
    let before = used().expect("stats show the time used");
    let after = used().expect("stats show the time used");
    assert_eq!(before, after, "a paused instance uses time");
    host.hostctl(&["resume", &name]).ok();
    assert_eq!(state(host, &name), "running");
    host.hostctl(&["rm", "--force", &name]).ok();
}

fn stop_paused(host: &Host, kind: Kind) {
    let name = format!("stop-paused-{}", kind.name());
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    start_script(host, kind, &name, &[], script);
    await_log(host, &name, "ready");
    host.hostctl(&["pause", &name]).ok();
    let refused = host.hostctl(&["exec", &name, "true"]).exits(125);
    assert!(refused.stderr.contains("paused"), "{}", refused.stderr);
    host.hostctl(&["stop", &name]).ok();
    let instance = host.hostctl(&["inspect", "--json", &name]).json();
    assert_eq!(instance["exit"]["code"], 5, "{instance:#}");
    host.hostctl(&["start", &name]).ok();
    host.hostctl(&["pause", &name]).ok();
    host.hostctl(&["kill", &name]).ok();
    host.hostctl(&["wait", &name]).exits(137);
    host.hostctl(&["rm", &name]).ok();
}

fn logs(host: &Host, kind: Kind) {
    let name = format!("logs-{}", kind.name());
    let script = "seq 1 2000; echo last >&2";
    start_script(host, kind, &name, &[], script);
    host.hostctl(&["wait", &name]).exits(0);
    let output = host.hostctl(&["logs", &name]).exits(0);
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines.len(), 2000, "the log is not complete");
    assert_eq!((lines[0], lines[1999]), ("1", "2000"));
    assert_eq!(output.stderr, "last\n");
    let tail = host.hostctl(&["logs", "--tail", "2", &name]).exits(0);
    // The streams are two, so which of their last lines came first is not for the test to say.
    assert_eq!(tail.stdout.lines().chain(tail.stderr.lines()).count(), 2);
    host.hostctl(&["rm", &name]).ok();
}

/// What an instance may leave on the host, by where it would show.
fn traces(host: &Host, name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("procfs is mounted");
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(name))
            .map(str::to_owned),
    );
    let groups = host.run("find", &["/sys/fs/cgroup", "-name", name]);
    found.extend(groups.stdout.lines().map(str::to_owned));
    let rules = host.run("nft", &["list", "ruleset"]);
    found.extend(
        rules
            .stdout
            .lines()
            .filter(|line| line.contains(name))
            .map(str::to_owned),
    );
    found
}

fn removal(host: &Host, kind: Kind) {
    let name = format!("gone-{}", kind.name());
    let port = match kind {
        Kind::Container => "18098:80",
        Kind::Vm => "18099:80",
    };
    start_idle(host, kind, &name, &["-p", port]);
    let before = traces(host, &name);
    // The packet filter names the interface of an instance before everything else of it.
    let interface = before
        .iter()
        .filter_map(|trace| trace.split('"').nth(1))
        .find(|word| word.starts_with("hostd-"))
        .unwrap_or_else(|| panic!("no interface in {before:#?}"));
    host.run("ip", &["link", "show", interface]).ok();
    host.hostctl(&["rm", "--force", &name]).ok();
    assert_eq!(traces(host, &name), Vec::<String>::new());
    assert_ne!(
        host.run("ip", &["link", "show", interface]).code,
        0,
        "{interface} is left"
    );
}

fn restart(host: &Host, kind: Kind) {
    let name = format!("again-{}", kind.name());
    let script = "cat /root/count 2>/dev/null; echo x >>/root/count; sync";
    start_script(host, kind, &name, &[], script);
    host.hostctl(&["wait", &name]).exits(0);
    host.hostctl(&["start", &name]).ok();
    host.hostctl(&["wait", &name]).exits(0);
    assert_eq!(host.hostctl(&["logs", &name]).ok(), "x\n");
    host.hostctl(&["rm", &name]).ok();
}
