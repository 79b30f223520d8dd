//! How operations reach the disk's file: through io_uring, or one at a time where the host does not
//! let us have a ring.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, RawFd};

use nix::fcntl::{FallocateFlags, fallocate};

use super::request::{Kind, Operation, Progress, Status};
use super::ring::Ring;

/// An operation that has ended, and how.
#[derive(Debug)]
pub(crate) struct Completed {
    pub(crate) operation: Operation,
    pub(crate) status: Status,
}

/// One of the two ways.
#[derive(Debug)]
pub(crate) enum Engine {
    Ring(Box<Ring>),
    Synchronous(Synchronous),
}

impl Engine {
    /// An engine with room for `depth` operations at a time: a ring, or the synchronous one where
    /// io_uring is disabled, filtered or unknown.
    pub(crate) fn new(file: File, depth: u16) -> Engine {
        match Ring::new(file, depth) {
            Ok(ring) => Engine::Ring(Box::new(ring)),
            Err(file) => Engine::Synchronous(Synchronous::new(file)),
        }
    }

    /// Takes on an operation. It is begun by the next [`submit`](Self::submit) at the latest.
    pub(crate) fn start(&mut self, operation: Operation) {
        match self {
            Engine::Ring(ring) => ring.start(operation),
            Engine::Synchronous(synchronous) => synchronous.start(operation),
        }
    }

    /// Hands what was started to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        match self {
            Engine::Ring(ring) => ring.submit(),
            Engine::Synchronous(_) => Ok(()),
        }
    }

    /// An operation that has ended since. None means none yet; what was left of operations that
    /// were cut short has then been started again and waits for [`submit`](Self::submit).
    pub(crate) fn completed(&mut self) -> Option<Completed> {
        match self {
            Engine::Ring(ring) => ring.completed(),
            Engine::Synchronous(synchronous) => synchronous.completed.pop_front(),
        }
    }

    /// Operations that were started and not yet returned by [`completed`](Self::completed).
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Engine::Ring(ring) => ring.in_flight(),
            Engine::Synchronous(synchronous) => synchronous.completed.len(),
        }
    }

    /// Whether there is something for [`submit`](Self::submit) to do.
    pub(crate) fn has_unsubmitted(&mut self) -> bool {
        match self {
            Engine::Ring(ring) => ring.has_unsubmitted(),
            Engine::Synchronous(_) => false,
        }
    }

    /// A descriptor that is readable when operations have completed.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        match self {
            Engine::Ring(ring) => Some(ring.fd()),
            Engine::Synchronous(_) => None,
        }
    }

    /// Waits until an operation has ended, if any is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        match self {
            Engine::Ring(ring) => ring.wait(),
            Engine::Synchronous(_) => Ok(()),
        }
    }

    /// Waits for all operations and forgets them.
    pub(crate) fn drain(&mut self) {
        match self {
            Engine::Ring(ring) => ring.drain(),
            Engine::Synchronous(synchronous) => synchronous.completed.clear(),
        }
    }
}

/// Does each operation in full when it is started.
#[derive(Debug)]
pub(crate) struct Synchronous {
    file: File,
    completed: VecDeque<Completed>,
}

impl Synchronous {
    pub(crate) fn new(file: File) -> Synchronous {
        Synchronous {
            file,
            completed: VecDeque::new(),
        }
    }

    fn start(&mut self, mut operation: Operation) {
        let status = loop {
            let result = self.perform(&operation);
            match operation.advance(&result) {
                Progress::Again => {}
                Progress::Finished(status) => break status,
            }
        };
        self.completed.push_back(Completed { operation, status });
    }

    fn perform(&self, operation: &Operation) -> io::Result<usize> {
        let position = operation.next_position();
        match operation.kind {
            Kind::Read => operation.io_list().read_at(self.file.as_fd(), position),
            Kind::Write { .. } => {
                let flags = operation.write_flags();
                operation
                    .io_list()
                    .write_at(self.file.as_fd(), position, flags)
            }
            Kind::Flush => self.file.sync_data().map(|()| 0),
            Kind::Zero { .. } => {
                let mode = FallocateFlags::from_bits_retain(operation.allocation_mode());
                let offset = i64::try_from(position).map_err(io::Error::other)?;
                let len = i64::try_from(operation.bytes).map_err(io::Error::other)?;
                fallocate(self.file.as_fd(), mode, offset, len)?;
                Ok(0)
            }
        }
    }
}
