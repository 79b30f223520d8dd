//! How operations reach the disk's file: through io_uring, or by calls that do them at once.
//!
//! The ring does everything where it does it best, which is reads above all: those of cached data
//! end within the call that submits them, many at a time, and the others wait in the kernel. Writes
//! to a regular file go to the page cache, and most file systems cannot promise the ring that this
//! will not wait, so the ring hands each to a thread of the kernel; a plain call takes half as long.
//! A call may wait, for a disk that does not keep up, and this disk's thread with it; the writes that
//! follow then go to the ring. Where the host does not let us have a ring, calls do all.
//!
//! All of this is copying on the disk's thread, while nobody else gets at the device. A driver may ask
//! for any amount of it, the same memory again and again: what is begun at a time is bounded, in bytes
//! and, for calls, in time.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::{FallocateFlags, fallocate};

use super::image::Image;
use super::patience::Patience;
use super::request::{Kind, Operation, Progress, REQUEST_BYTES_MAX, Status};
use super::ring::Ring;

/// The most data that moves at a time: what one [`Engine::begin`] begins, with what was begun before and
/// has not ended. Some milliseconds of copying, and far more than it takes to keep a disk busy. The
/// longest request fits.
pub(crate) const ROUND_BYTES: u64 = REQUEST_BYTES_MAX;

/// What a flush or the zeroing of a range counts for: no data moves, but whoever waits for all that is
/// under way waits for the disk.
const CALL_BYTES: u64 = 1 << 20;

/// An operation that has ended, and how.
#[derive(Debug)]
pub(crate) struct Completed {
    pub(crate) operation: Operation,
    pub(crate) status: Status,
}

/// Both ways, and the choice between them.
#[derive(Debug)]
pub(crate) struct Engine {
    /// Taken on; the first may have been begun.
    waiting: VecDeque<Operation>,
    calls: Calls,
    ring: Option<Box<Ring>>,
    /// The weight of the operations that are in the ring.
    moving: u64,
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
            ..Engine::of_calls(Target::File(file))
        }
    }

    /// An engine that does each operation at once, on an image.
    pub(crate) fn on_image(image: Image) -> Engine {
        Engine::of_calls(Target::Image(Box::new(image)))
    }

    fn of_calls(target: Target) -> Engine {
        Engine {
            waiting: VecDeque::new(),
            calls: Calls {
                target,
                completed: VecDeque::new(),
            },
            ring: None,
            moving: 0,
            cached_writes: false,
            patience: Patience::default(),
        }
    }

    /// Takes on an operation.
    pub(crate) fn start(&mut self, operation: Operation) {
        self.waiting.push_back(operation);
    }

    /// Begins what was taken on, in its order, as much as may be begun at a time. Others are to have
    /// their turn before the next.
    pub(crate) fn begin(&mut self) {
        self.patience.end_batch();
        let mut room = self.room();
        while let Some(operation) = self.waiting.pop_front() {
            let bytes = weight(&operation);
            let unfinished = if bytes > room {
                Some(operation)
            } else {
                room -= bytes;
                self.begin_one(operation)
            };
            if let Some(operation) = unfinished {
                self.waiting.push_front(operation);
                break;
            }
        }
    }

    /// Gives back an operation for which it is too early.
    fn begin_one(&mut self, operation: Operation) -> Option<Operation> {
        let cached_write = self.cached_writes && operation.kind == Kind::Write { stable: false };
        match &mut self.ring {
            Some(ring) if !cached_write || !self.patience.allows_call(Instant::now()) => {
                self.moving += weight(&operation);
                ring.start(operation);
                None
            }
            _ => self.calls.start(operation, &mut self.patience),
        }
    }

    fn room(&self) -> u64 {
        ROUND_BYTES.saturating_sub(self.moving)
    }

    /// Whether there is something for [`begin`](Self::begin) to begin.
    pub(crate) fn can_begin(&self) -> bool {
        let next = self.waiting.front();
        next.is_some_and(|operation| weight(operation) <= self.room())
    }

    /// Hands what the ring has to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |ring| ring.submit())
    }

    /// An operation that has ended since. None means none yet; what was left of operations that
    /// were cut short has then been started again and waits for [`submit`](Self::submit).
    pub(crate) fn completed(&mut self) -> Option<Completed> {
        let done = self.calls.completed.pop_front();
        done.or_else(|| {
            let completed = self.ring.as_mut()?.completed()?;
            self.moving -= weight(&completed.operation);
            Some(completed)
        })
    }

    /// Operations that were started and not yet returned by [`completed`](Self::completed).
    pub(crate) fn in_flight(&self) -> usize {
        let ring = self.ring.as_ref().map_or(0, |ring| ring.in_flight());
        self.waiting.len() + self.calls.completed.len() + ring
    }

    /// Those of them that were begun.
    #[cfg(test)]
    pub(crate) fn begun(&self) -> usize {
        self.in_flight() - self.waiting.len()
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

    /// Waits until there is something to do, if any operation is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        let idle = self.calls.completed.is_empty() && !self.can_begin();
        match &mut self.ring {
            Some(ring) if idle => ring.wait(),
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

    /// Waits for what was begun, and forgets all.
    pub(crate) fn drain(&mut self) {
        self.waiting.clear();
        self.calls.completed.clear();
        if let Some(ring) = &mut self.ring {
            ring.drain();
        }
        self.moving = 0;
    }
}

/// What an operation takes of [`ROUND_BYTES`].
fn weight(operation: &Operation) -> u64 {
    match operation.kind {
        Kind::Read | Kind::Write { .. } => operation.bytes as u64,
        Kind::Flush | Kind::Zero { .. } => CALL_BYTES,
    }
}

/// What operations are done to.
#[derive(Debug)]
enum Target {
    File(Arc<File>),
    Image(Box<Image>),
}

/// Does each operation when it is started.
#[derive(Debug)]
struct Calls {
    target: Target,
    completed: VecDeque<Completed>,
}

impl Calls {
    /// Gives back an operation of which something is left.
    fn start(&mut self, mut operation: Operation, patience: &mut Patience) -> Option<Operation> {
        while patience.lasts(Instant::now()) {
            let result = self.perform(&operation);
            if let Progress::Finished(status) = operation.advance(&result) {
                self.completed.push_back(Completed { operation, status });
                return None;
            }
        }
        Some(operation)
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
