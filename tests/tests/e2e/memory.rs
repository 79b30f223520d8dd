//! What only virtual machines have: clones that go on from memory, and are machines of their own before
//! anything of the workload runs.

use tests::{Host, Kind};

use crate::HostTest;
use crate::lifecycle::{await_log, stats};
use crate::process::start_script;

pub(crate) const TESTS: &[(&str, HostTest)] = &[(
    "a_clone_of_a_paused_machine_is_itself_before_its_workload_goes_on",
    of_paused,
)];

/// Counts its turns without a pause, and notes at which of them it finds itself under another name.
const WORKLOAD: &str = "n=0; echo ready; while :; do n=$((n+1)); read name </proc/sys/kernel/hostname; \
    [ $name = \"$last\" ] || echo $n $name >>/names; last=$name; done";

/// Host keys, and a program that makes others in the way of ssh-keygen.
const KEYS: &str = r#"
mkdir /etc/ssh
echo old >/etc/ssh/ssh_host_ed25519_key
echo 00112233445566778899aabbccddeeff >/etc/machine-id
cat >/usr/bin/ssh-keygen <<'END'
#!/bin/sh
for file; do :; done
echo "$3 $(head -c 16 /dev/urandom | md5sum)" >$file
echo public >$file.pub
END
chmod 755 /usr/bin/ssh-keygen
# A paused guest does not write its cache to its disk.
sync
"#;

#[track_caller]
fn shell(host: &Host, name: &str, script: &str) -> String {
    host.hostctl(&["exec", name, "sh", "-c", script]).ok()
}

/// What the guest has of memory, as its kernel sees it.
const MEMORY: &str = "grep MemTotal /proc/meminfo";

/// What the guest has plugged in beside what it started with.
fn plugged_mib(host: &Host, name: &str) -> u64 {
    let mem = &stats(host, name)["vm"]["devices"]["mem"]["mem"];
    let bytes = mem["plugged_bytes"].as_u64();
    bytes.expect("it can plug memory in") >> 20
}

fn of_paused(host: &Host) {
    let name = "held";
    start_script(host, Kind::Vm, name, &["--memory", "256M"], WORKLOAD);
    await_log(host, name, "ready");
    // What it has plugged in goes with its memory.
    host.hostctl(&["update", "--memory", "384M", name]).ok();
    assert_eq!(plugged_mib(host, name), 128);
    let total = shell(host, name, MEMORY);
    shell(host, name, KEYS);
    host.hostctl(&["pause", name]).ok();
    host.hostctl(&["snapshot", "create", "--stateful", name, "kept"])
        .ok();
    let mut turns = Vec::new();
    let mut keys = Vec::new();
    for (clone, memory) in [("held-1", true), ("held-2", true), ("held-3", false)] {
        let from_files: &[&str] = if memory { &[] } else { &["--no-memory"] };
        let copy = [&["copy", "--start"], from_files, &["held/kept", clone]].concat();
        host.hostctl(&copy).ok();
        let key = shell(host, clone, "cat /etc/ssh/ssh_host_ed25519_key");
        assert!(key.starts_with("ed25519 "), "{key}");
        keys.push(key);
        if memory {
            assert_eq!(plugged_mib(host, clone), 128);
            assert_eq!(shell(host, clone, MEMORY), total);
            let names = shell(
                host,
                clone,
                &format!("until grep {clone}$ /names; do :; done"),
            );
            turns.push(names.split(' ').next().unwrap_or_default().to_owned());
        }
        if clone == "held-1" {
            host.hostctl(&["update", "--memory", "256M", clone]).ok();
            assert_eq!(plugged_mib(host, clone), 0);
        }
        host.hostctl(&["rm", "--force", clone]).ok();
    }
    // Not one turn was made under the old name, or it would not be the same one in both.
    assert_eq!(turns[0], turns[1]);
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 3, "{keys:?}");

    host.hostctl(&["resume", name]).ok();
    assert_eq!(shell(host, name, "cat /etc/ssh/*"), "old\n");
    host.hostctl(&["rm", "--force", name]).ok();
}
