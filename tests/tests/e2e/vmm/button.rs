//! A stock kernel and the power button.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::Host;

use super::{Machine, Network, ask, press, spec};

/// Switches the machine off at the first event of the button, which is the only input device.
const INIT: &str = r#"
exec 3</dev/input/event0
while true; do
    echo "at $($b cat /sys/class/input/event0/device/name)"
    $b sleep 0.2
done &
$b dd bs=24 count=1 <&3 >/dev/null 2>&1 && $b poweroff -f
"#;

/// The machine has heard of a press, and of nothing else.
fn assert_off(machine: &mut Machine, exit: &Path) {
    press(&machine.folder.join("control"));
    assert_eq!(machine.end().code(), Some(0), "{}", machine.said());
    let status = fs::read(exit).expect("it says how it ended");
    let status: Value = serde_json::from_slice(&status).expect("a status is JSON");
    assert_eq!(status["reason"], "power_off", "{status}");
}

pub(super) fn heard(_host: &Host) {
    let folder = TempDir::new().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), [0; 1 << 16]).expect("there is room");
    let network = Network::new("button");
    let mut spec = spec(folder.path(), "mmio", INIT);
    spec["exit_status"] = json!(path("exit-one"));
    let mut one = Machine::start(&network, &path("one"), &spec, &[]);
    one.wait_for("at Power Button", 1);
    let snapshot = path("snapshot");
    let snapshot = snapshot.to_str().expect("it is a plain path");
    ask(&network, &one, &["--snapshot", snapshot]);
    assert_off(&mut one, &path("exit-one"));

    let changes = json!({
        "console": {"path": path("two/console")},
        "control": path("two/control"),
        "exit_status": path("exit-two"),
    });
    let mut two = Machine::start(&network, &path("two"), &changes, &["--restore", snapshot]);
    two.wait_for("at Power Button", 1);
    assert_off(&mut two, &path("exit-two"));
}
