//! What a guest tells of its memory (virtio 1.2, section 5.5.6.3).

use crate::virtio::chain::Chain;

/// A tag and a value.
const ENTRY_BYTES: usize = 2 + 8;

/// More entries than there are tags; what comes after them is not read.
const ENTRIES_MAX: usize = 32;

/// As the guest says; what it does not say is not there. Bytes or numbers since it started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct GuestStatistics {
    /// Memory that was swapped in, in bytes.
    pub swapped_in: Option<u64>,
    /// Memory that was swapped out, in bytes.
    pub swapped_out: Option<u64>,
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    /// Memory that is not used for anything, in bytes.
    pub free: Option<u64>,
    /// All memory, in bytes.
    pub total: Option<u64>,
    /// Memory that could be had without swapping, in bytes.
    pub available: Option<u64>,
    /// Files that could be read again, in bytes.
    pub caches: Option<u64>,
    /// Processes that were killed for want of memory.
    pub oom_kills: Option<u64>,
}

impl GuestStatistics {
    /// Reads a driver's buffer. Tags that nobody knows mean nothing, as the specification has it.
    pub(super) fn read(chain: &Chain) -> GuestStatistics {
        let mut bytes = [0; ENTRY_BYTES * ENTRIES_MAX];
        let count = chain.read(0, &mut bytes);
        let mut statistics = GuestStatistics::default();
        let (entries, _) = bytes[..count].as_chunks::<ENTRY_BYTES>();
        for [tag @ .., a, b, c, d, e, f, g, h] in entries {
            let field = match u16::from_le_bytes(*tag) {
                0 => &mut statistics.swapped_in,
                1 => &mut statistics.swapped_out,
                2 => &mut statistics.major_faults,
                3 => &mut statistics.minor_faults,
                4 => &mut statistics.free,
                5 => &mut statistics.total,
                6 => &mut statistics.available,
                7 => &mut statistics.caches,
                10 => &mut statistics.oom_kills,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
        }
        statistics
    }
}
