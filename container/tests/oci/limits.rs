//! Limits (`linux.resources`), as they are in the files of the container's control group, on either
//! version; what the host cannot honour is refused by its name (config-linux.md, "Control groups").

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::bundle::{Bundle, is_own};

const MOUNT: &str = "/sys/fs/cgroup";

/// A file of the group, and how its content begins.
type Shown = Option<(&'static str, &'static str)>;

/// What is wished for, the field that a refusal names, the controller, and where it shows on v1 and on
/// v2: nowhere where the version has no such limit, which is then refused.
const CASES: &[(&str, &str, &str, Shown, Shown)] = &[
    (
        r#"{"memory": {"limit": 33554432}}"#,
        "memory.limit",
        "memory",
        Some(("memory.limit_in_bytes", "33554432")),
        Some(("memory.max", "33554432")),
    ),
    (
        r#"{"memory": {"reservation": 16777216}}"#,
        "memory.reservation",
        "memory",
        Some(("memory.soft_limit_in_bytes", "16777216")),
        Some(("memory.low", "16777216")),
    ),
    (
        r#"{"memory": {"limit": 33554432, "swap": 50331648}}"#,
        "memory.swap",
        "memory",
        Some(("memory.memsw.limit_in_bytes", "50331648")),
        Some(("memory.swap.max", "16777216")),
    ),
    (
        r#"{"memory": {"limit": -1, "swap": -1}}"#,
        "memory.limit",
        "memory",
        Some(("memory.limit_in_bytes", "9223372036854771712")),
        Some(("memory.max", "max")),
    ),
    (
        r#"{"memory": {"swappiness": 7}}"#,
        "memory.swappiness",
        "memory",
        Some(("memory.swappiness", "7")),
        None,
    ),
    (
        r#"{"memory": {"limit": 33554432, "disableOOMKiller": true}}"#,
        "memory.disableOOMKiller",
        "memory",
        Some(("memory.oom_control", "oom_kill_disable 1")),
        None,
    ),
    (
        r#"{"cpu": {"shares": 512}}"#,
        "cpu.shares",
        "cpu",
        Some(("cpu.shares", "512")),
        Some(("cpu.weight", "59")),
    ),
    (
        r#"{"cpu": {"quota": 20000, "period": 50000}}"#,
        "cpu.quota",
        "cpu",
        Some(("cpu.cfs_quota_us", "20000")),
        Some(("cpu.max", "20000 50000")),
    ),
    (
        r#"{"cpu": {"quota": 20000, "period": 50000, "burst": 10000}}"#,
        "cpu.burst",
        "cpu",
        Some(("cpu.cfs_burst_us", "10000")),
        Some(("cpu.max.burst", "10000")),
    ),
    (
        r#"{"cpu": {"idle": 1, "shares": 512}}"#,
        "cpu.idle",
        "cpu",
        Some(("cpu.idle", "1")),
        Some(("cpu.idle", "1")),
    ),
    (
        r#"{"cpu": {"cpus": "0", "mems": "0"}}"#,
        "cpu.cpus",
        "cpuset",
        Some(("cpuset.cpus", "0")),
        Some(("cpuset.cpus", "0")),
    ),
    (
        r#"{"pids": {"limit": 77}}"#,
        "pids.limit",
        "pids",
        Some(("pids.max", "77")),
        Some(("pids.max", "77")),
    ),
    (
        r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}"#,
        "hugepageLimits",
        "hugetlb",
        Some(("hugetlb.2MB.limit_in_bytes", "4194304")),
        Some(("hugetlb.2MB.max", "4194304")),
    ),
    (
        r#"{"unified": {"hugetlb.2MB.max": "4194304"}}"#,
        "unified.hugetlb.2MB.max",
        "hugetlb",
        None,
        Some(("hugetlb.2MB.max", "4194304")),
    ),
    // No device of this name, if there is the controller at all.
    (
        r#"{"rdma": {"moon": {"hcaHandles": 3}}}"#,
        "rdma.moon",
        "rdma",
        None,
        None,
    ),
    (
        r#"{"unified": {"pids.max": "66"}}"#,
        "unified.pids.max",
        "pids",
        None,
        Some(("pids.max", "66")),
    ),
    (
        r#"{"network": {"classID": 1048577}}"#,
        "network.classID",
        "net_cls",
        Some(("net_cls.classid", "1048577")),
        None,
    ),
];

