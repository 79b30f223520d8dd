//! What the rest of the VMM keeps of a balloon once the event loop has it: its size, and what the
//! guest tells of its memory.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::statistics::GuestStatistics;
use super::{PAGE_BYTES, pages};

/// Works from any thread.
#[derive(Clone, Debug)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

/// What the device and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    /// In pages, as are all sizes here.
    target: AtomicU32,
    actual: AtomicU32,
    reported_bytes: AtomicU64,
    statistics: Mutex<Option<(Instant, GuestStatistics)>>,
    /// Whether somebody wants fresh statistics.
    wanted: AtomicBool,
    /// Readable when `target` or `wanted` has changed.
    changed: EventFd,
}

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> BalloonHandle {
        BalloonHandle { shared }
    }

    /// Asks the guest to have `bytes` in the balloon. It takes its time, and may be unable to.
    pub fn set_target(&self, bytes: u64) {
        self.shared.set_target(pages(bytes));
        self.shared.wake();
    }

    /// How much the guest was asked to have in the balloon, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target()) * PAGE_BYTES
    }

    /// How much it says is in there, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual()) * PAGE_BYTES
    }

    /// How much memory its reports of free pages have given back since the machine was made, in
    /// bytes. A page that was used in between counts again.
    pub fn reported(&self) -> u64 {
        self.shared.reported_bytes.load(Ordering::Relaxed)
    }

    /// What the guest last told of its memory, and when. Asks for fresh statistics, which the next
    /// call will find: a guest that nobody asks is not woken.
    pub fn statistics(&self) -> Option<(Instant, GuestStatistics)> {
        self.shared.wanted.store(true, Ordering::Relaxed);
        self.shared.wake();
        *self.shared.lock_statistics()
    }
}

impl Shared {
    pub(super) fn new() -> Result<Shared, Errno> {
        Ok(Shared {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            reported_bytes: AtomicU64::new(0),
            statistics: Mutex::default(),
            wanted: AtomicBool::new(false),
            changed: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    pub(super) fn target(&self) -> u32 {
        self.target.load(Ordering::Relaxed)
    }

    pub(super) fn set_target(&self, pages: u32) {
        self.target.store(pages, Ordering::Relaxed);
    }

    pub(super) fn actual(&self) -> u32 {
        self.actual.load(Ordering::Relaxed)
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Ordering::Relaxed);
    }

    pub(super) fn count_reported(&self, bytes: u64) {
        self.reported_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_statistics(&self, statistics: GuestStatistics) {
        *self.lock_statistics() = Some((Instant::now(), statistics));
    }

    pub(super) fn forget_statistics(&self) {
        *self.lock_statistics() = None;
    }

    /// Readable when somebody has asked for something.
    pub(super) fn fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    /// Whether fresh statistics are wanted; [`fd`](Self::fd) is not readable until somebody asks
    /// for something again.
    pub(super) fn take_wanted(&self) -> bool {
        // Readable or not: it is only being made unreadable.
        let _ = self.changed.read();
        self.wanted.swap(false, Ordering::Relaxed)
    }

    fn wake(&self) {
        // It fails only if the counter is full, and then the descriptor is readable as it is.
        let _ = self.changed.write(1);
    }

    /// Plain numbers: a thread that panicked left none of them half written.
    fn lock_statistics(&self) -> MutexGuard<'_, Option<(Instant, GuestStatistics)>> {
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
