//! The end of a device before that of the machine.

use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::Transport;
use crate::virtio::state::{DeviceState, StateError};
use crate::virtio::{DeviceError, DeviceInfo, Signal, VirtioDevice};

impl Transport {
    /// Whatever the driver has left undone is over, and the device gone with all that it had of the
    /// host's. Registers are left, which do nothing.
    pub fn retire(&mut self) {
        self.reset();
        self.device = Box::new(Retired(self.info.clone()));
    }
}

/// What is left of a device.
struct Retired(DeviceInfo);

impl VirtioDevice for Retired {
    fn info(&self) -> DeviceInfo {
        self.0.clone()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn process(
        &mut self,
        _index: usize,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        Ok(Signal::NONE)
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&())
    }

    fn restore(&mut self, _own: &Value) -> Result<(), StateError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, VERSION_1};

    #[test]
    fn a_device_that_is_gone_does_nothing_whatever_its_driver_does() {
        let mut driver = Driver::active(VERSION_1);
        driver.transport.retire();
        assert!(driver.platform.0.lock().unwrap().watched.is_empty());
        driver.add_buffer();
        driver.kick();
        assert_eq!((driver.used(), driver.interrupts()), (0, 0));
    }
}
