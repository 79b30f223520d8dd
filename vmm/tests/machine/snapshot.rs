//! Snapshots, and what becomes of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use nix::pty::openpty;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::tempfile;
use vmm::control::{MachineState, Request, Response};
use vmm::snapshot::file::Kind;
use vmm::spec::Transport;
use vmm::virtio::transport::Window;
use vmm::{guest_status, layout};

use crate::guest::Guest;
use crate::runner::{Machine, PATIENCE, Running, Snapshot};

pub(crate) const COUNTER: u32 = 0x20_0000;

/// The maker of virtio devices, at the beginning of a function's configuration space.
pub(crate) const VIRTIO: u16 = 0x1af4;

pub(crate) fn guest() -> Guest {
    Guest::default()
}

/// Counts from the moment that it is ready.
pub(crate) fn counting() -> Machine {
    let count = guest().increment(COUNTER);
    let ready = guest().out_long(guest_status::PORT, guest_status::READY);
    let mut machine = Machine::new(ready.forever(&count));
    machine.spec["memory"]["track_dirty"] = json!(true);
    machine
}

pub(crate) fn wait_ready(running: &Running) {
    let answer = running.control().ask(&Request::WaitReady {});
    assert_eq!(answer, Response::Done {});
}

/// A full snapshot in which the guest has counted beyond `past`.
pub(crate) fn snapshot_beyond(running: &Running, name: &str, past: u32) -> Snapshot {
    // The guest counts as long as it is not paused, so this ends.
    (0..)
        .map(|attempt| format!("{name}{attempt}"))
        .map(|name| running.snapshot(&name, Kind::Full).unwrap())
        .find(|snapshot| snapshot.long(COUNTER) > past)
        .unwrap()
}

fn generation(snapshot: &Snapshot) -> [u8; 16] {
    snapshot.memory(layout::GENERATION)
}

#[test]
fn a_guest_goes_on_where_it_was_and_so_do_its_clones() {
    let original = counting().start();
    wait_ready(&original);
    let first = snapshot_beyond(&original, "first", 0);
    let count = first.long(COUNTER);
    // The original runs on.
    let second = snapshot_beyond(&original, "second", count);
    assert_eq!(generation(&first), generation(&second));

    let clones = [(); 2].map(|()| Machine::restored(&[&first.folder]).start());
    let mut generations = vec![generation(&first)];
    for clone in &clones {
        let later = snapshot_beyond(clone, "later", count);
        generations.push(generation(&later));
    }
    generations.sort_unstable();
    generations.dedup();
    assert_eq!(generations.len(), 3, "clones know that they are others");
}

#[test]
fn a_snapshot_of_a_snapshot_of_a_snapshot_is_one() {
    let mut count = 0;
    let mut running = counting().start();
    wait_ready(&running);
    for _ in 0..8 {
        let snapshot = snapshot_beyond(&running, "next", count);
        count = snapshot.long(COUNTER);
        // Its files are in the folder of the machine that ends when it is replaced.
        let next = Machine::restored(&[&snapshot.folder]).start();
        wait_ready(&next);
        running = next;
    }
}

#[test]
fn differences_lie_over_a_full_snapshot_in_their_order() {
    let original = counting().start();
    wait_ready(&original);
    let full = original.snapshot("full", Kind::Full).unwrap();
    let one = original.snapshot("one", Kind::Diff).unwrap();
    let two = original.snapshot("two", Kind::Diff).unwrap();
    assert_eq!(one.report.parent.as_ref(), Some(&full.report.id));
    assert_eq!(two.report.parent.as_ref(), Some(&one.report.id));
    // Little was written: the counter, and what is always taken to be.
    assert!(two.report.memory_bytes < 64 * 1024, "{two:?}");

    let restored = Machine::restored(&[&full.folder, &one.folder, &two.folder]).start();
    let later = restored.snapshot("later", Kind::Full).unwrap();
    assert!(later.long(COUNTER) >= two.long(COUNTER));
    // Differences to what was restored, too.
    let three = restored.snapshot("three", Kind::Diff).unwrap();
    assert_eq!(three.report.parent, Some(later.report.id));

    for (folders, want) in [
        (&[&one][..], "name the full one"),
        (&[&full, &two], "does not lie over the one before it"),
        (&[&full, &full], "cannot lie over another"),
        (&[], "no snapshot is named"),
    ] {
        let folders: Vec<&Path> = folders.iter().map(|one| one.folder.as_path()).collect();
        let ended = Machine::restored(&folders).run();
        assert_eq!(ended.code, Some(125));
        assert!(ended.stderr.contains(want), "{want}: {}", ended.stderr);
    }
}

