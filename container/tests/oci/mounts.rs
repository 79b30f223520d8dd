//! Mounts: their order, attributes and propagation, owners, and how the root spreads mounts
//! (config.md, "Mounts"; config-linux.md, "Rootfs Mount Propagation").

use std::fs;
use std::os::unix::fs::chown;

use serde_json::{Value, json};

use crate::bundle::{Bundle, UNMAPPED, tmpfs_maps_owners};

fn push(config: &mut Value, mount: Value) {
    config["mounts"].as_array_mut().unwrap().push(mount);
}

/// A container with `source` at /data, for [`Bundle::script`] to mount something below.
fn bound(script: &str, options: &Value) -> Bundle {
    let bundle = Bundle::new(script).with(|config| {
        push(
            config,
            json!({"destination": "/data", "type": "bind", "source": "source", "options": options}),
        );
        let caps = json!(["CAP_SYS_ADMIN"]);
        config["process"]["capabilities"] =
            json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    fs::create_dir_all(bundle.path().join("source/below")).unwrap();
    bundle
}

#[test]
fn mounts_are_made_in_their_order() {
    for (first, second) in [("one", "two"), ("two", "one")] {
        let bundle = Bundle::new("cat /data/name; ls /data").with(|config| {
            for source in [first, second] {
                push(
                    config,
                    json!({"destination": "/data", "source": source, "options": ["bind"]}),
                );
            }
            // Below what came before, not the other way around.
            push(
                config,
                json!({"destination": "/data/below", "type": "tmpfs", "source": "tmpfs"}),
            );
        });
        for name in ["one", "two"] {
            fs::create_dir_all(bundle.path().join(name).join("below")).unwrap();
            fs::write(bundle.path().join(name).join("name"), name).unwrap();
        }
        assert_eq!(bundle.output(), format!("{second}below\nname\n"));
    }
}

#[test]
fn attributes_hold_for_the_mount_or_for_all_below_it() {
    let script = "touch /data/a 2>/dev/null && echo top; touch /data/below/a 2>/dev/null && echo below; \
        grep ' /data' /proc/self/mounts | cut -d' ' -f2,4";
    for (options, writable, below) in [
        (json!(["rbind"]), "top\nbelow\n", "rw"),
        (json!(["rbind", "ro"]), "below\n", "rw"),
        (json!(["rbind", "rro"]), "", "ro"),
        (json!(["rbind", "rro", "rw"]), "", "ro"),
        (
            json!(["rbind", "rnosuid", "rnodev"]),
            "top\nbelow\n",
            "rw,nosuid,nodev",
        ),
        (
            json!(["rbind", "rnoexec", "rnosymfollow"]),
            "top\nbelow\n",
            "rw,noexec,nosymfollow",
        ),
        (json!(["rbind", "rnoatime"]), "top\nbelow\n", "rw,noatime"),
    ] {
        let bundle = bound(script, &options);
        let ended = bundle.script("mount -t tmpfs tmpfs source/below; $RUN");
        let table = ended.stdout.strip_prefix(writable);
        let table = table.unwrap_or_else(|| panic!("{options}: {ended:?}"));
        let line = table
            .lines()
            .find_map(|line| line.strip_prefix("/data/below "));
        let line = line.unwrap_or_else(|| panic!("{options}: {ended:?}"));
        let mut words = below.split(',');
        assert!(
            words.all(|word| line.split(',').any(|have| have == word)),
            "{options}: {line}"
        );
    }
    // Without the `r`, what is mounted below is not there at all.
    let ended = bound(script, &json!(["bind"])).script("mount -t tmpfs tmpfs source/below; $RUN");
    assert!(!ended.stdout.contains("/data/below "), "{ended:?}");
}

#[test]
fn every_attribute_of_a_new_file_system_is_set() {
    for (option, shown) in [
        ("ro", "ro"),
        ("nosuid", "nosuid"),
        ("nodev", "nodev"),
        ("noexec", "noexec"),
        ("noatime", "noatime"),
        ("nodiratime", "nodiratime"),
        ("relatime", "relatime"),
        ("norelatime", "relatime"),
        ("nosymfollow", "nosymfollow"),
        ("sync", "sync"),
        ("mode=711", "mode=711"),
        ("size=1m", "size=1024k"),
    ] {
        let bundle =
            Bundle::new("grep ' /data ' /proc/self/mounts | cut -d' ' -f4").with(|config| {
                let mount = json!({"destination": "/data", "type": "tmpfs", "options": [option]});
                push(config, mount);
            });
        fs::create_dir(bundle.rootfs().join("data")).unwrap();
        let output = bundle.output();
        assert!(
            output.trim().split(',').any(|have| have == shown),
            "{option}: {output}"
        );
    }
}

#[test]
fn a_mount_can_be_changed_by_a_later_one() {
    let bundle = Bundle::new("touch /data/a").with(|config| {
        push(
            config,
            json!({"destination": "/data", "source": "source", "options": ["bind"]}),
        );
        push(
            config,
            json!({"destination": "/data", "options": ["bind", "remount", "ro"]}),
        );
    });
    fs::create_dir(bundle.path().join("source")).unwrap();
    let ended = bundle.run();
    assert!(ended.stderr.contains("Read-only file system"), "{ended:?}");
}

#[test]
fn a_mount_that_is_changed_gets_the_options_of_its_file_system_and_its_propagation() {
    let script =
        "grep ' /data ' /proc/self/mounts; grep -c ' /data .*shared:' /proc/self/mountinfo";
    let bundle = Bundle::new(script).with(|config| {
        push(
            config,
            json!({"destination": "/data", "type": "tmpfs", "options": ["size=1m"]}),
        );
        push(
            config,
            json!({"destination": "/data", "options": ["remount", "size=2m", "shared", "noexec"]}),
        );
    });
    fs::create_dir(bundle.rootfs().join("data")).unwrap();
    let output = bundle.output();
    assert!(output.contains("size=2048k"), "{output}");
    assert!(output.contains("noexec"), "{output}");
    assert!(output.ends_with("\n1\n"), "{output}");
}

#[test]
fn an_option_that_could_only_be_ignored_is_refused() {
    for (mount, option) in [
        (
            json!({"source": "source", "options": ["bind", "size=1m"]}),
            "size=1m",
        ),
        (
            json!({"source": "source", "options": ["rbind", "sync"]}),
            "sync",
        ),
        (
            json!({"source": "source", "options": ["bind", "tmpcopyup"]}),
            "tmpcopyup",
        ),
        (
            json!({"options": ["remount", "bind", "size=1m"]}),
            "size=1m",
        ),
        (json!({"options": ["remount", "tmpcopyup"]}), "tmpcopyup"),
        (
            json!({"type": "proc", "options": ["tmpcopyup"]}),
            "tmpcopyup",
        ),
        (
            json!({"type": "cgroup", "options": ["nsdelegate"]}),
            "nsdelegate",
        ),
    ] {
        let bundle = Bundle::new("echo ran").with(|config| {
            let mut mount = mount.clone();
            mount["destination"] = json!("/data");
            push(config, mount);
        });
        fs::create_dir(bundle.path().join("source")).unwrap();
        bundle.assert_refused(&format!("mounts[7].options: `{option}`"));
    }
    // This one is the file system's to know.
    let bundle = Bundle::new("echo ran").with(|config| {
        let options = json!(["iversion"]);
        push(
            config,
            json!({"destination": "/data", "type": "tmpfs", "options": options}),
        );
    });
    fs::create_dir(bundle.rootfs().join("data")).unwrap();
    bundle.assert_refused("mounts[7]: cannot mount tmpfs on `/data`");
}

#[test]
fn an_option_that_needs_nothing_done_is_taken() {
    let bundle = Bundle::new("echo ran").with(|config| {
        let options = json!([
            "silent",
            "loud",
            "defaults",
            "async",
            "nomand",
            "noiversion"
        ]);
        for (destination, kind) in [("/data", "tmpfs"), ("/data/proc", "proc")] {
            push(
                config,
                json!({"destination": destination, "type": kind, "options": options}),
            );
        }
    });
    assert_eq!(bundle.output(), "ran\n");
}

#[test]
fn what_the_host_mounts_later_arrives_only_where_it_is_asked_for() {
    let script = "test -e /data/below/new && echo arrived; true";
    let host = "mount --bind source source; mount --make-shared source; $CREATE; \
        mount -t tmpfs tmpfs source/below; touch source/below/new; $R start $ID";
    for (propagation, expected) in [
        ("rslave", "arrived\n"),
        ("rshared", "arrived\n"),
        ("rprivate", ""),
    ] {
        let bundle = bound(script, &json!(["rbind", propagation]));
        let ended = bundle.script(host);
        assert_eq!(
            (ended.status, ended.stdout.as_str()),
            (0, expected),
            "{propagation}: {ended:?}"
        );
    }
}

#[test]
fn what_the_container_mounts_reaches_the_host_only_where_root_and_mount_are_shared() {
    let script = "mount -t tmpfs tmpfs /data/below && touch /data/below/new";
    let host = "mount --bind source source; mount --make-shared source; $RUN; \
        test ! -e source/below/new || echo reached";
    for (root, propagation, expected) in [
        ("shared", "rshared", "reached\n"),
        ("shared", "rslave", ""),
        ("slave", "rshared", ""),
        ("", "rshared", ""),
        ("", "rslave", ""),
        ("", "rprivate", ""),
    ] {
        let bundle = bound(script, &json!(["rbind", propagation]));
        let bundle = bundle.with(|config| config["linux"]["rootfsPropagation"] = json!(root));
        let ended = bundle.script(host);
        let found = (ended.status, ended.stdout.as_str());
        assert_eq!(found, (0, expected), "{root} {propagation}: {ended:?}");
    }
}

#[test]
fn the_root_spreads_mounts_as_asked() {
    for (propagation, expected, not) in [
        (json!("shared"), "shared:", "unbindable"),
        (json!("slave"), "master:", "shared:"),
        (json!("rslave"), "master:", "shared:"),
        (json!("private"), "- ", "shared:"),
        (json!("unbindable"), "unbindable", "shared:"),
        (Value::Null, "- ", "shared:"),
    ] {
        let bundle = Bundle::new("grep ' / / \\|/rootfs / ' /proc/self/mountinfo").with(|config| {
            if !propagation.is_null() {
                config["linux"]["rootfsPropagation"] = propagation.clone();
            }
        });
        let host = "mount --bind rootfs rootfs; mount --make-shared rootfs; $RUN";
        let ended = bundle.script(host);
        let good = ended.stdout.contains(expected) && !ended.stdout.contains(not);
        assert!(good, "{propagation}: {ended:?}");
    }
    let bundle = Bundle::new("true").with(|config| {
        config["linux"]["rootfsPropagation"] = json!("loud");
    });
    bundle.assert_refused("linux.rootfsPropagation: `loud` is none of");
}

/// Mounts that map owners as the container's user namespace does, or in their own way.
#[test]
fn owners_are_mapped_for_a_mount_or_for_all_below_it() {
    for (options, own, expected) in [
        (json!(["rbind"]), false, "65534:65534\n65534:65534\n"),
        (json!(["rbind", "idmap"]), false, "5:6\n65534:65534\n"),
        (json!(["rbind", "ridmap"]), false, "5:6\n5:6\n"),
        (json!(["rbind", "ridmap"]), true, "10:20\n10:20\n"),
    ] {
        let bundle = Bundle::new("stat -c %u:%g /data/file /data/below/file").with(|config| {
            let linux = &mut config["linux"];
            linux["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
            linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
            linux["gidMappings"] = json!([{"containerID": 0, "hostID": 200_000, "size": 1000}]);
            let mut mount =
                json!({"destination": "/data", "type": "bind", "source": "source", "options": options});
            if own {
                mount["uidMappings"] = json!([{"containerID": 5, "hostID": 100_010, "size": 1}]);
                mount["gidMappings"] = json!([{"containerID": 6, "hostID": 200_020, "size": 1}]);
            }
            push(config, mount);
        });
        chown(bundle.rootfs(), Some(100_000), Some(200_000)).unwrap();
        fs::create_dir(bundle.path().join("source")).unwrap();
        let host = "mount -t tmpfs tmpfs source; mkdir source/below; mount -t tmpfs tmpfs source/below; \
            for d in source source/below; do touch $d/file; chown 5:6 $d/file; chmod 755 $d; done; $RUN";
        let ended = bundle.script(host);
        if ended.stderr.contains(UNMAPPED) && !tmpfs_maps_owners() {
            continue;
        }
        assert_eq!(ended.stdout, expected, "{options}: {ended:?}");
    }
}

#[test]
fn the_usual_file_systems_are_what_they_are_called() {
    let script = "for d in /proc /sys /dev/pts /dev/shm /dev/mqueue; do \
        grep \" $d \" /proc/self/mounts | cut -d' ' -f3; done; stat -c %a /dev/shm";
    assert_eq!(
        Bundle::new(script).output(),
        "proc\nsysfs\ndevpts\ntmpfs\nmqueue\n1777\n"
    );
}

#[test]
fn a_file_system_that_the_kernel_does_not_have_is_refused() {
    let bundle = Bundle::new("true").with(|config| {
        push(
            config,
            json!({"destination": "/data", "type": "moonfs", "source": "moon"}),
        );
    });
    fs::create_dir(bundle.rootfs().join("data")).unwrap();
    bundle.assert_refused("mounts[7]: cannot mount moonfs on `/data`: no such device");
}

#[test]
fn control_groups_can_be_shown_twice() {
    let script = "for d in /one /two; do \
        find $d -name cgroup.procs | wc -l; grep \" $d.* cgroup\" /proc/self/mounts | \
        cut -d' ' -f4 | cut -d, -f1 | sort -u; done";
    let bundle = Bundle::new(script).with(|config| {
        for (destination, option) in [("/one", "ro"), ("/two", "rw")] {
            push(
                config,
                json!({"destination": destination, "type": "cgroup", "options": [option]}),
            );
        }
    });
    let output = bundle.output();
    let lines: Vec<&str> = output.lines().collect();
    let [one, "ro", two, "rw"] = lines[..] else {
        panic!("{output}");
    };
    assert!(one == two && one != "0", "{output}");
}

#[test]
fn there_may_be_more_mounts_than_open_files() {
    let bundle = Bundle::new("ls /data | wc -l; ulimit -Sn").with(|config| {
        config["process"]["rlimits"] = json!([]);
        for index in 0..150 {
            let destination = format!("/data/{index}");
            let options = json!(["bind", "ro"]);
            push(
                config,
                json!({"destination": destination, "source": "source", "options": options}),
            );
        }
    });
    fs::write(bundle.path().join("source"), "").unwrap();
    let ended = bundle.script("ulimit -Sn 100; $RUN");
    assert_eq!(ended.stdout, "150\n100\n", "{ended:?}");
}
