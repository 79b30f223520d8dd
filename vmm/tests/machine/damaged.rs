//! Snapshots that somebody has damaged, or made up.

use std::fs::{self, File};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vmm::snapshot::file::Kind;

use crate::runner::{Machine, Snapshot};
use crate::snapshot::{counting, wait_ready};

/// A copy of a snapshot's files, to be damaged.
pub(crate) struct Copy(TempDir);

impl Copy {
    pub(crate) fn of(snapshot: &Snapshot) -> Copy {
        let folder = tempfile::tempdir().unwrap();
        for name in ["state", "memory"] {
            fs::copy(snapshot.folder.join(name), folder.path().join(name)).unwrap();
        }
        Copy(folder)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }

    fn text(&self) -> String {
        fs::read_to_string(self.folder().join("state")).unwrap()
    }

    fn write(&self, text: &str) {
        fs::write(self.folder().join("state"), text).unwrap();
    }

    /// The JSON of a line.
    pub(crate) fn line(&self, line: usize) -> Value {
        serde_json::from_str(self.text().lines().nth(line).unwrap()).unwrap()
    }

    /// Sets what `pointer` names in line `line`, and makes the checksum fit.
    pub(crate) fn set(&self, line: usize, pointer: &str, new: &Value) {
        let mut value = self.line(line);
        let (parent, last) = pointer.rsplit_once('/').unwrap();
        let parent = value.pointer_mut(parent).unwrap();
        match parent.as_array_mut() {
            Some(list) => list[last.parse::<usize>().unwrap()] = new.clone(),
            None => parent[last] = new.clone(),
        }
        let text = self.text();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines[line] = value.to_string();
        let text = format!("{}\n{}\n{}\n", lines[0], lines[1], lines[2]);
        let digest = Sha256::digest(&text);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        self.write(&format!("{text}sha256 {digest}\n"));
    }

