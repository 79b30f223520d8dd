//! The device on a real tap in a network namespace of each test's own. Needs root and `ip`.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers are the tests' own, and small"
)]

mod offloads;

use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::read;
use proptest::test_runner::TestRunner;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MTU};

use super::*;
use crate::virtio::tap::TapError;
use crate::virtio::testing::{
    Buffer, Driver, PATIENCE, any_noise, assert_held_chains_are_bounded, assert_noise_is_survived,
    assert_tricks_are_the_guests_error, noise_config,
};

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(super) const HOST: [u8; 4] = [10, 9, 0, 1];
pub(super) const GUEST: [u8; 4] = [10, 9, 0, 2];
pub(super) const PORT: u16 = 4000;

/// What comes before the payload of a datagram: virtio, Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 12 + 14 + 20 + 8;

/// Runs a test in a namespace with an interface `tap0`, which the kernel removes with it.
pub(super) fn in_network(test: impl FnOnce() + Send + 'static) {
    thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
        for arguments in [
            "tuntap add dev tap0 mode tap",
            "link set tap0 address 02:00:00:00:00:01 mtu 9000 addrgenmode none",
            "addr add 10.9.0.1/24 dev tap0",
            "link set tap0 up",
            "neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0",
        ] {
            ip(arguments);
        }
        test();
    })
    .join()
    .unwrap();
}

/// The program inherits this thread's namespace.
fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// The kernel lets frames through some time after a tap was attached to: not before one has come. `guest` is
/// who has it.
pub(super) fn wait_for_link(tap: &Tap, host: &UdpSocket, guest: [u8; 4]) {
    let deadline = Instant::now() + PATIENCE;
    let mut frame = [0; 2048];
    loop {
        host.send_to(b"probe", (Ipv4Addr::from(guest), PORT))
            .unwrap();
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(20u8)).unwrap() > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "the tap's link does not come up");
    }
    while read(tap.as_fd(), &mut frame).is_ok() {}
}

struct Bench {
    net: Net,
    driver: Driver,
    host: UdpSocket,
}

impl Bench {
    fn new(features: &[u32]) -> Bench {
        let tap = Tap::open("tap0").unwrap();
        let host = UdpSocket::bind((Ipv4Addr::from(HOST), PORT)).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        wait_for_link(&tap, &host, GUEST);
        let mut net = Net::new(tap, GUEST_MAC).unwrap();
        let features = features.iter().fold(0, |all, bit| all | 1 << bit);
        let driver = Driver::start_with(&mut net, features);
        Bench { net, driver, host }
    }

    /// The host's network sends the guest a datagram.
    fn host_sends(&self, payload: &[u8]) {
        self.host
            .send_to(payload, (Ipv4Addr::from(GUEST), PORT))
            .unwrap();
    }

    fn offer(&mut self, count: usize, len: u32) -> Vec<(u16, Buffer)> {
        (0..count)
            .map(|_| {
                let buffer = self.driver.writable(len);
                (self.driver.offer(RECEIVE, &[buffer]), buffer)
            })
            .collect()
    }

    /// Offers buffers again that have been used.
    fn offer_again(&mut self, used: &[(u16, u32)], offered: &mut [(u16, Buffer)]) {
        for (head, _) in used {
            let slot = offered
                .iter_mut()
                .find(|(offered, _)| offered == head)
                .unwrap();
            slot.0 = self.driver.offer(RECEIVE, &[slot.1]);
        }
    }

    fn kick(&mut self, queue: usize) {
        let _ = self.driver.kick(&mut self.net, queue).unwrap();
    }

    fn wait_received(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.driver.wait_used(&mut self.net, RECEIVE, count)
    }

    /// The guest has a frame to send, in these pieces.
    fn guest_offers(&mut self, pieces: &[&[u8]]) -> u16 {
        let buffers: Vec<_> = pieces
            .iter()
            .map(|piece| self.driver.readable(piece))
            .collect();
        let head = self.driver.offer(TRANSMIT, &buffers);
        self.kick(TRANSMIT);
        head
    }

