//! The common configuration of a PCI function (virtio 1.2, section 4.1.4.3): the transport's registers
//! as such a driver sees them. Interrupt vectors are the function's.

use virtio_queue::QueueT;

use super::Transport;
use crate::bus::BusDevice;
use crate::virtio::registers::{self as register, status};

/// Where fields are.
pub(crate) mod field {
    pub(crate) const DEVICE_FEATURES_SELECT: u64 = 0x00;
    pub(crate) const DEVICE_FEATURES: u64 = 0x04;
    pub(crate) const DRIVER_FEATURES_SELECT: u64 = 0x08;
    pub(crate) const DRIVER_FEATURES: u64 = 0x0c;
    pub(crate) const CONFIG_VECTOR: u64 = 0x10;
    pub(crate) const QUEUES: u64 = 0x12;
    pub(crate) const STATUS: u64 = 0x14;
    pub(crate) const CONFIG_GENERATION: u64 = 0x15;
    pub(crate) const QUEUE_SELECT: u64 = 0x16;
    pub(crate) const QUEUE_SIZE: u64 = 0x18;
    pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
    pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
    pub(crate) const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
    pub(crate) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(crate) const QUEUE_AVAILABLE: u64 = 0x28;
    pub(crate) const QUEUE_USED: u64 = 0x30;
}

/// All fields together.
pub(crate) const COMMON_BYTES: usize = 0x38;

impl Transport {
    /// All fields as they read now, but for the vectors.
    pub(crate) fn common(&self) -> [u8; COMMON_BYTES] {
        let mut bytes = [0; COMMON_BYTES];
        let mut put = |offset: u64, value: &[u8]| {
            let start = usize::try_from(offset).expect("a few bytes");
            bytes[start..start + value.len()].copy_from_slice(value);
        };
        let half = |value, select| super::mmio::half(value, select).to_le_bytes();
        let select = self.device_features_select;
        put(field::DEVICE_FEATURES_SELECT, &select.to_le_bytes());
        put(
            field::DEVICE_FEATURES,
            &half(self.offered_features(), select),
        );
        let select = self.driver_features_select;
        put(field::DRIVER_FEATURES_SELECT, &select.to_le_bytes());
        put(field::DRIVER_FEATURES, &half(self.driver_features, select));
        let queues = u16::try_from(self.queues.len()).expect("a few queues");
        put(field::QUEUES, &queues.to_le_bytes());
        put(field::STATUS, &self.status.to_le_bytes()[..1]);
        let generation = self.config_generation.to_le_bytes();
        put(field::CONFIG_GENERATION, &generation[..1]);
        put(field::QUEUE_SELECT, &self.queue_select.to_le_bytes()[..2]);
        if let Some(index) = self.selected() {
            let (queue, setup) = (&self.queues[index], &self.setups[index]);
            let size = match setup.size {
                0 => u32::from(queue.max_size()),
                size => size,
            };
            put(field::QUEUE_SIZE, &size.to_le_bytes()[..2]);
            put(field::QUEUE_ENABLE, &u16::from(queue.ready()).to_le_bytes());
            // Each queue is kicked at a place of its own.
            put(
                field::QUEUE_NOTIFY_OFFSET,
                &self.queue_select.to_le_bytes()[..2],
            );
            put(field::QUEUE_DESCRIPTORS, &setup.descriptors.to_le_bytes());
            put(field::QUEUE_AVAILABLE, &setup.available.to_le_bytes());
            put(field::QUEUE_USED, &setup.used.to_le_bytes());
        }
        bytes
    }

    /// A driver writes to a field, as wide as that is; or to a half of a wide one.
    pub(crate) fn write_common(&mut self, offset: u64, data: &[u8]) {
        if let (field::QUEUE_DESCRIPTORS..=field::QUEUE_USED, 8) = (offset, data.len()) {
            self.write_common(offset, &data[..4]);
            return self.write_common(offset + 4, &data[4..]);
        }
        let mut bytes = [0; 4];
        let Some(place) = bytes.get_mut(..data.len()) else {
            return;
        };
        place.copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        let target = match (offset, data.len()) {
            (field::DEVICE_FEATURES_SELECT, 4) => register::DEVICE_FEATURES_SELECT,
            (field::DRIVER_FEATURES_SELECT, 4) => register::DRIVER_FEATURES_SELECT,
            (field::DRIVER_FEATURES, 4) => register::DRIVER_FEATURES,
            (field::STATUS, 1) => register::STATUS,
            (field::QUEUE_SELECT, 2) => register::QUEUE_SELECT,
            (field::QUEUE_SIZE, 2) => register::QUEUE_SIZE,
            (field::QUEUE_ENABLE, 2) if value == 1 => return self.enable_queue(),
            (field::QUEUE_DESCRIPTORS..COMMON_END, 4) if offset.is_multiple_of(4) => {
                // As memory-mapped devices have them, where each queue address takes 16 bytes.
                let field = (offset - field::QUEUE_DESCRIPTORS) / 8;
                register::QUEUE_DESCRIPTORS_LOW + 16 * field + offset % 8
            }
            _ => return,
        };
        self.write(target, &value.to_le_bytes());
    }

