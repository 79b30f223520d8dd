//! All connections of a vsock device: who they are, which of them have something for the guest, and
//! one epoll instance that tells of the host's ends.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::VsockCounters;
use super::connection::{Connection, Fate, Outgoing};
use super::endpoint::{Endpoint, Stream};
use super::listener::{Greeting, VsockHost, read_request};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::devices::guest_status::Reports;
use crate::guest_status::{VSOCK_GUEST_PORTS_END, VSOCK_PORT};
use crate::virtio::chain::Chain;
use crate::virtio::counters::{count, count_by};

/// The most connections at a time, those that are being opened included. With
/// [`BUFFER_BYTES`](super::connection::BUFFER_BYTES) it bounds what a guest can make us hold.
pub(super) const CONNECTIONS_MAX: usize = 512;

/// The most resets that wait for the guest to provide buffers, one per pair of ports. A guest that
/// sends packets for more unknown connections than this without receiving anything is not owed an
/// answer to each.
const RESETS_MAX: usize = 1024;

/// The most events per call.
const EVENTS_MAX: usize = 64;

/// The most clients that are let in per call: as many as Linux lets wait (`net.core.somaxconn`).
const CLIENTS_PER_CALL_MAX: usize = 4096;

/// Ports of host clients: far from those that programs listen on.
const HOST_PORTS: Range<u32> = 1 << 30..1 << 31;

/// The most connections at a time that reports come by. A guest makes one for each report, and a
/// machine sees two in its life.
const REPORTERS_MAX: usize = 4;

/// `VMADDR_PORT_ANY`: not a port. Epoll tokens that have it are not connections.
const NO_PORT: u32 = u32::MAX;

/// The listener's epoll token.
const LISTENER: Key = Key {
    host_port: NO_PORT,
    guest_port: NO_PORT,
};

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Key {
    host_port: u32,
    guest_port: u32,
}

impl Key {
    fn token(self) -> u64 {
        u64::from(self.host_port) << 32 | u64::from(self.guest_port)
    }

    fn from_token(token: u64) -> Key {
        let [a, b, c, d, e, f, g, h] = token.to_be_bytes();
        Key {
            host_port: u32::from_be_bytes([a, b, c, d]),
            guest_port: u32::from_be_bytes([e, f, g, h]),
        }
    }
}

/// All connections of a device.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    host: VsockHost,
    epoll: Epoll,
    connections: HashMap<Key, Connection>,
    /// Clients that have not said yet which port they want.
    clients: HashMap<u32, UnixStream>,
    next_client: u32,
    next_port: u32,
    /// By port; not there while a connection has it.
    streams: HashMap<u32, Option<Stream>>,
    /// Where the guest's reports go, if it may send them here.
    pub(super) reports: Option<Reports>,
    /// Connections that have something for the guest, in turn.
    ready: VecDeque<Key>,
    /// Connections that the guest must be told do not exist, with the type that it used.
    resets: BTreeSet<(Key, u16)>,
    pub(super) counters: Arc<VsockCounters>,
}

