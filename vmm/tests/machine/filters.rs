//! Machines of every kind behind their system call filters, with all that their devices do: what a filter
//! does not allow ends the machine.
//!
//! For each device there is a [`Row`], and [`in_every_way`] goes along it: on each transport, from the
//! start, attached where it can be, saved, and restored. Each time the device has to work.

mod disk;
mod memory;
mod net;
mod vsock;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::json;
use vmm::control::{Response, Stats};
use vmm::guest_status;
use vmm::snapshot::file::Kind;
use vmm::spec::Transport;

use crate::control::stats_with;
use crate::driver::Place;
use crate::guest::Guest;
use crate::runner::{Client, Machine, Running};
use crate::snapshot::guest;

/// Where guests keep what they tell devices, and what they are told.
const REQUESTS: u32 = 0x30_0000;
const ANSWERS: u32 = 0x31_0000;
const DATA: u32 = 0x32_0000;

/// What a guest exits with once its device has worked twice.
const WORKED: u8 = 7;

/// A device, and what a machine does with it. A folder is for the files that outlive a machine.
struct Row {
    /// Puts the device into a machine to be.
    equip: fn(&mut Machine, &Path),
    /// Attaches it to one that runs, if that can be done.
    attach: Option<fn(&UnixStream, &Path)>,
    /// Does what has to be done at the other end, from before the machine starts until it is dropped.
    company: fn(&Path) -> Company,
    /// Asks the machine for what the guest waits for.
    ask: fn(&mut Client),
    /// The driver's start.
    start: fn(Guest, Place) -> Guest,
    /// Uses the device, for the first or second time.
    work: fn(Guest, Place, u32) -> Guest,
    /// What the guest writes to its console each time.
    said: [&'static [u8]; 2],
    /// Whether the device has done what it was to do the first time.
    has_worked: fn(&Stats) -> bool,
}

/// Of a device that needs none of this.
const ALONE: Row = Row {
    equip: |_, _| {},
    attach: None,
    company: |_| Company::default(),
    ask: |_| {},
    start: |guest, _| guest,
    work: |guest, _, _| guest,
    said: [b""; 2],
    has_worked: |_| false,
};

/// Threads of the test that go on until they see that nobody is interested any more.
#[derive(Default)]
struct Company(Arc<AtomicBool>);

impl Company {
    fn work(self, work: impl Fn() + Send + 'static) -> Company {
        let left = self.0.clone();
        thread::spawn(move || {
            while !left.load(Ordering::Relaxed) {
                work();
            }
        });
        self
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Uses the device, is ready, uses it once more when it has read a byte, and exits.
fn program(row: &Row, place: Place) -> Guest {
    let first = (row.work)((row.start)(guest(), place), place, 0);
    let ready = first
        .wait_interrupted(place)
        .out_long(guest_status::PORT, guest_status::READY);
    (row.work)(ready.read_serial(), place, 1).exit(WORKED)
}

/// A machine without any device.
fn machine(row: &Row, transport: Transport) -> Machine {
    let place = match transport {
        Transport::Mmio => Place::Mmio,
        Transport::Pci => Place::Pci(1),
    };
    let mut machine = Machine::new(program(row, place));
    machine.spec["transport"] = json!(transport);
    machine.spec["rng"] = json!(false);
    machine.spec["balloon"] = json!(null);
    machine.spec["memory"]["track_dirty"] = json!(true);
    machine
}

/// Waits until the guest is ready, or tells why the machine has ended.
fn ready(running: Running) -> Running {
    let mut client = running.control();
    client.send(r#"{"action":"wait_ready"}"#);
    match client.answer() {
        Some(Response::Done {}) => running,
        other => panic!("{other:?}: {:?}", running.wait()),
    }
}

/// Has the guest use its device once more; all that it has ever written to its console.
fn finished(running: Running, mut terminal: fs::File) -> Vec<u8> {
    terminal.write_all(b"x").unwrap();
    let ended = running.wait();
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(WORKED.into()), "")
    );
    let mut said = Vec::new();
    // Nobody has the other end any more.
    let end = terminal.read_to_end(&mut said).unwrap_err();
    assert_eq!(end.raw_os_error(), Some(libc::EIO));
    said
}

/// Starts a machine, and goes on from a snapshot of it when it has ended.
fn save_and_restore(row: &Row, mut machine: Machine, is_attached: bool, folder: &Path) {
    let _company = (row.company)(folder);
    let terminal = machine.put_at_a_terminal();
    let running = machine.start();
    if is_attached {
        let attach = row.attach.unwrap();
        attach(&running.connect(), folder);
    }
    (row.ask)(&mut running.control());
    let running = ready(running);
    let folders = [("full", Kind::Full), ("diff", Kind::Diff)].map(|(name, kind)| {
        // A folder that is not the machine's.
        let place = folder.join(name);
        running.snapshot(place.to_str().unwrap(), kind).unwrap();
        place
    });
    // What was done is counted when the driver has seen it.
    let stats = stats_with(&mut running.control(), |stats| {
        (row.has_worked)(stats) && stats.devices[0].interrupts > 0
    });
    assert_eq!(stats.devices[0].failures, 0);
    assert_eq!(finished(running, terminal), row.said.concat());

    let folders = folders.each_ref().map(|folder| folder.as_path());
    let mut restored = Machine::restored(&folders);
    let terminal = restored.put_at_a_terminal();
    let running = ready(restored.start());
    assert_eq!(finished(running, terminal), row.said[1]);
}

fn in_every_way(row: &Row) {
    for transport in [Transport::Mmio, Transport::Pci] {
        let folder = tempfile::tempdir().unwrap();
        let mut machine = machine(row, transport);
        (row.equip)(&mut machine, folder.path());
        save_and_restore(row, machine, false, folder.path());
    }
    if row.attach.is_some() {
        let folder = tempfile::tempdir().unwrap();
        save_and_restore(row, machine(row, Transport::Pci), true, folder.path());
    }
}

/// As where `kernel.io_uring_disabled` is set. Filters are inherited, and this one is a thread's alone.
fn without_io_uring(test: impl FnOnce() + Send) {
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
    let test = || {
        seccompiler::apply_filter(&program).unwrap();
        test();
    };
    thread::scope(|scope| scope.spawn(test).join().unwrap());
}

/// So many more huge pages set aside than there were, until this is dropped.
struct SetAside {
    before: String,
    /// Locked, for nobody else to put back another number meanwhile.
    file: fs::File,
}

const SET_ASIDE: &str = "/proc/sys/vm/nr_hugepages";

impl SetAside {
    /// Or why the host does not.
    fn more(pages: u64) -> Result<SetAside, String> {
        let file = fs::File::open(SET_ASIDE).map_err(|error| error.to_string())?;
        file.lock().unwrap();
        let number = || fs::read_to_string(SET_ASIDE).unwrap().trim().to_owned();
        let before = number();
        let wanted = before.parse::<u64>().unwrap() + pages;
        let set_aside = SetAside { before, file };
        match fs::write(SET_ASIDE, wanted.to_string()) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(error.to_string()),
            result => {
                result.unwrap();
                let got = number();
                let enough = got.parse::<u64>().unwrap() >= wanted;
                enough
                    .then_some(set_aside)
                    .ok_or_else(|| format!("it has {got} of {wanted} pages"))
            }
        }
    }
}

impl Drop for SetAside {
    fn drop(&mut self) {
        // Where that is not allowed, nothing was changed.
        let _ = fs::write(SET_ASIDE, &self.before);
        let _ = self.file.unlock();
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "says what was left out")]
fn a_machine_in_pages_of_hugetlbfs() {
    let _set_aside = match SetAside::more(8) {
        Ok(set_aside) => set_aside,
        Err(error) => {
            eprintln!("left out: the host does not set 8 huge pages aside: {error}");
            return;
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&disk::IN_A_FILE, Transport::Mmio);
    (disk::IN_A_FILE.equip)(&mut machine, folder.path());
    machine.spec["memory"]["huge_pages"] = json!("hugetlbfs");
    save_and_restore(&disk::IN_A_FILE, machine, false, folder.path());
}
