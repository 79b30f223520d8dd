//! Podman and buildah: a container's life, and images that are built. The shell is that of `podman`.

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    // A container's life.
    (
        "podman_list",
        "start sleep 100; $P ps --format '{{.Names}} {{.State}}'; remove",
        0,
        "Up",
    ),
    (
        "podman_exec",
        "start sleep 100; $P exec $NAME id; remove",
        0,
        "uid=0",
    ),
    (
        "podman_exec_as_a_user",
        "start sleep 100; $P exec --user user $NAME id; remove",
        0,
        "uid=1000",
    ),
    (
        "podman_exec_with_a_terminal",
        "start sleep 100; $P exec --tty $NAME sh -c 'test -t 0 && echo tty'; remove",
        0,
        "tty\r\n",
    ),
    (
        "podman_exec_with_input",
        "start sleep 100; echo hello | $P exec --interactive $NAME cat; remove",
        0,
        "hello\n",
    ),
    (
        "podman_exec_status",
        "start sleep 100; $P exec $NAME sh -c 'exit 9' || echo \"status $?\"; remove",
        0,
        "status 9\n",
    ),
    (
        "podman_exec_of_nothing",
        "start sleep 100; $P exec $NAME nope || echo \"status $?\"; remove",
        0,
        "status 127\n",
    ),
    (
        "podman_exec_of_no_program",
        "start sleep 100; $P exec $NAME /etc/passwd || echo \"status $?\"; remove",
        0,
        "status 126\n",
    ),
    (
        "podman_exec_in_the_background",
        "start sleep 100; $P exec --detach $NAME touch /tmp/a; until $P exec $NAME test -e /tmp/a; do :; done; remove",
        0,
        "",
    ),
    (
        "podman_exec_with_an_environment",
        "start sleep 100; $P exec --env Q=1 --workdir /tmp $NAME sh -c 'echo $Q $PWD'; remove",
        0,
        "1 /tmp\n",
    ),
    (
        "podman_exec_privileged",
        "start sleep 100; $P exec --privileged $NAME grep CapEff /proc/self/status; remove",
        0,
        "CapEff",
    ),
    (
        "podman_top",
        "start sleep 100; $P top $NAME; remove",
        0,
        "sleep 100",
    ),
    (
        "podman_stats",
        "start sleep 100; $P stats --no-stream $NAME; remove",
        0,
        "hostd-test",
    ),
    (
        "podman_pause",
        "start sleep 100; $P pause $NAME; $P ps --all --filter name=$NAME --format '{{.State}}'; $P unpause $NAME; \
        $P exec $NAME echo again; remove",
        0,
        "Paused",
    ),
    (
        "podman_paused_and_removed",
        "start sleep 100; $P pause $NAME; remove; $P ps --all --filter name=$NAME --format gone-not",
        0,
        "",
    ),
    (
        "podman_stop_and_start",
        "start sleep 100; $P stop --time 0 $NAME; $P start $NAME; $P restart --time 0 $NAME; $P exec $NAME echo again; remove",
        0,
        "again\n",
    ),
    (
        "podman_inspect",
        "start sleep 100; $P inspect --format '{{.State.Status}} {{.OCIRuntime}}' $NAME; remove",
        0,
        "running hostd",
    ),
    (
        "podman_annotation",
        "start sleep 100; $P inspect --format '{{.Config.Annotations}}' $NAME; remove",
        0,
        "map",
    ),
    (
        "podman_clean_up",
        "$P run --detach --rm --name $NAME --network none busybox true; while $P container exists $NAME; do sleep 0.1; done",
        0,
        "",
    ),
    (
        "podman_health_check",
        "$P run --detach --name $NAME --network none --health-cmd 'test -e /etc/passwd' --health-interval disable busybox sleep 100 >/dev/null; \
        $P healthcheck run $NAME && echo healthy; remove",
        0,
        "healthy",
    ),
    (
        "podman_pod",
        "$P pod create --name $NAME --infra=false >/dev/null; run --pod $NAME --network none busybox echo in; $P pod rm --force $NAME",
        0,
        "in\n",
    ),
    (
        "podman_commit",
        "start sh -c 'echo kept >/a; exec sleep 100'; $P commit -q $NAME localhost/$NAME; remove; $RUN localhost/$NAME cat /a; $P rmi -f localhost/$NAME",
        0,
        "kept\n",
    ),
    // Images that are built with it.
    (
        "podman_build",
        "mkdir b-$NAME; printf 'FROM localhost/busybox\\nRUN echo built >/a && id -u >>/a\\nUSER user\\nRUN id -un >/tmp/b\\nCMD cat /a /tmp/b\\n' >b-$NAME/Containerfile; \
        $P build --quiet --network none --signature-policy $WORK/policy.json --tag localhost/$NAME b-$NAME; $RUN localhost/$NAME; $P rmi -f localhost/$NAME",
        0,
        "built\n0\nuser\n",
    ),
    (
        "podman_build_that_fails",
        "mkdir b-$NAME; printf 'FROM localhost/busybox\\nRUN exit 4\\n' >b-$NAME/Containerfile; \
        $P build --network none --signature-policy $WORK/policy.json b-$NAME",
        4,
        "exit status 4",
    ),
    (
        "buildah_run",
        "c=$(buildah --signature-policy $WORK/policy.json from localhost/busybox); buildah run --runtime $RUNTIME --network none $c -- sh -c 'echo in; exit 3' || echo \"status $?\"; \
        buildah rm $c",
        0,
        "in\n",
    ),
];
