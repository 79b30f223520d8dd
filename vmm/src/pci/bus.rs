//! The bus: from an address in its range of memory to a function's configuration space or window.
//!
//! Processors take turns with the whole bus. What has to be fast (kicks, interrupts) does not come
//! through here.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::config::{Config, Identity};
use crate::bus::BusDevice;
use crate::layout;

/// A function, number 0 of its device.
pub trait Function: Send {
    /// Fills `data` from the configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);

    /// Takes `data` for the configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// Where it answers in memory, if it does.
    fn window(&self) -> Option<Range<u64>>;

    /// Fills `data`, which is all zeroes, from the window.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` for the window.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A function that others have, too.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// Devices of a bus: 5 bits of an address.
pub const DEVICES_MAX: usize = 32;

/// In an offset into the configuration spaces, the bits of a register are below this one,
const FUNCTION_SHIFT: u32 = 12;
/// and those of the function below this one.
const DEVICE_SHIFT: u32 = 15;

/// The bus, in one range of memory: configuration spaces first, windows behind.
#[derive(Default)]
pub struct PciBus {
    /// By number of the device.
    devices: BTreeMap<u64, SharedFunction>,
}

opaque_debug!(PciBus);

impl PciBus {
    /// A bus with nothing but the bridge to the processors.
    pub fn new() -> PciBus {
        let mut bus = PciBus::default();
        bus.insert(0, Arc::new(Mutex::new(Bridge::new())));
        bus
    }

    /// The range of memory that is the bus's.
    pub fn range() -> Range<u64> {
        layout::PCI_CONFIG..layout::PCI_END
    }

    /// Puts a device with one function at a number.
    ///
    /// # Panics
    ///
    /// If there is one already, or no such number: numbers are given out by this program alone.
    pub fn insert(&mut self, number: u32, function: SharedFunction) {
        let number = u64::from(number);
        assert!(number < DEVICES_MAX as u64, "device {number} on a bus");
        let before = self.devices.insert(number, function);
        assert!(before.is_none(), "two devices are number {number}");
    }

    /// Takes the device with that number away, if there is one.
    pub fn remove(&mut self, number: u32) -> Option<SharedFunction> {
        self.devices.remove(&u64::from(number))
    }

    /// The function whose configuration space is there, and the register.
    fn configured(&self, offset: u64) -> Option<(MutexGuard<'_, dyn Function + 'static>, usize)> {
        let register = offset & ((1 << FUNCTION_SHIFT) - 1);
        // Functions other than number 0 have the bits between the shifts, and are not there.
        let first = offset >> FUNCTION_SHIFT & ((1 << (DEVICE_SHIFT - FUNCTION_SHIFT)) - 1) == 0;
        let function = self.devices.get(&(offset >> DEVICE_SHIFT))?;
        let register = usize::try_from(register).expect("12 bits");
        first.then(|| (lock(function), register))
    }

    /// The function that answers at an address, and where in its window that is. If the guest has put
    /// several there, the first does.
    fn answering(&self, address: u64) -> Option<(MutexGuard<'_, dyn Function + 'static>, u64)> {
        self.devices.values().find_map(|function| {
            let function = lock(function);
            let window = function.window()?;
            window
                .contains(&address)
                .then(|| (function, address - window.start))
        })
    }
}

fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn Function + 'static> {
    function.lock().expect("no function panics")
}

impl BusDevice for PciBus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset < layout::PCI_CONFIG_BYTES {
            match self.configured(offset) {
                Some((mut function, register)) => function.read_config(register, data),
                None => data.fill(0xff),
            }
        } else {
            match self.answering(layout::PCI_CONFIG + offset) {
                Some((mut function, offset)) => function.read(offset, data),
                // Where real buses read as ones. A driver whose device was taken away resets it all the
                // same and reads its status until that is 0 (Linux's does, in vp_reset), and here no
                // device leaves it waiting.
                None => data.fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset < layout::PCI_CONFIG_BYTES {
            if let Some((mut function, register)) = self.configured(offset) {
                function.write_config(register, data);
            }
        } else if let Some((mut function, offset)) = self.answering(layout::PCI_CONFIG + offset) {
            function.write(offset, data);
        }
    }
}

