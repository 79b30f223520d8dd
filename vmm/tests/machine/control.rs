//! Clients of the control socket, and guests that keep the machine busy.

use std::fs;
use std::time::Instant;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::tempfile;
use vmm::control::{MachineState, MemStats, Request, Response, RngStats, Stats, VsockStats};
use vmm::guest_status;
use vmm::snapshot::file::Kind;
use vmm::spec::DiskLimits;

use crate::driver::{Place, Queue};
use crate::guest::Guest;
use crate::runner::{Client, Machine, PATIENCE, Running};
use crate::snapshot::{Stopped, counting, guest, wait_ready};

pub(crate) fn stats(client: &mut Client) -> Stats {
    let answer = client.ask(&Request::Stats {});
    let Response::Stats { stats } = answer else {
        panic!("not statistics: {answer:?}");
    };
    *stats
}

/// The first statistics for which `wanted` is true.
pub(crate) fn stats_with(client: &mut Client, wanted: impl Fn(&Stats) -> bool) -> Stats {
    let begun = Instant::now();
    loop {
        let stats = stats(client);
        if wanted(&stats) {
            return stats;
        }
        assert!(begun.elapsed() < PATIENCE, "still {stats:?}");
        std::thread::yield_now();
    }
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
    const REQUEST: u32 = 0x30_0000;
    const DATA: u32 = 0x40_0000;
    // A header of zeroes: to read the first sector and those behind it. All heads that are available are
    // that of the same chain.
    let request = [
        (REQUEST, 16, false),
        (DATA, 16 << 20, true),
        (REQUEST + 16, 1, true),
    ];
    let (place, queue) = (Place::Mmio, Queue(0));
    guest()
        .set_up_device(place, 0, 1, 256)
        .describe(queue, &[&request])
        .make_available(queue, 256)
        .out_long(guest_status::PORT, guest_status::READY)
        .start_device(place)
        .wait_for(place.status(), 0xffff)
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

/// Writes a sector to its disk, again and again, each time when the one before is done.
fn writing() -> Guest {
    const FLUSHES: u32 = 1 << 9;
    const REQUEST: u32 = 0x30_0000;
    let request = [
        (REQUEST, 16, false),
        (REQUEST + 0x1000, 512, false),
        (REQUEST + 16, 1, true),
    ];
    let (place, queue) = (Place::Mmio, Queue(0));
    let write = guest().exchange(place, queue, 1);
    guest()
        .set_up_device(place, FLUSHES, 1, 16)
        .store_long(REQUEST, 1)
        .describe(queue, &[&request])
        .start_device(place)
        .out_long(guest_status::PORT, guest_status::READY)
        .forever(&write)
}

#[test]
fn limits_hold_requests_up_as_soon_as_they_are_set_and_until_they_are_loosened() {
    let running = with_disk(writing(), 1 << 20).start();
    wait_ready(&running);
    let mut client = running.control();
    let unlimited = stats_with(&mut client, |stats| stats.disks[0].writes > 100);
    assert_eq!(unlimited.disks[0].throttled, 0);
    let with = |write_bps| Request::SetDiskLimits {
        disk: 0,
        limits: DiskLimits {
            write_bps,
            ..DiskLimits::default()
        },
    };
    // One more sector passes, and takes more than eight minutes to pay for.
    assert_eq!(client.ask(&with(Some(1))), Response::Done {});
    let waiting = stats_with(&mut client, |stats| stats.disks[0].throttled > 0).disks[0];
    for _ in 0..100 {
        assert_eq!(stats(&mut client).disks[0], waiting);
    }
    // What is owed is paid at the new rate, in half a millisecond.
    let mut writes = waiting.writes;
    for write_bps in [Some(1 << 20), None] {
        assert_eq!(client.ask(&with(write_bps)), Response::Done {});
        let later = stats_with(&mut client, |stats| stats.disks[0].writes > writes + 100);
        writes = later.disks[0].writes;
        assert_eq!(later.disks[0].failures, 0);
    }
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
    // Whole ones are asked for, of a guest that has no driver for them.
    let more = Request::Memory { size_mib: 36 };
    assert_eq!(client.ask(&more), Response::Done {});
    let mem = MemStats {
        size_bytes: 32 << 20,
        requested_bytes: 4 << 20,
        plugged_bytes: 0,
    };
    assert_eq!(stats(&mut client).mem, Some(mem));
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

#[test]
fn statistics_tell_where_a_processors_time_went_and_what_devices_have_done() {
    let mut machine = counting();
    machine.spec["cpus"] = json!({"count": 2});
    machine.spec["vsock"] = json!({"cid": 3, "path": machine.path("vsock")});
    let running = machine.start();
    wait_ready(&running);
    let mut client = running.control();
    let first = stats(&mut client).vcpu_times.unwrap();
    assert_eq!(first.len(), 2);
    // The guest runs as long as it is let, so this ends.
    let later = (0..).map(|_| stats(&mut client).vcpu_times.unwrap());
    let mut later = later.skip_while(|later| later[0].run_ns == first[0].run_ns);
    assert!(later.next().unwrap()[0].wait_ns >= first[0].wait_ns);
    let stats = stats(&mut client);
    // It told by a register of ports that it was ready.
    let exits = stats.vcpu_exit_reasons[0];
    assert!(exits.port_writes > 0, "{exits:?}");
    assert_eq!(exits.sum(), stats.vcpu_exits[0]);
    assert_eq!(stats.vcpu_exit_reasons.len(), 2);
    assert_eq!(stats.vsock, Some(VsockStats::default()));
    assert_eq!(stats.rng, Some(RngStats::default()));
}

/// Has all threads of the machine's processors take turns on one of the host's.
fn share_one_processor(running: &Running) {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut one = CpuSet::new();
    let first = (0..CpuSet::count()).find(|number| allowed.is_set(*number).unwrap());
    one.set(first.unwrap()).unwrap();
    let tasks = fs::read_dir(format!("/proc/{}/task", running.pid())).unwrap();
    let mut pinned = 0;
    for task in tasks {
        let task = task.unwrap();
        let name = fs::read_to_string(task.path().join("comm")).unwrap();
        if name.starts_with("vcpu") {
            let thread = task.file_name().into_string().unwrap().parse().unwrap();
            sched_setaffinity(Pid::from_raw(thread), &one).unwrap();
            pinned += 1;
        }
    }
    assert_eq!(pinned, 2);
}

#[test]
fn a_processor_waits_while_another_has_the_hosts() {
    let ready = guest()
        .start_others_to_spin(0x2000, 1)
        .out_long(guest_status::PORT, guest_status::READY);
    let mut machine = Machine::new(ready.forever(&guest()));
    machine.spec["cpus"] = json!({"count": 2});
    let running = machine.start();
    wait_ready(&running);
    share_one_processor(&running);
    let mut client = running.control();
    let first = stats(&mut client).vcpu_times.unwrap();
    // Neither ever rests, so that one waits at least as long as the other runs. What the kernel has not
    // counted yet, a turn at the most, matters less and less.
    let waited = |stats: &Stats| {
        let later = stats.vcpu_times.as_ref().unwrap();
        [(0, 1), (1, 0)].into_iter().all(|(one, other)| {
            let wait_ns = later[one].wait_ns - first[one].wait_ns;
            let run_ns = later[other].run_ns - first[other].run_ns;
            run_ns > 100_000_000 && 2 * wait_ns > run_ns
        })
    };
    stats_with(&mut client, waited);
}

const LOOK_ON: Request = Request::Console { input: false };
const TYPE: Request = Request::Console { input: true };

/// Greets, and repeats what is typed.
fn echoing() -> Guest {
    let echo = guest().read_serial().print_read();
    let ready = guest().out_long(guest_status::PORT, guest_status::READY);
    ready.print("hello ").forever(&echo)
}

#[test]
fn a_connection_becomes_the_guests_console() {
    let running = Machine::new(echoing()).start();
    wait_ready(&running);
    let [mut typing, mut looking, mut late] = [(); 3].map(|()| running.control());
    assert_eq!(typing.ask(&TYPE), Response::Console {});
    typing.expect("hello ");
    // More than the port's receiver has room for.
    let text = "0123456789".repeat(50);
    typing.type_in(text.as_bytes());
    assert_eq!(looking.ask(&LOOK_ON), Response::Console {});
    typing.expect(&text);
    looking.expect(&format!("hello {text}"));
    let message = refusal(&mut late, &TYPE);
    assert!(message.contains("busy"), "{message}");
    // It can still ask for something else.
    assert_eq!(stats(&mut late).devices.len(), 2);

    // One who has gone types no more, as soon as the machine has seen it.
    drop(typing);
    let mut answers = (0..).map(|_| late.ask(&TYPE));
    assert!(answers.any(|answer| answer == Response::Console {}));
    late.expect(&format!("hello {text}"));
    late.type_in(b"!");
    late.expect("!");
    looking.expect("!");
    // One who types no more may go on looking.
    late.finish_sending();
    let mut other = running.control();
    let mut answers = (0..).map(|_| other.ask(&TYPE));
    assert!(answers.any(|answer| answer == Response::Console {}));
    other.expect(&format!("hello {text}!"));
    other.type_in(b"?");
    for client in [&mut other, &mut late, &mut looking] {
        client.expect("?");
    }
}

#[test]
fn a_console_that_is_standard_input_is_typed_into_there_alone() {
    let mut machine = Machine::new(echoing());
    let _terminal = machine.put_at_a_terminal();
    let running = machine.start();
    let mut client = running.control();
    let message = refusal(&mut client, &TYPE);
    assert!(message.contains("busy"), "{message}");
    assert_eq!(client.ask(&LOOK_ON), Response::Console {});
    client.expect("hello ");
}

#[test]
fn a_console_is_not_attached_with_other_requests_behind_it() {
    let running = Machine::new(echoing()).start();
    let mut client = running.control();
    client.send("{\"action\":\"console\"}\n{\"action\":\"state\"}");
    let refused = client.answer();
    assert!(
        matches!(refused, Some(Response::Error { .. })),
        "{refused:?}"
    );
    assert!(matches!(client.answer(), Some(Response::State { .. })));
}

/// The guest goes on to its end while nobody reads what it writes.
#[test]
fn one_who_does_not_read_the_console_does_not_hold_the_guest_up() {
    // More than the sockets and the machine keep for a client.
    let line = guest().print(&"x".repeat(100));
    let ready = guest().out_long(guest_status::PORT, guest_status::READY);
    let start = ready.read_serial();
    let running = Machine::new(start.times(3000, &line).print("end").exit(0)).start();
    wait_ready(&running);
    let mut client = running.control();
    assert_eq!(client.ask(&TYPE), Response::Console {});
    client.type_in(b"!");
    let ended = running.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.console.len(), 300_003);
}
