//! Disks of every kind.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::storage::StorageOpenOptions;
use serde_json::{Value, json};
use vmm::control::DiskStats;
use vmm::hotplug::client::attach_disk;

use super::{ALONE, ANSWERS, DATA, REQUESTS, Row, in_every_way, without_io_uring};
use crate::driver::{Place, Queue};
use crate::guest::Guest;
use crate::runner::Machine;

const QUEUE: Queue = Queue(0);
const DISK_BYTES: u64 = 64 << 20;
/// What is discarded and zeroed: 16 sectors from the first on.
const RANGE: u32 = REQUESTS + 0x1000;

/// Requests of a kind, which move this data or concern this range.
type Requests = [(u32, Option<(u32, u32, bool)>)];

const WRITES: (u32, Option<(u32, u32, bool)>) = (1, Some((DATA, 8192, false)));
const READS: (u32, Option<(u32, u32, bool)>) = (0, Some((DATA, 8192, true)));
const FLUSHES: (u32, Option<(u32, u32, bool)>) = (4, None);
const ALL: &Requests = &[
    WRITES,
    READS,
    FLUSHES,
    (11, Some((RANGE, 16, false))),
    (13, Some((RANGE, 16, false))),
];
const READING: &Requests = &[READS, FLUSHES, WRITES];

/// Starts a disk, with the same requests described twice.
fn start(guest: Guest, place: Place, features: u32, requests: &Requests) -> Guest {
    let mut guest = guest
        .set_up_device(place, features, 1, 32)
        .store_long(RANGE + 8, 16);
    let mut chains = Vec::new();
    for (number, (kind, payload)) in (0..).zip(requests) {
        let (header, answer) = (REQUESTS + 16 * number, ANSWERS + number);
        guest = guest.store_long(header, *kind);
        let chain = [Some((header, 16, false)), *payload, Some((answer, 1, true))];
        chains.push(chain.into_iter().flatten().collect::<Vec<_>>());
    }
    let chains: Vec<_> = chains.iter().chain(&chains).map(Vec::as_slice).collect();
    guest.describe(QUEUE, &chains).start_device(place)
}

/// Makes all requests at once, and prints the answers.
fn work(guest: Guest, place: Place, requests: &Requests) -> Guest {
    guest
        .store_long(ANSWERS, u32::MAX)
        .store_long(ANSWERS + 4, 0xff)
        .exchange(place, QUEUE, u16::try_from(requests.len()).unwrap())
        .print_long(ANSWERS)
        .print_long(ANSWERS + 4)
}

fn attach(control: &UnixStream, disk: Value) {
    attach_disk(control, serde_json::from_value(disk).unwrap()).unwrap();
}

/// The configuration of a disk in a new file.
fn in_a_file(folder: &Path) -> Value {
    let path = folder.join("disk");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    json!({"path": path})
}

pub(super) const IN_A_FILE: Row = Row {
    equip: |machine, folder| machine.spec["disks"] = json!([in_a_file(folder)]),
    attach: Some(|control, folder| attach(control, in_a_file(folder))),
    // Flushes, discards, zeroes.
    start: |guest, place| start(guest, place, 1 << 9 | 1 << 13 | 1 << 14, ALL),
    work: |guest, place, _| work(guest, place, ALL),
    said: [&[0; 8]; 2],
    has_worked: |stats| {
        stats.disks[0]
            == DiskStats {
                reads: 1,
                read_bytes: 8192,
                writes: 1,
                written_bytes: 8192,
                flushes: 1,
                zeroes: 2,
                failures: 0,
                throttled: 0,
            }
    },
    ..ALONE
};

#[test]
fn a_disk_in_a_file() {
    in_every_way(&IN_A_FILE);
}

#[test]
fn a_disk_in_a_file_where_there_is_no_io_uring() {
    without_io_uring(|| in_every_way(&IN_A_FILE));
}

fn read_only(folder: &Path) -> Value {
    let mut disk = in_a_file(folder);
    disk["read_only"] = json!(true);
    disk
}

#[test]
fn a_disk_that_is_only_read() {
    in_every_way(&Row {
        equip: |machine, folder| machine.spec["disks"] = json!([read_only(folder)]),
        attach: Some(|control, folder| attach(control, read_only(folder))),
        start: |guest, place| start(guest, place, 1 << 9, READING),
        work: |guest, place, _| work(guest, place, READING),
        // The write fails; there is no fourth request.
        said: [&[0, 0, 1, 0xff, 0xff, 0, 0, 0]; 2],
        has_worked: |stats| {
            let disk = stats.disks[0];
            (disk.reads, disk.flushes, disk.writes, disk.failures) == (1, 1, 0, 1)
        },
        ..ALONE
    });
}

/// The configuration of a disk in a new image on another.
fn in_an_image(folder: &Path) -> Value {
    let [top, base] = ["top", "base"].map(|name| folder.join(name));
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let mut file = File::options();
    let file = file.read(true).write(true).create_new(true).open(&top);
    let options = StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(file.unwrap(), options);
    Qcow2::<imago::file::File>::create_builder(storage.unwrap())
        .size(DISK_BYTES)
        .backing("base".to_owned(), "raw".to_owned())
        .create()
        .unwrap();
    json!({"path": top, "format": "qcow2", "backing": [{"path": base}]})
}

#[test]
fn a_disk_in_an_image_on_another() {
    in_every_way(&Row {
        equip: |machine: &mut Machine, folder| {
            machine.spec["disks"] = json!([in_an_image(folder)]);
        },
        attach: Some(|control, folder| attach(control, in_an_image(folder))),
        ..IN_A_FILE
    });
}
