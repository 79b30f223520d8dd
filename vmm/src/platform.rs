//! What a virtio transport needs, given by this machine: interrupts, kicks by ioeventfd, and the event
//! loop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::ioapic::Message;
use crate::events::{Poller, Readiness, event};
use crate::exit::ExitSwitch;
use crate::kvm::Vm;
use crate::virtio::pci::Place;
use crate::virtio::pci::interrupts::{Interrupts, Messages};
use crate::virtio::registers::QUEUE_NOTIFY;
use crate::virtio::transport::{KICK_TOKEN, Kick, Platform, Window};
use crate::virtio::{DeviceError, Interest, Signal};

/// How a device and its driver reach each other.
pub enum Wiring {
    /// The driver hears by an interrupt line, and kicks by writing a queue's number to a register.
    Registers { window: Window, line: EventFd },
    /// The driver hears by messages, and kicks by writing to a place for each queue.
    Function {
        interrupts: Arc<Mutex<Interrupts>>,
        place: Place,
    },
}

opaque_debug!(Wiring);

impl Wiring {
    /// Where the driver kicks a queue, and what it writes there if that matters.
    fn kick(&self, queue: u32) -> Option<KickPlace> {
        match self {
            Wiring::Registers { window, .. } => Some((window.address + QUEUE_NOTIFY, Some(queue))),
            Wiring::Function { place, .. } => place.kick(queue).map(|address| (address, None)),
        }
    }
}

/// An address, and what is written there if only that is a kick.
type KickPlace = (u64, Option<u32>);

/// What tells of kicks of a queue.
struct KickWatch {
    event: EventFd,
    /// The event loop waits for it.
    polled: bool,
    /// Where the kernel looks out for it, if anywhere. Elsewhere kicks come out of guest mode.
    place: Option<KickPlace>,
}

/// One device's place in the machine.
pub struct DevicePlatform {
    vm: Arc<Vm>,
    poller: Arc<Poller>,
    exit: ExitSwitch,
    wiring: Wiring,
    source: u32,
    /// One for each queue, while kicks are watched for.
    kicks: Vec<KickWatch>,
}

opaque_debug!(DevicePlatform);

impl DevicePlatform {
    /// For the device with this wiring, which is `source` to the event loop.
    pub fn new(
        vm: Arc<Vm>,
        poller: Arc<Poller>,
        exit: ExitSwitch,
        wiring: Wiring,
        source: u32,
    ) -> Self {
        Self {
            vm,
            poller,
            exit,
            wiring,
            source,
            kicks: Vec::new(),
        }
    }

    /// Has the kernel look out for kicks of a queue. A guest can put functions on top of each other,
    /// or have more of them than the kernel takes: then it does not, and nothing is lost but time.
    fn connect(&self, event: &EventFd, queue: u32) -> io::Result<Option<KickPlace>> {
        let Some((address, value)) = self.wiring.kick(queue) else {
            return Ok(None);
        };
        match self.vm.add_kick(event, address, value) {
            Ok(()) => Ok(Some((address, value))),
            Err(_) if matches!(self.wiring, Wiring::Function { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn disconnect(&self, kick: &KickWatch) -> io::Result<()> {
        match kick.place {
            Some((address, value)) => self.vm.remove_kick(&kick.event, address, value),
            None => Ok(()),
        }
    }
}

impl Platform for DevicePlatform {
    fn interrupt(&self, told: Signal) -> io::Result<()> {
        match &self.wiring {
            Wiring::Registers { line, .. } => match line.write(1) {
                // The counter is full: the interrupt is pending.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                result => result,
            },
            Wiring::Function { interrupts, .. } => {
                let mut interrupts = interrupts.lock().expect("nothing panics in here");
                interrupts.raise(told);
                Ok(())
            }
        }
    }

    fn watch_kicks(&mut self, queues: usize) -> io::Result<()> {
        for index in 0..u32::try_from(queues).expect("a few queues") {
            let event = event()?;
            let token = KICK_TOKEN + index;
            self.poller
                .add(self.source, token, event.as_raw_fd(), Readiness::READABLE)?;
            let place = self.connect(&event, index)?;
            self.kicks.push(KickWatch {
                event,
                polled: true,
                place,
            });
        }
        Ok(())
    }

    fn pass_kicks_on(&mut self, events: &[&EventFd]) -> io::Result<()> {
        for (index, event) in (0..).zip(events) {
            let place = self.connect(event, index)?;
            self.kicks.push(KickWatch {
                event: event.try_clone()?,
                polled: false,
                place,
            });
        }
        Ok(())
    }

    fn unwatch_kicks(&mut self) -> io::Result<()> {
        for kick in std::mem::take(&mut self.kicks) {
            if kick.polled {
                self.poller.remove(kick.event.as_raw_fd())?;
            }
            self.disconnect(&kick)?;
        }
        Ok(())
    }

    fn moved(&mut self) -> io::Result<()> {
        let mut kicks = std::mem::take(&mut self.kicks);
        for (queue, kick) in (0..).zip(&mut kicks) {
            self.disconnect(kick)?;
            kick.place = self.connect(&kick.event, queue)?;
        }
        self.kicks = kicks;
        Ok(())
    }

    fn kick(&self, queue: usize, kick: Kick) -> io::Result<()> {
        let watch = self.kicks.get(queue).ok_or(io::ErrorKind::NotFound)?;
        match kick {
            Kick::Take => watch.event.read().map(|_| ()),
            Kick::Make => watch.event.write(1),
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

impl Messages for Arc<Vm> {
    fn send(&self, message: Message) {
        self.send_message(message);
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
