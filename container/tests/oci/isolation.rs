//! What a container's program sees and may do, found out from inside.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;

use nix::sys::statvfs::{FsFlags, statvfs};
use serde_json::{Value, json};

use crate::bundle::{Bundle, UNMAPPED, copy_program, tmpfs_maps_owners};

/// `statfs` type of a tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The inode of a namespace of this process.
fn own_namespace(name: &str) -> String {
    let link = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    link.to_string_lossy().into_owned()
}

#[test]
fn every_namespace_is_the_containers_own() {
    let script =
        "for n in cgroup ipc mnt net pid uts; do echo $n $(readlink /proc/self/ns/$n); done";
    let output = Bundle::new(script).output();
    assert_eq!(output.lines().count(), 6);
    for line in output.lines() {
        let (name, inode) = line.split_once(' ').unwrap();
        assert!(inode.starts_with(name), "{line}");
        assert_ne!(inode, own_namespace(name), "{name} is the host's");
    }
}

#[test]
fn a_namespace_that_is_not_asked_for_is_the_hosts() {
    let bundle =
        Bundle::new("readlink /proc/self/ns/net; readlink /proc/self/ns/uts").with(|config| {
            config["linux"]["namespaces"] =
                json!([{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}]);
            config.as_object_mut().unwrap().remove("hostname");
            // A sysfs shows a network namespace, and only its owner may mount it.
        });
    let expected = format!("{}\n{}\n", own_namespace("net"), own_namespace("uts"));
    assert_eq!(bundle.output(), expected);
}

#[test]
fn a_namespace_can_be_joined_by_path() {
    let first = Bundle::new("sleep 100");
    first.start();
    let pid = first.state()["pid"].as_i64().unwrap();
    let link = |name: &str| {
        let link = fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        format!("{}\n", link.display())
    };
    let script = "for n in net ipc uts pid; do readlink /proc/self/ns/$n; done; test -d /proc/1";
    let second = Bundle::new(script).with(|config| {
        let path = |name: &str| format!("/proc/{pid}/ns/{name}");
        config["linux"]["namespaces"] = json!([
            {"type": "mount"},
            {"type": "network", "path": path("net")},
            {"type": "ipc", "path": path("ipc")},
            {"type": "uts", "path": path("uts")},
            {"type": "pid", "path": path("pid")},
        ]);
        config.as_object_mut().unwrap().remove("hostname");
    });
    let expected: String = ["net", "ipc", "uts", "pid"].into_iter().map(link).collect();
    assert_eq!(second.output(), expected);
}

#[test]
fn the_program_is_process_1_with_the_name_it_was_given() {
    let bundle =
        Bundle::new("echo $$; hostname; pwd; id -u; echo $HOME; echo $A; cat /proc/1/comm; true")
            .with(|config| {
                config["hostname"] = json!("inside");
                config["process"]["cwd"] = json!("/made/for/me");
                config["root"]["readonly"] = json!(false);
                config["process"]["env"] = json!(["PATH=/bin", "A=b c"]);
            });
    assert_eq!(bundle.output(), "1\ninside\n/made/for/me\n0\n/\nb c\nsh\n");
}

#[test]
fn nothing_of_the_host_is_left_in_the_mount_table() {
    let output = Bundle::new("cat /proc/self/mounts").output();
    let points: Vec<&str> = output
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    let inside = ["/", "/proc", "/dev", "/sys"];
    for point in &points {
        let known = inside
            .iter()
            .any(|prefix| *point == *prefix || point.starts_with(&format!("{prefix}/")));
        assert!(known, "{point} is mounted");
    }
    assert_eq!(points.iter().filter(|point| **point == "/").count(), 1);
}

#[test]
fn the_root_cannot_be_left_by_dots_descriptors_or_the_working_directory() {
    let script = "ls -a /../../.. ; ls /proc/self/fd; cd /proc/self/cwd && pwd";
    let output = Bundle::new(script).output();
    assert!(output.contains("bin\ndev\nproc\nsys\n"), "{output}");
    assert!(!output.contains("home"), "{output}");
    // 3 is the directory that ls reads.
    assert!(output.contains("\n0\n1\n2\n3\n/"), "{output}");
}

