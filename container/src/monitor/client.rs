//! One connection to the monitor's socket: what came, and what is to go.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use serde::Serialize;

use super::protocol::LINE_BYTES_MAX;

/// Output that a client has not taken yet: from this much on it holds the workload up.
const PENDING_BYTES_MAX: usize = 1024 * 1024;

/// How long a client may hold the workload up before it is dropped. With the half of the pending
/// output that it must take in this time, no client is too slow that reads 100 KiB a second.
const STALL_MAX: Duration = Duration::from_secs(5);

const READ_BYTES: usize = 16 * 1024;

/// What a client is there for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Role {
    /// Its request has not come yet.
    New,
    /// Is answered when the workload ends.
    Waits,
    Attached {
        input: bool,
    },
    /// Has been answered; the connection closes when it has taken everything.
    Answered,
}

#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    pub(super) role: Role,
    received: Vec<u8>,
    /// The client may still send.
    pub(super) sends: bool,
    pending: Vec<u8>,
    /// Set while too much is pending: then the client is given up.
    patience_ends: Option<Instant>,
}

/// A client that is of no more use: it has gone, broke the protocol, or is done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Gone;

impl Client {
    pub(super) fn new(stream: UnixStream) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        Ok(Client {
            stream,
            role: Role::New,
            received: Vec::new(),
            sends: true,
            pending: Vec::new(),
            patience_ends: None,
        })
    }

    /// Takes what has come, a piece at a time.
    pub(super) fn receive(&mut self) -> Result<(), Gone> {
        let mut buffer = [0; READ_BYTES];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.sends = false,
            // Only an attached client has anything to say after its request.
            Ok(count) if matches!(self.role, Role::New | Role::Attached { .. }) => {
                self.received.extend_from_slice(&buffer[..count]);
            }
            Ok(_) => {}
            Err(error) if is_temporary(&error) => {}
            Err(_) => return Err(Gone),
        }
        if self.received.len() > LINE_BYTES_MAX + READ_BYTES {
            return Err(Gone);
        }
        Ok(())
    }

    /// The next line that is complete.
    pub(super) fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received.iter().position(|byte| *byte == b'\n')?;
        let rest = self.received.split_off(end + 1);
        Some(std::mem::replace(&mut self.received, rest))
    }

    /// Adds a line to what is to be sent.
    pub(super) fn send(&mut self, message: &impl Serialize) {
        // The types of the protocol always can be JSON, and memory can always be written.
        serde_json::to_writer(&mut self.pending, message).ok();
        self.pending.push(b'\n');
        if self.pending.len() > PENDING_BYTES_MAX && self.patience_ends.is_none() {
            self.patience_ends = Some(Instant::now() + STALL_MAX);
        }
    }

    /// Sends what the client takes.
    pub(super) fn flush(&mut self) -> Result<(), Gone> {
        let mut sent = 0;
        while sent < self.pending.len() {
            match self.stream.write(&self.pending[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_temporary(&error) => break,
                Err(_) => return Err(Gone),
            }
        }
        self.pending.drain(..sent);
        if self.pending.len() <= PENDING_BYTES_MAX / 2 {
            self.patience_ends = None;
            // A burst must not cost memory for as long as the client stays.
            self.pending.shrink_to(READ_BYTES);
        }
        match (self.role, self.pending.is_empty()) {
            (Role::Answered, true) => Err(Gone),
            _ => Ok(()),
        }
    }

    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// When the client, which holds the workload up, is given up.
    pub(super) fn patience_ends(&self) -> Option<Instant> {
        self.patience_ends
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
