//! Honest connections: who reaches whom, credit, and how they end.

use super::*;

#[test]
fn a_client_of_the_host_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(52, 0x1_0000);
    client.write_all(b"question").unwrap();
    assert_eq!(guest.next_is(Operation::Data).data, b"question");
    guest.send_data(&mut socket, b"answer");
    assert_eq!(read_exact(&mut client, 6), b"answer");
    // The next client gets another port of the host's.
    let (other, _client) = guest.accept(52, 0x1_0000);
    assert_ne!(other.host_port, socket.host_port);
    let stats = guest.vsock.counters().stats();
    let connections = (stats.connections, stats.open, stats.refused);
    assert_eq!(connections, (2, 2, 0));
    // The guest's side of it.
    assert_eq!((stats.received_bytes, stats.sent_bytes), (8, 6));
    assert!(stats.received_packets >= 3 && stats.sent_packets >= 3);
}

#[test]
fn what_a_client_sends_right_after_its_request_is_data() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\nearly\n").unwrap();
    let request = guest.next_is(Operation::Request).header;
    guest.nothing_comes();
    let socket = Socket::new(request.source_port, 7, 0x1_0000);
    guest.send(&socket, Operation::Response, 0);
    assert_eq!(guest.next_is(Operation::Data).data, b"early\n");
}

#[test]
fn a_request_may_come_in_pieces_and_what_is_none_is_hung_up_on() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    for piece in ["CON", "NECT 1", "0"] {
        client.write_all(piece.as_bytes()).unwrap();
        guest.nothing_comes();
    }
    client.write_all(b"\n").unwrap();
    assert_eq!(
        guest.next_is(Operation::Request).header.destination_port,
        10
    );

    let long = "x".repeat(32);
    for request in [
        "\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 1 2\n",
        "CONNECT 4294967296\n",
        &long,
    ] {
        let mut client = guest.client();
        client.write_all(request.as_bytes()).unwrap();
        guest.nothing_comes();
        assert!(
            matches!(client.read(&mut [0]), Ok(0) | Err(_)),
            "{request:?}"
        );
    }
    // And one that says nothing at all.
    drop(guest.client());
    guest.nothing_comes();
}

#[test]
fn a_client_whom_the_guest_refuses_is_hung_up_on() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.next_is(Operation::Request).header;
    let socket = Socket::new(request.source_port, 9, 0);
    guest.send(&socket, Operation::Reset, 0);
    assert_eq!(read_to_end(&mut client), b"");
    guest.nothing_comes();
}

#[test]
fn a_client_that_leaves_before_the_guest_has_answered_is_announced_as_gone() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.next_is(Operation::Request).header;
    let socket = Socket::new(request.source_port, 9, 0x1_0000);
    drop(client);
    guest.assert_reset(&socket);
    // Its late answer is for nobody.
    guest.send(&socket, Operation::Response, 0);
    guest.assert_reset(&socket);
}

#[test]
fn the_guest_reaches_a_socket_of_the_host_by_its_port() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.port_path(1234)).unwrap();
    let (mut socket, mut server) = guest.connect(1234, 5, &listener);
    guest.send_data(&mut socket, b"hello");
    assert_eq!(read_exact(&mut server, 5), b"hello");
    server.write_all(b"world").unwrap();
    assert_eq!(guest.next_is(Operation::Data).data, b"world");
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut guest = Guest::new();
    // A socket file that nobody listens on any more.
    drop(UnixListener::bind(guest.port_path(2)).unwrap());
    for port in [1, 2, u32::MAX] {
        let socket = Socket::new(port, 5, 0);
        guest.send(&socket, Operation::Request, 0);
        guest.assert_reset(&socket);
    }
    // Whoever inherits a listening socket has no place for sockets of the guest's.
    let listener = UnixListener::bind(guest.directory.path().join("w")).unwrap();
    let host = VsockHost::inherited(listener).unwrap();
    guest.vsock = Vsock::new(CID, host, Vec::new()).unwrap();
    guest.driver = Driver::start(&mut guest.vsock);
    guest.provide(4);
    let socket = Socket::new(1, 5, 0);
    guest.send(&socket, Operation::Request, 0);
    guest.assert_reset(&socket);
}