/// The bridge to the processors: guests expect one, and have no use for it.
struct Bridge(Config);

impl Bridge {
    fn new() -> Bridge {
        // As QEMU's generic host bridge, which guests know.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem: 0,
        };
        Bridge(Config::new(identity, 0..0))
    }
}

impl Function for Bridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn window(&self) -> Option<Range<u64>> {
        None
    }

    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::super::config::{COMMAND, WINDOW};
    use super::*;

    /// Answers reads of its window with the offset, and remembers the last write.
    struct Echo(Config, Option<(u64, Vec<u8>)>);

    impl Function for Echo {
        fn read_config(&mut self, offset: usize, data: &mut [u8]) {
            self.0.read(offset, data);
        }

        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.0.write(offset, data);
        }

        fn window(&self) -> Option<Range<u64>> {
            self.0.window()
        }

        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset.to_le_bytes()[0];
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1 = Some((offset, data.to_vec()));
        }
    }

    const AT: u64 = layout::PCI_MEMORY - layout::PCI_CONFIG;

    fn bus() -> (PciBus, Arc<Mutex<Echo>>) {
        let identity = Identity {
            vendor: 1,
            device: 2,
            revision: 3,
            class: 4,
            subsystem: 5,
        };
        let start = u32::try_from(layout::PCI_MEMORY).unwrap();
        let config = Config::new(identity, start..start + 0x1000);
        let echo = Arc::new(Mutex::new(Echo(config, None)));
        let mut bus = PciBus::new();
        bus.insert(3, echo.clone());
        (bus, echo)
    }

    fn read(bus: &mut PciBus, offset: u64) -> u32 {
        let mut data = [0; 4];
        bus.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_that_looks_everywhere_finds_what_is_there_and_nothing_else() {
        let (mut bus, _) = bus();
        let mut found = Vec::new();
        for space in 0..layout::PCI_CONFIG_BYTES >> FUNCTION_SHIFT {
            let identity = read(&mut bus, space << FUNCTION_SHIFT);
            if identity != u32::MAX {
                found.push((space, identity));
            }
        }
        assert_eq!(found, [(0, 0x0008_1b36), (3 << 3, 0x0002_0001)]);
    }

    #[test]
    fn a_window_answers_where_the_guest_has_put_it() {
        let (mut bus, echo) = bus();
        let space = 3 << DEVICE_SHIFT;
        assert_eq!(read(&mut bus, AT + 8), 0);
        bus.write(space + COMMAND as u64, &[2, 0]);
        assert_eq!(read(&mut bus, AT + 8), 8);
        bus.write(AT + 9, &[1, 2]);
        assert_eq!(echo.lock().unwrap().1.take(), Some((9, vec![1, 2])));
        bus.write(space + WINDOW as u64, &0xe500_0000_u32.to_le_bytes());
        assert_eq!(read(&mut bus, AT + 8), 0);
        assert_eq!(read(&mut bus, 0x500_0008), 8);
        // It may be put where the bus is not.
        bus.write(space + WINDOW as u64, &0x1000_u32.to_le_bytes());
        assert_eq!(read(&mut bus, 0x500_0008), 0);
        bus.write(
            space + WINDOW as u64,
            &layout::PCI_CONFIG.to_le_bytes()[..4],
        );
        assert_eq!(read(&mut bus, 0), 0x0008_1b36);
    }

    #[test]
    #[should_panic(expected = "two devices are number 3")]
    fn two_devices_cannot_have_one_number() {
        let (mut bus, echo) = bus();
        bus.insert(3, echo);
    }
}
