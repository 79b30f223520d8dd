//! A guest's vsock driver against real unix sockets, pipes and files of the host.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers are the tests' own, and small"
)]
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "any other packet fails the test"
)]

use std::collections::HashSet;
use std::io::{Read, Seek, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::pipe;
use proptest::prelude::*;
use tempfile::{TempDir, tempdir, tempfile};

use super::connection::BUFFER_BYTES;
use super::muxer::CONNECTIONS_MAX;
use super::packet::{HOST_CID, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::virtio::testing::{
    Buffer, Driver, PATIENCE, any_noise, assert_held_chains_are_bounded, assert_noise_is_survived,
    assert_tricks_are_the_guests_error, noise_config,
};

const CID: u32 = 3;

/// Data per packet of the guest's and per buffer that it receives into.
const DATA_BYTES: usize = 4096;

#[derive(Clone, Debug)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

struct Guest {
    vsock: Vsock,
    driver: Driver,
    directory: TempDir,
    outgoing: Buffer,
    /// Buffers to receive into, by the head they were offered under.
    incoming: HashMap<u16, Buffer>,
    received: VecDeque<Packet>,
}

/// One end of a connection as an honest guest keeps it.
#[derive(Clone, Copy, Debug)]
struct Socket {
    host_port: u32,
    guest_port: u32,
    allocation: u32,
    forwarded: u32,
    sent: u32,
    host_allocation: u32,
    host_forwarded: u32,
}

impl Guest {
    fn new() -> Guest {
        Guest::with_streams(Vec::new())
    }

    fn with_streams(streams: Vec<HostStream>) -> Guest {
        let mut guest = Guest::without_buffers(streams);
        guest.provide(32);
        guest
    }

    fn without_buffers(streams: Vec<HostStream>) -> Guest {
        let directory = tempdir().unwrap();
        let host = VsockHost::bind(&directory.path().join("v")).unwrap();
        let mut vsock = Vsock::new(CID, host, streams).unwrap();
        let mut driver = Driver::start(&mut vsock);
        let outgoing = driver.allocate((HEADER_BYTES + 0x1_0000) as u32, false);
        Guest {
            vsock,
            driver,
            directory,
            outgoing,
            incoming: HashMap::new(),
            received: VecDeque::new(),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("v")
    }

    fn port_path(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("v_{port}"))
    }

    /// Offers this many buffers to receive into.
    fn provide(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = self.driver.writable((HEADER_BYTES + DATA_BYTES) as u32);
            self.incoming
                .insert(self.driver.offer(RECEIVE, &[buffer]), buffer);
        }
        let _ = self.driver.kick(&mut self.vsock, RECEIVE).unwrap();
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.driver.write(self.outgoing.address, &header.to_bytes());
        self.driver
            .write(self.outgoing.address + HEADER_BYTES as u64, data);
        let len = (HEADER_BYTES + data.len()) as u32;
        let packet = Buffer {
            len,
            ..self.outgoing
        };
        let head = self.driver.offer(TRANSMIT, &[packet]);
        let _ = self.driver.kick(&mut self.vsock, TRANSMIT).unwrap();
        assert_eq!(self.driver.used(TRANSMIT), [(head, 0)]);
    }

    fn collect(&mut self) {
        let used: Vec<(Buffer, u32)> = self
            .driver
            .used(RECEIVE)
            .iter()
            .map(|(head, len)| (self.incoming.remove(head).unwrap(), *len))
            .collect();
        for (buffer, len) in &used {
            let bytes = self.driver.read(buffer.address, *len as usize);
            let (header, data) = bytes.split_at(HEADER_BYTES);
            let header = parse(header);
            assert_eq!(header.source_cid, HOST_CID);
            assert_eq!(header.destination_cid, u64::from(CID));
            assert_eq!(header.len as usize, data.len());
            let data = data.to_vec();
            self.received.push_back(Packet { header, data });
            self.incoming
                .insert(self.driver.offer(RECEIVE, &[*buffer]), *buffer);
        }
        if !used.is_empty() {
            let _ = self.driver.kick(&mut self.vsock, RECEIVE).unwrap();
        }
    }

    /// The next packet from the device.
    fn next(&mut self) -> Packet {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.collect();
            if let Some(packet) = self.received.pop_front() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet came");
            self.driver
                .turn(&mut self.vsock, Duration::from_millis(100));
        }
    }

    fn next_is(&mut self, operation: Operation) -> Packet {
        let packet = self.next();
        assert_eq!(packet.header.operation, operation, "{packet:?}");
        packet
    }

    /// Nothing that has been done so far makes the device send anything.
    fn nothing_comes(&mut self) {
        while self.driver.turn(&mut self.vsock, Duration::from_millis(20)) {}
        self.collect();
        assert!(self.received.is_empty(), "{:?}", self.received);
    }

    /// A client of the host connects to this port of the guest, which accepts.
    fn accept(&mut self, port: u32, allocation: u32) -> (Socket, UnixStream) {
        let mut client = self.client();
        writeln!(client, "CONNECT {port}").unwrap();
        let request = self.next_is(Operation::Request).header;
        assert_eq!(request.destination_port, port);
        let mut socket = Socket::new(request.source_port, port, allocation);
        socket.heed(&request);
        self.send(&socket, Operation::Response, 0);
        assert_eq!(read_line(&mut client), format!("OK {}\n", socket.host_port));
        (socket, client)
    }

    /// The guest connects to this port of the host, where somebody listens.
    fn connect(
        &mut self,
        port: u32,
        guest_port: u32,
        listener: &UnixListener,
    ) -> (Socket, UnixStream) {
        let mut socket = Socket::new(port, guest_port, 0x1_0000);
        self.send(&socket, Operation::Request, 0);
        socket.heed(&self.next_is(Operation::Response).header);
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        (socket, server)
    }

    /// The guest connects to a stream.
    fn join(&mut self, port: u32, guest_port: u32) -> Socket {
        let mut socket = Socket::new(port, guest_port, 0x1_0000);
        self.send(&socket, Operation::Request, 0);
        socket.heed(&self.next_is(Operation::Response).header);
        socket
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    fn send(&mut self, socket: &Socket, operation: Operation, flags: u32) {
        self.send_raw(&socket.header(operation, flags, 0), &[]);
    }

    fn send_data(&mut self, socket: &mut Socket, data: &[u8]) {
        self.send_raw(&socket.header(Operation::Data, 0, data.len() as u32), data);
        socket.sent = socket.sent.wrapping_add(data.len() as u32);
    }

    /// Receives this much data, granting credit as it goes.
    fn receive_data(&mut self, socket: &mut Socket, bytes: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < bytes {
            let packet = self.next();
            match packet.header.operation {
                Operation::Data => {
                    data.extend(&packet.data);
                    socket.forwarded = socket.forwarded.wrapping_add(packet.header.len);
                    self.send(socket, Operation::CreditUpdate, 0);
                }
                Operation::CreditRequest => self.send(socket, Operation::CreditUpdate, 0),
                _ => panic!("{packet:?}"),
            }
        }
        data
    }

    /// Sends data as the credit allows.
    fn transmit_data(&mut self, socket: &mut Socket, data: &[u8]) {
        let mut rest = data;
        while !rest.is_empty() {
            let credit = socket.credit();
            if credit == 0 {
                let packet = self.next_is(Operation::CreditUpdate);
                socket.heed(&packet.header);
                continue;
            }
            let (now, later) = rest.split_at(rest.len().min(credit).min(DATA_BYTES));
            self.send_data(socket, now);
            rest = later;
        }
    }

    fn assert_reset(&mut self, socket: &Socket) {
        let packet = self.next_is(Operation::Reset);
        assert_eq!(
            (packet.header.source_port, packet.header.destination_port),
            (socket.host_port, socket.guest_port)
        );
    }
}

impl Socket {
    fn new(host_port: u32, guest_port: u32, allocation: u32) -> Socket {
        Socket {
            host_port,
            guest_port,
            allocation,
            forwarded: 0,
            sent: 0,
            host_allocation: 0,
            host_forwarded: 0,
        }
    }

    fn header(&self, operation: Operation, flags: u32, len: u32) -> Header {
        Header {
            source_cid: CID.into(),
            destination_cid: HOST_CID,
            source_port: self.guest_port,
            destination_port: self.host_port,
            len,
            kind: TYPE_STREAM,
            operation,
            flags,
            allocation: self.allocation,
            forwarded: self.forwarded,
        }
    }

    fn heed(&mut self, header: &Header) {
        self.host_allocation = header.allocation;
        self.host_forwarded = header.forwarded;
    }

    fn credit(&self) -> usize {
        (self.host_allocation - self.sent.wrapping_sub(self.host_forwarded)) as usize
    }
}

/// Through the device's own reader, by way of a chain.
fn parse(bytes: &[u8]) -> Header {
    let mut driver = Driver::new(&[4]);
    let buffer = driver.readable(bytes);
    driver.offer(0, &[buffer]);
    let mut header = None;
    take_all(0, &mut driver.queues[0], &driver.memory, 0, |chain| {
        header = Header::read(&chain);
    })
    .unwrap();
    header.unwrap()
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

fn read_exact(stream: &mut impl Read, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    stream.read_exact(&mut data).unwrap();
    data
}

fn read_to_end(stream: &mut impl Read) -> Vec<u8> {
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    data
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at % 251) as u8 ^ (at / 251) as u8)
        .collect()
}

