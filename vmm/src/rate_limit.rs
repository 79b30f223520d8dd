//! Token buckets: how much of something may happen in a second. Pure: time is an argument.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// What an idle bucket allows at once, as a time at its rate. Short, so that a limit is felt at
/// once, and longer than any timer's slack, so that the rate is reached.
const BURST: Duration = Duration::from_millis(100);

/// The longest that one charge can keep a bucket closed, so that a large request against a tiny
/// rate does not close it for years.
const CHARGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// One bucket. A charge is granted whole whenever the debt of earlier charges is at most [`BURST`],
/// so a request larger than the bucket passes too, and is paid for by those after it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    /// Units per second; no limit if absent.
    rate: Option<NonZeroU64>,
    /// When all charges will have been paid at `rate`.
    paid_at: Option<Instant>,
}

impl Bucket {
    /// A bucket of `rate` units per second, or one that never closes. A rate of 0 counts as 1.
    pub fn new(rate: Option<u64>) -> Bucket {
        Bucket {
            rate: rate.map(|rate| NonZeroU64::new(rate).unwrap_or(NonZeroU64::MIN)),
            paid_at: None,
        }
    }

    /// How long from `now` until a charge is granted; zero if it would be now.
    pub fn wait(&self, now: Instant) -> Duration {
        self.debt(now).saturating_sub(BURST)
    }

    /// Charges `units`, granted or not.
    pub fn charge(&mut self, now: Instant, units: u64) {
        let Some(rate) = self.rate else { return };
        let debt = self.debt(now) + time_of(units, rate).min(CHARGE_MAX);
        self.paid_at = now.checked_add(debt);
    }

    /// Changes the rate; what is owed stays owed, and is paid at the new rate.
    pub fn set_rate(&mut self, now: Instant, rate: Option<u64>) {
        let debt = self.debt(now);
        let old = self.rate;
        *self = Bucket::new(rate);
        if let (Some(old), Some(new)) = (old, self.rate) {
            let nanoseconds = debt.as_nanos() * u128::from(old.get()) / u128::from(new.get());
            self.paid_at = now.checked_add(from_nanoseconds(nanoseconds).min(CHARGE_MAX));
        }
    }

    fn debt(&self, now: Instant) -> Duration {
        self.paid_at
            .map_or(Duration::ZERO, |paid| paid.saturating_duration_since(now))
    }
}

/// How long `units` take at `rate`.
fn time_of(units: u64, rate: NonZeroU64) -> Duration {
    let nanoseconds = (u128::from(units) * 1_000_000_000).div_ceil(u128::from(rate.get()));
    from_nanoseconds(nanoseconds)
}

fn from_nanoseconds(nanoseconds: u128) -> Duration {
    u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos)
}

/// Operations and bytes of one direction: a request passes when both buckets let it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limiter {
    operations: Bucket,
    bytes: Bucket,
}

impl Limiter {
    /// Limits per second; none where absent.
    pub fn new(operations: Option<u64>, bytes: Option<u64>) -> Limiter {
        Limiter {
            operations: Bucket::new(operations),
            bytes: Bucket::new(bytes),
        }
    }

    /// Whether there is nothing to wait for, ever.
    pub fn is_unlimited(&self) -> bool {
        self.operations.rate.is_none() && self.bytes.rate.is_none()
    }

    /// How long from `now` until an operation is admitted; zero if it would be now.
    pub fn wait(&self, now: Instant) -> Duration {
        self.operations.wait(now).max(self.bytes.wait(now))
    }

    /// Charges one operation of `bytes` and says yes, or says how long to wait before asking again.
    pub fn admit(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let wait = self.wait(now);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.charge(now, bytes);
        Ok(())
    }

    /// Charges one operation of `bytes`, which does not wait.
    pub fn charge(&mut self, now: Instant, bytes: u64) {
        self.operations.charge(now, 1);
        self.bytes.charge(now, bytes);
    }

