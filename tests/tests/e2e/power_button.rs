//! The power button of a VM: a press ends the workload as `stop` does, whatever the machine has come from.

use tests::{Host, Kind};

use crate::HostTest;
use crate::lifecycle::await_log;
use crate::process::start_script;
use crate::vmm::press;

pub(crate) const TESTS: &[(&str, HostTest)] = &[
    (
        "a_press_of_the_button_alone_ends_a_workload_cleanly",
        pressed,
    ),
    (
        "a_stop_presses_the_button_where_the_agent_cannot_be_asked",
        deaf_agent,
    ),
];

/// Ends with a status of its own when it is asked to, and with no other.
const WORKLOAD: &str = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done";

/// The workload has had its way.
fn assert_clean(host: &Host, name: &str) {
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    assert_eq!(instance["state"], "stopped", "{instance:#}");
    assert_eq!(instance["exit"]["code"], 5, "{instance:#}");
}

fn pressed(host: &Host) {
    let name = "pressed";
    start_script(host, Kind::Vm, name, &[], WORKLOAD);
    await_log(host, name, "ready");
    host.hostctl(&["snapshot", "create", "--stateful", name, "kept"])
        .ok();
    let control = host.run_of(name).join("vmm.sock");
    press(&control);
    host.hostctl(&["wait", name]).exits(5);
    assert_clean(host, name);
    assert!(host.hostctl(&["logs", name]).ok().ends_with("bye\n"));

    // Nobody has asked for that end.
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    assert_eq!(instance["reason"], "exited", "{instance:#}");

    host.hostctl(&["snapshot", "restore", name, "kept"]).ok();
    host.hostctl(&["start", name]).ok();
    press(&control);
    host.hostctl(&["wait", name]).exits(5);
    assert_clean(host, name);
    host.hostctl(&["rm", name]).ok();
}

/// Takes the guest's side of vsock away, by which the agent is reached, once nobody needs it any more.
const DEAFEN: &str = "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport; \
    for device in virtio*; do echo $device >unbind; done";

fn deaf_agent(host: &Host) {
    let name = "deaf";
    start_script(host, Kind::Vm, name, &[], WORKLOAD);
    await_log(host, name, "ready");
    // What it has to say is lost with the way that it would take.
    host.hostctl(&["exec", name, "sh", "-c", DEAFEN]);
    // Long enough that nothing is killed.
    host.hostctl(&["stop", "--time", "600", name]).ok();
    assert_clean(host, name);
    host.hostctl(&["rm", name]).ok();
}
