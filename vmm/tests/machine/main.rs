//! `hostd-vmm` as its users meet it, with guests of a few instructions. Needs /dev/kvm, of any kind.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod attacks;
mod boot;
mod clock;
mod control;
mod damaged;
mod driver;
mod filters;
mod golden;
mod guest;
mod hotplug;
mod images;
mod network;
mod runner;
mod snapshot;

use std::io::{Read, Write};

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::tcgetattr;
use nix::unistd::Pid;
use serde_json::json;
use vmm::control::{ExitReason, ExitStatus, MachineState, Request, Response};
use vmm::{guest_status, layout};

use guest::Guest;
use runner::{Ended, Machine};

fn guest() -> Guest {
    Guest::default()
}

fn reason(ended: &Ended) -> ExitReason {
    ended
        .status
        .as_ref()
        .unwrap_or_else(|| panic!("{ended:?}"))
        .reason
}

#[test]
fn each_way_for_a_guest_to_end_is_told_apart() {
    let power = |offset| u16::try_from(layout::POWER_PORT).unwrap() + offset;
    for (guest, reason, code) in [
        (guest().out_byte(power(0), 0x34), ExitReason::PowerOff, 0),
        (guest().out_byte(power(2), 1), ExitReason::Reset, 0),
        (guest().out_byte(0x64, 0xfe), ExitReason::Reset, 0),
        (guest().exit(0), ExitReason::GuestExit, 0),
        (guest().exit(255), ExitReason::GuestExit, 255),
    ] {
        let ended = Machine::new(guest).run();
        assert_eq!(ended.code, Some(code), "{ended:?}");
        let reported = reason == ExitReason::GuestExit;
        let want = ExitStatus {
            code: reported.then(|| u8::try_from(code).unwrap()),
            ..ExitStatus::new(reason)
        };
        assert_eq!(ended.status, Some(want), "{ended:?}");
        assert_eq!(ended.stderr, "");
    }
}

#[test]
fn a_guest_that_crashes_is_reset_and_not_without_a_word() {
    let ended = Machine::new(guest().crash()).run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let status = ended.status.unwrap();
    assert_eq!(status.reason, ExitReason::Reset);
    let why = status.error.unwrap();
    assert!(
        why.contains("processor 0") && why.contains("triple fault"),
        "{why}"
    );
    assert_eq!(ended.stderr, format!("hostd-vmm: the machine {why}\n"));
}

#[test]
fn a_guest_that_ran_out_of_memory_is_known_as_such() {
    let report = guest_status::exit(137, true);
    let ended = Machine::new(guest().out_long(guest_status::PORT, report)).run();
    assert_eq!(ended.code, Some(137));
    assert!(ended.status.unwrap().oom);
}

#[test]
fn the_serial_port_writes_to_the_console_file() {
    let ended = Machine::new(guest().print("hello, ").print("host\n").exit(0)).run();
    assert_eq!(ended.console, b"hello, host\n");
}

#[test]
fn a_guest_finds_a_virtio_device_at_its_address() {
    let window = u32::try_from(layout::VIRTIO).unwrap();
    let beyond = window + u32::try_from(layout::VIRTIO_BYTES).unwrap();
    let program = guest().print_long(window).print_long(beyond).exit(0);
    let mut machine = Machine::new(program);
    machine.spec["balloon"] = json!(null);
    let ended = machine.run();
    // Nothing answers at the second place: all bits are ones.
    assert_eq!(ended.console, b"virt\xff\xff\xff\xff");
}

#[test]
fn the_boot_timer_reports_once_and_only_when_asked_for() {
    let address = u32::try_from(layout::BOOT_TIMER).unwrap();
    let program = guest()
        .store_byte(address, 1)
        .store_byte(address, 123)
        .store_byte(address, 123)
        .exit(0);
    let mut machine = Machine::new(program.clone());
    machine.arguments = vec!["--boot-timer".to_owned()];
    let ended = machine.run();
    let times: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert!(times["boot_wall_us"].as_u64().unwrap() > 0);
    assert!(times["boot_cpu_us"].as_u64().unwrap() > 0);
    assert_eq!(Machine::new(program).run().stderr, "");
}

