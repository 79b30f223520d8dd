//! The transport in front of a device that echoes, behind a driver that may lie.

use super::testing::{
    AVAILABLE, BEHAVE, DECLINE, DESCRIPTORS, Driver, EVENT_IDX, FAIL_ON_HOST, NEVER_ENDING,
    QUEUE_SIZE, VERSION_1,
};
use super::*;
use crate::bus::BusDevice;

#[test]
fn a_device_is_recognised_and_offers_its_features() {
    let mut driver = Driver::new();
    for (offset, want) in [
        (register::MAGIC, 0x7472_6976),
        (register::VERSION, 2),
        (register::DEVICE_ID, 42),
        (register::QUEUE_SIZE_MAX, 8),
        (register::SHARED_MEMORY_LENGTH_LOW, u32::MAX),
        (register::STATUS, 0),
        (0x7c, 0),
    ] {
        assert_eq!(driver.read(offset), want, "{offset:#x}");
    }
    driver.write(register::QUEUE_SELECT, 2);
    assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 0);
    for (select, want) in [(0, 1 << 5 | 1 << 28 | 1 << 29), (1, 1), (2, 0)] {
        driver.write(register::DEVICE_FEATURES_SELECT, select);
        assert_eq!(driver.read(register::DEVICE_FEATURES), want);
    }
    let mut config = [9; 3];
    driver
        .transport
        .read(register::CONFIG + 3, &mut config[..2]);
    assert_eq!(config, [4, 5, 9]);
    let mut beyond = [0; 4];
    driver.transport.read(register::CONFIG + 5000, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn status_goes_forward_step_by_step_and_back_by_reset_alone() {
    // Writes in order, and the status that is left.
    for (writes, want) in [
        (&[1][..], 1),
        (&[3], 0),
        (&[1, 3], 3),
        (&[1, 2], 1),
        (&[1, 3, 1], 3),
        (&[1, 3, 7], 3),
        (&[1, 3, 15], 3),
        (&[1, 0], 0),
        (&[1, 0x81], 0x81),
        (&[1, 0x81, 0x83], 0x81),
        (&[1, 0x81, 0, 1], 1),
        (&[1, 3, 0x43], 3),
        (&[1, 3, 0x103], 3),
    ] {
        let mut driver = Driver::new();
        for value in writes {
            driver.write(register::STATUS, *value);
        }
        assert_eq!(driver.read(register::STATUS), want, "{writes:?}");
    }
}

#[test]
fn features_are_accepted_once_and_only_as_offered() {
    for (features, want) in [
        (VERSION_1, 11),
        (VERSION_1 | 1 << 5 | EVENT_IDX, 11),
        (1 << 5, 3),
        (VERSION_1 | 1 << 6, 3),
        (VERSION_1 | 1 << 63, 3),
    ] {
        let mut driver = Driver::new();
        driver.negotiate(features);
        assert_eq!(driver.read(register::STATUS), want, "{features:#x}");
    }
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.write(register::DRIVER_FEATURES, u32::MAX);
    assert_eq!(driver.transport.driver_features, VERSION_1);
}

#[test]
fn buffers_go_round_and_the_driver_hears_of_it() {
    let mut driver = Driver::active(VERSION_1);
    assert_eq!(driver.platform.0.lock().unwrap().watched_queues, 2);
    driver.add_buffer();
    driver.add_buffer();
    driver.kick();
    assert_eq!((driver.used(), driver.interrupts()), (2, 1));
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 1);
    driver.write(register::INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    driver.kick();
    assert_eq!((driver.used(), driver.interrupts()), (2, 1));
    let stats = driver.transport.counters().stats();
    assert_eq!((stats.kicks, stats.interrupts, stats.failures), (2, 1, 0));
}

#[test]
fn buffers_that_were_there_before_activation_are_served() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(8, DESCRIPTORS);
    driver.add_buffer();
    driver.kick();
    assert_eq!(driver.used(), 0);
    driver.write(register::STATUS, 15);
    // Not by the processor that says so.
    assert_eq!(driver.used(), 0);
    assert_eq!(driver.platform.0.lock().unwrap().postponed, 2);
    driver.kick();
    assert_eq!(driver.used(), 1);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut driver = Driver::active(VERSION_1);
    driver
        .memory
        .write_obj(1_u16, GuestAddress(AVAILABLE))
        .unwrap();
    driver.add_buffer();
    driver.kick();
    assert_eq!((driver.used(), driver.interrupts()), (1, 0));

    let mut driver = Driver::active(VERSION_1 | EVENT_IDX);
    driver.set_used_event(1); // After the second buffer.
    driver.add_buffer();
    driver.kick();
    assert_eq!((driver.used(), driver.interrupts()), (1, 0));
    driver.add_buffer();
    driver.kick();
    assert_eq!((driver.used(), driver.interrupts()), (2, 1));
}

#[test]
fn the_next_kick_is_asked_for_after_each_round() {
    let mut driver = Driver::active(VERSION_1 | EVENT_IDX);
    for count in 1..20 {
        driver.add_buffer();
        driver.kick();
        assert_eq!(driver.available_event(), count);
    }
}

