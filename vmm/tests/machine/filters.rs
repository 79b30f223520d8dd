//! Machines of every kind behind their system call filters, with all that their devices do: what a filter
//! does not allow ends the machine.

use std::fs::{self, File};
use std::thread;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::storage::StorageOpenOptions;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::json;
use vmm::control::{Request, Response};
use vmm::guest_status;
use vmm::snapshot::file::Kind;

use crate::guest::Guest;
use crate::runner::Machine;
use crate::snapshot::{guest, wait_ready};

const DISK_BYTES: u64 = 64 << 20;

/// Where the guest keeps what it tells devices, and what they tell it.
const REQUESTS: u32 = 0x30_0000;
const RANGE: u32 = 0x31_0000;
const ANSWERS: u32 = 0x31_1000;
const DATA: u32 = 0x32_0000;

/// Writes, reads, flushes, discards and zeroes, prints the five answers, and is ready.
fn using_a_disk() -> Guest {
    const FEATURES: u32 = 1 << 9 | 1 << 13 | 1 << 14; // Flushes, discards, zeroes.
    let data = |writable| Some((DATA, 8192, writable));
    let range = Some((RANGE, 16, false));
    let requests = [
        (1, data(false)),
        (0, data(true)),
        (4, None),
        (11, range),
        (13, range),
    ];
    // 16 sectors from the first on.
    let mut guest = guest()
        .set_up_device(FEATURES, 16)
        .store_long(RANGE + 8, 16);
    let mut chains = Vec::new();
    for (number, (kind, payload)) in (0..).zip(requests) {
        let (header, answer) = (REQUESTS + 16 * number, ANSWERS + number);
        guest = guest.store_long(header, kind).store_byte(answer, 0xee);
        let ends = [(header, 16, false), (answer, 1, true)];
        let chain = [Some(ends[0]), payload, Some(ends[1])];
        chains.push(chain.into_iter().flatten().collect::<Vec<_>>());
    }
    let chains: Vec<_> = chains.iter().map(Vec::as_slice).collect();
    guest
        .describe(&chains)
        .make_available(5)
        .start_device()
        .wait_used(5)
        .print_long(ANSWERS)
        .print_long(ANSWERS + 4)
        .out_long(guest_status::PORT, guest_status::READY)
}

const ALL_DONE: [u8; 8] = [0; 8];

/// Has the guest do what it does, asks the machine for what it can be asked, and takes a snapshot.
fn assert_lives(mut machine: Machine, said: &[u8]) {
    machine.spec["memory"]["track_dirty"] = json!(true);
    let running = machine.start();
    wait_ready(&running);
    for (name, kind) in [("full", Kind::Full), ("diff", Kind::Diff)] {
        running.snapshot(name, kind).unwrap();
    }
    let mut client = running.control();
    let answer = client.ask(&Request::Stats {});
    assert!(matches!(answer, Response::Stats { .. }), "{answer:?}");
    assert_eq!(client.ask(&Request::Kill {}), Response::Done {});
    let ended = running.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(137), ""));
    assert_eq!(ended.console, said);
}

fn with_raw_disk() -> Machine {
    let mut machine = Machine::new(using_a_disk());
    let path = machine.path("disk");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    machine.spec["disks"] = json!([{"path": path}]);
    machine
}

#[test]
fn a_machine_with_a_disk_in_a_file() {
    assert_lives(with_raw_disk(), &ALL_DONE);
}

/// As where `kernel.io_uring_disabled` is set. Filters are inherited, and this one is the thread's alone.
#[test]
fn a_machine_where_there_is_no_io_uring() {
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let rules = [(libc::SYS_io_uring_setup, Vec::new())];
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        refused,
        architecture,
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    let test = move || {
        seccompiler::apply_filter(&program).unwrap();
        assert_lives(with_raw_disk(), &ALL_DONE);
    };
    thread::spawn(test).join().unwrap();
}

#[test]
fn a_machine_with_a_disk_in_an_image_on_another() {
    let mut machine = Machine::new(using_a_disk());
    let [top, base] = ["top", "base"].map(|name| machine.path(name));
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
    machine.spec["disks"] = json!([{
        "path": top,
        "format": "qcow2",
        "backing": [{"path": base}],
    }]);
    assert_lives(machine, &ALL_DONE);
}

#[test]
fn a_machine_with_an_image_as_memory() {
    // Behind the guest's 16 MiB.
    const IMAGE: u32 = 16 << 20;
    let flush = [(REQUESTS, 4, false), (ANSWERS, 4, true)];
    let program = guest()
        .print_long(IMAGE)
        .store_long(IMAGE, 1)
        .set_up_device(0, 8)
        .describe(&[&flush])
        .make_available(1)
        .start_device()
        .wait_used(1)
        .print_long(ANSWERS)
        .out_long(guest_status::PORT, guest_status::READY);
    let mut machine = Machine::new(program);
    let path = machine.path("image");
    fs::write(&path, b"pmem and more").unwrap();
    machine.spec["pmem"] = json!([{"path": path}]);
    machine.spec["rng"] = json!(false);
    machine.spec["balloon"] = json!(null);
    assert_lives(machine, b"pmem\0\0\0\0");
}

/// On a host that has set such pages aside; on others it is refused, which has a test of its own.
#[test]
#[expect(clippy::print_stderr, reason = "says what was left out")]
fn a_machine_in_pages_of_hugetlbfs() {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.unwrap().trim().parse().unwrap();
    if free < 8 {
        eprintln!("left out: there are {free} free pages in hugetlbfs, and it takes 8");
        return;
    }
    let mut machine = with_raw_disk();
    machine.spec["memory"]["huge_pages"] = json!("hugetlbfs");
    assert_lives(machine, &ALL_DONE);
}
