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
    for file in cpuset.cpus cpuset.mems; do
        [ ! -e $tree/$file ] || cat $tree/$file >$tree/$ID-host/$file 2>/dev/null || true
    done
    sh -c "echo \$\$ >$tree/$ID-host/cgroup.procs && true" 2>/dev/null || true
done
cat >start <<'EOF'
for tree in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ ! -d $tree/$ID-host ] || echo 0 >$tree/$ID-host/cgroup.procs
done
exec unshare --cgroup --pid --ipc --fork --kill-child --mount --propagation private sh -euc '
    mount -t tmpfs tmpfs /run
    mount -t proc proc /proc
    umount -R /sys/fs/cgroup
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
    init=$(cat /proc/$host/task/$host/children) && init=${init% }
    [ -n "$init" ] && nsenter -t $init -m test -S /run/systemd/private && break
    sleep 0.05
done
here=$PWD
nsenter -t $init -m -p -C sh -euc "cd $here; $1" || { cat log >&2; exit 1; }
"#;

fn beside_systemd(bundle: &Bundle, unified: bool, script: &str) -> String {
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

/// What this project's tests of another runtime cannot ask for, and what needs systemd to be there.
fn is_possible() -> bool {
    is_own() && Path::new(SYSTEMD).exists()
}

#[test]
fn a_container_runs_in_a_scope_of_either_version_that_ends_with_it() {
    if !is_possible() {
        return;
    }
    for unified in [false, true] {
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
        false,
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
