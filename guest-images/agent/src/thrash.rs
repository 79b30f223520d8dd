//! Has a workload that is out of memory killed, where the kernel does not get round to it.
//!
//! There is no swap, so a group at its limit can only drop what it can read again: the pages of the
//! programs that it runs. They are needed and read again at once, and as long as there was one to drop
//! the kernel calls it progress and kills nobody, for many minutes. Hardly any of that time counts as
//! a stall where disks are fast, so that pressure stall information does not show it; the pages that
//! are read again do.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::cgroup::{CgroupError, Usage};
use crate::console::{chain, say};
use crate::reaper::STACK_BYTES;
use crate::server::Agent;

/// How often the workload is looked at while it is at its limit.
const INTERVAL: Duration = Duration::from_secs(1);

/// So many intervals of thrashing in a row are too many.
const INTERVALS_MAX: u32 = 5;

/// A workload that keeps less of its limit than this has room for a cache, and may read what it likes.
const KEPT_SIXTEENTHS_MIN: u64 = 15;

/// How often within an interval all that can be dropped is read again, when there is nothing but
/// dropping and reading.
const ROUNDS_MIN: u64 = 4;

/// Counts intervals of thrashing.
#[derive(Debug, Default)]
struct Watch {
    /// Until the interval that begins.
    refaulted_bytes: Option<u64>,
    intervals: u32,
}

impl Watch {
    /// Takes what the workload has now; whether it is time to act.
    fn is_over(&mut self, now: Usage) -> bool {
        let before = self.refaulted_bytes.replace(now.refaulted_bytes);
        let before = before.unwrap_or(now.refaulted_bytes);
        let again = now.refaulted_bytes.saturating_sub(before);
        let dropped_and_read = again > 0 && again / ROUNDS_MIN >= now.droppable_bytes;
        let full = now.kept_bytes / KEPT_SIXTEENTHS_MIN >= now.limit_bytes / 16;
        self.intervals = if full && dropped_and_read {
            self.intervals + 1
        } else {
            0
        };
        if self.intervals < INTERVALS_MAX {
            return false;
        }
        self.intervals = 0;
        true
    }
}

/// Watches the workload for as long as the machine runs, in a thread of its own.
pub(crate) fn watch(agent: Arc<Agent>) -> io::Result<()> {
    let thread = thread::Builder::new().stack_size(STACK_BYTES);
    thread.spawn(move || run(&agent)).map(drop)
}

fn run(agent: &Agent) {
    if let Err(error) = look(agent) {
        say(&format!(
            "The workload's memory is not watched: {}",
            chain(&error)
        ));
    }
}

/// Looks once in an interval while the workload is at its limit, and not at all before: a guest that
/// has nothing to do is to stay asleep.
fn look(agent: &Agent) -> Result<(), CgroupError> {
    let Some(mut hits) = agent.cgroups.limit_hits()? else {
        return Ok(());
    };
    let mut watch = Watch::default();
    loop {
        if hits.wait()? {
            watch = Watch::default();
        }
        thread::sleep(INTERVAL);
        if let Some(usage) = agent.cgroups.usage()?
            && watch.is_over(usage)
        {
            agent.cgroups.kill_for_memory(usage)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// An interval in which `again` MiB were read again, with `kept` of 100 MiB.
    fn intervals(of: &[(u64, u64)]) -> Vec<bool> {
        let mut watch = Watch::default();
        let mut refaulted_bytes = 5000 * MIB;
        of.iter()
            .map(|(again, kept)| {
                refaulted_bytes += again * MIB;
                watch.is_over(Usage {
                    limit_bytes: 100 * MIB,
                    kept_bytes: kept * MIB,
                    droppable_bytes: (100 - kept) * MIB,
                    refaulted_bytes,
                })
            })
            .collect()
    }

    #[test]
    fn a_row_of_dropping_and_reading_is_over() {
        let thrashing = [(0, 97), (12, 97), (12, 97), (12, 97), (12, 97), (12, 97)];
        assert_eq!(
            intervals(&thrashing),
            [false, false, false, false, false, true]
        );
    }

    #[test]
    fn a_workload_with_a_cache_or_a_pause_is_left_alone() {
        // What was read before the first look does not count.
        let mut paused = [(12, 97); 9];
        paused[4] = (11, 97);
        for calm in [[(400, 90); 9], [(0, 100); 9], [(11, 97); 9], paused] {
            assert!(!intervals(&calm).contains(&true), "{calm:?}");
        }
    }
}