fn stream(port: u32, direction: StreamDirection, file: impl Into<File>) -> HostStream {
    HostStream {
        port,
        direction,
        file: file.into(),
    }
}

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
fn a_stream_to_the_guest_ends_with_its_file() {
    let (reader, mut writer) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
    let mut file = tempfile().unwrap();
    file.write_all(&pattern(100_000)).unwrap();
    file.rewind().unwrap();
    let mut guest = Guest::with_streams(vec![
        stream(10, StreamDirection::ToGuest, reader),
        stream(11, StreamDirection::ToGuest, file),
    ]);
    let mut socket = guest.join(10, 1);
    assert_eq!(socket.host_allocation, 0, "nothing can be sent there");
    writer.write_all(b"typed").unwrap();
    assert_eq!(guest.receive_data(&mut socket, 5), b"typed");
    // The stream is taken.
    let second = Socket::new(10, 2, 0);
    guest.send(&second, Operation::Request, 0);
    guest.assert_reset(&second);
    drop(writer);
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );
    guest.send(
        &socket,
        Operation::Shutdown,
        SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
    );
    guest.assert_reset(&socket);
    // The next one who asks is told the same.
    guest.join(10, 3);
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );

    let mut socket = guest.join(11, 4);
    assert!(guest.receive_data(&mut socket, 100_000) == pattern(100_000));
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );
    // Data for a file that is only read from.
    guest.send_data(&mut socket, b"x");
    guest.assert_reset(&socket);
}

