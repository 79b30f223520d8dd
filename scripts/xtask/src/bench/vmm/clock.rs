//! What a tick of the time-stamp counter is worth. Guests count in ticks, and have no clock.
//!
//! UNSAFETY: reading the counter needs `unsafe` for want of a safe function; it touches no memory.
#![expect(unsafe_code, reason = "the time-stamp counter has no safe function")]

use std::thread;
use std::time::{Duration, Instant};

/// Long enough that the calls of the clocks do not count.
const CALIBRATION: Duration = Duration::from_millis(200);

/// Ticks in a microsecond.
pub(crate) fn ticks_per_microsecond() -> f64 {
    let (start, before) = (Instant::now(), ticks());
    thread::sleep(CALIBRATION);
    let (ticks, elapsed) = (ticks().wrapping_sub(before), start.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "52 bits are plenty")]
    let ticks = ticks as f64;
    ticks / (elapsed.as_secs_f64() * 1e6)
}

fn ticks() -> u64 {
    // SAFETY: every processor that runs KVM guests has the counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}
