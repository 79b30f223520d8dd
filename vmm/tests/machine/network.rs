//! Network interfaces of a test's own.

use std::io::{Read, Write};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use vmm::control::{Request, Response};
use vmm::snapshot::file::Kind;
use vmm::spec::NetLimits;
use vmm::{guest_status, layout};

use crate::damaged::Copy;
use crate::runner::Machine;
use crate::snapshot::{guest, wait_ready};

/// Runs a test, and the machines that it starts, in a network namespace with an interface `tap0`. The
/// kernel removes it with the last of them.
pub(crate) fn in_network(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            let mut ip = Command::new("ip");
            let status = ip.args(["tuntap", "add", "dev", "tap0", "mode", "tap"]);
            assert!(status.status().unwrap().success());
            test();
        };
        scope.spawn(test).join().unwrap();
    });
}

/// A machine with a network interface, whose guest tells the beginning of its address once it has read a
/// byte.
fn machine() -> Machine {
    // The device's own configuration begins with the address.
    let address = u32::try_from(layout::VIRTIO).unwrap() + 0x100;
    let ready = guest().out_long(guest_status::PORT, guest_status::READY);
    let mut machine = Machine::new(ready.read_serial().print_long(address).exit(5));
    machine.spec["nets"] = json!([{"tap": "tap0", "limits": {"send_pps": 7}}]);
    machine
}

#[test]
fn limits_are_replaced_while_the_machine_runs_and_saved() {
    in_network(|| {
        let running = machine().start();
        wait_ready(&running);
        let limits = |value| serde_json::from_value::<NetLimits>(value).unwrap();
        let mut client = running.control();
        let saved = |name| {
            let snapshot = running.snapshot(name, Kind::Full).unwrap();
            let state = Copy::of(&snapshot).line(2);
            limits(state["devices"]["virtio"][0]["transport"]["device"]["limits"].clone())
        };
        assert_eq!(saved("first"), limits(json!({"send_pps": 7})));
        let new = limits(json!({"receive_bps": 1000, "send_bps": 2000}));
        let request = |net| Request::SetNetLimits { net, limits: new };
        assert_eq!(client.ask(&request(0)), Response::Done {});
        assert_eq!(saved("second"), new);
        let Response::Error { message } = client.ask(&request(1)) else {
            panic!("there is one");
        };
        assert!(message.contains("no network interface 1"), "{message}");
    });
}

#[test]
fn a_restored_machine_has_the_address_that_it_is_given() {
    in_network(|| {
        let mut original = machine().start();
        wait_ready(&original);
        let snapshot = original.snapshot("full", Kind::Full).unwrap();
        original.end();
        for (mac, want) in [
            (None, [2, 0, 0, 0]),
            (Some("0a:11:22:33:44:55"), [10, 17, 34, 51]),
        ] {
            let mut machine = Machine::restored(&[&snapshot.folder]);
            machine.spec["nets"] = json!({"net0": {"tap": "tap0", "mac": mac}});
            let mut terminal = machine.put_at_a_terminal();
            let running = machine.start();
            wait_ready(&running);
            terminal.write_all(b"x").unwrap();
            let mut told = [0; 4];
            terminal.read_exact(&mut told).unwrap();
            assert_eq!(told, want);
            assert_eq!(running.wait().code, Some(5));
        }
        let mut wrong = Machine::restored(&[&snapshot.folder]);
        wrong.spec["nets"] = json!({"net0": {"tap": "tap0", "mac": "group"}});
        let ended = wrong.run();
        assert!(ended.stderr.contains("`/nets/0/mac`"), "{}", ended.stderr);
    });
}
