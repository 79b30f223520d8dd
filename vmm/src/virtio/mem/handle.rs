//! What the rest of the VMM keeps of a memory device once the event loop has it: how much memory is
//! to be plugged in, and how much is.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::BLOCK_BYTES;

/// Works from any thread.
#[derive(Clone, Debug)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

/// What the device and its handles share. All sizes are in bytes.
#[derive(Debug)]
pub(super) struct Shared {
    most: u64,
    requested: AtomicU64,
    plugged: AtomicU64,
    /// Readable when `requested` has changed.
    changed: EventFd,
}

impl MemHandle {
    pub(super) fn new(shared: Arc<Shared>) -> MemHandle {
        MemHandle { shared }
    }

    /// Asks the guest to have so many bytes plugged in, rounded down to whole blocks and to what
    /// there is. It takes its time, and may be unable to take out what it uses.
    pub fn request(&self, bytes: u64) {
        self.shared.set_requested(bytes);
        // It fails only if the counter is full, and then the descriptor is readable as it is.
        let _ = self.shared.changed.write(1);
    }

    /// How much could be plugged in, in bytes.
    pub fn most(&self) -> u64 {
        self.shared.most
    }

    /// How much the guest was asked to plug in, in bytes.
    pub fn requested(&self) -> u64 {
        self.shared.requested()
    }

    /// How much is plugged in, in bytes.
    pub fn plugged(&self) -> u64 {
        self.shared.plugged.load(Ordering::Relaxed)
    }
}

impl Shared {
    pub(super) fn new(most: u64) -> Result<Shared, Errno> {
        Ok(Shared {
            most,
            requested: AtomicU64::new(0),
            plugged: AtomicU64::new(0),
            changed: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    pub(super) fn requested(&self) -> u64 {
        self.requested.load(Ordering::Relaxed)
    }

    pub(super) fn set_requested(&self, bytes: u64) {
        let blocks = bytes.min(self.most) / BLOCK_BYTES;
        self.requested
            .store(blocks * BLOCK_BYTES, Ordering::Relaxed);
    }

    pub(super) fn set_plugged(&self, bytes: u64) {
        self.plugged.store(bytes, Ordering::Relaxed);
    }

    /// Readable when somebody has asked for something.
    pub(super) fn fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    /// What is asked for; [`fd`](Self::fd) is not readable until that changes again.
    pub(super) fn take_requested(&self) -> u64 {
        // Readable or not: it is only being made unreadable.
        let _ = self.changed.read();
        self.requested()
    }
}
