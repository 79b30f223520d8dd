//! The limits of a network device, and what waits for them.
//!
//! A direction is closed while what passed before is not paid for. How large the next frame of a tap is,
//! nobody knows before it is read, so frames pass first and are charged then.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::rate_limit::Limiter;
use crate::spec::NetLimits;
use crate::virtio::Interest;

/// Tokens of [`Throttle::interests`].
pub(super) const TIMER: u32 = 1;
pub(super) const LIMITS: u32 = 2;

/// A direction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Lane {
    /// To the guest.
    Receive,
    /// From the guest.
    Send,
}

/// Both directions.
#[derive(Debug)]
pub(super) struct Throttle {
    /// To the guest, and from it.
    limiters: [Limiter; 2],
    /// Until when each is closed, if somebody waits for that.
    closed_until: [Option<Instant>; 2],
    timer: TimerFd,
    shared: Arc<Shared>,
}

/// The limits as they are to be, for the device and its handles.
#[derive(Debug)]
pub(super) struct Shared {
    limits: Mutex<NetLimits>,
    /// The device has not adopted them yet.
    pending: AtomicBool,
    /// Readable then, for a device that waits.
    changed: EventFd,
}

impl Throttle {
    pub(super) fn new(limits: NetLimits) -> Result<Throttle, Errno> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let shared = Shared {
            limits: Mutex::new(limits),
            pending: AtomicBool::new(false),
            changed: EventFd::from_flags(flags)?,
        };
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Throttle {
            limiters: [
                Limiter::new(limits.receive_pps, limits.receive_bps),
                Limiter::new(limits.send_pps, limits.send_bps),
            ],
            closed_until: [None; 2],
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            shared: Arc::new(shared),
        })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether the next frame may pass. If not, the device is to wait, for [`interests`](Self::interests).
    pub(super) fn opens(&mut self, lane: Lane) -> io::Result<bool> {
        if self.shared.pending.load(Ordering::Acquire) {
            self.adopt();
        }
        let limiter = &self.limiters[lane as usize];
        // The clock is not read where there is no limit.
        if limiter.is_unlimited() {
            self.closed_until[lane as usize] = None;
            return Ok(true);
        }
        let now = Instant::now();
        let wait = limiter.wait(now);
        if wait.is_zero() {
            self.closed_until[lane as usize] = None;
            return Ok(true);
        }
        self.closed_until[lane as usize] = now.checked_add(wait);
        let next = self.closed_until.iter().flatten().min();
        let wait = next.map_or(wait, |next| next.saturating_duration_since(now));
        // A time of zero would stop the timer.
        let wait = TimeSpec::from_duration(wait.max(Duration::from_nanos(1)));
        let set = self
            .timer
            .set(Expiration::OneShot(wait), TimerSetTimeFlags::empty());
        set.map(|()| false).map_err(io::Error::from)
    }

    /// A frame has passed.
    pub(super) fn charge(&mut self, lane: Lane, bytes: usize) {
        let limiter = &mut self.limiters[lane as usize];
        if !limiter.is_unlimited() {
            limiter.charge(Instant::now(), bytes as u64);
        }
    }

    /// Whether somebody waits for this direction to open.
    pub(super) fn closed(&self, lane: Lane) -> bool {
        self.closed_until[lane as usize].is_some()
    }

    /// What a device waits for while a direction is closed.
    pub(super) fn interests(&self) -> Vec<Interest> {
        if self.closed_until == [None; 2] {
            return Vec::new();
        }
        vec![
            Interest::readable(TIMER, self.timer.as_fd().as_raw_fd()),
            Interest::readable(LIMITS, self.shared.changed.as_raw_fd()),
        ]
    }

    /// One of these is readable: both directions are to be tried again.
    pub(super) fn retry(&mut self, token: u32) -> io::Result<()> {
        match token {
            TIMER => self.timer.unset()?,
            _ => self.adopt(),
        }
        Ok(())
    }

    /// Nobody waits any more.
    pub(super) fn forget(&mut self) {
        self.closed_until = [None; 2];
    }

    fn adopt(&mut self) {
        let limits = self.shared.take();
        let now = Instant::now();
        let [receive, send] = &mut self.limiters;
        receive.set(now, limits.receive_pps, limits.receive_bps);
        send.set(now, limits.send_pps, limits.send_bps);
    }
}

impl Shared {
    /// Replaces all limits. A device that waits looks at them at once, another with its next frame.
    pub(super) fn set(&self, limits: NetLimits) {
        *self.lock() = limits;
        self.pending.store(true, Ordering::Release);
        // It fails only if the counter is full, and then the descriptor is readable as it is.
        let _ = self.changed.write(1);
    }

    pub(super) fn get(&self) -> NetLimits {
        *self.lock()
    }

    fn take(&self) -> NetLimits {
        self.pending.store(false, Ordering::Release);
        // Readable or not: it is only being made unreadable.
        let _ = self.changed.read();
        *self.lock()
    }

    /// Limits are plain numbers: a thread that panicked left none of them half written.
    fn lock(&self) -> MutexGuard<'_, NetLimits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
