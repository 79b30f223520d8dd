//! Drivers of virtio devices, for guests of a few instructions: what they offer is written out before the
//! machine starts, and they look for what has come back.

use vmm::layout;
use vmm::virtio::transport::Window;

use crate::guest::Guest;
use crate::snapshot::VIRTIO;

/// The room that the rings of each queue have.
const QUEUE_BYTES: u32 = 0x1_0000;

/// Flags of descriptors.
const NEXT: u32 = 1;
const WRITE: u32 = 2;

/// The interrupt that functions on PCI send.
const MESSAGE: u32 = 0x40;

/// A piece of memory as a driver describes it: address, length, and whether the device writes there.
pub(crate) type Buffer = (u32, u32, bool);

/// Where a driver finds its device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// The first of those with registers in memory.
    Mmio,
    /// A slot of the PCI bus, from 1 on.
    Pci(u32),
}

impl Place {
    fn window(self) -> u32 {
        let window = match self {
            Place::Mmio => layout::VIRTIO,
            Place::Pci(slot) => Window::on_bus(slot).address,
        };
        u32::try_from(window).unwrap()
    }

    /// Where the device says how it is.
    pub(crate) fn status(self) -> u32 {
        let offset = match self {
            Place::Mmio => 0x70,
            Place::Pci(_) => 0x14,
        };
        self.window() + offset
    }

    /// Where the device's own configuration begins.
    pub(crate) fn config(self) -> u32 {
        let offset = match self {
            Place::Mmio => 0x100,
            Place::Pci(_) => 0x2000,
        };
        self.window() + offset
    }
}

/// A queue of a device, by its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue(pub(crate) u16);

impl Queue {
    fn descriptors(self) -> u32 {
        0x20_0000 + u32::from(self.0) * QUEUE_BYTES
    }

    fn available(self) -> u32 {
        self.descriptors() + 0x1000
    }

    fn used(self) -> u32 {
        self.descriptors() + 0x2000
    }

    /// How much the device has written into the first chain that came back.
    pub(crate) fn first_used_bytes(self) -> u32 {
        self.used() + 8
    }
}

impl Guest {
    /// Accepts these of the device's own features, and sets up so many of its queues, the first ones, each
    /// of this size. There are no buffers in them.
    pub(crate) fn set_up_device(
        self,
        place: Place,
        features: u32,
        queues: u16,
        queue_size: u16,
    ) -> Guest {
        let guest = self.negotiate(place, features);
        (0..queues)
            .map(Queue)
            .fold(guest, |guest, queue| guest.set_up(place, queue, queue_size))
    }

    fn negotiate(self, place: Place, features: u32) -> Guest {
        let window = place.window();
        match place {
            Place::Mmio => [
                (0x70, 0),
                (0x70, 1),
                (0x70, 3),
                (0x24, 0),
                (0x20, features),
                (0x24, 1),
                (0x20, 1), // VERSION_1.
                (0x70, 11),
            ]
            .into_iter()
            .fold(self, |guest, (offset, value)| {
                guest.store_long(window + offset, value)
            }),
            Place::Pci(slot) => {
                let space = u32::try_from(layout::PCI_CONFIG).unwrap() + (slot << 15);
                self.wait_for(space, VIRTIO)
                    .store_word(space + 4, 6) // Answer, and access memory.
                    // Send messages, of which the capability is the first.
                    .store_word(space + 0x42, 1 << 15)
                    .store_long(window + 0x4000, layout::LOCAL_APIC)
                    .store_long(window + 0x4008, MESSAGE)
                    .store_long(window + 0x400c, 0)
                    // Accepted, but for as long as the processor is deaf.
                    .store_long(layout::LOCAL_APIC + 0xf0, 0x1ff)
                    .store_byte(window + 0x14, 0)
                    .store_byte(window + 0x14, 1)
                    .store_byte(window + 0x14, 3)
                    .store_long(window + 0x08, 0)
                    .store_long(window + 0x0c, features)
                    .store_long(window + 0x08, 1)
                    .store_long(window + 0x0c, 1) // VERSION_1.
                    .store_byte(window + 0x14, 11)
            }
        }
    }

