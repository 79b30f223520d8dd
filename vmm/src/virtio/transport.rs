//! What stands between a virtio device and its driver, whatever registers the driver sees: those of
//! memory-mapped devices ([`mmio`]) or those of PCI functions ([`pci`] and
//! [`virtio::pci`](super::pci)).
//!
//! It owns negotiation, status, queue addresses, suppression of notifications in both directions,
//! and interrupts. A driver that leaves the order of section 3.1 finds its write ignored.

mod busy;
mod hold;
mod mmio;
pub(super) mod pci;
mod retire;
mod setup;
mod state;
mod window;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::setup::{QueueSetup, configure};
pub use self::state::TransportState;
pub use self::window::Window;
use super::counters::{Counters, count};
use super::registers::{self as register, status};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};

/// Tokens from here up are kicks of a queue; a device's own are below.
pub const KICK_TOKEN: u32 = 1 << 31;

/// How often a queue is served in one go before other devices get their turn.
const ROUNDS_MAX: usize = 4;

/// What the transport needs of the machine around it.
pub trait Platform: Send {
    /// Interrupts the driver for what it is told.
    fn interrupt(&self, told: Signal) -> io::Result<()>;

    /// Hands kicks of `queues` queues to the event loop, as tokens from [`KICK_TOKEN`].
    fn watch_kicks(&mut self, queues: usize) -> io::Result<()>;

    /// Has the kernel make these events, one for each queue, when it is kicked: somebody else waits for
    /// them.
    fn pass_kicks_on(&mut self, _events: &[&EventFd]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The end of [`watch_kicks`](Self::watch_kicks) or [`pass_kicks_on`](Self::pass_kicks_on).
    fn unwatch_kicks(&mut self) -> io::Result<()>;

    /// The device's registers are elsewhere from now on.
    fn moved(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Takes notice of a kick, or makes one as the driver does.
    fn kick(&self, queue: usize, kick: Kick) -> io::Result<()>;

    /// Waits for `new` instead of `old` descriptors.
    fn watch(&mut self, old: &[Interest], new: &[Interest]) -> io::Result<()>;

    /// Ends the machine: the device cannot go on.
    fn fail(&self, error: DeviceError);
}

/// What to do with a kick.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kick {
    Take,
    Make,
}

/// A device and its registers.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    info: DeviceInfo,
    /// The device only has the queues served.
    is_served_elsewhere: bool,
    platform: Box<dyn Platform>,
    memory: GuestMemoryMmap,
    queues: Vec<Queue>,
    setups: Vec<QueueSetup>,
    interests: Vec<Interest>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    config_generation: u32,
    /// Bit N: queue N is looked after, and its driver has not been asked for kicks.
    busy_queues: u32,
    /// Nothing moves until [`release`](Self::release).
    held: bool,
    /// A driver was there and has gone.
    left: bool,
    counters: Arc<Counters>,
}

opaque_debug!(Transport);

/// What is behind a call into the device.
type Outcome = Result<Signal, DeviceError>;

