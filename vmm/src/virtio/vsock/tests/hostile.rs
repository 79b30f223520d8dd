//! Guests that break the rules.

use super::*;

#[test]
fn data_beyond_the_credit_ends_that_connection_and_no_other() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(1, 0x1_0000);
    let (mut other, mut other_client) = guest.accept(2, 0x1_0000);
    // What the host's socket takes, and then the credit, are used up.
    let mut packets = 0;
    let over = loop {
        guest.send_data(&mut socket, &[1; DATA_BYTES]);
        guest.collect();
        packets += 1;
        if let Some(packet) = guest.received.pop_front() {
            match packet.header.operation {
                Operation::CreditUpdate => {}
                Operation::Reset => break packet,
                _ => panic!("{packet:?}"),
            }
        }
    };
    assert_eq!(over.header.source_port, socket.host_port);
    assert!(packets > BUFFER_BYTES as usize / DATA_BYTES);
    drop(client);
    guest.send_data(&mut other, b"fine");
    assert_eq!(read_exact(&mut other_client, 4), b"fine");
}

#[test]
fn violations_end_a_connection() {
    // What the guest sends on an open connection: operation, flags, claimed and real length.
    let table = [
        (Operation::Request, 0, 0, 0),
        (Operation::Response, 0, 0, 0),
        (Operation::Unknown(0), 0, 0, 0),
        (Operation::Unknown(999), 0, 0, 0),
        // CVE-2019-18960: the header claims more data than the buffers have.
        (Operation::Data, 0, 1, 0),
        (Operation::Data, 0, 4096, 100),
        (Operation::Data, 0, u32::MAX, 100),
    ];
    for (operation, flags, claimed, len) in table {
        let mut guest = Guest::new();
        let (socket, mut client) = guest.accept(1, 0x1_0000);
        guest.send_raw(&socket.header(operation, flags, claimed), &pattern(len));
        guest.assert_reset(&socket);
        assert_eq!(read_to_end(&mut client), b"", "{operation:?} {claimed}");
        assert_eq!(guest.vsock.muxer.connections(), 0);
    }
    let mut guest = Guest::new();
    let (mut socket, _client) = guest.accept(1, 0x1_0000);
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    guest.send_data(&mut socket, b"after all");
    guest.assert_reset(&socket);
}

#[test]
fn a_connection_that_the_guest_has_not_accepted_takes_no_data() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.next_is(Operation::Request).header;
    let mut socket = Socket::new(request.source_port, 9, 0x1_0000);
    guest.send_data(&mut socket, b"too early");
    guest.assert_reset(&socket);
    assert_eq!(read_to_end(&mut client), b"");
}

#[test]
fn packets_for_nobody_are_answered_with_a_reset_and_packets_from_nobody_are_not() {
    let mut guest = Guest::new();
    let socket = Socket::new(1, 2, 0);
    for operation in [
        Operation::Response,
        Operation::Data,
        Operation::Shutdown,
        Operation::CreditUpdate,
        Operation::CreditRequest,
        Operation::Unknown(77),
    ] {
        guest.send(&socket, operation, 0);
        guest.assert_reset(&socket);
    }
    guest.send(&socket, Operation::Reset, 0);
    let request = socket.header(Operation::Request, 0, 0);
    let foreign = [
        Header {
            source_cid: 4,
            ..request
        },
        Header {
            destination_cid: 1,
            ..request
        },
        Header {
            destination_cid: u64::MAX,
            ..request
        },
    ];
    for header in foreign {
        guest.send_raw(&header, &[]);
    }
    guest.nothing_comes();
    // A socket of another type is refused in its own words.
    let header = Header { kind: 2, ..request };
    guest.send_raw(&header, &[]);
    assert_eq!(guest.next_is(Operation::Reset).header.kind, 2);
}

