//! virtio-balloon (virtio 1.2, section 5.5): the guest gives memory back, when it is asked to (the
//! balloon) and by itself (reports of free pages); and it tells what it does with the rest.
//!
//! Linux reports free memory in blocks of 2 MiB, which are whole huge pages of the host. A balloon
//! grows by single pages, and splits huge pages that it takes only a part of: reports are the better
//! way for a host to get memory back, and the balloon the way to insist.

mod handle;
mod statistics;

use std::sync::Arc;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};

pub use self::handle::BalloonHandle;
use self::handle::Shared;
pub use self::statistics::GuestStatistics;
use super::chain::{Chain, take_all};
use super::discard::discard_range;
use super::state::{self, DeviceState, StateError};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};
use crate::memory::MemoryPlan;
use crate::spec;

/// Device type, virtio 1.2 section 5.
const ID: u32 = 5;

/// Feature bits, virtio 1.2 section 5.5.3.
const STATISTICS: u32 = 1;
const DEFLATE_ON_OOM: u32 = 2;
const REPORTING: u32 = 5;

/// What drivers need is 1, and for reports 32.
const QUEUE_SIZE: u16 = 32;

/// As many queues as section 5.5.2 numbers.
const QUEUES: usize = 5;

/// A balloon is counted in these.
pub const PAGE_BYTES: u64 = 4096;

/// The most pages that one request may put into the balloon; Linux takes as many. What a request
/// names beyond that is left alone.
const REQUEST_PAGES_MAX: usize = 256;

/// Where the driver says how large the balloon is, in the configuration.
const ACTUAL_OFFSET: usize = 4;

/// What a snapshot keeps of a balloon. Statistics are asked for anew.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct BalloonState {
    target_pages: u32,
    actual_pages: u32,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
    None,
}

/// The balloon.
#[derive(Debug)]
pub struct Balloon {
    offered: u64,
    /// What the guest has from the start, in pages: it cannot be asked for more.
    most: u32,
    /// Accepted features.
    features: u64,
    /// What the driver was told last, in pages.
    target: u32,
    /// The driver's buffer, while the statistics in it are good enough.
    statistics: Option<Chain>,
    shared: Arc<Shared>,
}

impl Balloon {
    /// A balloon as `spec` says, for a guest with so much memory.
    pub fn new(spec: spec::Balloon, memory: &MemoryPlan) -> Result<Balloon, Errno> {
        let mut offered = 1 << STATISTICS;
        if spec.deflate_on_oom {
            offered |= 1 << DEFLATE_ON_OOM;
        }
        // A page of hugetlbfs that is given back may be somebody else's when the guest wants it again.
        if spec.free_page_reporting && memory.huge_pages != spec::HugePages::Hugetlbfs {
            offered |= 1 << REPORTING;
        }
        let shared = Shared::new()?;
        shared.set_target(pages(spec.target_mib << 20));
        Ok(Balloon {
            offered,
            most: pages(memory.boot_bytes),
            features: 0,
            target: 0,
            statistics: None,
            shared: Arc::new(shared),
        })
    }

    /// For the size and for what is known of the guest's memory, from then on.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle::new(Arc::clone(&self.shared))
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// The specification numbers the queues once and for all; Linux leaves out those of features
    /// that it has not accepted, and counts on. There is no third feature that could have queue 3,
    /// so both are right.
    fn role(&self, index: usize) -> Role {
        let reporting = if self.has(REPORTING) {
            Role::Reporting
        } else {
            Role::None
        };
        match index {
            0 => Role::Inflate,
            1 => Role::Deflate,
            2 if self.has(STATISTICS) => Role::Statistics,
            2 => reporting,
            3 if self.has(STATISTICS) => reporting,
            4 => reporting,
            _ => Role::None,
        }
    }

    /// Takes what the pages held from the guest for good.
    fn inflate(&self, chain: &Chain, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        let mut bytes = [0; 4 * REQUEST_PAGES_MAX];
        let count = chain.read(0, &mut bytes) / 4;
        let (numbers, _) = bytes.as_chunks();
        let mut pages: Vec<u64> = numbers[..count]
            .iter()
            .map(|number| u32::from_le_bytes(*number).into())
            .collect();
        pages.sort_unstable();
        pages.dedup();
        // Neighbours go together: a call for each page would cost more than the pages are worth.
        for run in pages.chunk_by(|left, right| left + 1 == *right) {
            let start = GuestAddress(run[0] * PAGE_BYTES);
            let bytes = run.len() as u64 * PAGE_BYTES;
            discard_range(memory, start, bytes).map_err(cannot_discard)?;
        }
        Ok(())
    }

