//! What a balloon and its guest tell of memory.

use serde::{Deserialize, Serialize};

use crate::virtio::balloon::BalloonHandle;

/// How much memory the guest has given back.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStats {
    /// How much it was asked to give up.
    pub target_bytes: u64,
    /// How much it says that it has given up.
    pub actual_bytes: u64,
    /// How much came back through reports of free pages since the start; what was used in between
    /// counts again.
    pub reported_bytes: u64,
    /// What the guest last told of its memory. Each request for statistics asks it for the next.
    pub guest: Option<Box<GuestMemory>>,
}

/// A guest's memory as it sees it. What it does not tell is absent.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GuestMemory {
    /// How long ago it told.
    pub age_ms: u64,
    pub total_bytes: Option<u64>,
    /// Not used for anything.
    pub free_bytes: Option<u64>,
    /// Could be had without swapping.
    pub available_bytes: Option<u64>,
    /// Holds files that could be read again.
    pub caches_bytes: Option<u64>,
    /// Since the guest started, as is all that follows.
    pub swapped_in_bytes: Option<u64>,
    pub swapped_out_bytes: Option<u64>,
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    /// Processes that were killed for want of memory.
    pub oom_kills: Option<u64>,
}

impl BalloonStats {
    /// As it is now.
    pub(super) fn of(balloon: &BalloonHandle) -> BalloonStats {
        let guest = balloon.statistics().map(|(when, told)| GuestMemory {
            age_ms: u64::try_from(when.elapsed().as_millis()).unwrap_or(u64::MAX),
            total_bytes: told.total,
            free_bytes: told.free,
            available_bytes: told.available,
            caches_bytes: told.caches,
            swapped_in_bytes: told.swapped_in,
            swapped_out_bytes: told.swapped_out,
            major_faults: told.major_faults,
            minor_faults: told.minor_faults,
            oom_kills: told.oom_kills,
        });
        BalloonStats {
            target_bytes: balloon.target(),
            actual_bytes: balloon.actual(),
            reported_bytes: balloon.reported(),
            guest: guest.map(Box::new),
        }
    }
}
