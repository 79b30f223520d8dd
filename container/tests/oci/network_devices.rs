//! Network devices that are moved into the container (config-linux.md, "Network Devices"), within
//! network namespaces of the tests' own.

use serde_json::{Value, json};

use crate::bundle::{Bundle, share_namespace};

/// Two devices that are joined, the first with an address of each family, a size and a number of its
/// own. The path tells iproute2 from what a shell of busybox has of its own.
const DEVICES: &str = "/bin/ip link add one mtu 1400 address 02:00:00:00:00:01 type veth peer name two; \
    /bin/ip addr add 10.9.8.7/24 broadcast 10.9.8.255 dev one; \
    /bin/ip addr add fd00::7/64 dev one nodad; /bin/ip link set one up; ";

fn with_devices(script: &str, devices: Value) -> Bundle {
    Bundle::new(script).with(|config| config["linux"]["netDevices"] = devices)
}

#[test]
fn a_device_moves_with_what_it_is_and_is_up() {
    let script = "ip addr show dev inside";
    let bundle = with_devices(script, json!({"one": {"name": "inside"}}));
    let ended = bundle.script(&format!(
        "{DEVICES} $RUN; /bin/ip link show dev one || echo gone"
    ));
    for expected in [
        "inside@",
        "UP",
        "mtu 1400",
        "02:00:00:00:00:01",
        "inet 10.9.8.7/24 brd 10.9.8.255 scope global",
        "inet6 fd00::7/64 scope global",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {ended:?}");
    }
    // What is virtual ends with the container's namespace, and its other side with it.
    assert!(ended.stdout.ends_with("gone\n"), "{ended:?}");
}

#[test]
fn a_device_keeps_its_name_or_is_numbered_by_the_kernel() {
    let devices = json!({"one": {}, "two": {"name": "net%d"}});
    let bundle = with_devices("ip -o link | cut -d: -f2 | cut -d@ -f1", devices);
    let ended = bundle.script(&format!("{DEVICES} $RUN"));
    assert!(ended.stdout.contains(" one\n"), "{ended:?}");
    assert!(ended.stdout.contains(" net0\n"), "{ended:?}");
}

#[test]
fn a_device_can_move_into_a_namespace_that_is_joined() {
    let bundle = with_devices(
        "ip addr show dev inside",
        json!({"one": {"name": "inside"}}),
    );
    let path = bundle.path().join("net");
    let bundle = bundle.with(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({"type": "network", "path": path}));
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["type"] != "sysfs" && mount["type"] != "cgroup");
    });
    let script = format!("touch net; unshare --net=net true; {DEVICES} $RUN");
    let ended = bundle.script(&script);
    assert!(ended.stdout.contains("inet 10.9.8.7/24"), "{ended:?}");
}

#[test]
fn a_device_goes_back_as_it_was_when_the_container_does_not_come_to_be() {
    let bundle = with_devices("echo ran", json!({"one": {"name": "inside"}}))
        .with(|config| config["hooks"] = json!({"createContainer": [{"path": "/bin/false"}]}));
    let script = format!(
        "{DEVICES} $RUN || echo failed; /bin/ip addr show dev one; /bin/ip link show dev two"
    );
    let ended = bundle.script(&script);
    for expected in [
        "failed",
        "UP",
        "mtu 1400",
        "inet 10.9.8.7/24 brd 10.9.8.255 scope global",
        "inet6 fd00::7/64 scope global",
        "two@one",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {ended:?}");
    }
    bundle.assert_nothing_is_left();
}

#[test]
fn a_device_that_cannot_move_is_refused_and_stays() {
    for (devices, words) in [
        (
            json!({"moon": {}}),
            "linux.netDevices.moon: cannot find the network device",
        ),
        (
            json!({"one": {"name": "lo"}}),
            "linux.netDevices.one.name: the container's network namespace has a `lo`",
        ),
        (
            json!({"one": {"name": "a/b"}}),
            "linux.netDevices.one.name: `a/b` is no name",
        ),
        (
            json!({"one": {"name": "x"}, "two": {"name": "x"}}),
            "`x` is given to two devices",
        ),
    ] {
        let bundle = with_devices("echo ran", devices);
        let ended = bundle.script(&format!("{DEVICES} $RUN || /bin/ip addr show dev one"));
        assert!(ended.stderr.contains(words), "{words}: {ended:?}");
        assert!(ended.stdout.contains("inet 10.9.8.7/24"), "{ended:?}");
        bundle.assert_nothing_is_left();
    }
    let bundle = with_devices("true", json!({"one": {}})).with(|config| {
        share_namespace(config, "network");
    });
    bundle.assert_refused(
        "linux.netDevices.one: unable to move network devices without a NET namespace",
    );
}
