//! A split virtqueue from the driver's side (virtio 1.2, section 2.7), without interrupts.

use core::sync::atomic::{Ordering, fence};

use crate::machine::memory;
use crate::mmio::Device;

/// Memory for rings starts here, one MiB for each queue.
const RINGS: usize = 4 << 20;
const RING_BYTES: usize = 1 << 20;

/// Where the parts are, for up to 1024 entries.
const AVAILABLE_AT: usize = 0x4000;
const USED_AT: usize = 0x8000;

const DESCRIPTOR_BYTES: usize = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 1 << 1;

/// In the flags of either ring: the other side wants no notification.
const NO_NOTIFICATION: u16 = 1;

/// How far ahead of the used index an interrupt is asked for: as far as can be.
const NEVER: u16 = 1 << 15;

/// A queue.
pub(crate) struct Queue {
    device: Device,
    index: u32,
    start: usize,
    entries: u16,
    event_idx: bool,
    /// Of the available ring: what was offered, and what of it the device knows.
    offered: u16,
    published: u16,
    /// What was taken from the used ring.
    taken: u16,
}

/// Who writes to a buffer.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Writer {
    Driver,
    Device,
}

impl Queue {
    /// An empty queue, which asks for no interrupts.
    pub(crate) fn new(device: Device, index: u32, entries: u16, event_idx: bool) -> Queue {
        let number = usize::try_from(index).unwrap_or_default();
        let queue = Queue {
            device,
            index,
            start: RINGS.wrapping_add(number.wrapping_mul(RING_BYTES)),
            entries,
            event_idx,
            offered: 0,
            published: 0,
            taken: 0,
        };
        memory::store(queue.available(), NO_NOTIFICATION);
        memory::store(queue.available().wrapping_add(2), 0_u16);
        memory::store(queue.used(), 0_u32);
        queue.postpone_interrupts();
        queue
    }

    pub(crate) fn descriptors(&self) -> usize {
        self.start
    }

    pub(crate) fn available(&self) -> usize {
        self.start.wrapping_add(AVAILABLE_AT)
    }

    pub(crate) fn used(&self) -> usize {
        self.start.wrapping_add(USED_AT)
    }

    /// Fills descriptor `slot`; `next` follows it in its chain.
    pub(crate) fn describe(
        &self,
        slot: u16,
        (address, bytes): (usize, u32),
        writer: Writer,
        next: Option<u16>,
    ) {
        let mut flags = 0;
        if writer == Writer::Device {
            flags |= WRITE;
        }
        if next.is_some() {
            flags |= NEXT;
        }
        let at = usize::from(slot).wrapping_mul(DESCRIPTOR_BYTES);
        let at = self.descriptors().wrapping_add(at);
        memory::store(at, u64::try_from(address).unwrap_or_default());
        memory::store(at.wrapping_add(8), bytes);
        memory::store(at.wrapping_add(12), flags);
        memory::store(at.wrapping_add(14), next.unwrap_or_default());
    }

    /// Offers the chain that starts at `slot`, once it is [`publish`](Self::publish)ed.
    pub(crate) fn offer(&mut self, slot: u16) {
        memory::store(self.available_entry(self.offered), slot);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device what was offered, and kicks it if it asked for that.
    pub(crate) fn publish(&mut self) {
        let old = self.published;
        memory::store(self.available().wrapping_add(2), self.offered);
        self.published = self.offered;
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = memory::load(self.used_entry(self.entries));
            self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(old)
        } else {
            memory::load::<u16>(self.used()) & NO_NOTIFICATION == 0
        };
        if wanted {
            self.device.kick(self.index);
        }
    }

    /// How many chains the device has used and the driver has not taken yet.
    pub(crate) fn ready(&self) -> u16 {
        let used: u16 = memory::load(self.used().wrapping_add(2));
        used.wrapping_sub(self.taken)
    }

    /// Takes the next used chain, of which there must be one; returns its first slot.
    pub(crate) fn take(&mut self) -> u16 {
        let id: u32 = memory::load(self.used_entry(self.place(self.taken)));
        self.taken = self.taken.wrapping_add(1);
        u16::try_from(id).unwrap_or_default()
    }

    /// To be called after some were taken.
    pub(crate) fn postpone_interrupts(&self) {
        if self.event_idx {
            let at = self.available().wrapping_add(4);
            let at = at.wrapping_add(usize::from(self.entries).wrapping_mul(2));
            memory::store(at, self.taken.wrapping_add(NEVER));
        }
    }

    /// The entry that a running number stands for; the number of entries is a power of two.
    fn place(&self, number: u16) -> u16 {
        number & self.entries.wrapping_sub(1)
    }

    fn available_entry(&self, number: u16) -> usize {
        let at = usize::from(self.place(number)).wrapping_mul(2);
        self.available().wrapping_add(4).wrapping_add(at)
    }

    /// Behind the last one is the device's `avail_event`.
    fn used_entry(&self, number: u16) -> usize {
        let at = usize::from(number).wrapping_mul(8);
        self.used().wrapping_add(4).wrapping_add(at)
    }
}
