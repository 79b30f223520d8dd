//! What the rest of the VMM keeps of a disk once the event loop has it: counters and limits.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::spec::DiskLimits;

/// What a disk has done since it was made. Requests that failed are not counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BlockStats {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    /// Discards and write-zeroes.
    pub zeroes: u64,
    pub failures: u64,
    /// Requests that had to wait for a limit.
    pub throttled: u64,
}

/// What the rest of the VMM keeps of a disk once the event loop has it. Works from any thread.
#[derive(Clone, Debug)]
pub struct BlockHandle {
    pub(super) shared: Arc<Shared>,
}

/// What the device and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) counters: Counters,
    limits: Mutex<DiskLimits>,
    /// Readable when `limits` has changed.
    changed: EventFd,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) zeroes: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) throttled: AtomicU64,
}

impl BlockHandle {
    /// Replaces all limits. Requests that wait are looked at again at once.
    pub fn set_limits(&self, limits: DiskLimits) {
        *self.shared.lock_limits() = limits;
        // It fails only if the counter is full, and then the descriptor is readable as it is.
        let _ = self.shared.changed.write(1);
    }

    /// The counters.
    pub fn stats(&self) -> BlockStats {
        let counters = &self.shared.counters;
        BlockStats {
            reads: counters.reads.load(Ordering::Relaxed),
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            writes: counters.writes.load(Ordering::Relaxed),
            written_bytes: counters.written_bytes.load(Ordering::Relaxed),
            flushes: counters.flushes.load(Ordering::Relaxed),
            zeroes: counters.zeroes.load(Ordering::Relaxed),
            failures: counters.failures.load(Ordering::Relaxed),
            throttled: counters.throttled.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    /// No counts yet, and these limits.
    pub(super) fn new(limits: DiskLimits) -> Result<Shared, Errno> {
        Ok(Shared {
            counters: Counters::default(),
            limits: Mutex::new(limits),
            changed: event()?,
        })
    }

    /// The limits as they are to be.
    pub(super) fn limits(&self) -> DiskLimits {
        *self.lock_limits()
    }

    /// The limits as they are now; [`fd`](Self::fd) is not readable until they change again.
    pub(super) fn take_limits(&self) -> DiskLimits {
        // Readable or not: it is only being made unreadable.
        let _ = self.changed.read();
        *self.lock_limits()
    }

    /// Readable when the limits have changed.
    pub(super) fn fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    /// Limits are plain numbers: a thread that panicked left none of them half written.
    fn lock_limits(&self) -> MutexGuard<'_, DiskLimits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A counter that makes a descriptor readable. Neither end of it ever waits.
pub(super) fn event() -> Result<EventFd, Errno> {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
}

/// Counters have one writer, so no locked instruction is needed.
pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(more),
        Ordering::Relaxed,
    );
}
