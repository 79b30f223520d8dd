//! What the program is given: arguments, limits, scheduling, rights (config.md, "Process").

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use rustix::thread::{Gid, set_thread_groups};
use serde_json::{Value, json};

use crate::bundle::{Bundle, finish, finish_child, share_namespace};

#[test]
fn arguments_and_environment_arrive_as_they_are() {
    let script = "for a; do echo \"<$a>\"; done; env | grep ^X";
    let bundle = Bundle::new("").with(|config| {
        config["process"]["args"] = json!([
            "/bin/sh",
            "-c",
            script,
            "sh",
            "a b",
            "",
            "$HOME",
            "ä\n\t\"'\\"
        ]);
        config["process"]["env"] = json!(["PATH=/bin", "X=1", "X2=a=b $Y", "X3="]);
    });
    let expected = "<a b>\n<>\n<$HOME>\n<ä\n\t\"'\\>\nX=1\nX2=a=b $Y\nX3=\n";
    assert_eq!(bundle.output(), expected);
}

#[test]
fn a_program_is_looked_for_in_the_path_of_its_own_environment() {
    let bundle = Bundle::new("").with(|config| {
        config["process"]["args"] = json!(["tool"]);
        config["process"]["env"] = json!(["PATH=/nowhere:/opt"]);
    });
    fs::create_dir(bundle.rootfs().join("opt")).unwrap();
    let tool = bundle.rootfs().join("opt/tool");
    fs::write(&tool, "#!/bin/sh\necho found\n").unwrap();
    fs::set_permissions(&tool, PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(bundle.output(), "found\n");
}

/// Every limit at once. The values are below what any host sets, since raising takes a right.
#[test]
fn every_limit_is_set() {
    let limits = [
        ("RLIMIT_AS", "Max address space", 1 << 30),
        ("RLIMIT_CORE", "Max core file size", 0),
        ("RLIMIT_CPU", "Max cpu time", 1000),
        ("RLIMIT_DATA", "Max data size", 1 << 29),
        ("RLIMIT_FSIZE", "Max file size", 1 << 28),
        ("RLIMIT_LOCKS", "Max file locks", 100),
        ("RLIMIT_MEMLOCK", "Max locked memory", 4096),
        ("RLIMIT_MSGQUEUE", "Max msgqueue size", 8192),
        ("RLIMIT_NICE", "Max nice priority", 0),
        ("RLIMIT_NOFILE", "Max open files", 64),
        ("RLIMIT_NPROC", "Max processes", 200),
        ("RLIMIT_RSS", "Max resident set", 1 << 27),
        ("RLIMIT_RTPRIO", "Max realtime priority", 0),
        ("RLIMIT_RTTIME", "Max realtime timeout", 1_000_000),
        ("RLIMIT_SIGPENDING", "Max pending signals", 100),
        ("RLIMIT_STACK", "Max stack size", 1 << 22),
    ];
    let bundle = Bundle::new("cat /proc/self/limits").with(|config| {
        let limit = |(name, _, value): &(&str, &str, u64)| {
            json!({"type": name, "soft": value, "hard": value})
        };
        config["process"]["rlimits"] = limits.iter().map(limit).collect();
    });
    let output = bundle.output();
    for (name, title, value) in limits {
        let line = output
            .lines()
            .find_map(|line| line.strip_prefix(title))
            .unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let value = value.to_string();
        assert_eq!(words[..2], [&value, &value], "{name}: {line}");
    }
}

#[test]
fn a_limit_that_is_given_twice_or_that_nobody_knows_is_refused() {
    let limits =
        |limits: Value| Bundle::new("true").with(|config| config["process"]["rlimits"] = limits);
    let one = json!({"type": "RLIMIT_CORE", "soft": 0, "hard": 0});
    limits(json!([one, one]))
        .assert_refused("process.rlimits[1].type: `RLIMIT_CORE`: it is given twice");
    let unknown = json!([{"type": "RLIMIT_MOON", "soft": 0, "hard": 0}]);
    limits(unknown).assert_refused("process.rlimits[0].type");
}

/// Nice value (field 19) and policy (field 41) of /proc/self/stat.
#[test]
fn the_scheduling_policy_and_niceness_are_set() {
    for (scheduler, nice, policy) in [
        (json!({"policy": "SCHED_OTHER", "nice": 7}), "7", "0"),
        (json!({"policy": "SCHED_BATCH", "nice": 3}), "3", "3"),
        (json!({"policy": "SCHED_IDLE"}), "0", "5"),
        (
            json!({"policy": "SCHED_OTHER", "nice": 1, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
            "1",
            "0",
        ),
    ] {
        let bundle = Bundle::new("").with(|config| {
            config["process"]["args"] = json!(["cut", "-d ", "-f19,41", "/proc/self/stat"]);
            config["process"]["scheduler"] = scheduler.clone();
        });
        assert_eq!(bundle.output(), format!("{nice} {policy}\n"), "{scheduler}");
    }
    for (scheduler, words) in [
        (json!({"policy": "SCHED_MOON"}), "process.scheduler.policy"),
        (
            json!({"policy": "SCHED_OTHER", "nice": 20}),
            "process.scheduler.nice: 20 is not",
        ),
    ] {
        let bundle = Bundle::new("true").with(|config| config["process"]["scheduler"] = scheduler);
        bundle.assert_refused(words);
    }
}

#[test]
fn the_priority_of_input_and_output_is_set() {
    for (class, priority, expected) in [
        ("IOPRIO_CLASS_BE", 6, "best-effort: prio 6\n"),
        ("IOPRIO_CLASS_IDLE", 0, "idle\n"),
    ] {
        let bundle = Bundle::new("ionice -p $$").with(|config| {
            config["process"]["ioPriority"] = json!({"class": class, "priority": priority});
        });
        assert!(bundle.output().ends_with(expected), "{class}");
    }
    let bundle = Bundle::new("true").with(|config| {
        config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 8});
    });
    bundle.assert_refused("process.ioPriority.priority: 8 is not between 0 and 7");
}

#[test]
fn a_process_of_exec_gets_its_processors() {
    let bundle = Bundle::new("exec sleep 100");
    bundle.start();
    let process = |affinity: Value| {
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
            "args": ["sh", "-c", "taskset -p $$"], "execCPUAffinity": affinity
        });
        let path = bundle.path().join("process.json");
        fs::write(&path, process.to_string()).unwrap();
        bundle.verb(&["exec", "--process", path.to_str().unwrap()], &[])
    };
    let ended = process(json!({"initial": "0", "final": "0"}));
    assert!(ended.stdout.ends_with("mask: 1\n"), "{ended:?}");
    let ended = process(json!({"final": "a-b"}));
    assert!(
        ended.stderr.contains("process.execCPUAffinity.final: "),
        "{ended:?}"
    );
}

