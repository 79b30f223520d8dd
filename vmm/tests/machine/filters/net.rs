//! Network interfaces.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use vmm::hotplug::client::attach_net;

use super::{ALONE, Company, DATA, REQUESTS, Row, in_every_way, without_io_uring};
use crate::driver::Queue;
use crate::network::in_network;

const RECEIVE: Queue = Queue(0);
const TRANSMIT: Queue = Queue(1);

/// What a driver sends at a time; one frame less would not be sent through a ring.
const FRAMES: u16 = 4;

/// A frame to all: virtio's header, addresses, a protocol of nobody's.
const FRAME: [u32; 18] = {
    let mut frame = [0; 18];
    frame[3] = 0xffff_ffff;
    frame[4] = 0x0002_ffff;
    frame[5] = 0x0200_0000;
    frame[6] = 0xb588;
    frame
};

/// How long the host waits between two datagrams for the guest, which may not be there yet.
const PAUSE: Duration = Duration::from_millis(20);

fn ip(arguments: &str) {
    let mut ip = Command::new("ip");
    let status = ip.args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A host that sends datagrams to the guest for as long as it takes: the kernel lets frames through some
/// time after a tap was attached to.
fn host() -> Company {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.set_read_timeout(Some(PAUSE)).unwrap();
    Company::default().work(move || {
        socket.send_to(b"probe", "10.9.0.2:4000").unwrap();
        // Nobody answers, and so this only takes its time.
        socket.recv(&mut [0]).unwrap_err();
    })
}

const ON_A_TAP: Row = Row {
    equip: |machine, _| machine.spec["nets"] = json!([{"tap": "tap0"}]),
    attach: Some(|control, _| {
        let net = serde_json::from_value(json!({"tap": "tap0"})).unwrap();
        attach_net(control, net).unwrap();
    }),
    company: |_| host(),
    start: |guest, place| {
        let guest = guest.set_up_device(place, 0, 2, 16);
        let words = (REQUESTS..).step_by(4).zip(FRAME);
        let guest = words.fold(guest, |guest, (at, word)| guest.store_long(at, word));
        let frame = [(REQUESTS, 4 * 18, false)];
        guest
            .describe(RECEIVE, &[&[(DATA, 2048, true)], &[(DATA, 2048, true)]])
            .describe(TRANSMIT, &[&frame[..]; 2 * FRAMES as usize])
            .start_device(place)
    },
    work: |guest, place, _| {
        guest
            .exchange(place, TRANSMIT, FRAMES)
            .exchange(place, RECEIVE, 1)
            .print("n")
    },
    said: [b"n"; 2],
    has_worked: |stats| {
        let net = stats.nets[0];
        (net.sent_frames, net.sent_dropped, net.received_frames) == (FRAMES.into(), 0, 1)
    },
    ..ALONE
};

fn on_a_network(test: impl FnOnce() + Send) {
    in_network(|| {
        ip("link set tap0 mtu 1500 addrgenmode none");
        ip("addr add 10.9.0.1/24 dev tap0");
        ip("link set tap0 up");
        ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0");
        test();
    });
}

#[test]
fn a_network_interface() {
    on_a_network(|| in_every_way(&ON_A_TAP));
}

#[test]
fn a_network_interface_where_there_is_no_io_uring() {
    on_a_network(|| without_io_uring(|| in_every_way(&ON_A_TAP)));
}
