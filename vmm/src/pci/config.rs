//! The configuration space of a function with one window (PCI Local Bus 3.0, chapter 6): bytes, of
//! which the guest may change some bits.

use std::ops::Range;

/// How much of a configuration space is there; what is behind it reads as zeroes.
pub const CONFIG_BYTES: usize = 256;

/// Offsets of registers.
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
pub(crate) const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
pub(crate) const WINDOW: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
/// Capabilities follow each other from here on.
const FIRST_CAPABILITY: usize = 0x40;

/// Bits of the command: answers in its window, accesses memory by itself, has no interrupt pin.
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_PIN: u16 = 1 << 10;
/// Bit of the status: there are capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface, the first in the highest byte of three.
    pub class: u32,
    pub subsystem: u16,
}

/// A configuration space.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; CONFIG_BYTES],
    /// The bits that the guest may change.
    writable: [u8; CONFIG_BYTES],
    /// Of the window, a power of two, or zero without one.
    window_bytes: u32,
    /// Where the offset of the next capability goes, and where that will be.
    link: usize,
    next: usize,
}

impl Config {
    /// Of a function whose window is at `window` until the guest puts it elsewhere.
    ///
    /// # Panics
    ///
    /// If the window is not a power of two large, or not at a multiple of that: windows are made by
    /// this program alone.
    pub fn new(identity: Identity, window: Range<u32>) -> Config {
        let window_bytes = window.end - window.start;
        let mut config = Config {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            window_bytes,
            link: CAPABILITIES,
            next: FIRST_CAPABILITY,
        };
        config.put(VENDOR, &identity.vendor.to_le_bytes());
        config.put(DEVICE, &identity.device.to_le_bytes());
        config.put(REVISION, &[identity.revision]);
        config.put(CLASS, &identity.class.to_le_bytes()[..3]);
        config.put(SUBSYSTEM_VENDOR, &identity.vendor.to_le_bytes());
        config.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        if window_bytes > 0 {
            assert!(window_bytes.is_power_of_two() && window.start.is_multiple_of(window_bytes));
            config.put(WINDOW, &window.start.to_le_bytes());
            config.allow(WINDOW, &(!(window_bytes - 1)).to_le_bytes());
            let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_PIN;
            config.allow(COMMAND, &command.to_le_bytes());
        }
        config
    }

    /// Adds a capability; `body` is what is behind its number and its link, and `writable` the bits
    /// of it that the guest may change, as far as there are any. Returns where it is.
    ///
    /// # Panics
    ///
    /// If there is no room.
    pub fn add_capability(&mut self, number: u8, body: &[u8], writable: &[u8]) -> usize {
        let start = self.next;
        let offset = u8::try_from(start).expect("capabilities fit");
        self.put(self.link, &[offset]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.put(start, &[number, 0]);
        self.put(start + 2, body);
        self.allow(start + 2, writable);
        self.link = start + 1;
        self.next = (start + 2 + body.len()).next_multiple_of(4);
        start
    }

    /// Sets what the guest cannot.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, bits: &[u8]) {
        self.writable[offset..offset + bits.len()].copy_from_slice(bits);
    }

    /// Reads as the guest does.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let there = self.bytes.get(offset..).unwrap_or_default();
        let count = there.len().min(data.len());
        data[..count].copy_from_slice(&there[..count]);
        data[count..].fill(0);
    }

    /// Writes as the guest does.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let there = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, writable), new) in there.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// Two bytes of it.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Four bytes of it.
    pub fn long(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the window is, if the function answers there.
    pub fn window(&self) -> Option<Range<u64>> {
        let start = u64::from(self.long(WINDOW));
        let answers = self.word(COMMAND) & COMMAND_MEMORY != 0 && self.window_bytes > 0;
        answers.then(|| start..start + u64::from(self.window_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 1,
            class: 0x01_0203,
            subsystem: 9,
        };
        Config::new(identity, 0xe010_0000..0xe010_8000)
    }

    #[test]
    fn a_guest_finds_the_identity_and_the_capabilities() {
        let mut config = config();
        let first = config.add_capability(0x11, &[1, 2, 3, 4, 5], &[]);
        let second = config.add_capability(9, &[6; 14], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(config.long(0), 0x5678_1234);
        assert_eq!(config.long(8), 0x0102_0301);
        assert_eq!(config.long(SUBSYSTEM_VENDOR), 0x0009_1234);
        assert_eq!(config.word(STATUS), 0x10);
        assert_eq!(config.word(CAPABILITIES), 0x40);
        assert_eq!(config.long(0x40), 0x0201_4811);
        assert_eq!(config.long(0x48), 0x0606_0009);
    }

    #[test]
    fn a_window_tells_its_size_moves_and_answers_only_when_it_is_told_to() {
        let mut config = config();
        assert_eq!(config.window(), None);
        config.write(COMMAND, &[2, 0]);
        assert_eq!(config.window(), Some(0xe010_0000..0xe010_8000));
        config.write(WINDOW, &[0xff; 4]);
        assert_eq!(config.long(WINDOW), 0xffff_8000);
        assert_eq!(config.window(), Some(0xffff_8000..0x1_0000_0000));
        config.write(WINDOW, &0xe234_5678_u32.to_le_bytes());
        assert_eq!(config.window(), Some(0xe234_0000..0xe234_8000));
        config.write(COMMAND + 1, &[0xff]);
        config.write(COMMAND, &[0]);
        assert_eq!((config.window(), config.word(COMMAND)), (None, 0x400));
    }

    #[test]
    fn what_a_guest_may_not_write_stays_and_what_is_not_there_is_zero() {
        let mut config = config();
        let at = config.add_capability(5, &[0; 4], &[0, 0xc0]);
        let before = config.clone();
        for offset in (0..CONFIG_BYTES).filter(|at| !(COMMAND..COMMAND + 2).contains(at)) {
            if !(WINDOW..WINDOW + 4).contains(&offset) && offset != at + 3 {
                config.write(offset, &[0xff]);
            }
        }
        assert_eq!(config.bytes, before.bytes);
        config.write(at + 2, &[0xff; 4]);
        assert_eq!(config.long(at + 2), 0xc000);
        // Across the end, and beyond.
        config.write(CONFIG_BYTES - 1, &[0xff; 4]);
        config.write(usize::MAX, &[0xff; 4]);
        let mut data = [7; 4];
        config.read(CONFIG_BYTES - 2, &mut data);
        assert_eq!(data, [0; 4]);
        data = [7; 4];
        config.read(usize::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