#[test]
fn a_snapshot_that_cannot_be_is_refused_and_leaves_nothing() {
    let mut machine = Machine::new(guest());
    machine.spec["cpus"] = json!({"count": 2});
    let folder = machine.path("no");
    let running = machine.start();
    let refused = running.snapshot("no", Kind::Diff).unwrap_err().to_string();
    assert!(refused.contains("memory.track_dirty"), "{refused}");
    assert!(!folder.exists());

    let mut client = running.control();
    let full = Request::Snapshot { kind: Kind::Full };
    let Response::Error { message } = client.ask(&full) else {
        panic!("a snapshot without files");
    };
    assert!(message.contains("two descriptors"), "{message}");
    // It runs all the time.
    let Response::State { state, .. } = client.ask(&Request::State {}) else {
        panic!("not a state");
    };
    assert_eq!(state, MachineState::Running);

    let mut nested = counting();
    nested.spec["cpus"] = json!({"count": 1, "nested": true});
    let nested = nested.start();
    let refused = nested.snapshot("no", Kind::Full).unwrap_err().to_string();
    assert!(refused.contains("leave out `cpus.nested`"), "{refused}");

    let tracked = counting().start();
    let refused = tracked.snapshot("no", Kind::Diff).unwrap_err().to_string();
    assert!(refused.contains("take a full one first"), "{refused}");
}

#[test]
fn a_restored_machine_may_wait_to_be_resumed() {
    let original = counting().start();
    wait_ready(&original);
    let snapshot = original.snapshot("full", Kind::Full).unwrap();
    let mut machine = Machine::restored(&[&snapshot.folder]);
    machine.spec["paused"] = json!(true);
    machine.spec["clock"] = json!("freeze");
    let restored = machine.start();
    let mut client = restored.control();
    let paused = Response::State {
        state: MachineState::Paused,
        ready: true,
    };
    assert_eq!(client.ask(&Request::State {}), paused);
    let still = restored.snapshot("still", Kind::Full).unwrap();
    assert_eq!(still.long(COUNTER), snapshot.long(COUNTER));
    assert_eq!(client.ask(&Request::Resume {}), Response::Done {});
    snapshot_beyond(&restored, "later", snapshot.long(COUNTER));
}

#[test]
fn several_processors_go_on() {
    let mut machine = counting();
    machine.spec["cpus"] = json!({"count": 3});
    let original = machine.start();
    wait_ready(&original);
    let snapshot = original.snapshot("full", Kind::Full).unwrap();
    let restored = Machine::restored(&[&snapshot.folder]).start();
    let later = snapshot_beyond(&restored, "later", snapshot.long(COUNTER));
    assert!(later.report.state_bytes > snapshot.report.state_bytes / 2);
}

#[test]
fn a_machine_is_restored_from_descriptors_alone_and_talks_to_another_terminal() {
    let echo = guest()
        .out_long(guest_status::PORT, guest_status::READY)
        .read_serial()
        .print_read()
        .exit(9);
    let original = Machine::new(echo).start();
    wait_ready(&original);
    let snapshot = original.snapshot("full", Kind::Full).unwrap();

    let pty = openpty(None, None).unwrap();
    let mut machine = Machine::restored(&[]);
    machine.spec = json!({
        "snapshots": [{"state": "fd:3", "memory": "fd:4"}],
        "kvm": "fd:5",
        "console": "stdio",
    });
    let folder = snapshot.folder.display();
    machine.shell = format!("3<{folder}/state 4<{folder}/memory 5<>/dev/kvm 8<config");
    machine.jail = true;
    machine.terminal = Some(pty.slave);
    let restored = machine.start();
    nix::unistd::write(&pty.master, b"k").unwrap();
    let ended = restored.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(9), ""));
    let mut seen = [0; 8];
    let count = nix::unistd::read(&pty.master, &mut seen).unwrap();
    assert!(seen[..count].ends_with(b"k"), "{:?}", &seen[..count]);
}

/// Where the queue of a guest's disk is.
const QUEUE: [u32; 3] = [0x20_0000, 0x20_1000, 0x20_2000];

/// A guest that has started its disk, which is in this place on PCI or the first of those with registers
/// in memory, and the register by which it kicks that.
fn started(guest: Guest, slot: Option<u32>) -> (Guest, u32) {
    match slot {
        None => started_by_registers(guest),
        Some(slot) => started_on_pci(guest, slot),
    }
}

