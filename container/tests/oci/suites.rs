//! What the public suites of other runtimes look for where the specification is silent, or leaves it to
//! words: behaviour that users of runc and crun rely on.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;

use container::cgroup::Cgroup;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use crate::bundle::{Bundle, PATIENCE, finish, finish_child, share_namespace};
use crate::terminal::receive_descriptor;

fn sleeping() -> Bundle {
    Bundle::new("exec sleep 100")
}

/// The line of /proc/PID/status that starts with `name`.
fn status_line<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name));
    line.map_or("", |line| line.rsplit('\t').next().unwrap())
}

/// Lets the user 100000 of the host, whom user namespaces map, have the root file system.
fn give_away(bundle: &Bundle) {
    fs::set_permissions(bundle.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for path in [bundle.rootfs(), bundle.rootfs().join("bin")] {
        let owner = Some(100_000);
        std::os::unix::fs::chown(path, owner, owner).unwrap();
    }
}

#[test]
fn a_variable_is_there_once_and_home_is_never_empty() {
    let with = |env: Value| {
        let bundle = Bundle::new("env").with(|config| config["process"]["env"] = env);
        fs::create_dir_all(bundle.rootfs().join("etc")).unwrap();
        let users = "root:x:0:0:root:/root:/bin/sh\n";
        fs::write(bundle.rootfs().join("etc/passwd"), users).unwrap();
        let text = bundle.output();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        // What the shell adds.
        lines.retain(|line| {
            !["PWD=", "SHLVL=", "OLDPWD="]
                .iter()
                .any(|it| line.starts_with(it))
        });
        lines.sort_unstable();
        lines
    };
    assert_eq!(
        with(json!(["A=1", "A=2", "HOME=/there", "PATH=/bin"])),
        ["A=2", "HOME=/there", "PATH=/bin"]
    );
    assert_eq!(
        with(json!(["HOME=/there", "HOME=", "PATH=/bin"])),
        ["HOME=/root", "PATH=/bin"]
    );
}

#[test]
fn the_callers_own_processors_are_not_the_containers() {
    let bundle = sleeping();
    bundle.start();
    let allowed = |command: Command| {
        let mut narrow = Command::new("taskset");
        narrow.args(["-c", "0"]).arg(command.get_program());
        narrow.args(command.get_args()).current_dir(bundle.path());
        let text = finish(narrow).stdout;
        status_line(&text, "Cpus_allowed_list:").to_owned()
    };
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = status_line(&own, "Cpus_allowed_list:");
    let mut exec = bundle.command(&["exec"]);
    exec.args([&bundle.id, "cat", "/proc/self/status"]);
    assert_eq!(allowed(exec), own);
    let other = Bundle::new("cat /proc/self/status");
    let mut run = other.command(&["run"]);
    run.arg("--bundle").arg(other.path()).arg(&other.id);
    assert_eq!(allowed(run), own);
}

#[test]
fn exec_gives_ambient_capabilities_if_the_container_has_inheritable_ones() {
    for (inheritable, ambient) in [(json!([]), 0), (json!(["CAP_KILL"]), 1_u64 << 5)] {
        let bundle = sleeping().with(|config| {
            let sets = &mut config["process"]["capabilities"];
            sets["inheritable"] = inheritable;
        });
        bundle.start();
        let ended = bundle.verb(
            &["exec", "--cap", "CAP_KILL"],
            &["cat", "/proc/self/status"],
        );
        let set = u64::from_str_radix(status_line(&ended.stdout, "CapAmb:"), 16).unwrap();
        assert_eq!(set, ambient, "{ended:?}");
    }
    let bundle = Bundle::new("grep CapAmb /proc/self/status").with(|config| {
        let sets = &mut config["process"]["capabilities"];
        sets["inheritable"] = json!(["CAP_KILL"]);
        sets["ambient"] = json!(["CAP_KILL", "CAP_CHOWN"]);
    });
    let ended = bundle.run();
    assert_eq!(ended.stdout, "CapAmb:\t0000000000000020\n");
    assert!(
        ended
            .stderr
            .contains("can't raise ambient capability CAP_CHOWN: "),
        "{ended:?}"
    );
}

#[test]
fn hooks_have_the_surroundings_that_other_runtimes_give_them() {
    for (kind, script) in [
        ("prestart", "test -e config.json && test \"$GIVEN\" = yes"),
        ("createRuntime", "test -e config.json"),
        (
            "createContainer",
            "test -e ./bin/busybox && test -e ./proc/self",
        ),
        ("startContainer", "test \"$ONE\" = two && test -n \"$HOME\""),
    ] {
        let bundle = Bundle::new("true").with(|config| {
            config["process"]["env"] = json!(["ONE=two", "PATH=/bin"]);
            config["hooks"] = json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
        });
        let mut command = bundle.command(&["run"]);
        command.arg("--bundle").arg(bundle.path()).arg(&bundle.id);
        command.current_dir("/").env("GIVEN", "yes");
        let ended = finish(command);
        assert_eq!(ended.status, 0, "{kind}: {ended:?}");
    }
}

#[test]
fn a_start_container_hook_is_confined_as_the_program_is() {
    let bundle = Bundle::new("echo ran").with(|config| {
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL"}]
        });
        let mkdir = json!({"path": "/bin/mkdir", "args": ["mkdir", "/dev/shm/new"]});
        config["hooks"] = json!({"startContainer": [mkdir]});
    });
    let message = bundle.refusal();
    assert!(
        message.contains("error running startContainer hook #0: `/bin/mkdir`")
            && message.contains("bad system call"),
        "{message}"
    );
}