    /// The same, and it is sent.
    fn guest_sends(&mut self, pieces: &[&[u8]]) {
        let head = self.guest_offers(pieces);
        assert_eq!(
            self.driver.wait_used(&mut self.net, TRANSMIT, 1),
            [(head, 0)]
        );
    }

    fn host_receives(&self) -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        let len = self.host.recv(&mut bytes).unwrap();
        bytes[..len].to_vec()
    }

    fn content(&self, used: &[(u16, u32)], offered: &[(u16, Buffer)]) -> Vec<u8> {
        used.iter()
            .flat_map(|(head, len)| {
                let (_, buffer) = offered.iter().find(|(offered, _)| offered == head).unwrap();
                self.driver.read(buffer.address, *len as usize)
            })
            .collect()
    }

    fn stats(&self) -> NetStats {
        self.net.handle().stats()
    }
}

/// A frame with a datagram for the host, virtio header included.
fn frame(payload: &[u8]) -> Vec<u8> {
    let udp_len = u16::try_from(payload.len() + 8).unwrap();
    let mut ip = [
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    ip[2..4].copy_from_slice(&(udp_len + 20).to_be_bytes());
    ip[12..16].copy_from_slice(&GUEST);
    ip[16..20].copy_from_slice(&HOST);
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = !((sum >> 16) + (sum & 0xffff)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [
        &[0; HEADER_BYTES][..],
        &HOST_MAC,
        &GUEST_MAC,
        &[8, 0],
        &ip,
        &PORT.to_be_bytes(),
        &PORT.to_be_bytes(),
        &udp_len.to_be_bytes(),
        &[0, 0], // No checksum.
        payload,
    ]
    .concat()
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

#[test]
fn a_frame_from_the_host_lands_in_a_buffer() {
    for features in [&[][..], &[VIRTIO_NET_F_MRG_RXBUF]] {
        in_network(move || {
            let mut bench = Bench::new(features);
            let offered = bench.offer(2, 2048);
            bench.kick(RECEIVE);
            bench.host_sends(&payload(100));
            let used = bench.wait_received(1);
            assert_eq!(used, [(offered[0].0, (HEADERS + 100) as u32)]);
            let frame = bench.content(&used, &offered);
            assert_eq!(frame[NUM_BUFFERS..HEADER_BYTES], [1, 0]);
            assert_eq!(frame[HEADER_BYTES..HEADER_BYTES + 6], GUEST_MAC);
            assert_eq!(frame[HEADERS..], payload(100));
            assert_eq!(bench.stats().received_frames, 1);
            assert_eq!(
                bench.stats().received_bytes,
                (HEADERS + 100 - HEADER_BYTES) as u64
            );
        });
    }
}

#[test]
fn checksums_are_left_to_a_guest_that_accepts_that_and_computed_for_another() {
    for (features, flags) in [(&[][..], 0), (&[VIRTIO_NET_F_GUEST_CSUM], 1)] {
        in_network(move || {
            let mut bench = Bench::new(features);
            let offered = bench.offer(1, 2048);
            bench.kick(RECEIVE);
            bench.host_sends(&payload(100));
            let used = bench.wait_received(1);
            assert_eq!(bench.content(&used, &offered)[0], flags);
        });
    }
}

#[test]
fn the_configuration_says_the_address_and_the_mtu_if_there_is_one() {
    in_network(|| {
        let mut net = Net::new(Tap::open("tap0").unwrap(), GUEST_MAC).unwrap();
        for (mtu, bytes) in [(None, [0, 0]), (Some(9000), [0x28, 0x23])] {
            net = net.with_mtu(mtu);
            let offered = net.info().features & 1 << VIRTIO_NET_F_MTU != 0;
            assert_eq!(offered, mtu.is_some());
            assert_eq!(net.config()[..6], GUEST_MAC);
            assert_eq!(net.config()[10..], bytes);
            let own = net.save().unwrap().own;
            net.restore(&own).unwrap();
            net = net.with_mtu(Some(1400));
            net.restore(&own).unwrap_err();
        }
    });
}

#[test]
fn a_driver_of_a_restored_device_is_told_once_of_another_address() {
    in_network(|| {
        let mut net = Net::new(Tap::open("tap0").unwrap(), GUEST_MAC).unwrap();
        let mut own = net.save().unwrap().own;
        for (mac, want) in [(GUEST_MAC, Signal::NONE), (HOST_MAC, Signal::CONFIG)] {
            own["mac"] = serde_json::json!(mac);
            net.restore(&own).unwrap();
            let mut driver = Driver::start(&mut net);
            assert_eq!(driver.kick(&mut net, RECEIVE).unwrap(), want);
            assert_eq!(driver.kick(&mut net, RECEIVE).unwrap(), Signal::NONE);
            // It finds the one that the device was made with.
            assert_eq!(net.config()[..6], GUEST_MAC);
        }
    });
}

/// So slow that a second frame would come long after the test.
const SLOW: NetLimits = NetLimits {
    receive_bps: Some(1),
    receive_pps: None,
    send_bps: Some(1),
    send_pps: None,
};

#[test]
fn frames_beyond_a_limit_wait_and_pass_when_it_is_raised() {
    in_network(|| {
        let mut bench = Bench::new(&[]);
        bench.net.handle().set_limits(SLOW);
        let offered = bench.offer(8, 2048);
        bench.kick(RECEIVE);
        for byte in 1..=3 {
            bench.host_sends(&payload(byte));
        }
        let mut used = bench.wait_received(1);
        bench.kick(RECEIVE);
        assert_eq!(
            bench.driver.used(RECEIVE),
            [],
            "one is paid for a byte a second"
        );
        let sent = frame(&payload(64));
        bench.guest_sends(&[&sent]);
        assert_eq!(bench.host_receives(), payload(64));
        bench.guest_offers(&[&sent]);
        assert_eq!(bench.stats().sent_frames, 1);
        // Neither the tap nor anything else that is ready is polled for meanwhile.
        let tokens = bench.net.interests().into_iter().map(|one| one.token);
        assert_eq!(
            tokens.collect::<Vec<_>>(),
            [throttle::TIMER, throttle::LIMITS]
        );
        assert!(!bench.driver.turn(&mut bench.net, Duration::ZERO));

        let own = bench.net.save().unwrap().own;
        bench.net.handle().set_limits(NetLimits::default());
        used.extend(bench.wait_received(2));
        let frames = bench.content(&used, &offered);
        assert_eq!(frames.len(), 3 * HEADERS + 6);
        assert_eq!(bench.stats().sent_frames, 2);
        assert_eq!(bench.host_receives(), payload(64));
        // What a snapshot had applies again.
        bench.net.restore(&own).unwrap();
        assert_eq!(bench.net.throttle.shared().get(), SLOW);
    });
}

#[test]
fn a_limit_is_kept_over_time() {
    in_network(|| {
        let mut bench = Bench::new(&[]);
        let limits = NetLimits {
            send_pps: Some(100),
            ..NetLimits::default()
        };
        bench.net.handle().set_limits(limits);
        let sent = frame(&payload(64));
        let begun = Instant::now();
        for _ in 0..40 {
            bench.guest_offers(&[&sent]);
        }
        while bench.stats().sent_frames < 40 {
            assert!(bench.driver.turn(&mut bench.net, PATIENCE));
        }
        // A tenth of a second passes at once; a frame more takes a hundredth.
        assert!(begun.elapsed() >= Duration::from_millis(280), "{begun:?}");
    });
}

#[test]
fn no_combination_of_features_makes_the_tap_refuse() {
    in_network(|| {
        let mut net = Net::new(Tap::open("tap0").unwrap(), GUEST_MAC).unwrap();
        for features in 0..1 << 11 {
            net.activate(features).unwrap();
        }
    });
}

#[test]
fn a_large_frame_is_spread_over_merged_buffers() {
    in_network(|| {
        let mut bench = Bench::new(&[VIRTIO_NET_F_MRG_RXBUF]);
        let offered = bench.offer(8, 1024);
        bench.kick(RECEIVE);
        bench.host_sends(&payload(5000));
        let used = bench.wait_received(5);
        assert_eq!(used.len(), 5);
        let frame = bench.content(&used, &offered);
        assert_eq!(frame[NUM_BUFFERS..HEADER_BYTES], [5, 0]);
        assert_eq!(frame[HEADERS..], payload(5000));
    });
}

#[test]
fn a_frame_larger_than_the_buffers_waits_for_more_of_them() {
    in_network(|| {
        let mut bench = Bench::new(&[VIRTIO_NET_F_MRG_RXBUF]);
        let mut offered = bench.offer(2, 1024);
        bench.kick(RECEIVE);
        bench.host_sends(&payload(5000));
        bench.host_sends(&payload(10));
        while bench.net.receiving.pending.is_none() {
            bench
                .driver
                .turn(&mut bench.net, Duration::from_millis(100));
        }
        assert_eq!(bench.driver.used(RECEIVE), []);
        // Nothing may be polled that only buffers can help: it would be polled without end.
        assert_eq!(bench.net.interests(), []);
        offered.extend(bench.offer(2, 1024));
        bench.kick(RECEIVE);
        assert_eq!(bench.driver.used(RECEIVE), []);
        offered.extend(bench.offer(2, 1024));
        bench.kick(RECEIVE);
        let used = bench.wait_received(6);
        let frames = bench.content(&used, &offered);
        assert_eq!(frames[HEADERS..HEADERS + 5000], payload(5000));
        assert_eq!(frames[HEADERS + 5000 + HEADERS..], payload(10));
        assert_eq!(bench.stats().received_dropped, 0);
    });
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_the_next_one_is_not() {
    // Without merging, a frame must fit one buffer; with it, all buffers of the queue.
    for (features, len) in [(&[][..], 512), (&[VIRTIO_NET_F_MRG_RXBUF], 16)] {
        in_network(move || {
            let mut bench = Bench::new(features);
            let offered = bench.offer(256, len);
            bench.kick(RECEIVE);
            bench.host_sends(&payload(5000));
            bench.host_sends(&payload(50));
            let needed = (HEADERS + 50).div_ceil(len as usize);
            let used = bench.wait_received(needed);
            assert_eq!(used.len(), needed);
            assert_eq!(bench.content(&used, &offered)[HEADERS..], payload(50));
            assert_eq!(bench.stats().received_dropped, 1, "{features:?}");
        });
    }
}

/// CVE-2020-16843: a flood of frames that found no buffers stopped reception for good.
#[test]
fn reception_goes_on_after_a_flood_that_found_no_buffers() {
    in_network(|| {
        let mut bench = Bench::new(&[VIRTIO_NET_F_MRG_RXBUF]);
        let mut offered = bench.offer(4, 2048);
        bench.kick(RECEIVE);
        for round in 0..20 {
            for _ in 0..200 {
                bench.host_sends(&payload(round));
            }
            // The interface's own queue is full by now, and takes more once it has been emptied.
            for _ in 0..10 {
                let used = bench.wait_received(4);
                assert_eq!(bench.net.interests(), [], "no buffers, nothing to poll for");
                bench.offer_again(&used, &mut offered);
                bench.kick(RECEIVE);
            }
        }
        assert!(bench.stats().received_frames >= 800);
    });
}

#[test]
fn a_frame_of_the_guests_reaches_the_host_in_however_many_pieces() {
    in_network(|| {
        let mut bench = Bench::new(&[]);
        let sent = frame(&payload(1000));
        bench.guest_sends(&[&sent]);
        bench.guest_sends(&[&sent[..HEADER_BYTES], &sent[HEADER_BYTES..]]);
        bench.guest_sends(&[&sent[..5], &sent[5..30], &[], &sent[30..31], &sent[31..]]);
        for _ in 0..3 {
            assert_eq!(bench.host_receives(), payload(1000));
        }
        let stats = bench.stats();
        assert_eq!((stats.sent_frames, stats.sent_dropped), (3, 0));
        assert_eq!(stats.sent_bytes, 3 * (sent.len() - HEADER_BYTES) as u64);
    });
}

#[test]
fn frames_that_are_none_are_dropped_and_the_next_one_is_sent() {
    in_network(|| {
        let mut bench = Bench::new(&[]);
        let good = frame(&payload(64));
        let mut bad_offload = good.clone();
        bad_offload[..10].fill(0xff);
        bench.guest_sends(&[&good[..1]]);
        bench.guest_sends(&[&good[..HEADER_BYTES]]);
        bench.guest_sends(&[&good[..FRAME_BYTES_MIN - 1]]);
        bench.guest_sends(&[&bad_offload]);
        bench.guest_sends(&[&good, &vec![0; FRAME_BYTES_MAX]]);
        let writable = bench.driver.writable(100);
        let head = bench.driver.offer(TRANSMIT, &[writable]);
        bench.kick(TRANSMIT);
        assert_eq!(bench.driver.used(TRANSMIT), [(head, 0)]);
        assert_eq!(bench.stats().sent_dropped, 6);
        bench.guest_sends(&[&good]);
        assert_eq!(bench.host_receives(), payload(64));
    });
}

#[test]
fn an_interface_that_is_deleted_leaves_the_guest_with_a_dead_cable() {
    in_network(|| {
        let mut bench = Bench::new(&[]);
        bench.offer(4, 2048);
        bench.kick(RECEIVE);
        ip("link del tap0");
        while !bench.net.interests().is_empty() {
            assert!(bench.driver.turn(&mut bench.net, Duration::from_secs(10)));
        }
        bench.guest_sends(&[&frame(b"lost")]);
        assert_eq!(bench.stats().sent_dropped, 1);
    });
}

#[test]
fn after_a_reset_the_next_driver_is_served() {
    in_network(|| {
        let mut bench = Bench::new(&[VIRTIO_NET_F_MRG_RXBUF]);
        bench.offer(2, 1024);
        bench.kick(RECEIVE);
        bench.host_sends(&payload(5000));
        bench.driver.turn(&mut bench.net, Duration::from_secs(10));
        bench.net.reset();
        assert_eq!(bench.net.interests(), []);
        bench.driver = Driver::start(&mut bench.net);
        let offered = bench.offer(1, 2048);
        bench.kick(RECEIVE);
        bench.host_sends(&payload(7));
        let used = bench.wait_received(1);
        assert_eq!(bench.content(&used, &offered)[HEADERS..], payload(7));
    });
}

#[test]
fn what_is_no_tap_is_refused() {
    in_network(|| {
        assert!(matches!(Tap::open("absent"), Err(TapError::Missing { .. })));
        assert!(matches!(Tap::open("lo"), Err(TapError::Attach { .. })));
        for name in ["", "a/b", "a\0b", "sixteen-letters-"] {
            assert!(
                matches!(Tap::open(name), Err(TapError::Name { .. })),
                "{name:?}"
            );
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Tap::from_fd(null.into()),
            Err(TapError::NotTap(_))
        ));
        // One that is in use, and then the same one by its descriptor.
        let tap = Tap::open("tap0").unwrap();
        assert!(matches!(Tap::open("tap0"), Err(TapError::Attach { .. })));
        let fd = tap.as_fd().try_clone_to_owned().unwrap();
        drop(tap);
        Tap::from_fd(fd).unwrap();
    });
}

#[test]
fn hostile_drivers_are_survived() {
    in_network(|| {
        let mut net = Net::new(Tap::open("tap0").unwrap(), GUEST_MAC).unwrap();
        assert_tricks_are_the_guests_error(&mut net);
        let buffer = Buffer {
            address: 0x10_0000,
            len: 2048,
            writable: true,
        };
        assert_held_chains_are_bounded(&mut net, RECEIVE, buffer);
        // A receive buffer without room for a header.
        let mut driver = Driver::start(&mut net);
        let buffer = driver.writable(HEADER_BYTES as u32 - 1);
        driver.offer(RECEIVE, &[buffer]);
        let result = driver.kick(&mut net, RECEIVE);
        assert!(matches!(
            result,
            Err(DeviceError::Guest { index: RECEIVE, .. })
        ));
        net.reset();
        // Programs that other tests start may hold a closed tap for a moment.
        let tap = net.tap;
        let mut runner = TestRunner::new(noise_config());
        let result = runner.run(&any_noise(2), |noise| {
            let fd = tap.as_fd().try_clone_to_owned().unwrap();
            let mut net = Net::new(Tap::from_fd(fd).unwrap(), GUEST_MAC).unwrap();
            assert_noise_is_survived(&mut net, &noise);
            Ok(())
        });
        result.unwrap();
    });
}
