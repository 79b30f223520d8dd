//! Noise: a driver that does anything to its device, from the start or in the middle of honest work.

use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use vm_memory::{Bytes, GuestAddress};

use super::TransportState;
use super::testing::{DESCRIPTORS, Driver, EVENT_IDX, VERSION_1};
use crate::bus::BusDevice;
use crate::virtio::registers as register;
use crate::virtio::state::QueueState;

/// One thing that a hostile driver may do.
#[derive(Clone, Debug)]
enum Act {
    Register(u64, u32),
    Access(u64, Vec<u8>),
    Memory(u64, u16),
    DeviceReady(u32),
}

fn any_act() -> impl Strategy<Value = Act> {
    let value = prop_oneof![
        any::<u32>(),
        0..16_u32,
        proptest::sample::select(vec![0, 1, 3, 11, 15, 0x1000, 0x2000, 0x3000]),
    ];
    prop_oneof![
        4 => (0..0x110_u64, value).prop_map(|(offset, value)| Act::Register(offset & !3, value)),
        1 => (any::<u64>(), any::<Vec<u8>>()).prop_map(|(at, data)| Act::Access(at, data)),
        2 => (0x1000..0x3100_u64, any::<u16>()).prop_map(|(at, value)| Act::Memory(at, value)),
        1 => (0..16_u32).prop_map(Act::DeviceReady),
    ]
}

/// A state that somebody has made up, near enough to a real one that some are accepted.
fn any_state() -> impl Strategy<Value = TransportState> {
    let address = || prop_oneof![0x1000..0x4000_u64, any::<u64>()];
    let queue = (
        any::<bool>(),
        prop_oneof![Just(8_u32), any::<u32>()],
        (address(), address(), address()),
        any::<(u16, u16)>(),
    )
        .prop_map(|(ready, size, addresses, next)| QueueState {
            ready,
            size,
            descriptors: addresses.0 & !15,
            available: addresses.1 & !1,
            used: addresses.2 & !3,
            next_available: next.0,
            next_used: next.1,
        });
    let status = proptest::sample::select(vec![0_u32, 1, 3, 11, 15, 15, 15, 0x4f, 0x83, 7]);
    (
        status,
        any::<bool>(),
        proptest::collection::vec(queue, 2),
        any::<[u32; 5]>(),
    )
        .prop_map(|(status, event_idx, queues, numbers)| TransportState {
            device_id: 42,
            status,
            driver_features: if event_idx {
                VERSION_1 | EVENT_IDX
            } else {
                VERSION_1
            },
            device_features_select: numbers[0],
            driver_features_select: numbers[1],
            queue_select: numbers[2],
            interrupt_status: numbers[3],
            config_generation: numbers[4],
            queues,
            device: 0.into(),
        })
}

fn act(driver: &mut Driver, acts: Vec<Act>) {
    for act in acts {
        match act {
            Act::Register(offset, value) => driver.write(offset, value),
            Act::Access(offset, mut data) => {
                driver.transport.write(offset, &data);
                driver.transport.read(offset, &mut data);
            }
            Act::Memory(at, value) => {
                driver.memory.write_obj(value, GuestAddress(at)).unwrap();
            }
            Act::DeviceReady(token) => driver.transport.on_device_ready(token),
        }
    }
}

/// Whatever has happened, an honest driver can start anew.
fn start_anew(driver: &mut Driver) {
    driver.write(register::STATUS, 0);
    driver.forget();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(8, DESCRIPTORS);
    driver.write(register::STATUS, 15);
    driver.add_buffer();
    driver.kick();
    assert_eq!(driver.used(), 1);
}

proptest! {
    /// From the start, and from the middle of an honest driver's work.
    #[test]
    fn a_driver_may_do_anything_to_its_device_and_no_harm(
        active: bool,
        acts in proptest::collection::vec(any_act(), 0..200),
    ) {
        let mut driver = match active {
            true => Driver::active(VERSION_1 | EVENT_IDX),
            false => Driver::new(),
        };
        act(&mut driver, acts);
        let failures = driver.platform.0.lock().unwrap().failures.clone();
        proptest::prop_assert_eq!(failures, Vec::<String>::new());
        start_anew(&mut driver);
    }

    #[test]
    fn a_device_restored_from_anything_is_a_device_or_refused(
        state in any_state(),
        acts in proptest::collection::vec(any_act(), 0..50),
    ) {
        let mut driver = Driver::new();
        if driver.transport.restore(&state).is_ok() {
            act(&mut driver, acts);
            start_anew(&mut driver);
        }
    }
}
