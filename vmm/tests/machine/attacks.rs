//! Guests that take as much of the machine's time and memory as devices give them, and those that break
//! the rules and start again: in each case for ever.

use std::fs;
use std::os::unix::net::UnixListener;

use serde_json::json;
use vmm::control::{MachineState, Request, Response, Stats};
use vmm::guest_status;

use crate::control::stats_with;
use crate::driver::{Buffer, Place, Queue};
use crate::guest::Guest;
use crate::runner::{Machine, Running};
use crate::snapshot::{guest, wait_ready};

const PLACE: Place = Place::Mmio;
const QUEUE: Queue = Queue(0);

/// Where guests keep what they tell devices, and what they get.
const REQUESTS: u32 = 0x30_0000;
const DATA: u32 = 0x40_0000;

/// What a machine may take for itself, beside its guest's memory and what devices hold: twice as much as
/// it does.
const MACHINE_MIB: u64 = 8;

/// How often clients ask for something while the guest is at it.
const ROUNDS: usize = 20;

/// What a device says of itself when its driver has broken the rules.
const NEEDS_RESET: u32 = 1 << 6;

/// What a guest does to the one device of its machine.
struct Attack {
    /// Gives the machine the device, and perhaps has somebody listen.
    equip: fn(&mut Machine) -> Option<UnixListener>,
    /// What memory the machine is asked to have.
    size_mib: u64,
    features: u32,
    /// Those that the device has.
    queues: u16,
    queue_size: u16,
    /// Before the device starts.
    prepare: fn(Guest) -> Guest,
    /// Again and again. Of the chains of a full queue that were not described, the ring names the first one,
    /// as rings of zeroes do.
    attack: fn(Guest) -> Guest,
    /// What grows while the guest gets what it wants.
    taken: fn(&Stats) -> u64,
    /// What is true at times.
    at_times: fn(&Stats) -> bool,
    /// What the device may hold, in MiB.
    held_mib: u64,
}

impl Attack {
    fn set_up(&self, guest: Guest) -> Guest {
        guest.set_up_device(PLACE, self.features, self.queues, self.queue_size)
    }

    /// Takes what it can.
    fn greedy(&self) -> Guest {
        let prepared = (self.prepare)(self.set_up(guest())).start_device(PLACE);
        let ready = prepared.out_long(guest_status::PORT, guest_status::READY);
        ready.forever(&(self.attack)(guest()))
    }

    /// Offers more than a queue has, to each of them, and starts the device anew as soon as it asks for a
    /// reset.
    fn lawless(&self) -> Guest {
        let broken = (0..self.queues).map(Queue).fold(guest(), |guest, queue| {
            self.set_up(guest)
                .make_available(queue, self.queue_size + 1)
                .start_device(PLACE)
                .wait_for_long(PLACE.status(), 15 | NEEDS_RESET)
                .make_available(queue, 0)
        });
        let ready = guest().out_long(guest_status::PORT, guest_status::READY);
        ready.forever(&broken)
    }

    /// Clients are served while that goes on, and the machine stays as small as it is to be.
    fn is_borne(&self) {
        self.is_borne_of(self.greedy(), self.taken, self.at_times);
        let broken = |stats: &Stats| stats.devices[0].failures;
        self.is_borne_of(self.lawless(), broken, |_| true);
    }

    fn is_borne_of(&self, guest: Guest, taken: fn(&Stats) -> u64, at_times: fn(&Stats) -> bool) {
        let mut machine = Machine::new(guest);
        machine.spec["rng"] = json!(false);
        machine.spec["balloon"] = json!(null);
        let _host = (self.equip)(&mut machine);
        let running = machine.start();
        let mut client = running.control();
        let size = Request::Memory {
            size_mib: self.size_mib,
        };
        // Without such a device, there is nothing to ask for.
        let _ = client.ask(&size);
        wait_ready(&running);
        let assert_small = || {
            let (own, most) = (own_kib(&running), MACHINE_MIB + self.held_mib);
            assert!(own < most << 10, "{own} KiB");
        };
        let before = taken(&stats_with(&mut client, |stats| taken(stats) > 0));
        for _ in 0..ROUNDS {
            assert_eq!(client.ask(&Request::Pause {}), Response::Done {});
            let paused = Response::State {
                state: MachineState::Paused,
                ready: true,
            };
            assert_eq!(running.control().ask(&Request::State {}), paused);
            assert_eq!(client.ask(&Request::Resume {}), Response::Done {});
            assert_small();
        }
        // It has gone on, and goes on.
        stats_with(&mut client, |stats| taken(stats) > before);
        stats_with(&mut client, at_times);
        assert_small();
        assert_eq!(client.ask(&Request::Kill {}), Response::Done {});
        let ended = running.wait();
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(137), ""));
    }
}

/// What of the machine's memory is not its guest's, which alone may be in huge pages.
fn own_kib(running: &Running) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", running.pid())).unwrap();
    let (mut own, mut resident) = (0, 0);
    for line in maps.lines() {
        if let Some(number) = line.strip_prefix("Rss:") {
            let number = number.trim().strip_suffix(" kB").unwrap();
            resident = number.parse::<u64>().unwrap();
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && !flags.contains(" hg")
        {
            own += resident;
        }
    }
    own
}