    /// Changes both limits.
    pub fn set(&mut self, now: Instant, operations: Option<u64>, bytes: Option<u64>) {
        self.operations.set_rate(now, operations);
        self.bytes.set_rate(now, bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Asks for operations of `bytes` as fast as they are let, for `seconds`; returns how many
    /// were.
    fn admitted(limiter: &mut Limiter, start: Instant, seconds: u64, bytes: u64) -> u64 {
        let end = start + Duration::from_secs(seconds);
        let (mut now, mut count) = (start, 0);
        while now < end {
            match limiter.admit(now, bytes) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn a_limiter_lets_its_rate_through_whichever_bucket_is_the_tighter() {
        // (operations a second, bytes a second, bytes each) → operations in ten seconds, about.
        let table = [
            (Some(100), None, 4096, 1000),
            (None, Some(1 << 20), 4096, 2560),
            (Some(10), Some(1 << 20), 4096, 100),
            (Some(1_000_000), Some(4096), 4096, 10),
            (None, Some(1000), 5000, 2),
        ];
        for (operations, bytes_rate, bytes, expected) in table {
            let mut limiter = Limiter::new(operations, bytes_rate);
            let count = admitted(&mut limiter, Instant::now(), 10, bytes);
            let burst = expected / 100 + 2;
            assert!(
                (expected..=expected + burst).contains(&count),
                "{operations:?} {bytes_rate:?} {bytes}: {count}"
            );
        }
    }

    #[test]
    fn without_limits_nothing_waits() {
        let mut limiter = Limiter::default();
        assert!(limiter.is_unlimited());
        let now = Instant::now();
        for _ in 0..1000 {
            assert_eq!(limiter.admit(now, u64::MAX), Ok(()));
        }
    }

    #[test]
    fn a_raised_rate_shortens_the_wait_that_is_under_way() {
        let now = Instant::now();
        let mut limiter = Limiter::new(None, Some(1000));
        assert_eq!(limiter.admit(now, 1_000_000), Ok(()));
        let slow = limiter.admit(now, 1).unwrap_err();
        limiter.set(now, None, Some(1_000_000));
        let fast = limiter.admit(now, 1).unwrap_err();
        assert_eq!(slow, Duration::from_secs(1000) - BURST);
        assert_eq!(fast, Duration::from_secs(1) - BURST);
        limiter.set(now, None, None);
        assert_eq!(limiter.admit(now, 1), Ok(()));
    }

    #[test]
    fn a_rate_of_zero_is_the_slowest_rate_not_a_division_by_zero() {
        let now = Instant::now();
        let mut limiter = Limiter::new(Some(0), None);
        assert_eq!(limiter.admit(now, 0), Ok(()));
        assert!(limiter.admit(now, 0).is_err());
    }

    proptest! {
        #[test]
        fn the_rate_is_never_exceeded_by_more_than_the_burst_and_one_request(
            rate in 1u64..1_000_000_000,
            charges in prop::collection::vec((0u64..1_000_000, 0u64..50_000_000), 1..200),
        ) {
            let start = Instant::now();
            let mut limiter = Limiter::new(None, Some(rate));
            let (mut now, mut total, mut last) = (start, 0u64, 0u64);
            for (bytes, pause) in charges {
                now += Duration::from_nanos(pause);
                if limiter.admit(now, bytes).is_ok() {
                    total += bytes;
                    last = bytes;
                }
            }
            let allowed = (now - start + BURST).as_secs_f64() * rate as f64;
            prop_assert!((total - last) as f64 <= allowed + 1.0);
        }

        #[test]
        fn no_sequence_of_charges_and_rates_panics(
            steps in prop::collection::vec((any::<u64>(), any::<Option<u64>>()), 1..50),
        ) {
            let now = Instant::now();
            let mut bucket = Bucket::new(Some(1));
            for (units, rate) in steps {
                bucket.charge(now, units);
                bucket.set_rate(now, rate);
                let _ = bucket.wait(now);
            }
        }
    }
}
