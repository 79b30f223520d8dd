//! Frames that others are to cut into segments (VIRTIO_NET_HDR_GSO_TCPV4): a guest sends some to another,
//! and the host forwards them from one tap to the other.

use std::fs;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
};

use super::*;

/// The other guest, in a network of its own.
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 4];
const OTHER: [u8; 4] = [10, 8, 0, 2];

/// Data of a segment, and of a frame that is still to be cut.
const SEGMENT_BYTES: usize = 1000;
const DATA_BYTES: usize = 20_000;

/// Where headers and the data are in a frame.
const IP: usize = HEADER_BYTES + 14;
const TCP: usize = IP + 20;
const DATA: usize = TCP + 20;

/// Where the checksum is in TCP's header.
const TCP_CHECKSUM: usize = 16;

/// Runs a test in a namespace with `tap0` and `tap1`, between which the kernel forwards.
fn between_networks(test: impl FnOnce() + Send + 'static) {
    in_network(|| {
        for arguments in [
            "tuntap add dev tap1 mode tap",
            "link set tap1 address 02:00:00:00:00:03 addrgenmode none",
            "addr add 10.8.0.1/24 dev tap1",
            "link set tap1 up",
            "neigh add 10.8.0.2 lladdr 02:00:00:00:00:04 dev tap1",
        ] {
            ip(arguments);
        }
        // That of this thread's namespace.
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        test();
    });
}

/// The other guest's device, whose cable is `tap1`, once the kernel lets frames through.
fn other(features: &[u32]) -> (Net, Driver) {
    let tap = Tap::open("tap1").unwrap();
    let host = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    wait_for_link(&tap, &host, OTHER);
    let mut net = Net::new(tap, OTHER_MAC).unwrap();
    let features = features.iter().fold(0, |all, bit| all | 1 << bit);
    let driver = Driver::start_with(&mut net, features);
    (net, driver)
}

/// The sum of 16-bit words that checksums are made of.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| (*low).into());
    let mut sum: u32 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// What TCP's checksum also covers of a packet with so many bytes behind its IP header.
fn pseudo_header(bytes: usize) -> Vec<u8> {
    let bytes = u16::try_from(bytes).unwrap().to_be_bytes();
    [&GUEST[..], &OTHER, &[0, 6], &bytes].concat()
}

/// A frame with more data than a segment has, virtio header included.
fn uncut(data: &[u8]) -> Vec<u8> {
    let [segment, headers, start] = [SEGMENT_BYTES, DATA - HEADER_BYTES, TCP - HEADER_BYTES]
        .map(|value| (value as u16).to_le_bytes());
    let header = [
        &[
            VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
            VIRTIO_NET_HDR_GSO_TCPV4 as u8,
        ][..],
        &headers,
        &segment,
        &start,
        &(TCP_CHECKSUM as u16).to_le_bytes(),
        &[0; 2],
    ]
    .concat();
    let length = u16::try_from(20 + 20 + data.len()).unwrap().to_be_bytes();
    let mut ip = [
        &[0x45, 0][..],
        &length,
        &[0, 0, 0, 0, 64, 6, 0, 0],
        &GUEST,
        &OTHER,
    ]
    .concat();
    let checksum = (!sum(&[&ip])).to_be_bytes();
    ip[10..12].copy_from_slice(&checksum);
    // From the first byte on, with an acknowledgement.
    let mut tcp = [
        &PORT.to_be_bytes()[..],
        &PORT.to_be_bytes(),
        &[0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0],
    ]
    .concat();
    // Whoever cuts it goes on from here.
    let begun = sum(&[&pseudo_header(20 + data.len())]).to_be_bytes();
    tcp[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&begun);
    [&header[..], &HOST_MAC, &GUEST_MAC, &[8, 0], &ip, &tcp, data].concat()
}