#[test]
fn a_guest_that_hangs_is_killed_by_signal_or_by_request() {
    for how in ["signal", "request"] {
        let running = Machine::new(guest()).start();
        let mut client = running.control();
        let state = client.ask(&Request::State {});
        let expected = Response::State {
            state: MachineState::Running,
            ready: false,
        };
        assert_eq!(state, expected);
        match how {
            "signal" => kill(Pid::from_raw(running.pid()), Signal::SIGTERM).unwrap(),
            _ => assert_eq!(client.ask(&Request::Kill {}), Response::Done {}),
        }
        let ended = running.wait();
        assert_eq!(ended.code, Some(137), "{how}");
        assert_eq!(reason(&ended), ExitReason::Killed, "{how}");
    }
}

#[test]
fn a_client_waits_until_the_guest_is_ready() {
    let running = Machine::new(guest().out_long(guest_status::PORT, guest_status::READY)).start();
    let mut client = running.control();
    assert_eq!(client.ask(&Request::WaitReady {}), Response::Done {});
    let ready = Response::State {
        state: MachineState::Running,
        ready: true,
    };
    assert_eq!(client.ask(&Request::State {}), ready);
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    let mut machine = Machine::new(guest());
    machine.spec["cpus"] = json!({"count": 3});
    let running = machine.start();
    let mut client = running.control();
    for _ in 0..20 {
        assert_eq!(client.ask(&Request::Pause {}), Response::Done {});
        let Response::State { state, .. } = client.ask(&Request::State {}) else {
            panic!("not a state");
        };
        assert_eq!(state, MachineState::Paused);
        assert_eq!(client.ask(&Request::Resume {}), Response::Done {});
    }
    client.ask(&Request::Pause {});
    assert_eq!(client.ask(&Request::Kill {}), Response::Done {});
    assert_eq!(running.wait().code, Some(137));
}

#[test]
fn a_request_that_is_none_is_answered_and_an_endless_one_is_not() {
    let running = Machine::new(guest()).start();
    let mut client = running.control();
    for line in [
        "",
        "{",
        r#"{"action":"fly"}"#,
        r#"{"action":"state","x":1}"#,
    ] {
        client.send(line);
        let answer = client.answer();
        assert!(
            matches!(answer, Some(Response::Error { .. })),
            "{line}: {answer:?}"
        );
    }
    let disk = Request::SetDiskLimits {
        disk: 0,
        limits: vmm::spec::DiskLimits::default(),
    };
    let answer = client.ask(&disk);
    assert!(matches!(answer, Response::Error { .. }), "{answer:?}");
    client.send(&"x".repeat(vmm::control::REQUEST_BYTES_MAX));
    assert_eq!(client.answer(), None);
    // Other clients are served as before.
    let answer = running.control().ask(&Request::Stats {});
    assert!(matches!(answer, Response::Stats { .. }), "{answer:?}");
}

#[test]
fn clients_beyond_the_limit_are_turned_away() {
    let running = Machine::new(guest()).start();
    let mut clients: Vec<_> = (0..vmm::control::CLIENTS_MAX)
        .map(|_| running.control())
        .collect();
    for client in &mut clients {
        assert!(matches!(
            client.ask(&Request::State {}),
            Response::State { .. }
        ));
    }
    assert_eq!(running.control().answer(), None);
    assert!(matches!(
        clients[0].ask(&Request::State {}),
        Response::State { .. }
    ));
}

