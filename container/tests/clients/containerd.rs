//! containerd, through ctr and its shim for runtimes with runc's command line.

use crate::Case;

/// `run OPTIONS... -- COMMAND...` runs a container in the foreground and removes it; `start COMMAND...`
/// leaves one running.
pub(crate) const SHELL: &str = "set -eu; IMAGE=docker.io/library/busybox:latest; \
    $CTR images list -q | grep -q $IMAGE || IMAGE=$($CTR images list -q | head -n 1); \
    OPTIONS=\"--snapshotter native --runc-binary $RUNTIME\"; \
    run() { o=; while [ \"$1\" != -- ]; do o=\"$o $1\"; shift; done; shift; $CTR run --rm $OPTIONS $o $IMAGE $NAME \"$@\"; }; \
    start() { $CTR run --detach $OPTIONS $IMAGE $NAME \"$@\"; }; \
    remove() { $CTR tasks delete --force $NAME >/dev/null 2>&1 || true; $CTR containers delete $NAME; }; ";

pub(crate) const CASES: &[Case] = &[
    ("containerd_run", "run -- echo made", 0, "made\n"),
    ("containerd_exit_status", "run -- sh -c 'exit 7'", 7, ""),
    (
        "containerd_standard_error",
        "run -- sh -c 'echo wrong >&2' 2>&1 >/dev/null",
        0,
        "wrong\n",
    ),
    (
        "containerd_program_not_there",
        "run -- nope",
        1,
        "not found",
    ),
    (
        "containerd_environment",
        "run --env A=b -- sh -c 'echo $A'",
        0,
        "b\n",
    ),
    (
        "containerd_working_directory",
        "run --cwd /tmp -- pwd",
        0,
        "/tmp\n",
    ),
    (
        "containerd_readonly_root",
        "run --read-only -- touch /x",
        1,
        "Read-only",
    ),
    (
        "containerd_mount",
        "run --mount type=bind,src=$WORK,dst=/data,options=rbind:ro -- sh -c 'ls /data/policy.json; touch /data/x'",
        1,
        "/data/policy.json",
    ),
    (
        "containerd_memory",
        "run --memory-limit 16777216 -- dd if=/dev/zero of=/dev/null bs=100M count=1",
        137,
        "",
    ),
    (
        "containerd_filter",
        "run --seccomp -- grep Seccomp: /proc/self/status",
        0,
        "\t2\n",
    ),
    (
        "containerd_privileged",
        "run --privileged -- sh -c 'mount -t tmpfs x /tmp && echo mounted'",
        0,
        "mounted\n",
    ),
    (
        "containerd_hosts_network",
        "test \"$(run --net-host -- readlink /proc/self/ns/net)\" = \"$(readlink /proc/self/ns/net)\"",
        0,
        "",
    ),
    (
        "containerd_pid_file",
        "$CTR run --detach --pid-file pid-$NAME $OPTIONS $IMAGE $NAME sleep 100; kill -0 $(cat pid-$NAME) && echo alive; remove",
        0,
        "alive\n",
    ),
    (
        "containerd_list",
        "start sleep 100; $CTR tasks list; remove",
        0,
        "RUNNING",
    ),
    (
        "containerd_exec",
        "start sleep 100; $CTR tasks exec --exec-id e $NAME sh -c 'id -u; exit 5' || echo \"status $?\"; remove",
        0,
        "0\nstatus 5\n",
    ),
    (
        "containerd_exec_as_a_user",
        "start sleep 100; $CTR tasks exec --exec-id e --user 7 $NAME id -u; remove",
        0,
        "7\n",
    ),
    (
        "containerd_processes",
        "start sleep 100; $CTR tasks ps $NAME; remove",
        0,
        "PID",
    ),
    (
        "containerd_metrics",
        "start sleep 100; $CTR tasks metrics $NAME; remove",
        0,
        "memory",
    ),
    (
        "containerd_pause",
        "start sleep 100; $CTR tasks pause $NAME; $CTR tasks list; $CTR tasks resume $NAME; $CTR tasks list; remove",
        0,
        "PAUSED",
    ),
    (
        "containerd_kill",
        "start sleep 100; $CTR tasks kill --signal KILL $NAME; until $CTR tasks list | grep STOPPED; do sleep 0.1; done; $CTR tasks delete $NAME || echo \"status $?\"; $CTR containers delete $NAME",
        0,
        "137",
    ),
    (
        "containerd_kill_all",
        "start sh -c 'sleep 100 & sleep 100'; $CTR tasks kill --all --signal KILL $NAME; until $CTR tasks list | grep STOPPED; do sleep 0.1; done; remove",
        0,
        "STOPPED",
    ),
    (
        "containerd_restarted_under_the_same_name",
        "run -- echo one; run -- echo two",
        0,
        "one\ntwo\n",
    ),
];