    fn set_up(self, place: Place, queue: Queue, size: u16) -> Guest {
        let window = place.window();
        let rings = [queue.descriptors(), queue.available(), queue.used()];
        match place {
            Place::Mmio => [
                (0x30, queue.0.into()),
                (0x38, size.into()),
                (0x80, rings[0]),
                (0x90, rings[1]),
                (0xa0, rings[2]),
                (0x44, 1),
            ]
            .into_iter()
            .fold(self, |guest, (offset, value)| {
                guest.store_long(window + offset, value)
            }),
            Place::Pci(_) => self
                .store_word(window + 0x16, queue.0)
                .store_word(window + 0x18, size)
                .store_long(window + 0x20, rings[0])
                .store_long(window + 0x28, rings[1])
                .store_long(window + 0x30, rings[2])
                .store_word(window + 0x1a, 0) // All by the first message.
                .store_word(window + 0x1c, 1),
        }
    }

    /// Describes each of `chains`, and puts it into the ring of those that are available.
    pub(crate) fn describe(self, queue: Queue, chains: &[&[Buffer]]) -> Guest {
        let mut guest = self;
        let mut index = 0;
        for (slot, chain) in (queue.available() + 4..).step_by(2).zip(chains) {
            guest = guest.store_word(slot, u16::try_from(index).unwrap());
            for (at, (address, bytes, writable)) in chain.iter().enumerate() {
                let next = if at + 1 < chain.len() { NEXT } else { 0 };
                let write = if *writable { WRITE } else { 0 };
                let place = queue.descriptors() + 16 * index;
                index += 1;
                guest = guest
                    .store_long(place, *address)
                    .store_long(place + 8, *bytes)
                    .store_long(place + 12, index << 16 | next | write);
            }
        }
        guest
    }

    /// Says that so many chains have been made available since the start.
    pub(crate) fn make_available(self, queue: Queue, count: u16) -> Guest {
        self.store_word(queue.available() + 2, count)
    }

    /// Says that so many more are.
    pub(crate) fn make_more_available(self, queue: Queue, count: u16) -> Guest {
        self.add_word(queue.available() + 2, count)
    }

    /// Makes so many more chains available, and waits until all have come back.
    pub(crate) fn exchange(self, place: Place, queue: Queue, count: u16) -> Guest {
        self.make_more_available(queue, count)
            .kick(place, queue)
            .wait_all_used(queue)
    }

    /// Starts the device, which finds what is available.
    pub(crate) fn start_device(self, place: Place) -> Guest {
        match place {
            Place::Mmio => self.store_long(place.status(), 15),
            Place::Pci(_) => self.store_byte(place.status(), 15),
        }
    }

    /// Waits until the device has interrupted its driver, and not only used buffers, on PCI.
    pub(crate) fn wait_interrupted(self, place: Place) -> Guest {
        match place {
            Place::Mmio => self,
            Place::Pci(_) => {
                // A bit for each interrupt that a processor has not taken.
                let requested = layout::LOCAL_APIC + 0x200 + MESSAGE / 32 * 16;
                self.wait_for(requested, 1 << (MESSAGE % 32))
            }
        }
    }

    pub(crate) fn kick(self, place: Place, queue: Queue) -> Guest {
        let offset = match place {
            Place::Mmio => 0x50,
            Place::Pci(_) => 0x3000 + 4 * u32::from(queue.0),
        };
        self.store_long(place.window() + offset, queue.0.into())
    }

    /// Waits until all have come back that were made available.
    pub(crate) fn wait_all_used(self, queue: Queue) -> Guest {
        self.wait_same(queue.used() + 2, queue.available() + 2)
    }
}
