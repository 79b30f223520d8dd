//! Namespaces of every kind, made or joined (config-linux.md, "Namespaces").

use std::fs;
use std::os::unix::fs::chown;

use serde_json::{Value, json};

use crate::bundle::{Bundle, UNMAPPED, share_namespace, tmpfs_maps_owners};

const MAPPED_UID: u32 = 100_000;
const MAPPED_GID: u32 = 200_000;

/// Gives the container a user namespace, and its root file system to the user that is root there.
pub(crate) fn with_user_namespace(bundle: Bundle) -> Bundle {
    chown(bundle.rootfs(), Some(MAPPED_UID), Some(MAPPED_GID)).unwrap();
    bundle.with(|config| {
        add_namespace(config, json!({"type": "user"}));
        let map = |id: u32| json!([{"containerID": 0, "hostID": id, "size": 1000}]);
        config["linux"]["uidMappings"] = map(MAPPED_UID);
        config["linux"]["gidMappings"] = map(MAPPED_GID);
    })
}

fn add_namespace(config: &mut Value, namespace: Value) {
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|other| other["type"] != namespace["type"]);
    namespaces.push(namespace);
}

fn link(pid: &Value, name: &str) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    format!("{}\n", link.display())
}

#[test]
fn clocks_and_cgroups_of_another_container_can_be_joined_and_exec_joins_them_too() {
    let first = Bundle::new("exec sleep 100").with(|config| {
        add_namespace(config, json!({"type": "time"}));
        config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    });
    first.start();
    let pid = first.state()["pid"].clone();
    let script =
        "readlink /proc/self/ns/time; readlink /proc/self/ns/cgroup; cut -c1-4 /proc/uptime";
    let expected = format!("{}{}1000\n", link(&pid, "time"), link(&pid, "cgroup"));
    let ended = first.verb(&["exec"], &["sh", "-c", script]);
    assert_eq!(ended.stdout, expected, "{ended:?}");

    let second = Bundle::new(script).with(|config| {
        for name in ["time", "cgroup"] {
            let path = format!("/proc/{pid}/ns/{name}");
            add_namespace(config, json!({"type": name, "path": path}));
        }
    });
    assert_eq!(second.output(), expected);
}

#[test]
fn both_clocks_have_offsets_that_may_be_negative() {
    let bundle = Bundle::new("cat /proc/self/timens_offsets").with(|config| {
        add_namespace(config, json!({"type": "time"}));
        config["linux"]["timeOffsets"] = json!({
            "monotonic": {"secs": 7, "nanosecs": 999_999_999},
            "boottime": {"secs": -1}
        });
    });
    let output = bundle.output();
    let lines: Vec<Vec<&str>> = output
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert!(
        lines.contains(&vec!["monotonic", "7", "999999999"]),
        "{output}"
    );
    assert!(lines.contains(&vec!["boottime", "-1", "0"]), "{output}");
}

#[test]
fn a_user_namespace_can_be_joined_and_exec_is_its_root() {
    let first = with_user_namespace(Bundle::new("exec sleep 100"));
    first.start();
    let pid = first.state()["pid"].clone();
    let script = "readlink /proc/self/ns/user; id -u; id -g";
    let expected = format!("{}0\n0\n", link(&pid, "user"));
    let ended = first.verb(&["exec"], &["sh", "-c", script]);
    assert_eq!(ended.stdout, expected, "{ended:?}");

    let second = Bundle::new(script).with(|config| {
        add_namespace(
            config,
            json!({"type": "user", "path": format!("/proc/{pid}/ns/user")}),
        );
    });
    chown(second.rootfs(), Some(MAPPED_UID), Some(MAPPED_GID)).unwrap();
    assert_eq!(second.output(), expected);
}

#[test]
fn a_mount_can_be_mapped_as_the_user_namespace_that_is_joined() {
    let first = with_user_namespace(Bundle::new("exec sleep 100"));
    first.start();
    let path = format!("/proc/{}/ns/user", first.state()["pid"]);
    let second = Bundle::new("stat -c %u:%g /data/file").with(|config| {
        add_namespace(config, json!({"type": "user", "path": path}));
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(
            json!({"destination": "/data", "source": "source", "options": ["bind", "idmap"]}),
        );
    });
    chown(second.rootfs(), Some(MAPPED_UID), Some(MAPPED_GID)).unwrap();
    fs::create_dir(second.path().join("source")).unwrap();
    let host = "mount -t tmpfs tmpfs source; chmod 755 source; touch source/file; \
        chown 5:6 source/file; $RUN";
    let ended = second.script(host);
    if !ended.stderr.contains(UNMAPPED) || tmpfs_maps_owners() {
        assert_eq!(ended.stdout, "5:6\n", "{ended:?}");
    }
}

