//! Snapshots that earlier versions have taken: every later one must be able to go on from them.
//!
//! In the tree are a state file and the memory, compressed, for each number of the format. They are
//! never changed. For a new number, `UPDATE_GOLDEN=1 cargo test -p vmm golden` takes another, on
//! whatever host; what of it depends on the host's processor is left out.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use vmm::snapshot::file::{FORMAT, Kind};

use crate::damaged::Copy;
use crate::runner::Machine;
use crate::snapshot::{COUNTER, counting, snapshot_beyond, wait_ready};

const DISK_BYTES: u64 = 1 << 20;

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

/// Takes a snapshot for the tree.
fn make(folder: &Path) {
    let mut machine = counting();
    let disk = machine.path("disk");
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    machine.spec["disks"] = json!([{"path": disk, "serial": "golden"}]);
    machine.spec["vsock"] = json!({"cid": 3, "path": machine.path("vsock")});
    let running = machine.start();
    wait_ready(&running);
    let snapshot = snapshot_beyond(&running, "golden", 1000);
    let copy = Copy::of(&snapshot);
    let state = copy.line(2);
    let kept = |msr: &&Value| MSRS.contains(&msr[0].as_u64().unwrap());
    let msrs = state["processors"][0]["msrs"].as_array().unwrap();
    let msrs: Vec<_> = msrs.iter().filter(kept).cloned().collect();
    for (pointer, value) in [
        ("/machine/boot/kernel", json!("kernel")),
        ("/machine/disks/0/path", json!("disk")),
        ("/machine/vsock/path", json!("vsock")),
        // Long mode, with what the boot protocol asks for.
        (
            "/processors/0/cpuid",
            json!([
                [1, 0, 0, 0, 0, 0, 0x0700_8379],
                [0x8000_0001_u32, 0, 0, 0, 0, 0, 0x2010_0800],
            ]),
        ),
        ("/processors/0/msrs", json!(msrs)),
        ("/processors/0/tsc_khz", Value::Null),
    ] {
        copy.set(2, pointer, &value);
    }
    fs::create_dir(folder).unwrap();
    fs::copy(copy.folder().join("state"), folder.join("state")).unwrap();
    let mut memory = File::open(copy.folder().join("memory")).unwrap();
    let file = File::create(folder.join("memory.gz")).unwrap();
    let mut compressor = GzEncoder::new(file, Compression::best());
    io::copy(&mut memory, &mut compressor).unwrap();
    compressor.finish().unwrap();
}

#[test]
fn every_format_that_ever_was_is_restored() {
    let newest = folder(FORMAT);
    if std::env::var_os("UPDATE_GOLDEN").is_some() && !newest.exists() {
        make(&newest);
    }
    for format in 1..=FORMAT {
        let unpacked = tempfile::tempdir().unwrap();
        fs::copy(folder(format).join("state"), unpacked.path().join("state")).unwrap();
        let memory = File::open(folder(format).join("memory.gz")).unwrap();
        let mut file = File::create(unpacked.path().join("memory")).unwrap();
        io::copy(&mut GzDecoder::new(memory), &mut file).unwrap();
        let disk = unpacked.path().join("disk");
        File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();

        let mut machine = Machine::restored(&[unpacked.path()]);
        machine.spec["disks"] = json!({"disk0": {"path": disk}});
        machine.spec["vsock"] = json!({"path": unpacked.path().join("vsock")});
        machine.spec["paused"] = json!(true);
        let running = machine.start();
        let still = running.snapshot("still", Kind::Full).unwrap();
        assert!(still.long(COUNTER) > 1000, "format {format}");
        running.control().ask(&vmm::control::Request::Resume {});
        snapshot_beyond(&running, "later", still.long(COUNTER));
    }
}
