//! How long a loop looks for more work by itself before it sleeps.
//!
//! A driver that finds the loop awake need not kick, which saves its processor a way out of guest
//! mode and this thread a way out of sleep: some 25 µs for each request of a guest that makes one
//! at a time. Looking costs processor time instead, so the loop only does it while work comes in
//! quick succession. The rule is KVM's own for processors that halt: look longer where a little more
//! patience would have met the work, and not at all where it came much later.

use std::time::{Duration, Instant};

/// The longest that a loop looks without finding anything: about what it saves, twice.
const LONGEST: Duration = Duration::from_micros(50);

/// How long it looks when it begins to.
const FIRST: Duration = Duration::from_micros(10);

/// The wakefulness of one loop.
#[derive(Debug, Default)]
pub(super) struct Wakefulness {
    window: Duration,
    slept_since: Option<Instant>,
}

impl Wakefulness {
    /// How long to look.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// The loop goes to sleep.
    pub(super) fn sleep(&mut self, now: Instant) {
        self.slept_since = Some(now);
    }

    /// There is work for which it was worth looking.
    pub(super) fn wake(&mut self, now: Instant) {
        let soon = self
            .slept_since
            .is_some_and(|since| now.saturating_duration_since(since) < LONGEST);
        self.window = if soon {
            (self.window * 2).clamp(FIRST, LONGEST)
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_in_quick_succession_keeps_the_loop_awake_and_a_pause_lets_it_sleep() {
        let mut wakefulness = Wakefulness::default();
        let mut now = Instant::now();
        // How long the loop slept, and how long it looks afterwards, in microseconds.
        for (slept, window) in [
            (0, 0),
            (49, 10),
            (1, 20),
            (20, 40),
            (20, 50),
            (20, 50),
            (51, 0),
            (1_000_000, 0),
            (30, 10),
        ] {
            now += Duration::from_micros(slept);
            wakefulness.wake(now);
            assert_eq!(wakefulness.window(), Duration::from_micros(window));
            wakefulness.sleep(now);
        }
    }
}