#[test]
fn a_working_directory_that_leads_out_is_refused() {
    for cwd in ["/proc/self/fd/7", "/proc/self/fd/3/../../.."] {
        let bundle = Bundle::new("echo in $(pwd)").with(|config| {
            config["process"]["cwd"] = json!(cwd);
        });
        let message = bundle.refusal();
        assert!(message.contains("working directory"), "{message}");
    }
}

#[test]
fn a_readonly_root_cannot_be_written_and_a_writable_one_can() {
    let script = "touch /x && echo written";
    let ended = Bundle::new(script).run();
    assert_eq!((ended.status, ended.stdout.as_str()), (1, ""));
    let bundle = Bundle::new(script).with(|config| config["root"]["readonly"] = json!(false));
    assert_eq!(bundle.output(), "written\n");
    assert!(bundle.rootfs().join("x").exists());
}

#[test]
fn masked_paths_are_empty_and_readonly_paths_are_not_writable() {
    let script = "cat /secret; ls /hidden; cat /proc/keys | wc -c; touch /frozen/x; echo >/proc/sys/kernel/domainname; ls /frozen";
    let bundle = Bundle::new(script).with(|config| {
        config["root"]["readonly"] = json!(false);
        let linux = &mut config["linux"];
        linux["maskedPaths"] = json!([
            "/secret",
            "/hidden",
            "/proc/keys",
            "/missing",
            "/secret/below"
        ]);
        linux["readonlyPaths"] = json!(["/frozen", "/proc/sys", "/absent"]);
    });
    fs::write(bundle.rootfs().join("secret"), "text").unwrap();
    for directory in ["hidden", "frozen"] {
        fs::create_dir(bundle.rootfs().join(directory)).unwrap();
        fs::write(bundle.rootfs().join(directory).join("file"), "text").unwrap();
    }
    let ended = bundle.run();
    assert_eq!(ended.stdout, "0\nfile\n", "{ended:?}");
    assert_eq!(
        ended.stderr.matches("Read-only file system").count(),
        2,
        "{ended:?}"
    );
    assert!(!bundle.rootfs().join("frozen/x").exists());
}

/// CVE-2025-31133: what hides a file must not be the container's own /dev/null.
#[test]
fn a_mask_is_not_made_of_what_the_image_calls_dev_null() {
    let bundle = Bundle::new("cat /secret").with(|config| {
        config["linux"]["maskedPaths"] = json!(["/secret"]);
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] == "/proc");
        // A device of the image's own choice, where the runtime puts none.
        mounts.push(
            json!({"destination": "/dev", "type": "bind", "source": "fake", "options": ["bind"]}),
        );
    });
    fs::write(bundle.rootfs().join("secret"), "text").unwrap();
    fs::create_dir(bundle.path().join("fake")).unwrap();
    symlink("/secret", bundle.path().join("fake/null")).unwrap();
    assert_eq!(bundle.output(), "");
}

/// Mounts whose destination tries to leave the root, by dots or by links of the image.
#[test]
fn no_mount_lands_outside_of_the_root() {
    let bundle = Bundle::new("cat /a/marker /b/marker /c/marker /inside/marker").with(|config| {
        let bind = |destination: &str| {
            json!({"destination": destination, "type": "bind", "source": "source", "options": ["rbind", "ro"]})
        };
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.extend(["/../../a", "/up/b", "/absolute/c", "/dangling"].map(bind));
    });
    fs::create_dir(bundle.path().join("source")).unwrap();
    fs::write(bundle.path().join("source/marker"), "x").unwrap();
    let outside = bundle.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink("../..", bundle.rootfs().join("up")).unwrap();
    symlink("/", bundle.rootfs().join("absolute")).unwrap();
    symlink("/../inside", bundle.rootfs().join("dangling")).unwrap();
    assert_eq!(bundle.output(), "xxxx");
    assert!(bundle.rootfs().join("inside").is_dir());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!bundle.path().join("a").exists() && !bundle.path().join("b").exists());
}