#[test]
fn what_is_not_a_machine_is_refused_and_says_why() {
    for (pointer, value, want) in [
        ("/cpus", json!({"count": 0}), "`/cpus/count` is 0"),
        (
            "/cpus",
            json!({"count": 1, "speed": 2}),
            "unknown field `speed`",
        ),
        ("/gpu", json!(true), "unknown field `gpu`"),
        ("/boot", json!({}), "missing field `kernel`"),
        ("/boot", json!({"kernel": "/nowhere"}), "`/boot/kernel`"),
        (
            "/boot",
            json!({"kernel": "/proc/self/status"}),
            "neither a bzImage nor an ELF",
        ),
        ("/disks", json!([{"path": "/nowhere"}]), "`/disks/0/path`"),
        ("/disks", json!([{"path": "/dev/null"}]), "device `disk0`"),
        ("/nets", json!([{"tap": "no-such-tap"}]), "device `net0`"),
        ("/kvm", json!("/dev/null"), "KVM"),
    ] {
        let mut machine = Machine::new(guest());
        let field = pointer.trim_start_matches('/');
        machine.spec[field] = value;
        let ended = machine.run();
        assert_eq!(ended.code, Some(125), "{ended:?}");
        assert!(ended.stderr.contains(want), "{want}: {}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
}

#[test]
fn a_check_starts_nothing() {
    let mut machine = Machine::new(guest().exit(7));
    machine.arguments = vec!["--check".to_owned()];
    let ended = machine.run();
    assert_eq!((ended.code, ended.status), (Some(0), None));
}

#[test]
fn a_machine_needs_no_files_and_no_rights_but_the_descriptors_it_was_handed() {
    let mut machine = Machine::new(guest().print("by number").exit(9));
    machine.spec = json!({
        "kvm": "fd:3",
        "boot": {"kernel": "fd:4"},
        "memory": {"size_mib": 16},
        "disks": [{"path": "fd:5", "read_only": true}],
        "console": {"path": "fd:6"},
        "exit_status": "fd:7",
    });
    machine.shell = "3<>/dev/kvm 4<kernel 5<kernel 6>console 7>status 8<config".to_owned();
    machine.jail = true;
    let ended = machine.run();
    assert_eq!(ended.code, Some(9), "{ended:?}");
    assert_eq!(ended.console, b"by number");
    assert_eq!(reason(&ended), ExitReason::GuestExit);
}

#[test]
fn a_descriptor_that_was_not_inherited_is_refused() {
    let mut machine = Machine::new(guest());
    machine.spec["boot"]["kernel"] = json!("fd:77");
    let ended = machine.run();
    assert_eq!(ended.code, Some(125));
    assert!(
        ended.stderr.contains("descriptor 77 was not inherited"),
        "{ended:?}"
    );
}

#[test]
fn a_machine_that_has_ended_leaves_no_socket() {
    let machine = Machine::new(guest().exit(0));
    let control = machine.path("control");
    let running = machine.start();
    running.wait();
    assert!(!control.exists());
}

#[test]
fn a_terminal_is_the_guests_and_then_as_it_was() {
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let echo = guest().read_serial().print_read().print("!").exit(0);
    let mut machine = Machine::new(echo);
    machine.spec["console"] = json!("stdio");
    machine.terminal = Some(pty.slave.try_clone().unwrap());
    let running = machine.start();
    // A key that a terminal of its own would have kept until the line ends.
    nix::unistd::write(&pty.master, b"k").unwrap();
    let ended = running.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let mut seen = [0; 8];
    let count = nix::unistd::read(&pty.master, &mut seen).unwrap();
    assert!(seen[..count].ends_with(b"k!"), "{:?}", &seen[..count]);
    assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
}

#[test]
fn input_that_is_longer_than_the_receiver_arrives_whole() {
    let echo = guest().read_serial().print_read();
    let program = guest().print("?").times(1000, &echo).exit(0);
    let mut machine = Machine::new(program);
    let mut terminal = machine.put_at_a_terminal();
    let running = machine.start();
    let mut question = [0];
    terminal.read_exact(&mut question).unwrap();
    assert_eq!(&question, b"?");

    let text: Vec<u8> = (b'a'..=b'z').cycle().take(1000).collect();
    let mut typist = terminal.try_clone().unwrap();
    let typed = text.clone();
    let typing = std::thread::spawn(move || typist.write_all(&typed).unwrap());
    let mut echoed = vec![0; text.len()];
    terminal.read_exact(&mut echoed).unwrap();
    typing.join().unwrap();
    assert_eq!(echoed, text);
    assert_eq!(running.wait().code, Some(0));
}

#[test]
fn a_device_may_be_used_and_reset_again_and_again() {
    let window = u32::try_from(layout::VIRTIO).unwrap();
    let negotiation = [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1), // VERSION_1.
        (0x70, 11),
        (0x30, 0),
        (0x38, 8),
        (0x80, 0x20_0000),
        (0x90, 0x20_1000),
        (0xa0, 0x20_2000),
        (0x44, 1),
        (0x70, 15),
    ];
    let kick_and_reset = [(0x50, 0), (0x50, 0), (0x70, 0)];
    let round = negotiation
        .into_iter()
        .chain(kick_and_reset)
        .fold(guest(), |guest, (register, value)| {
            guest.store_long(window + register, value)
        });
    let ended = Machine::new(guest().times(20, &round).exit(3)).run();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(3), ""));
}

