//! Devices that come and go while the machine runs, behind all walls.

use std::fs::{self, File};
use std::io::Read;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use vmm::control::{DESCRIPTORS_MAX, Request, Response, Stats};
use vmm::hotplug::slots;
use vmm::layout;
use vmm::snapshot::file::Kind;
use vmm::spec::{Disk, Net, Transport};

use crate::guest::Guest;
use crate::runner::{Client, Machine, PATIENCE, Running};
use crate::snapshot::{VIRTIO, guest, writing_of};

/// The configuration space of the first device, which is the first that is attached.
const FIRST: u32 = 0xe000_0000 + (1 << 15);
const NOBODY: u16 = 0xffff;

fn port(register: u64) -> u16 {
    u16::try_from(layout::HOTPLUG_PORT + register).unwrap()
}

/// A machine with PCI and nothing on it.
fn machine(guest: Guest) -> Machine {
    let mut machine = Machine::new(guest);
    machine.spec["transport"] = json!("pci");
    machine.spec["rng"] = json!(false);
    machine.spec["balloon"] = json!(null);
    machine
}

/// A guest that lets go of whatever it may.
fn letting_go() -> Guest {
    let let_go = guest().out_long(port(slots::LEAVE), u32::MAX);
    guest().forever(&let_go)
}

/// A new file each time. What was handed over is shared with the children of this program until they have
/// become something else, and so is the lock that a machine has put on it.
fn make_disk(path: &Path) -> File {
    let _ = fs::remove_file(path);
    File::create(path).unwrap().set_len(1 << 20).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn disk(path: &Path) -> Disk {
    serde_json::from_value(json!({"path": path})).unwrap()
}

fn attach(client: &mut Client, disk: Disk, files: &[File]) -> Response {
    client.send_with(&Request::AttachDisk { disk }, files);
    client.answer().unwrap()
}

fn attached(name: &str) -> Response {
    let name = name.to_owned();
    Response::Attached { name }
}

fn departure(name: &str, force: bool) -> Request {
    let name = name.to_owned();
    Request::Detach { name, force }
}

fn detach(client: &mut Client, name: &str) -> Response {
    client.ask(&departure(name, false))
}

fn stats(client: &mut Client) -> Stats {
    let Response::Stats { stats } = client.ask(&Request::Stats {}) else {
        panic!("no statistics");
    };
    *stats
}

fn names(client: &mut Client) -> Vec<String> {
    let devices = stats(client).devices.into_iter();
    devices.map(|device| device.name).collect()
}

#[test]
fn a_guest_uses_a_disk_that_was_attached_while_it_ran() {
    let guest = guest().wait_for(FIRST, VIRTIO);
    let machine = machine(writing_of(guest, 8, Transport::Pci));
    let path = machine.path("disk");
    let file = make_disk(&path);
    let running = machine.start();
    let response = attach(&mut running.control(), disk(&path), &[file]);
    assert_eq!(response, attached("disk0"));
    // It outlives the machine's folder.
    let mut content = File::open(&path).unwrap();
    let ended = running.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(6), ""));
    let mut written = [0; 512 * 8];
    content.read_exact(&mut written).unwrap();
    assert_eq!(written, [0x5a; 512 * 8]);
}

#[test]
fn a_disk_that_was_let_go_is_closed_and_its_place_free() {
    let mut machine = machine(letting_go());
    let cold = machine.path("cold");
    let _ = make_disk(&cold);
    machine.spec["disks"] = json!([{"path": cold}]);
    machine.spec["rng"] = json!(true);
    let path = machine.path("disk");
    let running = machine.start();
    let mut client = running.control();
    for _ in 0..3 {
        let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
        assert_eq!(response, attached("disk1"));
        assert_eq!(descriptors_of(&running, &path), 1);
        // Nobody has asked for it, so it stays whatever the guest does.
        assert_eq!(names(&mut client), ["disk0", "disk1", "rng"]);
        assert_eq!(stats(&mut client).disks.len(), 2);
        assert_eq!(detach(&mut client, "disk1"), Response::Done {});
        assert_eq!(names(&mut client), ["disk0", "rng"]);
        assert_eq!(descriptors_of(&running, &path), 0);
    }
    // One that was there from the start goes in the same way.
    assert_eq!(detach(&mut client, "disk0"), Response::Done {});
    File::open(&cold).unwrap().try_lock().unwrap();
    assert_eq!(names(&mut client), ["rng"]);
    let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
    assert_eq!(response, attached("disk0"));
    // A device's thread ends by itself.
    let begun = Instant::now();
    while disk_threads(&running) > 1 {
        assert!(begun.elapsed() < PATIENCE, "threads are left behind");
        std::thread::yield_now();
    }
}

