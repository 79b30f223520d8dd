//! The header of a vsock packet (virtio 1.2, section 5.10.6).

use crate::virtio::chain::Chain;

/// The length of a header.
pub(super) const HEADER_BYTES: usize = 44;

/// The host's context id.
pub(super) const HOST_CID: u64 = 2;

/// The one type of socket that we know.
pub(super) const TYPE_STREAM: u16 = 1;

/// Flags of [`Operation::Shutdown`]: the sender will not receive, will not send, any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// Not one that the specification knows.
    Unknown(u16),
}

impl Operation {
    fn from_code(code: u16) -> Operation {
        match code {
            1 => Operation::Request,
            2 => Operation::Response,
            3 => Operation::Reset,
            4 => Operation::Shutdown,
            5 => Operation::Data,
            6 => Operation::CreditUpdate,
            7 => Operation::CreditRequest,
            code => Operation::Unknown(code),
        }
    }

    fn code(self) -> u16 {
        match self {
            Operation::Request => 1,
            Operation::Response => 2,
            Operation::Reset => 3,
            Operation::Shutdown => 4,
            Operation::Data => 5,
            Operation::CreditUpdate => 6,
            Operation::CreditRequest => 7,
            Operation::Unknown(code) => code,
        }
    }
}

/// A header, in this machine's byte order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) operation: Operation,
    pub(super) flags: u32,
    /// The room for data that the sender has in all.
    pub(super) allocation: u32,
    /// How many bytes the sender has passed on since the connection began, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Header {
    /// Reads the header of a packet once; none if the chain is too short for one.
    pub(super) fn read(chain: &Chain) -> Option<Header> {
        let mut bytes = [0; HEADER_BYTES];
        if chain.read(0, &mut bytes) < HEADER_BYTES {
            return None;
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at + 2)) << 16 | u32::from(half(at));
        let long = |at: usize| u64::from(word(at + 4)) << 32 | u64::from(word(at));
        Some(Header {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            len: word(24),
            kind: half(28),
            operation: Operation::from_code(half(30)),
            flags: word(32),
            allocation: word(36),
            forwarded: word(40),
        })
    }

    /// The header as it stands in memory.
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.destination_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.operation.code().to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.allocation.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}