#[test]
fn what_suites_look_for_in_a_refusal_is_there() {
    let policy =
        |policy: Value| move |config: &mut Value| config["linux"]["memoryPolicy"] = policy.clone();
    type Change = Box<dyn Fn(&mut Value)>;
    let cases: [(&str, Change); 8] = [
        ("invalid memory policy mode", Box::new(policy(json!({})))),
        (
            "invalid memory policy mode",
            Box::new(policy(json!({"nodes": "0"}))),
        ),
        (
            "linux.sysctl.kernel.domainname: `there`: it conflicts with domainname",
            Box::new(|config| {
                config["domainname"] = json!("here");
                config["linux"]["sysctl"] = json!({"kernel.domainname": "there"});
            }),
        ),
        (
            "invalid memory policy mode",
            Box::new(policy(json!({"mode": "INTERLEAVE", "nodes": "0"}))),
        ),
        (
            "invalid memory policy flag",
            Box::new(policy(json!({"mode": "MPOL_DEFAULT", "flags": ["no"]}))),
        ),
        (
            "invalid memory policy node",
            Box::new(policy(
                json!({"mode": "MPOL_BIND", "nodes": "0-9876543210"}),
            )),
        ),
        (
            "failed to connect with seccomp agent",
            Box::new(|config| {
                config["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "listenerPath": "/nowhere.sock",
                    "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
                });
            }),
        ),
        (
            "cannot be used for the write syscall",
            Box::new(|config| {
                config["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "listenerPath": "/nowhere.sock",
                    "syscalls": [{"names": ["write"], "action": "SCMP_ACT_NOTIFY"}]
                });
            }),
        ),
    ];
    for (words, change) in cases {
        Bundle::new("echo ran").with(change).assert_refused(words);
    }
}

#[test]
fn proc_and_sys_are_not_mounted_over_a_link() {
    for (name, target) in [("proc", "/tmp"), ("proc", "/nowhere"), ("sys", "/tmp")] {
        let bundle = Bundle::new("echo ran");
        fs::create_dir(bundle.rootfs().join("tmp")).unwrap();
        symlink(target, bundle.rootfs().join(name)).unwrap();
        bundle.assert_refused("must be mounted on ordinary directory");
    }
}

#[test]
fn a_read_only_dev_has_all_that_belongs_in_it() {
    let script = "grep ' /dev tmpfs ro' /proc/mounts >/dev/null && test -c /dev/null \
        && test -d /dev/shm && ! touch /dev/new 2>/dev/null && echo fine";
    let bundle = Bundle::new(script).with(|config| {
        let dev = &mut config["mounts"][1];
        assert_eq!(dev["destination"], "/dev");
        dev["options"].as_array_mut().unwrap().push(json!("ro"));
    });
    assert_eq!(bundle.output(), "fine\n");
}

#[test]
fn the_host_name_is_no_setting_of_the_kernel() {
    let bundle = Bundle::new("echo ran").with(|config| {
        config["linux"]["sysctl"] = json!({"kernel.hostname": "name"});
    });
    bundle.assert_refused("kernel.hostname is hostname's");
}

