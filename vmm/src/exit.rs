//! The one way a machine ends: any thread says why, the first to do so is believed, and the event
//! loop wakes up.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::control::{ExitReason, ExitStatus};
use crate::events::event;

/// Ends the machine. Clones end the same one.
#[derive(Clone, Debug)]
pub struct ExitSwitch {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    status: Mutex<Option<ExitStatus>>,
    wake: EventFd,
}

impl ExitSwitch {
    /// A switch that nobody has thrown.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            inner: Arc::new(Inner {
                status: Mutex::new(None),
                wake: event()?,
            }),
        })
    }

    /// Ends the machine with `status`, unless it has ended already.
    pub fn end(&self, status: ExitStatus) {
        self.lock().get_or_insert(status);
        // A full counter wakes as well as a written one.
        let _ = self.inner.wake.write(1);
    }

    /// Ends the machine because of a failure of its own.
    pub fn fail(&self, error: &dyn std::error::Error) {
        self.end(ExitStatus {
            error: Some(format!("cannot go on: {}", chain(error))),
            ..ExitStatus::new(ExitReason::Error)
        });
    }

    /// Why the machine ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        self.lock().clone()
    }

    /// Readable once the machine has ended.
    pub fn wake_fd(&self) -> RawFd {
        self.inner.wake.as_raw_fd()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<ExitStatus>> {
        self.inner.status.lock().expect("nothing panics in here")
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_is_believed() {
        let switch = ExitSwitch::new().unwrap();
        assert_eq!(switch.status(), None);
        switch.end(ExitStatus::new(ExitReason::PowerOff));
        switch.clone().end(ExitStatus::new(ExitReason::Killed));
        assert_eq!(switch.status().unwrap().reason, ExitReason::PowerOff);
    }
}
