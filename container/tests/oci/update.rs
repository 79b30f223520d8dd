//! `update`: each of its options, and limits from standard input.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use container::cgroup::Cgroup;

use crate::bundle::finish_child;
use crate::command_line::running;

/// A flag of `update` with its value; the controller, and the file with its content on v1 and on v2.
type Flag = (
    [&'static str; 2],
    &'static str,
    [&'static str; 2],
    [&'static str; 2],
);

const FLAGS: &[Flag] = &[
    (
        ["--memory", "64m"],
        "memory",
        ["memory.limit_in_bytes", "67108864"],
        ["memory.max", "67108864"],
    ),
    (
        ["--memory-reservation", "32m"],
        "memory",
        ["memory.soft_limit_in_bytes", "33554432"],
        ["memory.low", "33554432"],
    ),
    (
        ["--memory-swap", "96m"],
        "memory",
        ["memory.memsw.limit_in_bytes", "100663296"],
        ["memory.swap.max", "33554432"],
    ),
    (
        ["--cpu-share", "256"],
        "cpu",
        ["cpu.shares", "256"],
        ["cpu.weight", "35"],
    ),
    (
        ["--cpu-period", "50000"],
        "cpu",
        ["cpu.cfs_period_us", "50000"],
        ["cpu.max", "max 50000"],
    ),
    (
        ["--cpu-quota", "30000"],
        "cpu",
        ["cpu.cfs_quota_us", "30000"],
        ["cpu.max", "30000 50000"],
    ),
    (
        ["--cpu-burst", "10000"],
        "cpu",
        ["cpu.cfs_burst_us", "10000"],
        ["cpu.max.burst", "10000"],
    ),
    (
        ["--cpu-idle", "1"],
        "cpu",
        ["cpu.idle", "1"],
        ["cpu.idle", "1"],
    ),
    (
        ["--cpuset-cpus", "0"],
        "cpuset",
        ["cpuset.cpus", "0"],
        ["cpuset.cpus", "0"],
    ),
    (
        ["--cpuset-mems", "0"],
        "cpuset",
        ["cpuset.mems", "0"],
        ["cpuset.mems", "0"],
    ),
    (
        ["--pids-limit", "44"],
        "pids",
        ["pids.max", "44"],
        ["pids.max", "44"],
    ),
];

#[test]
fn every_flag_of_update_changes_its_limit() {
    let bundle = running();
    for (flag, controller, v1, v2) in FLAGS {
        let ended = bundle.verb(&["update", flag[0], flag[1]], &[]);
        assert_eq!(ended.status, 0, "{flag:?}: {ended:?}");
        let views = Cgroup::open(&format!("/{}", bundle.id)).unwrap().views();
        let named = |name: &str| name.split(',').any(|part| part == *controller);
        let (path, [file, text]) = match views.iter().find(|(name, _)| named(name)) {
            Some((_, path)) => (path, v1),
            None => (&views[0].1, v2),
        };
        let found = fs::read_to_string(path.join(file)).unwrap();
        assert_eq!(found.trim(), *text, "{flag:?}");
    }
    for (flags, words) in [
        (["--memory", "1x"], "`1x` is not a size"),
        (
            ["--l3-cache-schema", "L3:0=f"],
            "has no share of Intel RDT to change",
        ),
        (["--cpuset-cpus", "4000"], "linux.resources.cpu.cpus"),
        (["--resources", "/nowhere"], "cannot read /nowhere"),
    ] {
        let ended = bundle.verb(&["update", flags[0], flags[1]], &[]);
        let refused = ended.status != 0 && ended.stderr.contains(words);
        assert!(refused, "{flags:?}: {ended:?}");
    }
}

#[test]
fn update_takes_limits_from_standard_input() {
    let bundle = running();
    let mut command = bundle.command(&["update", "--resources", "-"]);
    let mut child = command
        .arg(&bundle.id)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(br#"{"pids":{"limit":33}}"#)
        .unwrap();
    assert_eq!(finish_child(child).status, 0);
    let cgroup = Cgroup::open(&format!("/{}", bundle.id)).unwrap();
    assert_eq!(cgroup.stats().unwrap().pids.limit, Some(33));
}
