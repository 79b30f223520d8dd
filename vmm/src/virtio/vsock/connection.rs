//! One connection: what was agreed with the guest, what is owed to it, and what waits for the host.
//!
//! Data for the guest is read straight into its buffers, when it has one to fill and has granted
//! credit; data from the guest is written straight out of its buffers, and only what the host does
//! not take at once is copied, up to [`BUFFER_BYTES`], the credit that the guest is granted.

use std::collections::VecDeque;
use std::io;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::Shutdown;

use super::endpoint::Endpoint;
use super::packet::{HEADER_BYTES, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::chain::{Chain, IoList};

/// The credit of the guest: the most that one connection can make us hold.
pub(super) const BUFFER_BYTES: u32 = 64 * 1024;

/// The most data in one packet to the guest, as Linux sends.
const PACKET_BYTES_MAX: usize = 64 * 1024;

/// How much must have been passed on before the guest is told unasked.
const CREDIT_UPDATE_BYTES: u32 = BUFFER_BYTES / 2;

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "a connection that is over must be removed"]
pub(super) enum Fate {
    Lives,
    /// It is over, and the guest must be told.
    Reset,
    /// It is over, and the guest knows.
    Gone,
}

/// What to put into a packet for the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Outgoing {
    pub(super) operation: Operation,
    pub(super) flags: u32,
    /// Bytes of data that are in the chain already.
    pub(super) len: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// The guest must be asked.
    ToRequest,
    /// The guest was asked.
    Requested,
    /// The guest must be answered.
    ToRespond,
    Established,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) endpoint: Endpoint,
    /// It is in the list of connections that have something for the guest.
    pub(super) queued: bool,
    stage: Stage,
    /// What a host client is told once the guest has accepted.
    greeting: Option<String>,

    /// From the guest, not yet taken by the host.
    buffer: VecDeque<u8>,
    /// Bytes passed on to the host, and what the guest knows of that, modulo 2^32.
    forwarded: u32,
    forwarded_told: u32,
    /// The guest has asked how much it may send.
    update_asked: bool,

    /// Bytes sent to the guest, and what it says of its room, modulo 2^32.
    sent: u32,
    peer_allocation: u32,
    peer_forwarded: u32,
    /// We have asked the guest how much we may send, to no avail so far.
    credit_requested: bool,

    /// What the last events said of the endpoint, until a call says otherwise.
    readable: bool,
    writable: bool,
    /// The host will not send any more: everything has been read.
    host_sent_all: bool,
    /// The host will not receive any more.
    host_deaf: bool,
    /// The flags of the last shutdown that the guest was sent.
    shutdown_told: u32,
    /// The guest will not send, receive any more.
    guest_sent_all: bool,
    guest_deaf: bool,
    /// The endpoint has been told that the guest has sent all.
    end_passed_on: bool,
}

impl Connection {
    /// A host client wants to reach the guest; it will be told `greeting` if it does.
    pub(super) fn from_host(endpoint: Endpoint, greeting: String) -> Connection {
        Connection {
            greeting: Some(greeting),
            ..Connection::new(endpoint, Stage::ToRequest)
        }
    }

    /// The guest wants to reach the host, and has.
    pub(super) fn from_guest(endpoint: Endpoint, request: &Header) -> Connection {
        Connection {
            peer_allocation: request.allocation,
            peer_forwarded: request.forwarded,
            ..Connection::new(endpoint, Stage::ToRespond)
        }
    }

    fn new(endpoint: Endpoint, stage: Stage) -> Connection {
        let gives = endpoint.gives_data();
        Connection {
            endpoint,
            queued: false,
            stage,
            greeting: None,
            buffer: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            update_asked: false,
            sent: 0,
            peer_allocation: 0,
            peer_forwarded: 0,
            credit_requested: false,
            readable: gives,
            writable: true,
            host_sent_all: false,
            host_deaf: false,
            shutdown_told: 0,
            guest_sent_all: false,
            guest_deaf: false,
            end_passed_on: false,
        }
    }

    /// The room that the guest is granted in all.
    pub(super) fn allocation(&self) -> u32 {
        if self.endpoint.takes_data() {
            BUFFER_BYTES
        } else {
            0
        }
    }

