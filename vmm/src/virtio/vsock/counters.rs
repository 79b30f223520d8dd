//! What a vsock device counts, for whoever asks while it is at work.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::control::VsockStats;

/// As the guest sees it. They wrap at 2^64.
#[derive(Debug, Default)]
pub struct VsockCounters {
    pub(super) connections: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) received_packets: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) sent_packets: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
}

impl VsockCounters {
    /// As they are now.
    pub fn stats(&self) -> VsockStats {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VsockStats {
            connections: value(&self.connections),
            open: value(&self.open),
            refused: value(&self.refused),
            received_packets: value(&self.received_packets),
            received_bytes: value(&self.received_bytes),
            sent_packets: value(&self.sent_packets),
            sent_bytes: value(&self.sent_bytes),
        }
    }
}