#[test]
fn chains_that_are_too_short_for_a_packet_are_given_back() {
    let mut guest = Guest::new();
    let short = Buffer {
        len: HEADER_BYTES as u32 - 1,
        ..guest.outgoing
    };
    let writable = guest.driver.writable(100);
    for chain in [&[short][..], &[writable], &[short, writable]] {
        let head = guest.driver.offer(TRANSMIT, chain);
        let _ = guest.driver.kick(&mut guest.vsock, TRANSMIT).unwrap();
        assert_eq!(guest.driver.used(TRANSMIT), [(head, 0)]);
    }
    guest.nothing_comes();
}

#[test]
fn a_receive_buffer_without_room_for_data_is_the_guests_error() {
    let mut guest = Guest::new();
    let buffer = guest.driver.writable(HEADER_BYTES as u32);
    guest.driver.offer(RECEIVE, &[buffer]);
    let result = guest.driver.kick(&mut guest.vsock, RECEIVE);
    assert!(matches!(
        result,
        Err(DeviceError::Guest { index: RECEIVE, .. })
    ));
}

#[test]
fn hostile_drivers_are_survived() {
    let mut vsock = Guest::new().vsock;
    vsock.reset();
    assert_tricks_are_the_guests_error(&mut vsock);
    let buffer = Buffer {
        address: 0x10_0000,
        len: 4096,
        writable: true,
    };
    for queue in [RECEIVE, 2] {
        assert_held_chains_are_bounded(&mut vsock, queue, buffer);
    }
}

/// A packet that is plausible in parts.
fn any_packet() -> impl Strategy<Value = (Header, usize)> {
    let operation = prop_oneof![
        3 => Just(Operation::Request),
        1 => Just(Operation::Response),
        1 => Just(Operation::Reset),
        2 => Just(Operation::Shutdown),
        6 => Just(Operation::Data),
        1 => Just(Operation::CreditUpdate),
        1 => Just(Operation::CreditRequest),
        1 => any::<u16>().prop_map(Operation::Unknown),
    ];
    let len = prop_oneof![4 => 0u32..5000, 1 => any::<u32>()];
    let room = || prop_oneof![2 => 0u32..100_000, 1 => any::<u32>()];
    (
        operation,
        1u32..4,
        0u32..3,
        0u32..4,
        len,
        0usize..5000,
        room(),
        room(),
    )
        .prop_map(
            |(operation, host_port, guest_port, flags, len, real, allocation, forwarded)| {
                let socket = Socket {
                    allocation,
                    forwarded,
                    ..Socket::new(host_port, guest_port, 0)
                };
                (socket.header(operation, flags, len), real)
            },
        )
}

proptest! {
    #![proptest_config(noise_config())]

    #[test]
    fn noise_is_survived(noise in any_noise(3)) {
        let mut guest = Guest::without_buffers(Vec::new());
        assert_noise_is_survived(&mut guest.vsock, &noise);
    }

    #[test]
    fn no_sequence_of_packets_does_harm(
        packets in prop::collection::vec(any_packet(), 1..80),
        buffers in 0usize..40,
    ) {
        let (reader, writer) = pipe().unwrap();
        let mut guest = Guest::without_buffers(vec![
            stream(2, StreamDirection::FromGuest, writer),
        ]);
        let listener = UnixListener::bind(guest.port_path(1)).unwrap();
        guest.provide(buffers);
        for (header, real) in packets {
            guest.send_raw(&header, &vec![7; real]);
            guest.driver.turn(&mut guest.vsock, Duration::ZERO);
            guest.collect();
        }
        // Three guest ports and two endpoints that can be reached.
        prop_assert!(guest.vsock.muxer.connections() <= 4);
        drop((reader, listener));
        // Whatever has happened, a client of the host is served.
        guest.vsock.reset();
        guest.driver = Driver::start(&mut guest.vsock);
        guest.incoming.clear();
        guest.received.clear();
        guest.provide(8);
        guest.accept(1, 0x1_0000);
    }
}