#[test]
fn the_personality_is_set() {
    let run = |personality: Value| {
        Bundle::new("uname -m").with(|config| config["linux"]["personality"] = personality)
    };
    assert_eq!(run(json!({"domain": "LINUX"})).output(), "x86_64\n");
    assert_eq!(run(json!({"domain": "LINUX32"})).output(), "i686\n");
    run(json!({"domain": "LINUX", "flags": ["MOON"]})).assert_refused("linux.personality.flags");
}

#[test]
fn memory_comes_from_the_nodes_that_the_policy_names() {
    let run = |policy: Value| {
        Bundle::new("head -n 1 /proc/self/numa_maps | cut -d' ' -f2")
            .with(|config| config["linux"]["memoryPolicy"] = policy)
    };
    for (policy, shown) in [
        (
            json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}),
            "bind=static:0",
        ),
        (
            json!({"mode": "MPOL_INTERLEAVE", "nodes": "0"}),
            "interleave:0",
        ),
        (
            json!({"mode": "MPOL_PREFERRED_MANY", "nodes": "0"}),
            "prefer (many):0",
        ),
        (json!({"mode": "MPOL_LOCAL"}), "local"),
        (json!({"mode": "MPOL_DEFAULT"}), "default"),
    ] {
        let output = run(policy.clone()).output();
        assert!(shown.starts_with(output.trim()), "{policy}: {output}");
    }
    run(json!({"mode": "MPOL_MOON"})).assert_refused("linux.memoryPolicy.mode");
    run(json!({"mode": "MPOL_BIND"}))
        .assert_refused("linux.memoryPolicy.nodes: MPOL_BIND needs nodes");
}

#[test]
fn rights_can_be_gained_unless_that_is_forbidden() {
    for (forbidden, shown) in [(json!(true), "1"), (json!(false), "0"), (Value::Null, "0")] {
        let bundle = Bundle::new("grep NoNewPrivs /proc/self/status | cut -f2").with(|config| {
            config["process"]["noNewPrivileges"] = forbidden;
        });
        assert_eq!(bundle.output(), format!("{shown}\n"));
    }
}

#[test]
fn the_score_for_the_shortage_of_memory_stays_unless_it_is_given() {
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(Bundle::new("cat /proc/self/oom_score_adj").output(), own);
    let bundle = Bundle::new("true").with(|config| config["process"]["oomScoreAdj"] = json!(1001));
    bundle.assert_refused("process.oomScoreAdj: 1001 is not between -1000 and 1000");
}