fn started_by_registers(guest: Guest) -> (Guest, u32) {
    let window = u32::try_from(layout::VIRTIO).unwrap();
    let [table, available, used] = QUEUE;
    let negotiation = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1), // VERSION_1.
        (0x70, 11),
        (0x30, 0),
        (0x38, 32),
        (0x80, table),
        (0x90, available),
        (0xa0, used),
        (0x44, 1),
        (0x70, 15),
    ];
    let store = |guest: Guest, (offset, value)| guest.store_long(window + offset, value);
    let guest = negotiation.into_iter().fold(guest, store);
    (guest, window + 0x50)
}

fn started_on_pci(guest: Guest, slot: u32) -> (Guest, u32) {
    let space = u32::try_from(layout::PCI_CONFIG).unwrap() + (slot << 15);
    let window = u32::try_from(Window::on_bus(slot).address).unwrap();
    let [table, available, used] = QUEUE;
    let guest = guest
        .wait_for(space, VIRTIO)
        .store_word(space + 4, 6) // Answer, and access memory.
        .store_byte(window + 0x14, 1)
        .store_byte(window + 0x14, 3)
        .store_long(window + 0x08, 1)
        .store_long(window + 0x0c, 1) // VERSION_1.
        .store_byte(window + 0x14, 11)
        .store_word(window + 0x16, 0)
        .store_word(window + 0x18, 32)
        .store_long(window + 0x20, table)
        .store_long(window + 0x28, available)
        .store_long(window + 0x30, used)
        .store_word(window + 0x1c, 1)
        .store_byte(window + 0x14, 15);
    (guest, window + 0x3000)
}

/// A guest that writes `requests` sectors of a disk, each full of 0x5a, and then waits for them.
fn writing(requests: u16, transport: Transport) -> Guest {
    writing_of(guest(), requests, transport)
}

/// A guest that does so after all else, to its first device.
pub(crate) fn writing_of(guest: Guest, requests: u16, transport: Transport) -> Guest {
    let slot = match transport {
        Transport::Mmio => None,
        Transport::Pci => Some(1),
    };
    written(guest, requests, slot).0.exit(6)
}

/// A guest that has done so, and the register by which it kicks its disk.
pub(crate) fn written(guest: Guest, requests: u16, slot: Option<u32>) -> (Guest, u32) {
    let [table, _, _] = QUEUE;
    let (headers, data, statuses) = (0x20_3000, 0x20_4000, 0x20_5000);
    let (mut guest, kick) = started(guest, slot);
    for word in 0..512 / 4 {
        guest = guest.store_long(data + 4 * word, 0x5a5a_5a5a);
    }
    for request in 0..u32::from(requests) {
        let header = headers + 16 * request;
        guest = guest.store_long(header, 1).store_long(header + 8, request);
        let chain = [(header, 16, 1), (data, 512, 1), (statuses + request, 1, 2)];
        for ((address, length, flags), index) in chain.into_iter().zip(3 * request..) {
            let at = table + 16 * index;
            guest = guest
                .store_long(at, address)
                .store_long(at + 4, 0)
                .store_long(at + 8, length)
                .store_long(at + 12, flags | (index + 1) << 16);
        }
    }
    (offered(guest, 0, requests, kick), kick)
}

/// A guest that writes the same once more, having done so this often.
pub(crate) fn written_again(guest: Guest, times: u16, requests: u16, kick: u32) -> Guest {
    offered(guest, times * requests, requests, kick)
}

/// Offers the requests after it has offered as many as are `before`, and waits for them.
fn offered(mut guest: Guest, before: u16, requests: u16, kick: u32) -> Guest {
    let [_, available, used] = QUEUE;
    for request in 0..requests {
        let entry = available + 4 + 2 * u32::from(before + request);
        guest = guest.store_word(entry, 3 * request);
    }
    guest
        .store_word(available + 2, before + requests)
        .store_long(kick, 0)
        .wait_for(used + 2, before + requests)
}

#[test]
fn requests_that_are_under_way_are_in_the_snapshot_and_on_the_disk() {
    for transport in [Transport::Mmio, Transport::Pci] {
        snapshot_of_requests(transport);
    }
}

