//! Device nodes, and who may open them (config-linux.md, "Devices", "Allowed Device list").

use std::fs;

use serde_json::{Value, json};

use crate::bundle::Bundle;

fn with_devices(script: &str, devices: Value) -> Bundle {
    Bundle::new(script).with(|config| {
        config["linux"]["devices"] = devices;
        config["root"]["readonly"] = json!(false);
    })
}

#[test]
fn the_multiplexer_of_terminals_is_the_containers_also_if_it_is_asked_for() {
    let bundle = Bundle::new("readlink /dev/ptmx").with(|config| {
        config["linux"]["devices"] =
            json!([{"path": "/dev/ptmx", "type": "c", "major": 5, "minor": 2}]);
    });
    assert_eq!(bundle.output(), "pts/ptmx\n");
}

#[test]
fn a_node_of_every_kind_has_its_number_mode_and_owner_wherever_it_is() {
    let devices = json!([
        {"path": "/dev/c", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/some/where/b", "type": "b", "major": 7, "minor": 3, "fileMode": 0o600},
        {"path": "/dev/u", "type": "u", "major": 1, "minor": 300},
        {"path": "/dev/p", "type": "p", "fileMode": 0o622, "uid": 7, "gid": 8}
    ]);
    let script = "stat -c '%F %t:%T %a %u:%g' /dev/c /some/where/b /dev/u /dev/p";
    let expected = "character special file a:e5 640 5:6\n\
        block special file 7:3 600 0:0\n\
        character special file 1:12c 666 0:0\n\
        fifo 0:0 622 7:8\n";
    assert_eq!(with_devices(script, devices).output(), expected);
}

#[test]
fn what_the_image_has_at_the_path_must_be_the_same_device() {
    let device = json!([{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}]);
    let bundle = |kind: &str| {
        let bundle = with_devices("echo made", device.clone()).with(|config| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["destination"] == "/proc");
        });
        let path = bundle.rootfs().join("dev");
        fs::create_dir(&path).unwrap();
        let path = path.join("x");
        if kind == "file" {
            fs::write(path, "").unwrap();
        } else {
            use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
            let mode = Mode::from_raw_mode(0o666);
            mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
        }
        bundle
    };
    bundle("file").assert_refused("cannot make the device `/dev/x`: something else is there");
    assert_eq!(bundle("device").output(), "made\n");
}

#[test]
fn a_device_that_cannot_be_is_refused() {
    for (device, words) in [
        (
            json!({"path": "x", "type": "c", "major": 1, "minor": 3}),
            "linux.devices[0].path",
        ),
        (
            json!({"path": "/x", "type": "moon", "major": 1, "minor": 3}),
            "linux.devices[0].type",
        ),
        (
            json!({"path": "/x", "type": "c", "major": -1, "minor": 3}),
            "linux.devices[0].major",
        ),
    ] {
        with_devices("true", json!([device])).assert_refused(words);
    }
}

/// A device without a driver cannot be opened by anyone; what matters is who says so.
#[test]
fn rules_hold_in_their_order_with_all_denied_at_first() {
    let (all, reads) = (json!({"allow": false, "access": "rwm"}), 11);
    let rule = |allow: bool, minor: u32, access: &str| json!({"allow": allow, "type": "c", "major": 240, "minor": minor, "access": access});
    for (rules, denied) in [
        (json!([]), true),
        (json!([all]), true),
        (json!([all, rule(true, reads, "r")]), false),
        (
            json!([all, rule(true, reads, "r"), rule(false, reads, "r")]),
            true,
        ),
        (
            json!([all, rule(false, reads, "r"), rule(true, reads, "r")]),
            false,
        ),
        (json!([all, rule(true, reads, "w")]), true),
        (json!([all, rule(true, 12, "rwm")]), true),
        (
            json!([all, {"allow": true, "type": "c", "major": 240, "access": "rwm"}]),
            false,
        ),
        (json!([all, {"allow": true, "access": "rwm"}]), false),
        (
            json!([all, rule(true, reads, "r"), {"allow": false, "access": "r"}]),
            true,
        ),
    ] {
        let device = json!([{"path": "/dev/x", "type": "c", "major": 240, "minor": reads}]);
        let bundle = with_devices("cat /dev/x", device).with(|config| {
            config["linux"]["resources"]["devices"] = rules.clone();
        });
        let ended = bundle.run();
        assert_eq!(ended.status, 1, "{ended:?}");
        let refused = ended.stderr.contains("Operation not permitted");
        assert_eq!(refused, denied, "{rules}: {ended:?}");
    }
}

#[test]
fn a_terminal_is_the_console() {
    let bundle = Bundle::new("test -c /dev/console && readlink /dev/ptmx; ls /dev/pts/0")
        .with(|config| config["process"]["terminal"] = json!(true));
    assert_eq!(bundle.run().stdout, "pts/ptmx\n/dev/pts/0\n");
    let bundle = Bundle::new("test -e /dev/console || echo none");
    assert_eq!(bundle.output(), "none\n");
}