#[test]
fn a_disk_is_free_as_soon_as_its_machine_is_gone() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    for _ in 0..20 {
        let mut machine = Machine::new(guest().exit(0));
        machine.spec["disks"] = json!([{"path": disk.path()}]);
        let ended = machine.run();
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let running = Machine::new(guest()).start();
    let mut deaf = running.control();
    // More answers than the server keeps and the socket holds.
    let sent = deaf.send_until_full(r#"{"action":"state"}"#);
    let answer = running.control().ask(&Request::State {});
    assert!(matches!(answer, Response::State { .. }), "{answer:?}");
    for _ in 0..sent {
        let answer = deaf.answer();
        assert!(matches!(answer, Some(Response::State { .. })), "{answer:?}");
    }
}

#[test]
fn a_guests_streams_may_be_the_machines_own() {
    let mut machine = Machine::new(guest().exit(4));
    let stream =
        |port, path, direction| json!({"port": port, "path": path, "direction": direction});
    machine.spec["vsock"] = json!({
        "cid": 3,
        "path": machine.path("vsock"),
        "streams": [
            stream(1000, "fd:0", "to_guest"),
            stream(1001, "fd:1", "from_guest"),
            stream(1002, "fd:2", "from_guest"),
        ],
    });
    let vsock = machine.path("vsock");
    let ended = machine.run();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(4), ""));
    assert!(!vsock.exists());
}

#[test]
fn a_balloon_is_as_large_as_it_is_asked_to_be_and_no_larger_than_the_memory() {
    let running = Machine::new(guest()).start();
    let mut client = running.control();
    let mut target = |target_mib| client.ask(&Request::Balloon { target_mib });
    assert_eq!(target(16), Response::Done {});
    assert_eq!(target(8), Response::Done {});
    let refused = target(17);
    let Response::Error { message } = &refused else {
        panic!("{refused:?}");
    };
    assert!(message.contains("`target_mib` is 17"), "{message}");
    let Response::Stats { stats } = client.ask(&Request::Stats {}) else {
        panic!("not statistics");
    };
    let balloon = stats.balloon.unwrap();
    // No driver has heard of it.
    assert_eq!((balloon.target_bytes, balloon.actual_bytes), (8 << 20, 0));

    let resized = client.ask(&Request::Memory { size_mib: 17 });
    assert!(matches!(resized, Response::Error { .. }), "{resized:?}");

    let mut without = Machine::new(guest());
    without.spec["balloon"] = json!(null);
    let running = without.start();
    let answer = running.control().ask(&Request::Balloon { target_mib: 0 });
    assert!(matches!(answer, Response::Error { .. }), "{answer:?}");
}

#[test]
fn memory_is_asked_to_grow_by_plugging_in_and_to_shrink_by_the_balloon() {
    let mut machine = Machine::new(guest());
    machine.spec["memory"] = json!({"size_mib": 32, "max_mib": 64});
    let running = machine.start();
    let mut client = running.control();
    for (size_mib, fits) in [(64, true), (65, false), (48, true), (15, false), (20, true)] {
        let answer = client.ask(&Request::Memory { size_mib });
        assert_eq!(answer == Response::Done {}, fits, "{size_mib}: {answer:?}");
        let Response::Stats { stats } = client.ask(&Request::Stats {}) else {
            panic!("not statistics");
        };
        if fits {
            assert_eq!(stats.memory.requested_bytes, size_mib << 20);
        }
        let (size, most) = (stats.memory.size_bytes, stats.memory.most_bytes);
        assert_eq!(
            (size, most),
            (32 << 20, 64 << 20),
            "no driver has heard of it"
        );
    }
}
