//! Podman: what a container is given, and what it may do.

use crate::Case;

/// `run OPTIONS IMAGE COMMAND` runs a container and removes it, `$RUN` one without a network; `start COMMAND`
/// leaves one running.
///
/// What a container said is taken from its log. About once in a dozen runs of all cases one that ended at
/// once had said nothing to the client that ran it: most likely podman's monitor (conmon 2.1.6) reads the
/// output whether or not it has accepted that client's connection. What waits for the client (it reads
/// from it, or says the same again and again) is seen through the client.
pub(crate) const SHELL: &str = "set -eu; P=podman; RUN='run --network none'; \
    run() { \
        log=$(mktemp log-XXXXXXXX); \
        podman run --rm --log-opt path=$WORK/$log \"$@\" >/dev/null && status=0 || status=$?; \
        awk '{ line = $0; sub(/^[^ ]+ [^ ]+ . /, \"\", line); \
            printf \"%s%s\", line, $3 == \"F\" ? \"\\n\" : \"\" >\"/dev/\" $2 }' $log; \
        return $status; \
    }; \
    start() { podman run --detach --name $NAME --network none busybox \"$@\" >/dev/null; }; \
    remove() { podman rm --force --time 0 $NAME >/dev/null; }; ";

pub(crate) const CASES: &[Case] = &[
    // How it ends.
    ("podman_exit_status", "$RUN busybox sh -c 'exit 7'", 7, ""),
    (
        "podman_exit_status_of_a_killed_program",
        "start sleep 100; $P kill $NAME; $P wait $NAME; remove",
        0,
        "137",
    ),
    (
        "podman_signal_of_a_child",
        "$RUN busybox sh -c 'sh -c \"kill -9 \\$\\$\"; echo $?'",
        0,
        "137",
    ),
    (
        "podman_program_not_in_the_path",
        "$RUN busybox nope",
        127,
        "not found",
    ),
    (
        "podman_program_not_there",
        "$RUN busybox /nope",
        127,
        "no such file",
    ),
    (
        "podman_program_not_executable",
        "$RUN busybox /etc/passwd",
        126,
        "ermission denied",
    ),
    (
        "podman_program_is_a_directory",
        "$RUN busybox /etc",
        126,
        "ermission denied",
    ),
    (
        "podman_signals_are_passed_on",
        "$P run --rm --network none busybox sh -c 'trap \"exit 5\" TERM; while :; do echo up; sleep 0.1; done' >out-$NAME & \
        while ! grep -q up out-$NAME; do sleep 0.1; done; kill -TERM $!; wait $!",
        5,
        "",
    ),
    (
        "podman_stops_by_the_images_signal",
        "start sh -c 'trap \"exit 6\" USR1; while :; do sleep 0.1; done'; $P kill -s USR1 $NAME; $P wait $NAME; remove",
        0,
        "6",
    ),
    // Who and where.
    (
        "podman_user_by_name",
        "$RUN --user user busybox id",
        0,
        "uid=1000(user) gid=1000(user)",
    ),
    (
        "podman_user_by_number",
        "$RUN --user 12:34 busybox sh -c 'echo $(id -u) $(id -g)'",
        0,
        "12 34\n",
    ),
    (
        "podman_additional_group",
        "$RUN --group-add 44 busybox id",
        0,
        "44",
    ),
    (
        "podman_working_directory",
        "$RUN --workdir /tmp busybox pwd",
        0,
        "/tmp\n",
    ),
    (
        "podman_missing_working_directory",
        "$RUN --workdir /new/one busybox pwd",
        126,
        "/new/one",
    ),
    (
        "podman_environment",
        "$RUN --env A='b c' busybox sh -c 'echo \"<$A>\"'",
        0,
        "<b c>",
    ),
    (
        "podman_home",
        "$RUN --user user busybox sh -c 'echo $HOME'",
        0,
        "/home/user\n",
    ),
    (
        "podman_host_name",
        "$RUN --hostname moon busybox hostname",
        0,
        "moon\n",
    ),
    (
        "podman_umask",
        "$RUN --umask 0077 busybox sh -c umask",
        0,
        "0077\n",
    ),
    (
        "podman_arguments",
        "$RUN busybox sh -c 'for a; do echo \"<$a>\"; done' sh 'a b' '' '$X'",
        0,
        "<a b>\n<>\n<$X>\n",
    ),
    // Streams.
    (
        "podman_standard_input",
        "echo hello | $P run --rm --network none --interactive busybox cat",
        0,
        "hello\n",
    ),
    (
        "podman_no_standard_input",
        "echo hello | $RUN busybox sh -c 'cat; echo end'",
        0,
        "end\n",
    ),
    (
        "podman_terminal",
        "$RUN --tty busybox sh -c 'test -t 0 && test -t 1 && echo both'",
        0,
        "both\r\n",
    ),
    (
        "podman_standard_error",
        "$RUN busybox sh -c 'echo wrong >&2' 2>&1 >/dev/null",
        0,
        "wrong\n",
    ),
    (
        "podman_much_output",
        "$RUN busybox sh -c 'head -c 3000000 /dev/zero' | wc -c",
        0,
        "3000000",
    ),
    (
        "podman_log",
        "start echo made; $P wait $NAME; $P logs $NAME; remove",
        0,
        "made\n",
    ),
    (
        "podman_attached_start",
        "$P create --name $NAME --network none busybox sh -c 'echo made; exit 3' >/dev/null; \
        $P start --attach $NAME || echo \"status $?\"; remove",
        0,
        "made\nstatus 3\n",
    ),
    // Files.
    (
        "podman_volume",
        "mkdir v-$NAME; $RUN --volume $WORK/v-$NAME:/data busybox touch /data/a; ls v-$NAME",
        0,
        "a\n",
    ),
    (
        "podman_readonly_volume",
        "$RUN --volume $WORK:/data:ro busybox touch /data/x",
        1,
        "Read-only",
    ),
    (
        "podman_named_volume",
        "$RUN --volume $NAME:/data busybox sh -c 'echo kept >/data/a'; \
        $RUN --volume $NAME:/data busybox cat /data/a; $P volume rm $NAME",
        0,
        "kept\n",
    ),
    (
        "podman_volume_of_a_file",
        "echo text >f-$NAME; $RUN --volume $WORK/f-$NAME:/etc/motd busybox cat /etc/motd",
        0,
        "text\n",
    ),
    (
        "podman_volume_that_spreads",
        "$RUN --volume $WORK:/data:rslave busybox grep ' /data ' /proc/self/mountinfo",
        0,
        " /data ",
    ),
    (
        "podman_temporary_file_system",
        "$RUN --tmpfs /x:size=64k busybox grep ' /x ' /proc/mounts",
        0,
        "size=64k",
    ),
    (
        "podman_temporary_file_system_with_the_images_files",
        "$RUN --tmpfs /etc busybox cat /etc/group",
        0,
        "user:x:1000",
    ),
    (
        "podman_readonly_root",
        "$RUN --read-only busybox touch /x",
        1,
        "Read-only",
    ),
    (
        "podman_readonly_root_has_a_place_to_write",
        "$RUN --read-only busybox sh -c 'touch /tmp/x && echo yes'",
        0,
        "yes\n",
    ),
    (
        "podman_shared_memory",
        "$RUN --shm-size 32m busybox df -m /dev/shm",
        0,
        " 32 ",
    ),
    (
        "podman_copy",
        "start sleep 100; echo text >c-$NAME; $P cp c-$NAME $NAME:/tmp/a; $P exec $NAME cat /tmp/a; remove",
        0,
        "text\n",
    ),
    (
        "podman_masked_path",
        "$RUN busybox sh -c 'wc -c </proc/keys; ls /proc/scsi /sys/firmware | wc -l'",
        0,
        "0\n",
    ),
    (
        "podman_readonly_path",
        "$RUN busybox sh -c 'echo 1 >/proc/sys/kernel/panic'",
        1,
        "ead-only",
    ),
    (
        "podman_unmasked_path",
        "$RUN --security-opt unmask=/proc/sys busybox sh -c 'grep -c \" /proc/sys \" /proc/mounts; true'",
        0,
        "0\n",
    ),
    // Limits.
    (
        "podman_memory",
        "$RUN --memory 64m busybox cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || true",
        0,
        "67108864",
    ),
    (
        "podman_processes",
        "$RUN --pids-limit 50 busybox sh -c 'cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null || true'",
        0,
        "50\n",
    ),
    (
        "podman_processors",
        "$RUN --cpus 0.5 busybox sh -c 'cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null || true'",
        0,
        "50000",
    ),
    (
        "podman_processor_share",
        "$RUN --cpu-shares 512 busybox sh -c 'cat /sys/fs/cgroup/cpu/cpu.shares 2>/dev/null || echo 512'",
        0,
        "512",
    ),
    (
        "podman_processor_set",
        "$RUN --cpuset-cpus 0 busybox grep Cpus_allowed_list /proc/self/status",
        0,
        "\t0\n",
    ),
    (
        "podman_shortage_of_memory",
        "$RUN --memory 16m --memory-swap 16m busybox dd if=/dev/zero of=/dev/null bs=100M count=1",
        137,
        "",
    ),
    (
        "podman_limit_of_files",
        "$RUN --ulimit nofile=512:512 --ulimit nproc=1024:1024 busybox sh -c 'ulimit -n'",
        0,
        "512\n",
    ),
    (
        "podman_oom_score",
        "$RUN --oom-score-adj 500 busybox cat /proc/self/oom_score_adj",
        0,
        "500\n",
    ),
    // Rights.
    (
        "podman_no_capabilities",
        "$RUN --cap-drop all busybox grep CapEff /proc/self/status",
        0,
        "0000000000000000",
    ),
    (
        "podman_capability_missing",
        "$RUN busybox mount -t tmpfs x /tmp",
        1,
        "ermi",
    ),
    (
        "podman_capability_added",
        "$RUN --cap-add sys_admin busybox sh -c 'mount -t tmpfs x /tmp && echo mounted'",
        0,
        "mounted\n",
    ),
    (
        "podman_privileged",
        "$RUN --privileged busybox sh -c 'mount -t tmpfs x /tmp && ls /dev | wc -l'",
        0,
        "",
    ),
    (
        "podman_no_new_privileges",
        "$RUN --security-opt no-new-privileges busybox grep NoNew /proc/self/status",
        0,
        "\t1\n",
    ),
    (
        "podman_filter",
        "$RUN busybox grep Seccomp: /proc/self/status",
        0,
        "\t2\n",
    ),
    (
        "podman_unfiltered",
        "$RUN --security-opt seccomp=unconfined busybox grep Seccomp: /proc/self/status",
        0,
        "\t0\n",
    ),
    (
        "podman_own_filter",
        "echo '{\"defaultAction\":\"SCMP_ACT_ALLOW\",\"syscalls\":[{\"names\":[\"mkdir\",\"mkdirat\"],\"action\":\"SCMP_ACT_ERRNO\",\"errnoRet\":28}]}' >s-$NAME; \
        $RUN --security-opt seccomp=$WORK/s-$NAME busybox mkdir /x",
        1,
        "No space left",
    ),
    (
        "podman_kernel_setting",
        "$RUN --sysctl net.ipv4.ip_forward=1 busybox cat /proc/sys/net/ipv4/ip_forward",
        0,
        "1\n",
    ),
    (
        "podman_device",
        "$RUN --device /dev/full:/dev/mine busybox sh -c 'echo >/dev/mine'",
        1,
        "No space left",
    ),
    (
        "podman_device_denied",
        "$RUN --cap-add mknod busybox sh -c 'mknod /tmp/x b 254 0; cat /tmp/x'",
        1,
        "not permitted",
    ),
    // Namespaces.
    (
        "podman_hosts_processes",
        "$RUN --pid host busybox sh -c 'test $$ -ne 1 && echo others'",
        0,
        "others\n",
    ),
    (
        "podman_hosts_ipc",
        "test \"$($RUN --ipc host busybox readlink /proc/self/ns/ipc)\" = \"$(readlink /proc/self/ns/ipc)\"",
        0,
        "",
    ),
    (
        "podman_hosts_names",
        "test \"$($RUN --uts host busybox readlink /proc/self/ns/uts)\" = \"$(readlink /proc/self/ns/uts)\"",
        0,
        "",
    ),
    (
        "podman_hosts_network",
        "test \"$(run --network host busybox readlink /proc/self/ns/net)\" = \"$(readlink /proc/self/ns/net)\"",
        0,
        "",
    ),
    (
        "podman_network_of_another_container",
        "start sleep 100; test \"$(run --network container:$NAME busybox readlink /proc/self/ns/net)\" = \
        \"$($P exec $NAME readlink /proc/self/ns/net)\"; remove",
        0,
        "",
    ),
    (
        "podman_cgroup_namespace",
        "$RUN --cgroupns private busybox cat /proc/self/cgroup",
        0,
        ":/\n",
    ),
    (
        "podman_user_namespace",
        "$RUN --uidmap 0:100000:5000 --gidmap 0:200000:5000 busybox sh -c 'cat /proc/self/uid_map; id -u; touch /a && echo mine'",
        0,
        "0     100000       5000\n0\nmine\n",
    ),
    (
        "podman_user_in_a_user_namespace",
        "$RUN --uidmap 0:100000:5000 --user user busybox sh -c 'id -u; touch ~/a && echo mine'",
        0,
        "1000\nmine\n",
    ),
    (
        "podman_bridge",
        "run --network podman busybox sh -c 'ip -4 addr show dev eth0; ip route'",
        0,
        "default via",
    ),
    (
        "podman_published_port",
        "$P run --detach --name $NAME --publish 127.0.0.1:18080:80 --network podman busybox sh -c 'echo page >/tmp/a; httpd -f -h /tmp' >/dev/null; \
        $P exec $NAME sh -c 'until wget -q -O- 127.0.0.1/a; do sleep 0.1; done'; $P port $NAME; remove",
        0,
        "page\n80/tcp -> 127.0.0.1:18080",
    ),
    (
        "podman_init_process_reaps",
        "$RUN --pid private busybox sh -c 'echo $$'",
        0,
        "1\n",
    ),
];
