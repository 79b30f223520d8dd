//! The end of a loop before that of the machine: its device is gone.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::{EXIT, EventLoop, Readiness, event};

/// Ends a loop. Clones end the same one.
#[derive(Clone, Debug)]
pub struct Stopper {
    stopped: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

impl Stopper {
    /// The loop serves nobody any more, soon.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // A full counter wakes as well as a written one.
        let _ = self.wake.write(1);
    }
}

impl EventLoop {
    /// What ends this loop alone.
    pub fn stopper(&mut self) -> io::Result<Stopper> {
        if let Some(stopper) = &self.stopper {
            return Ok(stopper.clone());
        }
        let stopper = Stopper {
            stopped: Arc::default(),
            wake: Arc::new(event()?),
        };
        let wake = stopper.wake.as_raw_fd();
        self.poller.add(EXIT, 0, wake, Readiness::READABLE)?;
        self.stopper = Some(stopper.clone());
        Ok(stopper)
    }

    pub(super) fn is_over(&self) -> bool {
        let stopped = |stopper: &Stopper| stopper.stopped.load(Ordering::Acquire);
        self.exit.status().is_some() || self.stopper.as_ref().is_some_and(stopped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitSwitch;

    #[test]
    fn a_loop_is_stopped_alone() {
        let exit = ExitSwitch::new().unwrap();
        let mut events = EventLoop::new(exit.clone()).unwrap();
        let stopper = events.stopper().unwrap();
        let thread = std::thread::spawn(move || events.run());
        stopper.clone().stop();
        thread.join().unwrap().unwrap();
        assert_eq!(exit.status(), None);
    }
}
