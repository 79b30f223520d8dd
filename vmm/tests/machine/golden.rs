//! Snapshots that earlier versions have taken: every later one must be able to go on from them.
//!
//! In the tree are a state file and the memory, compressed, for each number of the format. They are
//! never changed. For a new number, `UPDATE_GOLDEN=1 cargo test -p vmm golden` takes another, on
//! whatever host; what of it depends on the host's processor is left out. Up to format 3 the guest
//! counts; from 4 on it has two processors and all kinds of devices on PCI, of which it drives a
//! disk that was attached while it ran.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm::control::{Request, Response};
use vmm::guest_status;
use vmm::snapshot::file::{FORMAT, Kind};

use crate::damaged::Copy;
use crate::guest::Guest;
use crate::network::in_network;
use crate::runner::Machine;
use crate::snapshot::{COUNTER, guest, snapshot_beyond, wait_ready, written, written_again};

const DISK_BYTES: u64 = 1 << 20;

/// The first format whose guest drives devices.
const DRIVEN: u32 = 4;

/// The place of the disk that is attached: behind the network interface, vsock, rng, balloon and mem.
const SLOT: u32 = 6;

/// How many sectors the guest writes at a time.
const REQUESTS: u16 = 8;

/// Model-specific registers that every processor has.
const MSRS: [u64; 11] = [
    0x10,
    0x174,
    0x175,
    0x176,
    0x277,
    0x2ff,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

fn folder(format: u32) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/golden");
    tests.join(format.to_string())
}

/// Writes to its disk, is ready, and does it again once it has read a byte.
fn driving() -> Guest {
    let started = guest().start_others(0x2000, 1);
    let (guest, kick) = written(started, REQUESTS, Some(SLOT));
    let ready = guest.out_long(guest_status::PORT, guest_status::READY);
    written_again(ready.read_serial(), REQUESTS, kick).exit(6)
}

/// Takes a snapshot for the tree.
fn make(folder: &Path) {
    let mut machine = Machine::new(driving());
    machine.spec["transport"] = json!("pci");
    machine.spec["cpus"] = json!({"count": 2});
    machine.spec["memory"] = json!({"size_mib": 16, "max_mib": 32});
    machine.spec["nets"] = json!([{"tap": "tap0", "mtu": 1500, "limits": {"send_bps": 1_000_000}}]);
    machine.spec["vsock"] = json!({"cid": 3, "path": machine.path("vsock")});
    let disk = machine.path("disk");
    let running = machine.start();
    let request = Request::AttachDisk {
        disk: serde_json::from_value(json!({"path": "disk", "serial": "golden"})).unwrap(),
    };
    let mut client = running.control();
    client.send_with(&request, &[new_disk(&disk)]);
    assert!(matches!(client.answer(), Some(Response::Attached { .. })));
    wait_ready(&running);
    let copy = Copy::of(&running.snapshot("golden", Kind::Full).unwrap());
    let state = copy.line(2);
    copy.set(2, "/machine/boot/kernel", &json!("kernel"));
    copy.set(2, "/machine/vsock/path", &json!("vsock"));
    for (id, processor) in state["processors"].as_array().unwrap().iter().enumerate() {
        let kept = |msr: &&Value| MSRS.contains(&msr[0].as_u64().unwrap());
        let msrs = processor["msrs"].as_array().unwrap();
        let msrs: Vec<_> = msrs.iter().filter(kept).cloned().collect();
        // Long mode, with what the boot protocol asks for.
        let features = json!([
            [1, 0, 0, 0, 0, 0, 0x0700_8379],
            [0x8000_0001_u32, 0, 0, 0, 0, 0, 0x2010_0800],
        ]);
        copy.set(2, &format!("/processors/{id}/cpuid"), &features);
        copy.set(2, &format!("/processors/{id}/msrs"), &json!(msrs));
        copy.set(2, &format!("/processors/{id}/tsc_khz"), &Value::Null);
    }
    fs::create_dir(folder).unwrap();
    fs::copy(copy.folder().join("state"), folder.join("state")).unwrap();
    let mut memory = File::open(copy.folder().join("memory")).unwrap();
    let file = File::create(folder.join("memory.gz")).unwrap();
    let mut compressor = GzEncoder::new(file, Compression::best());
    io::copy(&mut memory, &mut compressor).unwrap();
    compressor.finish().unwrap();
}

fn new_disk(path: &Path) -> File {
    let disk = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    let disk = disk.unwrap();
    disk.set_len(DISK_BYTES).unwrap();
    disk
}

/// The snapshot of the tree, with a disk beside it.
fn unpack(format: u32) -> TempDir {
    let unpacked = tempfile::tempdir().unwrap();
    fs::copy(folder(format).join("state"), unpacked.path().join("state")).unwrap();
    let memory = File::open(folder(format).join("memory.gz")).unwrap();
    let mut file = File::create(unpacked.path().join("memory")).unwrap();
    io::copy(&mut GzDecoder::new(memory), &mut file).unwrap();
    new_disk(&unpacked.path().join("disk"));
    unpacked
}

/// A machine from there.
fn restored(unpacked: &Path) -> Machine {
    let mut machine = Machine::restored(&[unpacked]);
    machine.spec["disks"] = json!({"disk0": {"path": unpacked.join("disk")}});
    machine.spec["vsock"] = json!({"path": unpacked.join("vsock")});
    machine
}

#[test]
fn guests_of_early_formats_go_on_counting() {
    for format in 1..DRIVEN {
        let unpacked = unpack(format);
        let mut machine = restored(unpacked.path());
        machine.spec["paused"] = json!(true);
        let running = machine.start();
        let still = running.snapshot("still", Kind::Full).unwrap();
        assert!(still.long(COUNTER) > 1000, "format {format}");
        running.control().ask(&Request::Resume {});
        snapshot_beyond(&running, "later", still.long(COUNTER));
    }
}

#[test]
fn guests_of_later_formats_go_on_driving_their_devices() {
    in_network(|| {
        let newest = folder(FORMAT);
        if std::env::var_os("UPDATE_GOLDEN").is_some() && !newest.exists() {
            make(&newest);
        }
        for format in DRIVEN..=FORMAT {
            drive(format);
        }
    });
}

fn drive(format: u32) {
    let unpacked = unpack(format);
    let mut machine = restored(unpacked.path());
    let mut terminal = machine.put_at_a_terminal();
    let running = machine.start();
    let mut client = running.control();
    let Response::Stats { stats } = client.ask(&Request::Stats {}) else {
        panic!("no statistics");
    };
    let names: Vec<_> = stats.devices.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["disk0", "net0", "vsock", "rng", "balloon", "mem"]);
    terminal.write_all(b"x").unwrap();
    let ended = running.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(6), ""));
    let mut disk = File::open(unpacked.path().join("disk")).unwrap();
    let mut sectors = [0; 512 * REQUESTS as usize];
    disk.read_exact(&mut sectors).unwrap();
    assert_eq!(sectors, [0x5a; 512 * REQUESTS as usize]);
}