#[test]
fn a_bind_mount_has_its_options_and_its_source_is_needed() {
    let mounts = |source: &'static str, options: Value| {
        move |config: &mut Value| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/data", "source": source, "options": options}));
        }
    };
    let script = "cat /data/file; touch /data/new; /data/program; grep ' /data ' /proc/self/mounts";
    let bundle =
        Bundle::new(script).with(mounts("source", json!(["rbind", "ro", "nosuid", "noexec"])));
    fs::create_dir(bundle.path().join("source")).unwrap();
    fs::write(bundle.path().join("source/file"), "text\n").unwrap();
    copy_program(
        Path::new("/bin/busybox"),
        &bundle.path().join("source/program"),
    );
    let ended = bundle.run();
    assert!(ended.stdout.starts_with("text\n"), "{ended:?}");
    for option in [" ro,", "nosuid,", "noexec,"] {
        assert!(ended.stdout.contains(option), "{ended:?}");
    }
    assert!(ended.stderr.contains("Read-only file system"), "{ended:?}");
    assert!(ended.stderr.contains("Permission denied"), "{ended:?}");

    let message = Bundle::new("true")
        .with(mounts("/nowhere", json!(["bind"])))
        .refusal();
    assert!(
        message.contains("mounts[7].source: cannot open /nowhere: no such file"),
        "{message}"
    );
}

#[test]
fn a_file_can_be_bound_where_the_image_has_a_dangling_link() {
    let bundle = Bundle::new("cat /etc/resolv.conf").with(|config| {
        config["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/etc/resolv.conf", "type": "bind", "source": "dns", "options": ["bind"]
        }));
    });
    fs::write(bundle.path().join("dns"), "nameserver\n").unwrap();
    fs::create_dir(bundle.rootfs().join("etc")).unwrap();
    symlink("../run/gone/stub", bundle.rootfs().join("etc/resolv.conf")).unwrap();
    assert_eq!(bundle.output(), "nameserver\n");
}

#[test]
fn a_tmpfs_has_its_size_and_takes_up_what_it_hides_if_asked() {
    let script = "cat /up/file /sealed/file; touch /sealed/file 2>&1 | grep -c Read-only; \
                  ls /bare; stat -c %a /bare; grep ' /bare ' /proc/self/mounts";
    let bundle = Bundle::new(script)
        .with(|config| {
            let tmpfs = |destination: &str, options: Value| {
                json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
            };
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(tmpfs("/up", json!(["tmpcopyup", "nosuid"])));
            mounts.push(tmpfs("/sealed", json!(["tmpcopyup", "ro"])));
            mounts.push(tmpfs("/bare", json!(["size=64k", "nosuid"])));
        });
    for directory in ["up", "sealed", "bare"] {
        fs::create_dir(bundle.rootfs().join(directory)).unwrap();
        fs::write(bundle.rootfs().join(directory).join("file"), "text\n").unwrap();
    }
    let output = bundle.output();
    assert!(output.starts_with("text\ntext\n1\n755\n"), "{output}");
    assert!(output.contains("size=64k"), "{output}");
}

#[test]
fn a_file_of_proc_cannot_be_replaced_unless_it_is_harmless() {
    let over = |destination: &'static str| {
        move |config: &mut Value| {
            config["mounts"].as_array_mut().unwrap().push(json!({
                "destination": destination, "type": "bind", "source": "fake", "options": ["bind"]
            }));
        }
    };
    let bundle = Bundle::new("cat /proc/uptime").with(over("/proc/uptime"));
    fs::write(bundle.path().join("fake"), "for ever\n").unwrap();
    assert_eq!(bundle.output(), "for ever\n");
    for destination in [
        "/proc/self/attr/exec",
        "/proc/sys/kernel/core_pattern",
        "/p/self/environ",
    ] {
        let bundle = Bundle::new("true").with(over(destination));
        fs::write(bundle.path().join("fake"), "").unwrap();
        symlink("/proc", bundle.rootfs().join("p")).unwrap();
        let message = bundle.refusal();
        assert!(message.contains("only some files of /proc"), "{message}");
    }
}

