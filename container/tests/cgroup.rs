//! Control groups against the kernel of this host; needs root. What a limit is worth is tested by
//! running into it.
//!
//! UNSAFETY: the hook between fork and exec of a child does nothing but write to open files.

#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![expect(
    unsafe_code,
    reason = "a hook between fork and exec moves the child into its group"
)]

use std::{
    fs,
    io::Read,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use container::cgroup::{Cgroup, CgroupError, Entry};
use nix::{errno::Errno, sys::signal, unistd::Pid};
use oci_spec::runtime::LinuxResources;

/// A group with a name of its own, removed with everything in it at the end, come what may.
struct Group {
    path: String,
    cgroup: Cgroup,
}

impl Group {
    fn new(resources: &str) -> Group {
        Group::try_new(resources).unwrap()
    }

    fn try_new(resources: &str) -> Result<Group, CgroupError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/hostd-test-cgroup-{}-{next}/leaf", process::id());
        let resources: LinuxResources = serde_json::from_str(resources).unwrap();
        let group = Group {
            cgroup: Cgroup::open(&path).unwrap(),
            path,
        };
        Cgroup::create(&group.path, Some(&resources))?;
        Ok(group)
    }

    /// A shell in the group, which it entered before it was executed.
    fn shell(&self, script: &str) -> Child {
        let entry = self.cgroup.entry().unwrap();
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        // What makes a child be born in the v2 group, clone3, is out of reach of the library.
        let unified = self.cgroup.views().into_iter().find_map(|(_, path)| {
            let born_here = path.join("cgroup.events").exists();
            born_here.then(|| {
                fs::OpenOptions::new()
                    .write(true)
                    .open(path.join("cgroup.procs"))
            })
        });
        let unified = unified.transpose().unwrap();
        let join = move || {
            entry.join()?;
            unified
                .as_ref()
                .map_or(Ok(0), |procs| nix::unistd::write(procs, b"0"))?;
            Ok(())
        };
        // SAFETY: `join` only writes to open files.
        unsafe { command.pre_exec(join) };
        command.spawn().unwrap()
    }

    fn output(&self, script: &str) -> (String, process::ExitStatus) {
        let output = self.shell(script).wait_with_output().unwrap();
        (
            String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            output.status,
        )
    }

    fn update(&self, resources: &str) -> Result<(), CgroupError> {
        self.cgroup
            .update(&serde_json::from_str(resources).unwrap())
    }

    /// What is in a file of the group, of whichever version the controller is.
    fn read(&self, controller: &str, v1: &str, v2: &str) -> String {
        let v1 = Path::new("/sys/fs/cgroup")
            .join(controller)
            .join(&self.path[1..])
            .join(v1);
        let v2 = Path::new("/sys/fs/cgroup").join(&self.path[1..]).join(v2);
        fs::read_to_string(v1)
            .or_else(|_| fs::read_to_string(v2))
            .unwrap()
            .trim()
            .to_owned()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.cgroup.kill_all().unwrap();
        let parent = self.path.rsplit_once('/').unwrap().0;
        Cgroup::open(parent).unwrap().remove().unwrap();
    }
}

/// Waits for the first line, which says that the shell is where the test wants it.
fn wait_for_line(child: &mut Child) -> String {
    let mut line = String::new();
    let stdout = child.stdout.as_mut().unwrap();
    let mut byte = [0];
    while stdout.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(char::from(byte[0]));
    }
    line
}