impl Transport {
    /// `device`, reset, in front of a driver.
    ///
    /// # Errors
    ///
    /// If the device asks for a queue that cannot be.
    pub fn new(
        name: String,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        platform: Box<dyn Platform>,
    ) -> Result<Self, virtio_queue::Error> {
        let info = device.info();
        let queues = info
            .queue_sizes
            .iter()
            .map(|size| Queue::new(*size))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            setups: vec![QueueSetup::default(); queues.len()],
            is_served_elsewhere: device.kicks().is_some(),
            device,
            info,
            platform,
            memory,
            queues,
            interests: Vec::new(),
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            interrupt_status: 0,
            config_generation: 0,
            busy_queues: 0,
            held: false,
            left: false,
            counters: Arc::new(Counters::new(name)),
        })
    }

    /// What the device has done so far.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The type of the device, virtio 1.2 section 5.
    pub fn device_id(&self) -> u32 {
        self.info.id
    }

    /// How many queues it has.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    fn offered_features(&self) -> u64 {
        self.info.features
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Whether the device may touch its queues.
    fn active(&self) -> bool {
        let live = self.status & (status::DRIVER_OK | status::NEEDS_RESET);
        live == status::DRIVER_OK && !self.held
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_select)
            .ok()
            .filter(|index| *index < self.queues.len())
    }

    // Status (section 2.1) and negotiation.

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.status & !status::NEEDS_RESET;
        let added = value & !self.status & !status::NEEDS_RESET;
        if value & old != old || self.has(status::FAILED) {
            return; // Bits are cleared by a reset alone.
        }
        let next = match old {
            0 => status::ACKNOWLEDGE,
            status::HAS_ACKNOWLEDGE => status::DRIVER,
            status::HAS_DRIVER => status::FEATURES_OK,
            status::HAS_FEATURES => status::DRIVER_OK,
            _ => 0,
        };
        match added {
            status::FAILED => self.status |= status::FAILED,
            status::FEATURES_OK if added == next && !self.features_acceptable() => {}
            status::DRIVER_OK if added == next => self.activate(),
            _ if added == next => self.status |= added,
            _ => {}
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        self.status |= status::DRIVER_OK;
        self.left = false;
        self.use_features();
        if let Err(error) = self.watch_kicks() {
            return self.host_failure("watch for kicks", error);
        }
        let outcome = self.device.activate(self.driver_features);
        if self.settle(outcome.map(|()| Signal::NONE)) {
            // A kick may have come before it was watched for. What is there is not done here, on the
            // driver's own processor.
            for index in 0..self.queues.len() {
                if let Err(error) = self.poke(index) {
                    return self.host_failure("make a kick", error);
                }
            }
        }
    }

    fn watch_kicks(&mut self) -> io::Result<()> {
        match self.device.kicks() {
            None => self.platform.watch_kicks(self.queues.len()),
            Some(events) => self.platform.pass_kicks_on(&events),
        }
    }

    /// Makes the queues work as the driver has been promised.
    fn use_features(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
        }
    }

    fn reset(&mut self) {
        if self.has(status::DRIVER_OK) {
            self.device.reset();
            if let Err(error) = self.platform.unwatch_kicks() {
                self.host_failure("forget a driver", error);
            }
            self.left = true;
        }
        for queue in &mut self.queues {
            queue.reset();
        }
        self.setups.fill(QueueSetup::default());
        self.busy_queues = 0;
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.interrupt_status = 0;
        self.watch();
    }

    // Queues (section 2.6).

    /// The selected queue's setup, while the driver may write it.
    fn setup(&mut self) -> Option<&mut QueueSetup> {
        let index = self.selected()?;
        let open = self.status & !status::NEEDS_RESET == status::HAS_FEATURES;
        (open && !self.queues[index].ready()).then(|| &mut self.setups[index])
    }

    fn set_queue_ready(&mut self, value: u32) {
        let open = self.status & !status::NEEDS_RESET == status::HAS_FEATURES;
        let (Some(index), true) = (self.selected(), open) else {
            return;
        };
        let queue = &mut self.queues[index];
        match value {
            0 => queue.set_ready(false),
            1 if queue.ready() || configure(queue, self.setups[index], &self.memory) => {}
            1 => self.need_reset(),
            _ => {}
        }
    }

    /// Serves a queue until it is empty, or until the device wants no more of it for now.
    fn process(&mut self, index: usize) {
        if self.is_served_elsewhere {
            if self.active() && self.queues.get(index).is_some_and(Queue::ready) {
                let outcome = self.device.process(index, &mut self.queues, &self.memory);
                self.settle(outcome);
            }
            return;
        }
        let mut declined = false;
        for _ in 0..ROUNDS_MAX {
            if !self.active() || !self.queues.get(index).is_some_and(Queue::ready) {
                return;
            }
            let before = self.queues[index].next_avail();
            let outcome = self.device.process(index, &mut self.queues, &self.memory);
            if !self.settle(outcome) || !self.rearm(index) {
                return;
            }
            if before == self.queues[index].next_avail() {
                if declined {
                    return; // It has seen all there is, and leaves it for later.
                }
                // Either it leaves buffers for later, or one was added after it had looked.
                declined = true;
            }
        }
        if !declined && let Err(error) = self.platform.kick(index, Kick::Make) {
            self.host_failure("put work off", error);
        }
    }

    /// Asks the driver for a kick when it adds a buffer. Returns whether there is one already.
    fn rearm(&mut self, index: usize) -> bool {
        match self.queues[index].enable_notification(&self.memory) {
            Ok(more) => more,
            Err(source) => {
                self.settle(Err(DeviceError::Guest { index, source }));
                false
            }
        }
    }

    /// One of the device's own descriptors is ready.
    fn on_device_ready(&mut self, token: u32) {
        // The device may have lost interest since the kernel was asked.
        let mut interests = self.interests.iter();
        if !interests.any(|interest| interest.token == token) {
            return;
        }
        if !self.active() {
            let outcome = self.device.on_ready_without_driver();
            self.settle(outcome.map(|()| Signal::NONE));
            return;
        }
        let before: Vec<u16> = self.queues.iter().map(Queue::next_avail).collect();
        let outcome = self.device.on_ready(token, &mut self.queues, &self.memory);
        if !self.settle(outcome) {
            return;
        }
        for (index, before) in before.into_iter().enumerate() {
            let queue = &self.queues[index];
            if !queue.ready() || queue.next_avail() == before {
                continue;
            }
            if self.device.is_fast() {
                self.look_after(index);
            } else if self.rearm(index) {
                self.process(index);
            }
        }
    }

    // What the driver is told.

    /// Passes on what a call into the device gave. Returns whether the device goes on.
    fn settle(&mut self, outcome: Outcome) -> bool {
        let told = match outcome {
            Ok(signal) => self.signal(signal),
            Err(error) => Err(error),
        };
        match told {
            Ok(()) => {}
            Err(DeviceError::Guest { .. }) => self.need_reset(),
            Err(error @ DeviceError::Host { .. }) => {
                self.platform.fail(error);
                self.status |= status::NEEDS_RESET;
            }
        }
        self.watch();
        self.active()
    }

    /// Waits for the descriptors that the device waits for now.
    fn watch(&mut self) {
        let wanted = if self.active() {
            self.device.interests()
        } else if !self.held && (self.left || self.has(status::NEEDS_RESET)) {
            self.device.interests_without_driver()
        } else {
            Vec::new()
        };
        if wanted != self.interests {
            if let Err(error) = self.platform.watch(&self.interests, &wanted) {
                self.host_failure("wait for a descriptor", error);
            }
            self.interests = wanted;
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<(), DeviceError> {
        let mut told = Signal::NONE;
        for index in 0..self.queues.len() {
            // Who serves the queue knows whether the driver wants to hear of it.
            let told_of = signal.queues & 1 << index != 0;
            if told_of && (self.is_served_elsewhere || self.wants_interrupt(index)?) {
                told = told.and(Signal::queue(index));
            }
        }
        if told.queues != 0 {
            self.interrupt(told);
        }
        if signal.config {
            self.config_generation = self.config_generation.wrapping_add(1);
            self.interrupt(Signal::CONFIG);
        }
        Ok(())
    }

    /// Whether the driver wants to hear of used buffers (section 2.7.7).
    fn wants_interrupt(&mut self, index: usize) -> Result<bool, DeviceError> {
        let queue = &mut self.queues[index];
        let guest = |source| DeviceError::Guest { index, source };
        if queue.event_idx_enabled() {
            return queue.needs_notification(&self.memory).map_err(guest);
        }
        fence(Ordering::SeqCst); // The used index is written before the flags are read.
        let flags: u16 = self
            .memory
            .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
            .map_err(|error| guest(virtio_queue::Error::GuestMemory(error)))?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn interrupt(&mut self, told: Signal) {
        if told.queues != 0 {
            self.interrupt_status |= register::INTERRUPT_USED;
        }
        if told.config {
            self.interrupt_status |= register::INTERRUPT_CONFIG;
        }
        count(&self.counters.interrupts);
        if let Err(error) = self.platform.interrupt(told) {
            self.host_failure("raise an interrupt", error);
        }
    }

    /// The driver broke the rules: nothing moves until it resets the device (section 2.1.2).
    fn need_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
        count(&self.counters.failures);
        if self.has(status::DRIVER_OK) {
            self.interrupt(Signal::CONFIG);
        }
    }

    fn host_failure(&mut self, action: &'static str, source: io::Error) {
        self.status |= status::NEEDS_RESET;
        self.platform.fail(DeviceError::Host { action, source });
    }

    /// The driver kicks a queue by a register.
    pub(super) fn on_kick(&mut self, index: usize) {
        count(&self.counters.kicks);
        self.process(index);
    }
}

#[cfg(test)]
mod elsewhere;
#[cfg(test)]
mod noise;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod without_driver;
