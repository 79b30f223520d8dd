//! Snapshots: going back to what was, and clones that are machines of their own.

use tests::{Host, Kind};

use crate::KindTest;
use crate::lifecycle::await_log;
use crate::process::{start_idle, start_script};

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    ("a_restore_brings_back_what_was_written", restore),
    ("a_clone_has_the_files_and_a_name_of_its_own", clone),
    ("a_snapshot_of_what_never_ran_is_empty", of_nothing),
    ("snapshots_go_with_their_instance", go_with_instance),
    ("a_snapshot_is_refused_with_what_to_do_next", refusals),
];

/// Runs a shell script in an instance.
#[track_caller]
fn shell(host: &Host, name: &str, script: &str) -> String {
    host.hostctl(&["exec", name, "sh", "-c", script]).ok()
}

fn inspect(host: &Host, name: &str) -> serde_json::Value {
    host.hostctl(&["inspect", "--json", name]).json()
}

/// Changes of every kind that a layer can have, and how they show.
const CHANGE: &str = "mkdir -p /data/deep && echo old >/data/deep/file && ln /data/deep/file /data/second \
    && ln -s deep/file /data/link && rm /etc/group && chown 1:2 /data/second && chmod 4711 /data/second \
    && mkfifo /data/pipe && rm -r /var && mkdir /var && echo new >/var/own";
const LOOK: &str = "cat /data/link /data/second; ls -ln /data/second | cut -c1-10; test -e /etc/group || \
    echo no group; ls /var; test -p /data/pipe && echo pipe; stat -c %h:%u:%g /data/deep/file";

fn restore(host: &Host, kind: Kind) {
    let name = format!("back-{}", kind.name());
    let script = "trap 'exit 5' TERM; echo started; while :; do sleep 0.1; done";
    start_script(host, kind, &name, &[], script);
    await_log(host, &name, "started");
    shell(host, &name, CHANGE);
    let before = shell(host, &name, LOOK);
    assert!(before.ends_with("no group\nown\npipe\n2:1:2\n"), "{before}");
    let taken = host.hostctl(&["snapshot", "create", &name, "one"]).ok();
    assert_eq!(taken.trim(), format!("{name}/one"));
    assert_eq!(inspect(host, &name)["state"], "running");
    assert_eq!(inspect(host, &name)["snapshots"][0], "one");

    // It runs on, and what it does from now on is not in the snapshot.
    shell(
        host,
        &name,
        "echo changed >/data/deep/file; rm /data/link; echo x >/etc/group",
    );
    host.hostctl(&["snapshot", "restore", &name, "one"]).ok();
    assert_eq!(inspect(host, &name)["state"], "running");
    assert_eq!(shell(host, &name, LOOK), before);

    // Restored, it is an instance like any other.
    assert!(host.hostctl(&["logs", &name]).ok().contains("started"));
    host.hostctl(&["stats", "--no-stream", &name]).ok();
    host.hostctl(&["stop", &name]).ok();
    assert_eq!(inspect(host, &name)["exit"]["code"], 5);

    // And so it is if it did not run.
    host.hostctl(&["snapshot", "restore", &name, "one"]).ok();
    assert_eq!(inspect(host, &name)["state"], "stopped");
    host.hostctl(&["start", &name]).ok();
    assert_eq!(shell(host, &name, LOOK), before);
    host.hostctl(&["rm", "--force", &name]).ok();
}

