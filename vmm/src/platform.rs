//! What a virtio transport needs, given by this machine: an interrupt line, kicks by ioeventfd, and
//! the event loop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::events::{Poller, Readiness, event};
use crate::exit::ExitSwitch;
use crate::kvm::Vm;
use crate::virtio::mmio::{KICK_TOKEN, Kick, Platform, Window};
use crate::virtio::registers::QUEUE_NOTIFY;
use crate::virtio::{DeviceError, Interest};

/// One device's place in the machine.
pub struct DevicePlatform {
    vm: Arc<Vm>,
    poller: Arc<Poller>,
    exit: ExitSwitch,
    window: Window,
    source: u32,
    line: EventFd,
    /// One for each queue, while kicks are watched for.
    kicks: Vec<EventFd>,
}

opaque_debug!(DevicePlatform);

impl DevicePlatform {
    /// For the device at `window`, whose interrupt line is `line` and which is `source` to the
    /// event loop.
    pub fn new(
        vm: Arc<Vm>,
        poller: Arc<Poller>,
        exit: ExitSwitch,
        window: Window,
        source: u32,
        line: EventFd,
    ) -> Self {
        Self {
            vm,
            poller,
            exit,
            window,
            source,
            line,
            kicks: Vec::new(),
        }
    }

    fn kick_address(&self) -> u64 {
        self.window.address + QUEUE_NOTIFY
    }
}

impl Platform for DevicePlatform {
    fn interrupt(&self) -> io::Result<()> {
        match self.line.write(1) {
            // The counter is full: the interrupt is pending.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    fn watch_kicks(&mut self, queues: usize) -> io::Result<()> {
        for index in 0..u32::try_from(queues).expect("a few queues") {
            let kick = event()?;
            let token = KICK_TOKEN + index;
            self.poller
                .add(self.source, token, kick.as_raw_fd(), Readiness::READABLE)?;
            self.vm.add_kick(&kick, self.kick_address(), index)?;
            self.kicks.push(kick);
        }
        Ok(())
    }

    fn unwatch_kicks(&mut self) -> io::Result<()> {
        for (index, kick) in (0..).zip(self.kicks.drain(..)) {
            self.poller.remove(kick.as_raw_fd())?;
            let address = self.window.address + QUEUE_NOTIFY;
            self.vm.remove_kick(&kick, address, index)?;
        }
        Ok(())
    }

    fn kick(&self, queue: usize, kick: Kick) -> io::Result<()> {
        let event = self.kicks.get(queue).ok_or(io::ErrorKind::NotFound)?;
        match kick {
            Kick::Take => event.read().map(|_| ()),
            Kick::Make => event.write(1),
        }
    }

    fn watch(&mut self, old: &[Interest], new: &[Interest]) -> io::Result<()> {
        for gone in old.iter().filter(|interest| !new.contains(interest)) {
            if waits(gone) {
                // The device may have closed it, which has removed it already.
                let _ = self.poller.remove(gone.fd);
            }
        }
        for come in new.iter().filter(|interest| !old.contains(interest)) {
            if waits(come) {
                self.poller
                    .add(self.source, come.token, come.fd, readiness(come))?;
            }
        }
        Ok(())
    }

    fn fail(&self, error: DeviceError) {
        self.exit.fail(&error);
    }
}

/// The kernel reports a closed other end even to those who wait for nothing.
fn waits(interest: &Interest) -> bool {
    interest.readable || interest.writable
}

fn readiness(interest: &Interest) -> Readiness {
    Readiness {
        readable: interest.readable,
        writable: interest.writable,
    }
}