fn snapshot_of_requests(transport: Transport) {
    let requests = 8;
    let mut machine = Machine::new(writing(requests, transport));
    machine.spec["transport"] = json!(transport);
    let disk = machine.path("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    // They come one a second: all but the first are waiting when the machine is paused.
    machine.spec["disks"] = json!([{"path": disk, "limits": {"write_iops": 1}}]);
    let original = machine.start();
    let mut client = original.control();
    loop {
        let Response::Stats { stats } = client.ask(&Request::Stats {}) else {
            panic!("no statistics");
        };
        if stats.disks[0].throttled == u64::from(requests) - 1 {
            break;
        }
    }
    let snapshot = original.snapshot("full", Kind::Full).unwrap();
    let content = fs::read(&disk).unwrap();
    assert_eq!(content[..512 * 8], [0x5a; 512 * 8]);
    // A disk has one machine at a time.
    let copy = snapshot.folder.join("copy");
    fs::copy(&disk, &copy).unwrap();
    let mut other = Machine::restored(&[&snapshot.folder]);
    other.spec["disks"] = json!({"disk0": {"path": copy}});
    let ended = other.run();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(6), ""));
    assert_eq!(original.wait().code, Some(6));
}

#[test]
fn memory_that_was_written_by_a_machine_is_not_written_to_its_snapshot() {
    let original = counting().start();
    wait_ready(&original);
    let snapshot = original.snapshot("full", Kind::Full).unwrap();
    let memory = fs::read(snapshot.folder.join("memory")).unwrap();
    let restored = Machine::restored(&[&snapshot.folder]).start();
    snapshot_beyond(&restored, "later", snapshot.long(COUNTER));
    let file = File::open(snapshot.folder.join("memory")).unwrap();
    let mut after = vec![0; memory.len()];
    file.read_exact_at(&mut after, 0).unwrap();
    assert!(after == memory);
}

#[test]
fn clones_of_a_machine_with_several_processors_go_on_all_at_once() {
    let ready = guest()
        .start_others(0x2000, 2)
        .out_long(guest_status::PORT, guest_status::READY);
    let mut machine = Machine::new(ready.forever(&guest().increment(COUNTER)));
    machine.spec["cpus"] = json!({"count": 3});
    let original = machine.start();
    wait_ready(&original);
    let snapshot = snapshot_beyond(&original, "first", 0);
    let count = snapshot.long(COUNTER);
    for _ in 0..4 {
        let clones = [(); 2].map(|()| Machine::restored(&[&snapshot.folder]).start());
        for clone in &clones {
            snapshot_beyond(clone, "later", count);
        }
    }
}

/// A thread that stands still, in whatever it does, until this is dropped.
pub(crate) struct Stopped(Pid);

impl Stopped {
    /// The thread of that name, which it gives itself when it first runs.
    pub(crate) fn thread(process: i32, name: &str) -> Stopped {
        let folder = format!("/proc/{process}/task");
        let named = || {
            let mut threads = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap());
            threads.find(|entry| {
                let comm = fs::read_to_string(entry.path().join("comm"));
                comm.is_ok_and(|comm| comm.trim_end() == name)
            })
        };
        let begun = Instant::now();
        let thread = loop {
            match named() {
                Some(thread) => break thread.file_name().into_string().unwrap(),
                None if begun.elapsed() > PATIENCE => panic!("there is no thread {name}"),
                None => std::thread::yield_now(),
            }
        };
        let thread = Pid::from_raw(thread.parse().unwrap());
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        Stopped(thread)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended with its process.
        let _ = ptrace::detach(self.0, None);
    }
}

#[test]
fn a_machine_answers_while_its_snapshot_is_written_but_does_not_go_on() {
    let running = counting().start();
    wait_ready(&running);
    let mut client = running.control();
    assert_eq!(client.ask(&Request::Pause {}), Response::Done {});
    let stopped = Stopped::thread(running.pid(), "snapshot");
    let [mut first, mut second] = [(); 2].map(|()| running.control());
    let order = Request::Snapshot { kind: Kind::Full };
    let files = || [tempfile().unwrap(), tempfile().unwrap()];
    // It has been let in, so that what it sends is seen before what others send later.
    first.ask(&Request::State {});
    first.send_with(&order, &files());

    let Response::Stats { stats } = client.ask(&Request::Stats {}) else {
        panic!("no statistics");
    };
    assert_eq!(stats.devices.len(), 2);
    let Response::Error { message } = client.ask(&Request::Resume {}) else {
        panic!("it goes on");
    };
    assert!(message.contains("busy"), "{message}");
    second.send_with(&order, &files());
    assert!(matches!(second.answer(), Some(Response::Error { .. })));
    let paused = Response::State {
        state: MachineState::Paused,
        ready: true,
    };
    assert_eq!(client.ask(&Request::State {}), paused);

    drop(stopped);
    assert!(matches!(first.answer(), Some(Response::Snapshot { .. })));
    assert_eq!(client.ask(&Request::Resume {}), Response::Done {});
    second.send_with(&order, &files());
    let Some(Response::Error { message }) = second.answer() else {
        panic!("it runs");
    };
    assert!(message.contains("pause it first"), "{message}");
}
