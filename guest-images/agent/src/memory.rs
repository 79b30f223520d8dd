//! How much memory the machine has, and what of it is left to the workload.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// /proc/meminfo is about 1.5 KiB long.
const MEMINFO_BYTES_MAX: usize = 8 * 1024;

/// What the agent and the kernel keep for themselves of what is available at the start: a
/// sixteenth, and this much at least.
const RESERVE_BYTES_MIN: u64 = 8 * 1024 * 1024;

/// How many bytes of memory Linux describes by one: 64 for each page.
const DESCRIBED_BY_ONE: u64 = 64;

/// What /proc/meminfo says, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    pub(crate) available: u64,
}

impl Memory {
    /// Reads an open /proc/meminfo.
    pub(crate) fn read(file: &File) -> io::Result<Self> {
        let mut text = vec![0; MEMINFO_BYTES_MAX];
        let count = file.read_at(&mut text, 0)?;
        text.truncate(count);
        let text = String::from_utf8_lossy(&text);
        Ok(Self {
            total: bytes(&text, "MemTotal:"),
            available: bytes(&text, "MemAvailable:"),
        })
    }

    /// What it would have been in a machine of `now` bytes instead of `at_start`.
    pub(crate) fn resized(self, at_start: u64, now: u64) -> Self {
        let lost = at_start.saturating_sub(now);
        let more = now.saturating_sub(at_start);
        // The kernel describes each page of what is plugged in, in memory that was there before.
        let won = more - more / DESCRIBED_BY_ONE;
        let resize = |bytes: u64| bytes.saturating_sub(lost).saturating_add(won);
        Self {
            total: resize(self.total),
            available: resize(self.available),
        }
    }

    /// What the workload may have. Without a limit of its own, a workload that wants more than there
    /// is would not be killed but starve the whole machine: with no swap, the kernel finds the pages
    /// of running programs, agent included, to drop and to read again, for ever.
    pub(crate) fn for_workload(self) -> u64 {
        let reserve = (self.available / 16).max(RESERVE_BYTES_MIN);
        self.available.saturating_sub(reserve)
    }
}

/// One entry, which counts in KiB.
fn bytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    let kib: u64 = number.and_then(|number| number.parse().ok()).unwrap_or(0);
    kib.saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:         121028 kB\nMemFree:  90000 kB\n";
        assert_eq!(bytes(text, "MemTotal:"), 121_028 * 1024);
        assert_eq!(bytes(text, "MemAvailable:"), 0);
    }

    #[test]
    fn the_share_follows_the_machine() {
        const MIB: u64 = 1024 * 1024;
        let memory = Memory {
            total: 120 * MIB,
            available: 96 * MIB,
        };
        for (now, available) in [(128, 96), (192, 159), (64, 32), (16, 0)] {
            let resized = memory.resized(128 * MIB, now * MIB);
            assert_eq!(resized.available, available * MIB, "{now}");
        }
    }

    #[test]
    fn a_part_is_kept_from_the_workload() {
        const MIB: u64 = 1024 * 1024;
        for (available, left) in [(64 * MIB, 56 * MIB), (1024 * MIB, 960 * MIB), (MIB, 0)] {
            let memory = Memory {
                total: available,
                available,
            };
            assert_eq!(memory.for_workload(), left);
        }
    }
}
