//! A driver of the first virtio device, for guests of a few instructions: one queue, used once.

use vmm::layout;

use crate::guest::Guest;

const DESCRIPTORS: u32 = 0x20_0000;
const AVAILABLE: u32 = 0x20_1000;
const USED: u32 = 0x20_2000;

/// Flags of descriptors.
const NEXT: u32 = 1;
const WRITE: u32 = 2;

/// Where the device's registers are.
pub(crate) fn register(offset: u32) -> u32 {
    u32::try_from(layout::VIRTIO).unwrap() + offset
}

pub(crate) const STATUS: u32 = 0x70;

/// A piece of memory as a driver describes it: address, length, and whether the device writes there.
pub(crate) type Buffer = (u32, u32, bool);

impl Guest {
    /// Accepts these of the device's own features, and sets its queue up. There are no buffers in it.
    pub(crate) fn set_up_device(self, features: u32, queue_size: u32) -> Guest {
        let writes = [
            (STATUS, 1),
            (STATUS, 3),
            (0x24, 0),
            (0x20, features),
            (0x24, 1),
            (0x20, 1), // VERSION_1.
            (STATUS, 11),
            (0x38, queue_size),
            (0x80, DESCRIPTORS),
            (0x90, AVAILABLE),
            (0xa0, USED),
            (0x44, 1),
        ];
        writes.into_iter().fold(self, |guest, (offset, value)| {
            guest.store_long(register(offset), value)
        })
    }

    /// Describes each of `chains`, and puts it into the ring of those that are available.
    pub(crate) fn describe(self, chains: &[&[Buffer]]) -> Guest {
        let mut guest = self;
        let mut index = 0;
        for (slot, chain) in (AVAILABLE + 4..).step_by(2).zip(chains) {
            guest = guest.store_word(slot, u16::try_from(index).unwrap());
            for (at, (address, bytes, writable)) in chain.iter().enumerate() {
                let next = if at + 1 < chain.len() { NEXT } else { 0 };
                let write = if *writable { WRITE } else { 0 };
                let place = DESCRIPTORS + 16 * index;
                index += 1;
                guest = guest
                    .store_long(place, *address)
                    .store_long(place + 8, *bytes)
                    .store_long(place + 12, index << 16 | next | write);
            }
        }
        guest
    }

    /// Says that so many chains are available.
    pub(crate) fn make_available(self, count: u16) -> Guest {
        self.store_word(AVAILABLE + 2, count)
    }

    /// Starts the device, which finds what is available.
    pub(crate) fn start_device(self) -> Guest {
        self.store_long(register(STATUS), 15)
    }

    /// Waits until so many chains have come back.
    pub(crate) fn wait_used(self, count: u16) -> Guest {
        self.wait_for(USED + 2, count)
    }
}