    /// How many bytes of the guest's were passed on, modulo 2^32.
    pub(super) fn forwarded(&self) -> u32 {
        self.forwarded
    }

    /// The guest is being told of [`forwarded`](Self::forwarded): every packet carries it.
    pub(super) fn told(&mut self) {
        self.forwarded_told = self.forwarded;
        self.update_asked = false;
    }

    /// Takes a packet of the guest's. Its data begins [`HEADER_BYTES`] into the chain.
    pub(super) fn receive(&mut self, header: &Header, chain: &Chain) -> Fate {
        let room = (self.peer_allocation, self.peer_forwarded);
        self.peer_allocation = header.allocation;
        self.peer_forwarded = header.forwarded;
        if room != (self.peer_allocation, self.peer_forwarded) {
            self.credit_requested = false;
        }
        match (self.stage, header.operation) {
            (_, Operation::Reset) => return Fate::Gone,
            (Stage::Requested, Operation::Response) => return self.establish(),
            // Nothing else is due before the guest has answered, or has been answered.
            (Stage::ToRequest | Stage::Requested, _) => return Fate::Reset,
            (Stage::ToRespond | Stage::Established, Operation::Data) => {
                if let Fate::Reset = self.receive_data(header, chain) {
                    return Fate::Reset;
                }
            }
            (_, Operation::Shutdown) => {
                self.guest_deaf |= header.flags & SHUTDOWN_RECEIVE != 0;
                self.guest_sent_all |= header.flags & SHUTDOWN_SEND != 0;
                if self.guest_deaf {
                    self.endpoint.shut(Shutdown::Read);
                }
            }
            (_, Operation::CreditRequest) => self.update_asked = true,
            (_, Operation::CreditUpdate) => {}
            (_, Operation::Request | Operation::Response | Operation::Unknown(_)) => {
                return Fate::Reset;
            }
        }
        self.advance()
    }

    fn establish(&mut self) -> Fate {
        self.stage = Stage::Established;
        let Some(greeting) = self.greeting.take() else {
            return Fate::Lives;
        };
        // The socket is fresh, so there is room, or the client is gone.
        match self.endpoint.write_bytes(greeting.as_bytes()) {
            Ok(written) if written == greeting.len() => Fate::Lives,
            Ok(_) | Err(_) => Fate::Reset,
        }
    }

    fn receive_data(&mut self, header: &Header, chain: &Chain) -> Fate {
        let len = header.len as usize;
        let granted = self.allocation() as usize;
        if self.guest_sent_all
            || len > chain.readable_bytes() - HEADER_BYTES
            || self.buffer.len() + len > granted
        {
            return Fate::Reset;
        }
        let mut done = if self.host_deaf { len } else { 0 };
        let direct = self.endpoint.writes_guest_memory();
        while done < len && direct && self.writable && self.buffer.is_empty() {
            let mut list = IoList::new();
            let part = (len - done).min(self.endpoint.write_bytes_max());
            list.push_readable(chain, HEADER_BYTES + done, part);
            match self.endpoint.write(&list) {
                Ok(written) => done += written,
                Err(error) => {
                    if self.write_failed(&error) {
                        done = len;
                    }
                }
            }
        }
        self.count_forwarded(done);
        if done < len {
            let mut rest = vec![0; len - done];
            chain.read(HEADER_BYTES + done, &mut rest);
            self.buffer.extend(rest);
        }
        Fate::Lives
    }

