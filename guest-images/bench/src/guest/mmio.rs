//! The virtio transport over memory-mapped registers, version 2, from the driver's side (virtio 1.2,
//! section 4.2).

use crate::machine::{memory, ticks};
use crate::queue::Queue;
use crate::{Failure, Measured, words};

const MAGIC: usize = 0x000;
const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
const VERSION: usize = 0x004;
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SELECT: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SELECT: usize = 0x024;
const QUEUE_SELECT: usize = 0x030;
const QUEUE_SIZE_MAX: usize = 0x034;
const QUEUE_SIZE: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const STATUS: usize = 0x070;
const QUEUE_DESCRIPTORS: usize = 0x080;
const QUEUE_AVAILABLE: usize = 0x090;
const QUEUE_USED: usize = 0x0a0;
const CONFIG: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 1 << 1;
const DRIVER_OK: u32 = 1 << 2;
const FEATURES_OK: u32 = 1 << 3;

/// Features that every driver wants.
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// A device, found and reset.
#[derive(Clone, Copy)]
pub(crate) struct Device {
    window: usize,
}

impl Device {
    /// The first device of type `id` (section 5).
    pub(crate) fn find(command_line: &[u8], id: u32) -> Result<Device, Failure> {
        let device = words::windows(command_line)
            .map(|window| Device { window })
            .find(|device| {
                device.read(MAGIC) == MAGIC_VALUE
                    && device.read(VERSION) == 2
                    && device.read(DEVICE_ID) == id
            })
            .ok_or(Failure::NoDevice)?;
        device.write(STATUS, 0);
        Ok(device)
    }

    fn read(self, register: usize) -> u32 {
        memory::load(self.window.wrapping_add(register))
    }

    fn write(self, register: usize, value: u32) {
        memory::store(self.window.wrapping_add(register), value);
    }

    /// 64 bits of the configuration space.
    pub(crate) fn config(self, offset: usize) -> u64 {
        let at = CONFIG.wrapping_add(offset);
        join(self.read(at), self.read(at.wrapping_add(4)))
    }

    /// Agrees on those of the `wanted` features that the device has.
    pub(crate) fn negotiate(self, wanted: u64) -> Result<(), Failure> {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let offered = [0, 1].map(|half| {
            self.write(DEVICE_FEATURES_SELECT, half);
            self.read(DEVICE_FEATURES)
        });
        let accepted = join(offered[0], offered[1]) & (wanted | EVENT_IDX | VERSION_1);
        for (half, bits) in [(0, low(accepted)), (1, high(accepted))] {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, bits);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if accepted & VERSION_1 == 0 || self.read(STATUS) & FEATURES_OK == 0 {
            return Err(Failure::Refused);
        }
        Ok(())
    }

    /// Sets up queue `index` with at most `entries` entries.
    pub(crate) fn queue(self, index: u32, entries: u16) -> Result<Queue, Failure> {
        self.write(QUEUE_SELECT, index);
        let most = u16::try_from(self.read(QUEUE_SIZE_MAX)).unwrap_or(u16::MAX);
        if most < entries {
            return Err(Failure::Refused);
        }
        let event_idx = self.has_event_idx();
        let queue = Queue::new(self, index, entries, event_idx);
        self.write(QUEUE_SIZE, entries.into());
        for (register, address) in [
            (QUEUE_DESCRIPTORS, queue.descriptors()),
            (QUEUE_AVAILABLE, queue.available()),
            (QUEUE_USED, queue.used()),
        ] {
            let address = u64::try_from(address).unwrap_or_default();
            self.write(register, low(address));
            self.write(register.wrapping_add(4), high(address));
        }
        self.write(QUEUE_READY, 1);
        Ok(queue)
    }

    /// Whether the device offers it, which is when the driver has accepted it.
    fn has_event_idx(self) -> bool {
        self.write(DEVICE_FEATURES_SELECT, 0);
        u64::from(self.read(DEVICE_FEATURES)) & EVENT_IDX != 0
    }

    /// Lets the device run.
    pub(crate) fn start(self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Ends all that the device does.
    pub(crate) fn stop(self) {
        self.write(STATUS, 0);
        while self.read(STATUS) != 0 {}
    }

    /// Says that queue `index` has buffers.
    pub(crate) fn kick(self, index: u32) {
        self.write(QUEUE_NOTIFY, index);
    }
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or_default()
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

/// Reads a register of the first device `count` times.
pub(crate) fn reads(command_line: &[u8], count: u64) -> Result<Measured, Failure> {
    let window = words::windows(command_line)
        .next()
        .ok_or(Failure::NoDevice)?;
    let device = Device { window };
    let start = ticks();
    for _ in 0..count {
        device.read(MAGIC);
    }
    Ok(Measured {
        count,
        ticks: ticks().wrapping_sub(start),
    })
}