impl Muxer {
    /// Listens, with no connections.
    pub(super) fn new(
        guest_cid: u64,
        host: VsockHost,
        streams: HashMap<u32, Option<Stream>>,
    ) -> io::Result<Muxer> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // On the edge, as everything here: a client that cannot be let in must not keep waking us.
        let flags = EpollFlags::EPOLLET | EpollFlags::EPOLLIN;
        let event = EpollEvent::new(flags, LISTENER.token());
        epoll.add(host.as_fd(), event)?;
        Ok(Muxer {
            guest_cid,
            host,
            epoll,
            connections: HashMap::new(),
            clients: HashMap::new(),
            next_client: 0,
            next_port: HOST_PORTS.start,
            streams,
            reports: None,
            ready: VecDeque::new(),
            resets: BTreeSet::new(),
            counters: Arc::default(),
        })
    }

    /// How many connections there are.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The port of the next client, for those of a restored guest to differ from the ones before.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on from there. Returns whether it is a port of clients.
    pub(super) fn set_next_port(&mut self, port: u32) -> bool {
        let valid = HOST_PORTS.contains(&port);
        if valid {
            self.next_port = port;
        }
        valid
    }

    /// Readable when [`poll`](Self::poll) has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }

    /// Ends everything, without telling the guest: it has forgotten it.
    pub(super) fn reset(&mut self) {
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        for key in keys {
            self.remove(key);
        }
        self.clients.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Takes a packet of the guest's.
    pub(super) fn receive(&mut self, chain: &Chain) {
        let Some(header) = Header::read(chain) else {
            return;
        };
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            return;
        }
        let key = Key {
            host_port: header.destination_port,
            guest_port: header.source_port,
        };
        let there = chain.readable_bytes().saturating_sub(HEADER_BYTES) as u64;
        count(&self.counters.sent_packets);
        count_by(&self.counters.sent_bytes, u64::from(header.len).min(there));
        let known = self.connections.get_mut(&key);
        match (known, header.operation) {
            _ if header.kind != TYPE_STREAM => self.refuse(key, &header),
            (Some(connection), _) => {
                let fate = connection.receive(&header, chain);
                self.decide(key, fate);
            }
            (None, Operation::Request) => self.open(key, &header),
            (None, _) => self.refuse(key, &header),
        }
    }

    /// Tells the guest that there is no such connection, unless that is what it says itself.
    fn refuse(&mut self, key: Key, header: &Header) {
        if header.operation != Operation::Reset {
            self.queue_reset(key, header.kind);
        }
    }

    fn queue_reset(&mut self, key: Key, kind: u16) {
        if self.resets.len() < RESETS_MAX {
            self.resets.insert((key, kind));
        }
    }

    /// The guest asks for a connection.
    fn open(&mut self, key: Key, request: &Header) {
        match self.endpoint_for(key) {
            Some(endpoint) => {
                // It would be taken for one of the new connection.
                self.resets.remove(&(key, TYPE_STREAM));
                self.insert(key, Connection::from_guest(endpoint, request));
            }
            None => {
                count(&self.counters.refused);
                self.queue_reset(key, TYPE_STREAM);
            }
        }
    }

    fn endpoint_for(&mut self, key: Key) -> Option<Endpoint> {
        let port = key.host_port;
        if port == NO_PORT || self.is_full() {
            return None;
        }
        if let (VSOCK_PORT, Some(reports)) = (port, &self.reports) {
            let trusted = key.guest_port < VSOCK_GUEST_PORTS_END;
            let possible = trusted && self.reporters() < REPORTERS_MAX;
            return possible.then(|| Endpoint::Reports(reports.clone()));
        }
        match self.streams.get_mut(&port) {
            Some(stream) => stream.take().map(Endpoint::Stream),
            None => self.host.connect(port).ok().map(Endpoint::Socket),
        }
    }

    fn reporters(&self) -> usize {
        let ports = self.connections.keys().map(|key| key.host_port);
        ports.filter(|port| *port == VSOCK_PORT).count()
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.clients.len() >= CONNECTIONS_MAX
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        let flags = EpollFlags::EPOLLET
            | EpollFlags::EPOLLIN
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLOUT;
        let event = EpollEvent::new(flags, key.token());
        let descriptor = connection.endpoint.descriptor();
        let watched = match descriptor.map(|descriptor| self.epoll.add(descriptor, event)) {
            // Regular files are always ready, as a connection takes its endpoint to be.
            None | Some(Ok(()) | Err(Errno::EPERM)) => true,
            Some(Err(_)) => false,
        };
        self.connections.insert(key, connection);
        count(&self.counters.connections);
        self.count_open();
        let fate = if watched { Fate::Lives } else { Fate::Reset };
        self.decide(key, fate);
    }

    /// Does to a connection what must be done after it was touched.
    fn decide(&mut self, key: Key, fate: Fate) {
        if fate == Fate::Lives {
            if let Some(connection) = self.connections.get_mut(&key)
                && !connection.queued
                && connection.has_outgoing()
            {
                connection.queued = true;
                self.ready.push_back(key);
            }
            return;
        }
        self.remove(key);
        if fate == Fate::Reset {
            self.queue_reset(key, TYPE_STREAM);
        }
    }

    fn remove(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else {
            return;
        };
        self.count_open();
        if connection.queued {
            self.ready.retain(|other| *other != key);
        }
        // A stream's open file may be shared, so closing our descriptor would not be enough.
        // Regular files were never added.
        if let Some(descriptor) = connection.endpoint.descriptor() {
            let _ = self.epoll.delete(descriptor);
        }
        if let Endpoint::Stream(stream) = connection.endpoint
            && let Some(place) = self.streams.get_mut(&key.host_port)
        {
            *place = Some(stream);
        }
    }

    fn count_open(&self) {
        let open = self.connections.len() as u64;
        self.counters.open.store(open, Ordering::Relaxed);
    }

    /// Hangs up on all clients: nobody is there whom they could reach.
    pub(super) fn turn_away(&mut self) -> io::Result<()> {
        self.reset();
        // All but the listener are out of it, which may have an event that is to be taken.
        let mut events = [EpollEvent::empty(); 1];
        self.wait(&mut events)?;
        for _ in 0..CLIENTS_PER_CALL_MAX {
            if self.host.accept().is_err() {
                break;
            }
        }
        Ok(())
    }

    fn wait(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        match self.epoll.wait(events, EpollTimeout::ZERO) {
            Ok(count) => Ok(count),
            Err(Errno::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks at the host's ends that have become ready.
    pub(super) fn poll(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = self.wait(&mut events)?;
        for event in &events[..count] {
            let key = Key::from_token(event.data());
            if key == LISTENER {
                self.accept();
            } else if key.host_port == NO_PORT {
                self.hear(key.guest_port);
            } else if let Some(connection) = self.connections.get_mut(&key) {
                let fate = connection.ready(event.events());
                self.decide(key, fate);
            }
        }
        Ok(())
    }

    /// Lets clients in. Those that there is no room for are hung up on.
    fn accept(&mut self) {
        for _ in 0..CLIENTS_PER_CALL_MAX {
            let stream = match self.host.accept() {
                Ok(Some(stream)) => stream,
                // That client has gone already.
                Ok(None) => continue,
                // There are no more, or we may not open more files: then the next client to come
                // makes us look again.
                Err(_) => return,
            };
            if self.is_full() {
                continue;
            }
            // Far fewer are open at a time than there are numbers.
            let number = self.next_client;
            self.next_client = (number + 1) % NO_PORT;
            let key = Key {
                host_port: NO_PORT,
                guest_port: number,
            };
            // On the edge: half a request is left where it is, and must not wake us until the rest
            // has come.
            let flags = EpollFlags::EPOLLET | EpollFlags::EPOLLIN;
            let event = EpollEvent::new(flags, key.token());
            if self.epoll.add(&stream, event).is_ok() {
                self.clients.insert(number, stream);
            }
        }
    }

    /// A client has said something, or has gone.
    fn hear(&mut self, number: u32) {
        let Some(stream) = self.clients.get(&number) else {
            return;
        };
        let greeting = read_request(stream);
        if greeting == Greeting::Incomplete {
            return;
        }
        let Some(stream) = self.clients.remove(&number) else {
            return;
        };
        let (Greeting::Port(port), Ok(())) = (greeting, self.epoll.delete(&stream)) else {
            return;
        };
        let key = Key {
            host_port: self.free_port(port),
            guest_port: port,
        };
        let endpoint = Endpoint::Socket(OwnedFd::from(stream));
        let greeting = format!("OK {}\n", key.host_port);
        self.insert(key, Connection::from_host(endpoint, greeting));
    }

    /// A host port that no connection with `guest_port` has. There are far more of them than
    /// connections.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            self.next_port = if host_port + 1 == HOST_PORTS.end {
                HOST_PORTS.start
            } else {
                host_port + 1
            };
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.connections.contains_key(&key) {
                return host_port;
            }
        }
    }

    /// Whether [`send`](Self::send) may have something for the guest.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Puts the next packet for the guest into `chain`, which has room for a header and some data.
    /// Returns the packet's length, or none if there is nothing to send after all.
    pub(super) fn send(&mut self, chain: &Chain) -> Option<usize> {
        if let Some((key, kind)) = self.resets.pop_first() {
            let packet = Outgoing {
                operation: Operation::Reset,
                flags: 0,
                len: 0,
            };
            return Some(self.write(chain, key, kind, packet, (0, 0)));
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_outgoing(chain);
            let credit = (connection.allocation(), connection.forwarded());
            if packet.is_some() {
                connection.told();
            }
            self.decide(key, Fate::Lives);
            if let Some(packet) = packet {
                return Some(self.write(chain, key, TYPE_STREAM, packet, credit));
            }
        }
        None
    }

    fn write(
        &self,
        chain: &Chain,
        key: Key,
        kind: u16,
        packet: Outgoing,
        (allocation, forwarded): (u32, u32),
    ) -> usize {
        let header = Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: key.host_port,
            destination_port: key.guest_port,
            len: packet.len,
            kind,
            operation: packet.operation,
            flags: packet.flags,
            allocation,
            forwarded,
        };
        chain.write(0, &header.to_bytes());
        count(&self.counters.received_packets);
        count_by(&self.counters.received_bytes, packet.len.into());
        HEADER_BYTES + packet.len as usize
    }
}
