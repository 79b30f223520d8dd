//! Noise: a driver that does anything to its device, from the start or in the middle of honest work.

use proptest::prelude::{Strategy, any, prop_oneof, proptest};
use vm_memory::{Bytes, GuestAddress};

use super::testing::{AVAILABLE, DESCRIPTORS, Driver, EVENT_IDX, USED, VERSION_1};
use crate::bus::BusDevice;
use crate::virtio::registers as register;

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
        let failures = driver.platform.0.lock().unwrap().failures.clone();
        proptest::prop_assert_eq!(failures, Vec::<String>::new());
        // And it can always start anew.
        driver.write(register::STATUS, 0);
        driver.memory.write_obj(0_u32, GuestAddress(AVAILABLE)).unwrap();
        driver.memory.write_obj(0_u32, GuestAddress(USED)).unwrap();
        driver.negotiate(VERSION_1);
        driver.set_up_queue(8, DESCRIPTORS);
        driver.write(register::STATUS, 15);
        driver.available = 0;
        driver.memory.write_obj(0_u16, GuestAddress(AVAILABLE + 4)).unwrap();
        driver.memory.write_obj([0_u8; 16], GuestAddress(DESCRIPTORS)).unwrap();
        driver.add_buffer();
        driver.kick();
        proptest::prop_assert_eq!(driver.used(), 1);
    }
}
