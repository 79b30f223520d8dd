//! Devices of a PCI machine that come and go while it runs.
//!
//! A client hands over the descriptors of a disk or a tap ([`client`] does), a thread of its own makes
//! the device and puts it into a free slot, and the guest hears of it by an event of its ACPI tables
//! ([`slots`]). A device leaves when the guest, which is asked, has let go of it, or is taken away.

pub mod client;
pub mod slots;
mod worker;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use self::slots::Slots;
use self::worker::Job;
pub use self::worker::{AttachError, Worker};
use crate::events::event;
use crate::inventory::{Entry, Inventory, Made, SharedInventory, lock};
use crate::pci::bus::PciBus;

/// Why nothing is begun.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error("busy: another device is being attached")]
    Busy,
    #[error("the guest was started by a version that could not attach devices")]
    Unknowing,
    #[error("there is no device `{0}`")]
    Missing(String),
    #[error("`{0}` stays: disks and network interfaces alone can be detached")]
    Fixed(String),
}

/// What has come of what was begun.
#[derive(Debug)]
pub enum Outcome {
    /// The name of the device, or why there is none.
    Attached(Result<String, AttachError>),
    /// The device with this number of [`Entry::ticket`] is no more.
    Detached(u64),
}

/// What clients can ask for. The thread ends when this is dropped, which waits for it.
#[derive(Debug)]
pub struct Hotplug {
    /// Not the thread's alone: it may not do all that the end of devices takes.
    worker: Arc<Worker>,
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    /// Readable when there are outcomes.
    done: EventFd,
}

#[derive(Debug, Default)]
struct Progress {
    /// A device is being made, or nobody has asked what came of it; there is one at a time.
    attaching: bool,
    /// As many as there were devices, and one.
    outcomes: Vec<Outcome>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("nothing panics in here")
    }

    fn finish(&self, outcome: Outcome) {
        self.lock().outcomes.push(outcome);
        // A full counter wakes as well as a written one.
        let _ = self.done.write(1);
    }
}

/// The way to the thread before that runs.
#[derive(Debug)]
pub struct Departures {
    jobs: Sender<Job>,
    received: Receiver<Job>,
}

impl Default for Departures {
    fn default() -> Self {
        let (jobs, received) = channel();
        Self { jobs, received }
    }
}

impl Departures {
    /// What is to be done when a guest lets go of the device in a slot: it is off the bus at once, and
    /// the thread sees to the rest.
    pub fn leave(
        &self,
        inventory: SharedInventory,
        bus: Arc<Mutex<PciBus>>,
    ) -> Box<dyn Fn(u32) + Send> {
        let jobs = self.jobs.clone();
        Box::new(move |slot| take_off(&mut lock(&inventory), &bus, slot, &jobs))
    }
}

/// The device in `slot`, if there is one, is off the bus when this returns; the thread sees to the rest.
///
/// In the inventory's lock, so that nobody finds the slot free before it is.
fn take_off(inventory: &mut Inventory, bus: &Mutex<PciBus>, slot: u32, jobs: &Sender<Job>) {
    bus.lock().expect("no function panics").remove(slot);
    if let Some(entry) = inventory.remove(slot) {
        // A thread that is gone has ended with the machine.
        let _ = jobs.send(Job::Dispose(entry));
    }
}

impl Hotplug {
    /// Starts the thread. `enter` runs first.
    ///
    /// # Errors
    ///
    /// If the host has no thread or event to give.
    pub fn start(
        worker: Worker,
        departures: Departures,
        enter: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<Hotplug> {
        let shared = Arc::new(Shared {
            progress: Mutex::default(),
            done: event()?,
        });
        let worker = Arc::new(worker);
        let Departures { jobs, received } = departures;
        let (theirs, done) = (worker.clone(), shared.clone());
        let thread = thread::Builder::new()
            .name("hotplug".to_owned())
            .spawn(move || {
                enter();
                theirs.serve(&received, |outcome| done.finish(outcome));
            })?;
        Ok(Hotplug {
            worker,
            jobs,
            shared,
            thread: Some(thread),
        })
    }

    /// Begins to attach a device: what it is made from, and its descriptors.
    pub fn attach(&self, made: Made, descriptors: Vec<OwnedFd>) -> Result<(), Refused> {
        if !self.worker.guest_hears {
            return Err(Refused::Unknowing);
        }
        let mut progress = self.shared.lock();
        if progress.attaching {
            return Err(Refused::Busy);
        }
        progress.attaching = true;
        // The thread is there as long as this is.
        let sent = self.jobs.send(Job::Attach(Box::new(made), descriptors));
        sent.map_err(|_| Refused::Busy)
    }

    /// Asks the guest to let go of a device, again if it was asked before, and with `force` takes the
    /// device away before the guest has answered. Returns the device's number, which
    /// [`Outcome::Detached`] has once it is no more.
    pub fn detach(&self, name: &str, force: bool) -> Result<u64, Refused> {
        if !self.worker.guest_hears {
            return Err(Refused::Unknowing);
        }
        let mut inventory = lock(&self.worker.inventory);
        let entry = inventory.find(name);
        let entry: &Entry = entry.ok_or_else(|| Refused::Missing(name.to_owned()))?;
        if !entry.handle.comes_and_goes() {
            return Err(Refused::Fixed(name.to_owned()));
        }
        let (slot, ticket) = (entry.window.gsi, entry.ticket);
        if force {
            take_off(&mut inventory, &self.worker.bus, slot, &self.jobs);
        }
        // After it is off the bus: a guest that hears of it finds nobody there.
        self.worker.slots.ask(slot);
        Ok(ticket)
    }

    /// Whether a device is being attached.
    pub fn busy(&self) -> bool {
        self.shared.lock().attaching
    }

    /// Readable when [`take_outcomes`](Self::take_outcomes) has some.
    pub fn done_fd(&self) -> RawFd {
        self.shared.done.as_raw_fd()
    }

    /// What has come of what was begun, once.
    pub fn take_outcomes(&self) -> Vec<Outcome> {
        // Readable or not: it is only being made unreadable.
        let _ = self.shared.done.read();
        let mut progress = self.shared.lock();
        let outcomes = std::mem::take(&mut progress.outcomes);
        let attached = |outcome: &Outcome| matches!(outcome, Outcome::Attached(_));
        if outcomes.iter().any(attached) {
            progress.attaching = false;
        }
        outcomes
    }

    /// Who tells the guest.
    pub fn slots(&self) -> &Slots {
        &self.worker.slots
    }
}

impl Drop for Hotplug {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.jobs.send(Job::End);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}
