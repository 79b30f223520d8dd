//! Whatever an instance has come from, it behaves the same: one that was booted, paused and resumed,
//! restored, or cloned; VMs go on from memory. One table of origins, and for each the same checks.

use std::io::{BufRead, BufReader, Write};
use std::ops::RangeInclusive;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tests::{Host, Kind};

use crate::KindTest;
use crate::lifecycle::{await_log, stats};
use crate::limits::{SLOW_DISK, frees, is_capped, resizes, writes_slowly};
use crate::network::serves;
use crate::process::{executes, start_script};

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    ("one_that_was_booted_behaves", |host, kind| {
        try_out(host, kind, booted, "booted");
    }),
    ("one_that_was_paused_and_resumed_behaves", |host, kind| {
        try_out(host, kind, paused, "paused");
    }),
    ("one_that_was_restored_behaves", |host, kind| {
        try_out(host, kind, restored, "restored");
    }),
    (
        "one_that_was_restored_while_paused_behaves",
        |host, kind| {
            try_out(host, kind, restored_while_paused, "held");
        },
    ),
    (
        "one_that_was_restored_and_kept_again_behaves",
        |host, kind| {
            try_out(host, kind, restored_again, "again");
        },
    ),
    ("one_that_was_cloned_behaves", |host, kind| {
        try_out(host, kind, cloned, "cloned");
    }),
];

/// What an instance does, in this order, whatever it has come from; or what takes so long in emulation
/// that only those with one of these origins are tried out for it.
const CHECKS: &[(Check, &[&str])] = &[
    (works, ALL),
    (is_itself, ALL),
    (speaks, ALL),
    (executes, ALL),
    (serves, ALL),
    (writes_slowly, ALL),
    (has_its_counters_and_console, ALL),
    (is_limited, ALL),
    (is_capped, &["cloned"]),
    (frees, &["restored"]),
    (resizes, &["again"]),
    (ends, ALL),
];

const ALL: &[&str] = &["booted", "paused", "restored", "held", "again", "cloned"];

/// What an instance of this name is seen to do.
type Check = fn(&Host, Kind, &str);

/// Counts in its memory, tells the count to whoever looks, and says what it is told to. It waits without
/// a child: it would end if it came to need one while another has used the limit of processes up.
const WORKLOAD: &str = "trap 'echo bye; exit 5' TERM; [ -p /never ] || mkfifo /never; exec 3<>/never; n=0; echo ready; \
    while :; do n=$((n+1)); echo $n >/count; if [ -e /say ]; then cat /say; rm /say; fi; \
    read -r -t 0.1 never <&3; done";

/// So far has a workload come that began before the snapshot and not after it.
const COUNT: u64 = 20;

/// Makes an instance of this name, which has an origin; the workload has come to [`COUNT`].
type Origin = fn(&Host, Kind, &str);

fn booted(host: &Host, kind: Kind, name: &str) {
    let publish = format!("{}:80", port(kind, name));
    let mut options = vec!["--memory", "128M", "-p", &publish];
    if kind == Kind::Vm {
        options.extend(SLOW_DISK);
    }
    start_script(host, kind, name, &options, WORKLOAD);
    await_log(host, name, "ready");
    while count(host, name) < COUNT {}
}

fn paused(host: &Host, kind: Kind, name: &str) {
    booted(host, kind, name);
    host.hostctl(&["pause", name]).ok();
    host.hostctl(&["resume", name]).ok();
}

fn restored(host: &Host, kind: Kind, name: &str) {
    booted(host, kind, name);
    keep(host, kind, name);
    host.hostctl(&["snapshot", "restore", name, "kept"]).ok();
    host.hostctl(&["snapshot", "rm", name, "kept"]).ok();
}

fn restored_while_paused(host: &Host, kind: Kind, name: &str) {
    booted(host, kind, name);
    host.hostctl(&["pause", name]).ok();
    keep(host, kind, name);
    host.hostctl(&["snapshot", "restore", name, "kept"]).ok();
}

/// More than once from one snapshot, and from a snapshot of what was restored.
fn restored_again(host: &Host, kind: Kind, name: &str) {
    restored(host, kind, name);
    keep(host, kind, name);
    for _ in 0..2 {
        host.hostctl(&["snapshot", "restore", name, "kept"]).ok();
    }
}

fn cloned(host: &Host, kind: Kind, name: &str) {
    let original = format!("of-{name}");
    booted(host, kind, &original);
    keep(host, kind, &original);
    let source = format!("{original}/kept");
    host.hostctl(&["copy", "--start", &source, name]).ok();
    // Both run, and neither is in the other's way.
    assert_eq!(shell(host, &original, "hostname").trim(), original);
    host.hostctl(&["rm", "--force", &original]).ok();
}

/// A port of the host's for each.
fn port(kind: Kind, name: &str) -> usize {
    let first = match kind {
        Kind::Container => 18110,
        Kind::Vm => 18120,
    };
    let origin = ALL.iter().position(|origin| name.contains(origin));
    first + origin.expect("it is named after its origin")
}

/// Takes the snapshot `kept`, with memory where there can be some.
fn keep(host: &Host, kind: Kind, name: &str) {
    let stateful: &[&str] = match kind {
        Kind::Container => &[],
        Kind::Vm => &["--stateful"],
    };
    let create = ["snapshot", "create"];
    host.hostctl(&[&create[..], stateful, &[name, "kept"]].concat())
        .ok();
}

#[track_caller]
fn shell(host: &Host, name: &str, script: &str) -> String {
    host.hostctl(&["exec", name, "sh", "-c", script]).ok()
}

