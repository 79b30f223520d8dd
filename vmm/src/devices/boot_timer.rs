//! Tells how long the guest took to boot: the guest writes one byte when it has. `boot_at_us` is the
//! host's monotonic clock, for those who know when they started the process.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;

/// The byte that says "booted", at offset 0.
pub const DONE: u8 = 123;

/// When work started.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    wall: Instant,
    cpu: Duration,
}

impl Start {
    /// Now.
    pub fn now() -> Self {
        Self {
            wall: Instant::now(),
            cpu: process_time(),
        }
    }
}

/// Prints the first report of a guest.
#[derive(Debug)]
pub struct BootTimer {
    /// Absent once the guest has reported.
    start: Option<Start>,
}

impl BootTimer {
    /// A timer that has run since `start`.
    pub fn new(start: Start) -> Self {
        Self { start: Some(start) }
    }
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    #[expect(clippy::print_stderr, reason = "this is what --boot-timer asks for")]
    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != 0 || data != [DONE] {
            return;
        }
        if let Some(start) = self.start.take() {
            eprintln!(
                "{{\"boot_wall_us\":{},\"boot_cpu_us\":{},\"boot_at_us\":{}}}",
                start.wall.elapsed().as_micros(),
                process_time().saturating_sub(start.cpu).as_micros(),
                time(ClockId::CLOCK_MONOTONIC).as_micros()
            );
        }
    }
}

/// Processor time of all threads of this process.
fn process_time() -> Duration {
    time(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

fn time(clock: ClockId) -> Duration {
    clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}
