//! For tests: a device that echoes, a driver, and what happens around the transport between them.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use virtio_queue::QueueOwnedT;

use super::mmio::half;
use super::*;
use crate::bus::BusDevice;
use crate::virtio::registers::QUEUE_NOTIFY;
use crate::virtio::state::{self, DeviceState, StateError};

pub(in crate::virtio) const DESCRIPTORS: u64 = 0x1000;
pub(in crate::virtio) const AVAILABLE: u64 = 0x2000;
pub(in crate::virtio) const USED: u64 = 0x3000;
pub(in crate::virtio) const QUEUE_SIZE: u16 = 8;

/// What happened around the transport.
#[derive(Debug, Default, PartialEq)]
pub(in crate::virtio) struct World {
    pub(in crate::virtio) interrupts: u32,
    /// What all of them were for.
    pub(in crate::virtio) told: Signal,
    pub(in crate::virtio) watched_queues: usize,
    pub(in crate::virtio) postponed: u32,
    pub(in crate::virtio) watched: Vec<Interest>,
    pub(in crate::virtio) failures: Vec<String>,
    /// How often the registers were put elsewhere.
    pub(in crate::virtio) moves: u32,
}

#[derive(Clone, Default)]
pub(in crate::virtio) struct TestPlatform(pub(in crate::virtio) Arc<Mutex<World>>);

impl Platform for TestPlatform {
    fn interrupt(&self, told: Signal) -> io::Result<()> {
        let mut world = self.0.lock().unwrap();
        world.interrupts += 1;
        world.told = world.told.and(told);
        Ok(())
    }

    fn watch_kicks(&mut self, queues: usize) -> io::Result<()> {
        self.0.lock().unwrap().watched_queues = queues;
        Ok(())
    }

    fn pass_kicks_on(&mut self, events: &[&EventFd]) -> io::Result<()> {
        self.watch_kicks(events.len())
    }

    fn unwatch_kicks(&mut self) -> io::Result<()> {
        self.watch_kicks(0)
    }

    fn moved(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().moves += 1;
        Ok(())
    }

    fn kick(&self, _queue: usize, kick: Kick) -> io::Result<()> {
        assert_eq!(kick, Kick::Make);
        self.0.lock().unwrap().postponed += 1;
        Ok(())
    }

    fn watch(&mut self, old: &[Interest], new: &[Interest]) -> io::Result<()> {
        let mut world = self.0.lock().unwrap();
        assert_eq!(world.watched, old);
        world.watched = new.to_vec();
        Ok(())
    }

    fn fail(&self, error: DeviceError) {
        self.0.lock().unwrap().failures.push(error.to_string());
    }
}

/// Gives every buffer back with as many bytes as it has taken buffers. What it is to do next is
/// in the first byte of guest memory.
struct Echo {
    taken: u32,
    active: Arc<AtomicBool>,
}

pub(in crate::virtio) const ORDER: GuestAddress = GuestAddress(0);
pub(in crate::virtio) const BEHAVE: u8 = 0;
pub(in crate::virtio) const FAIL_ON_HOST: u8 = 1;
/// Take no buffers.
pub(in crate::virtio) const DECLINE: u8 = 2;
/// Add another buffer for each that was taken, as a driver on another processor would.
pub(in crate::virtio) const NEVER_ENDING: u8 = 3;

impl VirtioDevice for Echo {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: 42,
            features: 1 << 5,
            queue_sizes: vec![QUEUE_SIZE, 16],
        }
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5]
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        self.active.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        assert!(self.active.load(Ordering::Relaxed));
        let order: u8 = mem.read_obj(ORDER).unwrap();
        let source = io::ErrorKind::BrokenPipe.into();
        match order {
            FAIL_ON_HOST => {
                let action = "break";
                return Err(DeviceError::Host { action, source });
            }
            DECLINE => return Ok(Signal::NONE),
            _ => {}
        }
        let guest = |source| DeviceError::Guest { index, source };
        let queue = &mut queues[index];
        let chains: Vec<_> = queue.iter(mem).map_err(guest)?.collect();
        for chain in &chains {
            self.taken += 1;
            queue
                .add_used(mem, chain.head_index(), self.taken)
                .map_err(guest)?;
            if order == NEVER_ENDING {
                let next: u16 = mem.read_obj(GuestAddress(AVAILABLE + 2)).unwrap();
                mem.write_obj(next.wrapping_add(1), GuestAddress(AVAILABLE + 2))
                    .unwrap();
            }
        }
        if chains.is_empty() {
            return Ok(Signal::NONE);
        }
        Ok(Signal::queue(index))
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::readable(7, 99)]
    }

    fn reset(&mut self) {
        self.active.store(false, Ordering::Relaxed);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.taken)
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        self.taken = state::read(own)?;
        Ok(())
    }
}

