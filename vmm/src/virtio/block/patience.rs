//! How long calls to a disk may hold its thread up. While they do, nobody else gets at the device: a
//! processor that reads its registers waits too.

use std::time::{Duration, Instant};

/// The longest that the calls of one batch go on, but for the last of them: far more than a batch
/// takes that goes to the page cache.
const BATCH: Duration = Duration::from_millis(10);

/// How many operations go another way once the disk has turned out not to keep up.
const PAUSE: u32 = 256;

/// The patience with one disk.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// The first call of the batch.
    since: Option<Instant>,
    pause: u32,
}

impl Patience {
    /// Whether the next operation may be a call.
    pub(super) fn allows_call(&mut self, now: Instant) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        let patient = self.lasts(now);
        if !patient {
            self.pause = PAUSE;
        }
        patient
    }

    /// Whether calls may go on, where there is no other way.
    pub(super) fn lasts(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        now.saturating_duration_since(since) < BATCH
    }

    /// Others have had their turn.
    pub(super) fn end_batch(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_keep_up_loses_its_calls_for_a_while() {
        let mut patience = Patience::default();
        let mut now = Instant::now();
        let mut calls = |patience: &mut Patience, count: u32, each_us: u64| {
            let allowed = (0..count).filter(|_| {
                let allowed = patience.allows_call(now);
                now += Duration::from_micros(each_us);
                allowed
            });
            u32::try_from(allowed.count()).unwrap()
        };
        for _ in 0..10 {
            assert_eq!(calls(&mut patience, 256, 30), 256);
            patience.end_batch();
        }
        // One that waits for the disk is the last for a while.
        assert_eq!(calls(&mut patience, 256, 100_000), 1);
        patience.end_batch();
        assert_eq!(calls(&mut patience, 2, 1), 0);
        patience.end_batch();
        assert_eq!(calls(&mut patience, 256, 1), 256);
    }
}