#[test]
fn a_stream_from_the_guest_is_reset_once_everything_has_been_written() {
    let (reader, writer) = pipe().unwrap();
    let mut guest = Guest::with_streams(vec![stream(20, StreamDirection::FromGuest, writer)]);
    let mut socket = guest.join(20, 1);
    // More than the pipe holds, so that some of it waits with us.
    let data = pattern(65_536 + 50_000);
    guest.transmit_data(&mut socket, &data);
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    while guest
        .driver
        .turn(&mut guest.vsock, Duration::from_millis(20))
    {}
    guest.collect();
    assert!(
        guest
            .received
            .iter()
            .all(|one| one.header.operation == Operation::CreditUpdate)
    );
    guest.received.clear();
    let mut reader = File::from(reader);
    let mut read = read_exact(&mut reader, 60_000);
    let left = data.len() - read.len();
    let rest = thread::spawn(move || read_exact(&mut reader, left));
    loop {
        match guest.next().header.operation {
            Operation::CreditUpdate => {}
            Operation::Reset => break,
            operation => panic!("{operation:?}"),
        }
    }
    read.extend(rest.join().unwrap());
    assert!(read == data);
    // The next process of the guest's may go on where this one ended.
    guest.join(20, 2);
}

#[test]
fn a_stream_whose_reader_is_gone_tells_the_guest_and_swallows_what_comes() {
    let (reader, writer) = pipe().unwrap();
    let mut guest = Guest::with_streams(vec![stream(20, StreamDirection::FromGuest, writer)]);
    let mut socket = guest.join(20, 1);
    drop(reader);
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_RECEIVE
    );
    for _ in 0..40 {
        guest.send_data(&mut socket, &[0; DATA_BYTES]);
    }
    while guest.driver.turn(&mut guest.vsock, Duration::ZERO) {}
    guest.collect();
    assert!(
        guest
            .received
            .iter()
            .all(|one| one.header.operation == Operation::CreditUpdate)
    );
    guest.received.clear();
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    guest.assert_reset(&socket);
}

#[test]
fn a_regular_file_takes_what_the_guest_sends() {
    let mut file = tempfile().unwrap();
    let clone = file.try_clone().unwrap();
    let mut guest = Guest::with_streams(vec![stream(20, StreamDirection::FromGuest, clone)]);
    let mut socket = guest.join(20, 1);
    let data = pattern(200_000);
    guest.transmit_data(&mut socket, &data);
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    loop {
        match guest.next().header.operation {
            Operation::CreditUpdate => {}
            Operation::Reset => break,
            operation => panic!("{operation:?}"),
        }
    }
    file.rewind().unwrap();
    assert!(read_to_end(&mut file) == data);
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

#[test]
fn two_streams_with_one_port_and_a_directory_are_refused() {
    let make = |streams| {
        let directory = tempdir().unwrap();
        let host = VsockHost::bind(&directory.path().join("v")).unwrap();
        Vsock::new(CID, host, streams)
    };
    let null = || File::open("/dev/null").unwrap();
    let twice = [1, 1].map(|port| stream(port, StreamDirection::ToGuest, null()));
    assert!(matches!(
        make(twice.into()),
        Err(VsockError::Ambiguous { port: 1 })
    ));
    let directory = stream(2, StreamDirection::ToGuest, File::open("/").unwrap());
    assert!(matches!(
        make(vec![directory]),
        Err(VsockError::Stream { port: 2, .. })
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