    fn report(&self, chain: &Chain) -> Result<(), DeviceError> {
        let bytes = chain.discard().map_err(cannot_discard)?;
        self.shared.count_reported(bytes as u64);
        Ok(())
    }

    /// Keeps the driver's buffer until its statistics are to be renewed. Returns one that is to be
    /// given back: a driver has one at a time.
    fn keep_statistics(&mut self, chain: Chain) -> Option<Chain> {
        self.shared.set_statistics(GuestStatistics::read(&chain));
        self.statistics.replace(chain)
    }

    fn statistics_queue(&self) -> Option<usize> {
        self.has(STATISTICS).then_some(2)
    }
}

impl VirtioDevice for Balloon {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            features: self.offered,
            queue_sizes: vec![QUEUE_SIZE; QUEUES],
        }
    }

    /// `struct virtio_balloon_config`, with neither hints nor poison.
    fn config(&self) -> Vec<u8> {
        [self.target, self.shared.actual()]
            .map(u32::to_le_bytes)
            .concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.shared.actual().to_le_bytes();
        let at = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_sub(ACTUAL_OFFSET));
        if let Some(at) = at
            && let Some(bytes) = actual.get_mut(at..at.saturating_add(data.len()))
        {
            bytes.copy_from_slice(data);
            self.shared.set_actual(u32::from_le_bytes(actual));
        }
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.features = features;
        self.target = self.shared.target();
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let Some(queue) = queues.get_mut(index) else {
            return Ok(Signal::NONE);
        };
        let role = self.role(index);
        let held = match role {
            Role::Statistics => usize::from(self.statistics.is_some()),
            Role::Inflate | Role::Deflate | Role::Reporting | Role::None => 0,
        };
        let mut chains = Vec::new();
        take_all(index, queue, mem, held, |chain| chains.push(chain))?;
        let mut any = false;
        for chain in chains {
            let done = match role {
                Role::Inflate => self.inflate(&chain, mem).map(|()| Some(chain)),
                Role::Reporting => self.report(&chain).map(|()| Some(chain)),
                Role::Statistics => Ok(self.keep_statistics(chain)),
                Role::Deflate | Role::None => Ok(Some(chain)),
            }?;
            if let Some(chain) = done {
                chain.give_back(index, queue, mem, 0)?;
                any = true;
            }
        }
        Ok(Signal::queue_if(index, any))
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::readable(0, self.shared.fd())]
    }

    /// Somebody has asked for another size, or for fresh statistics.
    fn on_ready(
        &mut self,
        _token: u32,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let wanted = self.shared.take_wanted();
        let mut signal = Signal::NONE;
        if self.target != self.shared.target() {
            self.target = self.shared.target();
            signal.config = true;
        }
        if wanted
            && let Some(index) = self.statistics_queue()
            && let Some(queue) = queues.get_mut(index)
            && let Some(chain) = self.statistics.take()
        {
            chain.give_back(index, queue, mem, 0)?;
            signal = signal.and(Signal::queue(index));
        }
        Ok(signal)
    }

    /// A driver that starts anew has an empty balloon.
    fn reset(&mut self) {
        self.statistics = None;
        self.features = 0;
        self.shared.set_actual(0);
        self.shared.forget_statistics();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let state = DeviceState::new(&BalloonState {
            target_pages: self.shared.target(),
            actual_pages: self.shared.actual(),
        })?;
        Ok(state.holding([0, 0, usize::from(self.statistics.is_some())]))
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        let saved: BalloonState = state::read(own)?;
        if saved.target_pages > self.most {
            return Err(StateError::Mismatch {
                what: "target",
                found: saved.target_pages.to_string(),
                wanted: format!("{} pages at most", self.most),
            });
        }
        self.shared.set_target(saved.target_pages);
        self.shared.set_actual(saved.actual_pages);
        Ok(())
    }
}

/// In whole pages; more than the configuration has room for is as much as it has.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX)
}

fn cannot_discard(source: std::io::Error) -> DeviceError {
    DeviceError::Host {
        action: "give memory back",
        source,
    }
}

#[cfg(test)]
mod tests;