/// Labels of systems that this host may lack: then they must not be ignored.
#[test]
fn a_label_that_nobody_would_enforce_is_refused() {
    let selinux = Path::new("/sys/fs/selinux/enforce").exists();
    let apparmor = Path::new("/sys/kernel/security/apparmor/profiles").exists();
    for (pointer, field, enforced) in [
        ("process", "selinuxLabel", selinux),
        ("linux", "mountLabel", selinux),
        ("process", "apparmorProfile", apparmor),
    ] {
        if !enforced {
            let bundle = Bundle::new("true").with(|config| config[pointer][field] = json!("a"));
            bundle.assert_refused(&format!("{pointer}.{field}: "));
        }
        // An empty one is none.
        let bundle = Bundle::new("true").with(|config| config[pointer][field] = json!(""));
        assert_eq!(bundle.run().status, 0);
    }
}

/// Where the host enforces AppArmor, and has its parser.
#[test]
fn a_profile_of_apparmor_holds_for_the_program_and_for_exec() {
    let enforced = Path::new("/sys/kernel/security/apparmor/profiles").exists();
    let has_parser = Command::new("apparmor_parser").arg("-V").output().is_ok();
    if !(enforced && has_parser) {
        return;
    }
    let bundle = Bundle::new("cat /proc/self/attr/current /hidden; exec sleep 1000");
    let profile = bundle.path().join("profile");
    let rules = "file, capability, network, mount, umount, signal, ptrace, deny /hidden rw,";
    let names = ["program", "exec"].map(|name| format!("{}-{name}", bundle.id));
    let text = names
        .iter()
        .map(|name| format!("profile {name} flags=(attach_disconnected) {{ {rules} }}\n"));
    fs::write(&profile, text.collect::<String>()).unwrap();
    let parse = |action: &str| {
        let mut parser = Command::new("apparmor_parser");
        finish({
            parser
                .args([action, "--skip-cache", "--quiet"])
                .arg(&profile);
            parser
        })
    };
    let loaded = parse("--replace");
    assert_eq!(loaded.status, 0, "{loaded:?}");
    let bundle = bundle.with(|config| config["process"]["apparmorProfile"] = json!(names[0]));
    fs::write(bundle.rootfs().join("hidden"), "seen\n").unwrap();
    bundle.start();
    let script = "cat /proc/self/attr/current /hidden";
    let run = |options: &[&str]| bundle.verb(&[&["exec"], options].concat(), &["sh", "-c", script]);
    let (plain, other) = (run(&[]), run(&["--apparmor", &names[1]]));
    let unknown = run(&["--apparmor", "no-such-profile"]);
    assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
    let bundle = bundle.with(|config| config["process"]["args"] = json!(["sh", "-c", script]));
    let in_the_foreground = bundle.run();
    let unloaded = parse("--remove");
    assert_eq!(unloaded.status, 0, "{unloaded:?}");
    for (ended, name) in [
        (in_the_foreground, &names[0]),
        (plain, &names[0]),
        (other, &names[1]),
    ] {
        assert_eq!(ended.stdout, format!("{name} (enforce)\n"), "{ended:?}");
        let refused = "can't open '/hidden': Permission denied";
        assert!(ended.stderr.contains(refused), "{ended:?}");
    }
    assert_ne!(unknown.status, 0, "{unknown:?}");
    assert!(unknown.stderr.contains("security label"), "{unknown:?}");
}

#[test]
fn sections_for_other_systems_are_refused() {
    for (section, content) in [
        (
            "vm",
            json!({"hypervisor": {"path": "/a"}, "kernel": {"path": "/b"}}),
        ),
        ("windows", json!({"layerFolders": []})),
        ("solaris", json!({})),
    ] {
        let bundle = Bundle::new("true").with(|config| config[section] = content);
        bundle.assert_refused(&format!("{section}: "));
    }
}

#[test]
fn what_the_user_may_not_execute_does_not_hide_what_comes_later_in_the_path() {
    let bundle = Bundle::new("").with(|config| {
        config["process"]["args"] = json!(["id", "-u"]);
        config["process"]["env"] = json!(["PATH=/closed:/rootly:/bin"]);
        config["process"]["user"] = json!({"uid": 7, "gid": 7});
    });
    for (directory, mode, program_mode) in [("closed", 0o700, 0o755), ("rootly", 0o755, 0o700)] {
        let directory = bundle.rootfs().join(directory);
        fs::create_dir(&directory).unwrap();
        let program = directory.join("id");
        crate::bundle::copy_program(Path::new("/bin/busybox"), &program);
        fs::set_permissions(&program, Permissions::from_mode(program_mode)).unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(mode)).unwrap();
    }
    assert_eq!(bundle.output(), "7\n");
    // Without another one the refusal is that of the last.
    let message = bundle
        .with(|config| config["process"]["env"] = json!(["PATH=/closed:/rootly"]))
        .refusal();
    assert!(message.contains("permission denied"), "{message}");
}

