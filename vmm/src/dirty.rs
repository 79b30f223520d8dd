//! Which pages of guest memory devices have written to. What guests write themselves, the kernel
//! remembers ([`Vm::take_dirty`](crate::kvm::Vm::take_dirty)).
//!
//! Devices hand addresses of this process to the kernel, and their chains outlive any call, so pages
//! are known by those addresses; and a process has one address space. Hence one set for the process.
//! While nothing is tracked, marking costs one comparison.
//!
//! Not marked are the used rings of queues: they are few, and taken to be written always.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The unit that is tracked.
pub const PAGE_BYTES: usize = 4096;

static TRACKED: OnceLock<Vec<Range>> = OnceLock::new();

/// A range of addresses, and a bit for each of its pages.
#[derive(Debug)]
struct Range {
    start: usize,
    pages: Vec<AtomicU64>,
}

impl Range {
    fn new(start: usize, bytes: usize) -> Range {
        let words = bytes.div_ceil(PAGE_BYTES).div_ceil(64);
        Range {
            start,
            pages: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Marks the part of `start..end` that lies in the range.
    fn mark(&self, start: usize, end: usize) {
        let last = self.start + self.pages.len() * 64 * PAGE_BYTES;
        let (start, end) = (start.max(self.start), end.min(last));
        if start >= end {
            return;
        }
        for page in (start - self.start) / PAGE_BYTES..(end - self.start).div_ceil(PAGE_BYTES) {
            self.pages[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    fn take(&self) -> Vec<u64> {
        let words = self.pages.iter();
        words.map(|word| word.swap(0, Ordering::Relaxed)).collect()
    }
}

/// Remembers from now on what is written in ranges of so many bytes from an address of this process,
/// and nothing outside. Only the first call counts: a process has one machine.
pub fn track(ranges: impl IntoIterator<Item = (usize, usize)>) {
    let ranges = ranges.into_iter();
    let make = || {
        ranges
            .map(|(start, bytes)| Range::new(start, bytes))
            .collect()
    };
    TRACKED.get_or_init(make);
}

/// The `bytes` from `start` on have been written by a device.
pub fn mark(start: *const u8, bytes: usize) {
    if let Some(ranges) = TRACKED.get() {
        for range in ranges {
            range.mark(start.addr(), start.addr().saturating_add(bytes));
        }
    }
}

/// What was marked since the last call in the range that starts there: a bit for each page.
pub fn take(start: usize) -> Vec<u64> {
    let mut ranges = TRACKED.get().into_iter().flatten();
    let found = ranges.find(|range| range.start == start);
    found.map(Range::take).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_a_range_touches_are_marked_once() {
        let range = Range::new(0x10_0000, 70 * PAGE_BYTES);
        for (start, end) in [
            (0x10_0000, 0x10_0001),
            (0x10_1fff, 0x10_2001),
            (0x10_0000 + 69 * PAGE_BYTES, usize::MAX),
            (0, 0x10_0000),
            (0x10_5000, 0x10_5000),
        ] {
            range.mark(start, end);
        }
        let taken = range.take();
        assert_eq!(taken[0], 0b111);
        assert_eq!(taken[1] & 0x3f, 1 << 5);
        assert_eq!(range.take(), [0, 0]);
    }
}
