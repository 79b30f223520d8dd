//! A stock kernel that runs out of memory and has some in its balloon.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::Host;

use super::{Machine, Network, request, spec};

/// What the balloon is to leave of what is available, and what the guest then takes of it, in MiB.
const LEFT_MIB: u64 = 40;
const TAKEN_MIB: u64 = 100;

/// Waits until little is available and takes more than that, as `tail` does until its input ends.
const WORKLOAD: &str = r#"
available() { $b awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo; }
echo "available $(available) MiB"
while [ $(available) -gt MOST ]; do $b sleep 0.2; done
echo "squeezed to $(available) MiB"
$b head -c TAKENm /dev/zero | $b tail -c TAKENm >/dev/null && echo "survived"
echo "killed $($b awk '/^oom_kill / {print $2}' /proc/vmstat)"
while true; do $b sleep 1000; done
"#;

/// The number in a line of the guest's.
fn number(line: &str) -> u64 {
    let number = line.split(' ').find_map(|word| word.parse().ok());
    number.unwrap_or_else(|| panic!("no number in `{line}`"))
}

pub(super) fn deflated(_host: &Host) {
    let folder = TempDir::new().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), [0; 1 << 16]).expect("there is room");
    let network = Network::new("balloon");
    // It comes near to what it is to leave, give or take what the kernel does in the meantime.
    let workload = WORKLOAD.replace("MOST", &(LEFT_MIB + 10).to_string());
    let workload = workload.replace("TAKEN", &TAKEN_MIB.to_string());
    let spec = spec(folder.path(), "mmio", &workload);
    let mut machine = Machine::start(&network, &path("one"), &spec, &[]);
    let available = number(&machine.wait_for("available", 1)[0]);
    let target = available - LEFT_MIB;
    let control = path("one/control");
    let answer = request(
        &control,
        &json!({"action": "balloon", "target_mib": target}),
    );
    assert_eq!(answer["result"], "done", "{answer}");
    let squeezed = number(&machine.wait_for("squeezed", 1)[0]);
    assert!(squeezed < TAKEN_MIB, "{squeezed} MiB are left");

    assert_eq!(machine.wait_for("killed", 1), ["killed 0"]);
    machine.wait_for("survived", 1);
    let stats = request(&control, &json!({"action": "stats"}));
    let actual = stats.pointer("/stats/balloon/actual_bytes");
    let actual = actual.and_then(Value::as_u64).expect("it has a balloon");
    assert!(
        actual >> 20 < target - (TAKEN_MIB - squeezed) / 2,
        "{stats}"
    );
}