#[test]
fn a_device_that_leaves_buffers_alone_is_not_asked_for_ever() {
    let mut driver = Driver::active(VERSION_1 | EVENT_IDX);
    driver.order(DECLINE);
    driver.add_buffer();
    driver.kick();
    assert_eq!(driver.used(), 0);
    assert_eq!(driver.platform.0.lock().unwrap().postponed, 0);
    driver.order(BEHAVE);
    driver.kick();
    assert_eq!(driver.used(), 1);
}

#[test]
fn a_driver_that_adds_without_end_does_not_starve_others() {
    let mut driver = Driver::active(VERSION_1);
    driver.order(NEVER_ENDING);
    driver.add_buffer();
    driver.kick();
    assert!(driver.used() < 20 * QUEUE_SIZE);
    assert_eq!(driver.platform.0.lock().unwrap().postponed, 1);
}

#[test]
fn an_impossible_queue_is_refused() {
    for (size, descriptors) in [
        (0, DESCRIPTORS),
        (3, DESCRIPTORS),
        (16, DESCRIPTORS),
        (1 << 16 | 8, DESCRIPTORS),
        (8, DESCRIPTORS + 8),
        (8, 0xfff0),
        (8, 0x10000),
        (8, u64::MAX - 15),
    ] {
        let mut driver = Driver::new();
        driver.negotiate(VERSION_1);
        driver.set_up_queue(size, descriptors);
        assert_eq!(driver.read(register::QUEUE_READY), 0);
        assert!(driver.needs_reset(), "{size} at {descriptors:#x}");
        driver.write(register::STATUS, 15);
        driver.add_buffer();
        driver.kick();
        assert_eq!(driver.used(), 0);
    }
}

#[test]
fn queue_registers_are_closed_before_features_and_after_activation() {
    let mut driver = Driver::new();
    driver.set_up_queue(8, DESCRIPTORS);
    assert_eq!(driver.read(register::QUEUE_READY), 0);

    let mut driver = Driver::active(VERSION_1);
    driver.set_up_queue(4, 0x8000);
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    let queue = &driver.transport.queues[0];
    assert_eq!((queue.size(), queue.desc_table()), (8, DESCRIPTORS));
}

/// CVE-2026-5747 (Firecracker): a queue that was enlarged after its device had checked it.
#[test]
fn a_queue_in_use_is_neither_moved_nor_enlarged_by_starting_again() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(4, DESCRIPTORS);
    driver.write(register::STATUS, 15);
    for value in [11, 15, 3, 7, 15] {
        driver.write(register::STATUS, value);
        driver.write(register::QUEUE_READY, 0);
        driver.set_up_queue(8, 0x8000);
        driver.write(register::DRIVER_FEATURES, u32::MAX);
    }
    assert_eq!(driver.read(register::STATUS), 15);
    assert_eq!(driver.transport.driver_features, VERSION_1);
    assert_eq!(driver.transport.counters().stats().failures, 0);
    driver.add_buffer();
    driver.kick();
    assert_eq!(driver.used(), 1);
    // Five buffers would fit eight descriptors, but not four.
    driver.available += 4;
    driver.add_buffer();
    driver.kick();
    assert!(driver.needs_reset());
    assert_eq!(driver.used(), 1);
}

#[test]
fn an_index_that_jumps_stops_the_device_until_it_is_reset() {
    let mut driver = Driver::active(VERSION_1);
    driver.available = QUEUE_SIZE;
    driver.add_buffer(); // One more than fit.
    driver.kick();
    assert!(driver.needs_reset());
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 2);
    assert_eq!(driver.platform.0.lock().unwrap().watched, []);
    assert_eq!(driver.platform.0.lock().unwrap().failures, [""; 0]);
    assert_eq!(driver.transport.counters().stats().failures, 1);

    driver.kick();
    assert_eq!(driver.used(), 0);
    driver.write(register::STATUS, 0);
    assert_eq!(driver.read(register::STATUS), 0);
    assert_eq!(driver.platform.0.lock().unwrap().watched_queues, 0);

    driver.available = 0;
    driver
        .memory
        .write_obj(0_u16, GuestAddress(AVAILABLE + 2))
        .unwrap();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(8, DESCRIPTORS);
    driver.write(register::STATUS, 15);
    driver.add_buffer();
    driver.kick();
    assert_eq!(driver.used(), 1);
}

#[test]
fn a_failure_of_the_host_ends_the_machine() {
    let mut driver = Driver::active(VERSION_1);
    driver.order(FAIL_ON_HOST);
    driver.kick();
    let world = driver.platform.0.lock().unwrap();
    assert_eq!(world.failures, ["The device's backend failed: break"]);
    assert_eq!(world.watched, []);
}

#[test]
fn a_descriptor_is_waited_for_while_the_device_is_active() {
    let mut driver = Driver::new();
    assert_eq!(driver.platform.0.lock().unwrap().watched, []);
    driver.transport.on_device_ready(7);
    driver = Driver::active(VERSION_1);
    assert_eq!(driver.platform.0.lock().unwrap().watched[0].token, 7);
    driver.write(register::STATUS, 0);
    assert_eq!(driver.platform.0.lock().unwrap().watched, []);
}

#[test]
fn accesses_of_another_width_do_nothing() {
    let mut driver = Driver::new();
    driver.transport.write(register::STATUS, &[1]);
    driver
        .transport
        .write(register::STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.read(register::STATUS), 0);
    let mut data = [0; 1];
    driver.transport.read(register::MAGIC, &mut data);
    assert_eq!(data, [0]);
}
