//! What the guest says about its workload (`crate::guest_status`), and the register to say it with.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::control::{ExitReason, ExitStatus};
use crate::events::event;
use crate::exit::ExitSwitch;
use crate::guest_status::{MAGIC, Report};

/// Whether the guest has said that it is ready. Clones tell of the same guest.
#[derive(Clone, Debug)]
pub struct Readiness {
    ready: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

impl Readiness {
    /// Of a guest that has said nothing.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            ready: Arc::default(),
            wake: Arc::new(event()?),
        })
    }

    /// Whether it is.
    pub fn get(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Readable once the guest has reported, until [`acknowledge`](Self::acknowledge).
    pub fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Takes notice of a report.
    pub fn acknowledge(&self) {
        // Nothing to read means that it was acknowledged before.
        let _ = self.wake.read();
    }

    /// The guest is ready, or was when it was saved.
    pub fn set(&self) {
        if !self.ready.swap(true, Ordering::AcqRel) {
            // The counter cannot be full: it is written once.
            let _ = self.wake.write(1);
        }
    }
}

/// Where reports go, whichever way they come. Clones take those of the same guest.
#[derive(Clone, Debug)]
pub struct Reports {
    exit: ExitSwitch,
    readiness: Readiness,
}

impl Reports {
    /// Passes reports on to `exit` and `readiness`.
    pub fn new(exit: ExitSwitch, readiness: Readiness) -> Self {
        Self { exit, readiness }
    }

    /// Whether the guest has said that it is ready.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// Takes what a guest has written: a report in 4 bytes. Anything else does nothing.
    pub fn take(&self, written: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(written) else {
            return;
        };
        match Report::parse(u32::from_le_bytes(value)) {
            Some(Report::Ready) => self.readiness.set(),
            Some(Report::Exit { code, oom }) => self.exit.end(ExitStatus {
                code: Some(code),
                oom,
                ..ExitStatus::new(ExitReason::GuestExit)
            }),
            None => {}
        }
    }
}

/// The register.
#[derive(Debug)]
pub struct GuestStatus {
    reports: Reports,
}

impl GuestStatus {
    /// A register whose reports go there.
    pub fn new(reports: Reports) -> Self {
        Self { reports }
    }
}

impl BusDevice for GuestStatus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&MAGIC.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            self.reports.take(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_status::{READY, exit};

    #[test]
    fn reports_of_the_right_width_are_passed_on() {
        let switch = ExitSwitch::new().unwrap();
        let readiness = Readiness::new().unwrap();
        let mut register = GuestStatus::new(Reports::new(switch.clone(), readiness.clone()));

        register.write(0, &READY.to_le_bytes()[..2]);
        register.write(2, &READY.to_le_bytes());
        assert!(!readiness.get());
        register.write(0, &READY.to_le_bytes());
        assert!(readiness.get());
        assert_eq!(switch.status(), None);

        register.write(0, &exit(3, true).to_le_bytes());
        let status = switch.status().unwrap();
        assert_eq!((status.code, status.oom), (Some(3), true));
    }
}
