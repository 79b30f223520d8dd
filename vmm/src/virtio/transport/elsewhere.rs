//! Tests of devices whose queues somebody else serves.

use std::sync::{Arc, Mutex};

use serde_json::Value;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::testing::{AVAILABLE, Driver, EVENT_IDX, QUEUE_SIZE, USED, VERSION_1};
use crate::events::event;
use crate::virtio::registers::STATUS;
use crate::virtio::state::{DeviceState, StateError};
use crate::virtio::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};

/// The device's one token.
const CALL: u32 = 3;

/// What the device is asked to do, in order.
#[derive(Clone, Debug, Default)]
struct Calls(Arc<Mutex<Vec<&'static str>>>);

impl Calls {
    fn add(&self, call: &'static str) {
        self.0.lock().unwrap().push(call);
    }

    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[derive(Debug)]
struct Elsewhere {
    kick: EventFd,
    calls: Calls,
}

impl VirtioDevice for Elsewhere {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: 42,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
        }
    }

    fn kicks(&self) -> Option<Vec<&EventFd>> {
        Some(vec![&self.kick])
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        self.calls.add("activate");
        Ok(())
    }

    fn process(
        &mut self,
        _index: usize,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        self.calls.add("process");
        Ok(Signal::NONE)
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::readable(CALL, 9)]
    }

    fn on_ready(
        &mut self,
        _token: u32,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        Ok(Signal::queue(0))
    }

    fn reset(&mut self) {
        self.calls.add("reset");
    }

    /// Whoever served it has used six buffers.
    fn quiesce(
        &mut self,
        queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        self.calls.add("quiesce");
        queues[0].set_next_avail(6);
        queues[0].set_next_used(6);
        Ok(Signal::NONE)
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::empty())
    }

    fn restore(&mut self, _own: &Value) -> Result<(), StateError> {
        self.calls.add("restore");
        Ok(())
    }
}

fn driver(memory: GuestMemoryMmap) -> (Driver, Calls) {
    let calls = Calls::default();
    let device = Elsewhere {
        kick: event().unwrap(),
        calls: calls.clone(),
    };
    (Driver::of(Box::new(device), memory), calls)
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
}

#[test]
fn its_rings_are_left_alone_and_every_call_interrupts() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let memory = memory();
        let (mut driver, calls) = driver(memory.clone());
        driver.negotiate(features);
        driver.set_up_queue(QUEUE_SIZE.into(), super::testing::DESCRIPTORS);
        // What a driver writes that wants no interrupts, and what its device wrote that wants no kicks.
        memory.write_obj(1_u16, GuestAddress(AVAILABLE)).unwrap();
        memory.write_obj(1_u16, GuestAddress(USED)).unwrap();
        driver.set_used_event(7);
        driver.write(STATUS, 15);
        assert_eq!(calls.take(), ["activate", "process"]);
        assert_eq!(driver.platform.0.lock().unwrap().watched_queues, 1);

        driver.add_buffer();
        driver.kick();
        assert_eq!(calls.take(), ["process"]);
        let flags: u16 = memory.read_obj(GuestAddress(USED)).unwrap();
        assert_eq!((flags, driver.available_event()), (1, 0));
        assert_eq!(driver.interrupts(), 0);
        for interrupts in [1, 2] {
            driver.transport.on_device_ready(CALL);
            assert_eq!(driver.interrupts(), interrupts);
        }
        driver.write(STATUS, 0);
        assert_eq!(calls.take(), ["reset"]);
        assert_eq!(driver.platform.0.lock().unwrap().watched_queues, 0);
    }
}

#[test]
fn it_is_served_again_after_a_snapshot_and_where_that_is_restored() {
    let memory = memory();
    let (mut first, calls) = driver(memory.clone());
    first.negotiate(VERSION_1);
    first.set_up_queue(QUEUE_SIZE.into(), super::testing::DESCRIPTORS);
    first.write(STATUS, 15);
    calls.take();
    first.transport.hold();
    let state = first.transport.save().unwrap();
    let queue = state.queues[0];
    assert_eq!((queue.next_available, queue.next_used), (6, 6));
    first.kick();
    assert_eq!(calls.take(), ["quiesce"]);
    first.transport.release();
    assert_eq!(calls.take(), ["process"]);

    let (mut other, calls) = driver(memory);
    other.transport.restore(&state).unwrap();
    assert_eq!(calls.take(), ["restore", "activate", "process"]);
    assert_eq!(other.platform.0.lock().unwrap().watched_queues, 1);
    assert_eq!(other.interrupts(), 1);
}