#[test]
fn a_guest_that_grants_little_credit_gets_everything_in_order() {
    for allocation in [1000, 4096, 10_000, 1 << 20] {
        let mut guest = Guest::new();
        let (mut socket, mut client) = guest.accept(1, allocation);
        let data = pattern(300_000);
        let expected = data.clone();
        let writer = thread::spawn(move || {
            client.write_all(&data).unwrap();
            client
        });
        assert!(
            guest.receive_data(&mut socket, 300_000) == expected,
            "{allocation}"
        );
        drop(writer.join().unwrap());
    }
}

#[test]
fn without_credit_nothing_is_sent_but_one_request_for_it() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(1, 0);
    client.write_all(b"abcdef").unwrap();
    guest.next_is(Operation::CreditRequest);
    guest.nothing_comes();
    // An answer that grants none is not asked about again.
    guest.send(&socket, Operation::CreditUpdate, 0);
    guest.nothing_comes();
    socket.allocation = 4;
    guest.send(&socket, Operation::CreditUpdate, 0);
    assert_eq!(guest.next_is(Operation::Data).data, b"abcd");
    guest.next_is(Operation::CreditRequest);
    socket.forwarded = 4;
    guest.send(&socket, Operation::CreditUpdate, 0);
    assert_eq!(guest.next_is(Operation::Data).data, b"ef");
}

#[test]
fn a_host_that_reads_slowly_gets_everything_and_stops_the_guest_meanwhile() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(1, 0x1_0000);
    let data = pattern(4 << 20);
    let expected = data.len();
    let reader = thread::spawn(move || read_exact(&mut client, expected));
    guest.transmit_data(&mut socket, &data);
    while guest
        .driver
        .turn(&mut guest.vsock, Duration::from_millis(200))
    {
        guest.collect();
    }
    assert!(reader.join().unwrap() == data);
}

#[test]
fn the_host_may_stop_sending_and_go_on_receiving() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(1, 0x1_0000);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next_is(Operation::Data).data, b"last");
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );
    guest.send_data(&mut socket, b"reply");
    assert_eq!(read_exact(&mut client, 5), b"reply");
    guest.send(
        &socket,
        Operation::Shutdown,
        SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
    );
    guest.assert_reset(&socket);
    assert_eq!(read_to_end(&mut client), b"");
    guest.nothing_comes();
}

#[test]
fn the_guest_may_stop_sending_and_go_on_receiving() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(1, 0x1_0000);
    guest.send_data(&mut socket, b"last");
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    assert_eq!(read_to_end(&mut client), b"last");
    client.write_all(b"reply").unwrap();
    assert_eq!(guest.next_is(Operation::Data).data, b"reply");
    drop(client);
    let flags = guest.next_is(Operation::Shutdown).header.flags;
    assert_eq!(flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send(&socket, Operation::Reset, 0);
    guest.nothing_comes();
    assert_eq!(guest.vsock.muxer.connections(), 0);
}

#[test]
fn a_guest_that_stops_receiving_hears_no_more() {
    let mut guest = Guest::new();
    let (socket, mut client) = guest.accept(1, 0x1_0000);
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_RECEIVE);
    assert!(client.write_all(b"unheard").is_err());
    guest.nothing_comes();
}

#[test]
fn what_a_client_sent_before_it_closed_arrives_even_if_the_guest_is_still_writing() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(1, 5);
    client.write_all(b"0123456789").unwrap();
    drop(client);
    guest.send_data(&mut socket, b"to nobody");
    let mut data: Vec<u8> = Vec::new();
    let mut flags = 0;
    while flags != SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
        let packet = guest.next();
        data.extend(&packet.data);
        socket.forwarded = data.len() as u32;
        if packet.header.operation == Operation::Shutdown {
            flags = packet.header.flags;
        }
        guest.send(&socket, Operation::CreditUpdate, 0);
    }
    assert_eq!(data, b"0123456789");
}

