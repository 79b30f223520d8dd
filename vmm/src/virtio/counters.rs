//! What a transport counts, for whoever asks while the transport is at work.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::control::DeviceStats;

/// The counters of one device. They wrap at 2^64.
#[derive(Debug)]
pub struct Counters {
    name: String,
    pub(super) kicks: AtomicU64,
    pub(super) interrupts: AtomicU64,
    pub(super) failures: AtomicU64,
}

impl Counters {
    pub(super) fn new(name: String) -> Counters {
        Counters {
            name,
            kicks: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }
    }

    /// What the device is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As they are now.
    pub fn stats(&self) -> DeviceStats {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceStats {
            name: self.name.clone(),
            kicks: value(&self.kicks),
            interrupts: value(&self.interrupts),
            failures: value(&self.failures),
        }
    }
}

/// One more. Whoever counts holds the transport, so no locked instruction is needed.
pub(super) fn count(counter: &AtomicU64) {
    count_by(counter, 1);
}

/// So many more, as [`count`].
pub(super) fn count_by(counter: &AtomicU64, more: u64) {
    let value = counter.load(Ordering::Relaxed).wrapping_add(more);
    counter.store(value, Ordering::Relaxed);
}
