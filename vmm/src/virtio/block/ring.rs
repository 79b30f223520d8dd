//! The io_uring engine.
//!
//! UNSAFETY: the kernel reads and writes guest memory between the submission of an operation and its
//! completion. The ring therefore owns each operation, and with it a share of the mapping that its
//! ranges lie in, until the completion was seen; the iovecs of an operation stay in its slot until
//! then, too.
#![expect(
    unsafe_code,
    reason = "the kernel is handed raw pointers into guest memory"
)]

use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};

use super::engine::Completed;
use super::request::{Kind, Operation, Progress};
use crate::virtio::io_ring::{self, byte_count, is_busy};

/// A ring, and what is in flight in it.
pub(crate) struct Ring {
    ring: IoUring,
    /// One per operation that can be in flight, fixed in number; the index is the user data.
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Not registered with the ring: the kernel takes its time to undo that when the process is
    /// gone, and the file would stay locked.
    file: Arc<File>,
}

#[derive(Default)]
struct Slot {
    operation: Option<Operation>,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs are addresses in guest memory that only the kernel follows.
unsafe impl Send for Slot {}

impl fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Ring")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Sets up a ring for `depth` operations on `file`.
    pub(crate) fn new(file: Arc<File>, depth: u16) -> io::Result<Ring> {
        Ok(Ring {
            ring: io_ring::build(depth)?,
            slots: (0..depth).map(|_| Slot::default()).collect(),
            free: (0..depth).rev().collect(),
            file,
        })
    }

    /// Operations that have not been returned by [`completed`](Self::completed).
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Readable when there are completions.
    pub(crate) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Takes on an operation.
    ///
    /// # Panics
    ///
    /// If `depth` operations are in flight: the device holds no more chains than its queue has.
    pub(crate) fn start(&mut self, operation: Operation) {
        let slot = self
            .free
            .pop()
            .expect("the queue is no longer than the ring is deep");
        self.slots[usize::from(slot)].operation = Some(operation);
        self.push(slot);
    }

    /// Puts (what is left of) the operation in `slot` into the submission queue.
    fn push(&mut self, slot: u16) {
        let file = Fd(self.file.as_raw_fd());
        let place = &mut self.slots[usize::from(slot)];
        let entry = place.entry(file).user_data(slot.into());
        // SAFETY: the slot holds the operation, and so the memory, until its completion.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // Each slot has one entry in flight at most, and there are as many entries as slots.
        pushed.expect("the submission queue has an entry per slot");
    }

    /// Whether entries wait for [`submit`](Self::submit).
    pub(crate) fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Hands all entries to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        let mut refusals = 0;
        while self.has_unsubmitted() {
            io_ring::submit(&self.ring, 0, &mut refusals)?;
        }
        Ok(())
    }

    /// The next operation that has ended.
    pub(crate) fn completed(&mut self) -> Option<Completed> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = u16::try_from(entry.user_data()).ok()?;
            let place = self.slots.get_mut(usize::from(slot))?;
            let operation = place.operation.as_mut()?;
            match operation.advance(&io_ring::outcome(entry.result())) {
                Progress::Again => self.push(slot),
                Progress::Finished(status) => {
                    let operation = place.operation.take()?;
                    self.free.push(slot);
                    return Some(Completed { operation, status });
                }
            }
        }
    }

    /// Waits for all operations and forgets them. Disks answer, be it with an error, so this ends.
    pub(crate) fn drain(&mut self) {
        while self.in_flight() > 0 {
            while self.completed().is_some() {}
            if self.in_flight() == 0 {
                break;
            }
            if self.wait().is_err() {
                // The ring is unusable. The slots still own the memory; see `drop`.
                break;
            }
        }
    }

    /// Submits what is to be submitted and waits until an operation has ended, or a while.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted || is_busy(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
        if self.in_flight() > 0 {
            // Better to leak a mapping than to let the kernel write to what is not one any more.
            mem::forget(mem::take(&mut self.slots));
        }
    }
}

impl Slot {
    /// The operation as the kernel takes it.
    fn entry(&mut self, file: Fd) -> Entry {
        let operation = self
            .operation
            .as_ref()
            .expect("a slot is filled before it is pushed");
        let position = operation.next_position();
        let list = operation.io_list();
        match (operation.kind, list.iovecs()) {
            (Kind::Read, [one]) => {
                opcode::Read::new(file, one.iov_base.cast(), byte_count(one.iov_len))
                    .offset(position)
                    .build()
            }
            (Kind::Read, many) => {
                self.iovecs.clear();
                self.iovecs.extend_from_slice(many);
                opcode::Readv::new(file, self.iovecs.as_ptr(), byte_count(many.len()))
                    .offset(position)
                    .build()
            }
            (Kind::Write { .. }, ranges) => {
                let flags = operation.write_flags();
                io_ring::write(file, ranges, &mut self.iovecs, position, flags)
            }
            (Kind::Flush, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            (Kind::Zero { .. }, _) => opcode::Fallocate::new(file, operation.bytes as u64)
                .offset(position)
                .mode(operation.allocation_mode())
                .build(),
        }
    }
}
