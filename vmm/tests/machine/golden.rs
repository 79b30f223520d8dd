//! Snapshots that earlier versions have taken: every later one must be able to go on from them.
//!
//! In the tree are a state file and the memory, compressed, for each number of the format. They are
//! never changed. For a new number, `UPDATE_GOLDEN=1 cargo test -p vmm golden` takes others, on
//! whatever host; what of them depends on the host's processor is left out. Up to format 3 the guest
//! counts; from 4 on it has two processors and all kinds of devices on PCI, of which it drives a
//! disk that was attached while it ran. In `N-mmio` are a full one and a difference to it, of a guest
//! that drives a disk by registers in memory and changes an image (`pmem`), before and in between.

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

fn folder(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/golden");
    tests.join(name)
}

/// Writes to its disk, is ready, and does it again once it has read a byte.
fn driving() -> Guest {
    let started = guest().start_others(0x2000, 1);
    let (guest, kick) = written(started, REQUESTS, Some(SLOT));
    let ready = guest.out_long(guest_status::PORT, guest_status::READY);
    written_again(ready.read_serial(), 1, REQUESTS, kick).exit(6)
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
    keep(&copy, folder);
}

/// Puts a snapshot into the tree, without what is the host's.
fn keep(copy: &Copy, folder: &Path) {
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
    fs::create_dir_all(folder).unwrap();
    fs::copy(copy.folder().join("state"), folder.join("state")).unwrap();
    let mut memory = File::open(copy.folder().join("memory")).unwrap();
    let file = File::create(folder.join("memory.gz")).unwrap();
    let mut compressor = GzEncoder::new(file, Compression::best());
    io::copy(&mut memory, &mut compressor).unwrap();
    compressor.finish().unwrap();
}

/// Behind the guest's 16 MiB.
const IMAGE: u32 = 16 << 20;

/// Writes to its disk and to its image before a full snapshot, before a difference, and after both; and
/// says what it finds in the image.
fn driving_by_registers() -> Guest {
    let (guest, kick) = written(guest(), REQUESTS, None);
    let ready = guest
        .store_long(IMAGE + 0x1000, u32::from_le_bytes(*b"full"))
        .out_long(guest_status::PORT, guest_status::READY)
        .read_serial();
    let changed = written_again(ready, 1, REQUESTS, kick)
        .store_long(IMAGE + 0x2000, u32::from_le_bytes(*b"diff"))
        .print(".")
        .read_serial();
    written_again(changed, 2, REQUESTS, kick)
        .print_long(IMAGE)
        .print_long(IMAGE + 0x1000)
        .print_long(IMAGE + 0x2000)
        .exit(6)
}

/// What it finds there.
const FOUND: &[u8; 12] = b"basefulldiff";

fn new_image(path: &Path) {
    let mut image = vec![0xa7; 1 << 16];
    image[..4].copy_from_slice(&FOUND[..4]);
    fs::write(path, image).unwrap();
}

/// Takes a full snapshot and a difference for the tree.
fn make_by_registers(folder: &Path) {
    let mut machine = Machine::new(driving_by_registers());
    let [disk, image] = ["disk", "image"].map(|name| machine.path(name));
    new_disk(&disk);
    new_image(&image);
    machine.spec["memory"]["track_dirty"] = json!(true);
    machine.spec["disks"] = json!([{"path": disk, "serial": "golden"}]);
    machine.spec["pmem"] = json!([{"path": image}]);
    machine.spec["vsock"] = json!({"cid": 3, "path": machine.path("vsock")});
    let mut terminal = machine.put_at_a_terminal();
    let running = machine.start();
    wait_ready(&running);
    for (name, kind) in [("full", Kind::Full), ("diff", Kind::Diff)] {
        if kind == Kind::Diff {
            go_on(&mut terminal);
        }
        let copy = Copy::of(&running.snapshot(name, kind).unwrap());
        copy.set(2, "/machine/disks/0/path", &json!("disk"));
        copy.set(2, "/machine/pmem/0/path", &json!("image"));
        keep(&copy, &folder.join(name));
    }
}

/// Has that guest write for the second time.
fn go_on(terminal: &mut File) {
    terminal.write_all(b"x").unwrap();
    let mut said = [0];
    terminal.read_exact(&mut said).unwrap();
    assert_eq!(&said, b".");
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

/// A snapshot of the tree, with a disk beside it.
fn unpack(name: &str) -> TempDir {
    let unpacked = tempfile::tempdir().unwrap();
    fs::copy(folder(name).join("state"), unpacked.path().join("state")).unwrap();
    let memory = File::open(folder(name).join("memory.gz")).unwrap();
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
        let unpacked = unpack(&format.to_string());
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
        let newest = folder(&FORMAT.to_string());
        if std::env::var_os("UPDATE_GOLDEN").is_some() && !newest.exists() {
            make(&newest);
        }
        for format in DRIVEN..=FORMAT {
            drive(format);
        }
    });
}

fn drive(format: u32) {
    let unpacked = unpack(&format.to_string());
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
    assert_written(unpacked.path());
}

/// The guest has written to the disk that it was given.
fn assert_written(unpacked: &Path) {
    let mut disk = File::open(unpacked.join("disk")).unwrap();
    let mut sectors = [0; 512 * REQUESTS as usize];
    disk.read_exact(&mut sectors).unwrap();
    assert_eq!(sectors, [0x5a; 512 * REQUESTS as usize]);
}

#[test]
fn guests_go_on_from_differences_with_their_images_and_queues() {
    let newest = folder(&format!("{FORMAT}-mmio"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() && !newest.exists() {
        make_by_registers(&newest);
    }
    for format in DRIVEN..=FORMAT {
        let [full, diff] = ["full", "diff"].map(|kind| unpack(&format!("{format}-mmio/{kind}")));
        drive_by_registers(&[full.path()]);
        drive_by_registers(&[full.path(), diff.path()]);
    }
}

fn drive_by_registers(snapshots: &[&Path]) {
    let newest = snapshots.last().unwrap();
    let state = fs::read_to_string(newest.join("state")).unwrap();
    let mut lines = state.lines().skip(1);
    let [header, state] = [(); 2].map(|()| lines.next().unwrap());
    let [header, state] = [header, state].map(|line| serde_json::from_str::<Value>(line).unwrap());
    let is_full = snapshots.len() == 1;
    assert_eq!(
        header["kind"],
        json!(if is_full { Kind::Full } else { Kind::Diff })
    );
    let queue = &state["devices"]["virtio"][0]["transport"]["queues"][0];
    assert_eq!(queue["ready"], json!(true));

    new_image(&newest.join("image"));
    let mut machine = Machine::restored(snapshots);
    machine.spec["disks"] = json!({"disk0": {"path": newest.join("disk")}});
    machine.spec["pmem"] = json!({"pmem0": {"path": newest.join("image")}});
    machine.spec["vsock"] = json!({"path": newest.join("vsock")});
    let mut terminal = machine.put_at_a_terminal();
    let running = machine.start();
    wait_ready(&running);
    if is_full {
        go_on(&mut terminal);
    }
    terminal.write_all(b"x").unwrap();
    let ended = running.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(6), ""));
    let mut found = [0; FOUND.len()];
    terminal.read_exact(&mut found).unwrap();
    assert_eq!(&found, FOUND);
    assert_written(newest);
}
