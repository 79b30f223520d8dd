//! Clients of the control socket, and guests that keep the machine busy.

use std::fs;

use serde_json::json;
use tempfile::tempfile;
use vmm::control::{MachineState, Request, Response, Stats};
use vmm::snapshot::file::Kind;
use vmm::spec::DiskLimits;
use vmm::{guest_status, layout};

use crate::guest::Guest;
use crate::runner::{Client, Machine, Running};
use crate::snapshot::{Stopped, guest, wait_ready};

fn stats(client: &mut Client) -> Stats {
    let answer = client.ask(&Request::Stats {});
    let Response::Stats { stats } = answer else {
        panic!("not statistics: {answer:?}");
    };
    stats
}

fn refusal(client: &mut Client, request: &Request) -> String {
    let answer = client.ask(request);
    let Response::Error { message } = answer else {
        panic!("not refused: {answer:?}");
    };
    message
}

/// With a disk of this size, all of which the host has in its memory.
fn with_disk(guest: Guest, bytes: usize) -> Machine {
    let mut machine = Machine::new(guest);
    let path = machine.path("disk");
    fs::write(&path, vec![7; bytes]).unwrap();
    machine.spec["disks"] = json!([{"path": path}]);
    machine
}

#[test]
fn requests_that_come_all_at_once_are_all_answered() {
    // In all they are no longer than what is read at a time, and their answers longer than what the
    // machine keeps.
    const REQUESTS: usize = 200;
    let mut machine = Machine::new(guest());
    let disks = [(); 4].map(|()| tempfile::NamedTempFile::new().unwrap());
    let disks = disks.each_ref().map(|disk| json!({"path": disk.path()}));
    machine.spec["disks"] = json!(disks);
    let running = machine.start();
    for closes in [false, true] {
        let mut client = running.control();
        client.send(&[r#"{"action":"stats"}"#; REQUESTS].join("\n"));
        if closes {
            client.finish_sending();
        }
        for number in 0..REQUESTS {
            let answer = client.answer();
            assert!(
                matches!(answer, Some(Response::Stats { .. })),
                "{number}: {answer:?}"
            );
        }
        if closes {
            assert_eq!(client.answer(), None);
        }
    }
}

/// Has a disk read the longest requests into the same memory, as many as fit its queue, and looks at a
/// register of it for ever.
fn greedy() -> Guest {
    const DESCRIPTORS: u32 = 0x20_0000;
    const AVAILABLE: u32 = 0x20_1000;
    const USED: u32 = 0x20_2000;
    const REQUEST: u32 = 0x30_0000;
    const DATA: u32 = 0x40_0000;
    const NEXT: u32 = 1;
    const WRITE: u32 = 2;
    let window = u32::try_from(layout::VIRTIO).unwrap();
    let status = window + 0x70;
    // Address, length, flags, next. All heads that are available are descriptor 0.
    let descriptors = [
        (REQUEST, 16, NEXT, 1),
        (DATA, 16 << 20, NEXT | WRITE, 2),
        (REQUEST + 16, 1, WRITE, 0),
    ];
    let registers = [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1), // VERSION_1.
        (0x70, 11),
        (0x38, 256),
        (0x80, DESCRIPTORS),
        (0x90, AVAILABLE),
        (0xa0, USED),
        (0x44, 1),
    ];
    let places = (DESCRIPTORS..).step_by(16).zip(descriptors);
    let described = places.fold(guest(), |guest, (place, (address, bytes, flags, next))| {
        guest
            .store_long(place, address)
            .store_long(place + 8, bytes)
            .store_long(place + 12, next << 16 | flags)
    });
    registers
        .into_iter()
        .fold(described, |guest, (register, value)| {
            guest.store_long(window + register, value)
        })
        .store_word(AVAILABLE + 2, 256)
        .out_long(guest_status::PORT, guest_status::READY)
        .store_long(status, 15)
        .wait_for(status, 0xffff)
}

#[test]
fn a_guest_that_keeps_its_disk_busy_holds_nobody_up() {
    let mut machine = with_disk(greedy(), 16 << 20);
    machine.spec["memory"]["size_mib"] = json!(32);
    let running = machine.start();
    wait_ready(&running);
    let mut client = running.control();
    assert_eq!(client.ask(&Request::Pause {}), Response::Done {});
    let paused = Response::State {
        state: MachineState::Paused,
        ready: true,
    };
    assert_eq!(client.ask(&Request::State {}), paused);
    // That was before the disk was done.
    let disk = stats(&mut client).disks[0];
    assert!(disk.reads < 256 && disk.failures == 0, "{disk:?}");
    assert_eq!(client.ask(&Request::Resume {}), Response::Done {});
    assert_eq!(client.ask(&Request::Kill {}), Response::Done {});
    assert_eq!(running.wait().code, Some(137));
}

#[test]
fn a_limit_of_nothing_is_refused() {
    let limits = DiskLimits {
        write_iops: Some(0),
        ..DiskLimits::default()
    };
    let mut machine = with_disk(guest(), 1 << 20);
    let mut refused = with_disk(guest(), 1 << 20);
    refused.spec["disks"][0]["limits"] = json!(limits);
    let ended = refused.run();
    assert_eq!(ended.code, Some(125), "{ended:?}");
    let wanted = "`/disks/0/limits/write_iops` is 0; it must be 1 or more, or absent";
    assert!(ended.stderr.contains(wanted), "{}", ended.stderr);

    machine.spec["disks"][0]["limits"] = json!({"write_iops": 1});
    let running = machine.start();
    let request = Request::SetDiskLimits { disk: 0, limits };
    let message = refusal(&mut running.control(), &request);
    assert!(message.contains("`limits/write_iops` is 0"), "{message}");
}

#[test]
fn memory_that_is_not_in_whole_blocks_is_refused() {
    let mut machine = Machine::new(guest());
    machine.spec["memory"] = json!({"size_mib": 32, "max_mib": 64});
    let running = machine.start();
    let mut client = running.control();
    let message = refusal(&mut client, &Request::Memory { size_mib: 35 });
    assert!(message.contains("`size_mib` is 35"), "{message}");
    assert_eq!(stats(&mut client).memory.requested_bytes, 32 << 20);
    // A balloon has no blocks.
    let less = Request::Memory { size_mib: 31 };
    assert_eq!(client.ask(&less), Response::Done {});
}

fn pause(running: &Running) -> Client {
    let mut client = running.control();
    assert_eq!(client.ask(&Request::Pause {}), Response::Done {});
    client
}

#[test]
fn no_device_is_taken_away_while_a_snapshot_is_written() {
    let mut machine = with_disk(guest(), 1 << 20);
    machine.spec["transport"] = json!("pci");
    let running = machine.start();
    let mut client = pause(&running);
    let stopped = Stopped::thread(running.pid(), "snapshot");
    let files = [tempfile().unwrap(), tempfile().unwrap()];
    client.send_with(&Request::Snapshot { kind: Kind::Full }, &files);
    let mut other = running.control();
    // Whatever the other sent before is seen by then.
    other.ask(&Request::State {});
    let detach = Request::Detach {
        name: "disk0".to_owned(),
        force: true,
    };
    let message = refusal(&mut other, &detach);
    assert!(message.contains("busy"), "{message}");
    drop(stopped);
    assert!(matches!(client.answer(), Some(Response::Snapshot { .. })));
    assert_eq!(other.ask(&detach), Response::Done {});
}