/// How many descriptors the machine has of files that were made at `path`.
fn descriptors_of(running: &Running, path: &Path) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap();
    let targets = descriptors.map(|fd| fs::read_link(fd.unwrap().path()));
    // Those that another has replaced are called `PATH (deleted)`.
    let path = path.to_str().unwrap();
    targets
        .filter(|target| {
            target
                .as_ref()
                .is_ok_and(|target| target.to_string_lossy().starts_with(path))
        })
        .count()
}

fn disk_threads(running: &Running) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", running.pid())).unwrap();
    // A thread may be gone before its name is read.
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with("disk")).count()
}

#[test]
fn a_guest_sees_that_a_device_is_gone() {
    let guest = guest()
        .wait_for(FIRST, VIRTIO)
        .print("a")
        .read_serial()
        .out_long(port(slots::LEAVE), 1 << 1)
        .wait_for(FIRST, NOBODY)
        .exit(4);
    let mut machine = machine(guest);
    let terminal = machine.put_at_a_terminal();
    let path = machine.path("disk");
    let running = machine.start();
    let mut client = running.control();
    let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
    assert_eq!(response, attached("disk0"));
    let mut byte = [0];
    nix::unistd::read(&terminal, &mut byte).unwrap();
    let request = departure("disk0", false);
    client.send(&serde_json::to_string(&request).unwrap());
    // The request is taken in before this one is answered.
    assert_eq!(stats(&mut running.control()).disks.len(), 1);
    nix::unistd::write(&terminal, b"x").unwrap();
    assert_eq!(running.wait().code, Some(4));
}

