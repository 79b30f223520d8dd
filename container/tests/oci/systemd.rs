//! Control groups that systemd manages: with a systemd of the tests' own, in namespaces and a group of
//! its own, where this host has the program.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::bundle::{Bundle, is_own};

const SYSTEMD: &str = "/usr/lib/systemd/systemd";

/// Starts systemd with the bundle's units and nothing else, waits until it answers, and runs `$1` beside
/// it. What it makes below its group of the host goes with it.
const HOST: &str = r#"
for tree in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ -w $tree/cgroup.procs ] || continue
    mkdir -p $tree/$ID-host
    for controller in $(cat $tree/cgroup.controllers 2>/dev/null); do
        echo +$controller >$tree/cgroup.subtree_control
    done
    for file in cpuset.cpus cpuset.mems; do
        [ ! -e $tree/$file ] || cat $tree/$file >$tree/$ID-host/$file 2>/dev/null || true
    done
    sh -c "echo \$\$ >$tree/$ID-host/cgroup.procs && true" 2>/dev/null || true
done
cat >start <<'EOF'
for tree in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ ! -d $tree/$ID-host ] || echo 0 >$tree/$ID-host/cgroup.procs
done
exec /usr/bin/unshare --cgroup --pid --ipc --fork --kill-child --mount --propagation private sh -euc '
    mount -t tmpfs tmpfs /run
    mount -t proc proc /proc
    /bin/umount -R /sys/fs/cgroup
    export container=test SYSTEMD_UNIT_PATH=$PWD/units:/run/systemd/transient:/run/systemd/system.control
    export SYSTEMD_GENERATOR_PATH=/nonexistent SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nonexistent
    export SYSTEMD_PROC_CMDLINE=systemd.unified_cgroup_hierarchy=$UNIFIED
    exec /usr/lib/systemd/systemd --system --unit=default.target --log-target=console
'
EOF
mkdir -p units
printf '[Unit]\nDescription=nothing\n' >units/default.target
sh start >log 2>&1 &
host=$!
clean() {
    kill -KILL $host 2>/dev/null || true
    wait $host 2>/dev/null || true
    for i in $(seq 100); do
        left=
        for group in /sys/fs/cgroup/$ID-host /sys/fs/cgroup/*/$ID-host; do
            [ -d $group ] || continue
            find $group -depth -type d -exec rmdir {} + 2>/dev/null || left=$group
        done
        [ -n "$left" ] || return 0
        sleep 0.05
    done
    echo "$left is left" >&2
}
trap clean EXIT
for i in $(seq 200); do
    # Not every kernel has /proc/PID/task/PID/children, and not every host pgrep.
    init=$(cat /proc/[0-9]*/stat 2>/dev/null | sed -n "s/^\([0-9]*\) ([a-z]*) [A-Z] $host .*/\1/p") || true
    [ -n "$init" ] && /usr/bin/nsenter -t $init -m test -S /run/systemd/private && break
    sleep 0.05
done
# Only where nobody is in the group itself can the groups below it have controllers of v2.
for tree in /sys/fs/cgroup /sys/fs/cgroup/unified; do
    [ ! -d $tree/$ID-host ] || echo $host >$tree/cgroup.procs
done
here=$PWD
/usr/bin/nsenter -t $init -m -p -C sh -euc "cd $here; $1" || { cat log >&2; exit 1; }
"#;

pub(crate) fn beside_systemd(bundle: &Bundle, unified: bool, script: &str) -> String {
    let script = script.replace('\'', r"'\''");
    let unified = u8::from(unified);
    let ended = bundle.script(&format!(
        "UNIFIED={unified}; export UNIFIED\nset -- '{script}'\n{HOST}"
    ));
    assert_eq!(ended.status, 0, "{ended:?}");
    ended.stdout
}

fn scoped(script: &str) -> Bundle {
    Bundle::new(script).with(|config| {
        config["linux"]["cgroupsPath"] = json!("test.slice:unit:name");
    })
}

/// Whether the host has nothing but cgroup v2, so that systemd can have nothing else.
pub(crate) fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// What this project's tests of another runtime cannot ask for, and what needs systemd to be there.
pub(crate) fn is_possible() -> bool {
    is_own() && Path::new(SYSTEMD).exists()
}

#[test]
fn a_container_runs_in_a_scope_of_either_version_that_ends_with_it() {
    if !is_possible() {
        return;
    }
    for unified in [false, true] {
        if is_unified() && !unified {
            continue;
        }
        let bundle = scoped("exec sleep 100");
        let output = beside_systemd(
            &bundle,
            unified,
            r#"$R --systemd-cgroup create $ID >/dev/null 2>errors </dev/null || { cat errors >&2; exit 1; }
            systemctl show unit-name.scope -p ActiveState,Slice,Delegate
            $R start $ID
            grep -c test.slice/unit-name.scope /proc/$($R ps --format json $ID | tr -d '[]')/cgroup >count
            $R exec $ID echo inside
            $R delete --force $ID
            systemctl show unit-name.scope -p LoadState"#,
        );
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(
            lines,
            [
                "Slice=test.slice",
                "Delegate=yes",
                "ActiveState=active",
                "inside",
                "LoadState=not-found"
            ],
            "unified: {unified}"
        );
        let count = fs::read_to_string(bundle.path().join("count")).unwrap();
        assert!(count.trim().parse::<u32>().unwrap() > 0);
    }
}

