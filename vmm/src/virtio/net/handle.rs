//! What the rest of the VMM keeps of a network device once the event loop has it: counters and limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::throttle::Shared;
use crate::spec::NetLimits;

/// What a network device has done since it was made, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct NetStats {
    pub received_frames: u64,
    /// Without virtio headers, as all byte counts here.
    pub received_bytes: u64,
    /// Frames that did not fit the guest's buffers.
    pub received_dropped: u64,
    pub sent_frames: u64,
    pub sent_bytes: u64,
    /// Frames that were malformed, or that the tap refused.
    pub sent_dropped: u64,
}

/// What the rest of the VMM keeps of a network device. Works from any thread.
#[derive(Clone, Debug)]
pub struct NetHandle {
    pub(super) counters: Arc<Counters>,
    pub(super) limits: Arc<Shared>,
}

impl NetHandle {
    /// Replaces all limits. Frames that wait are looked at again at once.
    pub fn set_limits(&self, limits: NetLimits) {
        self.limits.set(limits);
    }

    /// The counters.
    pub fn stats(&self) -> NetStats {
        let counters = &self.counters;
        NetStats {
            received_frames: counters.received_frames.load(Ordering::Relaxed),
            received_bytes: counters.received_bytes.load(Ordering::Relaxed),
            received_dropped: counters.received_dropped.load(Ordering::Relaxed),
            sent_frames: counters.sent_frames.load(Ordering::Relaxed),
            sent_bytes: counters.sent_bytes.load(Ordering::Relaxed),
            sent_dropped: counters.sent_dropped.load(Ordering::Relaxed),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) received_frames: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) received_dropped: AtomicU64,
    pub(super) sent_frames: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    pub(super) sent_dropped: AtomicU64,
}

/// Counters have one writer, so no locked instruction is needed.
pub(super) fn count(counter: &AtomicU64, more: usize) {
    let value = counter.load(Ordering::Relaxed).wrapping_add(more as u64);
    counter.store(value, Ordering::Relaxed);
}