    /// Writes out what waits for the host, and ends what can be ended.
    fn advance(&mut self) -> Fate {
        while self.writable && !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match self.endpoint.write_bytes(front) {
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.count_forwarded(written);
                }
                Err(error) => {
                    if self.write_failed(&error) {
                        let lost = self.buffer.len();
                        self.count_forwarded(lost);
                        self.buffer = VecDeque::new();
                    }
                }
            }
        }
        if !self.buffer.is_empty() {
            return Fate::Lives;
        }
        // Idle connections hold no memory.
        self.buffer = VecDeque::new();
        if self.guest_sent_all && (self.guest_deaf || self.endpoint.ends_with_guest_data()) {
            return Fate::Reset;
        }
        if self.guest_sent_all && !self.end_passed_on {
            self.end_passed_on = true;
            self.endpoint.shut(Shutdown::Write);
        }
        Fate::Lives
    }

    /// Whether the host will never take any more.
    fn write_failed(&mut self, error: &io::Error) -> bool {
        self.writable = false;
        self.host_deaf |= error.kind() != io::ErrorKind::WouldBlock;
        self.host_deaf
    }

    fn count_forwarded(&mut self, bytes: usize) {
        // No more than BUFFER_BYTES at a time.
        let bytes = u32::try_from(bytes).unwrap_or_default();
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The endpoint has become ready.
    pub(super) fn ready(&mut self, events: EpollFlags) -> Fate {
        let over = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        if events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | over) {
            self.readable = self.endpoint.gives_data();
        }
        if events.intersects(EpollFlags::EPOLLOUT | over) {
            self.writable = true;
        }
        if events.intersects(over) && self.endpoint.takes_data() {
            if matches!(self.stage, Stage::ToRequest | Stage::Requested) {
                // The client has not waited for the guest's answer.
                return Fate::Reset;
            }
            self.host_deaf = true;
        }
        self.advance()
    }

    /// Whether there is something to tell the guest.
    pub(super) fn has_outgoing(&self) -> bool {
        match self.stage {
            Stage::ToRequest | Stage::ToRespond => true,
            Stage::Requested => false,
            Stage::Established => {
                self.owes_update() || self.may_read() || self.shutdown_due() != self.shutdown_told
            }
        }
    }

    fn owes_update(&self) -> bool {
        self.update_asked || self.forwarded.wrapping_sub(self.forwarded_told) >= CREDIT_UPDATE_BYTES
    }

    /// Whether to read, or to ask for the credit that it takes.
    fn may_read(&self) -> bool {
        self.readable
            && !self.host_sent_all
            && !self.guest_deaf
            && (self.credit() > 0 || !self.credit_requested)
    }

    fn credit(&self) -> usize {
        let on_the_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_allocation.saturating_sub(on_the_way) as usize
    }

    fn shutdown_due(&self) -> u32 {
        let send = if self.host_sent_all { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        send | receive
    }

    /// The next thing to tell the guest; data is put into `chain`, behind the header's place.
    pub(super) fn next_outgoing(&mut self, chain: &Chain) -> Option<Outgoing> {
        let plain = |operation| Outgoing {
            operation,
            flags: 0,
            len: 0,
        };
        match self.stage {
            Stage::ToRequest => {
                self.stage = Stage::Requested;
                return Some(plain(Operation::Request));
            }
            Stage::ToRespond => {
                self.stage = Stage::Established;
                return Some(plain(Operation::Response));
            }
            Stage::Requested => return None,
            Stage::Established => {}
        }
        if self.may_read() {
            if self.credit() == 0 {
                self.credit_requested = true;
                return Some(plain(Operation::CreditRequest));
            }
            if let Some(len) = self.read_into(chain) {
                return Some(Outgoing {
                    len,
                    ..plain(Operation::Data)
                });
            }
        }
        let due = self.shutdown_due();
        if due != self.shutdown_told {
            self.shutdown_told = due;
            return Some(Outgoing {
                flags: due,
                ..plain(Operation::Shutdown)
            });
        }
        self.owes_update().then(|| plain(Operation::CreditUpdate))
    }

    /// Reads what there is into the chain, as far as credit and room go.
    fn read_into(&mut self, chain: &Chain) -> Option<u32> {
        let mut list = IoList::new();
        let limit = self.credit().min(PACKET_BYTES_MAX);
        list.push_writable(chain, HEADER_BYTES, limit);
        match self.endpoint.read(&list) {
            Ok(0) => self.host_sent_all = true,
            Ok(bytes) => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                self.sent = self.sent.wrapping_add(bytes);
                return Some(bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // What a socket says after it was reset by the other end.
            Err(_) => {
                self.host_sent_all = true;
                self.host_deaf = self.endpoint.takes_data();
            }
        }
        None
    }
}
