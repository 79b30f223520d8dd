//! Places of devices.

use crate::layout;

/// Where a device's registers are, at first, and its interrupt line, or, on PCI, its number there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Window {
    pub address: u64,
    pub gsi: u32,
}

impl Window {
    /// The place of device number `index` on PCI. Number 0 there is the bridge to the processors.
    pub fn slot(index: usize) -> Window {
        Window::on_bus(u32::try_from(index).expect("a few devices") + 1)
    }

    /// The place of the device with this number on PCI, from 1.
    pub fn on_bus(number: u32) -> Window {
        let before = u64::from(number.saturating_sub(1));
        Window {
            address: layout::PCI_MEMORY + before * layout::PCI_WINDOW_BYTES,
            gsi: number,
        }
    }

    /// The place of device number `index`.
    pub fn nth(index: usize) -> Window {
        let number = u32::try_from(index).expect("a few devices");
        Window {
            address: layout::VIRTIO + u64::from(number) * layout::VIRTIO_BYTES,
            gsi: layout::VIRTIO_GSI + number,
        }
    }
}