#[test]
fn the_default_devices_work_and_others_are_denied() {
    let script = "cat /dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; \
        echo >/dev/full; readlink /dev/fd; readlink /dev/ptmx; mknod /dev/x b 7 0; cat /dev/mine";
    let bundle = Bundle::new(script).with(|config| {
        config["linux"]["devices"] = json!([
            {"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 0o600, "uid": 0}
        ]);
        let caps = json!(["CAP_MKNOD"]);
        config["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    let ended = bundle.run();
    assert!(
        ended.stdout.starts_with("3\n3\n/proc/self/fd\npts/ptmx\n"),
        "{ended:?}"
    );
    assert!(
        ended.stderr.contains("No space left on device"),
        "{ended:?}"
    );
    // The cgroup allows to make nodes, not to open them.
    assert!(ended.stderr.contains("/dev/mine"), "{ended:?}");
}

#[test]
fn capabilities_limits_and_no_new_privs_are_set() {
    let script = "grep -E 'Cap|NoNewPrivs|Groups|Umask' /proc/self/status; ulimit -n; ulimit -Hn; \
        cat /proc/self/oom_score_adj; id";
    let bundle = Bundle::new(script).with(|config| {
        let process = &mut config["process"];
        let (net, kill) = ("CAP_NET_RAW", "CAP_KILL");
        process["capabilities"] = json!({
            "bounding": [net, kill], "permitted": [net, kill], "effective": [net],
            "inheritable": [kill], "ambient": [kill]
        });
        process["user"] = json!({"uid": 7, "gid": 8, "additionalGids": [9, 10], "umask": 0o27});
        process["oomScoreAdj"] = json!(500);
        process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    });
    let output = bundle.output();
    for expected in [
        "CapInh:\t0000000000000020",
        "CapPrm:\t0000000000000020",
        "CapEff:\t0000000000000020",
        "CapBnd:\t0000000000002020",
        "CapAmb:\t0000000000000020",
        "NoNewPrivs:\t1",
        "Umask:\t0027",
        "Groups:\t9 10 ",
        "\n100\n200\n500\nuid=7 gid=8 groups=9,10",
    ] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
}

#[test]
fn an_unknown_capability_is_warned_of() {
    let bundle = Bundle::new("true").with(|config| {
        config["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_FLY"]);
    });
    let ended = bundle.run();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(
        ended.stderr.contains("unknown capability \"CAP_FLY\""),
        "{ended:?}"
    );
}

#[test]
fn kernel_settings_of_the_namespaces_are_written() {
    let script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced /proc/sys/kernel/domainname";
    let bundle = Bundle::new(script).with(|config| {
        config["domainname"] = json!("example");
        config["linux"]["sysctl"] =
            json!({"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"});
    });
    assert_eq!(bundle.output(), "1\n1\nexample\n");
    let bundle = Bundle::new("true").with(|config| {
        config["linux"]["sysctl"] = json!({"kernel.panic": "1"});
    });
    assert!(bundle.refusal().contains("linux.sysctl.kernel.panic"));
}

#[test]
fn a_user_namespace_maps_root_to_a_user_of_the_host() {
    let script = "cat /proc/self/uid_map; id -u; ls -n / | grep bin; touch /tmp/x; cat /dev/null && mount -t tmpfs x /tmp";
    let bundle = Bundle::new(script).with(|config| {
        let linux = &mut config["linux"];
        linux["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        linux["gidMappings"] = json!([{"containerID": 0, "hostID": 200_000, "size": 1000}]);
        config["root"]["readonly"] = json!(false);
    });
    let (uid, gid) = (Some(100_000), Some(200_000));
    fs::create_dir(bundle.rootfs().join("tmp")).unwrap();
    for path in [
        bundle.rootfs(),
        bundle.rootfs().join("bin"),
        bundle.rootfs().join("tmp"),
    ] {
        std::os::unix::fs::chown(path, uid, gid).unwrap();
    }
    let ended = bundle.run();
    assert!(
        ended.stdout.contains("0     100000       1000\n0\n"),
        "{ended:?}"
    );
    assert!(ended.stdout.contains(" 0        0 "), "{ended:?}");
    let made = fs::metadata(bundle.rootfs().join("tmp/x")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 100_000);
}

#[test]
fn the_owners_of_a_bind_mount_can_be_mapped() {
    let bundle = Bundle::new("stat -c %u:%g /data /data/file; touch /data/made").with(|config| {
        config["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/data", "type": "bind", "source": "source", "options": ["rbind"],
            "uidMappings": [{"containerID": 1000, "hostID": 0, "size": 10}],
            "gidMappings": [{"containerID": 2000, "hostID": 0, "size": 10}],
        }));
    });
    let source = bundle.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "").unwrap();
    std::os::unix::fs::chown(&source, Some(1000), Some(2000)).unwrap();
    std::os::unix::fs::chown(source.join("file"), Some(1001), Some(2002)).unwrap();
    let ended = bundle.run();
    // The tests' directory may be on a tmpfs.
    let file_system = rustix::fs::statfs(bundle.path()).unwrap().f_type;
    if file_system == TMPFS_MAGIC && !tmpfs_maps_owners() {
        assert!(ended.stderr.contains(UNMAPPED), "{ended:?}");
        return bundle.assert_nothing_is_left();
    }
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (0, "0:0\n1:2\n"),
        "{ended:?}"
    );
    let made = fs::metadata(source.join("made")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 1000);
}

