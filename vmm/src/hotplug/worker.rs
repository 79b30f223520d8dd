//! Makes devices of what clients have handed over, and does away with those that guests have let go.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;

use super::Outcome;
use super::slots::Slots;
use crate::assembly::{self, AssemblyError, NewDevice, Surroundings};
use crate::events::EventLoop;
use crate::exit::ExitSwitch;
use crate::inventory::{Entry, Made, SharedInventory, lock};
use crate::kvm::Vm;
use crate::pci::bus::{DEVICES_MAX, PciBus};
use crate::plan::{DiskPlan, NetPlan, PlanError};
use crate::virtio::transport::Window;

/// Why a device was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(
        "the bus is full: it has room for {} devices, those included that were taken away without the \
         guest's consent and of which it has not let go",
        DEVICES_MAX - 1
    )]
    Full,
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    #[error("a thread for the device cannot be started")]
    Thread(#[source] io::Error),
}

/// What the thread is to do.
#[derive(Debug)]
pub(super) enum Job {
    Attach(Box<Made>, Vec<OwnedFd>),
    /// A device that is off the bus and out of the inventory.
    Dispose(Arc<Entry>),
    End,
}

/// What devices become part of.
pub struct Worker {
    pub vm: Arc<Vm>,
    pub exit: ExitSwitch,
    pub bus: Arc<Mutex<PciBus>>,
    pub inventory: SharedInventory,
    pub slots: Arc<Slots>,
    /// The guest's ACPI tables have the methods that it takes.
    pub guest_hears: bool,
    /// What a device's thread does first.
    pub enter: Arc<dyn Fn() + Send + Sync>,
}

opaque_debug!(Worker);

impl Worker {
    /// Does all jobs in their order, up to [`Job::End`].
    pub(super) fn serve(&self, jobs: &Receiver<Job>, done: impl Fn(Outcome)) {
        for job in jobs {
            match job {
                Job::Attach(made, descriptors) => {
                    done(Outcome::Attached(self.attach(*made, descriptors)));
                }
                Job::Dispose(entry) => {
                    dispose(&entry);
                    done(Outcome::Detached(entry.ticket));
                }
                Job::End => return,
            }
        }
    }

    /// Nothing has changed if this fails.
    fn attach(&self, made: Made, descriptors: Vec<OwnedFd>) -> Result<String, AttachError> {
        let (number, slot) = {
            let inventory = lock(&self.inventory);
            let number = inventory.free_number(made.prefix());
            let slot = inventory.free_slot(self.slots.reserved());
            (number, slot.ok_or(AttachError::Full)?)
        };
        let name = format!("{}{number}", made.prefix());
        let (made, device) = match made {
            Made::Disk(disk) => {
                let plan = DiskPlan::handed(name.clone(), &disk, descriptors)?;
                (Made::Disk(disk), assembly::disk(plan))
            }
            Made::Net(mut net) => {
                let plan = NetPlan::handed(number, &net, descriptors)?;
                // A guest that is restored keeps it, whatever becomes of other interfaces.
                net.mac = Some(plan.mac_text());
                (Made::Net(net), assembly::net(plan))
            }
        };
        let device = device.map_err(|source| AssemblyError::Device {
            name: name.clone(),
            source,
        })?;
        let entry = self.put_together(device, slot)?;
        self.insert(entry, made, slot);
        Ok(name)
    }

    /// The device with its thread, which serves it already.
    fn put_together(&self, device: NewDevice, slot: u32) -> Result<Entry, AttachError> {
        let name = device.name.clone();
        let mut events = EventLoop::new(self.exit.clone()).map_err(AttachError::Thread)?;
        let stopper = events.stopper().map_err(AttachError::Thread)?;
        let surroundings = Surroundings {
            vm: &self.vm,
            exit: &self.exit,
        };
        let window = Window::on_bus(slot);
        let mut entry = assembly::function(&surroundings, &mut events, device, window)?;
        let (enter, exit) = (self.enter.clone(), self.exit.clone());
        let run = move || {
            enter();
            if let Err(error) = events.run() {
                exit.fail(&error);
            }
        };
        // It ends with the device or the machine, and nobody waits for it.
        let thread = thread::Builder::new().name(name);
        thread.spawn(run).map_err(AttachError::Thread)?;
        entry.thread = Some(stopper);
        Ok(entry)
    }

    fn insert(&self, entry: Entry, made: Made, slot: u32) {
        let mut inventory = lock(&self.inventory);
        if let Some(function) = entry.function.clone() {
            let mut bus = self.bus.lock().expect("no function panics");
            bus.insert(slot, function);
        }
        inventory.add(entry, made);
        self.slots.come(slot);
    }
}

/// Its descriptors are closed when this returns.
fn dispose(entry: &Entry) {
    entry.transport.lock().retire();
    if let Some(thread) = &entry.thread {
        thread.stop();
    }
}