/// Root in a user namespace has no rights over what is nobody's there.
#[test]
fn a_working_directory_may_be_one_that_only_the_user_may_enter() {
    for no_new_privileges in [true, false] {
        let bundle = Bundle::new("pwd").with(|config| {
            let linux = &mut config["linux"];
            let namespaces = linux["namespaces"].as_array_mut().unwrap();
            namespaces.push(json!({"type": "user"}));
            linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
            linux["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
            linux["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
            let process = &mut config["process"];
            process["user"] = json!({"uid": 7, "gid": 7});
            process["cwd"] = json!("/work");
            process["noNewPrivileges"] = json!(no_new_privileges);
        });
        let work = bundle.rootfs().join("work");
        fs::create_dir(&work).unwrap();
        std::os::unix::fs::chown(bundle.rootfs(), Some(100_000), Some(100_000)).unwrap();
        std::os::unix::fs::chown(&work, Some(5), Some(100_007)).unwrap();
        fs::set_permissions(&work, Permissions::from_mode(0o750)).unwrap();
        assert_eq!(bundle.output(), "/work\n");
        bundle
            .with(|config| config["process"]["user"] = json!({"uid": 8, "gid": 8}))
            .assert_refused("cannot change to the working directory `/work`");
    }
}

#[test]
fn run_is_the_parent_of_orphans_of_its_own_pid_namespace_and_reaps_them() {
    // It says who its parent is once the one that made it, whose pid it is given, has ended.
    let orphan = "while kill -0 $0 2>/dev/null; do sleep 0.01; done; \
                  cut -d\" \" -f4 /proc/$$/stat; echo $$ >/pid.new; exec mv /pid.new /pid";
    let script = format!(
        "sh -c 'sh -c \"$0\" $$ &' '{orphan}'; until test -e /pid; do sleep 0.01; done; \
         $WAIT"
    );
    for (options, adopts) in [(&["run"][..], true), (&["run", "--no-subreaper"], false)] {
        // Whoever else the parent is may leave it a zombie.
        let end = if adopts {
            "while test -d /proc/$(cat /pid); do sleep 0.01; done"
        } else {
            "true"
        };
        let bundle = Bundle::new(&script.replace("$WAIT", end)).with(|config| {
            config["root"]["readonly"] = json!(false);
            share_namespace(config, "pid");
        });
        std::os::unix::fs::symlink("busybox", bundle.rootfs().join("bin/mv")).unwrap();
        let mut command = bundle.command(options);
        command.arg(&bundle.id).stdout(Stdio::piped());
        let child = command.spawn().unwrap();
        let run = format!("{}\n", child.id());
        let ended = finish_child(child);
        assert_eq!(ended.status, 0, "{ended:?}");
        assert_eq!(ended.stdout == run, adopts, "{run}: {ended:?}");
    }
}

#[test]
fn a_container_whose_processes_outlive_its_first_one_is_stopped_and_can_be_deleted() {
    // With the session that they are in, the first one's pid stays in use, though by no process: `run`
    // has reaped it.
    let bundle = Bundle::new("sleep 1000 >/dev/null 2>&1 & echo $! >/pid").with(|config| {
        config["root"]["readonly"] = json!(false);
        share_namespace(config, "pid");
    });
    let ended = bundle.verb(&["run", "--keep"], &[]);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(bundle.state()["status"], "stopped");
    let survivor = fs::read_to_string(bundle.rootfs().join("pid")).unwrap();
    let survivor = Path::new("/proc").join(survivor.trim());
    assert!(survivor.exists());
    let ended = bundle.verb(&["delete"], &[]);
    assert_eq!(ended.status, 0, "{ended:?}");
    bundle.assert_nothing_is_left();
    let end = fs::read_to_string(survivor.join("stat")).unwrap_or_default();
    assert!(end.is_empty() || end.contains(") Z "), "{end}");
}

#[test]
fn the_callers_groups_can_be_kept() {
    let groups = |status: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
        line.unwrap().trim().to_owned()
    };
    for (value, expected) in [("1", "5 6"), ("0", "7")] {
        let bundle = Bundle::new("exec sleep 100").with(|config| {
            config["annotations"] = json!({"run.oci.keep_original_groups": value});
            config["process"]["user"]["additionalGids"] = json!([7]);
        });
        let call = || {
            // Of this thread alone, and of what it makes.
            set_thread_groups(&[5, 6].map(Gid::from_raw)).unwrap();
            assert_eq!(bundle.quiet(&["run", "--detach"]).status, 0);
            bundle.verb(&["exec"], &["cat", "/proc/self/status"]).stdout
        };
        let one_more = thread::scope(|scope| scope.spawn(call).join().unwrap());
        let pid = bundle.state()["pid"].clone();
        let first = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for status in [first, one_more] {
            assert_eq!(groups(&status), expected, "{value}: {status}");
        }
    }
}