    fn refusal(&self) -> String {
        let ended = Machine::restored(&[self.folder()]).run();
        assert_eq!(ended.code, Some(125), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        ended.stderr
    }
}

/// A snapshot of a machine with two devices, which has ended. Its files are the machine's.
fn with_snapshot(test: impl FnOnce(&Snapshot)) {
    let mut machine = counting();
    machine.spec["vsock"] = json!({"cid": 3, "path": machine.path("vsock")});
    let mut original = machine.start();
    wait_ready(&original);
    let snapshot = original.snapshot("full", Kind::Full).unwrap();
    original.end();
    test(&snapshot);
}

#[test]
fn a_file_that_was_damaged_is_refused_and_says_how() {
    type Damage = fn(&Copy);
    let table: &[(&str, Damage)] = &[
        ("not the state file", |copy| copy.write("")),
        ("not the state file", |copy| copy.write("hostd-vmm\n")),
        ("checksum is wrong", |copy| {
            let text = copy.text();
            copy.write(&text[..text.len() / 2]);
        }),
        ("checksum is wrong", |copy| copy.write(&(copy.text() + "x"))),
        ("checksum is wrong", |copy| {
            let text = copy.text().replace("\"guest_ns\":", "\"guest_ns\":1");
            copy.write(&text);
        }),
        ("of format 9, written by hostd-vmm 7.0.0; this", |copy| {
            let header = r#"{"format":9,"vmm":"7.0.0","what":"is this"}"#;
            copy.write(&format!("hostd-vmm snapshot\n{header}\nwho knows"));
        }),
        ("is not that of snapshot", |copy| {
            let memory = File::options()
                .write(true)
                .open(copy.folder().join("memory"));
            memory.unwrap().set_len(16 << 20).unwrap();
        }),
    ];
    with_snapshot(|snapshot| {
        for (want, damage) in table {
            let copy = Copy::of(snapshot);
            damage(&copy);
            let said = copy.refusal();
            assert!(said.contains(want), "{want}: {said}");
        }
        // Without damage it is one.
        let copy = Copy::of(snapshot);
        Machine::restored(&[copy.folder()]).start().control();
    });
}

#[test]
fn a_header_that_cannot_be_is_refused_and_says_why() {
    with_snapshot(|snapshot| {
        for (pointer, new, want) in [
            ("/x", json!(1), "unknown field `x`"),
            ("/arch", json!("pdp11"), "a machine of another kind"),
            ("/id", json!("0".repeat(32)), "is not that of snapshot"),
            ("/id", json!("../../etc"), "32 hexadecimal digits"),
            ("/kind", json!("diff"), "name the full one"),
            ("/format", json!(0), "is of format 0"),
        ] {
            let copy = Copy::of(snapshot);
            copy.set(1, pointer, &new);
            let said = copy.refusal();
            assert!(said.contains(want), "{want}: {said}");
        }
    });
}

/// Refuses a state in which `pointer` names something else.
fn assert_refused(table: &[(&str, Value, &str)]) {
    with_snapshot(|snapshot| {
        for (pointer, new, want) in table {
            let copy = Copy::of(snapshot);
            copy.set(2, pointer, new);
            let said = copy.refusal();
            assert!(said.contains(want), "{want}: {said}");
        }
    });
}

#[test]
fn a_machine_that_cannot_be_is_refused_and_says_why() {
    let virtio = "/devices/virtio/0";
    let next_port = format!("{virtio}/transport/device/next_port");
    let target_pages = "/devices/virtio/2/transport/device/target_pages".to_owned();
    assert_refused(&[
        ("/devices/x", json!(1), "unknown field `x`"),
        (
            "/machine/memory/size_mib",
            json!(17),
            "does not fit a machine",
        ),
        (
            "/memory/regions/0/bytes",
            json!(1_u64 << 40),
            "is not that of snapshot",
        ),
        (
            "/machine/cpus/count",
            json!(2),
            "its number of processors is 1; that must be 2",
        ),
        (
            "/machine/rng",
            json!(false),
            "its number of devices is 3; that must be 2",
        ),
        (
            &format!("{virtio}/name"),
            json!("disk0"),
            "its name is disk0; that must be vsock",
        ),
        (
            &format!("{virtio}/transport/status"),
            json!(5),
            "device `vsock` cannot become",
        ),
        (&next_port, json!(1), "its next port is 1"),
        (
            &target_pages,
            json!(u32::MAX),
            "its target is 4294967295; that must be 4096 pages at most",
        ),
    ]);
}

/// One that snapshots keep (KVM's own) and no host has.
const NO_MSR: u32 = 0x4b56_4dff;

#[test]
fn a_register_that_the_host_lacks_matters_if_the_guest_has_used_it() {
    with_snapshot(|snapshot| {
        let copy = Copy::of(snapshot);
        let msrs = copy.line(2)["processors"][0]["msrs"].clone();
        let with = |value: u64| {
            let mut msrs = msrs.as_array().unwrap().clone();
            msrs.push(json!([NO_MSR, value]));
            copy.set(2, "/processors/0/msrs", &json!(msrs));
        };
        with(5);
        let said = copy.refusal();
        assert!(said.contains("register 0x4b564dff"), "{said}");
        with(0);
        wait_ready(&Machine::restored(&[copy.folder()]).start());
    });
}

#[test]
fn a_processor_or_chip_that_cannot_be_is_refused_and_says_why() {
    assert_refused(&[
        (
            "/processors/0/registers",
            json!("00"),
            "not as long as the structure",
        ),
        (
            "/processors/0/extended",
            json!("00"),
            "KVM cannot set extended state",
        ),
        (
            "/processors/0/special_registers",
            json!("f".repeat(2 * 312)),
            "KVM cannot set system registers",
        ),
        (
            "/processors/0/cpuid/1",
            json!([1, 0, 0, 0, 0, u32::MAX, 0]),
            "lacks features that the guest has seen",
        ),
        (
            "/devices/io_apic/redirections",
            json!([]),
            "its number of pins is 0",
        ),
        (
            "/devices/serial/received",
            json!("00".repeat(100)),
            "its input is 100 bytes",
        ),
    ]);
}