#[test]
fn a_cgroup_that_is_in_use_or_frozen_is_refused() {
    let first = sleeping();
    first.start();
    let second = Bundle::new("echo ran").with(|config| {
        config["linux"]["cgroupsPath"] = json!(format!("/{}", first.id));
    });
    let ended = second.run();
    assert!(
        ended.status == 1 && ended.stderr.contains("container's cgroup is not empty"),
        "{ended:?}"
    );
    assert_eq!(first.state()["status"], "running");

    let bundle = Bundle::new("echo ran");
    let cgroup = Cgroup::create(&format!("/{}", bundle.id), None).unwrap();
    cgroup.freeze().unwrap();
    let ended = bundle.run();
    cgroup.remove().unwrap();
    assert!(
        ended.status == 1
            && ended
                .stderr
                .contains("container's cgroup unexpectedly frozen"),
        "{ended:?}"
    );
}

#[test]
fn sigkill_ends_all_processes_if_the_pid_namespace_is_not_the_containers_own() {
    let open = |pid: &Value| {
        let pid = i32::try_from(pid.as_i64().unwrap()).unwrap();
        pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
    };
    let ends = |process: &OwnedFd| {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let mut process = [PollFd::new(process, PollFlags::IN)];
        poll(&mut process, Some(&patience)).unwrap() == 1
    };
    for init_is_gone in [false, true] {
        let bundle = sleeping().with(|config| {
            share_namespace(config, "pid");
        });
        bundle.start();
        let ended = bundle.quiet_with(&["exec", "--detach"], &["sleep", "100"]);
        assert_eq!(ended.status, 0, "{ended:?}");
        let pids = bundle.verb(&["ps", "--format", "json"], &[]).stdout;
        let pids: Vec<Value> = serde_json::from_str(&pids).unwrap();
        assert_eq!(pids.len(), 2);
        let processes: Vec<OwnedFd> = pids.iter().map(open).collect();
        if init_is_gone {
            let init = bundle.state()["pid"].to_string();
            assert!(
                Command::new("kill")
                    .args(["-9", &init])
                    .status()
                    .unwrap()
                    .success()
            );
            bundle.wait_for_status("stopped");
        }
        assert_eq!(bundle.verb(&["kill"], &["KILL"]).status, 0);
        bundle.wait_for_status("stopped");
        assert!(processes.iter().all(ends));
        let message = bundle.verb(&["kill"], &["KILL"]).stderr;
        assert!(message.contains("container not running"), "{message}");
    }
}

