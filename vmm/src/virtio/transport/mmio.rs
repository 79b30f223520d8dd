//! The transport's registers (virtio 1.2, section 4.2.2): which accesses mean what, and when they are
//! allowed to.

use std::sync::Arc;

use virtio_queue::QueueT;

use super::Transport;
use crate::bus::BusDevice;
use crate::fair_mutex::FairMutex;
use crate::virtio::registers::{self as register, status};

impl Transport {
    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => register::MAGIC_VALUE,
            register::VERSION => 2,
            register::DEVICE_ID => self.info.id,
            register::VENDOR_ID => register::VENDOR_ID_VALUE,
            register::DEVICE_FEATURES => half(self.offered_features(), self.device_features_select),
            register::QUEUE_SIZE_MAX => self
                .selected()
                .map_or(0, |index| self.queues[index].max_size().into()),
            register::QUEUE_READY => self
                .selected()
                .map_or(0, |index| self.queues[index].ready().into()),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            register::CONFIG_GENERATION => self.config_generation,
            // There is no shared memory: its length and place are all ones.
            register::SHARED_MEMORY_LENGTH_LOW..=register::SHARED_MEMORY_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_READY => self.set_queue_ready(value),
            register::QUEUE_NOTIFY => self.on_notify(value),
            register::INTERRUPT_ACKNOWLEDGE => self.interrupt_status &= !value,
            register::STATUS => self.set_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & !status::NEEDS_RESET != status::HAS_DRIVER {
            return;
        }
        match self.driver_features_select {
            0 => set_half(&mut self.driver_features, Half::Low, value),
            1 => set_half(&mut self.driver_features, Half::High, value),
            _ => {}
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(setup) = self.setup() else { return };
        match offset {
            register::QUEUE_SIZE => setup.size = value,
            register::QUEUE_DESCRIPTORS_LOW => set_half(&mut setup.descriptors, Half::Low, value),
            register::QUEUE_DESCRIPTORS_HIGH => set_half(&mut setup.descriptors, Half::High, value),
            register::QUEUE_AVAILABLE_LOW => set_half(&mut setup.available, Half::Low, value),
            register::QUEUE_AVAILABLE_HIGH => set_half(&mut setup.available, Half::High, value),
            register::QUEUE_USED_LOW => set_half(&mut setup.used, Half::Low, value),
            register::QUEUE_USED_HIGH => set_half(&mut setup.used, Half::High, value),
            _ => {}
        }
    }

    fn on_notify(&mut self, value: u32) {
        if let Ok(index) = usize::try_from(value) {
            self.on_kick(index);
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = config.get(start..).unwrap_or_default();
        let length = bytes.len().min(data.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }
}

#[derive(Clone, Copy)]
enum Half {
    Low,
    High,
}

fn set_half(target: &mut u64, half: Half, value: u32) {
    *target = match half {
        Half::Low => *target & !0xffff_ffff | u64::from(value),
        Half::High => *target & 0xffff_ffff | u64::from(value) << 32,
    };
}

pub(super) fn half(value: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => value,
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(shifted & 0xffff_ffff).expect("masked")
}

/// Processors take turns with whoever serves the device.
impl BusDevice for Arc<FairMutex<Transport>> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.read_config(offset, data);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            if self.status & status::HAS_DRIVER == status::HAS_DRIVER {
                self.device.write_config(offset, data);
            }
        } else if let Ok(value) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}