/// A namespace that belongs to the host can be joined only with the host's rights, and one that belongs
/// to the container's user namespace also with those there.
#[test]
fn namespaces_of_the_host_and_of_a_user_namespace_can_be_joined_together() {
    let host = Bundle::new("exec sleep 100");
    host.start();
    let user = with_user_namespace(Bundle::new("exec sleep 100"));
    user.start();
    let (host_pid, user_pid) = (host.state()["pid"].clone(), user.state()["pid"].clone());
    let path = |pid: &Value, name: &str| format!("/proc/{pid}/ns/{name}");
    let script = "readlink /proc/self/ns/net; readlink /proc/self/ns/uts; id -u";
    let shared = |bundle: Bundle| {
        bundle.with(|config| {
            let network = json!({"type": "network", "path": path(&host_pid, "net")});
            add_namespace(config, network);
            // The file system of a network belongs to who owns the network.
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["type"] != "sysfs");
        })
    };
    let expected = |uts: &Value| format!("{}{}0\n", link(&host_pid, "net"), link(uts, "uts"));

    let new = shared(with_user_namespace(Bundle::new("exec sleep 100")));
    new.start();
    let ended = new.verb(&["exec"], &["sh", "-c", script]);
    let own = new.state()["pid"].clone();
    assert_eq!(ended.stdout, expected(&own), "{ended:?}");

    let joined = shared(Bundle::new(script)).with(|config| {
        for name in ["user", "uts"] {
            let namespace = json!({"type": name, "path": path(&user_pid, name)});
            add_namespace(config, namespace);
        }
        config.as_object_mut().unwrap().remove("hostname");
    });
    chown(joined.rootfs(), Some(MAPPED_UID), Some(MAPPED_GID)).unwrap();
    assert_eq!(joined.output(), expected(&user_pid));
}

#[test]
fn users_of_the_namespace_are_others_on_the_host_and_unmapped_ones_are_refused() {
    let bundle = with_user_namespace(Bundle::new("id -u; id -G; exec sleep 100")).with(|config| {
        config["process"]["user"] = json!({"uid": 5, "gid": 6, "additionalGids": [7]});
    });
    bundle.start();
    let pid = bundle.state()["pid"].clone();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in ["Uid:\t100005\t", "Gid:\t200006\t", "Groups:\t200007 "] {
        assert!(status.contains(line), "{status}");
    }
    let bundle = with_user_namespace(Bundle::new("true")).with(|config| {
        config["process"]["user"] = json!({"uid": 5000, "gid": 0});
    });
    bundle.assert_refused("cannot set the user id");
}

/// Pipes are the caller's, who is nobody there; also in a namespace that somebody else made.
#[test]
fn standard_streams_can_be_opened_again_in_a_user_namespace() {
    let script = "exec > /dev/stdout 2> /dev/stderr; echo out; echo err >&2";
    for uid in [0, 5] {
        let user = |config: &mut Value| config["process"]["user"] = json!({"uid": uid, "gid": 6});
        let made = with_user_namespace(Bundle::new(script)).with(user).run();
        let sleeping = with_user_namespace(Bundle::new("exec sleep 100")).with(user);
        sleeping.start();
        let path = format!("/proc/{}/ns/user", sleeping.state()["pid"]);
        let beside = sleeping.verb(&["exec"], &["sh", "-c", script]);
        let joined = Bundle::new(script).with(user).with(|config| {
            add_namespace(config, json!({"type": "user", "path": path}));
        });
        chown(joined.rootfs(), Some(MAPPED_UID), Some(MAPPED_GID)).unwrap();
        for ended in [made, beside, joined.run()] {
            let said = (ended.stdout.as_str(), ended.stderr.as_str());
            assert_eq!(said, ("out\n", "err\n"), "{uid}: {ended:?}");
        }
    }
}