/// Has a guest send `count` frames, all of which are on their way when this returns.
fn send(count: usize) -> Bench {
    let mut bench = Bench::new(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4]);
    let frame = uncut(&payload(DATA_BYTES));
    for _ in 0..count {
        let pieces = [
            &frame[..HEADER_BYTES],
            &frame[HEADER_BYTES..DATA],
            &frame[DATA..],
        ];
        let pieces = pieces.map(|piece| bench.driver.readable(piece));
        bench.driver.offer(TRANSMIT, &pieces);
    }
    bench.kick(TRANSMIT);
    bench.driver.wait_used(&mut bench.net, TRANSMIT, count);
    let stats = bench.stats();
    assert_eq!((stats.sent_frames, stats.sent_dropped), (count as u64, 0));
    assert_eq!(
        stats.sent_bytes,
        (count * (frame.len() - HEADER_BYTES)) as u64
    );
    bench
}

#[test]
fn frames_that_are_not_cut_go_from_guest_to_guest_in_merged_buffers() {
    // One alone by a call of its own, several through a ring.
    for count in [1, 5] {
        between_networks(move || {
            let (mut net, mut driver) = other(&[
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_MRG_RXBUF,
            ]);
            let needed = (DATA + DATA_BYTES).div_ceil(4096);
            let buffers: Vec<_> = (0..count * needed)
                .map(|_| {
                    let buffer = driver.writable(4096);
                    (driver.offer(RECEIVE, &[buffer]), buffer)
                })
                .collect();
            let _ = driver.kick(&mut net, RECEIVE).unwrap();
            let _sender = send(count);
            let used = driver.wait_used(&mut net, RECEIVE, count * needed);
            let stats = net.handle().stats();
            assert_eq!(stats.received_frames, count as u64);
            for used in used.chunks(needed) {
                let mut frame = Vec::new();
                for (head, len) in used {
                    let (_, buffer) = buffers.iter().find(|(offered, _)| offered == head).unwrap();
                    frame.extend(driver.read(buffer.address, *len as usize));
                }
                assert_eq!(u32::from(frame[0]), VIRTIO_NET_HDR_F_NEEDS_CSUM);
                assert_eq!(u32::from(frame[1]), VIRTIO_NET_HDR_GSO_TCPV4);
                assert_eq!(frame[4..6], (SEGMENT_BYTES as u16).to_le_bytes());
                assert_eq!(
                    frame[NUM_BUFFERS..HEADER_BYTES],
                    (needed as u16).to_le_bytes()
                );
                assert_eq!(frame[HEADER_BYTES..HEADER_BYTES + 6], OTHER_MAC);
                assert!(frame[DATA..] == payload(DATA_BYTES));
            }
        });
    }
}

#[test]
fn frames_are_cut_and_summed_up_for_a_guest_that_does_not_accept_them_as_they_are() {
    between_networks(|| {
        let (mut net, mut driver) = other(&[]);
        let count = DATA_BYTES / SEGMENT_BYTES;
        let buffers: Vec<_> = (0..count).map(|_| driver.writable(2048)).collect();
        for buffer in &buffers {
            driver.offer(RECEIVE, &[*buffer]);
        }
        let _ = driver.kick(&mut net, RECEIVE).unwrap();
        let _sender = send(1);
        let used = driver.wait_used(&mut net, RECEIVE, count);
        let mut data: Vec<u8> = Vec::new();
        // Buffers are used in their order.
        for (buffer, (_, len)) in buffers.iter().zip(used) {
            let frame = driver.read(buffer.address, len as usize);
            assert_eq!(frame.len(), DATA + SEGMENT_BYTES);
            assert_eq!(u32::from(frame[1]), VIRTIO_NET_HDR_GSO_NONE);
            assert_eq!(frame[0], 0);
            let begin = u32::try_from(data.len()).unwrap();
            assert_eq!(frame[TCP + 4..TCP + 8], begin.to_be_bytes());
            let pseudo_header = pseudo_header(20 + SEGMENT_BYTES);
            assert_eq!(sum(&[&pseudo_header, &frame[TCP..]]), 0xffff);
            data.extend(&frame[DATA..]);
        }
        assert!(data == payload(DATA_BYTES));
    });
}