#[test]
fn without_buffers_to_receive_into_nothing_is_lost() {
    let mut guest = Guest::without_buffers(Vec::new());
    let listener = UnixListener::bind(guest.port_path(1)).unwrap();
    let open = Socket::new(1, 500, 0x1_0000);
    guest.send(&open, Operation::Request, 0);
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"data").unwrap();
    for guest_port in 0..300 {
        let refused = Socket::new(2, guest_port, 0);
        guest.send(&refused, Operation::Request, 0);
        // A second one is one more reason for the same answer.
        guest.send(&refused, Operation::Data, 0);
    }
    while guest
        .driver
        .turn(&mut guest.vsock, Duration::from_millis(20))
    {}
    guest.provide(1);
    let mut resets = HashSet::new();
    for _ in 0..300 {
        resets.insert(guest.next_is(Operation::Reset).header.destination_port);
    }
    assert_eq!(resets, (0..300).collect());
    guest.next_is(Operation::Response);
    assert_eq!(guest.next_is(Operation::Data).data, b"data");
    guest.nothing_comes();
}

#[test]
fn many_connections_are_kept_apart_and_one_too_many_is_refused() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.port_path(1)).unwrap();
    let mut open: Vec<_> = (0..CONNECTIONS_MAX)
        .map(|at| guest.connect(1, at as u32, &listener))
        .collect();
    let one_more = Socket::new(1, 9999, 0);
    guest.send(&one_more, Operation::Request, 0);
    guest.assert_reset(&one_more);
    let mut client = guest.client();
    guest.nothing_comes();
    assert_eq!(read_to_end(&mut client), b"");
    for (socket, server) in &mut open {
        guest.send_data(socket, format!("{:>8}", socket.guest_port).as_bytes());
        let word = read_exact(server, 8);
        server.write_all(&word).unwrap();
    }
    let mut echoed = HashSet::new();
    for _ in 0..open.len() {
        let packet = guest.next_is(Operation::Data);
        let port = packet.header.destination_port;
        assert_eq!(packet.data, format!("{port:>8}").as_bytes());
        echoed.insert(port);
    }
    assert_eq!(echoed.len(), open.len());
    let (socket, _server) = open.pop().unwrap();
    guest.send(&socket, Operation::Reset, 0);
    guest.connect(1, 9999, &listener);
}

#[test]
fn a_packet_may_lie_in_any_number_of_buffers() {
    let mut guest = Guest::new();
    let (socket, mut client) = guest.accept(1, 0x1_0000);
    let packet = [
        &socket.header(Operation::Data, 0, 10).to_bytes()[..],
        b"0123456789",
    ]
    .concat();
    let buffers: Vec<_> = packet
        .chunks(7)
        .map(|part| guest.driver.readable(part))
        .collect();
    guest.driver.offer(TRANSMIT, &buffers);
    let _ = guest.driver.kick(&mut guest.vsock, TRANSMIT).unwrap();
    assert_eq!(read_exact(&mut client, 10), b"0123456789");
}

#[test]
fn after_a_reset_all_connections_are_gone_and_new_ones_can_be_made() {
    let (reader, writer) = pipe().unwrap();
    let input = stream(10, StreamDirection::ToGuest, reader);
    let mut guest = Guest::with_streams(vec![input]);
    let (_, mut client) = guest.accept(1, 0x1_0000);
    guest.join(10, 1);
    guest.vsock.reset();
    assert_eq!(read_to_end(&mut client), b"");
    guest.driver = Driver::start(&mut guest.vsock);
    guest.incoming.clear();
    guest.provide(8);
    guest.accept(1, 0x1_0000);
    guest.join(10, 1);
    drop(writer);
}

#[test]
fn a_socket_that_nobody_listens_on_any_more_is_replaced_and_a_live_one_is_not() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let host = VsockHost::bind(&path).unwrap();
    VsockHost::bind(&path).unwrap_err();
    drop(host);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    VsockHost::bind(&path).unwrap_err();
    assert!(path.exists());
}
