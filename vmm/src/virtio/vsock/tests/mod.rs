//! A guest's vsock driver against real unix sockets, pipes and files of the host.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers are the tests' own, and small"
)]
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "any other packet fails the test"
)]

mod connections;
mod hostile;
mod reports;
mod restored;
mod streams;

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