#[test]
fn a_time_namespace_has_its_offsets() {
    let bundle = Bundle::new("cat /proc/uptime").with(|config| {
        config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "time"}));
        config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    });
    let output = bundle.output();
    assert!(output.starts_with("1000"), "{output}");
    assert_eq!(output.split('.').next().unwrap().len(), 10, "{output}");
}

#[test]
fn a_seccomp_filter_denies_what_it_says() {
    for no_new_privileges in [true, false] {
        let bundle = Bundle::new("mkdir /dev/x; echo $?").with(|config| {
            config["process"]["noNewPrivileges"] = json!(no_new_privileges);
            config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]
            });
        });
        let ended = bundle.run();
        assert_eq!(ended.stdout, "1\n", "{ended:?}");
        assert!(ended.stderr.contains("Permission denied"), "{ended:?}");
    }
}

#[test]
fn limits_bind() {
    let bundle = Bundle::new("for i in 1 2 3 4 5 6 7 8; do sleep 9 & done").with(|config| {
        config["linux"]["resources"]["pids"] = json!({"limit": 4});
    });
    let ended = bundle.run();
    assert!(ended.stderr.contains("can't fork"), "{ended:?}");
}

#[test]
fn the_container_sees_its_own_cgroup_as_the_root() {
    let bundle = Bundle::new("cat /proc/self/cgroup; ls /sys/fs/cgroup; touch /sys/fs/cgroup/x");
    let ended = bundle.run();
    for line in ended.stdout.lines().filter(|line| line.contains(':')) {
        assert!(line.ends_with(":/"), "{ended:?}");
    }
    assert!(ended.stderr.contains("Read-only file system"), "{ended:?}");
    assert!(ended.stdout.contains("pids"), "{ended:?}");
}

#[test]
fn the_runtimes_own_file_cannot_be_written_from_inside() {
    // The container's program is the runtime itself (CVE-2019-5736): whoever opens its file by /proc
    // comes through a mount that is read-only.
    let bundle = Bundle::new("sleep 100");
    bundle.start();
    let script = "exec 3>>/proc/1/exe; echo $?";
    let ended = bundle.verb(&["exec"], &["sh", "-c", script]);
    assert!(!ended.stdout.contains('0'), "{ended:?}");
    drop(bundle);
    let bundle = Bundle::new("unused").with(|config| {
        config["process"]["args"] = json!(["/proc/self/exe", "features"]);
    });
    // It runs, read-only: what it prints is its own.
    let ended = bundle.run();
    assert!(
        ended.status == 0 || ended.stderr.contains("cannot execute"),
        "{ended:?}"
    );
}

#[test]
fn the_runtime_runs_from_a_read_only_mount_whatever_comes_before_the_verb() {
    for before in [&["run"][..], &["--debug", "--log-format=json", "run"]] {
        let bundle = Bundle::new("echo ready; sleep 100");
        let mut command = bundle.command(before);
        let mut runtime = command
            .arg(&bundle.id)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(runtime.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let mount = statvfs(format!("/proc/{}/exe", runtime.id()).as_str()).unwrap();
        assert_eq!(bundle.verb(&["kill"], &["KILL"]).status, 0);
        runtime.wait().unwrap();
        assert_eq!(line, "ready\n");
        assert!(mount.flags().contains(FsFlags::ST_RDONLY), "{before:?}");
    }
}