#[test]
fn what_cannot_be_a_namespace_is_refused() {
    let namespaces = |namespaces: Value| {
        Bundle::new("true").with(|config| config["linux"]["namespaces"] = namespaces)
    };
    for (given, words) in [
        (
            json!([{"type": "mount"}, {"type": "network", "path": "/proc/self/ns/uts"}]),
            "is no net namespace",
        ),
        (
            json!([{"type": "mount"}, {"type": "network", "path": "/proc/self/ns/gone"}]),
            "linux.namespaces[1].path: cannot open",
        ),
        (
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "pid"}]),
            "linux.namespaces[2].type: `pid`: it is given twice",
        ),
        (
            json!([{"type": "mount"}, {"type": "moon"}]),
            "linux.namespaces[1].type",
        ),
    ] {
        namespaces(given).assert_refused(words);
    }
}

#[test]
fn a_new_user_namespace_needs_mappings_of_some_size() {
    let bundle = |size: u32| {
        with_user_namespace(Bundle::new("true")).with(|config| {
            config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 1, "size": size}]);
        })
    };
    bundle(0).assert_refused("linux.gidMappings[0].size: `0`: it must be more than 0");
    assert_eq!(bundle(1000).run().status, 0);
}

#[test]
fn names_need_a_namespace_for_names() {
    for field in ["hostname", "domainname"] {
        let bundle = Bundle::new("true").with(|config| {
            config.as_object_mut().unwrap().remove("hostname");
            config[field] = json!("name");
            share_namespace(config, "uts");
        });
        bundle.assert_refused(&format!("{field}: `name`: it needs a uts namespace"));
    }
}

/// "If a namespace type is not specified in the namespaces array, the container MUST inherit the runtime
/// namespace of that type."
fn without_namespaces(script: &str) -> Bundle {
    Bundle::new(script).with(|config| {
        config["linux"]["namespaces"] = json!([]);
        config["linux"]["maskedPaths"] = json!([]);
        config["linux"]["readonlyPaths"] = json!([]);
        config.as_object_mut().unwrap().remove("hostname");
    })
}

const KINDS: &str =
    "for kind in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$kind; done";

#[test]
fn a_container_without_namespaces_has_its_callers_and_a_root_of_its_own() {
    let bundle = without_namespaces("exec sleep 100");
    let ended = bundle.script(&format!(
        r#"{KINDS} >expected
        cat /proc/self/mountinfo >before
        $CREATE >/dev/null 2>errors </dev/null || {{ cat errors >&2; exit 1; }}
        $R start $ID
        $R exec $ID sh -c '{KINDS}' >found
        cat /proc/self/mountinfo >after
        cmp expected found
        cmp before after"#,
    ));
    assert_eq!(ended.status, 0, "{ended:?}");
    // From another mount namespace than the one that it was made in.
    let ended = bundle.verb(
        &["exec"],
        &["sh", "-c", "ls -d /bin /usr; pwd; ls /dev/pts"],
    );
    assert!(ended.stdout.starts_with("/bin\n/\n"), "{ended:?}");
    assert!(ended.stderr.contains("/usr"), "{ended:?}");
    assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
    bundle.assert_nothing_is_left();
}

#[test]
fn the_root_of_a_container_with_its_callers_mounts_is_as_it_was_asked_for() {
    let script = "touch /made 2>/dev/null || echo read-only; cat /proc/version; \
        touch /tmp/there && ls /tmp; mount -t tmpfs tmpfs /tmp 2>/dev/null || echo 'no more mounts'";
    let bundle = without_namespaces(script).with(|config| {
        config["root"]["readonly"] = json!(true);
        config["linux"]["rootfsPropagation"] = json!("rprivate");
        config["linux"]["maskedPaths"] = json!(["/proc/version"]);
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
        let capabilities = &mut config["process"]["capabilities"];
        for set in ["bounding", "effective", "permitted"] {
            capabilities[set] = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
        }
    });
    fs::create_dir(bundle.rootfs().join("tmp")).unwrap();
    assert_eq!(bundle.output(), "read-only\nthere\nno more mounts\n");
    assert_eq!(
        fs::read_dir(bundle.rootfs().join("tmp")).unwrap().count(),
        0
    );
}

#[test]
fn what_needs_a_mount_namespace_is_refused_without_one() {
    let bundle = without_namespaces("echo ran").with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.truncate(1);
        mounts.push(
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
            "options": ["unbindable"]}),
        );
    });
    bundle.assert_refused("mounts[1].options");
    let bundle = with_user_namespace(Bundle::new("echo ran")).with(|config| {
        share_namespace(config, "mount");
    });
    bundle.assert_refused("a user namespace needs a mount namespace");
}
