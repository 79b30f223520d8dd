//! How much memory a guest has and is to have, and what it tells of it.

use serde::{Deserialize, Serialize};

use super::Response;
use crate::plan::MEMORY_MIB_MIN;
use crate::virtio::balloon::BalloonHandle;
use crate::virtio::mem::{BLOCK_BYTES, MemHandle};

/// The size of a guest's memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryStats {
    /// What it had from the start and what it has plugged in since; what is in the balloon counts.
    pub size_bytes: u64,
    /// What it is to have.
    pub requested_bytes: u64,
    /// What it can have.
    pub most_bytes: u64,
}

/// The memory that a guest can plug in beside what it had from the start (virtio-mem).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemStats {
    /// What there is to plug in.
    pub size_bytes: u64,
    /// What the guest was asked to have plugged in.
    pub requested_bytes: u64,
    /// What it has plugged in.
    pub plugged_bytes: u64,
}

impl MemStats {
    /// As it is now.
    pub(super) fn of(mem: &MemHandle) -> MemStats {
        MemStats {
            size_bytes: mem.most(),
            requested_bytes: mem.requested(),
            plugged_bytes: mem.plugged(),
        }
    }
}

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

/// What changes a guest's memory.
#[derive(Debug)]
pub struct MemoryControls {
    /// What there is from the start.
    pub boot_bytes: u64,
    pub balloon: Option<BalloonHandle>,
    pub mem: Option<MemHandle>,
}

impl MemoryControls {
    /// Asks the guest to have so much memory: more than from the start by plugging in, less than
    /// that by the balloon.
    pub(super) fn resize(&self, size_mib: u64) -> Response {
        let boot = self.boot_bytes >> 20;
        let most = boot + (self.mem.as_ref().map_or(0, MemHandle::most) >> 20);
        let least = if self.balloon.is_some() {
            MEMORY_MIB_MIN
        } else {
            boot
        };
        if size_mib < least || size_mib > most {
            let message = format!(
                "`size_mib` is {size_mib}; this machine can have from {least} to {most}, as \
                 `/memory` and `/balloon` allow"
            );
            return Response::Error { message };
        }
        let block = BLOCK_BYTES >> 20;
        if !size_mib.saturating_sub(boot).is_multiple_of(block) {
            let message = format!(
                "`size_mib` is {size_mib}; beyond the {boot} from the start, memory comes in blocks \
                 of {block}"
            );
            return Response::Error { message };
        }
        if let Some(mem) = &self.mem {
            mem.request(size_mib.saturating_sub(boot) << 20);
        }
        if let Some(balloon) = &self.balloon {
            balloon.set_target(boot.saturating_sub(size_mib) << 20);
        }
        Response::Done {}
    }

    /// Asks the guest to have so much in the balloon.
    pub(super) fn inflate(&self, target_mib: u64) -> Response {
        let Some(balloon) = &self.balloon else {
            return Response::Error {
                message: "there is no balloon; it is there unless `/balloon` is null".to_owned(),
            };
        };
        let most = self.boot_bytes >> 20;
        if target_mib > most {
            return Response::Error {
                message: format!("`target_mib` is {target_mib}; it must be at most {most}"),
            };
        }
        balloon.set_target(target_mib << 20);
        Response::Done {}
    }

    /// As it is now.
    pub(super) fn stats(&self) -> MemoryStats {
        let of = |bytes: fn(&MemHandle) -> u64| self.mem.as_ref().map_or(0, bytes);
        let ballooned = self.balloon.as_ref().map_or(0, BalloonHandle::target);
        MemoryStats {
            size_bytes: self.boot_bytes + of(MemHandle::plugged),
            requested_bytes: self.boot_bytes + of(MemHandle::requested) - ballooned,
            most_bytes: self.boot_bytes + of(MemHandle::most),
        }
    }
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
