//! hostd may die at any time; instances do not.

use tests::{Host, Kind};

use crate::KindTest;
use crate::lifecycle::{await_console, await_log};
use crate::process::{start_idle, start_script};

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    ("a_killed_daemon_finds_every_instance_again", kill_daemon),
    (
        "a_killed_daemon_finds_a_paused_instance_paused",
        kill_daemon_while_paused,
    ),
];

fn kill_daemon(host: &Host, kind: Kind) {
    let name = format!("alive-{}", kind.name());
    let script = "mkfifo /tmp/wake /tmp/end; echo started; read line </tmp/wake; echo woken; \
        read line </tmp/end; exit 4";
    start_script(host, kind, &name, &[], script);
    await_log(host, &name, "started");
    let before = host.hostctl(&["inspect", "--json", &name]).json();
    host.kill_and_restart_daemon();
    let after = host.hostctl(&["inspect", "--json", &name]).json();
    assert_eq!(after["state"], "running");
    assert_eq!(after["pid"], before["pid"], "it is not the same process");
    assert_eq!(after["address"], before["address"]);
    host.hostctl(&["exec", &name, "sh", "-c", "echo go >/tmp/wake"])
        .ok();
    await_log(host, &name, "woken");
    if kind == Kind::Vm {
        let marked = "exec 3>/dev/ttyS0; echo marked >&3";
        host.hostctl(&["exec", &name, "sh", "-c", marked]).ok();
        await_console(host, &name, "marked");
    }
    // This one may be killed on its way out: the workload's end takes every other process with it.
    host.hostctl(&["exec", &name, "sh", "-c", "echo go >/tmp/end"]);
    host.hostctl(&["wait", &name]).exits(4);
    assert_eq!(host.hostctl(&["logs", &name]).ok(), "started\nwoken\n");
    host.hostctl(&["rm", &name]).ok();
}

fn kill_daemon_while_paused(host: &Host, kind: Kind) {
    let name = format!("asleep-{}", kind.name());
    start_idle(host, kind, &name, &[]);
    host.hostctl(&["pause", &name]).ok();
    host.kill_and_restart_daemon();
    let state = || host.hostctl(&["inspect", "--json", &name]).json()["state"].clone();
    assert_eq!(state(), "paused");
    host.hostctl(&["resume", &name]).ok();
    assert_eq!(state(), "running");
    let said = host.hostctl(&["exec", &name, "echo", "awake"]).ok();
    assert_eq!(said, "awake\n");
    host.hostctl(&["rm", "--force", &name]).ok();
}