#[test]
fn a_new_process_is_in_the_group_and_the_stats_know_it() {
    let group = Group::new(r#"{"pids":{"limit":20},"memory":{"limit":67108864}}"#);
    let mut child = group.shell("echo ready; read x");
    child.kill().ok();
    child.wait().unwrap();
    let mut child = group.shell("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo; sleep 60");
    wait_for_line(&mut child);
    let pid = i32::try_from(child.id()).unwrap();
    assert!(group.cgroup.pids().unwrap().contains(&Pid::from_raw(pid)));
    let stats = group.cgroup.stats().unwrap();
    assert_eq!(stats.memory.limit, Some(64 << 20));
    assert_eq!(stats.pids.limit, Some(20));
    assert!(stats.pids.current >= 1, "{stats:?}");
    assert!(
        stats.cpu.usage_us > 0 && stats.memory.current > 0,
        "{stats:?}"
    );
    group.cgroup.kill_all().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

#[test]
fn too_much_memory_is_an_oom_kill_and_counted() {
    let group = Group::new(r#"{"memory":{"limit":16777216,"swap":16777216}}"#);
    assert_eq!(group.cgroup.oom_kills().unwrap(), 0);
    let (_, status) = group.output("exec tail /dev/zero");
    assert_eq!(status.signal(), Some(9));
    assert_eq!(group.cgroup.oom_kills().unwrap(), 1);
    assert!(group.cgroup.stats().unwrap().memory.peak.unwrap() > 8 << 20);
}

#[test]
fn the_number_of_processes_is_limited() {
    let group = Group::new(r#"{"pids":{"limit":5}}"#);
    let mut child = group.shell("for i in 1 2 3 4 5 6 7 8 9; do sleep 60 & done; echo; wait");
    let status = child.wait().unwrap();
    assert!(!status.success());
    assert!(group.cgroup.pids().unwrap().len() <= 5);
}

#[test]
fn devices_are_denied_unless_a_rule_allows_them() {
    let open = "for d in /dev/null /dev/zero /dev/kmsg /dev/tty0x; do \
                if (: < $d) 2> /dev/null; then echo -n y; else echo -n n; fi; done";
    let group = Group::new("{}");
    assert_eq!(group.output(open).0, "yynn");
    let kmsg = r#"{"devices":[{"allow":false,"access":"rwm"},
                   {"allow":true,"type":"c","major":1,"minor":11,"access":"r"}]}"#;
    group.update(kmsg).unwrap();
    assert_eq!(group.output(open).0, "yyyn");
    let write = "if (: > /dev/kmsg) 2> /dev/null; then echo y; else echo n; fi";
    assert_eq!(group.output(write).0, "n");
    let no_zero = r#"{"devices":[{"allow":false,"access":"rwm"},
                      {"allow":false,"type":"c","major":1,"minor":5,"access":"rw"}]}"#;
    group.update(no_zero).unwrap();
    assert_eq!(group.output(open).0, "ynnn");
    group
        .update(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#)
        .unwrap();
    assert_eq!(group.output(open).0, "yyyn");
    group
        .update(r#"{"devices":[{"allow":false,"access":"rwm"}]}"#)
        .unwrap();
    assert_eq!(group.output(open).0, "yynn");
}

#[test]
fn limits_go_up_and_down_while_it_runs_and_a_refused_update_changes_nothing() {
    let group = Group::new(r#"{"memory":{"limit":67108864,"swap":67108864},"cpu":{"shares":512}}"#);
    let limit = |group: &Group| group.cgroup.stats().unwrap().memory.limit;
    group
        .update(r#"{"memory":{"limit":134217728,"swap":134217728}}"#)
        .unwrap();
    assert_eq!(limit(&group), Some(128 << 20));
    group
        .update(r#"{"memory":{"limit":33554432,"swap":33554432}}"#)
        .unwrap();
    assert_eq!(limit(&group), Some(32 << 20));
    let shares = |group: &Group| group.read("cpu", "cpu.shares", "cpu.weight");
    let before = shares(&group);
    let bad = r#"{"memory":{"limit":50331648,"swap":50331648},
                  "cpu":{"shares":2048,"cpus":"4000"}}"#;
    let error = group.update(bad).unwrap_err();
    assert!(
        error.to_string().starts_with("linux.resources.cpu.cpus"),
        "{error}"
    );
    assert_eq!(limit(&group), Some(32 << 20));
    assert_eq!(shares(&group), before);
    group.update(r#"{"memory":{"limit":-1}}"#).unwrap();
    assert_eq!(limit(&group), None);
}

#[test]
fn a_quota_throttles() {
    let group = Group::new(r#"{"cpu":{"quota":5000,"period":50000}}"#);
    let (_, status) = group.output("i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done");
    assert!(status.success());
    let cpu = group.cgroup.stats().unwrap().cpu;
    assert!(cpu.throttled_periods > 0 && cpu.throttled_us > 0, "{cpu:?}");
}

#[test]
fn a_frozen_group_stands_still_and_dies_nevertheless() {
    let group = Group::new("{}");
    let mut child = group.shell("echo ready; while :; do :; done");
    wait_for_line(&mut child);
    assert!(!group.cgroup.is_frozen().unwrap());
    group.cgroup.freeze().unwrap();
    assert!(group.cgroup.is_frozen().unwrap());
    let usage = || group.cgroup.stats().unwrap().cpu.usage_us;
    let before = usage();
    assert!(usage() - before < 1000);
    group.cgroup.thaw().unwrap();
    assert!(!group.cgroup.is_frozen().unwrap());
    group.cgroup.freeze().unwrap();
    group.cgroup.kill_all().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

#[test]
fn a_group_that_forks_all_the_time_is_killed_and_removed_with_the_groups_below() {
    let group = Group::new(r#"{"pids":{"limit":100}}"#);
    let script = "echo ready; while :; do (sleep 0.01 & sleep 0.01) & sleep 0.001; done";
    let mut child = group.shell(script);
    wait_for_line(&mut child);
    let below = Cgroup::create(&format!("{}/below", group.path), None).unwrap();
    let mut nested = Command::new("sleep").arg("60").spawn().unwrap();
    below
        .add(Pid::from_raw(i32::try_from(nested.id()).unwrap()))
        .unwrap();
    assert!(group.cgroup.pids().unwrap().len() >= 2);
    group.cgroup.kill_all().unwrap();
    assert_eq!(nested.wait().unwrap().signal(), Some(9));
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    group.cgroup.remove().unwrap();
    assert!(!group.cgroup.exists());
    assert_eq!(group.cgroup.pids().unwrap(), []);
    group.cgroup.remove().unwrap();
    group.cgroup.kill_all().unwrap();
}

#[test]
fn a_group_in_which_somebody_lives_is_not_taken_over() {
    let group = Group::new("{}");
    let mut child = group.shell("echo ready; exec sleep 60");
    wait_for_line(&mut child);
    let error = Cgroup::create(&group.path, None).unwrap_err();
    assert!(matches!(error, CgroupError::Occupied { .. }), "{error}");
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    assert_eq!(
        signal::kill(pid, None),
        Ok(()),
        "the process was left alone"
    );
    group.cgroup.kill_all().unwrap();
    child.wait().unwrap();
    // The shell's own child may take a moment longer.
    while !group.cgroup.pids().unwrap().is_empty() {
        std::thread::yield_now();
    }
    Cgroup::create(&group.path, None).unwrap();
}

#[test]
fn what_cannot_be_honoured_is_named_and_nothing_is_left() {
    for (resources, field) in [
        (
            r#"{"hugepageLimits":[{"pageSize":"3MB","limit":1}]}"#,
            "hugepageLimits.pageSize",
        ),
        (r#"{"unified":{"nosuch.file":"1"}}"#, "unified.nosuch.file"),
        (r#"{"cpu":{"cpus":"banana"}}"#, "cpu.cpus"),
        (r#"{"rdma":{"nosuch0":{"hcaHandles":1}}}"#, "rdma"),
        (
            r#"{"devices":[{"allow":true,"type":"c","access":"x"}]}"#,
            "devices[0].access",
        ),
    ] {
        let path = format!("/hostd-test-cgroup-bad-{}", process::id());
        let resources: LinuxResources = serde_json::from_str(resources).unwrap();
        let error = Cgroup::create(&path, Some(&resources))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("linux.resources.{field}")),
            "{error}"
        );
        assert!(!Cgroup::open(&path).unwrap().exists(), "{field}");
    }
}

#[test]
fn every_hierarchy_has_a_view_by_its_own_name() {
    let group = Group::new("{}");
    let views = group.cgroup.views();
    assert!(views.iter().all(|(_, path)| path.is_dir()));
    let names: std::collections::BTreeSet<_> = views.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), views.len());
    assert!(views.len() > 1 || views[0].0.is_empty());
}

#[test]
fn the_way_in_leads_next_to_a_process_in_a_group_below() {
    let group = Group::new("{}");
    let unified = group.cgroup.views().into_iter().map(|(_, path)| path);
    let unified = unified
        .filter(|path| path.join("cgroup.events").exists())
        .collect::<Vec<_>>();
    let [unified] = unified.as_slice() else {
        panic!("this host has cgroup v2");
    };
    let mut child = group.shell("echo ready; exec sleep 60");
    wait_for_line(&mut child);
    fs::create_dir(unified.join("below")).unwrap();
    fs::write(unified.join("below/cgroup.procs"), child.id().to_string()).unwrap();
    let target = |directory: Option<BorrowedFd<'_>>| {
        let fd = directory?.as_raw_fd();
        Some(fs::read_link(format!("/proc/self/fd/{fd}")).unwrap())
    };
    let ways = |entry: &Entry| (target(entry.clone_into()), target(entry.otherwise()));
    let own = Some(unified.clone());
    let pid = i32::try_from(child.id()).unwrap();
    let entry = group.cgroup.entry().unwrap();
    assert_eq!(ways(&entry), (own.clone(), None));
    let entry = group.cgroup.entry_beside(pid).unwrap();
    assert_eq!(ways(&entry), (own.clone(), Some(unified.join("below"))));
    // A process elsewhere does not lead out of the group.
    let elsewhere = group.cgroup.entry_beside(Pid::this().as_raw()).unwrap();
    assert_eq!(ways(&elsewhere), (own, None));
    group.cgroup.kill_all().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_process_that_is_gone_cannot_be_added() {
    let group = Group::new("{}");
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let error = group
        .cgroup
        .add(Pid::from_raw(i32::try_from(child.id()).unwrap()))
        .unwrap_err();
    let CgroupError::Io { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.raw_os_error(), Some(Errno::ESRCH as i32));
}