    /// A queue whose size the driver has not changed is as large as it can be.
    fn enable_queue(&mut self) {
        if let Some(index) = self.selected() {
            let most = self.queues[index].max_size().into();
            if let Some(setup) = self.setup()
                && setup.size == 0
            {
                setup.size = most;
            }
        }
        self.write(register::QUEUE_READY, &1_u32.to_le_bytes());
    }

    /// Which causes there are, and have not been asked for before.
    pub(crate) fn take_interrupt_status(&mut self) -> u8 {
        let causes = std::mem::take(&mut self.interrupt_status);
        causes.to_le_bytes()[0]
    }

    /// Number of the queue that the driver speaks of, if there is one.
    pub(crate) fn selected_queue(&self) -> Option<usize> {
        self.selected()
    }

    /// The device's registers are elsewhere from now on.
    pub(crate) fn moved(&mut self) {
        if self.has(status::DRIVER_OK)
            && let Err(error) = self.platform.moved()
        {
            self.host_failure("watch for kicks at another place", error);
        }
    }

    /// Whether the driver's last write of the status was a reset.
    pub(crate) fn is_reset(&self) -> bool {
        self.status == 0
    }
}

const COMMON_END: u64 = COMMON_BYTES as u64;

#[cfg(test)]
mod tests {
    use super::super::testing::{AVAILABLE, DESCRIPTORS, Driver, USED, VERSION_1};
    use super::*;

    fn get(driver: &Driver, offset: u64, bytes: usize) -> u64 {
        let start = usize::try_from(offset).unwrap();
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&driver.transport.common()[start..start + bytes]);
        u64::from_le_bytes(value)
    }

    fn put(driver: &mut Driver, offset: u64, bytes: usize, value: u64) {
        let data = value.to_le_bytes();
        driver.transport.write_common(offset, &data[..bytes]);
    }

    fn start(driver: &mut Driver) {
        put(driver, field::STATUS, 1, 1);
        put(driver, field::STATUS, 1, 3);
        for select in [0, 1] {
            put(driver, field::DRIVER_FEATURES_SELECT, 4, select);
            put(
                driver,
                field::DRIVER_FEATURES,
                4,
                VERSION_1 >> (32 * select),
            );
        }
        put(driver, field::STATUS, 1, 11);
    }

    #[test]
    fn a_driver_of_a_pci_function_finds_and_starts_a_device() {
        let mut driver = Driver::new();
        assert_eq!(get(&driver, field::QUEUES, 2), 2);
        put(&mut driver, field::DEVICE_FEATURES_SELECT, 4, 1);
        assert_eq!(get(&driver, field::DEVICE_FEATURES, 4), 1);
        start(&mut driver);
        assert_eq!(get(&driver, field::STATUS, 1), 11);
        assert_eq!(get(&driver, field::DRIVER_FEATURES, 4), 1);
        // As large as it can be, without a word.
        assert_eq!(get(&driver, field::QUEUE_SIZE, 2), 8);
        put(&mut driver, field::QUEUE_DESCRIPTORS, 8, DESCRIPTORS);
        put(&mut driver, field::QUEUE_AVAILABLE, 4, AVAILABLE);
        put(&mut driver, field::QUEUE_AVAILABLE + 4, 4, 0);
        put(&mut driver, field::QUEUE_USED, 8, USED);
        assert_eq!(get(&driver, field::QUEUE_USED, 8), USED);
        put(&mut driver, field::QUEUE_ENABLE, 2, 1);
        assert_eq!(get(&driver, field::QUEUE_ENABLE, 2), 1);
        put(&mut driver, field::STATUS, 1, 15);
        driver.add_buffer();
        driver.kick();
        assert_eq!((driver.used(), driver.interrupts()), (1, 1));
        assert_eq!(driver.transport.take_interrupt_status(), 1);
        assert_eq!(driver.transport.take_interrupt_status(), 0);
        put(&mut driver, field::STATUS, 1, 0);
        assert!(driver.transport.is_reset());
        assert_eq!(get(&driver, field::QUEUE_ENABLE, 2), 0);
    }

    #[test]
    fn fields_of_another_width_and_queues_that_are_not_there_are_left_alone() {
        let mut driver = Driver::new();
        start(&mut driver);
        let before = driver.transport.common();
        for (offset, bytes) in [
            (field::QUEUE_SIZE, 1),
            (field::QUEUE_SIZE, 4),
            (field::QUEUE_ENABLE, 4),
            (field::QUEUE_DESCRIPTORS, 2),
            (field::QUEUE_DESCRIPTORS + 1, 4),
            (field::QUEUE_USED + 4, 8),
            (field::CONFIG_GENERATION, 1),
            (field::STATUS, 4),
            (COMMON_END, 4),
            (u64::MAX, 8),
        ] {
            put(&mut driver, offset, bytes, 1);
            assert_eq!(driver.transport.common(), before, "{offset:#x} {bytes}");
        }
        // Only a reset stops a queue.
        put(&mut driver, field::QUEUE_ENABLE, 2, 0);
        put(&mut driver, field::QUEUE_SELECT, 2, 2);
        assert_eq!(driver.transport.selected_queue(), None);
        put(&mut driver, field::QUEUE_ENABLE, 2, 1);
        assert_eq!(get(&driver, field::QUEUE_SIZE, 2), 0);
    }
}
