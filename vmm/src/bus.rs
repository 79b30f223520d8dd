//! From an address that a guest touched to the device that answers.

use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A device with registers in an address space.
///
/// Offsets are from the start of the device's range. `data` is as long as the guest's access, or,
/// for string I/O, a multiple of it.
pub trait BusDevice: Send {
    /// Fills `data`, which is all zeroes.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that processors take turns with.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// An address space with devices: ports, or physical memory that is not RAM.
#[derive(Default)]
pub struct Bus {
    /// By start; no two overlap.
    devices: Vec<(Range<u64>, SharedDevice)>,
}

opaque_debug!(Bus);

impl Bus {
    /// Puts `device` at `range`.
    ///
    /// # Panics
    ///
    /// If something is there already: addresses are given out by this program alone.
    pub fn insert(&mut self, range: Range<u64>, device: SharedDevice) {
        let at = self
            .devices
            .partition_point(|(other, _)| other.start < range.start);
        let free_before = at == 0 || self.devices[at - 1].0.end <= range.start;
        let free_behind = at == self.devices.len() || range.end <= self.devices[at].0.start;
        assert!(free_before && free_behind, "two devices at {range:#x?}");
        self.devices.insert(at, (range, device));
    }

    /// Reads as the guest does. Where nothing is, all bits are ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => {
                data.fill(0);
                let mut device = device.lock().expect("no device panics");
                device.read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes as the guest does. Where nothing is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            let mut device = device.lock().expect("no device panics");
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &SharedDevice)> {
        let behind = self
            .devices
            .partition_point(|(range, _)| range.start <= address);
        let (range, device) = self.devices.get(behind.checked_sub(1)?)?;
        range
            .contains(&address)
            .then(|| (address - range.start, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers reads with the offset and remembers what was written.
    #[derive(Default)]
    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset.to_le_bytes()[0];
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_owns_the_address() {
        let (low, high) = (Arc::new(Mutex::new(Echo::default())), Arc::default());
        let high: Arc<Mutex<Echo>> = high;
        let mut bus = Bus::default();
        bus.insert(0x2000..0x3000, high.clone());
        bus.insert(0x1000..0x1008, low.clone());

        for (address, want) in [
            (0x0fff, [0xff, 0xff]),
            (0x1000, [0, 0]),
            (0x1007, [7, 0]),
            (0x1008, [0xff, 0xff]),
            (0x2010, [0x10, 0]),
            (0x3000, [0xff, 0xff]),
            (u64::MAX, [0xff, 0xff]),
        ] {
            let mut data = [0x55; 2];
            bus.read(address, &mut data);
            assert_eq!(data, want, "{address:#x}");
            bus.write(address, &[1]);
        }
        assert_eq!(low.lock().unwrap().0, [(0, vec![1]), (7, vec![1])]);
        assert_eq!(high.lock().unwrap().0, [(0x10, vec![1])]);
    }

    #[test]
    #[should_panic(expected = "two devices at")]
    fn two_devices_cannot_share_an_address() {
        let mut bus = Bus::default();
        let device = Arc::new(Mutex::new(Echo::default()));
        bus.insert(0x1000..0x1008, device.clone());
        bus.insert(0x1007..0x1010, device);
    }
}