/// The container's directory in the hierarchy of the controller, and whether that is of v2.
fn directory(controller: &str, id: &str) -> Option<(PathBuf, bool)> {
    let v1 = PathBuf::from(MOUNT).join(controller);
    // Where the kernel lacks the controller, there may be an empty directory to mount it on.
    if v1.join("cgroup.procs").exists() {
        return Some((v1.join(id), false));
    }
    // Alone, or beside v1.
    [MOUNT.to_owned(), format!("{MOUNT}/unified")]
        .iter()
        .find_map(|root| {
            let controllers = fs::read_to_string(format!("{root}/cgroup.controllers")).ok()?;
            let mut controllers = controllers.split_whitespace();
            controllers
                .any(|have| have == controller)
                .then(|| (PathBuf::from(root).join(id), true))
        })
}

#[test]
fn every_limit_is_set_or_refused_by_its_name() {
    for (wish, field, controller, v1, v2) in CASES {
        let wish: Value = serde_json::from_str(wish).unwrap();
        let bundle = Bundle::new("true").with(|config| {
            let resources = config["linux"]["resources"].as_object_mut().unwrap();
            resources.extend(wish.as_object().unwrap().clone());
        });
        let place = directory(controller, &bundle.id);
        let expected = place.and_then(|(directory, unified)| {
            let (file, text) = if unified { *v2 } else { *v1 }?;
            Some((directory.join(file), text))
        });
        let Some((file, text)) = expected else {
            bundle.assert_refused(&format!("linux.resources.{field}"));
            continue;
        };
        let ended = bundle.quiet(&["create"]);
        assert_eq!(ended.status, 0, "{field}: {ended:?}");
        let content = fs::read_to_string(&file);
        let content = content.unwrap_or_else(|error| panic!("{field}: {error}"));
        assert!(content.starts_with(text), "{field}: {content}");
    }
}

#[test]
fn a_limit_that_makes_no_sense_is_refused_by_its_name() {
    for (resources, field) in [
        (
            json!({"memory": {"limit": 33_554_432, "swap": 1_048_576}}),
            "memory.swap",
        ),
        (json!({"memory": {"swappiness": 1000}}), "memory.swappiness"),
        (json!({"cpu": {"cpus": "moon"}}), "cpu.cpus"),
        (json!({"cpu": {"cpus": "5000"}}), "cpu.cpus"),
        (
            json!({"cpu": {"quota": 20_000, "burst": 90_000, "period": 50_000}}),
            "cpu.burst",
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 4_194_304}]}),
            "hugepageLimits",
        ),
        (json!({"unified": {"moon.max": "66"}}), "unified.moon.max"),
    ] {
        let bundle = Bundle::new("true").with(|config| config["linux"]["resources"] = resources);
        bundle.assert_refused(&format!("linux.resources.{field}"));
    }
}

#[test]
fn the_group_is_where_the_path_says_and_is_gone_with_the_container() {
    let name = format!("hostd-test-path-{}", std::process::id());
    for (path, place) in [
        (format!("/{name}/a/b"), format!("{name}/a/b")),
        (format!("{name}/c"), format!("{name}/c")),
    ] {
        let bundle = Bundle::new("exec sleep 100").with(|config| {
            config["linux"]["cgroupsPath"] = json!(path);
        });
        bundle.start();
        let (directory, _) = directory("pids", &place).unwrap();
        let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), bundle.state()["pid"].to_string());
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
        assert!(!directory.exists());
    }
    remove_parents(&name);
    if is_own() {
        let bundle = Bundle::new("true").with(|config| {
            config["linux"]["cgroupsPath"] = json!("/a/../../b");
        });
        bundle.assert_refused("linux.cgroupsPath: `/a/../../b`: it must not contain `..`");
    }
}

/// The parents of a container's group stay, as with every runtime: they may be others' too.
fn remove_parents(name: &str) {
    for hierarchy in fs::read_dir(MOUNT).unwrap().flatten() {
        for parent in [format!("{name}/a"), name.to_owned()] {
            let _ = fs::remove_dir(hierarchy.path().join(parent));
        }
    }
    for parent in [format!("{name}/a"), name.to_owned()] {
        let _ = fs::remove_dir(PathBuf::from(MOUNT).join(parent));
    }
}

#[test]
fn too_much_memory_kills_the_program() {
    let bundle =
        Bundle::new("head -c 200000000 /dev/zero | tail -c 200000000 >/dev/null; echo survived")
            .with(|config| {
                config["process"]["args"] = json!([
                    "sh",
                    "-c",
                    "dd if=/dev/zero of=/dev/null bs=200M count=1; echo \"dd: $?\""
                ]);
                config["linux"]["resources"]["memory"] =
                    json!({"limit": 33_554_432, "swap": 33_554_432});
            });
    let ended = bundle.run();
    assert_eq!(ended.stdout, "dd: 137\n", "{ended:?}");
}

#[test]
fn a_limit_of_tasks_that_is_not_given_is_none() {
    let bundle = Bundle::new("true | true; echo forked").with(|config| {
        config["linux"]["resources"]["pids"] = json!({});
    });
    assert_eq!(bundle.output(), "forked\n");
}
