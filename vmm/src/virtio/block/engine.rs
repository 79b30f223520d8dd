//! How operations reach the disk's file: through io_uring, or by calls that do them at once.
//!
//! The ring does everything where it does it best, which is reads above all: those of cached data
//! end within the call that submits them, many at a time, and the others wait in the kernel. Writes
//! to a regular file go to the page cache, and most file systems cannot promise the ring that this
//! will not wait, so the ring hands each to a thread of the kernel; a plain call takes half as long.
//! A call may wait, for a disk that does not keep up, and this disk's thread with it; the writes that
//! follow then go to the ring. Where the host does not let us have a ring, calls do all.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::{FallocateFlags, fallocate};

use super::image::Image;
use super::patience::Patience;
use super::request::{Kind, Operation, Progress, Status};
use super::ring::Ring;

/// An operation that has ended, and how.
#[derive(Debug)]
pub(crate) struct Completed {
    pub(crate) operation: Operation,
    pub(crate) status: Status,
}

/// Both ways, and the choice between them.
#[derive(Debug)]
pub(crate) struct Engine {
    calls: Calls,
    ring: Option<Box<Ring>>,
    /// Writes go to the page cache.
    cached_writes: bool,
    patience: Patience,
}

impl Engine {
    /// An engine with room for `depth` operations at a time, without a ring where io_uring is
    /// disabled, filtered or unknown.
    pub(crate) fn new(file: File, depth: u16) -> Engine {
        let file = Arc::new(file);
        let ring = Ring::new(file.clone(), depth);
        Engine {
            ring: ring.ok().map(Box::new),
            ..Engine::on_file(file)
        }
    }

    /// An engine that does each operation at once.
    #[cfg(test)]
    pub(crate) fn without_ring(file: File) -> Engine {
        Engine::on_file(Arc::new(file))
    }

    fn on_file(file: Arc<File>) -> Engine {
        Engine {
            cached_writes: file.metadata().is_ok_and(|metadata| metadata.is_file()),
            calls: Calls {
                target: Target::File(file),
                completed: VecDeque::new(),
            },
            ring: None,
            patience: Patience::default(),
        }
    }

    /// An engine that does each operation at once, on an image.
    pub(crate) fn on_image(image: Image) -> Engine {
        Engine {
            cached_writes: false,
            calls: Calls {
                target: Target::Image(Box::new(image)),
                completed: VecDeque::new(),
            },
            ring: None,
            patience: Patience::default(),
        }
    }

    /// Takes on an operation. It is begun by the next [`submit`](Self::submit) at the latest.
    pub(crate) fn start(&mut self, operation: Operation) {
        let cached_write = self.cached_writes && operation.kind == Kind::Write { stable: false };
        match &mut self.ring {
            Some(ring) if !cached_write || !self.patience.allows_call(Instant::now()) => {
                ring.start(operation);
            }
            _ => self.calls.start(operation),
        }
    }

    /// Hands what was started to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.patience.end_batch();
        self.ring.as_mut().map_or(Ok(()), |ring| ring.submit())
    }

    /// An operation that has ended since. None means none yet; what was left of operations that
    /// were cut short has then been started again and waits for [`submit`](Self::submit).
    pub(crate) fn completed(&mut self) -> Option<Completed> {
        let done = self.calls.completed.pop_front();
        done.or_else(|| self.ring.as_mut()?.completed())
    }

    /// Operations that were started and not yet returned by [`completed`](Self::completed).
    pub(crate) fn in_flight(&self) -> usize {
        let ring = self.ring.as_ref().map_or(0, |ring| ring.in_flight());
        self.calls.completed.len() + ring
    }

    /// Whether there is something for [`submit`](Self::submit) to do.
    pub(crate) fn has_unsubmitted(&mut self) -> bool {
        self.ring
            .as_mut()
            .is_some_and(|ring| ring.has_unsubmitted())
    }

    /// A descriptor that is readable when operations have completed.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.ring.as_ref().map(|ring| ring.fd())
    }

    /// Waits until an operation has ended, if any is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        match &mut self.ring {
            Some(ring) if self.calls.completed.is_empty() => ring.wait(),
            _ => Ok(()),
        }
    }

    /// Once all operations have ended, makes the file whole for others that may read it.
    pub(crate) fn write_back(&self) -> io::Result<()> {
        match &self.calls.target {
            Target::File(_) => Ok(()),
            Target::Image(image) => image.write_back(),
        }
    }

    /// Waits for all operations and forgets them.
    pub(crate) fn drain(&mut self) {
        self.calls.completed.clear();
        if let Some(ring) = &mut self.ring {
            ring.drain();
        }
    }
}

/// What operations are done to.
#[derive(Debug)]
enum Target {
    File(Arc<File>),
    Image(Box<Image>),
}

/// Does each operation in full when it is started.
#[derive(Debug)]
struct Calls {
    target: Target,
    completed: VecDeque<Completed>,
}

impl Calls {
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

    fn perform(&mut self, operation: &Operation) -> io::Result<usize> {
        match &mut self.target {
            Target::File(file) => perform(file, operation),
            Target::Image(image) => image.perform(operation),
        }
    }
}

fn perform(file: &File, operation: &Operation) -> io::Result<usize> {
    let position = operation.next_position();
    match operation.kind {
        Kind::Read => operation.io_list().read_at(file.as_fd(), position),
        Kind::Write { .. } => {
            let flags = operation.write_flags();
            operation.io_list().write_at(file.as_fd(), position, flags)
        }
        Kind::Flush => file.sync_data().map(|()| 0),
        Kind::Zero { .. } => {
            let mode = FallocateFlags::from_bits_retain(operation.allocation_mode());
            let offset = i64::try_from(position).map_err(io::Error::other)?;
            let len = i64::try_from(operation.bytes).map_err(io::Error::other)?;
            fallocate(file.as_fd(), mode, offset, len)?;
            Ok(0)
        }
    }
}
