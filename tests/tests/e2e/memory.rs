//! What only virtual machines have: clones that go on from memory, and are machines of their own before
//! anything of the workload runs.

use tests::{Host, Kind};

use crate::HostTest;
use crate::lifecycle::{await_log, stats};
use crate::origins::{assert_is_time, now_s};
use crate::process::start_script;

pub(crate) const TESTS: &[(&str, HostTest)] = &[(
    "a_clone_of_a_paused_machine_is_itself_before_its_workload_goes_on",
    of_paused,
)];

/// Counts its turns without a pause, and notes at which of them it finds itself under another name, and
/// when.
const WORKLOAD: &str = "n=0; echo ready; while :; do n=$((n+1)); read name </proc/sys/kernel/hostname; \
    [ $name = \"$last\" ] || echo $(date +%s) $n $name >>/names; last=$name; done";

/// What the machine that is cloned has for its id.
const MACHINE_ID: &str = "00112233445566778899aabbccddeeff";

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
    // The clones have a clock to set right, beside the time that passes until they go on.
    shell(host, name, "date -s @$(($(date +%s) - 3600))");
    host.hostctl(&["pause", name]).ok();
    host.hostctl(&["snapshot", "create", "--stateful", name, "kept"])
        .ok();
    let mut turns = Vec::new();
    let mut keys = Vec::new();
    let mut ids = vec![MACHINE_ID.to_owned()];
    // The one that has to boot is first: the others then go on some seconds after they were kept.
    for (clone, memory) in [("held-1", false), ("held-2", true), ("held-3", true)] {
        let before = now_s();
        let from_files: &[&str] = if memory { &[] } else { &["--no-memory"] };
        let copy = [&["copy", "--start"], from_files, &["held/kept", clone]].concat();
        host.hostctl(&copy).ok();
        let key = shell(host, clone, "cat /etc/ssh/ssh_host_ed25519_key");
        assert!(key.starts_with("ed25519 "), "{key}");
        keys.push(key);
        let id = shell(host, clone, "cat /etc/machine-id").trim().to_owned();
        let digits = id.bytes().filter(u8::is_ascii_hexdigit).count();
        assert_eq!((id.len(), digits), (32, 32), "{id}");
        ids.push(id);
        if memory {
            assert_eq!(plugged_mib(host, clone), 128);
            assert_eq!(shell(host, clone, MEMORY), total);
            let names = shell(
                host,
                clone,
                &format!("until grep {clone}$ /names; do :; done"),
            );
            let (time, turn) = names.split_once(' ').unwrap_or_default();
            assert_is_time(time, before..=now_s());
            turns.push(turn.split(' ').next().unwrap_or_default().to_owned());
        }
        if clone == "held-2" {
            host.hostctl(&["update", "--memory", "256M", clone]).ok();
            assert_eq!(plugged_mib(host, clone), 0);
        }
        host.hostctl(&["rm", "--force", clone]).ok();
    }
    // Not one turn was made under the old name, or it would not be the same one in both.
    assert_eq!(turns[0], turns[1]);
    for (mut all, count) in [(keys, 3), (ids, 4)] {
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count, "{all:?}");
    }

    host.hostctl(&["resume", name]).ok();
    assert_eq!(shell(host, name, "cat /etc/ssh/*"), "old\n");
    assert_eq!(shell(host, name, "cat /etc/machine-id").trim(), MACHINE_ID);
    host.hostctl(&["rm", "--force", name]).ok();
}