#[test]
fn a_device_is_taken_from_a_guest_that_does_not_let_go() {
    let guest = guest().wait_for(FIRST, VIRTIO).print("a");
    let machine = machine(guest.wait_for(FIRST, NOBODY).exit(4));
    let (path, console) = (machine.path("disk"), machine.path("console"));
    let running = machine.start();
    let mut client = running.control();
    let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
    assert_eq!(response, attached("disk0"));
    // It has seen the device.
    let begun = Instant::now();
    while fs::read(&console).unwrap() != b"a" {
        assert!(begun.elapsed() < PATIENCE, "the guest does not see it");
        std::thread::yield_now();
    }
    client.send(r#"{"action":"detach","name":"disk0","force":true}"#);
    // The machine may end before it answers.
    assert_eq!(running.wait().code, Some(4));
}

#[test]
fn a_place_is_free_once_the_guest_knows_that_its_device_is_gone() {
    // Nobody lets go before the serial port was written to.
    let waiting = guest().read_serial();
    let let_go = waiting.out_long(port(slots::LEAVE), u32::MAX).print("b");
    let mut machine = machine(let_go.forever(&guest()));
    let terminal = machine.put_at_a_terminal();
    let path = machine.path("disk");
    let running = machine.start();
    let mut client = running.control();
    for _ in 1..32 {
        let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
        assert_eq!(response, attached("disk0"));
        assert_eq!(client.ask(&departure("disk0", true)), Response::Done {});
        assert_eq!(names(&mut client), [""; 0]);
        assert_eq!(descriptors_of(&running, &path), 0);
    }
    let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
    assert!(
        matches!(&response, Response::Error { message } if message.contains("the bus is full"))
    );
    nix::unistd::write(&terminal, b"x").unwrap();
    let mut byte = [0];
    while byte != *b"b" {
        nix::unistd::read(&terminal, &mut byte).unwrap();
    }
    let response = attach(&mut client, disk(&path), &[make_disk(&path)]);
    assert_eq!(response, attached("disk0"));
}

#[test]
fn what_cannot_be_attached_is_refused_with_one_error_and_nothing_changes() {
    let machine = machine(letting_go());
    let path = machine.path("disk");
    let _ = make_disk(&path);
    let folder = path.parent().unwrap().to_owned();
    let running = machine.start();
    let mut client = running.control();
    let read = || File::open(&path).unwrap();
    let write = || make_disk(&path);
    let other = |value| serde_json::from_value(value).unwrap();
    let one = json!([{"path": "x"}]);
    let table: Vec<(Disk, Vec<File>, &str)> = vec![
        (disk(&path), vec![], "handed over with 0 descriptors"),
        (disk(&path), vec![write(), write()], "it must be with 1"),
        (disk(&path), vec![read()], "`/disk/path` is open with"),
        (disk(&folder), vec![File::open(&folder).unwrap()], "`/disk"),
        (
            other(json!({"path": "x", "read_only": true})),
            vec![File::open("/dev/null").unwrap()],
            "neither a regular file",
        ),
        (
            other(json!({"path": "x", "serial": "x".repeat(21)})),
            vec![write()],
            "`/disk/serial` is 21 bytes long",
        ),
        (
            other(json!({"path": "x", "backing": one})),
            vec![write(), read()],
            "`/disk/backing` is 1 files",
        ),
        (
            other(json!({"path": "x", "format": "qcow2"})),
            vec![write()],
            "no image of the format",
        ),
    ];
    for (disk, files, want) in table {
        let Response::Error { message } = attach(&mut client, disk, &files) else {
            panic!("accepted in spite of {want}");
        };
        assert!(message.contains(want), "{want}: {message}");
    }
    let net = || -> Net { serde_json::from_value(json!({"tap": "x"})).unwrap() };
    client.send_with(&Request::AttachNet { net: net() }, &[read()]);
    let Some(Response::Error { message }) = client.answer() else {
        panic!("a file is no tap");
    };
    assert!(message.contains("not one of a tap"), "{message}");
    for (name, want) in [("disk0", "there is no device `disk0`"), ("", "no device")] {
        let Response::Error { message } = detach(&mut client, name) else {
            panic!("there is none");
        };
        assert!(message.contains(want), "{message}");
    }
    assert_eq!(names(&mut client), [""; 0]);
    let response = attach(&mut client, disk(&path), &[write()]);
    assert_eq!(response, attached("disk0"));
}

#[test]
fn a_bus_can_be_full() {
    let machine = machine(letting_go());
    let paths: Vec<PathBuf> = (0..32).map(|n| machine.path(&format!("disk{n}"))).collect();
    let running = machine.start();
    let mut client = running.control();
    for (index, path) in paths.iter().enumerate() {
        let response = attach(&mut client, disk(path), &[make_disk(path)]);
        if let Response::Error { message } = &response {
            assert_eq!(index, 31, "{message}");
            assert!(message.contains("the bus is full"), "{message}");
        } else {
            assert_eq!(response, attached(&format!("disk{index}")));
        }
    }
    assert_eq!(stats(&mut client).disks.len(), 31);
    assert_eq!(detach(&mut client, "disk7"), Response::Done {});
    let response = attach(&mut client, disk(&paths[31]), &[make_disk(&paths[31])]);
    assert_eq!(response, attached("disk7"));
}

#[test]
fn machines_without_a_bus_refuse_and_what_cannot_go_stays() {
    let mut without = Machine::new(letting_go());
    without.spec["transport"] = json!("mmio");
    let path = without.path("disk");
    let running = without.start();
    for response in [
        attach(&mut running.control(), disk(&path), &[make_disk(&path)]),
        detach(&mut running.control(), "rng"),
    ] {
        let Response::Error { message } = response else {
            panic!("{response:?}");
        };
        assert!(message.contains("on PCI alone"), "{message}");
    }
    let mut with = machine(letting_go());
    with.spec["rng"] = json!(true);
    let running = with.start();
    let response = detach(&mut running.control(), "rng");
    assert!(matches!(&response, Response::Error { message } if message.contains("`rng` stays")));
}

#[test]
fn a_snapshot_has_the_devices_that_there_were() {
    let mut machine = machine(letting_go());
    let path = |name: &str| machine.path(name);
    let (cold, warm, later) = (path("cold"), path("warm"), path("later"));
    let _ = make_disk(&cold);
    machine.spec["disks"] = json!([{"path": cold}]);
    let running = machine.start();
    let mut client = running.control();
    let response = attach(&mut client, disk(&warm), &[make_disk(&warm)]);
    assert_eq!(response, attached("disk1"));
    assert_eq!(detach(&mut client, "disk0"), Response::Done {});
    let snapshot = running.snapshot("full", Kind::Full).unwrap();
    // By its name, although it is the first now.
    let _ = make_disk(&later);
    let copy = snapshot.folder.join("copy");
    let _ = make_disk(&copy);
    let mut wrong = Machine::restored(&[&snapshot.folder]);
    wrong.spec["disks"] = json!({"disk0": {"path": copy}});
    let ended = wrong.run();
    assert!(ended.stderr.contains("`/disks/disk0`"), "{}", ended.stderr);

    let mut other = Machine::restored(&[&snapshot.folder]);
    other.spec["disks"] = json!({"disk1": {"path": copy}});
    let running = other.start();
    let mut client = running.control();
    assert_eq!(names(&mut client), ["disk1"]);
    // Both ways still work.
    let response = attach(&mut client, disk(&later), &[make_disk(&later)]);
    assert_eq!(response, attached("disk0"));
    assert_eq!(detach(&mut client, "disk1"), Response::Done {});
    let second = running.snapshot("second", Kind::Full).unwrap();
    assert_eq!(names(&mut client), ["disk0"]);
    assert!(second.report.state_bytes > 0);
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let machine = machine(letting_go());
    let path = machine.path("disk");
    let running = machine.start();
    let mut client = running.control();
    let files: Vec<_> = (0..DESCRIPTORS_MAX).map(|_| make_disk(&path)).collect();
    let Response::Error { message } = attach(&mut client, disk(&path), &files) else {
        panic!("one is enough");
    };
    assert!(message.contains("with 17 descriptors"), "{message}");
    assert_eq!(descriptors_of(&running, &path), 0);
}
