//! How long a loop looks for more work by itself before it sleeps.
//!
//! A driver that finds the loop awake need not kick, which saves its processor a way out of guest
//! mode and this thread a way out of sleep: some 25 µs for each request of a guest that makes one
//! at a time. Looking costs processor time instead, so the loop only does it while work comes in
//! quick succession. The rule is much like KVM's for processors that halt: look longer where a little
//! more patience would have met the work, and not at all where it came much later. Where even the
//! longest look was in vain, the loop leaves it for a while.

use std::time::{Duration, Instant};

/// The longest that a loop looks without finding anything: about what it saves, twice.
const LONGEST: Duration = Duration::from_micros(50);

/// How long it looks when it begins to.
const FIRST: Duration = Duration::from_micros(10);

/// Work that wakes the loop within this time would have come much sooner, had it been awake.
const SOON: Duration = Duration::from_micros(100);

/// How often the loop does not look after it has done so in vain.
const PAUSE: u32 = 64;

/// The wakefulness of one loop.
#[derive(Debug, Default)]
pub(super) struct Wakefulness {
    window: Duration,
    slept_since: Option<Instant>,
    /// Something was found by looking, the last time.
    found: bool,
    pause: u32,
}

impl Wakefulness {
    /// How long to look.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// The loop goes to sleep, after it has `found` work by looking for it or not.
    pub(super) fn sleep(&mut self, now: Instant, found: bool) {
        self.slept_since = Some(now);
        self.found = found;
    }

    /// There is work for which it was worth looking.
    pub(super) fn wake(&mut self, now: Instant) {
        let soon = self
            .slept_since
            .is_some_and(|since| now.saturating_duration_since(since) < SOON);
        if self.pause > 0 {
            self.pause -= 1;
        } else if !soon {
            self.window = Duration::ZERO;
        } else if self.found || self.window < LONGEST {
            self.window = (self.window * 2).clamp(FIRST, LONGEST);
        } else {
            self.window = Duration::ZERO;
            self.pause = PAUSE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wakes a loop that has slept so long, which then looks so long, in microseconds.
    fn turn(wakefulness: &mut Wakefulness, now: &mut Instant, slept: u64, found: bool) -> u128 {
        *now += Duration::from_micros(slept);
        wakefulness.wake(*now);
        wakefulness.sleep(*now, found);
        wakefulness.window().as_micros()
    }

    #[test]
    fn work_in_quick_succession_keeps_the_loop_awake_and_a_pause_lets_it_sleep() {
        let (mut wakefulness, mut now) = (Wakefulness::default(), Instant::now());
        for (slept, window) in [
            (0, 0),
            (99, 10),
            (1, 20),
            (20, 40),
            (20, 50),
            (20, 50),
            (101, 0),
            (1_000_000, 0),
            (30, 10),
        ] {
            let got = turn(&mut wakefulness, &mut now, slept, true);
            assert_eq!(got, window, "after {slept}");
        }
    }

    #[test]
    fn a_loop_that_looks_in_vain_leaves_it_for_a_while() {
        let (mut wakefulness, mut now) = (Wakefulness::default(), Instant::now());
        let mut looked = 0;
        for _ in 0..10_000 {
            looked += turn(&mut wakefulness, &mut now, 80, false);
        }
        assert!((1000..20_000).contains(&looked), "{looked} of 800000");
    }
}
