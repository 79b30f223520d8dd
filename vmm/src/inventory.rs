//! All virtio devices of a machine, and what it was made from: what snapshots are taken of, what
//! statistics are of, and what changes while it runs, where the transport allows that.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::events::Stopper;
use crate::fair_mutex::FairMutex;
use crate::pci::bus::DEVICES_MAX;
use crate::spec::{Disk, Net, Spec};
use crate::virtio::block::BlockHandle;
use crate::virtio::counters::Counters;
use crate::virtio::net::NetHandle;
use crate::virtio::pci::VirtioFunction;
use crate::virtio::rng::RngCounters;
use crate::virtio::transport::{Transport, Window};
use crate::virtio::vsock::VsockCounters;

/// A device.
pub struct Entry {
    pub name: String,
    pub window: Window,
    pub transport: Arc<FairMutex<Transport>>,
    /// The transport's: whoever reads them need not wait for it.
    pub counters: Arc<Counters>,
    /// On PCI.
    pub function: Option<Arc<Mutex<VirtioFunction>>>,
    pub handle: Handle,
    /// Ends the thread of a device that has one.
    pub thread: Option<Stopper>,
    /// No other device that this inventory has, had or will have has the same.
    pub ticket: u64,
}

opaque_debug!(Entry);

/// What the rest of the machine keeps of a device.
#[derive(Clone, Debug)]
pub enum Handle {
    Disk(BlockHandle),
    Net(NetHandle),
    Vsock(Arc<VsockCounters>),
    Rng(Arc<RngCounters>),
    Other,
}

impl Handle {
    /// Such devices come and go while the machine runs.
    pub fn comes_and_goes(&self) -> bool {
        matches!(self, Handle::Disk(_) | Handle::Net(_))
    }
}

/// What a device that is added was made from.
#[derive(Clone, Debug)]
pub enum Made {
    Disk(Disk),
    Net(Net),
}

impl Made {
    /// What names of such devices begin with.
    pub fn prefix(&self) -> &'static str {
        match self {
            Made::Disk(_) => "disk",
            Made::Net(_) => "net",
        }
    }
}

/// The devices: disks, network interfaces, and the others, as the specification has them.
#[derive(Debug)]
pub struct Inventory {
    /// Its disks and network interfaces are those that there are, in their order.
    spec: Spec,
    entries: Vec<Arc<Entry>>,
    next_ticket: u64,
}

/// An inventory that threads share.
pub type SharedInventory = Arc<Mutex<Inventory>>;

/// For a short while: whoever waits for it answers clients, or is a processor.
pub fn lock(inventory: &SharedInventory) -> MutexGuard<'_, Inventory> {
    inventory.lock().expect("nothing panics in here")
}

impl Inventory {
    /// Of a machine that is made from `spec`, whose devices are still to come.
    pub fn new(spec: Spec) -> Inventory {
        Inventory {
            spec,
            entries: Vec::new(),
            next_ticket: 0,
        }
    }

    /// What a machine with these devices would be made from.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// All devices.
    pub fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    /// The device of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// All disks.
    pub fn disks(&self) -> impl Iterator<Item = &BlockHandle> {
        self.entries.iter().filter_map(|entry| match &entry.handle {
            Handle::Disk(handle) => Some(handle),
            Handle::Net(_) | Handle::Vsock(_) | Handle::Rng(_) | Handle::Other => None,
        })
    }

    /// All network interfaces.
    pub fn nets(&self) -> impl Iterator<Item = &NetHandle> {
        self.entries.iter().filter_map(|entry| match &entry.handle {
            Handle::Net(handle) => Some(handle),
            Handle::Disk(_) | Handle::Vsock(_) | Handle::Rng(_) | Handle::Other => None,
        })
    }

    /// The lowest number with which no device has this name.
    pub fn free_number(&self, prefix: &str) -> u16 {
        let free = |number: &u16| self.find(&format!("{prefix}{number}")).is_none();
        (0..).find(free).expect("there are a few devices")
    }

    /// The lowest number on the bus that no device has and that is not among those that are `reserved`,
    /// a bit for each, if there is one. Number 0 is the bridge.
    pub fn free_slot(&self, reserved: u32) -> Option<u32> {
        let most = u32::try_from(DEVICES_MAX).expect("a few");
        let free = |slot: &u32| {
            let taken = self.entries.iter().any(|entry| entry.window.gsi == *slot);
            !taken && reserved >> slot & 1 == 0
        };
        (1..most).find(free)
    }

    /// The next device of those that `spec` has.
    pub fn push(&mut self, entry: Entry) {
        self.insert(self.entries.len(), entry);
    }

    /// There is one more.
    pub fn add(&mut self, entry: Entry, made: Made) {
        let (disks, nets) = (self.spec.disks.len(), self.spec.nets.len());
        let position = match made {
            Made::Disk(disk) => {
                self.spec.disks.push(disk);
                disks
            }
            Made::Net(net) => {
                self.spec.nets.push(net);
                disks + nets
            }
        };
        self.insert(position, entry);
    }

    fn insert(&mut self, position: usize, mut entry: Entry) {
        entry.ticket = self.next_ticket;
        self.next_ticket += 1;
        self.entries.insert(position, Arc::new(entry));
    }

    /// The device with this number on the bus is no more.
    pub fn remove(&mut self, slot: u32) -> Option<Arc<Entry>> {
        let found = |entry: &Arc<Entry>| entry.window.gsi == slot;
        let position = self.entries.iter().position(found)?;
        let disks = self.spec.disks.len();
        match &self.entries[position].handle {
            Handle::Disk(_) => drop(self.spec.disks.remove(position)),
            Handle::Net(_) => drop(self.spec.nets.remove(position - disks)),
            Handle::Vsock(_) | Handle::Rng(_) | Handle::Other => {}
        }
        Some(self.entries.remove(position))
    }
}