fn clone(host: &Host, kind: Kind) {
    let name = format!("source-{}", kind.name());
    let copy = format!("copy-{}", kind.name());
    start_idle(host, kind, &name, &["--env", "KEPT=yes"]);
    let id = "00112233445566778899aabbccddeeff";
    shell(
        host,
        &name,
        &format!("echo one >/file; echo {id} >/etc/machine-id"),
    );
    host.hostctl(&["pause", &name]).ok();
    host.hostctl(&["resume", &name]).ok();
    host.hostctl(&["snapshot", "create", &name, "base"]).ok();
    shell(host, &name, "echo two >/file");
    let source = format!("{name}/base");
    let made = host.hostctl(&["copy", "--start", &source, &copy]).ok();
    assert_eq!(made.trim(), copy);

    assert_eq!(shell(host, &copy, "cat /file; echo $KEPT"), "one\nyes\n");
    assert_eq!(shell(host, &name, "cat /file"), "two\n");
    assert_eq!(shell(host, &copy, "hostname").trim(), copy);
    let machine_id = shell(host, &copy, "cat /etc/machine-id");
    assert!(
        machine_id.trim().len() == 32 && machine_id.trim() != id,
        "{machine_id}"
    );
    assert_eq!(shell(host, &name, "cat /etc/machine-id").trim(), id);
    let (one, other) = (inspect(host, &name), inspect(host, &copy));
    assert_ne!(one["address"], other["address"]);
    let address = other["address"].as_str().expect("it has an address");
    let shown = shell(host, &copy, "ip -4 addr show; cat /etc/hosts");
    assert!(shown.contains(&format!("inet {address}/")), "{shown}");
    assert!(shown.contains(&format!("{address}\t{copy}")), "{shown}");
    // Both are on the network at once.
    let source_address = one["address"].as_str().expect("it has an address");
    for (from, to) in [(&name, address), (&copy, source_address)] {
        shell(host, from, &format!("ping -c 1 -W 10 {to}"));
    }

    // A clone needs neither the snapshot nor the instance that it came from.
    host.hostctl(&["snapshot", "rm", &name, "base"]).ok();
    host.hostctl(&["rm", "--force", &name]).ok();
    host.hostctl(&["restart", &copy]).ok();
    assert_eq!(shell(host, &copy, "cat /file"), "one\n");
    assert_eq!(shell(host, &copy, "cat /etc/machine-id"), machine_id);
    host.hostctl(&["rm", "--force", &copy]).ok();
}

fn of_nothing(host: &Host, kind: Kind) {
    let name = format!("new-{}", kind.name());
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
    let taken = host.hostctl(&["snapshot", "create", &name]).ok();
    assert_eq!(taken.trim(), format!("{name}/snap0"));
    host.hostctl(&["start", &name]).ok();
    shell(host, &name, "echo x >/file");
    host.hostctl(&["snapshot", "restore", &name, "snap0"]).ok();
    assert_eq!(
        shell(host, &name, "ls /file 2>&1 || true").trim(),
        "ls: /file: No such file or directory"
    );
    host.hostctl(&["rm", "--force", &name]).ok();
}

fn go_with_instance(host: &Host, kind: Kind) {
    let name = format!("with-{}", kind.name());
    start_idle(host, kind, &name, &[]);
    for snapshot in ["one", "two"] {
        host.hostctl(&["snapshot", "create", &name, snapshot]).ok();
    }
    let listed = host.hostctl(&["snapshot", "list", "--quiet", &name]).ok();
    assert_eq!(listed, "one\ntwo\n");
    host.hostctl(&["snapshot", "rm", &name, "one"]).ok();
    let listed = host.hostctl(&["snapshot", "list", "--json", &name]).json();
    assert_eq!(listed[0]["name"], "two");
    assert!(listed[0]["size_bytes"].is_u64());
    host.hostctl(&["rm", "--force", &name]).ok();
    start_idle(host, kind, &name, &[]);
    let listed = host.hostctl(&["snapshot", "list", "--quiet", &name]).ok();
    assert_eq!(listed, "");
    host.hostctl(&["rm", "--force", &name]).ok();
}

fn refusals(host: &Host, kind: Kind) {
    let name = format!("refused-{}", kind.name());
    start_idle(host, kind, &name, &[]);
    let nowhere = format!("{name}/none");
    for (arguments, told) in [
        (
            &["snapshot", "restore", &name, "none"][..],
            "hostctl snapshot list",
        ),
        (&["snapshot", "create", &name, "Bad"], "first a letter"),
        (&["copy", &nowhere, "x"], "hostctl snapshot list"),
        (&["copy", &name, "x"], "hostctl snapshot create"),
    ] {
        let output = host.hostctl(arguments).exits(125);
        assert!(output.stderr.contains(told), "{}", output.stderr);
    }
    if kind == Kind::Container {
        let output = host.hostctl(&["snapshot", "create", "--stateful", &name]);
        let output = output.exits(125);
        assert!(
            output.stderr.contains("cannot be kept"),
            "{}",
            output.stderr
        );
    }
    host.hostctl(&["rm", "--force", &name]).ok();
}