#[test]
fn a_container_can_be_deleted_at_once_when_it_was_killed_or_has_ended() {
    let bundle = sleeping();
    for _ in 0..5 {
        bundle.start();
        assert_eq!(bundle.verb(&["kill"], &["KILL"]).status, 0);
        assert_eq!(bundle.verb(&["delete"], &[]).status, 0);
    }
    let bundle = Bundle::new("true");
    for _ in 0..5 {
        bundle.start();
        let ended = bundle.verb(&["delete"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
    }
}

#[test]
fn a_pidfd_of_the_process_is_sent_to_whoever_wants_it() {
    let bundle = sleeping();
    let socket = bundle.path().join("pidfd.sock");
    let path = socket.to_str().unwrap().to_owned();
    let listener = UnixListener::bind(&socket).unwrap();
    let pid_of = |descriptor: fs::File| {
        use std::os::fd::AsRawFd;
        let info = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
        let info = fs::read_to_string(info).unwrap();
        status_line(&info, "Pid:").to_owned()
    };
    assert_eq!(bundle.quiet(&["create", "--pidfd-socket", &path]).status, 0);
    let (connection, _) = listener.accept().unwrap();
    let pid = pid_of(receive_descriptor(&connection));
    assert_eq!(pid, bundle.state()["pid"].to_string());

    assert_eq!(bundle.verb(&["start"], &[]).status, 0);
    let pid_file = bundle.path().join("pid");
    let options = ["exec", "--detach", "--pidfd-socket", &path, "--pid-file"];
    let options: Vec<&str> = options.into_iter().chain(pid_file.to_str()).collect();
    let ended = bundle.quiet_with(&options, &["sleep", "100"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let (connection, _) = listener.accept().unwrap();
    let pid = pid_of(receive_descriptor(&connection));
    assert_eq!(pid, fs::read_to_string(pid_file).unwrap());
}

#[test]
fn descriptors_of_socket_activation_are_announced_and_a_missing_one_is_named() {
    let bundle = Bundle::new("echo $LISTEN_FDS $LISTEN_PID");
    // They are for whom the process is that they name, which a shell's command becomes.
    let run = |listen_pid: &str, redirection: &str| {
        let command = bundle.command(&["run"]);
        let mut shell = Command::new("sh");
        let script = format!("export LISTEN_PID={listen_pid}; exec \"$@\" {redirection}");
        shell.args(["-c", &script, "sh"]).arg(command.get_program());
        shell.args(command.get_args()).arg(&bundle.id);
        shell.current_dir(bundle.path()).env("LISTEN_FDS", "1");
        finish(shell)
    };
    assert_eq!(run("$$", "3</dev/null").stdout, "1 1\n");
    let ended = run("$$", "3>&-");
    assert!(
        ended.stderr.contains("(preserved-fd 0) is not open"),
        "{ended:?}"
    );
    for other in ["1", "x", ""] {
        assert_eq!(run(other, "3>&-").stdout, "\n", "{other}");
    }
}

#[test]
fn the_configuration_may_have_another_name() {
    let bundle = Bundle::new("echo ran");
    let mut command = bundle.command(&["run"]);
    fs::create_dir(bundle.path().join("other")).unwrap();
    let (from, to) = (
        bundle.path().join("config.json"),
        bundle.path().join("other/name"),
    );
    fs::rename(from, to).unwrap();
    command.args(["--config", "other/name", &bundle.id]);
    assert_eq!(
        finish_child(
            command
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        )
        .stdout,
        "ran\n"
    );
}

#[test]
fn a_process_of_exec_is_root_if_nothing_is_said() {
    let bundle = sleeping();
    bundle.start();
    let path = bundle.path().join("process.json");
    fs::write(&path, r#"{"args": ["id", "-u"], "cwd": "/"}"#).unwrap();
    let ended = bundle.verb(&["exec", "--process", path.to_str().unwrap()], &[]);
    assert_eq!(ended.stdout, "0\n", "{ended:?}");
}

#[test]
fn a_user_namespace_need_not_map_root_and_clocks_can_be_set_in_one() {
    let in_user_namespace = |container_id: u32, script: &str| {
        let bundle = Bundle::new(script).with(|config| {
            let map = json!([{"containerID": container_id, "hostID": 100_000, "size": 1}]);
            config["linux"]["uidMappings"] = map.clone();
            config["linux"]["gidMappings"] = map;
            config["process"]["user"] = json!({"uid": container_id, "gid": container_id});
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.extend([json!({"type": "user"}), json!({"type": "time"})]);
            config["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 7881}});
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts[2]["options"]
                .as_array_mut()
                .unwrap()
                .retain(|option| option != "gid=5");
        });
        give_away(&bundle);
        bundle.output()
    };
    let script = "id -u; grep -c 'monotonic *7881' /proc/self/timens_offsets";
    assert_eq!(in_user_namespace(1000, script), "1000\n1\n");
    assert_eq!(in_user_namespace(0, script), "0\n1\n");
}

#[test]
fn a_container_manages_its_own_group_of_v2_if_it_sees_it_as_the_root_and_can_write() {
    // Where v1 has controllers the group stays root's.
    let unified = fs::metadata("/sys/fs/cgroup/cgroup.controllers").is_ok();
    for (writable, own_view, given) in [
        (true, true, unified),
        (true, false, false),
        (false, true, false),
    ] {
        let bundle = sleeping().with(|config| {
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
            config["linux"]["uidMappings"] = map.clone();
            config["linux"]["gidMappings"] = map;
            config["process"]["user"] = json!({"uid": 5, "gid": 5});
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.push(json!({"type": "user"}));
            namespaces.retain(|namespace| own_view || namespace["type"] != "cgroup");
            let mounts = config["mounts"].as_array_mut().unwrap();
            let cgroup = mounts
                .iter_mut()
                .find(|mount| mount["type"] == "cgroup")
                .unwrap();
            let options = cgroup["options"].as_array_mut().unwrap();
            options.retain(|option| !writable || option != "ro");
        });
        give_away(&bundle);
        bundle.start();
        let cgroup = Cgroup::open(&format!("/{}", bundle.id)).unwrap();
        for (_, path) in cgroup.views() {
            for (file, changed) in [
                ("", given),
                ("cgroup.procs", given),
                ("cgroup.events", false),
            ] {
                let Ok(found) = fs::metadata(path.join(file)) else {
                    continue;
                };
                let expected = if changed { 100_005 } else { 0 };
                let found = std::os::unix::fs::MetadataExt::uid(&found);
                assert_eq!(found, expected, "{}, {file}", path.display());
            }
        }
    }
}