fn count(host: &Host, name: &str) -> u64 {
    // It may be between emptying the file and writing to it.
    let text = shell(host, name, "until grep . /count 2>/dev/null; do :; done");
    text.trim().parse().expect("it counts")
}

/// Whole seconds of the host's clock.
pub(crate) fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("the clock is set").as_secs()
}

/// What a guest has said that its clock showed is, but for two seconds, what the host's did in the
/// meantime.
#[track_caller]
pub(crate) fn assert_is_time(told: &str, host: RangeInclusive<u64>) {
    let told: u64 = told.trim().parse().expect("a number");
    let right = host.start() - 2..=host.end() + 2;
    assert!(right.contains(&told), "it is {host:?}, and not {told}");
}

fn try_out(host: &Host, kind: Kind, make: Origin, origin: &str) {
    let name = format!("{origin}-{}", kind.name());
    make(host, kind, &name);
    if kind == Kind::Vm {
        assert!(count(host, &name) >= COUNT, "the workload has begun anew");
    }
    for (check, origins) in CHECKS {
        if origins.contains(&origin) {
            check(host, kind, &name);
        }
    }
    host.hostctl(&["rm", "--force", &name]).ok();
}

/// The workload does its work, and stands still when it is to.
fn works(host: &Host, _kind: Kind, name: &str) {
    let before = count(host, name);
    while count(host, name) <= before {}
    host.hostctl(&["pause", name]).ok();
    host.hostctl(&["resume", name]).ok();
    let before = count(host, name);
    while count(host, name) <= before {}
    let stats = stats(host, name);
    assert!(stats["pids"].as_u64() > Some(0), "{stats}");
}

/// It has the name, address and time that are its own.
fn is_itself(host: &Host, _kind: Kind, name: &str) {
    assert_eq!(shell(host, name, "hostname").trim(), name);
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    let address = instance["address"].as_str().expect("it has an address");
    let shown = shell(host, name, "ip -4 addr show; cat /etc/hosts");
    assert!(shown.contains(&format!("inet {address}/")), "{shown}");
    assert!(shown.contains(&format!("{address}\t{name}")), "{shown}");
    shell(
        host,
        name,
        "ping -c 1 -W 10 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')",
    );
    let before = now_s();
    let theirs = shell(host, name, "date +%s");
    assert_is_time(&theirs, before..=now_s());
}

/// The workload's output arrives.
fn speaks(host: &Host, _kind: Kind, name: &str) {
    shell(host, name, "echo heard >/said; mv /said /say");
    await_log(host, name, "heard");
}

/// What only a VM has: what its processors and devices have done, and a console.
fn has_its_counters_and_console(host: &Host, kind: Kind, name: &str) {
    let stats = stats(host, name);
    if kind == Kind::Container {
        assert_eq!(stats["vm"], Value::Null, "{stats}");
        let refused = host.hostctl(&["console", name]);
        assert!(refused.stderr.contains("exec -t"), "{refused:?}");
        return;
    }
    let vm = &stats["vm"];
    for counted in [
        "/vcpus/0/run_us",
        "/vcpus/0/exits/mmio_writes",
        "/devices/net0/net/egress_packets",
        "/devices/vsock/vsock/ingress_packets",
        "/balloon/guest/total_bytes",
    ] {
        let value = vm.pointer(counted).and_then(Value::as_u64);
        assert!(value > Some(0), "{counted}: {vm:#}");
    }
    let typed = "exec 3<>/dev/ttyS0; echo opened >&3; read -r line <&3; echo heard $line >&3";
    let mut guest = host.hostctl_command(&["exec", name, "sh", "-c", typed]);
    let mut guest = guest.spawn().expect("hostctl runs");
    let mut console = host.hostctl_command(&["console", name]);
    console.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut console = console.spawn().expect("hostctl runs");
    let mut keys = console.stdin.take().expect("the stream is piped");
    let screen = console.stdout.take().expect("the stream is piped");
    let mut screen = BufReader::new(screen).lines().map_while(Result::ok);
    let mut shows = |what: &str| screen.any(|line| line.contains(what));
    assert!(shows("opened"), "the console has ended");
    keys.write_all(b"typed\n").expect("hostctl reads");
    assert!(shows("heard typed"), "the console has ended");
    console.kill().expect("hostctl runs");
    console.wait().expect("hostctl ends");
    assert!(guest.wait().expect("hostctl ends").success());
}

/// Its limits hold, and can be others while it runs.
fn is_limited(host: &Host, _kind: Kind, name: &str) {
    let many = "for n in $(seq 30); do sleep 0.1 & done; wait; echo done";
    let exec = || host.hostctl(&["exec", name, "sh", "-c", many]);
    host.hostctl(&["update", "--pids", "20", name]).ok();
    let refused = exec();
    assert!(refused.stderr.contains("can't fork"), "{refused:?}");
    assert_eq!(refused.stdout, "");
    host.hostctl(&["update", "--pids", "100", name]).ok();
    assert_eq!(exec().ok(), "done\n");
}

/// It can be asked to stop, and what it makes of that arrives.
fn ends(host: &Host, _kind: Kind, name: &str) {
    host.hostctl(&["stop", name]).ok();
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    assert_eq!(instance["state"], "stopped", "{instance:#}");
    assert_eq!(instance["exit"]["code"], 5, "{instance:#}");
    assert!(host.hostctl(&["logs", name]).ok().contains("bye"));
    host.hostctl(&["start", name]).ok();
    assert_eq!(shell(host, name, "hostname").trim(), name);
}