/// A driver, and what is behind its device.
pub(in crate::virtio) struct Driver {
    pub(in crate::virtio) transport: Transport,
    pub(in crate::virtio) platform: TestPlatform,
    pub(in crate::virtio) memory: GuestMemoryMmap,
    pub(in crate::virtio) available: u16,
    /// Whether [`Echo`] is between its activation and its reset.
    pub(in crate::virtio) device_active: Arc<AtomicBool>,
}

pub(in crate::virtio) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub(in crate::virtio) const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

impl Driver {
    pub(in crate::virtio) fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        Self::over(memory)
    }

    /// A driver that has this memory.
    pub(in crate::virtio) fn over(memory: GuestMemoryMmap) -> Self {
        let device_active = Arc::new(AtomicBool::default());
        let device = Echo {
            taken: 0,
            active: device_active.clone(),
        };
        Self {
            device_active,
            ..Self::of(Box::new(device), memory)
        }
    }

    /// The driver of this device.
    pub(in crate::virtio) fn of(device: Box<dyn VirtioDevice>, memory: GuestMemoryMmap) -> Self {
        let platform = TestPlatform::default();
        let boxed = Box::new(platform.clone());
        let transport = Transport::new("device".into(), device, memory.clone(), boxed).unwrap();
        Self {
            transport,
            platform,
            memory,
            available: 0,
            device_active: Arc::default(),
        }
    }

    /// The transport; there is another in its place, of which nobody hears.
    pub(in crate::virtio) fn take_transport(&mut self) -> Transport {
        let other = Self::over(self.memory.clone()).transport;
        std::mem::replace(&mut self.transport, other)
    }

    /// Forgets everything but that descriptor 0 is a buffer, as another driver.
    pub(in crate::virtio) fn forget(&mut self) {
        self.available = 0;
        for ring in [AVAILABLE, USED] {
            self.memory.write_obj(0_u32, GuestAddress(ring)).unwrap();
        }
        let first = GuestAddress(AVAILABLE + 4);
        self.memory.write_obj(0_u16, first).unwrap();
        let descriptors = GuestAddress(DESCRIPTORS);
        self.memory.write_obj([0_u8; 16], descriptors).unwrap();
    }

    /// A driver whose device is in use.
    pub(in crate::virtio) fn active(features: u64) -> Self {
        let mut driver = Self::new();
        driver.negotiate(features);
        driver.set_up_queue(QUEUE_SIZE.into(), DESCRIPTORS);
        driver.write(register::STATUS, 15);
        assert_eq!(driver.read(register::STATUS), 15);
        // The kicks of the start: there is nothing in the queues.
        driver.platform.0.lock().unwrap().postponed = 0;
        driver
    }

    pub(in crate::virtio) fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(in crate::virtio) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(in crate::virtio) fn negotiate(&mut self, features: u64) {
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 3);
        for select in [0, 1] {
            self.write(register::DRIVER_FEATURES_SELECT, select);
            self.write(register::DRIVER_FEATURES, half(features, select));
        }
        self.write(register::STATUS, 11);
    }

    pub(in crate::virtio) fn set_up_queue(&mut self, size: u32, descriptors: u64) {
        self.write(register::QUEUE_SELECT, 0);
        self.write(register::QUEUE_SIZE, size);
        for (low, address) in [
            (register::QUEUE_DESCRIPTORS_LOW, descriptors),
            (register::QUEUE_AVAILABLE_LOW, AVAILABLE),
            (register::QUEUE_USED_LOW, USED),
        ] {
            self.write(low, half(address, 0));
            self.write(low + 4, half(address, 1));
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// Makes descriptor 0 available once more.
    pub(in crate::virtio) fn add_buffer(&mut self) {
        self.available = self.available.wrapping_add(1);
        self.memory
            .write_obj(self.available, GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    pub(in crate::virtio) fn kick(&mut self) {
        self.write(QUEUE_NOTIFY, 0);
    }

    pub(in crate::virtio) fn order(&self, order: u8) {
        self.memory.write_obj(order, ORDER).unwrap();
    }

    pub(in crate::virtio) fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    pub(in crate::virtio) fn set_used_event(&self, value: u16) {
        let at = AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(in crate::virtio) fn available_event(&self) -> u16 {
        let at = USED + 4 + 8 * u64::from(QUEUE_SIZE);
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(in crate::virtio) fn interrupts(&self) -> u32 {
        self.platform.0.lock().unwrap().interrupts
    }

    pub(in crate::virtio) fn needs_reset(&mut self) -> bool {
        self.read(register::STATUS) & status::NEEDS_RESET != 0
    }
}