#[test]
fn systemd_knows_the_limits_and_keeps_them_when_it_reads_its_units_again() {
    // Where v1 has the controller, whichever the version of systemd's own hierarchy is.
    if !is_possible() || !Path::new("/sys/fs/cgroup/pids/cgroup.procs").exists() {
        return;
    }
    let bundle = scoped("exec sleep 100").with(|config| {
        // One is the container's process.
        config["linux"]["resources"]["pids"] = json!({"limit": 1});
    });
    let output = beside_systemd(
        &bundle,
        false,
        r#"$R --systemd-cgroup create $ID >/dev/null 2>errors </dev/null || { cat errors >&2; exit 1; }
        group=/test.slice/unit-name.scope
        systemctl show unit-name.scope -p TasksMax,DevicePolicy
        cat /sys/fs/cgroup/pids$group/pids.max
        $R update --pids-limit 44 $ID
        systemctl daemon-reload
        systemctl show unit-name.scope -p TasksMax
        cat /sys/fs/cgroup/pids$group/pids.max
        grep "c 1:3" /sys/fs/cgroup/devices$group/devices.list
        $R delete --force $ID"#,
    );
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines,
        [
            "DevicePolicy=strict",
            "TasksMax=1",
            "1",
            "TasksMax=44",
            "44",
            "c 1:3 rwm"
        ]
    );
}

#[test]
fn systemd_keeps_the_limits_and_device_rules_of_cgroup_v2() {
    if !is_possible() || !is_unified() {
        return;
    }
    let bundle = scoped("exec sleep 100").with(|config| {
        config["linux"]["resources"] = json!({
            "devices": [{"allow": false, "access": "rwm"}],
            "pids": {"limit": 33},
            "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 64 << 20},
            "cpu": {"shares": 512, "quota": 30000, "period": 100_000, "cpus": "0"},
        });
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
    });
    let output = beside_systemd(
        &bundle,
        true,
        r#"$R --systemd-cgroup create $ID >/dev/null 2>errors </dev/null || { cat errors >&2; exit 1; }
        group=/sys/fs/cgroup/test.slice/unit-name.scope
        shown() {
            systemctl show unit-name.scope -p TasksMax,MemoryMax,MemoryLow,CPUWeight,CPUQuotaPerSecUSec,AllowedCPUs
            cat $group/pids.max $group/memory.max $group/memory.low $group/cpu.max $group/cpuset.cpus
        }
        denied() { $R exec $ID sh -c 'mknod /dev/kmsg-$0 c 1 11; head -c1 /dev/kmsg-$0; echo >/dev/null' $1 2>&1 || true; }
        $R start $ID
        shown >before
        denied one
        systemctl daemon-reload
        shown | cmp - before
        denied two
        systemctl set-property --runtime unit-name.scope TasksMax=44
        cat $group/pids.max
        denied three
        $R update --memory 134217728 --memory-swap 134217728 $ID
        systemctl daemon-reload
        cat $group/memory.max $group/pids.max
        $R pause $ID; $R resume $ID
        $R delete --force $ID
        cat before"#,
    );
    let denied = |name: &str| format!("head: /dev/kmsg-{name}: Operation not permitted");
    let lines: Vec<&str> = output.lines().collect();
    let expected = [
        &denied("one"),
        &denied("two"),
        "44",
        &denied("three"),
        "134217728",
        "44",
        "CPUWeight=59",
        "CPUQuotaPerSecUSec=300ms",
        "AllowedCPUs=0",
        "MemoryLow=33554432",
        "MemoryMax=67108864",
        "TasksMax=33",
        "33",
        "67108864",
        "33554432",
        "30000 100000",
        "0",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_scope_has_the_properties_that_annotations_ask_for_and_is_forgotten_when_it_failed() {
    if !is_possible() {
        return;
    }
    let bundle = scoped("exec sleep 100").with(|config| {
        config["annotations"] = json!({
            "org.systemd.property.RuntimeMaxSec": "1",
            "org.systemd.property.TimeoutStopSec": "uint64 7",
            "org.systemd.property.Description": "'a test'",
            "org.systemd.property.After": "['other.target']"
        });
    });
    let output = beside_systemd(
        &bundle,
        is_unified(),
        r#"$R --systemd-cgroup run --detach $ID >/dev/null 2>errors </dev/null || { cat errors >&2; exit 1; }
        systemctl show unit-name.scope -p RuntimeMaxUSec,TimeoutStopUSec,Description
        systemctl show unit-name.scope -p After | grep -o other.target
        until systemctl is-failed --quiet unit-name.scope; do sleep 0.05; done
        $R delete $ID
        systemctl show unit-name.scope -p LoadState"#,
    );
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines,
        [
            "TimeoutStopUSec=7s",
            "RuntimeMaxUSec=1s",
            "Description=a test",
            "other.target",
            "LoadState=not-found"
        ]
    );
    let bundle = bundle.with(|config| {
        config["annotations"] = json!({"org.systemd.property.RuntimeMaxSec": "long"});
    });
    let ended = bundle.verb(&["--systemd-cgroup", "run"], &[]);
    let words = "annotations.org.systemd.property.RuntimeMaxSec: `long`";
    assert!(ended.stderr.contains(words), "{ended:?}");
}

#[test]
fn without_systemd_the_request_is_refused_by_name() {
    if !is_own() {
        return;
    }
    let bundle = scoped("true");
    let ended =
        bundle.script("mount -t tmpfs tmpfs /run; $R --systemd-cgroup run $ID || echo refused");
    assert_eq!(ended.stdout, "refused\n", "{ended:?}");
    let words = "cannot connect to systemd at /run/systemd/private: no such file";
    assert!(ended.stderr.contains(words), "{ended:?}");
}