#[test]
fn a_guest_that_wants_all_random_bytes_holds_nobody_up() {
    Attack {
        equip: |machine| {
            machine.spec["rng"] = json!(true);
            None
        },
        size_mib: 16,
        features: 0,
        queues: 1,
        queue_size: 64,
        prepare: |guest| guest.describe(QUEUE, &[&[(DATA, 8 << 20, true)]]),
        attack: |guest| guest.exchange(PLACE, QUEUE, 64),
        taken: |stats| stats.rng.unwrap().bytes,
        at_times: |stats| stats.rng.unwrap().requests > 64,
        held_mib: 0,
    }
    .is_borne();
}

#[test]
fn a_guest_that_gives_up_scattered_pages_for_ever_holds_nobody_up() {
    Attack {
        equip: |machine| {
            machine.spec["balloon"] = json!({"target_mib": 8});
            None
        },
        size_mib: 16,
        features: 1 << 1 | 1 << 5,
        queues: 4,
        queue_size: 32,
        prepare: |guest| {
            // None has a neighbour among them.
            let pages = (DATA >> 12..).step_by(2).take(256);
            let numbers = (REQUESTS..).step_by(4).zip(pages);
            let guest = numbers.fold(guest, |guest, (at, page)| guest.store_long(at, page));
            guest
                .describe(QUEUE, &[&[(REQUESTS, 1024, false)]])
                .describe(Queue(3), &[&[(DATA, 8 << 20, true)]])
        },
        attack: |guest| {
            guest
                .exchange(PLACE, QUEUE, 32)
                .exchange(PLACE, Queue(3), 32)
        },
        taken: |stats| stats.balloon.as_ref().unwrap().reported_bytes,
        at_times: |stats| stats.balloon.as_ref().unwrap().reported_bytes > 8 << 20,
        held_mib: 0,
    }
    .is_borne();
}

#[test]
fn a_guest_that_plugs_memory_in_and_out_for_ever_holds_nobody_up() {
    const START: u64 = 4 << 30;
    Attack {
        equip: |machine| {
            machine.spec["memory"]["max_mib"] = json!(64);
            None
        },
        size_mib: 64,
        features: 0,
        queues: 1,
        queue_size: 16,
        prepare: |guest| {
            // All blocks in, and then out again, each of them by all that a queue holds.
            let answer = (REQUESTS + 0x100, 10, true);
            let plug = [(REQUESTS, 24, false), answer];
            let unplug = [(REQUESTS + 32, 24, false), answer];
            let chains = [[plug, unplug]; 4];
            let chains: Vec<&[Buffer]> = chains
                .as_flattened()
                .iter()
                .map(<[Buffer; 2]>::as_slice)
                .collect();
            guest
                .store_long(REQUESTS + 12, 1)
                .store_word(REQUESTS + 16, 24)
                .store_word(REQUESTS + 32, 2)
                .describe(QUEUE, &chains)
                .map(START)
        },
        // What it touches is the host's to provide, plugged in or not.
        attack: |guest| guest.exchange(PLACE, QUEUE, 8).store_far(START, 1),
        taken: |stats| stats.devices[0].interrupts,
        at_times: |stats| stats.mem.unwrap().plugged_bytes == 48 << 20,
        held_mib: 0,
    }
    .is_borne();
}

#[test]
fn a_guest_that_connects_for_ever_and_receives_nothing_holds_nobody_up() {
    const CID: u32 = 3;
    // Where somebody listens, and answers nobody; the ports behind that are nobody's.
    const PORT: u32 = 5000;
    const HEADER: u32 = 44;
    // Requests for a connection and data for one, on stream sockets.
    const REQUEST: u32 = 1 << 16 | 1;
    const FILLER: u32 = 5 << 16 | 1;
    const BYTES: u32 = 48 << 10;
    const PACKETS: [(u32, u32, u32); 8] = [
        (PORT, 0, REQUEST),
        (PORT, BYTES, FILLER),
        (PORT, BYTES, FILLER),
        (PORT, BYTES, FILLER),
        (PORT, BYTES, FILLER),
        (PORT, BYTES, FILLER),
        (PORT + 1, 0, REQUEST),
        (PORT + 2, BYTES, FILLER),
    ];
    Attack {
        equip: |machine| {
            let path = machine.path("vsock");
            machine.spec["vsock"] = json!({"cid": CID, "path": path});
            let listener = UnixListener::bind(machine.path(&format!("vsock_{PORT}")));
            Some(listener.unwrap())
        },
        size_mib: 16,
        features: 0,
        queues: 3,
        queue_size: 8,
        prepare: |mut guest| {
            let mut chains = Vec::new();
            for (at, (port, bytes, operation)) in (DATA..).step_by(0x1_0000).zip(PACKETS) {
                let words = [CID, 0, 2, 0, 1, port, bytes, operation, 0, u32::MAX, 0];
                let words = (at..).step_by(4).zip(words);
                guest = words.fold(guest, |guest, (at, word)| guest.store_long(at, word));
                chains.push([(at, HEADER + bytes, false)]);
            }
            let chains: Vec<_> = chains.iter().map(<[Buffer; 1]>::as_slice).collect();
            guest.describe(Queue(1), &chains)
        },
        // From another port each time.
        attack: |guest| {
            let ports = (DATA + 16..).step_by(0x1_0000).take(PACKETS.len());
            ports
                .fold(guest, |guest, port| guest.add_word(port, 1))
                .exchange(PLACE, Queue(1), 8)
        },
        taken: |stats| stats.vsock.unwrap().sent_packets,
        at_times: |stats| {
            let vsock = stats.vsock.unwrap();
            // As many as there can be.
            vsock.open == 512 && vsock.refused > 512
        },
        held_mib: 32,
    }
    .is_borne();
}
